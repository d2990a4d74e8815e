"""Where a lower level begins: draws and constants that its start met are those that are differentiated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import hypergrad as hg


class Number(nn.Module):
    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.tensor([value]))


def sgd(module: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=lr)


def halved(w: Number, start: Any, **options: Any) -> hg.Problem:
    """Return a problem whose one step halves w."""
    return hg.Problem(
        "w",
        module=w,
        data=options.pop("data", [None]),
        optimizer=sgd(w, 0.25),
        method=hg.Unrolled(),
        start=start,
        loss=lambda m, _: (m.w.v**2).sum(),
        **options,
    )


def top(up: Number, loss: Any) -> hg.Problem:
    return hg.Problem("up", module=up, data=[None], optimizer=sgd(up, 0.0), loss=loss)


def teacher(module: Number, target: float) -> hg.Problem:
    """Return a constant that moves: halfway to `target` a step."""
    return hg.Problem(
        "teacher",
        module=module,
        data=[None],
        detach=True,
        optimizer=sgd(module, 0.5),
        loss=lambda m, _: 0.5 * ((m.teacher.v - target) ** 2).sum(),
    )


def test_draws_of_a_start_are_those_of_the_run() -> None:
    """w_0 = up e and one step halves it, so that the derivative of w^2 in up = 1 is twice its value."""
    torch.manual_seed(0)
    w, up = Number(), Number(1.0)
    engine = hg.Engine([halved(w, lambda m: {"v": m.up.v * torch.randn(1)}), top(up, lambda m, _: (m.w.v**2).sum())])
    record = engine.step()
    assert float(up.v.grad) == pytest.approx(2 * record["up.loss"])


def test_a_rehearsal_draws_the_start_once() -> None:
    torch.manual_seed(0)
    w, up = Number(), Number(1.0)
    lower = halved(w, lambda m: {"v": m.up.v * torch.randn(1)}, after="restart")
    report = hg.diagnose(hg.Engine([lower, top(up, lambda m, _: (m.w.v**2).sum())]))
    print(report)


def test_a_start_reads_its_own_module_as_it_was_first() -> None:
    """A learned scale of the first weights: w_0 = 3 up, halved; what w is by now does not matter."""
    w, up = Number(3.0), Number(2.0)
    lower = halved(w, lambda m: {"v": m.up.v * hg.detach(m.w).v}, after="restart")
    engine = hg.Engine([lower, top(up, lambda m, _: m.w.v.sum())])
    for _ in range(3):
        engine.step()
        assert float(up.v.grad) == pytest.approx(1.5)


def test_a_start_reads_a_constant_as_it_was_then() -> None:
    constant, w, up = Number(1.0), Number(), Number(2.0)
    lower = halved(w, lambda m: {"v": m.up.v * m.teacher.v}, after="restart")
    engine = hg.Engine([[lower, teacher(constant, 5.0)], top(up, lambda m, _: m.w.v.sum())])
    for _ in range(2):
        expected = constant.v.item() / 2
        engine.step()
        assert float(up.v.grad) == pytest.approx(expected)


def test_a_learning_rate_reads_a_constant_as_it_was_then() -> None:
    """w = 1 - 2 up t after one step from 1."""
    constant, w, up = Number(0.1), Number(1.0), Number(1.0)
    lower = halved(w, None, after="restart", hyper={"lr": lambda m: (m.up.v * m.teacher.v).sum()})
    engine = hg.Engine([[lower, teacher(constant, 0.5)], top(up, lambda m, _: m.w.v.sum())])
    for _ in range(2):
        expected = -2 * constant.v.item()
        engine.step()
        assert float(up.v.grad) == pytest.approx(expected)


@pytest.mark.parametrize("draw", [lambda: torch.randn(1), lambda: torch.empty(1).normal_()])
@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("chunk", [1, 2])
def test_each_task_draws_a_start_of_its_own(chunk: int, buffers: bool, draw: Any) -> None:
    torch.manual_seed(0)
    w, up = Number(), Number(1.0)
    if buffers:
        w.register_buffer("count", torch.zeros(1))
    if buffers and chunk == 2:
        draw = lambda: torch.randn(1)  # noqa: E731 - vmap over the buffers refuses draws in place
    lower = halved(w, lambda m: {"v": m.up.v * draw()}, tasks=2, chunk=chunk, data=None)
    upper = hg.Problem(
        "up",
        module=up,
        data=[torch.tensor([[1.0], [-1.0]])],
        optimizer=sgd(up, 0.0),
        loss=lambda m, sign: (m.w.v * sign).sum(),
    )
    record = hg.Engine([lower, upper]).step()
    assert record["up.loss"] != 0
    assert float(up.v.grad) == pytest.approx(record["up.loss"])


def three_levels(every: int) -> tuple[hg.Engine, Number]:
    low, middle, above = Number(), Number(1.0), Number(1.0)
    lowest = hg.Problem(
        "low",
        module=low,
        data=[None],
        optimizer=sgd(low, 0.25),
        method=hg.Unrolled(),
        after="restart",
        start=lambda m: {"v": m.middle.v * torch.randn(1)},
        loss=lambda m, _: (m.low.v**2).sum(),
    )
    between = hg.Problem(
        "middle",
        module=middle,
        data=[None],
        optimizer=sgd(middle, 0.1),
        steps=2,
        every=every,
        method=hg.Implicit(hg.Exact(), batches=2),
        loss=lambda m, _: (m.low.v**2).sum() + ((m.middle.v - m.above.v) ** 2).sum(),
    )
    highest = hg.Problem(
        "above", module=above, data=[None], optimizer=sgd(above, 0.05), loss=lambda m, _: (m.middle.v**2).sum()
    )
    return hg.Engine([lowest, between, highest]), above


@pytest.mark.parametrize("every", [2, 3])
def test_a_run_that_is_resumed_keeps_the_draws_of_each_recorded_start(every: int) -> None:
    def gradients(engine: hg.Engine, above: Number) -> list[float]:
        found = []
        for _ in range(3):
            engine.step()
            found.append(float(above.v.grad))
        return found

    torch.manual_seed(0)
    engine, above = three_levels(every)
    engine.step()
    state = engine.state_dict()
    expected = gradients(engine, above)
    again, other = three_levels(every)
    again.load_state_dict(state)
    assert gradients(again, other) == expected


def test_the_first_window_is_rolled_back_to_its_start() -> None:
    w, up = Number(), Number(3.0)
    lower = hg.Problem(
        "w",
        module=w,
        data=[None],
        optimizer=sgd(w, 0.25),
        method=hg.Unrolled(),
        after="rollback",
        start=lambda m: {"v": m.up.v},
        loss=lambda m, _: (m.w.v**2).sum(),
    )
    upper = hg.Problem("up", module=up, data=[None], optimizer=sgd(up, 0.0), loss=lambda m, _: m.w.v.sum())
    hg.Engine([lower, upper]).step()
    assert w.v.item() == 3.0
