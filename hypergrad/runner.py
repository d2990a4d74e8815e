"""What the engine keeps for one problem: its data, its window of own steps, and the record that methods read."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hypergrad._flat import Layout, Params
from hypergrad._functional import Loss, RandomState, random_state, restore_random_state, second_order
from hypergrad.composite import Composite
from hypergrad.graph import Graph
from hypergrad.history import Record
from hypergrad.methods import Method, ResponseMethod, best_response
from hypergrad.network import Function, Network, own
from hypergrad.optim import Bound, from_torch, read_options, read_state
from hypergrad.problem import Problem, criterion_value, loss_value, penalty_value
from hypergrad.trajectory import Recipe, Recording, Step, Trajectory


@dataclass(frozen=True)
class Nested:
    """A batch together with the records of the lower levels' runs that went with it."""

    batch: Any
    records: Mapping[str, Trajectory]


@dataclass
class Source:
    """Batches of one problem, begun again whenever they end."""

    problem: Problem
    random: RandomState | None = None
    drawn: int = 0
    _iterator: Iterator[Any] | None = None
    _peeked: list[Any] | None = None
    _last: list[Any] = field(default_factory=list)

    def next(self) -> Any:
        """Return the next batch."""
        self._last = [self._peeked.pop() if self._peeked else self._draw()]
        return self._last[0]

    def recent(self) -> Any:
        """Return the batch used last; before the first, the next one, which is not used up."""
        return self._last[0] if self._last else self.peek()

    def peek(self) -> Any:
        """Return the next batch without using it up."""
        if not self._peeked:
            self._peeked = [self._draw()]
        return self._peeked[-1]

    def _draw(self) -> Any:
        for _ in range(2):
            if self._iterator is None:
                assert self.problem.data is not None
                self.random, self.drawn = random_state(torch.device("cpu")), 0
                self._iterator = iter(self.problem.data)
            try:
                batch = next(self._iterator)
            except StopIteration:
                self._iterator = None
                continue
            self.drawn += 1
            return batch
        raise ValueError(
            f"problem {self.problem.name!r}: its data yields no batch. Pass an iterable that is not empty and that can "
            f"be "
            "iterated again."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return where in the data this is: how many batches were drawn, and the random state they began from."""
        used = self.drawn - len(self._peeked or [])
        return {"drawn": used, "random": None if self.random is None else self.random.cpu}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where `state` was, by iterating anew from its random state and skipping."""
        self._iterator, self._peeked, self.drawn = None, None, 0
        if state["random"] is None:
            return
        present = random_state(torch.device("cpu"))
        restore_random_state(RandomState(state["random"], torch.device("cpu"), None))
        for _ in range(state["drawn"]):
            self._draw()
        if not state["drawn"]:
            self.peek()
        restore_random_state(present)


class Runner:
    """One problem at run time."""

    def __init__(self, problem: Problem, graph: Graph, network: Network) -> None:
        """Prepare the problem's optimizer and loss for recording."""
        self.problem, self.graph, self.network = problem, graph, network
        self.name = problem.name
        self.source = None if problem.data is None else Source(problem)
        self.window: list[Step] = []
        self.records: list[dict[str, Trajectory]] = []
        self.num_steps = 0
        """Own steps taken so far."""
        self.window_size = 0
        self.began_at_start = False
        begins_anew = problem.tasks is None and (problem.restarts or problem.start is not None)
        self.initial = copy.deepcopy(self._snapshot() | {"optimizer": {}}) if begins_anew else None
        self.snapshot: dict[str, Any] | None = None
        self.warm: dict[str, Tensor] = {}
        self.fresh: list[Any] = []
        self.recording: Recording | None = None
        self.variables = problem.variables()

    @property
    def read_by_others(self) -> bool:
        """Return whether a problem above differentiates through this one."""
        return any(self.name in self.graph.reaching(other) for other in self.graph.problems)

    # --- what the graph knows, used here -----------------------------------------------------------------------------

    def prepare(self) -> None:
        """Build what depends on the graph: layout, loss and recording."""
        used = self.graph.used(self.name)
        self.used = {key: p for key, p in self.variables.items() if key in used}
        self.nested = [other for other in self.graph.below(self.name)]
        self.loss = self._functional(self.problem.loss)
        self.response = None if self.problem.response is None else self._functional(self.problem.response)
        method = self.problem.method
        self.opaque = not self._must_differentiate_optimizer()
        self.bound = self.bind()
        self.layout = self.bound.layout
        self.recording = self._plan(method)

    def _plan(self, method: Method | None) -> Recording | None:
        if method is None or not self.problem.responds:
            return None
        readers = [p for p in self.graph.problems.values() if self.name in self.graph.below(p.name)]
        if any(p.method is not None and p.method.perturbs for p in readers):
            return Recording()  # the levels above run this one again at other values
        return method.recording(self.problem.steps)

    def _must_differentiate_optimizer(self) -> bool:
        method = self.problem.method
        if self.problem.tasks is not None:
            return True
        if method is None or not self.problem.responds:
            return False
        readers = [p for p in self.graph.problems.values() if self.name in self.graph.below(p.name)]
        return method.differentiates_optimizer or any(p.method is not None and p.method.perturbs for p in readers)

    def bind(self, *, opaque: bool | None = None) -> Bound:
        """Return the optimizer's present options bound to the variables that the loss uses.

        Args:
            opaque: read the weight decay alone; None where the problem's method needs no more.
        """
        opaque = self.opaque if opaque is None else opaque
        optimizer = self.problem.optimizer
        names = dict(self.problem.module.named_parameters())
        view = from_torch(optimizer, names, opaque=opaque)
        assert view.names is not None
        groups = tuple(
            (option, kept)
            for option, group in zip(read_options(optimizer, opaque=opaque), view.names, strict=True)
            if (kept := tuple(name for name in group if name in self.used))
        )
        order = [name for _, group in groups for name in group]
        return Bound(groups, Layout.of({n: p.detach() for n, p in self.used.items()}, names=order, what=self.name))

    def _functional(self, loss: Any) -> Loss:
        """Return a problem's loss as a pure function (lower, upper, batch), its lower levels responding inside."""
        if isinstance(loss, Composite) and not self.nested:
            return self._composite(loss)

        def value(lower: Params, upper: Params, batch: Any) -> Tensor:
            overrides = own(self.name, lower) | upper
            if isinstance(batch, Nested):
                overrides = self._respond(overrides, batch.records)
                batch = batch.batch
            scalar: Tensor = self._call(lambda models: loss_value(loss, models, batch, self.name)[0], overrides)
            return scalar

        return value

    def _call(self, function: Function, overrides: Params | None = None) -> Any:
        """Return function(models), as this problem's functions see them; no buffer changes."""
        return self.network.call(function, overrides, reader=self.name)

    def _composite(self, loss: Composite) -> Composite:
        """Return this problem's `Composite` as one over (lower, upper, batch), for Gauss-Newton products."""

        def outputs(lower: Params, upper: Params, batch: Any) -> Tensor:
            value: Tensor = self._call(lambda models: loss.outputs(models, batch), own(self.name, lower) | upper)
            return value

        def criterion(z: Tensor, upper: Params, batch: Any) -> Tensor:
            value: Tensor = self._call(lambda models: criterion_value(loss, z, models, batch), upper)
            return value

        def penalty(lower: Params, upper: Params, batch: Any) -> Tensor:
            value: Tensor = self._call(lambda models: penalty_value(loss, models, batch), own(self.name, lower) | upper)
            return value

        return Composite(outputs, criterion, None if loss.penalty is None else penalty)

    def _respond(self, overrides: Params, records: Mapping[str, Trajectory]) -> Params:
        """Return `overrides` with the responses of the lower levels, highest first, put in."""
        method_here = self.problem.method
        for other in reversed(self.nested):
            record = records[other]
            problem = self.graph.problems[other]
            method = problem.method
            targets = self.graph.depends(other)
            upper = {key: value for key, value in overrides.items() if key.split(".", 1)[0] in targets}
            if self.graph.partial_hessian or not isinstance(method, ResponseMethod) or not upper:
                overrides = overrides | own(other, record.end)
                continue
            if method_here is not None and method_here.perturbs:
                record = record.again(upper)
            overrides = overrides | own(other, best_response(record, upper, method=method, throw=False))
        return overrides

    # --- a window of own steps ---------------------------------------------------------------------------------------

    def begin_window(self) -> None:
        """Forget the last window; begin anew where asked."""
        self.window, self.records, self.window_size, self.fresh = [], [], 0, []
        self.began_at_start = False
        if self.problem.restarts or (self.problem.start is not None and self.num_steps == 0):
            self.restart()
        elif self.problem.after == "rollback":
            self.snapshot = copy.deepcopy(self._snapshot())

    def end_window(self) -> None:
        """Return to where the window began, if asked; called once the level above has stepped."""
        if self.problem.after == "rollback" and self.snapshot is not None:
            self._restore(self.snapshot)
            self.snapshot = None

    def restart(self) -> None:
        """Put the problem at its start, with fresh optimizer state."""
        assert self.initial is not None
        self._restore(self.initial)
        if self.problem.start is None:
            return
        with torch.no_grad():
            begun = self.start_values({})
            for key, parameter in self.variables.items():
                parameter.copy_(begun[key])
        self.began_at_start = True

    def start_values(self, upper: Params) -> Params:
        """Return the parameters at which the problem begins, as a function of `upper`."""
        start = self.problem.start
        assert start is not None
        values = self._call(lambda models: dict(start(models)), upper)
        missing = [key for key in self.variables if key not in values]
        if missing:
            raise ValueError(
                f"problem {self.name!r}: the result of start lacks {missing}; it must be keyed like the module's "
                f"parameters, "
                f"{list(self.variables)}."
            )
        for key, parameter in self.variables.items():
            if values[key].shape != parameter.shape:
                raise ValueError(
                    f"problem {self.name!r}: start gave {key!r} shape {tuple(values[key].shape)}, the module has "
                    f"{tuple(parameter.shape)}."
                )
        return {key: values[key] for key in self.variables}

    def _snapshot(self) -> dict[str, Any]:
        return {
            "parameters": {key: p.detach() for key, p in self.problem.variables().items()},
            "buffers": dict(self.problem.module.named_buffers()),
            "optimizer": self.problem.optimizer.state_dict()["state"],
        }

    def _restore(self, snapshot: dict[str, Any]) -> None:
        with torch.no_grad():
            for key, parameter in self.variables.items():
                parameter.copy_(snapshot["parameters"][key])
            for key, buffer in self.problem.module.named_buffers():
                buffer.copy_(snapshot["buffers"][key])
        optimizer = self.problem.optimizer
        optimizer.load_state_dict({**optimizer.state_dict(), "state": copy.deepcopy(snapshot["optimizer"])})

    def record(self, batch: Any, random: RandomState | None, records: dict[str, Trajectory]) -> Step | None:
        """Return the record of the step about to be taken, or None where no method reads one."""
        if self.recording is None:
            return None
        index = self.window_size
        keeps = self.recording.keeps(index, self.problem.steps) or self.recording.tapes(index)
        bound = self.bind()
        step = Step(
            recipe=self.recipe(bound),
            batch=Nested(batch, records) if records else batch,
            index=self.window_size,
            random=random,
            flat=bound.layout.ravel({key: p.detach() for key, p in self.used.items()}).clone() if keeps else None,
            states=read_state(self.problem.optimizer, bound, self.used) if keeps and not self.opaque else None,
        )
        self.window.append(step)
        return step

    # --- one step ----------------------------------------------------------------------------------------------------

    def partials(self, batch: Any, read: Sequence[Runner], record: Record) -> tuple[Tensor, dict[str, Params]]:
        """Return the loss at the modules' present values, and its partial derivatives here and for those `read`.

        A problem of whose variables the loss uses none is left out. Only this problem's buffers change.
        """
        leaves: dict[tuple[str, str], Tensor] = {(self.name, key): p for key, p in self.variables.items()}
        for other in read:
            leaves.update({(other.name, key): p for key, p in other.used.items()})
        step = self.window[-1] if self.window else None
        tapes = step is not None and self.recording is not None and self.recording.tapes(step.index) and not read
        with torch.enable_grad():
            if tapes and step is not None:
                value, metrics, parts = self._taped_partials(step, batch)
            else:
                value, metrics = self._evaluate(batch, {})
                tensors = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
                parts = {self.name: {}}
                for (name, key), g in zip(leaves, tensors, strict=True):
                    if g is not None:
                        parts.setdefault(name, {})[key] = g
        record.put(self.name, "loss", value)
        for key, metric in metrics.items():
            record.put(self.name, key, metric)
        return value.detach(), parts

    def _evaluate(self, batch: Any, overrides: Params) -> tuple[Tensor, dict[str, Any]]:
        value, metrics = self.network.call(
            lambda models: loss_value(self.problem.loss, models, batch, self.name),
            overrides,
            reader=self.name,
            owner=self.name,
        )
        if not value.requires_grad:
            raise ValueError(
                f"problem {self.name!r}: its loss carries no gradient; do not detach it or compute it under no_grad."
            )
        return value, metrics

    def _taped_partials(self, step: Step, batch: Any) -> tuple[Tensor, dict[str, Any], dict[str, Params]]:
        """Return the same with the graph of the gradient kept in the step's record."""
        assert step.flat is not None
        leaf = step.flat.detach().requires_grad_()
        above: Params = {}
        for name in self.graph.depends(self.name):
            above.update({key: v.requires_grad_() for key, v in self.network.variables(name).items()})
        with second_order():
            value, metrics = self._evaluate(batch, own(self.name, self.layout.unravel(leaf)) | above)
            (taped,) = torch.autograd.grad(value, leaf, create_graph=True)
        self.window[-1] = replace(step, taped=taped, leaves=(leaf, above))
        return value, metrics, {self.name: self.layout.unravel(taped.detach())}

    def evaluate_again(self, batch: Any) -> tuple[Tensor, Params]:
        """Return the loss and its gradient once more, for optimizers that evaluate several times a step."""
        value, parts = self.partials(batch, [], Record(step=0))
        return value, parts[self.name]

    def apply(self, grad: Params, again: Callable[[], tuple[Tensor, Params]]) -> None:
        """Step the optimizer along `grad`, with clipping, projection, schedulers; a missing entry has no gradient."""
        problem, optimizer = self.problem, self.problem.optimizer
        optimizer.zero_grad()
        self._set_grads(grad)
        with torch.no_grad():
            hyper = {name: self._call(function) for name, function in problem.hyper.items()}
        with _options(optimizer, hyper, self.name):
            if isinstance(optimizer, torch.optim.LBFGS):
                optimizer.step(self._closure(again))  # type: ignore[no-untyped-call]
            else:
                optimizer.step()
        if problem.project is not None:
            with torch.no_grad():
                projected = problem.project({key: p.detach() for key, p in self.variables.items()})
                for key, parameter in self.variables.items():
                    parameter.copy_(projected[key])
        for scheduler in problem.schedulers():
            scheduler.step()
        self.skip()

    def skip(self) -> None:
        """Count a step of the window, taken or left out."""
        self.num_steps += 1
        self.window_size += 1

    def _closure(self, again: Callable[[], tuple[Tensor, Params]]) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            value, grad = again()
            self.problem.optimizer.zero_grad()
            self._set_grads(grad)
            return value

        return closure

    def _set_grads(self, grad: Params) -> None:
        for key, parameter in self.variables.items():
            if key in grad:
                parameter.grad = grad[key].to(parameter.dtype)
        if self.problem.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.variables.values(), self.problem.clip_norm)
        if self.problem.clip_value is not None:
            torch.nn.utils.clip_grad_value_(self.variables.values(), self.problem.clip_value)

    # --- saving ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what this problem needs to go on."""
        return {
            "module": self.problem.module.state_dict(),
            "optimizer": self.problem.optimizer.state_dict(),
            "schedulers": [s.state_dict() for s in self.problem.schedulers()],
            "data": None if self.source is None else self.source.state_dict(),
            "num_steps": self.num_steps,
            "warm": dict(self.warm),
            "initial": self.initial,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.problem.module.load_state_dict(state["module"])
        self.problem.optimizer.load_state_dict(state["optimizer"])
        for scheduler, saved in zip(self.problem.schedulers(), state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)
        if self.source is not None:
            self.source.load_state_dict(state["data"])
        self.num_steps, self.warm, self.initial = state["num_steps"], dict(state["warm"]), state["initial"]

    def recipe(self, bound: Bound) -> Recipe:
        """Return how this problem's steps are taken by `bound`."""

        def function_of(function: Any) -> Any:
            return lambda upper: self._call(function, upper)

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

    def trajectory(self) -> Trajectory:
        """Return the record of the last window."""
        end = self.layout.ravel({key: p.detach() for key, p in self.used.items()})
        window = self.window
        if self.fresh:
            window = [*window[:-1], *(replace(window[-1], batch=batch) for batch in self.fresh)]
        states = (
            ()
            if self.opaque or not window
            else read_state(self.problem.optimizer, window[-1].recipe.optimizer, self.used)
        )
        return Trajectory(
            layout=self.layout,
            end_flat=end,
            names=tuple(self.used),
            loss=self.loss,
            steps=tuple(window),
            end_states=states,
            start=(lambda upper: {k: v for k, v in self.start_values(upper).items() if k in self.used})
            if self.began_at_start
            else None,
            response=self.response,
        )


@contextlib.contextmanager
def _options(optimizer: torch.optim.Optimizer, values: Mapping[str, Any], name: str) -> Iterator[None]:
    """Run the body with the optimizer's options replaced by `values`, then put them back."""
    found = [dict(group) for group in optimizer.param_groups]
    for option, value in values.items():
        per_group = list(value) if isinstance(value, (list, tuple)) else [value] * len(found)
        if len(per_group) != len(found) or any(
            isinstance(v, Mapping) or (isinstance(v, Tensor) and v.dim()) for v in per_group
        ):
            raise ValueError(
                f"problem {name!r}: hyper[{option!r}] must return a scalar, or one per param group; a torch optimizer "
                f"takes no "
                "value per parameter. Use tasks=, or hg.descend(hyper=...)."
            )
        for group, v in zip(optimizer.param_groups, per_group, strict=True):
            number = float(v)
            if option in ("beta1", "beta2"):
                betas = list(group["betas"])
                betas[int(option == "beta2")] = number
                group["betas"] = tuple(betas)
            else:
                group[option] = number
    try:
        yield
    finally:
        for group, before in zip(optimizer.param_groups, found, strict=True):
            group.update(before)
