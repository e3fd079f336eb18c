"""What to know of a MuJoCo rollout before trusting its gradient: residuals and changes of the active set.

A step's derivative holds within one active set: the contacts that push, their friction zones (sticking, sliding), the
limits that act, dry friction that holds or slips. Where the set changes, the derivative is one-sided; a gradient
through many changes describes an ever smaller neighbourhood. `rollout_report` counts them, with the solver's residual.
It judges the start of each engine step (the first stage of RK4), one by one, at some 100 us each.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import mujoco
import numpy as np
import torch
from torch import Tensor

from sim2real.mdp import ModelMDP
from sim2real.params import Params
from sim2real.simulators.mujoco_forward import SimulationDivergedError, write_fields
from sim2real.simulators.mujoco_messages import engine_messages
from sim2real.simulators.mujoco_parameters import DELAY
from sim2real.simulators.mujoco_step import StepSettings, control_step, engine_inputs, to_engine
from sim2real.simulators.mujoco_system import MujocoSystem, split_state

_ROW = mujoco.mjtConstraint
_FRICTION = (int(_ROW.mjCNSTR_FRICTION_DOF), int(_ROW.mjCNSTR_FRICTION_TENDON))
_CONTACTS = (
    int(_ROW.mjCNSTR_CONTACT_FRICTIONLESS),
    int(_ROW.mjCNSTR_CONTACT_PYRAMIDAL),
    int(_ROW.mjCNSTR_CONTACT_ELLIPTIC),
)
_EDGE = 1.0 - 1e-9  # of the friction bound: a force there has left the inside


@dataclass(frozen=True)
class MujocoReport:
    """Per environment and control step, `[B, T]`."""

    residual: Tensor
    """largest residual of the solver over the engine steps, as a part of the largest force"""
    flagged: Tensor
    """residual above the tolerance: derivatives there are of that accuracy"""
    active: Tensor
    """most constraint rows in force over the engine steps"""
    switches: Tensor
    """engine steps whose active set differs from the one before"""


def rollout_report(
    mdp: ModelMDP, theta: Params, states: Tensor, actions: Tensor, noise: Tensor, *, tolerance: float = 1e-9
) -> MujocoReport:
    """Judge a rollout of a model of `mujoco_model`: states `[B, T+1, n]`, actions `[B, T, m]`, noise `[B, T, k]`.

    Raises `ValueError` for another model, or one whose step was replaced.
    """
    system, settings = _parts(mdp)
    count, steps = actions.shape[:2]
    theta = {key: to_engine(value.detach()) for key, value in theta.items()}
    each = {k: v.repeat_interleave(steps, 0) if k == DELAY and v.ndim else v for k, v in theta.items()}
    rows = [to_engine(x[:, :steps].detach()).flatten(0, 1) for x in (states, actions, noise)]
    with torch.no_grad(), engine_messages():
        inputs = engine_inputs(system, settings, each, *rows)
        fields = {key: v.repeat_interleave(steps, 0) if len(v) > 1 else v for key, v in inputs.fields.items()}
        controls = torch.stack(inputs.controls, 1)
        force = inputs.force.unsqueeze(1).expand(-1, controls.shape[1], -1)
        found = system.roll(inputs.state, controls, force, fields)
        if found is None:
            raise SimulationDivergedError("the engine could not take these steps: check that the states are finite")
        after, residual = found
        passed = torch.cat([torch.cat(inputs.state, -1).unsqueeze(1), after[:, :-1]], 1)  # [B T, frame_skip, n]
        sets = _active_sets(system.structure.model, fields, passed, controls, force)
    active, names = (np.array(column).reshape(count, -1) for column in zip(*sets, strict=True))
    switched = np.concatenate([np.zeros((count, 1), dtype=bool), names[:, 1:] != names[:, :-1]], 1)
    worst = residual.amax(1).reshape(count, steps)
    return MujocoReport(
        residual=worst,
        flagged=worst > tolerance,
        active=torch.from_numpy(active).reshape(count, steps, -1).amax(-1),
        switches=torch.from_numpy(switched).reshape(count, steps, -1).sum(-1),
    )


def _parts(mdp: ModelMDP) -> tuple[MujocoSystem, StepSettings]:
    step = mdp.step
    if not isinstance(step, partial) or step.func is not control_step:
        raise ValueError("this model's step is not that of mujoco_model; pass the model as mujoco_model returned it")
    return step.args[0], step.args[1]


def _active_sets(
    model: mujoco.MjModel, fields: Mapping[str, Tensor], states: Tensor, controls: Tensor, force: Tensor
) -> list[tuple[int, int]]:
    """Number of rows in force, and a number for the active set, at states `[N, frame_skip, n]`, in their order."""
    model = copy.copy(model)
    data = mujoco.MjData(model)
    arrays = [x.numpy() for x in (*split_state(model, states), controls, force)]
    targets = (data.qpos, data.qvel, data.act, data.ctrl, data.qfrc_applied)
    given = {name: value.numpy() for name, value in fields.items()}
    alone = {name for name, value in given.items() if len(value) > 1}
    write_fields(model, {name: value[0] for name, value in given.items()})
    known: dict[bytes, int] = {}
    found = []
    for row, skip in np.ndindex(*controls.shape[:2]):
        if skip == 0 and alone:
            write_fields(model, {name: given[name][row] for name in alone})
        for target, array in zip(targets, arrays, strict=True):
            target[:] = array[row, skip]
        mujoco.mj_forward(model, data)
        size, name = _active_set(model, data)
        found.append((size, known.setdefault(name, len(known))))
    return found


def _active_set(model: mujoco.MjModel, data: mujoco.MjData) -> tuple[int, bytes]:
    count = data.nefc
    force, kind, owner = data.efc_force[:count], data.efc_type[:count], data.efc_id[:count].copy()
    zone = (force != 0.0).astype(np.int64)
    slipping = np.isin(kind, _FRICTION)
    zone[slipping] = (np.sign(force) * (abs(force) >= _EDGE * data.efc_frictionloss[:count]))[slipping]
    for i in np.flatnonzero(kind == int(_ROW.mjCNSTR_CONTACT_ELLIPTIC)):
        contact = data.contact[int(owner[i])]
        if i == contact.efc_address and contact.dim > 1 and zone[i]:
            sideways = np.linalg.norm(force[i + 1 : i + contact.dim] / contact.friction[: contact.dim - 1])
            zone[i] = 2 if sideways >= _EDGE * force[i] else 1
            zone[i + 1 : i + contact.dim] = 0
    touching = np.isin(kind, _CONTACTS)
    pairs = data.contact.geom[owner[touching]]
    owner[touching] = pairs[:, 0] * model.ngeom + pairs[:, 1]
    rows = np.stack([kind, owner, zone])[:, zone != 0]
    return rows.shape[1], rows.tobytes()
