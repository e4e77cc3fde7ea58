"""A learned variance lies between two bounds; between them the sampler is ddpm with other noise."""

import math

import pytest
import torch
from support import DEVICES, FLOATS, generator, randn
from torch.testing import assert_close

from coursekit.denoisers import Prediction, anagram, clipped, guided, hybrid
from coursekit.diffusion import posterior
from coursekit.learned_variance import LearnedPrediction, ddpm_learned, learned_std, with_variance
from coursekit.samplers import ddim, ddpm, last
from coursekit.schedules import cosine_schedule, linear_schedule
from coursekit.toys import GaussianData

S = linear_schedule()
T1 = torch.ones(2, dtype=torch.long)


def mixing(denoise, mix):
    return lambda x_t, t: LearnedPrediction(*denoise(x_t, t), torch.full_like(x_t, mix))


@pytest.mark.parametrize("schedule", [S, cosine_schedule()], ids=["linear", "cosine"])
@pytest.mark.parametrize("t, s", [(2, 1), (500, 499), (1000, 999), (1000, 400), (300, 20)])
def test_the_bounds_are_the_posterior_and_the_steps_beta(schedule, t, s):
    x = torch.zeros(1, 1, dtype=torch.float64)
    assert_close(learned_std(x, t, s, schedule), posterior(x, x, t, s, schedule)[1])
    assert_close(learned_std(x + 1, t, s, schedule) ** 2, 1 - schedule.alpha[s + 1:t + 1].prod().view(1, 1))
    half = learned_std(x + 0.5, t, s, schedule)
    assert_close(half**2, learned_std(x, t, s, schedule) * learned_std(x + 1, t, s, schedule))  # logs are mixed


@pytest.mark.parametrize("times", [None, [1000, 700, 30, 2, 1, 0]])
def test_with_the_posteriors_variance_it_is_ddpm(times):
    short = linear_schedule(50, 1e-3, 0.2) if times is None else S
    toy, x = GaussianData(0.5, 0.25).denoiser(short), randn(5, 1, 3, 3)
    learned = list(ddpm_learned(mixing(toy, 0.0), x, short, times, generator(1)))
    for ours, plain in zip(learned, ddpm(toy, x, short, times, generator(1)), strict=True):
        assert ours.t == plain.t
        assert_close((ours.x, ours.x0), (plain.x, plain.x0))


@pytest.mark.parametrize("t, s", [(1000, 999), (500, 300), (100, 1)])
def test_white_noise_stays_white_with_beta_and_shrinks_with_the_posteriors_variance(t, s):
    """For x_0 ~ N(0, I) beta is the true variance (DDPM, sec. 3.2), and the posterior's is what a known x_0 leaves."""
    n, white = 50_000, GaussianData(0.0, 1.0).denoiser(S)
    var = {mix: last(ddpm_learned(mixing(white, mix), randn(n, 1), S, [t, s], generator(1))).x.var()
           for mix in (0.0, 1.0)}
    five = 5 * math.sqrt(2 / n)
    assert abs(var[1.0] - 1) < five
    beta = 1 - S.alpha_bar[t] / S.alpha_bar[s]
    assert abs(var[0.0] - (1 - beta + beta * (1 - S.alpha_bar[s]) / (1 - S.alpha_bar[t]))) < five


def test_each_pixel_has_its_own_variance():
    mix = torch.tensor([0.0, 1.0]).double().expand(20_000, 2)
    knows = lambda x, t: LearnedPrediction(0 * x, x, mix)
    x = last(ddpm_learned(knows, torch.zeros(20_000, 2).double(), S, [1000, 500], generator())).x
    wanted = torch.stack([learned_std(mix[0, i], 1000, 500, S) for i in (0, 1)])
    assert_close(x.std(0), wanted, rtol=5 / math.sqrt(2 * 20_000), atol=0)


def test_the_last_step_puts_nothing_back():
    knows = mixing(lambda x, t: Prediction(0.25 + 0 * x, x), 1.0)
    assert_close(last(ddpm_learned(knows, randn(3, 1), S, [10, 0])).x, torch.full((3, 1), 0.25).double())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("device", DEVICES)
def test_shape_dtype_and_device_are_kept_without_a_graph(dtype, device):
    if device == "mps" and dtype == torch.float64:
        pytest.skip("mps has no float64")
    x = randn(2, 1, 4, 4).to(device, dtype).requires_grad_()
    denoise = mixing(GaussianData(0.5, 0.25).denoiser(S), 0.3)
    for step in ddpm_learned(denoise, x, S, S.spaced(4), generator()):
        assert step.x.shape == x.shape and step.x.dtype == dtype and step.x.device.type == device
        assert step.x.isfinite().all() and not step.x.requires_grad and torch.is_grad_enabled()


# --- a prediction that carries its variance ---

def test_it_is_a_prediction_to_whoever_does_not_ask():
    denoise, x = mixing(GaussianData(0.5, 0.25).denoiser(S), 0.3), randn(2, 1)
    x0, eps = denoise(x, T1)
    assert isinstance(denoise(x, T1), Prediction) and x0.shape == eps.shape == x.shape
    plain = GaussianData(0.5, 0.25).denoiser(S)
    assert_close(last(ddim(denoise, x, S, S.spaced(5))).x, last(ddim(plain, x, S, S.spaced(5))).x)


COMBINATIONS = {
    "guided": lambda d, e: guided(d, e, 3.0),
    "clipped and guided": lambda d, e: clipped(guided(d, e, 3.0)),
    "anagram": lambda d, e: anagram([d, e], [lambda x: x, lambda x: x.flip(-1)]),
    "hybrid": lambda d, e: hybrid(d, e, 3),
}


@pytest.mark.parametrize("combine", COMBINATIONS.values(), ids=COMBINATIONS)
def test_whatever_is_made_of_a_denoiser_can_keep_its_variance(combine):
    asked = []
    leading = mixing(lambda x, t: asked.append(t) or Prediction(0.5 * x.tanh(), x), 0.75)
    other = mixing(lambda x, t: Prediction(-0.3 * x, 2 * x), 0.1)
    x = randn(2, 1, 6, 6)
    kept = with_variance(leading, lambda d: combine(d, other))(x, T1)
    assert len(asked) == 1 and bool((kept.mix == 0.75).all())
    assert_close(tuple(kept), tuple(combine(leading, other)(x, T1)))
    with pytest.raises(ValueError, match="says no variance"):  # guidance alone forgets it
        last(ddpm_learned(combine(leading, other), x, S, [2, 1]))


def test_a_variance_that_nobody_said_is_missed():
    plain = GaussianData(0.5, 0.25).denoiser(S)
    for denoise in (plain, with_variance(plain, clipped), with_variance(mixing(plain, 0.0), lambda d: plain)):
        with pytest.raises(ValueError, match="says no variance: sample it with ddpm"):
            last(ddpm_learned(denoise, randn(2, 1), S, [2, 1]))


@pytest.mark.parametrize("times", [[1, 2], [5, 5], [1001, 3], [3.5, 1]])
def test_times_that_cannot_be_are_refused(times):
    with pytest.raises(ValueError):
        last(ddpm_learned(mixing(GaussianData(0.5, 0.25).denoiser(S), 0.0), randn(2, 1), S, times))
