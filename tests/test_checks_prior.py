"""Every self-check of notebook 08 passes the right answer and names each mistake it claims to catch."""

import torch
from support import suite_of
from torch import nn

from coursekit import checks, dip
from coursekit.checks.prior import _rand


def data_term(x, y, seen):
    return (seen(x) - y).square().mean()


def restoration_with(noise=lambda z, sigma_p, rng: sigma_p * torch.randn(z.shape, generator=rng), again=None,
                     optimizer=lambda model, z: torch.optim.Adam(model.parameters(), lr=0.01), loss=data_term,
                     zero=True, update=True, say=lambda x: x.detach(), turns=lambda steps: steps):
    """The restoration loop with one thing changed."""
    def restoration(model, z, y, seen, steps, sigma_p, rng):
        own = optimizer(model, z)
        for _ in range(turns(steps)):
            z = z if again is None else again(z, sigma_p, rng)
            x = model(z + noise(z, sigma_p, rng))
            if zero:
                own.zero_grad()
            loss(x, y, seen).backward()
            if update:
                own.step()
            yield say(x)
    return restoration


def emptied_last(model, z, y, seen, steps, sigma_p, rng):
    own = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        x = model(z + sigma_p * torch.randn(z.shape, generator=rng))
        data_term(x, y, seen).backward()
        own.step()
        own.zero_grad(set_to_none=False)
        yield x.detach()


def noise_once(model, z, y, seen, steps, sigma_p, rng):
    return restoration_with(noise=lambda z, *_: 0)(
        model, z + sigma_p * torch.randn(z.shape, generator=rng), y, seen, steps, sigma_p, rng)


def in_place(z, sigma_p, rng):
    z += sigma_p * torch.randn(z.shape, generator=rng)
    return z


def averaging(old=lambda keep: keep, new=lambda keep: 1 - keep, first=lambda x: x):
    def running_average(images, keep):
        average = None
        for x in images:
            average = first(x) if average is None else old(keep) * average + new(keep) * x
            yield average
    return running_average


def plain_mean(images, keep):
    total = 0
    for n, x in enumerate(images, 1):
        total = total + x
        yield total / n


def one_tensor(images, keep):
    images = iter(images)
    average = next(images).clone()
    yield average
    for x in images:
        yield average.lerp_(x, 1 - keep)


def spoiled(images, keep):
    average = None
    for x in images:
        average = x if average is None else average.lerp_(x, 1 - keep)
        yield average


def scales(smallest=2, sides=lambda h, w: (h, w), whole=True):
    def most_scales(h, w):
        n = 0
        while all((side % 2 ** (n + 1) == 0 or not whole) and side // 2 ** (n + 1) >= smallest for side in sides(h, w)):
            n += 1
        return n
    return most_scales


def one_parity(h, w):
    n = 0
    while h % 2 == 0 and min(h, w) >= 4:
        h, w, n = h // 2, w // 2, n + 1
    return n


def spans(images, window):
    return images.unfold(0, window, 1)  # (windows, c, h, w, window)


def masking(shape=lambda h, w: (1, 1, h, w), below=True, end=lambda mask: mask.float(), seeded=True):
    def bernoulli_mask(h, w, p, rng):
        coin = torch.rand(shape(h, w), generator=rng if seeded else None)
        return end(coin < p if below else coin >= p)
    return bernoulli_mask


def exactly(h, w, p, rng):
    order = torch.randperm(h * w, generator=rng)
    return (order < round(p * h * w)).float().view(1, 1, h, w)


def decibels(mse, peak=1):
    return 10 * torch.log10(peak**2 / mse)


def hidden(x, x0, mask, peak=1):
    return decibels(((x - x0) ** 2 * (1 - mask)).sum() / (3 * (1 - mask).sum()), peak)


def shaking(change, which=lambda w: w.ndim == 4):
    def shaken(model, share, rng):
        with torch.no_grad():
            for w in filter(which, model.parameters()):
                change(w, share, torch.randn(w.shape, generator=rng))
        return model
    return shaken


right_shake = shaking(lambda w, share, noise: w.add_(share * w.std() * noise))


def rebinding(model, share, rng):
    for w in model.parameters():
        w = w + share * w.std() * torch.randn(w.shape, generator=rng)
    return model


def without_no_grad(model, share, rng):
    for w in model.parameters():
        w += share * w.std() * torch.randn(w.shape, generator=rng)
    return model


def replacing(model, share, rng):
    for m in model:
        if isinstance(m, nn.Conv2d):
            w = m.weight.detach()
            m.weight = nn.Parameter(w + share * w.std() * torch.randn(w.shape, generator=rng), requires_grad=False)
    return model


def uniform_shake(model, share, rng):
    return shaking(lambda w, share, noise: w.add_(share * w.std() * 12**0.5 * torch.rand(w.shape, generator=rng)))(
        model, share, rng)


def copied(model, share, rng):
    return nn.Sequential(*model)


def hourglass_takes(h, w, n):
    """Most scales by trial, with the course's own network."""
    from coursekit.nets import Hourglass
    with torch.no_grad():
        return Hourglass(1, channels=(1,) * n)(torch.zeros(1, 1, h, w)).shape == (1, 3, h, w)


RIGHT = {
    "data_term": [data_term, lambda x, y, seen: nn.functional.mse_loss(seen(x), y)],
    "restoration": [restoration_with(), emptied_last, lambda model, z, y, seen, steps, sigma_p, rng: (
        step.x for step in dip.restore(model, z, y, seen, steps=steps, sigma_p=sigma_p, rng=rng))],
    "running_average": averaging(),
    "most_scales": scales(),
    "windowed_variance": lambda images, window: spans(images, window).var(-1, correction=0).mean((1, 2, 3)),
    "bernoulli_mask": masking(),
    "hidden_psnr": hidden,
    "shaken": right_shake,
}

PLANTED = [
    ("data_term", lambda x, y, seen: (x - y).square().mean(), "seen was not applied"),
    ("data_term", lambda x, y, seen: (x * (y != 0) - y).square().mean() if x.shape[-1] == 2 else
     (seen(x) - seen(y)).square().mean(), "to y as well"),
    ("data_term", lambda x, y, seen: (seen(x) - y).square().sum(), "the sum over"),
    ("data_term", lambda x, y, seen: (seen(x) - y).square().mean().sqrt(), "the root of it"),
    ("data_term", lambda x, y, seen: (seen(x) - y).abs().mean(), "absolute"),
    ("data_term", lambda x, y, seen: (seen(x) - y).square().mean() / 2, "half of it"),
    ("data_term", lambda x, y, seen: (seen(x) - y).pow(4).mean(), "was wanted, the mean of"),
    ("data_term", lambda x, y, seen: (seen(x.detach()) - y).square().mean(), "no gradient"),
    ("data_term", lambda x, y, seen: (seen(x) - y).square().mean((1, 2)), "one number for the whole"),
    ("data_term", lambda x, y, seen: (seen(x) - y).square().mean() if seen(x).shape == x.shape else
     (x - y).square().mean(), "smaller than x"),
    ("data_term", lambda x, y, seen: torch.tensor(((seen(x).numpy() - y.numpy()) ** 2).mean()), "stay with tensors"),
    ("data_term", lambda x, y, seen: seen(x.mul_(1)).sub_(y).square().mean(), "tensors, change none in place"),
    ("restoration", restoration_with(turns=lambda steps: steps - 1), "29 images"),
    ("restoration", restoration_with(say=lambda x: (x.detach(), 0)), "nothing else"),
    ("restoration", restoration_with(say=lambda x: x), "graph"),
    ("restoration", restoration_with(noise=lambda z, *_: 0 * z), "as it is"),
    ("restoration", noise_once, "drawn once"),
    ("restoration", restoration_with(again=lambda z, s, rng: z + s * torch.randn(z.shape, generator=rng)), "piles up"),
    ("restoration", restoration_with(again=in_place), "in place"),
    ("restoration", restoration_with(noise=lambda z, s, rng: s * torch.rand(z.shape, generator=rng)), "rand is not"),
    ("restoration", restoration_with(again=lambda z, s, rng: 0.1 * torch.rand(z.shape, generator=rng)), "a new z"),
    ("restoration", restoration_with(noise=lambda z, s, rng: s**2 * torch.randn(z.shape, generator=rng)),
     "has deviation 0.00"),
    ("restoration", restoration_with(update=False), "does not change"),
    ("restoration", restoration_with(loss=lambda x, y, seen: (x - y).square().mean()), "nobody saw"),
    ("restoration", restoration_with(zero=False), "pile up"),
    ("restoration", restoration_with(loss=lambda x, y, seen: (seen(x) - y).square().sum()), "already the first"),
    ("restoration", restoration_with(loss=lambda x, y, seen: (seen(x) - y).abs().mean()), "already the first"),
    ("restoration", restoration_with(optimizer=lambda model, z: torch.optim.SGD(model.parameters(), lr=0.01)),
     "Adam at rate"),
    ("restoration", restoration_with(noise=lambda z, s, rng: (s or 0.1) * torch.randn(z.shape, generator=rng)),
     "sigma_p = 0"),
    ("restoration", restoration_with(noise=lambda z, s, rng: s * torch.randn(z.shape)), "hand rng on"),
    ("restoration", lambda *args: 3, "one by one"),
    ("running_average", averaging(first=lambda x: 0.2 * x), "starts from black"),
    ("running_average", averaging(old=lambda keep: 1 - keep, new=lambda keep: keep), "swapped"),
    ("running_average", plain_mean, "plain mean"),
    ("running_average", one_tensor, "change it in place"),
    ("running_average", spoiled, "images were changed"),
    ("running_average", lambda images, keep: images, "not averaged"),
    ("running_average", lambda images, keep: list(averaging()(images, keep))[1:], "5 averages"),
    ("running_average", averaging(new=lambda keep: 1), "keep a"),
    ("most_scales", scales(smallest=1), "is 1 x 1"),
    ("most_scales", scales(whole=False), "multiples"),
    ("most_scales", scales(sides=lambda h, w: (h, h)), "64 x 48 halved 5 times would be 2 x 1.5"),
    ("most_scales", one_parity, "64 x 50 halved 4 times would be 4 x 3.125"),
    ("most_scales", scales(smallest=4), "not only"),
    ("most_scales", lambda h, w: 5.0, "whole number"),
    ("windowed_variance", lambda images, window: spans(images, window).var((1, 2, 3)).mean(-1), "contrast inside"),
    ("windowed_variance", lambda images, window: spans(images, window).var((1, 2, 3, 4)), "one pot"),
    ("windowed_variance", lambda images, window: spans(images, window).var(-1).mean((1, 2, 3)), "window - 1"),
    ("windowed_variance", lambda images, window: spans(images, window).std(-1, correction=0).mean((1, 2, 3)),
     "a root too many"),
    ("windowed_variance", lambda images, window: spans(images, window).var(-1, correction=0).sum((1, 2, 3)),
     "their number N"),
    ("windowed_variance", lambda images, window: RIGHT["windowed_variance"](images, window) * 3, "for each window"),
    ("windowed_variance", lambda images, window: RIGHT["windowed_variance"](images, window)[1:], "every full window"),
    ("bernoulli_mask", masking(lambda h, w: (1, 3, h, w)), "own coin"),
    ("bernoulli_mask", masking(lambda h, w: (h, w)), "was wanted, got \\(40, 60\\)"),
    ("bernoulli_mask", masking(end=lambda mask: mask), "torch.bool"),
    ("bernoulli_mask", lambda h, w, p, rng: torch.rand(1, 1, h, w, generator=rng), "z that is uniform"),
    ("bernoulli_mask", masking(seeded=False), "hand rng on"),
    ("bernoulli_mask", masking(below=False), "upside down"),
    ("bernoulli_mask", lambda h, w, p, rng: masking()(h, w, 0.5, rng), "below p"),
    ("bernoulli_mask", exactly, "exactly 1680"),
    ("hidden_psnr", lambda x, x0, mask: decibels((x - x0).square().mean()), "every pixel was counted"),
    ("hidden_psnr", lambda x, x0, mask: hidden(x, x0, 1 - mask), "\\*seen\\*"),
    ("hidden_psnr", lambda x, x0, mask: decibels(((x - x0) * (1 - mask)).square().mean()), "dilute"),
    ("hidden_psnr", lambda x, x0, mask: decibels(((x - x0) ** 2 * (1 - mask)).sum() / (1 - mask).sum()), "4.8 dB"),
    ("hidden_psnr", lambda x, x0, mask: hidden(x, x0, mask, 2), "peak of 1"),
    ("hidden_psnr", lambda x, x0, mask: -hidden(x, x0, mask), "was wanted"),
    ("shaken", rebinding, "new tensor"),
    ("shaken", without_no_grad, "torch refuses"),
    ("shaken", copied, "return model"),
    ("shaken", replacing, "no longer learns"),
    ("shaken", shaking(lambda w, share, noise: w.add_(share * w.std() * noise), lambda w: True), "moved as well"),
    ("shaken", shaking(lambda w, share, noise: w.add_(share * noise)), "its own deviation"),
    ("shaken", shaking(lambda w, share, noise: w.add_(0.5 * w.std() * noise)), "deviation where 0.20"),
    ("shaken", uniform_shake, "rand is not"),
    ("shaken", shaking(lambda w, share, noise: w.add_(2 * share * w.std() * noise)), "moved by 1.0"),
    ("shaken", shaking(lambda w, share, noise: w.add_(share * w.std() * torch.randn(w.shape))), "differently"),
]


test_right_answers_pass, test_planted_mistakes_are_named, test_no_check_is_forgotten = suite_of(
    RIGHT, PLANTED, "prior")


def test_the_scales_that_the_rule_allows_are_those_the_network_takes():
    for h, w in ((32, 32), (64, 48), (40, 16), (6, 6)):
        most = scales()(h, w)
        assert hourglass_takes(h, w, most)
        try:
            assert not hourglass_takes(h, w, most + 1)
        except ValueError as error:
            assert f"got {h} x {w}" in str(error)


def test_the_windows_of_the_course_are_those_of_the_exercise():
    images, watch = _rand(9, 3, 4, 4, seed=0), dip.WindowedVariance(window=4, patience=100)
    for x in images:
        watch.update(x[None])
    found = torch.tensor(watch.variances[3:])
    torch.testing.assert_close(found, RIGHT["windowed_variance"](images, 4), atol=1e-6, rtol=1e-4)
    assert checks.windowed_variance.__module__ == "coursekit.checks.prior"
