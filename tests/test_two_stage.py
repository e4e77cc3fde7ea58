"""The whole pipeline in one call: both priors, one generator, clear refusals."""

from dataclasses import replace

import pytest
import torch

from coursekit import data
from coursekit.data import Images
from coursekit.denoisers import from_x0
from coursekit.nets import PixelCNN, UNet
from coursekit.schedules import cosine_schedule
from coursekit.two_stage import coding_loss, decoded, draw_latents, prior_loss, two_stage


@pytest.fixture(scope="module")
def digits() -> Images:
    return data.load("mnist", limit=256)


def pipeline(digits: Images, prior: str, seed: int = 0, **more):
    settings = {"coder_steps": 6, "prior_steps": 3, "batch_size": 16, "n": 3, "progress": False} | more
    return two_stage(digits, prior, rng=torch.Generator().manual_seed(seed), **settings)


@pytest.mark.parametrize(("prior", "net"), [("pixelcnn", PixelCNN), ("diffusion", UNet)])
def test_it_makes_images_that_are_its_codes_decoded(digits, prior, net):
    made = pipeline(digits, prior)
    assert isinstance(made.prior, net)
    assert made.codes.shape == (3, 7, 7) and made.codes.dtype == torch.int64
    assert made.samples.shape == (3, 1, 28, 28) and made.samples.abs().max() <= 1
    assert torch.equal(made.samples, decoded(made.coder, made.codes))
    assert not any(p.requires_grad for p in made.coder.parameters())


@pytest.mark.parametrize("prior", ["pixelcnn", "diffusion"])
def test_labels_are_learned_where_there_are_some_and_drawn_first(digits, prior):
    told = pipeline(digits, prior)
    assert told.prior.config["classes"] == 10 and told.labels.shape == (3,) and told.labels.min() >= 0
    untold = pipeline(replace(digits, labels=None), prior)
    assert untold.prior.config["classes"] == 0 and untold.labels is None


def test_what_is_drawn_is_what_the_label_asks_for(digits):
    """Black and white squares, of labels 0 and 1: after a short training each sample has its label's colour."""
    label = torch.arange(64) % 2
    x = (255 * label).to(torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8).contiguous()
    for prior in ("pixelcnn", "diffusion"):
        made = two_stage(Images(x, label, "squares", "drawn"), prior, coder_steps=40, prior_steps=60, batch_size=16,
                         n=8, rng=torch.Generator().manual_seed(0), progress=False)
        assert torch.equal((made.samples.mean((1, 2, 3)) > 0).long(), made.labels)


@pytest.mark.parametrize("prior", ["pixelcnn", "diffusion"])
def test_all_its_randomness_is_the_generators(digits, prior):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = pipeline(digits, prior)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(pipeline(digits, prior).samples, one.samples)
    assert not torch.equal(pipeline(digits, prior, seed=1).samples, one.samples)


def test_without_a_generator_no_two_are_the_same(digits):
    one, two = (two_stage(digits, coder_steps=2, prior_steps=2, batch_size=8, n=2, progress=False) for _ in range(2))
    assert not torch.equal(one.samples, two.samples)


def test_the_coder_is_told_the_statistics_of_what_it_encodes(digits):
    coder = pipeline(digits, "pixelcnn").coder
    z = coder.normalise(coder.encode(digits.to_float()))
    assert z.mean((0, 2, 3)).abs().max() < 1e-3
    assert (z.std((0, 2, 3)) - 1).abs().max() < 1e-2


def test_longer_training_codes_better(digits):
    rng = torch.Generator().manual_seed(0)
    short, long = (pipeline(digits, "pixelcnn", coder_steps=steps).coder for steps in (2, 60))
    x = digits.to_float()[:64]
    assert coding_loss(long, x, 0.38, rng) < 0.7 * coding_loss(short, x, 0.38, rng)


def test_a_prior_that_knows_nothing_pays_the_logarithm_of_the_book(digits):
    made = pipeline(digits, "pixelcnn")
    with torch.no_grad():
        for p in made.prior.parameters():
            p.zero_()
    nats = prior_loss(made.prior, digits.to_float()[:8], made.coder)
    torch.testing.assert_close(nats, torch.tensor(128.0).log())


def test_latents_are_drawn_in_the_units_of_the_encoder(digits):
    """A denoiser that always says 0 ends where the encoder's mean is."""
    coder, schedule = pipeline(digits, "pixelcnn").coder, cosine_schedule()

    class Zero(torch.nn.Module):
        def forward(self, x, t):
            return torch.zeros_like(x)

    z = draw_latents(from_x0(Zero(), schedule), schedule, coder, 2, (7, 7), torch.Generator().manual_seed(0), 4, False)
    torch.testing.assert_close(z, coder.mean[:, None, None].expand(2, -1, 7, 7))


def test_other_sizes_and_colours_work():
    x = torch.randint(0, 256, (32, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for prior in ("pixelcnn", "diffusion"):
        made = pipeline(Images(x, None, "noise", "drawn"), prior, n=1)
        assert made.codes.shape == (1, 4, 4) and made.samples.shape == (1, 3, 16, 16)


@pytest.mark.parametrize(("change", "words"), [
    ({"prior": "pixel"}, "the prior is"), ({"n": 0}, "n must be at least 1"), ({"coder_steps": 0}, "steps >= 1"),
    ({"prior_steps": 0}, "steps >= 1"), ({"batch_size": 300}, "batch_size must lie in 1..256")])
def test_what_cannot_be_is_refused(digits, change, words):
    with pytest.raises(ValueError, match=words):
        pipeline(digits, **({"prior": "pixelcnn"} | change))


def test_sides_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="divisible by 4"):
        pipeline(Images(torch.zeros(32, 1, 30, 30, dtype=torch.uint8), None, "black", "drawn"), "pixelcnn")
