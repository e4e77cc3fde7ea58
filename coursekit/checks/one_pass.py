"""Checks of notebook 03, beside its network: the noise level, the loss, the best answer, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from coursekit.checks.core import CheckFailed, call, compare, passed, seeded
from coursekit.checks.unets import filled
from coursekit.nets import Cs180UNet


def noisy(fn: Callable[[Tensor, float, Tensor], Tensor]) -> None:
    """fn(x0, sigma, eps): x0 in [-1, 1] under the noise that is called sigma on images in [0, 1]."""
    rng = seeded(0)
    x0, eps = torch.rand(4, 1, 6, 6, generator=rng) * 2 - 1, torch.randn(4, 1, 6, 6, generator=rng)
    for sigma in (0.2, 0.5, 1.0, 0.0):
        unit = (x0 + 1) / 2 + sigma * eps
        compare(call(fn, x0, sigma, eps), x0 + 2 * sigma * eps, {
            "half the noise: sigma = 0.5 was meant for pictures in [0, 1]; ours are stretched by the factor two, "
            "and so must the noise be": x0 + sigma * eps,
            "that picture runs over [0, 1]: the course's are in [-1, 1], so stretch it back (2 z - 1)": unit,
            "the clean picture is stretched as well: it is in [-1, 1] already, only the noise is doubled":
                2 * x0 + 2 * sigma * eps,
            "the noise is halved where it should be doubled": x0 + sigma / 2 * eps,
            "noise may push a pixel beyond -1 or 1: do not clamp, the network would never see its tails":
                (x0 + 2 * sigma * eps).clamp(-1, 1),
            "the picture fades as the noise grows, as in DDPM: here it keeps its full strength":
                (1 - sigma) * x0 + 2 * sigma * eps,
        }, f"at sigma = {sigma} this is not x_0 + 2 sigma eps")
    passed("on [-1, 1] the project's sigma = 0.5 is noise of standard deviation 1.0, and sigma = 0 changes nothing")


class _Remembers(nn.Module):
    """Answers a part of what it is shown, and keeps that. Not a half: there digit and noise are missed alike."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.3))
        self.seen: Tensor | None = None

    def forward(self, z: Tensor, *rest: Any) -> Tensor:
        if z.dtype != self.gain.dtype:
            raise CheckFailed(f"the network was shown {z.dtype}, and its weights are {self.gain.dtype}")
        self.seen = z.detach()
        return self.gain * z


def known_noise_loss(fn: Callable[..., Tensor]) -> None:
    """fn(model, x0, rng): the mean squared error of model(x0 + 1.0 eps) against x0."""
    model, rng = _Remembers(), seeded(0)
    x0 = torch.rand(8, 1, 28, 28, generator=rng) * 2 - 1
    got, eps = _asked(fn, model, x0, rng.manual_seed(1))
    again = _asked(fn, model, x0, rng)[1]
    same = _asked(fn, model, x0, rng.manual_seed(1))[1]
    deviation = eps.std().item()
    for sentence, wrong in {
        "the network was shown the clean digits: add noise before you ask": bool((eps == 0).all()),
        "the same noise at every step, so that the network can learn it by heart: draw inside the loss":
            torch.equal(eps, again),
        "the same seed gives other noise: hand rng on, noise_like(x0, rng)": not torch.equal(eps, same),
        "all digits of a batch share one noise: draw as many as there are digits":
            torch.allclose(eps[0], eps[1], atol=1e-5),
        "the noise is never negative: torch.rand is uniform, noise is torch.randn": bool((eps > -1e-6).all()),
        "the noise is half as strong as it should be: the project's 0.5 belongs to pictures in [0, 1]; on [-1, 1] it "
        "is 1.0": abs(deviation - 0.5) < 0.03,
        f"the noise has standard deviation {deviation:.2f}: sigma = 0.5 of the project is 1.0 on [-1, 1]":
            abs(deviation - 1) > 0.03,
    }.items():
        if wrong:
            raise CheckFailed(sentence)
    if isinstance(got, Tensor) and got.ndim:
        raise CheckFailed(f"the loss is one number for the whole batch, got {tuple(got.shape)}: end in .mean()")
    z = x0 + eps
    answer = model.gain.detach() * z
    error = answer - x0
    compare(got, error.square().mean(), {
        "the answer is compared with what was shown: the target is the clean digit x_0": (answer - z).square().mean(),
        "the answer is compared with the noise: that is DDPM's loss, notebook 04; here the target is x_0":
            (answer - eps).square().mean(),
        "the squares are summed: their mean does not change with the size of the batch": error.square().sum(),
        "that is the mean absolute error: its best answer is the median; square it": error.abs().mean(),
        "that is the root of the mean square: leave the root away": error.square().mean().sqrt(),
    }, "not the mean of (model(z) - x_0)^2 over all pixels of all digits")
    if not got.requires_grad:
        raise CheckFailed("the loss has no gradient: no .item(), .detach() or torch.no_grad() on the way to it")
    passed("fresh noise of standard deviation 1.0 in every call, and the mean squared distance to the clean digit")


def _asked(fn: Callable[..., Tensor], model: _Remembers, x0: Tensor, rng: torch.Generator) -> tuple[Any, Tensor]:
    """What the loss said, and the noise that it had added."""
    model.seen = None
    got = call(fn, model, x0, rng)
    if model.seen is None or model.seen.shape != x0.shape:
        raise CheckFailed("the network was not asked: call model(z) once, with all digits of the batch")
    return got, model.seen - x0


def best_denoiser(fn: Callable[[Tensor, float, Tensor], Tensor]) -> None:
    """fn(z (b, c, h, w), s, digits (n, c, h, w)): the mean of digits, weighted by how well each explains z."""
    rng = seeded(5)
    digits = torch.rand(7, 1, 3, 3, generator=rng) * 2 - 1
    z = digits[:4] + 0.7 * torch.randn(4, 1, 3, 3, generator=rng)
    x, far = digits.flatten(1), torch.cdist(z.flatten(1), digits.flatten(1))

    def mean(score: Tensor, dim: int = 1) -> Tensor:
        return (score.softmax(dim) @ x).view_as(z)

    for s in (0.7, 1.6):
        compare(call(fn, z, s, digits), mean(-far**2 / (2 * s**2)), {
            "s is not squared: a Gaussian's exponent has its variance": mean(-far**2 / (2 * s)),
            "the 2 is missing: the exponent of a Gaussian is -distance^2 / (2 s^2)": mean(-far**2 / s**2),
            "the distance is not squared": mean(-far / (2 * s**2)),
            "the squares are averaged over the pixels: log-likelihoods of independent pixels add up, so sum them":
                mean(-far**2 / 9 / (2 * s**2)),
            "the sign is upside down: the farthest digit gets the largest weight": mean(far**2 / (2 * s**2)),
            "softmax over the wrong dimension: for each z the weights of all digits sum to 1":
                mean(-far**2 / (2 * s**2), 0),
            "that is the nearest digit: the others explain z a little, too": digits[far.argmin(1)],
            "that is the mean of all digits, whatever z": x.mean(0).view(1, 1, 3, 3).expand_as(z),
        }, "not the softmax-weighted mean of the digits, with the weights exp(-|z - x_k|^2 / (2 s^2))",
            shape_hint=": weights times flattened digits are (b, c h w), so end in .view_as(z)")
    large = torch.rand(5, 1, 28, 28, generator=rng) * 2 - 1
    found = call(fn, large[:2] + 0.1 * torch.randn(2, 1, 28, 28, generator=rng), 0.1, large)
    if not bool(found.isfinite().all()):
        raise CheckFailed("0 / 0 on real digits: exp(-thousands) is 0 for every digit; torch.softmax takes off the "
                          "largest exponent first")
    compare(found, large[:2], {
        "all weights became 0: exp(-thousands) is nothing, and the small number below it only hides that; "
        "torch.softmax takes off the largest exponent first": torch.zeros_like(found),
    }, "at little noise the answer should be the digit itself")
    passed("the nearest digit at little noise, the mean of all at much, and Bayes' rule between")


def multiply_adds(fn: Callable[[nn.Module, Tensor, Tensor], int]) -> None:
    """fn(layer, x, y): how often `layer` multiplies and adds for one image of the batch x to get y."""
    cases: list[tuple[Any, Tensor]] = [
        (nn.Conv2d(3, 5, 3, stride=2, padding=1), torch.zeros(2, 3, 8, 8)),
        (nn.ConvTranspose2d(3, 5, 4, stride=2, padding=1), torch.zeros(2, 3, 8, 8)),
        (nn.Linear(6, 4), torch.zeros(2, 6))]
    for layer, x in cases:
        y, kind = layer(x), type(layer).__name__
        weights = layer.weight.numel()
        inside, outside = x[0, 0].numel(), y[0, 0].numel()
        places = inside if isinstance(layer, nn.ConvTranspose2d) else outside
        got = float(call(fn, layer, x, y))
        for sentence, wrong in {
            "counted for the whole batch: count for one image": weights * places * len(x),
            "every weight is counted once: it is used again at every place of the map": weights,
            "the bias is counted as well: it is added, not multiplied": (weights + layer.bias.numel()) * places,
            "a transposed convolution uses its kernel once for every pixel that comes *in*":
                weights * outside if kind == "ConvTranspose2d" else None,
            "with stride 2 the kernel is used once for every pixel that comes *out*":
                weights * inside if kind == "Conv2d" else None,
            "the pixels are counted without the channels: multiply by all weights of the layer": places * 9,
        }.items():
            if got != weights * places and got == wrong:
                raise CheckFailed(sentence)
        if got != weights * places:
            raise CheckFailed(f"{kind}: {weights * places:,} were wanted, got {got:,.0f}: the number of weights, times "
                              "the places where each is used")
    passed("weights times places: those of the output for a convolution, of the input for a transposed one")


def on_its_own(fn: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """fn(model, z): what the network says, whatever mode it was left in and whoever else is in the batch."""
    model, rng = filled(Cs180UNet(4)), seeded(0)
    z = torch.randn(6, 1, 28, 28, generator=rng)
    with torch.no_grad():
        model.train()(z)  # running means worth the name
        right = model.eval()(z)
    got = call(fn, model.train(), z)
    first = call(fn, model.train(), z[:1])
    if isinstance(got, Tensor) and got.shape == z.shape and not torch.allclose(got[:1], first, atol=1e-4):
        raise CheckFailed("the answer for a digit depends on who else is in the batch: batch normalisation is in "
                          "training mode; call model.eval() before you ask")
    if isinstance(got, Tensor) and got.requires_grad:
        raise CheckFailed("the answer drags along every map of the network for a gradient nobody wants: ask under "
                          "torch.no_grad()")
    compare(got, right, {}, "not what the network says in eval mode")
    passed("one digit, one answer: alone or in any company")
