"""A torque-driven pendulum bench, richer than the models that are fitted to it: a black-box world in numpy.

Two inertias (rotor and gear, link) joined by a gear with play, in joint coordinates (q_m motor, q link, 0 = hanging)::

    J_m q_m'' = tau(t - delay) (1 + ripple sin 12 q_m) + offset - friction - tau_c - cogging sin 24 q_m
    J   q''   = tau_c - mgl sin q - damping q'
    tau_c     = stiffness e + contact_damping (q_m' - q') outside the play, e = q_m - q less half the play; else 0

Friction of the gear is the LuGre law (presliding, stiction, Stribeck effect)::

    z' = v - bristle_stiffness |v| z / g(v),   g(v) = coulomb + (stiction - coulomb) exp(-(v / v_s)^2)
    friction = bristle_stiffness z + bristle_damping z'

The encoder is quantised and has another zero in each run; the controller sees its filtered difference as velocity.
Semi-implicit Euler with 0.5 ms steps; the bristle is integrated exactly for given v.
Reference: Canudas de Wit, Olsson, Astrom, Lischinsky, A new model for control of systems with friction, 1995, eq. 1-4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Act = Callable[[Array, int], Array]


@dataclass(frozen=True)
class BenchRig:
    """Constants of the rig, SI units, angles in rad."""

    link_inertia: float = 0.085
    rotor_inertia: float = 0.010
    mgl: float = 2.2
    damping: float = 0.02
    coulomb: float = 0.10
    stiction: float = 0.16
    stribeck_velocity: float = 0.15
    bristle_stiffness: float = 60.0
    bristle_damping: float = 0.6
    play: float = 0.012
    gear_stiffness: float = 150.0
    contact_damping: float = 0.4
    torque_offset: float = 0.03
    torque_limit: float = 1.5
    ripple: float = 0.02
    cogging: float = 0.02
    delay: float = 0.008
    encoder_step: float = 2 * np.pi / 4096
    zero_spread: float = 0.03
    velocity_filter: float = 0.02
    """time constant of the controller's velocity filter, s"""
    control_period: float = 0.01
    fine_step: float = 0.0005


@dataclass(frozen=True)
class RigTrajectory:
    """B runs of T control steps, as the rig's computer knows them, and the truth behind them.

    `times [T+1]` s; `states [B, T+1, 2]` measured angle (quantised, with the run's zero) and filtered velocity;
    `torques [B, T]` commanded, within the limit; `zeros [B]` rad; `fine_angles [B, T * substeps + 1]` true link angle.
    """

    times: Array
    states: Array
    torques: Array
    zeros: Array
    fine_angles: Array


def rig_rollout(
    act: Act,
    *,
    seed: int,
    steps: int,
    episodes: int = 1,
    initial: Array | None = None,
    rig: BenchRig | None = None,
) -> RigTrajectory:
    """Run `act(states [B, 2], k) -> torque [B]` on the rig for `steps` control periods.

    `states` are measured (angle rad, velocity rad/s); the drive cuts torques off at its limit. `initial [B, 2]` is
    the true start (link angle, velocity); default: hanging, at rest somewhere in the friction band.
    Raises `ValueError` for wrong shapes or a torque that is not finite.
    """
    rig = rig or BenchRig()
    if steps < 1 or episodes < 1:
        raise ValueError(f"steps and episodes must be at least 1, got {steps} and {episodes}")
    rng = np.random.default_rng(seed)
    zeros = rng.uniform(-rig.zero_spread, rig.zero_spread, episodes)
    rest = 0.5 * rig.coulomb / rig.mgl * rng.uniform(-1, 1, episodes)
    start = np.stack([rest, np.zeros(episodes)], 1) if initial is None else np.asarray(initial, dtype=np.float64)
    if start.shape != (episodes, 2):
        raise ValueError(f"initial has shape {start.shape}, expected ({episodes}, 2): angle and velocity of each run")
    substeps, lag = round(rig.control_period / rig.fine_step), round(rig.delay / rig.fine_step)
    q, v = start[:, 0].copy(), start[:, 1].copy()
    mechanics: tuple[Array, ...] = (q.copy(), v.copy(), q, v, np.zeros(episodes))
    smoothing = rig.control_period / (rig.velocity_filter + rig.control_period)
    angle = _encoder(q, zeros, rig)
    velocity = v.copy()
    states, torques, fine = [np.stack([angle, velocity], 1)], [], [q]
    for k in range(steps):
        torque = np.asarray(act(states[-1], k), dtype=np.float64).reshape(-1)
        if torque.shape != (episodes,) or not np.isfinite(torque).all():
            raise ValueError(f"act returned {torque} at step {k}; expected {episodes} finite torques in N m")
        torques.append(np.clip(torque, -rig.torque_limit, rig.torque_limit))
        for j in range(substeps):
            sent = k * substeps + j - lag
            applied = torques[sent // substeps] if sent >= 0 else np.zeros(episodes)
            mechanics = _fine_step(mechanics, applied, rig)
            fine.append(mechanics[2])
        previous, angle = angle, _encoder(mechanics[2], zeros, rig)
        velocity = velocity + smoothing * ((angle - previous) / rig.control_period - velocity)
        states.append(np.stack([angle, velocity], 1))
    return RigTrajectory(
        times=np.asarray(rig.control_period * np.arange(steps + 1), dtype=np.float64),
        states=np.stack(states, 1),
        torques=np.stack(torques, 1),
        zeros=zeros,
        fine_angles=np.stack(fine, 1),
    )


def _encoder(q: Array, zeros: Array, rig: BenchRig) -> Array:
    return np.round((q + zeros) / rig.encoder_step) * rig.encoder_step


def _fine_step(state: tuple[Array, ...], torque: Array, rig: BenchRig) -> tuple[Array, ...]:
    """One semi-implicit Euler step of (motor angle, motor velocity, link angle, link velocity, bristle)."""
    qm, vm, q, v, z = state
    h = rig.fine_step
    twist = qm - q
    pressed = twist - np.clip(twist, -rig.play / 2, rig.play / 2)
    coupling = np.where(pressed != 0.0, rig.gear_stiffness * pressed + rig.contact_damping * (vm - v), 0.0)
    level = rig.coulomb + (rig.stiction - rig.coulomb) * np.exp(-((vm / rig.stribeck_velocity) ** 2))
    rate = rig.bristle_stiffness * np.abs(vm) / level
    settled = np.sign(vm) * level / rig.bristle_stiffness
    following = np.where(rate > 0.0, settled + (z - settled) * np.exp(-rate * h), z)
    friction = rig.bristle_stiffness * following + rig.bristle_damping * (following - z) / h
    motor = torque * (1 + rig.ripple * np.sin(12 * qm)) + rig.torque_offset - rig.cogging * np.sin(24 * qm)
    vm = vm + h / rig.rotor_inertia * (motor - friction - coupling)
    v = v + h / rig.link_inertia * (coupling - rig.mgl * np.sin(q) - rig.damping * v)
    return qm + h * vm, vm, q + h * v, v, following


def logged_rows(
    trajectory: RigTrajectory, episode: int, *, seed: int, period: float = 0.005, rig: BenchRig | None = None
) -> tuple[Array, Array, Array]:
    """What the rig's logger writes of one run: times `[R]` s, encoder angles `[R]` rad, commanded torques `[R]` N m.

    The logger runs beside the controller on its own uneven clock: each row is about 0.2 ms late (a gamma law), one in
    200 by another 2 ms. The stamps are right.
    """
    rig = rig or BenchRig()
    rng = np.random.default_rng([seed, episode])
    end = trajectory.times[-1]
    late = rng.gamma(2.0, 1e-4, round(end / period) + 1) + 2e-3 * (rng.random(round(end / period) + 1) < 0.005)
    times = period * np.arange(len(late)) + late
    times = times[times < end]
    fine = rig.fine_step * np.arange(trajectory.fine_angles.shape[1])
    angle = np.interp(times, fine, trajectory.fine_angles[episode])
    command = trajectory.torques[episode, np.floor(times / rig.control_period).astype(int)]
    return times, _encoder(angle, trajectory.zeros[episode], rig), command
