"""Contacts whose function equals MuJoCo's at one position only are refused: the collider jumps or bends there."""

from __future__ import annotations

import numpy as np
import pytest
import torch

mujoco = pytest.importorskip("mujoco")

from sim2real.simulators.mujoco_contacts import contact_frames, freeze_contacts, join_contacts  # noqa: E402
from sim2real.simulators.mujoco_coverage import MujocoUnsupportedError  # noqa: E402
from sim2real.simulators.mujoco_kinematics import poses  # noqa: E402
from sim2real.simulators.mujoco_structure import Structure, structure  # noqa: E402

STONE = '<mesh name="stone" scale=".15 .15 .15" vertex="1 0 0 0 1.1 .1 0 0 .9 -1 .1 0 .1 -1.2 0 0 .1 -1.1"/>'
CORNERS = np.array([(x, y, z) for x in (-0.1, 0.1) for y in (-0.1, 0.1) for z in (-0.2, 0.2)])
BLOCK = f'<mesh name="block" vertex="{" ".join(map(str, CORNERS.ravel()))}"/>'
SHAPES = {
    "sphere": 'type="sphere" size=".05"',
    "capsule": 'type="capsule" size=".07 .15"',
    "lying": 'type="capsule" size=".07 .15" euler="90 0 0"',
    "cylinder": 'type="cylinder" size=".1 .15"',
    "ring": 'type="cylinder" size=".1 .02"',
    "box": 'type="box" size=".1 .1 .1"',
    "crate": 'type="box" size=".1 .13 .16"',
    "block": 'type="mesh" mesh="block"',
    "stone": 'type="mesh" mesh="stone"',
}


def pair(first: str, second: str) -> Structure:
    body = '<body><freejoint/><geom name="{}" {}/></body>'
    bodies = body.format("a", SHAPES[first]) + body.format("b", SHAPES[second])
    xml = f"<mujoco><asset>{STONE}{BLOCK}</asset><worldbody>{bodies}</worldbody></mujoco>"
    return structure(mujoco.MjModel.from_xml_string(xml))


def at(s: Structure, place: tuple[float, ...], turn: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0)) -> mujoco.MjData:
    data = mujoco.MjData(s.model)
    data.qpos[7:10], data.qpos[10:] = place, np.array(turn) / np.linalg.norm(turn)
    mujoco.mj_fwdPosition(s.model, data)
    return data


def summed(s: Structure, q: np.ndarray) -> float:
    data = mujoco.MjData(s.model)
    data.qpos[:] = q
    mujoco.mj_fwdPosition(s.model, data)
    return float(data.contact.dist.sum())


DEGENERATE = [
    ("sphere", "box", (0.0, 0.0, 0.0)),  # the centre is as far from all six faces
    ("capsule", "crate", (0.0, 0.0, 0.1)),
    ("box", "box", (0.03, 0.0, 0.0)),
    ("ring", "block", (0.0, 0.0, 0.18)),  # flush with the block's cap and inside its sides
    ("ring", "block", (0.0, 0.0, 0.0)),
    ("cylinder", "cylinder", (0.05, 0.02, 0.0)),  # parallel: no single nearest point
    ("capsule", "cylinder", (0.05, 0.02, 0.0)),
    ("capsule", "lying", (0.0, 0.0, 0.03)),  # the axes cross
]


@pytest.mark.parametrize(("first", "second", "place"), DEGENERATE)
def test_contacts_that_jump_next_to_the_position_are_refused(
    first: str, second: str, place: tuple[float, float, float]
) -> None:
    s = pair(first, second)
    data = at(s, place)
    assert data.ncon
    with pytest.raises(MujocoUnsupportedError, match="have no derivative"):
        join_contacts(s, [freeze_contacts(s, 0, data)])


@pytest.mark.parametrize(("first", "second"), [("sphere", "box"), ("capsule", "box"), ("box", "stone"), ("box", "box")])
def test_deep_contacts_away_from_ties_keep_their_derivatives(first: str, second: str) -> None:
    """Distances change as MuJoCo's do, at a deep and generic position in the second of two environments."""
    s = pair(first, second)
    data = at(s, (0.05, 0.013, -0.021), (1.0, 0.11, -0.07, 0.05))
    q, direction = data.qpos.copy(), np.random.default_rng(1).normal(size=s.model.nv)
    contacts = join_contacts(s, [freeze_contacts(s, env, data) for env in (0, 1)])
    assert data.contact.dist.min() < -0.05

    def distance(t: torch.Tensor) -> torch.Tensor:
        base = torch.from_numpy(q).repeat(2, 1)
        move = (t * torch.from_numpy(direction)).repeat(2, 1)
        return contact_frames(s, contacts, poses(s, base, move))[0][data.ncon :].sum()

    zero = torch.zeros((), dtype=torch.float64)
    slope = float(torch.func.jvp(distance, (zero,), (torch.ones_like(zero),))[1])
    ends = []
    for h in (1e-5, -1e-5):
        other = q.copy()
        mujoco.mj_integratePos(s.model, other, direction, h)
        ends.append(summed(s, other))
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=1e-6)
