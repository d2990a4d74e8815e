"""Fixtures of the optimizers' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def default_float64() -> Iterator[None]:
    """NAdam keeps its product in torch's default dtype, not the parameters'."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
