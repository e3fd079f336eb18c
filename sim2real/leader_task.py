"""Two-level problems: a leader configures a world, or acts in it, and a follower responds with its soft optimum.

    leader     max_theta E sum_t leader_discount^t r_L,
    follower   pi_theta = argmax_pi E sum_t follower_discount^t (r_F - lambda log pi).

A configurable MDP lets theta enter rewards, transitions and the first state. In a Markov game theta is that of the
leader's own policy f_theta(b | s), and an action of the world holds the leader's columns first, the follower's after.
Simulators build these types, estimators read them; neither knows the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from sim2real.mdp import ModelMDP
from sim2real.params import Params


@dataclass(frozen=True)
class LeaderTask:
    """A world in which a follower acts, with what the leader wants of it."""

    follower: ModelMDP
    """the world, with the reward and the discount of the follower"""
    reward: Callable[[Params, Tensor, Tensor, Tensor], Tensor]
    """theta, s `[N, n]`, a `[N, m]`, s' `[N, n]` -> the leader's reward `[N]`"""
    discount: float
    """of the leader"""
    leader_actions: int = 0
    """how many of the first columns of an action are the leader's; 0 in a configurable MDP"""


@dataclass(frozen=True)
class ConfigurableTables:
    """A finite configurable MDP at one theta; a row of `transition` sums to less than 1 where episodes may end."""

    leader_reward: Tensor
    """`[S, A]`"""
    follower_reward: Tensor
    """`[S, A]`"""
    start: Tensor
    """`[S]`"""
    transition: Tensor | None = None
    """`[S, A, S]`; None where theta does not enter it and it is not known"""


@dataclass(frozen=True)
class GameTables:
    """A finite two-player Markov game: S states, B actions of the leader, A of the follower."""

    leader_reward: Tensor
    """`[S, B, A]`"""
    follower_reward: Tensor
    """`[S, B, A]`"""
    start: Tensor
    """`[S]`"""
    transition: Tensor
    """`[S, B, A, S]`"""
