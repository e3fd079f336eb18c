"""Contacts of MuJoCo as differentiable functions of the poses of their two bodies.

`freeze_contacts` copies what MuJoCo found in one environment; `join_contacts` names the touching features of all
contacts of all environments, and confirms each by evaluating it; `contact_frames` gives distance, point and frame.

    rule A   two rounded cores, closed form, all orders           (`mujoco_cores`, `mujoco_matching`)
    rule B   curvature of the support functions, first order      (`mujoco_curvature`)
    rule C   differences of the collision, first order            (`mujoco_relative`)

`mujoco_neighbours` refuses contacts whose derivative under these rules holds at the frozen positions only.

Rows of the frame: normal n from the first to the second geom, t1 = y - n (n . y) normalised, t2 = n x t1. The seed y is
the capsule's axis for a capsule on a plane, otherwise the world's y if |n_y| < 1/2 and its z if not.
Reference: mujoco_recipe 3; MuJoCo engine_util_spatial (mju_makeFrame).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mujoco
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sim2real.simulators.mujoco_cores import core_frames
from sim2real.simulators.mujoco_coverage import MujocoUnsupportedError
from sim2real.simulators.mujoco_features import CAPSULE, CYLINDER, PLANE, STANDING, Array, GeomTable, Index, geom_table
from sim2real.simulators.mujoco_first_order import first_order_contacts
from sim2real.simulators.mujoco_kinematics import Poses
from sim2real.simulators.mujoco_matching import CoreContacts, match_cores
from sim2real.simulators.mujoco_neighbours import check_neighbours
from sim2real.simulators.mujoco_pairs import only_slides
from sim2real.simulators.mujoco_readings import Reading, geom_names, joined, local
from sim2real.simulators.mujoco_relative import RelativeContacts, relative_frames
from sim2real.simulators.mujoco_structure import Structure

_UPRIGHT = 1e-9
"""sine of the angle between a capsule's axis and the plane's normal below which its projection has no direction"""


@dataclass(frozen=True, eq=False)
class Contacts:
    """N contacts of all environments, in the order of environments and of MuJoCo within each."""

    env: Tensor
    """[N]"""
    geom: Tensor
    """[N, 2]"""
    body: Tensor
    """[N, 2]"""
    pair: Tensor
    """[N] index of the explicit <pair>, or -1"""
    dim: Tensor
    """[N] 1, 3, 4 or 6"""
    margin: Tensor
    """[N] m: forces begin at this distance"""
    diag: Tensor
    """[N] sum of the two translational inverse weights"""
    rule: Tensor
    """[N] 0, 1, 2: rules A, B, C"""
    seed: Tensor
    """[N, 3] of the first tangent, in the frame of body `seed_body`"""
    seed_body: Tensor
    """[N] body 0 where the seed is an axis of the world"""
    cores: tuple[CoreContacts, ...]
    relative: RelativeContacts | None
    rows: Tensor
    """[N] place of each contact among the concatenated cores and relative contacts"""
    shift: tuple[Tensor, Tensor, Tensor] | None
    """distance [N], point and normal [N, 3] of MuJoCo less those of the functions, at the frozen poses"""
    order: int
    """how many derivatives of `contact_frames` are exact: 2, or 1 if any contact needs rule B or C"""
    first_order: tuple[str, ...]
    """the pairs of geoms that allow first derivatives only"""


def freeze_contacts(structure: Structure, env: int, data: mujoco.MjData) -> Reading:
    """Copy the contacts of one environment, after `mj_fwdPosition` or `mj_forward`."""
    contact = data.contact
    geom = contact.geom.astype(np.int64)
    dist, point, margin = contact.dist.copy(), contact.pos.copy(), contact.includemargin.copy()
    frame, dim = contact.frame.copy(), contact.dim.astype(np.int64)
    active = contact.efc_address >= 0
    if not active.all():
        geom, dist, point, margin = geom[active], dist[active], point[active], margin[active]
        frame, dim = frame[active], dim[active]
    return Reading(
        env=np.full(len(geom), env),
        geom=geom,
        dist=dist,
        point=point,
        frame=frame.reshape(-1, 3, 3),
        margin=margin,
        dim=dim,
        position=data.geom_xpos[geom],
        rotation=data.geom_xmat[geom].reshape(-1, 2, 3, 3),
        scene={env: (data.qpos.copy(), data.mocap_pos.copy(), data.mocap_quat.copy())},
    )


def contact_frames(structure: Structure, contacts: Contacts, poses: Poses) -> tuple[Tensor, Tensor, Tensor]:
    """Distance [N] m, point [N, 3] m and frame [N, 3, 3] (rows n, t1, t2) of all contacts at the poses.

    Exact functions near the frozen poses: all derivatives under rule A, the first under rules B and C. Their values
    there are MuJoCo's own: its colliders stop at some tolerance (1e-8 m between meshes), which stiff contacts feel.
    """
    dist, point, normal = _functions(contacts, poses)
    if contacts.shift is not None:
        dist, point, normal = (x + y for x, y in zip((dist, point, normal), contacts.shift, strict=True))
        normal = normal / (normal * normal).sum(-1, keepdim=True).sqrt()
    seed = (poses.rotation[contacts.env, contacts.seed_body] @ contacts.seed[..., None]).squeeze(-1)
    return dist, point, _frame(normal, seed)


def _functions(contacts: Contacts, poses: Poses) -> tuple[Tensor, Tensor, Tensor]:
    """Distance, point and normal of all contacts by the rules."""
    position, rotation = poses.position, poses.rotation
    parts = []
    for c in contacts.cores:
        env = c.env[:, None]
        parts.append(core_frames(c.pair, position[env, c.body], rotation[env, c.body]))
    if contacts.relative is not None:
        parts.append(relative_frames(contacts.relative, position, rotation))
    if not parts:
        return position.new_zeros(0), position.new_zeros(0, 3), position.new_zeros(0, 3)
    dist, point, normal = (torch.cat(part)[contacts.rows] for part in zip(*parts, strict=True))
    return dist, point, normal


def _frame(normal: Tensor, seed: Tensor) -> Tensor:
    """Rows n, t1, t2 [N, 3, 3]."""
    across = seed - normal * (normal * seed).sum(-1, keepdim=True)
    first = across / (across * across).sum(-1, keepdim=True).sqrt()
    return torch.stack([normal, first, torch.linalg.cross(normal, first)], -2)


def join_contacts(structure: Structure, readings: Sequence[Reading]) -> Contacts:
    """All contacts of all environments with their rules; `MujocoUnsupportedError` names a pair that none covers."""
    model, table = structure.model, geom_table(structure.model)
    reading = joined(readings)
    _check_standing(model, table, reading)
    number = len(reading.env)
    cores, rows = match_cores(table, reading)
    left = np.ones(number, dtype=bool)
    for taken in rows:
        left[taken] = False
    relative, rule = None, np.zeros(number, dtype=np.int64)
    if left.any():
        relative, rule = first_order_contacts(model, table, reading, left)
        rows.append(np.flatnonzero(left))
    place = np.empty(number, dtype=np.int64)
    place[np.concatenate([*rows, np.zeros(0, dtype=np.int64)])] = np.arange(number)
    seed, seed_body = _seeds(model, table, reading)
    body, geoms = table.body[reading.geom], reading.geom.tolist()
    contacts = Contacts(
        env=_long(reading.env),
        geom=_long(reading.geom),
        body=_long(body),
        pair=_long(np.array([table.pairs.get((a, b), -1) for a, b in geoms] if table.pairs else np.full(number, -1))),
        dim=_long(reading.dim),
        margin=_real(reading.margin),
        diag=_real(model.body_invweight0[body, 0].sum(1)),
        rule=_long(rule),
        seed=_real(seed),
        seed_body=_long(seed_body),
        cores=tuple(cores),
        relative=relative,
        rows=_long(place),
        shift=None,
        order=1 if left.any() else 2,
        first_order=tuple(sorted({geom_names(model, g) for g in set(map(tuple, reading.geom[left].tolist()))})),
    )
    none = torch.zeros(0, dtype=torch.float64)
    frames = lambda position, rotation: contact_frames(structure, contacts, Poses(position, rotation, none, none))
    check_neighbours(model, table, reading, frames)
    return replace(contacts, shift=_shift(contacts, table, reading, model.nbody)) if number else contacts


def _shift(contacts: Contacts, table: GeomTable, reading: Reading, nbody: int) -> tuple[Tensor, Tensor, Tensor]:
    """What MuJoCo found less what the rules give, at the poses that it was found at."""
    position = np.zeros((int(reading.env.max()) + 1, nbody, 3))
    rotation = np.zeros((*position.shape, 3))
    turn = reading.rotation @ table.rotation[reading.geom].swapaxes(-1, -2)
    where = reading.env[:, None], table.body[reading.geom]
    rotation[where] = turn
    position[where] = reading.position - (turn @ table.position[reading.geom][..., None]).squeeze(-1)
    none = torch.zeros(0, dtype=torch.float64)
    given = _functions(contacts, Poses(_real(position), _real(rotation), none, none))
    found = reading.dist, reading.point, reading.frame[:, 0]
    dist, point, normal = (_real(x) - y for x, y in zip(found, given, strict=True))
    return dist, point, normal


def _check_standing(model: mujoco.MjModel, table: GeomTable, reading: Reading) -> None:
    """Refuse a cylinder that stands on a plane and can tilt: MuJoCo's contact points then jump to the lowest rim."""
    kind = table.kind[reading.geom]
    normal = local(reading.rotation[:, 1], reading.frame[:, 0])
    stands = (kind[:, 0] == PLANE) & (kind[:, 1] == CYLINDER) & (np.hypot(normal[:, 0], normal[:, 1]) < STANDING)
    for row in np.flatnonzero(stands).tolist():
        first, second = table.body[reading.geom[row]].tolist()
        if not only_slides(model, first, second):
            raise MujocoUnsupportedError(
                f"{geom_names(model, reading.geom[row].tolist())}: the cylinder stands upright in environment "
                f"{reading.env[row]}, and its contact points jump as soon as it tilts; tilt it by more than {STANDING} "
                "rad, use a box, a mesh or a capsule, or leave it slide joints only"
            )


def _seeds(model: mujoco.MjModel, table: GeomTable, reading: Reading) -> tuple[Array, Index]:
    """Seed axis [N, 3] of the first tangent and the body [N] that carries it; confirmed by MuJoCo's own frame."""
    normal, axis = reading.frame[:, 0], reading.rotation[:, 1, :, 2]
    kind = table.kind[reading.geom]
    capsule = (kind[:, 0] == PLANE) & (kind[:, 1] == CAPSULE)
    across = np.linalg.norm(np.cross(axis, normal), axis=1)
    # a capsule that stands upright on a plane has no projected axis; MuJoCo picks a direction, which stays
    upright = capsule & (across < _UPRIGHT)
    lying = capsule & ~upright
    world = np.where((np.abs(normal[:, 1]) < 0.5)[:, None], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0])
    world = np.where(lying[:, None], axis, np.where(upright[:, None], reading.frame[:, 1], world))
    tangent = world - normal * (normal * world).sum(1, keepdims=True)
    length = np.linalg.norm(tangent, axis=1)
    apart = np.abs(tangent - reading.frame[:, 1] * length[:, None]).max(1) > 1e-6
    for row in np.flatnonzero(apart).tolist():
        raise MujocoUnsupportedError(
            f"{geom_names(model, reading.geom[row].tolist())} touch in environment {reading.env[row]} with the tangent "
            f"{reading.frame[row, 1]}, which follows no known rule; use another type for one of the two geoms"
        )
    own = table.rotation[reading.geom[:, 1]][:, :, 2]
    return np.where(lying[:, None], own, world), np.where(lying, table.body[reading.geom[:, 1]], 0)


def _long(x: NDArray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.int64))


def _real(x: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float64))
