"""The Neumann series against its closed form, and what it says where it cannot converge."""

from __future__ import annotations

import pytest
import torch
from problems import on_flat, random_vector, spectrum
from torch import Tensor

from sim2real.solvers import neumann

POSITIVE = [0.5, 1.0, 2.0, 4.0, 7.0, 10.0]


def rotation_like(radius: float, size: int = 6) -> Tensor:
    """I - N with N unsymmetric of this spectral radius: the linear part of a fixed point `x = N x + b`."""
    draw = torch.randn(size, size, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return torch.eye(size, dtype=torch.float64) - draw * radius / torch.linalg.eigvals(draw).abs().max()


@pytest.mark.parametrize("damping", [0.0, 0.7])
def test_positive_systems_with_the_step_of_power_iteration(damping: float) -> None:
    A, b = spectrum(POSITIVE), random_vector(6)
    solution = neumann(on_flat(A), {"x": b}, damping=damping, tol=1e-12)
    expected = torch.linalg.solve(A + damping * torch.eye(6, dtype=torch.float64), b)
    torch.testing.assert_close(solution.x["x"], expected, rtol=1e-10, atol=1e-11)
    report = solution.report
    assert report.converged
    assert report.residual <= 1e-12
    assert report.negative_curvature is None
    # the residual turns to the slowest eigenvector, power iteration to the largest; both are Rayleigh quotients,
    # whose error is of second order in the vectors'
    assert report.eigenvalues is not None
    assert report.eigenvalues == pytest.approx((0.5, 10.0), rel=1e-3)
    # |r| falls by 1 - mu / L at the slowest, to 3e-13; 20 products of power iteration come on top
    terms = float(torch.log(torch.tensor(3e-13)) / torch.log(torch.tensor(1 - (0.5 + damping) / (10.0 + damping))))
    assert 0.8 * terms < report.steps - 20 < 1.1 * terms


def test_a_given_number_of_terms_is_the_truncated_series() -> None:
    A, b = spectrum(POSITIVE), random_vector(6)
    solution = neumann(on_flat(A), {"x": b}, step=0.05, max_steps=7)
    contraction = torch.eye(6, dtype=torch.float64) - 0.05 * A
    series = 0.05 * sum((torch.linalg.matrix_power(contraction, k) @ b for k in range(7)), torch.zeros(6))
    torch.testing.assert_close(solution.x["x"], series, rtol=1e-12, atol=1e-14)
    report = solution.report
    assert not report.converged
    assert report.steps == 7
    assert report.residual == pytest.approx(float((b - A @ series).norm() / b.norm()), rel=1e-10)
    assert "too slow" in report.status


@pytest.mark.parametrize(("radius", "converges"), [(0.9, True), (0.99, True), (1.01, False), (1.5, False)])
def test_unsymmetric_systems_converge_where_the_spectral_radius_is_below_one(radius: float, converges: bool) -> None:
    A, b = rotation_like(radius), random_vector(6)
    solution = neumann(on_flat(A), {"x": b}, step=1.0, max_steps=5000)
    assert solution.report.converged == converges
    assert solution.report.eigenvalues is None
    if converges:
        torch.testing.assert_close(solution.x["x"], torch.linalg.solve(A, b), rtol=1e-7, atol=1e-8)
    else:
        assert "spectral radius" in solution.report.status
        assert solution.report.steps < 5000
        true = float((b - A @ solution.x["x"]).norm() / b.norm())
        assert solution.report.residual == pytest.approx(true, rel=1e-10)
        assert true <= 1.0  # the best partial sum, not the last


@pytest.mark.parametrize(("step", "converges"), [(0.19, True), (0.21, False)])
def test_the_step_must_stay_below_two_over_the_largest_eigenvalue(step: float, converges: bool) -> None:
    report = neumann(on_flat(spectrum(POSITIVE)), {"x": random_vector(6)}, step=step).report
    assert report.converged == converges


def test_an_indefinite_system_diverges_and_shows_its_negative_curvature() -> None:
    A, b = spectrum([-0.3, 1.0, 2.0, 4.0, 7.0, 10.0]), {"x": random_vector(6)}
    report = neumann(on_flat(A), b).report
    assert not report.converged
    assert "diverges" in report.status
    assert report.negative_curvature == pytest.approx(-0.3, rel=1e-2)
    assert "1.03" in report.status  # 1 + 0.3 / 10
    hidden = neumann(on_flat(A), b, damping=1.0).report
    assert hidden.converged
    assert hidden.negative_curvature is not None
    assert -0.3 - 1e-12 <= hidden.negative_curvature < -0.2


def test_a_singular_system_converges_if_consistent_and_an_ill_conditioned_one_says_it_is_too_slow() -> None:
    A = spectrum([0.0, 1.0, 2.0, 4.0, 7.0, 10.0])
    b = A @ random_vector(6)
    solution = neumann(on_flat(A), {"x": b})
    assert solution.report.converged
    torch.testing.assert_close(solution.x["x"], torch.linalg.pinv(A, rtol=1e-12) @ b, rtol=1e-7, atol=1e-8)
    outside = neumann(on_flat(A), {"x": random_vector(6)})
    assert not outside.report.converged
    assert "outside the range" in outside.report.status
    assert outside.report.steps < 1000
    slow = neumann(on_flat(spectrum([1e-4, 1.0, 2.0, 4.0, 7.0, 10.0])), {"x": random_vector(6)}).report
    assert not slow.converged
    assert slow.steps == 1000
    assert "too slow" in slow.status
    assert "0.99999" in slow.status


@pytest.mark.parametrize(
    ("options", "message"), [({"step": -1.0}, "step"), ({"step": float("inf")}, "step"), ({"power_steps": 1}, "power")]
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        neumann(lambda v: v, {"x": torch.ones(2)}, **options)
