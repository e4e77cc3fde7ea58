"""Checks of notebook 04: telling a network the time, asking it for the noise, walking back with its answers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coursekit.checks.core import CheckFailed, call, compare, keeps_dtype, passed, seeded
from coursekit.diffusion import v_from_x0_eps
from coursekit.schedules import NoiseSchedule, cosine_schedule, linear_schedule


class Witness(nn.Module):
    """A network that answers with a function of x_t and remembers what it was shown, and in which mode."""

    def __init__(self, answer: Callable[[Tensor], Tensor]):
        super().__init__()
        self.answer, self.gain = answer, nn.Parameter(torch.ones(()))
        self.seen: list[tuple[Tensor, Tensor, bool]] = []

    def forward(self, x_t: Tensor, t: Tensor | None = None) -> Tensor:
        if not isinstance(t, Tensor) or t.shape != (len(x_t),):
            got = "nothing" if t is None else f"shape {tuple(t.shape)}" if isinstance(t, Tensor) else repr(t)
            raise CheckFailed(f"the network is called as model(x_t, t) with one time per image, {len(x_t)} of them; "
                              f"for t it got {got}")
        if t.is_floating_point():
            raise CheckFailed("t goes to the network as it is, whole numbers in 1..T: to scale it is the business "
                              "of the network's time embedding, and twice is once too often")
        if x_t.dtype != self.gain.dtype:
            raise CheckFailed(f"the network was shown {x_t.dtype} and is {self.gain.dtype}: the schedule's numbers are "
                              "float64, so take .to(x0) or .item() of them")
        self.seen.append((x_t.detach().clone(), t.clone(), self.training))
        return self.gain * self.answer(x_t)


def time_features(fn: Callable[[Tensor, int, float], Tensor]) -> None:
    """fn(t (b,), width, T) -> (b, width): sines, then cosines, of t scaled to 0..1000."""
    for T, t in ((300, torch.tensor([1, 2, 150, 300])), (1000, torch.tensor([1, 17, 500, 1000]))):
        got = call(fn, t, 8, T)
        if isinstance(got, Tensor) and got.shape != (4, 8):
            raise CheckFailed(f"4 times and width 8 make features of shape (4, 8), got {tuple(got.shape)}: half of "
                              "them sines, half of them cosines, side by side")
        scaled, k = t.float()[:, None] * 1000 / T, torch.arange(4).float()
        right = _waves(scaled, k / 4)
        compare(got, right, {
            "t is not scaled: 1000 / T * t runs over the same range whatever T is, so that the network meets the "
            "same angles": _waves(t.float()[:, None], k / 4),
            "t was scaled to 0..1: then no angle exceeds 1 and neighbouring times look the same; use 1000 / T * t":
                _waves(t.float()[:, None] / T, k / 4),
            "divided by width / 2 - 1, as in DDPM's own code: here by width / 2, the number of pairs": _waves(
                scaled, k / 3),
            "1000 // T is a whole number, 3 for T = 300: 1000 / T is meant": _waves(t[:, None] * (1000 // T), k / 4),
            "the frequencies fall only half as far: k runs over width / 2 pairs, divide it by that": _waves(
                scaled, k / 8),
            "the frequencies rise: the exponent is negative": _waves(scaled, -k / 4),
            "cosines come first: sines, then cosines, as later notebooks have them": right.roll(4, 1),
            "sines and cosines alternate: all sines first, then all cosines": right.view(4, 2, 4).mT.flatten(1),
            "the angles are right, their sines and cosines are missing": lambda got: bool(got.abs().max() > 2),
        }, f"for T = {T} these are not sin and cos of (1000 / T) t / 10000^(2 k / width)", atol=2e-3)
    passed("every time has features of its own, all within [-1, 1], in the same range for T = 300 and T = 1000")


def noise_prediction_loss(fn: Callable[..., Tensor]) -> None:
    """fn(model, x0, schedule, rng) -> L_simple (DDPM, eq. 14), a scalar with a gradient."""
    schedule = linear_schedule(4, 0.2, 0.5)
    x0 = torch.randint(0, 2, (512, 1, 8, 8), generator=seeded(0)) * 2.0 - 1
    model = Witness(lambda x_t: x_t)
    loss = call(fn, model, x0, schedule, seeded(1))
    if len(model.seen) != 1:
        raise CheckFailed(f"the network should be asked once for the whole batch, it was asked {len(model.seen)} times")
    x_t, t, _ = model.seen[0]
    _check_drawn_times(t, schedule.T)
    _check_noised(x_t, t, x0, schedule)
    if not isinstance(loss, Tensor) or loss.ndim:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise CheckFailed(f"a loss is a tensor with one number for the whole batch: end in a mean; got {got}")
    if not loss.requires_grad:
        raise CheckFailed("the loss has no gradient: is there a .item(), a .detach() or a no_grad() on the way?")
    a, s = schedule.signal_and_noise(t, like=x0)
    eps = (x_t - a * x0) / s
    error = x_t - eps
    compare(loss.detach(), error.square().mean(), {
        "the answer was compared with x_0: this network is asked for the noise": (x_t - x0).square().mean(),
        "the answer was compared with x_t, which the network was shown: nothing to learn": torch.zeros(()),
        "the answer was compared with v: this network is asked for the noise":
            (x_t - v_from_x0_eps(x0, t, eps, schedule)).square().mean(),
        "the noise was drawn twice: the eps that made x_t is the eps to compare with":
            lambda got: bool((got - x_t.square().mean() - 1).abs() < 0.08),
        "errors were summed: with the mean, the learning rate does not depend on the batch": error.square().sum(),
        "errors were not squared": error.abs().mean(),
        "this is the root of eq. 14: leave the mean square as it is": error.square().mean().sqrt(),
    }, "this is not the mean square of the network's answer minus the noise that made x_t", atol=1e-5)
    if not torch.equal(loss, call(fn, model, x0, schedule, seeded(1))):
        raise CheckFailed("the same seed gives another loss: hand rng on to randint and to randn, generator=rng")
    if torch.equal(loss, call(fn, model, x0, schedule, seeded(2))):
        raise CheckFailed("another seed gives the same loss, so every step would see the same noise: ask rng alone")
    passed("each image has its own t in 1..T, x_t is that of eq. 4, and the noise that made it is what counts")


def ancestral_sampler(fn: Callable[..., Tensor]) -> None:
    """fn(model, x, schedule, rng) -> samples (DDPM, algorithm 2), model predicting eps."""
    schedule = linear_schedule(5, 0.1, 0.4)
    model = Witness(lambda x_t: torch.sin(3 * x_t))  # no straight line, so that x_t and eps can be told apart
    x = torch.randn(64, 1, 8, 8, generator=seeded(2))
    out = call(fn, model.train(), x, schedule, seeded(3))
    _check_visits(model, x, schedule)
    if not isinstance(out, Tensor) or out.shape != x.shape:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise CheckFailed(f"samples have the shape of x, {tuple(x.shape)}; got {got}")
    if out.dtype != x.dtype:
        raise CheckFailed(f"{x.dtype} went in, {out.dtype} came out: take .item() of the schedule's numbers")
    if not bool(out.isfinite().all()):
        raise CheckFailed("the walk did not stay finite: is something divided by sqrt(1 - alpha_bar[t - 1])? That is "
                          "0 at t = 1; the eps of x_t belongs to alpha_bar[t]")
    if out.requires_grad:
        raise CheckFailed("every step was recorded for a gradient, and a thousand steps fill the memory: put "
                          "@torch.no_grad() above the function")
    states = [x_t for x_t, _, _ in model.seen] + [out]
    if max(float(state.abs().max()) for state in states[1:]) <= 1:
        raise CheckFailed("x was clamped to [-1, 1] on the way: x_t is part noise and must be free to leave the range")
    if float(out.abs().max()) <= 1:
        raise CheckFailed("the result was clamped to [-1, 1]: leave that to the caller, who may want to see how far "
                          "it went")
    _check_drawn_anew(states, schedule)
    fits = [_fit(before, after) for before, after in pairwise(states)]
    _check_mean(torch.stack([line for line, _ in fits[::-1]], dim=1), schedule)
    _check_fresh_noise([left for _, left in fits[::-1]], schedule)
    if not torch.equal(out, call(fn, model, x, schedule, seeded(3))):
        raise CheckFailed("the same seed gives other samples: hand rng on, torch.randn(..., generator=rng)")
    if torch.equal(out, call(fn, model, x, schedule, seeded(4))):
        raise CheckFailed("another seed gives the same samples: it is rng that must be asked, and nobody else")
    passed("t = T, ..., 1, each step with the mean of eq. 11 and fresh noise, the last without, in eval mode")


def from_velocity(fn: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """fn(x_t, t, v, schedule) -> (x0, eps), both of them in v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0."""
    schedule, rng = cosine_schedule(1000), seeded(4)
    x0, eps = torch.rand(3, 1, 8, 8, generator=rng) * 2 - 1, torch.randn(3, 1, 8, 8, generator=rng)
    t = torch.tensor([1, 400, 1000])
    a, s = schedule.signal_and_noise(t, like=x0)
    x_t, v = a * x0 + s * eps, a * eps - s * x0
    out = call(fn, x_t, t, v, schedule)
    if not isinstance(out, (tuple, list)) or len(out) != 2:
        raise CheckFailed("return two things: x_0, and eps")
    compare(out[0], x0, {
        "these are eps and x_0: return x_0 first": eps,
        "the sign of v is wrong: x_0 = a x_t - s v, for s^2 x_0 is hidden in -s v": a * x_t + s * v,
        "a and s are swapped: at t = 0, where a = 1, x_0 is x_t": s * x_t - a * v,
        "that is still to be divided by nothing: a^2 + s^2 = 1, so a x_t - s v is x_0 already": x0 / a,
    }, "x_0 does not come back from x_t and v at t = 1, 400, 1000", atol=1e-3)
    compare(out[1], eps, {
        "the sign of x_t is wrong in eps: eps = s x_t + a v": a * v - s * x_t,
        "a and s are swapped in eps: at t = T, where s = 1, eps is x_t": a * x_t + s * v,
    }, "eps does not come back from x_t and v at t = 1, 400, 1000", atol=1e-3)
    for part in out:
        keeps_dtype(part, x_t)
    passed("x_0 and eps both come back from v, at t = 1, 400 and even at T, and nothing was divided by")


def error_factor(fn: Callable[[NoiseSchedule], Tensor]) -> None:
    """fn(schedule) -> (T,): what an error in eps is multiplied by when it is read as an x_0, at t = 1..T."""
    for schedule in (linear_schedule(1000), cosine_schedule(300)):
        ab = schedule.alpha_bar[1:]
        right = ((1 - ab) / ab).sqrt()
        got = call(fn, schedule)
        if isinstance(got, Tensor) and got.shape == (schedule.T + 1,):
            raise CheckFailed("that is one number too many: at t = 0 there is no eps to be wrong about; take t = 1..T")
        got = got.to(right) if isinstance(got, Tensor) else got
        compare(got, right, {
            "the root is missing: eps is multiplied by an amplitude, sqrt(1 - alpha_bar) / sqrt(alpha_bar)": right**2,
            "eps is multiplied by sqrt(1 - alpha_bar) before x_t is divided: so is its error": 1 / ab.sqrt(),
            "that is the way back, from x_0 to eps: turn it over": 1 / right,
            "alpha without the bar is one step; x_t has come t steps": (
                schedule.beta[1:] / schedule.alpha[1:]).sqrt(),
        }, "move eps by 1 in x_0 = (x_t - s eps) / a: by how much does x_0 move?", atol=1e-6)
    passed("an error in eps is s / a times as large in x_0: less than 1 while the signal is the stronger one")


def _waves(angle: Tensor, power: Tensor) -> Tensor:
    angle = angle * 10_000.0**-power
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def _check_drawn_times(t: Tensor, T: int) -> None:
    if bool((t == t[0]).all()):
        raise CheckFailed("the whole batch got one t: draw one for each image, torch.randint(..., (len(x0),))")
    if int(t.min()) < 1:
        raise CheckFailed(f"t = {int(t.min())} was drawn: x_0 at t = 0 holds no noise to be guessed; draw from 1..T")
    counts = torch.bincount(t.long(), minlength=T + 1)[1:T + 1]
    if int(t.max()) == T and bool(((counts - len(t) / T).abs() > 6 * (len(t) / T) ** 0.5).any()):
        raise CheckFailed(f"not every t in 1..{T} is drawn equally often, the counts were {counts.tolist()}: "
                          "torch.randint draws uniformly, rounding does not")
    if int(t.max()) != T:
        raise CheckFailed(f"t = T was never drawn, and that is where every sampler starts: randint leaves its upper "
                          f"end out; the largest of {len(t)} draws was {int(t.max())} of {T}")


def _check_noised(x_t: Tensor, t: Tensor, x0: Tensor, schedule: NoiseSchedule) -> None:
    """x_t measured against eq. 4, time by time: its slope over x_0 (made of -1 and 1), and what is left."""
    if x_t.shape != x0.shape:
        raise CheckFailed(f"x_t has the shape of x_0, {tuple(x0.shape)}; the network was shown {tuple(x_t.shape)}")
    if torch.equal(x_t, x0):
        raise CheckFailed("the network was shown the clean x_0: show it x_t, or there is no noise to be found")
    rows, means = [], []
    for k in range(1, schedule.T + 1):
        noisy, clean = x_t[t == k], x0[t == k]
        slope = (noisy * clean).mean()
        left = noisy - slope * clean
        rows.append(torch.stack([slope, left.square().mean().sqrt()]))
        means.append(left.mean() / rows[-1][1].clamp(min=1e-6))
        if rows[-1][1] > 0.05 and torch.allclose(left[0], left[1], atol=1e-2):
            raise CheckFailed("every image of the batch got the same noise: draw eps in the shape of the whole batch")
    if min(means) > 0.3:
        raise CheckFailed("the noise has a mean above 0: torch.rand is uniform on [0, 1], noise is torch.randn")
    ab = schedule.alpha_bar.float()
    a, s, before = ab[1:].sqrt(), (1 - ab[1:]).sqrt(), ab[:-1]
    compare(torch.stack(rows, dim=1), torch.stack([a, s]), {
        "the variance of the noise is (1 - alpha_bar)^2: did you forget the square root in front of eps?":
            torch.stack([a, s**2]),
        "the image is multiplied by alpha_bar: did you forget the square root in front of x_0?":
            torch.stack([a**2, s]),
        "both square roots of eq. 4 are missing": torch.stack([a**2, s**2]),
        "alpha without the bar makes one small step: the jump from x_0 to x_t takes alpha_bar":
            torch.stack([schedule.alpha[1:], schedule.beta[1:]]).sqrt().float(),
        "alpha_bar is off by one: alpha_bar[t] is the t-th, entry 0 belongs to the clean image":
            torch.stack([before, 1 - before]).sqrt(),
        "signal and noise are swapped: at t = 1 nearly all of x_0 is left": torch.stack([s, a]),
        "the network was shown the noise alone": torch.stack([torch.zeros(4), torch.ones(4)]),
    }, "the network was not shown x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps", atol=0.06)


def _check_visits(model: Witness, x: Tensor, schedule: NoiseSchedule) -> None:
    if not model.seen:
        raise CheckFailed("the network was never asked: call model(x, t) at every step")
    if any(bool((t != t[0]).any()) for _, t, _ in model.seen):
        raise CheckFailed("the images of a batch walk together: torch.full((len(x),), t), one t for all of them")
    visited, T = [int(t[0]) for _, t, _ in model.seen], schedule.T
    wanted = list(range(T, 0, -1))
    if visited == wanted[::-1]:
        raise CheckFailed("the walk goes up: a sampler starts at t = T, in noise, and ends at t = 1")
    if visited[-1] == 0:
        raise CheckFailed(f"the network was asked at t = 0, where nothing is left to remove: t counts T = {T}, ..., 1; "
                          f"range({T}, 0, -1), not range({T - 1}, -1, -1)")
    if visited == wanted[:-1]:
        raise CheckFailed("the last step is missing: range(T, 0, -1) ends at 1, range(T, 1, -1) at 2")
    if visited != wanted:
        raise CheckFailed(f"for T = {T} the network should be asked at t = {wanted}, it was asked at {visited}")
    if any(training for _, _, training in model.seen):
        raise CheckFailed("the network was left in training mode: batch normalisation then lets the images of a batch "
                          "change each other, and dropout adds noise; call model.eval() first")
    if not torch.equal(model.seen[0][0], x):
        raise CheckFailed("the walk did not start at the x it was given, which the caller drew as pure noise")


def _check_drawn_anew(states: list[Tensor], schedule: NoiseSchedule) -> None:
    """What each step adds to eq. 11 must differ from image to image and from step to step."""
    added = []
    for t, (before, after) in zip(range(schedule.T, 0, -1), pairwise(states), strict=True):
        alpha, beta, ab = (one[t].item() for one in (schedule.alpha, schedule.beta, schedule.alpha_bar))
        added.append(after - (before - beta / (1 - ab) ** 0.5 * torch.sin(3 * before)) / alpha**0.5)

    def alike(u: Tensor, v: Tensor) -> bool:
        return bool(min(u.std(), v.std()) > 0.03) and float(F.cosine_similarity(u.flatten(), v.flatten(), 0)) > 0.999

    if alike(added[0][0], added[0][1]):
        raise CheckFailed("every image of the batch got the same noise: draw z in the shape of x")
    if alike(added[0], added[1]):
        raise CheckFailed("every step adds the same noise: draw a fresh z inside the loop")


def _fit(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """One step as c_1 x_t + c_2 eps + rest, by least squares: the two coefficients, and the rest."""
    parts = torch.stack([before, torch.sin(3 * before)], dim=-1).flatten(0, -2).double()
    line = torch.linalg.lstsq(parts, after.double().flatten()[:, None]).solution[:, 0]
    return line, (after.double().flatten() - parts @ line).view_as(after)


def _check_mean(lines: Tensor, schedule: NoiseSchedule) -> None:
    """The coefficients of x_t and eps, (2, T), against DDPM's eq. 11."""
    ab, alpha, beta = schedule.alpha_bar[1:], schedule.alpha[1:], schedule.beta[1:]
    late, root = schedule.beta[:-1], (1 - ab).sqrt()

    def mean(front: Tensor, share: Tensor) -> Tensor:
        return torch.stack([front, -front * share])

    compare(lines, mean(alpha**-0.5, beta / root), {
        "eps is multiplied by beta / (1 - alpha_bar): the root is missing, beta / sqrt(1 - alpha_bar)":
            mean(alpha**-0.5, beta / (1 - ab)),
        "all of the noise is taken away at once: one step takes beta / sqrt(1 - alpha_bar) of eps":
            mean(alpha**-0.5, root),
        "beta is off by one: schedule.beta[t] is beta_t, entry 0 belongs to the clean image":
            mean(alpha**-0.5, late / root),
        "alpha and beta are off by one: schedule.alpha[t] is alpha_t, entry 0 belongs to the clean image":
            mean((1 - late)**-0.5, late / root),
        "the bar is on the wrong alpha: x_t is divided by sqrt(alpha_t), without a bar": mean(ab**-0.5, beta / root),
        "the root is missing in front: divide by sqrt(alpha_t), not by alpha_t": mean(1 / alpha, beta / root),
        "nothing was divided by sqrt(alpha_t): the picture stays as dim as x_t": mean(torch.ones_like(ab), beta / root),
        "the brackets are wrong: sqrt(alpha_t) divides x_t and eps together":
            torch.stack([alpha**-0.5, -beta / root]),
        "eps was added: the noise is to be taken away": mean(alpha**-0.5, -beta / root),
    }, "the mean of a step is not (x_t - beta_t / sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_t), eq. 11", atol=0.06)


def _check_fresh_noise(left: list[Tensor], schedule: NoiseSchedule) -> None:
    """What a step adds beyond its mean, at t = 1, ..., T."""
    std = torch.stack([z.square().mean().sqrt() for z in left])
    if std[0] > 0.03:
        raise CheckFailed("noise was added at the last step, where it stays for ever: z = 0 at t = 1")
    if std.max() < 0.03:
        raise CheckFailed("no step adds noise: without sigma z all walks slide to the mean, and samples come out flat")
    beta, ab = schedule.beta, schedule.alpha_bar
    large, small = beta[2:], beta[2:] * (1 - ab[1:-1]) / (1 - ab[2:])  # DDPM, section 3.2: either will do
    got = std[1:]
    if torch.allclose(got, small.sqrt(), atol=0.03):
        return
    compare(got, large.sqrt(), {
        "z was multiplied by the variance beta_t: its root is the deviation": large,
        "z was multiplied by the posterior's variance: its root is the deviation": small,
        "z was multiplied by 1: one step adds little noise, of deviation sqrt(beta_t)": torch.ones_like(large),
        "the noise is that of x_t, sqrt(1 - alpha_bar_t): one step adds sqrt(beta_t)": (1 - ab[2:]).sqrt(),
        "beta is off by one in the noise: schedule.beta[t] is beta_t": beta[1:-1].sqrt(),
    }, "the fresh noise has neither variance beta_t nor the posterior's", atol=0.03)
