"""Bars of differentiable MuJoCo: accuracy, features, cost, peers, identification, a real closed loop, scaling.

    python benchmarks/mujoco_gradients.py [--bar j-accuracy] [--quick] [--json]

`j-accuracy`, `j-features`: see `mujoco_accuracy.py`, `mujoco_features.py`; `j-cost`, `j-peers`, `j-parameters`,
`j-scale`: `mujoco_cost.py`; `j-sysid`: `mujoco_sysid.py`; `j-closed-loop`: `mujoco_closed_loop.py`; `j-train` prints
the stored rows of `study_mujoco.py`, which takes hours. Float64, one thread, 1024 environments unless said otherwise.

`j-peers/mjx`: time of a step with its gradient by state and control in MJX over ours, the lower of hopper and
half-cheetah: the same model and states, 256 environments, one processor. MJX takes one solver iteration with four
line-search steps (it has no reverse mode with more) in float32, compiled before; ours is converged, float64, with seven
fields per environment besides. It needs MJX in an environment of its own, whose Python SIM2REAL_MJX_PYTHON names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import mujoco
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bars import Figure, MissingError, main
from benchmarks.mujoco_accuracy import accuracy
from benchmarks.mujoco_closed_loop import closed_loop
from benchmarks.mujoco_cost import cost, load, moving_states, parameters, peers, scale, step_microseconds
from benchmarks.mujoco_features import features_bar
from benchmarks.mujoco_sysid import sysid
from benchmarks.study_mujoco import report

HERE = Path(__file__).resolve().parent
COPIES = 256
MINUTES = 20
"""for each model in MJX, which compiles for one to ten of them"""


def mjx(quick: bool) -> Iterator[Figure]:
    """`j-peers/mjx`, by another Python."""
    python = os.environ.get("SIM2REAL_MJX_PYTHON")
    if not python:
        raise MissingError("SIM2REAL_MJX_PYTHON does not name a Python with jax and mujoco-mjx")
    ratios = []
    for name in ("hopper",) if quick else ("hopper", "half_cheetah"):
        peer = _mjx(python, name)
        ours = step_microseconds(name, COPIES)
        ratios.append(peer["gradient"] / ours)
        yield Figure(f"mjx-{name}", ratios[-1], "times", COPIES)
        yield Figure(f"mjx-{name}-step", peer["step"], "us", COPIES)
        yield Figure(f"mjx-{name}-gradient", peer["gradient"], "us", COPIES)
        yield Figure(f"mjx-{name}-compile", peer["compile_step"] + peer["compile_gradient"], "s", 1)
        yield Figure(f"mjx-{name}-ours", ours, "us", COPIES)
    yield Figure("mjx", min(ratios), "times", COPIES, 5.0)


def _mjx(python: str, name: str) -> dict[str, float]:
    """What `mujoco_mjx.py` measures on a model in the states that ours is measured in."""
    model = load(name, damped=False)
    q, v, ctrl = moving_states(model, COPIES)
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / part) for part in ("model.mjb", "states.npz")]
        mujoco.mj_saveModel(model, files[0], None)
        np.savez(files[1], qpos=q, qvel=v, ctrl=ctrl)
        command = [python, str(HERE / "mujoco_mjx.py"), *files]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60 * MINUTES, check=False)
    if done.returncode:
        raise MissingError(f"MJX failed: {done.stderr[-500:]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def all_peers(quick: bool) -> Iterator[Figure]:
    """`j-peers`."""
    yield from peers(quick)
    yield from mjx(quick)


def training(quick: bool) -> Iterator[Figure]:
    """`j-train`: the stored study."""
    path = HERE / "results" / "mujoco_training.json"
    if not path.exists():
        raise MissingError(f"no rows in {path}: run benchmarks/study_mujoco.py")
    yield from report(path)


if __name__ == "__main__":
    main(
        {
            "j-accuracy": accuracy,
            "j-features": features_bar,
            "j-cost": cost,
            "j-peers": all_peers,
            "j-parameters": parameters,
            "j-sysid": sysid,
            "j-closed-loop": closed_loop,
            "j-scale": scale,
            "j-train": training,
        }
    )
