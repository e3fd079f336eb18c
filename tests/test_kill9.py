"""Bar `kill9`: killed at 20 random moments each, `fit` and `tune` resume and end bitwise equal to the unbroken run.

Four moments each in the default suite, twenty each with `make test-slow`. Besides random moments, the child dies at its
n-th flush or renaming of a file, for every n there is. The children are forked from a process that has imported
everything, so that a moment costs a second.
"""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
WORLD = '''
import torch
from sim2real import ModelMDP, Params, Policy, Rollout, rollout, sample_noise
from sim2real.simulators import linear_gaussian

A, B = torch.tensor([[1.0, 0.2], [0.0, 0.9]]).double(), torch.tensor([[0.0], [0.3]]).double()

def model(dt=1.0):
    return linear_gaussian(A, B, noise_covariance=0.01 * torch.eye(2).double())

def collect(policy, nu, iteration, generator):
    """The real system has twice the input gain and other damping."""
    real, theta = model(), {"A": A - 0.05 * torch.eye(2).double(), "B": 2 * B}
    return rollout(real, policy, theta, nu, sample_noise(real, policy, 8, 20, generator))
'''
SCHEMA = """
time: {column: time, unit: s}
signals: {angle: {column: angle, unit: rad}, velocity: {derivative_of: angle, window: 5, order: 3}}
actions: {torque: {column: torque, unit: N m}}
dt: 0.01
"""
Run = Callable[..., dict[str, float]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a damped oscillation as log and a world to tune on."""
    place = tmp_path_factory.mktemp("kill9")
    (place / "world.py").write_text(WORLD)
    (place / "schema.yaml").write_text(SCHEMA)
    time = np.arange(500) * 0.01
    angle = 0.8 * np.exp(-0.3 * time) * np.cos(4.2 * time) + 1e-3 * np.random.default_rng(0).normal(size=500)
    np.savetxt(place / "run.csv", np.stack([time, angle, np.sin(time)], 1), "%.5f", ",", header="time,angle,torque",
               comments="")  # fmt: skip
    return place


@pytest.fixture(scope="module")
def run(folder: Path) -> Iterator[Run]:
    """run(words, kill_after=seconds, kill_at=n) -> code, signal, seconds of one command in its own process."""
    server = subprocess.Popen(
        [sys.executable, str(HERE / "kill9_server.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert server.stdin is not None
    assert server.stdout is not None
    stdin, stdout = server.stdin, server.stdout

    def ask(words: list[str], **kill: float) -> dict[str, float]:
        stdin.write(json.dumps({"words": words, **kill}) + "\n")
        stdin.flush()
        return json.loads(stdout.readline())

    yield ask
    stdin.close()
    server.wait()


COMMANDS = {
    "fit": [
        "fit", "log=run.csv", "schema=schema.yaml", "model=pendulum", "fit.horizon=0.2", "fit.stride=0.2",
        "fit.free=[mgl,damping,torque_offset]", "fit.delay=true", "fit.tolerance=1e-10", "report=false",
    ],
    "tune": [
        "tune", "model._target_=world.model", "policy=linear", "policy.std=0.2", "horizon=3", "batch=4",
        "tune.max_steps=2", "discount=0.9", "data.mode=callable", "data.callable=world.collect", "report=false",
    ],
}  # fmt: skip
RESULTS = ("params.json", "params.safetensors", "policy/policy.npz")


def results(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in RESULTS if (out / name).exists()}


@pytest.fixture(scope="module", params=sorted(COMMANDS))
def unbroken(request: pytest.FixtureRequest, folder: Path, run: Run) -> tuple[str, dict[str, bytes], float]:
    """Name of the command, what its unbroken run leaves, and its wall time (the second run: the first warms caches)."""
    name = request.param
    for attempt in range(2):
        out = folder / f"{name}-unbroken-{attempt}"
        answer = run([*COMMANDS[name], f"out={out}"])
        assert answer["code"] == 0
    assert len(results(out)) == (3 if name == "tune" else 2)
    assert results(out) == results(folder / f"{name}-unbroken-0")
    return name, results(out), answer["seconds"]


@pytest.mark.parametrize("moments", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_bitwise_equal(
    unbroken: tuple[str, dict[str, bytes], float], folder: Path, run: Run, moments: int
) -> None:
    name, expected, seconds = unbroken
    draw = random.Random(f"kill9 {name} {moments}")
    killed = 0
    for moment in range(moments):
        out = folder / f"{name}-{moments}-{moment}"
        words = [*COMMANDS[name], f"out={out}"]
        first = run(words, kill_after=draw.uniform(0.0, seconds))
        killed += first["signal"] == signal.SIGKILL
        assert run(words)["code"] == 0
        assert results(out) == expected, f"moment {moment}"
    # the others had ended before their moment came: machines are not evenly loaded
    assert killed >= moments // 2


def test_killed_at_every_write_it_ends_bitwise_equal(
    unbroken: tuple[str, dict[str, bytes], float], folder: Path, run: Run
) -> None:
    """One run that is killed again and again, each time one write further, ends like the unbroken one."""
    name, expected, _ = unbroken
    words = [*COMMANDS[name], f"out={folder / f'{name}-writes'}"]
    for n in range(1, 200):
        answer = run(words, kill_at=n)
        if answer["signal"] != signal.SIGKILL:
            break
    assert answer["code"] == 0
    assert n > 10
    assert results(folder / f"{name}-writes") == expected
