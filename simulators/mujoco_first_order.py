"""The contacts without a closed form: rule B for a single point of a smooth geom, rule C for all others, or a refusal.

No rule is trusted blindly. Rule B needs witness and normal to fit one feature of each geom, rule C needs equal left and
right differences of MuJoCo's collision; a contact that fails has no derivative and raises `MujocoUnsupportedError`.
"""

from __future__ import annotations

import mujoco
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sim2real.simulators.mujoco_cores import FACE, LINE
from sim2real.simulators.mujoco_coverage import MujocoUnsupportedError
from sim2real.simulators.mujoco_curvature import curvature_jacobian, support_hessian
from sim2real.simulators.mujoco_features import CYLINDER, ELLIPSOID, HFIELD, SDF, Array, GeomTable, Index, features
from sim2real.simulators.mujoco_readings import Reading, geom_names, local, sides
from sim2real.simulators.mujoco_relative import RelativeContacts, collision_differences

_PARALLEL = 1e-5
"""times the size: how far a face or an edge may stand off along the normal and still count as flush"""


def _smooth(table: GeomTable, reading: Reading) -> NDArray[np.bool_]:
    """Rows [N] that rule B could serve: the only point of a pair with a cylinder or an ellipsoid."""
    kind = table.kind[reading.geom]
    curved = np.isin(kind, (ELLIPSOID, CYLINDER)).any(1) & ~np.isin(kind, (HFIELD, SDF)).any(1)
    keys = np.concatenate([reading.env[:, None], reading.geom], 1)
    _, which, count = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
    return curved & (count[which.ravel()] == 1)


def first_order_contacts(
    model: mujoco.MjModel, table: GeomTable, reading: Reading, left: NDArray[np.bool_]
) -> tuple[RelativeContacts, Index]:
    """The rows marked in `left` [N], in their order, and the rules [N] used: 1 for B, 2 for C, 0 elsewhere."""
    rule = np.where(left, 2, 0)
    rule[_smooth(table, reading) & left] = 1
    jacobian, moved = np.zeros((len(rule), 7, 6)), np.ones(len(rule), dtype=np.int64)
    _curved(table, reading, np.flatnonzero(rule == 1), jacobian, rule)
    _differenced(model, table, reading, np.flatnonzero(rule == 2), jacobian, moved)
    rows = np.flatnonzero(rule > 0)
    side, pick = moved[rows], np.arange(len(rows))
    geom = reading.geom[rows]
    turn = reading.rotation[rows] @ table.rotation[geom].swapaxes(-1, -2)
    start = reading.position[rows] - (turn @ table.position[geom][..., None]).squeeze(-1)
    anchor, origin = turn[pick, 1 - side], start[pick, 1 - side]
    back = anchor.swapaxes(-1, -2)
    wide = np.zeros((len(rows), 7, 7))
    wide[:, :3, :3] = wide[:, 3:6, 3:6] = back
    wide[:, 6, 6] = 1.0
    seen = [
        local(anchor, reading.point[rows] - origin),
        local(anchor, reading.frame[rows, 0]),
        reading.dist[rows, None],
    ]
    contacts = RelativeContacts(
        env=torch.from_numpy(reading.env[rows]),
        anchor=torch.from_numpy(table.body[geom[pick, 1 - side]]),
        moving=torch.from_numpy(table.body[geom[pick, side]]),
        pivot=_real(table.position[geom[pick, side]]),
        offset=_real(local(anchor, reading.position[rows, side] - origin)),
        turn=_real(back @ turn[pick, side]),
        value=_real(np.concatenate(seen, 1)),
        jacobian=_real(wide @ jacobian[rows] @ wide[:, :6, :6].swapaxes(-1, -2)),
    )
    return contacts, rule


def _curved(table: GeomTable, reading: Reading, rows: Index, jacobian: Array, rule: Index) -> None:
    """Write the Jacobians of rule B into their rows; a row that fits no smooth feature passes to rule C."""
    if not len(rows):
        return
    pick = np.zeros(len(reading.env), dtype=bool)
    pick[rows] = True
    hessian, fits = support_hessian(table, sides(table, reading)[np.repeat(pick, 2)])
    both = fits.reshape(-1, 2).all(1)
    rule[rows[~both]] = 2
    rows, hessian = rows[both], hessian.reshape(-1, 2, 3, 3)[both]
    turn = reading.rotation[rows]
    world = turn @ hessian @ turn.swapaxes(-1, -2)
    normal, dist = reading.frame[rows, 0], reading.dist[rows]
    arm = reading.point[rows] + normal * dist[:, None] / 2 - reading.position[rows, 1]
    jacobian[rows] = curvature_jacobian(normal, dist, arm, world[:, 0], world[:, 1])


def _differenced(
    model: mujoco.MjModel, table: GeomTable, reading: Reading, rows: Index, jacobian: Array, moved: Index
) -> None:
    """Write the Jacobians of rule C and the moved geoms into their rows."""
    if not len(rows):
        return
    scratch = mujoco.MjData(model)
    flat = _flush(table, reading, rows)
    for env in np.unique(reading.env[rows]).tolist():
        every = np.flatnonzero(reading.env == env)
        pairs = [(int(a), int(b)) for a, b in reading.geom[every]]
        order = {row: pairs[:k].count(pairs[k]) for k, row in enumerate(every.tolist())}
        mine = reading.env[rows] == env
        own = rows[mine]
        wanted = [pairs[np.searchsorted(every, row)] for row in own]
        flush = {pair: reading.frame[row, 0] for pair, row, f in zip(wanted, own, flat[mine], strict=True) if f}
        scratch.qpos[:], scratch.mocap_pos[:], scratch.mocap_quat[:] = reading.scene[env]
        mujoco.mj_kinematics(model, scratch)
        out = collision_differences(model, scratch, wanted, [order[row] for row in own.tolist()], flush)
        for pair, reason in out.failed.items():
            raise MujocoUnsupportedError(
                f"{geom_names(model, pair)} in environment {env} have no derivative: {reason}; shift the state a "
                "little, or use a sphere, a capsule or a plane for one of the two"
            )
        jacobian[own], moved[own] = out.jacobian, out.side


def _flush(table: GeomTable, reading: Reading, rows: Index) -> NDArray[np.bool_]:
    """Whether an edge or a face of one geom lies along an edge or a face of the other, within 1e-5 rad, per row."""
    pick = np.zeros(len(reading.env), dtype=bool)
    pick[rows] = True
    kind = features(table, sides(table, reading)[np.repeat(pick, 2)], _PARALLEL).kind
    return np.logical_and.reduce(np.isin(kind, (FACE, LINE)).reshape(-1, 2), axis=1)


def _real(x: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float64))
