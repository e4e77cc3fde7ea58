"""Checks of notebook 06: what colour and size change, the end of a schedule, and a distance between sets."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coursekit import metrics
from coursekit.checks.core import CheckFailed, call, compare, passed, seeded
from coursekit.schedules import cosine_schedule, linear_schedule, zero_terminal_snr


def attends_at(fn: Callable[[int, int, Sequence[int]], list[int]]) -> None:
    """fn(size, patch, attention) -> how many places wide the maps are on which a UNet attends."""
    for size, patch, attention in ((96, 2, (2, 3)), (32, 2, (1,)), (64, 4, (0, 2))):
        got = call(fn, size, patch, attention)
        if not isinstance(got, (list, tuple)):
            raise CheckFailed(f"a list with one side for each level was wanted, got {type(got).__name__}")
        right = [size // (patch * 2**level) for level in attention]
        mistakes = {
            "the stem is forgotten: it folds patch x patch pixels into one place before level 0":
                [size / 2**level for level in attention],
            "level 0 is not halved yet: a level halves the side of the level *before* it":
                [size / (patch * 2 ** (level + 1)) for level in attention],
            "that is how many places a map has: its side is wanted, side * side are the places":
                [side**2 for side in right],
            "each level halves again: level 3 is 2 * 2 * 2 times smaller, not 3 * 2 times":
                [size / (patch * max(1, 2 * level)) for level in attention],
            "those are all levels: only those in `attention` attend":
                [size // (patch * 2**level) for level in range(max(attention) + 1)],
        }
        if list(got) != right:
            for sentence, wrong in mistakes.items():
                if list(got) == wrong:
                    raise CheckFailed(sentence)
            raise CheckFailed(f"for {size} pixels, patch {patch} and levels {list(attention)} the sides are {right}, "
                              f"got {list(got)}")
    passed("attention looks at maps of size / (patch * 2^level) places a side, the stem's folding included")


def mirrored(fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    """fn(x (b, c, h, w), coin (b,) bool) -> x, left and right exchanged in the images whose coin is True."""
    x, coin = torch.rand(5, 3, 6, 6, generator=seeded(0)), torch.tensor([True, False, False, True, True])
    per_image = coin.view(-1, 1, 1, 1)
    compare(call(fn, x, coin), torch.where(per_image, x.flip(-1), x), {
        "none was mirrored": x,
        "the images are upside down: left and right is the *last* dimension": torch.where(per_image, x.flip(-2), x),
        "the images are turned by half: mirror one dimension only": torch.where(per_image, x.flip(-1, -2), x),
        "red and blue are exchanged: dimension 1 is the colour": torch.where(per_image, x.flip(1), x),
        "the images changed places, so they would no longer fit their labels: the batch is not to be flipped":
            lambda got: torch.equal(got.flatten(1).sort(0).values, x.flatten(1).sort(0).values),
        "all images were mirrored: each has a coin of its own": x.flip(-1),
        "the coin is read the wrong way round: True means mirror": torch.where(per_image, x, x.flip(-1)),
        "pairs were averaged: an image is mirrored or it is not": torch.where(per_image, (x + x.flip(-1)) / 2, x),
    }, "mirror left and right, of exactly the images whose coin is True")
    passed("left and right change places where the coin says so; colours, rows and the order of the batch stay")


def ema_update(fn: Callable[[nn.Module, nn.Module, float], nn.Module]) -> None:
    """fn(average, model, decay) -> average, moved in place a little towards model; buffers are copied."""
    average, model = _two_networks()
    was, target = _numbers_of(average), _numbers_of(model)
    try:
        got = call(fn, average, model, 0.9)
    except RuntimeError as why:
        raise CheckFailed(f"torch refused ({str(why).splitlines()[0]}): averaging is no part of learning, so put "
                          "@torch.no_grad() on top, and lerp parameters only: a count is an integer") from None
    if got is not average:
        raise CheckFailed("move `average` in place and return it: the caller's own network must follow")
    if any((_numbers_of(model)[name] != value).any() for name, value in target.items()):
        raise CheckFailed("the model was changed: it goes on learning, only the average follows it")
    parameters = dict(average.named_parameters())
    if any(p.grad_fn is not None for p in parameters.values()):
        raise CheckFailed("the average carries a graph that grows with every step: @torch.no_grad() on top")
    now = _numbers_of(average)
    wanted = {name: 0.9 * was[name] + 0.1 * target[name] if name in parameters else target[name] for name in was}
    explained = {
        "nothing moved": was,
        "the average is the model itself now: with decay 0.9 it keeps nine tenths of what it was": target,
        "the roles are exchanged: decay is what the average *keeps*": {
            name: 0.1 * was[name] + 0.9 * target[name] for name in was},
    }
    for sentence, wrong in explained.items():
        if all(torch.allclose(now[name], wrong[name].to(now[name])) for name in parameters):
            raise CheckFailed(sentence)
    for name in parameters:
        if not torch.allclose(now[name], wanted[name]):
            raise CheckFailed(f"the parameter {name} is not decay * average + (1 - decay) * model")
    for name in (name for name in was if name not in parameters):  # in order: the integer count comes last
        if torch.equal(now[name], was[name]):
            raise CheckFailed("the buffers stayed behind: running means would be those of the random start; copy them")
        if not torch.equal(now[name], target[name]):
            raise CheckFailed("the buffers were averaged: they are no weights (BatchNorm's mean is an average already, "
                              "and its count an integer); copy them")
    for theirs in model.buffers():
        theirs.add_(1)
    if any((_numbers_of(average)[name] != value).any() for name, value in now.items()):
        raise CheckFailed("average and model share their buffers now: when the model moves the average jumps along; "
                          "copy the numbers, mine.copy_(theirs)")
    passed("weights keep decay of the old and take 1 - decay of the new, buffers are copied, the model is left alone")


def zero_snr(fn: Callable[[Tensor], Tensor]) -> None:
    """fn(alpha_bar (T+1,)) -> the same shifted and stretched to end at 0 (Lin et al. 2023, algorithm 1)."""
    schedule = linear_schedule(30, 0.02, 0.1)  # large steps, so that the first can be told from none
    ab = schedule.alpha_bar
    root, one = ab.sqrt(), ab[:1]
    first, end = root[1], root[-1]
    moved = (root[1:] - end) * first / (first - end)
    got = call(fn, ab)
    if isinstance(got, Tensor) and got.shape == ab[1:].shape:
        raise CheckFailed("entry 0 is missing: the clean image keeps its 1")
    compare(got, zero_terminal_snr(schedule).alpha_bar, {
        "nothing changed: some signal is left at T": ab,
        "alpha_bar was shifted and not its root: amplitudes are what is shifted, square them afterwards":
            torch.cat([one, (ab[1:] - ab[-1]) * ab[1] / (ab[1] - ab[-1])]),
        "these are the roots: square them": torch.cat([one, moved]),
        "only the last entry was set to 0: then the whole rest is destroyed in one step": torch.cat([ab[:-1], 0 * one]),
        "shifted, but not stretched: the first step would destroy a good part of the image": torch.cat(
            [one, (root[1:] - end) ** 2]),
        "stretched by 1 - root[T]: it is root[1], the first *noising* step, that keeps its place":
            ((root - end) / (1 - end)) ** 2,
        "entry 0 was moved with the rest: the clean image is 1": ((root - end) * first / (first - end)) ** 2,
    }, "roots: (root - root[T]) * root[1] / (root[1] - root[T]) for t >= 1, then squared; entry 0 stays 1", atol=1e-7)
    if call(fn, cosine_schedule(50).alpha_bar)[-1] != 0:
        raise CheckFailed("the end must be exactly 0: subtract the last root, do not divide by something large")
    passed("nothing is left at T, the first noising step is as it was, and so is the clean image")


def kernel_distance(fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    """fn(fx (n, d), fy (m, d)) -> (), the unbiased estimate of MMD^2 under k(x, y) = (x.y / d + 1)^3."""
    rng = seeded(6)
    fx = torch.randn(12, 5, generator=rng, dtype=torch.float64)
    fy = torch.randn(9, 5, generator=rng, dtype=torch.float64) + 0.5
    compare(call(fn, fx, fy), metrics.kernel_distance(fx, fy), {
        "each image was compared with itself too: those pairs look alike by force, and make the estimate biased; "
        "leave the diagonal out": _mmd(fx, fy, diagonal=True),
        "the diagonal is out of the sum but still counted: there are n (n - 1) pairs": _mmd(fx, fy, off_by_one=True),
        "the pairs across are counted once: minus *twice* their mean": _mmd(fx, fy, across=1),
        "the pairs across are added: they are subtracted": _mmd(fx, fy, across=-2),
        "x.y was not divided by d: with 256 features the cube explodes": _mmd(fx, fy, d=1),
        "the kernel is squared: KID's is a cube": _mmd(fx, fy, power=2),
        "the kernel has no power: it would compare the two means and nothing else": _mmd(fx, fy, power=1),
        "+ 1 is missing in the kernel": _mmd(fx, fy, plus=0),
        "a root was taken: of an unbiased estimate that may fall below 0": lambda got: torch.allclose(
            got, metrics.kernel_distance(fx, fy).abs().sqrt(), atol=1e-6),
        "cut off at 0: an unbiased estimate of zero must be free to fall below it": lambda got: bool(got == 0),
    }, "mean k(x, x') over pairs of different images + the same for y - 2 * mean k(x, y)", atol=1e-7)
    same = torch.randn(40, 5, generator=seeded(6), dtype=torch.float64)
    if call(fn, same[:20], same[20:]) >= 0:
        raise CheckFailed("cut off at 0: an unbiased estimate of zero must be free to fall below it")
    passed("no image is compared with itself, so the mean over many draws is the true distance at every n")


def _two_networks() -> tuple[nn.Module, nn.Module]:
    """A network that learns and its average, both with weights, running means and an integer count."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        average = copy.deepcopy(model).requires_grad_(False)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape))
        model(torch.randn(8, 3))  # moves the running means and the count
    return average, model


def _numbers_of(model: nn.Module) -> dict[str, Any]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _mmd(x: Tensor, y: Tensor, diagonal: bool = False, off_by_one: bool = False, across: float = 2,
         d: int | None = None, power: int = 3, plus: float = 1) -> Tensor:
    d = x.shape[1] if d is None else d

    def k(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / d + plus) ** power

    def among(a: Tensor) -> Tensor:
        n, every = len(a), k(a, a)
        if diagonal:
            return every.mean()
        return (every.sum() - every.diagonal().sum()) / (n**2 if off_by_one else n * (n - 1))
    return among(x) + among(y) - across * k(x, y).mean()
