"""Rollout logs: measured signals on a uniform grid, in SI units, with their provenance.

`load_log` reads a file, a folder or a list of files by a schema (`sim2real.log_schema`) into a `RolloutLog`;
`save_log` writes Parquet that `load_log` gives back bit for bit, schema included.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sim2real.clock import grid_period, read_clock
from sim2real.delay import delayed_actions
from sim2real.episodes import concatenate_logs, distinct_names, select_episodes
from sim2real.log_errors import LogError
from sim2real.log_formats import READERS, read_episodes
from sim2real.log_schema import LogSchema, load_schema, parse_schema
from sim2real.log_storage import is_saved_log, read_saved_log, save_log
from sim2real.log_tables import is_lerobot
from sim2real.log_units import conversion, time_derivative
from sim2real.resample import GridEpisode, to_grid
from sim2real.rollout_log import RolloutLog

__all__ = [
    "LogError",
    "LogSchema",
    "RolloutLog",
    "concatenate_logs",
    "delayed_actions",
    "load_log",
    "load_schema",
    "parse_schema",
    "save_log",
    "select_episodes",
]

Paths = Path | str | Sequence[Path | str]


def load_log(
    path: Paths,
    schema: LogSchema | Mapping[str, Any] | Path | str | None = None,
    *,
    overrides: Sequence[str] = (),
    dt: float | None = None,
) -> RolloutLog:
    """Read a log: a file, a folder (each file an episode), a LeRobot folder, a glob pattern, or a list of these.

    `schema`: a YAML file, a mapping or a `LogSchema`; None looks for `run.yaml` or `run.csv.yaml` beside run.csv, then
    for `schema.yaml` in its folder. `overrides` are "dotted.key=value" strings on top of it. `dt` (s) asks for that
    grid by resampling. A file of `save_log` needs none of them. Raises `LogError` naming the file, and the row where
    there is one, and `ValueError` for a `dt` that is no period.
    """
    if dt is not None and not (math.isfinite(dt) and dt > 0):
        raise ValueError(f"dt must be a finite period above 0 s, got {dt}")
    found = _find_files(path)
    if schema is None and all(file.suffix == ".parquet" and is_saved_log(file) for file, _ in found):
        if overrides or dt is not None:
            raise LogError("a saved log is read as it is; overrides and dt do not apply", file=found[0][0])
        saved = [read_saved_log(file) for file, _ in found]
        return saved[0] if len(saved) == 1 else concatenate_logs(saved)
    checked = _find_schema(found[0][0], schema, overrides)
    if dt is not None:
        checked = replace(checked, dt=dt, resample=True)
    wanted = checked.files or "*"
    files = [file for file, named in found if named or file.match(wanted)]
    if not files:
        raise LogError(f"no file here matches 'files: {wanted}'", file=str(path))
    raws = [raw for file in files for raw in read_episodes(file, checked)]
    clocks = [read_clock(raw, checked) for raw in raws]
    h = grid_period(raws, clocks, checked)
    episodes = [to_grid(raw, clock, checked, h) for raw, clock in zip(raws, clocks, strict=True)]
    source = str(path) if isinstance(path, (str, Path)) else ", ".join(str(file) for file in files)
    return _stack(episodes, checked, h, source)


def _natural(file: Path) -> list[tuple[int, str]]:
    """Sort key: run_2 before run_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", file.name)]


def _find_files(path: Paths) -> list[tuple[Path, bool]]:
    """Files with whether they were named; those found in a folder must also match the schema's `files`."""
    if not isinstance(path, (str, Path)):
        if not path:
            raise LogError("an empty list of files", file="")
        return [file for item in path for file in _find_files(item)]
    given = Path(path)
    if given.is_file():
        return [(given, True)]
    if given.is_dir() and is_lerobot(given):
        return [(given, True)]
    if given.is_dir():
        files = sorted((file for file in given.iterdir() if file.suffix.lower() in READERS), key=_natural)
        if not files:
            raise LogError(f"no logs in this folder (known: {', '.join(READERS)})", file=given)
        return [(file, False) for file in files]
    files = sorted(given.parent.glob(given.name), key=_natural) if set(given.name) & set("*?[") else []
    if not files:
        raise LogError("no such file or folder, and no file matches it as a pattern", file=given)
    return [(file, True) for file in files]


def _find_schema(
    file: Path, schema: LogSchema | Mapping[str, Any] | Path | str | None, overrides: Sequence[str]
) -> LogSchema:
    if isinstance(schema, LogSchema):
        if overrides:
            raise LogError(
                "overrides change a schema file or mapping; use dataclasses.replace on a LogSchema", file=file
            )
        return schema
    if isinstance(schema, Mapping):
        return parse_schema(schema, overrides, source=f"the schema given for {file.name}")
    if schema is not None:
        return load_schema(schema, overrides)
    own = [file.with_suffix(".yaml"), file.with_name(f"{file.name}.yaml")]
    beside = [file / "schema.yaml"] if file.is_dir() else [*own, file.parent / "schema.yaml"]
    for candidate in beside:
        if candidate.is_file():
            return load_schema(candidate, overrides)
    if overrides:
        return parse_schema({}, overrides, source=f"the overrides given for {file.name}")
    names = " or ".join(f"'{candidate.name}'" for candidate in beside)
    raise LogError(f"needs a schema: pass one, or put {names} beside it (see sim2real.log_schema)", file=file)


def _stack(episodes: list[GridEpisode], schema: LogSchema, h: float, source: str) -> RolloutLog:
    """Batch episodes of different length: shorter ones hold their last value and are masked."""
    units: dict[str, str] = {}
    for entry in schema.signals + schema.actions + schema.exogenous:
        units[entry.name] = conversion(entry.unit)[0]
    for entry in schema.signals:
        if entry.derivative_of is not None:
            units[entry.name] = time_derivative(units[entry.derivative_of])
    names = {
        "signal": tuple(entry.name for entry in schema.signals),
        "action": tuple(entry.name for entry in schema.actions),
        "exogenous": tuple(entry.name for entry in schema.exogenous),
        "episode": distinct_names([episode.name for episode in episodes]),
    }
    steps = max(len(episode.mask) for episode in episodes)

    def batch(arrays: Sequence[np.ndarray | None], rows: int, mode: str = "edge") -> Tensor:
        padded = [
            np.pad(array, [(0, rows - len(array))] + [(0, 0)] * (array.ndim - 1), mode=mode)  # type: ignore[call-overload]
            for array in arrays
            if array is not None
        ]
        return torch.from_numpy(np.stack(padded))

    return RolloutLog(
        signals=batch([episode.signals for episode in episodes], steps + 1),
        actions=batch([episode.actions for episode in episodes], steps),
        exogenous=batch([episode.exogenous for episode in episodes], steps) if schema.exogenous else None,
        mask=batch([episode.mask for episode in episodes], steps, "constant"),
        dt=h,
        names=names,
        units=units,
        source=source,
        recorded_actions=tuple(
            (torch.from_numpy(episode.recorded_times), torch.from_numpy(episode.recorded_actions))
            for episode in episodes
        ),
        hold=schema.hold,
        notes=tuple(note for episode in episodes for note in episode.notes),
        rewards=None if schema.reward is None else batch([episode.rewards for episode in episodes], steps, "constant"),
    )
