"""`torch.optim` optimizers as differentiable ones: groups, hyperparameters, state."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from hypergrad._flat import Layout
from hypergrad._shards import held, is_shard
from hypergrad.optim._algebra import Scalar
from hypergrad.optim.adadelta import Adadelta
from hypergrad.optim.adagrad import Adagrad
from hypergrad.optim.adam import Adam, AdamW
from hypergrad.optim.adamax import Adamax
from hypergrad.optim.base import Optimizer, State
from hypergrad.optim.bound import Bound
from hypergrad.optim.nadam import NAdam
from hypergrad.optim.opaque import Opaque
from hypergrad.optim.radam import RAdam
from hypergrad.optim.rmsprop import RMSprop
from hypergrad.optim.sgd import SGD

_REMEDY = "name them with from_torch(optimizer, dict(net.named_parameters()))"
_DECOUPLED = frozenset({"AdamW", "Adafactor", "Muon", "Lion"})
"""Classes with decoupled `weight_decay`, by name: not every torch has them all."""


def _sgd(group: Mapping[str, Any]) -> Optimizer:
    return SGD(
        _number(group["lr"]),
        momentum=group["momentum"],
        dampening=group["dampening"],
        weight_decay=_number(group["weight_decay"]),
        nesterov=group["nesterov"],
        maximize=group["maximize"],
    )


def _adam(group: Mapping[str, Any]) -> Optimizer:
    return Adam(
        _number(group["lr"]),
        betas=_betas(group),
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        amsgrad=group["amsgrad"],
        decoupled_weight_decay=group.get("decoupled_weight_decay", False),
        maximize=group["maximize"],
    )


def _adamw(group: Mapping[str, Any]) -> Optimizer:
    return AdamW(
        _number(group["lr"]),
        betas=_betas(group),
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        amsgrad=group["amsgrad"],
        maximize=group["maximize"],
    )


def _nadam(group: Mapping[str, Any]) -> Optimizer:
    return NAdam(
        _number(group["lr"]),
        betas=_betas(group),
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        momentum_decay=group["momentum_decay"],
        decoupled_weight_decay=group.get("decoupled_weight_decay", False),
        maximize=group.get("maximize", False),
    )


def _radam(group: Mapping[str, Any]) -> Optimizer:
    return RAdam(
        _number(group["lr"]),
        betas=_betas(group),
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        decoupled_weight_decay=group.get("decoupled_weight_decay", False),
        maximize=group.get("maximize", False),
    )


def _adamax(group: Mapping[str, Any]) -> Optimizer:
    return Adamax(
        _number(group["lr"]),
        betas=_betas(group),
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        maximize=group["maximize"],
    )


def _rmsprop(group: Mapping[str, Any]) -> Optimizer:
    return RMSprop(
        _number(group["lr"]),
        alpha=group["alpha"],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        momentum=group["momentum"],
        centered=group["centered"],
        maximize=group["maximize"],
    )


def _adagrad(group: Mapping[str, Any]) -> Optimizer:
    return Adagrad(
        _number(group["lr"]),
        lr_decay=group["lr_decay"],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        initial_accumulator_value=group["initial_accumulator_value"],
        maximize=group["maximize"],
    )


def _adadelta(group: Mapping[str, Any]) -> Optimizer:
    return Adadelta(
        _number(group["lr"]),
        rho=group["rho"],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        maximize=group["maximize"],
    )


_Reader = Callable[[Mapping[str, Any]], Optimizer]

_READERS: dict[type[torch.optim.Optimizer], _Reader] = {
    torch.optim.SGD: _sgd,
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adamw,
    torch.optim.NAdam: _nadam,
    torch.optim.RAdam: _radam,
    torch.optim.Adamax: _adamax,
    torch.optim.RMSprop: _rmsprop,
    torch.optim.Adagrad: _adagrad,
    torch.optim.Adadelta: _adadelta,
}


@dataclass(frozen=True, eq=False)
class FromTorch:
    """A `torch.optim` optimizer as `from_torch` returns it: what `bind` accepts.

    `optimizers` holds one differentiable optimizer a param group, with the values at the time of the call;
    `names` the groups' parameter names where they are known. The state is read when a run begins.
    """

    source: torch.optim.Optimizer
    optimizers: tuple[Optimizer, ...]
    names: tuple[tuple[str, ...], ...] | None
    opaque: bool

    def bind(self, params: Mapping[str, Tensor]) -> Bound:
        """Return the optimizer bound to `params`, starting from torch's current state.

        Raises:
            ValueError: the groups' parameters cannot be matched with `params`; the message names the remedy.
        """
        names = self.names if self.names is not None else _match(self.source, params)
        flat = [name for group in names for name in group]
        missing, extra = [n for n in flat if n not in params], [n for n in params if n not in flat]
        if missing or extra:
            raise ValueError(
                f"The {type(self.source).__name__} optimizer and the parameters do not match: the optimizer "
                f"also has {missing}, the parameters also have {extra}. Optimize exactly these parameters, "
                f"or {_REMEDY} if the names differ."
            )
        bound = Bound(tuple(zip(self.optimizers, names, strict=True)), Layout.of(params, names=flat))
        tensors = list(_tensors(self.source))
        if self.opaque:
            return bound
        if [tensor.shape for tensor in tensors] != [params[name].shape for name in flat]:
            if not any(self.source.state.values()):
                return bound
            raise ValueError(
                f"The {type(self.source).__name__} optimizer has state, but the shapes of its parameters "
                f"do not follow the order of the names {flat}; {_REMEDY}."
            )
        held = dict(zip(flat, tensors, strict=True))
        return replace(bound, start=lambda: read_state(self.source, bound, held))


def from_torch(
    optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor] | None = None, *, opaque: bool = False
) -> FromTorch:
    """Return the differentiable counterpart of a `torch.optim` optimizer: param groups, options and state.

    Options are copied now; the state (momentum buffers, averages, step counts) is read when a run begins,
    zero for parameters that have none yet. `fused`, `foreach`, `capturable` and `differentiable` make no
    difference. Parameters are named by `params`, by identity; else by the names torch has recorded; else, at
    `bind`, by identity with the tensors there, by the single group, or by position where all shapes agree.
    Cost: nothing is computed or copied.

    Args:
        optimizer: SGD, Adam, AdamW, NAdam, RAdam, Adamax, RMSprop, Adagrad or Adadelta, or a subclass that
            keeps `step`.
        params: names for the optimizer's tensors; it may hold more.
        opaque: take any class, only for its weight decay and `maximize`; `update` then raises.

    Raises:
        ValueError: a class that cannot be differentiated, or a tensor without a name in `params`.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        >>> from_torch(optimizer).optimizers
        (SGD(lr=0.1, maximize=False, momentum=0.9, dampening=0, weight_decay=0, nesterov=False),)
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"from_torch takes a torch.optim.Optimizer, got {type(optimizer).__name__}.")
    return FromTorch(optimizer, read_options(optimizer, opaque=opaque), _names(optimizer, params), opaque)


def decay_of(optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor]) -> Bound:
    """Return the weight decay and `maximize` of any torch optimizer, as a `Bound` whose `update` raises.

    The decay is `weight_decay` of each param group; decoupled for AdamW, Adafactor and Muon and in groups
    that say `decoupled_weight_decay`, else coupled.

    Args:
        optimizer: of any class.
        params: the parameters by name; it may hold more than the optimizer's.

    Raises:
        ValueError: a tensor of the optimizer without a name in `params`.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.Rprop(net.parameters())
        >>> decay_of(optimizer, dict(net.named_parameters())).decay()
        Decay(coupled=0.0, decoupled=0.0)
    """
    view = from_torch(optimizer, params, opaque=True)
    assert view.names is not None
    return view.bind({name: params[name] for group in view.names for name in group})


def read_options(optimizer: torch.optim.Optimizer, *, opaque: bool = False) -> tuple[Optimizer, ...]:
    """Return one differentiable optimizer a param group, with the options that the groups have now.

    Schedulers change a group's options between steps: `replace_options` puts the new ones into a `Bound`.

    Raises:
        ValueError: a class that cannot be differentiated, unless `opaque`.
    """
    read = _opaque_reader(optimizer) if opaque else _reader(optimizer)
    return tuple(read(group) for group in optimizer.param_groups)


def replace_options(optimizer: torch.optim.Optimizer, bound: Bound) -> Bound:
    """Return `bound` with the options that the torch optimizer's groups have now; the names stay.

    Raises:
        ValueError: a class that cannot be differentiated, or another number of groups than `bound` has.
    """
    options = read_options(optimizer)
    if len(options) != len(bound.groups):
        raise ValueError(
            f"{type(optimizer).__name__} now has {len(options)} param groups, but was bound with "
            f"{len(bound.groups)}. Add param groups before the run is built."
        )
    groups = tuple((option, names) for option, (_, names) in zip(options, bound.groups, strict=True))
    return bound if groups == bound.groups else replace(bound, groups=groups)


def read_state(optimizer: torch.optim.Optimizer, bound: Bound, params: Mapping[str, Tensor]) -> tuple[State, ...]:
    """Return the torch optimizer's current state as flat vectors, one `State` a group of `bound`.

    Tensors are copied, since torch goes on changing its own. Parameters without a state yet have the initial
    one. The step count is an int where the parameters of a group agree and torch keeps it on the host;
    otherwise it is a vector with one entry a coordinate, and nothing is read back from the device. Cost: one
    concatenation a state tensor.

    Args:
        optimizer: the optimizer that `bound` was made from.
        bound: from `bind(from_torch(optimizer), ...)`.
        params: the very tensors that the optimizer holds, by the names in `bound`.
    """
    with torch.no_grad():
        return tuple(
            _read_group(
                rule,
                [_held(params[name], cast(dict[str, Any], optimizer.state.get(params[name], {}))) for name in names],
                bound.layout.dtype,
                bound.layout.device,
            )
            for rule, names in bound.groups
        )


def _read_group(
    rule: Optimizer, held: Sequence[tuple[Tensor, dict[str, Any]]], dtype: torch.dtype, device: torch.device
) -> State:
    """Return one group's state from each parameter's own."""
    step = _read_step(rule, held, dtype, device)
    state: State = {"step": step}
    for key, initial in rule.init(torch.zeros(1, dtype=dtype, device=device)).items():
        if not isinstance(initial, Tensor):
            continue
        found = [entry.get(key) for _, entry in held]
        if initial.dim() == 0 and not isinstance(step, Tensor):
            # one step count, so one value of what depends on the count alone
            known = found and found[0] is not None
            state[key] = torch.as_tensor(found[0]).to(device, dtype, copy=True) if known else initial
            continue
        pieces = [
            initial.expand(param.numel()) if value is None else _flat(value, param)
            for (param, _), value in zip(held, found, strict=True)
        ]
        state[key] = torch.cat(pieces).to(device, dtype) if pieces else initial.new_empty(0)
    return state


def _held(param: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Return what this process holds of a parameter and of its state."""
    if not is_shard(param):
        return param, state
    return held(param), {key: held(value) if isinstance(value, Tensor) else value for key, value in state.items()}


def _flat(value: Any, param: Tensor) -> Tensor:
    """Return a parameter's state tensor, or number, as a vector with one entry for each of its scalars."""
    if isinstance(value, Tensor) and value.dim() == param.dim() and value.dim() > 0:
        return value.reshape(-1)
    return torch.as_tensor(value).expand(param.shape).reshape(-1)


def _read_step(
    rule: Optimizer, held: Sequence[tuple[Tensor, dict[str, Any]]], dtype: torch.dtype, device: torch.device
) -> int | Tensor:
    """Return the group's step count, an int if that takes no read-back and the parameters agree."""
    if isinstance(rule, SGD):
        # torch's SGD counts nothing: what it needs to know is whether the buffer exists.
        steps: list[Any] = [int(entry.get("momentum_buffer") is not None) for _, entry in held]
    else:
        steps = [entry.get("step", 0) for _, entry in held]
    if all(not isinstance(s, Tensor) or s.device.type == "cpu" for s in steps):
        with _disable_current_modes():  # a step count is needed even where all else is computed without values
            counts = {int(s) for s in steps}
        if len(counts) <= 1:
            return counts.pop() if counts else 0
    pieces = [
        torch.as_tensor(s).to(device, dtype).expand(param.numel()) for (param, _), s in zip(held, steps, strict=True)
    ]
    return torch.cat(pieces)


def _reader(optimizer: torch.optim.Optimizer) -> _Reader:
    """Return what reads this class's groups, or raise the ValueError that names the alternatives."""
    kind = type(optimizer)
    for base in kind.__mro__:
        if base in _READERS:
            # torch wraps `step` in place, per class, so only the innermost functions can be compared.
            if inspect.unwrap(kind.step) is inspect.unwrap(base.step):
                return _READERS[base]
            break
    raise ValueError(
        f"{kind.__module__}.{kind.__qualname__} cannot be differentiated: its step is none of torch.optim's "
        f"{', '.join(base.__name__ for base in _READERS)}. Use one of these, write it as a "
        "hypergrad.optim.Optimizer, or choose a method that does not differentiate the optimizer, "
        "e.g. Implicit, which takes any; OneStep, FiniteDifference and other methods with a step_size take any too, "
        "once step_size= is given."
    )


def _opaque_reader(optimizer: torch.optim.Optimizer) -> _Reader:
    """Return what reads the weight decay of any class's groups."""
    kind = type(optimizer)
    decoupled = not _DECOUPLED.isdisjoint(base.__name__ for base in kind.__mro__)

    def read(group: Mapping[str, Any]) -> Optimizer:
        weight_decay = _number(group.get("weight_decay", 0.0))
        apart = decoupled or group.get("decoupled_weight_decay", False)
        return Opaque(
            of=kind.__name__,
            coupled=0.0 if apart else weight_decay,
            decoupled=weight_decay if apart else 0.0,
            maximize=group.get("maximize", False),
        )

    return read


def _names(optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor] | None) -> tuple[tuple[str, ...], ...] | None:
    """Return the groups' parameter names from `params`, or as torch recorded them, or None."""
    if params is None:
        groups = optimizer.param_groups
        return tuple(tuple(g["param_names"]) for g in groups) if all("param_names" in g for g in groups) else None
    by_identity = {id(tensor): name for name, tensor in params.items()}
    unnamed = [tuple(tensor.shape) for tensor in _tensors(optimizer) if id(tensor) not in by_identity]
    if unnamed:
        raise ValueError(
            f"The {type(optimizer).__name__} optimizer holds {len(unnamed)} tensors that are not among the "
            f"named parameters, of shapes {unnamed}. Pass the very tensors: {_REMEDY}."
        )
    return tuple(tuple(by_identity[id(tensor)] for tensor in g["params"]) for g in optimizer.param_groups)


def _match(optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor]) -> tuple[tuple[str, ...], ...]:
    """Return names for unnamed tensors: by identity, single group, or position and shape."""
    tensors = list(_tensors(optimizer))
    by_identity = {id(tensor): name for name, tensor in params.items()}
    if all(id(tensor) in by_identity for tensor in tensors):
        return _names(optimizer, params) or ()
    shapes = [tensor.shape for tensor in tensors]
    if len(optimizer.param_groups) == 1:
        if sorted(shapes) != sorted(tensor.shape for tensor in params.values()):
            raise ValueError(
                f"The {type(optimizer).__name__} optimizer holds tensors of shapes {[tuple(s) for s in shapes]}, the "
                f"parameters have {[tuple(p.shape) for p in params.values()]}. Optimize exactly these parameters."
            )
        return (tuple(params),)
    if shapes != [tensor.shape for tensor in params.values()]:
        raise ValueError(
            f"The {type(optimizer).__name__} optimizer has {len(optimizer.param_groups)} param groups, and "
            "which parameter is in which cannot be told: the tensors are others and the shapes differ; "
            f"{_REMEDY}."
        )
    names = iter(params)
    return tuple(tuple(next(names) for _ in group["params"]) for group in optimizer.param_groups)


def _tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (tensor for group in optimizer.param_groups for tensor in group["params"])


def _number(value: Scalar) -> Scalar:
    """Return a group's option; a tensor is copied, as schedulers fill it, unless it requires grad."""
    if not isinstance(value, Tensor):
        return value
    return (value if value.requires_grad else value.clone()).reshape(())


def _betas(group: Mapping[str, Any]) -> tuple[Scalar, Scalar]:
    beta1, beta2 = group["betas"]
    return _number(beta1), _number(beta2)
