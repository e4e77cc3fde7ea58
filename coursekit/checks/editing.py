"""Checks of notebook 07: edits that start half-way, inpainting and its seams, anagrams, jigsaws, hybrids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from coursekit.checks.core import CheckFailed, answers_of, call, compare, passed, seeded
from coursekit.denoisers import Denoiser, Prediction, gaussian_blur
from coursekit.schedules import NoiseSchedule, cosine_schedule

View = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


def edit(fn: Callable[..., Any]) -> None:
    """fn(denoise, x0, times, i_start, schedule, rng) -> the end of a walk down from x0 noised to times[i_start]."""
    schedule, times, goal = cosine_schedule(), [1000, 800, 600, 400, 200, 0], 0.25
    x0 = torch.full((64, 1, 8, 8), -0.5)
    for i_start in (2, 4):
        seen: list[tuple[Tensor, int]] = []

        def denoise(x_t: Tensor, t: Tensor, seen: list = seen) -> Prediction:
            seen.append((x_t.clone(), int(t.flatten()[0])))
            a, s = schedule.signal_and_noise(t, like=x_t)
            return Prediction(torch.full_like(x_t, goal), (x_t - a * goal) / s)

        got = call(fn, denoise, x0, times, i_start, schedule, seeded(1))
        if not isinstance(got, Tensor):
            raise CheckFailed("the edited pictures were wanted, a tensor (b, c, h, w): `last(...)` walks to the end, "
                              f"and `.x` of that Step is the picture; got {type(got).__name__}")
        if not seen:
            raise CheckFailed("the denoiser was never asked: hand the noised picture and the times to a sampler")
        asked, wanted = [t for _, t in seen], times[i_start:-1]
        if asked[0] != wanted[0]:
            raise CheckFailed(_wrong_start(asked[0], times, i_start))
        if list(dict.fromkeys(asked)) != wanted:
            raise CheckFailed(f"from times[{i_start}] = {wanted[0]} the walk goes on by {times[i_start + 1:]}, "
                              f"but the denoiser was asked at {asked}: times[i_start:] was wanted")
        _noised_to(seen[0][0], x0, times, i_start, schedule)
        compare(got, torch.full_like(x0, goal), {
            "this is where the walk started, not where it ended: return what the sampler arrives at": seen[0][0],
            "this is the original: return what the sampler arrives at": x0,
        }, "the walk should end, at t = 0, on what the denoiser said last")
    runs = []
    for _ in range(2):
        seen.clear()
        call(fn, denoise, x0, times, 2, schedule, seeded(1))
        runs.append(torch.stack([x_t for x_t, _ in seen]))
    if not torch.equal(*runs):
        raise CheckFailed("the same seed walks another way: hand rng on to everything that draws noise")
    seen.clear()
    call(fn, denoise, x0, times, 2, schedule, seeded(2))
    if torch.equal(torch.stack([x_t for x_t, _ in seen]), runs[0]):
        raise CheckFailed("another seed walks the same way: it is rng that must be asked, and nobody else")
    passed("the picture is noised to times[i_start] and walked down from there, to the end, by the dice of rng alone")


def keep_known(fn: Callable[..., Tensor]) -> None:
    """fn(x_s, known, mask, t, s, eps, schedule) -> x_s, with `known` noised to s wherever mask = 0."""
    schedule = cosine_schedule()
    x_s, known, eps = torch.randn(3, 2, 1, 6, 6, generator=seeded(2))
    mask = torch.zeros(6, 6)
    mask[1:4, 2:] = 1
    for t, s in ((700, 500), (300, 100), (200, 0)):
        (a, b), (a_t, b_t) = (_factors(schedule, u) for u in (s, t))
        right = a * known + b * eps
        compare(call(fn, x_s, known, mask, t, s, eps, schedule), torch.where(mask == 1, x_s, right), {
            "the mask is inverted: 1 is painted anew, and where it is 0 the photograph is kept":
                torch.where(mask == 1, right, x_s),
            f"the known region was noised to t = {t}, but the jump has arrived at s = {s}: it is noisier than the rest":
                torch.where(mask == 1, x_s, a_t * known + b_t * eps),
            "the known region is pasted clean: the network is told that all of the picture has the noise of s":
                torch.where(mask == 1, x_s, known),
            "the known region got noise without losing signal: a x_0 + s eps, so multiply `known` by the root of "
            "alpha_bar": torch.where(mask == 1, x_s, known + b * eps),
            "the known region was dimmed and got no noise, its variance was dropped: add the noise of s":
                torch.where(mask == 1, x_s, a * known),
            "the painted region was noised too: noise `known`, not the finished mixture":
                a * torch.where(mask == 1, x_s, known) + b * eps,
            "the known region is x_s as it came: put the noised photograph there": x_s,
            "the photograph is everywhere: where the mask is 1, x_s must stay": right,
            "both were added up: multiply x_s by the mask, so that it is gone where the photograph is kept":
                x_s + (1 - mask) * right,
        }, f"mask * x_s + (1 - mask) * (the photograph noised to s) was wanted, for a jump from {t} to {s}")
    passed("painted where the mask is 1; elsewhere the photograph, with the noise of the time that was reached")


def jump_back(fn: Callable[..., Tensor]) -> None:
    """fn(x_s, s, t, eps, schedule) -> x_t drawn from q(x_t | x_s), back up to the noise of t."""
    schedule = cosine_schedule()
    x_s, eps = torch.randn(2, 3, 1, 5, 5, generator=seeded(3))
    for s, t in ((400, 500), (100, 300), (0, 200)):
        ab_s, ab_t = schedule.alpha_bar[s].item(), schedule.alpha_bar[t].item()
        keep, one = ab_t / ab_s, schedule.alpha[t].item()
        mistakes = {
            "the variance was dropped: the picture is dimmed as for t, but no noise came with it": keep**0.5 * x_s,
            "the noise came, but the picture was not dimmed for it: the variance grows with every jump":
                x_s + (1 - keep) ** 0.5 * eps,
            "the roots are missing: keep and 1 - keep are variances": keep * x_s + (1 - keep) * eps,
            "the root in front of eps is missing: 1 - keep is a variance": keep**0.5 * x_s + (1 - keep) * eps,
            "signal and noise are swapped: what is kept belongs to x_s": (1 - keep) ** 0.5 * x_s + keep**0.5 * eps,
            "this is one step of T, whose alpha has no bar: from s to t the ratio of the two alpha_bars is kept":
                one**0.5 * x_s + (1 - one) ** 0.5 * eps,
        }
        if s > 0:
            mistakes |= {
                "this noises x_s as if it were clean: it has the noise of s already, so only the ratio "
                "alpha_bar_t / alpha_bar_s is kept": ab_t**0.5 * x_s + (1 - ab_t) ** 0.5 * eps,
                "the noise of s was added again, and that of t was wanted: go back to t, not to s":
                    ab_s**0.5 * x_s + (1 - ab_s) ** 0.5 * eps,
            }
        compare(call(fn, x_s, s, t, eps, schedule), keep**0.5 * x_s + (1 - keep) ** 0.5 * eps, mistakes,
                f"from {s} to {t}: sqrt(keep) x_s + sqrt(1 - keep) eps was wanted, keep = alpha_bar_t / alpha_bar_s")
    passed("back from s to t: dimmed by the ratio of the alpha_bars, and as much noise as was lost")


def seam(fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    """fn(x, mask) -> (b,): the mean |difference| of neighbouring pixels that the edge of the mask parts."""
    x = torch.randn(3, 2, 6, 8, generator=seeded(4))
    corner, middle = torch.zeros(6, 8), torch.zeros(6, 8)
    corner[:4, 5:], middle[2:4, 2:5] = 1, 1
    for mask in (corner, middle):
        right = _edge(x, mask)
        compare(call(fn, x, mask), right, {
            "pixels on the left edge were compared with pixels on the right edge (torch.roll goes round): slice "
            "instead, x[..., 1:] - x[..., :-1]": _rolled(x, mask),
            "these are all neighbours: only those count of which the mask parts one from the other":
                _mean_of([_steps(x, axis).abs().flatten(1) for axis in (-1, -2)]),
            "only neighbours in a row were compared: those in a column belong to it as well": _edge(x, mask, (-1,)),
            "only neighbours in a column were compared: those in a row belong to it as well": _edge(x, mask, (-2,)),
            "bright-to-dark and dark-to-bright cancel: take the absolute value of each difference":
                _edge(x, mask, how=lambda d: d),
            "these are squares: the mean of the absolute differences was wanted": _edge(x, mask, how=Tensor.square),
            "this is a sum: divide by the number of pairs": right * _pairs(mask) * x.shape[1],
            "a sum over the channels: divide by their number too": right * x.shape[1],
        }, "the mean of |x_i - x_j| over neighbours i, j with mask_i != mask_j was wanted, one number an image",
            shape_hint=": one number for each image, so average over channels and pairs only")
    passed("neighbours across the edge of the mask, in rows and in columns, and no others")


def anagram(fn: Callable[[Sequence[Denoiser], Sequence[View]], Denoiser]) -> None:
    """fn(denoisers, views) -> a denoiser: the mean of what each reader says of its view, brought back."""
    x_t, t = torch.randn(2, 1, 4, 4, generator=seeded(5)), torch.tensor([5, 5])

    def quarter(x: Tensor) -> Tensor:
        return x.rot90(1, (-2, -1))

    def back(x: Tensor) -> Tensor:
        return x.rot90(-1, (-2, -1))

    def same(x: Tensor) -> Tensor:
        return x
    rows = torch.arange(4.0)[:, None]  # what a reader says depends on where it sees it: nothing can be undone too early

    def one(x: Tensor, t: Tensor) -> Prediction:
        return Prediction(x * (1 + rows), x - rows)

    def two(x: Tensor, t: Tensor) -> Prediction:
        return Prediction(x.square() + rows, 2 * x + 3 * rows)
    denoise = call(fn, [one, two], [(same, same), (quarter, back)])
    got = answers_of(denoise, "anagram", x_t, t, "bring both back and average both")
    for k, name in enumerate(Prediction._fields):
        plain, seen, blind = one(x_t, t)[k], two(quarter(x_t), t)[k], two(x_t, t)[k]
        compare(got[k], (plain + back(seen)) / 2, {
            "the second reader's answer was not turned back: its strokes belong where its view put them":
                (plain + seen) / 2,
            "the turn was undone too early, before the second reader looked: it read the picture as it stands":
                (plain + blind) / 2,
            "the second reader read the picture as it stands, and its answer was turned: show it the view":
                (plain + back(blind)) / 2,
            "view and inverse are swapped: the view is shown to the reader, the inverse brings its answer back":
                (plain + quarter(two(back(x_t), t)[k])) / 2,
            "the answer was turned once more in the same direction: bring it back with the inverse":
                (plain + quarter(seen)) / 2,
            "this is the sum: two readers would count for twice the picture, so divide by their number":
                plain + back(seen),
            "only the first reader is heard": plain,
            "only the second reader is heard": back(seen),
            "the first reader was asked twice": (plain + back(one(quarter(x_t), t)[k])) / 2,
        }, f"{name} should be the mean of both readers' answers, each brought back by the inverse of its view")
    three = call(fn, [one] * 3, [(same, same)] * 3)(x_t, t)
    compare(three[0], one(x_t, t).x0, {
        "with three readers the answer is still divided by two: divide by how many there are": one(x_t, t).x0 * 1.5,
    }, "three readers that agree should be one reader")
    passed("each reader sees its own view, its answer is brought back, and all count alike; x0 and eps together")


def shuffled(fn: Callable[[Tensor], View]) -> None:
    """fn(order) -> (view, inverse) on images (b, c, h, w): pixel i of the view is pixel order[i] of the image."""
    order = torch.randperm(20, generator=seeded(6))
    x = torch.randn(2, 3, 4, 5, generator=seeded(7))
    pair = call(fn, order)
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(map(callable, pair)):
        raise CheckFailed("a pair of functions was wanted, (view, inverse)")
    flat = x.flatten(2)
    right, wrong = flat[..., order].view_as(x), flat[..., order.argsort()].view_as(x)
    compare(call(pair[0], x), right, {
        "this is the inverse: pixel i of the view is pixel order[i] of the image, x.flatten(2)[..., order]": wrong,
        "the image came back as it was: the order was not used": x,
    }, "the view should hold the pixels of the image in the given order, .flatten(2)[..., order]")
    compare(call(pair[1], right), x, {
        "the inverse uses `order` again, which shuffles a second time: it is order.argsort() that undoes it":
            flat[..., order][..., order].view_as(x),
        "the order read backwards does not undo it: the inverse of a permutation is order.argsort()":
            flat[..., order][..., order.flip(0)].view_as(x),
        "the inverse does nothing: the view stays shuffled": right,
    }, "inverse(view(x)) should be x")
    passed("the view moves every pixel, and loses none; its inverse puts each back")


def hybrid(fn: Callable[..., Denoiser]) -> None:
    """fn(low, high, kernel_size, sigma) -> a denoiser: low frequencies of one, what remains of the other."""
    x_t, t = torch.randn(1, 1, 36, 36, generator=seeded(8)), torch.tensor([5])
    low, high = (Prediction(*torch.randn(2, 1, 1, 36, 36, generator=seeded(seed))) for seed in (9, 10))

    def far(x: Tensor, size: int = 33, sigma: float = 2.0) -> Tensor:
        return gaussian_blur(x, [size, size], [sigma, sigma])
    for size, sigma in ((33, 2.0), (15, 1.5)):
        denoise = call(fn, lambda x_t, t: low, lambda x_t, t: high, size, sigma)
        got = answers_of(denoise, "hybrid", x_t, t, "split both")
        for name, mine, u, v in zip(Prediction._fields, got, low, high, strict=True):
            blurred = far(u, size, sigma)
            compare(mine, blurred + v - far(v, size, sigma), {
                "the two are swapped: the blur belongs to `low`, what is left of it to `high`":
                    far(v, size, sigma) + u - far(u, size, sigma),
                "the high part still holds its own low frequencies: take its blur off, v - blur(v)": blurred + v,
                "both were blurred: the high part is what blurring takes away, v - blur(v)":
                    blurred + far(v, size, sigma),
                "the high frequencies are missing": blurred,
                "the low frequencies are missing": v - far(v, size, sigma),
                "the low part is missing, and u's blur was taken off instead of v's own blur": v - blurred,
                "this is a mean, half of each: the parts are complementary, so add them":
                    (blurred + v - far(v, size, sigma)) / 2,
                "the high-pass does not complement the low-pass: it was cut with another kernel, so low + high of one "
                "prompt is no longer that prompt": lambda got, b=blurred, v=v: _another_kernel(got, b, v),
                f"{name} was not split: it is the mean of both": (u + v) / 2,
                f"{name} was not split: this is `low` as it came": u,
                f"{name} is `high` as it came: it was not split, or u's blur was taken off where v's belongs": v,
                "kernel_size and sigma are not used: this is 33 and 2 whatever was asked": far(u) + v - far(v),
            }, f"{name} should be blur(low) + (high - blur(high)), with the same blur both times", atol=2e-5)
    passed("what blurring keeps of one and what it takes from the other; the two halves add up to one whole")


def _wrong_start(asked: int, times: Sequence[int], i_start: int) -> str:
    wanted = f"the walk should start at times[{i_start}] = {times[i_start]}, and began at {asked}: "
    if asked == times[0]:
        return wanted + "from the top nothing of the picture is left, so leave the first i_start times out"
    if asked == times[i_start + 1]:
        return wanted + "that is one too late"
    return wanted + "i_start counts places in the list of times"


def _noised_to(x_t: Tensor, x0: Tensor, times: Sequence[int], i_start: int, schedule: NoiseSchedule) -> None:
    """x_t must look like 4096 independent draws of q(x_t | x0) at times[i_start]."""
    t = times[i_start]
    (a, s), mean, std = _factors(schedule, t), (x_t / x0).mean().item(), x_t.std().item()
    if std > 0.02 and torch.equal(x_t[0], x_t[1]):
        raise CheckFailed("every picture of the batch has the same noise: draw it in the shape of x0")
    if abs(mean - a) < 0.13 and abs(std - s) < 0.05:
        return
    if std < 0.02 or (s - std > 0.1 and abs(mean - 1) < 0.13):
        raise CheckFailed(f"the walk starts at t = {t}, and the picture it starts from has no noise, or too little: "
                          "noise it to that time first")
    if abs(mean) < 0.13:
        raise CheckFailed("nothing of the picture is in what the walk starts from: that is sampling from noise")
    if abs(mean - 1) < 0.13:
        raise CheckFailed(f"the noise was added on top of a whole picture: at t = {t} only {a:.2f} of it is left")
    raise CheckFailed(f"the walk starts at t = {t}, where the picture has {a:.2f} of its signal and noise of deviation "
                      f"{s:.2f}, but here it is {mean:.2f} and {std:.2f}: was it noised to another time?")


def _another_kernel(got: Tensor, blurred: Tensor, v: Tensor) -> bool:
    """Whether got - blurred is v less some other Gaussian blur of it."""
    rest = v - (got - blurred)
    kernels = [(size, sigma) for size in range(3, 35, 2) for sigma in (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)]
    return any(torch.allclose(rest, gaussian_blur(v, [size] * 2, [sigma] * 2), atol=2e-5) for size, sigma in kernels)


def _factors(schedule: NoiseSchedule, t: int) -> tuple[float, float]:
    ab = schedule.alpha_bar[t].item()
    return ab**0.5, (1 - ab) ** 0.5


def _steps(x: Tensor, axis: int) -> Tensor:
    return x.diff(dim=axis)


def _edge(x: Tensor, mask: Tensor, axes: tuple[int, ...] = (-1, -2),
          how: Callable[[Tensor], Tensor] = Tensor.abs) -> Tensor:
    return _mean_of([how(_steps(x, axis))[..., _steps(mask, axis) != 0].flatten(1) for axis in axes])


def _rolled(x: Tensor, mask: Tensor) -> Tensor:
    return _mean_of([(x - x.roll(1, axis)).abs()[..., mask != mask.roll(1, axis)].flatten(1) for axis in (-1, -2)])


def _mean_of(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, dim=1).mean(1)


def _pairs(mask: Tensor) -> int:
    return sum(int((_steps(mask, axis) != 0).sum()) for axis in (-1, -2))
