"""A finished picture as a notebook shows it: its bytes, its alt text, its caption."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from PIL import Image, ImageFont
from torch import Tensor

Images = Tensor | Sequence[Tensor]

_PACK = np.array([1 << 16, 1 << 8, 1])  # red, green, blue -> one number


@dataclass(frozen=True, eq=False)
class Picture:
    """A finished picture and the words for a reader who cannot see it.

    JupyterLab and nbconvert drop the alt text of an image/png output (they read no metadata), so
    the picture goes out as an HTML figure with a real alt attribute. The image/png beside it, with
    the alt text in its metadata, serves what reads no HTML, such as PDF export and nbval's comparison;
    it is plainer, one pixel to a screen pixel in 64 colours, because both are stored.
    """

    png: bytes = field(repr=False)
    alt: str
    caption: str | None = None
    density: int = 1  # stored pixels to one screen pixel: 2 keeps thin lines and letters sharp
    animation: bytes | None = field(default=None, repr=False)  # an animated PNG; `png` is its end

    def __post_init__(self) -> None:
        if not isinstance(self.alt, str) or not self.alt.strip():
            raise ValueError(f"a picture needs alt text that says what it shows, got {self.alt!r}")

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) on the screen."""
        width, height = Image.open(io.BytesIO(self.png)).size
        return width // self.density, height // self.density

    def save(self, path: str | Path) -> Path:
        """Write a .png file (the animation where there is one) and return its path."""
        path = Path(path)
        if path.suffix.lower() != ".png":
            raise ValueError(f"pictures are saved as .png, got {path.name!r}")
        path.write_bytes(self.animation or self.png)
        return path

    def html(self) -> str:
        """A <figure> that needs no script and no other file."""
        width, height = self.size
        style = "background:#fff;max-width:100%;height:auto"
        if self.animation:
            style += ";image-rendering:pixelated"  # a page that removes this enlarges it smoothly
        image = (f'<img alt="{html.escape(self.alt)}" width="{width}" height="{height}" style="{style}" '
                 f'src="data:image/png;base64,{_base64(self.animation or self.png)}">')
        if self.animation:  # what moves by itself needs a way to make it stop (WCAG 2.2.2)
            image = f"<details open><summary>Animation (fold away to stop it)</summary>{image}</details>"
        words = f"<figcaption>{html.escape(self.caption)}</figcaption>" if self.caption else ""
        return f'<figure style="margin:0">\n{image}\n{words}</figure>'

    def _plain(self) -> bytes:
        image = Image.open(io.BytesIO(self.png)).convert("RGB")
        return png(image.resize(self.size, Image.Resampling.BOX), (64,))

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict, dict]:
        width, height = self.size
        data = {"text/html": self.html(), "image/png": _base64(self._plain()), "text/plain": self.alt}
        return data, {"image/png": {"alt": self.alt, "width": width, "height": height}}


def to_bytes(images: Images) -> np.ndarray:
    """(n, h, w, 3) uint8, or a ValueError that says what came instead of images."""
    if not isinstance(images, Tensor):
        shapes = {tuple(i.shape) for i in images}
        if len(shapes) != 1:
            raise ValueError(f"images must have one shape (c, h, w), got {sorted(shapes) or 'none'}")
        images = torch.stack(list(images))
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.numel():
        raise ValueError(f"images must be (n, c, h, w) with c = 1 or 3, got {tuple(images.shape)}")
    images = images.detach().cpu()
    if images.is_floating_point():
        if not bool(images.isfinite().all()):
            raise ValueError("images must be finite to be shown, got NaN or infinity among the pixels")
        if (largest := images.abs().max().item()) > 100:  # noise reaches 10 or so, bytes as floats 255
            raise ValueError(f"images run over [-1, 1], got values up to {largest:g}: are they bytes made floats?")
        images = ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be floats in [-1, 1] or uint8 in 0..255, got {images.dtype}")
    return images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()


def tiled(tiles: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """One picture (h, w, 3) of all tiles, in rows, a little white between them."""
    n, h, w = tiles.shape[:3]
    sheet = np.full((-(-n // columns) * (h + gap) - gap, columns * (w + gap) - gap, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        row, column = divmod(i, columns)
        sheet[row * (h + gap):, column * (w + gap):][:h, :w] = tile
    return sheet


def png(image: Image.Image, palettes: Sequence[int] = (256, 128, 64)) -> bytes:
    """A palette PNG: exact if the first of `palettes` holds all colours, else the first under 100 KB."""
    pixels = np.asarray(image.convert("RGB"))
    exact = _exact(pixels, palettes[0])
    if exact is not None:
        return _packed(exact)
    for colours in palettes:  # a quarter of the pixels makes the palette in a quarter of the time
        palette = Image.new("P", (1, 1))
        palette.putpalette(_colours(Image.fromarray(pixels[::2, ::2]), colours))
        packed = _packed(image.convert("RGB").quantize(palette=palette, dither=Image.Dither.NONE))
        if len(packed) <= 100_000:
            break
    return packed


def _packed(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def _exact(pixels: np.ndarray, most: int) -> Image.Image | None:
    """The picture with a palette of just its own colours, if they are at most `most`."""
    colours = Image.fromarray(pixels).getcolors(most)
    if colours is None:
        return None
    own = np.array([colour for _, colour in colours], np.uint8)
    index = np.empty(1 << 24, np.uint8)  # Pillow finds the nearest colour in a palette only roughly
    index[own @ _PACK] = np.arange(len(own))
    painted = Image.fromarray(index[pixels @ _PACK]).convert("P")
    painted.putpalette(own.tobytes())
    return painted


def apng(sheets: list[Image.Image], fps: float, most: int = 200_000) -> bytes:
    """An animated PNG that plays for ever and rests on its last sheet, of `most` bytes if it can be.

    Sheets are left out evenly until it fits, and those that stay are shown for longer. There is one
    palette for all: three quarters of it suit the last sheet, which the eye rests on, a quarter all.
    """
    every = Image.fromarray(np.concatenate([np.asarray(s)[::2, ::2] for s in sheets]))
    palette = Image.new("P", (1, 1))
    palette.putpalette(_colours(sheets[-1], 96) + _colours(every, 32))
    painted = [s.quantize(palette=palette, dither=Image.Dither.NONE) for s in sheets]
    for stride in range(1, len(sheets)):
        first, *rest = painted[::-1][::stride][::-1]
        pace = round(1000 * stride / fps)
        file = io.BytesIO()
        first.save(file, "PNG", save_all=True, append_images=rest, optimize=True, loop=0,
                   duration=[pace] * len(rest) + [pace + 1500])
        if file.tell() <= most:
            break
    return file.getvalue()


def _colours(image: Image.Image, count: int) -> list[int]:
    """At most `count` colours that suit the picture, as Pillow's flat list; white stays white."""
    found = image.quantize(count, dither=Image.Dither.NONE).getpalette() or []
    colours = np.array(found[:3 * count]).reshape(-1, 3)
    colours[colours.min(axis=1) >= 248] = 255
    return colours.ravel().tolist()


@lru_cache
def font() -> ImageFont.FreeTypeFont:
    """The letters of every picture."""
    # matplotlib brings this font along, so a picture has the same letters on every machine
    return ImageFont.truetype(Path(mpl.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", 14)


def text_width(text: str) -> int:
    """Screen pixels that the longest line of a text takes."""
    return math.ceil(max(font().getlength(line) for line in text.split("\n")))


def text_height(texts: Sequence[str]) -> int:
    """Screen pixels that the tallest of some texts takes, none if there is none."""
    return max((18 * len(text.split("\n")) + 5 for text in texts), default=0)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
