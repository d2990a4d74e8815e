"""An optimizer bound to named parameters: one rule a group, over the groups of one flat vector."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hypergrad._flat import Layout
from hypergrad.optim._algebra import Scalar
from hypergrad.optim.base import Decay, Optimizer, State, learning_rate

SECOND_MOMENTS = ("exp_avg_sq", "square_avg", "sum")
"""The names under which adaptive optimizers keep their mean (or sum) of squared gradients."""

BoundHyper = Mapping[str, Scalar | Mapping[str, Scalar] | Sequence[Scalar]]
"""Hyperparameters by name: a number or tensor for all groups, a dict by parameter, or one value a group."""


@dataclass(frozen=True, eq=False)
class Bound:
    """One or several optimizers over one flat vector.

    `groups` pairs each optimizer with the names of its parameters; `layout` is the order in which those lie
    in the vector, group after group. With one group nothing is split or copied.

    `hyper`, in the methods, replaces options of the optimizers by name. A value is a float or 0-dimensional
    tensor for all groups, a flat vector, a dict from every parameter's name to a float or tensor that
    broadcasts to the parameter, or a list or tuple of one value a group.
    """

    groups: tuple[tuple[Optimizer, tuple[str, ...]], ...]
    layout: Layout
    start: Callable[[], tuple[State, ...]] | None = None
    """Reads the state to begin with, where the optimizer was taken from torch and has one."""

    @property
    def names(self) -> tuple[str, ...]:
        """Return the parameters' names in the order of the flat vector."""
        return self.layout.names

    @property
    def sizes(self) -> tuple[int, ...]:
        """Return the parameters' numbers of scalars, in the same order."""
        return self.layout.sizes

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Return the groups' numbers of scalars."""
        sizes = iter(self.layout.sizes)
        return tuple(sum(next(sizes) for _ in names) for _, names in self.groups)

    def init(self, params: Tensor) -> tuple[State, ...]:
        """Return the state before the first step, one a group; from a torch optimizer, its current one."""
        return self.fresh(params) if self.start is None else self.start()

    def fresh(self, params: Tensor) -> tuple[State, ...]:
        """Return the state of optimizers that have not stepped yet, one a group."""
        return tuple(
            optimizer.init(piece)
            for (optimizer, _), piece in zip(self.groups, params.split_with_sizes(self.group_sizes), strict=True)
        )

    def update(
        self, params: Tensor, grad: Tensor, states: tuple[State, ...], hyper: BoundHyper | None = None
    ) -> tuple[Tensor, tuple[State, ...]]:
        """Return the parameters and the states after one step; nothing is changed in place.

        Args:
            params: flat parameters, shape (n,).
            grad: gradient of the loss, shape (n,).
            states: one a group.
            hyper: values that replace options, see the class.

        Raises:
            ValueError: `hyper` names something that the optimizer does not take, or has the wrong number of
                values.
        """
        hypers = self.split_hyper(hyper)
        if len(self.groups) == 1:
            new_params, state = self.groups[0][0].update(params, grad, states[0], hypers[0])
            return new_params, (state,)
        sizes = self.group_sizes
        stepped = [
            optimizer.update(p, g, state, values)
            for (optimizer, _), p, g, state, values in zip(
                self.groups,
                params.split_with_sizes(sizes),
                grad.split_with_sizes(sizes),
                states,
                hypers,
                strict=True,
            )
        ]
        return torch.cat([p for p, _ in stepped]), tuple(state for _, state in stepped)

    def decay(self, hyper: BoundHyper | None = None) -> Decay:
        """Return the weight decay: floats where all groups agree on one, else flat vectors of shape (n,)."""
        decays = [
            optimizer.decay(values) for (optimizer, _), values in zip(self.groups, self.split_hyper(hyper), strict=True)
        ]
        return Decay(
            coupled=self._spread([decay.coupled for decay in decays]),
            decoupled=self._spread([decay.decoupled for decay in decays]),
        )

    def sign(self) -> Scalar:
        """Return +1.0 if the loss is minimised, -1.0 if maximised; a flat vector where groups differ."""
        return self._spread([-1.0 if optimizer.maximize else 1.0 for optimizer, _ in self.groups])

    def learning_rate(self, states: tuple[State, ...], hyper: BoundHyper | None = None) -> Scalar:
        """Return the learning rate of the step that begins at `states`; a flat vector where groups differ."""
        return self._spread(
            [
                learning_rate(optimizer, state, values)
                for (optimizer, _), state, values in zip(self.groups, states, self.split_hyper(hyper), strict=True)
            ]
        )

    def second_moment(self, states: tuple[State, ...]) -> Tensor | None:
        """Return the mean or sum of squared gradients, shape (n,); None unless all groups keep one."""
        moments = [state[key] for state in states for key in SECOND_MOMENTS if key in state]
        if len(moments) != len(states):
            return None
        tensors = [moment for moment in moments if isinstance(moment, Tensor)]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def check_hyper(self, names: Iterable[str]) -> None:
        """Raise a ValueError unless every group's optimizer takes all of `names` through `hyper`."""
        wanted = list(names)
        for optimizer, _ in self.groups:
            unknown = [name for name in wanted if name not in optimizer.accepts()]
            if unknown:
                kind = type(optimizer).__name__
                dormant = [name for name in unknown if name in optimizer.HYPER]
                remedy = f" {dormant} needs {kind}(momentum=...) above 0, so that it keeps a buffer." if dormant else ""
                raise ValueError(
                    f"hyper names {unknown}, which {kind} does not take; allowed here are "
                    f"{sorted(optimizer.accepts())}.{remedy}"
                )

    def split_hyper(self, hyper: BoundHyper | None) -> list[dict[str, Scalar]]:
        """Return `hyper` for each group: values that broadcast to the group's part of the flat vector."""
        split: list[dict[str, Scalar]] = [{} for _ in self.groups]
        if hyper:
            self.check_hyper(hyper)
            for name, value in hyper.items():
                for values, part in zip(split, self._split_value(name, value), strict=True):
                    values[name] = part
        return split

    def _split_value(self, name: str, value: Scalar | Mapping[str, Scalar] | Sequence[Scalar]) -> Sequence[Scalar]:
        """Return one value a group."""
        if isinstance(value, int | float):
            return [value] * len(self.groups)
        if isinstance(value, Tensor):
            if value.numel() == 1:
                return [value.reshape(())] * len(self.groups)
            if value.shape == (self.layout.size,):
                value = value.to(self.layout.dtype)
                return [value] if len(self.groups) == 1 else value.split_with_sizes(self.group_sizes)
            raise ValueError(
                f"hyper[{name!r}] has shape {tuple(value.shape)}; expected a 0-dimensional tensor or one of "
                f"shape ({self.layout.size},). For one value a parameter pass a dict, for one a group a list."
            )
        if isinstance(value, Mapping):
            missing = [key for key in self.layout.names if key not in value]
            extra = [key for key in value if key not in self.layout.names]
            if missing or extra:
                raise ValueError(
                    f"hyper[{name!r}] has the wrong entries: missing {missing}, unexpected {extra}. "
                    f"Expected exactly {list(self.layout.names)}."
                )
            shapes = dict(zip(self.layout.names, self.layout.shapes, strict=True))
            for key, shape in shapes.items():
                _check_broadcasts(value[key], shape, f"hyper[{name!r}][{key!r}]")
            pieces = [[self._expand(value[key], shapes[key]) for key in names] for _, names in self.groups]
            return [torch.cat(group) if group else 0.0 for group in pieces]
        if not isinstance(value, Sequence):
            raise ValueError(
                f"hyper[{name!r}] is {value!r}; expected a number, a tensor, a dict by parameter or a list by group."
            )
        if len(value) != len(self.groups):
            raise ValueError(
                f"hyper[{name!r}] has {len(value)} values for {len(self.groups)} parameter groups; give one a group."
            )
        return [v.to(self.layout.dtype) if isinstance(v, Tensor) and v.dim() else v for v in value]

    def _expand(self, value: Scalar, shape: torch.Size) -> Tensor:
        """Return `value` as a vector with one entry for each scalar of a parameter of this shape."""
        return self._tensor(value).expand(shape).reshape(-1)

    def _spread(self, values: Sequence[Scalar]) -> Scalar:
        """Return one value for all groups where that will do, else a flat vector."""
        first = values[0]
        if len(values) == 1:
            return first
        if not isinstance(first, Tensor) and all(not isinstance(v, Tensor) and v == first for v in values):
            return first
        pieces = [self._tensor(value).expand(size) for value, size in zip(values, self.group_sizes, strict=True)]
        return torch.cat(pieces)

    def _tensor(self, value: Scalar) -> Tensor:
        """Return `value` as a tensor of the flat vector's dtype and device."""
        if isinstance(value, Tensor):
            return value.to(self.layout.device, self.layout.dtype)
        return torch.full((), value, dtype=self.layout.dtype, device=self.layout.device)


def _check_broadcasts(value: object, shape: torch.Size, what: str) -> None:
    """Raise a ValueError that names `what` unless `value` is a number, or a tensor that broadcasts to `shape`."""
    if isinstance(value, int | float):
        return
    if not isinstance(value, Tensor):
        raise ValueError(f"{what} is {value!r}; expected a number or a tensor.")
    sizes = zip(reversed(value.shape), reversed(shape), strict=False)
    if value.dim() > len(shape) or any(size not in (1, whole) for size, whole in sizes):
        raise ValueError(f"{what} has shape {tuple(value.shape)}, which does not broadcast to {tuple(shape)}.")
