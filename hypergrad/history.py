"""What a run reports, step by step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Record(dict[str, Any]):
    """One step of the top level: values under "problem.quantity", tensors until someone reads them."""

    def __init__(self, step: int) -> None:
        """Begin the record of step `step`."""
        super().__init__(step=step)

    def put(self, problem: str, quantity: str, value: Any) -> None:
        """Store a value; tensors are copied, and those on the CPU become numbers at once, which is free there."""
        if isinstance(value, Tensor):
            host = type(value) in (Tensor, nn.Parameter) and value.device.type == "cpu" and value.numel() == 1
            value = value.item() if host else value.detach().clone()  # it may be a parameter, which moves on
        self[f"{problem}.{quantity}"] = value

    def numbers(self, keys: Iterable[str] | None = None) -> dict[str, float]:
        """Return the values under `keys` (default: all) as numbers, by one transfer from each device they lie on.

        What is no number, a string or a tensor of several entries, is left out.
        """
        found = {key: self[key] for key in (self if keys is None else keys)}
        numbers = {key: float(v) for key, v in found.items() if isinstance(v, (int, float))}
        waiting: dict[torch.device, dict[str, Tensor]] = {}
        for key, value in found.items():
            if isinstance(value, Tensor) and value.numel() == 1:
                waiting.setdefault(value.device, {})[key] = value
        for device, tensors in waiting.items():
            dtype = torch.float32 if device.type == "mps" else torch.float64
            read = torch.stack([t.detach().reshape(()).to(dtype) for t in tensors.values()]).tolist()
            numbers.update(zip(tensors, read, strict=True))
        return {key: numbers[key] for key in found if key in numbers}

    def read(self, key: str) -> float:
        """Return one value as a number, read back from the device if need be."""
        value = self[key]
        return float(value)


class History(list[Record]):
    """The records of a run, oldest first; `history["problem.loss"]` is one quantity as a list of numbers."""

    def __getitem__(self, key: Any) -> Any:
        """Return a record by index, or the values of one quantity by name."""
        if isinstance(key, str):
            values = [record.read(key) for record in self if key in record]
            if not values:
                known = sorted({k for record in self for k in record})
                raise KeyError(f"no quantity {key!r} in this history; it has {known}")
            return values
        return super().__getitem__(key)

    def keys(self) -> Iterator[str]:
        """Yield the names of the quantities recorded."""
        yield from dict.fromkeys(key for record in self for key in record)
