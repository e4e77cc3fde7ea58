"""A network that does not paint images: it predicts, for every pixel, how to filter the noisy one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coursekit.nets.blocks import TimeEmbedding, check_images, zeroed
from coursekit.nets.filtering import CENTRE, TAPS, apply_kernels, gaussian_upsample

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "small": {"width": 256, "depth": 6, "bottleneck": 64, "ffn": 8 / 3, "ups": (128, 96, 64),
              "drift_width": 16},
    "gpu": {"width": 512, "depth": 12, "bottleneck": 64, "ffn": 8 / 3, "ups": (256, 128, 64),
            "drift_width": 16},
}
KEPT = math.tanh(1.5)  # how much of its own pixel a new network's kernel keeps, 0.905
CENTRE_BIAS = {"tanh": 1.5, "linear": KEPT, "softmax": math.log((TAPS - 1) * KEPT / (1 - KEPT))}


class Level(NamedTuple):
    """What the network decided for one level of the pyramid, h x w pixels."""

    kernels: Tensor  # (b, 25, h, w); (b, 75, h, w), red first, where colours do not share one
    shape: Tensor  # (b, 3, h, w): (kx, ky, r) of the Gaussian that doubles the level below
    skip: Tensor  # (b, 1, h, w) in 0..1: how much of this level's own filtered image to keep
    tap: Tensor | None  # (b, c, h, w): the constant tap, a colour added to the filtered image


class Parts(NamedTuple):
    """The prediction taken apart: x0 = filtered + drift."""

    filtered: Tensor  # (b, c, h, w)
    drift: Tensor  # (b, c, h, w)
    kernels: list[Tensor]  # of each level, finest first


class KPN(nn.Module):
    """Noisy images (b, 3, h, w) and times (b,) in [0, 1], 0 clean and 1 noise, to the clean images.

    A transformer reads the image in patches and convolutions bring its tokens back up; at every size
    a head predicts 5 x 5 kernels. The noisy image is filtered and halved level by level on the way
    down, doubled by Gaussians and blended on the way up: see `pyramid`. A small U-Net, the drift,
    adds what no filter can make. After "Generating Cats with KPN Filtering" (2025), rebuilt.

    Height and width must be divisible by `.stride`. Positions are learned on the grid of a
    `size` x `size` image and stretched to others. A new network returns its input a little dimmed.

    width, depth, bottleneck, ffn    the transformer's: see `PatchTransformer`
    ups           channels of the maps, coarsest first; each doubles the one before; the patch is 2 ** len
    drift_width   channels of the drift network
    levels        how many of the finest maps filter; len(ups) + 1 filters at the tokens' size too
    activation    of the kernels: "tanh"; "softmax", convex, so no new colours; or "linear"
    branches      "both", or "filters" or "drift" alone
    constant_tap  levels that may add a colour to what they filtered: "none", "coarsest" or "all"
    shared_rgb    one kernel for all colours, or one for each
    drift_time    whether the drift is told the time
    """

    def __init__(self, width: int = 128, depth: int = 4, bottleneck: int = 32, ffn: float = 2,
                 ups: Sequence[int] = (64, 48, 32), drift_width: int = 12, levels: int = 3,
                 activation: str = "tanh", branches: str = "both", constant_tap: str = "none",
                 shared_rgb: bool = True, drift_time: bool = True, size: int = 64, in_channels: int = 3):
        super().__init__()
        self.config: dict[str, Any] = {
            "width": width, "depth": depth, "bottleneck": bottleneck, "ffn": ffn, "ups": list(ups),
            "drift_width": drift_width, "levels": levels, "activation": activation, "branches": branches,
            "constant_tap": constant_tap, "shared_rgb": shared_rgb, "drift_time": drift_time,
            "size": size, "in_channels": in_channels}
        _check_one_of("activation", activation, tuple(CENTRE_BIAS))
        _check_one_of("branches", branches, ("both", "filters", "drift"))
        _check_one_of("constant_tap", constant_tap, ("none", "coarsest", "all"))
        if not 1 <= levels <= len(ups) + 1:
            raise ValueError(f"levels must lie in 1..{len(ups) + 1} with {len(ups)} ups, got {levels}")
        patch = 2 ** len(ups)
        self.stride = max(patch, 2**levels)
        self.time = TimeEmbedding(64, width, T=1.0)
        self.transformer = self.drift = None
        if branches != "drift":
            self.transformer = PatchTransformer(in_channels, patch, width, depth, bottleneck, ffn, size)
            widths = [width, *ups]
            self.ups = nn.ModuleList(
                nn.Sequential(nn.ConvTranspose2d(a, b, 2, stride=2), Mix(b))
                for a, b in zip(widths, ups, strict=False))
            self.heads = nn.ModuleList(  # coarsest first
                Head(c, in_channels, 1 if shared_rgb else in_channels, activation,
                     tap=constant_tap == "all" or (constant_tap == "coarsest" and i == 0))
                for i, c in enumerate(widths[-levels:]))
        if branches != "filters":
            self.drift = Drift(in_channels, drift_width, width if drift_time else 0)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> KPN:
        """KPN.preset("tiny") has 0.92 M parameters, "small" 5.65 M, "gpu" 40.7 M; `changes` to any."""
        _check_one_of("the preset's name", name, tuple(PRESETS))
        return cls(**(PRESETS[name] | changes))

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        if label is not None:
            raise ValueError("a KPN takes no label")
        filtered, drift, _ = self.parts(x_t, t)
        return filtered + drift

    def parts(self, x_t: Tensor, t: Tensor) -> Parts:
        """The filtered image, the drift and the kernels; their sum is the prediction."""
        levels = self.levels(x_t, t)
        filtered = pyramid(x_t, levels) if levels else torch.zeros_like(x_t)
        drift = torch.zeros_like(x_t)
        if self.drift is not None:
            with _full_precision(x_t):
                drift = self.drift(x_t, self.time(t))
        return Parts(filtered, drift, [level.kernels for level in levels])

    def levels(self, x_t: Tensor, t: Tensor) -> list[Level]:
        """What to do at each level of the pyramid, finest first; [] if only the drift works."""
        check_images(x_t, self.config["in_channels"], self.stride)
        if t.shape != x_t.shape[:1] or not t.is_floating_point():
            raise ValueError(f"times must be floats in [0, 1], one for each of the {len(x_t)} images, "
                             f"got {t.dtype} of shape {tuple(t.shape)}")
        if self.transformer is None:
            return []
        maps = [self.transformer(x_t, self.time(t))]  # (b, width, h / 8, w / 8)
        for up in self.ups:
            maps.append(up(maps[-1]))
        maps = maps[-len(self.heads):]
        return [head(h) for head, h in zip(self.heads, maps, strict=True)][::-1]


def pyramid(x: Tensor, levels: Sequence[Level]) -> Tensor:
    """Filter x (b, c, h, w) as the levels, finest first, say.

    Down: filter, add the constant tap if there is one, halve by 2 x 2 means. Up: double with each
    level's Gaussians, and keep `skip` of its own filtered image.
    """
    with _full_precision(x):  # in bfloat16 a kernel would round each weight to 3 digits
        filtered = []
        for level in levels:
            y = _filter(x, level.kernels)
            filtered.append(y if level.tap is None else y + level.tap)
            x = F.avg_pool2d(filtered[-1], 2)
        for y, level in zip(filtered[::-1], levels[::-1], strict=True):
            x = torch.lerp(gaussian_upsample(x, level.shape), y, level.skip)
        return x


def _filter(x: Tensor, kernels: Tensor) -> Tensor:
    if kernels.shape[1] == TAPS:
        return apply_kernels(x, kernels)
    colours = x.flatten(0, 1)[:, None]  # (b * c, 1, h, w): each with its own kernels
    return apply_kernels(colours, kernels.unflatten(1, (-1, TAPS)).flatten(0, 1)).view_as(x)


class Head(nn.Module):
    """Features (b, c_in, h, w) to a Level.

    The last layer's weights start at zero and its bias says "keep your pixel": were the kernels all
    zero, so would be the filtered image, and no level below would ever see a gradient.
    """

    def __init__(self, c_in: int, c_out: int, kernels: int, activation: str, tap: bool):
        super().__init__()
        self.activation = activation
        self.sizes = [kernels * TAPS, 3, 1, c_out if tap else 0]
        self.mix = nn.Sequential(nn.Conv2d(c_in, 32, 1), Mix(32))
        self.out = zeroed(nn.Conv2d(32, sum(self.sizes), 1))
        bias = torch.zeros(sum(self.sizes))
        bias[CENTRE:kernels * TAPS:TAPS] = CENTRE_BIAS[activation]
        bias[kernels * TAPS + 3] = 1.0  # skip: keep 73 % of this level
        self.out.bias = nn.Parameter(bias)

    def forward(self, h: Tensor) -> Level:
        h = self.mix(h)
        with _full_precision(h):
            out = self.out(h.to(self.out.weight.dtype))
            kernel, shape, skip, tap = out.contiguous().split(self.sizes, dim=1)
            if self.activation == "tanh":
                kernel = kernel.tanh()
            elif self.activation == "softmax":
                kernel = kernel.unflatten(1, (-1, TAPS)).softmax(2).flatten(1, 2)
            sharpness, lean = shape.split([2, 1], dim=1)
            shape = torch.cat([4 * sharpness.sigmoid(), 0.95 * lean.tanh()], dim=1)
            return Level(kernel, shape, skip.sigmoid(), tap if tap.shape[1] else None)


class PatchTransformer(nn.Module):
    """Images to a map of tokens (b, width, h / patch, w / patch), each patch knowing all others.

    A patch of pixels passes a linear `bottleneck` on its way in (Li & He 2025); `ffn` is the
    feed-forward's inner width over the outer. The time scales, shifts and gates every block through
    one shared projection that starts at zero (adaLN-Zero, Peebles & Xie 2023), each adding its own offset.
    """

    def __init__(self, in_channels: int, patch: int, width: int, depth: int, bottleneck: int,
                 ffn: float, size: int):
        super().__init__()
        self.embed = nn.Sequential(
            nn.PixelUnshuffle(patch), nn.Conv2d(in_channels * patch**2, bottleneck, 1, bias=False),
            nn.Conv2d(bottleneck, width, 1))
        self.position = nn.Parameter(0.02 * torch.randn(1, width, size // patch, size // patch))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        for p in self.modulation.parameters():
            nn.init.zeros_(p)
        hidden = 16 * round(ffn * width / 16)
        heads = max(4, width // 64)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, hidden) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-6)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.embed(x)
        position: Tensor = self.position
        grid = h.shape[2:]
        if position.shape[2:] != grid:
            position = F.interpolate(position, size=grid, mode="bilinear")
        tokens = (h + position).flatten(2).transpose(1, 2)  # (b, n, width)
        modulation = self.modulation(emb)
        for block in self.blocks:
            tokens = block(tokens, modulation)
        return self.norm(tokens).transpose(1, 2).unflatten(2, grid)


class TransformerBlock(nn.Module):
    """Tokens look at each other, then each thinks for itself (SwiGLU); a new block changes nothing."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.RMSNorm(width, eps=1e-6, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.focus = nn.Parameter(torch.ones(width // heads))
        self.mix = nn.Linear(width, width, bias=False)
        self.expand = nn.Linear(width, 2 * hidden, bias=False)
        self.contract = nn.Linear(hidden, width, bias=False)
        self.offset = nn.Parameter(torch.zeros(6 * width))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        scale1, shift1, gate1, scale2, shift2, gate2 = (modulation + self.offset)[:, None].chunk(6, dim=2)
        x = x + gate1 * self.attend(self.norm(x) * (1 + scale1) + shift1)
        gate, value = self.expand(self.norm(x) * (1 + scale2) + shift2).chunk(2, dim=2)
        return x + gate2 * self.contract(F.silu(gate) * value)

    def attend(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (b, heads, n, d')
        q, k = (F.rms_norm(y, y.shape[-1:], eps=1e-6) for y in (q, k))  # or large logits drown bfloat16
        q, k = (q * self.focus).to(v.dtype), k.to(v.dtype)
        return self.mix(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))


class Mix(nn.Module):
    """A residual layer: each channel looks around 3 x 3, then all channels meet at each pixel."""

    def __init__(self, channels: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
            nn.Conv2d(channels, 2 * channels, 1), nn.SiLU(), nn.Conv2d(2 * channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class Drift(nn.Module):
    """A U-Net of a few thousand parameters, from noisy image to what the filters cannot make.

    The time (c_emb numbers; 0: not told) scales and shifts its first features. It starts silent.
    """

    def __init__(self, channels: int, width: int, c_emb: int):
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.scale_shift = nn.Linear(c_emb, 2 * width) if c_emb else None
        self.down = nn.ModuleList(nn.Conv2d(width, width, 3, stride=2, padding=1) for _ in range(3))
        self.up = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.out = zeroed(nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h, skips = self.stem(x), []
        if self.scale_shift is not None:
            scale, shift = self.scale_shift(F.silu(emb))[:, :, None, None].chunk(2, dim=1)
            h = h * (1 + scale) + shift
        for conv in self.down:
            skips.append(h)
            h = conv(F.silu(h))
        for conv in self.up:
            skip = skips.pop()
            h = skip + conv(F.interpolate(F.silu(h), size=skip.shape[2:], mode="nearest"))
        return self.out(F.silu(h))


def _full_precision(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


def _check_one_of(what: str, got: str, known: Sequence[str]) -> None:
    if got not in known:
        raise ValueError(f"{what} must be one of {list(known)}, got {got!r}")
