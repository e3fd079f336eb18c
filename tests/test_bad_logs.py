"""Bad and hostile logs: each file gives a `LogError` that names the file and, where it has one, the row; no code runs.

A case writes its file below `tmp_path` and returns what to load; `CANARY` is created if anything in a file is executed.
"""

from __future__ import annotations

import io as streams
import json
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from scipy import io

from sim2real.log import LogError, load_log, save_log

ROWS = 40
T = np.round(np.arange(ROWS) * 0.01, 9)
Q, U = np.sin(5 * T), np.cos(7 * T)
COLUMNS = {"t": T, "q": Q, "u": U}
SCHEMA: dict[str, Any] = {
    "time": {"column": "t", "unit": "s"},
    "signals": {"angle": {"column": "q", "unit": "rad"}},
    "actions": {"torque": {"column": "u", "unit": "N m"}},
}
PERIOD = SCHEMA | {"time": {"period": 0.01}}
CANARY = "canary"
Loaded = tuple[Any, Any]


@dataclass(frozen=True)
class Bad:
    """`build(folder) -> (path, schema)`; the error matches `match`, its row is `row`, its file contains `file`."""

    name: str
    build: Callable[[Path], Loaded]
    match: str
    row: int | None = None
    file: str = "run."


def touch(path: str) -> None:
    Path(path).touch()


class Payload:
    """Creates the canary when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return touch, (CANARY,)


def changed(name: str, row: int, value: float) -> dict[str, np.ndarray]:
    columns = {key: values.copy() for key, values in COLUMNS.items()}
    columns[name][row] = value
    return columns


def lines(columns: dict[str, np.ndarray] | None = None) -> list[str]:
    columns = columns or COLUMNS
    rows = zip(*(values.tolist() for values in columns.values()), strict=True)
    return [",".join(columns), *(",".join(map(repr, row)) for row in rows)]


def with_line(row: int, text: str) -> str:
    """The CSV with data row `row` replaced by `text`."""
    content = lines()
    content[row + 1] = text
    return "\n".join(content) + "\n"


def csv(content: str | bytes | dict[str, np.ndarray], schema: Any = SCHEMA) -> Callable[[Path], Loaded]:
    def build(folder: Path) -> Loaded:
        path = folder / "run.csv"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else "\n".join(lines(content)) + "\n")
        return path, schema

    return build


TEXT = "\n".join(lines()) + "\n"
RESAMPLED = SCHEMA | {"dt": 0.01, "resample": True}
JITTERED = COLUMNS | {"t": T + 0.002 * (np.arange(ROWS) >= 11)}
UTC = SCHEMA | {"time": {"column": "t", "unit": "utc"}}
STAMPS = [f"2026-03-29T01:{i:02d}:00" for i in range(ROWS)]


def dated(stamps: list[str]) -> str:
    return "t,q,u\n" + "".join(f"{stamp},{q},{u}\n" for stamp, q, u in zip(stamps, Q, U, strict=True))


def signal(**entry: Any) -> dict[str, Any]:
    return SCHEMA | {"signals": {"angle": {"column": "q", "unit": "rad"} | entry}}


CSV = [
    Bad("nan", csv(changed("q", 7, np.nan)), "'q' is nan", 7),
    Bad("inf", csv(changed("q", 8, np.inf)), "'q' is inf", 8),
    Bad("minus-inf-input", csv(changed("u", 9, -np.inf)), "'u' is -inf", 9),
    Bad("nan-time", csv(changed("t", 3, np.nan)), "'t' is nan", 3),
    Bad("text-in-number", csv(with_line(5, "0.05,broken,1.0")), "'q' holds 'broken'", 5),
    Bad("empty-cell", csv(with_line(6, "0.06,,1.0")), "'q' holds an empty cell", 6),
    Bad("hexadecimal", csv(with_line(6, "0.06,0x1F,1.0")), "'0x1F'", 6),
    Bad("underscore", csv(with_line(6, "0.06,1_000,1.0")), "'1_000'", 6),
    Bad("decimal-comma", csv(with_line(6, '0.06,"0,5",1.0')), "'0,5'", 6),
    Bad("complex-number", csv(with_line(6, "0.06,1+2j,1.0")), "expected a number", 6),
    Bad("boolean-word", csv(with_line(6, "0.06,true,1.0")), "'true'", 6),
    Bad("number-beyond-float64", csv(with_line(6, "0.06,1e999,1.0")), "'q'", 6),
    Bad("unit-row", csv(TEXT.replace("t,q,u\n", "t,q,u\n[s],[rad],[Nm]\n")), r"'\[s\]', expected a number", 0),
    Bad("text-in-time", csv(with_line(4, "noon,0.1,0.2")), "'noon'", 4),
    Bad("time-backwards", csv(changed("t", 12, 0.105)), "time runs backwards", 12),
    Bad("duplicate-stamp", csv(changed("t", 13, T[12])), "repeats 0.12 s", 13),
    Bad("constant-time", csv(COLUMNS | {"t": np.ones(ROWS)}, SCHEMA | {"duplicates": "first"}), "never changes", 0),
    Bad("gap", csv(COLUMNS | {"t": T + 0.5 * (np.arange(ROWS) >= 20)}), r"a gap of 0\.51 s", 20),
    Bad("gap-by-schema", csv(JITTERED, SCHEMA | {"max_gap": 0.0115}), r"a gap of 0\.012 s", 11),
    Bad("jitter", csv(JITTERED), "20.0% off the median .* set 'dt' and 'resample: true'", 11),
    Bad("jitter-without-dt", csv(JITTERED, SCHEMA | {"resample": True}), "set 'dt'", 11),
    Bad("wrong-period", csv(COLUMNS, SCHEMA | {"dt": 0.02}), r"the grid needs 0\.02 s"),
    Bad("time-in-the-wrong-unit", csv(COLUMNS, RESAMPLED | {"time": {"column": "t", "unit": "ms"}}), "0 periods", 0),
    Bad("constant-signal", csv(COLUMNS | {"q": np.full(ROWS, 0.3)}), "a dead sensor", 0),
    Bad("wrapped-angle", csv(changed("q", 21, 6.28)), "jumps from .* 'unwrap: true'", 21),
    Bad("wrong-angle-unit", csv(COLUMNS | {"q": 57.3 * Q}, signal(range=[-4, 4])), "outside its range .* unit", 2),
    Bad("encoder-glitch", csv(changed("q", 22, 99.0), signal(range=[-4, 4], unwrap=False)), "outside its range", 22),
    Bad("short-row", csv(with_line(10, "0.1,0.2")), "2 cells, the header has 3", 10),
    Bad("long-row", csv(with_line(10, "0.1,0.2,0.3,0.4")), "4 cells", 10),
    Bad("cut-mid-row", csv(TEXT[: TEXT.rindex(",")]), "2 cells", ROWS - 1),
    Bad("cut-mid-number", csv(TEXT.rpartition("0.39,")[0] + "0.3"), "1 cells", ROWS - 1),
    Bad("blank-line", csv(with_line(10, "")), "1 cells|empty", 10),
    Bad("unbalanced-quote", csv(with_line(10, '0.1,"0.2,0.3')), "2 cells", 10),
    Bad("empty", csv(b""), "0 bytes"),
    Bad("only-white-space", csv("  \n\n \n"), "first line is empty"),
    Bad("header-only", csv("t,q,u\n"), "a header but no rows"),
    Bad("one-row", csv("\n".join(lines()[:2]) + "\n"), "at least 2", 0),
    Bad("missing-column", csv(COLUMNS | {"q": Q}, signal(column="position")), r"no column \['position'\]"),
    Bad("doubled-column", csv(TEXT.replace("t,q,u", "t,q,q")), "more than once"),
    Bad("no-header", csv("\n".join(lines()[1:])), "holds numbers"),
    Bad("wrong-delimiter", csv(TEXT.replace(",", ";")), "no column"),
    Bad("not-utf8", csv(with_line(14, "0.14,0.1,µ").encode("latin-1")), "not UTF-8", 14),
    Bad("utf16", csv(TEXT.encode("utf-16")), "not UTF-8", 0),
    Bad("nul-bytes", csv(TEXT[:200].encode() + b"\0" * 64), "NUL byte", 5),
    Bad("spreadsheet", csv(b"PK\x03\x04" + bytes(range(256))), "not UTF-8", 0),
    Bad("too-short-to-smooth", csv({k: v[:8] for k, v in COLUMNS.items()}, SCHEMA | {
        "signals": SCHEMA["signals"] | {"rate": {"derivative_of": "angle"}}}), "smoothed over 11"),
    Bad("grid-longer-than-record", csv(COLUMNS, RESAMPLED | {"dt": 5.0}), "0 periods", 0),
    Bad("grid-too-fine", csv(COLUMNS, RESAMPLED | {"dt": 1e-12}), "periods of 1e-12 s", 0),
    Bad("reward-and-resampling", csv(COLUMNS, RESAMPLED | {"reward": {"column": "u"}}), "cannot be resampled"),
    Bad("episode-comes-back", csv(COLUMNS | {"e": np.repeat([0, 1, 0, 2], 10)}, SCHEMA | {"episode": {"column": "e"}}),
        "episode '0' comes back", 20),
    Bad("one-row-episode", csv(COLUMNS | {"e": np.arange(ROWS) // 39}, SCHEMA | {"episode": {"column": "e"}}),
        "at least 2", 39),
    Bad("not-a-date", csv(dated([*STAMPS[:5], "2026-02-30T00:00:00", *STAMPS[6:]]), UTC), "not a date", 5),
    Bad("clock-set-back", csv(dated([*STAMPS[:20], *STAMPS[10:30]]), UTC), "backwards", 20),
    Bad("clock-overflow", csv(COLUMNS | {"t": np.linspace(-9e18, 9e18, ROWS).astype(np.int64)},
                              SCHEMA | {"time": {"column": "t", "unit": "ns"}}), "2\\^62 ticks", ROWS - 1),
]  # fmt: skip


def two_runs(second: dict[str, np.ndarray]) -> Callable[[Path], Loaded]:
    def build(folder: Path) -> Loaded:
        (folder / "run.0.csv").write_text(TEXT)
        (folder / "run.1.csv").write_text("\n".join(lines(second)) + "\n")
        return folder, SCHEMA

    return build


def pickled(suffix: str) -> Callable[[Path], Loaded]:
    def build(folder: Path) -> Loaded:
        (folder / f"run.{suffix}").write_bytes(pickle.dumps(Payload()))
        return folder / f"run.{suffix}", SCHEMA

    return build


def made(make: Callable[[Path], None], name: str = "", schema: Any = SCHEMA) -> Callable[[Path], Loaded]:
    """`make(folder)`, then load `folder / name`."""

    def build(folder: Path) -> Loaded:
        make(folder)
        return folder / name, schema

    return build


def nothing(folder: Path) -> None:
    pass


PATHS = [
    Bad("does-not-exist", made(nothing, "run.csv"), "no such file"),
    Bad("no-match", made(nothing, "run.*.csv"), "no file matches"),
    Bad("empty-folder", made(nothing), "no logs in this folder", file=""),
    Bad("folder-without-logs", made(lambda f: (f / "notes.txt").touch()), "no logs in this folder", file=""),
    Bad("folder-named-like-a-log", made(lambda f: (f / "run.csv").mkdir(), "run.csv"), "no logs in this folder"),
    Bad("empty-list", lambda folder: ([], SCHEMA), "an empty list", file=""),
    Bad("pattern-of-the-schema", made(lambda f: (f / "a.csv").write_text(TEXT), "", SCHEMA | {"files": "b*"}),
        "no file here matches", file=""),
    Bad("no-schema", made(lambda f: (f / "run.csv").write_text(TEXT), "run.csv", None), "needs a schema"),
    Bad("unknown-suffix", made(lambda f: (f / "run.xlsx").touch(), "run.xlsx"), "unknown suffix"),
    Bad("pickle", pickled("pkl"), "unknown suffix '.pkl'"),
    Bad("torch-pickle", pickled("pt"), "unknown suffix '.pt'"),
    Bad("second-file", two_runs(changed("q", 4, np.nan)), "'q' is nan", 4, "run.1.csv"),
    Bad("second-file-slower", two_runs(COLUMNS | {"t": 2 * T}), "the median period is", None, "run."),
]  # fmt: skip


def npz(schema: Any = SCHEMA, **arrays: Any) -> Callable[[Path], Loaded]:
    def build(folder: Path) -> Loaded:
        np.savez(folder / "run.npz", **(COLUMNS | arrays))
        return folder / "run.npz", schema

    return build


def npz_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], Loaded]:
    def build(folder: Path) -> Loaded:
        np.savez(folder / "run.npz", **COLUMNS)
        (folder / "run.npz").write_bytes(change((folder / "run.npz").read_bytes()))
        return folder / "run.npz", SCHEMA

    return build


def npz_members(*members: tuple[str, bytes]) -> Callable[[Path], Loaded]:
    """An archive with the good arrays `t` and `u` and the given raw members."""

    def build(folder: Path) -> Loaded:
        np.savez(folder / "run.npz", t=T, u=U)
        with zipfile.ZipFile(folder / "run.npz", "a") as archive:
            for name, content in members:
                archive.writestr(name, content)
        return folder / "run.npz", SCHEMA

    return build


def npy(shape: str, descr: str = "'<f8'", body: bytes = b"\0" * 320, version: bytes = b"\x01\x00") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(header)) + header + body


def crafted(value: np.ndarray) -> bytes:
    stream = streams.BytesIO()
    np.lib.format.write_array(stream, value)
    return stream.getvalue()


def encrypted(data: bytes) -> bytes:
    """Set the encryption flag of each member, in local and central headers."""
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = data.find(mark)
        while start >= 0:
            data = data[: start + at] + b"\x01\x00" + data[start + at + 2 :]
            start = data.find(mark, start + 4)
    return data


NPZ = [
    Bad("npz-pickled-objects", npz(q=np.array([Payload()] * ROWS, dtype=object)), "pickled objects"),
    Bad("npz-is-a-pickle", pickled("npz"), "not readable as NPZ"),
    Bad("npz-truncated", npz_bytes(lambda data: data[: len(data) // 2]), "not readable as NPZ"),
    Bad("npz-torn", npz_bytes(lambda data: data.replace(Q.tobytes()[:64], b"\0" * 64)), "not readable as NPZ.*CRC"),
    Bad("npz-encrypted", npz_bytes(encrypted), "encrypted"),
    Bad("npz-empty", csv(b""), "0 bytes"),
    Bad("npz-huge-header", npz_members(("q.npy", npy("(1099511627776,)"))), r"claims \(1099511627776,\)"),
    Bad("npz-negative-shape", npz_members(("q.npy", npy("(-40,)"))), "claims|not readable"),
    Bad("npz-overflowing-shape", npz_members(("q.npy", npy("(4294967296, 4294967296, 8)"))), "claims"),
    Bad("npz-code-in-header", npz_members(("q.npy", npy(f"(open({CANARY!r}, 'w'),)"))), "not readable as NPZ"),
    Bad("npz-long-header", npz_members(("q.npy", npy("(" + "1," * 9000 + ")"))), "not readable as NPZ"),
    Bad("npz-no-magic", npz_members(("q.npy", b"not an array at all")), "not readable as NPZ"),
    Bad("npz-unknown-version", npz_members(("q.npy", npy("(40,)", version=b"\x07\x00"))), "npy version|version"),
    Bad("npz-void-dtype", npz_members(("q.npy", npy("(40,)", "[('a', '<f8')]"))), "expected real numbers"),
    Bad("npz-missing-array", npz_members(), "no column"),
    Bad("npz-complex", npz(q=Q + 0j), "complex128"),
    Bad("npz-text", npz(q=Q.astype(str)), "expected real numbers"),
    Bad("npz-dates", npz(q=np.arange(ROWS).astype("datetime64[s]")), "expected real numbers"),
    Bad("npz-scalar", npz(q=np.float64(1)), r"shape \(\)"),
    Bad("npz-three-dimensions", npz(q=np.zeros((ROWS, 2, 2))), r"shape \(40, 2, 2\)"),
    Bad("npz-matrix-without-index", npz(q=np.stack([Q, U], 1)), r"choose a column, 'q\[0\]'"),
    Bad("npz-index-out-of-range", npz(signal(column="q[2]"), q=np.stack([Q, U], 1)), "out of range"),
    Bad("npz-no-rows", npz(q=np.zeros(0)), "has no rows"),
    Bad("npz-short-signal", npz(q=Q[:-1]), "'q' has 39 rows, its clock has 40", 39),
    Bad("npz-short-input", npz(u=U[:-2]), "'u' has 38 rows", 38),
    Bad("npz-long-input", npz(u=np.append(U, 0)), "'u' has 41 rows", 40),
    Bad("npz-integers-too-large", npz(u=np.arange(ROWS) + 2**60), "too large to be exact", 0),
    Bad("npz-nan-in-matrix", npz(signal(column="q[1]"), q=np.stack([U, changed("q", 17, np.nan)["q"]], 1)),
        "is nan", 17),
    Bad("npz-episode-lengths", npz(SCHEMA | {"episode": {"column": "e"}}, e=np.zeros(ROWS - 1)),
        "the episode column has", 39),
    Bad("npz-reward-length", npz(SCHEMA | {"reward": {"column": "r"}}, r=np.zeros(5)), "the episode has 39 steps"),
    Bad("npz-text-clock", npz(t=T.astype(str)), "expected real numbers"),
    Bad("npz-unsigned-clock", npz(SCHEMA | {"time": {"column": "t", "unit": "ns"}},
                                  t=np.array([*range(ROWS - 1), 2**64 - 1], dtype=np.uint64)), "2\\^62 ticks", 39),
]  # fmt: skip


def h5(fill: Callable[[h5py.File], None], schema: Any = SCHEMA, name: str = "run.h5") -> Callable[[Path], Loaded]:
    def build(folder: Path) -> Loaded:
        with h5py.File(folder / "other.bin", "w") as other:
            other["q"] = Q
        with h5py.File(folder / name, "w") as file:
            fill(file)
        return folder / name, schema

    return build


def flat(q: Any) -> Callable[[h5py.File], None]:
    """The arrays t and u, and q as given: an array, or a function that creates it."""

    def fill(file: h5py.File) -> None:
        file["t"], file["u"] = T, U
        if callable(q):
            q(file)
        elif q is not None:
            file["q"] = q

    return fill


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((ROWS,), "f8")
    layout[:] = h5py.VirtualSource("other.bin", "q", (ROWS,))
    file.create_virtual_dataset("q", layout)


def objects(file: h5py.File) -> None:
    file.create_dataset("q", (ROWS,), dtype=h5py.vlen_dtype(np.float64))


def demos(rows: int = ROWS, actions: int = ROWS, samples: int | None = None, skip: bool = False) -> Any:
    """robomimic with a good demo_0 and a demo_1 as given."""

    def fill(file: h5py.File) -> None:
        for i in range(2):
            demo = file.create_group(f"data/demo_{i}")
            demo["obs/q"] = Q[: rows if i else ROWS]
            if not (i and skip):
                demo["actions"] = U[: actions if i else ROWS]
            demo.attrs["num_samples"] = samples if i and samples is not None else len(demo["obs/q"])

    return fill


DEMO = {
    "time": {"period": 0.01},
    "signals": {"angle": {"column": "obs/q", "unit": "rad"}},
    "actions": {"torque": {"column": "actions", "unit": "N m"}},
}


def d4rl(file: h5py.File) -> None:
    file["q"], file["u"], file["terminals"] = Q, U, np.zeros(ROWS - 3, dtype=bool)


def cut(name: str, fill: Callable[[h5py.File], None], keep: float) -> Callable[[Path], Loaded]:
    def build(folder: Path) -> Loaded:
        path, schema = h5(fill, name=name)(folder)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
        return path, schema

    return build


HDF5 = [
    Bad("h5-truncated", cut("run.h5", flat(Q), 0.6), "not readable as HDF5"),
    Bad("h5-is-text", made(lambda f: (f / "run.h5").write_text(TEXT), "run.h5"), "not readable as HDF5"),
    Bad("h5-is-a-pickle", pickled("hdf5"), "not readable as HDF5"),
    Bad("h5-missing", h5(flat(None)), "no column 'q'"),
    Bad("h5-external-link", h5(flat(lambda f: f.__setitem__("q", h5py.ExternalLink("other.bin", "/q")))), "link"),
    Bad("h5-soft-link", h5(flat(lambda f: f.__setitem__("q", h5py.SoftLink("/nowhere")))), "link"),
    Bad("h5-link-loop", h5(flat(lambda f: f.__setitem__("q", h5py.SoftLink("/q")))), "link"),
    Bad("h5-virtual", h5(flat(virtual)), "in another file"),
    Bad("h5-external-storage", h5(flat(lambda f: f.create_dataset(
        "q", (ROWS,), "f8", external=[("other.bin", 0, 8 * ROWS)]))), "in another file"),
    Bad("h5-objects", h5(flat(objects)), "expected an array of real numbers"),
    Bad("h5-text", h5(flat(lambda f: f.create_dataset("q", data=["a"] * ROWS))), "expected an array of real numbers"),
    Bad("h5-compound", h5(flat(np.zeros(ROWS, dtype=[("a", "f8")]))), "expected an array of real numbers"),
    Bad("h5-group", h5(flat(lambda f: f.create_group("q/inner"))), "is a group"),
    Bad("h5-below-an-array", h5(flat(Q), signal(column="q/x")), "no column 'q/x'"),
    Bad("h5-no-space", h5(flat(lambda f: f.create_dataset("q", data=h5py.Empty("f8")))), "expected an array"),
    Bad("h5-never-written", h5(flat(lambda f: f.create_dataset("q", (ROWS,), "f8"))), "never written"),
    Bad("h5-huge", h5(flat(lambda f: f.create_dataset("q", (2**40,), "f8", chunks=(1024,)))), "at most"),
    Bad("h5-nan", h5(flat(changed("q", 19, np.nan)["q"])), "'q' is nan", 19),
    Bad("robomimic-few-actions", h5(demos(actions=30), DEMO), "'actions' has 30 rows", 30, "run.h5:data/demo_1"),
    Bad("robomimic-few-observations", h5(demos(rows=30), DEMO), "40 rows, its num_samples says 30", 30),
    Bad("robomimic-num-samples", h5(demos(samples=50), DEMO), "num_samples says 50", 40),
    Bad("robomimic-no-actions", h5(demos(skip=True), DEMO), "no column 'actions'; '/data/demo_1' has"),
    Bad("d4rl-few-terminals", h5(d4rl, PERIOD), "terminals and timeouts have 37", 37),
]  # fmt: skip


def table(columns: dict[str, Any], schema: Any = SCHEMA) -> Callable[[Path], Loaded]:
    def build(folder: Path) -> Loaded:
        parquet.write_table(pa.table(COLUMNS | columns), folder / "run.parquet")
        return folder / "run.parquet", schema

    return build


def parquet_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], Loaded]:
    def build(folder: Path) -> Loaded:
        path, schema = table({})(folder)
        path.write_bytes(change(path.read_bytes()))
        return path, schema

    return build


def saved(change: Callable[[dict[str, Any]], Any], rows: int = ROWS, **columns: Any) -> Callable[[Path], Loaded]:
    """A file of `save_log` whose description, number of rows or columns were changed afterwards."""

    def build(folder: Path) -> Loaded:
        path, schema = table({})(folder)
        save_log(load_log(path, schema), path)
        whole = parquet.read_table(path)
        about = json.loads(whole.schema.metadata[b"sim2real.log"])
        about = change(about) or about
        text = about if isinstance(about, str) else json.dumps(about)
        for name, values in columns.items():
            name = name.replace("__", ".")
            whole = whole.set_column(whole.column_names.index(name), name, pa.array(values))
        parquet.write_table(whole.slice(0, rows).replace_schema_metadata({b"sim2real.log": text}), path)
        return path, None

    return build


LISTS = [[q, u] for q, u in zip(Q.tolist(), U.tolist(), strict=True)]
PARQUET = [
    Bad("parquet-truncated", parquet_bytes(lambda data: data[:-40]), "not readable as Parquet"),
    Bad("parquet-head-only", parquet_bytes(lambda data: data[:4]), "not readable as Parquet"),
    Bad("parquet-torn", parquet_bytes(lambda data: data[:4] + b"\xff" * 600 + data[604:]), "not readable as Parquet"),
    Bad("parquet-is-text", made(lambda f: (f / "run.parquet").write_text(TEXT), "run.parquet"), "not readable"),
    Bad("parquet-text-no-schema", made(lambda f: (f / "run.parquet").write_text(TEXT), "run.parquet", None),
        "not readable"),
    Bad("parquet-null", table({"q": pa.array([None if i == 23 else i for i in range(ROWS)])}), "is empty here", 23),
    Bad("parquet-text", table({"q": pa.array(["x"] * ROWS)}), "holds string"),
    Bad("parquet-decimal", table({"q": pa.array([1] * ROWS, pa.decimal128(9, 2))}), "holds decimal"),
    Bad("parquet-nan", table({"q": changed("q", 24, np.nan)["q"]}), "'q' is nan", 24),
    Bad("parquet-lists-of-different-length", table({"q": [*LISTS[:9], [1.0], *LISTS[10:]]}, signal(column="q[0]")),
        "has 1 entries, 2 before", 9),
    Bad("parquet-null-in-list", table({"q": [*LISTS[:9], [1.0, None], *LISTS[10:]]}, signal(column="q[0]")),
        "an empty entry", 9),
    Bad("parquet-lists-of-text", table({"q": [["a"]] * ROWS}, signal(column="q[0]")), "expected real numbers"),
    Bad("parquet-list-without-index", table({"q": LISTS}), "choose a column"),
    Bad("parquet-missing", table({}, signal(column="position")), "no column"),
    Bad("parquet-no-rows", made(lambda f: parquet.write_table(
        pa.table({name: values[:0] for name, values in COLUMNS.items()}), f / "run.parquet"), "run.parquet"),
        "no rows"),
    Bad("parquet-episode-is-nan", table({"e": np.where(np.arange(ROWS) < 20, 0.0, np.nan)},
                                        SCHEMA | {"episode": {"column": "e"}}), "is not a number", 20),
    Bad("parquet-episode-is-a-list", table({"e": LISTS}, SCHEMA | {"episode": {"column": "e"}}), "one value a row"),
    Bad("saved-torn-description", saved(lambda about: "{"), "changed or of a later version"),
    Bad("saved-not-an-object", saved(lambda about: "[1]"), "changed or of a later version"),
    Bad("saved-later-version", saved(lambda about: about.update(version=99)), "version 99"),
    Bad("saved-rows-lost", saved(lambda about: None, rows=30), "30 rows for 1 episodes"),
    Bad("saved-no-name", saved(lambda about: about.pop("names")), "KeyError"),
    Bad("saved-other-name", saved(lambda about: about["names"].update(signal=["speed"])), "speed"),
    Bad("saved-episodes", saved(lambda about: about["names"].update(episode=["a", "b"])), "1 episodes are named"),
    Bad("saved-period", saved(lambda about: about.update(dt="nan")), "dt = nan"),
    Bad("saved-hold", saved(lambda about: about.update(hold="cubic")), "hold = cubic"),
    Bad("saved-nan", saved(lambda about: None, signal__angle=changed("q", 25, np.nan)["q"]), "not finite", 25),
]  # fmt: skip

STATE = {
    "time": {"column": "timestamp", "unit": "s"},
    "signals": {"angle": {"column": "observation.state[0]", "unit": "rad"}},
    "actions": {"torque": {"column": "action[0]", "unit": "N m"}},
}


def lerobot(info: Any, files: bool = True) -> Callable[[Path], Loaded]:
    def build(folder: Path) -> Loaded:
        data = folder / "data" / "chunk-000"
        data.mkdir(parents=True)
        if info is not None:
            (folder / "meta").mkdir()
            (folder / "meta" / "info.json").write_text(info if isinstance(info, str) else json.dumps(info))
        columns = {"timestamp": T, "observation.state": LISTS, "action": LISTS, "episode_index": [0] * ROWS}
        if files:
            parquet.write_table(pa.table(columns), data / "episode_000000.parquet")
        return folder, STATE

    return build


LEROBOT = [
    Bad("lerobot-no-meta", lerobot(None), "missing: a LeRobot folder needs it", file="info.json"),
    Bad("lerobot-old-version", lerobot({"codebase_version": "v1.6"}), "'v1.6'; known", file="info.json"),
    Bad("lerobot-no-version", lerobot({}), "codebase_version is None", file="info.json"),
    Bad("lerobot-other-layout", lerobot({"codebase_version": "v3.0"}), "no data/chunk", file=""),
    Bad("lerobot-no-data", lerobot({"codebase_version": "v2.1"}, files=False), "no data/chunk", file=""),
    Bad("lerobot-torn-json", lerobot('{"codebase_version": "v2.'), "not readable as JSON", file="info.json"),
    Bad("lerobot-json-list", lerobot([1, 2]), "expected a JSON object", file="info.json"),
    Bad("lerobot-nested-json", lerobot("[" * 100_000), "not readable as JSON", file="info.json"),
    Bad("lerobot-huge-json", lerobot(" " * (1 << 24) + "{}"), "larger than 16 MiB", file="info.json"),
    Bad("lerobot-episodes-lost", lerobot({"codebase_version": "v2.1", "total_episodes": 3}), "total_episodes is 3",
        file="info.json"),
    Bad("lerobot-rows-lost", lerobot({"codebase_version": "v2.1", "total_frames": 80}), "total_frames is 80",
        file="info.json"),
]  # fmt: skip


def mat(schema: Any = SCHEMA, **variables: Any) -> Callable[[Path], Loaded]:
    def build(folder: Path) -> Loaded:
        io.savemat(folder / "run.mat", COLUMNS | variables)
        return folder / "run.mat", schema

    return build


def mat_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], Loaded]:
    def build(folder: Path) -> Loaded:
        io.savemat(folder / "run.mat", COLUMNS)
        (folder / "run.mat").write_bytes(change((folder / "run.mat").read_bytes()))
        return folder / "run.mat", SCHEMA

    return build


MAT = [
    Bad("mat-truncated", mat_bytes(lambda data: data[:-40]), "not readable as a MATLAB"),
    Bad("mat-half", mat_bytes(lambda data: data[: len(data) // 2]), "not readable as a MATLAB"),
    Bad("mat-header-only", mat_bytes(lambda data: data[:128]), "no variable"),
    Bad("mat-torn-header", mat_bytes(lambda data: data[:140] + b"\xff" * 40 + data[180:]), "not readable as a MATLAB"),
    Bad("mat-torn-values", mat_bytes(lambda data: data[:300] + b"\xff" * 40 + data[340:]), "'t' is nan", 14),
    Bad("mat-is-text", made(lambda f: (f / "run.mat").write_text(TEXT), "run.mat"), "not readable as a MATLAB"),
    Bad("mat-is-a-pickle", pickled("mat"), "not readable as a MATLAB"),
    Bad("mat-missing", mat(signal(column="position")), "no variable"),
    Bad("mat-cell", mat(q=np.array([1, "a"], dtype=object)), "expected real numbers"),
    Bad("mat-text", mat(q="hello"), "expected real numbers"),
    Bad("mat-three-dimensions", mat(q=np.zeros((4, 5, 2))), "shape"),
    Bad("mat-empty", mat(q=np.zeros((0, 0))), "has no rows"),
    Bad("mat-no-field", mat(signal(column="log/q"), log={"x": Q}), "no struct field 'q'"),
    Bad("mat-struct", mat(log={"x": Q}, schema=signal(column="log")), "expected real numbers"),
    Bad("mat-nan", mat(q=changed("q", 29, np.nan)["q"]), "'q' is nan", 29),
    Bad("mat73-truncated", cut("run.mat", flat(Q), 0.6), "not readable as a MATLAB"),
]  # fmt: skip


def element(kind: int, content: bytes) -> bytes:
    return struct.pack("<II", kind, len(content)) + content + b"\0" * (-len(content) % 8)


def matrix(name: bytes, class_: int, *parts: bytes, shape: tuple[int, ...] = (ROWS, 1)) -> bytes:
    """A MAT level 5 variable of raw parts."""
    flags = element(6, struct.pack("<II", class_, 0))
    head = flags + element(5, struct.pack(f"<{len(shape)}i", *shape)) + element(1, name)
    return element(14, head + b"".join(parts))


def mat_variables(*variables: bytes) -> Callable[[Path], Loaded]:
    """Good variables t and u, then raw ones."""

    def build(folder: Path) -> Loaded:
        path = folder / "run.mat"
        io.savemat(path, {"t": T, "u": U})
        path.write_bytes(path.read_bytes() + b"".join(variables))
        return path, SCHEMA

    return build


def inside_out(depth: int) -> bytes:
    """Structs nested `depth` deep."""
    value = matrix(b"", 6, element(9, b"\0" * 8), shape=(1, 1))
    for _ in range(depth):
        value = matrix(b"q", 2, element(5, struct.pack("<i", 8)), element(1, b"inside\0\0"), value, shape=(1, 1))
    return value


Q_PART = element(9, Q.tobytes())
MAT5 = [
    Bad("mat5-unknown-element", mat_variables(element(9, Q.tobytes())), "type 9 where a variable should be"),
    Bad("mat5-twice", mat_variables(matrix(b"t", 6, Q_PART)), "'t' is there twice"),
    Bad("mat5-unknown-numbers", mat_variables(matrix(b"q", 6, element(77, Q.tobytes()))), "type 77 where numbers"),
    Bad("mat5-negative-shape", mat_variables(matrix(b"q", 6, Q_PART, shape=(-1, 40))), "shape"),
    Bad("mat5-one-dimension", mat_variables(matrix(b"q", 6, Q_PART, shape=(40,))), "shape"),
    Bad("mat5-few-values", mat_variables(matrix(b"q", 6, Q_PART, shape=(41, 1))), "41, 1\\) but 40 values"),
    Bad("mat5-no-values", mat_variables(matrix(b"q", 6)), "but 0 values"),
    Bad("mat5-name-not-utf8", mat_variables(matrix(b"\xff", 6, Q_PART)), "not readable as a MATLAB"),
    Bad("mat5-empty-variable", mat_variables(element(14, b"")), "no variable"),
    Bad("mat5-short-tag", mat_variables(matrix(b"q", 6, Q_PART)[:-300] + b"\0" * 3), "not readable as a MATLAB"),
    Bad("mat5-large-short-form", mat_variables(struct.pack("<II", 9 << 16 | 14, 0)), "claims 9 bytes"),
    Bad("mat5-nested", mat_variables(inside_out(40)), "nested deeper"),
    Bad("mat5-field-names", mat_variables(matrix(b"q", 2, element(5, struct.pack("<i", 8)), element(1, b"ab"),
                                                 matrix(b"", 6, Q_PART), shape=(1, 1))), "bytes of names"),
    Bad("mat5-packed-bomb", mat_variables(element(15, zlib.compress(matrix(b"q", 6, Q_PART))[:-9])), "cut off"),
    Bad("mat5-complex", mat(q=Q + 1j), "expected real numbers"),
    Bad("mat5-level-4", made(lambda f: io.savemat(f / "run.mat", COLUMNS, format="4"), "run.mat"), "no MAT level 5"),
]  # fmt: skip


def yaml(text: str | bytes, overrides: str = "") -> Callable[[Path], Loaded]:
    """A good CSV with a bad schema beside it."""

    def build(folder: Path) -> Loaded:
        (folder / "run.csv").write_text(TEXT)
        content = text if isinstance(text, bytes) else text.encode()
        (folder / "run.yaml").write_bytes(content)
        return folder / "run.csv", None

    return build


def mapped(**changes: Any) -> Callable[[Path], Loaded]:
    return csv(TEXT, {key: value for key, value in (SCHEMA | changes).items() if value != "absent"})


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
SCHEMAS = [
    Bad("yaml-python-call", yaml(f"time: !!python/object/apply:os.mkdir [{CANARY}]\n"), "plain YAML", 1, "run.yaml"),
    Bad("yaml-python-new", yaml("time:\n  column: !!python/object/new:os.system [touch canary]\n"), "plain YAML", 2,
        "run.yaml"),
    Bad("yaml-python-name", yaml("signals: !!python/name:os.system ''\n"), "plain YAML", 1, "run.yaml"),
    Bad("yaml-unknown-tag", yaml("a: 1\nsignals: !robot {}\n"), "plain YAML", 2, "run.yaml"),
    Bad("yaml-alias-bomb", yaml(BOMB), "aliases are not allowed", 2, "run.yaml"),
    Bad("yaml-merge-alias", yaml("a: &a {x: 1}\nb:\n  <<: *a\n"), "aliases are not allowed", 3, "run.yaml"),
    Bad("yaml-deep", yaml("a: " + "[" * 5000), "nested deeper", 1, "run.yaml"),
    Bad("yaml-large", yaml("# " + "x" * (1 << 20)), "at most 1048576", None, "run.yaml"),
    Bad("yaml-doubled-key", yaml("dt: 0.1\nhold: linear\ndt: 0.2\n"), "'dt' is given twice", 3, "run.yaml"),
    Bad("yaml-doubled-nested-key", yaml("list:\n  - {a: 1, a: 2}\n"), "'a' is given twice", 2, "run.yaml"),
    Bad("yaml-syntax", yaml("time: {column: t\nsignals: [\n"), "plain YAML", 2, "run.yaml"),
    Bad("yaml-tab", yaml("time:\n\tcolumn: t\n"), "plain YAML", 2, "run.yaml"),
    Bad("yaml-two-documents", yaml("dt: 1\n---\ndt: 2\n"), "plain YAML", 2, "run.yaml"),
    Bad("yaml-impossible-date", yaml("dt: 2026-13-45\n"), "plain YAML|month", None, "run.yaml"),
    Bad("yaml-empty", yaml(""), "a schema is a mapping", None, "run.yaml"),
    Bad("yaml-list", yaml("- time\n- signals\n"), "a schema is a mapping", None, "run.yaml"),
    Bad("yaml-not-utf8", yaml("time: µ".encode("latin-1")), "not UTF-8", None, "run.yaml"),
    Bad("schema-not-found", csv(TEXT, "nowhere.yaml"), "cannot read the schema", None, "nowhere.yaml"),
    Bad("schema-unknown-key", mapped(sampling=3), r"unknown keys \['sampling'\]"),
    Bad("schema-no-time", mapped(time="absent"), "'time' needs either"),
    Bad("schema-two-clocks", mapped(time={"column": "t", "period": 0.1}), "'time' needs either"),
    Bad("schema-time-is-text", mapped(time="t"), "'time' must map names"),
    Bad("schema-time-unit", mapped(time={"column": "t", "unit": "rad"}), "no unit of time"),
    Bad("schema-period", mapped(time={"period": -1}), "above 0"),
    Bad("schema-no-signals", mapped(signals={}), "'signals' is empty"),
    Bad("schema-signal-is-text", mapped(signals={"angle": "q"}), r"'signals\.angle' must map"),
    Bad("schema-signal-key", mapped(signals={"angle": {"colum": "q", "unit": "rad"}}), r"unknown keys \['colum'\]"),
    Bad("schema-no-column", mapped(signals={"angle": {"unit": "rad"}}), "needs 'column'"),
    Bad("schema-no-unit", mapped(signals={"angle": {"column": "q"}}), "needs 'unit'"),
    Bad("schema-unknown-unit", mapped(signals={"angle": {"column": "q", "unit": "furlong"}}),
        "unknown unit 'furlong'; kept as they are: s, rad"),
    Bad("schema-name-twice", mapped(actions={"angle": {"column": "u", "unit": "N m"}}), "must be distinct"),
    Bad("schema-derivative-of-nothing", mapped(signals=SCHEMA["signals"] | {"w": {"derivative_of": "speed"}}),
        "recorded signals"),
    Bad("schema-derivative-as-input", mapped(actions={"w": {"derivative_of": "angle"}}), "for signals only"),
    Bad("schema-even-window", mapped(signals=SCHEMA["signals"] | {"w": {"derivative_of": "angle", "window": 10}}),
        "window must be odd"),
    Bad("schema-range", mapped(signals={"angle": {"column": "q", "unit": "rad", "range": [1, -1]}}), "low < high"),
    Bad("schema-flag", mapped(signals={"angle": {"column": "q", "unit": "rad", "unwrap": "yes"}}), "true or false"),
    Bad("schema-column-type", mapped(signals={"angle": {"column": ["q"], "unit": "rad"}}), "must be text"),
    Bad("schema-hold", mapped(hold="cubic"), "choose one of"),
    Bad("schema-dt-zero", mapped(dt=0), "above 0"),
    Bad("schema-dt-nan", mapped(dt=float("nan")), "finite number"),
    Bad("schema-dt-text", mapped(dt="fast"), "finite number"),
    Bad("schema-dt-flag", mapped(dt=True), "finite number"),
    Bad("schema-resample", mapped(resample="maybe"), "true or false"),
    Bad("schema-delimiter", mapped(delimiter="::"), "one character"),
    Bad("schema-reward", mapped(reward={}), "'reward' needs 'column'"),
    Bad("schema-episode", mapped(episode="e"), "'episode' must map"),
    Bad("schema-clocks-of-inputs", mapped(actions={"a": {"column": "u", "unit": "N m"}, "b": {
        "column": "u", "unit": "N m", "time": "t2"}}), "share one clock"),
]  # fmt: skip

CASES = CSV + PATHS + NPZ + HDF5 + PARQUET + LEROBOT + MAT + MAT5 + SCHEMAS


def test_there_are_enough_distinct_cases() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert len(CASES) >= 200


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_log(case: Bad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "log"
    folder.mkdir()
    path, schema = case.build(folder)
    before = sorted(os.listdir(folder))
    with pytest.raises(LogError, match=case.match) as caught:
        load_log(path, schema)
    error = caught.value
    assert error.row == case.row
    assert case.file in error.file
    assert error.file in str(error)
    if error.row is not None:
        assert str(error.row) in str(error)
    assert not (tmp_path / CANARY).exists()
    assert sorted(os.listdir(folder)) == before


@pytest.mark.parametrize("suffix", ["npz", "h5", "parquet", "mat", "csv"])
def test_files_that_unpack_to_too_much_are_refused_before_memory_is_taken(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zeros = np.zeros(1 << 18)  # 2 MiB that pack to a few kB; the limit is lowered to 1 MiB
    for module in ("log_arrays", "log_tables"):
        monkeypatch.setattr(f"sim2real.{module}.MAX_BYTES", 1 << 20)
    path = tmp_path / f"run.{suffix}"
    if suffix == "npz":
        np.savez_compressed(path, t=zeros, q=zeros, u=zeros)
    elif suffix == "h5":
        with h5py.File(path, "w") as file:
            for name in "tqu":
                file.create_dataset(name, data=zeros, compression="gzip")
    elif suffix == "parquet":
        parquet.write_table(pa.table({"t": zeros, "q": zeros, "u": zeros}), path)
    elif suffix == "mat":
        io.savemat(path, {"t": zeros, "q": zeros, "u": zeros}, do_compression=True)
    else:
        path.write_text("t,q,u\n" + "0,0,0\n" * (1 << 18))
    with pytest.raises(LogError, match="at most 1048576"):
        load_log(path, SCHEMA)


@pytest.mark.parametrize("suffix", ["csv", "npz", "mat", "packed.mat", "parquet"])
def test_random_damage_is_named_or_harmless(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"run.{suffix}"
    if suffix == "csv":
        path.write_text(TEXT)
    elif suffix == "npz":
        np.savez(path, **COLUMNS)
    elif suffix == "parquet":
        parquet.write_table(pa.table(COLUMNS), path)
    else:
        io.savemat(path, COLUMNS, do_compression=suffix == "packed.mat")
    whole, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for kind in np.arange(60) % 3:
        data, at = bytearray(whole), int(rng.integers(len(whole)))
        if kind == 0:
            for i in rng.integers(len(whole), size=4):
                data[i] = rng.integers(256)
        else:
            del data[at : at + 100 if kind == 1 else None]
        path.write_bytes(data)
        try:
            load_log(path, SCHEMA)
        except LogError:
            refused += 1
    assert refused >= 40  # the rest hit padding or digits, or cut a text file at the end of a line


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("dt", "not of the form"),
        ("=3", "not of the form"),
        ("time.column.name=x", "holds no keys"),
        ("dt=!!python/object/apply:os.mkdir [canary]", "plain YAML"),
        ("dt=[1", "plain YAML"),
        ("signals.angle.unit=furlong", "unknown unit"),
    ],
)
def test_bad_overrides(override: str, match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path, schema = csv(TEXT)(tmp_path)
    with pytest.raises(LogError, match=match):
        load_log(path, schema, overrides=[override])
    assert not (tmp_path / CANARY).exists()


@pytest.mark.parametrize("dt", [0.0, -0.1, float("nan"), float("inf")])
def test_a_period_that_is_none(dt: float, tmp_path: Path) -> None:
    path, schema = csv(TEXT)(tmp_path)
    with pytest.raises(ValueError, match="dt must be a finite period"):
        load_log(path, schema, dt=dt)


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, schema = csv(TEXT)(tmp_path)

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)  # tests may run as root, whom no mode bits stop
    with pytest.raises(LogError, match=r"cannot be read: .*Permission denied"):
        load_log(path, schema)


def test_a_saved_log_takes_no_overrides(tmp_path: Path) -> None:
    path, schema = csv(TEXT)(tmp_path)
    save_log(load_log(path, schema), tmp_path / "saved.parquet")
    for options in ({"dt": 0.1}, {"overrides": ["dt=0.1"]}):
        with pytest.raises(LogError, match="do not apply"):
            load_log(tmp_path / "saved.parquet", **options)  # type: ignore[arg-type]


def test_a_constant_signal_is_allowed_only_when_the_schema_says_so(tmp_path: Path) -> None:
    path, _ = csv(COLUMNS | {"q": np.full(ROWS, 0.3)})(tmp_path)
    log = load_log(path, signal(allow_constant=True))
    assert (log.signals == 0.3).all()


def test_a_last_line_without_line_end_is_noted(tmp_path: Path) -> None:
    path, schema = csv(TEXT.rstrip())(tmp_path)
    assert "may be cut off" in load_log(path, schema).notes[0]
