"""`params.json`: parameter values with units, intervals, nuisance and provenance, checked on reading.

The JSON is the file people read and edit; `params.safetensors` beside it holds the same values for machines. Both are
functions of the result alone (no clock, no host), so an interrupted and resumed run writes the same bytes.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from sim2real.checkpoint import write_atomic
from sim2real.params import Params

FORMAT, VERSION = "sim2real-params", 1


class ParameterFileError(ValueError):
    """A parameter file cannot be used; the message names the file, the place in it and what was expected there."""


@dataclass(frozen=True)
class ParameterSet:
    """Everything `params.json` holds. `parameters[name]` is one table row: value, unit, low, high, prior, flags."""

    kind: str
    """"fit", "tune" or "given" """
    model: dict[str, Any]
    """`_target_` and the arguments that rebuild the model"""
    parameters: dict[str, dict[str, Any]]
    nuisance: dict[str, dict[str, Any]] = field(default_factory=dict)
    """delay (s), sensor zeros and the like: value, unit, and the episodes of per-run values"""
    report: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)
    """log and its SHA-256, library versions, command, seed, configuration"""


def theta_of(parameters: ParameterSet, *, dtype: torch.dtype = torch.float64) -> Params:
    """The parameter values as tensors."""
    return {name: torch.tensor(row["value"], dtype=dtype) for name, row in parameters.parameters.items()}


def nuisance_of(parameters: ParameterSet, *, dtype: torch.dtype = torch.float64) -> Params:
    """The nuisance values as tensors."""
    return {name: torch.tensor(row["value"], dtype=dtype) for name, row in parameters.nuisance.items()}


def write_parameters(folder: Path, parameters: ParameterSet) -> None:
    """Write `params.json` and `params.safetensors` into `folder`, each atomically. Raises `OSError`."""
    document = {"format": FORMAT, "version": VERSION, **vars(parameters), "notes": list(parameters.notes)}
    text = json.dumps(finite_json(document), indent=1, ensure_ascii=False, allow_nan=False)
    tensors = {f"theta/{name}": value for name, value in theta_of(parameters).items()}
    tensors |= {f"nuisance/{name}": value for name, value in nuisance_of(parameters).items()}
    write_atomic(folder / "params.safetensors", save(tensors))
    write_atomic(folder / "params.json", text.encode() + b"\n")


def read_parameters(path: Path | str) -> ParameterSet:
    """Read and check a `params.json` (or the folder that holds one).

    Raises `ParameterFileError` for anything that is not such a file or cannot be read.
    """
    path = Path(path)
    path = path / "params.json" if path.is_dir() else path
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ParameterFileError(f"'{path}' cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ParameterFileError(
            f"'{path}' is not JSON ({error}); pass the params.json that `sim2real` wrote"
        ) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ParameterFileError(f"'{path}' is not a {FORMAT} file; pass the params.json that `sim2real` wrote")
    if document.get("version") != VERSION:
        raise ParameterFileError(f"'{path}' has version {document.get('version')!r}; this sim2real reads {VERSION}")
    for key, kind in (("kind", str), ("model", dict), ("parameters", dict), ("nuisance", dict), ("report", dict)):
        _expect(path, document, key, kind)
    _expect(path, document, "notes", list)
    _expect(path, document, "provenance", dict)
    if not isinstance(document["model"].get("_target_"), str):
        raise ParameterFileError(f"'{path}', model._target_: expected a dotted path to a function")
    if not document["parameters"]:
        raise ParameterFileError(f"'{path}', parameters: expected at least one")
    for group in ("parameters", "nuisance"):
        for name, row in document[group].items():
            _check_row(path, f"{group}.{name}", row)
    fields = {key: document[key] for key in ("kind", "model", "parameters", "nuisance", "report", "provenance")}
    return ParameterSet(**fields, notes=tuple(document["notes"]))


def finite_json(value: Any) -> Any:
    """Copy of a JSON-like value: tuples as lists, infinite and undefined numbers as null (JSON has none)."""
    if isinstance(value, dict):
        return {str(key): finite_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _expect(path: Path, document: dict[str, Any], key: str, kind: type) -> None:
    if not isinstance(document.get(key), kind):
        got = type(document[key]).__name__ if key in document else "nothing"
        raise ParameterFileError(f"'{path}', {key}: expected {kind.__name__}, found {got}")


def _check_row(path: Path, place: str, row: Any) -> None:
    if not isinstance(row, dict) or "value" not in row:
        raise ParameterFileError(f"'{path}', {place}: expected an object with a value")
    try:
        value = torch.tensor(row["value"], dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise ParameterFileError(f"'{path}', {place}.value: expected a number or nested lists of numbers") from error
    if not bool(torch.isfinite(value).all()):
        raise ParameterFileError(f"'{path}', {place}.value: expected finite numbers, found {row['value']}")
