"""The toys are ground truth for everything else, so they are held to Bayes' rule by brute force."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DEVICES, FLOATS, generator, randn
from torch.testing import assert_close

from coursekit.diffusion import add_noise, noise_like
from coursekit.schedules import StraightPath, VarianceExploding, linear_schedule, zero_terminal_snr
from coursekit.toys import GaussianData, GaussianMixture

S = linear_schedule()
ZERO = zero_terminal_snr(S)
PATHS = [(S, 300), (ZERO, 1000), (StraightPath(), 0.6), (StraightPath(), 1.0), (VarianceExploding(), 2.5)]
MEANS = torch.tensor([[-1.5], [0.2], [1.0]], dtype=torch.float64)


def times(t, n):
    return torch.full((n,), t, dtype=torch.long if isinstance(t, int) else torch.float64)


def test_draws_have_the_mean_and_variance_they_were_asked_for():
    n = 100_000
    x = GaussianData(2.0, 0.25).sample((n,), generator())
    assert abs(x.mean() - 2) < 5 * 0.5 / math.sqrt(n) and abs(x.var() - 0.25) < 5 * 0.25 * math.sqrt(2 / n)
    x = GaussianMixture(MEANS, 0.04).sample(n, generator())
    var = MEANS.var(correction=0).item() + 0.04
    assert x.shape == (n, 1) and x.dtype == torch.float64
    assert abs(x.mean() - MEANS.mean()) < 5 * math.sqrt(var / n)
    assert abs((x - MEANS.mean()).square().mean() - var) < 5 * math.sqrt(2 * var**2 / n)
    bumps = torch.cdist(x, MEANS).argmin(1).bincount() / n
    assert (bumps - 1 / 3).abs().max() < 0.01  # equally likely, but for the few that lie nearer a neighbour


def test_without_variance_the_draws_are_the_training_set():
    images = randn(5, 1, 3, 3)
    x = GaussianMixture(images).sample(200, generator())
    assert all(any(torch.equal(drawn, image) for image in images) for drawn in x)
    assert len(x.unique(dim=0)) == 5


@pytest.mark.parametrize("path,t", PATHS)
@pytest.mark.parametrize("toy", [
    GaussianData(0.7, 0.3), GaussianMixture(MEANS, 0.05), GaussianMixture(MEANS[:1], 0.05),
])
def test_the_denoiser_is_the_posterior_mean_by_brute_force(toy, path, t):
    """E[x_0 | x_t] as an integral over a fine grid of x_0."""
    x_t = torch.linspace(-3, 3, 13, dtype=torch.float64)[:, None]
    grid = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    means = torch.tensor([[toy.mean]]).double() if isinstance(toy, GaussianData) else toy.means
    prior = (-(grid - means).square() / (2 * toy.var)).exp().sum(0)
    a, s = path.signal_and_noise(times(t, 13), like=x_t)
    weight = prior * (-(x_t - a * grid).square() / (2 * s**2)).exp()
    expected = (weight @ grid / weight.sum(1))[:, None]
    x0, eps = toy.denoiser(path)(x_t, times(t, 13))
    assert_close(x0, expected, atol=1e-6, rtol=1e-6)
    assert_close(a * x0 + s * eps, x_t)


@pytest.mark.parametrize("path,t", PATHS)
def test_eps_points_down_the_score(path, t):
    """Tweedie: E[eps | x_t] = -s grad log p(x_t), with the gradient taken by autograd."""
    images = randn(4, 2, 3, 3)
    x_t = randn(6, 2, 3, 3, seed=1).requires_grad_()
    a, s = (c.view(6, 1) for c in path.signal_and_noise(times(t, 6), like=x_t))
    spread = a**2 * 0.1 + s**2
    distance = (x_t.flatten(1)[:, None] - a[:, None] * images.flatten(1)).square().sum(2)
    (score,) = torch.autograd.grad((-distance / (2 * spread)).logsumexp(1).sum(), x_t)
    eps = GaussianMixture(images, 0.1).denoiser(path)(x_t.detach(), times(t, 6)).eps
    assert_close(eps, -s.view(6, 1, 1, 1) * score)


@pytest.mark.parametrize("path,t", PATHS)
def test_one_bump_is_the_gaussian(path, t):
    x_t = randn(5, 2, 3, 4)
    one = GaussianMixture(torch.full((1, 2, 3, 4), 0.3).double(), 0.2).denoiser(path)(x_t, times(t, 5))
    assert_close(one, GaussianData(0.3, 0.2).denoiser(path)(x_t, times(t, 5)))


def test_what_the_best_denoiser_misses_is_the_posterior_variance():
    """E|eps - E[eps|x_t]|^2 = a^2 var / (a^2 var + s^2), and no denoiser does better."""
    n, toy, t = 50_000, GaussianData(1.0, 0.5), 200
    rng = generator()
    x0 = toy.sample((n, 1), rng).double()
    eps = noise_like(x0, rng)
    x_t = add_noise(x0, t, eps, S)
    guess = toy.denoiser(S)(x_t, times(t, n)).eps
    ab = S.alpha_bar[t]
    missed = ab * 0.5 / (ab * 0.5 + 1 - ab)
    assert abs((eps - guess).square().mean() - missed) < 5 * missed * math.sqrt(2 / n)
    # what is missed cannot be told from what was said
    assert abs(((eps - guess) * guess).mean()) < 5 * (missed * (1 - missed) / n).sqrt()


@pytest.mark.parametrize("toy", [GaussianData(0.3, 0.2), GaussianMixture(randn(4, 3, 5, 7), 0.1)])
def test_at_time_zero_the_image_is_known_and_at_the_end_only_the_mean(toy):
    x = randn(2, 3, 5, 7, seed=3)
    clean = toy.denoiser(ZERO)(x, times(0, 2))
    assert_close(clean.x0, x)
    assert not clean.eps.any()
    final = toy.denoiser(ZERO)(x, times(1000, 2))
    mean = torch.tensor(0.3) if isinstance(toy, GaussianData) else toy.means.mean(0)
    assert_close(final.x0, mean.expand_as(x).double())
    assert_close(final.eps, x)


def test_the_denoiser_of_a_training_set_only_remembers():
    images = randn(20, 1, 8, 8)
    denoise = GaussianMixture(images).denoiser(S)
    assert_close(denoise(add_noise(images, 100, randn(20, 1, 8, 8, seed=1), S), times(100, 20)).x0, images)
    assert_close(denoise(images, times(0, 20)).x0, images)
    assert_close(denoise(images, torch.arange(20)).x0[0], images[0])  # clean and noisy in one batch


@given(shape=st.lists(st.integers(1, 6), min_size=2, max_size=4).map(tuple), dtype=st.sampled_from(FLOATS),
       var=st.sampled_from([0.0, 0.1]), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_shape_and_dtype_are_kept(shape, dtype, var, seed):
    means = randn(3, *shape[1:], seed=seed, dtype=torch.float32)
    x_t = randn(*shape, seed=seed + 1).to(dtype)
    t = S.draw_times(len(x_t), x_t, generator(seed))
    for toy in (GaussianMixture(means, var), GaussianData(0.1, 0.5)):
        for part in toy.denoiser(S)(x_t, t):
            assert part.shape == shape and part.dtype == dtype and part.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_still_finds_the_right_training_image(dtype):
    """Three thousand pixels: distances are small differences of sums far beyond half precision."""
    images = 0.1 * randn(50, 3, 32, 32)
    x_t = add_noise(images, 300, randn(50, 3, 32, 32, seed=1), S)
    whole = GaussianMixture(images).denoiser(S)(x_t, times(300, 50)).x0
    half = GaussianMixture(images).denoiser(S)(x_t.to(dtype), times(300, 50)).x0
    assert_close(half.double(), whole, atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("device", DEVICES)
def test_toys_work_on_every_device(device):
    images = randn(4, 1, 3, 3, dtype=torch.float32)
    x_t, t = randn(2, 1, 3, 3, dtype=torch.float32), torch.tensor([5, 900])
    for toy in (GaussianData(0.1, 0.5), GaussianMixture(images.to(device), 0.1)):
        here = toy.denoiser(S)(x_t.to(device), t.to(device))
        assert here.x0.device.type == device
        assert_close(tuple(p.cpu() for p in here), tuple(toy.denoiser(S)(x_t, t)), atol=1e-4, rtol=1e-4)
    drawn = GaussianMixture(images.to(device), 0.1).sample(6, generator())
    assert drawn.device.type == device
    assert_close(drawn.cpu(), GaussianMixture(images, 0.1).sample(6, generator()))


@pytest.mark.parametrize("make,says", [
    (lambda: GaussianData(0.0, 0.0), "variance above 0, got 0.0, 0.0"),
    (lambda: GaussianData(0.0, -1.0), "got 0.0, -1.0"),
    (lambda: GaussianData(math.nan, 1.0), "finite mean .* got nan, 1.0"),
    (lambda: GaussianData(0.0, math.inf), "got 0.0, inf"),
    (lambda: GaussianMixture(torch.zeros(0, 3)), r"k >= 1, got torch.float32 \(0, 3\)"),
    (lambda: GaussianMixture(torch.zeros(3)), r"got torch.float32 \(3,\)"),
    (lambda: GaussianMixture(torch.zeros(3, 2, dtype=torch.uint8)), "finite floats .* got torch.uint8"),
    (lambda: GaussianMixture(torch.full((3, 2), math.nan)), "finite"),
    (lambda: GaussianMixture(torch.zeros(3, 2), -0.1), "at least 0, got -0.1"),
    (lambda: GaussianMixture(torch.zeros(3, 2), math.nan), "at least 0, got nan"),
    (lambda: GaussianMixture(MEANS).denoiser(S)(torch.zeros(4, 2), times(3, 4)),
     r"shape \(1,\) each, got .* \(4, 2\)"),
    (lambda: GaussianData(0.0, 1.0).denoiser(S)(torch.zeros(4, 2), times(3, 3)), r"shape \(4,\), got \(3,\)"),
])
def test_toys_that_cannot_be_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_a_training_set_answers_at_time_zero_whatever_it_is_shown():
    answer = GaussianMixture(torch.zeros(2, 1, 2, 2)).denoiser(linear_schedule())
    found = answer(torch.full((1, 1, 2, 2), 5.0), torch.tensor([0]))
    assert found.x0.isfinite().all() and found.eps.isfinite().all()
