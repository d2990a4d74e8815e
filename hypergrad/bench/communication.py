"""What an upper step of several processes sends and holds, by method; and what that predicts for larger runs.

`python -m hypergrad.bench.communication` prints the tables of docs/scaling.md.
"""

from __future__ import annotations

import multiprocessing as mp
import pickle
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from hypergrad.bench.upper_step import METHODS, ON_SHARDS, STARTS, STEPS, Counted, Size, counted, held_bytes
from hypergrad.costs import communication
from hypergrad.costs.communication import Collective

SIZE = Size(width=256, blocks=4)
RANKS = (2, 4)
Case = tuple[str, bool]
"""A method, and whether on shards."""
CASES: tuple[Case, ...] = (*((name, False) for name in METHODS), *((name, True) for name in ON_SHARDS))


@dataclass(frozen=True)
class Measured:
    """What the first rank sent in one upper step, and the most that any rank's tensors held."""

    sent: Counted
    held_bytes: int


def _serve(rank: int, size: int, folder: str) -> None:
    """Measure every case as one of `size` processes; the first writes what it found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    found: dict[Case, Measured] = {}
    for case in CASES:
        name, sharded = case
        held = torch.tensor(held_bytes(name, SIZE, sharded=sharded))
        dist.all_reduce(held, op=dist.ReduceOp.MAX)
        found[case] = Measured(counted(name, SIZE, sharded=sharded), int(held))
    if rank == 0:
        Path(folder, "found").write_bytes(pickle.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def measure(size: int) -> dict[Case, Measured]:
    """Return what `size` processes found."""
    fork = mp.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        processes = [fork.Process(target=_serve, args=(rank, size, folder)) for rank in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        found: dict[Case, Measured] = pickle.loads(Path(folder, "found").read_bytes())
    return found


@dataclass(frozen=True)
class Cluster:
    """What a prediction assumes of the devices."""

    ranks: int
    bytes_per_second: float
    """Of each rank in a ring of large messages."""
    seconds_per_message: float
    flops: float = 4e14
    """Sustained by each device: 40% of an H100's dense bf16 peak."""
    tokens: float = 16384.0
    """Each rank's part of a batch."""


CLUSTERS = (Cluster(8, 2e11, 3e-5), Cluster(64, 4e10, 1e-4))
"""One node with NVLink; eight nodes, a 400 Gb/s link for each device."""
PARAMETERS = (1e8, 1e10)
STANDING = 4
"""Vectors that a level holds between steps: parameters, gradient and Adam's two moments."""
DEVICE = 80e9
UNITS = 32
"""Parts that a sharded module is gathered in, one after the other."""


@dataclass(frozen=True)
class Prediction:
    """Of one upper step on one device."""

    computing: float
    communicating: float
    held_bytes: float

    def __str__(self) -> str:
        """Return seconds and gigabytes."""
        much = "" if self.held_bytes <= DEVICE else ", too much"
        return f"{self.computing:.2g} + {self.communicating:.2g} s, {self.held_bytes / 1e9:.3g} GB{much}"


def predict(name: str, sharded: bool, peak: Peak, parameters: float, cluster: Cluster, products: int) -> Prediction:
    """Return time and memory of one upper step with so many lower parameters, and few upper ones.

    A gradient is 6 operations a parameter and token, a product twice that; nothing overlaps; vectors are float32.
    """
    method, size = METHODS[name], 4 * parameters
    upper = size if name in STARTS else 0.0
    if sharded:
        messages = communication.upper_step_on_shards(method, STEPS, units=UNITS)
    else:
        messages = communication.upper_step(method, STEPS, products=products)
    amount = communication.work(method, STEPS, products=products)
    standing = STANDING * (2 if name in STARTS else 1) / (cluster.ranks if sharded else 1)
    sent = communication.total_bytes(messages, ranks=cluster.ranks, lower=size, upper=upper)
    return Prediction(
        computing=(amount.gradients + 2 * amount.products) * 6 * parameters * cluster.tokens / cluster.flops,
        communicating=sent / cluster.bytes_per_second + messages.total() * cluster.seconds_per_message,
        held_bytes=size * (standing + peak.vectors(cluster.ranks, UNITS, sharded=sharded)),
    )


@dataclass(frozen=True)
class Peak:
    """What tensors held at the peak, in vectors of lower parameters: parts, and units gathered from all ranks."""

    parts: float
    units: float

    @staticmethod
    def of(held: dict[int, float]) -> Peak:
        """Return what explains the peaks on shards with two numbers of ranks."""
        (few, most), (many, less) = sorted(held.items())
        parts = (most - less) / (1 / few - 1 / many)
        return Peak(parts, (most - parts / few) * SIZE.blocks)

    def vectors(self, ranks: int, units: int, *, sharded: bool) -> float:
        """Return the vectors that one rank holds."""
        return self.parts / ranks + self.units / units if sharded else self.parts


def main() -> int:
    """Print the tables as Markdown."""
    found = {size: measure(size) for size in RANKS}
    few, many = RANKS
    held = {case: {size: found[size][case].held_bytes / (4 * SIZE.lower) for size in RANKS} for case in CASES}
    print(f"{SIZE.lower} lower parameters, {STEPS} lower steps, {few} and {many} gloo processes\n")
    peaks_of = f"peak with {few}, {many}"
    print(f"| method | all-reduces | of these a word | vectors of lower, upper | {peaks_of} |\n|---|---|---|---|---|")
    for name in METHODS:
        messages = found[few][name, False].sent.messages
        assert messages == found[many][name, False].sent.messages
        words = sum(count for message, count in messages.items() if not message.lower and not message.upper)
        lower = sum(count * message.lower for message, count in messages.items())
        upper = sum(count * message.upper for message, count in messages.items())
        peaks = ", ".join(f"{vectors:.1f}" for vectors in held[name, False].values())
        print(f"| `{name}` | {messages.total()} | {words} | {lower}, {upper} | {peaks} |")
    print(f"\n| on shards | all-gathers | reduce-scatters | all-reduces | sent by each | peak with {few}, {many} |")
    print("|---|---|---|---|---|---|")
    for name in ON_SHARDS:
        sent = [found[size][name, True].sent for size in RANKS]
        assert sent[0].messages == sent[1].messages
        counts = " | ".join(
            str(sum(count for message, count in sent[0].messages.items() if message.collective == c))
            for c in _COLLECTIVES
        )
        vectors = ", ".join(f"{each.sent_bytes / (4 * SIZE.lower):.1f}" for each in sent)
        peaks = ", ".join(f"{vectors:.2f}" for vectors in held[name, True].values())
        print(f"| `{name}` | {counts} | {vectors} | {peaks} |")
    heads = [f"{parameters:.0e} on {cluster.ranks}" for parameters in PARAMETERS for cluster in CLUSTERS]
    print(f"\n| method | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}")
    for name, sharded in CASES:
        measured = held[name, sharded]
        peak = Peak.of(measured) if sharded else Peak(max(measured.values()), 0.0)
        products = found[few][name, sharded].sent.num_products
        cells = [
            str(predict(name, sharded, peak, parameters, cluster, products))
            for parameters in PARAMETERS
            for cluster in CLUSTERS
        ]
        print(f"| `{name}`{' on shards' if sharded else ''} | {' | '.join(cells)} |")
    return 0


_COLLECTIVES: tuple[Collective, ...] = ("all_gather", "reduce_scatter", "all_reduce")


if __name__ == "__main__":
    sys.exit(main())
