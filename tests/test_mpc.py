"""Condensed MPC against the Riccati recursion, a sparse formulation solved by scipy, and central differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import grad, hessian, vmap

from sim2real.mdp import sample_noise
from sim2real.params import Params
from sim2real.rollout import expected_return
from sim2real.simulators import linear_gaussian
from sim2real.solvers import condensed_mpc, mpc_policy, riccati

N, M = 3, 2


def system(seed: int = 0) -> Params:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    C, D = draw(N, N), draw(M, M)
    return {
        "A": torch.eye(N, dtype=torch.float64) + 0.2 * draw(N, N),
        "B": 0.5 * draw(N, M),
        "Q": C @ C.mT / N,
        "R": 0.1 * D @ D.mT + 0.1 * torch.eye(M, dtype=torch.float64),
    }


def starts(count: int) -> Tensor:
    return torch.randn(count, N, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def cost(values: Params, states: Tensor, actions: Tensor, discount: float) -> Tensor:
    """Of trajectories `[..., T + 1, n]`, `[..., T, m]`, term by term as in the module's first lines."""
    steps, total = actions.shape[-2], torch.zeros(states.shape[:-2], dtype=torch.float64)
    quadratic = lambda W, z: torch.einsum("...i,ij,...j->...", z, W, z)
    for k in range(steps + 1):
        s = states[..., k, :]
        total = total + discount**k * (quadratic(values["Q"] if k < steps else values["P"], s) + s @ values["q"])
        if k < steps:
            a = actions[..., k, :]
            total = total + discount**k * (quadratic(values["R"], a) + a @ values["r"])
    return total


def test_without_bounds_it_is_the_finite_horizon_riccati_gain() -> None:
    p, discount, horizon = system(), 0.95, 6
    terminal = 2.0 * torch.eye(N, dtype=torch.float64)
    A, B, Q, R = (p[key] for key in ("A", "B", "Q", "R"))
    P = terminal
    for _ in range(horizon):
        K = discount * torch.linalg.solve(R + discount * B.mT @ P @ B, B.mT @ P @ A)
        P = Q + K.mT @ R @ K + discount * (A - B @ K).mT @ P @ (A - B @ K)
    plan = condensed_mpc(**p, x0=starts(5), horizon=horizon, P=terminal, discount=discount)
    torch.testing.assert_close(plan.actions[:, 0], -starts(5) @ K.mT, rtol=1e-11, atol=1e-12)
    total = cost({**p, "P": terminal, "q": A[0] * 0, "r": B[0] * 0}, plan.states, plan.actions, discount)
    torch.testing.assert_close(total, torch.einsum("bi,ij,bj->b", starts(5), P, starts(5)), rtol=1e-11, atol=1e-12)


def test_with_the_riccati_cost_at_the_end_the_horizon_does_not_matter() -> None:
    p = system(1)
    P, K = riccati(**p, discount=0.9)
    for horizon in (1, 4):
        policy = mpc_policy(horizon, {**p, "P": P}, discount=0.9)
        torch.testing.assert_close(
            policy.act({}, starts(4), starts(4)[:, :0]), -starts(4) @ K.mT, rtol=1e-10, atol=1e-11
        )


def test_plan_equals_a_minimiser_over_inputs_with_active_bounds() -> None:
    p = system(2)
    extra = {
        "P": 3 * p["Q"],
        "q": torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64),
        "r": torch.tensor([0.05, -0.1], dtype=torch.float64),
        "c": torch.tensor([0.1, 0.0, -0.1], dtype=torch.float64),
    }
    low, high = torch.tensor([-0.3, -math.inf], dtype=torch.float64), torch.tensor([0.5, 0.2], dtype=torch.float64)
    plan = condensed_mpc(**p, **extra, x0=starts(4), horizon=4, low=low, high=high, discount=0.9)
    assert 0.1 < float((plan.solution.active != 0).double().mean()) < 0.9

    def rollout(actions: Tensor, x0: Tensor) -> Tensor:
        states = [x0]
        for a in actions:
            states.append(p["A"] @ states[-1] + p["B"] @ a + extra["c"])
        return torch.stack(states)

    for x0, actions, states in zip(starts(4), plan.actions, plan.states, strict=True):
        torch.testing.assert_close(states, rollout(actions, x0), rtol=1e-12, atol=1e-13)

        def value(flat: np.ndarray, x0: Tensor = x0) -> tuple[float, np.ndarray]:
            leaf = torch.tensor(flat.reshape(4, M), requires_grad=True)
            total = cost({**p, **extra}, rollout(leaf, x0), leaf, 0.9)
            return float(total.detach()), torch.autograd.grad(total, leaf)[0].numpy().ravel()

        limits = list(zip(low.tolist(), high.tolist(), strict=True)) * 4
        found = minimize(
            value, np.zeros(8), jac=True, bounds=limits, method="L-BFGS-B", options={"ftol": 0, "gtol": 1e-11}
        )
        # L-BFGS-B stops at a projected gradient of rounding size, some 1e-9 of the inputs
        np.testing.assert_allclose(actions.numpy().ravel(), found.x, rtol=0, atol=1e-7)


def test_differentiable_in_model_cost_start_and_bounds() -> None:
    p, limit = system(3), torch.tensor([0.25, 0.4], dtype=torch.float64)
    plan = condensed_mpc(**p, x0=starts(40), horizon=3, low=-limit, high=limit)
    sure = starts(40)[plan.solution.margin > 1e-3][:3]  # away from kinks, for differences of 1e-6
    names = ("A", "B", "Q", "R")
    leaves = [x.clone().requires_grad_() for x in (*(p[key] for key in names), sure, limit)]

    def first(*args: Tensor) -> Tensor:
        values = dict(zip(names, args[:4], strict=True))
        return condensed_mpc(**values, x0=args[4], horizon=3, low=-args[5], high=args[5]).actions

    assert bool((condensed_mpc(**p, x0=sure, horizon=3, low=-limit, high=limit).solution.active != 0).any())
    assert gradcheck(first, leaves, check_forward_ad=True)


def test_batch_of_models_is_a_loop_over_models() -> None:
    models = [system(seed) for seed in range(3)]
    stacked = {key: torch.stack([p[key] for p in models]) for key in models[0]}
    together = condensed_mpc(**stacked, x0=starts(3), horizon=5, low=-0.2, high=0.2)
    shared = condensed_mpc(**models[0], x0=starts(3), horizon=5, low=-0.2, high=0.2)
    mapped = vmap(lambda p, x0: condensed_mpc(**p, x0=x0, horizon=5, low=-0.2, high=0.2).actions)(stacked, starts(3))
    for row, p in enumerate(models):
        alone = condensed_mpc(**p, x0=starts(3)[row], horizon=5, low=-0.2, high=0.2)
        torch.testing.assert_close(together.actions[row], alone.actions, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(mapped[row], alone.actions, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(shared.actions[0], together.actions[0], rtol=1e-11, atol=1e-12)


def test_the_policy_in_a_rollout_has_the_gradient_and_hessian_of_the_return() -> None:
    p = system(4)
    mdp = linear_gaussian(p["A"], p["B"], noise_covariance=0.01 * torch.eye(N, dtype=torch.float64))
    theta = {"A": p["A"] + 0.05, "B": p["B"]}
    policy = mpc_policy(4, {"Q": p["Q"], "R": p["R"], "B": p["B"]})
    generator = torch.Generator().manual_seed(0)
    noise = sample_noise(mdp, policy, batch=16, horizon=5, generator=generator)
    diagonal, limit = torch.zeros(N, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)

    def J(x: Tensor) -> Tensor:
        nu = {"A": p["A"] + torch.diag(x[:N]), "low": -x[N], "high": x[N]}
        return expected_return(mdp, policy, theta, nu, noise)

    at = torch.cat([diagonal, limit[None]])
    slope, curvature = grad(J)(at), hessian(J)(at)
    for index in range(N + 1):
        step = torch.zeros(N + 1, dtype=torch.float64)
        step[index] = 1e-6  # no active set of the 80 programs changes within it
        assert float(slope[index]) == pytest.approx(float(J(at + step) - J(at - step)) / 2e-6, rel=1e-6, abs=1e-8)
        differences = (grad(J)(at + step) - grad(J)(at - step)) / 2e-6
        torch.testing.assert_close(curvature[index], differences, rtol=1e-6, atol=1e-7)


def test_bad_input_is_refused_by_name() -> None:
    p = system()
    with pytest.raises(KeyError, match=r"missing \['Q', 'R'\], unknown \['gain'\]"):
        mpc_policy(3, {"A": p["A"], "B": p["B"]}).act({"gain": p["R"]}, starts(2), starts(2)[:, :0])
    with pytest.raises(ValueError, match=r"q must be floating point \[..., 3\]"):
        condensed_mpc(**p, x0=starts(2), horizon=3, q=p["R"][0])
    with pytest.raises(ValueError, match=r"B must be \[..., n, m\]"):
        condensed_mpc(**{**p, "B": p["B"][0]}, x0=starts(2), horizon=3)
    with pytest.raises(ValueError, match="horizon must be at least 1"):
        condensed_mpc(**p, x0=starts(2), horizon=0)
    with pytest.raises(ValueError, match="not positive definite"):
        condensed_mpc(**{**p, "R": -10 * p["R"]}, x0=starts(2), horizon=3)
    with pytest.raises(ValueError, match="infeasible"):
        condensed_mpc(**p, x0=starts(2), horizon=3, low=1.0, high=0.5)
