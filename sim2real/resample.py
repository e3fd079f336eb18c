"""From recorded rows to the uniform grid of a log.

    T_k = t_first + k h,  k = 0..K,  K = floor((t_last - t_first) / h + 1e-9).

Signals are interpolated linearly and never wrapped. An input is a function of time between its rows: linear, or held
("previous"); the action of step k is its mean over [T_k, T_{k+1}] (linear: (u_k + u_{k+1}) / 2). Velocities asked for
as derivatives are Savitzky-Golay filtered grid angles. Without resampling the rows themselves are the grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from sim2real.log_errors import LogError
from sim2real.log_formats import RawEpisode, split_reference
from sim2real.log_schema import Column, LogSchema
from sim2real.log_units import conversion, time_factor

_EXACT_INTEGER = 2**53
_LONGEST_GAP = 10.0  # median periods


@dataclass(frozen=True)
class Clock:
    """Times `[R]` in s from the first row of the episode, strictly increasing, and what they look like."""

    times: np.ndarray
    keep: np.ndarray
    """indices of these rows in the recorded columns (duplicates may be left out)"""
    median: float
    """median period, s"""
    jitter: float
    """largest relative deviation of a period from the median"""
    jitter_row: int
    """the row of the file that ends that period"""
    gaps: tuple[int, ...]
    """each i whose period [i, i+1] is longer than max_gap"""
    notes: tuple[str, ...]


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


Stream = tuple[np.ndarray, np.ndarray]


def read_clock(raw: RawEpisode, schema: LogSchema, column: str | None = None) -> Clock:
    """The main clock of an episode (or the clock `column`), checked. Raises `LogError` with the row."""
    column = column or schema.time
    if column is None:
        first = next(entry for entry in schema.signals if entry.column)
        times = np.arange(len(_pick(raw, first.column))) * float(schema.period or 1.0)
    else:
        times = _seconds(raw, column, schema)
    if len(times) < 2:
        raise LogError(f"{len(times)} row(s); an episode needs at least 2", file=raw.file, row=raw.first_row)
    return _checked(times, raw, column or "time", schema)


def _checked(times: np.ndarray, raw: RawEpisode, column: str, schema: LogSchema) -> Clock:
    periods = np.diff(times)
    if (backwards := np.flatnonzero(periods < 0)).size:
        i = int(backwards[0])
        message = f"time runs backwards in '{column}': {times[i]:.9g} s, then {times[i + 1]:.9g} s after the first row"
        raise LogError(message, file=raw.file, row=raw.first_row + i + 1)
    keep, notes = np.arange(len(times)), []
    if (doubled := np.flatnonzero(periods == 0)).size:
        row = raw.first_row + int(doubled[0]) + 1
        if schema.duplicates == "error":
            message = f"'{column}' repeats {times[doubled[0]]:.9g} s; 'duplicates: first' keeps the first of such rows"
            raise LogError(message, file=raw.file, row=row)
        keep = np.setdiff1d(keep, doubled + 1)
        notes.append(f"'{raw.file}', row {row}: {doubled.size} row(s) with a repeated time were dropped")
        times = times[keep]
        if len(times) < 2:
            raise LogError(f"'{column}' never changes", file=raw.file, row=raw.first_row)
    periods = np.diff(times)
    median = float(np.median(periods))
    deviation = np.abs(periods / median - 1)
    worst = int(deviation.argmax())
    max_gap = schema.max_gap if schema.max_gap is not None else _LONGEST_GAP * median
    gaps = np.flatnonzero(periods > max_gap)
    for i in gaps:
        row = raw.first_row + int(keep[i + 1])
        message = f"a gap of {periods[i]:.6g} s ends here in '{column}' (max_gap {max_gap:.6g} s)"
        if schema.gaps == "error":
            message += "; 'gaps: mask' keeps the rest, or raise 'max_gap'"
            raise LogError(message, file=raw.file, row=row)
        notes.append(f"'{raw.file}', row {row}: {message}; masked")
    jitter_row = raw.first_row + int(keep[worst + 1])
    if deviation[worst] > schema.jitter_tolerance:
        notes.append(
            f"'{raw.file}', row {jitter_row}: uneven clock '{column}', median period {median:.6g} s, shortest "
            f"{periods.min():.6g} s, longest {periods.max():.6g} s"
        )
    gap_starts = tuple(int(i) for i in gaps)
    return Clock(times, keep, median, float(deviation[worst]), jitter_row, gap_starts, tuple(notes))


def grid_period(raws: list[RawEpisode], clocks: list[Clock], schema: LogSchema) -> float:
    """The period h of the grid in s: the schema's `dt`, or the median period where jitter allows.

    Without `resample` every file must already be uniform at that period. Raises `LogError` otherwise.
    """
    tolerance = schema.jitter_tolerance
    h = schema.dt if schema.dt is not None else float(np.median([clock.median for clock in clocks]))
    for raw, clock in zip(raws, clocks, strict=True):
        if clock.jitter > tolerance and not (schema.resample and schema.dt is not None):
            message = (
                f"the period that ends here is {clock.jitter:.1%} off the median of {clock.median:.6g} s (allowed: "
                f"jitter_tolerance {tolerance:.1%}); set 'dt' and 'resample: true' to interpolate on a uniform grid"
            )
            raise LogError(message, file=raw.file, row=clock.jitter_row)
        if not schema.resample and abs(clock.median / h - 1) > tolerance:
            message = f"the median period is {clock.median:.6g} s, the grid needs {h:.6g} s"
            raise LogError(f"{message}; set 'dt' and 'resample: true' to interpolate", file=raw.file)
    return h


def to_grid(raw: RawEpisode, clock: Clock, schema: LogSchema, h: float) -> GridEpisode:
    """Convert, check and interpolate one episode on the grid of period `h` (s)."""
    streams = {entry.name: _stream(raw, clock, entry, schema) for entry in schema.signals if entry.column}
    inputs = [_stream(raw, clock, entry, schema) for entry in schema.actions]
    measured = [_stream(raw, clock, entry, schema) for entry in schema.exogenous]
    grid = clock.times
    if schema.resample:
        first = max(times[0] for times, _ in streams.values())
        last = min(times[-1] for times, _ in streams.values())
        steps = int(np.floor((last - first) / h + 1e-9))
        if steps < 1:
            raise LogError(f"the record spans {last - first:.6g} s, less than one period of {h:.6g} s", file=raw.file)
        grid = first + h * np.arange(steps + 1)
    signals = {name: np.interp(grid, *stream) for name, stream in streams.items()}
    for entry in schema.signals:
        if entry.derivative_of is not None:
            signals[entry.name] = _derivative(signals[entry.derivative_of], entry, h, raw)
    _check_alive([(entry, signals[entry.name]) for entry in schema.signals], raw)
    silent = [
        f"'{raw.file}': '{entry.name}' never changes (always {values[0]:.6g})"
        for entry, (_, values) in zip(schema.actions + schema.exogenous, inputs + measured, strict=True)
        if np.ptp(values) == 0
    ]
    steps = len(grid) - 1
    recorded_times = inputs[0][0] if inputs else clock.times
    return GridEpisode(
        name=raw.name,
        signals=_side_by_side([signals[entry.name] for entry in schema.signals], steps + 1),
        actions=_side_by_side([_step_means(*stream, grid, schema.hold) for stream in inputs], steps),
        exogenous=_side_by_side([_step_means(*stream, grid, schema.hold) for stream in measured], steps),
        mask=_mask(clock, schema, grid),
        rewards=_rewards(raw, clock, schema, steps),
        recorded_times=recorded_times - grid[0],
        recorded_actions=_side_by_side([values for _, values in inputs], len(recorded_times)),
        notes=(*raw.notes, *clock.notes, *silent),
    )


def _side_by_side(values: list[np.ndarray], rows: int) -> np.ndarray:
    return np.stack(values, axis=1) if values else np.zeros((rows, 0))


def _pick(raw: RawEpisode, reference: str) -> np.ndarray:
    """The column `[R]` of a reference such as "angle" or "obs[3]"."""
    name, index = split_reference(reference)
    values = raw.columns[name]
    if index is None:
        if values.ndim != 1:
            raise LogError(f"'{name}' has shape {values.shape}; choose a column, '{name}[0]'", file=raw.file)
        return values
    if values.ndim != 2 or index >= values.shape[1]:
        raise LogError(f"'{reference}' is out of range: '{name}' has shape {values.shape}", file=raw.file)
    return values[:, index]


def _seconds(raw: RawEpisode, column: str, schema: LogSchema) -> np.ndarray:
    """A clock in s from the first row of the main clock; subtracted before it becomes a float (ns since 1970)."""
    values, origin = _pick(raw, column), _pick(raw, schema.time or column)[:1]
    if len(values) == 0:
        return np.zeros(0)
    if schema.time_unit == "utc":
        return np.array([(moment - _utc(origin, raw)[0]).total_seconds() for moment in _utc(values, raw)])
    if values.dtype.kind in "iu" and origin.dtype.kind in "iu":
        if int(values.max()) - min(int(values.min()), int(origin[0])) >= 2**62:
            row = raw.first_row + int(np.argmax(values))
            raise LogError(f"the clock '{column}' spans more than 2^62 ticks", file=raw.file, row=row)
        return (values - origin).astype(np.int64) * time_factor(schema.time_unit)
    return (_numbers(values, column, raw) - _numbers(origin, column, raw)) * time_factor(schema.time_unit)


def _utc(values: np.ndarray, raw: RawEpisode) -> list[datetime]:
    moments = []
    for row, text in enumerate(values.tolist(), start=raw.first_row):
        if isinstance(text, datetime):
            moment = text
        else:
            try:
                moment = datetime.fromisoformat(str(text).strip())
            except ValueError as error:
                message = f"'{str(text)[:40]}' is not a date and time (ISO 8601)"
                raise LogError(message, file=raw.file, row=row) from error
        moments.append(moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment)
    return moments


def _numbers(values: np.ndarray, what: str, raw: RawEpisode) -> np.ndarray:
    """A column as finite float64."""
    if values.dtype.kind not in "fiub":
        raise LogError(f"'{what}' holds {values.dtype}, expected real numbers", file=raw.file, row=raw.first_row)
    if values.dtype.kind in "iu" and values.size:
        large = np.flatnonzero((values > _EXACT_INTEGER) | (values < -_EXACT_INTEGER))
        if large.size:
            row = raw.first_row + int(large[0])
            message = f"'{what}' holds {values[large[0]]}, too large to be exact in float64"
            raise LogError(message, file=raw.file, row=row)
    numbers = values.astype(np.float64)
    if (broken := np.flatnonzero(~np.isfinite(numbers))).size:
        row = raw.first_row + int(broken[0])
        more = f" ({broken.size} such rows)" if broken.size > 1 else ""
        raise LogError(f"'{what}' is {numbers[broken[0]]}{more}, expected a finite number", file=raw.file, row=row)
    return numbers


def _stream(raw: RawEpisode, main: Clock, entry: Column, schema: LogSchema) -> Stream:
    """Times and values of one entry in kept units."""
    clock = main
    if entry.time is not None and entry.time != schema.time:
        if not schema.resample:
            raise LogError(f"'{entry.name}' has its own clock '{entry.time}': set 'resample: true'", file=raw.file)
        clock = read_clock(raw, schema, entry.time)
    values = _numbers(_pick(raw, entry.column), entry.column, raw)
    rows = int(clock.keep[-1]) + 1 if entry.time is None and schema.time is None else _clock_rows(raw, entry, schema)
    is_signal = entry in schema.signals
    if len(values) != rows and (is_signal or len(values) != rows - 1):  # inputs of T steps beside T + 1 observations
        message = f"'{entry.column}' has {len(values)} rows, its clock has {rows}"
        raise LogError(message, file=raw.file, row=raw.first_row + min(len(values), rows))
    keep = clock.keep[clock.keep < len(values)]
    values, times = values[keep], clock.times[: len(keep)]
    if entry.range is not None:
        low, high = entry.range
        if (outside := np.flatnonzero((values < low) | (values > high))).size:
            row = raw.first_row + int(keep[outside[0]])
            message = (
                f"'{entry.column}' is {values[outside[0]]:.6g} {entry.unit}, outside its range [{low:g}, {high:g}]"
            )
            raise LogError(f"{message}; is the unit right?", file=raw.file, row=row)
    unit, factor, offset = conversion(entry.unit)
    values = values * factor + offset if (factor, offset) != (1.0, 0.0) else values
    return times, _unwrapped(values, entry, raw, keep) if unit == "rad" and is_signal else values


def _clock_rows(raw: RawEpisode, entry: Column, schema: LogSchema) -> int:
    return len(_pick(raw, entry.time or schema.time or ""))


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


def _step_means(times: np.ndarray, values: np.ndarray, grid: np.ndarray, hold: str) -> np.ndarray:
    """Mean input `[K]` over each grid step; before its first row an input holds that row, after its last one that."""
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


def _mask(clock: Clock, schema: LogSchema, grid: np.ndarray) -> np.ndarray:
    """False where a step touches a gap, or a derivative there would use samples from it."""
    mask = np.ones(len(grid) - 1, dtype=bool)
    reach = max((entry.window // 2 for entry in schema.signals if entry.derivative_of), default=0)
    for i in clock.gaps:
        touched = np.flatnonzero((grid[1:] > clock.times[i]) & (grid[:-1] < clock.times[i + 1]))
        mask[max(touched[0] - reach, 0) : touched[-1] + 1 + reach] = False
    return mask


def _rewards(raw: RawEpisode, clock: Clock, schema: LogSchema, steps: int) -> np.ndarray | None:
    if schema.reward is None:
        return None
    if schema.resample:
        message = f"the reward column '{schema.reward}' cannot be resampled; leave it out and compute rewards"
        raise LogError(message, file=raw.file)
    values = _numbers(_pick(raw, schema.reward), schema.reward, raw)
    keep = clock.keep[:steps]
    if len(values) <= keep[-1]:
        raise LogError(f"'{schema.reward}' has {len(values)} rows, the episode has {steps} steps", file=raw.file)
    return values[keep]
