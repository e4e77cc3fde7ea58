"""What several test files need: devices and dtypes to try, seeded numbers, a network that says what it is told."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from coursekit import checks
from coursekit.checks import CheckFailed
from coursekit.nets import KPN

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else []),
           *(["mps"] if torch.backends.mps.is_available() else [])]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


class Says(nn.Module):
    """A network that answers with a function of (x_t, t)."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x_t, t, **cond):
        return self.answer(x_t, t, **cond)


def awake(**config):
    """A small KPN whose zero-initialised layers have been moved, as training would."""
    torch.manual_seed(0)
    net = KPN(**config)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.1 * torch.randn_like(p)
    return net.eval()


def pictures(n, size, seed=0):
    """n colour pictures (n, 3, size, size) uint8 of which no two rows, columns or colours agree."""
    return torch.randint(0, 256, (n, 3, size, size), generator=generator(seed), dtype=torch.uint8)


def write_stl10(folder, monkeypatch):
    """STL-10's five files as Stanford hands them out, with few pictures; returns {split: (pictures, labels)}.

    A picture is its red, green and blue, and each of them column by column; labels are bytes from 1 to 10. Torchvision
    knows the files by their hashes, so it is told those of ours.
    """
    from torchvision.datasets import STL10

    held = {split: (pictures(n, 96, seed), torch.arange(n) % 10)
            for seed, (split, n) in enumerate({"train": 4, "test": 3, "unlabeled": 5}.items())}
    folder = folder / "stl10_binary"
    folder.mkdir(parents=True)
    for split, (x, labels) in held.items():
        (folder / f"{split}_X.bin").write_bytes(x.transpose(2, 3).contiguous().numpy().tobytes())
        if split != "unlabeled":
            (folder / f"{split}_y.bin").write_bytes(labels.add(1).byte().numpy().tobytes())
    for files in ("train_list", "test_list"):
        known = [[name, hashlib.md5((folder / name).read_bytes()).hexdigest()] for name, _ in getattr(STL10, files)]
        monkeypatch.setattr(STL10, files, known)
    return held


def write_ffhq(folder, n=50):
    """n faces as FFHQ hands out its thumbnails, 128 x 128 PNG in folders of a thousand (here ten), with its licence."""
    x = pictures(n, 128)
    for i, picture in enumerate(x):
        path = folder / "thumbnails128x128" / f"{i // 10:02d}000" / f"{i:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).numpy())).save(path)
    (folder / "LICENSE.txt").write_text("CC BY-NC-SA 4.0")
    return x


def suite_of(right, planted, *modules):
    """Three tests of checks: they pass what is right, name what is wrong, and none of the modules' is forgotten.

    right     {check: an answer or a list of answers}
    planted   [(check, a wrong answer, a pattern of the sentence that names the mistake)]
    """
    lists = {name: some if isinstance(some, list) else [some] for name, some in right.items()}
    answers = [(name, answer) for name, some in lists.items() for answer in some]

    @pytest.mark.parametrize("name, answer", answers, ids=[name for name, _ in answers])
    def passes(name, answer, capsys):
        getattr(checks, name)(answer)
        assert capsys.readouterr().out.startswith("passed: ")

    @pytest.mark.parametrize("name, mistake, sentence", planted, ids=[f"{n}-{s}" for n, _, s in planted])
    def names(name, mistake, sentence):
        with pytest.raises(CheckFailed, match=sentence):
            getattr(checks, name)(mistake)

    def complete():
        here = {f"coursekit.checks.{module}" for module in modules}
        public = {name for name in checks.__all__ if getattr(checks, name).__module__ in here}
        assert public == set(right) == {name for name, _, _ in planted}

    return passes, names, complete
