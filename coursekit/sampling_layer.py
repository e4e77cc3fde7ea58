"""A layer that draws: the call of tfp.layers.DistributionLambda, for torch, without TensorFlow.

TensorFlow Probability's distributions also run on plain numpy (its "numpy substrate"). Here one of them is made from
a layer's output and sampled, with all its randomness from a torch.Generator.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

INSTALL = "pip install tensorflow-probability"


def numpy_tfp() -> Any:
    """TensorFlow Probability on numpy, as `tfp`; an ImportError says how to get it."""
    try:
        return import_module("tensorflow_probability.substrates.numpy")
    except ImportError as why:
        raise ImportError(f"TensorFlow Probability is not installed or does not load ({why}): {INSTALL}") from why


def drawn(distribution: Any, seed: int) -> Any:
    """One sample: what the layer hands on unless told otherwise."""
    return distribution.sample(seed=seed)


class DistributionLambda(nn.Module):
    """Parameters in, a sample out, as tfp.layers.DistributionLambda coerces its distribution to a tensor.

        tfp = numpy_tfp()
        layer = DistributionLambda(tfp.distributions.Categorical)
        codes = layer(logits, rng)  # (b, 7, 7, K) to (b, 7, 7); the classes lie last

    make     an array of parameters to a distribution of the numpy substrate
    convert  (distribution, seed) to an array: a sample, or what else is wanted of it, as lambda d, seed: d.mode()

    The layer has no weights, and no gradient comes through it. Whole numbers come back as int64, on the device of the
    parameters. ValueError for parameters that are not finite: numpy would draw from them without a word.
    """

    def __init__(self, make: Callable[[np.ndarray], Any], convert: Callable[[Any, int], Any] = drawn):
        super().__init__()
        if not callable(make):
            raise ValueError(f"make is a function of an array, as tfp.distributions.Categorical, got {make!r}")
        self.make, self.convert = make, convert

    def forward(self, parameters: Tensor, rng: torch.Generator | None = None) -> Tensor:
        if not bool(parameters.isfinite().all()):
            raise ValueError("the parameters of a distribution must be finite, got NaN or infinity among them")
        device = "cpu" if rng is None else rng.device
        seed = int(torch.randint(2**31 - 1, (), generator=rng, device=device))
        array = np.asarray(self.convert(self.make(parameters.detach().float().cpu().numpy()), seed))
        return torch.as_tensor(array.astype(np.int64) if array.dtype.kind in "iu" else array).to(parameters.device)
