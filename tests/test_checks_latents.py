"""Every self-check of notebook 11 passes the right answer and names each mistake it claims to catch."""

import numpy as np
import pytest
import torch
from support import suite_of

from coursekit.checks.latents import _coder
from coursekit.denoisers import Prediction, clipped
from coursekit.diffusion import eps_from_x0, noise_prediction_loss, x0_prediction_loss


def statistics(z):
    return z.mean((0, 2, 3)), z.std((0, 2, 3))


def unit(z, mean, std):
    return (z - mean[:, None, None]) / std[:, None, None]


def decoding(before=lambda u, coder: coder.denormalise(u), choose=lambda rounded: rounded,
             after=lambda z, coder: z, end=lambda x: x.clamp(-1, 1), grad=False):
    """decode_latents with one thing changed."""
    def decode_latents(u, coder, rounded):
        with torch.set_grad_enabled(grad):
            z = before(u, coder)
            z = coder.quantize(z).z_q if choose(rounded) else z
            return end(coder.decode(after(z, coder)))
    return decode_latents


def moving_book(u, coder, rounded):
    coder.train()
    return decoding()(u, coder, rounded)


def loss_of(what=lambda z, coder: coder.normalise(z), loss=x0_prediction_loss, frozen=True, rng=lambda rng: rng):
    """latent_loss with one thing changed."""
    def latent_loss(model, x, coder, schedule, own):
        with torch.set_grad_enabled(not frozen):
            z = what(coder.encode(x), coder)
        return loss(model, z, schedule, rng(own))
    return latent_loss


def without_any_gradient(*args):
    with torch.no_grad():
        return loss_of()(*args)


def bounding(clip=lambda x0, limit: x0.clamp(-limit, limit), noise=None, seen=lambda x_t, limit: x_t):
    """bounded with one thing changed."""
    def bounded(denoise, limit, schedule):
        def ours(x_t, t):
            own = denoise(seen(x_t, limit), t)
            x0 = clip(own.x0, limit)
            return Prediction(x0, noise(own.eps, limit) if noise else eps_from_x0(x_t, t, x0, schedule))
        return ours
    return bounded


def not_a_pair(denoise, limit, schedule):
    return lambda x_t, t: denoise(x_t, t).x0.clamp(-limit, limit)


def counting(once=lambda once: once, encoder=1, latent=3, pixel=3, end=round):
    """equal_steps with one thing changed."""
    def equal_steps(steps, c_latent, c_encoder, c_pixel, c_once):
        return end((steps * (latent * c_latent + encoder * c_encoder) + once(c_once)) / (pixel * c_pixel))
    return equal_steps


def going(mix=lambda x, y, a, coder: (1 - a) * coder.encode(x) + a * coder.encode(y), rounded=True, grad=False,
          end=lambda x: x.clamp(-1, 1)):
    """between with one thing changed."""
    def between(x, y, shares, coder):
        a = torch.tensor(shares).view(-1, 1, 1, 1)
        with torch.set_grad_enabled(grad):
            z = mix(x, y, a, coder)
            return end(coder.decode(coder.quantize(z).z_q if rounded else z))
    return between


def names_mixed(x, y, shares, coder):
    a = torch.tensor(shares).view(-1, 1, 1)
    with torch.no_grad():
        codes = [coder.quantize(coder.encode(one)).codes for one in (x, y)]
        return coder.decode(coder.embed(((1 - a) * codes[0] + a * codes[1]).round().long())).clamp(-1, 1)


def rounded_of(x, coder):
    return coder.quantize(coder.encode(x)).z_q


RIGHT = {
    "latent_statistics": [statistics, lambda z: (z.mean((0, 2, 3)), z.std((0, 2, 3), correction=0))],
    "unit_latents": unit,
    "decode_latents": [decoding(), torch.inference_mode()(decoding(end=lambda x: x.clip(-1, 1)))],
    "latent_loss": loss_of(),
    "bounded": bounding(),
    "equal_steps": [counting(), counting(end=lambda n: float(round(n))), counting(end=int),
                    counting(end=lambda n: np.int64(round(n))), counting(end=lambda n: torch.tensor(n).round())],
    "between": [going(), going(grad=True)],
}

PLANTED = [
    ("latent_statistics", lambda z: (z.mean((0, 2, 3), keepdim=True), z.std((0, 2, 3), keepdim=True)), "have shape"),
    ("latent_statistics", lambda z: (z.mean().view(1), z.std().view(1)), "one mean for everything"),
    ("latent_statistics", lambda z: (z.mean((0, 2, 3)), z.std()), "one std for everything"),
    ("latent_statistics", lambda z: (z.mean(0), z.std(0)), "images \\(0\\) alone"),
    ("latent_statistics", lambda z: (z.mean((0, 2)), z.std((0, 2))), "rows"),
    ("latent_statistics", lambda z: (z.mean((2, 3)), z.std((2, 3))), "sides"),
    ("latent_statistics", lambda z: (z.mean((0, 1)), z.std((0, 1))), "images and channels"),
    ("latent_statistics", lambda z: (z.mean((0, 3)), z.std((0, 3))), "columns"),
    ("latent_statistics", lambda z: (z.mean((0, 2, 3)), z.var((0, 2, 3))), "variances"),
    ("latent_statistics", lambda z: (z.mean((0, 2, 3)), z.square().mean((0, 2, 3)).sqrt()), "takes the mean off"),
    ("latent_statistics", lambda z: (z.mean((0, 2, 3)), z.mean((2, 3)).std(0)), "channel's means"),
    ("latent_statistics", lambda z: statistics(z)[::-1], "swapped"),
    ("latent_statistics", lambda z: (z.amin((0, 2, 3)), z.amax((0, 2, 3))), "mean of each channel"),
    ("latent_statistics", lambda z: (z.mean((0, 2, 3)), z.amax((0, 2, 3))), "deviation of each channel"),
    ("latent_statistics", lambda z: z.mean((0, 2, 3)), "two tensors"),
    ("latent_statistics", lambda z: statistics(z.mul_(1).add_(1)), "in place"),
    ("unit_latents", lambda z, mean, std: (z - mean) / std, "\\*column\\*"),
    ("unit_latents", lambda z, mean, std: (z - mean[:, None]) / std[:, None], "\\*row\\*"),
    ("unit_latents", lambda z, mean, std: z * std[:, None, None] + mean[:, None, None], "way back"),
    ("unit_latents", lambda z, mean, std: z / std[:, None, None], "not taken off"),
    ("unit_latents", lambda z, mean, std: z / std[:, None, None] - mean[:, None, None], "after dividing"),
    ("unit_latents", lambda z, mean, std: unit(z, mean, std.square()), "variance"),
    ("unit_latents", lambda z, mean, std: unit(z, *statistics(z)), "own statistics"),
    ("unit_latents", lambda z, mean, std: (z - mean.view(5, 1, 1, 1)) / std, "torch refuses"),
    ("unit_latents", lambda z, mean, std: unit(z, mean.mean().expand(5), std), "number's channel"),
    ("decode_latents", decoding(before=lambda u, coder: u), "not de-normalised"),
    ("decode_latents", decoding(before=lambda u, coder: coder.normalise(u)), "second time"),
    ("decode_latents", decoding(before=lambda u, coder: u, after=lambda z, coder: coder.denormalise(z)),
     "before de-normalising"),
    ("decode_latents", decoding(before=lambda u, coder: u * coder.std.mean() + coder.mean.mean()), "by one number"),
    ("decode_latents", decoding(choose=lambda rounded: False), "`rounded` is True"),
    ("decode_latents", decoding(choose=lambda rounded: True), "`rounded` is False"),
    ("decode_latents", decoding(end=lambda x: x), "beyond"),
    ("decode_latents", decoding(before=lambda u, coder: u.clamp(-1, 1)), "latents were clamped: "),
    ("decode_latents", decoding(before=lambda u, coder: coder.denormalise(u).clamp(-1, 1)),
     "clamped after de-normalising"),
    ("decode_latents", decoding(end=lambda x: (x + 1) / 2), "not the decoder's images"),
    ("decode_latents", moving_book, "the book moved"),
    ("decode_latents", decoding(grad=True), "drag a graph"),
    ("latent_loss", loss_of(frozen=False), "easy to guess"),
    ("latent_loss", loss_of(lambda z, coder: z), "not normalised: "),
    ("latent_loss", loss_of(lambda z, coder: coder.normalise(coder.quantize(z).z_q)), "\\*before\\* rounding"),
    ("latent_loss", loss_of(lambda z, coder: coder.quantize(z).z_q), "rounded and not"),
    ("latent_loss", loss_of(lambda z, coder: coder.denormalise(z)), "on the way in"),
    ("latent_loss", loss_of(loss=noise_prediction_loss), "loss of eps"),
    ("latent_loss", lambda model, x, coder, schedule, rng: x0_prediction_loss(model, x, schedule, rng),
     "pictures themselves"),
    ("latent_loss", loss_of(rng=lambda rng: torch.Generator().manual_seed(77)), "was rng handed on"),
    ("latent_loss", without_any_gradient, "only the \\*encoder\\*"),
    ("bounded", lambda denoise, limit, schedule: clipped(denoise), "range of pictures"),
    ("bounded", lambda denoise, limit, schedule: denoise, "nothing was clipped"),
    ("bounded", bounding(clip=lambda x0, limit: x0, seen=lambda x_t, limit: x_t.clamp(-limit, limit)),
     "x_t was clipped"),
    ("bounded", bounding(clip=lambda x0, limit: x0.clamp(max=limit)), "from above"),
    ("bounded", bounding(clip=lambda x0, limit: x0.clamp(min=-limit)), "from below"),
    ("bounded", bounding(clip=lambda x0, limit: limit * torch.tanh(x0 / limit)), "shrunk"),
    ("bounded", bounding(clip=lambda x0, limit: x0.clamp(-2 * limit, 2 * limit)), "the guess at x_0 should be"),
    ("bounded", bounding(noise=lambda eps, limit: eps), "no longer adds up"),
    ("bounded", bounding(noise=lambda eps, limit: eps.clamp(-limit, limit)), "no such bound"),
    ("bounded", bounding(noise=lambda eps, limit: 0 * eps), "what is left of x_t"),
    ("bounded", not_a_pair, "two tensors"),
    ("bounded", lambda denoise, limit, schedule: 3, "a denoiser was wanted"),
    ("equal_steps", counting(encoder=0), "encoder is not counted"),
    ("equal_steps", counting(encoder=3), "like the network that learns"),
    ("equal_steps", counting(latent=1, pixel=1), "like the network that learns"),
    ("equal_steps", lambda steps, latent, encoder, pixel, once: round(steps * 3 * pixel / (3 * latent + encoder)),
     "upside down"),
    ("equal_steps", counting(pixel=1), "pixel network has no backward"),
    ("equal_steps", counting(once=lambda once: 0), "paid for once"),
    ("equal_steps", counting(once=lambda once: 3 * once), "by 3 again"),
    ("equal_steps", lambda steps, latent, encoder, pixel, once: round(
        steps * (3 * latent + encoder + once) / (3 * pixel)), "in every step"),
    ("equal_steps", lambda steps, latent, encoder, pixel, once: steps, "were wanted"),
    ("equal_steps", counting(end=float), "half a step"),
    ("between", lambda x, y, shares, coder: torch.cat([(1 - a) * x + a * y for a in shares]), "and that was all"),
    ("between", going(lambda x, y, a, coder: coder.encode((1 - a) * x + a * y)), "encode first"),
    ("between", going(lambda x, y, a, coder: a * coder.encode(x) + (1 - a) * coder.encode(y)), "wrong way round"),
    ("between", going(rounded=False), "not rounded"),
    ("between", going(lambda x, y, a, coder: (1 - a) * rounded_of(x, coder) + a * rounded_of(y, coder),
                      rounded=False), "before mixing"),
    ("between", names_mixed, "they are names"),
    ("between", going(end=lambda x: x), "beyond"),
    ("between", going(lambda x, y, a, coder: coder.encode(x) + a * coder.encode(y)), "for each share a"),
    ("between", lambda x, y, shares, coder: going()(x, y, shares[1:], coder), "one image for each share"),
]


test_right_answers_pass, test_planted_mistakes_are_named, test_no_check_is_forgotten = suite_of(
    RIGHT, PLANTED, "latents")


def test_the_checks_coder_tells_scales_apart():
    coder = _coder()
    z = coder.encode(torch.randn(20, 1, 20, 20, generator=torch.Generator().manual_seed(0)).clamp(-1, 1))
    assert len(coder.quantize(z).codes.unique()) > 3 and coder.std.max() > 5 * coder.std.min()
    torch.testing.assert_close(coder.denormalise(unit(z, coder.mean, coder.std)), z)


@pytest.mark.parametrize("steps, each", [(1, 1.0), (500, 3.0)])
def test_two_networks_of_one_size_without_an_encoder_take_as_many_steps(steps, each):
    assert counting()(steps, each, 0.0, each, 0.0) == steps
