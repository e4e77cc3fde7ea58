"""A canvas of coloured squares, painted by clicking: drawings for pages that need one made by hand.

The squares are buttons of ipywidgets, so that Tab and Enter paint too. As with the explorers, a reader without a
kernel sees a still picture: the drawing that the canvas began with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import ipywidgets
import torch
from torch import Tensor

from coursekit import viz
from coursekit.pictures import Picture
from coursekit.widgets import live

INVITATION = "Run this cell to paint on it: choose a colour, then click squares."
SQUARE = 20  # screen pixels


class Canvas:
    """Squares to paint; as the last line of a cell it shows itself, and `x` is what is on it now.

    rows      the drawing to begin with, one letter a square, as ["ooo", "ogo", "ooo"]
    colours   {name: "#rrggbb"}; a square's letter is the first of its colour's name
    alt       what the first drawing shows

    ValueError for rows of different lengths, a letter without a colour, or two colours of one letter.
    """

    def __init__(self, rows: Sequence[str], colours: Mapping[str, str], *, alt: str,
                 caption: str | None = None) -> None:
        if not rows or len({len(row) for row in rows}) != 1 or not rows[0]:
            raise ValueError(f"a drawing has rows of one length, got lengths {[len(row) for row in rows]}")
        names = {name[0]: name for name in colours}
        if len(names) != len(colours):
            raise ValueError(f"each colour needs a first letter of its own, got {list(colours)}")
        if unknown := sorted(set("".join(rows)) - set(names)):
            raise ValueError(f"the letters of a drawing are {sorted(names)}, got {unknown}")
        self.colours = dict(colours)
        self.painted = [[names[letter] for letter in row] for row in rows]
        self.still: Picture = viz.grid(self.x, 1, scale=12, alt=alt, caption=caption)
        self.colour = ipywidgets.Dropdown(description="colour", options=list(colours), value=self.painted[0][0])
        self.brush = ipywidgets.Dropdown(description="brush", options=[1, 3, 5], value=1)
        self._styles = {name: ipywidgets.ButtonStyle(button_color=colour) for name, colour in colours.items()}
        side = f"{SQUARE}px"
        layout = ipywidgets.Layout(width=side, height=side, min_width="0", margin="0", padding="0")
        self.squares = [[ipywidgets.Button(layout=layout) for _ in row] for row in rows]
        for i, line in enumerate(self.squares):
            for j, square in enumerate(line):
                self._colour(i, j)
                square.on_click(partial(self._clicked, i, j))
        sheet = ipywidgets.GridBox([square for line in self.squares for square in line], layout=ipywidgets.Layout(
            grid_template_columns=f"repeat({len(rows[0])}, {side})", grid_gap="0"))
        self.box = ipywidgets.VBox([ipywidgets.HBox([self.colour, self.brush]), sheet])

    @property
    def x(self) -> Tensor:
        """What is on the canvas, (1, 3, rows, columns) in [-1, 1], one pixel a square."""
        rgb = [[list(bytes.fromhex(self.colours[name][1:])) for name in line] for line in self.painted]
        return torch.tensor(rgb).permute(2, 0, 1)[None].float() / 127.5 - 1

    def paint(self, row: int, column: int, colour: str, brush: int = 1) -> None:
        """Colour the squares that a brush, so many squares wide, covers around one of them."""
        if colour not in self.colours:
            raise ValueError(f"the colours are {list(self.colours)}, got {colour!r}")
        reach = brush // 2
        for i in range(max(row - reach, 0), min(row + reach + 1, len(self.squares))):
            for j in range(max(column - reach, 0), min(column + reach + 1, len(self.squares[0]))):
                self.painted[i][j] = colour
                self._colour(i, j)

    def _clicked(self, row: int, column: int, button: Any) -> None:
        self.paint(row, column, self.colour.value, self.brush.value)

    def _colour(self, row: int, column: int) -> None:
        name = self.painted[row][column]
        square = self.squares[row][column]
        square.style, square.tooltip = self._styles[name], f"row {row + 1}, column {column + 1}: {name}"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict, dict]:
        return live(self.box, self.still, INVITATION)
