"""Blocks, the U-Net and the classifier: how they start, what they may look at, what they refuse."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DEVICES
from torch.testing import assert_close

from coursekit.nets import Classifier, UNet
from coursekit.nets.blocks import (
    Downsample,
    ResBlock,
    SelfAttention,
    TimeEmbedding,
    Upsample,
    check_images,
    zeroed,
)

SMALL = {"in_channels": 2, "channels": (16, 32), "blocks": 1, "attention": (1,), "classes": 3}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def awake(net):
    """The network as after some training: nothing is zero any more."""
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.add_(0.1 * randn(*p.shape, seed=i))
    return net.eval()


def small(**changes):
    return awake(UNet(**SMALL | changes))


X, T, LABEL = randn(3, 2, 8, 12), torch.tensor([1, 500, 1000]), torch.tensor([0, 2, -1])


# --- blocks ---

@pytest.mark.parametrize("attention", [False, True])
def test_a_block_starts_as_the_identity(attention):
    x, emb = randn(2, 16, 5, 7), randn(2, 32, seed=1)
    assert torch.equal(ResBlock(16, 16, 32, attention=attention)(x, emb), x)
    assert ResBlock(16, 24, 32, attention=attention)(x, emb).shape == (2, 24, 5, 7)


def test_a_trained_block_listens_to_its_embedding():
    block, x = awake(ResBlock(16, 16, 32)), randn(2, 16, 5, 7)
    assert not torch.allclose(block(x, randn(2, 32)), block(x, randn(2, 32, seed=1)), atol=1e-2)


def test_dropout_acts_in_training_alone():
    block, x, emb = awake(ResBlock(16, 16, 32, dropout=0.5)), randn(2, 16, 5, 7), randn(2, 32)
    assert torch.equal(block(x, emb), block(x, emb))
    block.train()
    assert not torch.equal(block(x, emb), block(x, emb))


def test_attention_looks_everywhere_and_does_not_mind_where():
    """Every output pixel depends on every input pixel, and permuted pixels give permuted answers."""
    layer = awake(SelfAttention(64))
    x = randn(1, 64, 3, 4).requires_grad_()
    for i in range(3):
        for j in range(4):
            (gradient,) = torch.autograd.grad(layer(x)[0, :, i, j].square().sum(), x)
            assert (gradient.abs().sum(1) > 0).all()
    order = torch.randperm(12)
    shuffled = x.flatten(2)[..., order].view_as(x)
    assert_close(layer(shuffled), layer(x).flatten(2)[..., order].view_as(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("channels,heads", [(16, 1), (32, 1), (48, 1), (64, 2), (96, 3)])
def test_attention_is_softmax_over_pixels_by_its_formula(channels, heads):
    layer, x = awake(SelfAttention(channels)), randn(2, channels, 2, 3)
    q, k, v = layer.qkv(layer.norm(x)).flatten(2).chunk(3, dim=1)
    out = torch.empty_like(q)
    d = channels // heads
    for h in (slice(i * d, (i + 1) * d) for i in range(heads)):
        weights = (q[:, h].transpose(1, 2) @ k[:, h] / d**0.5).softmax(-1)  # (b, to, from)
        out[:, h] = v[:, h] @ weights.transpose(1, 2)
    assert layer.heads == heads
    assert_close(layer(x), x + layer.out(out.view_as(x)), atol=1e-5, rtol=1e-4)


def test_attention_refuses_channels_it_cannot_share_out():
    with pytest.raises(ValueError, match="multiple of 32 channels, got 104"):
        SelfAttention(104)


@given(h=st.integers(1, 8), w=st.integers(1, 8))
@settings(max_examples=10, deadline=None)
def test_resampling_halves_and_doubles(h, w):
    x, emb = randn(1, 8, 2 * h, 2 * w), randn(1, 4)
    assert Downsample(8, 12)(x, emb).shape == (1, 12, h, w)
    assert Upsample(8, 12)(x, emb).shape == (1, 12, 4 * h, 4 * w)


def test_zeroed_modules_are_silent():
    assert not zeroed(torch.nn.Conv2d(3, 4, 3))(randn(1, 3, 5, 5)).any()
    assert not zeroed(torch.nn.Conv2d(3, 4, 3, bias=False))(randn(1, 3, 5, 5)).any()


def test_the_time_embedding_is_sines_and_cosines_from_fast_to_slow():
    embed = TimeEmbedding(8, 5)
    embed.net = torch.nn.Identity()
    embed.register_parameter("weight", torch.nn.Parameter(torch.zeros(1)))
    code = embed(torch.tensor([0, 3]))
    assert_close(code[0], torch.tensor([0.0] * 4 + [1.0] * 4))
    angle = 3 * torch.tensor([1, 1e-1, 1e-2, 1e-3])
    assert_close(code[1], torch.cat([angle.sin(), angle.cos()]))


def test_time_is_told_apart_on_the_straight_path_as_on_a_thousand_steps():
    steps, path = TimeEmbedding(32, 64, T=1000), TimeEmbedding(32, 64, T=1.0)
    path.load_state_dict(steps.state_dict())
    t = torch.linspace(0, 1, 11)
    code = path(t)
    assert_close(code, steps((1000 * t).round().long()), atol=1e-4, rtol=1e-4)
    distance = torch.cdist(code, code) + torch.eye(11)
    assert distance.min() > 0.1 * code.norm(dim=1).mean()  # 0 from 1, and each tenth from the next
    unscaled = steps(t)
    assert torch.cdist(unscaled, unscaled)[0, 1] < 0.1 * torch.cdist(code, code)[0, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_do_not_move_the_angles(dtype):
    whole = TimeEmbedding(32, 64)
    half = TimeEmbedding(32, 64).to(dtype)
    half.load_state_dict(whole.state_dict())
    t = torch.tensor([1, 333, 777, 1000])
    assert half(t).dtype == dtype
    assert_close(half(t).float(), whole(t), atol=0.03, rtol=0.03)


@pytest.mark.parametrize("width,T,says", [(7, 1000, "width 7"), (0, 1000, "width 0"), (8, 0, "T = 0")])
def test_a_time_embedding_that_cannot_be_is_refused(width, T, says):
    with pytest.raises(ValueError, match=says):
        TimeEmbedding(width, 8, T)


# --- the U-Net ---

def test_a_new_unet_says_nothing():
    net = UNet(**SMALL)
    assert torch.equal(net(X, T, LABEL), torch.zeros_like(X))


@given(levels=st.integers(1, 3), blocks=st.integers(1, 2), patch=st.sampled_from([1, 2, 4]),
       size=st.tuples(st.integers(1, 3), st.integers(1, 3)), b=st.integers(1, 2), c=st.sampled_from([1, 3]),
       classes=st.sampled_from([0, 4]), attention=st.booleans())
@settings(max_examples=15, deadline=None)
def test_every_unet_keeps_the_shape_and_rebuilds(levels, blocks, patch, size, b, c, classes, attention):
    attends = (levels - 1,) if attention else ()
    net = awake(UNet(c, (16, 16, 32)[:levels], blocks, attends, classes, patch=patch))
    assert net.stride == patch * 2 ** (levels - 1)
    x, t = randn(b, c, *(net.stride * n for n in size)), torch.arange(1, b + 1)
    again = UNet(**net.config).eval()
    again.load_state_dict(net.state_dict())
    assert net(x, t).shape == x.shape and net(x, t).isfinite().all()
    assert torch.equal(again(x, t), net(x, t))


def test_an_answer_does_not_depend_on_the_rest_of_the_batch():
    net = small()
    together = net(X, T, LABEL)
    for i in range(3):
        assert_close(net(X[i:i + 1], T[i:i + 1], LABEL[i:i + 1])[0], together[i], atol=1e-5, rtol=1e-4)
    order = torch.tensor([2, 0, 1])
    assert_close(net(X[order], T[order], LABEL[order]), together[order], atol=1e-5, rtol=1e-4)


def test_images_times_and_labels_are_all_listened_to():
    net = small()
    said = net(X, T, LABEL)
    for other in (net(X.flip(-1), T, LABEL), net(X, T - 1, LABEL), net(X, T, torch.tensor([1, 1, 1]))):
        assert ((other - said).abs().amax((1, 2, 3)) > 1e-3).all()


def test_minus_one_is_no_label():
    net = small()
    assert torch.equal(net(X, T, torch.full((3,), -1)), net(X, T))
    assert torch.equal(net(X, T, torch.tensor([-1, 0, 1]))[0], net(X, T, torch.tensor([-1, 2, 2]))[0])
    assert not torch.allclose(net(X, T, torch.zeros(3, dtype=torch.long)), net(X, T))
    assert torch.equal(net(X, T, LABEL.to(torch.int8)), net(X, T, LABEL))


def test_gradients_reach_every_parameter():
    net = small().train()
    net(X, T, torch.tensor([0, 1, 2])).square().sum().backward()
    net(X, T).square().sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name


def test_a_new_unet_learns_from_its_first_steps():
    """Silent outputs must not be stuck: after two steps every layer has moved or has a gradient."""
    net = UNet(**SMALL | {"classes": 0})
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        (net(X, T) - X).square().mean().backward()
        optimizer.step()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())


def test_memory_format_does_not_change_the_answer():
    net = small()
    plain = net(X, T, LABEL)
    net = net.to(memory_format=torch.channels_last)
    assert_close(net(X.to(memory_format=torch.channels_last), T, LABEL), plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_says_nearly_the_same(dtype):
    whole = small()
    said = copy.deepcopy(whole).to(dtype)(X.to(dtype), T, LABEL)
    expected = whole(X, T, LABEL)
    assert said.dtype == dtype
    assert (said.float() - expected).square().mean() < 1e-3 * expected.square().mean()


@pytest.mark.parametrize("t", [torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.0, 0.5, 1.0]).half()])
def test_on_the_straight_path_times_are_floats(t):
    net = small(T=1.0)
    said = net(X[:1].expand(3, -1, -1, -1), t)
    assert (said[0] - said[1]).abs().max() > 1e-2 and (said[1] - said[2]).abs().max() > 1e-2


@pytest.mark.parametrize("device", DEVICES)
def test_networks_work_on_every_device(device):
    net, judge = small(), awake(Classifier(2, channels=(8, 16)))
    said, judged = net(X, T, LABEL), judge(X)
    net, judge = net.to(device), judge.to(device)
    assert_close(net(X.to(device), T.to(device), LABEL.to(device)).cpu(), said, atol=1e-3, rtol=1e-3)
    assert net(X.to(device), T.to(device)).device.type == device
    assert_close(judge(X.to(device)).cpu(), judged, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("arguments,says", [
    ((X[:, :, :7], T), r"stride 4, got \(7, 12\)"),
    ((X[:, :, :, :10], T), r"stride 4, got \(8, 10\)"),
    ((X[:, :1], T), r"\(b, 2, h, w\), got \(3, 1, 8, 12\)"),
    ((X[0], T), r"\(b, 2, h, w\), got \(2, 8, 12\)"),
    ((X.to(torch.uint8), T), "float images .* got torch.uint8"),
    (([0.0], T), "float images .* got list"),
    ((X[:, :, :0], T), "positive multiples"),
    ((X, T[:2]), r"shape \(3,\), got shape \(2,\)"),
    ((X, T[:1]), r"shape \(3,\), got shape \(1,\)"),
    ((X, T[:, None]), r"shape \(3,\), got shape \(3, 1\)"),
    ((X, 500), "one time per image, .* got 500"),
    ((X, T, torch.tensor([0, 3, 1])), r"0\.\.2, or be -1 .* from 0 to 3"),
    ((X, T, torch.tensor([0, -2, 1])), "from -2 to 1"),
    ((X, T, torch.tensor([0, 1])), r"integers of shape \(3,\), got torch.int64 \(2,\)"),
    ((X, T, torch.tensor([0.0, 1.0, 2.0])), r"integers .* torch.float32"),
])
def test_a_unet_refuses_what_does_not_fit(arguments, says):
    with pytest.raises(ValueError, match=says):
        small()(*arguments)


def test_a_network_without_classes_takes_no_label():
    with pytest.raises(ValueError, match="classes=0 and takes no label"):
        small(classes=0)(X, T, LABEL)


@pytest.mark.parametrize("wrong,says", [
    ({"channels": ()}, r"channels \[\]"), ({"blocks": 0}, "blocks = 0"), ({"patch": 0}, "patch = 0"),
    ({"classes": -1}, "classes = -1"), ({"attention": (2,)}, r"levels 0\.\.1, got \[2\]"),
    ({"attention": (-1,)}, r"got \[-1\]"), ({"T": 0}, "T = 0"), ({"channels": (12,)}, "divisible"),
])
def test_a_unet_that_cannot_be_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        UNet(**SMALL | {"attention": ()} | wrong)


def test_check_images_accepts_what_fits():
    check_images(torch.zeros(1, 3, 4, 8), channels=3, stride=4)


# --- the classifier ---

@given(h=st.integers(4, 13), w=st.integers(4, 13), b=st.integers(1, 3))
@settings(max_examples=10, deadline=None)
def test_the_classifier_takes_any_size(h, w, b):
    net, x = Classifier(2, 5, (8, 8, 16)), randn(b, 2, h, w)
    assert net(x).shape == (b, 5) and net.features(x).shape == (b, 16)
    assert_close(net(x), net.head(net.features(x)))


def test_the_classifier_rebuilds_from_its_config_and_judges_each_image_alone():
    net = awake(Classifier(2, 5, (8, 16)))
    again = Classifier(**net.config)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(X), net(X))
    for i in range(3):
        assert_close(net(X[i:i + 1])[0], net(X)[i], atol=1e-5, rtol=1e-4)
    assert torch.equal(net.train()(X), net.eval()(X))  # no running averages, no mode to forget


def test_gradients_reach_every_parameter_of_the_classifier():
    net = awake(Classifier(2, 5, (8, 16)))
    net(X).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_classifier_works_in_half_precision(dtype):
    assert Classifier(2).to(dtype)(X.to(dtype)).dtype == dtype


@pytest.mark.parametrize("x,says", [
    (X[:, :1], r"\(b, 2, h, w\), got \(3, 1, 8, 12\)"),
    (X.to(torch.uint8), "float images .* torch.uint8"),
    (X[:, :, :3], r"at least 4 pixels a side, got \(3, 12\)"),
])
def test_the_classifier_refuses_what_does_not_fit(x, says):
    with pytest.raises(ValueError, match=says):
        Classifier(2)(x)
