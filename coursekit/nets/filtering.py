"""Filters that differ at every pixel: 5 x 5 kernels applied, and a Gaussian that doubles an image.

Arithmetic is not the cost here, memory traffic is. `unfold` writes all 25 neighbours of every pixel
to memory; 25 shifted multiply-adds read them from one padded image, where they already are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

SIZE, REACH = 5, 2  # a kernel is SIZE x SIZE and reaches REACH pixels each way
TAPS = SIZE**2
CENTRE = TAPS // 2


def apply_kernels(x: Tensor, kernels: Tensor) -> Tensor:
    """Each output pixel is a weighted sum of the 5 x 5 pixels around it, with weights of its own.

    x (b, c, h, w), kernels (b, 25, h, w) -> (b, c, h, w), in the wider of the two dtypes. Taps run
    row by row, so tap 0 looks up and left and tap 12 is the pixel itself; all channels share the
    kernel. Beyond the border the nearest pixel is repeated: with zeros there, pictures get dark
    edges. Nothing is normalised. ValueError for shapes that do not belong together.
    """
    b, _, h, w = x.shape if x.ndim == 4 else (0, 0, 0, 0)
    if kernels.shape != (b, TAPS, h, w) or x.numel() == 0:
        raise ValueError(f"images (b, c, h, w) take kernels (b, {TAPS}, h, w), "
                         f"got {tuple(x.shape)} and {tuple(kernels.shape)}")
    dtype = torch.promote_types(x.dtype, kernels.dtype)
    x, kernels = x.to(dtype), kernels.to(dtype)
    if torch.compiler.is_compiling():  # the compiler fuses the plain sum, and its backward, by itself
        return _shifted_sum(_padded(x), kernels)
    out: Tensor = _ApplyKernels.apply(x, kernels)
    return out


def _padded(x: Tensor) -> Tensor:
    return F.pad(x, (REACH,) * 4, mode="replicate")


def _shifted(padded: Tensor, tap: int, h: int, w: int) -> Tensor:
    """The view of the padded image (b, c, h + 4, w + 4) that tap number `tap` looks at, (b, c, h, w)."""
    dy, dx = divmod(tap, SIZE)
    return padded[..., dy:dy + h, dx:dx + w]


def _shifted_sum(padded: Tensor, kernels: Tensor) -> Tensor:
    h, w = kernels.shape[-2:]
    weights = kernels.unsqueeze(2).unbind(1)  # 25 of (b, 1, h, w)
    out = _shifted(padded, 0, h, w) * weights[0]
    for tap in range(1, TAPS):
        out = torch.addcmul(out, _shifted(padded, tap, h, w), weights[tap])
    return out


class _ApplyKernels(torch.autograd.Function):
    """The same sum in place, with a backward of the same shape.

    Autograd's own backward of a slice writes a padded image of zeros, 25 times over.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Tensor) -> Tensor:
        padded, (h, w) = _padded(x), kernels.shape[-2:]
        out = torch.zeros_like(x, memory_format=torch.contiguous_format)
        for tap in range(TAPS):
            out.addcmul_(_shifted(padded, tap, h, w), kernels[:, tap, None])
        ctx.save_for_backward(padded, kernels)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        padded, kernels = ctx.saved_tensors
        h, w = kernels.shape[-2:]
        grad_x = grad_kernels = None
        if ctx.needs_input_grad[1]:  # of tap k: sum over channels of grad times what tap k saw
            grad_kernels = torch.empty_like(kernels, memory_format=torch.contiguous_format)
            for tap in range(TAPS):
                seen, into = _shifted(padded, tap, h, w), grad_kernels[:, tap]
                torch.mul(grad[:, 0], seen[:, 0], out=into)
                for channel in range(1, grad.shape[1]):
                    into.addcmul_(grad[:, channel], seen[:, channel])
        if ctx.needs_input_grad[0]:  # what each tap took is given back where it was taken
            onto = torch.zeros_like(padded)
            for tap in range(TAPS):
                _shifted(onto, tap, h, w).addcmul_(grad, kernels[:, tap, None])
            grad_x = _folded(onto)
        return grad_x, grad_kernels


def _folded(padded: Tensor) -> Tensor:
    """Backward of replicate padding: the border's gradient belongs to the pixels it repeated."""
    padded[..., REACH, :] += padded[..., :REACH, :].sum(-2)
    padded[..., -REACH - 1, :] += padded[..., -REACH:, :].sum(-2)
    padded[..., REACH] += padded[..., :REACH].sum(-1)
    padded[..., -REACH - 1] += padded[..., -REACH:].sum(-1)
    return padded[..., REACH:-REACH, REACH:-REACH]


def gaussian_upsample(x: Tensor, shape: Tensor) -> Tensor:
    """Twice the height and width; each new pixel is a Gaussian-weighted mean of 25 old ones.

    x (b, c, h, w) and shape (b, 3, 2h, 2w), the numbers (kx, ky, r) of each new pixel's Gaussian:
    sharpness across and down, in 1 / old pixels, and -1 < r < 1, how far it leans. An old pixel at
    distance d weighs exp(-2 d' L d) with L = [[kx^2, r kx ky], [r kx ky, ky^2]] (the parameterisation
    of Wronski 2021), normalised to sum 1. det L = kx^2 ky^2 (1 - r^2) is never negative.

    New pixels come in 4 phases, the quarters of an old pixel, and the log-weights of each phase are a
    fixed linear map of (kx^2, ky^2, r kx ky): so this is that map, a softmax, and `apply_kernels`.
    """
    b, c, h, w = x.shape if x.ndim == 4 else (0, 0, 0, 0)
    if shape.shape != (b, 3, 2 * h, 2 * w):
        raise ValueError(f"to double images (b, c, h, w) give shapes (b, 3, 2h, 2w), "
                         f"got {tuple(x.shape)} and {tuple(shape.shape)}")
    kx, ky, r = shape.unbind(1)
    precision = F.pixel_unshuffle(torch.stack([kx * kx, ky * ky, r * kx * ky], 1), 2)  # (b, 3 * 4, h, w)
    log_weights = torch.einsum("ipk,bipyx->bpkyx", _log_weight_map(shape), precision.view(b, 3, 4, h, w))
    weights = log_weights.softmax(2).flatten(0, 1)  # (b * 4, 25, h, w)
    phases = apply_kernels(x.repeat_interleave(4, dim=0), weights)
    return F.pixel_shuffle(phases.view(b, 4, c, h, w).transpose(1, 2).flatten(1, 2), 2)


def _log_weight_map(like: Tensor) -> Tensor:
    """(3, 4 phases, 25 taps), constant: (kx^2, ky^2, r kx ky) @ map = log-weights -2 d' L d.

    The centre of a new pixel lies a quarter of an old pixel before or after its old pixel's centre.
    """
    phase = torch.arange(2, device=like.device, dtype=like.dtype) / 2 - 0.25
    tap = torch.arange(-REACH, REACH + 1, device=like.device, dtype=like.dtype)
    d = phase[:, None] - tap  # (2 phases, 5 taps), in old pixels
    dy, dx = d.view(2, 1, SIZE, 1), d.view(1, 2, 1, SIZE)
    terms = torch.broadcast_tensors(dx * dx, dy * dy, 2 * dx * dy)
    return -2 * torch.stack(terms).reshape(3, 4, TAPS)
