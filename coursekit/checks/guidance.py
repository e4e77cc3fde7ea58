"""Checks of notebook 05: labels and their dropout, guidance and its weights, diversity, great circles."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from coursekit.checks.core import CheckFailed, answers_of, call, compare, passed, seeded
from coursekit.denoisers import Denoiser, Prediction


def one_hot(fn: Callable[[Tensor, int], Tensor]) -> None:
    """fn(label (b,), classes) -> (b, classes) floats, one 1 a row; a row of zeros where the label is -1."""
    for classes, label in ((10, torch.tensor([7, 0, -1, 9, -1, 3])), (4, torch.tensor([3, -1, 0]))):
        try:
            got = call(fn, label, classes)
        except RuntimeError as error:  # what F.one_hot and scatter say of -1
            raise CheckFailed(f"a label of -1 ends in an error ({str(error).splitlines()[0]}): make room for it, "
                              "label + 1 into classes + 1 columns, then cut the first column off") from None
        if isinstance(got, Tensor) and got.ndim == 2 and got.shape[1] == classes + 1:
            raise CheckFailed(f"{classes + 1} columns for {classes} classes: \"no label\" is no class of its own but a "
                              "row of zeros, so cut its column off")
        if not isinstance(got, Tensor) or got.shape != (len(label), classes):
            shape = tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__
            raise CheckFailed(f"{len(label)} labels of {classes} classes are a tensor ({len(label)}, {classes}), a row "
                              f"for each label, got {shape}")
        if not got.is_floating_point():
            raise CheckFailed(f"a network multiplies this with its weights: end in .float(), got {got.dtype}")
        none, rows = (label == -1)[:, None], F.one_hot(label.clamp(min=0), classes).float()
        last = F.one_hot(label % classes, classes).float()
        compare(got, torch.where(none, 0.0, rows), {
            "a label of -1 became the last class: Python counts -1 from the end; \"no label\" is a row of zeros": last,
            "a label of -1 became the class 0, which is a digit: \"no label\" is a row of zeros": rows,
            "\"no label\" is a little of every class here: a row of zeros was wanted":
                torch.where(none, 1 / classes, rows),
            "\"no label\" is a row of -1 here: a row of zeros was wanted": torch.where(none, -1.0, rows),
            "the column is off by one: label 0 has its 1 in column 0":
                torch.where(none, 0.0, F.one_hot((label + 1) % classes, classes).float()),
        }, "one 1 a row was wanted, in the column of the label, and zeros elsewhere")
    passed("each label is one 1 in its own column, and no label is no 1 at all")


def drop_labels(fn: Callable[[Tensor, float, torch.Generator], Tensor]) -> None:
    """fn(label (b,), p, rng) -> labels of which each is -1, "no label", with probability p."""
    few = torch.arange(64) % 9 + 1  # no zeros, so that a zero can only come from the function
    draws = [call(fn, few, 0.5, seeded(seed)) for seed in range(12)]
    for got in draws:
        if not isinstance(got, Tensor) or got.shape != few.shape or got.is_floating_point():
            what = f"{got.dtype} {tuple(got.shape)}" if isinstance(got, Tensor) else type(got).__name__
            raise CheckFailed(f"one whole number for each label was wanted, int64 (64,), got {what}")
        new = got[got != few]
        if len(new) and bool((new == 0).all()):
            raise CheckFailed("dropped labels became 0, and 0 is a digit: \"no label\" is -1 in this course")
        if len(new) and not bool((new == -1).all()):
            raise CheckFailed(f"a dropped label became {int(new[new != -1][0])}: \"no label\" is -1 in this course")
    kept = [int((got == few).sum()) for got in draws]
    if all(n == 64 for n in kept):
        raise CheckFailed("no label was dropped, with p = 0.5, in twelve batches of 64")
    if all(n in (0, 64) for n in kept):
        raise CheckFailed("a batch is dropped whole or kept whole: toss one coin for each image, "
                          "torch.rand(label.shape, ...)")
    if len(set(kept)) == 1:
        raise CheckFailed(f"every batch loses exactly {64 - kept[0]} of 64 labels: toss a coin for each label, and the "
                          "number will be left to chance")
    if not torch.equal(draws[0], call(fn, few, 0.5, seeded(0))):
        raise CheckFailed("the same seed drops other labels: hand rng on, torch.rand(..., generator=rng)")
    if torch.equal(draws[0], draws[1]):
        raise CheckFailed("two seeds drop the same labels: which ones it hits must be left to chance")
    many = torch.arange(20_000) % 10
    for p in (0.1, 0.3, 0.0, 1.0):
        share = (call(fn, many, p, seeded(1)) == -1).double().mean().item()
        within = 5 * math.sqrt(p * (1 - p) / len(many))
        if abs(share - p) > within and abs(share - (1 - p)) <= within:
            raise CheckFailed(f"with p = {p} a share of {share:.2f} was dropped: p is the share to drop, not to keep")
        if abs(share - p) > within:
            raise CheckFailed(f"with p = {p} a share of {share:.3f} was dropped: a label goes where a uniform number "
                              "falls below p")
    passed("each label is dropped by its own coin, a share p of them, to -1, and the caller's labels are untouched")


def guided(fn: Callable[[Denoiser, Denoiser, float], Denoiser]) -> None:
    """fn(conditional, unconditional, w) -> a denoiser that answers u + w (c - u), x0 and eps alike."""
    c, u, x_t, t = _answer(1), _answer(2), torch.zeros(3, 1, 4, 4), torch.tensor([1, 2, 3])
    for w in (3.0, 0.0, 1.0, 0.25):
        told, free_of_it = (Prediction(*(part.clone() for part in answer)) for answer in (c, u))
        denoise = call(fn, lambda x_t, t, told=told: told, lambda x_t, t, u=free_of_it: u, w)
        got = answers_of(denoise, "guided", x_t, t, "guide both of them")
        if any(not torch.equal(p, q) for p, q in zip([*told, *free_of_it], [*c, *u], strict=True)):
            raise CheckFailed("the answers of the two denoisers were changed in place: somebody may still need them, "
                              "so compute new tensors (u + ..., not u.add_(...))")
        for part, mine, cond, free in zip(Prediction._fields, got, c, u, strict=True):
            compare(mine, free + w * (cond - free), {
                "c and u are swapped: w = 0 must ignore the label, w = 1 obey it": cond + w * (free - cond),
                "this is Ho & Salimans' zero, (1 + w) c - w u: here w = 0 ignores the label and w = 1 is plain "
                "obedience": (1 + w) * cond - w * free,
                "it walks away from the label: the arrow points from u to c, w (c - u)": free - w * (cond - free),
                "only the difference is left: start from u, then add w (c - u)": w * (cond - free),
                "w multiplies both answers: the weights of c and u must add up to 1": w * (cond + free),
                "w multiplies the whole: put the brackets around (c - u)": w * cond,
                "c was added without taking u off: the weights of c and u must add up to 1": free + w * cond,
                "an average lies between c and u: with w > 1 the answer must go beyond c": (w * cond + free) / (1 + w),
                "w is not used: this is the mean of both": (cond + free) / 2,
                f"{part} was not guided: this is the conditional answer as it came": cond,
                f"{part} was not guided: this is the unconditional answer as it came": free,
            }, f"{part} should be u + w (c - u), at w = {w:g}")
    passed("w = 0 ignores the label, w = 1 obeys it, w = 3 goes three times as far from u; x0 and eps together")


def our_weight(fn: Callable[[float, str], float]) -> None:
    """fn(weight, convention) -> the w of u + w (c - u); conventions "ho-salimans", "cs180", "diffusers"."""
    for weight in (0.0, 0.3, 1.0, 5.0, 7.5):
        for convention, right in (("ho-salimans", 1 + weight), ("cs180", weight),
                                  ("diffusers", weight if weight > 1 else 1.0)):
            got = float(call(fn, weight, convention))
            if math.isclose(got, right, abs_tol=1e-9):
                continue
            if convention == "ho-salimans" and math.isclose(got, weight, abs_tol=1e-9):
                raise CheckFailed("their zero was not moved: (1 + w) c - w u at w = 0 is c, and c is our w = 1")
            if convention == "ho-salimans" and math.isclose(got, weight - 1, abs_tol=1e-9):
                raise CheckFailed("moved the wrong way: their weight is smaller than ours, so add 1 to it")
            if convention == "cs180" and math.isclose(got, 1 + weight, abs_tol=1e-9):
                raise CheckFailed("CS180's g already counts from u: u + g (c - u) is our formula, letter by letter")
            if convention == "diffusers" and weight <= 1 and math.isclose(got, weight, abs_tol=1e-9):
                raise CheckFailed(f"guidance_scale = {weight:g} switches guidance off in diffusers, and then only c is "
                                  "left, which is our w = 1: at or below 1 the answer is always 1")
            raise CheckFailed(f"a weight of {weight:g} in the convention {convention!r} is our w = {right:g}, "
                              f"got {got:g}: which w gives c, and which gives u?")
    passed("five weights mean the same thing in three conventions")


def diversity(fn: Callable[..., Any]) -> None:
    """fn(features, labels, real, real_labels) -> spread around the own class's mean, in units of the real one."""
    rng = seeded(5)
    real_labels, labels = torch.arange(2000) % 10, torch.arange(80) % 10
    centres, scale = 4 * torch.randn(10, 6, generator=rng), torch.tensor([0.2, 0.5, 1.0, 1.0, 1.5, 3.0])
    real = centres[real_labels] + scale * torch.randn(2000, 6, generator=rng)
    drawn = centres[labels] + 0.6 * scale * torch.randn(80, 6, generator=rng)
    ours, theirs = _within(drawn, labels), _within(real, real_labels)
    got = torch.as_tensor(call(fn, drawn, labels, real, real_labels), dtype=torch.float64)
    compare(got, (ours / theirs).sqrt(), {
        "the spread around the mean of *all* digits: that ten digits differ is no merit, so go class by class":
            (drawn.var(0).sum() / real.var(0).sum()).sqrt().double(),
        "this is a ratio of variances: take the root, so that half as wide is 0.5": ours / theirs,
        "upside down: samples on top, real digits below": (theirs / ours).sqrt(),
        "not yet compared with anything: divide by the spread of the real digits": ours.sqrt(),
        "not yet compared with anything, and still squared: divide by the real digits' and take the root": ours,
        "divided by n: few samples lie too close to their own mean, so divide by n - 1, as torch.var does":
            (_within(drawn, labels, 0) / _within(real, real_labels, 0)).sqrt(),
        "this compares how far the *classes* lie apart: the spread inside each class was wanted":
            (_means(drawn, labels).var(0).sum() / _means(real, real_labels).var(0).sum()).sqrt(),
        "deviations were added up: add variances over the features, and take one root at the end":
            _within(drawn, labels, root=True) / _within(real, real_labels, root=True),
    }, f"for these features {(ours / theirs).sqrt().item():.3f} was wanted, got {got.mean().item():.3f}", atol=1e-4)
    passed("class by class, real digits score 1, and samples that keep 0.6 of their deviations about 0.6")


def slerp(fn: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    """fn(x, y, a) -> the point at a on the great circle from x to y (b, c, h, w), image by image."""
    rng = seeded(6)
    x, z = torch.randn(2, 3, 2, 8, 8, generator=rng)  # two channels: one alone has no angles but 0 and 180 degrees
    y = torch.tensor([0.0, 0.6, -0.6]).view(-1, 1, 1, 1) * x + z
    for a in (0.3, 0.0, 1.0):
        got, right = call(fn, x, y, a), _arc(x, y, a, (1, 2, 3))
        if isinstance(got, Tensor) and got.shape == x.shape and got.isnan().any():
            raise CheckFailed("the answer holds NaN: the arc cosine wants a number in [-1, 1], so divide the product "
                              "of x and y by both lengths")
        compare(got, right, {
            "this is the straight line: it cuts through the ball, and half-way the noise is too short":
                (1 - a) * x + a * y,
            "the ends are swapped: a = 0 is x, a = 1 is y": _arc(x, y, 1 - a, (1, 2, 3)),
            "one angle for the whole batch: each image has its own": _arc(x, y, a, (0, 1, 2, 3)),
            "one angle for each pixel: an image is one long vector, so flatten it before you measure the angle":
                _arc(x, y, a, (1,)),
            "one angle for each row or column: an image is one long vector, so flatten it first":
                lambda got, a=a: any(torch.allclose(got, _arc(x, y, a, axis), atol=1e-4) for axis in ((2,), (3,))),
            "the sines must be divided by the sine of the whole angle":
                _arc(x, y, a, (1, 2, 3), divide=False),
            "square roots keep the length only of noises at right angles, and these are not":
                (1 - a) ** 0.5 * x + a**0.5 * y,
        }, f"at a = {a} this is not (sin((1 - a) angle) x + sin(a angle) y) / sin(angle)", atol=1e-4)
    passed("from x to y along the great circle, each image by its own angle, and never too short")


def _answer(seed: int) -> Prediction:
    x0, eps = torch.randn(2, 3, 1, 4, 4, generator=seeded(seed))
    return Prediction(x0, eps)


def _within(features: Tensor, labels: Tensor, correction: int = 1, root: bool = False) -> Tensor:
    """The variance inside a class, summed over the features and averaged over the classes, in float64."""
    var = torch.stack([features[labels == k].double().var(0, correction=correction) for k in labels.unique()])
    return (var.sqrt() if root else var).sum(1).mean()


def _means(features: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([features[labels == k].double().mean(0) for k in labels.unique()])


def _arc(x: Tensor, y: Tensor, a: float, axes: tuple[int, ...], divide: bool = True) -> Tensor:
    lengths = (x.square().sum(axes, keepdim=True) * y.square().sum(axes, keepdim=True)).sqrt()
    angle = ((x * y).sum(axes, keepdim=True) / lengths).clamp(-1, 1).acos()
    arc = ((1 - a) * angle).sin() * x + (a * angle).sin() * y
    return arc / angle.sin() if divide else arc
