"""How each shipped checkpoint was trained, runnable again by name: `coursekit train NAME`.

`torchrun -m coursekit train NAME` runs the same recipe on several processes, gloo on CPUs and nccl on
GPUs. A recipe goes on where it was stopped, so that it can be trained in slices.
"""

from __future__ import annotations

import difflib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from coursekit import data
from coursekit.checkpoints import AS_DENOISER, Card, build_schedule, pretrained, save
from coursekit.data import Batch, Images
from coursekit.denoisers import drop_labels
from coursekit.diffusion import add_noise, noise_like, v_prediction_loss
from coursekit.metrics import lpips, psnr
from coursekit.nets import Classifier, UNet
from coursekit.samplers import ddim, last
from coursekit.training import Run, fit

Loss = Callable[[nn.Module, Batch, torch.Generator], Tensor]


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
    schedule: dict[str, Any] | None = None
    predicts: str | None = None
    warmup: int = 500
    decay: str = "cosine"
    ema: float | None = 0.9995
    clip: float | None = 1.0
    flip: bool = False
    shift: int = 0
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
    images = data.load(chosen.data, split="train", size=chosen.size).to(device)
    order = torch.Generator().manual_seed(chosen.seed)  # the same on every process: see training.fit
    noise = torch.Generator(device if device.type == "cuda" else "cpu").manual_seed(chosen.seed + 1)
    model = chosen.net().to(device)
    if device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)
        if shutil.which("cc") and torch.cuda.get_device_capability(device)[0] >= 7:  # what Triton asks for
            model.compile()
    run = fit(model, data.batches(images, chosen.batch_size, order, chosen.flip, chosen.shift),
              lambda net, batch: chosen.loss(net, batch, noise), steps=steps, lr=chosen.lr,
              warmup=min(chosen.warmup, steps // 10), decay=chosen.decay, ema=chosen.ema,
              clip=chosen.clip, precision="auto", rng=noise, label=name, progress=progress,
              save_to=out / f"{name}.state.safetensors", save_every=save_every)
    if rank == 0 and run.steps:
        held_out = data.load(chosen.data, split="test", size=chosen.size).to(device)
        metrics = chosen.measure(run.model, held_out) | {
            "training loss, mean of the last 500 steps": round(run.losses[-500:].mean().item(), 5)}
        save(run.model, out / f"{name}.safetensors", Card(
            name=name, recipe=f"coursekit train {name}", data=f"{chosen.data}: {images.source}",
            images=len(images), steps=run.steps, seconds=round(run.seconds, 1), device=_describe(device),
            metrics=metrics, notes=chosen.notes, schedule=chosen.schedule, predicts=chosen.predicts))
    return run


def denoising_loss(path: dict[str, Any]) -> Loss:
    """The v-prediction loss on a named schedule; labels, where the data has them, are not used."""
    schedule = build_schedule(path)
    return lambda model, batch, rng: v_prediction_loss(model, batch.x, schedule, rng)


def labelled_denoising_loss(path: dict[str, Any], drop: float) -> Loss:
    """The v-prediction loss with labels, each left out with probability `drop` so that guidance works."""
    schedule = build_schedule(path)
    return lambda model, batch, rng: v_prediction_loss(
        model, batch.x, schedule, rng, label=drop_labels(_labels(batch.label), drop, rng))


def classification_loss(model: nn.Module, batch: Batch, rng: torch.Generator) -> Tensor:
    """Cross-entropy against slightly smoothed labels, so that features do not run away."""
    return F.cross_entropy(model(batch.x), _labels(batch.label), label_smoothing=0.05)


@torch.no_grad()
def measure_classifier(model: nn.Module, images: Images) -> dict[str, Any]:
    """Share of correct answers on the whole test set."""
    x, labels = images.x, _labels(images.labels)
    right = sum(int((model(part.float() / 127.5 - 1).argmax(1) == wanted).sum())
                for part, wanted in zip(x.split(1000), labels.split(1000), strict=True))
    return {f"accuracy on {len(images):,} test images": right / len(images)}


def measure_obedience(path: dict[str, Any], predicts: str) -> Callable[[nn.Module, Images], dict[str, Any]]:
    """How often the shipped classifier reads the digit that was asked for: 20 DDIM steps, no guidance."""
    schedule = build_schedule(path)

    def measure(model: nn.Module, images: Images) -> dict[str, Any]:
        n, device = 1000, images.x.device
        label = torch.arange(n, device=device) % 10
        noise = noise_like(torch.empty(n, *images.x.shape[1:], device=device), torch.Generator().manual_seed(0))
        denoise = AS_DENOISER[predicts](model, schedule, label=label)
        drawn = last(ddim(denoise, noise, schedule, schedule.spaced(20))).x.clamp(-1, 1)
        with torch.no_grad():
            read = pretrained("mnist-classifier").to(device)(drawn).argmax(1)
        return {f"share of {n} samples read as asked, 20 DDIM steps, w = 1": (read == label).float().mean().item()}
    return measure


def measure_denoising(path: dict[str, Any], predicts: str) -> Callable[[nn.Module, Images], dict[str, Any]]:
    """PSNR, and for colour LPIPS, of the one-step estimate on up to 256 test images at three noise levels."""
    schedule = build_schedule(path)

    @torch.no_grad()
    def measure(model: nn.Module, images: Images) -> dict[str, Any]:
        denoise = AS_DENOISER[predicts](model, schedule)
        x0 = images.x[:256].float() / 127.5 - 1
        rng = torch.Generator().manual_seed(0)
        found: dict[str, Any] = {"measured on": f"the first {len(x0)} of {len(images)} test images"}
        for t in (250, 500, 750):
            x_t = add_noise(x0, t, noise_like(x0, rng), schedule)
            guess = denoise(x_t, torch.full((len(x0),), t, device=x0.device)).x0.clamp(-1, 1)
            found[f"one-step PSNR in dB at t = {t}"] = round(psnr(guess, x0, peak=2.0).mean().item(), 2)
            if x0.shape[1] == 3:
                found[f"one-step LPIPS at t = {t}"] = round(lpips(guess, x0).mean().item(), 3)
        return found
    return measure


COSINE = {"name": "cosine", "T": 1000}
RECIPES = {
    "mnist-classifier": Recipe(
        data="mnist", net=Classifier, loss=classification_loss, measure=measure_classifier,
        steps=2800, batch_size=128, lr=2e-3, warmup=200, ema=0.995, shift=2),
    "mnist-class": Recipe(
        data="mnist", net=lambda: UNet(1, (32, 64), classes=10), schedule=COSINE, predicts="v",
        loss=labelled_denoising_loss(COSINE, drop=0.15), measure=measure_obedience(COSINE, "v"),
        steps=1500, batch_size=64, lr=2e-3, warmup=50, ema=0.995),
    "cats-ddpm": Recipe(
        data="cats", size=64, net=lambda: UNet(3, (48, 96, 128), blocks=1, attention=(2,)), schedule=COSINE,
        predicts="v", loss=denoising_loss(COSINE), measure=measure_denoising(COSINE, "v"),
        steps=2100, batch_size=64, lr=1.5e-3, warmup=200, decay="cooldown", ema=0.999, flip=True,
        notes="Small enough for two cores. tests/test_denoising_photographs.py holds it against five classical "
              "filters on held-out photographs. From pure noise it draws small, soft cat faces."),
}


def _labels(labels: Tensor | None) -> Tensor:
    if labels is None:
        raise ValueError("this recipe needs a data set with labels")
    return labels


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
