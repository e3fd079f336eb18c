"""Bi-level actor-critic (Bi-AC) for games with finitely many actions, for comparison with `stackelberg_gradient`.

The leader's critic looks ahead to its own best action and the follower's likeliest answer,

    Q_L(s, b, a) = r_L + gamma_L max_b' Q_L(s', b', argmax_a' g(a' | s', b')),

by fitted iteration on features; the actor takes the direct term alone, `grad log f(b | s) (Q_L - sum_b f Q_L)`.
Reference: Zhang et al., Bi-Level Actor-Critic for Multi-Agent Coordination, AAAI 2020.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sim2real.estimators.boltzmann_tables import leaves_of, pull
from sim2real.estimators.leader_critic import bellman_operator, solve
from sim2real.estimators.leader_view import CriticOptions
from sim2real.estimators.transitions import Transitions, transitions
from sim2real.leader_task import LeaderTask
from sim2real.params import Estimate, Params
from sim2real.policy import Policy
from sim2real.rollout import Rollout


def bi_ac_gradient(
    task: LeaderTask,
    leader: Policy,
    follower: Policy,
    theta: Params,
    nu: Params,
    data: Rollout | Transitions,
    *,
    temperature: float,
    soft_value: Callable[[Tensor], Tensor],
    critics: CriticOptions | None = None,
    actions: Tensor,
    leader_actions: Tensor,
    sweeps: int = 200,
) -> Estimate:
    """Actor direction in theta; arguments as in `stackelberg_gradient`, which it can replace.

    `leader_actions [B, p]` and the follower's `actions [A, m]` list all of them. Of `critics` only the features of
    (z, a), z = (s, b), are used; `temperature` and `soft_value` are not. `sweeps` of fitted iteration from 0.
    Raises `ValueError` for a task without a leader's action or sweeps below 1.
    """
    if task.leader_actions < 1 or sweeps < 1:
        raise ValueError(f"need leader_actions >= 1 and sweeps >= 1, got {task.leader_actions} and {sweeps}")
    batch = transitions(data)
    features = critics.features if critics is not None else CriticOptions().features
    p = task.leader_actions
    b, a = batch.actions[:, :p].to(batch.states), batch.actions[:, p:].to(batch.states)
    phi = features(torch.cat([batch.states, b], -1), a)
    whole = torch.zeros(len(phi), dtype=torch.long, device=phi.device)
    regression = bellman_operator(phi, phi, torch.ones_like(batch.rewards), 0.0, whole)
    ahead = torch.stack(
        [_answered(follower, nu, features, actions, batch.next_states, choice) for choice in leader_actions]
    )
    alive = (~batch.ended).to(batch.rewards.dtype)
    weights = torch.zeros_like(phi[0])
    for _ in range(sweeps):
        target = batch.rewards + task.discount * alive * (ahead @ weights).amax(0)
        weights = solve(regression, target)[0]
    leaves = leaves_of(theta)
    outer = task.discount ** batch.step.to(batch.rewards.dtype) / len(batch.initial_states)
    value = torch.zeros_like(batch.rewards)
    for choice in leader_actions:
        each = choice.to(batch.states).expand(len(b), -1)
        share = leader.log_prob(theta, batch.states, each).detach().exp()
        value = value + share * (features(torch.cat([batch.states, each], -1), a) @ weights)
    with torch.enable_grad():
        log_prob = leader.log_prob(leaves, batch.states, b)
        grad = pull((outer * (phi @ weights - value).detach() * log_prob).sum(), leaves, theta)
    return Estimate((outer * batch.rewards).sum(), grad, {"outer_weights": outer})


def _answered(
    follower: Policy,
    nu: Params,
    features: Callable[[Tensor, Tensor], Tensor],
    actions: Tensor,
    states: Tensor,
    choice: Tensor,
) -> Tensor:
    """Features `[N, q]` at one action of the leader and the follower's likeliest answer."""
    z = torch.cat([states, choice.to(states).expand(len(states), -1)], -1)
    every = actions.to(states).unsqueeze(1).expand(-1, len(states), -1)
    likely = torch.stack([follower.log_prob(nu, z, action) for action in every]).argmax(0)
    return features(z, actions.to(states)[likely])
