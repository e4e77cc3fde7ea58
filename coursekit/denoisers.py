"""Any network as `denoise(x_t, t) -> Prediction(x0, eps)`, and ways to combine such denoisers.

A sampler never asks what a network predicts, and guidance, anagrams and hybrids are denoisers made
of denoisers. x_t is (b, c, h, w); t is (b,), integers on a NoiseSchedule and floats on StraightPath.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from coursekit.diffusion import eps_from_x0, x0_eps_from_v, x0_from_eps
from coursekit.schedules import NoiseSchedule, Path


class Prediction(NamedTuple):
    """What a network's output says about x_t = a x_0 + s eps."""

    x0: Tensor
    eps: Tensor


Denoiser = Callable[[Tensor, Tensor], Prediction]  # (x_t, t) -> Prediction
Turn = Callable[[Tensor], Tensor]
View = Turn | tuple[Turn, Turn]  # a view that is its own inverse, or (view, inverse)


def from_eps(model: Callable[..., Tensor], schedule: Path, **cond: Any) -> Denoiser:
    """Read a noise-predicting network as a denoiser (DDPM, eq. 15). `cond`, as label=..., goes to it.

    ValueError if the schedule ends without signal: there eps does not tell x_0.
    """
    if isinstance(schedule, NoiseSchedule) and schedule.alpha_bar[-1] == 0:
        raise ValueError("a schedule with zero terminal SNR needs v- or x0-prediction: "
                         "at t = T the noise is the input and says nothing about x_0")

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        eps = _evaluate(model, x_t, t, cond)
        return Prediction(x0_from_eps(x_t, t, eps, schedule), eps)
    return denoise


def from_x0(model: Callable[..., Tensor], schedule: Path, **cond: Any) -> Denoiser:
    """Read a network that predicts the clean image as a denoiser. `cond` goes to the network."""
    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        x0 = _evaluate(model, x_t, t, cond)
        return Prediction(x0, eps_from_x0(x_t, t, x0, schedule))
    return denoise


def from_v(model: Callable[..., Tensor], schedule: Path, **cond: Any) -> Denoiser:
    """Read a velocity-predicting network as a denoiser (Salimans & Ho 2022). `cond` goes to it."""
    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        return Prediction(*x0_eps_from_v(x_t, t, _evaluate(model, x_t, t, cond), schedule))
    return denoise


def _evaluate(model: Callable[..., Tensor], x_t: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
    if isinstance(model, nn.Module):
        model.eval()  # the training loop switches back, so sampling in mid-training is safe
    out: Tensor = model(x_t, t, **cond)
    if out.shape != x_t.shape:
        raise ValueError(f"the network must return the shape of x_t, {tuple(x_t.shape)}, "
                         f"got {tuple(out.shape)}")
    return out


def switched(noisy: Denoiser, clean: Denoiser, at: float) -> Denoiser:
    """A denoiser that asks `noisy` at times t >= at and `clean` below.

    Guidance, for one, is worth its price only where the noise is strong (Kynkaanniemi et al. 2024).
    """
    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        early = t >= at
        if bool(early.any()) and not bool(early.all()):
            raise ValueError(f"all images of a batch must be on one side of t = {at}, got times {t.tolist()}")
        return (noisy if bool(early.all()) else clean)(x_t, t)
    return denoise


def retimed(denoise: Denoiser, own: NoiseSchedule, schedule: NoiseSchedule) -> Denoiser:
    """A denoiser trained on one schedule, to be asked for the times of another.

    What makes a picture x_t of some noise level is alpha_bar, not the number t. So the time of `schedule` is
    answered at the time of `own` whose log SNR is nearest; x_0 and eps then fit x_t on `schedule`, exactly.
    """
    if not isinstance(own, NoiseSchedule) or not isinstance(schedule, NoiseSchedule):
        raise ValueError("times are translated between two schedules of whole steps, got "
                         f"{type(own).__name__} and {type(schedule).__name__}")
    ours, theirs = (torch.logit(one.alpha_bar[1:], eps=1e-12) for one in (own, schedule))
    nearest = 1 + (ours[None] - theirs[:, None]).abs().argmin(1)
    nearest = torch.cat([torch.zeros(1, dtype=torch.long), nearest])  # (T + 1,), from their times to ours

    def answer(x_t: Tensor, t: Tensor) -> Prediction:
        schedule.signal_and_noise(t, like=x_t)  # says what is wrong with t
        x0 = denoise(x_t, nearest.to(t.device)[t.long()]).x0
        return Prediction(x0, eps_from_x0(x_t, t, x0, schedule))
    return answer


def clipped(denoise: Denoiser) -> Denoiser:
    """Keep the x_0 estimate in [-1, 1], as DDPM samples; eps is passed on as the network gave it."""
    def clip(x_t: Tensor, t: Tensor) -> Prediction:
        x0, eps = denoise(x_t, t)
        return Prediction(x0.clamp(-1, 1), eps)
    return clip


def guided(conditional: Denoiser, unconditional: Denoiser, w: float) -> Denoiser:
    """Classifier-free guidance: w = 0 ignores the label, 1 obeys it, above 1 exaggerates it.

    Papers disagree about the zero: Ho & Salimans 2022 write (1 + w) c - w u, whose w is ours less 1.
    """
    if not math.isfinite(w):
        raise ValueError(f"the guidance weight must be a finite number, got w = {w}")

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        pairs = zip(unconditional(x_t, t), conditional(x_t, t), strict=True)
        return Prediction(*(u + w * (c - u) for u, c in pairs))
    return denoise


def anagram(denoisers: Sequence[Denoiser], views: Sequence[View]) -> Denoiser:
    """One picture, several readings: the mean of what each denoiser sees in its own view.

    views[i] shows x_t to denoisers[i]; its inverse brings the answer back (Geng et al. 2024, eq. 4).
    A view must rearrange pixels (flip, turn, permute: any orthogonal map), or the noise is no longer
    white to the second reader. ValueError if an inverse does not undo its view.
    """
    if not denoisers or len(denoisers) != len(views):
        raise ValueError(f"one view for each denoiser, got {len(denoisers)} and {len(views)}")
    turns = [view if isinstance(view, tuple) else (view, view) for view in views]

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        seen = []
        for i, (read, (view, inverse)) in enumerate(zip(denoisers, turns, strict=True)):
            if not torch.allclose(inverse(view(x_t)), x_t, atol=1e-4):
                raise ValueError(f"views[{i}] is not undone by its inverse: give (view, inverse)")
            seen.append([inverse(part) for part in read(view(x_t), t)])
        return Prediction(*(torch.stack(parts).mean(0) for parts in zip(*seen, strict=True)))
    return denoise


def hybrid(low: Denoiser, high: Denoiser, kernel_size: int = 33, sigma: float = 2.0) -> Denoiser:
    """One picture from afar, another from near: low frequencies of `low`, high ones of `high`.

    Both parts use the same Gaussian, so they add up to the identity: hybrid(d, d) is d.
    """
    if kernel_size % 2 == 0 or kernel_size < 1 or not sigma > 0:
        raise ValueError(f"the blur needs an odd kernel_size and sigma > 0, got {kernel_size}, {sigma}")

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        if kernel_size // 2 >= min(x_t.shape[-2:]):
            raise ValueError(f"kernel_size {kernel_size} is too wide to reflect at the borders of "
                             f"{tuple(x_t.shape[-2:])} pixels")
        pairs = zip(low(x_t, t), high(x_t, t), strict=True)
        return Prediction(*(far_off(u) + (v - far_off(v)) for u, v in pairs))

    def far_off(x: Tensor) -> Tensor:
        return gaussian_blur(x, [kernel_size, kernel_size], [sigma, sigma])
    return denoise


def gaussian_blur(x: Tensor, kernel_size: list[int], sigma: list[float]) -> Tensor:
    """torchvision's blur of (b, c, h, w), imported only by those who blur: the import takes two seconds."""
    from torchvision.transforms import functional

    return functional.gaussian_blur(x, kernel_size, sigma)


def drop_labels(label: Tensor, p: float = 0.1, rng: torch.Generator | None = None) -> Tensor:
    """Each label (b,) becomes -1, "no label", with probability p, one coin per image.

    Networks of this course read -1 as unconditional, so one network learns both of guidance's halves.
    """
    if label.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64) or label.ndim != 1:
        raise ValueError("labels are integers of shape (b,) in a dtype that holds -1, "
                         f"got {label.dtype} {tuple(label.shape)}")
    if not 0 <= p <= 1:
        raise ValueError(f"p is a probability, got {p}")
    device = rng.device if rng is not None else label.device
    coin = torch.rand(label.shape, generator=rng, device=device).to(label.device)
    return torch.where(coin < p, torch.full_like(label, -1), label)
