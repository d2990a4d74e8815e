"""Options are checked at construction; decay and maximize are told to those who ask."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from hypergrad.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, Decay, NAdam, Opaque, RAdam, RMSprop

BAD: list[tuple[type, dict[str, Any], str]] = [
    (SGD, {"lr": -1.0}, r"SGD: lr must be a number of at least 0, or a tensor, got -1.0"),
    (SGD, {"lr": float("nan")}, r"SGD: lr .* got nan"),
    (SGD, {"lr": "fast"}, r"SGD: lr .* got 'fast'"),
    (SGD, {"momentum": -0.1}, r"SGD: momentum .* got -0.1"),
    (SGD, {"weight_decay": -0.1}, r"SGD: weight_decay .* got -0.1"),
    (SGD, {"nesterov": True}, r"nesterov needs a momentum above 0 .* got momentum=0.0, dampening=0.0"),
    (SGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, r"nesterov .* dampening=0.1"),
    *[
        (kind, options, f"{kind.__name__}: {pattern}")
        for kind in (Adam, AdamW, NAdam, RAdam, Adamax)
        for options, pattern in [
            ({"lr": -1.0}, r"lr .* got -1.0"),
            ({"betas": (0.9, 1.0)}, r"betas\[1\] must be a number of at least 0 and below 1, .* got 1.0"),
            ({"betas": (-0.1, 0.9)}, r"betas\[0\] .* got -0.1"),
            ({"betas": (0.1,)}, r"betas must be a pair \(beta1, beta2\), got \(0.1,\)"),
            ({"eps": -1e-8}, r"eps .* got -1e-08"),
            ({"weight_decay": -1.0}, r"weight_decay .* got -1.0"),
        ]
    ],
    (NAdam, {"momentum_decay": -1.0}, r"NAdam: momentum_decay .* got -1.0"),
    (RMSprop, {"lr": -1.0}, r"RMSprop: lr .* got -1.0"),
    (RMSprop, {"alpha": -1.0}, r"RMSprop: alpha .* got -1.0"),
    (RMSprop, {"eps": -1.0}, r"RMSprop: eps .* got -1.0"),
    (RMSprop, {"momentum": -1.0}, r"RMSprop: momentum .* got -1.0"),
    (RMSprop, {"weight_decay": -1.0}, r"RMSprop: weight_decay .* got -1.0"),
    (Adagrad, {"lr": -1.0}, r"Adagrad: lr .* got -1.0"),
    (Adagrad, {"lr_decay": -1.0}, r"Adagrad: lr_decay .* got -1.0"),
    (Adagrad, {"weight_decay": -1.0}, r"Adagrad: weight_decay .* got -1.0"),
    (Adagrad, {"initial_accumulator_value": -1.0}, r"Adagrad: initial_accumulator_value .* got -1.0"),
    (Adagrad, {"eps": -1.0}, r"Adagrad: eps .* got -1.0"),
    (Adadelta, {"lr": -1.0}, r"Adadelta: lr .* got -1.0"),
    (Adadelta, {"rho": 1.5}, r"Adadelta: rho must be a number of at least 0 and at most 1, .* got 1.5"),
    (Adadelta, {"eps": -1.0}, r"Adadelta: eps .* got -1.0"),
    (Adadelta, {"weight_decay": -1.0}, r"Adadelta: weight_decay .* got -1.0"),
]


@pytest.mark.parametrize(("kind", "options", "pattern"), BAD, ids=lambda value: str(value)[:40])
def test_a_bad_option_is_refused_by_name_and_value(kind: type, options: dict[str, Any], pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        kind(**options)


KINDS = (SGD, Adam, AdamW, NAdam, RAdam, Adamax, RMSprop, Adagrad, Adadelta)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_accepted_unread(kind: type) -> None:
    tensor = torch.empty((), device="meta")
    assert kind(lr=tensor, weight_decay=tensor).lr is tensor


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_are_those_of_torch(kind: type) -> None:
    defaults = getattr(torch.optim, kind.__name__)([torch.zeros(1)]).defaults
    optimizer = kind()
    fields = {field.name: getattr(optimizer, field.name) for field in dataclasses.fields(optimizer)}
    if kind is AdamW:
        assert defaults.pop("decoupled_weight_decay", True)
    assert {name: defaults[name] for name in fields if name in defaults} == fields


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        *[(kind(weight_decay=0.3), Decay(coupled=0.3)) for kind in KINDS if kind is not AdamW],
        *[(kind(weight_decay=0.3, decoupled_weight_decay=True), Decay(decoupled=0.3)) for kind in (Adam, NAdam, RAdam)],
        (AdamW(weight_decay=0.3), Decay(decoupled=0.3)),
        (Opaque(of="LBFGS", coupled=0.1), Decay(coupled=0.1)),
    ],
    ids=str,
)
def test_decay_tells_where_it_enters(optimizer: Any, expected: Decay) -> None:
    assert optimizer.decay() == expected
    if not isinstance(optimizer, Opaque):
        replaced = optimizer.decay({"weight_decay": 0.7})
        assert (replaced.coupled, replaced.decoupled) in ((0.7, 0.0), (0.0, 0.7))
