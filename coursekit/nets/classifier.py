"""A small classifier of digits: the judge of generated ones, and the space their distances live in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from coursekit.nets.blocks import check_images


class Classifier(nn.Module):
    """Images (b, c, h, w) in [-1, 1] to logits (b, classes); `.features` is the layer below.

    Pairs of 3x3 convolutions, halving after each pair, then the mean over what is left. It
    normalises each image by itself, so an answer does not depend on the rest of the batch.
    """

    def __init__(self, in_channels: int = 1, classes: int = 10, channels: Sequence[int] = (16, 64, 128)):
        super().__init__()
        self.config: dict[str, Any] = {
            "in_channels": in_channels, "classes": classes, "channels": list(channels)}
        layers: list[nn.Module] = []
        c = in_channels
        for i, width in enumerate(channels):
            if i > 0:
                layers.append(nn.MaxPool2d(2))
            for c_in in (c, width):
                layers += [nn.Conv2d(c_in, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            c = width
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(c, classes)

    def features(self, x: Tensor) -> Tensor:
        """The penultimate layer, (b, channels[-1])."""
        check_images(x, self.config["in_channels"], stride=1)
        smallest = 2 ** (len(self.config["channels"]) - 1)
        if min(x.shape[2:]) < smallest:
            raise ValueError(f"the classifier halves too often for these images: it needs at least "
                             f"{smallest} pixels a side, got {tuple(x.shape[2:])}")
        return F.adaptive_avg_pool2d(self.trunk(x), 1).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))
