"""From x_0 to x_t and back: the forward process, its posterior, the losses and the bound.

Images are float tensors (b, c, h, w), usually in [-1, 1]. `schedule` is any path of
`coursekit.schedules`; t counts 1..T on a NoiseSchedule, runs over [0, 1] on the straight path, and 0
is clean on both. Every function raises ValueError, naming what it got, for shapes, times or values
(NaN, infinity) that cannot be right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from coursekit.schedules import NoiseSchedule, Path, Time

Weight = Callable[[Tensor], Tensor]  # signal-to-noise ratio (b,) -> weight of each image's loss (b,)


def noise_like(x: Tensor, rng: torch.Generator | None = None) -> Tensor:
    """Standard normal noise with the shape, dtype and device of x.

    It is drawn where the generator lives and then moved, so one CPU seed gives the same noise on
    every device. ValueError unless x is floats.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = f"{x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"noise is drawn for float tensors (images in [-1, 1]), got {got}")
    device = rng.device if rng is not None else x.device
    return torch.randn(x.shape, generator=rng, device=device, dtype=x.dtype).to(x.device)


def add_noise(x0: Tensor, t: Time, eps: Tensor, schedule: Path) -> Tensor:
    """x_t given x_0 and its noise (DDPM, eq. 4). At t = 0 this is x_0 itself."""
    _same_shape(x0=x0, eps=eps)
    _finite(x0=x0, eps=eps)
    a, s = schedule.signal_and_noise(t, like=x0)
    return a * x0 + s * eps


def x0_from_eps(x_t: Tensor, t: Time, eps: Tensor, schedule: Path) -> Tensor:
    """The clean image if eps was the noise (DDPM, eq. 15). Needs some signal: alpha_bar_t > 0."""
    _same_shape(x_t=x_t, eps=eps)
    _finite(x_t=x_t, eps=eps)
    a, s = schedule.signal_and_noise(t, like=x_t)
    if bool((a == 0).any()):
        raise ValueError("where no signal is left (a = 0, alpha_bar = 0) the noise does not tell x_0: "
                         "predict v or x_0 instead")
    return (x_t - s * eps) / a


def eps_from_x0(x_t: Tensor, t: Time, x0: Tensor, schedule: Path) -> Tensor:
    """The noise in x_t if x_0 was the clean image. Needs some noise: t > 0."""
    _same_shape(x_t=x_t, x0=x0)
    _finite(x_t=x_t, x0=x0)
    a, s = schedule.signal_and_noise(t, like=x_t)
    if bool((s == 0).any()):
        raise ValueError("at t = 0 there is no noise to name: eps_from_x0 needs t > 0")
    return (x_t - a * x0) / s


def v_from_x0_eps(x0: Tensor, t: Time, eps: Tensor, schedule: Path) -> Tensor:
    """The velocity v = a' x_0 + s' eps (Salimans & Ho 2022; on the straight path, eps - x_0)."""
    _same_shape(x0=x0, eps=eps)
    _finite(x0=x0, eps=eps)
    da, ds = schedule.velocity_weights(t, like=x0)
    return da * x0 + ds * eps


def x0_eps_from_v(x_t: Tensor, t: Time, v: Tensor, schedule: Path) -> tuple[Tensor, Tensor]:
    """(x_0, eps) if v was the velocity: the inverse of (x_t, v) = [[a, s], [a', s']] (x_0, eps).

    The determinant a s' - s a' is 1 on every path here, so the inverse needs no division and is
    safe at both ends of time.
    """
    _same_shape(x_t=x_t, v=v)
    _finite(x_t=x_t, v=v)
    a, s = schedule.signal_and_noise(t, like=x_t)
    da, ds = schedule.velocity_weights(t, like=x_t)
    return ds * x_t - s * v, a * v - da * x_t


def posterior(x0: Tensor, x_t: Tensor, t: Time, s: Time,
              schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of q(x_s | x_t, x_0) for s < t (DDPM, eq. 6-7, any stride).

    The mean has the shape of x_t, the deviation (b, 1, 1, 1). At s = 0 the deviation is 0 and the
    mean is x_0.
    """
    _same_shape(x0=x0, x_t=x_t)
    _finite(x0=x0, x_t=x_t)
    precise = torch.empty((len(x0), *[1] * (x0.ndim - 1)), dtype=torch.float64)
    t, s = (time.cpu() if isinstance(time, Tensor) else time for time in (t, s))
    a_t, s_t = schedule.signal_and_noise(t, like=precise)
    a_s, s_s = schedule.signal_and_noise(s, like=precise)
    if not bool(torch.as_tensor(s < t).all()):
        raise ValueError(f"the posterior goes back in time: s must be below t, got s = {s}, t = {t}")
    ratio = a_t / a_s  # root of the product of the alphas between s and t
    step_var = s_t**2 - ratio**2 * s_s**2  # variance that the steps from s to t add
    coefficients = (a_s * step_var / s_t**2, ratio * s_s**2 / s_t**2, (step_var / s_t**2).sqrt() * s_s)
    c_x0, c_xt, std = (c.to(x0.dtype).to(x0.device) for c in coefficients)
    return c_x0 * x0 + c_xt * x_t, std


def noise_prediction_loss(model: nn.Module, x0: Tensor, schedule: Path,
                          rng: torch.Generator | None = None, weight: Weight | None = None,
                          **cond: Any) -> Tensor:
    """L_simple (DDPM, eq. 14): guess the noise that was added. A scalar; `cond` goes to the model."""
    t, eps, x_t = _corrupt(x0, schedule, rng)
    return _mean_square(model(x_t, t, **cond), eps, t, schedule, weight)


def x0_prediction_loss(model: nn.Module, x0: Tensor, schedule: Path,
                       rng: torch.Generator | None = None, weight: Weight | None = None,
                       **cond: Any) -> Tensor:
    """Guess the clean image. Its minimiser is the average of all images that x_t could have been."""
    t, _, x_t = _corrupt(x0, schedule, rng)
    return _mean_square(model(x_t, t, **cond), x0, t, schedule, weight)


def v_prediction_loss(model: nn.Module, x0: Tensor, schedule: Path,
                      rng: torch.Generator | None = None, weight: Weight | None = None,
                      **cond: Any) -> Tensor:
    """Guess the velocity (Salimans & Ho 2022): never trivial, neither at t = 0 nor at T."""
    t, eps, x_t = _corrupt(x0, schedule, rng)
    v = v_from_x0_eps(x0, t, eps, schedule)
    return _mean_square(model(x_t, t, **cond), v, t, schedule, weight)


def min_snr_weight(predicts: str, gamma: float = 5.0) -> Weight:
    """Min-SNR-gamma weights for a loss on "eps", "x0" or "v" (Hang et al. 2023).

    On a NoiseSchedule all three weigh the squared error of x_0 by min(SNR, gamma).
    """
    weights: dict[str, Weight] = {
        "x0": lambda snr: snr.clamp(max=gamma),
        "eps": lambda snr: (gamma / snr).clamp(max=1),  # min(SNR, gamma) / SNR, and 1 where the SNR is 0
        "v": lambda snr: snr.clamp(max=gamma) / (snr + 1),
    }
    if predicts not in weights:
        raise ValueError(f"predicts must be one of {sorted(weights)}, got {predicts!r}")
    if not gamma > 0:
        raise ValueError(f"gamma caps the signal-to-noise ratio and must be positive, got {gamma}")
    return weights[predicts]


class RateDistortion(NamedTuple):
    """The variational bound taken apart, averaged over images; see `rate_distortion`."""

    times: list[int]  # T = t_0 > ... > t_n = 0
    kl: Tensor  # (n,) bits per dimension sent by the jump from times[i] to times[i + 1]; last: decoder
    prior: Tensor  # () bits per dimension of KL(q(x_T | x_0) || N(0, I))
    rate: Tensor  # (n,) bits per dimension received before the jump that starts at times[i]
    rmse: Tensor  # (n,) distortion of the x_0 estimate at times[i], on the 0..255 scale

    @property
    def bound(self) -> Tensor:
        """Bits per dimension to send an image without loss, an upper bound on -log2 p(x_0)."""
        return self.prior + self.kl.sum()


@torch.no_grad()
def rate_distortion(denoise: Callable[[Tensor, Tensor], Any], x0: Tensor, schedule: NoiseSchedule,
                    times: Sequence[int] | None = None,
                    rng: torch.Generator | None = None) -> RateDistortion:
    """DDPM's figure 5 done as the paper defines it: x_0 estimates of given images, bits and RMSE.

    x0: 8-bit images scaled to [-1, 1], (b, c, h, w); use images the model has not trained on.
    times: descending from T to 0; every step by default. Each jump t -> s > 0 costs
    KL(q(x_s | x_t, x_0) || p(x_s | x_t)), where p has its mean from the x_0 guess; the last one is paid
    by a discretised Gaussian decoder (DDPM, eq. 13). The variance of p and of the decoder is that of
    the forward step, beta_t, as behind the paper's 3.75 bits: with the smaller one of the posterior
    the bound of a perfect model is about half a bit a pixel looser.
    """
    times = list(range(schedule.T, -1, -1)) if times is None else list(times)
    if len(times) < 2 or times[0] != schedule.T or times[-1] != 0:
        raise ValueError(f"times must descend from T = {schedule.T} to 0, got {times}")
    if x0.numel() == 0 or not bool((x0.abs() <= 1).all()):
        got = f"values from {x0.min():g} to {x0.max():g}" if x0.numel() else f"shape {tuple(x0.shape)}"
        raise ValueError(f"the bound needs images in [-1, 1], at least one, got {got}")
    bits = 1 / (math.log(2) * x0[0].numel())  # nats per image -> bits per dimension
    kl, rmse = [], []
    for t, s in pairwise(times):
        x_t = add_noise(x0, t, noise_like(x0, rng), schedule)
        guess = denoise(x_t, torch.full((len(x0),), t, device=x0.device)).x0.clamp(-1, 1)
        rmse.append(127.5 * (guess - x0).square().flatten(1).mean(1).sqrt().mean())
        if s > 0:
            ab_t, ab_s = schedule.alpha_bar[t].item(), schedule.alpha_bar[s].item()
            step_var, ratio = 1 - ab_t / ab_s, (1 - ab_s) / (1 - ab_t)  # of the posterior's variance to it
            miss = posterior(x0, x_t, t, s, schedule)[0] - posterior(guess, x_t, t, s, schedule)[0]
            nats = (miss.square() / step_var + (ratio - 1 - math.log(ratio))).flatten(1).sum(1) / 2
        else:
            _, sigma = schedule.signal_and_noise(t, like=x0)
            nats = -_discretised_log_likelihood(x0, guess, sigma).flatten(1).sum(1)
        kl.append(nats.mean() * bits)
    a, s_T = schedule.signal_and_noise(schedule.T, like=x0)
    prior = ((a * x0) ** 2 + s_T**2 - 1 - 2 * s_T.log()).flatten(1).sum(1).mean() / 2 * bits
    costs = torch.stack(kl)
    return RateDistortion(times, costs, prior, prior + costs.cumsum(0) - costs, torch.stack(rmse))


def _discretised_log_likelihood(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log of the Gaussian mass in each 8-bit value's bin; the end bins reach to infinity (eq. 13).

    Computed as a difference of logarithms in the left tail, where float64 has digits left: a value forty
    deviations off costs what it costs. The usual clamp of the mass at 1e-12 would make a bound of less than the truth.
    """
    value, center, width = (v.cpu().double() for v in (x, mean, std))  # mps has no float64
    lower, upper = ((value + side - center) / width for side in (-1 / 255, 1 / 255))
    lower = lower.masked_fill(value < -1 + 1 / 255, -math.inf)
    upper = upper.masked_fill(value > 1 - 1 / 255, math.inf)
    right = lower + upper > 0
    lower, upper = torch.where(right, -upper, lower), torch.where(right, -lower, upper)
    below, above = torch.special.log_ndtr(lower), torch.special.log_ndtr(upper)
    return (above + torch.log(-torch.expm1(below - above))).to(x)


def _corrupt(x0: Tensor, schedule: Path, rng: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    if x0.numel() == 0:
        raise ValueError(f"the loss of an empty batch is no number, got images of shape {tuple(x0.shape)}")
    if x0.is_floating_point() and (largest := x0.abs().max().item()) > 100:  # latents stay far below
        raise ValueError(f"images run over [-1, 1], got values up to {largest:g}: x / 127.5 - 1 brings bytes there")
    t = schedule.draw_times(len(x0), like=x0, rng=rng)
    eps = noise_like(x0, rng)
    return t, eps, add_noise(x0, t, eps, schedule)


def _mean_square(output: Tensor, target: Tensor, t: Tensor, schedule: Path,
                 weight: Weight | None) -> Tensor:
    _same_shape(target=target, output=output)  # (b, 1, h, w) would broadcast against colour
    error = output - target
    if weight is None:
        return error.square().mean()
    a, s = schedule.signal_and_noise(t, like=error)
    return (weight((a / s).square().flatten()) * error.square().flatten(1).mean(1)).mean()


def _same_shape(**named: Tensor) -> None:
    (first, x), (second, y) = named.items()
    for name, value in named.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = f"{value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name} must be a float tensor (images in [-1, 1]), got {got}")
    if x.shape != y.shape:
        raise ValueError(f"{first} and {second} must have one shape, "
                         f"got {tuple(x.shape)} and {tuple(y.shape)}")


def _finite(**named: Tensor) -> None:
    for name, x in named.items():
        if not bool(x.isfinite().all()):
            raise ValueError(f"{name} must be finite, got NaN or infinity in {int((~x.isfinite()).sum())} "
                             f"of its {x.numel()} values")
