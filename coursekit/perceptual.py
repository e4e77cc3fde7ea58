"""LPIPS: how different two images look, measured by a network that has seen a million photographs."""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from safetensors.torch import load
from torch import Tensor

from coursekit.fetch import shipped

WEIGHTS = "alexnet_lpips.safetensors"  # made by tools/convert_alexnet.py, its card lies beside it
SHA256 = "34743c1d4e6d0597fa8782d1f2fbb52f7da254702ef13cfd5ffab722830cd4fc"
SMALLEST = 31  # pixels: 31 -> 7 -> 3 -> 1, what is left after the first stride and the two poolings

# The mean and deviation of ImageNet's colours, moved from [0, 1] to [-1, 1], as LPIPS rounds them.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


def lpips(x: Tensor, y: Tensor) -> Tensor:
    """How far apart two images look, 0 for the same image (Zhang et al. 2018, eq. 1, version 0.1, AlexNet).

    x, y: (b, 3, h, w) in [-1, 1], at least 31 pixels a side; grey images (b, 1, h, w) are repeated to
    three channels. Returns (b,), differentiable in both. Half-precision images are compared in float32,
    also under autocast, because the distance is a difference of nearly equal numbers.

    Raises ValueError for other shapes, values outside [-1, 1] or NaN. Images in [0, 1] cannot be told
    from dark ones in [-1, 1]: that mistake stays yours.
    """
    _check_images(x=x, y=y)
    if x.shape != y.shape:
        raise ValueError(f"lpips compares like with like, got {tuple(x.shape)} and {tuple(y.shape)}")
    both = torch.cat([x, y])
    with torch.autocast(both.device.type, enabled=False):
        distance = torch.zeros(len(x), device=both.device)
        for i, layer in enumerate(_layers(both), start=1):
            fx, fy = F.normalize(layer, dim=1, eps=1e-10).chunk(2)  # unit length at every pixel
            head = _weights(layer.device, layer.dtype)[f"head{i}"]
            distance = distance + F.conv2d((fx - fy).square(), head).mean((1, 2, 3))
    return distance.to(both.dtype)


def alexnet_features(x: Tensor) -> Tensor:
    """AlexNet's last convolution after its ReLU, averaged over the pixels: (b, 256).

    x as in `lpips`, with the same errors; differentiable. Distances between sets of images live here
    (`coursekit.metrics.frechet_distance`); they are not Inception's, so no published FID compares.
    """
    _check_images(x=x)
    with torch.autocast(x.device.type, enabled=False):
        return _layers(x)[-1].mean((2, 3)).to(x.dtype)


def _layers(x: Tensor) -> list[Tensor]:
    """The outputs of AlexNet's five convolutions after their ReLUs, in float32 or better."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    w = _weights(x.device, x.dtype)
    shift, scale = (x.new_tensor(c).view(1, 3, 1, 1) for c in (SHIFT, SCALE))
    h = (x - shift) / scale  # a grey image broadcasts to three channels here
    layers = []
    for i, (stride, padding) in enumerate([(4, 2), (1, 2), (1, 1), (1, 1), (1, 1)], start=1):
        h = F.relu(F.conv2d(h, w[f"conv{i}.weight"], w[f"conv{i}.bias"], stride, padding))
        layers.append(h)
        if i <= 2:
            h = F.max_pool2d(h, 3, 2)
    return layers


@lru_cache(maxsize=4)
def _weights(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The shipped weights, read once for each device and dtype; ValueError for a cut or altered file."""
    path = shipped("weights", WEIGHTS)
    data = path.read_bytes()
    if (found := hashlib.sha256(data).hexdigest()) != SHA256:
        raise ValueError(f"{path} is cut or altered: its sha256 must begin {SHA256[:12]}, got {found[:12]} "
                         f"({len(data):,} bytes); restore it with git")
    with torch.inference_mode(False):  # tensors made in inference mode could never join a gradient later
        return {name: tensor.to(dtype).to(device) for name, tensor in load(data).items()}


def check_range(**named: Tensor) -> None:
    """ValueError, with the argument's name, unless it is a float tensor of values in [-1, 1]."""
    for name, x in named.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be float images in [-1, 1], got {got}")
        if x.numel() == 0:
            raise ValueError(f"{name} must hold at least one image, got shape {tuple(x.shape)}")
        low, high = (value.item() for value in x.detach().aminmax())
        if math.isnan(low):
            raise ValueError(f"{name} must be images in [-1, 1], got NaN among its values")
        if low < -1 - 1e-3 or high > 1 + 1e-3:
            raise ValueError(f"{name} must be images in [-1, 1], got values from {low:.4g} to {high:.4g}: "
                             "rescale another range, clamp what overshoots")


def _check_images(**named: Tensor) -> None:
    check_range(**named)
    for name, x in named.items():
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise ValueError(f"{name} must be images (b, 3, h, w), or grey ones (b, 1, h, w), "
                             f"got {tuple(x.shape)}")
        if min(x.shape[2:]) < SMALLEST:
            raise ValueError(f"AlexNet needs at least {SMALLEST}x{SMALLEST} pixels, got {tuple(x.shape[2:])} "
                             f"in {name}: enlarge the images first")
