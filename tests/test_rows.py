"""Rows of studies: appended, found again, kept when two processes write or one is stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from benchmarks.rows import append, present, stamp, stored

WRITER = """
import sys
from pathlib import Path
from benchmarks.rows import append
for k in range(40):
    append(Path(sys.argv[1]), {"writer": sys.argv[2], "k": k})
"""


def test_rows_are_appended_in_order(tmp_path: Path) -> None:
    file = tmp_path / "new" / "rows.json"
    assert stored(file) == []
    append(file, {"instance": "a", "seed": 0})
    append(file, {"instance": "a", "seed": 1})
    assert [row["seed"] for row in stored(file)] == [0, 1]
    assert len(file.read_text().splitlines()) == 4  # brackets and a line per row
    assert present(stored(file), instance="a", seed=1)
    assert not present(stored(file), instance="a", seed=2)
    assert not present(stored(file), other=None)
    assert [each.name for each in file.parent.iterdir()] == ["rows.json"]


def test_two_writers_keep_each_others_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(file), name], cwd=Path(__file__).parents[1])
        for name in ("one", "two")
    ]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    rows = stored(file)
    for name in ("one", "two"):
        assert [row["k"] for row in rows if row["writer"] == name] == list(range(40))


def test_a_row_that_cannot_be_written_leaves_the_file(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    append(file, {"a": 1})
    with pytest.raises(TypeError):
        append(file, {"a": object()})
    assert stored(file) == [{"a": 1}]


def test_the_stamp_says_where_rows_come_from() -> None:
    found = stamp("torch")
    assert found["versions"]["torch"] == version("torch")
    assert found["command"].startswith("python ")
    assert "cores" in found["machine"]
    json.dumps(found)
