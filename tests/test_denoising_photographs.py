"""The claim of notebook 02, on photographs the model has not seen: diffusion beats every classical filter.

Classical filters see x_t / sqrt(alpha_bar), the noisy photograph at its right brightness, are told the
noise level, and are given the strength that is best on these very photographs, for PSNR and again for LPIPS.
"""

import os
from functools import partial

import numpy as np
import pytest
import torch
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle
from torchvision.transforms.functional import gaussian_blur

from coursekit.checkpoints import denoiser
from coursekit.data import load
from coursekit.diffusion import add_noise, noise_like
from coursekit.metrics import lpips, psnr
from coursekit.samplers import ddpm, last

TIMES = (250, 500, 750)


def blur(x, sigma, kernel=None):
    size = kernel or 2 * int(3 * sigma) + 1
    return gaussian_blur(x, [size, size], [sigma, sigma])


def median(x, size):
    padded = torch.nn.functional.pad(x, [size // 2] * 4, mode="reflect")
    return padded.unfold(2, size, 1).unfold(3, size, 1).flatten(-2).median(-1).values


def on_arrays(fn, x):
    """A scikit-image filter, which takes (h, w, c) in [0, 1], on a batch in [-1, 1]."""
    arrays = ((x + 1) / 2).permute(0, 2, 3, 1).numpy()
    return torch.from_numpy(np.stack([fn(a) for a in arrays])).permute(0, 3, 1, 2).float() * 2 - 1


def candidates(noisy, noise):
    """{method: outputs over its strengths}; `noise` is the deviation on the [0, 1] scale."""
    return {
        "blur, kernel 7, sigma 2": [blur(noisy, 2.0, kernel=7)],
        "blur, best sigma": [blur(noisy, s) for s in (0.7, 1.0, 1.5, 2.5, 3.5, 5.0)],
        "median": [median(noisy, s) for s in (3, 5, 7, 9, 11)],
        "non-local means": [on_arrays(partial(
            denoise_nl_means, patch_size=5, patch_distance=6, h=k * noise, sigma=noise, channel_axis=-1), noisy)
            for k in (0.4, 0.6, 0.8, 1.0)],
        "total variation": [on_arrays(partial(denoise_tv_chambolle, weight=k * noise, channel_axis=-1), noisy)
                            for k in (0.5, 0.7, 1.0, 1.5, 2.5)],
    }


@pytest.fixture(scope="module")
def scores():
    """{t: {method: (PSNR in dB, LPIPS)}}, means over held-out cats; the model's under its own names."""
    if not os.environ.get("COURSEKIT_DATA"):
        pytest.skip("needs the photographs: set COURSEKIT_DATA to a folder with cats64/cats64.tar.gz")
    photographs = load("cats", split="test")
    if photographs.source.startswith("stand-in"):
        pytest.skip(f"needs the photographs, found a {photographs.source}")
    x0 = photographs.to_float()[::16]
    denoise, schedule = denoiser("cats-ddpm")
    rng = torch.Generator().manual_seed(0)
    found = {}
    for t in TIMES:
        a, s = (c.item() for c in schedule.signal_and_noise(t, like=x0[:1]))
        x_t = add_noise(x0, t, noise_like(x0, rng), schedule)
        outputs = {}
        for name, tries in candidates(x_t / a, s / a / 2).items():
            tries = [y.clamp(-1, 1) for y in tries]
            outputs[name] = max(tries, key=lambda y: psnr(y, x0, peak=2.0).mean())
            outputs[f"{name}, for LPIPS"] = min(tries, key=lambda y: lpips(y, x0).mean())
        with torch.no_grad():
            outputs["one step"] = denoise(x_t, torch.full((len(x0),), t)).x0.clamp(-1, 1)
        times = [*range(t, 0, -30), 0]
        outputs["iterative"] = last(ddpm(denoise, x_t, schedule, times, rng=rng)).x.clamp(-1, 1)
        found[t] = {name: (psnr(y, x0, peak=2.0).mean().item(), lpips(y, x0).mean().item())
                    for name, y in outputs.items()}
        print(f"\nt = {t}", *(f"  {n:36} {p:6.2f} dB  LPIPS {q:.3f}" for n, (p, q) in found[t].items()), sep="\n")
    return found


MODEL = ("one step", "iterative")


@pytest.mark.parametrize("t", TIMES)
def test_the_model_beats_every_filter_in_lpips(scores, t):
    classical = {n: q for n, (_, q) in scores[t].items() if n not in MODEL}
    assert min(scores[t][n][1] for n in MODEL) < min(classical.values()), scores[t]


@pytest.mark.parametrize("t", [500, 750])
def test_the_model_beats_every_filter_in_psnr(scores, t):
    classical = {n: p for n, (p, _) in scores[t].items() if n not in MODEL}
    assert scores[t]["one step"][0] > max(classical.values()), scores[t]


@pytest.mark.parametrize("t", TIMES)
def test_the_one_step_guess_has_the_better_psnr_and_the_walk_the_sharper_picture(scores, t):
    """The posterior mean minimises the squared error; a sample of the posterior cannot do better."""
    assert scores[t]["one step"][0] > scores[t]["iterative"][0]
