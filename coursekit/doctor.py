"""Ten facts the course stands on, each looked at, and what to do about one that does not hold."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version


class Trouble(Exception):
    """Trouble(what was found, what to do about it)."""


def doctor(brief: bool = False) -> list[str]:
    """Ten lines, each `ok` and a fact, or `!!` and what was found and what to do about it.

    brief: facts without this machine's details, so that a healthy machine gives the same lines everywhere.
    """
    lines = []
    for fact, look in CHECKS.items():
        try:
            found = look()
            lines.append(f"ok  {fact}" if brief else f"ok  {fact}: {found}")
        except Trouble as trouble:
            lines.append(f"!!  {fact}: {trouble.args[0]}; {trouble.args[1]}")
        except Exception as error:  # a doctor does not faint
            said = (str(error).splitlines() or [""])[0]
            lines.append(f"!!  {fact}: {type(error).__name__}: {said}; {_again()}")
    return lines


def _again() -> str:
    return "install the course again with the first line of the README"


def _python() -> str:
    found = platform.python_version()
    if _number(found) < (3, 11):
        raise Trouble(f"this is {found}", "make the environment with a newer one, as `python3.12 -m venv`")
    return found


def _torch() -> str:
    import torch
    import torchvision

    if _number(torch.__version__) < (2, 5):
        raise Trouble(f"this is {torch.__version__}", "pip install --upgrade torch torchvision")
    return f"{torch.__version__}, torchvision {torchvision.__version__}"


def _device() -> str:
    import torch

    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    ones = torch.ones(1, 1, 3, 3, device=device)
    nine = torch.nn.functional.conv2d(ones, ones).item()
    if nine != 9:
        raise Trouble(f"on {device} nine ones make {nine}", "hide it: `export CUDA_VISIBLE_DEVICES=`")
    if device == "cpu":
        return f"a CPU with {torch.get_num_threads()} threads, which is all the course needs"
    return torch.cuda.get_device_name() if device == "cuda" else "Apple's GPU"


def _digits() -> str:
    from coursekit import data

    images = data.load("mnist", split="test")
    return f"{len(images):,} of them read for testing"


def _other_data() -> str:
    from coursekit import fetch

    named = os.environ.get("COURSEKIT_DATA")
    if named and fetch.data_folder() is None:
        raise Trouble(f"COURSEKIT_DATA is {named}, which is no folder", "correct it, or unset it to download")
    return f"in {named} first; `coursekit data` lists them" if named else "`coursekit data` lists them"


def _cache() -> str:
    from coursekit import fetch

    folder = fetch.cache_folder()
    if folder is None:
        raise Trouble("there is none", "pip install platformdirs, or set COURSEKIT_CACHE to a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise Trouble(f"{folder}: {error.strerror}", "set COURSEKIT_CACHE to a folder of yours") from None
    return f"{folder}, {shutil.disk_usage(folder).free / 1e9:.0f} GB free"


def _checkpoints() -> str:
    from coursekit import checkpoints

    cards = checkpoints.available()
    if not cards:
        raise Trouble("there are none", "`git checkout data/checkpoints` brings them back")
    for card in cards:
        checkpoints.pretrained(card.name)
    return ", ".join(card.name for card in cards)


def _perceptual() -> str:
    import torch

    from coursekit.perceptual import lpips

    grey = torch.zeros(1, 3, 32, 32)
    if lpips(grey, grey).item() != 0 or lpips(grey, grey + 0.5).item() <= 0:
        raise Trouble("they measure nonsense", "`git checkout data/weights` brings them back")
    return "read and tried"


def _jupyter() -> str:
    if "ipykernel" in sys.modules:
        return "this notebook's"
    try:
        return f"JupyterLab {version('jupyterlab')}"
    except PackageNotFoundError:
        raise Trouble("JupyterLab is not installed", 'pip install -e ".[course]"') from None


def _sliders() -> str:
    found = version("ipywidgets")
    if _number(found) < (7, 7):
        raise Trouble(f"ipywidgets is {found}", "pip install --upgrade ipywidgets, then reload the page")
    return f"ipywidgets {found}"


def _number(release: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", release)[:2]))


CHECKS: dict[str, Callable[[], str]] = {
    "Python is 3.11 or newer": _python,
    "PyTorch is 2.5 or newer, with torchvision": _torch,
    "a device computes": _device,
    "the digits of MNIST are here": _digits,
    "other data sets can be found": _other_data,
    "the cache folder can be written": _cache,
    "the trained checkpoints are here and whole": _checkpoints,
    "the weights of LPIPS are here and whole": _perceptual,
    "there is a Jupyter": _jupyter,
    "sliders can move": _sliders,
}
