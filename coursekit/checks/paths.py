"""Checks of notebook 12: times as codes, the velocity's error, a gate for a perceptual loss, and a jump of Euler's."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from coursekit.checks.core import CheckFailed, call, compare, passed, rand, randn


def time_code(fn: Callable[[Tensor, int], Tensor]) -> None:
    """fn(t (b,) in [0, 1], width) -> (b, width): sines, then cosines, of 1000 t / 10000^(2 k / width)."""
    t, width = torch.tensor([0.0, 0.013, 0.5, 0.77, 1.0]), 16

    def waves(t: Tensor, sign: int = -1) -> Tensor:
        angle = t[:, None] * 10_000 ** (sign * torch.arange(width // 2) / (width // 2))
        return torch.cat([angle.sin(), angle.cos()], 1)
    right = waves(1000 * t)
    compare(call(fn, t, width), right, {
        "time is fed unscaled: between t = 0 and t = 1 hardly one of the angles moves; 1000 t": waves(t),
        "2 pi t instead of 1000 t: only the fastest wave turns once; 1000 t": waves(2 * math.pi * t),
        "1000 (1 - t): our t is 0 on a clean picture, and so is the angle": waves(1000 * (1 - t)),
        "cosines come first: sines, then cosines": right.roll(width // 2, 1),
        "sines and cosines alternate: first all sines": right.view(-1, 2, width // 2).mT.flatten(1),
        "the frequencies rise to 10000: they fall from 1, the exponent is negative": waves(1000 * t, 1),
        "the angles are right, their sines and cosines are missing": lambda got: bool(got.abs().max() > 2),
    }, "sin and cos of 1000 t / 10000^(2 k / width) were wanted, k = 0 .. width / 2 - 1", atol=2e-3,
        shape_hint=": half of them sines, half cosines")
    passed("times in [0, 1] turn the angles as far as a thousand steps do")


def velocity_loss(fn: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]) -> None:
    """fn(model, x0, t (b,), eps) -> mean of ((model(x_t, t) - x0) / max(t, 0.05))^2, with x_t = (1 - t) x0 + t eps."""
    x0, eps = randn(5, 3, 4, 4, seed=8), randn(5, 3, 4, 4, seed=9)
    t = torch.tensor([0.004, 0.03, 0.2, 0.6, 1.0])
    column = t.view(-1, 1, 1, 1)
    model = _Witness()
    got = call(fn, model, x0, t, eps)
    if len(model.seen) != 1:
        raise CheckFailed(f"the network should be asked once for the whole batch, it was asked {len(model.seen)} times")
    x_t, told = model.seen[0]
    compare(x_t, (1 - column) * x0 + column * eps, {
        "the path runs the wrong way: at t = 0 stands the clean picture, (1 - t) x0 + t eps": column * x0 + (
            1 - column) * eps,
        "noised as in DDPM, by roots: the straight path is (1 - t) x0 + t eps": (1 - column).sqrt() * x0
            + column.sqrt() * eps,
        "noised by the clamped t: the clamp belongs under the error and nowhere else": torch.lerp(
            x0, eps, column.clamp(min=0.05)),
        "the network was shown the clean picture": x0,
        "the network was shown the noise": eps,
        "the noise was added and the picture not dimmed: (1 - t) x0 + t eps": x0 + column * eps,
    }, "the network should be shown x_t = (1 - t) x0 + t eps")
    compare(told, t, {
        "the network is told 1 - t": 1 - t,
        "the network is told 1000 t: this one scales its time itself, and takes t in [0, 1]": 1000 * t,
        "the network is told the clamped t: the clamp belongs under the error and nowhere else": t.clamp(min=0.05),
    }, "the network should be told t as it is")
    guess = model.answer(x_t, t).detach()
    error, below = guess - x0, column.clamp(min=0.05)
    compare(got.detach() if isinstance(got, Tensor) else got, (error / below).square().mean(), {
        "nothing keeps t from 0: below t = 0.05 the factor 1 / t^2 runs away; t.clamp(min=0.05)": (
            error / column).square().mean(),
        "the plain error of x_0 (the x-loss): divide it by the clamped t, and the error of the *velocity* is what you "
        "square": error.square().mean(),
        "divided by t after squaring: the velocity is off by error / t, and that is squared": (
            error.square() / below).mean(),
        "1 - t was clamped: in papers whose time runs the other way noise is at 0. Here v = (x_t - x0) / t": (
            error / (1 - column).clamp(min=0.05)).square().mean(),
        "multiplied by t": (error * below).square().mean(),
        "the velocity of the guess was held against x0: the target is the velocity eps - x0": (
            (x_t - guess) / below - x0).square().mean(),
        "the guess at x_0 was held against the velocity": (guess - (eps - x0)).square().mean(),
        "the target is eps - x0 and the guess (x_t - x0_hat) / max(t, 0.05): below 0.05 they do not belong together. "
        "Divide both by the same": ((x_t - guess) / below - (eps - x0)).square().mean(),
        "absolute values where squares were wanted": (error / below).abs().mean(),
        "a sum where a mean was wanted": (error / below).square().sum(),
        "clamped from above: t.clamp(min=0.05)": (error / column.clamp(max=0.05)).square().mean(),
    }, "the mean of ((guess - x0) / max(t, 0.05))^2 was wanted", shape_hint=": one number for the batch")
    if not got.requires_grad:
        raise CheckFailed("no gradient reaches the network: is there a detach or a no_grad?")
    passed("the velocity's error: 1 / t times that of x_0, and never more than twenty times")


def gated(fn: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """fn(error (b,), seen (b,), t (b,)) -> mean of error + 0.1 seen where t < 0.7, of error elsewhere. A scalar."""
    error, seen = 1 + rand(8, seed=10), 5 + 10 * rand(8, seed=11)
    t = torch.tensor([0.05, 0.2, 0.4, 0.69, 0.71, 0.8, 0.9, 1.0])
    gate = (t < 0.7).float()
    compare(call(fn, error, seen, t), (error + 0.1 * gate * seen).mean(), {
        "the gate is the wrong way round: LPIPS where t < 0.7, where there is something to see": (
            error + 0.1 * (1 - gate) * seen).mean(),
        "there is no gate: at t = 1 LPIPS pays for made-up fur": (error + 0.1 * seen).mean(),
        "the mean runs over the gated images alone, so two of them would weigh as much as thirty: multiply by the gate "
        "and take the mean over the batch": error.mean() + 0.1 * seen[t < 0.7].mean(),
        "the gate shuts off the error too: it is LPIPS alone that is gated": (gate * (error + 0.1 * seen)).mean(),
        "images above the gate were left out altogether, error and all: it is LPIPS alone that is gated": (
            error + 0.1 * seen)[t < 0.7].mean(),
        "the weight is missing: 0.1 times LPIPS": (error + gate * seen).mean(),
        "the weight is on the wrong one": (0.1 * error + gate * seen).mean(),
        "LPIPS is missing": error.mean(),
        "LPIPS *instead of* the error below 0.7: it is added": torch.where(t < 0.7, 0.1 * seen, error).mean(),
        "a sum where a mean was wanted": (error + 0.1 * gate * seen).sum(),
        "a gate by degrees: it is open below 0.7 and shut above": (error + 0.1 * (1 - t) * seen).mean(),
    }, "the mean of error + 0.1 (t < 0.7) seen was wanted", shape_hint=": one number for the batch")
    passed("LPIPS joins below t = 0.7, and the batch stays the unit")


def euler_jump(fn: Callable[[Tensor, Tensor, float, float], Tensor]) -> None:
    """fn(x_t, x0, t, s) -> x_s on the straight line through x_t and the guess x0: x_t + (s - t) (x_t - x0) / t."""
    x, x0 = randn(2, 3, 4, 4, seed=12), randn(2, 3, 4, 4, seed=13)
    for t, s in ((0.8, 0.5), (1.0, 0.75), (0.25, 0.0)):
        v = (x - x0) / t
        compare(call(fn, x, x0, t, s), x + (s - t) * v, {
            "uphill: s is smaller than t, so the step s - t is negative": x + (t - s) * v,
            "the velocity was divided by 1 - t: in papers whose time runs the other way. Here v = (x_t - x0) / t":
                t != 1 and x + (s - t) * (x - x0) / (1 - t),
            "the velocity is not divided by t": x + (s - t) * (x - x0),
            "all the way to the guess in one jump: only as far as s": s > 0 and x0,
            "nothing moved": x,
            "divided by s: the velocity is that of where you stand, at t": s > 0 and x + (s - t) * (x - x0) / s,
            "the jump is as long as t whatever s is": x - t * v if s > 0 else False,
            "x_t and the guess are swapped: s / t of x_t stays": x * (1 - s / t) + x0 * (s / t),
        }, f"from t = {t} to s = {s}: x_t + (s - t) (x_t - x0) / t was wanted")
    passed("along the straight line from x_t to the guess, as far as s")


class _Witness(nn.Module):
    """A network that answers (a + t) x_t + b and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(0.1))
        self.seen: list[tuple[Tensor, Tensor]] = []

    def answer(self, x_t: Tensor, t: Tensor) -> Tensor:
        return (self.a + t.view(-1, 1, 1, 1)) * x_t + self.b

    def forward(self, x_t: Tensor, t: Tensor | None = None) -> Tensor:
        if not isinstance(t, Tensor) or t.shape != (len(x_t),):
            raise CheckFailed("the network is not told its times: model(x_t, t), with t of shape (b,)")
        self.seen.append((x_t.detach().clone(), t.detach().clone()))
        return self.answer(x_t, t)
