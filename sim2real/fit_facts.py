"""What a finished fit knows about its parameters: intervals, correlation, what the data fix and what they do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sim2real.gauss_newton import MANY, global_jacobian, row_weight
from sim2real.identifiability import describe, identifiability, parameter_range
from sim2real.intervals import BLOCK_SECONDS, WINDOWS_PER_BLOCK, Linearization, correlation, jackknife, soft_l1_weights
from sim2real.misfit import Misfit, Rolled
from sim2real.solvers.least_squares import Minimum
from sim2real.unknowns import Unknowns


@dataclass(frozen=True)
class ParameterRow:
    """One line of the table; `low`, `high`: 90 % interval within bounds (NaN where neither data nor prior fix it)."""

    name: str
    value: float
    unit: str
    low: float
    high: float
    prior: tuple[float, float] | None
    at_bound: bool
    reaches_output: bool
    identified: bool
    initial: float


@dataclass(frozen=True)
class FitFacts:
    """See the fields of the same names in `FitResult`."""

    rows: tuple[ParameterRow, ...]
    covariance: Tensor
    correlation: Tensor
    spectrum: Tensor
    fixed: Tensor
    directions: tuple[dict[str, float], ...]
    notes: tuple[str, ...]


def fit_facts(misfit: Misfit, found: Minimum, silent: Tensor, *, block: float = BLOCK_SECONDS) -> FitFacts:
    """Intervals, correlation and identifiability at the optimum `found` of `misfit`.

    silent `[P]` bool: entries of theta known not to reach the output. block: see `FitSettings`.
    """
    unknowns = misfit.unknowns
    P = len(found.x)
    if unknowns.count > MANY:
        unknown = found.x.new_full((P,), torch.nan)
        note = f"{unknowns.count} entries of theta: intervals and spectrum are computed for at most {MANY}"
        rows = _rows(unknowns, found, unknown, silent, torch.zeros(P, dtype=torch.bool))
        square = found.x.new_full((P, P), torch.nan)
        spectrum = unknown[: unknowns.count]
        return FitFacts(rows, square, square, spectrum, torch.ones_like(spectrum, dtype=torch.bool), (), (note,))
    windows = _linearization(misfit, found)
    precision, nuisance = unknowns.std.pow(-2), torch.arange(P) >= unknowns.count
    seconds = max(block, WINDOWS_PER_BLOCK * windows.horizon)
    intervals = jackknife(windows, prior_precision=precision, held=found.held, block_seconds=seconds)
    facts = identifiability(
        windows,
        unknowns.names,
        parameter_range(found.x, unknowns.low, unknowns.high, unknowns.std),
        nuisance=nuisance,
        prior_precision=precision,
        block_seconds=seconds,
    )
    reaches = windows.jacobian.abs().flatten(0, 1).amax(0) > 0
    identified = reaches & ~intervals.open
    identified[: unknowns.count] &= facts.identified
    rows = _rows(unknowns, found, intervals.half_width, ~reaches, identified)
    return FitFacts(
        rows,
        intervals.covariance,
        correlation(intervals.covariance),
        facts.spectrum,
        facts.fixed,
        facts.directions,
        (*intervals.notes, *_notes(rows, facts.directions)),
    )


def _linearization(misfit: Misfit, found: Minimum) -> Linearization:
    rolled: Rolled = found.work
    weight, windows = row_weight(misfit), misfit.windows
    return Linearization(
        jacobian=global_jacobian(misfit, found.model.work),
        residual=weight * rolled.residual.flatten(1),
        weights=soft_l1_weights(rolled.residual.flatten(1), misfit.scale),
        run=windows.episode,
        start=windows.first_time,
        horizon=windows.steps * misfit.log.dt,
    )


def _rows(
    unknowns: Unknowns, found: Minimum, half_width: Tensor, silent: Tensor, identified: Tensor
) -> tuple[ParameterRow, ...]:
    at_bound = (found.x <= unknowns.low) | (found.x >= unknowns.high)
    half_width = torch.where(half_width.isfinite(), half_width, torch.nan)
    at: Callable[[Tensor, int], float] = lambda tensor, index: float(tensor[index])
    return tuple(
        ParameterRow(
            name=name,
            value=at(found.x, k),
            unit=unit,
            low=at(torch.maximum(found.x - half_width, unknowns.low), k),
            high=at(torch.minimum(found.x + half_width, unknowns.high), k),
            prior=(at(unknowns.mean, k), at(unknowns.std, k)) if bool(unknowns.std[k].isfinite()) else None,
            at_bound=bool(at_bound[k]),
            reaches_output=not bool(silent[k]),
            identified=bool(identified[k]),
            initial=at(unknowns.start, k),
        )
        for k, (name, unit) in enumerate(zip(unknowns.names, unknowns.units, strict=True))
    )


def _notes(rows: tuple[ParameterRow, ...], directions: tuple[dict[str, float], ...]) -> list[str]:
    notes = [f"'{row.name}' ended on its bound {row.value:.6g} {row.unit}" for row in rows if row.at_bound]
    notes += [f"'{row.name}' does not reach the compared signals" for row in rows if not row.reaches_output]
    return notes + [f"the data do not fix the direction {describe(direction)}" for direction in directions]
