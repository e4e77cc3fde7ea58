"""Checks of notebooks 00 and 01: value ranges, the direction of time, the forward process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from coursekit.checks.core import COLUMNS, CheckFailed, call, compare, keeps_dtype, passed, seeded
from coursekit.schedules import NoiseSchedule, cosine_schedule, linear_schedule


def to_float(fn: Callable[[Tensor], Tensor]) -> None:
    """fn(x uint8) -> float32 in [-1, 1]: 0 becomes -1, 255 becomes 1."""
    x = torch.tensor([[0, 1, 100, 128, 200, 255]], dtype=torch.uint8)
    got = call(fn, x)
    right = x.float() / 127.5 - 1
    compare(got, right, {
        "the answer runs over [0, 1]: stretch it by 2 and shift it by 1": right / 2 + 0.5,
        "white ends below 1: divide by 127.5 (half of 255), not by 128": x.float() / 128 - 1,
        "bytes wrap around at 255: turn x into floats *before* you compute with it":
            lambda got: not got.is_floating_point(),
        "the answer is upside down: black is -1 and white is 1": -right,
    }, "0 should become -1 and 255 should become 1, in a straight line between")
    passed("bytes 0..255 become floats in [-1, 1], black -1 and white 1")


def to_bytes(fn: Callable[[Tensor], Tensor]) -> None:
    """fn(x float) -> uint8: the inverse of `to_float`; what lies outside [-1, 1] is cut off."""
    back = call(fn, torch.arange(256).float() / 127.5 - 1)
    if not isinstance(back, Tensor) or back.dtype != torch.uint8:
        got = back.dtype if isinstance(back, Tensor) else type(back).__name__
        raise CheckFailed(f"pictures are stored as torch.uint8, got {got}: end in .to(torch.uint8)")
    if not torch.equal(back, torch.arange(256).to(torch.uint8)):
        wrong = int((back != torch.arange(256).to(torch.uint8)).sum())
        cut = ((torch.arange(256).float() / 127.5 - 1 + 1) * 127.5).to(torch.uint8)
        raise CheckFailed(f"{wrong} of 256 grey values do not come back: " + (
            ".to(torch.uint8) cuts decimals off, so round first" if bool((back.int() - cut.int()).abs().max() <= 1)
            else f"-1 should become 0 and 1 should become 255, got {back[0]} and {back[-1]}; (x + 1) * 127.5"))
    outside = call(fn, torch.tensor([-3.0, 3.0]))
    if outside.tolist() != [0, 255]:
        raise CheckFailed("values outside [-1, 1] wrap around to the other end: clamp before you convert")
    passed("all 256 grey values survive the round trip, and 3 standard deviations of noise do not wrap")


def times_for(fn: Callable[[NoiseSchedule, int], list[int]]) -> None:
    """fn(schedule, steps): the times a sampler visits, from noise to clean, evenly spaced."""
    schedule = cosine_schedule(1000)
    times = _numbers(call(fn, schedule, 4))
    if times == [0, 250, 500, 750, 1000]:
        raise CheckFailed("these times go up: a sampler starts at noise, t = T, and walks down to 0")
    if times == [1000, 750, 500, 250]:
        raise CheckFailed("the walk stops before it is clean: the last time must be 0")
    if times and times[0] == 999:
        raise CheckFailed("t counts 1..T here, so pure noise is t = 1000, not 999")
    if times != [1000, 750, 500, 250, 0]:
        raise CheckFailed(f"4 jumps visit the 5 times 1000, 750, 500, 250, 0; got {times}")
    if _numbers(call(fn, cosine_schedule(10), 5)) != [10, 8, 6, 4, 2, 0]:
        raise CheckFailed("right for T = 1000 only: read T from the schedule")
    passed("4 jumps visit 5 times, from T (noise) down to 0 (clean)")


def _numbers(times: Any) -> list:
    """A list, tuple, array or tensor of times as a plain list."""
    times = times.tolist() if hasattr(times, "tolist") else times
    if not isinstance(times, (list, tuple, range)):
        raise CheckFailed(f"a list of times was wanted, got {times!r}")
    return list(times)


def start_noise(fn: Callable[[int, torch.Generator], Tensor]) -> None:
    """fn(n, rng) -> n pictures of pure noise (n, 1, 28, 28), where every sampler starts."""
    x = call(fn, 64, seeded(0))
    if not isinstance(x, Tensor) or x.shape != (64, 1, 28, 28):
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise CheckFailed(f"64 grey pictures of 28 x 28 have shape (64, 1, 28, 28), got {got}")
    if not torch.equal(x, call(fn, 64, seeded(0))):
        raise CheckFailed("the same seed gives other noise: hand rng on, torch.randn(..., generator=rng)")
    if torch.equal(x, call(fn, 64, seeded(1))):
        raise CheckFailed("another seed gives the same noise: it is rng that must be asked, and nobody else")
    if torch.equal(x[0], x[1]):
        raise CheckFailed("all pictures are the same noise, so all samples would be the same picture")
    mean, std = x.mean().item(), x.std().item()
    if x.min() >= 0:
        raise CheckFailed("all values are positive: torch.rand is uniform on [0, 1], noise is torch.randn")
    if abs(mean) > 5 / x.numel() ** 0.5 or abs(std - 1) > 5 / (2 * x.numel()) ** 0.5:
        raise CheckFailed(f"mean {mean:.2f} and deviation {std:.2f}: x_T is standard normal, 0 and 1")
    if x.abs().max() < 3:
        raise CheckFailed(f"nothing beyond {x.abs().max():.1f}: uniform or clipped, x_T is normal; torch.randn")
    passed("standard normal, one noise a picture, and the same again from the same seed")


def noise_step(fn: Callable[..., Tensor]) -> None:
    """fn(x, t, eps, schedule) -> x_t given x_{t-1}, for one int t (DDPM, eq. 2)."""
    schedule, x, eps = linear_schedule(1000), *_pair(0)
    for t in (1, 400, 1000):
        alpha, ab = schedule.alpha[t].item(), schedule.alpha_bar[t].item()
        beta = 1 - alpha
        compare(call(fn, x, t, eps, schedule), alpha**0.5 * x + beta**0.5 * eps, {
            "this is the jump from x_0 to x_t: one step uses alpha_t, without the bar":
                ab**0.5 * x + (1 - ab) ** 0.5 * eps,
            "the noise has variance beta^2: a square root is missing in front of eps": alpha**0.5 * x + beta * eps,
            "the image is multiplied by alpha: a square root is missing in front of x": alpha * x + beta**0.5 * eps,
            "the old image is not made smaller, so the variance grows for ever: multiply x by sqrt(alpha_t)":
                x + beta**0.5 * eps,
            "signal and noise are swapped: nearly all of x survives one step": beta**0.5 * x + alpha**0.5 * eps,
            "beta is off by one: schedule.beta[t] is beta_t, entry 0 belongs to the clean image":
                _one_step(x, eps, schedule.beta[t - 1].item()),
        }, f"at t = {t} this is not sqrt(alpha_t) x + sqrt(beta_t) eps")
    passed("one step keeps sqrt(alpha_t) of the image and adds noise of variance beta_t")


def add_noise(fn: Callable[..., Tensor]) -> None:
    """fn(x0, t, eps, schedule) -> x_t for t (b,) (DDPM, eq. 4)."""
    for schedule in (linear_schedule(1000), cosine_schedule(100)):
        _check_jump(fn, schedule)
    passed("x_0 comes back at t = 0; mean and variance are those of eq. 4 at every t, image by image")


def alpha_bar(fn: Callable[..., Tensor]) -> None:
    """fn(beta (T,)) -> alpha_bar (T+1,), entry 0 the clean image (DDPM, below eq. 3)."""
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    got = call(fn, beta)
    right = linear_schedule(1000).alpha_bar
    if isinstance(got, Tensor) and got.shape == (1000,):
        raise CheckFailed("one entry is missing: put a 1 in front, so that alpha_bar[0] is the clean image "
                          "and alpha_bar[t] is the paper's")
    one = torch.ones(1, dtype=torch.float64)
    compare(got, right, {
        "alphas multiply, they do not add: cumprod, not cumsum": torch.cat([one, 1 - beta.cumsum(0)]),
        "this is alpha_t, the factor of one step: take the product of all up to t": torch.cat([one, 1 - beta]),
        "this is the product of the betas: alpha_t = 1 - beta_t": torch.cat([one, beta.cumprod(0)]),
        "the betas are read backwards: the smallest comes first": torch.cat([one, (1 - beta.flip(0)).cumprod(0)]),
    }, "alpha_bar_t is the product of (1 - beta_s) for s = 1..t", atol=1e-7)
    passed("alpha_bar starts at 1 and is the running product of 1 - beta: 1001 entries for T = 1000")


def rescaled_betas(fn: Callable[[int], NoiseSchedule]) -> None:
    """fn(T) -> the linear schedule for T steps that ends as dark as DDPM's does after 1000."""
    for T in (200, 300, 500):
        got = call(fn, T)
        if not isinstance(got, NoiseSchedule) or got.T != T:
            raise CheckFailed(f"for T = {T} return linear_schedule({T}, ...), a schedule of {T} steps")
        compare(got.alpha_bar, linear_schedule(T, 0.1 / T, 20 / T).alpha_bar, {
            "the betas are DDPM's own: T is smaller, so each step must do more; multiply them by 1000 / T":
                linear_schedule(T).alpha_bar,
            "the factor is upside down: fewer steps need larger betas": linear_schedule(
                T, 1e-4 * T / 1000, 0.02 * T / 1000).alpha_bar,
            "only beta_T was rescaled: both ends of the line move": linear_schedule(T, 1e-4, 20 / T).alpha_bar,
        }, "multiply beta_1 = 1e-4 and beta_T = 0.02 by 1000 / T", atol=1e-7)
    passed("with betas times 1000 / T, less than 1 % of the amplitude is left at T = 200, 300 and 500")


def useless_share(fn: Callable[[NoiseSchedule], float]) -> None:
    """fn(schedule) -> the share of t = 1..T whose signal-to-noise ratio is below 0.01."""
    for schedule in (linear_schedule(40, 2.5e-3, 0.4), linear_schedule(1000)):
        snr = schedule.snr[1:]
        right = (snr < 0.01).double().mean()
        got = torch.tensor(float(call(fn, schedule)), dtype=torch.float64)
        compare(got, right, {
            "that is the share of *useful* steps": 1 - right,
            "that is a number of steps, not a share: divide by T": right * schedule.T,
            "amplitudes were compared: the ratio is alpha_bar / (1 - alpha_bar), without roots":
                (snr.sqrt() < 0.01).double().mean(),
            "t = 0 was counted too: there are T steps, and entry 0 is the clean image": (
                schedule.snr < 0.01).double().mean(),
        }, f"a share of the T = {schedule.T} steps was wanted, count t with snr < 0.01; got {got:.4f}", atol=1e-6)
    passed(f"{100 * right:.0f} % of DDPM's linear steps have a signal-to-noise ratio below 0.01")


def _check_jump(fn: Callable[..., Tensor], schedule: NoiseSchedule) -> None:
    x0, eps = _pair(1)
    t = torch.tensor([0, 1, schedule.T // 2, schedule.T])
    got = call(fn, x0, t, eps, schedule)
    ab = schedule.alpha_bar[t].float().view(-1, 1, 1, 1)
    alpha = schedule.alpha[t].float().view(-1, 1, 1, 1)
    before = schedule.alpha_bar[(t - 1).clamp(min=0)].float().view(-1, 1, 1, 1)
    right = ab.sqrt() * x0 + (1 - ab).sqrt() * eps
    compare(got, right, {
        "the variance is (1 - alpha_bar)^2: did you forget the square root in front of eps?":
            ab.sqrt() * x0 + (1 - ab) * eps,
        "the image is multiplied by alpha_bar: did you forget the square root in front of x_0?":
            ab * x0 + (1 - ab).sqrt() * eps,
        "both square roots are missing": ab * x0 + (1 - ab) * eps,
        "signal and noise are swapped: at t = 0 nothing but x_0 is left": (1 - ab).sqrt() * x0 + ab.sqrt() * eps,
        "this is one small step, not the jump: eq. 4 has a bar on alpha, the product of all alphas so far":
            alpha.sqrt() * x0 + (1 - alpha).sqrt() * eps,
        "alpha_bar is off by one: alpha_bar[t] is the t-th, entry 0 belongs to the clean image":
            before.sqrt() * x0 + (1 - before).sqrt() * eps,
        "every image got the first one's time: t holds one time per image":
            lambda got: torch.allclose(got.to(x0), x0, atol=1e-4),
        "the result was clamped to [-1, 1]: noise must be free to leave the range":
            right.clamp(-1, 1),
        "eps was not used: the noise is an argument, so that it can be held fixed":
            lambda got: not torch.equal(got, call(fn, x0, t, eps, schedule)),
    }, "this is not sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps at t = 0, 1, T/2, T", shape_hint=COLUMNS)
    keeps_dtype(got, x0)


def _one_step(x: Tensor, eps: Tensor, beta: float) -> Tensor:
    return (1 - beta) ** 0.5 * x + beta**0.5 * eps


def _pair(seed: int) -> tuple[Tensor, Tensor]:
    rng = seeded(seed)
    return torch.rand(4, 3, 8, 8, generator=rng) * 2 - 1, torch.randn(4, 3, 8, 8, generator=rng)
