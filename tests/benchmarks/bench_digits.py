"""How good are the digits, and how soon? What the cards of `mnist-ddpm` and `mnist-class` report.

python tests/benchmarks/bench_digits.py race [--seconds 300]   training time against Frechet distance, with rivals
python tests/benchmarks/bench_digits.py arms [--steps 1000]    short runs that differ in one thing
python tests/benchmarks/bench_digits.py samplers               `mnist-ddpm`: Frechet distance by evaluations
python tests/benchmarks/bench_digits.py asked                  `mnist-class`, told the digit: the same

With --write, arms and samplers put their tables on the card of `mnist-ddpm`, from which notebook 04 reads them, and
asked puts its own on that of `mnist-class`.

Time is this process's CPU time over two, in training only: seconds on two otherwise idle cores. Frechet distances are
those of the shipped classifier's features to the 10,000 test digits. Real digits have one too, the floor, which falls
with their number, so the race is decided by what a method has above the floor: less than EXCESS wins.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from coursekit import checkpoints, data, measures
from coursekit.denoisers import Denoiser, drop_labels, from_eps, from_v, from_x0, guided, switched
from coursekit.diffusion import (
    min_snr_weight,
    noise_prediction_loss,
    v_prediction_loss,
    x0_prediction_loss,
)
from coursekit.fetch import shipped
from coursekit.metrics import features, frechet_distance
from coursekit.nets import UNet
from coursekit.recipes import LATE, LATER
from coursekit.samplers import euler, last
from coursekit.schedules import StraightPath, cosine_schedule, linear_schedule
from coursekit.training import EMA, fit

EXCESS = 0.21  # in floors of 5,000 digits: 6.4, which brings them to 7.4 of them
N = 1000  # digits for one point of the race


class Judge:
    """Frechet distance of digits to the test set, less that of as many training digits."""

    def __init__(self) -> None:
        self.test, self.see = data.load("mnist", "test"), features("mnist")
        self.real = self.see(self.test.to_float())
        self.training = self.see(data.load("mnist", limit=10_000).to_float())

    def distance(self, digits: Tensor) -> float:
        return frechet_distance(self.see(digits), self.real).item()

    def floor(self, n: int) -> float:
        """The mean over the disjoint sets of n among 10,000 training digits."""
        parts = self.training.split(n)
        return sum(frechet_distance(part, self.real).item() for part in parts) / len(parts)

    def draw(self, denoise: Denoiser, n: int, steps: int, ancestral: bool = True, schedule: Any = None) -> Tensor:
        return measures.draw(denoise, schedule or cosine_schedule(), n, steps, self.test, ancestral)


@dataclass
class Runner:
    """One way to learn to draw digits: a training step, and n digits from what was learned."""

    step: Callable[[float], None]  # given the share of the budget that is spent
    draw: Callable[[int], Tensor]
    parameters: int


def ours(judge: Judge) -> Runner:
    """The network of `mnist-class`, asked for x_0 as `mnist-ddpm` is, with a learning rate that ends with the budget.

    Guidance 1.5, 25 steps.
    """
    torch.manual_seed(0)
    model, schedule = UNet(1, (32, 64), blocks=1, classes=10), replace(cosine_schedule(), focus=LATER)
    average = EMA(model, 0.995)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
    rng = torch.Generator().manual_seed(0)
    batches = data.batches(data.load("mnist"), 64, rng)
    done = 0

    def step(spent: float) -> None:
        nonlocal done
        done += 1
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(done / 50, 1, 1.02 - spent)
        batch = next(batches)
        model.train()
        loss = x0_prediction_loss(model, batch.x, schedule, rng, label=drop_labels(batch.label, 0.15, rng))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(model)

    def draw(n: int) -> Tensor:
        label = torch.arange(measures.AT_ONCE) % 10
        asked, free = (from_x0(average.model, schedule, label=k) for k in (label, None))
        return judge.draw(guided(asked, free, 1.5), n, 25)
    return Runner(step, draw, count(model))


def diffusers_course(judge: Judge) -> Runner:
    """The class-conditioned digits of Hugging Face's diffusion course, unit 2; drawn by our 25 steps."""
    from diffusers import UNet2DModel

    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.label = nn.Embedding(10, 4)
            self.net = UNet2DModel(
                sample_size=28, in_channels=5, out_channels=1, layers_per_block=2, block_out_channels=(32, 64, 64),
                down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
                up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"))

        def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
            told = self.label(label)[:, :, None, None].expand(-1, -1, *x.shape[2:])
            out: Tensor = self.net(torch.cat([x, told], dim=1), t - 1).sample
            return out

    torch.manual_seed(0)
    model, schedule = Conditioned(), cosine_schedule()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    rng = torch.Generator().manual_seed(0)
    batches = data.batches(data.load("mnist"), 128, rng)

    def step(spent: float) -> None:
        batch = next(batches)
        model.train()
        loss = noise_prediction_loss(model, batch.x, schedule, rng, label=batch.label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def draw(n: int) -> Tensor:
        return judge.draw(from_eps(model, schedule, label=torch.arange(measures.AT_ONCE) % 10), n, 25)
    return Runner(step, draw, count(model))


def lucidrains(judge: Judge) -> Runner:
    """denoising-diffusion-pytorch with its README's settings and a network of dim 32: Adam 8e-5, batch 32, EMA."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    torch.manual_seed(0)
    model = Unet(32, dim_mults=(1, 2, 4), channels=1)
    diffusion = GaussianDiffusion(model, image_size=28, timesteps=1000, sampling_timesteps=25)
    average = copy.deepcopy(diffusion)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=8e-5, betas=(0.9, 0.99))
    batches = data.batches(data.load("mnist"), 32, torch.Generator().manual_seed(0))
    done = 0

    def step(spent: float) -> None:
        nonlocal done
        done += 1
        loss = diffusion((next(batches).x + 1) / 2)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        if done % 10 == 0:
            with torch.no_grad():
                weight = 0.005 if done > 100 else 1.0
                torch._foreach_lerp_(list(average.parameters()), list(diffusion.parameters()), weight)

    def draw(n: int) -> Tensor:
        parts = [average.sample(batch_size=min(250, n - i)) for i in range(0, n, 250)]
        return (torch.cat(parts) * 2 - 1).clamp(-1, 1)
    return Runner(step, draw, count(model))


RACE = {"coursekit, mnist-class": ours, "diffusers' course, unit 2": diffusers_course,
        "denoising-diffusion-pytorch": lucidrains}


def race(seconds: float, factor: float) -> None:
    """Everyone trains in turn, ours for `seconds`, the rivals for `factor` times as long; a line at each doubling."""
    judge = Judge()
    print(f"real digits at n = {N}: {judge.floor(N):.3f}, at 5,000: {judge.floor(5000):.3f}; "
          f"the race is for {judge.floor(N) + EXCESS:.3f}")
    for name, build in RACE.items():
        try:
            runner = build(judge)
        except ImportError as error:
            print(f"{name}: left out, {error.name} is not installed")
            continue
        budget = seconds if build is ours else seconds * factor
        print(f"{name}: {runner.parameters / 1e6:.2f} M parameters, {budget:.0f} s")
        for spent, steps in trained(runner, budget, marks=(budget / 4, budget / 2, budget)):
            distance = judge.distance(runner.draw(N))
            verdict = "under" if distance < judge.floor(N) + EXCESS else "not under"
            print(f"  {spent:6.0f} s {steps:6} steps: Frechet distance {distance:7.3f}, {verdict}", flush=True)


def trained(runner: Runner, budget: float, marks: tuple[float, ...]) -> Iterator[tuple[float, int]]:
    """Train until each mark (quiet seconds of training) and yield there."""
    spent, steps = 0.0, 0
    for mark in marks:
        while spent < mark:
            start = time.process_time()
            runner.step(spent / budget)
            spent += (time.process_time() - start) / 2
            steps += 1
        yield spent, steps


def arms(steps: int, write: bool) -> None:
    """Short runs of one network that differ in one thing each, judged by 1,000 digits in 25 steps.

    The steps are ancestral, except on the straight path, which has Euler's and no fresh noise.
    """
    cosine = cosine_schedule()
    late, later = (replace(cosine, focus=focus) for focus in (LATE, LATER))
    straight, ddpm = StraightPath(), linear_schedule()

    def loss(kind: Callable, path: Any, **more: Any) -> Callable:
        return lambda model, batch, rng: kind(model, batch.x, path, rng, **more)

    found, judge = {}, Judge()
    v, x0, eps = v_prediction_loss, x0_prediction_loss, noise_prediction_loss
    for name, loss_fn, read, path, settings in [
            ("v", loss(v, cosine), from_v, cosine, {}),
            ("x0", loss(x0, cosine), from_x0, cosine, {}),
            ("eps", loss(eps, cosine), from_eps, cosine, {}),
            ("eps, linear schedule", loss(eps, ddpm), from_eps, ddpm, {}),
            ("v, logit-normal t", loss(v, late), from_v, cosine, {}),
            ("x0, logit-normal t", loss(x0, late), from_x0, cosine, {}),
            ("x0, logit-normal t, later", loss(x0, later), from_x0, cosine, {}),
            ("v, min-SNR weights", loss(v, cosine, weight=min_snr_weight("v")), from_v, cosine, {}),
            ("v, straight path", loss(v, straight), from_v, straight, {}),
            ("v, no average", loss(v, cosine), from_v, cosine, {"ema": None}),
            ("v, constant rate", loss(v, cosine), from_v, cosine, {"decay": "constant"})]:
        torch.manual_seed(0)
        rng = torch.Generator().manual_seed(1)
        model = UNet(1, (32, 64), blocks=1, attention=(1,), T=1.0 if path is straight else 1000)
        batches = data.batches(data.load("mnist"), 64, torch.Generator().manual_seed(0))
        run = fit(model, batches, lambda net, batch, f=loss_fn, g=rng: f(net, batch, g), steps=steps, rng=rng,
                  label=name, **{"lr": 2e-3, "warmup": 50, "decay": "cosine", "ema": 0.995, "clip": 1.0} | settings)
        if path is straight:
            noise = torch.randn(N, 1, 28, 28, generator=torch.Generator().manual_seed(0))
            times = torch.linspace(1, 0, 26).tolist()
            digits = torch.cat([last(euler(from_v(run.model, straight), part, straight, times)).x.clamp(-1, 1)
                                for part in noise.split(500)])
        else:
            digits = judge.draw(read(run.model, path), N, 25, schedule=path)
        found[name] = round(judge.distance(digits), 3)
        print(f"  {name:24} {found[name]:.3f}", flush=True)
    if write:
        note({"Frechet distance of short runs by prediction": found,
              "short runs": f"{steps:,} steps of 64, {N:,} digits in 25 steps"})


def samplers(write: bool, n: int = 500, guidance: float = 2.0, above: int = 300) -> None:
    """`mnist-ddpm` with few and with all of its steps, alone and guided by what it was after one epoch.

    The guided one asks twice where t >= above (autoguidance, Karras et al. 2024, where noise is strong), and each of
    them is counted. "ddim, later" takes shorter jumps where the noise is strong, t = T u^0.6.
    """
    judge = Judge()
    denoise, schedule = checkpoints.denoiser("mnist-ddpm")
    young, _ = checkpoints.denoiser("mnist-ddpm-epoch-1")
    led = switched(guided(denoise, young, guidance), denoise, above)
    few, table = (5, 10, 20, 50), dict[str, dict[str, float]]()
    for way, ask, power, counts in [
            ("ddim", denoise, 1.0, few), ("ddim, later", denoise, 0.6, few), ("ancestral", denoise, 1.0, (*few, 1000)),
            ("ddim, later, guided", led, 0.6, few), ("ancestral, guided", led, 1.0, few)]:
        table[way] = {}
        for steps in counts:
            times = schedule.spaced(steps, power)
            asked = steps if ask is denoise else steps + sum(t >= above for t in times)
            digits = measures.draw(ask, schedule, n, times, judge.test, way.startswith("ancestral"))
            table[way][str(asked)] = round(judge.distance(digits), 4)
            print(f"  {way:20} {steps:5} steps, {asked:5} evaluations: {table[way][str(asked)]:.4f}", flush=True)
    print(f"  real digits: {judge.floor(n):.4f}")
    digits = measures.draw(led, schedule, 5000, 50, judge.test)
    best = {"Frechet distance of 5,000 samples guided by their own first epoch, 50 ancestral steps":
            round(judge.distance(digits), 4)}
    print(best, flush=True)
    if write:
        note(best | {"Frechet distance by evaluations": table, "guided": f"w = {guidance:g} where t >= {above}",
                     "drawn for each number of evaluations": f"{n:,} digits; real ones: {judge.floor(n):.3f}"})


def asked(write: bool, n: int = 1000) -> None:
    """`mnist-class`, told which digit to draw, with few and with all of its steps."""
    judge, label = Judge(), torch.arange(500) % 10
    denoise, schedule = checkpoints.denoiser("mnist-class", label=label)
    table: dict[str, float] = {}
    for way, steps, power in [("ddim", 10, 1.0), ("ddim, later", 10, 0.6), ("ddim", 20, 1.0), ("ddim", 50, 1.0),
                              ("ancestral", 10, 1.0), ("ancestral", 20, 1.0), ("ancestral", 50, 1.0),
                              ("ancestral", 1000, 1.0)]:
        digits = measures.draw(denoise, schedule, n, schedule.spaced(steps, power), judge.test, way == "ancestral")
        table[f"{way}, {steps}"] = round(judge.distance(digits), 4)
        print(f"  {way:12} {steps:5} evaluations: {table[f'{way}, {steps}']:.4f}", flush=True)
    if write:
        note({"Frechet distance by sampler and evaluations": table, "drawn for each sampler":
              f"{n:,} digits, 0 to 9 in turn; real ones: {judge.floor(n):.3f}"}, "mnist-class")


def note(found: dict[str, Any], name: str = "mnist-ddpm") -> None:
    """Put what was measured on a card."""
    model: Any = checkpoints.pretrained(name)
    card = replace(model.card, metrics=model.card.metrics | found)
    checkpoints.save(model, shipped("checkpoints", f"{name}.safetensors"), card)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["race", "arms", "samplers", "asked"])
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--factor", type=float, default=10, help="how much longer rivals may train")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    if given.what == "race":
        race(given.seconds, given.factor)
    elif given.what == "arms":
        arms(given.steps, given.write)
    elif given.what == "samplers":
        samplers(given.write)
    else:
        asked(given.write)


if __name__ == "__main__":
    main()
