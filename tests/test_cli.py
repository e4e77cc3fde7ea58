"""The command line does what its help says, and a user's mistake is one line, never a traceback."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from coursekit import checkpoints, cli, data, doctor, fetch, notebooks, objectives, recipes
from coursekit.nets import VQVAE, Classifier, Cs180UNet, PixelCNN, UNet

ROOT = Path(__file__).parents[1]
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A course that ships one small untrained denoiser of digits, "tiny", and one classifier."""
    shipped = tmp_path / "shipped"
    described = {"recipe": "coursekit train tiny", "data": "mnist", "images": 1, "steps": 1, "seconds": 1.0,
                 "device": "cpu"}
    path = {"name": "cosine", "T": 1000}
    torch.manual_seed(0)
    checkpoints.save(UNet(1, (16, 32)), shipped / "checkpoints" / "tiny.safetensors", checkpoints.Card(
        name="tiny", schedule=path, predicts="v", **described))
    checkpoints.save(Classifier(), shipped / "checkpoints" / "judge.safetensors", checkpoints.Card(
        name="judge", **described))
    checkpoints.save(Cs180UNet(4), shipped / "checkpoints" / "one.safetensors", checkpoints.Card(
        name="one", schedule={"name": "exploding", "sigma_max": 1.0}, predicts="x0", **described))
    for folder in ("mnist", "weights"):
        (shipped / folder).symlink_to(ROOT / "data" / folder)
    recipe = recipes.Recipe(
        data="mnist", net=lambda: UNet(1, (16, 32)), loss=objectives.denoising_loss(path), schedule=path,
        predicts="v", measure=lambda model, images: {}, steps=3, batch_size=8, lr=1e-3)
    monkeypatch.setitem(recipes.RECIPES, "tiny", recipe)
    monkeypatch.chdir(tmp_path)
    for module in (checkpoints, fetch):
        monkeypatch.setattr(module, "shipped", lambda *parts: shipped.joinpath(*parts))
    return shipped


# -------------------------------------------------------------------------------------------------- doctor

def test_the_doctor_says_ten_things_and_in_brief_the_same_on_every_healthy_machine(
        tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setenv("COURSEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("COURSEKIT_DATA", raising=False)
    assert cli.doctor(brief=True) == [f"ok  {fact}" for fact in doctor.CHECKS]
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and all(line.startswith("ok  ") and ": " in line for line in lines)
    assert sys.version.split()[0] in lines[0] and torch.__version__ in lines[1]


def test_the_doctor_names_each_planted_trouble_and_what_to_do(
        tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("COURSEKIT_CACHE", str(tmp_path / "a file" / "cache"))
    monkeypatch.setenv("COURSEKIT_DATA", str(tmp_path / "nowhere"))
    cut = tiny / "checkpoints" / "tiny.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    monkeypatch.setattr(doctor, "version", lambda name: "7.6.1")
    monkeypatch.setattr(torch, "__version__", "2.3.1")
    assert cli.main(["doctor"]) == 1
    bad = [line for line in capsys.readouterr().out.splitlines() if line.startswith("!!")]
    named = ["this is 2.3.1; pip install --upgrade torch", "nowhere, which is no folder; correct it",
             "set COURSEKIT_CACHE", "tiny.safetensors is cut short", "ipywidgets is 7.6.1; pip install"]
    assert len(bad) == len(named)
    assert all(words in line for words, line in zip(named, bad, strict=True)), bad


def test_a_doctor_who_meets_the_unexpected_still_says_ten_things(monkeypatch: pytest.MonkeyPatch) -> None:
    def faint() -> str:
        raise RuntimeError("no such\nluck")

    fine = dict.fromkeys(doctor.CHECKS, lambda: "fine")
    monkeypatch.setattr(doctor, "CHECKS", fine | {"sliders can move": faint})
    lines = cli.doctor()
    assert len(lines) == 10 and lines[-1].startswith("!!  sliders can move: RuntimeError: no such; ")


# ------------------------------------------------------------------------------------ data, train, sample

def test_data_lists_every_set_and_where_it_comes_from(capsys: Captured) -> None:
    assert cli.main(["data"]) == 0
    listed = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert listed["mnist"] == "shipped with the course"
    assert set(listed) >= {"fashion-mnist", "cifar10", "stl10", "ffhq", "cats", "drawn-cats"}


def test_train_writes_a_checkpoint_and_goes_on_where_it_stopped(
        tiny: Path, tmp_path: Path, capsys: Captured) -> None:
    assert cli.main(["train"]) == 0
    assert "tiny" in capsys.readouterr().out.splitlines()
    for steps in ("2", "3"):
        assert cli.main(["train", "tiny", "--steps", steps, "--out", "here", "--device", "cpu"]) == 0
        assert f"done after {steps} steps" in capsys.readouterr().out
    assert checkpoints.load(tmp_path / "here" / "tiny.safetensors").card.steps == 3


def test_sample_draws_the_same_picture_from_the_same_seed(tiny: Path, tmp_path: Path) -> None:
    for name, seed in (("a.png", "1"), ("b.png", "1"), ("c.png", "2")):
        assert cli.main(["sample", "tiny", "--n", "3", "--steps", "2", "--seed", seed, "--out", name]) == 0
    a, b, c = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png", "c.png"))
    assert a == b != c
    width, height = Image.open(tmp_path / "a.png").size
    assert width >= 3 * 28 and height >= 28


def test_sample_makes_the_folder_that_it_is_asked_to_write_to(tiny: Path, tmp_path: Path) -> None:
    assert cli.main(["sample", "tiny", "--n", "1", "--steps", "1", "--out", "a/b/x.png"]) == 0
    assert (tmp_path / "a/b/x.png").exists()


def test_sample_needs_no_data_set_where_the_recipe_has_a_size(
        tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(recipes.RECIPES, "tiny", replace(recipes.RECIPES["tiny"], data="cats", size=32))

    def download(*_: object, **__: object) -> None:
        raise AssertionError("the pictures it was trained on are not wanted")

    monkeypatch.setattr(data, "load", download)
    assert cli.main(["sample", "tiny", "--n", "1", "--steps", "1", "--out", "a.png"]) == 0
    assert Image.open(tmp_path / "a.png").size[0] >= 32


@pytest.mark.parametrize("kind", ["codes", "latents"])
def test_sample_decodes_what_was_made_up_for_a_coder(
        tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    coder = VQVAE(channels=(8, 8), codes=4, dim=8)
    prior = PixelCNN(4, 7, width=16, layers=2, classes=3) if kind == "codes" else \
        UNet(8, (16,), blocks=1, patch=1, classes=3)
    asked, net = [], type(prior)
    method = "sample" if kind == "codes" else "forward"
    plain = getattr(net, method)

    def listening(*given: Any, label: torch.Tensor, **more: Any) -> torch.Tensor:
        asked.append(label.tolist())
        return plain(*given, label=label, **more)
    monkeypatch.setattr(net, method, listening)
    folder = tiny / "checkpoints"
    card = checkpoints.Card("prior", "coursekit train prior", "mnist", 1, 1,
                            schedule=None if kind == "codes" else recipes.COSINE,
                            predicts=None if kind == "codes" else "x0")
    checkpoints.save(prior, folder / "prior.safetensors", card)
    checkpoints.save(coder, folder / "coder.safetensors", replace(card, name="coder", predicts=None, schedule=None))
    monkeypatch.setitem(recipes.RECIPES, "prior", replace(recipes.RECIPES["tiny"], coder="coder"))
    assert cli.main(["sample", "prior", "--n", "4", "--steps", "2", "--out", "a.png"]) == 0
    assert asked == [[0, 1, 2, 0]] * (1 if kind == "codes" else 2)
    assert Image.open(tmp_path / "a.png").size[0] >= 2 * 28
    assert cli.main(["sample", "coder", "--n", "2"]) == 2  # on its own it makes nothing up


# ---------------------------------------------------------------------------------------- authors' commands

def test_student_check_and_fork_work_on_the_checkout_around_them(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    import nbformat.v4 as v4

    (tmp_path / "course").mkdir()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "README.md").write_text("")
    monkeypatch.chdir(tmp_path / "course")
    path = tmp_path / "course" / "x.ipynb"
    solved = "### BEGIN SOLUTION\nsecret = 1\n### END SOLUTION"
    cells = [v4.new_markdown_cell(notebooks.badge(tmp_path, path)),
             v4.new_code_cell(notebooks.setup_source(tmp_path)), v4.new_code_cell(solved)]
    path.write_text(v4.writes(v4.new_notebook(cells=cells)))
    assert cli.main(["notebooks", "check"]) == 1
    assert "x.ipynb: it is stale" in capsys.readouterr().out
    assert cli.main(["notebooks", "clean"]) == cli.main(["notebooks", "clean", str(path)]) == 0
    assert [line[:5] for line in capsys.readouterr().out.splitlines()] == ["wrote", "same "]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert cli.main(["notebooks", "execute"]) == 0
    assert cli.main(["fork", "ada/lectures"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["wrote pyproject.toml", "wrote course/x.ipynb"]
    assert cli.main(["notebooks", "check"]) == 0
    assert cli.main(["student", "--out", "../student"]) == 0
    assert "secret" not in (tmp_path / "student" / "x.ipynb").read_text()
    assert cli.main(["student", "--out", "."]) == 2 and "secret" in path.read_text()


# ------------------------------------------------------------------------------------------------- mistakes

@pytest.mark.parametrize(("arguments", "words"), [
    (["train", "tinny"], "no recipe is called 'tinny'; the nearest are tiny"),
    (["sample", "tinny"], "no checkpoint is called 'tinny'; the nearest are tiny"),
    (["sample", "judge"], "'judge' makes no images"), (["sample", "one"], "'one' makes no images"),
    (["sample", "tiny", "--steps", "1001"], "in 1..T = 1..1000, got 1001"),
    (["sample", "tiny", "--steps", "1", "--out", "x.jpg"], "saved as .png"),
    (["notebooks", "check", "nowhere.ipynb"], "nowhere.ipynb cannot be read"),
    (["student"], "does not lie in a checkout"),
    (["fork", "me"], "does not lie in a checkout"),
])
def test_a_mistake_is_one_line_and_status_2(tiny: Path, capsys: Captured, arguments: list[str],
                                            words: str) -> None:
    assert cli.main(arguments) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("coursekit: ")]
    assert len(said) == 1 and words in said[0]


@pytest.mark.parametrize("arguments", [
    [], ["dance"], ["train", "tiny", "--steps", "0"], ["sample", "tiny", "--n", "-1"],
])
def test_arguments_that_cannot_be_are_refused_by_the_parser(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)


def test_python_m_coursekit_is_the_same_command() -> None:
    run = subprocess.run([sys.executable, "-m", "coursekit", "train", "nobody"], timeout=300,
                         env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert run.returncode == 2 and "no recipe is called 'nobody'" in run.stderr
    assert "Traceback" not in run.stderr
