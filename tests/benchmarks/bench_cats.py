"""Cats at equal parameters and equal seconds: the kernel network by our recipe, by its source's, and the U-Net.

python tests/benchmarks/bench_cats.py [--minutes 20] [--arms ours source unet ...] [--out runs/cats] [--write]

Each arm is trained for as many steps as its own recipe makes in the given minutes (CPU time over two: minutes of two
otherwise idle cores), with that recipe's own batches, loss and rates, and then judged as the cards are: 500 samples
against the held-out cats. A killed run goes on where it stopped; what is finished is kept in OUT/found.json. With
--write the table goes on the card of `cats-kpn`, from which notebook 12 reads it. Needs the cats.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coursekit import checkpoints, data, measures
from coursekit.fetch import shipped
from coursekit.metrics import features, frechet_distance, kernel_distance
from coursekit.nets import KPN, UNet
from coursekit.objectives import kernel_loss
from coursekit.recipes import Recipe, recipe
from coursekit.training import fit

OURS, SOURCE, UNET = (recipe(name) for name in ("cats-kpn", "cats-kpn-source", "cats-ddpm"))


def same_size(**changes: Any) -> Callable[[], nn.Module]:
    """Our kernel network with other parts: as many parameters, but for those parts."""
    config = OURS.net().config | changes  # type: ignore[operator]
    return lambda: KPN(**config).to(memory_format=torch.channels_last)


ARMS: dict[str, tuple[str, Recipe]] = {
    "ours": ("kernel network, our recipe", OURS),
    "source": ("kernel network, the source's recipe",
               replace(SOURCE, net=same_size(drift_time=False, constant_tap="none"))),
    "unet": ("U-Net, cats-ddpm's recipe", replace(UNET, net=lambda: UNet(3, (64, 96, 144), blocks=1, attention=(2,)))),
    "x-loss": ("ours with the error of x_0", replace(OURS, loss=kernel_loss(0.3, clamp=1.0))),
    "no-lpips": ("ours without LPIPS", replace(OURS, loss=kernel_loss(0.0))),
    "lpips-always": ("ours with LPIPS at all t", replace(OURS, loss=kernel_loss(0.3, below=2.0))),
    "filters-alone": ("ours without the drift", replace(OURS, net=same_size(branches="filters"))),
}


def pace(arm: Recipe, images: data.Images, tried: int = 12) -> float:
    """Seconds of two cores for one optimizer step."""
    model, rng = arm.net(), torch.Generator().manual_seed(0)
    stream = data.batches(images, arm.batch_size, rng, arm.flip)

    def run(steps: int) -> float:
        start = time.process_time()
        fit(model, stream, lambda net, batch: arm.loss(net, batch, rng), steps=steps, lr=arm.lr, ema=arm.ema,
            clip=arm.clip, precision=arm.precision, rng=rng, progress=False)
        return (time.process_time() - start) / 2
    run(3)
    return run(tried) / tried


def trained(name: str, arm: Recipe, images: data.Images, steps: int, out: Path) -> nn.Module:
    """The averaged network after `steps` steps; a second call goes on from the first one's state."""
    torch.manual_seed(arm.seed)
    order, noise = (torch.Generator().manual_seed(arm.seed + k) for k in range(2))
    return fit(arm.net(), data.batches(images, arm.batch_size, order, arm.flip),
               lambda net, batch: arm.loss(net, batch, noise), steps=steps, lr=arm.lr,
               warmup=min(arm.warmup, steps // 10), decay=arm.decay, ema=arm.ema, clip=arm.clip,
               precision=arm.precision, rng=noise, label=name, save_to=out / f"{name}.state.safetensors").model


@torch.no_grad()
def real_cats(held_out: data.Images, n: int = 500) -> dict[str, float]:
    """What n training images are from the held-out ones: nothing made up can be asked to be nearer."""
    see = features("alexnet")
    one, two = see(data.load("cats", size=64, limit=n).to_float()), see(held_out.to_float())
    return {"parameters": 0, "seconds": 0, "images seen": 0,
            "Frechet distance": round(frechet_distance(one, two).item(), 3),
            "kernel distance": round(kernel_distance(one, two).item(), 5)}


def compare(names: list[str], minutes: float, out: Path) -> dict[str, dict[str, float]]:
    """Each arm's row, trained or read from `out`."""
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "found.json"
    found: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    images, held_out = data.load("cats", size=64), data.load("cats", split="test", size=64)
    found.setdefault("real photographs", real_cats(held_out))
    for name in names:
        title, arm = ARMS[name]
        row = found.setdefault(title, {})
        if "steps" not in row:
            row["steps"] = max(1, round(60 * minutes / pace(arm, images)))
            kept.write_text(json.dumps(found, indent=1))
        if "Frechet distance" not in row:
            model = trained(name, arm, images, row["steps"], out)
            measured = arm_distances(arm, model, held_out)
            row |= {"parameters": sum(p.numel() for p in model.parameters()), "seconds": round(60 * minutes),
                    "images seen": row["steps"] * arm.batch_size, **measured}
            kept.write_text(json.dumps(found, indent=1))
        print(f"{title}: {row}", flush=True)
    return found


def arm_distances(arm: Recipe, model: nn.Module, held_out: data.Images) -> dict[str, float]:
    """Frechet and kernel distance of 500 samples, as `measures.painting` finds them."""
    found = measures.painting(arm.schedule, arm.predicts)(model, held_out)
    return {kind: next(value for key, value in found.items() if key.startswith(f"{kind} of 500 samples"))
            for kind in ("Frechet distance", "kernel distance")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["ours", "source", "unet"])
    parser.add_argument("--out", type=Path, default=Path("runs/cats"))
    parser.add_argument("--write", action="store_true", help="put the table on the card")
    given = parser.parse_args()
    found = compare(given.arms, given.minutes, given.out)
    if given.write:
        model: Any = checkpoints.pretrained("cats-kpn")
        checkpoints.save(model, shipped("checkpoints", "cats-kpn.safetensors"), replace(
            model.card, metrics=model.card.metrics | {"compared at equal parameters and equal seconds": found}))


if __name__ == "__main__":
    main()
