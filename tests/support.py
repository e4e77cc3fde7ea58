"""What several test files need: devices and dtypes to try, seeded numbers, a network that says what it is told."""

import pytest
import torch
from torch import nn

from coursekit import checks
from coursekit.checks import CheckFailed
from coursekit.nets import KPN

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


def awake(**config):
    """A small KPN whose zero-initialised layers have been moved, as training would."""
    torch.manual_seed(0)
    net = KPN(**config)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.1 * torch.randn_like(p)
    return net.eval()


def suite_of(right, planted, *modules):
    """Three tests of checks: they pass what is right, name what is wrong, and none of the modules' is forgotten.

    right     {check: an answer or a list of answers}
    planted   [(check, a wrong answer, a pattern of the sentence that names the mistake)]
    """
    lists = {name: some if isinstance(some, list) else [some] for name, some in right.items()}
    answers = [(name, answer) for name, some in lists.items() for answer in some]

    @pytest.mark.parametrize("name, answer", answers, ids=[name for name, _ in answers])
    def passes(name, answer, capsys):
        getattr(checks, name)(answer)
        assert capsys.readouterr().out.startswith("passed: ")

    @pytest.mark.parametrize("name, mistake, sentence", planted, ids=[f"{n}-{s}" for n, _, s in planted])
    def names(name, mistake, sentence):
        with pytest.raises(CheckFailed, match=sentence):
            getattr(checks, name)(mistake)

    def complete():
        here = {f"coursekit.checks.{module}" for module in modules}
        public = {name for name in checks.__all__ if getattr(checks, name).__module__ in here}
        assert public == set(right) == {name for name, _, _ in planted}

    return passes, names, complete
