"""One loop for everything: it learns, it averages, it survives kill -9 bit for bit, and two are as one."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from coursekit import training
from coursekit.data import Images, batches
from coursekit.training import EMA, fit, train

ROOT = Path(__file__).parents[1]


def line_loss(model, x):
    return F.mse_loss(model(x), 3 * x + 1)


def a_line(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(1, 1), torch.randn(64, 1)


class Pressing:
    """Batches in whose making something happens."""

    def __init__(self, stream, press):
        self.stream, self.press = stream, press

    def __iter__(self):
        for batch in self.stream:
            self.press("the batch")
            yield batch

    def state_dict(self):
        return self.stream.state_dict()

    def load_state_dict(self, state):
        self.stream.load_state_dict(state)


class Noisy(nn.Module):
    """A small network with dropout and a running count, so that every kind of state matters."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.Dropout(0.3), nn.Linear(32, 16))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        if self.training:
            self.seen += len(x)
        return self.net(x).view_as(x)


def noisy_run(steps, save_to=None, **settings):
    """A training whose every step draws from three sources of randomness."""
    torch.manual_seed(1)
    rng = torch.Generator().manual_seed(2)
    x = torch.randint(0, 256, (40, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    data = batches(Images(x, None, "noise", "drawn"), 16, torch.Generator().manual_seed(4), flip=True)

    def loss_fn(model, batch):
        return F.mse_loss(model(batch.x + torch.randn(batch.x.shape, generator=rng)), batch.x)

    return fit(Noisy(), data, loss_fn, steps=steps, lr=1e-2, warmup=3, decay="constant", ema=0.9, clip=1.0,
               rng=rng, save_to=save_to, progress=False, **settings)


def same(run, other):
    assert torch.equal(run.losses, other.losses)
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name


def test_train_fits_a_line_and_is_lazy():
    model, x = a_line()
    run = train(model, itertools.repeat(x), line_loss, torch.optim.SGD(model.parameters(), lr=0.1))
    before = model.weight.clone()
    assert torch.equal(model.weight, before)  # nothing happens until it is asked
    updates = list(itertools.islice(run, 200))
    assert updates[-1].step == 200 and updates[-1].loss < 1e-6
    assert_close(model.weight.item(), 3.0, atol=1e-3, rtol=0)
    assert not updates[-1].loss.requires_grad


def test_fit_is_the_same_loop():
    """Without its extras, fit takes exactly the steps that train takes."""
    model, x = a_line()
    other, _ = a_line()
    run = fit(model, itertools.repeat(x), line_loss, steps=20, progress=False,
              optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    losses = [u.loss for u in itertools.islice(
        train(other, itertools.repeat(x), line_loss, torch.optim.SGD(other.parameters(), lr=0.1)), 20)]
    assert_close(run.losses, torch.stack(losses))
    assert_close(model.weight, other.weight)
    assert run.steps == 20 and not run.interrupted and not run.model.training


def test_ema_is_the_weighted_mean_of_the_past():
    model = nn.Linear(1, 1, bias=False)
    average = EMA(model, decay=0.5)
    mine = average.model.weight.item()
    for n in range(30):
        with torch.no_grad():
            model.weight.fill_(float(n))
        keep = min(0.5, (1 + n) / (10 + n))
        mine = keep * mine + (1 - keep) * n
        average.update(model)
    assert_close(average.model.weight.item(), mine)
    assert not average.model.weight.requires_grad
    with pytest.raises(ValueError, match="1.5"):
        EMA(model, decay=1.5)


def rates_of(**settings):
    model, x = a_line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []

    def loss_fn(net, batch):
        seen.append(optimizer.param_groups[0]["lr"])
        return line_loss(net, batch)

    fit(model, itertools.repeat(x), loss_fn, optimizer=optimizer, progress=False, **settings)
    return torch.tensor(seen) / 0.1


def test_the_rate_rises_then_stays_or_falls():
    constant = rates_of(steps=50, warmup=9)
    assert_close(constant[:10], torch.arange(1, 11) / 10)
    assert (constant[9:] == 1).all()
    cosine = rates_of(steps=50, warmup=10, decay="cosine")
    assert (cosine[10:].diff() < 0).all() and 0 < cosine[-1] < 0.01 and cosine[10] > 0.99
    cooldown = rates_of(steps=50, decay="cooldown")
    assert (cooldown[:40] == 1).all() and (cooldown[41:].diff() < 0).all() and 0 < cooldown[-1] <= 0.1
    longer = rates_of(steps=100, decay="cooldown")
    assert torch.equal(cooldown[:40], longer[:40])  # a run may be made longer while it lasts


def test_clipping_bounds_the_step():
    model, x = a_line()
    before = [p.detach().clone() for p in model.parameters()]
    fit(model, itertools.repeat(1000 * x), line_loss, steps=1, clip=0.5, progress=False,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0))
    moved = sum((p - q).square().sum() for p, q in zip(model.parameters(), before, strict=True)).sqrt()
    assert moved <= 0.5 + 1e-4


def test_bfloat16_learns_the_line_too():
    model, x = a_line()
    run = fit(model, itertools.repeat(x), line_loss, steps=300, lr=0.05, precision="bfloat16", progress=False)
    assert run.losses[-1] < 0.01 and model.weight.dtype == torch.float32


@pytest.mark.parametrize("stop", [1, 2, 5, 9])
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(stop, tmp_path):
    """Batches of 16 of 40 images: it stops inside an epoch and at its edge."""
    unbroken = noisy_run(10)
    state = tmp_path / "run.safetensors"
    first = noisy_run(stop, save_to=state)
    assert first.steps == stop
    same(noisy_run(10, save_to=state), unbroken)
    same(noisy_run(10, save_to=state), unbroken)  # a finished run stays finished


def test_a_run_looked_at_in_between_is_the_unbroken_one(tmp_path):
    """Unlike a run cut to fewer steps, it keeps the learning rate of the whole."""
    x = a_line()[1]

    def go(until, save_to=None):
        torch.manual_seed(0)
        return fit(nn.Linear(1, 1), itertools.repeat(x), line_loss, steps=12, until=until, lr=0.1, warmup=2,
                   decay="cosine", ema=0.9, save_to=save_to, progress=False)

    whole, state = go(None), tmp_path / "run.safetensors"
    first = go(5, state)
    assert first.steps == 5 and torch.equal(first.losses, whole.losses[:5])
    assert go(3, state).steps == 5  # an earlier moment has passed
    same(go(99, state), whole)


def test_a_plain_iterator_is_advanced_to_where_it_was(tmp_path):
    def counting():
        for i in itertools.count():
            yield torch.full((4, 1), float(i))

    def run(steps, save_to=None):
        model, _ = a_line()
        return fit(model, counting(), line_loss, steps=steps, lr=1e-3, save_to=save_to, progress=False)

    run(4, tmp_path / "s.safetensors")
    assert torch.equal(run(9, tmp_path / "s.safetensors").losses, run(9).losses)


@pytest.mark.parametrize("kind", ["draws", "shuffles"])
def test_an_iterator_that_draws_from_torch_itself_is_resumed_too(kind, tmp_path):
    """Advancing it spends random numbers: the random states come back after that, not before."""
    def drawing():
        while True:
            yield torch.randn(4, 1)

    def shuffled():
        return torch.utils.data.DataLoader(torch.arange(40.0)[:, None], batch_size=4, shuffle=True)

    def noisy_loss(model, x):
        return line_loss(model, x + torch.randn_like(x))

    def run(steps, save_to=None):
        model, _ = a_line()
        return fit(model, drawing() if kind == "draws" else shuffled(), noisy_loss, steps=steps, lr=1e-3,
                   save_to=save_to, progress=False)

    run(4, tmp_path / "s.safetensors")
    same(run(9, tmp_path / "s.safetensors"), run(9))


def test_a_state_that_cannot_be_written_leaves_the_old_one_and_no_litter(tmp_path, monkeypatch):
    state = tmp_path / "run.safetensors"
    noisy_run(2, save_to=state)
    before = state.read_bytes()

    def full(*paths):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        noisy_run(4, save_to=state)
    assert state.read_bytes() == before and list(tmp_path.iterdir()) == [state]


@pytest.mark.parametrize("major, wanted", [(7, torch.float16), (8, torch.bfloat16), (9, torch.bfloat16)])
def test_auto_precision_takes_what_the_gpu_does_itself(major, wanted, monkeypatch):
    """A T4 says yes to bfloat16 and emulates it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    assert training._autocast_dtype("auto", torch.device("cuda")) is wanted


def test_auto_precision_is_plain_on_a_torch_that_cannot_tell(monkeypatch):
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    assert training._autocast_dtype("auto", torch.device("cpu")) is None


KILLED = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
import test_training
run = test_training.noisy_run(400, save_to={state!r}, save_every=0.0)
print(run.steps)
"""


def test_killed_at_random_moments_it_ends_with_the_same_weights(tmp_path):
    state = tmp_path / "run.safetensors"
    code = KILLED.format(tests=str(ROOT / "tests"), root=str(ROOT), state=str(state))
    for seed in range(3):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        while not state.exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(random.Random(seed).uniform(0.02, 0.4))
        process.send_signal(signal.SIGKILL)
        process.wait()
    same(noisy_run(400, save_to=state), noisy_run(400))
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["run.safetensors"]


@pytest.mark.parametrize("harm", ["cut", "altered", "foreign"])
def test_a_damaged_state_is_refused_by_name(harm, tmp_path):
    state = tmp_path / "run.safetensors"
    noisy_run(3, save_to=state)
    whole = bytearray(state.read_bytes())
    if harm == "cut":
        state.write_bytes(whole[: len(whole) // 2])
    elif harm == "altered":
        whole[-5] ^= 1
        state.write_bytes(whole)
    else:
        model, x = a_line()
        with pytest.raises(ValueError, match="run.safetensors belongs to another model"):
            fit(model, itertools.repeat(x), line_loss, steps=5, ema=0.9, save_to=state, progress=False)
        return
    with pytest.raises(ValueError, match="run.safetensors"):
        noisy_run(5, save_to=state)


def test_control_c_keeps_what_was_learned(tmp_path):
    model, x = a_line()
    calls = itertools.count(1)

    def loss_fn(net, batch):
        if next(calls) == 8:
            raise KeyboardInterrupt
        return line_loss(net, batch)

    run = fit(model, itertools.repeat(x), loss_fn, steps=100, save_to=tmp_path / "s.safetensors", progress=False)
    assert run.interrupted and run.steps == 7
    after = fit(model, itertools.repeat(x), line_loss, steps=10, save_to=tmp_path / "s.safetensors", progress=False)
    assert after.steps == 10 and torch.equal(after.losses[:7], run.losses)


@pytest.mark.parametrize("where", ["the batch", "the loss", "the gradient"])
def test_after_control_c_a_run_goes_on_as_if_nothing_had_been(tmp_path, where):
    images = Images(torch.arange(32, dtype=torch.uint8).repeat_interleave(16).view(32, 1, 4, 4), None, "ramp", "here")

    def run(steps, pressed_in=None):
        rng, model = torch.Generator().manual_seed(1), a_line(4)[0]
        calls = itertools.count(1)

        def press(now):
            if now == where and next(calls) == pressed_in:
                signal.raise_signal(signal.SIGINT)

        def loss_fn(net, batch):
            x = batch.x[:, 0, 0, :1]
            x = x + torch.randn(x.shape, generator=rng)
            press("the loss")
            found = line_loss(net, x)
            found.register_hook(lambda slope: press("the gradient"))
            return found

        stream = batches(images, 4, torch.Generator().manual_seed(2))
        if where == "the batch":
            stream = Pressing(stream, press)
        save_to = tmp_path / "s.safetensors" if pressed_in or steps == 21 else None
        return fit(model, stream, loss_fn, steps=20, ema=0.9, decay="cosine", rng=rng, save_to=save_to, progress=False)

    handler = signal.getsignal(signal.SIGINT)
    first = run(20, pressed_in=7)
    assert first.interrupted and first.steps == 7 and signal.getsignal(signal.SIGINT) is handler
    resumed, whole = run(21), run(20)
    assert not resumed.interrupted and torch.equal(resumed.losses, whole.losses)
    assert all(torch.equal(a, b) for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True))


def test_pressed_twice_control_c_does_not_wait_for_the_step():
    def loss_fn(net, x):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("this is after the second one")

    handler = signal.getsignal(signal.SIGINT)
    model, x = a_line()
    assert fit(model, itertools.repeat(x), loss_fn, steps=3, progress=False).steps == 0
    assert signal.getsignal(signal.SIGINT) is handler


def test_training_in_a_thread_leaves_control_c_alone():
    model, x = a_line()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(fit, model, itertools.repeat(x), line_loss, steps=2, progress=False).result().steps == 2


def test_the_callers_optimizer_keeps_its_rate(tmp_path):
    (model, x), (other, _) = a_line(), a_line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = partial(fit, batches=itertools.repeat(x), loss_fn=line_loss, steps=10, decay="cosine", progress=False)
    run(model, until=5, save_to=tmp_path / "s", optimizer=optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.1
    run(model, save_to=tmp_path / "s", optimizer=optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.1
    run(other, optimizer=torch.optim.SGD(other.parameters(), lr=0.1))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    (model, x), state = a_line(), tmp_path / "s.safetensors"
    fit(model, itertools.repeat(x), line_loss, steps=3, save_to=state, progress=False)
    before, calls = state.read_bytes(), itertools.count(1)

    def loss_fn(net, batch):  # finite, but with a slope of 0 * inf in the last step
        loss = line_loss(net, batch)
        return loss + (0 * net(batch)).abs().sum().sqrt() if next(calls) == 3 else loss

    with pytest.raises(FloatingPointError, match="a weight is no longer finite"):
        fit(model, itertools.repeat(x), loss_fn, steps=6, save_to=state, progress=False)
    assert state.read_bytes() == before


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_file(tmp_path):
    model, x = a_line()
    state = tmp_path / "s.safetensors"
    fit(model, itertools.repeat(x), line_loss, steps=3, save_to=state, progress=False)
    before = state.read_bytes()
    with pytest.raises(FloatingPointError, match="nan"):
        fit(model, itertools.repeat(x * float("nan")), line_loss, steps=6, save_to=state, progress=False)
    assert state.read_bytes() == before


@pytest.mark.parametrize("settings, words", [
    ({"steps": 0}, "steps >= 1"), ({"steps": 1, "until": 0}, "until >= 1"),
    ({"steps": 2, "until": 1}, "save_to"), ({"steps": 1, "lr": 0.0}, "lr > 0"), ({"steps": 1, "warmup": -1}, "warmup"),
    ({"steps": 1, "decay": "step"}, "'step'"), ({"steps": 1, "precision": "half"}, "'half'"),
    ({"steps": 1, "precision": "float16"}, "CUDA"), ({"steps": 1, "ema": 1.0}, "1.0")])
def test_settings_that_cannot_be_right(settings, words):
    model, x = a_line()
    with pytest.raises(ValueError, match=words):
        fit(model, itertools.repeat(x), line_loss, progress=False, **settings)


def test_batches_that_run_out_are_named():
    model, x = a_line()
    with pytest.raises(ValueError, match="after 2 of 5 steps"):
        fit(model, [x, x], line_loss, steps=5, progress=False)


def test_the_bar_goes_to_stderr_and_leaves_nothing_on_stdout(capsys):
    model, x = a_line()
    fit(model, itertools.repeat(x), line_loss, steps=3)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("device", [d for d, there in (
    ("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())) if there])
def test_mixed_precision_on_the_accelerator(device):
    model, x = a_line()
    run = fit(model.to(device), itertools.repeat(x.to(device)), line_loss, steps=300, lr=0.05,
              precision="auto", progress=False)
    assert run.losses[-1] < 0.01


def torchrun(processes, out, steps=5):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
               "-m", "coursekit", "train", "mnist-classifier", "--steps", str(steps), "--out", str(out)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    from safetensors import safe_open
    with safe_open(out / "mnist-classifier.state.safetensors", "pt") as file:
        return file.get_tensor("losses")


def test_two_processes_show_the_loss_curve_of_one(tmp_path):
    """Same batches, each process half of each, gradients averaged: the same descent to rounding."""
    one, two = torchrun(1, tmp_path / "one"), torchrun(2, tmp_path / "two")
    assert len(one) == 5 and one[-1] < one[0]
    assert_close(two, one, atol=0.02, rtol=0.01)
    card = json.loads((tmp_path / "two" / "mnist-classifier.json").read_text())
    assert card["steps"] == 5 and card["images"] == 60_000


@pytest.mark.parametrize("variable, settings, shown", [
    ("0", {}, True), ("1", {}, False), ("0", {"progress": False}, False)])
def test_the_bar_shows_unless_the_caller_or_the_environment_hides_it(variable, settings, shown, monkeypatch, capsys):
    monkeypatch.setenv("TQDM_DISABLE", variable)
    model, x = a_line()
    fit(model, itertools.repeat(x), line_loss, steps=2, label="a line", **settings)
    assert ("a line" in capsys.readouterr().err) == shown
