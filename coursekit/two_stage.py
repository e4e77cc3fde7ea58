"""Images in two stages: a VQ-VAE that writes them as codes, then a prior that makes codes up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coursekit.data import Batch, Images, batches
from coursekit.denoisers import Denoiser, drop_labels, from_x0, guided
from coursekit.diffusion import noise_like, x0_prediction_loss
from coursekit.nets import VQVAE, PixelCNN, UNet
from coursekit.progress import progress as behind_a_bar
from coursekit.samplers import ddpm, last
from coursekit.schedules import cosine_schedule
from coursekit.training import fit

AT_ONCE = 500  # images in memory


class TwoStage(NamedTuple):
    """What `two_stage` trained, and what it made up."""

    coder: VQVAE
    prior: nn.Module
    codes: Tensor  # (n, h / 4, w / 4) int64, made up by the prior
    samples: Tensor  # (n, c, h, w) in [-1, 1], the same decoded
    labels: Tensor | None  # (n,) int64, what each was asked to be, if the images had labels


def two_stage(images: Images, prior: str = "pixelcnn", *, coder_steps: int = 2000, prior_steps: int = 4000,
              batch_size: int = 64, n: int = 64, w: float = 1.5,
              rng: torch.Generator | None = None, progress: bool = True) -> TwoStage:
    """From images to new ones: train a VQ-VAE, freeze it, train a prior on what it encodes, sample, decode.

    images       as `data.load` gives them, square, with sides divisible by 4. Where they have labels the prior
                 is told them, and when sampling a label is drawn first, each as likely as any other
    prior        "pixelcnn", over the codes (van den Oord et al. 2017), or "diffusion", over the encoder's
                 normalised outputs before rounding (Rombach et al. 2022)
    coder_steps  optimizer steps of the VQ-VAE, and prior_steps of the prior, on batch_size images each
    n            how many images to make up
    w            weight of classifier-free guidance; without labels there is nothing to guide by
    rng          all randomness comes from it, first weights included; a generator of the CPU

    ValueError for an unknown prior, sides that do not fit, or steps below 1. The shipped `mnist-vqvae`,
    `mnist-pixelcnn` and `mnist-latent` come from the same losses, trained longer: see `recipes`.
    """
    side = images.x.shape[-1]
    if prior not in ("pixelcnn", "diffusion"):
        raise ValueError(f'the prior is "pixelcnn" or "diffusion", got {prior!r}')
    if images.x.shape[-2] != side or side % 4:
        raise ValueError(f"images must be square with sides divisible by 4, got {tuple(images.x.shape[-2:])}")
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    device = images.x.device
    seed = _seed(rng)  # outside: with no rng it must move the global state on
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)  # first weights and dropout, which take no generator
        return _two_stage(images, prior, coder_steps, prior_steps, batch_size, n, w, rng, progress)


def _two_stage(images: Images, prior: str, coder_steps: int, prior_steps: int, batch_size: int, n: int,
               w: float, rng: torch.Generator | None, progress: bool) -> TwoStage:
    device, channels, size = images.x.device, images.x.shape[1], images.x.shape[-1] // 4
    noise = torch.Generator().manual_seed(_seed(rng))

    def some(label: Tensor | None) -> Tensor | None:
        return None if label is None else drop_labels(label, 0.1, noise)

    def trained(model: nn.Module, steps: int, loss: Callable[[nn.Module, Batch], Tensor], label: str,
                ema: float | None) -> Any:
        stream = batches(images, batch_size, torch.Generator().manual_seed(_seed(rng)))
        return fit(model.to(device), stream, loss, steps=steps, lr=2e-3, warmup=min(100, steps // 10),
                   decay="cosine", ema=ema, clip=1.0, rng=noise, progress=progress, label=label
                   ).model.requires_grad_(False)

    classes = 0 if images.labels is None else int(images.labels.max()) + 1
    variance = (images.x.float() / 127.5).var().clamp(min=1e-6).item()
    coder = trained(VQVAE(channels), coder_steps,
                    lambda model, batch: coding_loss(model, batch.x, variance, noise), "VQ-VAE", None)
    know_latents(coder, images)
    labels = torch.randint(classes, (n,), generator=rng) if classes else None
    if prior == "pixelcnn":
        net = trained(code_prior(coder.config["codes"], size, classes), prior_steps,
                      lambda model, batch: prior_loss(model, batch.x, coder, some(batch.label)), "PixelCNN", 0.999)
        codes = net.sample(n, rng, label=labels, w=w if classes else 1)
    else:
        schedule = cosine_schedule()
        net = trained(latent_prior(coder.config["dim"], classes), prior_steps,
                      lambda model, batch: latent_loss(model, batch.x, coder, noise, label=some(batch.label)),
                      "diffusion", 0.999)
        denoise = from_x0(net, schedule, label=labels)
        if classes:
            denoise = guided(denoise, from_x0(net, schedule), w)
        z = draw_latents(denoise, schedule, coder, n, (size, size), rng, progress=progress)
        codes = torch.cat([coder.quantize(part).codes for part in z.split(AT_ONCE)])
    samples = torch.cat([decoded(coder, part) for part in codes.split(AT_ONCE)])
    return TwoStage(coder, net, codes, samples, labels)


def code_prior(codes: int = 128, size: int = 7, classes: int = 0) -> PixelCNN:
    """The PixelCNN of the course, new."""
    return PixelCNN(codes, size, dropout=0.1, classes=classes)


def latent_prior(dim: int = 16, classes: int = 0) -> UNet:
    """The course's network for latents, new: it never halves, for 7 is odd, and attends to all sites."""
    return UNet(dim, (64,), blocks=2, attention=(0,), classes=classes, patch=1)


def know_latents(coder: Any, images: Images) -> None:
    """Let a trained coder measure mean and deviation of what it encodes, by channel, for `coder.normalise`."""
    coder.measure(part.float() / 127.5 - 1 for part in images.x.split(AT_ONCE))


def coding_loss(model: nn.Module, x: Tensor, variance: float, rng: torch.Generator | None = None) -> Tensor:
    """What decoding misses, in units of the variance of the data, and what book and encoder owe each other."""
    out = model(x, rng)
    return F.mse_loss(out.x, x) / variance + out.loss


def prior_loss(model: nn.Module, x: Tensor, coder: VQVAE, label: Tensor | None = None) -> Tensor:
    """Nats for one of the codes in which a frozen coder writes images x, told their labels (b,) or not."""
    with torch.no_grad():
        codes = coder.quantize(coder.encode(x)).codes
    return F.cross_entropy(model(codes, label), codes)


def latent_loss(model: nn.Module, x: Tensor, coder: VQVAE, rng: torch.Generator | None = None,
                loss: Callable[..., Tensor] = x0_prediction_loss, schedule: Any = None,
                label: Tensor | None = None) -> Tensor:
    """The loss of a diffusion model on what a frozen coder encodes, normalised and before rounding."""
    with torch.no_grad():
        z = coder.normalise(coder.encode(x))
    return loss(model, z, cosine_schedule() if schedule is None else schedule, rng, label=label)


@torch.no_grad()
def draw_latents(denoise: Denoiser, schedule: Any, coder: VQVAE, n: int, size: tuple[int, int] = (7, 7),
                 rng: torch.Generator | None = None, steps: int = 50, progress: bool = True) -> Tensor:
    """n encoder outputs (n, d, h, w) made up by `steps` ancestral steps: de-normalised, not yet rounded.

    `denoise` meets all n at once, so that it may have been given a label for each.
    """
    z = noise_like(coder.mean.new_empty(n, len(coder.mean), *size), rng)
    walk = ddpm(denoise, z, schedule, schedule.spaced(steps), rng)
    return coder.denormalise(last(behind_a_bar(walk, "sampling", total=steps) if progress else walk).x)


@torch.no_grad()
def decoded(coder: VQVAE, codes: Tensor) -> Tensor:
    """Images (n, c, 4 h, 4 w) in [-1, 1] of codes (n, h, w)."""
    return coder.decode(coder.embed(codes)).clamp(-1, 1)


def _seed(rng: torch.Generator | None) -> int:
    return int(torch.randint(2**31 - 1, (), generator=rng))

