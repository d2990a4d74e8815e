"""`diagnose(engine)`: the numbers of the functional form, for every kind of level, and nothing changed by looking."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import hypergrad as hg

F64 = torch.float64


class Vector(nn.Module):
    def __init__(self, *values: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values, dtype=F64))

    def forward(self) -> Tensor:
        return self.w


CURVATURE = torch.tensor([1.0, 4.0], dtype=F64)


def lower_loss(models, batch) -> Tensor:
    return 0.5 * (CURVATURE * (models.low() - models.top() * batch) ** 2).sum()


def upper_loss(models, batch) -> Tensor:
    return ((models.low() - batch) ** 2).sum() + 0.1 * (models.top() ** 2).sum()


def pair(method: hg.Method, *, lower_optimizer=None, **options) -> hg.Engine:
    low, top = Vector(0.0, 0.5), Vector(1.0, -1.0)
    make = lower_optimizer or (lambda p: torch.optim.SGD(p, lr=0.2))
    options.setdefault("data", [torch.ones(2, dtype=F64), torch.full((2,), 2.0, dtype=F64)])
    options.setdefault("steps", 60)
    return hg.Engine(
        [
            hg.Problem("low", module=low, loss=lower_loss, optimizer=make(low.parameters()), method=method, **options),
            hg.Problem(
                "top",
                module=top,
                loss=upper_loss,
                optimizer=torch.optim.Adam(top.parameters(), lr=0.1),
                data=[torch.full((2,), 0.5, dtype=F64)],
            ),
        ]
    )


def everything(engine: hg.Engine) -> dict:
    found = copy.deepcopy(engine.state_dict())
    found["grads"] = {
        f"{name}.{key}": None if p.grad is None else p.grad.clone()
        for name, problem in engine.graph.problems.items()
        for key, p in problem.module.named_parameters()
    }
    found["rng"] = torch.get_rng_state()
    return found


def same(a, b) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def test_a_known_spectrum_before_and_after_steps() -> None:
    engine = pair(hg.Implicit(hg.CG(5)))
    d = hg.diagnose(engine)["low"]  # no window yet: its 60 steps are rehearsed on the first batch alone
    assert (d.smallest, d.largest) == (pytest.approx(1.0), pytest.approx(4.0))
    assert d.reader == "top" and d.size == 2 and d.distance < 1e-5
    engine.run(3)
    d = hg.diagnose(engine)["low"]  # batches alternate between 1 and 2: the run ends where no single one is solved
    assert (d.smallest, d.largest) == (pytest.approx(1.0), pytest.approx(4.0))
    assert 0.01 < d.distance < 0.5 and d.recommendation == hg.Unrolled()


def test_one_batch_and_many_steps_are_stationary() -> None:
    d = hg.diagnose(pair(hg.Implicit(hg.CG(5)), data=[torch.ones(2, dtype=F64)]))["low"]
    assert d.distance < 1e-5 and d.condition == pytest.approx(4.0)
    assert isinstance(d.recommendation, hg.Implicit)
    assert next(a for a in d.agreement if a.name == "Implicit(CG(5))").difference < 1e-5
    assert next(a for a in d.agreement if a.name == "Unrolled").difference < 1e-4


def test_the_functional_form_says_the_same() -> None:
    engine = pair(hg.Unrolled(), data=[torch.ones(2, dtype=F64)], steps=7)
    d = hg.diagnose(engine)["low"]
    upper = {"top": torch.tensor([1.0, -1.0], dtype=F64)}

    def lower(w, u, batch) -> Tensor:
        return 0.5 * (CURVATURE * (w["w"] - u["top"]) ** 2).sum()

    def above(w, u, batch) -> Tensor:
        return ((w["w"] - 0.5) ** 2).sum() + 0.1 * (u["top"] ** 2).sum()

    start = {"w": torch.tensor([0.0, 0.5], dtype=F64)}
    traj = hg.descend(lower, start, upper, optimizer=hg.optim.SGD(lr=0.2), batches=[None] * 7)
    expected = hg.diagnose(above, traj, upper, method=hg.Unrolled())
    assert d.stationarity == pytest.approx(expected.stationarity)
    assert d.relative_stationarity == pytest.approx(expected.relative_stationarity)
    assert d.distance == pytest.approx(expected.distance)
    for one, other in zip(d.agreement, expected.agreement, strict=True):
        assert one.name == other.name and one.difference == pytest.approx(other.difference, abs=1e-12)


METHODS = [
    (hg.Implicit(hg.CG(3)), {}),
    (hg.Unrolled(truncate=5), {}),
    (hg.SAMA(), {}),
    (hg.Penalty(steps=3), {}),
    (hg.Implicit(hg.CG(3)), {"after": "rollback"}),
    (hg.Implicit(hg.CG(3)), {"after": "restart"}),
    (hg.Implicit(hg.CG(3)), {"every": 2}),
    (hg.Implicit(hg.CG(3)), {"lower_optimizer": lambda p: torch.optim.LBFGS(p, max_iter=3), "steps": 2}),
    (hg.OneStep(), {"lower_optimizer": lambda p: torch.optim.Adam(p, lr=0.1)}),
    (hg.Unrolled(), {"start": lambda models: {"w": models.top()}}),
    (hg.Reptile(), {"start": lambda models: {"w": models.top()}, "steps": 3}),
]


@pytest.mark.parametrize(("method", "options"), METHODS)
def test_looking_changes_nothing_now_and_later(method: hg.Method, options: dict) -> None:
    looked, left = pair(method, **options), pair(method, **options)
    for num_steps in (0, 1, 2):
        if num_steps:
            looked.run(num_steps), left.run(num_steps)
        before = everything(looked)
        d = hg.diagnose(looked)["low"]
        assert d.largest == pytest.approx(4.0)
        assert same(everything(looked), before)
        assert same(everything(looked), everything(left))


def test_batch_norm_dropout_and_a_shuffling_loader_are_left_alone() -> None:
    def build() -> hg.Engine:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 1))
        weight = nn.Linear(1, 1)
        rows = torch.randn(24, 3)
        loader = torch.utils.data.DataLoader(rows, batch_size=8, shuffle=True)
        return hg.Engine(
            [
                hg.Problem(
                    "net",
                    module=net,
                    loss=lambda models, x: (
                        (models.weight(models.net(x)) ** 2).mean()
                        + 0.1 * sum((p**2).sum() for p in models.net.parameters())
                    ),
                    optimizer=torch.optim.Adam(net.parameters(), lr=0.01),
                    data=loader,
                    steps=4,
                    method=hg.Implicit(hg.CG(2), damping=1.0),
                ),
                hg.Problem(
                    "weight",
                    module=weight,
                    loss=lambda models, x: ((models.net(x) - 1.0) ** 2).mean(),
                    optimizer=torch.optim.SGD(weight.parameters(), lr=0.01),
                    data=loader,
                ),
            ],
            on_breakdown="warn",
        )

    states = []
    for look in (True, False):
        engine = build()
        for _ in range(4):
            if look:
                before = everything(engine)
                hg.diagnose(engine)
                assert same(everything(engine), before)
            engine.step()
        states.append(everything(engine))
    assert same(*states)


def test_three_levels_report_both_lower_problems() -> None:
    low, middle, top = Vector(0.0), Vector(0.0), Vector(1.0)
    ones = [torch.ones(1, dtype=F64)]
    engine = hg.Engine(
        [
            hg.Problem(
                "low",
                module=low,
                loss=lambda m, b: 1.5 * ((m.low() - m.middle()) ** 2).sum(),
                optimizer=torch.optim.SGD(low.parameters(), lr=0.3),
                data=ones,
                steps=10,
                method=hg.Unrolled(),
            ),
            hg.Problem(
                "middle",
                module=middle,
                loss=lambda m, b: ((m.low() - m.top()) ** 2).sum() + (m.middle() ** 2).sum(),
                optimizer=torch.optim.SGD(middle.parameters(), lr=0.2),
                data=ones,
                steps=10,
                method=hg.Implicit(hg.CG(2)),
            ),
            hg.Problem(
                "top",
                module=top,
                loss=lambda m, b: ((m.middle() - 3.0) ** 2).sum(),
                optimizer=torch.optim.SGD(top.parameters(), lr=0.1),
                data=ones,
            ),
        ]
    )
    before = everything(engine)
    found = hg.diagnose(engine)
    assert list(found) == ["low", "middle"]
    assert found["low"].largest == pytest.approx(3.0) and found["low"].reader == "middle"
    assert found["middle"].largest == pytest.approx(4.0)  # low follows middle: 2 of its own and 2 through low
    assert found["middle"].reader == "top" and found["middle"].distance < 1e-5
    assert same(everything(engine), before)
    assert "low, read by middle" in str(found) and "middle, read by top" in str(found)


def test_a_middle_level_that_the_top_reads_only_through_the_lowest() -> None:
    low, middle, top = Vector(0.0), Vector(0.0), Vector(1.0)
    data = [torch.ones(1, dtype=F64)]

    def make(name: str, module: Vector, loss, lr: float, **options) -> hg.Problem:
        optimizer = torch.optim.SGD(module.parameters(), lr=lr)
        return hg.Problem(name, module=module, loss=loss, optimizer=optimizer, data=data, **options)

    engine = hg.Engine(
        [
            make(
                "low",
                low,
                lambda m, b: ((m.low() - m.middle()) ** 2).sum(),
                0.45,
                steps=12,
                method=hg.Implicit(hg.CG(2)),
            ),
            make(
                "middle",
                middle,
                lambda m, b: ((m.low() - m.top()) ** 2).sum() + (m.middle() ** 2).sum(),
                0.2,
                steps=12,
                method=hg.Implicit(hg.CG(2)),
            ),
            make("top", top, lambda m, b: ((m.low() - 3.0) ** 2).sum(), 0.0),
        ]
    )
    before = everything(engine)
    d = hg.diagnose(engine)["middle"]
    assert same(everything(engine), before)
    assert d.reader == "top" and d.largest == pytest.approx(4.0)
    # low = middle = top / 2: d/dtop (top / 2 - 3)^2 = top / 2 - 3 = -2.5 at top = 1
    engine.step()
    torch.testing.assert_close(top.w.grad, torch.tensor([-2.5], dtype=F64), rtol=1e-3, atol=0.0)
    assert next(a for a in d.agreement if a.name == "Implicit(CG(2))").difference < 1e-6


def test_the_first_task_stands_for_all() -> None:
    low, top = Vector(0.0, 0.0), Vector(1.0, -1.0)
    engine = hg.Engine(
        [
            hg.Problem(
                "low",
                module=low,
                loss=lower_loss,
                optimizer=torch.optim.SGD(low.parameters(), lr=0.2),
                select=lambda batch, step: batch,
                steps=100,
                tasks=3,
                method=hg.Implicit(hg.CG(2)),
            ),
            hg.Problem(
                "top",
                module=top,
                loss=upper_loss,
                optimizer=torch.optim.SGD(top.parameters(), lr=0.1),
                data=[torch.ones(3, 2, dtype=F64)],
            ),
        ]
    )
    engine.step()
    before = everything(engine)
    d = hg.diagnose(engine)["low"]
    assert d.size == 2 and d.condition == pytest.approx(4.0) and d.distance < 1e-6
    assert same(everything(engine), before)


def test_refusals() -> None:
    engine = pair(hg.Implicit(hg.CG(3)))
    with pytest.raises(ValueError, match="takes no run, upper parameters, method or batch"):
        hg.diagnose(engine, method=hg.Unrolled())
    alone = Vector(1.0)
    single = hg.Engine(
        [
            hg.Problem(
                "only",
                module=alone,
                loss=lambda m, b: (m.only() ** 2).sum(),
                optimizer=torch.optim.SGD(alone.parameters(), lr=0.1),
                data=[0],
            )
        ]
    )
    with pytest.raises(ValueError, match="no level of this engine differentiates"):
        hg.diagnose(single)
