"""Self-supervised losses: pure functions of embeddings, differentiable twice, safe under `torch.vmap`."""

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
    _check_pair("nt_xent", first, second)
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    n = first.shape[0]
    z = unit(torch.cat([first, second]))
    similarity = z @ z.T / temperature
    # a large finite number, not -inf: 0 * inf would be NaN in the second derivative
    never = torch.full((2 * n,), torch.finfo(similarity.dtype).min / 2, dtype=similarity.dtype, device=z.device)
    log_p = F.log_softmax(similarity + torch.diag(never), 1)
    return -torch.cat([log_p.diagonal(n), log_p.diagonal(-n)]).mean()


def byol(predicted: Tensor, target: Tensor) -> Tensor:
    """Return BYOL's regression loss, mean_i ||p_i/|p_i| - t_i/|t_i|||^2 = 2 - 2 mean_i cos(p_i, t_i).

    The caller sees to it that `target` is a constant: embeddings of the moving-average network.

    Args:
        predicted: the predictor's outputs for one view, (n, d).
        target: the target network's embeddings of the other view, (n, d).

    Raises:
        ValueError: if the shapes differ or are not (n, d).

    Example:
        >>> import torch
        >>> float(byol(torch.eye(2), 3 * torch.eye(2)))
        0.0

    Reference: Grill et al., *Bootstrap Your Own Latent*, 2020, arXiv 2006.07733.
    """
    _check_pair("byol", predicted, target)
    return 2 - 2 * (unit(predicted) * unit(target)).sum(1).mean()


def barlow_twins(first: Tensor, second: Tensor, *, off_diagonal: float = 0.0051) -> Tensor:
    """Return Barlow Twins' loss, sum_i (1 - C_ii)^2 + off_diagonal sum_{i != j} C_ij^2.

    C is the d x d correlation of the two views' embeddings over the batch, each coordinate scaled to mean zero and
    variance one.

    Args:
        first: embeddings of one view, (n, d).
        second: embeddings of the other view, row by row of the same images.
        off_diagonal: weight of the redundancy term; the paper's default.

    Raises:
        ValueError: if the shapes differ or are not (n, d).

    Example:
        >>> import torch
        >>> z = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        >>> round(float(barlow_twins(z, z)), 6)  # two uncorrelated coordinates: C is the identity
        0.0

    Reference: Zbontar, Jing, Misra, LeCun and Deny, *Barlow Twins*, 2021, arXiv 2103.03230.
    """
    _check_pair("barlow_twins", first, second)
    a, b = (_standardized(z) for z in (first, second))
    correlation = a.T @ b / a.shape[0]
    diagonal = torch.diagonal(correlation)
    redundancy = correlation.square().sum() - diagonal.square().sum()
    return (1 - diagonal).square().sum() + off_diagonal * redundancy


def vicreg(
    first: Tensor, second: Tensor, *, invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0
) -> Tensor:
    """Return VICReg's loss: views alike, every coordinate's deviation at least one, coordinates uncorrelated.

        invariance mean ||z - z'||^2 / d + variance (v(z) + v(z')) / 2 + covariance (c(z) + c(z')),

    v(z) = mean_j max(0, 1 - std(z_j)), c(z) = sum_{i != j} Cov(z)_ij^2 / d.

    Args:
        first: embeddings of one view, (n, d).
        second: embeddings of the other view, row by row of the same images.
        invariance: weight of the first term.
        variance: weight of the second.
        covariance: weight of the third.

    Raises:
        ValueError: if the shapes differ or are not (n, d).

    Example:
        >>> import torch
        >>> z = torch.tensor([[3.0, 3.0], [-3.0, 3.0], [3.0, -3.0], [-3.0, -3.0]], dtype=torch.float64)
        >>> float(vicreg(z, z))
        0.0

    Reference: Bardes, Ponce and LeCun, *VICReg*, 2021, arXiv 2105.04906.
    """
    _check_pair("vicreg", first, second)
    n, d = first.shape
    loss = invariance * (first - second).square().mean()
    for z in (first, second):
        centred = z - z.mean(0)
        deviation = (centred.square().sum(0) / (n - 1) + 1e-4).sqrt()
        matrix = centred.T @ centred / (n - 1)
        outside = matrix.square().sum() - torch.diagonal(matrix).square().sum()
        loss = loss + variance / 2 * F.relu(1 - deviation).mean() + covariance * outside / d
    return loss


def reconstruction(output: Tensor, images: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the weighted mean squared error of reconstructed images.

        sum_i w_i (output_i - images_i)^2 / sum_i w_i over all samples and pixels; w = 1 without `weight`.

    Args:
        output: what a decoder made, of the images' shape.
        images: the images.
        weight: non-negative, broadcastable to the images: 1 where a pixel was hidden, or learned weights.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> import torch
        >>> float(reconstruction(torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)))
        1.0
    """
    if output.shape != images.shape:
        raise ValueError(
            f"reconstruction wants outputs of the images' shape {tuple(images.shape)}, got {tuple(output.shape)}."
        )
    error = (output - images).square()
    if weight is None:
        return error.mean()
    weight = weight.expand(error.shape)
    return (weight * error).sum() / weight.sum().clamp_min(torch.finfo(error.dtype).tiny)


def divergence(target: Tensor, student: Tensor, *, reverse: bool = False) -> Tensor:
    """Return the mean Kullback-Leibler divergence of rows of logits: KL(target || student), or turned round.

    Args:
        target: logits, (n, classes); the caller detaches what is to be a constant.
        student: logits, (n, classes).
        reverse: KL(student || target) instead.

    Raises:
        ValueError: if the shapes differ or are not (n, classes).

    Example:
        >>> import torch
        >>> float(divergence(torch.zeros(3, 4), torch.ones(3, 4)))  # softmax does not see a constant
        0.0
    """
    _check_pair("divergence", target, student)
    p, q = (target, student) if not reverse else (student, target)
    log_p, log_q = F.log_softmax(p, 1), F.log_softmax(q, 1)
    return (log_p.exp() * (log_p - log_q)).sum(1).mean()


def unit(z: Tensor) -> Tensor:
    """Return the rows of z scaled to unit length, (n, d), by z / sqrt(|z|^2 + 1e-12): a row of zeros stays one.

    Unlike `F.normalize` it is smooth, so that all derivatives are finite, and made of fewer operations.

    Args:
        z: embeddings, (n, d).

    Example:
        >>> import torch
        >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    return z * (z.square().sum(1, keepdim=True) + 1e-12).rsqrt()


def _standardized(z: Tensor) -> Tensor:
    centred = z - z.mean(0)
    return centred / (centred.square().mean(0) + 1e-12).sqrt()


def _check_pair(name: str, first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape or first.dim() != 2:
        raise ValueError(
            f"{name} wants two tensors of one shape (n, d), got {tuple(first.shape)} and {tuple(second.shape)}."
        )
