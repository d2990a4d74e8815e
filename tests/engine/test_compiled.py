"""Compiled methods in the engine: same gradients, and one compilation for a whole run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_cases import engine
from torch import Tensor, nn
from torch._dynamo.utils import counters

import hypergrad as hg


def build(method: hg.Method) -> tuple[nn.Module, hg.Engine]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()
    up = nn.Linear(3, 1).double()
    x = torch.randn(8, 3).double()

    def loss(m: Any, batch: Tensor) -> Tensor:
        return (m.up(batch).sigmoid() * (m.net(batch) - 1) ** 2).mean()

    lower = hg.Problem(
        "net",
        module=net,
        loss=loss,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.1),
        data=[x],
        steps=2,
        method=method,
    )
    upper = hg.Problem(
        "up",
        module=up,
        loss=lambda m, batch: (m.net(batch) ** 2).mean(),
        optimizer=torch.optim.SGD(up.parameters(), lr=0.1),
        data=[x],
    )
    return up, engine(lower, upper)


def gradient(method: hg.Method) -> Tensor:
    up, run = build(method)
    run.run(10)  # torch gives up after eight compilations of one function
    return torch.cat([p.grad.reshape(-1) for p in up.parameters() if p.grad is not None])


@pytest.mark.filterwarnings("ignore")
def test_compiled_implicit_with_batch_norm_equals_eager() -> None:
    eager = gradient(hg.Implicit(hg.CG(5), damping=1.0))
    compiled = gradient(hg.Implicit(hg.CG(5), damping=1.0, compile="aot_eager"))
    assert torch.allclose(eager, compiled, rtol=1e-10)


TASKS = 3


def of_tasks(method: hg.Method, chunk: int | None) -> tuple[Tensor, int]:
    """Return the gradient of the mean over tasks after three steps, and how many graphs were compiled."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    meta, net = (
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double() for _ in range(2)
    )
    x, y = torch.randn(TASKS, 8, 3).double(), torch.randn(TASKS, 8, 1).double()

    def loss(m: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        pairs = zip(m.net.parameters(), m.meta.parameters(), strict=True)
        return ((m.net(batch[0]) - batch[1]) ** 2).mean() + sum(((p - q) ** 2).sum() for p, q in pairs)

    lower = hg.Problem(
        "net",
        module=net,
        loss=loss,
        optimizer=torch.optim.Adam(net.parameters(), lr=0.1),
        steps=3,
        tasks=TASKS,
        chunk=chunk,
        start=lambda m: dict(m.meta.named_parameters()),
        method=method,
    )
    upper = hg.Problem(
        "meta",
        module=meta,
        loss=lambda m, batch: ((m.net(batch[0]) - batch[1]) ** 2).mean(),
        optimizer=torch.optim.SGD(meta.parameters(), lr=0.1),
        data=[(x, y)],
    )
    before = counters["stats"]["unique_graphs"]
    engine(lower, upper).run(3)
    graphs = counters["stats"]["unique_graphs"] - before
    return torch.cat([p.grad.reshape(-1) for p in meta.parameters() if p.grad is not None]), graphs


RETAIN, SWEEP = (lambda c: hg.Unrolled(retain=1.0, compile=c)), (lambda c: hg.Unrolled(compile=c))
IMPLICIT: Any = lambda c: hg.Implicit(hg.CG(5), damping=1.0, compile=c)  # noqa: E731


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "chunk", "graphs"),
    [
        (RETAIN, TASKS, 2),  # the gradient of a step, and the upper loss
        (RETAIN, 1, 1),
        (SWEEP, TASKS, 3),  # a step each way, and the upper loss
        (IMPLICIT, 1, 2),  # lower and mixed product
    ],
    ids=["retain", "retain in a loop", "sweep", "Implicit in a loop"],
)
def test_compiled_tasks_equal_eager_and_compile_one_step(make: Any, chunk: int, graphs: int) -> None:
    eager, _ = of_tasks(make(False), chunk)
    compiled, num_graphs = of_tasks(make("aot_eager"), chunk)
    assert torch.allclose(eager, compiled, rtol=1e-9)
    assert num_graphs == graphs


def test_compiled_implicit_tasks_under_one_vmap_are_refused() -> None:
    with pytest.raises(ValueError, match="inside a torch.func transform"):
        of_tasks(IMPLICIT("aot_eager"), TASKS)
