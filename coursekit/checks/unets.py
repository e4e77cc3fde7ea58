"""Checks of notebook 03: the blocks of the published U-Net, and how they are wired."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coursekit.checks.core import CheckFailed, call, compare, passed, seeded
from coursekit.nets import Cs180UNet, cs180

Build = Callable[..., nn.Module]


# --- blocks: each is built anew, filled with the same numbers as ours, and must give the same answer ---

def conv(build: Build) -> None:
    """build(c_in, c_out) keeps the size: 3 x 3 convolution, batch normalisation, GELU."""
    _block(build, (3, 5), 8, cs180.Conv(3, 5), _around(
        lambda bias=True: nn.Conv2d(3, 5, 3, padding=1, bias=bias), 5), "padding=1 keeps the size")
    passed("Conv(c_in, c_out) keeps the size: convolution, normalisation, GELU, in this order")


def down_conv(build: Build) -> None:
    """build(c_in, c_out) halves the size: the same, with stride 2."""
    pooled = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.GELU(), nn.MaxPool2d(2))
    _block(build, (3, 5), 8, cs180.DownConv(3, 5), _around(
        lambda bias=True: nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=bias), 5) | {
        "the size is halved by pooling: here the convolution does it, with stride=2": pooled,
        "the convolution does not move in steps of two: stride=2 halves the size": cs180.Conv(3, 5),
    }, "kernel 3, stride 2 and padding 1 make 14 of 28")
    passed("DownConv(c_in, c_out) halves the size with a stride of 2")


def up_conv(build: Build) -> None:
    """build(c_in, c_out) doubles the size: transposed convolution (4, stride 2, padding 1), then as before."""
    enlarged = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.GELU())
    _block(build, (3, 5), 8, cs180.UpConv(3, 5), _around(
        lambda bias=True: nn.ConvTranspose2d(3, 5, 4, stride=2, padding=1, bias=bias), 5) | {
        "pixels are repeated and then convolved: the published UpConv is one nn.ConvTranspose2d": enlarged,
        "the size is halved: nn.ConvTranspose2d doubles it": nn.Sequential(
            nn.Conv2d(3, 5, 4, stride=2, padding=1), nn.BatchNorm2d(5), nn.GELU()),
    }, "kernel 4, stride 2 and padding 1 make 14 of 7; kernel 3 would make 13")
    passed("UpConv(c_in, c_out) doubles the size with a transposed convolution")


def flatten(build: Build) -> None:
    """build() averages a 7 x 7 map to one pixel, and ends in GELU."""
    def then(*layers: nn.Module) -> nn.Module:
        return nn.Sequential(*layers)

    _block(build, (), 7, cs180.Flatten(), {
        "the GELU at the end is missing: in the diagram Flatten has one": nn.AvgPool2d(7),
        "GELU comes before the average: average first": then(nn.GELU(), nn.AvgPool2d(7)),
        "that is ReLU: the diagram has GELU": then(nn.AvgPool2d(7), nn.ReLU()),
        "that is the maximum of the 49 pixels: take their average": then(nn.MaxPool2d(7), nn.GELU()),
        "the last two dimensions are gone: Flatten keeps (b, c, 1, 1), which Unflatten takes":
            then(nn.AvgPool2d(7), nn.GELU(), nn.Flatten()),
        "every pixel became a channel: Flatten averages each channel, it does not only reshape": nn.Flatten(),
    }, "nn.AvgPool2d(7) makes 1 of 7")
    passed("Flatten() makes (b, c, 1, 1) of (b, c, 7, 7), without a parameter, and ends in GELU")


def unflatten(build: Build) -> None:
    """build(channels) spreads one pixel over 7 x 7: transposed convolution (7), normalisation, GELU."""
    spread = nn.Sequential(nn.Upsample(scale_factor=7), nn.BatchNorm2d(3), nn.GELU())
    _block(build, (3,), 1, cs180.Unflatten(3), _around(
        lambda bias=True: nn.ConvTranspose2d(3, 3, 7, bias=bias), 3) | {
        "the pixel is copied 49 times: a transposed convolution gives every place its own weights": spread,
    }, "kernel 7 and padding 0 make 7 of 1")
    passed("Unflatten(c) makes (b, c, 7, 7) of (b, c, 1, 1), with its own weights for every place")


def blocks(builds: tuple[Build, Build, Build]) -> None:
    """(ConvBlock, DownBlock, UpBlock), each build(c_in, c_out)."""
    if not isinstance(builds, (tuple, list)) or len(builds) != 3:
        raise CheckFailed("hand over the three classes: checks.blocks((ConvBlock, DownBlock, UpBlock))")
    once = "ConvBlock is Conv twice, the second from c_out to c_out, each with weights of its own"
    shared = cs180.Conv(3, 3)
    _block(builds[0], (3, 5), 8, cs180.ConvBlock(3, 5), {
        once: cs180.Conv(3, 5),
        "the first Conv keeps c_in channels: it changes them to c_out, the second keeps c_out":
            nn.Sequential(cs180.Conv(3, 3), cs180.Conv(3, 5)),
    }, once)
    _block(builds[0], (3, 3), 8, cs180.ConvBlock(3, 3), {
        "the same Conv is used twice: two Convs have weights of their own": nn.Sequential(shared, shared)}, once)
    for build, name, change, right in ((builds[1], "DownBlock", cs180.DownConv, cs180.DownBlock),
                                       (builds[2], "UpBlock", cs180.UpConv, cs180.UpBlock)):
        order = f"{name} changes the size first: {change.__name__}, then ConvBlock"
        _block(build, (3, 5), 8, right(3, 5), {
            order: nn.Sequential(cs180.ConvBlock(3, 5), change(5, 5)),
            f"{name} ends in a ConvBlock, which is two Convs; one is missing":
                nn.Sequential(change(3, 5), cs180.Conv(5, 5)),
        }, order)
    passed("ConvBlock is two Convs; DownBlock and UpBlock change the size first, then work")


TAKES = {
    "start": "it takes 1 channel to D", "down1": "it takes D channels to D", "down2": "it takes D channels to 2 D",
    "flatten": "it has no parameters", "unflatten": "it keeps 2 D channels",
    "up1": "it takes 4 D channels, 2 D from below and 2 D of the skip h2, to D",
    "up2": "it takes 2 D channels, D from below and D of the skip h1, to D",
    "end": "it takes 2 D channels, D from below and D of the skip h0, to D",
    "out": "it is a plain nn.Conv2d(D, 1, 3, padding=1), without normalisation"}


def unet(build: Build) -> None:
    """build(D): the published network without time, (b, 1, 28, 28) -> (b, 1, 28, 28)."""
    model, ours = call(build, 4), Cs180UNet(4)
    if not isinstance(model, nn.Module):
        raise CheckFailed(f"a network was wanted, got {type(model).__name__}")
    for name, part in ours.named_children():
        mine = getattr(model, name, None)
        if not isinstance(mine, nn.Module):
            raise CheckFailed(f"the network has no part called {name}: {TAKES[name]}")
        if sorted(p.shape for p in mine.parameters()) != sorted(p.shape for p in part.parameters()):
            raise CheckFailed(f"{name} has {_count(mine):,} parameters at D = 4, {_count(part):,} are published, in "
                              f"the order of the diagram: {TAKES[name]}")
        filled(mine), filled(part)
    if _count(model) != _count(ours):
        raise CheckFailed(f"{_count(model) - _count(ours):,} parameters belong to no part of the diagram")
    model.eval(), ours.eval()
    x = torch.randn(2, 1, 28, 28, generator=seeded(1))
    compare(_run(model, x), _wired(ours, x), _miswired(ours, x),
            "every part is right, but they are not wired as in the diagram")
    try:
        with torch.device("meta"):  # to count parameters nobody needs their numbers
            n = _count(build(128))
    except (NotImplementedError, RuntimeError):  # a network that moves itself to a device needs them
        n = _count(build(128))
    if n != 7_891_073:
        raise CheckFailed(f"right at D = 4, but {n:,} parameters at D = 128 where 7,891,073 are published: is there "
                          "a number where D belongs?")
    passed("7,891,073 parameters at D = 128, as published; each skip arrives, after the map from below")


def _run(model: nn.Module, x: Tensor) -> Any:
    try:
        with torch.no_grad():
            return call(model, x)
    except RuntimeError as error:
        found = re.search(r"to have (\d+) channels, but got (\d+)", str(error))
        if found:
            raise CheckFailed(f"a block made for {found[1]} channels was given {found[2]}: is a skip forgotten, or "
                              "added (+) where torch.cat([h, skip], dim=1) belongs?") from None
        if "Sizes of tensors must match" in str(error):
            raise CheckFailed("two maps of different sizes were concatenated: 7 x 7 goes with h2, 14 x 14 with h1, "
                              "28 x 28 with h0") from None
        raise CheckFailed(f"the forward pass stopped with: {str(error).splitlines()[0]}") from None


Join = Callable[[Tensor, Tensor], Tensor]
JOINTS = ("up1", "up2", "end")


def _wired(net: Any, x: Tensor, changed: Mapping[str, Join] | None = None) -> Tensor:
    """The forward pass, with other ways to join the map from below and the skip at some of the JOINTS."""
    join = dict.fromkeys(JOINTS, lambda h, skip: torch.cat([h, skip], 1)) | dict(changed or {})
    with torch.no_grad():
        h0 = net.start(x)
        h1 = net.down1(h0)
        h2 = net.down2(h1)
        h = net.up1(join["up1"](net.unflatten(net.flatten(h2)), h2))
        h = net.up2(join["up2"](h, h1))
        out: Tensor = net.out(net.end(join["end"](h, h0)))
    return out


def _miswired(net: Any, x: Tensor) -> dict[str, Any]:
    def swapped(h: Tensor, skip: Tensor) -> Tensor:
        return torch.cat([skip, h], 1)

    right = _wired(net, x)
    wrong: dict[str, Any] = {}
    for at, skip in zip(JOINTS, ("h2", "h1", "h0"), strict=True):
        wrong |= {
            f"{at} gets the map from below twice: its second half is the skip {skip}":
                _wired(net, x, {at: lambda h, skip: torch.cat([h, h], 1)}),
            f"{at} gets the skip {skip} twice: what came through the levels below is lost":
                _wired(net, x, {at: lambda h, skip: torch.cat([skip, skip], 1)}),
            f"{at} gets the skip first: such a network learns as well, but the shipped weights expect the map from "
            "below first": _wired(net, x, {at: swapped})}
    return wrong | {
        "every skip comes first: such a network learns as well, but the shipped weights expect the map from below "
        "first": _wired(net, x, dict.fromkeys(JOINTS, swapped)),
        "there is an activation after the last convolution: a GELU cannot answer -1, black": F.gelu(right),
        "there is a tanh after the last convolution: the diagram has none": right.tanh(),
        "the answer is clamped: a clamp has no gradient where it cuts, so do it after training": right.clamp(-1, 1),
        "the input was added to the answer: this network says what is clean, not what to change": x + right}


def _around(layer: Callable[..., nn.Module], channels: int) -> dict[str, nn.Module]:
    """What goes wrong around a convolution: the published order is convolution, normalisation, GELU."""
    norm = nn.BatchNorm2d
    return {
        "GELU comes before the normalisation: the order is convolution, normalisation, GELU":
            nn.Sequential(layer(), nn.GELU(), norm(channels)),
        "the normalisation is missing: nn.BatchNorm2d(c_out) stands between convolution and GELU":
            nn.Sequential(layer(), nn.GELU()),
        "the activation is missing: end in nn.GELU()": nn.Sequential(layer(), norm(channels)),
        "that is ReLU: the diagram has GELU": nn.Sequential(layer(), norm(channels), nn.ReLU()),
        "the convolution has no bias: batch normalisation makes it useless, but the published count includes it":
            nn.Sequential(layer(bias=False), norm(channels), nn.GELU())}


def _block(build: Build, sizes: tuple[int, ...], side: int, right: nn.Module, mistakes: Mapping[str, nn.Module],
           shape_hint: str) -> None:
    """Hold a learner's block, in training mode, against ours and against known mistakes."""
    made, name = call(build, *sizes), getattr(build, "__name__", "the block")
    if not isinstance(made, nn.Module):
        raise CheckFailed(f"{name} should be a network (nn.Module), got {type(made).__name__}")
    x = torch.randn(4, sizes[0] if sizes else 3, side, side, generator=seeded(2))
    wanted = filled(right)(x)
    try:
        got = call(filled(made), x)
    except RuntimeError as error:
        raise CheckFailed(f"{name} cannot be run on {tuple(x.shape)}: {str(error).splitlines()[0]}") from None
    if _count(made) == _count(right) and got.shape == wanted.shape and torch.allclose(got, wanted, atol=1e-3):
        return
    for sentence, wrong in mistakes.items():
        answer = filled(wrong)(x)
        if _count(made) == _count(wrong) and got.shape == answer.shape and torch.allclose(got, answer, atol=1e-3):
            raise CheckFailed(sentence)
    if got.shape != wanted.shape:
        raise CheckFailed(f"{name} should make {tuple(wanted.shape)} of {tuple(x.shape)}, got {tuple(got.shape)}: "
                          f"{shape_hint}")
    raise CheckFailed(f"{name} gives other numbers than the published block with the same weights: it has "
                      f"{_count(made)} parameters, the published one {_count(right)}")


def filled(net: nn.Module) -> nn.Module:
    """The network with fixed numbers for weights: the first convolution's, the second's, whatever their names."""
    seen: Counter[str] = Counter()
    with torch.no_grad():
        for module in net.modules():
            for name, p in module.named_parameters(recurse=False):
                kind = f"{type(module).__name__}.{name}"
                seen[kind] += 1
                rng = seeded(crc32(f"{kind} {seen[kind]}".encode()))
                inputs = p.numel() // max(1, len(p)) if p.ndim else 1
                p.copy_(torch.randn(p.shape, generator=rng) / max(1, inputs) ** 0.5)
    return net.train()


def _count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())
