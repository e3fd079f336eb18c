"""A seven-joint arm under operational-space control that lifts a block or opens a door, in MuJoCo.

Every `RUNS` periods of the controller (100 Hz, five engine steps of 2 ms each) the upper level gives a goal

    u = (displacement of the hand in m, rotation vector in rad, gripper: closes where positive)

relative to the pose at that moment; the controller runs, with k_d = 2 sqrt(k_p) zeta,

    torque = J_p' Lambda_p (k_p (p_goal - p) - k_d v) + J_r' Lambda_r (k_p e - k_d omega) + bias,
    Lambda = (J M^-1 J')^-1,   e = sum_i r_i x r_goal_i / 2,   bias = Coriolis, gravity and a posture in the null space,

limited at the motors. Everything about a run that the law needs is recorded (`Segment`), so that goals can be recovered
from torques (`solvers.inversion_maps.operational_space_torques`), under these gains or under others. Lengths are those
of the Franka Panda; masses and inertias are plausible ones.
Reference: Schmidt et al., Offline hierarchical reinforcement learning via inverse optimization, 2024, appendix B.2;
Khatib, A unified approach for motion and force control of robot manipulators, 1987.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import mujoco
import numpy as np
from numpy.typing import NDArray

from sim2real.simulators.mujoco_messages import engine_messages

Array = NDArray[np.float64]
RUNS = 5
"""of the controller, per goal"""
JOINTS = 7
_SUBSTEPS = 5
_HOME = np.array([0.0, np.pi / 16, 0.0, -np.pi / 2 - np.pi / 3, 0.0, np.pi - 0.2, np.pi / 4])
_LIMIT = np.array([87.0, 87.0, 87.0, 87.0, 12.0, 12.0, 12.0])  # N m
_OPEN = 0.04  # m, each finger
_ARM = """
<mujoco model="arm">
  <compiler angle="radian" autolimits="true"/>
  <option timestep="0.002" integrator="implicitfast" cone="elliptic" impratio="10"/>
  <default>
    <default class="link"><joint axis="0 0 1" armature="0.1" damping="0.5"/>
      <geom type="capsule" size="0.05" contype="0" conaffinity="0" density="0" rgba="0.85 0.85 0.85 1"/></default>
    <default class="finger"><joint type="slide" range="0 0.04" armature="0.05" damping="5"/>
      <geom type="box" size="0.01 0.008 0.025" friction="2 0.05 0.001" condim="4" mass="0.02" solref="0.01 1"
            rgba="0.3 0.3 0.3 1"/></default>
  </default>
  <worldbody>
    <light pos="0.5 0 2"/><camera name="side" pos="1.4 -1.2 1" xyaxes="0.7 0.7 0 -0.3 0.3 0.9"/>
    <body childclass="link" pos="0 0 0.333">
      <inertial pos="0 0 -0.07" mass="3" diaginertia="0.02 0.02 0.01"/>
      <joint name="joint1" range="-2.9 2.9"/><geom fromto="0 0 -0.25 0 0 0"/>
      <body quat="1 -1 0 0">
        <inertial pos="0 -0.07 0" mass="3" diaginertia="0.02 0.01 0.02"/>
        <joint name="joint2" range="-1.76 1.76"/><geom fromto="0 0 0 0 -0.25 0"/>
        <body pos="0 -0.316 0" quat="1 1 0 0">
          <inertial pos="0.04 0 -0.06" mass="2.5" diaginertia="0.02 0.02 0.01"/>
          <joint name="joint3" range="-2.9 2.9"/><geom fromto="0 0 0 0.0825 0 0"/>
          <body pos="0.0825 0 0" quat="1 1 0 0">
            <inertial pos="-0.04 0.04 0" mass="2.5" diaginertia="0.02 0.01 0.02"/>
            <joint name="joint4" range="-3.07 -0.07"/><geom fromto="0 0 0 -0.0825 0.1 0"/>
            <body pos="-0.0825 0.384 0" quat="1 -1 0 0">
              <inertial pos="0 0.02 -0.1" mass="2.5" diaginertia="0.03 0.03 0.01"/>
              <joint name="joint5" range="-2.9 2.9"/><geom fromto="0 0 -0.25 0 0 0"/>
              <body quat="1 1 0 0">
                <inertial pos="0.05 0 0" mass="1.5" diaginertia="0.005 0.005 0.005"/>
                <joint name="joint6" range="-0.0175 3.75"/><geom fromto="0 0 0 0.088 0 0"/>
                <body pos="0.088 0 0" quat="1 1 0 0">
                  <inertial pos="0 0 0.08" mass="1.4" diaginertia="0.003 0.003 0.002"/>
                  <joint name="joint7" range="-2.9 2.9"/><geom fromto="0 0 0 0 0 0.09"/>
                  <body name="hand" pos="0 0 0.107" quat="0.9238795 0 0 -0.3826834">
                    <geom type="box" size="0.02 0.07 0.02" pos="0 0 0.02" mass="0.1"/>
                    <site name="grip" pos="0 0 0.1"/>
                    <body childclass="finger" pos="0 0.01 0.09"><joint name="finger1" axis="0 1 0"/><geom/></body>
                    <body childclass="finger" pos="0 -0.01 0.09"><joint name="finger2" axis="0 -1 0"/><geom/></body>
                  </body>
                </body>
              </body>
            </body>
          </body>
        </body>
      </body>
    </body>
    {scene}
  </worldbody>
  <actuator>
    {motors}
    <position joint="finger1" kp="1000" forcerange="-30 30" ctrlrange="0 0.04"/>
    <position joint="finger2" kp="1000" forcerange="-30 30" ctrlrange="0 0.04"/>
  </actuator>
</mujoco>
"""
_SCENES = {
    "lift": """
    <geom name="table" type="box" size="0.3 0.4 0.02" pos="0.5 0 -0.1" friction="1 0.005 0.0001" rgba="0.6 0.5 0.4 1"/>
    <body name="object" pos="0.5 0 -0.06"><freejoint name="object"/>
      <geom type="box" size="0.02 0.02 0.02" mass="0.1" friction="2 0.05 0.001" condim="4" solref="0.01 1"
            rgba="0.8 0.2 0.2 1"/></body>""",
    "door": """
    <body name="door" pos="0.62 0.3 -0.07">
      <joint name="object" axis="0 0 -1" range="0 1.5" damping="1" frictionloss="0.5" armature="0.01"/>
      <geom type="box" size="0.015 0.2 0.2" pos="0 -0.2 0" mass="3" contype="0" conaffinity="0" rgba="0.6 0.5 0.4 1"/>
      <body name="object" pos="-0.1 -0.35 0.05">
        <geom type="cylinder" size="0.012 0.06" mass="0.1" friction="2 0.05 0.001" condim="4" rgba="0.8 0.2 0.2 1"/>
        <geom type="capsule" size="0.01" fromto="0 0 -0.06 0.1 0 -0.06" contype="0" conaffinity="0"/>
      </body>
    </body>""",
}


@dataclass(frozen=True)
class ArmTask:
    """One of the tasks; made by `arm_task`."""

    name: Literal["lift", "door"]
    model: mujoco.MjModel
    grip: int
    """site between the fingers"""
    object: int
    """body of the block, or of the door's handle"""


@dataclass(frozen=True)
class ArmGains:
    """Of the controller, each `[6]`: three of position, three of rotation."""

    kp: tuple[float, ...] = (150.0,) * 6
    """stiffness, 1/s2"""
    zeta: tuple[float, ...] = (1.0,) * 6
    """damping ratio"""


ORIGINAL = ArmGains()
SOFT_ROTATION = ArmGains(kp=(150.0, 150.0, 150.0, 50.0, 50.0, 50.0))
"""the paper's changed stiffness"""
HIGH_DAMPING = ArmGains(zeta=(3.0, 3.0, 3.0, 1.0, 1.0, 1.0))
"""the paper's changed damping"""


@dataclass(frozen=True)
class Segment:
    """What one goal did: `rows` (of `operational_space_torques`), each `[RUNS, ...]`, and what came of it."""

    rows: dict[str, Array]
    torque: Array
    """`[RUNS, 7]` N m, as applied"""
    reward: float
    """sum over the runs"""
    done: bool
    """the block is lifted by 5 cm, or the door opened by 0.3 rad, at the end"""


def arm_task(name: Literal["lift", "door"]) -> ArmTask:
    """A block to lift from a table, or a door to open by its handle; raises `ValueError` for another name."""
    if name not in _SCENES:
        raise ValueError(f"the arm has the tasks {sorted(_SCENES)}, got {name!r}")
    motors = "".join(f'<motor joint="joint{i + 1}" ctrlrange="-{x} {x}"/>' for i, x in enumerate(_LIMIT))
    with engine_messages():
        model = mujoco.MjModel.from_xml_string(_ARM.format(scene=_SCENES[name], motors=motors))
    return ArmTask(name, model, model.site("grip").id, model.body("object").id)


def start_arm(task: ArmTask, generator: np.random.Generator) -> mujoco.MjData:
    """The arm near its posture, the gripper open; the block within +-(6, 8) cm and any turn, the door shut."""
    data = mujoco.MjData(task.model)
    data.qpos[:JOINTS] = _HOME + 0.02 * generator.standard_normal(JOINTS)
    data.qpos[JOINTS : JOINTS + 2] = _OPEN
    if task.name == "lift":
        place = task.model.joint("object").qposadr[0]
        data.qpos[place : place + 2] += generator.uniform((-0.06, -0.08), (0.06, 0.08))
        turn = generator.uniform(-0.3, 0.3) / 2  # a square block: turns past 45 degrees repeat
        data.qpos[place + 3 : place + 7] = np.cos(turn), 0.0, 0.0, np.sin(turn)
    mujoco.mj_forward(task.model, data)
    return data


def progress(task: ArmTask, data: mujoco.MjData) -> float:
    """1 where the task is done: height of the block over 5 cm, or angle of the door over 0.3 rad."""
    if task.name == "lift":
        return float(data.xpos[task.object, 2] + 0.06) / 0.05
    return float(data.joint("object").qpos[0]) / 0.3


def arm_features(task: ArmTask, data: mujoco.MjData) -> Array:
    """`[22]`: object from the grip (m, x10, and in units of 2 cm, squashed by tanh), grip, two axes of the hand, its
    velocity (m/s), opening (of one finger, x25), rate of the opening, progress and height of the object (x10)."""
    grip, frame = data.site_xpos[task.grip], data.site_xmat[task.grip].reshape(3, 3)
    jacobian = np.zeros((3, task.model.nv))
    mujoco.mj_jacSite(task.model, data, jacobian, None, task.grip)
    opening = data.qpos[JOINTS : JOINTS + 2].mean()
    away, height = data.xpos[task.object] - grip, data.xpos[task.object, 2]
    rest = [25 * opening, 5 * data.qvel[JOINTS : JOINTS + 2].mean(), progress(task, data), 10 * height]
    hand = [grip, frame[:, 0], frame[:, 1], jacobian @ data.qvel]
    return np.concatenate([10 * away, np.tanh(50 * away), *hand, rest])


def run_goal(task: ArmTask, data: mujoco.MjData, goal: Array, gains: ArmGains = ORIGINAL) -> Segment:
    """Advance `data` by `RUNS` runs of the controller towards goal u `[7]`.

    The reward of a run is 0.2 (1 - tanh(10 |object - grip|)) + 0.8 min(max(progress, 0), 1): at most 1. Raises
    `ValueError` for a goal that is not finite or not of length 7.
    """
    if goal.shape != (7,) or not np.isfinite(goal).all():
        raise ValueError(f"a goal is 3 displacements, a rotation vector and the gripper, finite; got {goal}")
    start = _pose(task, data)
    wanted = start[0] + goal[:3], _rotation(goal[3:6]) @ start[1]
    kp, zeta = np.array(gains.kp), np.array(gains.zeta)
    runs, torques, reward = [], [], 0.0
    for _ in range(RUNS):
        row = _law_terms(task, data)
        torque = np.clip(_torque(row, wanted, kp, 2 * np.sqrt(kp) * zeta), -_LIMIT, _LIMIT)
        data.ctrl[:JOINTS] = torque
        data.ctrl[JOINTS:] = 0.0 if goal[6] > 0 else _OPEN
        mujoco.mj_step(task.model, data, _SUBSTEPS)
        mujoco.mj_forward(task.model, data)  # poses of the state reached, not of the one before
        distance = float(np.linalg.norm(data.xpos[task.object] - data.site_xpos[task.grip]))
        reward += 0.2 * (1 - np.tanh(10 * distance)) + 0.8 * min(max(progress(task, data), 0.0), 1.0)
        runs.append(row)
        torques.append(torque)
    rows = {name: np.stack([row[name] for row in runs]) for name in runs[0]}
    return Segment(rows, np.stack(torques), reward, progress(task, data) >= 1.0)


def _pose(task: ArmTask, data: mujoco.MjData) -> tuple[Array, Array]:
    return data.site_xpos[task.grip].copy(), data.site_xmat[task.grip].reshape(3, 3).copy()


def _law_terms(task: ArmTask, data: mujoco.MjData) -> dict[str, Array]:
    """What the law needs of one state, under the names of `operational_space_torques`."""
    model, nv = task.model, task.model.nv
    full, jacobian = np.zeros((nv, nv)), np.zeros((6, nv))
    mujoco.mj_fullM(model, data, full)
    mujoco.mj_jacSite(model, data, jacobian[:3], jacobian[3:], task.grip)
    J, velocity = jacobian[:, :JOINTS], jacobian @ data.qvel
    inverse = np.linalg.inv(full[:JOINTS, :JOINTS])
    mobility = J @ inverse @ J.T
    inertia = np.linalg.pinv(mobility)
    place, axes = _pose(task, data)
    posture = 10.0 * (_HOME - data.qpos[:JOINTS]) - 2 * np.sqrt(10.0) * data.qvel[:JOINTS]
    null = np.eye(JOINTS) - J.T @ inertia @ J @ inverse
    return {
        "position_map": J[:3].T @ np.linalg.pinv(mobility[:3, :3]),
        "rotation_map": J[3:].T @ np.linalg.pinv(mobility[3:, 3:]),
        "position": place,
        "velocity": velocity,
        "axes": axes,
        "bias": data.qfrc_bias[:JOINTS] + null @ (full[:JOINTS, :JOINTS] @ posture),
    }


def _torque(row: dict[str, Array], wanted: tuple[Array, Array], kp: Array, kd: Array) -> Array:
    error = 0.5 * np.cross(row["axes"], wanted[1], axis=0).sum(-1)
    force = kp[:3] * (wanted[0] - row["position"]) - kd[:3] * row["velocity"][:3]
    turn = kp[3:] * error - kd[3:] * row["velocity"][3:]
    return row["position_map"] @ force + row["rotation_map"] @ turn + row["bias"]


def _rotation(vector: Array) -> Array:
    quaternion, matrix = np.zeros(4), np.zeros(9)
    angle = float(np.linalg.norm(vector))
    mujoco.mju_axisAngle2Quat(quaternion, vector / angle if angle else np.array([1.0, 0.0, 0.0]), angle)
    mujoco.mju_quat2Mat(matrix, quaternion)
    return matrix.reshape(3, 3)
