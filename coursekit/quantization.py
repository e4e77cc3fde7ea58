"""What is left of a network when its numbers have eight bits: first pretended, then in real integers.

To quantise is to keep, of a number x, the integer round(x / scale). Pretending does it and multiplies by the
scale again, so that any machine that can run a network can say how good its integers would be.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from coursekit.nets.filtering import REACH, SIZE, TAPS
from coursekit.nets.kpn import KPN, Head, Level

MOST = {"int8": 127, "int6": 31, "int4": 7}  # the largest integer of each kind
FP8 = torch.float8_e4m3fn  # 4 bits of exponent, 3 of mantissa: two digits, of any size from 0.002 to 448
LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
EXACT = ("drift", "time")  # parts of a KPN that `drift` speaks for: the drift must be told the time exactly


def fake_quantized(x: Tensor, scale: Tensor | float, most: int = 127) -> Tensor:
    """The nearest number that an integer could have kept: scale * n, with -most - 1 <= n <= most.

    Halves go to the even n, and what is out of reach to the nearest end. Rounding has no slope anywhere, so the
    gradient pretends that it was not there: 1 for what rounds to an n within reach, 0 beyond (straight-through,
    Jacob et al. 2018).
    """
    n = x / scale
    integer = n.round().clamp(-most - 1, most)
    n = n.clamp(-most - 1.5, most + 0.5)
    return (n + (integer - n).detach()) * scale


def on_grid(kernels: Tensor, grid: str) -> Tensor:
    """Kernels in [-1, 1] on the fixed grid k / 127, k / 31 or k / 7 ("int8", "int6", "int4"), or as "fp8" keeps them.

    No range has to be learned: tanh ends at 1. The gradient passes straight through. fp8 is e4m3, and not on mps.
    """
    if grid not in (*MOST, "fp8"):
        raise ValueError(f"the grid is one of {[*MOST, 'fp8']}, got {grid!r}")
    if grid == "fp8":
        return kernels + (kernels.detach().to(FP8).to(kernels.dtype) - kernels).detach()
    return fake_quantized(kernels * MOST[grid], 1, MOST[grid]) / MOST[grid]


def quantized(net: KPN, weights: str | None = "int8", activations: str | None = "int8",
              kernels: str | None = "int8", drift: str | None = None) -> KPN:
    """A copy of a KPN that computes as if it had few bits; `net` stays as it is, and None leaves a part as it is.

    weights       of each convolution and linear layer: "int8", one scale for each output channel, that of its
                  largest weight. The float weights are kept behind them, so the copy can be trained on.
    activations   what enters those layers: "int8", one scale each, learned by `calibrate`, without which the
                  copy refuses to work. Norms, attention and the additions between layers stay in float.
    kernels       what the heads predict: "int8", "int6", "int4" or "fp8", see `on_grid`
    drift         weights and activations of the drift and of the time embedding that it shares with the
                  filters: "int8". By default they are not touched, and the drift is the same to the last bit.

    ValueError for other words, for what is no KPN or has no filters, for "linear" kernels, which have no bounds,
    and for a copy made here.
    """
    for what, word, known in (("weights", weights, ("int8",)), ("activations", activations, ("int8",)),
                              ("kernels", kernels, (*MOST, "fp8")), ("drift", drift, ("int8",))):
        if word is not None and word not in known:
            raise ValueError(f"{what} must be one of {list(known)} or None, got {word!r}")
    if not isinstance(net, KPN) or net.transformer is None:
        got = f"branches={net.config['branches']!r}" if isinstance(net, KPN) else f"a {type(net).__name__}"
        raise ValueError(f"only a KPN that filters can be quantised here, got {got}")
    if any(isinstance(module, Int8Weight | Int8Input | KernelGrid) for module in net.modules()):
        raise ValueError("this KPN is quantised already: quantise the network it was made from")
    if kernels and net.config["activation"] == "linear":
        raise ValueError(f"kernels of activation 'linear' have no bounds and fit no grid, got kernels={kernels!r}")
    few = copy.deepcopy(net)
    for name, module in list(few.named_modules()):
        if isinstance(module, LAYERS):
            exact = name.split(".")[0] in EXACT
            if drift if exact else weights:
                axis = 1 if isinstance(module, nn.ConvTranspose2d) else 0
                parametrize.register_parametrization(module, "weight", Int8Weight(axis))
            if drift if exact else activations:
                module.entering = Int8Input().to(module.weight.device)
                module.register_forward_pre_hook(_enter)
        elif isinstance(module, Head) and kernels:
            module.grid = KernelGrid(kernels)
            module.register_forward_hook(_round_kernels)
    return few


@torch.no_grad()
def calibrate(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], rate: float = 0.1) -> None:
    """Let a quantised network learn the ranges of its activations from a few batches (x_t, t).

    Each range is an average of the largest magnitudes, in which a batch weighs `rate` and the first one what is
    left. Meanwhile activations pass unrounded. The batches should have every t that the network will meet, since
    noise has a wider range than cats. Starts anew each time. ValueError without a batch or a range to learn.
    """
    ranges = [module for module in net.modules() if isinstance(module, Int8Input)]
    batches = list(batches)
    if not ranges or not batches or not 0 < rate <= 1:
        raise ValueError("to calibrate takes a network with quantised activations, a batch or more and a rate in "
                         f"(0, 1], got {len(ranges)} activations, {len(batches)} batches, rate = {rate}")
    for module in ranges:
        module.top.zero_()
        module.rate = rate
    try:
        for x_t, t in batches:
            net(x_t, t)
    finally:
        for module in ranges:
            module.rate = None


class Int8Weight(nn.Module):
    """A weight to its int8 grid: in each output channel (`axis`), 127 steps up to the largest and 127 down."""

    def __init__(self, axis: int):
        super().__init__()
        self.axis = axis

    def forward(self, weight: Tensor) -> Tensor:
        return fake_quantized(weight, self.scale(weight))

    def scale(self, weight: Tensor) -> Tensor:
        """One step of each channel, in a shape that divides the weight; a channel of zeros gets a tiny one."""
        others = [axis for axis in range(weight.ndim) if axis != self.axis]
        largest = weight.detach().abs().amax(others, keepdim=True)
        return (largest / MOST["int8"]).clamp(min=torch.finfo(weight.dtype).tiny)


class Int8Input(nn.Module):
    """What enters a layer to an int8 grid, whose end, `top`, is learned while `rate` is not None."""

    top: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.rate: float | None = None
        self.register_buffer("top", torch.zeros(()))  # 0: not learned yet

    def forward(self, x: Tensor) -> Tensor:
        if self.rate is None:
            return fake_quantized(x, self.scale())
        largest = x.abs().amax().to(self.top).clamp(min=torch.finfo(self.top.dtype).tiny)
        self.top.copy_(largest if self.top == 0 else self.top.lerp(largest, self.rate))
        return x

    def scale(self) -> Tensor:
        if not self.top > 0:
            raise ValueError("the ranges of the activations are not known yet: calibrate(net, batches) first")
        return self.top / MOST["int8"]


class KernelGrid(nn.Module):
    """Kernels to one of the grids of `on_grid`."""

    def __init__(self, grid: str):
        super().__init__()
        self.grid = grid

    def forward(self, kernels: Tensor) -> Tensor:
        return on_grid(kernels, self.grid)


def _enter(layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (layer.entering(args[0]), *args[1:])


def _round_kernels(head: Any, _: Any, level: Level) -> Level:
    return level._replace(kernels=head.grid(level.kernels))


def to_integers(x: Tensor, scale: Tensor | float) -> Tensor:
    """round(x / scale) as int8, halves to even and -128..127 at the ends: what `fake_quantized` pretends."""
    return (x / scale).round().clamp(-128, 127).to(torch.int8)


def filter_int8(x: Tensor, kernels: Tensor) -> Tensor:
    """`apply_kernels` in whole numbers: int8 images (b, c, h, w) and kernels (b, 25, h, w) to exact int32 sums.

    With x = to_integers(image, s) and kernels = to_integers(weights, 1 / 127) the filtered image is the sum times
    s / 127, which is `apply_kernels` of the two fakes but for float rounding, a few millionths.

    PyTorch has no product of int8 that adds up in int32, and widening every tap to integers of 32 bits takes half
    as long again as the float filter. So each tap is widened to float32: a sum of 25 products of at most 2^14
    stays below 2^24, where floats are exact in whole numbers. That is a quarter of the bytes, and on a CPU about
    the time of the float filter: what int8 saves in time, it saves on chips that multiply in int8.
    """
    b, _, h, w = x.shape if x.ndim == 4 else (0, 0, 0, 0)
    if x.dtype != torch.int8 or kernels.dtype != torch.int8 or kernels.shape != (b, TAPS, h, w) or x.numel() == 0:
        raise ValueError(f"int8 images (b, c, h, w) take int8 kernels (b, {TAPS}, h, w), got "
                         f"{x.dtype} {tuple(x.shape)} and {kernels.dtype} {tuple(kernels.shape)}")
    padded = F.pad(x.float(), (REACH,) * 4, mode="replicate")
    out = torch.zeros(x.shape, device=x.device)
    for tap in range(TAPS):
        dy, dx = divmod(tap, SIZE)
        out.addcmul_(padded[..., dy:dy + h, dx:dx + w], kernels[:, tap, None].float())
    return out.int()


def snr(signal: Tensor, noisy: Tensor) -> Tensor:
    """How loud a signal is against what was done to it, in dB, one value per image; infinite for the same image.

    10 log10(sum signal^2 / sum (signal - noisy)^2), for two tensors of one shape (b, ...). Six dB are a factor of
    two: what one bit more should bring.
    """
    if signal.shape != noisy.shape or signal.ndim < 2:
        raise ValueError(f"snr compares two batches of one shape (b, ...), got {tuple(signal.shape)} "
                         f"and {tuple(noisy.shape)}")
    power, error = (y.square().flatten(1).sum(1) for y in (signal, signal - noisy))
    return torch.where(error == 0, math.inf, 10 * torch.log10(power / error))


def stored_bytes(net: nn.Module) -> int:
    """Bytes of a network's numbers on disk: a quantised weight takes 1 and its scales 4 each, others what they take."""
    total = 0
    for module in net.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if isinstance(module, parametrize.ParametrizationList) and isinstance(grid := module[0], Int8Weight):
            total += sum(x.numel() + 4 * x.shape[grid.axis] for x in own)
        else:
            total += sum(x.numel() * x.element_size() for x in own)
    return total
