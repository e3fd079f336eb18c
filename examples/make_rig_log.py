"""The log of the bench rig
========================

Write the log of a pendulum bench rig, four CSV runs and their schema: two excited by a given torque, two swing-ups;
and one Parquet log of 48 short balancing episodes under a hand-set gain.

    python examples/make_rig_log.py OUT --seed 0

The rig (`sim2real.simulators.bench_rig`) has what a fitted pendulum model lacks: gear play, stiction, torque ripple, a
delayed motor, a quantised encoder with another zero in each run, and a logger with an uneven clock.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from sim2real.log import RolloutLog, save_log
from sim2real.simulators.bench_rig import Array, BenchRig, logged_rows, rig_rollout

STEPS = 900  # control periods of 10 ms: 9 s a run
SCHEMA = """\
# The log of a pendulum bench rig, written by examples/make_rig_log.py; angle 0 hangs down.
files: "run_*.csv"
time: {column: time, unit: s}
signals:
  angle: {column: angle_deg, unit: deg}
  velocity: {derivative_of: angle, window: 11, order: 3}
actions:
  torque: {column: torque_command, unit: N m}   # commanded: the drive follows some milliseconds later
dt: 0.01
resample: true
hold: previous
"""


def multisine(time: Array, rng: np.random.Generator) -> Array:
    """A torque that keeps the pendulum below the horizontal: three slow sines with random phases."""
    phases = rng.uniform(0, 2 * np.pi, 3)
    waves = zip((0.6, 0.5, 0.4), (0.37, 0.9, 2.1), phases, strict=True)
    return np.sum([a * np.sin(2 * np.pi * f * time + phase) for a, f, phase in waves], axis=0)


def chirp(time: Array, rng: np.random.Generator) -> Array:
    """A sine from 0.3 to 2.5 Hz with a random amplitude near 1.2 N m: large swings, sometimes over the top."""
    return rng.uniform(1.1, 1.3) * np.sin(2 * np.pi * (0.3 + 0.12 * time) * time)


def swing_up(state: Array, time: float, rig: BenchRig) -> Array:
    """Pump energy until upright, then follow a slow sway there: state (angle, velocity) `[B, 2]` -> torque `[B]`."""
    angle, velocity = state[:, 0], state[:, 1]
    inertia = rig.link_inertia + rig.rotor_inertia
    missing = 1.1 * rig.mgl - (0.5 * inertia * velocity**2 - rig.mgl * np.cos(angle))
    strength = np.linspace(0.8, 1.1, len(state))  # runs differ
    pump = np.clip(4 * missing, 0.0, strength) * np.where(velocity >= 0, 1.0, -1.0)
    error = np.arctan2(-np.sin(angle), -np.cos(angle))  # from upright
    sway = 0.15 * np.sin(2 * np.pi * 0.6 * time)
    return np.where(np.abs(error) < 0.35, -7.0 * (error - sway) - 1.0 * velocity, pump)


def write_balance(file: Path, seed: int) -> None:
    """Save 48 episodes of 1.2 s near upright under the gain (8 N m/rad, 1.5 N m s/rad) plus torques at random."""
    episodes, steps = 48, 120
    rng = np.random.default_rng(seed)
    start = np.stack([np.pi + rng.uniform(-0.2, 0.2, episodes), np.zeros(episodes)], axis=1)
    act = lambda s, k: -8.0 * (s[:, 0] - np.pi) - 1.5 * s[:, 1] + rng.normal(0.0, 0.15, episodes)
    run = rig_rollout(act, seed=seed, steps=steps, episodes=episodes, initial=start)
    log = RolloutLog(
        signals=torch.from_numpy(run.states),
        actions=torch.from_numpy(run.torques).unsqueeze(-1),
        exogenous=None,
        mask=torch.ones(episodes, steps, dtype=torch.bool),
        dt=BenchRig().control_period,
        names={
            "signal": ("angle", "velocity"),
            "action": ("torque",),
            "exogenous": (),
            "episode": tuple(f"balance_{i}" for i in range(episodes)),
        },
        units={"angle": "rad", "velocity": "rad/s", "torque": "N m"},
        source="examples/make_rig_log.py",
    )
    save_log(log, file)


def write_log(folder: Path, seed: int) -> list[Path]:
    """Write `run_0.csv` ... `run_3.csv`, `schema.yaml` and `balance.parquet`; return the files written."""
    rig = BenchRig()
    rng = np.random.default_rng(seed)
    time = rig.control_period * np.arange(STEPS)
    given = [multisine(time, rng), chirp(time, rng)]

    def act(state: Array, k: int) -> Array:
        torque = swing_up(state, time[k], rig)
        torque[: len(given)] = [excitation[k] for excitation in given]
        return torque

    trajectory = rig_rollout(act, seed=seed, steps=STEPS, episodes=len(given) + 2, rig=rig)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "schema.yaml"]
    files[0].write_text(SCHEMA)
    for run in range(len(trajectory.states)):
        rows = np.stack(logged_rows(trajectory, run, seed=seed, rig=rig), axis=1)
        rows[:, 1] = np.rad2deg(rows[:, 1])
        files.append(folder / f"run_{run}.csv")
        np.savetxt(files[-1], rows, "%.6f", ",", header="time,angle_deg,torque_command", comments="")
    files.append(folder / "balance.parquet")
    write_balance(files[-1], seed)
    return files


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[3])
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for written in write_log(arguments.out, arguments.seed):
        print(written)
