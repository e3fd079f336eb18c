"""`policy_optimum` on problems whose maximiser, saddles and flat directions are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from benchmarks.oracles.lqr import optimal_gain, random_system
from sim2real import Params
from sim2real.solvers import lyapunov, policy_optimum


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def rosenbrock(theta: Params, nu: Params) -> Tensor:
    x, y = nu["x"][0], nu["x"][1]
    return -theta["scale"] * ((1 - x) ** 2 + 100 * (y - x * x) ** 2)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_rosenbrock_in_any_unit_of_the_return(scale: float) -> None:
    found = policy_optimum(rosenbrock, {"scale": vector(scale)[0]}, {"x": vector(-1.2, 1.0)})
    assert found.report.converged
    # tol 1e-10 times the condition number 2500
    torch.testing.assert_close(found.nu["x"], vector(1.0, 1.0), rtol=0, atol=1e-9)
    assert found.report.negative_curvature is None
    assert found.report.eigenvalues == pytest.approx((0.3994 * scale, 1001.6 * scale), rel=1e-3)


@pytest.mark.parametrize(("n", "m", "seed"), [(2, 1, 1), (4, 2, 2), (8, 2, 3)])
def test_gain_of_lqr_equals_scipy(n: int, m: int, seed: int) -> None:
    system = {key: torch.tensor(value) for key, value in random_system(n, m, seed).items()}
    K = torch.tensor(optimal_gain(random_system(n, m, seed))[1])

    def J(theta: Params, nu: Params) -> Tensor:
        closed, gain = theta["A"] - theta["B"] @ nu["gain"], nu["gain"]
        cost = theta["Q"] + gain.mT @ theta["R"] @ gain
        return -lyapunov(closed, cost, theta["discount"]).diagonal().sum()

    found = policy_optimum(J, system, {"gain": 1.05 * K})
    assert found.report.converged
    torch.testing.assert_close(found.nu["gain"], K, rtol=0, atol=1e-10)
    assert found.report.residual == found.report.stationarity


def test_several_tensors_and_the_dtype_of_the_start() -> None:
    J = lambda theta, nu: -((nu["a"] - theta["t"]) ** 2) - ((nu["b"] - nu["a"]) ** 4 + (nu["b"] - nu["a"]) ** 2).sum()
    found = policy_optimum(J, {"t": torch.tensor(2.0)}, {"a": torch.tensor(0.0), "b": torch.zeros(2, 3)})
    assert found.report.converged
    assert found.nu["a"].dtype == torch.float32
    torch.testing.assert_close(found.nu["b"], torch.full((2, 3), 2.0))
    assert not found.nu["a"].requires_grad


def test_a_saddle_is_left_and_never_called_converged() -> None:
    J = lambda theta, nu: nu["x"][0] ** 2 - nu["x"][0] ** 4 - nu["x"][1] ** 2
    found = policy_optimum(J, {}, {"x": vector(0.0, 0.0)})
    assert found.report.converged
    assert float(found.nu["x"][0].abs()) == pytest.approx(0.5**0.5, abs=1e-9)
    held = policy_optimum(J, {}, {"x": vector(0.0, 0.0)}, max_steps=1, warmup=0)
    assert not held.report.converged


def test_start_of_wrong_curvature_far_away() -> None:
    J = lambda theta, nu: torch.exp(-((nu["x"] - 1) ** 2).sum())  # curves upward beyond 0.7 from its top
    found = policy_optimum(J, {}, {"x": vector(2.5, 0.0, -0.5)})
    assert found.report.converged
    torch.testing.assert_close(found.nu["x"], vector(1.0, 1.0, 1.0), rtol=0, atol=1e-9)


def test_steps_into_an_infinite_cost_are_taken_back() -> None:
    J = lambda theta, nu: torch.log(nu["x"]).sum() - 5 * nu["x"].sum()  # nan below zero
    found = policy_optimum(J, {}, {"x": vector(3.0, 1.0)})
    assert found.report.converged
    torch.testing.assert_close(found.nu["x"], vector(0.2, 0.2), rtol=0, atol=1e-10)


def test_a_step_over_a_cliff_is_not_taken_for_rounding() -> None:
    J = lambda theta, nu: (1e-3 * nu["x"] - torch.exp(40 * (nu["x"] - 2))).sum()  # 1e17 worse one radius further
    found = policy_optimum(J, {}, {"x": vector(0.0)})
    assert found.report.converged
    assert float(found.nu["x"]) == pytest.approx(2 + math.log(2.5e-5) / 40, rel=1e-10)


@pytest.mark.parametrize(
    ("horizon", "start", "tol"),
    [(20, (30.0, 30.0), 1e-10), (20, (-30.0, 50.0), 1e-10), (60, (-5.0, -3.0), 1e-6), (60, (30.0, 30.0), 1e-6)],
)
def test_a_diverging_rollout_is_not_taken_for_a_maximum(horizon: int, start: tuple[float, float], tol: float) -> None:
    """-J curves by up to 1e70 at the start and by 1e13 in a valley on the way: gradients are small beside that."""
    A, B = torch.stack([vector(1.0, 0.1), vector(0.0, 1.0)]), torch.stack([vector(0.0), vector(0.1)])

    def J(theta: Params, nu: Params) -> Tensor:
        s, cost = torch.eye(2, dtype=torch.float64), vector(0.0)[0]
        for t in range(horizon):
            a = -s @ nu["x"].reshape(2, 1)
            cost = cost + 0.99**t * ((s * s).sum() + 0.1 * (a * a).sum())
            s = s @ A.mT + a @ B.mT
        return -cost

    found = policy_optimum(J, {}, {"x": vector(*start)}, tol=tol)
    best = policy_optimum(J, {}, {"x": vector(2.0, 3.5)}).nu["x"]
    assert found.report.converged
    torch.testing.assert_close(found.nu["x"], best, rtol=0, atol=1e-6)


def test_unbounded_flat_and_unfinished_problems_do_not_converge() -> None:
    linear = policy_optimum(lambda theta, nu: nu["x"].sum(), {}, {"x": vector(0.0, 0.0)}, max_steps=5)
    assert not linear.report.converged
    assert "not stationary" in linear.report.status
    flat = policy_optimum(lambda theta, nu: 0.0 * nu["x"].sum(), {}, {"x": vector(1.0)})
    assert not flat.report.converged
    assert "flat" in flat.report.status
    short = policy_optimum(rosenbrock, {"scale": vector(1.0)[0]}, {"x": vector(-1.2, 1.0)}, max_steps=2)
    assert not short.report.converged
    assert short.report.steps == 2


def test_a_flat_direction_is_allowed_and_reported() -> None:
    found = policy_optimum(lambda theta, nu: -((nu["x"].sum() - 1) ** 2), {}, {"x": vector(3.0, 5.0)})
    assert found.report.converged
    assert float(found.nu["x"].sum()) == pytest.approx(1.0, abs=1e-10)
    assert found.report.eigenvalues is not None
    assert abs(found.report.eigenvalues[0]) < 1e-10


def test_a_gradient_that_ends_in_noise_is_not_called_converged() -> None:
    """J with a kink has no stationary point: the search stalls and says so."""
    found = policy_optimum(lambda theta, nu: -(nu["x"] - 1).abs().sum(), {}, {"x": vector(3.0, 0.2)})
    assert not found.report.converged


def test_the_same_call_gives_the_same_bits() -> None:
    calls = [policy_optimum(rosenbrock, {"scale": vector(1.0)[0]}, {"x": vector(-1.2, 1.0)}) for _ in range(2)]
    assert torch.equal(calls[0].nu["x"], calls[1].nu["x"])
    assert calls[0].report == calls[1].report


@pytest.mark.parametrize(
    ("J", "options", "message"),
    [
        (lambda theta, nu: nu["x"], {}, "scalar"),
        (lambda theta, nu: nu["x"].detach().sum(), {}, "differentiably"),
        (lambda theta, nu: nu["x"].sum() / 0.0, {}, "not finite"),
        (lambda theta, nu: nu["x"].sum(), {"tol": 0.0}, "tol"),
        (lambda theta, nu: nu["x"].sum(), {"max_steps": 0}, "max_steps"),
    ],
)
def test_bad_inputs_are_named(J: object, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy_optimum(J, {}, {"x": vector(1.0, 2.0)}, **options)


def test_what_is_called_converged_is_a_maximum_on_random_bumpy_returns() -> None:
    """Ten returns with several maxima, saddles and minima; gradient and Hessian are checked by torch.func."""
    converged = 0
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        centers = 2 * torch.randn(6, 3, generator=generator, dtype=torch.float64)
        heights = torch.rand(6, generator=generator, dtype=torch.float64) - 0.3

        def J(theta: Params, nu: Params, centers: Tensor = centers, heights: Tensor = heights) -> Tensor:
            bumps = torch.exp(-((nu["x"] - centers) ** 2).sum(1))
            return heights @ bumps - 0.02 * (nu["x"] ** 2).sum()

        start = torch.randn(3, generator=generator, dtype=torch.float64)
        found = policy_optimum(J, {}, {"x": start})
        converged += found.report.converged
        f = lambda x, J=J: J({}, {"x": x})
        assert float(f(found.nu["x"])) >= float(f(start))
        if found.report.converged:
            assert float(torch.func.grad(f)(found.nu["x"]).norm()) < 1e-8
            assert float(torch.linalg.eigvalsh(torch.func.hessian(f)(found.nu["x"])).max()) < 0
    assert converged == 10
