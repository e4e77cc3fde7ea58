"""Few bits: grids, scales and gradients against arithmetic, integers against what pretends to be them."""

from __future__ import annotations

import copy

import pytest
import support
import torch
from support import DEVICES, generator, randn
from torch import Tensor, nn
from torch.testing import assert_close

from coursekit.nets.filtering import apply_kernels
from coursekit.nets.kpn import KPN
from coursekit.quantization import (
    MOST,
    Int8Weight,
    calibrate,
    fake_quantized,
    filter_int8,
    on_grid,
    quantized,
    snr,
    stored_bytes,
    to_integers,
)

SMALL = {"width": 32, "depth": 1, "bottleneck": 8, "ups": (8, 8, 8), "drift_width": 4, "size": 16}
ONLY_KERNELS = {"weights": None, "activations": None}


def awake(**changes) -> KPN:
    return support.awake(**SMALL | changes)


def noisy(n: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    return randn(n, 3, 16, 16, seed=seed, dtype=torch.float32), torch.linspace(0, 1, n)


def ready(net: KPN, **how) -> KPN:
    few = quantized(net, **how)
    calibrate(few, [noisy(8, seed) for seed in (1, 2, 3)])
    return few


# ---------------------------------------------------------------- grids


@pytest.mark.parametrize("device", DEVICES)
def test_a_fake_is_the_nearest_multiple_that_the_integer_can_hold(device):
    x = torch.tensor([-100, -2.0, -0.75, -0.3, 0, 0.2, 0.25, 0.3, 0.75, 100], device=device)
    wanted = torch.tensor([-64, -2.0, -1.0, -0.5, 0, 0, 0, 0.5, 1.0, 63.5], device=device)  # halves to the even n
    assert torch.equal(fake_quantized(x, 0.5), wanted)
    assert torch.equal(fake_quantized(x, 0.5, most=1), wanted.clamp(-1, 0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_what_lies_on_the_grid_stays(dtype):
    x = randn(2000, dtype=torch.float64).to(dtype)
    once = fake_quantized(x, 1 / 32)
    assert once.dtype == dtype and torch.equal(fake_quantized(once, 1 / 32), once)
    assert torch.equal(once * 32, (once * 32).round())


def test_the_gradient_passes_straight_through_and_ends_where_the_reach_does():
    x = torch.tensor([-1.3, -1.284, -0.2, 0.404, 1.274, 1.3], requires_grad=True)  # -128 to 127 steps of 0.01
    fake_quantized(x, 0.01).backward(torch.arange(1.0, 7.0))
    assert_close(x.grad, torch.tensor([0, 2.0, 3.0, 4.0, 5.0, 0]))


def test_the_largest_weight_of_a_channel_learns_too():
    """It lies at the very end of the grid, where a clamp and float rounding may cut its gradient off."""
    weight = randn(500, 7, dtype=torch.float32).requires_grad_()
    Int8Weight(0)(weight).sum().backward()
    assert_close(weight.grad, torch.ones_like(weight))


@pytest.mark.parametrize("grid", MOST)
def test_kernels_lie_on_the_fixed_grid(grid):
    kernels = torch.tanh(3 * randn(4000, dtype=torch.float32)).requires_grad_()
    most, rounded = MOST[grid], on_grid(kernels, grid)
    integers = (rounded * most).round()
    assert torch.equal(rounded, integers / most)
    assert sorted(integers.unique().tolist()) == list(range(-most, most + 1))
    assert (rounded - kernels).abs().max() <= 0.5 / most + 1e-6
    assert_close(torch.autograd.grad(rounded.sum(), kernels)[0], torch.ones_like(kernels))


def test_fp8_keeps_four_binary_digits_whatever_the_size():
    kernels = torch.tensor([1.0, 1.0625, 1.1, 0.3, 0.0175, 0.0009], requires_grad=True)
    rounded = on_grid(kernels, "fp8")
    assert rounded.tolist() == [1.0, 1.0, 1.125, 0.3125, 0.017578125, 0.0]  # a tie; 2 ** -9 is the smallest step
    assert_close(torch.autograd.grad(rounded.sum(), kernels)[0], torch.ones_like(kernels))


def test_each_bit_of_a_kernel_is_worth_six_decibels():
    """Two bits are a grid four times as fine: 12 dB. fp8's three bits of mantissa are no match for int8."""
    image, kernels = randn(4, 3, 16, 16, dtype=torch.float32), torch.tanh(randn(4, 25, 16, 16, seed=1).float())
    exact = apply_kernels(image, kernels)
    db = {grid: snr(exact, apply_kernels(image, on_grid(kernels, grid))).mean() for grid in (*MOST, "fp8")}
    assert abs(db["int8"] - db["int6"] - 12) < 1.5 and abs(db["int6"] - db["int4"] - 12) < 1.5
    assert db["int4"] < db["fp8"] < db["int8"] - 6


def test_uniform_rounding_noise_has_the_variance_that_textbooks_give_it():
    """A step q adds noise of variance q^2 / 12, so kernels of variance v have an SNR of 12 v / q^2."""
    kernels = 2 * torch.rand(4, 10_000, generator=generator()) - 1
    wanted = 10 * torch.log10(torch.tensor(12 / 3 * 127**2))
    assert_close(snr(kernels, on_grid(kernels, "int8")).mean(), wanted, atol=0.1, rtol=0)


# ---------------------------------------------------------------- networks


def test_each_output_channel_has_the_scale_of_its_largest_weight():
    few, net = quantized(awake()), awake()
    layers = {name: layer for name, layer in net.named_modules()
              if isinstance(layer, nn.Conv2d | nn.Linear | nn.ConvTranspose2d)
              and name.split(".")[0] not in ("drift", "time")}
    assert any(isinstance(layer, nn.ConvTranspose2d) for layer in layers.values())
    for name, layer in layers.items():
        axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
        exact, rounded = (f.get_submodule(name).weight.detach().movedim(axis, 0).flatten(1) for f in (net, few))
        step = exact.abs().amax(1, keepdim=True) / 127
        assert_close(rounded / step, (rounded / step).round(), atol=1e-3, rtol=0)
        assert_close(rounded.abs().amax(1), exact.abs().amax(1))  # the largest weight of each channel is kept
        assert ((rounded - exact).abs() <= 0.501 * step).all() and not torch.equal(rounded, exact)


def test_a_channel_of_zeros_stays_zero():
    weight = torch.tensor([[0.0, 0.0], [1.0, -0.3]])
    assert_close(Int8Weight(0)(weight), torch.tensor([[0, 0], [1, -38 / 127]]))


def test_the_original_is_left_alone():
    net = awake()
    before = copy.deepcopy(net.state_dict())
    few = ready(net)
    few(*noisy()).sum().backward()
    assert before.keys() == net.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters()) and not hasattr(net.heads[0], "grid")


def test_the_drift_is_the_same_to_the_last_bit_unless_it_is_asked_for():
    net, (x_t, t) = awake(), noisy()
    with torch.no_grad():
        exact, kept, rounded = (f.parts(x_t, t) for f in (net, ready(net), ready(net, drift="int8")))
    assert torch.equal(kept.drift, exact.drift) and not torch.equal(kept.filtered, exact.filtered)
    assert 20 < snr(exact.drift, rounded.drift).min() < 80


@pytest.mark.parametrize("activation", ["tanh", "softmax"])
@pytest.mark.parametrize("shared_rgb", [True, False])
def test_a_network_filters_with_the_kernels_of_its_grid(activation, shared_rgb):
    net, (x_t, t) = awake(activation=activation, shared_rgb=shared_rgb), noisy()
    few = quantized(net, kernels="int4", **ONLY_KERNELS)  # nothing to calibrate
    for ours, exact in zip(few.parts(x_t, t).kernels, net.parts(x_t, t).kernels, strict=True):
        assert torch.equal(ours, on_grid(exact, "int4"))


def test_nothing_asked_nothing_changed():
    net = awake()
    assert torch.equal(quantized(net, kernels=None, **ONLY_KERNELS)(*noisy()), net(*noisy()))


def test_more_is_lost_the_more_is_rounded():
    net, (x_t, t) = awake(), noisy()
    with torch.no_grad():
        exact = net(x_t, t)
        kernels, all_but_drift, weights = (snr(exact, f(x_t, t)).mean() for f in (
            quantized(net, **ONLY_KERNELS), ready(net), quantized(net, activations=None, kernels=None)))
    assert 20 < all_but_drift < min(kernels, weights) < 80


def test_one_image_is_filtered_as_among_others():
    few, (x_t, t) = ready(awake()), noisy()
    assert snr(few(x_t, t)[1:2], few(x_t[1:2], t[1:2])) > 30  # the sums of a batch of one may round otherwise


def test_a_quantised_network_can_be_trained_on():
    """Gradients reach every weight through the rounding, and the loss against the exact network falls."""
    net = awake()
    few, (x_t, t) = ready(net, kernels="int4", drift="int8"), noisy(8)
    wanted = net(x_t, t).detach()
    optimizer = torch.optim.Adam(few.parameters(), lr=1e-3)
    losses = []
    for _ in range(25):
        loss = (few(x_t, t) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in few.parameters())
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])


# ---------------------------------------------------------------- calibration


def test_an_uncalibrated_network_refuses_to_work():
    few = quantized(awake())
    with pytest.raises(ValueError, match="calibrate"):
        few(*noisy())
    calibrate(few, [noisy()])
    few(*noisy())


def test_a_range_is_the_moving_average_of_what_passed():
    few = quantized(awake())
    batches = [(scale * torch.ones(2, 3, 16, 16), torch.ones(2)) for scale in (1.0, 2.0, 4.0)]
    first = few.transformer.embed[1].entering  # sees the image itself, patch by patch
    for rate, wanted in ((1.0, 4.0), (0.5, 0.5 * 1.5 + 2), (0.1, 0.9 * 1.1 + 0.4)):
        calibrate(few, batches, rate)  # anew each time
        assert_close(first.top, torch.tensor(wanted))
    few(10 * batches[0][0], batches[0][1])
    assert_close(first.top, torch.tensor(0.9 * 1.1 + 0.4))  # use teaches nothing


def test_activations_pass_unrounded_while_their_ranges_are_learned():
    net, seen = awake(), []
    few = quantized(net, weights=None, kernels=None)
    few.register_forward_hook(lambda module, args, out: seen.append(out))
    calibrate(few, [noisy()])
    few(*noisy())
    assert torch.equal(seen[0], net(*noisy())) and not torch.equal(seen[1], seen[0])


def test_ranges_travel_with_the_state():
    net = awake()
    few, other = ready(net), quantized(net)
    other.load_state_dict(few.state_dict())
    assert torch.equal(other(*noisy()), few(*noisy()))


@pytest.mark.parametrize("net, batches, rate", [
    (quantized(awake()), [], 0.1), (quantized(awake(), activations=None), [noisy()], 0.1), (awake(), [noisy()], 0.1),
    (quantized(awake()), [noisy()], 0.0), (quantized(awake()), [noisy()], 1.5)])
def test_calibration_needs_ranges_batches_and_a_rate(net, batches, rate):
    with pytest.raises(ValueError, match="to calibrate takes"):
        calibrate(net, batches, rate)


def test_a_broken_calibration_leaves_no_network_learning():
    few = ready(awake())
    with pytest.raises(ValueError, match="stride"):
        calibrate(few, [(torch.zeros(1, 3, 15, 16), torch.zeros(1))])
    with pytest.raises(ValueError, match="calibrate"):
        few(*noisy())


# ---------------------------------------------------------------- integers


@pytest.mark.parametrize("device", DEVICES)
def test_the_integer_filter_is_exact(device):
    x, kernels = (torch.randint(-128, 128, shape, generator=generator(), dtype=torch.int8)
                  for shape in ((2, 3, 7, 5), (2, 25, 7, 5)))
    x[0], kernels[0] = -128, -128  # the largest sum there is
    wanted = apply_kernels(x.double(), kernels.double())
    out = filter_int8(x.to(device), kernels.to(device)).cpu()
    assert out.dtype == torch.int32 and torch.equal(out.double(), wanted)
    assert out.max() == 25 * 2**14


@pytest.mark.parametrize("n", [1, 3])
def test_real_integers_filter_as_the_fakes_pretend(n):
    image, kernels = 2 * randn(n, 3, 16, 16).float(), torch.tanh(randn(n, 25, 16, 16, seed=1)).float()
    scale = image.abs().max() / 127
    real = filter_int8(to_integers(image, scale), to_integers(kernels, 1 / 127)) * (scale / 127)
    assert_close(real, apply_kernels(fake_quantized(image, scale), on_grid(kernels, "int8")), atol=1e-5, rtol=0)


@pytest.mark.parametrize("x, kernels", [
    (torch.zeros(1, 3, 4, 4), torch.zeros(1, 25, 4, 4, dtype=torch.int8)),
    (torch.zeros(1, 3, 4, 4, dtype=torch.int8), torch.zeros(1, 25, 4, 4)),
    (torch.zeros(1, 3, 4, 4, dtype=torch.int8), torch.zeros(1, 25, 4, 5, dtype=torch.int8)),
    (torch.zeros(3, 4, 4, dtype=torch.int8), torch.zeros(1, 25, 4, 4, dtype=torch.int8)),
    (torch.zeros(0, 3, 4, 4, dtype=torch.int8), torch.zeros(0, 25, 4, 4, dtype=torch.int8))])
def test_the_integer_filter_takes_int8_of_shapes_that_belong_together(x, kernels):
    with pytest.raises(ValueError, match="int8 images"):
        filter_int8(x, kernels)


def test_integers_end_where_eight_bits_do():
    assert to_integers(torch.tensor([-9.0, -0.5, 0.5, 1.5, 9.0]), 1.0).tolist() == [-9, 0, 0, 2, 9]
    assert to_integers(torch.tensor([-900.0, 900.0]), 1.0).tolist() == [-128, 127]


def test_bytes_are_counted_as_a_file_would_hold_them():
    net = awake()
    assert stored_bytes(net) == 4 * sum(p.numel() for p in net.parameters())
    few = quantized(net, activations=None, kernels=None)
    saved = sum(3 * layer.weight.numel() - 4 * layer.weight.shape[isinstance(layer, nn.ConvTranspose2d)]
                for name, layer in net.named_modules() if name.split(".")[0] not in ("drift", "time")
                and isinstance(layer, nn.Conv2d | nn.Linear | nn.ConvTranspose2d))
    assert stored_bytes(few) == stored_bytes(net) - saved
    large = KPN(width=256, depth=1, bottleneck=64, size=16)
    assert stored_bytes(quantized(large, drift="int8")) < 0.28 * stored_bytes(large)


def test_snr_counts_in_decibels_for_each_image():
    x = torch.ones(3, 1, 2, 2)
    assert_close(snr(x, x + torch.tensor([0.1, 1.0, 0.0]).view(3, 1, 1, 1)), torch.tensor([20, 0, torch.inf]),
                 atol=1e-4, rtol=0)
    for a, b in ((x, x[:1]), (torch.ones(3), torch.ones(3))):
        with pytest.raises(ValueError, match="one shape"):
            snr(a, b)


@pytest.mark.parametrize("net, how, says", [
    (awake(), {"kernels": "int5"}, r"kernels must be one of \['int8', 'int6', 'int4', 'fp8'\] or None, got 'int5'"),
    (awake(), {"weights": "fp8"}, "weights must be one of"),
    (awake(), {"activations": "int4"}, "activations must be one of"),
    (awake(), {"drift": "float"}, "drift must be one of"),
    (nn.Conv2d(3, 3, 1), {}, "only a KPN that filters.*got a Conv2d"),
    (awake(branches="drift"), {}, "only a KPN that filters.*branches='drift'"),
    (awake(activation="linear"), {}, "no bounds"),
    (quantized(awake()), {}, "quantised already"),
    (quantized(awake(), kernels="fp8", **ONLY_KERNELS), {}, "quantised already"),
])
def test_what_cannot_be_quantised_is_refused(net, how, says):
    with pytest.raises(ValueError, match=says):
        quantized(net, **how)


def test_black_is_black_and_grids_have_names():
    assert snr(torch.zeros(2, 3), torch.zeros(2, 3)).isposinf().all()
    with pytest.raises(ValueError, match="'int5'"):
        on_grid(torch.zeros(1), "int5")
