"""What every check is made of: run the learner's function, compare, and name the mistake."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


class CheckFailed(AssertionError):
    """The learner's function is not right yet; the message names the likely mistake."""

    def _render_traceback_(self) -> list[str]:  # IPython: the sentence, not our stack
        return [f"CheckFailed: {self}"]


COLUMNS = ": do one-dimensional t-coefficients multiply (b, c, h, w) images?"


def passed(fact: str) -> None:
    """Say what has been established."""
    print(f"passed: {fact}")


def call(fn: Callable[..., Any], *args: Any) -> Any:
    """fn(*args), having seen that it leaves its tensors alone; an empty exercise is said to be one."""
    before = [a.clone() if isinstance(a, Tensor) else a for a in args]
    try:
        out = fn(*args)
    except NotImplementedError:
        raise CheckFailed(f"{_name(fn)} is still empty: write its body, then run this cell again") from None
    for was, now in zip(before, args, strict=True):
        if isinstance(now, Tensor) and not torch.equal(was, now):
            raise CheckFailed(f"{_name(fn)} changed its argument in place: the caller still needs it, "
                              "so compute a new tensor (x * y, not x *= y)")
    if out is None:
        raise CheckFailed(f"{_name(fn)} returned nothing: does it end in `return ...`?")
    return out


def compare(got: Any, right: Tensor, mistakes: Mapping[str, Any], otherwise: str,
            atol: float = 1e-4, shape_hint: str = "") -> None:
    """Raise CheckFailed with the sentence of the first mistake that explains what we got.

    A mistake is a wrong answer, a truth value, or a function of `got` (of the right shape) to one.
    """
    if not isinstance(got, Tensor):
        raise CheckFailed(f"a tensor of shape {tuple(right.shape)} was wanted, got {type(got).__name__}")
    if got.shape != right.shape:
        raise CheckFailed(f"the answer should have shape {tuple(right.shape)}, got {tuple(got.shape)}{shape_hint}")
    if got.isnan().any():
        raise CheckFailed("the answer holds NaN: a division by zero or the root of a negative number?")
    if _close(got, right, atol):
        return
    got = got.to(right.dtype) if got.is_floating_point() and right.is_floating_point() else got
    for sentence, wrong in mistakes.items():
        wrong = wrong(got) if callable(wrong) else wrong
        if isinstance(wrong, Tensor) and wrong.shape == got.shape and _close(got, wrong, atol):
            raise CheckFailed(sentence)
        if wrong is True:
            raise CheckFailed(sentence)
    raise CheckFailed(otherwise)


def keeps_dtype(got: Tensor, given: Tensor) -> None:
    """Refuse a float64 that came of a schedule's numbers: it would surprise somebody further on."""
    if got.dtype != given.dtype:
        raise CheckFailed(f"{given.dtype} went in and {got.dtype} came out: the schedule counts in float64, so bring "
                          "its numbers to the picture's kind, .to(x)")


def answers_of(denoise: Any, returned_by: str, x_t: Tensor, t: Tensor, forgotten: str) -> Any:
    """(x0, eps) as a learner's function's denoiser says; CheckFailed if it is no function or says something else."""
    if not callable(denoise):
        raise CheckFailed(f"{returned_by} returns a denoiser, a function of (x_t, t): write it inside, then return it; "
                          f"got {type(denoise).__name__}")
    got = call(denoise, x_t, t)
    if not isinstance(got, (tuple, list)) or len(got) != 2:
        raise CheckFailed(f"a denoiser returns a Prediction, x0 and eps: {forgotten}")
    return got


def seeded(seed: int) -> torch.Generator:
    """A generator that gives every learner the same numbers."""
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers, the same for every learner."""
    return torch.randn(shape, generator=seeded(seed))


def rand(*shape: int, seed: int) -> Tensor:
    """Numbers in [0, 1), the same for every learner."""
    return torch.rand(shape, generator=seeded(seed))


def _close(x: Tensor, y: Tensor, atol: float) -> bool:
    return torch.allclose(x.double(), y.double(), atol=atol, rtol=1e-4)


def _name(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__name__", "the function")
