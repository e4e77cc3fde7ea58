"""Every self-check of notebook 12 passes the right answer and names each mistake it claims to catch."""

import math

import torch
import torch.nn.functional as F
from support import suite_of

from coursekit.checks.kernels import _levels
from coursekit.nets.filtering import apply_kernels, gaussian_upsample
from coursekit.nets.kpn import pyramid
from coursekit.quantization import to_integers


def gathering(x, kernels, mode="replicate", tap=lambda k: k, end=lambda y: y):
    """filter_pixels by shifted multiply-adds, with one thing changed."""
    h, w = x.shape[2:]
    padded = F.pad(x, (2, 2, 2, 2), mode=mode)
    return end(sum(padded[..., k // 5:k // 5 + h, k % 5:k % 5 + w] * kernels[:, tap(k), None] for k in range(25)))


def unfolding(x, kernels):
    b, c, h, w = x.shape
    patches = F.unfold(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5).view(b, c, 25, h, w)
    return (patches * kernels[:, None]).sum(2)


def splatting(x, kernels, mirrored=False):
    h, w = x.shape[2:]
    onto = torch.zeros(*x.shape[:2], h + 4, w + 4)
    for k in range(25):
        onto[..., k // 5:k // 5 + h, k % 5:k % 5 + w] += x * kernels[:, 24 - k if mirrored else k, None]
    return onto[..., 2:-2, 2:-2]


def reading(kernels=torch.tanh, sharp=lambda k: 4 * k.sigmoid(), lean=lambda r: 0.95 * r.tanh(), skip=torch.sigmoid):
    """read_head with one thing changed."""
    def read_head(out):
        taps, shape, share = out.split([25, 3, 1], dim=1)
        return kernels(taps), torch.cat([sharp(shape[:, :2]), lean(shape[:, 2:])], 1), skip(share)
    return read_head


def back_to_front(out):
    share, shape, taps = out.split([1, 3, 25], dim=1)
    return reading()(torch.cat([taps, shape, share], 1))


def matrix(a=lambda kx, ky, r: kx * kx, b=lambda kx, ky, r: r * kx * ky, d=lambda kx, ky, r: ky * ky):
    """precision_matrix with one thing changed."""
    def precision_matrix(kx, ky, r):
        top = torch.stack([a(kx, ky, r), b(kx, ky, r)], -1)
        return torch.stack([top, torch.stack([b(kx, ky, r), d(kx, ky, r)], -1)], -2)
    return precision_matrix


def walking(first=lambda x: x, hand_on=lambda x, y: y, down=lambda y: F.avg_pool2d(y, 2), up=gaussian_upsample,
            blend=torch.lerp, order=lambda levels: levels):
    """pyramid with one thing changed."""
    def pyramid(x, levels):
        own = []
        for level in order(levels):
            own.append(apply_kernels(first(x), level.kernels))
            x = down(hand_on(x, own[-1]))
        for y, level in zip(own[::-1], order(levels)[::-1], strict=True):
            x = blend(up(x, level.shape), y, level.skip)
        return x
    return pyramid


def coding(scale=1000.0, sign=-1, end=lambda angle: torch.cat([angle.sin(), angle.cos()], 1), flip=False):
    """time_code with one thing changed."""
    def time_code(t, width):
        k = torch.arange(width // 2) / (width // 2)
        return end((1 - t if flip else t)[:, None] * scale * 10_000 ** (sign * k))
    return time_code


def loss_of(noise=lambda x0, t, eps: (1 - t) * x0 + t * eps, told=lambda t: t, floor=lambda t: t.clamp(min=0.05),
            end=lambda error, below: (error / below).square().mean(), grad=True):
    """velocity_loss with one thing changed."""
    def velocity_loss(model, x0, t, eps):
        column = t.view(-1, 1, 1, 1)
        with torch.set_grad_enabled(grad):
            return end(model(noise(x0, column, eps), told(t)) - x0, floor(column))
    return velocity_loss


def of_velocity(below):
    """The loss of the velocity by its definition, with the guess's t changed by `below`."""
    def velocity_loss(model, x0, t, eps):
        column = t.view(-1, 1, 1, 1)
        x_t = torch.lerp(x0, eps, column)
        return ((x_t - model(x_t, t)) / below(column) - (eps - x0)).square().mean()
    return velocity_loss


def against_x0(model, x0, t, eps):
    column = t.view(-1, 1, 1, 1)
    x_t = torch.lerp(x0, eps, column)
    return ((x_t - model(x_t, t)) / column.clamp(min=0.05) - x0).square().mean()


def untold(model, x0, t, eps):
    return (model(torch.lerp(x0, eps, t.view(-1, 1, 1, 1))) - x0).square().mean()


def asked_twice(model, x0, t, eps):
    model(x0, t)
    return loss_of()(model, x0, t, eps)


def jumping(by=lambda t, s: (s - t) / t):
    """euler_jump with another share of the way to the guess."""
    return lambda x, x0, t, s: x + by(t, s) * (x - x0)


RIGHT = {
    "filter_pixels": [gathering, unfolding, apply_kernels],
    "read_head": reading(),
    "precision_matrix": [matrix(), lambda kx, ky, r: matrix()(kx, ky, r) + 0],
    "pyramid": [walking(), pyramid],
    "prediction": [lambda x_t, t, filters, drift: filters(x_t, t) + drift(x_t, t),
                   lambda x_t, t, filters, drift: drift(x_t, t) + filters(x_t, t)],
    "time_code": coding(),
    "velocity_loss": [loss_of(), lambda model, x0, t, eps: loss_of()(model, x0, t, eps)],
    "gated": [lambda error, seen, t: (error + 0.1 * (t < 0.7) * seen).mean(),
              lambda error, seen, t: error.mean() + 0.1 * torch.where(t < 0.7, seen, 0 * seen).mean()],
    "euler_jump": [jumping(), lambda x, x0, t, s: torch.lerp(x0, x, s / t)],
    "int8_kernels": [lambda kernels: (127 * kernels).round().to(torch.int8), lambda k: to_integers(k, 1 / 127)],
}

PLANTED = [
    ("filter_pixels", lambda x, k: gathering(x, k, "constant"), "dark edges"),
    ("filter_pixels", lambda x, k: gathering(x, k, "reflect"), "mirror: "),
    ("filter_pixels", lambda x, k: gathering(x, k, "circular"), "opposite edge"),
    ("filter_pixels", lambda x, k: gathering(x, k, tap=lambda k: k % 5 * 5 + k // 5), "transposed"),
    ("filter_pixels", lambda x, k: gathering(x, k, tap=lambda k: 24 - k), "back to front"),
    ("filter_pixels", splatting, "splatted: each"),
    ("filter_pixels", lambda x, k: splatting(x, k, mirrored=True), "splatted, by the mirrored"),
    ("filter_pixels", lambda x, k: gathering(x, k / k.sum(1, keepdim=True)), "divided by their sum"),
    ("filter_pixels", lambda x, k: gathering(x, k.softmax(1)), "softmax"),
    ("filter_pixels", lambda x, k: gathering(x, k.tanh()), "a second time"),
    ("filter_pixels", lambda x, k: gathering(x, k, end=lambda y: y / 25), "weighted \\*sum\\*"),
    ("filter_pixels", lambda x, k: gathering(x, k[:, :, :1, :1]), "kernel of the first one"),
    ("filter_pixels", lambda x, k: gathering(x, k[:1]), "kernels of the first one"),
    ("filter_pixels", lambda x, k: x.clone(), "not used at all"),
    ("filter_pixels", lambda x, k: gathering(x, k, end=lambda y: 2 * y), "these are not the sums"),
    ("filter_pixels", lambda x, k: gathering(x, k, end=lambda y: y.sum(1)), "colours added up"),
    ("read_head", reading(kernels=lambda k: k.softmax(1)), "softmax where tanh"),
    ("read_head", reading(kernels=torch.sigmoid), "sigmoid where tanh"),
    ("read_head", reading(kernels=lambda k: k), "as they came: tanh"),
    ("read_head", reading(kernels=lambda k: k.tanh() / k.tanh().sum(1, keepdim=True)), "divided by their sum"),
    ("read_head", back_to_front, "end of the 29"),
    ("read_head", reading(kernels=torch.sin), "tanh of the first 25"),
    ("read_head", reading(sharp=torch.sigmoid), "ends at 1"),
    ("read_head", reading(sharp=torch.exp), "exponential"),
    ("read_head", reading(lean=torch.tanh), "no determinant"),
    ("read_head", reading(lean=torch.sigmoid), "either side"),
    ("read_head", reading(lean=lambda r: 0.95 * r.sigmoid()), "either side"),
    ("read_head", reading(lean=lambda r: 4 * r.sigmoid()), "all three got 4"),
    ("read_head", reading(sharp=lambda k: 0.95 * k.tanh()), "all three got 0.95"),
    ("read_head", reading(sharp=lambda k: k, lean=lambda r: r), "shape is as it came"),
    ("read_head", reading(sharp=lambda k: 3 * k.sigmoid()), "shape should be"),
    ("read_head", reading(skip=torch.tanh), "sigmoid, not tanh"),
    ("read_head", reading(skip=lambda s: s), "skip is as it came"),
    ("read_head", reading(skip=lambda s: (-s).sigmoid()), "1 - sigmoid"),
    ("read_head", reading(skip=torch.sin), "skip should be"),
    ("read_head", lambda out: out.split([25, 3, 1], dim=1)[0].tanh(), "three tensors"),
    ("read_head", lambda out: reading()(out)[::-1], "in this order"),
    ("precision_matrix", matrix(d=lambda kx, ky, r: ky * kx), "last entry is kx ky"),
    ("precision_matrix", matrix(a=lambda kx, ky, r: ky * kx), "first entry is kx ky"),
    ("precision_matrix", matrix(b=lambda kx, ky, r: r), "r alone"),
    ("precision_matrix", matrix(b=lambda kx, ky, r: 2 * r * kx * ky), "counted twice"),
    ("precision_matrix", matrix(a=lambda kx, ky, r: kx, d=lambda kx, ky, r: ky), "not squared"),
    ("precision_matrix", lambda kx, ky, r: matrix()(ky, kx, r), "swapped"),
    ("precision_matrix", lambda kx, ky, r: matrix()(kx, ky, -r), "other way"),
    ("precision_matrix", lambda kx, ky, r: torch.linalg.pinv(matrix()(kx, ky, r)), "inverse"),
    ("precision_matrix", matrix(b=lambda kx, ky, r: 0 * r), "no lean"),
    ("precision_matrix", matrix(a=lambda kx, ky, r: kx**3), "was wanted"),
    ("precision_matrix", lambda kx, ky, r: matrix()(kx, ky, r).flatten(1), "40 matrices"),
    ("pyramid", walking(first=lambda x: F.avg_pool2d(x, 2)), "before it was filtered"),
    ("pyramid", walking(order=lambda levels: levels[::-1]), "another size"),
    ("pyramid", walking(hand_on=lambda x, y: x), "\\*noisy\\*"),
    ("pyramid", walking(blend=lambda u, y, skip: torch.lerp(y, u, skip)), "wrong way round"),
    ("pyramid", walking(up=lambda u, shape: F.interpolate(u, scale_factor=2.0)), "repeating pixels"),
    ("pyramid", walking(up=lambda u, shape: F.interpolate(u, scale_factor=2.0, mode="bilinear")), "bilinearly"),
    ("pyramid", walking(down=lambda y: F.max_pool2d(y, 2)), "maxima"),
    ("pyramid", walking(down=lambda y: y[..., ::2, ::2]), "leaving pixels out"),
    ("pyramid", walking(blend=lambda u, y, skip: u + skip * y), "added instead"),
    ("pyramid", walking(blend=lambda u, y, skip: (u + y) / 2), "skip was left out"),
    ("pyramid", walking(blend=lambda u, y, skip: u + y), "skip was left out"),
    ("pyramid", lambda x, levels: apply_kernels(x, levels[0].kernels), "way up is missing"),
    ("pyramid", walking(blend=lambda u, y, skip: 2 * torch.lerp(u, y, skip)), "filter and halve"),
    ("pyramid", lambda x, levels: F.avg_pool2d(walking()(x, levels), 2), "as large as x"),
    ("prediction", lambda x, t, filters, drift: filters(x + drift(x, t), t), "drift before filtering"),
    ("prediction", lambda x, t, filters, drift: filters(drift(x, t), t), "drift before filtering"),
    ("prediction", lambda x, t, filters, drift: filters(x, t) + drift(filters(x, t), t), "looked at the filtered"),
    ("prediction", lambda x, t, filters, drift: filters(x, t), "drift is missing"),
    ("prediction", lambda x, t, filters, drift: drift(x, t), "filters are missing"),
    ("prediction", lambda x, t, filters, drift: filters(x, t) - drift(x, t), "taken away"),
    ("prediction", lambda x, t, filters, drift: filters(x, t) + drift(x, 0 * t), "drift is not told"),
    ("prediction", lambda x, t, filters, drift: filters(x, t) + drift(x, 1000 * t), "drift is not told"),
    ("prediction", lambda x, t, filters, drift: filters(x, 0 * t) + drift(x, t), "filters are not told"),
    ("prediction", lambda x, t, filters, drift: x + filters(x, t) + drift(x, t), "x_t itself"),
    ("prediction", lambda x, t, filters, drift: (filters(x, t) + drift(x, t)) / 2, "mean of the two"),
    ("prediction", lambda x, t, filters, drift: (filters(x, t) + drift(x, t)).clamp(-1, 1), "clipped"),
    ("prediction", lambda x, t, filters, drift: x, "was wanted"),
    ("time_code", coding(scale=1.0), "unscaled"),
    ("time_code", coding(scale=2 * math.pi), "2 pi"),
    ("time_code", coding(flip=True), "1000 \\(1 - t\\)"),
    ("time_code", coding(end=lambda angle: torch.cat([angle.cos(), angle.sin()], 1)), "cosines come first"),
    ("time_code", coding(end=lambda angle: torch.stack([angle.sin(), angle.cos()], 2).flatten(1)), "alternate"),
    ("time_code", coding(sign=1), "exponent is negative"),
    ("time_code", coding(end=lambda angle: torch.cat([angle, angle], 1)), "are missing"),
    ("time_code", coding(scale=500.0), "were wanted"),
    ("time_code", coding(end=torch.sin), "half cosines"),
    ("velocity_loss", loss_of(floor=lambda t: t), "nothing keeps t from 0"),
    ("velocity_loss", loss_of(floor=lambda t: 1), "x-loss"),
    ("velocity_loss", loss_of(end=lambda error, below: (error.square() / below).mean()), "after squaring"),
    ("velocity_loss", loss_of(floor=lambda t: (1 - t).clamp(min=0.05)), "1 - t was clamped"),
    ("velocity_loss", loss_of(end=lambda error, below: (error * below).square().mean()), "multiplied by t"),
    ("velocity_loss", against_x0, "held against x0"),
    ("velocity_loss", lambda model, x0, t, eps: (
        model(torch.lerp(x0, eps, t.view(-1, 1, 1, 1)), t) - (eps - x0)).square().mean(), "against the velocity"),
    ("velocity_loss", of_velocity(lambda t: t.clamp(min=0.05)), "Divide both"),
    ("velocity_loss", loss_of(end=lambda error, below: (error / below).abs().mean()), "absolute values"),
    ("velocity_loss", loss_of(end=lambda error, below: (error / below).square().sum()), "a sum where"),
    ("velocity_loss", loss_of(floor=lambda t: t.clamp(max=0.05)), "from above"),
    ("velocity_loss", loss_of(end=lambda error, below: (error / below).square().mean() / 2), "was wanted"),
    ("velocity_loss", loss_of(end=lambda error, below: (error / below).square().mean((1, 2, 3))), "one number"),
    ("velocity_loss", loss_of(grad=False), "no gradient"),
    ("velocity_loss", loss_of(noise=lambda x0, t, eps: t * x0 + (1 - t) * eps), "wrong way: at t = 0"),
    ("velocity_loss", loss_of(noise=lambda x0, t, eps: (1 - t).sqrt() * x0 + t.sqrt() * eps), "by roots"),
    ("velocity_loss", loss_of(noise=lambda x0, t, eps: torch.lerp(x0, eps, t.clamp(min=0.05))),
     "noised by the clamped"),
    ("velocity_loss", loss_of(noise=lambda x0, t, eps: x0), "shown the clean"),
    ("velocity_loss", loss_of(noise=lambda x0, t, eps: eps), "shown the noise"),
    ("velocity_loss", loss_of(noise=lambda x0, t, eps: x0 + t * eps), "not dimmed"),
    ("velocity_loss", loss_of(noise=lambda x0, t, eps: x0 - eps), "should be shown"),
    ("velocity_loss", loss_of(told=lambda t: 1 - t), "told 1 - t"),
    ("velocity_loss", loss_of(told=lambda t: 1000 * t), "told 1000 t"),
    ("velocity_loss", loss_of(told=lambda t: t.clamp(min=0.05)), "told the clamped"),
    ("velocity_loss", loss_of(told=lambda t: t.square()), "told t as it is"),
    ("velocity_loss", untold, "not told its times"),
    ("velocity_loss", asked_twice, "asked 2 times"),
    ("gated", lambda error, seen, t: (error + 0.1 * (t > 0.7) * seen).mean(), "wrong way round"),
    ("gated", lambda error, seen, t: (error + 0.1 * seen).mean(), "no gate"),
    ("gated", lambda error, seen, t: error.mean() + 0.1 * seen[t < 0.7].mean(), "gated images alone"),
    ("gated", lambda error, seen, t: ((t < 0.7) * (error + 0.1 * seen)).mean(), "shuts off the error"),
    ("gated", lambda error, seen, t: (error + 0.1 * seen)[t < 0.7].mean(), "left out altogether"),
    ("gated", lambda error, seen, t: (error + (t < 0.7) * seen).mean(), "weight is missing"),
    ("gated", lambda error, seen, t: (0.1 * error + (t < 0.7) * seen).mean(), "the wrong one"),
    ("gated", lambda error, seen, t: error.mean(), "LPIPS is missing"),
    ("gated", lambda error, seen, t: torch.where(t < 0.7, 0.1 * seen, error).mean(), "\\*instead of\\*"),
    ("gated", lambda error, seen, t: (error + 0.1 * (t < 0.7) * seen).sum(), "a sum where"),
    ("gated", lambda error, seen, t: (error + 0.1 * (1 - t) * seen).mean(), "by degrees"),
    ("gated", lambda error, seen, t: (error + 0.3 * (t < 0.7) * seen).mean(), "was wanted"),
    ("gated", lambda error, seen, t: error + 0.1 * (t < 0.7) * seen, "one number"),
    ("euler_jump", jumping(lambda t, s: (t - s) / t), "uphill"),
    ("euler_jump", jumping(lambda t, s: (s - t) / (1 - t)), "divided by 1 - t"),
    ("euler_jump", jumping(lambda t, s: s - t), "not divided by t"),
    ("euler_jump", lambda x, x0, t, s: x0, "all the way"),
    ("euler_jump", lambda x, x0, t, s: x, "nothing moved"),
    ("euler_jump", lambda x, x0, t, s: x0 + (s - t) * (x0 - x) / t, "are swapped"),
    ("euler_jump", jumping(lambda t, s: (s - t) / s), "divided by s"),
    ("euler_jump", lambda x, x0, t, s: x * (1 - s / t) + x0 * (s / t), "are swapped: s / t"),
    ("euler_jump", lambda x, x0, t, s: 2 * x, "from t = 0.8 to s = 0.5"),
    ("int8_kernels", lambda k: (127 * k).to(torch.int8), "cut off"),
    ("int8_kernels", lambda k: (127 * k).floor().to(torch.int8), "rounded down"),
    ("int8_kernels", lambda k: (128 * k).round().to(torch.int16).to(torch.int8), "becomes 128"),
    ("int8_kernels", lambda k: (128 * k).round().clamp(-128, 127).to(torch.int8), "ends clamped"),
    ("int8_kernels", lambda k: (127 * k / k[3:].abs().max()).round().clamp(-127, 127).to(torch.int8),
     "scale of its own"),
    ("int8_kernels", lambda k: k.round().to(torch.int8), "not scaled"),
    ("int8_kernels", lambda k: (127 * k).abs().round().to(torch.int8), "sign is gone"),
    ("int8_kernels", lambda k: (127.5 * (k + 1)).round().to(torch.uint8).to(torch.int8), "0..255"),
    ("int8_kernels", lambda k: (100 * k).round().to(torch.int8), "was wanted"),
    ("int8_kernels", lambda k: (127 * k).round(), "eight bits were wanted"),
]


test_right_answers_pass, test_planted_mistakes_are_named, test_no_check_is_forgotten = suite_of(
    RIGHT, PLANTED, "kernels", "paths")


def test_the_checks_pyramid_has_levels_that_matter():
    """Else a mistake could hide: no level may be blended away, and no Gaussian may be as good as its neighbour."""
    levels = _levels(16, 3)
    assert [level.kernels.shape[-1] for level in levels] == [16, 8, 4]
    assert all(0.2 < level.skip.mean() < 0.8 and level.shape[:, :2].std() > 0.3 for level in levels)
