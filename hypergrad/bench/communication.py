"""What an upper step of a data-parallel engine sends and holds, by method; and what that predicts for larger runs.

`python -m hypergrad.bench.communication` prints the tables of docs/scaling.md.
"""

from __future__ import annotations

import multiprocessing as mp
import resource
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import hypergrad as hg

WIDTH = 1000
STEPS = 4

METHODS: dict[str, Callable[[], hg.Method]] = {
    "Implicit(CG(5))": lambda: hg.Implicit(hg.CG(5, rtol=0.0)),
    "Implicit(Neumann(5))": lambda: hg.Implicit(hg.Neumann(5, step_size=0.01)),
    "Unrolled()": lambda: hg.Unrolled(),
    "OneStep()": lambda: hg.OneStep(),
    "FiniteDifference()": lambda: hg.FiniteDifference(),
    "SAMA()": lambda: hg.SAMA(),
    "Penalty(steps=5)": lambda: hg.Penalty(steps=5),
}


def _engine(method: hg.Method) -> hg.Engine:
    """Return two levels over WIDTH^2 lower parameters; the upper ones are few."""
    torch.manual_seed(0)
    net, scale = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(1, 1)
    batch = torch.randn(8, WIDTH)

    def lower_loss(models: Any, x: Tensor) -> Tensor:
        fit: Tensor = (models.net(x) - x).square().mean()
        decay: Tensor = models.scale.weight.exp().squeeze() * models.net.weight.square().sum()
        return fit + 1e-3 * decay

    lower = hg.Problem(
        "net",
        module=net,
        loss=lower_loss,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.01),
        data=[batch],
        steps=STEPS,
        method=method,
    )
    upper = hg.Problem(
        "scale",
        module=scale,
        loss=lambda models, x: models.net(x).square().mean(),
        optimizer=torch.optim.SGD(scale.parameters(), lr=0.01),
        data=[batch],
    )
    return hg.Engine([lower, upper], product_check=False, distributed=True)


def _measure(rank: int, size: int, folder: str, name: str) -> None:
    """Write how often and how much is reduced in the second upper step, and the growth of the process's peak memory."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    sent: list[int] = []
    reduce = dist.all_reduce

    def counting(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        sent.append(tensor.numel())
        return reduce(tensor, *arguments, **options)

    dist.all_reduce = counting
    engine = _engine(METHODS[name]())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    engine.step()
    sent.clear()
    engine.step()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if rank == 0:
        vectors, held = sum(sent) / WIDTH**2, grown * 1024 / (4 * WIDTH**2)
        Path(folder, "out").write_text(f"{len(sent)} {vectors:.2f} {held:.1f}")
    dist.barrier()
    dist.destroy_process_group()


def measured(size: int = 2) -> list[tuple[str, int, float, float]]:
    """Return for each method: all-reduces an upper step, vectors sent, vectors by which the peak grew."""
    rows, fork = [], mp.get_context("fork")
    for name in METHODS:
        with tempfile.TemporaryDirectory() as folder:
            processes = [fork.Process(target=_measure, args=(rank, size, folder, name)) for rank in range(size)]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
            count, vectors, held = Path(folder, "out").read_text().split()
        rows.append((name, int(count), float(vectors), float(held)))
    return rows


@dataclass(frozen=True)
class Cluster:
    """What a prediction assumes of the devices."""

    ranks: int
    bytes_per_second: float
    """Of each rank in a ring all-reduce of a large message."""
    seconds_per_message: float
    flops: float = 4e14
    """Sustained by each device: 40% of an H100's dense bf16 peak."""
    tokens: float = 16384.0
    """Each rank's part of a batch."""


def seconds(cluster: Cluster, parameters: float, gradients: int, products: int) -> tuple[float, float]:
    """Return the seconds of one upper step spent computing, and communicating where nothing overlaps.

    A gradient is 6 operations a parameter and token, a product twice that; each sends one float32 vector around.
    """
    compute = (gradients + 2 * products) * 6 * parameters * cluster.tokens / cluster.flops
    message = 2 * (cluster.ranks - 1) / cluster.ranks * 4 * parameters / cluster.bytes_per_second
    return compute, (gradients + products) * (message + cluster.seconds_per_message)


CLUSTERS = (Cluster(8, 2e11, 3e-5), Cluster(64, 4e10, 1e-4))
"""One node with NVLink; eight nodes, a 400 Gb/s link for each device."""

STEP: dict[str, tuple[int, int]] = {  # gradients and products that send a lower vector, with k lower steps
    "Implicit(CG(5))": (STEPS + 2, 5),  # the outer gradient, and F with the first product
    "Unrolled()": (2 * STEPS + 1, STEPS),
    "OneStep()": (STEPS + 2, 0),
    "FiniteDifference()": (STEPS + 1, 0),
    "SAMA()": (STEPS + 2, 0),
}


SHARD_STEP: dict[str, int] = {  # forward and backward passes through everything
    "FiniteDifference() on shards": STEPS + 3,  # the outer gradient and both ends of the difference
    "SAMA() on shards": STEPS + 4,
}
GATHERED = 1.5
"""What a pass sends on shards over what an all-reduce does: parameters gathered twice, gradients scattered once."""


def main() -> int:
    """Print both tables as Markdown."""
    print(f"| method | all-reduces an upper step ({STEPS} lower steps) | lower vectors sent | peak growth, vectors |")
    print("|---|---|---|---|")
    for name, count, vectors, held in measured():
        print(f"| `{name}` | {count} | {vectors:.2f} | {held:.1f} |")
    print("\n| method | parameters | GPUs | computing, s | communicating, s |\n|---|---|---|---|---|")
    for name, (gradients, products) in STEP.items():
        for parameters in (1e8, 1e10):
            for cluster in CLUSTERS:
                compute, talk = seconds(cluster, parameters, gradients, products)
                print(f"| `{name}` | {parameters:.0e} | {cluster.ranks} | {compute:.2f} | {talk:.2f} |")
    for name, passes in SHARD_STEP.items():
        for parameters in (1e8, 1e10):
            for cluster in CLUSTERS:
                compute, talk = seconds(cluster, parameters, passes, 0)
                print(f"| `{name}` | {parameters:.0e} | {cluster.ranks} | {compute:.2f} | {GATHERED * talk:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
