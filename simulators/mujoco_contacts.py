"""Contacts of MuJoCo as differentiable functions of the poses of their two bodies.

`freeze_contacts` copies what MuJoCo found in one environment; `join_contacts` names the touching features of all
contacts of all environments, and confirms each by evaluating it; `contact_frames` gives distance, point and frame.

    rule A   two rounded cores, closed form, all orders           (`mujoco_cores`)
    rule B   curvature of the support functions, first order      (`mujoco_curvature`)
    rule C   differences of the collision, first order            (`mujoco_relative`)

Rows of the frame: normal n from the first to the second geom, t1 = y - n (n . y) normalised, t2 = n x t1, with the seed y
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

from sim2real.simulators.mujoco_cores import CORE_PAIRS, CorePair, core_frames
from sim2real.simulators.mujoco_coverage import MujocoUnsupportedError
from sim2real.simulators.mujoco_curvature import curvature_jacobian, support_hessian
from sim2real.simulators.mujoco_features import (
    CAPSULE,
    CYLINDER,
    ELLIPSOID,
    HFIELD,
    PLANE,
    Array,
    Features,
    GeomTable,
    Index,
    Sides,
    features,
    geom_table,
)
from sim2real.simulators.mujoco_kinematics import Poses
from sim2real.simulators.mujoco_relative import RelativeContacts, collision_differences, relative_frames
from sim2real.simulators.mujoco_structure import Structure

_TOLERANCES = (1e-7, 1e-5)
"""of `features`: exact colliders first, then those whose normals carry noise"""
_SAME = (1e-5, 1e-7, 1e-6)
"""a closed form is accepted if normal, distance (m) and point (m) equal MuJoCo's within these"""


@dataclass(frozen=True, eq=False)
class Reading:
    """The contacts of one environment that exert forces, as MuJoCo reports them."""

    env: int
    geom: Index
    """[n, 2]"""
    dist: Array
    point: Array
    frame: Array
    """[n, 3, 3]"""
    margin: Array
    dim: Index
    position: Array
    """[n, 2, 3] of the two geoms"""
    rotation: Array
    """[n, 2, 3, 3]"""
    pose: tuple[Array, Array, Array]
    """qpos, mocap_pos, mocap_quat: rule C restores the scene from them"""


@dataclass(frozen=True, eq=False)
class CoreContacts:
    """Contacts of one pair of core kinds, and where their carriers are."""

    env: Tensor
    body: Tensor
    """[n, 2] of core 1 and core 2"""
    pair: CorePair


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
        env=env,
        geom=geom,
        dist=dist,
        point=point,
        frame=frame.reshape(-1, 3, 3),
        margin=margin,
        dim=dim,
        position=data.geom_xpos[geom],
        rotation=data.geom_xmat[geom].reshape(-1, 2, 3, 3),
        pose=(data.qpos.copy(), data.mocap_pos.copy(), data.mocap_quat.copy()),
    )


def contact_frames(structure: Structure, contacts: Contacts, poses: Poses) -> tuple[Tensor, Tensor, Tensor]:
    """Distance [N] m, point [N, 3] m and frame [N, 3, 3] (rows n, t1, t2) of all contacts at the poses.

    Exact functions near the frozen poses: all derivatives under rule A, the first under rules B and C.
    """
    position, rotation = poses.position, poses.rotation
    parts = []
    for c in contacts.cores:
        env = c.env[:, None]
        parts.append(core_frames(c.pair, position[env, c.body], rotation[env, c.body]))
    if contacts.relative is not None:
        parts.append(relative_frames(contacts.relative, position, rotation))
    if not parts:
        return position.new_zeros(0), position.new_zeros(0, 3), position.new_zeros(0, 3, 3)
    dist, point, normal = (torch.cat(part)[contacts.rows] for part in zip(*parts, strict=True))
    seed = (rotation[contacts.env, contacts.seed_body] @ contacts.seed[..., None]).squeeze(-1)
    return dist, point, _frame(normal, seed)


def _frame(normal: Tensor, seed: Tensor) -> Tensor:
    """Rows n, t1, t2 [N, 3, 3]."""
    across = seed - normal * (normal * seed).sum(-1, keepdim=True)
    first = across / (across * across).sum(-1, keepdim=True).sqrt()
    return torch.stack([normal, first, torch.linalg.cross(normal, first)], -2)


def join_contacts(structure: Structure, readings: Sequence[Reading]) -> Contacts:
    """All contacts of all environments with their rules; `MujocoUnsupportedError` names a pair that none covers."""
    model, table = structure.model, geom_table(structure.model)
    found = _Found(
        env=np.repeat([r.env for r in readings], [len(r.dist) for r in readings]).astype(np.int64),
        **{name: np.concatenate([getattr(r, name) for r in readings]) for name in _ARRAYS},
    )
    body = table.body[found.geom]
    parts, rows = _cores(table, found)
    left = np.ones(len(found.env), dtype=bool)
    for taken in rows:
        left[taken] = False
    rule = np.where(left, 2, 0)
    curved = left & np.isin(table.kind[found.geom], (ELLIPSOID, CYLINDER)).any(1)
    rule[curved] = 1
    relative = _relative(structure, table, found, readings, rule) if left.any() else None
    if relative is not None:
        rows.append(np.flatnonzero(left))
    names = sorted({_names(model, g) for g in map(tuple, found.geom[left].tolist())})
    place = np.empty(len(left), dtype=np.int64)
    place[np.concatenate([*rows, np.zeros(0, dtype=np.int64)])] = np.arange(len(left))
    seed, seed_body = _seeds(model, table, found)
    pair = [table.pairs.get(g, -1) for g in map(tuple, found.geom.tolist())] if table.pairs else [-1] * len(left)
    return Contacts(
        env=_long(found.env),
        geom=_long(found.geom),
        body=_long(body),
        pair=torch.tensor(pair, dtype=torch.long),
        dim=_long(found.dim),
        margin=_real(found.margin),
        diag=_real(model.body_invweight0[body, 0].sum(1)),
        rule=_long(rule),
        seed=_real(seed),
        seed_body=_long(seed_body),
        cores=tuple(parts),
        relative=relative,
        rows=_long(place),
        order=1 if left.any() else 2,
        first_order=tuple(names),
    )


_ARRAYS = ("geom", "dist", "point", "frame", "margin", "dim", "position", "rotation")


@dataclass(frozen=True, eq=False)
class _Found:
    """The members of `Reading`, all environments together."""

    env: Index
    geom: Index
    dist: Array
    point: Array
    frame: Array
    margin: Array
    dim: Index
    position: Array
    rotation: Array

    def sides(self, table: GeomTable) -> Sides:
        """Both sides of every contact [2 N], first geoms and second geoms alternating, in the frames of the geoms."""
        sign = np.array([1.0, -1.0])[:, None]
        normal = self.frame[:, None, 0] * sign
        witness = self.point[:, None] - normal * self.dist[:, None, None] / 2 - self.position
        return Sides(
            geom=self.geom.ravel(),
            normal=_local(self.rotation, normal).reshape(-1, 3),
            witness=_local(self.rotation, witness).reshape(-1, 3),
            on_plane=(table.kind[self.geom[:, ::-1]] == PLANE).ravel(),
        )


def _local(rotation: Array, vector: Array) -> Array:
    return (vector[..., None, :] @ rotation).squeeze(-2)


def _cores(table: GeomTable, found: _Found) -> tuple[list[CoreContacts], list[Index]]:
    """The contacts that a closed form reproduces, grouped by pair of kinds, and their rows."""
    parts: list[CoreContacts] = []
    rows: list[Index] = []
    left = np.arange(len(found.env))
    for tolerance in _TOLERANCES:
        if not len(left):
            break
        sides = found.sides(table)
        pick = np.zeros(len(found.env), dtype=bool)
        pick[left] = True
        seen = features(table, sides[np.repeat(pick, 2)], tolerance)
        kind = seen.kind.reshape(-1, 2)
        swapped = kind[:, 0] > kind[:, 1]
        ordered = np.where(swapped[:, None], kind[:, ::-1], kind)
        taken = []
        for kinds in CORE_PAIRS:
            chosen = np.flatnonzero((ordered == kinds).all(1))
            if len(chosen):
                at = left[chosen]
                pair, sides_of = _core_pair(found, seen, at, chosen, swapped[chosen], kinds)
                good = _reproduces(pair, found, at, sides_of)
                if good.any():
                    parts.append(_carried(table, found, pair, at, sides_of, good))
                    rows.append(at[good])
                    taken.append(at[good])
        left = np.setdiff1d(left, np.concatenate(taken)) if taken else left
    return parts, rows


def _core_pair(
    found: _Found, seen: Features, at: Index, chosen: Index, swapped: NDArray[np.bool_], kinds: tuple[int, int]
) -> tuple[CorePair, Index]:
    """Cores in the frames of the geoms, core 1 first, and which side [k, 2] each is of."""
    side = np.where(swapped[:, None], [1, 0], [0, 1])
    rows = 2 * chosen[:, None] + side
    flip = np.where(swapped, -1.0, 1.0)
    pair = CorePair(
        kinds=kinds,
        point=_real(seen.point[rows]),
        axis=_real(seen.axis[rows]),
        radius=_real(seen.radius[rows]),
        shape=_real(seen.shape[rows[:, 0]] + seen.shape[rows[:, 1]]),
        sign=torch.ones(len(at), dtype=torch.float64),
        flip=_real(flip),
    )
    carriers = _real(found.position[at[:, None], side]), _real(found.rotation[at[:, None], side])
    *_, normal = core_frames(pair, *carriers)
    sign = (normal * _real(found.frame[at, 0])).sum(-1).sign()
    return replace(pair, sign=sign) if kinds[0] != 0 else pair, side


def _reproduces(pair: CorePair, found: _Found, at: Index, side: Index) -> NDArray[np.bool_]:
    """Where the closed form gives MuJoCo's normal, distance and point [k]; never where it is not finite."""
    carriers = _real(found.position[at[:, None], side]), _real(found.rotation[at[:, None], side])
    dist, point, normal = (x.numpy() for x in core_frames(pair, *carriers))
    with np.errstate(invalid="ignore"):
        return (
            (np.abs(normal - found.frame[at, 0]).max(1) < _SAME[0])
            & (np.abs(dist - found.dist[at]) < _SAME[1])
            & (np.abs(point - found.point[at]).max(1) < _SAME[2])
        )


def _carried(
    table: GeomTable, found: _Found, pair: CorePair, at: Index, side: Index, good: NDArray[np.bool_]
) -> CoreContacts:
    """The good contacts with their cores in the frames of the bodies."""
    geom = found.geom[at[:, None], side][good]
    place, turn = _real(table.position[geom]), _real(table.rotation[geom])
    keep = torch.from_numpy(good)
    return CoreContacts(
        env=_long(found.env[at[good]]),
        body=_long(table.body[geom]),
        pair=replace(
            pair,
            point=place + (turn @ pair.point[keep][..., None]).squeeze(-1),
            axis=(turn @ pair.axis[keep][..., None]).squeeze(-1),
            radius=pair.radius[keep],
            shape=turn[:, 1] @ pair.shape[keep] @ turn[:, 1].mT if pair.kinds == (0, 5) else pair.shape[keep],
            sign=pair.sign[keep],
            flip=pair.flip[keep],
        ),
    )


def _relative(
    structure: Structure, table: GeomTable, found: _Found, readings: Sequence[Reading], rule: Index
) -> RelativeContacts:
    """Contacts of rules B and C in order of their rows."""
    jacobian, moved = np.zeros((len(rule), 7, 6)), np.ones(len(rule), dtype=np.int64)
    _curved(structure.model, table, found, np.flatnonzero(rule == 1), jacobian)
    _differenced(structure.model, found, readings, np.flatnonzero(rule == 2), jacobian, moved)
    rows = np.flatnonzero(rule > 0)
    geom, side = found.geom[rows], moved[rows]
    pick = np.arange(len(rows))
    body = table.body[geom]
    turn = found.rotation[rows] @ table.rotation[geom].swapaxes(-1, -2)
    start = found.position[rows] - (turn @ table.position[geom][..., None]).squeeze(-1)
    anchor, anchored = turn[pick, 1 - side], start[pick, 1 - side]
    center = found.position[rows, side]
    back = anchor.swapaxes(-1, -2)
    wide = np.zeros((len(rows), 7, 7))
    wide[:, :3, :3] = wide[:, 3:6, 3:6] = back
    wide[:, 6, 6] = 1.0
    local = wide @ jacobian[rows] @ wide[:, :6, :6].swapaxes(-1, -2)
    value = np.concatenate(
        [_local(anchor, found.point[rows] - anchored), _local(anchor, found.frame[rows, 0]), found.dist[rows, None]], 1
    )
    return RelativeContacts(
        env=_long(found.env[rows]),
        anchor=_long(body[pick, 1 - side]),
        moving=_long(body[pick, side]),
        pivot=_real(table.position[geom[pick, side]]),
        offset=_real(_local(anchor, center - anchored)),
        turn=_real(back @ turn[pick, side]),
        value=_real(value),
        jacobian=_real(local),
    )


def _curved(model: mujoco.MjModel, table: GeomTable, found: _Found, rows: Index, jacobian: Array) -> None:
    """Fill the Jacobians of rule B, or refuse."""
    if not len(rows):
        return
    keys = np.concatenate([found.env[:, None], found.geom], 1)
    for row in rows.tolist():
        if (keys == keys[row]).all(1).sum() > 1 or HFIELD in table.kind[found.geom[row]]:
            raise MujocoUnsupportedError(
                f"{_names(model, found.geom[row].tolist())} touch in environment {found.env[row]} with several points: no "
                "rule differentiates the manifold of a cylinder or ellipsoid; use a box, a capsule or a mesh for one of them, "
                "or exclude the pair"
            )
    pick = np.zeros(len(found.env), dtype=bool)
    pick[rows] = True
    sides = found.sides(table)[np.repeat(pick, 2)]
    hessian, fits = support_hessian(table, sides)
    for k, row in enumerate(rows.tolist()):
        if not fits[2 * k : 2 * k + 2].all():
            raise MujocoUnsupportedError(
                f"{_names(model, found.geom[row].tolist())} touch in environment {found.env[row]} at no smooth feature of "
                "one of them (on the border of a face, or a cylinder standing flat on a plane, whose contact points jump); "
                "use a box, a capsule or a mesh for one of them"
            )
    turn = found.rotation[rows]
    world = turn @ hessian.reshape(-1, 2, 3, 3) @ turn.swapaxes(-1, -2)
    normal, dist = found.frame[rows, 0], found.dist[rows]
    arm = found.point[rows] + normal * dist[:, None] / 2 - found.position[rows, 1]
    jacobian[rows] = curvature_jacobian(normal, dist, arm, world[:, 0], world[:, 1])


def _differenced(
    model: mujoco.MjModel, found: _Found, readings: Sequence[Reading], rows: Index, jacobian: Array, moved: Index
) -> None:
    """Fill the Jacobians of rule C and which geom was moved, or refuse."""
    if not len(rows):
        return
    scratch = mujoco.MjData(model)
    for reading in readings:
        own = rows[found.env[rows] == reading.env]
        if not len(own):
            continue
        scratch.qpos[:], scratch.mocap_pos[:], scratch.mocap_quat[:] = reading.pose
        mujoco.mj_kinematics(model, scratch)
        every = np.flatnonzero(found.env == reading.env)
        geoms = [tuple(g) for g in found.geom[every].tolist()]
        order = {int(row): geoms[:k].count(geoms[k]) for k, row in enumerate(every)}
        pairs = [(int(a), int(b)) for a, b in found.geom[own]]
        out = collision_differences(model, scratch, pairs, [order[int(row)] for row in own])
        for pair, reason in out.failed.items():
            raise MujocoUnsupportedError(
                f"{_names(model, pair)} in environment {reading.env} have no derivative: {reason}; shift the state a "
                "little, or use spheres, capsules or a plane for one of the two"
            )
        jacobian[own], moved[own] = out.jacobian, out.side


def _seeds(model: mujoco.MjModel, table: GeomTable, found: _Found) -> tuple[Array, Index]:
    """Seed axis [N, 3] of the first tangent and the body [N] that carries it; confirmed by MuJoCo's own frame."""
    normal = found.frame[:, 0]
    kind = table.kind[found.geom]
    seed = np.where((np.abs(normal[:, 1]) < 0.5)[:, None], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0])
    body = np.zeros(len(seed), dtype=np.int64)
    across = np.linalg.norm(np.cross(found.rotation[:, 1, :, 2], normal), axis=1)
    lying = (kind[:, 0] == PLANE) & (kind[:, 1] == CAPSULE) & (across > 1e-9)
    world = np.where(lying[:, None], found.rotation[:, 1, :, 2], seed)
    body[lying] = table.body[found.geom[lying, 1]]
    seed[lying] = table.rotation[found.geom[lying, 1]][:, :, 2]
    tangent = world - normal * (normal * world).sum(1, keepdims=True)
    tangent /= np.maximum(np.linalg.norm(tangent, axis=1, keepdims=True), 1e-12)
    apart = np.abs(tangent - found.frame[:, 1]).max(1) > 1e-6 / np.where(lying, np.maximum(across, 1e-9), 1.0)
    # a capsule that stands on a plane: MuJoCo picks a tangent of the world
    standing = (kind[:, 0] == PLANE) & (kind[:, 1] == CAPSULE) & ~lying
    seed[standing] = found.frame[standing, 1]
    for row in np.flatnonzero(apart & ~standing).tolist():
        raise MujocoUnsupportedError(
            f"{_names(model, found.geom[row].tolist())} touch in environment {found.env[row]} with a tangent "
            f"{found.frame[row, 1]} that follows no known rule; use another geom type for one of them"
        )
    return seed, body


def _names(model: mujoco.MjModel, geoms: Sequence[int]) -> str:
    """'floor' (plane) and geom 3 of 'torso' (box)."""
    described = []
    for g in geoms:
        name, owner = model.geom(int(g)).name, model.body(int(model.geom_bodyid[g])).name
        kind = mujoco.mjtGeom(int(model.geom_type[g])).name[7:].lower()
        described.append(f"'{name}' ({kind})" if name else f"geom {g} of '{owner}' ({kind})")
    return " and ".join(described)


def _long(x: NDArray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.int64))


def _real(x: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float64))
