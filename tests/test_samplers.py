"""Samplers against exact denoisers, the order of their methods, another library, and careless callers."""

import math
from itertools import islice, repeat

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DEVICES, FLOATS, generator, randn
from torch import nn
from torch.testing import assert_close

from coursekit.denoisers import Prediction, clipped, from_eps, from_v
from coursekit.diffusion import add_noise, noise_like, noise_prediction_loss, posterior
from coursekit.samplers import Step, ddim, ddpm, euler, heun, inpaint, last, start_from
from coursekit.schedules import (
    StraightPath,
    VarianceExploding,
    cosine_schedule,
    linear_schedule,
    zero_terminal_snr,
)
from coursekit.toys import GaussianData, GaussianMixture
from coursekit.training import train

S, LINE = linear_schedule(), StraightPath()
KNOWN, MASK = torch.zeros(2, 1, 4, 4), torch.ones(4, 4)

# every sampler as (denoise, x, rng) -> steps, over a handful of times
SAMPLERS = {
    "ddpm": lambda d, x, rng=None: ddpm(d(S), x, S, S.spaced(5), rng),
    "ddim": lambda d, x, rng=None: ddim(d(S), x, S, S.spaced(5)),
    "ddim, eta 1": lambda d, x, rng=None: ddim(d(S), x, S, S.spaced(5), 1.0, rng),
    "euler": lambda d, x, rng=None: euler(d(LINE), x, LINE, LINE.spaced(5)),
    "heun": lambda d, x, rng=None: heun(d(LINE), x, LINE, LINE.spaced(5)),
    "inpaint": lambda d, x, rng=None: inpaint(d(S), x, S, S.spaced(5), known=torch.zeros_like(x),
                                              mask=torch.ones(1), resample=2, rng=rng),
}
every_sampler = pytest.mark.parametrize("sample", SAMPLERS.values(), ids=SAMPLERS)
toy = GaussianData(0.5, 0.25)


# --- exact denoisers give the data back ---

@pytest.mark.parametrize("sample", [
    lambda d, x: ddpm(d(S), x, S, rng=generator(1)),
    lambda d, x: ddim(d(S), x, S, S.spaced(100)),
    lambda d, x: ddim(d(S), x, S, S.spaced(1000), eta=1.0, rng=generator(1)),
    lambda d, x: euler(d(LINE), x, LINE, LINE.spaced(200)),
    lambda d, x: heun(d(LINE), x, LINE, LINE.spaced(20)),
], ids=["ddpm", "ddim", "ddim, eta 1", "euler", "heun"])
def test_sampling_with_the_exact_denoiser_gives_the_data_back(sample):
    n = 4000
    step = last(sample(GaussianData(2.0, 0.25).denoiser, randn(n, 1)))
    assert step.t == 0
    # five standard errors, and a little for the finite number of steps
    assert abs(step.x.mean() - 2) < 5 * 0.5 / math.sqrt(n) + 0.01
    assert abs(step.x.var() - 0.25) < 5 * 0.25 * math.sqrt(2 / n) + 0.01


@pytest.mark.parametrize("sample", [
    lambda d, x: ddpm(d(S), x, S, S.spaced(100), rng=generator(1)),
    lambda d, x: ddim(d(S), x, S, S.spaced(50)),
    lambda d, x: ddim(d(S), x, S, S.spaced(50), eta=1.0, rng=generator(1)),
    lambda d, x: euler(d(LINE), x, LINE, LINE.spaced(50)),
    lambda d, x: heun(d(LINE), x, LINE, LINE.spaced(50)),
], ids=["ddpm", "ddim", "ddim, eta 1", "euler", "heun"])
def test_the_denoiser_of_a_training_set_gives_training_images_equally_often(sample):
    images = torch.tensor([[[[1.0, -1], [0, 0]]], [[[-1, 1], [0.5, 0]]]]).double()
    n = 1000
    x = last(sample(GaussianMixture(images).denoiser, randn(n, 1, 2, 2))).x
    distance = (x[:, None] - images).flatten(2).norm(dim=2)
    assert (distance.amin(1) < 0.02).double().mean() > 0.99
    assert abs((distance.argmin(1) == 0).double().mean() - 0.5) < 5 * 0.5 / math.sqrt(n)


def test_euler_is_of_first_order_and_heun_of_second():
    """The exact flow of Gaussian data is linear: x_0 = mean + sqrt(var) x_1."""
    x = randn(50, 1)
    error = {}
    for sample in (euler, heun):
        ends = [last(sample(toy.denoiser(LINE), x, LINE, LINE.spaced(n))).x for n in (40, 80)]
        error[sample] = [(end - (0.5 + 0.5 * x)).abs().max() for end in ends]
    assert error[euler][0] / error[euler][1] == pytest.approx(2, rel=0.05)
    assert error[heun][0] / error[heun][1] == pytest.approx(4, rel=0.1)


def test_deterministic_ddim_is_the_exact_flow_as_steps_grow():
    x = randn(50, 1)
    exact = 0.5 + 0.5 * (x - 0.5 * S.alpha_bar[-1].sqrt()) / (1 - 0.75 * S.alpha_bar[-1]).sqrt()
    errors = [(last(ddim(toy.denoiser(S), x, S, S.spaced(n))).x - exact).abs().max()
              for n in (50, 100, 1000)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.02


@pytest.mark.parametrize("t,s", [(1, 0), (2, 1), (500, 499), (1000, 999), (1000, 400), (300, 20)])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, None], ids=["eta 0", "eta 0.5", "eta 1", "ddpm"])
def test_told_the_true_x0_a_step_keeps_the_marginals(t, s, eta):
    """Started at q(x_t | x_0), a jump must end at q(x_s | x_0), whatever the eta."""
    n, x0 = 50_000, torch.full((50_000, 1), 0.3, dtype=torch.float64)
    knows = lambda x, time: Prediction(x0, (x - S.alpha_bar[t].sqrt() * x0) / (1 - S.alpha_bar[t]).sqrt())
    x_t = start_from(x0, t, S, generator(1))
    sample = ddpm(knows, x_t, S, [t, s], generator(2)) if eta is None else \
        ddim(knows, x_t, S, [t, s], eta, generator(2))
    x, var = last(sample).x, 1 - S.alpha_bar[s]
    assert abs(x.mean() - S.alpha_bar[s].sqrt() * 0.3) <= 5 * (var / n).sqrt() + 1e-12
    assert abs(x.var() - var) <= 5 * var * math.sqrt(2 / n) + 1e-12


@pytest.mark.parametrize("t", [1, 2, 500, 1000])
def test_an_ancestral_step_draws_from_the_posterior(t):
    n = 50_000
    x_t, x0 = (torch.full((n, 1), value, dtype=torch.float64) for value in (-0.7, 0.3))
    a, s = S.signal_and_noise(t, like=x_t)
    knows = lambda x, time: Prediction(x0, (x - a * x0) / s)
    drawn = last(ddim(knows, x_t, S, [t, t - 1], 1.0, generator())).x
    mean, std = posterior(x0[:1], x_t[:1], t, t - 1, S)
    assert abs(drawn.mean() - mean.item()) <= 5 * std.item() / math.sqrt(n) + 1e-12
    assert abs(drawn.std() - std.item()) <= 5 * std.item() / math.sqrt(2 * n) + 1e-12


@pytest.mark.parametrize("times", [None, [1000, 700, 30, 2, 1, 0]])
def test_ddim_with_eta_1_is_ddpm(times):
    short = linear_schedule(50, 1e-3, 0.2) if times is None else S
    x = randn(5, 1, 3, 3)
    one = last(ddpm(toy.denoiser(short), x, short, times, generator(1)))
    times = range(50, -1, -1) if times is None else times
    same = [step.x for step in ddim(toy.denoiser(short), x, short, times, 1.0, generator(1))]
    assert_close(one.x, same[-1])
    assert one.t == 0 and len(same) == len(times) - 1


# --- another library, stepping with the same network ---

@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 2, 3, padding=1))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, x, t):
            return x + 0.1 * self.layers(x) * torch.cos(t / 300).view(-1, 1, 1, 1)

    return Net()


CASES = [({"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}, linear_schedule()),
         ({"beta_schedule": "squaredcos_cap_v2"}, cosine_schedule())]


@pytest.mark.parametrize("config,ours", CASES, ids=["linear", "cosine"])
@pytest.mark.parametrize("clip", [True, False])
def test_ddpm_agrees_with_diffusers(net, config, ours, clip):
    """Their t is our t - 1; `fixed_small` is the posterior's variance."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(1000, **config, variance_type="fixed_small", clip_sample=clip)
    exact_tables(theirs, ours)
    x = start = randn(2, 2, 6, 6)
    rng, denoise = generator(3), from_eps(net.double(), ours)
    times = range(1000, 939, -1) if clip else range(60, -1, -1)
    with torch.no_grad():
        for t in times[:-1]:
            x = theirs.step(net(x, torch.full((2,), t)), t - 1, x, generator=rng).prev_sample
    end = last(ddpm(clipped(denoise) if clip else denoise, start, ours, times, generator(3)))
    assert end.t == times[-1]
    assert_close(end.x, x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("config,ours", CASES, ids=["linear", "cosine"])
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("zero", [False, True], ids=["eps", "zero terminal SNR, v"])
def test_ddim_agrees_with_diffusers(net, config, ours, eta, zero):
    diffusers = pytest.importorskip("diffusers")
    ours = zero_terminal_snr(ours) if zero else ours
    theirs = diffusers.DDIMScheduler(
        1000, **config, clip_sample=not zero, set_alpha_to_one=True, timestep_spacing="trailing",
        rescale_betas_zero_snr=zero, prediction_type="v_prediction" if zero else "epsilon")
    exact_tables(theirs, ours)
    theirs.set_timesteps(50)
    times = [*(theirs.timesteps + 1).tolist(), 0]
    assert times == ours.spaced(50)
    x, rng = randn(2, 2, 6, 6), generator(3)
    denoise = from_v(net.double(), ours) if zero else clipped(from_eps(net.double(), ours))
    steps = ddim(denoise, x, ours, times, eta, generator(3))
    with torch.no_grad():
        for t, step in zip(theirs.timesteps.tolist(), steps, strict=True):
            out = theirs.step(net(x, torch.full((2,), t + 1)), t, x, eta=eta, generator=rng)
            x = out.prev_sample
            assert_close(step.x, x, atol=1e-5, rtol=0)
            assert_close(step.x0, out.pred_original_sample, atol=1e-5, rtol=0)


def exact_tables(theirs, ours):
    """Their tables agree with ours to float32; take them in float64, so that only the steps are compared."""
    assert_close(theirs.alphas_cumprod, ours.alpha_bar[1:].float(), atol=2e-6, rtol=0)
    theirs.alphas_cumprod = ours.alpha_bar[1:]


# --- inpainting ---

@given(h=st.integers(1, 7), w=st.integers(1, 7), resample=st.integers(1, 3), seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_inpainting_returns_the_known_pixels_exactly(h, w, resample, seed):
    known, mask = randn(2, 3, h, w, seed=seed), (randn(h, w, seed=seed + 1) > 0).double()
    x = last(inpaint(toy.denoiser(S), randn(2, 3, h, w), S, S.spaced(6), known=known, mask=mask,
                     resample=resample, rng=generator(seed))).x
    assert torch.equal(x[..., mask == 0], known[..., mask == 0])
    assert (x != known)[..., mask == 1].all()


@pytest.mark.parametrize("shape", [(4, 4), (1, 4, 4), (1, 1, 4, 4), (2, 3, 4, 4), (3, 1, 1), (1,)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_a_mask_may_have_any_shape_that_fits(shape, dtype):
    known, mask = randn(2, 3, 4, 4), (randn(*shape, seed=5) > 0).to(dtype)
    x = last(inpaint(toy.denoiser(S), randn(2, 3, 4, 4), S, S.spaced(3), known=known, mask=mask)).x
    keep = (mask == 0).expand(x.shape)
    assert torch.equal(x[keep], known[keep])


def test_unknown_pixels_follow_the_known_ones_the_better_the_more_often_they_meet():
    """Two correlated pixels, one of them known to be 1: the other's mean is 0.8."""
    C = torch.tensor([[1, 0.8], [0.8, 1]]).double()

    def denoise(x_t, t):
        ab = S.alpha_bar[t[0]]
        x0 = x_t @ (ab.sqrt() * C @ torch.linalg.inv(ab * C + (1 - ab) * torch.eye(2)))
        return Prediction(x0, (x_t - ab.sqrt() * x0) / (1 - ab).sqrt())

    n, mean = 1000, {}
    for resample in (1, 4, 16):
        steps = inpaint(denoise, randn(n, 1, 1, 2), S, S.spaced(50), known=torch.ones(n, 1, 1, 2).double(),
                        mask=torch.tensor([0, 1]), resample=resample, rng=generator(1))
        mean[resample] = last(steps).x[..., 1].mean()
    assert 0.3 < mean[1] < mean[4] < mean[16]
    assert abs(mean[16] - 0.8) < 5 * 0.6 / math.sqrt(n)


def test_painting_everything_anew_is_ancestral_sampling():
    """With nothing kept, only the order in which noise is drawn differs: the law is ddpm's."""
    n = 4000
    x = last(inpaint(toy.denoiser(S), randn(n, 1), S, S.spaced(100), known=torch.zeros(n, 1).double(),
                     mask=torch.ones(1), rng=generator(1))).x
    y = last(ddpm(toy.denoiser(S), randn(n, 1), S, S.spaced(100), generator(2))).x
    assert abs(x.mean() - y.mean()) < 5 * 0.5 * math.sqrt(2 / n)
    assert abs(x.var() - y.var()) < 5 * 0.25 * math.sqrt(4 / n)


# --- editing ---

@pytest.mark.parametrize("path,t", [(S, 400), (LINE, 0.4), (VarianceExploding(), 2.0)])
def test_starting_from_an_image_is_noising_it(path, t):
    x0 = randn(2, 1, 3, 3)
    assert_close(start_from(x0, t, path, generator(1)), add_noise(x0, t, noise_like(x0, generator(1)), path))
    assert torch.equal(start_from(x0, 0, path), x0)


def test_an_edit_stays_the_nearer_the_less_it_was_noised():
    x0 = randn(200, 1, seed=2) * 0.5 + 0.5
    distance = []
    for t in (100, 400, 1000):
        times = [u for u in S.spaced(50) if u <= t]
        x = last(ddim(toy.denoiser(S), start_from(x0, t, S, generator(3)), S, times)).x
        distance.append((x - x0).square().mean())
    assert distance[0] < distance[1] < distance[2]


# --- what every sampler promises ---

@every_sampler
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 3, 5, 7), (3, 1, 4, 4)])
def test_a_sampler_keeps_shape_and_dtype_and_ends_at_the_prediction(sample, dtype, shape):
    steps = list(sample(toy.denoiser, randn(*shape).to(dtype), generator()))
    assert all(isinstance(step, Step) and step.x.shape == shape and step.x.dtype == dtype for step in steps)
    assert [step.t for step in steps][-1] == 0 and len(steps) == 5 and steps[-1].x.isfinite().all()
    assert_close(steps[-1].x, steps[-1].x0, atol=1e-2, rtol=1e-2)


@every_sampler
def test_a_sampler_is_reproducible_leaves_no_graph_and_no_trace(sample):
    x = randn(4, 1, 3, 3).requires_grad_()
    before, start = torch.get_rng_state(), x.detach().clone()
    run = lambda: [step.x for step in sample(toy.denoiser, x, generator(1))]
    for one, two in zip(run(), run(), strict=True):
        assert torch.equal(one, two) and not one.requires_grad
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(x, start)


@every_sampler
def test_between_two_steps_the_caller_has_gradients_again(sample):
    for step in sample(toy.denoiser, randn(2, 1)):
        assert torch.is_grad_enabled() and not step.x.requires_grad


def test_a_different_seed_gives_a_different_picture():
    for name in ("ddpm", "ddim, eta 1", "inpaint"):
        one, two = (last(SAMPLERS[name](toy.denoiser, randn(2, 1), generator(seed))).x for seed in (1, 2))
        assert (one != two).all()


@every_sampler
def test_sampling_in_mid_training_ignores_dropout(sample):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 4))

        def forward(self, x, t):
            return self.net(x)

    torch.manual_seed(0)
    net, x0 = Net(), torch.randn(32, 4)
    loss = lambda model, batch: noise_prediction_loss(model, batch, S)
    run = train(net, repeat(x0), loss, torch.optim.Adam(net.parameters()))
    next(run)
    reader = lambda path: from_v(net, path)
    once, again = (last(sample(reader, torch.ones(3, 4), generator())).x for _ in range(2))
    assert torch.equal(once, again) and not net.training
    next(run)
    assert net.training


@pytest.mark.parametrize("sample,calls", [(euler, 10), (heun, 19), (ddim, 10), (ddpm, 10)])
def test_a_sampler_asks_as_often_as_it_says(sample, calls):
    path = LINE if sample in (euler, heun) else S
    asked = []
    counted = lambda x, t: asked.append(t.tolist()) or toy.denoiser(path)(x, t)
    last(sample(counted, randn(2, 1), path, path.spaced(10)))
    assert len(asked) == calls
    assert all(t == [t[0]] * 2 and t[0] > 0 for t in asked)


def test_heun_corrects_every_jump_that_does_not_end_at_zero():
    asked = []
    last(heun(lambda x, t: asked.append(1) or toy.denoiser(LINE)(x, t), randn(2, 1), LINE, [1.0, 0.5, 0.25]))
    assert len(asked) == 4


def test_a_sampler_is_lazy_and_may_be_left():
    asked = []
    counted = lambda x, t: asked.append(1) or toy.denoiser(S)(x, t)
    walk = ddpm(counted, randn(2, 1), S)
    assert not asked
    assert [step.t for step in islice(walk, 3)] == [999, 998, 997] and len(asked) == 3


def test_times_may_be_any_descending_list():
    x = randn(2, 1)
    expected = [step.x for step in ddim(toy.denoiser(S), x, S, [1000, 500, 3])]
    for times in ((1000, 500, 3), torch.tensor([1000, 500, 3]), [1000.0, 500.0, 3.0]):
        found = list(ddim(toy.denoiser(S), x, S, times))
        assert [step.t for step in found] == [500, 3] and all(isinstance(step.t, int) for step in found)
        assert_close([step.x for step in found], expected)


def test_last_keeps_the_end():
    steps = [Step(t, torch.zeros(1), torch.zeros(1)) for t in (3, 2, 1)]
    assert last(iter(steps)) is steps[-1]


@every_sampler
@pytest.mark.parametrize("device", DEVICES)
def test_one_seed_gives_the_same_on_every_device(sample, device):
    x = randn(2, 1, 4, 4, dtype=torch.float32)
    here = last(sample(toy.denoiser, x.to(device), generator(1)))
    assert here.x.device.type == device
    assert_close(here.x.cpu(), last(sample(toy.denoiser, x, generator(1))).x, atol=1e-3, rtol=1e-3)


# --- bad input ---

@every_sampler
@pytest.mark.parametrize("x", [torch.full((2, 1), math.nan), torch.full((2, 1), math.inf),
                               torch.zeros(2, 1, dtype=torch.uint8)])
def test_a_sampler_starts_from_finite_floats(sample, x):
    with pytest.raises(ValueError, match="finite floats"):
        last(sample(toy.denoiser, x))


@pytest.mark.parametrize("path,times,says", [
    (S, [1000], r"at least two of them, got \[1000.0\]"),
    (S, [], r"at least two of them, got \[\]"),
    (S, [0, 1000], "must descend, .* got 1000 after 0"),
    (S, [1000, 500, 500, 0], "got 500 after 500"),
    (S, [1001, 0], r"whole numbers in 0\.\.1000, got 1001"),
    (S, [1000, -1], r"0\.\.1000, got -1"),
    (S, [1000, 0.5, 0], "whole numbers .* got 0.5"),
    (S, [math.nan, 0], "got 0 after nan"),
    (S, [math.inf, 0], r"0\.\.1000, got inf"),
    (S, 50, r"descending list, as schedule.spaced\(50\) gives it, got 50"),
    (LINE, [1.0], "at least two"),
    (LINE, [0.0, 1.0], "got 1 after 0"),
    (LINE, [1.5, 0.0], r"0\.\.1, got 1.5"),
    (LINE, [1.0, -0.5], "got -0.5"),
    (LINE, [1.0, math.nan, 0.0], "got nan after 1"),
    (LINE, 50, "descending list"),
])
def test_times_that_cannot_be_walked_are_refused(path, times, says):
    x = torch.zeros(2, 1)
    walks = [lambda: euler(toy.denoiser(LINE), x, LINE, times),
             lambda: heun(toy.denoiser(LINE), x, LINE, times)]
    if path is S:
        walks = [lambda: ddpm(toy.denoiser(S), x, S, times), lambda: ddim(toy.denoiser(S), x, S, times),
                 lambda: inpaint(toy.denoiser(S), x, S, times, known=x, mask=torch.ones(1))]
    for walk in walks:
        with pytest.raises(ValueError, match=says):
            last(walk())


@pytest.mark.parametrize("sample,path,says", [
    (ddpm, LINE, "walks a NoiseSchedule, got a StraightPath"),
    (ddim, LINE, "walks a NoiseSchedule, got a StraightPath"),
    (euler, S, "walks a StraightPath, got a NoiseSchedule"),
    (heun, S, "walks a StraightPath, got a NoiseSchedule"),
    (euler, VarianceExploding(), "got a VarianceExploding"),
])
def test_a_sampler_refuses_a_path_it_was_not_made_for(sample, path, says):
    with pytest.raises(ValueError, match=says):
        last(sample(toy.denoiser(path), torch.zeros(2, 1), path, [1, 0]))


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_eta_lies_between_0_and_1(eta):
    with pytest.raises(ValueError, match=rf"0\.\.1, got {eta}"):
        last(ddim(toy.denoiser(S), torch.zeros(2, 1), S, [1000, 0], eta))


@pytest.mark.parametrize("changes,says", [
    ({"known": KNOWN[:1]}, r"\(2, 1, 4, 4\), got torch.float32 \(1, 1, 4, 4\)"),
    ({"known": KNOWN.to(torch.uint8)}, "must be floats .* got torch.uint8"),
    ({"mask": MASK * 0.5}, "zeros .* and ones .* from 0.5 to 0.5"),
    ({"mask": MASK * math.nan}, "from nan"),
    ({"mask": MASK[:3]}, r"fit images of shape \(2, 1, 4, 4\), got \(3, 4\)"),
    ({"mask": MASK[None, None, None]}, r"got \(1, 1, 1, 4, 4\)"),
    ({"resample": 0}, "at least once, got resample = 0"),
])
def test_inpainting_refuses_what_does_not_fit(changes, says):
    arguments = {"known": KNOWN, "mask": MASK} | changes
    with pytest.raises(ValueError, match=says):
        last(inpaint(toy.denoiser(S), torch.zeros(2, 1, 4, 4), S, S.spaced(3), **arguments))


def test_there_is_no_last_of_nothing():
    walk = ddim(toy.denoiser(S), torch.zeros(2, 1), S, [1000, 0])
    last(walk)
    with pytest.raises(ValueError, match="used up"):
        last(walk)
