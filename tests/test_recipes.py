"""Recipes are found by name, can be sliced in time, and write checkpoints that load."""

from dataclasses import replace

import pytest
import torch
from support import write_ffhq, write_stl10

from coursekit import measures, objectives, recipes
from coursekit.checkpoints import load
from coursekit.data import Batch, Images
from coursekit.nets import UNet


@pytest.fixture
def small(monkeypatch):
    """A recipe of seconds on drawn noise, registered like the others."""
    def pictures(name, split="train", size=None, limit=None):
        rng = torch.Generator().manual_seed(len(split))
        return Images(torch.randint(0, 256, (64, 1, 8, 8), dtype=torch.uint8, generator=rng), None, name, "drawn")

    monkeypatch.setattr(recipes.data, "load", pictures)
    monkeypatch.setitem(recipes.RECIPES, "small", recipes.Recipe(
        data="drawn", net=lambda: UNet(1, (16, 32), blocks=1), schedule=recipes.COSINE, predicts="v",
        loss=objectives.denoising_loss(recipes.COSINE), measure=measures.denoising(recipes.COSINE, "v"),
        steps=8, batch_size=16, lr=1e-3, flip=True))
    return "small"


def test_a_recipe_writes_a_checkpoint_that_loads(small, tmp_path):
    run = recipes.train(small, out=tmp_path, device="cpu", progress=False)
    assert run.steps == 8
    model = load(tmp_path / "small.safetensors")
    assert model.predicts == "v" and model.schedule.T == 1000
    card = model.card
    assert (card.steps, card.images, card.recipe) == (8, 64, "coursekit train small")
    assert card.seconds > 0 and card.device.startswith("cpu")
    assert "one-step PSNR in dB at t = 250" in card.metrics


def test_a_recipe_trained_in_slices_is_the_recipe(small, tmp_path):
    whole = recipes.train(small, out=tmp_path / "whole", device="cpu", progress=False)
    recipes.train(small, out=tmp_path / "sliced", steps=3, device="cpu", progress=False)
    sliced = recipes.train(small, out=tmp_path / "sliced", device="cpu", progress=False)
    # a run cut to 3 steps has warmed up faster, so only a recipe's own length is compared step by step
    assert sliced.steps == whole.steps == 8
    again = recipes.train(small, out=tmp_path / "again", device="cpu", progress=False)
    assert torch.equal(again.losses, whole.losses)  # the same seed is the same run


@pytest.mark.parametrize("name, images", [("stl10-ddpm", 5), ("ffhq-ddpm", None)])
def test_the_large_recipes_run_by_name_on_files_as_they_are_handed_out(name, images, tmp_path, monkeypatch):
    """The recipe's own network, loss, size and split on a batch of two; measured on a few pictures, without drawing."""
    write_stl10(tmp_path, monkeypatch)
    faces = write_ffhq(tmp_path / "ffhq")
    monkeypatch.setenv("COURSEKIT_DATA", str(tmp_path))
    monkeypatch.setenv("COURSEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("COURSEKIT_FFHQ", raising=False)
    monkeypatch.setitem(recipes.RECIPES, name, replace(
        recipes.recipe(name), batch_size=2, measure=lambda model, held_out: {"held out": len(held_out)}))
    run = recipes.train(name, out=tmp_path, steps=2, device="cpu", progress=False)
    card = load(tmp_path / f"{name}.safetensors").card
    held_out = card.metrics["held out"]
    assert run.steps == 2 and run.losses.isfinite().all() and held_out > 0
    assert card.images == (images or len(faces) - held_out)


def test_the_card_of_cifar10_says_how_it_draws_and_what_it_sends(monkeypatch):
    for name in ("painting", "sending"):
        monkeypatch.setattr(measures, name, lambda *told, name=name: lambda *given: {name: (told, given)})
    asked = (recipes.recipe("cifar10-ddpm").schedule, recipes.recipe("cifar10-ddpm").predicts), ("model", "images")
    assert recipes.recipe("cifar10-ddpm").measure("model", "images") == {"painting": asked, "sending": asked}


def test_snapshots_are_moments_of_the_same_run(small, tmp_path, monkeypatch):
    plain = recipes.train(small, out=tmp_path / "plain", device="cpu", progress=False)
    chosen = replace(recipes.recipe(small), snapshots={"late": 6, "early": 2, "never": 8})
    monkeypatch.setitem(recipes.RECIPES, small, chosen)
    recipes.train(small, out=tmp_path, steps=8, device="cpu", progress=False)
    assert {p.name for p in tmp_path.glob("*.safetensors")} == {
        "small.safetensors", "small-early.safetensors", "small-late.safetensors", "small.state.safetensors"}
    end = load(tmp_path / "small.safetensors")
    for key, value in load(tmp_path / "plain" / "small.safetensors").state_dict().items():
        assert torch.equal(end.state_dict()[key], value)
    early = load(tmp_path / "small-early.safetensors")
    assert (early.card.steps, early.card.recipe, early.predicts) == (2, "coursekit train small", "v")
    assert not torch.equal(early.stem[1].weight, end.stem[1].weight)
    assert plain.steps == end.card.steps == 8


def test_a_snapshot_missed_by_a_kill_is_written_on_return(small, tmp_path, monkeypatch):
    chosen = replace(recipes.recipe(small), snapshots={"early": 3})
    monkeypatch.setitem(recipes.RECIPES, small, chosen)
    written = recipes._write
    monkeypatch.setattr(recipes, "_write", lambda *args, **more: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        recipes.train(small, out=tmp_path, device="cpu", progress=False)
    monkeypatch.setattr(recipes, "_write", written)
    recipes.train(small, out=tmp_path, device="cpu", progress=False)
    assert load(tmp_path / "small-early.safetensors").card.steps == 3


def test_an_unknown_recipe_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="cats-ddpm"):
        recipes.train("cat-ddpm", out=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_steps_and_no_such_device_are_refused(small, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="steps = 0"):
        recipes.train(small, out=tmp_path, steps=0, device="cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for device in ("cuda", "tpu"):
        with pytest.raises(ValueError, match=f"mps or cpu here, got '{device}'"):
            recipes.train(small, out=tmp_path, device=device)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="run on cpu here, got 'mps'"):
        recipes.train(small, out=tmp_path, device="mps")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", recipes.available())
def test_every_recipe_takes_a_step_down_from_its_loss(name):
    """One batch, a few steps: the loss of the real network on data of the real shape falls."""
    chosen = recipes.recipe(name)
    torch.manual_seed(0)
    model = chosen.net()
    channels, size = 1 if chosen.data == "mnist" else 3, chosen.size or 28
    x = torch.rand(4, channels, size, size) * 2 - 1
    batch = Batch(x, torch.arange(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=chosen.lr)

    def loss():
        return chosen.loss(model, batch, torch.Generator().manual_seed(0))

    first = loss().item()
    for _ in range(6):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < first


def test_the_profile_is_quick_unless_said_otherwise(monkeypatch):
    monkeypatch.delenv("COURSE_PROFILE", raising=False)
    assert recipes.profile() == "quick"
    monkeypatch.setenv("COURSE_PROFILE", "full")
    assert recipes.profile() == "full"
    monkeypatch.setenv("COURSE_PROFILE", "fast")
    with pytest.raises(ValueError, match="'fast'"):
        recipes.profile()


def test_a_focus_moves_the_loss_to_noisier_times():
    """A network that answers with zeros misses v by 1 wherever it looks: so look at where it looked."""
    seen = []

    def silent(x_t, t):
        seen.append(t)
        return torch.zeros_like(x_t)

    batch = Batch(torch.rand(2000, 1, 2, 2), None)
    for focus in (None, (0.8, 1.5)):
        objectives.denoising_loss(recipes.COSINE, focus)(silent, batch, torch.Generator().manual_seed(0))
    uniform, focused = (t.double().mean() / 1000 for t in seen)
    assert abs(uniform - 0.5) < 5 * 0.29 / 2000**0.5 and focused > 0.6


def test_a_focus_belongs_to_whole_steps_and_other_paths_go_without():
    loss = objectives.denoising_loss({"name": "straight"})
    assert loss(lambda x_t, t: x_t, Batch(torch.rand(4, 1, 2, 2), None), torch.Generator()) > 0
    with pytest.raises(ValueError, match="'straight'"):
        objectives.denoising_loss({"name": "straight"}, (0.8, 1.5))


def test_the_known_noise_has_its_deviation_and_the_target_is_the_clean_image():
    seen = []

    def identity(x_t):
        seen.append(x_t)
        return x_t

    x = torch.rand(50, 1, 20, 20) * 2 - 1
    loss = objectives.known_noise_loss(0.5)(identity, Batch(x, None), torch.Generator().manual_seed(0))
    noise = seen[0] - x
    assert abs(noise.std() - 0.5) < 5 * 0.5 / 2**0.5 / noise.numel()**0.5
    torch.testing.assert_close(loss, noise.square().mean())


def test_labels_reach_the_loss_unless_they_are_dropped():
    """Labels left out with probability 1 leave nothing of the label in the loss."""
    torch.manual_seed(0)
    model = UNet(1, (16, 32), blocks=1, classes=10)
    for parameter in model.parameters():  # a new network is silent, whatever its label
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.rand(4, 1, 8, 8)

    def losses(drop):
        loss = objectives.labelled_denoising_loss(recipes.COSINE, drop)
        return [loss(model, Batch(x, torch.full((4,), k)), torch.Generator().manual_seed(1)).item()
                for k in (3, 8)]

    assert losses(1.0)[0] == losses(1.0)[1]
    assert losses(0.0)[0] != losses(0.0)[1]
