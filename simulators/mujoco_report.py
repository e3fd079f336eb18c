"""What to know of a MuJoCo rollout before trusting its gradient: residuals and changes of the active set.

A step's derivative holds within one active set: the contacts that push, their friction zones (sticking, sliding), the
limits that act, dry friction that holds or slips. Where the set changes, the derivative is one-sided; a gradient
through many changes describes an ever smaller neighbourhood. `rollout_report` counts them, with the solver's residual.
It judges the start of each engine step (the first stage of RK4), one by one, at some 50 us each.
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
from sim2real.simulators.mujoco_forward import accelerate, write_fields
from sim2real.simulators.mujoco_messages import engine_messages
from sim2real.simulators.mujoco_step import StepSettings, control_step, engine_inputs, to_engine
from sim2real.simulators.mujoco_system import MujocoSystem, State, advance

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
    engine = accelerate(system.structure.model, system.names, system.kind)
    scratch = _Scratch(copy.copy(system.structure.model), mujoco.MjData(system.structure.model))
    before: list[bytes] = []
    columns: list[tuple[Tensor, Tensor, Tensor]] = []
    theta = {key: value.detach() for key, value in theta.items()}
    with torch.no_grad(), engine_messages():
        for t in range(actions.shape[1]):
            inputs = engine_inputs(
                system, settings, theta, *(to_engine(x[:, t].detach()) for x in (states, actions, noise))
            )
            now, residual, active, switches = inputs.state, [], [], []
            for control in inputs.controls:
                residual.append(engine((*now, control, inputs.force), inputs.fields)[2])
                sets = _active_sets(scratch, inputs.fields, now, control, inputs.force)
                active.append(torch.tensor([size for size, _ in sets]))
                names = [name for _, name in sets]
                switches.append(torch.tensor([a != b for a, b in zip(before or names, names, strict=True)]))
                before = names
                now = advance(system, inputs.fields, now, control, inputs.force)
            columns.append((torch.stack(residual).amax(0), torch.stack(active).amax(0), torch.stack(switches).sum(0)))
    residuals, actives, changes = (torch.stack(column, 1) for column in zip(*columns, strict=True))
    return MujocoReport(residuals, residuals > tolerance, actives, changes)


@dataclass(frozen=True, eq=False)
class _Scratch:
    model: mujoco.MjModel
    data: mujoco.MjData


def _parts(mdp: ModelMDP) -> tuple[MujocoSystem, StepSettings]:
    step = mdp.step
    if not isinstance(step, partial) or step.func is not control_step:
        raise ValueError("this model's step is not that of mujoco_model; pass the model as mujoco_model returned it")
    return step.args[0], step.args[1]


def _active_sets(
    scratch: _Scratch, fields: Mapping[str, Tensor], state: State, control: Tensor, force: Tensor
) -> list[tuple[int, bytes]]:
    """Number of rows in force, and a name of the active set, for each environment."""
    model, data = scratch.model, scratch.data
    arrays = [x.numpy() for x in (*state, control, force)]
    given = {name: value.numpy() for name, value in fields.items()}
    shared = all(len(value) == 1 for value in given.values())
    found = []
    for row in range(len(arrays[0])):
        if given and (row == 0 or not shared):
            write_fields(model, {name: value[row if len(value) > 1 else 0] for name, value in given.items()})
        targets = (data.qpos, data.qvel, data.act, data.ctrl, data.qfrc_applied)
        for target, array in zip(targets, arrays, strict=True):
            target[:] = array[row]
        mujoco.mj_forward(model, data)
        found.append(_active_set(model, data))
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
