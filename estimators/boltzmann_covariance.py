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

from sim2real.estimators.boltzmann_tables import leaves_of, pull
from sim2real.estimators.leader_critic import Operator, bellman_operator, leader_nodes, read, solve, worth
from sim2real.estimators.leader_view import (
    CriticOptions,
    Following,
    Seen,
    Start,
    first_term,
    follower_source,
    look,
    mean_features,
    outer_weights,
    sources,
    value_operator,
)
from sim2real.estimators.soft_value import check_temperature
from sim2real.estimators.transitions import Transitions, transitions
from sim2real.leader_task import LeaderTask
from sim2real.params import Estimate, Params
from sim2real.policy import Policy
from sim2real.rollout import Rollout


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
    if task.leader_actions:
        raise ValueError(f"the task declares leader_actions = {task.leader_actions}; use stackelberg_gradient")
    options = critics if critics is not None else CriticOptions()
    if options.kind == "state" and source == "score":
        raise ValueError('kind="state" needs the derivative of s\' at actions not taken: use source="pathwise"')
    leaves = leaves_of(theta)
    seen = look(
        task, policy, leaves, nu, transitions(data), soft_value, critics=options, actions=actions, following=following
    )
    with torch.enable_grad():
        begin = None if start is None else mean_features(options.value_features, *start(leaves))
    outer = outer_weights(seen, weights, begin)
    guide = (
        _action_form(seen, outer / temperature) if options.kind == "action" else _state_form(seen, outer / temperature)
    )
    with torch.enable_grad():
        leader, follower = sources(seen, source)
        surrogate = (outer * leader).sum() + (guide.worth * follower).sum()
        if guide.points is not None and guide.share is not None:
            surrogate = surrogate + (guide.share * follower_source(seen, *guide.points)).sum()
        if begin is not None:
            surrogate = surrogate + begin @ seen.value_weights.mean(0)
        if first is not None:
            surrogate = surrogate + first_term(seen, first(leaves))
        grad = pull(surrogate, leaves, theta)
    info = {"outer_weights": outer, "source_worth": guide.worth}
    return Estimate((outer * seen.data.rewards).sum(), grad, info)


@dataclass(frozen=True)
class _Guide:
    """The guiding term as a weighted sum of follower sources: at the transitions, and at further points."""

    worth: Tensor
    """y `[N]`"""
    points: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    """s, a, s' and alive `[P N, ...]`"""
    share: Tensor | None = None
    """`[P N]`"""


def _action_form(seen: Seen, scale: Tensor) -> _Guide:
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


def _state_form(seen: Seen, scale: Tensor) -> _Guide:
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
    build = lambda gamma: value_operator(data, seen.alive, seen.row_weights, gamma, options)
    inner = seen.operator if discount == task.discount else build(discount)
    y = worth(inner, _functional(discount * seen.alive * z, psi, inner))
    return _Guide(y, (states, at, reached, seen.alive.repeat(count)), z.flatten())


def _operators(seen: Seen, build: Callable[[float], Operator]) -> tuple[Operator, Operator]:
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
