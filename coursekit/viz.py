"""Grids, strips, curves, bars, histograms and animations, each with its alt text.

Every function returns a `Picture`; as the last line of a cell it shows itself. Pixels are exact: one
image pixel is a square of `scale` screen pixels, never interpolated. Images are float tensors in
[-1, 1] (values beyond are clipped for display, and only for display) or uint8 in 0..255.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from coursekit import pictures
from coursekit.pictures import Images, Picture

Numbers = Sequence[float] | np.ndarray | Tensor

PAGE = 760  # screen pixels: what JupyterLab has beside its file browser on a small laptop
INK = "#222222"
# Okabe & Ito's palette, told apart by readers with any colour vision; its yellow is lost on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# The same, darkened for letters: 4.5 to 1 against white (WCAG 1.4.3).
LETTERS = ("#0072B2", "#C05500", "#00815E", "#9E5E81", "#996900", "#39779B", "#000000")
DASHES = ("-", (0, (6, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2)), (0, (3, 1.5)), (0, (8, 2, 1, 2, 1, 2)), "-")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---", "ooo")
RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 11.0, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": "#e4e4e4",
    "lines.linewidth": 2.0, "hatch.linewidth": 0.7, "figure.facecolor": "white", "axes.facecolor": "white",
    "text.usetex": False, "mathtext.fontset": "dejavusans"}


def grid(images: Images, columns: int | None = None, titles: Sequence[str] | None = None, *, alt: str,
         caption: str | None = None, title: str | None = None, row_titles: Sequence[str] | None = None,
         column_titles: Sequence[str] | None = None, scale: int | None = None,
         labels: Sequence[str] | None = None) -> Picture:
    """Images in rows of `columns`, with words above (`titles`) or below (`labels`) each of them.

    images: (n, c, h, w) or a sequence of n (c, h, w), c = 1 or 3. scale: screen pixels to an image
    pixel; by default the largest whole number that keeps the grid within the page. By default the
    columns are the column titles', or at most eight. ValueError for words that do not fit the count.
    """
    tiles = pictures.to_bytes(images)
    n, h, w = tiles.shape[:3]
    _at_least_one(columns=columns, scale=scale)
    if columns is None:
        columns = len(column_titles or ()) or (-(-n // len(row_titles)) if row_titles else min(n, 8))
    rows = -(-n // columns)
    above, below = _one_each(titles, n, "titles"), _one_each(labels, n, "labels")
    tops = _one_each(column_titles, columns, "column_titles")
    sides = _one_each(row_titles, rows, "row_titles")
    gap = 6
    left = max(map(pictures.text_width, sides), default=0) + 2 * gap if row_titles else 0
    scale = scale or _scale((PAGE - left) / columns - gap, h, w)
    h, w = h * scale, w * scale
    # A word wider than its image moves the columns apart; the images keep their size.
    pitch = max([w, *map(pictures.text_width, [*above, *below, *tops])]) + gap
    over, under = pictures.text_height(above), pictures.text_height(below)
    head = (pictures.text_height([title]) if title else 0) + pictures.text_height(tops)
    step = over + h + under + gap
    width = max(left + columns * pitch - gap, pictures.text_width(title or ""))
    canvas = Image.new("RGB", (width, head + rows * step - gap), "white")
    draw = ImageDraw.Draw(canvas)

    def write(text: str, x: float, y: float, anchor: str) -> None:
        draw.multiline_text((x, y), text, INK, pictures.font(), anchor, spacing=2,
                            align="right" if anchor[0] == "r" else "center")

    def centre(column: int) -> float:
        return left + column * pitch + (pitch - gap) / 2

    if title:
        write(title, width / 2, 0, "ma")
    for column, text in enumerate(tops):
        write(text, centre(column), head - 4, "md")
    for row, text in enumerate(sides):
        write(text, left - 2 * gap, head + row * step + over + h / 2, "rm")
    for i, tile in enumerate(tiles):
        row, column = divmod(i, columns)
        x, y = centre(column), head + row * step + over
        big = Image.fromarray(tile).resize((w, h), Image.Resampling.NEAREST)
        canvas.paste(big, (round(x - w / 2), y))
        if above:
            write(above[i], x, y - 4, "md")
        if below:
            write(below[i], x, y + h + 3, "ma")
    if title or above or below or tops or sides:
        canvas = ImageOps.expand(canvas, 6, "white")  # letters keep clear of a dark page
    return Picture(pictures.png(canvas), alt, caption)


def strip(images: Images, labels: Sequence[str], *, alt: str, caption: str | None = None,
          title: str | None = None, scale: int | None = None) -> Picture:
    """One row of images with a label under each."""
    return grid(images, len(images), labels=labels, alt=alt, caption=caption, title=title, scale=scale)


def animation(frames: Sequence[Tensor], fps: float = 8, *, alt: str, caption: str | None = None,
              columns: int | None = None, scale: int | None = None) -> Picture:
    """Frames (c, h, w) or (n, c, h, w) one after the other, for ever, resting on the last one.

    The file holds one pixel for each image pixel and the page enlarges it. Where it would take more than
    200 KB (noise does not compress) frames are left out evenly, counted from the last one, and the others
    stay longer.
    """
    # An animated PNG, not a GIF or a video: image/gif is no type that every notebook viewer shows, a video
    # needs controls that GitHub removes, and every browser plays an animated PNG in an <img>.
    if len(frames) < 2 or not fps > 0:
        raise ValueError(f"an animation needs two frames and fps above 0, got {len(frames)} and {fps}")
    stacks = [pictures.to_bytes(f[None] if f.ndim == 3 else f) for f in frames]
    if len({s.shape for s in stacks}) > 1:
        raise ValueError(f"all frames must have one shape, got {sorted({s.shape for s in stacks})}")
    n, h, w = stacks[0].shape[:3]
    _at_least_one(columns=columns, scale=scale)
    columns = columns or min(n, 8)
    scale = scale or _scale(PAGE / columns - 6, h, w)
    sheets = [Image.fromarray(pictures.tiled(s, columns)) for s in stacks]
    last = sheets[-1]
    end = pictures.png(last.resize((last.width * scale, last.height * scale), Image.Resampling.NEAREST))
    return Picture(end, alt, caption, animation=pictures.apng(sheets, fps))


def curves(x: Numbers, ys: Mapping[str, Numbers], xlabel: str, ylabel: str, *, alt: str,
           caption: str | None = None, logx: bool = False, logy: bool = False,
           marks: Mapping[str, float] | None = None, height: int = 360) -> Picture:
    """Named curves over one x, told apart by colour, dashes and marker, each named at its end.

    Where the ends lie too close for names there is a legend. marks: {name: x} draws dotted
    verticals. Points that are not finite are left out, such as the infinite SNR of a clean image.
    """
    across = _numbers(x)
    lines = {name: _numbers(y) for name, y in ys.items()}
    for name, y in lines.items():
        if len(y) != len(across) or not np.isfinite(y).any():
            raise ValueError(f"curve {name!r} must have {len(across)} numbers, some finite, got {len(y)}")
    if not 1 <= len(lines) <= len(COLOURS):
        raise ValueError(f"one picture tells 1 to {len(COLOURS)} curves apart, got {len(lines)}")

    def paint(ax: Axes) -> None:
        spacing = max(1, len(across) // 8)
        for i, (name, y) in enumerate(lines.items()):
            ax.plot(across, np.where(np.isfinite(y), y, np.nan), label=name, color=COLOURS[i], ls=DASHES[i],
                    marker=MARKERS[i], markevery=(i * spacing // len(lines), spacing), ms=5.5)
        ax.set(xlabel=xlabel, ylabel=ylabel, xscale="log" if logx else "linear",
               yscale="log" if logy else "linear")
        ax.margins(x=0.01)
        if logx and across.max() < 100 * across.min():  # here matplotlib's 2 × 10⁰ and 3 × 10⁰ collide
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            ax.xaxis.set_minor_formatter(NullFormatter())
        for name, at in (marks or {}).items():
            ax.axvline(at, color=INK, ls=":", lw=1.2)
            ax.annotate(name, (at, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom",
                        xytext=(0, 3), textcoords="offset points", fontsize=10)
        if len(lines) > 1:
            _name_the_lines(ax, across, list(lines.values()), gap=20 / (height - 70))

    return _chart(paint, height, alt, caption)


def bars(values: Mapping[str, Numbers], groups: Sequence[str], ylabel: str, *, alt: str,
         caption: str | None = None, digits: int = 1, height: int = 360) -> Picture:
    """One bar for each method in each group, from zero, with its number on top.

    values: {method: one number a group}; digits: decimals of the numbers on the bars.
    """
    columns = {name: _numbers(v) for name, v in values.items()}
    for name, v in columns.items():
        if len(v) != len(groups) or not np.isfinite(v).all():
            raise ValueError(f"{name!r} needs one finite number for each of {len(groups)} groups, got {v}")
    if not 1 <= len(columns) <= len(COLOURS):
        raise ValueError(f"one picture tells 1 to {len(COLOURS)} methods apart, got {len(columns)}")

    def paint(ax: Axes) -> None:
        width = 0.86 / len(columns)
        letters = max(len(f"{number:.{digits}f}") for v in columns.values() for number in v)
        size = min(10.0, 0.72 * PAGE * 0.78 / (len(columns) * len(groups)) / (0.62 * letters))
        for i, (name, v) in enumerate(columns.items()):
            at = np.arange(len(groups)) + (i - (len(columns) - 1) / 2) * width
            drawn = ax.bar(at, v, width * 0.92, label=name, color=COLOURS[i], hatch=HATCHES[i],
                           edgecolor="white", linewidth=0)
            ax.bar_label(drawn, fmt=f"%.{digits}f", fontsize=size, padding=2)
        ax.set_xticks(range(len(groups)), groups)
        ax.set_ylabel(ylabel)
        ax.grid(axis="x", visible=False)
        ax.margins(x=0.02, y=0.08)
        ax.tick_params(axis="x", length=0)
        across = min(4, len(columns))
        handles = sorted(ax.containers, key=lambda bar: ax.containers.index(bar) % across)  # read by rows
        ax.figure.legend(handles=handles, loc="outside upper left", ncols=across, frameon=False, fontsize=10)

    return _chart(paint, height, alt, caption)


def histogram(samples: Numbers | Mapping[str, Numbers], density: Callable[[Tensor], Tensor] | None = None,
              xlabel: str = "value", *, alt: str, caption: str | None = None, bins: int = 60,
              name: str = "theory", height: int = 320) -> Picture:
    """How samples are spread, as a density, under the curve that theory promises.

    samples: numbers of any shape, or {name: numbers} to lay several over each other; all finite.
    density: x -> p(x) on a float64 tensor; `name` is what the curve is called.
    """
    sets = dict(samples) if isinstance(samples, Mapping) else {"samples": samples}
    drawn = {key: _numbers(s) for key, s in sets.items()}
    for key, s in drawn.items():
        if s.size < 2 or not np.isfinite(s).all():
            raise ValueError(f"a histogram of {key!r} needs at least two finite numbers, got {s.size}")
    every = np.concatenate(list(drawn.values()))
    edges = np.histogram_bin_edges(every, bins)

    def paint(ax: Axes) -> None:
        for i, (key, s) in enumerate(drawn.items()):
            heights, _ = np.histogram(s, edges, density=True)
            ax.stairs(heights, edges, fill=i == 0, color=COLOURS[(5, 1, 2, 3)[i % 4]],
                      alpha=0.75 if i == 0 else 1, lw=1.8, ls=DASHES[0 if i == 0 else i], label=key)
        if density is not None:
            x = torch.linspace(edges[0], edges[-1], 400, dtype=torch.float64)
            ax.plot(x.numpy(), _numbers(density(x)), color=INK, lw=2, label=name)
        ax.set(xlabel=xlabel, ylabel="density")
        ax.margins(x=0.01)
        ax.legend(frameon=False)

    return _chart(paint, height, alt, caption)


def from_figure(figure: Figure, *, alt: str, caption: str | None = None) -> Picture:
    """Any matplotlib figure of your own as a Picture; pyplot's copy is closed, so it shows once."""
    import matplotlib.pyplot as plt  # slow to load, and nothing else here needs it

    plt.close(figure)
    return Picture(_rasterise(figure), alt, caption, density=2)


def _chart(paint: Callable[[Axes], None], height: int, alt: str, caption: str | None) -> Picture:
    """Draw on a figure that pyplot never hears of: nothing to close, no global setting touched."""
    with mpl.rc_context(RC):
        figure = Figure(figsize=(PAGE / 100, height / 100), layout="constrained")
        paint(figure.subplots())
        return Picture(_rasterise(figure), alt, caption, density=2)


def _rasterise(figure: Figure) -> bytes:
    figure.set_dpi(200)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return pictures.png(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"), (64,))


def _name_the_lines(ax: Axes, x: np.ndarray, lines: list[np.ndarray], gap: float) -> None:
    """Write each curve's name at its end, `gap` of the axes apart; where that misleads, draw a legend."""
    ends = []
    ax.autoscale_view()
    for y in lines:
        at = np.flatnonzero(np.isfinite(y))[-1]
        ends.append(float((ax.transScale + ax.transLimits).transform((x[at], y[at]))[1]))
    order = sorted(range(len(ends)), key=ends.__getitem__)
    places = list(ends)
    for below, above in list(pairwise(order)) * 100:  # push neighbours apart until none overlap
        push = max(0.0, gap - (places[above] - places[below])) / 2
        places[below], places[above] = places[below] - push, places[above] + push
        places[order[0]] = max(places[order[0]], gap / 4)  # below the axis the numbers of x begin
    if max(abs(p - e) for p, e in zip(places, ends, strict=True)) > 1.6 * gap:
        ax.legend(frameon=True, edgecolor="none", framealpha=0.85)
        return
    for i, (line, place) in enumerate(zip(ax.get_lines(), places, strict=False)):  # marks come after
        ax.annotate(str(line.get_label()), (1, place), xycoords="axes fraction", xytext=(6, 0),
                    textcoords="offset points", va="center", color=LETTERS[i], fontweight="bold",
                    fontsize=10.5, annotation_clip=False)


def _numbers(values: Any) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=float).ravel()


def _at_least_one(**given: int | None) -> None:
    for name, value in given.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def _scale(room: float, h: int, w: int) -> int:
    """Screen pixels to an image pixel, so that an image fits the room and is no giant."""
    return max(1, min(int(room // w), 192 // max(h, w)))


def _one_each(words: Sequence[str] | None, count: int, name: str) -> list[str]:
    if words is not None and len(words) != count:
        raise ValueError(f"{name} must hold {count} strings, one each, got {len(words)}")
    return [str(word) for word in words or []]
