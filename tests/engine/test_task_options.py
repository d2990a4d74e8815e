"""What each task's run does with a problem's options: schedulers, changed learning rates, fresh batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import hypergrad as hg

T = 2
DIMENSION = 1


class Number(nn.Module):
    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.full((DIMENSION,), value, dtype=torch.float64))


def maml(
    scheduler: Any = None, *, method: hg.Method | None = None, chunk: int | None = None, momentum: float = 0.0
) -> tuple[hg.Engine, torch.optim.Optimizer, Number]:
    """Return tasks that shrink from the upper value by their steps; the upper loss is where they end."""
    low, up = Number(), Number(1.0)
    optimizer = torch.optim.SGD(low.parameters(), lr=0.2, momentum=momentum)
    lower = hg.Problem(
        "low",
        module=low,
        loss=lambda m, _: 0.5 * (m.low.v**2).sum(),
        optimizer=optimizer,
        scheduler=None if scheduler is None else scheduler(optimizer),
        steps=3,
        tasks=T,
        chunk=chunk,
        method=method or hg.Unrolled(),
        start=lambda m: {"v": m.up.v},
    )
    upper = hg.Problem(
        "up",
        module=up,
        loss=lambda m, b: m.low.v.sum() + 0.0 * b.sum(),
        optimizer=torch.optim.SGD(up.parameters(), lr=0.0),
        data=[torch.zeros(T, 1, dtype=torch.float64)],
    )
    return hg.Engine([lower, upper]), optimizer, up


@pytest.mark.parametrize("chunk", [1, T])
@pytest.mark.parametrize("method", [hg.Unrolled(), hg.Unrolled(retain=1.0), hg.ForwardUnrolled()])
def test_each_run_follows_the_schedule_from_where_it_stands(chunk: int, method: hg.Method) -> None:
    engine, optimizer, up = maml(lambda o: lr_scheduler.StepLR(o, 1, 0.5), method=method, chunk=chunk)
    for _ in range(2):
        engine.step()
        assert up.v.grad is not None
        assert float(up.v.grad) == pytest.approx(0.8 * 0.9 * 0.95, rel=1e-12)
        assert optimizer.param_groups[0]["lr"] == 0.2


def test_a_learning_rate_changed_between_steps_counts() -> None:
    engine, optimizer, up = maml()
    engine.step()
    optimizer.param_groups[0]["lr"] = 0.5
    engine.step()
    assert up.v.grad is not None
    assert float(up.v.grad) == pytest.approx(0.5**3, rel=1e-12)


def test_a_schedule_that_has_been_moved_is_followed_from_there() -> None:
    schedules: list[Any] = []

    def schedule(o: torch.optim.Optimizer) -> Any:
        schedules.append(lr_scheduler.StepLR(o, 4, 0.5))
        return schedules[0]

    engine, optimizer, up = maml(schedule)
    engine.step()
    for _ in range(2):
        optimizer.step()
        schedules[0].step()
    engine.step()
    assert up.v.grad is not None
    assert float(up.v.grad) == pytest.approx(0.8 * 0.8 * 0.9, rel=1e-12)


def test_a_schedule_of_several_is_left_as_it_was() -> None:
    def both(o: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        parts: list[Any] = [lr_scheduler.LinearLR(o, 0.5, 1.0, 2), lr_scheduler.CosineAnnealingLR(o, 10)]
        return lr_scheduler.SequentialLR(o, parts, [2])

    low = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.2)
    schedule = both(low)
    rates = []
    for _ in range(3):
        rates.append(low.param_groups[0]["lr"])
        low.step()
        schedule.step()
    engine, optimizer, up = maml(both)
    for _ in range(2):
        engine.step()
        expected = (1 - rates[0]) * (1 - rates[1]) * (1 - rates[2])
        assert up.v.grad is not None
        assert float(up.v.grad) == pytest.approx(expected, rel=1e-12)
        assert optimizer.param_groups[0]["lr"] == rates[0]


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (lr_scheduler.ReduceLROnPlateau, "problem 'low': ReduceLROnPlateau follows the loss"),
        (lambda o: lr_scheduler.OneCycleLR(o, 0.5, 10), r"problem 'low': its scheduler moves \[.*'momentum'"),
    ],
)
def test_schedulers_that_tasks_cannot_follow_are_refused(scheduler: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine, _, _ = maml(scheduler, momentum=0.9)
        engine.step()


def test_every_is_refused_with_tasks() -> None:
    net = Number()
    with pytest.raises(ValueError, match="problem 'net': the copies of tasks=2 are run anew .* every=3"):
        hg.Problem(
            "net",
            module=net,
            loss=lambda m, b: b,
            optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
            tasks=T,
            every=3,
            method=hg.Implicit(hg.CG(5)),
        )


@pytest.mark.parametrize("chunk", [1, T])
def test_fresh_batches_are_drawn_for_tasks(chunk: int) -> None:
    """The loss is 0.5 a v^2 - v tanh(u), a drawn: after a run on a = 1, 2 the system is that of the fresh a = 3, 4."""
    low, up = Number(), Number(0.3)
    drawn = [torch.full((T, 1), value, dtype=torch.float64) for value in (1.0, 2.0, 3.0, 4.0)]

    def loss(m: Any, a: Tensor) -> Tensor:
        value: Tensor = (0.5 * a * m.low.v**2 - m.low.v * m.up.v.tanh()).sum()
        return value

    lower = hg.Problem(
        "low",
        module=low,
        loss=loss,
        optimizer=torch.optim.SGD(low.parameters(), lr=0.1),
        data=drawn,
        steps=2,
        tasks=T,
        chunk=chunk,
        method=hg.Implicit(hg.Exact(), batches=2, fresh=True),
    )
    upper = hg.Problem(
        "up",
        module=up,
        loss=lambda m, b: (m.low.v - b).sum(),
        optimizer=torch.optim.SGD(up.parameters(), lr=0.0),
        data=[torch.zeros(T, 1, dtype=torch.float64)],
    )
    engine = hg.Engine([lower, upper])
    for _ in range(2):
        engine.step()
        assert up.v.grad is not None
        assert float(up.v.grad) == pytest.approx(float((1 - up.v.detach().tanh() ** 2) / 3.5), rel=1e-10)
