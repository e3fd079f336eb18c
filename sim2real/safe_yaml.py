"""Plain YAML from anywhere: no tags, no aliases, no duplicate keys, at most 1 MiB and 16 levels deep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from sim2real.log_errors import LogError

_MAX_BYTES = 1 << 20
_MAX_DEPTH = 16


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping, as a dictionary. Raises `LogError` with the line."""
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise LogError(f"a schema of {size} bytes; at most {_MAX_BYTES} are read", file=path)
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise LogError(f"the schema is not UTF-8 text: {error}", file=path) from error
    except OSError as error:
        raise LogError(f"cannot read the schema: {error.strerror}", file=path) from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> dict[str, Any]:
    """A YAML mapping as a dictionary; `source` names it in errors. Raises `LogError` with the line."""
    try:
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            line = event.start_mark.line + 1
            if isinstance(event, yaml.AliasEvent):
                raise LogError("YAML aliases are not allowed in a schema", file=source, row=line, where="line")
            if depth > _MAX_DEPTH:
                raise LogError(f"nested deeper than {_MAX_DEPTH} levels", file=source, row=line, where="line")
        _check_keys(yaml.compose(text, yaml.SafeLoader), source)
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = None if mark is None else mark.line + 1
        problem = getattr(error, "problem", None) or str(error)
        raise LogError(f"not a plain YAML schema: {problem}", file=source, row=line, where="line") from error
    except ValueError as error:  # e.g. an impossible date, which PyYAML lets through
        if isinstance(error, LogError):
            raise
        raise LogError(f"not a plain YAML schema: {error}", file=source) from error
    if not isinstance(content, dict):
        raise LogError(f"a schema is a mapping of keys, got {type(content).__name__}", file=source)
    return content


def _check_keys(node: yaml.Node | None, source: str) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise LogError(f"the key '{key.value}' is given twice", file=source, row=line, where="line")
            seen.add(key.value)
            _check_keys(value, source)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_keys(value, source)
