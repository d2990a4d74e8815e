"""What a benchmark problem is: two losses, the point they are evaluated at, and how the lower level is run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

Params = dict[str, Tensor]
Kind = Literal["implicit", "unrolled", "tasks"]


@dataclass(frozen=True)
class Task:
    """A bilevel problem at one point, in plain torch.

    Attributes:
        name: the file's name.
        kind: "implicit", the lower problem is solved and `lower` is the solution; "unrolled", `steps` lower steps from
            `lower`; "tasks", many lower problems, leaves of the batches lead with their number, from the upper
            parameters.
        lower_loss: pure function (lower, upper, batch) -> scalar.
        upper_loss: likewise.
        lower: the lower solution, or where its run begins.
        upper: the upper parameters.
        lower_batches: one entry a lower step; of an implicit problem the one batch that defines the solution.
        upper_batch: the batch of the upper loss.
        optimizer: of the lower run, "sgd" or "adam".
        lr, steps, weight_decay, momentum: its options.
        outputs, criterion, penalty: the parts of `lower_loss`, criterion(outputs) + penalty, for Gauss-Newton; each
            takes what the parts of `hypergrad.Composite` take. None where it has no such parts.
        hyper: optimizer hyperparameters as functions (upper, step) -> value; they replace the options above. None where
            the optimizer does not depend on the upper parameters.
        converged: of "tasks", whether the truth is the derivative of the lower *solutions* (iMAML), which the steps
            approach, instead of that of the run (MAML).
        reference: the exact hypergradient by name, where a closed form gives it.
        notes: what a reader of the results should know.
    """

    name: str
    kind: Kind
    lower_loss: Callable[[Params, Params, Any], Tensor]
    upper_loss: Callable[[Params, Params, Any], Tensor]
    lower: Params
    upper: Params
    lower_batches: list[Any]
    upper_batch: Any
    optimizer: str = "sgd"
    lr: float = 0.0
    steps: int = 0
    weight_decay: float = 0.0
    momentum: float = 0.0
    outputs: Callable[[Params, Params, Any], Tensor] | None = None
    criterion: Callable[[Tensor, Params, Any], Tensor] | None = None
    penalty: Callable[[Params, Params, Any], Tensor] | None = None
    hyper: dict[str, Callable[[Params, int], Tensor]] | None = None
    converged: bool = False
    reference: Params | None = None
    notes: str = ""
