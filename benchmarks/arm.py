"""A robot arm whose controller is changed: logged torques inverted under the new gains, then IQL (study; minutes).

    python benchmarks/arm.py --json                                    the figures from the stored rows
    python benchmarks/arm.py --run [--task door] [--seeds 3]           measure what is missing (resumable)

Data: 150 episodes of 60 goals (3 s) by a scripted policy with noise under the original gains; states, torques of all
runs, rewards. Each goal is recovered from its five torques (`solvers.invert`) under the gains at deployment: the
original ones, soft rotation (kp 150 -> 50) or high damping (zeta 1 -> 3), the changes of the paper. IQL on (s, u, r,
s') with torchrl's loss, 3 seeds, the weights with the best held-out likelihood; 20 episodes each.

    CHANGE           return of IQL on re-inverted goals over that of IQL on the original goals with the original gains;
                     of the two tasks the lower one
    TASK-CHANGE, TASK-CHANGE-plain      of one task; and of the goals as logged, under the changed gains
    TASK-data        return of the scripted policy; TASK-nothing: of a hand that stays
    TASK-CHANGE-residual                median residual of the torques, N m

Reference: Schmidt et al., 2024, table 2: 89.6 -> 98.9 and 75.8 (lift), 94.1 -> 92.7 and 76.7 (door); its own tasks,
data of SAC and a Panda in robosuite, so figures are not comparable one by one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Literal, get_args

import mujoco
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bars import Figure, MissingError, main
from benchmarks.ohio_learning import Networks, Recipe, Transitions, VectorCritic, best, gaussian, learn, perceptron
from benchmarks.rows import append, present, stamp, stored
from sim2real.simulators.robot_arm import (
    HIGH_DAMPING,
    JOINTS,
    ORIGINAL,
    RUNS,
    SOFT_ROTATION,
    ArmGains,
    ArmTask,
    arm_features,
    arm_task,
    run_goal,
    start_arm,
)
from sim2real.solvers.inversion import invert
from sim2real.solvers.inversion_maps import operational_space_torques

Array = NDArray[np.float64]
Act = Callable[[ArmTask, mujoco.MjData], Array]
Task = Literal["lift", "door"]
TASKS: tuple[Task, ...] = get_args(Task)
GAINS = {"original": ORIGINAL, "stiffness": SOFT_ROTATION, "damping": HIGH_DAMPING}
GOALS = 60
WIDTH = 128
"""of critics; the policy has layers of 256"""
STORE = Path(__file__).parent / "results" / "arm.json"
SCALE = torch.tensor([0.1] * 3 + [0.5] * 3 + [1.0])
LOW, HIGH = (torch.tensor([sign * 0.4] * 3 + [sign * 1.5] * 3, dtype=torch.float64) for sign in (-1, 1))
RECIPE = Recipe("iql", updates=3000, rate=1e-3, critic_rate=1e-3, anneal=True, discount=0.97, expectile=0.7, every=500)


@dataclass(frozen=True)
class ArmLog:
    """E episodes of `GOALS` goals under the original gains."""

    features: Tensor
    """`[E, GOALS + 1, 22]`"""
    goal: Tensor
    """`[E, GOALS, 7]`"""
    reward: Tensor
    torque: Tensor
    """`[E, GOALS, RUNS, 7]`"""
    rows: dict[str, Tensor]
    """of `operational_space_torques`, `[E, GOALS, RUNS, ...]`"""


def scripted(task: ArmTask, data: mujoco.MjData) -> Array:
    """Down a funnel over the object, grip, then up or back; the hand upright. Depends on the present state alone."""
    grip, frame = data.site_xpos[task.grip], data.site_xmat[task.grip].reshape(3, 3)
    away = data.xpos[task.object] - grip
    side = float(np.hypot(away[0], away[1]))
    opening, held = data.qpos[JOINTS : JOINTS + 2].mean(), 0.024 if task.name == "lift" else 0.016
    turn = np.diag([1.0, -1.0, -1.0]) @ frame.T
    upright = 0.5 * np.array([turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]])
    near = side < 0.025 and abs(away[2]) < 0.025
    pull = np.array([0.0, 0.0, 0.05] if task.name == "lift" else [-0.05, 0.0, 0.0])
    reach = away + np.array([0.0, 0.0, np.clip(3.0 * (side - 0.01), 0.0, 0.09)])
    grasped = np.clip((held + 0.006 - opening) / 0.006, 0.0, 1.0) if near else 0.0
    move = np.clip(reach, -0.05, 0.05) + grasped * pull
    return np.concatenate([move, np.clip(upright, -0.5, 0.5), [1.0 if near else -1.0]])


def noisy(generator: np.random.Generator, task: ArmTask, data: mujoco.MjData) -> Array:
    """The scripted goal with noise of 1 cm and 0.04 rad; the gripper does the opposite once in twenty goals."""
    spread = np.array([0.01] * 3 + [0.04] * 3 + [0.0])
    goal = scripted(task, data) + spread * generator.standard_normal(7)
    goal[6] *= np.sign(generator.uniform() - 0.05)
    return goal


def still(task: ArmTask, data: mujoco.MjData) -> Array:
    """The goal that is the present pose."""
    return np.zeros(7)


@cache
def log_of(name: Task, episodes: int) -> ArmLog:
    """What the scripted policy with noise leaves behind."""
    task, generator = arm_task(name), np.random.default_rng(0)
    kept: dict[str, list[Array]] = {key: [] for key in ("features", "goal", "reward", "torque")}
    rows: dict[str, list[Array]] = {}
    for _ in range(episodes):
        data = start_arm(task, generator)
        kept["features"].append(arm_features(task, data))
        for _ in range(GOALS):
            goal = noisy(generator, task, data)
            segment = run_goal(task, data, goal)
            found = {"features": arm_features(task, data), "goal": goal, "torque": segment.torque}
            for key, value in (found | {"reward": np.array(segment.reward)}).items():
                kept[key].append(value)
            for key, value in segment.rows.items():
                rows.setdefault(key, []).append(value)
    shaped = lambda values: torch.from_numpy(np.stack(values)).unflatten(0, (episodes, -1))
    return ArmLog(**{key: shaped(values) for key, values in kept.items()}, rows={k: shaped(v) for k, v in rows.items()})


def law(gains: ArmGains) -> dict[str, Tensor]:
    """theta of `operational_space_torques`."""
    return {key: torch.tensor(value, dtype=torch.float64) for key, value in vars(gains).items()}


def recovered(log: ArmLog, gains: ArmGains) -> tuple[Tensor, Tensor]:
    """Goals `[E, GOALS, 7]` under these gains, and the residual of the torques `[E, GOALS]`; NaN where not unique."""
    flat = {key: value.flatten(0, 1) for key, value in log.rows.items()}
    start = torch.zeros(len(flat["position"]), 6, dtype=torch.float64)
    limit = torch.tensor([87.0] * 4 + [12.0] * 3, dtype=torch.float64)
    predict = operational_space_torques(limit=limit)
    torque = log.torque.flatten(0, 1).flatten(1)
    found = invert(predict, law(gains), flat, torque, start, low=LOW, high=HIGH, differentiable=False)
    goal = torch.cat([found.u, log.goal.flatten(0, 1)[:, 6:]], -1)
    return goal.unflatten(0, log.goal.shape[:2]), found.residual.unflatten(0, log.goal.shape[:2])


def transitions(log: ArmLog, goal: Tensor, middle: Tensor, spread: Tensor) -> Transitions:
    """Rows with a goal, standardised; the end of an episode is a time limit."""
    known = goal.isfinite().all(-1)
    features = ((log.features - middle) / spread).float()
    now, following = features[:, :-1][known], features[:, 1:][known]
    terminal = torch.zeros(len(now), dtype=torch.bool)
    return Transitions(now, goal[known].float() / SCALE, log.reward[known].float() / RUNS, following, terminal)


def trained(log: ArmLog, goal: Tensor, recipe: Recipe, seed: int) -> Act:
    """IQL's policy: the weights with the best likelihood of the last tenth of the episodes."""
    middle, spread = log.features.mean((0, 1)), log.features.std((0, 1)).clamp(min=1e-3)
    last = max(1, len(goal) // 10)
    parts = [ArmLog(log.features[s], log.goal[s], log.reward[s], log.torque[s], {}) for s in _split(last)]
    train, held_out = (transitions(p, goal[s], middle, spread) for p, s in zip(parts, _split(last), strict=True))
    torch.manual_seed(seed)
    size = train.features.shape[1]
    networks = Networks(perceptron(size, 14), VectorCritic(size, 7, WIDTH), perceptron(size, 1, WIDTH))
    family = gaussian(0.05)
    chosen = min(learn(train, held_out, networks, family, recipe, seed=seed), key=lambda p: p.held_out).policy

    def act(task: ArmTask, data: mujoco.MjData) -> Array:
        features = (torch.from_numpy(arm_features(task, data)) - middle) / spread
        scaled = best(networks.policy, family, chosen, features.float().unsqueeze(0))[0]
        return (scaled * SCALE).double().numpy()

    return act


def _split(last: int) -> tuple[slice, slice]:
    return slice(None, -last), slice(-last, None)


def returned(task: ArmTask, act: Act, gains: ArmGains, episodes: int) -> float:
    """Mean return of new episodes, as a share of the largest possible one."""
    generator, total = np.random.default_rng(1000), 0.0
    for _ in range(episodes):
        data = start_arm(task, generator)
        for _ in range(GOALS):
            total += run_goal(task, data, act(task, data), gains).reward
    return total / (episodes * GOALS * RUNS)


def study(tasks: tuple[Task, ...], seeds: int, episodes: int, tests: int, recipe: Recipe, store: Path) -> None:
    """All rows that the store lacks, one seed of everything after the other."""
    where = stamp("torch", "torchrl", "mujoco")
    for seed, name in product(range(seeds), tasks):
        task = arm_task(name)
        keep = partial(_keep, store, {"task": name, "episodes": episodes, "updates": recipe.updates} | where)
        for policy, act in {"data": partial(noisy, np.random.default_rng(2000)), "nothing": still}.items():
            key = {"policy": policy, "gains": "original", "seed": 0}
            keep(key, partial(returned, task, act, ORIGINAL, tests))
        for change, gains in GAINS.items():
            make = partial(_both, task, change, gains, seed, episodes, tests, recipe)
            keep({"policy": "ohio", "gains": change, "seed": seed}, make)


def _both(
    task: ArmTask, change: str, gains: ArmGains, seed: int, episodes: int, tests: int, recipe: Recipe
) -> dict[str, float]:
    """Returns of IQL on goals recovered under `gains`, and on goals as logged, both under `gains`."""
    log = log_of(task.name, episodes)
    goal, residual = recovered(log, gains)
    result = {
        "value": returned(task, trained(log, goal, recipe, seed), gains, tests),
        "residual": float(residual.median()),
        "unexplained": float(goal.isnan().any(-1).double().mean()),
    }
    if change != "original":
        result["plain"] = returned(task, trained(log, log.goal, recipe, seed), gains, tests)
    else:
        result["recovered"] = float((goal - log.goal).nan_to_num().square().mean().sqrt())
    return result


def _keep(
    store: Path, about: dict[str, object], key: dict[str, object], measure: Callable[[], float | dict[str, float]]
) -> None:
    key = {name: about[name] for name in ("task", "episodes", "updates")} | key
    if present(stored(store), **key):
        return
    found = measure()
    append(store, about | key | (found if isinstance(found, dict) else {"value": found}))
    print(key, found, flush=True)


def o_arm(quick: bool) -> Iterator[Figure]:
    """Figures of the stored rows."""
    rows = stored(STORE)
    if not rows:
        raise MissingError("no stored rows; run `python benchmarks/arm.py --run` (about 20 minutes of one core)")
    of = lambda task, **key: [r for r in rows if present([r], task=task, **key)]
    mean = lambda found, name="value": sum(r[name] for r in found) / len(found)
    shares: dict[str, list[float]] = {"stiffness": [], "damping": []}
    for task in TASKS:
        base = of(task, policy="ohio", gains="original")
        if not base:
            continue
        for policy in ("data", "nothing"):
            yield Figure(f"{task}-{policy}", mean(of(task, policy=policy)), "share of the largest return", 1)
        yield Figure(f"{task}-original", mean(base), "share of the largest return", len(base))
        for change, kept in shares.items():
            found = of(task, policy="ohio", gains=change)
            if found:
                kept.append(100 * mean(found) / mean(base))
                yield Figure(f"{task}-{change}", kept[-1], "% of the original", len(found))
                plain = 100 * mean(found, "plain") / mean(base)
                yield Figure(f"{task}-{change}-plain", plain, "% of the original", len(found))
                yield Figure(f"{task}-{change}-residual", mean(found, "residual"), "N m", len(found))
    for change, kept in shares.items():
        if len(kept) == len(TASKS):
            yield Figure(change, min(kept), "% of the original", len(kept), 90.0 if change == "stiffness" else 75.0)


if __name__ == "__main__":
    if "--run" in sys.argv:
        parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
        parser.add_argument("--run", action="store_true")
        parser.add_argument("--task", action="append", choices=TASKS, help="default: all")
        parser.add_argument("--seeds", type=int, default=3)
        parser.add_argument("--quick", action="store_true", help="a few episodes and updates, rows to quick.json")
        given = parser.parse_args()
        torch.set_num_threads(1)
        sizes = (12, 2, Recipe("iql", updates=200, every=100)) if given.quick else (150, 20, RECIPE)
        place = STORE.with_name("arm-quick.json") if given.quick else STORE
        study(tuple(given.task or TASKS), given.seeds, sizes[0], sizes[1], sizes[2], place)
    else:
        main({"o-arm": o_arm})
