"""A black-box follower, fitted from the transitions that a leader sees.

The policy by maximum likelihood (linear with Gaussian noise), its soft value by least-squares temporal differences on
the soft reward `r_F - lambda log pi(a | s)`:

    V_F(s) = E sum_t gamma_F^t (r_F - lambda log pi)(s_t, a_t).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sim2real.estimators.leader_critic import (
    StateFeatures,
    bellman_operator,
    quadratic_state_features,
    solve,
)
from sim2real.estimators.soft_value import check_temperature
from sim2real.estimators.transitions import Transitions
from sim2real.params import Params
from sim2real.policy import Policy
from sim2real.solvers.soft_lqr import linear_noise_policy


def fit_linear_follower(data: Transitions, *, weights: Tensor | None = None) -> tuple[Policy, Params]:
    """`a = -K s + L e` of the data: gain by least squares, covariance of what is left; `linear_noise_policy` and nu.

    `weights [N]` None: all equal, right for noise that does not depend on the state. Raises `ValueError` when the
    actions leave no noise, as for a deterministic follower.
    """
    count, (n, m) = len(data.states), (data.states.shape[1], data.actions.shape[1])
    if count <= n + m:
        raise ValueError(f"{count} transitions do not fix a linear policy of {n} states and {m} actions")
    root = torch.ones_like(data.rewards) if weights is None else weights.sqrt()
    fit = torch.linalg.lstsq(root.unsqueeze(-1) * data.states, root.unsqueeze(-1) * data.actions).solution
    left = data.actions - data.states @ fit
    factor, failed = torch.linalg.cholesky_ex(left.T @ left / (count - n))
    if int(failed) or bool((factor.diagonal() <= 1e-9 * data.actions.abs().amax()).any()):
        raise ValueError("the actions follow the states without noise; a soft follower has noise in every action")
    return linear_noise_policy(m), {"gain": -fit.T, "factor": factor}


def fit_soft_value(
    policy: Policy,
    nu: Params,
    data: Transitions,
    follower_rewards: Tensor,
    *,
    discount: float,
    temperature: float,
    features: StateFeatures = quadratic_state_features,
    row_weights: Tensor | None = None,
    ridge: float = 0.0,
) -> Callable[[Tensor], Tensor]:
    """s `[N, n]` -> V_F `[N]` of the policy that acted, differentiable in s; `follower_rewards [N]` at the transitions.

    Raises `ValueError` for rewards of another shape or a temperature that is not positive, `CriticError` as
    `bellman_operator` does.
    """
    check_temperature(temperature)
    if follower_rewards.shape != data.rewards.shape:
        raise ValueError(f"follower_rewards must be {tuple(data.rewards.shape)}, got {tuple(follower_rewards.shape)}")
    phi = features(data.states)
    scale = phi.square().mean(0).sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    ahead = features(data.next_states) / scale * ~data.ended.unsqueeze(-1)
    rows = torch.ones_like(data.rewards) if row_weights is None else row_weights
    whole = torch.zeros(len(phi), dtype=torch.long, device=phi.device)
    operator = bellman_operator(phi / scale, ahead, rows, discount, whole, ridge=ridge)
    soft_rewards = follower_rewards - temperature * policy.log_prob(nu, data.states, data.actions)
    weights = solve(operator, soft_rewards.detach())[0]
    return lambda states: features(states) / scale @ weights
