"""The named error of everything that reads or writes logs: it always knows the file and, where one exists, the row."""

from __future__ import annotations

from pathlib import Path


class LogError(ValueError):
    """A log or its schema cannot be used. `file` is its path; `row` the data row, counted from 0, or None.

    A header is not a row: in a CSV file row 0 is line 2. In a schema `row` is the line, counted from 1.
    """

    def __init__(self, message: str, *, file: str | Path, row: int | None = None, where: str = "row") -> None:
        self.file = str(file)
        self.row = row
        place = f"'{self.file}'" if row is None else f"'{self.file}', {where} {row}"
        super().__init__(f"{place}: {message}")
