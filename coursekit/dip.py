"""Deep Image Prior: restore one image by training an untrained network to explain what was seen of it.

What was seen is y = A(x) + noise, where A keeps everything (denoising), some pixels (inpainting) or a smaller picture
(super-resolution). Images here are in [0, 1], as the network's sigmoid answers. Ulyanov, Vedaldi and Lempitsky 2018.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice, repeat
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coursekit.diffusion import noise_like
from coursekit.training import train

LOOK_EVERY, FALL = 100, 10**0.5  # steps; a loss this many times as large has fallen by 5 dB


class Iterate(NamedTuple):
    """Where the restoration stands after one step."""

    step: int  # 1, 2, ...
    loss: Tensor  # mean squared error to what was seen, detached
    x: Tensor  # (1, c, h, w) what the network said in this step
    average: Tensor  # the exponential mean of that


def restore(model: nn.Module, z: Tensor, y: Tensor, seen: Callable[[Tensor], Tensor] = lambda x: x, *, steps: int,
            lr: float = 0.01, sigma_p: float = 1 / 30, keep: float = 0.99,
            rng: torch.Generator | None = None) -> Iterator[Iterate]:
    """Minimise the mean of (seen(model(z)) - y)^2 over the weights of `model`, yielding after every step.

    z (1, c_in, h, w) is the fixed input, to which each step adds fresh noise of deviation sigma_p. `keep` is what the
    average keeps of itself in a step. Every 100 steps the loss is looked at: if it has risen by more than 5 dB since
    the last look, the weights of that look come back (the authors compare neighbouring steps). ValueError for settings
    that cannot be right, FloatingPointError if the loss is not finite before there is anything to go back to.
    """
    if steps < 1 or not lr > 0 or not sigma_p >= 0 or not 0 <= keep < 1:
        raise ValueError("need steps >= 1, lr > 0, sigma_p >= 0 and keep in [0, 1), "
                         f"got {steps}, {lr}, {sigma_p}, {keep}")
    said = torch.empty(0)

    def explains(model: nn.Module, z: Tensor) -> Tensor:
        nonlocal said
        said = model(z + sigma_p * noise_like(z, rng))
        found = seen(said)
        if found.shape != y.shape:
            raise ValueError(f"y has shape {tuple(y.shape)}, but seen(x) has {tuple(found.shape)}")
        return F.mse_loss(found, y)

    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=z.device.type != "mps")
    average: Tensor | None = None
    last_loss, last_weights = math.inf, dict[str, Tensor]()
    for step, loss in islice(train(model, repeat(z), explains, optimizer), steps):
        x = said.detach()
        if average is None or bool(x.isfinite().all()):
            average = x if average is None else average.lerp(x, 1 - keep)
        if step % LOOK_EVERY == 0:
            now = loss.item()
            if math.isfinite(now) and now <= FALL * last_loss:
                last_loss, last_weights = now, {k: v.clone() for k, v in model.state_dict().items()}
            elif last_weights:
                model.load_state_dict(last_weights)
                if not math.isfinite(now):
                    optimizer.state.clear()  # the moments have swallowed it
            else:
                raise FloatingPointError(f"the loss became {now} in the first {step} steps: try a smaller lr")
        yield Iterate(step, loss, x, average)


def fixed_input(channels: int, height: int, width: int, rng: torch.Generator | None = None,
                kind: str = "noise") -> Tensor:
    """z (1, channels, height, width): uniform noise in [0, 0.1], or the coordinates of the pixels ("meshgrid")."""
    if kind == "noise":
        return 0.1 * torch.rand(1, channels, height, width, generator=rng, device=rng.device if rng else None)
    if kind != "meshgrid":
        raise ValueError(f'kind is "noise" or "meshgrid", got {kind!r}')
    if channels != 2:
        raise ValueError(f"a meshgrid has the two channels x and y, got channels = {channels}")
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    return torch.stack([x, y])[None]


def downsampled(x: Tensor, factor: int) -> Tensor:
    """x (b, c, h, w) made `factor` times smaller by Lanczos' kernel with two lobes; borders are replicated."""
    if factor < 2 or x.shape[2] % factor or x.shape[3] % factor:
        raise ValueError(f"the factor is at least 2 and divides height and width, got {factor} for {tuple(x.shape)}")
    first = (factor - 1) // 2 - 2 * factor + (factor % 2 == 0)  # the first old pixel that one new pixel sees
    far = (torch.arange(first, first + 4 * factor, dtype=torch.float64) + 0.5) / factor - 0.5
    tap = torch.sinc(far) * torch.sinc(far / 2)
    tap = (tap / tap.sum()).to(x)
    c = x.shape[1]
    x = F.pad(x, (-first, 3 * factor + first) * 2, mode="replicate")
    x = F.conv2d(x, tap.view(1, 1, 1, -1).expand(c, 1, 1, -1), stride=(1, factor), groups=c)
    return F.conv2d(x, tap.view(1, 1, -1, 1).expand(c, 1, -1, 1), stride=(factor, 1), groups=c)


class WindowedVariance:
    """When to stop, without the clean image: where the last `window` outputs differ least (Wang et al., ES-WMV).

    While the network learns the image its outputs move; when it has, they rest; when it learns the noise they move
    again. `update` takes each output in turn and says True once `patience` outputs have brought no new minimum.
    `.best` is the output at the minimum, on the CPU; `.best_step` its number; `.variances` all that was measured.
    """

    def __init__(self, window: int = 100, patience: int = 1000):
        if window < 2 or patience < 1:
            raise ValueError(f"need a window of at least 2 and patience of at least 1, got {window}, {patience}")
        self.window, self.patience = window, patience
        self.variances: list[float] = []  # nan until the window is full
        self.best: Tensor | None = None
        self.best_step = 0
        self._outputs: deque[Tensor] = deque()
        self._sum, self._squares = torch.zeros(1), 0.0

    def update(self, x: Tensor) -> bool:
        """Take the next output; True if it is time to stop. ValueError unless it is finite and shaped as before."""
        x = x.detach().cpu()
        if not bool(x.isfinite().all()) or (self._outputs and x.shape != self._outputs[0].shape):
            raise ValueError(f"outputs are finite and of one shape, got one of {tuple(x.shape)} between "
                             f"{x.min().item():g} and {x.max().item():g}")
        self._outputs.append(x)
        x = x.double()
        self._sum, self._squares = self._sum + x, self._squares + x.square().sum().item()
        if len(self._outputs) > self.window:
            gone = self._outputs.popleft().double()
            self._sum, self._squares = self._sum - gone, self._squares - gone.square().sum().item()
        variance = math.nan
        if len(self._outputs) == self.window:
            mean = self._sum / self.window
            variance = max(0.0, (self._squares / self.window - mean.square().sum().item()) / x.numel())
        self.variances.append(variance)
        step = len(self.variances)
        if variance < (self.variances[self.best_step - 1] if self.best_step else math.inf):
            self.best, self.best_step = x.float(), step
        return self.best_step > 0 and step - self.best_step >= self.patience
