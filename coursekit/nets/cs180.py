"""The U-Net of Berkeley's CS180, project 5, block by block under its published names.

Its parameter counts are the published ones: 7,891,073 at hidden = 128, 7,974,145 with time and 8,060,673
with time and classes. The widest maps keep every pixel, which is why it is slow: see nets.UNet.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coursekit.nets.blocks import check_images, check_labels, check_times


class Conv(nn.Sequential):
    """Change the number of channels, keep the size: (b, c_in, h, w) -> (b, c_out, h, w)."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__(nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.GELU())


class DownConv(nn.Sequential):
    """Halve the size: (b, c_in, h, w) -> (b, c_out, h / 2, w / 2)."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__(nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), nn.BatchNorm2d(c_out), nn.GELU())


class UpConv(nn.Sequential):
    """Double the size: (b, c_in, h, w) -> (b, c_out, 2 h, 2 w)."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__(nn.ConvTranspose2d(c_in, c_out, 4, stride=2, padding=1),
                         nn.BatchNorm2d(c_out), nn.GELU())


class Flatten(nn.Sequential):
    """Average a 7 x 7 map to one pixel: (b, c, 7, 7) -> (b, c, 1, 1)."""

    def __init__(self) -> None:
        super().__init__(nn.AvgPool2d(7), nn.GELU())


class Unflatten(nn.Sequential):
    """Spread one pixel over a 7 x 7 map: (b, c, 1, 1) -> (b, c, 7, 7)."""

    def __init__(self, channels: int):
        super().__init__(nn.ConvTranspose2d(channels, channels, 7), nn.BatchNorm2d(channels), nn.GELU())


class ConvBlock(nn.Sequential):
    """Conv, twice."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__(Conv(c_in, c_out), Conv(c_out, c_out))


class DownBlock(nn.Sequential):
    """DownConv, then ConvBlock."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__(DownConv(c_in, c_out), ConvBlock(c_out, c_out))


class UpBlock(nn.Sequential):
    """UpConv, then ConvBlock."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__(UpConv(c_in, c_out), ConvBlock(c_out, c_out))


class FCBlock(nn.Sequential):
    """A condition (b, n) as one number per channel: (b, c_out, 1, 1). No activation at the end."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__(nn.Linear(c_in, c_out), nn.GELU(), nn.Linear(c_out, c_out),
                         nn.Unflatten(1, (c_out, 1, 1)))


class Cs180UNet(nn.Module):
    """Grey images (b, 1, 28, 28) to one answer per pixel: x_0, eps, v or a velocity, as the loss decides.

    hidden      D, the channels of the finest level; published: 128 for one noise level, 64 with time
    time        whether the network is told t. If not, it is blind to the noise level and a t is ignored
    classes     number of labels (0: none), given as one-hot; a label of -1, like label=None, is all zeros
    T           the last time the network will meet: t / T is what it sees. 300 as published, 1.0 on the
                straight path
    modulation  what time does to the features: "add" as in the diffusion year of the project, "multiply"
                as in the flow-matching year. With classes both years write c * features + t

    Batch normalisation makes images of a batch depend on each other until `.eval()`: sample in eval mode.
    """

    def __init__(self, hidden: int, time: bool = False, classes: int = 0, T: float = 300,
                 modulation: str = "add"):
        super().__init__()
        if hidden < 1 or classes < 0 or not T > 0 or modulation not in ("add", "multiply"):
            raise ValueError('the network needs hidden >= 1, classes >= 0, T > 0 and a modulation "add" or '
                             f'"multiply", got {hidden}, {classes}, {T}, {modulation!r}')
        if classes and not time:
            raise ValueError(f"a network with classes is told the time as well: pass time=True with "
                             f"classes = {classes}")
        D = hidden
        self.config: dict[str, Any] = {"hidden": hidden, "time": time, "classes": classes, "T": T,
                                       "modulation": modulation}
        self.start = ConvBlock(1, D)
        self.down1 = DownBlock(D, D)
        self.down2 = DownBlock(D, 2 * D)
        self.flatten = Flatten()
        self.unflatten = Unflatten(2 * D)
        self.up1 = UpBlock(4 * D, D)
        self.up2 = UpBlock(2 * D, D)
        self.end = ConvBlock(2 * D, D)
        self.out = nn.Conv2d(D, 1, 3, padding=1)
        if time:
            self.time1, self.time2 = FCBlock(1, 2 * D), FCBlock(1, D)
        if classes:
            self.class1, self.class2 = FCBlock(classes, 2 * D), FCBlock(classes, D)

    def forward(self, x_t: Tensor, t: Tensor | None = None, label: Tensor | None = None) -> Tensor:
        check_images(x_t, 1, 1)
        if x_t.shape[2:] != (28, 28):
            raise ValueError(f"this network is made for 28 x 28 pixels, got {tuple(x_t.shape[2:])}")
        (scale1, shift1), (scale2, shift2) = self._conditions(x_t, t, label)
        h0 = self.start(x_t)  # (b, D, 28, 28)
        h1 = self.down1(h0)  # (b, D, 14, 14)
        h2 = self.down2(h1)  # (b, 2 D, 7, 7)
        h = self.unflatten(self.flatten(h2))  # (b, 2 D, 7, 7), by way of one pixel
        h = self.up1(torch.cat([scale1 * h + shift1, h2], dim=1))  # (b, D, 14, 14)
        h = self.up2(torch.cat([scale2 * h + shift2, h1], dim=1))  # (b, D, 28, 28)
        return self.out(self.end(torch.cat([h, h0], dim=1)))

    def _conditions(self, x_t: Tensor, t: Tensor | None, label: Tensor | None) -> list[tuple[Any, Any]]:
        """(factor, summand) for the output of `unflatten` and for that of `up1`."""
        classes, T = self.config["classes"], self.config["T"]
        if label is not None and not classes:
            raise ValueError("this network was built with classes=0 and takes no label")
        if not self.config["time"]:
            return [(1, 0), (1, 0)]
        if t is None:
            raise ValueError("this network was built with time=True: call it as model(x_t, t)")
        check_times(t, len(x_t))
        when = (t.to(torch.float64 if x_t.dtype == torch.float64 else torch.float32) / T).to(x_t)[:, None]
        times = [self.time1(when), self.time2(when)]
        if classes:
            index = check_labels(label, classes, x_t) + 1
            wanted = F.one_hot(index, classes + 1)[:, 1:].to(x_t)  # (b, classes), zeros for "no label"
            return list(zip([self.class1(wanted), self.class2(wanted)], times, strict=True))
        return [(1, shift) if self.config["modulation"] == "add" else (shift, 0) for shift in times]
