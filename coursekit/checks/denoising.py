"""Checks of notebook 02: classical filters, the one-step estimate, the strided step, PSNR."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from coursekit.checks.core import COLUMNS, CheckFailed, call, compare, keeps_dtype, passed, seeded
from coursekit.denoisers import gaussian_blur as tv_gaussian_blur
from coursekit.diffusion import posterior
from coursekit.schedules import cosine_schedule, linear_schedule


def gaussian_blur(fn: Callable[[Tensor, int, float], Tensor]) -> None:
    """fn(x, kernel_size, sigma): blur (b, c, h, w), reflecting at the borders."""
    x = torch.rand(2, 3, 16, 16, generator=seeded(0)) * 2 - 1
    flat = call(fn, torch.full((1, 3, 16, 16), 0.5), 7, 2.0)
    if isinstance(flat, Tensor) and flat.shape == (1, 3, 16, 16) and not torch.allclose(
            flat, torch.full_like(flat, 0.5), atol=1e-4):
        inner = flat[..., 5:-5, 5:-5]
        if torch.allclose(inner, torch.full_like(inner, 0.5), atol=1e-4):
            raise CheckFailed("a grey picture gets a dark frame: pad by reflection, not with zeros")
        raise CheckFailed(f"a flat grey of 0.5 became {inner.mean():.3f}: the weights must sum to 1")
    right = tv_gaussian_blur(x, [7, 7], [1.5, 1.5])
    keeps_dtype(flat, x)
    compare(call(fn, x, 7, 1.5), right, {
        "the blur is too narrow: the exponent is -d^2 / (2 sigma^2), with the 2": tv_gaussian_blur(
            x, [7, 7], [1.5 / 2**0.5] * 2),
        "sigma was not squared in the exponent": tv_gaussian_blur(x, [7, 7], [1.5**0.5] * 2),
        "only columns are blurred: once along each axis": tv_gaussian_blur(x, [1, 7], [1.5, 1.5]),
        "only rows are blurred: once along each axis": tv_gaussian_blur(x, [7, 1], [1.5, 1.5]),
        "borders are repeated rather than reflected": _blur_padded(x, "replicate"),
        "this is a box, every weight the same: weigh by exp(-d^2 / (2 sigma^2))": F.avg_pool2d(
            F.pad(x, [3] * 4, mode="reflect"), 7, 1),
    }, "this is not the 7 x 7 Gaussian of sigma 1.5, normalised, with reflected borders", atol=1e-3)
    compare(call(fn, x, 11, 3.0), tv_gaussian_blur(x, [11, 11], [3.0, 3.0]), {
        "kernel_size is not used: 7 pixels whatever was asked": tv_gaussian_blur(x, [7, 7], [3.0, 3.0]),
        "sigma is not used: 1.5 whatever was asked": tv_gaussian_blur(x, [11, 11], [1.5, 1.5]),
    }, "with kernel_size 11 and sigma 3 this is another blur", atol=1e-3)
    passed("weights sum to 1, grey stays grey up to the border, and the width is sigma")


def one_step(fn: Callable[..., Tensor]) -> None:
    """fn(x_t, t, eps, schedule) -> the x_0 that eps implies (DDPM, eq. 15)."""
    schedule = cosine_schedule(1000)
    rng = seeded(2)
    x0, eps = torch.rand(3, 3, 8, 8, generator=rng) * 2 - 1, torch.randn(3, 3, 8, 8, generator=rng)
    t = torch.tensor([1, 250, 750])
    a, s = schedule.signal_and_noise(t, like=x0)
    x_t = a * x0 + s * eps
    got = call(fn, x_t, t, eps, schedule)
    compare(got, x0, {
        "the noise was taken away, but the picture was not made bright again: divide by sqrt(alpha_bar)": a * x0,
        "divided by alpha_bar instead of its square root": (x_t - s * eps) / a**2,
        "eps has variance 1: scale it by sqrt(1 - alpha_bar) before you take it away": (x_t - eps) / a,
        "the square root in front of eps is missing": (x_t - s**2 * eps) / a,
        "the noise was added a second time: take it away": (x_t + s * eps) / a,
        "the division came before the subtraction: mind the brackets": x_t / a - s * eps,
    }, "with the true eps the true x_0 should come back", atol=1e-3, shape_hint=COLUMNS)
    keeps_dtype(got, x_t)
    try:
        one_t = call(fn, x_t[1:2], 250, eps[1:2], schedule)
    except (IndexError, TypeError, AttributeError) as refusal:
        raise CheckFailed(f"t may be one integer for the whole batch too, and that fails ({refusal}): "
                          "schedule.signal_and_noise(t, like=x_t) takes both") from None
    compare(one_t, x0[1:2], {}, "with t = 250, one integer for the whole batch, x_0 does not come back", atol=1e-3)
    passed("given the true noise, the true image comes back, at t = 1, 250 and 750")


def posterior_step(fn: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """fn(x_t, x0, t, s, schedule) -> mean and standard deviation of x_s (DDPM, eq. 7, with a stride)."""
    schedule = linear_schedule(1000)
    rng = seeded(3)
    x0, x_t = torch.rand(2, 3, 4, 4, generator=rng) * 2 - 1, torch.randn(2, 3, 4, 4, generator=rng)
    for t, s in ((690, 660), (30, 0), (2, 1)):
        out = call(fn, x_t, x0, t, s, schedule)
        if not isinstance(out, (tuple, list)) or len(out) != 2:
            raise CheckFailed("return two things: the mean, and the standard deviation of the fresh noise")
        ab_t, ab_s = schedule.alpha_bar[t].item(), schedule.alpha_bar[s].item()
        right, std = posterior(x0, x_t, t, s, schedule)

        def mean(alpha: float, ab_s: float = ab_s, ab_t: float = ab_t) -> Tensor:
            return (ab_s**0.5 * (1 - alpha) * x0 + alpha**0.5 * (1 - ab_s) * x_t) / (1 - ab_t)

        alpha = ab_t / ab_s
        compare(out[0], right, {
            "alpha is the schedule's own alpha_t, which takes one step: for a stride it is the ratio "
            "alpha_bar_t / alpha_bar_s": mean(schedule.alpha[t].item()),
            "x_0 and x_t are swapped: near the end x_0 has most of the say":
                (ab_s**0.5 * (1 - alpha) * x_t + alpha**0.5 * (1 - ab_s) * x0) / (1 - ab_t),
            "divided by 1 - alpha_bar_s: the denominator belongs to t, where the step starts":
                mean(alpha) * (1 - ab_t) / (1 - ab_s) if ab_s < 1 else None,
            "the square root of alpha_bar_s is missing in front of x_0":
                (ab_s * (1 - alpha) * x0 + alpha**0.5 * (1 - ab_s) * x_t) / (1 - ab_t),
            "alpha_bar_t stands where alpha_bar_s should, in front of x_0":
                (ab_t**0.5 * (1 - alpha) * x0 + alpha**0.5 * (1 - ab_s) * x_t) / (1 - ab_t),
        }, f"from t = {t} to s = {s} the mean is not that of eq. 7")
        deviation = torch.as_tensor(out[1], dtype=torch.float64).flatten()[:1]
        true = std.double().flatten()[:1]
        compare(deviation, true, {
            "that is the variance: return its square root": true**2,
            "that is beta, the forward variance, whatever x_0: eq. 7 multiplies it by "
            "(1 - alpha_bar_s) / (1 - alpha_bar_t)": torch.tensor([(1 - alpha) ** 0.5], dtype=torch.float64),
            "that is the deviation of a single step, from t to t - 1: a stride from t to s takes more noise":
                posterior(x0, x_t, t, t - 1, schedule)[1].double().flatten()[:1],
            "fresh noise at s = 0: the clean image gets none, its deviation is 0": s == 0,
        }, f"from t = {t} to s = {s} the standard deviation should be {true.item():.4f}, "
           f"got {deviation.item():.4f}", atol=1e-5)
    passed("mean and deviation are the posterior's for strides 30 and 1, and the last step adds no noise")


def psnr(fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    """fn(x, y) -> dB (b,) for images in [-1, 1], whose peak is 2."""
    x = torch.zeros(3, 1, 8, 8)
    signs = torch.tensor([1.0, -1.0]).repeat(4)  # errors of both signs, and half of the pixels right
    y = x + torch.tensor([0.02, 0.2, 1.0]).view(-1, 1, 1, 1) * 2**0.5 * signs * (torch.arange(8) < 4)[:, None]
    got = call(fn, x, y)
    if isinstance(got, Tensor) and got.ndim == 0:
        raise CheckFailed("one number for the whole batch: average over pixels, then take the logarithm, "
                          "and keep one value per image")
    right = torch.tensor([40.0, 20.0, 10 * torch.log10(torch.tensor(4.0)).item()])
    compare(got, right, {
        "6 dB too low: images in [-1, 1] have a peak of 2, not 1": right - 20 * torch.log10(torch.tensor(2.0)),
        "twice too large: 20 log10 belongs to amplitudes, 10 log10 to the mean square": 2 * right,
        "errors of both signs cancelled: square first, then take the mean": lambda got: not bool(got.isfinite().all()),
        "absolute errors were averaged: it is the mean of their squares": right + 10 * torch.log10(torch.tensor(2.0)),
        "the largest error alone was counted": right - 10 * torch.log10(torch.tensor(2.0)),
        "natural logarithm: decibels use log10": right * torch.log(torch.tensor(10.0)),
        "the sign is upside down: better images have more dB": -right,
    }, "PSNR is 10 log10(peak^2 / mean squared error), per image")
    passed("an error of 1 % of the range is 40 dB, of 10 % is 20 dB, one value per image")


def wiener(fn: Callable[..., Tensor]) -> None:
    """fn(x_t, mean, var, a, s) -> E[x_0 | x_t] for x_0 ~ N(mean, var): the best denoiser there is."""
    rng = seeded(4)
    x_t = torch.randn(500, generator=rng)
    for mean, var, a, s in ((0.5, 0.09, 0.8, 0.6), (-0.2, 1.0, 0.3, 0.95), (0.0, 0.25, 1.0, 0.5)):
        gain = a * var / (a**2 * var + s**2)
        compare(call(fn, x_t, mean, var, a, s), mean + gain * (x_t - a * mean), {
            "x_t was compared with the mean of x_0: x_t is centred on a * mean": mean + gain * (x_t - mean),
            "the answer is not pulled to the mean: add `mean` back": gain * (x_t - a * mean),
            "this divides by a, whatever the noise: that is right only for s = 0": x_t / a,
            "the noise's variance is s^2, not s": mean + a * var / (a**2 * var + s) * (x_t - a * mean),
            "the signal's variance in x_t is a^2 var": mean + a * var / (a * var + s**2) * (x_t - a * mean),
            "the gain maps x_t to x_0, so it has one a on top": mean + var / (a**2 * var + s**2) * (x_t - a * mean),
        }, "not mean + a var / (a^2 var + s^2) (x_t - a mean)")
    passed("no other function of x_t has a smaller mean squared error for Gaussian data")


def _blur_padded(x: Tensor, mode: str) -> Tensor:
    d = torch.arange(-3, 4).float()
    k = torch.exp(-d**2 / (2 * 1.5**2))
    k = (k / k.sum()).outer(k / k.sum()).expand(3, 1, 7, 7)
    return F.conv2d(F.pad(x, [3] * 4, mode=mode), k, groups=3)
