"""The table of optimizers and flags that the tests of this folder run over, and the problem they run on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hypergrad import optim
from hypergrad.optim import Optimizer, State

Case = tuple[str, dict[str, Any]]

CASES: list[Case] = [
    ("SGD", {}),
    ("SGD", {"lr": 0.1, "weight_decay": 0.3}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.4, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.8, "dampening": 0.2, "maximize": True, "weight_decay": 0.1}),
    ("Adam", {}),
    ("Adam", {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3}),
    ("Adam", {"lr": 0.1, "weight_decay": 0.2, "maximize": True}),
    ("Adam", {"lr": 0.1, "betas": (0.5, 0.6), "amsgrad": True, "weight_decay": 0.2}),
    ("Adam", {"lr": 0.1, "weight_decay": 0.2, "decoupled_weight_decay": True}),
    ("AdamW", {}),
    ("AdamW", {"lr": 0.1, "weight_decay": 0.2, "maximize": True, "amsgrad": True, "betas": (0.7, 0.6)}),
    ("NAdam", {}),
    ("NAdam", {"lr": 0.1, "betas": (0.8, 0.95), "momentum_decay": 0.3, "weight_decay": 0.2}),
    ("NAdam", {"lr": 0.1, "weight_decay": 0.2, "decoupled_weight_decay": True, "maximize": True}),
    ("RAdam", {}),
    ("RAdam", {"lr": 0.1, "betas": (0.8, 0.95), "weight_decay": 0.2, "maximize": True}),
    ("RAdam", {"lr": 0.1, "betas": (0.8, 0.6), "eps": 1e-3}),  # rho never exceeds 5
    ("RAdam", {"lr": 0.1, "weight_decay": 0.2, "decoupled_weight_decay": True}),
    ("Adamax", {}),
    ("Adamax", {"lr": 0.1, "betas": (0.8, 0.7), "weight_decay": 0.2, "eps": 1e-3, "maximize": True}),
    ("RMSprop", {}),
    ("RMSprop", {"lr": 0.1, "alpha": 0.8, "eps": 1e-3, "weight_decay": 0.2, "maximize": True}),
    ("RMSprop", {"lr": 0.1, "momentum": 0.8}),
    ("RMSprop", {"lr": 0.1, "alpha": 0.8, "centered": True}),
    ("RMSprop", {"lr": 0.1, "alpha": 0.8, "centered": True, "momentum": 0.8, "weight_decay": 0.2}),
    ("Adagrad", {}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.3, "weight_decay": 0.2, "maximize": True}),
    ("Adagrad", {"lr": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-3}),
    ("Adadelta", {}),
    ("Adadelta", {"lr": 0.5, "rho": 0.8, "eps": 1e-3, "weight_decay": 0.2, "maximize": True}),
]

# Values at which every hyperparameter has a visible derivative, and eight steps meet no change of sign.
HYPER = {
    "lr": 0.05,
    "weight_decay": 0.13,
    "momentum": 0.8,
    "dampening": 0.3,
    "beta1": 0.8,
    "beta2": 0.9,
    "eps": 1e-1,
    "alpha": 0.8,
    "rho": 0.8,
    "lr_decay": 0.3,
    "momentum_decay": 0.3,
}

# One optimizer for each piece of code that a derivative passes through.
SMOOTH: list[Case] = [
    ("SGD", {}),
    ("SGD", {"momentum": 0.5}),
    ("SGD", {"momentum": 0.5, "nesterov": True, "maximize": True}),
    ("Adam", {}),
    ("Adam", {"amsgrad": True, "decoupled_weight_decay": True, "maximize": True}),
    ("AdamW", {}),
    ("NAdam", {}),
    ("NAdam", {"decoupled_weight_decay": True}),
    ("RAdam", {}),
    ("RAdam", {"decoupled_weight_decay": True}),
    ("Adamax", {}),
    ("RMSprop", {"momentum": 0.5}),
    ("RMSprop", {"centered": True}),
    ("Adagrad", {"initial_accumulator_value": 0.1}),
    ("Adagrad", {}),
    ("Adadelta", {}),
]


def case_id(case: Case) -> str:
    name, options = case
    return "-".join([name, *(f"{key}={value}" for key, value in options.items())])


def ours(case: Case) -> Optimizer:
    name, options = case
    optimizer: Optimizer = getattr(optim, name)(**options)
    return optimizer


def torchs(case: Case, params: Any) -> torch.optim.Optimizer:
    name, options = case
    optimizer: torch.optim.Optimizer = getattr(torch.optim, name)(params, **options)
    return optimizer


def hypers(optimizer: Optimizer) -> dict[str, Tensor]:
    """A tensor for every hyperparameter that the optimizer takes; nesterov has no dampening."""
    names = sorted(optimizer.accepts() - ({"dampening"} if getattr(optimizer, "nesterov", False) else set()))
    return {name: torch.tensor(HYPER[name], dtype=torch.float64) for name in names}


def start(size: int = 5) -> Tensor:
    return torch.linspace(-1.0, 1.5, size, dtype=torch.float64)


def gradient(params: Tensor) -> Tensor:
    """A nonlinear gradient that the last coordinate neither has nor influences; its root is far away."""
    index = torch.arange(params.numel(), dtype=params.dtype)
    live = (index < params.numel() - 1).to(params.dtype)
    target = 4.0 * torch.cos(torch.pi * index)
    return live * ((0.3 + 0.2 * index) * (params - target) + 0.3 * torch.sin(2.0 * (live * params).roll(1)))


def run(optimizer: Optimizer, params: Tensor, hyper: dict[str, Tensor], steps: int = 8) -> tuple[Tensor, State]:
    """`steps` steps from `params`; eight reach both of RAdam's branches."""
    state = optimizer.init(params)
    for _ in range(steps):
        params, state = optimizer.update(params, gradient(params), state, hyper)
    return params, state
