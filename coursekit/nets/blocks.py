"""The parts that networks of the course share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TimeEmbedding(nn.Module):
    """A time (b,) as sines and cosines, then a small network (DDPM, appendix B).

    t is first rescaled to 0..1000 by 1000 / T: frequencies made for a thousand steps cannot tell two
    times in [0, 1] apart.
    """

    def __init__(self, width: int, c_emb: int, T: float = 1000):
        super().__init__()
        if width < 2 or width % 2 or not T > 0:
            raise ValueError(f"a time embedding needs an even width and T > 0, got width {width}, T = {T}")
        self.pairs, self.scale = width // 2, 1000 / T
        self.net = nn.Sequential(nn.Linear(width, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))

    @property
    def frequency(self) -> Tensor:
        """Angle per unit of time, (width / 2,), float32 whatever the network's weights are.

        A buffer would follow `net.bfloat16()`, and t = 1000 times a rounded frequency is another angle.
        """
        device = next(self.parameters()).device
        k = torch.arange(self.pairs, dtype=torch.float32, device=device) / self.pairs
        return torch.exp(-math.log(10_000) * k) * self.scale

    def forward(self, t: Tensor) -> Tensor:
        angle = t.float()[:, None] * self.frequency  # (b, width / 2)
        return self.net(torch.cat([angle.sin(), angle.cos()], dim=1).to(next(self.parameters()).dtype))


class ResBlock(nn.Module):
    """Two convolutions; the time embedding scales and shifts the features between them.

    The second convolution starts at zero, so a new block passes its input through.
    """

    def __init__(self, c_in: int, c_out: int, c_emb: int, dropout: float = 0.0,
                 attention: bool = False, groups: int = 8):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.scale_shift = nn.Linear(c_emb, 2 * c_out)
        self.norm2 = nn.GroupNorm(groups, c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = SelfAttention(c_out, groups) if attention else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (b, c_out, h, w)
        scale, shift = self.scale_shift(F.silu(emb))[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        h = self.skip(x) + self.conv2(self.dropout(F.silu(h)))
        return self.attention(h)


class SelfAttention(nn.Module):
    """Every pixel looks at every other, one head per 32 channels; starts as the identity."""

    def __init__(self, channels: int, groups: int = 8):
        super().__init__()
        self.heads = max(1, channels // 32)
        if channels % self.heads:
            raise ValueError(f"attention needs a multiple of 32 channels, got {channels}")
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).view(b, 3, self.heads, c // self.heads, h * w)
        q, k, v = qkv.transpose(-1, -2).unbind(1)  # each (b, heads, h w, c / heads)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(mixed.transpose(-1, -2).reshape(b, c, h, w))


class Downsample(nn.Module):
    """Halve height and width with a strided convolution."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, stride=2, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Double height and width: repeat pixels, then smooth with a convolution."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def zeroed(module: nn.Conv2d) -> nn.Conv2d:
    """The module with its weight and bias set to zero: a residual branch that starts silent."""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


def check_times(t: Tensor, n: int) -> None:
    """ValueError unless t holds one time for each of n images."""
    if not isinstance(t, Tensor) or t.shape != (n,):
        got = f"shape {tuple(t.shape)}" if isinstance(t, Tensor) else repr(t)
        raise ValueError(f"the network takes one time per image, a tensor of shape ({n},), got {got}")


def check_images(x: Tensor, channels: int, stride: int) -> None:
    """ValueError unless x is float (b, channels, h, w) with h and w divisible by the stride."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"the network takes float images in [-1, 1], got {got}")
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"the network takes images (b, {channels}, h, w), got {tuple(x.shape)}")
    if x.shape[2] % stride or x.shape[3] % stride or 0 in x.shape:
        raise ValueError(f"height and width must be positive multiples of the network's stride "
                         f"{stride}, got {tuple(x.shape[2:])} in {tuple(x.shape)}")


def check_labels(label: Tensor | None, classes: int, x_t: Tensor) -> Tensor:
    """Labels (b,) as int64 on the device of x_t, -1 for none; ValueError if they are not of `classes`."""
    if label is None:
        return torch.full((len(x_t),), -1, device=x_t.device)
    if not isinstance(label, Tensor) or label.is_floating_point() or label.dtype == torch.bool \
            or label.shape != (len(x_t),):
        got = f"{label.dtype} {tuple(label.shape)}" if isinstance(label, Tensor) else repr(label)
        raise ValueError(f"labels are integers of shape ({len(x_t)},), got {got}")
    label = label.long()
    if not bool(((label >= -1) & (label < classes)).all()):  # a GPU would only say "device-side assert"
        raise ValueError(f"labels must lie in 0..{classes - 1}, or be -1 for no label, "
                         f"got values from {label.min()} to {label.max()}")
    return label.to(x_t.device)
