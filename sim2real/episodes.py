"""Choosing and joining the episodes of logs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from sim2real.rollout_log import RolloutLog


def select_episodes(log: RolloutLog, episodes: Sequence[str | int]) -> RolloutLog:
    """The chosen episodes, by name or index, in the order given, without steps that none of them has.

    Raises `ValueError` for a name or index the log does not have, or an empty choice.
    """
    names = log.names["episode"]
    indices = []
    for episode in episodes:
        index = names.index(episode) if isinstance(episode, str) and episode in names else episode
        if isinstance(index, str) or not -len(names) <= index < len(names):
            raise ValueError(f"'{log.source}' has no episode {episode!r}; it has {list(names)}")
        indices.append(index % len(names))
    if not indices:
        raise ValueError(f"no episode chosen; '{log.source}' has {list(names)}")
    mask = log.mask[indices]
    steps = max(int(mask.any(0).nonzero().max()) + 1, 1) if bool(mask.any()) else 1

    def cut(values: Tensor | None, rows: int) -> Tensor | None:
        return None if values is None else values[indices, :rows]

    return replace(
        log,
        signals=log.signals[indices, : steps + 1],
        actions=log.actions[indices, :steps],
        exogenous=cut(log.exogenous, steps),
        mask=mask[:, :steps],
        names=log.names | {"episode": tuple(names[index] for index in indices)},
        recorded_actions=tuple(log.recorded_actions[index] for index in indices) if log.recorded_actions else (),
        rewards=cut(log.rewards, steps),
    )


def concatenate_logs(logs: Sequence[RolloutLog]) -> RolloutLog:
    """One log with the episodes of all; shorter ones hold their last value, masked.

    Raises `ValueError` when period, signals, actions, exogenous inputs, units or hold differ.
    """
    if not logs:
        raise ValueError("concatenate_logs needs at least one log")
    first = logs[0]
    for log in logs[1:]:
        for what, here, there in _shared(first, log):
            if here != there:
                raise ValueError(f"'{first.source}' and '{log.source}' differ in {what}: {here} and {there}")
    steps = max(log.mask.shape[1] for log in logs)

    def batch(tensors: Sequence[Tensor | None], rows: int) -> Tensor:
        return torch.cat([_held(tensor, rows) for tensor in tensors if tensor is not None])

    return replace(
        first,
        signals=batch([log.signals for log in logs], steps + 1),
        actions=batch([log.actions for log in logs], steps),
        exogenous=None if first.exogenous is None else batch([log.exogenous for log in logs], steps),
        mask=torch.cat([pad(log.mask, (0, steps - log.mask.shape[1])) for log in logs]),
        names=first.names | {"episode": distinct_names([name for log in logs for name in log.names["episode"]])},
        source=", ".join(dict.fromkeys(log.source for log in logs)),
        recorded_actions=tuple(pair for log in logs for pair in log.recorded_actions),
        notes=tuple(note for log in logs for note in log.notes),
        rewards=None if first.rewards is None else torch.cat([_zeros_after(log, steps) for log in logs]),
    )


def _shared(first: RolloutLog, other: RolloutLog) -> list[tuple[str, object, object]]:
    """What two logs must have in common, as (name, of the first, of the other)."""
    return [
        ("dt", first.dt, other.dt),
        ("hold", first.hold, other.hold),
        *((kind, first.names.get(kind, ()), other.names.get(kind, ())) for kind in ("signal", "action", "exogenous")),
        ("units", first.units, other.units),
        ("dtype", first.signals.dtype, other.signals.dtype),
        ("having rewards", first.rewards is not None, other.rewards is not None),
        ("having recorded inputs", bool(first.recorded_actions), bool(other.recorded_actions)),
    ]


def _held(tensor: Tensor, rows: int) -> Tensor:
    """`[B, R, ...]` extended to `rows` by its last value."""
    return torch.cat([tensor, tensor[:, -1:].expand(-1, rows - tensor.shape[1], *tensor.shape[2:])], dim=1)


def _zeros_after(log: RolloutLog, steps: int) -> Tensor:
    rewards = log.rewards if log.rewards is not None else torch.zeros_like(log.mask, dtype=log.signals.dtype)
    return pad(rewards, (0, steps - rewards.shape[1]))


def distinct_names(names: Sequence[str]) -> tuple[str, ...]:
    """Names of episodes, made distinct by a counter where files of different folders share one."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return tuple(result)
