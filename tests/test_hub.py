"""A network goes to the Hub and comes back as it was, or not at all. Nothing here touches the network."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from coursekit import checkpoints, nets
from coursekit.checkpoints import Card, pretrained
from coursekit.hub import from_pretrained, push_to_hub, save_pretrained

hub = pytest.importorskip("huggingface_hub")


@pytest.fixture(scope="module")
def digits():
    return pretrained("mnist-class")


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """The Hub as a folder of folders: what is uploaded there can be downloaded."""
    place = tmp_path / "cloud"

    class Api:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, repo_id, private, exist_ok):
            (place / repo_id).mkdir(parents=True, exist_ok=exist_ok)
            return hub.RepoUrl(f"{hub.constants.ENDPOINT}/{repo_id}")

        def upload_folder(self, repo_id, folder_path, **options):
            shutil.copytree(folder_path, place / repo_id, dirs_exist_ok=True)
            return f"the commit of {repo_id}, private" if self.token == "mine" else f"the commit of {repo_id}"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download",
                        lambda repo_id, filename, **where: str(place / repo_id / filename))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo_id, **where: str(place / repo_id))
    return place


def assert_the_same(back, model):
    assert type(back) is type(model) and back.config == model.config and not back.training
    assert back.predicts == model.predicts and torch.equal(back.schedule.alpha_bar, model.schedule.alpha_bar)
    for key, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key  # a shipped network's weights are halves already


def test_a_network_comes_back_from_a_folder_as_it_was(digits, tmp_path):
    back = from_pretrained(save_pretrained(digits, tmp_path / "digits"))
    assert_the_same(back, digits)
    assert back.card.metrics == digits.card.metrics and back.card.recipe == digits.card.recipe
    x, t, label = torch.randn(2, 1, 28, 28), torch.tensor([1, 900]), torch.tensor([3, -1])
    assert torch.equal(back(x, t, label), digits(x, t, label))


def test_a_network_comes_back_from_the_hub_as_it_was(digits, cloud):
    assert push_to_hub(digits, "me/digits", token="mine") == "the commit of me/digits, private"
    assert_the_same(from_pretrained("me/digits"), digits)
    read_me = (cloud / "me/digits/README.md").read_text(encoding="utf-8")
    assert 'from_pretrained("me/digits")' in read_me and "library_name: coursekit" in read_me
    assert "OWNER" not in read_me and "{{" not in read_me and digits.card.recipe in read_me


def test_what_lies_on_the_hub_is_safetensors_and_text_and_a_checkpoint(digits, tmp_path):
    folder = save_pretrained(digits, tmp_path)
    files = {path.name for path in folder.iterdir()}
    assert files == {"model.safetensors", "model.json", "index.json", "config.json", "README.md"}
    assert_the_same(checkpoints.load(folder / "model.safetensors"), digits)


def test_a_stranger_with_the_plain_mixin_can_read_it_too(digits, tmp_path):
    class Theirs(nets.UNet, hub.PyTorchModelHubMixin):
        pass

    back = Theirs.from_pretrained(save_pretrained(digits, tmp_path), strict=True)
    assert back.config == digits.config
    x, t = torch.randn(2, 1, 28, 28), torch.tensor([1, 900])
    assert_close(back(x, t), digits(x, t), atol=1e-6, rtol=0)


def test_what_comes_back_is_a_plain_network_that_can_be_saved_again(digits, tmp_path):
    back = from_pretrained(save_pretrained(digits, tmp_path / "hub"))
    checkpoints.save(back, tmp_path / "again.safetensors", back.card)
    assert_the_same(checkpoints.load(tmp_path / "again.safetensors"), digits)


@pytest.mark.parametrize("name", ["Classifier", "PixelCNN", "VQVAE", "Hourglass", "Cs180UNet", "KPN"])
def test_every_network_of_the_course_goes_and_comes(name, tmp_path):
    kinds = {"Cs180UNet": lambda: nets.Cs180UNet(8), "KPN": lambda: nets.KPN.preset("tiny")}
    model = kinds.get(name, getattr(nets, name))()
    card = Card(name="tiny", recipe="none", data="drawn", images=1, steps=0)
    back = from_pretrained(save_pretrained(model, tmp_path, card))
    assert type(back) is type(model) and back.config == model.config
    for key, value in model.state_dict().items():
        assert_close(back.state_dict()[key], value, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(file.read_bytes()[:-1]), Path.unlink])
@pytest.mark.parametrize("file", ["model.safetensors", "model.json"])
def test_what_was_altered_on_the_way_is_refused_by_name(digits, cloud, file, damage):
    push_to_hub(digits, "me/digits")
    damage(cloud / "me/digits" / file)
    with pytest.raises(ValueError, match=file):
        from_pretrained("me/digits")


def test_pickles_are_never_loaded(digits, tmp_path):
    """The mixin itself would fall back to pytorch_model.bin where there is no model.safetensors."""
    folder = save_pretrained(digits, tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save(digits.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        from_pretrained(folder)


def test_a_network_without_a_card_is_not_published(tmp_path):
    with pytest.raises(ValueError, match="a Card that says how it was trained"):
        save_pretrained(nets.UNet(), tmp_path)


def test_without_huggingface_hub_it_says_what_to_install(digits, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'coursekit\[hub\]'"):
        save_pretrained(digits, tmp_path)
