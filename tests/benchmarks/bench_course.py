"""How fast is the course, against what else a course could be made of? Ratios, measured in one run.

python tests/benchmarks/bench_course.py [imports] [batches] [training]

imports    seconds until `import coursekit...` has finished, against importing torch alone
batches    MNIST batches a second, against torchvision's MNIST in a DataLoader
training   images a second of one training step of nets.UNet, against `denoising-diffusion-pytorch` and
           the U-Net of diffusers' course on the same digits, at similar size

Rivals are timed in turn, round after round, so that whatever else the machine does meets all of them.
The clock is this process's CPU time divided by its threads: seconds on an otherwise idle machine.
`pip install coursekit[bench]` brings the rivals; one that is missing is left out and named.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping

import torch

from coursekit import data
from coursekit.diffusion import noise_prediction_loss
from coursekit.nets import UNet
from coursekit.schedules import linear_schedule

BATCH = 128
MODULES = ("torch", "coursekit.schedules", "coursekit.samplers", "coursekit.data", "coursekit.checks",
           "coursekit.viz", "coursekit.recipes")


def imports(rounds: int = 3) -> dict[str, float]:
    """Seconds of a fresh interpreter that imports one module; the best of a few."""
    def once(module: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
        return time.perf_counter() - start

    return {module: min(once(module) for _ in range(rounds)) for module in MODULES}


def batches(rounds: int = 5, count: int = 40) -> dict[str, float]:
    """Batches of 128 digits a second, as floats, shuffled."""
    from torchvision.datasets import VisionDataset
    from torchvision.transforms import Compose, Normalize, ToTensor

    images = data.load("mnist")

    class Digits(VisionDataset):  # as torchvision.datasets.MNIST serves them: a PIL image at a time
        def __init__(self) -> None:
            super().__init__("", transform=Compose([ToTensor(), Normalize(0.5, 0.5)]))

        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, i: int) -> tuple:
            from PIL import Image

            return self.transform(Image.fromarray(images.x[i, 0].numpy())), int(images.labels[i])

    def ours() -> Callable[[], object]:
        stream = data.batches(images, BATCH, torch.Generator().manual_seed(0))
        return lambda: next(stream)

    def theirs() -> Callable[[], object]:
        stream = iter(torch.utils.data.DataLoader(Digits(), BATCH, shuffle=True, drop_last=True))
        return lambda: next(stream)

    return per_second({"coursekit.data.batches": ours(), "torchvision + DataLoader": theirs()}, rounds, count)


def rivals() -> dict[str, torch.nn.Module]:
    """Networks of about the size of ours for 28 x 28 digits, each called as its authors do."""
    found: dict[str, torch.nn.Module] = {
        "nets.UNet(1, (32, 144), blocks=1)": UNet(1, (32, 144), blocks=1),
        "nets.UNet(1, (48, 96))": UNet(1, (48, 96))}
    try:
        from diffusers import UNet2DModel
        blocks = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
        found["diffusers UNet2DModel (32, 64, 64)"] = UNet2DModel(
            sample_size=28, in_channels=1, out_channels=1, layers_per_block=2, block_out_channels=(32, 64, 64),
            down_block_types=blocks, up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"))
    except ImportError:
        print("diffusers is not installed: left out")
    try:
        from denoising_diffusion_pytorch import Unet
        found["denoising-diffusion-pytorch Unet(24)"] = Unet(24, dim_mults=(1, 2, 4), channels=1)
    except ImportError:
        print("denoising-diffusion-pytorch is not installed: left out")
    return found


def training(rounds: int = 3, count: int = 1) -> dict[str, float]:
    """Images a second of one step: noise, forward, backward, AdamW; batch 128, float32."""
    schedule = linear_schedule()
    stream = data.batches(data.load("mnist"), BATCH, torch.Generator().manual_seed(0))

    def step(model: torch.nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)

        def forward(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            out = model(x_t, t)
            return out if torch.is_tensor(out) else out.sample

        def run() -> None:
            loss = noise_prediction_loss(forward, next(stream).x, schedule)  # type: ignore[arg-type]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return run

    models = rivals()
    for name, model in models.items():
        print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    speeds = per_second({name: step(model) for name, model in models.items()}, rounds, count)
    return {name: BATCH * speed for name, speed in speeds.items()}


def per_second(calls: Mapping[str, Callable[[], object]], rounds: int, count: int) -> dict[str, float]:
    """Median calls per quiet second, all rivals in every round."""
    for call in calls.values():
        call()  # warm
    speeds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.process_time()
            for _ in range(count):
                call()
            speeds[name].append(count * torch.get_num_threads() / (time.process_time() - start))
    return {name: statistics.median(s) for name, s in speeds.items()}


def report(title: str, values: Mapping[str, float], unit: str) -> None:
    """A table with each value and what it is of the first."""
    first = next(iter(values.values()))
    print(f"\n{title}")
    for name, value in values.items():
        print(f"  {name:40} {value:10.2f} {unit}   first is {first / value:6.2f} x")


def main(chosen: list[str]) -> None:
    chosen = chosen or ["imports", "batches", "training"]
    if unknown := set(chosen) - {"imports", "batches", "training"}:
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}\n\n{__doc__}")
    if "imports" in chosen:
        report("Import time, a fresh interpreter", imports(), "s")
    if "batches" in chosen:
        report("MNIST batches of 128", batches(), "/s")
    if "training" in chosen:
        report("Training on MNIST, batch 128", training(), "images/s")


if __name__ == "__main__":
    main(sys.argv[1:])
