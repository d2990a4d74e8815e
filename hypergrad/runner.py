"""What the engine keeps for one problem: its window of own steps, and the record that methods read."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hypergrad._flat import Layout, Params
from hypergrad._functional import Loss
from hypergrad._random import RandomState, random_state, replaying, same_state
from hypergrad._shards import held, held_params, is_shard
from hypergrad._stacked import summed
from hypergrad._tape import second_order
from hypergrad.averaged import Averaged
from hypergrad.composite import Composite
from hypergrad.distributed import Ranks, Signals
from hypergrad.graph import Graph
from hypergrad.history import Record
from hypergrad.in_place import InPlace, ShardedLoss
from hypergrad.loss_scale import Scale, ScaledLoss, entered, left
from hypergrad.methods import Method, ResponseMethod, best_response
from hypergrad.network import Function, Network, own
from hypergrad.optim import Bound, from_torch, read_options, read_state
from hypergrad.partials import AcrossRanks, Leaf, Partials, mean, mean_metrics
from hypergrad.problem import Problem, criterion_value, loss_value, penalty_value
from hypergrad.snapshot import restore, snapshot
from hypergrad.source import Source
from hypergrad.step import Leaves, Recipe, Recording, States, Step, versions
from hypergrad.stepper import Stepper
from hypergrad.trajectory import Trajectory


@dataclass(frozen=True)
class Surrounded:
    """A batch together with what the other levels were when it was seen."""

    batch: Any
    records: Mapping[str, Trajectory]
    """The runs of the lower levels that respond."""
    constants: Params
    """The variables of problems that it sees as constants and that move on before its run is differentiated."""


pytree.register_pytree_node(
    Surrounded, lambda s: ([s.batch, s.records, s.constants], None), lambda values, _: Surrounded(*values)
)


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

    runner: Runner
    beginning: Beginning

    def __call__(self, upper: Params) -> Params:
        """Return the parameters at which the window would have begun."""
        with replaying(self.beginning.random):
            values = self.runner.start_values(self.beginning.constants | upper)
        return {key: v for key, v in values.items() if key in self.runner.used}


class Runner:
    """One problem at run time."""

    def __init__(
        self,
        problem: Problem,
        graph: Graph,
        network: Network,
        ranks: Ranks | None = None,
        in_place: InPlace | None = None,
    ) -> None:
        """Prepare the problem's optimizer and loss for recording; `ranks` share each batch."""
        self.ranks, self.in_place = ranks, in_place
        self.problem, self.graph, self.network = problem, graph, network
        self.name = problem.name
        self.source = None if problem.data is None else Source(problem)
        self.window: list[Step] = []
        self.batches: deque[Any] = deque(maxlen=100)
        """The batches of the last window, the latest hundred: what a rehearsal runs on."""
        self.num_steps = 0
        """Own steps taken so far."""
        self.window_size = 0
        self.index = 0
        """Which own step of the window is being taken."""
        self.beginning: Beginning | None = None
        """What `start` met when the window began there; None where it began elsewhere."""
        self.variables = problem.variables()
        self.whole = Layout.of(held_params(self.variables), what=f"the variables of problem {self.name!r}")
        self.stepper = Stepper(problem)
        begins_anew = problem.tasks is None and (problem.restarts or problem.start is not None)
        self.initial = snapshot(problem) | {"optimizer": {}} if begins_anew else None
        self.snapshot: dict[str, Any] | None = None
        self.warm: dict[str, Tensor] = {}
        self.scale = Scale.of(problem.loss_scale)
        """By what the derivatives of the loss are multiplied inside it at present."""
        self.fresh: list[Any] = []
        self.recording: Recording | None = None
        self.compiled: dict[Any, Any] = {}
        """This problem's loss over tasks, compiled, by what it is compiled for; None where it cannot be."""
        self._kept: tuple[list[dict[str, Any]], Recipe] | None = None
        self.across = None if ranks is None else AcrossRanks(ranks, problem.module)

    # --- what the graph knows, used here -----------------------------------------------------------------------------

    def prepare(self) -> None:
        """Build what depends on the graph: layout, loss and recording."""
        used = self.graph.used(self.name) if self.problem.tasks is None else set(self.variables)
        self.used = {key: p for key, p in self.variables.items() if key in used}
        self.unused = {key: p for key, p in self.variables.items() if key not in used}
        self.nested = self.graph.below(self.name)
        self.reruns = self.graph.is_perturbed(self.name)
        reads = self.graph.reads[self.name]
        self.own_leaves: dict[tuple[str, str], Tensor] = {(self.name, key): p for key, p in self.used.items()}
        self.watched: dict[tuple[str, str], Tensor] = {
            (other, key): p
            for other in reads.accessed - reads.connected - reads.started
            if self.graph.problems[other].responds
            for key, p in self.graph.problems[other].variables().items()
        }
        self.leaves = {(self.name, key): p for key, p in self.variables.items()} | self.watched
        self.moving = self.graph.moving(self.name)
        self.pure_loss = self._functional(self.problem.loss)
        self.summed_loss = summed(self.pure_loss)
        self.loss = self._as_loss(self.problem.loss)
        response = self.problem.response
        self.response = None if response is None else self._as_loss(response)
        self.pure_response = None if response is None else self._functional(response)
        method = self.problem.method
        self.opaque = not self._must_differentiate_optimizer()
        self.bound = self.bind()
        self.layout = self.bound.layout
        self.recording = self._plan(method)
        self.last = None if method is None or self._runs_again() else method.num_batches
        """How many of the run's last steps its method reads; None for all, or where that is not known."""

    def _plan(self, method: Method | None) -> Recording | None:
        if method is None or not self.problem.responds:
            return None
        if self._runs_again():
            return Recording()  # the levels above run this one again at other values
        return method.recording(self.problem.steps)

    def _must_differentiate_optimizer(self) -> bool:
        method = self.problem.method
        if self.problem.tasks is not None:
            return True
        if method is None or not self.problem.responds:
            return False
        if "weight_decay" in self.problem.hyper:
            return True  # its derivative is asked for, not only its value
        return method.differentiates_optimizer or self._runs_again()

    def _runs_again(self) -> bool:
        """Return whether a level above evaluates its loss away from the recorded points, this one responding."""
        if self.graph.partial_hessian:
            return False
        return any(self.name in self.graph.below(p) and self.graph.is_perturbed(p) for p in self.graph.problems)

    def bind(self, *, opaque: bool | None = None) -> Bound:
        """Return the optimizer's present options bound to the variables that the loss uses.

        Args:
            opaque: read the weight decay alone; None where the problem's method needs no more.
        """
        opaque = self.opaque if opaque is None else opaque
        optimizer = self.problem.optimizer
        names = dict(self.problem.module.named_parameters())
        try:
            view = from_torch(optimizer, names, opaque=opaque)
        except ValueError as error:
            raise ValueError(f"problem {self.name!r}: {error}") from error
        assert view.names is not None
        groups = tuple(
            (option, kept)
            for option, group in zip(read_options(optimizer, opaque=opaque), view.names, strict=True)
            if (kept := tuple(name for name in group if name in self.used))
        )
        order = [name for _, group in groups for name in group]
        layout = Layout.of(held_params(self.used), names=order, what=self.name)
        if self.ranks is not None and any(map(is_shard, self.used.values())):
            layout = replace(layout, over_shards=self.ranks.sum)
        return Bound(groups, layout)

    def _functional(self, loss: Any) -> Loss:
        """Return a problem's loss as a pure function (lower, upper, batch), its lower levels responding inside."""
        if isinstance(loss, Composite) and not self.nested:
            return self._composite(loss)

        def value(lower: Params, upper: Params, batch: Any) -> Tensor:
            overrides = own(self.name, lower) | upper
            if isinstance(batch, Surrounded):
                overrides = self._respond(dict(batch.constants) | overrides, batch.records)
                batch = batch.batch
            scalar: Tensor = self._call(lambda models: loss_value(loss, models, batch, self.name)[0], overrides)
            return scalar

        return self._scaled(value)

    def _scaled(self, loss: Loss) -> Loss:
        """Return a loss of this problem with its derivatives scaled inside, as is right then, if the problem asks."""
        if self.scale is None:
            return loss

        def value(lower: Params, upper: Params, batch: Any) -> Tensor:
            assert self.scale is not None
            return ScaledLoss(loss, self.scale.value)(lower, upper, batch)

        return value

    def _as_loss(self, loss: Any) -> Loss:
        """Return a problem's loss as a function (lower, upper, batch) that methods may differentiate."""
        return self.averaged(self._functional(loss)) if self.in_place is None else self._sharded(loss, self.name)

    def as_upper_loss(self, name: str) -> Loss:
        """Return this problem's loss as a function of the variables of `name`, below it, of others and of a batch."""
        if self.in_place is not None:
            return self._sharded(self.problem.loss, name)

        def value(lower: Params, above: Params, batch: Any) -> Tensor:
            scalar: Tensor = self._call(
                lambda models: loss_value(self.problem.loss, models, batch, self.name)[0], own(name, lower) | above
            )
            return scalar

        return self.averaged(self._scaled(value))

    def _sharded(self, loss: Any, name: str) -> Loss:
        """Return a loss of this problem evaluated in place, as a function of the variables of `name` and of others."""
        assert self.in_place is not None

        def value(batch: Any) -> Tensor:
            scalar: Tensor = self._call(lambda models: loss_value(loss, models, batch, self.name)[0])
            return scalar

        def unwrap(batch: Any) -> tuple[Any, Params]:
            return (batch.batch, dict(batch.constants)) if isinstance(batch, Surrounded) else (batch, {})

        count = self.problem.micro_batches
        return ShardedLoss(self.in_place, name, self.name, value, lambda batch: self._parts(batch, count), unwrap)

    def averaged(self, loss: Loss) -> Loss:
        """Return a loss of this problem as the mean over its micro-batches and over the ranks."""
        if self.ranks is None and self.problem.micro_batches == 1:
            return loss
        return Averaged(loss, self.problem.micro_batches, self.ranks, self._split)

    def _parts(self, batch: Any, count: int) -> list[Any]:
        return self._split(batch, count) if count > 1 else [batch]

    def _split(self, batch: Any, count: int) -> list[Any]:
        if isinstance(batch, Surrounded):
            return [replace(batch, batch=part) for part in self.problem.parts(batch.batch, count)]
        return list(self.problem.parts(batch, count))

    def _call(self, function: Function, overrides: Params | None = None) -> Any:
        """Return function(models), as this problem's functions see them; no buffer changes."""
        return self.network.call(function, overrides, reader=self.name)

    def _composite(self, loss: Composite) -> Composite:
        """Return this problem's `Composite` as one over (lower, upper, batch), for Gauss-Newton products."""

        def call(function: Callable[[Any, Any], Any], overrides: Params, batch: Any) -> Tensor:
            if isinstance(batch, Surrounded):
                overrides, batch = dict(batch.constants) | overrides, batch.batch
            value: Tensor = self._call(lambda models: function(models, batch), overrides)
            return value

        def outputs(lower: Params, upper: Params, batch: Any) -> Tensor:
            return call(loss.outputs, own(self.name, lower) | upper, batch)

        def criterion(z: Tensor, upper: Params, batch: Any) -> Tensor:
            return call(lambda models, part: criterion_value(loss, z, models, part), upper, batch)

        def penalty(lower: Params, upper: Params, batch: Any) -> Tensor:
            return call(partial(penalty_value, loss), own(self.name, lower) | upper, batch)

        return Composite(outputs, criterion, None if loss.penalty is None else penalty)

    def _respond(self, overrides: Params, records: Mapping[str, Trajectory]) -> Params:
        """Return `overrides` with the responses of the lower levels, highest first, put in."""
        for other in reversed(self.nested):
            record = records[other]
            problem = self.graph.problems[other]
            method = problem.method
            targets = self.graph.depends(other)
            upper = {key: value for key, value in overrides.items() if key.split(".", 1)[0] in targets}
            if self.graph.partial_hessian or not isinstance(method, ResponseMethod) or not upper:
                overrides = overrides | own(other, record.end)
                continue
            if self.reruns:
                record = record.again(upper)
            response = best_response(record, upper, method=method, throw=False)
            if self.ranks is not None:
                response = self.ranks.share_params(response)
            overrides = overrides | own(other, response)
        return overrides

    # --- a window of own steps ---------------------------------------------------------------------------------------

    def begin_window(self) -> None:
        """End the last window, forget it and begin anew where asked."""
        self.end_window()
        if self.in_place is None:
            self.network.check_present(self.name)
        self.window, self.window_size, self.fresh = [], 0, []
        self.beginning = None
        self.batches.clear()
        if self.problem.restarts or (self.problem.start is not None and self.num_steps == 0):
            self.restart()
        if self.problem.after == "rollback":
            self.snapshot = snapshot(self.problem)

    def end_window(self) -> None:
        """Return to where the window began, if asked; called once the level above has stepped."""
        if self.problem.after == "rollback" and self.snapshot is not None:
            restore(self.problem, self.snapshot)
            self.snapshot = None

    def restart(self) -> None:
        """Put the problem at its start, with fresh optimizer state."""
        assert self.initial is not None
        restore(self.problem, self.initial)
        if self.problem.start is None:
            return
        touched = self.graph.reads[self.name].touched_by_start
        constants = self._constants(touched & {self.name, *self.moving})
        drawn = random_state(self.whole.device)
        with torch.no_grad():
            begun = self.start_values({})
            unmoved = same_state(drawn, random_state(self.whole.device))
            for key, parameter in self.variables.items():
                held(parameter).copy_(begun[key])
        self.beginning = Beginning(None if unmoved else drawn, constants)

    def start_values(self, upper: Params) -> Params:
        """Return the parameters at which the problem begins, as a function of `upper`."""
        start = self.problem.start
        assert start is not None
        values = self._call(lambda models: dict(start(models)), upper)
        if self.in_place is not None:  # without `upper`, parameters are read as they are
            values = {key: held(v) if is_shard(v) else v for key, v in values.items()}
        missing = [key for key in self.variables if key not in values]
        if missing:
            raise ValueError(
                f"problem {self.name!r}: the result of start lacks {missing}; it must be keyed like the module's "
                f"parameters, {list(self.variables)}."
            )
        for key, parameter in self.variables.items():
            if values[key].shape != held(parameter).shape:
                raise ValueError(
                    f"problem {self.name!r}: start gave {key!r} shape {tuple(values[key].shape)}, the module has "
                    f"{tuple(held(parameter).shape)}."
                )
        return {key: values[key] for key in self.variables}

    def records_next(self) -> bool:
        """Return whether the step about to be taken is one that its method reads or runs again."""
        if self.recording is None:
            return False
        return self.last is None or self.window_size >= self.problem.steps - self.last

    def record(self, batch: Any, random: RandomState | None, records: dict[str, Trajectory]) -> Step | None:
        """Return the record of the step about to be taken, or None where no method reads one."""
        if self.recording is None:
            return None
        self.batches.append(batch)
        if not self.records_next():
            return None
        index = self.window_size
        keeps = self.recording.keeps(index, self.problem.steps) or self.recording.tapes(index)
        recipe = self._present_recipe()
        bound = recipe.optimizer
        step = Step(
            recipe=recipe,
            batch=self.surrounded(batch, records),
            index=self.window_size,
            random=random,
            flat=bound.layout.record(held_params(self.used)) if keeps else None,
            states=read_state(self.problem.optimizer, bound, self.used) if keeps and not self.opaque else None,
        )
        self.window.append(step)
        return step

    def surrounded(self, batch: Any, records: Mapping[str, Trajectory]) -> Any:
        """Return the batch with what else its step saw; the batch itself where nothing can change behind it."""
        constants = self._constants(self.moving)
        written = self.graph.reads[self.name].written
        replayed = self.recording is None or self.window_size >= self.recording.first
        if written and self.in_place is None and (replayed or self.window_size == self.problem.steps - 1):
            constants = constants | self.network.buffers(written)
        return Surrounded(batch, records, constants) if records or constants else batch

    def _constants(self, names: Iterable[str]) -> Params:
        """Return the present variables of these problems, to stay when they move on."""
        constants: Params = {}
        for name in names:
            constants.update(self.network.kept_variables(name))
        return constants

    def forget_options(self) -> None:
        """Read the optimizer's options anew before the next step."""
        self._kept = None

    def _present_recipe(self) -> Recipe:
        """Return how the next step is taken; made anew only when the optimizer's options have changed."""
        options = [{k: v for k, v in g.items() if k != "params"} for g in self.problem.optimizer.param_groups]
        if self._kept is not None and self._kept[0] == options:
            return self._kept[1]
        recipe = self.recipe(self.bind())
        moves = bool(self.problem.hyper and self.moving)
        volatile = moves or any(isinstance(v, Tensor) for group in options for v in group.values())
        self._kept = None if volatile else (options, recipe)
        return recipe

    # --- one step ----------------------------------------------------------------------------------------------------

    def partials(
        self, batch: Any, read: Sequence[Runner], record: Record, signals: Signals | None = None
    ) -> tuple[Tensor, dict[str, Params]]:
        """Return the loss at the modules' present values, and its partial derivatives here and for those `read`.

        A problem of whose variables the loss uses none is left out. Only this problem's buffers change. With ranks, all
        of it is averaged over them in one all-reduce, which carries `signals` along.
        """
        leaves = self.leaves
        for other in read:
            leaves = leaves | other.own_leaves
        step = self.window[-1] if self.window and self.window[-1].index == self.window_size else None
        tapes = step is not None and self.recording is not None and self.recording.tapes(step.index) and not read
        if self.across is not None:
            self.across.begin()
        taped: Leaves | None = None
        with torch.enable_grad():
            if tapes and step is not None:
                outcome, taped = self._taped_partials(step, batch)
            else:
                outcome = mean(
                    [self._part_partials(part, leaves) for part in self._parts(batch, self.problem.micro_batches)]
                )
        may_draw = self.response is not None  # where the loss did not
        if step is not None and not may_draw and same_state(step.random, random_state(self.layout.device)):
            self.window[-1] = replace(self.window[-1], random=None)  # nothing was drawn, nothing need be replayed
        for name, key in outcome.found:
            if (name, key) in self.watched:
                raise ValueError(
                    f"problem {self.name!r}: its loss depends on {name!r}, which it did not on its first batch, when "
                    f"the graph was inferred. Say Problem({self.name!r}, reads=[{name!r}, ...])."
                )
            if name == self.name and key in self.unused and self.recording is not None:
                raise ValueError(
                    f"problem {self.name!r}: its loss depends on its parameter {key!r}, which it did not on its first "
                    "batch, when the graph was inferred; hypergradients would leave it out. Let every batch reach all "
                    "parameters that any does, if need be by adding 0.0 * parameter.sum() to the loss."
                )
        if self.across is not None:
            like = leaves if taped is None else {(self.name, ""): taped[0]}
            with torch.set_grad_enabled(taped is not None):
                outcome = self.across.mean(outcome, like, signals)
        elif signals is not None:
            signals.agree()
        if taped is not None:
            outcome = self._keep_tape(outcome, taped)
        elif step is not None:
            self._check_reached(step, [key for name, key in outcome.found if name == self.name])
        by_problem: dict[str, Params] = {self.name: {}}
        for (name, key), g in outcome.found.items():
            by_problem.setdefault(name, {})[key] = g
        record.put(self.name, "loss", outcome.value)
        for key, metric in outcome.metrics.items():
            record.put(self.name, key, metric)
        return outcome.value.detach(), by_problem

    def _part_partials(self, part: Any, leaves: Mapping[Leaf, Tensor]) -> Partials:
        """Return loss, metrics and derivatives on one micro-batch; those that the loss does not depend on left out."""
        if self.in_place is None:
            value, metrics = self._evaluate(part, {})
            scale = None if self.scale is None else self.scale.value
            bar = None if scale is None else torch.full_like(value, scale)
            self._check_trains(leaves)
            tensors = torch.autograd.grad(value, list(leaves.values()), bar, allow_unused=True)
            given = {key: g for key, g in zip(leaves, tensors, strict=True) if g is not None}
            return Partials(value, metrics, given if scale is None else {key: g / scale for key, g in given.items()})
        value, metrics, grads = self.in_place.gradients(lambda: self._evaluate(part, {}), {}, self.name)
        return Partials(value, metrics, {key: grads[".".join(key)] for key in leaves if ".".join(key) in grads})

    def _check_trains(self, leaves: Mapping[Leaf, Tensor]) -> None:
        """Raise a ValueError if a variable has been frozen since the engine was built."""
        frozen = [f"{name}.{key}" for (name, key), p in leaves.items() if not p.requires_grad]
        if frozen:
            raise ValueError(
                f"problem {self.name!r}: {frozen} do not require gradients any more. What trains is settled when the "
                "engine is built: build another one, or let the optimizer's learning rate for them be 0."
            )

    def _evaluate(self, batch: Any, overrides: Params, apart: Collection[str] = ()) -> tuple[Tensor, dict[str, Any]]:
        value, metrics = self.network.call(
            lambda models: loss_value(self.problem.loss, models, batch, self.name),
            overrides,
            reader=self.name,
            owner=self.name,
            apart=apart,
        )
        if not value.requires_grad:
            raise ValueError(
                f"problem {self.name!r}: its loss carries no gradient; do not detach it or compute it under no_grad."
            )
        return value, metrics

    def _taped_partials(self, step: Step, batch: Any) -> tuple[Partials, Leaves]:
        """Return the same with one derivative, the flat gradient with its graph, and the leaves of that graph.

        With ranks it is this rank's own, of which their mean is the gradient.
        """
        assert step.flat is not None
        leaf = step.flat.detach().requires_grad_()
        above: Params = {}
        for name in self.graph.depends(self.name):
            above.update({key: v.requires_grad_() for key, v in self.network.variables(name).items()})
        flat, upper = leaf, above
        if self.ranks is not None:  # one node for both: a product sends one message for the two of them
            flat, *tensors = self.ranks.share([leaf, *above.values()])
            upper = dict(zip(above, tensors, strict=True))
        written = self.graph.reads[self.name].written  # by this call, in the module itself
        seen = step.batch.constants if isinstance(step.batch, Surrounded) else {}
        seen = {key: value for key, value in seen.items() if key not in written}
        lower = self.layout.unravel(flat)
        overrides = seen | own(self.name, lower) | upper
        scale = None if self.scale is None else self.scale.value
        if scale is not None:
            overrides = entered(overrides, scale)
        with second_order():
            parts = self._parts(batch, self.problem.micro_batches)
            several = [self._evaluate(part, overrides, written) for part in parts]
            value = torch.stack([value for value, _ in several]).mean() if len(several) > 1 else several[0][0]
            if scale is not None:
                value = left(value, scale)
            inputs = {**lower, **self.unused}
            slopes = torch.autograd.grad(value, list(inputs.values()), create_graph=True, allow_unused=True)
            found = {key: g for key, g in zip(inputs, slopes, strict=True) if g is not None}
            if self.ranks is None:  # of these, another may have reached it
                self._check_reached(step, found)
            taped = self.layout.ravel({key: found.get(key, torch.zeros_like(w)) for key, w in lower.items()})
        metrics = mean_metrics([metrics for _, metrics in several]) if len(several) > 1 else several[0][1]
        late = {(self.name, key): g for key, g in found.items() if key in self.unused}
        return Partials(value, metrics, {(self.name, ""): taped} | late), (leaf, above)

    def _check_reached(self, step: Step, found: Collection[str]) -> None:
        """Raise a ValueError if a parameter has no gradient here: the optimizer passes over it, a replay would not."""
        skipped = [key for key in self.used if key not in found]
        if skipped and self.last is None and not self.opaque and not step.recipe.rests_without_gradient():
            raise ValueError(
                f"problem {self.name!r}: its loss does not depend on its parameters {skipped} on this batch; the "
                "optimizer passes over them, and the record of the run could not. Let every batch reach all parameters "
                "that any does, if need be by adding 0.0 * parameter.sum() to the loss."
            )

    def _keep_tape(self, outcome: Partials, leaves: Leaves) -> Partials:
        """Put the taped gradient in `outcome` into the step's record; return its values by parameter instead."""
        taped = outcome.found[self.name, ""]
        self.window[-1] = replace(self.window[-1], taped=taped, leaves=leaves, versions=versions(leaves[1]))
        slopes = self.layout.unravel(taped.detach().clone())  # clipped in place
        return replace(outcome, found={(self.name, key): g for key, g in slopes.items()})

    def evaluate_again(self, batch: Any) -> tuple[Tensor, Params]:
        """Return the loss and its gradient once more, for optimizers that evaluate several times a step."""
        value, parts = self.partials(batch, [], Record(step=0))
        return value, parts[self.name]

    def apply(self, grad: Params, value: Tensor, batch: Any) -> None:
        """Step the optimizer along `grad`, with clipping, projection, schedulers; a missing entry has no gradient."""
        hyper: dict[str, Any] = {}
        if self.problem.hyper:
            with torch.no_grad():
                hyper = {name: self.hyper_value(name) for name in self.problem.hyper}
        self.stepper.take(grad, value, hyper, lambda: self.evaluate_again(batch))
        self.count()

    def hyper_value(self, name: str) -> Any:
        """Return the present value of an optimizer's option that is a function of upper problems."""
        return self._call(self.problem.hyper[name])

    def check_project(self) -> None:
        """Raise a ValueError unless `project` returns the variables that it was given."""
        assert self.problem.project is not None
        given = {key: p.detach().clone() for key, p in self.variables.items()}
        projected = self.problem.project(given)
        self.whole.check_like(projected, f"problem {self.name!r}: the result of project")

    def leave_out(self) -> None:
        """Count the present step without taking it; a sweep through the record passes over it."""
        if self.window and self.window[-1].index == self.window_size:
            self.window[-1] = replace(self.window[-1], taken=False, taped=None, leaves=None)
        self.count()

    def count(self) -> None:
        """Count a step of the window, taken or left out."""
        self.num_steps += 1
        self.window_size += 1

    def recipe(self, bound: Bound, constants: Params | None = None) -> Recipe:
        """Return how this problem's steps are taken by `bound`.

        Args:
            bound: the optimizer.
            constants: what hyperparameters read of the problems that move on; None for their present variables.
        """
        if constants is None:
            constants = self._constants(self.moving) if self.problem.hyper else {}

        def function_of(function: Any) -> Any:
            return lambda upper: self._call(function, constants | upper)

        return Recipe(
            loss=self.loss,
            layout=bound.layout,
            optimizer=bound,
            hyper={name: function_of(function) for name, function in self.problem.hyper.items()},
            clip_norm=self.problem.clip_norm,
            clip_value=self.problem.clip_value,
            project=None if self.problem.project is None else self.project,
        )

    def project(self, params: Params) -> Params:
        """Return the variables in `params` after the problem's projection, which sees all of them."""
        assert self.problem.project is not None
        rest = {key: p.detach() for key, p in self.variables.items() if key not in params}
        projected = self.problem.project(params | rest)
        return {key: projected[key] for key in params}

    def trajectory(self, below: Mapping[str, Trajectory] | None = None) -> Trajectory:
        """Return the record of the last window.

        Args:
            below: records of lower levels that have run since, at this problem's present values. Methods that look at
                the end of the window alone see these; those that go through its steps see what these saw.
        """
        end = self.layout.record(held_params(self.used))
        window, method = self.window, self.problem.method
        if below and method is not None and method.num_batches is not None:
            window = [
                replace(step, batch=replace(step.batch, records={**step.batch.records, **below}))
                if isinstance(step.batch, Surrounded)
                else step
                for step in window
            ]
        if self.fresh and window:
            last = window[-1]
            drawn = [replace(last.batch, batch=b) if isinstance(last.batch, Surrounded) else b for b in self.fresh]
            window = [*window[:-1], *(replace(last, batch=batch) for batch in drawn)]
        states = (
            ()
            if self.opaque or not window
            else read_state(self.problem.optimizer, window[-1].recipe.optimizer, self.used)
        )
        return self.record_of(tuple(window), end, states, self.beginning)

    def record_of(
        self, steps: tuple[Step, ...], end: Tensor, states: States, beginning: Beginning | None
    ) -> Trajectory:
        """Return the record of a window that took `steps` to `end`; `beginning` is None where no `start` began it."""
        return Trajectory(
            layout=self.layout,
            end_flat=end,
            names=tuple(self.used),
            loss=self.loss,
            steps=steps,
            end_states=states,
            start=None if beginning is None else StartAgain(self, beginning),
            response=self.response,
        )
