"""What an engine refuses when it is built: problems that do not fit together, or a method that does not fit its run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hypergrad._flat import Params, check_mode
from hypergrad._random import random_state, restore_random_state
from hypergrad._shards import held, held_params
from hypergrad._untouched import untouched
from hypergrad.averaged import plain
from hypergrad.composite import Composite
from hypergrad.methods import SOBA, AmIGO, Implicit, Method, Reptile, StocBiO
from hypergrad.methods._refusals import check_fixed_point
from hypergrad.network import Network
from hypergrad.problem import Problem, loss_value
from hypergrad.runner import Runner
from hypergrad.stationarity import Responding
from hypergrad.step import Step
from hypergrad.stepper import check_hyper, needs_closure, refused_closure
from hypergrad.tasks import first_task
from hypergrad.trajectory import Trajectory


def arrange(problems: Sequence[Problem | Sequence[Problem]]) -> list[list[Problem]]:
    """Return the problems as levels, checked against each other.

    Raises:
        ValueError: for anything but a list of problems or of lists of them, for a name or a parameter given twice.
    """
    check_mode()
    if isinstance(problems, Problem) or not isinstance(problems, Sequence):
        raise ValueError("Engine takes a list of problems, lowest level first: Engine([lower, upper]).")
    levels: list[list[Any]] = [list(entry) if isinstance(entry, (list, tuple)) else [entry] for entry in problems]
    if not levels or not all(levels):
        raise ValueError(
            "Engine: there is a level without a problem. Pass at least one problem a level, lowest level first."
        )
    seen: set[str] = set()
    owners: dict[int, str] = {}
    optimizers: dict[int, str] = {}
    for problem in (problem for level in levels for problem in level):
        if not isinstance(problem, Problem):
            raise ValueError(f"Engine takes hg.Problem objects, got {type(problem).__name__}.")
        if problem.name in seen:
            raise ValueError(f"two problems are named {problem.name!r}; losses could not tell them apart. Rename one.")
        seen.add(problem.name)
        _check_embeddings(problem)
        for key, parameter in problem.variables().items():
            if parameter.is_inference():
                raise ValueError(
                    f"problem {problem.name!r}: its parameter {key!r} was created in torch.inference_mode() and cannot "
                    "be trained. Build the module outside of it."
                )
            other = owners.setdefault(id(parameter), problem.name)
            if other != problem.name:
                raise ValueError(
                    f"parameter {key!r} is optimized by both {other!r} and {problem.name!r}. Give it to one of the two "
                    "optimizers; the other problem may still read it."
                )
        if optimizers.setdefault(id(problem.optimizer), problem.name) != problem.name:
            raise ValueError(
                f"problem {problem.name!r} shares its optimizer with {optimizers[id(problem.optimizer)]!r}."
            )
    every = [problem for level in levels for problem in level]
    for problem in every:
        if problem.loss_scale is not None and any(other.tasks is not None for other in every):
            raise ValueError(
                f"problem {problem.name!r}: loss_scale={problem.loss_scale} is not served in a graph with tasks=, "
                "whose losses are evaluated as functional copies. Use bfloat16, and leave loss_scale None."
            )
    for problem in (problem for level in levels[1:] for problem in level):
        if needs_closure(problem.optimizer):
            raise ValueError(refused_closure(problem))
    return levels


def _check_embeddings(problem: Problem) -> None:
    """Raise a ValueError for embeddings that rescale rows in place or are sparse, where others differentiate."""
    if problem.method is None or not problem.responds:
        return
    for name, module in problem.module.named_modules():
        if not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            continue
        if module.sparse:
            raise ValueError(
                f"problem {problem.name!r}: its module {name or type(module).__name__!r} has sparse=True, and no "
                "method differentiates sparse gradients. Leave sparse False."
            )
        if module.max_norm is not None:
            raise ValueError(
                f"problem {problem.name!r}: its module {name or type(module).__name__!r} has "
                f"max_norm={module.max_norm}, which rescales rows of its weight in place whenever it is called: the "
                "loss is then no function of the parameters that could be differentiated. Leave max_norm None, and "
                "rescale the rows in forward, or after each step by Problem(project=...)."
            )


def check_runner(runner: Runner, upper: Params) -> None:
    """Raise a ValueError for what this problem's functions, optimizer and method could not serve in mid-run.

    Args:
        runner: of the problem, prepared.
        upper: the variables that its solution depends on.
    """
    problem = runner.problem
    _check_micro_batches(runner)
    _check_hooks(runner)
    with untouched(runner.layout.device), torch.no_grad():
        if runner.start is not None:
            runner.start.values({})
            runner.start.check_nothing_lost()
        values = {name: runner.hyper_value(name) for name in problem.hyper}
    if problem.tasks is None:
        check_hyper(problem.optimizer, values, problem.name)
    if not runner.opaque:
        runner.bound.check_hyper(problem.hyper)
    if problem.project is not None:
        runner.check_project()
    if problem.method is not None and upper and problem.responds:
        _check_method(runner, problem.method, upper)


def _check_hooks(runner: Runner) -> None:
    """Raise a ValueError for hooks on parameters that no step here would call, or no derivative."""
    name, by = runner.name, _derives(runner)
    for key, parameter in runner.variables.items():
        if runner.in_place is None and getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"problem {name!r}: {key!r} has a hook for accumulated gradients, and an engine accumulates none: it "
                "would never be called. Use clip_norm, clip_value or project, or a hook of the optimizer."
            )
        hooks = getattr(parameter, "_backward_hooks", None) or {}
        if by is not None and any(
            map(partial(_changes, torch.full_like(held(parameter).detach(), 1e3)), hooks.values())
        ):
            raise ValueError(
                f"problem {name!r}: {key!r} has a hook that changes its gradient, which {by} would not see as a whole. "
                "Change the loss instead: multiply the parameter by its mask, say; or use clip_norm, clip_value or "
                "project."
            )


def _derives(runner: Runner) -> str | None:
    """Return which method differentiates the problem's run, or makes a part of its gradient; None if none does."""
    below = [
        runner.graph.problems[other] for other in runner.graph.problems if runner.name in runner.graph.depends(other)
    ]
    for problem in (runner.problem, *below):
        if problem.method is not None and problem.responds and not isinstance(problem.method, Reptile):
            return type(problem.method).__name__
    return None


def _changes(gradient: Tensor, hook: Callable[[Tensor], Tensor | None]) -> bool:
    """Return whether `hook` returns another gradient than it is given; one that only looks on does not."""
    changed = hook(gradient.clone())
    return changed is not None and not torch.equal(changed, gradient)


def padding_rows(problem: Problem) -> Params:
    """Return marks on the rows of embeddings for padding, by the parameters' names: look-ups give them no gradient."""
    marks: Params = {}
    for path, module in problem.module.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.padding_idx is not None:
            mark = torch.zeros_like(module.weight, dtype=torch.bool)
            mark[module.padding_idx] = True
            marks[f"{path}.weight" if path else "weight"] = mark
    return marks


def goes_back(runner: Runner) -> bool:
    """Return whether the problem's method differentiates the steps of its run, of which there is a record."""
    method = runner.problem.method
    through = method is not None and method.num_batches is None and method.differentiates_optimizer
    return through and runner.problem.responds and runner.problem.tasks is None


def check_task_buffers(
    network: Network,
    reader: Problem,
    first_batch: Callable[[Problem], Any],
    members: Sequence[Runner],
) -> None:
    """Raise a ValueError if what a task's steps write into buffers is read: all begin with the module's own.

    Args:
        network: evaluates losses.
        reader: the problem that reads the tasks.
        first_batch: returns a problem's first batch.
        members: the problems with tasks that it reads.
    """
    for member in members:
        count, left = member.problem.tasks or 1, Params()
        for problem in (member.problem, reader):
            loss = partial(_loss_on, problem, first_task(problem, first_batch(problem), count))
            with untouched(member.layout.device):
                random = random_state(member.layout.device)
                before = network.observe(loss, {})
                left = left or {key: b for key, b in before.written.items() if key.startswith(f"{member.name}.")}
                if not left:
                    break
                restore_random_state(random)
                after = network.observe(loss, left)
            if not torch.allclose(before.value, after.value, rtol=1e-4, atol=1e-6, equal_nan=True):
                raise ValueError(
                    f"problem {member.name!r}: a task's steps write the buffers {list(left)}, and the loss of "
                    f"{problem.name!r} reads them; but with tasks={count} each evaluation begins with the module's. "
                    "Normalize by the batch's statistics in both losses (train mode), use GroupNorm or LayerNorm, or "
                    "hand what changes from step to step through the batch."
                )


def _loss_on(problem: Problem, batch: Any, models: Any) -> Tensor:
    return loss_value(problem.loss, models, batch, problem.name)[0]


def _check_micro_batches(runner: Runner) -> None:
    """Raise a ValueError if a problem that reads tasks asks for micro-batches: its batches lead with tasks."""
    read = runner.graph.reads[runner.name].accessed
    by_task = [name for name, p in runner.graph.problems.items() if name in read and p.tasks is not None]
    if runner.problem.micro_batches > 1 and by_task:
        raise ValueError(
            f"problem {runner.name!r}: micro_batches={runner.problem.micro_batches} cuts batches of samples, and it is "
            f"evaluated task by task, for it reads {by_task[0]!r}, which has tasks. Bound the memory with chunk= there."
        )


def _check_method(runner: Runner, method: Method, upper: Params) -> None:
    """Raise a ValueError if the run this problem will make is one that its method does not describe."""
    name, problem = runner.name, runner.problem
    _check_batches(runner, method)
    if isinstance(method, (Implicit, SOBA, StocBiO, AmIGO)):
        _check_moves(runner, method)
    if isinstance(method, Implicit):
        _check_implicit(runner, method)
    if method.fixed_point is not None:
        step = Step(recipe=runner.recipe(runner.bound), batch=None, index=0, random=None)
        with untouched(runner.layout.device):
            try:
                check_fixed_point(method, _run_of(runner, (step,) * problem.steps), upper, decoupled=method.fixed_point)
            except ValueError as error:
                raise ValueError(f"problem {name!r}: {error}") from error


def _check_moves(runner: Runner, method: Method) -> None:
    """Raise a ValueError if some of what the method takes as solved for rests, its learning rate being 0."""
    problem, names = runner.problem, {id(p): key for key, p in runner.used.items()}
    over = getattr(method, "over", None)
    still: list[str] = []
    for group in problem.optimizer.param_groups:
        if isinstance(lr := group.get("lr"), float | int) and lr == 0:
            still += [names[id(p)] for p in group["params"] if id(p) in names]
    solved = [key for key in still if over is None or key.startswith(tuple(over))]
    if solved and len(still) < len(names) and not problem.schedulers() and "lr" not in problem.hyper:
        raise ValueError(
            f"problem {problem.name!r}: the learning rate of {solved} is 0, and {type(method).__name__} takes all that "
            "the optimizer holds as solved for. Build the optimizer without them, or say what moves, "
            "hg.Implicit(solver, over=[...])."
        )


def _run_of(runner: Runner, steps: tuple[Step, ...]) -> Trajectory:
    flat = runner.layout.ravel(held_params(runner.used))
    return Trajectory(layout=runner.layout, end_flat=flat, names=tuple(runner.used), loss=runner.loss, steps=steps)


def _check_batches(runner: Runner, method: Method) -> None:
    """Raise a ValueError if the method asks for batches that the problem's run does not have."""
    problem, kind = runner.problem, type(method).__name__
    if method.num_batches is not None and method.num_batches > problem.steps:
        raise ValueError(
            f"problem {runner.name!r}: {kind}(batches={method.num_batches}) reads the run's last batches, and the run "
            f"takes steps={problem.steps}. Lower batches, take more steps, or draw new ones with fresh=True."
        )
    if method.num_fresh and problem.data is None:
        raise ValueError(
            f"problem {runner.name!r}: {kind}(fresh=True) draws batches of its own, and the problem has no data. Give "
            "it data=, or leave fresh=False."
        )


def _check_implicit(runner: Runner, method: Implicit) -> None:
    name = runner.name
    loss: Any = plain(runner.response or runner.loss)
    if method.curvature == "gauss_newton" and not isinstance(loss, Composite):
        nested = f"; with levels below ({runner.losses.nested}) its structure is lost" if runner.losses.nested else ""
        raise ValueError(
            f"problem {name!r}: curvature='gauss_newton' needs hg.Composite(outputs, criterion, penalty=None) as the "
            f"loss, to tell the model from the criterion{nested}. Wrap it, or use curvature='hessian'."
        )
    if method.over is not None:
        try:
            Responding.of(_run_of(runner, ()), method.over)
        except ValueError as error:
            raise ValueError(f"problem {name!r}: {error}") from error
