"""Where a run was in its data, in its windows and in its generators is found again, or refused."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_kill import same
from three_levels import build
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hypergrad as hg

X = torch.randn(20, 3, generator=torch.Generator().manual_seed(5))


def simple(data: Any) -> hg.Engine:
    torch.manual_seed(0)
    net = nn.Linear(3, 1)

    def loss(m: Any, batch: Any) -> Tensor:
        return (m.net(batch[0]) ** 2).mean()

    return hg.Engine(
        [hg.Problem("net", module=net, loss=loss, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), data=data)]
    )


def batches(engine: hg.Engine, count: int) -> list[Tensor]:
    source = engine.runners["net"].source
    assert source is not None
    found = []
    for _ in range(count):
        engine.step()
        found.append(source.recent()[0])
    return found


class Stateful:
    """A loader that knows where it is, and whose order depends on nothing else."""

    def __init__(self) -> None:
        self.at, self.opened = 0, 0

    def __iter__(self) -> Iterator[Any]:
        self.opened += 1
        order = list(range(self.at, 20))
        for k in order:
            self.at = (k + 1) % 20
            yield (X[k : k + 1],)

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.at = state_dict["at"]


def own_generator() -> Any:
    return DataLoader(TensorDataset(X), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3))


def with_workers() -> Any:
    return DataLoader(TensorDataset(X), batch_size=4, shuffle=True, num_workers=1)


@pytest.mark.parametrize("make", [own_generator, Stateful, with_workers])
@pytest.mark.parametrize("before", [3, 7])
def test_data_goes_on_where_it_was(make: Any, before: int) -> None:
    if make is with_workers and before == 7:
        pytest.skip("one start of a worker is enough")
    engine = simple(make())
    torch.manual_seed(1)
    batches(engine, before)
    state = engine.state_dict()
    expected = batches(engine, 7)
    other = simple(make())
    torch.manual_seed(2)
    batches(other, 2)
    other.load_state_dict(state)
    assert all(map(torch.equal, batches(other, 7), expected))
    assert same(other.state_dict()["random"], engine.state_dict()["random"])


def test_a_loader_of_its_own_generator_is_begun_once() -> None:
    """The glance at the first batch is taken back from the loader's generator too."""
    loader, plain = own_generator(), own_generator()
    engine = simple(loader)
    torch.manual_seed(9)  # the glance was taken at other global draws
    found = batches(engine, 5)
    torch.manual_seed(9)
    assert all(map(torch.equal, found, (batch[0] for batch in plain)))


@pytest.mark.parametrize("extra", [torch.tensor(0.5), torch.eye(3).to_sparse(), torch.zeros(0), 7, "name", None])
def test_batches_hold_whatever_they_like(extra: Any) -> None:
    def data() -> DataLoader[Any]:
        whole = [(row, extra) for row in X.split(4)]
        return DataLoader(whole, batch_size=None, shuffle=True, collate_fn=lambda sample: sample)  # type: ignore

    torch.manual_seed(1)
    engine = simple(data())
    batches(engine, 3)
    state = engine.state_dict()
    expected = batches(engine, 4)
    other = simple(data())
    other.load_state_dict(state)
    assert all(map(torch.equal, batches(other, 4), expected))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"persistent_workers": True}, "'net'.*persistent_workers=True.*StatefulDataLoader"),
        ({"in_order": False}, "'net'.*in_order=False"),
    ],
)
def test_what_cannot_resume_is_refused_before_the_first_step(options: Any, message: str, tmp_path: Any) -> None:
    engine = simple([(X,)])
    loader = DataLoader(TensorDataset(X), batch_size=4, num_workers=1, **options)  # its workers never start
    object.__setattr__(engine.graph.problems["net"], "data", loader)
    with pytest.raises(ValueError, match=message):
        engine.run(1, callbacks=[hg.callbacks.Checkpoint(tmp_path)])
    assert engine.num_steps == 0
    with pytest.raises(ValueError, match=message):
        engine.state_dict()


def test_a_one_shot_iterator_is_refused() -> None:
    with pytest.raises(ValueError, match="one-shot iterator"):
        simple(iter([(X,)]))


class Drifting:
    """Data in an order of its own, which no saved generator gives again."""

    def __init__(self, seed: int) -> None:
        self.order = random.Random(seed)

    def __iter__(self) -> Iterator[Any]:
        rows = list(range(20))
        self.order.shuffle(rows)
        return ((X[k : k + 1],) for k in rows)


def test_data_that_does_not_repeat_is_refused() -> None:
    engine = simple(Drifting(0))
    batches(engine, 3)
    with pytest.raises(ValueError, match="'net': its data gives other batches than when it was saved.*batch 2"):
        simple(Drifting(1)).load_state_dict(engine.state_dict())
    with pytest.raises(ValueError, match="gives other batches"):
        simple([(X,), (X,)]).load_state_dict(engine.state_dict())


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    """Neither modules nor the place in the data, whatever it is that differs."""

    def two(*, optimizer: Any = torch.optim.Adam, data: Any = None, groups: bool = False) -> hg.Engine:
        torch.manual_seed(0)
        nets = [nn.Linear(3, 1), nn.Linear(3, 1)]
        problems = []
        for name, net in zip(("lower", "upper"), nets, strict=True):
            parameters = [{"params": [p]} for p in net.parameters()] if groups else net.parameters()
            problems.append(
                hg.Problem(
                    name,
                    module=net,
                    loss=lambda m, b: ((m.lower(b[0]) - m.upper(b[0])) ** 2).mean() + (m.lower.weight**2).sum(),
                    optimizer=optimizer(parameters, lr=0.1),
                    data=data if data is not None and name == "upper" else own_generator(),
                    method=hg.OneStep() if name == "lower" else None,
                )
            )
        return hg.Engine(problems)

    class Other(DataLoader[Any]):
        """The same rows, the other way round."""

        def __iter__(self) -> Any:
            return iter([[row] for row in reversed(X.split(4))])

    other_rows = Other(TensorDataset(X), batch_size=4, generator=torch.Generator())
    saved = two()
    saved.run(3)
    state = saved.state_dict()
    for other, message in (
        (two(optimizer=torch.optim.SGD), r"'lower': .* another optimizer than SGD: it has \['amsgrad'.*lacks \['damp"),
        (two(groups=True), r"'lower': .* optimizer with \[2\] parameters in its groups, and this one has \[1, 1\]"),
        (two(data=[(X,), (X,), (X,), (X,)]), "'upper': .* with other data or schedulers"),
        (two(data=other_rows), "'upper': its data gives other batches"),
    ):
        other.run(2)
        before = other.state_dict()
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
        assert same(other.state_dict(), before)
        again = copy.deepcopy(other.run(2)["lower.loss"])
        twin = two(
            optimizer=type(other.graph.problems["lower"].optimizer),
            groups=len(other.graph.problems["lower"].optimizer.param_groups) > 1,
            data=other.graph.problems["upper"].data if "upper" in message else None,
        )
        assert twin.run(4)["lower.loss"][2:] == again


def test_a_window_of_a_level_between_is_saved_with_the_runs_below_it() -> None:
    engine, other = build(every=2, nested=True), build(every=2, nested=True, seed=5)
    torch.manual_seed(2)
    engine.run(3)  # in the middle of a window of the level between
    state = engine.state_dict()
    assert state["problems"]["weights"]["window"]["steps"][-1]["records"]["net"]["steps"]
    expected = [dict(record) for record in engine.run(2)]
    end = engine.state_dict()
    other.load_state_dict(state)
    assert [dict(record) for record in other.run(2)] == expected
    assert same(end, other.state_dict())


def test_a_buffer_that_modules_do_not_save_is_saved() -> None:
    engine, other = simple([(X,)]), simple([(X,)])
    for k, run in enumerate((engine, other)):
        run.graph.problems["net"].module.register_buffer("seen", torch.tensor(float(k)), persistent=False)
    other.load_state_dict(engine.state_dict())
    assert float(other.graph.problems["net"].module.seen) == 0.0
