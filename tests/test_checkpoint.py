"""Checkpoints: exact round trips, torn and damaged files, full disks, wrong configurations, busy folders."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sim2real import checkpoint
from sim2real.checkpoint import (
    Checkpoint,
    CheckpointError,
    FolderBusyError,
    decode_checkpoint,
    encode_checkpoint,
    exclusive_folder,
    load_checkpoint,
    previous_checkpoint,
    remove_checkpoint,
    save_checkpoint,
    write_atomic,
)
from sim2real.workspace import open_workspace, save_snapshot, write_log_line


def example(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    tensors = {
        "z": torch.randn(3, 2, generator=generator, dtype=torch.float64),
        "a": torch.tensor(step),
        "flags": torch.tensor([True, False]),
        "none": torch.zeros(0, 4),
        "generator": generator.get_state(),
    }
    return Checkpoint(tensors, {"step": step, "name": "ä", "nested": {"list": [1, 2.5, None]}})


def same(a: Checkpoint, b: Checkpoint) -> bool:
    names = list(a.tensors) == list(b.tensors)
    return names and a.record == b.record and all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors)


def test_round_trip_is_exact_and_keeps_the_order_of_names(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    assert load_checkpoint(path) is None
    save_checkpoint(path, example(1))
    loaded = load_checkpoint(path)
    assert loaded is not None
    assert same(loaded, example(1))
    assert [t.dtype for t in loaded.tensors.values()] == [t.dtype for t in example(1).tensors.values()]


def test_equal_checkpoints_have_equal_bytes() -> None:
    assert len({encode_checkpoint(example(3)) for _ in range(8)}) == 1


def test_a_view_is_saved_as_what_it_shows(tmp_path: Path) -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    save_checkpoint(tmp_path / "c.safetensors", Checkpoint({"t": matrix.T, "row": matrix[1]}, {}))
    loaded = load_checkpoint(tmp_path / "c.safetensors")
    assert loaded is not None
    assert torch.equal(loaded.tensors["t"], matrix.T)
    assert torch.equal(loaded.tensors["row"], matrix[1])


def test_every_truncation_and_every_flipped_byte_falls_back_to_the_previous(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, example(1))
    save_checkpoint(path, example(2))
    data = path.read_bytes()
    damaged = [data[:length] for length in range(0, len(data), 37)]
    damaged += [data[:k] + bytes([data[k] ^ 0x40]) + data[k + 1 :] for k in range(0, len(data), 29)]
    for content in damaged:
        path.write_bytes(content)
        loaded = load_checkpoint(path)
        assert loaded is not None
        # a flip inside the padding of the header changes nothing that is read
        assert same(loaded, example(1)) or (same(loaded, example(2)) and not loaded.fallback)
        if same(loaded, example(1)):
            assert str(path) in loaded.fallback


def test_no_intact_checkpoint_is_a_named_error(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(CheckpointError, match=r"no intact checkpoint.*resume=false") as caught:
        load_checkpoint(path)
    assert caught.value.path == path
    previous_checkpoint(path).write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match="no intact checkpoint"):
        load_checkpoint(path)
    remove_checkpoint(path)
    assert load_checkpoint(path) is None


def test_a_foreign_safetensors_file_is_a_named_error(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        decode_checkpoint(tmp_path / "c.safetensors")


@pytest.mark.parametrize("moment", ["write", "fsync", "first replace", "second replace"])
def test_death_at_any_moment_of_a_save_leaves_the_new_or_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, example(1))
    save_checkpoint(path, example(2))
    calls = {"replace": 0}
    replace = os.replace

    def dying_replace(source: str, target: str) -> None:
        calls["replace"] += 1
        if calls["replace"] == {"first replace": 1, "second replace": 2}.get(moment, 0):
            raise KeyboardInterrupt
        replace(source, target)

    def die(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", dying_replace)
    if moment == "fsync":
        monkeypatch.setattr(os, "fsync", die)
    if moment == "write":
        monkeypatch.setattr(checkpoint, "encode_checkpoint", lambda c: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, example(3))
    monkeypatch.undo()
    loaded = load_checkpoint(path)
    assert loaded is not None
    assert same(loaded, example(2))
    save_checkpoint(path, example(3))  # and the leftovers are in nobody's way
    assert same(load_checkpoint(path) or example(0), example(3))


def test_a_full_disk_keeps_the_old_file_and_no_leftovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "params.json"
    write_atomic(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, b"new" * 1000)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["params.json"]


def test_a_workspace_resumes_only_its_own_configuration(tmp_path: Path) -> None:
    identity = {"command": "fit", "settings": {"fit": {"horizon": 0.5}, "seed": 0}}
    with open_workspace(tmp_path / "run", identity, resume=True) as workspace:
        assert workspace.snapshot is None
        save_snapshot(workspace, {"x": torch.ones(2)}, steps=3)
        write_log_line(workspace.folder, "fit.log", "step 3")
    with open_workspace(tmp_path / "run", identity, resume=True) as workspace:
        assert workspace.snapshot is not None
        assert workspace.snapshot.record["steps"] == 3
    other = {"command": "fit", "settings": {"fit": {"horizon": 1.0}, "seed": 0}}
    with (
        pytest.raises(CheckpointError, match=r"settings.fit.horizon was 0.5, is 1.0.*resume=false"),
        open_workspace(tmp_path / "run", other, resume=True),
    ):
        pass
    with open_workspace(tmp_path / "run", other, resume=False) as workspace:
        assert workspace.snapshot is None
    assert (tmp_path / "run" / "fit.log").read_text().endswith("step 3\n")


def test_two_processes_cannot_share_a_folder(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from sim2real.checkpoint import FolderBusyError, exclusive_folder
try:
    with exclusive_folder(Path({json.dumps(str(tmp_path))})):
        print("free")
except FolderBusyError as error:
    print("busy", error)
"""
    with exclusive_folder(tmp_path):
        busy = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert busy.startswith("busy another process is working in")
        with pytest.raises(FolderBusyError), exclusive_folder(tmp_path):
            pass
    with exclusive_folder(tmp_path):
        pass
