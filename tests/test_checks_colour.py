"""Every self-check of notebook 06 passes the right answer and names each mistake it claims to catch."""

import copy
import math

import pytest
import torch
from support import suite_of

from coursekit import metrics
from coursekit.checks.bits import _code_length, _overshooting
from coursekit.checks.colour import _mmd, _two_networks
from coursekit.diffusion import add_noise, rate_distortion
from coursekit.schedules import cosine_schedule, linear_schedule
from coursekit.training import EMA


def sides(size, patch, attention):
    return [size // (patch * 2**level) for level in attention]


def mirror(turn=lambda x: x.flip(-1), choose=lambda coin: coin):
    """mirrored with one thing changed."""
    return lambda x, coin: torch.where(choose(coin).view(-1, 1, 1, 1), turn(x), x)


def ema(keep=lambda decay: decay, buffers=lambda mine, theirs: mine.copy_(theirs)):
    """ema_update with one thing changed."""
    @torch.no_grad()
    def ema_update(average, model, decay):
        for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
            mine.lerp_(theirs, 1 - keep(decay))
        for mine, theirs in zip(average.buffers(), model.buffers(), strict=True):
            buffers(mine, theirs)
        return average
    return ema_update


def averaged_buffer(mine, theirs):
    mine.copy_(0.9 * mine + 0.1 * theirs)


def ema_of_the_state(average, model, decay):
    with torch.no_grad():
        for mine, theirs in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
            mine.mul_(decay).add_((1 - decay) * theirs)
    return average


def ema_with_a_graph(average, model, decay):
    for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
        mine.lerp_(theirs, 1 - decay)
    return ema(keep=lambda decay: 1.0)(average, model, decay)


def the_model_follows(average, model, decay):
    ema()(model, average, decay)
    return average


def shared(average, model, decay):
    with torch.no_grad():
        for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
            mine.data = theirs.data
    return average


def shared_buffers(mine, theirs):
    mine.data = theirs.data


def a_new_one(average, model, decay):
    return ema()(copy.deepcopy(average), model, decay)


def halfway(average, model, decay):
    return ema(keep=lambda decay: 0.5)(average, model, decay)


def distorting(what=lambda guess, x_t: guess.clamp(-1, 1), to=lambda x0: x0, end=None, scale=127.5,
               seen=lambda x_t, x0: x_t, eps_of=lambda eps: eps):
    """distortion_at with one thing changed."""
    def distortion_at(denoise, x0, t, eps, schedule):
        x_t = add_noise(x0, t, eps_of(eps), schedule)
        guess = denoise(seen(x_t, x0), torch.full((len(x0),), t)).x0
        miss = what(guess, x_t) - to(x0)
        return end(miss) if end else scale * miss.square().flatten(1).mean(1).sqrt().mean()
    return distortion_at


def own_noise(denoise, x0, t, eps, schedule):
    return distorting()(denoise, x0, t, torch.randn(x0.shape, generator=torch.Generator().manual_seed(8)), schedule)


def jump(end=lambda nats: nats.flatten(1).mean(1) / math.log(2), half=0.5, one=1.0, sign=1.0, means=1.0, spread=1.0,
         over="p"):
    """jump_bits with one thing changed."""
    def jump_bits(mean_q, mean_p, var_q, var_p):
        ratio = var_q / var_p
        far = means * (mean_q - mean_p).square() / (var_p if over == "p" else var_q)
        return end(half * (far + spread * (ratio - one - sign * math.log(ratio))))
    return jump_bits


def exchanged(mean_q, mean_p, var_q, var_p):
    return jump()(mean_p, mean_q, var_p, var_q)


def squared(mean_q, mean_p, var_q, var_p):
    return jump()(mean_q, mean_p, var_q**2, var_p**2)


def decoding(half=1 / 255, ends=True, of_std=lambda std: std, end=lambda bits, x: bits):
    """decoder_bits with one thing changed."""
    return lambda x0, mean, std: end(_code_length(x0, mean, of_std(std), half, ends), x0)


def by_density(width):
    return lambda x0, mean, std: (-torch.distributions.Normal(mean, std).log_prob(x0) - math.log(width)
                                  ).flatten(1).mean(1) / math.log(2)


def unclamped(x0, mean, std):
    normal, half = torch.distributions.Normal(mean, std), 1 / 255
    upper = torch.where(x0 > 1 - half, 1.0, normal.cdf(x0 + half))
    lower = torch.where(x0 < -1 + half, 0.0, normal.cdf(x0 - half))
    return -(upper - lower).log2().flatten(1).mean(1)


def curve(rate=lambda prior, kl: prior + kl.cumsum(0) - kl, bound=lambda prior, kl: prior + kl.sum()):
    """rate_curve with one thing changed."""
    return lambda prior, kl: (rate(prior, kl), bound(prior, kl))


def ending(of=lambda ab: ab.sqrt(), back=lambda x: x**2, stretch=lambda x: x[1] / (x[1] - x[-1]), keep=1):
    """zero_snr with one thing changed."""
    def zero_snr(ab):
        x = of(ab)
        return torch.cat([ab[:keep], back((x[keep:] - x[-1]) * stretch(x))])
    return zero_snr


def cliff(ab):
    return torch.cat([ab[:-1], 0 * ab[:1]])


def nearly(ab):
    return ending()(ab).clamp(min=1e-9)


def mmd(**changed):
    return lambda fx, fy: _mmd(fx, fy, **changed)


RIGHT = {
    "attends_at": [sides, lambda size, patch, attention: tuple(size / patch / 2**level for level in attention)],
    "mirrored": [mirror(), lambda x, coin: torch.stack([a.flip(-1) if c else a for a, c in zip(x, coin, strict=True)])],
    "ema_update": ema(),
    "distortion_at": distorting(),
    "jump_bits": jump(),
    "decoder_bits": decoding(),
    "rate_curve": curve(),
    "zero_snr": ending(),
    "kernel_distance": [mmd(), metrics.kernel_distance],
}

PLANTED = [
    ("attends_at", lambda size, patch, attention: [size // 2**level for level in attention], "stem is forgotten"),
    ("attends_at", lambda size, patch, attention: sides(size, 2 * patch, attention), "level 0 is not halved"),
    ("attends_at", lambda *a: [side**2 for side in sides(*a)], "how many places"),
    ("attends_at", lambda size, patch, attention: [size / (patch * max(1, 2 * level)) for level in attention],
     "halves again"),
    ("attends_at", lambda size, patch, attention: sides(size, patch, range(max(attention) + 1)), "all levels"),
    ("attends_at", lambda size, patch, attention: [size for level in attention], "the sides are"),
    ("attends_at", lambda size, patch, attention: size // patch, "a list"),
    ("mirrored", mirror(lambda x: x.flip(-2)), "upside down"),
    ("mirrored", mirror(lambda x: x.flip(-1, -2)), "by half"),
    ("mirrored", mirror(lambda x: x.flip(1)), "red and blue"),
    ("mirrored", lambda x, coin: x.flip(0), "changed places"),
    ("mirrored", lambda x, coin: x.flip(-1), "a coin of its own"),
    ("mirrored", lambda x, coin: x.flip(-1).flip(-1), "none was mirrored"),
    ("mirrored", mirror(choose=lambda coin: ~coin), "wrong way round"),
    ("mirrored", mirror(lambda x: (x + x.flip(-1)) / 2), "averaged"),
    ("mirrored", mirror(lambda x: 0 * x), "exactly the images"),
    ("ema_update", ema_of_the_state, "refused"),
    ("ema_update", ema(buffers=averaged_buffer), "buffers were averaged"),
    ("ema_update", ema(buffers=lambda mine, theirs: None), "stayed behind"),
    ("ema_update", ema(keep=lambda decay: 1 - decay), "roles are exchanged"),
    ("ema_update", ema(keep=lambda decay: 0.0), "the model itself"),
    ("ema_update", ema(keep=lambda decay: 1.0), "nothing moved"),
    ("ema_update", halfway, "is not decay \\* average"),
    ("ema_update", ema_with_a_graph, "a graph that grows"),
    ("ema_update", the_model_follows, "model was changed"),
    ("ema_update", shared, "the model itself"),
    ("ema_update", ema(buffers=shared_buffers), "share their buffers"),
    ("ema_update", a_new_one, "in place and return it"),
    ("ema_update", lambda average, model, decay: None, "returned nothing"),
    ("distortion_at", distorting(what=lambda guess, x_t: x_t), "x_t itself"),
    ("distortion_at", distorting(to=lambda x0: x0.roll(1, 0)), "unrelated image"),
    ("distortion_at", distorting(to=lambda x0: x0.flip(0)), "unrelated image"),
    ("distortion_at", distorting(what=lambda guess, x_t: x_t, to=lambda x0: x0.roll(1, 0), scale=1), "for any model"),
    ("distortion_at", distorting(what=lambda guess, x_t: x_t, to=lambda x0: x0.flip(0)), "for any model"),
    ("distortion_at", distorting(scale=1), "scale is that of"),
    ("distortion_at", distorting(scale=255), "not 255"),
    ("distortion_at", distorting(what=lambda guess, x_t: guess), "not clipped"),
    ("distortion_at", distorting(end=lambda miss: 127.5 * miss.square().mean()), "the root is missing$"),
    ("distortion_at", distorting(end=lambda miss: (127.5 * miss).square().mean()), "scale was squared"),
    ("distortion_at", distorting(end=lambda miss: 127.5 * miss.square().mean().sqrt()), "whole batch"),
    ("distortion_at", distorting(end=lambda miss: 127.5 * miss.abs().mean()), "absolute"),
    ("distortion_at", distorting(seen=lambda x_t, x0: x0), "asked about the clean image"),
    ("distortion_at", own_noise, "eps was not used"),
    ("distortion_at", distorting(scale=100), "is not 127.5 times"),
    ("jump_bits", jump(end=lambda nats: nats.flatten(1).mean(1)), "these are nats:"),
    ("jump_bits", jump(end=lambda nats: nats.flatten(1).mean(1) * math.log(2)), "multiplied by ln 2"),
    ("jump_bits", jump(end=lambda nats: nats.flatten(1).sum(1) / math.log(2)), "bits of a whole image"),
    ("jump_bits", jump(end=lambda nats: nats.flatten(1).sum(1)), "nats of a whole image"),
    ("jump_bits", jump(end=lambda nats: nats.mean() / math.log(2)), "one number for each image"),
    ("jump_bits", exchanged, "p and q are exchanged"),
    ("jump_bits", jump(half=1), "half is missing"),
    ("jump_bits", jump(means=0), "distance of the means is missing"),
    ("jump_bits", jump(spread=0), "taken for equal"),
    ("jump_bits", jump(sign=-1), "sign of the logarithm"),
    ("jump_bits", jump(one=0), "minus 1 is missing"),
    ("jump_bits", squared, "variances are squared"),
    ("jump_bits", jump(over="q"), "divided by q's variance"),
    ("jump_bits", jump(half=0.25), "is not KL"),
    ("decoder_bits", decoding(end=lambda bits, x: bits * math.log(2)), "these are nats"),
    ("decoder_bits", decoding(end=lambda bits, x: bits * x[0].numel()), "whole image"),
    ("decoder_bits", decoding(end=lambda bits, x: -bits), "sign is wrong"),
    ("decoder_bits", decoding(half=1 / 510), "pixels in \\[0, 1\\]"),
    ("decoder_bits", decoding(half=2 / 255), "twice too wide"),
    ("decoder_bits", decoding(ends=False), "closed bins"),
    ("decoder_bits", by_density(1), "that is a density"),
    ("decoder_bits", by_density(2 / 255), "times the width"),
    ("decoder_bits", decoding(of_std=lambda std: std**0.5), "taken for a variance"),
    ("decoder_bits", decoding(of_std=lambda std: std**2), "std was squared"),
    ("decoder_bits", decoding(end=lambda bits, x: bits / 3), "open at both ends"),
    ("decoder_bits", unclamped, "costs infinity"),
    ("decoder_bits", decoding(end=lambda bits, x: bits.clamp(max=10)), "the floor below the mass"),
    ("rate_curve", curve(rate=lambda prior, kl: prior + kl.cumsum(0)), "each jump's own bits are counted:"),
    ("rate_curve", curve(rate=lambda prior, kl: kl.cumsum(0) - kl), "prior is missing: x_T"),
    ("rate_curve", curve(rate=lambda prior, kl: kl.cumsum(0)), "missing, and each"),
    ("rate_curve", curve(rate=lambda prior, kl: kl.flip(0).cumsum(0).flip(0)), "still to be sent"),
    ("rate_curve", curve(rate=lambda prior, kl: prior + kl), "must be added up"),
    ("rate_curve", curve(rate=lambda prior, kl: 3 * kl), "rate\\[i\\]"),
    ("rate_curve", curve(bound=lambda prior, kl: prior + kl[:-1].sum()), "last term is missing"),
    ("rate_curve", curve(bound=lambda prior, kl: kl.sum()), "^the prior is missing$"),
    ("rate_curve", curve(bound=lambda prior, kl: kl[:-1].sum()), "prior and the decoder"),
    ("rate_curve", curve(bound=lambda prior, kl: prior + kl.mean()), "mean of the terms"),
    ("rate_curve", curve(bound=lambda prior, kl: 2 * prior + kl.sum()), "counted twice"),
    ("rate_curve", curve(bound=lambda prior, kl: (prior + kl.cumsum(0) - kl).sum()), "sum of the rates"),
    ("rate_curve", curve(bound=lambda prior, kl: 0 * prior), "all of kl"),
    ("rate_curve", lambda prior, kl: prior + kl.sum(), "two answers"),
    ("zero_snr", lambda ab: 1 * ab, "nothing changed"),
    ("zero_snr", ending(of=lambda ab: ab, back=lambda x: x), "alpha_bar was shifted"),
    ("zero_snr", ending(back=lambda x: x), "square them"),
    ("zero_snr", cliff, "only the last entry"),
    ("zero_snr", ending(stretch=lambda x: 1), "not stretched"),
    ("zero_snr", ending(stretch=lambda x: 1 / (1 - x[-1]), keep=0), "keeps its place"),
    ("zero_snr", ending(keep=0), "entry 0 was moved"),
    ("zero_snr", lambda ab: ending()(ab)[1:], "entry 0 is missing"),
    ("zero_snr", lambda ab: 1 - ab, "entry 0 stays 1"),
    ("zero_snr", nearly, "exactly 0"),
    ("kernel_distance", mmd(diagonal=True), "leave the diagonal out"),
    ("kernel_distance", mmd(off_by_one=True), "still counted"),
    ("kernel_distance", mmd(across=1), "minus \\*twice\\*"),
    ("kernel_distance", mmd(across=-2), "they are subtracted"),
    ("kernel_distance", mmd(d=1), "divided by d"),
    ("kernel_distance", mmd(power=2), "squared"),
    ("kernel_distance", mmd(power=1), "no power"),
    ("kernel_distance", mmd(plus=0), "\\+ 1 is missing"),
    ("kernel_distance", lambda fx, fy: _mmd(fx, fy).abs().sqrt(), "a root was taken"),
    ("kernel_distance", lambda fx, fy: _mmd(fx, fy).clamp(min=0), "cut off at 0"),
    ("kernel_distance", lambda fx, fy: 3 * _mmd(fx, fy), "over pairs of different images"),
]


test_right_answers_pass, test_planted_mistakes_are_named, test_no_check_is_forgotten = suite_of(
    RIGHT, PLANTED, "colour", "bits")


def test_the_packages_ema_is_the_checks_once_it_has_warmed_up():
    average, model = _two_networks()
    ours = EMA(average, 0.9)
    ours.updates = 1000
    ours.update(model)
    right = ema()(average, model, 0.9)
    for mine, theirs in zip(ours.model.state_dict().values(), right.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_packages_distortion_and_bound_are_the_checks():
    x0, schedule, rng = torch.rand(3, 3, 4, 4) * 2 - 1, linear_schedule(), torch.Generator().manual_seed(0)
    denoise = _overshooting(schedule)
    found = rate_distortion(denoise, x0, schedule, schedule.spaced(4), rng)
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.rmse[0], distorting()(denoise, x0, 1000, eps, schedule))
    rate, bound = curve()(found.prior, found.kl)
    torch.testing.assert_close(rate, found.rate)
    torch.testing.assert_close(bound, found.bound)


@pytest.mark.parametrize("t", [1, 300, 999])
def test_the_checks_denoiser_leaves_the_range_of_images(t):
    x_t = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    schedule = cosine_schedule(1000)
    x0 = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    guess = _overshooting(schedule)(add_noise(x0, t, x_t, schedule), torch.full((4,), t)).x0
    assert guess.shape == x0.shape and (t > 900 or guess.abs().max() > 1)
