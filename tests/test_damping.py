"""Automatic damping: none where the Hessian is definite, above negative curvature elsewhere, no cure for saddles."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from sim2real import LinearSolution, Params, UnconvergedError, UnconvergedWarning
from sim2real.estimators import policy_sensitivity
from sim2real.estimators.damping import damped_solve, probe_damping
from sim2real.solvers import cg, dense, spectrum


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def diagonal(values: Tensor) -> Callable[[Params], Params]:
    return lambda x: {"x": values * x["x"]}


def probed(values: Tensor, steps: int = 40) -> tuple[float, str]:
    return probe_damping(spectrum(diagonal(values), {"x": torch.zeros_like(values)}, steps=steps))


def test_definite_operators_are_not_damped() -> None:
    assert probed(vector(1e-7, 1.0, 1e3))[0] == 0.0  # exact: condition 1e10 is no reason
    damping, why = probed(torch.linspace(1.0, 50.0, 300).double())  # not exact, but far from zero
    assert damping == 0.0
    assert "no damping" in why


def test_damping_exceeds_the_negative_curvature_and_what_the_probe_left_open() -> None:
    assert probed(vector(-1e-3, 0.0, 1.0, 100.0))[0] == pytest.approx(2e-3, rel=1e-7)
    # flat directions: half of the digits of float64 times the largest curvature
    assert probed(vector(0.0, 1.0, 100.0))[0] == pytest.approx(100 * 2**-26, rel=1e-3)
    values = torch.cat([torch.logspace(2, -8, 400).double(), vector(-3e-3)])
    found = spectrum(diagonal(values), {"x": torch.zeros_like(values)})
    damping, why = probe_damping(found)
    assert not found.exact
    assert damping == 2 * (max(0.0, -found.lowest) + found.lowest_residual)
    assert damping > 3e-3
    assert "probe" in why
    assert probed(torch.zeros(3).double())[0] == 0.0


def test_a_solve_that_meets_more_negative_curvature_is_repeated_with_more_damping() -> None:
    # the fixed random start of the probe has no part along e, so that no Krylov space of it can see -0.0005
    start = torch.randn(1, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[0]
    e = torch.ones(50).double() - start * start.sum() / (start @ start)
    e = e / e.norm()
    A = torch.eye(50).double() - 1.0005 * torch.outer(e, e)
    b = start / start.norm() + e
    solution, solver = damped_solve(cg, lambda x: {"x": A @ x["x"]}, {"x": b})
    report = solution.report
    assert solver is cg
    assert report.converged
    assert report.negative_curvature == pytest.approx(-5e-4, rel=1e-6)
    assert report.damping == pytest.approx(1e-3, rel=1e-3)
    assert "raised" in report.status
    damped = A + report.damping * torch.eye(50).double()
    torch.testing.assert_close(damped @ solution.x["x"], b, rtol=0, atol=1e-9)


def test_an_operator_that_shows_new_negative_curvature_at_every_solve_ends_unconverged() -> None:
    calls: list[float] = []

    def worse(matvec: Callable, b: Params, *, damping: float) -> LinearSolution:
        calls.append(damping)
        solution = cg(matvec, b, damping=damping)
        met = -max(damping, 1e-9)
        return LinearSolution(solution.x, replace(solution.report, converged=False, negative_curvature=met))

    solution, _ = damped_solve(worse, diagonal(torch.linspace(1.0, 9.0, 20).double()), {"x": torch.ones(20).double()})
    assert not solution.report.converged
    assert len(calls) == 6
    assert calls == sorted(calls)


def quadratic(values: Tensor) -> Callable[[Params, Params], Tensor]:
    """nu* = theta where all values are positive: dnu*/dtheta = 1, with damping d values / (values + d)."""
    return lambda theta, nu: -0.5 * (values * (nu["x"] - theta["t"]) ** 2).sum()


@pytest.mark.parametrize("solve", [cg, dense], ids=["cg", "dense"])
def test_a_saddle_is_refused_whatever_the_damping(solve: Callable) -> None:
    J, at = quadratic(vector(-0.1, 1.0, 5.0)), vector(0.0, 0.0, 0.0)
    with pytest.warns(UnconvergedWarning, match="no maximum"):
        report = policy_sensitivity(J, {"t": at}, {"x": at}, solve=solve).report
    assert not report.converged
    with pytest.raises(UnconvergedError, match="no maximum"):
        policy_sensitivity(J, {"t": at}, {"x": at}, solve=solve, strict=True)


def test_slightly_indefinite_returns_are_damped_and_all_products_share_the_damping() -> None:
    values = vector(-1e-4, 1e-3, 1.0, 5.0)
    J, at, g = quadratic(values), torch.zeros(4).double(), torch.ones(4).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnconvergedWarning)
        sensitivity = policy_sensitivity(J, {"t": at}, {"x": at}, solve=cg, strict=True)
        damping = sensitivity.report.damping
        assert damping == pytest.approx(2e-4, rel=1e-6)
        expected = values / (values + damping)
        torch.testing.assert_close(sensitivity.vjp({"x": g})["t"], expected, rtol=1e-8, atol=0)
        torch.testing.assert_close(sensitivity.jvp({"t": g})["x"], expected, rtol=1e-8, atol=0)
    assert sensitivity.report.negative_curvature == pytest.approx(-1e-4, rel=1e-6)
    assert "probe's lowest curvature" in sensitivity.report.status
    exact = policy_sensitivity(quadratic(vector(1e-3, 1.0, 5.0)), {"t": at[:3]}, {"x": at[:3]})
    assert exact.report.damping == 0.0
    torch.testing.assert_close(exact.vjp({"x": g[:3]})["t"], g[:3], rtol=1e-9, atol=0)


def test_without_a_solver_the_probe_preconditions_the_damped_solve() -> None:
    values = torch.cat([torch.logspace(3, 0, 30).double(), 1e-4 * torch.rand(300).double() - 5e-5])
    b = values.clamp_min(0.0) ** 0.5
    quick, solver = damped_solve(None, diagonal(values), {"x": b})
    plain, _ = damped_solve(partial(cg, tol=1e-3), diagonal(values), {"x": b})
    assert quick.report.converged
    assert quick.report.damping == plain.report.damping > 1e-4
    assert 3 * quick.report.steps <= plain.report.steps
    x = solver(diagonal(values), {"x": b}, damping=quick.report.damping).x["x"]
    assert float(((values + quick.report.damping) * x - b).norm()) <= 1e-3 * float(b.norm())
    definite, solver = damped_solve(None, diagonal(values[:30]), {"x": b[:30]})
    assert solver is cg
    assert definite.report.damping == 0.0


def test_a_damping_that_is_no_number_is_named() -> None:
    at = torch.zeros(2).double()
    with pytest.raises(ValueError, match="or 'auto', got 'high'"):
        policy_sensitivity(quadratic(vector(1.0, 2.0)), {"t": at}, {"x": at}, damping="high")  # type: ignore[arg-type]
    for bad in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="damping must be finite and >= 0"):
            policy_sensitivity(quadratic(vector(1.0, 2.0)), {"t": at}, {"x": at}, solve=partial(cg), damping=bad)
