"""What a leader makes of the transitions it sees: values of its own, and the sources of both gradients.

    x_L = r_L + gamma_L V_L(s'),      x_F = r_F + gamma_F V_F(s'),

at each transition, with their derivatives in theta at fixed values V: pathwise, through s', or by the score of the
density of s' times x minus a fitted baseline. The gradient of the leader's return is a weighted sum of these
derivatives whatever the method; the methods differ in the weights (`boltzmann_covariance.py`, `leader_baselines.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf
from typing import Literal

import torch
from torch import Tensor

from sim2real.estimators.boltzmann_tables import check_discounts
from sim2real.estimators.critic import Features
from sim2real.estimators.leader_critic import (
    Operator,
    StateFeatures,
    bellman_operator,
    folds_of,
    quadratic_action_features,
    quadratic_state_features,
    read,
    solve,
    worth,
)
from sim2real.estimators.transitions import Transitions
from sim2real.leader_task import LeaderTask
from sim2real.params import Params
from sim2real.policy import Policy

Start = Callable[[Params], tuple[Tensor, Tensor]]
"""theta -> states `[M, n]` and shares `[M]`, which sum to 1: draws of the start law, or all of a finite one"""
Following = Callable[[Params, Tensor, Tensor, Tensor], Tensor]
"""theta, s, a, s' -> s' with its derivative in theta at fixed noise"""


@dataclass(frozen=True)
class CriticOptions:
    """How the leader's critics are built; the defaults are right for a linear-quadratic world."""

    features: Features = quadratic_action_features
    """of (s, a); not used by `kind="state"`"""
    value_features: StateFeatures = quadratic_state_features
    row_weights: Tensor | None = None
    """c `[N]`; None: all equal"""
    kind: Literal["action", "state"] = "action"
    next_state: Callable[[Tensor, Tensor], Tensor] | None = None
    """mean s' of (s, a) for `kind="state"`; None: fitted, linear"""
    ridge: float = 0.0
    folds: int = 1
    guiding: Literal["summed", "taken"] = "summed"
    centring: Literal["double", "single"] = "double"
    leader_value: Callable[[Tensor], Tensor] | None = None
    """s `[N, n]` -> V_L `[N]`, in place of the critic (of a fitted model, say); differentiable for pathwise sources"""
    leader_q: Callable[[Tensor, Tensor], Tensor] | None = None
    """s, a -> Q_L `[N]` at the states of the transitions in their order, in place of the critic; `kind="action"`"""


@dataclass(frozen=True)
class Seen:
    """All that the terms of the gradient share; theta as leaves of the derivative."""

    task: LeaderTask
    policy: Policy
    theta: Params
    nu: Params
    data: Transitions
    soft_value: Callable[[Tensor], Tensor]
    options: CriticOptions
    actions: Tensor | None
    following: Following | None
    alive: Tensor
    """`[N]`, 0 at the end of an episode"""
    row_weights: Tensor
    operator: Operator
    """of the values, with the leader's discount"""
    value_weights: Tensor
    """of V_L, `[F, q]`"""


def look(
    task: LeaderTask,
    policy: Policy,
    theta: Params,
    nu: Params,
    data: Transitions,
    soft_value: Callable[[Tensor], Tensor],
    *,
    critics: CriticOptions | None,
    actions: Tensor | None,
    following: Following | None = None,
) -> Seen:
    """What every gradient of this kind needs of the transitions, in float64; theta: leaves of the derivative."""
    exact = {key: value.double() for key, value in vars(data).items() if value.is_floating_point()}
    data = replace(data, **exact)
    nu = {key: value.detach().double() if value.is_floating_point() else value for key, value in nu.items()}
    check_discounts(task.discount, task.follower.discount)
    options = critics if critics is not None else CriticOptions()
    _check_options(options)
    soft_value = _one_each(soft_value, "soft_value")
    if options.leader_value is not None:
        options = replace(options, leader_value=_one_each(options.leader_value, "leader_value"))
    rows = options.row_weights.double() if options.row_weights is not None else torch.ones_like(data.rewards)
    if rows.shape != data.rewards.shape:
        raise ValueError(f"row_weights must be [{len(data.rewards)}], one per transition, got {tuple(rows.shape)}")
    alive = (~data.ended).to(data.rewards.dtype)
    operator = value_operator(data, alive, rows, task.discount, options)
    values = solve(operator, data.rewards)
    return Seen(task, policy, theta, nu, data, soft_value, options, actions, following, alive, rows, operator, values)


def _check_options(options: CriticOptions) -> None:
    check_choice("kind", options.kind, "action", "state")
    check_choice("guiding", options.guiding, "summed", "taken")
    check_choice("centring", options.centring, "double", "single")
    if not 0 <= options.ridge < inf:
        raise ValueError(f"ridge must be >= 0 and finite, got {options.ridge}")


def check_choice(name: str, given: str, *known: str) -> None:
    """Raise `ValueError` unless `given` is one of `known`."""
    if given not in known:
        raise ValueError(f"{name} must be one of {known}, got {given!r}")


def _one_each(value: Callable[[Tensor], Tensor], name: str) -> Callable[[Tensor], Tensor]:
    """`value`, refused where it gives `[N, 1]`, which would broadcast."""

    def checked(states: Tensor) -> Tensor:
        found = value(states)
        if found.shape != states.shape[:1]:
            raise ValueError(f"{name} gave {tuple(found.shape)}; expected [N] = {tuple(states.shape[:1])}")
        return found

    return checked


def value_operator(data: Transitions, alive: Tensor, rows: Tensor, discount: float, options: CriticOptions) -> Operator:
    """The Bellman operator of a state value in `options.value_features`; `alive [N]` is 0 at an end."""
    phi = options.value_features
    here, ahead = phi(data.states), phi(data.next_states) * alive.unsqueeze(-1)
    return bellman_operator(here, ahead, rows, discount, folds_of(data, options.folds), ridge=options.ridge)


def mean_features(features: StateFeatures, states: Tensor, shares: Tensor) -> Tensor:
    """Mean `[k]` of the features of M states with probabilities `shares [M]`. Raises `ValueError` for other shapes."""
    if shares.shape != states.shape[:1]:
        raise ValueError(
            f"start gave {len(states)} states and shares of shape {tuple(shares.shape)}; expected [M] each"
        )
    return shares @ features(states)


def first_term(seen: Seen, first: Tensor) -> Tensor:
    """Mean of V_L(s_0) over the recorded first states, given moving `[E, n]`, or by their log density `[E]`."""
    states = seen.data.initial_states
    if first.ndim == 2:
        return _leader_value_at(seen, first).mean()
    value = _leader_value_at(seen, states).detach()
    return ((value - value.mean()) * first).mean()


def _leader_value_at(seen: Seen, states: Tensor) -> Tensor:
    """V_L of states that are not those of the transitions."""
    if seen.options.leader_value is not None:
        return seen.options.leader_value(states)
    return seen.options.value_features(states) @ seen.value_weights.mean(0)


def outer_weights(seen: Seen, weights: Tensor | None = None, first: Tensor | None = None) -> Tensor:
    """w `[N]` of the outer sum: given, by the visits from mean features `first [q]`, or `gamma_L^t / episodes`."""
    data = seen.data
    if weights is not None:
        if weights.shape != data.rewards.shape:
            raise ValueError(f"weights must be [{len(data.rewards)}], one per transition, got {tuple(weights.shape)}")
        return weights.double()
    if first is None:
        return seen.task.discount ** data.step.to(data.rewards.dtype) / len(data.initial_states)
    count = len(seen.value_weights)
    return worth(seen.operator, first.detach().expand(count, -1) / count)


def _leader_value(seen: Seen, states: Tensor) -> Tensor:
    """V_L at the next state of each transition."""
    if seen.options.leader_value is not None:
        return seen.options.leader_value(states)
    return read(seen.value_weights, seen.options.value_features(states), seen.operator.fold)


def sources(seen: Seen, source: Literal["pathwise", "score"]) -> tuple[Tensor, Tensor]:
    """x_L and x_F `[N]`, whose derivatives in theta are the sources of the leader's and of the follower's gradient."""
    check_choice("source", source, "pathwise", "score")
    return _pathwise(seen) if source == "pathwise" else _score(seen)


def _pathwise(seen: Seen) -> tuple[Tensor, Tensor]:
    """x_L and x_F `[N]` at the transitions; their derivative in theta runs through s'."""
    data, task = seen.data, seen.task
    after = _moved(seen, data.states, data.actions, data.next_states)
    leader = task.reward(seen.theta, data.states, data.actions, after)
    leader = leader + task.discount * seen.alive * _leader_value(seen, after)
    return leader, follower_source(seen, data.states, data.actions, data.next_states, seen.alive)


def follower_source(seen: Seen, states: Tensor, actions: Tensor, following: Tensor, alive: Tensor) -> Tensor:
    """`r_F + gamma_F alive V_F(s')` `[N]` as a function of theta, with the follower's soft value held."""
    world, after = seen.task.follower, _moved(seen, states, actions, following)
    reward = world.reward(seen.theta, states, actions, _no_noise(seen, states), after)
    return reward + world.discount * alive * seen.soft_value(after)


def _moved(seen: Seen, states: Tensor, actions: Tensor, following: Tensor) -> Tensor:
    """s', with the derivative of the model's mean in theta."""
    if seen.following is not None:
        return seen.following(seen.theta, states, actions, following)
    mean = seen.task.follower.step(seen.theta, states, actions, _no_noise(seen, states))
    return following + mean - mean.detach()


def _no_noise(seen: Seen, states: Tensor) -> Tensor:
    return states.new_zeros(len(states), seen.task.follower.noise_dims[1])


def _score(seen: Seen) -> tuple[Tensor, Tensor]:
    """x_L and x_F `[N]` with the derivative of the density instead, and a baseline fitted on (s, a)."""
    data, task, world = seen.data, seen.task, seen.task.follower
    if world.log_prob is None:
        raise ValueError('the world declares no log_prob, which source="score" needs; use source="pathwise"')
    log_prob = world.log_prob(seen.theta, data.states, data.actions, data.next_states)
    phi = seen.options.features(data.states, data.actions)
    fold = seen.operator.fold
    regression = bellman_operator(phi, phi, seen.row_weights, 0.0, fold)  # discount 0: plain least squares

    def surrogate(reward: Tensor, discount: float, value: Tensor) -> Tensor:
        target = (reward + discount * seen.alive * value).detach()
        return reward + (target - read(solve(regression, target), phi, fold)) * log_prob

    leader = task.reward(seen.theta, data.states, data.actions, data.next_states)
    noise = _no_noise(seen, data.states)
    follower = world.reward(seen.theta, data.states, data.actions, noise, data.next_states)
    soft = seen.soft_value(data.next_states).detach()
    return (
        surrogate(leader, task.discount, _leader_value(seen, data.next_states)),
        surrogate(follower, world.discount, soft),
    )
