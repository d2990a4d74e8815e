"""The adjoint sweep's memory grows with parameters, not activations: against a taped unroll written by hand.

Memory is counted, not sampled: every storage that an operation makes is entered when it appears and struck off when it
is freed, so that the numbers are the same on every machine.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import convnet, losses, parameters_of, upper_parameters
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import hypergrad as hg

LR = 0.05
BATCH, SIDE = 32, 10


class Live(TorchDispatchMode):
    """The bytes of all storages made under this mode that are still alive, and their largest sum so far."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(t.untyped_storage()) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage not in self.known and id(storage) not in given:
                    self.known[storage] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.freed, storage.nbytes())
        return result

    def freed(self, nbytes: int) -> None:
        self.now -= nbytes


def problem(channels: int = 8) -> tuple[Any, ...]:
    torch.manual_seed(0)
    net = convnet(channels)
    lower_loss, upper_loss = losses(net)
    batch = torch.randn(BATCH, 1, SIDE, SIDE), torch.arange(BATCH) % 10
    return parameters_of(net), upper_parameters(10, torch.float32), lower_loss, upper_loss, batch


def sweep(num_steps: int, channels: int = 8, **options: Any) -> hg.Hypergradient:
    lower, upper, lower_loss, upper_loss, batch = problem(channels)
    method = hg.Unrolled(**options)
    traj = hg.descend(
        lower_loss,
        lower,
        upper,
        optimizer=hg.optim.SGD(lr=LR),
        batches=[batch] * num_steps,
        recording=method.recording(num_steps),
    )
    return hg.hypergradient(upper_loss, traj, upper, method=method, batch=batch)


def by_hand(num_steps: int, channels: int = 8) -> dict[str, Tensor]:
    """Return the same hypergradient from one graph of the whole run."""
    lower, upper, lower_loss, upper_loss, batch = problem(channels)
    upper = {name: u.requires_grad_() for name, u in upper.items()}
    params = {name: p.requires_grad_() for name, p in lower.items()}
    for _ in range(num_steps):
        grads = torch.autograd.grad(lower_loss(params, upper, batch), list(params.values()), create_graph=True)
        params = {name: p - LR * g for (name, p), g in zip(params.items(), grads, strict=True)}
    found = torch.autograd.grad(upper_loss(params, upper, batch), list(upper.values()))
    return dict(zip(upper, found, strict=True))


def peak(run: Callable[..., Any], *args: Any, **options: Any) -> int:
    run(1)
    gc.collect()
    with Live() as live:
        run(*args, **options)
    gc.collect()
    return live.peak


def slope(run: Callable[..., Any], first: int, last: int, **options: Any) -> float:
    return (peak(run, last, **options) - peak(run, first, **options)) / (last - first)


def num_bytes(channels: int = 8) -> int:
    return 4 * sum(p.numel() for p in parameters_of(convnet(channels)).values())


def test_the_sweep_equals_the_taped_unroll():
    ours, taped = sweep(10).grad, by_hand(10)
    for name in taped:
        torch.testing.assert_close(ours[name], taped[name], rtol=2e-4, atol=1e-6)  # float32, other summation order


def test_over_100_steps_memory_grows_by_the_parameters_alone():
    """One flat vector of parameters a step; a tape a step by hand, which holds all activations."""
    ours = slope(sweep, 20, 100)
    taped = slope(by_hand, 5, 15)  # constant: each step adds the same graph
    print(f"bytes a step: sweep {ours:.0f}, parameters {num_bytes()}, taped unroll {taped:.0f}")
    assert ours <= 1.05 * num_bytes()
    assert taped >= 8 * ours


def test_checkpoints_make_it_grow_with_the_root_of_the_steps():
    start = peak(sweep, 1)
    every, root = peak(sweep, 36) - start, peak(sweep, 36, checkpoint="sqrt") - start
    assert root <= 0.5 * every
    assert root <= 13 * num_bytes()  # two roots and the vectors of a step


@pytest.mark.parametrize("run", [sweep, by_hand])
def test_the_count_is_that_of_the_hand(run):
    """A control: one step more of the taped unroll holds its activations, and the sweep's peak holds one tape."""
    assert peak(run, 2) > BATCH * 8 * SIDE * SIDE * 4
