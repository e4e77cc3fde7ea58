import base64
import io
import re
from itertools import pairwise

import matplotlib as mpl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from IPython.core.formatters import DisplayFormatter
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from coursekit import viz
from coursekit.pictures import Picture, png

ALT = "something to see"


def pixels(picture: Picture | bytes) -> np.ndarray:
    data = picture.png if isinstance(picture, Picture) else picture
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def near(a: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (np.abs(a - np.array(colour)).max(-1) < 40)


EVERY_KIND = {
    "grid": lambda **k: viz.grid(noise(3, 3, 8, 8), **k),
    "strip": lambda **k: viz.strip(noise(3, 1, 8, 8), ["a", "b", "c"], **k),
    "animation": lambda **k: viz.animation([noise(2, 3, 8, 8, seed=i) for i in range(3)], **k),
    "curves": lambda **k: viz.curves(range(9), {"a": range(9), "b": range(9, 0, -1)}, "x", "y", **k),
    "bars": lambda **k: viz.bars({"a": [1, 2], "b": [2, 1]}, ["one", "two"], "dB", **k),
    "histogram": lambda **k: viz.histogram(noise(50), lambda x: 0 * x + 0.5, **k),
    "from_figure": lambda **k: viz.from_figure(mpl.figure.Figure(), **k),
}


# ------------------------------------------------------------------------------------ words and wrapping

@pytest.mark.parametrize("kind", EVERY_KIND)
def test_no_picture_goes_out_without_words(kind):
    with pytest.raises(TypeError, match="alt"):
        EVERY_KIND[kind]()
    with pytest.raises(ValueError, match="alt text that says what it shows, got ' '"):
        EVERY_KIND[kind](alt=" ")


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_notebook_stores_the_words_in_every_place_a_reader_may_look(kind):
    picture = EVERY_KIND[kind](alt='x_0 < x_t & "noise"', caption="a < b, $x_0$")
    data, metadata = DisplayFormatter().format(picture)  # what IPython puts into the output
    assert data["text/plain"] == 'x_0 < x_t & "noise"'
    assert metadata["image/png"]["alt"] == 'x_0 < x_t & "noise"'
    assert (metadata["image/png"]["width"], metadata["image/png"]["height"]) == picture.size
    plain = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
    full = Image.open(io.BytesIO(picture.png)).convert("RGB").resize(picture.size, Image.Resampling.BOX)
    assert plain.size == picture.size
    assert np.abs(np.asarray(plain.convert("RGB"), float) - np.asarray(full, float)).mean() < 25
    page = data["text/html"]
    assert 'alt="x_0 &lt; x_t &amp; &quot;noise&quot;"' in page
    assert "<figcaption>a &lt; b, $x_0$</figcaption>" in page
    source = re.search(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(source[1]) == (picture.animation or picture.png)
    assert "<script" not in page and "http" not in page


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_the_same_picture_has_the_same_bytes_and_leaves_nothing_behind(kind):
    import matplotlib.pyplot as plt
    before = dict(mpl.rcParams)
    first, second = EVERY_KIND[kind](alt=ALT), EVERY_KIND[kind](alt=ALT)
    assert (first.png, first.animation) == (second.png, second.animation)
    assert dict(mpl.rcParams) == before and plt.get_fignums() == []


def test_the_look_does_not_depend_on_what_the_reader_has_set():
    plain = EVERY_KIND["curves"](alt=ALT).png
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "black", "lines.linewidth": 9}):
        assert EVERY_KIND["curves"](alt=ALT).png == plain


def test_pictures_are_saved_as_png_and_nothing_else(tmp_path):
    still, moving = EVERY_KIND["grid"](alt=ALT), EVERY_KIND["animation"](alt=ALT)
    assert still.save(tmp_path / "still.png").read_bytes() == still.png
    assert Image.open(moving.save(tmp_path / "moving.PNG")).n_frames == 3
    with pytest.raises(ValueError, match=r"\.png, got 'still\.jpg'"):
        still.save(tmp_path / "still.jpg")


def test_a_figure_of_ones_own_is_shown_once_and_closed():
    import matplotlib.pyplot as plt
    figure, ax = plt.subplots(figsize=(4, 3))
    ax.plot([0, 1])
    picture = viz.from_figure(figure, alt=ALT)
    assert picture.size == (400, 300) and plt.get_fignums() == []


# ------------------------------------------------------------------------------------------------ pixels

@given(st.integers(1, 9), st.sampled_from([1, 3]), st.integers(1, 5), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_a_grid_shows_every_pixel_as_an_exact_square(n, channels, columns, scale):
    images = torch.randint(0, 12, (n, channels, 4, 5), generator=torch.Generator().manual_seed(n)) * 20
    images = images.to(torch.uint8)[:, :1].expand(-1, channels, -1, -1)  # few colours, so nothing is rounded
    shown = pixels(viz.grid(images, columns, scale=scale, alt=ALT))
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        tile = shown[row * (4 * scale + 6):, column * (5 * scale + 6):][:4 * scale, :5 * scale]
        expected = np.kron(image.expand(3, -1, -1).permute(1, 2, 0).numpy(), np.ones((scale, scale, 1), int))
        assert (tile == expected).all()


def test_values_map_to_bytes_and_only_what_lies_beyond_is_clipped():
    image = torch.tensor([-7.0, -1.0, 0.0, 0.5, 1.0, 7.0]).view(1, 1, 1, 6)
    shown = pixels(viz.grid(image, scale=1, alt=ALT))[0, :, 0]
    assert shown.tolist() == [0, 0, 128, 191, 255, 255]
    assert image.max() == 7.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_will_do(dtype):
    assert pixels(viz.grid(torch.ones(1, 3, 4, 4, dtype=dtype), alt=ALT)).min() == 255


def test_words_take_room_of_their_own_and_cover_no_pixel():
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(6, 3, 8, 8)
    worded = viz.grid(red, scale=2, title="all", row_titles=["one", "two"], titles=["a long title"] * 6,
                      column_titles=["p", "q", "r\ns"], labels=["below"] * 6, alt=ALT)
    shown = pixels(worded)
    assert (shown == (255, 0, 0)).all(-1).sum() == 6 * 16 * 16
    assert (shown.max(-1) < 120).sum() > 300  # there are letters
    edge = np.concatenate([shown[0], shown[-1], shown[:, 0], shown[:, -1]])
    assert (edge == 255).all()  # and none is cut off


def test_a_grid_that_is_not_told_its_scale_fills_the_page_but_not_more():
    for n, side in ((1, 28), (4, 64), (8, 28), (10, 28), (6, 64)):
        width, _ = viz.grid(noise(n, 1, side, side), n, alt=ALT).size
        assert width <= viz.PAGE
        assert width + n * side > min(viz.PAGE, n * 150)


def test_rows_and_columns_follow_from_their_titles():
    by_rows = viz.grid(noise(6, 1, 8, 8), row_titles=["a", "b"], scale=4, alt=ALT).size
    by_columns = viz.grid(noise(6, 1, 8, 8), row_titles=["a", "b"], column_titles=list("pqr"), scale=4,
                          alt=ALT).size
    assert by_rows[0] == by_columns[0] and by_columns[1] > by_rows[1]


def test_up_to_256_colours_are_kept_exactly_and_photographs_stay_close():
    rng = np.random.default_rng(0)
    palette = rng.integers(0, 256, (256, 3), dtype=np.uint8)
    few = palette[rng.integers(0, 256, (40, 50))]
    assert (pixels(png(Image.fromarray(few))) == few).all()
    y, x = np.mgrid[:64, :64]
    smooth = np.stack([x * 4, y * 4, (x + y) * 2], -1).astype(np.uint8)
    assert np.abs(pixels(png(Image.fromarray(smooth))) - smooth).mean() < 6


def test_a_picture_of_pure_noise_is_still_small():
    assert len(viz.grid(noise(32, 3, 64, 64), alt=ALT).png) < 180_000


# ------------------------------------------------------------------------------------------------ motion

def frames_of(picture: Picture) -> list[tuple[np.ndarray, float]]:
    movie = Image.open(io.BytesIO(picture.animation))
    found = []
    for i in range(movie.n_frames):
        movie.seek(i)
        found.append((np.asarray(movie.convert("RGB")).astype(int), movie.info["duration"]))
    return found


def test_an_animation_plays_its_frames_in_order_and_rests_on_the_last():
    greys = [torch.full((2, 1, 4, 4), level) for level in (-1.0, 0.0, 0.6)]
    picture = viz.animation(greys, fps=10, alt=ALT)
    frames = frames_of(picture)
    assert [f[0, 0, 0] for f, _ in frames] == pytest.approx([0, 128, 204], abs=3)
    assert [pace for _, pace in frames] == [100, 100, 1600]
    assert Image.open(io.BytesIO(picture.animation)).info["loop"] == 0  # for ever
    assert pixels(picture)[0, 0, 0] == 204  # the still is the end
    assert "<details open>" in picture.html()  # and there is a way to stop it


def test_thirty_frames_of_noise_turning_into_four_pictures_stay_small_and_as_long():
    clean = noise(4, 3, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    eps = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    walk = [(i / 29) * clean + (1 - i / 29) * eps for i in range(30)]
    picture = viz.animation(walk, fps=8, scale=3, alt=ALT)
    frames = frames_of(picture)
    assert len(picture.animation) <= 200_000 and len(frames) >= 10
    assert sum(pace for _, pace in frames) == pytest.approx(30 * 125 + 1500, rel=0.1)
    last = viz.grid(clean, 4, scale=1, alt=ALT)
    tile = slice(0, 64), slice(0, 64)
    assert np.abs(frames[-1][0][tile] - pixels(last)[tile]).mean() < 12
    assert picture.size == (3 * (4 * 64 + 3 * 2), 3 * 64)


# ------------------------------------------------------------------------------------------------ charts

def luminance(colour: str) -> float:
    rgb = np.array(mpl.colors.to_rgb(colour))
    linear = np.where(rgb <= 0.03928, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def test_letters_stand_out_from_white_and_every_curve_from_the_next():
    assert all(1.05 / (luminance(colour) + 0.05) >= 4.5 for colour in (*viz.LETTERS, viz.INK))
    kinds = list(zip(viz.COLOURS, viz.DASHES, viz.MARKERS, viz.HATCHES, strict=True))
    assert len(set(viz.COLOURS)) == len(set(viz.MARKERS)) == len(set(viz.HATCHES)) == len(kinds)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[mpl.figure.Figure]:
    """The figures that charts are made of, in place of their pixels."""
    seen: list[mpl.figure.Figure] = []
    blank = png(Image.new("RGB", (9, 9)))
    monkeypatch.setattr(viz, "_rasterise", lambda figure: seen.append(figure) or blank)
    return seen


def test_curves_are_named_at_their_ends_where_there_is_room_and_in_a_legend_where_not(drawn):
    viz.curves([0, 1], {"up": [0, 1], "down": [1, 0]}, "x", "y", alt=ALT)
    viz.curves([0, 1], {name: [0, 1] for name in "abcde"}, "x", "y", alt=ALT)
    viz.curves([0, 1, 2], {"up": [0, 1, 2]}, "x", "y", alt=ALT, marks={"here": 1})
    apart, together, alone = (figure.axes[0] for figure in drawn)
    assert apart.get_legend() is None
    places = {text.get_text(): text.xy[1] for text in apart.texts}
    assert places["up"] > 0.9 and places["down"] < 0.1
    assert [text.get_text() for text in together.get_legend().get_texts()] == list("abcde")
    assert not together.texts
    assert alone.get_legend() is None and [text.get_text() for text in alone.texts] == ["here"]


def test_names_at_the_ends_never_overlap(drawn):
    viz.curves([0, 1], {"a": [1, 0.50], "b": [1, 0.51], "c": [1, 0.53], "d": [0, 1]}, "x", "y", alt=ALT)
    figure = drawn[0]
    FigureCanvasAgg(figure).draw()
    boxes = sorted((text.get_window_extent() for text in figure.axes[0].texts), key=lambda box: box.y0)
    assert len(boxes) == 4
    assert all(low.y1 <= high.y0 + 1 for low, high in pairwise(boxes))


def test_infinite_points_are_left_out_and_logarithms_are_axes():
    snr = torch.tensor([float("inf"), 10.0, 1.0, 0.0])
    viz.curves(range(1, 5), {"snr": snr}, "t", "SNR", logx=True, logy=True, alt=ALT)
    viz.curves(range(4), {"log": snr.log()}, "t", "log-SNR", alt=ALT)


def test_bars_reach_as_high_as_their_numbers(drawn):
    viz.bars({"blur": [20.04, 18.0], "ours": [25.0, 24.0]}, ["t = 250", "t = 500"], "PSNR", alt=ALT)
    ax = drawn[0].axes[0]
    assert [bar.get_height() for bar in ax.patches] == [20.04, 18.0, 25.0, 24.0]
    assert ax.get_ylim()[0] == 0  # a bar that does not start at zero lies
    assert [text.get_text() for text in ax.texts] == ["20.0", "18.0", "25.0", "24.0"]


def test_a_histogram_is_a_density_below_its_curve(drawn):
    samples = torch.randn(100, 200, generator=torch.Generator().manual_seed(0))
    normal = lambda x: torch.exp(-x**2 / 2) / (2 * torch.pi) ** 0.5
    viz.histogram({"drawn": samples, "again": samples}, normal, alt=ALT)
    ax = drawn[0].axes[0]
    stairs, again = ax.patches
    heights, edges, _ = stairs.get_data()
    assert (heights * np.diff(edges)).sum() == pytest.approx(1)
    middle = (edges[1:] + edges[:-1]) / 2
    theory = np.interp(middle, *ax.lines[0].get_data())
    assert np.abs(heights - theory).max() < 5 * np.sqrt(0.4 / (20_000 * np.diff(edges)[0]))
    assert not again.get_fill()


# --------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize(("call", "message"), [
    (lambda: viz.grid(noise(3, 8, 8), alt=ALT), r"\(n, c, h, w\) with c = 1 or 3, got \(3, 8, 8\)"),
    (lambda: viz.grid(noise(3, 2, 8, 8), alt=ALT), r"got \(3, 2, 8, 8\)"),
    (lambda: viz.grid(noise(0, 3, 8, 8), alt=ALT), r"got \(0, 3, 8, 8\)"),
    (lambda: viz.grid([], alt=ALT), "one shape .* got none"),
    (lambda: viz.grid([noise(1, 4, 4), noise(1, 5, 5)], alt=ALT), r"one shape .*\(1, 4, 4\), \(1, 5, 5\)"),
    (lambda: viz.grid(torch.zeros(1, 1, 4, 4).long(), alt=ALT), "or uint8 in 0..255, got torch.int64"),
    (lambda: viz.grid(noise(1, 1, 4, 4) / 0, alt=ALT), "NaN or infinity"),
    (lambda: viz.grid(noise(2, 1, 4, 4), columns=0, alt=ALT), "columns must be a whole number .* got 0"),
    (lambda: viz.grid(noise(2, 1, 4, 4), scale=1.5, alt=ALT), "scale must be a whole number .* got 1.5"),
    (lambda: viz.grid(noise(2, 1, 4, 4), titles=["a"], alt=ALT), "titles must hold 2 strings, .* got 1"),
    (lambda: viz.grid(noise(4, 1, 4, 4), 2, row_titles=["a"], alt=ALT), "row_titles must hold 2"),
    (lambda: viz.grid(noise(4, 1, 4, 4), 2, column_titles=["a"], alt=ALT), "column_titles must hold 2"),
    (lambda: viz.strip(noise(2, 1, 4, 4), ["a"], alt=ALT), "labels must hold 2"),
    (lambda: viz.animation([noise(1, 4, 4)], alt=ALT), "two frames and fps above 0, got 1 and 8"),
    (lambda: viz.animation([noise(1, 4, 4)] * 2, fps=0, alt=ALT), "got 2 and 0"),
    (lambda: viz.animation([noise(1, 4, 4), noise(1, 5, 5)], alt=ALT), "frames must have one shape"),
    (lambda: viz.animation([noise(1, 4, 4)] * 2, scale=0, alt=ALT), "scale must be a whole number .* got 0"),
    (lambda: viz.curves([0, 1], {"a": [1]}, "x", "y", alt=ALT), "'a' must have 2 numbers, .* got 1"),
    (lambda: viz.curves([0], {"a": [float("nan")]}, "x", "y", alt=ALT), "some finite"),
    (lambda: viz.curves([0], {}, "x", "y", alt=ALT), "1 to 7 curves apart, got 0"),
    (lambda: viz.curves([0], {str(i): [i] for i in range(8)}, "x", "y", alt=ALT), "got 8"),
    (lambda: viz.bars({"a": [1.0]}, ["x", "y"], "dB", alt=ALT), "'a' needs one finite .* each of 2 groups"),
    (lambda: viz.bars({"a": [float("inf")]}, ["x"], "dB", alt=ALT), "finite"),
    (lambda: viz.bars({}, ["x"], "dB", alt=ALT), "1 to 7 methods apart, got 0"),
    (lambda: viz.histogram([1.0], alt=ALT), "at least two finite numbers, got 1"),
    (lambda: viz.histogram({"a": [1.0, float("nan")]}, alt=ALT), "'a' needs at least two finite"),
])
def test_what_cannot_be_drawn_is_named_in_a_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bytes_made_floats_are_not_shown_as_white():
    with pytest.raises(ValueError, match="up to 255"):
        viz.grid(torch.full((1, 1, 4, 4), 255.0), alt="white")
