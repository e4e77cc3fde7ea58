"""Read pictures out of idx files, archives and folders; a cut or altered one is refused by its name."""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def unzipped(path: Path) -> bytes:
    """The bytes inside a .gz file."""
    try:
        return gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file ({error}): fetch it again") from error


def parse_idx(data: bytes, name: str | Path) -> Tensor:
    """The array in an idx file: two zeros, a type (8 is uint8), the rank, big-endian sizes, the values."""
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError(f"{name} is no idx file of bytes: it starts with {data[:4].hex(' ')}, "
                         "wanted are 00 00 08 and a rank")
    start = 4 + 4 * data[3]
    if len(data) < start:
        raise ValueError(f"{name} holds {len(data)} bytes where its header alone has {start}: fetch it again")
    shape = [int.from_bytes(data[i:i + 4], "big") for i in range(4, start, 4)]
    wanted = start + int(np.prod(shape, dtype=object))
    if len(data) != wanted:
        raise ValueError(f"{name} holds {len(data)} bytes where its header promises {wanted}: fetch it again")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)[start:].reshape(shape)


def pictures(path: Path) -> dict[str, bytes]:
    """The image files in a folder or a tar.gz, in the order of their names; nothing is unpacked to disk."""
    if path.is_dir():
        found = {str(f.relative_to(path)): f.read_bytes() for f in picture_files(path)}
    else:
        try:
            with tarfile.open(fileobj=io.BytesIO(unzipped(path))) as tar:
                files = {m.name: tar.extractfile(m) for m in tar
                         if m.isfile() and _is_picture(Path(m.name))}
                found = {name: file.read() for name, file in files.items() if file}
        except tarfile.TarError as error:
            raise ValueError(f"{path} is not a whole tar file ({error}): fetch it again") from error
    if not found:
        raise ValueError(f"{path} holds no pictures, files that end in {', '.join(PICTURES)} are wanted")
    return dict(sorted(found.items()))


def picture_files(folder: Path) -> list[Path]:
    """The image files below a folder, in the order of their names."""
    return sorted(f for f in folder.rglob("*") if _is_picture(f) and f.is_file())


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURES and not path.name.startswith(".")  # macOS leaves ._a.jpg beside a.jpg


def decode(files: Mapping[str, bytes], where: Path) -> Tensor:
    """Colour pictures of one size as (n, 3, h, w) uint8."""
    if not files:
        return torch.empty(0, 3, 1, 1, dtype=torch.uint8)
    first, *_ = arrays = [_rgb(data, f"{name} in {where}") for name, data in files.items()]
    for name, array in zip(files, arrays, strict=True):
        if array.shape != first.shape:
            raise ValueError(f"{name} in {where} is {array.shape[1]} x {array.shape[0]} pixels, "
                             f"the first picture is {first.shape[1]} x {first.shape[0]}: they must agree")
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def squares(files: Sequence[Path], size: int) -> Tensor:
    """The middle square of each picture, brought to size x size: (n, 3, size, size) uint8."""
    arrays = [_rgb(path.read_bytes(), str(path), size) for path in files]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def _rgb(data: bytes, name: str, size: int | None = None) -> np.ndarray:
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")  # phones store them lying
    except (OSError, SyntaxError) as error:  # Pillow's ways to say that a file is broken
        raise ValueError(f"{name} is not a whole picture: {error}") from error
    if size is not None:
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)  # averages when it shrinks
    return np.asarray(image)
