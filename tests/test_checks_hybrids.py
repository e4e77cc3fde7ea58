"""The checks of notebook 09 pass what is right and name each mistake they claim to catch."""

import torch
from support import generator, randn, suite_of

from coursekit.checks.hybrids import ONE
from coursekit.denoisers import Prediction
from coursekit.diffusion import add_noise, posterior
from coursekit.schedules import NoiseSchedule, linear_schedule


def back(inside=lambda i: i, early=True, spread=torch.sqrt, root=None, sign=-1, fixed_large=False):
    """A step of the sampler in array indices, with one thing changed."""
    def step(x_t, eps, z, i, beta):
        ab = (1 - beta).cumprod(0)
        divisor = 1 - beta[i] if root is None else ab[i]
        mean = (x_t + sign * beta[i] / (1 - ab[inside(i)]).sqrt() * eps) / divisor.sqrt()
        if early and i == 0:
            return mean
        var = beta[i] if fixed_large else (1 - ab[i - 1]) / (1 - ab[i]) * beta[i]
        return mean + spread(var) * z
    return step


def numbers(first=lambda b: b[0].sqrt(), left=lambda b: (1 - b).prod().sqrt()):
    return lambda beta: (first(beta), left(beta))


def wide(change=lambda v, a, post: v / a + post, end=torch.sqrt, start=lambda d: d**2, shift=0):
    """The walk of a variance back in time, with one thing changed."""
    def spread(schedule, d):
        ab, alpha = schedule.alpha_bar, schedule.alpha.roll(shift)
        found = [start(d) * ONE]
        for t in range(schedule.T, 0, -1):
            post = (1 - ab[t - 1]) / (1 - ab[t]) * (1 - ab[t] / ab[t - 1])
            found.append(change(found[-1], alpha[t], post))
        return end(torch.stack(found))
    return spread


def error(of=lambda guess, x_t, x0: (guess.clamp(-1, 1) - x0).square().mean((1, 2, 3)).sqrt(), scale=127.5):
    def distortion(denoise, x0, t, eps, schedule):
        x_t = add_noise(x0, t, eps, schedule)
        return scale * of(denoise(x_t, torch.full((len(x0),), t)).x0, x_t, x0)
    return distortion


def root_of(guess, x0):
    return (guess - x0).square().mean((1, 2, 3)).sqrt()


def shown(what, times=lambda x0, t: torch.full((len(x0),), t)):
    """A distortion that shows the denoiser something else."""
    def distortion(denoise, x0, t, eps, schedule):
        return denoise(what(x0, t, eps, schedule), times(x0, t)).x0.mean((1, 2, 3))
    return distortion


def entered(make):
    """A start of the chain from (a, s, dip, eps)."""
    def noised_prior(dip, t0, eps, schedule):
        return make(*schedule.signal_and_noise(t0, like=dip), dip, eps)
    return noised_prior


def coloured(off=lambda n_t, n_s: n_t, on=lambda n_t, n_s: n_s, noise=lambda z, colour, mu: colour(z)):
    """A step with noise that has a mean and a colour; `off` and `on` say how much of the mean comes off and goes on."""
    def step(x_t, x0, z, t, s, schedule, mu, colour):
        n_t, n_s = (schedule.signal_and_noise(time, like=x_t)[1] for time in (t, s))
        mean, std = posterior(x0, x_t - off(n_t, n_s) * mu, t, s, schedule)
        return mean + on(n_t, n_s) * mu + std * noise(z, colour, mu)
    return step


RIGHT = {
    "audit": [numbers(), lambda b: [b[0].item() ** 0.5, (1 - b).log().sum().mul(0.5).exp().item()],
              lambda b: torch.stack(numbers()(b)), lambda b: torch.stack(numbers()(b)).float()],
    "reverse_step": back(),
    "spread": [wide(), lambda s, d: wide()(s, d).float()],
    "distortion": error(),
    "noised_prior": entered(lambda a, s, dip, eps: a * (2 * dip - 1) + s * eps),
    "coloured_step": coloured(),
}

PLANTED = [
    ("audit", lambda b: b[0].sqrt(), "two numbers were wanted"),
    ("audit", lambda b: (1 - b).cumprod(0).sqrt(), "two numbers were wanted"),
    ("audit", lambda b: torch.stack(numbers(first=lambda b: b[0])(b)), "beta_1 itself, a variance"),
    ("audit", numbers(first=lambda b: b.sqrt()), "should be one number"),
    ("audit", numbers(first=lambda b: b[0]), "beta_1 itself, a variance"),
    ("audit", numbers(first=lambda b: b[-1].sqrt()), "begins at beta\\[0\\]"),
    ("audit", numbers(first=lambda b: b[-1]), "of the last step, and a variance"),
    ("audit", lambda b: numbers()(b)[::-1], "swapped"),
    ("audit", numbers(first=lambda b: b.mean()), "first step adds noise of deviation 0.0100"),
    ("audit", numbers(left=lambda b: (1 - b).prod()), "of its amplitude the root"),
    ("audit", numbers(left=lambda b: (1 - (1 - b).prod()).sqrt()), "how much noise there is at T"),
    ("audit", numbers(left=lambda b: b.prod().sqrt()), "not of the betas"),
    ("audit", numbers(left=lambda b: (1 - b[-1]).sqrt()), "only the last step"),
    ("audit", numbers(left=lambda b: 1 - b.sum().sqrt()), "of the amplitude is left"),
    ("reverse_step", back(inside=lambda i: i - 1), "the bug is still there"),
    ("reverse_step", back(early=False), "Python counts that from the end"),
    ("reverse_step", lambda x, e, z, i, b: (back(lambda j: j - 1, early=False) if i == 0 else back())(x, e, z, i, b),
     "both are read at alpha_bar\\[-1\\]"),
    ("reverse_step", back(inside=lambda i: min(i + 1, 799)), "off the other way"),
    ("reverse_step", back(fixed_large=True), "beta_t's here"),
    ("reverse_step", back(spread=lambda v: v), "multiplied by a variance"),
    ("reverse_step", back(spread=lambda v: 0 * v), "z was left out"),
    ("reverse_step", back(root=True), "one step back is one alpha"),
    ("reverse_step", back(sign=1), "subtract eps"),
    ("reverse_step", lambda x, e, z, i, b: x - e, "at i = 400 this is not"),
    ("spread", lambda s, d: wide()(s, d).tolist(), "got a list"),
    ("spread", wide(end=lambda v: v), "these are variances"),
    ("spread", wide(end=lambda v: v.sqrt().flip(0)), "turned round"),
    ("spread", wide(lambda v, a, post: v * a + post), "was multiplied by alpha_t"),
    ("spread", wide(lambda v, a, post: v / a**2 + post), "not alpha_t squared"),
    ("spread", wide(lambda v, a, post: v / a.sqrt() + post), "a variance takes the square"),
    ("spread", wide(lambda d, a, post: d / a.sqrt() + post.sqrt(), end=lambda d: d, start=lambda d: d),
     "independent parts add their variances"),
    ("spread", wide(lambda v, a, post: v / a), "noise that each step adds is missing"),
    ("spread", wide(lambda v, a, post: post), "what came before was dropped"),
    ("spread", wide(lambda v, a, post: v / a + 1 - a), "0 at the last step"),
    ("spread", wide(start=lambda d: 1.0), "the start is not used"),
    ("spread", wide(start=lambda d: d), "square it to begin with"),
    ("spread", wide(shift=1), "one step off"),
    ("spread", lambda s, d: wide()(s, d)[1:], "the start and one number for each"),
    ("spread", lambda s, d: wide()(s, d) + 1, "was wanted, its root at every t"),
    ("distortion", lambda denoise, x0, t, eps, s: x0.mean((1, 2, 3)), "never asked"),
    ("distortion", shown(lambda x0, t, eps, s: x0), "shown the clean picture"),
    ("distortion", shown(lambda x0, t, eps, s: x0 + eps), "something else than x_t"),
    ("distortion", shown(add_noise, lambda x0, t: t), "one time per picture"),
    ("distortion", error(lambda g, x_t, x0: root_of(g.clamp(-1, 1), x0.roll(1, 0))), "strangers"),
    ("distortion", error(lambda g, x_t, x0: root_of(g.clamp(-1, 1), x0.flip(0))), "strangers"),
    ("distortion", error(lambda g, x_t, x0: root_of(x_t, x0)), "how far the noisy x_t is"),
    ("distortion", error(lambda g, x_t, x0: root_of(g, x0)), "clip it first"),
    ("distortion", error(scale=1), "bytes are 127.5 times as wide"),
    ("distortion", error(scale=255), "not by 255"),
    ("distortion", error(lambda g, x_t, x0: root_of(g.clamp(-1, 1), x0) ** 2, scale=1), "a mean square: take its root"),
    ("distortion", error(lambda g, x_t, x0: root_of(g.clamp(-1, 1), x0) ** 2), "root first, then 127.5"),
    ("distortion", error(lambda g, x_t, x0: (g.clamp(-1, 1) - x0).abs().mean((1, 2, 3))), "mean absolute error"),
    ("distortion", error(lambda g, x_t, x0: root_of(g.clamp(-1, 1), x0).mean()), "one number for each picture"),
    ("distortion", error(lambda g, x_t, x0: root_of(g.clamp(-1, 1), 0 * x0)), "was wanted, picture by picture"),
    ("noised_prior", entered(lambda a, s, dip, eps: a * dip + s * eps), "sigmoid answers in \\[0, 1\\]"),
    ("noised_prior", entered(lambda a, s, dip, eps: 2 * (a * dip + s * eps) - 1), "stretch the noise too"),
    ("noised_prior", entered(lambda a, s, dip, eps: 2 * dip - 1 + s * eps), "factor a = sqrt"),
    ("noised_prior", entered(lambda a, s, dip, eps: a * (2 * dip - 1) + eps), "noise has not its factor"),
    ("noised_prior", entered(lambda a, s, dip, eps: a * (2 * dip - 1)), "no noise in it"),
    ("noised_prior", entered(lambda a, s, dip, eps: 2 * dip - 1), "picture as it is"),
    ("noised_prior", entered(lambda a, s, dip, eps: s * eps), "nothing of the picture"),
    ("noised_prior", entered(lambda a, s, dip, eps: a**2 * (2 * dip - 1) + s**2 * eps), "roots are missing"),
    ("noised_prior", entered(lambda a, s, dip, eps: s * (2 * dip - 1) + a * eps), "each other's factors"),
    ("noised_prior", entered(lambda a, s, dip, eps: dip + eps), "was wanted at t0 = 3"),
    ("coloured_step", coloured(lambda *n: 0, lambda *n: 0, lambda z, colour, mu: z), "the ordinary step"),
    ("coloured_step", coloured(lambda *n: 0, lambda *n: 0), "mean of the noise is forgotten"),
    ("coloured_step", coloured(noise=lambda z, colour, mu: z), "the new noise is white"),
    ("coloured_step", coloured(on=lambda *n: 0), "never put back"),
    ("coloured_step", coloured(off=lambda *n: 0), "never came off"),
    ("coloured_step", coloured(on=lambda n_t, n_s: n_t), "time of arrival"),
    ("coloured_step", coloured(lambda *n: 1, lambda *n: 1), "mu came off whole: in"),
    ("coloured_step", coloured(lambda *n: 1), "s_s of it went back on"),
    ("coloured_step", coloured(noise=lambda z, colour, mu: colour(z) + mu), "counted twice"),
    ("coloured_step", coloured(noise=lambda z, colour, mu: colour(colour(z))), "put on twice"),
    ("coloured_step", coloured(noise=lambda z, colour, mu: 0 * z), "no noise is added"),
    ("coloured_step", lambda x_t, x0, *rest: x_t - x0, "from t = 8 to s = 7"),
]


test_right_answers_pass, test_planted_mistakes_are_named, test_no_check_is_forgotten = suite_of(
    RIGHT, PLANTED, "hybrids")


def test_the_closed_form_gives_the_numbers_that_the_notebook_prints():
    """A constant guess on the source's schedule: deviation 10.7, and the sampler itself agrees with the closed form."""
    source = linear_schedule(800, 1e-4, 1e-2)
    assert round(wide()(source, 1.0)[-1].item(), 1) == 10.7
    short, x = NoiseSchedule(source.alpha_bar[::16]), randn(20_000, 1)
    noise = iter(randn(short.T, 20_000, 1, seed=1))
    for t in range(short.T, 0, -1):
        x0 = Prediction((x - short.signal_and_noise(t, like=x)[1] * 0.35) / short.signal_and_noise(t, like=x)[0], x).x0
        mean, std = posterior(x0, x, t, t - 1, short)
        x = mean + std * next(noise)
    assert abs(x.std() / wide()(short, 1.0)[-1] - 1) < 5 / (2 * len(x)) ** 0.5


def test_a_walk_that_carries_mean_and_colour_ends_at_the_data():
    """Two correlated pixels under correlated, shifted noise: right within five standard errors, and only so."""
    schedule = linear_schedule(200, 5e-4, 0.1)
    mean, cov = torch.tensor([1.0, -0.5]).double(), torch.tensor([[0.5, -0.2], [-0.2, 0.3]]).double()
    mu, L, n = torch.tensor([1.5, -1.0]).double(), torch.tensor([[1.0, 0.0], [0.8, 0.6]]).double(), 1000
    ends = {}
    for carried in (True, False):
        told, colour = (mu, lambda z: z @ L.T) if carried else (0 * mu, lambda z: z)
        rng = generator(2)
        x = mu + torch.randn(n, 2, generator=rng, dtype=torch.float64) @ L.T
        for t in range(schedule.T, 0, -1):
            a, s = schedule.signal_and_noise(t, like=x[:1])
            x0 = mean + (x - a * mean - s * mu) @ torch.linalg.solve(a**2 * cov + s**2 * L @ L.T, a * cov)
            z = torch.randn(n, 2, generator=rng, dtype=torch.float64)
            x = coloured()(x, x0, z, t, t - 1, schedule, told, colour)
        of_mean = ((x.mean(0) - mean).abs() / (cov.diag() / n).sqrt()).max()
        of_cov = ((x.T.cov() - cov).abs() / ((cov.diag().outer(cov.diag()) + cov**2) / n).sqrt()).max()
        ends[carried] = of_mean.item(), of_cov.item()
    assert max(ends[True]) < 5 and min(ends[False]) > 10, ends
