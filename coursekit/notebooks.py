"""The authors' tools: run notebooks, normalise them, hand them out, move them to a fork.

A notebook is committed with its outputs and is its own only source. `execute` is the one way those
outputs come about, and running it again changes no byte; `coursekit.nbcheck` says what is wrong with
one. Both need the extra: `pip install "coursekit[course]"`.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import io
import os
import re
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
from nbformat import NotebookNode
from PIL import Image

from coursekit.fetch import replacing

# What a kernel is given when outputs are made and again when `pytest --nbval` compares them.
KERNEL_ENV = {"PYTHONHASHSEED": "0", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "2",
              "CUDA_VISIBLE_DEVICES": "", "COURSE_PROFILE": "quick"}

SETUP = """\
from importlib.util import find_spec

if find_spec("coursekit") is None:  # on Colab, the first time: about a minute
    %pip install -q git+https://github.com/{repository}"""
BADGE = ("[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
         "(https://colab.research.google.com/github/{repository}/blob/main/{path})")

SOLUTION = re.compile(r"^([ \t]*)### BEGIN SOLUTION.*?^[ \t]*### END SOLUTION[^\n]*", re.S | re.M)
HIDDEN = re.compile(r"^[ \t]*### BEGIN HIDDEN TESTS.*?^[ \t]*### END HIDDEN TESTS[^\n]*\n?", re.S | re.M)
EXERCISE = re.compile(r"^#{2,4} Exercise (?P<number>\d+)\b.*?(\(difficulty (?P<difficulty>[1-5]) of 5, "
                      r"\d+ minutes?\))?[ \t]*$", re.M)

_KEPT_OF_NOTEBOOK = {"accelerator", "colab", "coursekit"}
_KEPT_OF_CELL = {"tags", "jupyter", "slideshow"}
_KEPT_OF_IMAGE = {"alt", "width", "height"}


# ------------------------------------------------------------------------------- where the course lives

def checkout(path: Path) -> Path:
    """The root of the checkout that a file or folder lies in: the folder with the pyproject.toml."""
    for folder in (path.resolve(), *path.resolve().parents):
        if (folder / "pyproject.toml").is_file():
            return folder
    raise ValueError(f"{path} does not lie in a checkout of the course: no pyproject.toml above it")


def repository(root: Path) -> str:
    """OWNER/REPO on GitHub, from [project.urls] in pyproject.toml, the one place that says it."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    url = project.get("urls", {}).get("Repository", "")
    found = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+)", url)
    if not found:
        raise ValueError(f"[project.urls] needs Repository = \"https://github.com/OWNER/REPO\", got {url!r}")
    return found[1]


def setup_source(root: Path) -> str:
    """The first code cell of every notebook: installs the course where it is missing."""
    return SETUP.format(repository=repository(root))


def badge(root: Path, path: Path) -> str:
    """The Markdown link that opens a notebook in Colab."""
    return BADGE.format(repository=repository(root), path=path.resolve().relative_to(root).as_posix())


def fork(root: Path, new: str) -> list[Path]:
    """Point pyproject.toml, the README and every badge and setup cell at OWNER/REPO; returns what changed."""
    if not re.fullmatch(r"[\w-]+/[\w.-]*[\w-]", new):
        raise ValueError(f"a fork is named OWNER/REPO, as in ada/generative-images, got {new!r}")
    old = re.compile(rf"(github(?:\.com)?/){re.escape(repository(root))}(?![\w-])")
    changed = {}
    for path in (root / "pyproject.toml", root / "README.md", *sorted((root / "course").glob("*.ipynb"))):
        text = path.read_text(encoding="utf-8")
        moved = old.sub(rf"\g<1>{new}", text)
        if moved != text:
            if path.suffix == ".ipynb":  # cell ids follow from what the cells say
                moved = serialised(clean(nbformat.reads(moved, as_version=4)))
            changed[path] = moved
    for path, moved in reversed(changed.items()):  # pyproject.toml last: what is cut short can be run again
        _replace(path, moved)
    return list(changed)


# ------------------------------------------------------------------------------------ run and normalise

def execute(path: Path, timeout: int = 900) -> bool:
    """Run a notebook from top to bottom and write it back normalised; True if a byte changed.

    timeout: seconds for one cell. A cell that fails raises nbclient's CellExecutionError and leaves the
    file as it was; one tagged raises-exception is meant to fail.
    """
    from nbclient import NotebookClient  # not for those who only want `fork` or `student`

    nb = read(path)
    nb.metadata.pop("widgets", None)
    for cell in nb.cells:  # a cell that shows nothing this time must not keep last time's outputs
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = NotebookClient(nb, timeout=timeout, kernel_name="python3", record_timing=False,
                            resources={"metadata": {"path": str(path.resolve().parent)}})
    client.execute(env=os.environ | KERNEL_ENV)
    nb.metadata["coursekit"] = {"executed": code_hash(nb)}
    return write(path, clean(nb))


def code_hash(nb: NotebookNode) -> str:
    """The hash of all code but the setup cell; `execute` stores it, so outputs of other code are seen."""
    sources = [cell.source for cell in nb.cells if cell.cell_type == "code"][1:]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()[:16]


def clean(nb: NotebookNode) -> NotebookNode:
    """The same notebook without what differs from run to run: ids, times, widget state, addresses, stderr.

    Counts run 1, 2, 3 (a null count would make nbval skip the cell); pictures are stored with at most 256
    colours where that cannot be seen; nbgrader's metadata follows from the solution markers.
    """
    nb = copy.deepcopy(nb)
    kept = {key: value for key, value in nb.metadata.items() if key in _KEPT_OF_NOTEBOOK}
    nb.metadata = NotebookNode(kept | {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python"}})
    nb.nbformat, nb.nbformat_minor = 4, 5
    seen: Counter[str] = Counter()
    count = 0
    for cell in nb.cells:
        cell.metadata = NotebookNode({k: v for k, v in cell.metadata.items() if k in _KEPT_OF_CELL})
        name = hashlib.sha256(cell.source.encode()).hexdigest()[:8]
        seen[name] += 1
        cell.id = name if seen[name] == 1 else f"{name}-{seen[name]}"
        if cell.cell_type == "code":
            count += 1
            ran = cell.execution_count is not None or bool(cell.outputs)
            cell.execution_count = count if ran else None
            cell.outputs = _clean_outputs(cell.outputs, count)
    _mark_for_grading(nb)
    return nb


def _clean_outputs(outputs: list[NotebookNode], count: int) -> list[NotebookNode]:
    kept: list[NotebookNode] = []
    for output in outputs:
        if output.output_type == "stream":
            if output.name == "stderr":
                continue
            output.text = _tidy(output.text)
            if kept and kept[-1].output_type == "stream":  # where a stream is cut is a matter of timing
                kept[-1].text += output.text
                continue
        elif output.output_type == "error":
            output.evalue = _tidy(output.evalue)
            output.traceback = [f"{output.ename}: {output.evalue}"]
        else:
            _clean_data(output)
            if output.output_type == "execute_result":
                output.execution_count = count
        kept.append(output)
    return kept


def _clean_data(output: NotebookNode) -> None:
    data = output.data
    data.pop("application/vnd.jupyter.widget-view+json", None)  # useless without the state, and random
    if "text/plain" in data:
        data["text/plain"] = _tidy(data["text/plain"])
    if "image/png" in data:
        data["image/png"] = _fewer_colours(data["image/png"])
    described = {mime: {k: v for k, v in about.items() if k in _KEPT_OF_IMAGE}
                 for mime, about in output.metadata.items() if mime in data and isinstance(about, dict)}
    output.metadata = NotebookNode({mime: about for mime, about in described.items() if about})


def _tidy(text: str) -> str:
    text = re.sub(r"\S*ipykernel_\d+\S*\.py", "<cell>", text)
    return re.sub(r"0x[0-9a-fA-F]{6,}", "0xADDR", text)


def _fewer_colours(png: str) -> str:
    """The same picture with a palette of 256, if it is smaller and nobody could tell."""
    image = Image.open(io.BytesIO(base64.b64decode(png)))
    see_through = image.mode == "RGBA" and image.getchannel("A").getextrema() != (255, 255)
    if image.mode not in ("RGB", "RGBA") or see_through:
        return png
    full = image.convert("RGB")
    few = full.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    difference = np.asarray(full, dtype=float) - np.asarray(few.convert("RGB"), dtype=float)
    file = io.BytesIO()
    few.save(file, "PNG", optimize=True)
    packed = base64.b64encode(file.getvalue()).decode()
    return packed if (difference**2).mean() < 4 and len(packed) < len(png) else png


def _mark_for_grading(nb: NotebookNode) -> None:
    """nbgrader's metadata: on cells with solution markers, and on the first check after each."""
    points, solutions, unchecked = 1, 0, False  # an exercise is worth its difficulty
    for cell in nb.cells:
        if cell.cell_type == "markdown" and (heading := EXERCISE.search(cell.source)):
            points = int(heading["difficulty"] or 1)
        if cell.cell_type != "code":
            continue
        if "### BEGIN SOLUTION" in cell.source:
            solutions, unchecked = solutions + 1, True
            cell.metadata["nbgrader"] = _nbgrader(f"solution-{solutions}", solution=True)
        elif unchecked and is_check(cell):
            unchecked = False
            cell.metadata["nbgrader"] = _nbgrader(f"check-{solutions}", grade=True, locked=True,
                                                  points=points)
            points = 0  # an exercise of two parts is not worth twice as much


def _nbgrader(name: str, **said: Any) -> dict[str, Any]:
    return {"grade": False, "grade_id": name, "locked": False, "schema_version": 3, "solution": False,
            "task": False} | said


def is_check(cell: NotebookNode) -> bool:
    """Does this code cell test what the learner wrote?"""
    return cell.cell_type == "code" and bool(re.search(r"^\s*(checks\.\w+\(|assert\b)", cell.source, re.M))


# ---------------------------------------------------------------------------------- the student's edition

def student(nb: NotebookNode) -> NotebookNode:
    """The edition to hand out: solutions removed, and with them the outputs of those cells and their checks.

    The other outputs stay, as the goal to reach. The Colab badge goes: it opens the solved notebook.
    ValueError if a solution marker lacks its partner.
    """
    nb = clean(nb)
    nb.metadata.pop("coursekit", None)
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\[!\[Open in Colab\]\([^)]*\)\]\([^)]*\)\s*", "", cell.source)
            continue
        cell.source = HIDDEN.sub("", cell.source).rstrip()
        if "nbgrader" in cell.metadata:
            cell.source = SOLUTION.sub(r"\1# YOUR CODE HERE\n\1raise NotImplementedError()", cell.source)
            cell.outputs, cell.execution_count = [], None
        if re.search(r"### (BEGIN|END) (SOLUTION|HIDDEN TESTS)", cell.source):
            raise ValueError(f"a marker without its partner would give a solution away in:\n{cell.source}")
    return nb


# ------------------------------------------------------------------------------------------------- files

def read(path: Path) -> NotebookNode:
    """A notebook from its file; ValueError, naming the file, if it is none."""
    try:
        return nbformat.read(path, as_version=4)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, nbformat.ValidationError):
        raise ValueError(f"{path} is not a notebook") from None


def serialised(nb: NotebookNode) -> str:
    """The text of a notebook's file."""
    return nbformat.writes(nb).rstrip("\n") + "\n"


def write(path: Path, nb: NotebookNode) -> bool:
    """Write a notebook, whole or not at all; True if the file changed."""
    text = serialised(nb)
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    _replace(path, text)
    return True


def _replace(path: Path, text: str) -> None:
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")
