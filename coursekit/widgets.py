"""Explorers: turn a knob, see the picture change; without a kernel, see its most telling position.

An explorer stores one output with two faces. Jupyter shows the controls where a kernel runs; every
other reader (GitHub, nbviewer, an exported page, a notebook not yet run) sees the still picture.
Only what ipywidgets 7.7 and 8 have in common is used, because Colab has 7.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import ipywidgets
import torch
import torch.nn.functional as F
from torch import Tensor

from coursekit import viz
from coursekit.diffusion import add_noise, noise_like
from coursekit.pictures import Picture, to_bytes
from coursekit.samplers import Step
from coursekit.schedules import NoiseSchedule

INVITATION = "Run this cell to turn the knobs yourself."
VIEW = "application/vnd.jupyter.widget-view+json"


class Explorer:
    """Controls above the picture they draw; as the last line of a cell it shows itself."""

    def __init__(self, draw: Callable[..., Picture], controls: Mapping[str, Any]) -> None:
        if not controls:
            raise ValueError("an explorer needs at least one control, got none")
        self.draw, self.controls = draw, dict(controls)
        self._drawn: dict[tuple, Picture] = {}  # so that turning a knob back costs nothing
        self.picture = self.still = self._draw()
        self.image = ipywidgets.Image(format="png")
        self.words = ipywidgets.HTML()
        self.box = ipywidgets.VBox([*self.controls.values(), self.image, self.words])
        self._show()
        for control in self.controls.values():
            control.observe(self._turned, names="value")

    def _draw(self) -> Picture:
        values = {name: control.value for name, control in self.controls.items()}
        key = tuple(values.values())
        if key not in self._drawn:
            self._drawn[key] = self.draw(**values)
        return self._drawn[key]

    def turn(self, **values: Any) -> None:
        """Set several controls at once, each to the nearest of its values, and draw once."""
        for name, wanted in values.items():
            control = self.controls[name]
            if wanted not in control.options:  # a name has no nearest
                wanted = min((abs(value - wanted), value) for value in control.options)[1]
            control.unobserve(self._turned, names="value")
            control.value = wanted
            control.observe(self._turned, names="value")
        self._turned(None)

    def _turned(self, change: Any) -> None:
        self.picture = self._draw()
        self._show()

    def _show(self) -> None:
        width, _ = self.picture.size
        self.image.value = self.picture.png
        self.image.layout.width, self.image.layout.max_width = f"{width}px", "100%"
        # An ipywidgets image has no alt text: the words are there for a screen reader, which says them
        # when they change, and out of sight for everyone else.
        hidden = "position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)"
        self.words.value = (f'<div role="status" style="{hidden}">{html.escape(self.picture.alt)}</div>'
                            f'<div style="line-height:1.4">{html.escape(self.picture.caption or "")}</div>')

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict, dict]:
        return live(self.box, self.still, INVITATION)


def live(box: ipywidgets.Widget, still: Picture, invitation: str) -> tuple[dict, dict]:
    """What a cell shows: the widget, or where there is no kernel the still picture and how to wake it."""
    caption = f"{still.caption} {invitation}" if still.caption else invitation
    data, metadata = replace(still, caption=caption)._repr_mimebundle_()
    data[VIEW] = {"version_major": 2, "version_minor": 0, "model_id": box.model_id}
    return data, metadata


def explore(draw: Callable[..., Picture], **controls: Any) -> Explorer:
    """Let the reader turn the arguments of `draw`, a function of theirs that returns a Picture.

    controls: one ipywidgets control per argument, with a description. Where they stand now is what a
    reader without a kernel sees, so start them at the most telling position. `draw` must depend on its
    arguments alone: each combination is drawn once and kept.
    """
    return Explorer(draw, controls)


def slider(description: str, values: Sequence[Any], start: Any) -> ipywidgets.SelectionSlider:
    """A slider over `values`, standing on `start`, one of them; arrow keys move it."""
    if start not in values:
        raise ValueError(f"{description} starts at one of its values {list(values)}, got {start!r}")
    return ipywidgets.SelectionSlider(description=description, options=list(values), value=start,
                                      layout=ipywidgets.Layout(width="480px", max_width="100%"))


def choice(description: str, names: Sequence[str], start: str) -> ipywidgets.Dropdown:
    """A drop-down list of `names`, showing `start`, one of them."""
    if start not in names:
        raise ValueError(f"{description} starts at one of {list(names)}, got {start!r}")
    return ipywidgets.Dropdown(description=description, options=list(names), value=start)


def pointed(explorer: Explorer, image: Tensor, squares: int = 16) -> Explorer:
    """Put an image (c, h, w) in [-1, 1] above an explorer with sliders `row` and `column`: a click points.

    The image is a sheet of squares x squares buttons in its colours, so that Tab and Enter point too. A click moves
    both sliders to the middle of the square; they stay, for single pixels. ValueError without such sliders, or for an
    image that does not fall into so many squares.
    """
    h, w = image.shape[-2:]
    if not {"row", "column"} <= explorer.controls.keys() or h % squares or w % squares:
        raise ValueError(f"pointing takes sliders row and column and an image that falls into {squares} x {squares} "
                         f"squares, got {sorted(explorer.controls)} and shape {tuple(image.shape)}")
    mean = to_bytes(F.avg_pool2d(image[None].clamp(-1, 1), (h // squares, w // squares)))[0]
    layout = ipywidgets.Layout(width="16px", height="16px", min_width="0", margin="0", padding="0")
    sheet = []
    for i in range(squares):
        for j in range(squares):
            row, column = (2 * i + 1) * h // (2 * squares), (2 * j + 1) * w // (2 * squares)
            colour = "#" + bytes(mean[i, j].tolist()).hex()
            button = ipywidgets.Button(layout=layout, tooltip=f"row {row}, column {column}",
                                       style=ipywidgets.ButtonStyle(button_color=colour))
            button.on_click(partial(_point, explorer, row, column))
            sheet.append(button)
    grid = ipywidgets.Layout(grid_template_columns=f"repeat({squares}, 16px)", grid_gap="0")
    explorer.box.children = (ipywidgets.GridBox(sheet, layout=grid), *explorer.box.children)
    return explorer


def _point(explorer: Explorer, row: int, column: int, button: Any) -> None:
    explorer.turn(row=row, column=column)


def noising_explorer(image: Tensor, schedules: Mapping[str, NoiseSchedule],
                     times: Sequence[int] | None = None, eps: Tensor | None = None,
                     rng: torch.Generator | None = None, caption: str | None = None) -> Explorer:
    """Take one image apart into signal and noise, x_t = a x_0 + s eps, at any t of any schedule.

    image: (c, h, w) in [-1, 1]; eps: its noise, the same at every t, drawn from rng if not given.
    times: ints in 0..T of every schedule, 0, 25, ..., T by default. It starts in the middle of `times`.
    """
    if image.ndim != 3:
        raise ValueError(f"the explorer takes one image (c, h, w), got shape {tuple(image.shape)}")
    if not schedules:
        raise ValueError("the explorer needs at least one named schedule, got none")
    if times is None:
        shortest = min(schedule.T for schedule in schedules.values())
        times = sorted({*range(0, shortest, max(1, shortest // 40)), shortest})
    times = [int(t) for t in times]
    for name, schedule in schedules.items():
        if not times or min(times) < 0 or max(times) > schedule.T:
            raise ValueError(f"times must lie in 0..T = 0..{schedule.T} of {name!r}, got {list(times)}")
    x0 = image[None]
    if eps is not None and eps.shape != image.shape:
        raise ValueError(f"eps must have the shape of the image {tuple(image.shape)}, got {tuple(eps.shape)}")
    eps = noise_like(x0, rng) if eps is None else eps[None]

    def draw(t: int, schedule: str) -> Picture:
        path = schedules[schedule]
        a, s = (float(c) for c in path.signal_and_noise(t, like=x0))
        log_snr = path.snr[t].log().item()
        numbers = f"signal {a:.3f}, noise {s:.3f}, log-SNR {log_snr:+.2f}".replace("inf", "∞")
        return viz.strip([x0[0], a * x0[0], s * eps[0], add_noise(x0, t, eps, path)[0]],
                         ["x₀", f"{a:.2f} · x₀", f"{s:.2f} · ε", "xₜ, their sum"],
                         title=f"{schedule}, t = {t}:  {numbers}", caption=caption,
                         alt=f"{schedule}, t = {t} of {path.T}: {numbers}. Four pictures in a row: the clean "
                             "image, its share of x_t, the noise's share, and x_t, the sum of the two.")

    return explore(draw, t=slider("t", times, times[len(times) // 2]),
                   schedule=choice("schedule", list(schedules), next(iter(schedules))))


def trajectory(steps: Sequence[Step] | Sequence[Picture], *, alt: str, caption: str | None = None,
               start: int | None = None) -> Explorer:
    """Walk through a sampler's steps with a slider: what it held (x_t) above what it believed (x_0).

    steps: what a sampler yielded, as a list, or pictures of your own. alt: what the whole walk shows;
    each position adds where it stands. start: which step, 1 for the first, to show without a kernel; half-way
    by default.
    """
    walk: list[Step | Picture] = list(steps)
    if not walk:
        raise ValueError("a trajectory needs at least one step, got none")
    if not alt.strip():
        raise ValueError(f"a trajectory needs alt text that says what the walk shows, got {alt!r}")
    start = (len(walk) + 1) // 2 if start is None else start

    def draw(step: int) -> Picture:
        here = walk[step - 1]
        where = f"{alt} Step {step} of {len(walk)}"
        if isinstance(here, Picture):
            return replace(here, alt=f"{where}: {here.alt}", caption=caption)
        at = f"t = {here.t:g}" if isinstance(here.t, int) else f"t = {here.t:.2f}"
        return viz.grid(torch.cat([here.x, here.x0]), len(here.x), row_titles=["xₜ", "guess\nat x₀"],
                        title=at, alt=f"{where}, {at}.", caption=caption)

    return explore(draw, step=slider("step", range(1, len(walk) + 1), start))
