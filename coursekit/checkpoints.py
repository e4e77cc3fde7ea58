"""Trained networks that come with the course: safetensors and a card each, never a pickle.

A checkpoint is three things in one folder: `name.safetensors` with half-precision weights,
`name.json` with the card, and its line in `index.json`, the sha256 of both.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from coursekit import nets, schedules
from coursekit.denoisers import Denoiser, from_eps, from_v, from_x0
from coursekit.fetch import lock, replacing, sha256_of, shipped

SCHEDULES: dict[str, Callable[..., Any]] = {
    "linear": schedules.linear_schedule, "cosine": schedules.cosine_schedule,
    "straight": schedules.StraightPath, "exploding": schedules.VarianceExploding}
SCALE = ".row-scale"  # ends the name of what an 8-bit tensor is multiplied by, row by row
AS_DENOISER = {"eps": from_eps, "x0": from_x0, "v": from_v}


@dataclass(frozen=True)
class Card:
    """What a checkpoint is, how it was made and how good it measured.

    metrics are named with what they were measured on; seconds are wall-clock training time on
    `device`. `net`, `config`, `schedule` and `predicts` are enough to rebuild the network; a schedule
    is a name of SCHEDULES and its arguments, and both are None for a network that does not denoise.
    """

    name: str
    recipe: str  # the command that trains it again
    data: str
    images: int  # distinct training images
    steps: int
    seconds: float = 0.0
    device: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    notes: str = ""
    net: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] | None = None
    predicts: str | None = None
    parameters: int = 0
    file: str = ""
    sha256: str = ""  # of the weights; kept in index.json


def available() -> list[Card]:
    """The cards of all checkpoints that come with the course, by name."""
    index = _index(shipped("checkpoints"))
    names = sorted(Path(file).stem for file in index if file.endswith(".safetensors"))
    return [_card(shipped("checkpoints", f"{name}.safetensors")) for name in names]


def pretrained(name: str) -> nn.Module:
    """A shipped network in eval mode, in float32, with its `.card`.

    A diffusion model also carries `.schedule` and `.predicts`, one of "eps", "x0" and "v".
    """
    known = [Path(file).stem for file in _index(shipped("checkpoints")) if file.endswith(".safetensors")]
    if name not in known:
        near = difflib.get_close_matches(str(name).lower(), known, n=3, cutoff=0.3) or sorted(known)
        raise ValueError(f"no checkpoint is called {name!r}; the nearest are {', '.join(near)}")
    return load(shipped("checkpoints", f"{name}.safetensors"))


def denoiser(name: str, **cond: Any) -> tuple[Denoiser, Any]:
    """A shipped diffusion model ready for a sampler: (denoise, schedule). `cond`, as label=..., goes to it."""
    model: Any = pretrained(name)
    if model.predicts is None:
        raise ValueError(f"{name!r} does not denoise: its card names no prediction")
    return AS_DENOISER[model.predicts](model, model.schedule, **cond), model.schedule


def save(model: nn.Module, path: str | Path, card: Card, bits: int = 16) -> Card:
    """Write the weights in half precision, the card and the index line; returns the finished card.

    bits = 8 halves the file: matrices and kernels become whole numbers in -127..127 times one scale for each
    row (index of the first axis). Enough for pictures of how a training went, where many snapshots must be small.

    The network's class and `.config` go on the card, so that `load` can build it again. Each file is
    written beside its place and then renamed, the index last: a process killed between two of them leaves
    a checkpoint that `load` refuses, never half of one that it takes.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"a checkpoint's file name ends in .safetensors, got {path.name!r}")
    kind, config = type(model).__name__, getattr(model, "config", None)
    if getattr(nets, kind, None) is not type(model) or not isinstance(config, dict):
        raise ValueError(f"only networks of coursekit.nets with a .config can be rebuilt, got {kind}")
    if bits not in (8, 16):
        raise ValueError(f"weights are stored in 8 or 16 bits, got bits = {bits}")
    tensors: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        tensors |= _packed(key, value.detach().cpu().contiguous(), bits)
    if not all(bool(v.isfinite().all()) for v in tensors.values()):
        raise ValueError(f"the weights for {path.name} are not finite in half precision")
    folder, described = path.parent, path.with_suffix(".json")
    guard = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    with lock(Path(tempfile.gettempdir(), f"coursekit-{guard}")):  # two trainings may end at once
        with replacing(path) as beside:
            save_file(tensors, beside)
        card = replace(card, file=path.name, sha256=sha256_of(path), net=kind, config=config,
                       parameters=sum(p.numel() for p in model.parameters()))
        text = json.dumps(asdict(card), indent=2, ensure_ascii=False) + "\n"
        with replacing(described) as beside:
            beside.write_text(text, encoding="utf-8")
        index = _index(folder) | {path.name: card.sha256, described.name: sha256_of(described)}
        lines = json.dumps(dict(sorted(index.items())), indent=2) + "\n"
        with replacing(folder / "index.json") as beside:
            beside.write_text(lines, encoding="utf-8")
    return card


def load(path: str | Path) -> nn.Module:
    """The network that `save` wrote, in eval mode, in float32, with `.card`, `.schedule`, `.predicts`.

    ValueError, naming the file, if weights or card are missing, cut short or altered.
    """
    path = Path(path)
    card = _card(path)
    _verify(path)
    build = getattr(nets, card.net, None)
    if card.net not in nets.__all__ or build is None:
        raise ValueError(f"{path} holds a {card.net!r}, which coursekit.nets does not know")
    model: Any = build(**card.config)
    model.load_state_dict(_unpacked(load_file(path)))
    model.card = card
    model.predicts = card.predicts
    model.schedule = build_schedule(card.schedule) if card.schedule else None
    return model.eval()


def build_schedule(described: dict[str, Any]) -> Any:
    """The path that a card describes, as {"name": "cosine", "T": 1000} does."""
    name = described.get("name")
    if name not in SCHEDULES:
        raise ValueError(f"a schedule's name is one of {sorted(SCHEDULES)}, got {name!r}")
    return SCHEDULES[name](**{k: v for k, v in described.items() if k != "name"})


def _packed(key: str, value: Tensor, bits: int) -> dict[str, Tensor]:
    if not value.is_floating_point():
        return {key: value}
    if bits == 16 or value.ndim < 2:
        return {key: value.half()}
    rows = value.float().flatten(1)
    scale = (rows.abs().amax(1) / 127).clamp(min=1e-7)  # half precision can tell it from 0
    whole = (rows / scale.half().float()[:, None]).round().clamp(-127, 127)
    return {key: whole.to(torch.int8).view(value.shape), key + SCALE: scale.half()}


def _unpacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items() if not k.endswith(SCALE)}
    for key in [k.removesuffix(SCALE) for k in tensors if k.endswith(SCALE)]:
        scale = tensors[key + SCALE].float()
        found[key] = found[key].float() * scale.view(-1, *[1] * (found[key].ndim - 1))
    return found


def _card(path: Path) -> Card:
    described = path.with_suffix(".json")
    _verify(described)
    return Card(**json.loads(described.read_text(encoding="utf-8")))


def _verify(path: Path) -> None:
    wanted = _index(path.parent).get(path.name)
    if not path.exists():
        raise ValueError(f"{path} is missing")
    if wanted is None:
        raise ValueError(f"{path} has no line in {path.parent / 'index.json'}")
    if sha256_of(path) != wanted:
        raise ValueError(f"{path} is cut short or altered: its sha256 is not the one in index.json; "
                         "restore it with git, or train it again")


def _index(folder: Path) -> dict[str, str]:
    try:
        index: dict[str, str] = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise ValueError(f"{folder / 'index.json'} is damaged; restore it with git") from None
    return index
