"""Networks read as denoisers, and what becomes of denoisers when they are combined."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DEVICES, FLOATS, Says, generator, randn
from torch import nn
from torch.testing import assert_close

from coursekit.denoisers import (
    Prediction,
    anagram,
    clipped,
    drop_labels,
    from_eps,
    from_v,
    from_x0,
    guided,
    hybrid,
    retimed,
    switched,
)
from coursekit.diffusion import add_noise, noise_prediction_loss, v_from_x0_eps
from coursekit.schedules import StraightPath, cosine_schedule, linear_schedule, zero_terminal_snr
from coursekit.toys import GaussianData

S = linear_schedule()
ZERO = zero_terminal_snr(S)
T1 = torch.ones(2, dtype=torch.long)


def always(x0, eps):
    return lambda x_t, t: Prediction(torch.full_like(x_t, x0), torch.full_like(x_t, eps))


def shrink(x_t, t):
    """A denoiser that treats every pixel alike, and the two halves of its answer differently."""
    return Prediction(0.5 * x_t.tanh(), x_t - 0.2 * x_t**3)


@pytest.mark.parametrize("path,times", [
    (S, [1, 2, 50, 500, 1000]),
    (cosine_schedule(), [1, 2, 50, 500, 990]),
    (StraightPath(), [0.01, 0.2, 0.5, 0.7, 0.99]),
], ids=["linear", "cosine", "straight"])
@pytest.mark.parametrize("read,target", [
    (from_eps, lambda x0, t, eps, path: eps),
    (from_x0, lambda x0, t, eps, path: x0),
    (from_v, v_from_x0_eps),
])
def test_a_network_that_knows_is_a_denoiser_that_knows(read, target, path, times):
    x0, eps, t = randn(5, 3, 4, 4), randn(5, 3, 4, 4, seed=1), torch.tensor(times)
    t = t.double() if t.is_floating_point() else t
    denoise = read(Says(lambda x_t, time: target(x0, time, eps, path)), path)
    assert_close(denoise(add_noise(x0, t, eps, path), t), Prediction(x0, eps), atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("read", [from_x0, from_v])
def test_where_no_signal_is_left_x0_and_v_still_speak(read):
    x0, eps, t = randn(2, 1, 3, 3), randn(2, 1, 3, 3, seed=1), torch.tensor([1000, 1000])
    answer = x0 if read is from_x0 else v_from_x0_eps(x0, t, eps, ZERO)
    assert_close(read(Says(lambda x_t, time: answer), ZERO)(eps, t), Prediction(x0, eps))


@pytest.mark.parametrize("read", [from_eps, from_x0, from_v])
@pytest.mark.parametrize("dtype", FLOATS)
def test_shape_dtype_gradient_and_conditions_pass_through(read, dtype):
    x_t = randn(2, 3, 5, 7).to(dtype).requires_grad_()
    heard = {}
    denoise = read(Says(lambda x, t, **cond: heard.update(t=t, **cond) or x * 0.5), S, label=3)
    prediction = denoise(x_t, torch.tensor([400, 900]))
    assert heard["label"] == 3 and heard["t"].tolist() == [400, 900]
    assert all(part.shape == x_t.shape and part.dtype == dtype for part in prediction)
    prediction.x0.sum().backward()  # so that guidance by a gradient is possible
    assert x_t.grad.abs().sum() > 0


@pytest.mark.parametrize("read", [from_eps, from_x0, from_v])
def test_asking_puts_the_network_in_evaluation_mode(read):
    net = Says(lambda x_t, t: net.drop(x_t))
    net.drop = nn.Dropout(0.5)
    denoise = read(net, S)  # made before training starts
    net.train()
    x, t = randn(2, 1, 8, 8), torch.tensor([10, 20])
    assert_close(denoise(x, t), denoise(x, t))
    assert not net.training and not net.drop.training
    net.train()
    noise_prediction_loss(net, x, S)
    assert net.training  # a loss leaves the mode alone


@pytest.mark.parametrize("read", [from_eps, from_x0, from_v])
def test_a_network_of_another_shape_is_refused(read):
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\), got \(2, 1, 4, 4\)"):
        read(Says(lambda x_t, t: x_t[:, :1]), S)(torch.zeros(2, 3, 4, 4), T1)


def test_noise_prediction_needs_signal_at_the_end():
    with pytest.raises(ValueError, match="zero terminal SNR needs v- or x0-prediction"):
        from_eps(nn.Identity(), ZERO)
    with pytest.raises(ValueError, match="no signal is left"):
        from_eps(Says(lambda x, t: x), StraightPath())(torch.zeros(2, 1), torch.ones(2))


@pytest.mark.parametrize("read", [from_eps, from_x0, from_v])
def test_a_time_outside_the_schedule_is_refused(read):
    with pytest.raises(ValueError, match=r"0\.\.1000 .* 1001"):
        read(Says(lambda x, t: x), S)(torch.zeros(1, 1), torch.tensor([1001]))


# --- another schedule's times ---

@pytest.mark.parametrize("schedule", [S, cosine_schedule(), ZERO, linear_schedule(300)])
def test_retimed_to_its_own_schedule_a_denoiser_is_itself(schedule):
    t = torch.tensor([1, 2, schedule.T // 2, schedule.T - 1, schedule.T])
    x_t, asked = randn(5, 1, 3, 3), []
    denoise = lambda x, time: asked.append(time) or GaussianData(0.3, 0.5).denoiser(schedule)(x, time)
    assert_close(retimed(denoise, schedule, schedule)(x_t, t), denoise(x_t, t), atol=1e-8, rtol=1e-8)
    assert asked[0].tolist() == t.tolist()


def missed_by_retiming(own, schedule):
    """The largest error, over all times of `schedule`, against the formula that holds on any schedule."""
    data, t = GaussianData(-0.7, 0.3), torch.arange(1, schedule.T + 1)
    x_t = add_noise(data.sample((len(t), 8), generator(1)).double(), t, randn(len(t), 8), schedule)
    found = retimed(data.denoiser(own), own, schedule)(x_t, t)
    assert_close(add_noise(found.x0, t, found.eps, schedule), x_t)  # both halves belong to x_t, exactly
    return (found.x0 - data.denoiser(schedule)(x_t, t).x0).abs().max().item()


@pytest.mark.parametrize("schedule", [linear_schedule(300), linear_schedule(300, 1e-4 / 0.3, 0.02 / 0.3),
                                      cosine_schedule(300), S], ids=["pitfall", "rescaled", "cosine", "linear"])
def test_retimed_is_the_best_denoiser_of_the_other_schedule_up_to_the_grid_of_times(schedule):
    coarse, fine = (missed_by_retiming(cosine_schedule(T), schedule) for T in (100, 10_000))
    assert fine < 0.01 and fine < coarse / 10


def test_retimed_takes_any_integers_and_any_callable():
    path = linear_schedule(20)
    denoise = retimed(from_eps(lambda x, t: 0 * x, path), path, linear_schedule(10))
    x = randn(2, 1, 2, 2)
    as_bytes, as_longs = (denoise(x, torch.tensor([3, 7], dtype=dtype)).x0 for dtype in (torch.uint8, torch.int64))
    assert torch.equal(as_bytes, as_longs)


def test_retiming_matters():
    data, t = GaussianData(-0.7, 0.3), torch.tensor([250, 250])
    own, schedule = cosine_schedule(), linear_schedule(300)
    x_t = randn(2, 8)
    right, wrong = data.denoiser(schedule)(x_t, t).x0, data.denoiser(own)(x_t, t).x0
    assert (retimed(data.denoiser(own), own, schedule)(x_t, t).x0 - right).abs().max() < 0.01
    assert (wrong - right).abs().max() > 0.1


# --- combinators ---

def test_clipping_touches_x0_alone():
    x0, eps = torch.linspace(-3, 3, 13), torch.linspace(-5, 5, 13)
    clean = clipped(lambda x_t, t: Prediction(x0, eps))(x0, T1)
    assert clean.x0.min() == -1 and clean.x0.max() == 1 and torch.equal(clean.eps, eps)
    inside = x0.abs() <= 1
    assert torch.equal(clean.x0[inside], x0[inside])


@pytest.mark.parametrize("w,expected", [
    (0.0, (1.0, -1.0)), (1.0, (3.0, -2.0)), (2.0, (5.0, -3.0)), (-1.0, (-1.0, 0.0)),
])
def test_guidance_weighs_from_ignoring_to_exaggerating(w, expected):
    out = guided(always(3.0, -2.0), always(1.0, -1.0), w)(torch.zeros(1, 1), T1[:1])
    assert (out.x0.item(), out.eps.item()) == expected


@given(w=st.floats(-5, 20), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_guided_predictions_still_explain_x_t(w, seed):
    """x_t = a x_0 + s eps holds for both halves, so it holds for what guidance makes of them."""
    x_t, t = randn(3, 1, 4, 4, seed=seed), torch.tensor([1, 300, 900])
    nets = [from_eps(Says(lambda x, t, k=k: torch.sin(k * x)), S) for k in (1.0, 2.0)]
    x0, eps = guided(*nets, w)(x_t, t)
    assert_close(add_noise(x0, t, eps, S), x_t, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("w", [math.nan, math.inf])
def test_guidance_needs_a_finite_weight(w):
    with pytest.raises(ValueError, match=f"finite number, got w = {w}"):
        guided(shrink, shrink, w)


flips = [lambda x: x.flip(-1), lambda x: x.flip(-2), lambda x: x.transpose(-1, -2)]
quarter = (lambda x: x.rot90(1, (-2, -1)), lambda x: x.rot90(-1, (-2, -1)))


@given(st.integers(1, 9), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_views_of_an_equivariant_denoiser_change_nothing(size, seed):
    x = randn(2, 3, size, size, seed=seed)
    views = [lambda x: x, *flips, quarter]
    assert_close(anagram([shrink] * len(views), views)(x, T1), shrink(x, T1))


def test_an_anagram_is_the_mean_of_what_each_view_wants():
    a, b = randn(1, 1, 4, 4), randn(1, 1, 4, 4, seed=1)
    wants = lambda image: lambda x_t, t: Prediction(image, -image)
    both = anagram([wants(a), wants(b)], [lambda x: x, quarter])(torch.zeros(1, 1, 4, 4).double(), T1[:1])
    assert_close(both.x0, (a + b.rot90(-1, (-2, -1))) / 2)
    assert_close(both.eps, -both.x0)
    one = anagram([wants(b)], [quarter])(torch.zeros(1, 1, 4, 4).double(), T1[:1])
    assert_close(quarter[0](one.x0), b)  # turned, the picture shows what its reader wanted


def test_each_reader_sees_its_own_view():
    x, seen = randn(1, 1, 4, 4), []
    reader = lambda x_t, t: seen.append(x_t) or Prediction(x_t, x_t)
    anagram([reader, reader], [lambda x: x, quarter])(x, T1[:1])
    assert torch.equal(seen[0], x) and torch.equal(seen[1], x.rot90(1, (-2, -1)))


@pytest.mark.parametrize("denoisers,views,says", [
    ([], [], "got 0 and 0"), ([shrink], [], "got 1 and 0"), ([shrink], flips, "got 1 and 3"),
])
def test_an_anagram_needs_a_view_for_each_denoiser(denoisers, views, says):
    with pytest.raises(ValueError, match=says):
        anagram(denoisers, views)


@pytest.mark.parametrize("view", [quarter[0], lambda x: 2 * x, lambda x: x.roll(1, -1)])
def test_a_view_that_its_inverse_does_not_undo_is_refused(view):
    with pytest.raises(ValueError, match=r"views\[1\] is not undone"):
        anagram([shrink, shrink], [lambda x: x, view])(randn(1, 1, 4, 4), T1[:1])


@given(h=st.integers(3, 20), w=st.integers(3, 20), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_a_hybrid_of_one_denoiser_is_that_denoiser(h, w, seed):
    x = randn(2, 3, h, w, seed=seed)
    size = min(h, w) // 2 * 2 - 1
    assert_close(hybrid(shrink, shrink, kernel_size=size, sigma=1.0)(x, T1), shrink(x, T1))


def test_a_hybrid_takes_what_is_seen_from_afar_and_what_is_seen_from_near():
    x = torch.zeros(1, 1, 40, 40)
    checks = (torch.arange(40)[:, None] + torch.arange(40)) % 2 * 2.0 - 1
    far, near = always(0.25, 0.75), lambda x_t, t: Prediction(0.5 + checks.expand_as(x), checks.expand_as(x))
    x0, eps = hybrid(far, near)(x, T1[:1])
    assert_close(x0, 0.25 + checks.expand_as(x), atol=1e-3, rtol=0)  # far's grey, near's chequers
    assert_close(eps, 0.75 + checks.expand_as(x), atol=1e-3, rtol=0)
    swapped = hybrid(near, far)(x, T1[:1])
    assert_close(swapped.x0 + x0, far(x, T1).x0 + near(x, T1).x0)  # no frequency is lost or counted twice


@pytest.mark.parametrize("kernel_size,sigma,says", [
    (32, 2.0, "odd kernel_size .* got 32"),
    (-1, 2.0, "got -1"),
    (5, 0.0, "sigma > 0, got 5, 0.0"),
    (5, math.nan, "nan"),
])
def test_a_blur_that_cannot_be_is_refused(kernel_size, sigma, says):
    with pytest.raises(ValueError, match=says):
        hybrid(shrink, shrink, kernel_size, sigma)


def test_a_blur_wider_than_the_image_is_refused():
    hybrid(shrink, shrink)(torch.zeros(1, 1, 17, 28), T1[:1])
    with pytest.raises(ValueError, match=r"kernel_size 33 is too wide .* \(16, 28\)"):
        hybrid(shrink, shrink)(torch.zeros(1, 1, 16, 28), T1[:1])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("device", DEVICES)
def test_combinations_keep_dtype_and_device(dtype, device):
    if device == "mps" and dtype == torch.float64:
        pytest.skip("mps has no float64")
    x = randn(2, 1, 9, 9, dtype=torch.float32).to(device, dtype)
    for denoise in (clipped(shrink), guided(shrink, shrink, 3.0), anagram([shrink] * 2, [flips[0], quarter]),
                    hybrid(shrink, shrink, 5), from_v(Says(lambda x, t: x), S)):
        for part in denoise(x, T1.to(device)):
            assert part.dtype == dtype and part.device.type == device and part.shape == x.shape


# --- labels ---

@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_labels_are_dropped_at_the_rate_asked_for(p):
    n = 20_000
    label = torch.arange(n) % 10
    kept = drop_labels(label, p, generator())
    gone = kept == -1
    assert abs(gone.double().mean() - p) <= 5 * math.sqrt(p * (1 - p) / n)
    assert torch.equal(kept[~gone], label[~gone]) and kept.dtype == label.dtype
    assert torch.equal(label, torch.arange(n) % 10)  # the caller's labels are left alone
    digits = gone.double().view(-1, 10).mean(0)
    assert (digits - p).abs().max() <= 5 * math.sqrt(p * (1 - p) / (n / 10))  # no digit is favoured


def test_each_image_has_its_own_coin():
    kept = drop_labels(torch.zeros(1000, dtype=torch.long), 0.5, generator())
    assert 0 < (kept == -1).sum() < 1000
    together = ((kept[1:] == -1) == (kept[:-1] == -1)).double().mean()
    assert abs(together - 0.5) < 5 * 0.5 / math.sqrt(999)


@pytest.mark.parametrize("device", DEVICES)
def test_the_generator_alone_decides_who_loses_a_label(device):
    label, before = torch.arange(50), torch.get_rng_state()
    first = drop_labels(label.to(device), 0.5, generator())
    assert first.device.type == device and torch.equal(first.cpu(), drop_labels(label, 0.5, generator()))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("label,p,says", [
    (torch.zeros(3), 0.1, r"integers of shape \(b,\) .*float32 \(3,\)"),
    (torch.zeros(3, 1, dtype=torch.long), 0.1, r"int64 \(3, 1\)"),
    (torch.zeros(3, dtype=torch.uint8), 0.1, "holds -1, got torch.uint8"),
    (torch.zeros(3, dtype=torch.bool), 0.1, "got torch.bool"),
    (torch.zeros(3, dtype=torch.long), 1.1, "probability, got 1.1"),
    (torch.zeros(3, dtype=torch.long), -0.1, "probability, got -0.1"),
    (torch.zeros(3, dtype=torch.long), math.nan, "probability, got nan"),
])
def test_labels_and_rates_that_cannot_be_are_refused(label, p, says):
    with pytest.raises(ValueError, match=says):
        drop_labels(label, p)


def test_a_switch_asks_one_of_two_by_the_time():
    asked = []

    def named(name):
        def denoise(x_t, t):
            asked.append(name)
            return Prediction(x_t, x_t)
        return denoise
    denoise = switched(named("noisy"), named("clean"), at=300)
    for t in (1000, 300, 299, 0):
        denoise(torch.zeros(2, 1, 2, 2), torch.full((2,), t))
    assert asked == ["noisy", "noisy", "clean", "clean"]
    with pytest.raises(ValueError, match=r"one side of t = 300, got times \[299, 300\]"):
        denoise(torch.zeros(2, 1, 2, 2), torch.tensor([299, 300]))
