"""What the engine keeps for one problem: its window of own steps, and the record that methods read."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hypergrad._flat import Layout, Params
from hypergrad._random import RandomState, random_state, same_state
from hypergrad._shards import held_params, is_shard
from hypergrad._stacked import summed
from hypergrad.distributed import Ranks, Signals
from hypergrad.evaluation import Evaluation, Taped
from hypergrad.graph import Graph
from hypergrad.history import Record
from hypergrad.in_place import InPlace
from hypergrad.losses import Losses, Surrounded
from hypergrad.methods import Method
from hypergrad.network import Network
from hypergrad.optim import Bound, from_torch, read_options, read_state
from hypergrad.partials import AcrossRanks, Partials
from hypergrad.problem import Problem
from hypergrad.snapshot import restore, snapshot
from hypergrad.source import Source
from hypergrad.start import Beginning, Start, StartAgain
from hypergrad.step import Leaves, Recipe, Recording, States, Step, versions
from hypergrad.stepper import Rates, Stepper, scheduled_rates
from hypergrad.trajectory import Trajectory


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
        self.fresh: list[Any] = []
        self.recording: Recording | None = None
        self.compiled: dict[Any, Any] = {}
        """This problem's loss over tasks, compiled, by what it is compiled for; None where it cannot be."""
        self.losses = Losses(problem, graph, network, ranks, in_place)
        self.start = None if problem.start is None else Start(problem.start, self.losses, self.variables)
        self._kept: tuple[list[dict[str, Any]], Recipe] | None = None
        self._template: tuple[list[dict[str, Any]], Bound] | None = None
        self.across = None if ranks is None else AcrossRanks(ranks, problem.module)

    # --- what the graph knows, used here -----------------------------------------------------------------------------

    def prepare(self) -> None:
        """Build what depends on the graph: layout, loss and recording."""
        used = self.graph.used(self.name) if self.problem.tasks is None else set(self.variables)
        self.used = {key: p for key, p in self.variables.items() if key in used}
        self.unused = {key: p for key, p in self.variables.items() if key not in used}
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
        self.pure_loss = self.losses.pure(self.problem.loss)
        self.summed_loss = summed(self.pure_loss)
        self.loss = self.losses.as_loss(self.problem.loss)
        response = self.problem.response
        self.response = None if response is None else self.losses.as_loss(response)
        self.pure_response = None if response is None else self.losses.pure(response)
        method = self.problem.method
        self.opaque = not self._must_differentiate_optimizer()
        self.bound = self.bind()
        self.layout = self.bound.layout
        self.evaluation = Evaluation(self.losses, self.layout, self.unused)
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

    def bind(self, *, opaque: bool | None = None, rates: Sequence[Rates] | None = None) -> Bound:
        """Return the optimizer's present options bound to the variables that the loss uses.

        Args:
            opaque: read the weight decay alone; None where the problem's method needs no more.
            rates: learning rates by step, in place of the present ones, for each param group.
        """
        opaque = self.opaque if opaque is None else opaque
        optimizer = self.problem.optimizer
        names = dict(self.problem.module.named_parameters())
        try:
            view = from_torch(optimizer, names, opaque=opaque)
        except ValueError as error:
            copies = "" if self.problem.tasks is None else f" (With tasks={self.problem.tasks} any method needs that.)"
            raise ValueError(f"problem {self.name!r}: {error}{copies}") from error
        assert view.names is not None
        options = read_options(optimizer, opaque=opaque)
        if rates is not None:
            options = tuple(replace(option, lr=lr) for option, lr in zip(options, rates, strict=True))
        groups = tuple(
            (option, kept)
            for option, group in zip(options, view.names, strict=True)
            if (kept := tuple(name for name in group if name in self.used))
        )
        order = [name for _, group in groups for name in group]
        layout = Layout.of(held_params(self.used), names=order, what=self.name)
        if self.ranks is not None and any(map(is_shard, self.used.values())):
            layout = replace(layout, over_shards=self.ranks.sum)
        return Bound(groups, layout)

    # --- a window of own steps ---------------------------------------------------------------------------------------

    def begin_window(self) -> None:
        """End the last window, forget it and begin anew where asked."""
        self.end_window()
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
        if self.start is None:
            return
        touched = self.graph.reads[self.name].touched_by_start
        constants = self._constants(touched & {self.name, *self.moving})
        self.beginning = self.start.begin(constants, self.whole.device)

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
        options = self._options()
        if self._kept is not None and self._kept[0] == options:
            return self._kept[1]
        recipe = self.recipe(self.bind())
        moves = bool(self.problem.hyper and self.moving)
        self._kept = None if moves or _hold_tensors(options) else (options, recipe)
        return recipe

    def _options(self) -> list[dict[str, Any]]:
        return [{k: v for k, v in g.items() if k != "params"} for g in self.problem.optimizer.param_groups]

    def template(self) -> Bound:
        """Return the optimizer that the run of each task begins with, its learning rates as they are scheduled."""
        if self.stepper.schedulers:
            return self.bind(rates=scheduled_rates(self.problem))
        options = self._options()
        if self._template is not None and self._template[0] == options:
            return self._template[1]
        bound = self.bind()
        self._template = None if _hold_tensors(options) else (options, bound)
        return bound

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
        taped: Taped | None = None
        with torch.enable_grad():
            if tapes and step is not None:
                taped = self.evaluation.taped(step, batch)
                outcome = taped.partials
                if self.ranks is None:  # of these, another may have reached what this one did not
                    self._check_reached(step, taped.reached)
            else:
                outcome = self.evaluation.partials(batch, leaves)
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
            like = leaves if taped is None else {(self.name, ""): taped.leaves[0]}
            with torch.set_grad_enabled(taped is not None):
                outcome = self.across.mean(outcome, like, signals)
        elif signals is not None:
            signals.agree()
        if taped is not None:
            outcome = self._keep_tape(outcome, taped.leaves)
        elif step is not None:
            self._check_reached(step, [key for name, key in outcome.found if name == self.name])
        by_problem: dict[str, Params] = {self.name: {}}
        for (name, key), g in outcome.found.items():
            by_problem.setdefault(name, {})[key] = g
        record.put(self.name, "loss", outcome.value)
        for key, metric in outcome.metrics.items():
            record.put(self.name, key, metric)
        return outcome.value.detach(), by_problem

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
        lowest = self.graph.level_of[self.name] == 0
        self.stepper.take(grad, value, hyper, partial(self.evaluate_again, batch) if lowest else None)
        self.count()

    def hyper_value(self, name: str) -> Any:
        """Return the present value of an optimizer's option that is a function of upper problems."""
        return self.losses.call(self.problem.hyper[name])

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
            return lambda upper: self.losses.call(function, constants | upper)

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
        states = (
            ()
            if self.opaque or not window
            else read_state(self.problem.optimizer, window[-1].recipe.optimizer, self.used)
        )
        record = self.record_of(tuple(window), end, states, self.beginning)
        if not window:
            return record
        around = window[-1].batch
        return record.with_fresh(
            [replace(around, batch=b) if isinstance(around, Surrounded) else b for b in self.fresh]
        )

    def record_of(
        self, steps: tuple[Step, ...], end: Tensor, states: States, beginning: Beginning | None
    ) -> Trajectory:
        """Return the record of a window that took `steps` to `end`; `beginning` is None where no `start` began it."""
        begun = None
        if beginning is not None:
            assert self.start is not None
            begun = StartAgain(self.start, beginning, frozenset(self.used))
        return Trajectory(
            layout=self.layout,
            end_flat=end,
            names=tuple(self.used),
            loss=self.loss,
            steps=steps,
            end_states=states,
            start=begun,
            response=self.response,
        )


def _hold_tensors(options: Iterable[Mapping[str, Any]]) -> bool:
    return any(isinstance(v, Tensor) for group in options for v in group.values())
