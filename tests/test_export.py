"""An ONNX file computes what the network does, holds its int8 as int8, and says so when it does not."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import support
import torch
from support import randn

from coursekit import export, quantization
from coursekit.export import LEAST_ROUNDED, check, to_onnx
from coursekit.nets import UNet, filtering
from coursekit.nets.kpn import KPN
from coursekit.quantization import calibrate, quantized, stored_bytes

SMALL = {"width": 32, "depth": 1, "bottleneck": 8, "ups": (8, 8, 8), "drift_width": 4, "size": 16, "levels": 1}


@pytest.fixture(scope="module")
def needed() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)


def awake(**changes) -> KPN:
    return support.awake(**SMALL | changes)


@pytest.fixture(scope="module")
def few() -> KPN:
    few = quantized(awake())
    calibrate(few, [(randn(8, 3, 16, 16, seed=seed).float(), torch.linspace(0, 1, 8)) for seed in (1, 2)])
    return few


@pytest.fixture(scope="module")
def written(needed, few, tmp_path_factory) -> Path:
    """The one export that most tests look at: it takes some seconds."""
    before = copy.deepcopy(few.state_dict())
    path = to_onnx(few, tmp_path_factory.mktemp("onnx") / "few.onnx")
    assert all(torch.equal(value, before[key]) for key, value in few.state_dict().items())
    return path


def test_onnxruntime_computes_what_the_quantised_network_does(written, few):
    assert min(check(written, few)) >= LEAST_ROUNDED


@pytest.mark.parametrize("n", [1, 2, 7])
def test_any_number_of_images_fits(written, few, n):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(written), providers=["CPUExecutionProvider"])
    x_t, t = randn(n, 3, 16, 16, seed=n).float(), torch.rand(n)
    out, = session.run(None, {"x_t": x_t.numpy(), "t": t.numpy()})
    with torch.no_grad():
        assert quantization.snr(few(x_t, t), torch.from_numpy(out)).min() > LEAST_ROUNDED


def test_the_file_says_what_goes_in_and_out(written):
    import onnx

    model = onnx.load(written)
    onnx.checker.check_model(model, full_check=True)
    shapes = {value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
              for value in (*model.graph.input, *model.graph.output)}
    assert shapes == {"x_t": ["b", 3, 16, 16], "t": ["b"], "x0": ["b", 3, 16, 16]}
    assert [opset.version for opset in model.opset_import if not opset.domain] == [18]


def test_quantised_weights_are_int8_in_the_file(written, few):
    import onnx

    model = onnx.load(written)
    held = {x.name: onnx.numpy_helper.to_array(x) for x in model.graph.initializer}
    weights = {name: layer.weight.detach() for name, layer in few.named_modules() if hasattr(layer, "parametrizations")}
    dequantized = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in held]
    assert len(dequantized) == len(weights)
    assert sum(held[node.input[0]].size for node in dequantized) == sum(w.numel() for w in weights.values())
    for node in dequantized:
        integers, step = (held[name] for name in node.input[:2])
        weight = weights[node.input[0].split(".parametrizations")[0]]
        axis = next(a.i for a in node.attribute if a.name == "axis")
        shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
        assert integers.dtype == "int8"
        torch.testing.assert_close(torch.tensor(integers) * torch.tensor(step).view(shape), weight)
    floats = sum(x.nbytes for x in held.values() if x.dtype == "float32")
    assert floats < stored_bytes(few)  # no weight is there a second time, as floats


def test_the_file_tells_no_tales_of_where_it_was_made(written):
    assert str(Path(export.__file__).parent).encode() not in written.read_bytes()
    assert not any(written.parent.glob("*.part"))


def test_a_float_network_is_exported_too_and_another_is_told_from_it(needed, few, tmp_path):
    net, path = awake(), tmp_path / "net.onnx"
    assert to_onnx(net, str(path), size=24) == path
    agreement = check(path, net, size=24)
    assert min(agreement) > 100
    with torch.no_grad():
        net.heads[0].out.bias[0] += 0.01
    with pytest.raises(ValueError, match="does not compute what the network does"):
        check(path, net, size=24)


def test_a_file_that_computes_something_else_is_not_left_behind(needed, tmp_path, monkeypatch):
    path, gather = tmp_path / "net.onnx", export._by_convolution
    path.write_bytes(b"an older file")
    monkeypatch.setattr(export, "_by_convolution", lambda padded, kernels: gather(padded, kernels.flip(1)))
    with pytest.raises(ValueError, match="does not compute what the network does"):
        to_onnx(awake(branches="filters"), path)  # with its kernels upside down
    assert path.read_bytes() == b"an older file" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("shape", [(2, 3, 8, 6), (1, 1, 1, 1)])
def test_the_convolution_gathers_what_the_slices_do(shape):
    b, _, h, w = shape
    padded = filtering._padded(randn(*shape).float())
    kernels = randn(b, 25, h, w, seed=1).float()
    torch.testing.assert_close(export._by_convolution(padded, kernels), filtering._shifted_sum(padded, kernels))


def test_the_filter_is_itself_again_after_a_failed_export(needed):
    plain = filtering._shifted_sum
    net = awake()
    net.time.forward = None  # no network can be traced like this
    with pytest.raises(TypeError):
        to_onnx(net, "never.onnx")
    assert filtering._shifted_sum is plain


@pytest.mark.parametrize("net, size, says", [
    (awake().half(), None, r"only a KPN in float32.*\['torch.float16'\]"), (UNet(), None, "only a KPN.*got a UNet"),
    (awake(), 20, "stride 8, got 20"), (awake(), 0, "stride 8, got 0"), (quantized(awake()), None, "calibrate"),
    (quantized(awake(), weights=None, activations=None, kernels="fp8"), None, "exported as .*got 'fp8'")])
def test_what_cannot_be_exported_is_refused(needed, net, size, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        to_onnx(net, tmp_path / "x.onnx", size)
    assert not any(tmp_path.iterdir())


def test_a_missing_package_is_named_with_the_line_that_brings_it(monkeypatch, tmp_path):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"onnx and onnxscript and onnxruntime too: pip install 'coursekit\[onnx\]'"):
        to_onnx(awake(), tmp_path / "x.onnx")
    with pytest.raises(ImportError, match="needs onnxruntime too"):
        check(tmp_path / "x.onnx", awake())
