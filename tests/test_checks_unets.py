"""The checks of notebook 03 pass the right answer and catch, by name, each mistake they claim to catch."""

import torch
import torch.nn.functional as F
from support import suite_of
from torch import nn

from coursekit import checks
from coursekit.checks import unets
from coursekit.nets import Cs180UNet, cs180
from coursekit.schedules import VarianceExploding
from coursekit.toys import GaussianMixture


def seq(*layers):
    return nn.Sequential(*layers)


def empty(*args):
    raise NotImplementedError


# --- blocks with one thing changed ---

CONVOLUTIONS = {
    "conv": lambda i, o, **kw: nn.Conv2d(i, o, 3, padding=1, **kw),
    "down_conv": lambda i, o, **kw: nn.Conv2d(i, o, 3, stride=2, padding=1, **kw),
    "up_conv": lambda i, o, **kw: nn.ConvTranspose2d(i, o, 4, stride=2, padding=1, **kw),
    "unflatten": lambda i, o=None, **kw: nn.ConvTranspose2d(i, o or i, 7, **kw)}


def around(name):
    """The five mistakes that every convolution block can hold."""
    make = CONVOLUTIONS[name]

    def norm(sizes):
        return nn.BatchNorm2d(sizes[-1])
    return [
        (name, lambda *s: seq(make(*s), nn.GELU(), norm(s)), "GELU comes before the normalisation"),
        (name, lambda *s: seq(make(*s), nn.GELU()), "normalisation is missing"),
        (name, lambda *s: seq(make(*s), norm(s)), "activation is missing"),
        (name, lambda *s: seq(make(*s), norm(s), nn.ReLU()), "ReLU"),
        (name, lambda *s: seq(make(*s, bias=False), norm(s), nn.GELU()), "no bias"),
    ]


def standard(layer, o):
    return seq(layer, nn.BatchNorm2d(o), nn.GELU())


class SharedTwice(nn.Sequential):
    def __init__(self, c_in, c_out):
        conv = cs180.Conv(c_out, c_out)
        super().__init__(*([cs180.Conv(c_in, c_out)] if c_in != c_out else [conv]), conv)


def three(**changed):
    """(ConvBlock, DownBlock, UpBlock), some of them changed."""
    return tuple(changed.get(name, getattr(cs180, name)) for name in ("ConvBlock", "DownBlock", "UpBlock"))


# --- networks with one thing changed ---

class Wired(Cs180UNet):
    """The published network, joined otherwise."""

    joins = ("right", "right", "right")

    def join(self, how, h, skip):
        return {"right": lambda: torch.cat([h, skip], 1), "below twice": lambda: torch.cat([h, h], 1),
                "skip twice": lambda: torch.cat([skip, skip], 1), "skip first": lambda: torch.cat([skip, h], 1),
                "forgotten": lambda: h, "added": lambda: h + skip}[how]()

    def forward(self, x):
        h0 = self.start(x)
        h1 = self.down1(h0)
        h2 = self.down2(h1)
        h = self.up1(self.join(self.joins[0], self.unflatten(self.flatten(h2)), h2))
        h = self.up2(self.join(self.joins[1], h, h1))
        return self.finish(x, self.out(self.end(self.join(self.joins[2], h, h0))))

    def finish(self, x, y):
        return y


def wired(*joins, **methods):
    return type("Changed", (Wired,), {"joins": joins or Wired.joins, **methods})


def wrong_map(self, x):
    h0 = self.start(x)
    h1 = self.down1(h0)
    return self.up1(torch.cat([self.unflatten(self.flatten(self.down2(h1))), h1], 1))


def other_part(**parts):
    """The network with another layer in some place."""
    def build(D):
        net = Wired(D)
        for name, part in parts.items():
            setattr(net, name, part(D))
        return net
    return build


def without(name):
    def build(D):
        net = Wired(D)
        delattr(net, name)
        return net
    return build


def fixed_number(D):
    net = Wired(D)
    net.up2 = cs180.UpBlock(2 * D, 4) if D == 4 else seq(cs180.UpBlock(2 * D, 4), cs180.Conv(4, D))
    return net


# --- losses and denoisers with one thing changed ---

def loss(error=lambda y, x0, z: (y - x0).square().mean(), sigma=1.0, noise=None):
    def fn(model, x0, rng):
        eps = torch.randn(x0.shape, generator=rng) if noise is None else noise(x0, rng)
        z = x0 + sigma * eps
        return error(model(z), x0, z)
    return fn


def weighted(score, answer=None):
    """A mean of digits with the weights softmax(score(distance, s))."""
    def fn(z, s, digits):
        far = torch.cdist(z.flatten(1), digits.flatten(1))
        return (score(far, s) @ digits.flatten(1)).view_as(z)
    return fn


def by_exp(far, s, hidden=0.0):
    weights = torch.exp(-far**2 / (2 * s**2))
    return weights / (weights.sum(1, keepdim=True) + hidden)


def ask(model, z):
    model.eval()
    with torch.no_grad():
        return model(z)


def ask_in_training_mode(model, z):
    with torch.no_grad():
        return model.train()(z)


RIGHT = {
    "noisy": lambda x0, sigma, eps: x0 + 2 * sigma * eps,
    "conv": cs180.Conv, "down_conv": cs180.DownConv, "up_conv": cs180.UpConv, "flatten": cs180.Flatten,
    "unflatten": cs180.Unflatten, "blocks": three(), "unet": Cs180UNet,
    "known_noise_loss": loss(),
    "best_denoiser": lambda z, s, digits: GaussianMixture(digits).denoiser(VarianceExploding())(
        z, torch.full((len(z),), s)).x0,
    "multiply_adds": lambda layer, x, y: layer.weight.numel() * (
        x if isinstance(layer, nn.ConvTranspose2d) else y)[0, 0].numel(),
    "on_its_own": ask,
}

PLANTED = [
    ("noisy", lambda x0, sigma, eps: x0 + sigma * eps, "half the noise"),
    ("noisy", lambda x0, sigma, eps: (x0 + 1) / 2 + sigma * eps, "stretch it back"),
    ("noisy", lambda x0, sigma, eps: 2 * x0 + 2 * sigma * eps, "only the noise is doubled"),
    ("noisy", lambda x0, sigma, eps: x0 + sigma / 2 * eps, "halved where"),
    ("noisy", lambda x0, sigma, eps: (x0 + 2 * sigma * eps).clamp(-1, 1), "do not clamp"),
    ("noisy", lambda x0, sigma, eps: (1 - sigma) * x0 + 2 * sigma * eps, "fades"),
    ("noisy", lambda x0, sigma, eps: x0 + 2 * sigma**2 * eps, "this is not x_0"),
    ("noisy", empty, "still empty"),
    *[mistake for name in CONVOLUTIONS for mistake in around(name)],
    ("conv", lambda i, o: standard(nn.Conv2d(i, o, 3), o), r"should make \(4, 5, 8, 8\).*padding=1"),
    ("conv", lambda i, o: standard(nn.Conv2d(i, o, 5, padding=2), o), "has 390 parameters, the published one 150"),
    ("conv", lambda i, o: standard(nn.Conv2d(o, i, 3, padding=1), o), "cannot be run on"),
    ("conv", lambda i, o: "Conv", "should be a network"),
    ("conv", empty, "still empty"),
    ("down_conv", lambda i, o: seq(*cs180.Conv(i, o), nn.MaxPool2d(2)), "halved by pooling"),
    ("down_conv", cs180.Conv, "steps of two"),
    ("down_conv", lambda i, o: standard(nn.Conv2d(i, o, 3, stride=2), o), "make 14 of 28"),
    ("up_conv", lambda i, o: standard(seq(nn.Upsample(scale_factor=2), nn.Conv2d(i, o, 3, padding=1)), o), "repeated"),
    ("up_conv", lambda i, o: standard(nn.Conv2d(i, o, 4, stride=2, padding=1), o), "size is halved"),
    ("up_conv", lambda i, o: standard(nn.ConvTranspose2d(i, o, 3, stride=2, padding=1), o), "kernel 3 would make 13"),
    ("flatten", lambda: nn.AvgPool2d(7), "GELU at the end"),
    ("flatten", lambda: seq(nn.GELU(), nn.AvgPool2d(7)), "average first"),
    ("flatten", lambda: seq(nn.AvgPool2d(7), nn.ReLU()), "that is ReLU"),
    ("flatten", lambda: seq(nn.MaxPool2d(7), nn.GELU()), "maximum"),
    ("flatten", lambda: seq(nn.AvgPool2d(7), nn.GELU(), nn.Flatten()), "dimensions are gone"),
    ("flatten", nn.Flatten, "every pixel became a channel"),
    ("flatten", lambda: nn.AvgPool2d(2), "makes 1 of 7"),
    ("unflatten", lambda c: seq(nn.Upsample(scale_factor=7), nn.BatchNorm2d(c), nn.GELU()), "copied 49 times"),
    ("unflatten", lambda c: standard(nn.ConvTranspose2d(c, c, 4, stride=2, padding=1), c), "make 7 of 1"),
    ("blocks", cs180.ConvBlock, "hand over the three classes"),
    ("blocks", three(ConvBlock=cs180.Conv), "Conv twice"),
    ("blocks", three(ConvBlock=lambda i, o: seq(cs180.Conv(i, i), cs180.Conv(i, o))), "first Conv keeps c_in"),
    ("blocks", three(ConvBlock=SharedTwice), "the same Conv is used twice"),
    ("blocks", three(DownBlock=lambda i, o: seq(cs180.ConvBlock(i, o), cs180.DownConv(o, o))),
     "DownBlock changes the size first"),
    ("blocks", three(UpBlock=lambda i, o: seq(cs180.ConvBlock(i, o), cs180.UpConv(o, o))),
     "UpBlock changes the size first"),
    ("blocks", three(DownBlock=lambda i, o: seq(cs180.DownConv(i, o), cs180.Conv(o, o))), "DownBlock ends in"),
    ("blocks", three(UpBlock=lambda i, o: seq(cs180.UpConv(i, o), cs180.Conv(o, o))), "UpBlock ends in"),
    ("unet", lambda D: "network", "a network was wanted"),
    ("unet", wired(forward=empty), "still empty"),
    ("unet", without("end"), "no part called end: it takes 2 D channels"),
    ("unet", other_part(up1=lambda D: cs180.UpBlock(2 * D, D)), "up1 has .* 4 D channels"),
    ("unet", other_part(up2=lambda D: cs180.UpBlock(D, D)), "up2 has .* the skip h1"),
    ("unet", other_part(out=lambda D: cs180.Conv(D, 1)), "out has .* plain nn.Conv2d"),
    ("unet", other_part(more=lambda D: nn.Linear(2, 3)), "9 parameters belong to no part"),
    ("unet", wired("forgotten", "right", "right"), "for 16 channels was given 8: is a skip forgotten"),
    ("unet", wired("right", "right", "added"), "for 8 channels was given 4: is a skip forgotten"),
    ("unet", wired(forward=wrong_map), "different sizes"),
    ("unet", wired(forward=lambda self, x: self.start(x).view(3, 5)), "forward pass stopped with"),
    *[("unet", wired(*[how if at == name else "right" for at in unets.JOINTS]), f"{name} gets the {sentence}")
      for name in unets.JOINTS for how, sentence in (("below twice", "map from below twice"),
                                                     ("skip twice", "skip h. twice"), ("skip first", "skip first"))],
    ("unet", wired(*["skip first"] * 3), "every skip comes first"),
    ("unet", wired(finish=lambda self, x, y: F.gelu(y)), "cannot answer -1"),
    ("unet", wired(finish=lambda self, x, y: y.tanh()), "a tanh after"),
    ("unet", wired(finish=lambda self, x, y: y.clamp(-1, 1)), "clamped"),
    ("unet", wired(finish=lambda self, x, y: x + y), "input was added"),
    ("unet", wired(finish=lambda self, x, y: 2 * y), "not wired as"),
    ("unet", fixed_number, "a number where D belongs"),
    ("known_noise_loss", lambda model, x0, rng: F.mse_loss(model(x0), x0), "clean digits"),
    ("known_noise_loss", lambda model, x0, rng: torch.zeros(()), "was not asked"),
    ("known_noise_loss", loss(noise=lambda x0, rng: torch.randn(
        x0.shape, generator=torch.Generator().manual_seed(0))), "by heart"),
    ("known_noise_loss", loss(noise=lambda x0, rng: torch.randn_like(x0)), "hand rng on"),
    ("known_noise_loss", loss(noise=lambda x0, rng: torch.randn(1, 1, 28, 28, generator=rng).expand_as(x0)),
     "share one noise"),
    ("known_noise_loss", loss(noise=lambda x0, rng: torch.rand(x0.shape, generator=rng)), "never negative"),
    ("known_noise_loss", loss(sigma=0.5), "half as strong"),
    ("known_noise_loss", loss(sigma=2.0), "standard deviation 2.0"),
    ("known_noise_loss", loss(lambda y, x0, z: (y - z).square().mean()), "what was shown"),
    ("known_noise_loss", loss(lambda y, x0, z: (y - (z - x0)).square().mean()), "DDPM's loss"),
    ("known_noise_loss", loss(lambda y, x0, z: (y - x0).square().sum()), "are summed"),
    ("known_noise_loss", loss(lambda y, x0, z: (y - x0).abs().mean()), "median"),
    ("known_noise_loss", loss(lambda y, x0, z: (y - x0).square().mean((1, 2, 3))), r"one number .* got \(8,\)"),
    ("known_noise_loss", loss(lambda y, x0, z: (y - x0).square().mean().sqrt()), "root of the mean"),
    ("known_noise_loss", loss(lambda y, x0, z: 3 * (y - x0).square().mean()), "not the mean of"),
    ("known_noise_loss", loss(lambda y, x0, z: (y - x0).square().mean().detach()), "no gradient"),
    ("best_denoiser", weighted(lambda far, s: (-far**2 / (2 * s)).softmax(1)), "s is not squared"),
    ("best_denoiser", weighted(lambda far, s: by_exp(far, s, hidden=1e-30)),
     "all weights became 0"),
    ("best_denoiser", lambda z, s, digits: weighted(lambda far, s: (-far**2 / (2 * s**2)).softmax(1))(
        z, s, digits).flatten(1), "view_as"),
    ("known_noise_loss", lambda model, x0, rng: model(x0.double()).mean(), "float64"),
    ("best_denoiser", weighted(lambda far, s: (-far**2 / s**2).softmax(1)), "the 2 is missing"),
    ("best_denoiser", weighted(lambda far, s: (-far / (2 * s**2)).softmax(1)), "distance is not squared"),
    ("best_denoiser", weighted(lambda far, s: (-far**2 / 9 / (2 * s**2)).softmax(1)), "so sum them"),
    ("best_denoiser", weighted(lambda far, s: (far**2 / (2 * s**2)).softmax(1)), "upside down"),
    ("best_denoiser", weighted(lambda far, s: (-far**2 / (2 * s**2)).softmax(0)), "wrong dimension"),
    ("best_denoiser", weighted(lambda far, s: F.one_hot(far.argmin(1), far.shape[1]).float()), "the others explain"),
    ("best_denoiser", weighted(lambda far, s: torch.ones_like(far) / far.shape[1]), "whatever z"),
    ("best_denoiser", weighted(by_exp), "0 / 0 on real digits"),
    ("best_denoiser", weighted(lambda far, s: (-far**2 / 7).softmax(1)), "not the softmax-weighted mean"),
    ("best_denoiser", lambda z, s, digits: weighted(by_exp)(z, s, digits).flatten(1), "should have shape"),
    ("best_denoiser", lambda z, s, digits: RIGHT["best_denoiser"](z, max(s, 0.7), digits).roll(int(s < 0.5), 0),
     "the digit itself"),
    ("multiply_adds", lambda layer, x, y: RIGHT["multiply_adds"](layer, x, y) * len(x), "whole batch"),
    ("multiply_adds", lambda layer, x, y: layer.weight.numel(), "at every place"),
    ("multiply_adds", lambda layer, x, y: (layer.weight.numel() + layer.bias.numel()) * y[0, 0].numel(), "bias"),
    ("multiply_adds", lambda layer, x, y: layer.weight.numel() * y[0, 0].numel(), r"comes \*in\*"),
    ("multiply_adds", lambda layer, x, y: layer.weight.numel() * x[0, 0].numel(), r"comes \*out\*"),
    ("multiply_adds", lambda layer, x, y: 9 * y[0, 0].numel(), "without the channels"),
    ("multiply_adds", lambda layer, x, y: 7, "2,160 were wanted, got 7"),
    ("on_its_own", ask_in_training_mode, "who else is in the batch"),
    ("on_its_own", lambda model, z: model.eval()(z), "no_grad"),
    ("on_its_own", lambda model, z: ask(model, z).clamp(-0.1, 0.1), "not what the network says"),
]


class NormFirst(nn.Sequential):
    """The published block, its parts defined in another order and under other names."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(c_out), nn.Conv2d(c_in, c_out, 3, padding=1)

    def forward(self, x):
        return F.gelu(self.norm(self.conv(x)))


def test_names_and_order_of_definition_are_the_learners_own(capsys):
    checks.conv(NormFirst)
    assert "passed" in capsys.readouterr().out


test_right_answers_pass, test_planted_mistakes_are_named, test_no_check_is_forgotten = suite_of(
    RIGHT, PLANTED, "unets", "one_pass")
