"""Boltzmann-covariance hypergradient of a finite two-player Markov game (theorem 2), by linear solves.

The leader acts by f_theta(b | s); the follower sees b and answers with `g = exp((Q_F - V_F) / beta)`,

    V_F(s, b) = beta log sum_a exp(Q_F(s, b, a) / beta),    Q_F = r_F + gamma_F P sum_b' f(b' | s') V_F(s', b').

With the discounted visits d and `B = Q_L - sum_a g Q_L`,

    grad J = sum_{s,b,a} d f g [ grad log f Q_L + (1 / beta) B grad Q_F ],
    grad Q_F(s, b, a) = E sum_{k >= 1} gamma_F^k grad log f(b_k | s_k) V_F(s_k, b_k).

The inner sum starts at the next step: with k = 0 it has the same mean (sum_a g B = 0) and more variance. The logarithm
stands inside the average over b': averaging Q_F over the leader's action first gives another follower, one that does
not see it, and this gradient is wrong for that one. Here rewards, kernel and start may depend on theta, too.

It is theorem 1 for the follower's own MDP, whose states are the pairs (s, b) and whose kernel is
`P(s' | s, b, a) f_theta(b' | s')`. A follower that does *not* see the leader's action lives in the MDP with rewards and
kernel averaged over f_theta: `unseen_leader_tables` with `boltzmann_tables_gradient`.
Reference: Kudo, Tanabe, Wachi and Akimoto, ICAPS 2026, arXiv 2603.14867, theorem 2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sim2real.estimators.boltzmann_tables import (
    check_discounts,
    check_policy,
    inverse,
    leaves_of,
    moved_kernel,
    pull,
)
from sim2real.estimators.soft_value import check_temperature
from sim2real.leader_task import ConfigurableTables, GameTables
from sim2real.params import Estimate, Params


def stackelberg_tables_gradient(
    game: Callable[[Params], GameTables],
    leader_policy: Callable[[Params], Tensor],
    theta: Params,
    follower_policy: Tensor,
    soft_value: Tensor,
    *,
    temperature: float,
    leader_discount: float,
    follower_discount: float,
    transition: Tensor | None = None,
) -> Estimate:
    """grad J in theta and `value` J; `leader_policy(theta) [S, B]`, `follower_policy [S, B, A]`, `soft_value [S, B]`.

    `transition [S, B, A, S]` None: that of `game`, exact; an estimate goes here (see `boltzmann_tables_gradient`).
    info: "leader_value" `[S]`, "benefit" `[S, B, A]`, "visits" `[S]`, "leader_worth" `[S, B]` (d J / d f).
    Raises `ValueError` for shapes that do not fit, a discount outside [0, 1), or a policy that is none.
    """
    check_temperature(temperature)
    check_discounts(leader_discount, follower_discount)
    leaves, soft_value = leaves_of(theta), soft_value.double()
    with torch.enable_grad():
        at, leading = game(leaves), leader_policy(leaves)
    kernel = (at.transition if transition is None else transition).detach().double()
    _check(at, kernel, leading, follower_policy, soft_value)
    tables = (at.leader_reward, at.start, leading, follower_policy)
    reward, start, f, g = (table.detach().double() for table in tables)
    joint = f.unsqueeze(-1) * g
    closed = torch.einsum("sba,sbax->sx", joint, kernel)
    resolvent = inverse(closed, leader_discount)
    value = resolvent @ (joint * reward).sum((-2, -1))
    q = reward + leader_discount * kernel @ value
    mean = (g * q).sum(-1)
    benefit = q - mean.unsqueeze(-1)
    visits = start @ resolvent
    taken = visits[:, None, None] * joint
    weight = taken * benefit / temperature
    inner = resolvent if follower_discount == leader_discount else inverse(closed, follower_discount)
    arriving = follower_discount * torch.einsum("sba,sbax->x", weight, kernel) @ inner
    worth = weight + joint * arriving[:, None, None]
    leader_worth = visits.unsqueeze(-1) * mean + arriving.unsqueeze(-1) * soft_value
    expected = (f * soft_value).sum(-1)
    with torch.enable_grad():
        surrogate = (taken * at.leader_reward).sum() + (worth * at.follower_reward).sum() + value @ at.start
        ahead = leader_discount * taken.unsqueeze(-1) * value + follower_discount * worth.unsqueeze(-1) * expected
        surrogate = surrogate + moved_kernel(ahead, at.transition, transition) + (leader_worth * leading).sum()
        grad = pull(surrogate, leaves, theta)
    info = {"leader_value": value, "benefit": benefit, "visits": visits, "leader_worth": leader_worth}
    return Estimate(start @ value, grad, info)


def unseen_leader_tables(game: GameTables, leader_policy: Tensor) -> ConfigurableTables:
    """The configurable MDP of a follower that does not see the leader's action, differentiable in `leader_policy`."""
    over = lambda table: torch.einsum("sb,sb...->s...", leader_policy, table)
    return ConfigurableTables(over(game.leader_reward), over(game.follower_reward), game.start, over(game.transition))


def seen_leader_tables(game: GameTables, leader_policy: Tensor) -> ConfigurableTables:
    """The follower's own MDP over the pairs (s, b), S B states in row-major order, when it sees the leader's action.

    The soft optimum of this MDP is the follower's; theorem 1 on it equals theorem 2 on the game.
    """
    states, leader, follower = game.leader_reward.shape
    pairs = states * leader
    following = torch.einsum("sbax,xc->sbaxc", game.transition, leader_policy)
    start = (game.start.unsqueeze(-1) * leader_policy).reshape(pairs)
    flat = lambda reward: reward.reshape(pairs, follower)
    return ConfigurableTables(
        flat(game.leader_reward), flat(game.follower_reward), start, following.reshape(pairs, follower, pairs)
    )


def _check(at: GameTables, kernel: Tensor, f: Tensor, g: Tensor, soft_value: Tensor) -> None:
    states, leader, follower = g.shape
    shapes = {
        "leader_reward": (at.leader_reward, (states, leader, follower)),
        "follower_reward": (at.follower_reward, (states, leader, follower)),
        "start": (at.start, (states,)),
        "transition": (kernel, (states, leader, follower, states)),
        "leader_policy": (f, (states, leader)),
        "soft_value": (soft_value, (states, leader)),
    }
    for name, (value, shape) in shapes.items():
        if tuple(value.shape) != shape:
            raise ValueError(f"{name} must be {shape} for a follower policy {tuple(g.shape)}, got {tuple(value.shape)}")
    check_policy(f)
    check_policy(g)
