"""Every method, solver and optimizer on a device that is not there; run by `test_foreign_device.py`.

Registering a Python-backed device changes the process for good, so this is a script. Fake tensors on that device
refuse operations over several devices and reading values back; `OneDevice` refuses copies to another device too, and
any operation that touches the CPU. Prints one JSON object: the error of each case, or null.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from typing import Any

import device_cases as cases
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import hypergrad as hg

_setup_privateuseone_for_python_backend("toy")
DEVICE = torch.device("toy:0")
READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "item", "masked_select", "unique")


class ReadsInBackward(torch.autograd.Function):
    """Reads a value back where autograd's own thread would run it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * grad.sum().item()


class OneDevice(TorchDispatchMode):
    """Refuses every operation that reads a value back or has a tensor elsewhere than on DEVICE."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in READS:
            raise AssertionError(f"{func} reads a value back")
        result = func(*args, **(kwargs or {}))
        for value in pytree.tree_leaves((args, kwargs, result)):
            if isinstance(value, Tensor) and value.device != DEVICE:
                raise AssertionError(f"{func} has a tensor on {value.device}")
        return result


def hypergradient(
    method: hg.Method,
    optimizer: hg.optim.Optimizer = cases.OPTIMIZERS["Adam"],
    loss: Any = cases.lower_loss,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> hg.Hypergradient:
    lower, upper = cases.parameters(DEVICE, dtype)
    batches = [cases.data(DEVICE, dtype) for _ in range(3)]
    traj = hg.descend(
        loss, lower, upper, optimizer=optimizer, batches=batches, recording=method.recording(3), **options
    )
    h = hg.hypergradient(cases.upper_loss, traj, upper, method=method, batch=batches[0], throw=False)
    if h.state is not None:
        h = hg.hypergradient(cases.upper_loss, traj, upper, method=method, batch=batches[0], throw=False, state=h.state)
    check(h)
    return h


def solved(method: hg.Method) -> None:
    lower, upper = cases.parameters(DEVICE, torch.float32)
    traj = hg.solved(cases.lower_loss, lower, cases.data(DEVICE, torch.float32))
    check(
        hg.hypergradient(
            cases.upper_loss, traj, upper, method=method, batch=cases.data(DEVICE, torch.float32), throw=False
        )
    )


def root(method: hg.Method) -> None:
    lower, upper = cases.parameters(DEVICE, torch.float32)

    def F(w: cases.Params, u: cases.Params, batch: Any) -> cases.Params:
        grads = torch.func.grad(cases.lower_loss)(w, u, batch)
        return {name: w[name] - torch.tanh(w[name] - grads[name]) for name in w}

    traj = hg.solved_root(F, lower, cases.data(DEVICE, torch.float32))
    check(
        hg.hypergradient(
            cases.upper_loss, traj, upper, method=method, batch=cases.data(DEVICE, torch.float32), throw=False
        )
    )


def response(method: hg.Method) -> None:
    lower, upper = cases.parameters(DEVICE, torch.float32)
    upper = {name: u.requires_grad_() for name, u in upper.items()}
    batch = cases.data(DEVICE, torch.float32)
    traj = hg.descend(cases.lower_loss, lower, upper, optimizer=cases.OPTIMIZERS["SGD"], batches=[batch] * 3)
    end = hg.best_response(traj, upper, method=method, throw=False)
    grads = torch.autograd.grad(cases.upper_loss(end, upper, batch), list(upper.values()), create_graph=True)
    torch.autograd.grad(sum((g**2).sum() for g in grads), list(upper.values()))


def check(h: hg.Hypergradient) -> None:
    for value in pytree.tree_leaves(h):
        assert isinstance(value, Tensor) and value.device == DEVICE, value
    assert h.result.dtype == torch.int64


def table() -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {}
    for name, method in cases.methods(None).items():
        found[name] = lambda m=method: hypergradient(m)
    for name in ("CG", "MINRES", "GMRES"):
        auto = cases.solvers("auto")[name]
        found[f"{name} check_every=auto"] = lambda s=auto: hypergradient(hg.Implicit(s))
    for name, optimizer in cases.OPTIMIZERS.items():
        found[f"Unrolled {name}"] = lambda o=optimizer: hypergradient(hg.Unrolled(), o)
        found[f"SAMA {name}"] = lambda o=optimizer: hypergradient(hg.SAMA(), o)
    for name in ("SGD-schedule", "RAdam", "Adagrad"):
        kept = cases.OPTIMIZERS[name]
        found[f"OneStep {name}"] = lambda o=kept: hypergradient(hg.OneStep(), o)
        found[f"Implicit {name}"] = lambda o=kept: hypergradient(hg.Implicit(hg.CG(2)), o)
    for name, solver in cases.solvers().items():
        if name != "CG-second-moment":
            found[f"solved {name}"] = lambda s=solver: solved(hg.Implicit(s))
        if not solver.requires_symmetric:
            found[f"solved_root {name}"] = lambda s=solver: root(hg.Implicit(s))
    gauss_newton = hg.Implicit(hg.CG(3), curvature="gauss_newton")
    found["gauss_newton"] = lambda: hypergradient(gauss_newton, loss=cases.composite)
    half = hg.Implicit(hg.CG(3))
    found["bfloat16 Implicit"] = lambda: hypergradient(half, dtype=torch.bfloat16)
    found["bfloat16 Unrolled"] = lambda: hypergradient(hg.Unrolled(), dtype=torch.bfloat16)
    sgd = cases.OPTIMIZERS["SGD-momentum"]
    for name, options in {
        "hyper": {"hyper": {"lr": lambda u: 0.1 * u["decay"].exp()}},
        "clip_norm": {"clip_norm": 1.0},
        "clip_value": {"clip_value": 0.1},
        "project": {"project": lambda p: {k: v.clamp(-1, 1) for k, v in p.items()}},
        "start": {"start": lambda u: {"a": u["shift"][:1, None].expand(5, 3), "b": u["shift"][:3]}},
    }.items():
        found[f"Unrolled {name}"] = lambda o=options: hypergradient(hg.Unrolled(), sgd, **o)
    found["ForwardUnrolled hyper"] = lambda: hypergradient(
        hg.ForwardUnrolled(), sgd, hyper={"lr": lambda u: 0.1 * u["decay"].exp()}
    )
    for method in (hg.Implicit(hg.CG(3)), hg.Unrolled()):
        found[f"best_response twice {type(method).__name__}"] = lambda m=method: response(m)
    return found


def read_in_backward() -> None:
    leaf = torch.ones(3, device=DEVICE, requires_grad=True)
    ReadsInBackward.apply(leaf).sum().backward()


def controls() -> dict[str, Callable[[], Any]]:
    """Return what must fail, or the cases prove nothing."""
    return {
        "item": lambda: torch.ones((), device=DEVICE).item(),
        "bool": lambda: bool(torch.ones((), device=DEVICE) > 0),
        "nonzero": lambda: torch.ones(3, device=DEVICE).nonzero(),
        "tolist": lambda: torch.ones(3, device=DEVICE).tolist(),
        "cpu": lambda: torch.ones(3, device=DEVICE).cpu(),
        "constant on the CPU": lambda: torch.ones(3, device=DEVICE) * torch.tensor(2.0),
        "mixed": lambda: torch.ones(3, device=DEVICE) + torch.ones(3),
        "item in a backward": read_in_backward,
        "throw=True": lambda: hg.hypergradient(
            cases.upper_loss,
            hg.solved(cases.lower_loss, cases.parameters(DEVICE)[0], cases.data(DEVICE)),
            cases.parameters(DEVICE)[1],
            method=hg.Implicit(hg.CG(2)),
            batch=cases.data(DEVICE),
        ),
        "check_every": lambda: hypergradient(hg.Implicit(hg.CG(2, check_every=1))),
    }


def error(case: Callable[[], Any]) -> str | None:
    try:
        with FakeTensorMode(), OneDevice():
            case()
    except Exception:
        return traceback.format_exc(limit=-6)
    return None


if __name__ == "__main__":
    report = {
        "cases": {name: error(case) for name, case in table().items()},
        "controls": {name: error(case) for name, case in controls().items()},
    }
    print(json.dumps(report), flush=True)
    os._exit(0)  # autograd has a thread for the device, which may abort an orderly exit
