"""One training loop for the whole course. It knows nothing about diffusion; the loss does.

`train` is the loop itself. `fit` is for runs that outlast a cup of tea: a progress bar, an averaged model, mixed
precision, several processes, and a file from which a killed run goes on, bit for bit.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

LossFn = Callable[[nn.Module, Any], Tensor]


class Update(NamedTuple):
    """What one optimizer step did."""

    step: int
    loss: Tensor  # detached; call .item() when you want to wait for the GPU


def train(model: nn.Module, batches: Iterable, loss_fn: LossFn,
          optimizer: torch.optim.Optimizer) -> Iterator[Update]:
    """One optimizer step per batch. The caller logs, samples, stops."""
    for step, batch in enumerate(batches, start=1):
        model.train()
        loss = loss_fn(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield Update(step, loss.detach())


class EMA:
    """A copy of the model whose weights trail the trained ones: `.model`, smoother and better to sample.

    After n updates the decay is min(decay, (1 + n) / (10 + n)), so that the copy forgets the random
    start quickly. Buffers (counts, running means) are copied, not averaged.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999):
        if not 0 <= decay < 1:
            raise ValueError(f"the decay must lie in [0, 1), got {decay}")
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the copy a little towards `model`."""
        keep = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - keep)
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)


@dataclass
class Run:
    """What `fit` leaves behind."""

    model: nn.Module  # the averaged model if there is one, else the trained one; in eval mode
    losses: Tensor  # (steps done,) float32 on the CPU, one per step since step 1
    seconds: float  # spent training, resumed parts included
    interrupted: bool  # True if Ctrl-C ended it early

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return len(self.losses)


def fit(model: nn.Module, batches: Iterable, loss_fn: LossFn, *, steps: int, until: int | None = None,
        lr: float = 1e-3, optimizer: torch.optim.Optimizer | None = None, warmup: int = 0,
        decay: str = "constant", ema: float | None = None, clip: float | None = None, precision: str = "float32",
        rng: torch.Generator | None = None, save_to: str | Path | None = None, save_every: float = 60.0,
        progress: bool = True, label: str = "training") -> Run:
    """Train for `steps` optimizer steps, and go on from `save_to` if an earlier run left it there.

    until       stop after this step for now; a later call goes on from `save_to`, which it needs
    optimizer   fused AdamW at rate `lr` by default; its rate rises linearly over `warmup` steps and
                then stays ("constant"), falls to zero along half a cosine ("cosine"), or stays and falls
                to zero over the last fifth ("cooldown"), so that a run may be made longer while it lasts
    ema, clip   decay of the averaged copy, returned instead of the model; the gradient's largest norm
    precision   "float32", "bfloat16", "float16" (CUDA), or "auto": the fastest the device has
    rng         the generator that `loss_fn` draws from: its state is saved and restored
    save_to     file for the whole state of the run, written atomically every `save_every` seconds and at the end
    batches     endless; if it has state_dict/load_state_dict (as `data.batches` does) a resumed run
                asks it to go on where it stopped, otherwise it is advanced from its beginning

    In a process group (torchrun) every process must see the same batches, drawn from a generator of their own,
    and trains on its share of each. Ctrl-C ends the loop after its step and keeps what was learned. Raises ValueError
    for settings that cannot be right or batches that run out, FloatingPointError if loss or weights stop being finite.
    """
    until = steps if until is None else min(steps, until)
    if until < 1 or warmup < 0 or not lr > 0:
        raise ValueError(f"need steps >= 1, until >= 1, warmup >= 0, lr > 0, got {steps}, {until}, {warmup}, {lr}")
    if until < steps and not save_to:
        raise ValueError(f"to stop at step {until} of {steps} and go on later, give a file in save_to")
    if decay not in ("constant", "cosine", "cooldown"):
        raise ValueError(f'decay must be "constant", "cosine" or "cooldown", got {decay!r}')
    device = next(model.parameters()).device
    dtype = _autocast_dtype(precision, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=lr, fused=device.type != "mps")
    rates = [group["lr"] for group in optimizer.param_groups]
    average = EMA(model, ema) if ema is not None else None
    run = _RunState(model, optimizer, average, scaler, batches, rng)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    net: nn.Module = DistributedDataParallel(model) if world > 1 else model

    begun = save_to is not None and Path(save_to).exists()
    before, seconds, source = run.load(Path(str(save_to))) if begun else (torch.empty(0), 0.0, iter(batches))
    done = len(before)
    # One tensor for all: thousands of small ones, each kept, would pin the memory that large ones have left.
    losses = torch.cat([before, torch.zeros(max(0, until - done))]).to(device)

    def save() -> None:
        _check_finite(losses[:done], model)
        if save_to is not None and rank == 0:
            run.save(Path(save_to), losses[:done], seconds + time.monotonic() - started)

    started = last_save = last_look = time.monotonic()
    hidden = not progress or rank > 0 or os.environ.get("TQDM_DISABLE") == "1"  # tqdm's notebooks do not look there
    bar = tqdm(total=steps, initial=done, desc=label, unit="step", leave=False, disable=hidden)
    pressed, let_go = _notice_ctrl_c()  # in the middle of a step nothing fits together: it ends first
    try:
        for step in range(done + 1, until + 1):
            if pressed:
                break
            batch = next(source, None)
            if batch is None:
                raise ValueError(f"the batches ran out after {step - 1} of {until} steps")
            if rank > 0:  # its own noise, and the same again after a resume
                for seed in (torch.manual_seed, *([rng.manual_seed] if rng else [])):
                    seed(step * world + rank)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * _rate_factor(step, steps, warmup, decay)
            model.train()
            with torch.autocast(device.type, dtype=dtype) if dtype else contextlib.nullcontext():
                loss = loss_fn(net, _share(batch, rank, world))
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            if clip is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
            if average is not None:
                average.update(model)
            losses[done] = loss.detach() / world
            if world > 1:
                dist.all_reduce(losses[done])  # the sum
            done = step
            bar.update()
            now = time.monotonic()
            if now - last_look > 0.5:  # rarely: reading a loss waits for the GPU
                last_look = now
                _check_finite(losses[:done])
                bar.set_postfix(loss=f"{losses[max(0, done - 50):done].mean().item():.4f}")
            if save_to is not None and now - last_save > save_every:
                save()
                last_save = time.monotonic()
    except KeyboardInterrupt:
        pass
    finally:
        let_go()
        bar.close()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate  # the caller's optimizer keeps the rate that it came with
    save()
    trained = average.model if average is not None else model
    return Run(trained.eval(), losses[:done].cpu(), seconds + time.monotonic() - started, done < until)


def _notice_ctrl_c() -> tuple[list[int], Callable[[], Any]]:
    """A list that is empty until Ctrl-C is pressed, and what puts the old handler back. A second one interrupts."""
    pressed: list[int] = []

    def note(number: int, frame: Any) -> None:
        pressed.append(number)
        if len(pressed) > 1:
            raise KeyboardInterrupt
    before = signal.getsignal(signal.SIGINT)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        return pressed, lambda: None  # it is ignored here, or somebody else's
    signal.signal(signal.SIGINT, note)
    return pressed, lambda: signal.signal(signal.SIGINT, before)


def _rate_factor(step: int, steps: int, warmup: int, decay: str) -> float:
    rise = min(1.0, step / (warmup + 1))
    if decay == "constant":
        return rise
    if decay == "cooldown":
        return min(rise, 5 * (steps - step + 1) / (steps + 1))
    along = max(0, step - warmup) / max(1, steps - warmup + 1)
    return rise * (1 + math.cos(math.pi * along)) / 2


def _autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    known = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if precision == "auto":
        if device.type == "cuda":  # before Ampere bfloat16 is only emulated
            return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
        fast = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)  # private: not in every torch
        return torch.bfloat16 if device.type == "cpu" and fast() else None
    if precision not in known:
        raise ValueError(f'precision must be "auto" or one of {sorted(known)}, got {precision!r}')
    if precision == "float16" and device.type != "cuda":
        raise ValueError(f"float16 training needs a CUDA device, this model is on {device}")
    return known[precision]


def _share(batch: Any, rank: int, world: int) -> Any:
    """This process's rows of a batch: a tensor, or a (named) tuple or dict of tensors and Nones."""
    if world == 1 or batch is None:
        return batch
    if isinstance(batch, Tensor):
        if len(batch) % world:
            raise ValueError(f"a batch of {len(batch)} cannot be shared equally by {world} processes")
        return batch[rank::world]
    if isinstance(batch, dict):
        return {key: _share(value, rank, world) for key, value in batch.items()}
    parts = [_share(value, rank, world) for value in batch]
    return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)


def _check_finite(losses: Tensor, model: nn.Module | None = None) -> None:
    found = losses[-1].item() if len(losses) else 0.0
    if not math.isfinite(found) or (model and not all(bool(p.isfinite().all()) for p in model.parameters())):
        what = "a weight is no longer finite" if math.isfinite(found) else f"the loss became {found}"
        raise FloatingPointError(f"{what}: a lower learning rate, a warm-up or clip=1.0 usually cures it; "
                                 "the last saved state is untouched")


@dataclass
class _RunState:
    """Everything that must come back for a run to go on bit for bit, as one safetensors file.

    No pickle: tensors go in as tensors, the rest as JSON in the header, with a sha256 of the tensors.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: EMA | None
    scaler: torch.amp.GradScaler
    batches: Any
    rng: torch.Generator | None

    def save(self, path: Path, losses: Tensor, seconds: float) -> None:
        """Write the state after len(losses) steps; a reader finds the old file or the new one, whole."""
        optimizer = self.optimizer.state_dict()
        parts = {"model": self.model.state_dict(),
                 "random": {name: get() for name, (get, _) in self._generators().items()},
                 "average": self.average.model.state_dict() if self.average else {},
                 "batches": self.batches.state_dict() if hasattr(self.batches, "state_dict") else {}}
        parts |= {f"optimizer.{i}": slots for i, slots in optimizer["state"].items()}
        flat = {f"{part}.{k}": v for part, state in parts.items() for k, v in state.items()} | {"losses": losses}
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in flat.items() if torch.is_tensor(v)}
        plain = {"flat": {k: v for k, v in flat.items() if not torch.is_tensor(v)},
                 "groups": optimizer["param_groups"], "scaler": self.scaler.state_dict(),
                 "updates": self.average.updates if self.average else 0, "seconds": seconds}
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            save_file(tensors, beside, {"run": json.dumps(plain), "sha256": _digest(tensors)})
            with open(beside, "rb+") as file:
                os.fsync(file.fileno())
            os.chmod(beside, 0o644)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)

    def load(self, path: Path) -> tuple[Tensor, float, Iterator]:
        """Put the state back; returns the losses so far, the seconds spent and the batches to come."""
        try:
            with safe_open(path, framework="pt") as file:
                flat: dict[str, Any] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                header = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is cut short or damaged ({error}); delete it to start again") from None
        if header.get("sha256") != _digest(flat):
            raise ValueError(f"{path} is damaged: its sha256 does not match; delete it to start again")
        plain = json.loads(header["run"])
        flat |= plain["flat"]

        def part(name: str) -> dict[str, Any]:
            return {k.removeprefix(f"{name}."): v for k, v in flat.items() if k.startswith(f"{name}.")}
        slots = {i: part(f"optimizer.{i}") for i in sorted({int(k.split(".")[0]) for k in part("optimizer")})}
        groups = [{k: tuple(v) if k == "betas" else v for k, v in g.items()} for g in plain["groups"]]
        try:
            self.model.load_state_dict(part("model"))
            if self.average is not None:
                self.average.model.load_state_dict(part("average"))
                self.average.updates = plain["updates"]
            self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path} belongs to another model or other settings: {error}") from None
        self.scaler.load_state_dict(plain["scaler"])
        if hasattr(self.batches, "load_state_dict"):
            self.batches.load_state_dict(part("batches"))
            source = iter(self.batches)
        else:  # before the random states come back, for it may draw from them
            source = iter(self.batches)
            deque(islice(source, len(flat["losses"])), maxlen=0)
        for name, (_, put) in self._generators().items():
            if name in (states := part("random")):
                put(states[name])
        return flat["losses"], plain["seconds"], source

    def _generators(self) -> dict[str, tuple[Callable[[], Tensor], Callable[[Tensor], None]]]:
        known = {"cpu": torch, "cuda": torch.cuda, "mps": torch.mps}
        there = {"cpu": torch.cpu, "cuda": torch.cuda, "mps": torch.backends.mps}
        found = {k: (m.get_rng_state, m.set_rng_state) for k, m in known.items() if there[k].is_available()}
        return found | ({"rng": (self.rng.get_state, self.rng.set_state)} if self.rng is not None else {})


def _digest(tensors: dict[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for key in sorted(tensors):
        sha.update(key.encode() + tensors[key].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
