"""Lower gradients compiled once and taped often: what `compile=True` of `Implicit` and `Unrolled` stands for.

The gradient of the lower loss is compiled as a function of parameters, upper parameters and batch, and called on inputs
that require grad: autograd then runs it and its derivative, which is the product, as fused kernels. What is compiled is
found again by the loss object itself, held weakly, and the layout of its parameters; batches of the same shapes do not
compile anew. The first product on each set of shapes is compared with an eager one; where they differ, eager it is.
"""

from __future__ import annotations

import contextlib
import importlib
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.utils import _pytree as pytree

from hypergrad._compiled_check import agrees
from hypergrad._eager import compiled_again
from hypergrad._flat import Layout, Params
from hypergrad._functional import Loss, Residual, in_transform, scalar
from hypergrad._random import RandomState, random_state, restore_random_state
from hypergrad._tape import Tape, explained_grad, named, second_order
from hypergrad._untouched import called_modules, on_copies

Compile = bool | str
"""Whether to compile: False, True for torch's default backend, or the name of a backend of `torch.compile`."""

COMPILE = "a bool, or the name of a backend of torch.compile"


class CompiledTape(Tape):
    """The tape of a residual built on a compiled gradient: one for `lower`, another for `upper` when it is asked for.

    One graph for both would compute the mixed part with each product.
    """

    def __init__(self, residual: Residual, lower: Tensor, upper: Params) -> None:
        """Evaluate `residual` once."""
        self._evaluate, self._upper = residual, {name: u.detach() for name, u in upper.items()}
        self._lower = lower.detach().requires_grad_()
        with torch.enable_grad(), second_order():
            self._residual = residual(self._lower, self._upper)
        self.value = self._residual.detach()

    def pull_lower(self, cotangent: Tensor) -> Tensor:
        """Return (dF/d lower)^T cotangent."""
        (pulled,) = _pull(self._residual, [self._lower], cotangent)
        return torch.zeros_like(self._lower) if pulled is None else pulled

    def push_lower(self, tangent: Tensor) -> Tensor:  # noqa: ARG002
        """Raise: a compiled graph has no second derivative; symmetric residuals, all that come here, need none."""
        raise AssertionError("a compiled tape only multiplies from the left")

    def pull_upper(self, cotangent: Tensor) -> Params:
        """Return (dF/d upper)^T cotangent for the names that F reads; one more evaluation."""
        leaves = {name: u.detach().requires_grad_() for name, u in self._upper.items()}
        with torch.enable_grad(), second_order():
            residual = self._evaluate(self._lower.detach(), leaves)
        return named(leaves, _pull(residual, list(leaves.values()), cotangent))


def _pull(residual: Tensor, inputs: list[Tensor], cotangent: Tensor) -> Sequence[Tensor | None]:
    if not residual.requires_grad:
        return [None for _ in inputs]
    return explained_grad([residual], inputs, [cotangent])


def compiled_gradient(
    loss: Loss,
    part: Tensor,
    upper: Params,
    batches: Sequence[Any],
    *,
    layout: Layout,
    constants: Params,
    compile: Compile,
) -> Tensor:
    """Return the gradient at `part` of the mean loss over `batches`, on a graph whose derivative is compiled too.

    Args:
        loss: the lower loss; must draw no random numbers.
        part: flat parameters that the gradient is taken in, laid out as `layout`.
        upper: upper parameters.
        batches: what the loss is averaged over.
        layout: names and shapes of `part`.
        constants: lower parameters beside those of `part`.
        compile: the backend.

    Raises:
        ValueError: if the loss draws random numbers, or cannot be compiled whole.
    """
    found = _lookup(loss, (layout, len(batches), part.requires_grad, compile))
    arguments = part, upper, constants, list(batches), loss
    state = random_state(layout.device)
    if found.modules is None:
        with torch.no_grad():
            found.modules = WeakSet(called_modules(lambda: found.loss(*arguments)))
        check_no_draws(layout.device, state)
    variant = _variant(part, upper, constants, batches)
    right = found.right.get(variant)
    with on_copies(found.modules), _retained():
        if right is False:
            return found.eager(*arguments)
        with compiled_again(), explained():
            grad = found.compiled(*arguments)
        inputs = [x for x in (part, *upper.values()) if x.requires_grad]
        if right is None and inputs and torch.is_grad_enabled():
            eager = found.eager(*arguments)
            found.right[variant] = agrees(grad, eager, inputs, compile=compile)
            if not found.right[variant]:
                grad = eager
    check_no_draws(layout.device, state)
    return grad


def _variant(*arguments: Any) -> tuple[Any, ...]:
    """Return what the compiler makes code of its own for: shapes, dtypes and which tensors require grad."""
    tensors = [x for x in pytree.tree_leaves(arguments) if isinstance(x, Tensor)]
    return tuple((x.shape, x.dtype, x.requires_grad) for x in tensors)


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turn the compiler's refusals into a ValueError that names the remedy."""
    from torch._dynamo.exc import TorchDynamoException  # importing it takes seconds

    try:
        yield
    except Exception as error:
        if not isinstance(error, TorchDynamoException) and type(error).__module__ != TorchDynamoException.__module__:
            raise
        is_limit = "Limit" in type(error).__name__
        raise ValueError(_TOO_MANY if is_limit else _refusal(str(error))) from error


_TOO_MANY = (
    "compile=True: the batches of the lower loss hold more shapes or Python values than torch.compile makes code for. "
    "Leave out what the loss does not read, and pass what differs as tensors of one shape, torch.tensor(0.1) instead "
    "of 0.1, with torch.exp instead of math.exp. Or use compile=False."
)


def _refusal(error: str) -> str:
    """Return what to say of a loss that `torch.compile` does not take."""
    if "mutate a captured Tensor" in error:
        return (
            "compile=True: the lower loss writes to a buffer of a module (batch normalization's running statistics, "
            "for instance), which compiled gradients cannot. Pass clones: functional_call(net, {**lower, **{name: "
            "b.clone() for name, b in net.named_buffers()}}, x). Or use compile=False."
        )
    summary = " ".join(line.strip() for line in error.strip().splitlines()[:3])[:400]
    return (
        "compile=True: torch.compile cannot take the lower loss whole. Use compile=False, or change what it names: "
        f"{summary}"
    )


def to_compile(owner: str, compile: Compile) -> Compile:
    """Return what is left to compile here: nothing in a region that is being compiled as a whole.

    Raises:
        ValueError: if something is to be compiled inside a transform.
    """
    if not compile or torch.compiler.is_compiling():
        return False
    if in_transform():
        raise ValueError(
            f"{owner}: compile={compile!r} inside a torch.func transform (vmap, grad), which would trace the compiled "
            "code again. Construct it with compile=False there, and compile the whole: "
            "torch.compile(torch.func.vmap(f))."
        )
    return compile


class _Compiled:
    """One mean loss, its compiled gradient, and the modules that it was seen to call."""

    def __init__(self, layout: Layout, compile: Compile) -> None:
        def mean_loss(part: Tensor, upper: Params, constants: Params, batches: list[Any], loss: Loss) -> Tensor:
            params = {**layout.unravel(part), **constants}
            total = scalar(loss(params, upper, batches[0]), "the lower loss")
            for batch in batches[1:]:
                total = total + scalar(loss(params, upper, batch), "the lower loss")
            return total / len(batches) if len(batches) > 1 else total

        def gradient(part: Tensor, upper: Params, constants: Params, batches: list[Any], loss: Loss) -> Tensor:
            grad: Tensor = torch.func.grad(mean_loss)(part, upper, constants, batches, loss)
            return grad

        self.loss = mean_loss
        self.modules: WeakSet[nn.Module] | None = None
        self.right: dict[tuple[Any, ...], bool] = {}
        """By variant, whether the compiled derivative was found to be the eager one."""
        self.eager: Callable[..., Tensor] = gradient
        how: dict[str, Any] = {"backend": compile} if isinstance(compile, str) else {"options": options()}
        self.compiled: Callable[..., Tensor] = torch.compile(of_its_own(gradient), fullgraph=True, dynamic=False, **how)


def options() -> dict[str, Any]:
    """Return those of torch's default compiler: without the one pass that made derivatives of convolutions wrong."""
    turn = importlib.import_module("hypergrad._transposes").TransposedProducts()  # importing the compiler takes seconds
    return {"layout_optimization": False, "post_grad_custom_pre_pass": turn}


_cache: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()
"""By loss, weakly, then by layout and the like. A value never refers to its key: the loss is an argument."""


def _lookup(loss: Loss, key: tuple[Layout, int, bool, Compile]) -> _Compiled:
    layout, _, _, compile = key
    found: _Compiled = cached(loss, key, lambda: _Compiled(layout, compile))
    return found


def cached(loss: Loss, key: Any, make: Callable[[], Any]) -> Any:
    """Return what was made for `loss` and `key`, made when first asked for and forgotten with the loss."""
    owner, rest = (loss.__self__, loss.__func__) if isinstance(loss, types.MethodType) else (loss, None)
    try:
        known = _cache.setdefault(owner, {})
    except TypeError as error:
        raise ValueError(
            f"compile=True needs a lower loss that can be hashed and referred to weakly, got {type(loss).__name__}. "
            "Pass a function, or use compile=False."
        ) from error
    if (rest, key) not in known:
        known[rest, key] = make()
    return known[rest, key]


def of_its_own(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `function` with a code object of its own, to which the compiler's limit of recompilations applies."""
    assert isinstance(function, types.FunctionType)
    return types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


@contextlib.contextmanager
def _retained() -> Iterator[None]:
    """Compile graphs whose buffers outlive a backward pass, so that it can be repeated."""
    with functorch_config.patch(donated_buffer=False):
        yield


def check_no_draws(device: torch.device, before: RandomState | None) -> None:
    """Raise a ValueError, the generators put back, if something was drawn since `before`."""
    after = random_state(device)
    if before is None or after is None:
        return
    same = torch.equal(before.cpu, after.cpu)
    if before.accelerator is not None and after.accelerator is not None:
        same = same and torch.equal(before.accelerator, after.accelerator)
    if not same:
        restore_random_state(before)
        raise ValueError(
            "compile=True: the lower loss draws random numbers (dropout, for instance), and compiled code draws others "
            "than the lower step did. Use compile=False, or put the module in eval mode."
        )
