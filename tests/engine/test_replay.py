"""Runs that are differentiated are taken again: with the buffers they saw, and refused where they cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import hypergrad as hg
from hypergrad.step import Step

STEPS = 4
THROUGH_STEPS = [hg.Unrolled(), hg.Unrolled(retain=1.0), hg.Unrolled(checkpoint=2), hg.ForwardUnrolled()]


class Counting(nn.Module):
    """A parameter over how often it has been called: a schedule kept in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.tensor([0.7, -0.4]))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, v: Tensor | None = None) -> Tensor:
        self.count += 1
        return (self.v if v is None else v) ** 2 / self.count


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.tensor([0.5, 0.3]))


def by_hand(steps: int = STEPS) -> Tensor:
    """Return the derivative of sum w^3 after descent on norm(w^2 / k - u)^2 in step k."""
    w, u = torch.tensor([0.7, -0.4], requires_grad=True), torch.tensor([0.5, 0.3], requires_grad=True)
    for k in range(1, steps + 1):
        (g,) = torch.autograd.grad(((w**2 / k - u) ** 2).sum(), w, create_graph=True)
        w = w - 0.1 * g
    return torch.autograd.grad((w**3).sum(), u)[0]


def counting(method: hg.Method, optimizer: torch.optim.Optimizer, net: Counting) -> tuple[hg.Engine, Pair]:
    up = Pair()
    lower = hg.Problem(
        "net",
        module=net,
        data=[None],
        steps=STEPS,
        optimizer=optimizer,
        method=method,
        loss=lambda m, _: ((m.net() - m.up.v) ** 2).sum(),
    )
    upper = hg.Problem(
        "up",
        module=up,
        data=[None],
        optimizer=torch.optim.SGD(up.parameters(), lr=0.0),
        loss=lambda m, _: (m.net.v**3).sum(),
    )
    return hg.Engine([lower, upper]), up


@pytest.mark.parametrize("method", THROUGH_STEPS, ids=str)
def test_steps_see_the_buffers_they_saw(method: hg.Method) -> None:
    net = Counting()
    engine, up = counting(method, torch.optim.SGD(net.parameters(), lr=0.1), net)
    engine.step()
    assert net.count == STEPS
    torch.testing.assert_close(up.v.grad, by_hand())


@pytest.mark.parametrize("method", THROUGH_STEPS, ids=str)
@pytest.mark.parametrize("by_best_response", [False, True])
def test_functional_steps_see_the_buffers_they_saw(method: Any, by_best_response: bool) -> None:
    net = Counting()
    lower, upper = {"w": torch.tensor([0.7, -0.4])}, {"u": torch.tensor([0.5, 0.3], requires_grad=by_best_response)}
    run = hg.descend(
        lambda w, u, _: ((net(w["w"]) - u["u"]) ** 2).sum(),
        lower,
        upper,
        optimizer=hg.optim.SGD(lr=0.1),
        batches=[None] * STEPS,
        recording=method.recording(STEPS),
    )
    if by_best_response:
        (hg.best_response(run, upper, method=method)["w"] ** 3).sum().backward()
        found = upper["u"].grad
    else:
        found = hg.hypergradient(lambda w, u, _: (w["w"] ** 3).sum(), run, upper, method=method).grad["u"]
    assert net.count == 0
    torch.testing.assert_close(found, by_hand())


def test_a_hook_that_moves_the_parameters_is_refused() -> None:
    net = Counting()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *_: [p.data.mul_(0.5) for p in net.parameters()] and None)
    engine, _ = counting(hg.Unrolled(), optimizer, net)
    with pytest.raises(ValueError, match=r"problem 'net': its run cannot be taken again .* a hook"):
        engine.step()


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_on_a_parameter_is_refused(register: str) -> None:
    net = Counting()
    getattr(net.v, register)(lambda g: 0.5 * g)
    with pytest.raises(ValueError, match=r"problem 'net': 'v' has a hook"):
        counting(hg.Implicit(hg.CG(2)), torch.optim.SGD(net.parameters(), lr=0.1), net)


def test_a_hook_that_looks_on_is_called() -> None:
    net, seen = Counting(), []
    engine, _ = counting(hg.Unrolled(), torch.optim.SGD(net.parameters(), lr=0.1), net)
    net.v.register_hook(lambda g: seen.append(g))
    other, _ = counting(hg.Unrolled(), torch.optim.SGD(net.parameters(), lr=0.1), net)
    other.step()
    assert len(seen) > STEPS and engine.num_steps == 0


def test_rounding_that_adam_blows_up_is_no_other_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias before batch norm: its gradient is rounding, and Adam's first step goes by its sign."""
    torch.manual_seed(0)
    net, up = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1)), Pair()
    x, y = torch.randn(16, 6), torch.randn(16, 1)
    lower = hg.Problem(
        "net",
        module=net,
        data=[(x, y)],
        steps=2,
        optimizer=torch.optim.Adam(net.parameters(), lr=0.01),
        method=hg.Unrolled(),
        loss=lambda m, batch: F.mse_loss(m.net(batch[0]), batch[1]) * m.up.v.exp().sum(),
    )
    upper = hg.Problem(
        "up",
        module=up,
        data=[(x, y)],
        optimizer=torch.optim.SGD(up.parameters(), lr=0.1),
        loss=lambda m, batch: F.mse_loss(m.net(batch[0]), batch[1]),
    )
    engine = hg.Engine([lower, upper])
    gradient = Step.gradient
    noise = torch.Generator().manual_seed(0)

    def noisy(step: Step, flat: Tensor, *arguments: Any, **options: Any) -> Tensor:
        found = gradient(step, flat, *arguments, **options)
        return found + 1e-7 * found.abs().max() * torch.randn(found.shape, generator=noise)

    monkeypatch.setattr(Step, "gradient", noisy)
    engine.step()


def test_a_loader_that_refills_its_tensors_is_refused() -> None:
    class Refilling:
        def __init__(self) -> None:
            self.batch = torch.zeros(2)

        def __iter__(self) -> Iterator[Tensor]:
            for k in range(STEPS):
                yield self.batch.fill_(k + 1.0)

    net, up = Pair(), Pair()
    lower = hg.Problem(
        "net",
        module=net,
        data=Refilling(),
        steps=STEPS,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.05),
        method=hg.Unrolled(),
        loss=lambda m, batch: ((batch * m.net.v - m.up.v) ** 2).sum(),
    )
    upper = hg.Problem(
        "up",
        module=up,
        data=[None],
        optimizer=torch.optim.SGD(up.parameters(), lr=0.0),
        loss=lambda m, _: (m.net.v**2).sum(),
    )
    with pytest.raises(ValueError, match="cannot be taken again"):
        hg.Engine([lower, upper]).step()


@pytest.mark.parametrize("reads", ["net", "up"])
@pytest.mark.parametrize("method", [hg.Unrolled(), hg.Implicit(hg.CG(2)), hg.SAMA()], ids=str)
def test_a_parameter_read_as_a_tensor_from_outside_is_refused(method: hg.Method, reads: str) -> None:
    net, up = Pair(), Pair()
    params = list({"net": net, "up": up}[reads].parameters())
    lower = hg.Problem(
        "net",
        module=net,
        data=[None],
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        method=method,
        loss=lambda m, _: ((m.net.v - m.up.v) ** 2).sum() + sum((p**2).sum() for p in params),
    )
    upper = hg.Problem(
        "up",
        module=up,
        data=[None],
        optimizer=torch.optim.SGD(up.parameters(), lr=0.1),
        loss=lambda m, _: (m.net.v**2).sum(),
    )
    with pytest.raises(
        ValueError, match=rf"problem 'net': .* reads the parameter 'v' of problem '{reads}' as a tensor"
    ):
        hg.Engine([lower, upper])


def test_the_top_may_read_its_own_parameters_as_tensors() -> None:
    net, up = Pair(), Pair()
    params = list(up.parameters())
    lower = hg.Problem(
        "net",
        module=net,
        data=[None],
        optimizer=torch.optim.SGD(net.parameters(), lr=0.5),
        method=hg.Unrolled(),
        loss=lambda m, _: 0.5 * ((m.net.v - m.up.v) ** 2).sum(),
    )
    upper = hg.Problem(
        "up",
        module=up,
        data=[None],
        optimizer=torch.optim.SGD(up.parameters(), lr=0.0),
        loss=lambda m, _: m.net.v.sum() + sum(p.sum() for p in params),
    )
    hg.Engine([lower, upper]).step()
    torch.testing.assert_close(up.v.grad, torch.full((2,), 1.5))


def test_what_is_frozen_or_replaced_later_is_named() -> None:
    net = Counting()
    engine, _ = counting(hg.Unrolled(), torch.optim.SGD(net.parameters(), lr=0.1), net)
    engine.step()
    net.v.requires_grad_(False)
    with pytest.raises(ValueError, match=r"problem 'net': \['net.v'\] do not require gradients any more"):
        engine.step()
    net.v = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"problem 'net': its parameter 'v' has been replaced"):
        engine.step()


def tasks(net: nn.Module, query_mode: bool) -> hg.Engine:
    """Return three tasks over a network with a normalisation; the query is in train or eval mode."""
    meta = nn.Linear(4, 2)

    def query(m: Any, batch: Any) -> Tensor:
        m.net.train(query_mode)
        return F.mse_loss(m.net(batch[0]), batch[1])

    lower = hg.Problem(
        "net",
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        method=hg.Unrolled(),
        tasks=3,
        loss=lambda m, batch: (
            F.mse_loss(m.net(batch[0]), batch[1]) + 1e-3 * (m.meta.weight**2).sum() * m.net[0].bias[0]
        ),
    )
    upper = hg.Problem(
        "meta",
        module=meta,
        data=[(torch.randn(3, 5, 4), torch.randn(3, 5, 2))],
        optimizer=torch.optim.SGD(meta.parameters(), lr=0.1),
        loss=query,
    )
    return hg.Engine([lower, upper])


def test_tasks_whose_query_reads_what_their_steps_write_are_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"problem 'net': a task's steps write the buffers .*, and the loss of 'meta'"):
        tasks(nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)), query_mode=False)


def test_tasks_that_normalize_by_their_batches_are_accepted() -> None:
    torch.manual_seed(0)
    assert tasks(nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)), query_mode=True).step()["meta.loss"] > 0


def test_a_buffer_that_no_call_writes_is_copied_once_in_a_run() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.ones(1000))

        def forward(self, w: Tensor) -> Tensor:
            return w * self.mask[:2]

    class Copies(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func is torch.ops.aten.clone.default and args[0].numel() == 1000
            return func(*args, **(kwargs or {}))

    net = Masked()
    with Copies() as copies:
        hg.descend(
            lambda w, u, _: ((net(w["w"]) - u["u"]) ** 2).sum(),
            {"w": torch.zeros(2)},
            {"u": torch.ones(2)},
            optimizer=hg.optim.SGD(lr=0.1),
            batches=[None] * STEPS,
        )
    assert copies.count == 1


class Normalized(nn.Module):
    """Batch norm, a sparse buffer and one assigned anew in another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 2), nn.BatchNorm1d(2)
        self.register_buffer("mask", torch.eye(4).to_sparse())
        self.register_buffer("last", torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.norm(self.layer(torch.sparse.mm(self.mask, x.T).T))
        self.last = found.detach()
        return found


@pytest.mark.parametrize(
    "method", [*THROUGH_STEPS, hg.Implicit(hg.CG(2), curvature="gauss_newton", damping=1.0)], ids=str
)
@pytest.mark.parametrize("shared", [False, True])
def test_ordinary_modules_with_buffers_are_accepted(method: Any, shared: bool) -> None:
    """`shared` puts a part of the lower module above it as a problem of its own."""
    torch.manual_seed(0)
    base, up = Normalized(), Pair()
    net = nn.Sequential(base, nn.Linear(2, 1))
    x, y = torch.randn(8, 4), torch.randn(8, 1)
    lower = hg.Problem(
        "net",
        module=net,
        data=[(x, y)],
        steps=2,
        optimizer=torch.optim.SGD(net[1].parameters() if shared else net.parameters(), lr=0.1),
        method=method,
        loss=hg.Composite(
            lambda m, batch: m.net(batch[0]),
            lambda z, m, batch: F.mse_loss(z, batch[1]) * (1.0 if shared else m.up.v.exp().sum()),
        ),
    )
    upper = hg.Problem(
        "base" if shared else "up",
        module=base if shared else up,
        data=[(x, y)],
        optimizer=torch.optim.SGD((base if shared else up).parameters(), lr=0.1),
        loss=lambda m, batch: F.mse_loss(m.net(batch[0]), batch[1]),
    )
    engine = hg.Engine([lower, upper])
    assert not engine.graph.reads["net"].written
    engine.step()


@pytest.mark.parametrize("method", [hg.OneStep(), hg.FiniteDifference(), hg.SAMA()], ids=str)
def test_methods_that_read_the_last_step_take_losses_that_leave_a_parameter_out(method: hg.Method) -> None:
    heads, up = nn.ParameterList([torch.zeros(2), torch.zeros(2)]), Pair()
    lower = hg.Problem(
        "heads",
        module=heads,
        data=[2, 1],
        steps=2,
        optimizer=torch.optim.Adam(heads.parameters(), lr=0.1),
        method=method,
        loss=lambda m, count: sum(0.5 * ((h - m.up.v) ** 2).sum() for h in list(m.heads)[:count]),
    )
    upper = hg.Problem(
        "up",
        module=up,
        data=[None],
        optimizer=torch.optim.SGD(up.parameters(), lr=0.1),
        loss=lambda m, _: sum((h**2).sum() for h in m.heads),
    )
    hg.Engine([lower, upper]).step()
