"""PixelCNN: what each site may see, the blind spot and its absence, counts, and samples that compute nothing twice."""

import itertools
import math

import pytest
import torch
from support import DEVICES, generator
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from coursekit import checkpoints
from coursekit.checkpoints import Card
from coursekit.nets import PixelCNN
from coursekit.nets.pixelcnn import SEES, MaskedConv, pick

KINDS = {"gated": {"width": 8, "layers": 6}, "masked": {"width": 8, "layers": 2}}


def small(kind, **changes):
    """A network whose every weight has moved, so that nothing is zero by accident."""
    torch.manual_seed(0)
    net = PixelCNN(**{"codes": 5, "size": 7, "kind": kind} | KINDS[kind] | changes).double().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator(1), dtype=p.dtype))
    return net


def some(n=3, codes=5, size=7, seed=0):
    return torch.randint(codes, (n, size, size), generator=generator(seed))


def seen(net, i, j):
    """(size, size) bool: whose features have a gradient in the logits of site (i, j)."""
    first = net.stack.first(some()).detach().requires_grad_()
    weights = torch.randn(5, generator=generator(2), dtype=torch.float64)
    (net.stack(first)[:, :, i, j] @ weights).sum().backward()
    return first.grad.abs().sum((0, 1)) > 0


# ------------------------------------------------------------------------------------------- what is seen


@pytest.mark.parametrize("kind", KINDS)
def test_no_site_sees_itself_or_what_comes_after(kind):
    net, order = small(kind), torch.arange(49).view(7, 7)
    for i, j in itertools.product(range(7), repeat=2):
        assert not (seen(net, i, j) & (order >= 7 * i + j)).any()


def test_the_gated_stack_sees_everything_before():
    net, order = small("gated"), torch.arange(49).view(7, 7)
    for i, j in [(0, 1), (1, 0), (3, 3), (4, 1), (6, 6)]:
        assert torch.equal(seen(net, i, j), order < 7 * i + j)


def test_a_gated_layer_more_sees_a_row_and_a_column_more():
    net = small("gated", layers=3)
    rows, columns = seen(net, 5, 5).nonzero().T
    assert rows.min() == 2 and columns.min() == 2  # three up and three to the left


def test_masked_convolutions_of_three_have_a_blind_spot_to_the_right():
    """Stacked 3 x 3 masks reach up and to the right one column a row, never further: a wedge stays unseen."""
    layers = [MaskedConv(1, 1, (3, 3), "before"), *(MaskedConv(1, 1, (3, 3), "up to") for _ in range(6))]
    net = nn.Sequential(*layers).double()
    x = torch.randn(1, 1, 9, 9, generator=generator(), dtype=torch.float64).requires_grad_()
    net(x)[0, 0, 5, 4].backward()
    y, right = torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij")
    reach = torch.where(y < 5, right - 4 <= 5 - y, right < 4) & (y <= 5)  # one column more a row
    assert torch.equal(x.grad[0, 0] != 0, reach)


@pytest.mark.parametrize("sees, picture", [
    ("before", ["xxx", "x..", "..."]), ("up to", ["xxx", "xx.", "..."]),
    ("above", ["xxx", "...", "..."]), ("rows", ["xxx", "xxx", "..."])])
def test_masks_as_pictures(sees, picture):
    wanted = torch.tensor([[c == "x" for c in row] for row in picture]).float()
    assert torch.equal(MaskedConv(1, 1, (3, 3), sees).mask, wanted) and sees in SEES


def test_masked_weights_stay_unread_when_training_moves_them():
    conv = MaskedConv(1, 1, (3, 3), "before")
    with torch.no_grad():
        conv.weight.fill_(1.0)
    conv(torch.ones(1, 1, 5, 5)).sum().backward()
    assert torch.equal(conv.weight.grad != 0, conv.mask.view(1, 1, 3, 3) > 0)


# -------------------------------------------------------------------------------------------- counts, law


def test_the_masked_stack_has_exactly_the_published_number_of_parameters():
    with torch.device("meta"):
        assert sum(p.numel() for p in PixelCNN.preset("keras").parameters()) == 1_049_728


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_of_all_grids_sum_to_one(kind):
    """Every grid of 2 x 2 codes out of three: 81 of them, whose probabilities the chain rule multiplies."""
    net = small(kind, codes=3, size=2)
    grids = torch.tensor(list(itertools.product(range(3), repeat=4))).view(-1, 2, 2)
    log_p = net(grids).log_softmax(1).gather(1, grids[:, None]).sum((1, 2, 3))
    assert_close(log_p.exp().sum().item(), 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_have_the_law_that_the_logits_say(kind):
    """All 81 grids, 20,000 draws: no count further than five standard errors from its expectation."""
    net = small(kind, codes=3, size=2)
    grids = torch.tensor(list(itertools.product(range(3), repeat=4))).view(-1, 2, 2)
    p = net(grids).log_softmax(1).gather(1, grids[:, None]).sum((1, 2, 3)).exp()
    n = 20_000
    drawn = net.sample(n, generator(5)).flatten(1) @ torch.tensor([27, 9, 3, 1])
    counts = torch.bincount(drawn, minlength=81)
    assert ((counts - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt() + 1).all()


def test_one_step_of_learning_lowers_the_loss():
    torch.manual_seed(0)
    net, codes = PixelCNN(codes=5, width=8), some(16)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        losses.append(nn.functional.cross_entropy(net(codes), codes))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] and abs(losses[0].item() - math.log(5)) < 0.5


# ----------------------------------------------------------------------------------------------- sampling


def naive(net, n, rng, temperature=1.0, **told):
    """49 runs of the whole network, one for each site."""
    size = net.config["size"]
    codes = torch.zeros(n, size, size, dtype=torch.int64)
    for i, j in itertools.product(range(size), repeat=2):
        codes[:, i, j] = pick(net(codes, **told)[:, :, i, j], rng, temperature)
    return codes


# ----------------------------------------------------------------------------------------------- labels


def labelled(size=7):
    """A small network that says something else for each of three labels."""
    net = small("gated", size=size, classes=3)
    net.stack.label.weight.data = torch.randn(net.stack.label.weight.shape, generator=generator(8)).double()
    return net


def test_a_label_changes_every_site_and_no_label_is_one_more():
    net, codes = labelled(), some(1).expand(4, -1, -1)
    said = net(codes, torch.tensor([0, 1, 2, -1])).detach()
    for a, b in itertools.combinations(said, 2):
        assert ((a - b).abs().amax(0) > 1e-4).all()
    assert_close(net(codes), said[3:].expand(4, -1, -1, -1))


def test_all_layers_hear_the_label():
    net = labelled()
    net(some(4), torch.tensor([0, 1, 2, -1])).square().sum().backward()
    for told in net.stack.label.weight.grad.view(4, net.config["layers"], -1).unbind(1):
        assert (told.abs().amax(1) > 0).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_labelled_samples_are_those_of_the_naive_loop(temperature):
    net, label = labelled(), torch.tensor([0, 1, 2, -1, 1])
    assert torch.equal(net.sample(5, generator(2), temperature, label=label),
                       naive(net, 5, generator(2), temperature, label=label))


def test_labels_that_nobody_asked_for_are_drawn_first():
    net, rng = labelled(), generator(3)
    label = torch.randint(3, (40,), generator=rng)
    assert torch.equal(net.sample(40, generator(3)), net.sample(40, rng, label=label))


@pytest.mark.parametrize("w", [0.0, 0.5, 1.0, 2.5])
def test_guidance_leads_away_from_what_is_said_untold(w):
    net, label = labelled(), torch.tensor([0, 1, 2])

    class Led(nn.Module):
        config = net.config

        def forward(self, codes):
            return torch.lerp(net(codes), net(codes, label), w)
    found = net.sample(3, generator(2), label=label, w=w)
    assert torch.equal(found, naive(Led(), 3, generator(2)))
    if w == 0:
        assert torch.equal(found, net.sample(3, generator(2), label=torch.full((3,), -1)))
    if w == 2.5:
        assert not torch.equal(found, net.sample(3, generator(2), label=label))


@pytest.mark.parametrize("call, words", [
    (lambda: small("gated")(some(1), torch.tensor([0])), "classes=0 and takes no label"),
    (lambda: small("gated").sample(1, label=torch.tensor([0])), "classes=0 and takes no label"),
    (lambda: labelled()(some(2), torch.tensor([0])), r"shape \(2,\)"),
    (lambda: labelled().sample(1, label=torch.tensor([3])), "0..2, or be -1"),
    (lambda: small("gated").sample(1, w=2.0), "knows no labels"),
    (lambda: PixelCNN(kind="masked", classes=3), "labels are for the gated kind"),
    (lambda: PixelCNN(classes=-1), "at least 0")])
def test_labels_that_cannot_be_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("size", [1, 2, 7])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_those_of_the_naive_loop_from_the_same_randomness(kind, temperature, size):
    net = small(kind, size=size)
    with torch.no_grad():
        wanted = naive(net, 9, generator(3), temperature)
    assert torch.equal(net.sample(9, generator(3), temperature), wanted)
    if temperature and size == 7:
        assert not torch.equal(net.sample(9, generator(4), temperature), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_while_sampling_are_those_of_the_whole_network(kind):
    net, codes = small(kind), some(4, seed=8)
    asked = []

    class Told:
        """Stands in for the random choice, and puts down what was asked."""

        def __call__(self, logits, *rest):
            asked.append(logits)
            i, j = divmod(len(asked) - 1, 7)
            return codes[:, i, j]
    from coursekit.nets import pixelcnn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pixelcnn, "pick", Told())
        net.sample(4)
    assert_close(torch.stack(asked, -1).view(4, 5, 7, 7), net(codes).detach())


@pytest.mark.parametrize("name", ["gated", "keras"])
def test_sampling_computes_each_site_once(name):
    """The naive loop runs the whole network 49 times. tests/benchmarks/bench_codes.py measures the seconds."""
    net, work = PixelCNN.preset(name).eval(), []
    for job in (lambda: net(some(8, 128)), lambda: net.sample(8)):
        with torch.no_grad(), FlopCounterMode(display=False) as counted:
            job()
        work.append(counted.get_total_flops())
    whole, sample = work
    assert 0.3 * whole < sample <= whole


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_codes_on_the_device_of_the_network(kind, device):
    net = small(kind).float().to(device)
    codes = net.sample(3, generator())
    assert codes.shape == (3, 7, 7) and codes.dtype == torch.int64 and codes.device.type == device
    assert net(codes).shape == (3, 5, 7, 7) and net.sample(0).shape == (0, 7, 7)


def test_sampling_leaves_dropout_off():
    net = small("gated", dropout=0.5).train()
    assert torch.equal(net.sample(4, generator()), net.eval().sample(4, generator()))


def test_a_pick_follows_its_probabilities_and_temperature_sharpens_them():
    logits, n = torch.tensor([0.0, 1.0, 2.0]), 30_000
    for temperature in (0.5, 1.0, 3.0):
        p = (logits / temperature).softmax(0)
        found = torch.bincount(pick(logits.expand(n, 3), generator(1), temperature), minlength=3) / n
        assert ((found - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()
    assert (pick(logits.expand(9, 3), None, 0) == 2).all()


def test_a_pick_is_the_likeliest_as_it_freezes_and_nan_is_no_code():
    assert pick(torch.tensor([[0.0, 3.0, 2.0]]), temperature=1e-39).item() == 1
    with pytest.raises(ValueError, match="NaN"):
        pick(torch.tensor([[0.0, float("nan")]]))


def test_a_pick_never_takes_what_is_impossible():
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf]).expand(5000, 5)
    assert set(pick(logits, generator()).tolist()) == {1, 3}


# ----------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("wrong, sentence", [
    ({"kind": "row"}, "'row'"), ({"codes": 1}, "two codes"), ({"width": 7}, "even width"),
    ({"layers": 0}, "layers of at least 1"), ({"size": 0}, "size"), ({"dropout": 1.0}, "dropout")])
def test_settings_that_cannot_be_right_are_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        PixelCNN(**wrong)


@pytest.mark.parametrize("wrong, sentence", [
    (torch.zeros(1, 7, 7), "int64"), (torch.zeros(1, 6, 7, dtype=torch.int64), r"\(b, 7, 7\)"),
    (torch.zeros(7, 7, dtype=torch.int64), r"\(b, 7, 7\)"),
    (torch.full((1, 7, 7), 5), "from 0 to 4, got 5 to 5"), (torch.full((1, 7, 7), -1), "from 0 to 4, got -1")])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_of_another_kind_are_refused(kind, wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        small(kind)(wrong)


def test_unknown_presets_and_senseless_draws_are_refused():
    with pytest.raises(ValueError, match="keras, gated, got 'tf'"):
        PixelCNN.preset("tf")
    with pytest.raises(ValueError, match="at least 0, got -1"):
        small("gated").sample(-1)
    with pytest.raises(ValueError, match="temperature is at least 0"):
        pick(torch.zeros(1, 3), None, -0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_it_travels_in_a_checkpoint(kind, tmp_path):
    net = small(kind).float()
    checkpoints.save(net, tmp_path / "x.safetensors", Card(
        name="x", recipe="test", data="none", images=0, steps=0, metrics={}))
    again = checkpoints.load(tmp_path / "x.safetensors")
    assert_close(again(some()), net(some()), atol=2e-2, rtol=1e-2)  # half precision
