"""The hypergradient methods of the library by the names that the command line takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import hypergrad as hg
from ssl_tasks.layerwise import LayerwiseCG

MethodName = Literal[
    "cg",
    "layerwise-cg",
    "damped",
    "neumann",
    "nystrom",
    "minres",
    "gmres",
    "exact",
    "one-step",
    "finite-difference",
    "sama",
    "penalty",
    "unrolled",
    "truncated",
    "first-order",
    "forward",
    "reptile",
    "no-implicit",
]
MOST_TANGENTS = 1000
METHODS: tuple[MethodName, ...] = get_args(MethodName)


def method_of(
    name: MethodName,
    *,
    products: int = 5,
    damping: float = 1.0,
    step_size: float | None = None,
    over: Sequence[str] | None = None,
    fresh: bool = False,
    sizes: Sequence[int] = (),
    num_upper: int = 0,
    alone: bool = False,
) -> hg.Method | None:
    """Return the method called `name`; None for "no-implicit", the graph in which the lower level counts as constant.

    Where the graph at hand does not allow a method, the engine says why when it is built, naming the problem.

    Args:
        name: one of `METHODS`. first-order differentiates no step (FOMAML), truncated the last two.
        products: Hessian products a solve: steps of cg, layerwise-cg, minres, gmres, terms of neumann, rank of nystrom.
        damping: of "damped", "nystrom".
        step_size: in place of the inverse curvature in "one-step"; None for the lower learning rate.
        over: prefixes of the lower parameters that respond, in implicit methods.
        fresh: whether implicit methods draw a batch of their own once per lower run.
        sizes: of the responding tensors, in order; "layerwise-cg" wants to know where one ends.
        num_upper: upper variables, in numbers: "forward" carries a tangent for each.
        alone: whether the upper loss depends on the upper variables through the lower level only.

    Raises:
        ValueError: for "forward" with more than `MOST_TANGENTS` upper variables, "no-implicit" with `alone`.
    """
    shared: dict[str, Any] = {"over": over, "fresh": fresh}
    match name:
        case "cg":
            return hg.Implicit(hg.CG(products), **shared)
        case "layerwise-cg":
            return hg.Implicit(LayerwiseCG(tuple(sizes), products), **shared)
        case "damped":
            return hg.Implicit(hg.CG(products), damping=damping, **shared)
        case "neumann":
            return hg.Implicit(hg.Neumann(products), **shared)
        case "nystrom":
            return hg.Implicit(hg.Nystrom(products, damping=damping), **shared)
        case "minres":
            return hg.Implicit(hg.MINRES(products), **shared)
        case "gmres":
            return hg.Implicit(hg.GMRES(products), **shared)
        case "exact":
            return hg.Implicit(hg.Exact(), **shared)
        case "one-step":
            return hg.OneStep(step_size=step_size)
        case "finite-difference":
            return hg.FiniteDifference()
        case "sama":
            return hg.SAMA()
        case "penalty":
            return hg.Penalty()
        case "unrolled":
            return hg.Unrolled()
        case "truncated":
            return hg.Unrolled(truncate=2)
        case "first-order":
            return hg.Unrolled(truncate=0)
        case "forward":
            if num_upper > MOST_TANGENTS:
                raise ValueError(
                    f"--method forward carries two products a step for each upper variable, and there are {num_upper}; "
                    f"it is for at most {MOST_TANGENTS}. Use --method unrolled: the same derivative by a sweep back."
                )
            return hg.ForwardUnrolled()
        case "reptile":
            return hg.Reptile()
        case "no-implicit":
            if alone:
                raise ValueError(
                    "--method no-implicit holds the lower level constant, and the upper level acts through it alone: "
                    "nothing would be left of the gradient. Use --method first-order."
                )
            return None
