"""Every self-check passes the right answer and catches, by name, each mistake it claims to catch."""

import torch
import torch.nn.functional as F
from support import generator, suite_of
from torchvision.transforms.functional import gaussian_blur as tv_blur

from coursekit import checks, diffusion, metrics
from coursekit.checks import CheckFailed
from coursekit.schedules import linear_schedule

ONE = torch.ones(1, dtype=torch.float64)


def coefficients(schedule, t, like):
    """alpha_bar at t as an (b, 1, 1, 1) float tensor."""
    return schedule.alpha_bar[t].to(like).view(-1, 1, 1, 1)


def jump(signal, noise):
    """A forward process whose factors are functions of alpha_bar."""
    def add_noise(x0, t, eps, schedule):
        ab = coefficients(schedule, t, x0)
        return signal(ab) * x0 + noise(ab) * eps
    return add_noise


def in_place(x0, t, eps, schedule):
    x0 *= 1
    return x0.mul_(0)


def one_alpha(x0, t, eps, schedule):
    alpha = schedule.alpha[t].to(x0).view(-1, 1, 1, 1)
    return alpha.sqrt() * x0 + (1 - alpha).sqrt() * eps


def empty(*args):
    raise NotImplementedError


def posterior_with(alpha=None, swap=False, std=None):
    """The posterior step with one thing changed."""
    def step(x_t, x0, t, s, schedule):
        mean, right = diffusion.posterior(x0, x_t, t, s, schedule)
        ab_t, ab_s = schedule.alpha_bar[t].item(), schedule.alpha_bar[s].item()
        if alpha is not None or swap:
            a = alpha(schedule, t) if alpha else ab_t / ab_s
            u, v = (x_t, x0) if swap else (x0, x_t)
            mean = (ab_s**0.5 * (1 - a) * u + a**0.5 * (1 - ab_s) * v) / (1 - ab_t)
        return mean, right if std is None else std(right, ab_t, ab_s)
    return step


def blur(exponent=lambda d, sigma: -(d**2) / (2 * sigma**2), mode="reflect", normalise=True, axes=(0, 1)):
    def gaussian_blur(x, size, sigma):
        d = torch.arange(size) - size // 2
        k = torch.exp(exponent(d.float(), sigma))
        k = k / k.sum() if normalise else k
        dot = (d == 0).float()
        kernel = (k if 0 in axes else dot).outer(k if 1 in axes else dot).expand(x.shape[1], 1, size, size)
        return F.conv2d(F.pad(x, [size // 2] * 4, mode=mode), kernel, groups=x.shape[1])
    return gaussian_blur


RIGHT = {
    "to_float": lambda x: x.float() / 127.5 - 1,
    "to_bytes": lambda x: ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8),
    "times_for": lambda schedule, steps: schedule.spaced(steps),
    "start_noise": lambda n, rng: torch.randn(n, 1, 28, 28, generator=rng),
    "noise_step": lambda x, t, eps, s: s.alpha[t].sqrt().item() * x + s.beta[t].sqrt().item() * eps,
    "add_noise": diffusion.add_noise,
    "alpha_bar": lambda beta: torch.cat([ONE, (1 - beta).cumprod(0)]),
    "rescaled_betas": lambda T: linear_schedule(T, 1e-4 * 1000 / T, 0.02 * 1000 / T),
    "useless_share": lambda s: (s.snr[1:] < 0.01).double().mean(),
    "gaussian_blur": lambda x, size, sigma: tv_blur(x, [size, size], [sigma, sigma]),
    "one_step": diffusion.x0_from_eps,
    "posterior_step": posterior_with(),
    "psnr": lambda x, y: metrics.psnr(x, y, peak=2.0),
    "wiener": lambda x, mean, var, a, s: mean + a * var / (a**2 * var + s**2) * (x - a * mean),
}

PLANTED = [
    ("to_float", lambda x: x.float() / 255, r"runs over \[0, 1\]"),
    ("to_float", lambda x: x.float() / 128 - 1, "127.5"),
    ("to_float", lambda x: x * 2 - 255, "floats \\*before\\*"),
    ("to_float", lambda x: 1 - x.float() / 127.5, "upside down"),
    ("to_bytes", lambda x: ((x.clamp(-1, 1) + 1) * 127.5).to(torch.uint8), "round first"),
    ("to_bytes", lambda x: (x.clamp(-1, 1) * 127.5).round().to(torch.uint8), "-1 should become 0"),
    ("to_bytes", lambda x: (x.clamp(0, 1) * 255).round().to(torch.uint8), "-1 should become 0"),
    ("to_bytes", lambda x: ((x + 1) * 127.5).round().to(torch.int32).to(torch.uint8), "clamp"),
    ("to_bytes", lambda x: (x + 1) * 127.5, "uint8"),
    ("times_for", lambda s, n: s.spaced(n)[::-1], "go up"),
    ("times_for", lambda s, n: s.spaced(n)[:-1], "must be 0"),
    ("times_for", lambda s, n: [999, 749, 499, 249, 0], "1..T"),
    ("times_for", lambda s, n: [1000, 750, 500, 250, 0], "read T"),
    ("times_for", lambda s, n: torch.arange(999, -1, -250), "1..T"),
    ("times_for", lambda s, n: s.T, "list of times was wanted, got 1000"),
    ("start_noise", lambda n, rng: torch.randn(n, 28, 28, generator=rng), "shape"),
    ("start_noise", lambda n, rng: torch.randn(n, 1, 28, 28), "hand rng on"),
    ("start_noise", lambda n, rng: torch.randn(n, 1, 28, 28, generator=generator(3)), "another seed"),
    ("start_noise", lambda n, rng: torch.randn(1, 1, 28, 28, generator=rng).repeat(n, 1, 1, 1), "the same noise"),
    ("start_noise", lambda n, rng: torch.rand(n, 1, 28, 28, generator=rng), "positive"),
    ("start_noise", lambda n, rng: 0.5 * torch.randn(n, 1, 28, 28, generator=rng), "deviation 0.50"),
    ("start_noise", lambda n, rng: 3**0.5 * (2 * torch.rand(n, 1, 28, 28, generator=rng) - 1), "nothing beyond"),
    ("noise_step", lambda x, t, eps, s: s.alpha_bar[t].sqrt().item() * x
     + (1 - s.alpha_bar[t]).sqrt().item() * eps, "without the bar"),
    ("noise_step", lambda x, t, eps, s: s.alpha[t].sqrt().item() * x + s.beta[t].item() * eps, "beta\\^2"),
    ("noise_step", lambda x, t, eps, s: x + s.beta[t].sqrt().item() * eps, "grows for ever"),
    ("noise_step", lambda x, t, eps, s: RIGHT["noise_step"](x, t - 1, eps, s), "off by one"),
    ("noise_step", lambda x, t, eps, s: s.alpha[t].item() * x + s.beta[t].sqrt().item() * eps, "in front of x"),
    ("add_noise", jump(torch.sqrt, lambda ab: 1 - ab), "in front of eps"),
    ("add_noise", jump(lambda ab: ab, lambda ab: (1 - ab).sqrt()), "in front of x_0"),
    ("add_noise", jump(lambda ab: ab, lambda ab: 1 - ab), "both square roots"),
    ("add_noise", jump(lambda ab: (1 - ab).sqrt(), torch.sqrt), "swapped"),
    ("add_noise", one_alpha, "bar on alpha"),
    ("add_noise", lambda x0, t, eps, s: diffusion.add_noise(x0, (t - 1).clamp(min=0), eps, s), "off by one"),
    ("add_noise", lambda x0, t, eps, s: diffusion.add_noise(x0, int(t[0]), eps, s), "one time per image"),
    ("add_noise", lambda x0, t, eps, s: diffusion.add_noise(x0, t, eps, s).clamp(-1, 1), "clamped"),
    ("add_noise", lambda x0, t, eps, s: diffusion.add_noise(x0, t, torch.randn_like(x0), s), "eps was not used"),
    ("add_noise", lambda x0, t, eps, s: s.alpha_bar[t].sqrt()[:, None] * x0[:, 0, 0], "should have shape"),
    ("add_noise", lambda x0, t, eps, s: diffusion.add_noise(x0.double(), t, eps.double(), s), "float64 came out"),
    ("add_noise", in_place, "in place"),
    ("add_noise", lambda x0, t, eps, s: None, "returned nothing"),
    ("add_noise", empty, "still empty"),
    ("alpha_bar", lambda beta: (1 - beta).cumprod(0), "put a 1 in front"),
    ("alpha_bar", lambda beta: torch.cat([ONE, 1 - beta.cumsum(0)]), "not cumsum"),
    ("alpha_bar", lambda beta: torch.cat([ONE, 1 - beta]), "factor of one step"),
    ("alpha_bar", lambda beta: torch.cat([ONE, (1 - beta.flip(0)).cumprod(0)]), "backwards"),
    ("alpha_bar", lambda beta: torch.cat([ONE, beta.cumprod(0)]), "product of the betas"),
    ("rescaled_betas", linear_schedule, "DDPM's own"),
    ("rescaled_betas", lambda T: linear_schedule(T, 1e-4 * T / 1000, 0.02 * T / 1000), "upside down"),
    ("rescaled_betas", lambda T: linear_schedule(T, 1e-4, 20 / T), "only beta_T"),
    ("rescaled_betas", lambda T: linear_schedule(1000), "a schedule of 200 steps"),
    ("useless_share", lambda s: (s.snr[1:] >= 0.01).double().mean(), "useful"),
    ("useless_share", lambda s: (s.snr[1:] < 0.01).sum(), "divide by T"),
    ("useless_share", lambda s: (s.snr < 0.01).double().mean(), "t = 0 was counted"),
    ("useless_share", lambda s: (s.alpha_bar[1:] < 0.01).double().mean(), "a share of the T"),
    ("useless_share", lambda s: 0.326, "a share of the T"),
    ("useless_share", lambda s: (s.snr[1:].sqrt() < 0.01).double().mean(), "without roots"),
    ("gaussian_blur", blur(mode="constant"), "dark frame"),
    ("gaussian_blur", blur(normalise=False), "sum to 1"),
    ("gaussian_blur", blur(lambda d, sigma: -(d**2) / sigma**2), "with the 2"),
    ("gaussian_blur", blur(lambda d, sigma: -(d**2) / (2 * sigma)), "squared in the exponent"),
    ("gaussian_blur", blur(lambda d, sigma: 0 * d), "a box"),
    ("gaussian_blur", blur(mode="replicate"), "reflected"),
    ("gaussian_blur", lambda x, size, sigma: tv_blur(x, [7, 7], [sigma, sigma]), "kernel_size is not used"),
    ("gaussian_blur", lambda x, size, sigma: tv_blur(x, [size, size], [1.5, 1.5]), "sigma is not used"),
    ("gaussian_blur", blur(axes=(0,)), "only columns"),
    ("gaussian_blur", blur(axes=(1,)), "only rows"),
    ("one_step", lambda x_t, t, eps, s: x_t - (1 - coefficients(s, t, x_t)).sqrt() * eps, "bright again"),
    ("one_step", lambda x_t, t, eps, s: diffusion.x0_from_eps(x_t.double(), t, eps.double(), s), "float64 came out"),
    ("one_step", lambda x_t, t, eps, s: diffusion.x0_from_eps(x_t, torch.stack([*t]), eps, s), "one integer for"),
    ("one_step", lambda x_t, t, eps, s: (x_t - eps) / coefficients(s, t, x_t).sqrt(), "scale it"),
    ("one_step", lambda x_t, t, eps, s: (x_t - (1 - coefficients(s, t, x_t)) * eps)
     / coefficients(s, t, x_t).sqrt(), "in front of eps is missing"),
    ("one_step", lambda x_t, t, eps, s: (x_t - (1 - coefficients(s, t, x_t)).sqrt() * eps)
     / coefficients(s, t, x_t), "instead of its square root"),
    ("one_step", lambda x_t, t, eps, s: (x_t + (1 - coefficients(s, t, x_t)).sqrt() * eps)
     / coefficients(s, t, x_t).sqrt(), "second time"),
    ("posterior_step", posterior_with(alpha=lambda s, t: s.alpha[t].item()), "the ratio"),
    ("posterior_step", posterior_with(swap=True), "swapped"),
    ("posterior_step", posterior_with(std=lambda std, ab_t, ab_s: std**2), "variance"),
    ("posterior_step", posterior_with(std=lambda std, ab_t, ab_s: (1 - ab_t / ab_s) ** 0.5), "forward variance"),
    ("posterior_step", lambda *args: diffusion.posterior(args[1], args[0], *args[2:])[0], "two things"),
    ("posterior_step", lambda x_t, x0, t, s, schedule: (diffusion.posterior(x0, x_t, t, s, schedule)[0],
                                                        diffusion.posterior(x0, x_t, t, t - 1, schedule)[1]),
     "a single step"),
    ("psnr", lambda x, y: metrics.psnr(x, y, peak=2.0) - 20 * torch.log10(torch.tensor(2.0)), "peak of 2"),
    ("psnr", lambda x, y: 2 * metrics.psnr(x, y, peak=2.0), "belongs to amplitudes"),
    ("psnr", lambda x, y: metrics.psnr(x, y, peak=2.0).mean(), "whole batch"),
    ("psnr", lambda x, y: 10 * torch.log10(4 / (x - y).flatten(1).mean(1) ** 2), "both signs cancelled"),
    ("psnr", lambda x, y: 20 * torch.log10(2 / (x - y).abs().flatten(1).mean(1)), "absolute errors"),
    ("psnr", lambda x, y: 20 * torch.log10(2 / (x - y).abs().flatten(1).amax(1)), "largest error alone"),
    ("psnr", lambda x, y: -metrics.psnr(x, y, peak=2.0), "upside down"),
    ("psnr", lambda x, y: 10 * torch.log(4 / (x - y).square().flatten(1).mean(1)), "natural logarithm"),
    ("wiener", lambda x, mean, var, a, s: mean + a * var / (a**2 * var + s**2) * (x - mean), "centred on"),
    ("wiener", lambda x, mean, var, a, s: a * var / (a**2 * var + s**2) * (x - a * mean), "add `mean` back"),
    ("wiener", lambda x, mean, var, a, s: x / a, "whatever the noise"),
    ("wiener", lambda x, mean, var, a, s: mean + a * var / (a**2 * var + s) * (x - a * mean), "s\\^2"),
]


test_right_answers_pass, test_planted_mistakes_are_named, test_no_check_is_forgotten = suite_of(
    RIGHT, PLANTED, "noising", "denoising")


def test_every_module_of_checks_has_such_a_file():
    files = {"noising", "denoising", "unets", "one_pass", "digits", "guidance", "prior", "hybrids", "codes", "latents",
             "editing", "kernels", "paths", "colour", "bits"}
    tested = {f"coursekit.checks.{name}" for name in files} | {"coursekit.checks.core"}
    assert {getattr(checks, name).__module__ for name in checks.__all__} == tested


def test_a_failed_check_shows_a_notebook_its_sentence_only():
    assert CheckFailed("say why")._render_traceback_() == ["CheckFailed: say why"]
