"""The sampling layer: TFP's law from torch's seeds; the promise to say what is missing holds where TFP is not there."""

import sys

import numpy as np
import pytest
import torch
from support import DEVICES, generator
from torch.testing import assert_close

from coursekit.sampling_layer import DistributionLambda, numpy_tfp


class Coin:
    """Stands in for a distribution of the numpy substrate: class 1 with the probability of the last logit's softmax."""

    def __init__(self, logits):
        self.p = 1 / (1 + np.exp(logits[..., 0] - logits[..., 1]))

    def sample(self, seed):
        return (np.random.default_rng(seed).random(self.p.shape) < self.p).astype(np.int32)

    def mode(self):
        return self.p > 0.5


@pytest.fixture
def tfp():
    pytest.importorskip("tensorflow_probability")
    return numpy_tfp()


def chi_square(counts, p):
    """Pearson's statistic as a p-value: small if the counts are not draws from p."""
    expected = p * counts.sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(p) - 1) / 2, dtype=torch.float64), statistic / 2).item()


@pytest.mark.parametrize("device", DEVICES)
def test_a_layer_has_no_weights_and_answers_with_codes_where_the_logits_are(device):
    layer = DistributionLambda(Coin)
    codes = layer(torch.zeros(3, 7, 7, 2, device=device), generator())
    assert not list(layer.parameters()) and codes.shape == (3, 7, 7)
    assert codes.dtype == torch.int64 and codes.device.type == device and set(codes.unique().tolist()) == {0, 1}


def test_all_randomness_is_that_of_the_generator():
    layer, logits = DistributionLambda(Coin), torch.zeros(500, 2)
    rng = generator(1)
    first, second = layer(logits, rng), layer(logits, rng)
    assert torch.equal(first, layer(logits, generator(1))) and not torch.equal(first, second)
    torch.manual_seed(4)
    without = layer(logits)
    torch.manual_seed(4)
    assert torch.equal(without, layer(logits))


def test_a_layer_can_hand_on_something_else_than_a_sample():
    layer = DistributionLambda(Coin, lambda coin, seed: coin.mode())
    assert layer(torch.tensor([[0.0, 1.0], [1.0, 0.0]])).tolist() == [True, False]
    mean = DistributionLambda(Coin, lambda coin, seed: coin.p)(torch.zeros(2, 2))
    assert_close(mean, torch.full((2,), 0.5))


def test_gradients_and_the_logits_themselves_are_left_alone():
    logits = torch.randn(4, 2, generator=generator()).requires_grad_()
    before = logits.detach().clone()
    codes = DistributionLambda(Coin)(logits, generator())
    assert not codes.requires_grad and torch.equal(logits, before)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_parameters_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match="must be finite"):
        DistributionLambda(Coin)(torch.tensor([[0.0, wrong]]))


def test_a_make_that_makes_nothing_is_refused():
    with pytest.raises(ValueError, match="got 'Categorical'"):
        DistributionLambda("Categorical")


def test_where_tfp_is_missing_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_probability", None)
    monkeypatch.delitem(sys.modules, "tensorflow_probability.substrates.numpy", raising=False)
    monkeypatch.delitem(sys.modules, "tensorflow_probability.substrates", raising=False)
    with pytest.raises(ImportError, match="pip install tensorflow-probability"):
        numpy_tfp()


def test_tfp_and_torch_draw_from_one_law(tfp):
    logits = torch.randn(12, generator=generator(2))
    p, many = logits.double().softmax(0), 40_000
    layer = DistributionLambda(tfp.distributions.Categorical)
    theirs = layer(logits.expand(many, 12), generator(3)).bincount(minlength=12)
    ours = torch.multinomial(p, many, replacement=True, generator=generator(3)).bincount(minlength=12)
    assert chi_square(theirs, p) > 1e-3 and chi_square(ours, p) > 1e-3
    warmer = (logits.double() / 1.1).softmax(0)
    assert chi_square(theirs, warmer) < 1e-6  # and the test can tell laws apart


def test_the_seed_of_the_generator_governs_tfp(tfp):
    layer, logits = DistributionLambda(tfp.distributions.Categorical), torch.zeros(2, 7, 7, 16)
    first = layer(logits, generator(5))
    assert first.shape == (2, 7, 7) and first.dtype == torch.int64
    assert torch.equal(first, layer(logits, generator(5)))
    assert not torch.equal(first, layer(logits, generator(6)))


def test_floats_stay_floats(tfp):
    normal = DistributionLambda(lambda mean: tfp.distributions.Normal(mean, np.float32(1)))
    x = normal(torch.full((4000,), 3.0), generator())
    assert x.dtype == torch.float32 and abs(x.mean().item() - 3) < 0.1
