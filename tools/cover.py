"""Draws the picture at the top of the README: python tools/cover.py"""

from pathlib import Path

import skimage
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import gaussian_blur

from coursekit import viz
from coursekit.checkpoints import denoiser
from coursekit.denoisers import clipped, guided
from coursekit.diffusion import add_noise, noise_like
from coursekit.samplers import ddim, ddpm, last

ALT = ("Two rows. Above, a photograph of a cat under heavy noise, then blurred, then denoised by a network in one "
       "step and in many, then clean. Below, noise turns into a handwritten three in five pictures.")


def main() -> None:
    photo = torch.from_numpy(skimage.data.cat()[:, 90:390].copy()).permute(2, 0, 1)[None].float()
    x0 = F.interpolate(photo, (64, 64), mode="bicubic", antialias=True).clamp(0, 255) / 127.5 - 1
    rng = torch.Generator().manual_seed(0)
    denoise, schedule = denoiser("cats-ddpm")
    x_t = add_noise(x0, 500, noise_like(x0, rng), schedule)
    noisy = x_t / schedule.alpha_bar[500].sqrt().item()
    with torch.no_grad():
        once = denoise(x_t, torch.tensor([500])).x0
    walked = last(ddpm(clipped(denoise), x_t, schedule, [*range(500, 0, -20), 0], rng)).x
    cats = torch.cat([noisy, gaussian_blur(noisy, [13, 13], [2.5, 2.5]), once, walked, x0])

    (write, schedule), (scribble, _) = denoiser("mnist-class", label=torch.tensor([3])), denoiser("mnist-class")
    noise = torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(3))
    walk = list(ddim(guided(write, scribble, 1.5), noise, schedule, schedule.spaced(50)))
    digits = F.interpolate(torch.cat([walk[i].x for i in (4, 24, 34, 42, 49)]), (64, 64), mode="nearest")
    viz.grid(torch.cat([cats, digits.expand(-1, 3, -1, -1)]), columns=5, scale=2, alt=ALT,
             labels=["noisy", "blurred", "one step", "many steps", "the photograph",
                     *(f"t = {walk[i].t}" for i in (4, 24, 34, 42, 49))],
             ).save(Path(__file__).parents[1] / "course" / "cover.png")


if __name__ == "__main__":
    main()
