"""Codes for digits: our VQ-VAE against the Keras example's, sampling against the naive loop, and the priors compared.

python tests/benchmarks/bench_codes.py vqvae [--epochs 10]   test error and perplexity after as many epochs
python tests/benchmarks/bench_codes.py sampling              64 grids of codes: seconds of each loop
python tests/benchmarks/bench_codes.py priors [--write]      Frechet distance and seconds, codes, latents and pixels

With --write the last puts its table on the card of `mnist-latent`, from which notebook 11 reads it.

The Keras example (keras.io/examples/generative/vq_vae) is rebuilt in torch, layer for layer, and trained as there: Adam
at 1e-3, batches of 128, pixels in [-0.5, 0.5], the codebook by gradient. Only the first weights are torch's, not
Keras'. Time is CPU time over two, in training only: seconds on two otherwise idle cores.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coursekit import checkpoints, data, measures
from coursekit.data import Batch
from coursekit.denoisers import Denoiser, guided
from coursekit.fetch import shipped
from coursekit.metrics import features, frechet_distance
from coursekit.nets import VQVAE, PixelCNN
from coursekit.nets.pixelcnn import pick
from coursekit.objectives import MNIST_VARIANCE
from coursekit.recipes import recipe
from coursekit.training import fit
from coursekit.two_stage import decoded, draw_latents

AT_ONCE = 500  # samples in memory
GUIDANCE = 1.5


class Halved(nn.Module):
    """A VQ-VAE that works on pixels in [-0.5, 0.5], shown and read in [-1, 1]."""

    def __init__(self, coder: VQVAE):
        super().__init__()
        self.coder = coder

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = self.coder(x / 2)
        return out._replace(x=2 * out.x)


def keras_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The error over the variance of the data, the codebook's term and a quarter of the encoder's."""
    x, _, loss = model(batch.x)
    return F.mse_loss(x, batch.x) / MNIST_VARIANCE + loss


def vqvae(epochs: int) -> None:
    """Both, after `epochs` times through MNIST."""
    images, test = data.load("mnist"), data.load("mnist", "test")
    ours = recipe("mnist-vqvae")
    rng = torch.Generator().manual_seed(1)
    ways: list[tuple[str, Callable[[], nn.Module], Callable, dict]] = [
        ("Keras' example", lambda: Halved(VQVAE(channels=(32, 64), blocks=0, kernel=3, codebook="gradient")),
         keras_loss, {"batch": 128, "lr": 1e-3}),
        ("coursekit", ours.net, lambda model, batch: ours.loss(model, batch, rng),
         {"batch": ours.batch_size, "lr": ours.lr, "warmup": ours.warmup, "decay": ours.decay, "clip": ours.clip})]
    for name, build, loss, settings in ways:
        torch.manual_seed(0)
        model, batch = build(), settings.pop("batch")
        if loss is keras_loss:
            settings["optimizer"] = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-7)
        batches = data.batches(images, batch, torch.Generator().manual_seed(0))
        start = time.process_time()
        run = fit(model, batches, loss, steps=epochs * (60_000 // batch), label=name, rng=rng, **settings)
        seconds = (time.process_time() - start) / 2
        count = sum(p.numel() for p in model.parameters())
        print(f"{name}: {count:,} parameters trained for {epochs} epochs in {seconds:.0f} s")
        for what, value in measures.coding(run.model, test).items():
            print(f"  {what}: {value}", flush=True)


@torch.no_grad()
def naive(net: PixelCNN, n: int, rng: torch.Generator) -> Tensor:
    """49 runs of the whole network, one for each site."""
    size = net.config["size"]
    codes = torch.zeros(n, size, size, dtype=torch.int64)
    for site in range(size**2):
        i, j = divmod(site, size)
        codes[:, i, j] = pick(net(codes)[:, :, i, j], rng)
    return codes


def sampling(n: int = 64, rounds: int = 5) -> None:
    """The same codes by both loops; medians of CPU seconds."""
    for name in ("gated", "keras"):
        torch.manual_seed(0)
        net, slow, fast, same = PixelCNN.preset(name).eval(), [], [], True
        for seed in range(rounds):
            one, two = (torch.Generator().manual_seed(seed) for _ in range(2))
            start = time.process_time()
            wanted = naive(net, n, one)
            middle = time.process_time()
            same &= torch.equal(net.sample(n, two), wanted)
            slow.append(middle - start)
            fast.append(time.process_time() - middle)
        before, after = (sorted(seconds)[rounds // 2] for seconds in (slow, fast))
        print(f"{name}: {n} grids, naive {before:.2f} s, ours {after:.2f} s, {before / after:.1f} times faster; "
              f"the same codes: {same}", flush=True)


@torch.no_grad()
def priors(write: bool, n: int = 2000, steps: int = 50) -> None:
    """n digits of each kind, 0 to 9 in turn, against the 10,000 test digits; pixels also after as long a training."""
    test, training, label = data.load("mnist", "test"), data.load("mnist", limit=n), torch.arange(AT_ONCE) % 10
    coder, codes = (cast(Any, checkpoints.pretrained(name)) for name in ("mnist-vqvae", "mnist-pixelcnn"))
    see = features("mnist")
    real = see(test.to_float())
    cost = {name: seconds_to_train(name) for name in ("mnist-vqvae", "mnist-pixelcnn", "mnist-latent", "mnist-class")}
    print({name: round(seconds) for name, seconds in cost.items()}, flush=True)
    table: dict[str, dict[str, float]] = {}

    def row(name: str, spent: float, made: Callable[[], Tensor]) -> None:
        start = time.process_time()
        digits = made()
        seconds = (time.process_time() - start) / 2
        table[name] = {"Frechet distance": round(frechet_distance(see(digits), real).item(), 4),
                       "sure": round((measures.confidence(digits) > 0.9).float().mean().item(), 4),
                       "seconds to train": round(spent), "seconds for 1,000 samples": round(1000 * seconds / n, 1)}
        print(f"  {name:34} {table[name]}", flush=True)

    def asked(name: str, w: float) -> tuple[Denoiser, Any]:
        told, schedule = checkpoints.denoiser(name, label=label)
        return (told if w == 1 else guided(told, checkpoints.denoiser(name)[0], w)), schedule

    def from_codes(w: float = 1.0) -> Tensor:
        rng = torch.Generator().manual_seed(0)
        return torch.cat([decoded(coder, codes.sample(AT_ONCE, rng, w=w, label=label)) for _ in range(n // AT_ONCE)])

    def from_latents(w: float = 1.0, rounded: bool = True) -> Tensor:
        (denoise, schedule), rng, parts = asked("mnist-latent", w), torch.Generator().manual_seed(0), []
        for _ in range(n // AT_ONCE):
            z = draw_latents(denoise, schedule, coder, AT_ONCE, rng=rng, steps=steps, progress=False)
            parts.append(coder.decode(coder.quantize(z).z_q if rounded else z).clamp(-1, 1))
        return torch.cat(parts)

    def pixels(name: str) -> Tensor:
        denoise, schedule = asked(name, 1)
        return measures.draw(denoise, schedule, n, steps, test)

    row("real digits", 0, training.to_float)
    row("reconstruction", cost["mnist-vqvae"], lambda: torch.cat(
        [coder(part).x.clamp(-1, 1) for part in training.to_float().split(AT_ONCE)]))
    row("PixelCNN prior", cost["mnist-pixelcnn"], from_codes)
    row("PixelCNN prior, guided", cost["mnist-pixelcnn"], lambda: from_codes(GUIDANCE))
    row("latent diffusion", cost["mnist-latent"], from_latents)
    row("latent diffusion, not rounded", cost["mnist-latent"], lambda: from_latents(rounded=False))
    row("latent diffusion, guided", cost["mnist-latent"], lambda: from_latents(GUIDANCE))
    row("pixel diffusion", cost["mnist-class"], lambda: pixels("mnist-class"))
    row("pixel diffusion, a quarter as long", cost["mnist-class"] / 4, lambda: pixels("mnist-class-epoch-5"))
    if write:
        model: Any = checkpoints.pretrained("mnist-latent")
        found = {"priors compared": table, "priors compared on": f"{n:,} digits each, 0 to 9 in turn, diffusion in "
                 f"{steps} ancestral steps; seconds of two cores; guided: away from no label, w = {GUIDANCE}"}
        checkpoints.save(model, shipped("checkpoints", "mnist-latent.safetensors"),
                         replace(model.card, metrics=model.card.metrics | found))


def seconds_to_train(name: str, tried: int = 40) -> float:
    """What the steps of a recipe cost: a few are timed, the rest multiplied."""
    chosen = recipe(name)
    model, rng = chosen.net(), torch.Generator().manual_seed(0)
    stream = data.batches(data.load(chosen.data, size=chosen.size), chosen.batch_size, rng)

    def run(steps: int) -> float:
        with torch.enable_grad():
            start = time.process_time()
            fit(model, stream, lambda net, batch: chosen.loss(net, batch, rng), steps=steps, lr=chosen.lr,
                ema=chosen.ema, clip=chosen.clip, rng=rng, progress=False)
            return (time.process_time() - start) / 2
    run(3)
    return run(tried) / tried * chosen.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["vqvae", "sampling", "priors"])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--write", action="store_true", help="put the table of `priors` on the card")
    given = parser.parse_args()
    if given.what == "vqvae":
        vqvae(given.epochs)
    elif given.what == "priors":
        priors(given.write)
    else:
        sampling()


if __name__ == "__main__":
    main()
