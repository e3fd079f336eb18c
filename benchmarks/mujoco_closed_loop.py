"""A real pendubot swing-up in MuJoCo, with the logged plan and gains inside the loop.

The rig: two links through gears, joint 1 driven at 400 Hz; `closedloop_pendubot_tvlqr_1.csv` is 20 s of it, with
`plan_pendubot.csv` its plan with time-varying gains, and an LQR gain that takes over near the top. The XML below starts
from the authors' parameters (design A.0, model 2.0). The controller of the simulated loop is

    u = u_plan + K (x - x_plan) + 0.093 atan(100 w_1) + 0.001 w_1,  |u| <= 5 N m,  at time t;      from 4.4 s on
    u = -K_lqr (x - top) + the same friction compensation

Fitted, with this controller inside the loop, to the angles of the swing-up (windows of 1 s, then 2 s, then all of it):
masses, inertias, damping and dry friction of both joints. Then the written XML runs in plain MuJoCo, with encoder
steps, differenced and filtered velocities and 5 ms of delay.

    time         swing-up time, relative to the real one: when both links first come within 0.35 rad of the top
    tracking     root mean square of both angles' deviation from the plan over 4.2 s, relative to the real one
    *-start      the same with the authors' parameters
    *-seconds, *-rms                  what they are ratios of
    balance-rms  of both angles about the top from 6 s on, in rad: real, simulated as above, and ideal (no encoder
                 steps, no filter, no delay); inf where it falls
Data: dfki-ric-underactuated-lab/double_pendulum, BSD-3-Clause; Wiebe et al., IEEE RAM 31(2), 2024.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import mujoco
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bars import Figure, main
from benchmarks.real_logs import data
from sim2real import ModelMDP, Params, default_params
from sim2real.fit import FitSettings, fit
from sim2real.rollout_log import RolloutLog
from sim2real.simulators.mujoco_model import mujoco_model
from sim2real.simulators.mujoco_writer import save_xml

Array = NDArray[np.float64]

PERIOD, ENGINE_STEP, DELAY = 0.0025, 0.00125, 0.005
LIMIT, SWITCH, SWING, NEAR = 5.0, 4.4, 4.2, 0.35
ENCODER, FILTER = 0.000381475, 0.3
TOP = np.array([np.pi, 0.0, 0.0, 0.0])
MODEL = f"""<mujoco model="pendubot">
  <option timestep="{ENGINE_STEP}" integrator="implicitfast"/>
  <worldbody>
    <body name="upper" pos="0 0 1" simple="false">
      <joint name="shoulder" axis="0 -1 0" damping="0.02" frictionloss="0.146" armature="0.00587"/>
      <inertial pos="0 0 -0.3" mass="0.55938" diaginertia="1e-4 1e-4 1e-4"/>
      <body name="lower" pos="0 0 -0.3" simple="false">
        <joint name="elbow" axis="0 -1 0" damping="0.005" frictionloss="0.1225" armature="0.002757"/>
        <inertial pos="0 0 -0.183777" mass="0.604346" diaginertia="0.003513 0.003513 0.003513"/>
      </body>
    </body>
  </worldbody>
  <actuator><motor name="motor" joint="shoulder"/></actuator>
</mujoco>
"""
THETA = {
    "upper.mass": (0.2, 1.5),
    "shoulder.armature": (1e-4, 0.05),
    "lower.mass": (0.2, 1.5),
    "lower.com.z": (-0.3, -0.08),
    "lower.inertia.yy": (5e-4, 0.02),
    "shoulder.damping": (0.0, 0.2),
    "shoulder.frictionloss": (0.0, 0.4),
    "elbow.damping": (0.0, 0.1),
    "elbow.frictionloss": (0.0, 0.4),
}
SIGNALS = ("shoulder", "elbow", "shoulder_velocity", "elbow_velocity")


@dataclass(frozen=True)
class Run:
    """The real run and its controller, on the grid of the controller."""

    times: Array
    """`[R]` s"""
    states: Array
    """`[R, 4]` angles rad, differenced velocities rad/s"""
    commands: Array
    """`[R]` N m"""
    plan: Array
    """`[R, 9]` planned state, torque and the gains of the driven joint"""
    balance: Array
    """`[4]` LQR gain near the top"""


def closed_loop(quick: bool) -> Iterator[Figure]:
    """Fit with the controller inside the loop, then run the written XML next to the real run."""
    run = real_run()
    seconds, rms = swing_up_time(run.times, run.states), tracking(run, run.states)
    start = time.perf_counter()
    theta = fitted(run, (1.0,) if quick else (1.0, 2.0, 4.15))
    spent = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pendubot.xml"
        save_xml(path, MODEL, THETA, theta)
        after = simulated(mujoco.MjModel.from_xml_path(str(path)), run)
        ideal = simulated(mujoco.MjModel.from_xml_path(str(path)), run, ideal=True)
    before = simulated(mujoco.MjModel.from_xml_string(MODEL), run)
    for name, states in (("", after), ("-start", before)):
        reached, strayed = swing_up_time(run.times, states), tracking(run, states)
        yield Figure(f"time{name}", abs(reached / seconds - 1.0), "1", 1, 0.10)
        yield Figure(f"tracking{name}", abs(strayed / rms - 1.0), "1", 1, 0.25)
        yield Figure(f"simulated{name}-seconds", reached, "s", 1, seconds)
        yield Figure(f"simulated{name}-rms", strayed, "rad", 1, rms)
    for name, states in (("real", run.states), ("simulated", after), ("ideal", ideal)):
        yield Figure(f"balance-rms-{name}", balance(run.times, states), "rad", 1)
    yield Figure("fit-seconds", spent, "s", len(theta))


def real_run() -> Run:
    """The logged run, interpolated to 400 Hz, with the plan held after its end."""
    folder = data("double_pendulum")
    table = np.genfromtxt(folder / "design_A" / "closedloop_pendubot_tvlqr_1.csv", delimiter=",", names=True)
    plan = np.genfromtxt(folder / "design_A" / "plan_pendubot.csv", delimiter=",", names=True)
    times = np.arange(0.0, table["time"][-1], PERIOD)
    at = lambda source, names: np.stack([np.interp(times, source["time"], source[name]) for name in names], 1)
    return Run(
        times=times,
        states=at(table, ("pos_meas1", "pos_meas2", "vel_meas1", "vel_meas2")),
        commands=at(table, ("tau_con1",))[:, 0],
        plan=at(plan, ("pos1", "pos2", "vel1", "vel2", "tau1", "K11", "K12", "K13", "K14")),
        balance=np.loadtxt(folder / "published" / "design_A_pendubot_lqr_K.txt")[0],
    )


def fitted(run: Run, horizons: tuple[float, ...]) -> Params:
    """Parameters that reproduce the angles of the swing-up with the controller inside the loop."""
    mdp = with_controller(mujoco_model(MODEL, THETA, lambda theta, s, a, e, n: s[:, 0], frame_skip=2, delay=DELAY))
    theta, log = default_params(mdp.box), swing_up_log(run, mdp)
    for horizon in horizons:
        settings = FitSettings(
            signals=SIGNALS[:2],
            horizon=horizon,
            stride=0.25 if horizon < 4.0 else 1.0,
            sample_every=10,
            first_row=2,
            margin=0,
            loss_scale=0.1,
            prior_width=0.3,
            max_steps=12,
        )
        theta = fit(mdp, log, theta, settings).theta
    return theta


def with_controller(mdp: ModelMDP) -> ModelMDP:
    """The model under the controller of the swing-up; its action is the row of the plan."""
    names = {**mdp.names, "action": tuple(f"plan{k}" for k in range(9))}

    def step(theta: Params, state: Tensor, plan: Tensor, e: Tensor) -> Tensor:
        feedback = (plan[..., 5:9] * (state[..., :4] - plan[..., :4])).sum(-1)
        speed = state[..., 2]
        command = plan[..., 4] + feedback + 0.093 * torch.atan(100.0 * speed) + 0.001 * speed
        return mdp.step(theta, state, command.clamp(-LIMIT, LIMIT).unsqueeze(-1), e)

    return replace(mdp, step=step, names=names, open_loop=None, sensitivity=None)


def swing_up_log(run: Run, mdp: ModelMDP) -> RolloutLog:
    """The swing-up as a log: smoothed start velocities, commands under way, and the plan as its actions."""
    last = round(4.3 / PERIOD)
    states = run.states[:last].copy()
    kernel = np.ones(5) / 5.0  # the encoder's steps make raw velocities jump by 0.15 rad/s
    for column in (2, 3):
        states[:, column] = np.convolve(run.states[: last + 4, column], kernel, "same")[:last]
    ago = len(mdp.names["state"]) - 4
    under_way = np.stack([np.concatenate([np.zeros(k), run.commands[: last - k]]) for k in range(ago, 0, -1)], 1)
    signals = torch.from_numpy(np.concatenate([states, under_way], 1))[None]
    units = {name: mdp.units[name] for name in mdp.names["state"]}
    return RolloutLog(
        signals=signals,
        actions=torch.from_numpy(run.plan[: last - 1])[None],
        exogenous=None,
        mask=torch.ones(1, last - 1, dtype=torch.bool),
        dt=PERIOD,
        names={"signal": mdp.names["state"], "action": mdp.names["action"], "episode": ("swing-up",)},
        units=units,
        source="closedloop_pendubot_tvlqr_1.csv",
    )


def simulated(model: mujoco.MjModel, run: Run, *, ideal: bool = False) -> Array:
    """States `[R, 4]` of the model under the run's controller, as its sensors would see them (ideal: exactly)."""
    state, lag = mujoco.MjData(model), 0 if ideal else round(DELAY / ENGINE_STEP)
    commands, rows = [0.0] * (lag + 1), []
    previous, velocity = np.zeros(2), np.zeros(2)
    for k, clock in enumerate(run.times):
        angles = state.qpos.copy() if ideal else np.round(state.qpos / ENCODER) * ENCODER
        raw = state.qvel.copy() if ideal else (angles - previous) / PERIOD
        previous = angles
        swinging = clock < SWITCH
        velocity = velocity + (FILTER if swinging and not ideal else 1.0) * (raw - velocity)
        x, row = np.concatenate([angles, velocity]), run.plan[k]
        torque = row[4] + row[5:9] @ (x - row[:4]) if swinging else -run.balance @ (x - TOP)
        friction = 0.093 * math.atan(100.0 * velocity[0]) + 0.001 * velocity[0]
        command = float(np.clip(np.clip(torque, -LIMIT, LIMIT) + friction, -LIMIT, LIMIT))
        rows.append(np.concatenate([angles, raw]))
        for _ in range(round(PERIOD / ENGINE_STEP)):
            commands.append(command)
            state.ctrl[0] = commands[-1 - lag]
            mujoco.mj_step(model, state)
    return np.array(rows)


def swing_up_time(times: Array, states: Array) -> float:
    """When both links first come within 0.35 rad of upright, s; inf: never."""
    near = (abs(states[:, 0] - np.pi) < NEAR) & (abs(states[:, 0] + states[:, 1] - np.pi) < NEAR)
    return float(times[np.argmax(near)]) if near.any() else math.inf


def tracking(run: Run, states: Array) -> float:
    """Root mean square deviation of both angles from the plan over the swing-up, rad."""
    rows = run.times < SWING
    return float(np.sqrt(np.mean((states[rows, :2] - run.plan[rows, :2]) ** 2)))


def balance(times: Array, states: Array) -> float:
    """Root mean square of both angles about the top from 6 s on, rad; inf where it falls."""
    angles = states[times > 6.0, :2] - TOP[:2]
    return float(np.sqrt(np.mean(angles**2))) if float(abs(angles).max()) < 1.5 else math.inf


if __name__ == "__main__":
    main({"j-closed-loop": closed_loop})
