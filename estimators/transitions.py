"""Real transitions (s, a, r, s') as one flat batch, whatever they were recorded in.

Masked steps are dropped. A transition has `ended` when nothing after it is worth anything: its successor is terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sim2real.log import RolloutLog
from sim2real.rollout import Rollout

RealReward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""state `[N, n]`, action `[N, m]`, next state `[N, n]` -> reward `[N]` of the real task, maximised"""


@dataclass(frozen=True)
class Transitions:
    """N transitions of E episodes, in the order recorded."""

    states: Tensor
    """`[N, n]`"""
    actions: Tensor
    """`[N, m]`"""
    rewards: Tensor
    """`[N]`"""
    next_states: Tensor
    """`[N, n]`"""
    ended: Tensor
    """`[N]` bool"""
    step: Tensor
    """`[N]` int64, steps since the start of the episode"""
    episode: Tensor
    """`[N]` int64, 0..E-1, not decreasing"""
    initial_states: Tensor
    """`[E, n]`, the first state of each episode"""


def transitions(
    log: Rollout | RolloutLog | Transitions,
    real_reward: RealReward | None = None,
    *,
    terminal: Callable[[Tensor], Tensor] | None = None,
) -> Transitions:
    """Flatten rollouts; the states of a `RolloutLog` are its signals. `Transitions` are returned as they are.

    `real_reward` None takes the rewards recorded. `terminal` (s' `[N, n]` -> `[N]` bool) says which successors end the
    task; without it a `Rollout` whose mask stops early has ended there, a `RolloutLog` was merely cut short. An episode
    starts at its first step that is not masked.
    Raises `ValueError` for shapes that do not match, data that are not finite, no step or no reward at all.
    """
    if isinstance(log, Transitions):
        _check_finite(log)
        return log
    if not isinstance(log, Rollout | RolloutLog):
        raise TypeError(f"real data come as a Rollout, RolloutLog or Transitions, got {type(log).__name__}")
    states, recorded = (log.states, log.rewards) if isinstance(log, Rollout) else (log.signals, log.rewards)
    batch, horizon = log.actions.shape[:2]
    if states.shape[:2] != (batch, horizon + 1):
        raise ValueError(
            f"actions of shape {tuple(log.actions.shape)} need states [B, T+1, n], got {tuple(states.shape)}"
        )
    mask = log.mask if log.mask is not None else torch.ones(batch, horizon, dtype=torch.bool, device=states.device)
    if not bool(mask.any()):
        raise ValueError("the log holds no real step: its mask is False everywhere")
    before, after, actions = states[:, :-1][mask], states[:, 1:][mask], log.actions[mask]
    if real_reward is not None:
        rewards = real_reward(before, actions, after)
    elif recorded is not None:
        rewards = recorded[mask]
    else:
        raise ValueError("the log carries no rewards; pass real_reward(state, action, next_state)")
    if rewards.shape != before.shape[:1]:
        raise ValueError(f"real_reward gave {tuple(rewards.shape)}, expected [{len(before)}], one per transition")
    if terminal is not None:
        ended = terminal(after)
    elif isinstance(log, Rollout):
        last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
        ended = torch.cat([last[:, :-1], torch.zeros_like(mask[:, :1])], 1)[mask]
    else:
        ended = torch.zeros(len(before), dtype=torch.bool, device=states.device)
    row, step = mask.nonzero(as_tuple=True)
    kept, episode = torch.unique_consecutive(row, return_inverse=True)
    first = mask.int().argmax(1)
    data = Transitions(before, actions, rewards, after, ended, step - first[row], episode, states[kept, first[kept]])
    _check_finite(data)
    return data


def _check_finite(data: Transitions) -> None:
    for name in ("states", "next_states", "actions", "rewards"):
        wrong = ~torch.isfinite(getattr(data, name))
        if bool(wrong.any()):
            bad = int(wrong.reshape(len(wrong), -1).any(-1).nonzero()[0])
            words = f"{name.replace('_', ' ')} of the log are not finite (first at transition {bad})"
            raise ValueError(f"{words}; clean or mask the log")


def merge_transitions(parts: Sequence[Transitions]) -> Transitions:
    """All episodes of `parts`, renumbered in order. Raises `ValueError` when there are none or dimensions differ."""
    if not parts:
        raise ValueError("there are no transitions to merge")
    for part in parts[1:]:
        if part.states.shape[1:] != parts[0].states.shape[1:] or part.actions.shape[1:] != parts[0].actions.shape[1:]:
            raise ValueError(
                f"states [{part.states.shape[1]}] and actions [{part.actions.shape[1]}] of a rollout do not match "
                f"[{parts[0].states.shape[1]}] and [{parts[0].actions.shape[1]}] of the first"
            )
    offsets = torch.tensor([0] + [len(part.initial_states) for part in parts]).cumsum(0)

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    episode = torch.cat([part.episode + int(offset) for part, offset in zip(parts, offsets, strict=False)])
    names = ("states", "actions", "rewards", "next_states", "ended", "step")
    return Transitions(
        **{name: joined(name) for name in names}, episode=episode, initial_states=joined("initial_states")
    )


def groups_of(data: Transitions, groups: int) -> tuple[Tensor, Tensor]:
    """Groups that are left out in turn: transition `[N]` and first state `[E]` -> group, int64, below `groups`.

    Episodes are dealt out one by one, so that every group holds all policies that acted. A single episode is cut into
    blocks of time instead, and its first state belongs to none of them (-1).
    """
    episodes, count, device = len(data.initial_states), len(data.rewards), data.rewards.device
    if episodes > 1:
        dealt = torch.arange(episodes, device=device) % min(groups, episodes)
        return dealt[data.episode], dealt
    wanted = max(1, min(groups, count))
    return torch.arange(count, device=device) * wanted // max(count, 1), torch.full((episodes,), -1, device=device)
