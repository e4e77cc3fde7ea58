"""Arrows point one way: who may import whom, how long a module is, and what an import must not cost."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "coursekit"
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path
           for path in sorted(ROOT.rglob("*.py"))}
ON_TOP = {"recipes", "objectives", "measures", "checks", "cli", "doctor", "notebooks", "nbcheck",
          "__main__"}  # may use all below
MOST_LINES = 350

MAY_IMPORT = {
    "schedules": set(),
    "diffusion": {"schedules"},
    "denoisers": {"schedules", "diffusion"},
    "samplers": {"schedules", "diffusion", "denoisers"},
    "toys": {"schedules", "diffusion", "denoisers"},
    "straight": {"schedules", "diffusion"},
    "training": set(),
    "progress": set(),
    "dip": {"training", "diffusion"},
    "two_stage": {"data", "denoisers", "diffusion", "nets", "progress", "samplers", "schedules", "training"},
    "fetch": set(),
    "formats": {"fetch"},
    "easel": set(),
    "fur": {"easel"},
    "drawn": {"easel", "fur"},
    "sources": {"fetch", "formats", "drawn", "easel", "fur"},
    "data": {"fetch", "sources"},
    "perceptual": {"fetch"},
    "checkpoints": {"fetch", "nets", "schedules", "denoisers"},
    "metrics": {"perceptual", "checkpoints"},
    "pictures": set(),
    "viz": {"pictures"},
    "learned_variance": {"schedules", "diffusion", "denoisers", "samplers"},
    "interop": {"schedules", "denoisers"},
    "quantization": {"nets.filtering", "nets.kpn"},
    "export": {"quantization", "nets.filtering", "nets.kpn"},
    "hub": {"checkpoints"},
    "text_to_image": {"schedules", "diffusion", "denoisers", "samplers", "learned_variance", "interop"},
    "canvas": {"pictures", "viz", "widgets"},
    "widgets": {"pictures", "viz", "schedules", "diffusion", "samplers"},
}


def imported(source: str, package: tuple[str, ...] = ()) -> set[str]:
    """The modules of coursekit that a text imports, also inside functions, however it is written."""
    names = [name for node in ast.walk(ast.parse(source)) for name in _names(node, ["coursekit", *package])]
    return {_module(name.split(".")[1:]) for name in names if name.split(".")[0] == "coursekit"}


def _names(node: ast.AST, package: list[str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = package[:len(package) - node.level + 1] if node.level else []
        yield from (".".join([*above, *filter(None, [node.module]), alias.name]) for alias in node.names)


def _module(parts: list[str]) -> str:
    """The longest part of a dotted name that is a module: schedules.NoiseSchedule is of schedules."""
    while parts and not any(ROOT.joinpath(*parts).with_suffix(end).exists() for end in ("", ".py")):
        parts = parts[:-1]
    return ".".join(parts)


def allowed(name: str) -> set[str]:
    if name.split(".")[0] in ON_TOP:
        return {other.removesuffix(".__init__") for other in MODULES}
    if name == "nets.__init__":
        return {other for other in MODULES if other.startswith("nets.")}
    if name.startswith("nets."):
        return {"nets.blocks", "nets.filtering"} - {name}
    return MAY_IMPORT.get(name, set())


@pytest.mark.parametrize("name", MODULES)
def test_imports_follow_the_diagram(name: str) -> None:
    package = tuple(name.split(".")[:-1])
    assert imported(MODULES[name].read_text(encoding="utf-8"), package) <= allowed(name)


@pytest.mark.parametrize(("source", "package", "found"), [
    ("import coursekit.nets.unet as u", (), {"nets.unet"}),
    ("from coursekit import viz, data", (), {"viz", "data"}),
    ("from coursekit.nets import UNet", (), {"nets"}),
    ("def f():\n    from coursekit.schedules import linear_schedule", (), {"schedules"}),
    ("from . import viz", (), {"viz"}),
    ("from .blocks import ResBlock", ("nets",), {"nets.blocks"}),
    ("from .. import viz", ("nets",), {"viz"}),
    ("import torch\nfrom coursekitten import viz", (), set()),
])
def test_no_way_of_importing_goes_unseen(source: str, package: tuple[str, ...], found: set[str]) -> None:
    assert imported(source, package) == found


@pytest.mark.parametrize("name", MODULES)
def test_a_module_can_be_read_at_a_sitting(name: str) -> None:
    assert len(MODULES[name].read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_the_core_does_not_pull_in_what_only_pictures_and_data_need() -> None:
    """`from coursekit.samplers import ddim` must not wait for matplotlib, widgets or a downloader."""
    heavy = ["matplotlib", "ipywidgets", "skimage", "kagglehub", "nbformat", "diffusers", "transformers",
             "huggingface_hub"]
    code = (f"import sys, coursekit.samplers, coursekit.training, coursekit.text_to_image, coursekit.hub\n"
            f"print([name for name in {heavy} if name in sys.modules])")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                         env=os.environ | {"PYTHONPATH": str(ROOT.parent)})
    assert run.stdout.strip() == "[]"
