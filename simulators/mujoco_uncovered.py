"""Forces that the derivative program leaves out, each differenced alone at the frozen states.

Fluid drag, spatial tendons, muscles and site, body or slider-crank transmissions have no closed form here. Their sum
f(q, v, act, ctrl; theta) needs no solver, so MuJoCo gives it quickly; near a frozen state x0 the program takes

    f = f(x0) + f'(x0) (x - x0),      f' by centred differences, extrapolated from two steps (error of order step^4),

along every tangent direction of q, v, act and ctrl, and along the entries of those fields that such a force reads. The
rest of the residual stays exact. First derivatives hold to about 1e-10; of second order it knows nothing, so
whoever differentiates twice must refuse (`Structure.uncovered` is not empty).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import mujoco
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sim2real.simulators.mujoco_forces import Fields
from sim2real.simulators.mujoco_kinematics import State
from sim2real.simulators.mujoco_messages import engine_messages
from sim2real.simulators.mujoco_structure import Structure

Array = NDArray[np.float64]
_STEP = 1e-5  # truncation step^4 and rounding 1e-16/step are both below 1e-10


@dataclass(frozen=True, eq=False)
class Differenced:
    """The uncovered forces of B states and their derivatives."""

    force: Tensor
    """[B, nv]"""
    origin: dict[str, Tensor]
    """[B, n] where they were taken: v, act, ctrl, and the entries of fields"""
    slopes: dict[str, Tensor]
    """[B, nv, n] derivatives by d, v, act, ctrl, and by the entries of fields"""
    entries: dict[str, Tensor]
    """[n] which entries of a flattened field"""


@dataclass(frozen=True, eq=False)
class _Engine:
    """One scratch model and data, written for one environment after another."""

    structure: Structure
    model: mujoco.MjModel
    data: mujoco.MjData


def uncovered_force(differenced: Differenced, state: State, fields: Fields) -> Tensor:
    """The uncovered generalised force [B, nv], linear about the frozen states."""
    origin = differenced.origin
    steps = {"d": state.d, **{name: getattr(state, name) - origin[name] for name in ("v", "act", "ctrl")}}
    for name, entries in differenced.entries.items():
        steps[name] = fields[name].flatten(1)[:, entries] - origin[name]
    force = differenced.force
    for name, step in steps.items():
        force = force + (differenced.slopes[name] @ step[..., None]).squeeze(-1)
    return force


def freeze_uncovered(
    structure: Structure, state: State, fields: Fields, differentiated: tuple[str, ...]
) -> Differenced:
    """Difference the uncovered forces at B states, and by the entries of the named fields that they read."""
    model = copy.copy(structure.model)
    engine = _Engine(structure, model, mujoco.MjData(model))
    read = {name: index for name, index in _entries(structure).items() if name in differentiated and len(index)}
    written = {name: value for name, value in fields.items() if name in _entries(structure)}
    v = state.v
    states = [x.cpu().numpy().astype(np.float64) for x in (state.base, v, state.act, state.ctrl)]
    forces, slopes = [], []
    with engine_messages():
        for env in range(len(v)):
            row = {name: _row(value, env) for name, value in written.items()}
            force, slope = _differences(engine, tuple(x[env] for x in states), row, read)
            forces.append(force)
            slopes.append(slope)
    real = lambda arrays: torch.as_tensor(np.stack(arrays), dtype=v.dtype, device=v.device)
    entries = {name: torch.as_tensor(index, device=v.device) for name, index in read.items()}
    origin = {name: fields[name].detach().flatten(1)[:, index] for name, index in entries.items()}
    return Differenced(
        force=real(forces),
        origin={"v": v, "act": state.act, "ctrl": state.ctrl, **origin},
        slopes={name: real([slope[name] for slope in slopes]) for name in slopes[0]},
        entries=entries,
    )


def _differences(
    engine: _Engine, state: tuple[Array, ...], row: dict[str, Array], read: dict[str, Array]
) -> tuple[Array, dict[str, Array]]:
    """Force [nv] of one state and its derivatives [nv, n]."""
    model, data = engine.model, engine.data
    qpos, v, act, ctrl = state
    for name, value in row.items():
        getattr(model, name)[:] = value
    data.qpos[:], data.qvel[:], data.act[:], data.ctrl[:] = qpos, v, act, ctrl

    def moved(step: Array) -> Array:
        data.qpos[:] = qpos
        mujoco.mj_integratePos(model, data.qpos, step, 1.0)
        return _force(engine, moved=True)

    def shifted(target: Array, value: Array) -> Callable[[Array], Array]:
        def at(step: Array) -> Array:
            target[:] = value + step
            return _force(engine, moved=False)

        return at

    def edited(name: str) -> Callable[[Array], Array]:
        def at(step: Array) -> Array:
            value = row[name].copy()
            value.reshape(-1)[read[name]] += step
            getattr(model, name)[:] = value
            return _force(engine, moved=True)

        return at

    force = _force(engine, moved=True)
    slopes = {}
    for name, target, value in (("v", data.qvel, v), ("act", data.act, act), ("ctrl", data.ctrl, ctrl)):
        slopes[name] = _slope(shifted(target, value), np.full(len(value), _STEP), model.nv)
        target[:] = value
    for name, entries in read.items():
        size = np.maximum(np.abs(row[name].reshape(-1)[entries]), 1e-3)
        slopes[name] = _slope(edited(name), _STEP * size, model.nv)
        getattr(model, name)[:] = row[name]
    slopes["d"] = _slope(moved, np.full(model.nv, _STEP), model.nv)
    return force, slopes


def _slope(at: Callable[[Array], Array], steps: Array, rows: int) -> Array:
    """Derivative [nv, n] by Richardson's extrapolation of centred differences; `at` takes a displacement [n]."""
    out = np.zeros((rows, len(steps)))
    unit = np.zeros(len(steps))
    for k, step in enumerate(steps):
        unit[:] = 0
        unit[k] = step
        near, far = at(unit) - at(-unit), at(2 * unit) - at(-2 * unit)
        out[:, k] = (8 * near - far) / (12 * step)
    return out


def _force(engine: _Engine, *, moved: bool) -> Array:
    """The uncovered force [nv] at the state in `data`; positions are recomputed where they moved."""
    structure, model, data = engine.structure, engine.model, engine.data
    if moved:
        if any("body" in force.reason for force in structure.uncovered):
            mujoco.mj_fwdPosition(model, data)  # adhesion pulls at contacts
        else:
            for stage in (mujoco.mj_kinematics, mujoco.mj_comPos, mujoco.mj_tendon, mujoco.mj_transmission):
                stage(model, data)
    mujoco.mj_fwdVelocity(model, data)
    mujoco.mj_fwdActuation(model, data)
    total = np.zeros(model.nv)
    for force in structure.uncovered:
        if force.kind == "fluid":
            total += data.qfrc_fluid
        elif force.kind == "tendon":
            row = data.ten_J, model.ten_J_rownnz, model.ten_J_rowadr, model.ten_J_colind
            _scatter(total, row, force.index, _tendon_force(model, data, force.index))
        else:
            row = data.actuator_moment, data.moment_rownnz, data.moment_rowadr, data.moment_colind
            _scatter(total, row, force.index, float(data.actuator_force[force.index]))
    return total


def _tendon_force(model: mujoco.MjModel, data: mujoco.MjData, t: int) -> float:
    low, high = model.tendon_lengthspring[t]
    length, off = data.ten_length[t], model.opt.disableflags
    spring = model.tendon_stiffness[t] * (max(length - high, 0.0) + min(length - low, 0.0))
    damper = model.tendon_damping[t] * data.ten_velocity[t]
    stiff = not off & int(mujoco.mjtDisableBit.mjDSBL_SPRING)
    damped = not off & int(mujoco.mjtDisableBit.mjDSBL_DAMPER)
    return -float(stiff * spring + damped * damper)


def _scatter(total: Array, row: tuple[Array, Array, Array, Array], index: int, force: float) -> None:
    """Add force times one row of a sparse matrix."""
    values, counts, starts, columns = (np.asarray(part).reshape(-1) for part in row)
    span = slice(int(starts[index]), int(starts[index]) + int(counts[index]))
    total[columns[span]] += force * values[span]


def _entries(structure: Structure) -> dict[str, Array]:
    """The entries of flattened fields that uncovered forces read; `check_fields` keeps inertia from fluid models."""
    bodies = np.arange(structure.model.nbody)
    actuators = np.array([f.index for f in structure.uncovered if f.kind == "actuator"], dtype=np.int64)
    tendons = np.array([f.index for f in structure.uncovered if f.kind == "tendon"], dtype=np.int64)
    if not any(f.kind == "fluid" for f in structure.uncovered):
        bodies = bodies[:0]
    wide = lambda index, width: (index[:, None] * width + np.arange(width)).reshape(-1)
    out = {
        "body_mass": bodies[1:],
        "body_ipos": wide(bodies[1:], 3),
        "tendon_stiffness": tendons,
        "tendon_damping": tendons,
        "actuator_gear": wide(actuators, 6),
    }
    return {**out, **{f"actuator_{name}prm": wide(actuators, 10) for name in ("gain", "bias", "dyn")}}


def _row(field: Tensor, env: int) -> Array:
    value: Array = field[env if len(field) > 1 else 0].detach().cpu().numpy().astype(np.float64)
    return value
