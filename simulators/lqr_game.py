"""A linear-quadratic follower in a world that a leader pushes, with a sharp target as the leader's reward.

    s' = A s + B_L b + B_F u,    b ~ N(K s, leader_std^2),    s_0 = (1, 0),

The follower sees the leader's action b before it acts, at cost `s'Q s + u'R u`, Q = I, R = 1, discount 0.95 and entropy
weight 0.1. The leader, discount 0.99, wants the state at the target (-0.8, 0) before each move:
`r_L = exp(-(s - target)' diag(25, 10^4) (s - target) / 2)`. theta: the gain K `[1, 2]` of the leader's policy. Episodes
last 100 steps. Reference: Kudo, Tanabe, Wachi and Akimoto, ICAPS 2026, arXiv 2603.14867.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sim2real.bounds import Box
from sim2real.leader_task import LeaderTask
from sim2real.mdp import ModelMDP
from sim2real.params import Params
from sim2real.policy import Policy, linear_policy

HORIZON = 100


@dataclass(frozen=True)
class LQRGame:
    """The matrices of the game, float64."""

    A: Tensor
    """`[2, 2]`"""
    leader_input: Tensor
    """B_L `[2, 1]`"""
    follower_input: Tensor
    """B_F `[2, 1]`"""
    Q: Tensor
    R: Tensor
    initial_state: Tensor
    target: Tensor
    precision: Tensor
    """`[2]`, diagonal"""
    leader_std: float = 1e-3
    temperature: float = 0.1
    leader_discount: float = 0.99
    follower_discount: float = 0.95


def lqr_game_data() -> LQRGame:
    """The published game."""
    of = lambda rows: torch.tensor(rows, dtype=torch.float64)
    return LQRGame(
        A=of([[0.0, 1.0], [0.0, 0.0]]),
        leader_input=of([[0.1], [0.0]]),
        follower_input=of([[0.0], [0.1]]),
        Q=torch.eye(2, dtype=torch.float64),
        R=torch.eye(1, dtype=torch.float64),
        initial_state=of([1.0, 0.0]),
        target=of([-0.8, 0.0]),
        precision=of([25.0, 1e4]),
    )


def lqr_game() -> LeaderTask:
    """State `[2]`, action (leader's push, follower's push); theta: gain `[1, 2]`."""
    data = lqr_game_data()

    def initial_state(theta: Params, e0: Tensor) -> Tensor:
        return data.initial_state.to(e0).expand(len(e0), -1)

    def step(theta: Params, state: Tensor, action: Tensor, e: Tensor) -> Tensor:
        push = torch.cat([data.leader_input, data.follower_input], -1).to(action)
        return state @ data.A.to(state).mT + action @ push.mT

    def reward(theta: Params, state: Tensor, action: Tensor, e: Tensor, after: Tensor) -> Tensor:
        own = action[:, 1:]
        return -((state @ data.Q.to(state)) * state).sum(-1) - ((own @ data.R.to(own)) * own).sum(-1)

    def leader_reward(theta: Params, state: Tensor, action: Tensor, after: Tensor) -> Tensor:
        return torch.exp(-0.5 * (data.precision.to(state) * (state - data.target.to(state)).square()).sum(-1))

    world = ModelMDP(
        initial_state,
        step,
        reward,
        noise_dims=(0, 0),
        dt=1.0,
        discount=data.follower_discount,
        names={"state": ("position", "follow_up"), "action": ("leader", "follower")},
        box=Box(default={"gain": torch.zeros(1, 2, dtype=torch.float64)}),
    )
    return LeaderTask(world, leader_reward, discount=data.leader_discount, leader_actions=1)


def lqr_game_leader() -> Policy:
    """f_theta: `b = K s + leader_std e`, with theta = {"gain": K `[1, 2]`}."""
    below = linear_policy(1, std=lqr_game_data().leader_std)  # b = -gain s
    turned = lambda theta: {"gain": -theta["gain"]}
    return Policy(
        lambda theta, state, noise: below.act(turned(theta), state, noise),
        lambda theta, state, action: below.log_prob(turned(theta), state, action),
        noise_dim=1,
    )
