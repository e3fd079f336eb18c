"""The output folder of a command: held by one process, resumed only by the configuration that started it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sim2real.checkpoint import (
    Checkpoint,
    CheckpointError,
    FolderBusyError,
    exclusive_folder,
    load_checkpoint,
    remove_checkpoint,
    save_checkpoint,
)
from sim2real.log import RolloutLog
from sim2real.params import Params

__all__ = ["FolderBusyError", "Workspace", "log_digest", "open_workspace", "save_snapshot", "write_log_line"]


@dataclass(frozen=True)
class Workspace:
    """An output folder held by this process, and the snapshot an earlier run left there."""

    folder: Path
    identity: dict[str, Any]
    """what a run must share with the one it resumes: command, configuration, log"""
    snapshot: Checkpoint | None


@contextmanager
def open_workspace(folder: Path, identity: dict[str, Any], *, resume: bool) -> Iterator[Workspace]:
    """Make and lock `folder`; with `resume` read its checkpoint, without forget it.

    Raises `CheckpointError` when the checkpoint is damaged or of another configuration (naming what differs),
    `FolderBusyError` when another process holds the folder, `OSError` when it cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    identity = json.loads(json.dumps(identity))
    with exclusive_folder(folder):
        path = _checkpoint(folder)
        if not resume:
            remove_checkpoint(path)
        snapshot = load_checkpoint(path)
        if snapshot is not None and (changed := _differences(snapshot.record["identity"], identity)):
            raise CheckpointError(
                path,
                f"it belongs to a run with other settings ({'; '.join(changed[:4])})",
                "choose another out=..., or start again here with resume=false",
            )
        yield Workspace(folder, identity, snapshot)


def save_snapshot(workspace: Workspace, state: Params, **record: Any) -> None:
    """Keep `state` (and anything JSON) for a later run of the same configuration."""
    checkpoint = Checkpoint(state, {"identity": workspace.identity, **record})
    save_checkpoint(_checkpoint(workspace.folder), checkpoint)


def write_log_line(folder: Path, name: str, text: str) -> None:
    """Append a line with the time to a log file of the folder."""
    with open(folder / name, "a", encoding="utf-8") as file:
        file.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {text}\n")


def log_digest(log: RolloutLog) -> str:
    """SHA-256 of what was loaded: signals, inputs, masks, grid, units; same however the file was named or packed."""
    total = hashlib.sha256(repr((log.dt, log.names, sorted(log.units.items()), log.hold)).encode())
    tensors = [log.signals, log.actions, log.exogenous, log.mask, log.rewards]
    tensors += [item for pair in log.recorded_actions for item in pair]
    for tensor in tensors:
        if tensor is not None:
            total.update(f"{tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
    return total.hexdigest()


def _checkpoint(folder: Path) -> Path:
    return folder / "checkpoint.safetensors"


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """ "fit.horizon was 0.5, is 1.0" for every entry in which two nested mappings differ."""
    found: list[str] = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name} was {old}, is {new}")
    return found
