"""The search behind `sim2real.fit`: a rough fit on few windows, the input delay by a scan, then all windows.

1. Rough: about 100 windows, reweighted squares, which is steady from far away and cheap.
2. Scan: with recorded inputs the misfit has a local minimum in the delay every sample or so. Candidates a quarter of
   a step apart (at most 64) whose misfit, the other parameters held, is below twice the least, are refined by a few
   steps each with the delay held; the best goes on.
3. Full: all windows, w^2 in the Hessian: nearly as fast as the exact w^3 and, where friction sticks and the misfit is
   rough, several times fewer refused steps (double pendulum, 636 windows: 4 steps against more than 20).

A snapshot is that of the running `levenberg_marquardt` plus the number of the stage, the best x so far with its
misfit, the candidates and the steps of the stages before; everything else is recomputed from them, so a resumed search
ends bitwise equal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sim2real.gauss_newton import MANY, jacobian_products, objective
from sim2real.misfit import Misfit, Rolled, linearize, roll_windows, start_error_growth
from sim2real.params import Params
from sim2real.solvers.least_squares import Minimum, levenberg_marquardt
from sim2real.windows import subset

ROUGH_WINDOWS = 100
_ROUGH_TOLERANCE = 1e-3
_SCAN_STEPS = 3
_CANDIDATES = 64
# Parameters are moved by this share of their box (or value) to see whether a zero derivative means no effect.
_NUDGE = 1e-2
# A fitted system may be chaotic over a window, but not like this.
_WILD = 1e4


@dataclass(frozen=True)
class Search:
    """What the stages have found so far."""

    stage: int
    """0: rough fit; 1..K: candidates of the delay; K + 1: full fit"""
    best: Tensor
    """x `[P]`"""
    value: Tensor
    """misfit of `best` on the rough windows"""
    candidates: Tensor
    """`[K]` delays to refine, s"""
    history: Tensor
    """`[S, 5]` steps of the stages before: those of `Minimum.history`, and 0: rough, 1: scan, 2: full"""


def search(
    misfit: Misfit,
    *,
    max_steps: int,
    tolerance: float,
    on_step: Callable[[Params], None] | None,
    state: Params | None,
) -> Minimum:
    """Minimise the misfit from the start values of its unknowns; see the module for the stages and snapshots.

    `history` of the result is that of `Search`, of all stages; `report.steps` counts them all.
    Raises `ValueError` when the model diverges at the start values, or for a snapshot of another fit.
    """
    unknowns, rough = misfit.unknowns, rough_windows(misfit)
    inner: Params | None = None
    if state is None:
        x = unknowns.start
        now = Search(0, x, torch.full_like(x.sum(), torch.inf), x.new_zeros(0), x.new_zeros(0, 5))
    else:
        now, inner = _unpack(state, unknowns.start)
    while now.stage <= len(now.candidates):
        found = _rough_stage(rough, now, max_steps, _reporter(on_step, now), inner)
        now, inner = _next(rough, now, found), None
    found = levenberg_marquardt(
        objective(misfit, power=2),
        now.best,
        low=unknowns.low,
        high=unknowns.high,
        max_steps=max_steps,
        tolerance=tolerance,
        on_step=_reporter(on_step, now),
        state=inner,
    )
    history = torch.cat([now.history, _steps(found, 2)])
    return replace(found, history=history, report=replace(found.report, steps=len(history)))


def _steps(found: Minimum, kind: int) -> Tensor:
    return torch.cat([found.history, torch.full_like(found.history[:, :1], kind)], 1)


def rough_windows(misfit: Misfit) -> Misfit:
    """About `ROUGH_WINDOWS` of the windows, evenly spread."""
    count = len(misfit.windows.episode)
    stride = max(1, count // ROUGH_WINDOWS)
    return replace(misfit, windows=subset(misfit.windows, torch.arange(0, count, stride)))


def _rough_stage(
    rough: Misfit, now: Search, max_steps: int, on_step: Callable[[Params], None] | None, inner: Params | None
) -> Minimum:
    low, high, start = rough.unknowns.low.clone(), rough.unknowns.high.clone(), now.best.clone()
    if now.stage > 0:
        held = now.candidates[now.stage - 1]
        for bound in (low, high, start):
            bound[rough.unknowns.count] = held
    return levenberg_marquardt(
        objective(rough, power=1),
        start,
        low=low,
        high=high,
        max_steps=max_steps if now.stage == 0 else _SCAN_STEPS,
        tolerance=_ROUGH_TOLERANCE,
        on_step=on_step,
        state=inner,
    )


def _next(rough: Misfit, now: Search, found: Minimum) -> Search:
    """The state of the search after a rough stage."""
    better = bool(found.value < now.value)
    best, value = (found.x, found.value) if better else (now.best, now.value)
    history = torch.cat([now.history, _steps(found, min(now.stage, 1))])
    candidates = _candidates(rough, best) if now.stage == 0 and rough.unknowns.delay else now.candidates
    return Search(now.stage + 1, best, value, candidates, history)


def _candidates(rough: Misfit, x: Tensor) -> Tensor:
    """Delays worth refining: with the other parameters held, the misfit is below twice that of the best."""
    column = rough.unknowns.count
    low, high = float(rough.unknowns.low[column]), float(rough.unknowns.high[column])
    count = min(_CANDIDATES, 1 + max(1, round(4 * (high - low) / rough.log.dt)))
    grid = torch.linspace(low, high, count, dtype=x.dtype)
    misfit = objective(rough).value
    values = torch.stack([misfit(x.index_fill(0, torch.tensor(column), float(delay)))[0] for delay in grid])
    return grid[values < 2 * values.nan_to_num(torch.inf).min()]


def _reporter(on_step: Callable[[Params], None] | None, now: Search) -> Callable[[Params], None] | None:
    if on_step is None:
        return None
    outer = {
        "search.stage": torch.tensor(now.stage),
        "search.best": now.best,
        "search.value": now.value,
        "search.candidates": now.candidates,
        "search.history": now.history,
    }
    return lambda inner: on_step(inner | {key: value.clone() for key, value in outer.items()})


def _unpack(state: Params, start: Tensor) -> tuple[Search, Params]:
    keys = ("stage", "best", "value", "candidates", "history")
    missing = [f"search.{key}" for key in keys if f"search.{key}" not in state]
    if missing or state["search.best"].shape != start.shape:
        raise ValueError(f"the snapshot is not one of this fit: it lacks {missing} or has another number of unknowns")
    now = Search(int(state["search.stage"]), *(state[f"search.{key}"] for key in keys[1:]))
    return now, {key: value for key, value in state.items() if not key.startswith("search.")}


def without_effect(misfit: Misfit) -> Tensor:
    """`[P]` bool: entries of theta that do not reach the compared signals, before anything is fitted.

    Their derivative is exactly zero on all windows, and moving them by 1 % of their box changes nothing either.
    """
    unknowns, x = misfit.unknowns, misfit.unknowns.start
    silent = torch.zeros(len(x), dtype=torch.bool)
    for part in (rough_windows(misfit), misfit):
        rolled = roll_windows(part, x)
        silent[: unknowns.count] = _effect(part, rolled) == 0
        for column in silent.nonzero().flatten().tolist():
            nudged = x.clone()
            width = float(unknowns.high[column] - unknowns.low[column])
            nudge = _NUDGE * (width if width < float("inf") else 1 + abs(float(x[column])))
            nudged[column] += nudge if x[column] + nudge <= unknowns.high[column] else -nudge
            silent[column] = torch.equal(roll_windows(part, nudged).residual, rolled.residual)
        if not bool(silent.any()):
            break
    return silent


def _effect(misfit: Misfit, rolled: Rolled) -> Tensor:
    """Zero exactly where the derivative with respect to an entry of theta is, `[d]`."""
    count = misfit.unknowns.count
    if count <= MANY:
        return linearize(misfit, rolled).jacobian.abs().flatten(0, 2).amax(0)[:count]
    # J'u of random u is zero where the column of J is, and nowhere else
    u = torch.randn(rolled.residual.flatten(1).shape, generator=torch.Generator().manual_seed(0)).to(rolled.residual)
    return jacobian_products(misfit, rolled)[1](u)[:count]


def unstable_step(misfit: Misfit) -> tuple[str, ...]:
    """A note when the model's own step looks unstable at the start values: derivatives then tell nothing."""
    part = rough_windows(misfit)
    growth = start_error_growth(part, linearize(part, roll_windows(part, misfit.unknowns.start), ()))
    wild = int((growth > _WILD).sum())
    if not wild:
        return ()
    return (
        f"at the start values {wild} of {len(growth)} windows looked at grow a start error more than {_WILD:g} times: "
        f"if that is not the system's own nature, take more substeps of the model, a shorter horizon, or max_growth",
    )
