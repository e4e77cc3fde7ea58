"""Soft shapes on a canvas: signed distances (negative inside), turned into coverage, painted in order."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[Any]  # float32
Window = tuple[slice, slice]
EVERYWHERE: Window = (slice(None), slice(None))
Point = tuple[float, float]


class Easel:
    """A square canvas, `paint` (3, h, w), 0..1, and a turned and scaled frame (x, y) upon it."""

    def __init__(self, pixels: int, centre: Point, scale: float, tilt: float) -> None:
        axis = ((np.arange(pixels) + 0.5) * (2 / pixels) - 1).astype(np.float32)
        self.u, self.v = np.meshgrid(axis, axis)  # of the canvas: -1..1, v down
        u, v = (self.u - centre[0]) / scale, (self.v - centre[1]) / scale
        self.c, self.s = math.cos(tilt), math.sin(tilt)
        self.x, self.y = self.c * u + self.s * v, self.c * v - self.s * u  # of the frame
        self.centre, self.scale = centre, scale
        self.pixel = 2 / pixels / scale  # in units of the frame
        self.paint = np.zeros((3, pixels, pixels), np.float32)

    def near(self, x: float, y: float, radius: float) -> Window:
        """The part of the canvas around a disc in the frame, so that small things cost little."""
        u = self.centre[0] + self.scale * (self.c * x - self.s * y)
        v = self.centre[1] + self.scale * (self.s * x + self.c * y)
        pixels, r = len(self.u), radius * self.scale
        top, bottom, left, right = (min(max(round((k + 1) * pixels / 2), 0), pixels)
                                    for k in (v - r, v + r, u - r, u + r))
        return slice(top, bottom), slice(left, right)

    def cover(self, distance: Array, soft: float = 0.0) -> Array:
        """How much of each pixel lies inside a shape; `soft` widens the edge."""
        return np.clip(0.5 - distance / (self.pixel + soft), 0, 1)

    def lay(self, colour: Array, alpha: Array, where: Window = EVERYWHERE) -> None:
        """Paint over what is there."""
        part = self.paint[(slice(None), *where)]
        part += alpha * (colour - part)


def ellipse(x: Array, y: Array, a: float, b: float) -> Array:
    """About the distance to an ellipse round the origin."""
    return (np.sqrt((x / a) ** 2 + (y / b) ** 2) - 1) * min(a, b)


def polygon(x: Array, y: Array, corners: Sequence[Point], rounding: float) -> Array:
    """The distance to a convex polygon, corners clockwise on the screen, with its corners rounded."""
    sides = []
    for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]], strict=True):
        length = math.hypot(x1 - x0, y1 - y0)
        sides.append((x - x0) * ((y1 - y0) / length) - (y - y0) * ((x1 - x0) / length) + rounding)
    outside = np.sqrt(sum(np.maximum(d, 0) ** 2 for d in sides))
    return outside + np.minimum(np.maximum.reduce(sides), 0) - rounding


def join(a: Array, b: Array, k: float) -> Array:
    """The union of two shapes, blended over a width k."""
    h = np.maximum(k - np.abs(a - b), 0) / k
    return np.minimum(a, b) - h * h * (k / 4)


def step(a: float, b: float, x: Array) -> Array:
    """0 at a, 1 at b, smooth between and constant beyond."""
    t = np.clip((x - a) / (b - a), 0, 1)
    return t * t * (3 - 2 * t)


def hsv(hue: float, saturation: float, value: float) -> Array:
    """A colour by hue, saturation and value, (3, 1, 1)."""
    return rgb(*colorsys.hsv_to_rgb(hue % 1, saturation, value))


def rgb(red: float, green: float, blue: float) -> Array:
    """A colour, (3, 1, 1)."""
    return np.array([red, green, blue], np.float32).reshape(3, 1, 1)


def pick(rng: np.random.Generator, *options: float) -> float:
    """One of the options, as the plain number it is, which keeps float32 arrays float32."""
    return options[int(rng.integers(len(options)))]


def clouds(rng: np.random.Generator, cells: int, pixels: int) -> Array:
    """Smooth noise, about 0..1, with so many cells across."""
    grid = Image.fromarray(rng.random((cells, cells), np.float32))
    return np.asarray(grid.resize((pixels, pixels), Image.Resampling.BICUBIC))
