"""Networks that also learned how much noise each step should put back (Nichol & Dhariwal 2021).

Such a network says two channels for each of the image's: the noise, and where between two bounds the step's
variance lies. It is a denoiser like any other, which every sampler takes; `ddpm_learned` uses the variance too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from coursekit.denoisers import Denoiser, Prediction
from coursekit.diffusion import noise_like, posterior
from coursekit.samplers import Step, checked_times
from coursekit.schedules import NoiseSchedule


class LearnedPrediction(Prediction):
    """A prediction by a network that also learned how much noise a step should put back.

    `mix`, of the shape of x0: 0 asks for the posterior's variance, 1 for beta's; a network may go beyond both.
    Denoisers made of denoisers drop it, and so does whoever unpacks (x0, eps); `with_variance` keeps it.
    """

    mix: Tensor

    def __new__(cls, x0: Tensor, eps: Tensor, mix: Tensor) -> LearnedPrediction:
        self = super().__new__(cls, x0, eps)
        self.mix = mix
        return self


def with_variance(leading: Denoiser, combine: Callable[[Denoiser], Denoiser]) -> Denoiser:
    """Whatever `combine` makes of `leading`, with the variance that `leading` learned.

        with_variance(asked, lambda d: clipped(guided(d, unasked, 7)))

    `leading` is evaluated once. In an anagram let it be the reader whose view is the picture as it stands.
    """
    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        heard: list[Prediction] = []

        def overheard(x: Tensor, time: Tensor) -> Prediction:
            heard.append(leading(x, time))
            return heard[-1]

        x0, eps = combine(overheard)(x_t, t)
        return LearnedPrediction(x0, eps, _mix(heard[0] if heard else None))
    return denoise


@torch.no_grad()
def ddpm_learned(denoise: Denoiser, x: Tensor, schedule: NoiseSchedule, times: Sequence[int] | None = None,
                 rng: torch.Generator | None = None) -> Iterator[Step]:
    """Ancestral sampling, `ddpm`, with the variance that the network learned (Nichol & Dhariwal 2021, sec. 3.1).

    times: descending ints, every t from T to 0 by default. ValueError unless the denoiser says a variance.
    """
    for t, s in pairwise(checked_times(times, x, schedule, NoiseSchedule)):
        said = denoise(x, torch.full((len(x),), t, device=x.device))
        mean, std = posterior(said.x0, x, t, s, schedule)
        if s > 0:  # the last step puts nothing back
            std = learned_std(_mix(said), t, s, schedule)
        x = mean + std * noise_like(x, rng)
        yield Step(s, x, said.x0)


def learned_std(mix: Tensor, t: int, s: int, schedule: NoiseSchedule) -> Tensor:
    """The deviation of a step from t to s > 0: log var = mix log beta + (1 - mix) log beta~ (eq. 15 there).

    beta is the variance that the noising steps from s to t add, beta~ the posterior's.
    """
    ab_t, ab_s = schedule.alpha_bar[t].item(), schedule.alpha_bar[s].item()
    beta = 1 - ab_t / ab_s
    smallest = beta * (1 - ab_s) / (1 - ab_t)
    return torch.exp((mix * math.log(beta) + (1 - mix) * math.log(smallest)) / 2)


def _mix(said: Prediction | None) -> Tensor:
    mix = getattr(said, "mix", None)
    if mix is None:
        raise ValueError("this denoiser says no variance: sample it with ddpm, or make it by with_variance")
    return mix
