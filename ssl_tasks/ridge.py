"""A linear probe in closed form: what features are worth on held-out labels, as a loss that an upper level can take."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def ridge_probe(features: Tensor, labels: Tensor, *, num_classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Return the held-out squared error of a ridge classifier on `features`, and its accuracy, a share.

    The first half of the rows fits, the second half measures. With Z the features scaled to mean zero and variance one
    over the first half, Y the one-hot labels less their mean y over it, n its rows, and ' for the second half,

        W = (Z^T Z / n + penalty I)^-1 Z^T Y / n,    error = 1/n' sum_i |Z'_i W + y - onehot(labels'_i)|^2 .

    The head is solved for, not trained: no warm-up, nothing stale, and the error is a smooth function of the features.
    An encoder that knows nothing has an error of about 1 - 1/num_classes.

    Args:
        features: of labelled images, (n, dim).
        labels: int64, (n,).
        num_classes: how many there are.
        penalty: positive; relative to the features' variance.

    Raises:
        ValueError: for fewer than four rows, or a penalty that is not positive.

    Example:
        >>> import torch
        >>> features, labels = torch.eye(2).repeat(8, 1), torch.tensor([0, 1] * 8)
        >>> error, accuracy = ridge_probe(features, labels, num_classes=2, penalty=1e-3)
        >>> bool(error < 1e-5), float(accuracy)
        (True, 1.0)

    Reference: Bertinetto, Henriques, Torr and Vedaldi, *Meta-learning with differentiable closed-form solvers*, ICLR
        2019, arXiv 1805.08136.
    """
    rows = len(features) // 2
    if rows < 2 or penalty <= 0:
        raise ValueError(
            f"ridge_probe wants at least four labelled images and a positive penalty, got {len(features)} and "
            f"{penalty}."
        )
    fit, held_out = features[:rows], features[rows:]
    mean = fit.mean(0)
    scale = (fit.var(0, correction=0) + 1e-8).sqrt()
    z, measured = (fit - mean) / scale, (held_out - mean) / scale
    onehot = F.one_hot(labels, num_classes).to(features.dtype)
    centre = onehot[:rows].mean(0)
    gram = z.T @ z / rows + penalty * torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    weight = torch.linalg.solve(gram, z.T @ (onehot[:rows] - centre) / rows)
    predicted = measured @ weight + centre
    error = (predicted - onehot[rows:]).square().sum(1).mean()
    return error, (predicted.argmax(1) == labels[rows:]).to(features.dtype).mean()
