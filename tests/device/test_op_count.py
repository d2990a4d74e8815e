"""What a CG iteration adds to its product: at most 16 operations, at most 7 of them over full vectors.

Counted through `hypergradient` itself, views left out: the difference between two runs that take one step more, less
what a product alone launches.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from networks import losses, mlp, parameters_of, upper_parameters
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import hypergrad as hg
from hypergrad.stationarity import linearize

VIEWS = {"detach", "alias", "view", "_unsafe_view", "lift_fresh"}


class Ops(NamedTuple):
    all: int
    full: int

    def less(self, other: Ops) -> Ops:
        return Ops(self.all - other.all, self.full - other.full)


class Count(TorchDispatchMode):
    """Counts operations that launch a kernel, and those that read or write a vector of `size` entries or more."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.all, self.full = size, 0, 0
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        returns_alias = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not returns_alias and func.overloadpacket.__name__ not in VIEWS:
            self.all += 1
            self.names.append(func.overloadpacket.__name__)
            tensors = [t for t in pytree.tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            self.full += any(t.numel() >= self.size for t in tensors)
        return result

    def ops(self) -> Ops:
        return Ops(self.all, self.full)


def problem(depth: int) -> tuple[Any, ...]:
    torch.manual_seed(0)
    net = mlp(depth).double()
    lower_loss, upper_loss = losses(net)
    batch = torch.randn(9, 6, dtype=torch.float64), torch.arange(9) % 6
    return parameters_of(net), upper_parameters(6, torch.float64), lower_loss, upper_loss, batch


@pytest.mark.parametrize("depth", [2, 8, 40])
@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_an_iteration_of_cg(depth, damping):
    lower, upper, lower_loss, upper_loss, batch = problem(depth)
    traj = hg.descend(lower_loss, lower, upper, optimizer=hg.optim.SGD(lr=0.1), batches=[batch] * 2)
    size = traj.layout.size
    assert len(traj.layout.names) == depth

    def ops(max_steps: int) -> Ops:
        method = hg.Implicit(hg.CG(max_steps, rtol=0.0, check_every=None), damping=damping)
        with Count(size) as count:
            h = hg.hypergradient(upper_loss, traj, upper, method=method, batch=batch, throw=False)
        assert int(h.stats.num_products) == max_steps
        return count.ops()

    operator = linearize(traj, upper).operator
    vector = torch.ones(size, dtype=torch.float64)
    with Count(size) as product:
        operator.mv(vector)
    counted = [ops(k) for k in (2, 3, 4)]
    added = counted[1].less(counted[0]).less(product.ops())
    assert counted[2].less(counted[1]).less(product.ops()) == added
    assert 10 <= added.all <= 16, f"{added.all} operations a step beyond the product's {product.all}"
    assert 4 <= added.full <= 7, f"{added.full} of them over full vectors"


@pytest.mark.parametrize("depth", [2, 8, 40])
def test_a_product_is_that_of_hand_written_autograd(depth):
    """The tape adds one split on the way in and one concatenation on the way out, whatever the number of tensors."""
    lower, upper, lower_loss, _, batch = problem(depth)
    traj = hg.solved(lower_loss, lower, batch)
    vector = torch.ones(traj.layout.size, dtype=torch.float64)
    with Count(1) as ours:
        linearize(traj, upper).operator.mv(vector)
    with Count(1) as taped:
        operator = linearize(traj, upper).operator
    leaves = [p.requires_grad_() for p in lower.values()]
    pieces = [torch.ones_like(p) for p in leaves]
    grads = torch.autograd.grad(lower_loss(lower, upper, batch), leaves, create_graph=True)
    with Count(1) as by_hand:
        torch.autograd.grad(grads, leaves, pieces, retain_graph=True)
    with Count(1) as product:
        operator.mv(vector)
    assert ours.all == taped.all + product.all
    extra = product.all - by_hand.all
    assert extra <= 3, f"{product.names}\n{by_hand.names}"
