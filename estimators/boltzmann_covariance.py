"""Boltzmann-covariance hypergradient of a configurable MDP (theorem 1) from sampled transitions.

The follower answers theta with the soft optimum pi_theta of its own reward; the leader sees transitions of pi_theta:

    grad J = grad E V_L(s_0) + E sum_t gamma_L^t { grad_theta x_L(s_t, a_t) + (1 / lambda) Cov_a[Q_L, G](s_t) },
    G = grad_theta Q_F = E sum_k gamma_F^k grad_theta x_F(s_k, a_k),      x = r + gamma E V(s'),

V_L and Q_L the leader's ordinary values, V_F the follower's *soft* value, both held fixed in x; gamma_L weights time,
gamma_F the inner sum. Three linear critics do it (`leader_critic.py`): Q_L, V_L, and G, whose source is grad_theta x_F.
G has as many columns as theta, but only its covariance with Q_L is used: that functional is pulled back through the
shared Bellman operator to one number y_i per transition, and `sum_i y_i x_F(theta; i) + w_i x_L(theta; i)` is
differentiated once. Nothing of the size of theta is ever solved for.

Choices, with what they were measured to do in `docs/boltzmann.rst`:

    source   "pathwise": s' moves with theta (`step` at zero noise gives its derivative: additive noise);
             "score": gamma (V(s') - b) grad log p(s' | s, a) with a fitted baseline b, for densities only.
    critic   "action": features of (s, a); "state": features of s, Q = r + gamma V(mean s'(s, a)), mean s' fitted.
    guiding  "summed": the action is summed out; "taken": at the action taken, with Q_L and G centred ("double") or
             Q_L alone ("single"): the same mean, more noise.
    folds    cross-fitting by episode: no row meets a critic that it was fitted on.
Reference: Kudo, Tanabe, Wachi and Akimoto, ICAPS 2026, arXiv 2603.14867, theorem 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sim2real.estimators.boltzmann_tables import check_discounts, pull
from sim2real.estimators.critic import Features
from sim2real.estimators.leader_critic import (
    Operator,
    StateFeatures,
    bellman_operator,
    folds_of,
    leader_nodes,
    quadratic_action_features,
    quadratic_state_features,
    read,
    solve,
    worth,
)
from sim2real.estimators.soft_value import check_temperature
from sim2real.estimators.transitions import Transitions, transitions
from sim2real.leader_task import LeaderTask
from sim2real.params import Estimate, Params
from sim2real.policy import Policy
from sim2real.rollout import Rollout

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


def boltzmann_covariance_gradient(
    task: LeaderTask,
    policy: Policy,
    theta: Params,
    nu: Params,
    data: Rollout | Transitions,
    *,
    temperature: float,
    soft_value: Callable[[Tensor], Tensor],
    source: Literal["pathwise", "score"] = "pathwise",
    critics: CriticOptions | None = None,
    actions: Tensor | None = None,
    weights: Tensor | None = None,
    start: Start | None = None,
    following: Following | None = None,
    first: Callable[[Params], Tensor] | None = None,
) -> Estimate:
    """grad J in theta from on-policy transitions with the leader's rewards; `value` the discounted return.

    `policy` at `nu` is the follower's, `soft_value` s `[N, n]` -> V_F `[N]` (differentiable in s for pathwise sources):
    known, or fitted from the same data (`fit_linear_follower`, `fit_soft_value`). `actions [K, m]` lists a finite set.
    Of `task` only the rewards' derivatives and `step` at zero noise (pathwise) or `log_prob` (score) are used.
    `weights [N]` of the outer sum, None: `gamma_L^t / episodes`. `start`: points and shares of the start law, which
    theta may move: adds its gradient, and the outer sum then runs over the visits from there as the value critic sees
    them, which removes the sampling error of the recorded first states. `following`: how s' moves with theta, in place
    of `step` at zero noise. `first`: the recorded first states `[E, n]` as theta moves them, or their log density
    `[E]`, where neither `start` nor `weights` is given.
    info: "outer_weights" `[N]` and "source_worth" `[N]`, w and y above.
    Raises `ValueError` for options that do not fit, a gradient that is not finite or misses theta; `CriticError` as
    `bellman_operator` does.
    """
    check_temperature(temperature)
    check_discounts(task.discount, task.follower.discount)
    options = critics if critics is not None else CriticOptions()
    if options.kind == "state" and source == "score":
        raise ValueError('kind="state" needs the derivative of s\' at actions not taken: use source="pathwise"')
    leaves = {key: value.detach().requires_grad_() for key, value in theta.items()}
    fixed = {key: value.detach() for key, value in nu.items()}
    seen = _seen(task, policy, leaves, fixed, transitions(data), soft_value, options, actions, following)
    with torch.enable_grad():
        begin = None if start is None else _mean_features(options.value_features, *start(leaves))
    outer = _outer(seen, weights, begin)
    guide = (
        _action_form(seen, outer / temperature) if options.kind == "action" else _state_form(seen, outer / temperature)
    )
    with torch.enable_grad():
        leader, follower = _pathwise(seen) if source == "pathwise" else _score(seen)
        surrogate = (outer * leader).sum() + (guide.worth * follower).sum()
        if guide.points is not None and guide.share is not None:
            surrogate = surrogate + (guide.share * _follower_source(seen, *guide.points)).sum()
        if begin is not None:
            surrogate = surrogate + begin @ seen.value_weights.mean(0)
        if first is not None:
            surrogate = surrogate + _first_term(seen, first(leaves))
        grad = pull(surrogate, leaves)
    info = {"outer_weights": outer, "source_worth": guide.worth}
    return Estimate((outer * seen.data.rewards).sum(), grad, info)


@dataclass(frozen=True)
class _Seen:
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


def _seen(
    task: LeaderTask,
    policy: Policy,
    theta: Params,
    nu: Params,
    data: Transitions,
    soft_value: Callable[[Tensor], Tensor],
    options: CriticOptions,
    actions: Tensor | None,
    following: Following | None,
) -> _Seen:
    rows = options.row_weights if options.row_weights is not None else torch.ones_like(data.rewards)
    if rows.shape != data.rewards.shape:
        raise ValueError(f"row_weights must be [{len(data.rewards)}], one per transition, got {tuple(rows.shape)}")
    alive = (~data.ended).to(data.rewards.dtype)
    operator = _value_operator(data, alive, rows, task.discount, options)
    values = solve(operator, data.rewards)
    return _Seen(task, policy, theta, nu, data, soft_value, options, actions, following, alive, rows, operator, values)


def _value_operator(
    data: Transitions, alive: Tensor, rows: Tensor, discount: float, options: CriticOptions
) -> Operator:
    phi = options.value_features
    here, ahead = phi(data.states), phi(data.next_states) * alive.unsqueeze(-1)
    return bellman_operator(here, ahead, rows, discount, folds_of(data, options.folds), ridge=options.ridge)


def _mean_features(features: StateFeatures, states: Tensor, shares: Tensor) -> Tensor:
    if shares.shape != states.shape[:1]:
        raise ValueError(
            f"start gave {len(states)} states and shares of shape {tuple(shares.shape)}; expected [M] each"
        )
    return shares @ features(states)


def _first_term(seen: _Seen, first: Tensor) -> Tensor:
    """Mean of V_L(s_0) over the recorded first states, given moving `[E, n]`, or by their log density `[E]`."""
    states = seen.data.initial_states
    if first.ndim == 2:
        return _leader_value_at(seen, first).mean()
    value = _leader_value_at(seen, states).detach()
    return ((value - value.mean()) * first).mean()


def _leader_value_at(seen: _Seen, states: Tensor) -> Tensor:
    """V_L of states that are not those of the transitions."""
    if seen.options.leader_value is not None:
        return seen.options.leader_value(states)
    return seen.options.value_features(states) @ seen.value_weights.mean(0)


def _outer(seen: _Seen, weights: Tensor | None, first: Tensor | None) -> Tensor:
    """w `[N]` of the outer sum."""
    data = seen.data
    if weights is not None:
        if weights.shape != data.rewards.shape:
            raise ValueError(f"weights must be [{len(data.rewards)}], one per transition, got {tuple(weights.shape)}")
        return weights
    if first is None:
        return seen.task.discount ** data.step.to(data.rewards.dtype) / len(data.initial_states)
    count = len(seen.value_weights)
    return worth(seen.operator, first.detach().expand(count, -1) / count)


def _leader_value(seen: _Seen, states: Tensor) -> Tensor:
    """V_L at the next state of each transition."""
    if seen.options.leader_value is not None:
        return seen.options.leader_value(states)
    return read(seen.value_weights, seen.options.value_features(states), seen.operator.fold)


def _pathwise(seen: _Seen) -> tuple[Tensor, Tensor]:
    """x_L and x_F `[N]` at the transitions; their derivative in theta runs through s'."""
    data, task = seen.data, seen.task
    after = _moved(seen, data.states, data.actions, data.next_states)
    leader = task.reward(seen.theta, data.states, data.actions, after)
    leader = leader + task.discount * seen.alive * _leader_value(seen, after)
    return leader, _follower_source(seen, data.states, data.actions, data.next_states, seen.alive)


def _follower_source(seen: _Seen, states: Tensor, actions: Tensor, following: Tensor, alive: Tensor) -> Tensor:
    world, after = seen.task.follower, _moved(seen, states, actions, following)
    reward = world.reward(seen.theta, states, actions, _no_noise(seen, states), after)
    return reward + world.discount * alive * seen.soft_value(after)


def _moved(seen: _Seen, states: Tensor, actions: Tensor, following: Tensor) -> Tensor:
    """s', with the derivative of the model's mean in theta."""
    if seen.following is not None:
        return seen.following(seen.theta, states, actions, following)
    mean = seen.task.follower.step(seen.theta, states, actions, _no_noise(seen, states))
    return following + mean - mean.detach()


def _no_noise(seen: _Seen, states: Tensor) -> Tensor:
    return states.new_zeros(len(states), seen.task.follower.noise_dims[1])


def _score(seen: _Seen) -> tuple[Tensor, Tensor]:
    """x_L and x_F `[N]` with the derivative of the density instead, and a baseline fitted on (s, a)."""
    data, task, world = seen.data, seen.task, seen.task.follower
    if world.log_prob is None:
        raise ValueError('the world declares no log_prob, which source="score" needs; use source="pathwise"')
    log_prob = world.log_prob(seen.theta, data.states, data.actions, data.next_states)
    phi = seen.options.features(data.states, data.actions)
    whole = torch.zeros_like(seen.operator.fold)
    regression = bellman_operator(phi, phi, seen.row_weights, 0.0, whole)  # discount 0: plain least squares

    def surrogate(reward: Tensor, discount: float, value: Tensor) -> Tensor:
        target = (reward + discount * seen.alive * value).detach()
        return reward + (target - phi @ solve(regression, target)[0]) * log_prob

    leader = task.reward(seen.theta, data.states, data.actions, data.next_states)
    noise = _no_noise(seen, data.states)
    follower = world.reward(seen.theta, data.states, data.actions, noise, data.next_states)
    soft = seen.soft_value(data.next_states).detach()
    return (
        surrogate(leader, task.discount, _leader_value(seen, data.next_states)),
        surrogate(follower, world.discount, soft),
    )


@dataclass(frozen=True)
class _Guide:
    """The guiding term as a weighted sum of follower sources: at the transitions, and at further points."""

    worth: Tensor
    """y `[N]`"""
    points: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    """s, a, s' and alive `[P N, ...]`"""
    share: Tensor | None = None
    """`[P N]`"""


def _action_form(seen: _Seen, scale: Tensor) -> _Guide:
    """Q_L and G by features of (s, a)."""
    data, options, fold = seen.data, seen.options, seen.operator.fold
    taken = options.features(data.states, data.actions)
    after, shares = leader_nodes(seen.policy, seen.nu, data.next_states, seen.actions)
    ahead = torch.zeros_like(taken)
    for action, share in zip(after, shares * seen.alive, strict=True):
        ahead = ahead + share.unsqueeze(-1) * options.features(data.next_states, action)
    build = lambda discount: bellman_operator(taken, ahead, seen.row_weights, discount, fold, ridge=options.ridge)
    operator, inner = _operators(seen, build)
    weights = solve(operator, data.rewards)
    leader_q = options.leader_q
    nodes, shares = leader_nodes(seen.policy, seen.nu, data.states, seen.actions)
    psi = [*(options.features(data.states, action) for action in nodes), taken]
    if leader_q is None:
        q = torch.stack([read(weights, rows, fold) for rows in psi])
    else:
        q = torch.stack([leader_q(data.states, action) for action in (*nodes, data.actions)]).detach()
    z = _contrasts(q, shares, scale, options)
    return _Guide(worth(inner, _functional(z, psi, inner)))


def _state_form(seen: _Seen, scale: Tensor) -> _Guide:
    """Q = r + gamma V(mean s'), G = grad x_F + gamma_F g(mean s'), with V and g by features of the state."""
    data, task, options, fold = seen.data, seen.task, seen.options, seen.operator.fold
    mean = options.next_state if options.next_state is not None else _linear_model(data)
    nodes, shares = leader_nodes(seen.policy, seen.nu, data.states, seen.actions)
    every = torch.cat([nodes, data.actions.unsqueeze(0)])
    count, at = len(every), every.flatten(0, 1)
    states = data.states.repeat(count, 1)
    reached = mean(states, at)
    psi = list(options.value_features(reached).split(len(fold)))
    value = torch.stack([read(seen.value_weights, rows, fold) for rows in psi])
    with torch.no_grad():
        reward = task.reward(seen.theta, states, at, reached).reshape(count, -1)
    z = _contrasts(reward + task.discount * seen.alive * value, shares, scale, options)
    discount = task.follower.discount
    build = lambda gamma: _value_operator(data, seen.alive, seen.row_weights, gamma, options)
    inner = seen.operator if discount == task.discount else build(discount)
    y = worth(inner, _functional(discount * seen.alive * z, psi, inner))
    return _Guide(y, (states, at, reached, seen.alive.repeat(count)), z.flatten())


def _operators(seen: _Seen, build: Callable[[float], Operator]) -> tuple[Operator, Operator]:
    """The leader's and the follower's operator: one when the discounts agree."""
    operator = build(seen.task.discount)
    same = seen.task.discount == seen.task.follower.discount
    return operator, operator if same else build(seen.task.follower.discount)


def _contrasts(q: Tensor, shares: Tensor, scale: Tensor, options: CriticOptions) -> Tensor:
    """Coefficients `[K + 1, N]` of G at the nodes and, last, at the action taken: their sum is the guiding term."""
    mean = (shares * q[:-1]).sum(0)
    if options.guiding == "summed":
        return torch.cat([scale * shares * (q[:-1] - mean), torch.zeros_like(q[-1:])])
    taken = scale * (q[-1] - mean)
    others = -shares * taken if options.centring == "double" else torch.zeros_like(shares)
    return torch.cat([others, taken.unsqueeze(0)])


def _functional(z: Tensor, psi: list[Tensor], operator: Operator) -> Tensor:
    """`[F, q]`: `sum_k sum_i z_ki psi_ki` over the rows i that each fit is read at."""
    count = len(operator.resolvent)
    reads = [operator.fold == f if count > 1 else torch.ones_like(z[0]) for f in range(count)]
    return torch.stack([sum((share * at) @ rows for share, rows in zip(z, psi, strict=True)) for at in reads])


def _linear_model(data: Transitions) -> Callable[[Tensor, Tensor], Tensor]:
    """Mean s' of (s, a), least squares, linear with a constant."""
    inputs = lambda states, actions: torch.cat([states, actions, torch.ones_like(states[:, :1])], -1)
    fit = torch.linalg.lstsq(inputs(data.states, data.actions), data.next_states).solution
    return lambda states, actions: inputs(states, actions) @ fit
