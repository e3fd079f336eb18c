"""Which feature of a geom touches: vertex, edge, face, end, side, cap, rim or foot, from MuJoCo's witness and normal.

All arrays are in the frame of the geom; `normal` points out of it. A polytope touches with the vertices v of maximal
n . v (within a tolerance times its size): one is a vertex, two or more on a line an edge, else a face.
The answer is a guess that the caller must confirm by evaluating the closed form (`mujoco_contacts`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import mujoco
import numpy as np
from numpy.typing import NDArray

from sim2real.simulators.mujoco_cores import CYLINDER_FOOT, ELLIPSOID_FOOT, FACE, LINE, NO_CORE, POINT, RIM

Array = NDArray[np.float64]
Index = NDArray[np.int64]

PLANE, HFIELD, SPHERE, CAPSULE, ELLIPSOID, CYLINDER, BOX, MESH, SDF = range(9)

_TOUCHES = 1e-6
"""a witness is a vertex or lies on a rim within this times the size of its geom"""
STANDING = 1e-6
"""sine of the tilt under which a cylinder stands on a plane: its contact points stay on it, but jump if it tilts"""


@dataclass(frozen=True, eq=False)
class GeomTable:
    """Static tables of the geoms of one model."""

    kind: Index
    """[ngeom] mjtGeom"""
    size: Array
    """[ngeom, 3]"""
    body: Index
    position: Array
    """[ngeom, 3] in the body"""
    rotation: Array
    """[ngeom, 3, 3] from geom to body"""
    hulls: dict[int, Array]
    """vertices [k, 3] of the convex hull of each mesh geom"""
    triangles: dict[int, Index]
    """[f, 3] into the vertices of the hull, of each mesh geom; empty where the model holds none"""
    pairs: dict[tuple[int, int], int]
    """explicit pairs, both orders"""


@lru_cache(maxsize=64)
def geom_table(model: mujoco.MjModel) -> GeomTable:
    """The tables of a compiled model, read once."""
    rotation = np.zeros((model.ngeom, 9))
    for matrix, quaternion in zip(rotation, model.geom_quat, strict=True):
        mujoco.mju_quat2Mat(matrix, quaternion)
    pairs: dict[tuple[int, int], int] = {}
    for k, (one, other) in enumerate(zip(model.pair_geom1.tolist(), model.pair_geom2.tolist(), strict=True)):
        pairs[one, other] = pairs[other, one] = k
    kind = model.geom_type.astype(np.int64)
    hulls = {g: _hull(model, g) for g in np.flatnonzero(kind == MESH).tolist()}
    return GeomTable(
        kind=kind,
        size=model.geom_size.copy(),
        body=model.geom_bodyid.astype(np.int64),
        position=model.geom_pos.copy(),
        rotation=rotation.reshape(-1, 3, 3),
        hulls={g: hull[0] for g, hull in hulls.items()},
        triangles={g: hull[1] for g, hull in hulls.items()},
        pairs=pairs,
    )


def _hull(model: mujoco.MjModel, geom: int) -> tuple[Array, Index]:
    """Vertices and triangles of the convex hull of a mesh."""
    mesh = int(model.geom_dataid[geom])
    first, count = int(model.mesh_vertadr[mesh]), int(model.mesh_vertnum[mesh])
    vertices = model.mesh_vert[first : first + count].astype(float)
    start = int(model.mesh_graphadr[mesh])
    if start < 0:
        return vertices, np.zeros((0, 3), dtype=np.int64)
    # numbers of vertices v and faces f, edge addresses [v], the hull's vertices [v], edges [v + 3 f], faces [3 f]
    v, f = (int(x) for x in model.mesh_graph[start : start + 2])
    used = model.mesh_graph[start + 2 + v : start + 2 + 2 * v].astype(np.int64)
    last = start + 2 + 3 * v + 3 * f
    place = np.zeros(count, dtype=np.int64)
    place[used] = np.arange(v)
    return vertices[used], place[model.mesh_graph[last : last + 3 * f].reshape(-1, 3)]


@dataclass(frozen=True, eq=False)
class Sides:
    """n geoms that touch, in their own frames."""

    geom: Index
    normal: Array
    """[n, 3] outward"""
    witness: Array
    """[n, 3] the point of the geom that touches"""
    on_plane: NDArray[np.bool_]
    """[n] whether the other geom is a plane"""

    def __getitem__(self, rows: NDArray[np.bool_]) -> Sides:
        return Sides(self.geom[rows], self.normal[rows], self.witness[rows], self.on_plane[rows])


@dataclass(frozen=True, eq=False)
class Features:
    """Cores of n sides in the frames of their geoms; the members of `mujoco_cores.CorePair` for one side."""

    kind: Index
    point: Array
    axis: Array
    radius: Array
    shape: Array
    """[n, 3, 3]"""


def features(table: GeomTable, sides: Sides, tolerance: float) -> Features:
    """The cores [n] that the sides seem to touch with; NO_CORE where there is none."""
    n = len(sides.geom)
    out = Features(np.full(n, NO_CORE), np.zeros((n, 3)), np.zeros((n, 3)), np.zeros(n), np.zeros((n, 3, 3)))
    kinds = table.kind[sides.geom]
    for kind in np.unique(kinds).tolist():
        rule = _RULES.get(kind)
        if rule is not None:
            rows = kinds == kind
            found = rule(table, sides[rows], tolerance)
            for whole, part in zip(_members(out), _members(found), strict=True):
                whole[rows] = part
    return out


def _members(f: Features) -> tuple[NDArray, ...]:
    return f.kind, f.point, f.axis, f.radius, f.shape


def _found(kind: Index, point: Array, *, axis: Array | None = None, radius: Array | None = None) -> Features:
    n = len(kind)
    return Features(
        kind.astype(np.int64),
        point,
        np.zeros((n, 3)) if axis is None else axis,
        np.zeros(n) if radius is None else radius,
        np.zeros((n, 3, 3)),
    )


def _along_z(z: Array) -> Array:
    return np.stack([np.zeros_like(z), np.zeros_like(z), z], -1)


def _plane(table: GeomTable, s: Sides, tolerance: float) -> Features:
    n = len(s.geom)
    return _found(np.full(n, FACE), np.zeros((n, 3)), axis=_along_z(np.ones(n)))


def _sphere(table: GeomTable, s: Sides, tolerance: float) -> Features:
    n = len(s.geom)
    return _found(np.full(n, POINT), np.zeros((n, 3)), radius=table.size[s.geom, 0])


def _capsule(table: GeomTable, s: Sides, tolerance: float) -> Features:
    radius, half = table.size[s.geom, 0], table.size[s.geom, 1]
    height = s.witness[:, 2] - radius * s.normal[:, 2]
    end = s.on_plane | (np.abs(height) > half * (1 - tolerance))
    side = np.abs(s.normal[:, 2]) < 10 * tolerance
    kind = np.where(end, POINT, np.where(side, LINE, NO_CORE))
    point = _along_z(np.where(end, np.sign(height) * half, 0.0))
    return _found(kind, point, axis=_along_z(np.ones(len(half))), radius=radius)


def _ellipsoid(table: GeomTable, s: Sides, tolerance: float) -> Features:
    n = len(s.geom)
    out = _found(np.full(n, ELLIPSOID_FOOT), np.zeros((n, 3)))
    out.shape[:, [0, 1, 2], [0, 1, 2]] = table.size[s.geom] ** 2
    return out


def _cylinder(table: GeomTable, s: Sides, tolerance: float) -> Features:
    radius, half = table.size[s.geom, 0], table.size[s.geom, 1]
    scale = radius + half
    outside, height = np.hypot(s.witness[:, 0], s.witness[:, 1]), s.witness[:, 2]
    on_cap = np.abs(np.abs(height) - half) < _TOUCHES * scale
    side = np.abs(s.normal[:, 2]) < tolerance
    cap = on_cap & (np.hypot(s.normal[:, 0], s.normal[:, 1]) < tolerance)
    rim = on_cap & (np.abs(outside - radius) < _TOUCHES * scale)
    kind = np.where(side, LINE, np.where(cap, FACE, np.where(rim, RIM, NO_CORE)))
    up = np.where(cap, np.sign(height), 1.0)
    point = _along_z(np.where(side, 0.0, np.sign(height) * half))
    out = _found(kind, point, axis=_along_z(up), radius=np.where(side, radius, 0.0))
    out.shape[:, 0, 0] = radius
    if s.on_plane.any():
        foot = _cylinder_foot(table, s[s.on_plane])
        for whole, part in zip(_members(out), _members(foot), strict=True):
            whole[s.on_plane] = part
    return out


def _cylinder_foot(table: GeomTable, s: Sides) -> Features:
    """Which of MuJoCo's four points of a cylinder on a plane: lowest, at the other end, two at 120 degrees from it.

    Outward normals point into the plane. `axis` points into it too; the lowest direction is the normal across it.
    """
    radius, half = table.size[s.geom, 0], table.size[s.geom, 1]
    across = np.hypot(s.normal[:, 0], s.normal[:, 1])
    lowest = np.stack([s.normal[:, 0], s.normal[:, 1], 0 * across], -1) / np.maximum(across, STANDING)[:, None]
    axis = _along_z(np.where(s.normal[:, 2] < 0, -1.0, 1.0))
    aside = np.cross(lowest, axis)
    root = np.sqrt(3) / 2
    parts = np.array([[1.0, 1.0, 0.0], [-1.0, 1.0, 0.0], [1.0, -0.5, root], [1.0, -0.5, -root]])
    weights = parts[None] * np.stack([half, radius, radius], -1)[:, None]
    candidates = weights @ np.stack([axis, lowest, aside], 1)
    which = np.linalg.norm(candidates - s.witness[:, None], axis=-1).argmin(1)
    stands = across < STANDING
    point = np.where(stands[:, None], s.witness, 0.0)
    out = _found(np.where(stands, POINT, CYLINDER_FOOT), point, axis=axis)
    out.shape[:, 0] = weights[np.arange(len(which)), which]
    return out


def _box(table: GeomTable, s: Sides, tolerance: float) -> Features:
    size = table.size[s.geom]
    length = size.max(1, keepdims=True)
    free = np.abs(s.normal) * size <= tolerance * length
    number = np.where(s.on_plane, 0, free.sum(1))
    corner = (np.abs(np.abs(s.witness) - size) < 2 * _TOUCHES * length).all(1)
    kind = np.select([number == 2, number == 1, corner], [FACE, LINE, POINT], NO_CORE)
    at_face = np.sign(s.normal) * size
    point = np.where((kind == POINT)[:, None], np.sign(s.witness) * size, np.where(free, s.witness, at_face))
    axis = np.where((kind == FACE)[:, None], np.where(free, 0.0, np.sign(s.normal)), free.astype(float))
    return _found(kind, point, axis=axis)


def _mesh(table: GeomTable, s: Sides, tolerance: float) -> Features:
    n = len(s.geom)
    out = _found(np.full(n, NO_CORE), np.zeros((n, 3)))
    for geom in np.unique(s.geom).tolist():
        rows = s.geom == geom
        found = _polytope(table.hulls[geom], s[rows], tolerance)
        for whole, part in zip(_members(out), _members(found), strict=True):
            whole[rows] = part
    return out


def _polytope(vertices: Array, s: Sides, tolerance: float) -> Features:
    """The face, edge or vertex of a hull[k, 3] that is extreme along the normals, with its own exact direction."""
    extent = float(np.ptp(vertices, axis=0).max())
    nearest = np.linalg.norm(vertices - s.witness[:, None], axis=-1)
    at_vertex = nearest.min(1) < _TOUCHES * extent
    height = s.normal @ vertices.T
    top = height > height.max(1, keepdims=True) - tolerance * extent
    first = vertices[height.argmax(1)]
    offset = np.where(top[..., None], vertices - first[:, None], 0.0)
    length = np.linalg.norm(offset, axis=-1)
    edge = _normalized(np.take_along_axis(offset, length.argmax(1)[:, None, None], 1).squeeze(1))
    away = offset - edge[:, None] * (offset @ edge[..., None])
    width = np.linalg.norm(away, axis=-1)
    across = _normalized(np.take_along_axis(away, width.argmax(1)[:, None, None], 1).squeeze(1))
    face_normal = np.cross(edge, across)
    face_normal *= np.sign((face_normal * s.normal).sum(1, keepdims=True))
    flat = (width.max(1) > 1e-6 * extent) & ~s.on_plane
    single = s.on_plane | (top.sum(1) == 1)
    kind = np.where(flat, FACE, np.where(~single, LINE, np.where(at_vertex, POINT, NO_CORE)))
    point = np.where((kind == POINT)[:, None], vertices[nearest.argmin(1)], first)
    return _found(kind, point, axis=np.where((kind == FACE)[:, None], face_normal, edge))


def _normalized(x: Array) -> Array:
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    return np.divide(x, length, out=np.zeros_like(x), where=length > 0)


_RULES: dict[int, Callable[[GeomTable, Sides, float], Features]] = {
    PLANE: _plane,
    SPHERE: _sphere,
    CAPSULE: _capsule,
    ELLIPSOID: _ellipsoid,
    CYLINDER: _cylinder,
    BOX: _box,
    MESH: _mesh,
}
