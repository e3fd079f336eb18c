"""The residual of MuJoCo's acceleration as one scalar program, batched in torch.

MuJoCo's acceleration minimises over a the convex cost C(a) = Gibbs-Appell energy - applied . a + s(J a - aref), so

    r = M a + c - passive - actuator - applied + J' s'(jar) = 0,          H = dr/da = M + J' s'' J.

The derivative of a = a(q, v, act, ctrl, force; theta) needs one scalar, with a and lam held:

    phi = <lam, r>,   lam = -H^-1 g:   gradient of <g, a> = gradient of phi.

phi is written by virtual power and never forms a Jacobian; what collision detection found (contacts, active limits) is
frozen in `Active`, zones of the constraint laws follow from jar. Every tensor has a leading axis of environments, of
length 1 (shared) or B. Position enters as a tangent displacement d at `base`, whose value is zero.
Reference: mujoco_recipe 1, 5; Todorov, ICRA 2014.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import mujoco
import torch
from torch import Tensor

from sim2real.simulators.mujoco_actuators import actuator_derivative, actuator_force
from sim2real.simulators.mujoco_contact_rows import contact_rows
from sim2real.simulators.mujoco_contacts import Contacts, freeze_contacts, join_contacts
from sim2real.simulators.mujoco_equalities import equality_rows
from sim2real.simulators.mujoco_forces import (
    Fields,
    armature_power,
    disabled,
    gravity,
    inertia_wrench,
    mass_matrix,
    passive_derivative,
    passive_power,
    wrench_power,
)
from sim2real.simulators.mujoco_kinematics import Poses, State, poses, twists, velocity_bias
from sim2real.simulators.mujoco_limits import Limits, find_limits, limit_rows
from sim2real.simulators.mujoco_messages import engine_messages
from sim2real.simulators.mujoco_rows import Motion, Rows, normal_matrix, power
from sim2real.simulators.mujoco_structure import FIELDS, Structure
from sim2real.simulators.mujoco_uncovered import Differenced, freeze_uncovered, uncovered_force

Damping = Literal["eulerdamp", "implicitfast", "implicit"]


@dataclass(frozen=True, eq=False)
class Active:
    """The discrete part of B states: what touches and which limits act."""

    contacts: Contacts | None
    limits: Limits
    uncovered: Differenced | None
    """forces outside the program, linear about the states"""


def freeze(structure: Structure, state: State, fields: Fields, *, differentiated: tuple[str, ...] = FIELDS) -> Active:
    """Contacts and active limits at B states; no field of `FIELDS` moves a geom, so positions decide.

    differentiated: the fields whose derivatives are wanted; it saves differences of uncovered forces, nothing else.
    """
    size = _size(state, *fields.values())
    plain = {name: value.detach() for name, value in fields.items()}
    whole = State(**{name: value.detach().expand(size, -1) for name, value in vars(state).items()})
    uncovered = freeze_uncovered(structure, whole, plain, differentiated) if structure.uncovered else None
    return Active(_contacts(structure, whole.base), find_limits(structure, whole, plain), uncovered)


def residual_power(
    structure: Structure, state: State, a: Tensor, lam: Tensor, fields: Fields, active: Active
) -> Tensor:
    """phi = <lam, r> [B], a force times a velocity (W)."""
    smooth, constraint = _parts(structure, state, a, lam, fields, active)
    return smooth + constraint


def solver_residual(structure: Structure, state: State, a: Tensor, fields: Fields, active: Active) -> Tensor:
    """Largest entry of |r| over the largest force [B]: how far a is from the minimum. Gate gradients on it."""
    plain = {name: value.detach() for name, value in fields.items()}
    at, a = State(**{name: value.detach() for name, value in vars(state).items()}), a.detach()
    lam = a.new_zeros(_size(state, a, *fields.values()), a.shape[-1]).requires_grad_()
    with torch.enable_grad():
        smooth, constraint = _parts(structure, at, a, lam, plain, active)
        (of_smooth,) = torch.autograd.grad(smooth.sum(), lam, retain_graph=True)
        (of_rows,) = torch.autograd.grad(constraint.sum(), lam)
        (of_inertia,) = torch.autograd.grad(mass_power(structure, at, lam, a, plain).sum(), lam)
    parts = torch.stack([of_smooth - of_inertia, of_inertia, of_rows]).abs().amax((0, 2))
    return (of_smooth + of_rows).abs().amax(-1) / parts.clamp(min=torch.finfo(a.dtype).tiny)


def mass_power(structure: Structure, state: State, mu: Tensor, z: Tensor, fields: Fields) -> Tensor:
    """mu' M(q) z [B]."""
    at = poses(structure, state.base, state.d)
    left, right = twists(structure, at.axes, mu[:, None]), twists(structure, at.axes, z[:, None])
    wrench = inertia_wrench(at, fields, None, right)
    return wrench_power(at, fields, left, wrench)[:, 0] + armature_power(structure, mu, z, fields)


def damping_power(structure: Structure, state: State, mu: Tensor, w: Tensor, fields: Fields, kind: Damping) -> Tensor:
    """mu' D w [B], D the derivative of the smooth force by v that the integrator `kind` uses.

    eulerdamp: -diag(damping). implicitfast: passive and actuator forces, and the velocity bias of free bodies that are
    a tree of their own. implicit: the bias of all. The bias is quadratic in v, so its derivative along w is
    (c(v + w) - c(v - w))/2 exactly.
    """
    if kind == "eulerdamp":
        return -(mu * fields["dof_damping"] * w).sum(-1)
    total = passive_derivative(structure, mu, w, fields) + actuator_derivative(structure, state, mu, w, fields)
    if kind == "implicitfast" and not bool(structure.lone.any()):
        return total
    kept = mu if kind == "implicit" else mu * structure.lone
    at = poses(structure, state.base, state.d)
    virtual = twists(structure, at.axes, kept[:, None])
    ahead, behind = (_bias_power(structure, at, virtual, state.v + sign * w, fields) for sign in (1, -1))
    return total - (ahead - behind) / 2


def hessian(
    structure: Structure, state: State, a: Tensor, fields: Fields, active: Active, kind: Damping | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """M, H = M + J' s'' J and D of the integrator `kind`, each [B, nv, nv], without derivatives."""
    size = _size(state, a, *fields.values())
    with torch.no_grad():
        eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand(size, -1, -1)
        along = torch.cat([*(x.expand(size, -1)[:, None] for x in (state.v, a)), eye], 1)
        motion = _motion(structure, state, along)
        mass = mass_matrix(structure, motion.poses, motion.twists[:, 2:], fields).expand(size, -1, -1)
        curved = mass
        for rows in _rows(structure, motion, fields, active):
            curved = curved + normal_matrix(rows, size)
        return mass, curved, None if kind is None else _damping(structure, state, fields, kind, size)


def _damping(structure: Structure, state: State, fields: Fields, kind: Damping, size: int) -> Tensor:
    """D [B, nv, nv]: all columns at once, one copy of the environments for each."""
    nv = state.v.shape[-1]
    copies = lambda x: x.detach().expand(size, *x.shape[1:]).repeat_interleave(nv, 0)
    many = {name: copies(value) if len(value) > 1 else value.detach() for name, value in fields.items()}
    columns = torch.eye(nv, dtype=state.v.dtype, device=state.v.device).repeat(size, 1)
    mu = torch.zeros_like(columns).requires_grad_()
    at = State(**{name: copies(value) for name, value in vars(state).items()})
    with torch.enable_grad():
        (by_mu,) = torch.autograd.grad(damping_power(structure, at, mu, columns, many, kind).sum(), mu)
    return by_mu.reshape(size, nv, nv).transpose(1, 2)


def _parts(
    structure: Structure, state: State, a: Tensor, lam: Tensor, fields: Fields, active: Active
) -> tuple[Tensor, Tensor]:
    """<lam, r> of smooth forces, and of constraints, each [B]."""
    size = _size(state, a, lam, *fields.values())
    motion = _motion(structure, state, torch.stack([x.expand(size, -1) for x in (state.v, a, lam)], 1))
    virtual = motion.twists[:, 2:]
    acceleration = motion.twists[:, 1:2] + _falling(structure, motion.bias, fields)[:, None]
    wrench = inertia_wrench(motion.poses, fields, motion.twists[:, :1], acceleration)
    smooth = wrench_power(motion.poses, fields, virtual, wrench)[:, 0] + armature_power(structure, lam, a, fields)
    smooth = smooth - passive_power(structure, state, motion.poses, lam, virtual[:, 0], fields)
    applied = actuator_force(structure, state, fields) + state.force
    if active.uncovered is not None:
        applied = applied + uncovered_force(active.uncovered, state, fields)
    smooth = smooth - (lam * applied).sum(-1)
    constraint = 0 * lam.sum(-1)
    for rows in _rows(structure, motion, fields, active):
        constraint = constraint + power(rows, size)
    return smooth, constraint


def _motion(structure: Structure, state: State, along: Tensor) -> Motion:
    at = poses(structure, state.base, state.d)
    bias = velocity_bias(structure, at.axes, along[:, 0])
    return Motion(state, along, at, twists(structure, at.axes, along), bias)


def _falling(structure: Structure, bias: Tensor, fields: Fields) -> Tensor:
    """Spatial accelerations with the world accelerating against gravity."""
    return bias - torch.nn.functional.pad(gravity(structure, fields), (3, 0))[:, None]


def _bias_power(structure: Structure, at: Poses, virtual: Tensor, v: Tensor, fields: Fields) -> Tensor:
    """<mu, c(q, v)> [B] without gravity; virtual: twists of mu."""
    velocity = twists(structure, at.axes, v[:, None])
    wrench = inertia_wrench(at, fields, velocity, velocity_bias(structure, at.axes, v)[:, None])
    return wrench_power(at, fields, virtual, wrench)[:, 0]


def _rows(structure: Structure, motion: Motion, fields: Fields, active: Active) -> list[Rows]:
    rows = limit_rows(structure, motion, active.limits, fields) + equality_rows(structure, motion, fields)
    return rows if active.contacts is None else rows + contact_rows(structure, motion, active.contacts, fields)


def _contacts(structure: Structure, base: Tensor) -> Contacts | None:
    model = structure.model
    off = mujoco.mjtDisableBit
    meet = bool(model.npair or (model.geom_contype.any() and model.geom_conaffinity.any()))
    if not meet or disabled(structure, off.mjDSBL_CONTACT) or disabled(structure, off.mjDSBL_CONSTRAINT):
        return None
    data, readings = mujoco.MjData(model), []
    with engine_messages():
        for env, qpos in enumerate(base.cpu().numpy()):
            data.qpos[:] = qpos
            mujoco.mj_fwdPosition(model, data)
            readings.append(freeze_contacts(structure, env, data))
    contacts = join_contacts(structure, readings)
    return contacts if len(contacts.env) else None


def _size(state: State, *tensors: Tensor) -> int:
    """The number of environments."""
    return max(len(x) for x in (*vars(state).values(), *tensors))
