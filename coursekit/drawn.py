"""Cat faces drawn by code: the stand-in for photographs, and a set that never runs out.

Every cat is a few dozen soft shapes, each a signed distance (negative inside) turned into a coverage,
painted back to front in a frame that turns and scales with its head: x to the right, y down, the head's
outline near radius 1. The picture is painted larger than asked for and averaged down.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from coursekit.easel import (
    Array,
    Easel,
    Point,
    Window,
    clouds,
    ellipse,
    hsv,
    join,
    pick,
    polygon,
    rgb,
    step,
)
from coursekit.fur import COATS, WHITE, Coat

SMALLEST = 8  # pixels


def drawn_cats(n: int, size: int = 64, seed: int = 0) -> Tensor:
    """The first n cats of a seed, (n, 3, size, size) uint8.

    Cat i of a seed is the same however many are drawn, and the same cat at every size from 8 up.
    """
    if n < 1:
        raise ValueError(f"at least one cat must be drawn, got n = {n}")
    if size < SMALLEST:
        raise ValueError(f"a cat needs at least {SMALLEST} x {SMALLEST} pixels, got size = {size}")
    if seed < 0:
        raise ValueError(f"the seed must be at least 0, got {seed}")
    return torch.stack([torch.from_numpy(_draw(np.random.default_rng([seed, i]), size)) for i in range(n)])


def coats(n: int, seed: int = 0) -> Tensor:
    """Which of COATS each of the first n cats of a seed wears, (n,) int64."""
    return torch.tensor([int(np.random.default_rng([seed, i]).integers(len(COATS))) for i in range(n)])


def _background(e: Easel, rng: np.random.Generator) -> None:
    hue, kind = rng.random(), rng.integers(5)
    low = hsv(hue, rng.uniform(0.15, 0.55), rng.uniform(0.25, 0.6))
    high = hsv(hue + rng.uniform(-0.12, 0.12), rng.uniform(0.08, 0.4), rng.uniform(0.6, 0.95))
    angle = rng.uniform(0, 2 * math.pi)
    ramp = (math.cos(angle) * e.u + math.sin(angle) * e.v) / 2.8 + 0.5
    if kind == 1:  # a lamp behind
        ramp = np.exp(-((e.u - rng.uniform(-0.8, 0.8)) ** 2 + (e.v - rng.uniform(-0.9, 0)) ** 2) / 0.9)
    e.paint[:] = low + ramp * (high - low)
    if kind == 2:  # a floor
        line = rng.uniform(0.1, 0.6)
        floor = hsv(rng.uniform(0.04, 0.12), rng.uniform(0.2, 0.6), rng.uniform(0.3, 0.75))
        e.lay(floor, e.cover((line - e.v) / 0.6))
        e.lay(rgb(0.95, 0.95, 0.92), 0.6 * e.cover((np.abs(e.v - line) - 0.03) / 0.6))
    elif kind == 3:  # lights out of focus
        for _ in range(rng.integers(6, 14)):
            cu, cv, r = rng.uniform(-1, 1), rng.uniform(-1, 0.8), rng.uniform(0.08, 0.28)
            d = np.hypot(e.u - cu, e.v - cv) - r
            e.lay(hsv(hue + rng.uniform(-0.2, 0.2), rng.uniform(0.1, 0.6), 1.0),
                  rng.uniform(0.2, 0.5) * e.cover(d, 0.06))
    elif kind == 4:  # wallpaper
        a, count = pick(rng, 0, math.pi / 2, math.pi / 4), rng.uniform(8, 18)
        wave = np.sin(count * (math.cos(a) * e.u + math.sin(a) * e.v) + rng.uniform(0, 6))
        e.lay(low * 0.8 + 0.2, 0.45 * step(-0.15, 0.15, wave))


def _draw(rng: np.random.Generator, size: int) -> Array:
    """One cat, (3, size, size) uint8."""
    kind = COATS[int(rng.integers(len(COATS)))]
    finer = max(1, math.ceil(128 / size))
    tilt, turn = rng.normal(0, 0.1), float(np.clip(rng.normal(0, 0.4), -1, 1))
    e = Easel(size * finer, (rng.normal(0, 0.05), 0.2 + rng.normal(0, 0.04)), rng.uniform(0.61, 0.74), tilt)
    _background(e, rng)
    coat = Coat(kind, e, rng)
    x, y = e.x, e.y
    # The features look where the head is turned: they move, and the far half of the face narrows.
    shift = 0.16 * turn
    fx = (x - shift) / (1 - 0.14 * turn * np.sign(x - shift))
    wide, tall, jowl = rng.uniform(0.92, 1.06), rng.uniform(0.78, 0.9), rng.uniform(0.3, 0.5)

    # Fur: strands that run outwards from the nose.
    angle, radius = np.arctan2(y - 0.25, x), np.hypot(x, y - 0.25)
    lattice = Image.fromarray(rng.random((90, 10), np.float32)).resize((60, 720), Image.Resampling.BICUBIC)
    turns, rings = (angle + math.pi) * (719 / (2 * math.pi)), np.minimum(radius * 24, 59)
    strands = np.asarray(lattice)[turns.astype(np.int32), rings.astype(np.int32)]
    strands = 0.55 * strands + 0.45 * clouds(rng, 52, len(x))

    head = join(ellipse(x, y, wide, tall), ellipse(x, y - 0.28, wide * 0.94, jowl), 0.3)
    tufts = np.abs((angle * rng.uniform(5, 7)) % 1 - 0.5) * 2  # a ragged edge, most on the cheeks
    shag = rng.uniform(0.02, 0.09) * step(0.5, 0.9, np.abs(x)) * step(-0.2, 0.3, y)
    head = head - shag * tufts - 0.03 * strands
    light = rng.uniform(-0.6, 0.6)
    fur = coat.fur * (0.86 + 0.28 * strands)
    glow = 1.02 + 0.16 * (light * x - y) / (1 + radius)

    # Shoulders, in the shadow of the chin.
    body = ellipse(x - 0.15 * turn, y - 1.75, rng.uniform(0.95, 1.25), rng.uniform(0.95, 1.1))
    body = body - 0.03 * strands
    e.lay(fur * (0.78 + 0.14 * step(0.0, 0.5, head)), e.cover(body))
    if rng.random() < 0.3:
        _collar(e, rng, body, x, y)

    lean, long, plump = rng.uniform(-0.1, 0.16), rng.uniform(0.5, 0.8), rng.uniform(0.05, 0.14)
    corners = [(0.14, -0.62), (0.74 + lean, -0.66 - long), (0.97, -0.22)]
    for side in (-1, 1):
        where = e.near(side * corners[1][0], -0.55 - long / 2, 0.9)
        ex, ey = x[where] * side * (1 + 0.12 * side * turn), y[where]
        shine = glow[where] * (0.9 if side * light < 0 else 1.0)
        _ear(e, coat, ex, ey, corners, plump, fur[(slice(None), *where)] * shine, strands[where], where)

    # Head: a ball under soft light, darker towards its edge.
    ball = np.sqrt(np.clip(1 - (x / 1.15) ** 2 - ((y - 0.1) / 1.1) ** 2, 0.0, 1))
    lit = glow * (0.72 + 0.32 * ball)
    e.lay(fur * lit, e.cover(head))
    _face(e, rng, coat, fx, y, fur * lit, light)
    fine = e.paint * (1.04 - 0.12 * (e.u**2 + e.v**2))  # darker in the corners
    picture = fine[:, ::finer, ::finer] / finer**2
    for k in range(1, finer**2):
        picture += fine[:, k // finer::finer, k % finer::finer] / finer**2
    grain = rng.random(picture.shape, np.float32) - 0.5
    return (picture * 255 + 6 * grain + 0.5).clip(0, 255).astype(np.uint8)


def _ear(e: Easel, coat: Coat, x: Array, y: Array, corners: list[Point], plump: float, fur: Array,
         strands: Array, where: Window) -> None:
    """An ear with a hollow, and wisps of fur in it."""
    ear = polygon(x, y, corners, plump)
    e.lay(fur, e.cover(ear), where)
    if coat.points is not None:
        e.lay(coat.points * (0.85 + 0.3 * strands), 0.95 * e.cover(ear), where)
    mx, my = (sum(corner[k] for corner in corners) / 3 for k in (0, 1))
    inside = [(mx + 0.62 * (cx - mx), my + 0.62 * (cy - my)) for cx, cy in corners]
    hollow = polygon(x, y - 0.04, inside, plump * 0.7)
    pink = coat.nose * 0.5 + rgb(0.45, 0.3, 0.3)
    e.lay(pink * (0.55 if coat.dark else 0.9), 0.85 * e.cover(hollow, 0.05), where)
    wisps = e.cover(hollow, 0.1) * step(0.35, 0.75, strands) * step(-1.0, -0.6, y)
    e.lay(fur * 0.5 + 0.45, 0.5 * wisps, where)


def _face(e: Easel, rng: np.random.Generator, coat: Coat, fx: Array, y: Array, lit: Array,
          light: float) -> None:
    """Muzzle, nose, mouth, eyes and whiskers, in the coordinates (fx, y) of a head that may look aside."""
    drop = rng.uniform(-0.04, 0.05)  # of the whole face
    y = y - drop

    # Muzzle: two puffs and a chin.
    puff = rng.uniform(0.22, 0.29)
    where = e.near(0, 0.5, 0.9)
    px, py = fx[where], y[where]
    chin = ellipse(px, py - 0.64, 0.2, 0.15)
    puffs = ellipse(np.abs(px) - 0.19, py - 0.43, puff, puff * 0.8)
    muzzle = join(puffs, chin, 0.08)
    e.lay(WHITE * (0.9 + 0.1 * e.cover(puffs, 0.3)), coat.white_muzzle * e.cover(muzzle, 0.16), where)
    if not coat.white_muzzle:
        e.lay(lit[(slice(None), *where)] * 0.75 + 0.22, 0.5 * e.cover(muzzle, 0.2), where)
    e.lay(rgb(0, 0, 0), 0.16 * e.cover(np.abs(muzzle - 0.02) - 0.02, 0.08) * step(0.4, 0.6, py), where)

    # Mouth and nose.
    line = coat.nose * 0.25
    mx, my = np.abs(px), py - 0.4
    smile, grin = rng.uniform(0.12, 0.17), rng.uniform(0.018, 0.026)
    if rng.random() < 0.1:  # a tongue that was forgotten outside
        e.lay(rgb(0.93, 0.5, 0.55), e.cover(ellipse(px, py - 0.56, 0.08, 0.11)), where)
    arc = np.maximum(np.abs(np.hypot(mx - smile, my) - smile) - grin, -my)
    e.lay(line, 0.8 * e.cover(np.minimum(arc, np.maximum(mx - grin, np.abs(my + 0.04) - 0.06))), where)
    w, h = rng.uniform(0.11, 0.15), rng.uniform(0.1, 0.13)
    nose = polygon(px, py - 0.27, [(-w, -h * 0.55), (w, -h * 0.55), (0.02, h * 0.7), (-0.02, h * 0.7)], 0.035)
    e.lay(coat.nose * 0.5, 0.5 * e.cover(nose - 0.02), where)
    e.lay(coat.nose, e.cover(nose), where)
    shine = ellipse(px - math.copysign(0.03, light), py - 0.23, 0.05, 0.018)
    e.lay(WHITE, 0.35 * e.cover(shine, 0.03), where)

    _eyes(e, rng, coat, fx, y, drop)

    # Whiskers, and the spots they grow from.
    pale = WHITE if coat.dark or rng.random() < 0.75 else WHITE * 0.35
    droop, length = rng.uniform(-0.12, 0.2), rng.uniform(0.8, 1.15)
    ax = np.abs(fx)
    spots = [np.hypot(mx - 0.2 - 0.04 * row, py - 0.36 - 0.055 * row) for row in range(3)]
    e.lay(line, 0.45 * e.cover(np.minimum.reduce(spots) - 0.017), where)
    hairs = [_hair(ax - 0.24 - 0.03 * row, y - 0.37 - 0.06 * row, droop - 0.16 + 0.18 * row, length)
             for row in range(3)]
    hairs += [_hair(ax - 0.36 - 0.1 * row, y + 0.4, -1.15 + 0.3 * row, 0.5 * length) for row in range(2)]
    e.lay(pale, 0.75 * e.cover(np.minimum.reduce(hairs)))


def _hair(x: Array, y: Array, angle: float, length: float) -> Array:
    """A whisker from the origin, bending down as it thins out."""
    c, s = math.cos(angle), math.sin(angle)
    along, across = c * x + s * y, c * y - s * x
    d = np.abs(across - 0.16 * along**2) - 0.016 * (1 - along / length)
    return np.maximum(d, np.abs(along - length / 2) - length / 2)


def _eyes(e: Easel, rng: np.random.Generator, coat: Coat, fx: Array, y: Array, drop: float) -> None:
    apart, level = rng.uniform(0.37, 0.45), rng.uniform(-0.12, -0.02)
    w, h, slant = rng.uniform(0.21, 0.27), rng.uniform(0.18, 0.26), rng.uniform(-0.02, 0.16)
    pupil, asleep = pick(rng, 0.18, 0.3, 0.45, 0.65) * w, rng.random() < 0.08
    hue = pick(rng, 0.12, 0.15, 0.19, 0.24, 0.3, 0.09, 0.55)
    if coat.blue_eyed:
        hue = rng.uniform(0.54, 0.6)
    hues = [hue, 0.57 if coat.odd_eyed and rng.random() < 0.4 else hue]
    gaze, glint = rng.uniform(-0.03, 0.03), pick(rng, -1, 1)
    for side, hue in zip((-1, 1), hues, strict=True):
        where = e.near(side * apart + 0.12, level + drop, 0.5)
        ox, oy = side * fx[where] - apart, y[where] - level
        ex, ey = ox + slant * oy, oy + slant * ox  # the outer corner is higher
        lid = np.clip(1 - (ex / w) ** 2, -1, 1)
        if asleep:
            line = rgb(0.5, 0.44, 0.42) if coat.black else coat.nose * 0.2
            e.lay(line, e.cover(np.maximum(np.abs(ey - 0.1 * lid) - 0.03, np.abs(ex) - w)), where)
            continue
        eye = np.where(lid > 0, 0.75 * (np.abs(ey + 0.02 * lid) - h * lid), np.hypot(np.abs(ex) - w, ey))
        e.lay(rgb(0.95, 0.92, 0.86), coat.spectacles * e.cover(eye - 0.1, 0.12), where)
        e.lay(rgb(0.1, 0.07, 0.06), 0.9 * e.cover(eye - 0.035, 0.02), where)
        inside = e.cover(eye)
        r = np.hypot(ex - gaze * side, ey)
        bright, dull = hsv(hue, rng.uniform(0.5, 0.75), 0.95), hsv(hue + 0.03, 0.85, 0.5)
        iris = dull + step(0.04, 0.2, 0.24 - np.abs(r - 0.1) + 0.35 * ey) * (bright - dull)
        e.lay(iris.astype(np.float32), inside, where)
        e.lay(rgb(0.03, 0.03, 0.04), inside * e.cover(ellipse(ex - gaze * side, ey, pupil, h * 0.95)), where)
        e.lay(rgb(0, 0, 0), 0.4 * inside * step(-0.3 * h, -h, ey), where)  # the lid's shadow
        spark = np.hypot(ex - glint * side * 0.06, ey + 0.35 * h) - 0.045
        echo = np.hypot(ex + glint * side * 0.06, ey - 0.4 * h) - 0.028
        e.lay(rgb(1, 1, 1), np.maximum(0.95 * e.cover(spark), 0.5 * inside * e.cover(echo)), where)


def _collar(e: Easel, rng: np.random.Generator, body: Array, x: Array, y: Array) -> None:
    colour = hsv(rng.random(), rng.uniform(0.6, 0.9), rng.uniform(0.5, 0.9))
    ring = np.abs(ellipse(x, y - 0.45, 0.85, 0.62)) - 0.07
    e.lay(colour, e.cover(np.maximum(np.maximum(ring, body), 0.5 - y)))
    bell = np.hypot(x, y - 1.1)
    e.lay(rgb(0.45, 0.33, 0.05), e.cover(bell - 0.13))
    e.lay(rgb(0.98, 0.82, 0.3), e.cover(bell - 0.11))
    e.lay(rgb(1, 1, 0.9), e.cover(np.hypot(x + 0.04, y - 1.06) - 0.03, 0.03))
