"""Readers of tables, over pyarrow: CSV, Parquet, and LeRobot data sets (v2.0, v2.1, v3.0) without their package."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sim2real.log_errors import LogError
from sim2real.log_schema import LogSchema
from sim2real.raw_episode import MAX_BYTES, RawEpisode, checked_array, require_columns

if TYPE_CHECKING:
    import pyarrow

_NUMBER = re.compile(r"-?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|nan|-?inf", re.IGNORECASE)
_LEROBOT_FILES = {"v2.0": "episode_*.parquet", "v2.1": "episode_*.parquet", "v3.0": "file-*.parquet"}


def read_csv(path: Path, schema: LogSchema) -> list[RawEpisode]:
    """CSV with one header line, UTF-8; numbers as float64 (a clock of whole numbers as int64)."""
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    if path.stat().st_size > MAX_BYTES:
        raise LogError(f"{path.stat().st_size} bytes; at most {MAX_BYTES} are read", file=path)
    data = path.read_bytes()
    header = _csv_header(data, schema.delimiter, path)
    needed = require_columns(header, schema, path)
    ragged: list[tuple[int | None, int]] = []

    def note_ragged(row: Any) -> str:
        ragged.append((row.number, row.actual_columns))
        return "error"

    try:
        table = arrow_csv.read_csv(
            io.BytesIO(data.rstrip() + b"\n"),
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
    notes = () if data.endswith((b"\n", b"\r")) else (f"'{path}': the last line has no line end; it may be cut off",)
    return [RawEpisode(path.stem, str(path), columns, notes=notes)]


def _csv_header(data: bytes, delimiter: str, path: Path) -> list[str]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = max(data[: error.start].count(b"\n") - 1, 0)
        raise LogError(f"byte {error.start} is not UTF-8 text", file=path, row=row) from error
    if "\0" in text:
        row = max(text[: text.index("\0")].count("\n") - 1, 0)
        raise LogError("a NUL byte: not a text file, or a torn write", file=path, row=row)
    first = text.partition("\n")[0]
    if not first.strip():
        raise LogError("the first line is empty; expected the column names", file=path)
    header = [name.strip() for name in next(csv.reader([first.rstrip("\r")], delimiter=delimiter))]
    if all(_NUMBER.fullmatch(name) for name in header):
        raise LogError(f"the first line holds numbers ({first[:60]}), expected the column names", file=path)
    if doubled := sorted({name for name in header if header.count(name) > 1}):
        raise LogError(f"the header names {doubled} more than once", file=path)
    return header


def _csv_column(texts: pyarrow.ChunkedArray, name: str, schema: LogSchema, path: Path) -> np.ndarray:
    import pyarrow as pa

    if name == schema.episode or (name == schema.time and schema.time_unit == "utc"):
        return np.array(texts.to_pylist())
    if name == schema.time and re.fullmatch(r"-?\d+", texts[0].as_py()):
        try:  # nanoseconds since 1970 do not fit a float64
            return texts.cast(pa.int64()).to_numpy()
        except pa.ArrowInvalid:
            pass  # not whole numbers throughout
    try:
        return texts.cast(pa.float64()).to_numpy()
    except pa.ArrowInvalid as error:
        for row, text in enumerate(texts.to_pylist()):
            if not _NUMBER.fullmatch(text):
                what = f"'{text[:60]}', expected a number" if text.strip() else "an empty cell"
                raise LogError(f"column '{name}' holds {what}", file=path, row=row) from error
        raise LogError(f"column '{name}': {error}", file=path) from error


def read_parquet(path: Path, schema: LogSchema) -> list[RawEpisode]:
    """One episode (or those of the schema's episode column) of a Parquet file; lists of one length are `[R, d]`."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            needed = require_columns(file.schema_arrow.names, schema, path)
            rows = file.metadata.num_rows
            if rows * 8 * len(needed) > MAX_BYTES:
                raise LogError(f"claims {rows} rows; at most {MAX_BYTES} bytes are read", file=path)
            table = file.read(columns=needed)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise LogError(f"not readable as Parquet: {error}", file=path) from error
    if table.num_rows == 0:
        raise LogError("no rows", file=path)
    columns = {name: _arrow_column(table.column(name), name, schema, path) for name in needed}
    return [RawEpisode(path.stem, str(path), columns)]


def _arrow_column(column: pyarrow.ChunkedArray, name: str, schema: LogSchema, path: Path) -> np.ndarray:
    import pyarrow as pa

    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy())[0])
        raise LogError(f"column '{name}' is empty here ({column.null_count} such rows)", file=path, row=row)
    kind = column.type
    if pa.types.is_timestamp(kind) and name == schema.time and schema.time_unit == "utc":
        return np.array(column.cast(pa.timestamp("us", "UTC"), safe=False).to_pylist())
    if pa.types.is_string(kind) and (name == schema.episode or (name == schema.time and schema.time_unit == "utc")):
        return np.array(column.to_pylist())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _list_column(column, name, path)
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise LogError(f"column '{name}' holds {kind}, expected numbers", file=path)
    return checked_array(column.to_numpy(), name, path)


def _list_column(column: pyarrow.ChunkedArray, name: str, path: Path) -> np.ndarray:
    """A column of lists of one length as `[R, d]`."""
    from pyarrow import compute

    lengths = compute.list_value_length(column).to_numpy()
    if (other := np.flatnonzero(lengths != lengths[0])).size:
        row = int(other[0])
        raise LogError(f"column '{name}' has {lengths[row]} entries, {lengths[0]} before", file=path, row=row)
    flat = compute.list_flatten(column)
    if flat.null_count:
        row = int(np.flatnonzero(flat.is_null().to_numpy())[0]) // int(lengths[0])
        raise LogError(f"column '{name}' has an empty entry", file=path, row=row)
    return checked_array(flat.to_numpy().reshape(len(lengths), -1), name, path)


def is_lerobot(folder: Path) -> bool:
    """Whether a folder is laid out as a LeRobot data set (with or without its meta data)."""
    return (folder / "meta").is_dir() or any(folder.glob("data/chunk-*"))


def read_lerobot(folder: Path, schema: LogSchema) -> list[RawEpisode]:
    """All episodes of a LeRobot folder, in the order of `episode_index`. Raises `LogError` for an incomplete copy."""
    info_file = folder / "meta" / "info.json"
    info = _read_info(info_file)
    version = info.get("codebase_version")
    if version not in _LEROBOT_FILES:
        raise LogError(f"codebase_version is {version!r}; known: {', '.join(_LEROBOT_FILES)}", file=info_file)
    files = sorted(folder.glob(f"data/chunk-*/{_LEROBOT_FILES[version]}"))
    if not files:
        raise LogError(f"no data/chunk-*/{_LEROBOT_FILES[version]} below this folder", file=folder)
    raws = [raw for file in files for raw in read_parquet(file, schema)]
    for what, found in (
        ("total_episodes", sum(len(np.unique(raw.columns[schema.episode or ""])) for raw in raws)),
        ("total_frames", sum(len(raw.columns[schema.episode or ""]) for raw in raws)),
    ):
        if what in info and info[what] != found:
            raise LogError(
                f"{what} is {info[what]!r}, the data files hold {found}: an incomplete copy?", file=info_file
            )
    return raws


def _read_info(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > 1 << 24:
            raise LogError("larger than 16 MiB", file=path)
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LogError("missing: a LeRobot folder needs it", file=path) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise LogError(f"not readable as JSON: {error}", file=path) from error
    if not isinstance(content, dict):
        raise LogError(f"expected a JSON object, got {type(content).__name__}", file=path)
    return content
