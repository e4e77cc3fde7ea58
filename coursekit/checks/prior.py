"""Checks of notebook 08: what was seen, the restoration loop, averages, sizes, masks, when to stop, shaken weights."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from coursekit.checks.core import CheckFailed, call, compare, passed, seeded

Seen = Callable[[Tensor], Tensor]


def data_term(fn: Callable[[Tensor, Tensor, Seen], Tensor]) -> None:
    """fn(x, y, seen) -> the mean of (seen(x) - y)^2, a tensor with a gradient."""
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0]).view(1, 1, 1, 4)
    operators: dict[str, Seen] = {"half as bright": lambda x: x / 2, "a mask": lambda x: x * mask,
                                  "half as wide": lambda x: (x[..., ::2] + x[..., 1::2]) / 2}
    for name, seen in operators.items():
        x, y = _rand(1, 3, 5, 4, seed=1), 0.7 * seen(_rand(1, 3, 5, 4, seed=2))
        try:
            got = call(fn, x.clone().requires_grad_(), y, seen)
        except RuntimeError as refusal:
            why = str(refusal).splitlines()[0]
            raise CheckFailed(f"torch refuses ({why}): stay with tensors, change none in place" if x.shape == y.shape
                              else f"an error where seen(x) is smaller than x ({why}): compare y with seen(x), not "
                              "with x, and apply seen to x alone") from None
        error = seen(x) - y
        right = error.square().mean()
        same = x.shape == y.shape
        compare(got.detach() if isinstance(got, Tensor) else got, right, {
            "seen was not applied: y is compared with the whole picture x, hidden pixels and all":
                (x - y).square().mean() if same else None,
            "seen was applied to y as well: y *is* what was seen":
                (seen(x) - seen(y)).square().mean() if same else None,
            "the sum over the pixels: a mean can be compared between pictures of different sizes":
                error.square().sum(),
            "the root of it: without the root every pixel has its own gradient, whatever the others do": right.sqrt(),
            "absolute differences: the square was wanted": error.abs().mean(),
            "half of it: no factor 1/2 here": right / 2,
        }, f"with {name} as `seen`, {right.item():.4f} was wanted, the mean of (seen(x) - y)^2",
            shape_hint=": one number for the whole picture")
        if not got.requires_grad:
            raise CheckFailed("no gradient comes through: no .item(), .detach() or no_grad() here, the network has to "
                              "learn from this number")
    passed("the mean square of seen(x) - y for a mask, a dimming and a shrinking, with a gradient")


def restoration(fn: Callable[..., Iterable[Tensor]]) -> None:
    """fn(model, z, y, seen, steps, sigma_p, rng) yields the image of each step while Adam (0.01) fits y."""
    z, y = _rand(1, 4, 16, 16, seed=3) / 10, torch.full((1, 3, 4, 4), 0.5)
    mask = torch.ones(1, 1, 4, 4)
    mask[..., 3] = 0
    model, said = _run(fn, z, y * mask, lambda x: x * mask, 30, 0.03)
    if len(said) != 30:
        raise CheckFailed(f"{len(said)} images for steps = 30: one `yield` in every turn of the loop")
    if any(not isinstance(x, Tensor) or x.shape != y.shape for x in said):
        raise CheckFailed("each step yields the network's image, (1, 3, h, w), and nothing else")
    if any(x.requires_grad for x in said):
        raise CheckFailed("what is yielded drags its graph along: x.detach(), or every step stays in memory")
    _look_at_the_inputs(torch.stack(model.shown), z, 0.03)
    if torch.equal(said[-1], said[0]):
        raise CheckFailed("the network does not change: backward, then optimizer.step(), with the optimizer on "
                          "model.parameters()")
    if (said[-1] - said[0])[..., 3].abs().max() > 1e-6:
        raise CheckFailed("a pixel that nobody saw was pulled at: the loss is data_term(x, y, seen)")
    found, right = next(iter(model.gradients), (0.0, 0.0))
    if found and abs(found - right) > 0.1 * abs(right):  # 0: emptied after the step, which is as good
        raise CheckFailed("already the first gradient is not that of data_term: the loss is data_term(x, y, seen), "
                          "a mean of squares")
    if any(abs(found) > 1.5 * abs(right) for found, right in model.gradients):
        raise CheckFailed("gradients pile up from step to step: optimizer.zero_grad() before backward()")
    first = (said[1] - said[0])[..., 0].abs().max().item()
    if not math.isclose(first, 0.01, rel_tol=0.02):
        raise CheckFailed(f"the first step moves a pixel by {first:.3g}; Adam at rate 0.01 moves it by 0.01, whatever "
                          "the gradient: torch.optim.Adam(model.parameters(), lr=0.01), made once, before the loop")
    still, _ = _run(fn, z, y, lambda x: x, 3, 0.0)
    if any(not torch.equal(shown, z) for shown in still.shown):
        raise CheckFailed("with sigma_p = 0 the network must see z itself in every step")
    again, _ = _run(fn, z, y, lambda x: x, 3, 0.03)
    if not torch.equal(model.shown[0], again.shown[0]):
        raise CheckFailed("the same seed shows the network other noise: hand rng on, torch.randn(..., generator=rng)")
    passed("the same z under fresh noise in every step, Adam on the network alone, and hidden pixels left to it")


def running_average(fn: Callable[[Iterable[Tensor], float], Iterable[Tensor]]) -> None:
    """fn(images, keep) yields the exponential mean so far: a_1 = x_1, a_n = keep a_{n-1} + (1 - keep) x_n."""
    images = list(_rand(6, 1, 3, 2, 2, seed=4))
    kept = [x.clone() for x in images]
    for keep in (0.8, 0.5, 0.0):
        def mean(start: Tensor, weight: float) -> Tensor:
            out = [start]
            for x in images[int(start is images[0]):]:
                out.append(weight * out[-1] + (1 - weight) * x)
            return torch.stack(out[-6:])
        got = list(_items(call(fn, iter(images), keep)))
        if any(not torch.equal(x, was) for x, was in zip(images, kept, strict=True)):
            raise CheckFailed("the images were changed in place: compute a new tensor, a = keep * a + ...")
        right = mean(images[0], keep)
        if len(got) != 6:
            raise CheckFailed(f"{len(got)} averages for 6 images: one for each, the first included")
        compare(torch.stack(got), right, {
            "it starts from black: the average of one image is that image, so begin with a = x_1":
                mean(torch.zeros_like(images[0]), keep),
            "the weights are swapped: `keep` belongs to the old average": mean(images[0], 1 - keep),
            "the plain mean of all so far: the first bad images would never be forgotten":
                torch.stack(images).cumsum(0) / torch.arange(1.0, 7).view(-1, 1, 1, 1, 1),
            "every average is the last one: you yield one tensor and change it in place": right[-1:].expand_as(right),
            "this is what came in, not averaged": torch.stack(images) if keep else None,
        }, f"with keep = {keep} this is not keep a + (1 - keep) x from the second image on")
    passed("the first average is the first image; each later one keeps its share of what was")


def most_scales(fn: Callable[[int, int], int]) -> None:
    """fn(h, w) -> how often an hourglass may halve h x w: whole sizes, and at least 2 x 2 at the bottom."""
    for (h, w), right in {(256, 256): 7, (32, 32): 4, (64, 96): 5, (96, 64): 5, (64, 48): 4, (40, 200): 3, (6, 6): 1,
                          (50, 64): 1, (64, 50): 1}.items():
        got = call(fn, h, w)
        if isinstance(got, bool) or not isinstance(got, numbers.Integral):
            raise CheckFailed(f"a whole number of scales was wanted, got {got!r}")
        got = int(got)
        if got == right:
            continue
        bottom = f"{h / 2**got:g} x {w / 2**got:g}" if got < 60 else "nothing"
        if got > right and (h % 2**got or w % 2**got):
            raise CheckFailed(f"{h} x {w} halved {got} times would be {bottom}: both sides must be multiples of "
                              f"2 ** {got}")
        if got > right:
            raise CheckFailed(f"{h} x {w} halved {got} times is {bottom}: a side of one pixel can be neither reflected "
                              "nor, if it is the only one, normalised, so stop at 2")
        raise CheckFailed(f"{h} x {w} can be halved {right} times, down to {h // 2**right} x {w // 2**right}, "
                          f"not only {got}")
    passed("nine sizes: as often as both sides are even, but never down to a side of one pixel")


def windowed_variance(fn: Callable[[Tensor, int], Tensor]) -> None:
    """fn(images (n, c, h, w), window) -> (n - window + 1,): how far the last `window` images lie from their mean."""
    images, window = torch.arange(8.0).view(-1, 1, 1, 1) ** 2 / 50 + _rand(8, 3, 4, 5, seed=5), 3
    spans = torch.stack([images[i:i + window] for i in range(6)])  # (6, window, c, h, w)
    right = spans.var(1, correction=0).mean((1, 2, 3))
    compare(call(fn, images, window), right, {
        "the contrast inside the images: take the variance over the window, pixel by pixel, then the mean over pixels":
            lambda got: any(torch.allclose(got, spans.var((2, 3, 4), correction=k).mean(1), rtol=1e-3) for k in (0, 1)),
        "pixels and steps in one pot: subtract from each pixel its own mean over the window":
            lambda got: any(torch.allclose(got, spans.flatten(1).var(1, correction=k), rtol=1e-3) for k in (0, 1)),
        "divided by window - 1: the authors divide by the window, correction=0": right * window / (window - 1),
        "a root too many: variances, not deviations": lambda got: any(torch.allclose(got, r, rtol=1e-3) for r in (
            right.sqrt(), spans.std(1, correction=0).mean((1, 2, 3)))),
        "summed over the pixels: divide by their number N": right * 60,
    }, "for each window, the mean over its images and pixels of (x - mean of the window)^2 was wanted",
        shape_hint=": one number for every full window, the first after `window` images")
    passed("each window's images against their own mean, divided by window and pixels")


def bernoulli_mask(fn: Callable[[int, int, float, torch.Generator], Tensor]) -> None:
    """fn(h, w, p, rng) -> (1, 1, h, w) of 1 (seen, with probability p) and 0 (hidden)."""
    got = call(fn, 40, 60, 0.7, seeded(0))
    if isinstance(got, Tensor) and got.shape == (1, 3, 40, 60):
        raise CheckFailed("each colour has its own coin: a pixel is seen or hidden as a whole, so one channel, "
                          "(1, 1, h, w)")
    if not isinstance(got, Tensor) or got.shape != (1, 1, 40, 60):
        what = tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__
        raise CheckFailed(f"a mask (1, 1, h, w) = (1, 1, 40, 60) was wanted, got {what}")
    if not got.is_floating_point():
        raise CheckFailed(f"the mask multiplies pictures: end in .float(), got {got.dtype}")
    if not bool(((got == 0) | (got == 1)).all()):
        raise CheckFailed("between 0 and 1 there is nothing in a mask: compare a uniform number with p, and keep the "
                          "answer (it is z that is uniform, the mask is Bernoulli)")
    if not torch.equal(got, call(fn, 40, 60, 0.7, seeded(0))):
        raise CheckFailed("the same seed hides other pixels: hand rng on, torch.rand(..., generator=rng)")
    counts = [int(call(fn, 40, 60, 0.7, seeded(seed)).sum()) for seed in range(1, 9)]
    share, within = sum(counts) / (8 * 2400), 5 * math.sqrt(0.7 * 0.3 / (8 * 2400))
    if abs(share - 0.3) < within:
        raise CheckFailed("upside down: 1 says seen, with probability p, and 0 says hidden")
    if abs(share - 0.7) > within:
        raise CheckFailed(f"a share of {share:.2f} is seen with p = 0.7: a pixel is seen where a uniform number is "
                          "below p")
    if len(set(counts)) == 1:
        raise CheckFailed(f"every mask shows exactly {counts[0]} pixels: one coin for each, and their number is left "
                          "to chance")
    passed("one coin for each pixel, for all its colours; a share p is seen")


def hidden_psnr(fn: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """fn(x, x0, mask) -> the PSNR in dB of images in [0, 1], over the pixels where mask (1, 1, h, w) is 0."""
    x, x0 = _rand(1, 3, 8, 8, seed=6), _rand(1, 3, 8, 8, seed=7)
    mask = (_rand(1, 1, 8, 8, seed=8) < 0.7).float()
    x = mask * (0.9 * x0 + 0.1 * x) + (1 - mask) * x  # the seen pixels are nearly right
    error, hidden = (x - x0).square(), 1 - mask

    def decibels(mse: Tensor) -> Tensor:
        return 10 * torch.log10(1 / mse)
    got = call(fn, x, x0, mask)
    if not isinstance(got, Tensor):
        raise CheckFailed(f"a tensor with one number was wanted, got {type(got).__name__}: no .item(), no float()")
    got = got.flatten()
    compare(got.detach(), decibels((error * hidden).sum() / (3 * hidden.sum())).view(1), {
        "every pixel was counted: those that were seen are nearly right for free": decibels(error.mean()).view(1),
        "the seen pixels were counted: mask is 1 where the picture was *seen*":
            decibels((error * mask).sum() / (3 * mask.sum())).view(1),
        "divided by all pixels: the seen ones, with no error, dilute the mean":
            decibels((error * hidden).mean()).view(1),
        "three colours are summed but the mask is counted once: 3 times the error, or 4.8 dB":
            decibels((error * hidden).sum() / hidden.sum()).view(1),
        "images in [0, 1] have a peak of 1, not of 2":
            decibels((error * hidden).sum() / (3 * hidden.sum()) / 4).view(1),
    }, "10 log10(1 / mean squared error over the hidden pixels and their three colours) was wanted",
        atol=1e-3, shape_hint=": one number")
    passed("only what was hidden counts, each colour of it once")


def shaken(fn: Callable[[nn.Module, float, torch.Generator], nn.Module]) -> None:
    """fn(model, share, rng) -> the model, each kernel moved by noise of `share` times its own deviation."""
    def net() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            strong = nn.Conv2d(32, 64, 3)
            with torch.no_grad():
                strong.weight *= 10
            return nn.Sequential(nn.Conv2d(8, 32, 3), nn.BatchNorm2d(32), strong)
    for asked in (0.5, 0.2):
        before, model, twin = net(), net(), net()
        try:
            got = call(fn, model, asked, seeded(1))
        except RuntimeError as error:
            raise CheckFailed(f"torch refuses ({str(error).splitlines()[0]}): a weight that learns may be changed in "
                              "place only under torch.no_grad()") from None
        if got is not model:
            raise CheckFailed("change the model that came in, and return it: `return model`")
        for (name, new), old in zip(model.named_parameters(), before.parameters(), strict=True):
            _look_at_a_weight(name, new, old.detach(), asked)
        call(fn, twin, asked, seeded(1))
        if any(not torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)):
            raise CheckFailed("the same seed shakes differently: torch.randn(w.shape, generator=rng)")
    passed("every kernel moved by its share of its own deviation, in place; biases and norms stayed")


def _look_at_a_weight(name: str, new: nn.Parameter, old: Tensor, asked: float) -> None:
    """Did a kernel move by `asked` times its own deviation, and anything else not at all?"""
    moved = new.detach() - old
    if not new.requires_grad:
        raise CheckFailed(f"{name} no longer learns (requires_grad is False): change its values, do not replace it")
    if new.ndim != 4:
        if moved.any():
            raise CheckFailed(f"{name} moved as well: only the kernels, the parameters with four dimensions")
        return
    if not moved.any():
        raise CheckFailed("no kernel moved: `w = w + noise` gives the name w to a new tensor and leaves the model "
                          "as it was; change w itself, w.add_(noise) or w += noise, under torch.no_grad()")
    share, far = (moved.std() / old.std()).item(), moved.mean().abs().item() / moved.std().item()
    if math.isclose(moved.std().item(), asked, rel_tol=0.1) and not math.isclose(share, asked, rel_tol=0.1):
        raise CheckFailed(f"{name} moved by a deviation of {asked}: `share` counts in units of its own deviation, "
                          "share * w.std()")
    if far > 0.2:
        raise CheckFailed(f"the noise in {name} has a mean: randn is centred, rand is not")
    if not math.isclose(share, asked, rel_tol=0.1):
        raise CheckFailed(f"{name} moved by {share:.2f} of its deviation where {asked:.2f} was asked for: add "
                          "share * w.std() * noise to w, once")


class _Probe(nn.Module):
    """Says an image of its own, whatever it is shown; writes down what that was and which gradients came."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Parameter(torch.full((1, 3, 4, 4), 0.2))
        self.shown: list[Tensor] = []
        self.gradients: list[tuple[float, float]] = []  # of one seen pixel: found, right

    def forward(self, z: Tensor) -> Tensor:
        self.shown.append(z.detach().clone())
        return self.image * 1


def _run(fn: Callable[..., Iterable[Tensor]], z: Tensor, y: Tensor, seen: Seen, steps: int,
         sigma_p: float) -> tuple[_Probe, list[Tensor]]:
    model, said = _Probe(), list[Tensor]()
    given = z.clone()
    for x in _items(call(fn, model, given, y, seen, steps, sigma_p, seeded(9))):
        said.append(x)
        if model.image.grad is not None and isinstance(x, Tensor) and x.shape == y.shape:
            right = 2 * (x[0, 0, 0, 0] - y[0, 0, 0, 0]).item() / x.numel()
            model.gradients.append((model.image.grad[0, 0, 0, 0].item(), right))
    if not torch.equal(given, z):
        raise CheckFailed("z was changed in place: the saved z stays, and each step perturbs a copy, "
                          "z + sigma_p * noise")
    return model, said


def _look_at_the_inputs(shown: Tensor, z: Tensor, sigma_p: float) -> None:
    """Were these (steps, 1, c, h, w) the same z under fresh Gaussian noise of deviation sigma_p?"""
    noise = shown - z
    if not noise.any():
        raise CheckFailed("the network always sees z as it is: add fresh noise in each step, z + sigma_p * noise")
    if torch.equal(noise[0], noise[1]):
        raise CheckFailed("the noise on z is drawn once, before the loop: draw it anew in every step")
    sizes = noise.flatten(1).std(1)
    if sizes[-1] > 2 * sizes[0]:
        raise CheckFailed("the noise piles up from step to step: perturb the saved z each time, do not overwrite z")
    if noise.mean().abs() > 0.1 * sigma_p:
        raise CheckFailed("the noise on z has a mean: randn is centred, rand is not")
    if (shown.mean(0) - z).std() > 0.5 * z.std():
        raise CheckFailed("a new z in every step: the network can hold on to nothing, so add the noise to the saved z")
    if not math.isclose(noise.std().item(), sigma_p, rel_tol=0.05):
        raise CheckFailed(f"the noise on z has deviation {noise.std().item():.2f} where sigma_p = {sigma_p} was asked "
                          "for: sigma_p * randn")


def _items(run: Any) -> Iterable[Tensor]:
    if isinstance(run, Tensor) or not hasattr(run, "__iter__"):
        raise CheckFailed(f"the images come one by one: `yield` them, got {type(run).__name__}")
    return run


def _rand(*shape: int, seed: int) -> Tensor:
    return torch.rand(shape, generator=seeded(seed))
