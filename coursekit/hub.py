"""A trained network on the Hugging Face Hub and back, as a checkpoint with its card: no pickle, hashes checked.

The networks themselves know nothing of the Hub, so that building one does not import huggingface_hub: its mixin
is put around a network for as long as it is written or read, and what comes back is a plain network.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from coursekit.checkpoints import Card, load, save

WEIGHTS = "model.safetensors"
OPTIONS = {"revision", "cache_dir", "force_download", "local_files_only", "token"}  # of a download
READ_ME = """---
{{ card_data }}
---

# {{ name }}

A {{ net }} of coursekit with {{ parameters }} parameters, trained on {{ data }}: `{{ recipe }}`.
`model.json` says how, and how good it measured.

```python
from coursekit.hub import from_pretrained

model = from_pretrained("{{ address }}")  # with .card, .schedule and .predicts
```
"""


def save_pretrained(model: nn.Module, folder: str | Path, card: Card | None = None) -> Path:
    """Write what `push_to_hub` would upload into a folder; returns the folder.

    That is a checkpoint (weights in half precision, the card, the sha256 of both) called `model`, the
    network's arguments as config.json, and a README. The card is the network's own unless another is given.
    """
    held, config = _held(model, card)
    held.save_pretrained(Path(folder), config=config, model_card_kwargs=_facts(held, Path(folder).name))
    return Path(folder)


def push_to_hub(model: nn.Module, name: str, card: Card | None = None, **options: Any) -> str:
    """Upload a network to the repository `name` ("owner/digits"), made if need be; returns the address.

    Needs a login, `hf auth login`. `options` go to huggingface_hub, as private=True or token=...
    """
    held, config = _held(model, card)
    return str(held.push_to_hub(name, config=config, model_card_kwargs=_facts(held, name), **options))


def from_pretrained(name: str | Path, **options: Any) -> nn.Module:
    """The network of a repository or a folder, as `checkpoints.load` gives it: in eval mode, with its card.

    `options` go to huggingface_hub, as revision=... or local_files_only=True. ValueError, naming the file, if
    weights or card are missing or altered.
    """
    if not set(options) <= OPTIONS:
        raise ValueError(f"the options are {sorted(OPTIONS)}, got {sorted(set(options) - OPTIONS)}")
    network: nn.Module = _mixed().from_pretrained(name, **options).network
    return network


def _held(model: nn.Module, card: Card | None) -> tuple[Any, dict[str, Any]]:
    card = card or getattr(model, "card", None)
    if not isinstance(card, Card):
        raise ValueError("a network is published with a Card that says how it was trained, got none")
    return _mixed()(model, card), getattr(model, "config", {})


def _facts(held: Any, address: str) -> dict[str, Any]:
    card, network = held.card, held.network
    return {"name": card.name, "address": address, "net": type(network).__name__, "data": card.data,
            "recipe": card.recipe, "parameters": f"{sum(p.numel() for p in network.parameters()):,}"}


def _mixed() -> Any:
    """A class with huggingface_hub's mixin that holds a network and its card."""
    if find_spec("huggingface_hub") is None:
        raise ImportError("the Hub needs one package more: pip install 'coursekit[hub]'")
    from huggingface_hub import PyTorchModelHubMixin, snapshot_download

    about: Any = {"library_name": "coursekit", "model_card_template": READ_ME}

    class Held(PyTorchModelHubMixin, **about):
        def __init__(self, network: nn.Module, card: Card):
            self.network, self.card = network, card

        def _save_pretrained(self, save_directory: Path) -> None:
            save(self.network, save_directory / WEIGHTS, self.card)

        @classmethod
        def _from_pretrained(cls, *, model_id: str, **options: Any) -> Any:
            folder = Path(model_id)
            if not folder.is_dir():
                where = {name: options[name] for name in OPTIONS}
                folder = Path(snapshot_download(model_id, allow_patterns=["model.*", "index.json"], **where))
            network: Any = load(folder / WEIGHTS)
            return cls(network, network.card)

    return Held
