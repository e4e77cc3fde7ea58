"""Where each data set comes from: what is shipped, COURSEKIT_DATA, the cache, then the network.

A reader takes (split, size, limit) and returns Raw, or raises Missing with the reason. Only those that
draw or shrink pictures one by one heed size and limit; `data.load` applies them in any case.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from coursekit import drawn, easel, fetch, fur
from coursekit.formats import decode, parse_idx, picture_files, pictures, squares, unzipped

HELD_OUT = 0.06  # the part of the cats, and of a folder of faces, that is kept for testing
NEAR_DUPLICATE = 0.985  # correlation, grey and 16 x 16, from which two cats stay on one side
DRAWN = {"train": 1000, "test": 200}
KAGGLE_CATS = "spandan2/cats-faces-64x64-for-generative-models"
CATS = ("cats64/cats64.tar.gz", "cats64", "cats")  # in COURSEKIT_DATA; a folder of pictures will do
CIFAR_JPEG = ("cifar10/cifar10-jpeg.tar.gz", "cifar10/cifar10-jpeg-tiny.tar.gz")
MNIST_SHA256 = {  # of the unpacked files, so that any gzip of them will do
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


class Raw(NamedTuple):
    """What a source hands over."""

    x: Tensor  # (n, c, h, w) uint8
    labels: Tensor | None  # (n,) int64
    source: str


class Missing(Exception):
    """A data set that cannot be had here and now; the text says why."""


class Torchvision(NamedTuple):
    """How torchvision knows a data set."""

    kind: str  # the name of its class
    folder: str  # what lies in its root
    site: str
    size: str  # of the download
    splits: dict[str, dict[str, Any]]  # the class's argument for each


TWO: dict[str, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
THREE: dict[str, dict[str, Any]] = {split: {"split": split} for split in ("train", "test", "unlabeled")}
TORCHVISION = {
    "fashion-mnist": Torchvision("FashionMNIST", "FashionMNIST",
                                 "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", "30 MB", TWO),
    "cifar10": Torchvision("CIFAR10", "cifar-10-batches-py", "https://www.cs.toronto.edu/", "170 MB", TWO),
    "stl10": Torchvision("STL10", "stl10_binary", "http://ai.stanford.edu/", "2.6 GB", THREE),
}
_failed: dict[str, str] = {}  # what could not be downloaded, and why: one process tries only once


def mnist(split: str, size: int | None, limit: int | None) -> Raw:
    """The 70,000 handwritten digits, shipped."""
    part = {"train": "train", "test": "t10k"}[split]
    own = _own("mnist/train-images-idx3-ubyte.gz")
    folder = own.parent if own else fetch.shipped("mnist")
    x, labels = (_mnist_file(folder / f"{part}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    return Raw(x[:, None], labels.long(), "COURSEKIT_DATA, mnist" if own else "shipped with the course")


def _mnist_file(path: Path) -> Tensor:
    if not path.is_file():
        raise ValueError(f"{path} is missing: restore it")
    data = unzipped(path)
    if hashlib.sha256(data).hexdigest() != MNIST_SHA256[path.stem]:
        raise ValueError(f"{path} was altered: its sha256 is not that of MNIST's {path.stem}, fetch it again")
    return parse_idx(data, path)


def cats(split: str, size: int | None, limit: int | None) -> Raw:
    """Cat faces, 64 x 64, each once: the archive or a folder in COURSEKIT_DATA, else Kaggle's."""
    where = _own(*CATS)
    if where is None:
        found = fetch.cached("cats-kaggle-1", _cats_from_kaggle, prefix=f"{split}.")
        return Raw(found["x"], None, f"Kaggle, {KAGGLE_CATS}")
    return Raw(_decoded("cats", where, _two_sides, split)["x"], None, f"COURSEKIT_DATA, {where.name}")


def _cats_from_kaggle() -> dict[str, Tensor]:
    def download(folder: Path) -> dict[str, Tensor]:
        import kagglehub

        before = os.environ.get("KAGGLEHUB_CACHE")
        os.environ["KAGGLEHUB_CACHE"] = str(folder)  # understood by every version
        try:
            there = Path(kagglehub.dataset_download(KAGGLE_CATS))
        finally:
            os.environ.pop("KAGGLEHUB_CACHE")
            if before is not None:
                os.environ["KAGGLEHUB_CACHE"] = before
        return _two_sides(pictures(there), there)
    return _downloaded("cats", "https://www.kaggle.com/", download)


def _two_sides(files: dict[str, bytes], where: Path) -> dict[str, Tensor]:
    """Pictures for training and for testing; of byte-identical files the first is kept."""
    distinct: dict[str, str] = {}
    for name, data in files.items():
        distinct.setdefault(hashlib.sha256(data).hexdigest(), name)
    x = decode({name: files[name] for name in distinct.values()}, where)
    test = held_out(x, list(distinct))
    return {"train.x": x[~test], "test.x": x[test]}


def held_out(x: Tensor, hashes: list[str]) -> Tensor:
    """Which pictures are kept for testing, (n,) bool.

    The hash of its file decides for each picture, so one that is missing moves no other. Then near
    duplicates of a test picture, and theirs, join it: no test picture has a twin in training.
    """
    test = torch.tensor([_for_testing(digest) for digest in hashes])
    small = F.adaptive_avg_pool2d(x.float().mean(1, keepdim=True), 16).flatten(1)
    small = F.normalize(small - small.mean(1, keepdim=True))
    twins = torch.cat([(rows @ small.T > NEAR_DUPLICATE).nonzero() + torch.tensor([512 * i, 0])
                       for i, rows in enumerate(small.split(512))])
    while not torch.equal(spread := test.index_fill(0, twins[test[twins[:, 0]], 1], True), test):
        test = spread
    return test


def _for_testing(digest: str) -> bool:
    return int(digest[:12], 16) < HELD_OUT * 16**12


def cifar10(split: str, size: int | None, limit: int | None) -> Raw:
    """Ten kinds of things, 32 x 32: torchvision's, or the JPEG copy in COURSEKIT_DATA, which is lossy."""
    archive = None if _own(TORCHVISION["cifar10"].folder) else _own(*CIFAR_JPEG)
    if archive is None:
        return _by_torchvision("cifar10", split)
    found = _decoded("cifar10", archive, _by_class, split)
    return Raw(found["x"], found["labels"],
               f"COURSEKIT_DATA, {archive.name}: lossy JPEG, not for comparison with published figures")


def _by_class(files: dict[str, bytes], where: Path) -> dict[str, Tensor]:
    """Pictures named .../split/class/file; the classes count in the order of the alphabet, as CIFAR's do."""
    names = {split: [n for n in files if n.split("/")[-3] == split] for split in ("train", "test")}
    classes = sorted({name.split("/")[-2] for name in files})
    return {f"{split}.{key}": value for split, chosen in names.items() for key, value in {
        "x": decode({name: files[name] for name in chosen}, where),
        "labels": torch.tensor([classes.index(name.split("/")[-2]) for name in chosen])}.items()}


def _decoded(name: str, where: Path, arrange: Callable[[dict[str, bytes], Path], dict[str, Tensor]],
             split: str) -> dict[str, Tensor]:
    """One split of the pictures in an archive or a folder, decoded once for each content."""
    files = pictures(where) if where.is_dir() else None
    hashes = None if files is None else {n: hashlib.sha256(data).hexdigest() for n, data in files.items()}
    key = fetch.sha256_of(where) if hashes is None else hashlib.sha256(repr(hashes).encode()).hexdigest()
    return fetch.cached(f"{name}-{key[:16]}-1", lambda: arrange(files or pictures(where), where), f"{split}.")


def _by_torchvision(name: str, split: str) -> Raw:
    kind, folder, site, _, splits = TORCHVISION[name]

    def read(root: Path, split: str, download: bool) -> dict[str, Tensor]:
        from torchvision import datasets

        found = getattr(datasets, kind)(root, download=download, **splits[split])
        x = torch.as_tensor(found.data)
        x = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2) if x.shape[-1] == 3 else x
        labels = found.labels if name == "stl10" else found.targets
        known = {} if split == "unlabeled" else {"labels": torch.as_tensor(labels).long()}
        return {"x": x.contiguous()} | known

    def all_splits(root: Path) -> dict[str, Tensor]:
        return {f"{s}.{key}": value for s in splits for key, value in read(root, s, download=True).items()}

    if own := _own(folder):
        try:
            found = read(own.parent, split, download=False)
        except Exception as error:  # torchvision has many ways to say that a file is broken
            raise ValueError(f"{own} is not what torchvision's {kind} wants: {_in_a_line(error)}") from error
    else:
        found = fetch.cached(f"{name}-torchvision-1", lambda: _downloaded(name, site, all_splits),
                             f"{split}.")
    return Raw(found["x"], found.get("labels"), f"{'COURSEKIT_DATA' if own else 'torchvision'}, {kind}")


def _downloaded(name: str, site: str, download: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `download` makes of an empty folder, or Missing; a second question is answered at once."""
    if name not in _failed:
        try:
            with fetch.download_folder(name) as folder:
                if why := fetch.why_unreachable(site):
                    _failed[name] = why
                else:
                    return download(folder)
        except Exception as error:  # whatever somebody else's downloader may raise
            _failed[name] = f"its download failed: {_in_a_line(error)}"
    raise Missing(_failed[name])


def ffhq(split: str, size: int | None, limit: int | None) -> Raw:
    """Faces in a folder that the user names, cut square and shrunk, to 128 x 128 if no size is asked for."""
    where = _ffhq_folder()
    if where is None:
        raise Missing("it cannot be downloaded by code, put its pictures in a folder "
                      "and name that in COURSEKIT_FFHQ")
    side = size or 128
    files = [f for f in picture_files(where)
             if _for_testing(hashlib.sha256(f.name.encode()).hexdigest()) == (split == "test")][:limit]
    if not files:
        raise ValueError(f"the {split} part of {where} is empty, at least one picture is wanted")
    stamps = [(str(f.relative_to(where)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    key = hashlib.sha256(repr((side, stamps)).encode()).hexdigest()
    found = fetch.cached(f"ffhq-{key[:16]}-1", lambda: {"x": squares(files, side)})
    return Raw(found["x"], None, f"a folder of yours, {where.name}")


def _ffhq_folder() -> Path | None:
    named = os.environ.get("COURSEKIT_FFHQ")
    if named and not Path(named).expanduser().is_dir():
        raise ValueError(f"COURSEKIT_FFHQ must name a folder of pictures, got {named}")
    return Path(named).expanduser() if named else _own("ffhq")


def drawn_cats(split: str, size: int | None, limit: int | None) -> Raw:
    """Cat faces drawn by code, 64 x 64 if no size is asked for; the labels are their coats."""
    n, side, seed = DRAWN[split], max(size or 64, drawn.SMALLEST), 0 if split == "train" else 1
    if limit is not None and limit < n:
        x = drawn.drawn_cats(limit, side, seed)
    else:
        programs = [fetch.sha256_of(Path(str(module.__file__))) for module in (drawn, easel, fur)]
        code = hashlib.sha256(repr(programs).encode())
        x = fetch.cached(f"drawn-cats-{split}-{side}-{code.hexdigest()[:16]}",
                         lambda: {"x": drawn.drawn_cats(n, side, seed)})["x"]
    return Raw(x, drawn.coats(len(x), seed), "drawn by code")


READERS: dict[str, Callable[[str, int | None, int | None], Raw]] = {
    "mnist": mnist, "fashion-mnist": lambda split, size, limit: _by_torchvision("fashion-mnist", split),
    "cifar10": cifar10, "stl10": lambda split, size, limit: _by_torchvision("stl10", split),
    "ffhq": ffhq, "cats": cats, "drawn-cats": drawn_cats,
}


def splits(name: str) -> tuple[str, ...]:
    """The splits a data set has."""
    return tuple(TORCHVISION[name].splits) if name in TORCHVISION else ("train", "test")


def where(name: str) -> str:
    """Where a data set would come from now, as far as that is known without asking the network."""
    if name in ("mnist", "drawn-cats"):
        return "shipped with the course" if name == "mnist" else "drawn by code"
    if name == "ffhq":
        folder = _ffhq_folder()
        return f"the folder {folder.name}" if folder else "a stand-in, until COURSEKIT_FFHQ is set"
    known = TORCHVISION.get(name)
    own = _own(*CATS) if known is None else _own(known.folder, *(CIFAR_JPEG if name == "cifar10" else ()))
    if own:
        return f"COURSEKIT_DATA, {own.name}"
    stem = f"{name}-{'kaggle' if known is None else 'torchvision'}-1.safetensors"
    if (cache := fetch.cache_folder()) and (cache / stem).is_file():
        return "the cache"
    if name in _failed or os.environ.get("COURSEKIT_OFFLINE"):
        return f"a stand-in: {_failed.get(name, 'COURSEKIT_OFFLINE is set')}"
    return f"a download by torchvision, {known.size}" if known else "a download by kagglehub"


def _own(*names: str) -> Path | None:
    """The first of these that lies in COURSEKIT_DATA."""
    root = fetch.data_folder()
    return next((root / name for name in names if (root / name).exists()), None) if root else None


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
