"""A saved state goes on as if nothing had happened: parameters, optimizers, data, draws, windows."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hypergrad as hg


def build(
    method: hg.Method, *, kind: str = "loader", seed: int = 0, **options: Any
) -> tuple[hg.Engine, nn.Module, nn.Module]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 2))
    weights = nn.Linear(3, 1)
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(22, 3, generator=g), torch.randint(0, 2, (22,), generator=g)
    data: Any = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y), batch_size=5, shuffle=True, drop_last=True
    )
    if kind == "list":
        data = [(x[k::4], y[k::4]) for k in range(4)]
    if kind == "stream":

        class Stream:
            def __iter__(self) -> Any:
                while True:
                    pick = torch.randint(0, 22, (6,))
                    yield x[pick], y[pick]

        data = Stream()

    def lower_loss(m: Any, batch: Any) -> Tensor:
        return (
            torch.sigmoid(m.weights(batch[0]))[:, 0] * F.cross_entropy(m.net(batch[0]), batch[1], reduction="none")
        ).mean()

    def upper_loss(m: Any, batch: Any) -> Tensor:
        return F.cross_entropy(m.net(batch[0]), batch[1])

    lower = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    upper = torch.optim.Adam(weights.parameters(), lr=0.02)
    engine = hg.Engine(
        [
            hg.Problem(
                "net",
                module=net,
                loss=lower_loss,
                optimizer=lower,
                scheduler=torch.optim.lr_scheduler.StepLR(lower, 3, 0.8),
                data=data,
                method=method,
                **({"steps": 3} | options),
            ),
            hg.Problem("weights", module=weights, loss=upper_loss, optimizer=upper, data=data),
        ],
        on_breakdown="warn",
        product_check=False,
    )
    return engine, net, weights


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return set(one) == set(other) and all(same(v, other[k]) for k, v in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


CASES: dict[str, Any] = {
    "unrolled": (hg.Unrolled(), {}),
    "rollback": (hg.Unrolled(), {"after": "rollback"}),
    "restart": (hg.Unrolled(), {"after": "restart"}),
    "soba": (hg.SOBA(), {}),
    "f2sa": (hg.F2SA(growth=0.5, steps=2), {}),
    "bome": (hg.BOME(), {}),
    "warm": (hg.Implicit(hg.CG(3), damping=5.0, warm_start=True), {}),
    "recycle": (hg.Implicit(hg.CG(3), damping=5.0, recycle=4), {}),
    "every": (hg.Implicit(hg.CG(3), damping=5.0, batches=2), {"every": 3}),
    "fresh": (hg.Implicit(hg.CG(3), damping=5.0, batches=2, fresh=True), {"every": 3}),
    "every first order": (hg.SAMA(), {"every": 3}),
    "every rollback": (hg.OneStep(), {"every": 3, "after": "rollback"}),
}


@pytest.mark.filterwarnings("ignore:hypergradient of problem")
@pytest.mark.parametrize("kind", ["loader", "list", "stream"])
@pytest.mark.parametrize(("method", "options"), CASES.values(), ids=CASES)
def test_a_loaded_state_goes_on_identically(method: hg.Method, options: dict[str, Any], kind: str) -> None:
    engine, net, weights = build(method, kind=kind, **options)
    torch.manual_seed(4)
    engine.run(4)
    state = engine.state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    expected = engine.run(5)
    ends = copy.deepcopy((net.state_dict(), weights.state_dict(), torch.get_rng_state()))
    file.seek(0)
    for loaded in (state, torch.load(file, weights_only=True)):
        other, other_net, other_weights = build(method, kind=kind, seed=9, **options)
        other.run(1)
        other.load_state_dict(loaded)
        history = other.run(5)
        assert other.num_steps == 9
        assert [dict(r) for r in history] == [dict(r) for r in expected]
        assert same(ends, (other_net.state_dict(), other_weights.state_dict(), torch.get_rng_state()))


def test_a_state_is_a_copy() -> None:
    engine, net, _ = build(hg.Unrolled(), kind="list")
    engine.run(2)
    state = engine.state_dict()
    before = copy.deepcopy(state)
    engine.run(3)
    assert same(before["problems"], state["problems"])
    for _ in range(2):
        engine.load_state_dict(state)
        assert same(net.state_dict(), before["problems"]["net"]["module"])
        engine.run(2)
        assert same(before["problems"], state["problems"])


def test_a_state_saved_before_the_first_step() -> None:
    engine, net, _ = build(hg.Unrolled())
    state = engine.state_dict()
    torch.manual_seed(3)
    state["random"]["cpu"] = torch.get_rng_state()
    engine.load_state_dict(state)
    engine.run(2)
    end = copy.deepcopy(net.state_dict())
    engine.load_state_dict(state)
    engine.run(2)
    assert same(end, net.state_dict())


def test_memory_stays_flat() -> None:
    """Nothing of a step outlives its window."""
    import gc

    engine, _, _ = build(hg.Unrolled(retain=0.5), kind="list")
    engine.run(3)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    before = tensors()
    for _ in range(30):
        engine.step()
    assert tensors() <= before + 5
