"""The hourglass of Deep Image Prior: its published count, its layers in order, and the sizes it takes."""

import pytest
import torch
from support import DEVICES, randn
from torch import nn

from coursekit import checkpoints
from coursekit.checkpoints import Card
from coursekit.nets import Hourglass
from coursekit.nets.hourglass import PRESETS


def small(**changes):
    torch.manual_seed(0)
    return Hourglass(**{"in_channels": 2, "channels": (4, 6)} | changes)


def z(*shape):
    return randn(*shape, dtype=torch.float32)


def test_the_default_has_exactly_the_published_number_of_parameters():
    with torch.device("meta"):
        assert sum(p.numel() for p in Hourglass().parameters()) == 2_217_831


def test_a_scale_counted_by_hand():
    """One scale of c channels from c_in, skip s, out 3: convolutions with bias, and two numbers a normalised map."""
    c_in, c, s = 5, 7, 2
    skip = c_in * s + s + 2 * s
    down = c_in * c * 9 + c + 2 * c + c * c * 9 + c + 2 * c
    join = 2 * (s + c) + (s + c) * c * 9 + c + 2 * c + c * c + c + 2 * c
    head = c * 3 + 3
    net = Hourglass(c_in, channels=(c,), skip=s)
    assert sum(p.numel() for p in net.parameters()) == skip + down + join + head


def test_layers_stand_in_the_published_order():
    """Stride in the first convolution down, normalisation before activation, one more over what was joined."""
    scale = small().body
    kinds = [type(layer).__name__ for layer in scale.down.modules() if not isinstance(layer, nn.Sequential)]
    assert kinds == ["Conv2d", "BatchNorm2d", "LeakyReLU"] * 2
    assert [m.stride for m in scale.down.modules() if isinstance(m, nn.Conv2d)] == [(2, 2), (1, 1)]
    kinds = [type(layer).__name__ for layer in scale.join.modules() if not isinstance(layer, nn.Sequential)]
    assert kinds == ["BatchNorm2d"] + ["Conv2d", "BatchNorm2d", "LeakyReLU"] * 2
    assert [m.kernel_size for m in scale.join.modules() if isinstance(m, nn.Conv2d)] == [(3, 3), (1, 1)]
    assert all(m.padding_mode == "reflect" and m.bias is not None
               for m in scale.modules() if isinstance(m, nn.Conv2d))
    assert all(m.negative_slope == 0.2 for m in scale.modules() if isinstance(m, nn.LeakyReLU))
    norms = [m for m in scale.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(set(map(id, norms))) == len(norms) == 2 * 6  # none is shared: skip, 2 down, joined, 2 after, a scale


@pytest.mark.parametrize("size", [(8, 8), (8, 12), (20, 16)])
@pytest.mark.parametrize("upsample", ["bilinear", "nearest"])
@pytest.mark.parametrize("device", DEVICES)
def test_an_image_in_0_1_of_the_size_of_the_input(size, upsample, device):
    net = small(upsample=upsample, out_channels=1).to(device)
    x = net(100 * z(3, 2, *size).to(device))
    assert x.shape == (3, 1, *size) and x.device.type == device and x.min() >= 0 and x.max() <= 1


@pytest.mark.parametrize("size", [(4, 8), (8, 4), (10, 8), (8, 9), (0, 8)])
def test_a_size_it_cannot_halve_is_refused_with_those_it_can(size):
    with pytest.raises(ValueError, match=rf"multiples of 4, from 8 on \(8, 12, 16, ...\), got {size[0]} x {size[1]}"):
        small()(torch.zeros(1, 2, *size))


def test_five_scales_refuse_cifar_and_four_take_it():
    with pytest.raises(ValueError, match="fewer scales"):
        Hourglass()(torch.zeros(1, 32, 32, 32))
    with torch.no_grad():
        assert Hourglass.preset("fast")(z(1, 32, 32, 32)).shape == (1, 3, 32, 32)


def test_every_size_it_takes_trains_alone():
    """A batch of one at the smallest size: four pixels at the bottom to normalise over, and a gradient everywhere."""
    net = small().train()
    net(z(1, 2, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_without_skips_everything_passes_the_bottom():
    """A change of the deepest map reaches every pixel; with a skip, fine detail need not pass it."""
    net = small(skip=0)
    x = z(1, 2, 16, 16)
    with torch.no_grad():
        before = net(x)
        for p in net.body.inside.join.parameters():
            p.zero_()  # the inner scale now says the same everywhere
        after = net(x)
    inner = after[..., 4:-4, 4:-4]
    assert before.std((2, 3)).min() > 1e-3 and inner.std((2, 3)).max() < 1e-6
    joined = small(skip=4)
    with torch.no_grad():
        for p in joined.body.inside.join.parameters():
            p.zero_()
        assert joined(x)[..., 4:-4, 4:-4].std((2, 3)).min() > 1e-3


@pytest.mark.parametrize("wrong, sentence", [
    ({"channels": ()}, "a scale or more"), ({"channels": (4, 0)}, "channels of at least 1"),
    ({"in_channels": 0}, "channels of at least 1"), ({"skip": (1, 2, 3)}, "one for each of 2 scales"),
    ({"skip": -1}, "at least 0"), ({"upsample": "cubic"}, "'cubic'")])
def test_settings_that_cannot_be_right_are_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        small(**wrong)


@pytest.mark.parametrize("wrong", [
    torch.zeros(1, 3, 8, 8), torch.zeros(2, 8, 8), torch.zeros(1, 2, 8, 8, dtype=torch.long)])
def test_inputs_of_another_kind_are_refused(wrong):
    with pytest.raises(ValueError, match=r"takes floats \(b, 2, h, w\)"):
        small()(wrong)


def test_presets_have_names_and_an_unknown_one_is_refused():
    with torch.device("meta"):
        assert all(isinstance(Hourglass.preset(name), Hourglass) for name in PRESETS)
    with pytest.raises(ValueError, match="denoise.*got 'house'"):
        Hourglass.preset("house")


def test_it_travels_in_a_checkpoint(tmp_path):
    net = small().eval()
    checkpoints.save(net, tmp_path / "x.safetensors", Card(
        name="x", recipe="test", data="none", images=0, steps=0, metrics={}))
    x = z(1, 2, 8, 8)
    assert torch.allclose(checkpoints.load(tmp_path / "x.safetensors")(x), net(x), atol=1e-2)  # half precision
