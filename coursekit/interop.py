"""Our networks under diffusers' schedulers, and diffusers' networks under our samplers.

diffusers counts its steps 0..T-1, all of them noisy; here t counts 1..T and 0 is clean. So their step i is
our t = i + 1, and that is nearly all there is to it. This module never imports diffusers: who has something
of it to hand over has imported it.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from coursekit.denoisers import Denoiser, Prediction, from_eps, from_v, from_x0
from coursekit.schedules import NoiseSchedule

PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}  # our word, their word
READERS = {"epsilon": from_eps, "sample": from_x0, "v_prediction": from_v}


def to_scheduler(kind: Any, schedule: NoiseSchedule, predicts: str) -> Any:
    """A scheduler of diffusers that samples a network of ours; `kind` is its class, as DDIMScheduler.

        scheduler = to_scheduler(DDIMScheduler, model.schedule, model.predicts)
        scheduler.set_timesteps(50)
        for i in scheduler.timesteps:
            x = scheduler.step(model(x, (i + 1).expand(len(x))), i, x).prev_sample

    Its times trail, so they start at T, where x is noise; when the number of steps divides T they are
    schedule.spaced(steps). x_0 is left as the network says it. Schedulers that count in sigmas, as Euler's,
    also want scheduler.scale_model_input(x, i) in place of the network's x.
    """
    if predicts not in PREDICTION_TYPES:
        raise ValueError(f"predicts must be one of {sorted(PREDICTION_TYPES)}, got {predicts!r}")
    if not isinstance(schedule, NoiseSchedule):
        raise ValueError(f"diffusers' schedulers walk a NoiseSchedule, got a {type(schedule).__name__}")
    known = inspect.signature(kind.__init__).parameters
    wanted = {"num_train_timesteps": schedule.T, "trained_betas": schedule.beta[1:].tolist(),
              "prediction_type": PREDICTION_TYPES[predicts], "clip_sample": False, "timestep_spacing": "trailing"}
    if not {"trained_betas", "prediction_type"} <= set(known):
        raise ValueError(f"a {kind.__name__} takes no trained_betas or no prediction_type, so it cannot walk "
                         "this schedule; DDIMScheduler and DDPMScheduler can")
    return kind(**{name: value for name, value in wanted.items() if name in known})


def from_diffusers(model: nn.Module, scheduler: Any, **cond: Any) -> tuple[Denoiser, NoiseSchedule]:
    """A network of diffusers, as UNet2DModel, ready for a sampler of ours: (denoise, schedule).

    What it predicts, on which schedule, and whether x_0 is clipped or thresholded, its `scheduler` knows.
    `cond` goes to the network under diffusers' names, as class_labels=...
    """
    schedule, kind = schedule_of(scheduler), scheduler.config.get("prediction_type")
    read = READERS.get(kind)
    if read is None:
        raise ValueError(f"a prediction_type is one of {sorted(READERS)}, got {kind!r}")
    return limited(read(_CountsFromOne(model), schedule, **cond), scheduler), schedule


def schedule_of(scheduler: Any) -> NoiseSchedule:
    """The NoiseSchedule that a scheduler of diffusers walks, with the clean image before its first step."""
    if not isinstance(getattr(scheduler, "betas", None), Tensor):
        raise ValueError(f"only a scheduler with betas has a NoiseSchedule, a {type(scheduler).__name__} has none")
    alpha = 1 - scheduler.betas.detach().cpu().double()
    return NoiseSchedule(torch.cat([torch.ones(1, dtype=torch.float64), alpha.cumprod(0)]))


def times_of(scheduler: Any, steps: int) -> list[int]:
    """The times that a scheduler of diffusers would walk in so many steps, in our count, down to 0.

    Their default spacing, "leading", starts well below T although x is pure noise there: with 20 steps of
    1000 at 951. Theirs are kept here so that results can be compared; schedule.spaced(steps) starts at T.
    """
    fresh = type(scheduler).from_config(scheduler.config)  # set_timesteps leaves its mark
    fresh.set_timesteps(steps)
    return [*(int(i) + 1 for i in fresh.timesteps), 0]


def limited(denoise: Denoiser, scheduler: Any) -> Denoiser:
    """Keep x_0 where a scheduler of diffusers would: thresholded, clipped, or as it is. eps is passed on."""
    config = scheduler.config
    if config.get("thresholding"):
        return thresholded(denoise, config.dynamic_thresholding_ratio, config.sample_max_value)
    if not config.get("clip_sample"):
        return denoise
    most = config.clip_sample_range

    def clip(x_t: Tensor, t: Tensor) -> Prediction:
        x0, eps = denoise(x_t, t)
        return Prediction(x0.clamp(-most, most), eps)
    return clip


def thresholded(denoise: Denoiser, quantile: float = 0.95, most: float = 1.5) -> Denoiser:
    """Dynamic thresholding: where guidance drives x_0 out of [-1, 1], shrink it instead of cutting it off.

    In each image s is the `quantile` of |x_0|, at least 1 and at most `most`; x_0 is clipped to [-s, s] and
    divided by s (Saharia et al. 2022, sec. 2.3). So an image that keeps to [-1, 1] is left alone.
    """
    if not (0 < quantile <= 1 and 1 <= most < math.inf):
        raise ValueError(f"a threshold needs a quantile in (0, 1] and a finite most of at least 1, "
                         f"got {quantile} and {most}")

    def shrink(x_t: Tensor, t: Tensor) -> Prediction:
        x0, eps = denoise(x_t, t)
        exact = x0 if x0.dtype in (torch.float32, torch.float64) else x0.float()  # quantile knows no half
        s = exact.abs().flatten(1).quantile(quantile, dim=1).clamp(1, most)
        s = s.view(-1, *[1] * (x0.ndim - 1))
        return Prediction((exact.clamp(-s, s) / s).to(x0.dtype), eps)
    return shrink


class _CountsFromOne(nn.Module):
    """A network of diffusers as `model(x_t, t)`: its steps count from 0 and its answer is in `.sample`."""

    def __init__(self, model: Any):
        super().__init__()
        self.model: Any = model

    def forward(self, x_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
        if bool((t < 1).any()):
            raise ValueError(f"a network of diffusers is asked for t >= 1 (their 0), got t = {t.min()}")
        answer: Tensor = self.model(x_t.to(self.model.dtype), t - 1, **cond).sample
        return answer.to(x_t.dtype)
