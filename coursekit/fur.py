"""What a drawn cat wears: ten coats, as the colour of the fur everywhere and what goes with it."""

from __future__ import annotations

import numpy as np

from coursekit.easel import Array, Easel, clouds, ellipse, hsv, pick, rgb, step

COATS = ("tabby", "ginger", "calico", "spotted", "siamese", "tuxedo", "black", "white", "grey",
         "tortoiseshell")
WHITE = rgb(0.96, 0.95, 0.92)


class Coat:
    """The fur of one cat: `fur` is (3, h, w), 0..1, for the whole canvas of the easel."""

    def __init__(self, kind: str, e: Easel, rng: np.random.Generator) -> None:
        self.black = kind in ("black", "tuxedo", "tortoiseshell")
        self.dark = self.black or kind == "siamese"  # around the face
        self.blue_eyed, self.odd_eyed = kind == "siamese", kind == "white"
        self.spectacles = 0.45 if kind in ("tabby", "ginger", "spotted") else 0.0  # pale rings round the eyes
        self.white_muzzle = 0.0
        self.points: Array | None = None  # the colour of the ears, where it is not the fur's
        self.nose = hsv(rng.uniform(0.96, 1.03), rng.uniform(0.3, 0.5), rng.uniform(0.75, 0.95))
        self.fur = np.zeros_like(e.paint)
        if kind in ("tabby", "ginger"):
            self._stripes(e, rng, kind == "ginger")
        elif kind == "siamese":
            self._mask(e, rng)
        elif kind == "tuxedo":
            self._shirt(e, rng)
        elif kind in ("black", "white", "grey"):
            self._plain(kind, rng)
        else:
            self._patches(kind, e, rng)

    def _mix(self, colour: Array, alpha: Array | float = 1.0) -> None:
        self.fur += alpha * (colour - self.fur)

    def _stripes(self, e: Easel, rng: np.random.Generator, ginger: bool) -> None:
        across, warp = np.abs(e.x), clouds(rng, 7, len(e.x)) - 0.5
        if ginger:
            base = hsv(rng.uniform(0.055, 0.085), rng.uniform(0.6, 0.75), rng.uniform(0.85, 0.98))
        else:
            base = hsv(rng.uniform(0.07, 0.11), rng.uniform(0.1, 0.45), rng.uniform(0.55, 0.75))
        brow = step(-0.15, 0.45, np.cos(rng.uniform(13, 17) * e.x / (1.15 + 0.45 * e.y) + 2 * warp))
        brow *= step(-0.28, -0.42, e.y) * step(0.62, 0.42, across)  # the M on the forehead
        cheek = step(0.0, 0.55, np.sin(rng.uniform(11, 15) * (e.y - 0.45 * across) + 3 * warp))
        cheek *= step(0.5, 0.68, across) * step(-0.35, 0.0, e.y)
        body = step(-0.1, 0.4, np.sin(12 * (e.x + 0.3 * warp))) * step(0.9, 1.1, e.y)
        self._mix(base)
        self._mix(base * (rgb(0.72, 0.52, 0.38) if ginger else rgb(0.32, 0.28, 0.26)),
                  rng.uniform(0.7, 0.95) * np.maximum(np.maximum(brow, cheek), body))
        self.white_muzzle = pick(rng, 0.5, 0.75, 1.0)
        self.nose = self.nose * rgb(0.9, 0.75, 0.7)

    def _mask(self, e: Easel, rng: np.random.Generator) -> None:
        self.points = hsv(rng.uniform(0.03, 0.09), rng.uniform(0.3, 0.55), rng.uniform(0.2, 0.38))
        face = ellipse(e.x, e.y - 0.2, rng.uniform(0.55, 0.75), rng.uniform(0.55, 0.7))
        self._mix(hsv(rng.uniform(0.08, 0.11), rng.uniform(0.1, 0.22), rng.uniform(0.88, 0.96)))
        self._mix(self.points, 0.95 * step(0.45, -0.2, face + 0.3 * clouds(rng, 7, len(e.x))))
        self.nose = self.points * 0.5

    def _shirt(self, e: Easel, rng: np.random.Generator) -> None:
        flare, start = rng.uniform(0.3, 0.55), rng.uniform(-0.05, 0.5)
        edge = np.abs(e.x) - 0.16 - flare * np.maximum(e.y + start, 0) + 0.12 * clouds(rng, 7, len(e.x))
        self._mix(hsv(rng.random(), 0.1, rng.uniform(0.1, 0.2)))
        self._mix(WHITE, step(0.04, -0.04, edge) * step(-0.75, -0.55, e.y))

    def _plain(self, kind: str, rng: np.random.Generator) -> None:
        low, high = {"black": (0.1, 0.2), "white": (0.92, 0.98), "grey": (0.42, 0.66)}[kind]
        white = kind == "white"
        tint = rng.uniform(0, 0.08) if white else rng.uniform(0.08, 0.2)
        self._mix(hsv(0.1 if white else 0.6, tint, rng.uniform(low, high)))
        self.nose = self.nose * {"black": 0.3, "white": 1.0, "grey": 0.5}[kind]
        self.white_muzzle = pick(rng, 0.0, 0.25) if kind == "grey" else 0.0

    def _patches(self, kind: str, e: Easel, rng: np.random.Generator) -> None:
        one, two = clouds(rng, 5, len(e.x)), clouds(rng, 6, len(e.x))
        ginger = hsv(rng.uniform(0.05, 0.08), rng.uniform(0.65, 0.8), rng.uniform(0.75, 0.92))
        black = hsv(rng.uniform(0, 0.1), 0.25, rng.uniform(0.12, 0.22))
        if kind == "calico":
            side, above = pick(rng, -1, 1), step(0.15, -0.3, e.y + 0.5 * (clouds(rng, 7, len(e.x)) - 0.5))
            self._mix(WHITE)
            self._mix(ginger, step(-0.05, 0.05, side * e.x + 0.8 * (one - 0.5)) * above)
            self._mix(black, step(-0.05, 0.05, -side * e.x - 0.25 + 0.8 * (two - 0.5)) * above)
        elif kind == "tortoiseshell":
            self._mix(black)
            self._mix(ginger * 0.9, 0.9 * step(0.5, 0.6, 0.6 * one + 0.4 * clouds(rng, 22, len(e.x))))
        else:
            leopard = rng.random() < 0.5
            self._mix(hsv(rng.uniform(0.08, 0.11), 0.4, 0.85) if leopard else WHITE)
            self._mix(hsv(0.07, 0.5, 0.3) if leopard else black,
                      0.9 * step(0.58, 0.66, clouds(rng, 11, len(e.x))))
            self.white_muzzle = 0.8
