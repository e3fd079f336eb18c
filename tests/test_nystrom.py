"""The Nystrom preconditioner: the sketch against the eigenvalues, fewer steps of CG, the same answer."""

from __future__ import annotations

import pytest
import torch
from problems import on_flat, random_vector, spectrum

from sim2real.solvers import cg, nystrom_cg, nystrom_sketch

DECAY = (10.0 ** -torch.linspace(0.0, 12.0, 100, dtype=torch.float64)).tolist()  # 1 down to 1e-12, a decade per 8


def test_steps_fall_twenty_times_on_a_fast_decay_and_the_answer_is_the_same() -> None:
    A, b, damping = spectrum(DECAY), random_vector(100), 1e-6
    plain = cg(on_flat(A), {"x": b}, damping=damping, tol=1e-10)
    # 50 of 100 values lie above the damping: rank 60 leaves the spectrum within [1, 2] damping
    conditioned = nystrom_cg(on_flat(A), {"x": b}, damping=damping, tol=1e-10, rank=60)
    assert plain.report.converged
    assert conditioned.report.converged
    assert conditioned.report.residual <= 1e-10
    assert 20 * conditioned.report.steps <= plain.report.steps  # 8 against 698
    assert 5 * (conditioned.report.steps + 60) <= plain.report.steps  # the products of the sketch counted too
    expected = torch.linalg.solve(A + damping * torch.eye(100, dtype=torch.float64), b)
    for solution in (plain, conditioned):
        # condition 1e6, residual 1e-10: 1e-4 is the bound, and the large eigenvalues do far better
        assert float((solution.x["x"] - expected).norm() / expected.norm()) < 1e-6
    assert "rank 60" in conditioned.report.status


def test_a_sketch_serves_many_right_hand_sides_and_dampings() -> None:
    A = spectrum(DECAY)
    sketch = nystrom_sketch(on_flat(A), {"x": random_vector(100)}, rank=60)
    for seed, damping in ((2, 1e-6), (3, 1e-5), (4, 1e-4)):
        b = random_vector(100, seed)
        reused = nystrom_cg(on_flat(A), {"x": b}, damping=damping, sketch=sketch)
        assert reused.report.converged
        expected = torch.linalg.solve(A + damping * torch.eye(100, dtype=torch.float64), b)
        assert float((reused.x["x"] - expected).norm() / expected.norm()) < 1e-6


def test_the_sketch_is_exact_for_the_rank_of_a_and_below_a_otherwise() -> None:
    low = spectrum([5.0, 3.0, 1.0, *[0.0] * 17])
    sketch = nystrom_sketch(on_flat(low), {"x": random_vector(20)}, rank=3)
    approximation = sketch.vectors[0] @ torch.diag(sketch.values[0]) @ sketch.vectors[0].T
    torch.testing.assert_close(approximation, low, rtol=0, atol=1e-12)
    A = spectrum(DECAY)
    sketch = nystrom_sketch(on_flat(A), {"x": random_vector(100)}, rank=30)
    approximation = sketch.vectors[0] @ torch.diag(sketch.values[0]) @ sketch.vectors[0].T
    # A - approximation is positive semidefinite (up to rounding of the shift), and small where the spectrum has decayed
    gap = torch.linalg.eigvalsh(A - approximation)
    assert float(gap[0]) > -1e-14
    assert float(gap[-1]) < 1e-2
    identity = sketch.vectors[0].T @ sketch.vectors[0]
    torch.testing.assert_close(identity, torch.eye(30, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 5, 20, 100])
def test_any_rank_gives_the_answer(rank: int) -> None:
    values = torch.linspace(0.5, 30.0, 20, dtype=torch.float64).tolist()
    A, b = spectrum(values), random_vector(20)
    solution = nystrom_cg(on_flat(A), {"x": b}, tol=1e-12, rank=rank)
    assert solution.report.converged
    torch.testing.assert_close(solution.x["x"], torch.linalg.solve(A, b), rtol=1e-10, atol=1e-11)
    assert solution.report.eigenvalues is not None
    low, high = solution.report.eigenvalues
    assert 0 < low <= 0.5 * (1 + 1e-6)  # not above the lowest eigenvalue: a bound built on it is a bound
    assert high <= 30.0 * (1 + 1e-12)
    assert solution.report.negative_curvature is None


def test_a_singular_consistent_system_with_a_sketch_of_more_than_its_rank() -> None:
    A = spectrum([0.0, 0.0, 0.0, 1e-3, 1.0, 8.0])
    b = A @ random_vector(6)
    solution = nystrom_cg(on_flat(A), {"x": b}, rank=6)
    assert solution.report.converged
    torch.testing.assert_close(A @ solution.x["x"], b, rtol=0, atol=1e-9)
    assert solution.report.negative_curvature is None


def test_negative_curvature_is_met_and_told_with_and_without_damping() -> None:
    A, b = spectrum([-0.3, 1.0, 2.0, 4.0, 7.0, 30.0]), {"x": random_vector(6)}
    report = nystrom_cg(on_flat(A), b, rank=3).report
    assert not report.converged
    assert report.negative_curvature is not None
    assert -0.3 - 1e-9 <= report.negative_curvature < 0
    assert "raise the damping" in report.status
    hidden = nystrom_cg(on_flat(A), b, rank=6, damping=0.5)
    assert hidden.report.converged
    assert hidden.report.negative_curvature == pytest.approx(-0.3, rel=1e-9)  # the sketch sees the whole space
    expected = torch.linalg.solve(A + 0.5 * torch.eye(6, dtype=torch.float64), b["x"])
    torch.testing.assert_close(hidden.x["x"], expected, rtol=1e-8, atol=1e-9)


def test_unconverged_and_zero() -> None:
    A, b = spectrum(DECAY), random_vector(100)
    solution = nystrom_cg(on_flat(A), {"x": b}, damping=1e-6, rank=10, max_steps=3)
    true = b - A @ solution.x["x"] - 1e-6 * solution.x["x"]
    assert not solution.report.converged
    assert solution.report.residual == pytest.approx(float(true.norm() / b.norm()), rel=1e-6)
    zero = nystrom_cg(on_flat(A), {"x": torch.zeros_like(b)})
    assert zero.report.converged
    assert zero.report.steps == 0
    nothing = nystrom_cg(lambda v: {"x": 0 * v["x"]}, {"x": b})
    assert not nothing.report.converged


def test_bad_options_are_named() -> None:
    b = {"x": torch.ones(2)}
    with pytest.raises(ValueError, match="rank"):
        nystrom_cg(lambda v: v, b, rank=0)
    with pytest.raises(ValueError, match="rank"):
        nystrom_sketch(lambda v: v, b, rank=0)
    with pytest.raises(ValueError, match="sketch is for"):
        nystrom_cg(lambda v: v, b, sketch=nystrom_sketch(lambda v: v, {"x": torch.ones(3)}))
