"""What can be wrong with a notebook, one rule a function: each yields sentences, none when all is well."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from nbformat import NotebookNode

from coursekit import notebooks

MOST_BYTES = 1_500_000
MOST_LINES = {False: 15, True: 25}  # of a code cell; of one tagged "long"


def check(path: Path) -> list[str]:
    """Everything that keeps a notebook from being published, one sentence each; empty if nothing does."""
    nb = notebooks.read(path)
    return [*normalised(path, nb), *fresh(nb), *opened(path, nb), *short_cells(nb), *described(nb),
            *linked(path, nb), *portable(nb), *balanced(nb), *exercises(nb)]


def normalised(path: Path, nb: NotebookNode) -> Iterator[str]:
    """As `execute` writes it, and not too large to open."""
    text = path.read_text(encoding="utf-8")
    if text != notebooks.serialised(notebooks.clean(nb)):
        yield "it is not as the tools write it: run `coursekit notebooks execute` (or `clean`)"
    if (size := len(text.encode())) > MOST_BYTES:
        yield f"it has {size / 1e6:.1f} MB, at most {MOST_BYTES / 1e6} are wanted: fewer or smaller pictures"


def fresh(nb: NotebookNode) -> Iterator[str]:
    """Run from top to bottom, as it stands, without an error that is not meant."""
    if nb.metadata.get("coursekit", {}).get("executed") != notebooks.code_hash(nb):
        yield "it is stale: its code is not the code that was run; run `coursekit notebooks execute`"
    for name, cell in _code(nb):
        if cell.execution_count is None:
            yield f"{name} was not run"
        errors = [output for output in cell.outputs if output.output_type == "error"]
        if errors and "raises-exception" not in cell.metadata.get("tags", []):
            yield f"{name} ends in {errors[0].ename}; tag it raises-exception if that is the lesson"


def opened(path: Path, nb: NotebookNode) -> Iterator[str]:
    """The first Markdown cell has the badge, the first code cell is the standard setup."""
    root = notebooks.checkout(path)
    markdown = next((cell.source for cell in nb.cells if cell.cell_type == "markdown"), "")
    code = next((cell.source for cell in nb.cells if cell.cell_type == "code"), "")
    if notebooks.badge(root, path) not in markdown:
        yield f"its first cell lacks the Colab badge: {notebooks.badge(root, path)}"
    if code != notebooks.setup_source(root):
        yield f"its first code cell is not the standard setup:\n{notebooks.setup_source(root)}"


def short_cells(nb: NotebookNode) -> Iterator[str]:
    """Fifteen lines a cell, the solution markers not counted."""
    for name, cell in _code(nb):
        lines = sum(not re.match(r"\s*### (BEGIN|END) ", line) for line in cell.source.splitlines())
        most = MOST_LINES["long" in cell.metadata.get("tags", [])]
        if lines > most:
            yield f"{name} has {lines} lines, at most {most} are wanted"


def described(nb: NotebookNode) -> Iterator[str]:
    """Every picture says in words what it shows."""
    for i, cell in enumerate(nb.cells):
        if cell.cell_type == "markdown":
            text = cell.source
        else:
            text = "".join(out.get("data", {}).get("text/html", "") for out in cell.get("outputs", []))
            for out in cell.get("outputs", []):
                for mime in out.get("data", {}):
                    if mime.startswith("image/") and not out.metadata.get(mime, {}).get("alt", "").strip():
                        yield f"cell {i} shows a picture without alt text"
        if re.search(r"!\[\s*\]\(", text) or re.search(r"<img(?![^>]*\balt=(\"[^\"]*\w|'[^']*\w))", text):
            yield f"cell {i} holds a picture without alt text"


def linked(path: Path, nb: NotebookNode) -> Iterator[str]:
    """Links between notebooks, to files and to headings lead somewhere."""
    for i, cell in enumerate(nb.cells):
        if cell.cell_type != "markdown":
            continue
        for target in links(cell.source):
            file, _, anchor = unquote(target).partition("#")
            there = path.parent / file if file else path
            if not there.exists():
                yield f"cell {i} links to {target}, which does not exist"
            elif anchor and there.suffix == ".ipynb" and anchor not in _anchors(notebooks.read(there)):
                yield f"cell {i} links to {target}: no heading of that name there"


def links(markdown: str) -> Iterator[str]:
    """The targets of links and pictures that are not on the web; formulas and code are not searched."""
    text = re.sub(r"```.*?```|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$", "", markdown, flags=re.S)
    for match in re.finditer(r"\]\(\s*<?([^)\s>]+)|(?:href|src)=[\"']([^\"']+)", text):
        target = match[1] or match[2]
        if not re.match(r"[a-z][a-z+.-]*:", target):
            yield target


def _anchors(nb: NotebookNode) -> set[str]:
    text = "\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")
    return {heading.strip().replace(" ", "-") for heading in re.findall(r"^#{1,6} (.*)$", text, re.M)}


def portable(nb: NotebookNode) -> Iterator[str]:
    """No path that exists on one machine only."""
    for i, cell in enumerate(nb.cells):
        shown = [out.get("text", "") + str(out.get("data", {}).get("text/plain", "")) + out.get("evalue", "")
                 for out in cell.get("outputs", [])]
        found = re.search(r"(?<![\w.:/~])/(?:root|home|tmp|work|Users|var|mnt|opt|content)/\S*|\b[A-Z]:\\\w+",
                          "\n".join([cell.source, *shown]))
        if found:
            yield f"cell {i} holds a path of one machine: {found[0]}"


def balanced(nb: NotebookNode) -> Iterator[str]:
    """Solution markers come in pairs, inside one cell."""
    for name, cell in _code(nb):
        for kind in ("SOLUTION", "HIDDEN TESTS"):
            marks = re.findall(rf"### (BEGIN|END) {kind}", cell.source)
            if marks != ["BEGIN", "END"] * (len(marks) // 2):
                yield f"{name} has unbalanced {kind.lower()} markers: {', '.join(marks)}"


def exercises(nb: NotebookNode) -> Iterator[str]:
    """Each exercise says how hard it is, hints, and can be checked, or shows what a good answer says."""
    for title, cells in _exercises(nb):
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        if not notebooks.EXERCISE.search(text)["difficulty"]:  # type: ignore[index]
            yield f"{title} does not end in (difficulty 2 of 5, 10 minutes)"
        if "<details>" not in text:
            yield f"{title} has no hint in <details>"
        solved = next((i for i, cell in enumerate(cells) if "### BEGIN SOLUTION" in cell.source), None)
        checked = solved is not None and any(map(notebooks.is_check, cells[solved + 1:]))
        if not checked and not re.search(r"<summary>[^<]*\banswer\b", text, re.I):
            yield (f"{title} has neither a solution with a check in a cell of its own after it, to be "
                   "graded by, nor, for prose, <details><summary>A good answer</summary>")


def _exercises(nb: NotebookNode) -> list[tuple[str, list[NotebookNode]]]:
    """(title, its cells): from its heading to the next heading."""
    found: list[tuple[str, list[NotebookNode]]] = []
    inside = False
    for cell in nb.cells:
        headings = re.findall(r"^#{1,4} .*", cell.source, re.M) if cell.cell_type == "markdown" else []
        if headings:  # the last of them rules over what follows
            inside = bool(notebooks.EXERCISE.match(headings[-1]))
            if inside:
                found.append((re.sub(r"^#+ |\s*\(difficulty.*", "", headings[-1]), []))
        if inside:
            found[-1][1].append(cell)
    return found


def _code(nb: NotebookNode) -> Iterator[tuple[str, NotebookNode]]:
    return ((f"cell {i}", cell) for i, cell in enumerate(nb.cells) if cell.cell_type == "code")
