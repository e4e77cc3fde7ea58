"""Make data/weights/alexnet_lpips.safetensors: AlexNet's convolutions and the heads of LPIPS in one file.

    python tools/convert_alexnet.py alexnet_features.pth data/weights/alexnet_lpips.safetensors

The first file holds torchvision's AlexNet, `features.{0,3,6,8,10}.{weight,bias}`; the heads come from
the `lpips` package (version 0.1), which must be installed. The same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

CONVOLUTIONS = (0, 3, 6, 8, 10)  # where torchvision's `features` has them


def convert(trunk: Path) -> dict[str, Tensor]:
    """The trunk in half precision as conv{1..5}.{weight,bias}, the heads in float32 as head{1..5}."""
    spec = find_spec("lpips")
    if spec is None or spec.origin is None:
        raise SystemExit("the heads come with the lpips package: pip install lpips")
    heads = Path(spec.origin).parent / "weights" / "v0.1" / "alex.pth"
    conv = torch.load(trunk, map_location="cpu", weights_only=True)
    head = torch.load(heads, map_location="cpu", weights_only=True)
    out = {}
    for i, layer in enumerate(CONVOLUTIONS, start=1):
        for part in ("weight", "bias"):
            out[f"conv{i}.{part}"] = conv[f"features.{layer}.{part}"].half().contiguous()
        out[f"head{i}"] = head[f"lin{i - 1}.model.1.weight"].float().contiguous()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert AlexNet and the heads of LPIPS to safetensors.")
    parser.add_argument("trunk", type=Path, help="torchvision's AlexNet, a .pth of tensors")
    parser.add_argument("out", type=Path, help="where the safetensors file goes")
    args = parser.parse_args()
    data = save(convert(args.trunk))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_bytes(data)
    print(f"{args.out.name}: {len(data):,} bytes, sha256 {hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    main()
