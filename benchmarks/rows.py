"""Rows of a study: a JSON list in one file, one row per line, appended one by one, so that a study can be resumed.

    where = stamp("torch")
    for name, seed in everything:
        if not present(stored(path), instance=name, seed=seed):
            append(path, measured(name, seed) | where)

The file is read again and replaced as a whole by each `append`, under a lock: a study that is stopped while writing
keeps its old rows, and two studies that write to one file keep each other's.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def stored(path: Path) -> list[Row]:
    """Rows of the file, none when there is none."""
    rows: list[Row] = json.loads(path.read_text()) if path.exists() else []
    return rows


def present(rows: list[Row], **key: object) -> bool:
    """Whether a row has these values."""
    return any(all(name in row and row[name] == value for name, value in key.items()) for row in rows)


def append(path: Path, row: Row) -> None:
    """Add a row at the end of the file; makes file and folder where they are missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # released as the folder is closed
        part = path.with_suffix(".part")
        part.write_text("[\n" + ",\n".join(json.dumps(each) for each in [*stored(path), row]) + "\n]\n")
        part.replace(path)
    finally:
        os.close(folder)


def stamp(*packages: str) -> Row:
    """Where rows come from: command, machine, versions of Python and the packages."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one used",
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }
