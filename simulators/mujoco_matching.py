"""The contacts that two rounded cores reproduce: guessed by `mujoco_features`, confirmed by `mujoco_cores`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sim2real.simulators.mujoco_clipping import clipped
from sim2real.simulators.mujoco_cores import (
    CORE_PAIRS,
    CUT_EDGE,
    CYLINDER_FOOT,
    ELLIPSOID_FOOT,
    FACE,
    RIM,
    UNDER_CORNER,
    CorePair,
    core_frames,
)
from sim2real.simulators.mujoco_features import Features, GeomTable, Index, features
from sim2real.simulators.mujoco_readings import Reading, sides

_TOLERANCES = (1e-7, 1e-5)
"""of `features`: exact colliders first, then those whose normals carry noise"""
_SAME = (1e-5, 1e-7, 1e-6)
"""a closed form is accepted if normal, distance (m) and point (m) equal MuJoCo's within these"""
_SAME_FOOT = (1e-4, 1e-6, 1e-4)
"""the same of a rim or an ellipsoid on a face, which MuJoCo finds by iteration; other features are 1e-2 away"""


@dataclass(frozen=True, eq=False)
class CoreContacts:
    """n contacts of one pair of core kinds, and where their carriers are."""

    env: Tensor
    body: Tensor
    """[n, 2] of core 1 and core 2"""
    pair: CorePair


def match_cores(table: GeomTable, reading: Reading) -> tuple[list[CoreContacts], list[Index]]:
    """Contacts grouped by pair of kinds, and the rows of each group; rows in no group have no closed form."""
    parts: list[CoreContacts] = []
    rows: list[Index] = []
    left = np.ones(len(reading.env), dtype=bool)
    both = sides(table, reading)
    for tolerance in _TOLERANCES:
        at = np.flatnonzero(left)
        if not len(at):
            break
        some = both[np.repeat(left, 2)]
        seen = clipped(table, some, _on_faces(features(table, some, tolerance)))
        kind = seen.kind.reshape(-1, 2)
        swapped = kind[:, 0] > kind[:, 1]
        ordered = np.where(swapped[:, None], kind[:, ::-1], kind)
        for kinds in CORE_PAIRS:
            chosen = np.flatnonzero((ordered == kinds).all(1))
            if len(chosen):
                side = np.where(swapped[chosen, None], [1, 0], [0, 1])
                pair, good = _confirmed(reading, seen, at[chosen], chosen, side, kinds)
                taken = at[chosen][good]
                if len(taken):
                    parts.append(_carried(table, reading, pair, taken, side[good], torch.from_numpy(good)))
                    rows.append(taken)
                    left[taken] = False
    return parts, rows


def _on_faces(seen: Features) -> Features:
    """A rim that touches a face does so with its lowest point, as on a plane."""
    kind = seen.kind.reshape(-1, 2)
    lies = ((kind == RIM) & (kind[:, ::-1] == FACE)).ravel()
    shape = seen.shape.copy()
    shape[lies, 0] = shape[lies, 0, :1] * np.array([0.0, 1.0, 0.0])
    return replace(seen, kind=np.where(lies, CYLINDER_FOOT, seen.kind), shape=shape)


def _confirmed(
    reading: Reading, seen: Features, at: Index, chosen: Index, side: Index, kinds: tuple[int, int]
) -> tuple[CorePair, NDArray[np.bool_]]:
    """Cores in the frames of the geoms, and where [k] they give MuJoCo's normal, distance and point."""
    picked = 2 * chosen[:, None] + side
    pair = CorePair(
        kinds=kinds,
        point=_real(seen.point[picked]),
        axis=_real(seen.axis[picked]),
        radius=_real(seen.radius[picked]),
        shape=_real(seen.shape[picked[:, 0]] + seen.shape[picked[:, 1]]),
        sign=torch.ones(len(at), dtype=torch.float64),
        flip=_real(1.0 - 2.0 * side[:, 0]),
    )
    carriers = _real(reading.position[at[:, None], side]), _real(reading.rotation[at[:, None], side])
    if kinds[0] != FACE:
        *_, normal = core_frames(pair, *carriers)
        pair = replace(pair, sign=(normal * _real(reading.frame[at, 0])).sum(-1).sign())
    dist, point, normal = core_frames(pair, *carriers)
    same = _SAME_FOOT if kinds[1] in (CYLINDER_FOOT, ELLIPSOID_FOOT) else _SAME
    good = (
        ((normal - _real(reading.frame[at, 0])).abs().amax(1) < same[0])
        & ((dist - _real(reading.dist[at])).abs() < same[1])
        & ((point - _real(reading.point[at])).abs().amax(1) < same[2])
    )
    return pair, good.numpy()


def _carried(
    table: GeomTable, reading: Reading, pair: CorePair, rows: Index, side: Index, good: Tensor
) -> CoreContacts:
    """The confirmed contacts with their cores in the frames of the bodies."""
    geom = reading.geom[rows[:, None], side]
    place, turn, shape = _real(table.position[geom]), _real(table.rotation[geom]), pair.shape[good]
    if pair.kinds[1] == ELLIPSOID_FOOT:
        shape = turn[:, 1] @ shape @ turn[:, 1].mT
    elif pair.kinds[1] in (CUT_EDGE, UNDER_CORNER):
        shape = shape @ turn[:, 0].mT
        shape = torch.stack([shape[:, 0], place[:, 0] + shape[:, 1], shape[:, 2]], 1)
    return CoreContacts(
        env=torch.from_numpy(reading.env[rows]),
        body=torch.from_numpy(table.body[geom]),
        pair=CorePair(
            kinds=pair.kinds,
            point=place + (turn @ pair.point[good][..., None]).squeeze(-1),
            axis=(turn @ pair.axis[good][..., None]).squeeze(-1),
            radius=pair.radius[good],
            shape=shape,
            sign=pair.sign[good],
            flip=pair.flip[good],
        ),
    )


def _real(x: NDArray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float64))
