"""Every problem builds at its small size, and its reference is the derivative that it claims to be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils import _pytree as pytree

from hypergrad.bench import reference
from hypergrad.bench.problems.catalogue import build, names

NAMES = names()
TRAINED = ("bissl", "hypercleaning")
"""Their lower level is trained, not solved: the implicit-function theorem is applied where the training ended."""


@pytest.fixture(scope="module", params=NAMES)
def task(request):
    return build(request.param, size="quick", dtype=torch.float64)


def test_the_suite_has_the_problems_it_promises() -> None:
    expected = "bissl distillation hypercleaning ill_conditioned imaml indefinite learned_rates logistic maml"
    assert NAMES == [*expected.split(), "meta_weight_net", "ridge", "transformer"]


def test_a_problem_is_whole(task) -> None:
    assert all(value.dtype == torch.float64 for part in (task.lower, task.upper) for value in part.values())
    if task.kind != "implicit":
        assert len(task.lower_batches) == task.steps
    if task.outputs is not None:
        batch = task.lower_batches[0]
        parts = task.criterion(task.outputs(task.lower, task.upper, batch), task.upper, batch)
        if task.penalty is not None:
            parts = parts + task.penalty(task.lower, task.upper, batch)
        assert torch.allclose(parts, task.lower_loss(task.lower, task.upper, batch), rtol=1e-12)


def _value(task, upper):
    if task.kind == "implicit":
        end = reference.newton_step(task.lower_loss, task.lower, upper, task.lower_batches[0])
        return task.upper_loss(end, upper, task.upper_batch)
    if task.kind == "unrolled":
        return task.upper_loss(reference.run(task, task.lower, upper, task.lower_batches), upper, task.upper_batch)
    count = len(pytree.tree_leaves(task.upper_batch)[0])
    total = torch.zeros((), dtype=torch.float64)
    for index in range(count):
        batches, at = pytree.tree_map(lambda leaf, i=index: leaf[i], (task.lower_batches, task.upper_batch))
        own = replace(task, upper=upper)
        end = reference._minimizer(own, batches[0]) if task.converged else reference.run(task, upper, upper, batches)
        total = total + task.upper_loss(end, upper, at).detach()
    return total / count


def test_the_reference_is_the_derivative(task) -> None:
    """Along a random direction. One Newton step from the solution is off by O(h^2), evenly: a central difference loses
    no order to it, its error is O(h^2), for h = 1e-5 below 1e-4 relative even where third derivatives are large."""
    if task.name in TRAINED:
        pytest.skip("trained, not solved: there is no solution map to take differences of")
    generator = torch.Generator().manual_seed(1)
    direction = {n: torch.randn(u.shape, generator=generator, dtype=torch.float64) for n, u in task.upper.items()}
    h = 1e-5
    ahead, behind = (
        _value(task, {n: (u + s * h * direction[n]).detach() for n, u in task.upper.items()}) for s in (1, -1)
    )
    difference = float((ahead - behind).detach()) / (2 * h)
    gradient = reference.exact(task).gradient
    exact = float(sum((gradient[n] * d).sum() for n, d in direction.items()))
    assert exact == pytest.approx(difference, rel=1e-4), task.name
