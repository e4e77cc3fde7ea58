"""The authors' tools write what is stable, find the faults planted here, and hand out no solution."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from coursekit import nbcheck, notebooks

ROOT = Path(__file__).parents[1]
PYPROJECT = '[project]\nname = "x"\n[project.urls]\nRepository = "https://github.com/ada/course"\n'
PICTURE = """\
import matplotlib.pyplot as plt
import io
from IPython.display import Image, display
figure, axes = plt.subplots(figsize=(3, 2))
axes.plot([0, 1, 4, 9], linewidth=9)
file = io.BytesIO()
figure.savefig(file, format="png")
plt.close(figure)
display(Image(file.getvalue(), format="png", alt="a parabola"))"""


@pytest.fixture
def course(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small checkout with an empty course; kernels find coursekit, so the setup cell installs nothing."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    (tmp_path / "README.md").write_text("[x](https://github.com/ada/course), not github.com/ada/course-2\n")
    (tmp_path / "course").mkdir()
    return tmp_path / "course"


def written(course: Path, *cells: nbformat.NotebookNode, name: str = "01_x.ipynb") -> Path:
    """A notebook with title, badge and setup in front of the given cells, as an editor saves it."""
    path, root = course / name, course.parent
    nb = new_notebook(cells=[new_markdown_cell(f"# Title\n\n{notebooks.badge(root, path)}"),
                             new_code_cell(notebooks.setup_source(root)), *cells])
    nbformat.write(nb, path)
    return path


def published(course: Path, *cells: nbformat.NotebookNode, name: str = "01_x.ipynb") -> Path:
    """The same with counts and hash, as if it had been run (cells bring their own outputs)."""
    path = written(course, *cells, name=name)
    nb = notebooks.read(path)
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.execution_count = 1
    nb.metadata["coursekit"] = {"executed": notebooks.code_hash(nb)}
    notebooks.write(path, notebooks.clean(nb))
    return path


def png(mode: str = "RGB", pixels: np.ndarray | None = None) -> str:
    image = Image.new(mode, (8, 8)) if pixels is None else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def picture(alt: str | None) -> nbformat.NotebookNode:
    about = {} if alt is None else {"image/png": {"alt": alt}}
    return new_output("display_data", {"image/png": png(), "text/plain": "<picture>"}, metadata=about)


# -------------------------------------------------------------------------------------------- execution

def test_executing_twice_changes_no_byte_and_leaves_nothing_to_complain_about(course: Path) -> None:
    path = written(
        course, new_code_cell("import sys\nprint('a', end='')\nprint('b')\nprint('noise', file=sys.stderr)"),
        new_code_cell("object()"), new_code_cell(PICTURE),
        new_code_cell("from ipywidgets import IntSlider\nIntSlider(value=3)"),
        new_code_cell("raise RuntimeError('on purpose')", metadata={"tags": ["raises-exception"]}))
    assert notebooks.execute(path)
    once = path.read_bytes()
    assert not notebooks.execute(path)
    assert path.read_bytes() == once
    assert nbcheck.check(path) == []
    printed, thing, drawn, slider, error = (cell.outputs for cell in notebooks.read(path).cells[2:])
    assert [out.text for out in printed] == ["ab\n"]
    assert "0xADDR" in thing[0].data["text/plain"]
    assert drawn[0].metadata == {"image/png": {"alt": "a parabola"}}
    assert set(slider[0].data) == {"text/plain"}
    assert error[0].traceback == ["RuntimeError: on purpose"]
    assert [cell.get("execution_count") for cell in notebooks.read(path).cells] == [None, 1, 2, 3, 4, 5, 6]


def test_a_cell_that_fails_leaves_the_file_as_it_was(course: Path) -> None:
    path = written(course, new_code_cell("1 / 0"))
    before = path.read_bytes()
    with pytest.raises(Exception, match="ZeroDivisionError"):
        notebooks.execute(path)
    assert path.read_bytes() == before


def test_cleaning_is_idempotent_and_drops_what_differs_from_run_to_run(course: Path) -> None:
    cell = new_code_cell("x", execution_count=17, metadata={"execution": {"busy": "now"}, "tags": ["long"]},
                         outputs=[new_output("stream", name="stdout", text="one "),
                                  new_output("stream", name="stdout", text="two"),
                                  new_output("execute_result", {"text/plain": "<f at 0x7f12ab34cd>"},
                                             execution_count=17)])
    nb = new_notebook(cells=[cell, new_code_cell("x")], metadata={"widgets": {"a": {}}, "colab": {"a": 1}})
    clean = notebooks.clean(nb)
    assert notebooks.serialised(notebooks.clean(clean)) == notebooks.serialised(clean)
    assert clean.cells[0].metadata == {"tags": ["long"]}
    assert [out.get("text") for out in clean.cells[0].outputs] == ["one two", None]
    assert clean.cells[0].outputs[1].data["text/plain"] == "<f at 0xADDR>"
    assert clean.cells[0].outputs[1].execution_count == clean.cells[0].execution_count == 1
    assert clean.cells[1].execution_count is None
    assert len({cell.id for cell in clean.cells}) == 2
    assert "widgets" not in clean.metadata and clean.metadata["colab"] == {"a": 1}
    assert nb.cells[0].execution_count == 17


def test_pictures_lose_bytes_only_where_nobody_can_tell() -> None:
    rng = np.random.default_rng(0)
    chart = np.full((64, 64, 3), 255, np.uint8)
    chart[:, 10:20] = [0, 114, 178]
    noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)

    def kept(pixels: np.ndarray) -> np.ndarray:
        nb = new_notebook(cells=[new_code_cell("x", execution_count=1, outputs=[
            new_output("display_data", {"image/png": png(pixels=pixels)})])])
        data = notebooks.clean(nb).cells[0].outputs[0].data["image/png"]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))

    assert np.array_equal(kept(chart), chart)
    assert np.array_equal(kept(noise), noise)


# ---------------------------------------------------------------------------------- each fault is found

EXERCISE = "### Exercise 1 - Where did it go? (difficulty 2 of 5, 10 minutes)\n\n<details>look</details>"
SOLVED = "def f():\n    ### BEGIN SOLUTION\n    return 1\n    ### END SOLUTION"

FAULTS = {
    "an untagged error": ([new_code_cell("x", outputs=[new_output("error", ename="KeyError", evalue="",
                                                                   traceback=[])])], "ends in KeyError"),
    "a long cell": ([new_code_cell("\n".join("x = 1" for _ in range(16)))], "16 lines, at most 15"),
    "a very long cell": ([new_code_cell("\n".join("x = 1" for _ in range(26)), metadata={"tags": ["long"]})],
                         "26 lines, at most 25"),
    "a picture without words": ([new_code_cell("x", outputs=[picture(None)])], "without alt text"),
    "a picture with a blank for words": ([new_code_cell("x", outputs=[picture(" ")])], "without alt text"),
    "a markdown picture without words": ([new_markdown_cell("![](https://x.org/a.png)")], "without alt text"),
    "an html picture without words": ([new_markdown_cell('<img src="https://x.org/a.png" alt="">')],
                                      "without alt text"),
    "a broken link": ([new_markdown_cell("[on](02_y.ipynb)")], "02_y.ipynb, which does not exist"),
    "a link to no heading": ([new_markdown_cell("[up](#Nowhere)")], "no heading of that name"),
    "a path in the code": ([new_code_cell("open('/home/ada/x')")], "a path of one machine: /home/ada"),
    "a path in an output": ([new_code_cell("x", outputs=[new_output("stream", text="in /Users/ada/x")])],
                            "a path of one machine: /Users/ada/x"),
    "a marker alone": ([new_code_cell("### BEGIN SOLUTION\n1")], "unbalanced solution markers"),
    "markers in the wrong order": ([new_code_cell("### END SOLUTION\n### BEGIN SOLUTION")], "unbalanced"),
    "an exercise nobody can check": ([new_markdown_cell(EXERCISE), new_code_cell(SOLVED)],
                                     "neither a solution with a check"),
    "a check in the same cell": ([new_markdown_cell(f"## On\n\n{EXERCISE}"),
                                  new_code_cell(f"{SOLVED}\n\nchecks.f(f)")], "in a cell of its own"),
    "a check in the next section": ([new_markdown_cell(EXERCISE), new_code_cell(SOLVED),
                                     new_markdown_cell("## On"), new_code_cell("assert f() == 1")],
                                    "neither a solution with a check"),
    "an exercise of unknown length": ([new_markdown_cell(EXERCISE.replace("minutes", "miles")),
                                       new_code_cell(SOLVED), new_code_cell("checks.f(f)")],
                                      "difficulty 2 of 5"),
    "an exercise without a hint": ([new_markdown_cell(EXERCISE.replace("details", "p")),
                                    new_code_cell(SOLVED), new_code_cell("checks.f(f)")], "no hint"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_the_only_complaint(course: Path, fault: str) -> None:
    cells, complaint = FAULTS[fault]
    found = nbcheck.check(published(course, *cells))
    assert len(found) == 1 and complaint in found[0], found


def test_a_good_notebook_has_no_complaint(course: Path) -> None:
    published(course, name="02_y.ipynb")
    path = published(
        course, new_markdown_cell("## The law\n\n[on](02_y.ipynb), [back](#The-law), [up](02_y.ipynb#Title), "
                                  "[web](https://x.org), $E[x_0](x_t)$, `a[0](b)` ![cat](../cat.png)"),
        new_code_cell("x", outputs=[picture("a cat")]),
        new_code_cell("\n".join("x = 1" for _ in range(25)), metadata={"tags": ["long"]}),
        new_markdown_cell(EXERCISE), new_code_cell(SOLVED), new_code_cell("checks.f(f)"),
        new_markdown_cell(f"{EXERCISE}<details><summary>A good answer</summary></details>"))
    (course.parent / "cat.png").touch()
    assert nbcheck.check(path) == []


def test_stale_outputs_are_found(course: Path) -> None:
    path = published(course, new_code_cell("x = 1"))
    nb = notebooks.read(path)
    nb.cells[2].source = "x = 2"
    notebooks.write(path, notebooks.clean(nb))
    assert any("stale" in line for line in nbcheck.check(path))
    nb.cells[2].execution_count = None
    notebooks.write(path, nb)
    assert any("cell 2 was not run" in line for line in nbcheck.check(path))


def test_an_editor_s_traces_a_lost_badge_a_changed_setup_and_a_heavy_file_are_found(course: Path) -> None:
    path = published(course)
    path.write_text(path.read_text().replace('"tags"', '"x"').replace("\n", "\n ", 3))
    assert "not as the tools write it" in nbcheck.check(path)[0]
    nb = notebooks.read(published(course))
    nb.cells[0].source, nb.cells[1].source = "# Title", "import coursekit"
    nb.cells.append(new_markdown_cell("x" * 1_600_000))
    notebooks.write(path, notebooks.clean(nb))
    found = "\n".join(nbcheck.check(path))
    assert "1.6 MB" in found and "lacks the Colab badge" in found and "not the standard setup" in found


@pytest.mark.parametrize("text", ["", "{}", "not json", '{"nbformat": 4'])
def test_what_is_no_notebook_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.ipynb"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"x\.ipynb is not a notebook"):
        notebooks.read(path)


# ------------------------------------------------------------------------------------- student and fork

def test_the_student_s_edition_has_no_solution_and_keeps_the_goal(course: Path) -> None:
    hidden = "### BEGIN HIDDEN TESTS\nassert f() == 1\n### END HIDDEN TESTS"
    path = published(course, new_markdown_cell(EXERCISE), new_code_cell(SOLVED, outputs=[picture("spoiler")]),
                     new_code_cell(f"checks.f(f)\n{hidden}", outputs=[new_output("stream", text="passed")]),
                     new_code_cell("show(f())", outputs=[picture("the goal")]))
    nb = notebooks.student(notebooks.read(path))
    _, solution, check, goal = nb.cells[2:]
    assert solution.source == "def f():\n    # YOUR CODE HERE\n    raise NotImplementedError()"
    assert check.source == "checks.f(f)" and not solution.outputs and not check.outputs
    assert goal.outputs[0].metadata["image/png"]["alt"] == "the goal"
    assert solution.metadata["nbgrader"]["solution"] and not solution.metadata["nbgrader"]["grade"]
    assert check.metadata["nbgrader"]["grade"] and check.metadata["nbgrader"]["points"] == 2
    assert "Colab" not in nb.cells[0].source
    nbformat.validate(nb)


def test_an_exercise_of_two_parts_is_worth_its_difficulty_once(course: Path) -> None:
    hidden = "### BEGIN HIDDEN TESTS\nassert f() == 1\n### END HIDDEN TESTS"
    nb = notebooks.student(notebooks.read(published(
        course, new_markdown_cell(EXERCISE), new_code_cell(SOLVED), new_code_cell("checks.f(f)"),
        new_code_cell(SOLVED), new_code_cell("checks.f(f)"), new_code_cell(f"checks.f(f)\n{hidden}"))))
    points = [cell.metadata["nbgrader"].get("points") for cell in nb.cells if "nbgrader" in cell.metadata]
    assert points == [None, 2, None, 0] and nb.cells[-1].source == "checks.f(f)"


def test_a_fork_that_fails_half_way_can_be_run_again(course: Path) -> None:
    published(course)
    (course / "02_broken.ipynb").write_text("https://github.com/ada/course {")
    before = (course.parent / "pyproject.toml").read_text()
    with pytest.raises(nbformat.reader.NotJSONError):
        notebooks.fork(course.parent, "grace/lectures")
    assert (course.parent / "pyproject.toml").read_text() == before


def test_a_marker_without_its_partner_is_not_handed_out(course: Path) -> None:
    nb = notebooks.read(published(course, new_code_cell("### BEGIN SOLUTION\nsecret = 1")))
    with pytest.raises(ValueError, match="without its partner"):
        notebooks.student(nb)


def test_a_fork_moves_every_badge_and_setup_cell_and_nothing_else(course: Path) -> None:
    path = published(course)
    assert nbcheck.check(path) == []
    changed = notebooks.fork(course.parent, "grace/lectures")
    assert [p.name for p in changed] == ["pyproject.toml", "README.md", "01_x.ipynb"]
    assert notebooks.repository(course.parent) == "grace/lectures"
    assert nbcheck.check(path) == []  # still fresh: the setup cell is not part of the hash
    assert (course.parent / "README.md").read_text() == \
        "[x](https://github.com/grace/lectures), not github.com/ada/course-2\n"
    assert notebooks.fork(course.parent, "grace/lectures") == []
    for wrong in ("grace", "https://github.com/a/b", "a/b/c", "a b/c"):
        with pytest.raises(ValueError, match="OWNER/REPO"):
            notebooks.fork(course.parent, wrong)


# --------------------------------------------------------------------------------- the published course

COURSE = sorted((ROOT / "course").glob("*.ipynb"))


@pytest.mark.parametrize("path", COURSE, ids=lambda path: path.stem)
def test_the_published_notebooks_have_no_complaint(path: Path) -> None:
    assert nbcheck.check(path) == []


@pytest.mark.parametrize("path", COURSE, ids=lambda path: path.stem)
def test_the_published_notebooks_can_be_handed_out(path: Path) -> None:
    text = notebooks.serialised(notebooks.student(notebooks.read(path)))
    assert "BEGIN SOLUTION" not in text
    ids = re.findall(r'"grade_id": "([^"]+)"', text)
    assert len(ids) == len(set(ids))


# ------------------------------------------------------------------- what `pytest --nbval` catches

SHOWS = {
    "text": "print('t = 500')",
    "picture": PICTURE,
    "cleared": "from IPython.display import clear_output\nfor i in range(3):\n"
               "    clear_output(wait=True)\n    print(i)",
    "updated": "from IPython.display import display\nh = display(0, display_id=True)\nh.update(1)",
    "captured": "from ipywidgets import Output\nout = Output()\nwith out:\n    print('inside')\nout",
    "told apart": "import sys\nprint('rate 1.5 it/s')\nprint('noise', file=sys.stderr)",
    "environment": "import os\nprint(os.environ['TQDM_DISABLE'], os.environ['COURSE_PROFILE'])",
}


def test_nbval_passes_what_is_the_same_and_catches_what_is_not(course: Path) -> None:
    """One run over a faithful notebook and one whose stored outputs were tampered with."""
    shutil.copy(ROOT / "course" / "conftest.py", course)
    good = course / "good.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell(source) for source in SHOWS.values()]), good)
    notebooks.execute(good)
    nb = notebooks.read(good)
    text, drawn, cleared, updated, captured = nb.cells[:5]
    text.outputs[0].text = "t = 501\n"
    drawn.outputs[0].data["image/png"] = png(pixels=np.full((200, 300, 3), 255, np.uint8))
    cleared.outputs[0].text = "1\n"
    updated.outputs[0].data["text/plain"] = "0"
    captured.outputs.append(new_output("stream", name="stdout", text="inside\n"))
    nbformat.write(nb, course / "tampered.ipynb")

    run = subprocess.run(
        [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-p", "no:cacheprovider", "-rA",
         "--color=no", "-c", os.devnull, f"--rootdir={course}", str(course)],
        cwd=course, env=os.environ | {"COURSE_PROFILE": "full"},
        capture_output=True, text=True, timeout=300)
    verdicts = {name: word for word, name in
                re.findall(r"^(PASSED|FAILED) (\S+::Cell \d+)", run.stdout, re.M)}
    wanted = {f"good.ipynb::Cell {i}": "PASSED" for i in range(7)}
    wanted |= {f"tampered.ipynb::Cell {i}": "FAILED" if i < 5 else "PASSED" for i in range(7)}
    assert verdicts == wanted, run.stdout[-6000:]
    assert "picture 1 is not the stored one" in run.stdout
