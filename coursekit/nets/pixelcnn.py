"""PixelCNN over a grid of codes: the probability of each, given all that come before it in reading order."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coursekit.nets.blocks import check_labels

SEES = {  # which sites around its own, at (0, 0), a masked convolution may look at: rows y, columns x
    "before": lambda y, x: (y < 0) | ((y == 0) & (x < 0)),  # mask A: in reading order, without itself
    "up to": lambda y, x: (y < 0) | ((y == 0) & (x <= 0)),  # mask B: with itself
    "above": lambda y, x: y < 0,  # whole rows
    "rows": lambda y, x: y <= 0,  # whole rows, with its own
}
NOWHERE = slice(0, 0)


class PixelCNN(nn.Module):
    """Codes (b, size, size) int64 in 0..K-1 to logits (b, K, size, size): p(code | all codes before it).

    kind    "masked": the stack of the Keras example (1,049,728 parameters at K = 128 and width 128), which misses a
            wedge of codes above to the right (its blind spot); "gated": a vertical and a horizontal stack, which
            miss nothing if there are size - 1 layers or more (van den Oord et al. 2016)
    width   channels; layers  residual blocks of the masked stack, or gated layers
    classes number of labels (0: none), which the gated stack hears in every layer (eq. 4 of the same paper).
            A label of -1, like label=None, means "no label"
    """

    def __init__(self, codes: int = 128, size: int = 7, kind: str = "gated", width: int = 64, layers: int = 6,
                 dropout: float = 0.0, classes: int = 0):
        super().__init__()
        self.config: dict[str, Any] = {"codes": codes, "size": size, "kind": kind, "width": width, "layers": layers,
                                       "dropout": dropout, "classes": classes}
        if kind not in ("gated", "masked"):
            raise ValueError(f'kind is "gated" or "masked", got {kind!r}')
        if codes < 2 or size < 1 or width < 2 or width % 2 or layers < 1 or not 0 <= dropout < 1:
            raise ValueError("a PixelCNN needs two codes or more, a size and layers of at least 1, an even width and "
                             f"dropout in [0, 1), got {self.config}")
        if classes < 0 or (classes and kind == "masked"):
            raise ValueError(f"labels are for the gated kind and their number is at least 0, got {self.config}")
        self.stack: Any = GatedStack(codes, size, width, layers, dropout, classes) if kind == "gated" else \
            MaskedStack(codes, size, width, layers, dropout)

    @classmethod
    def preset(cls, name: str) -> PixelCNN:
        """"keras": the network of the Keras example, layer for layer; "gated": the course's own."""
        presets: dict[str, dict[str, Any]] = {"keras": {"kind": "masked", "width": 128, "layers": 2}, "gated": {}}
        if name not in presets:
            raise ValueError(f"the presets are {', '.join(presets)}, got {name!r}")
        return cls(**presets[name])

    def forward(self, codes: Tensor, label: Tensor | None = None) -> Tensor:
        K, size = self.config["codes"], self.config["size"]
        if codes.dtype != torch.int64 or codes.ndim != 3 or codes.shape[1:] != (size, size):
            raise ValueError(f"codes are int64 of shape (b, {size}, {size}), got {codes.dtype} of {tuple(codes.shape)}")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < K:
            raise ValueError(f"codes run from 0 to {K - 1}, got {int(codes.min())} to {int(codes.max())}")
        return self.stack(self.stack.first(codes), self.told(label, codes))

    def told(self, label: Tensor | None, codes: Tensor) -> list[Tensor]:
        """What each gated layer hears of place and labels (b,) beside codes (b, ...), to be added to its features."""
        classes = self.config["classes"]
        if label is not None and not classes:
            raise ValueError("this network was built with classes=0 and takes no label")
        return self.stack.told(check_labels(label, classes, codes) if classes else None)

    @torch.no_grad()
    def sample(self, n: int, rng: torch.Generator | None = None, temperature: float = 1.0,
               label: Tensor | None = None, w: float = 1.0) -> Tensor:
        """n grids of codes (n, size, size), drawn site by site in reading order.

        Each site is computed once, from maps that hold what earlier sites left there, instead of running the whole
        network for each: the same codes, but for rounding, from the same randomness, in a fraction of the time. The
        temperature divides the logits; at 0 the likeliest code is taken and nothing is random.

        label   (n,), what to draw. A network that knows labels and is given none draws them first, each as likely as
                any other: its grids are then samples of all it knows. -1 asks for no label
        w       classifier-free guidance (Ho & Salimans 2022), for logits: they become u + w (ours - u), u said with
                no label. w = 1 leaves ours as they are
        """
        if n < 0:
            raise ValueError(f"the number of samples is at least 0, got {n}")
        size, classes = self.config["size"], self.config["classes"]
        if w != 1 and not classes:
            raise ValueError(f"w = {w} leads away from what is said with no label, and this network knows no labels")
        codes = torch.zeros(n, size, size, dtype=torch.int64, device=next(self.parameters()).device)
        if classes and label is None:
            label = torch.randint(classes, (n,), generator=rng, device=codes.device if rng is None else rng.device)
        self.eval()
        asked = [Memory(n, size, self.told(heard, codes)) for heard in ([label] if w == 1 else [label, None])]
        for i in range(size):
            for j in range(size):
                logits, *untold = (self.stack.at(codes, i, j, memory) for memory in asked)
                for u in untold:
                    logits = u + w * (logits - u)
                codes[:, i, j] = pick(logits, rng, temperature)
        return codes


def pick(logits: Tensor, rng: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
    """Codes (n,) drawn from softmax(logits / temperature), logits (n, K); the largest at temperature 0.

    One uniform number decides for each row, where it falls among the summed probabilities.
    """
    if not temperature >= 0:
        raise ValueError(f"the temperature is at least 0, got {temperature}")
    if temperature == 0:
        return logits.argmax(1)
    device = logits.device if rng is None else rng.device
    u = 1 - torch.rand(len(logits), 1, generator=rng, device=device)  # in (0, 1]: never where nothing is
    logits = logits if logits.dtype is torch.float64 else logits.float()
    chances = ((logits - logits.amax(1, keepdim=True)) / temperature).softmax(1)
    if bool(chances.isnan().any()):
        raise ValueError("logits must be numbers, and not all of a row minus infinity; got NaN among the chances")
    edges = chances.cumsum(1)
    return (edges[:, :-1] < u.to(edges) * edges[:, -1:]).sum(1)


class Memory:
    """Maps of features for sampling, with the zeros that a convolution pads around them, filled site by site."""

    def __init__(self, n: int, size: int, told: list[Tensor]) -> None:
        self.n, self.size, self.told = n, size, told
        self.maps: dict[MaskedConv, Tensor] = {}
        self.weights: dict[MaskedConv, Tensor] = {}  # masked, down to the row in hand
        self.above: dict[GatedLayer, Tensor] = {}  # what the vertical stack says to the row in hand

    def into(self, conv: MaskedConv, i: int, j: slice, features: Tensor) -> None:
        """Put features (n, c, 1, columns) into the map that `conv` reads, at row i."""
        if conv not in self.maps:
            height, width = self.size + 2 * conv.margin[0], self.size + 2 * conv.margin[1]
            self.maps[conv] = features.new_zeros(self.n, features.shape[1], height, width)
        row, shift = i + conv.margin[0], conv.margin[1]
        self.maps[conv][:, :, row:row + 1, j.start + shift:j.stop + shift] = features


class MaskedConv(nn.Conv2d):
    """A convolution whose kernel is zero wherever it may not look; `sees` is a name of SEES."""

    def __init__(self, c_in: int, c_out: int, kernel: tuple[int, int], sees: str):
        self.margin = kernel[0] // 2, kernel[1] // 2
        super().__init__(c_in, c_out, kernel, padding=self.margin)
        y = torch.arange(kernel[0])[:, None] - self.margin[0]
        x = torch.arange(kernel[1])[None] - self.margin[1]
        self.register_buffer("mask", SEES[sees](y, x).expand(kernel).float(), persistent=False)
        self.mask: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=self.margin)

    def at(self, memory: Memory, i: int, j: slice) -> Tensor:
        """Row i of the output, columns j, from the map in memory; the rows below are not read."""
        rows = self.margin[0] + 1
        if self not in memory.weights:
            memory.weights[self] = (self.weight * self.mask)[:, :, :rows]
        weight = memory.weights[self]
        seen = memory.maps[self][:, :, i:i + rows, j.start:j.stop + 2 * self.margin[1]]
        if seen.shape[2:] == weight.shape[2:]:  # one site: a matrix is quicker than a convolution
            return F.linear(seen.flatten(1), weight.flatten(1), self.bias)[:, :, None, None]
        return F.conv2d(seen, weight, self.bias)


class MaskedStack(nn.Module):
    """A 7 x 7 convolution that does not see its own site, then residual blocks that do."""

    def __init__(self, codes: int, size: int, width: int, layers: int, dropout: float):
        super().__init__()
        self.codes = codes
        self.enter = MaskedConv(codes, width, (7, 7), "before")
        self.blocks: Any = nn.ModuleList(MaskedBlock(width, dropout) for _ in range(layers))
        self.leave = nn.Sequential(nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU(),
                                   nn.Conv2d(width, codes, 1))

    def first(self, codes: Tensor) -> Tensor:
        """One-hot maps (b, K, h, w)."""
        return F.one_hot(codes, self.codes).movedim(-1, 1).to(self.enter.weight)

    def told(self, label: Tensor | None = None) -> list[Tensor]:
        return []  # nothing but codes

    def forward(self, x: Tensor, told: list[Tensor] | None = None) -> Tensor:
        h = F.relu(self.enter(x))
        for block in self.blocks:
            h = block(h)
        logits: Tensor = self.leave(h)
        return logits

    def at(self, codes: Tensor, i: int, j: int, memory: Memory) -> Tensor:
        """Logits (n, K) at site (i, j), called in reading order with the codes before it."""
        before, here = slice(max(0, j - 1), j), slice(j, j + 1)
        row = i
        if j == 0 and i > 0:  # the last site of the row above
            before, row = slice(codes.shape[2] - 1, codes.shape[2]), i - 1
        memory.into(self.enter, row, before, self.first(codes[:, row:row + 1, before]))
        h = F.relu(self.enter.at(memory, i, here))
        for block in self.blocks:
            h = block.at(h, i, here, memory)
        return self.leave(h).flatten(1)


class MaskedBlock(nn.Module):
    """1 x 1, masked 3 x 3 at half the width, 1 x 1, added to what came in."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.narrow = nn.Conv2d(width, width, 1)
        self.look = MaskedConv(width, width // 2, (3, 3), "up to")
        self.widen = nn.Conv2d(width // 2, width, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.look(F.relu(self.narrow(x))))
        return x + F.relu(self.widen(self.dropout(h)))

    def at(self, x: Tensor, i: int, here: slice, memory: Memory) -> Tensor:
        memory.into(self.look, i, here, F.relu(self.narrow(x)))
        return x + F.relu(self.widen(F.relu(self.look.at(memory, i, here))))


class GatedStack(nn.Module):
    """Gated layers over embedded codes; every site also knows where it is, and the label where there is one."""

    def __init__(self, codes: int, size: int, width: int, layers: int, dropout: float, classes: int):
        super().__init__()
        self.embedding = nn.Embedding(codes, width)
        self.place = nn.Parameter(torch.zeros(width, size, size))
        self.label = nn.Embedding.from_pretrained(torch.zeros(classes + 1, layers * 2 * width), freeze=False) \
            if classes else None
        self.layers: Any = nn.ModuleList(GatedLayer(width, dropout, first=k == 0) for k in range(layers))
        self.leave = nn.Sequential(nn.ReLU(), nn.Conv2d(width, 2 * width, 1), nn.ReLU(), nn.Conv2d(2 * width, codes, 1))

    def first(self, codes: Tensor) -> Tensor:
        """Embedded maps (b, width, h, w)."""
        return self.embedding(codes).movedim(-1, 1)

    def told(self, label: Tensor | None) -> list[Tensor]:
        """For each layer (b or 1, 2 width, rows or 1, columns or 1): labels (b,), and to the first the place."""
        place = torch.cat([self.place, self.place])[None]
        if self.label is None or label is None:
            return [place, *(place.new_zeros(1, len(place[0]), 1, 1) for _ in self.layers[1:])]
        first, *others = self.label(label + 1)[:, :, None, None].chunk(len(self.layers), dim=1)
        return [place + first, *others]

    def forward(self, x: Tensor, told: list[Tensor] | None = None) -> Tensor:
        v = h = x
        for layer, hears in zip(self.layers, told or self.told(None), strict=True):
            v, h = layer(v, h, hears)
        logits: Tensor = self.leave(h)
        return logits

    def at(self, codes: Tensor, i: int, j: int, memory: Memory) -> Tensor:
        """Logits (n, K) at site (i, j), called in reading order with the codes before it."""
        row, here = slice(0, codes.shape[2]), slice(j, j + 1)
        if j == 0:  # the vertical stack sees only rows above: a row of it at once
            v = self.first(codes[:, max(0, i - 1)][:, None])
            for layer, hears in zip(self.layers, memory.told, strict=True):
                v = layer.row(v, i, row, memory, hears)
        before = max(0, j - 1)
        h = self.first(codes[:, i:i + 1, before:before + 1])
        for layer in self.layers:
            h = layer.at(h, here, memory)
        return self.leave(h).flatten(1)


class GatedLayer(nn.Module):
    """One step of both stacks: tanh of one half of the features times the sigmoid of the other (eq. 2).

    The vertical stack sees whole rows above, the horizontal one its own row to the left, and what the vertical one
    found. The first layer must not see its own site; later ones may, for nothing of it is in the features any more.
    """

    def __init__(self, width: int, dropout: float, first: bool):
        super().__init__()
        self.is_first = first
        self.vertical = MaskedConv(width, 2 * width, (3, 3), "above" if first else "rows")
        self.horizontal = MaskedConv(width, 2 * width, (1, 3), "before" if first else "up to")
        self.link = nn.Conv2d(2 * width, 2 * width, 1)
        self.leave = nn.Conv2d(width, width, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, v: Tensor, h: Tensor, hears: Tensor) -> tuple[Tensor, Tensor]:
        above = self.vertical(v) + hears
        new = self.leave(self.dropout(gate(self.horizontal(h) + self.link(above))))
        return gate(above), new if self.is_first else h + new

    def row(self, v: Tensor, i: int, row: slice, memory: Memory, hears: Tensor) -> Tensor:
        """Row i of the vertical stack. v: its input in this row, or for the first layer in the row above."""
        at = row
        if self.is_first and i == 0:  # there is none above: write nothing
            at, v = NOWHERE, v[..., NOWHERE]
        memory.into(self.vertical, i - 1 if self.is_first and i else i, at, v)
        above = self.vertical.at(memory, i, row) + (hears[:, :, i:i + 1] if self.is_first else hears)
        memory.above[self] = self.link(above)
        return gate(above)

    def at(self, h: Tensor, here: slice, memory: Memory) -> Tensor:
        """Site `here` of a row of the horizontal stack. h: its input there, or for the first layer one site before.

        One row of memory is enough: what an earlier row left further right is masked.
        """
        at = here
        if self.is_first:
            at = slice(here.start - 1, here.start) if here.start else NOWHERE
        memory.into(self.horizontal, 0, at, h[..., :at.stop - at.start])
        new = self.leave(gate(self.horizontal.at(memory, 0, here) + memory.above[self][..., here]))
        return new if self.is_first else h + new


def gate(x: Tensor) -> Tensor:
    """tanh(a) sigmoid(b) of the two halves of the channels."""
    a, b = x.chunk(2, dim=1)
    return a.tanh() * b.sigmoid()
