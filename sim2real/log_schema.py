"""The schema of a log: which columns are what, in which units, on which grid.

A schema is a small YAML file beside the log: `run.yaml` (or `run.csv.yaml`) for run.csv, `schema.yaml` for its
folder::

    time: {column: time, unit: s}      # or {period: 0.02} when the file has no clock; unit: utc for date and time
    signals:                           # in the order of the model's signals
      angle: {column: pos_deg, unit: deg, unwrap: true, range: [-720, 720]}     # range in the recorded unit
      velocity: {derivative_of: angle, window: 11, order: 3}      # Savitzky-Golay on the grid
    actions:
      torque: {column: tau, unit: mNm}
    exogenous: {}                      # measured inputs nobody chooses: weather, demand
    reward: {column: r}                # optional; only where rows are the grid
    episode: {column: episode}         # optional; otherwise each file (or HDF5 group) is one episode
    files: "run_*.csv"                 # which files of a folder are logs; default: all of a known format
    delimiter: ","                     # CSV only
    dt: 0.004                          # s, period of the grid; default: the median period when jitter allows
    resample: true                     # interpolate on the grid; default false: rows must be the grid
    hold: linear                       # inputs between rows: linear or previous (default)
    max_gap: 0.05                      # s; default 10 median periods
    gaps: error                        # or mask: steps across a gap are masked
    duplicates: error                  # or first: of rows with the same time the first is kept
    jitter_tolerance: 0.01             # largest deviation of a period from the median that still counts as uniform

A column of a two-dimensional array is written `obs[3]`, a group or MATLAB struct field `obs/angle`. A signal may carry
its own clock (`time: t_imu`, same unit). A signal that never changes is a dead sensor and an error unless
`allow_constant: true`; an input that never changes is noted. An angle that jumps by more than pi between rows is an
error unless `unwrap` is set to true or false. Units: `sim2real.log_units`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from sim2real.log_errors import LogError
from sim2real.log_units import conversion, time_factor
from sim2real.safe_yaml import parse_yaml, read_yaml

_Fail = Callable[[str], LogError]


@dataclass(frozen=True)
class Column:
    """One named quantity: a recorded column, or (signals only) the smoothed time derivative of another signal."""

    name: str
    column: str = ""
    unit: str = "1"
    time: str | None = None
    derivative_of: str | None = None
    window: int = 11
    order: int = 3
    range: tuple[float, float] | None = None
    allow_constant: bool = False
    unwrap: bool | None = None


@dataclass(frozen=True)
class LogSchema:
    """A checked schema; the fields are those of the module docstring."""

    time: str | None
    time_unit: str
    period: float | None
    signals: tuple[Column, ...]
    actions: tuple[Column, ...]
    exogenous: tuple[Column, ...] = ()
    reward: str | None = None
    episode: str | None = None
    files: str | None = None
    delimiter: str = ","
    dt: float | None = None
    resample: bool = False
    hold: Literal["linear", "previous"] = "previous"
    max_gap: float | None = None
    gaps: Literal["error", "mask"] = "error"
    duplicates: Literal["error", "first"] = "error"
    jitter_tolerance: float = 0.01


def load_schema(path: Path | str, overrides: Sequence[str] = ()) -> LogSchema:
    """Read and check a YAML schema; `overrides` are "dotted.key=value" strings. Raises `LogError`."""
    return parse_schema(read_yaml(Path(path)), overrides, source=str(path))


def parse_schema(content: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str = "schema") -> LogSchema:
    """Check a schema given as a mapping. Raises `LogError` naming the entry, what it holds and what was expected."""
    content = _with_overrides(content, overrides, source)
    fail = partial(LogError, file=source)
    known = {"time", "signals", "actions", "exogenous", "reward", "episode", *_SCALARS}
    _only(content, known, "schema", fail)
    time = _mapping(content.get("time", {}), "time", fail)
    _only(time, {"column", "unit", "period"}, "time", fail)
    period = _number(time.get("period"), "time.period", fail, positive=True)
    column = _text(time.get("column"), "time.column", fail)
    if (period is None) == (column is None):
        raise fail("'time' needs either 'column' (and 'unit') or 'period' in s")
    unit = _text(time.get("unit", "s"), "time.unit", fail) or "s"
    if unit != "utc":
        _known_unit(time_factor, unit, "time.unit", fail)
    signals = _columns(content.get("signals"), "signals", fail)
    if not signals:
        raise fail("'signals' is empty: name at least one measured signal")
    _check_derivatives(signals, fail)
    actions = _columns(content.get("actions"), "actions", fail)
    exogenous = _columns(content.get("exogenous"), "exogenous", fail)
    names = [entry.name for entry in signals + actions + exogenous]
    if len(set(names)) < len(names):
        raise fail(f"names must be distinct across signals, actions and exogenous, got {names}")
    if any(entry.derivative_of for entry in actions + exogenous):
        raise fail("'derivative_of' is for signals only")
    if len({entry.time for entry in actions}) > 1:
        raise fail("all actions must share one clock")
    if column is None and any(entry.time for entry in signals + actions + exogenous):
        raise fail("an entry has its own clock: then the log needs a main one, 'time.column'")
    return LogSchema(
        time=column,
        time_unit=unit,
        period=period,
        signals=signals,
        actions=actions,
        exogenous=exogenous,
        reward=_named_column(content.get("reward"), "reward", fail),
        episode=_named_column(content.get("episode"), "episode", fail),
        **_scalars(content, fail),
    )


_SCALARS: dict[str, tuple[str, ...]] = {
    "files": (),
    "delimiter": (),
    "dt": (),
    "resample": (),
    "max_gap": (),
    "jitter_tolerance": (),
    "hold": ("linear", "previous"),
    "gaps": ("error", "mask"),
    "duplicates": ("error", "first"),
}


def _scalars(content: Mapping[str, Any], fail: _Fail) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, choices in _SCALARS.items():
        value = content.get(key)
        if value is None:
            continue
        if key in ("dt", "max_gap", "jitter_tolerance"):
            result[key] = _number(value, key, fail, positive=True)
        elif key == "resample":
            result[key] = _flag(value, key, fail)
        else:
            result[key] = _text(value, key, fail)
            if choices and value not in choices:
                raise fail(f"'{key}' is '{value}'; choose one of {choices}")
    if len(result.get("delimiter", ",")) != 1:
        raise fail(f"'delimiter' must be one character, got {result['delimiter']!r}")
    return result


def _columns(content: Any, what: str, fail: _Fail) -> tuple[Column, ...]:
    entries = _mapping({} if content is None else content, what, fail)
    return tuple(_column(name, entry, f"{what}.{name}", fail) for name, entry in entries.items())


def _column(name: str, content: Any, what: str, fail: _Fail) -> Column:
    entry = _mapping(content, what, fail)
    derived = "derivative_of" in entry
    allowed = {"derivative_of", "window", "order"} if derived else {"column", "unit", "time", "range"}
    _only(entry, allowed | {"allow_constant"} | (set() if derived else {"unwrap"}), what, fail)
    allow_constant = _flag(entry.get("allow_constant", False), f"{what}.allow_constant", fail)
    if derived:
        window, order = entry.get("window", 11), entry.get("order", 3)
        if not (type(window) is int and type(order) is int and 1 <= order < window and window % 2 == 1):
            raise fail(f"'{what}': window must be odd and above order >= 1, got window={window}, order={order}")
        base = _text(entry["derivative_of"], f"{what}.derivative_of", fail)
        return Column(name, derivative_of=base, window=window, order=order, allow_constant=allow_constant)
    column = _text(entry.get("column"), f"{what}.column", fail)
    if column is None:
        raise fail(f"'{what}' needs 'column' or, for a signal, 'derivative_of'")
    unit = _text(entry.get("unit"), f"{what}.unit", fail)
    if unit is None:
        raise fail(f"'{what}' needs 'unit' (unit: \"1\" for a bare number)")
    _known_unit(conversion, unit, f"{what}.unit", fail)
    unwrap = entry.get("unwrap")
    return Column(
        name,
        column,
        unit,
        time=_text(entry.get("time"), f"{what}.time", fail),
        range=_range(entry.get("range"), f"{what}.range", fail),
        allow_constant=allow_constant,
        unwrap=None if unwrap is None else _flag(unwrap, f"{what}.unwrap", fail),
    )


def _check_derivatives(signals: tuple[Column, ...], fail: _Fail) -> None:
    recorded = [entry.name for entry in signals if entry.derivative_of is None]
    for entry in signals:
        if entry.derivative_of is not None and entry.derivative_of not in recorded:
            raise fail(f"'signals.{entry.name}' is derivative_of '{entry.derivative_of}'; recorded signals: {recorded}")


def _only(content: Mapping[str, Any], allowed: set[str], what: str, fail: _Fail) -> None:
    if unknown := sorted(str(key) for key in content.keys() - allowed):
        raise fail(f"'{what}' has the unknown keys {unknown}; known: {sorted(allowed)}")


def _mapping(content: Any, what: str, fail: _Fail) -> Mapping[str, Any]:
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise fail(f"'{what}' must map names to values, got {content!r}")
    return content


def _text(value: Any, what: str, fail: _Fail) -> str | None:
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value:
        raise fail(f"'{what}' must be text, got {value!r} (quote it)")
    return value


def _flag(value: Any, what: str, fail: _Fail) -> bool:
    if not isinstance(value, bool):
        raise fail(f"'{what}' must be true or false, got {value!r}")
    return value


def _number(value: Any, what: str, fail: _Fail, *, positive: bool = False) -> float | None:
    if value is None:
        return None
    try:  # YAML 1.1 reads 4e-3 as text
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or (positive and number <= 0):
        raise fail(f"'{what}' must be a finite number{' above 0' if positive else ''}, got {value!r}")
    return number


def _range(value: Any, what: str, fail: _Fail) -> tuple[float, float] | None:
    if value is None:
        return None
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
        low, high = _number(value[0], what, fail), _number(value[1], what, fail)
        if low is not None and high is not None and low < high:
            return low, high
    raise fail(f"'{what}' must be [low, high] with low < high, got {value!r}")


def _named_column(value: Any, what: str, fail: _Fail) -> str | None:
    if value is None:
        return None
    entry = _mapping(value, what, fail)
    _only(entry, {"column"}, what, fail)
    name = _text(entry.get("column"), f"{what}.column", fail)
    if name is None:
        raise fail(f"'{what}' needs 'column'")
    return name


def _known_unit(check: Any, unit: str, what: str, fail: _Fail) -> None:
    try:
        check(unit)
    except ValueError as error:
        raise fail(f"'{what}': {error}") from error


def _with_overrides(content: Mapping[str, Any], overrides: Sequence[str], source: str) -> dict[str, Any]:
    result: dict[str, Any] = _copy(content)
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise LogError(f"the override '{item}' is not of the form dotted.key=value", file=source)
        value = parse_yaml(f"value: {text}", f"{source} (override {key})")["value"]
        *parents, last = key.split(".")
        target = result
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise LogError(f"the override '{item}': '{parent}' holds no keys", file=source)
        target[last] = value
    return result


def _copy(value: Any) -> Any:
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, Mapping) else value
