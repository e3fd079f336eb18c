"""Readers of array files: NPZ (never pickle), HDF5 (robomimic, Minari, D4RL or plain), MATLAB .mat (v5 to v7.3).

A column is the name of an array; "/" walks into HDF5 groups and MATLAB structs. Layouts, told by the names inside:
robomimic `data/demo_i/{obs/...,actions}` and Minari `episode_i/...`: a group is an episode, columns are named from
there; D4RL: flat arrays, an episode ends where `terminals` or `timeouts` is true.
"""

from __future__ import annotations

import itertools
import math
import re
import zipfile
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from sim2real.log_errors import LogError
from sim2real.log_schema import LogSchema
from sim2real.mat5 import read_mat5
from sim2real.raw_episode import MAX_BYTES, RawEpisode, checked_array, needed_columns, require_columns

if TYPE_CHECKING:
    import h5py

_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
# what numpy, zipfile, zlib and h5py raise on broken files
_BROKEN = (ValueError, TypeError, KeyError, IndexError, OSError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile)
_TOO_LARGE = (MemoryError, OverflowError)


def _check_size(bytes_claimed: int, name: str, path: Path) -> None:
    if bytes_claimed > MAX_BYTES or bytes_claimed < 0:
        raise LogError(f"'{name}' claims {bytes_claimed} bytes; at most {MAX_BYTES} are read", file=path)


def read_npz(path: Path, schema: LogSchema) -> list[RawEpisode]:
    """One episode of the arrays of an NPZ file; object arrays (pickle) are refused."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
            found = [info.filename.removesuffix(".npy") for info in members]
            if len(set(found)) < len(found):
                raise LogError(f"the archive holds an array twice: {sorted(found)}", file=path)
            needed = require_columns(found, schema, path)
            infos = {name: info for name, info in zip(found, members, strict=True) if name in needed}
            columns = {name: _npz_array(archive, info, name, path) for name, info in infos.items()}
    except LogError:
        raise
    except (*_BROKEN, *_TOO_LARGE) as error:
        raise LogError(f"not readable as NPZ: {error}", file=path) from error
    return [RawEpisode(path.stem, str(path), columns)]


def _npz_array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str, path: Path) -> np.ndarray:
    _check_size(info.file_size, name, path)
    with archive.open(info) as member:
        shape, dtype = _npy_header(member, name, path)
        held = info.file_size - member.tell()
    if dtype.hasobject:
        raise LogError(f"'{name}' holds pickled objects; they are never loaded. Save it as numbers", file=path)
    claimed = math.prod(shape) * dtype.itemsize
    if claimed != held:
        raise LogError(f"the header of '{name}' claims {shape} ({claimed} bytes), the file holds {held}", file=path)
    with archive.open(info) as member:
        return checked_array(np.lib.format.read_array(member, allow_pickle=False), name, path)


def _npy_header(member: IO[bytes], name: str, path: Path) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(member)
    if version not in ((1, 0), (2, 0)):
        raise LogError(f"'{name}' has the npy version {version}; known are (1, 0) and (2, 0)", file=path)
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = reader(member)
    return shape, dtype


def read_hdf5(path: Path, schema: LogSchema) -> list[RawEpisode]:
    """Episodes of an HDF5 file in robomimic, Minari, D4RL or plain layout; links out of a group are not followed."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            groups = _episode_groups(file)
            if groups:
                return [_group_episode(file[group], group, schema, path) for group in groups]
            columns = _group_columns(file, needed_columns(schema), path)
            ends = [name for name in ("terminals", "timeouts") if name in file]
            if not ends or schema.episode is not None:
                return [RawEpisode(path.stem, str(path), columns)]
            flags = np.stack([_dataset(file, name, path).astype(bool).reshape(-1) for name in ends])
            return _split_at_ends(columns, np.asarray(flags.any(0)), path)
    except LogError:
        raise
    except (*_BROKEN, *_TOO_LARGE) as error:
        raise LogError(f"not readable as HDF5: {error}", file=path) from error


def _episode_groups(file: h5py.File) -> list[str]:
    """Names of the groups that are episodes, in the order of their numbers."""
    for prefix, pattern in (("data/", r"demo_(\d+)"), ("", r"episode_(\d+)")):
        parent = file.get(prefix or "/")
        names = [name for name in (parent or ()) if re.fullmatch(pattern, name)]
        if names:
            return [prefix + name for name in sorted(names, key=lambda name: int(name.rpartition("_")[2]))]
    return []


def _group_episode(group: h5py.Group, name: str, schema: LogSchema, path: Path) -> RawEpisode:
    columns = _group_columns(group, needed_columns(schema), path)
    samples = group.attrs.get("num_samples")
    longest = max(len(values) for values in columns.values())
    if samples is not None and longest != int(samples):
        message = f"'{name}' holds {longest} rows, its num_samples says {int(samples)}: a torn write?"
        raise LogError(message, file=path, row=min(longest, int(samples)))
    return RawEpisode(name.rpartition("/")[2], f"{path}:{name}", columns)


def _group_columns(group: h5py.Group, needed: list[str], path: Path) -> dict[str, np.ndarray]:
    return {name: checked_array(_dataset(group, name, path), name, path) for name in needed}


def _dataset(group: h5py.Group, name: str, path: Path) -> np.ndarray:
    """Read `a/b/c` below a group. Only what lies in this file and was written is read."""
    import h5py

    node = group
    for part in name.split("/"):
        link = node.get(part, getlink=True) if isinstance(node, h5py.Group) and part else None
        if link is None:
            inside = sorted(node)[:40] if isinstance(node, h5py.Group) else []
            raise LogError(f"no column '{name}'; '{node.name}' has {inside}", file=path)
        if not isinstance(link, h5py.HardLink):
            raise LogError(f"'{name}' is a link to elsewhere; links are not followed", file=path)
        node = node[part]
    if not isinstance(node, h5py.Dataset):
        raise LogError(f"'{name}' is a group with {sorted(node)[:40]}, expected an array", file=path)
    if node.is_virtual or node.external:
        raise LogError(f"'{name}' keeps its data in another file; that is not followed", file=path)
    if node.dtype.kind not in "fiub" or node.shape is None:
        raise LogError(f"'{name}' holds {node.dtype}, expected an array of real numbers", file=path)
    _check_size(math.prod(node.shape) * node.dtype.itemsize, name, path)
    if math.prod(node.shape) > 0 and node.id.get_storage_size() == 0:
        raise LogError(f"'{name}' has shape {node.shape} but was never written", file=path)
    return np.asarray(node[()])


def _split_at_ends(columns: dict[str, np.ndarray], ends: np.ndarray, path: Path) -> list[RawEpisode]:
    """D4RL: an episode ends with the row whose flag is set."""
    for name, values in columns.items():
        if len(values) != len(ends):
            message = f"'{name}' has {len(values)} rows, terminals and timeouts have {len(ends)}"
            raise LogError(message, file=path, row=min(len(values), len(ends)))
    stops = np.flatnonzero(ends) + 1
    bounds = [0, *stops.tolist(), *([len(ends)] if not ends[-1] else [])]
    return [
        RawEpisode(f"{path.stem}/{i}", str(path), {name: values[a:b] for name, values in columns.items()}, first_row=a)
        for i, (a, b) in enumerate(itertools.pairwise(bounds))
    ]


def read_mat(path: Path, schema: LogSchema) -> list[RawEpisode]:
    """One episode of the variables of a MATLAB file; struct fields as `log/time`."""
    needed = needed_columns(schema)
    try:
        with path.open("rb") as file:
            file.seek(512)
            is_hdf5 = file.read(8) == _HDF5_MAGIC
        columns = _read_mat73(path, needed) if is_hdf5 else _read_mat5(path, needed)
    except LogError:
        raise
    except (*_BROKEN, *_TOO_LARGE) as error:
        raise LogError(f"not readable as a MATLAB file: {error}", file=path) from error
    return [RawEpisode(path.stem, str(path), columns)]


def _read_mat5(path: Path, needed: list[str]) -> dict[str, np.ndarray]:
    _check_size(path.stat().st_size, path.name, path)
    content = read_mat5(path.read_bytes(), max_bytes=MAX_BYTES)
    columns = {}
    for name in needed:
        top, *fields = name.split("/")
        if top not in content:
            raise LogError(f"no variable ['{top}']; the file has {sorted(content)[:40]}", file=path)
        value = content[top]
        for field in fields:
            if not isinstance(value, dict) or field not in value:
                raise LogError(f"'{name}': no struct field '{field}'", file=path)
            value = value[field]
        if not isinstance(value, np.ndarray):
            raise LogError(f"'{name}' is no array of numbers; expected real numbers", file=path)
        columns[name] = checked_array(_vector(value), name, path)
    return columns


def _read_mat73(path: Path, needed: list[str]) -> dict[str, np.ndarray]:
    import h5py

    with h5py.File(path, "r") as file:  # MATLAB stores columns first
        return {name: checked_array(_vector(_dataset(file, name, path).T), name, path) for name in needed}


def _vector(values: np.ndarray) -> np.ndarray:
    """MATLAB's `[R, 1]` and `[1, R]` as `[R]`."""
    return values.reshape(-1) if values.ndim == 2 and 1 in values.shape else values
