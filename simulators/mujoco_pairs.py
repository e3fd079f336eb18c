"""Which geoms of a model can touch at all, and which of these pairs may have no derivative.

MuJoCo's rules: geoms of one welded body never touch; nor do parent and child (unless the parent is fixed to the world),
excluded bodies, and geoms whose contype and conaffinity do not meet; an explicit <pair> always may.
Reference: MuJoCo documentation, Computation, Collision detection, Selection.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import mujoco
import numpy as np

from sim2real.simulators.mujoco_coverage import MujocoUnsupportedError
from sim2real.simulators.mujoco_features import BOX, CYLINDER, HFIELD, MESH
from sim2real.simulators.mujoco_readings import geom_names

_DISABLE = mujoco.mjtDisableBit


def check_contact_pairs(model: mujoco.MjModel) -> None:
    """Raise `MujocoUnsupportedError` if a cylinder can meet a box, cylinder, mesh or height field with its caps.

    Such manifolds of several points come from an iterative collider; `join_contacts` refuses the states in which its
    noise leaves no derivative, so a model that keeps to single points may skip this check.
    """
    flat = (BOX, CYLINDER, MESH, HFIELD)
    kind = model.geom_type
    found = [
        geom_names(model, pair)
        for pair in touching_pairs(model)
        if CYLINDER in kind[list(pair)] and all(k in flat for k in kind[list(pair)])
    ]
    if found:
        raise MujocoUnsupportedError(
            "the contact points of a cylinder's cap on a flat or curved face have no derivative in general:\n  "
            + "\n  ".join(found[:20])
            + "\nreplace the cylinders by capsules, boxes or meshes, keep the pairs apart by <exclude>, contype and "
            "conaffinity, or pass check_pairs=False: then only states in which the derivative is missing raise"
        )


def touching_pairs(model: mujoco.MjModel) -> Iterator[tuple[int, int]]:
    """All pairs of geoms that MuJoCo may put in contact."""
    if model.opt.disableflags & (int(_DISABLE.mjDSBL_CONTACT) | int(_DISABLE.mjDSBL_CONSTRAINT)):
        return
    explicit = {(int(a), int(b)) for a, b in zip(model.pair_geom1, model.pair_geom2, strict=True)}
    yield from sorted(explicit)
    contype, affinity = model.geom_contype, model.geom_conaffinity
    meets = (contype[:, None] & affinity[None]) | (contype[None] & affinity[:, None])
    body = model.geom_bodyid
    allowed = _bodies_meet(model)[body[:, None], body[None]]
    for a, b in np.argwhere(np.triu((meets != 0) & allowed, 1)).tolist():
        if (a, b) not in explicit and (b, a) not in explicit:
            yield a, b


def _bodies_meet(model: mujoco.MjModel) -> np.ndarray:
    """[nbody, nbody] whether the filters let two bodies touch."""
    weld = model.body_weldid
    over = weld[model.body_parentid[weld]]
    allowed = weld[:, None] != weld[None]
    if not model.opt.disableflags & int(_DISABLE.mjDSBL_FILTERPARENT):
        child = (weld[:, None] == over[None]) & (weld[:, None] != 0)
        allowed = allowed & ~child & ~child.T
    for signature in model.exclude_signature.tolist():
        a, b = signature >> 16, signature & 0xFFFF
        allowed[a, b] = allowed[b, a] = False
    return allowed


@lru_cache(maxsize=4096)
def only_slides(model: mujoco.MjModel, first: int, second: int) -> bool:
    """Whether every joint between two bodies is a slide, so that their relative orientation is fixed."""
    chains = [_joints(model, first), _joints(model, second)]
    between = chains[0] ^ chains[1]
    return all(model.jnt_type[j] == int(mujoco.mjtJoint.mjJNT_SLIDE) for j in between)


def _joints(model: mujoco.MjModel, body: int) -> set[int]:
    """Joints that move a body."""
    found: set[int] = set()
    while body:
        first = int(model.body_jntadr[body])
        found |= set(range(first, first + int(model.body_jntnum[body])))
        body = int(model.body_parentid[body])
    return found
