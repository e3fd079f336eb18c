"""Ritz values with their bounds, against matrices of known eigenvalues."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sim2real import Params
from sim2real.solvers import spectrum


def matrix(values: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))[0]
    return Q * values @ Q.mT


def operator(A: Tensor) -> tuple[Callable[[Params], Params], Params]:
    """A on two tensors of different shapes."""
    size = len(A)

    def matvec(x: Params) -> Params:
        y = A @ torch.cat([x["a"].reshape(-1), x["b"]])
        return {"a": y[:2].reshape(2, 1), "b": y[2:]}

    return matvec, {"a": A.new_zeros(2, 1), "b": A.new_zeros(size - 2)}


@pytest.mark.parametrize("size", [3, 12, 40])
def test_small_problems_are_exact(size: int) -> None:
    A = matrix(torch.linspace(-1.0, 5.0, size, dtype=torch.float64))
    matvec, like = operator(A)
    found = spectrum(matvec, like)
    assert found.exact
    torch.testing.assert_close(found.values, torch.linalg.eigvalsh(A), rtol=0, atol=1e-12)
    assert found.floor == found.lowest
    assert found.negative_curvature == found.lowest == pytest.approx(-1.0, abs=1e-12)
    u, image = found.direction, matvec(found.direction)
    assert float(sum((u[key] ** 2).sum() for key in u)) == pytest.approx(1.0, abs=1e-12)
    assert float(sum((u[key] * image[key]).sum() for key in u)) == pytest.approx(-1.0, abs=1e-12)
    assert max(found.lowest_residual, found.largest_residual) < 1e-12


def test_residuals_and_floor_bound_the_eigenvalues() -> None:
    """A decaying spectrum with a few negative eigenvalues; the floor may fail once in 1000 starts, none of 50 here."""
    values = torch.cat([torch.logspace(3, -6, 290, dtype=torch.float64), -torch.logspace(-1, -4, 10).double()])
    A = matrix(values)
    matvec, like = operator(A)
    eigenvalues = torch.linalg.eigvalsh(A)
    for seed in range(50):
        found = spectrum(matvec, like, steps=40, generator=torch.Generator().manual_seed(seed))
        assert not found.exact
        assert found.steps == 40
        for value, bound in ((found.lowest, found.lowest_residual), (found.largest, found.largest_residual)):
            assert float((eigenvalues - value).abs().min()) <= bound + 1e-10
        products = torch.stack([A @ u - value * u for u, value in zip(found.vectors, found.values, strict=True)])
        torch.testing.assert_close(products.norm(dim=1), found.residuals, rtol=1e-6, atol=1e-9)
        assert found.floor <= float(eigenvalues[0]) <= found.lowest
        assert found.largest <= float(eigenvalues[-1]) + 1e-10


def test_a_start_finds_what_few_random_steps_miss() -> None:
    values = torch.cat([torch.linspace(1.0, 1e3, 199, dtype=torch.float64), torch.tensor([-1e-3]).double()])
    A = matrix(values)
    matvec, like = operator(A)
    blind = spectrum(matvec, like, steps=12)
    assert blind.negative_curvature is None
    assert blind.floor < -1e-3
    bad = torch.linalg.eigh(A)[1][:, 0]
    start = {"b": bad[2:], "a": bad[:2].reshape(2, 1)}  # keys in another order
    seen = spectrum(matvec, like, steps=12, starts=(start,))
    assert seen.lowest == pytest.approx(-1e-3, rel=1e-6)
    # an invariant space of one vector leaves its steps to the random start
    assert seen.steps == 12
    apart = spectrum(matvec, like, steps=12, starts=({key: value + 1.0 for key, value in like.items()},))
    products = torch.stack([A @ u - value * u for u, value in zip(apart.vectors, apart.values, strict=True)])
    assert bool((products.norm(dim=1) <= apart.residuals + 1e-9).all())  # a bound where there are several starts
    again = spectrum(matvec, like, steps=12, starts=(seen.direction, like))
    assert again.lowest == pytest.approx(-1e-3, rel=1e-6)


def test_the_floor_beside_a_start_holds_where_the_random_vector_cannot_see() -> None:
    """A chain whose one strong link (10 instead of 0.3) lies where the space of the start ends."""
    size = 1000
    links = torch.full((size - 1,), 0.3, dtype=torch.float64)
    links[19] = 10.0
    own = torch.rand(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A = torch.diag(own) + torch.diag(links, 1) + torch.diag(links, -1)
    start = {"x": torch.eye(size, dtype=torch.float64)[0]}
    found = spectrum(lambda v: {"x": A @ v["x"]}, start, starts=(start,))
    lowest = float(torch.linalg.eigvalsh(A)[0])
    assert found.lowest > lowest + 1.0
    assert -torch.inf < found.floor <= lowest


def test_an_exhausted_krylov_space_ends_early_and_holds_every_distinct_value() -> None:
    values = torch.tensor([1.0] * 60 + [3.0] * 20 + [-2.0] * 20, dtype=torch.float64)
    matvec, like = operator(matrix(values))
    found = spectrum(matvec, like)
    assert found.exact
    assert found.steps <= 3 + 1
    torch.testing.assert_close(found.values[:3], torch.tensor([-2.0, 1.0, 3.0]).double(), rtol=0, atol=1e-9)
    flat = spectrum(lambda x: {key: 0 * value for key, value in x.items()}, like)
    assert (flat.lowest, flat.largest, flat.exact, flat.negative_curvature) == (0.0, 0.0, True, None)


def test_few_steps_leave_no_floor_and_calls_repeat_bitwise() -> None:
    matvec, like = operator(matrix(torch.linspace(1.0, 2.0, 200, dtype=torch.float64)))
    first, second = spectrum(matvec, like, steps=3), spectrum(matvec, like, steps=3)
    assert first.floor == -torch.inf
    assert torch.equal(first.values, second.values)


def test_bad_inputs_are_named() -> None:
    matvec, like = operator(matrix(torch.ones(5, dtype=torch.float64)))
    with pytest.raises(ValueError, match="steps must exceed the number of starts"):
        spectrum(matvec, like, steps=1, starts=(like,))
    with pytest.raises(ValueError, match="not finite, at step 1 of Lanczos"):
        spectrum(lambda x: {key: value / 0 for key, value in x.items()}, like)
    with pytest.raises(ValueError, match="matvec returned shape"):
        spectrum(lambda x: {key: value[:1] for key, value in x.items()}, like)


def test_a_probe_ends_where_the_caller_has_seen_enough() -> None:
    matvec, like = operator(matrix(torch.linspace(1.0, 2.0, 200, dtype=torch.float64)))
    asked: list[tuple[int, float, float, float]] = []

    def enough(*state: float) -> bool:
        asked.append(state)  # type: ignore[arg-type]
        return state[0] >= 20

    found = spectrum(matvec, like, enough=enough)
    assert found.steps == 20
    assert [state[0] for state in asked] == [10, 20]
    assert asked[-1][1:] == pytest.approx((found.lowest, found.lowest_residual, found.largest), rel=1e-9)
