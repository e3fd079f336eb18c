"""The benchmark of large policies: its reference against central differences, one small policy, and the whole bar."""

from __future__ import annotations

import pytest
import torch

from benchmarks.scale import (
    jacobian_error,
    memory,
    one_vjp,
    open_loop,
    peak_megabytes,
    s_scale,
    task,
    trained,
    vjp_error,
)
from sim2real.params import ravel, unravel


def test_the_reference_equals_central_differences_of_the_best_actions() -> None:
    theta, states = task(0)
    states = states[:3]
    actions, derivative = open_loop(theta, states)
    vector = ravel(theta)
    direction = torch.randn(24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    above, below = (open_loop(unravel(vector + h * direction, theta), states)[0] for h in (1e-5, -1e-5))
    # truncation 1e-10 times third derivatives, rounding 1e-14 / 1e-5
    torch.testing.assert_close((above - below) / 2e-5, derivative @ direction, rtol=1e-6, atol=1e-7)
    assert actions.shape == (3, 2)


def test_a_small_trained_policy_meets_the_bar_with_everything_automatic() -> None:
    p = trained(16, 0, 300)
    pulled, _, found = one_vjp(p)
    assert found.report.converged
    assert found.report.damping > 0
    # 386 parameters, 300 steps of L-BFGS; the bar of the benchmark is 4 %
    assert vjp_error(p, pulled) < 0.04
    assert jacobian_error(p, found) < 0.04


@pytest.mark.slow
def test_memory_is_that_of_a_fresh_process() -> None:
    peak, imported = memory(trained(16, 0, 300))  # fewer steps do not end at an optimum, and are refused
    assert 50 < imported < peak < imported + 100
    assert peak_megabytes() > 0


@pytest.mark.slow
def test_the_bar() -> None:
    figures = {figure.metric: figure.value for figure in s_scale(quick=True)}
    assert max(figures[name] for name in ("1e3", "1e4", "1e5")) <= 0.04
    assert figures["MB"] <= 512
