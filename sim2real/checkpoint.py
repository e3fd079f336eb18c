"""Files that survive kill -9, a full disk and torn writes.

Every write goes to a temporary file beside its target, is flushed to the disk (`fsync`) and then takes the target's
name (`os.replace`, atomic on one file system), after which the folder itself is flushed. A reader therefore sees the
old content or the new, never a mixture. A checkpoint is one safetensors file: tensors and, in its header, a JSON
record with a SHA-256 over both. The one before it is kept, so a checkpoint damaged afterwards costs one interval.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from sim2real.params import Params


class CheckpointError(ValueError):
    """A checkpoint cannot be used: damaged, or written by another configuration. `path` names the file."""

    def __init__(self, path: Path, problem: str, remedy: str) -> None:
        super().__init__(f"checkpoint '{path}': {problem}; {remedy}")
        self.path = path


class FolderBusyError(RuntimeError):
    """Another process works in the same output folder."""


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name and a JSON-serialisable record (configuration fingerprint, counters, lists)."""

    tensors: Params
    record: dict[str, Any]
    fallback: str = ""
    """why the previous checkpoint was read instead of the newest; empty when it was not"""


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step; on any `OSError` (disk full, no permission) the old file stays."""
    temporary = _write_beside(path, data)
    os.replace(temporary, path)
    _flush_folder(path.parent)


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` to `path`, keeping the one before it as `previous_checkpoint(path)`.

    Whatever moment the process dies, `load_checkpoint` finds the new or the old one. Raises `OSError`.
    """
    temporary = _write_beside(path, encode_checkpoint(checkpoint))
    if path.exists():
        os.replace(path, previous_checkpoint(path))
    os.replace(temporary, path)
    _flush_folder(path.parent)


def load_checkpoint(path: Path) -> Checkpoint | None:
    """The newest intact checkpoint, or None when there is none yet.

    Raises `CheckpointError` when files exist and none of them is intact.
    """
    problem = ""
    for candidate in (path, previous_checkpoint(path)):
        if not candidate.exists():
            continue
        try:
            found = decode_checkpoint(candidate)
        except CheckpointError as error:
            problem = problem or str(error)
            continue
        return Checkpoint(found.tensors, found.record, problem)
    if problem:
        raise CheckpointError(path, f"no intact checkpoint is left ({problem})", "start again with resume=false")
    return None


def remove_checkpoint(path: Path) -> None:
    """Delete the checkpoint and the one before it."""
    for candidate in (path, previous_checkpoint(path)):
        candidate.unlink(missing_ok=True)


def previous_checkpoint(path: Path) -> Path:
    """Where `save_checkpoint` keeps the checkpoint before the newest."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def encode_checkpoint(checkpoint: Checkpoint) -> bytes:
    """Bytes of the safetensors file; equal checkpoints give equal bytes."""
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in checkpoint.tensors.items()}
    text = json.dumps(checkpoint.record, sort_keys=True, allow_nan=False)
    # one metadata key, because safetensors writes several in no fixed order; the names, because it sorts the tensors
    return save(tensors, {"checkpoint": json.dumps([text, _digest(tensors, text), list(tensors)])})


def decode_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one file; raises `CheckpointError` saying what is wrong with it."""
    remedy = "delete it, or start again with resume=false"
    try:
        with safe_open(path, "pt") as file:
            text, digest, names = json.loads((file.metadata() or {})["checkpoint"])
            # own memory: sums over data aligned otherwise round otherwise, and a resumed run must not
            tensors = {name: file.get_tensor(name).clone() for name in names}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(path, f"not a readable checkpoint ({error})", remedy) from error
    if _digest(tensors, text) != digest:
        raise CheckpointError(path, "its checksum does not match its content", remedy)
    return Checkpoint(tensors, json.loads(text))


@contextmanager
def exclusive_folder(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; the lock ends with the process, however it ends.

    Raises `FolderBusyError` when another process holds it.
    """
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FolderBusyError(
                f"another process is working in '{folder}'; wait for it to end or choose another out=..."
            ) from error
        yield


def _write_beside(path: Path, data: bytes) -> Path:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(tensors: Params, text: str) -> str:
    total = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name]
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
