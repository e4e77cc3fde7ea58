"""What a newcomer installs: one truth about dependencies, a wheel with its data, a README without lies."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_notebook
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from coursekit import nbcheck, notebooks

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


# --------------------------------------------------------------------------------------- dependencies

def test_environment_yml_says_nothing_of_its_own() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert set(environment) == {"name", "channels", "dependencies"}
    assert environment["name"] == PROJECT["name"]
    assert environment["channels"] == ["conda-forge"]
    *conda, pip = environment["dependencies"]
    conda = {re.split(r"[=<> ]", entry)[0]: entry for entry in conda}
    assert set(conda) == {"python", "pip"} and pip == {"pip": ["-e .[course]"]}
    python = conda["python"].split("=", 1)[1].strip("=").replace(".*", "")
    assert f"{python}.99" in SpecifierSet(PROJECT["requires-python"])


def test_what_the_course_needs_is_asked_for_once_and_never_pinned() -> None:
    extras = PROJECT["optional-dependencies"]
    asked = [Requirement(line) for line in [*PROJECT["dependencies"], *extras["course"], *extras["test"]]]
    names = [requirement.name for requirement in asked]
    assert len(names) == len(set(names))
    assert not [str(r) for r in asked if {clause.operator for clause in r.specifier} & {"==", "===", "~="}]
    with_course = {Requirement(line).name for line in [*PROJECT["dependencies"], *extras["course"]]}
    assert with_course >= {"torch", "torchvision", "jupyterlab", "matplotlib", "ipywidgets", "nbval", "lpips",
                           "tensorflow-probability"}
    # A Colab runtime must keep its own torch and kernel.
    assert "jupyterlab" not in {Requirement(line).name for line in PROJECT["dependencies"]}
    assert "2.5" in next(r for r in asked if r.name == "torch").specifier


def test_everything_the_package_imports_is_a_dependency() -> None:
    known_as = {"PIL": "pillow", "skimage": "scikit-image"}
    extras = PROJECT["optional-dependencies"]
    declared = {Requirement(line).name for line in
                [*PROJECT["dependencies"], *extras["course"], *extras["text-to-image"], *extras["hub"],
                 *extras["onnx"]]}
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "coursekit").rglob("*.py")]
    imported = {name.split(".")[0] for tree in trees for node in ast.walk(tree) for name in modules_of(node)}
    foreign = {known_as.get(name, name) for name in imported - set(sys.stdlib_module_names) - {"coursekit"}}
    assert foreign <= declared | {"IPython"}  # which ipywidgets brings


def modules_of(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [str(node.module)] if isinstance(node, ast.ImportFrom) and not node.level else []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    (built,) = folder.glob("*.whl")
    return zipfile.ZipFile(built)


def test_the_wheel_holds_package_and_data_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    held = set(wheel.namelist())
    for folder in ("mnist", "weights", "checkpoints"):
        for path in (ROOT / "data" / folder).iterdir():
            assert f"coursekit/_shipped/{folder}/{path.name}" in held
    for path in (ROOT / "coursekit").rglob("*.py"):
        assert path.relative_to(ROOT).as_posix() in held
    tops = {name.split("/")[0] for name in held}
    assert tops == {"coursekit", f"coursekit-{PROJECT['version']}.dist-info"}
    assert not [name for name in held if "cache" in name or name.endswith(".part")]


def test_an_installed_wheel_finds_its_data_and_its_command(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    code = ("import coursekit; from coursekit import data, checkpoints, cli; print(coursekit.__file__); "
            "print(len(data.load('mnist', 'test')), len(checkpoints.available())); cli.main(['data'])")
    done = run(sys.executable, "-c", code, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    where, counts, *_ = done.stdout.splitlines()
    assert Path(where).is_relative_to(tmp_path)
    images, cards = map(int, counts.split())
    assert images == 10_000 and cards == len(list((ROOT / "data" / "checkpoints").glob("*.safetensors"))) > 0


# --------------------------------------------------------------------------------------------- README

def test_ci_runs_the_readme_s_test_line() -> None:
    start, tests = COMMANDS  # the README has these two commands and no third
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1] == tests
    assert start.startswith("python3 -m venv .venv && ") and "jupyter lab course/00_start_here.ipynb" in start
    assert tests.startswith("python3 -m venv .venv && ") and tests.endswith(".venv/bin/pytest")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    run("bash", "-n", ROOT / ".ci" / "run")


@pytest.mark.parametrize(("arguments", "wanted"), [
    ([], {"tests/test_a.py", "course/01_b.ipynb"}),
    (["--nbval", "course/"], {"course/01_b.ipynb"}),
    (["tests"], {"tests/test_a.py"}),
    (["tests/benchmarks"], {"tests/benchmarks/test_c.py"}),
])
def test_each_pytest_line_of_the_readme_collects_what_it_says(tmp_path: Path, arguments: list[str],
                                                              wanted: set[str]) -> None:
    for name in ("tests/test_a.py", "tests/benchmarks/test_c.py", ".venv/test_d.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("def test(): pass")
    for name in ("course/01_b.ipynb", "course/.ipynb_checkpoints/01_b.ipynb", "student/01_b.ipynb"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(new_notebook(cells=[new_code_cell("1")]), tmp_path / name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    done = run(sys.executable, "-m", "pytest", "--collect-only", "-q", *arguments, cwd=tmp_path)
    assert {line.split("::")[0] for line in done.stdout.splitlines() if "::" in line} == wanted


def test_the_assignment_in_the_readme_runs(tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(block.splitlines()) <= 10
    run(sys.executable, "-c", block, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (tmp_path / "digits.png").stat().st_size > 1000


def test_every_link_in_the_readme_leads_somewhere() -> None:
    targets = list(nbcheck.links(README))
    assert len(targets) > 5
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_table_lists_every_notebook_with_its_badge() -> None:
    rows = [line for line in README.splitlines() if line.startswith("| [")]
    course = sorted((ROOT / "course").glob("*.ipynb"))
    assert len(rows) == len(course) > 0
    for row, path in zip(rows, course, strict=True):
        assert f"(course/{path.name})" in row and notebooks.badge(ROOT, path) in row
        title = next(cell.source for cell in notebooks.read(path).cells if cell.cell_type == "markdown")
        assert row.split("|")[2].strip() in title  # the question


def test_the_map_of_the_first_notebook_leads_to_all_others() -> None:
    course = sorted((ROOT / "course").glob("*.ipynb"))
    first = "\n".join(cell.source for cell in notebooks.read(course[0]).cells if cell.cell_type == "markdown")
    rows = re.findall(r"^\| (\d\d) \| \[[^\]]+\]\(([^)]+)\) \| (.+) \|$", first, re.M)
    assert [name for _, name, _ in rows] == [path.name for path in course[1:]]
    for (number, name, question), path in zip(rows, course[1:], strict=True):
        title = next(cell.source for cell in notebooks.read(path).cells if cell.cell_type == "markdown")
        assert name.startswith(number) and question in title


def test_one_place_names_the_repository() -> None:
    ours = notebooks.repository(ROOT)
    listed = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).stdout.splitlines()
    texts = {name: (ROOT / name).read_text(encoding="utf-8", errors="ignore") for name in listed
             if (ROOT / name).is_file() and not name.startswith("data/")}
    moved = {"pyproject.toml", "README.md"} | {name for name in texts
                                               if re.fullmatch(r"course/[^/]*\.ipynb", name)}
    assert {name for name, text in texts.items() if ours in text} == moved


def test_a_fork_leaves_no_trace_of_the_old_address(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "README.md", "course"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    ours = notebooks.repository(ROOT)
    notebooks.fork(tmp_path, "ada/lectures")
    texts = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.rglob("*")
             if path.suffix in (".toml", ".md", ".ipynb", ".py")}
    assert not [name for name, text in texts.items() if ours in text]
    for name in ("pyproject.toml", "README.md", "00_start_here.ipynb"):
        assert "github.com/ada/lectures" in texts[name] or "github/ada/lectures" in texts[name]


# ------------------------------------------------------------------------------------- how the code reads

def test_ruff_has_no_complaint() -> None:
    run(sys.executable, "-m", "ruff", "check", "--no-cache", ".", cwd=ROOT)


def test_mypy_has_no_complaint() -> None:
    run(sys.executable, "-m", "mypy", cwd=ROOT)
