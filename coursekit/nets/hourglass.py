"""The hourglass of Deep Image Prior: a U-Net that is trained on one image, from noise, and then thrown away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Hourglass(nn.Module):
    """A fixed input z (b, in_channels, h, w) to an image (b, out_channels, h, w) in [0, 1] (Ulyanov et al. 2018).

    The default is the network the paper denoises with, layer for layer: 2,217,831 parameters. `Hourglass.preset`
    names the ones of its other experiments. Height and width must be multiples of `.stride` = 2 ** scales and at
    least twice that: the deepest map is padded by reflection and normalised over its own pixels, so it must have some.

    channels   of the scales, finest first, on the way down and again on the way up
    skip       channels of the branch that joins both sides of a scale, one number or one a scale; 0: no branch
    upsample   "bilinear" or "nearest"
    """

    def __init__(self, in_channels: int = 32, out_channels: int = 3, channels: Sequence[int] = (128,) * 5,
                 skip: int | Sequence[int] = 4, upsample: str = "bilinear"):
        super().__init__()
        skips = [skip] * len(channels) if isinstance(skip, int) else list(skip)
        self.config: dict[str, Any] = {"in_channels": in_channels, "out_channels": out_channels,
                                       "channels": list(channels), "skip": skips, "upsample": upsample}
        if not channels or min(in_channels, out_channels, *channels) < 1:
            raise ValueError("an hourglass needs a scale or more, and channels of at least 1, got channels "
                             f"{list(channels)} from {in_channels} to {out_channels}")
        if len(skips) != len(channels) or min(skips) < 0:
            raise ValueError(f"skip is one number of at least 0, or one for each of {len(channels)} scales, got {skip}")
        if upsample not in ("bilinear", "nearest"):
            raise ValueError(f'upsample is "bilinear" or "nearest", got {upsample!r}')
        self.stride = 2 ** len(channels)
        self.body = Scale(in_channels, list(channels), skips, upsample)
        self.head = nn.Sequential(nn.Conv2d(channels[0], out_channels, 1), nn.Sigmoid())

    @classmethod
    def preset(cls, name: str) -> Hourglass:
        """The networks of some of the paper's experiments by name, and `fast`, which two cores can afford."""
        if name not in PRESETS:
            raise ValueError(f"the presets are {', '.join(PRESETS)}, got {name!r}")
        return cls(**PRESETS[name])

    def forward(self, z: Tensor) -> Tensor:
        wanted = self.config["in_channels"]
        if z.ndim != 4 or z.shape[1] != wanted or not z.is_floating_point():
            raise ValueError(f"this network takes floats (b, {wanted}, h, w), got {z.dtype} of shape {tuple(z.shape)}")
        h, w = z.shape[2:]
        if h % self.stride or w % self.stride or min(h, w) < 2 * self.stride:
            raise ValueError(
                f"{len(self.config['channels'])} scales halve sizes that are multiples of {self.stride}, from "
                f"{2 * self.stride} on ({2 * self.stride}, {3 * self.stride}, {4 * self.stride}, ...), got {h} x {w}: "
                "crop the image, or build the network with fewer scales")
        return self.head(self.body(z))


class Scale(nn.Module):
    """One scale of the hourglass, with all the coarser ones inside it."""

    def __init__(self, c_in: int, channels: list[int], skips: list[int], upsample: str):
        super().__init__()
        c, n_skip = channels[0], skips[0]
        self.skip = normed(c_in, n_skip, 1) if n_skip else None
        self.down = nn.Sequential(normed(c_in, c, 3, stride=2), normed(c, c, 3))
        self.inside = Scale(c, channels[1:], skips[1:], upsample) if len(channels) > 1 else nn.Identity()
        smooth = {"align_corners": False} if upsample == "bilinear" else {}
        self.up = nn.Upsample(scale_factor=2, mode=upsample, **smooth)
        joined = n_skip + (channels[1] if len(channels) > 1 else c)
        self.join = nn.Sequential(nn.BatchNorm2d(joined), normed(joined, c, 3), normed(c, c, 1))

    def forward(self, x: Tensor) -> Tensor:
        deep = self.up(self.inside(self.down(x)))  # back at the height and width of x
        return self.join(deep if self.skip is None else torch.cat([self.skip(x), deep], dim=1))


def normed(c_in: int, c_out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """A convolution over reflected borders, batch normalisation and a leaky ReLU."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, padding_mode="reflect"),
        nn.BatchNorm2d(c_out), nn.LeakyReLU(0.2))


PRESETS: dict[str, dict[str, Any]] = {
    "denoise": {},
    "denoise-snail": {"in_channels": 3, "channels": (8, 16, 32, 64, 128), "skip": (0, 0, 0, 4, 4)},
    "super-resolve": {},
    "inpaint": {"skip": 128, "upsample": "nearest"},
    "inpaint-hole": {"in_channels": 2, "skip": 0, "upsample": "nearest"},
    "fast": {"channels": (32,) * 4},
}
