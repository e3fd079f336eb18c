"""Derivatives of contacts (rules A, B, C) against MuJoCo's collision at two neighbouring positions.

A function that equals MuJoCo's contact at a position q may still miss its neighbourhood: deep inside one another two
solids have several directions of equal depth, and the convex collider jumps between them; parallel edges and axes have
no single nearest points. So at q (+) u h and q (-) u h, u one generic direction of all joints,

    |function - collision| <= tolerance,                 h = 1e-6 rad or m,

which finds every jump and bend whose surface passes through q, unless u lies in it; rule C's differences along six
axes alone pass some.
"""

from __future__ import annotations

from collections.abc import Callable

import mujoco
import numpy as np
import torch
from torch import Tensor

from sim2real.simulators.mujoco_coverage import MujocoUnsupportedError
from sim2real.simulators.mujoco_features import (
    CAPSULE,
    CYLINDER,
    ELLIPSOID,
    HFIELD,
    MESH,
    PLANE,
    SDF,
    SPHERE,
    Array,
    GeomTable,
)
from sim2real.simulators.mujoco_readings import Reading, geom_names

_STEP = 1e-6
_CROSSING = 0.999
"""times the sum of the radii: the depth from which the axes of two capsules count as crossing"""
_EXACT, _ITERATED = 2e-7, 1e-3
"""m or 1: where colliders are exact, a bend shows; where they iterate, their noise of 5e-5 hides all but jumps"""

Frames = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""positions [B, nbody, 3] m and rotations [B, nbody, 3, 3] of bodies -> distance, point, frame of all contacts"""


def check_neighbours(model: mujoco.MjModel, table: GeomTable, reading: Reading, frames: Frames) -> None:
    """Raise `MujocoUnsupportedError` for a contact that `frames` describes at the frozen positions only."""
    kind = table.kind[reading.geom]
    # contacts with planes have one formula everywhere, and so have spheres and capsules until their axes cross
    crossing = reading.dist < -_CROSSING * table.size[reading.geom, 0].sum(1)
    several = ~np.isin(kind, (PLANE, HFIELD, SDF)).any(1) & (crossing | ~np.isin(kind, (SPHERE, CAPSULE)).all(1))
    rows = np.flatnonzero(several)
    if not len(rows):
        return
    iterated = np.isin(kind, (CYLINDER, ELLIPSOID)).any(1)
    iterated |= np.isin(kind, (SPHERE, CAPSULE)).any(1) & (kind == MESH).any(1)
    tolerance = np.where(iterated, _ITERATED, _EXACT)[rows]
    scratch, direction = mujoco.MjData(model), np.random.default_rng(0).normal(size=model.nv)
    envs = np.unique(reading.env[rows]).tolist()
    seen = np.concatenate([reading.dist[:, None], reading.point, reading.frame[:, 0]], 1)[rows]
    here = _closed(model, scratch, reading, frames, 0 * direction)[rows]
    for step in (_STEP, -_STEP):
        expected = seen + _closed(model, scratch, reading, frames, step * direction)[rows] - here
        for env in envs:
            _place(model, scratch, reading, env, step * direction)
            mujoco.mj_collision(model, scratch)
            contact = scratch.contact
            geom, found = contact.geom, np.concatenate([contact.dist[:, None], contact.pos, contact.frame[:, :3]], 1)
            for k in np.flatnonzero(reading.env[rows] == env).tolist():
                own = found[(geom == reading.geom[rows[k]]).all(1)]
                if not (np.abs(own - expected[k]).max(1) <= tolerance[k]).any():
                    raise MujocoUnsupportedError(
                        f"{geom_names(model, reading.geom[rows[k]].tolist())} in environment {env} have no derivative: "
                        f"their contact at distance {reading.dist[rows[k]]:.3g} m jumps or bends within 1e-6 m or rad "
                        "(deep inside one another, or flush); shift the state a little, keep the pair apart by "
                        "<exclude>, contype and conaffinity, or use simpler geoms"
                    )


def _closed(model: mujoco.MjModel, scratch: mujoco.MjData, reading: Reading, frames: Frames, move: Array) -> Array:
    """Distance, point, normal [N, 7] by the closed forms, all joints moved by `move` [nv]."""
    position = np.zeros((int(reading.env.max()) + 1, model.nbody, 3))
    rotation = np.zeros((*position.shape, 3))
    for env in np.unique(reading.env).tolist():
        _place(model, scratch, reading, env, move)
        position[env], rotation[env] = scratch.xpos, scratch.xmat.reshape(-1, 3, 3)
    dist, point, frame = frames(torch.from_numpy(position), torch.from_numpy(rotation))
    return torch.cat([dist[:, None], point, frame[:, 0]], 1).numpy()


def _place(model: mujoco.MjModel, scratch: mujoco.MjData, reading: Reading, env: int, move: Array) -> None:
    """Put all geoms of an environment where they are after `move`."""
    scratch.qpos[:], scratch.mocap_pos[:], scratch.mocap_quat[:] = reading.scene[env]
    mujoco.mj_integratePos(model, scratch.qpos, move, 1.0)
    mujoco.mj_kinematics(model, scratch)
