"""The bar shows how far it is, says nothing afterwards, and can be hidden where tqdm's own switch is not heard."""

import pytest
import tqdm.notebook
from tqdm.std import tqdm as terminal_bar

from coursekit import progress


@pytest.fixture(autouse=True)
def not_hidden(monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)


def test_it_passes_every_item_on(capfd):
    assert list(progress.progress([3, 1, 2], "counting")) == [3, 1, 2]
    shown = capfd.readouterr().err
    assert "counting" in shown and shown.rstrip("\n").split("\r")[-1].strip() == ""  # wiped at the end


def test_a_generator_brings_its_total():
    assert progress.progress((i for i in range(4)), "x", total=4).total == 4
    assert progress.progress([1, 2], "x").total == 2


@pytest.mark.parametrize("kind", [terminal_bar, tqdm.notebook.tqdm])
def test_it_is_hidden_where_notebooks_are_stored(kind, monkeypatch, capfd):
    monkeypatch.setattr(progress, "tqdm", kind)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert list(progress.progress(range(3), "x")) == [0, 1, 2]
    assert capfd.readouterr() == ("", "")
