"""The checks of notebook 07 pass what is right and name what is wrong: edits, masks, seams, anagrams, hybrids."""

import pytest
import torch
from support import generator, suite_of
from torchvision.transforms.functional import gaussian_blur

from coursekit import checks, denoisers
from coursekit.checks import CheckFailed
from coursekit.denoisers import Prediction
from coursekit.diffusion import add_noise, noise_like
from coursekit.samplers import ddim, ddpm, last, start_from


def edit(at=lambda times, i: times[i], walk=lambda times, i: times[i:], noised=start_from,
         end=lambda steps: last(steps).x, seeded=True):
    """SDEdit with one thing changed."""
    def fn(denoise, x0, times, i_start, schedule, rng):
        rng = rng if seeded else None
        x = noised(x0, at(times, i_start), schedule, rng)
        return end(ddpm(denoise, x, schedule, walk(times, i_start), rng))
    return fn


def on_top(x0, t, schedule, rng):
    return x0 + (1 - schedule.alpha_bar[t].item()) ** 0.5 * noise_like(x0, rng)


def half_noised(x0, t, schedule, rng):
    return schedule.alpha_bar[t].item() ** 0.5 * x0 + 0.5 * noise_like(x0, rng)


def one_noise(x0, t, schedule, rng):
    return add_noise(x0, t, noise_like(x0[:1], rng).expand(x0.shape), schedule)


def patched(keep=None, everywhere=None):
    """The mixture of painted and known with another known part, or another mixture."""
    def fn(x_s, known, mask, t, s, eps, schedule):
        a, b = (v.item() for v in (schedule.alpha_bar[s].sqrt(), (1 - schedule.alpha_bar[s]).sqrt()))
        part = a * known + b * eps if keep is None else keep(known, eps, a, b, t, schedule)
        return torch.where(mask == 1, x_s, part) if everywhere is None else everywhere(x_s, part, mask, a, b, eps)
    return fn


def in_place(x_s, known, mask, t, s, eps, schedule):
    x_s[..., mask == 0] = 0
    return x_s


def back(signal, noise, keep=lambda schedule, s, t: schedule.alpha_bar[t] / schedule.alpha_bar[s]):
    def fn(x_s, s, t, eps, schedule):
        k = keep(schedule, s, t).item()
        return signal(k) * x_s + noise(k) * eps
    return fn


def root(k):
    return k**0.5


def lost(k):
    return (1 - k) ** 0.5


def seam(axes=(-1, -2), how=torch.abs, reduce=lambda d: d.flatten(1).mean(1), everywhere=False):
    def fn(x, mask):
        parts = []
        for axis in axes:
            d = how(x.diff(dim=axis))
            parts.append((d if everywhere else d[..., mask.diff(dim=axis) != 0]).flatten(2))
        return reduce(torch.cat(parts, dim=2))
    return fn


def round_the_edge(x, mask):
    parts = [(x - x.roll(1, axis)).abs()[..., mask != mask.roll(1, axis)].flatten(1) for axis in (-1, -2)]
    return torch.cat(parts, 1).mean(1)


def combined(show=lambda view, inverse: view, bring=lambda view, inverse: inverse,
             pick=lambda seen: sum(seen) / len(seen), parts=(0, 1)):
    """An anagram that shows something else, brings the answer back otherwise, or counts otherwise."""
    def fn(readers, views):
        def denoise(x_t, t):
            answers = []
            for read, (view, inverse) in zip(readers, views, strict=True):
                said = read(show(view, inverse)(x_t), t)
                answers.append([bring(view, inverse)(part) for part in said])
            return Prediction(*(pick([answer[k] for answer in answers]) for k in parts))
        return denoise
    return fn


def same(x):
    return x


def first_twice(readers, views):
    return denoisers.anagram([readers[0]] * len(readers), views)


def permuted(forth=same, undo=torch.argsort):
    def fn(order):
        def by(index):
            return lambda x: x.flatten(2)[..., index].view_as(x)
        return by(forth(order)), by(undo(order))
    return fn


def split(mix, other=None):
    """low and high put together by mix(u, v, blur of u, blur of v); `other` says what becomes of eps."""
    def fn(low, high, kernel_size, sigma):
        def blur(x):
            return gaussian_blur(x, [kernel_size] * 2, [sigma] * 2)

        def denoise(x_t, t):
            pairs = list(zip(low(x_t, t), high(x_t, t), strict=True))
            hows = (mix, other or mix)
            return Prediction(*(how(u, v, blur(u), blur(v)) for how, (u, v) in zip(hows, pairs, strict=True)))
        return denoise
    return fn


def whole(u, v, bu, bv):
    return bu + v - bv


def mismatched(size, sigma=2.0):
    return split(lambda u, v, bu, bv: bu + v - gaussian_blur(v, [size] * 2, [sigma] * 2))


def fixed_kernel(low, high, kernel_size, sigma):
    return denoisers.hybrid(low, high, 33, 2.0)


def empty(*args):
    raise NotImplementedError


RIGHT = {
    "edit": [edit(), lambda denoise, x0, times, i, schedule, rng: last(
        ddim(denoise, start_from(x0, times[i], schedule, rng), schedule, times[i:])).x],
    "keep_known": patched(),
    "jump_back": back(root, lost),
    "seam": seam(),
    "anagram": [denoisers.anagram, combined()],
    "shuffled": permuted(),
    "hybrid": [denoisers.hybrid, split(whole)],
}

PLANTED = [
    ("edit", lambda denoise, x0, times, i, s, rng: edit()(denoise, x0, times, i, s, generator(7)), "another seed"),
    ("edit", edit(walk=lambda times, i: times), "from the top nothing"),
    ("edit", edit(walk=lambda times, i: times[i + 1:]), "one too late"),
    ("edit", edit(walk=lambda times, i: times[i - 1:]), "places in the list"),
    ("edit", edit(walk=lambda times, i: [times[i], times[-2], 0]), r"times\[i_start:\] was wanted"),
    ("edit", edit(at=lambda times, i: i), "has no noise, or too little"),
    ("edit", edit(noised=lambda x0, t, schedule, rng: x0), "has no noise, or too little"),
    ("edit", edit(at=lambda times, i: times[0]), "nothing of the picture"),
    ("edit", edit(noised=lambda x0, t, schedule, rng: noise_like(x0, rng)), "nothing of the picture"),
    ("edit", edit(noised=on_top), "on top of a whole picture"),
    ("edit", edit(noised=half_noised), "noised to another time"),
    ("edit", edit(at=lambda times, i: times[i - 1]), "noised to another time"),
    ("edit", edit(noised=one_noise), "the same noise"),
    ("edit", edit(end=lambda steps: steps), "`.x` of that Step"),
    ("edit", edit(end=last), "got Step"),
    ("edit", edit(end=lambda steps: next(steps).x), r"was asked at \[600\]"),
    ("edit", edit(seeded=False), "the same seed"),
    ("edit", lambda denoise, x0, *rest: x0, "never asked"),
    ("edit", edit(end=lambda steps: 0 * last(steps).x), "what the denoiser said last"),
    ("keep_known", patched(everywhere=lambda x, k, m, a, b, e: torch.where(m == 1, k, x)), "mask is inverted"),
    ("keep_known", patched(lambda known, eps, a, b, t, S: add_noise(known, t, eps, S)), "noised to t = 700"),
    ("keep_known", patched(lambda known, eps, a, b, t, S: known), "pasted clean"),
    ("keep_known", patched(lambda known, eps, a, b, t, S: known + b * eps), "without losing signal"),
    ("keep_known", patched(lambda known, eps, a, b, t, S: a * known), "its variance was dropped"),
    ("keep_known", patched(lambda k, e, a, b, t, S: k, lambda x, k, m, a, b, e: a * torch.where(m == 1, x, k) + b * e),
     "painted region was noised too"),
    ("keep_known", patched(everywhere=lambda x, k, m, a, b, e: x), "x_s as it came"),
    ("keep_known", patched(everywhere=lambda x, k, m, a, b, e: k), "the photograph is everywhere"),
    ("keep_known", patched(everywhere=lambda x, k, m, a, b, e: x + (1 - m) * k), "both were added up"),
    ("keep_known", patched(lambda known, eps, a, b, t, S: eps), "for a jump from 700 to 500"),
    ("keep_known", in_place, "in place"),
    ("jump_back", back(root, lambda k: 0), "the variance was dropped"),
    ("jump_back", back(lambda k: 1, lost), "was not dimmed"),
    ("jump_back", back(lambda k: k, lambda k: 1 - k), "the roots are missing"),
    ("jump_back", back(root, lambda k: 1 - k), "in front of eps is missing"),
    ("jump_back", back(lost, root), "swapped"),
    ("jump_back", back(root, lost, lambda S, s, t: S.alpha[t]), "has no bar"),
    ("jump_back", back(root, lost, lambda S, s, t: S.alpha_bar[t]), "as if it were clean"),
    ("jump_back", back(root, lost, lambda S, s, t: S.alpha_bar[s]), "go back to t, not to s"),
    ("jump_back", back(lambda k: k**-0.5, lost), "from 400 to 500: sqrt"),
    ("seam", seam(everywhere=True), "these are all neighbours"),
    ("seam", seam(axes=(-1,)), "only neighbours in a row"),
    ("seam", seam(axes=(-2,)), "only neighbours in a column"),
    ("seam", seam(how=same), "take the absolute value"),
    ("seam", seam(how=torch.square), "these are squares"),
    ("seam", seam(reduce=lambda d: d.flatten(1).sum(1)), "divide by the number of pairs"),
    ("seam", seam(reduce=lambda d: d.sum(1).mean(1)), "sum over the channels"),
    ("seam", seam(reduce=lambda d: d.mean()), "one number for each image"),
    ("seam", round_the_edge, "goes round"),
    ("seam", seam(how=lambda d: d.abs() / 2), "one number an image"),
    ("anagram", combined(bring=lambda view, inverse: same), "not turned back"),
    ("anagram", combined(show=lambda view, inverse: lambda x: inverse(view(x)), bring=lambda view, inverse: same),
     "undone too early"),
    ("anagram", combined(show=lambda view, inverse: same), "its answer was turned: show it"),
    ("anagram", combined(show=lambda view, inverse: inverse, bring=lambda view, inverse: view), "swapped"),
    ("anagram", combined(bring=lambda view, inverse: view), "once more in the same direction"),
    ("anagram", combined(pick=sum), "divide by their number"),
    ("anagram", combined(pick=lambda seen: sum(seen) / 2), "still divided by two"),
    ("anagram", combined(pick=lambda seen: seen[0]), "only the first reader"),
    ("anagram", combined(pick=lambda seen: seen[-1]), "only the second reader"),
    ("anagram", first_twice, "asked twice"),
    ("anagram", combined(pick=lambda seen: torch.stack(seen).amax(0)), "mean of both readers' answers"),
    ("anagram", combined(parts=(1, 0)), "x0 should be the mean"),
    ("anagram", lambda readers, views: 0, "returns a denoiser"),
    ("anagram", lambda readers, views: lambda x_t, t: readers[0](x_t, t).eps, "bring both back"),
    ("shuffled", permuted(torch.argsort, same), "this is the inverse"),
    ("shuffled", permuted(lambda order: order.roll(1)), "in the given order"),
    ("shuffled", lambda order: (same, same), "order was not used"),
    ("shuffled", permuted(lambda order: order.flip(0)), "in the given order"),
    ("shuffled", permuted(undo=same), "shuffles a second time"),
    ("shuffled", permuted(undo=lambda order: order.flip(0)), "read backwards"),
    ("shuffled", permuted(undo=lambda order: torch.arange(len(order))), "stays shuffled"),
    ("shuffled", permuted(undo=lambda order: order.argsort().roll(1)), r"inverse\(view\(x\)\) should be x"),
    ("shuffled", lambda order: order, "pair of functions"),
    ("hybrid", split(lambda u, v, bu, bv: bv + u - bu), "the two are swapped"),
    ("hybrid", split(lambda u, v, bu, bv: bu + v), "its own low frequencies"),
    ("hybrid", split(lambda u, v, bu, bv: bu + bv), "both were blurred"),
    ("hybrid", split(lambda u, v, bu, bv: bu), "high frequencies are missing"),
    ("hybrid", split(lambda u, v, bu, bv: v - bv), "low frequencies are missing"),
    ("hybrid", split(lambda u, v, bu, bv: v - bu), "v's own blur"),
    ("hybrid", split(lambda u, v, bu, bv: (bu + v - bv) / 2), "half of each"),
    ("hybrid", mismatched(11), "does not complement"),
    ("hybrid", mismatched(33, 1.0), "does not complement"),
    ("hybrid", split(lambda u, v, bu, bv: (u + v) / 2), "the mean of both"),
    ("hybrid", split(whole, lambda u, v, bu, bv: u), "eps was not split: this is `low`"),
    ("hybrid", split(lambda u, v, bu, bv: v, whole), "x0 is `high` as it came"),
    ("hybrid", split(lambda u, v, bu, bv: bu + v - bu, whole), "taken off where v's belongs"),
    ("hybrid", fixed_kernel, "not used"),
    ("hybrid", split(lambda u, v, bu, bv: u + v), r"should be blur\(low\)"),
    ("hybrid", lambda low, high, kernel_size, sigma: 0, "returns a denoiser"),
    ("hybrid", lambda low, high, kernel_size, sigma: lambda x_t, t: low(x_t, t).x0, "x0 and eps: split both"),
    ("hybrid", empty, "still empty"),
]


test_right_answers_pass, test_planted_mistakes_are_named, test_no_check_is_forgotten = suite_of(
    RIGHT, PLANTED, "editing")


def test_the_first_i_start_alone_does_not_pass():
    """A function that ignores i_start and always starts at the third time is caught by the second start."""
    with pytest.raises(CheckFailed, match=r"times\[4\] = 200, and began at 600"):
        checks.edit(edit(lambda times, i: times[2], lambda times, i: times[2:]))
