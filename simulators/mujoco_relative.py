"""Contacts as linear functions of a relative pose, and differences of MuJoCo's own collision for it (rule C).

Seen from body a a contact depends on the pose of the other geom m relative to a alone. With xi (3 translations of the
centre of m, 3 rotations about it, axes of a) measured from the frozen pose,

    (point, normal, dist) in axes of a = value + jacobian xi,

exact to first order. Rule B gives `jacobian` in closed form; rule C from 6 centred differences of `mj_collision` with
m displaced (12 calls, shared by all pairs of which exactly one geom is displaced).
Reference: mujoco_recipe 3, rule C.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mujoco
import numpy as np
import torch
from torch import Tensor

from sim2real.simulators.mujoco_features import Array, Index

_STEP = 1e-6
"""m and rad"""
_KINK = 1e-4
"""largest second difference over the step, relative to the Jacobian: beyond it left and right derivatives differ"""


@dataclass(frozen=True, eq=False)
class RelativeContacts:
    """k contacts, each linear in the pose of body `moving` relative to body `anchor`."""

    env: Tensor
    anchor: Tensor
    moving: Tensor
    pivot: Tensor
    """[k, 3] centre of the displaced geom, in the moving body"""
    offset: Tensor
    """[k, 3] the same in the anchor body at the frozen pose"""
    turn: Tensor
    """[k, 3, 3] from the moving to the anchor body at the frozen pose"""
    value: Tensor
    """[k, 7] point, normal, dist in the anchor body"""
    jacobian: Tensor
    """[k, 7, 6]"""


def relative_frames(contacts: RelativeContacts, position: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distance [k], point [k, 3] and normal [k, 3] at body positions [B, nbody, 3], rotations [B, nbody, 3, 3]."""
    start, axes = position[contacts.env, contacts.anchor], rotation[contacts.env, contacts.anchor]
    other, turned = position[contacts.env, contacts.moving], rotation[contacts.env, contacts.moving]
    pivot = other + _apply(turned, contacts.pivot)
    shift = _apply(axes.mT, pivot - start) - contacts.offset
    spin = axes.mT @ turned @ contacts.turn.mT
    skew = (spin - spin.mT) / 2
    xi = torch.cat([shift, skew[:, 2, 1, None], skew[:, 0, 2, None], skew[:, 1, 0, None]], -1)
    feature = contacts.value + _apply(contacts.jacobian, xi)
    normal = _apply(axes, feature[:, 3:6])
    normal = normal / (normal * normal).sum(-1, keepdim=True).sqrt()
    return feature[:, 6], start + _apply(axes, feature[:, :3]), normal


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None]).squeeze(-1)


@dataclass(frozen=True, eq=False)
class Differences:
    """What differences of the collision gave for k contacts of one environment."""

    side: Index
    """[k] which of the two geoms was displaced"""
    jacobian: Array
    """[k, 7, 6] world axes"""
    failed: dict[tuple[int, int], str]
    """pairs without a derivative, and why"""


def collision_differences(
    model: mujoco.MjModel,
    scratch: mujoco.MjData,
    pairs: Sequence[tuple[int, int]],
    order: Sequence[int],
    flush: Mapping[tuple[int, int], Array],
) -> Differences:
    """Derivatives of k contacts: contact i is the `order[i]`-th that MuJoCo reports for `pairs[i]`.

    `scratch` holds the pose (after `mj_kinematics`); its geom poses are restored. `flush` gives the normals of pairs
    whose faces or edges lie flat on one another: which of the two faces then carries the points may depend on the
    direction of a tilt, so these are tilted in 16 directions, too.
    """
    wanted = list(dict.fromkeys(pairs))
    movable = model.body_weldid[model.geom_bodyid] != 0
    side = np.zeros(len(pairs), dtype=np.int64)
    jacobian = np.zeros((len(pairs), 7, 6))
    failed: dict[tuple[int, int], str] = {}
    for group in _groups(wanted, movable.tolist()):
        columns, reasons = _displaced(model, scratch, group)
        failed |= reasons
        for pair in [pair for pair in columns if pair in flush]:
            if not _linear(model, scratch, pair, group[pair], columns[pair], flush[pair]):
                failed[pair] = "their faces are flush, and the face that carries the contact points changes with a tilt"
        for i, (pair, k) in enumerate(zip(pairs, order, strict=True)):
            if pair in columns and k < len(columns[pair]):
                side[i], jacobian[i] = pair.index(group[pair]), columns[pair][k]
    return Differences(side, jacobian, failed)


def _groups(pairs: Sequence[tuple[int, int]], movable: Sequence[bool]) -> list[dict[tuple[int, int], int]]:
    """Pairs in groups that share their calls, with the geom that moves: in each pair exactly one moves."""
    groups: list[dict[tuple[int, int], int]] = []
    for first, second in pairs:
        choices = [(g, o) for g, o in ((second, first), (first, second)) if movable[g]]
        for group in groups:
            moved = set(group.values())
            rests = {g for pair in group for g in pair} - moved
            free = [g for g, o in choices if g not in rests and o not in moved]
            if free:
                group[first, second] = free[0]
                break
        else:
            groups.append({(first, second): choices[0][0]})
    return groups


def _displaced(
    model: mujoco.MjModel, scratch: mujoco.MjData, group: dict[tuple[int, int], int]
) -> tuple[dict[tuple[int, int], Array], dict[tuple[int, int], str]]:
    """Jacobians [contacts of the pair, 7, 6] of every pair of a group, and what failed."""
    moved = sorted(set(group.values()))
    position, rotation = scratch.geom_xpos[moved], scratch.geom_xmat[moved].reshape(-1, 3, 3)
    failed: dict[tuple[int, int], str] = {}
    rest = _read(model, scratch, group)
    columns: dict[tuple[int, int], list[Array]] = {pair: [] for pair in group}
    for axis in range(6):
        sides = []
        for step in (_STEP, -_STEP):
            if axis < 3:
                scratch.geom_xpos[moved] = position + step * np.eye(3)[axis]
            else:
                scratch.geom_xmat[moved] = (_rotation(np.eye(3)[axis - 3], step) @ rotation).reshape(-1, 9)
            sides.append({pair: _matched(rest[pair], rows) for pair, rows in _read(model, scratch, group).items()})
            scratch.geom_xpos[moved], scratch.geom_xmat[moved] = position, rotation.reshape(-1, 9)
        for pair in group:
            ahead, behind, here = sides[0][pair], sides[1][pair], rest[pair]
            if not len(ahead) == len(behind) == len(here):
                failed[pair] = "the number of its contact points changes within 1e-6 m or rad"
            if pair in failed:
                continue
            slope = (ahead - behind) / (2 * _STEP)
            if np.abs(ahead + behind - 2 * here).max() / _STEP > _KINK * max(1.0, np.abs(slope).max()):
                failed[pair] = "its contact points jump or bend within 1e-6 m or rad"
            columns[pair].append(slope)
    return {pair: np.stack(c, -1) for pair, c in columns.items() if pair not in failed}, failed


def _linear(
    model: mujoco.MjModel, scratch: mujoco.MjData, pair: tuple[int, int], geom: int, columns: Array, normal: Array
) -> bool:
    """Whether the derivatives [contacts, 7, 6] hold for tilts of a geom about 16 axes across the normal."""
    rotation = scratch.geom_xmat[geom].copy()
    group = {pair: geom}
    rest = _read(model, scratch, group)[pair]
    first, second = np.linalg.svd(normal[None])[2][1:]
    for angle in np.arange(16) * np.pi / 8:
        axis = np.cos(angle) * first + np.sin(angle) * second
        scratch.geom_xmat[geom] = (_rotation(axis, _STEP) @ rotation.reshape(3, 3)).ravel()
        tilted = _matched(rest, _read(model, scratch, group)[pair])
        scratch.geom_xmat[geom] = rotation
        slope = columns[..., 3:] @ axis
        if len(tilted) != len(rest):
            return False
        if np.abs((tilted - rest) / _STEP - slope).max() > _KINK * max(1.0, np.abs(slope).max()):
            return False
    return True


def _read(
    model: mujoco.MjModel, scratch: mujoco.MjData, group: dict[tuple[int, int], int]
) -> dict[tuple[int, int], Array]:
    """Point, normal, dist [contacts, 7] of each pair as MuJoCo's collision gives them now."""
    mujoco.mj_collision(model, scratch)
    contact = scratch.contact
    geom = contact.geom
    feature = np.concatenate([contact.pos, contact.frame[:, :3], contact.dist[:, None]], 1)
    return {pair: feature[(geom == pair).all(1)] for pair in group}


def _matched(rest: Array, rows: Array) -> Array:
    """The displaced rows in the order of those at rest, by nearest point: MuJoCo may list the points of a face anew."""
    if len(rest) != len(rows) or len(rest) < 2:
        return rows
    nearest = np.linalg.norm(rest[:, None, :3] - rows[None, :, :3], axis=-1).argmin(1)
    return rows[nearest] if len(set(nearest.tolist())) == len(rest) else rows


def _rotation(axis: Array, angle: float) -> Array:
    """Rotation matrix about a unit axis (Rodrigues)."""
    x, y, z = axis
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
