"""CG and the dense solve against numpy on matrices with known spectra."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.func import vmap

from sim2real import Params, ravel
from sim2real.solvers import cg, dense

SOLVERS = {"cg": partial(cg, tol=1e-12), "dense": partial(dense, tol=1e-12)}


def symmetric(values: list[float], seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))
    return q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.T


def on_params(matrix: Tensor) -> Callable[[Params], Params]:
    """The matrix [6, 6] acting on {"x": [2, 2], "y": [2]}."""

    def matvec(v: Params) -> Params:
        out = matrix @ ravel(v)
        return {"x": out[:4].reshape(2, 2), "y": out[4:]}

    return matvec


def right_hand_side(seed: int = 1) -> Params:
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    return {"x": draw(2, 2), "y": draw(2)}


POSITIVE = [0.5, 1.0, 2.0, 4.0, 7.0, 30.0]
INDEFINITE = [-0.3, 1.0, 2.0, 4.0, 7.0, 30.0]


@pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("damping", [0.0, 0.7])
def test_solution_equals_numpy(solve: Callable, damping: float) -> None:
    A, b = symmetric(POSITIVE), right_hand_side()
    solution = solve(on_params(A), b, damping=damping)
    expected = torch.linalg.solve(A + damping * torch.eye(6, dtype=torch.float64), ravel(b))
    # condition 60, residual 1e-12: the error is at most 60 times that
    torch.testing.assert_close(ravel(solution.x), expected, rtol=1e-10, atol=1e-11)
    assert solution.report.converged
    assert solution.report.residual <= 1e-12
    assert solution.report.damping == damping
    assert solution.report.negative_curvature is None
    # six different eigenvalues: the Krylov space is everything, so the Ritz values are the eigenvalues, undamped
    assert solution.report.eigenvalues == pytest.approx((0.5, 30.0), rel=1e-6)


def test_cg_takes_as_many_steps_as_there_are_eigenvalues() -> None:
    report = cg(on_params(symmetric([1.0, 1.0, 5.0, 5.0, 9.0, 9.0])), right_hand_side()).report
    assert report.converged
    assert report.steps == 3


@pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS)
def test_rows_of_a_batch_are_solved_on_their_own(solve: Callable) -> None:
    matrices = torch.stack([symmetric(POSITIVE, seed=k) * 10.0**k for k in range(3)])
    b = {key: torch.stack([right_hand_side(k)[key] * 1e-6**k for k in range(3)]) for key in ("x", "y")}
    b = {key: value.unsqueeze(0) for key, value in b.items()}  # two batch dimensions: [1, 3]
    matvec = vmap(lambda v: vmap(lambda A, w: on_params(A)(w))(matrices, v))
    solution = solve(matvec, b, batch_dims=2)
    assert solution.report.converged
    for k in range(3):
        expected = torch.linalg.solve(matrices[k], ravel({key: value[0, k] for key, value in b.items()}))
        # relative to a row that is 1e-12 of the largest one
        torch.testing.assert_close(
            ravel({key: value[0, k] for key, value in solution.x.items()}), expected, rtol=1e-9, atol=0
        )


def test_cg_stops_at_negative_curvature() -> None:
    solution = cg(on_params(symmetric(INDEFINITE)), right_hand_side())
    assert not solution.report.converged
    assert solution.report.negative_curvature is not None
    assert -0.3 - 1e-9 <= solution.report.negative_curvature < 0
    assert "raise the damping" in solution.report.status


def test_cg_reports_the_negative_curvature_that_damping_hides() -> None:
    solution = cg(on_params(symmetric(INDEFINITE)), right_hand_side(), damping=0.5)
    assert solution.report.converged
    assert solution.report.negative_curvature == pytest.approx(-0.3, rel=1e-6)


def test_dense_reports_the_most_negative_eigenvalue_and_solves_all_the_same() -> None:
    A, b = symmetric(INDEFINITE), right_hand_side()
    solution = dense(on_params(A), b)
    torch.testing.assert_close(ravel(solution.x), torch.linalg.solve(A, ravel(b)), rtol=1e-10, atol=1e-10)
    assert solution.report.negative_curvature == pytest.approx(-0.3, rel=1e-10)
    assert "indefinite" in solution.report.status


def test_dense_gives_null_directions_zero_and_says_the_system_is_not_solved() -> None:
    A = symmetric([0.0, 1.0, 2.0, 4.0, 7.0, 30.0])
    solution = dense(on_params(A), right_hand_side())
    expected = torch.linalg.pinv(A, hermitian=True) @ ravel(right_hand_side())
    torch.testing.assert_close(ravel(solution.x), expected, rtol=1e-9, atol=1e-9)
    assert not solution.report.converged
    assert "singular" in solution.report.status
    assert dense(on_params(A), on_params(A)(right_hand_side())).report.converged


def test_dense_solves_unsymmetric_systems() -> None:
    A = torch.randn(6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    solution = dense(on_params(A), right_hand_side(), damping=0.1)
    expected = torch.linalg.solve(A + 0.1 * torch.eye(6, dtype=torch.float64), ravel(right_hand_side()))
    torch.testing.assert_close(ravel(solution.x), expected, rtol=1e-10, atol=1e-10)
    assert solution.report.eigenvalues is None


def test_dense_sees_an_unsymmetric_row_beside_a_huge_symmetric_one() -> None:
    matrices = torch.tensor([[[1e14, 0.0], [0.0, 1e14]], [[1.0, 1.0], [0.0, 1.0]]], dtype=torch.float64)
    b = {"x": torch.ones(2, 2, dtype=torch.float64)}
    solution = dense(lambda v: {"x": (matrices @ v["x"].unsqueeze(-1)).squeeze(-1)}, b, batch_dims=1)
    assert solution.report.converged
    torch.testing.assert_close(solution.x["x"][1], torch.tensor([0.0, 1.0], dtype=torch.float64))


def test_dense_says_that_an_unsymmetric_system_is_singular() -> None:
    A = torch.diag(torch.tensor([1.0, 1, 1, 1, 1, 0], dtype=torch.float64))
    A[0, 5] = 1.0
    report = dense(on_params(A), right_hand_side()).report
    assert not report.converged
    assert "singular" in report.status


def test_cg_is_honest_about_its_step_limit_and_about_unsymmetric_matrices() -> None:
    limited = cg(on_params(symmetric(POSITIVE)), right_hand_side(), max_steps=2).report
    assert not limited.converged
    assert limited.steps == 2
    assert limited.residual > 1e-10
    A = symmetric(POSITIVE)
    A[0, 3] += 5.0
    skew = cg(on_params(A), right_hand_side())
    true = ravel(right_hand_side()) - A @ ravel(skew.x)
    assert not skew.report.converged
    assert skew.report.residual == pytest.approx(float(true.norm() / ravel(right_hand_side()).norm()), rel=1e-6)


def test_zero_right_hand_side_is_solved_by_zero() -> None:
    solution = cg(on_params(symmetric(POSITIVE)), {"x": torch.zeros(2, 2), "y": torch.zeros(2)})
    assert solution.report.converged
    assert solution.report.steps == 0
    assert float(ravel(solution.x).norm()) == 0.0


def test_cg_refuses_a_step_limit_below_one() -> None:
    with pytest.raises(ValueError, match="max_steps"):
        cg(lambda v: v, {"x": torch.ones(2)}, max_steps=0)
