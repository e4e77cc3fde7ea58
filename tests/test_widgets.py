import re
from pathlib import Path

import ipywidgets
import nbformat
import pytest
import torch
from IPython.core.formatters import DisplayFormatter

from coursekit import nbcheck, notebooks, viz, widgets
from coursekit.samplers import Step, ddim
from coursekit.schedules import cosine_schedule, linear_schedule, zero_terminal_snr
from coursekit.toys import GaussianData

IMAGE = torch.linspace(-1, 1, 64).view(1, 8, 8)
L = linear_schedule()


def counted():
    calls = []

    def draw(level: int, sign: str):
        calls.append((level, sign))
        shade = torch.full((1, 1, 4, 4), level / 10 * (1 if sign == "+" else -1))
        return viz.grid(shade, alt=f"a square of shade {sign}{level}", caption="Shades.")
    return draw, calls


def explorer():
    draw, calls = counted()
    return widgets.explore(draw, level=widgets.slider("level", range(10), 4),
                           sign=widgets.choice("sign", ["+", "-"], "+")), calls


def test_turning_a_knob_changes_the_picture_and_the_words_and_turning_back_draws_nothing():
    shown, calls = explorer()
    first, said = shown.image.value, shown.words.value
    assert shown.picture is shown.still and first == shown.still.png and "+4" in said
    shown.controls["level"].value = 7
    assert shown.image.value == shown.picture.png != first
    assert "a square of shade +7" in shown.words.value and 'role="status"' in shown.words.value
    shown.controls["sign"].value = "-"
    shown.controls["sign"].value = "+"
    shown.controls["level"].value = 4
    assert shown.image.value == first and shown.words.value == said
    assert calls == [(4, "+"), (7, "+"), (7, "-")]


def looking(step=1):
    calls = []

    def draw(row, column):
        calls.append((row, column))
        return viz.grid(IMAGE[None], alt=f"row {row}, column {column}")
    places = range(0, 8, step)
    return widgets.explore(draw, row=widgets.slider("row", places, 4),
                           column=widgets.slider("column", places, 4)), calls


@pytest.mark.parametrize("step, at", [(1, (3, 7)), (2, (2, 6))])
def test_a_click_points_at_the_middle_of_its_square_and_draws_once(step, at):
    shown, calls = looking(step)
    before = shown._repr_mimebundle_()[0]["image/png"]
    assert widgets.pointed(shown, IMAGE.expand(3, 8, 8), 4) is shown and shown.box.children[1] is shown.controls["row"]
    squares = shown.box.children[0].children
    assert len(squares) == 16 and squares[7].tooltip == "row 3, column 7"
    squares[7].click()
    assert tuple(control.value for control in shown.controls.values()) == at
    assert calls == [(4, 4), at] and f"row {at[0]}, column {at[1]}" in shown.words.value
    assert shown._repr_mimebundle_()[0]["image/png"] == before  # the still stays where the author put it
    shown.controls["row"].value = 0  # the sliders still draw
    assert calls[-1] == (0, at[1])


def test_the_squares_have_the_colours_of_the_image():
    image = torch.stack([torch.linspace(-1, 1, 4).expand(4, 4), torch.full((4, 4), -1.0), torch.ones(4, 4)])
    sheet = widgets.pointed(looking()[0], image, 4).box.children[0].children
    assert [square.style.button_color for square in sheet[:4]] == ["#0000ff", "#5500ff", "#aa00ff", "#ff00ff"]


@pytest.mark.parametrize("make", [lambda: widgets.pointed(explorer()[0], IMAGE.expand(3, 8, 8), 4),
                                  lambda: widgets.pointed(looking()[0], IMAGE.expand(3, 8, 8), 3)])
def test_pointing_needs_a_row_a_column_and_an_image_that_falls_into_squares(make):
    with pytest.raises(ValueError, match="sliders row and column and an image that falls into"):
        make()


def test_a_reader_without_a_kernel_gets_the_still_in_the_same_output():
    shown, _ = explorer()
    shown.controls["level"].value = 9  # the still stays the position the author chose
    data, metadata = DisplayFormatter().format(shown)
    view = data.pop(widgets.VIEW)
    assert view["model_id"] == shown.box.model_id
    assert data["text/plain"] == "a square of shade +4" == metadata["image/png"]["alt"]
    assert f"Shades. {widgets.INVITATION}</figcaption>" in data["text/html"]
    still, _ = shown.still._repr_mimebundle_()
    assert data["image/png"] == still["image/png"]
    assert not re.search(r"VBox|IntSlider", str(data))


def test_every_control_is_labelled_and_moves_by_keyboard():
    shown, _ = explorer()
    assert [control.description for control in shown.controls.values()] == ["level", "sign"]
    assert isinstance(shown.controls["level"], ipywidgets.SelectionSlider)
    assert list(shown.box.children[:2]) == list(shown.controls.values())


def test_any_control_of_ipywidgets_will_do():
    knob = ipywidgets.IntSlider(value=2, max=9, description="k")
    shown = widgets.explore(lambda k: counted()[0](k, "+"), k=knob)
    shown.controls["k"].value = 3
    assert shown.picture.alt.endswith("+3")


def test_the_noising_explorer_shows_x_t_with_the_numbers_of_the_schedule(monkeypatch):
    drawn = {}
    monkeypatch.setattr(widgets.viz, "strip", lambda images, labels, **words: drawn.update(
        images=images, **words) or viz.grid(images[:1], alt=words["alt"]))
    schedules = {"linear": L, "cosine": cosine_schedule(), "zero": zero_terminal_snr(L)}
    eps = torch.ones_like(IMAGE)
    shown = widgets.noising_explorer(IMAGE, schedules, times=[0, 250, 500, 1000], eps=eps)
    assert shown.controls["t"].value == 500 and shown.controls["schedule"].value == "linear"
    for name, schedule in schedules.items():
        for t in (0, 250, 1000):
            shown.draw(t=t, schedule=name)
            a, s = schedule.alpha_bar[t].sqrt(), (1 - schedule.alpha_bar[t]).sqrt()
            x0, signal, noise, x_t = drawn["images"]
            torch.testing.assert_close(x_t, (a * IMAGE + s * eps).float())
            torch.testing.assert_close(signal + noise, x_t)
            torch.testing.assert_close(x0, IMAGE)
            log_snr = f"{(a**2 / s**2).log():+.2f}".replace("inf", "∞")
            assert f"{name}, t = {t}" in drawn["title"]
            assert f"signal {a:.3f}, noise {s:.3f}, log-SNR {log_snr}" in drawn["title"]


def test_the_noise_stays_the_same_while_t_moves_and_follows_the_generator():
    def at(seed, t):
        shown = widgets.noising_explorer(IMAGE, {"linear": L}, rng=torch.Generator().manual_seed(seed))
        shown.controls["t"].value = t
        return shown.image.value
    assert at(0, 300) == at(0, 300) != at(1, 300)
    times = widgets.noising_explorer(IMAGE, {"a": L, "b": linear_schedule(300)}).controls["t"].options
    assert times[0] == 0 and times[-1] == 300 and len(times) <= 61


def test_a_trajectory_walks_the_steps_of_a_sampler():
    data = GaussianData(0.2, 0.05)
    steps = list(ddim(data.denoiser(L), torch.randn(3, 1, 8, 8), L, L.spaced(6)))
    walk = widgets.trajectory(steps, alt="Noise turns grey.")
    assert walk.still.alt == f"Noise turns grey. Step 3 of 6, t = {steps[2].t}."
    seen = set()
    for k in walk.controls["step"].options:
        walk.controls["step"].value = k
        seen.add(walk.image.value)
    assert len(seen) == 6 and walk.picture.alt == "Noise turns grey. Step 6 of 6, t = 0."
    assert "t = 0.25." in widgets.trajectory([Step(0.25, steps[0].x, steps[0].x0)], alt="Straight.").still.alt


def test_a_trajectory_walks_pictures_of_ones_own():
    draw, _ = counted()
    walk = widgets.trajectory([draw(k, "+") for k in range(3)], alt="Brighter.", caption="Look.", start=1)
    assert walk.still.alt == "Brighter. Step 1 of 3: a square of shade +0"
    walk.controls["step"].value = 3
    assert walk.picture.png == draw(2, "+").png and "Look." in walk.words.value


@pytest.mark.parametrize(("call", "message"), [
    (lambda: widgets.explore(lambda: None), "at least one control"),
    (lambda: widgets.slider("t", [1, 2], 3), r"starts at one of its values \[1, 2\], got 3"),
    (lambda: widgets.choice("schedule", ["a"], "b"), r"starts at one of \['a'\], got 'b'"),
    (lambda: widgets.noising_explorer(IMAGE[None], {"linear": L}), r"one image .* got shape \(1, 1, 8, 8\)"),
    (lambda: widgets.noising_explorer(IMAGE, {}), "at least one named schedule"),
    (lambda: widgets.noising_explorer(IMAGE, {"short": L}, [0, 5000]), r"0\.\.1000 of 'short'"),
    (lambda: widgets.noising_explorer(IMAGE, {"linear": L}, []), r"got \[\]"),
    (lambda: widgets.noising_explorer(IMAGE, {"a": L}, eps=torch.zeros(3, 8, 8)), "eps must have the shape"),
    (lambda: widgets.trajectory([], alt="x"), "at least one step"),
    (lambda: widgets.trajectory([Step(0, IMAGE[None], IMAGE[None])], alt=" "), "alt text"),
])
def test_what_cannot_be_explored_is_named_in_a_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_kernel_runs_it_and_what_is_stored_needs_none(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    source = """\
import torch
from coursekit import widgets
from coursekit.schedules import linear_schedule
image = torch.linspace(-1, 1, 64).view(1, 8, 8)
widgets.noising_explorer(image, {"linear": linear_schedule()}, rng=torch.Generator().manual_seed(0))"""
    path = tmp_path / "explorer.ipynb"
    cells = [nbformat.v4.new_code_cell("# setup"), nbformat.v4.new_code_cell(source)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    assert notebooks.execute(path)
    stored = notebooks.read(path)
    (output,) = stored.cells[1].outputs
    assert set(output.data) == {"text/html", "image/png", "text/plain"}
    assert output.metadata["image/png"]["alt"] == output.data["text/plain"]
    assert list(nbcheck.described(stored)) == []


def test_a_noising_explorer_takes_times_of_any_kind_and_turns_names_too():
    explorer = widgets.noising_explorer(torch.zeros(3, 8, 8), {"l": linear_schedule(), "c": cosine_schedule()},
                                        times=torch.arange(0, 300, 100), rng=torch.Generator().manual_seed(0))
    explorer.turn(t=190, schedule="c")
    assert "c, t = 200" in explorer.picture.alt
    with pytest.raises(TypeError):
        explorer.turn(schedule="no such")
    explorer.turn(schedule="l")
    assert "l, t = 200" in explorer.picture.alt
