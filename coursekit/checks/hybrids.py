"""Checks of notebook 09: a sampler and its betas, a variance that grows, a fair distortion, noise with a colour."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from coursekit.checks.core import CheckFailed, call, compare, passed, seeded
from coursekit.denoisers import Denoiser, Prediction
from coursekit.diffusion import add_noise
from coursekit.schedules import NoiseSchedule, cosine_schedule, linear_schedule

ONE = torch.ones((), dtype=torch.float64)


def audit(fn: Callable[[Tensor], Any]) -> None:
    """fn(beta (T,)) -> (deviation of the noise that the first step adds, amplitude of the picture left after T)."""
    rising = torch.linspace(1e-4, 1e-2, 800, dtype=torch.float64)
    for beta in (rising, rising.flip(0), torch.linspace(2e-4, 0.03, 50, dtype=torch.float64)):
        got = call(fn, beta)
        if isinstance(got, Tensor) and got.shape == (2,):
            got = got.tolist()
        if not isinstance(got, (tuple, list)) or len(got) != 2:
            raise CheckFailed("two numbers were wanted: the deviation of the first step's noise, and the share of the "
                              "picture's amplitude that is left")
        first, left = beta[0].sqrt(), (1 - beta).prod().sqrt()
        compare(_number(got[0], "the first answer"), first, {
            "the first number is beta_1 itself, a variance: its root is the deviation": beta[0],
            "the first number is of the last step: the sequence begins at beta[0]": beta[-1].sqrt(),
            "the first number is of the last step, and a variance": beta[-1],
            "the two numbers are swapped: first the noise of step 1, then what is left of the picture": left,
        }, f"the first step adds noise of deviation {first:.4f}", atol=1e-7)
        compare(_number(got[1], "the second answer"), left, {
            "alpha_bar_T is what is left of the picture's *variance*: of its amplitude the root is left": left**2,
            "this is how much noise there is at T, not how much picture: sqrt(alpha_bar_T)": (1 - left**2).sqrt(),
            "alpha_bar is a product of the alphas, 1 - beta, not of the betas": beta.prod().sqrt(),
            "only the last step was taken: multiply all the alphas": (1 - beta[-1]).sqrt(),
        }, f"after {len(beta)} steps {left:.4f} of the amplitude is left", atol=1e-7)
    passed("the noise of the first step and the picture left at the end, for three sequences of betas")


def reverse_step(fn: Callable[[Tensor, Tensor, Tensor, int, Tensor], Tensor]) -> None:
    """fn(x_t, eps, z, i, beta (T,)) -> x one step earlier (DDPM, algorithm 2), i = 0..T-1 as arrays count."""
    beta = torch.linspace(1e-4, 1e-2, 800, dtype=torch.float64)
    ab = (1 - beta).cumprod(0)
    x, eps, z = _noise(3, 2, 1, 4, 4)
    for i in (400, 1, 0, 799):
        before = ab[i - 1] if i else ONE
        var = (1 - before) / (1 - ab[i]) * beta[i]
        noise = var.sqrt() * z

        def mean(inside: Tensor, root: Tensor = 1 - beta[i], sign: int = -1, i: int = i) -> Tensor:
            return (x + sign * beta[i] / (1 - inside).sqrt() * eps) / root.sqrt()

        wrapped = ((1 - ab[i - 1]) / (1 - ab[i]) * beta[i]).sqrt() * z
        compare(call(fn, x, eps, z, i, beta), mean(ab[i]) + noise, {
            "the bug is still there: eps is divided by the noise of the step *before*, alpha_bar[i - 1]. x_t has the "
            "noise of its own time": mean(ab[i - 1]) + noise,
            "at i = 0 the noise's alpha_bar[i - 1] is alpha_bar[-1], and Python counts that from the end: the clean "
            "picture has alpha_bar = 1, so the last step adds nothing": mean(ab[i]) + wrapped,
            "both are read at alpha_bar[-1] when i = 0": mean(ab[i - 1]) + wrapped,
            "eps is divided by the noise of the step after, alpha_bar[i + 1]: now the index is off the other way":
                mean(ab[min(i + 1, 799)]) + noise,
            "the noise is beta_t's here: for this exercise leave the posterior's, which the program had":
                mean(ab[i]) + beta[i].sqrt() * z,
            "z is multiplied by a variance: the root is missing": mean(ab[i]) + var * z,
            "z was left out: this is the mean only": mean(ab[i]),
            "the whole is divided by the root of alpha_bar: one step back is one alpha":
                mean(ab[i], root=ab[i]) + noise,
            "the noise is added a second time: subtract eps": mean(ab[i], sign=1) + noise,
        }, f"at i = {i} this is not the mean of DDPM's algorithm 2 plus the posterior's noise", atol=1e-7)
    passed("eps is divided by the noise of its own time, at four times, and the last step adds nothing")


def spread(fn: Callable[[NoiseSchedule, float], Any]) -> None:
    """fn(schedule, start) -> (T + 1,) deviations at t = T..0 when the predicted noise ignores x_t."""
    short = NoiseSchedule(torch.tensor([1, 0.9, 0.7, 0.4, 0.1], dtype=torch.float64))
    for schedule, start in ((short, 0.5), (short, 0.0), (linear_schedule(800, 1e-4, 1e-2), 1.0)):
        def walk(back: Callable[[Tensor, Tensor, Tensor], Tensor], var: float = start**2,
                 schedule: NoiseSchedule = schedule, a: Tensor = schedule.alpha) -> Tensor:
            found = [var * ONE]
            for t in range(schedule.T, 0, -1):
                ab, before = schedule.alpha_bar[t], schedule.alpha_bar[t - 1]
                found.append(back(found[-1], a[t], (1 - before) / (1 - ab) * (1 - ab / before)))
            return torch.stack(found)

        right = walk(lambda v, a, post: v / a + post)
        got = call(fn, schedule, start)
        if isinstance(got, (list, tuple)):
            raise CheckFailed("a tensor of T + 1 numbers was wanted, got a list: torch.stack or torch.tensor")
        compare(got, right.sqrt(), {
            "these are variances: take the root at the end": right,
            "the order is turned round: begin at t = T, where the sampler does": right.sqrt().flip(0),
            "each step back was multiplied by alpha_t: the mean *divides* x_t by its root":
                walk(lambda v, a, post: v * a + post).sqrt(),
            "a variance is divided by the square of what divides x_t, and that is sqrt(alpha_t) squared, not alpha_t "
            "squared": walk(lambda v, a, post: v / a**2 + post).sqrt(),
            "the variance was divided by sqrt(alpha_t), as the picture is: a variance takes the square":
                walk(lambda v, a, post: v / a.sqrt() + post).sqrt(),
            "deviations were added: independent parts add their variances":
                walk(lambda d, a, post: d / a.sqrt() + post.sqrt(), start),
            "the noise that each step adds is missing": walk(lambda v, a, post: v / a).sqrt(),
            "only the noise is there, what came before was dropped":
                torch.cat([ONE[None] * start, walk(lambda v, a, post: post)[1:].sqrt()]),
            "the noise added is beta_t's: here it is the posterior's, which is 0 at the last step":
                walk(lambda v, a, post: v / a + 1 - a).sqrt(),
            "the start is not used: the first variance is start squared":
                walk(lambda v, a, post: v / a + post, 1.0).sqrt(),
            "the start is a deviation: square it to begin with": walk(lambda v, a, post: v / a + post, start).sqrt(),
            "the alphas are one step off: the step from t to t - 1 divides by alpha_t":
                walk(lambda v, a, post: v / a + post, a=schedule.alpha.roll(1)).sqrt(),
        }, "Var_{t-1} = Var_t / alpha_t + posterior variance was wanted, its root at every t from T down to 0",
            atol=1e-6, shape_hint=": the start and one number for each of the T steps")
    passed("three walks, from the start to t = 0: without a guess that looks at x_t nothing is ever taken away")


def distortion(fn: Callable[[Denoiser, Tensor, int, Tensor, NoiseSchedule], Tensor]) -> None:
    """fn(denoise, x0, t, eps, schedule) -> (b,) root mean squared errors of the clipped guess, on the 0..255 scale."""
    schedule, (x0, eps) = cosine_schedule(20), _noise(2, 3, 1, 4, 4)
    x0 = x0.clamp(-1, 1)
    for t in (3, 12):
        x_t = add_noise(x0, t, eps, schedule)
        seen: list[Tensor] = []

        def denoise(x: Tensor, times: Tensor, t: int = t, seen: list[Tensor] = seen) -> Prediction:
            if not isinstance(times, Tensor) or times.shape != (len(x0),) or not bool((times == t).all()):
                raise CheckFailed(f"denoise wants one time per picture: torch.full((len(x0),), t), here {t}")
            seen.append(x.clone())
            return Prediction(_guess(x), x)

        got = call(fn, denoise, x0, t, eps, schedule)
        if not seen:
            raise CheckFailed("denoise was never asked: the distortion is that of its guess")
        if torch.allclose(seen[0].double(), x0):
            raise CheckFailed("denoise was shown the clean picture: put the noise of time t on first")
        if not torch.allclose(seen[0].double(), x_t, atol=1e-5):
            raise CheckFailed("denoise was shown something else than x_t = a x0 + s eps")
        guess = _guess(x_t).clamp(-1, 1)
        mse = (guess - x0).square().mean((1, 2, 3))
        compare(got, 127.5 * mse.sqrt(), {
            "strangers: each guess is compared with *another* picture of the batch":
                lambda got, guess=guess: any(torch.allclose(got.double(), 127.5 * _rmse(guess, x0[order]), atol=1e-3)
                                             for order in ([1, 2, 0], [2, 0, 1], [2, 1, 0])),
            "this is how far the noisy x_t is from x0: ask for the guess, denoise(...).x0": 127.5 * _rmse(x_t, x0),
            "the guess may leave [-1, 1] and no picture does: clip it first": 127.5 * _rmse(_guess(x_t), x0),
            "this is on the scale of [-1, 1]: bytes are 127.5 times as wide": mse.sqrt(),
            "[-1, 1] is 2 wide and bytes are 255 wide: multiply by 127.5, not by 255": 255 * mse.sqrt(),
            "this is a mean square: take its root": mse,
            "the root is missing: root first, then 127.5": 127.5 * mse,
            "this is the mean absolute error: square, mean, root": 127.5 * (guess - x0).abs().mean((1, 2, 3)),
        }, "127.5 times the root of the mean square of (clipped guess - x0) was wanted, picture by picture", atol=1e-3,
            shape_hint=": one number for each picture, a mean over channels, rows and columns")
    passed("each picture is compared with the guess made from its own noisy self, clipped, on the scale of bytes")


def noised_prior(fn: Callable[[Tensor, int, Tensor, NoiseSchedule], Tensor]) -> None:
    """fn(dip in [0, 1], t0, eps, schedule) -> a draw of q(x_t0 | DIP's picture), for a network that knows [-1, 1]."""
    schedule, dip, (eps,) = cosine_schedule(10), _noise(1, 2, 3, 4, 4)[0].sigmoid(), _noise(1, 2, 3, 4, 4, seed=1)
    for t in (3, 8):
        a, s = schedule.signal_and_noise(t, like=dip)
        x = 2 * dip - 1
        compare(call(fn, dip, t, eps, schedule), a * x + s * eps, {
            "DIP's sigmoid answers in [0, 1], and the diffusion network knows pictures in [-1, 1]: 2 dip - 1 first":
                a * dip + s * eps,
            "the range was changed after the noise came in: it would stretch the noise too":
                2 * (a * dip + s * eps) - 1,
            "the network is promised a x0 + s eps: the picture's factor a = sqrt(alpha_bar) is missing": x + s * eps,
            "the noise has not its factor: s = sqrt(1 - alpha_bar)": a * x + eps,
            "there is no noise in it: at t0 the network expects a draw of q, with noise": a * x,
            "this is DIP's picture as it is: at t0 the network expects a draw of q, with noise": x,
            "there is nothing of the picture in it": s * eps,
            "the roots are missing in front: a = sqrt(alpha_bar), s = sqrt(1 - alpha_bar)": a**2 * x + s**2 * eps,
            "picture and noise have each other's factors": s * x + a * eps,
        }, f"a (2 dip - 1) + s eps was wanted at t0 = {t}")
    passed("the picture in [-1, 1], made fainter by a, and noise of deviation s: a draw of q at t0")


def coloured_step(fn: Callable[..., Tensor]) -> None:
    """fn(x_t, x0, z, t, s, schedule, mu, colour) -> x_s for x_t = a x0 + s (mu + colour(white noise)), s < t."""
    schedule, (x_t, x0, z) = cosine_schedule(10), _noise(3, 5, 2)
    mu, L = torch.tensor([1.5, -1.0]).double(), torch.tensor([[1.2, 0.0], [0.7, 0.4]]).double()

    def colour(white: Tensor) -> Tensor:
        return white @ L.T

    for t, s in ((8, 7), (9, 4), (1, 0)):
        (a_t, n_t), (a_s, n_s) = (schedule.signal_and_noise(time, like=x_t) for time in (t, s))
        keep = a_t / a_s
        var = 1 - keep**2
        c_x0, c_xt, std = a_s * var / n_t**2, keep * n_s**2 / n_t**2, var.sqrt() * n_s / n_t

        def step(off: Tensor, back: Tensor, noise: Tensor, c: tuple[Tensor, ...] = (c_x0, c_xt, std)) -> Tensor:
            return c[0] * x0 + c[1] * (x_t - off) + back + c[2] * noise

        none = torch.zeros_like(mu)
        compare(call(fn, x_t, x0, z, t, s, schedule, mu, colour), step(n_t * mu, n_s * mu, colour(z)), {
            "this is the ordinary step: neither the mean nor the colour of the noise is in it": step(none, none, z),
            "the mean of the noise is forgotten: s_t mu has to come off x_t, and s_s mu has to go back on":
                step(none, none, colour(z)),
            "the new noise is white: the colour that q has, the sampler must have, colour(z)":
                step(n_t * mu, n_s * mu, z),
            "s_t mu came off and was never put back: at time s the noise has the mean s_s mu":
                step(n_t * mu, none, colour(z)),
            "s_s mu went on, but s_t mu never came off x_t": step(none, n_s * mu, colour(z)),
            "what goes back on belongs to the time of arrival: s_s mu, not s_t mu": step(n_t * mu, n_t * mu, colour(z)),
            "mu came off whole: in x_t there is only s_t of it": step(mu, mu, colour(z)),
            "mu came off whole, and s_s of it went back on: in x_t there is only s_t of it":
                step(mu, n_s * mu, colour(z)),
            "mu is counted twice: what the step adds has mean zero, colour(z) alone":
                step(n_t * mu, n_s * mu, colour(z) + mu),
            "the colour was put on twice: z comes in white": step(n_t * mu, n_s * mu, colour(colour(z))),
            "no noise is added: this is the mean of the posterior": step(n_t * mu, n_s * mu, none),
        }, f"from t = {t} to s = {s}: c_x0 x0 + c_xt (x_t - s_t mu) + s_s mu + std colour(z) was wanted", atol=1e-6)
    passed("mean and colour go through the step, and at s = 0 nothing of either is left")


def _guess(x: Tensor) -> Tensor:
    """What the denoiser of `distortion` says: wrong, and now and then outside [-1, 1]."""
    return 1.3 * x + 0.2


def _rmse(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).square().mean((1, 2, 3)).sqrt()


def _number(x: Any, what: str) -> Tensor:
    try:
        return torch.as_tensor(float(x), dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise CheckFailed(f"{what} should be one number, got {type(x).__name__}") from None


def _noise(n: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(n, *shape, generator=seeded(seed), dtype=torch.float64)
