"""How much of the image survives, and how much noise joins it: x_t = a(t) x_0 + s(t) eps.

A *path* answers three questions: the pair (a, s) at a time, their rate of change (which defines the
velocity v), and which times to train on. Time runs one way everywhere: 0 is clean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Protocol

import torch
from torch import Tensor

Time = int | float | Tensor


class Path(Protocol):
    """Anything that can place a clean image and its noise on the way from one to the other."""

    def signal_and_noise(self, t: Time, like: Tensor) -> tuple[Tensor, Tensor]: ...

    def velocity_weights(self, t: Time, like: Tensor) -> tuple[Tensor, Tensor]: ...

    def draw_times(self, n: int, like: Tensor, rng: torch.Generator | None = None) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """How much of the image survives t noising steps, for t = 0, 1, ..., T.

    Everything follows from one sequence, `alpha_bar` (DDPM, eq. 4). Entry 0 is the clean image, so
    alpha_bar[0] = 1 and no caller special-cases the last step. Every derived sequence is T+1 long
    as well, so that `beta[t]` is the paper's beta_t, with beta[0] = 0.

    `focus` decides only where a training looks: None draws its times uniformly, (mean, std) as sigmoids of
    Gaussian draws (Esser et al. 2024), of which a mean above 0 puts more than half into the noisier half.

    Raises ValueError unless alpha_bar is a 1-D sequence falling strictly from 1 to 0 or above.
    """

    alpha_bar: Tensor  # (T+1,) float64
    focus: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        ab = self.alpha_bar
        if not isinstance(ab, Tensor):
            ab = torch.as_tensor(ab, dtype=torch.float64)  # a plain list would lose half its digits
        if ab.ndim != 1 or len(ab) < 2 or not ab.is_floating_point():
            raise ValueError(
                f"alpha_bar must be a 1-D float sequence of T+1 >= 2 numbers, got {_describe(ab)}"
            )
        ab = ab.detach().cpu().to(torch.float64)
        falls = torch.cat([ab[:1] == 1, (ab.diff() < 0) & (ab[1:] >= 0)])  # NaN fails here too
        if not bool(falls.all()):
            i = int(falls.int().argmin())
            after = f" after {ab[i - 1].item():g}" if i else ""
            raise ValueError("alpha_bar must fall strictly from 1 to 0 or above, "
                             f"got alpha_bar[{i}] = {ab[i].item():g}{after}")
        object.__setattr__(self, "alpha_bar", ab)
        pair = isinstance(self.focus, (tuple, list)) and len(self.focus) == 2
        if self.focus is not None and not (pair and math.isfinite(self.focus[0]) and 0 < self.focus[1] < math.inf):
            raise ValueError(f"focus is a finite mean and a deviation above 0, got {self.focus}")

    @property
    def T(self) -> int:
        """The number of noising steps."""
        return len(self.alpha_bar) - 1

    @property
    def alpha(self) -> Tensor:
        """alpha_t = alpha_bar_t / alpha_bar_{t-1}, (T+1,), alpha[0] = 1."""
        return torch.cat([self.alpha_bar[:1], self.alpha_bar[1:] / self.alpha_bar[:-1]])

    @property
    def beta(self) -> Tensor:
        """The variance each step adds, beta_t = 1 - alpha_t, (T+1,), beta[0] = 0."""
        return 1 - self.alpha

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio alpha_bar / (1 - alpha_bar), (T+1,), infinite at t = 0."""
        return self.alpha_bar / (1 - self.alpha_bar)

    def spaced(self, steps: int, power: float = 1.0) -> list[int]:
        """Times T = t_0 > ... > t_steps = 0 for a sampler that takes `steps` jumps: t_i = T (1 - i / steps)^power.

        They fall evenly at power 1; below 1 the jumps are shorter where the noise is strong.
        """
        if not _is_whole(steps) or not 1 <= steps <= self.T:
            raise ValueError(f"steps must be a whole number in 1..T = 1..{self.T}, got {steps!r}")
        if not power > 0:
            raise ValueError(f"the power must be greater than 0, got {power}")
        wanted = self.T ** (1 - power) * torch.linspace(self.T, 0, steps + 1, dtype=torch.float64) ** power
        times: list[int] = []
        for left, t in zip(range(steps, -1, -1), wanted.round().int().tolist(), strict=True):
            times.append(max(left, min(t, times[-1] - 1)) if times else t)  # no time twice
        return times

    def signal_and_noise(self, t: Time, like: Tensor) -> tuple[Tensor, Tensor]:
        """The pair (a, s) of x_t = a x_0 + s eps, shaped to multiply `like`.

        t: integers (b,) in 0..T, or one int for the whole batch. Raises ValueError otherwise.
        """
        t = _as_times(t, like, whole=True, last=self.T)
        # The root is taken in float64 before the cast: 1 - alpha_bar loses its digits near t = 0,
        # and mps has no float64 at all.
        a = self.alpha_bar.sqrt().to(like.dtype).to(like.device)
        s = (1 - self.alpha_bar).sqrt().to(like.dtype).to(like.device)
        return _column(a[t], like), _column(s[t], like)

    def velocity_weights(self, t: Time, like: Tensor) -> tuple[Tensor, Tensor]:
        """(a', s') with v = a' x_0 + s' eps: the derivative of (cos, sin) by the angle, (-s, a).

        This is v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (Salimans & Ho 2022, sec. 4).
        """
        a, s = self.signal_and_noise(t, like)
        return -s, a

    def draw_times(self, n: int, like: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """n training times in 1..T, uniform unless there is a focus, int64, on the device of `like`."""
        device = rng.device if rng is not None else like.device
        if self.focus is None:
            return torch.randint(1, self.T + 1, (n,), generator=rng, device=device).to(like.device)
        mean, std = self.focus
        share = torch.sigmoid(mean + std * torch.randn(n, generator=rng, device=device))  # in [0, 1]
        return (share * self.T).ceil().clamp(1, self.T).long().to(like.device)


def linear_schedule(T: int = 1000, beta_1: float = 1e-4, beta_T: float = 0.02) -> NoiseSchedule:
    """The schedule of DDPM, section 4: beta_t rises linearly from beta_1 to beta_T, both in (0, 1).

    The paper's betas belong to T = 1000. For another T multiply both by 1000 / T, or a good part
    of the image is still there at the end (22 % of its amplitude at T = 300).
    """
    if not (0 < beta_1 < 1 and 0 < beta_T < 1):
        raise ValueError(
            f"betas must lie strictly between 0 and 1, got beta_1={beta_1}, beta_T={beta_T}"
        )
    beta = torch.linspace(beta_1, beta_T, _whole_T(T), dtype=torch.float64)
    return NoiseSchedule(torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)]))


def cosine_schedule(T: int = 1000, s: float = 0.008) -> NoiseSchedule:
    """alpha_bar falls like a squared cosine (Nichol & Dhariwal 2021, eq. 17), betas capped at 0.999."""
    if not 0 <= s < math.inf:
        raise ValueError(f"the offset s must be finite and at least 0, got {s}")
    t = torch.arange(_whole_T(T) + 1, dtype=torch.float64) / T
    f = torch.cos((t + s) / (1 + s) * math.pi / 2) ** 2
    beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return NoiseSchedule(torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)]))


def zero_terminal_snr(schedule: NoiseSchedule) -> NoiseSchedule:
    """Shift and stretch sqrt(alpha_bar) so that nothing is left at T (Lin et al. 2023, algorithm 1).

    At t = T the noise is the input, so a network must predict v or x_0: eps says nothing there.
    The first noising step keeps its alpha_bar.
    """
    root = schedule.alpha_bar.sqrt()
    if schedule.T < 2:
        raise ValueError(f"a zero terminal SNR needs T >= 2, got T = {schedule.T}")
    first, final = root[1], root[-1]
    moved = (root[1:] - final) * first / (first - final)
    return replace(schedule, alpha_bar=torch.cat([schedule.alpha_bar[:1], moved**2]))


@dataclass(frozen=True)
class StraightPath:
    """x_t = (1 - t) x_0 + t eps for t in [0, 1]: the path of flow matching, 0 clean and 1 noise.

    Papers on flow matching often run the other way; here both kinds of time start clean.
    """

    T: float = 1.0

    def __post_init__(self) -> None:
        if self.T != 1.0:
            raise ValueError(f"the straight path ends at t = 1, got T = {self.T}")

    def spaced(self, steps: int) -> list[float]:
        """Times 1 = t_0 > ... > t_steps = 0, evenly spaced."""
        if not _is_whole(steps) or steps < 1:
            raise ValueError(f"a sampler takes a whole number of at least 1 step, got {steps!r}")
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()

    def signal_and_noise(self, t: Time, like: Tensor) -> tuple[Tensor, Tensor]:
        """The pair (1 - t, t), shaped to multiply `like`. t: floats (b,) in [0, 1], or one number."""
        s = _column(_as_times(t, like, whole=False, last=1.0), like)
        return 1 - s, s

    def velocity_weights(self, t: Time, like: Tensor) -> tuple[Tensor, Tensor]:
        """(-1, 1): along a straight line dx/dt = eps - x_0 at every t."""
        a, _ = self.signal_and_noise(t, like)
        return -torch.ones_like(a), torch.ones_like(a)

    def draw_times(self, n: int, like: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """n training times, uniform on [0, 1), in the dtype and on the device of `like`.

        Half precision rounds the last of them to 1.
        """
        device = rng.device if rng is not None else like.device
        return torch.rand(n, generator=rng, device=device).to(like)


@dataclass(frozen=True)
class VarianceExploding:
    """x = x_0 + sigma eps: the image keeps its size and the noise grows. Here t *is* a finite sigma >= 0."""

    sigma_max: float = math.inf

    def __post_init__(self) -> None:
        if not self.sigma_max > 0:
            raise ValueError(f"sigma_max must be positive, got {self.sigma_max}")

    def signal_and_noise(self, t: Time, like: Tensor) -> tuple[Tensor, Tensor]:
        """The pair (1, sigma), shaped to multiply `like`. t: floats (b,) in [0, sigma_max]."""
        s = _column(_as_times(t, like, whole=False, last=self.sigma_max), like)
        return torch.ones_like(s), s

    def velocity_weights(self, t: Time, like: Tensor) -> tuple[Tensor, Tensor]:
        """(0, 1): only the noise moves, dx/dsigma = eps."""
        a, _ = self.signal_and_noise(t, like)
        return torch.zeros_like(a), torch.ones_like(a)

    def draw_times(self, n: int, like: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """n noise levels, uniform on [0, sigma_max); ValueError if sigma_max is infinite."""
        if math.isinf(self.sigma_max):
            raise ValueError("to draw noise levels give VarianceExploding a finite sigma_max")
        device = rng.device if rng is not None else like.device
        return (torch.rand(n, generator=rng, device=device) * self.sigma_max).to(like)


def _whole_T(T: int) -> int:
    if not _is_whole(T) or T < 1:
        raise ValueError(f"T must be a whole number of at least 1 step, got {T!r}")
    return int(T)


def _is_whole(n: object) -> bool:
    return isinstance(n, Integral) and not isinstance(n, bool)  # NumPy's integers too


def _as_times(t: Time, like: Tensor, *, whole: bool, last: float) -> Tensor:
    """t as a tensor (b,) on the device of `like`, or a ValueError that says what is wrong with it."""
    if not isinstance(like, Tensor) or like.ndim < 1 or not like.is_floating_point():
        raise ValueError(f"images are float tensors (b, c, h, w), got {_describe(like)}")
    kind = "integers" if whole else "floats"
    if isinstance(t, (Integral, float)) and not isinstance(t, bool):
        if whole and not isinstance(t, Integral):
            raise ValueError(f"t must be {kind} in 0..{last}, got {t!r}")
        # In float64 until the range is checked: half precision would round 1.0001 to 1.
        t = torch.full((len(like),), t, dtype=torch.long if whole else torch.float64)
    if not isinstance(t, Tensor) or t.dtype == torch.bool or t.is_floating_point() == whole:
        raise ValueError(f"t must be {kind} of shape (b,), got {_describe(t)}")
    if t.shape != (len(like),):
        raise ValueError(f"one time per image: t must have shape ({len(like)},), got {tuple(t.shape)}")
    if not bool(((t >= 0) & (t <= last) & (t < math.inf)).all()):  # NaN fails here too
        low, high = t.min().item(), t.max().item()
        raise ValueError(f"t must lie in 0..{last:g} (0 is clean), got values from {low:g} to {high:g}")
    # uint8 would index as a mask
    return t.to(like.device, torch.long) if whole else t.to(like.dtype).to(like.device)


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


def _describe(x: object) -> str:
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')} tensor of shape {tuple(x.shape)}"
    return f"{x!r} ({type(x).__name__})"
