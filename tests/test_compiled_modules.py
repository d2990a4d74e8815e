"""Modules that the user has compiled: own steps run compiled, curvature eagerly, and the numbers are the plain ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hypergrad as hg


class Net(nn.Module):
    """A user's module: torch.compile passes over bare containers of torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.body: nn.Module = Body()
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return one score a row."""
        scores: Tensor = self.head(self.body(x))
        return scores


class Body(nn.Module):
    """The part with buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        """Return four features a row."""
        return torch.tanh(self.norm(self.first(x)))


METHODS: dict[str, hg.Method] = {
    "implicit": hg.Implicit(hg.CG(3), damping=5.0),
    "implicit, compiled": hg.Implicit(hg.CG(3), damping=5.0, compile="aot_eager"),
    "unrolled": hg.Unrolled(),
    "retained": hg.Unrolled(retain=1.0),
    "forward": hg.ForwardUnrolled(),
    "one step": hg.OneStep(),
    "finite difference": hg.FiniteDifference(),
    "penalty": hg.Penalty(strength=5.0, steps=2),
}


@dataclass
class Ways:
    """How a user may compile `net`, each counting the calls of compiled code."""

    calls: int = 0

    def backend(self, graph: Any, inputs: Any) -> Any:
        """Compile by aot_autograd, whose functions have no second derivative."""
        compiled: Any = torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

        def counted(*args: Any) -> Any:
            self.calls += 1
            return compiled(*args)

        return counted

    def none(self, net: Net) -> nn.Module:
        """Leave it plain."""
        return net

    def in_place(self, net: Net) -> nn.Module:
        """Compile the module itself."""
        net.compile(backend=self.backend)
        return net

    def wrapped(self, net: Net) -> nn.Module:
        """Compile a wrapper of the module."""
        module: Any = torch.compile(net, backend=self.backend)
        return module  # type: ignore[no-any-return]

    def wrapped_inside(self, net: Net) -> nn.Module:
        """Put a compiled wrapper in the place of one of its parts."""
        part: Any = torch.compile(net.body, backend=self.backend)
        net.body = part
        return net

    def inner(self, net: Net) -> nn.Module:
        """Compile one of its parts."""
        net.body.compile(backend=self.backend)
        return net


def run(method: hg.Method, compiled: Callable[[Net], nn.Module], *, start: bool = False) -> list[float]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    parts = Net().double()
    scale = nn.Linear(1, 1).double()
    begin = nn.ParameterList([nn.Parameter(p.detach() + 0.1) for p in parts.parameters()])
    net = compiled(parts)
    x = torch.randn(8, 3, dtype=torch.float64)

    def lower_loss(models: Any, x: Tensor) -> Tensor:
        return ((models.net(x) - models.scale.weight) ** 2).mean()  # type: ignore[no-any-return]

    def begin_at(models: Any) -> dict[str, Tensor]:
        return dict(zip(dict(net.named_parameters()), models.scale, strict=True))

    upper = begin if start else scale
    lower = hg.Problem(
        "net",
        module=net,
        loss=(lambda models, x: (models.net(x) - 0.5).square().mean()) if start else lower_loss,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data=[x],
        steps=2,
        method=method,
        start=begin_at if start else None,
    )
    above = hg.Problem(
        "scale",
        module=upper,
        loss=lambda models, x: (models.net(x) - 1.0).square().mean(),
        optimizer=torch.optim.SGD(upper.parameters(), lr=0.1),
        data=[x],
    )
    engine = hg.Engine([lower, above])
    for _ in range(2):
        engine.step()
    tensors = [*net.parameters(), *net.buffers(), *upper.parameters()]
    return [number for tensor in tensors for number in tensor.detach().double().flatten().tolist()]


SLOW = "implicit, compiled"
"""It compiles products, for seconds."""


@pytest.mark.parametrize("method", [pytest.param(m, marks=pytest.mark.slow) if m == SLOW else m for m in METHODS])
def test_a_compiled_module_gives_the_numbers_of_the_plain_one(method: str) -> None:
    ways = Ways()
    expected = run(METHODS[method], ways.none)
    assert run(METHODS[method], ways.in_place) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    # The two own steps and the upper loss, of two upper steps; steps that keep their graph are eager.
    assert ways.calls == (2 if method == "retained" else 6)


@pytest.mark.parametrize("way", ["wrapped", "wrapped_inside", "inner"])
def test_torch_compile_around_a_module_or_a_part_of_it_serves_too(way: str) -> None:
    ways, method = Ways(), hg.Implicit(hg.CG(3), damping=5.0)
    expected = run(method, ways.none)
    assert run(method, getattr(ways, way)) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert ways.calls == 6


def test_first_order_maml_of_a_compiled_module() -> None:
    ways, method = Ways(), hg.Unrolled(truncate=0)
    assert run(method, ways.in_place, start=True) == pytest.approx(run(method, ways.none, start=True), rel=1e-9)
    assert ways.calls == 6


def functional(net: nn.Module) -> tuple[hg.Trajectory, dict[str, Tensor], Callable[..., Tensor]]:
    def lower_loss(lower: dict[str, Tensor], upper: dict[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(net, lower, x)
        return (out - upper["c"]).square().mean()

    def upper_loss(lower: dict[str, Tensor], _upper: dict[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(net, lower, x)
        return (out - 1.0).square().mean()

    start = {name: p.detach() for name, p in net.named_parameters()}
    upper = {"c": torch.zeros((), dtype=torch.float64)}
    return hg.descend(lower_loss, start, upper, optimizer=hg.optim.SGD(lr=0.1), batches=[X, X]), upper, upper_loss


X = torch.linspace(-1.0, 1.0, 12, dtype=torch.float64).reshape(4, 3)


def compiled_and_plain() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = Net().double().eval()
    compiled = copy.deepcopy(plain)
    compiled.compile(backend="aot_eager")
    return compiled, plain


@pytest.mark.parametrize("method", [hg.Unrolled(), hg.Implicit(hg.CG(3), damping=5.0)])
def test_a_functional_loss_of_a_compiled_module_is_differentiated_twice(method: hg.Method) -> None:
    def hypergradient(net: nn.Module) -> Tensor:
        traj, upper, upper_loss = functional(net)
        return hg.hypergradient(upper_loss, traj, upper, method=method, batch=X).grad["c"]

    compiled, plain = compiled_and_plain()
    torch.testing.assert_close(hypergradient(compiled), hypergradient(plain), rtol=1e-9, atol=0.0)


def test_second_derivatives_of_a_response_leave_no_compiled_part_out() -> None:
    def slope(square: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        upper = {"c": torch.ones(3, dtype=torch.float64, requires_grad=True)}
        start = {"w": torch.ones(3, dtype=torch.float64)}
        sgd = hg.optim.SGD(lr=0.1)
        traj = hg.descend(lambda w, u, _: square(w["w"], u["c"]), start, upper, optimizer=sgd, batches=[None, None])
        end = hg.best_response(traj, upper, method=hg.Unrolled())
        (first,) = torch.autograd.grad(end["w"].sum(), upper["c"], create_graph=True)
        return torch.autograd.grad(first.sum(), upper["c"])[0]

    found = slope(torch.compile(lambda w, c: (w * w * c).sum(), backend="aot_eager"))
    # Each of two steps multiplies w by (1 - 0.2 c), and (1 - 0.2 c)^2 has the second derivative 2 (0.2)^2.
    torch.testing.assert_close(found, torch.full((3,), 0.08, dtype=torch.float64), rtol=1e-12, atol=0.0)
