"""Clipped contact points of boxes and meshes: an edge cut by a side of the other's face, and a face under its corner.

The face that carries the manifold belongs to the geom R whose outward normal is the contact's normal; of the other, I,

    cut edge       q2 = p + u (s . (c - p))/(s . u)        line (p, u) of I, side plane of R through c with normal s
    under corner   q2 = c + n (m . (p - c))/(m . n)        corner c of R, face of I through p with normal m

and the face of R against the point q2 gives distance and point, as against a vertex (`mujoco_cores`). The side plane
holds an edge of the face and its normal n. Edges, corners and faces are found from the witness points.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sim2real.simulators.mujoco_cores import CUT_EDGE, FACE, UNDER_CORNER
from sim2real.simulators.mujoco_features import BOX, MESH, Array, Features, GeomTable, Index, Sides

_BORDER = 1e-6
"""times the size: a witness this close lies on a corner, an edge or a face"""


@dataclass(frozen=True, eq=False)
class Polytope:
    """A box or the hull of a mesh, in the frame of its geom."""

    vertices: Array
    start: Array
    """[E, 3] where each edge begins"""
    along: Array
    """[E, 3] unit"""
    length: Array
    normals: Array
    """[F, 3] of the faces, outward"""
    heights: Array
    """[F] of the faces along their normals"""
    size: float


@lru_cache(maxsize=4096)
def polytope(table: GeomTable, geom: int) -> Polytope:
    """Edges and faces of a geom; none for a mesh whose hull the model does not hold."""
    if table.kind[geom] == BOX:
        vertices = table.size[geom] * np.stack(np.meshgrid(*3 * [[-1.0, 1.0]], indexing="ij"), -1).reshape(-1, 3)
        pairs = np.array([(a, a | b) for b in (1, 2, 4) for a in range(8) if not a & b])
        normals = np.concatenate([np.eye(3), -np.eye(3)])
        heights = np.tile(table.size[geom], 2)
    else:
        vertices, faces = table.hulls[geom], table.triangles[geom]
        pairs = np.unique(np.sort(faces[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2), axis=1), axis=0)
        corner = vertices[faces]
        normals = np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0])
        normals /= np.linalg.norm(normals, axis=1, keepdims=True)
        heights = (normals * corner[:, 0]).sum(1)
        inward = heights < normals @ vertices.mean(0)
        normals, heights = np.where(inward[:, None], -normals, normals), np.where(inward, -heights, heights)
    along = vertices[pairs[:, 1]] - vertices[pairs[:, 0]]
    length = np.linalg.norm(along, axis=1)
    size = float(np.ptp(vertices, axis=0).max())
    return Polytope(vertices, vertices[pairs[:, 0]], along / length[:, None], length, normals, heights, size)


@dataclass(frozen=True, eq=False)
class _Place:
    """What of their polytopes n witness points lie on; `edge` and `face` are -1 where there is none."""

    corner: NDArray[np.bool_]
    edge: Index
    face: Index
    vertex: Index


def clipped(table: GeomTable, sides: Sides, seen: Features) -> Features:
    """The features of both sides of every contact [2 n], with those of clipped points of polytopes filled in."""
    kind = seen.kind.reshape(-1, 2)
    solid = np.isin(table.kind[sides.geom], (BOX, MESH)).reshape(-1, 2)
    rows = np.flatnonzero(solid[:, 0] & solid[:, 1] & ((kind == FACE).sum(1) == 1))
    out = replace(seen, kind=seen.kind.copy(), point=seen.point.copy(), axis=seen.axis.copy(), shape=seen.shape.copy())
    carries = kind[rows].argmin(1)  # FACE is the smallest
    geoms = sides.geom.reshape(-1, 2)[rows]
    for a, b in np.unique(geoms, axis=0).tolist():
        for side in (0, 1):
            chosen = rows[(geoms == (a, b)).all(1) & (carries == side)]
            if len(chosen):
                solids = polytope(table, (a, b)[side]), polytope(table, (a, b)[1 - side])
                _clip(out, solids, sides, 2 * chosen + side, 2 * chosen + 1 - side)
    return out


def _clip(out: Features, solids: tuple[Polytope, Polytope], sides: Sides, r: Index, i: Index) -> None:
    """Write the clipped points among rows of which `r` carry a face and `i` are the other sides."""
    face, other = solids
    on_r = _located(face, sides.witness[r], sides.normal[r], out.axis[r])
    on_i = _located(other, sides.witness[i], sides.normal[i], None)
    edge = ~on_r.corner & ~on_i.corner & (on_r.edge >= 0) & (on_i.edge >= 0)
    under = on_r.corner & ~on_i.corner & (on_i.edge < 0) & (on_i.face >= 0)
    k, j, re, ie = on_r.edge[edge], on_i.edge[edge], r[edge], i[edge]
    out.kind[ie], out.point[ie], out.axis[ie] = CUT_EDGE, other.start[j], other.along[j]
    out.shape[re, 0], out.shape[re, 1] = np.cross(out.axis[re], face.along[k]), face.start[k]
    f, ru, iu = on_i.face[under], r[under], i[under]
    out.kind[iu], out.axis[iu] = UNDER_CORNER, other.normals[f]
    out.point[iu] = other.normals[f] * other.heights[f, None]
    out.shape[ru, 1] = face.vertices[on_r.vertex[under]]


def _located(solid: Polytope, witness: Array, normal: Array, across: Array | None) -> _Place:
    """What the witnesses [n, 3] lie on; edges only along the face normals `across`, where given."""
    near = _BORDER * solid.size
    gap = np.linalg.norm(solid.vertices - witness[:, None], axis=-1)
    offset = witness[:, None] - solid.start
    reach = (offset * solid.along).sum(-1)
    away = np.linalg.norm(offset - reach[..., None] * solid.along, axis=-1)
    away = np.where((reach < -near) | (reach > solid.length + near), np.inf, away)
    if across is not None:
        away = np.where(np.abs(across @ solid.along.T) > _BORDER, np.inf, away)
    above = np.abs(witness @ solid.normals.T - solid.heights)
    above = np.where(normal @ solid.normals.T > 0, above, np.inf)
    return _Place(gap.min(1) < near, _nearest(away, near), _nearest(above, near), gap.argmin(1))


def _nearest(distance: Array, near: float) -> Index:
    """Index of the smallest distance of each row, -1 where none is near."""
    if not distance.shape[1]:
        return np.full(len(distance), -1)
    index = distance.argmin(1)
    return np.where(distance[np.arange(len(index)), index] < near, index, -1)
