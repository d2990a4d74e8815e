"""What each option of a problem does, against loops and closed forms written by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_cases import EXACT, Vec, draw, engine, error, finite_difference, problem, spd
from torch import Tensor, nn

import hypergrad as hg

N = 3
A, B = spd(N, 1), draw(N, N, seed=2)
TARGET = draw(N, seed=3)


def low(m: Any, x: Any) -> Tensor:
    shift = 0.0 if x is None else x
    return 0.5 * m.low.v @ A @ m.low.v - m.low.v @ (B @ torch.tanh(m.up.v) + shift)


def top(m: Any, _: Any) -> Tensor:
    return 0.5 * ((m.low.v - TARGET) ** 2).sum() + 0.05 * (m.up.v**2).sum()


def pair(
    method: hg.Method, *, loss: Any = low, top_loss: Any = top, upper: nn.Module | None = None, **options: Any
) -> Any:
    a, u = Vec(N, 1), upper if upper is not None else Vec(N, 2)
    optimizer = options.pop("make", lambda p: torch.optim.SGD(p, lr=0.3))(list(a.parameters()))
    if "schedule" in options:
        options["scheduler"] = options.pop("schedule")(optimizer)
    run = engine(
        problem("low", a, loss, method=method, optimizer=optimizer, **options),
        problem("up", u, top_loss, lr=1e-12, data=[None]),
    )
    return a, u, run


def program(build: Callable[[], Any], steps: int = 1) -> tuple[Tensor, Tensor]:
    """Return the hypergradient of an engine's first step, and the finite difference of its upper loss."""
    _, u, run = build()
    at = u.v.detach().clone()
    run.step()

    def value(v: Tensor) -> Tensor:
        _, other, again = build()
        other.v.data = v.clone()
        return torch.tensor(again.step().read("up.loss"), dtype=torch.float64)

    return u.v.grad, finite_difference(value, at, 1e-5)


RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"make": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1)},
    "adam": {"make": lambda p: torch.optim.Adam(p, lr=0.05)},
    "adamw": {"make": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.3)},
    "clip_norm": {"clip_norm": 0.3},
    "clip_value": {"clip_value": 0.2},
    "both clips": {"clip_norm": 0.5, "clip_value": 0.2},
    "schedule": {"schedule": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.3)},
    "schedules": {
        "schedule": lambda o: [
            torch.optim.lr_scheduler.ExponentialLR(o, 0.8),
            torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
        ]
    },
    "batches": {"data": [draw(N, seed=k) for k in range(3)]},
    "project": {"project": lambda p: {"v": p["v"].clamp(-0.2, 0.25)}},
    "lr": {"hyper": {"lr": lambda m: 0.1 * m.up.v.exp().mean()}},
    "weight decay": {"hyper": {"weight_decay": lambda m: m.up.v.exp().mean()}},
    "momentum as variable": {
        "make": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5),
        "hyper": {"momentum": lambda m: torch.sigmoid(m.up.v[0])},
    },
    "adam's lr and beta": {
        "make": lambda p: torch.optim.Adam(p, lr=0.05),
        "hyper": {"lr": lambda m: 0.1 * m.up.v.exp().mean(), "beta1": lambda m: torch.sigmoid(m.up.v[1])},
    },
}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_unrolled_equals_finite_differences_of_the_run(options: dict[str, Any]) -> None:
    grad, expected = program(lambda: pair(hg.Unrolled(), steps=5, **options))
    assert error(grad, expected) < 1e-6


@pytest.mark.parametrize("method", [hg.Unrolled(retain=0.5), hg.Unrolled(checkpoint=2), hg.ForwardUnrolled()], ids=repr)
def test_the_unrolled_family_agrees(method: hg.Method) -> None:
    options = RUNS["momentum"] | RUNS["clip_norm"] | RUNS["batches"]
    _, u, run = pair(hg.Unrolled(), steps=5, **options)
    _, v, other = pair(method, steps=5, **options)
    run.step()
    other.step()
    assert error(v.v.grad, u.v.grad) < 1e-12


def test_hyper_per_param_group() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(draw(2, seed=1)), nn.Parameter(draw(3, seed=2))

    def loss(m: Any, _: Any) -> Tensor:
        return (m.low.a**2).sum() + (m.low.b**4).sum() + (m.low.a.sum() - m.low.b.sum()) ** 2

    def build() -> Any:
        a, u = Two(), Vec(2, 3)
        optimizer = torch.optim.SGD([{"params": [a.b]}, {"params": [a.a], "momentum": 0.5}], lr=0.1)
        run = engine(
            problem(
                "low",
                a,
                loss,
                optimizer=optimizer,
                steps=4,
                method=hg.Unrolled(),
                hyper={"lr": lambda m: list(0.05 * m.up.v.exp())},
            ),
            problem("up", u, lambda m, _: (m.low.a.sum() - 1) ** 2 + (m.low.b**2).sum(), lr=1e-12),
        )
        return a, u, run

    grad, expected = program(build)
    assert error(grad, expected) < 1e-6


def test_implicit_through_weight_decay_as_a_variable() -> None:
    a, u, run = pair(
        EXACT,
        steps=60,
        loss=lambda m, _: 0.5 * m.low.v @ A @ m.low.v - m.low.v @ TARGET,
        hyper={"weight_decay": lambda m: m.up.v.exp().mean()},
    )
    run.step()

    def total(v: Tensor) -> Tensor:
        w = torch.linalg.solve(A + v.exp().mean() * torch.eye(N, dtype=torch.float64), TARGET)
        return 0.5 * ((w - TARGET) ** 2).sum() + 0.05 * (v**2).sum()

    assert error(u.v.grad, torch.func.grad(total)(u.v.detach())) < 1e-8


@pytest.mark.parametrize("kind", ["lbfgs", "rprop", "own"])
def test_implicit_takes_any_optimizer(kind: str) -> None:
    class Own(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p.grad, alpha=0.7)

    makers: dict[str, Any] = {
        "lbfgs": lambda p: torch.optim.LBFGS(p, lr=1.0, max_iter=20, tolerance_grad=1e-13, tolerance_change=1e-16),
        "rprop": lambda p: torch.optim.Rprop(p, lr=0.05),
        "own": lambda p: Own(p, lr=0.7),
    }
    steps = {"lbfgs": 3, "rprop": 150, "own": 40}[kind]
    _, u, run = pair(EXACT, steps=steps, make=makers[kind])
    run.step()

    def total(v: Tensor) -> Tensor:
        w = torch.linalg.solve(A, B @ torch.tanh(v))
        return 0.5 * ((w - TARGET) ** 2).sum() + 0.05 * (v**2).sum()

    tolerance = 1e-5 if kind == "rprop" else 1e-7  # whose steps shrink to 1e-6
    assert error(u.v.grad, torch.func.grad(total)(u.v.detach())) < tolerance


# --- windows ---------------------------------------------------------------------------------------------------------


def test_every_runs_the_level_before_each_nth_step_above() -> None:
    calls: list[str] = []

    def counted(name: str, loss: Any) -> Any:
        def value(m: Any, x: Any) -> Tensor:
            if torch.is_grad_enabled():
                calls.append(name)
            return loss(m, x)

        return value

    a, u = Vec(N, 1), Vec(N, 2)
    run = engine(
        problem("low", a, low, steps=3, every=4, method=EXACT),
        problem("up", u, counted("up", top), lr=0.1),
    )
    moved = []
    for _ in range(9):
        before = a.v.detach().clone()
        run.step()
        moved.append(not torch.equal(before, a.v))
    assert moved == [k % 4 == 0 for k in range(9)]
    assert run.runners["low"].num_steps == 9


def test_fresh_batches_are_drawn_once_per_run_and_kept() -> None:
    """BiSSL: the implicit system is averaged over batches of its own, the same until the level runs again."""
    drawn: list[int] = []

    class Stream:
        def __iter__(self) -> Any:
            for k in range(1000):
                drawn.append(k)
                yield draw(N, seed=100 + k)

    def quartic(m: Any, x: Tensor) -> Tensor:
        return (
            0.5 * m.low.v @ A @ m.low.v
            + 0.25 * ((m.low.v + x) ** 4).sum()
            - m.low.v @ (B @ torch.tanh(m.up.v) * (1 + x[0]))
        )

    method = hg.Implicit(hg.Exact(), batches=3, fresh=True)
    a, u = Vec(N, 1), Vec(N, 2)
    run = engine(
        problem("low", a, quartic, steps=2, every=2, method=method, data=Stream(), lr=0.05),
        problem("up", u, top, lr=0.1),
    )
    for step in range(4):
        at = u.v.detach().clone()
        run.step()
        assert len(drawn) == 5 * (step // 2 + 1)
        xs = [draw(N, seed=100 + k) for k in drawn[-3:]]
        w = a.v.detach()

        def mean(w: Tensor, v: Tensor, xs: Any = xs) -> Tensor:
            values = [0.5 * w @ A @ w + 0.25 * ((w + x) ** 4).sum() - w @ (B @ torch.tanh(v) * (1 + x[0])) for x in xs]
            return torch.stack(values).mean()

        hessian = torch.func.jacrev(torch.func.grad(mean))(w, at)
        x = torch.linalg.solve(hessian, w - TARGET)
        mixed = torch.func.grad(lambda v, x=x, w=w, mean=mean: torch.func.grad(mean)(w, v) @ x)(at)
        assert error(u.v.grad, 0.1 * at - mixed) < 1e-9


@pytest.mark.parametrize("after", ["continue", "rollback", "restart"])
def test_after(after: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)
            self.out = nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.norm(x))

    torch.manual_seed(0)
    net, u = Net(), nn.Linear(2, 1)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    x = torch.randn(10, 2)
    lower = hg.Problem(
        "net",
        module=net,
        loss=lambda m, _: ((m.net(x) - m.u(x)) ** 2).mean(),
        optimizer=optimizer,
        scheduler=scheduler,
        data=[None],
        steps=3,
        method=hg.Unrolled(),
        after=after,
    )
    run = engine(
        lower,
        hg.Problem(
            "u",
            module=u,
            loss=lambda m, _: (m.net(x) ** 2).mean(),
            optimizer=torch.optim.SGD(u.parameters(), lr=0.0),
            data=[None],
        ),
    )

    def state() -> Any:
        return copy.deepcopy(
            (net.state_dict(), optimizer.state_dict()["state"], scheduler.last_epoch, optimizer.param_groups[0]["lr"])
        )

    first = state()
    losses = []
    run.step()
    one = state()
    run.step()
    two = state()
    losses = [record.read("u.loss") for record in run.run(1)]
    if after == "continue":
        assert two[2] == 6
        assert int(two[1][0]["step"]) == 6
    elif after == "rollback":
        for a, b in ((first, one), (one, two)):
            assert all(torch.equal(v, b[0][k]) for k, v in a[0].items())
            assert a[2:] == b[2:]
        assert not one[1]
    else:
        assert all(torch.equal(v, two[0][k]) for k, v in one[0].items())
        assert int(two[1][0]["step"]) == 3
        assert one[2:] == two[2:]
    assert losses


def test_momentum_goes_on_across_windows() -> None:
    """The second window begins at the first one's momentum, a constant there."""
    make = RUNS["momentum"]["make"]
    a, u, run = pair(hg.Unrolled(), steps=3, make=make)
    run.step()
    begin, buffer = a.v.detach().clone(), run.graph.problems["low"].optimizer.state[a.v]["momentum_buffer"].clone()
    at = u.v.detach().clone()
    run.step()

    def second(v: Tensor) -> Tensor:
        w, m = begin, buffer
        for _ in range(3):
            g = A @ w - B @ torch.tanh(v) + 0.1 * w
            m = 0.9 * m + g
            w = w - 0.1 * (g + 0.9 * m)
        return 0.5 * ((w - TARGET) ** 2).sum() + 0.05 * (v**2).sum()

    assert error(u.v.grad, torch.func.grad(second)(at)) < 1e-10


# --- what a loss sees ------------------------------------------------------------------------------------------------


def test_response_replaces_the_loss_in_the_implicit_system() -> None:
    other = spd(N, 9)

    def response(m: Any, _: Any) -> Tensor:
        return 0.5 * m.low.v @ other @ m.low.v - m.low.v @ (B @ m.up.v)

    a, u, run = pair(EXACT, steps=4, response=response)
    run.step()
    x = torch.linalg.solve(other, a.v.detach() - TARGET)
    assert error(u.v.grad, 0.1 * u.v.detach() + B.T @ x) < 1e-9


def test_gauss_newton_of_a_composite_in_the_engine() -> None:
    x, y = draw(12, N, seed=5), draw(12, seed=6)

    def outputs(m: Any, _: Any) -> Tensor:
        return torch.tanh(x @ m.low.v)

    loss = hg.Composite(outputs, lambda z, _: ((z - y) ** 2).mean(), lambda m, _: (m.up.v.exp() * m.low.v**2).sum())
    a, u, run = pair(hg.Implicit(hg.Exact(), curvature="gauss_newton"), steps=3, loss=loss)
    run.step()
    w, v = a.v.detach(), u.v.detach()
    jacobian = torch.func.jacrev(lambda w: torch.tanh(x @ w))(w)
    curvature = 2 / 12 * jacobian.T @ jacobian + 2 * torch.diag(v.exp())
    solution = torch.linalg.solve(curvature, w - TARGET)
    assert error(u.v.grad, 0.1 * v - 2 * v.exp() * w * solution) < 1e-9


def test_select_and_no_data() -> None:
    """Without data a level receives its part of the batch above; a middle level passes its own part on."""
    seen: list[tuple[str, Any]] = []

    def noting(name: str, loss: Any) -> Any:
        def value(m: Any, x: Any) -> Tensor:
            seen.append((name, x))
            return loss(m, None)

        return value

    a, b, t = Vec(N, 1), Vec(N, 2), Vec(N, 3)
    run = engine(
        problem(
            "a",
            a,
            noting("a", lambda m, _: 0.5 * (m.a.v**2).sum() - m.a.v @ m.b.v),
            data=None,
            select=lambda batch, k: batch + (k,),
            steps=2,
            method=hg.SAMA(),
        ),
        problem(
            "b",
            b,
            noting("b", lambda m, _: ((m.b.v + m.a.v - m.t.v) ** 2).sum()),
            data=None,
            select=lambda batch, k: batch + (10 * k,),
            steps=2,
            method=hg.FiniteDifference(),
            lr=0.1,
        ),
        problem("t", t, noting("t", lambda m, _: (m.b.v**2).sum()), data=[(100,), (200,)]),
    )
    seen.clear()
    run.run(2)
    own = [x for name, x in seen if name == "a"]
    assert {x for name, x in seen if name == "t"} == {(100,), (200,)}
    assert {x for name, x in seen if name == "b"} == {(100, 0), (100, 10), (200, 0), (200, 10)}
    assert set(own) == {(c, d, k) for c in (100, 200) for d in (0, 10) for k in (0, 1)}


class Slotted:
    """A batch sampler without attributes."""

    __slots__ = ()

    def __iter__(self) -> Any:
        return iter([[0, 1], [2, 3]])


class Endless(torch.utils.data.IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        return iter(torch.arange(4.0))


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (torch.arange(4.0), {"batch_sampler": [[0, 1], [2, 3]]}),
        (torch.arange(4.0), {"batch_sampler": Slotted()}),
        (Endless(), {"batch_size": 2}),
        (Endless(), {"batch_size": None}),
    ],
)
def test_any_loader_serves(data: Any, options: Any) -> None:
    a, u = Vec(N, 1), Vec(N, 2)
    loader: Any = torch.utils.data.DataLoader(data, **options)
    run = engine(
        problem("low", a, lambda m, x: low(m, None) + 0.0 * x.sum(), data=loader, steps=3, method=EXACT),
        problem("up", u, top),
    )
    run.run(2)
    assert run.state_dict()["num_steps"] == 2


def test_loaders_of_different_lengths_begin_again_by_themselves() -> None:
    seen: dict[str, list[int]] = {"low": [], "up": []}

    def noting(name: str, loss: Any) -> Any:
        def value(m: Any, x: Any) -> Tensor:
            seen[name].append(x)
            return loss(m, None)

        return value

    a, u = Vec(N, 1), Vec(N, 2)
    method = hg.Implicit(hg.CG(1), damping=1.0)
    run = engine(
        problem("low", a, noting("low", low), data=[0, 1, 2], steps=2, method=method),
        problem("up", u, noting("up", top), data=[0, 1]),
    )
    seen["low"].clear()
    seen["up"].clear()
    run.run(3)
    assert seen["up"] == [0, 1, 0]
    assert [x for k, x in enumerate(seen["low"]) if k % 3 < 2] == [0, 1, 2, 0, 1, 2]


def test_metrics_and_history() -> None:
    a, u, run = pair(EXACT, steps=2, top_loss=lambda m, x: (top(m, x), {"norm": m.low.v.norm(), "note": "text"}))
    history = run.run(3)
    assert len(history) == 3
    assert list(history["up.norm"]) == [record.read("up.norm") for record in history]
    assert history[0]["up.note"] == "text"
    assert {"low.loss", "up.loss", "low.residual_norm", "low.num_products"} <= set(history.keys())
    with pytest.raises(KeyError, match="low.loss"):
        history["nothing"]


class Backbone(nn.Module):
    """Containers, submodules, methods, properties and attributes that a loss may read."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(2, 3, dtype=torch.float64), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(3, 1, dtype=torch.float64) for _ in range(2)])
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(2, dtype=torch.float64))])
        self.tables = nn.ParameterDict({"t": nn.Parameter(torch.ones(2, dtype=torch.float64))})
        self.factor = 2.0

    def features(self, x: Tensor) -> Tensor:
        return self.backbone(x) * self.factor

    @property
    def scale(self) -> Tensor:
        return self.scales[0].exp()

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[0](self.features(x * self.scale))


READS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "call": lambda p, x: p(x).sum(),
    "submodule": lambda p, x: p.backbone(x).sum(),
    "container": lambda p, x: p.heads[1](p.backbone[1](p.backbone[0](x))).sum(),
    "iterated": lambda p, x: sum(head(p.backbone(x)).sum() for head in p.heads),
    "method": lambda p, x: p.features(x).sum() * p.factor,
    "property": lambda p, x: (x * p.scale).sum(),
    "parameters": lambda p, x: sum((q**2).sum() for q in p.parameters()),
    "named_parameters": lambda p, x: sum((q**2).sum() * len(n) for n, q in p.named_parameters()),
    "named_modules": lambda p, x: sum(
        (q.weight**2).sum() for _, q in p.named_modules() if isinstance(getattr(q, "out_features", None), int)
    ),
    "attribute": lambda p, x: (p.backbone[0].weight ** 2).sum() + p.scales[0].sum() + p.tables["t"].sum(),
    "get_parameter": lambda p, x: (p.get_parameter("backbone.0.weight") ** 2).sum(),
}


@pytest.mark.parametrize("read", [r for k, r in READS.items() if k != "get_parameter"])  # torch insists on nn.Parameter
def test_models_answer_as_their_modules_would(read: Callable[[Any, Tensor], Tensor]) -> None:
    """The upper module is read in every way, with another's values in the place of its parameters."""
    x = draw(4, 2, seed=1)
    torch.manual_seed(0)
    up, a = Backbone(), Vec(1, 1)
    run = engine(
        problem("low", a, lambda m, _: ((m.low.v - read(m.up, x)) ** 2).sum(), steps=1, lr=0.5, method=EXACT),
        problem("up", up, lambda m, _: (m.low.v**2).sum(), lr=1e-12),
    )
    run.step()
    params = list(up.parameters())
    value = read(up, x)
    expected = torch.autograd.grad(value**2, params, allow_unused=True)
    for p, g in zip(params, expected, strict=True):
        assert (p.grad is None or not p.grad.any()) if g is None else torch.allclose(p.grad, g, rtol=1e-8)


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_detach_cuts_every_read(read: Callable[[Any, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    up, x = Backbone(), draw(4, 2, seed=1).requires_grad_()
    constant = read(hg.detach(up), x)
    whole = read(up, x)
    assert torch.equal(constant, whole)
    through = (
        torch.autograd.grad(constant, [x, *up.parameters()], allow_unused=True) if constant.requires_grad else [None]
    )
    kept = torch.autograd.grad(whole, x, allow_unused=True)[0]
    assert all(g is None for g in through[1:])
    if kept is not None:
        assert through[0] is not None
        assert torch.equal(through[0], kept)


def test_detach_true_is_a_constant_for_others() -> None:
    """A teacher that nobody differentiates: its own loss trains it, others read it without a gradient."""
    teacher, a, u = Vec(N, 5), Vec(N, 1), Vec(N, 2)
    run = engine(
        [
            problem("teacher", teacher, lambda m, _: ((m.teacher.v - m.up.v) ** 2).sum(), detach=True, lr=0.1, steps=2),
            problem("low", a, lambda m, _: low(m, None) - m.low.v @ m.teacher.v, steps=60, method=EXACT),
        ],
        problem("up", u, lambda m, x: top(m, x) + m.up.v @ m.teacher.v, lr=1e-12),
    )
    run.step()
    taught = teacher.v.detach()

    def total(v: Tensor) -> Tensor:
        w = torch.linalg.solve(A, B @ torch.tanh(v) + taught)
        return 0.5 * ((w - TARGET) ** 2).sum() + 0.05 * (v**2).sum() + v @ taught

    assert error(u.v.grad, torch.func.grad(total)(u.v.detach())) < 1e-8


def test_frozen_shared_and_unused_parameters() -> None:
    """A lower module with a frozen part, a part shared with the upper module, one tied and one that no loss reads."""

    class Low(nn.Module):
        def __init__(self, shared: nn.Parameter) -> None:
            super().__init__()
            self.w, self.frozen, self.unused = (nn.Parameter(draw(N, seed=k)) for k in (1, 2, 3))
            self.tied = self.w
            self.shared = shared
            self.frozen.requires_grad_(False)

    u = Vec(N, 4)
    a = Low(u.v)

    def loss(m: Any, _: Any) -> Tensor:
        p = m.low
        return 0.5 * p.w @ A @ p.tied - p.w @ (B @ torch.tanh(p.shared) + p.frozen)

    optimizer = torch.optim.SGD([a.frozen, a.unused, a.w], lr=0.5)
    run = engine(
        problem("low", a, loss, optimizer=optimizer, steps=60, method=EXACT, reads=["up"]),
        problem("up", u, lambda m, _: ((m.low.tied - TARGET) ** 2).sum(), lr=1e-12),
    )
    before = a.unused.detach().clone()
    run.step()

    def total(v: Tensor) -> Tensor:
        return ((torch.linalg.solve(A, B @ torch.tanh(v) + a.frozen) - TARGET) ** 2).sum()

    assert error(u.v.grad, torch.func.grad(total)(u.v.detach())) < 1e-8
    assert torch.equal(before, a.unused)
    assert a.unused.grad is None
    assert not a.frozen.requires_grad


# --- breakdowns, callbacks -------------------------------------------------------------------------------------------


def concave(**options: Any) -> Any:
    a, u = Vec(N, 1), Vec(N, 2)
    run = engine(
        problem(
            "low", a, lambda m, _: -0.5 * (m.low.v**2).sum() + m.low.v @ m.up.v, lr=1e-3, method=hg.Implicit(hg.CG(3))
        ),
        problem("up", u, top, lr=0.1),
        **options,
    )
    return u, run


def test_breakdown_raise_warn_skip() -> None:
    u, run = concave()
    with pytest.raises(hg.SolveError, match=r"'up' \(level 1\) at step 0"):
        run.step()
    u, run = concave(on_breakdown="warn")
    before = u.v.detach().clone()
    with pytest.warns(RuntimeWarning, match=r"'up'"):
        record = run.step()
    assert not torch.equal(before, u.v)
    assert record["up.result"] == int(hg.Result.NEGATIVE_CURVATURE)
    u, run = concave(on_breakdown="skip")
    before = u.v.detach().clone()
    assert run.step()["up.result"] == int(hg.Result.NEGATIVE_CURVATURE)
    assert torch.equal(before, u.v)
    assert run.num_steps == 1


def test_callbacks_are_told_and_may_stop() -> None:
    class Listener(hg.callbacks.Callback):
        def __init__(self) -> None:
            self.told: list[Any] = []

        def on_start(self, engine: Any, num_steps: int) -> None:
            self.told.append(("start", num_steps))

        def on_step(self, engine: Any, record: Any) -> None:
            self.told.append(record["step"])
            self.should_stop = record["step"] == 2

        def on_end(self, engine: Any, history: Any) -> None:
            self.told.append(("end", len(history)))

    listener = Listener()
    _, _, run = pair(EXACT)
    history = run.run(10, callbacks=[listener])
    assert listener.told == [("start", 10), 0, 1, 2, ("end", 3)]
    assert len(history) == 3


def test_partial_hessian_equals_its_formula() -> None:
    """Curvature and mixed partial of the middle level with the lowest one held fixed."""
    C = draw(N, N, seed=11)
    a, b, t = Vec(N, 1), Vec(N, 2), Vec(N, 3)
    run = engine(
        problem(
            "a", a, lambda m, _: 0.5 * m.a.v @ A @ m.a.v - m.a.v @ (B @ m.b.v), steps=60, method=hg.Implicit(hg.Exact())
        ),
        problem(
            "b",
            b,
            lambda m, _: (m.b.v**2).sum() + 0.1 * (m.a.v * m.b.v).sum() ** 2 - m.b.v @ C @ m.t.v,
            steps=4,
            lr=0.05,
            method=hg.Implicit(hg.Exact()),
        ),
        problem("t", t, lambda m, _: ((m.b.v - TARGET) ** 2).sum() + m.a.v @ m.t.v, lr=1e-12),
        partial_hessian=True,
    )
    run.step()
    fixed, at, v = a.v.detach(), t.v.detach(), b.v.detach()
    hessian = torch.func.jacrev(torch.func.grad(lambda b: (b**2).sum() + 0.1 * (fixed * b).sum() ** 2))(v)
    cotangent = 2 * (v - TARGET) + B.T @ torch.linalg.solve(A, at)
    assert error(t.v.grad, fixed + C.T @ torch.linalg.solve(hessian, cotangent)) < 1e-9
