"""What a reader returns: the columns of one episode as recorded, nothing converted or resampled."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from sim2real.log_errors import LogError
from sim2real.log_schema import LogSchema

MAX_BYTES = 1 << 32
"""no reader takes more memory than this for one array (4 GiB), whatever a header claims"""


@dataclass(frozen=True)
class RawEpisode:
    """Columns `[R]` or `[R, d]`, from row `first_row` of `file` on; for HDF5, `file` names the group too."""

    name: str
    file: str
    columns: dict[str, np.ndarray]
    first_row: int = 0
    notes: tuple[str, ...] = ()


def split_reference(reference: str) -> tuple[str, int | None]:
    """`"obs[3]"` -> `("obs", 3)`, `"obs"` -> `("obs", None)`."""
    match = re.fullmatch(r"(.+)\[(\d{1,9})\]", reference)
    return (match[1], int(match[2])) if match else (reference, None)


def needed_columns(schema: LogSchema) -> list[str]:
    """The columns the schema names, in order, once each, without an index."""
    entries = schema.signals + schema.actions + schema.exogenous
    references = [schema.time, *(entry.time for entry in entries), *(entry.column for entry in entries)]
    references += [schema.reward, schema.episode]
    return list(dict.fromkeys(split_reference(reference)[0] for reference in references if reference))


def require_columns(found: list[str], schema: LogSchema, file: object) -> list[str]:
    """The needed columns, once it is certain that all are there."""
    needed = needed_columns(schema)
    if missing := [name for name in needed if name not in found]:
        raise LogError(f"no column {missing}; the file has {found[:40]}", file=str(file))
    return needed


def checked_array(values: np.ndarray, name: str, file: object) -> np.ndarray:
    """Real numbers of shape `[R]` or `[R, d]`, or an error."""
    if values.dtype.kind not in "fiub" or values.dtype.fields is not None:
        raise LogError(f"'{name}' holds {values.dtype}, expected real numbers", file=str(file))
    if values.ndim not in (1, 2):
        raise LogError(f"'{name}' has shape {values.shape}, expected [rows] or [rows, columns]", file=str(file))
    if len(values) == 0:
        raise LogError(f"'{name}' has no rows", file=str(file))
    return values
