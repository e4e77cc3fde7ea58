"""How each shipped checkpoint was trained, runnable again by name: `coursekit train NAME`.

`torchrun -m coursekit train NAME` runs the same recipe on several processes, gloo on CPUs and nccl on
GPUs. A recipe goes on where it was stopped, so that it can be trained in slices.
"""

from __future__ import annotations

import difflib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from coursekit import data, measures, two_stage
from coursekit.checkpoints import Card, save
from coursekit.data import Images
from coursekit.nets import KPN, VQVAE, Classifier, Cs180UNet, UNet
from coursekit.objectives import (
    Loss,
    classification_loss,
    coding_loss,
    denoising_loss,
    kernel_loss,
    known_noise_loss,
    labelled_denoising_loss,
    latent_loss,
    prior_loss,
)
from coursekit.schedules import StraightPath
from coursekit.training import Run, fit


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a checkpoint becomes, except the device."""

    data: str
    net: Callable[[], nn.Module]
    loss: Loss
    measure: Callable[[nn.Module, Images], dict[str, Any]]  # on the test split
    steps: int
    batch_size: int
    lr: float
    size: int | None = None
    split: str = "train"
    schedule: dict[str, Any] | None = None
    predicts: str | None = None
    warmup: int = 500
    decay: str = "cosine"
    ema: float | None = 0.9995
    clip: float | None = 1.0
    flip: bool = False
    shift: int = 0
    snapshots: dict[str, int] = field(default_factory=dict)  # what to add to the name after how many steps
    finish: Callable[[nn.Module, Images], None] | None = None  # what is left to do with the training images
    coder: str | None = None  # the shipped VQ-VAE whose codes or latents this makes up
    precision: str = "auto"
    seed: int = 0
    notes: str = ""


def profile() -> str:
    """"quick" (shipped checkpoints and short live trainings) or "full", from COURSE_PROFILE."""
    chosen = os.environ.get("COURSE_PROFILE", "quick")
    if chosen not in ("quick", "full"):
        raise ValueError(f'COURSE_PROFILE must be "quick" or "full", got {chosen!r}')
    return chosen


def available() -> list[str]:
    """The names of all recipes."""
    return sorted(RECIPES)


def recipe(name: str) -> Recipe:
    """A recipe by name, or a ValueError with the nearest names."""
    if name not in RECIPES:
        near = difflib.get_close_matches(str(name).lower(), RECIPES, n=3, cutoff=0.3) or available()
        raise ValueError(f"no recipe is called {name!r}; the nearest are {', '.join(near)}")
    return RECIPES[name]


def train(name: str, out: str | Path = "runs", steps: int | None = None, device: str | None = None,
          save_every: float = 60.0, progress: bool = True) -> Run:
    """Train a recipe, or go on with it, and write its checkpoint and card to `out`.

    out     a folder; the state of the run lives there too, as name.state.safetensors
    steps   fewer (or more) optimizer steps than the recipe's own, for a try-out
    device  "cuda", "mps" or "cpu"; the best there is by default

    Ctrl-C keeps what was learned, as a checkpoint, and a later call goes on from there.
    """
    chosen = recipe(name)
    if steps is not None and steps < 1:
        raise ValueError(f"a training takes at least 1 step, got steps = {steps}")
    rank, where = _start_processes(device)
    try:
        return _train(name, chosen, Path(out), chosen.steps if steps is None else steps, where, rank,
                      save_every, progress)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _train(name: str, chosen: Recipe, out: Path, steps: int, device: torch.device, rank: int,
           save_every: float, progress: bool) -> Run:
    torch.manual_seed(chosen.seed)
    images = data.load(chosen.data, chosen.split, chosen.size).to(device)
    order = torch.Generator().manual_seed(chosen.seed)  # the same on every process: see training.fit
    noise = torch.Generator(device if device.type == "cuda" else "cpu").manual_seed(chosen.seed + 1)
    model = chosen.net().to(device)
    if device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)
        if shutil.which("cc") and torch.cuda.get_device_capability(device)[0] >= 7:  # what Triton asks for
            model.compile()

    def go_on(until: int) -> Run:
        stream = data.batches(images, chosen.batch_size, order, chosen.flip, chosen.shift)
        run = fit(model, stream, lambda net, batch: chosen.loss(net, batch, noise), steps=steps, until=until,
                  lr=chosen.lr, warmup=min(chosen.warmup, steps // 10), decay=chosen.decay, ema=chosen.ema,
                  clip=chosen.clip, precision=chosen.precision, rng=noise, label=name, progress=progress,
                  save_to=out / f"{name}.state.safetensors", save_every=save_every)
        if dist.is_initialized():
            dist.barrier()  # the first process has written the state from which all go on
        return run

    snapshots = {after: moment for moment, after in chosen.snapshots.items() if after < steps}
    for after in [*sorted(snapshots), steps]:
        run = go_on(after)
        if run.interrupted:
            break
        if rank == 0 and run.steps == after < steps:  # not if a resumed run is already past it
            _write(run, f"{name}-{snapshots[after]}", name, chosen, images, device, out, bits=8)
    if rank == 0 and run.steps:
        _write(run, name, name, chosen, images, device, out)
    return run


def _write(run: Run, called: str, name: str, chosen: Recipe, images: Images, device: torch.device, out: Path,
           bits: int = 16) -> None:
    parts = run.losses.chunk(40)
    last = min(500, run.steps)
    metrics = {f"training loss, mean of the last {last} steps": round(run.losses[-last:].mean().item(), 5),
               f"training loss, means of {len(parts)} parts": [round(part.mean().item(), 4) for part in parts]}
    if chosen.finish:
        chosen.finish(run.model, images)
    if called == name:  # a snapshot is for looking at
        held_out = data.load(chosen.data, split="test", size=chosen.size).to(device)
        metrics = chosen.measure(run.model, held_out) | metrics
    save(run.model, out / f"{called}.safetensors", Card(
        name=called, recipe=f"coursekit train {name}", data=f"{chosen.data}: {images.source}", images=len(images),
        steps=run.steps, seconds=round(run.seconds, 1), device=_describe(device), metrics=metrics,
        notes=chosen.notes, schedule=chosen.schedule, predicts=chosen.predicts), bits=bits)


def _kernels(**config: Any) -> nn.Module:
    return KPN.preset("tiny", **config).to(memory_format=torch.channels_last)  # 1.2 to 1.4 times faster on CPUs


def _deep_unet(attention: tuple[int, ...]) -> nn.Module:
    return UNet(3, (64, 128, 192, 256), blocks=2, attention=attention, dropout=0.1)


def _painting_and_sending(model: nn.Module, images: Images) -> dict[str, Any]:
    return measures.painting(COSINE, "v")(model, images) | measures.sending(COSINE, "v")(model, images)


FOR_A_GPU = "Hours of a GPU, days of two cores."
COSINE, STRAIGHT = {"name": "cosine", "T": 1000}, {"name": "straight"}
LATE, LATER = (0.8, 1.5), (1.2, 1.4)  # focus of t / T: what a digit will be is decided where noise is strong
EPOCH = 60_000 // 64  # steps that show each training digit once, in batches of 64
RECIPES = {
    "mnist-classifier": Recipe(
        data="mnist", net=Classifier, loss=classification_loss, measure=measures.accuracy,
        steps=2800, batch_size=128, lr=2e-3, warmup=200, ema=0.995, shift=2),
    "mnist-denoiser": Recipe(
        data="mnist", net=lambda: Cs180UNet(16), schedule={"name": "exploding", "sigma_max": 1.0}, predicts="x0",
        loss=known_noise_loss(1.0), measure=measures.known_noise(1.0), steps=5 * (60_000 // 128), batch_size=128,
        lr=2e-3, warmup=50, ema=None, clip=None, snapshots={"epoch-1": 60_000 // 128}, precision="float32",
        notes="Images in [-1, 1]: sigma = 1 is what the project calls 0.5, on images in [0, 1]."),
    "mnist-ddpm": Recipe(
        data="mnist", net=lambda: UNet(1, (32, 96), blocks=1, attention=(1,)), schedule=COSINE, predicts="x0",
        loss=denoising_loss(COSINE, LATER, "x0"), measure=measures.drawing(COSINE, "x0"), steps=20 * EPOCH,
        batch_size=64, lr=2e-3, warmup=100, decay="cooldown", ema=0.999, precision="float32",
        snapshots={f"epoch-{n}": n * EPOCH for n in (1, 5, 10, 15)}),
    "mnist-class": Recipe(
        data="mnist", net=lambda: UNet(1, (32, 64), blocks=1, classes=10), schedule=COSINE,
        predicts="v", loss=labelled_denoising_loss(COSINE, 0.15, LATE), measure=measures.obedience(COSINE, "v"),
        steps=20 * EPOCH, batch_size=64, lr=2e-3, warmup=100, decay="cooldown", ema=0.999, precision="float32",
        snapshots={"epoch-5": 5 * EPOCH}),
    "mnist-vqvae": Recipe(
        data="mnist", net=VQVAE, loss=coding_loss, measure=measures.coding, finish=two_stage.know_latents,
        steps=10 * EPOCH, batch_size=64, lr=2e-3, warmup=100, ema=None, precision="float32"),
    "mnist-pixelcnn": Recipe(
        data="mnist", net=lambda: two_stage.code_prior(classes=10), loss=prior_loss(0.2), measure=measures.prior,
        coder="mnist-vqvae",
        steps=10 * EPOCH, batch_size=64, lr=2e-3, warmup=100, decay="cooldown", ema=0.999, precision="float32"),
    "mnist-latent": Recipe(
        data="mnist", net=lambda: two_stage.latent_prior(classes=10), schedule=COSINE,
        predicts="x0", loss=latent_loss(COSINE, 0.2, LATE, "x0"), measure=measures.latent_drawing(COSINE, "x0"),
        coder="mnist-vqvae",
        steps=10 * EPOCH, batch_size=64, lr=2e-3, warmup=100, decay="cooldown", ema=0.999, precision="float32"),
    "cats-ddpm": Recipe(
        data="cats", size=64, net=lambda: UNet(3, (48, 96, 128), blocks=1, attention=(2,)), schedule=COSINE,
        predicts="v", loss=denoising_loss(COSINE), measure=measures.denoising(COSINE, "v"),
        steps=2100, batch_size=64, lr=1.5e-3, warmup=200, decay="cooldown", ema=0.999, flip=True,
        notes="Small enough for two cores. tests/test_denoising_photographs.py holds it against five classical "
              "filters on held-out photographs. From pure noise it draws small, soft cat faces."),
    "cifar10-ddpm": Recipe(
        data="cifar10", size=32, net=lambda: UNet(3, (64, 128), blocks=1, attention=(1,), dropout=0.1), schedule=COSINE,
        predicts="v", loss=denoising_loss(COSINE), measure=_painting_and_sending,
        steps=12_000, batch_size=64, lr=1e-3, decay="cooldown", ema=0.999, flip=True),
    "stl10-ddpm": Recipe(
        data="stl10", size=96, split="unlabeled", net=lambda: _deep_unet(attention=(2, 3)), schedule=COSINE,
        predicts="v", loss=denoising_loss(COSINE), measure=measures.painting(COSINE, "v"),
        steps=100_000, batch_size=64, lr=3e-4, decay="cooldown", flip=True, notes=FOR_A_GPU),
    "ffhq-ddpm": Recipe(
        data="ffhq", size=128, net=lambda: _deep_unet(attention=(3,)), schedule=COSINE, predicts="v",
        loss=denoising_loss(COSINE), measure=measures.painting(COSINE, "v"),
        steps=100_000, batch_size=64, lr=3e-4, decay="cooldown", flip=True, notes=FOR_A_GPU),
    "cats-kpn": Recipe(
        data="cats", size=64, schedule=STRAIGHT, predicts="x0", flip=True,
        net=lambda: _kernels(width=192, depth=6, bottleneck=64, ffn=8 / 3, ups=(64, 32, 16), drift_width=32,
                             constant_tap="all"),
        loss=kernel_loss(0.3), measure=measures.painting(STRAIGHT, "x0"),
        steps=9_000, batch_size=32, lr=1e-3, warmup=500, decay="cooldown", ema=0.999, precision="float32"),
    "cats-kpn-source": Recipe(
        data="cats", size=64, schedule=STRAIGHT, predicts="x0", flip=True,
        net=lambda: _kernels(drift_time=False),
        loss=kernel_loss(1.0, below=2.0, clamp=1.0, times=StraightPath().draw_times),
        measure=measures.painting(STRAIGHT, "x0"), steps=20_000, batch_size=32, lr=3e-4, warmup=0,
        decay="constant", ema=0.99, clip=None, precision="float32",
        notes='What "Generating Cats with KPN Filtering" did, at our size: the error of x_0, LPIPS at all times, '
              "uniform times, a drift that is not told the time."),
}


def _start_processes(device: str | None) -> tuple[int, torch.device]:
    """(rank, device), after joining the process group that torchrun describes in the environment."""
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available() and alone, "cpu": True}
    best = [name for name, found in there.items() if found]
    device = best[0] if device is None else device
    if device not in best:  # several processes cannot share Apple's GPU: gloo does not know it
        raise ValueError(f"this training can run on {' or '.join(best)} here, got {device!r}")
    if alone:
        return 0, torch.device(device)
    local = int(os.environ["LOCAL_RANK"])
    if device == "cuda":
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return dist.get_rank(), torch.device(device, local) if device == "cuda" else torch.device(device)


def _describe(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, " \
        f"{torch.get_num_threads()} threads"
