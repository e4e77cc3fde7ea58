"""Every self-check of notebook 05 passes the right answer and names each mistake it claims to catch."""

import re

import pytest
import torch
import torch.nn.functional as F
from support import suite_of

from coursekit import checks, denoisers
from coursekit.checks import CheckFailed
from coursekit.denoisers import Prediction


def one_hot(label, classes):
    return F.one_hot(label + 1, classes + 1)[:, 1:].float()


def none_as(value):
    """A one-hot whose rows without label are something else than zeros."""
    def wrong(label, classes):
        return torch.where((label == -1)[:, None], value(classes), one_hot(label, classes))
    return wrong


def dropping(to=-1, coins=lambda label, rng: torch.rand(label.shape, generator=rng), keep=lambda coin, p: coin >= p):
    """drop_labels with one thing changed."""
    def drop(label, p, rng):
        return torch.where(keep(coins(label, rng), p), label, torch.full_like(label, to))
    return drop


def drop_in_place(label, p, rng):
    label[torch.rand(label.shape, generator=rng) < p] = -1
    return label


def combining(x0, eps=None):
    """guided with other formulas of (c, u, w)."""
    def guided(conditional, unconditional, w):
        def denoise(x_t, t):
            (c0, c1), (u0, u1) = conditional(x_t, t), unconditional(x_t, t)
            return Prediction(x0(c0, u0, w), (eps or x0)(c1, u1, w))
        return denoise
    return guided


def right(c, u, w):
    return u + w * (c - u)


def weights(ho_salimans=lambda w: 1 + w, cs180=lambda w: w, diffusers=lambda w: w if w > 1 else 1.0):
    return lambda weight, convention: {"ho-salimans": ho_salimans, "cs180": cs180,
                                       "diffusers": diffusers}[convention](weight)


def spread(features, labels, correction=1):
    return torch.stack([features[labels == k].var(0, correction=correction).sum() for k in labels.unique()]).mean()


def between_classes(features, labels):
    return torch.stack([features[labels == k].mean(0) for k in labels.unique()]).var(0).sum()


def deviations(features, labels):
    return torch.stack([features[labels == k].std(0).sum() for k in labels.unique()]).mean()


def arc(x, y, a, axes=(1, 2, 3), lengths=True, divide=True):
    dot = (x * y).sum(axes, keepdim=True)
    if lengths:
        dot = dot / (x.square().sum(axes, keepdim=True) * y.square().sum(axes, keepdim=True)).sqrt()
    angle = dot.acos()
    out = ((1 - a) * angle).sin() * x + (a * angle).sin() * y
    return out / angle.sin() if divide else out


def exactly_a_share(label, p, rng):
    """Always as many labels, without a coin."""
    gone = torch.randperm(len(label), generator=rng)[:int(p * len(label))]
    return label.index_fill(0, gone, -1)


def guided_in_place(c, u, w):
    def denoise(x_t, t):
        answer = u(x_t, t)
        for part, other in zip(answer, c(x_t, t), strict=True):
            part.add_(w * (other - part))
        return answer
    return denoise


def empty(*args):
    raise NotImplementedError


RIGHT = {
    "one_hot": one_hot,
    "drop_labels": denoisers.drop_labels,
    "guided": denoisers.guided,
    "our_weight": weights(),
    "diversity": lambda f, y, rf, ry: (spread(f, y) / spread(rf, ry)).sqrt().item(),
    "slerp": arc,
}

PLANTED = [
    ("one_hot", lambda label, classes: F.one_hot(label, classes).float(), "ends in an error"),
    ("one_hot", lambda label, classes: F.one_hot(label + 1, classes + 1).float(), "11 columns for 10 classes"),
    ("one_hot", lambda label, classes: one_hot(label, classes).T, r"\(6, 10\), a row for each label, got \(10, 6\)"),
    ("one_hot", lambda label, classes: one_hot(label, 10), r"\(3, 4\), a row for each label, got \(3, 10\)"),
    ("one_hot", lambda label, classes: label.tolist(), "got list"),
    ("one_hot", lambda label, classes: one_hot(label, classes).long(), "end in .float()"),
    ("one_hot", lambda label, classes: torch.eye(classes)[label], "became the last class"),
    ("one_hot", lambda label, classes: one_hot(label.clamp(min=0), classes), "became the class 0"),
    ("one_hot", none_as(lambda classes: 1 / classes), "a little of every class"),
    ("one_hot", none_as(lambda classes: -1.0), "a row of -1"),
    ("one_hot", lambda label, classes: one_hot(torch.where(label == -1, -1, (label + 1) % classes), classes),
     "off by one"),
    ("one_hot", lambda label, classes: 2 * one_hot(label, classes), "one 1 a row"),
    ("drop_labels", dropping(to=0), "0 is a digit"),
    ("drop_labels", exactly_a_share, "exactly 32 of 64"),
    ("guided", guided_in_place, "in place"),
    ("guided", lambda c, u, w: lambda x_t, t: (p for p in c(x_t, t)), "guide both"),
    ("drop_labels", dropping(to=10), "became 10"),
    ("drop_labels", lambda label, p, rng: label.float(), "whole number for each label"),
    ("drop_labels", lambda label, p, rng: label.tolist(), "got list"),
    ("drop_labels", lambda label, p, rng: label.clone(), "no label was dropped"),
    ("drop_labels", dropping(coins=lambda label, rng: torch.rand(1, generator=rng)), "one coin for each image"),
    ("drop_labels", dropping(coins=lambda label, rng: torch.rand(label.shape)), "hand rng on"),
    ("drop_labels", dropping(coins=lambda label, rng: torch.linspace(0, 1, len(label))), "left to chance"),
    ("drop_labels", dropping(keep=lambda coin, p: coin < p), "not to keep"),
    ("drop_labels", dropping(keep=lambda coin, p: coin >= 0.15), "with p = 0.1 a share of 0.1"),
    ("drop_labels", dropping(coins=lambda label, rng: torch.randn(label.shape, generator=rng)), "uniform number"),
    ("drop_labels", drop_in_place, "in place"),
    ("drop_labels", empty, "still empty"),
    ("guided", combining(lambda c, u, w: c + w * (u - c)), "c and u are swapped"),
    ("guided", combining(lambda c, u, w: (1 + w) * c - w * u), "Ho & Salimans' zero"),
    ("guided", combining(lambda c, u, w: u - w * (c - u)), "away from the label"),
    ("guided", combining(lambda c, u, w: w * (c - u)), "only the difference"),
    ("guided", combining(lambda c, u, w: w * (c + u)), "w multiplies both"),
    ("guided", combining(lambda c, u, w: w * c), "w multiplies the whole"),
    ("guided", combining(lambda c, u, w: u + w * c), "without taking u off"),
    ("guided", combining(lambda c, u, w: (w * c + u) / (1 + w)), "go beyond c"),
    ("guided", combining(lambda c, u, w: (c + u) / 2), "mean of both"),
    ("guided", combining(right, lambda c, u, w: c), "eps was not guided: this is the conditional"),
    ("guided", combining(lambda c, u, w: u, right), "x0 was not guided: this is the unconditional"),
    ("guided", combining(lambda c, u, w: u + w**2 * (c - u)), r"should be u \+ w \(c - u\)"),
    ("guided", lambda conditional, unconditional, w: w, "returns a denoiser"),
    ("guided", lambda c, u, w: lambda x_t, t: right(c(x_t, t).x0, u(x_t, t).x0, w), "guide both of them"),
    ("our_weight", weights(ho_salimans=lambda w: w), "their zero was not moved"),
    ("our_weight", weights(ho_salimans=lambda w: w - 1), "moved the wrong way"),
    ("our_weight", weights(ho_salimans=lambda w: 2 * w + 3), "which w gives c"),
    ("our_weight", weights(cs180=lambda w: 1 + w), "already counts from u"),
    ("our_weight", weights(diffusers=lambda w: w), "switches guidance off"),
    ("diversity", lambda f, y, rf, ry: (f.var(0).sum() / rf.var(0).sum()).sqrt(), "class by class"),
    ("diversity", lambda f, y, rf, ry: spread(f, y) / spread(rf, ry), "take the root"),
    ("diversity", lambda f, y, rf, ry: (spread(rf, ry) / spread(f, y)).sqrt(), "upside down"),
    ("diversity", lambda f, y, rf, ry: spread(f, y).sqrt(), "compared with anything: divide"),
    ("diversity", lambda f, y, rf, ry: spread(f, y), "still squared"),
    ("diversity", lambda f, y, rf, ry: (spread(f, y, 0) / spread(rf, ry, 0)).sqrt(), "divided by n"),
    ("diversity", lambda f, y, rf, ry: (between_classes(f, y) / between_classes(rf, ry)).sqrt(), "inside each class"),
    ("diversity", lambda f, y, rf, ry: deviations(f, y) / deviations(rf, ry), "deviations were added up"),
    ("diversity", lambda f, y, rf, ry: 1.0, "was wanted, got 1.000"),
    ("slerp", lambda x, y, a: (1 - a) * x + a * y, "straight line"),
    ("slerp", lambda x, y, a: arc(y, x, a), "ends are swapped"),
    ("slerp", lambda x, y, a: arc(x, y, a, (0, 1, 2, 3)), "whole batch"),
    ("slerp", lambda x, y, a: arc(x, y, a, (1,)), "each pixel"),
    ("slerp", lambda x, y, a: arc(x, y, a, (3,)), "row or column"),
    ("slerp", lambda x, y, a: arc(x, y, a, divide=False), "sine of the whole angle"),
    ("slerp", lambda x, y, a: (1 - a) ** 0.5 * x + a**0.5 * y, "right angles"),
    ("slerp", lambda x, y, a: arc(x, y, a, lengths=False), "divide the product"),
    ("slerp", lambda x, y, a: arc(x, y, a) * 1.1, "at a = 0.3 this is not"),
]


test_right_answers_pass, test_planted_mistakes_are_named, test_no_check_is_forgotten = suite_of(
    RIGHT, PLANTED, "guidance")


def test_a_great_circle_of_unit_noises_keeps_their_length_and_the_straight_line_does_not():
    x, y = torch.randn(2, 4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    x, y = (z / z.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for z in (x, y))
    assert torch.allclose(arc(x, y, 0.5).flatten(1).norm(dim=1), torch.ones(4), atol=1e-5)
    assert bool((((x + y) / 2).flatten(1).norm(dim=1) < 0.8).all())


def test_the_sentences_speak_of_what_was_got():
    with pytest.raises(CheckFailed) as caught:
        checks.our_weight(weights(diffusers=lambda w: w))
    assert re.search(r"guidance_scale = 0 ", str(caught.value))
