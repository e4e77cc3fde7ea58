"""Schedules against products, papers and another library; times that cannot be are refused."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DEVICES, FLOATS
from torch.testing import assert_close

from coursekit.schedules import (
    NoiseSchedule,
    StraightPath,
    VarianceExploding,
    cosine_schedule,
    linear_schedule,
    zero_terminal_snr,
)

S = linear_schedule()
SCHEDULES = {"linear": S, "cosine": cosine_schedule(), "zero": zero_terminal_snr(S),
             "short": linear_schedule(7)}
PATHS = {**SCHEDULES, "focused": NoiseSchedule(S.alpha_bar, focus=(0.8, 1.5)),
         "straight": StraightPath(), "exploding": VarianceExploding(80.0)}
ONE = torch.zeros(1, dtype=torch.float64)  # something for a pair (a, s) to multiply

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)
falling = st.lists(st.floats(1e-3, 0.999), min_size=1, max_size=30).map(
    lambda alphas: NoiseSchedule(torch.tensor([1.0, *alphas], dtype=torch.float64).cumprod(0)))


def ends(path):
    return (0, path.T) if isinstance(path, NoiseSchedule) else (0.0, getattr(path, "T", 80.0))


def test_a_schedule_starts_clean_and_is_the_product_of_alphas():
    assert S.T == 1000 and S.alpha_bar[0] == 1 and S.alpha_bar.dtype == torch.float64
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    for t in (1, 7, 1000):
        assert_close(S.alpha_bar[t].item(), math.prod(1 - b for b in beta[:t].tolist()))
        assert_close(S.beta[t], beta[t - 1])


@given(falling)
@settings(max_examples=40, deadline=None)
def test_every_derived_sequence_is_indexed_by_t(schedule):
    T, ab = schedule.T, schedule.alpha_bar
    assert len(schedule.alpha) == len(schedule.beta) == len(schedule.snr) == T + 1
    assert schedule.beta[0] == 0 and schedule.snr[0] == math.inf
    assert_close(schedule.alpha.cumprod(0), ab)
    assert_close(schedule.alpha + schedule.beta, torch.ones_like(ab))
    assert_close(schedule.snr[1:] / (1 + schedule.snr[1:]), ab[1:])


@given(falling)
@settings(max_examples=40, deadline=None)
def test_one_jump_has_the_law_of_many_small_ones(schedule):
    """q(x_t | x_0) composed of single steps keeps mean and variance (DDPM, eq. 2 -> eq. 4)."""
    mean, var = 1.0, 0.0
    for alpha in schedule.alpha[1:].tolist():
        mean, var = mean * math.sqrt(alpha), var * alpha + (1 - alpha)
    a, s = schedule.signal_and_noise(schedule.T, like=ONE)
    assert_close(a.item(), mean)
    assert_close(s.item() ** 2, var)


@pytest.mark.parametrize("schedule,ab_T,amplitude,useless", [
    (linear_schedule(), 4.0e-5, 0.006, 0.33),
    (cosine_schedule(), 2e-9, 0.0, 0.06),
    (linear_schedule(800, 1e-4, 1e-2), 0.017, 0.13, 0),
    (linear_schedule(300), 0.048, 0.22, 0),
    (linear_schedule(200), 0.132, 0.36, 0),
], ids=["linear", "cosine", "weak end", "T=300", "T=200"])
def test_what_is_left_of_the_image_at_the_end(schedule, ab_T, amplitude, useless):
    """How much amplitude x_T still carries, and the share of steps that have almost nothing to say."""
    assert schedule.alpha_bar[-1].item() == pytest.approx(ab_T, rel=0.25)
    assert schedule.alpha_bar[-1].sqrt().item() == pytest.approx(amplitude, abs=0.005)
    assert (schedule.snr[1:] < 0.01).double().mean().item() == pytest.approx(useless, abs=0.005)


@pytest.mark.parametrize("T", [200, 300, 4000])
def test_betas_scaled_by_1000_over_T_end_where_the_paper_ends(T):
    scaled = linear_schedule(T, 1e-4 * 1000 / T, 0.02 * 1000 / T)
    assert scaled.alpha_bar[-1].sqrt() < 0.007


def test_cosine_follows_its_formula_until_beta_is_capped():
    schedule = cosine_schedule()
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    assert_close(schedule.alpha_bar[:991], torch.tensor(f[:991], dtype=torch.float64) / f[0])
    assert schedule.beta.max().item() == pytest.approx(0.999)
    assert (schedule.beta > 0.99).sum() < 10


@pytest.mark.parametrize("ours,theirs", [
    (linear_schedule(), {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
    (linear_schedule(50, 1e-3, 0.3), {"beta_schedule": "linear", "beta_start": 1e-3, "beta_end": 0.3}),
    (cosine_schedule(), {"beta_schedule": "squaredcos_cap_v2"}),
    (cosine_schedule(200), {"beta_schedule": "squaredcos_cap_v2"}),
])
@pytest.mark.parametrize("zero", [False, True])
def test_schedules_agree_with_diffusers(ours, theirs, zero):
    """Their index 0 is our t = 1."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(ours.T, **theirs, rescale_betas_zero_snr=zero).alphas_cumprod
    ours = zero_terminal_snr(ours) if zero else ours
    assert_close(ours.alpha_bar[1:].float(), theirs, atol=2e-6, rtol=0)


@pytest.mark.parametrize("schedule", [linear_schedule(), cosine_schedule(), linear_schedule(2)])
def test_zero_terminal_snr_shifts_and_stretches_the_root(schedule):
    zero = zero_terminal_snr(schedule)
    assert zero.alpha_bar[-1] == 0 and zero.snr[-1] == 0 and zero.T == schedule.T
    assert_close(zero.alpha_bar[1], schedule.alpha_bar[1])
    old, new = schedule.alpha_bar[1:].sqrt(), zero.alpha_bar[1:].sqrt()
    ratio = (new[0] - new[1:]) / (old[0] - old[1:])  # one straight line maps old roots to new
    assert_close(ratio, ratio[:1].expand_as(ratio))
    assert_close(zero_terminal_snr(zero).alpha_bar, zero.alpha_bar)


@given(st.integers(1, 1500), st.data())
@settings(max_examples=60, deadline=None)
def test_spaced_times_fall_evenly_from_T_to_0(T, data):
    schedule = NoiseSchedule(torch.linspace(1, 0, T + 1, dtype=torch.float64))
    steps = data.draw(st.integers(1, T))
    times = schedule.spaced(steps)
    assert times[0] == T and times[-1] == 0 and len(times) == steps + 1
    jumps = [t - s for t, s in pairwise(times)]
    assert all(isinstance(t, int) for t in times) and min(jumps) >= 1
    assert max(abs(jump - T / steps) for jump in jumps) <= 1


def test_even_times_are_those_of_a_straight_line():
    for steps in range(1, 1001):
        assert S.spaced(steps) == torch.linspace(1000, 0, steps + 1, dtype=torch.float64).round().int().tolist()


@pytest.mark.parametrize("power", [0.3, 0.6, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("steps", [1, 2, 10, 99, 100])
def test_powers_shift_times_and_never_take_one_twice(steps, power):
    """As many times as asked for, strictly down, near T u^power wherever there is room for it."""
    times = linear_schedule(100).spaced(steps, power)
    assert times[0] == 100 and times[-1] == 0 and len(times) == steps + 1
    assert all(s < t for t, s in pairwise(times))
    if steps == 10 and power == 0.6:
        assert times == [round(100 * (1 - i / 10) ** 0.6) for i in range(11)]
        assert times[1] > linear_schedule(100).spaced(10)[1]  # the first jump is shorter


def test_the_straight_path_is_spaced_from_1_to_0():
    assert_close(StraightPath().spaced(4), [1.0, 0.75, 0.5, 0.25, 0.0])
    assert StraightPath().spaced(1) == [1.0, 0.0]


@pytest.mark.parametrize("path", SCHEDULES.values(), ids=SCHEDULES)
def test_signal_and_noise_share_the_unit_circle(path):
    t = torch.arange(path.T + 1)
    a, s = path.signal_and_noise(t, like=t.double())
    assert_close(a**2 + s**2, torch.ones_like(a))
    assert_close(a**2, path.alpha_bar)
    assert a[0] == 1 and s[0] == 0


def test_the_straight_path_and_the_exploding_one_are_what_they_say():
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    a, s = StraightPath().signal_and_noise(t, like=t)
    assert_close(a, 1 - t)
    assert_close(s, t)
    a, s = VarianceExploding().signal_and_noise(1000 * t, like=t)
    assert_close(a, torch.ones(5).double())
    assert_close(s, 1000 * t)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@given(shape=shapes, dtype=st.sampled_from(FLOATS), seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_the_pair_takes_shape_dtype_and_times_from_what_it_multiplies(path, shape, dtype, seed):
    like = torch.zeros(shape, dtype=dtype)
    t = path.draw_times(shape[0], like, torch.Generator().manual_seed(seed))
    for pair in (path.signal_and_noise(t, like), path.velocity_weights(t, like)):
        for c in pair:
            assert c.dtype == dtype and c.shape == (shape[0], *[1] * (len(shape) - 1)) and c.isfinite().all()
    for end in ends(path):
        whole_batch = path.signal_and_noise(end, like)
        each = path.signal_and_noise(torch.full((shape[0],), end).to(t.dtype), like)
        assert torch.equal(whole_batch[0], each[0]) and torch.equal(whole_batch[1], each[1])


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_signal_noise_and_their_velocities_span_the_plane(path):
    """a s' - s a' = 1, so (x_t, v) determines (x_0, eps) at every time, ends included."""
    for t in (*ends(path), 3 if isinstance(path, NoiseSchedule) else 0.3):
        (a, s), (da, ds) = path.signal_and_noise(t, ONE), path.velocity_weights(t, ONE)
        assert_close((a * ds - s * da).item(), 1.0)


@pytest.mark.parametrize("path", [StraightPath(), VarianceExploding()])
def test_velocity_is_the_derivative_by_time(path):
    h = 1e-6
    (a0, s0), (a1, s1) = path.signal_and_noise(0.4, ONE), path.signal_and_noise(0.4 + h, ONE)
    da, ds = path.velocity_weights(0.4, ONE)
    assert_close(((a1 - a0) / h, (s1 - s0) / h), (da, ds), atol=1e-6, rtol=0)


def test_velocity_on_a_schedule_is_the_derivative_by_the_angle():
    """With (a, s) = (cos, sin) of an angle, (a', s') = (-sin, cos)."""
    a, s = S.signal_and_noise(400, ONE)
    da, ds = S.velocity_weights(400, ONE)
    angle = torch.atan2(s, a)
    assert_close((da, ds), (-angle.sin(), angle.cos()))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_times_may_have_any_integer_dtype(dtype):
    t = torch.tensor([0, 1, 7], dtype=dtype)  # as long as alpha_bar: uint8 must not be read as a mask
    a, _ = NoiseSchedule(torch.linspace(1, 0, 8).double()).signal_and_noise(t, like=torch.zeros(3).double())
    assert_close(a**2, 1 - t.double() / 7)


def test_numpy_numbers_are_numbers():
    assert linear_schedule(np.int64(10)).spaced(np.int32(5)) == linear_schedule(10).spaced(5)
    assert_close(S.signal_and_noise(np.int64(9), ONE), S.signal_and_noise(9, ONE))
    half = np.float64(0.5)
    assert_close(StraightPath().signal_and_noise(half, ONE), StraightPath().signal_and_noise(0.5, ONE))


def test_a_list_keeps_its_digits():
    assert NoiseSchedule([1, 0.9, 0.1]).alpha_bar[1].item() == 0.9


def test_training_times_are_uniform_on_1_to_T():
    n, T = 20_000, 10
    t = linear_schedule(T).draw_times(n, torch.zeros(1), torch.Generator().manual_seed(0))
    assert t.dtype == torch.int64
    counts = t.bincount(minlength=T + 1)
    assert counts[0] == 0 and len(counts) == T + 1
    assert (counts[1:] - n / T).abs().max() < 5 * math.sqrt(n / T * (1 - 1 / T))


@pytest.mark.parametrize("mean,std", [(0.0, 1.0), (0.8, 1.5), (-1.5, 0.5)])
def test_a_focus_puts_half_of_the_training_times_below_the_sigmoid_of_its_mean(mean, std):
    n, T = 20_000, 1000
    schedule = NoiseSchedule(S.alpha_bar, focus=(mean, std))
    t = schedule.draw_times(n, torch.zeros(1), torch.Generator().manual_seed(0))
    assert t.dtype == torch.int64 and t.min() >= 1 and t.max() <= T
    middle = 1 / (1 + math.exp(-mean))
    density = 1 / (math.sqrt(2 * math.pi) * std * middle * (1 - middle))  # of t / T at its median
    assert abs(t.double().median() / T - middle) < 5 / (2 * density * math.sqrt(n)) + 1 / T


def test_a_focus_decides_where_a_training_looks_and_nothing_else():
    focused = NoiseSchedule(S.alpha_bar, focus=(3.0, 0.1))
    assert torch.equal(focused.alpha_bar, S.alpha_bar) and focused.spaced(7) == S.spaced(7)
    draw = lambda path: path.draw_times(5000, torch.zeros(1), torch.Generator().manual_seed(0)).double()
    assert (draw(focused) > 900).all()
    uniform = draw(NoiseSchedule(S.alpha_bar, focus=None))
    assert torch.equal(uniform, draw(S)) and abs(uniform.mean() - 500.5) < 5 * 1000 / math.sqrt(12 * 5000)


def test_an_extreme_focus_stays_inside_the_schedule():
    for mean, end in ((-1000.0, 1), (1000.0, 1000)):
        t = NoiseSchedule(S.alpha_bar, focus=(mean, 1.0)).draw_times(50, torch.zeros(1))
        assert (t == end).all()


@pytest.mark.parametrize("focus", [(math.nan, 1.0), (math.inf, 1.0), (0.0, 0.0), (0.0, -1.0), (0.0, math.inf),
                                   (0.0, math.nan)])
def test_a_focus_that_cannot_be_is_refused(focus):
    with pytest.raises(ValueError, match="finite mean and a deviation above 0, got"):
        NoiseSchedule(S.alpha_bar, focus=focus)


@pytest.mark.parametrize("path,last", [(StraightPath(), 1.0), (VarianceExploding(80.0), 80.0)])
def test_training_times_are_uniform_on_the_interval(path, last):
    n = 20_000
    t = path.draw_times(n, ONE, torch.Generator().manual_seed(0)) / last
    assert t.dtype == torch.float64 and t.min() >= 0 and t.max() < 1
    assert abs(t.mean() - 0.5) < 5 * math.sqrt(1 / 12 / n)
    assert abs(t.square().mean() - 1 / 3) < 5 * math.sqrt(4 / 45 / n)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_the_generator_alone_decides_the_times(path):
    draw = lambda: path.draw_times(16, torch.zeros(1), torch.Generator().manual_seed(3))
    before = torch.get_rng_state()
    assert torch.equal(draw(), draw()) and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_paths_work_on_every_device(device, path):
    like = torch.zeros(4, 1, 2, 2, device=device)
    t = path.draw_times(4, like, torch.Generator().manual_seed(0))  # a CPU seed, the same times everywhere
    assert t.device.type == device
    assert_close(t.cpu(), path.draw_times(4, torch.zeros(1), torch.Generator().manual_seed(0)))
    on_cpu = path.signal_and_noise(t.cpu(), like.cpu())
    for here, there in zip(path.signal_and_noise(t, like), on_cpu, strict=True):
        assert here.device.type == device
        assert_close(here.cpu(), there)


def test_a_schedule_cannot_be_changed_behind_its_back():
    with pytest.raises(AttributeError):
        S.alpha_bar = torch.ones(3)


@pytest.mark.parametrize("alpha_bar,says", [
    ([0.9, 0.5], r"from 1 .* alpha_bar\[0\] = 0.9"),
    ([1.0, 0.5, 0.5], r"fall strictly .* alpha_bar\[2\] = 0.5 after 0.5"),
    ([1.0, 0.5, 0.7], r"alpha_bar\[2\] = 0.7 after 0.5"),
    ([1.0, 0.5, -0.1], r"0 or above, got alpha_bar\[2\] = -0.1"),
    ([1.0, math.nan, 0.1], r"alpha_bar\[1\] = nan"),
    ([1.0], r"T\+1 >= 2 numbers, got float64 tensor of shape \(1,\)"),
    ([[1.0, 0.5]], r"1-D .* \(1, 2\)"),
    (torch.tensor([1, 0]), r"float sequence .* int64"),
])
def test_a_sequence_that_is_no_schedule_is_refused(alpha_bar, says):
    with pytest.raises(ValueError, match=says):
        NoiseSchedule(alpha_bar)


@pytest.mark.parametrize("make,says", [
    (lambda: linear_schedule(0), "at least 1 step, got 0"),
    (lambda: linear_schedule(-3), "got -3"),
    (lambda: linear_schedule(10.0), "whole number .* got 10.0"),
    (lambda: linear_schedule(True), "whole number .* got True"),
    (lambda: cosine_schedule(0), "at least 1 step, got 0"),
    (lambda: linear_schedule(10, beta_1=0.0), "between 0 and 1, got beta_1=0.0, beta_T=0.02"),
    (lambda: linear_schedule(10, beta_T=1.0), "beta_T=1.0"),
    (lambda: linear_schedule(10, beta_T=math.nan), "beta_T=nan"),
    (lambda: linear_schedule(10, beta_1=-1e-4), "beta_1=-0.0001"),
    (lambda: cosine_schedule(10, s=-0.1), "at least 0, got -0.1"),
    (lambda: cosine_schedule(10, s=math.nan), "finite .* got nan"),
    (lambda: cosine_schedule(10, s=math.inf), "finite .* got inf"),
    (lambda: zero_terminal_snr(linear_schedule(1)), "T >= 2, got T = 1"),
    (lambda: StraightPath(2.0), "ends at t = 1, got T = 2.0"),
    (lambda: VarianceExploding(0), "positive, got 0"),
    (lambda: VarianceExploding(math.nan), "positive, got nan"),
    (lambda: VarianceExploding().draw_times(3, ONE), "finite sigma_max"),
    (lambda: S.spaced(5, 0.0), "greater than 0, got 0.0"),
    (lambda: S.spaced(0), r"1\.\.1000, got 0"),
    (lambda: S.spaced(1001), r"1\.\.1000, got 1001"),
    (lambda: S.spaced(50.0), r"whole number .* got 50.0"),
    (lambda: StraightPath().spaced(0), "at least 1 step, got 0"),
    (lambda: StraightPath().spaced(2.5), "whole number .* got 2.5"),
])
def test_a_path_that_cannot_be_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


IMAGES = torch.zeros(2, 1, 4, 4)


@pytest.mark.parametrize("path,t,says", [
    (S, -1, r"0\.\.1000 .* from -1 to -1"),
    (S, 1001, r"0\.\.1000 .* from 1001 to 1001"),
    (S, torch.tensor([3, 1001]), r"0\.\.1000 .* from 3 to 1001"),
    (S, 5.0, r"integers in 0\.\.1000, got 5.0"),
    (S, torch.tensor([1.0, 2.0]), r"integers of shape \(b,\), got float32 tensor of shape \(2,\)"),
    (S, torch.tensor([True, False]), "integers .* got bool"),
    (S, True, r"integers .* got True \(bool\)"),
    (S, "5", r"got '5' \(str\)"),
    (S, torch.tensor([1, 2, 3]), r"shape \(2,\), got \(3,\)"),
    (S, torch.tensor(3), r"shape \(2,\), got \(\)"),
    (S, torch.ones(2, 1, dtype=torch.long), r"shape \(2,\), got \(2, 1\)"),
    (StraightPath(), 1.5, r"0\.\.1 .* from 1.5 to 1.5"),
    (StraightPath(), -0.5, "from -0.5"),
    (StraightPath(), 3, r"0\.\.1 .* from 3 to 3"),
    (StraightPath(), math.nan, r"0\.\.1 .* nan"),
    (StraightPath(), torch.tensor([0, 1]), r"floats of shape \(b,\), got int64"),
    (VarianceExploding(), -1.0, r"0\.\.inf .* from -1"),
    (VarianceExploding(), math.inf, r"from inf to inf"),
    (VarianceExploding(80.0), 81.0, r"0\.\.80 .* 81"),
])
def test_a_time_that_cannot_be_is_refused(path, t, says):
    with pytest.raises(ValueError, match=says):
        path.signal_and_noise(t, like=IMAGES)
    with pytest.raises(ValueError, match=says):
        path.velocity_weights(t, like=IMAGES)


def test_half_precision_does_not_round_a_wrong_time_into_a_right_one():
    with pytest.raises(ValueError, match=r"0\.\.1"):
        StraightPath().signal_and_noise(1.001, like=IMAGES.bfloat16())


@pytest.mark.parametrize("like,says", [
    (torch.zeros(2, 3, dtype=torch.uint8), "float tensors .* got uint8"),
    (torch.tensor(1.0), r"shape \(\)"),
    (np.zeros((2, 3)), "ndarray"),
])
def test_images_must_be_floats(like, says):
    with pytest.raises(ValueError, match=says):
        S.signal_and_noise(1, like=like)
