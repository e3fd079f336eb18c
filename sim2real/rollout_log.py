"""The `RolloutLog`: measured signals of B episodes on one uniform grid, with their provenance."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class RolloutLog:
    """B episodes on one grid of period `dt` (s), batch first, float64; shorter ones hold their last value, masked."""

    signals: Tensor
    """`[B, T+1, p]`"""
    actions: Tensor
    """`[B, T, m]`: the mean input over step t (hold="linear") or the input held over it (hold="previous")"""
    exogenous: Tensor | None
    """`[B, T, k]` weather, demand, ...: held over step t"""
    mask: Tensor
    """`[B, T]` True where both ends of step t were recorded"""
    dt: float
    names: dict[str, tuple[str, ...]]
    """keys "signal", "action", "exogenous", "episode" """
    units: dict[str, str]
    source: str
    recorded_actions: tuple[tuple[Tensor, Tensor], ...] = ()
    """per episode, as recorded: time `[R]` in s from the first grid sample, inputs `[R, m]`; a delay can be fitted"""
    hold: Literal["linear", "previous"] = "previous"
    notes: tuple[str, ...] = ()
    """what loading noticed: jitter, gaps, duplicates, each with file and row"""
    rewards: Tensor | None = field(default=None)
    """`[B, T]` when the file carried a reward column; otherwise rewards are computed"""
