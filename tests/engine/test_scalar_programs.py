"""Small programs whose hypergradient is known by hand: parts of an engine that a first batch or a number may hide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hypergrad as hg


class Number(nn.Module):
    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.tensor([value]))


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ParameterList([torch.zeros(1), torch.zeros(1)])


def sgd(module: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=lr)


def heads(loss: Any, method: hg.Method) -> tuple[hg.Engine, Number]:
    """Return two heads, one a batch, each pulled halfway to `up` by its step; the top reads the second."""
    net, up = Heads(), Number(1.0)
    lower = hg.Problem("net", module=net, data=[0, 1], steps=2, optimizer=sgd(net, 0.5), method=method, loss=loss)
    upper = hg.Problem(
        "up",
        module=up,
        data=[1],
        optimizer=sgd(up, 0.0),
        loss=lambda m, k: m.net.h[k].sum() + 0.05 * (m.up.v**2).sum(),
    )
    return hg.Engine([lower, upper]), up


METHODS = [hg.Unrolled(), hg.Unrolled(retain=1.0)]


@pytest.mark.parametrize("method", METHODS)
def test_a_parameter_first_reached_on_a_later_batch_is_refused(method: hg.Method) -> None:
    engine, _ = heads(lambda m, k: 0.5 * ((m.net.h[k] - m.up.v) ** 2).sum(), method)
    with pytest.raises(ValueError, match=r"problem 'net': .* its parameter 'h.1', which it did not on its first batch"):
        engine.step()


@pytest.mark.parametrize("chunk", [1, 2])
def test_a_parameter_first_reached_on_a_later_batch_of_tasks_is_differentiated(chunk: int) -> None:
    net, up = Heads(), Number(1.0)
    lower = hg.Problem(
        "net",
        module=net,
        data=[(torch.zeros(2, 1), 0), (torch.zeros(2, 1), 1)],
        steps=2,
        tasks=2,
        chunk=chunk,
        optimizer=sgd(net, 0.5),
        method=hg.Unrolled(),
        loss=lambda m, batch: 0.5 * ((m.net.h[batch[1]] - m.up.v) ** 2).sum(),
    )
    upper = hg.Problem(
        "up",
        module=up,
        data=[torch.zeros(2, 1)],
        optimizer=sgd(up, 0.0),
        loss=lambda m, _: m.net.h[1].sum() + 0.05 * (m.up.v**2).sum(),
    )
    hg.Engine([lower, upper]).step()
    assert float(up.v.grad) == pytest.approx(0.6)


def skipping(method: hg.Method, optimizer: Any) -> tuple[hg.Engine, Number]:
    """Return two heads, both on the first batch and the first alone on the second; the top reads the second head."""
    net, up = Heads(), Number(1.0)
    lower = hg.Problem(
        "net",
        module=net,
        data=[2, 1],
        steps=2,
        optimizer=optimizer(net.parameters()),
        method=method,
        loss=lambda m, count: sum(0.5 * ((h - m.up.v) ** 2).sum() for h in list(m.net.h)[:count]),
    )
    upper = hg.Problem("up", module=up, data=[None], optimizer=sgd(up, 0.0), loss=lambda m, _: m.net.h[1].sum())
    return hg.Engine([lower, upper]), up


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.9),
        lambda params: torch.optim.SGD(params, lr=0.5, weight_decay=0.1),
        lambda params: torch.optim.Adam(params, lr=0.1),
    ],
)
@pytest.mark.parametrize("method", [*METHODS, hg.ForwardUnrolled()])
def test_a_parameter_that_the_optimizer_would_pass_over_is_refused(method: hg.Method, optimizer: Any) -> None:
    engine, _ = skipping(method, optimizer)
    with pytest.raises(
        ValueError, match=r"problem 'net': .* does not depend on its parameters \['h.1'\] on this batch"
    ):
        engine.step()


@pytest.mark.parametrize("method", [*METHODS, hg.ForwardUnrolled()])
def test_gradient_descent_leaves_a_parameter_that_is_passed_over(method: hg.Method) -> None:
    engine, up = skipping(method, lambda params: torch.optim.SGD(params, lr=0.5))
    engine.step()
    assert float(up.v.grad) == pytest.approx(0.5)


@pytest.mark.parametrize("method", METHODS)
def test_a_parameter_named_on_every_batch_is_differentiated_through(method: hg.Method) -> None:
    engine, up = heads(
        lambda m, k: 0.5 * ((m.net.h[k] - m.up.v) ** 2).sum() + 0.0 * torch.stack(list(m.net.h)).sum(), method
    )
    engine.step()
    assert float(up.v.grad) == pytest.approx(0.6)


@pytest.mark.parametrize("tasks", [None, 2])
def test_response_stands_for_the_loss_with_tasks_too(tasks: int | None) -> None:
    low, up = Number(), Number(1.0)
    lower = hg.Problem(
        "low",
        module=low,
        optimizer=sgd(low, 0.5),
        method=hg.Implicit(hg.Exact()),
        tasks=tasks,
        loss=lambda m, _: 0.5 * ((m.low.v - m.up.v) ** 2).sum(),
        response=lambda m, _: (2 * m.low.v**2 - m.low.v * m.up.v).sum(),
    )
    upper = hg.Problem(
        "up", module=up, data=[torch.zeros(2, 1)], optimizer=sgd(up, 0.0), loss=lambda m, _: m.low.v.sum()
    )
    hg.Engine([lower, upper]).step()
    assert float(up.v.grad) == pytest.approx(0.25)


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_directions_of_several_problems_add_up(order: tuple[str, str]) -> None:
    modules, goals = {"a": Number(), "b": Number(), "meta": Number()}, {"a": 1.0, "b": -3.0}

    def lower(name: str) -> hg.Problem:
        return hg.Problem(
            name,
            module=modules[name],
            data=[None],
            optimizer=sgd(modules[name], 0.5),
            method=hg.Reptile(),
            start=lambda m: {"v": m.meta.v},
            loss=lambda m, _: 0.5 * ((getattr(m, name).v - goals[name]) ** 2).sum(),
        )

    upper = hg.Problem(
        "meta",
        module=modules["meta"],
        data=[None],
        optimizer=sgd(modules["meta"], 0.0),
        loss=lambda m, _: (m.a.v**2 + m.b.v**2).sum(),
    )
    hg.Engine([[lower(name) for name in order], upper]).step()
    assert float(modules["meta"].v.grad) == pytest.approx(-0.5 + 1.5)


def test_a_parameter_returned_as_a_metric_is_recorded_as_it_was() -> None:
    w = Number(1.0)
    problem = hg.Problem(
        "w", module=w, data=[None], optimizer=sgd(w, 0.25), loss=lambda m, _: ((m.w.v**2).sum(), {"value": m.w.v})
    )
    assert hg.Engine([problem]).run(3)["w.value"] == [1.0, 0.5, 0.25]


@pytest.mark.parametrize("after", ["continue", "restart", "rollback"])
@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda e: 0.5 * (1 + np.cos(np.pi * e / 10))),
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, milestones=np.array([2, 4])),
    ],
)
def test_a_schedule_of_numpy_numbers_can_be_resumed(schedule: Any, after: Any, tmp_path: Path) -> None:
    def run(num_steps: int) -> hg.History:
        w, up = Number(), Number(2.0)
        optimizer = sgd(w, 0.1)
        lower = hg.Problem(
            "w",
            module=w,
            data=[None],
            optimizer=optimizer,
            scheduler=schedule(optimizer),
            method=hg.Unrolled(),
            after=after,
            loss=lambda m, _: ((m.w.v - m.up.v) ** 2).sum(),
        )
        upper = hg.Problem("up", module=up, data=[None], optimizer=sgd(up, 0.1), loss=lambda m, _: (m.w.v**2).sum())
        folder = tmp_path / "run"
        return hg.Engine([lower, upper]).run(num_steps, callbacks=[hg.callbacks.Checkpoint(folder)], resume=folder)

    run(2)
    assert len(run(4)) == 2


@pytest.mark.parametrize("fused", [False, True])
def test_a_constant_that_moves_is_seen_as_it_was_with_any_optimizer(fused: bool) -> None:
    """A teacher that trains beside: fused steps leave its tensors' version counters alone."""
    teacher, student, up = Number(), Number(), Number(1.0)
    beside = hg.Problem(
        "teacher",
        module=teacher,
        data=[None],
        detach=True,
        optimizer=torch.optim.Adam(teacher.parameters(), lr=1.0, fused=fused),
        loss=lambda m, _: 0.5 * ((m.teacher.v - 5) ** 2).sum(),
    )
    lower = hg.Problem(
        "student",
        module=student,
        data=[None],
        optimizer=sgd(student, 1.0),
        method=hg.Implicit(hg.Exact()),
        loss=lambda m, _: 0.5 * ((m.student.v - m.teacher.v * m.up.v) ** 2).sum(),
    )
    upper = hg.Problem("up", module=up, data=[None], optimizer=sgd(up, 0.0), loss=lambda m, _: m.student.v.sum())
    engine = hg.Engine([[beside, lower], upper])
    for _ in range(2):
        engine.step()
    assert float(up.v.grad) == pytest.approx(1.98807, abs=1e-4)


def test_building_an_engine_leaves_the_generators_alone() -> None:
    w, up = Number(), Number()
    lower = hg.Problem(
        "w",
        module=w,
        optimizer=sgd(w, 0.1),
        method=hg.Unrolled(),
        select=lambda batch, step: batch + torch.randn(1),
        loss=lambda m, batch: ((m.w.v - m.up.v - batch) ** 2).sum(),
    )
    upper = hg.Problem("up", module=up, data=[torch.zeros(1)], optimizer=sgd(up, 0.1), loss=lambda m, _: m.w.v.sum())
    before = torch.get_rng_state()
    hg.Engine([lower, upper])
    assert torch.equal(before, torch.get_rng_state())


def test_an_error_of_another_callback_is_not_hidden_by_the_progress_display() -> None:
    w = Number()
    problem = hg.Problem("w", module=w, data=[None], optimizer=sgd(w, 0.1), loss=lambda m, _: (m.w.v**2).sum())
    callbacks = [hg.callbacks.EarlyStopping("typo", patience=1), hg.callbacks.Progress()]
    with pytest.raises(ValueError, match="typo"):
        hg.Engine([problem]).run(2, callbacks=callbacks)
