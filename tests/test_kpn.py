"""The kernel-predicting network: its filters against brute force, its promises against the model."""

from __future__ import annotations

import math
from functools import partial

import pytest
import support
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from coursekit.nets.filtering import apply_kernels, gaussian_upsample
from coursekit.nets.kpn import KEPT, KPN, Level, pyramid
from coursekit.schedules import StraightPath
from coursekit.straight import logit_normal_times, velocity_from_x0_loss

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SMALL = {"width": 64, "depth": 2, "bottleneck": 16, "ups": (16, 16, 16), "drift_width": 8, "size": 32}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=rng(seed), dtype=dtype)


def identity_kernels(b: int, h: int, w: int) -> Tensor:
    kernels = torch.zeros(b, 25, h, w)
    kernels[:, 12] = 1
    return kernels


def awake(**changes) -> KPN:
    return support.awake(**SMALL | changes).train()


# ---------------------------------------------------------------- apply_kernels


def by_unfold(x: Tensor, kernels: Tensor) -> Tensor:
    b, c, h, w = x.shape
    patches = F.unfold(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5).view(b, c, 25, h, w)
    return (patches * kernels[:, None]).sum(2)


@pytest.mark.parametrize("shape", [(2, 3, 8, 6), (1, 1, 1, 1), (2, 2, 3, 2)])
@pytest.mark.parametrize("device", DEVICES)
def test_apply_kernels_is_the_unfold_formulation_forward_and_backward(shape, device):
    b, _, h, w = shape
    x = randn(*shape, dtype=torch.float64).to(device).requires_grad_()
    kernels = randn(b, 25, h, w, seed=1, dtype=torch.float64).to(device).requires_grad_()
    upstream = randn(*shape, seed=2, dtype=torch.float64).to(device)
    ours, theirs = apply_kernels(x, kernels), by_unfold(x, kernels)
    assert_close(ours, theirs)
    for a, b_ in zip(torch.autograd.grad(ours, (x, kernels), upstream),
                     torch.autograd.grad(theirs, (x, kernels), upstream), strict=True):
        assert_close(a, b_)


def test_apply_kernels_passes_gradcheck_at_sizes_where_the_border_is_everywhere():
    for h, w in ((1, 1), (2, 3), (5, 4)):
        x = randn(2, 2, h, w, dtype=torch.float64).requires_grad_()
        kernels = randn(2, 25, h, w, seed=1, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(apply_kernels, (x, kernels))


def test_a_tap_gathers_from_the_pixel_it_names():
    """Tap 0 looks up and left, so a dot moves down and right; at the border the nearest pixel repeats."""
    x = torch.zeros(1, 1, 7, 7)
    x[..., 3, 3] = 1
    kernels = torch.zeros(1, 25, 7, 7)
    kernels[:, 0] = 1
    assert apply_kernels(x, kernels).nonzero().tolist() == [[0, 0, 5, 5]]
    ramp = torch.arange(7.0).expand(1, 1, 7, 7)
    left = torch.zeros(1, 25, 7, 7)
    left[:, 10] = 1  # two to the left
    assert apply_kernels(ramp, left)[0, 0, 0].tolist() == [0, 0, 0, 1, 2, 3, 4]


def test_identity_kernels_return_the_image_exactly_and_the_image_needs_no_gradient():
    x = randn(2, 3, 6, 6)
    kernels = identity_kernels(2, 6, 6).requires_grad_()
    out = apply_kernels(x, kernels)
    assert torch.equal(out, x)
    out.sum().backward()
    assert kernels.grad is not None and x.grad is None


def test_apply_kernels_takes_any_memory_format():
    x, kernels = randn(2, 3, 8, 8), randn(2, 25, 8, 8, seed=1)
    other = [y.to(memory_format=torch.channels_last).requires_grad_() for y in (x, kernels)]
    plain = [y.clone().requires_grad_() for y in (x, kernels)]
    for pair in (other, plain):
        apply_kernels(*pair).square().sum().backward()
    for a, b in zip(other, plain, strict=True):
        assert_close(a.grad, b.grad)


@pytest.mark.parametrize("device", DEVICES)
def test_the_wider_dtype_wins_and_autocast_changes_nothing(device):
    x, kernels = randn(2, 3, 8, 8).to(device), randn(2, 25, 8, 8, seed=1).to(device).requires_grad_()
    half = x.bfloat16()
    assert apply_kernels(half, kernels).dtype == torch.float32
    assert apply_kernels(half, kernels.bfloat16()).dtype == torch.bfloat16
    wanted = torch.autograd.grad(apply_kernels(x, kernels).square().sum(), kernels)[0]
    with torch.autocast(device, torch.bfloat16):
        out = apply_kernels(x, kernels)
        assert torch.equal(out, apply_kernels(x, kernels))
        got = torch.autograd.grad(out.square().sum(), kernels)[0]
    assert out.dtype == torch.float32
    assert_close(got, wanted)


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_filtering_is_the_same_filtering(device):
    """The compiler is given the plain sum instead; one graph, equal values and gradients."""
    x = randn(2, 3, 6, 8).to(device).requires_grad_()
    kernels = randn(2, 25, 6, 8, seed=1).to(device).requires_grad_()
    compiled = torch.compile(apply_kernels, backend="inductor" if device == "cuda" else "aot_eager",
                             fullgraph=True)
    upstream = randn(2, 3, 6, 8, seed=2).to(device)
    a, b = apply_kernels(x, kernels), compiled(x, kernels)
    assert_close(a, b)
    for ours, theirs in zip(torch.autograd.grad(a, (x, kernels), upstream),
                            torch.autograd.grad(b, (x, kernels), upstream), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("shapes", [((2, 3, 8, 8), (2, 24, 8, 8)), ((2, 3, 8, 8), (1, 25, 8, 8)),
                                    ((3, 8, 8), (1, 25, 8, 8)), ((2, 3, 8, 8), (2, 25, 8, 4)),
                                    ((0, 3, 8, 8), (0, 25, 8, 8))])
def test_shapes_that_do_not_belong_together_are_refused(shapes):
    with pytest.raises(ValueError, match="kernels"):
        apply_kernels(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


# ------------------------------------------------------------ gaussian_upsample


def gaussian_by_hand(x: Tensor, shape: Tensor) -> Tensor:
    """Pixel by pixel: the distance from the new pixel's centre to 25 old ones, exp(-2 d' L d), mean."""
    b, c, h, w = x.shape
    out = torch.zeros(b, c, 2 * h, 2 * w, dtype=x.dtype)
    for n in range(b):
        for i in range(2 * h):
            for j in range(2 * w):
                kx, ky, r = shape[n, :, i, j].tolist()
                precision = torch.tensor([[kx * kx, r * kx * ky], [r * kx * ky, ky * ky]], dtype=x.dtype)
                total, weight_sum = torch.zeros(c, dtype=x.dtype), 0.0
                for y in range(i // 2 - 2, i // 2 + 3):
                    for z in range(j // 2 - 2, j // 2 + 3):
                        # Centres: new pixel j at (j + 0.5) / 2, old pixel z at z + 0.5.
                        d = torch.tensor([(j + 0.5) / 2 - z - 0.5, (i + 0.5) / 2 - y - 0.5], dtype=x.dtype)
                        weight = math.exp(-2 * float(d @ precision @ d))
                        total += weight * x[n, :, min(max(y, 0), h - 1), min(max(z, 0), w - 1)]
                        weight_sum += weight
                out[n, :, i, j] = total / weight_sum
    return out


def random_shapes(b: int, h: int, w: int, dtype: torch.dtype = torch.float32) -> Tensor:
    kx_ky = 4 * torch.sigmoid(2 * randn(b, 2, h, w, seed=3, dtype=dtype))
    return torch.cat([kx_ky, 0.95 * torch.tanh(2 * randn(b, 1, h, w, seed=4, dtype=dtype))], 1)


def test_gaussian_upsampling_is_the_25_tap_mean_by_hand():
    x, shape = randn(2, 2, 3, 4, dtype=torch.float64), random_shapes(2, 6, 8, torch.float64)
    assert_close(gaussian_upsample(x, shape), gaussian_by_hand(x, shape))


def test_gaussian_upsampling_passes_gradcheck():
    x = randn(1, 2, 2, 3, dtype=torch.float64).requires_grad_()
    shape = random_shapes(1, 4, 6, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(gaussian_upsample, (x, shape))


def test_gaussian_upsampling_keeps_a_constant_and_stays_between_the_neighbours():
    shape = random_shapes(2, 16, 16)
    assert_close(gaussian_upsample(torch.full((2, 3, 8, 8), 0.3), shape), torch.full((2, 3, 16, 16), 0.3))
    x = torch.rand(2, 3, 8, 8, generator=rng())
    out = gaussian_upsample(x, shape)
    assert out.min() >= x.min() - 1e-6 and out.max() <= x.max() + 1e-6


def test_a_round_gaussian_treats_rows_and_columns_and_both_directions_alike():
    x = randn(1, 1, 6, 6)
    round_ = torch.tensor([1.3, 1.3, 0.0]).view(1, 3, 1, 1).expand(1, 3, 12, 12)
    out = gaussian_upsample(x, round_)
    assert_close(gaussian_upsample(x.mT, round_), out.mT)
    assert_close(gaussian_upsample(x.flip(2), round_), out.flip(2))
    assert_close(gaussian_upsample(x.flip(3), round_), out.flip(3))
    wide = torch.tensor([0.2, 3.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 12, 12)  # blunt in x, sharp in y
    blurred = gaussian_upsample(x, wide)
    assert blurred.diff(dim=3).square().mean() < 0.1 * blurred.diff(dim=2).square().mean()


def test_upsampling_refuses_shapes_at_the_wrong_size():
    with pytest.raises(ValueError, match="2h, 2w"):
        gaussian_upsample(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4))


# ---------------------------------------------------------------------- network


@pytest.mark.parametrize(("name", "exact", "stated"), [
    ("tiny", 916_782, 0.92e6), ("small", 5_651_882, 5.63e6), ("gpu", 40_739_306, 40.9e6)])
def test_presets_have_their_parameter_counts(name, exact, stated):
    with torch.device("meta"):
        net = KPN.preset(name)
    count = sum(p.numel() for p in net.parameters())
    assert count == exact
    assert abs(count / stated - 1) < 0.03


def test_a_new_network_dims_its_input_and_adds_nothing():
    """Every kernel starts as 0.905 of the identity, whatever its activation; the drift starts at zero."""
    x, t = randn(2, 3, 32, 32), torch.tensor([0.1, 0.9])
    for activation in ("tanh", "linear", "softmax"):
        filtered, drift, kernels = KPN(**SMALL, activation=activation).parts(x, t)
        assert torch.equal(drift, torch.zeros_like(x))
        assert [tuple(k.shape) for k in kernels] == [(2, 25, 32, 32), (2, 25, 16, 16), (2, 25, 8, 8)]
        for k in kernels:
            assert_close(k[:, 12], torch.full_like(k[:, 12], KEPT))
        assert_close(torch.corrcoef(torch.stack([filtered.flatten(), x.flatten()]))[0, 1].item(), 1.0,
                     atol=0.1, rtol=0)


@pytest.mark.parametrize("changes", [
    {}, {"activation": "softmax"}, {"activation": "linear"}, {"branches": "filters"}, {"branches": "drift"},
    {"constant_tap": "all"}, {"constant_tap": "coarsest"}, {"levels": 1}, {"levels": 4},
    {"shared_rgb": False}, {"shared_rgb": False, "activation": "softmax"}, {"drift_time": False},
    {"in_channels": 1}])
def test_every_variant_is_rebuilt_by_its_config_and_trains_all_its_parameters(changes):
    net = awake(**changes)
    again = KPN(**net.config)
    again.load_state_dict(net.state_dict())
    x = randn(2, net.config["in_channels"], 32, 32)
    t = torch.tensor([0.2, 0.8])
    out = net(x, t)
    assert out.shape == x.shape and torch.equal(out, again(x, t))
    filtered, drift, kernels = net.parts(x, t)
    assert torch.equal(filtered + drift, out)
    assert len(kernels) == (0 if changes.get("branches") == "drift" else net.config["levels"])
    out.square().mean().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_kernel_activations_keep_their_range():
    x, t = randn(2, 3, 32, 32), torch.tensor([0.2, 0.8])
    tanh, linear, softmax = (
        awake(activation=name).parts(x, t).kernels[0] for name in ("tanh", "linear", "softmax"))
    assert tanh.abs().max() <= 1 and tanh.min() < 0
    assert_close(linear.tanh()[:, 0], tanh[:, 0])  # equal weights, so only the activation differs
    assert softmax.min() >= 0
    assert_close(softmax.sum(1), torch.ones(2, 32, 32))


def test_convex_filters_alone_make_no_new_colour_and_tanh_does():
    x, t = 0.3 + 0.01 * randn(2, 3, 32, 32), torch.tensor([0.2, 0.8])
    convex = awake(activation="softmax", branches="filters")(x, t)
    assert convex.min() >= x.min() - 1e-5 and convex.max() <= x.max() + 1e-5
    free = awake(branches="filters")(x, t)
    assert free.max() > x.max() + 0.1 or free.min() < x.min() - 0.1


def test_one_branch_alone_leaves_the_other_silent_and_unbuilt():
    x, t = randn(2, 3, 32, 32), torch.tensor([0.2, 0.8])
    drift, filters = awake(branches="drift"), awake(branches="filters")
    assert drift.parts(x, t).filtered.abs().sum() == 0 == filters.parts(x, t).drift.abs().sum()
    assert not any("heads" in n or "transformer" in n for n, _ in drift.named_parameters())
    assert not any("drift" in n for n, _ in filters.named_parameters())


def test_the_constant_tap_colours_an_empty_image_and_filters_cannot():
    black, t = torch.zeros(2, 3, 32, 32), torch.tensor([0.5, 0.5])
    assert awake(branches="filters")(black, t).abs().max() == 0
    for where, taps in (("coarsest", [False, False, True]), ("all", [True] * 3)):
        net = awake(branches="filters", constant_tap=where)
        assert [level.tap is not None for level in net.levels(black, t)] == taps
        assert net(black, t).abs().max() > 0


def test_colours_may_have_kernels_of_their_own():
    x, t = randn(2, 3, 32, 32), torch.tensor([0.2, 0.8])
    net = awake(shared_rgb=False, levels=1)
    kernels = net.levels(x, t)[0].kernels
    assert kernels.shape == (2, 75, 32, 32)
    only = Level(kernels, torch.ones(2, 3, 32, 32), torch.ones(2, 1, 32, 32), None)  # skip 1: no blending
    per_colour = [apply_kernels(x[:, i:i + 1], kernels[:, 25 * i:25 * i + 25]) for i in range(3)]
    assert_close(pyramid(x, [only]), torch.cat(per_colour, 1))


def test_the_pyramid_blends_what_each_level_filtered():
    x = randn(2, 3, 16, 16)

    def identity(size: int, skip: float) -> Level:
        return Level(identity_kernels(2, size, size), random_shapes(2, size, size),
                     torch.full((2, 1, size, size), skip), None)

    assert torch.equal(pyramid(x, [identity(16, 1.0), identity(8, 0.3)]), x)
    halved = F.avg_pool2d(x, 2)
    assert_close(pyramid(x, [identity(16, 0.0), identity(8, 1.0)]),
                 gaussian_upsample(halved, random_shapes(2, 16, 16)))
    below = gaussian_upsample(halved, random_shapes(2, 16, 16))
    assert_close(pyramid(x, [identity(16, 0.25)]), 0.25 * x + 0.75 * below)
    bright = identity(16, 1.0)._replace(kernels=2 * identity_kernels(2, 16, 16), tap=torch.ones_like(x))
    assert_close(pyramid(x, [bright]), 2 * x + 1)


def test_the_drift_hears_the_time_unless_told_otherwise():
    x = randn(2, 3, 32, 32)
    for hears in (True, False):
        net = awake(branches="drift", drift_time=hears)
        same = torch.equal(net(x, torch.full((2,), 0.1)), net(x, torch.full((2,), 0.9)))
        assert same is not hears


def test_times_on_the_unit_interval_are_told_apart():
    """Fed unscaled, 0.50 and 0.51 would have all but the same code."""
    time = KPN(**SMALL).time
    codes = time.frequency[None] * torch.tensor([0.50, 0.51])[:, None]
    assert (codes[1] - codes[0]).max() > 1


def test_images_of_another_size_stretch_the_positions():
    net = awake()
    assert net(randn(1, 3, 48, 64), torch.tensor([0.5])).shape == (1, 3, 48, 64)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_stays_close_and_ends_in_full_precision(device):
    net, x, t = awake().to(device), randn(2, 3, 32, 32).to(device), torch.tensor([0.2, 0.8], device=device)
    with torch.autocast(device, torch.bfloat16):
        out = net(x, t)
        out.square().mean().backward()
    exact = net(x, t)
    assert out.dtype == torch.float32
    assert 0 < (out - exact).square().mean().sqrt() < 0.03 * exact.std()


@pytest.mark.parametrize("device", DEVICES)
def test_the_compiled_network_is_one_graph_and_the_same(device):
    net = awake(depth=1, levels=2).to(device)
    x, t = randn(2, 3, 32, 32).to(device), torch.tensor([0.2, 0.8], device=device)
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    gradients = []
    for model in (net, compiled):
        net.zero_grad()
        out = model(x, t)
        out.square().mean().backward()
        gradients.append([out.detach(), *(p.grad for p in net.parameters())])
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() <= (5e-3 if device == "cuda" else 1e-4) * a.norm()


def test_channels_last_gives_the_same_image():
    net, x, t = awake(), randn(2, 3, 32, 32), torch.tensor([0.2, 0.8])
    wanted = net(x, t)
    out = net.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), t)
    assert_close(out, wanted, atol=1e-4, rtol=1e-4)


def test_half_precision_weights_run_as_they_are():
    net = awake().bfloat16()
    out = net(randn(1, 3, 32, 32).bfloat16(), torch.tensor([0.5]))
    assert out.dtype == torch.bfloat16 and bool(out.isfinite().all())


@pytest.mark.parametrize(("error", "call"), [
    ("no label", lambda net: net(torch.zeros(1, 3, 32, 32), torch.tensor([0.5]), label=torch.tensor([1]))),
    ("stride 8", lambda net: net(torch.zeros(1, 3, 20, 32), torch.tensor([0.5]))),
    ("floats in", lambda net: net(torch.zeros(1, 3, 32, 32), torch.tensor([500]))),
    ("floats in", lambda net: net(torch.zeros(2, 3, 32, 32), torch.tensor([0.5]))),
    ("activation", lambda net: KPN(activation="relu")),
    ("branches", lambda net: KPN(branches="none")),
    ("constant_tap", lambda net: KPN(constant_tap="finest")),
    ("levels", lambda net: KPN(levels=5)),
    ("preset", lambda net: KPN.preset("large"))])
def test_mistakes_are_named(error, call):
    with pytest.raises(ValueError, match=error):
        call(KPN(**SMALL))


# --------------------------------------------------------------------- the loss


class Oracle(nn.Module):
    """Knows x0, and answers x0 + error; remembers the times it was asked for."""

    def __init__(self, x0: Tensor, error: float = 0.0):
        super().__init__()
        self.x0, self.error = x0, error

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        self.x_t, self.t = x_t, t
        return self.x0 + self.error


def test_the_loss_is_the_velocity_error_of_the_implied_x0():
    x0 = randn(64, 3, 4, 4)
    oracle = Oracle(x0, error=0.5)
    loss = velocity_from_x0_loss(oracle, x0, rng(1), clamp=1e-6)
    t = oracle.t.view(-1, 1, 1, 1)
    eps = (oracle.x_t - (1 - t) * x0) / t
    implied = (oracle.x_t - (x0 + 0.5)) / t
    assert_close(loss, (implied - (eps - x0)).square().mean(), rtol=1e-3, atol=0)
    assert velocity_from_x0_loss(Oracle(x0), x0, rng(1)) == 0


def test_the_clamp_bounds_the_division_and_one_is_the_x0_loss():
    x0 = randn(64, 3, 4, 4)
    assert_close(velocity_from_x0_loss(Oracle(x0, 0.5), x0, rng(1), clamp=1.0), torch.tensor(0.25))
    clean = partial(logit_normal_times, mean=-20.0)  # all t near 0
    late = velocity_from_x0_loss(Oracle(x0, 0.5), x0, rng(1), clean, clamp=0.05)
    assert_close(late, torch.tensor(0.25 / 0.05**2))
    for clamp in (0.0, 1.5):
        with pytest.raises(ValueError, match="clamp"):
            velocity_from_x0_loss(Oracle(x0), x0, clamp=clamp)


@pytest.mark.parametrize("x0, model", [
    (randn(4, 3, 8, 8), lambda x, t: x[:, :1]), (randn(0, 3, 8, 8), lambda x, t: x)])
def test_a_guess_of_another_shape_and_an_empty_batch_are_refused(x0, model):
    with pytest.raises(ValueError, match="shape of x_0, at least one image"):
        velocity_from_x0_loss(model, x0)


def test_perception_is_asked_only_where_there_is_little_noise():
    x0 = randn(400, 1, 2, 2)
    oracle = Oracle(x0)
    loss = velocity_from_x0_loss(oracle, x0, rng(1), perceptual=lambda x, y: torch.ones(len(x)),
                                 perceptual_below=0.6, perceptual_weight=0.5)
    share = (oracle.t < 0.6).float().mean()
    assert 0.1 < share < 0.9
    assert_close(loss, 0.5 * share)


def test_times_follow_the_logit_normal_law():
    t = logit_normal_times(40_000, torch.zeros(1), rng(), mean=0.8, std=0.8)
    logits = torch.logit(t.double())
    assert t.min() > 0 and t.max() < 1
    assert abs(logits.mean().item() - 0.8) < 5 * 0.8 / 200
    assert abs(logits.std().item() - 0.8) < 5 * 0.8 / math.sqrt(80_000)


def test_times_may_be_drawn_otherwise():
    oracle = Oracle(randn(500, 1, 2, 2))
    velocity_from_x0_loss(oracle, oracle.x0, rng(), StraightPath().draw_times)
    assert abs(oracle.t.mean().item() - 0.5) < 5 / math.sqrt(12 * 500)


def test_the_network_learns():
    """Forty steps on flat colours: the loss on the same noise falls to well below half."""
    torch.manual_seed(0)
    net, generator = KPN(**SMALL | {"size": 16}), rng()
    x0 = (torch.rand(16, 3, 1, 1, generator=generator) * 2 - 1).expand(16, 3, 16, 16)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    before = velocity_from_x0_loss(net, x0, rng(1)).item()
    for _ in range(40):
        loss = velocity_from_x0_loss(net, x0, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert velocity_from_x0_loss(net, x0, rng(1)).item() < 0.4 * before
