"""What an upper step sends is what the closed form says, for every method, whole and on shards."""

from __future__ import annotations

from processes import run_ranks

from hypergrad.bench.upper_step import METHODS, ON_SHARDS, STARTS, STEPS, Counted, Size, counted
from hypergrad.costs import communication

SIZE = Size(width=16, blocks=2)


def _everything() -> dict[tuple[str, bool], Counted]:
    found = {(name, False): counted(name, SIZE, sharded=False) for name in METHODS}
    return found | {(name, True): counted(name, SIZE, sharded=True) for name in ON_SHARDS}


def test_the_model_counts_what_is_sent() -> None:
    first, second = run_ranks(2, _everything)
    assert first == second
    for (name, sharded), found in first.items():
        method = METHODS[name]
        if sharded:
            expected = communication.upper_step_on_shards(method, STEPS, units=SIZE.blocks)
        else:
            expected = communication.upper_step(method, STEPS, products=found.num_products)
        assert found.messages == expected, (name, sharded)
        upper = 4 * (SIZE.lower if name in STARTS else SIZE.width)
        model = communication.total_bytes(expected, ranks=2, lower=4 * SIZE.lower, upper=upper)
        words = 4 * 2 * 0.5 * 16 * found.messages.total()  # fewer than the tensors, metrics and signals of a message
        assert model <= found.sent_bytes <= model + words, (name, sharded)
