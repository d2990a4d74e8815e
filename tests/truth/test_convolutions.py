"""Our second derivative of convolutions is PyTorch's, in as many kernels whatever the groups; and where it is used."""

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
from hypergrad._calls import under_way

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
def test_a_second_derivative_is_that_of_pytorch(
    convolution: Callable[..., Tensor], x: Any, w: Any, options: dict[str, Any], of: Any
) -> None:
    groups = options.get("groups", 1)
    out = w[1] * groups if convolution.__name__.startswith("conv_transpose") else w[0]
    arguments = _draw(*x), _draw(*w), _draw(out)
    second = _second(convolution, options, of)
    expected = second(*arguments)
    with under_way():
        torch.testing.assert_close(second(*arguments), expected)
    traced = torch.compile(second, backend="aot_eager", fullgraph=True, dynamic=False)(*arguments)
    torch.testing.assert_close(traced, expected)


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (0, 2), (1, 2)])
@pytest.mark.parametrize("create_graph", [False, True])
def test_by_autograd_with_some_arguments_constant(frozen: tuple[int, ...], create_graph: bool) -> None:
    arguments = [
        a.requires_grad_(k not in frozen) for k, a in enumerate((_draw(2, 4, 5, 5), _draw(6, 2, 3, 3), _draw(6)))
    ]
    leaves = [a for a in arguments if a.requires_grad]

    def second() -> list[Tensor]:
        total = torch.conv2d(*arguments, groups=2).tanh().square().sum()
        slopes = torch.autograd.grad(total, leaves, create_graph=True)
        value = torch.stack([(g.sin() * g).sum() for g in slopes]).sum()
        found = torch.autograd.grad(value, leaves, create_graph=create_graph)
        if create_graph:
            found += torch.autograd.grad(torch.stack([(g * g).sum() for g in found]).sum(), leaves)
        return [g.detach() for g in found]

    expected = second()
    with under_way():
        torch.testing.assert_close(second(), expected)


def test_a_third_derivative_is_that_of_pytorch_too() -> None:
    x, w, b = _draw(2, 4, 5, 5), _draw(6, 2, 3, 3), _draw(6)
    second = _second(torch.conv2d, {"groups": 2}, (0, 1))

    def third(w: Tensor) -> Tensor:
        value: Tensor = torch.func.grad(lambda at: sum((g.sin() * g).sum() for g in second(x, at, b)))(w)
        return value

    expected = third(w)
    with under_way():
        torch.testing.assert_close(third(w), expected)
    traced = torch.compile(third, backend="aot_eager", fullgraph=True)(w)
    torch.testing.assert_close(traced, expected)


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


def _loss(lower: dict[str, Tensor], upper: dict[str, Tensor], batch: Tensor) -> Tensor:
    return (torch.conv2d(batch, lower["w"]).tanh().mean(dim=(1, 2, 3)) * upper["u"]).sum()


def _used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with each convolution of the rule."""
    calls: list[int] = []
    plain = _convolutions._convolution

    def counting(*arguments: Any) -> Tensor:
        calls.append(arguments[-1])
        found: Tensor = plain(*arguments)
        return found

    monkeypatch.setattr(_convolutions, "_convolution", counting)
    return calls


@pytest.mark.parametrize("method", [hg.Unrolled(), hg.Unrolled(compile="aot_eager"), hg.Implicit(hg.CG(2))])
def test_calls_of_the_library_use_it(method: hg.Method, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _used(monkeypatch)
    lower, upper, batch = {"w": _draw(3, 2, 3, 3)}, {"u": _draw(4)}, _draw(4, 2, 6, 6)
    run = hg.descend(_loss, lower, upper, optimizer=hg.optim.SGD(lr=0.1), batches=[batch] * 2)
    hg.hypergradient(lambda w, u, b: w["w"].square().sum(), run, upper, method=method, throw=False)
    assert calls


def test_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _used(monkeypatch)
    x, w, b = _draw(2, 4, 5, 5), _draw(6, 2, 3, 3), _draw(6)
    _second(torch.conv2d, {"groups": 2}, (0, 1))(x, w, b)
    assert not calls
