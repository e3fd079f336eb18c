"""A `RolloutLog` as one Parquet file, and back bit for bit.

One row per grid sample of each episode, readable with any Parquet tool: `episode`, `step`, `time` (s), `mask`, and
`signal.NAME`, `action.NAME`, `exogenous.NAME`, `reward` (empty in the last row of an episode, which has no step). The
inputs as recorded lie as lists (`recorded.time`, `recorded.NAME`) in the first row of their episode. Everything else is
JSON in the file's metadata under the key "sim2real.log".
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sim2real.log_errors import LogError
from sim2real.rollout_log import RolloutLog

if TYPE_CHECKING:
    import pyarrow

_KEY = b"sim2real.log"
_VERSION = 1


def save_log(log: RolloutLog, path: Path | str) -> None:
    """Write a log as Parquet; `load_log(path)` gives it back bit for bit. Atomic: never half a file.

    Raises `LogError` for a suffix other than .parquet, names that do not match the tensors, or values not finite.
    """
    import pyarrow as pa
    from pyarrow import parquet

    path = Path(path)
    if path.suffix != ".parquet":
        raise LogError("a log is saved as Parquet; choose a name that ends in .parquet", file=path)
    _check_content(log, path)
    columns = _grid_columns(log) | _recorded_columns(log)
    table = pa.table(columns).replace_schema_metadata({_KEY: json.dumps(_description(log))})
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            parquet.write_table(table, file, use_dictionary=False, write_page_checksum=True)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _kinds(log: RolloutLog) -> dict[str, Tensor]:
    kinds = {"signal": log.signals, "action": log.actions}
    return kinds if log.exogenous is None else kinds | {"exogenous": log.exogenous}


def _check_content(log: RolloutLog, path: Path) -> None:
    for kind, values in _kinds(log).items():
        names = log.names.get(kind, ())
        if len(names) != values.shape[-1] or len(set(names)) < len(names):
            raise LogError(f"{kind}s {names} do not name the {values.shape[-1]} columns one by one", file=path)
        if not bool(torch.isfinite(values).all()):
            raise LogError(f"a {kind} is not finite", file=path, row=int((~torch.isfinite(values)).nonzero()[0, 1]))
    if len(log.names.get("episode", ())) != len(log.signals):
        raise LogError(f"{len(log.signals)} episodes are named {log.names.get('episode')}", file=path)


def _description(log: RolloutLog) -> dict[str, Any]:
    return {
        "version": _VERSION,
        "episodes": log.mask.shape[0],
        "steps": log.mask.shape[1],
        "dt": float(log.dt).hex(),
        "hold": log.hold,
        "names": {kind: list(names) for kind, names in log.names.items()},
        "units": log.units,
        "source": log.source,
        "notes": list(log.notes),
        "exogenous": log.exogenous is not None,
        "rewards": log.rewards is not None,
        "recorded": len(log.recorded_actions),
    }


def _numpy(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()


def _grid_columns(log: RolloutLog) -> dict[str, pyarrow.Array]:
    import pyarrow as pa

    batch, steps = log.mask.shape
    last = np.zeros((batch, steps + 1), dtype=bool)
    last[:, -1] = True

    def per_step(values: Tensor) -> pyarrow.Array:
        padded = np.concatenate([_numpy(values), np.zeros((batch, 1), dtype=_numpy(values).dtype)], axis=1)
        return pa.array(padded.reshape(-1), mask=last.reshape(-1) if values.dtype != torch.bool else None)

    columns = {
        "episode": pa.array(np.repeat(np.array(log.names["episode"], dtype=object), steps + 1), pa.string()),
        "step": pa.array(np.tile(np.arange(steps + 1), batch)),
        "time": pa.array(np.tile(np.arange(steps + 1) * log.dt, batch)),
    }
    for i, name in enumerate(log.names["signal"]):
        columns[f"signal.{name}"] = pa.array(_numpy(log.signals[..., i]).reshape(-1))
    for kind, values in _kinds(log).items():
        if kind != "signal":
            columns |= {f"{kind}.{name}": per_step(values[..., i]) for i, name in enumerate(log.names[kind])}
    columns["mask"] = per_step(log.mask)
    return columns if log.rewards is None else columns | {"reward": per_step(log.rewards)}


def _recorded_columns(log: RolloutLog) -> dict[str, pyarrow.Array]:
    """Lists in the first row of each episode; the other rows hold empty lists."""
    import pyarrow as pa

    if not log.recorded_actions:
        return {}
    batch, steps = log.mask.shape
    lengths = np.zeros((batch, steps + 1), dtype=np.int64)
    lengths[:, 0] = [len(times) for times, _ in log.recorded_actions]
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int64())

    def lists(parts: Sequence[Tensor]) -> pyarrow.Array:
        return pa.LargeListArray.from_arrays(offsets, pa.array(_numpy(torch.cat(list(parts)))))

    columns = {"recorded.time": lists([times for times, _ in log.recorded_actions])}
    for i, name in enumerate(log.names["action"]):
        columns[f"recorded.{name}"] = lists([values[:, i] for _, values in log.recorded_actions])
    return columns


def is_saved_log(path: Path) -> bool:
    """Whether a Parquet file was written by `save_log`. Raises `LogError` when it is not readable as Parquet."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        return _KEY in (parquet.read_schema(path).metadata or {})
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise LogError(f"not readable as Parquet: {error}", file=path) from error


def read_saved_log(path: Path) -> RolloutLog:
    """What `save_log` wrote. Raises `LogError` when the file is not whole or was changed inconsistently."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(path, page_checksum_verification=True)
        about = json.loads(table.schema.metadata[_KEY])
        log = _rebuild(table, about)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise LogError(f"not readable as Parquet: {error}", file=path) from error
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        message = f"written by save_log but changed or of a later version: {type(error).__name__} {error}"
        raise LogError(message, file=path) from error
    _check_content(log, path)
    return log


def _rebuild(table: pyarrow.Table, about: Mapping[str, Any]) -> RolloutLog:
    batch, steps, dt, hold = about["episodes"], about["steps"], float.fromhex(about["dt"]), about["hold"]
    if about["version"] != _VERSION:
        raise ValueError(f"version {about['version']}, this library reads {_VERSION}")
    if table.num_rows != batch * (steps + 1) or min(batch, steps) < 1:
        raise ValueError(f"{table.num_rows} rows for {batch} episodes of {steps} steps")
    if not (math.isfinite(dt) and dt > 0 and hold in ("linear", "previous")):
        raise ValueError(f"dt = {dt}, hold = {hold}")
    names = {str(kind): tuple(map(str, values)) for kind, values in about["names"].items()}

    def column(name: str) -> Tensor:
        return torch.from_numpy(np.array(table.column(name).to_numpy())).reshape(batch, steps + 1)

    def side_by_side(kind: str, rows: int) -> Tensor:
        values = [column(f"{kind}.{name}")[:, :rows] for name in names[kind]]
        return torch.stack(values, -1) if values else signals.new_zeros(batch, rows, 0)

    signals = torch.stack([column(f"signal.{name}") for name in names["signal"]], -1)
    return RolloutLog(
        signals=signals,
        actions=side_by_side("action", steps),
        exogenous=side_by_side("exogenous", steps) if about["exogenous"] else None,
        mask=column("mask")[:, :steps],
        dt=dt,
        names=names,
        units={str(name): str(unit) for name, unit in about["units"].items()},
        source=str(about["source"]),
        recorded_actions=_recorded(table, about, names["action"]),
        hold=hold,
        notes=tuple(map(str, about["notes"])),
        rewards=column("reward")[:, :steps] if about["rewards"] else None,
    )


def _recorded(
    table: pyarrow.Table, about: Mapping[str, Any], actions: tuple[str, ...]
) -> tuple[tuple[Tensor, Tensor], ...]:
    if not about["recorded"]:
        return ()
    first_rows = np.arange(about["episodes"]) * (about["steps"] + 1)

    def lists(name: str) -> list[Tensor]:
        chosen = table.column(f"recorded.{name}").take(first_rows)
        return [torch.from_numpy(np.array(item.values.to_numpy())) for item in chosen]

    times, inputs = lists("time"), [lists(name) for name in actions]
    return tuple(
        (t, torch.stack([values[b] for values in inputs], -1) if inputs else t.new_zeros(len(t), 0))
        for b, t in enumerate(times)
    )
