"""The forward process, its posterior, the losses and the bound, by Bayes, round trips and closed forms."""

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DEVICES, FLOATS, Says, generator, randn
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from coursekit.denoisers import Prediction
from coursekit.diffusion import (
    add_noise,
    eps_from_x0,
    min_snr_weight,
    noise_like,
    noise_prediction_loss,
    posterior,
    rate_distortion,
    v_from_x0_eps,
    v_prediction_loss,
    x0_eps_from_v,
    x0_from_eps,
    x0_prediction_loss,
)
from coursekit.schedules import (
    NoiseSchedule,
    StraightPath,
    VarianceExploding,
    cosine_schedule,
    linear_schedule,
    zero_terminal_snr,
)

S = linear_schedule()
ZERO = zero_terminal_snr(S)
PATHS = {"linear": S, "cosine": cosine_schedule(), "straight": StraightPath(),
         "exploding": VarianceExploding(80.0)}
LOSSES = [noise_prediction_loss, x0_prediction_loss, v_prediction_loss]

shapes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 7), st.integers(1, 7))
seeds = st.integers(0, 2**31)
strides = st.tuples(st.integers(0, 1000), st.integers(0, 1000)).filter(lambda pair: pair[0] < pair[1])


SILENT = Says(lambda x_t, t: torch.zeros_like(x_t))


def test_noise_is_standard_normal_and_belongs_to_its_generator():
    x = torch.empty(100, 1000, dtype=torch.float64)
    before = torch.get_rng_state()
    noise = noise_like(x, generator())
    assert torch.equal(noise, noise_like(x, generator())) and torch.equal(before, torch.get_rng_state())
    n = x.numel()
    assert abs(noise.mean()) < 5 / math.sqrt(n) and abs(noise.var() - 1) < 5 * math.sqrt(2 / n)
    torch.manual_seed(1)
    first = noise_like(x)
    torch.manual_seed(1)
    assert torch.equal(first, noise_like(x))


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@given(shape=shapes, dtype=st.sampled_from(FLOATS), seed=seeds)
@settings(max_examples=15, deadline=None)
def test_everything_keeps_shape_and_dtype(path, shape, dtype, seed):
    x0, eps = randn(*shape, seed=seed).to(dtype), randn(*shape, seed=seed + 1).to(dtype)
    t = path.draw_times(len(x0), x0, generator(seed))
    x_t, v = add_noise(x0, t, eps, path), v_from_x0_eps(x0, t, eps, path)
    for out in (x_t, v, *x0_eps_from_v(x_t, t, v, path)):
        assert out.shape == shape and out.dtype == dtype


@given(shape=shapes, seed=seeds)
@settings(max_examples=15, deadline=None)
def test_add_noise_is_the_closed_form_for_each_image_by_its_own_time(shape, seed):
    x0, eps = randn(*shape, seed=seed), randn(*shape, seed=seed + 1)
    t = S.draw_times(len(x0), x0, generator(seed))
    x_t = add_noise(x0, t, eps, S)
    for i in range(len(x0)):
        ab = S.alpha_bar[t[i]]
        assert_close(x_t[i], ab.sqrt() * x0[i] + (1 - ab).sqrt() * eps[i])


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_time_zero_is_the_image_itself(path):
    x0, eps = randn(2, 3, 5, 4, dtype=torch.float32), randn(2, 3, 5, 4, seed=1, dtype=torch.float32)
    assert torch.equal(add_noise(x0, 0, eps, path), x0)


@pytest.mark.parametrize("path", [ZERO, StraightPath()])
def test_the_end_of_a_path_without_signal_is_the_noise_itself(path):
    x0, eps = randn(2, 3, 5, 4), randn(2, 3, 5, 4, seed=1)
    assert torch.equal(add_noise(x0, path.T, eps, path), eps)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@given(seed=seeds)
@settings(max_examples=25, deadline=None)
def test_x0_eps_and_v_say_the_same_thing(path, seed):
    x0, eps = randn(3, 1, 4, 5, seed=seed), randn(3, 1, 4, 5, seed=seed + 1)
    t = path.draw_times(3, x0, generator(seed))  # away from the ends, where one of them cannot be told
    t = t.clamp(1, 990) if isinstance(path, NoiseSchedule) else t.clamp(min=1e-3)
    t = t.clamp(max=0.999) if isinstance(path, StraightPath) else t
    x_t, v = add_noise(x0, t, eps, path), v_from_x0_eps(x0, t, eps, path)
    close = {"atol": 1e-8, "rtol": 1e-8}
    assert_close(x0_from_eps(x_t, t, eps, path), x0, **close)
    assert_close(eps_from_x0(x_t, t, x0, path), eps, **close)
    assert_close(x0_eps_from_v(x_t, t, v, path), (x0, eps), **close)


@pytest.mark.parametrize("path,t", [(S, 0), (S, 1000), (ZERO, 0), (ZERO, 1000), (StraightPath(), 0.0),
                                    (StraightPath(), 1.0), (VarianceExploding(), 0.0)])
def test_v_tells_both_apart_even_where_time_ends(path, t):
    x0, eps = randn(3, 1, 4, 5), randn(3, 1, 4, 5, seed=1)
    x_t, v = add_noise(x0, t, eps, path), v_from_x0_eps(x0, t, eps, path)
    assert_close(x0_eps_from_v(x_t, t, v, path), (x0, eps))


def test_v_by_its_published_formulas():
    x0, eps = randn(2, 1, 3, 3), randn(2, 1, 3, 3, seed=1)
    ab = S.alpha_bar[300]
    assert_close(v_from_x0_eps(x0, 300, eps, S), ab.sqrt() * eps - (1 - ab).sqrt() * x0)
    assert_close(v_from_x0_eps(x0, 0.3, eps, StraightPath()), eps - x0)
    assert_close(v_from_x0_eps(x0, 3.0, eps, VarianceExploding()), eps)


# --- the posterior ---

def bayes(x0, x_t, ab_t, ab_s):
    """q(x_s | x_t, x_0) as the product of a prior N(sqrt(ab_s) x0, .) and a likelihood of x_t given x_s."""
    alpha = ab_t / ab_s
    prior_var, step_var = 1 - ab_s, 1 - alpha
    var = prior_var * step_var / (step_var + alpha * prior_var)
    mean = (ab_s.sqrt() * x0 * step_var + alpha.sqrt() * x_t * prior_var) / (step_var + alpha * prior_var)
    return mean, var.sqrt()


@pytest.mark.parametrize("schedule", [S, cosine_schedule(), ZERO])
@given(pair=strides)
@settings(max_examples=40, deadline=None)
def test_the_posterior_is_bayes_rule_for_any_stride(schedule, pair):
    s, t = pair
    x0, x_t = randn(2, 1, 3, 3), randn(2, 1, 3, 3, seed=1)
    mean, std = posterior(x0, x_t, t, s, schedule)
    true_mean, true_std = bayes(x0, x_t, schedule.alpha_bar[t], schedule.alpha_bar[s])
    assert mean.shape == x_t.shape and std.shape == (2, 1, 1, 1)
    assert_close(mean, true_mean, atol=1e-9, rtol=1e-6)
    assert_close(std, true_std.expand_as(std), atol=1e-9, rtol=1e-6)


@given(pair=strides)
@settings(max_examples=40, deadline=None)
def test_the_posterior_leads_from_one_marginal_to_the_other(pair):
    """x_t ~ q(x_t | x_0), then x_s ~ q(x_s | x_t, x_0), is x_s ~ q(x_s | x_0)."""
    s, t = pair
    zero, one = torch.zeros(1, 1, 1, 1).double(), torch.ones(1, 1, 1, 1).double()
    (c_x0, std), (c_xt, _) = posterior(one, zero, t, s, S), posterior(zero, one, t, s, S)
    (a_t, s_t), (a_s, s_s) = S.signal_and_noise(t, one), S.signal_and_noise(s, one)
    assert_close(c_x0 + c_xt * a_t, a_s)
    assert_close(c_xt**2 * s_t**2 + std**2, s_s**2, atol=1e-12, rtol=1e-7)


def test_one_step_of_the_posterior_has_the_papers_variance():
    t = torch.arange(2, 1001)
    _, std = posterior(t.double(), t.double(), t, t - 1, S)
    ab = S.alpha_bar
    assert_close(std**2, ((1 - ab[:-1]) / (1 - ab[1:]) * S.beta[1:])[1:])


def test_the_last_posterior_is_certain_of_x0():
    x0, x_t = randn(3, 2, 4, 4, dtype=torch.float32), randn(3, 2, 4, 4, seed=1, dtype=torch.float32)
    mean, std = posterior(x0, x_t, torch.tensor([1, 500, 1000]), 0, S)
    assert torch.equal(mean, x0) and not std.any()


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_posterior_is_computed_precisely_whatever_the_images_dtype(dtype):
    x0, x_t = torch.ones(1, 1, 1, 1, dtype=dtype), torch.zeros(1, 1, 1, 1, dtype=dtype)
    mean, std = posterior(x0, x_t, 2, 1, S)
    exact_mean, exact_std = bayes(1.0, 0.0, S.alpha_bar[2], S.alpha_bar[1])
    assert mean.dtype == std.dtype == dtype
    digits = {"atol": 0, "rtol": max(torch.finfo(dtype).eps / 2, 1e-11)}  # lost in the last rounding
    assert_close(mean.double().item(), exact_mean.item(), **digits)
    assert_close(std.double().item(), exact_std.item(), **digits)


# --- losses ---

@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("loss,target", [
    (noise_prediction_loss, lambda x0, t, eps, path: eps),
    (x0_prediction_loss, lambda x0, t, eps, path: x0),
    (v_prediction_loss, v_from_x0_eps),
])
def test_a_loss_is_zero_for_whoever_knows_and_the_mean_square_for_silence(path, loss, target):
    x0 = randn(16, 3, 8, 8)
    rng = generator(1)
    t = path.draw_times(16, x0, rng)
    eps = noise_like(x0, rng)
    truth = target(x0, t, eps, path)
    hears = {}

    def oracle(x_t, time):
        hears.update(x_t=x_t, t=time)
        return truth

    assert loss(Says(oracle), x0, path, generator(1)) == 0
    assert_close((hears["x_t"], hears["t"]), (add_noise(x0, t, eps, path), t))
    assert_close(loss(SILENT, x0, path, generator(1)), truth.square().mean())


def test_silence_costs_one_in_eps_and_one_in_v():
    """The noise has variance 1, and so has v when the data has."""
    x0 = randn(256, 3, 16, 16)
    for loss in (noise_prediction_loss, v_prediction_loss):
        assert abs(loss(SILENT, x0, S, generator()) - 1) < 5 * math.sqrt(2 / x0.numel())


@pytest.mark.parametrize("schedule", [S, cosine_schedule()])
@pytest.mark.parametrize("gamma", [0.5, 5.0])
def test_min_snr_makes_the_three_losses_one(schedule, gamma):
    """The same error in x_0 costs the same, whatever the network predicts."""
    guess = lambda x_t, t: 0.3 * x_t.tanh()
    as_eps = lambda x_t, t: eps_from_x0(x_t, t, guess(x_t, t), schedule)
    as_v = lambda x_t, t: v_from_x0_eps(guess(x_t, t), t, as_eps(x_t, t), schedule)
    x0 = randn(64, 1, 4, 4)
    cost = {name: loss(Says(answer), x0, schedule, generator(5), weight=min_snr_weight(name, gamma))
            for name, loss, answer in [("x0", x0_prediction_loss, guess), ("v", v_prediction_loss, as_v),
                                       ("eps", noise_prediction_loss, as_eps)]}
    assert_close(cost["eps"], cost["x0"], rtol=1e-6, atol=0)
    assert_close(cost["v"], cost["x0"], rtol=1e-6, atol=0)


def test_min_snr_weights_by_their_formulas_and_at_both_ends():
    snr = torch.tensor([0.0, 0.5, 5.0, 100.0, math.inf])
    assert_close(min_snr_weight("x0")(snr), torch.tensor([0, 0.5, 5, 5, 5]))
    assert_close(min_snr_weight("eps")(snr), torch.tensor([1, 1, 1, 0.05, 0]))
    assert_close(min_snr_weight("v")(snr), torch.tensor([0, 0.5 / 1.5, 5 / 6, 5 / 101, 0]))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_weight_is_looked_up_by_each_images_own_snr(loss):
    x0, chosen = randn(50, 1, 3, 3), S.alpha_bar[300] / (1 - S.alpha_bar[300])
    seen = []
    assert_close(loss(SILENT, x0, S, generator(2), weight=lambda snr: torch.full_like(snr, 2.0)),
                 2 * loss(SILENT, x0, S, generator(2)))
    noisy = lambda snr: seen.append(snr) or (snr < chosen).double()
    part = loss(SILENT, x0, S, generator(2), weight=noisy)
    rest = loss(SILENT, x0, S, generator(2), weight=lambda snr: (snr >= chosen).double())
    assert_close(part + rest, loss(SILENT, x0, S, generator(2)))
    assert_close(seen[0], S.snr[S.draw_times(50, x0, generator(2))])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_loss_is_a_scalar_that_reaches_the_weights_and_passes_the_label_on(loss, dtype):
    net = nn.Conv2d(2, 2, 1).to(dtype)
    labels = torch.arange(3)

    def answer(x_t, t, label):
        assert torch.equal(label, labels) and x_t.dtype == dtype
        return net(x_t)

    value = loss(Says(answer), randn(3, 2, 5, 7).to(dtype), S, generator(), label=labels)
    assert value.shape == () and value.dtype == dtype and value > 0
    value.backward()
    assert net.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("loss", LOSSES)
def test_the_generator_alone_decides_a_loss(loss):
    x0 = randn(4, 1, 3, 3)
    before = torch.get_rng_state()
    assert loss(SILENT, x0, S, generator(7)) == loss(SILENT, x0, S, generator(7))
    assert torch.equal(before, torch.get_rng_state())


# --- the bound ---

def coarse_gaussian(mean=0.1, std=0.08):
    """8-bit values of a Gaussian: the levels, and the probability of each."""
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    edge = Normal(mean, std).cdf
    mass = edge(levels + 1 / 255) - edge(levels - 1 / 255)
    keep = mass > 1e-7
    return levels[keep], mass[keep] / mass[keep].sum()


def exact_denoiser(levels, mass, schedule):
    """E[x_0 | x_t], pixel by pixel, for independent pixels with these levels."""
    def denoise(x_t, t):
        a, s = schedule.signal_and_noise(t, like=x_t)
        logit = -((x_t[..., None] - a[..., None] * levels) / s[..., None]).square() / 2 + mass.log()
        x0 = logit.softmax(-1) @ levels
        return Prediction(x0, (x_t - a * x0) / s)
    return denoise


@pytest.fixture(scope="module")
def bound():
    levels, mass = coarse_gaussian()
    chosen = torch.multinomial(mass, 128 * 4, replacement=True, generator=generator())
    x0 = levels[chosen].view(128, 1, 2, 2)
    nll = -mass[chosen].log2().mean()
    return rate_distortion(exact_denoiser(levels, mass, S), x0, S, rng=generator(1)), nll, x0


def test_the_bound_lies_just_above_the_negative_log_likelihood(bound):
    found, nll, _ = bound
    assert nll < found.bound < 1.04 * nll


def test_rate_and_distortion_trade_along_the_walk(bound):
    found, _, x0 = bound
    assert found.times == list(range(1000, -1, -1))
    assert found.kl.shape == found.rate.shape == found.rmse.shape == (1000,) and (found.kl > 0).all()
    assert_close(found.rate[-1] + found.kl[-1], found.bound)
    assert_close(found.rate, found.prior + found.kl.cumsum(0) - found.kl)
    spread = 127.5 * (x0 - 0.1).square().flatten(1).mean(1).sqrt().mean()
    assert_close(found.rmse[:50].mean(), spread, rtol=0.02, atol=0)  # at first only the mean is known
    assert found.rmse[-1] < 1.5  # less than two grey levels at the end


def test_fewer_jumps_cost_more_bits(bound):
    levels, mass = coarse_gaussian()
    coarse = rate_distortion(exact_denoiser(levels, mass, S), bound[2], S, S.spaced(50), generator(1))
    assert len(coarse.kl) == 50 and coarse.bound > bound[0].bound + 0.1


@pytest.mark.parametrize("level,mass", [
    (128, lambda half: math.erf(half / math.sqrt(2))),
    (0, lambda half: (1 + math.erf(half / math.sqrt(2))) / 2),  # the first and last bins reach to infinity
    (255, lambda half: (1 + math.erf(half / math.sqrt(2))) / 2),
])
def test_who_knows_the_image_pays_only_the_prior_and_the_decoder(level, mass):
    x0 = torch.full((2, 1, 3, 3), level / 127.5 - 1, dtype=torch.float64)
    found = rate_distortion(lambda x_t, t: Prediction(x0, x_t), x0, S, times=S.spaced(10), rng=generator())
    assert not found.rmse.any()
    t = torch.tensor(found.times)
    ab = S.alpha_bar[t[:-1]]  # what is left is the price of p's variance, the forward step's
    p = Normal(0.0, (1 - ab[:-1] / ab[1:]).sqrt())
    q = Normal(0.0, posterior(ab[1:], ab[1:], t[:-2], t[1:-1], S)[1])
    assert_close(found.kl[:-1], kl_divergence(q, p) / math.log(2))
    _, sigma = S.signal_and_noise(100, like=x0)  # the last of ten jumps starts at 100
    assert_close(found.kl[-1].item(), -math.log2(mass(1 / 255 / sigma[0].item())))


def test_prior_and_jumps_are_divergences_between_gaussians():
    """A denoiser that always says 0 makes every cost a formula."""
    x0 = (randn(3, 1, 5, 4) / 4).clamp(-1, 1)
    times = [1000, 600, 130, 20, 0]
    found = rate_distortion(lambda x_t, t: Prediction(torch.zeros_like(x_t), x_t), x0, S, times, generator())
    a, s = S.signal_and_noise(1000, like=x0)
    bits = lambda nats: nats.mean() / math.log(2)
    assert_close(found.prior, bits(kl_divergence(Normal(a * x0, s.expand_as(x0)), Normal(0.0, 1.0))))
    x_t = randn(3, 1, 5, 4, seed=9)
    for i, (t, u) in enumerate([(1000, 600), (600, 130), (130, 20)]):
        (truth, std), (ours, _) = (posterior(x, x_t, t, u, S) for x in (x0, torch.zeros_like(x0)))
        step = (1 - S.alpha_bar[t] / S.alpha_bar[u]).sqrt()
        assert_close(found.kl[i], bits(kl_divergence(Normal(truth, std), Normal(ours, step))))
    assert_close(found.rmse, 127.5 * x0.square().mean((1, 2, 3)).sqrt().mean().expand(4))


@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_the_bound_is_reproducible_and_leaves_no_graph(dtype):
    x0 = torch.zeros(2, 1, 3, 3, dtype=dtype, requires_grad=True)
    run = lambda: rate_distortion(lambda x_t, t: Prediction(x_t, x_t), x0, S, S.spaced(5), generator(4))
    assert torch.equal(run().kl, run().kl) and not run().bound.requires_grad and run().bound.isfinite()


def test_the_bound_of_a_schedule_that_ends_in_pure_noise_has_no_prior():
    x0 = torch.full((2, 1, 3, 3), 0.5)
    found = rate_distortion(lambda x_t, t: Prediction(0 * x_t, x_t), x0, ZERO, ZERO.spaced(5), generator(4))
    assert found.prior == 0 and found.bound.isfinite()


# --- devices and bad input ---

@pytest.mark.parametrize("device", DEVICES)
def test_one_seed_gives_the_same_on_every_device(device):
    x0 = randn(2, 1, 4, 4, dtype=torch.float32).to(device)
    eps = noise_like(x0, generator())
    assert eps.device.type == device and torch.equal(eps.cpu(), noise_like(x0.cpu(), generator()))
    x_t = add_noise(x0, torch.tensor([3, 900], device=device), eps, S)
    assert_close(x0_from_eps(x_t, torch.tensor([3, 900]), eps, S), x0, atol=1e-4, rtol=0)
    mean, std = posterior(x0, x_t, torch.tensor([3, 900], device=device), 2, S)
    assert mean.device.type == std.device.type == device
    for loss in LOSSES:
        assert_close(loss(SILENT, x0, S, generator()).cpu(), loss(SILENT, x0.cpu(), S, generator()))


X, Y = torch.zeros(2, 1, 4, 4), torch.zeros(2, 3, 4, 4)
PAIRED = [lambda x, y: add_noise(x, 1, y, S), lambda x, y: x0_from_eps(x, 1, y, S),
          lambda x, y: eps_from_x0(x, 1, y, S), lambda x, y: v_from_x0_eps(x, 1, y, S),
          lambda x, y: x0_eps_from_v(x, 1, y, S), lambda x, y: posterior(x, y, 2, 1, S)]


@pytest.mark.parametrize("call", PAIRED)
def test_images_and_noise_must_have_one_shape_and_be_floats(call):
    with pytest.raises(ValueError, match=r"one shape, got \(2, 1, 4, 4\) and \(2, 3, 4, 4\)"):
        call(X, Y)
    with pytest.raises(ValueError, match=r"float tensor .* got torch\.uint8"):
        call(X.to(torch.uint8), X)
    with pytest.raises(ValueError, match=r"float tensor .* got list"):
        call(X, [0.0])


@pytest.mark.parametrize("call,says", [
    (lambda: add_noise(X, 1001, X, S), r"0\.\.1000 .* 1001"),
    (lambda: add_noise(X, torch.tensor([1, 2, 3]), X, S), r"shape \(2,\), got \(3,\)"),
    (lambda: x0_from_eps(X, 1000, X, ZERO), "no signal is left .* predict v or x_0"),
    (lambda: x0_from_eps(X, 1.0, X, StraightPath()), "no signal is left"),
    (lambda: eps_from_x0(X, 0, X, S), "needs t > 0"),
    (lambda: eps_from_x0(X, torch.tensor([3, 0]), X, S), "needs t > 0"),
    (lambda: posterior(X, X, 5, 5, S), "s must be below t, got s = 5, t = 5"),
    (lambda: posterior(X, X, 5, 9, S), "got s = 9, t = 5"),
    (lambda: posterior(X, X, torch.tensor([5, 5]), torch.tensor([4, 6]), S), "s must be below t"),
    (lambda: posterior(X, X, 1001, 5, S), r"0\.\.1000 .* 1001"),
    (lambda: posterior(X, X, 3, -1, S), r"0\.\.1000 .* -1"),
    (lambda: posterior(X, X, torch.tensor([5, 6, 7]), 1, S), r"shape \(2,\), got \(3,\)"),
    (lambda: posterior(X, X, "late", 1, S), "got 'late'"),
    (lambda: min_snr_weight("noise"), r"one of \['eps', 'v', 'x0'\], got 'noise'"),
    (lambda: min_snr_weight("v", 0), "positive, got 0"),
    (lambda: min_snr_weight("v", math.nan), "positive, got nan"),
])
def test_what_cannot_be_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize("fn", [add_noise, x0_from_eps, eps_from_x0, v_from_x0_eps, x0_eps_from_v,
                                lambda x, t, y, s: posterior(x, y, t, 1, s)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_are_named_where_they_come_in(fn, value):
    broken = X.clone()
    broken[0, 0, 1, 2] = value
    for one, other in ((broken, X), (X, broken)):
        with pytest.raises(ValueError, match=f"must be finite, got NaN or infinity in 1 of its {X.numel()}"):
            fn(one, 5, other, S)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_refuses_what_would_give_a_wrong_number(loss):
    with pytest.raises(ValueError, match=r"empty batch .* \(0, 1, 4, 4\)"):
        loss(SILENT, X[:0], S)
    grey = Says(lambda x_t, t: x_t[:, :1])  # would broadcast against the three channels in silence
    with pytest.raises(ValueError, match=r"output must have one shape, .* \(2, 3, 4, 4\) and \(2, 1, 4, 4\)"):
        loss(grey, Y, S)
    with pytest.raises(ValueError, match=r"float tensors .* got (torch\.)?uint8"):
        loss(SILENT, X.to(torch.uint8), S)


@pytest.mark.parametrize("x0,times,says", [
    (X, [1000], r"from T = 1000 to 0, got \[1000\]"),
    (X, [999, 0], r"from T = 1000 to 0, got \[999, 0\]"),
    (X, [1000, 1], r"got \[1000, 1\]"),
    (X, [1000, 3, 7, 0], "s must be below t, got s = 7, t = 3"),
    (X + 255, None, r"images in \[-1, 1\], .* from 255 to 255"),
    (X * math.nan, None, r"images in \[-1, 1\], .* nan"),
    (X[:0], None, r"at least one, got shape \(0, 1, 4, 4\)"),
])
def test_the_bound_refuses_walks_and_images_it_cannot_count(x0, times, says):
    with pytest.raises(ValueError, match=says):
        rate_distortion(lambda x_t, t: Prediction(x_t, x_t), x0, S, times)


@pytest.mark.parametrize("loss", [noise_prediction_loss, x0_prediction_loss, v_prediction_loss])
def test_nobody_trains_on_bytes_in_disguise(loss):
    x = torch.arange(0.0, 256.0).view(1, 1, 16, 16)
    model = nn.Identity()
    model.forward = lambda x_t, t: x_t
    with pytest.raises(ValueError, match="up to 255: x / 127.5 - 1"):
        loss(model, x, S)
    assert loss(model, x / 127.5 - 1, S).isfinite()


@pytest.mark.parametrize("x, guess", [(0.0, 0.0), (0.0, 0.03), (0.0, -0.06), (-0.2, 0.3), (0.7, -1.0), (-1.0, 1.0),
                                      (1.0, -1.0), (1.0, 0.99), (-1.0, -1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_value_far_from_the_guess_costs_what_it_costs(x, guess, dtype):
    """Up to two hundred deviations off, where the mass of a bin is nothing to a float."""
    std, x = 0.01, round(127.5 * (x + 1)) / 127.5 - 1  # one of the 256 values
    lower = -mpmath.inf if x == -1 else (x - 1 / 255 - guess) / std
    upper = mpmath.inf if x == 1 else (x + 1 / 255 - guess) / std
    if lower + upper > 0:  # the same by symmetry, and 0 + a little instead of 1 - a little
        lower, upper = -upper, -lower
    exact = -mpmath.log(mpmath.ncdf(upper) - mpmath.ncdf(lower), 2)
    x0 = torch.full((1, 1, 2, 2), x, dtype=dtype)
    path = NoiseSchedule(torch.tensor([1.0, 1 - std**2], dtype=torch.float64))
    found = rate_distortion(lambda x_t, t: Prediction(torch.full_like(x0, guess), x_t), x0, path, rng=generator())
    assert_close(found.kl[-1].item(), float(exact), rtol=2e-4, atol=1e-6)
