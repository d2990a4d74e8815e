"""What the engine costs beside the same steps written by hand, and whether its memory stays flat."""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hypergrad as hg
from hypergrad.bench.claims.base import Claim

STEPS = 5
"""Own steps of the lower level in one step of the top level."""
PRODUCTS = 5
"""Hessian products of one solve."""
OWN_STEP = 2e-3
"""Seconds that an own step takes by hand, at least."""
BOUND = 0.15
REPEATS = 12
MEMORY_STEPS = 10_000
WARM_UP = 1000
"""Steps after which the process's memory has settled: before, the C library still takes in what fragmentation needs."""


def measure() -> list[Claim]:
    """Return the engine's overhead where an own step takes 2 ms, and the growth of memory over 10,000 tiny steps."""
    return [overhead(), memory()]


def overhead() -> Claim:
    """Compare the engine with a hand-written loop, interleaved; both must end at the same parameters."""
    width = 128
    rows, own = _sized(width)
    ours, engine_end = _engine(width, rows)
    by_hand, hand_end = _by_hand(width, rows)
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(2 + REPEATS):
        for step, kept in zip((ours, by_hand), times, strict=True):
            began = time.perf_counter()
            for _ in range(3):
                step()
            if repeat >= 2:
                kept.append((time.perf_counter() - began) / 3)
    for one, other in zip(engine_end(), hand_end(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)  # float32: both loops took the same steps
    ratios = [a / b - 1 for a, b in zip(*times, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return Claim(
        name="engine: overhead over a loop written by hand",
        measured=middle,
        spread=(low, high),
        bound=f"< {BOUND:g}",
        holds=middle < BOUND,
        detail=f"an own step takes {1e3 * own:.1f} ms by hand; a step of the top level, {STEPS} of them and one solve "
        f"of {PRODUCTS} products, {1e3 * statistics.median(times[0]):.1f} ms by the engine and "
        f"{1e3 * statistics.median(times[1]):.1f} ms by hand",
    )


def memory() -> Claim:
    """Return by how much the process and the number of live tensors grow over many steps."""
    step, _ = _engine(width=2, rows=4)
    for _ in range(WARM_UP):
        step()
    before, tensors = _peak(), _live()
    for _ in range(MEMORY_STEPS):
        step()
    grown, more = _peak() - before, _live() - tensors
    return Claim(
        name=f"engine: memory grown over {MEMORY_STEPS} steps",
        measured=grown,
        spread=None,
        bound="< 1",
        holds=grown < 1.0 and more <= 0,
        detail=f"MiB of the process's peak resident memory after {WARM_UP} steps; {more:+d} live tensors",
    )


def _sized(width: int) -> tuple[int, float]:
    """Return how many rows make an own step by hand take `OWN_STEP`, and how long it then takes."""
    rows = 64
    while True:
        net, penalty, train, _ = _parts(width, rows)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        times = []
        for _ in range(9):
            began = time.perf_counter()
            optimizer.zero_grad()
            _lower_loss(net, penalty, train).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            times.append(time.perf_counter() - began)
        if statistics.median(times) >= OWN_STEP:
            return rows, statistics.median(times)
        rows *= 2


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _live() -> int:
    gc.collect()
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


def _parts(width: int, rows: int) -> tuple[nn.Sequential, nn.Linear, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 5))
    penalty = nn.Linear(1, 1)
    x, y = torch.randn(2 * rows, 20), torch.randint(0, 5, (2 * rows,))
    return net, penalty, (x[:rows], y[:rows]), (x[rows:], y[rows:])


def _lower_loss(net: Any, penalty: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    decay = torch.stack([(p**2).sum() for p in net.parameters()]).sum()
    strength: Tensor = penalty.weight.exp().sum() * 0.05
    return F.cross_entropy(net(batch[0]), batch[1]) + strength * decay


def _engine(width: int, rows: int) -> tuple[Callable[[], object], Callable[[], list[Tensor]]]:
    net, penalty, train, held_out = _parts(width, rows)

    def upper_loss(models: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(models.net(batch[0]), batch[1])

    def lower_loss(models: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return _lower_loss(models.net, models.penalty, batch)

    lower = hg.Problem(
        "net",
        module=net,
        loss=lower_loss,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9),
        data=[train],
        steps=STEPS,
        method=hg.Implicit(hg.CG(PRODUCTS, rtol=0.0)),
    )
    upper = hg.Problem(
        "penalty",
        module=penalty,
        loss=upper_loss,
        optimizer=torch.optim.SGD(penalty.parameters(), lr=1e-3),
        data=[held_out],
    )
    engine = hg.Engine([lower, upper], product_check=False, on_breakdown="warn")
    return engine.step, lambda: [p.detach() for p in [*net.parameters(), penalty.weight]]


def _by_hand(width: int, rows: int) -> tuple[Callable[[], object], Callable[[], list[Tensor]]]:
    net, penalty, train, held_out = _parts(width, rows)
    lower = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    upper = torch.optim.SGD(penalty.parameters(), lr=1e-3)
    params = list(net.parameters())

    def step() -> None:
        for _ in range(STEPS):
            lower.zero_grad()
            _lower_loss(net, penalty, train).backward()  # type: ignore[no-untyped-call]
            lower.step()
        cotangent = torch.autograd.grad(F.cross_entropy(net(held_out[0]), held_out[1]), params)
        grads = torch.autograd.grad(_lower_loss(net, penalty, train), params, create_graph=True)
        b = torch.cat([c.reshape(-1) for c in cotangent])

        def split(v: Tensor) -> list[Tensor]:
            pieces = torch.split(v, [p.numel() for p in params])
            return [piece.view_as(p) for piece, p in zip(pieces, params, strict=True)]

        def product(v: Tensor) -> Tensor:
            return torch.cat([o.reshape(-1) for o in torch.autograd.grad(grads, params, split(v), retain_graph=True)])

        x, r, p = torch.zeros_like(b), b.clone(), b.clone()
        rr = r.dot(r)
        for _ in range(PRODUCTS):
            hp = product(p)
            alpha = rr / p.dot(hp)
            x, r = x + alpha * p, r - alpha * hp
            new = r.dot(r)
            p, rr = r + (new / rr) * p, new
        (mixed,) = torch.autograd.grad(grads, [penalty.weight], split(x))
        upper.zero_grad()
        penalty.weight.grad = -mixed
        upper.step()

    return step, lambda: [p.detach() for p in [*params, penalty.weight]]
