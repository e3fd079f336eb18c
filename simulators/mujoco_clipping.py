"""Clipped contact points of two boxes: an edge cut by a side of the other's face, and a face under its corner.

The face that carries the manifold belongs to the box R whose outward normal is the contact's normal; of the other, I,

    cut edge       q2 = p + u (s . (c - p))/(s . u)        line (p, u) of I, side plane of R through c with normal s
    under corner   q2 = c + n (m . (p - c))/(m . n)        corner c of R, face of I through p with normal m

and the face of R against the point q2 gives distance and point, as against a vertex (`mujoco_cores`). This guesses the
two from the witness points: on an edge two coordinates of I are at the border of its box, on a face one.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sim2real.simulators.mujoco_cores import CUT_EDGE, FACE, UNDER_CORNER
from sim2real.simulators.mujoco_features import BOX, Features, GeomTable, Sides

_BORDER = 1e-6
"""times the size: a witness this close lies on a side"""


def clipped(table: GeomTable, sides: Sides, seen: Features) -> Features:
    """The features of both sides of every contact [2 n], with those of clipped points of two boxes filled in."""
    kind = seen.kind.reshape(-1, 2)
    boxes = (table.kind[sides.geom].reshape(-1, 2) == BOX).all(1)
    one_face = (kind == FACE).sum(1) == 1
    rows = np.flatnonzero(boxes & one_face)
    first = kind[rows].argmin(1)  # FACE is the smallest
    r, i = 2 * rows + first, 2 * rows + 1 - first
    size_r, size_i = table.size[sides.geom[r]], table.size[sides.geom[i]]
    at_r = np.abs(np.abs(sides.witness[r]) - size_r) < _BORDER * size_r.max(1, keepdims=True)
    at_i = np.abs(np.abs(sides.witness[i]) - size_i) < _BORDER * size_i.max(1, keepdims=True)
    snapped_r = np.where(at_r, np.sign(sides.witness[r]) * size_r, sides.witness[r])
    snapped_i = np.where(at_i, np.sign(sides.witness[i]) * size_i, sides.witness[i])
    side = at_r & (np.abs(seen.axis[r]) < 0.5)
    edge = (side.sum(1) == 1) & (at_i.sum(1) == 2)
    corner = (side.sum(1) == 2) & (at_i.sum(1) == 1)
    found = edge | corner
    out = replace(seen, kind=seen.kind.copy(), point=seen.point.copy(), axis=seen.axis.copy(), shape=seen.shape.copy())
    r, i = r[found], i[found]
    out.kind[i] = np.where(edge[found], CUT_EDGE, UNDER_CORNER)
    out.point[i] = snapped_i[found]
    out.axis[i] = np.where(edge[found, None], ~at_i[found], np.sign(snapped_i[found]) * at_i[found])
    out.shape[r, 0] = np.sign(snapped_r[found]) * side[found]
    out.shape[r, 1] = snapped_r[found]
    return out
