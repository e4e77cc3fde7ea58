"""A canvas holds what was painted on it, by clicks and by code, and shows its first drawing without a kernel."""

import pytest
import torch
from torch.testing import assert_close

from coursekit.canvas import INVITATION, Canvas
from coursekit.widgets import VIEW

COLOURS = {"orange": "#ff8000", "green": "#00ff00", "black": "#000000"}


def canvas(rows=("ooo", "ogo", "obo", "ooo")):
    return Canvas(rows, COLOURS, alt="an orange square", caption="A drawing.")


def test_a_square_is_a_pixel_of_its_colour():
    x = canvas().x
    assert x.shape == (1, 3, 4, 3) and x.dtype == torch.float32
    assert_close(x[0, :, 1, 1], torch.tensor([-1.0, 1, -1]))
    assert_close(x[0, :, 2, 1], -torch.ones(3))
    assert_close(x[0, :, 0, 0], torch.tensor([1, 128 / 127.5 - 1, -1]))


def test_a_click_paints_the_square_in_the_chosen_colour():
    paper = canvas()
    paper.colour.value = "black"
    paper.squares[3][2].click()
    assert_close(paper.x[0, :, 3, 2], -torch.ones(3))
    assert paper.squares[3][2].style.button_color == "#000000" and "black" in paper.squares[3][2].tooltip
    assert int((paper.x != canvas().x).any(1).sum()) == 1


@pytest.mark.parametrize("brush, at, painted", [(1, (1, 1), 1), (3, (1, 1), 9), (3, (0, 0), 4), (5, (0, 2), 9)])
def test_a_brush_covers_a_square_and_stops_at_the_edge(brush, at, painted):
    paper = canvas(["ooo"] * 3)
    paper.colour.value, paper.brush.value = "green", brush
    paper.squares[at[0]][at[1]].click()
    assert int((paper.x[0, 1] == 1).sum()) == painted


def test_without_a_kernel_one_sees_the_first_drawing():
    paper = canvas()
    before = paper._repr_mimebundle_()
    paper.paint(0, 0, "black", 5)
    data, metadata = paper._repr_mimebundle_()
    assert data["image/png"] == before[0]["image/png"] and metadata["image/png"]["alt"] == "an orange square"
    assert data[VIEW]["model_id"] == paper.box.model_id and f"A drawing. {INVITATION}" in data["text/html"]


@pytest.mark.parametrize("make, says", [
    (lambda: Canvas(["oo", "o"], COLOURS, alt="x"), r"rows of one length, got lengths \[2, 1\]"),
    (lambda: Canvas([], COLOURS, alt="x"), "rows of one length"),
    (lambda: Canvas(["oz"], COLOURS, alt="x"), r"got \['z'\]"),
    (lambda: Canvas(["o"], {"olive": "#808000"} | COLOURS, alt="x"), "a first letter of its own"),
    (lambda: canvas().paint(0, 0, "pink"), "got 'pink'"),
])
def test_what_cannot_be_drawn_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
