"""BiSSL's released solver: conjugate gradients whose step lengths are taken tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

import hypergrad as hg


@dataclass(frozen=True)
class LayerwiseCG(hg.Solver):
    """Conjugate gradients with a step length and a direction update of each parameter tensor's own.

    That the released solve runs tensor by tensor is [code]; that one product multiplies all tensors at once, so that
    the coupling of the layers enters the residuals, is our reading [rec].

    With r, p, x split into the blocks t of `sizes`, every iteration multiplies the whole p once and takes

        a_t = r_t.r_t / p_t.(A p)_t,  x_t += a_t p_t,  r_t -= a_t (A p)_t,  p_t <- r_t + (r_t'.r_t' / r_t.r_t) p_t.

    **A heuristic, not conjugate gradients**: it solves A x = b only where A is block-diagonal in the same blocks;
    coupling between layers makes directions lose their conjugacy, and more iterations need not bring it closer. A block
    whose curvature p_t.(A p)_t is not positive stands still from then on [ours]. The residual reported is measured.

    Cost: one product an iteration, one more for the residual.

    Args:
        sizes: the tensors' numbers of elements, in the order of the flat vector.
        max_steps: iterations; 5 as released.

    Raises:
        ValueError: if the sizes do not add up to the size of the system.
    """

    sizes: tuple[int, ...]
    max_steps: int = 5

    requires_symmetric: ClassVar[bool] = True
    uses_initial: ClassVar[bool] = False

    def solve(self, op: Any, b: Tensor, *, x0: Tensor | None = None) -> hg.Solution:
        """Return the heuristic's x for A x = b; `x0` must be None."""
        if sum(self.sizes) != b.numel() or x0 is not None:
            raise ValueError(
                f"LayerwiseCG: tensors of sizes {self.sizes} hold {sum(self.sizes)} numbers, the system has {b.numel()}"
                "; give the sizes of the responding tensors, and no x0."
            )
        block = torch.repeat_interleave(torch.tensor(self.sizes, device=b.device))

        def dots(u: Tensor, v: Tensor) -> Tensor:
            return torch.zeros(len(self.sizes), dtype=b.dtype, device=b.device).index_add(0, block, u * v)

        x, r, p = torch.zeros_like(b), b, b
        rr, live = dots(r, r), torch.ones(len(self.sizes), dtype=torch.bool, device=b.device)
        for _ in range(self.max_steps):
            product = op.mv(p)
            curvature = dots(p, product)
            live = live & (curvature > 0) & (rr > 0)
            a = torch.where(live, rr / torch.where(live, curvature, 1.0), 0.0)[block]
            x, r = x + a * p, r - a * product
            new = dots(r, r)
            p = r + torch.where(live, new / torch.where(live, rr, 1.0), 0.0)[block] * p
            rr = new
        residual = (b - op.mv(x)).norm()
        steps = torch.full((), self.max_steps, dtype=torch.int64, device=b.device)
        finite = residual.isfinite()
        code = torch.where(finite, int(hg.Result.MAX_STEPS), int(hg.Result.NON_FINITE))
        return hg.Solution(x=x, result=code, num_steps=steps, num_products=steps + 1, residual_norm=residual)
