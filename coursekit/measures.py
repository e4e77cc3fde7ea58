"""What the recipes measure when a training ends: figures for the card, on the test split.

Each is made for one path and one kind of prediction and then called as measure(model, test images) -> dict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coursekit import data
from coursekit.checkpoints import AS_DENOISER, build_schedule, pretrained
from coursekit.data import Images
from coursekit.denoisers import Denoiser, clipped, guided
from coursekit.diffusion import add_noise, noise_like, rate_distortion
from coursekit.metrics import features, frechet_distance, kernel_distance, lpips, perplexity, psnr
from coursekit.samplers import ddim, ddpm, heun, last
from coursekit.schedules import StraightPath, VarianceExploding
from coursekit.two_stage import decoded, draw_latents

Measure = Callable[[nn.Module, Images], dict[str, Any]]
AT_ONCE = 500  # images in memory


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> dict[str, Any]:
    """Share of correct answers on the whole test set."""
    labels = labelled(images.labels)
    right = sum(int((model(part.float() / 127.5 - 1).argmax(1) == wanted).sum())
                for part, wanted in zip(images.x.split(1000), labels.split(1000), strict=True))
    return {f"accuracy on {len(images):,} test images": right / len(images)}


def known_noise(sigma: float) -> Measure:
    """PSNR of one pass over x_0 + sigma eps on the whole test set."""
    path = VarianceExploding(sigma)

    @torch.no_grad()
    def measure(model: nn.Module, images: Images) -> dict[str, Any]:
        rng, found = torch.Generator().manual_seed(0), []
        for part in images.x.split(AT_ONCE):
            x0 = part.float() / 127.5 - 1
            guess = model(add_noise(x0, sigma, noise_like(x0, rng), path)).clamp(-1, 1)
            found.append(psnr(guess, x0, peak=2.0))
        return {f"PSNR in dB at sigma = {sigma:g}, {len(images):,} test images": round(
            torch.cat(found).mean().item(), 2)}
    return measure


def denoising(path: dict[str, Any], predicts: str) -> Measure:
    """PSNR, and for colour LPIPS, of the one-step estimate on up to 256 test images at three noise levels."""
    schedule = build_schedule(path)

    @torch.no_grad()
    def measure(model: nn.Module, images: Images) -> dict[str, Any]:
        denoise = AS_DENOISER[predicts](model, schedule)
        x0 = images.x[:256].float() / 127.5 - 1
        rng = torch.Generator().manual_seed(0)
        found: dict[str, Any] = {"measured on": f"the first {len(x0)} of {len(images)} test images"}
        for t in (schedule.T * part / 4 for part in (1, 2, 3)):
            t = t if isinstance(schedule, StraightPath) else round(t)
            x_t = add_noise(x0, t, noise_like(x0, rng), schedule)
            guess = denoise(x_t, torch.full((len(x0),), t, device=x0.device)).x0.clamp(-1, 1)
            found[f"one-step PSNR in dB at t = {t:g}"] = round(psnr(guess, x0, peak=2.0).mean().item(), 2)
            if x0.shape[1] == 3:
                found[f"one-step LPIPS at t = {t:g}"] = round(lpips(guess, x0).mean().item(), 3)
        return found
    return measure


def painting(path: dict[str, Any], predicts: str, n: int = 500, steps: int = 25) -> Measure:
    """`denoising`, and how far n images drawn are from the test images, beside n training images.

    Drawn by Heun's steps on the straight path, else by twice as many ancestral ones. The distances are those of
    AlexNet's pooled features, which do not depend on what was trained.
    """
    schedule, one_step = build_schedule(path), denoising(path, predicts)

    @torch.no_grad()
    def measure(model: nn.Module, images: Images) -> dict[str, Any]:
        see, jumps = features("alexnet"), steps if isinstance(schedule, StraightPath) else 2 * steps
        real = see(images.to_float())
        drawn = see(draw(AS_DENOISER[predicts](model, schedule), schedule, n, jumps, images))
        training = see(data.load(images.name, size=images.x.shape[-1], limit=n).to(images.x.device).to_float())
        name = f"of {n:,} samples to {len(images):,} test images, AlexNet"
        return one_step(model, images) | {
            f"Frechet distance {name}": round(frechet_distance(drawn, real).item(), 3),
            f"kernel distance {name}": round(kernel_distance(drawn, real).item(), 5),
            f"Frechet distance of {n:,} training images": round(frechet_distance(training, real).item(), 3),
            "drawn in": f"{jumps} {'Heun' if isinstance(schedule, StraightPath) else 'ancestral'} steps"}
    return measure


def sending(path: dict[str, Any], predicts: str, n: int = 256, jumps: int = 250) -> Measure:
    """The variational bound of the first n test images, and the curve of rate and distortion (DDPM, figure 5).

    The jumps are short where the noise is weak, where most bits are paid. Pictures that were resized or went through
    a lossy format have another entropy: their bits are never compared with published ones.
    """
    schedule = build_schedule(path)

    @torch.no_grad()
    def measure(model: nn.Module, images: Images) -> dict[str, Any]:
        denoise, rng = AS_DENOISER[predicts](model, schedule), torch.Generator().manual_seed(0)
        x0, times = images.to_float()[:n], schedule.spaced(jumps, 2.0)
        parts = [(len(x) / len(x0), rate_distortion(denoise, x, schedule, times, rng)) for x in x0.split(64)]
        rate, rmse, bound = (sum(w * getattr(part, what).cpu() for w, part in parts)
                             for what in ("rate", "rmse", "bound"))
        shown = torch.linspace(0, jumps - 1, min(jumps, 50)).round().long()
        return {f"bits per dimension, bound, {len(x0)} test images, {jumps} jumps": round(bound.item(), 3),
                "of which rate, before the last jump": round(rate[-1].item(), 3),
                "RMSE before the last jump, grey levels": round(rmse[-1].item(), 2),
                "rate curve, bits per dimension": [round(r, 4) for r in rate[shown].tolist()],
                "distortion curve, RMSE in grey levels": [round(d, 2) for d in rmse[shown].tolist()]}
    return measure


def drawing(path: dict[str, Any], predicts: str, n: int = 5000, steps: int = 50) -> Measure:
    """Frechet distance of n digits drawn ancestrally to the test set, and of n training digits: the floor."""
    schedule = build_schedule(path)

    def measure(model: nn.Module, images: Images) -> dict[str, Any]:
        see = features("mnist")
        real = see(images.to_float())
        drawn = draw(AS_DENOISER[predicts](model, schedule), schedule, n, steps, images)
        training = data.load(images.name, limit=n).to(images.x.device).to_float()
        return {f"Frechet distance of {n:,} samples to the test set, {steps} ancestral steps":
                round(frechet_distance(see(drawn), real).item(), 4),
                f"the same of {n:,} training images": round(frechet_distance(see(training), real).item(), 4)}
    return measure


def obedience(path: dict[str, Any], predicts: str, n: int = 2000, steps: int = 20,
              weights: Sequence[float] = (0, 0.5, 1, 1.5, 2, 3, 5, 8)) -> Measure:
    """By guidance weight: how many of n digits are read as asked, how they vary, how far they are from real.

    "agreement" is the share the shipped classifier reads as the label asked for; "diversity" the deviation of its
    features within a label, over that of real digits. Each weight has the same noise and ancestral steps.
    n is a multiple of 500.
    """
    schedule = build_schedule(path)
    if n < AT_ONCE or n % AT_ONCE:
        raise ValueError(f"n must be a multiple of {AT_ONCE}, got {n}")

    def measure(model: nn.Module, images: Images) -> dict[str, Any]:
        see, device, table = features("mnist"), images.x.device, {}
        label = torch.arange(AT_ONCE, device=device) % 10
        asked, free = (AS_DENOISER[predicts](model, schedule, label=k) for k in (label, None))
        real, wanted = see(images.to_float()), label.repeat(n // AT_ONCE)
        for w in weights:
            drawn = draw(guided(asked, free, w), schedule, n, steps, images)
            seen = see(drawn)
            table[f"{w:g}"] = {
                "agreement": round((read(drawn) == wanted).float().mean().item(), 4),
                "diversity": round((within(seen, wanted) / within(real, labelled(images.labels))) ** 0.5, 3),
                "Frechet distance": round(frechet_distance(seen, real).item(), 4)}
        floor = see(data.load(images.name, limit=n).to(device).to_float())
        return {"by guidance weight": table, "drawn for each weight": f"{n:,} digits in {steps} ancestral steps",
                f"Frechet distance of {n:,} training images": round(frechet_distance(floor, real).item(), 4)}
    return measure


@torch.no_grad()
def coding(model: nn.Module, images: Images) -> dict[str, Any]:
    """What a VQ-VAE loses on the test set, and how much of its book it uses."""
    coder: Any = model.eval()
    parts = [coder(part.float() / 127.5 - 1) for part in images.x.split(AT_ONCE)]
    x, codes = torch.cat([part.x for part in parts]).clamp(-1, 1), torch.cat([part.codes for part in parts])
    see, real, n = features("mnist"), images.to_float(), f"{len(images):,} test images"
    return {f"mean squared error on [0, 1], {n}": round(((x - real) / 2).square().mean().item(), 5),
            f"perplexity of the codes, {n}": round(perplexity(codes).item(), 1),
            "codes used": codes.unique().numel(),
            f"Frechet distance of {n} and their reconstructions":
                round(frechet_distance(see(x), see(real)).item(), 4)}


@torch.no_grad()
def prior(model: nn.Module, images: Images, n: int = 2000) -> dict[str, Any]:
    """Nats that a PixelCNN needs for the codes of a test image, and n digits that it makes up, label first."""
    net: Any = model.eval()
    coder, K = _coder(images), net.config["codes"]
    held_out, learned = (codes_of(coder, x) for x in (images.x, data.load(images.name).x.to(images.x.device)))
    table = on_its_own(learned, K)
    nats = torch.cat([nats_of(net, part) for part in held_out.split(AT_ONCE)]).mean().item()
    rng = torch.Generator().manual_seed(0)
    drawn = torch.cat([net.sample(min(AT_ONCE, n - start), rng) for start in range(0, n, AT_ONCE)])
    digits = torch.cat([decoded(coder, part) for part in drawn.split(AT_ONCE)])
    return {f"nats for an image, {len(images):,} test images": round(nats, 2),
            "nats for an image, each place on its own": round(
                -table[torch.arange(len(table), device=table.device), held_out.flatten(1)].sum(1).mean().item(), 2)
            } | _made_up(digits, images)


@torch.no_grad()
def nats_of(prior: Any, codes: Tensor, label: Tensor | None = None) -> Tensor:
    """-log p (b,) that a PixelCNN gives to codes (b, h, w): of a label, or averaged over its labels, if it has any.

    Every label is as likely as any other, so p(codes) = sum of p(codes | label) / classes, all of them asked.
    """
    classes = prior.config["classes"]
    if label is None and classes:
        of_each = torch.stack([nats_of(prior, codes, torch.full_like(codes[:, 0, 0], k)) for k in range(classes)])
        return math.log(classes) - (-of_each).logsumexp(0)
    return F.cross_entropy(prior(codes, label), codes, reduction="none").flatten(1).sum(1)


def on_its_own(codes: Tensor, K: int) -> Tensor:
    """log p (places, K) of codes (n, ...) if every place is drawn on its own; each code is counted once too often."""
    places = codes.flatten(1)
    site = torch.arange(places.shape[1], device=codes.device) * K
    counts = 1.0 + (site + places).flatten().bincount(minlength=K * len(site)).view(len(site), K)
    return (counts / counts.sum(1, keepdim=True)).log()


def latent_drawing(path: dict[str, Any], predicts: str, n: int = 5000, steps: int = 50) -> Measure:
    """n digits drawn as latents, labels first, rounded to the book of `mnist-vqvae` and decoded."""
    schedule = build_schedule(path)

    @torch.no_grad()
    def measure(model: nn.Module, images: Images) -> dict[str, Any]:
        coder, rng = _coder(images), torch.Generator().manual_seed(0)
        size, digits = (images.x.shape[-2] // coder.stride, images.x.shape[-1] // coder.stride), []
        for label in torch.randint(cast(Any, model).config["classes"], (n,), generator=rng).split(AT_ONCE):
            denoise = AS_DENOISER[predicts](model, schedule, label=label)
            z = draw_latents(denoise, schedule, coder, len(label), size, rng, steps, progress=False)
            digits.append(decoded(coder, coder.quantize(z).codes))
        return _made_up(torch.cat(digits), images) | {"drawn in": f"{steps} ancestral steps"}
    return measure


@torch.no_grad()
def codes_of(coder: Any, x: Tensor) -> Tensor:
    """The codes (n, h, w) in which a VQ-VAE writes images (n, c, h, w), bytes."""
    coder.eval()  # or its book would go on learning
    return torch.cat([coder.quantize(coder.encode(part.float() / 127.5 - 1)).codes for part in x.split(AT_ONCE)])


def _coder(images: Images) -> Any:
    return pretrained("mnist-vqvae").to(images.x.device)


def _made_up(digits: Tensor, images: Images) -> dict[str, Any]:
    """How far digits are from the test set, and how many the classifier is sure of."""
    see, sure = features("mnist"), confidence(digits)
    return {f"Frechet distance of {len(digits):,} samples to the test set":
            round(frechet_distance(see(digits), see(images.to_float())).item(), 4),
            "share of which the classifier is sure to 0.9": round((sure > 0.9).float().mean().item(), 4),
            "the same of test images": round((confidence(images.to_float()) > 0.9).float().mean().item(), 4)}


def draw(denoise: Denoiser, schedule: Any, n: int, steps: int | Sequence[int], like: Images,
         ancestral: bool = True) -> Tensor:
    """n images of the size of `like`, in [-1, 1], after `steps` even jumps of the ancestral sampler or of DDIM.

    `steps` may also be the times themselves, from T down to 0. On the straight path the jumps are Heun's.

    The guesses at x_0 are clipped for the ancestral sampler alone, which asks for nothing else. DDIM uses eps as
    well, and a clipped x_0 beside the eps of another one is not what x_t is made of: with guidance it falls apart.
    """
    rng, parts = torch.Generator().manual_seed(0), []
    times = schedule.spaced(steps) if isinstance(steps, int) else steps
    for start in range(0, n, AT_ONCE):
        shape = (min(AT_ONCE, n - start), *like.x.shape[1:])
        x = noise_like(torch.empty(shape, device=like.x.device), rng)
        if isinstance(schedule, StraightPath):
            walk = heun(denoise, x, schedule, times)
        else:
            walk = ddpm(clipped(denoise), x, schedule, times, rng) if ancestral else ddim(denoise, x, schedule, times)
        parts.append(last(walk).x.clamp(-1, 1))
    return torch.cat(parts)


@torch.no_grad()
def confidence(digits: Tensor) -> Tensor:
    """The probability (b,) that the shipped classifier gives to what it reads in digits (b, 1, 28, 28)."""
    classifier = pretrained("mnist-classifier").to(digits.device)
    return torch.cat([classifier(part).softmax(1).amax(1) for part in digits.split(AT_ONCE)])


@torch.no_grad()
def read(digits: Tensor) -> Tensor:
    """What the shipped classifier reads in digits (b, 1, 28, 28): labels (b,)."""
    classifier = pretrained("mnist-classifier").to(digits.device)
    return torch.cat([classifier(part).argmax(1) for part in digits.split(AT_ONCE)])


def within(seen: Tensor, labels: Tensor) -> float:
    """The variance of features (n, d) around the mean of their own label, summed over features."""
    if int(labels.unique(return_counts=True)[1].min()) < 2:
        raise ValueError("a spread needs at least two of each label")
    return sum((seen[labels == k].var(0).sum().item() for k in labels.unique()), 0.0) / len(labels.unique())


def labelled(labels: Tensor | None) -> Tensor:
    """The labels of images or of a batch, or a ValueError where there are none."""
    if labels is None:
        raise ValueError("this needs a data set with labels, and the images have none")
    return labels
