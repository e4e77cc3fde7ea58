"""Find files, and never trust half of one: what is shipped, the cache, hashes, locks, atomic writes.

COURSEKIT_DATA names a folder that is searched before anything is downloaded, COURSEKIT_CACHE the one
that keeps downloaded and decoded images (else the user's cache folder), and COURSEKIT_OFFLINE forbids
the network. Losing the whole cache costs time, never results.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def shipped(*parts: str) -> Path:
    """Where a file that comes with the course lies: `data/` in a checkout, the package once installed."""
    package = Path(__file__).resolve().parent
    installed = package / "_shipped"
    return (installed if installed.is_dir() else package.parent / "data").joinpath(*parts)


def data_folder() -> Path | None:
    """The folder COURSEKIT_DATA names, or None.

    A relative name counts from the current folder or else from the checkout, so that one value serves
    both a shell at the top and a notebook, whose kernel starts in course/.
    """
    named = os.environ.get("COURSEKIT_DATA")
    if not named:
        return None
    folder = Path(named).expanduser()
    return next((f for f in (folder, shipped().parent / folder) if f.is_dir()), None)


def cache_folder() -> Path | None:
    """Where downloaded and decoded images are kept; None without COURSEKIT_CACHE and platformdirs."""
    if named := os.environ.get("COURSEKIT_CACHE"):
        return Path(named).expanduser()
    try:
        from platformdirs import user_cache_dir
    except ImportError:
        return None
    return Path(user_cache_dir("coursekit"))


def sha256_of(path: Path) -> str:
    """The hash of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file to fill, which then takes the place of `path` in one step.

    Whoever looks sees the old bytes or the new, never a part; if filling it fails, the old stay.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.", suffix=".part")
    os.close(handle)
    try:
        yield Path(name)
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp keeps it to the owner
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


@contextmanager
def lock(path: Path) -> Iterator[bool]:
    """Keep other processes out while one makes `path`; yields False where no lock can be had.

    The system frees the lock of a process that dies. On a read-only disk there is nothing to guard.
    """
    guard = FileLock(path.with_name(path.name + ".lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        guard.acquire(timeout=1800)  # longer than any of our downloads
    except (OSError, NotImplementedError):
        yield False
        return
    try:
        yield True
    finally:
        guard.release()


def cached(stem: str, make: Callable[[], dict[str, Tensor]], prefix: str = "") -> dict[str, Tensor]:
    """Those tensors of `make()` whose names start with `prefix`, from the cache if they were made before.

    Each is stored with its hash, so a file that was cut or altered is made again. Where the cache cannot
    be read or written (read-only, full, absent) the tensors are simply made.
    """
    folder = cache_folder()
    if folder is None:
        return _starting(make(), prefix)
    path = folder / f"{stem}.safetensors"
    if (found := _read_sealed(path, prefix)) is not None:
        return found
    with lock(path) as alone:
        if (found := _read_sealed(path, prefix)) is not None:  # another process made it while we waited
            return found
        made = make()
        if alone:
            with suppress(OSError, SafetensorError):
                for litter in folder.glob(f"{path.name}.*.part"):  # of a process that was killed
                    litter.unlink()
                with replacing(path) as temporary:
                    save_file(made, temporary, {name: _hash(x) for name, x in made.items()})
    return _starting(made, prefix)


def _starting(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def _hash(x: Tensor) -> str:
    digest = hashlib.sha256(json.dumps([str(x.dtype), list(x.shape)]).encode())
    digest.update(x.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_sealed(path: Path, prefix: str) -> dict[str, Tensor] | None:
    """The tensors of a cache file if their hashes agree, else None."""
    try:
        with safe_open(path, framework="pt") as file:
            hashes = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone()  # free of the file, which may be replaced
                       for name in list(file.keys()) if name.startswith(prefix)}
    except (OSError, SafetensorError):
        return None
    sound = bool(tensors) and all(_hash(x) == hashes.get(name) for name, x in tensors.items())
    return _starting(tensors, prefix) if sound else None


@contextmanager
def download_folder(name: str) -> Iterator[Path]:
    """An empty folder to download into, for one process at a time, gone afterwards.

    What arrived is kept as sealed tensors, so no half-written download is ever found again. Somebody
    else's downloader works in here: it must neither write to stdout nor wait for ever.
    """
    cache = cache_folder()
    patience = socket.getdefaulttimeout()
    with lock((cache or Path(tempfile.gettempdir())) / f"download-{name}") as alone:
        if cache and alone:
            folder = cache / f"download-{name}"
            shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
            folder.mkdir()
        else:
            folder = Path(tempfile.mkdtemp())
        socket.setdefaulttimeout(20)
        try:
            with redirect_stdout(sys.stderr):
                yield folder
        finally:
            socket.setdefaulttimeout(patience)
            shutil.rmtree(folder, ignore_errors=True)


def why_unreachable(url: str, seconds: float = 5.0) -> str | None:
    """None if the server answers in time, else the reason in a few words.

    A thread of its own asks: looking up a name can hang longer than any timeout Python lets us set.
    """
    if os.environ.get("COURSEKIT_OFFLINE"):
        return "COURSEKIT_OFFLINE is set"
    answer = [f"{url} did not answer within {seconds:g} s"]

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
            answer[0] = ""
        except urllib.error.HTTPError:
            answer[0] = ""  # the server dislikes the question, but it is there
        except OSError as error:
            answer[0] = f"{url} cannot be reached: {getattr(error, 'reason', error)}"

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0] or None
