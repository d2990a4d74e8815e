"""A meter of what runs under it: operations, floating-point work, bytes moved, and the bytes alive at their peak."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True)
class Rates:
    """How fast a machine is, nominally; only ratios between the costs of two computations are used.

    Attributes:
        launch: seconds per kernel that Python calls, its dispatch and its part of autograd included.
        engine: the same of a kernel that autograd's engine calls.
        convolution: seconds by which a convolution's launch is longer: choosing how, and laying out its arguments.
        flops: floating-point operations a second in matrix products.
        bandwidth: bytes a second, read or written.
        call: seconds of Python for each hypergradient, whatever its size.
        step: the same for each own step of the run.
    """

    launch: float
    engine: float
    convolution: float
    flops: float
    bandwidth: float
    call: float = 2e-3
    step: float = 7e-4

    @staticmethod
    def of(device: torch.device) -> Rates:
        """Return the rates of one core, or of a data-centre accelerator."""
        if device.type == "cpu":
            return Rates(launch=1e-5, engine=4e-6, convolution=1.5e-4, flops=2e10, bandwidth=5e9)
        return Rates(launch=1e-5, engine=6e-6, convolution=1e-5, flops=3e13, bandwidth=1.5e12)


@dataclass(frozen=True)
class Reading:
    """What a meter has counted so far.

    Attributes:
        num_operations: kernels; views are none.
        flops: of matrix products and convolutions, a multiply-add counting two.
        moved_bytes: read and written by all kernels.
        seconds: the sum over kernels of launch plus the longer of arithmetic and memory traffic, at nominal rates.
    """

    num_operations: int = 0
    flops: int = 0
    moved_bytes: int = 0
    seconds: float = 0.0

    def __sub__(self, other: Reading) -> Reading:
        """Return what was counted since `other`."""
        return Reading(
            self.num_operations - other.num_operations,
            self.flops - other.flops,
            self.moved_bytes - other.moved_bytes,
            self.seconds - other.seconds,
        )


def _matrix_vector(matrix: Any, *_: Any, **__: Any) -> int:
    return 2 * int(math.prod(matrix))


_MORE_FORMULAS: dict[Any, Any] = {torch.ops.aten.mv: shape_wrapper(_matrix_vector)}  # type: ignore[no-untyped-call]
"""What the registry of `torch.utils.flop_counter` leaves out; by operation, of its arguments."""

_CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)

_BLOCK = 16


def _workspace(func: Any, args: Any, outcome: Any) -> int:
    """Return the bytes that a kernel takes and gives back beside its outputs.

    On a CPU a convolution works on copies laid out in blocks of channels: forward, of the input and then of the output;
    backward, of the gradient that comes and of the input, or the gradient of the input, at once. An input of few
    channels, an image, is used as it is.
    """
    forward, backward = _CONVOLUTIONS
    if func is forward and outcome.device.type == "cpu":
        return max(_blocked(args[0]) if args[0].shape[1] >= _BLOCK // 2 else 0, _blocked(outcome))
    if func is backward and args[0].device.type == "cpu":
        arriving, data, input_mask = args[0], args[1], args[-1]
        return _blocked(arriving) + (_blocked(data) if input_mask[0] or data.shape[1] >= _BLOCK // 2 else 0)
    return 0


def _blocked(data: Tensor) -> int:
    channels = math.ceil(data.shape[1] / _BLOCK) * _BLOCK
    return data.shape[0] * channels * data.shape[2:].numel() * data.element_size()


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While open, counts what is computed; it sees the same with tensors that hold no values.

    Attributes:
        total: what was counted so far.
        constants: integers made as 0-dim tensors (`torch.full((), 3)`), which can be read back without their values.
        live_bytes: of the storages that were made under the meter and have not been freed.
        peak_bytes: the most that `live_bytes` has been since `restart`.
        peak_saved_bytes: how much of it was saved for a backward pass then.
    """

    def __init__(self, rates: Rates) -> None:
        """Start at zero."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.rates = rates
        self.total = Reading()
        self.constants = WeakTensorKeyDictionary()
        self.live_bytes = self.peak_bytes = self.peak_saved_bytes = 0
        self._saved_bytes = 0
        self._sizes: dict[int, int] = {}
        self._saved: set[int] = set()
        self._watches: dict[int, Any] = {}

    def restart(self) -> None:
        """Let the peak begin anew, at what is alive now."""
        self.peak_bytes, self.peak_saved_bytes = self.live_bytes, self._saved_bytes

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Tell saved tensors apart while the body runs; outside `torch.func` transforms only, which refuse it."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ARG002
        """Run the operation and count it."""
        kwargs = kwargs or {}
        outcome = func(*args, **kwargs)
        aliases = [returned.alias_info for returned in func._schema.returns]
        if all(alias is not None and not alias.is_write for alias in aliases):
            return outcome
        outputs = [leaf for leaf in pytree.tree_leaves(outcome) if isinstance(leaf, Tensor)]
        if not outputs:
            return outcome
        if func is torch.ops.aten.full.default and not args[0]:
            self.constants[outcome] = args[1]
        inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        moved = sum(t.numel() * t.element_size() for t in (*inputs, *outputs))
        formula = flop_registry.get(func._overloadpacket) or _MORE_FORMULAS.get(func._overloadpacket)
        flops = 0 if formula is None else int(formula(*args, **kwargs, out_val=outcome))
        rates, total = self.rates, self.total
        seconds = rates.launch if torch._C._current_autograd_node() is None else rates.engine
        if func in _CONVOLUTIONS:
            seconds += rates.convolution
        seconds += max(flops / rates.flops, moved / rates.bandwidth)
        self.total = Reading(
            total.num_operations + 1, total.flops + flops, total.moved_bytes + moved, total.seconds + seconds
        )
        if not any(alias is not None for alias in aliases):
            for tensor in outputs:
                self._allocated(tensor)
        self._reached(self.live_bytes + _workspace(func, args, outcome))
        return outcome

    def _allocated(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size = storage.nbytes()
        self._sizes[key] = size
        self._watches[key] = weakref.finalize(storage, self._freed, key)
        self.live_bytes += size

    def _reached(self, held: int) -> None:
        if held > self.peak_bytes:
            self.peak_bytes, self.peak_saved_bytes = held, self._saved_bytes

    def _freed(self, key: int) -> None:
        size = self._sizes.pop(key, 0)
        self._watches.pop(key, None)
        self.live_bytes -= size
        if key in self._saved:
            self._saved.discard(key)
            self._saved_bytes -= size

    def _pack(self, tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key in self._sizes and key not in self._saved:
            self._saved.add(key)
            self._saved_bytes += self._sizes[key]
        return tensor.detach()
