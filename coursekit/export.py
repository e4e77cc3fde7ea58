"""A network as an ONNX file, for a phone or whatever else runs no Python: written, then compared with the original.

A quantised network keeps its int8 in the file: weights as int8 numbers in front of a DequantizeLinear, activations
and kernels between QuantizeLinear and DequantizeLinear, where a runtime reads what it may compute in integers.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from coursekit.nets import filtering
from coursekit.nets.kpn import KPN
from coursekit.quantization import MOST, Int8Input, Int8Weight, KernelGrid, snr

OPSET = 18  # the one that torch's exporter writes without translating
LEAST, LEAST_ROUNDED = 60.0, 30.0  # dB between file and network: where nothing is rounded inside, and where it is


class Agreement(NamedTuple):
    """The SNR of onnxruntime against the network, in dB: operation by operation, and as it likes to run them.

    In float both are about 135. A network that rounds is touchy: a sum that ends on another last bit may go to the
    other side, and every layer behind it sees that. An image without such an accident keeps its 135 dB, one with
    it falls to about 40, in PyTorch too if its input is changed by a millionth. The optimiser moves roundings
    about and so always comes to 40 or 45. Of the float network, all of them stay at the same distance.
    """

    as_written: float
    optimised: float


def to_onnx(net: KPN, path: str | Path, size: int | None = None) -> Path:
    """Write a KPN, quantised or not, as an ONNX file (opset 18) that passed `check`; returns the path.

    Inputs `x_t` (b, 3, size, size) and `t` (b,), output `x0` like x_t, all float32; b is free, and size, the
    network's own unless given, is not, because its positions are stretched to it. Takes some fifteen seconds. `net`
    stays as it is.

    ValueError for another network, weights that are not float32, a size that its stride does not divide, ranges
    that were not calibrated, "fp8" kernels, which few runtimes know, and for a file that does not compute what the
    network does: then nothing new is at `path`.
    """
    _require("onnx", "onnxscript", "onnxruntime")
    if not isinstance(net, KPN) or any(p.dtype != torch.float32 for p in net.parameters()):
        raise ValueError(f"only a KPN in float32 is exported here, got a {type(net).__name__} in "
                         f"{sorted({str(p.dtype) for p in net.parameters()})}")
    size = net.config["size"] if size is None else size
    if size < 1 or size % net.stride:
        raise ValueError(f"size must be a positive multiple of the network's stride {net.stride}, got {size}")
    batch = torch.export.Dim("b", min=1)
    example = (torch.zeros(2, net.config["in_channels"], size, size), torch.zeros(2))
    portable = _portable(net)
    with torch.no_grad(), _filtered_by_convolution():
        program = torch.export.export(portable, example, dynamic_shapes=({0: batch}, {0: batch}))
        onnx: Any = torch.onnx.export(program, input_names=["x_t", "t"], output_names=["x0"], opset_version=OPSET,
                                      dynamic_shapes=({0: batch}, {0: None}), dynamo=True, verbose=False)
    _forget_origins(onnx.model)
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        onnx.save(part, external_data=False)
        check(part, net, size)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def check(path: str | Path, net: KPN, size: int | None = None) -> Agreement:
    """How close onnxruntime comes to a network with the ONNX file that was made from it.

    Five noisy greys, t from 0 to 1, are shown together and one alone, and the worst counts. ValueError below 60 dB,
    or below 30 if the network rounds activations or kernels: see `Agreement`.
    """
    _require("onnxruntime")
    import onnxruntime

    levels, model = onnxruntime.GraphOptimizationLevel, Path(path).read_bytes()
    net = copy.deepcopy(net).cpu().eval()
    size = net.config["size"] if size is None else size
    noise = torch.randn(5, net.config["in_channels"], size, size, generator=torch.Generator().manual_seed(0))
    t, grey = torch.linspace(0, 1, 5), torch.linspace(-1, 1, 5).view(-1, 1, 1, 1)
    x_t = torch.lerp(grey, noise, t.view(-1, 1, 1, 1))
    worst = []
    for level in (levels.ORT_DISABLE_ALL, levels.ORT_ENABLE_ALL):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        for some in (slice(5), slice(2, 3)):
            with torch.no_grad():
                ours = net(x_t[some], t[some])
            theirs, = session.run(["x0"], {"x_t": x_t[some].numpy(), "t": t[some].numpy()})
            worst.append(snr(ours, torch.from_numpy(theirs)).min().item())
    agreement = Agreement(*torch.tensor(worst).view(2, 2).amin(1).tolist())  # Python's min would lose a NaN
    least = LEAST_ROUNDED if any(isinstance(m, Int8Input | KernelGrid) for m in net.modules()) else LEAST
    if not all(decibels >= least for decibels in agreement):
        raise ValueError(f"the ONNX file does not compute what the network does: {agreement}, in dB, and at least "
                         f"{least:.0f} were wanted")
    return agreement


def _portable(net: KPN) -> KPN:
    """A copy whose roundings are ONNX's and whose quantised weights are integers."""
    net = copy.deepcopy(net).cpu().eval().requires_grad_(False)
    for module in list(net.modules()):
        if isinstance(module, parametrize.ParametrizationList) and isinstance(module[0], Int8Weight):
            module[0] = _Stored(module[0], module.original)
            module.original = nn.Parameter(torch.zeros(0), requires_grad=False)
        for name, child in list(module.named_children()):
            if isinstance(child, Int8Input):
                setattr(module, name, _Rounding(child.scale()))
            elif isinstance(child, KernelGrid):
                if child.grid not in MOST:
                    raise ValueError(f"kernels are exported as {list(MOST)}, got {child.grid!r}")
                setattr(module, name, _Rounding(torch.tensor(1 / MOST[child.grid])))
    return net


class _Stored(nn.Module):
    """A weight that is int8 in the file, and whole multiples of each channel's step when it is used."""

    integers: Tensor
    step: Tensor
    zero: Tensor

    def __init__(self, grid: Int8Weight, weight: Tensor):
        super().__init__()
        scale = grid.scale(weight)
        self.axis = grid.axis
        self.register_buffer("integers", (weight / scale).round().to(torch.int8))
        self.register_buffer("step", scale.flatten())
        self.register_buffer("zero", torch.zeros_like(self.step, dtype=torch.int8))

    def forward(self, _: Tensor) -> Tensor:
        return _dequantized(self.integers, self.step, self.zero, axis=self.axis)


class _Rounding(nn.Module):
    """`fake_quantized` as ONNX says it: to int8, where what is out of reach goes to -128 or 127, and back."""

    step: Tensor
    zero: Tensor

    def __init__(self, step: Tensor):
        super().__init__()
        self.register_buffer("step", step)
        self.register_buffer("zero", torch.zeros((), dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        integers = torch.onnx.ops.symbolic("QuantizeLinear", (x, self.step, self.zero),
                                           dtype=torch.int8, shape=x.shape)
        return _dequantized(integers, self.step, self.zero)


def _dequantized(integers: Tensor, step: Tensor, zero: Tensor, **attributes: Any) -> Tensor:
    """ONNX lets the zero point be left out, but onnxruntime's optimiser then computes something else."""
    return torch.onnx.ops.symbolic("DequantizeLinear", (integers, step, zero), attributes,
                                   dtype=torch.float32, shape=integers.shape)


@contextmanager
def _filtered_by_convolution() -> Iterator[None]:
    """While a network is traced, write each filter as six operations instead of twenty-five times nine.

    The exporter spells every slice out. One convolution with the 25 one-hot kernels gathers the same neighbours.
    """
    plain = filtering._shifted_sum
    filtering._shifted_sum = _by_convolution
    try:
        yield
    finally:
        filtering._shifted_sum = plain


def _by_convolution(padded: Tensor, kernels: Tensor) -> Tensor:
    one_hot = torch.eye(filtering.TAPS).view(-1, 1, filtering.SIZE, filtering.SIZE)
    seen = F.conv2d(padded.flatten(0, 1)[:, None], one_hot)  # (b * c, 25, h, w)
    return (seen.unflatten(0, padded.shape[:2]) * kernels[:, None]).sum(2)


def _forget_origins(model: Any) -> None:
    """Drop the exporter's notes on which line of which file made what: longer than the weights, and not theirs."""
    values = [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]
    for node in model.graph:
        node.metadata_props.clear()
        values.extend(node.outputs)
    for value in values:
        value.metadata_props.clear()


def _require(*packages: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ImportError(f"an ONNX file needs {' and '.join(missing)} too: pip install 'coursekit[onnx]'")
