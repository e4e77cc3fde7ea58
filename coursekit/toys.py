"""Distributions whose best denoiser is a formula: ground truth for schedules, samplers and networks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from coursekit.denoisers import Denoiser, Prediction
from coursekit.diffusion import noise_like
from coursekit.schedules import Path


@dataclass(frozen=True)
class GaussianData:
    """x_0 ~ N(mean, var I): the one image distribution whose best denoiser is linear (Wiener)."""

    mean: float
    var: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and 0 < self.var < math.inf):
            raise ValueError(f"need a finite mean and a variance above 0, got {self.mean}, {self.var}")

    def sample(self, shape: tuple[int, ...], rng: torch.Generator | None = None) -> Tensor:
        """Draws of the given shape."""
        return self.mean + self.var**0.5 * noise_like(torch.empty(shape), rng)

    def denoiser(self, schedule: Path) -> Denoiser:
        """E[x_0 | x_t] = mean + a var / (a^2 var + s^2) (x_t - a mean)."""
        def denoise(x_t: Tensor, t: Tensor) -> Prediction:
            a, s = schedule.signal_and_noise(t, like=x_t)
            surprise = (x_t - a * self.mean) / (a**2 * self.var + s**2)
            return Prediction(x0=self.mean + a * self.var * surprise, eps=s * surprise)
        return denoise


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """Equally likely bumps N(means[k], var I). With var = 0: the training set itself, point by point.

    means: (k, ...) any image shape, finite floats; var >= 0. The denoiser of a training set is the
    closed form every network on that set is an approximation of, and it only ever remembers.
    """

    means: Tensor
    var: float = 0.0

    def __post_init__(self) -> None:
        m = self.means
        if m.ndim < 2 or len(m) == 0 or not m.is_floating_point() or not bool(m.isfinite().all()):
            raise ValueError("means must be finite floats (k, ...) with k >= 1, "
                             f"got {m.dtype} {tuple(m.shape)}")
        if not 0 <= self.var < math.inf:
            raise ValueError(f"the variance must be finite and at least 0, got {self.var}")

    def sample(self, n: int, rng: torch.Generator | None = None) -> Tensor:
        """n draws, (n, ...)."""
        device = rng.device if rng is not None else self.means.device
        bump = torch.randint(len(self.means), (n,), generator=rng, device=device).to(self.means.device)
        return self.means[bump] + self.var**0.5 * noise_like(self.means[bump], rng)

    def denoiser(self, schedule: Path) -> Denoiser:
        """E[x_0 | x_t]: each bump's own Wiener estimate, weighted by how likely it made x_t."""
        def denoise(x_t: Tensor, t: Tensor) -> Prediction:
            if x_t.shape[1:] != self.means.shape[1:]:
                raise ValueError(f"the bumps have shape {tuple(self.means.shape[1:])} each, "
                                 f"got x_t of shape {tuple(x_t.shape)}")
            # A distance is a small difference of large sums: half precision has no digits left for it.
            work = x_t.to(torch.promote_types(x_t.dtype, torch.float32))
            a, s = (c.flatten(1) for c in schedule.signal_and_noise(t, like=work))  # (b, 1)
            spread = (a**2 * self.var + s**2).clamp(min=torch.finfo(work.dtype).eps**2)
            x, m = work.flatten(1), self.means.to(work).flatten(1)
            # |x - a m|^2 - |x|^2, without the (b, k, pixels) difference
            distance = a**2 * m.square().sum(1) - 2 * a * (x @ m.T)
            nearest = distance.amin(1, keepdim=True)  # taken off first: at t = 0 it is the only one
            center = torch.softmax((nearest - distance) / (2 * spread), dim=1) @ m
            surprise = (x - a * center) / spread
            parts = (center + a * self.var * surprise, s * surprise)
            return Prediction(*(part.view_as(x_t).to(x_t.dtype) for part in parts))
        return denoise
