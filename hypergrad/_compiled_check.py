"""Whether a compiled gradient has the derivative of the one it was made from: compilers can be silently wrong.

Torch's default compiler, 2.13 on CPU, gave Hessian products of a network of convolutions and group normalization that
were off by 0.2% in float64 and 4% in float32, while the gradient itself was exact.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from hypergrad._tape import explained_grad

_TIMES_NOISE = 10.0


def agrees(compiled: Tensor, eager: Tensor, inputs: Sequence[Tensor], *, compile: bool | str) -> bool:
    """Return whether two outputs have one derivative in `inputs`, as far as their precision goes; warn if not.

    One product of each with a random cotangent c is compared. Let J be the derivative of `eager`, K that of `compiled`:

        norm(K^T c - J^T c) <= sqrt(eps) norm(J^T c) + 10 nu + eps norm(c),    nu = norm(J^T (3c) / 3 - J^T c)

    nu is the rounding of the products themselves, which reduced precision inside the loss (autocast, TF32) raises.
    Reads two numbers back.
    """
    generator = torch.Generator().manual_seed(0)
    cotangent = torch.randn(eager.shape, generator=generator, dtype=torch.float64).to(eager.dtype).to(eager.device)
    expected, found = (_pulled(output, inputs, cotangent) for output in (eager, compiled))
    noise = _pulled(eager, inputs, 3 * cotangent) / 3 - expected
    return same(found, expected, size=expected.norm(), noise=noise.norm(), floor=cotangent.norm(), compile=compile)


def same(found: Tensor, expected: Tensor, *, size: Tensor, noise: Tensor, floor: Tensor, compile: bool | str) -> bool:
    """Return whether the norm of found - expected is at most sqrt(eps) size + 10 noise + eps floor; warn if not."""
    eps = torch.finfo(expected.dtype).eps
    difference = (found - expected).norm()
    allowed = eps**0.5 * size + _TIMES_NOISE * noise + eps * floor
    # An eager product that is not finite has nothing to say about the compiled one.
    if bool((difference <= allowed) | ~size.isfinite()):
        return True
    warnings.warn(
        f"compile={compile!r}: the compiled derivative of the lower gradient is off by {float(difference / size):.2g} "
        "of its norm, an error of the compiler. The eager one is used instead. Use compile=False, or another backend: "
        "compile='aot_eager'.",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def _pulled(output: Tensor, inputs: Sequence[Tensor], cotangent: Tensor) -> Tensor:
    if not output.requires_grad:
        return torch.cat([torch.zeros_like(x).reshape(-1) for x in inputs])
    pulled = explained_grad([output], inputs, [cotangent])
    entries = [torch.zeros_like(x) if p is None else p for x, p in zip(inputs, pulled, strict=True)]
    return torch.cat([entry.reshape(-1).to(output.dtype) for entry in entries])
