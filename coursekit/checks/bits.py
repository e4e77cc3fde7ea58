"""Checks of notebook 06: the terms of the variational bound, and the rate and distortion that they make."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from coursekit.checks.core import CheckFailed, call, compare, passed, seeded
from coursekit.denoisers import Denoiser, Prediction
from coursekit.diffusion import add_noise
from coursekit.schedules import NoiseSchedule, cosine_schedule
from coursekit.toys import GaussianData


def distortion_at(fn: Callable[..., Tensor]) -> None:
    """fn(denoise, x0, t, eps, schedule) -> (), RMSE of the clipped x_0 estimate at int t, on the 0..255 scale."""
    x0, eps = torch.rand(6, 3, 8, 8, generator=seeded(1)) * 2 - 1, torch.randn(6, 3, 8, 8, generator=seeded(2))
    x0[3:] *= 0.1  # the images must differ, or the mean of roots is the root of means
    schedule = cosine_schedule(1000)
    strangers = [torch.arange(6).flip(0), *(torch.arange(6).roll(k) for k in range(1, 6))]
    for t in (200, 600):
        x_t = add_noise(x0, t, eps, schedule)
        free = _overshooting(schedule)(x_t, torch.full((6,), t)).x0
        guess = free.clamp(-1, 1)
        miss = guess - x0
        each = miss.square().flatten(1).mean(1)
        compare(call(fn, _overshooting(schedule), x0, t, eps, schedule), 127.5 * each.sqrt().mean(), {
            "x_t itself was compared with x_0: the distortion is that of the *estimate* of x_0": _rmse(x_t - x0),
            "an unrelated image was compared: that measures how different two images are, and nothing about the model":
                lambda got, guess=guess: any(
                    torch.allclose(got, _rmse(guess - x0[others]), atol=1e-3) for others in strangers),
            "the noisy x_t was compared with an unrelated image: at T that is the root of 1 + mean x_0^2 for any model":
                lambda got, x_t=x_t: any(torch.allclose(got, scale * _rmse(x_t - x0[others]), atol=1e-3)
                                         for others in strangers for scale in (1, 1 / 127.5)),
            "the scale is that of [-1, 1]: 2 units are 255 grey levels": each.sqrt().mean(),
            "[-1, 1] is 2 wide: one unit is 127.5 grey levels, not 255": 255 * each.sqrt().mean(),
            "the estimate was not clipped: no image leaves [-1, 1], so neither need its estimate": _rmse(free - x0),
            "the root is missing": 127.5 * each.mean(),
            "the root is missing, and the scale was squared": 127.5**2 * each.mean(),
            "one root over the whole batch: each image has its own error, average those":
                127.5 * each.mean().sqrt(),
            "absolute differences were averaged: RMSE squares them first": 127.5 * miss.abs().mean(),
            "the denoiser was asked about the clean image: noise it first": _rmse(
                _overshooting(schedule)(x0, torch.full((6,), t)).x0.clamp(-1, 1) - x0),
            "eps was not used: the noise is an argument, so that it can be held fixed": lambda got, t=t: torch.equal(
                got, call(fn, _overshooting(schedule), x0, t, 2 * eps, schedule)),
        }, f"at t = {t} this is not 127.5 times the root of the mean square of clip(x_0 estimate) - x_0", atol=1e-3)
    passed("the estimate, not x_t; of the same image; clipped; one root an image; 127.5 grey levels to a unit")


def jump_bits(fn: Callable[..., Tensor]) -> None:
    """fn(mean_q, mean_p, var_q, var_p) -> (b,), KL(q || p) of two Gaussians in bits per dimension."""
    q = torch.randn(4, 3, 5, 5, generator=seeded(3), dtype=torch.float64)
    p = q + 0.4 * torch.randn(4, 3, 5, 5, generator=seeded(4), dtype=torch.float64)
    for var_q, var_p in ((0.3, 0.5), (0.04, 0.045)):
        far, ratio = (q - p).square() / var_p, var_q / var_p
        nats = (far + ratio - 1 - math.log(ratio)) / 2
        back = ((q - p).square() / var_q + 1 / ratio - 1 + math.log(ratio)) / 2
        bits = nats.flatten(1).mean(1) / math.log(2)
        compare(call(fn, q, p, var_q, var_p), bits, {
            "these are nats: divide by ln 2": bits * math.log(2),
            "multiplied by ln 2: one bit is ln 2 nats, so divide": bits * math.log(2) ** 2,
            "these are the bits of a whole image: divide by how many numbers it has": bits * q[0].numel(),
            "these are nats of a whole image": bits * math.log(2) * q[0].numel(),
            "p and q are exchanged: the code is built for p, the data come from q": _bits(back),
            "the half is missing": 2 * bits,
            "the distance of the means is missing": _bits((ratio - 1 - math.log(ratio)) / 2 + 0 * far),
            "the variances are taken for equal: p's is larger, and that has a price too": _bits(far / 2),
            "the sign of the logarithm is wrong: no divergence may fall below 0": _bits(
                (far + ratio - 1 + math.log(ratio)) / 2),
            "minus 1 is missing: equal Gaussians have divergence 0": _bits((far + ratio - math.log(ratio)) / 2),
            "the variances are squared: var_q and var_p are variances already": _bits(
                ((q - p).square() / var_p**2 + ratio**2 - 1 - 2 * math.log(ratio)) / 2),
            "the squared distance is divided by q's variance: the receiver knows p only": _bits(
                ((q - p).square() / var_q + ratio - 1 - math.log(ratio)) / 2),
        }, f"with variances {var_q} and {var_p} this is not KL(q || p) / (ln 2 * number of dimensions)",
            atol=1e-7, shape_hint=": one number for each image")
    passed("equal Gaussians cost nothing, others their divergence, in bits, for each number of the image")


def decoder_bits(fn: Callable[..., Tensor]) -> None:
    """fn(x0, mean, std) -> (b,), -log2 of the Gaussian's mass in each 8-bit value's bin, per dimension (eq. 13)."""
    rng = seeded(5)
    x0 = torch.randint(0, 256, (4, 3, 6, 6), generator=rng).double() / 127.5 - 1
    x0[:, :, 0], x0[:, :, 1] = -1.0, 1.0  # the open bins
    for std in (0.01, 0.05):
        mean = x0 + std * torch.randn(x0.shape, generator=rng, dtype=torch.float64).clamp(-2, 2)
        bits = _code_length(x0, mean, std)
        compare(call(fn, x0, mean, std), bits, {
            "these are nats: divide by ln 2": bits * math.log(2),
            "these are the bits of a whole image: divide by how many numbers it has": bits * x0[0].numel(),
            "the sign is wrong: a length is minus the logarithm": -bits,
            "the bins are those of pixels in [0, 1]: in [-1, 1] they are 2 / 255 wide, half of it to each side":
                _code_length(x0, mean, std, half=1 / 510),
            "the bins are twice too wide: neighbouring values lie 2 / 255 apart, half of it to each side":
                _code_length(x0, mean, std, half=2 / 255),
            "black and white have closed bins: everything beyond them is theirs": _code_length(
                x0, mean, std, ends=False),
            "that is a density: it is no probability, and may be above 1; the *mass* of a bin is wanted":
                _bits(-torch.distributions.Normal(mean, std).log_prob(x0)),
            "that is the density times the width of a bin: the bin is as wide as the bell; take the difference of cdf":
                _bits(-torch.distributions.Normal(mean, std).log_prob(x0) - math.log(2 / 255)),
            "std was taken for a variance": _code_length(x0, mean, std**0.5),
            "std was squared": _code_length(x0, mean, std**2),
        }, f"with std {std} this is not -log2 (cdf(x + 1/255) - cdf(x - 1/255)), open at both ends", atol=1e-4,
            shape_hint=": one number for each image")
    far_off = call(fn, torch.ones(1, 1, 2, 2), -torch.ones(1, 1, 2, 2), 0.01)
    if not bool(far_off.isfinite().all()):
        raise CheckFailed("a value that the Gaussian thinks impossible costs infinity, and so does the whole bound: "
                          "clamp the mass from below, .clamp(min=1e-12), before the logarithm")
    if bool((far_off < 30).any()):
        raise CheckFailed(f"a value two hundred deviations off costs {far_off.min():.0f} bits, and 39 or more were "
                          "wanted: the floor below the mass is too high, .clamp(min=1e-12)")
    passed("masses of bins 2/255 wide, the two end bins open; bits, and never infinitely many")


def rate_curve(fn: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    """fn(prior (), kl (n,)) -> (rate (n,) received *before* each jump, bound ()); the last kl is the decoder's."""
    prior, kl = torch.tensor(0.7, dtype=torch.float64), torch.tensor([0.1, 0.25, 0.4, 1.9], dtype=torch.float64)
    got = call(fn, prior, kl)
    if not isinstance(got, (tuple, list)) or len(got) != 2:
        raise CheckFailed("two answers were wanted: the rate at each time, and the bound")
    rate, bound = got
    right = prior + kl.cumsum(0) - kl
    compare(rate, right, {
        "each jump's own bits are counted: the estimate at t is made *before* the jump that starts at t":
            prior + kl.cumsum(0),
        "the prior is missing: x_T has to be sent as well": kl.cumsum(0) - kl,
        "the prior is missing, and each jump's own bits are counted": kl.cumsum(0),
        "that is what is still to be sent: the rate is what has been": kl.flip(0).cumsum(0).flip(0),
        "the bits of the jumps must be added up: each estimate has all that was sent before": prior + kl,
    }, "rate[i] = prior + kl[0] + ... + kl[i - 1]", atol=1e-9)
    compare(bound, prior + kl.sum(), {
        "the last term is missing: without the decoder's bits an estimate has been sent, and not the image":
            prior + kl[:-1].sum(),
        "the prior is missing": kl.sum(),
        "the prior and the decoder are missing": kl[:-1].sum(),
        "that is the mean of the terms: every jump is paid for": prior + kl.mean(),
        "the prior is counted twice": 2 * prior + kl.sum(),
        "that is the sum of the rates: each bit would be sent again and again": right.sum(),
    }, "bound = prior + all of kl, the decoder's included", atol=1e-9)
    passed("rate before the last jump + the decoder's bits = bound: it adds up")


def _overshooting(schedule: NoiseSchedule) -> Denoiser:
    """A denoiser whose estimates leave [-1, 1], so that clipping is seen."""
    own = GaussianData(0.1, 0.3).denoiser(schedule)

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        x0, eps = own(x_t, t)
        return Prediction(1.6 * x0, eps)
    return denoise


def _rmse(miss: Tensor) -> Tensor:
    return 127.5 * miss.square().flatten(1).mean(1).sqrt().mean()


def _bits(nats: Tensor) -> Tensor:
    return nats.flatten(1).mean(1) / math.log(2)


def _code_length(x: Tensor, mean: Tensor, std: float, half: float = 1 / 255, ends: bool = True) -> Tensor:
    upper, lower = (torch.special.ndtr((x + side - mean) / std) for side in (half, -half))
    if ends:
        upper = torch.where(x > 1 - 1 / 255, torch.ones_like(x), upper)
        lower = torch.where(x < -1 + 1 / 255, torch.zeros_like(x), lower)
    return _bits(-(upper - lower).clamp(min=1e-12).log())
