"""Checks of notebook 12: a kernel for each pixel applied, read from a head, built into a pyramid, and rounded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from coursekit.checks.core import CheckFailed, call, compare, passed, rand, randn
from coursekit.nets.filtering import TAPS, apply_kernels, gaussian_upsample
from coursekit.nets.kpn import Level

Picturing = Callable[[Tensor, Tensor], Tensor]  # (x_t, t) -> images like x_t


def filter_pixels(fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    """fn(x (b, c, h, w), kernels (b, 25, h, w)) -> (b, c, h, w): 5 x 5 weighted sums, the border's pixels repeated."""
    x, kernels = randn(2, 3, 7, 8, seed=0), randn(2, TAPS, 7, 8, seed=1)
    grid = kernels.unflatten(1, (5, 5))
    right = apply_kernels(x, kernels)
    compare(call(fn, x, kernels), right, {
        "beyond the border you see zeros, and pictures get dark edges: F.pad(x, (2, 2, 2, 2), mode=\"replicate\")":
            _summed(x, kernels, "constant"),
        "beyond the border you see the picture in a mirror: mode=\"replicate\" repeats the nearest pixel":
            _summed(x, kernels, "reflect"),
        "beyond the border you see the opposite edge: mode=\"replicate\" repeats the nearest pixel":
            _summed(x, kernels, "circular"),
        "the kernels are applied transposed: taps run row by row, so tap k looks divmod(k, 5) = (down, across)":
            apply_kernels(x, grid.transpose(1, 2).flatten(1, 2)),
        "the kernels are applied back to front, as a convolution in the mathematician's sense does: tap 0 looks up "
        "and left": apply_kernels(x, kernels.flip(1)),
        "splatted: each pixel hands itself out with its kernel. Here it *gathers*: the kernel belongs to the pixel "
        "that is being written": _splatted(x, kernels),
        "splatted, by the mirrored kernel: here the kernel belongs to the pixel that is being written":
            _splatted(x, kernels.flip(1)),
        "the weights were divided by their sum: nothing is normalised here": apply_kernels(
            x, kernels / kernels.sum(1, keepdim=True)),
        "the weights were sent through a softmax: they are used as they come": apply_kernels(x, kernels.softmax(1)),
        "the weights were sent through tanh a second time: they are used as they come":
            apply_kernels(x, kernels.tanh()),
        "a mean of 25 products: a weighted *sum* was wanted": right / TAPS,
        "every pixel got the kernel of the first one: the kernels differ from pixel to pixel": apply_kernels(
            x, kernels[:, :, :1, :1].expand_as(kernels)),
        "every image got the kernels of the first one": apply_kernels(x, kernels[:1].expand_as(kernels)),
        "the kernels were not used at all": x,
    }, "these are not the sums over 5 x 5 of kernel times neighbour, tap 0 up and left and tap 12 the pixel itself",
        shape_hint=": does the padded picture still carry its margin of 2, or were the colours added up?")
    passed("25 weighted neighbours for each pixel, row by row, with the border's pixels repeated")


def read_head(fn: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> None:
    """fn(out (b, 29, h, w)) -> kernels (b, 25, ..) by tanh, shape (b, 3, ..) = (kx, ky, r), skip (b, 1, ..)."""
    out = 2 * randn(2, 29, 3, 4, seed=2)
    got = call(fn, out)
    if not isinstance(got, (tuple, list)) or len(got) != 3 or not all(isinstance(part, Tensor) for part in got):
        raise CheckFailed(f"three tensors were wanted, (kernels, shape, skip), got {type(got).__name__}")
    channels = tuple(part.shape[1] if part.ndim == 4 else 0 for part in got)
    if channels != (TAPS, 3, 1):
        raise CheckFailed(f"25 channels of kernels, 3 of shape, 1 of skip were wanted, in this order, got {channels}: "
                          "out.split([25, 3, 1], dim=1)")
    taps, shape, skip = out.split([TAPS, 3, 1], dim=1)
    sharp, lean = shape[:, :2], shape[:, 2:]
    compare(got[0], taps.tanh(), {
        "softmax where tanh was meant: such kernels only mix the colours that are there": taps.softmax(1),
        "sigmoid where tanh was meant: no weight can be negative then, and nothing is ever sharpened": taps.sigmoid(),
        "the kernels are as they came: tanh keeps each weight in [-1, 1]": taps,
        "tanh, and then divided by their sum: nothing is normalised": taps.tanh() / taps.tanh().sum(1, keepdim=True),
        "the kernels were cut out of the end of the 29 channels: they are the first 25": out[:, 4:].tanh(),
    }, "the kernels should be tanh of the first 25 channels")

    def whole(sharp: Tensor, lean: Tensor) -> Tensor:
        return torch.cat([sharp, lean], 1)
    k, r = 4 * sharp.sigmoid(), 0.95 * lean.tanh()
    compare(got[1], whole(k, r), {
        "the sharpness ends at 1: 4 times the sigmoid": whole(sharp.sigmoid(), r),
        "r reaches 1, where the matrix has no determinant left: 0.95 times tanh": whole(k, lean.tanh()),
        "r got a sigmoid: a Gaussian may lean to either side, 0.95 tanh": _any_of(
            whole(k, 0.95 * lean.sigmoid()), whole(k, lean.sigmoid())),
        "all three got 4 sigmoid: r is a lean between -1 and 1, 0.95 tanh": whole(k, 4 * lean.sigmoid()),
        "all three got 0.95 tanh: kx and ky are sharpnesses, 4 sigmoid": whole(0.95 * sharp.tanh(), r),
        "the sharpness is an exponential, which has no upper end: 4 sigmoid": whole(sharp.exp(), r),
        "the shape is as it came": shape,
    }, "the shape should be 4 sigmoid, 4 sigmoid, 0.95 tanh of channels 25, 26, 27")
    compare(got[2], skip.sigmoid(), {
        "skip is a share of two pictures, between 0 and 1: sigmoid, not tanh": skip.tanh(),
        "skip is as it came: a share lies between 0 and 1, sigmoid": skip,
        "1 - sigmoid: skip is the share of this level's *own* filtered picture": 1 - skip.sigmoid(),
    }, "skip should be the sigmoid of the last channel")
    passed("25 weights in [-1, 1], two sharpnesses in 0..4, a lean below 0.95, a share in 0..1")


def precision_matrix(fn: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """fn(kx, ky, r, each (n,)) -> (n, 2, 2): [[kx^2, r kx ky], [r kx ky, ky^2]], never indefinite."""
    kx, ky, r = 4 * rand(40, seed=3), 4 * rand(40, seed=4), 1.9 * rand(40, seed=5) - 0.95
    xy = r * kx * ky

    def matrix(a: Tensor, b: Tensor, d: Tensor) -> Tensor:
        return torch.stack([torch.stack([a, b], -1), torch.stack([b, d], -1)], -2)
    right = matrix(kx * kx, xy, ky * ky)
    compare(call(fn, kx, ky, r), right, {
        "the last entry is kx ky and should be ky^2: the determinant is then kx^2 ky (kx - r^2 ky), and the matrix "
        "indefinite wherever r^2 ky > kx": matrix(kx * kx, xy, kx * ky),
        "the first entry is kx ky and should be kx^2: the matrix can become indefinite": matrix(kx * ky, xy, ky * ky),
        "the mixed entry is r alone: with small kx and ky the matrix becomes indefinite; r kx ky": matrix(
            kx * kx, r, ky * ky),
        "the mixed entry is counted twice here already: d' L d meets it on both sides": matrix(
            kx * kx, 2 * xy, ky * ky),
        "kx and ky are not squared: kx^2 and ky^2": _any_of(
            matrix(kx, xy, ky), matrix(kx, r * (kx * ky).sqrt(), ky), matrix(kx, r, ky)),
        "x and y are swapped: kx^2 comes first": matrix(ky * ky, xy, kx * kx),
        "this leans the other way: r kx ky without a minus": matrix(kx * kx, -xy, ky * ky),
        "this is the inverse, a covariance: the precision itself was wanted": torch.linalg.pinv(right),
        "no lean: the mixed entries are r kx ky": matrix(kx * kx, 0 * xy, ky * ky),
    }, "[[kx^2, r kx ky], [r kx ky, ky^2]] was wanted", shape_hint=": 40 matrices of 2 x 2")
    passed("det = kx^2 ky^2 (1 - r^2) is never negative, so far pixels never weigh more than near ones")


def pyramid(fn: Callable[[Tensor, Sequence[Level]], Tensor]) -> None:
    """fn(x, levels, finest first) -> filter, halve, filter, halve ...; then double and keep `skip` of each level."""
    x = randn(2, 3, 16, 16, seed=6)
    for count in (1, 3):
        levels = _levels(16, count)
        try:
            got = call(fn, x, levels)
        except (ValueError, RuntimeError) as refusal:
            raise CheckFailed((
                "two pictures of different sizes met: double what comes from below, gaussian_upsample(u, level.shape)"
                if isinstance(refusal, RuntimeError) else
                "halved before it was filtered: each level filters first, at its full size" if count == 1 else
                "a level met a picture of another size: `levels` come finest first, so walk them as they are on the "
                "way down and backwards on the way up") + f" ({str(refusal).splitlines()[0]})") from None
        compare(got, _pyramid(x, levels), {
            "every level filters the *noisy* picture, made small: hand on what the level above has filtered":
                _pyramid(x, levels, raw=True),
            "the blend is the wrong way round: skip is the share of this level's own filtered picture, "
            "torch.lerp(from_below, own, skip)": _pyramid(x, levels, reverse=True),
            "the picture from below was enlarged by repeating pixels: gaussian_upsample(u, level.shape)": _pyramid(
                x, levels, up=lambda u, shape: F.interpolate(u, scale_factor=2.0, mode="nearest")),
            "the picture from below was enlarged bilinearly: gaussian_upsample(u, level.shape)": _pyramid(
                x, levels, up=lambda u, shape: F.interpolate(u, scale_factor=2.0, mode="bilinear")),
            "halved by maxima, which makes noise brighter: means, F.avg_pool2d(y, 2)": _pyramid(
                x, levels, down=lambda y: F.max_pool2d(y, 2)),
            "halved by leaving pixels out: means of 2 x 2, F.avg_pool2d(y, 2)": _pyramid(
                x, levels, down=lambda y: y[..., ::2, ::2]),
            "added instead of blended: torch.lerp(from_below, own, skip)": _pyramid(
                x, levels, blend=lambda u, y, skip: u + skip * y),
            "skip was left out: what is from below and what is the level's own are blended by it": _any_of(
                _pyramid(x, levels, blend=lambda u, y, skip: (u + y) / 2),
                _pyramid(x, levels, blend=lambda u, y, skip: u + y)),
            "only the finest level's filtered picture came back: the way up is missing": apply_kernels(
                x, levels[0].kernels),
        }, f"with {count} level{'s' * (count > 1)} this is not: filter and halve from the finest to the coarsest, then "
            "double and blend back up", shape_hint=": as large as x")
    passed("filter, then halve; double, then blend: each level hands on what it has filtered")


def prediction(fn: Callable[[Tensor, Tensor, Picturing, Picturing], Tensor]) -> None:
    """fn(x_t, t, filters, drift) -> the guess at x_0: filters(x_t, t) + drift(x_t, t)."""
    x_t, t = randn(3, 3, 4, 4, seed=7), torch.tensor([0.1, 0.5, 0.9])

    def filters(x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * x * (1 - t.view(-1, 1, 1, 1)) + x.mean((2, 3), keepdim=True)

    def drift(x: Tensor, t: Tensor) -> Tensor:
        return (x.square() + 1) * (0.5 + t.view(-1, 1, 1, 1))
    kept, added = filters(x_t, t), drift(x_t, t)
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    compare(call(fn, x_t, t, filters, drift), kept + added, {
        "drift before filtering: what it adds is blurred away again; filter x_t, then add": _any_of(
            filters(x_t + added, t), filters(added, t)),
        "the drift looked at the filtered picture: it reads x_t, as the filters do": kept + drift(kept, t),
        "the drift is missing": kept,
        "the filters are missing": added,
        "the drift was taken away: it is added": kept - added,
        "the drift is not told the time, or told another: drift(x_t, t)": _any_of(
            *(kept + drift(x_t, other) for other in (zero, one, 1 - t, 1000 * t))),
        "the filters are not told the time, or told another: filters(x_t, t)": _any_of(
            *(filters(x_t, other) + added for other in (zero, one, 1 - t, 1000 * t))),
        "x_t itself was added: the filters keep of it what they want": x_t + kept + added,
        "the mean of the two: their sum": (kept + added) / 2,
        "clipped to [-1, 1]: the network's loss wants the guess as it is": (kept + added).clamp(-1, 1),
    }, "filters(x_t, t) + drift(x_t, t) was wanted")
    passed("first the filters, then the drift on top, both of the noisy picture and both told the time")


def int8_kernels(fn: Callable[[Tensor], Tensor]) -> None:
    """fn(kernels in [-1, 1]) -> torch.int8: the k of the nearest k / 127."""
    kernels = 0.9 * (2 * rand(500, seed=14) - 1)
    kernels[:3] = torch.tensor([1.0, -1.0, 0.0])
    got = call(fn, kernels)
    if not isinstance(got, Tensor) or got.dtype != torch.int8:
        what = got.dtype if isinstance(got, Tensor) else type(got).__name__
        raise CheckFailed(f"whole numbers of eight bits were wanted, torch.int8, got {what}: end in .to(torch.int8)")
    k = 127 * kernels
    compare(got, k.round().to(torch.int8), {
        "cut off, not rounded: .to(torch.int8) drops what is behind the point, .round() first": k.to(torch.int8),
        "rounded down: .round() goes to the nearest": k.floor().to(torch.int8),
        "128 steps: 1.0 becomes 128, which eight bits write as -128. There are 127": (128 * kernels).round().to(
            torch.int16).to(torch.int8),
        "128 steps, and the ends clamped: then 1.0 and 0.995 are one; k / 127": (128 * kernels).round().clamp(
            -128, 127).to(torch.int8),
        "a scale of its own for this batch: tanh ends at 1, so the grid is k / 127 whatever comes": (
            k / kernels[3:].abs().max()).round().clamp(-127, 127).to(torch.int8),
        "not scaled: only -1, 0 and 1 are left; 127 times": kernels.round().to(torch.int8),
        "the sign is gone: -128 to 127 has room for it": k.abs().round().to(torch.int8),
        "moved to 0..255, for numbers without a sign: int8 has one": (127.5 * (kernels + 1)).round().to(torch.uint8).to(
            torch.int8),
    }, "round(127 kernels) was wanted", atol=0.5)
    passed("255 levels, symmetric about zero, and 1.0 is 127")


def _levels(size: int, count: int) -> list[Level]:
    """Random levels, finest first."""
    levels = []
    for i in range(count):
        h, seed = size >> i, 20 + 5 * i
        shape = torch.cat([0.5 + 2 * rand(2, 2, h, h, seed=seed), 1.8 * rand(2, 1, h, h, seed=seed + 1) - 0.9], 1)
        levels.append(Level(randn(2, TAPS, h, h, seed=seed + 2).tanh(), shape, rand(2, 1, h, h, seed=seed + 3), None))
    return levels


def _pyramid(x: Tensor, levels: Sequence[Level], raw: bool = False, reverse: bool = False,
             up: Callable[[Tensor, Tensor], Tensor] = gaussian_upsample,
             down: Callable[[Tensor], Tensor] = lambda y: F.avg_pool2d(y, 2),
             blend: Callable[[Tensor, Tensor, Tensor], Tensor] = torch.lerp) -> Tensor:
    """The pyramid, with nothing or one thing changed."""
    own = []
    for level in levels:
        own.append(apply_kernels(x, level.kernels))
        x = down(x if raw else own[-1])
    for y, level in zip(own[::-1], levels[::-1], strict=True):
        below = up(x, level.shape)
        x = blend(y, below, level.skip) if reverse else blend(below, y, level.skip)
    return x


def _any_of(*wrongs: Tensor) -> Callable[[Tensor], bool]:
    return lambda got: any(torch.allclose(got, wrong, atol=1e-4) for wrong in wrongs)


def _summed(x: Tensor, kernels: Tensor, padding: str) -> Tensor:
    h, w = x.shape[2:]
    padded = F.pad(x, (2, 2, 2, 2), mode=padding)
    return torch.stack([padded[..., k // 5:k // 5 + h, k % 5:k % 5 + w] * kernels[:, k, None]
                        for k in range(TAPS)]).sum(0)


def _splatted(x: Tensor, kernels: Tensor) -> Tensor:
    """Each pixel adds itself, weighted, to the 25 around it; what falls over the border is lost."""
    h, w = x.shape[2:]
    onto = torch.zeros(*x.shape[:2], h + 4, w + 4)
    for k in range(TAPS):
        onto[..., k // 5:k // 5 + h, k % 5:k % 5 + w] += x * kernels[:, k, None]
    return onto[..., 2:-2, 2:-2]
