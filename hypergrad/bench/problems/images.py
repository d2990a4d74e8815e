"""The embedded images: 6,000 training and 2,000 test images of Fashion-MNIST."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_FILE = Path(__file__).resolve().parents[3] / "ssl_tasks" / "data" / "fashion-mnist-subset.npz"


@lru_cache(maxsize=2)
def fashion(split: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return the images of `split`, "train" or "test", (n, 28, 28) in [0, 1], and their labels, in one fixed shuffle.

    Raises:
        FileNotFoundError: if the data file is not where the distribution puts it.
    """
    with np.load(_FILE) as arrays:
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    order = np.random.RandomState(0).permutation(len(labels))
    return torch.from_numpy(images[order]).to(dtype) / 255, torch.from_numpy(labels[order].astype(np.int64))
