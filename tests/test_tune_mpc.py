"""MPC policies in the chain of `tune`: built from theta by a formula, or with weights trained in the model."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad_and_value

from sim2real.bounds import Box
from sim2real.estimators import certify, explicit_sensitivity
from sim2real.mdp import ModelMDP, Noise, sample_noise
from sim2real.params import Estimate, Params
from sim2real.policy import Policy, deterministic_policy
from sim2real.rollout import expected_return
from sim2real.simulators import linear_gaussian, multiplicative_noise_lqr
from sim2real.solve_report import UnconvergedWarning
from sim2real.solvers import mpc_policy, policy_optimum, riccati
from sim2real.tuning import TuneSettings, tune, tune_step

EYE = torch.eye(2, dtype=torch.float64)
A = torch.tensor([[1.0, 0.3], [0.0, 1.1]], dtype=torch.float64)
B = torch.tensor([[0.05], [0.3]], dtype=torch.float64)
COST = {"Q": EYE, "R": 0.1 * EYE[:1, :1]}
LIMIT = {"low": -0.6 * torch.ones(1, dtype=torch.float64), "high": 0.6 * torch.ones(1, dtype=torch.float64)}


def real_gradient(
    policy: Policy, nu: Params, log: Any, *, mdp: ModelMDP, theta: Params, noise: Noise, **_: Any
) -> Estimate:
    """Exact, on fixed noise, through a simulation that stands for the real system."""
    gradient, value = grad_and_value(lambda at: expected_return(mdp, policy, theta, at, noise))(nu)
    return Estimate(value, gradient)


def setting(batch: int = 8, horizon: int = 6) -> tuple[ModelMDP, ModelMDP, Params, Noise, Noise]:
    """Model, real system with noise that grows with the input, its theta, and the noise of both."""
    settings = {"action_cost": COST["R"], "noise_covariance": 0.02 * EYE, "discount": 0.9}
    model, real = linear_gaussian(A, B, **settings), multiplicative_noise_lqr(A, B, 0.9, **settings)
    policy = mpc_policy(3)
    noises = [
        sample_noise(mdp, policy, batch, horizon, torch.Generator().manual_seed(seed))
        for seed, mdp in enumerate((model, real))
    ]
    world = {"A": A, "B": B, "sigma": torch.tensor(0.9, dtype=torch.float64)}
    return model, real, world, noises[0], noises[1]


def model_to_mpc(theta: Params) -> Params:
    """A controller that is right for the model: its matrices, the cost of its LQR at the end, bounds with back-off."""
    matrices = {key: theta[key] for key in ("A", "B")}
    return matrices | {"P": riccati(**matrices, **COST, discount=0.9)[0], "back_off": theta["back_off"]}


def explicit_chain() -> dict[str, Any]:
    return {
        "optimum": lambda theta, nu0: model_to_mpc(theta),
        "sensitivity": partial(explicit_sensitivity, optimum=model_to_mpc),
        "certificate": lambda J, *chain, **options: certify(None, *chain, **(options | {"directions": 2})),
    }


def soft_mpc() -> Policy:
    prices = {"penalty": torch.tensor(3.0, dtype=torch.float64)}
    bounds = {"output_low": torch.tensor([-0.3, -1.0], dtype=torch.float64), "output_high": torch.ones(2).double()}
    return mpc_policy(3, {**COST, **LIMIT, **bounds, **prices}, discount=0.9)


def test_the_gradient_through_an_mpc_built_from_theta_equals_differences() -> None:
    model, real, world, _, noise = setting()
    theta = {"A": A, "B": B, "back_off": torch.full((2,), 0.05, dtype=torch.float64)}
    gradient = partial(real_gradient, mdp=real, theta=world, noise=noise)
    step = tune_step(
        model,
        soft_mpc(),
        theta,
        model_to_mpc(theta),
        None,
        noise,
        real_reward=None,
        real_discount=0.9,
        gradient=gradient,
        **explicit_chain(),
    )
    assert step.report.converged
    assert float(step.info["certified"]) == 1.0
    value = lambda th: float(expected_return(real, soft_mpc(), world, model_to_mpc(th), noise))
    assert float(step.info["real_return"]) == value(theta)
    for key in theta:
        move = 1e-6 * torch.ones_like(theta[key])
        ahead, behind = ({**theta, key: theta[key] + sign * move} for sign in (1, -1))
        # of step 1e-6: rounding 1e-16 / 1e-6, and no active set changes within it
        assert float(step.grad[key].sum()) == pytest.approx((value(ahead) - value(behind)) / 2e-6, rel=1e-6, abs=1e-8)


def test_tune_moves_model_and_back_off_of_an_mpc() -> None:
    model, real, world, _, noise = setting(batch=4, horizon=5)
    theta = {"A": A, "B": B, "back_off": torch.zeros(2, dtype=torch.float64)}
    result = tune(
        model,
        soft_mpc(),
        theta,
        model_to_mpc(theta),
        None,
        noise,
        real_reward=None,
        real_discount=0.9,
        gradient=partial(real_gradient, mdp=real, theta=world, noise=noise),
        settings=TuneSettings(max_steps=3),
        box=Box(low={"back_off": 0.0}, high={"back_off": 0.2}),
        **explicit_chain(),
    )
    returns = [row["real_return"] for row in result.history if row["accepted"]]
    assert returns[-1] > returns[0] + 1e-3
    assert all(row["certified"] == 1.0 for row in result.history if row["accepted"])
    assert bool((result.theta["back_off"] >= 0).all())


def test_a_candidate_whose_mpc_has_no_plan_is_refused_with_the_reason() -> None:
    model, real, world, _, noise = setting(batch=4, horizon=4)
    bounds = {
        "output_low": torch.tensor([-9.0, -9.0], dtype=torch.float64),
        "output_high": torch.full((2,), 9.0).double(),
    }
    hard = mpc_policy(3, {**COST, **LIMIT, **bounds}, discount=0.9)
    theta = {"A": A, "B": B, "back_off": torch.zeros(2, dtype=torch.float64)}
    # a cost that wants more back-off than there is room for: the bounds lie 18 apart
    wish = lambda policy, nu, log, **_: Estimate(
        expected_return(real, policy, world, nu, noise) + nu["back_off"].sum(),
        {key: torch.ones_like(value) if key == "back_off" else torch.zeros_like(value) for key, value in nu.items()},
    )
    result = tune(
        model,
        hard,
        theta,
        model_to_mpc(theta),
        None,
        noise,
        real_reward=None,
        real_discount=0.9,
        gradient=wish,
        settings=TuneSettings(max_steps=1, radius=2.0),
        box=Box(low={"back_off": 0.0}),
        scale={"back_off": torch.tensor(8.0, dtype=torch.float64)},
        free=("back_off",),
        **explicit_chain(),
    )
    assert any("refused a candidate" in note and "infeasible" in note for note in result.notes), result.notes


def weighted_mpc(smoothing: float) -> Policy:
    """nu = {"log_R"}: an MPC whose model is fixed and whose input weight is trained; inputs are bounded."""
    mpc = mpc_policy(3, {"A": A, "B": B, "Q": EYE, "P": 3 * EYE, **LIMIT}, discount=0.9, smoothing=smoothing)

    def mean(nu: Params, state: Tensor) -> Tensor:
        return mpc.act({"R": nu["log_R"].exp() * EYE[:1, :1]}, state, state[:, :0])

    return deterministic_policy(mean)


def test_an_mpc_with_weights_trained_in_the_model_has_the_gradient_of_retraining() -> None:
    model, real, world, in_sim, in_real = setting(batch=2, horizon=4)
    policy, nu = weighted_mpc(0.01), {"log_R": torch.tensor(-1.0, dtype=torch.float64)}
    theta = {"A": A, "B": B, "noise_scale": torch.tensor(1.0, dtype=torch.float64)}
    gradient = partial(real_gradient, mdp=real, theta=world, noise=in_real)
    task: dict[str, Any] = {"real_reward": None, "real_discount": 0.9, "gradient": gradient}
    step = tune_step(model, policy, theta, nu, None, in_sim, **task)
    assert step.report.converged

    def retrained(th: Params) -> float:
        J = lambda at, nu: expected_return(model, policy, at, nu, in_sim)
        best = policy_optimum(J, th, step.nu, tol=1e-9).nu
        return float(expected_return(real, policy, world, best, in_real))

    ahead, behind = ({**theta, "A": A + sign * 1e-4, "B": B + sign * 1e-4} for sign in (1, -1))
    slope = float(step.grad["A"].sum() + step.grad["B"].sum())
    # the optimum is found to 1e-9, over a step of 1e-4: 1e-5 of a slope of order 1
    assert slope == pytest.approx((retrained(ahead) - retrained(behind)) / 2e-4, rel=1e-3, abs=1e-5)
    result = tune(model, policy, theta, nu, None, in_sim, settings=TuneSettings(max_steps=1, certify=False), **task)
    returns = [row["real_return"] for row in result.history if row["accepted"]]
    assert returns[-1] > returns[0] + 1e-4, result.notes


def test_weights_whose_optimum_is_a_kink_are_not_trusted() -> None:
    """The return of an MPC has corners where its active sets change; a maximum may sit on one, without a derivative."""
    model, real, world, in_sim, in_real = setting(batch=6)
    theta = {"A": A, "B": B, "noise_scale": torch.tensor(1.0, dtype=torch.float64)}
    gradient = partial(real_gradient, mdp=real, theta=world, noise=in_real)
    nu = {"log_R": torch.tensor(-1.0, dtype=torch.float64)}
    with pytest.warns(UnconvergedWarning, match="nu is not stationary"):
        step = tune_step(
            model,
            weighted_mpc(0.0),
            theta,
            nu,
            None,
            in_sim,
            real_reward=None,
            real_discount=0.9,
            gradient=gradient,
        )
    assert not step.report.converged
