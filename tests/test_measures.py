"""Measures say of a perfect model what is true of it."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from coursekit import data, measures
from coursekit.data import Images
from coursekit.nets import UNet
from coursekit.schedules import cosine_schedule
from coursekit.toys import GaussianData

PATH = {"name": "cosine", "T": 1000}


@pytest.fixture(scope="module")
def test_digits():
    return data.load("mnist", "test", limit=600)


class Remembers(nn.Module):
    """Answers with the clean images it was shown last, whatever the noise."""

    def __init__(self, x0):
        super().__init__()
        self.x0 = x0

    def forward(self, x_t, t=None, label=None):
        return self.x0[:len(x_t)]


def test_the_spread_within_labels_ignores_where_the_labels_lie():
    labels = torch.arange(200) % 2
    seen = torch.randn(200, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moved = seen + 100 * labels[:, None]
    assert measures.within(moved, labels) == pytest.approx(measures.within(seen, labels))
    assert measures.within(2 * seen, labels) == pytest.approx(4 * measures.within(seen, labels))
    assert measures.within(labels[:, None].double(), labels) == 0


def test_the_classifier_reads_real_digits(test_digits):
    right = (measures.read(test_digits.to_float()) == test_digits.labels).float().mean()
    assert right > 0.98


@pytest.mark.parametrize("ancestral", [True, False])
def test_drawing_samples_the_law_of_the_denoiser(ancestral, test_digits):
    """1,000 draws: two batches, not the same one twice, of the Gaussian whose denoiser is a formula."""
    schedule = cosine_schedule()
    denoise = GaussianData(torch.tensor(0.3), torch.tensor(0.04)).denoiser(schedule)
    few = Images(test_digits.x[:, :, :2, :2], None, "corners", "drawn")
    x = measures.draw(denoise, schedule, 1000, 250, few, ancestral)
    assert x.shape == (1000, 1, 2, 2) and not torch.equal(x[:500], x[500:])
    assert abs(x.mean() - 0.3) < 5 * 0.2 / 4000**0.5 + 0.01
    assert abs(x.std() - 0.2) < 0.02


def test_a_model_that_knows_the_answer_has_no_error(test_digits):
    model = Remembers(test_digits.to_float()[:256])
    found = measures.denoising(PATH, "x0")(model, test_digits)
    assert min(v for k, v in found.items() if "PSNR" in k) > 100
    few = Images(test_digits.x[:300], None, "mnist", "cut")
    (known,) = measures.known_noise(1.0)(Remembers(few.to_float()), few).values()
    assert known > 100


def test_drawing_real_digits_measures_little_more_than_the_floor(test_digits):
    """A model that always answers with training digits draws exactly those."""
    model = Remembers(data.load("mnist", limit=2000).to_float()[1000:1500])
    found = measures.drawing(PATH, "x0", n=500, steps=2)(model, data.load("mnist", "test"))
    of_samples, of_training = found.values()
    assert of_samples == pytest.approx(of_training, rel=0.35)


def test_obedience_tells_a_model_that_obeys_from_one_that_does_not(test_digits):
    class Obeys(nn.Module):
        """With a label one training digit of that kind, without a label a one."""

        def __init__(self):
            super().__init__()
            digits = data.load("mnist", limit=5000)
            self.ones = digits.to_float()[digits.labels == 1][:500]
            groups = [digits.to_float()[digits.labels == k] for k in range(10)]
            self.rows = torch.stack([groups[i % 10][i // 10] for i in range(500)])

        def forward(self, x_t, t, label=None):
            return self.ones if label is None else self.rows

    table = measures.obedience(PATH, "x0", n=500, steps=2, weights=(0, 1))(
        Obeys(), data.load("mnist", "test"))["by guidance weight"]
    assert table["0"]["agreement"] == pytest.approx(0.1, abs=0.01) and table["1"]["agreement"] > 0.98
    assert table["1"]["diversity"] == pytest.approx(1, abs=0.2)
    assert table["1"]["Frechet distance"] < 0.3 < table["0"]["Frechet distance"]


def test_labels_are_asked_for_where_there_are_none():
    with pytest.raises(ValueError, match="with labels"):
        measures.accuracy(nn.Identity(), Images(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), None, "cats", "drawn"))


def test_the_accuracy_of_a_coin_is_a_tenth(test_digits):
    class Always(nn.Module):
        def forward(self, x):
            return torch.eye(10)[torch.zeros(len(x), dtype=torch.long)]

    (share,) = measures.accuracy(Always(), test_digits).values()
    assert_close(share, (test_digits.labels == 0).double().mean().item())


def test_a_network_of_the_course_can_be_measured(test_digits):
    found = measures.drawing(PATH, "v", n=500, steps=1)(UNet(1, (16, 32), blocks=1), test_digits)
    assert all(value > 0 for value in found.values())
