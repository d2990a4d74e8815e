"""Where a problem with `start` begins, as a function of the problems above."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hypergrad._flat import Params
from hypergrad._random import RandomState, random_state, replaying, same_state
from hypergrad._shards import held, is_shard
from hypergrad.losses import Losses


@dataclass(frozen=True)
class Beginning:
    """What `start` met when it was called, so that the window can be begun there again."""

    random: RandomState | None
    """The generators, to be replayed; None if it drew nothing."""
    constants: Params
    """The variables that it read and that move on before the run is differentiated, the problem's own included."""


@dataclass(frozen=True)
class StartAgain:
    """Where a window began, as a function of the problems above: the same draws and constants as then."""

    start: Start
    beginning: Beginning
    used: frozenset[str]
    """The parameters that the loss uses: those of the record."""

    def __call__(self, upper: Params) -> Params:
        """Return the parameters at which the window would have begun."""
        with replaying(self.beginning.random):
            values = self.start.values(self.beginning.constants | upper)
        return {key: v for key, v in values.items() if key in self.used}


class Start:
    """The `start` of one problem."""

    def __init__(
        self, function: Callable[[Any], Mapping[str, Tensor]], losses: Losses, variables: Mapping[str, nn.Parameter]
    ) -> None:
        """Call `function` as the problem's losses are called; it returns values for `variables`."""
        self._function, self._losses, self._variables = function, losses, variables

    def begin(self, constants: Params, device: torch.device) -> Beginning:
        """Put the variables at the start; return what it met, `constants` of it."""
        drawn = random_state(device)
        with torch.no_grad():
            begun = self.values({})
            unmoved = same_state(drawn, random_state(device))
            for key, parameter in self._variables.items():
                held(parameter).copy_(begun[key])
        return Beginning(None if unmoved else drawn, constants)

    def values(self, upper: Params) -> Params:
        """Return the parameters at which the problem begins, as a function of `upper`."""
        values = self._returned(upper)
        name = self._losses.name
        missing = [key for key in self._variables if key not in values]
        if missing:
            raise ValueError(
                f"problem {name!r}: the result of start lacks {missing}; it must be keyed like the module's "
                f"parameters, {list(self._variables)}."
            )
        for key, parameter in self._variables.items():
            if values[key].shape != held(parameter).shape:
                raise ValueError(
                    f"problem {name!r}: start gave {key!r} shape {tuple(values[key].shape)}, the module has "
                    f"{tuple(held(parameter).shape)}."
                )
        return {key: values[key] for key in self._variables}

    def check_nothing_lost(self) -> None:
        """Raise a ValueError for values of parameters that the optimizer does not hold, other than they have."""
        values, module = self._returned({}), self._losses.problem.module
        constants = {k: held(p) for k, p in module.named_parameters() if k in values and k not in self._variables}
        lost = [k for k, p in constants.items() if values[k].shape != p.shape or not torch.equal(values[k], p)]
        if lost:
            raise ValueError(
                f"problem {self._losses.name!r}: start returns {lost}, which are not among what its optimizer trains, "
                f"{list(self._variables)}: they would be lost. Let the optimizer hold them in a group with lr=0 (the "
                "body in ANIL), or read them in the loss where they come from, and return the others alone."
            )

    def _returned(self, upper: Params) -> Params:
        values: Params = self._losses.call(lambda models: dict(self._function(models)), upper)
        if self._losses.in_place is None:
            return values
        return {key: held(v) if is_shard(v) else v for key, v in values.items()}  # without `upper`, as they are
