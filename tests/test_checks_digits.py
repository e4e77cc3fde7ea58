"""The checks of notebook 04 pass the right answers and catch, by name, each mistake they claim to catch."""

import pytest
import torch
import torch.nn.functional as F
from support import generator, suite_of

from coursekit import checks, diffusion


def features(scale=lambda T: 1000 / T, pairs=1.0, sign=-1.0, join=lambda s, c: torch.cat([s, c], 1), wave=True):
    def time_features(t, width, T):
        k = torch.arange(width // 2) / (width // 2) / pairs
        angle = t[:, None] * scale(T) * 10_000.0**(sign * k)
        return join(angle.sin(), angle.cos()) if wave else join(angle, angle)
    return time_features


def root(schedule, name, t, like):
    return getattr(schedule, name)[t].sqrt().to(like).view(-1, 1, 1, 1)


def loss(low=1, high=1, times=None, draw=torch.randn, noised=diffusion.add_noise, target="eps", end=F.mse_loss,
         shown=None, rng_used=True, calls=1):
    """L_simple with one thing changed."""
    def noise_prediction_loss(model, x0, schedule, rng):
        rng = rng if rng_used else None
        t = torch.randint(low, schedule.T + high, (len(x0),), generator=rng)
        t = t if times is None else times(t, schedule)
        eps = draw(x0.shape, generator=rng)
        x_t = noised(x0, t, eps, schedule)
        answers = [model(*(shown(x_t, t, x0, eps, schedule) if shown else (x_t, t))) for _ in range(calls)]
        with_what = {"eps": lambda: eps, "x0": lambda: x0, "x_t": lambda: x_t, "other": lambda: draw(
            x0.shape, generator=rng), "v": lambda: diffusion.v_from_x0_eps(x0, t, eps, schedule)}[target]()
        return end(answers[-1], with_what)
    return noise_prediction_loss


def noised_with(signal, noise):
    def add_noise(x0, t, eps, schedule):
        ab = schedule.alpha_bar[t].to(x0).view(-1, 1, 1, 1)
        return signal(ab) * x0 + noise(ab) * eps
    return add_noise


def one_step_noised(x0, t, eps, schedule):
    return root(schedule, "alpha", t, x0) * x0 + root(schedule, "beta", t, x0) * eps


def double_noised(x0, t, eps, schedule):
    """The schedule's numbers as they are, in float64."""
    ab = schedule.alpha_bar[t].view(-1, 1, 1, 1)
    return ab.sqrt() * x0 + (1 - ab).sqrt() * eps


def seldom_late(t, schedule):
    """A quarter as many draws of T as of the others."""
    return torch.where((t == schedule.T) & (torch.arange(len(t)) % 4 > 0), 1, t)


def sampler(times=lambda T: range(T, 0, -1), share=lambda s, t: s.beta[t] / (1 - s.alpha_bar[t]).sqrt(),
            front=lambda s, t: 1 / s.alpha[t].sqrt(), inner=None, std=lambda s, t: s.beta[t].sqrt(), last=0.0,
            mode="eval", one_z=None, ask=None, end=lambda x: x, keep=lambda x: x, own_rng=True, start=None):
    """DDPM's algorithm 2 with one thing changed."""
    def ancestral_sampler(model, x, schedule, rng):
        getattr(model, mode)()
        x = x if start is None else start(x)
        held = None
        for t in times(schedule.T):
            eps = model(*(ask(x, t) if ask else (x, torch.full((len(x),), t)))).detach()
            shape = x.shape if one_z != "images" else (1, *x.shape[1:])
            z = torch.randn(shape, generator=rng if own_rng else None)
            held = z if held is None else held
            z = held if one_z == "steps" else z
            f, c = float(front(schedule, t)), float(share(schedule, t))
            mean = f * (x - c * eps) if inner is None else inner(x, eps, f, c)
            x = keep(mean + (float(std(schedule, t)) if t > 1 else last) * z)
        return end(x)
    return ancestral_sampler


def tracked(model, x, schedule, rng):
    model.eval()
    for t in range(schedule.T, 0, -1):
        eps = model(x, torch.full((len(x),), t))
        x = (x - float(schedule.beta[t] / (1 - schedule.alpha_bar[t]).sqrt()) * eps) / float(schedule.alpha[t]) ** 0.5
    return x


def velocity(x0=lambda x, v, a, s: a * x - s * v, eps=lambda x, v, a, s: s * x + a * v):
    def from_velocity(x_t, t, v, schedule):
        a, s = schedule.signal_and_noise(t, like=x_t)
        return x0(x_t, v, a, s), eps(x_t, v, a, s)
    return from_velocity


def posterior_std(s, t):
    return (s.beta[t] * (1 - s.alpha_bar[t - 1]) / (1 - s.alpha_bar[t])).sqrt()


def factor(of):
    return lambda schedule: of(schedule.alpha_bar[1:])


RIGHT = {
    "time_features": [features()],
    "noise_prediction_loss": [loss(), diffusion.noise_prediction_loss],
    "ancestral_sampler": [sampler(), sampler(std=posterior_std)],
    "from_velocity": [velocity(), lambda x_t, t, v, schedule: diffusion.x0_eps_from_v(x_t, t, v, schedule)],
    "error_factor": [factor(lambda ab: ((1 - ab) / ab).sqrt())],
}

PLANTED = [
    ("time_features", features(scale=lambda T: 1.0), "t is not scaled"),
    ("time_features", features(scale=lambda T: 1 / T), r"scaled to 0\.\.1"),
    ("time_features", features(pairs=2.0), "only half as far"),
    ("time_features", features(pairs=3 / 4), "number of pairs"),
    ("time_features", features(scale=lambda T: 1000 // T), "whole number, 3 for"),
    ("noise_prediction_loss", loss(noised=double_noised), "float64"),
    ("noise_prediction_loss", loss(times=seldom_late), "equally often"),
    ("ancestral_sampler", sampler(start=lambda x: x.double()), "float64"),
    ("ancestral_sampler", sampler(end=lambda x: x.double()), "came out"),
    ("ancestral_sampler", lambda model, x, s, rng: sampler()(model, x, s, generator(7)), "another seed"),
    ("noise_prediction_loss", lambda model, x0, s, rng: loss()(model, x0, s, generator(7)), "another seed"),
    ("from_velocity", lambda x_t, t, v, s: diffusion.x0_eps_from_v(x_t.double(), t, v.double(), s), "float64 came out"),
    ("ancestral_sampler", sampler(end=lambda x: x.clamp(-1, 1)), "result was clamped"),
    ("time_features", features(sign=1.0), "the exponent is negative"),
    ("time_features", features(join=lambda s, c: torch.cat([c, s], 1)), "cosines come first"),
    ("time_features", features(join=lambda s, c: torch.stack([s, c], 2).flatten(1)), "alternate"),
    ("time_features", features(wave=False), "sines and cosines are missing"),
    ("time_features", features(join=lambda s, c: s), r"shape \(4, 8\), got \(4, 4\)"),
    ("time_features", features(scale=lambda T: 500 / T), "these are not sin and cos"),

    ("noise_prediction_loss", loss(calls=2), "asked 2 times"),
    ("noise_prediction_loss", loss(shown=lambda x_t, t, *_: (x_t,)), "for t it got nothing"),
    ("noise_prediction_loss", loss(shown=lambda x_t, t, *_: (x_t, int(t[0]))), "one time per image"),
    ("noise_prediction_loss", loss(shown=lambda x_t, t, x0, eps, s: (x_t, t / s.T)), "business of the network's"),
    ("noise_prediction_loss", loss(times=lambda t, s: t[:1].expand(len(t))), "whole batch got one t"),
    ("noise_prediction_loss", loss(low=0), "t = 0 was drawn"),
    ("noise_prediction_loss", loss(low=0, high=0), "t = 0 was drawn"),
    ("noise_prediction_loss", loss(high=0), "t = T was never drawn"),
    ("noise_prediction_loss", loss(shown=lambda x_t, t, x0, *_: (x0, t)), "clean x_0"),
    ("noise_prediction_loss", loss(shown=lambda x_t, t, x0, eps, s: (eps, t)), "the noise alone"),
    ("noise_prediction_loss", loss(shown=lambda x_t, t, *_: (x_t[:, 0], t), end=lambda x, y: x.mean()),
     "x_t has the shape of x_0"),
    ("noise_prediction_loss", loss(draw=lambda shape, generator: torch.randn(shape[1:], generator=generator).expand(
        shape)), "the same noise"),
    ("noise_prediction_loss", loss(draw=torch.rand), "mean above 0"),
    ("noise_prediction_loss", loss(noised=noised_with(torch.sqrt, lambda ab: 1 - ab)), "in front of eps"),
    ("noise_prediction_loss", loss(noised=noised_with(lambda ab: ab, lambda ab: (1 - ab).sqrt())), "in front of x_0"),
    ("noise_prediction_loss", loss(noised=noised_with(lambda ab: ab, lambda ab: 1 - ab)), "both square roots"),
    ("noise_prediction_loss", loss(noised=noised_with(lambda ab: (1 - ab).sqrt(), torch.sqrt)), "swapped"),
    ("noise_prediction_loss", loss(noised=one_step_noised), "without the bar"),
    ("noise_prediction_loss", loss(noised=lambda x0, t, eps, s: diffusion.add_noise(x0, t - 1, eps, s)), "off by one"),
    ("noise_prediction_loss", loss(noised=noised_with(torch.sqrt, torch.sqrt)), "was not shown x_t"),
    ("noise_prediction_loss", loss(target="x0"), "compared with x_0"),
    ("noise_prediction_loss", loss(target="x_t"), "compared with x_t"),
    ("noise_prediction_loss", loss(target="other"), "drawn twice"),
    ("noise_prediction_loss", loss(target="v"), "compared with v"),
    ("noise_prediction_loss", loss(end=lambda x, y: (x - y).square().sum()), "were summed"),
    ("noise_prediction_loss", loss(end=F.l1_loss), "not squared"),
    ("noise_prediction_loss", loss(end=lambda x, y: F.mse_loss(x, y).sqrt()), "the root of eq. 14"),
    ("noise_prediction_loss", loss(end=lambda x, y: 2 * F.mse_loss(x, y)), "not the mean square"),
    ("noise_prediction_loss", loss(end=lambda x, y: (x - y).square().mean((1, 2, 3))), r"end in a mean; got shape"),
    ("noise_prediction_loss", loss(end=lambda x, y: F.mse_loss(x, y).item()), "got float"),
    ("noise_prediction_loss", loss(end=lambda x, y: F.mse_loss(x.detach(), y)), "no gradient"),
    ("noise_prediction_loss", loss(rng_used=False), "hand rng on"),

    ("ancestral_sampler", sampler(times=lambda T: ()), "never asked"),
    ("ancestral_sampler", sampler(times=lambda T: range(1, T + 1)), "goes up"),
    ("ancestral_sampler", sampler(times=lambda T: range(T - 1, -1, -1)), "asked at t = 0"),
    ("ancestral_sampler", sampler(times=lambda T: range(T, 1, -1)), "last step is missing"),
    ("ancestral_sampler", sampler(times=lambda T: range(T, 0, -2)), r"it was asked at \[5, 3, 1\]"),
    ("ancestral_sampler", sampler(ask=lambda x, t: (x, t)), "one time per image"),
    ("ancestral_sampler", sampler(ask=lambda x, t: (x, torch.arange(len(x)))), "walk together"),
    ("ancestral_sampler", sampler(mode="train"), "left in training mode"),
    ("ancestral_sampler", sampler(start=torch.ones_like), "did not start at the x"),
    ("ancestral_sampler", sampler(end=lambda x: x[0]), "have the shape of x"),
    ("ancestral_sampler", sampler(share=lambda s, t: s.beta[t] / (1 - s.alpha_bar[t - 1]).sqrt()), "stay finite"),
    ("ancestral_sampler", tracked, "no_grad"),
    ("ancestral_sampler", sampler(keep=lambda x: x.clamp(-1, 1)), "clamped"),
    ("ancestral_sampler", sampler(share=lambda s, t: s.beta[t] / (1 - s.alpha_bar[t])), "the root is missing, beta"),
    ("ancestral_sampler", sampler(share=lambda s, t: (1 - s.alpha_bar[t]).sqrt()), "all of the noise"),
    ("ancestral_sampler", sampler(share=lambda s, t: s.beta[t - 1] / (1 - s.alpha_bar[t]).sqrt()),
     "beta is off by one"),
    ("ancestral_sampler", sampler(share=lambda s, t: s.beta[t - 1] / (1 - s.alpha_bar[t]).sqrt(),
                                  front=lambda s, t: 1 / s.alpha[t - 1].sqrt()), "alpha and beta are off by one"),
    ("ancestral_sampler", sampler(front=lambda s, t: 1 / s.alpha_bar[t].sqrt()), "the wrong alpha"),
    ("ancestral_sampler", sampler(front=lambda s, t: 1 / s.alpha[t]), "missing in front"),
    ("ancestral_sampler", sampler(front=lambda s, t: 1.0), "as dim as x_t"),
    ("ancestral_sampler", sampler(inner=lambda x, eps, f, c: f * x - c * eps), "brackets"),
    ("ancestral_sampler", sampler(inner=lambda x, eps, f, c: f * (x + c * eps)), "to be taken away"),
    ("ancestral_sampler", sampler(front=lambda s, t: 2.0), "not .* eq. 11"),
    ("ancestral_sampler", sampler(last=0.3), "z = 0 at t = 1"),
    ("ancestral_sampler", sampler(std=lambda s, t: 0.0), "no step adds noise"),
    ("ancestral_sampler", sampler(one_z="images"), "every image of the batch"),
    ("ancestral_sampler", sampler(one_z="steps"), "fresh z inside the loop"),
    ("ancestral_sampler", sampler(std=lambda s, t: s.beta[t]), "the variance beta_t"),
    ("ancestral_sampler", sampler(std=lambda s, t: posterior_std(s, t) ** 2), "the posterior's variance: its root"),
    ("ancestral_sampler", sampler(std=lambda s, t: 1.0), "multiplied by 1"),
    ("ancestral_sampler", sampler(std=lambda s, t: (1 - s.alpha_bar[t]).sqrt()), "that of x_t"),
    ("ancestral_sampler", sampler(std=lambda s, t: s.beta[t - 1].sqrt()), "off by one in the noise"),
    ("ancestral_sampler", sampler(std=lambda s, t: 2 * s.beta[t].sqrt()), "neither variance"),
    ("ancestral_sampler", sampler(own_rng=False), "hand rng on"),

    ("from_velocity", lambda x_t, t, v, schedule: x_t, "two things"),
    ("from_velocity", lambda *args: velocity()(*args)[::-1], "x_0 first"),
    ("from_velocity", velocity(x0=lambda x, v, a, s: a * x + s * v), "sign of v is wrong"),
    ("from_velocity", velocity(x0=lambda x, v, a, s: s * x - a * v), "a and s are swapped: at t = 0"),
    ("from_velocity", velocity(x0=lambda x, v, a, s: (a * x - s * v) / a), "divided by nothing"),
    ("from_velocity", velocity(x0=lambda x, v, a, s: x), "x_0 does not come back"),
    ("from_velocity", velocity(eps=lambda x, v, a, s: a * v - s * x), "sign of x_t is wrong"),
    ("from_velocity", velocity(eps=lambda x, v, a, s: a * x + s * v), "swapped in eps"),
    ("from_velocity", velocity(eps=lambda x, v, a, s: v), "eps does not come back"),

    ("error_factor", lambda schedule: ((1 - schedule.alpha_bar) / schedule.alpha_bar).sqrt(), "one number too many"),
    ("error_factor", factor(lambda ab: (1 - ab) / ab), "the root is missing"),
    ("error_factor", factor(lambda ab: ab**-0.5), "so is its error"),
    ("error_factor", factor(lambda ab: (ab / (1 - ab)).sqrt()), "the way back"),
    ("error_factor", lambda s: (s.beta[1:] / s.alpha[1:]).sqrt(), "alpha without the bar"),
    ("error_factor", factor(torch.ones_like), "by how much does x_0 move"),
]


test_right_answers_pass, test_planted_mistakes_are_named, test_no_check_is_forgotten = suite_of(
    RIGHT, PLANTED, "digits")


@pytest.mark.parametrize("seed", range(5))
def test_the_order_in_which_an_honest_answer_draws_does_not_matter(seed, capsys):
    def eps_first(model, x0, schedule, rng):
        torch.randn(seed + 1, generator=rng)
        eps = torch.randn(x0.shape, generator=rng)
        t = torch.randint(1, schedule.T + 1, (len(x0),), generator=rng)
        return F.mse_loss(model(diffusion.add_noise(x0, t, eps, schedule), t), eps)

    def z_for_every_step(model, x, schedule, rng):
        torch.randn(seed + 1, generator=rng)
        return sampler()(model, x, schedule, rng)

    checks.noise_prediction_loss(eps_first)
    checks.ancestral_sampler(z_for_every_step)
    assert capsys.readouterr().out.count("passed: ") == 2
