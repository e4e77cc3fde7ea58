"""How good is an image, and how good is a set of them? One number per pair, one per two sets.

`psnr`, `ssim` and `lpips` compare images in pairs, (b, c, h, w) -> (b,). `frechet_distance` and
`kernel_distance` compare two sets by their features, (n, d) and (m, d) -> a scalar.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from coursekit.perceptual import alexnet_features, check_range, lpips

__all__ = ["bits_per_dim", "features", "frechet_distance", "kernel_distance", "lpips", "psnr", "ssim"]

BATCH = 256  # images that `features` shows its network at once


def psnr(x: Tensor, y: Tensor, *, peak: float) -> Tensor:
    """Peak signal-to-noise ratio in dB, one value per image; infinite for the same image.

    x, y: float (b, c, h, w). peak is the width of their range: 2 for [-1, 1], 1 for [0, 1], 255 for
    [0, 255]. A noisy image may overshoot it, but its reference must fit. Raises ValueError where
    neither does, for other shapes, integers, NaN or infinities, and for peak <= 0.
    """
    dtype, x, y = _pair(x, y, peak)
    return (10 * torch.log10(peak**2 / (x - y).square().flatten(1).mean(1))).to(dtype)


def ssim(x: Tensor, y: Tensor, *, peak: float) -> Tensor:
    """Structural similarity, one value per image, 1 for the same image (Wang et al. 2004, eq. 13).

    x, y: float (b, c, h, w), at least 11 pixels a side; peak and errors as in `psnr`. Means and
    variances come from an 11x11 Gaussian window (sigma 1.5) wherever it fits whole, and are averaged
    over places and channels. Brightness counts, so the same pair scores a little differently in [-1, 1]
    than in [0, 1]: published figures use [0, 1] or [0, 255].
    """
    dtype, x, y = _pair(x, y, peak)
    if min(x.shape[2:]) < 11:
        raise ValueError(f"ssim looks through an 11x11 window, got images of {tuple(x.shape[2:])} pixels")
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    # The spread does not know where zero is; around it, little is lost to cancellation.
    x, y = (image - image.mean((2, 3), keepdim=True) for image in (x, y))
    local_x, local_y = _window_mean(x), _window_mean(y)
    var_x = _window_mean(x * x) - local_x**2
    var_y = _window_mean(y * y) - local_y**2
    cov = _window_mean(x * y) - local_x * local_y
    brightness = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * cov + c2) / (var_x + var_y + c2)
    return (brightness * structure).mean((1, 2, 3)).to(dtype)


@torch.no_grad()
def frechet_distance(fx: Tensor, fy: Tensor) -> Tensor:
    """How far apart two sets would be if both were Gaussian (Heusel et al. 2017, eq. 6).

    |mean_x - mean_y|^2 + tr(A + B - 2 (A B)^(1/2)), A and B the covariances of the features
    fx (n, d) and fy (m, d), n, m >= 2. A scalar in the dtype of fx, computed in float64 on the CPU,
    without gradient. It is never negative and needs no full rank, so n < d works; but it falls as n
    grows, so compare only distances of equal n.

    Raises ValueError for anything but two finite float sets of one d with two features each.
    """
    x, y = _feature_sets(fx, fy)
    # With A = R'R and B = S'S the trace is the least |R - QS|^2 over rotations Q (Procrustes), and the
    # best Q falls out of an SVD of R S'. A sum of squares cannot go negative where A or B is singular.
    r, s = _root_of_covariance(x), _root_of_covariance(y)
    rows = max(len(r), len(s))
    r, s = (F.pad(root, (0, 0, 0, rows - len(root))) for root in (r, s))
    u, _, vh = torch.linalg.svd(r @ s.T)
    distance = (x.mean(0) - y.mean(0)).square().sum() + (r - u @ vh @ s).square().sum()
    return distance.to(fx.dtype).to(fx.device)


@torch.no_grad()
def kernel_distance(fx: Tensor, fy: Tensor) -> Tensor:
    """The squared distance between two sets in the space of cubic features (KID, Binkowski et al. 2018).

    The unbiased estimate of the squared MMD with k(a, b) = (a.b / d + 1)^3 over all pairs of features
    fx (n, d) and fy (m, d), n, m >= 2: its mean is 0 for two draws of one distribution, whatever n, so
    a single value may be negative. A scalar in the dtype of fx, computed in float64 on the CPU, without
    gradient. Errors as in `frechet_distance`.
    """
    x, y = _feature_sets(fx, fy)
    distance = _mean_kernel(x, x, pairs_with_itself=False) + _mean_kernel(y, y, pairs_with_itself=False)
    return (distance - 2 * _mean_kernel(x, y)).to(fx.dtype).to(fx.device)


def features(name: str) -> Callable[[Tensor], Tensor]:
    """A function that maps images (b, c, h, w) in [-1, 1] to features (b, d), in batches, no gradient.

    "mnist": the penultimate layer of the shipped digit classifier, grey images, d = 128.
    "alexnet": AlexNet's last convolution, averaged; grey or colour, at least 31 pixels, d = 256.
    The result has the images' dtype and device. Raises ValueError for an unknown name; the function it
    returns does for images of other channels or outside [-1, 1] (clamp samples that overshoot).
    """
    network: Callable[[Tensor], Tensor]
    if name == "alexnet":
        network = alexnet_features
    elif name == "mnist":
        network = _mnist_features()
    else:
        near = get_close_matches(str(name), ["alexnet", "mnist"], n=1, cutoff=0)
        raise ValueError(f"features are 'alexnet' or 'mnist', got {name!r}; did you mean {near[0]!r}?")

    @torch.no_grad()
    def extract(x: Tensor) -> Tensor:
        check_range(x=x)
        return torch.cat([network(batch) for batch in x.split(BATCH)])
    return extract


def perplexity(codes: Tensor) -> Tensor:
    """How many codes a set of them (any shape, int64, 0 or more) seems to use: exp of the entropy of their shares.

    K if all K are used equally often, 1 if all are the same.
    """
    if codes.dtype != torch.int64 or codes.numel() == 0:
        raise ValueError(f"codes are int64 and at least one, got {codes.dtype} of shape {tuple(codes.shape)}")
    share = codes.flatten().cpu().bincount().double() / codes.numel()
    return torch.special.entr(share).sum().exp()


def bits_per_dim(nats: Tensor, dims: int | Sequence[int]) -> Tensor:
    """Nats per image, as bits for each of its numbers: nats / (dims ln 2).

    dims: how many numbers an image has, or its shape, such as (3, 32, 32). ValueError unless positive.
    """
    count = dims if isinstance(dims, int) else math.prod(dims)
    if count < 1:
        raise ValueError(f"an image has at least one number, got dims = {dims}")
    return nats / (count * math.log(2))


def _pair(x: Tensor, y: Tensor, peak: float) -> tuple[torch.dtype, Tensor, Tensor]:
    """The dtype to answer in, and both images in float32 or better, checked."""
    if not 0 < peak < math.inf:
        raise ValueError(f"peak must be positive, the width of the images' range, got {peak}")
    for name, image in (("x", x), ("y", y)):
        if not isinstance(image, Tensor) or not image.is_floating_point():
            got = image.dtype if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(f"{name} must be float images (b, c, h, w), got {got}")
        if image.ndim != 4 or 0 in image.shape:
            raise ValueError(f"{name} must be images (b, c, h, w), none empty, got {tuple(image.shape)}")
        if not bool(image.isfinite().all()):
            raise ValueError(f"{name} must be finite, got NaN or infinity among its values")
    if x.shape != y.shape:
        raise ValueError(f"images are compared like with like, got {tuple(x.shape)} and {tuple(y.shape)}")
    dtype = torch.promote_types(x.dtype, y.dtype)
    x, y = (image.to(torch.promote_types(dtype, torch.float32)) for image in (x, y))
    spans = [(image.max() - image.min()).item() for image in (x, y)]
    if min(spans) > peak * (1 + 1e-3):  # room for rounding in half precision
        raise ValueError(f"neither image fits a peak of {peak:g}: from minimum to maximum they span "
                         f"{spans[0]:.4g} and {spans[1]:.4g}; peak is 2 for images in [-1, 1]")
    return dtype, x, y


def _window_mean(x: Tensor) -> Tensor:
    """Means under the Gaussian window: (b, c, h, w) -> (b, c, h - 10, w - 10)."""
    # Shifted sums, not a convolution: a GPU or autocast would round its inputs to ten or fewer bits,
    # and the variances are differences of such means.
    g = torch.exp(-torch.arange(-5, 6, dtype=torch.float64) ** 2 / (2 * 1.5**2))
    weights = (g / g.sum()).tolist()
    for axis in (2, 3):
        size = x.shape[axis] - 10
        x = torch.stack([w * x.narrow(axis, i, size) for i, w in enumerate(weights)]).sum(0)
    return x


def _feature_sets(fx: Tensor, fy: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets in float64 on the CPU, checked."""
    for name, f in (("fx", fx), ("fy", fy)):
        if not isinstance(f, Tensor) or not f.is_floating_point():
            got = f.dtype if isinstance(f, Tensor) else type(f).__name__
            raise ValueError(f"{name} must be float features (n, d), got {got}")
        if f.ndim != 2 or len(f) < 2 or f.shape[1] == 0:
            raise ValueError(f"{name} must be features (n, d) with n >= 2, got {tuple(f.shape)}")
        if not bool(f.isfinite().all()):
            raise ValueError(f"{name} must be finite, got NaN or infinity among its values")
    if fx.shape[1] != fy.shape[1]:
        raise ValueError(f"both sets need features of one length, got {tuple(fx.shape)}, {tuple(fy.shape)}")
    return fx.detach().cpu().double(), fy.detach().cpu().double()


def _root_of_covariance(f: Tensor) -> Tensor:
    """R (min(n, d), d) with R'R the covariance of the features (n, d), unbiased."""
    centred = (f - f.mean(0)) / math.sqrt(len(f) - 1)
    return centred if len(f) <= f.shape[1] else torch.linalg.qr(centred, mode="r").R


def _mean_kernel(a: Tensor, b: Tensor, *, pairs_with_itself: bool = True) -> Tensor:
    """The mean of k over all pairs of rows, or over the pairs i != j of one set; 500 rows at a time."""
    total = torch.stack([((rows @ b.T / b.shape[1] + 1) ** 3).sum() for rows in a.split(500)]).sum()
    if pairs_with_itself:
        return total / (len(a) * len(b))
    itself = ((a.square().sum(1) / a.shape[1] + 1) ** 3).sum()
    return (total - itself) / (len(a) * (len(a) - 1))


def _mnist_features() -> Callable[[Tensor], Tensor]:
    from coursekit.checkpoints import pretrained

    classifier: Any = pretrained("mnist-classifier")

    def network(x: Tensor) -> Tensor:
        found: Tensor = classifier.to(x.device).features(x.float())
        return found.to(x.dtype)
    return network
