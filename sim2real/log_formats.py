"""One reader per file format. Each returns raw episodes: named columns as recorded, nothing converted or resampled.

No reader runs code from a file: no pickle, no object arrays, no links out of the file. What a header claims is
compared with the size of the file before memory is taken.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sim2real.log_errors import LogError
from sim2real.log_schema import LogSchema

if TYPE_CHECKING:
    import pyarrow

_NUMBER = re.compile(r"-?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|nan|-?inf", re.IGNORECASE)


@dataclass(frozen=True)
class RawEpisode:
    """Columns `[R]` or `[R, d]` as recorded, from row `first_row` of `file` on."""

    name: str
    file: str
    columns: dict[str, np.ndarray]
    first_row: int = 0
    notes: tuple[str, ...] = ()


def split_reference(reference: str) -> tuple[str, int | None]:
    """`"obs[3]"` -> `("obs", 3)`, `"obs"` -> `("obs", None)`."""
    match = re.fullmatch(r"(.+)\[(\d+)\]", reference)
    return (match[1], int(match[2])) if match else (reference, None)


def needed_columns(schema: LogSchema) -> list[str]:
    """The columns the schema names, in order, once each, without an index."""
    entries = schema.signals + schema.actions + schema.exogenous
    references = [schema.time, *(entry.time for entry in entries), *(entry.column for entry in entries)]
    references += [schema.reward, schema.episode]
    return list(dict.fromkeys(split_reference(reference)[0] for reference in references if reference))


def read_episodes(path: Path, schema: LogSchema) -> list[RawEpisode]:
    """Read one file by its suffix. Raises `LogError` naming the file, and the row where there is one."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise LogError(f"unknown suffix '{path.suffix}'; known: {', '.join(READERS)}", file=path)
    if path.stat().st_size == 0:
        raise LogError("the file is empty (0 bytes)", file=path)
    episodes = reader(path, schema)
    return episodes if schema.episode is None else [part for raw in episodes for part in _split(raw, schema.episode)]


def _require(found: list[str], schema: LogSchema, path: Path) -> list[str]:
    """The needed columns, once it is certain that all are there."""
    needed = needed_columns(schema)
    if missing := [name for name in needed if name not in found]:
        raise LogError(f"no column {missing}; the file has {found[:40]}", file=path)
    return needed


def _split(raw: RawEpisode, column: str) -> Iterator[RawEpisode]:
    """One episode per value of the episode column; a value that comes back later is an error."""
    values = raw.columns[column]
    if values.ndim != 1:
        raise LogError(
            f"the episode column '{column}' has shape {values.shape}, expected one value a row", file=raw.file
        )
    for name, array in raw.columns.items():
        if len(array) != len(values):
            raise LogError(f"'{name}' has {len(array)} rows, '{column}' has {len(values)}", file=raw.file)
    starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
    seen = set()
    for start, stop in zip(starts, [*starts[1:], len(values)], strict=True):
        value = values[start].item()
        if value in seen or value != value:
            problem = "is not a number" if value != value else "comes back after other episodes"
            raise LogError(f"episode '{value}' {problem}", file=raw.file, row=raw.first_row + int(start))
        seen.add(value)
        part = {name: array[start:stop] for name, array in raw.columns.items()}
        label = f"{value:g}" if isinstance(value, float) else str(value)
        yield RawEpisode(f"{raw.name}/{label}", raw.file, part, raw.first_row + int(start), raw.notes)


def read_csv(path: Path, schema: LogSchema) -> list[RawEpisode]:
    """CSV with one header line, UTF-8; numbers as float64 (a clock of whole numbers as int64)."""
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    data = path.read_bytes()
    header = _csv_header(data, schema.delimiter, path)
    needed = _require(header, schema, path)
    ragged: list[tuple[int | None, int]] = []

    def note_ragged(row: arrow_csv.InvalidRow) -> str:
        ragged.append((row.number, row.actual_columns))
        return "error"

    notes = () if data.endswith((b"\n", b"\r")) else (f"'{path}': the last line has no line end; it may be cut off",)
    body = data.rstrip()
    try:
        table = arrow_csv.read_csv(
            io.BytesIO(body + b"\n"),
            arrow_csv.ReadOptions(use_threads=False, column_names=header, skip_rows=1),
            arrow_csv.ParseOptions(
                delimiter=schema.delimiter, ignore_empty_lines=False, invalid_row_handler=note_ragged
            ),
            arrow_csv.ConvertOptions(
                column_types=dict.fromkeys(needed, pa.string()), include_columns=needed, strings_can_be_null=False
            ),
        )
    except pa.ArrowInvalid as error:
        if ragged:
            number, count = ragged[0]
            row = None if number is None else number - 2
            raise LogError(f"{count} cells, the header has {len(header)}", file=path, row=row) from error
        raise LogError(f"not readable as CSV: {error}", file=path) from error
    if table.num_rows == 0:
        raise LogError("a header but no rows", file=path)
    columns = {name: _csv_column(table.column(name), name, schema, path) for name in needed}
    return [RawEpisode(path.stem, str(path), columns, notes=notes)]


def _csv_header(data: bytes, delimiter: str, path: Path) -> list[str]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = data[: error.start].count(b"\n") - 1
        raise LogError(f"byte {error.start} is not UTF-8 text", file=path, row=max(row, 0)) from error
    if "\0" in text:
        row = max(text[: text.index("\0")].count("\n") - 1, 0)
        raise LogError("a NUL byte: not a text file, or a torn write", file=path, row=row)
    first = text.partition("\n")[0]
    if not first.strip():
        raise LogError("the first line is empty; expected the column names", file=path)
    header = [name.strip() for name in next(csv.reader([first.rstrip("\r")], delimiter=delimiter))]
    if doubled := sorted({name for name in header if header.count(name) > 1}):
        raise LogError(f"the header names {doubled} more than once", file=path)
    if all(_NUMBER.fullmatch(name) for name in header):
        raise LogError(f"the first line holds numbers ({first[:60]}), expected the column names", file=path)
    return header


def _csv_column(texts: pyarrow.ChunkedArray, name: str, schema: LogSchema, path: Path) -> np.ndarray:
    import pyarrow as pa

    if name == schema.episode or (name == schema.time and schema.time_unit == "utc"):
        return np.array(texts.to_pylist())
    try:
        if name == schema.time:  # nanoseconds since 1970 do not fit a float64
            try:
                return texts.cast(pa.int64()).to_numpy()
            except pa.ArrowInvalid:
                pass
        return texts.cast(pa.float64()).to_numpy()
    except pa.ArrowInvalid as error:
        for row, text in enumerate(texts.to_pylist()):
            if not _NUMBER.fullmatch(text):
                what = f"'{text[:60]}', expected a number" if text.strip() else "an empty cell"
                raise LogError(f"column '{name}' holds {what}", file=path, row=row) from error
        raise LogError(f"column '{name}': {error}", file=path) from error


Reader = Callable[[Path, LogSchema], list[RawEpisode]]
READERS: dict[str, Reader] = {".csv": read_csv}
