"""The clocks of recorded logs: read, checked for order, repeats and gaps, and the period of the grid they allow."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from sim2real.log_errors import LogError
from sim2real.log_schema import LogSchema
from sim2real.log_units import time_factor
from sim2real.raw_episode import RawEpisode, split_reference

_EXACT_INTEGER = 2**53
_LONGEST_GAP = 10.0  # median periods


@dataclass(frozen=True)
class Clock:
    """Times `[R]` in s from the first row of the episode, strictly increasing, and what they look like."""

    times: np.ndarray
    keep: np.ndarray
    """indices of these rows in the recorded columns (duplicates may be left out)"""
    rows: int
    """rows recorded, duplicates included"""
    median: float
    """median period, s"""
    jitter: float
    """largest relative deviation of a period from the median"""
    jitter_row: int
    """the row of the file that ends that period"""
    gaps: tuple[int, ...]
    """each i whose period [i, i+1] is longer than max_gap"""
    notes: tuple[str, ...]


def read_clock(raw: RawEpisode, schema: LogSchema, column: str | None = None) -> Clock:
    """The main clock of an episode (or the clock `column`), checked. Raises `LogError` with the row."""
    column = column or schema.time
    if column is None:
        first = next(entry for entry in schema.signals if entry.column)
        times = np.arange(len(pick_column(raw, first.column))) * float(schema.period or 1.0)
    else:
        times = _seconds(raw, column, schema)
    if len(times) < 2:
        raise LogError(f"{len(times)} row(s); an episode needs at least 2", file=raw.file, row=raw.first_row)
    return _checked(times, raw, column or "time", schema)


def _checked(times: np.ndarray, raw: RawEpisode, column: str, schema: LogSchema) -> Clock:
    notes: list[str] = []
    recorded = len(times)
    keep = _ordered_rows(times, raw, column, schema, notes)
    times = times[keep]
    if len(times) < 2:
        raise LogError(f"the clock '{column}' never changes", file=raw.file, row=raw.first_row)
    periods = np.diff(times)
    median = float(np.median(periods))
    deviation = np.abs(periods / median - 1)
    worst = int(deviation.argmax())
    rows = raw.first_row + keep
    gaps = _gaps(periods, rows, raw, column, schema, notes)
    if deviation[worst] > schema.jitter_tolerance:
        notes.append(
            f"'{raw.file}', row {rows[worst + 1]}: uneven clock '{column}', median period {median:.6g} s, shortest "
            f"{periods.min():.6g} s, longest {periods.max():.6g} s"
        )
    return Clock(times, keep, recorded, median, float(deviation[worst]), int(rows[worst + 1]), gaps, tuple(notes))


def _ordered_rows(times: np.ndarray, raw: RawEpisode, column: str, schema: LogSchema, notes: list[str]) -> np.ndarray:
    """Indices of the rows with strictly increasing time, or an error."""
    periods = np.diff(times)
    if (backwards := np.flatnonzero(periods < 0)).size:
        i = int(backwards[0])
        message = f"time runs backwards in '{column}': {times[i]:.9g} s, then {times[i + 1]:.9g} s after the first row"
        raise LogError(message, file=raw.file, row=raw.first_row + i + 1)
    repeated = np.flatnonzero(periods == 0)
    if repeated.size == 0:
        return np.arange(len(times))
    row = raw.first_row + int(repeated[0]) + 1
    if schema.duplicates == "error":
        message = f"'{column}' repeats {times[repeated[0]]:.9g} s; 'duplicates: first' keeps the first of such rows"
        raise LogError(message, file=raw.file, row=row)
    notes.append(f"'{raw.file}', row {row}: {repeated.size} row(s) with a repeated time were dropped")
    return np.setdiff1d(np.arange(len(times)), repeated + 1)


def _gaps(
    periods: np.ndarray, rows: np.ndarray, raw: RawEpisode, column: str, schema: LogSchema, notes: list[str]
) -> tuple[int, ...]:
    """Each i whose period [i, i+1] is longer than max_gap, noted where the schema allows gaps."""
    max_gap = schema.max_gap if schema.max_gap is not None else _LONGEST_GAP * float(np.median(periods))
    gaps = np.flatnonzero(periods > max_gap)
    for i in gaps:
        message = f"a gap of {periods[i]:.6g} s ends here in '{column}' (max_gap {max_gap:.6g} s)"
        if schema.gaps == "error":
            message += "; 'gaps: mask' keeps the rest, or raise 'max_gap'"
            raise LogError(message, file=raw.file, row=int(rows[i + 1]))
        notes.append(f"'{raw.file}', row {rows[i + 1]}: {message}; masked")
    return tuple(int(i) for i in gaps)


def grid_period(raws: list[RawEpisode], clocks: list[Clock], schema: LogSchema) -> float:
    """The period h of the grid in s: the schema's `dt`, or the median period where jitter allows.

    Without `resample` every file must already be uniform at that period. Raises `LogError` otherwise.
    """
    tolerance = schema.jitter_tolerance
    median = float(np.median([clock.median for clock in clocks]))
    h = schema.dt if schema.dt is not None else float(f"{median:.12g}")  # 0.02, not 0.020000000000000018
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


def pick_column(raw: RawEpisode, reference: str) -> np.ndarray:
    """The column `[R]` of a reference such as "angle" or "obs[3]"."""
    name, index = split_reference(reference)
    values = raw.columns[name]
    if index is None:
        if values.ndim == 2 and values.shape[1] == 1:
            return values[:, 0]
        if values.ndim != 1:
            raise LogError(f"'{name}' has shape {values.shape}; choose a column, '{name}[0]'", file=raw.file)
        return values
    if values.ndim != 2 or index >= values.shape[1]:
        raise LogError(f"'{reference}' is out of range: '{name}' has shape {values.shape}", file=raw.file)
    return values[:, index]


def _seconds(raw: RawEpisode, column: str, schema: LogSchema) -> np.ndarray:
    """A clock in s from the first row of the main clock; subtracted before it becomes a float (ns since 1970)."""
    values, origin = pick_column(raw, column), pick_column(raw, schema.time or column)[:1]
    if len(values) == 0:
        return np.zeros(0)
    if schema.time_unit == "utc":
        return np.array([(moment - _utc(origin, raw)[0]).total_seconds() for moment in _utc(values, raw)])
    if values.dtype.kind in "iu" and values.dtype == origin.dtype:
        if max(int(values.max()), int(origin[0])) - min(int(values.min()), int(origin[0])) >= 2**62:
            row = raw.first_row + int(np.argmax(values))
            raise LogError(f"the clock '{column}' spans more than 2^62 ticks", file=raw.file, row=row)
        wide = values.astype(np.uint64).astype(np.int64)  # modulo 2^64, as is the difference: exact by the check above
        return (wide - origin.astype(np.uint64).astype(np.int64)) * time_factor(schema.time_unit)
    return (real_numbers(values, column, raw) - real_numbers(origin, column, raw)) * time_factor(schema.time_unit)


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


def real_numbers(values: np.ndarray, what: str, raw: RawEpisode) -> np.ndarray:
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
