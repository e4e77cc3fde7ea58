"""LPIPS against the package of its authors, and against what a distance must be."""

import importlib.util
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage import data, filters
from support import DEVICES
from torch.testing import assert_close

import coursekit.perceptual as perceptual
from coursekit.fetch import data_folder, shipped
from coursekit.metrics import psnr
from coursekit.perceptual import alexnet_features, lpips


def pair(b=2, c=3, h=64, w=64, seed=0, noise=0.3, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(b, c, h, w, generator=rng) * 2 - 1
    y = (x + noise * torch.randn(x.shape, generator=rng)).clamp(-1, 1)
    return x.to(dtype), y.to(dtype)


def cat(size=64):
    """A real photograph, (1, 3, size, size) in [-1, 1]."""
    face = torch.from_numpy(data.cat()[20:276, 100:356].copy()).permute(2, 0, 1)[None].float()
    return torch.nn.functional.interpolate(face / 127.5 - 1, size=(size, size), mode="area")


def blurred(x, sigma):
    soft = filters.gaussian(x[0].permute(1, 2, 0).double().numpy(), sigma=sigma, channel_axis=-1)
    return torch.from_numpy(soft).permute(2, 0, 1)[None].to(x)


def original_weights():
    folder = data_folder()
    path = folder and folder / "weights" / "alexnet_features.pth"
    if not path or not path.exists():
        pytest.skip("COURSEKIT_DATA has no weights/alexnet_features.pth, the trunk in full precision")
    return path


def authors_lpips(trunk):
    """The lpips package with conv{i}.{part} of `trunk` in its AlexNet."""
    package = pytest.importorskip("lpips")
    model = package.LPIPS(net="alex", pnet_rand=True, verbose=False)
    layers = [m for m in model.net.modules() if isinstance(m, torch.nn.Conv2d)]
    with torch.no_grad():
        for i, layer in enumerate(layers, start=1):
            layer.weight.copy_(trunk[f"conv{i}.weight"])
            layer.bias.copy_(trunk[f"conv{i}.bias"])
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def reference():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)  # torchvision's, about pretrained=
        yield authors_lpips(perceptual._weights(torch.device("cpu"), torch.float32))


# ------------------------------------------------------------------------ equal to the authors' program

@settings(max_examples=12, deadline=None)
@given(b=st.integers(1, 3), h=st.integers(31, 90), w=st.integers(31, 90), seed=st.integers(0, 99),
       noise=st.floats(0.01, 1))
def test_equals_the_lpips_package_at_any_size(reference, b, h, w, seed, noise):
    x, y = pair(b, 3, h, w, seed, noise)
    assert_close(lpips(x, y), reference(x, y).flatten(), atol=1e-5, rtol=1e-4)


def test_gradient_equals_the_lpips_package(reference):
    x, y = pair(seed=3)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    lpips(ours, y).sum().backward()
    reference(theirs, y).sum().backward()
    assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-3)


def test_features_are_the_packages_last_layer(reference):
    x, _ = pair(seed=1)
    theirs = reference.net(reference.scaling_layer(x)).relu5
    assert_close(alexnet_features(x), theirs.mean((2, 3)), atol=1e-5, rtol=1e-4)
    assert alexnet_features(x).shape == (2, 256)


def test_half_precision_costs_less_than_the_card_says():
    found = torch.load(original_weights(), weights_only=True)
    places = dict(zip(range(1, 6), (0, 3, 6, 8, 10), strict=True))
    exact = authors_lpips({f"conv{i}.{part}": found[f"features.{k}.{part}"]
                           for i, k in places.items() for part in ("weight", "bias")})
    for x, y in [(cat(), blurred(cat(), 1.5)), pair(noise=0.05), pair(noise=1.0)]:
        assert_close(lpips(x, y), exact(x, y).flatten(), atol=2e-4, rtol=0)


def test_the_shipped_file_is_what_the_converter_makes(tmp_path):
    source = original_weights()
    pytest.importorskip("lpips")
    script = Path(__file__).parents[1] / "tools" / "convert_alexnet.py"
    spec = importlib.util.spec_from_file_location("convert_alexnet", script)
    converter = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(converter)
    from safetensors.torch import save
    assert save(converter.convert(source)) == shipped("weights", perceptual.WEIGHTS).read_bytes()


# ------------------------------------------------------------------------------ what a distance must be

@settings(max_examples=10, deadline=None)
@given(c=st.sampled_from([1, 3]), h=st.integers(31, 60), w=st.integers(31, 60), seed=st.integers(0, 99),
       dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
def test_zero_to_itself_symmetric_and_positive_to_others(c, h, w, seed, dtype):
    x, y = pair(2, c, h, w, seed, dtype=dtype)
    assert_close(lpips(x, x), torch.zeros(2, dtype=dtype))
    assert_close(lpips(x, y), lpips(y, x))
    assert bool((lpips(x, y) > 0).all()) and lpips(x, y).dtype == dtype


def test_an_image_is_judged_by_itself():
    x, y = pair(b=3)
    alone = torch.cat([lpips(x[i:i + 1], y[i:i + 1]) for i in range(3)])
    assert_close(lpips(x, y), alone, atol=1e-6, rtol=1e-4)


def test_a_grey_image_is_three_equal_channels():
    x, y = pair(c=1)
    assert_close(lpips(x, y), lpips(x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1)))
    assert_close(alexnet_features(x), alexnet_features(x.expand(-1, 3, -1, -1)))


def test_blur_looks_worse_than_a_shift_though_psnr_prefers_it():
    x = cat(128)
    blur, shift = blurred(x, 2.5), x.roll(2, dims=-1)
    assert psnr(blur, x, peak=2) > psnr(shift, x, peak=2)
    assert lpips(blur, x) > 2 * lpips(shift, x)


def test_more_noise_is_further():
    x = cat()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    far = torch.cat([lpips(x, (x + s * noise).clamp(-1, 1)) for s in (0.05, 0.1, 0.2, 0.4)])
    assert bool((far.diff() > 0).all())


def test_half_precision_is_compared_in_float32_even_under_autocast():
    x, y = pair(noise=0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(lpips(x, y), lpips(x, y).float())
        inside, features = lpips(x, y), alexnet_features(x)
    assert_close(inside, lpips(x, y), atol=0, rtol=0)
    assert_close(features, alexnet_features(x), atol=0, rtol=0)
    half_x, half_y = x.bfloat16(), y.bfloat16()
    assert_close(lpips(half_x, half_y), lpips(half_x.float(), half_y.float()).bfloat16())


@pytest.mark.parametrize("device", DEVICES)
def test_keeps_dtype_and_device(device):
    x, y = (image.to(device) for image in pair())
    for out in (lpips(x, y), alexnet_features(x)):
        assert out.device.type == device and out.dtype == torch.float32
    assert_close(lpips(x, y).cpu(), lpips(x.cpu(), y.cpu()), atol=1e-3, rtol=1e-2)


# ---------------------------------------------------------------------------------------------- gradient

@pytest.mark.parametrize("which", [0, 1])
def test_gradient_is_the_slope_in_both_arguments(which):
    images = [image.double() * 0.9 for image in pair(b=1, h=40, w=37)]
    images[which].requires_grad_()
    lpips(*images).sum().backward()
    way = torch.randn(images[which].shape, generator=torch.Generator().manual_seed(5)).double()
    moved = [[image.detach() + sign * 1e-6 * way * (i == which) for i, image in enumerate(images)]
             for sign in (1, -1)]
    slope = (lpips(*moved[0]) - lpips(*moved[1])) / 2e-6
    assert_close((images[which].grad * way).sum(), slope.squeeze(), atol=1e-6, rtol=1e-4)


def test_no_gradient_reaches_the_weights():
    x, y = pair()
    lpips(x.requires_grad_(), y).sum().backward()
    weights = perceptual._weights(x.device, x.dtype)
    assert all(not w.requires_grad and w.grad is None for w in weights.values())


def test_a_first_call_in_inference_mode_leaves_gradients_possible():
    perceptual._weights.cache_clear()
    x, y = pair()
    with torch.inference_mode():
        lpips(x, y)
    x.requires_grad_()
    lpips(x, y).sum().backward()
    assert x.grad.abs().max() > 0


def test_dead_features_have_a_finite_gradient(monkeypatch):
    alive = perceptual._weights(torch.device("cpu"), torch.float32)
    dead = {name: w - 100 if name.endswith("bias") else w for name, w in alive.items()}
    monkeypatch.setattr(perceptual, "_weights", lambda device, dtype: dead)
    x, y = pair()
    distance = lpips(x.requires_grad_(), y)
    distance.sum().backward()
    assert_close(distance, torch.zeros(2))
    assert_close(x.grad, torch.zeros_like(x))


# ----------------------------------------------------------------------------------- what it will not do

def bad_images():
    x, _ = pair()
    with_nan = x.clone()
    with_nan[1, 0, 3, 3] = torch.nan
    with_infinity = x.clone()
    with_infinity[0, 0, 0, 0] = torch.inf
    return {
        "0..255": (x * 127.5 + 127.5, r"\[-1, 1\].*got values from .* to 25\d"),
        "overshoot": (x * 1.01, r"\[-1, 1\].*clamp"),
        "integers": ((x * 127).to(torch.uint8), "float images.*uint8"),
        "nan": (with_nan, "NaN"),
        "infinity": (with_infinity, "inf"),
        "no batch": (x[0], r"\(b, 3, h, w\).*\(3, 64, 64\)"),
        "two channels": (x[:, :2], r"\(2, 2, 64, 64\)"),
        "empty": (x[:0], "at least one image"),
        "30 pixels": (x[:, :, :30], r"31x31 pixels, got \(30, 64\)"),
        "digits": (x[:, :1, :28, :28], r"31x31 pixels, got \(28, 28\)"),
        "a list": ([1.0], "list"),
    }


@pytest.mark.parametrize("case", bad_images())
def test_bad_images_are_named(case):
    x, says = bad_images()[case]
    good, _ = pair()
    for call, name in [(lambda: lpips(x, good), "x"), (lambda: lpips(good, x), "y"),
                       (lambda: alexnet_features(x), "x")]:
        with pytest.raises(ValueError, match=says) as error:
            call()
        assert name in re.findall(r"\w+", str(error.value))


def test_shapes_must_agree():
    x, _ = pair()
    with pytest.raises(ValueError, match=r"\(2, 3, 64, 64\) and \(2, 1, 64, 64\)"):
        lpips(x, x[:, :1])


def test_rounding_at_the_ends_of_the_range_is_allowed():
    x = torch.ones(1, 3, 31, 31) * 1.0005
    assert_close(lpips(x, x), torch.zeros(1))


@pytest.mark.parametrize("harm", ["cut", "altered", "missing"])
def test_a_harmed_file_is_refused_by_name(tmp_path, monkeypatch, harm):
    copy = tmp_path / perceptual.WEIGHTS
    if harm != "missing":
        shutil.copy(shipped("weights", perceptual.WEIGHTS), copy)
        content = bytearray(copy.read_bytes())
        content[-1] ^= 1
        copy.write_bytes(content[:-100] if harm == "cut" else content)
    monkeypatch.setattr(perceptual, "shipped", lambda *parts: copy)
    perceptual._weights.cache_clear()
    x, y = pair()
    try:
        with pytest.raises(FileNotFoundError if harm == "missing" else ValueError,
                           match=perceptual.WEIGHTS):
            lpips(x, y)
    finally:
        perceptual._weights.cache_clear()
