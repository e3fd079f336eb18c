"""A three-state Markov game in which the leader's threat decides where the follower goes.

States S, A, B; the follower's actions s, a, b go to that state; the leader's are 0 and 1. From S the leader does not
matter. From A under 0 the follower chooses, under 1 it is sent to S whatever it does. From B, s leads to S, the rest
stays. Follower: +1 for a or b in S, -1 in A under 1, `bonus` R for b in A under 0. Leader: +1 for a in S.

Only p = f(1 | A) matters: the follower cycles S-A, which pays the leader, while p is small, and goes to B otherwise or
to A on its way. Both discounts are 0.99; episodes end by time-out after 150 steps. Reference: Kudo, Tanabe, Wachi and
Akimoto, ICAPS 2026, arXiv 2603.14867 (R = 2; R = 1 in a later revision).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sim2real.bounds import Box
from sim2real.leader_task import GameTables, LeaderTask
from sim2real.mdp import ModelMDP
from sim2real.params import Params

S, A, B = range(3)
HORIZON = 150


def discrete_game_tables(*, bonus: float = 2.0) -> GameTables:
    """Rewards `[3, 2, 3]`, transition `[3, 2, 3, 3]` and start, with the follower's bonus R."""
    follower, leader = torch.zeros(2, 3, 2, 3, dtype=torch.float64)
    follower[S, :, 1:] = 1.0
    follower[A, 0, 2] = bonus
    follower[A, 1] = -1.0
    leader[S, :, 1] = 1.0
    reached = torch.tensor([[[S, A, B]] * 2, [[S, A, B], [S, S, S]], [[S, B, B]] * 2])
    start = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    return GameTables(leader, follower, start, torch.nn.functional.one_hot(reached, 3).double())


def discrete_game(*, bonus: float = 2.0) -> LeaderTask:
    """State (index,), action (leader's index, follower's index); theta: logits `[3, 2]` of the leader's policy."""
    tables = discrete_game_tables(bonus=bonus)
    reached = tables.transition.argmax(-1)

    def initial_state(theta: Params, e0: Tensor) -> Tensor:
        return e0.new_zeros(len(e0), 1)

    def step(theta: Params, state: Tensor, action: Tensor, e: Tensor) -> Tensor:
        return _at(reached, state, action).to(state.dtype).unsqueeze(-1)

    def reward(theta: Params, state: Tensor, action: Tensor, e: Tensor, after: Tensor) -> Tensor:
        return _at(tables.follower_reward, state, action).to(state.dtype)

    def leader_reward(theta: Params, state: Tensor, action: Tensor, after: Tensor) -> Tensor:
        return _at(tables.leader_reward, state, action).to(state.dtype)

    world = ModelMDP(
        initial_state,
        step,
        reward,
        noise_dims=(0, 0),
        dt=1.0,
        discount=0.99,
        derivative_order=0,
        names={"state": ("place",), "action": ("leader", "follower")},
        box=Box(default={"logits": torch.zeros(3, 2, dtype=torch.float64)}),
    )
    return LeaderTask(world, leader_reward, discount=0.99, leader_actions=1)


def _at(table: Tensor, state: Tensor, action: Tensor) -> Tensor:
    leader, follower = action.long().unbind(-1)
    return table.to(state.device)[state[:, 0].long(), leader, follower]
