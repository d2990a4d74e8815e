"""Every mistake in the functional interface is a clear error that names the culprit, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import hypergrad as hg

NAN, INF = float("nan"), float("inf")
W, U = {"w": torch.zeros(2)}, {"c": torch.ones(2)}
SGD = hg.optim.SGD(lr=0.25)
CG = hg.Implicit(hg.CG(5))
TWO = {**U, "s": torch.ones(2)}
DOTTED = {f"m.{name}": u for name, u in TWO.items()}
BEGIN_ANYWHERE = [
    CG,
    hg.OneStep(),
    hg.FiniteDifference(),
    hg.Penalty(),
    hg.SOBA(),
    hg.AmIGO(),
    hg.StocBiO(),
    hg.F2SA(),
    hg.BOME(),
]
"""Methods that ignore where a run begins."""


def lower_loss(w: Any, u: Any, b: Any) -> Tensor:
    return ((w["w"] - u["c"]) ** 2).sum() * (1 if b is None else b)


def upper_loss(w: Any, u: Any, b: Any) -> Tensor:
    return (w["w"] ** 2).sum()


def root(w: Any, u: Any, b: Any) -> Any:
    return {"w": w["w"] - u["c"]}


def blind(w: Any, u: Any, b: Any) -> Tensor:
    return (w["w"] ** 2).sum()


def run(loss: Any = lower_loss, lower: Any = W, upper: Any = U, **options: Any) -> hg.Trajectory:
    return hg.descend(loss, lower, upper, **{"optimizer": SGD, "batches": [None] * 3, **options})


def gradient(traj: Any = None, method: Any = CG, upper: Any = U, loss: Any = upper_loss, **options: Any) -> Any:
    return hg.hypergradient(loss, run() if traj is None else traj, upper, method=method, **options)


def population(method: hg.Method, **options: Any) -> Any:
    return torch.func.vmap(lambda c: gradient(run(upper={"c": c}), method, {"c": c}, **options).grad["c"])(
        torch.ones(2, 2)
    )


def second(method: hg.Method) -> Any:
    def total(c: Tensor) -> Tensor:
        thinned = run(upper={"c": c}, recording=CG.recording(3))
        return upper_loss(hg.best_response(thinned, {"c": c}, method=method), U, None)

    return torch.autograd.functional.hessian(total, U["c"])


def other_adam() -> Any:
    return run(blind, {"w": torch.zeros(3)}, optimizer=hg.optim.Adam(lr=0.1)).state


def refilled() -> Iterator[Tensor]:
    buffer = torch.zeros(())
    for step in range(3):
        yield buffer.fill_(step)


def jacobian(method: hg.Method) -> Any:
    return torch.autograd.functional.jacobian(
        lambda c: hg.best_response(run(), {"c": c}, method=method)["w"], U["c"], vectorize=True
    )


def groups(*shapes: int) -> Any:
    return torch.optim.SGD([{"params": [torch.zeros(n, requires_grad=True)]} for n in shapes], lr=0.1)


ROWS: dict[str, tuple[Callable[[], Any], str]] = {
    # parameters
    "lower is a tensor": (lambda: run(lower=torch.zeros(2)), r"lower must be a dict\[str, Tensor\], got Tensor"),
    "lower is empty": (lambda: run(lower={}), "lower is empty"),
    "lower holds integers": (lambda: run(lower={"w": torch.zeros(2).long()}), r"lower\['w'\] has dtype torch.int64"),
    "lower holds a list": (lambda: run(lower={"w": [1.0]}), r"lower\['w'\] must be a Tensor, got list"),
    "lower is sparse": (lambda: run(lower={"w": torch.eye(2).to_sparse()}), r"lower\['w'\].*only dense"),
    "upper is a tensor": (lambda: run(upper=torch.zeros(2)), "upper must be a dict"),
    "upper is empty": (lambda: run(upper={}), "upper is empty"),
    "upper is complex": (lambda: run(upper={"c": torch.zeros(2).cfloat()}), r"upper\['c'\] has dtype torch.complex64"),
    "solved at numbers": (lambda: hg.solved(lower_loss, {"w": 3}), r"lower\['w'\] must be a Tensor, got int"),
    "solved nowhere": (lambda: hg.solved(lower_loss, {}), "lower is empty"),
    "another upper": (lambda: gradient(upper={"d": torch.ones(2)}), r"upper lacks \['c'\]"),
    "upper of another shape": (
        lambda: gradient(upper={"c": torch.ones(3)}),
        r"upper\['c'\] has shape \(3,\), expected \(2,\)",
    ),
    # losses
    "a vector loss": (lambda: run(lambda w, u, b: w["w"]), r"the lower loss must return a scalar.*shape \(2,\)"),
    "a loss of one element": (lambda: run(lambda w, u, b: w["w"][:1]), r"0-dim.*shape \(1,\)"),
    "a float loss": (lambda: run(lambda w, u, b: 1.0), "the lower loss must return a scalar Tensor, got float"),
    "no loss": (lambda: run(lambda w, u, b: None), "got NoneType"),
    "a loss with metrics": (lambda: run(lambda w, u, b: (w["w"].sum(), {})), "got tuple"),
    "an integer loss": (lambda: run(lambda w, u, b: torch.tensor(1)), "floating-point scalar, got dtype torch.int64"),
    "a complex loss": (
        lambda: run(lambda w, u, b: w["w"].sum() * 1j),
        "floating-point scalar, got dtype torch.complex",
    ),
    "a detached loss": (lambda: run(lambda w, u, b: w["w"].detach().sum()), "does not depend on the lower parameters"),
    "a loss of upper alone": (lambda: run(lambda w, u, b: u["c"].sum()), "does not depend on the lower parameters"),
    "a loss that is no function": (lambda: run(3), "lower_loss must be a function, got int"),
    "solved without a loss": (lambda: hg.solved(3, W), "lower_loss must be a function"),
    "a root that is no function": (lambda: hg.solved_root(3, W), "F must be a function"),
    "an upper loss that is a vector": (
        lambda: gradient(loss=lambda w, u, b: w["w"]),
        "the upper loss must return a scalar",
    ),
    "a constant upper loss": (lambda: gradient(loss=lambda w, u, b: torch.tensor(1.0)), "depends neither on the lower"),
    "an upper loss that is no function": (lambda: gradient(loss=3), "upper_loss must be a function"),
    "an upper nothing reads": (lambda: gradient(hg.solved(blind, W)), r"nothing depends on upper=\['c'\]"),
    "unrolled, likewise": (lambda: gradient(run(blind), hg.Unrolled()), r"nothing depends on upper=\['c'\]"),
    "forward, likewise": (lambda: gradient(run(blind), hg.ForwardUnrolled()), r"nothing depends on upper=\['c'\]"),
    "penalty, likewise": (lambda: gradient(run(blind), hg.Penalty(5.0)), r"nothing depends on upper=\['c'\]"),
    "a composite of numbers": (lambda: hg.Composite(3, lambda z, b: z), "Composite: outputs must be a function"),
    # the run
    "no batches": (lambda: run(batches=[]), "batches is empty"),
    "a number of batches": (lambda: run(batches=3), r"one entry per lower step, got int.*\[b\] \* K"),
    "a dict for batches": (lambda: run(batches={"x": 1}), "got dict"),
    "a string for batches": (lambda: run(batches="abc"), "got str"),
    "a scalar for batches": (lambda: run(batches=torch.tensor(3.0)), "got Tensor"),
    "batches that refill a tensor": (
        lambda: run(batches=refilled()),
        r"batches: a tensor of batch 0 was changed.*batch.clone\(\)",
    ),
    "an optimizer class": (lambda: run(optimizer=hg.optim.SGD), "optimizer must be one of hypergrad.optim"),
    "an optimizer's name": (
        lambda: run(optimizer="sgd"),
        "optimizer must be one of hypergrad.optim or torch.optim, got str",
    ),
    "an unsupported optimizer": (
        lambda: run(optimizer=torch.optim.LBFGS([torch.zeros(2, requires_grad=True)])),
        "LBFGS cannot be differentiated.*Implicit",
    ),
    "foreign parameters": (lambda: run(optimizer=groups(7)), "holds tensors of shapes"),
    "foreign groups": (lambda: run(optimizer=groups(7, 2)), "2 param groups"),
    "an unknown hyper": (lambda: run(hyper={"foo": lambda u: 1.0}), r"hyper names \['foo'\].*allowed here"),
    "a momentum without buffer": (lambda: run(hyper={"momentum": lambda u: 0.1}), "momentum=...* above 0"),
    "a number for hyper": (lambda: run(hyper={"lr": 0.1}), r"hyper\['lr'\] must be a function, got float"),
    "hyper of a wrong shape": (lambda: run(hyper={"lr": lambda u: torch.ones(3)}), r"hyper\['lr'\] has shape \(3,\)"),
    "hyper that returns nothing": (lambda: run(hyper={"lr": lambda u: None}), r"hyper\['lr'\] is None"),
    "hyper with wrong names": (lambda: run(hyper={"lr": lambda u: {"q": 1.0}}), r"missing \['w'\], unexpected \['q'\]"),
    "start of a wrong shape": (lambda: run(start=lambda u: {"w": torch.zeros(3)}), "the result of start.*shape"),
    "start with wrong names": (
        lambda: run(start=lambda u: {"v": torch.zeros(2)}),
        "the result of start has the wrong entries",
    ),
    **{
        f"start of variables that nothing else reads, {type(method).__name__}": (
            lambda method=method: gradient(run(upper=TWO, start=lambda u: {"w": u["s"]}), method, TWO),
            r"ignores where the lower run begins, which is a function of \['s'\].*hg.Unrolled",
        )
        for method in BEGIN_ANYWHERE
    },
    **{
        f"likewise, by names of one module, {type(method).__name__}": (
            lambda method=method: gradient(
                run(lambda w, u, b: lower_loss(w, {"c": u["m.c"]}, b), upper=DOTTED, start=lambda u: {"w": u["m.s"]}),
                method,
                DOTTED,
            ),
            r"ignores where the lower run begins, which is a function of \['m.s'\].*hg.Unrolled",
        )
        for method in BEGIN_ANYWHERE
    },
    "start that is no function": (lambda: run(start=W), "start must be a function, got dict"),
    "a negative clip_norm": (lambda: run(clip_norm=-1.0), "clip_norm must be a positive number, got -1.0"),
    "clip_value zero": (lambda: run(clip_value=0.0), "clip_value must be a positive number"),
    "clip_norm as text": (lambda: run(clip_norm="a"), "clip_norm must be a positive number"),
    "project to a wrong shape": (lambda: run(project=lambda w: {"w": torch.zeros(3)}), "the result of project.*shape"),
    "project to nothing": (lambda: run(project=lambda w: {}), "the result of project is empty"),
    "project that is no function": (lambda: run(project=3), "project must be a function"),
    "response that is no function": (lambda: run(response=3), "response must be a function"),
    "a recording that is none": (lambda: run(recording=3), "recording must come from method.recording"),
    "a state that is none": (lambda: run(state=3), "state does not belong to this optimizer"),
    "another optimizer's state": (
        lambda: run(state=run().state, optimizer=hg.optim.Adam(0.1)),
        "state does not belong",
    ),
    "another run's state": (
        lambda: run(state=other_adam(), optimizer=hg.optim.Adam(0.1)),
        r"has shape \(3,\), this run needs \(2,\)",
    ),
    # methods
    "no trajectory": (lambda: gradient(3), "traj must come from hg.descend"),
    "a solver for a method": (lambda: gradient(method=hg.CG()), r"Wrap a solver: hg.Implicit\(solver\)"),
    "a method's class": (lambda: gradient(method=hg.Unrolled), r"Create it: Unrolled\(\.\.\.\)"),
    "a method's name": (lambda: gradient(method="cg"), "method must be a hypergradient method"),
    "a solver's name": (lambda: hg.Implicit("cg"), "solver must be a solver such as"),
    "negative damping": (lambda: hg.Implicit(hg.CG(), damping=-1.0), "damping must be a finite number >= 0, got -1.0"),
    "damping NaN": (lambda: hg.Implicit(hg.CG(), damping=NAN), "damping must be"),
    "infinite damping": (lambda: hg.Implicit(hg.CG(), damping=INF), "damping must be"),
    "damping as text": (lambda: hg.Implicit(hg.CG(), damping="a"), "damping must be"),
    "an unknown curvature": (
        lambda: hg.Implicit(hg.CG(), curvature="fisher"),
        "curvature must be 'hessian' or 'gauss_newton'",
    ),
    "no batches to average": (lambda: hg.Implicit(hg.CG(), batches=0), "batches must be an int >= 1"),
    "more batches than steps": (lambda: gradient(method=hg.Implicit(hg.CG(), batches=5)), "batches=5.*the run has 3"),
    "over as text": (lambda: hg.Implicit(hg.CG(), over="w"), r"over must be .*prefixes: \['backbone.'\]"),
    "over of nothing": (lambda: hg.Implicit(hg.CG(), over=[]), "over must be"),
    "over without a match": (
        lambda: gradient(method=hg.Implicit(hg.CG(), over=["z"])),
        r"begins with \['z'\]; they are \['w'\]",
    ),
    "fresh without an engine": (lambda: gradient(method=hg.Implicit(hg.CG(), fresh=True)), "fresh=True.*hg.Engine"),
    "warm start of a direct solver": (
        lambda: hg.Implicit(hg.Exact(), warm_start=True),
        "warm_start=True has no effect with Exact",
    ),
    "a negative number of directions": (lambda: hg.Implicit(hg.CG(), recycle=-1), "recycle must be an int >= 0"),
    "directions of another solver": (
        lambda: hg.Implicit(hg.GMRES(), recycle=4),
        "needs an hg.CG without a preconditioner of its own, got GMRES",
    ),
    "directions beside a preconditioner": (
        lambda: hg.Implicit(hg.CG(preconditioner=hg.solvers.HutchinsonDiagonal()), recycle=4),
        "without a preconditioner of its own, got .*HutchinsonDiagonal",
    ),
    "a state of another number of directions": (
        lambda: gradient(method=hg.Implicit(hg.CG(), recycle=2), state=torch.zeros(2)),
        r"state has shape \(2,\), this solve needs \(5, 2\)",
    ),
    "a state without warm start": (lambda: gradient(state=torch.zeros(2)), "warm_start is False"),
    "a state of a wrong shape": (
        lambda: gradient(method=hg.Implicit(hg.CG(), warm_start=True), state=torch.zeros(3)),
        r"state has shape \(3,\), this solve needs \(2,\)",
    ),
    "a state for a sweep": (lambda: gradient(method=hg.Unrolled(), state=torch.zeros(2)), "takes no warm start"),
    "a negative window": (lambda: hg.Unrolled(truncate=-1), "truncate must be None or an int >= 0"),
    "checkpoint zero": (lambda: hg.Unrolled(checkpoint=0), "checkpoint must be"),
    "an unknown checkpoint": (lambda: hg.Unrolled(checkpoint="log"), "checkpoint must be"),
    "retain above one": (lambda: hg.Unrolled(retain=2.0), "retain must be a fraction"),
    "epsilon zero": (lambda: hg.FiniteDifference(epsilon=0.0), "epsilon must be a finite number > 0"),
    "a negative step size": (lambda: hg.OneStep(step_size=-1.0), "step_size must be"),
    "epsilon NaN": (lambda: hg.SAMA(epsilon=NAN), "epsilon must be"),
    "strength zero": (lambda: hg.Penalty(strength=0.0), "strength must be"),
    "no penalty steps": (lambda: hg.Penalty(steps=0), "steps must be an int >= 1"),
    "a torch optimizer for a penalty": (
        lambda: hg.Penalty(optimizer=groups(2)),
        "optimizer must be one of hypergrad.optim",
    ),
    "a penalty that ascends": (lambda: hg.Penalty(optimizer=hg.optim.SGD(0.1, maximize=True)), "one that minimizes"),
    # methods and runs that do not fit
    "unrolled on solved": (lambda: gradient(hg.solved(lower_loss, W), hg.Unrolled()), r"hg.descend\(.*hg.Implicit"),
    "forward on solved": (
        lambda: gradient(hg.solved(lower_loss, W), hg.ForwardUnrolled()),
        r"hg.descend\(.*hg.Implicit",
    ),
    "SAMA on solved": (lambda: gradient(hg.solved(lower_loss, W), hg.SAMA()), r"hg.descend\(.*hg.Implicit"),
    "OneStep on solved": (lambda: gradient(hg.solved(lower_loss, W), hg.OneStep()), r"hg.descend\(.*hg.Implicit"),
    "Gauss-Newton on a plain loss": (
        lambda: gradient(method=hg.Implicit(hg.CG(), curvature="gauss_newton")),
        "hg.Composite",
    ),
    "CG on a root": (lambda: gradient(hg.solved_root(root, W)), "CG needs a symmetric operator.*GMRES"),
    "a root of a wrong shape": (
        lambda: gradient(hg.solved_root(lambda w, u, b: {"w": w["w"][:1]}, W), hg.Implicit(hg.GMRES())),
        "the result of the root function F.*shape",
    ),
    "a penalty on a root": (lambda: gradient(hg.solved_root(root, W), hg.Penalty(5.0)), "needs a lower loss"),
    "decoupled decay": (lambda: gradient(run(optimizer=hg.optim.AdamW(0.1))), "decoupled weight decay.*hg.Unrolled"),
    "decoupled decay of upper": (
        lambda: gradient(
            run(optimizer=hg.optim.AdamW(0.1), hyper={"weight_decay": lambda u: u["c"][0]}),
            hg.Implicit(hg.CG(), decoupled="ignore"),
        ),
        "decoupled weight decay.*function of the upper",
    ),
    "a learning rate of upper": (
        lambda: gradient(run(hyper={"lr": lambda u: u["c"][0] * 0.1})),
        r"\['lr'\].*does not move",
    ),
    "a projected run": (lambda: gradient(run(project=lambda w: w)), "applies `project`.*hg.solved_root"),
    "an ignored start": (
        lambda: gradient(run(blind, start=lambda u: {"w": u["c"]})),
        "ignores where the lower run begins",
    ),
    "a thinned record": (lambda: gradient(run(recording=CG.recording(3)), hg.Unrolled()), "was thinned.*recording="),
    "a thinned record, twice differentiated": (lambda: second(hg.Unrolled()), "was thinned.*recording="),
    "the response of a penalty": (
        lambda: hg.best_response(run(), U, method=hg.Penalty(5.0)),
        "Penalty has no best response",
    ),
    "gradients batched by autograd": (lambda: jacobian(CG), "vectorize=True.*Use torch.func.jacrev"),
    "reading the code under vmap": (lambda: population(CG), "throw=False"),
    "SciPy under vmap": (lambda: population(hg.Implicit(hg.SciPy("cg")), throw=False), "Use GMRES, or CG"),
}


def test_there_are_enough_rows() -> None:
    assert len(ROWS) >= 40


@pytest.mark.parametrize("row", ROWS)
def test_a_mistake_is_named_and_changes_nothing(row: str) -> None:
    call, message = ROWS[row]
    state = torch.get_rng_state()
    before = [(t, t.clone(), t._version) for t in (*W.values(), *U.values())]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call()
    for tensor, value, version in before:
        assert torch.equal(tensor, value) and tensor._version == version and tensor.grad is None
        assert not tensor.requires_grad
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.nn.modules.module._global_forward_pre_hooks


@pytest.mark.parametrize(
    "method", [CG, hg.Unrolled(), hg.FiniteDifference(), hg.Penalty(5.0)], ids=lambda m: type(m).__name__
)
def test_data_that_is_not_finite(method: hg.Method) -> None:
    with pytest.raises(hg.SolveError, match="not finite.*Check the data"):
        gradient(run(batches=[NAN] * 3), method)


def test_messages_of_results_name_a_remedy() -> None:
    for result in hg.Result:
        assert result.message.endswith(".") and (result == hg.Result.SUCCESS or len(result.message.split(". ")) > 1)
