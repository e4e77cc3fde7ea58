"""`coursekit doctor | data | train | sample | student | notebooks | fork`, each with --help."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coursekit.doctor import doctor

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["doctor", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status: 0, 1 if something was found wrong, 2 for a user's error."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except ModuleNotFoundError as error:
        print(f'coursekit: {error.name} is missing: pip install "coursekit[course]"', file=sys.stderr)
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"coursekit: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 2


def _doctor(arguments: argparse.Namespace) -> int:
    lines = doctor()
    print(*lines, sep="\n")
    return any(line.startswith("!!") for line in lines)


def _data(arguments: argparse.Namespace) -> int:
    from coursekit import data

    for name, source in data.available().items():
        print(f"{name:14} {source}")
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from coursekit import recipes

    if arguments.name is None:
        print(*recipes.available(), sep="\n")
        return 0
    run = recipes.train(arguments.name, out=arguments.out, steps=arguments.steps, device=arguments.device)
    if os.environ.get("RANK", "0") == "0":
        left = "stopped" if run.interrupted else "done"
        print(f"{left} after {run.steps} steps and {run.seconds:.0f} s; "
              f"the checkpoint is {arguments.out / arguments.name}.safetensors")
    return 130 if run.interrupted else 0


def _sample(arguments: argparse.Namespace) -> int:
    import torch

    from coursekit import viz

    out = arguments.out or Path(f"{arguments.name}.png")
    if out.suffix != ".png":  # before minutes of sampling, not after
        raise ValueError(f"pictures are saved as .png, got {out}")
    out.parent.mkdir(parents=True, exist_ok=True)
    rng = torch.Generator().manual_seed(arguments.seed)
    drawn = _drawn(arguments.name, arguments.n, arguments.steps, rng)
    viz.grid(drawn.clamp(-1, 1), alt=f"{arguments.n} samples of {arguments.name}").save(out)
    print(f"wrote {out}: {arguments.n} samples, seed {arguments.seed}")
    return 0


def _drawn(name: str, n: int, steps: int, rng: torch.Generator) -> Tensor:
    """n images (n, c, h, w) of a shipped checkpoint, through the decoder of its codes where it has one.

    A network that knows labels is asked for each in turn.
    """
    import torch

    from coursekit import checkpoints, data, nets, recipes, samplers, two_stage
    from coursekit.denoisers import clipped
    from coursekit.progress import progress
    from coursekit.schedules import StraightPath

    model: Any = checkpoints.pretrained(name)
    codes = isinstance(model, nets.PixelCNN)
    if not codes and not hasattr(model.schedule, "spaced"):  # no path, or one noise level only
        raise ValueError(f"{name!r} makes no images: it neither walks down from noise nor writes codes")
    recipe = recipes.recipe(model.card.recipe.split()[-1])  # a snapshot's is that of the run it was taken from
    coder: Any = checkpoints.pretrained(recipe.coder) if recipe.coder else None
    classes = model.config.get("classes", 0)
    told = {"label": torch.arange(n) % classes} if classes else {}
    if codes:
        return two_stage.decoded(coder, model.sample(n, rng, **told))
    schedule = model.schedule
    denoise = checkpoints.AS_DENOISER[model.predicts](model, schedule, **told)
    if coder is not None:
        z = two_stage.draw_latents(denoise, schedule, coder, n, rng=rng, steps=steps)
        return two_stage.decoded(coder, coder.quantize(z).codes)
    # A size on the recipe spares the download of a whole data set; only what is shipped does without one.
    side = recipe.size or data.load(recipe.data, split="test", limit=1).x.shape[-1]
    x = torch.randn((n, model.config["in_channels"], side, side), generator=rng)
    times = schedule.spaced(steps)
    walk = samplers.heun(denoise, x, schedule, times) if isinstance(schedule, StraightPath) else \
        samplers.ddim(clipped(denoise), x, schedule, times)
    return samplers.last(progress(walk, name, total=steps)).x


def _student(arguments: argparse.Namespace) -> int:
    from coursekit import notebooks

    arguments.out.mkdir(parents=True, exist_ok=True)
    for path in _chosen(arguments.notebooks):
        target = arguments.out / path.name
        if target.resolve() == path.resolve():
            raise ValueError(f"{path} would be overwritten by its own student edition: name another --out")
        notebooks.write(target, notebooks.student(notebooks.read(path)))
        print(f"wrote {target}")
    return 0


def _notebooks(arguments: argparse.Namespace) -> int:
    from coursekit import nbcheck, notebooks

    found = 0
    for path in _chosen(arguments.notebooks):
        if arguments.action == "check":
            complaints = nbcheck.check(path)
            found += len(complaints)
            print(*([f"!!  {path}: {line}" for line in complaints] or [f"ok  {path}"]), sep="\n")
        elif arguments.action == "clean":
            changed = notebooks.write(path, notebooks.clean(notebooks.read(path)))
            print(f"{'wrote' if changed else 'same '} {path}")
        else:
            print(f"{'wrote' if notebooks.execute(path) else 'same '} {path}", flush=True)
    return found > 0


def _fork(arguments: argparse.Namespace) -> int:
    from coursekit import notebooks

    root = notebooks.checkout(Path.cwd())
    for path in notebooks.fork(root, arguments.repository):
        print(f"wrote {path.relative_to(root)}")
    return 0


def _chosen(paths: list[Path]) -> list[Path]:
    """The notebooks named, or all of the course that the current folder lies in."""
    from coursekit import notebooks

    found = paths or sorted((notebooks.checkout(Path.cwd()) / "course").glob("*.ipynb"))
    if not found:
        raise ValueError("there is no notebook in course/")
    return found


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number, at least 1, is wanted, got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="coursekit", description="The tools of the course.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = commands.add_parser("doctor", help="what works here, and what to do about what does not")
    command.set_defaults(run=_doctor)

    command = commands.add_parser("data", help="the data sets, and where each would come from")
    command.set_defaults(run=_data)

    command = commands.add_parser("train", help="train a checkpoint by its recipe, or go on where it stopped")
    command.add_argument("name", nargs="?", help="a recipe; without one, the recipes are listed")
    command.add_argument("--steps", type=_count, help="optimizer steps, instead of the recipe's")
    command.add_argument("--out", type=Path, default=Path("runs"), help="folder to write to (runs)")
    command.add_argument("--device", choices=("cpu", "cuda", "mps"), help="the best there is by default")
    command.set_defaults(run=_train)

    command = commands.add_parser("sample", help="draw images with a checkpoint that comes with the course")
    command.add_argument("name", help="a checkpoint that makes images, such as cats-ddpm")
    command.add_argument("--n", type=_count, default=16, help="how many (16)")
    command.add_argument("--steps", type=_count, default=50, help="of the sampler that suits it; codes need none (50)")
    command.add_argument("--seed", type=int, default=0, help="of the noise (0)")
    command.add_argument("--out", type=Path, help="a .png file (NAME.png)")
    command.set_defaults(run=_sample)

    command = commands.add_parser("student", help="write the edition without solutions")
    command.add_argument("notebooks", nargs="*", type=Path, help="all of course/ by default")
    command.add_argument("--out", type=Path, default=Path("student"), help="folder to write to (student)")
    command.set_defaults(run=_student)

    command = commands.add_parser("notebooks", help="for authors: run, normalise or check notebooks")
    command.add_argument("action", choices=("execute", "clean", "check"))
    command.add_argument("notebooks", nargs="*", type=Path, help="all of course/ by default")
    command.set_defaults(run=_notebooks)

    command = commands.add_parser("fork", help="point badges and setup cells at your copy on GitHub")
    command.add_argument("repository", metavar="OWNER/REPO")
    command.set_defaults(run=_fork)
    return parser
