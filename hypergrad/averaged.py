"""A loss that is the mean of its values on parts of a batch: held by several processes, or taken a few at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor
from torch.utils import _pytree as pytree

from hypergrad._flat import Layout, Params
from hypergrad._functional import Loss, Residual, in_transform, scalar
from hypergrad._random import RandomState, replaying
from hypergrad._tape import AutogradTape, Tape, add, gradient
from hypergrad.distributed.ranks import Ranks

Split = Callable[[Any, int], Sequence[Any]]
"""(batch, count) -> count parts of equal size."""
TapeOf = Callable[[Residual, Tensor, Params], Tape]
T = TypeVar("T", Tensor, Params)


@dataclass(frozen=True)
class Averaged:
    r"""A loss evaluated as the mean over parts of its batch: over ranks, each with its own, and over micro-batches.

    .. math:: L(w, u; b) = \frac1{NM} \sum_{r=1}^N \sum_{m=1}^M \ell(w, u; b_{r m})

    with rank r's batch cut into M micro-batches. Gradients, products and mixed products are averaged likewise, each in
    one all-reduce; vectors are the same on every rank, so dot products, step sizes and result codes agree without
    communication. For a loss that is a mean over samples, with parts of equal size, it is the loss on the union of all
    batches. It goes wherever a loss goes, for the lower and for the upper level. Every rank must make the same calls in
    the same order.

    Cost: with micro-batches the memory of one at a time; each product then evaluates the gradient again, and random
    layers draw their masks per micro-batch. `ForwardUnrolled` and derivatives of rules (`best_response` twice) keep all
    micro-batches on one tape.

    Args:
        loss: function (lower, upper, batch) -> scalar, or a `Composite`.
        micro_batches: into how many parts each batch is cut, >= 1.
        ranks: the processes, `hg.distributed.world()`; None for this process alone.
        split: (batch, count) -> parts; None cuts every tensor of the batch along its first dimension.

    Raises:
        ValueError: for options out of range; later for a batch that cannot be cut into equal parts.

    Example:
        >>> import torch, hypergrad as hg
        >>> loss = hg.Averaged(lambda lower, upper, x: ((lower["w"] - x) ** 2).mean(), micro_batches=2)
        >>> loss({"w": torch.zeros(())}, {}, torch.tensor([1.0, 2.0, 3.0, 4.0]))
        tensor(7.5000)
    """

    loss: Loss
    micro_batches: int = 1
    ranks: Ranks | None = None
    split: Split | None = None

    def __post_init__(self) -> None:
        """Validate the options."""
        if not callable(self.loss):
            raise ValueError(f"Averaged: loss must be a function (lower, upper, batch) -> scalar, got {self.loss!r}.")
        if not isinstance(self.micro_batches, int) or self.micro_batches < 1:
            raise ValueError(f"Averaged: micro_batches must be an int >= 1, got {self.micro_batches!r}.")
        if self.ranks is not None and not isinstance(self.ranks, Ranks):
            raise ValueError(f"Averaged: ranks must be None or hg.distributed.world(), got {self.ranks!r}.")

    def parts(self, batch: Any) -> Sequence[Any]:
        """Return the micro-batches of `batch`."""
        if self.micro_batches == 1:
            return [batch]
        return (self.split or split)(batch, self.micro_batches)

    def here(self, lower: Params, upper: Params, batch: Any) -> Tensor:
        """Return the mean over this rank's micro-batches, on one tape."""
        total: Tensor | None = None
        for part in self.parts(batch):
            value = scalar(self.loss(lower, upper, part), "the loss")
            total = value if total is None else total + value
        assert total is not None
        return total / self.micro_batches if self.micro_batches > 1 else total

    def __call__(self, lower: Params, upper: Params, batch: Any) -> Tensor:
        """Return the loss, a scalar, the same on every rank."""
        if self.ranks is None:
            return self.here(lower, upper, batch)
        with self.ranks.active():
            value = self.here(self.ranks.share_params(lower), self.ranks.share_params(upper), batch)
        return self.ranks.average([value])[0]

    def gathering(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which `all_gather` gathers over the ranks of this loss."""
        return contextlib.nullcontext() if self.ranks is None else self.ranks.active()


def split(batch: Any, count: int) -> list[Any]:
    """Return `count` parts of `batch`: its tensors cut along their first dimension, everything else whole.

    Raises:
        ValueError: unless all tensors lead with the same number of samples, and `count` divides it.
    """
    leaves, spec = pytree.tree_flatten(batch)
    cut = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 0]
    sizes = sorted({leaf.shape[0] for leaf in cut})
    if len(sizes) > 1:
        raise ValueError(
            f"a batch is cut into {count} parts along the first dimension of its tensors, which lead with different "
            f"sizes here: {[tuple(leaf.shape) for leaf in cut]}. Say how: split=lambda batch, count: [...]."
        )
    if sizes and (sizes[0] % count or not sizes[0]):
        raise ValueError(
            f"a batch of {sizes[0]} samples does not divide into {count} equal parts. Choose a batch size that is a "
            "multiple of ranks times micro_batches, and drop_last=True for a DataLoader whose last batch is smaller."
        )
    pieces = [leaf.chunk(count) if isinstance(leaf, Tensor) and leaf.dim() > 0 else [leaf] * count for leaf in leaves]
    return [pytree.tree_unflatten([piece[k] for piece in pieces], spec) for k in range(count)]


def plain(loss: Loss) -> Loss:
    """Return the loss of which this one is an average, or itself."""
    return loss.loss if isinstance(loss, Averaged) else loss


def ranks_of(loss: Loss | None) -> Ranks | None:
    """Return the ranks over which this loss is averaged."""
    return loss.ranks if isinstance(loss, Averaged) else None


def over_parts(loss: Loss, batch: Any, function: Callable[[Loss, Any], T]) -> T:
    """Return the mean of function(loss, part) over this rank's micro-batches, one after the other."""
    if not isinstance(loss, Averaged):
        return function(loss, batch)
    with loss.gathering():
        parts = loss.parts(batch)
        total = function(loss.loss, parts[0])
        for part in parts[1:]:
            total = _plus(total, function(loss.loss, part))
        return _divided(total, len(parts))


def over_ranks(loss: Loss | None, params: Params, like: Mapping[str, Tensor]) -> Params:
    """Return the mean of `params` over the ranks of this loss, in one all-reduce."""
    ranks = ranks_of(loss)
    return params if ranks is None else ranks.average_params(params, like)[0]


def average_gradient(
    loss: Averaged, layout: Layout, flat: Tensor, upper: Params, batch: Any, *, create_graph: bool
) -> Tensor:
    """Return the gradient at `flat`, by one all-reduce; one micro-batch on the tape at a time unless `create_graph`."""
    ranks = loss.ranks
    if create_graph or in_transform():

        def value(w: Tensor) -> Tensor:
            if ranks is None:
                return loss.here(layout.unravel(w), upper, batch)
            with ranks.active():
                return loss.here(layout.unravel(ranks.share([w])[0]), ranks.share_params(upper), batch)

        return gradient(value, flat, create_graph=create_graph)

    def of_part(inner: Loss, part: Any) -> Tensor:
        return gradient(lambda w: scalar(inner(layout.unravel(w), upper, part), "the lower loss"), flat)

    grad = over_parts(loss, batch, of_part)
    return grad if ranks is None else ranks.average([grad])[0]


class PartsTape(Tape):
    """The tape of a mean of residuals: each product averaged over the parts, and over ranks in one all-reduce.

    One part is taped once. Of several, each is taped again for each product, so that memory holds one at a time. The
    residual's own value travels with the first product.
    """

    def __init__(
        self,
        samples: Sequence[tuple[RandomState | None, Sequence[Residual]]],
        lower: Tensor,
        upper: Params,
        loss: Averaged,
        tape_of: TapeOf | None = None,
        *,
        valued: bool = True,
    ) -> None:
        """Evaluate the residuals of this rank.

        Args:
            samples: random states, and the residuals that are evaluated one after the other from them.
            lower: flat lower parameters.
            upper: upper parameters.
            loss: what is averaged.
            tape_of: which tape one residual is put on; None for autograd's.
            valued: whether `value` will be asked for; without, residuals are first evaluated for a product.
        """
        self._samples, self._lower, self._upper, self._loss = samples, lower, upper, loss
        self._tape_of = tape_of or (lambda r, w, u: AutogradTape(r, w, u, differentiable=False))
        self._count = sum(len(residuals) for _, residuals in samples)
        self._kept: Tape | None = None
        self._value: Tensor | None = None
        self._local = self._over_parts(lambda tape: tape.value) if valued else None

    @property
    def value(self) -> Tensor:  # type: ignore[override]
        """F(lower, upper), detached; the same on every rank."""
        if self._value is None:
            self._reduce([])
        assert self._value is not None
        return self._value

    def pull_lower(self, cotangent: Tensor) -> Tensor:
        """Return (dF/d lower)^T cotangent."""
        return self._reduce([self._over_parts(lambda tape: tape.pull_lower(cotangent))])[0][0]

    def push_lower(self, tangent: Tensor) -> Tensor:
        """Return (dF/d lower) tangent."""
        return self._reduce([self._over_parts(lambda tape: tape.push_lower(tangent))])[0][0]

    def pull_upper(self, cotangent: Tensor) -> Params:
        """Return (dF/d upper)^T cotangent for the names that F reads on some rank."""
        return self._reduce([], self._over_parts(lambda tape: tape.pull_upper(cotangent)))[1]

    def pull_both(self, cotangent: Tensor) -> tuple[Tensor, Params]:
        """Return both, in one backward pass and one all-reduce."""

        def pull(tape: Tape) -> Params:
            assert isinstance(tape, AutogradTape)
            lower, above = tape.pull_both(cotangent)
            return {"": lower, **above}

        local = self._over_parts(pull)
        (flat,), above = self._reduce([local.pop("")], local)
        return flat, above

    def _over_parts(self, function: Callable[[Tape], T]) -> T:
        total: T | None = None
        with self._loss.gathering():
            if self._kept is not None:
                return function(self._kept)
            for random, residuals in self._samples:
                with replaying(random):
                    for residual in residuals:
                        tape = self._tape_of(residual, self._lower, self._upper)
                        if self._count == 1:
                            self._kept = tape
                        outcome: Any = function(tape)
                        total = outcome if total is None else _plus(total, outcome)
        assert total is not None
        return _divided(total, self._count)

    def _reduce(self, tensors: list[Tensor], params: Params | None = None) -> tuple[list[Tensor], Params]:
        """Return the means over ranks; the first time, the residual's value goes with them."""
        ranks, local = self._loss.ranks, [] if self._local is None else [self._local]
        means, averaged = [*tensors, *local], params or {}
        if ranks is not None:
            averaged, means = ranks.average_params(averaged, {} if params is None else self._upper, means)
        if local:
            *means, self._value = means
            self._local = None
        return means, averaged


def _plus(total: T, more: T) -> T:
    if isinstance(total, Tensor):
        assert isinstance(more, Tensor)
        return total + more
    assert not isinstance(more, Tensor)
    return add(total, more)


def _divided(total: T, count: int) -> T:
    if count == 1:
        return total
    if isinstance(total, Tensor):
        return total / count
    return {name: value / count for name, value in total.items()}
