"""Lanczos finds extreme eigenvalues, says how sure it is, and finds all of them where the space is exhausted."""

from __future__ import annotations

import pytest
import torch

from hypergrad.lanczos import lanczos, singular_values
from hypergrad.operators import Function, Matrix


def symmetric(values: torch.Tensor, seed: int = 0) -> Matrix:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))[0]
    return Matrix((basis * values) @ basis.T, symmetric=True)


@pytest.mark.parametrize("size", [1, 2, 7, 20])
def test_all_eigenvalues_of_a_small_operator(size: int) -> None:
    values = torch.linspace(-1.0, 3.0, size, dtype=torch.float64)
    spectrum = lanczos(symmetric(values), 30)
    assert spectrum.num_products == size
    torch.testing.assert_close(spectrum.values, values, rtol=1e-12, atol=1e-12)


def test_multiple_eigenvalues_come_out_with_their_multiplicity() -> None:
    values = torch.tensor([1.0, 1.0, 1.0, 4.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(lanczos(symmetric(values)).values, values, rtol=1e-12, atol=1e-12)


def test_the_zero_operator() -> None:
    spectrum = lanczos(Matrix(torch.zeros(4, 4, dtype=torch.float64), symmetric=True), 3)
    assert spectrum.smallest == spectrum.largest == spectrum.largest_bound == 0.0


def test_separated_extremes_of_a_large_operator_converge() -> None:
    values = torch.cat([torch.tensor([-0.5]), torch.linspace(1.0, 10.0, 298), torch.tensor([100.0])]).double()
    spectrum = lanczos(symmetric(values), 30)
    assert abs(spectrum.smallest + 0.5) <= spectrum.smallest_bound < 1e-6
    assert abs(spectrum.largest - 100.0) <= spectrum.largest_bound < 1e-10


@pytest.mark.parametrize("num_steps", [3, 10, 25])
def test_ritz_values_lie_inside_and_within_their_bounds_of_eigenvalues(num_steps: int) -> None:
    values = torch.logspace(-6, 0, 200, dtype=torch.float64)
    spectrum = lanczos(symmetric(values), num_steps)
    assert values[0] <= spectrum.smallest + 1e-12
    assert spectrum.largest <= values[-1] + 1e-12
    gaps = (spectrum.values[:, None] - values[None, :]).abs().min(dim=1).values
    assert (gaps <= spectrum.bounds + 1e-12).all()


def test_singular_values_of_an_operator_that_is_not_symmetric() -> None:
    matrix = torch.randn(8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    spectrum = singular_values(Matrix(matrix))
    torch.testing.assert_close(spectrum.values, torch.linalg.svdvals(matrix).flip(0), rtol=1e-6, atol=1e-6)
    assert spectrum.num_products == 16


def test_no_random_generator_is_touched_and_answers_repeat() -> None:
    before = torch.get_rng_state()
    first, second = (lanczos(symmetric(torch.arange(50.0).double()), 10) for _ in range(2))
    assert torch.equal(first.values, second.values)
    assert torch.equal(torch.get_rng_state(), before)


def test_values_that_are_not_finite_are_passed_on() -> None:
    broken = Function(lambda v: v * float("nan"), size=3, dtype=torch.float64, device="cpu", symmetric=True)
    assert torch.isnan(lanczos(broken).values).all()


@pytest.mark.parametrize(
    ("op", "num_steps", "message"),
    [
        (Matrix(torch.eye(2)), 3, "marked symmetric"),
        (Matrix(torch.zeros(0, 0), symmetric=True), 3, "size >= 1"),
        (Matrix(torch.eye(2), symmetric=True), 0, "num_steps must be an int >= 1, got 0"),
    ],
)
def test_refusals(op: Matrix, num_steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lanczos(op, num_steps)
