"""The bench rig: closed forms of its parts, and the log that the committed script writes."""

from __future__ import annotations

import math
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sim2real.log import load_log
from sim2real.simulators.bench_rig import BenchRig, logged_rows, rig_rollout

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "make_rig_log.py"
FREE = replace(BenchRig(), coulomb=1e-9, stiction=1e-9, damping=0.0, play=0.0, cogging=0.0, torque_offset=0.0)


def test_free_swing_has_the_period_of_the_whole_inertia() -> None:
    start = np.array([[0.02, 0.0]])
    run = rig_rollout(lambda state, k: np.zeros(1), seed=0, steps=500, initial=start, rig=FREE)
    crossings = np.flatnonzero(np.diff(np.sign(run.fine_angles[0])))
    period = 2 * (crossings[-1] - crossings[0]) / (len(crossings) - 1) * FREE.fine_step
    expected = 2 * math.pi * math.sqrt((FREE.link_inertia + FREE.rotor_inertia) / FREE.mgl)
    # the gear is a spring: mgl / gear_stiffness = 1.5 % of twist carries the rotor's share (10 %), 1e-3 in all
    assert period == pytest.approx(expected, rel=2e-3)


def test_a_torque_below_stiction_does_not_move_the_link() -> None:
    rig = replace(BenchRig(), torque_offset=0.0, cogging=0.0)
    start = np.zeros((2, 2))
    torque = np.array([0.8 * rig.stiction, 1.6 * rig.stiction])
    slow = lambda state, k: torque * min(k / 150, 1.0)
    run = rig_rollout(slow, seed=0, steps=200, episodes=2, initial=start, rig=rig)
    # presliding: below stiction the motor creeps torque / bristle_stiffness = 2.1 mrad, inside half the play, 6 mrad
    assert np.abs(run.fine_angles[0]).max() < 1e-3
    assert np.abs(run.fine_angles[1]).max() > 0.03


def test_the_command_arrives_after_the_delay_and_the_limit() -> None:
    run = rig_rollout(lambda state, k: np.full(1, 99.0), seed=0, steps=5, initial=np.zeros((1, 2)), rig=FREE)
    assert (run.torques == FREE.torque_limit).all()
    moved = int(np.flatnonzero(np.abs(run.fine_angles[0]) > 0)[0])
    assert moved == round(FREE.delay / FREE.fine_step) + 2  # one step to turn the rotor, one to push the link


def test_each_run_has_its_own_zero_and_a_quantised_angle() -> None:
    rig = BenchRig()
    run = rig_rollout(lambda state, k: np.zeros(64), seed=3, steps=2, episodes=64, initial=np.zeros((64, 2)))
    ticks = run.states[..., 0] / rig.encoder_step
    np.testing.assert_allclose(ticks, np.round(ticks), atol=1e-9)
    assert np.abs(run.states[:, 0, 0] - run.zeros).max() <= rig.encoder_step / 2 + 1e-12
    assert 0.01 < run.zeros.std() < 0.03  # uniform over 0.06 rad: 0.017


def test_same_seed_same_run_and_rows_of_the_batch_do_not_mix() -> None:
    start = np.array([[0.5, 0.0], [1.0, 2.0]])
    both = rig_rollout(lambda s, k: -0.5 * s[:, 1], seed=5, steps=50, episodes=2, initial=start)
    again = rig_rollout(lambda s, k: -0.5 * s[:, 1], seed=5, steps=50, episodes=2, initial=start)
    assert np.array_equal(both.states, again.states)
    alone = rig_rollout(lambda s, k: -0.5 * s[:, 1], seed=5, steps=50, initial=start[:1])
    np.testing.assert_allclose(alone.states[0], both.states[0], atol=1e-12)


def test_wrong_calls_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        rig_rollout(lambda s, k: np.zeros(1), seed=0, steps=0)
    with pytest.raises(ValueError, match="initial has shape"):
        rig_rollout(lambda s, k: np.zeros(1), seed=0, steps=1, initial=np.zeros(2))
    with pytest.raises(ValueError, match="finite torques"):
        rig_rollout(lambda s, k: np.full(1, np.nan), seed=0, steps=1)
    with pytest.raises(ValueError, match="finite torques"):
        rig_rollout(lambda s, k: np.zeros(3), seed=0, steps=1)


def test_logged_rows_are_uneven_and_true() -> None:
    run = rig_rollout(lambda s, k: np.full(1, math.sin(0.1 * k)), seed=0, steps=300)
    times, angles, torques = logged_rows(run, 0, seed=0)
    periods = np.diff(times)
    assert periods.min() > 0
    assert periods.max() > 1.2 * np.median(periods)
    truth = np.interp(times, np.arange(run.fine_angles.shape[1]) * 5e-4, run.fine_angles[0]) + run.zeros[0]
    assert np.abs(angles - truth).max() <= BenchRig().encoder_step / 2 + 1e-12
    np.testing.assert_allclose(torques, np.sin(0.1 * np.floor(times / 0.01)))


def test_the_script_writes_a_log_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path / "log"), "--seed", "1"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert capsys.readouterr().out.count("run_") == 4
    log = load_log(tmp_path / "log")
    assert log.names["episode"] == ("run_0", "run_1", "run_2", "run_3")
    assert log.units == {"angle": "rad", "velocity": "rad/s", "torque": "N m"}
    assert log.dt == 0.01
    assert log.mask.sum(1).min() >= 890
    end = log.signals[2:, -100:, 0]
    assert (torch.cos(end) < -0.9).all()  # both swing-ups end upright
