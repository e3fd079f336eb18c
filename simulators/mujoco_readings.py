"""What MuJoCo reports of the contacts of one or several environments, as plain arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import mujoco
import numpy as np

from sim2real.simulators.mujoco_features import PLANE, Array, GeomTable, Index, Sides


@dataclass(frozen=True, eq=False)
class Reading:
    """n contacts that exert forces."""

    env: Index
    geom: Index
    """[n, 2]"""
    dist: Array
    point: Array
    frame: Array
    """[n, 3, 3] rows normal (from the first to the second geom) and tangents"""
    margin: Array
    dim: Index
    position: Array
    """[n, 2, 3] of the two geoms"""
    rotation: Array
    """[n, 2, 3, 3] from the geoms to the world"""
    scene: dict[int, tuple[Array, Array, Array]]
    """qpos, mocap_pos, mocap_quat of every environment: rule C restores the scene from them"""


def joined(readings: Sequence[Reading]) -> Reading:
    """All contacts of all environments, in their order."""
    names = [f.name for f in fields(Reading) if f.name != "scene"]
    arrays = {name: np.concatenate([getattr(r, name) for r in readings]) for name in names}
    scene = {env: pose for r in readings for env, pose in r.scene.items()}
    return Reading(**arrays, scene=scene)


def sides(table: GeomTable, reading: Reading) -> Sides:
    """Both sides of every contact [2 n], first and second geoms alternating, in the frames of the geoms."""
    normal = reading.frame[:, None, 0] * np.array([1.0, -1.0])[:, None]
    witness = reading.point[:, None] - normal * reading.dist[:, None, None] / 2 - reading.position
    return Sides(
        geom=reading.geom.ravel(),
        normal=local(reading.rotation, normal).reshape(-1, 3),
        witness=local(reading.rotation, witness).reshape(-1, 3),
        on_plane=(table.kind[reading.geom[:, ::-1]] == PLANE).ravel(),
    )


def local(rotation: Array, vector: Array) -> Array:
    """R' x for a stack of rotations and vectors."""
    return (vector[..., None, :] @ rotation).squeeze(-2)


def geom_names(model: mujoco.MjModel, geoms: Sequence[int]) -> str:
    """For messages: 'floor' (plane) and geom 3 of 'torso' (box)."""
    described = []
    for g in geoms:
        name, owner = model.geom(int(g)).name, model.body(int(model.geom_bodyid[g])).name
        kind = mujoco.mjtGeom(int(model.geom_type[g])).name[7:].lower()
        described.append(f"'{name}' ({kind})" if name else f"geom {g} of '{owner}' ({kind})")
    return " and ".join(described)
