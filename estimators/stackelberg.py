"""Boltzmann-covariance hypergradient of a two-player Markov game (theorem 2) from sampled transitions.

Leader b ~ f_theta(. | s), follower a ~ g(. | s, b), the soft optimum of its own reward when it sees b:

    grad J = E sum_t gamma_L^t { grad log f(b_t | s_t) Q_L + (1 / beta) Cov_a[Q_L, G](s_t, b_t) },
    G = grad_theta Q_F = E sum_{k >= 1} gamma_F^k grad log f(b_k | s_k) V_F(s_k, b_k).

To the follower, a game is a configurable MDP with states z = (s, b), in which theta moves the next b: theorem 2 is
theorem 1 there, so `boltzmann_covariance_gradient` does it. The inner sum then starts at the next step by itself, and
the derivative may be pathwise (b' moves with theta), which for a nearly deterministic leader is the only usable one:
the score of a Gaussian of standard deviation 1e-3 is of size 1e3.

A follower that does not see b has states s, and b is noise whose law theta moves: its "next state" is (s', b), of
which features and values look at s' alone; derivatives come by scores.
Reference: Kudo, Tanabe, Wachi and Akimoto, ICAPS 2026, arXiv 2603.14867, theorem 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from sim2real.estimators.boltzmann_covariance import boltzmann_covariance_gradient
from sim2real.estimators.leader_view import CriticOptions, Start
from sim2real.estimators.transitions import Transitions, transitions
from sim2real.leader_task import LeaderTask
from sim2real.params import Estimate, Params
from sim2real.policy import Policy
from sim2real.rollout import Rollout


def stackelberg_gradient(
    task: LeaderTask,
    leader: Policy,
    follower: Policy,
    theta: Params,
    nu: Params,
    data: Rollout | Transitions,
    *,
    temperature: float,
    soft_value: Callable[[Tensor], Tensor],
    sees_leader: bool = True,
    source: Literal["pathwise", "score"] = "score",
    critics: CriticOptions | None = None,
    actions: Tensor | None = None,
    weights: Tensor | None = None,
    start: Start | None = None,
) -> Estimate:
    """grad J in theta, the parameters of `leader`, from on-policy transitions with the leader's rewards.

    Actions of `data` hold the leader's columns first. `follower` at `nu` and `soft_value` take z = (s, b) `[N, n + p]`
    where it sees the leader's action, s `[N, n]` where not; so do the features and functions of `critics`, and
    `row_weights [N]` belong to `game_transitions(...)`, which may drop the last step of an episode. `actions [K, m]` of
    the follower, `weights` and `start` (of z) as in `boltzmann_covariance_gradient`. Pathwise sources need a
    follower that sees b, and a leader whose action moves smoothly with theta at fixed noise.
    Raises `ValueError` for a task without a leader's action, pathwise sources it cannot have, and as
    `boltzmann_covariance_gradient` does.
    """
    if task.leader_actions < 1:
        raise ValueError("the task declares leader_actions = 0; use boltzmann_covariance_gradient")
    if not sees_leader and source == "pathwise":
        raise ValueError('a follower that does not see the leader\'s action needs source="score"')
    batch = game_transitions(task, data, sees_leader=sees_leader)
    options = critics if critics is not None else CriticOptions()
    first: Callable[[Params], Tensor] | None = None
    if sees_leader:
        augmented, following = _seen_task(task, leader), _moved_leader(task, leader)
        if start is None and weights is None:
            states = batch.initial_states
            first = lambda params: _first_score(task, leader, params, states, source)
    else:
        augmented, following = _unseen_task(task, leader), None
        options, follower, soft_value = _on_states(task, batch, options, follower, soft_value)
    return boltzmann_covariance_gradient(
        augmented,
        follower,
        theta,
        nu,
        batch,
        temperature=temperature,
        soft_value=soft_value,
        source=source,
        critics=options,
        actions=actions,
        weights=weights,
        start=start,
        following=following,
        first=first,
    )


def game_transitions(task: LeaderTask, data: Rollout | Transitions, *, sees_leader: bool = True) -> Transitions:
    """The transitions as the follower lives them: of (s, b) where it sees the leader's action; else of (s, last b).

    The leader's next action after the last step of an episode that was cut short is not known: that step is dropped.
    """
    batch, p = transitions(data), task.leader_actions
    b, own = batch.actions[:, :p], batch.actions[:, p:]
    if not sees_leader:
        pad = lambda states: torch.cat([states, states.new_zeros(len(states), p)], -1)
        after = torch.cat([batch.next_states, b.to(batch.states)], -1)
        return replace(
            batch,
            states=pad(batch.states),
            actions=own,
            next_states=after,
            initial_states=pad(batch.initial_states),
        )
    goes_on = torch.zeros_like(batch.ended)
    goes_on[:-1] = batch.episode[1:] == batch.episode[:-1]
    ahead = torch.where(goes_on.unsqueeze(-1), b.roll(-1, 0), b)
    kept = goes_on | batch.ended
    opens = torch.ones_like(goes_on)
    opens[1:] = ~goes_on[:-1]
    z = torch.cat([batch.states, b.to(batch.states)], -1)
    return Transitions(
        states=z[kept],
        actions=own[kept],
        rewards=batch.rewards[kept],
        next_states=torch.cat([batch.next_states, ahead.to(batch.states)], -1)[kept],
        ended=batch.ended[kept],
        step=batch.step[kept],
        episode=batch.episode[kept],
        initial_states=z[opens],
    )


def _split(task: LeaderTask, z: Tensor) -> tuple[Tensor, Tensor]:
    return z[:, : -task.leader_actions], z[:, -task.leader_actions :]


def _seen_task(task: LeaderTask, leader: Policy) -> LeaderTask:
    """The configurable MDP of a follower that sees the leader's action."""
    world = task.follower

    def reward(theta: Params, z: Tensor, a: Tensor, e: Tensor, after: Tensor) -> Tensor:
        state, b = _split(task, z)
        return world.reward(theta, state, torch.cat([b, a], -1), e, _split(task, after)[0])

    def leader_reward(theta: Params, z: Tensor, a: Tensor, after: Tensor) -> Tensor:
        state, b = _split(task, z)
        return task.reward(theta, state, torch.cat([b, a], -1), _split(task, after)[0])

    def log_prob(theta: Params, z: Tensor, a: Tensor, after: Tensor) -> Tensor:
        return leader.log_prob(theta, *_split(task, after))

    return replace(
        task, follower=replace(world, reward=reward, log_prob=log_prob), reward=leader_reward, leader_actions=0
    )


def _unseen_task(task: LeaderTask, leader: Policy) -> LeaderTask:
    """The configurable MDP of a follower that does not: the leader's action is in the next state."""
    world = task.follower

    def reward(theta: Params, z: Tensor, a: Tensor, e: Tensor, after: Tensor) -> Tensor:
        following, b = _split(task, after)
        return world.reward(theta, _split(task, z)[0], torch.cat([b, a], -1), e, following)

    def leader_reward(theta: Params, z: Tensor, a: Tensor, after: Tensor) -> Tensor:
        following, b = _split(task, after)
        return task.reward(theta, _split(task, z)[0], torch.cat([b, a], -1), following)

    def log_prob(theta: Params, z: Tensor, a: Tensor, after: Tensor) -> Tensor:
        return leader.log_prob(theta, _split(task, z)[0], _split(task, after)[1])

    return replace(
        task, follower=replace(world, reward=reward, log_prob=log_prob), reward=leader_reward, leader_actions=0
    )


def _moved_leader(task: LeaderTask, leader: Policy) -> Callable[[Params, Tensor, Tensor, Tensor], Tensor]:
    """z', whose b' carries the derivative of the leader's action at zero noise in theta."""

    def following(theta: Params, z: Tensor, a: Tensor, after: Tensor) -> Tensor:
        state, b = _split(task, after)
        return torch.cat([state, _attached(leader, theta, state, b)], -1)

    return following


def _attached(leader: Policy, theta: Params, states: Tensor, b: Tensor) -> Tensor:
    mean = leader.act(theta, states, states.new_zeros(len(states), leader.noise_dim))
    return b + mean - mean.detach()


def _first_score(task: LeaderTask, leader: Policy, theta: Params, z: Tensor, source: str) -> Tensor:
    """First states `[E, n + p]` with their derivative, or the log density `[E]` of the first actions."""
    state, b = _split(task, z)
    if source == "score":
        return leader.log_prob(theta, state, b)
    return torch.cat([state, _attached(leader, theta, state, b)], -1)


def _on_states(
    task: LeaderTask,
    batch: Transitions,
    options: CriticOptions,
    follower: Policy,
    soft_value: Callable[[Tensor], Tensor],
) -> tuple[CriticOptions, Policy, Callable[[Tensor], Tensor]]:
    """The user's functions of s as functions of (s, last b)."""
    s = lambda z: _split(task, z)[0]
    features, values = options.features, options.value_features
    seen = replace(options, features=lambda z, a: features(s(z), a), value_features=lambda z: values(s(z)))
    policy = Policy(
        lambda nu, z, e: follower.act(nu, s(z), e),
        lambda nu, z, a: follower.log_prob(nu, s(z), a),
        follower.noise_dim,
    )
    return seen, policy, lambda z: soft_value(s(z))
