"""Parameters as a dict of tensors outside, one contiguous vector inside.

A level's parameters are laid out once, in the order of `Layout.names`; after that all algebra (solvers, optimizers,
sweeps) is a handful of kernels whatever the number of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]

Params = dict[str, Tensor]
"""Named parameters of one level; the insertion order carries no meaning."""


@dataclass(frozen=True)
class Layout:
    """The order, shapes and dtypes with which named tensors lie in one vector.

    `dtype` is the dtype of the vector: the widest of the parameters', float32 at least, so that a half-precision
    model is solved and optimized in float32.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    sizes: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    dtype: torch.dtype
    device: torch.device
    over_shards: Callable[[Tensor], Tensor] | None = field(default=None, compare=False)
    """Adds up a tensor over the processes that each hold a part of the vector; None where this one holds it whole."""

    @staticmethod
    def of(params: Mapping[str, Tensor], *, names: Sequence[str] | None = None, what: str = "lower") -> Layout:
        """Return the layout of `params`, in the order of `names` (default: the dict's own order).

        Raises:
            ValueError: if `params` is empty, holds something other than floating-point tensors, or spans devices;
                the message names the entry.
        """
        check_params(params, what)
        order = tuple(params) if names is None else tuple(names)
        tensors = [params[name] for name in order]
        dtypes = tuple(t.dtype for t in tensors)
        return Layout(
            names=order,
            shapes=tuple(t.shape for t in tensors),
            sizes=tuple(t.numel() for t in tensors),
            dtypes=dtypes,
            dtype=reduce(torch.promote_types, dtypes, torch.float32),
            device=tensors[0].device,
        )

    @property
    def size(self) -> int:
        """Return the number of scalars."""
        return sum(self.sizes)

    def sum(self, number: Tensor) -> Tensor:
        """Return the sum over the whole vector of something, from what it is over the part held here."""
        return number if self.over_shards is None else self.over_shards(number)

    def norm(self, vector: Tensor) -> Tensor:
        """Return the Euclidean norm of the whole vector of which `vector` is the part held here."""
        norm: Tensor = torch.linalg.vector_norm(vector)
        return norm if self.over_shards is None else self.over_shards(norm.square()).sqrt()

    def ravel(self, params: Mapping[str, Tensor]) -> Tensor:
        """Return the entries of `params` as one vector of shape (size,), which may share their memory."""
        if len(self.names) == 1:
            return params[self.names[0]].reshape(-1).to(self.dtype)
        pieces = (params[name].reshape(-1) for name in self.names)
        return torch.cat([piece if piece.dtype == self.dtype else piece.to(self.dtype) for piece in pieces])

    def record(self, params: Mapping[str, Tensor]) -> Tensor:
        """Return the same, detached, in memory of its own: it stays when `params` are changed in place."""
        flat = self.ravel({name: params[name].detach() for name in self.names})
        return flat.clone() if len(self.names) == 1 else flat

    def unravel(self, vector: Tensor) -> Params:
        """Return views of `vector`, shape (size,), named and shaped as the parameters."""
        pieces = torch.split(vector, list(self.sizes))
        return {
            name: piece.view(shape) if dtype == self.dtype else piece.view(shape).to(dtype)
            for name, piece, shape, dtype in zip(self.names, pieces, self.shapes, self.dtypes, strict=True)
        }

    def check_like(self, params: Mapping[str, Tensor], what: str) -> None:
        """Raise a ValueError that names the entry in which `params` differs from this layout."""
        check_params(params, what)
        missing = [name for name in self.names if name not in params]
        extra = [name for name in params if name not in self.names]
        if missing or extra:
            raise ValueError(
                f"{what} has the wrong entries: missing {missing}, unexpected {extra}. "
                f"Expected exactly {list(self.names)}."
            )
        for name, shape in zip(self.names, self.shapes, strict=True):
            if params[name].shape != shape:
                raise ValueError(f"{what}[{name!r}] has shape {tuple(params[name].shape)}, expected {tuple(shape)}.")


def as_params(params: Mapping[str, Tensor]) -> Params:
    """Return `params` as a plain dict of constants: detached, also from the levels of surrounding transforms."""
    return {name: constant(tensor) for name, tensor in params.items()}


def constant(tensor: Tensor) -> Tensor:
    """Return `tensor` detached, also from the levels of surrounding transforms, which may end before it is read."""
    value = tensor.detach()
    if not torch.compiler.is_compiling():
        while _functorch.is_gradtrackingtensor(value):
            value = _functorch.get_unwrapped(value)
        if value.is_inference():
            value = value.clone()  # outside of inference mode a tensor like any other
    return value


def check_mode() -> None:
    """Raise a ValueError inside `torch.inference_mode()`, where torch records nothing that could be differentiated."""
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        raise ValueError(
            "nothing can be differentiated inside torch.inference_mode(). Leave it for this call; torch.no_grad() may "
            "stay on."
        )


def check_params(params: Mapping[str, Tensor], what: str) -> None:
    """Raise a ValueError unless `params` is a non-empty dict of floating-point tensors on one device."""
    check_mode()
    if not isinstance(params, Mapping):
        raise ValueError(
            f"{what} must be a dict[str, Tensor], got {type(params).__name__}. "
            "For a module, pass dict(module.named_parameters())."
        )
    if not params:
        raise ValueError(f"{what} is empty: there is nothing to differentiate. Pass at least one named tensor.")
    device: torch.device | None = None
    for name, tensor in params.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{what}[{name!r}] must be a Tensor, got {type(tensor).__name__}.")
        if tensor.is_complex():
            raise ValueError(
                f"{what}[{name!r}] has dtype {tensor.dtype}; only real tensors can be differentiated. Pass "
                "torch.view_as_real(tensor), and use torch.view_as_complex of it inside the loss."
            )
        if not tensor.is_floating_point():
            raise ValueError(
                f"{what}[{name!r}] has dtype {tensor.dtype}; only floating-point tensors can be differentiated. "
                "Convert it with .float(), or close over it as a constant."
            )
        if tensor.layout is not torch.strided:
            raise ValueError(
                f"{what}[{name!r}] is {tensor.layout}; only dense tensors are supported. Call .to_dense()."
            )
        device = device or tensor.device
        if tensor.device != device:
            raise ValueError(
                f"{what}[{name!r}] is on {tensor.device} while other entries are on {device}; move all to one device."
            )
