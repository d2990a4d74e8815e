"""An engine step leaves everything as the same optimizer steps and one upper-loss evaluation by hand would."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hypergrad as hg

METHODS: dict[str, hg.Method] = {
    "implicit": hg.Implicit(hg.CG(3), damping=10.0),
    "neumann": hg.Implicit(hg.Neumann(num_terms=2, step_size=1e-3)),
    "gauss_newton_like": hg.Implicit(hg.Nystrom(rank=2), damping=1.0),
    "unrolled": hg.Unrolled(),
    "checkpointed": hg.Unrolled(checkpoint="sqrt"),
    "truncated": hg.Unrolled(truncate=1),
    "retained": hg.Unrolled(retain=0.5),
    "forward": hg.ForwardUnrolled(),
    "one_step": hg.OneStep(),
    "finite_difference": hg.FiniteDifference(),
    "sama": hg.SAMA(),
    "penalty": hg.Penalty(steps=2),
    "soba": hg.SOBA(),
    "amigo": hg.AmIGO(steps=2, batches=2, step_size=1e-3),
    "stocbio": hg.StocBiO(num_products=2, step_size=1e-3),
    "f2sa": hg.F2SA(steps=2),
    "bome": hg.BOME(),
}


def lower_net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 2))


class Weights(nn.Module):
    """An upper module with draws and buffers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.out = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(F.dropout(self.out(self.norm(x)), 0.5, self.training))


def lower_loss(m: Any, batch: Any) -> Tensor:
    x, y = batch
    return (m.weights(x).squeeze(1) * F.cross_entropy(m.net(x), y, reduction="none")).mean()


def upper_loss(m: Any, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(m.net(x), y) + 0.01 * m.weights(x).mean()


def batches(count: int, seed: int) -> list[Any]:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, 4, generator=g), torch.randint(0, 2, (8,), generator=g)) for _ in range(count)]


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
}


def build(method: hg.Method, kind: str) -> tuple[hg.Engine, nn.Module, nn.Module, list[Any]]:
    torch.manual_seed(3)
    net, weights = lower_net(), Weights()
    lower = OPTIMIZERS[kind](net.parameters())
    upper = torch.optim.Adam(weights.parameters(), lr=0.01)
    schedules = [torch.optim.lr_scheduler.StepLR(lower, 2, 0.5), torch.optim.lr_scheduler.ExponentialLR(upper, 0.9)]
    problems = [
        hg.Problem(
            "net",
            module=net,
            loss=lower_loss,
            optimizer=lower,
            data=batches(3, 0),
            steps=4,
            method=method,
            clip_norm=0.1,
            clip_value=0.03,
            scheduler=schedules[0],
        ),
        hg.Problem(
            "weights", module=weights, loss=upper_loss, optimizer=upper, data=batches(2, 1), scheduler=schedules[1]
        ),
    ]
    return hg.Engine(problems, on_breakdown="warn"), net, weights, [lower, upper, *schedules]


def by_hand(kind: str, steps: int) -> tuple[nn.Module, list[Any]]:
    """Take the lower steps, and evaluate the upper loss once each time; return the lower module."""
    torch.manual_seed(3)
    net, weights = lower_net(), Weights()
    lower = OPTIMIZERS[kind](net.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(lower, 2, 0.5)
    models = nn.ModuleDict({"net": net, "weights": weights})
    train, held = batches(3, 0), batches(2, 1)
    torch.manual_seed(11)
    for step in range(steps):
        for k in range(4):
            kept = copy.deepcopy(list(weights.buffers()))
            lower.zero_grad()
            lower_loss(models, train[(4 * step + k) % 3]).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            torch.nn.utils.clip_grad_value_(net.parameters(), 0.03)
            lower.step()
            schedule.step()
            for buffer, value in zip(weights.buffers(), kept, strict=True):
                buffer.data.copy_(value)
        kept = copy.deepcopy(list(net.buffers()))
        with torch.no_grad():
            upper_loss(models, held[step % 2])
        for buffer, value in zip(net.buffers(), kept, strict=True):
            buffer.data.copy_(value)
    return models, [lower, schedule, torch.get_rng_state()]


@pytest.mark.filterwarnings("ignore:hypergradient of problem")
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_step_equals_the_loop_by_hand_bit_for_bit(method: hg.Method, kind: str) -> None:
    engine, net, weights, (optimizer, upper, schedule, _) = build(method, kind)
    for group in upper.param_groups:
        group["lr"] = 0.0  # what the upper step does is the method's choice; here only what is left besides
    flags = [m.training for m in net.modules()]
    torch.manual_seed(11)
    engine.run(2)
    rng = torch.get_rng_state()
    models, (hand, hand_schedule, hand_rng) = by_hand(kind, 2)
    other = models["net"]
    for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p.grad, q.grad), name
        assert p.requires_grad
        assert p.grad.grad_fn is None
    for (name, b), c in zip(net.named_buffers(), other.named_buffers(), strict=True):
        assert torch.equal(b, c[1]), name
    for (name, b), c in zip(weights.named_buffers(), models["weights"].named_buffers(), strict=True):
        assert torch.equal(b, c[1]), name
    assert torch.equal(rng, hand_rng)
    assert [m.training for m in net.modules()] == flags
    mine, theirs = optimizer.state_dict(), hand.state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    for key, state in theirs["state"].items():
        for slot, value in state.items():
            assert torch.equal(torch.as_tensor(mine["state"][key][slot]), torch.as_tensor(value)), slot
    assert schedule.last_epoch == hand_schedule.last_epoch


def test_building_changes_nothing() -> None:
    torch.manual_seed(0)
    net, weights = lower_net(), Weights()
    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.randn(12, 4), torch.randint(0, 2, (12,))), batch_size=4, shuffle=True
    )
    before = copy.deepcopy((net.state_dict(), weights.state_dict()))
    rng = torch.get_rng_state()
    net.eval()
    hg.Engine(
        [
            hg.Problem(
                "net",
                module=net,
                loss=lower_loss,
                optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
                data=data,
                method=hg.Unrolled(),
            ),
            hg.Problem(
                "weights",
                module=weights,
                loss=upper_loss,
                optimizer=torch.optim.SGD(weights.parameters(), lr=0.1),
                data=data,
            ),
        ]
    )
    assert torch.equal(rng, torch.get_rng_state())
    assert not net.training
    for old, module in zip(before, (net, weights), strict=True):
        for key, value in module.state_dict().items():
            assert torch.equal(value, old[key]), key
        assert all(p.grad is None for p in module.parameters())


def test_shuffled_loaders_are_drawn_as_by_hand() -> None:
    """Both loaders shuffle by the global generator, first drawn from where a hand-written loop would draw them."""
    seen: list[Tensor] = []

    def low(m: Any, x: Tensor) -> Tensor:
        seen.append(x)
        return ((m.a(x) - m.b.weight.sum()) ** 2).mean()

    def top(m: Any, x: Tensor) -> Tensor:
        seen.append(x)
        return (m.a(x) ** 2).mean()

    data = torch.arange(6.0).view(6, 1)
    loaders = [torch.utils.data.DataLoader(data, batch_size=2, shuffle=True) for _ in range(2)]
    a, b = nn.Linear(1, 1), nn.Linear(1, 1)
    engine = hg.Engine(
        [
            hg.Problem(
                "a",
                module=a,
                loss=low,
                optimizer=torch.optim.SGD(a.parameters(), lr=0.01),
                data=loaders[0],
                steps=2,
                method=hg.SAMA(),
            ),
            hg.Problem("b", module=b, loss=top, optimizer=torch.optim.SGD([b.weight], lr=0.01), data=loaders[1]),
        ]
    )
    seen.clear()
    torch.manual_seed(5)
    engine.run(4)
    own = [x for k, x in enumerate(seen) if k % 5 in (0, 1, 2)]  # two more evaluations belong to the method
    rng = torch.get_rng_state()
    torch.manual_seed(5)
    low_iter, top_iter, expected = iter(()), iter(()), []
    for _ in range(4):
        for _ in range(2):
            low_iter, batch = following(low_iter, loaders[0])
            expected.append(batch)
        top_iter, batch = following(top_iter, loaders[1])
        expected.append(batch)
    assert len(seen) >= len(expected)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(any(torch.equal(x, y) for y in seen) for x in expected)
    assert torch.equal(torch.cat(own[:3]), torch.cat(expected[:3]))


def following(iterator: Any, loader: Any) -> tuple[Any, Any]:
    """Return the iterator and its next batch, begun again when it has ended."""
    try:
        return iterator, next(iterator)
    except StopIteration:
        iterator = iter(loader)
        return iterator, next(iterator)


def test_gradients_are_laid_out_as_backward_leaves_them() -> None:
    """One gradient tensor may serve two parameters, or be an expanded scalar; clipping in place must not see that."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2, 2))
            self.c = nn.Parameter(torch.ones(3, 2).t())

    def loss(m: Any, batch: Tensor) -> Tensor:
        return (m.p.a + m.p.b.view(-1)).sum() + m.p.c.sum() + (m.p.c.t() @ batch.t()).pow(2).sum()

    def run(clip: float) -> list[Tensor]:
        p = Pair()
        problem = hg.Problem(
            "p",
            module=p,
            loss=loss,
            optimizer=torch.optim.SGD(p.parameters(), lr=0.1),
            data=[torch.ones(3, 2)],
            clip_norm=clip,
        )
        hg.Engine([problem]).step()
        return [q.grad for q in p.parameters() if q.grad is not None]

    p = Pair()
    loss(nn.ModuleDict({"p": p}), torch.ones(3, 2)).backward()
    torch.nn.utils.clip_grad_norm_(p.parameters(), 0.5)
    for mine, q in zip(run(0.5), p.parameters(), strict=True):
        assert q.grad is not None
        assert torch.equal(mine, q.grad)
        assert mine.stride() == q.grad.stride()


def test_the_lower_tape_replays_the_last_draws() -> None:
    """Implicit with dropout equals a solve by hand with the mask of the last lower step."""
    torch.manual_seed(0)
    x = torch.randn(16, 3, dtype=torch.float64)

    class Drop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, 0.5) @ self.w

    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.t = nn.Parameter(torch.randn(16, dtype=torch.float64))

    net, up = Drop(), Up()
    engine = hg.Engine(
        [
            hg.Problem(
                "net",
                module=net,
                loss=lambda m, _: ((m.net(x) - m.up.t) ** 2).sum(),
                optimizer=torch.optim.SGD(net.parameters(), lr=0.01),
                data=[None],
                steps=3,
                method=hg.Implicit(hg.Exact()),
            ),
            hg.Problem(
                "up",
                module=up,
                loss=lambda m, _: (m.net.w**2).sum() + 0 * m.up.t.sum(),
                optimizer=torch.optim.SGD(up.parameters(), lr=1e-9),
                data=[None],
            ),
        ]
    )
    torch.manual_seed(7)
    engine.step()
    torch.manual_seed(7)
    for _ in range(3):
        masked = F.dropout(x, 0.5)
    expected = 2 * masked @ torch.linalg.solve(2 * masked.T @ masked, 2 * net.w.detach())
    assert up.t.grad is not None
    assert torch.allclose(up.t.grad, expected, rtol=1e-9)


def test_a_lower_step_leaves_other_gradients_alone() -> None:
    engine, net, weights, _ = build(hg.Unrolled(), "momentum")
    mark = [torch.full_like(p, 7.0) for p in weights.parameters()]
    for p, g in zip(weights.parameters(), mark, strict=True):
        p.grad = g.clone()
    record = engine.runners["net"]
    record.begin_window()
    from hypergrad.history import Record

    engine._step_level(0, [engine.graph.problems["net"]], 0, Record(0))
    for p, g in zip(weights.parameters(), mark, strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, g)


class Extragradient(torch.optim.Optimizer):
    """Steps along the gradient found one step ahead; parameters are moved behind autograd's back if `data`."""

    def __init__(self, params: Any, lr: float, *, data: bool, clear: bool) -> None:
        super().__init__(params, {"lr": lr})
        self.data, self.clear = data, clear

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        assert closure is not None
        if self.clear:
            self.zero_grad()
        parameters = [p.data if self.data else p for group in self.param_groups for p in group["params"]]
        originals: list[Tensor] = [p for group in self.param_groups for p in group["params"]]
        lr = self.param_groups[0]["lr"]
        before = [p.detach().clone() for p in originals]
        with torch.enable_grad():
            value = closure()
        with torch.no_grad():
            for p, original in zip(parameters, originals, strict=True):
                p.sub_(original.grad, alpha=lr)  # type: ignore[arg-type]
        with torch.enable_grad():
            closure()
        with torch.no_grad():
            for p, original, old in zip(parameters, originals, before, strict=True):
                p.copy_(old).sub_(original.grad, alpha=lr)  # type: ignore[arg-type]
        return value


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("clear", [False, True])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_optimizers_that_turn_out_to_need_a_closure_step_as_by_hand(
    data: bool, clear: bool, clip: float | None
) -> None:
    x, y = torch.randn(20, 4), torch.randn(20, 1)

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
        return net, Extragradient(net.parameters(), 0.3, data=data, clear=clear)

    net, optimizer = make()
    up = nn.Linear(1, 1)
    lower = hg.Problem(
        "net",
        module=net,
        loss=lambda m, _: F.mse_loss(m.net(x), y) * m.up.weight.exp().squeeze(),
        optimizer=optimizer,
        data=[None],
        steps=3,
        clip_norm=clip,
        method=hg.Implicit(hg.CG(2), damping=10.0),
    )
    upper = hg.Problem(
        "up",
        module=up,
        loss=lambda m, _: F.mse_loss(m.net(x), y),
        optimizer=torch.optim.SGD([up.weight], lr=0.0),
        data=[None],
    )
    hg.Engine([lower, upper]).step()
    other, by_hand = make()
    scale = up.weight.detach().exp().squeeze()

    def closure() -> Tensor:
        by_hand.zero_grad()
        value = F.mse_loss(other(x), y) * scale
        value.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(other.parameters(), clip)
        return value

    for _ in range(3):
        by_hand.step(closure)  # type: ignore[arg-type]
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_closure_asked_for_on_an_upper_level_is_refused() -> None:
    net, up = nn.Linear(1, 1), nn.Linear(1, 1)
    lower = hg.Problem(
        "net",
        module=net,
        loss=lambda m, x: ((m.net(x) - m.up(x)) ** 2).mean(),
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data=[torch.ones(2, 1)],
        method=hg.OneStep(step_size=0.1),
    )
    upper = hg.Problem(
        "up",
        module=up,
        loss=lambda m, x: m.net(x).square().mean(),
        optimizer=Extragradient(up.parameters(), 0.1, data=False, clear=False),
        data=[torch.ones(2, 1)],
    )
    with pytest.raises(ValueError, match="problem 'up': Extragradient evaluates its loss several times a step"):
        hg.Engine([lower, upper]).step()


def test_optimizers_with_closures_evaluate_as_often_as_by_hand() -> None:
    """L-BFGS: same parameters, and as many dropout draws as its own closure would take."""
    x, y = torch.randn(20, 4), torch.randn(20, 1)

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.2), nn.Linear(3, 1))
        return net, torch.optim.LBFGS(net.parameters(), lr=0.3, max_iter=4)

    net, optimizer = make()
    up = nn.Linear(1, 1)
    engine = hg.Engine(
        [
            hg.Problem(
                "net",
                module=net,
                loss=lambda m, _: F.mse_loss(m.net(x), y) * m.up.weight.exp().squeeze(),
                optimizer=optimizer,
                data=[None],
                steps=2,
                method=hg.Implicit(hg.CG(2), damping=10.0),
            ),
            hg.Problem(
                "up",
                module=up,
                loss=lambda m, _: F.mse_loss(m.net(x), y),
                optimizer=torch.optim.SGD([up.weight], lr=0.0),
                data=[None],
            ),
        ]
    )
    torch.manual_seed(2)
    engine.step()
    rng = torch.get_rng_state()
    other, by_hand = make()
    scale = up.weight.detach().exp().squeeze()
    torch.manual_seed(2)

    def closure() -> Tensor:
        by_hand.zero_grad()
        value = F.mse_loss(other(x), y) * scale
        value.backward()
        return value

    for _ in range(2):
        by_hand.step(closure)  # type: ignore[arg-type]
    F.mse_loss(other(x), y)
    assert torch.equal(rng, torch.get_rng_state())
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
