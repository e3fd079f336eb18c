"""Other gradients of a leader's return, for comparison; same inputs as `boltzmann_covariance_gradient`.

    naive     the direct terms alone: the follower's answer is taken for fixed;
    HPGD      (1 / lambda) (Q_L - V_L) (grad Q_F - grad V_F) at the action taken; grad Q_F and grad V_F are averages of
              the discounted sources along the trajectories ("visits" to (s, a) and to s; here regressions on
              features, which with one-hot features are those averages), and Q_L, V_L averages of returns
              ("monte_carlo") or a temporal-difference critic with the next action as recorded ("td", SARSA); with
              `value_data` all of them come from other transitions (the published "oracle");
    SoBiRL    grad log of the whole first trajectory, undiscounted, from the follower's immediate reward alone:
              (1 / lambda) R_0 sum_t { grad r_F(s_t, a_t) - sum_a pi grad r_F(s_t, a) }, R_0 the leader's return.

References: Thoma et al., Contextual Bilevel Reinforcement Learning for Incentive Alignment (HPGD), 2024; Yang et al.,
Bilevel Reinforcement Learning via the Development of Hyper-gradient without Lower-Level Convexity (SoBiRL), 2024.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, TypedDict

import torch
from torch import Tensor

from sim2real.estimators.boltzmann_tables import leaves_of, pull
from sim2real.estimators.leader_critic import Operator, bellman_operator, leader_nodes, solve, worth
from sim2real.estimators.leader_view import CriticOptions, Seen, check_choice, look, outer_weights, sources
from sim2real.estimators.neural_features import returns_to_go
from sim2real.estimators.soft_value import check_temperature
from sim2real.estimators.transitions import Transitions, transitions
from sim2real.leader_task import LeaderTask
from sim2real.params import Estimate, Params
from sim2real.policy import Policy
from sim2real.rollout import Rollout

Source = Literal["pathwise", "score"]
StateValue = Callable[[Tensor], Tensor]


class _Options(TypedDict):
    temperature: float
    critics: CriticOptions | None
    actions: Tensor | None


def naive_leader_gradient(
    task: LeaderTask,
    policy: Policy,
    theta: Params,
    nu: Params,
    data: Rollout | Transitions,
    *,
    temperature: float,
    soft_value: StateValue,
    source: Source = "pathwise",
    critics: CriticOptions | None = None,
    actions: Tensor | None = None,
) -> Estimate:
    """The direct terms of theorem 1 alone; arguments and errors as in `boltzmann_covariance_gradient`."""
    options: _Options = {"temperature": temperature, "critics": critics, "actions": actions}
    seen = _look(task, policy, theta, nu, transitions(data), soft_value, **options)
    outer = outer_weights(seen)
    with torch.enable_grad():
        grad = pull((outer * sources(seen, source)[0]).sum(), seen.theta, theta)
    return Estimate((outer * seen.data.rewards).sum(), grad, {"outer_weights": outer})


def hpgd_gradient(
    task: LeaderTask,
    policy: Policy,
    theta: Params,
    nu: Params,
    data: Rollout | Transitions,
    *,
    temperature: float,
    soft_value: StateValue,
    source: Source = "pathwise",
    critics: CriticOptions | None = None,
    actions: Tensor | None = None,
    values: Literal["monte_carlo", "td"] = "monte_carlo",
    value_data: Rollout | Transitions | None = None,
) -> Estimate:
    """HPGD; `value_data` holds the transitions that values and gradients are fitted on, None: those of `data`.

    Other arguments and errors as in `boltzmann_covariance_gradient`.
    """
    check_choice("values", values, "monte_carlo", "td")
    batch = transitions(data)
    fitted = batch if value_data is None else transitions(value_data)
    options: _Options = {"temperature": temperature, "critics": critics, "actions": actions}
    seen = _look(task, policy, theta, nu, batch, soft_value, **options)
    other = seen
    if value_data is not None:
        other = _look(task, policy, theta, nu, fitted, soft_value, **options)
        other = replace(other, theta=seen.theta)
    outer, batch, fitted = outer_weights(seen), seen.data, other.data
    pair, state = seen.options.features, seen.options.value_features
    of_pair, of_state = _regression(pair(fitted.states, fitted.actions)), _regression(state(fitted.states))
    at_pair, at_state = pair(batch.states, batch.actions), state(batch.states)
    if values == "monte_carlo":
        returns = returns_to_go(fitted, fitted.rewards.unsqueeze(-1), task.discount)[:, 0]
        benefit = at_pair @ solve(of_pair, returns)[0] - at_state @ solve(of_state, returns)[0]
    else:
        critic = solve(_sarsa(fitted, pair, task.discount), fitted.rewards)[0]
        nodes, shares = leader_nodes(seen.policy, seen.nu, batch.states, actions)
        mean = sum(share * (pair(batch.states, node) @ critic) for node, share in zip(nodes, shares, strict=True))
        benefit = at_pair @ critic - mean
    z = outer * benefit / temperature
    share = worth(of_pair, (z @ at_pair).unsqueeze(0)) - worth(of_state, (z @ at_state).unsqueeze(0))
    along = _pushed_forward(fitted, share, task.follower.discount)
    with torch.enable_grad():
        surrogate = (outer * sources(seen, source)[0]).sum() + (along * sources(other, source)[1]).sum()
        grad = pull(surrogate, seen.theta, theta)
    return Estimate((outer * batch.rewards).sum(), grad, {"outer_weights": outer, "source_worth": along})


def sobirl_gradient(
    task: LeaderTask,
    policy: Policy,
    theta: Params,
    nu: Params,
    data: Rollout | Transitions,
    *,
    temperature: float,
    soft_value: StateValue,
    source: Source = "pathwise",
    critics: CriticOptions | None = None,
    actions: Tensor | None = None,
) -> Estimate:
    """SoBiRL; arguments and errors as in `boltzmann_covariance_gradient`.

    Where the follower's reward does not depend on the action, its bracket is zero and it is the naive gradient.
    """
    options: _Options = {"temperature": temperature, "critics": critics, "actions": actions}
    seen = _look(task, policy, theta, nu, transitions(data), soft_value, **options)
    batch, outer = seen.data, outer_weights(seen)
    returns = returns_to_go(batch, batch.rewards.unsqueeze(-1), task.discount)[:, 0]
    first = returns[batch.step == 0][batch.episode] / len(batch.initial_states) / temperature
    nodes, shares = leader_nodes(seen.policy, seen.nu, batch.states, actions)
    quiet = batch.states.new_zeros(len(batch.states), task.follower.noise_dims[1])
    with torch.enable_grad():
        reward = lambda action: task.follower.reward(seen.theta, batch.states, action, quiet, batch.next_states)
        bracket = reward(batch.actions)
        for node, share in zip(nodes, shares, strict=True):
            bracket = bracket - share * reward(node)
        grad = pull((outer * sources(seen, source)[0]).sum() + (first * bracket).sum(), seen.theta, theta)
    return Estimate((outer * batch.rewards).sum(), grad, {"outer_weights": outer})


def _look(
    task: LeaderTask,
    policy: Policy,
    theta: Params,
    nu: Params,
    data: Transitions,
    soft_value: StateValue,
    *,
    temperature: float,
    critics: CriticOptions | None,
    actions: Tensor | None,
) -> Seen:
    check_temperature(temperature)
    return look(task, policy, leaves_of(theta), nu, data, soft_value, critics=critics, actions=actions)


def _regression(phi: Tensor) -> Operator:
    """Least squares on phi, as an operator of discount 0."""
    whole = torch.zeros(len(phi), dtype=torch.long, device=phi.device)
    return bellman_operator(phi, phi, torch.ones_like(phi[:, 0]), 0.0, whole)


def _sarsa(data: Transitions, pair: Callable[[Tensor, Tensor], Tensor], discount: float) -> Operator:
    """Temporal differences with the next action as recorded; worth 0 after the last step of an episode."""
    phi = pair(data.states, data.actions)
    goes_on = torch.zeros_like(data.ended)
    goes_on[:-1] = (data.episode[1:] == data.episode[:-1]) & ~data.ended[:-1]
    ahead = phi.roll(-1, 0) * goes_on.unsqueeze(-1)
    whole = torch.zeros(len(phi), dtype=torch.long, device=phi.device)
    return bellman_operator(phi, ahead, torch.ones_like(data.rewards), discount, whole)


def _pushed_forward(data: Transitions, share: Tensor, discount: float) -> Tensor:
    """y_k = sum_{t <= k, same episode} discount^(k - t) share_t: what a source is worth to all sums that hold it."""
    by_step = share.new_zeros(int(data.step.max()) + 1, len(data.initial_states))
    by_step[data.step, data.episode] = share
    for k in range(1, len(by_step)):
        by_step[k] += discount * by_step[k - 1]
    return by_step[data.step, data.episode]
