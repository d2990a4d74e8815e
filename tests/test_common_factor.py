"""Products of a batch of vectors: those of one vector after the other, with each common factor read once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from hypergrad._common_factor import CommonFactor
from hypergrad._flat import Layout
from hypergrad._tape import AutogradTape, gradient

X = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class _Counting(TorchDispatchMode):
    """Counts what is dispatched, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.__name__] = self.counts.get(func.__name__, 0) + 1
        return func(*args, **(kwargs or {}))


class _Cube(torch.autograd.Function):
    """A function of the user's that says nothing of `vmap`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * bar


def _attention(w: Tensor) -> Tensor:
    queries, keys = X @ w[:15].view(5, 3), X @ w[15:].view(5, 3)
    return ((queries @ keys.mT).softmax(-1) @ X).pow(2).sum()


def _embedded(w: Tensor) -> Tensor:
    return F.embedding(torch.tensor([0, 2, 2]), w.view(6, 5)).sin().pow(2).sum()


def _recurrent(w: Tensor) -> Tensor:
    state = torch.zeros(7, 5, dtype=torch.float64)
    for _ in range(3):
        state = torch.tanh(state @ w[:25].view(5, 5) + X + w[25:])
    return state.pow(2).mean()


LOSSES: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "vector": (5, lambda w: F.softplus(X @ w).mean()),
    "attention": (30, _attention),
    "embedding": (30, _embedded),
    "recurrent": (30, _recurrent),
    "own function": (5, lambda w: _Cube.apply(X @ w).mean()),
    "linear": (5, lambda w: (X @ w).sum()),
}


def _tape(loss: Callable[[Tensor], Tensor], size: int) -> AutogradTape:
    at = torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return AutogradTape(lambda w, _: gradient(loss, w, create_graph=True), at, {}, differentiable=False)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("count", [1, 2, 70])
def test_products_of_a_batch_are_those_of_its_vectors(name: str, count: int) -> None:
    size, loss = LOSSES[name]
    tape = _tape(loss, size)
    vectors = torch.randn(count, size, dtype=torch.float64)
    one_by_one = torch.stack([tape.pull_lower(v) for v in vectors])
    torch.testing.assert_close(tape.pull_lower_each(vectors), one_by_one, rtol=1e-11, atol=1e-14)
    transposed = vectors.T.contiguous().T
    torch.testing.assert_close(tape.pull_lower_each(transposed), one_by_one, rtol=1e-11, atol=1e-14)


def test_a_module_is_read_once_for_all_vectors() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    params = {name: p.detach() for name, p in net.named_parameters()}
    layout = Layout.of(params, what="the net")
    tape = AutogradTape(
        lambda w, _: gradient(
            lambda w: functional_call(net, layout.unravel(w), (X,)).square().mean(), w, create_graph=True
        ),
        layout.ravel(params),
        {},
        differentiable=False,
    )
    vectors = torch.randn(9, layout.size, dtype=torch.float64)
    with _Counting() as one:
        expected = [tape.pull_lower(v) for v in vectors[:1]]
    with _Counting() as nine:
        found = tape.pull_lower_each(vectors)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=1e-14)
    products = one.counts["mm.default"] + one.counts.get("addmm.default", 0)
    batched = nine.counts.get("bmm.default", 0) + nine.counts["mm.default"]
    assert 0 < batched <= 2 * products  # one vector's, by which it is decided, and that of the eight others


@pytest.mark.parametrize("shape", [(4, 5, 3), (4, 5, 1), (4, 1, 3), (1, 5, 3)])
@pytest.mark.parametrize("turned", [False, True])
def test_a_batched_product_with_one_factor_is_the_same_product(shape: tuple[int, int, int], turned: bool) -> None:
    batch, inner, columns = shape
    one = torch.randn(inner, 6, dtype=torch.float64).T if turned else torch.randn(6, inner, dtype=torch.float64)
    many = torch.randn(batch, inner, columns, dtype=torch.float64)
    left, right = one.expand(batch, 6, inner), many
    with CommonFactor():
        torch.testing.assert_close(torch.bmm(left, right), one @ many, rtol=1e-13, atol=0)
        torch.testing.assert_close(torch.bmm(right.mT, left.mT), many.mT @ one.T, rtol=1e-13, atol=0)
        torch.testing.assert_close(torch.bmm(left, left.mT), (one @ one.T).expand(batch, 6, 6), rtol=1e-13, atol=0)
