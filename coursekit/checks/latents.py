"""Checks of notebook 11: a scale for latents, decoding them, their loss, a bound, equal compute, a way between two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coursekit.checks.core import CheckFailed, call, compare, passed, seeded
from coursekit.denoisers import Denoiser, Prediction
from coursekit.diffusion import eps_from_x0, noise_prediction_loss, x0_prediction_loss
from coursekit.nets import VQVAE
from coursekit.schedules import NoiseSchedule, cosine_schedule


def latent_statistics(fn: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    """fn(z (n, d, h, w)) -> (mean (d,), std (d,)): one pair of numbers for each channel."""
    z = 3 + _scales(5) * _randn(40, 5, 3, 4, seed=0) + _randn(5, 1, 1, seed=1)
    got = _pair(call(fn, z), "(mean, std)")
    for name, found, per_number in (("mean", got[0], z.mean()), ("std", got[1], z.std())):
        if found.numel() == 1 and torch.allclose(found.flatten(), per_number, rtol=0.02):
            raise CheckFailed(f"one {name} for everything: each channel has its own, so average over the images and "
                              "both sides, dimensions 0, 2 and 3, and leave dimension 1")
    axes: dict[tuple[int, ...], str] = {
        (5, 3, 4): "the images (0)", (3, 4): "the images and channels (0 and 1)", (40, 5): "the sides (2 and 3)",
        (5, 4): "the images and rows (0 and 2)", (5, 3): "the images and columns (0 and 3)"}
    for found in got:
        if only := axes.get(tuple(found.shape)):
            raise CheckFailed(f"averaged over {only} alone: a channel has one mean and one deviation, whatever the "
                              "image and the place, so average over 0, 2 and 3")
    right, spread = z.mean((0, 2, 3)), z.std((0, 2, 3))
    compare(got[0], right, {
        "mean and deviation are swapped: return (mean, std)": lambda mean: torch.allclose(mean, spread, rtol=0.02),
    }, "the first of the two should be the mean of each channel", atol=1e-2, shape_hint=": one mean for each channel")
    compare(got[1], spread, {
        "variances: the deviation is their root, .std": spread.square(),
        "the size of the numbers, not how far they lie from their mean: .std takes the mean off":
            z.square().mean((0, 2, 3)).sqrt(),
        "the deviation of the channel's means: take .std over every number of a channel at once":
            z.mean((2, 3)).std(0),
    }, "the second of the two should be the deviation of each channel", atol=2e-2,
        shape_hint=": one deviation for each channel")
    passed("a mean and a deviation for each channel, over all images and places")


def unit_latents(fn: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """fn(z (n, d, h, w), mean (d,), std (d,)) -> (z - mean) / std, channel by channel."""
    mean, std = 2 * _randn(5, seed=2), _scales(5).flatten()
    z = _randn(4, 5, 5, 5, seed=3)  # as wide as it has channels: a mean along the wrong side fits without a word
    m, s = mean[:, None, None], std[:, None, None]
    try:
        got = call(fn, z, mean, std)
    except RuntimeError as refusal:
        raise CheckFailed(f"torch refuses ({str(refusal).splitlines()[0]}): mean and std are (d,), and a channel is "
                          "dimension 1 of 4: mean[:, None, None]") from None
    compare(got, (z - m) / s, {
        "every *column* got its own mean: (d,) beside (n, d, h, w) lines up with the last side; write "
        "mean[:, None, None]": (z - mean) / std,
        "every *row* got its own mean: mean[:, None, None] has two Nones": (z - mean[:, None]) / std[:, None],
        "multiplied by the deviation: that is the way back": z * s + m,
        "the mean was not taken off": z / s,
        "the mean was taken off after dividing: (z - mean) / std": z / s - m,
        "divided by the variance": (z - m) / s.square(),
        "this batch's own statistics: use the stored ones, or the way back will lead somewhere else":
            (z - z.mean((0, 2, 3), keepdim=True)) / z.std((0, 2, 3), keepdim=True),
    }, "(z - mean) / std was wanted, with the mean and the deviation of each number's channel")
    passed("each channel by its own stored statistics")


def decode_latents(fn: Callable[[Tensor, Any, bool], Tensor]) -> None:
    """fn(u, coder, rounded) -> images in [-1, 1] of normalised latents u (b, d, h, w)."""
    coder, u = _coder(), _randn(6, 5, 5, 5, seed=4)
    with torch.no_grad():
        z = coder.denormalise(u)
        book = coder.quantizer.vectors.clone()
        deviations = (coder.std.mean(), coder.std.square().mean().sqrt())
        by_one = [u * std + mean for std in deviations for mean in (0, coder.mean.mean())]

        def shown(z: Tensor, rounded: bool) -> Tensor:
            return coder.decode(coder.quantize(z).z_q if rounded else z).clamp(-1, 1)
        for rounded in (True, False):
            got = call(fn, u, coder, rounded)
            if not torch.equal(book, coder.quantizer.vectors):
                raise CheckFailed("the book moved while you looked: coder.eval() before it is used")
            compare(got.detach() if isinstance(got, Tensor) else got, shown(z, rounded), {
                "not de-normalised: the decoder knows latents on their own scale, coder.denormalise(u) first":
                    shown(u, rounded),
                "normalised a second time: coder.denormalise is the way back": shown(coder.normalise(u), rounded),
                "rounded before de-normalising: the book's vectors live on the scale of the encoder":
                    shown(coder.denormalise(coder.quantize(u).z_q), False),
                "de-normalised by one number: each channel has a mean and a deviation of its own, coder.denormalise(u)":
                    lambda got, rounded=rounded: any(torch.allclose(got, shown(wrong, rounded), atol=1e-4)
                                                     for wrong in by_one),
                "not rounded, though `rounded` is True": shown(z, False),
                "rounded, though `rounded` is False": shown(z, True),
                "beyond [-1, 1]: .clamp(-1, 1) at the end": coder.decode(coder.quantize(z).z_q if rounded else z),
                "the latents were clamped: only images live in [-1, 1]": shown(u.clamp(-1, 1), rounded),
                "the latents were clamped after de-normalising: only images live in [-1, 1]":
                    shown(z.clamp(-1, 1), rounded),
            }, f"with rounded = {rounded} these are not the decoder's images")
    with torch.enable_grad():
        if call(fn, u, coder, True).requires_grad:
            raise CheckFailed("the images drag a graph along that nobody needs: @torch.no_grad()")
    passed("back to the encoder's scale, rounded or not, decoded, within [-1, 1]")


def latent_loss(fn: Callable[..., Tensor]) -> None:
    """fn(model, x, coder, schedule, rng) -> x0_prediction_loss on the normalised encoder outputs, not rounded."""
    coder, schedule, x = _coder(), cosine_schedule(100), _randn(6, 1, 20, 20, seed=5).clamp(-1, 1)
    model = _Half()
    got = call(fn, model, x, coder, schedule, seeded(6))
    if isinstance(got, Tensor) and got.ndim == 0 and got.requires_grad:
        got.backward()
    if any(p.grad is not None for p in coder.parameters()):
        raise CheckFailed("the encoder gets a gradient: it would learn to write latents that are easy to guess; encode "
                          "under torch.no_grad()")
    with torch.no_grad():
        z = coder.encode(x)
        z_q = coder.quantize(z).z_q
        def of(z: Tensor, loss: Callable[..., Tensor] = x0_prediction_loss) -> Tensor:
            return loss(model, z, schedule, seeded(6))
        compare(got.detach() if isinstance(got, Tensor) else got, of(coder.normalise(z)), {
            "not normalised: the schedule's noise has deviation 1, and so must what it joins": of(z),
            "rounded latents: the diffusion learns what the encoder says *before* rounding": of(coder.normalise(z_q)),
            "rounded and not normalised": of(z_q),
            "de-normalised: coder.normalise on the way in": of(coder.denormalise(z)),
            "the loss of eps: this model is asked for x_0": of(coder.normalise(z), noise_prediction_loss),
            "the pictures themselves were noised: encode them first": of(x),
        }, "this is not x0_prediction_loss(model, z, schedule, rng) of the normalised z; was rng handed on?",
            shape_hint=": one number for the batch")
    if not got.requires_grad:
        raise CheckFailed("no gradient reaches the model: only the *encoder* belongs under torch.no_grad()")
    passed("the loss you know, of what the frozen encoder says, on a scale of one")


def bounded(fn: Callable[[Denoiser, float, NoiseSchedule], Denoiser]) -> None:
    """fn(denoise, limit, schedule) -> a denoiser whose x_0 stays in [-limit, limit] and whose eps fits it."""
    schedule, x_t, t = cosine_schedule(100), 2 * _randn(5, 4, 3, 3, seed=7), torch.tensor([10, 40, 60, 80, 100])

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        x0 = 3 * x_t
        return Prediction(x0, eps_from_x0(x_t, t, x0, schedule))
    for limit in (4.0, 2.5):
        ours = call(fn, denoise, limit, schedule)
        if not callable(ours):
            raise CheckFailed("a denoiser was wanted, a function of (x_t, t): define one inside and return it")
        x0, eps = _pair(call(ours, x_t, t), "(x0, eps)")
        own = denoise(x_t, t)
        right, within = own.x0.clamp(-limit, limit), own.x0.abs() < limit
        compare(x0, right, {
            "clipped to [-1, 1]: that is the range of pictures; latents have deviation 1, and a quarter of them lie "
            "beyond": own.x0.clamp(-1, 1),
            "nothing was clipped: x0.clamp(-limit, limit)": own.x0,
            "x_t was clipped, not the guess at x_0": denoise(x_t.clamp(-limit, limit), t).x0,
            "only from above: x0.clamp(-limit, limit)": own.x0.clamp(max=limit),
            "only from below: x0.clamp(-limit, limit)": own.x0.clamp(min=-limit),
            "shrunk to fit: what lies within the limit must stay as it is":
                x0.shape == right.shape and bool(x0.abs().max() <= limit and (x0 - own.x0)[within].abs().max() > 1e-3),
        }, f"with limit = {limit} the guess at x_0 should be x0.clamp(-{limit}, {limit})")
        compare(eps, eps_from_x0(x_t, t, right, schedule), {
            "eps was left as it was: it no longer adds up to x_t with the clipped x_0, and DDIM falls apart "
            "(notebook 05)": own.eps,
            "eps was clipped: noise has no such bound; compute it from x_t and the new x_0":
                own.eps.clamp(-limit, limit),
        }, "eps should be what is left of x_t: (x_t - a x_0) / s, with the clipped x_0")
    passed("x_0 within the limit, and eps such that a x_0 + s eps is still x_t")


def equal_steps(fn: Callable[[int, float, float, float, float], int]) -> None:
    """fn(steps, latent, encoder, pixel, once) -> steps of a pixel model that cost as much.

    latent, encoder, pixel: multiply-adds of one pass for one image; backward is as much as two passes forward; once:
    multiply-adds for one image, already with their backward passes, that the coder's training took in all.
    """
    for steps, latent, encoder, pixel, once in ((1000, 30e6, 4e6, 50e6, 0.0), (600, 20e6, 9e6, 40e6, 6e9)):
        def ratio(cost: float, each: float, once: float) -> int:
            return round((cost + once) / each)
        right = ratio(steps * (3 * latent + encoder), 3 * pixel, once)
        got = call(fn, steps, latent, encoder, pixel, once)
        whole = float(got).is_integer()
        for sentence, wrong in {
            "the encoder is not counted: it runs once, forward, on every image of every step":
                ratio(steps * 3 * latent, 3 * pixel, once),
            "the encoder is counted like the network that learns: it is frozen, so forward is all it does, and what "
            "learns costs three times that": ratio(steps * 3 * (latent + encoder), 3 * pixel, once),
            "upside down: a pixel step costs more, so there are fewer of them":
                round(steps * 3 * pixel / (3 * latent + encoder)),
            "the pixel network has no backward pass in your count": ratio(steps * (3 * latent + encoder), pixel, once),
            "the coder's own training is not counted: it is paid for once": ratio(
                steps * (3 * latent + encoder), 3 * pixel, 0) if once else None,
            "the coder's training is multiplied by 3 again: `once` has its backward passes already":
                ratio(steps * (3 * latent + encoder), 3 * pixel, 3 * once) if once else None,
            "the coder's training is counted in every step": ratio(
                steps * (3 * latent + encoder + once), 3 * pixel, 0) if once else None,
        }.items():
            if got != right and wrong is not None and abs(float(got) - wrong) <= 1:
                raise CheckFailed(sentence)
        if abs(float(got) - right) > 1:
            raise CheckFailed(f"{right} steps were wanted for steps = {steps}, latent = {latent:g}, encoder = "
                              f"{encoder:g}, pixel = {pixel:g}, once = {once:g}; got {float(got):g}")
        if not whole:
            raise CheckFailed(f"half a step cannot be taken: round to a whole number, got {got}")
    passed("forward and backward of what learns, forward of what is frozen, and the coder's training once")


def between(fn: Callable[[Tensor, Tensor, Sequence[float], Any], Tensor]) -> None:
    """fn(x, y, shares, coder) -> (len(shares), c, h, w): encode both, go straight from x to y, round, decode."""
    coder, shares = _coder(), [0.0, 0.3, 0.75, 1.0]
    x, y = (_randn(1, 1, 20, 20, seed=seed).clamp(-1, 1) for seed in (8, 9))
    a = torch.tensor(shares).view(-1, 1, 1, 1)

    def mixed(u: Tensor, v: Tensor) -> Tensor:
        return (1 - a) * u + a * v
    with torch.no_grad():
        z_x, z_y = coder.encode(x), coder.encode(y)
        def shown(z: Tensor, rounded: bool = True) -> Tensor:
            return coder.decode(coder.quantize(z).z_q if rounded else z).clamp(-1, 1)
        q_x, q_y = coder.quantize(z_x), coder.quantize(z_y)
        got = call(fn, x, y, shares, coder)
        compare(got.detach() if isinstance(got, Tensor) else got, shown(mixed(z_x, z_y)), {
            "pixels were mixed, and that was all: encode x and y, mix what the encoder says, decode": mixed(x, y),
            "pixels were mixed and then encoded: encode first, mix afterwards": shown(coder.encode(mixed(x, y))),
            "the wrong way round: share 0 is x, share 1 is y": shown(mixed(z_y, z_x)),
            "not rounded: the mixture lies between the book's vectors, coder.quantize(z).z_q": shown(
                mixed(z_x, z_y), False),
            "rounded before mixing: then the mixtures are not rounded": shown(mixed(q_x.z_q, q_y.z_q), False),
            "code *numbers* were mixed: code 12 does not lie between 7 and 17, they are names": shown(coder.embed(
                mixed(q_x.codes.float()[:, None], q_y.codes.float()[:, None])[:, 0].round().long())),
            "beyond [-1, 1]: .clamp(-1, 1) at the end": coder.decode(coder.quantize(mixed(z_x, z_y)).z_q),
        }, "decode the rounded (1 - a) z_x + a z_y for each share a", shape_hint=": one image for each share")
    passed("from x to y in a straight line of the latent space, each stop rounded and decoded")


class _Half(nn.Module):
    """Guesses a share of x_t, whatever the time."""

    def __init__(self) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.tensor(0.5))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.share * x_t


def _coder() -> VQVAE:
    """A small coder that learned nothing: 20 x 20 pixels to 5 x 5 latents of 5 channels, on scales of their own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(10)
        coder = VQVAE(channels=(4, 4), blocks=0, codes=16, dim=5).eval()
        with torch.no_grad():
            next(coder.encoder[-1].parameters()).mul_(10)  # the weight; the bias comes after it
            next(coder.decoder[-1].parameters()).mul_(20)
            coder.mean.copy_(torch.randn(5))
            coder.std.copy_(_scales(5).flatten())
            coder.quantizer.vectors.copy_(coder.mean + coder.std * torch.randn(16, 5))
    return coder


def _scales(d: int) -> Tensor:
    return torch.linspace(0.4, 2.5, d).view(-1, 1, 1)


def _pair(got: Any, names: str) -> tuple[Tensor, Tensor]:
    if not isinstance(got, (tuple, list)) or len(got) != 2 or not all(isinstance(part, Tensor) for part in got):
        raise CheckFailed(f"two tensors were wanted, {names}, got {type(got).__name__}")
    return got[0], got[1]


def _randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))
