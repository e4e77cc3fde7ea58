"""Restoring one image: the loop, what it averages, what it goes back to, what was seen, and when to stop."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from support import DEVICES, randn
from torch import nn
from torch.testing import assert_close

from coursekit.dip import WindowedVariance, downsampled, fixed_input, restore
from coursekit.nets import Hourglass


class Constant(nn.Module):
    """Says the same image whatever it is shown; remembers what that was."""

    def __init__(self, shape=(1, 3, 4, 4)):
        super().__init__()
        self.image, self.shown = nn.Parameter(torch.zeros(shape)), []

    def forward(self, z):
        self.shown.append(z.detach().clone())
        return self.image * 1


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


Z = torch.zeros(1, 2, 4, 4)
Y = torch.full((1, 3, 4, 4), 0.5)

# ------------------------------------------------------------------------------------------------ restore


def test_it_learns_what_was_seen_and_nothing_else():
    """With half of the pixels hidden, the seen ones reach y and a hidden one never moves."""
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    *_, end = restore(Constant(), Z, Y * mask, lambda x: x * mask, steps=300, rng=rng())
    assert_close(end.x[..., :2], Y[..., :2], atol=1e-2, rtol=0)
    assert_close(end.x[..., 2:], torch.zeros(1, 3, 4, 2))
    assert end.step == 300 and end.loss < 1e-4


def test_the_loss_is_the_mean_square_over_what_was_seen():
    first = next(restore(Constant(), Z, Y[..., ::2, ::2], lambda x: x[..., ::2, ::2], steps=1))
    assert_close(first.loss, torch.tensor(0.25))


@pytest.mark.parametrize("sigma_p", [0.0, 0.3])
def test_each_step_shows_the_same_input_under_fresh_noise(sigma_p):
    model, z = Constant((1, 3, 32, 32)), fixed_input(2, 32, 32, rng())
    kept = z.clone()
    list(restore(model, z, torch.zeros(1, 3, 32, 32), steps=40, sigma_p=sigma_p, rng=rng(1)))
    noise = torch.stack(model.shown) - z
    assert_close(z, kept)  # the saved input stays
    n = noise.numel()
    assert abs(noise.mean()) <= 5 * sigma_p / n**0.5 and abs(noise.std() - sigma_p) <= 5 * sigma_p / (2 * n) ** 0.5
    if sigma_p:
        assert noise.flatten(1).std(0).min() > 0  # drawn anew, not once


def test_the_average_is_the_exponential_mean_of_what_was_said():
    found = list(restore(Constant(), Z, Y, steps=5, keep=0.8))
    mean = found[0].x
    for it in found[1:]:
        mean = 0.8 * mean + 0.2 * it.x
    assert_close(found[0].average, found[0].x)
    assert_close(found[-1].average, mean)


def test_what_is_yielded_drags_no_graph_along():
    found = list(restore(Constant(), Z, Y, steps=3))
    assert found[0].x.max() == 0 < found[1].x.max() and not any(
        tensor.requires_grad for it in found for tensor in (it.x, it.average, it.loss))


def test_the_same_generator_gives_the_same_restoration_and_another_does_not():
    def end(seed):
        torch.manual_seed(0)
        model = Hourglass(2, channels=(4,))
        *_, it = restore(model, fixed_input(2, 8, 8, rng(1)), torch.full((1, 3, 8, 8), 0.3), steps=4, rng=rng(seed))
        return it.x
    assert torch.equal(end(0), end(0)) and not torch.equal(end(0), end(1))


class Stumbling(nn.Module):
    """Its weight is thrown far away once, between two looks at the loss."""

    def __init__(self):
        super().__init__()
        self.image, self.calls = nn.Parameter(torch.full((1, 1, 2, 2), 0.4)), 0

    def forward(self, z):
        self.calls += 1
        if self.calls == 150:
            with torch.no_grad():
                self.image.fill_(50.0)
        return self.image * 1


def test_a_loss_that_rises_by_5_dB_brings_the_last_good_weights_back():
    model = Stumbling()
    found = list(restore(model, Z, torch.full((1, 1, 2, 2), 0.5), steps=201, lr=1e-3))
    assert found[199].x.mean() > 40  # the step that was looked at
    assert_close(found[200].x, found[99].x, atol=2e-3, rtol=0)  # as after step 100: one step of lr further


class Breaking(nn.Module):
    """Its weight becomes NaN in its n-th call."""

    def __init__(self, n):
        super().__init__()
        self.image, self.calls, self.n = nn.Parameter(torch.full((1, 1, 2, 2), 0.4)), 0, n

    def forward(self, z):
        self.calls += 1
        if self.calls == self.n:
            with torch.no_grad():
                self.image.fill_(math.nan)
        return self.image * 1


def test_a_loss_that_is_no_number_is_undone_too_or_said():
    found = list(restore(Breaking(150), Z, torch.full((1, 1, 2, 2), 0.5), steps=202, lr=1e-3))
    assert found[198].loss.isnan() and found[200].x.isfinite().all()
    with pytest.raises(FloatingPointError, match="nan in the first 100 steps"):
        list(restore(Breaking(50), Z, torch.full((1, 1, 2, 2), 0.5), steps=202, lr=1e-3))


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"lr": 0.0}, {"sigma_p": -1.0}, {"sigma_p": math.nan}, {"keep": 1.0}])
def test_settings_that_cannot_be_right_are_refused(wrong):
    with pytest.raises(ValueError, match="steps >= 1"):
        next(restore(Constant(), Z, Y, **{"steps": 3} | wrong))


def test_a_target_of_another_shape_is_refused_and_not_broadcast():
    with pytest.raises(ValueError, match=r"y has shape \(1, 3, 1, 1\), but seen\(x\) has \(1, 3, 4, 4\)"):
        next(restore(Constant(), Z, Y[..., :1, :1], steps=3))


@pytest.mark.parametrize("device", DEVICES)
def test_an_hourglass_learns_a_smooth_image_before_noise(device):
    """The prior itself: from the same start, the same steps explain more of a smooth image than of noise."""
    ramp = torch.linspace(0.2, 0.8, 32).view(1, 1, 1, -1).expand(1, 3, 32, 32).to(device)
    noise = (0.5 + ramp.std() * torch.randn(ramp.shape, generator=rng())).clamp(0, 1).to(device)
    explained = {}
    for name, y in {"ramp": ramp, "noise": noise}.items():
        torch.manual_seed(0)
        model = Hourglass(8, channels=(16, 16, 16)).to(device)
        *_, end = restore(model, fixed_input(8, 32, 32, rng()).to(device), y, steps=60, rng=rng(1))
        explained[name] = (1 - end.loss / y.var()).item()
    assert explained["ramp"] > 0.9 and explained["noise"] < 0.6


# ------------------------------------------------------------------------------------------- fixed inputs


def test_inputs_are_uniform_noise_up_to_a_tenth_or_coordinates():
    z = fixed_input(32, 64, 48, rng())
    assert z.shape == (1, 32, 64, 48) and z.min() >= 0 and z.max() <= 0.1
    assert abs(z.mean() - 0.05) < 5 * 0.1 / (12 * z.numel()) ** 0.5
    assert torch.equal(z, fixed_input(32, 64, 48, rng())) and not torch.equal(z, fixed_input(32, 64, 48, rng(1)))
    grid = fixed_input(2, 3, 5, kind="meshgrid")
    assert_close(grid[0, 0], torch.linspace(0, 1, 5).expand(3, 5))
    assert_close(grid[0, 1], torch.linspace(0, 1, 3)[:, None].expand(3, 5))


def test_inputs_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="'noises'"):
        fixed_input(2, 4, 4, kind="noises")
    with pytest.raises(ValueError, match="two channels"):
        fixed_input(3, 4, 4, kind="meshgrid")


# ------------------------------------------------------------------------------------------ downsampling


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_a_constant_stays_and_a_ramp_keeps_its_place(factor):
    n = 12 * factor
    assert_close(downsampled(torch.full((1, 2, n, n), 0.7), factor), torch.full((1, 2, 12, 12), 0.7))
    ramp = (torch.arange(n) + 0.5) / factor  # in the units of the small image
    small = downsampled(ramp.expand(1, 1, n, n).double(), factor)[0, 0]
    assert_close(small[6, 3:-3], torch.arange(12.0).double()[3:-3] + 0.5)
    assert_close(downsampled(ramp.view(-1, 1).expand(1, 1, n, n).double(), factor)[0, 0], small.T)


def test_it_is_lanczos_of_two_lobes():
    """A single white pixel shows the kernel: sinc(d) sinc(d / 2) at distance d from the new pixel's centre."""
    x = torch.zeros(1, 1, 32, 32, dtype=torch.float64)
    x[0, 0, 17, 17] = 1
    small = downsampled(x, 4)[0, 0]
    d = torch.arange(8) + 0.5 - 17.5 / 4
    row = torch.where(d.abs() < 2, torch.sinc(d) * torch.sinc(d / 2), 0.0).double()
    assert_close(small / small.sum(), torch.outer(row, row) / row.sum() ** 2)


def test_it_agrees_with_pillow_on_a_smooth_picture():
    """Pillow's Lanczos has three lobes: on slow waves both keep the wave."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    wave = 0.5 + 0.3 * torch.sin(2 * math.pi * x / 32) * torch.cos(2 * math.pi * y / 40)
    theirs = torch.from_numpy(np.array(Image.fromarray(wave.numpy()).resize((16, 16), Image.Resampling.LANCZOS)))
    ours = downsampled(wave[None, None], 4)[0, 0]
    assert (ours - theirs)[2:-2, 2:-2].abs().max() < 0.01


def test_a_gradient_comes_back_through_it():
    x = randn(1, 2, 8, 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: downsampled(x, 2), (x,))


@pytest.mark.parametrize("factor, shape", [(1, (1, 3, 8, 8)), (3, (1, 3, 8, 9)), (4, (1, 3, 8, 10))])
def test_factors_that_do_not_divide_are_refused(factor, shape):
    with pytest.raises(ValueError, match="divides height and width"):
        downsampled(torch.zeros(shape), factor)


# ---------------------------------------------------------------------------------------------- stopping


def test_the_variance_is_that_of_the_last_window():
    outputs = randn(12, 1, 3, 2, 2).float() + 5
    watch = WindowedVariance(window=4, patience=100)
    for x in outputs:
        watch.update(x)
    assert all(math.isnan(v) for v in watch.variances[:3])
    wanted = [outputs[i - 4:i].double().var(0, correction=0).mean().item() for i in range(4, 13)]
    assert_close(torch.tensor(watch.variances[3:]), torch.tensor(wanted))


def test_it_says_stop_after_its_patience_and_keeps_the_quietest_output():
    """Outputs that come to rest at step 30 and then drift away ever faster."""
    path = [0.1 * max(0.0, 30 - i) ** 2 + 0.02 * max(0, i - 30) ** 2 for i in range(1, 101)]
    watch, stopped = WindowedVariance(window=5, patience=20), 0
    for step, place in enumerate(path, 1):
        if watch.update(torch.full((1, 1, 2, 2), place)):
            stopped = step
            break
    quietest = min(range(5, stopped + 1), key=lambda i: torch.tensor(path[i - 5:i]).var().item())
    assert watch.best_step == quietest and 30 <= quietest <= 35 and stopped == quietest + 20
    assert watch.best.mean() == pytest.approx(path[quietest - 1])


def test_a_plateau_never_reached_never_stops_before_the_window_is_full():
    watch = WindowedVariance(window=50, patience=1)
    assert not any(watch.update(randn(1, 1, 2, 2, seed=i)) for i in range(50))
    assert watch.best_step == 50


@pytest.mark.parametrize("wrong", [{"window": 1}, {"patience": 0}])
def test_windows_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match="window of at least 2"):
        WindowedVariance(**wrong)


@pytest.mark.parametrize("wrong", [torch.full((1, 1, 2, 2), math.nan), torch.zeros(1, 1, 1, 1)])
def test_outputs_that_cannot_be_compared_are_refused_and_not_taken_for_the_best(wrong):
    watch = WindowedVariance(window=3)
    for i in range(5):
        watch.update(randn(1, 1, 2, 2, seed=i))
    best = watch.best.clone()
    with pytest.raises(ValueError, match="finite and of one shape"):
        watch.update(wrong)
    assert torch.equal(watch.best, best) and len(watch.variances) == 5


def test_one_step_that_is_not_finite_does_not_end_a_restoration():
    calls = iter(range(10_000))

    def seen(x):
        return x * float("nan") if next(calls) == 149 else x

    y = torch.full((1, 3, 4, 4), 0.5)
    *_, end = restore(Constant(), torch.zeros(1, 1, 4, 4), y, seen, steps=600, rng=rng())
    assert end.loss < 1e-4 and end.average.isfinite().all()
