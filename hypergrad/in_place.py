"""Losses of sharded modules: evaluated on the modules as they stand, their gradients by `backward()`.

`fully_shard` gathers a module's parameters around its forward and hands each process its part of the gradient, averaged
over all of them, while `backward()` runs. There is no functional call of such a module, and no second derivative. What
first-order methods need can be had all the same: other values are put into the shards, the loss is evaluated and
differentiated at once, and values and `.grad` are put back, bit for bit. To a method it looks like any other loss.
Vectors hold one process's part; `Layout.sum` adds up what is a sum over all parts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hypergrad._flat import Params
from hypergrad._shards import held, is_shard, reshard
from hypergrad.distributed.ranks import Ranks
from hypergrad.methods import SAMA
from hypergrad.network import own
from hypergrad.problem import Problem

T = TypeVar("T")


class InPlace:
    """The modules of all problems, to be evaluated where they stand."""

    def __init__(self, problems: Sequence[Problem], ranks: Ranks) -> None:
        """Hold the problems' variables; `ranks` are the processes that the shards lie on."""
        self.ranks = ranks
        self._modules = {module for p in problems for module in p.module.modules()}
        reshard(self._modules)
        self._parameters: dict[str, nn.Parameter] = {}
        for problem in problems:
            self._parameters.update({f"{problem.name}.{key}": p for key, p in problem.variables().items()})
        shards: list[Any] = [p for p in self._parameters.values() if is_shard(p)]
        self.mesh = shards[0].device_mesh
        if any(p.device_mesh != self.mesh for p in shards):
            raise ValueError(
                "Engine: its sharded modules lie on several device meshes. Make one, init_device_mesh(device, (n,)), "
                "and pass it to every fully_shard(module, mesh=mesh)."
            )
        self._all = {id(p): p for problem in problems for p in problem.module.parameters()}.values()

    def is_shard(self, name: str) -> bool:
        """Return whether the variable "problem.parameter" is sharded, so that its gradient comes averaged."""
        return is_shard(self._parameters[name])

    def gradients(self, evaluate: Callable[[], tuple[Tensor, T]], values: Params, who: str) -> tuple[Tensor, T, Params]:
        """Return a loss, what came with it, and the gradients of all variables that it depends on.

        Gradients of shards are means over the ranks; the loss and all other gradients are this rank's.

        Args:
            evaluate: returns the loss, computed from the modules.
            values: of variables, "problem.parameter", this process's part of each, while it runs.
            who: the problem, for messages.
        """
        with self._holding(values), torch.enable_grad():
            value, rest = _explained(evaluate, who)
            if not value.requires_grad:
                raise ValueError(
                    f"problem {who!r}: its loss carries no gradient; do not detach it or compute it under no_grad."
                )
            value.backward()  # type: ignore[no-untyped-call]
            grads = {name: held(p.grad) for name, p in self._parameters.items() if p.grad is not None}
        return value.detach(), rest, grads

    @contextlib.contextmanager
    def _holding(self, values: Params) -> Iterator[None]:
        """Run the body with `values` in the place of variables and without any `.grad`, then put all back."""
        reshard(self._modules)
        kept: list[tuple[Tensor, Tensor]] = []
        grads = [(p, p.grad) for p in self._all]
        try:
            for name, value in values.items():
                here = held(self._parameters[name])
                if here.numel() and here.data_ptr() != value.data_ptr():
                    kept.append((here, here.clone()))
                    here.copy_(value.detach())
            for p, _ in grads:
                p.grad = None
            yield
        finally:
            reshard(self._modules)  # whole parameters made of these values must not outlive them
            for p, grad in grads:
                p.grad = grad
            for here, found in kept:
                here.copy_(found)


def _explained(evaluate: Callable[[], tuple[Tensor, T]], who: str) -> tuple[Tensor, T]:
    """Return what `evaluate` does, with an error of ours where a loss reads a shard as if it were the whole."""
    mixed = (
        f"problem {who!r}: its loss reads a sharded parameter outside its module's forward. Compute that there, or "
        "make a plain number of what is a sum over all entries: models.net.weight.square().sum().full_tensor()."
    )
    try:
        value, rest = evaluate()
    except RuntimeError as error:
        if "mixed torch.Tensor and DTensor" in str(error):
            raise ValueError(mixed) from error
        raise
    if is_shard(value):
        raise ValueError(mixed)
    return value, rest


@dataclass(frozen=True)
class ShardedLoss:
    r"""A loss (lower, upper, batch) -> scalar of sharded modules; parameters are this process's parts.

    It is the mean over ranks and micro-batches, as `Averaged` is, and can be differentiated once: its gradients are
    computed with it.

    Cost: one forward and one backward pass through all that the loss reads, whatever is asked of it afterwards.

    Args:
        site: the modules.
        name: whose parameters `lower` are.
        reader: whose loss it is.
        evaluate: (part of a batch, constants) -> the loss of the modules as they stand, a scalar.
        parts: batch -> its micro-batches.
        unwrap: batch -> the batch itself, and the values of other variables that go with it.
    """

    site: InPlace
    name: str
    reader: str
    evaluate: Callable[[Any], Tensor]
    parts: Callable[[Any], Sequence[Any]]
    unwrap: Callable[[Any], tuple[Any, Params]]

    def __call__(self, lower: Params, upper: Params, batch: Any) -> Tensor:
        """Return the loss, the same on every rank."""
        batch, constants = self.unwrap(batch)
        values = constants | own(self.name, lower) | upper
        value: Tensor = _Evaluated.apply(self, batch, tuple(values), *values.values())  # type: ignore[no-untyped-call]
        return value

    def _evaluated(self, part: Any) -> tuple[Tensor, None]:
        return self.evaluate(part), None

    def value_and_gradients(self, values: Params, batch: Any) -> tuple[Tensor, Params]:
        """Return the loss and its gradients in those of `values` that it depends on."""
        parts = self.parts(batch)
        total, found = torch.zeros(()), dict[str, Tensor]()
        with self.site.ranks.active():
            for k, part in enumerate(parts):
                value, _, grads = self.site.gradients(partial(self._evaluated, part), values, self.reader)
                total = value if k == 0 else total + value
                for name, g in grads.items():
                    found[name] = found[name] + g if name in found else g
        if len(parts) > 1:
            total, found = total / len(parts), {name: g / len(parts) for name, g in found.items()}
        plain = {name: v for name, v in values.items() if not self.site.is_shard(name)}
        local = {name: g for name, g in found.items() if name in plain}
        means, (mean,) = self.site.ranks.average_params(local, plain, [total])
        return mean, {name: g for name, g in found.items() if name in values and name not in plain} | means


class _Evaluated(torch.autograd.Function):
    """A loss whose gradients were taken when it was evaluated."""

    @staticmethod
    def forward(ctx: Any, loss: ShardedLoss, batch: Any, names: tuple[str, ...], *tensors: Tensor) -> Tensor:
        value, grads = loss.value_and_gradients(dict(zip(names, tensors, strict=True)), batch)
        ctx.save_for_backward(*(grads.get(name) for name in names))
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (bar,) = cotangents
        return (None, None, None, *(None if g is None else bar.to(g.dtype) * g for g in ctx.saved_tensors))


def in_place(problems: Sequence[Problem], ranks: Ranks | None) -> InPlace | None:
    """Return where losses are evaluated if any problem is sharded, else None.

    Raises:
        ValueError: naming the problem, for shards or options that cannot be served.
    """
    sharded = {p.name: _mesh(p) for p in problems}
    if not any(sharded.values()):
        return None
    for problem in problems:
        if problem.loss_scale is not None:
            raise ValueError(
                f"problem {problem.name!r}: loss_scale={problem.loss_scale} is not served where modules are sharded by "
                "fully_shard: their losses are evaluated in place. Use bfloat16, and leave loss_scale None."
            )
        members = sharded[problem.name]
        if members is not None:
            if ranks is None or members != _members(ranks):
                own = "this process alone" if ranks is None else f"the ranks {_members(ranks)}"
                raise ValueError(
                    f"problem {problem.name!r} is sharded over the ranks {members}, and the engine trains on {own}. "
                    "Build it as Engine(..., distributed=True), and shard over all of its processes."
                )
            _check_options(problem)
        _check_method(problem, [name for name, over in sharded.items() if over])
    assert ranks is not None
    return InPlace(problems, ranks)


def _mesh(problem: Problem) -> list[int] | None:
    """Return the ranks that the problem's parameters are sharded over, None where they are not."""
    reshard(problem.module.modules())
    parameters = dict(problem.module.named_parameters())
    shards: dict[str, Any] = {key: p for key, p in parameters.items() if is_shard(p)}
    if not shards:
        return None
    first, whole = next(iter(shards)), [key for key in problem.variables() if key not in shards]
    if whole:
        raise ValueError(
            f"problem {problem.name!r}: {first!r} is a shard (of fully_shard) and {whole[0]!r} is not. Shard all "
            "parameters that its optimizer holds, fully_shard(module), or none."
        )
    for key, p in shards.items():
        if p.device_mesh.ndim != 1 or not p.placements[0].is_shard():
            raise ValueError(
                f"problem {problem.name!r}: {key!r} is placed as {p.placements} on a mesh of {p.device_mesh.ndim} "
                "dimensions; one dimension that shards is served. Call fully_shard(module) without a mesh, or with "
                "init_device_mesh(device, (size,))."
            )
    return dist.get_process_group_ranks(shards[first].device_mesh.get_group())


def _members(ranks: Ranks) -> list[int]:
    return dist.get_process_group_ranks(dist.group.WORLD if ranks.group is None else ranks.group)


def _check_options(problem: Problem) -> None:
    """Raise a ValueError for options of a sharded problem that would see a part where they need the whole."""
    clipped = isinstance(problem.method, SAMA) and problem.clip_norm is not None
    for option, given, instead in (
        ("project", problem.project is not None, "Keep that module's parameters whole, or project in its forward."),
        ("hyper", bool(problem.hyper), "Keep that module's parameters whole, or set the options by a scheduler."),
        ("clip_norm with hg.SAMA", clipped, "Use clip_value=, or hg.FiniteDifference."),
        ("tasks", problem.tasks is not None, "Keep the modules of problems with tasks whole."),
    ):
        if given:
            raise ValueError(
                f"problem {problem.name!r} is sharded, and {option} would see one process's part of its parameters as "
                f"if it were all of them. {instead}"
            )


def _check_method(problem: Problem, sharded: Sequence[str]) -> None:
    method = problem.method
    if problem.tasks is not None:
        raise ValueError(
            f"problem {problem.name!r} has tasks, which are functional copies of a module, and {list(sharded)} are "
            "sharded, so that losses are evaluated in place. Keep all parameters of this engine whole."
        )
    if method is not None and problem.responds and not method.serves_shards:
        raise ValueError(
            f"problem {problem.name!r}: {type(method).__name__} needs a functional evaluation of the loss, or its "
            f"second derivative, and {list(sharded)} are sharded by fully_shard (FSDP2), which has neither: its "
            "gradients come out of backward() alone, without a graph. Use hg.FiniteDifference, hg.SAMA, hg.Penalty, "
            "hg.Unrolled(truncate=0) (first-order MAML) or hg.Reptile; or keep whole parameters on every rank, "
            "Engine(distributed=True), and save memory by micro_batches= or hg.Unrolled(checkpoint='sqrt')."
        )


def check_levels(graph_below: Callable[[str], list[str]], problems: Sequence[Problem]) -> None:
    """Raise a ValueError for a sharded engine in which a level that responds has one below that responds in it."""
    for problem in problems:
        nested = graph_below(problem.name)
        if nested and problem.method is not None and problem.responds:
            raise ValueError(
                f"problem {problem.name!r} is differentiated through and has {nested} below it, whose response would "
                "be part of its own loss: that is evaluated in place here, for some modules are sharded by "
                "fully_shard, and holds the levels below still. Use two levels, or keep all parameters whole."
            )
