"""Self-supervised losses: pure functions of embeddings, differentiable twice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def nt_xent(first: Tensor, second: Tensor, *, temperature: float = 0.5) -> Tensor:
    """Return SimCLR's contrastive loss of two views' embeddings, a scalar.

    With z the 2n rows of `first` and `second` scaled to unit length, s_ij = <z_i, z_j> / temperature and p(i)
    the other view of image i,

        loss = 1/(2n) sum_i [ log sum_{j != i} exp(s_ij) - s_{i, p(i)} ].

    Cost: one product of 2n x d with d x 2n, and a softmax over 2n x 2n.

    Args:
        first: embeddings of one view, (n, d).
        second: embeddings of the other view, row by row of the same images.
        temperature: positive; the smaller, the more the hardest negatives count.

    Returns:
        The mean over all 2n anchors.

    Raises:
        ValueError: if the shapes differ or are not (n, d), or the temperature is not positive.

    Example:
        >>> import torch
        >>> z = torch.eye(4, dtype=torch.float64)
        >>> round(float(nt_xent(z, z, temperature=0.5)), 6)  # log(e^2 + 6) - 2: six orthogonal negatives
        0.594438

    Reference: Chen, Kornblith, Norouzi and Hinton, *A Simple Framework for Contrastive Learning of Visual
    Representations*, 2020, arXiv 2002.05709.
    """
    if first.shape != second.shape or first.dim() != 2:
        raise ValueError(
            f"nt_xent wants two tensors of one shape (n, d), got {tuple(first.shape)} and {tuple(second.shape)}."
        )
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    n = first.shape[0]
    z = F.normalize(torch.cat([first, second]), dim=1)
    similarity = z @ z.T / temperature
    # a large finite number, not -inf: 0 * inf would be NaN in the second derivative
    itself = torch.eye(2 * n, dtype=torch.bool, device=z.device)
    similarity = similarity.masked_fill(itself, torch.finfo(z.dtype).min / 2)
    other_view = torch.arange(2 * n, device=z.device).roll(n)
    return F.cross_entropy(similarity, other_view)
