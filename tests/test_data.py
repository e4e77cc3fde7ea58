"""Data: what is read is right, what is broken is refused by name, what is missing is replaced and said."""

import gzip
import hashlib
import io
import os
import socket
import subprocess
import sys
import tarfile
import threading
import time
import types
import warnings
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support import write_ffhq, write_stl10

from coursekit import data, drawn, fetch, formats, sources
from coursekit.data import Images, StandInWarning, batches, load

REAL = (fetch.data_folder() or Path("nowhere")).resolve()
real_data = pytest.mark.skipif(not (REAL / "cats64" / "cats64.tar.gz").is_file(),
                               reason="COURSEKIT_DATA does not name the folder of real data sets")


@pytest.fixture(autouse=True)
def nothing_but_the_shipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, an empty cache, and no memory of earlier failures."""
    for name in ("COURSEKIT_DATA", "COURSEKIT_FFHQ", "KAGGLEHUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COURSEKIT_OFFLINE", "1")
    monkeypatch.setenv("COURSEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "_failed", {})
    monkeypatch.setattr(data, "_told", {})
    monkeypatch.setattr(sources, "DRAWN", {"train": 12, "test": 6})


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder that COURSEKIT_DATA names."""
    folder = tmp_path / "own"
    folder.mkdir()
    monkeypatch.setenv("COURSEKIT_DATA", str(folder))
    return folder


def jpeg(seed: int, size: int = 64) -> bytes:
    file = io.BytesIO()
    cat = drawn.drawn_cats(1, size, seed)[0].permute(1, 2, 0).numpy()
    Image.fromarray(cat).save(file, "JPEG", quality=95)
    return file.getvalue()


def pack(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def fake(x: torch.Tensor, labels: torch.Tensor | None = None) -> Images:
    return Images(x, labels, "fake", "a test")


# ---------------------------------------------------------------------------------------- what is shipped

def test_mnist_is_whole() -> None:
    train, test = load("mnist"), load("mnist", "test")
    assert train.x.shape == (60000, 1, 28, 28) and test.x.shape == (10000, 1, 28, 28)
    assert train.x.dtype == torch.uint8 and train.labels.dtype == torch.int64
    assert train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert test.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert (len(train), train.name, train.source) == (60000, "mnist", "shipped with the course")
    assert abs(train.x.float().mean().item() / 255 - 0.1307) < 1e-4  # the mean everybody normalises by


def test_cards_give_the_hashes_of_the_shipped_files() -> None:
    cards = fetch.shipped("README.md").read_text()
    for name, inside in sources.MNIST_SHA256.items():
        assert fetch.sha256_of(fetch.shipped("mnist", f"{name}.gz")) in cards
        assert inside in cards


@pytest.mark.parametrize("damage", ["cut", "altered", "other digits"])
def test_a_damaged_mnist_is_refused_by_name(own: Path, damage: str) -> None:
    name = "t10k-labels-idx1-ubyte.gz"
    (own / "mnist").mkdir()
    for file in fetch.shipped("mnist").iterdir():
        (own / "mnist" / file.name).symlink_to(file)
    assert load("mnist", "test", limit=1).source == "COURSEKIT_DATA, mnist"
    whole = fetch.shipped("mnist", name).read_bytes()
    (own / "mnist" / name).unlink()
    (own / "mnist" / name).write_bytes({
        "cut": whole[:2000], "altered": whole[:2000] + b"cat" + whole[2003:],
        "other digits": gzip.compress(b"\0\0\x08\x01" + (10000).to_bytes(4, "big") + bytes(10000)),
    }[damage])
    with pytest.raises(ValueError, match=name):
        load("mnist", "test")


@given(shape=st.lists(st.integers(0, 5), min_size=1, max_size=4), extra=st.integers(-2, 2))
def test_idx_files_round_trip_or_are_refused(shape: list[int], extra: int) -> None:
    values = np.arange(np.prod(shape), dtype=np.uint8)
    header = b"\0\0\x08" + bytes([len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
    whole = header + values.tobytes()
    if extra == 0:
        assert np.array_equal(formats.parse_idx(whole, "f").numpy(), values.reshape(shape))
    else:
        damaged = whole[:extra] if extra < 0 else whole + bytes(extra)
        with pytest.raises(ValueError, match=f"f holds {len(damaged)} bytes where its header"):
            formats.parse_idx(damaged, "f")


@pytest.mark.parametrize("start", [b"", b"\0\0", b"\0\0\x0d\x01", b"\x1f\x8b\x08\x00"])
def test_idx_magic(start: bytes) -> None:
    with pytest.raises(ValueError, match=r"f is no idx file.*wanted are 00 00 08"):
        formats.parse_idx(start, "f")


# ------------------------------------------------------------------------------------------------ bad input

@pytest.mark.parametrize(("arguments", "wanted"), [
    (("minst",), "nearest are mnist"), (("MNIST",), "nearest are mnist"), ((None,), "called None"),
    (("cat",), "cats"), (("zzz",), "drawn-cats"),
    (("mnist", "valid"), "train, test, got 'valid'"), (("mnist", "unlabeled"), "unlabeled"),
    (("mnist", "train", 0), "size must be .* got 0"), (("mnist", "train", 2.5), "2.5"),
    (("mnist", "train", None, 0), "limit must be .* got 0"), (("mnist", "train", None, -3), "-3")])
def test_bad_arguments_are_refused_with_what_was_got(arguments: tuple, wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        load(*arguments)


@pytest.mark.parametrize(("x", "labels", "wanted"), [
    (torch.zeros(0, 1, 4, 4, dtype=torch.uint8), None, "empty"),
    (torch.zeros(2, 1, 4, 4), None, "uint8"), (torch.zeros(2, 4, 4, dtype=torch.uint8), None, "h, w"),
    (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), "labels must be 2"),
    (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2), "int64")])
def test_images_know_what_they_are(x: torch.Tensor, labels: torch.Tensor | None, wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        fake(x, labels)


def test_available_names_every_set_and_asks_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COURSEKIT_OFFLINE")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("the network was asked"))
    where = data.available()
    assert list(where) == ["mnist", "fashion-mnist", "cifar10", "stl10", "ffhq", "cats", "drawn-cats"]
    assert where["mnist"] == "shipped with the course" and "download" in where["cifar10"]
    monkeypatch.setenv("COURSEKIT_OFFLINE", "1")
    assert "stand-in" in data.available()["cats"]


# ----------------------------------------------------------------------------------------- floats and sizes

def test_floats_lie_between_minus_one_and_one() -> None:
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    y = fake(x).to_float()
    assert y.dtype == torch.float32 and y.min() == -1 and y.max() == 1
    assert torch.equal(((y + 1) * 127.5).round().byte(), x)


@settings(max_examples=10, deadline=None)
@given(size=st.integers(1, 40), limit=st.integers(1, 7))
def test_size_and_limit(size: int, limit: int) -> None:
    images = load("mnist", "test", size=size, limit=limit)
    assert images.x.shape == (limit, 1, size, size) and len(images.labels) == limit


def test_shrinking_averages() -> None:
    """Stripes one pixel wide become grey; picking every other pixel would leave them black or white."""
    whole, half = load("mnist", "test", limit=50), load("mnist", "test", size=14, limit=50)
    means = whole.x.float().mean((1, 2, 3)), half.x.float().mean((1, 2, 3))
    torch.testing.assert_close(*means, atol=1.5, rtol=0.03)
    stripes = (torch.arange(32) % 2 * 255).byte().expand(1, 1, 32, 32)
    assert (data._resized(stripes, 8)[..., 2:-2].float() - 127.5).abs().max() < 16


def test_to_another_device_keeps_everything_else() -> None:
    images = load("mnist", limit=3)
    there = images.to("meta")
    assert there.x.device.type == there.labels.device.type == "meta"
    assert (there.name, there.source, len(there)) == (images.name, images.source, 3)


# -------------------------------------------------------------------------------------------------- batches

def numbered(n: int, side: int = 5) -> Images:
    """Image i has the label i and the value i everywhere but for one bright pixel off the middle."""
    x = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).repeat(1, 1, side, side)
    x[..., 1, 0] = 255
    return fake(x, torch.arange(n))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 30), batch_size=st.integers(1, 30), seed=st.integers(0, 1000))
def test_an_epoch_shows_every_image_at_most_once(n: int, batch_size: int, seed: int) -> None:
    images, rng = numbered(n), torch.Generator().manual_seed(seed)
    if batch_size > n:
        with pytest.raises(ValueError, match=f"1..{n}.*got {batch_size}"):
            batches(images, batch_size, rng)
        return
    stream = batches(images, batch_size, rng)
    for _ in range(2):
        shown = [next(stream) for _ in range(n // batch_size)]
        labels = torch.cat([batch.label for batch in shown])
        assert len(labels.unique()) == len(labels) == n // batch_size * batch_size
        for x, label in shown:
            assert torch.equal(x, images.to_float()[label])


def test_batches_are_float_pairs_without_labels_too() -> None:
    batch = next(batches(fake(torch.full((4, 3, 2, 2), 255, dtype=torch.uint8)), 4))
    assert batch.label is None and batch.x.dtype == torch.float32 and (batch.x == 1).all()
    x, label = next(batches(numbered(4), 2))
    assert x.shape == (2, 1, 5, 5) and label.dtype == torch.int64


def test_epochs_are_shuffled_and_differ() -> None:
    stream = batches(numbered(50), 50, torch.Generator().manual_seed(0))
    one, two = next(stream).label, next(stream).label
    assert not torch.equal(one, torch.arange(50)) and not torch.equal(one, two)


def test_half_of_the_images_are_mirrored() -> None:
    stream = batches(numbered(250), 250, torch.Generator().manual_seed(1), flip=True)
    flipped = torch.stack([next(stream).x[:, 0, 1, -1] == 1 for _ in range(16)]).float()
    assert abs(flipped.mean() - 0.5) < 5 * 0.5 / 4000**0.5  # five standard errors
    assert 0 < flipped[:, 0].mean() < 1  # each image, not the whole batch


def test_shift_moves_by_every_offset_equally_often_and_lets_black_in() -> None:
    x = torch.full((400, 1, 5, 5), 100, dtype=torch.uint8)
    x[:, :, 2, 2] = 200
    stream = batches(fake(x), 400, torch.Generator().manual_seed(2), shift=2)
    seen = torch.cat([next(stream).x for _ in range(10)])
    spot = (seen == 200 / 127.5 - 1).flatten(1).float()
    assert (spot.sum(1) == 1).all()  # the middle pixel never leaves
    n, p = len(spot), 1 / 25
    assert ((spot.mean(0) - p).abs() < 5 * (p * (1 - p) / n) ** 0.5).all()
    corner = seen[spot[:, 24] == 1][0, 0]  # moved by two, down and to the right
    assert (corner[:2] == -1).all() and (corner[:, :2] == -1).all() and (corner[2:, 2:] > -1).all()
    with pytest.raises(ValueError, match="got -1"):
        batches(fake(x), 1, shift=-1)


@pytest.mark.parametrize("steps", [0, 1, 3, 4, 11])
def test_resuming_continues_bit_for_bit(steps: int) -> None:
    def fresh(seed: int) -> data.Batches:
        return batches(numbered(17), 4, torch.Generator().manual_seed(seed), flip=True, shift=1)

    stream = fresh(0)
    for _ in range(steps):
        next(stream)
    state = stream.state_dict()
    wanted = [next(stream) for _ in range(9)]
    resumed = fresh(99)
    resumed.load_state_dict(state)
    for (x, label), (y, other) in zip(wanted, (next(resumed) for _ in range(9)), strict=True):
        assert torch.equal(x, y) and torch.equal(label, other)


@pytest.mark.parametrize(("images", "change", "wanted"), [
    (5, {}, "of 17 images, .* has 5"), (17, {"position": 18}, "got 18"), (17, {"position": -1}, "got -1")])
def test_a_state_that_does_not_fit_is_refused(images: int, change: dict, wanted: str) -> None:
    stream = batches(numbered(17), 4)
    next(stream)
    with pytest.raises(ValueError, match=wanted):
        batches(numbered(images), 4).load_state_dict(stream.state_dict() | change)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_do_not_depend_on_the_device() -> None:
    streams = [batches(numbered(17).to(device), 4, torch.Generator().manual_seed(0), flip=True, shift=1)
               for device in ("cpu", "cuda")]
    for _ in range(9):
        here, there = next(streams[0]), next(streams[1])
        assert there.x.is_cuda and torch.equal(here.x, there.x.cpu())
        assert torch.equal(here.label, there.label.cpu())


# ------------------------------------------------------------------------------- archives and folders of cats

CATS = {f"cats64/{i:05d}.jpg": jpeg(i) for i in range(40)}


def members(images: Images) -> set[str]:
    return {hashlib.sha256(x.numpy().tobytes()).hexdigest() for x in images.x}


def test_cats_from_an_archive_and_from_a_folder_are_the_same(own: Path, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "HELD_OUT", 0.3)
    pack(own / "cats64" / "cats64.tar.gz", CATS)
    train, test = load("cats"), load("cats", "test")
    assert len(train) + len(test) == 40 and len(test) > 2 and train.labels is None
    assert train.source == "COURSEKIT_DATA, cats64.tar.gz" and not members(train) & members(test)
    folder = tmp_path / "other" / "cats"
    folder.mkdir(parents=True)
    for name, content in CATS.items():
        (folder / Path(name).name).write_bytes(content)
    monkeypatch.setenv("COURSEKIT_DATA", str(folder.parent))
    assert torch.equal(load("cats").x, train.x) and torch.equal(load("cats", "test").x, test.x)


def test_the_split_survives_missing_pictures_and_new_names(own: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "HELD_OUT", 0.3)
    archive = pack(own / "cats64" / "cats64.tar.gz", CATS)
    train, test = members(load("cats")), members(load("cats", "test"))
    pack(archive, {f"renamed/{i}.jpg": content for i, content in enumerate(list(CATS.values())[::2])})
    assert members(load("cats")) < train and members(load("cats", "test")) < test


def test_copies_are_dropped_and_near_duplicates_stay_together(own: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    again = {}
    for name, content in CATS.items():  # every cat again, a little darker
        darker, file = Image.open(io.BytesIO(content)).point(lambda v: int(v * 0.97)), io.BytesIO()
        darker.save(file, "JPEG", quality=90)
        again[name.replace(".jpg", "-b.jpg")] = file.getvalue()
    copies = {name.replace(".jpg", "-copy.jpg"): content for name, content in CATS.items()}
    monkeypatch.setattr(sources, "HELD_OUT", 0.2)
    pack(own / "cats64" / "cats64.tar.gz", CATS | again | copies)
    train, test = load("cats").to_float(), load("cats", "test").to_float()
    assert len(train) + len(test) == 80 and len(test) >= 2
    nearest = torch.cdist(test.flatten(1), train.flatten(1)).min() / train[0].numel() ** 0.5
    assert nearest > 0.1  # a cat and its darker self differ by about 0.03


@pytest.mark.parametrize("damage", ["cut", "altered", "no tar", "no pictures", "a broken picture", "sizes"])
def test_a_damaged_archive_is_refused_by_name(own: Path, damage: str) -> None:
    path = own / "cats64" / "cats64.tar.gz"
    whole = pack(path, CATS).read_bytes()
    name = "cats64.tar.gz"
    if damage == "cut":
        path.write_bytes(whole[:len(whole) // 2])
    elif damage == "altered":
        path.write_bytes(whole[:5000] + bytes([whole[5000] ^ 255]) + whole[5001:])
    elif damage == "no tar":
        path.write_bytes(gzip.compress(b"cats" * 500))
    elif damage == "no pictures":
        pack(path, {"readme.txt": b"none"})
    elif damage == "a broken picture":
        pack(path, CATS | {"cats64/00007.jpg": CATS["cats64/00007.jpg"][:900]})
        name = "00007.jpg"
    else:
        pack(path, CATS | {"cats64/00009.jpg": jpeg(9, 32)})
        name = "00009.jpg.* 32 x 32"
    with pytest.raises(ValueError, match=name):
        load("cats")
    pack(path, CATS)  # the good file is not shadowed by what went wrong
    assert len(load("cats")) + len(load("cats", "test")) == 40


def test_nothing_is_unpacked_from_an_archive(own: Path, tmp_path: Path) -> None:
    pack(own / "cats64" / "cats64.tar.gz", {"../../escaped.jpg": jpeg(1), "/tmp/escaped.jpg": jpeg(2)} | CATS)
    assert len(load("cats")) + len(load("cats", "test")) == 40  # the two are among them
    assert not list(tmp_path.rglob("escaped.jpg"))


def test_cifar_classes_are_the_folders_in_alphabetical_order(own: Path) -> None:
    files = {f"cifar10/{split}/{kind}/{i}.jpg": jpeg(7 * k + i, 32)
             for split, n in (("train", 3), ("test", 1))
             for k, kind in enumerate(("truck", "airplane", "cat")) for i in range(n)}
    pack(own / "cifar10" / "cifar10-jpeg-tiny.tar.gz", files)
    train = load("cifar10")
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and "lossy" in train.source
    assert load("cifar10", "test").x.shape == (3, 3, 32, 32)


def test_ffhq_is_a_folder_the_user_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "faces" / "00000"
    folder.mkdir(parents=True)
    monkeypatch.setenv("COURSEKIT_FFHQ", str(folder.parent))
    with pytest.raises(ValueError, match="faces is empty"):
        load("ffhq")
    for i in range(30):
        wide = np.zeros((40, 60, 3), np.uint8)
        wide[:, 10:50] = i + 100  # the middle square
        Image.fromarray(wide).save(folder / f"{i:05d}.png")
    train = load("ffhq", size=16)
    assert train.x.shape[1:] == (3, 16, 16) and train.x.float().min() > 80  # cut, not squeezed
    assert load("ffhq", limit=2).x.shape == (2, 3, 128, 128)
    assert members(load("ffhq", size=16, limit=5)) <= members(train)
    monkeypatch.setenv("COURSEKIT_FFHQ", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="nowhere"):
        load("ffhq")


def test_photographs_stand_as_the_camera_was_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COURSEKIT_FFHQ", str(tmp_path))
    tall = np.zeros((64, 32, 3), np.uint8)
    tall[:32] = 200  # light above
    turned = Image.Exif()
    turned[0x0112] = 6  # it was stored lying: turn it by a quarter
    for i in range(30):
        Image.fromarray(np.rot90(tall).copy()).save(tmp_path / f"{i:05d}.jpg", exif=turned)
        (tmp_path / f"._{i:05d}.jpg").write_bytes(b"what macOS leaves beside it")
    x = load("ffhq", size=16).x.float().mean((0, 1))
    assert x[:6].min() > 150 and x[-6:].max() < 50


def test_ffhqs_thumbnails_come_back_byte_for_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faces = write_ffhq(tmp_path / "ffhq-dataset")
    monkeypatch.setenv("COURSEKIT_FFHQ", str(tmp_path / "ffhq-dataset"))
    train, test = load("ffhq"), load("ffhq", "test")
    assert len(train) + len(test) == 50 and len(test) > 0 and train.labels is None
    assert members(train) | members(test) == members(fake(faces)) and not members(train) & members(test)
    monkeypatch.delenv("COURSEKIT_FFHQ")
    (tmp_path / "ffhq-dataset").rename(tmp_path / "ffhq")
    monkeypatch.setenv("COURSEKIT_DATA", str(tmp_path))
    assert torch.equal(load("ffhq").x, train.x)


def test_stl10_is_read_from_its_binary_files(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Column by column, with labels from 1: what torchvision's own reader, not a stand-in, makes of the files."""
    for split, (x, labels) in write_stl10(own, monkeypatch).items():
        images = load("stl10", split)
        assert torch.equal(images.x, x) and images.source == "COURSEKIT_DATA, STL10"
        assert images.labels is None if split == "unlabeled" else torch.equal(images.labels, labels)
    cut = own / "stl10_binary" / "unlabeled_X.bin"
    cut.write_bytes(cut.read_bytes()[:-96])
    with pytest.raises(ValueError, match="stl10_binary is not what torchvision's STL10 wants"):
        load("stl10", "unlabeled")


def test_fashion_mnist_in_torchvisions_layout(own: Path) -> None:
    raw = own / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 6), ("t10k", 2)):
        sizes = n.to_bytes(4, "big") + (28).to_bytes(4, "big") * 2
        (raw / f"{part}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + sizes + bytes(range(n)) * 784)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + sizes[:4] + bytes(range(n)))
    images = load("fashion-mnist")
    assert images.x.shape == (6, 1, 28, 28) and images.labels.tolist() == list(range(6))
    assert images.source == "COURSEKIT_DATA, FashionMNIST"
    (raw / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + sizes + b"cut")
    with pytest.raises(ValueError, match="FashionMNIST is not what torchvision"):
        load("fashion-mnist")


def test_a_relative_data_folder_counts_from_the_checkout_too(monkeypatch: pytest.MonkeyPatch,
                                                             tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COURSEKIT_DATA", "data")
    assert fetch.data_folder() == fetch.shipped()
    (tmp_path / "data").mkdir()
    assert fetch.data_folder() == Path("data")


# ------------------------------------------------------------------------------------------------- the cache

def make_counted() -> tuple[list[int], object]:
    calls: list[int] = []

    def make() -> dict[str, torch.Tensor]:
        calls.append(1)
        return {"train.x": torch.arange(5000), "test.x": torch.ones(3, 1, dtype=torch.uint8)}
    return calls, make


def test_the_cache_makes_things_once(tmp_path: Path) -> None:
    calls, make = make_counted()
    for prefix in ("train.", "test.", "train."):
        assert list(fetch.cached("thing", make, prefix)) == ["x"]
    assert len(calls) == 1 and torch.equal(fetch.cached("thing", make, "train.")["x"], torch.arange(5000))


@pytest.mark.parametrize("damage", ["cut", "altered", "emptied", "another file"])
def test_a_damaged_cache_file_is_made_again(tmp_path: Path, damage: str) -> None:
    calls, make = make_counted()
    fetch.cached("thing", make)
    path = tmp_path / "cache" / "thing.safetensors"
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:-700], "altered": whole[:-900] + b"cat" + whole[-897:], "emptied": b"",
                      "another file": b"not safetensors" * 100}[damage])
    assert torch.equal(fetch.cached("thing", make)["train.x"], torch.arange(5000)) and len(calls) == 2
    fetch.cached("thing", make)
    assert len(calls) == 2  # it is good again


def test_a_failed_write_keeps_the_old_file_and_leaves_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "thing.bin"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), fetch.replacing(path) as temporary:
        temporary.write_bytes(b"half of the n")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and [f.name for f in tmp_path.iterdir()] == ["thing.bin"]


def test_the_litter_of_a_killed_process_is_swept(tmp_path: Path) -> None:
    litter = tmp_path / "cache" / "thing.safetensors.abc.part"
    litter.parent.mkdir()
    litter.write_bytes(b"half")
    fetch.cached("thing", make_counted()[1])
    assert not litter.exists() and (tmp_path / "cache" / "thing.safetensors").exists()


def test_without_a_writable_cache_things_are_made_each_time(tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    calls, make = make_counted()
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("COURSEKIT_CACHE", str(tmp_path / "file" / "below"))  # no folder can be made there
    assert all(torch.equal(fetch.cached("thing", make)["train.x"], torch.arange(5000)) for _ in range(2))
    assert len(calls) == 2


def test_a_read_only_cache_is_read_and_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File modes do not bind an administrator, so opening for writing is refused here too."""
    calls, make = make_counted()
    fetch.cached("thing", make)
    opened = os.open

    def refuse(path: str, flags: int, *rest: int, **more: int) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and "cache" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    (tmp_path / "cache").chmod(0o555)
    try:
        fetch.cached("thing", make)
        assert torch.equal(fetch.cached("other", make)["train.x"], torch.arange(5000))
    finally:
        (tmp_path / "cache").chmod(0o755)
    assert len(calls) == 2 and not list((tmp_path / "cache").glob("other*"))


def test_a_full_disk_costs_time_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: dict, path: Path, metadata: dict) -> None:
        Path(path).write_bytes(b"as much as fits")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetch, "save_file", full)
    assert torch.equal(fetch.cached("thing", make_counted()[1])["train.x"], torch.arange(5000))
    assert [f.suffix for f in (tmp_path / "cache").iterdir()] in ([], [".lock"])


def test_without_platformdirs_there_is_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COURSEKIT_CACHE")
    assert fetch.cache_folder().name == "coursekit"
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    assert fetch.cache_folder() is None and "train.x" in fetch.cached("thing", make_counted()[1])


def test_processes_that_start_together_make_it_once_and_all_read_it(tmp_path: Path) -> None:
    program = """
import sys, time, torch
from pathlib import Path
from coursekit import fetch
def make():
    with open(sys.argv[1], "a") as log: log.write("made\\n")
    time.sleep(0.5)
    return {"x": torch.arange(300_000)}
go = Path(sys.argv[1] + ".go")
Path(sys.argv[1] + ".ready" + sys.argv[2]).touch()
while not go.exists(): time.sleep(0.01)
assert torch.equal(fetch.cached("together", make)["x"], torch.arange(300_000))
"""
    log = tmp_path / "log"
    running = [subprocess.Popen([sys.executable, "-c", program, str(log), str(k)]) for k in range(2)]
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("log.ready*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    (tmp_path / "log.go").touch()
    assert [process.wait(120) for process in running] == [0, 0]
    assert log.read_text() == "made\n"


# ----------------------------------------------------------------------------------------------- the network

def kagglehub_that(download: object) -> types.ModuleType:
    module = types.ModuleType("kagglehub")
    module.dataset_download = download  # type: ignore[attr-defined]
    return module


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "why_unreachable", lambda site: None)


def test_cats_are_downloaded_once_and_kept_without_copies(online: None, monkeypatch: pytest.MonkeyPatch,
                                                          tmp_path: Path) -> None:
    calls = []

    def download(handle: str) -> str:
        output_dir = os.environ["KAGGLEHUB_CACHE"]
        calls.append(handle)
        print("a chatty downloader")
        for name, content in CATS.items():
            for copy in ("", "copy of "):
                (Path(output_dir) / f"{copy}{Path(name).name}").write_bytes(content)
        return output_dir

    monkeypatch.setitem(sys.modules, "kagglehub", kagglehub_that(download))
    n = len(load("cats")) + len(load("cats", "test"))
    assert n == 40 and calls == [sources.KAGGLE_CATS] and data.available()["cats"] == "the cache"
    assert [f.name for f in (tmp_path / "cache").iterdir() if "lock" not in f.name] == [
        "cats-kaggle-1.safetensors"]  # the download itself is gone


def test_a_cut_download_becomes_a_stand_in_and_leaves_nothing(online: None, monkeypatch: pytest.MonkeyPatch,
                                                              tmp_path: Path,
                                                              capfd: pytest.CaptureFixture) -> None:
    calls = []

    def download(handle: str) -> str:
        calls.append(handle)
        (Path(os.environ["KAGGLEHUB_CACHE"]) / "0.jpg").write_bytes(jpeg(0)[:500])
        return os.environ["KAGGLEHUB_CACHE"]

    monkeypatch.setitem(sys.modules, "kagglehub", kagglehub_that(download))
    with pytest.warns(StandInWarning, match=r"^cats: its download failed.* 0\.jpg .*drawn-cats takes"):
        images = load("cats")
    assert images.source.startswith("stand-in") and images.x.shape == (12, 3, 64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load("cats", "test")
    assert len(calls) == 1 and capfd.readouterr().out == ""
    assert not list((tmp_path / "cache").glob("cats*.safetensors")) and not list(tmp_path.rglob("0.jpg"))
    monkeypatch.setattr(sources, "_failed", {})  # another process, another day
    for name, content in CATS.items():
        (tmp_path / Path(name).name).write_bytes(content)
    monkeypatch.setitem(sys.modules, "kagglehub", kagglehub_that(lambda handle: str(tmp_path)))
    assert len(load("cats")) > 30 and "KAGGLEHUB_CACHE" not in os.environ


def test_torchvisions_sets_are_read_in_our_layout(online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets
    pixels = np.arange(4 * 3 * 32 * 32).reshape(4, 3, 32, 32).astype(np.uint8)

    class CIFAR10:
        def __init__(self, root: Path, train: bool, download: bool) -> None:
            self.data, self.targets = pixels.transpose(0, 2, 3, 1).copy(), [3, 1, 2, 0]

    class STL10:
        def __init__(self, root: Path, split: str, download: bool) -> None:
            self.data = pixels.copy()
            self.labels = np.full(4, -1) if split == "unlabeled" else np.arange(4, dtype=np.uint8)

    monkeypatch.setattr(datasets, "CIFAR10", CIFAR10)
    monkeypatch.setattr(datasets, "STL10", STL10)
    cifar, stl, bare = load("cifar10"), load("stl10", "test"), load("stl10", "unlabeled")
    for images in (cifar, stl, bare):
        assert torch.equal(images.x, torch.from_numpy(pixels)) and "torchvision" in images.source
    assert cifar.labels.tolist() == [3, 1, 2, 0] and stl.labels.tolist() == [0, 1, 2, 3]
    assert bare.labels is None


@pytest.mark.parametrize(("name", "shape", "labelled"), [
    ("cats", (12, 3, 64, 64), False), ("ffhq", (12, 3, 128, 128), False), ("stl10", (12, 3, 96, 96), True),
    ("cifar10", (12, 3, 32, 32), True), ("fashion-mnist", (60000, 1, 28, 28), True)])
def test_without_a_network_another_set_takes_the_place(name: str, shape: tuple, labelled: bool) -> None:
    with pytest.warns(StandInWarning, match=f"^{name}: .* takes its place$") as told:
        images = load(name)
    assert images.x.shape == shape and (images.labels is not None) == labelled
    assert images.name == name and images.source.startswith("stand-in") and len(told) == 1
    assert "\n" not in str(told[0].message)


def test_stand_ins_keep_size_limit_split_and_missing_labels() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train, test = load("cats", size=20, limit=3), load("cats", "test", size=20)
        bare, tiny = load("stl10", "unlabeled"), load("cats", size=4)
    assert train.x.shape == (3, 3, 20, 20) and test.x.shape == (6, 3, 20, 20) and bare.labels is None
    assert tiny.x.shape == (12, 3, 4, 4) and not members(train) & members(test)
    assert torch.equal(train.x, load("drawn-cats", size=20, limit=3).x)
    assert load("drawn-cats").labels is None


def test_the_line_is_one_line_said_once_and_not_on_stdout() -> None:
    program = "from coursekit.data import load\nload('cats', limit=2)\nload('cats', 'test', limit=2)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                          env=os.environ | {"COURSEKIT_DATA": "no-such-folder"})
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1
    wanted = "StandInWarning: cats: COURSEKIT_OFFLINE is set, and COURSEKIT_DATA names no-such-folder"
    assert wanted in done.stderr


def test_no_network_is_noticed_at_once_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def nobody(*_: object, **__: object) -> None:
        asked.append(1)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.delenv("COURSEKIT_OFFLINE")
    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    for _ in range(2):
        with pytest.warns(StandInWarning, match=r"cats: https://www\.kaggle\.com/ cannot be reached: .*Name"):
            load("cats", limit=1)
        monkeypatch.setattr(data, "_told", {})
    assert len(asked) == 1


def test_a_network_that_hangs_is_left_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COURSEKIT_OFFLINE")
    done = threading.Event()

    def hang(*_: object, **__: object) -> None:
        done.wait(20)
        raise OSError("too late")

    monkeypatch.setattr("urllib.request.urlopen", hang)
    start = time.monotonic()
    assert "did not answer within 0.2 s" in str(fetch.why_unreachable("https://example.org", 0.2))
    assert time.monotonic() - start < 5
    done.set()


def test_a_server_that_answers_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    class Grumpy(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.delenv("COURSEKIT_OFFLINE")
    server = HTTPServer(("127.0.0.1", 0), Grumpy)
    threading.Thread(target=server.handle_request, daemon=True).start()
    assert fetch.why_unreachable(f"http://127.0.0.1:{server.server_port}/") is None
    server.server_close()
    assert "cannot be reached" in str(fetch.why_unreachable(f"http://127.0.0.1:{server.server_port}/"))


# ------------------------------------------------------------------------------------------------- real data

@pytest.fixture(scope="module")
def real_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("real")


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch, real_cache: Path) -> Path:
    monkeypatch.setenv("COURSEKIT_DATA", str(REAL))
    monkeypatch.setenv("COURSEKIT_CACHE", str(real_cache))
    return REAL


@real_data
def test_the_real_cats(real: Path) -> None:
    train, test = load("cats"), load("cats", "test")
    assert len(train) + len(test) == 8303 and 400 < len(test) < 600
    start = time.process_time()
    again = load("cats")
    assert time.process_time() - start < 2 and torch.equal(again.x, train.x)  # decoding takes five seconds
    mean = torch.cat([train.x, test.x]).float().mean((0, 2, 3)) / 255
    torch.testing.assert_close(mean, torch.tensor([0.4833, 0.4335, 0.3854]), atol=1e-3, rtol=0)


@real_data
def test_known_near_duplicates_of_the_real_cats_lie_on_one_side(real: Path) -> None:
    files = formats.pictures(real / "cats64" / "cats64.tar.gz")
    test = members(load("cats", "test"))
    table = (real / "cats64" / "near_duplicates.csv").read_text().split()[1:]
    pairs = [line.split(",")[:2] for line in table]
    both = [[files[f"cats64/{i}.jpg"] for i in pair] for pair in pairs
            if all(f"cats64/{i}.jpg" in files for i in pair)]
    assert len(both) > 10
    for a, b in both:
        x = formats.decode({"a": a, "b": b}, real)
        assert len({hashlib.sha256(one.numpy().tobytes()).hexdigest() in test for one in x}) == 1


@real_data
def test_the_real_cifar_says_that_it_is_lossy(real: Path, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own / "cifar10").mkdir()
    (own / "cifar10" / "cifar10-jpeg-tiny.tar.gz").symlink_to(real / "cifar10" / "cifar10-jpeg-tiny.tar.gz")
    monkeypatch.setenv("COURSEKIT_DATA", str(own))
    train, test = load("cifar10"), load("cifar10", "test")
    assert train.x.shape == (1000, 3, 32, 32) and test.x.shape == (200, 3, 32, 32)
    assert "lossy" in train.source
    assert train.labels.bincount().tolist() == [100] * 10


def test_labels_are_one_number_per_image() -> None:
    with pytest.raises(ValueError, match="one per image"):
        Images(torch.zeros(4, 1, 4, 4, dtype=torch.uint8), torch.zeros(4, 2, dtype=torch.int64), "pairs", "here")
