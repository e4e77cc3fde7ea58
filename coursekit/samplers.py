"""Walk the times down: generators that yield a Step after every jump.

Plotting, early stopping and saving are ordinary `for` loops over them; `last(ddim(...))` keeps the
end. x is (b, c, h, w); `times` descend, as `schedule.spaced(50)` gives them. ValueError for times
that do not descend or leave the schedule, and for an x that is not finite floats.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from coursekit.denoisers import Denoiser
from coursekit.diffusion import add_noise, noise_like, posterior
from coursekit.schedules import NoiseSchedule, Path, StraightPath


class Step(NamedTuple):
    """Where the walk stands after a jump."""

    t: int | float
    x: Tensor  # x_t
    x0: Tensor  # the denoiser's guess at x_0 when it made x_t


@torch.no_grad()
def ddpm(denoise: Denoiser, x: Tensor, schedule: NoiseSchedule, times: Sequence[int] | None = None,
         rng: torch.Generator | None = None) -> Iterator[Step]:
    """Ancestral sampling: draw each x_s from q(x_s | x_t, x_0 guess) (DDPM, algorithm 2).

    times: descending ints, every t from T to 0 by default. The variance is the posterior's
    ("fixed small"); the paper's other choice, beta_t, is what it would be for x_0 ~ N(0, I).
    """
    times = checked_times(times, x, schedule, NoiseSchedule)
    for t, s in pairwise(times):
        x0 = denoise(x, _batch_of(t, x)).x0
        mean, std = posterior(x0, x, t, s, schedule)
        x = mean + std * noise_like(x, rng)
        yield Step(s, x, x0)


@torch.no_grad()
def ddim(denoise: Denoiser, x: Tensor, schedule: NoiseSchedule, times: Sequence[int],
         eta: float = 0.0, rng: torch.Generator | None = None) -> Iterator[Step]:
    """Jump down the list of `times`, yielding after each jump (DDIM, eq. 12).

    eta = 0 is deterministic; eta = 1 over every t is DDPM's ancestral sampler.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in 0..1, got {eta}")
    times = checked_times(times, x, schedule, NoiseSchedule)
    for t, s in pairwise(times):
        x0, eps = denoise(x, _batch_of(t, x))
        ab_t, ab_s = schedule.alpha_bar[t].item(), schedule.alpha_bar[s].item()
        sigma = eta * ((1 - ab_s) / (1 - ab_t) * (1 - ab_t / ab_s)) ** 0.5
        x = ab_s**0.5 * x0 + max(1 - ab_s - sigma**2, 0.0) ** 0.5 * eps
        if sigma > 0:
            x = x + sigma * noise_like(x, rng)
        yield Step(s, x, x0)


@torch.no_grad()
def euler(denoise: Denoiser, x: Tensor, schedule: StraightPath,
          times: Sequence[float]) -> Iterator[Step]:
    """Follow dx/dt = eps - x_0 down the straight path, one evaluation a jump (Liu et al. 2023)."""
    for t, s in pairwise(checked_times(times, x, schedule, StraightPath)):
        x0, eps = denoise(x, _batch_of(t, x))
        x = x + (s - t) * (eps - x0)
        yield Step(s, x, x0)


@torch.no_grad()
def heun(denoise: Denoiser, x: Tensor, schedule: StraightPath,
         times: Sequence[float]) -> Iterator[Step]:
    """Euler's jump, then again with the mean of the slopes at both ends (EDM, algorithm 1).

    The last jump, onto t = 0, is Euler's: there is no noise left to predict. 2 n - 1 evaluations.
    """
    for t, s in pairwise(checked_times(times, x, schedule, StraightPath)):
        x0, eps = denoise(x, _batch_of(t, x))
        slope = eps - x0
        if s > 0:
            x0, eps = denoise(x + (s - t) * slope, _batch_of(s, x))
            slope = (slope + eps - x0) / 2
        x = x + (s - t) * slope
        yield Step(s, x, x0)


@torch.no_grad()
def inpaint(denoise: Denoiser, x: Tensor, schedule: NoiseSchedule, times: Sequence[int], *,
            known: Tensor, mask: Tensor, resample: int = 1,
            rng: torch.Generator | None = None) -> Iterator[Step]:
    """Paint anew where mask = 1; where mask = 0 return `known` exactly (RePaint, algorithm 1).

    After each ancestral jump to s the known region is replaced by `known` noised to s. With
    resample > 1 every jump is taken that often, noising back from s to t in between, so that the new
    pixels can agree with the old: Lugmayr et al. 2022. mask: (h, w) up to x's shape, zeros and ones.
    """
    times = checked_times(times, x, schedule, NoiseSchedule)
    if known.shape != x.shape or not known.is_floating_point():
        raise ValueError(f"known must be floats in the shape of x, {tuple(x.shape)}, "
                         f"got {known.dtype} {tuple(known.shape)}")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("the mask must hold zeros (keep) and ones (paint anew) only, "
                         f"got values from {mask.min():g} to {mask.max():g}")
    sides = zip(reversed(mask.shape), reversed(x.shape), strict=False)
    if mask.ndim > x.ndim or any(m not in (1, n) for m, n in sides):
        raise ValueError(f"the mask must fit images of shape {tuple(x.shape)}, got {tuple(mask.shape)}")
    if resample < 1:
        raise ValueError(f"each jump is taken at least once, got resample = {resample}")
    mask, known = mask.to(x).expand(x.shape), known.to(x)
    for t, s in pairwise(times):
        for again in reversed(range(resample)):
            x0 = denoise(x, _batch_of(t, x)).x0
            mean, std = posterior(x0, x, t, s, schedule)
            kept = add_noise(known, s, noise_like(x, rng), schedule)
            x = torch.where(mask == 1, mean + std * noise_like(x, rng), kept)
            if again:
                keep = (schedule.alpha_bar[t] / schedule.alpha_bar[s]).item()  # q(x_t | x_s)
                x = keep**0.5 * x + (1 - keep) ** 0.5 * noise_like(x, rng)
        yield Step(s, x, x0)


def start_from(x0: Tensor, t: int | float, schedule: Path,
               rng: torch.Generator | None = None) -> Tensor:
    """x_t to start a sampler from, instead of pure noise (SDEdit, Meng et al. 2022).

    Then walk down from t: `times = [u for u in schedule.spaced(50) if u <= t]`, with t one of them.
    """
    return add_noise(x0, t, noise_like(x0, rng), schedule)


def last(steps: Iterable[Step]) -> Step:
    """Run a sampler to its end and return only the final step."""
    end = deque(steps, maxlen=1)
    if not end:
        raise ValueError("there is no last step: the iterator was empty, or has been used up")
    return end.pop()


def _batch_of(t: int | float, x: Tensor) -> Tensor:
    return torch.full((len(x),), t, device=x.device, dtype=torch.long if isinstance(t, int) else x.dtype)


def checked_times(times: Sequence | None, x: Tensor, schedule: NoiseSchedule | StraightPath,
             kind: type) -> list:
    """The times as plain numbers, once they, x and the kind of path are known to make sense."""
    if not isinstance(schedule, kind):
        raise ValueError(f"this sampler walks a {kind.__name__}, got a {type(schedule).__name__}")
    if not isinstance(x, Tensor) or not x.is_floating_point() or not bool(x.isfinite().all()):
        raise ValueError("a sampler starts from finite floats (b, c, h, w), usually standard normal noise")
    times = range(int(schedule.T), -1, -1) if times is None else times
    if not isinstance(times, Iterable):
        raise ValueError(f"times must be a descending list, as schedule.spaced(50) gives it, got {times!r}")
    plain = [float(t) for t in times]
    if len(plain) < 2:
        raise ValueError(f"times must descend, at least two of them, got {plain}")
    for t, s in pairwise(plain):
        if not t > s:  # NaN fails here too
            raise ValueError(f"times must descend, at least two of them, got {s:g} after {t:g}")
    whole = kind is NoiseSchedule
    for t in plain:
        if not 0 <= t <= schedule.T or (whole and not t.is_integer()):
            numbers = "whole numbers" if whole else "numbers"
            raise ValueError(f"times must be {numbers} in 0..{schedule.T:g}, got {t:g}")
    return [int(t) for t in plain] if whole else plain
