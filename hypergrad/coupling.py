"""Problems on one level whose solutions move each other through a level that they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hypergrad._flat import Params
from hypergrad._shards import held
from hypergrad.methods import Pulled
from hypergrad.operators import Function
from hypergrad.runner import Runner
from hypergrad.solvers import GMRES

Pull = Callable[[Runner, Params], Pulled]


def settle(group: Sequence[Runner], cotangents: Mapping[str, Params], pull: Pull) -> dict[str, Params]:
    r"""Return the cotangents of the solutions of `group` once each has passed on what the others pull back to it.

    .. math:: c_i = v_i + \sum_{j \ne i} \Big(\frac{\partial w_j^*}{\partial w_i}\Big)^T c_j

    with the cotangents v of the solutions w*, each the best response to the others: the derivative of their
    equilibrium. The system is solved by GMRES, with one pull of each problem a step, to a relative residual of 1e-10.

    Args:
        group: the problems, each differentiated by a rule.
        cotangents: v by problem and name.
        pull: (problem, its cotangent) -> cotangents of what its solution depends on.
    """
    sizes = [runner.layout.size for runner in group]
    first = group[0].layout

    def flat(parts: Mapping[str, Params]) -> Tensor:
        return torch.cat([ravel(runner, parts.get(runner.name, {})).to(first.dtype) for runner in group])

    def split(vector: Tensor) -> dict[str, Params]:
        pieces = vector.split_with_sizes(sizes)
        return {r.name: r.layout.unravel(piece.to(r.layout.dtype)) for r, piece in zip(group, pieces, strict=True)}

    def product(vector: Tensor) -> Tensor:
        parts = split(vector)
        passed: dict[str, Params] = {}
        for runner in group:
            for target, part in by_problem(pull(runner, parts[runner.name]).grad).items():
                found = passed.setdefault(target, {})
                for key, value in part.items():
                    found[key] = found[key] + value if key in found else value
        return vector - flat(passed)

    size = sum(sizes)
    operator = Function(product, None, size=size, dtype=first.dtype, device=first.device, symmetric=False)
    solution = GMRES(max_steps=min(size, 50), rtol=1e-10).solve(operator, flat(cotangents))
    return split(solution.x)


def ravel(runner: Runner, cotangent: Params) -> Tensor:
    """Return a cotangent of the problem's solution as a flat vector; a name left out counts as zero."""
    absent = {key: torch.zeros_like(held(p)) for key, p in runner.used.items() if key not in cotangent}
    return runner.layout.ravel(absent | cotangent)


def by_problem(grad: Params) -> dict[str, Params]:
    """Return cotangents named "problem.parameter" as one dict per problem."""
    parts: dict[str, Params] = {}
    for key, value in grad.items():
        name, parameter = key.split(".", 1)
        parts.setdefault(name, {})[parameter] = value
    return parts
