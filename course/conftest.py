"""How `pytest --nbval course/` compares a notebook with its stored outputs.

nbval runs every cell and compares text. Here it also learns what a reader would see after `clear_output`,
display updates and Output widgets, looks at the pictures, and lets machine-made text (addresses,
seconds, stderr, HTML) differ.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from nbval.plugin import IPyNbCell, IPyNbFile
from PIL import Image

from coursekit.notebooks import KERNEL_ENV

NOT_COMPARED = ("stderr", "text/html", "application/javascript", "image/gif", "image/svg+xml")
SAME = {
    r"0x[0-9a-fA-F]{6,}": "0xADDR",
    r"\S*ipykernel_\d+\S*\.py": "<cell>",
    r"\b\d+(\.\d+)? ?(it/s|s/it|ms|µs|us|ns|seconds|sec|s)\b": "<time>",
}
MOST_DIFFERENCE = 0.02  # mean |difference| of thumbnails; another matplotlib makes 0.002, another seed 0.09


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Prepare each notebook as it is collected."""
    if isinstance(collector, IPyNbFile):
        collector.skip_compare += NOT_COMPARED
        collector.sanitize_patterns.update(SAME)
        collector.get_kernel_message = Screen(collector)
        start_kernel = collector.setup

        def setup() -> None:
            with patch.dict(os.environ, KERNEL_ENV):  # for the kernel; the other tests keep their own
                start_kernel()
        collector.setup = setup


class Screen:
    """Kernel messages as they change what stands under a cell; nbval alone only ever appends."""

    def __init__(self, notebook: IPyNbFile) -> None:
        self.receive: Callable[..., dict[str, Any]] = notebook.get_kernel_message
        self.notebook = notebook
        self.cell: IPyNbCell | None = None
        self.capturing: dict[str, str] = {}  # Output widgets that are catching what is printed
        self.shown: dict[str, tuple[list, int]] = {}  # display_id -> where it stands
        self.clear_next = False

    def __call__(self, timeout: float | None = None, stream: str = "iopub") -> dict[str, Any]:
        message = self.receive(timeout=timeout, stream=stream)
        kind, content = message["msg_type"], message["content"]
        outputs = self.cell.test_outputs if self.cell is not None else None
        display_id = content.get("transient", {}).get("display_id")
        if kind in ("comm_open", "comm_msg"):
            state = (content.get("data") or {}).get("state") or {}
            if "msg_id" in state:
                self.capturing[content["comm_id"]] = state["msg_id"]
        if outputs is None:
            return message
        if kind in ("stream", "display_data", "execute_result", "clear_output", "update_display_data") \
                and any(self.capturing.values()):
            message["msg_type"] = "comm_captured"  # nbval passes over whatever starts with comm
        elif kind == "clear_output":
            message["msg_type"] = "comm_cleared"
            self.clear_next = content["wait"]
            if not content["wait"]:
                outputs.clear()
        elif kind == "update_display_data":
            message["msg_type"] = "comm_updated"
            where, i = self.shown.get(display_id, ([], 0))
            if i < len(where):
                where[i]["data"], where[i]["metadata"] = content["data"], content["metadata"]
        elif kind in ("stream", "display_data", "execute_result"):
            if self.clear_next:
                outputs.clear()
                self.clear_next = False
            if display_id:
                self.shown[display_id] = (outputs, len(outputs))
        return message


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Run a cell, then compare its pictures, which nbval does not look at."""
    if not isinstance(item, IPyNbCell):
        return (yield)
    item.parent.get_kernel_message.cell = item
    result = yield
    if item.options["check"] and item.cell.execution_count is not None:
        stored, new = list(thumbnails(item.cell.outputs)), list(thumbnails(item.test_outputs or []))
        if len(stored) != len(new):
            item.raise_cell_error(f"{len(stored)} pictures are stored, {len(new)} were drawn")
        for i, (before, now) in enumerate(zip(stored, new, strict=True), start=1):
            difference = np.abs(before - now).mean()
            if difference > MOST_DIFFERENCE:
                item.raise_cell_error(f"picture {i} is not the stored one: it differs by {difference:.3f}, "
                                      f"at most {MOST_DIFFERENCE} is allowed")
    return result


def thumbnails(outputs: list) -> Iterator[np.ndarray]:
    """Each PNG as 32 x 32 grey values in [0, 1]."""
    for output in outputs:
        png = output.get("data", {}).get("image/png")
        if png:
            image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").convert("L")
            yield np.asarray(image.resize((32, 32), Image.Resampling.BOX), dtype=float) / 255
