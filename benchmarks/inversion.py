"""Inversion of observed transitions: closed forms, batched Levenberg-Marquardt, and its peers in the same run.

`o-lqr`      error: closed forms against numerical inversion of the simulated lower level (scipy, least norm), largest
             difference over one and five steps, affine terms, rank-deficient maps and noise that is not isotropic

`o-invert`   reacher: 50 000 five-step transitions of the nonlinear arm under finite-horizon LQR towards a hidden goal,
             motor torques limited; integrator: 50 000 of the double integrator, closed form; integrator-clipped: the
             same with the action limited at 1; torques: 10 000 times five runs of the operational-space law, 35 limited
             torques on synthetic Jacobians. Of each TASK:

    TASK-converged   residual at most 1e-8, share of the rows in which not every input of the segment is at its limit
    TASK-seconds     CPU seconds of one thread (process time), preparing gains not included
    TASK-flagged     share of the other rows that is flagged
    TASK-hidden      how many others there are; TASK-limited: share of the rows with any input at its limit
    TASK-adam-converged, TASK-adam-seconds     the method of the public implementation, batched: Adam 0.01, 600 steps
    TASK-cem-converged, TASK-cem-seconds       cross-entropy, 50 samples, best fifth, 50 rounds
    TASK-adam-extrapolated                     hours of one row at a time, one Adam step each, 1000 steps a row

`o-reacher`  model: largest difference of one step from MuJoCo, 2000 random steps away from the wrist limit
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from torch import Tensor
from torch.func import jacrev, vmap

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bars import Figure, MissingError, main
from sim2real.params import Params
from sim2real.simulators.reacher import reacher, reacher_step, wrist_free
from sim2real.solvers.inversion import invert
from sim2real.solvers.inversion_descent import invert_adam, invert_cem
from sim2real.solvers.inversion_lqr import AffineLaw, feedback_law, goal_tracking_law, invert_law
from sim2real.solvers.inversion_maps import feedback_lower, operational_space_torques, rotation, transition_map
from sim2real.solvers.inversion_problem import Inversion, Predict

STEPS = 5
MET = 1e-8
PEER_ROWS = 2000
XML = """
<mujoco>
  <option timestep="0.02"><flag contact="disable"/></option>
  <default><joint type="hinge" axis="0 0 1" damping="0.01"/>
    <motor gear="0.05" ctrlrange="-1 1" ctrllimited="true"/></default>
  <worldbody>
    <body name="arm" pos="0 0 0.01">
      <geom type="capsule" fromto="0 0 0 0.12 0 0" size="0.01"/><joint name="shoulder"/>
      <body name="hand" pos="0.12 0 0">
        <geom type="capsule" fromto="0 0 0 0.1 0 0" size="0.01"/>
        <joint name="wrist" limited="true" range="-160 160"/>
        <body name="finger" pos="0.12 0 0"><geom name="finger" type="sphere" size="0.01"/></body>
      </body>
    </body>
  </worldbody>
  <actuator><motor joint="shoulder"/><motor joint="wrist"/></actuator>
</mujoco>
"""


@dataclass(frozen=True)
class Task:
    """Transitions with hidden inputs."""

    predict: Predict
    theta: Params
    rows: Params
    start: Tensor
    outcome: Tensor
    at_limit: Tensor
    """`[N, K]`: which inputs of the segment are at their limit"""


def draw(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def diagonal(*entries: float) -> Tensor:
    return torch.diag(torch.tensor(entries, dtype=torch.float64))


def apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def reacher_task(count: int) -> Task:
    """Goals half a radian and half a rad/s (1 sigma) from the state, every fiftieth six times as far."""
    generator = torch.Generator().manual_seed(0)
    theta = {key: torch.tensor(value, dtype=torch.float64) for key, value in reacher().box.default.items()}
    angles = (2 * torch.rand(count, 2, generator=generator, dtype=torch.float64) - 1) * torch.tensor([math.pi, 2.5])
    state = torch.cat([angles.double(), 2 * draw(generator, count, 2)], -1)
    far = 1 + 5 * (torch.arange(count) % 50 == 0).double().unsqueeze(-1)
    goal = state + far * draw(generator, count, 4) * torch.tensor([0.25, 0.25, 1.0, 1.0], dtype=torch.float64)
    still, step = torch.zeros(count, 2, dtype=torch.float64), partial(reacher_step, theta)
    A, B = (vmap(jacrev(step, argnums=k))(state, still) for k in (0, 1))
    law = feedback_law(A, B, diagonal(10, 10, 1, 1), 0.1 * torch.eye(2, dtype=torch.float64), STEPS)
    rows = {"state": state, "gain": torch.stack(law.state_gain, 1)}
    build = partial(transition_map, lambda theta, s, a, e: reacher_step(theta, s, a), feedback_lower(), STEPS)
    return _finish(build, theta, rows, goal, 1.0)


def integrator_task(count: int, limit: float) -> Task:
    """The paper's double integrator: 0.5 s a step, Q = diag(4, 1), R = 0.2."""
    generator = torch.Generator().manual_seed(1)
    theta = {"A": torch.tensor([[1.0, 0.5], [0.0, 1.0]]).double(), "B": torch.tensor([[0.125], [0.5]]).double()}
    law = feedback_law(theta["A"], theta["B"], diagonal(4, 1), diagonal(0.2), STEPS)
    state = draw(generator, count, 2)
    rows = {"state": state, "gain": torch.stack(law.state_gain).expand(count, -1, -1, -1)}
    step = lambda theta, s, a, e: s @ theta["A"].mT + a @ theta["B"].mT
    build = partial(transition_map, step, feedback_lower(), STEPS)
    return _finish(build, theta, rows, draw(generator, count, 2), limit)


def _finish(build: Callable[..., Predict], theta: Params, rows: Params, goal: Tensor, limit: float) -> Task:
    predict = build(low=-limit, high=limit)
    actions = build(low=-limit, high=limit, outcome="actions")(theta, rows, goal)
    return Task(predict, theta, rows, rows["state"], predict(theta, rows, goal), actions.abs() >= limit)


def torques_task(count: int, limit: float = 80.0) -> Task:
    """Seven joints, random maps, goals of 0.1 m and 0.3 rad (1 sigma) from the first pose."""
    generator = torch.Generator().manual_seed(2)
    theta = {"kp": torch.full((6,), 150.0, dtype=torch.float64), "zeta": torch.ones(6, dtype=torch.float64)}
    drift = 0.01 * draw(generator, count, STEPS, 3).cumsum(1)
    rows = {
        "position_map": draw(generator, count, STEPS, 7, 3),
        "rotation_map": draw(generator, count, STEPS, 7, 3),
        "position": drift,
        "velocity": 0.1 * draw(generator, count, STEPS, 6),
        "axes": rotation(drift + draw(generator, count, 1, 3)),
        "bias": draw(generator, count, STEPS, 7),
    }
    goal = torch.cat([0.1 * draw(generator, count, 3), 0.3 * draw(generator, count, 3)], -1)
    predict = operational_space_torques(limit=limit)
    outcome = predict(theta, rows, goal)
    return Task(predict, theta, rows, torch.zeros_like(goal), outcome, outcome.abs() >= limit)


def o_invert(quick: bool) -> Iterator[Figure]:
    count, short = (5000, 1000) if quick else (50000, 10000)
    tasks = {
        "reacher": (partial(reacher_task, count), 3.2, 0.007),
        "integrator": (partial(integrator_task, count, math.inf), None, 0.23),
        "integrator-clipped": (partial(integrator_task, count, 1.0), None, None),
        "torques": (partial(torques_task, short), None, None),
    }
    for name, (make, hours, share) in tasks.items():
        task = make()
        seconds, found = clocked(partial(solve, name, task))
        yield from figures(name, task, found, seconds)
        yield from peers(name, task, hours, share, 100 if quick else 600)


def solve(name: str, task: Task) -> Inversion:
    if name == "integrator":  # affine: closed form
        A, B = task.theta["A"], task.theta["B"]
        zero = A.new_zeros(2)
        law = feedback_law(A, B, diagonal(4, 1), diagonal(0.2), STEPS)
        return invert_law(law, A, B, zero, task.rows["state"], task.outcome)
    return invert(task.predict, task.theta, task.rows, task.outcome, task.start, differentiable=False)


def figures(name: str, task: Task, found: Inversion, seconds: float) -> Iterator[Figure]:
    hidden = task.at_limit.all(-1)
    met, others = (found.residual <= MET)[~hidden], int(hidden.sum())
    yield Figure(f"{name}-converged", float(met.double().mean()), "1", len(met), 0.995)
    yield Figure(f"{name}-seconds", seconds, "s", len(hidden), 15.0)
    if others:
        yield Figure(f"{name}-flagged", float(found.saturated[hidden].double().mean()), "1", others, 1.0)
    yield Figure(f"{name}-hidden", float(others), "rows", len(hidden))
    yield Figure(f"{name}-limited", float(task.at_limit.any(-1).double().mean()), "1", len(hidden))


def peers(name: str, task: Task, hours: float | None, share: float | None, steps: int) -> Iterator[Figure]:
    part = min(PEER_ROWS, len(task.start))
    rows = {key: value[:part] for key, value in task.rows.items()}
    data = (task.predict, task.theta, rows, task.outcome[:part], task.start[:part])
    visible = ~task.at_limit[:part].all(-1)
    for label, run, reference in (
        ("adam", partial(invert_adam, *data, tolerance=1e-12, max_steps=steps), share),
        ("cem", partial(invert_cem, *data, generator=torch.Generator().manual_seed(3), max_steps=steps // 12), None),
    ):
        seconds, found = clocked(run)
        met = (found.residual <= MET)[visible]
        yield Figure(f"{name}-{label}-converged", float(met.double().mean()), "1", len(met), reference)
        yield Figure(f"{name}-{label}-seconds", seconds, "s", part)
    one = {key: value[:1] for key, value in task.rows.items()}
    first = (task.predict, task.theta, one, task.outcome[:1], task.start[:1])
    seconds, _ = clocked(partial(invert_adam, *first, tolerance=0.0, max_steps=50))
    extrapolated = seconds / 50 * 1000 * len(task.start) / 3600
    yield Figure(f"{name}-adam-extrapolated", extrapolated, "h", 50, hours)


def clocked(run: Callable[[], Inversion]) -> tuple[float, Inversion]:
    begin = time.process_time()
    found = run()
    return time.process_time() - begin, found


def o_lqr(quick: bool) -> Iterator[Figure]:
    """Largest difference of u from scipy's least-norm answer on the simulated law."""
    worst, count = 0.0, 0
    for seed in range(3 if quick else 20):
        generator = torch.Generator().manual_seed(seed)
        for n, m in ((2, 1), (4, 2), (3, 3)):
            A = torch.eye(n, dtype=torch.float64) + 0.2 * draw(generator, 8, n, n)
            B, c, state, reached = draw(generator, 8, n, m), *(draw(generator, 8, n) for _ in range(3))
            roots = [draw(generator, k, k) for k in (n, m, n)]
            Q, R, precision = (r @ r.mT + 0.1 * torch.eye(len(r), dtype=torch.float64) for r in roots)
            for horizon in (1, STEPS):
                laws = (feedback_law(A, B, Q, R, horizon), goal_tracking_law(A, B, c, Q, R, horizon))
                for law in laws:
                    for weight in (None, precision):
                        worst = max(worst, gap(law, (A, B, c, state, reached), weight))
                        count += 8
    yield Figure("error", worst, "1", count, 1e-9)


def gap(law: AffineLaw, data: tuple[Tensor, ...], precision: Tensor | None) -> float:
    """Relative to the larger of 1 and |u|."""
    A, B, c, state, reached = data
    found = invert_law(law, A, B, c, state, reached, precision=precision).u

    def simulate(u: Tensor) -> Tensor:
        x = state
        for G, H, h in zip(law.state_gain, law.goal_gain, law.offset, strict=True):
            x = apply(A, x) + apply(B, apply(G, x) + apply(H, u) + h) + c
        return x

    offset = simulate(torch.zeros_like(state))
    columns = [simulate(e.expand_as(state)) - offset for e in torch.eye(state.shape[1], dtype=torch.float64)]
    root = np.eye(state.shape[1]) if precision is None else scipy.linalg.sqrtm(precision.numpy()).real
    worst = 0.0
    for X, d, u in zip(torch.stack(columns, -1), reached - offset, found, strict=True):
        best = scipy.linalg.lstsq(root @ X.numpy(), root @ d.numpy(), cond=1e-10)[0]
        worst = max(worst, float(np.abs(u.numpy() - best).max() / max(1.0, np.abs(best).max())))
    return worst


def o_reacher(quick: bool) -> Iterator[Figure]:
    try:
        import mujoco
    except ImportError as error:
        raise MissingError(f"mujoco is not installed ({error})") from error
    model = mujoco.MjModel.from_xml_string(XML)
    engine, rng = mujoco.MjData(model), np.random.default_rng(0)
    theta = {key: torch.tensor(value, dtype=torch.float64) for key, value in reacher().box.default.items()}
    pairs, actions = [], rng.uniform(-1, 1, (20, 100, 2))
    for episode in actions:
        engine.qpos[:], engine.qvel[:] = rng.uniform(-2.5, 2.5, 2), 3 * rng.normal(size=2)
        for action in episode:
            before, engine.ctrl[:] = np.r_[engine.qpos, engine.qvel], action
            mujoco.mj_step(model, engine)
            pairs.append(np.stack([before, np.r_[engine.qpos, engine.qvel]]))
    states = torch.from_numpy(np.array(pairs))
    free = wrist_free(states)[:, 0]
    ours = reacher_step(theta, states[:, 0], torch.from_numpy(actions.reshape(-1, 2)))
    yield Figure("model", float((ours - states[:, 1])[free].abs().max()), "1", int(free.sum()), 1e-12)


if __name__ == "__main__":
    main({"o-lqr": o_lqr, "o-invert": o_invert, "o-reacher": o_reacher})
