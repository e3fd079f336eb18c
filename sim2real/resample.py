"""From recorded rows to the uniform grid of a log::

    T_k = t_first + k h,  k = 0..K,  K = floor((t_last - t_first) / h + 1e-9).

Signals are interpolated linearly and never wrapped. An input is a function of time between its rows: linear, or held
("previous"); the action of step k is its mean over [T_k, T_{k+1}] (linear: (u_k + u_{k+1}) / 2). Velocities asked for
as derivatives are Savitzky-Golay filtered grid angles. Without resampling the rows themselves are the grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sim2real.clock import Clock, pick_column, read_clock, real_numbers
from sim2real.log_errors import LogError
from sim2real.log_schema import Column, LogSchema
from sim2real.log_units import conversion
from sim2real.raw_episode import RawEpisode

_MOST_STEPS = 10**8


@dataclass(frozen=True)
class GridEpisode:
    """One episode on the grid, float64: signals `[K+1, p]`, actions `[K, m]`, exogenous `[K, k]`, mask `[K]`."""

    name: str
    signals: np.ndarray
    actions: np.ndarray
    exogenous: np.ndarray
    mask: np.ndarray
    rewards: np.ndarray | None
    recorded_times: np.ndarray
    recorded_actions: np.ndarray
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Stream:
    """One recorded quantity in kept units: `values [R]` at `times [R]`, by the clock `clock`."""

    times: np.ndarray
    values: np.ndarray
    clock: Clock


def to_grid(raw: RawEpisode, clock: Clock, schema: LogSchema, h: float) -> GridEpisode:
    """Convert, check and interpolate one episode on the grid of period `h` (s)."""
    streams = {entry.name: _stream(raw, clock, entry, schema) for entry in schema.signals if entry.column}
    inputs = [_stream(raw, clock, entry, schema) for entry in schema.actions]
    measured = [_stream(raw, clock, entry, schema) for entry in schema.exogenous]
    grid = _grid(list(streams.values()), clock, schema, h, raw)
    signals = {name: np.interp(grid, stream.times, stream.values) for name, stream in streams.items()}
    for entry in schema.signals:
        if entry.derivative_of is not None:
            signals[entry.name] = _derivative(signals[entry.derivative_of], entry, h, raw)
    _check_alive([(entry, signals[entry.name]) for entry in schema.signals], raw)
    silent = [
        f"'{raw.file}': '{entry.name}' never changes (always {stream.values[0]:.6g})"
        for entry, stream in zip(schema.actions + schema.exogenous, inputs + measured, strict=True)
        if np.ptp(stream.values) == 0
    ]
    clocks = [clock, *(stream.clock for stream in [*streams.values(), *inputs, *measured] if stream.clock is not clock)]
    steps = len(grid) - 1
    recorded_times = inputs[0].times if inputs else clock.times
    return GridEpisode(
        name=raw.name,
        signals=_side_by_side([signals[entry.name] for entry in schema.signals], steps + 1),
        actions=_side_by_side([_step_means(stream, grid, schema.hold) for stream in inputs], steps),
        exogenous=_side_by_side([_step_means(stream, grid, schema.hold) for stream in measured], steps),
        mask=_mask(clocks, schema, grid),
        rewards=_rewards(raw, clock, schema, steps),
        recorded_times=recorded_times - grid[0],
        recorded_actions=_side_by_side([stream.values for stream in inputs], len(recorded_times)),
        notes=tuple(dict.fromkeys([*raw.notes, *(note for one in clocks for note in one.notes), *silent])),
    )


def _grid(signals: list[Stream], clock: Clock, schema: LogSchema, h: float, raw: RawEpisode) -> np.ndarray:
    """Times `[K+1]` where all signals are recorded: uniform, or the rows of the main clock when no `dt` is set."""
    first, last = max(stream.times[0] for stream in signals), min(stream.times[-1] for stream in signals)
    steps = int(np.floor((last - first) / h + 1e-9))
    if not 1 <= steps <= _MOST_STEPS:
        message = f"all signals together span {last - first:.6g} s, {steps} periods of {h:.6g} s"
        raise LogError(f"{message}; expected 1 to {_MOST_STEPS}", file=raw.file, row=raw.first_row)
    if schema.resample and schema.dt is not None:
        return np.asarray(first + h * np.arange(steps + 1))
    return clock.times[(clock.times >= first) & (clock.times <= last)]


def _side_by_side(values: list[np.ndarray], rows: int) -> np.ndarray:
    return np.stack(values, axis=1) if values else np.zeros((rows, 0))


def _stream(raw: RawEpisode, main: Clock, entry: Column, schema: LogSchema) -> Stream:
    clock = main
    if entry.time is not None and entry.time != schema.time:
        if not schema.resample:
            raise LogError(f"'{entry.name}' has its own clock '{entry.time}': set 'resample: true'", file=raw.file)
        clock = read_clock(raw, schema, entry.time)
    values = real_numbers(pick_column(raw, entry.column), entry.column, raw)
    is_signal = entry in schema.signals
    if len(values) != clock.rows and (is_signal or len(values) != clock.rows - 1):  # T inputs beside T + 1 observations
        message = f"'{entry.column}' has {len(values)} rows, its clock has {clock.rows}"
        raise LogError(message, file=raw.file, row=raw.first_row + min(len(values), clock.rows))
    keep = clock.keep[clock.keep < len(values)]
    values = values[keep]
    _check_range(values, entry, raw, keep)
    unit, factor, offset = conversion(entry.unit)
    values = values * factor + offset if (factor, offset) != (1.0, 0.0) else values
    values = _unwrapped(values, entry, raw, keep) if unit == "rad" and is_signal else values
    return Stream(clock.times[: len(keep)], values, clock)


def _check_range(values: np.ndarray, entry: Column, raw: RawEpisode, keep: np.ndarray) -> None:
    if entry.range is None:
        return
    low, high = entry.range
    if (outside := np.flatnonzero((values < low) | (values > high))).size:
        value = f"{values[outside[0]]:.6g} {entry.unit}"
        message = f"'{entry.column}' is {value}, outside its range [{low:g}, {high:g}]; is the unit right?"
        raise LogError(message, file=raw.file, row=raw.first_row + int(keep[outside[0]]))


def _unwrapped(values: np.ndarray, entry: Column, raw: RawEpisode, keep: np.ndarray) -> np.ndarray:
    """An angle `[R]` without jumps of 2 pi, or an error where the schema does not say what a jump means."""
    jumps = np.flatnonzero(np.abs(np.diff(values)) > np.pi)
    if entry.unwrap:
        return np.unwrap(values)
    if entry.unwrap is None and jumps.size:
        i = int(jumps[0])
        message = (
            f"the angle '{entry.name}' jumps from {values[i]:.4g} to {values[i + 1]:.4g} rad; set 'unwrap: true' if it "
            "wraps, 'unwrap: false' if the jump is real"
        )
        raise LogError(message, file=raw.file, row=raw.first_row + int(keep[i + 1]))
    return values


def _derivative(values: np.ndarray, entry: Column, h: float, raw: RawEpisode) -> np.ndarray:
    from scipy.signal import savgol_filter

    if len(values) < entry.window:
        message = f"'{entry.name}' is smoothed over {entry.window} grid samples, the episode has {len(values)}"
        raise LogError(message, file=raw.file)
    return np.asarray(savgol_filter(values, entry.window, entry.order, deriv=1, delta=h))


def _check_alive(signals: list[tuple[Column, np.ndarray]], raw: RawEpisode) -> None:
    for entry, values in signals:
        if not entry.allow_constant and np.ptp(values) == 0:
            message = f"signal '{entry.name}' never changes (always {values[0]:.6g}): a dead sensor?"
            raise LogError(f"{message} Set 'allow_constant: true' if not", file=raw.file, row=raw.first_row)


def _step_means(stream: Stream, grid: np.ndarray, hold: str) -> np.ndarray:
    """Mean input `[K]` over each grid step; before its first row an input holds that row, after its last one that."""
    times, values = stream.times, stream.values
    if hold == "linear":
        at_grid = np.interp(grid, times, values)
        return 0.5 * (at_grid[1:] + at_grid[:-1])
    first = np.maximum(np.searchsorted(times, grid[:-1], side="right") - 1, 0)
    last = np.maximum(np.searchsorted(times, grid[1:], side="left") - 1, first)
    area = np.concatenate([[0.0], np.cumsum(values[:-1] * np.diff(times))])
    at_start = area[first] + values[first] * (grid[:-1] - times[first])
    at_end = area[last] + values[last] * (grid[1:] - times[last])
    # one row covers the whole step in most logs: then its value, exactly
    return np.where(first == last, values[first], (at_end - at_start) / np.diff(grid))


def _mask(clocks: list[Clock], schema: LogSchema, grid: np.ndarray) -> np.ndarray:
    """False where a step touches a gap, or a derivative there would use samples from it."""
    mask = np.ones(len(grid) - 1, dtype=bool)
    reach = max((entry.window // 2 for entry in schema.signals if entry.derivative_of), default=0)
    for before, after in [(one.times[i], one.times[i + 1]) for one in clocks for i in one.gaps]:
        touched = np.flatnonzero((grid[1:] > before) & (grid[:-1] < after))
        if touched.size:
            mask[max(touched[0] - reach, 0) : touched[-1] + 1 + reach] = False
    return mask


def _rewards(raw: RawEpisode, clock: Clock, schema: LogSchema, steps: int) -> np.ndarray | None:
    if schema.reward is None:
        return None
    if schema.resample:
        message = f"the reward column '{schema.reward}' cannot be resampled; leave it out and compute rewards"
        raise LogError(message, file=raw.file)
    values = real_numbers(pick_column(raw, schema.reward), schema.reward, raw)
    keep = clock.keep[:steps]
    if len(values) <= keep[-1]:
        raise LogError(f"'{schema.reward}' has {len(values)} rows, the episode has {steps} steps", file=raw.file)
    return values[keep]
