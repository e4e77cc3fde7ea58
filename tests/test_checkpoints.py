"""Checkpoints come back as they were saved, or not at all; each card is true."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from coursekit import checkpoints, recipes
from coursekit.checkpoints import Card, available, build_schedule, denoiser, load, pretrained, save
from coursekit.denoisers import Prediction
from coursekit.fetch import sha256_of, shipped
from coursekit.nets import Classifier, UNet
from coursekit.samplers import ddim, euler, last
from coursekit.schedules import StraightPath, VarianceExploding

SHIPPED = [card.name for card in available()]


def a_card(**more):
    return Card(name="tiny", recipe="coursekit train tiny", data="drawn", images=1, steps=1, seconds=0.1,
                device="cpu", **more)


@pytest.fixture
def tiny(tmp_path):
    torch.manual_seed(0)
    model = UNet(1, (16, 32), blocks=1)
    nn.init.normal_(model.head[2].weight, std=0.1)
    save(model, tmp_path / "tiny.safetensors",
         a_card(schedule={"name": "cosine", "T": 100}, predicts="v", metrics={"loss": 1.0}))
    return model, tmp_path / "tiny.safetensors"


def test_a_checkpoint_comes_back_in_eval_mode_with_its_schedule(tiny):
    model, path = tiny
    back = load(path)
    assert not back.training and back.predicts == "v" and back.schedule.T == 100
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 90])
    assert_close(back(x, t), model.eval()(x, t), atol=5e-3, rtol=5e-3)  # half precision on disk
    assert next(back.parameters()).dtype == torch.float32
    assert back.card.parameters == sum(p.numel() for p in model.parameters())
    assert back.card.sha256 == sha256_of(path) and back.card.metrics == {"loss": 1.0}


def test_eight_bits_make_half_the_file_and_miss_no_weight_by_more_than_half_a_step(tiny, tmp_path):
    model, sixteen = tiny
    eight = tmp_path / "eight.safetensors"
    save(model, eight, a_card(schedule={"name": "cosine", "T": 100}, predicts="v"), bits=8)
    assert eight.stat().st_size < 0.62 * sixteen.stat().st_size
    back = load(eight)
    for (key, was), now in zip(model.state_dict().items(), back.state_dict().values(), strict=True):
        step = was.flatten(1).abs().amax(1) / 127 if was.ndim > 1 else was.abs().max() / 512  # a vector keeps 16 bits
        missed = (now - was).abs()
        missed = missed.flatten(1).amax(1) if was.ndim > 1 else missed.max()
        assert bool((missed <= 0.51 * step + 1e-6).all()), key
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 90])
    assert_close(back(x, t), model.eval()(x, t), atol=0.05, rtol=0.05)


def test_weights_that_are_all_zero_stay_so_in_eight_bits(tmp_path):
    save(UNet(1, (16,), blocks=1), tmp_path / "fresh.safetensors", a_card(), bits=8)  # ends in zeros
    back = load(tmp_path / "fresh.safetensors")
    assert bool((back.head[2].weight == 0).all()) and all(bool(p.isfinite().all()) for p in back.parameters())


def test_other_numbers_of_bits_are_refused(tmp_path):
    with pytest.raises(ValueError, match="8 or 16 bits, got bits = 4"):
        save(Classifier(), tmp_path / "c.safetensors", a_card(), bits=4)
    assert not list(tmp_path.iterdir())


def test_a_network_that_does_not_denoise_has_no_schedule(tmp_path):
    save(Classifier(), tmp_path / "c.safetensors", a_card())
    assert load(tmp_path / "c.safetensors").predicts is None


def test_trainings_that_end_at_once_all_get_their_line(tmp_path, monkeypatch):
    """Each reads the index, adds to it and writes it: slowly, they would lose each other's lines."""
    reads = checkpoints._index

    def slowly(folder):
        found = reads(folder)
        time.sleep(0.05)
        return found

    monkeypatch.setattr(checkpoints, "_index", slowly)
    paths = [tmp_path / f"{name}.safetensors" for name in "abcd"]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda path: save(Classifier(), path, a_card()), paths))
    assert all(load(path).card.name == "tiny" for path in paths)
    assert len(list(tmp_path.iterdir())) == 9  # weights, cards and the index; no lock, no litter


@pytest.mark.parametrize("file", ["tiny.safetensors", "tiny.json"])
@pytest.mark.parametrize("harm", ["cut", "altered", "gone"])
def test_a_harmed_file_is_refused_by_name(tiny, file, harm):
    path = tiny[1].with_name(file)
    whole = bytearray(path.read_bytes())
    if harm == "gone":
        path.unlink()
    else:
        whole[len(whole) // 2] ^= 1
        path.write_bytes(whole[:-7] if harm == "cut" else whole)
    with pytest.raises(ValueError, match=file):
        load(tiny[1])


def test_a_file_without_a_line_in_the_index_is_refused(tiny):
    (tiny[1].parent / "index.json").write_text("{}")
    with pytest.raises(ValueError, match="index.json"):
        load(tiny[1])
    (tiny[1].parent / "index.json").write_text("{")
    with pytest.raises(ValueError, match="index.json is damaged"):
        load(tiny[1])


def test_what_cannot_be_rebuilt_or_stored_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="Linear"):
        save(nn.Linear(1, 1), tmp_path / "x.safetensors", a_card())
    with pytest.raises(ValueError, match="x.pt"):
        save(Classifier(), tmp_path / "x.pt", a_card())
    broken = Classifier()
    nn.init.constant_(broken.head.weight, 1e6)  # beyond half precision
    with pytest.raises(ValueError, match="not finite"):
        save(broken, tmp_path / "x.safetensors", a_card())
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="cats-ddpm"):
        pretrained("cat-ddpm")
    with pytest.raises(ValueError, match="called None"):
        pretrained(None)
    with pytest.raises(ValueError, match="does not denoise"):
        denoiser("mnist-classifier")


def test_schedules_are_built_from_their_description():
    assert build_schedule({"name": "linear", "T": 300}).T == 300
    assert isinstance(build_schedule({"name": "straight"}), StraightPath)
    assert build_schedule({"name": "exploding", "sigma_max": 2.0}).sigma_max == 2
    with pytest.raises(ValueError, match="'sine'"):
        build_schedule({"name": "sine"})


def test_every_trained_recipe_ships_with_all_its_snapshots():
    assert {"cats-ddpm", "mnist-class", "mnist-classifier", "mnist-ddpm", "mnist-denoiser"} <= set(SHIPPED)
    for name in set(SHIPPED) & set(recipes.available()):
        assert {f"{name}-{moment}" for moment in recipes.recipe(name).snapshots} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_checkpoint_keeps_its_promises(name):
    model = pretrained(name)
    card, path = model.card, shipped("checkpoints", f"{name}.safetensors")
    assert card.sha256 == sha256_of(path)
    assert path.stat().st_size <= 12e6 and card.parameters <= 8e6
    assert card.parameters == sum(p.numel() for p in model.parameters())
    assert card.steps > 0 and card.images > 1000 and card.seconds > 0 and card.metrics
    trained = card.recipe.removeprefix("coursekit train ")
    assert trained in recipes.available()
    built = recipes.recipe(trained)
    assert type(built.net()).__name__ == card.net and built.net().config == card.config
    assert built.predicts == card.predicts == model.predicts and built.schedule == card.schedule
    moments = {trained: built.steps} | {f"{trained}-{moment}": after for moment, after in built.snapshots.items()}
    assert moments[name] == card.steps  # the recipe is the one that made it


def test_all_shipped_files_are_in_the_index_and_small_enough_together():
    folder = shipped("checkpoints")
    index = json.loads((folder / "index.json").read_text())
    files = {p.name for p in folder.iterdir() if p.name != "index.json"}
    assert files == set(index)
    assert sum(p.stat().st_size for p in folder.glob("*.safetensors")) <= 32e6


@pytest.mark.parametrize("name", [n for n in SHIPPED if pretrained(n).predicts])
def test_a_shipped_model_denoises_at_both_ends_of_time(name):
    denoise, schedule = denoiser(name)
    c = pretrained(name).config.get("in_channels", 1)
    size, most = (7, 6) if name.startswith("mnist-latent") else (28, 3) if name.startswith("mnist") else (64, 3)
    x = torch.randn(2, c, size, size, generator=torch.Generator().manual_seed(0))
    if isinstance(schedule, VarianceExploding):  # one noise level, of which the network is not told
        guess = denoise(x, torch.full((2,), schedule.sigma_max))
        return assert_close(guess.x0 + schedule.sigma_max * guess.eps, x)
    straight = isinstance(schedule, StraightPath)  # whose times are floats in [0, 1]
    first = 0.0 if straight else 0
    if pretrained(name).predicts == "x0":  # at t = 0 any noise would do
        with pytest.raises(ValueError, match="at t = 0 there is no noise to name"), torch.no_grad():
            denoise(x, torch.full((2,), first))
        first += 0.01 if straight else 1
    for t in (first, schedule.T):
        with torch.no_grad():
            guess = denoise(x, torch.full((2,), t))
        assert isinstance(guess, Prediction) and guess.x0.isfinite().all() and guess.eps.isfinite().all()
    end = last((euler if straight else ddim)(denoise, x, schedule, schedule.spaced(10)))
    assert end.t == 0 and end.x.abs().max() < most


def test_the_classifier_is_good_enough_to_judge():
    images = checkpoints.pretrained("mnist-classifier").card.metrics
    accuracy = next(v for k, v in images.items() if k.startswith("accuracy"))
    assert accuracy >= 0.994
