"""Windows: short pieces of a log, each with a start state, its inputs and the samples that are scored.

A window that starts at row i uses rows i..i+r-1 for its start state (r = 1: the measured state of row i; r > 1: the
state at row i that explains r rows, see `sim2real.roll`) and scores rows i+r..i+r+N-1, N = round(horizon / dt).
Starts lie at `first_row`, then every round(stride / dt) rows, as long as the last row stays `margin` rows before the
end of the run and every step of the window was recorded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sim2real.mdp import ModelMDP
from sim2real.rollout_log import RolloutLog

# Tolerance of comparisons between times and multiples of dt, in rows.
_ROW_ROUNDING = 1e-6


class WindowError(ValueError):
    """A log and a model do not fit together, or no window fits the settings."""


@dataclass(frozen=True)
class Channels:
    """Which column of a log each state, input and compared signal of a model is."""

    signals: tuple[str, ...]
    """the q compared signals"""
    unit: str
    observed: Tensor
    """`[q]` their columns in what the model observes"""
    logged: Tensor
    """`[q]` their columns in the log"""
    anchor: Tensor
    """`[n]` column of the log that starts each state (with a warm-up: pulls it)"""
    own: Tensor
    """`[n, q]` 1 where the state is that compared signal itself: a sensor zero shifts its start"""
    rates: Tensor
    """indices of the states that are measured rates of others ("/s")"""
    actions: Tensor
    exogenous: Tensor


@dataclass(frozen=True)
class WindowChoice:
    """Which windows; the fields are those of `FitSettings`. Raises `WindowError` for values that make no sense."""

    horizon: float
    stride: float
    first_row: int = 10
    margin: int = 10
    start_after: float = 0.0
    end_before: float = float("inf")
    keep: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    warmup: float = 0.0

    def __post_init__(self) -> None:
        inf = float("inf")
        for name, wanted, holds in (
            ("horizon", "> 0 and finite", 0 < self.horizon < inf),
            ("stride", "> 0 and finite", 0 < self.stride < inf),
            ("first_row", ">= 0", self.first_row >= 0),
            ("margin", ">= 0", self.margin >= 0),
            ("start_after", "finite", -inf < self.start_after < inf),
            ("end_before", "> 0", self.end_before > 0),
            ("warmup", ">= 0 and finite", 0 <= self.warmup < inf),
        ):
            if not holds:
                raise WindowError(f"{name} must be {wanted}, got {getattr(self, name)}")
        for name, bounds in self.keep.items():
            if not (is_pair(bounds) and bounds[0] < bounds[1]):
                raise WindowError(f"keep needs (low, high) with low < high for '{name}', got {bounds!r}")


@dataclass(frozen=True)
class Windows:
    """W windows of T steps on one log, with R scored rows each; all but the actions, which depend on the delay."""

    episode: Tensor
    """`[W]`"""
    start: Tensor
    """`[W]` row of the start state"""
    warm: int
    """rows that determine the start state: 1, or more with a warm-up"""
    steps: int
    """T"""
    rows: Tensor
    """`[R]` scored rows, relative to `start`"""
    anchor: Tensor
    """`[W, n]` measured start (or what a warmed-up start is pulled to)"""
    warm_signals: Tensor
    """`[W, warm, q]` the compared signals on the rows of the start"""
    measured: Tensor
    """`[W, R, q]` the compared signals on the scored rows"""
    noise: Tensor
    """`[T, W, k]` what the model's step takes as e: zeros for the random columns, then the measured inputs"""
    first_time: Tensor
    """`[W]` s, time of the start row in its run"""


def match_channels(mdp: ModelMDP, log: RolloutLog, signals: Sequence[str] = (), *, warmup: bool = False) -> Channels:
    """Match a model with a log by name; `signals`: those to compare, by default all that are not rates of others.

    A state takes its start from the signal of its name; with `warmup`, one that is not measured is pulled to the first
    signal of its unit. Raises `WindowError` naming what is missing.
    """
    states = mdp.names.get("state", ())
    observed = mdp.names.get("signal", states)
    if not states:
        raise WindowError('the model names no states: give it names={"state": (...), "action": (...), ...}')
    logged = log.names["signal"]
    if abs(log.dt / mdp.dt - 1) > 1e-6:
        raise WindowError(f"the log steps at {log.dt:.6g} s, the model at {mdp.dt:.6g} s; load it with dt={mdp.dt:.6g}")
    common = tuple(name for name in observed if name in logged)
    compared = tuple(signals) or tuple(name for name in common if not _is_rate(name, common, mdp.units))
    for name in compared:
        if name not in common:
            raise WindowError(f"signal '{name}' must be in the model ({list(observed)}) and the log ({list(logged)})")
    if not compared:
        raise WindowError(f"no signal is in both the model ({list(observed)}) and the log ({list(logged)})")
    _check_units(mdp, log, compared)
    return Channels(
        signals=compared,
        unit=mdp.units.get(compared[0], ""),
        observed=torch.tensor([observed.index(name) for name in compared]),
        logged=torch.tensor([logged.index(name) for name in compared]),
        anchor=torch.tensor([_start_column(name, mdp, log, warmup) for name in states]),
        own=torch.tensor([[float(state == name) for name in compared] for state in states], dtype=torch.float64),
        rates=torch.tensor(
            [j for j, name in enumerate(states) if name not in compared and _is_rate(name, states, mdp.units)],
            dtype=torch.long,
        ),
        actions=_columns(mdp, log, "action"),
        exogenous=_columns(mdp, log, "exogenous"),
    )


def _is_rate(name: str, among: Sequence[str], units: Mapping[str, str]) -> bool:
    """Whether the unit of `name` is that of another one per second."""
    return any(units.get(name) == f"{units.get(other, '?')}/s" for other in among if other != name)


def _check_units(mdp: ModelMDP, log: RolloutLog, names: Sequence[str]) -> None:
    for name in names:
        model, logged = mdp.units.get(name, ""), log.units.get(name, "")
        if model and logged and model != logged:
            raise WindowError(
                f"'{name}' is in {logged} in the log and in {model} in the model; convert it in the schema"
            )


def _start_column(name: str, mdp: ModelMDP, log: RolloutLog, warmup: bool) -> int:
    logged = log.names["signal"]
    if name in logged:
        return logged.index(name)
    unit = mdp.units.get(name, "")
    alike = [index for index, other in enumerate(logged) if unit and log.units.get(other) == unit]
    if warmup and alike:
        return alike[0]
    hint = "set a warmup" if alike or not unit else f"add it to the schema (a rate: {name}: {{derivative_of: ...}})"
    raise WindowError(f"state '{name}' is not among the signals of the log ({list(logged)}); {hint}")


def _columns(mdp: ModelMDP, log: RolloutLog, kind: str) -> Tensor:
    wanted, present = mdp.names.get(kind, ()), log.names.get(kind, ())
    missing = [name for name in wanted if name not in present]
    if missing:
        raise WindowError(f"the model needs the {kind} {missing}; the log has {list(present)}")
    _check_units(mdp, log, wanted)
    return torch.tensor([present.index(name) for name in wanted], dtype=torch.long)


def is_pair(value: Any) -> bool:
    """Whether `value` is two numbers, neither of them NaN."""
    numbers = isinstance(value, tuple | list) and all(isinstance(item, float | int) for item in value)
    return numbers and len(value) == 2 and all(item == item for item in value)


def steps_of(seconds: float, dt: float, what: str) -> int:
    """`round(seconds / dt)`, at least 1; raises `WindowError` below that."""
    steps = round(seconds / dt)
    if steps < 1:
        raise WindowError(f"{what} = {seconds:.6g} s is shorter than one step of {dt:.6g} s")
    return steps


def cut_windows(
    mdp: ModelMDP, log: RolloutLog, channels: Channels, choice: WindowChoice, *, sample_every: int = 1
) -> Windows:
    """Cut the log into windows; the last scored row and every `sample_every`-th before it are kept.

    Raises `WindowError` when no window fits.
    """
    if sample_every < 1:
        raise WindowError(f"sample_every must be at least 1, got {sample_every}")
    count = steps_of(choice.horizon, log.dt, "horizon")
    warm = steps_of(choice.warmup, log.dt, "warmup") if choice.warmup > 0 else 1
    steps = warm + count - 1
    episode, start = _starts(log, channels, choice, steps)
    if not len(start):
        runs = [int(row.sum()) for row in log.mask]
        raise WindowError(
            f"no window of {steps} steps ({steps * log.dt:.6g} s) fits: the runs have {runs} recorded steps, "
            f"first_row = {choice.first_row}, margin = {choice.margin}, start_after = {choice.start_after} s, "
            f"end_before = {choice.end_before} s, keep = {dict(choice.keep)}"
        )
    rows = torch.arange(warm + count - 1, warm - 1, -sample_every).flip(0)
    at = lambda offsets: (episode.unsqueeze(1), start.unsqueeze(1) + offsets)
    compared = log.signals[..., channels.logged]
    noise = log.signals.new_zeros(steps, len(start), mdp.noise_dims[1] - mdp.exogenous_dim)
    if mdp.exogenous_dim and log.exogenous is not None:
        inputs = log.exogenous[..., channels.exogenous][at(torch.arange(steps))]
        noise = torch.cat([noise, inputs.transpose(0, 1)], -1)
    return Windows(
        episode=episode,
        start=start,
        warm=warm,
        steps=steps,
        rows=rows,
        anchor=log.signals[episode, start][:, channels.anchor],
        warm_signals=compared[at(torch.arange(warm))],
        measured=compared[at(rows)],
        noise=noise.contiguous(),
        first_time=start * log.dt,
    )


def _starts(log: RolloutLog, channels: Channels, choice: WindowChoice, steps: int) -> tuple[Tensor, Tensor]:
    """Episode and start row of every window, run by run."""
    stride = steps_of(choice.stride, log.dt, "stride")
    inside = _inside(log, choice.keep)
    episodes, starts = [], []
    for run in range(len(log.mask)):
        recorded = log.mask[run].nonzero().flatten()
        last = int(recorded[-1]) + 1 if len(recorded) else 0
        end = max(choice.first_row, last - choice.margin - steps + 1)
        rows = torch.arange(choice.first_row, end, stride)
        rows = rows[rows * log.dt >= choice.start_after - _ROW_ROUNDING * log.dt]
        rows = rows[(rows + steps) * log.dt <= choice.end_before + _ROW_ROUNDING * log.dt]
        good = _all_of(log.mask[run], rows, steps) & _all_of(inside[run], rows, steps + 1)
        episodes.append(torch.full_like(rows[good], run))
        starts.append(rows[good])
    return torch.cat(episodes), torch.cat(starts)


def _inside(log: RolloutLog, keep: Mapping[str, tuple[float, float]]) -> Tensor:
    """`[B, T+1]` whether every signal of `keep` is strictly inside its range, angles wrapped to (-pi, pi]."""
    inside = torch.ones(log.signals.shape[:2], dtype=torch.bool)
    for name, (low, high) in keep.items():
        if name not in log.names["signal"]:
            raise WindowError(f"keep names '{name}'; the log has the signals {list(log.names['signal'])}")
        values = log.signals[..., log.names["signal"].index(name)]
        if log.units.get(name) == "rad":
            values = torch.pi - torch.remainder(torch.pi - values, 2 * torch.pi)
        inside &= (values > low) & (values < high)
    return inside


def _all_of(flags: Tensor, first: Tensor, count: int) -> Tensor:
    """Whether `flags[i : i + count]` are all true, for each i of `first`."""
    total = torch.cat([torch.zeros(1, dtype=torch.long), flags.long().cumsum(0)])
    return total[first + count] - total[first] == count


def subset(windows: Windows, chosen: Tensor) -> Windows:
    """The windows at the indices (or where the booleans) `chosen [W]`."""
    per_window = ("episode", "start", "anchor", "warm_signals", "measured", "first_time")
    picked = {name: getattr(windows, name)[chosen] for name in per_window}
    return Windows(warm=windows.warm, steps=windows.steps, rows=windows.rows, noise=windows.noise[:, chosen], **picked)


def window_actions(windows: Windows, actions: Tensor) -> Tensor:
    """`[T, W, m]` of the actions `[B, steps, m]` of every run."""
    rows = windows.start + torch.arange(windows.steps).unsqueeze(1)
    return actions[windows.episode.expand_as(rows), rows]
