"""Score-function gradient of the in-sim return, causal, with a baseline.

Only the densities of what is drawn are differentiated, never the simulator's step:

    grad_nu J    = E sum_t (G_t - b_t) grad_nu log pi(a_t | s_t),
    grad_theta J = E sum_t [ (G_t - b_t) grad_theta log rho(s_{t+1} | s_t, a_t) + discount^t grad_theta r_t ],

`G_t = sum_{k >= t} discount^k r_k`; b_t, of `baselines`, leaves the mean unchanged (Williams, Machine Learning 8 (1992)
229; Baxter and Bartlett, JAIR 15 (2001) 319). Where the first state depends on theta, s_0 keeps its derivative in the
three densities it enters.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sim2real.estimators.baselines import Advantage, alive, reward_to_go, time_baseline
from sim2real.estimators.pathwise import check_finite, check_wrt, grouped_gradient
from sim2real.mdp import ModelMDP, Noise
from sim2real.params import Estimate, Params, ravel
from sim2real.policy import Policy
from sim2real.rollout import Rollout, rollout


def score_function_gradient(
    mdp: ModelMDP,
    policy: Policy,
    theta: Params,
    nu: Params,
    noise: Noise,
    *,
    wrt: Literal["nu", "theta"] = "nu",
    advantage: Advantage = time_baseline,
    groups: int = 0,
) -> Estimate:
    """Gradient of `expected_return` with respect to nu or theta, over two rollouts or more; black-box models too.

    `advantage`: a function of `sim2real.estimators.baselines`, by default the mean of the other rollouts at each step.
    info: "value_stderr"; with `groups >= 2` also "stderr" `[P]` of the raveled gradient, from the spread over so many
    groups of rollouts. Raises `ValueError` when the policy (nu) or the model (theta) has no log_prob, there are fewer
    than two rollouts, the return or its gradient is not finite, or `wrt` or `groups` is out of range.
    """
    check_wrt(wrt)
    with torch.no_grad():
        drawn = rollout(mdp, policy, theta, nu, noise)
    weights = advantage(drawn, noise, mdp.discount)
    leaves = {key: value.detach().requires_grad_() for key, value in (nu if wrt == "nu" else theta).items()}
    with torch.enable_grad():
        if wrt == "nu":
            surrogate = _policy_surrogate(policy, leaves, drawn, weights)
        else:
            surrogate = _model_surrogate(mdp, policy, leaves, nu, noise, drawn, weights)
    grad, info = grouped_gradient(surrogate, leaves, groups)
    returns = reward_to_go(drawn, mdp.discount)[:, 0]
    check_finite(returns.mean(), ravel(grad), wrt)
    info["value_stderr"] = returns.std() / len(returns) ** 0.5
    return Estimate(returns.mean(), grad, info)


def _policy_surrogate(policy: Policy, nu: Params, drawn: Rollout, weights: Tensor) -> Tensor:
    total = torch.zeros_like(weights[:, 0])
    for t in range(weights.shape[1]):
        total = total + weights[:, t] * policy.log_prob(nu, drawn.states[:, t], drawn.actions[:, t])
    return total


def _model_surrogate(
    mdp: ModelMDP, policy: Policy, theta: Params, nu: Params, noise: Noise, drawn: Rollout, weights: Tensor
) -> Tensor:
    if mdp.log_prob is None:
        raise ValueError("the model declares no log_prob; use pathwise_gradient, or give the model a density")
    real = alive(drawn)
    first = mdp.initial_state(theta, noise.initial)
    total = torch.zeros_like(weights[:, 0])
    if first.requires_grad:
        total = total + weights[:, 0] * policy.log_prob(nu, first, drawn.actions[:, 0])
    for t, e in enumerate(noise.process.unbind(1)):
        state = first if t == 0 else drawn.states[:, t]
        action, following = drawn.actions[:, t], drawn.states[:, t + 1]
        total = total + weights[:, t] * mdp.log_prob(theta, state, action, following)
        total = total + real[:, t] * mdp.discount**t * mdp.reward(theta, state, action, e, following)
    return total
