"""Second derivatives of convolutions as they are traced: as in eager mode, in as many kernels whatever the groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

import hypergrad as hg
from hypergrad import _convolutions

CONVOLUTIONS: list[tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    (torch.conv1d, (2, 6, 9), (9, 2, 3), {"groups": 3, "padding": 1, "stride": 2}),
    (torch.conv2d, (2, 4, 7, 6), (6, 4, 3, 2), {"dilation": 2, "padding": (2, 1)}),
    (torch.conv2d, (2, 6, 7, 6), (6, 1, 3, 3), {"groups": 6}),
    (torch.conv3d, (2, 4, 5, 5, 5), (6, 2, 2, 2, 2), {"groups": 2, "stride": (1, 2, 2)}),
    (torch.conv_transpose1d, (2, 6, 5), (6, 2, 3), {"groups": 3, "stride": 2, "output_padding": 1}),
    (torch.conv_transpose2d, (2, 4, 5, 4), (4, 3, 3, 3), {"padding": 1, "stride": 2}),
]


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch.compiler.reset()  # or the compiler counts the cases as one function that it met with too many shapes


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _second(convolution: Callable[..., Tensor], options: dict[str, Any], of: Any) -> Callable[..., Any]:
    """Return the derivative in x, w, b of a function of the first derivatives in those at the places `of`."""

    def total(*arguments: Tensor) -> Tensor:
        x, w, b = arguments
        return convolution(x, w, b, **options).tanh().square().sum()

    def slopes(*arguments: Tensor) -> Tensor:
        found = torch.func.grad(total, argnums=of)(*arguments)
        return torch.stack([(g.sin() * g).sum() for g in found]).sum()

    return torch.func.grad(slopes, argnums=(0, 1, 2))


@pytest.mark.parametrize("of", [(0,), (1,), (2,), (0, 1, 2)])
@pytest.mark.parametrize(("convolution", "x", "w", "options"), CONVOLUTIONS)
def test_a_traced_second_derivative_is_the_eager_one(
    convolution: Callable[..., Tensor], x: Any, w: Any, options: dict[str, Any], of: Any
) -> None:
    groups = options.get("groups", 1)
    out = w[1] * groups if convolution.__name__.startswith("conv_transpose") else w[0]
    arguments = _draw(*x), _draw(*w), _draw(out)
    second = _second(convolution, options, of)
    expected = second(*arguments)
    traced = torch.compile(second, backend="aot_eager", fullgraph=True, dynamic=False)(*arguments)
    torch.testing.assert_close(traced, expected)


def test_a_third_derivative_is_that_of_eager_mode_too() -> None:
    x, w, b = _draw(2, 4, 5, 5), _draw(6, 2, 3, 3), _draw(6)
    second = _second(torch.conv2d, {"groups": 2}, (0, 1))

    def third(w: Tensor) -> Tensor:
        value: Tensor = torch.func.grad(lambda at: sum((g.sin() * g).sum() for g in second(x, at, b)))(w)
        return value

    traced = torch.compile(third, backend="aot_eager", fullgraph=True)(w)
    torch.testing.assert_close(traced, third(w))


def test_tasks_take_as_many_convolutions_whatever_their_number() -> None:
    def gradient(w: Tensor, x: Tensor) -> Tensor:
        found: Tensor = torch.func.grad(lambda at: torch.conv2d(torch.conv2d(x, at).tanh(), at).tanh().sum())(w)
        return found

    def product(w: Tensor, x: Tensor, v: Tensor) -> Tensor:
        each = torch.func.vmap(gradient)
        pulled: Tensor = torch.func.vjp(lambda at: each(at, x), w)[1](v)[0]
        return pulled

    def convolutions(tasks: int) -> int:
        arguments = _draw(tasks, 4, 4, 3, 3), _draw(tasks, 2, 4, 7, 7), _draw(tasks, 4, 4, 3, 3)
        counted: list[int] = []

        def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
            counted.append(sum("convolution" in str(node.target) for node in graph.graph.nodes))
            return make_boxed_func(graph.forward)

        backend = aot_autograd(fw_compiler=keep)
        traced = torch.compile(product, backend=backend, fullgraph=True, dynamic=False)(*arguments)
        torch.testing.assert_close(traced, product(*arguments))
        (count,) = counted
        return count

    assert convolutions(2) == convolutions(7) > 0


def test_a_compiled_run_of_tasks_uses_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    plain = _convolutions._convolution

    def counting(*arguments: Any) -> Tensor:
        calls.append(arguments[-1])
        found: Tensor = plain(*arguments)
        return found

    monkeypatch.setattr(_convolutions, "_convolution", counting)

    def loss(lower: dict[str, Tensor], upper: dict[str, Tensor], batch: Tensor) -> Tensor:
        return (torch.conv2d(batch, lower["w"]).tanh().mean(dim=(1, 2, 3)) * upper["u"]).sum()

    lower, upper, batch = {"w": _draw(3, 2, 3, 3)}, {"u": _draw(4)}, _draw(4, 2, 6, 6)

    def found(method: hg.Method) -> Tensor:
        run = hg.descend(loss, lower, upper, optimizer=hg.optim.SGD(lr=0.1), batches=[batch] * 2)
        return hg.hypergradient(lambda w, u, b: w["w"].square().sum(), run, upper, method=method).grad["u"]

    compiled = found(hg.Unrolled(compile="aot_eager"))
    assert calls
    torch.testing.assert_close(compiled, found(hg.Unrolled()))
