"""The responses of several methods to one cotangent, compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hypergrad._flat import Params
from hypergrad._result import Result
from hypergrad.methods import Method, Pulled, ResponseMethod
from hypergrad.methods.base import UpperLoss
from hypergrad.trajectory import Trajectory


@dataclass(frozen=True)
class Agreement:
    """How one method's response compares with the reference's; the direct derivative is left out of both.

    Attributes:
        name: the method, short.
        method: the method.
        cosine: of the angle to the reference.
        difference: norm of the difference, relative to the reference's norm.
        num_products: Hessian products it took; None where it counts none.
        result: how its solve ended.
    """

    name: str
    method: Method
    cosine: float
    difference: float
    num_products: int | None
    result: Result


@dataclass
class Comparison:
    """Methods applied to the end of one lower run.

    Attributes:
        upper_loss, trajectory, upper, batch: what `hypergradient` takes.
        cotangent, direct: the upper loss's partial derivatives in the flat lower and in the upper parameters.
        methods, pulled, vectors: what was applied, what came back, and the same as one vector each, by name.
        refusals: why methods that refused did, by name.
    """

    upper_loss: UpperLoss
    trajectory: Trajectory
    upper: Params
    batch: Any
    cotangent: Tensor
    direct: Params
    methods: dict[str, Method] = field(default_factory=dict)
    pulled: dict[str, Pulled] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, method: Method) -> None:
        """Apply a method, or note why it refuses; one that is there already is left out."""
        if name in self.methods:
            return
        try:
            pulled = self._response(method)
        except ValueError as refusal:
            self.refusals[name] = str(refusal)
            return
        pieces = [pulled.grad.get(key, torch.zeros_like(u)).reshape(-1) for key, u in self.upper.items()]
        self.methods[name], self.pulled[name] = method, pulled
        self.vectors[name] = torch.cat([piece.detach().to(torch.float64) for piece in pieces])

    def _response(self, method: Method) -> Pulled:
        if isinstance(method, ResponseMethod):
            return method.vjp(self.trajectory, self.upper, self.cotangent)
        total = method.total(self.upper_loss, self.trajectory, self.upper, self.batch, None)
        grad = {key: g - self.direct[key] if key in self.direct else g for key, g in total.grad.items()}
        return Pulled(grad, total.result, total.stats)

    @property
    def finite(self) -> bool:
        """Return whether no response has a value that is not finite."""
        return all(bool(torch.isfinite(vector).all()) for vector in self.vectors.values())

    @property
    def responds(self) -> bool:
        """Return whether some response is not zero."""
        return any(bool((vector != 0).any()) for vector in self.vectors.values())

    def cosine(self, first: str, second: str) -> float:
        """Return the cosine of the angle between two responses; NaN where one is missing or zero."""
        if first not in self.vectors or second not in self.vectors:
            return float("nan")
        a, b = self.vectors[first], self.vectors[second]
        return float(torch.dot(a, b) / (a.norm() * b.norm()))

    def difference(self, name: str, reference: str) -> float:
        """Return the relative difference of a response from another."""
        gap = self.vectors[name] - self.vectors[reference]
        norm = self.vectors[reference].norm()
        return float(gap.norm() / norm) if norm > 0 else float(gap.norm())

    def against(self, reference: str) -> tuple[Agreement, ...]:
        """Return how each response compares with that of `reference`, which comes first."""
        order = sorted(self.methods, key=lambda name: name != reference)
        return tuple(
            Agreement(
                name,
                self.methods[name],
                self.cosine(name, reference),
                self.difference(name, reference),
                self._num_products(name),
                self._result(name),
            )
            for name in order
            if reference in self.vectors
        )

    def _num_products(self, name: str) -> int | None:
        count = self.pulled[name].stats.get("num_products")
        return None if count is None else int(count)

    def _result(self, name: str) -> Result:
        code = self.pulled[name].result
        return Result.SUCCESS if code is None else Result(int(code))
