"""Logs of any controller, turned into logs of the upper level: which input of *our* lower level explains each segment?

An episode is cut into segments of T steps. For each, `explain` finds the input u under which the lower level would have
led where the log says the system went (`solvers.invert`, a closed form, or index sums of flows):

    u_k = argmin_u |y_k - g(theta, rows_k, u)|^2,     r_k = sum_{t<T} discount^t r_{kT+t},     (s_k, u_k, r_k, s_{k+1})

Neither who acted nor which inputs were given needs to be known. Segments whose u is a set (`saturated`), whose residual
is large (converged or not; a small one is an answer without the solver's flag), whose u lies outside the bounds of the
upper level, or that the log does not hold entirely are masked and counted by cause: nothing is filled in.
Reference: Schmidt et al., Offline hierarchical reinforcement learning via inverse optimization, 2024, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sim2real.rollout_log import RolloutLog
from sim2real.solvers.inversion_problem import Inversion


@dataclass(frozen=True)
class Segments:
    """N stretches of T steps."""

    signals: Tensor
    """`[N, T + 1, p]`"""
    actions: Tensor
    """`[N, T, m]`, as logged"""
    exogenous: Tensor | None
    """`[N, T, k]`"""


@dataclass(frozen=True)
class HighLevelLog:
    """The log of the upper level and what became of the segments; K segments in each of E episodes."""

    log: RolloutLog
    """signals where segments begin and end `[E, K + 1, p]`, actions u `[E, K, q]` (0 where masked), rewards `[E, K]`"""
    residual: Tensor
    """`[E, K]`, NaN where the log lacks steps"""
    rank: Tensor
    """`[E, K]`"""
    counts: dict[str, int]
    """segments: "kept", and the others by the first cause that applies: "incomplete", "saturated", "unconverged",
    "residual", "bounds" """


def high_level_log(
    log: RolloutLog,
    explain: Callable[[Segments], Inversion],
    horizon: int,
    inputs: tuple[str, ...],
    *,
    units: dict[str, str] | None = None,
    discount: float = 1.0,
    residual: float = 1e-6,
    low: Tensor | float = -math.inf,
    high: Tensor | float = math.inf,
) -> HighLevelLog:
    """Cut the episodes into segments of `horizon` steps and explain each; steps left over at the end are not used.

    `explain(segments)` gives an `Inversion` with a row for each segment; `inputs` names the columns of u, `units` their
    units. `residual`: largest one that is kept, in units of the outcome. low, high: numbers or `[q]`. The result's log
    is saved by `save_log` and read by `load_log` like any other; its period is `horizon * dt`.
    Raises `ValueError` for a log without rewards or shorter than a segment, and an inversion that does not fit.
    """
    episodes, steps = log.mask.shape
    count = steps // horizon if horizon >= 1 else 0
    if not count:
        raise ValueError(f"horizon must lie between 1 and the {steps} steps of '{log.source}', got {horizon}")
    if log.rewards is None:
        raise ValueError(f"'{log.source}' holds no rewards; put them into the log: replace(log, rewards=[E, T])")
    used = count * horizon
    cut = lambda x: x[:, :used].reshape(episodes, count, horizon, *x.shape[2:])
    whole = cut(log.mask).all(-1)
    signals = torch.cat([cut(log.signals), log.signals[:, horizon : used + 1 : horizon].unsqueeze(2)], 2)
    exogenous = None if log.exogenous is None else cut(log.exogenous)[whole]
    found = explain(Segments(signals[whole], cut(log.actions)[whole], exogenous))
    if found.u.shape != (int(whole.sum()), len(inputs)):
        wanted = (int(whole.sum()), len(inputs))
        raise ValueError(
            f"explain gave u of shape {tuple(found.u.shape)}, expected {wanted}: {inputs} for each segment"
        )
    kept, counts = _judged(found, residual, low, high)
    every = lambda x, filler: x.new_full((episodes, count, *x.shape[1:]), filler).masked_scatter(_wide(whole, x), x)
    mask = every(kept, False)
    weights = discount ** torch.arange(horizon, dtype=log.rewards.dtype, device=log.rewards.device)
    upper = RolloutLog(
        signals=log.signals[:, : used + 1 : horizon],
        actions=every(torch.where(kept.unsqueeze(-1), found.u.detach(), 0.0), 0.0),
        exogenous=None,
        mask=mask,
        dt=log.dt * horizon,
        names={key: value for key, value in log.names.items() if key != "exogenous"} | {"action": inputs},
        units={name: log.units.get(name, "1") for name in log.names["signal"]} | (units or {}),
        source=f"{log.source}, inverted over {horizon} steps",
        notes=(*log.notes, "segments: " + ", ".join(f"{value} {key}" for key, value in counts.items())),
        rewards=(cut(log.rewards) @ weights) * mask,
    )
    incomplete = {"incomplete": int((~whole).sum())}
    return HighLevelLog(upper, every(found.residual, math.nan), every(found.rank, 0), counts | incomplete)


def high_level_transitions(
    log: RolloutLog,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """s `[N, p]`, u `[N, q]`, r `[N]`, s' `[N, p]` of all segments that are kept, in the order of the log."""
    if log.rewards is None:
        raise ValueError(f"'{log.source}' holds no rewards")
    keep = log.mask
    return log.signals[:, :-1][keep], log.actions[keep], log.rewards[keep], log.signals[:, 1:][keep]


def _judged(
    found: Inversion, residual: float, low: Tensor | float, high: Tensor | float
) -> tuple[Tensor, dict[str, int]]:
    """Which rows to keep, and how many fall to each cause, the first that applies."""
    inside = ((found.u >= low) & (found.u <= high)).all(-1)
    causes = {
        "saturated": found.saturated,
        "unconverged": ~found.converged & (found.residual > residual),
        "residual": ~(found.residual <= residual),
        "bounds": ~inside,
    }
    kept, counts = torch.ones_like(found.saturated), dict[str, int]()
    for name, broken in causes.items():
        counts[name] = int((kept & broken).sum())
        kept = kept & ~broken
    return kept, {"kept": int(kept.sum())} | counts


def _wide(mask: Tensor, values: Tensor) -> Tensor:
    return mask.reshape(*mask.shape, *[1] * (values.ndim - 1)).expand(*mask.shape, *values.shape[1:])
