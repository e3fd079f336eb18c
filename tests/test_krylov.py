"""MINRES and GMRES against scipy and against the least residual over the Krylov space."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from problems import EXACT, on_flat, random_vector, spectrum
from torch import Tensor

from sim2real.solvers import gmres, minres

SOLVERS = {"minres": partial(minres, tol=1e-12), "gmres": partial(gmres, tol=1e-12)}
POSITIVE = [0.5, 1.0, 2.0, 4.0, 7.0, 30.0]
INDEFINITE = [-5.0, -0.3, 2.0, 4.0, 7.0, 30.0]


def unsymmetric(size: int = 30, seed: int = 0) -> Tensor:
    """Eigenvalues in a disk of radius about 0.5 around 1, far from symmetric."""
    draw = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.eye(size, dtype=torch.float64) + 0.5 * draw / size**0.5


def least_residual(A: Tensor, b: Tensor, steps: int) -> float:
    """min |b - A x| / |b| over the Krylov space of that many dimensions, by an orthonormal basis of it."""
    columns = [b / b.norm()]
    for _ in range(steps - 1):
        new = A @ columns[-1]
        for _ in range(2):
            new = new - torch.stack(columns, 1) @ (torch.stack(columns, 1).T @ new)
        columns.append(new / new.norm())
    V = torch.stack(columns, 1)
    y = torch.linalg.lstsq(A @ V, b[:, None]).solution
    return float((b - (A @ V @ y)[:, 0]).norm() / b.norm())


@pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("values", [POSITIVE, INDEFINITE], ids=["positive", "indefinite"])
@pytest.mark.parametrize("damping", [0.0, 0.7])
def test_symmetric_systems_of_any_sign(solve: Callable, values: list[float], damping: float) -> None:
    A, b = spectrum(values), random_vector(6)
    solution = solve(on_flat(A), {"x": b}, damping=damping)
    expected = torch.linalg.solve(A + damping * torch.eye(6, dtype=torch.float64), b)
    # condition below 100, residual 1e-12
    torch.testing.assert_close(solution.x["x"], expected, rtol=1e-10, atol=1e-10)
    report = solution.report
    assert report.converged
    assert report.residual <= 1e-12
    assert report.damping == damping
    # six different eigenvalues: the Krylov space is everything, the Ritz values are the eigenvalues, undamped
    assert report.eigenvalues == pytest.approx((values[0], values[-1]), rel=1e-6)
    assert report.negative_curvature == (pytest.approx(-5.0, rel=1e-6) if values[0] < 0 else None)


def test_minres_equals_scipy_on_a_large_indefinite_system() -> None:
    values = torch.linspace(-3.0, 10.0, 100, dtype=torch.float64)  # no eigenvalue nearer to 0 than 0.01
    A, b = spectrum(values.tolist()), random_vector(100)
    solution = minres(on_flat(A), {"x": b}, tol=1e-11)
    expected, info = scipy.sparse.linalg.minres(A.numpy(), b.numpy(), rtol=1e-14, maxiter=2000)
    assert info == 0
    assert solution.report.converged
    # condition 10 / 0.01, residuals 1e-11
    np.testing.assert_allclose(solution.x["x"], expected, rtol=0, atol=1e-8 * np.linalg.norm(expected))
    np.testing.assert_allclose(solution.x["x"], np.linalg.solve(A.numpy(), b.numpy()), rtol=0, atol=1e-7)


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_the_residual_is_the_least_of_the_krylov_space_and_reported_as_unconverged(steps: int) -> None:
    b = random_vector(30)
    indefinite = spectrum(torch.linspace(-2.0, 9.0, 30, dtype=torch.float64).tolist())
    for solve, A in ((minres, indefinite), (gmres, indefinite), (gmres, unsymmetric())):
        solution = solve(on_flat(A), {"x": b}, max_steps=steps)
        true = float((b - A @ solution.x["x"]).norm() / b.norm())
        assert solution.report.residual == pytest.approx(true, rel=1e-10)
        assert true == pytest.approx(least_residual(A, b, steps), rel=1e-9)
        assert not solution.report.converged
        assert solution.report.steps == steps
        assert "allowed" in solution.report.status


@pytest.mark.parametrize("restart", [5, 10, 50])
def test_gmres_with_restarts_equals_scipy(restart: int) -> None:
    A, b = unsymmetric(), random_vector(30)
    solution = gmres(on_flat(A), {"x": b}, restart=restart, tol=1e-12)
    expected, info = scipy.sparse.linalg.gmres(A.numpy(), b.numpy(), rtol=1e-13, restart=restart, maxiter=1000)
    assert info == 0
    assert solution.report.converged
    assert solution.report.eigenvalues is None  # they are complex
    np.testing.assert_allclose(solution.x["x"], expected, rtol=0, atol=1e-10)
    # as many cycles cut short leave the same residual as scipy's
    cycles = 2
    ours = gmres(on_flat(A), {"x": b}, restart=restart, max_steps=cycles * restart, tol=1e-15).x["x"].numpy()
    if cycles * restart < 30:
        theirs, _ = scipy.sparse.linalg.gmres(A.numpy(), b.numpy(), rtol=1e-15, restart=restart, maxiter=cycles)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-11)


def test_gmres_says_when_a_short_restart_stalls() -> None:
    shift = torch.roll(torch.eye(6, dtype=torch.float64), 1, dims=0)  # Saad 2003, 6.5.5: no progress in 5 steps
    b = {"x": torch.eye(6, dtype=torch.float64)[0]}
    short = gmres(on_flat(shift), b, restart=5).report
    assert not short.converged
    assert short.residual == pytest.approx(1.0)
    assert short.steps == 5
    assert "restart = 5 is too short" in short.status
    whole = gmres(on_flat(shift), b, restart=6)
    assert whole.report.converged
    torch.testing.assert_close(shift @ whole.x["x"], b["x"], **EXACT)


@pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS)
def test_singular_consistent_systems_get_the_answer_of_least_norm(solve: Callable) -> None:
    A = spectrum([-2.0, 0.0, 0.0, 1.0, 3.0, 8.0])
    b = A @ random_vector(6)
    solution = solve(on_flat(A), {"x": b})
    assert solution.report.converged
    expected = torch.linalg.pinv(A, hermitian=True, rtol=1e-12) @ b
    torch.testing.assert_close(solution.x["x"], expected, rtol=1e-9, atol=1e-10)


def test_minres_gives_least_squares_for_b_outside_the_range_and_does_not_call_it_converged() -> None:
    A, b = spectrum([-2.0, 0.0, 0.5, 1.0, 3.0, 8.0]), random_vector(6)
    solution = minres(on_flat(A), {"x": b})
    fitted = torch.linalg.lstsq(A, b[:, None], rcond=1e-12, driver="gelsd").solution[:, 0]
    torch.testing.assert_close(A @ solution.x["x"], A @ fitted, rtol=0, atol=1e-8)
    assert not solution.report.converged
    assert solution.report.residual == pytest.approx(float((b - A @ fitted).norm() / b.norm()), rel=1e-8)
    assert solution.report.steps < 20
    assert "outside the range" in solution.report.status


def test_gmres_stops_at_a_singular_unsymmetric_system() -> None:
    A = torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
    A[0, 2] = 1.0
    report = gmres(on_flat(A), {"x": torch.ones(3, dtype=torch.float64)}).report
    assert not report.converged
    assert "A is singular" in report.status
    nothing = gmres(lambda v: {"x": 0 * v["x"]}, {"x": torch.ones(3, dtype=torch.float64)})
    assert not nothing.report.converged
    assert float(nothing.x["x"].norm()) == 0.0


def test_minres_says_that_a_matrix_is_not_symmetric_rather_than_converge() -> None:
    A, b = unsymmetric(), random_vector(30)
    solution = minres(on_flat(A), {"x": b})
    assert not solution.report.converged
    assert solution.report.residual == pytest.approx(float((b - A @ solution.x["x"]).norm() / b.norm()), rel=1e-10)


def test_gmres_refuses_a_restart_below_one() -> None:
    with pytest.raises(ValueError, match="restart"):
        gmres(lambda v: v, {"x": torch.ones(2)}, restart=0)
