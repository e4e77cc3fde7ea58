"""The published U-Net: its counts, its shapes, what it does with times and labels, and what it refuses."""

import pytest
import torch
from support import DEVICES, randn
from torch import nn
from torch.testing import assert_close

from coursekit import checkpoints
from coursekit.checkpoints import Card
from coursekit.nets import Cs180UNet, cs180

PUBLISHED = [  # CS180, project 5, part B: unconditional, with time, with time and classes
    (128, {}, 7_891_073), (128, {"time": True}, 7_974_145), (128, {"time": True, "classes": 10}, 8_060_673),
    (64, {}, 1_975_361), (64, {"time": True}, 1_996_417), (64, {"time": True, "classes": 10}, 2_019_201)]

FORMS = {"plain": {}, "time": {"time": True}, "multiply": {"time": True, "modulation": "multiply"},
         "classes": {"time": True, "classes": 3}}


def small(**changes):
    """A network as after some training: running means and every bias have moved."""
    torch.manual_seed(0)
    net = Cs180UNet(**{"hidden": 4} | changes)
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.add_(0.1 * randn(*p.shape, seed=i, dtype=torch.float32))
        net.train()(*ARGUMENTS)
    return net.eval()


X = randn(3, 1, 28, 28, dtype=torch.float32)
T = torch.tensor([1, 150, 300])
LABEL = torch.tensor([0, 2, -1])
ARGUMENTS = (X, T)


@pytest.mark.parametrize("hidden, form, count", PUBLISHED)
def test_it_has_exactly_as_many_parameters_as_published(hidden, form, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in Cs180UNet(hidden, **form).parameters()) == count


@pytest.mark.parametrize("block, before, after", [
    (cs180.Conv(3, 5), (3, 28, 28), (5, 28, 28)),
    (cs180.DownConv(3, 5), (3, 28, 28), (5, 14, 14)),
    (cs180.UpConv(3, 5), (3, 7, 7), (5, 14, 14)),
    (cs180.Flatten(), (3, 7, 7), (3, 1, 1)),
    (cs180.Unflatten(3), (3, 1, 1), (3, 7, 7)),
    (cs180.ConvBlock(3, 5), (3, 14, 14), (5, 14, 14)),
    (cs180.DownBlock(3, 5), (3, 14, 14), (5, 7, 7)),
    (cs180.UpBlock(3, 5), (3, 14, 14), (5, 28, 28)),
    (cs180.FCBlock(10, 5), (10,), (5, 1, 1)),
], ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value))
def test_each_block_gives_the_published_shape(block, before, after):
    assert block(randn(2, *before, dtype=torch.float32)).shape == (2, *after)


def test_flatten_ends_in_gelu_and_a_condition_in_none():
    """GELU is never below -0.17; without one a condition can be anything."""
    low = torch.full((1, 2, 7, 7), -1.0)
    assert_close(cs180.Flatten()(low), nn.functional.gelu(torch.full((1, 2, 1, 1), -1.0)))
    assert cs180.FCBlock(1, 64)(torch.full((1, 1), 100.0)).min() < -0.2


@pytest.mark.parametrize("form", FORMS)
def test_the_answer_has_the_shape_and_dtype_of_the_question(form):
    net = small(**FORMS[form])
    for dtype in (torch.float32, torch.float64):
        answer = net.to(dtype)(X.to(dtype), T)
        assert answer.shape == X.shape and answer.dtype == dtype


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_says_nearly_the_same(form, dtype):
    net = small(**FORMS[form])
    exact = net(X, T)
    rough = net.to(dtype)(X.to(dtype), T)
    assert rough.dtype == dtype and (rough.float() - exact).abs().mean() < 0.05 * exact.abs().mean()


@pytest.mark.parametrize("device", DEVICES)
def test_it_runs_where_it_is_put(device):
    net = small(**FORMS["classes"])
    assert_close(net.to(device)(X.to(device), T.to(device), LABEL.to(device)).cpu(),
                 small(**FORMS["classes"])(X, T, LABEL), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_in_eval_mode_each_picture_is_answered_on_its_own(form):
    net = small(**FORMS[form])
    alone = torch.cat([net(x[None], t[None]) for x, t in zip(X, T, strict=True)])
    assert_close(alone, net(X, T), atol=1e-5, rtol=1e-4)
    net.train()
    assert not torch.allclose(net(X[:1], T[:1]), net(X, T)[:1], atol=1e-2)


def test_a_network_without_time_ignores_it():
    net = small()
    assert torch.equal(net(X), net(X, T)) and torch.equal(net(X, T), net(X, torch.rand(3)))


@pytest.mark.parametrize("form", ["time", "multiply", "classes"])
def test_what_it_sees_of_time_is_t_by_T(form):
    """The same weights at T = 300 and T = 1 agree where t / T agrees, and the time matters."""
    net, unit = small(**FORMS[form]), small(**FORMS[form], T=1.0)
    unit.load_state_dict(net.state_dict())
    assert_close(unit(X, T / 300), net(X, T))
    assert not torch.allclose(net(X, T), net(X, T.flip(0)), atol=1e-5)


@pytest.mark.parametrize("modulation, scale, shift", [("add", [1, 1], [0.5, -2]), ("multiply", [0.5, -2], [0, 0])])
def test_time_is_added_to_the_features_or_multiplied_with_them(modulation, scale, shift):
    """FCBlocks that always say 0.5 and -2, against the forward pass written out."""
    net = small(time=True, modulation=modulation)
    with torch.no_grad():
        for block, says in ((net.time1, 0.5), (net.time2, -2.0)):
            block[2].weight.zero_()
            block[2].bias.fill_(says)
        h0 = net.start(X)
        h1 = net.down1(h0)
        h2 = net.down2(h1)
        h = net.up1(torch.cat([scale[0] * net.unflatten(net.flatten(h2)) + shift[0], h2], 1))
        h = net.up2(torch.cat([scale[1] * h + shift[1], h1], 1))
        assert_close(net.out(net.end(torch.cat([h, h0], 1))), net(X, T))


def test_a_class_multiplies_and_time_is_added():
    """c * features + t, at both places, with a one-hot c."""
    net = small(**FORMS["classes"])
    wanted = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 0, 0]])
    with torch.no_grad():
        h0 = net.start(X)
        h1 = net.down1(h0)
        h2 = net.down2(h1)
        when = T[:, None] / 300
        h = net.class1(wanted) * net.unflatten(net.flatten(h2)) + net.time1(when)
        h = net.class2(wanted) * net.up1(torch.cat([h, h2], 1)) + net.time2(when)
        h = net.up2(torch.cat([h, h1], 1))
        assert_close(net.out(net.end(torch.cat([h, h0], 1))), net(X, T, LABEL))


def test_no_label_is_minus_one_is_nothing():
    net = small(**FORMS["classes"])
    none = net(X, T)
    assert torch.equal(none, net(X, T, torch.full((3,), -1)))
    assert torch.equal(net(X, T, LABEL)[2], none[2]) and not torch.allclose(net(X, T, LABEL)[:2], none[:2], atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_reach_every_parameter(form):
    net = small(**FORMS[form])  # in eval mode: in training mode a bias before a normalisation has none
    net(X, T, LABEL if form == "classes" else None).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in net.parameters())


@pytest.mark.parametrize("arguments", [{"hidden": 0}, {"classes": -1}, {"T": 0}, {"T": float("nan")},
                                       {"modulation": "times"}])
def test_a_network_that_cannot_be_is_refused(arguments):
    with pytest.raises(ValueError, match="hidden >= 1, classes >= 0, T > 0"):
        Cs180UNet(**{"hidden": 4, "time": True} | arguments)


def test_classes_need_time():
    with pytest.raises(ValueError, match="pass time=True with classes = 10"):
        Cs180UNet(4, classes=10)


@pytest.mark.parametrize("form, arguments, sentence", [
    ("plain", (X[:, 0],), r"images \(b, 1, h, w\), got \(3, 28, 28\)"),
    ("plain", (X.repeat(1, 3, 1, 1),), r"got \(3, 3, 28, 28\)"),
    ("plain", (X.byte(),), "float images"),
    ("plain", (X[..., :14, :14],), "28 x 28 pixels, got"),
    ("plain", (X.repeat(1, 1, 2, 1),), r"made for 28 x 28 pixels, got \(56, 28\)"),
    ("plain", (X, T, LABEL), "classes=0 and takes no label"),
    ("time", (X,), r"call it as model\(x_t, t\)"),
    ("time", (X, T[:2]), r"tensor of shape \(3,\), got shape \(2,\)"),
    ("time", (X, 7), r"tensor of shape \(3,\), got 7"),
    ("time", (X, T, LABEL), "classes=0 and takes no label"),
    ("classes", (X, T, LABEL + 1.0), "labels are integers"),
    ("classes", (X, T, LABEL[:2]), r"integers of shape \(3,\)"),
    ("classes", (X, T, LABEL + 1), "must lie in 0..2, or be -1 .* got values from 0 to 3"),
    ("classes", (X, T, LABEL - 1), "got values from -2 to 1"),
])
def test_what_does_not_fit_is_refused_in_a_sentence(form, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        small(**FORMS[form])(*arguments)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits, far", [(16, 0.002), (8, 0.05)])
def test_it_comes_back_from_a_file(form, bits, far, tmp_path):
    """The running means too: without them a loaded network would normalise as an untrained one does."""
    net, path = small(**FORMS[form]), tmp_path / "net.safetensors"
    checkpoints.save(net, path, Card(name="net", recipe="none", data="none", images=1, steps=1), bits=bits)
    back = checkpoints.load(path)
    assert back.config == net.config and not back.training
    wanted = net(X, T)
    assert 0 < (back(X, T) - wanted).abs().mean() < far * wanted.abs().mean()
