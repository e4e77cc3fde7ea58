"""How soon has Deep Image Prior denoised a photograph? The paper's network against `Hourglass.preset("fast")`.

python tests/benchmarks/bench_dip.py [--sizes 128 256] [--photographs astronaut chelsea coffee] [--out found.json]

Noise has sigma = 25/255. The paper's way (its network, Adam at 0.01, input noise 1/30, average 0.99) goes on until the
PSNR of its averaged output has not risen for PATIENCE steps. The race is for what it reached, less 0.3 dB: who is there
in how many seconds? Time is this process's CPU time over two, in training only: seconds on two otherwise idle cores.
With --out, what was found is kept in that file and not measured again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import skimage.data
import torch
from skimage.transform import resize
from torch import Tensor

from coursekit.dip import fixed_input, restore
from coursekit.metrics import psnr
from coursekit.nets import Hourglass

SIGMA, WITHIN, PATIENCE, EVERY = 25 / 255, 0.3, 500, 10
WAYS: dict[str, dict[str, Any]] = {
    "paper": {"preset": "denoise", "steps": 3000},
    "fast": {"preset": "fast", "steps": 3000, "channels_last": True},
}


def photograph(name: str, size: int) -> Tensor:
    """The middle of one of scikit-image's photographs, (1, 3, size, size) in [0, 1]."""
    image = getattr(skimage.data, name)()
    h, w = image.shape[:2]
    side = min(h, w)
    top, left = (h - side) // 2, (w - side) // 2
    square = resize(image[top:top + side, left:left + side], (size, size), anti_aliasing=True)
    return torch.from_numpy(square).float().permute(2, 0, 1)[None]


def denoise(x0: Tensor, preset: str, steps: int, channels_last: bool = False) -> list[tuple[int, float, float]]:
    """(step, seconds, PSNR of the average in dB) every EVERY steps, until it has not risen for PATIENCE steps."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    y = x0 + SIGMA * torch.randn(x0.shape, generator=rng)
    model, best, found = Hourglass.preset(preset), (0.0, 0), []
    z = fixed_input(model.config["in_channels"], *x0.shape[2:], rng)
    if channels_last:
        model, z = model.to(memory_format=torch.channels_last), z.contiguous(memory_format=torch.channels_last)
    start, looking = time.process_time(), 0.0
    for it in restore(model, z, y, steps=steps, rng=rng):
        if it.step % EVERY == 0:
            now = time.process_time()
            reached = psnr(it.average.clamp(0, 1), x0, peak=1.0).item()
            found.append((it.step, round((now - start - looking) / 2, 2), round(reached, 3)))
            looking += time.process_time() - now
            best = max(best, (reached, it.step))
            if it.step - best[1] >= PATIENCE:
                break
    return found


def until(found: list[tuple[int, float, float]], wanted: float) -> float | None:
    """Seconds until the PSNR is `wanted`, between two looks on a straight line; None if never."""
    for (_, before, low), (_, after, high) in pairwise(found):
        if high >= wanted:
            return after if low >= high else before + (after - before) * max(0.0, wanted - low) / (high - low)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--photographs", nargs="+", default=["astronaut", "chelsea", "coffee"])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    known = json.loads(given.out.read_text()) if given.out and given.out.exists() else {}
    ratios = []
    for size in given.sizes:
        for name in given.photographs:
            for way, settings in WAYS.items():
                key = f"{way}, {name}, {size}"
                if key not in known:
                    known[key] = denoise(photograph(name, size), **settings)
                    if given.out:
                        given.out.write_text(json.dumps(known))
            curves = {way: known[f"{way}, {name}, {size}"] for way in WAYS}
            wanted = max(row[2] for row in curves["paper"]) - WITHIN
            seconds = {way: until(curve, wanted) for way, curve in curves.items()}
            print(f"{name}, {size} x {size}: the race is for {wanted:.2f} dB")
            for way, curve in curves.items():
                step, at, peak = max(curve, key=lambda row: row[2])
                there = "never there" if seconds[way] is None else f"there in {seconds[way]:.0f} s"
                print(f"  {way:6} {there}; at best {peak:.2f} dB after {step} steps, {at:.0f} s", flush=True)
            if seconds["paper"] and seconds["fast"]:
                ratios.append(seconds["paper"] / seconds["fast"])
                print(f"  {ratios[-1]:.1f} times faster")
    if ratios:
        races = len(given.sizes) * len(given.photographs)
        mean = statistics.geometric_mean(ratios)
        print(f"fast is there {mean:.1f} times sooner (geometric mean of the {len(ratios)} "
              f"of {races} races that it finished)")


if __name__ == "__main__":
    main()
