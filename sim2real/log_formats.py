"""From a file or folder to raw episodes: the reader by suffix, and the split by an episode column.

No reader runs code from a file: no pickle, no object arrays, no links out of the file. What a header claims is
checked before memory is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from sim2real.log_arrays import read_hdf5, read_mat, read_npz
from sim2real.log_errors import LogError
from sim2real.log_schema import LogSchema
from sim2real.log_tables import is_lerobot, read_csv, read_lerobot, read_parquet
from sim2real.raw_episode import RawEpisode

Reader = Callable[[Path, LogSchema], list[RawEpisode]]
READERS: dict[str, Reader] = {
    ".csv": read_csv,
    ".npz": read_npz,
    ".hdf5": read_hdf5,
    ".h5": read_hdf5,
    ".parquet": read_parquet,
    ".mat": read_mat,
}


def read_episodes(path: Path, schema: LogSchema) -> list[RawEpisode]:
    """Read a file by its suffix, or a LeRobot folder. Raises `LogError` naming the file, and the row where it can."""
    if path.is_dir() and is_lerobot(path):
        schema = replace(schema, episode=schema.episode or "episode_index")
        raws = read_lerobot(path, schema)
        return [replace(part, name=part.name.rpartition("/")[2]) for raw in raws for part in _split(raw, schema)]
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise LogError(f"unknown suffix '{path.suffix}'; known: {', '.join(READERS)}", file=path)
    try:
        if path.stat().st_size == 0:
            raise LogError("the file is empty (0 bytes)", file=path)
        episodes = reader(path, schema)
    except OSError as error:
        raise LogError(f"cannot be read: {error}", file=path) from error
    return episodes if schema.episode is None else [part for raw in episodes for part in _split(raw, schema)]


def _split(raw: RawEpisode, schema: LogSchema) -> Iterator[RawEpisode]:
    """One episode per value of the episode column; a value that comes back later is an error."""
    values = raw.columns[schema.episode or ""]
    if values.ndim != 1:
        raise LogError(f"the episode column has shape {values.shape}, expected one value a row", file=raw.file)
    for name, array in raw.columns.items():
        if len(array) != len(values):
            message = f"'{name}' has {len(array)} rows, the episode column has {len(values)}"
            raise LogError(message, file=raw.file, row=min(len(array), len(values)))
    starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
    seen = set()
    for start, stop in zip(starts, [*starts[1:], len(values)], strict=True):
        value, row = values[start].item(), raw.first_row + int(start)
        if value in seen or value != value:
            problem = "is not a number" if value != value else "comes back after other episodes"
            raise LogError(f"episode '{value}' {problem}", file=raw.file, row=row)
        seen.add(value)
        label = f"{value:g}" if isinstance(value, float) else str(value)
        part = {name: array[start:stop] for name, array in raw.columns.items()}
        yield RawEpisode(f"{raw.name}/{label}", raw.file, part, row, raw.notes)
