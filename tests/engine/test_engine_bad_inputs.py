"""Bad inputs are refused at construction or build, by name and with a remedy, and nothing has changed then."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hypergrad as hg

X = torch.linspace(-1, 1, 8).view(8, 1)


class World:
    """A sound pair of problems; a row changes one thing."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1))
        self.up = nn.Linear(1, 1)
        self.sgd = torch.optim.SGD(self.net.parameters(), lr=0.1)

    def low(self, **options: Any) -> hg.Problem:
        options.setdefault("name", "net")
        options.setdefault("module", self.net)
        options.setdefault("loss", lambda m, x: ((m.net(x) - m.up(x)) ** 2).mean())
        options.setdefault("optimizer", self.sgd)
        options.setdefault("method", hg.Unrolled())
        if "data" not in options:
            options["data"] = [X]
        return hg.Problem(options.pop("name"), **options)

    def top(self, **options: Any) -> hg.Problem:
        options.setdefault("name", "up")
        options.setdefault("module", self.up)
        options.setdefault("loss", lambda m, x: ((m.net(x) - 1) ** 2).mean() + 0 * m.up(x).sum())
        options.setdefault("optimizer", torch.optim.SGD(self.up.parameters(), lr=0.1))
        if "data" not in options:
            options["data"] = [X]
        return hg.Problem(options.pop("name"), **options)

    def pair(
        self, *, low: dict[str, Any] | None = None, top: dict[str, Any] | None = None, **options: Any
    ) -> hg.Engine:
        return hg.Engine([self.low(**(low or {})), self.top(**(top or {}))], **options)


def third(w: World, **options: Any) -> hg.Problem:
    module = nn.Linear(1, 1)
    options.setdefault("loss", lambda m, x: (m.other(x) ** 2).mean())
    return hg.Problem(
        "other", module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), data=[X], **options
    )


class Once(torch.autograd.Function):
    """Its backward has no derivative of its own, and says so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class Silent(torch.autograd.Function):
    """Its second derivative is wrong without a word: a constant is kept on ctx."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = (3 * x**2).detach()
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return ctx.slope * g


def through(function: Any) -> Callable[[Any, Tensor], Tensor]:
    return lambda m, x: (function.apply(m.net(x)) - m.up(x)).pow(2).mean()


class Plain(torch.optim.Optimizer):
    """A user's own rule."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad.sign(), alpha=group["lr"])


def tied(w: World) -> hg.Engine:
    both = torch.optim.SGD([*w.up.parameters()], lr=0.1)
    shared = nn.ModuleDict({"up": w.up})
    return hg.Engine(
        [
            w.low(
                module=nn.ModuleDict({"net": w.net, "up": w.up}),
                optimizer=torch.optim.SGD([*w.net.parameters(), *w.up.parameters()], lr=0.1),
                loss=lambda m, x: m.net["net"](x).mean(),
            ),
            w.top(module=shared, optimizer=both, loss=lambda m, x: m.up["up"](x).mean()),
        ]
    )


IMPLICIT = hg.Implicit(hg.CG(3), damping=1.0)
Case = Callable[[World], Any]
CASES: dict[str, tuple[Case, str]] = {
    # losses
    "loss not scalar": (
        lambda w: w.pair(low={"loss": lambda m, x: (m.net(x) - m.up(x)) ** 2}),
        r"'net' must return a scalar.*\(8, 1\).*mean",
    ),
    "loss not a tensor": (lambda w: w.pair(low={"loss": lambda m, x: 1.0}), r"'net' must return a scalar.*float"),
    "loss an integer": (
        lambda w: w.pair(low={"loss": lambda m, x: x.sum().long()}),
        r"'net' must return a scalar.*int64",
    ),
    "loss a triple": (lambda w: w.pair(low={"loss": lambda m, x: (m.net(x).mean(), {}, 1)}), r"'net' returned a tuple"),
    "loss not callable": (lambda w: w.low(loss=3), r"'net': loss must be a function"),
    "loss detached": (
        lambda w: w.pair(low={"loss": lambda m, x: (m.net(x).detach() - m.up(x)).mean()}),
        r"'net': .*depend.*variables",
    ),
    # roles
    "nobody reads the lower level": (
        lambda w: w.pair(top={"loss": lambda m, x: m.up(x).mean()}),
        r"'net' is read by no problem above.*'up'",
    ),
    "no lower loss reads the upper": (
        lambda w: w.pair(low={"loss": lambda m, x: m.net(x).mean()}),
        r"'up' is on an upper level.*'net'",
    ),
    "the lower loss detaches the upper": (
        lambda w: w.pair(low={"loss": lambda m, x: (m.net(x) - hg.detach(m.up)(x)).mean()}),
        r"'up' is on an upper level.*'net'",
    ),
    "same-level reads": (
        lambda w: hg.Engine(
            [
                [
                    w.low(loss=lambda m, x: (m.net(x) - m.up(x) + m.other(x)).mean()),
                    third(w, loss=lambda m, x: (m.other(x) - m.up(x)).mean()),
                ],
                w.top(),
            ]
        ),
        r"'net' and 'other' are on one level",
    ),
    "duplicate names": (lambda w: hg.Engine([w.low(), w.top(name="net")]), r"two problems are named 'net'"),
    "two optimizers over one parameter": (tied, r"optimized by both 'net' and 'up'"),
    "missing method": (lambda w: w.pair(low={"method": None}), r"'net' needs a method.*hg\.Implicit"),
    "method class": (lambda w: w.low(method=hg.Unrolled), r"'net': method must be.*Unrolled.*(Create|instance)"),
    "a solver for a method": (lambda w: w.low(method=hg.CG(3)), r"'net': method must be.*CG.*hg\.Implicit"),
    "penalty chained": (
        lambda w: hg.Engine(
            [
                w.low(method=hg.Penalty()),
                w.top(method=IMPLICIT, loss=lambda m, x: (m.net(x) - m.up(x) + m.other(x)).pow(2).mean()),
                third(w, loss=lambda m, x: (m.net(x) * m.up(x) * m.other(x)).mean()),
            ]
        ),
        r"Penalty has no",
    ),
    "no rule to differentiate": (
        lambda w: hg.Engine(
            [
                w.low(method=hg.OneStep()),
                w.top(method=IMPLICIT, loss=lambda m, x: (m.net(x) - m.up(x) + m.other(x)).pow(2).mean()),
                third(w, loss=lambda m, x: (m.up(x) * m.other(x)).mean()),
            ]
        ),
        r"'net': OneStep has no differentiable rule.*partial_hessian",
    ),
    # names
    "name forward": (lambda w: w.low(name="forward"), r"'forward' is reserved"),
    "name training": (lambda w: w.low(name="training"), r"'training' is reserved"),
    "name with a dot": (lambda w: w.low(name="a.b"), r"'a\.b'.*identifier|identifier.*'a\.b'"),
    "empty name": (lambda w: w.low(name=""), r"identifier"),
    "keyword name": (lambda w: w.low(name="lambda"), r"'lambda'"),
    "private name": (lambda w: w.low(name="_x"), r"'_x' is reserved"),
    # data
    "one-shot iterator": (lambda w: w.low(data=iter([X])), r"'net': data is a one-shot iterator"),
    "generator": (lambda w: w.low(data=(x for x in [X])), r"'net': data is a one-shot iterator"),
    "data a dict": (lambda w: w.low(data={"x": X}), r"'net': data must be an iterable of batches, got dict"),
    "data a number": (lambda w: w.low(data=3), r"'net': data must be an iterable of batches, got int"),
    "empty data": (lambda w: w.pair(low={"data": []}), r"'net': its data yields no batch"),
    "top without data": (lambda w: w.pair(top={"data": None}), r"'up' is on the top level and has no data"),
    "top with steps": (lambda w: w.pair(top={"steps": 2}), r"'up' is on the top level, so steps=2"),
    "top with every": (lambda w: w.pair(top={"every": 2}), r"'up' is on the top level, so every=2"),
    "top with tasks": (lambda w: w.pair(top={"tasks": 8}), r"'up' is on the top level; tasks"),
    "select with data": (lambda w: w.low(select=lambda b, k: b), r"'net': select picks from the batch"),
    # optimizers
    "optimizer a string": (lambda w: w.low(optimizer="sgd"), r"'net': optimizer must be a torch.optim"),
    "foreign parameters": (
        lambda w: w.low(optimizer=torch.optim.SGD(w.up.parameters(), lr=0.1)),
        r"'net': the optimizer holds parameters that are not",
    ),
    "frozen": (
        lambda w: w.low(optimizer=torch.optim.SGD(w.net.requires_grad_(False).parameters(), lr=0.1)),
        r"'net': no parameter.*requires grad",
    ),
    "unsupported optimizer": (
        lambda w: w.pair(low={"optimizer": torch.optim.Rprop(w.net.parameters())}),
        r"'net'.*Rprop cannot be differentiated.*Implicit",
    ),
    "a rule of one's own": (
        lambda w: w.pair(low={"optimizer": Plain(w.net.parameters())}),
        r"'net'.*Plain cannot be differentiated",
    ),
    "L-BFGS above": (lambda w: w.pair(top={"optimizer": torch.optim.LBFGS(w.up.parameters())}), r"'up': LBFGS"),
    "AdamW under Implicit": (
        lambda w: w.pair(low={"optimizer": torch.optim.AdamW(w.net.parameters()), "method": IMPLICIT}),
        r"'net'.*decoupled",
    ),
    "AdamW under Penalty": (
        lambda w: w.pair(low={"optimizer": torch.optim.AdamW(w.net.parameters()), "method": hg.Penalty()}),
        r"'net'.*decoupled",
    ),
    "foreign scheduler": (
        lambda w: w.low(scheduler=torch.optim.lr_scheduler.StepLR(torch.optim.SGD(w.up.parameters(), lr=0.1), 1)),
        r"'net': scheduler.*another optimizer",
    ),
    "scheduler a number": (lambda w: w.low(scheduler=0.1), r"'net': scheduler must be"),
    # methods and runs
    "learning rate under Implicit": (
        lambda w: w.pair(low={"method": IMPLICIT, "hyper": {"lr": lambda m: m.up.weight.exp().sum()}}),
        r"'net'.*\['lr'\].*does not move the fixed point",
    ),
    "learning rate under SAMA": (
        lambda w: w.pair(low={"method": hg.SAMA(), "hyper": {"lr": lambda m: m.up.weight.exp().sum()}}),
        r"'net'.*\['lr'\].*does not move the fixed point",
    ),
    "unknown hyper": (lambda w: w.pair(low={"hyper": {"beta7": lambda m: m.up.weight.sum()}}), r"'net'.*hyper.*beta7"),
    "hyper a number": (lambda w: w.low(hyper={"lr": 0.1}), r"'net': hyper must be"),
    "hyper per parameter": (
        lambda w: w.pair(low={"hyper": {"lr": lambda m: m.up.weight.view(1).expand(2)}}),
        r"'net': hyper\['lr'\] must return a scalar",
    ),
    "project under Implicit": (
        lambda w: w.pair(low={"method": IMPLICIT, "project": lambda p: p}),
        r"'net'.*applies `project`",
    ),
    "project drops a parameter": (lambda w: w.pair(low={"project": lambda p: {}}), r"'net'.*project"),
    "Unrolled with every": (lambda w: w.low(every=2), r"'net': every=2.*Unrolled"),
    "Unrolled with response": (lambda w: w.low(response=lambda m, x: m.net(x).mean()), r"'net'.*response.*Unrolled"),
    "truncate nothing": (lambda w: w.low(method=hg.Unrolled(truncate=0)), r"'net': Unrolled\(truncate=0\)"),
    "Reptile without start": (lambda w: w.low(method=hg.Reptile()), r"'net': Reptile.*start="),
    "Gauss-Newton on a plain loss": (
        lambda w: w.pair(low={"method": hg.Implicit(hg.CG(2), damping=1.0, curvature="gauss_newton")}),
        r"'net'.*gauss_newton.*Composite",
    ),
    "over matches nothing": (
        lambda w: w.pair(low={"method": hg.Implicit(hg.CG(2), damping=1.0, over=["head."])}),
        r"'net'.*head\.",
    ),
    "more batches than steps": (
        lambda w: w.pair(low={"method": hg.Implicit(hg.CG(2), damping=1.0, batches=3), "steps": 2}),
        r"'net'.*batches=3",
    ),
    "fresh without data": (
        lambda w: w.pair(low={"method": hg.Implicit(hg.CG(2), damping=1.0, fresh=True), "data": None}),
        r"'net'.*fresh=True",
    ),
    "a group that rests under Implicit": (
        lambda w: w.pair(
            low={
                "method": IMPLICIT,
                "optimizer": torch.optim.SGD(
                    [{"params": w.net[0].parameters(), "lr": 0.0}, {"params": w.net[3].parameters()}], lr=0.1
                ),
            }
        ),
        r"'net': the learning rate of \['0\.weight', '0\.bias'\] is 0.*over=",
    ),
    "a loss that changes its batch": (
        lambda w: w.pair(low={"loss": lambda m, x: m.net(x.div_(2)).mean() * m.up(x).mean(), "data": [X.clone()]}),
        r"'net': its loss changes its batch in place",
    ),
    "no second derivative": (
        lambda w: w.pair(low={"loss": through(Once)}),
        r"problem 'net': .*(no second derivative|second derivative is wrong)",
    ),
    "silently wrong second derivative": (
        lambda w: w.pair(low={"loss": through(Silent)}),
        r"'net'.*second derivative is wrong",
    ),
    # start, tasks
    "start lacks a parameter": (
        lambda w: w.pair(low={"start": lambda m: {"0.weight": m.up.weight}}),
        r"'net': the result of start lacks",
    ),
    "start of a wrong shape": (
        lambda w: w.pair(
            low={"start": lambda m: {k: m.up.weight.view(1).expand(7) for k, _ in w.net.named_parameters()}}
        ),
        r"'net': start gave.*shape",
    ),
    "start returns what does not train": (
        lambda w: w.pair(
            low={
                "optimizer": torch.optim.SGD(w.net[3].parameters(), lr=0.1),
                "start": lambda m: {k: p + m.up.weight.mean() for k, p in hg.detach(m.net).named_parameters()},
            }
        ),
        r"'net': start returns \['0\.weight', '0\.bias', .*would be lost.*lr=0",
    ),
    "a cycle through start": (
        lambda w: w.pair(low={"start": lambda m: {k: 2 * p for k, p in m.net.named_parameters()}}),
        r"'net': its start depends on 'net', which is a cycle",
    ),
    "a start that is ignored": (
        lambda w: w.pair(
            low={
                "method": IMPLICIT,
                "loss": lambda m, x: m.net(x).pow(2).mean(),
                "start": lambda m: {k: p * m.up.weight.mean() for k, p in hg.detach(m.net).named_parameters()},
            }
        ),
        r"'net' begins at a function of \['up'\].*iMAML",
    ),
    "tasks lead wrongly": (lambda w: w.pair(low={"tasks": 5}), r"shape \(8, 1\).*tasks=5"),
    "chunk without tasks": (lambda w: w.low(chunk=2), r"'net': chunk=2"),
    "tasks continue": (lambda w: w.low(tasks=2, after="continue"), r"'net': the copies of tasks=2"),
    # options
    "negative steps": (lambda w: w.low(steps=-1), r"'net': steps must be an int >= 1, got -1"),
    "zero every": (lambda w: w.low(every=0), r"'net': every must be"),
    "zero tasks": (lambda w: w.low(tasks=0), r"'net': tasks must be"),
    "negative clip": (lambda w: w.low(clip_norm=-1.0), r"'net': clip_norm must be"),
    "zero clip": (lambda w: w.low(clip_value=0.0), r"'net': clip_value must be"),
    "after": (lambda w: w.low(after="stop"), r"'net': after must be"),
    "project not callable": (lambda w: w.low(project=1), r"'net': project must be"),
    "start not callable": (lambda w: w.low(start={}), r"'net': start must be"),
    "reads unknown": (lambda w: w.pair(low={"reads": ["nobody"]}), r"'net': reads=\['nobody'\]"),
    "reads a string": (lambda w: w.low(reads="up"), r"'net': reads must be"),
    "module not a module": (lambda w: w.low(module=lambda x: x), r"'net': module must be an nn.Module"),
    "on_breakdown": (lambda w: w.pair(on_breakdown="ignore"), r"on_breakdown must be"),
    "a problem instead of a list": (lambda w: hg.Engine(w.low()), r"list of problems"),
    "an empty level": (lambda w: hg.Engine([[], w.low()]), r"level without a problem"),
    "no problem": (lambda w: hg.Engine([]), r"level without a problem"),
    "a module instead of a problem": (lambda w: hg.Engine([w.net, w.up]), r"hg\.Problem objects, got Sequential"),
    "no steps to run": (lambda w: w.pair().run(0), r"num_steps must be an int >= 1"),
}


@pytest.mark.parametrize(("case", "message"), CASES.values(), ids=CASES)
def test_a_bad_input_is_refused_and_nothing_changes(case: Case, message: str) -> None:
    world = World()
    before = copy.deepcopy((world.net.state_dict(), world.up.state_dict(), world.sgd.state_dict()))
    rng = torch.get_rng_state()
    with pytest.raises(ValueError, match=f"(?s){message}"):
        case(world)
    for old, module in zip(before, (world.net, world.up), strict=False):
        for key, value in module.state_dict().items():
            assert torch.equal(value, old[key]), key
        assert all(p.grad is None for p in module.parameters())
        assert module.training
    assert world.sgd.state_dict() == before[2]
    if "third" not in case.__code__.co_names:  # whose own module is drawn
        assert torch.equal(rng, torch.get_rng_state())


def test_a_read_first_seen_later_names_both() -> None:
    world = World()
    count = 0

    def loss(m: Any, x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        value = (m.net(x) - m.up(x)).pow(2).mean()
        return value + m.other(x).mean() if count > 2 else value

    engine = hg.Engine(
        [
            [
                world.low(loss=loss, method=hg.SAMA()),
                third(world, loss=lambda m, x: (m.other(x) - m.up(x)).pow(2).mean(), method=hg.SAMA()),
            ],
            world.top(loss=lambda m, x: m.net(x).mean() + m.other(x).mean()),
        ],
        product_check=False,
    )
    with pytest.raises(ValueError, match=r"'net' reads 'other'.*reads="):
        engine.run(5)


def test_a_dependence_first_seen_later_names_both() -> None:
    """The first batch reads the other problem, but only as a constant."""
    world = World()
    count = 0

    def loss(m: Any, x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        value = m.other(x) if count > 2 else m.other(x).detach()
        return (m.net(x) - m.up(x)).pow(2).mean() + value.mean()

    engine = hg.Engine(
        [
            [
                world.low(loss=loss, method=hg.SAMA()),
                third(world, loss=lambda m, x: (m.other(x) - m.up(x)).pow(2).mean(), method=hg.SAMA()),
            ],
            world.top(loss=lambda m, x: m.net(x).mean() + m.other(x).mean()),
        ],
        product_check=False,
    )
    with pytest.raises(ValueError, match=r"'net'.*depends on 'other'.*reads="):
        engine.run(5)


def test_reads_names_what_the_first_batch_does_not_show() -> None:
    world = World()
    count = 0

    def loss(m: Any, x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        value = (m.net(x) ** 2).mean()
        return value + (m.net(x) * m.up(x)).mean() if count % 2 == 0 else value

    engine = world.pair(low={"loss": loss, "reads": ["up"], "method": hg.SAMA()}, product_check=False)
    engine.run(3)


def test_nan_data_breaks_down_by_name() -> None:
    world = World()
    engine = world.pair(top={"data": [X * float("nan")]}, product_check=False)
    with pytest.raises(hg.SolveError, match=r"'up'.*step 0.*(finite|NaN)"):
        engine.step()


def test_a_state_of_another_engine_is_refused_and_nothing_changes() -> None:
    world, other = World(), World()
    engine = world.pair()
    state = hg.Engine(
        [
            other.low(name="net2", loss=lambda m, x: (m.net2(x) - m.up(x)).mean()),
            other.top(loss=lambda m, x: m.net2(x).mean()),
        ]
    ).state_dict()
    with pytest.raises(ValueError, match=r"\['net', 'up'\].*\['net2', 'up'\]"):
        engine.load_state_dict(state)
    wide = engine.state_dict()
    wide["problems"]["up"]["module"]["weight"] = torch.zeros(2, 2)
    before = copy.deepcopy(world.net.state_dict())
    with pytest.raises(ValueError, match=r"'up': the state was saved from another module.*weight"):
        engine.load_state_dict(wide)
    assert all(torch.equal(v, before[k]) for k, v in world.net.state_dict().items())


def test_an_embedding_that_rescales_its_rows_is_refused_by_name() -> None:
    """Its in-place renormalisation would raise torch's own error in mid-run, about views and versions."""
    table = nn.Sequential(nn.Embedding(4, 3, max_norm=1.0), nn.Linear(3, 1))
    options = {
        "module": table,
        "loss": lambda m, x: (m.net(torch.arange(4)) - m.up(x[:4])).square().mean(),
        "optimizer": torch.optim.SGD(table.parameters(), lr=0.1),
    }
    with pytest.raises(ValueError, match=r"problem 'net': its module '0' has max_norm=1.0, which rescales rows"):
        World().pair(low=options)
