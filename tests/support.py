"""What several test files need: devices and dtypes to try, seeded numbers, a network that says what it is told."""

import torch
from torch import nn

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else []),
           *(["mps"] if torch.backends.mps.is_available() else [])]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


class Says(nn.Module):
    """A network that answers with a function of (x_t, t)."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x_t, t, **cond):
        return self.answer(x_t, t, **cond)
