"""One optimization problem of a graph: name, module, loss, optimizer, data, and how others differentiate it."""

from __future__ import annotations

import keyword
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, DistributedSampler

from hypergrad._flat import Params
from hypergrad._functional import arity, check_signature
from hypergrad.averaged import Split, split
from hypergrad.composite import Composite
from hypergrad.loss_scale import DynamicScale, check_problem_scale
from hypergrad.methods import ForwardUnrolled, Implicit, Method, Reptile, Unrolled
from hypergrad.step import takes_step

After = Literal["continue", "rollback", "restart"]
ModelLoss = Callable[[Any, Any], Any]
"""A loss of a problem: (models, batch) -> scalar, or (scalar, dict of metrics)."""

_ARGUMENTS = {
    "loss": "models, batch",
    "response": "models, batch",
    "start": "models",
    "project": "params",
    "select": "batch, step",
    "split": "batch, count",
}
"""What an engine calls a problem's functions with."""

_RESERVED = frozenset(dir(nn.Module())) | {"models", "problem"}


@dataclass(frozen=True, eq=False)
class Problem:
    """A level's problem: minimize `loss` over the parameters that `optimizer` holds.

    The module, the optimizer and the scheduler stay the user's: the engine trains them in place, as the same steps
    written by hand would. The problem's variables are the parameters in the optimizer that require grad; all others of
    the module are constants.

    Args:
        name: how losses read it, `models.<name>`; an identifier that `nn.Module` does not use.
        module: any `nn.Module`.
        loss: (models, batch) -> scalar, or (scalar, dict of metrics), or a `Composite` of such functions.
            `models.<name>` behaves as the named problem's module.
        optimizer: any `torch.optim.Optimizer` over parameters of `module`. Methods that differentiate the run need one
            that `hypergrad.optim.from_torch` knows.
        data: any iterable of batches, run again when it ends; None for the batch of the level above.
        steps: own steps taken each time the level runs.
        every: the level runs before every n-th step of the level above.
        method: how the levels above differentiate through this problem's solution. Not needed where nobody does.
        after: what happens once the level above has stepped: go on ("continue"), return to where the window began
            ("rollback": parameters, optimizer state and buffers), or begin anew ("restart": at `start`, or at the
            parameters of the time the engine was built, with fresh optimizer state). Default: "restart" with a `start`,
            else "continue".
        clip_norm, clip_value: bounds on the gradient of each step.
        scheduler: a learning-rate scheduler, or several, stepped after each step of the optimizer. With `tasks` the
            learning rates of each run are those from where it stands, and it stays there.
        project: (params) -> params, applied after each step (simplex, box).
        start: (models) -> dict keyed like the module's parameters, at which the level begins each time it restarts;
            hypergradients flow through it.
        response: a loss used instead of `loss` in the implicit system, curvature and mixed partial alike.
        hyper: optimizer hyperparameters as functions of upper problems, `{"lr": lambda models: ...}`.
        detach: others read this problem as a constant.
        select: (batch, step) -> batch, picks this problem's part of the batch of the level above.
        tasks: number of independent copies; batch leaves lead with it, the reader's loss runs per task and is averaged.
        chunk: tasks at a time under one vmap (1 is a loop); None measures once which is faster.
        reads: names of the problems that the loss reads, instead of finding out by a dry call.
        micro_batches: into how many parts each batch is cut; gradients and products are averaged over them, one part
            in memory at a time. Equal to the full batch for losses that are means over samples.
        split: (batch, count) -> parts of equal size, for micro-batches and for ranks; None cuts every tensor of the
            batch along its first dimension.
        sharded: under a data-parallel engine, `data` yields this rank's own part of each batch, which is then not cut.
            A `DataLoader` with a `DistributedSampler` is recognised.
        loss_scale: what derivatives of the loss are multiplied by inside it and divided by outside, for float16 under
            `torch.autocast` (see `ScaledLoss`): a number, `DynamicScale()` for one that is lowered when gradients
            overflow, such steps being left out, and raised again; None for none.

    Raises:
        ValueError: for every option out of range, naming the problem and the option.
    """

    name: str
    _: KW_ONLY
    module: nn.Module
    loss: ModelLoss | Composite
    optimizer: torch.optim.Optimizer
    data: Iterable[Any] | None = None
    steps: int = 1
    every: int = 1
    method: Method | None = None
    after: After | None = None
    clip_norm: float | None = None
    clip_value: float | None = None
    scheduler: LRScheduler | Sequence[LRScheduler] | None = None
    project: Callable[[Params], Mapping[str, Tensor]] | None = None
    start: Callable[[Any], Mapping[str, Tensor]] | None = None
    response: ModelLoss | Composite | None = None
    hyper: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    detach: bool = False
    select: Callable[[Any, int], Any] | None = None
    tasks: int | None = None
    chunk: int | None = None
    reads: Sequence[str] | None = None
    micro_batches: int = 1
    split: Split | None = None
    sharded: bool = False
    loss_scale: float | DynamicScale | None = None

    def __post_init__(self) -> None:
        """Validate everything that can be told from this problem alone."""
        if not isinstance(self.name, str) or not self.name.isidentifier() or keyword.iskeyword(self.name):
            raise ValueError(
                f"a problem's name must be an identifier, got {self.name!r}: losses read it as models.<name>."
            )
        if self.name in _RESERVED or self.name.startswith("_"):
            raise ValueError(f"the problem name {self.name!r} is reserved: nn.Module uses it. Choose another.")
        self._check(isinstance(self.module, nn.Module), "module", self.module, "an nn.Module")
        self._check(callable(self.loss), "loss", self.loss, "a function (models, batch) -> scalar")
        self._check(
            isinstance(self.optimizer, torch.optim.Optimizer), "optimizer", self.optimizer, "a torch.optim.Optimizer"
        )
        for option in ("steps", "every", "micro_batches"):
            value = getattr(self, option)
            self._check(isinstance(value, int) and value >= 1, option, value, "an int >= 1")
        for option in ("tasks", "chunk"):
            value = getattr(self, option)
            self._check(value is None or (isinstance(value, int) and value >= 1), option, value, "None or an int >= 1")
        for option in ("clip_norm", "clip_value"):
            value = getattr(self, option)
            self._check(value is None or value > 0, option, value, "None or > 0")
        self._check_method()
        self._check(
            self.after in (None, "continue", "rollback", "restart"),
            "after",
            self.after,
            "'continue', 'rollback' or 'restart'",
        )
        functions = isinstance(self.hyper, Mapping) and all(callable(function) for function in self.hyper.values())
        self._check(functions, "hyper", self.hyper, "a dict of functions of models")
        for option in ("project", "start", "select", "response", "split"):
            value = getattr(self, option)
            self._check(value is None or callable(value), option, value, "None or a function")
        named = not isinstance(self.reads, str) and isinstance(self.reads, (Sequence, type(None)))
        self._check(named, "reads", self.reads, "None or a list of problems' names")
        self._check_signatures()
        if self.loss_scale is not None:
            check_problem_scale(self.loss_scale, f"problem {self.name!r}: loss_scale")
        self._check_schedulers()
        self._check_data()
        self._check_combinations()
        self.variables()

    def _check(self, holds: bool, option: str, value: Any, expected: str) -> None:
        if not holds:
            raise ValueError(f"problem {self.name!r}: {option} must be {expected}, got {value!r}.")

    def _check_method(self) -> None:
        given: object = self.method
        if given is None or isinstance(given, Method):
            return
        found = given.__name__ if isinstance(given, type) else repr(given)
        hint = "Wrap a solver: hg.Implicit(hg.CG(10))."
        if isinstance(given, type):
            hint = f"Create an instance: {found}(...)."
        raise ValueError(f"problem {self.name!r}: method must be a hypergradient method, got {found}. {hint}")

    def _check_signatures(self) -> None:
        """Raise a ValueError that names the first function that cannot be called with what an engine gives it."""
        for option, expected in _ARGUMENTS.items():
            function = getattr(self, option)
            if function is not None and not isinstance(function, Composite):
                check_signature(function, expected, f"problem {self.name!r}: {option}")
        for option, function in self.hyper.items():
            if takes_step(function):
                raise ValueError(
                    f"problem {self.name!r}: hyper[{option!r}] takes the step's index, which an engine does not give. "
                    "Write it as a function of models alone, or use hg.descend(hyper=...)."
                )
            check_signature(function, "models", f"problem {self.name!r}: hyper[{option!r}]")

    def _check_schedulers(self) -> None:
        for scheduler in self.schedulers():
            expected = "an lr_scheduler of torch.optim, or a list of them"
            self._check(isinstance(scheduler, LRScheduler), "scheduler", self.scheduler, expected)
            if scheduler.optimizer is not self.optimizer:
                raise ValueError(
                    f"problem {self.name!r}: scheduler {type(scheduler).__name__} belongs to another optimizer. "
                    "Build it from the problem's own."
                )

    def _check_data(self) -> None:
        if self.data is None:
            return
        if isinstance(self.data, Mapping) or not isinstance(self.data, Iterable):
            raise ValueError(
                f"problem {self.name!r}: data must be an iterable of batches, got {type(self.data).__name__}. For one "
                "batch used at every step, pass [batch]."
            )
        if isinstance(self.data, Iterator):
            raise ValueError(
                f"problem {self.name!r}: data is a one-shot iterator, which cannot be run again when it ends. Pass the "
                "DataLoader or list itself, or an object whose __iter__ begins anew."
            )

    def _check_combinations(self) -> None:
        if self.loss_scale is not None and any(isinstance(loss, Composite) for loss in (self.loss, self.response)):
            raise ValueError(
                f"problem {self.name!r}: loss_scale={self.loss_scale} does not reach the parts of a Composite, which "
                "are differentiated one by one. Give the loss as one function, or leave loss_scale None."
            )
        if self.loss_scale is not None and isinstance(self.method, (Implicit, Unrolled)) and self.method.compile:
            raise ValueError(
                f"problem {self.name!r}: {type(self.method).__name__}(compile=...) does not take a scaled loss, and "
                f"loss_scale={self.loss_scale}. Use compile=False, or bfloat16 without a scale."
            )
        if self.micro_batches > 1 and self.tasks is not None:
            raise ValueError(
                f"problem {self.name!r}: micro_batches={self.micro_batches} cuts batches of samples, and with "
                f"tasks={self.tasks} a batch leads with tasks. Bound the memory with chunk= instead."
            )
        if self.chunk is not None and self.tasks is None:
            raise ValueError(f"problem {self.name!r}: chunk={self.chunk} applies to tasks, and tasks is None.")
        if self.select is not None and self.data is not None:
            raise ValueError(
                f"problem {self.name!r}: select picks from the batch of the level above, but the problem has data of "
                "its own. Leave one of them out."
            )
        if self.tasks is not None and self.after in ("continue", "rollback"):
            raise ValueError(
                f"problem {self.name!r}: the copies of tasks={self.tasks} are discarded after each step of the level "
                f"above, so after={self.after!r} cannot be honoured. Leave it None."
            )
        if self.tasks is not None and self.every > 1:
            raise ValueError(
                f"problem {self.name!r}: the copies of tasks={self.tasks} are run anew for each step of the level "
                f"above, so every={self.every} cannot be honoured. Leave it 1."
            )
        if isinstance(self.method, (Unrolled, ForwardUnrolled)) and self.every > 1:
            raise ValueError(
                f"problem {self.name!r}: every={self.every} lets the upper parameters move on while the run stays, so "
                f"{type(self.method).__name__} would differentiate a run made with other upper parameters. Use "
                "every=1, or hg.Implicit."
            )
        if isinstance(self.method, (Unrolled, ForwardUnrolled, Reptile)) and self.response is not None:
            raise ValueError(
                f"problem {self.name!r}: response replaces the loss in an implicit system, and "
                f"{type(self.method).__name__} differentiates the run itself. Use hg.Implicit, or leave response out."
            )
        if isinstance(self.method, Reptile) and self.start is None:
            raise ValueError(
                f"problem {self.name!r}: Reptile moves the level above towards the run's end; give start=."
            )
        if isinstance(self.method, Unrolled) and self.method.truncate == 0 and self.start is None:
            raise ValueError(
                f"problem {self.name!r}: Unrolled(truncate=0) differentiates no step, and without start= nothing else "
                "depends on the level above. Give start= (first-order MAML) or truncate at least one step."
            )

    @property
    def restarts(self) -> bool:
        """Return whether the level begins anew after each window."""
        return self.after == "restart" or (self.after is None and self.start is not None) or self.tasks is not None

    @property
    def responds(self) -> bool:
        """Return whether others may differentiate through this problem's solution."""
        return not self.detach

    def variables(self) -> dict[str, nn.Parameter]:
        """Return the parameters that this problem optimizes, by their names in the module.

        Raises:
            ValueError: if the optimizer holds a parameter that the module does not, or none that requires grad, or if
                the module has parameters or buffers without a shape yet (`nn.LazyLinear`).
        """
        tensors = chain(self.module.named_parameters(), self.module.named_buffers())
        lazy = [name for name, tensor in tensors if is_lazy(tensor)]
        if lazy:
            raise ValueError(
                f"problem {self.name!r}: {lazy} of its module are lazy and have no shape yet. Run the module once on a "
                "batch, and build its optimizer, before the Problem."
            )
        names = {id(p): name for name, p in self.module.named_parameters()}
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        foreign = [tuple(p.shape) for p in held if id(p) not in names]
        if foreign:
            raise ValueError(
                f"problem {self.name!r}: the optimizer holds parameters that are not in the module, of shapes "
                f"{foreign}. Build it from this module's parameters: optimizer(module.parameters(), ...)."
            )
        variables = {names[id(p)]: p for p in held if p.requires_grad}
        if not variables:
            raise ValueError(
                f"problem {self.name!r}: no parameter in its optimizer requires grad, so there is nothing to optimize."
            )
        return variables

    def schedulers(self) -> list[LRScheduler]:
        """Return the schedulers, as a list."""
        if self.scheduler is None:
            return []
        return list(self.scheduler) if isinstance(self.scheduler, Sequence) else [self.scheduler]

    @property
    def yields_shards(self) -> bool:
        """Return whether `data` yields one rank's part of each batch already."""
        return self.sharded or (isinstance(self.data, DataLoader) and isinstance(self.data.sampler, DistributedSampler))

    def parts(self, batch: Any, count: int) -> Sequence[Any]:
        """Return `count` parts of a batch.

        Raises:
            ValueError: if it does not divide; the message names the problem.
        """
        try:
            return (self.split or split)(batch, count)
        except ValueError as error:
            raise ValueError(f"problem {self.name!r}: {error}") from error

    def select_from(self, batch: Any, step: int) -> Any:
        """Return this problem's part of the batch of the level above, at own step `step` of the window."""
        return batch if self.select is None else self.select(batch, step)


def loss_value(loss: ModelLoss | Composite, models: Any, batch: Any, name: str) -> tuple[Tensor, dict[str, Any]]:
    """Return the scalar loss and its metrics, from what a problem's loss returns.

    Raises:
        ValueError: unless that is a scalar, or (scalar, dict); the message names the problem.
    """
    if type(batch) in (dict, list) or isinstance(batch, UserDict):
        batch = batch.copy()  # for losses that pop entries; of other classes a copy may lack what makes them
    value: Any = composite_value(loss, models, batch) if isinstance(loss, Composite) else loss(models, batch)
    metrics: dict[str, Any] = {}
    if isinstance(value, tuple):
        if len(value) != 2 or not isinstance(value[1], Mapping):
            raise ValueError(f"the loss of problem {name!r} returned a tuple; it must be (scalar, dict of metrics).")
        value, metrics = value[0], dict(value[1])
    if not isinstance(value, Tensor) or value.dim() != 0 or not value.is_floating_point():
        found = (
            f"shape {tuple(value.shape)}, dtype {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        )
        raise ValueError(
            f"the loss of problem {name!r} must return a scalar floating-point Tensor, or (scalar, dict of metrics), "
            f"got {found}. Reduce it with .mean() or .sum()."
        )
    return value, metrics


def composite_value(loss: Composite, models: Any, batch: Any) -> Tensor:
    """Return the value of a `Composite` whose functions take (models, batch) and (outputs[, models], batch)."""
    value = criterion_value(loss, loss.outputs(models, batch), models, batch)
    penalty = penalty_value(loss, models, batch)
    return value if penalty is None else value + penalty


def criterion_value(loss: Composite, outputs: Tensor, models: Any, batch: Any) -> Tensor:
    """Return the criterion of a problem's `Composite`: (outputs, batch) or (outputs, models, batch)."""
    if arity(loss.criterion, 3) == 2:
        return loss.criterion(outputs, batch)
    return loss.criterion(outputs, models, batch)


def penalty_value(loss: Composite, models: Any, batch: Any) -> Tensor | None:
    """Return the penalty of a problem's `Composite`, (models, batch) or (models), or None where there is none."""
    if loss.penalty is None:
        return None
    return loss.penalty(models) if arity(loss.penalty, 2) == 1 else loss.penalty(models, batch)
