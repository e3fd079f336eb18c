"""The arm under operational-space control: its law against the torch map, its motion, its tasks, wrong arguments."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.arm import log_of, recovered, returned, scripted, still, study
from benchmarks.ohio_learning import Recipe
from benchmarks.rows import stored
from sim2real.simulators.robot_arm import HIGH_DAMPING, ORIGINAL, SOFT_ROTATION, arm_task, run_goal, start_arm
from sim2real.solvers.inversion_maps import operational_space_torques


def test_goals_are_recovered_from_torques() -> None:
    # The law runs in numpy on MuJoCo's matrices; the map that is inverted is written in torch. 1e-7 is the solver's
    # tolerance (1e-11 of the torques) times the map's condition.
    log = log_of("door", 1)
    goal, residual = recovered(log, ORIGINAL)
    assert residual.max() <= 1e-8
    torch.testing.assert_close(goal[..., :6], log.goal[..., :6], atol=1e-7, rtol=0)
    rows = {key: value[0] for key, value in log.rows.items()}
    theta = {key: torch.tensor(value, dtype=torch.float64) for key, value in vars(SOFT_ROTATION).items()}
    soft = operational_space_torques()(theta, rows, log.goal[0, :, :6])
    assert (soft - log.torque[0].flatten(1)).abs().max() > 0.1  # other gains give other torques


def test_the_hand_moves_as_a_damped_spring() -> None:
    # With exact inertia and no other force, p'' = kp (goal - p) - 2 sqrt(kp) p': from rest, critically damped,
    # p(t) / goal = 1 - (1 + w t) exp(-w t), w = sqrt(kp). The null-space posture is small near the start; the
    # controller holds its torque for 10 ms (delay of 5 ms: 6 % of 1/w), the joints have damping: 12 % of the way.
    task = arm_task("lift")
    data = start_arm(task, np.random.default_rng(0))
    for _ in range(20):  # to rest
        run_goal(task, data, np.array([0, 0, 0, 0, 0, 0, -1.0]))
    before = data.site_xpos[task.grip].copy()
    wanted = before + np.array([0.0, 0.05, 0.05])
    times, way = [], []
    for _ in range(8):
        offset = wanted - data.site_xpos[task.grip]
        run_goal(task, data, np.array([*offset, 0, 0, 0, -1.0]))
        times.append(0.05 * (len(times) + 1))
        way.append(((data.site_xpos[task.grip] - before) @ (wanted - before)) / 0.005)
    w = np.sqrt(150.0)
    exact = 1 - (1 + w * np.array(times)) * np.exp(-w * np.array(times))
    assert np.abs(np.array(way) - exact).max() <= 0.12


@pytest.mark.parametrize(("name", "least"), [("lift", 0.6), ("door", 0.5)])
def test_the_scripted_policy_does_the_task_and_high_damping_slows_it(name: str, least: float) -> None:
    # A hand that stays gets less than 0.2 of the return for being near
    task = arm_task(name)
    score = returned(task, lambda t, d: scripted(t, d), ORIGINAL, 1)
    assert score >= least
    assert returned(task, still, ORIGINAL, 1) <= 0.2
    assert returned(task, lambda t, d: scripted(t, d), HIGH_DAMPING, 1) <= 0.7 * score


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"the arm has the tasks \['door', 'lift'\], got 'wipe'"):
        arm_task("wipe")
    task = arm_task("lift")
    data = start_arm(task, np.random.default_rng(0))
    with pytest.raises(ValueError, match="a goal is 3 displacements"):
        run_goal(task, data, np.full(7, np.nan))


def test_a_small_study_can_be_resumed(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "arm.json"
    small = ("lift",), 1, 2, 1, Recipe("iql", updates=4, batch=16, every=2)
    study(*small, store)
    rows = stored(store)
    assert {(row["policy"], row["gains"]) for row in rows} == {
        ("data", "original"), ("nothing", "original"), ("ohio", "original"), ("ohio", "stiffness"), ("ohio", "damping"),
    }  # fmt: skip
    assert all(np.isfinite(row["value"]) for row in rows)
    study(*small, store)
    assert stored(store) == rows
