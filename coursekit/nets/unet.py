"""The course's own U-Net: the published shape, arranged so that two CPU cores can train it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coursekit.nets.blocks import (
    Downsample,
    ResBlock,
    TimeEmbedding,
    Upsample,
    check_images,
    check_labels,
    check_times,
    zeroed,
)


class UNet(nn.Module):
    """Images (b, c, h, w) and times (b,) to something like the images: eps, x_0 or v.

    The stem folds each 2 x 2 patch of pixels into channels, so the widest maps, where a U-Net spends
    most of its time, are a quarter of the size. Height and width must be divisible by
    `.stride` = patch * 2 ** (levels - 1).

    channels     of each level, finest first; multiples of 16 are fast on a CPU
    blocks       residual blocks per level, on the way down and again on the way up
    attention    levels (0 is the finest) whose blocks end in self-attention
    classes      number of labels (0: none). A label of -1, like label=None, means "no label"
    T            the last time the network will meet: 1000 steps, or 1.0 on the straight path
    """

    def __init__(self, in_channels: int = 1, channels: Sequence[int] = (48, 96), blocks: int = 2,
                 attention: Sequence[int] = (), classes: int = 0, dropout: float = 0.0,
                 patch: int = 2, T: float = 1000):
        super().__init__()
        self.config: dict[str, Any] = {
            "in_channels": in_channels, "channels": list(channels), "blocks": blocks,
            "attention": list(attention), "classes": classes, "dropout": dropout, "patch": patch, "T": T}
        if not channels or blocks < 1 or patch < 1 or classes < 0:
            raise ValueError("a U-Net needs a level or more, blocks and patch of at least 1, classes of "
                             f"at least 0, got channels {list(channels)}, blocks = {blocks}, "
                             f"patch = {patch}, classes = {classes}")
        if not set(attention) <= set(range(len(channels))):
            raise ValueError(f"attention names levels 0..{len(channels) - 1}, got {list(attention)}")
        self.stride = patch * 2 ** (len(channels) - 1)
        c_emb = 4 * channels[0]
        self.time = TimeEmbedding(channels[0], c_emb, T)
        self.label = nn.Embedding(classes + 1, c_emb) if classes else None

        def block(c_in: int, c_out: int, level: int) -> ResBlock:
            return ResBlock(c_in, c_out, c_emb, dropout, attention=level in attention)

        c = channels[0]
        self.stem = nn.Sequential(
            nn.PixelUnshuffle(patch), nn.Conv2d(in_channels * patch**2, c, 3, padding=1))
        self.down = nn.ModuleList()
        for level, width in enumerate(channels):
            if level > 0:
                self.down.append(Downsample(c, width))
            self.down.extend(block(width, width, level) for _ in range(blocks))
            c = width
        self.middle = block(c, c, len(channels) - 1)
        self.up = nn.ModuleList()
        for level, width in reversed(list(enumerate(channels))):
            self.up.extend(block(2 * width, width, level) for _ in range(blocks))
            if level > 0:
                self.up.append(Upsample(width, channels[level - 1]))
        self.head = nn.Sequential(
            nn.GroupNorm(8, channels[0]), nn.SiLU(),
            zeroed(nn.Conv2d(channels[0], in_channels * patch**2, 3, padding=1)),
            nn.PixelShuffle(patch))

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        check_images(x_t, self.config["in_channels"], self.stride)
        check_times(t, len(x_t))
        emb = self.time(t)
        if self.label is not None:
            emb = emb + self.label(check_labels(label, self.config["classes"], x_t) + 1)
        elif label is not None:
            raise ValueError("this network was built with classes=0 and takes no label")
        h, skips = self.stem(x_t), []
        for layer in self.down:
            h = layer(h, emb)
            if isinstance(layer, ResBlock):
                skips.append(h)
        h = self.middle(h, emb)
        for layer in self.up:
            if isinstance(layer, ResBlock):
                h = torch.cat([h, skips.pop()], dim=1)
            h = layer(h, emb)
        return self.head(h)
