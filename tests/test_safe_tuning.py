"""`tune` under safety constraints on exact linear-quadratic functions, against scipy's SLSQP."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from benchmarks.safety import (
    GAMMA,
    HIGH,
    LIMIT,
    LOW,
    START,
    TRUTH,
    WORLD,
    exact_gradient,
    exact_margin,
    model_gain,
    model_return,
    record,
    reward,
    s_randomization,
    scipy_optimum,
    scipy_return,
    start_theta,
    tuned,
    world_return,
)
from sim2real import (
    Constraint,
    Params,
    Policy,
    Rollout,
    linear_policy,
    posterior_draws,
    sample_noise,
    tune,
    worst_case_gradient,
)
from sim2real.tune_state import TuneSettings
from tests.problems import scalar, seeded


def test_the_limit_is_met_exactly_and_nothing_more_is_given_away() -> None:
    reference, best = scipy_optimum()
    found = tuned(None, 0, 60)
    theta = np.array([float(found.theta[key]) for key in "db"])
    value, margin = scipy_return(theta)
    assert scipy_return(np.array(START))[1] < -1.0  # the start violates the limit by far
    assert margin > -1e-6 * LIMIT
    # SLSQP's own derivatives are numerical: about 1e-8 in the return, its root in theta
    assert value == pytest.approx(best, rel=1e-7)
    np.testing.assert_allclose(theta, reference, atol=1e-3)


def test_a_lower_recorded_return_does_not_stop_the_way_back_into_the_limits() -> None:
    def exactly(policy: Policy, nu: Params, iteration: int, generator: torch.Generator) -> Rollout:
        """Two one-step episodes that record the exact return, almost without spread: every fall is significant."""
        value = world_return(nu["gain"]) + torch.tensor([-1e-9, 1e-9]).double()
        return Rollout(torch.zeros(2, 2, 2).double(), torch.zeros(2, 1, 1).double(), value.unsqueeze(-1))

    policy, theta = linear_policy(1), start_theta()
    found = tune(
        WORLD,
        policy,
        theta,
        model_gain(theta, {}),
        None,
        None,
        real_reward=None,
        real_discount=GAMMA,
        collect=exactly,
        objective=model_return,
        optimum=model_gain,
        gradient=exact_gradient,
        constraints={"effort": exact_margin},
        settings=TuneSettings(max_steps=12, radius=2.0),
        scale={key: scalar(0.05) for key in "db"},
    )
    returns = [row["measured_return"] for row in found.history if row["accepted"]]
    assert min(returns) < returns[0]
    assert float(exact_margin(found.nu, None).value) > -1e-4
    assert float(world_return(found.nu["gain"])) == pytest.approx(scipy_optimum()[1], rel=1e-3)


def test_the_worst_case_over_draws_is_met() -> None:
    effort = Constraint("effort", lambda s, a, s_next: a.square().sum(-1), 4.0, "worst_case", GAMMA, width=0.02)
    policy, theta = linear_policy(1), start_theta()
    noise = sample_noise(WORLD, policy, 8, 20, seeded(0))
    factor, z = 0.05 * torch.eye(2).double(), torch.randn(6, 2, generator=seeded(1), dtype=torch.float64)
    draws = posterior_draws(TRUTH, ("B",), factor, z)
    margin = lambda nu, data=None: worst_case_gradient(effort, WORLD, policy, draws, nu, noise)
    found = tune(
        WORLD,
        policy,
        theta,
        model_gain(theta, {}),
        record(policy, model_gain(theta, {}), 0, seeded(2), episodes=2),
        None,
        real_reward=reward,
        real_discount=GAMMA,
        objective=model_return,
        optimum=model_gain,
        gradient=exact_gradient,
        constraints={"effort": margin},
        settings=TuneSettings(max_steps=40, radius=1.0, gradient_tol=1e-6),
        scale={key: scalar(0.05) for key in "db"},
    )

    def functions(t: np.ndarray) -> tuple[float, float]:
        nu = model_gain({key: scalar(float(x)) for key, x in zip("db", t, strict=True)}, {})
        return float(world_return(nu["gain"])), float(margin(nu).value)

    reference = minimize(
        lambda t: -functions(t)[0],
        np.array([0.9, 0.6]),
        bounds=list(zip(LOW, HIGH, strict=True)),
        constraints=[{"type": "ineq", "fun": lambda t: functions(t)[1]}],
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 200},
    )
    assert reference.success
    assert functions(reference.x)[1] > -1e-6
    assert functions(np.array(START))[1] < -1.0
    assert float(margin(found.nu).value) > -1e-6
    assert float(world_return(found.nu["gain"])) == pytest.approx(-reference.fun, rel=1e-5)
    plain = replace(effort, width=0.0)
    assert float(worst_case_gradient(plain, WORLD, policy, draws, found.nu, noise).value) >= -1e-6  # the stricter one


def test_draws_of_the_posterior_protect_the_tail() -> None:
    gains = {figure.metric: figure.value for figure in s_randomization(True)}
    assert gains["posterior-mean"] > 0
    assert gains["worst-fifth-tail"] > gains["posterior-tail"] > 0
    assert -0.02 < gains["worst-fifth-mean"] < 0
