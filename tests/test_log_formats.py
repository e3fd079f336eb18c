"""Every format gives the log that CSV gives; schemas and their overrides; what `save_log` writes comes back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from scipy import io

from sim2real.log import (
    LogError,
    RolloutLog,
    concatenate_logs,
    delayed_actions,
    load_log,
    load_schema,
    parse_schema,
    save_log,
    select_episodes,
)

ROWS = 60
TIME = np.arange(ROWS) * 0.02
OBS = np.stack([np.sin(3 * TIME), 3 * np.cos(3 * TIME)], axis=1)
ACTIONS = np.cos(5 * TIME)[:, None]


def schema(angle: str, velocity: str, torque: str, time: Any, **more: Any) -> dict[str, Any]:
    return {
        "time": time,
        "signals": {"angle": {"column": angle, "unit": "rad"}, "velocity": {"column": velocity, "unit": "rad/s"}},
        "actions": {"torque": {"column": torque, "unit": "N m"}},
        **more,
    }


FLAT = schema("obs[0]", "obs[1]", "act", {"column": "t", "unit": "s"})


def expected(rows: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
    return OBS[rows], ACTIONS[rows][:-1]


def check(log: RolloutLog, episode: int = 0, rows: slice = slice(None)) -> None:
    signals, actions = expected(rows)
    steps = len(actions)
    np.testing.assert_array_equal(log.signals[episode, : steps + 1], signals)
    np.testing.assert_array_equal(log.actions[episode, :steps], actions)
    assert log.mask[episode].sum() == steps
    assert log.dt == pytest.approx(0.02, abs=1e-15)


def test_npz_with_the_clock_in_the_file_or_in_the_schema(tmp_path: Path) -> None:
    np.savez(tmp_path / "run.npz", t=TIME, obs=OBS, act=ACTIONS)
    check(load_log(tmp_path / "run.npz", FLAT))
    np.savez_compressed(tmp_path / "run.npz", obs=OBS, act=ACTIONS[:-1, 0])  # one action less than observations
    check(load_log(tmp_path / "run.npz", FLAT | {"time": {"period": 0.02}}))


def test_plain_hdf5_groups_and_integer_nanoseconds(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "run.h5", "w") as file:
        file["log/stamp"] = (1_700_000_000_000_000_000 + np.round(TIME * 1e9)).astype(np.int64)
        file["log/obs"], file["log/tau"] = OBS, ACTIONS
    content = schema("log/obs[0]", "log/obs[1]", "log/tau", {"column": "log/stamp", "unit": "ns"})
    check(load_log(tmp_path / "run.h5", content))


@pytest.mark.parametrize("group", ["data/demo_{}", "episode_{}"])
def test_hdf5_groups_are_episodes_in_the_order_of_their_numbers(tmp_path: Path, group: str) -> None:
    with h5py.File(tmp_path / "demos.hdf5", "w") as file:
        for i in range(11):
            demo = file.create_group(group.format(i))
            demo["obs/joint"], demo["actions"] = OBS[i:], ACTIONS[i:]
            demo.attrs["num_samples"] = ROWS - i
    content = schema("obs/joint[0]", "obs/joint[1]", "actions[0]", {"period": 0.02})
    log = load_log(tmp_path / "demos.hdf5", content)
    stem = group.rpartition("/")[2]
    assert log.names["episode"] == tuple(stem.format(i) for i in range(11))
    check(log, 2, slice(2, None))
    check(log, 10, slice(10, None))


def test_d4rl_flat_arrays_end_at_terminals_and_timeouts(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "d4rl.hdf5", "w") as file:
        file["observations"], file["actions"], file["rewards"] = OBS, ACTIONS, TIME
        file["terminals"], file["timeouts"] = np.arange(ROWS) == 19, np.arange(ROWS) == 49
    content = schema("observations[0]", "observations[1]", "actions", {"period": 0.02}, reward={"column": "rewards"})
    log = load_log(tmp_path / "d4rl.hdf5", content)
    for episode, rows in enumerate([slice(0, 20), slice(20, 50), slice(50, 60)]):
        check(log, episode, rows)
    assert log.rewards is not None
    np.testing.assert_array_equal(log.rewards[0, :20], [*TIME[:19], 0.0])  # masked steps earn nothing


@pytest.mark.parametrize("nested", [False, True])
def test_matlab_v5_vectors_and_structs(tmp_path: Path, nested: bool) -> None:
    content = {"t": TIME[None], "obs": OBS, "act": ACTIONS}
    io.savemat(tmp_path / "run.mat", {"log": content} if nested else content)
    at = "log/" if nested else ""
    check(load_log(tmp_path / "run.mat", schema(f"{at}obs[0]", f"{at}obs[1]", f"{at}act", {"column": f"{at}t"})))


def test_matlab_v73_is_hdf5_with_columns_first(tmp_path: Path) -> None:
    path = tmp_path / "run.mat"
    with h5py.File(path, "w", userblock_size=512) as file:
        file["t"], file["obs"], file["act"] = TIME[None], OBS.T, ACTIONS.T
    check(load_log(path, FLAT))


def test_parquet_with_lists_and_an_episode_column(tmp_path: Path) -> None:
    episode = np.repeat(["a", "b"], ROWS // 2)
    table = {"t": TIME, "obs": OBS.tolist(), "act": ACTIONS[:, 0].astype(np.float64), "run": episode}
    parquet.write_table(pa.table(table), tmp_path / "runs.parquet")
    log = load_log(tmp_path / "runs.parquet", FLAT | {"episode": {"column": "run"}})
    assert log.names["episode"] == ("runs/a", "runs/b")
    check(log, 0, slice(0, 30))
    check(log, 1, slice(30, 60))


@pytest.mark.parametrize("kind", ["text", "timestamp"])
def test_parquet_with_date_and_time(tmp_path: Path, kind: str) -> None:
    stamps = np.datetime64("2026-03-01T12:00:00", "us") + np.round(TIME * 1e6).astype("timedelta64[us]")
    column = pa.array([f"{stamp}+00:00" for stamp in stamps]) if kind == "text" else pa.array(stamps)
    table = {"t": column, "obs": pa.array(OBS.tolist(), pa.list_(pa.float64(), 2)), "act": ACTIONS[:, 0]}
    parquet.write_table(pa.table(table), tmp_path / "run.parquet")
    check(load_log(tmp_path / "run.parquet", FLAT | {"time": {"column": "t", "unit": "utc"}}))


def write_lerobot(folder: Path, version: str) -> Path:
    """Two episodes of 30 rows; v2 has a file for each, v3 one file for both."""
    rows = {
        "timestamp": np.concatenate([TIME[:30], TIME[:30]]),
        "observation.state": OBS.tolist(),
        "action": ACTIONS.tolist(),
        "episode_index": np.repeat([0, 1], 30),
    }
    data = folder / "data" / "chunk-000"
    data.mkdir(parents=True)
    (folder / "meta").mkdir()
    info = {"codebase_version": version, "total_episodes": 2, "total_frames": 60, "fps": 50}
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    table = pa.table(rows)
    if version == "v3.0":
        parquet.write_table(table, data / "file-000.parquet")
    else:
        for i in range(2):
            parquet.write_table(table.slice(30 * i, 30), data / f"episode_{i:06d}.parquet")
    return folder


LEROBOT = schema("observation.state[0]", "observation.state[1]", "action[0]", {"column": "timestamp", "unit": "s"})


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_lerobot_folder(tmp_path: Path, version: str) -> None:
    folder = write_lerobot(tmp_path / "set", version)
    (folder / "schema.yaml").write_text(json.dumps(LEROBOT))  # JSON is YAML
    log = load_log(folder)
    assert log.names["episode"] == ("0", "1")
    check(log, 0, slice(0, 30))
    check(log, 1, slice(30, 60))


def test_signals_with_their_own_clock(tmp_path: Path) -> None:
    fast, slow = np.arange(0, 1, 0.001), np.arange(0.0105, 0.9, 0.01)
    np.savez(tmp_path / "run.npz", t=fast, q=np.sin(fast), ti=slow, w=2 * slow, tau=np.ones(len(slow)))
    content = {
        "time": {"column": "t", "unit": "s"},
        "signals": {"q": {"column": "q", "unit": "rad"}, "w": {"column": "w", "unit": "rad/s", "time": "ti"}},
        "actions": {"tau": {"column": "tau", "unit": "N m", "time": "ti"}},
        "dt": 0.01,
        "resample": True,
    }
    log = load_log(tmp_path / "run.npz", content)
    grid = 0.0105 + 0.01 * np.arange(log.signals.shape[1])  # starts where both are recorded
    np.testing.assert_allclose(log.signals[0, :, 1], 2 * grid, atol=1e-12)
    np.testing.assert_allclose(log.signals[0, :, 0], np.sin(grid), atol=2e-7)  # linear interpolation, h^2 / 8
    assert log.signals.shape[1] == 89
    assert "'tau' never changes" in log.notes[0]
    with pytest.raises(LogError, match="own clock"):
        load_log(tmp_path / "run.npz", content | {"resample": False, "dt": 0.001})
    with pytest.raises(LogError, match="needs a main one"):
        load_log(tmp_path / "run.npz", content | {"time": {"period": 0.1}})


def test_gaps_and_duplicates_by_explicit_policy(tmp_path: Path) -> None:
    t = np.delete(TIME, slice(20, 35))
    t = np.insert(t, 5, t[5])
    np.savez(tmp_path / "run.npz", t=t, obs=np.stack([np.sin(t), np.cos(t)], 1), act=np.cos(t))
    content = FLAT | {"dt": 0.02, "resample": True, "gaps": "mask", "duplicates": "first"}
    content["signals"] = content["signals"] | {"rate": {"derivative_of": "angle", "window": 5, "order": 2}}
    log = load_log(tmp_path / "run.npz", content)
    np.testing.assert_allclose(log.signals[0, :20, 0], np.sin(TIME[:20]), atol=1e-12)
    # rows 19 and 35 bound the gap; half a filter window on each side is lost with it
    assert np.flatnonzero(~log.mask[0].numpy()).tolist() == list(range(19 - 2, 35 + 2))
    assert "1 row(s) with a repeated time were dropped" in log.notes[0]
    assert "masked" in log.notes[1]
    assert log.recorded_actions[0][0].shape == (45,)


def test_unwrap(tmp_path: Path) -> None:
    turns = 20 * TIME
    np.savez(tmp_path / "run.npz", t=TIME, obs=np.stack([np.angle(np.exp(1j * turns)), OBS[:, 1]], 1), act=ACTIONS)
    unwrapping = ["signals.angle.unwrap=true"]
    log = load_log(tmp_path / "run.npz", FLAT, overrides=unwrapping)
    np.testing.assert_allclose(log.signals[0, :, 0], turns, atol=1e-12)
    assert load_log(tmp_path / "run.npz", FLAT, overrides=["signals.angle.unwrap=false"]).signals[0, :, 0].max() < 3.2


def test_where_a_schema_is_found(tmp_path: Path) -> None:
    np.savez(tmp_path / "run_1.npz", t=TIME, obs=OBS, act=ACTIONS)
    np.savez(tmp_path / "run_10.npz", t=TIME[:20], obs=OBS[:20], act=ACTIONS[:20])
    np.savez(tmp_path / "run_9.npz", t=TIME[:30], obs=OBS[:30], act=ACTIONS[:30])
    np.savez(tmp_path / "plan.npz", x=TIME)
    (tmp_path / "schema.yaml").write_text(json.dumps(FLAT | {"files": "run_*.npz"}))
    log = load_log(tmp_path)
    assert log.names["episode"] == ("run_1", "run_9", "run_10")
    assert load_log(tmp_path / "run_?.npz").names["episode"] == ("run_1", "run_9")
    assert load_log([tmp_path / "run_9.npz", tmp_path / "run_9.npz"]).names["episode"] == ("run_9", "run_9#2")
    (tmp_path / "run_9.npz.yaml").write_text(json.dumps(FLAT | {"hold": "linear"}))
    assert load_log(tmp_path / "run_9.npz").hold == "linear"
    assert load_log(tmp_path / "run_9.npz", load_schema(tmp_path / "schema.yaml")).hold == "previous"
    overrides = ["time.period=0.02", "signals.q.column=x", "signals.q.unit=rad"]
    (tmp_path / "schema.yaml").unlink()
    assert load_log(tmp_path / "plan.npz", overrides=overrides).names["signal"] == ("q",)
    assert load_log(tmp_path / "run_9.npz", dt=0.04).dt == 0.04
    with pytest.raises(LogError, match=r"dataclasses\.replace"):
        load_log(tmp_path / "run_9.npz", parse_schema(FLAT), overrides=["dt=0.1"])


def same_log(a: RolloutLog, b: RolloutLog) -> None:
    """Bitwise: signs of zero included."""

    def bits(tensor: torch.Tensor | None) -> bytes | None:
        return None if tensor is None else tensor.contiguous().numpy().tobytes()

    for name in ("signals", "actions", "exogenous", "mask", "rewards"):
        first, second = getattr(a, name), getattr(b, name)
        assert bits(first) == bits(second), name
        assert (first is None) or (first.shape, first.dtype) == (second.shape, second.dtype), name
    for name in ("dt", "names", "units", "source", "hold", "notes"):
        assert getattr(a, name) == getattr(b, name), name
    assert len(a.recorded_actions) == len(b.recorded_actions)
    for first, second in zip(a.recorded_actions, b.recorded_actions, strict=True):
        assert [bits(part) for part in first] == [bits(part) for part in second]
        assert [part.shape for part in first] == [part.shape for part in second]


@st.composite
def logs(draw: st.DrawFn) -> RolloutLog:
    batch, steps = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    signals, inputs, outside = draw(st.integers(1, 3)), draw(st.integers(0, 2)), draw(st.integers(0, 2))
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=dtype)
    lengths = draw(st.lists(st.integers(1, 9), min_size=batch, max_size=batch))
    text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
    columns = draw(st.lists(text, min_size=signals, max_size=signals, unique=True))
    recorded = tuple((normal(rows).cumsum(0), normal(rows, inputs)) for rows in lengths)
    return RolloutLog(
        signals=torch.copysign(normal(batch, steps + 1, signals).round(decimals=draw(st.integers(0, 9))), normal(1)),
        actions=normal(batch, steps, inputs),
        exogenous=normal(batch, steps, outside) if outside else None,
        mask=normal(batch, steps) > -0.5,
        dt=draw(st.floats(1e-6, 1e6)),
        names={
            "signal": tuple(columns),
            "action": tuple(f"u{i}" for i in range(inputs)),
            "exogenous": tuple(f"x{i}" for i in range(outside)),
            "episode": tuple(draw(st.lists(text, min_size=batch, max_size=batch))),
        },
        units={name: draw(text) for name in columns},
        source=draw(text),
        recorded_actions=recorded if inputs and draw(st.booleans()) else (),
        hold=draw(st.sampled_from(["linear", "previous"])),
        notes=tuple(draw(st.lists(text, max_size=3))),
        rewards=normal(batch, steps) if draw(st.booleans()) else None,
    )


@settings(max_examples=40, deadline=None)
@given(log=logs())
def test_save_and_load_give_the_same_bits(tmp_path_factory: pytest.TempPathFactory, log: RolloutLog) -> None:
    path = tmp_path_factory.mktemp("saved") / "log.parquet"
    save_log(log, path)
    save_log(log, path)  # over an older file
    assert [file.name for file in path.parent.iterdir()] == ["log.parquet"]
    same_log(load_log(path), log)


@settings(max_examples=40, deadline=None)
@given(
    periods=st.lists(st.floats(0.3, 1.7), min_size=12, max_size=60),
    h=st.floats(0.4, 3.0),
    slope=st.floats(-5, 5).filter(lambda x: abs(x) > 1e-3),
    offset=st.floats(-5, 5),
    start=st.floats(-1e3, 1e3),
)
def test_the_grid_reproduces_what_is_linear_in_time(
    tmp_path_factory: pytest.TempPathFactory, periods: list[float], h: float, slope: float, offset: float, start: float
) -> None:
    times = start + np.cumsum(periods)
    values = slope * (times - times[0]) + offset
    path = tmp_path_factory.mktemp("line") / "run.npz"
    np.savez(path, t=times, q=values)
    content = {
        "time": {"column": "t", "unit": "s"},
        "signals": {"q": {"column": "q", "unit": "m"}},
        "actions": {"u": {"column": "q", "unit": "m"}},
        "dt": h,
        "resample": True,
        "hold": "linear",
    }
    log = load_log(path, content)
    span = times[-1] - times[0]
    steps = log.mask.shape[1]
    assert steps * h <= span + 1e-8 * h < (steps + 1) * h  # the grid fills the record
    grid = h * np.arange(steps + 1)
    np.testing.assert_allclose(log.signals[0, :, 0], slope * grid + offset, atol=1e-9)
    np.testing.assert_allclose(log.actions[0, :, 0], slope * (grid[1:] + grid[:-1]) / 2 + offset, atol=1e-9)
    delay = 0.37 * h
    late = delayed_actions(log, torch.tensor(delay, dtype=torch.float64))
    np.testing.assert_allclose(late[0, 1:], log.actions[0, 1:] - slope * delay, atol=1e-9)


def test_saved_logs_are_selected_and_joined_like_any_other(tmp_path: Path) -> None:
    np.savez(tmp_path / "run.npz", t=TIME, obs=OBS, act=ACTIONS)
    log = load_log(
        tmp_path / "run.npz", FLAT | {"reward": {"column": "act"}, "exogenous": {"w": FLAT["signals"]["angle"]}}
    )
    save_log(log, tmp_path / "a.parquet")
    save_log(log, tmp_path / "b.parquet")
    joined = load_log(tmp_path / "?.parquet")
    same_log(select_episodes(joined, [1]), replace(log, names=log.names | {"episode": ("run#2",)}, notes=joined.notes))
    with pytest.raises(ValueError, match="having rewards"):
        concatenate_logs([log, replace(log, rewards=None)])
    with pytest.raises(ValueError, match="at least one"):
        concatenate_logs([])


def test_an_interrupted_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "run.npz", t=TIME, obs=OBS, act=ACTIONS)
    log = load_log(tmp_path / "run.npz", FLAT)
    save_log(log, tmp_path / "log.parquet")
    before = (tmp_path / "log.parquet").read_bytes()

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyarrow.parquet.write_table", full)
    with pytest.raises(OSError, match="No space"):
        save_log(log, tmp_path / "log.parquet")
    assert (tmp_path / "log.parquet").read_bytes() == before
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": {"signal": ("a",), "action": ("u",), "episode": ("e",)}}, "one by one"),
        ({"names": {"signal": ("a", "b"), "action": ("u",), "episode": ()}}, "episodes are named"),
        ({"signals": torch.full((1, ROWS, 2), torch.nan)}, "not finite"),
    ],
)
def test_save_log_refuses_what_it_could_not_give_back(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "run.npz", t=TIME, obs=OBS, act=ACTIONS)
    log = load_log(tmp_path / "run.npz", FLAT)
    with pytest.raises(LogError, match=message):
        save_log(replace(log, **change), tmp_path / "log.parquet")
    with pytest.raises(LogError, match=r"ends in \.parquet"):
        save_log(log, tmp_path / "log.npz")
