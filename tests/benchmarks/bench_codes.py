"""Codes for digits: our VQ-VAE and prior against those of the Keras example, and sampling against the naive loop.

python tests/benchmarks/bench_codes.py vqvae [--epochs 10]   test error and perplexity after as many epochs
python tests/benchmarks/bench_codes.py sampling              64 grids of codes: seconds of each loop

The Keras example (keras.io/examples/generative/vq_vae) is rebuilt in torch, layer for layer, and trained as there: Adam
at 1e-3, batches of 128, pixels in [-0.5, 0.5], the codebook by gradient. Only the first weights are torch's, not
Keras'. Time is CPU time over two, in training only: seconds on two otherwise idle cores.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coursekit import data, measures
from coursekit.data import Batch
from coursekit.nets import VQVAE, PixelCNN
from coursekit.nets.pixelcnn import pick
from coursekit.recipes import MNIST_VARIANCE, recipe
from coursekit.training import fit


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["vqvae", "sampling"])
    parser.add_argument("--epochs", type=int, default=10)
    given = parser.parse_args()
    if given.what == "vqvae":
        vqvae(given.epochs)
    else:
        sampling()


if __name__ == "__main__":
    main()
