"""What each recipe minimises: losses of (model, batch, rng), made for one path and one kind of prediction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coursekit import measures, two_stage
from coursekit.checkpoints import build_schedule, pretrained
from coursekit.data import Batch
from coursekit.denoisers import drop_labels
from coursekit.diffusion import (
    add_noise,
    noise_like,
    noise_prediction_loss,
    v_prediction_loss,
    x0_prediction_loss,
)
from coursekit.metrics import lpips
from coursekit.schedules import NoiseSchedule, VarianceExploding
from coursekit.straight import velocity_from_x0_loss

Loss = Callable[[nn.Module, Batch, torch.Generator], Tensor]
LOSSES = {"eps": noise_prediction_loss, "x0": x0_prediction_loss, "v": v_prediction_loss}
MNIST_VARIANCE = 0.38  # of a pixel in [-1, 1]


def denoising_loss(path: dict[str, Any], focus: tuple[float, float] | None = None, predicts: str = "v") -> Loss:
    """The loss of a prediction on a named schedule; labels, where the data has them, are not used."""
    schedule, loss = _focused(path, focus), LOSSES[predicts]
    return lambda model, batch, rng: loss(model, batch.x, schedule, rng)


def labelled_denoising_loss(path: dict[str, Any], drop: float, focus: tuple[float, float] | None = None,
                            predicts: str = "v") -> Loss:
    """The same with labels, each left out with probability `drop` so that guidance works."""
    schedule, loss = _focused(path, focus), LOSSES[predicts]
    return lambda model, batch, rng: loss(
        model, batch.x, schedule, rng, label=drop_labels(measures.labelled(batch.label), drop, rng))


def kernel_loss(perceptual_weight: float, below: float = 0.7, **more: Any) -> Loss:
    """The velocity's error on the straight path, and LPIPS where t < below; `more` as in `velocity_from_x0_loss`."""
    def seen(x: Tensor, y: Tensor) -> Tensor:
        return lpips(x.clamp(-1, 1), y)
    return lambda model, batch, rng: velocity_from_x0_loss(
        model, batch.x, rng, perceptual=seen if perceptual_weight else None, perceptual_below=below,
        perceptual_weight=perceptual_weight, **more)


def latent_loss(path: dict[str, Any], drop: float, focus: tuple[float, float] | None = None,
                predicts: str = "v") -> Loss:
    """The same on what the shipped `mnist-vqvae` encodes, normalised and before rounding."""
    schedule, loss = _focused(path, focus), LOSSES[predicts]
    return lambda model, batch, rng: two_stage.latent_loss(
        model, batch.x, frozen("mnist-vqvae", batch.x.device), rng, loss, schedule,
        drop_labels(measures.labelled(batch.label), drop, rng))


def coding_loss(model: nn.Module, batch: Batch, rng: torch.Generator) -> Tensor:
    """What decoding misses, in units of the variance of MNIST's pixels, and what book and encoder owe each other."""
    return two_stage.coding_loss(model, batch.x, MNIST_VARIANCE, rng)


def prior_loss(drop: float) -> Loss:
    """Nats for one code, of those in which the shipped `mnist-vqvae` writes the images, with labels as above."""
    return lambda model, batch, rng: two_stage.prior_loss(
        model, batch.x, frozen("mnist-vqvae", batch.x.device), drop_labels(measures.labelled(batch.label), drop, rng))


@cache
def frozen(name: str, device: torch.device) -> Any:
    """A shipped network whose weights take no gradient, loaded once."""
    return pretrained(name).requires_grad_(False).to(device)


def _focused(path: dict[str, Any], focus: tuple[float, float] | None) -> Any:
    schedule = build_schedule(path)
    if focus is None:
        return schedule
    if not isinstance(schedule, NoiseSchedule):
        raise ValueError(f"a focus belongs to a schedule of whole steps, got {focus} for {path.get('name')!r}")
    return replace(schedule, focus=focus)


def known_noise_loss(sigma: float) -> Loss:
    """How far x_0 is missed when the noise is always the same: x_0 + sigma eps (CS180, project 5, part B)."""
    path = VarianceExploding(sigma)

    def loss(model: nn.Module, batch: Batch, rng: torch.Generator) -> Tensor:
        return F.mse_loss(model(add_noise(batch.x, sigma, noise_like(batch.x, rng), path)), batch.x)
    return loss


def classification_loss(model: nn.Module, batch: Batch, rng: torch.Generator) -> Tensor:
    """Cross-entropy against slightly smoothed labels, so that features do not run away."""
    return F.cross_entropy(model(batch.x), measures.labelled(batch.label), label_smoothing=0.05)
