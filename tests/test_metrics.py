"""Each metric against a formula, an independent program, and the mistakes it must refuse."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from support import DEVICES, FLOATS, generator
from torch.testing import assert_close

from coursekit import metrics
from coursekit.metrics import (
    bits_per_dim,
    features,
    frechet_distance,
    kernel_distance,
    lpips,
    psnr,
    ssim,
)
from coursekit.perceptual import alexnet_features

sizes = st.integers(11, 40)
seeds = st.integers(0, 2**31)


def pair(b=2, c=3, h=24, w=19, seed=0, noise=0.2, dtype=torch.float64):
    """Images in [-1, 1] with structure, and noisy ones that may overshoot."""
    rng = generator(seed)
    coarse = torch.rand(b, c, 4, 4, generator=rng, dtype=torch.float64) * 2 - 1
    x = torch.nn.functional.interpolate(coarse, size=(h, w), mode="bilinear", align_corners=False)
    return x.to(dtype), (x + noise * torch.randn(x.shape, generator=rng, dtype=torch.float64)).to(dtype)


def gaussian_set(n, d, seed):
    """(n, d) float64 from a correlated Gaussian with a mean."""
    rng = generator(seed)
    mix = torch.randn(d, d, generator=rng, dtype=torch.float64) / math.sqrt(d)
    return torch.randn(n, d, generator=rng, dtype=torch.float64) @ mix + torch.randn(
        d, generator=rng, dtype=torch.float64)


def with_moments(mean, root, n, seed):
    """(n, d) whose sample mean is `mean` and whose sample covariance is root' root, exactly."""
    z = torch.randn(n, len(mean), generator=generator(seed), dtype=torch.float64)
    z = torch.linalg.qr(z - z.mean(0)).Q * math.sqrt(n - 1)
    return z @ root + mean


def rotation(d, seed):
    return torch.linalg.qr(torch.randn(d, d, generator=generator(seed), dtype=torch.float64)).Q


# --------------------------------------------------------------------------------- psnr

@settings(deadline=None, max_examples=30)
@given(b=st.integers(1, 3), c=st.integers(1, 4), h=st.integers(1, 20), w=st.integers(1, 20), seed=seeds,
       error=st.floats(1e-3, 1), peak=st.sampled_from([1.0, 2.0, 255.0]))
def test_psnr_of_a_constant_error_is_its_logarithm(b, c, h, w, seed, error, peak):
    x = torch.rand(b, c, h, w, generator=generator(seed), dtype=torch.float64) * peak
    assert_close(psnr(x, x + error, peak=peak),
                 torch.full((b,), 20 * math.log10(peak / error), dtype=torch.float64))


@settings(deadline=None, max_examples=30)
@given(h=st.integers(2, 30), w=st.integers(2, 30), seed=seeds, scale=st.floats(0.01, 300))
def test_psnr_is_symmetric_ignores_scale_and_equals_scikit_image(h, w, seed, scale):
    x, y = pair(3, 3, h, w, seed)
    expected = [peak_signal_noise_ratio(a.numpy(), b.numpy(), data_range=2)
                for a, b in zip(x, y, strict=True)]
    assert_close(psnr(x, y, peak=2), torch.tensor(expected, dtype=torch.float64))
    assert_close(psnr(y, x, peak=2), psnr(x, y, peak=2))
    assert_close(psnr(x * scale, y * scale, peak=2 * scale), psnr(x, y, peak=2))


def test_psnr_of_the_same_image_is_infinite_and_only_there():
    x, y = pair()
    y[1] = x[1]
    assert psnr(x, y, peak=2).isinf().tolist() == [False, True]


# --------------------------------------------------------------------------------- ssim

@settings(deadline=None, max_examples=30)
@given(c=st.sampled_from([1, 3]), h=sizes, w=sizes, seed=seeds, noise=st.floats(0, 1),
       peak=st.sampled_from([1.0, 2.0, 255.0]), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_ssim_equals_scikit_image(c, h, w, seed, noise, peak, dtype):
    x, y = (((image + 1) * peak / 2).to(dtype) for image in pair(2, c, h, w, seed, noise))
    expected = [structural_similarity(a.double().numpy(), b.double().numpy(), data_range=peak, channel_axis=0,
                                      gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
                for a, b in zip(x, y, strict=True)]
    exact = 1e-4 if dtype == torch.float32 else 1e-9
    assert_close(ssim(x, y, peak=peak), torch.tensor(expected, dtype=dtype), atol=exact, rtol=0)


@settings(deadline=None, max_examples=20)
@given(h=sizes, w=sizes, seed=seeds, scale=st.floats(0.01, 300))
def test_ssim_is_one_to_itself_symmetric_and_ignores_scale(h, w, seed, scale):
    x, y = pair(2, 3, h, w, seed)
    assert_close(ssim(x, x, peak=2), torch.ones(2, dtype=torch.float64))
    assert bool((ssim(x, y, peak=2) < 1).all())
    assert_close(ssim(x, y, peak=2), ssim(y, x, peak=2))
    assert_close(ssim(x * scale, y * scale, peak=2 * scale), ssim(x, y, peak=2))


def test_ssim_of_flat_images_is_the_brightness_term():
    x, y = torch.full((1, 1, 11, 11), 0.2), torch.full((1, 1, 11, 11), 0.7)
    expected = (2 * 0.2 * 0.7 + 1e-4) / (0.2**2 + 0.7**2 + 1e-4)
    assert_close(ssim(x, y, peak=1), torch.tensor([expected]), atol=1e-5, rtol=0)


def test_ssim_is_exact_under_autocast_and_differentiable():
    x, y = pair(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ssim(x, y, peak=2)
    assert_close(inside, ssim(x, y, peak=2), atol=0, rtol=0)
    x, y = pair(1, 1, 11, 12)
    assert torch.autograd.gradcheck(lambda x: ssim(x, y, peak=2), x.requires_grad_())


# ------------------------------------------------------------ what both have in common

@pytest.mark.parametrize("metric", [psnr, ssim])
class TestPairs:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_keeps_dtype_and_device_and_works_in_float32_or_better(self, metric, dtype, device):
        if device == "mps" and dtype == torch.float64:
            pytest.skip("mps has no float64")
        x, y = (image.to(device) for image in pair(b=16, noise=0.02, dtype=dtype))
        out = metric(x, y, peak=2)
        assert (out.dtype, out.device.type, out.shape) == (dtype, device, (16,))
        exact = metric(x.cpu().double(), y.cpu().double(), peak=2).to(dtype)
        assert_close(out.cpu(), exact, atol=0, rtol=1e-5)  # rounded once, at the end

    def test_each_pair_is_judged_by_itself(self, metric):
        x, y = pair(b=3)
        alone = torch.cat([metric(x[i:i + 1], y[i:i + 1], peak=2) for i in range(3)])
        assert_close(metric(x, y, peak=2), alone)

    def test_the_wrong_range_is_refused(self, metric):
        x, y = pair(noise=0.5)
        x[0, 0, 0, 0], x[0, 0, 0, 1] = -1, 1
        assert metric(y, x, peak=2).isfinite().all()  # a noisy image overshoots, its reference fits
        assert metric(x, y, peak=2).isfinite().all()
        with pytest.raises(ValueError, match=r"neither image fits a peak of 1: .*span 2 and"):
            metric(x, y, peak=1)
        with pytest.raises(ValueError, match="neither image fits a peak of 2"):
            metric(127.5 * x, 127.5 * y, peak=2)

    @pytest.mark.parametrize("peak", [0, -1, math.nan, math.inf])
    def test_peak_must_be_positive(self, metric, peak):
        with pytest.raises(ValueError, match=f"peak must be positive.*{peak}"):
            metric(*pair(), peak=peak)

    def test_peak_must_be_said(self, metric):
        with pytest.raises(TypeError, match="peak"):
            metric(*pair())

    @pytest.mark.parametrize(("spoil", "says"), [
        (lambda x: x[0], r"\(b, c, h, w\).*\(3, 24, 19\)"),
        (lambda x: x[:0], r"\(0, 3, 24, 19\)"),
        (lambda x: x[:, :1], r"like with like.*\(2, 1, 24, 19\)"),
        (lambda x: (x * 100).to(torch.uint8), "float images.*uint8"),
        (lambda x: x.where(x != x[0, 0, 0, 0], torch.nan), "NaN"),
        (lambda x: x.where(x != x[0, 0, 0, 0], torch.inf), "finite"),
        (lambda x: x.numpy(), "ndarray"),
    ])
    def test_bad_images_are_named(self, metric, spoil, says):
        x, y = pair()
        for images in [(spoil(x), y), (x, spoil(y))]:
            with pytest.raises(ValueError, match=says):
                metric(*images, peak=2)


def test_ssim_needs_a_whole_window():
    x, y = pair(h=10, w=30)
    with pytest.raises(ValueError, match=r"11x11 window.*\(10, 30\)"):
        ssim(x, y, peak=2)


# --------------------------------------------------------------------- frechet_distance

@settings(deadline=None, max_examples=25)
@given(d=st.integers(1, 12), n=st.integers(14, 40), m=st.integers(14, 40), seed=seeds)
def test_frechet_of_gaussians_that_share_their_axes(d, n, m, seed):
    rng = generator(seed)
    mean_x, mean_y = torch.randn(2, d, generator=rng, dtype=torch.float64)
    std_x, std_y = torch.rand(2, d, generator=rng, dtype=torch.float64)
    axes = rotation(d, seed + 1)
    x = with_moments(mean_x, std_x.diag() @ axes, n, seed + 2)
    y = with_moments(mean_y, std_y.diag() @ axes, m, seed + 3)
    expected = (mean_x - mean_y).square().sum() + (std_x - std_y).square().sum()
    assert_close(frechet_distance(x, y), expected)


@pytest.mark.parametrize("d", [1, 3, 20])
def test_frechet_equals_the_formula_with_a_matrix_root(d):
    x, y = gaussian_set(200, d, seed=d), gaussian_set(150, d, seed=d + 1)
    a, b = (np.atleast_2d(np.cov(f.numpy(), rowvar=False)) for f in (x, y))
    root = scipy.linalg.sqrtm(a @ b).real
    expected = float((x.mean(0) - y.mean(0)).square().sum()) + np.trace(a + b - 2 * root)
    assert_close(frechet_distance(x, y).item(), expected, atol=1e-9, rtol=1e-9)


any_set = st.tuples(st.integers(2, 30), seeds)  # fewer, as many and more features than dimensions


@settings(deadline=None, max_examples=40)
@given(d=st.integers(1, 15), one=any_set, two=any_set)
def test_frechet_is_a_distance_that_ignores_rotation_even_where_covariances_are_singular(d, one, two):
    x, y = gaussian_set(one[0], d, one[1]), gaussian_set(two[0], d, two[1])
    distance, turn = frechet_distance(x, y), rotation(d, 7)
    assert distance >= 0
    assert_close(frechet_distance(x, x), torch.zeros((), dtype=torch.float64), atol=1e-12, rtol=0)
    assert_close(frechet_distance(y, x), distance)
    assert_close(frechet_distance(x @ turn + 3, y @ turn + 3), distance)
    assert_close(frechet_distance(x.flip(0), y), distance)


@settings(deadline=None, max_examples=25)
@given(d=st.integers(1, 40), n=st.integers(2, 12), seed=seeds, grow=st.floats(0, 3))
def test_frechet_to_a_moved_and_stretched_copy(d, n, seed, grow):
    x, move = gaussian_set(n, d, seed), torch.randn(d, generator=generator(seed), dtype=torch.float64)
    centred = x - x.mean(0)
    expected = move.square().sum() + (1 - grow) ** 2 * x.var(0).sum()
    assert_close(frechet_distance(x, grow * centred + x.mean(0) + move), expected)


def test_frechet_of_constant_features_is_the_gap_between_them():
    x, y = torch.zeros(5, 3), torch.full((4, 3), 2.0)
    assert_close(frechet_distance(x, y), torch.tensor(12.0))


# ---------------------------------------------------------------------- kernel_distance

def cubic(a, b):
    return (float(a @ b) / len(a) + 1) ** 3


@settings(deadline=None, max_examples=15)
@given(n=st.integers(2, 12), m=st.integers(2, 12), d=st.integers(1, 6), seed=seeds)
def test_kernel_distance_equals_the_loop_over_pairs(n, m, d, seed):
    x, y = gaussian_set(n, d, seed), gaussian_set(m, d, seed + 1)
    expected = (np.mean([cubic(x[i], x[j]) for i in range(n) for j in range(n) if i != j])
                + np.mean([cubic(y[i], y[j]) for i in range(m) for j in range(m) if i != j])
                - 2 * np.mean([cubic(a, b) for a in x for b in y]))
    assert_close(kernel_distance(x, y).item(), float(expected), atol=1e-9, rtol=1e-9)
    assert_close(kernel_distance(y, x), kernel_distance(x, y))


def test_kernel_distance_in_many_pieces_equals_one_piece():
    x, y = gaussian_set(1203, 5, seed=0), gaussian_set(777, 5, seed=1)
    xx, yy, xy = ((a @ b.T / 5 + 1) ** 3 for a, b in [(x, x), (y, y), (x, y)])
    expected = ((xx.sum() - xx.trace()) / (1203 * 1202) + (yy.sum() - yy.trace()) / (777 * 776)
                - 2 * xy.mean())
    assert_close(kernel_distance(x, y), expected)


@pytest.mark.parametrize("n", [2, 10])
@pytest.mark.parametrize("move", [0.0, 1.0])
def test_kernel_distance_is_unbiased(n, move):
    # In one dimension (ab + 1)^3 compares the first three moments, so the truth is a formula.
    rng = generator(10 * n)
    moments_x, moments_y = (0, 1, 0), (move, 1 + move**2, 3 * move + move**3)
    truth = sum(c * (p - q) ** 2 for c, p, q in zip((3, 3, 1), moments_x, moments_y, strict=True))
    draws = torch.stack([kernel_distance(torch.randn(n, 1, generator=rng, dtype=torch.float64),
                                         torch.randn(n, 1, generator=rng, dtype=torch.float64) + move)
                         for _ in range(4000)])
    error = draws.std() / math.sqrt(len(draws))
    assert abs(draws.mean() - truth) < 5 * error
    if move == 0:
        assert (draws < 0).any()  # an estimate cut off at zero would be biased


# -------------------------------------------------------------- what both sets must be

@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
class TestSets:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
    def test_is_a_scalar_of_the_same_dtype_and_device(self, distance, dtype, device):
        if device == "mps" and dtype == torch.float64:
            pytest.skip("mps has no float64")
        x, y = gaussian_set(9, 4, 0).to(dtype), gaussian_set(8, 4, 1).to(dtype)
        out = distance(x.to(device).requires_grad_(), y.to(device))
        assert (out.shape, out.dtype, out.device.type, out.requires_grad) == ((), dtype, device, False)
        assert_close(out.cpu(), distance(x.double(), y.double()).to(dtype))

    def test_grows_as_the_sets_part(self, distance):
        x, y = gaussian_set(50, 4, 0), gaussian_set(50, 4, 0) + 0.1
        assert distance(x, y + 1) > distance(x, y) + 0.1

    @pytest.mark.parametrize(("spoil", "says"), [
        (lambda f: f[:1], r"n >= 2.*\(1, 4\)"),
        (lambda f: f[0], r"\(n, d\).*\(4,\)"),
        (lambda f: f[:, :3], r"one length.*\(9, 3\)"),
        (lambda f: f.long(), "float features.*int64"),
        (lambda f: f * torch.nan, "finite"),
        (lambda f: f.numpy(), "ndarray"),
    ])
    def test_bad_sets_are_named(self, distance, spoil, says):
        good = gaussian_set(9, 4, 0)
        for sets in [(spoil(good), good), (good, spoil(good))]:
            with pytest.raises(ValueError, match=says):
                distance(*sets)


# ------------------------------------------------------------------------------ features

def test_alexnet_features_come_in_batches_without_gradient(monkeypatch):
    monkeypatch.setattr(metrics, "BATCH", 3)
    x = torch.rand(7, 3, 32, 40, generator=generator(0)) * 2 - 1
    found = features("alexnet")(x.requires_grad_())
    assert_close(found, alexnet_features(x.detach()), atol=1e-5, rtol=1e-4)
    assert not found.requires_grad


def test_mnist_features_are_what_the_classifier_decides_from(monkeypatch):
    from coursekit.checkpoints import pretrained
    monkeypatch.setattr(metrics, "BATCH", 3)
    classifier = pretrained("mnist-classifier")
    x = torch.rand(7, 1, 28, 28, generator=generator(0)) * 2 - 1
    extract = features("mnist")
    found = extract(x.requires_grad_())
    assert found.ndim == 2 and not found.requires_grad
    assert_close(classifier.head(found), classifier(x), atol=1e-4, rtol=1e-4)
    half = extract(x.detach().bfloat16())
    assert half.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"\(b, 1, h, w\)"):
        extract(x.detach().expand(-1, 3, -1, -1))
    with pytest.raises(ValueError, match=r"\[-1, 1\].*got values from"):
        extract(x.detach() * 255)


def test_features_refuse_other_ranges_and_names():
    with pytest.raises(ValueError, match=r"\[-1, 1\].*got values from 0 to 255"):
        features("alexnet")(torch.linspace(0, 255, 3 * 32 * 32).view(1, 3, 32, 32))
    with pytest.raises(ValueError, match="got 'mnits'; did you mean 'mnist'"):
        features("mnits")


def test_lpips_is_found_among_the_metrics():
    x = torch.zeros(2, 3, 32, 32)
    assert_close(lpips(x, x), torch.zeros(2))
    assert set(metrics.__all__) == {"bits_per_dim", "features", "frechet_distance", "kernel_distance",
                                    "lpips", "psnr", "ssim"}


# -------------------------------------------------------------------------- bits_per_dim

def test_a_uniform_byte_costs_eight_bits():
    nats = torch.tensor([3 * 32 * 32 * math.log(256), 0.0])
    assert_close(bits_per_dim(nats, (3, 32, 32)), torch.tensor([8.0, 0.0]))
    assert_close(bits_per_dim(nats, 3 * 32 * 32), torch.tensor([8.0, 0.0]))


@pytest.mark.parametrize("dims", [0, -4, (3, 0)])
def test_an_image_without_numbers_has_no_bits(dims):
    with pytest.raises(ValueError, match="at least one number"):
        bits_per_dim(torch.ones(1), dims)


@pytest.mark.parametrize("device", DEVICES)
def test_perplexity_counts_codes_that_are_used_equally_and_fewer_otherwise(device):
    assert_close(metrics.perplexity(torch.arange(6, device=device).repeat(5)), torch.tensor(6.0, dtype=torch.float64))
    assert_close(metrics.perplexity(torch.full((3, 4), 9, device=device)), torch.tensor(1.0, dtype=torch.float64))
    skewed = torch.tensor([[0, 0, 0], [1, 5, 0]], device=device)  # shares 4/6, 1/6, 1/6, and three never used
    wanted = math.exp(-(2 / 3 * math.log(2 / 3) + 2 / 6 * math.log(1 / 6)))
    assert metrics.perplexity(skewed).item() == pytest.approx(wanted)


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(0, dtype=torch.int64)])
def test_perplexity_wants_codes(wrong):
    with pytest.raises(ValueError, match="int64 and at least one"):
        metrics.perplexity(wrong)
