"""Training on the straight path x_t = (1 - t) x_0 + t eps with a network that predicts x_0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from coursekit.diffusion import noise_like

Times = Callable[[int, Tensor, torch.Generator | None], Tensor]  # how many, like what -> (n,)


def logit_normal_times(n: int, like: Tensor, rng: torch.Generator | None = None,
                       mean: float = 0.8, std: float = 0.8) -> Tensor:
    """n times in (0, 1), the sigmoids of Gaussian draws: most in the middle, few at the ends.

    With mean 0 half the times lie above 0.5; a larger mean trains on noisier images. (Esser et al.
    2024; Li & He 2025 use (-0.8, 0.8) with their time running the other way.)
    """
    device = rng.device if rng is not None else like.device
    return torch.sigmoid(mean + std * torch.randn(n, generator=rng, device=device)).to(like)


def velocity_from_x0_loss(model: nn.Module, x0: Tensor, rng: torch.Generator | None = None,
                          times: Times = logit_normal_times, clamp: float = 0.05,
                          perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
                          perceptual_below: float = 0.7, perceptual_weight: float = 0.1,
                          **cond: Any) -> Tensor:
    """Squared error of the velocity v = (x_t - x_0) / t that the network's x_0 implies. A scalar.

    So the error of x_0 is divided by t: at t = 0.1 it counts a hundred times what it does at 1 (Li & He
    2025, the v-loss of an x-prediction). Below t = `clamp` that division stops growing; clamp = 1 is
    the plain loss on x_0. `times` draws the training times: StraightPath().draw_times draws them
    uniformly. `perceptual(x, y) -> (b,)` is added with its weight to the images whose
    t < perceptual_below: on noisier ones the best guess is a blurred average, and a loss that
    punishes blur would teach it to make textures up. `cond` goes to the model.

    The noise is drawn where `rng` lives: on a GPU give it a generator of the GPU.
    """
    if not 0 < clamp <= 1:
        raise ValueError(f"clamp must lie above 0 and up to 1, got {clamp}")
    t = times(len(x0), x0, rng)
    column = t.view(-1, *[1] * (x0.ndim - 1))
    x_t = torch.lerp(x0, noise_like(x0, rng), column)  # no check of t: on a GPU it would wait for it
    guess = model(x_t, t, **cond).to(x0.dtype)
    if not len(x0) or guess.shape != x0.shape:
        raise ValueError(f"the network must return the shape of x_0, at least one image: {tuple(x0.shape)}, "
                         f"got {tuple(guess.shape)}")
    loss = ((guess - x0) / column.clamp(min=clamp)).square().mean()
    if perceptual is not None:
        gate = (t < perceptual_below).to(x0.dtype)
        loss = loss + perceptual_weight * (gate * perceptual(guess, x0)).mean()
    return loss
