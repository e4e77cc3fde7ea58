"""Measures say of a perfect model what is true of it."""

import math
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from support import Says
from torch import nn
from torch.testing import assert_close

from coursekit import data, measures
from coursekit.checkpoints import pretrained
from coursekit.data import Images
from coursekit.diffusion import rate_distortion
from coursekit.nets import UNet
from coursekit.nets.vqvae import Coded
from coursekit.schedules import cosine_schedule
from coursekit.toys import GaussianData

PATH = {"name": "cosine", "T": 1000}


@pytest.fixture(scope="module")
def test_digits():
    return data.load("mnist", "test", limit=600)


class Remembers(nn.Module):
    """Answers with the clean images it was shown last, whatever the noise and the label."""

    config: ClassVar = {"classes": 10}

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


def test_sending_says_what_rate_distortion_says_of_the_same_images():
    """A perfect model of Gaussian pixels: four images; then 65, the last of which is a batch of its own."""
    rng, schedule = torch.Generator().manual_seed(0), cosine_schedule()
    x = (0.3 * torch.randn(70, 3, 4, 4, generator=rng)).clamp(-1, 1).add(1).mul(127.5).round().byte()
    images, denoise = Images(x, None, "some", "made here"), GaussianData(0.0, 0.09).denoiser(schedule)
    model = Says(lambda x_t, t: denoise(x_t, t).x0)
    found = measures.sending(PATH, "x0", n=4, jumps=10)(model, images)
    right = rate_distortion(denoise, images.to_float()[:4], schedule, schedule.spaced(10, 2.0), rng.manual_seed(0))
    rates, errors = found["rate curve, bits per dimension"], found["distortion curve, RMSE in grey levels"]
    assert found["bits per dimension, bound, 4 test images, 10 jumps"] == pytest.approx(right.bound.item(), abs=1e-3)
    assert rates == pytest.approx(right.rate.tolist(), abs=1e-4)
    assert errors == pytest.approx(right.rmse.tolist(), abs=0.01)
    assert (found["of which rate, before the last jump"], found["RMSE before the last jump, grey levels"]) == (
        pytest.approx(rates[-1], abs=1e-3), pytest.approx(errors[-1], abs=0.01))
    many = measures.sending(PATH, "x0", n=65, jumps=60)(model, images)
    assert len(many["rate curve, bits per dimension"]) == 50 and rates == sorted(rates)
    entropy = math.log2(0.3 * 127.5 * math.sqrt(2 * math.pi * math.e))  # of a Gaussian rounded to bytes, nearly
    assert many["bits per dimension, bound, 65 test images, 60 jumps"] == pytest.approx(entropy, abs=0.15)


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


class Coder(nn.Module):
    """A VQ-VAE that gives back what it was shown, with codes that a test has chosen."""

    def __init__(self, codes):
        super().__init__()
        self.codes, self.at = codes, 0

    def forward(self, x):
        codes, self.at = self.codes[self.at:self.at + len(x)], self.at + len(x)
        return Coded(x, codes, x.sum())


def test_coding_without_error_has_none_and_counts_its_codes(test_digits):
    codes = torch.arange(4).repeat(600 * 49 // 4).view(600, 7, 7)
    found = list(measures.coding(Coder(codes), test_digits).values())
    assert found == [0.0, 4.0, 4, pytest.approx(0, abs=1e-3)]


def test_measuring_leaves_the_book_as_it_was(test_digits):
    coder = pretrained("mnist-vqvae").train()
    before = coder.quantizer.vectors.clone()
    codes = measures.codes_of(coder, test_digits.x)
    assert codes.shape == (600, 7, 7) and torch.equal(coder.quantizer.vectors, before)
    alone = coder.eval()(test_digits.to_float()[5:6]).codes
    assert torch.equal(codes[5:6], alone)


def test_places_on_their_own_have_the_shares_that_were_counted():
    codes = torch.tensor([[0, 2], [0, 2], [1, 2]])
    p = measures.on_its_own(codes, K=3).exp()  # (2 places, 3 codes), each code counted once more
    assert_close(p, torch.tensor([[3 / 6, 2 / 6, 1 / 6], [1 / 6, 1 / 6, 4 / 6]]))


class Marginals(nn.Module):
    """A prior that draws every place on its own."""

    def __init__(self, log_p):
        super().__init__()
        self.config, self.log_p = {"codes": 128, "classes": 0}, log_p

    def forward(self, codes, label):
        return self.log_p.T.reshape(1, 128, 7, 7).expand(len(codes), -1, -1, -1)

    def sample(self, n, rng):
        return torch.multinomial(self.log_p.exp(), n, replacement=True, generator=rng).T.reshape(n, 7, 7)


def test_a_prior_without_neighbours_is_as_good_as_places_on_their_own(test_digits):
    log_p = measures.on_its_own(measures.codes_of(pretrained("mnist-vqvae"), data.load("mnist").x), 128)
    found = measures.prior(Marginals(log_p), test_digits, n=600)
    nats, alone, distance, sure, real = found.values()
    assert nats == pytest.approx(alone, abs=0.02) and 49 < nats < 49 * 4.86  # of at most 49 log 128
    assert sure < 0.6 < real and distance > 1  # such digits are none


class TwoKinds(nn.Module):
    """A prior of two labels: one draws 0 at every site, one draws 1, each with probability 0.9."""

    config: ClassVar = {"codes": 2, "classes": 2}

    def forward(self, codes, label):
        ours = torch.where(label == 0, 0.9, 0.1)[:, None, None].expand(codes.shape)
        return torch.stack([ours, 1 - ours], 1).log()


def test_nats_of_codes_are_averaged_over_the_labels_they_may_have():
    codes = torch.tensor([[[0, 0, 0, 0]], [[0, 1, 0, 1]]])
    p = torch.tensor([(0.9**4 + 0.1**4) / 2, 0.9**2 * 0.1**2])
    assert_close(measures.nats_of(TwoKinds(), codes), -p.log())
    assert_close(measures.nats_of(TwoKinds(), codes, torch.tensor([0, 0]))[0], torch.tensor(-4 * math.log(0.9)))


def test_latents_are_asked_for_labels_where_the_network_knows_them(test_digits):
    """What is drawn for a label is that label's: a network that writes the latents of one digit of each kind."""
    coder = pretrained("mnist-vqvae")
    first = torch.stack([test_digits.to_float()[test_digits.labels == k][0] for k in range(10)])
    with torch.no_grad():
        z, heard = coder.normalise(coder.encode(first)), []

    class Obeys(nn.Module):
        config: ClassVar = {"classes": 10}

        def forward(self, x, t, label):
            heard.append(label)
            return z[label]
    found = measures.latent_drawing(PATH, "x0", n=500, steps=2)(Obeys(), test_digits)
    assert set(heard[0].tolist()) == set(range(10)) and torch.equal(heard[0], heard[1])
    assert list(found.values())[1] > 0.6  # sure of most: they are real digits


def test_latents_that_are_known_are_drawn_and_decoded(test_digits):
    """A network that answers with the latents of real digits: what is drawn are their reconstructions."""
    coder, few = pretrained("mnist-vqvae"), replace(test_digits, x=test_digits.x[:500], labels=None)
    with torch.no_grad():
        z = coder.normalise(coder.encode(few.to_float()))
    found = measures.latent_drawing(PATH, "x0", n=500, steps=3)(Remembers(z), few)
    distance, sure, real, how = found.values()
    assert distance < 0.01 and sure == pytest.approx(real, abs=0.03) and how == "3 ancestral steps"


def test_confidence_is_a_probability_and_high_on_digits(test_digits):
    sure, lost = measures.confidence(test_digits.to_float()), measures.confidence(torch.zeros(3, 1, 28, 28))
    assert sure.shape == (600,) and lost.min() >= 0.1 and sure.max() <= 1 and sure.median() > 0.9 > lost.max()
