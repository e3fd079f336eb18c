"""One key of the configuration: a dataclass field with its unit, meaning and choices."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def key(
    default: Any, unit: str, text: str, *, choices: tuple[str, ...] = (), path: bool = False, group: str = ""
) -> Any:
    """A dataclass field with the unit and the sentence that `--help` shows."""
    metadata = {"unit": unit, "help": text, "choices": choices, "path": path, "group": group}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)
