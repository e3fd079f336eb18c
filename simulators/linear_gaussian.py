"""Linear systems with Gaussian noise and a quadratic cost: the LQR model, and a world with input-scaled noise.

    linear_gaussian            s' = A s + B a + noise_scale w,           w ~ N(0, W),   s_0 ~ N(mean, S)
    multiplicative_noise_lqr   s' = A s + B (1 + sigma xi) a + w,        xi_j ~ N(0, 1), one per input column
    both                       r = -(s' Q s + a' R a)   of the state s the action was taken in

The noise columns e are standard normal: w = chol(W) e[:n], xi = e[n:]. The cost and the discount belong to the model
and may differ from the real ones. Reference: Wonham, SIAM Journal on Control 5(3), 1967, 486-500 (state-dependent
noise); de Koning, Automatica 18(4), 1982, 443-453 (discrete time, multiplicative noise).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from sim2real.bounds import Box
from sim2real.mdp import ModelMDP
from sim2real.params import Params
from sim2real.simulators.integrate import check_time_step


def linear_gaussian(
    A: Tensor,
    B: Tensor,
    *,
    state_cost: Tensor | None = None,
    action_cost: Tensor | None = None,
    noise_covariance: Tensor | None = None,
    initial_mean: Tensor | None = None,
    initial_covariance: Tensor | None = None,
    dt: float = 1.0,
    discount: float = 0.95,
) -> ModelMDP:
    """theta = {"A": [n, n], "B": [n, m]} and, optionally, "noise_scale" []; or one of each per environment.

    The arguments A and B are theta's design values. Q and R default to identities, W to 0 (then there is no noise
    column and no `log_prob`), the initial mean to 0 and S to the identity. All dimensionless.
    Raises `ValueError` for a wrong shape or a matrix that is not symmetric positive definite where it must be
    (semi-definite for Q).
    """
    check_time_step(dt, 1, "exact", ("exact",))
    n, m = _dimensions(A, B)
    eye = torch.eye(max(n, m), dtype=A.dtype, device=A.device)
    Q = eye[:n, :n] if state_cost is None else _symmetric(state_cost, n, "state_cost")
    R = eye[:m, :m] if action_cost is None else _symmetric(action_cost, m, "action_cost")
    start = torch.zeros_like(A[0]) if initial_mean is None else initial_mean
    if start.shape != (n,):
        raise ValueError(f"initial_mean must be [{n}], got {list(start.shape)}")
    spread = eye[:n, :n] if initial_covariance is None else _factor(initial_covariance, n, "initial_covariance")
    noisy = noise_covariance is not None
    factor = torch.zeros_like(A) if noise_covariance is None else _factor(noise_covariance, n, "noise_covariance")

    def mean(theta: Params, state: Tensor, action: Tensor) -> Tensor:
        return _apply(theta["A"], state) + _apply(theta["B"], action)

    def step(theta: Params, state: Tensor, action: Tensor, e: Tensor) -> Tensor:
        following = mean(theta, state, action)
        if not noisy:
            if "noise_scale" in theta:
                raise ValueError("theta has a noise_scale but the model no noise: pass noise_covariance, or drop it")
            return following
        noise = _apply(_like(factor, e), e)
        return following + (theta["noise_scale"].unsqueeze(-1) * noise if "noise_scale" in theta else noise)

    def log_prob(theta: Params, state: Tensor, action: Tensor, following: Tensor) -> Tensor:
        scale = theta["noise_scale"] if "noise_scale" in theta else state.new_ones(())
        return _normal_log_density(
            following - mean(theta, state, action), _like(factor, state) * scale[..., None, None]
        )

    def reward(theta: Params, state: Tensor, action: Tensor, e: Tensor, following: Tensor) -> Tensor:
        return -(state * _apply(_like(Q, state), state)).sum(-1) - (action * _apply(_like(R, state), action)).sum(-1)

    states = tuple(f"s{i + 1}" for i in range(n))
    actions = tuple(f"a{j + 1}" for j in range(m))
    return ModelMDP(
        initial_state=lambda theta, e0: _like(start, e0) + _apply(_like(spread, e0), e0),
        step=step,
        reward=reward,
        noise_dims=(n, n if noisy else 0),
        dt=dt,
        discount=discount,
        log_prob=log_prob if noisy else None,
        names={"state": states, "action": actions, "signal": states},
        units=dict.fromkeys(states + actions, "1"),
        box=Box(unit={"A": "1", "B": "1"}, default={"A": A, "B": B}),
    )


def multiplicative_noise_lqr(
    A: Tensor,
    B: Tensor,
    sigma: float,
    *,
    state_cost: Tensor | None = None,
    action_cost: Tensor | None = None,
    noise_covariance: Tensor | None = None,
    initial_mean: Tensor | None = None,
    initial_covariance: Tensor | None = None,
    dt: float = 1.0,
    discount: float = 0.95,
) -> ModelMDP:
    """The world with theta = {"A": [n, n], "B": [n, m], "sigma": []}; W is 0.05 I, the rest as in `linear_gaussian`.

    E[s' | s, a] does not depend on sigma, so no least-squares fit of A and B sees it; the optimal gain does.
    Raises `ValueError` as `linear_gaussian` does, and for a sigma that is negative or not finite.
    """
    n, m = _dimensions(A, B)
    if not 0.0 <= sigma < math.inf:
        raise ValueError(f"sigma must be finite and >= 0, got {sigma}")
    covariance = 0.05 * torch.eye(n, dtype=A.dtype, device=A.device) if noise_covariance is None else noise_covariance
    model = linear_gaussian(
        A,
        B,
        state_cost=state_cost,
        action_cost=action_cost,
        noise_covariance=covariance,
        initial_mean=initial_mean,
        initial_covariance=initial_covariance,
        dt=dt,
        discount=discount,
    )

    def step(theta: Params, state: Tensor, action: Tensor, e: Tensor) -> Tensor:
        push = action * (1.0 + theta["sigma"].unsqueeze(-1) * e[..., n:])
        return model.step({"A": theta["A"], "B": theta["B"]}, state, push, e[..., :n])

    def log_prob(theta: Params, state: Tensor, action: Tensor, following: Tensor) -> Tensor:
        columns = theta["B"] * (theta["sigma"].unsqueeze(-1) * action).unsqueeze(-2)
        factor = torch.linalg.cholesky(_like(covariance, state) + columns @ columns.mT)
        mean = _apply(theta["A"], state) + _apply(theta["B"], action)
        return _normal_log_density(following - mean, factor)

    box = Box(low={"sigma": 0.0}, unit=model.box.unit | {"sigma": "1"}, default={"A": A, "B": B, "sigma": sigma})
    return replace(model, step=step, noise_dims=(n, n + m), log_prob=log_prob, box=box)


def _like(constant: Tensor, value: Tensor) -> Tensor:
    return constant.to(dtype=value.dtype, device=value.device)


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (vector.unsqueeze(-2) @ matrix.mT).squeeze(-2)


def _normal_log_density(residual: Tensor, factor: Tensor) -> Tensor:
    """log N(residual; 0, factor factor') with `residual [..., n]` and the lower triangular `factor [..., n, n]`."""
    factor = factor.expand(*residual.shape, residual.shape[-1])
    z = torch.linalg.solve_triangular(factor, residual.unsqueeze(-1), upper=False).squeeze(-1)
    log_volume = torch.log(factor.diagonal(dim1=-2, dim2=-1)).sum(-1)
    return -0.5 * (z * z).sum(-1) - log_volume - 0.5 * residual.shape[-1] * math.log(2.0 * math.pi)


def _dimensions(A: Tensor, B: Tensor) -> tuple[int, int]:
    if A.ndim != 2 or A.shape[0] != A.shape[1] or B.ndim != 2 or B.shape[0] != A.shape[0]:
        raise ValueError(f"A must be [n, n] and B [n, m], got {list(A.shape)} and {list(B.shape)}")
    return B.shape[0], B.shape[1]


def _symmetric(matrix: Tensor, size: int, name: str) -> Tensor:
    if matrix.shape != (size, size) or not torch.allclose(matrix, matrix.mT):
        raise ValueError(f"{name} must be a symmetric [{size}, {size}] matrix, got {matrix.tolist()}")
    return matrix


def _factor(covariance: Tensor, size: int, name: str) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(_symmetric(covariance, size, name))
    if int(info):
        raise ValueError(f"{name} must be positive definite, got {covariance.tolist()}")
    return factor
