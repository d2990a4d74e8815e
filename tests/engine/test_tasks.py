"""Levels that begin at `start`, one task after the other or many under one vmap, against loops by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from engine_cases import EXACT, draw, engine, error, finite_difference
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import hypergrad as hg

T, SHOTS, STEPS, LR = 5, 6, 3, 0.2


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def tasks() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    support = draw(T, SHOTS, 2, seed=1), draw(T, SHOTS, 1, seed=2)
    query = draw(T, SHOTS, 2, seed=3), draw(T, SHOTS, 1, seed=4)
    return support, query


def fit(models: Any, batch: Any) -> Tensor:
    (x, y), _ = batch
    return F.mse_loss(models.task(x), y)


def judge(models: Any, batch: Any) -> Tensor:
    _, (x, y) = batch
    return F.mse_loss(models.task(x), y)


def by_hand(
    flat: dict[str, Tensor], task: int | None, *, steps: int = STEPS, second: bool = True, window: int | None = None
) -> Tensor:
    """Return the query loss of one task after its inner steps, as a function of the start."""
    module = net()
    (sx, sy), (qx, qy) = tasks()
    if task is not None:
        sx, sy, qx, qy = sx[task], sy[task], qx[task], qy[task]
    w = flat
    for k in range(steps):
        create = second and (window is None or k >= steps - window)
        loss = F.mse_loss(functional_call(module, w, (sx,)), sy)
        grads = torch.autograd.grad(loss, list(w.values()), create_graph=True)
        w = {n: p - LR * (g if create else g.detach()) for (n, p), g in zip(w.items(), grads, strict=True)}
    return F.mse_loss(functional_call(module, w, (qx,)), qy)


def maml(method: hg.Method, *, loss: Any = fit, after: Any = None, **options: Any) -> tuple[nn.Module, hg.Engine]:
    meta, task = net(), net()
    lower = hg.Problem(
        "task",
        module=task,
        loss=loss,
        optimizer=torch.optim.SGD(task.parameters(), lr=LR),
        steps=STEPS,
        start=lambda m: dict(m.meta.named_parameters()),
        method=method,
        after=after,
        **options,
    )
    upper = hg.Problem(
        "meta", module=meta, loss=judge, optimizer=torch.optim.SGD(meta.parameters(), lr=1e-12), data=[tasks()]
    )
    return meta, engine(lower, upper)


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.reshape(-1) for p in module.parameters() if p.grad is not None])


def hand_gradient(module: nn.Module, task: int | None = None, **options: Any) -> Tensor:
    params = {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters()}
    grads = torch.autograd.grad(by_hand(params, task, **options), list(params.values()))
    return torch.cat([g.reshape(-1) for g in grads])


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (hg.Unrolled(), {}),
        (hg.Unrolled(retain=1.0), {}),
        (hg.Unrolled(checkpoint=2), {}),
        (hg.ForwardUnrolled(), {}),
        (hg.Unrolled(truncate=0), {"second": False}),
        (hg.Unrolled(truncate=2), {"window": 2}),
        (hg.Unrolled(truncate=9), {}),
    ],
    ids=repr,
)
def test_maml_equals_a_hand_written_unroll(method: hg.Method, options: dict[str, Any]) -> None:
    meta, run = maml(method)
    for _ in range(2):  # each window begins at the start again
        run.step()
        assert error(flat(meta), hand_gradient(meta, **options)) < 1e-9


def test_maml_equals_finite_differences() -> None:
    meta, run = maml(hg.Unrolled())
    params = {n: p.detach().clone() for n, p in meta.named_parameters()}
    run.step()
    at = torch.cat([p.reshape(-1) for p in params.values()])

    def value(v: Tensor) -> Tensor:
        pieces = v.split([p.numel() for p in params.values()])
        moved = {n: q.view_as(p).requires_grad_() for (n, p), q in zip(params.items(), pieces, strict=True)}
        return by_hand(moved, None).detach()

    assert error(flat(meta), finite_difference(value, at)) < 1e-6


def test_reptile_steps_towards_the_end() -> None:
    meta, run = maml(hg.Reptile())
    before = torch.cat([p.detach().reshape(-1) for p in meta.parameters()])
    run.step()
    end = torch.cat([p.detach().reshape(-1) for p in run.graph.problems["task"].module.parameters()])
    assert error(flat(meta), before - end) < 1e-9


def test_imaml_equals_the_implicit_function_theorem() -> None:
    strength = 2.0

    def proximal(models: Any, batch: Any) -> Tensor:
        pairs = zip(models.task.parameters(), models.meta.parameters(), strict=True)
        return fit(models, batch) + 0.5 * strength * sum(((p - q) ** 2).sum() for p, q in pairs)

    meta, task = net(), net()
    lower = hg.Problem(
        "task",
        module=task,
        loss=proximal,
        optimizer=torch.optim.SGD(task.parameters(), lr=0.2),
        steps=60,
        start=lambda m: dict(m.meta.named_parameters()),
        method=EXACT,
    )
    upper = hg.Problem(
        "meta", module=meta, loss=judge, optimizer=torch.optim.SGD(meta.parameters(), lr=1e-12), data=[tasks()]
    )
    engine(lower, upper).step()
    params = {n: p.detach() for n, p in task.named_parameters()}
    sizes = [p.numel() for p in params.values()]

    def named(v: Tensor) -> dict[str, Tensor]:
        return {n: q.view_as(p) for (n, p), q in zip(params.items(), v.split(sizes), strict=True)}

    (sx, sy), (qx, qy) = tasks()
    at = torch.cat([p.reshape(-1) for p in params.values()])
    module = net()
    hessian = torch.func.jacrev(torch.func.grad(lambda v: F.mse_loss(functional_call(module, named(v), (sx,)), sy)))(at)
    cotangent = torch.func.grad(lambda v: F.mse_loss(functional_call(module, named(v), (qx,)), qy))(at)
    expected = strength * torch.linalg.solve(hessian + strength * torch.eye(at.numel(), dtype=at.dtype), cotangent)
    assert error(flat(meta), expected) < 1e-8


METHODS = {
    "unrolled": hg.Unrolled(),
    "fomaml": hg.Unrolled(truncate=0),
    "forward": hg.ForwardUnrolled(),
    "reptile": hg.Reptile(),
}


@pytest.mark.parametrize("chunk", [1, 2, T, None])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_tasks_equal_a_loop(method: hg.Method, chunk: int | None) -> None:
    if chunk in (2, None) and method is not METHODS["unrolled"]:
        pytest.skip("one method is enough for the ways to cut tasks")
    meta, run = maml(method, tasks=T, chunk=chunk)
    record = run.step()
    if isinstance(method, hg.Reptile):
        other, single = maml(method, tasks=T, chunk=1)
        single.step()
        assert error(flat(meta), flat(other)) < 1e-9
        return
    options = {"second": False} if method is METHODS["fomaml"] else {}
    expected = torch.stack([hand_gradient(meta, task, **options) for task in range(T)]).mean(0)
    assert error(flat(meta), expected) < 1e-9
    params = {n: p.detach().clone().requires_grad_() for n, p in meta.named_parameters()}
    values = torch.stack([by_hand(params, task).detach() for task in range(T)])
    assert abs(record.read("meta.loss") - float(values.mean())) < 1e-12


def test_tasks_under_implicit_and_adam_equal_the_loop() -> None:
    def proximal(models: Any, batch: Any) -> Tensor:
        pairs = zip(models.task.parameters(), models.meta.parameters(), strict=True)
        return fit(models, batch) + 0.5 * sum(((p - q) ** 2).sum() for p, q in pairs)

    def run(chunk: int) -> Tensor:
        meta, task = net(), net()
        lower = hg.Problem(
            "task",
            module=task,
            loss=proximal,
            optimizer=torch.optim.Adam(task.parameters(), lr=0.05, weight_decay=0.01),
            steps=4,
            start=lambda m: dict(m.meta.named_parameters()),
            method=hg.Implicit(hg.CG(30, rtol=1e-12), damping=2.0),
            tasks=T,
            chunk=chunk,
            clip_norm=0.5,
        )
        upper = hg.Problem(
            "meta", module=meta, loss=judge, optimizer=torch.optim.SGD(meta.parameters(), lr=1e-12), data=[tasks()]
        )
        engine(lower, upper).step()
        return flat(meta)

    assert error(run(T), run(1)) < 1e-9


@pytest.mark.parametrize("chunk", [None, 1, T])
def test_a_start_may_be_tied_in_part(chunk: int | None) -> None:
    """What the engine refuses is a problem of which the lower loss reads nothing, however the tasks are taken."""
    meta, task = net(), net()

    def proximal(models: Any, batch: Any) -> Tensor:
        return fit(models, batch) + 0.5 * (models.task[0].weight - models.meta[0].weight).square().sum()

    lower = hg.Problem(
        "task",
        module=task,
        loss=proximal,
        optimizer=torch.optim.SGD(task.parameters(), lr=LR),
        steps=STEPS,
        start=lambda m: dict(m.meta.named_parameters()),
        method=hg.Implicit(hg.CG(10), damping=2.0),
        tasks=None if chunk is None else T,
        chunk=chunk,
    )
    upper = hg.Problem(
        "meta", module=meta, loss=judge, optimizer=torch.optim.SGD(meta.parameters(), lr=1e-12), data=[tasks()]
    )
    engine(lower, upper).step()
    tied, free = meta[0].weight.grad, meta[2].weight.grad
    assert tied.count_nonzero() and (free is None or not free.count_nonzero())


class Noisy(nn.Module):
    """Dropout and BatchNorm, which each task must have for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.dropout(torch.tanh(self.norm(self.first(x))), 0.5, self.training))


@pytest.mark.parametrize("chunk", [1, 2, T])
def test_tasks_have_buffers_and_draws_of_their_own(chunk: int) -> None:
    torch.manual_seed(0)
    task, meta = Noisy(), Noisy()
    masks: list[Tensor] = []

    def loss(models: Any, batch: Any) -> Tensor:
        return F.mse_loss(models.task(batch.float()), torch.ones(SHOTS, 1))

    def top(models: Any, batch: Any) -> Any:
        noise = F.dropout(torch.ones(64), 0.5)
        return F.mse_loss(models.task(batch.float()), torch.zeros(SHOTS, 1)), {"noise": noise.sum() ** 2}

    x = draw(T, SHOTS, 2, seed=1)
    lower = hg.Problem(
        "task",
        module=task,
        loss=loss,
        optimizer=torch.optim.SGD(task.parameters(), lr=0.1),
        steps=2,
        start=lambda m: dict(m.meta.named_parameters()),
        method=hg.Unrolled(),
        tasks=T,
        chunk=chunk,
    )
    upper = hg.Problem("meta", module=meta, loss=top, optimizer=torch.optim.SGD(meta.parameters(), lr=0.1), data=[x])
    run = engine(lower, upper)
    before = copy.deepcopy((task.state_dict(), [b.clone() for b in meta.buffers()]))
    rng = torch.get_rng_state()
    record = run.step()
    assert not torch.equal(rng, torch.get_rng_state())
    noise = (
        record.read("meta.noise") ** 0.5
    )  # were all draws the same, the mean square would be a square of an even number
    assert abs(noise - 2 * round(noise / 2)) > 1e-6
    for key, value in task.state_dict().items():
        assert torch.equal(value, before[0][key]), key
    assert all(torch.equal(a, b) for a, b in zip(before[1], meta.buffers(), strict=True))
    assert masks == []


def test_tasks_of_images_are_dry_run_one_at_a_time() -> None:
    """A convolution takes no batch that leads with the number of tasks: the graph is inferred on one task's part."""
    torch.manual_seed(0)

    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))

    task, meta = make(), make()
    x, y = torch.randn(4, 6, 1, 4, 4), torch.randint(0, 3, (4, 6))

    def loss(models: Any, batch: Any) -> Tensor:
        return F.cross_entropy(models.task(batch[0]), batch[1])

    lower = hg.Problem(
        "task",
        module=task,
        loss=loss,
        optimizer=torch.optim.SGD(task.parameters(), lr=0.1),
        start=lambda m: dict(m.meta.named_parameters()),
        method=hg.Unrolled(),
        tasks=4,
        steps=2,
        select=lambda batch, k: batch,
    )
    upper = hg.Problem(
        "meta", module=meta, loss=loss, optimizer=torch.optim.Adam(meta.parameters(), lr=0.05), data=[(x, y)]
    )
    history = hg.Engine([lower, upper]).run(8)
    assert history["meta.loss"][-1] < history["meta.loss"][0]


def test_learning_rates_per_parameter_of_tasks() -> None:
    """Meta-SGD: one learning rate a parameter, learned through the tasks."""

    class Meta(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()
            self.rates = nn.Parameter(torch.full((4,), -1.5, dtype=torch.float64))

    meta, task = Meta(), net()
    names = [n for n, _ in task.named_parameters()]
    lower = hg.Problem(
        "task",
        module=task,
        loss=fit,
        optimizer=torch.optim.SGD(task.parameters(), lr=LR),
        steps=2,
        start=lambda m: dict(m.meta.net.named_parameters()),
        hyper={"lr": lambda m: dict(zip(names, m.meta.rates.exp().unbind(), strict=True))},
        method=hg.Unrolled(),
        tasks=T,
        chunk=T,
    )
    upper = hg.Problem(
        "meta", module=meta, loss=judge, optimizer=torch.optim.SGD(meta.parameters(), lr=1e-12), data=[tasks()]
    )
    engine(lower, upper).step()

    def value(rates: Tensor) -> Tensor:
        losses = []
        (sx, sy), (qx, qy) = tasks()
        for k in range(T):
            w = {n: p.detach().requires_grad_() for n, p in net().named_parameters()}
            for _ in range(2):
                grads = torch.autograd.grad(F.mse_loss(functional_call(task, w, (sx[k],)), sy[k]), list(w.values()))
                w = {
                    n: (p - r.exp() * g).detach().requires_grad_()
                    for (n, p), g, r in zip(w.items(), grads, rates, strict=True)
                }
            losses.append(F.mse_loss(functional_call(task, w, (qx[k],)), qy[k]).detach())
        return torch.stack(losses).mean()

    assert error(meta.rates.grad, finite_difference(value, meta.rates.detach(), 1e-5)) < 1e-6


@pytest.mark.parametrize("chunk", [1, T])
def test_the_sweep_through_a_task_replays_its_draws(chunk: int) -> None:
    """With one seed the tasks' upper loss is a function of the start; its gradient is that of the same masks."""

    class Drop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(draw(3, seed=5))

    x, y = draw(T, 8, 3, seed=6), draw(T, 8, seed=7)

    def loss(models: Any, batch: Any) -> Tensor:
        return ((F.dropout(torch.tanh(batch[0] * models.task.w), 0.5).sum(1) - batch[1]) ** 2).mean()

    def run(at: Tensor) -> tuple[float, Tensor]:
        task, meta = Drop(), Drop()
        meta.w.data = at.clone()
        lower = hg.Problem(
            "task",
            module=task,
            loss=loss,
            optimizer=torch.optim.SGD(task.parameters(), lr=0.05),
            steps=3,
            start=lambda m: dict(m.meta.named_parameters()),
            method=hg.Unrolled(),
            tasks=T,
            chunk=chunk,
        )
        upper = hg.Problem(
            "meta", module=meta, loss=loss, optimizer=torch.optim.SGD(meta.parameters(), lr=0.0), data=[(x, y)]
        )
        graph = engine(lower, upper)
        torch.manual_seed(3)
        return graph.step().read("meta.loss"), flat(meta)

    at = draw(3, seed=8)
    expected = finite_difference(lambda v: torch.tensor(run(v)[0], dtype=torch.float64), at, 1e-5)
    assert error(run(at)[1], expected) < 1e-6


@pytest.mark.parametrize("compile", [False, "aot_eager"])
@pytest.mark.parametrize("chunk", [1, 2, T])
def test_a_reader_of_a_constant_member_has_its_slopes_in_the_other_alone(chunk: int, compile: bool | str) -> None:
    def graph(top_loss: Any) -> tuple[nn.Module, hg.Engine]:
        meta, task, teacher = net(), net(), net()
        shared: dict[str, Any] = {"steps": 2, "tasks": T, "chunk": chunk, "select": lambda batch, _step: batch}
        lower = hg.Problem(
            "task",
            module=task,
            loss=fit,
            optimizer=torch.optim.SGD(task.parameters(), lr=LR),
            start=lambda m: dict(m.meta.named_parameters()),
            method=hg.Unrolled(compile=compile),
            **shared,
        )
        constant = hg.Problem(
            "teacher",
            module=teacher,
            loss=lambda m, batch: F.mse_loss(m.teacher(batch[1][0]), batch[1][1]),
            optimizer=torch.optim.SGD(teacher.parameters(), lr=LR),
            start=lambda m: dict(hg.detach(m.task).named_parameters()),
            detach=True,
            **shared,
        )
        above = torch.optim.SGD(meta.parameters(), lr=1e-12)
        upper = hg.Problem("meta", module=meta, loss=top_loss, optimizer=above, data=[tasks()])
        return meta, engine([lower, constant], upper)

    def follow(models: Any, batch: Any) -> Tensor:
        x = batch[1][0]
        return F.mse_loss(models.task(x), models.teacher(x))

    def descended(w: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        for _ in range(2):
            loss = F.mse_loss(functional_call(net(), w, (batch[0],)), batch[1])
            slopes = torch.autograd.grad(loss, list(w.values()), create_graph=True)
            w = {n: p - LR * g for (n, p), g in zip(w.items(), slopes, strict=True)}
        return w

    meta, both = graph(follow)
    at = {n: p.detach().clone().requires_grad_() for n, p in meta.named_parameters()}
    total = torch.zeros((), dtype=torch.float64)
    for sx, sy, qx, qy in zip(*tasks()[0], *tasks()[1], strict=True):
        end = descended(at, (sx, sy))
        ahead = descended({n: p.detach().requires_grad_() for n, p in end.items()}, (qx, qy))
        goal = functional_call(net(), {n: p.detach() for n, p in ahead.items()}, (qx,))
        total = total + F.mse_loss(functional_call(net(), end, (qx,)), goal) / T
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(total, list(at.values()))])
    both.step()
    assert error(flat(meta), expected) < 1e-10

    meta, alone = graph(lambda models, batch: models.teacher(batch[1][0]).square().mean())
    alone.step()
    assert not flat(meta).any()
