"""Images as tensors, and endless batches of them; where each data set comes from."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from coursekit import fetch, sources

STAND_IN_SIZE = {"cifar10": 32, "stl10": 96, "ffhq": 128, "cats": 64}  # of the pictures they stand in for
_told: dict = {}  # the stand-ins that were announced


class StandInWarning(UserWarning):
    """A data set could not be had, and another takes its place."""


@dataclass(frozen=True, eq=False)
class Images:
    """A data set held as one tensor, a byte for each channel of each pixel."""

    x: Tensor  # (n, c, h, w) uint8
    labels: Tensor | None  # (n,) int64
    name: str
    source: str  # where it came from, for captions and cards

    def __post_init__(self) -> None:
        if self.x.dtype != torch.uint8 or self.x.ndim != 4:
            raise ValueError(f"images must be uint8 (n, c, h, w), got {self.x.dtype} {tuple(self.x.shape)}")
        if len(self.x) == 0:
            raise ValueError(f"the data set {self.name!r} is empty, at least one image is wanted")
        if self.labels is not None and (self.labels.dtype != torch.int64 or self.labels.shape != self.x.shape[:1]):
            raise ValueError(f"labels must be {len(self.x)} int64, one per image, "
                             f"got {self.labels.dtype} {tuple(self.labels.shape)}")

    def __len__(self) -> int:
        return len(self.x)

    def to_float(self) -> Tensor:
        """All images as float32 in [-1, 1]."""
        return self.x.float() / 127.5 - 1

    def to(self, device: torch.device | str) -> Images:
        """The same images on another device."""
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, x=self.x.to(device), labels=labels)


class Batch(NamedTuple):
    """Some images, and what they show."""

    x: Tensor  # (b, c, h, w) float32 in [-1, 1]
    label: Tensor | None  # (b,) int64, or None where the data set has no labels


class Batches:
    """Endless shuffled batches; see `batches`."""

    def __init__(self, images: Images, batch_size: int, rng: torch.Generator | None = None,
                 flip: bool = False, shift: int = 0) -> None:
        if not 1 <= batch_size <= len(images):
            raise ValueError(f"batch_size must lie in 1..{len(images)}, as many as there are images, "
                             f"got {batch_size}")
        if shift < 0:
            raise ValueError(f"shift must be at least 0 pixels, got {shift}")
        self.images, self.batch_size, self.flip, self.shift = images, batch_size, flip, shift
        self.rng = torch.default_generator if rng is None else rng
        self._order = torch.empty(0, dtype=torch.long, device=images.x.device)  # what is left to show
        self._position = 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._position + self.batch_size > len(self._order):
            order = torch.randperm(len(self.images), generator=self.rng, device=self.rng.device)
            self._order, self._position = order.to(self.images.x.device), 0
        chosen = self._order[self._position:self._position + self.batch_size]
        self._position += self.batch_size
        x = self.images.x[chosen]
        if self.flip:
            x = torch.where(self._draw(2).bool()[:, None, None, None], x.flip(-1), x)
        if self.shift:
            x = self._shifted(x)
        labels = self.images.labels
        return Batch(x.float() / 127.5 - 1, None if labels is None else labels[chosen])

    def state_dict(self) -> dict[str, Any]:
        """Where the iterator stands: order of this epoch, position in it, random state."""
        return {"order": self._order.cpu().clone(), "position": self._position, "rng": self.rng.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from where `state_dict` was taken, bit for bit."""
        order = state["order"]
        if len(order) not in (0, len(self.images)):
            raise ValueError(f"this state is of a data set of {len(order)} images, "
                             f"this one has {len(self.images)}")
        if not 0 <= state["position"] <= len(order):
            raise ValueError(f"the position must lie in 0..{len(order)}, got {state['position']}")
        self._order = order.to(self.images.x.device)
        self._position = int(state["position"])
        self.rng.set_state(state["rng"].cpu())

    def _draw(self, high: int) -> Tensor:
        numbers = torch.randint(high, (self.batch_size,), generator=self.rng, device=self.rng.device)
        return numbers.to(self.images.x.device)

    def _shifted(self, x: Tensor) -> Tensor:
        """Each image moved by its own offset; what comes in from outside is black."""
        h, w = x.shape[-2:]
        rows = torch.arange(h, device=x.device) + self._draw(2 * self.shift + 1)[:, None]  # (b, h)
        cols = torch.arange(w, device=x.device) + self._draw(2 * self.shift + 1)[:, None]  # (b, w)
        padded = F.pad(x, [self.shift] * 4)
        which = torch.arange(len(x), device=x.device)[:, None, None]
        return padded[which, :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2).contiguous()


def batches(images: Images, batch_size: int, rng: torch.Generator | None = None, flip: bool = False,
            shift: int = 0) -> Batches:
    """Endless batches of `images`, shuffled anew each epoch, without a DataLoader.

    batch_size  every batch is full; what is left of an epoch is dropped, each time something else
    flip        mirror each image left to right with probability 1/2
    shift       move each image by up to so many pixels, down or across; black comes in from outside

    All draws come from `rng`, on its device, so the batches are the same wherever the images lie.
    """
    return Batches(images, batch_size, rng, flip, shift)


def available() -> dict[str, str]:
    """The names that `load` knows, and where each data set would come from now, without trying."""
    return {name: sources.where(name) for name in sources.READERS}


def load(name: str, split: str = "train", size: int | None = None, limit: int | None = None) -> Images:
    """A data set by name, from COURSEKIT_DATA first, else the cache or the network.

    name   mnist, fashion-mnist, cifar10, stl10, ffhq, cats or drawn-cats
    split  "train" or "test"; stl10 also has "unlabeled"
    size   resize to size x size, averaging where that shrinks
    limit  only the first so many images

    A set that cannot be had is replaced by one that can, with a StandInWarning, and `source` says so:
    digits for fashion-mnist, cats drawn by code for the others (the class of a drawn cat is its coat).
    """
    if name not in sources.READERS:
        near = difflib.get_close_matches(str(name).lower(), sources.READERS, n=3, cutoff=0.3) or sources.READERS
        raise ValueError(f"no data set is called {name!r}; the nearest are {', '.join(near)}")
    if split not in sources.splits(name):
        raise ValueError(f"{name} has the splits {', '.join(sources.splits(name))}, got {split!r}")
    for what, number in {"size": size, "limit": limit}.items():
        if number is not None and (not isinstance(number, int) or number < 1):
            raise ValueError(f"{what} must be a whole number, at least 1, got {number!r}")
    try:
        raw = sources.READERS[name](split, size, limit)
    except sources.Missing as why:
        raw = _stand_in(name, split, size, limit, str(why))
    x, labels = raw.x[:limit], None if raw.labels is None else raw.labels[:limit]
    unlabelled = name == "drawn-cats"  # so that they fit wherever photographs of cats do
    return Images(_resized(x, size), None if unlabelled else labels, name, raw.source)


def _stand_in(name: str, split: str, size: int | None, limit: int | None, why: str) -> sources.Raw:
    instead = "mnist" if name == "fashion-mnist" else "drawn-cats"
    side = size or STAND_IN_SIZE.get(name)
    if (named := os.environ.get("COURSEKIT_DATA")) and fetch.data_folder() is None:
        why += f", and COURSEKIT_DATA names {named}, which is not a folder"
    raw = sources.READERS[instead]("test" if split == "test" else "train", side, limit)
    # Without a place in a file the warning is one line long; the registry lets it speak once.
    warnings.warn_explicit(f"{name}: {why}; {instead} takes its place", StandInWarning, "coursekit.data", 0,
                           registry=_told)
    unlabelled = name in ("cats", "ffhq") or split == "unlabeled"
    return sources.Raw(raw.x, None if unlabelled else raw.labels, f"stand-in: {instead}, {raw.source}")


def _resized(x: Tensor, size: int | None) -> Tensor:
    if size is None or x.shape[-2:] == (size, size):
        return x
    return torch.cat([F.interpolate(part.float(), (size, size), mode="bicubic", antialias=True)
                      .round().clamp(0, 255).byte() for part in x.split(512)])
