"""The engine: it runs the levels of a graph, lowest first, and chains hypergradients along it."""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import Tensor

from hypergrad._autocast import uncached_autocast
from hypergrad._calls import under_way
from hypergrad._flat import Params, check_mode
from hypergrad._random import RandomState, random_state, replaying, restore_random_state
from hypergrad._tape import add
from hypergrad._untouched import untouched
from hypergrad.averaged import plain
from hypergrad.callbacks.base import Callback
from hypergrad.checks import arrange, check_runner, check_task_buffers, goes_back, padding_rows
from hypergrad.coupling import by_problem, ravel, settle
from hypergrad.distributed import Signals
from hypergrad.distributed.launch import begin_alike, check_alike, choose_ranks, rank_stream
from hypergrad.faults import Faults, Gradient, OnBreakdown, OnNonfinite
from hypergrad.graph import Graph
from hypergrad.history import History, Record
from hypergrad.in_place import check_levels, in_place
from hypergrad.loop import named, run
from hypergrad.methods import Pulled, Reptile, ResponseMethod
from hypergrad.methods.base import Total, check_pulled
from hypergrad.network import Network
from hypergrad.problem import Problem
from hypergrad.product_check import check
from hypergrad.reads import Reads, dry_reads
from hypergrad.replay_check import check_replay
from hypergrad.runner import Runner
from hypergrad.saving import load_all, save_all
from hypergrad.source import DataError, load_random, save_random
from hypergrad.tasks import first_task, run_tasks
from hypergrad.trajectory import Trajectory


class Engine:
    """Trains a graph of problems: each level on its own loss, upper levels by hypergradients through the lower ones.

    One step of the engine is one step of the top level. Before it, each level below runs its `steps`; a level in the
    middle does the same to the level below it at each of its own steps; a level that is read past the one between runs
    once more after the last of these. The gradient of a problem is its partial derivative plus what the lower
    problems' methods pull back, from the lowest level up.

    Args:
        problems: lowest level first; a nested list puts several problems on one level.
        on_breakdown: what to do when a hypergradient cannot be trusted (negative curvature, divergence, non-finite
            values): "raise" a `SolveError` that names the problem, "warn" and step with what there is, or "skip" that
            step.
        on_nonfinite: the same for a loss, hypergradient or residual that is NaN or infinite, at any level: "raise" an
            error that names level, step and tensor; "skip" that step of that problem; "rollback" every level to where
            the present step of the top level began, and take it again with the batches and draws that follow, at most
            four times in a row (one copy of parameters and optimizer states a step). None does as `on_breakdown` says.
        partial_hessian: allow levels with levels below whose rule cannot be differentiated, by holding the lower ones
            fixed in curvature and mixed partial. It biases the hypergradient.
        distributed: the processes that train together, each taking its part of every batch; see docs/scaling.md. None
            for all processes of a `torchrun` whose script leaves `torch.distributed` to the engine (and for this
            process alone where there is no `torchrun`); True for all of an initialised group, or a process group;
            False for this process alone. Every rank must build the same engine and step it alike; parameters, buffers
            and the random state begin as rank 0 has them, losses draw from a stream of each rank's own.
        product_check: at build, compare one Hessian product with a finite difference for each problem whose method
            needs second derivatives; it catches modules whose second derivative is silently wrong. And take the first
            steps of a run that is differentiated again, once; it catches hooks and state that no record holds.

    Raises:
        ValueError: at construction, for a graph or a problem that has no exact meaning; nothing is changed then.

    Example:
        >>> import torch, hypergrad as hg
        >>> _ = torch.manual_seed(0)
        >>> net, weight = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
        >>> x = torch.ones(4, 1)
        >>> lower = hg.Problem(
        ...     "net",
        ...     module=net,
        ...     loss=lambda models, batch: ((models.net(batch) - models.weight(batch)) ** 2).mean(),
        ...     optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        ...     data=[x],
        ...     steps=5,
        ...     method=hg.Unrolled(),
        ... )
        >>> upper = hg.Problem(
        ...     "weight",
        ...     module=weight,
        ...     loss=lambda models, batch: ((models.net(batch) - 1.0) ** 2).mean(),
        ...     optimizer=torch.optim.Adam(weight.parameters(), lr=0.1),
        ...     data=[x],
        ... )
        >>> losses = hg.Engine([lower, upper]).run(60)["weight.loss"]
        >>> losses[-1] < 0.1
        True
    """

    def __init__(
        self,
        problems: Sequence[Problem | Sequence[Problem]],
        *,
        on_breakdown: OnBreakdown = "raise",
        on_nonfinite: OnNonfinite | None = None,
        partial_hessian: bool = False,
        product_check: bool = True,
        distributed: bool | Any | None = None,
    ) -> None:
        """Infer the graph by one dry call of each loss, and check it."""
        self.faults = Faults(on_breakdown, on_nonfinite)
        self.graph = Graph(arrange(problems), partial_hessian=partial_hessian)
        self.ranks = choose_ranks(distributed)
        self.signals = Signals()
        if self.ranks is not None:
            begin_alike(self.ranks, {name: p.module for name, p in self.graph.problems.items()})
        self.network = Network(list(self.graph.problems.values()))
        self.in_place = in_place(list(self.graph.problems.values()), self.ranks)
        self.runners = {
            name: Runner(p, self.graph, self.network, self.ranks, self.in_place)
            for name, p in self.graph.problems.items()
        }
        self._device = next(iter(self.runners.values())).whole.device
        self._stream = None if self.ranks is None else rank_stream(self.ranks, self._device)
        self.num_steps = 0
        self.is_between_steps = True
        """Whether the last step was completed."""
        self.seconds: dict[str, float] = defaultdict(float)
        """Host time by phase: "data", and for each problem its loss, its response and its optimizer's steps."""
        self.listeners: Sequence[Callback] = ()
        self.listening: Mapping[str, Any] = {}
        """States of the callbacks, for the next run."""
        self._lower: dict[str, list[Runner]] = {}
        self._past: dict[str, set[str]] = {}
        self._members: dict[str, list[Runner]] = {}
        self._batches: dict[str, Any] = {}
        self._chunks: dict[str, int] = {}
        self._to_replay: set[str] = set()
        """Problems whose first window is still to be compared with the same taken again."""
        with self._sharing():
            self._build(product_check)

    def _build(self, product_check: bool) -> None:
        """Find what each problem reads, and check that it all fits."""
        self.graph.validate_top()
        for level in reversed(self.graph.levels):
            for problem in level:
                self.graph.reads[problem.name] = self._find_reads(problem)
        if self.ranks is not None:
            check_alike(self.ranks, self.graph.reads)
        self.graph.validate()
        if self.in_place is not None:
            check_levels(self.graph.below, list(self.graph.problems.values()))
        for name, runner in self.runners.items():
            self.network.restrict(name, self.graph.reads[name].accessed)
            runner.prepare()
        for name in self.runners:
            self._lower[name] = [self.runners[other] for other in self.graph.reaching(name)]
            self._past[name] = self.graph.overtaken(name)
            self._members[name] = self._with_tasks(self.runners[name])
        for name, runner in self.runners.items():
            check_runner(runner, self._upper(self.graph.depends(name)))
            tasks = runner.problem.tasks
            if self.ranks is not None and tasks is not None and tasks % self.ranks.size:
                raise ValueError(
                    f"problem {name!r}: tasks={tasks} do not divide among {self.ranks.size} ranks. Choose a multiple."
                )
        for name, members in self._members.items():
            check_task_buffers(self.network, self.runners[name].problem, self._first_batch, members)
        if product_check:
            self._to_replay = {name for name, r in self.runners.items() if self.ranks is None and goes_back(r)}
            for runner in self.runners.values():
                self._check_product(runner)

    # --- the public loop ---------------------------------------------------------------------------------------------

    def run(self, num_steps: int, *, callbacks: Iterable[Callback] = (), resume: str | Path | None = None) -> History:
        """Return the history of `num_steps` steps of the top level.

        Args:
            num_steps: how many, >= 1.
            callbacks: told about each step; they read the engine and may ask it to stop.
            resume: a folder of checkpoints, as `callbacks.Checkpoint` writes them. The run goes on from the newest
                intact one, or begins where there is none; `num_steps` then counts all steps since the engine was built,
                so that the same script started again goes on to the same end.

        Raises:
            ValueError: for a number of steps below 1, and what the callbacks raise.
            SolveError: as `on_breakdown` and `on_nonfinite` say.
            DataError: if a problem's data raises; what it raised is chained.
        """
        return run(self, num_steps, callbacks, resume)

    def step(self) -> Record:
        """Return the record of one step of the top level, all levels below having run as they are due."""
        check_mode()
        self.is_between_steps, self.faults.step = False, self.num_steps
        record = self.faults.attempt(self._step, self.runners)
        self.num_steps += 1
        self.is_between_steps = True
        return record

    def _step(self) -> Record:
        record = Record(step=self.num_steps)
        if self.in_place is None:
            for name in self.graph.problems:
                self.network.check_present(name)
        with under_way(), self._sharing(), uncached_autocast():
            self._step_level(len(self.graph.levels) - 1, self.graph.levels[-1], 0, record)
        return record

    @property
    def names(self) -> list[list[str]]:
        """The problems' names by level, lowest first."""
        return [[problem.name for problem in level] for level in self.graph.levels]

    @property
    def mesh(self) -> Any:
        """The device mesh over which modules are sharded; None where all are whole."""
        return None if self.in_place is None else self.in_place.mesh

    def _sharing(self) -> contextlib.AbstractContextManager[Any]:
        """Let losses gather over the ranks in the body."""
        return contextlib.nullcontext() if self.ranks is None else self.ranks.active()

    def _own_draws(self) -> contextlib.AbstractContextManager[Any]:
        """Let random numbers in the body come from this rank's stream; the generators go on as all ranks have them."""
        return contextlib.nullcontext() if self.ranks is None else self._rank_draws()

    @contextlib.contextmanager
    def _rank_draws(self) -> Iterator[None]:
        common = random_state(self._device)
        restore_random_state(self._stream)
        try:
            yield
        finally:
            self._stream = random_state(self._device)
            restore_random_state(common)

    def _upper(self, names: Iterable[str]) -> Params:
        """Return the present variables of these problems."""
        upper: Params = {}
        for name in names:
            upper.update(self.network.variables(name))
        return upper

    def _find_reads(self, problem: Problem) -> Reads:
        """Return what the problem reads, by a dry call on its first batch, or on one task's part of it."""
        batch = self._first_batch(problem)
        if not any(p.tasks is not None for p in self.graph.problems.values()):
            batch = self._shard(self.runners[problem.name], batch)
        level = self.graph.level_of[problem.name]
        below = self.graph.levels[level - 1] if level else []
        by_task = {p.name: p.tasks for p in below if p.tasks is not None}
        if problem.tasks is not None:
            return dry_reads(self.network, problem, first_task(problem, batch, problem.tasks))
        if not by_task:
            return dry_reads(self.network, problem, batch, self.in_place)
        try:
            reads = dry_reads(self.network, problem, first_task(problem, batch, max(by_task.values())))
        except Exception as error:
            try:
                reads = dry_reads(self.network, problem, batch)
            except Exception:
                raise error from None
            if reads.accessed & set(by_task):
                raise
            return reads
        return reads if reads.accessed & set(by_task) else dry_reads(self.network, problem, batch)

    # --- running levels ----------------------------------------------------------------------------------------------

    def _step_level(self, level: int, problems: Sequence[Problem], index: int, record: Record) -> None:
        """Take own step `index` of `problems`, all on `level`; the level below runs first and ends its window after."""
        for problem in problems:
            self._batches.pop(problem.name, None)
            self.runners[problem.name].index = index
        overtaken = self._overtaken(problems) if level > 0 else {}
        if level > 0 and self._run_level(level - 1, self.graph.levels[level - 1], record):
            for passed, left_behind in overtaken.items():
                self._run_level(passed, left_behind, record)
        gradients = [self._gradient(self.runners[p.name], record) for p in problems]
        for gradient in gradients:
            self._apply(gradient, record)
        if level > 0:
            taken = self._steps_above(level - 1)
            ended = [p for p in self.graph.levels[level - 1] if taken % p.every == 0]
            if len(ended) == len(self.graph.levels[level - 1]):
                ended += [p for left_behind in overtaken.values() for p in left_behind]
            for problem in ended:
                self.runners[problem.name].end_window()

    def _overtaken(self, problems: Sequence[Problem]) -> dict[int, list[Problem]]:
        """Return, by level from the highest, whom steps of the level below `problems` leave behind what these read."""
        names = {name for problem in problems for name in self._past[problem.name]}
        levels = sorted({self.graph.level_of[name] for name in names}, reverse=True)
        return {level: [p for p in self.graph.levels[level] if p.name in names] for level in levels}

    def _run_level(self, level: int, problems: Sequence[Problem], record: Record) -> bool:
        """Run the own steps of those of `problems`, on `level`, that are due; return whether there were any."""
        taken = self._steps_above(level)
        due = [p for p in problems if p.tasks is None and taken % p.every == 0]
        for problem in due:
            self.runners[problem.name].begin_window()
        if level == 0:  # nothing below: one problem after the other, so that one may begin where another ended
            for problem in due:
                for index in range(problem.steps):
                    self._step_level(level, [problem], index, record)
        else:
            for index in range(max((p.steps for p in due), default=0)):
                self._step_level(level, [p for p in due if index < p.steps], index, record)
        for problem in due:
            if count := _fresh(problem):
                runner = self.runners[problem.name]
                runner.fresh = [self._shard(runner, self._draw(runner, 0)) for _ in range(count)]
        return bool(due)

    def _steps_above(self, level: int) -> int:
        return max(self.runners[p.name].num_steps for p in self.graph.levels[level + 1])

    # --- batches -----------------------------------------------------------------------------------------------------

    def _draw(self, runner: Runner, index: int) -> Any:
        """Return the batch of the problem's own step `index`: from its data, or its part of the level above's batch."""
        if runner.source is not None:
            began = perf_counter()
            try:
                return runner.source.next()
            except DataError as error:
                level = self.graph.level_of[runner.name]
                raise DataError(f"{error} (level {level}, own step {index} of step {self.num_steps})") from error
            finally:
                self.seconds["data"] += perf_counter() - began
        return runner.problem.select_from(self._batch(self.parent(runner.problem)), index)

    def _shard(self, runner: Runner, batch: Any) -> Any:
        """Return this rank's part of a batch."""
        if self.ranks is None:
            return batch
        owner = runner
        while owner.source is None:
            owner = self.parent(owner.problem)
        if owner.problem.yields_shards:
            return batch
        return runner.problem.parts(batch, self.ranks.size)[self.ranks.rank]

    def _batch(self, runner: Runner) -> Any:
        """Return the batch of the problem's present step, drawn when first asked for."""
        if runner.name not in self._batches:
            self._batches[runner.name] = self._draw(runner, runner.index)
        return self._batches[runner.name]

    def _first_batch(self, problem: Problem) -> Any:
        runner = self.runners[problem.name]
        if runner.source is not None:
            return runner.source.peek()
        with untouched(self._device):  # it may draw
            return problem.select_from(self._first_batch(self.parent(problem).problem), 0)

    def parent(self, problem: Problem) -> Runner:
        """Return the problem of the level above whose batch this one shares: the first that reads it."""
        above = self.graph.levels[self.graph.level_of[problem.name] + 1]
        reader = next((p for p in above if problem.name in self.graph.reads[p.name].accessed), above[0])
        return self.runners[reader.name]

    # --- one problem's gradient --------------------------------------------------------------------------------------

    def _gradient(self, runner: Runner, record: Record) -> Gradient:
        """Return the gradient of the problem's loss at its present values, with the levels below responding."""
        batch = self._shard(runner, self._batch(runner))
        members = self._members[runner.name]
        tasks = {
            m.name: [self._shard(m, self._draw(m, k)) for k in [*range(m.problem.steps), *[0] * _fresh(m.problem)]]
            for m in members
        }
        with self._own_draws():
            if members:
                return self._task_gradient(runner, members, batch, tasks, record)
            return self._gradient_on(runner, batch, record)

    def _with_tasks(self, runner: Runner) -> list[Runner]:
        """Return the problems with tasks over which this one's gradient is averaged."""
        if not any(r.problem.tasks is not None for r in self._lower[runner.name]):
            return []
        below = self.graph.levels[self.graph.level_of[runner.name] - 1]
        accessed = self.graph.reads[runner.name].accessed
        return [self.runners[p.name] for p in below if p.tasks is not None and p.name in accessed]

    def _gradient_on(self, runner: Runner, batch: Any, record: Record) -> Gradient:
        """Return the gradient on this rank's part of the batch; where there are ranks, of all their parts."""
        lower = self._lower[runner.name]
        trajectories: dict[str, Trajectory] = {}
        for r in lower:
            past = {name: trajectories[name] for name in self._past[runner.name] if name in trajectories}
            trajectories[r.name] = r.trajectory(past)
        replays = any(not isinstance(r.problem.method, ResponseMethod) for r in lower)  # its loss is evaluated again
        random = random_state(runner.layout.device, anew=replays) if replays or runner.records_next() else None
        nested = runner.losses.nested
        runner.record(batch, random, {name: trajectories[name] for name in nested if name in trajectories})
        read = [r for r in lower if r.name in nested]
        began = perf_counter()
        signals = self.signals if self._is_top(runner) else None
        value, partials = runner.partials(batch, read, record, signals)
        self.seconds[f"{runner.name}.loss"] += perf_counter() - began
        direct = partials.pop(runner.name)
        grad: Params = {}
        codes: list[Tensor] = []
        residuals: dict[str, Tensor] = {}
        draws = replays or any(
            t.start is not None or any(s.random is not None for s in t.steps) for t in trajectories.values()
        )
        after = random_state(runner.layout.device) if draws else None
        done: set[str] = set()
        for r in lower:  # lowest first: what it pulls back adds to the cotangents of the levels between
            group = [self.runners[name] for name in self.graph.coupled(r.name) if name in trajectories]
            if r.name in done or not any(member.name in partials for member in group):
                continue
            done |= {member.name for member in group}
            pull = partial(self._pull, runner, trajectories, batch=batch, random=random, record=record)
            cotangents = {m.name: partials.pop(m.name, {}) for m in group}
            if len(group) > 1:
                cotangents = settle(group, cotangents, pull)
            for member in group:
                began = perf_counter()
                pulled = pull(member, cotangents[member.name])
                self.seconds[f"{member.name}.response"] += perf_counter() - began
                if not isinstance(member.problem.method, ResponseMethod):
                    direct = {}  # such a method returns the direct term as well, or replaces it
                for target, part in by_problem(pulled.grad).items():
                    if target == runner.name:
                        grad = add(grad, part)
                    elif target in trajectories and target not in cotangents:
                        partials[target] = add(partials.get(target, {}), part)
                if pulled.result is not None:
                    codes.append(pulled.result)
                if "residual_norm" in pulled.stats:
                    residuals[member.name] = pulled.stats["residual_norm"]
        restore_random_state(after)
        return Gradient(runner, value, add(direct, grad), codes, batch, bool(lower), residuals, (runner, *lower))

    def _task_gradient(
        self, runner: Runner, members: list[Runner], batch: Any, batches: dict[str, list[Any]], record: Record
    ) -> Gradient:
        """Return the gradient averaged over the tasks of the level below."""
        chunk = self._chunks.get(runner.name, members[0].problem.chunk)
        signals = self.signals if self._is_top(runner) else None
        outcome, chunk = run_tasks(self.network, runner, members, batch, batches, chunk, signals)
        self._chunks[runner.name] = chunk
        for member in members:
            member.num_steps += member.problem.steps
        record.put(runner.name, "loss", outcome["value"])
        for key, metric in outcome["metrics"].items():
            record.put(runner.name, key, metric)
        grad = by_problem(outcome["grad"]).get(runner.name, {})
        return Gradient(runner, outcome["value"], grad, [outcome["code"]], batch, True, {})

    def _is_top(self, runner: Runner) -> bool:
        """Return whether signals travel with this problem's gradient: one a step of the engine."""
        return runner.problem is self.graph.levels[-1][0]

    def _pull(
        self,
        top: Runner,
        trajectories: Mapping[str, Trajectory],
        runner: Runner,
        cotangent: Params,
        *,
        batch: Any,
        random: RandomState | None,
        record: Record,
    ) -> Pulled:
        """Return the cotangents of the problems that the solution of `runner` depends on, from one of its solution."""
        trajectory = trajectories[runner.name]
        method = runner.problem.method
        upper = self._upper(self.graph.targets(runner.name, top.name))
        if runner.name in self._to_replay:
            self._to_replay.remove(runner.name)
            check_replay(trajectory, upper, runner.name)
        if isinstance(method, Reptile):
            return Pulled(method.direction(trajectory, upper))
        if not isinstance(method, ResponseMethod):
            assert method is not None
            with replaying(random):
                warm = runner.warm.get(top.name)
                pulled: Pulled = method.total(top.losses.as_upper_loss(runner.name), trajectory, upper, batch, warm)
            check_pulled(method, pulled, upper, Total)
        else:
            pulled = method.vjp(trajectory, upper, ravel(runner, cotangent), runner.warm.get(top.name))
            check_pulled(method, pulled, upper)
        if pulled.state is not None:
            runner.warm[top.name] = pulled.state
        for key, stat in pulled.stats.items():
            record.put(runner.name, key, stat)
        return pulled

    # --- applying it -------------------------------------------------------------------------------------------------

    def _apply(self, gradient: Gradient, record: Record) -> None:
        """Step the problem's optimizer along its gradient, as the same step written by hand would."""
        runner = gradient.runner
        if not self.faults.admits(gradient, record):
            runner.leave_out()
            return
        began = perf_counter()
        runner.apply(gradient.grad, gradient.value, gradient.batch)
        self.seconds[f"{runner.name}.step"] += perf_counter() - began

    def _check_product(self, runner: Runner) -> None:
        """Compare a Hessian product with a finite difference where the problem's method needs second derivatives."""
        method = runner.problem.method
        reached = any(runner.name in self.graph.reaching(other) for other in self.graph.problems)
        if not runner.problem.responds or not reached or method is None or not method.second_order:
            return
        if runner.losses.nested or runner.problem.tasks is not None:
            return
        upper = self._upper(self.graph.depends(runner.name))
        lower = {key: p.detach() for key, p in runner.used.items()}
        batch = self._shard(runner, self._first_batch(runner.problem))
        who = f"problem {runner.name!r}"
        with self._own_draws():
            try:
                check(plain(runner.loss), lower, upper, batch, who, padding_rows(runner.problem))
            except ValueError as error:
                raise error if str(error).startswith(who) else ValueError(f"{who}: {error}") from error

    # --- saving and going on -----------------------------------------------------------------------------------------

    def state_dict(self, *, copied: bool = True) -> dict[str, Any]:
        """Return what is needed to go on: modules, optimizers, schedulers, data, warm starts, draws, counts, callbacks.

        Args:
            copied: False for the tensors that are in use, to be written to a file before the next step.

        Raises:
            ValueError: for data whose place cannot be found again, and in the middle of a step.
        """
        if not self.is_between_steps:
            raise ValueError(
                f"state_dict: step {self.num_steps} was not completed, so that the levels do not fit together. Save "
                "between steps; after an error, load an earlier state."
            )
        state = save_all(self.runners) | {
            "num_steps": self.num_steps,
            "rank_random": save_random(self._stream),
            "chunks": dict(self._chunks),
            "callbacks": {name: listener.state_dict() for name, listener in named(self.listeners).items()},
        }
        return copy.deepcopy(state) if copied else state

    def check_savable(self) -> None:
        """Raise a ValueError, naming the problem, for data whose place cannot be found again after a resume."""
        for runner in self.runners.values():
            if runner.source is not None:
                runner.source.check_resumable()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, the `state_dict()` of an engine over the same problems.

        Raises:
            ValueError: if the problems differ; nothing is changed then.
        """
        load_all(self.runners, state)
        self.num_steps, self._chunks = state["num_steps"], dict(state["chunks"])
        self._stream = load_random(state["rank_random"], self._device)
        self.listening = state["callbacks"]
        self.is_between_steps = True


def _fresh(problem: Problem) -> int:
    """Return how many batches of its own the problem's method draws after each run."""
    return 0 if problem.method is None else problem.method.num_fresh
