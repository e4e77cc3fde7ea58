"""How much faster is per-pixel filtering by shifted multiply-adds than by `unfold`?

python tests/benchmarks/bench_filtering.py [--device cuda] [--batch 32] [--size 64] [--rounds 9]

All methods are timed in turn, round after round, so that whatever else the machine does meets all of
them; the table holds medians and their ratio to the first row. On a GPU two more rows show what the
compiler makes of either.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from coursekit.nets.filtering import _padded, _shifted_sum, apply_kernels

Filter = Callable[[Tensor, Tensor], Tensor]


def by_unfold(x: Tensor, kernels: Tensor) -> Tensor:
    """The usual way: copy every pixel's 25 neighbours, multiply, sum."""
    b, c, h, w = x.shape
    patches = F.unfold(_padded(x), 5).view(b, c, 25, h, w)
    return (patches * kernels[:, None]).sum(2)


def by_einsum(x: Tensor, kernels: Tensor) -> Tensor:
    b, c, h, w = x.shape
    patches = F.unfold(_padded(x), 5).view(b, c, 25, h, w)
    return torch.einsum("bckyx,bkyx->bcyx", patches, kernels)


def by_autograd(x: Tensor, kernels: Tensor) -> Tensor:
    """Shifted multiply-adds with autograd's own backward."""
    return _shifted_sum(_padded(x), kernels)


def measure(method: Filter, x: Tensor, kernels: Tensor, backward: bool) -> float:
    """Milliseconds for one call."""
    synchronise(x)
    start = time.perf_counter()
    out = method(x, kernels)
    if backward:
        torch.autograd.grad(out, (x, kernels), torch.ones_like(out))
    synchronise(x)
    return 1000 * (time.perf_counter() - start)


def synchronise(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    rng = torch.Generator().manual_seed(0)
    shape = (args.batch, 3, args.size, args.size)
    x = torch.randn(shape, generator=rng).to(args.device).requires_grad_()
    kernels = torch.randn(args.batch, 25, *shape[2:], generator=rng).tanh().to(args.device).requires_grad_()

    methods: dict[str, Filter] = {"unfold, multiply, sum": by_unfold, "unfold, einsum": by_einsum,
                                  "shifted, autograd": by_autograd, "apply_kernels": apply_kernels}
    if x.is_cuda:
        methods |= {"unfold, compiled": torch.compile(by_unfold),
                    "apply_kernels, compiled": torch.compile(apply_kernels)}
    times: dict[tuple[str, bool], list[float]] = {(name, b): [] for name in methods for b in (False, True)}
    for round_ in range(args.rounds + 2):
        for (name, backward), seen in times.items():
            milliseconds = measure(methods[name], x, kernels, backward)
            if round_ >= 2:  # the first two warm up and compile
                seen.append(milliseconds)
    median = {key: statistics.median(seen) for key, seen in times.items()}
    first = next(iter(methods))
    print(f"batch {args.batch}, 3 x {args.size} x {args.size}, {args.device}, "
          f"{torch.get_num_threads()} threads, medians of {args.rounds}")
    print(f"{'method':26}{'forward':>12}{'':9}{'forward and backward':>21}")
    for name in methods:
        f, fb = median[name, False], median[name, True]
        print(f"{name:26}{f:9.2f} ms {median[first, False] / f:6.1f}x{fb:13.2f} ms "
              f"{median[first, True] / fb:6.1f}x")


if __name__ == "__main__":
    main()
