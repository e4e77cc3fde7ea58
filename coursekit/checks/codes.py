"""Checks of notebook 10: rounding to a codebook, masks, what a site sees, nats, drawing codes, and a sign."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coursekit.checks.core import CheckFailed, call, compare, passed, seeded

Net = Callable[[Tensor], Tensor]


def nearest(fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    """fn(z_e (b, d, h, w), vectors (K, d)) -> codes (b, h, w) int64, the nearest vector of each site."""
    z, vectors = _randn(2, 4, 3, 5, seed=0), _randn(7, 4, seed=1) * torch.linspace(0.5, 2.5, 7)[:, None]
    apart = z.movedim(1, -1)[..., None, :] - vectors  # (b, h, w, K, d)
    far = apart.square().sum(-1)
    right = far.argmin(-1)
    got = call(fn, z, vectors)
    if isinstance(got, Tensor) and got.shape == (2, 4, 3, 5):
        raise CheckFailed("these are vectors: their numbers in the codebook were wanted, (b, h, w)")
    if isinstance(got, Tensor) and got.shape == right.shape and got.dtype != torch.int64:
        raise CheckFailed(f"codes are whole numbers that count vectors, int64, got {got.dtype}")
    torn = (z.reshape(-1, 4)[:, None] - vectors).square().sum(-1)  # what .view(-1, d) makes of (b, d, h, w)
    dots = far - vectors.square().sum(-1)
    compare(got, right, {
        "the farthest vector of each site: argmin of the distances, not argmax": far.argmax(-1),
        "the channels are torn apart: move them to the end before flattening, z_e.movedim(1, -1)":
            torn.argmin(1).view(2, 3, 5),
        "|e|^2 is missing: without it long vectors look near to everything": dots.argmin(-1),
        "the smallest angle, not the smallest distance: nothing is normalised here":
            F.cosine_similarity(z.movedim(1, -1)[..., None, :], vectors, dim=-1).argmax(-1),
        "absolute differences: the distance is a sum of squares": apart.abs().sum(-1).argmin(-1),
    }, "at some sites this is not the vector with the smallest squared distance",
        shape_hint=": one code for each site of each map")
    passed("each site has the number of the vector nearest to it")


def straight_through(fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    """fn(z_e, e) -> e in value, while gradients go to z_e as if it had been handed on, and none to e."""
    z, e, weight = (_randn(2, 4, 3, 3, seed=seed) for seed in (2, 3, 4))
    out, (to_z, to_e) = _gradients(lambda z, e: (call(fn, z, e), weight), z, e)
    compare(out.detach() if isinstance(out, Tensor) else out, e, {
        "this is z_e, not rounded: the *value* must be e": z,
        "half-way between z_e and e: in value all of it is e": (z + e) / 2,
    }, "in value the result must be e")
    if not to_z.any() and to_e.any():
        raise CheckFailed("all of the gradient goes to e and none to z_e: + z_e - z_e cancels in the gradient too, "
                          "unless the difference (e - z_e) is detached")
    if not to_z.any():
        raise CheckFailed("no gradient reaches z_e, so the encoder would never learn: keep one z_e outside detach()")
    if to_e.any():
        raise CheckFailed("the decoder's gradient also pulls at e: the whole difference belongs in (e - z_e).detach()")
    if not torch.allclose(to_z, weight, atol=1e-5):
        raise CheckFailed("the gradient at z_e must be the one that arrives at the result, unchanged")
    passed("in value the nearest vectors; to the gradient, z_e itself")


def codebook_loss(fn: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    """fn(z_e, e, beta) -> |sg(z_e) - e|^2 + beta |z_e - sg(e)|^2, means over all numbers."""
    z, e, beta = _randn(2, 4, 3, 3, seed=5), _randn(2, 4, 3, 3, seed=6), 0.25
    out, (to_z, to_e) = _gradients(lambda z, e: (call(fn, z, e, beta), torch.ones(())), z, e)
    mse = (z - e).square().mean()
    compare(out.detach() if isinstance(out, Tensor) else out, (1 + beta) * mse, {
        "a sum over all numbers: a mean was wanted, as in F.mse_loss": (1 + beta) * mse * z.numel(),
        "summed over the channels: the mean is over all numbers": (1 + beta) * mse * 4,
        "only one of the two terms": lambda got: any(torch.allclose(got, share * mse) for share in (1, beta)),
        "beta is missing: it multiplies the second term": 2 * mse,
        "roots: the terms are squares": (1 + beta) * mse.sqrt(),
    }, "the value should be (1 + beta) times the mean squared difference", shape_hint=": one number")
    of_z, of_e = (2 * pull * (z - e) / z.numel() for pull in (beta, -1))  # by the first and the second term
    if not to_z.any() and not to_e.any():
        raise CheckFailed("nothing learns from this: each term has *one* detach(), the other side stays alive")
    if torch.allclose(to_z, of_z / beta, atol=1e-6) and torch.allclose(to_e, of_e * beta, atol=1e-6):
        raise CheckFailed("swapped: beta belongs to the term that moves z_e (commitment), not to the one that moves e. "
                          "The value is the same; only the gradients differ")
    both = torch.allclose(to_z, of_z * (1 + beta) / beta, atol=1e-6)
    if both and torch.allclose(to_e, of_e * (1 + beta), atol=1e-6):
        raise CheckFailed("no stop-gradient: each term moves both sides, so beta decides nothing. detach() z_e in the "
                          "first term, e in the second")
    if not to_z.any() or not to_e.any():
        raise CheckFailed(f"{'z_e' if to_e.any() else 'e'} never moves: the first term detaches z_e, the second e")
    if not (torch.allclose(to_z, of_z, atol=1e-6) and torch.allclose(to_e, of_e, atol=1e-6)):
        raise CheckFailed("the value is right, a gradient is not: the first term detaches z_e, the second e")
    passed("the book is pulled with weight 1, the encoder with beta, and neither term moves both")


def causal_mask(fn: Callable[[int, bool], Tensor]) -> None:
    """fn(size, sees_itself) -> (size, size) floats: 1 where a kernel may look, in reading order."""
    for size in (3, 5):
        y, x = torch.meshgrid(*[torch.arange(size) - size // 2] * 2, indexing="ij")
        for itself in (False, True):
            right = ((y < 0) | ((y == 0) & (x < 0)) | ((y == 0) & (x == 0) & itself)).float()
            got = call(fn, size, itself)
            if isinstance(got, Tensor) and got.shape == right.shape and not got.is_floating_point():
                raise CheckFailed(f"a mask multiplies weights: end in .float(), got {got.dtype}")
            other = right.clone()
            other[size // 2, size // 2] = float(not itself)
            compare(got, right, {
                "off by one: with sees_itself = False the centre must be 0, or each code is told to itself" if not
                itself else "off by one: with sees_itself = True the centre is 1": other,
                "upside down: what was read before lies above and to the left": right.flip(0, 1),
                "columns first: text is read row by row": right.T,
                "only the rows above: in its own row it may look to the left": (y < 0).float(),
                "the corner above to the left only: of the rows above it may see all, also to the right":
                    ((y <= 0) & (x <= 0) & ((y < 0) | (x < 0) | itself)).float(),
            }, f"a mask of size {size} with sees_itself = {itself} looks at other places")
    passed("all rows above, in its own row what lies to the left, and the centre only where it may")


def seen_by(fn: Callable[[Net, Tensor, int, int], Tensor]) -> None:
    """fn(net, x (1, c, h, w), i, j) -> (h, w) bool: which sites of x have a gradient in net(x)[0, :, i, j]."""
    net, x = _Linear(), _randn(1, 3, 5, 6, seed=7)
    for i, j in ((2, 3), (4, 1)):
        zeros, near = torch.zeros(5, 6, dtype=torch.bool), {(i, j - 1), (i - 1, j), (i - 2, j), (i - 1, j - 1)}
        right, one, positive, cancelled = (_marked(zeros, near - {left_out}) for left_out in (
            None, (i - 2, j), (i - 1, j - 1), (i - 1, j)))
        one[i - 1, j - 1] = False
        try:
            got = call(fn, net, x, i, j)
        except RuntimeError as why:
            raise CheckFailed(f"torch refuses ({str(why).splitlines()[0]}): the copy of x must require a gradient, "
                              "x.clone().requires_grad_()") from None
        if isinstance(got, Tensor) and got.shape in ((1, 3, 5, 6), (3, 5, 6)):
            raise CheckFailed("one answer for each channel: a site is seen if any of its channels is")
        if isinstance(got, Tensor) and got.shape == right.shape and got.dtype != torch.bool:
            raise CheckFailed("yes or no was wanted, not how much: end in `> 0` on absolute values")
        everywhere = torch.ones_like(right)
        everywhere[4, 5] = False  # no site looks at the last one
        mirrored = _marked(zeros, {(j, i - 1), (j - 1, i), (j - 2, i), (j - 1, i - 1)}) if i < 4 else zeros
        compare(got, right, {
            "one site is missing: gradients of different channels cancel there, so take .abs() before summing them (or "
            "only the first output was asked: all of [0, :, i, j])": cancelled,
            "only the first channel was looked at: a site is seen if any of its channels is": one,
            "negative gradients are gradients too: .abs() first": positive,
            "all outputs were added up: only net(x)[0, :, i, j] is asked": everywhere,
            "rows and columns are swapped: [0, :, i, j] is row i, column j": mirrored,
            "an earlier call is still in x.grad: work on a fresh copy of x":
                lambda got, right=right: bool(got[right].all()) and int(got.sum()) > 4,
        }, "these are not the sites on which the answer at (i, j) depends", shape_hint=": one answer for each site")
    passed("the sites whose channels have a gradient in the answer at (i, j), and no others")


def nats_per_image(fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    """fn(logits (b, K, h, w), codes (b, h, w)) -> (b,): -log p of each image's codes, in nats."""
    logits, codes = 2 * _randn(3, 5, 2, 4, seed=8), torch.randint(5, (3, 2, 4), generator=seeded(9))
    log_p = logits.log_softmax(1).gather(1, codes[:, None])[:, 0]
    right = -log_p.sum((1, 2))
    got = call(fn, logits, codes)
    if isinstance(got, Tensor) and got.shape == codes.shape:
        raise CheckFailed("nats of each site: by the chain rule those of an image are their sum")
    compare(got, right, {
        "the mean over the sites: by the chain rule log-probabilities of sites add up": right / 8,
        "bits: divide by ln 2 later, not here": right / math.log(2),
        "a log-probability: nats are what it costs, so change the sign": -right,
        "these are logits, not yet log-probabilities: log_softmax over the K codes":
            -logits.gather(1, codes[:, None]).sum((1, 2, 3)),
        "the softmax runs over the wrong axis: the K codes are dimension 1": lambda got: any(torch.allclose(
            got, -logits.log_softmax(k).gather(1, codes[:, None]).sum((1, 2, 3)), atol=1e-4) for k in (0, 2, 3)),
        "the likeliest code's cost, not that of the code which is there": -logits.log_softmax(1).amax(1).sum((1, 2)),
    }, "for each image, the sum over its sites of -log p(its code) was wanted",
        shape_hint=": one number for each image; the caller averages")
    passed("minus the log-probability of every code that is there, summed over the image")


def draw_codes(fn: Callable[[Net, int, int, Callable[[Tensor], Tensor]], Tensor]) -> None:
    """fn(net, n, size, choose) -> codes (n, size, size), site by site, choose: logits (n, K) -> codes (n,)."""
    def choose(logits: Any) -> Tensor:
        if not isinstance(logits, Tensor) or logits.shape != (2, 11):
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise CheckFailed(f"choose takes the logits of one site, (n, K) = (2, 11), got {shape}: [:, :, i, j]")
        asked.append(logits)
        return (logits.argmax(1) + torch.tensor([0, 3])) % 11  # the second image always goes its own way
    asked: list[Tensor] = []
    codes = torch.zeros(2, 3, 3, dtype=torch.int64)
    for site in range(9):
        codes[:, site // 3, site % 3] = (_counting(codes)[:, :, site // 3, site % 3].argmax(1) + torch.tensor([0, 3]))
        codes %= 11

    def net(codes: Tensor) -> Tensor:
        if codes.dtype != torch.int64:
            raise CheckFailed(f"codes are int64: torch.zeros(..., dtype=torch.int64), got {codes.dtype}")
        return _counting(codes)
    got = call(fn, net, 2, 3, choose)
    if len(asked) != 9:
        raise CheckFailed(f"choose was asked {len(asked)} times for 9 sites: once for each, for the randomness "
                          "lives in it")
    once = (_counting(torch.zeros_like(codes)).argmax(1) + torch.tensor([0, 3])[:, None, None]) % 11
    if isinstance(got, Tensor) and got.is_floating_point():
        raise CheckFailed(f"codes are int64: torch.zeros(..., dtype=torch.int64), got {got.dtype}")
    compare(got, codes, {
        "every site was computed from an empty map: run the net again after each code, inside the loop": once,
        "nothing was written: codes[:, i, j] = choose(...)": torch.zeros_like(codes),
        "the loop goes down the columns: reading order is row by row": lambda got: torch.equal(
            got, _down_the_columns()),
        "only the last code was kept: fill one map, do not begin it anew in the loop":
            lambda got: int((got != 0).flatten(1).sum(1).max()) <= 1,
    }, "these codes do not follow from the ones before them: choose at (i, j) from the logits at (i, j)",
        shape_hint=": n maps of size x size")
    passed("each code is chosen from logits that have seen all codes before it")


def code_logits(fn: Callable[[Tensor, float], Tensor]) -> None:
    """fn(distances (sites, K), tau) -> logits of softmax(-d^2 / tau), the distances being squared already."""
    far, tau = 3 * torch.rand(6, 5, generator=seeded(10)) + 0.1, 0.7

    def law(logits: Tensor) -> Tensor:
        return logits.log_softmax(1)  # a constant for each site changes nothing
    got = call(fn, far, tau)
    if isinstance(got, Tensor) and got.shape == far.shape and not bool(got.isnan().any()):
        got = law(got)
    compare(got, law(-far / tau), {
        "the sign trap: a *large* distance would be likely, and the farthest code is drawn: put the minus":
            law(far / tau),
        "tau multiplies: the larger it is, the sharper. It should divide": law(-far * tau),
        "tau was not used": law(-far),
        "the distances are squared already": law(-far.square() / tau),
        "a root too many: -d^2 / tau, and these are the d^2": law(-far.sqrt() / tau),
        "these are probabilities, and would go through a softmax again: leave it to whoever draws":
            law((-far / tau).softmax(1)),
    }, "the logits of softmax(-d^2 / tau) are -d^2 / tau")
    passed("near codes are likely, and tau says how much less likely the others are")


class _Linear(nn.Module):
    """Looks with channel 0 to the left, with 1 two above, with minus 2 above to the left, with 0 minus 1 above."""

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        x = F.pad(x, (1, 0, 2, 0))
        left, two, corner, above = x[:, 0, 2:, :w], x[:, 1, :h, 1:], x[:, 2, 1:-1, :w], x[:, :2, 1:-1, 1:]
        return torch.stack([left + two - corner, above[:, 0] - above[:, 1]], 1)


def _marked(zeros: Tensor, sites: set[tuple[int, int]]) -> Tensor:
    out = zeros.clone()
    for i, j in sites:
        out[i, j] = True
    return out


def _counting(codes: Tensor) -> Tensor:
    """Logits (n, 11, h, w) whose largest is 1 + the number of the site + what was read before it, weighted."""
    flat = codes.flatten(1)
    site = torch.arange(flat.shape[1])
    weighted = flat * (1 + site % 5)
    target = (1 + site + weighted.cumsum(1) - weighted) % 11
    return F.one_hot(target, 11).movedim(-1, 1).float().view(len(codes), 11, *codes.shape[1:])


def _down_the_columns() -> Tensor:
    codes = torch.zeros(2, 3, 3, dtype=torch.int64)
    for site in range(9):
        j, i = divmod(site, 3)
        codes[:, i, j] = (_counting(codes)[:, :, i, j].argmax(1) + torch.tensor([0, 3])) % 11
    return codes


def _gradients(fn: Callable[..., Any], *tensors: Tensor) -> tuple[Any, list[Tensor]]:
    """What fn says, and its gradients at the tensors; zero where none arrives."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    out, weight = fn(*leaves)
    if not isinstance(out, Tensor) or not out.requires_grad or out.shape != weight.shape:
        return out, [torch.zeros_like(t) for t in tensors]
    found = torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True)
    return out, [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]


def _randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))
