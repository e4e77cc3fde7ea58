"""A VQ-VAE: an encoder, a book of vectors to which its answers are rounded, and a decoder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from coursekit.nets.blocks import check_images


class Coded(NamedTuple):
    """What a VQ-VAE says about images."""

    x: Tensor  # (b, c, h, w) the images decoded from their codes
    codes: Tensor  # (b, h / stride, w / stride) int64, 0..K-1
    loss: Tensor  # what the codebook and the encoder owe each other


class Quantized(NamedTuple):
    """Encoder outputs, rounded."""

    z_q: Tensor  # (b, d, h, w) the nearest vectors of the codebook; gradients pass to z_e as if nothing had happened
    codes: Tensor  # (b, h, w) int64, which vectors these are
    loss: Tensor  # a scalar to add to the reconstruction loss


class VQVAE(nn.Module):
    """Images (b, c, h, w) in [-1, 1] to a grid of codes and back (van den Oord et al. 2017).

    Height and width must be divisible by `.stride` = 2 ** len(channels): 28 x 28 gives 7 x 7.

    channels    of the maps after each halving; the decoder goes back through them
    blocks      residual blocks between the last halving and the codes, on either side
    kernel      3 or 4, of the halving convolutions. channels (32, 64), blocks 0 and kernel 3 is the network
                of the Keras example, with its 49,937 parameters
    codes, dim  K vectors of d numbers
    codebook    "ema": each vector follows the mean of what was rounded to it, and one that nothing is rounded to
                for long restarts at an encoder output (appendix A.1); "gradient": as published first
    commitment  beta of eq. 3, how strongly the encoder is held to its vector
    """

    def __init__(self, in_channels: int = 1, channels: Sequence[int] = (32, 64), blocks: int = 1, kernel: int = 4,
                 codes: int = 128, dim: int = 16, codebook: str = "ema", commitment: float = 0.25):
        super().__init__()
        self.config: dict[str, Any] = {
            "in_channels": in_channels, "channels": list(channels), "blocks": blocks, "kernel": kernel, "codes": codes,
            "dim": dim, "codebook": codebook, "commitment": commitment}
        if not channels or blocks < 0 or kernel not in (3, 4) or codes < 2 or dim < 1 or commitment < 0:
            raise ValueError("a VQ-VAE needs a halving or more, blocks of at least 0, a kernel of 3 or 4, two codes "
                             f"or more, and commitment of at least 0, got {self.config}")
        if codebook not in ("ema", "gradient"):
            raise ValueError(f'codebook is "ema" or "gradient", got {codebook!r}')
        self.stride = 2 ** len(channels)
        down: list[nn.Module] = []
        for c_in, c in zip([in_channels, *channels], channels, strict=False):
            down += [nn.Conv2d(c_in, c, kernel, stride=2, padding=1), nn.ReLU()]
        wide = channels[-1]
        down += [Residual(wide) for _ in range(blocks)]
        self.encoder = nn.Sequential(*down, nn.Conv2d(wide, dim, 1))

        c, up = dim, list[nn.Module]()
        if blocks:
            up = [nn.Conv2d(dim, wide, 3, padding=1), *(Residual(wide) for _ in range(blocks))]
            c = wide
        for width in reversed(channels):
            up += [nn.ConvTranspose2d(c, width, kernel, stride=2, padding=1, output_padding=4 - kernel), nn.ReLU()]
            c = width
        self.decoder = nn.Sequential(*up, nn.Conv2d(c, in_channels, 3, padding=1))
        self.quantizer = Quantizer(codes, dim, codebook, commitment)
        self.register_buffer("mean", torch.zeros(dim))  # of z_e over the training set, by channel; see `measure`
        self.register_buffer("std", torch.ones(dim))
        self.mean: Tensor
        self.std: Tensor

    def encode(self, x: Tensor) -> Tensor:
        """z_e (b, d, h / stride, w / stride), before rounding."""
        check_images(x, self.config["in_channels"], self.stride)
        return self.encoder(x)

    def quantize(self, z_e: Tensor, rng: torch.Generator | None = None) -> Quantized:
        """z_e (b, d, h, w) rounded to the codebook. In training mode an "ema" codebook moves; rng picks restarts."""
        return self.quantizer(z_e, rng)

    def decode(self, z_q: Tensor) -> Tensor:
        """Images (b, c, stride h, stride w) from vectors (b, d, h, w), rounded or not. Clamp them to [-1, 1]."""
        return self.decoder(z_q)

    def embed(self, codes: Tensor) -> Tensor:
        """The vectors (b, d, h, w) of codes (b, h, w)."""
        return self.quantizer.embed(codes)

    def forward(self, x: Tensor, rng: torch.Generator | None = None) -> Coded:
        z_q, codes, loss = self.quantize(self.encode(x), rng)
        return Coded(self.decode(z_q), codes, loss)

    @torch.no_grad()
    def measure(self, batches: Iterable[Tensor]) -> None:
        """Keep mean and deviation of z_e over these images, by channel, for `normalise`."""
        parts = [sites_of(self.encode(x)) for x in batches]
        if sum(map(len, parts)) < 2:
            raise ValueError("a deviation needs two sites or more, got none or one")
        z = torch.cat(parts)
        if not bool((z.std(0) > 0).all()):
            raise ValueError("a channel of z_e says the same everywhere: it cannot be normalised")
        self.mean.copy_(z.mean(0))
        self.std.copy_(z.std(0))

    def normalise(self, z_e: Tensor) -> Tensor:
        """Encoder outputs (b, d, h, w) with mean 0 and deviation 1 in each channel: what latent diffusion noises."""
        return (z_e - self.mean[:, None, None]) / self.std[:, None, None]

    def denormalise(self, z: Tensor) -> Tensor:
        """The inverse of `normalise`: do not forget it before `quantize` or `decode`."""
        return z * self.std[:, None, None] + self.mean[:, None, None]


class Quantizer(nn.Module):
    """K vectors in d dimensions; rounds each site of a map to the nearest.

    dead: a vector to which fewer sites of a batch are rounded, averaged over batches, starts again elsewhere.
    """

    def __init__(self, codes: int, dim: int, codebook: str = "ema", commitment: float = 0.25,
                 decay: float = 0.99, dead: float = 0.1):
        super().__init__()
        self.by_gradient, self.commitment, self.decay, self.dead = codebook == "gradient", commitment, decay, dead
        start = torch.empty(codes, dim).uniform_(-0.05, 0.05)
        self.count: Tensor
        self.total: Tensor
        if self.by_gradient:
            self.vectors = nn.Parameter(start)
        else:
            self.register_buffer("vectors", start)
            self.register_buffer("count", torch.zeros(codes))  # sites a batch rounds to each, averaged over batches
            self.register_buffer("total", torch.zeros(codes, dim))  # the sum of those sites, averaged likewise

    def embed(self, codes: Tensor) -> Tensor:
        """The vectors (b, d, h, w) of codes (b, h, w)."""
        if codes.dtype != torch.int64 or codes.ndim != 3:
            raise ValueError(f"codes are int64 of shape (b, h, w), got {codes.dtype} of {tuple(codes.shape)}")
        last = len(self.vectors) - 1
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) <= last:
            raise ValueError(f"codes run from 0 to {last}, got {int(codes.min())} to {int(codes.max())}")
        return F.embedding(codes, self.vectors).movedim(-1, 1)

    def distances(self, z_e: Tensor) -> Tensor:
        """Squared distances (b h w, K) of each site to each vector; a logit is the *negative* of one."""
        with torch.autocast(z_e.device.type, enabled=False):  # differences of large numbers
            z = sites_of(z_e).to(self.vectors.dtype)
            return z.square().sum(1, keepdim=True) - 2 * z @ self.vectors.T + self.vectors.square().sum(1)

    def forward(self, z_e: Tensor, rng: torch.Generator | None = None) -> Quantized:
        dim = self.vectors.shape[1]
        if z_e.ndim != 4 or z_e.shape[1] != dim:
            raise ValueError(f"the codebook takes maps (b, {dim}, h, w), got {tuple(z_e.shape)}")
        if not self.by_gradient and self.training and not bool(self.count.any()):
            self._restart(torch.ones_like(self.count, dtype=torch.bool), z_e, rng)  # k vectors of the first batch
        codes = self.distances(z_e.detach()).argmin(1).view(len(z_e), *z_e.shape[2:])
        e = self.embed(codes)
        loss = self.commitment * F.mse_loss(z_e, e.detach())  # eq. 3, third term
        if self.by_gradient:
            loss = loss + F.mse_loss(e, z_e.detach())  # eq. 3, second term
        elif self.training:
            self._follow(z_e, codes, rng)
        return Quantized(z_e + (e - z_e).detach(), codes, loss)

    @torch.no_grad()
    def _follow(self, z_e: Tensor, codes: Tensor, rng: torch.Generator | None) -> None:
        """Move each vector to the running mean of what was rounded to it (eq. 6-8); restart the idle ones."""
        z = sites_of(z_e.detach().float())
        chosen = F.one_hot(codes.flatten(), len(self.count)).to(z)  # (b h w, K)
        count, total = chosen.sum(0), chosen.T @ z
        if dist.is_initialized():  # what all processes saw
            dist.all_reduce(count)
            dist.all_reduce(total)
        self.count.lerp_(count, 1 - self.decay)
        self.total.lerp_(total, 1 - self.decay)
        alive = self.count > self.dead
        self.vectors[alive] = self.total[alive] / self.count[alive, None]
        if not bool(alive.all()):
            self._restart(~alive, z_e, rng)

    @torch.no_grad()
    def _restart(self, which: Tensor, z_e: Tensor, rng: torch.Generator | None) -> None:
        """Put these vectors on sites of this batch, drawn at random, as if they had just been used."""
        z = sites_of(z_e.detach().float())
        device = z.device if rng is None else rng.device
        drawn = torch.randint(len(z), (int(which.sum()),), generator=rng, device=device).to(z.device)
        self.vectors[which] = z[drawn].to(self.vectors)
        self.count[which] = 1.0
        self.total[which] = self.vectors[which]


class Residual(nn.Module):
    """relu, 3x3, relu, 1x1, added to what came in."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


def sites_of(z: Tensor) -> Tensor:
    """The vectors (b h w, d) of a map (b, d, h, w), site by site in reading order."""
    return z.movedim(1, -1).flatten(0, -2)
