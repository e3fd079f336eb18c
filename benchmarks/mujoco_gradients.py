"""Bars of differentiable MuJoCo: accuracy, features, cost, peers, identification, a real closed loop, scaling.

    python benchmarks/mujoco_gradients.py [--bar j-accuracy] [--quick] [--json]

`j-accuracy`, `j-features`: see `mujoco_accuracy.py`, `mujoco_features.py`; `j-cost`, `j-peers`, `j-parameters`,
`j-scale`: `mujoco_cost.py`; `j-sysid`: `mujoco_sysid.py`; `j-closed-loop`: `mujoco_closed_loop.py`; `j-train` prints
the stored rows of `study_mujoco.py`, which takes hours. Float64, one thread, 1024 environments unless said otherwise.

`j-peers/mjx`: time of a step with its gradient by state and control in MJX over ours, on hopper: MJX with one solver
iteration in float32 at the reset pose, 256 environments, one processor; ours converged, float64, with contacts, and
with all parameters. It needs MJX in an environment of its own, whose Python SIM2REAL_MJX_PYTHON names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bars import Figure, MissingError, main
from benchmarks.mujoco_accuracy import accuracy
from benchmarks.mujoco_closed_loop import closed_loop
from benchmarks.mujoco_cost import cost, hopper_step_microseconds, parameters, peers, scale
from benchmarks.mujoco_features import features_bar
from benchmarks.mujoco_sysid import sysid
from benchmarks.study_mujoco import report

HERE = Path(__file__).resolve().parent
COPIES = 256
MINUTES = 15
"""for MJX, which compiles for one to six of them"""


def mjx(quick: bool) -> Iterator[Figure]:
    """`j-peers/mjx`, by another Python."""
    python = os.environ.get("SIM2REAL_MJX_PYTHON")
    if not python:
        raise MissingError("SIM2REAL_MJX_PYTHON does not name a Python with jax and mujoco-mjx")
    try:
        import gymnasium
    except ImportError as error:
        raise MissingError(f"Gymnasium, whose hopper this is, is not installed ({error})") from error
    file = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets" / "hopper.xml"
    command = [python, str(HERE / "mujoco_mjx.py"), str(COPIES), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60 * MINUTES, check=False)
    if done.returncode:
        raise MissingError(f"MJX failed: {done.stderr[-500:]}")
    peer = json.loads(done.stdout.strip().splitlines()[-1])
    ours = hopper_step_microseconds()
    yield Figure("mjx", peer["gradient"] / ours, "times", COPIES, 5.0)
    yield Figure("mjx-step", peer["step"], "us", COPIES)
    yield Figure("mjx-gradient", peer["gradient"], "us", COPIES)
    yield Figure("mjx-compile", peer["compile_step"] + peer["compile_gradient"], "s", 1)
    yield Figure("mjx-ours", ours, "us", 1024)


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
