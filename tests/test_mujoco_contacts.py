"""Contacts as functions of poses, against MuJoCo's own collision and against exact solutions of the contact problem."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

mujoco = pytest.importorskip("mujoco")
optimize = pytest.importorskip("scipy.optimize")

from sim2real.outside_program import DerivativeOrderError  # noqa: E402
from sim2real.simulators.mujoco_contacts import (  # noqa: E402
    Contacts,
    contact_frames,
    freeze_contacts,
    join_contacts,
)
from sim2real.simulators.mujoco_cores import (  # noqa: E402
    CUT_EDGE,
    CYLINDER_FOOT,
    ELLIPSOID_FOOT,
    FACE,
    LINE,
    POINT,
    RIM,
    UNDER_CORNER,
)
from sim2real.simulators.mujoco_coverage import MujocoUnsupportedError  # noqa: E402
from sim2real.simulators.mujoco_features import geom_table  # noqa: E402
from sim2real.simulators.mujoco_kinematics import Poses, poses  # noqa: E402
from sim2real.simulators.mujoco_model import mujoco_model  # noqa: E402
from sim2real.simulators.mujoco_pairs import check_contact_pairs, only_slides, touching_pairs  # noqa: E402
from sim2real.simulators.mujoco_relative import _groups  # noqa: E402
from sim2real.simulators.mujoco_structure import Structure, structure  # noqa: E402

Array = NDArray[np.float64]

MESH = (
    '<mesh name="stone" scale=".15 .15 .15" '
    'vertex="1 0 0 0 1.1 .1 0 0 .9 -1 .1 0 .1 -1.2 0 0 .1 -1.1 .6 .7 .5 -.6 -.6 .4"/>'
)
SHAPES = {
    "plane": 'type="plane" size="5 5 .1"',
    "hfield": 'type="hfield" hfield="hills"',
    "sphere": 'type="sphere" size=".11"',
    "capsule": 'type="capsule" size=".07 .15"',
    "ellipsoid": 'type="ellipsoid" size=".1 .14 .18"',
    "cylinder": 'type="cylinder" size=".1 .15"',
    "box": 'type="box" size=".1 .13 .16"',
    "mesh": 'type="mesh" mesh="stone"',
}
HILLS = '<hfield name="hills" nrow="3" ncol="3" size="1 1 .1 .1" elevation="0 1 .3 .8 .1 .9 .2 .7 .4"/>'


def scene(first: str, second: str) -> Structure:
    """Two geoms, offset and turned in their free bodies (plane and height field fixed), with a margin of 2 cm."""
    fixed = first in ("plane", "hfield")
    a = f'<geom name="a" {SHAPES[first]} margin=".02" {"" if fixed else PLACE}/>'
    a = a if fixed else f'<body name="A"><freejoint/>{a}</body>'
    b = f'<body name="B"><freejoint/><geom name="b" {SHAPES[second]} pos="0 .01 .02" euler="-5 25 10"/></body>'
    asset = MESH + (HILLS if first == "hfield" else "")
    return model_of(f"<mujoco><asset>{asset}</asset><worldbody>{a}{b}</worldbody></mujoco>")


PLACE = 'pos=".01 0 .02" euler="10 20 30"'


def model_of(xml: str) -> Structure:
    return structure(mujoco.MjModel.from_xml_string(xml))


def placed(s: Structure, q: Array, data: mujoco.MjData | None = None) -> mujoco.MjData:
    data = mujoco.MjData(s.model) if data is None else data
    data.qpos[:] = q
    mujoco.mj_fwdPosition(s.model, data)
    return data


def moved(s: Structure, q: Array, direction: Array, amount: float) -> Array:
    out = q.copy()
    mujoco.mj_integratePos(s.model, out, direction, amount)
    return out


def reported(data: mujoco.MjData) -> Array:
    """Distance, point, frame [n, 13] as MuJoCo reports them."""
    c = data.contact
    return np.concatenate([c.dist[:, None], c.pos, c.frame], 1).copy()


def random_position(s: Structure, rng: np.random.Generator, spread: float, height: tuple[float, float]) -> Array:
    q = s.model.qpos0.copy()
    for address in range(0, s.model.nq, 7):
        q[address : address + 3] = rng.normal(0, spread, 3)
        turn = rng.normal(size=4)
        q[address + 3 : address + 7] = turn / np.linalg.norm(turn)
    if s.model.nq == 7:
        q[2] = rng.uniform(*height)
    return q


def frozen(s: Structure, data: mujoco.MjData) -> Contacts:
    return join_contacts(s, [freeze_contacts(s, 0, data)])


def along(s: Structure, contacts: Contacts, q: Array, direction: Array) -> Callable[[torch.Tensor], torch.Tensor]:
    """t -> distance, point, frame [n, 13] at q displaced by t times the direction."""
    base, d = torch.from_numpy(q)[None], torch.from_numpy(direction)[None]

    def features(t: torch.Tensor) -> torch.Tensor:
        dist, point, frame = contact_frames(s, contacts, poses(s, base, t * d))
        return torch.cat([dist[:, None], point, frame.flatten(1)], 1)

    return features


def slopes(features: Callable[[torch.Tensor], torch.Tensor]) -> tuple[Array, Array]:
    """Value and first derivative."""
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    value, slope = torch.func.jvp(features, (zero,), (one,))
    return value.numpy(), slope.numpy()


def bends(features: Callable[[torch.Tensor], torch.Tensor]) -> Array:
    """Second derivative."""
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    first = lambda t: torch.func.jvp(features, (t,), (one,))[1]
    return torch.func.jvp(first, (zero,), (one,))[1].numpy()


def matched(rest: Array, rows: Array) -> Array:
    """Points of a face may be listed in another order after a displacement."""
    return rows[np.linalg.norm(rest[:, None, 1:4] - rows[None, :, 1:4], axis=-1).argmin(1)]


def differences(s: Structure, q: Array, direction: Array, step: float) -> tuple[Array, Array] | None:
    """First and second derivatives by Richardson differences, or None where the list changes or is not smooth."""
    data = mujoco.MjData(s.model)
    rest = reported(placed(s, q, data))
    rows = []
    for amount in (-2, -1, 1, 2):
        row = reported(placed(s, moved(s, q, direction, amount * step), data))
        if len(row) != len(rest):
            return None
        rows.append(matched(rest, row))
    far, near = (rows[3] - rows[0]) / (4 * step), (rows[2] - rows[1]) / (2 * step)
    far2, near2 = (rows[3] + rows[0] - 2 * rest) / (4 * step**2), (rows[2] + rows[1] - 2 * rest) / step**2
    # a switch of features inside the stencil shows as differences that do not converge
    if np.abs(far2 - near2).max() > 1e-2 * max(1.0, np.abs(near2).max()):
        return None
    return (4 * near - far) / 3, (4 * near2 - far2) / 3


# Richardson differences with step 3e-4: truncation 1e-12 f''''', rounding 1e-16/3e-4 in the first and 1e-16/1e-7 in the
# second derivative; contacts of small features bend on 0.05 m, so f'''' reaches 1e6. Meshes: MuJoCo's collider
# iterates, its points carry 1e-11 .. 1e-9.
EXACT = [
    ("plane", "sphere", 1e-8, 1e-5),
    ("plane", "capsule", 1e-6, 1e-3),
    ("plane", "box", 1e-8, 1e-5),
    ("plane", "mesh", 1e-8, 1e-5),
    ("plane", "ellipsoid", 1e-7, 1e-4),
    ("plane", "cylinder", 1e-6, 1e-3),
    ("sphere", "sphere", 1e-7, 1e-4),
    ("sphere", "capsule", 1e-7, 1e-4),
    ("sphere", "box", 1e-7, 1e-4),
    ("sphere", "cylinder", 1e-7, 1e-4),
    ("sphere", "mesh", 1e-6, 1e-2),
    ("capsule", "capsule", 1e-6, 1e-3),
    ("capsule", "box", 1e-6, 1e-3),
    ("box", "box", 1e-6, 1e-3),
    ("capsule", "mesh", 1e-6, 1e-2),
    ("box", "mesh", 1e-5, 1e-1),
    ("mesh", "mesh", 1e-5, 1e-1),
    ("hfield", "sphere", 1e-5, 1e-1),
    ("hfield", "box", 1e-5, 1e-1),
]


@pytest.mark.parametrize(("first", "second", "bar1", "bar2"), EXACT, ids=lambda x: x if isinstance(x, str) else "")
def test_derivatives_equal_differences_of_the_collision(first: str, second: str, bar1: float, bar2: float) -> None:
    s, rng = scene(first, second), np.random.default_rng(0)
    checked = 0
    for _ in range(400):
        q = random_position(s, rng, 0.12, (0.02, 0.25))
        data = placed(s, q)
        if not data.ncon or data.contact.dist.min() < -0.02 or (data.contact.efc_address < 0).any():
            continue
        direction = rng.normal(size=s.model.nv)
        reference = differences(s, q, direction, 3e-4)
        if reference is None:
            continue
        try:
            contacts = frozen(s, data)
        except MujocoUnsupportedError:
            # MuJoCo's iterative collider picks other points at random in about 1 of 300 states
            assert first == "hfield" or second == "mesh"
            continue
        features = along(s, contacts, q, direction)
        value, slope = slopes(features)
        assert np.abs(value - reported(placed(s, q))).max() < 1e-6
        assert np.abs(slope - reference[0]).max() < bar1 * max(1.0, np.abs(reference[0]).max()), (contacts.rule, q)
        if checked < 1 and contacts.order == 2:
            assert np.abs(bends(features) - reference[1]).max() < bar2 * max(1.0, np.abs(reference[1]).max()), q
        checked += 1
        if checked == 4:
            return
    pytest.fail(f"only {checked} smooth contacts found")


# --- smooth convex pairs: MuJoCo's collider carries noise of 1e-8 .. 2e-5, so the reference solves the contact problem


def support(kind: str, n: Array) -> Array:
    """Point of a centred geom that is extreme along n."""
    if kind == "sphere":
        return 0.11 * n
    if kind == "capsule":
        return 0.07 * n + np.array([0, 0, 0.15 * np.sign(n[2])])
    if kind == "ellipsoid":
        size = np.array([0.1, 0.14, 0.18])
        return size**2 * n / np.linalg.norm(size * n)
    if kind == "box":
        return np.sign(n) * np.array([0.1, 0.13, 0.16])
    flat = np.array([n[0], n[1], 0.0])
    return 0.1 * flat / np.linalg.norm(flat) + np.array([0, 0, 0.15 * np.sign(n[2])])


def solved(s: Structure, kinds: tuple[str, str], q: Array, start: Array) -> Array:
    """Distance, point, normal [7] at the normal where the gap n.(c2 - c1) - h1(n) - h2(-n) is stationary."""
    data = placed(s, q)
    center, turn = data.geom_xpos, data.geom_xmat.reshape(-1, 3, 3)

    def witnesses(n: Array) -> tuple[Array, Array]:
        x1 = center[0] + turn[0] @ support(kinds[0], turn[0].T @ n)
        return x1, center[1] + turn[1] @ support(kinds[1], -turn[1].T @ n)

    across = np.linalg.svd(start[None])[2][1:]

    def unit(y: Array) -> Array:
        n = start + y @ across
        return n / np.linalg.norm(n)

    def gradient(y: Array) -> Array:
        n = unit(y)
        x1, x2 = witnesses(n)
        return across @ (x2 - x1 - n * (n @ (x2 - x1)))

    found = optimize.root(gradient, np.zeros(2), method="hybr", options={"xtol": 1e-13})
    assert np.abs(found.fun).max() < 1e-12
    n = unit(found.x)
    x1, x2 = witnesses(n)
    return np.concatenate([[n @ (x2 - x1)], (x1 + x2) / 2, n])


@pytest.mark.parametrize(
    "kinds",
    [("sphere", "ellipsoid"), ("ellipsoid", "ellipsoid"), ("capsule", "ellipsoid"), ("ellipsoid", "cylinder")],
    ids="-".join,
)
def test_smooth_contacts_differentiate_the_contact_problem(kinds: tuple[str, str]) -> None:
    """Rule B at a reading without the collider's noise, against differences of the solved contact problem."""
    s, rng, checked = scene(*kinds), np.random.default_rng(3), 0
    while checked < 3:
        q = random_position(s, rng, 0.12, (0, 0))
        data = placed(s, q)
        if data.ncon != 1 or data.contact.dist[0] < -0.02 or data.contact.efc_address[0] < 0:
            continue
        order = tuple(kinds[g] for g in data.contact.geom[0])
        reading = freeze_contacts(s, 0, data)
        try:
            exact = solved(s, order, q, reading.frame[0, 0])
        except AssertionError:
            continue  # an edge or the side of the capsule or cylinder touches: no stationary support point
        normal = exact[4:]
        seed = np.array([0.0, 1.0, 0.0]) if abs(normal[1]) < 0.5 else np.array([0.0, 0.0, 1.0])
        tangent = seed - normal * (normal @ seed)
        tangent /= np.linalg.norm(tangent)
        frame = np.stack([normal, tangent, np.cross(normal, tangent)])
        assert np.abs(exact[:4] - np.r_[reading.dist, reading.point[0]]).max() < 1e-4
        sharp = dataclasses.replace(reading, dist=exact[:1], point=exact[None, 1:4], frame=frame[None])
        contacts = join_contacts(s, [sharp])
        assert contacts.rule.tolist() == [1]
        assert contacts.order == 1
        assert len(contacts.first_order) == 1
        assert all(kind in contacts.first_order[0] for kind in kinds)
        direction = rng.normal(size=s.model.nv)
        value, slope = slopes(along(s, contacts, q, direction))
        step = 1e-4
        sides = [solved(s, order, moved(s, q, direction, k * step), exact[4:]) for k in (-2, -1, 1, 2)]
        fd = (8 * (sides[2] - sides[1]) - (sides[3] - sides[0])) / (12 * step)
        assert np.abs(value[0, :7] - exact).max() < 1e-12
        # truncation 1e-16 f^(5), solution to 1e-13 over 1e-4
        assert np.abs(slope[0, :7] - fd).max() < 1e-7 * max(1.0, np.abs(fd).max())
        checked += 1


@pytest.mark.parametrize(
    "kinds",
    [("ellipsoid", "box"), ("ellipsoid", "mesh"), ("cylinder", "cylinder"), ("capsule", "cylinder")],
    ids="-".join,
)
def test_smooth_contacts_follow_long_differences(kinds: tuple[str, str]) -> None:
    """Faces, edges, vertices, sides and rims under rule B: noise of 2e-5 over steps of 1e-3 leaves 2e-2, while a wrong
    curvature is wrong by 1."""
    s, rng, checked, slack = scene(*kinds), np.random.default_rng(5), 0, []
    while checked < 6:
        q, direction = random_position(s, rng, 0.12, (0, 0)), rng.normal(size=s.model.nv)
        data = placed(s, q)
        if data.ncon != 1 or data.contact.dist[0] < -0.02 or data.contact.efc_address[0] < 0:
            continue
        reference = differences(s, q, direction, 1e-3)
        contacts = frozen(s, data)
        if reference is None or contacts.order == 2:
            continue
        assert contacts.rule.tolist() == [1]
        slack.append(np.abs(slopes(along(s, contacts, q, direction))[1] - reference[0]).max())
        checked += 1
    assert sorted(slack)[-2] < 2e-2, slack  # one of the six may have its edge or its face inside the stencil


def test_a_cube_of_triangles_touches_as_a_box() -> None:
    corners = " ".join(f"{a} {b} {c}" for a in (-0.1, 0.1) for b in (-0.13, 0.13) for c in (-0.16, 0.16))
    cube = MESH.split("vertex")[0].replace(".15 .15 .15", "1 1 1") + f'vertex="{corners}"/>'
    box, mesh = (
        scene("ellipsoid", "box"),
        model_of(
            f"""<mujoco><asset>{cube}</asset><worldbody>
        <body name="A"><freejoint/><geom name="a" {SHAPES["ellipsoid"]} margin=".02" {PLACE}/></body>
        <body name="B"><freejoint/><geom name="b" {SHAPES["mesh"]} pos="0 .01 .02" euler="-5 25 10"/></body>
        </worldbody></mujoco>"""
        ),
    )
    rng, met = np.random.default_rng(2), set()
    for _ in range(200):
        q = random_position(box, rng, 0.15, (0, 0))
        data = placed(box, q)
        if data.ncon != 1 or data.contact.dist[0] < -0.02:
            continue
        reading = freeze_contacts(box, 0, data)
        if not len(reading.dist):
            continue
        contacts = join_contacts(box, [reading])
        twin = join_contacts(mesh, [reading])
        assert twin.rule.tolist() == contacts.rule.tolist()
        direction = rng.normal(size=box.model.nv)
        one, other = (slopes(along(x, c, q, direction))[1] for x, c in ((box, contacts), (mesh, twin)))
        assert np.abs(one - other).max() < 1e-5 * max(1.0, np.abs(one).max())
        met.add(int(contacts.rule[0]))
    assert met == {0, 1}  # faces, edges or corners


def test_values_are_those_of_the_engine() -> None:
    # MuJoCo's meshes are float32 and its faces merge: its normals are 4e-8 off the corners that the closed form takes.
    # The value is the engine's, whatever the closed form gives; 1e-14 m is rounding.
    s, rng = scene("mesh", "mesh"), np.random.default_rng(3)
    for _ in range(30):
        data = placed(s, random_position(s, rng, 0.1, (0, 0)))
        try:
            contacts = frozen(s, data)
        except MujocoUnsupportedError:
            continue
        at = Poses(torch.tensor(data.xpos)[None], torch.tensor(data.xmat).reshape(1, -1, 3, 3), *[torch.zeros(0)] * 2)
        dist, point, frame = contact_frames(s, contacts, at)
        active = data.contact.efc_address >= 0
        assert np.abs(dist.numpy() - data.contact.dist[active]).max(initial=0) < 1e-14
        assert np.abs(point.numpy() - data.contact.pos[active]).max(initial=0) < 1e-14
        assert np.abs(frame.numpy() - data.contact.frame[active].reshape(-1, 3, 3)).max(initial=0) < 1e-13


# --- what the freeze reads


def capsule_xml(extra: str = "", option: str = "") -> str:
    return f"""<mujoco><option {option}/><worldbody><geom name="floor" type="plane" size="5 5 .1"/>
      <body name="limb" pos="0 0 .069"><freejoint/>
        <geom name="shin" type="capsule" size=".07 .15" euler="0 80 10" condim="4"/></body>
      <body name="other" pos="0 .3 .09"><freejoint/><geom name="ball" type="sphere" size=".1" condim="1"/></body>
      </worldbody>{extra}</mujoco>"""


def test_several_environments_equal_each_one_alone_in_mujocos_order() -> None:
    s = model_of(capsule_xml())
    rng = np.random.default_rng(1)
    states = [s.model.qpos0 + 0.003 * rng.normal(size=s.model.nq) for _ in range(3)]
    data = [placed(s, q) for q in states]
    together = join_contacts(s, [freeze_contacts(s, env, d) for env, d in enumerate(data)])
    base = torch.from_numpy(np.stack(states))
    found = contact_frames(s, together, poses(s, base, torch.zeros(1, s.model.nv, dtype=torch.float64)))
    for env, (q, d) in enumerate(zip(states, data, strict=True)):
        alone = frozen(s, d)
        rows = together.env == env
        value, _ = slopes(along(s, alone, q, np.zeros(s.model.nv)))
        assert torch.equal(together.geom[rows], torch.from_numpy(d.contact.geom).long())
        assert np.abs(value - reported(d)).max() < 1e-12
        joint = torch.cat([found[0][rows, None], found[1][rows], found[2][rows].flatten(1)], 1)
        assert np.abs(joint.numpy() - value).max() < 1e-14
        assert torch.equal(together.dim[rows], torch.from_numpy(d.contact.dim).long())
        weights = s.model.body_invweight0[s.model.geom_bodyid[d.contact.geom], 0].sum(1)
        assert np.allclose(together.diag[rows], weights, rtol=1e-15)


def test_tangents_turn_with_a_capsule_on_a_plane_only() -> None:
    s = model_of(capsule_xml())
    contacts = frozen(s, placed(s, s.model.qpos0))
    assert contacts.seed_body.tolist() == [1] * 2 + [0] or contacts.seed_body.tolist() == [1, 0]


def test_a_capsule_upright_on_a_plane_keeps_mujocos_tangent() -> None:
    s = model_of(
        '<mujoco><worldbody><geom type="plane" size="5 5 .1"/><body pos="0 0 .21"><freejoint/>'
        '<geom type="capsule" size=".07 .15"/></body></worldbody></mujoco>'
    )
    data = placed(s, s.model.qpos0)
    value, slope = slopes(along(s, frozen(s, data), data.qpos.copy(), np.array([0, 0, 1.0, 0, 0, 0])))
    assert np.abs(value - reported(data)).max() < 1e-12
    assert slope[:, 0].tolist() == [1.0]


def test_explicit_pairs_margins_and_gaps_are_read() -> None:
    pairs = """<contact><pair geom1="shin" geom2="floor" condim="6" margin=".03" gap=".01" solref=".03 1"/>
      <exclude body1="limb" body2="other"/></contact>"""
    s = model_of(capsule_xml(pairs))
    contacts = frozen(s, placed(s, s.model.qpos0))
    shin = (contacts.geom == 1).any(1)
    assert contacts.pair[shin].tolist() == [0] * int(shin.sum())
    assert contacts.pair[~shin].tolist() == [-1]
    assert contacts.dim[shin].tolist() == [6] * int(shin.sum())
    assert torch.allclose(contacts.margin[shin], torch.tensor(0.03, dtype=torch.float64))


def test_contacts_without_force_are_left_out() -> None:
    """Within the gap beyond its margin a contact is in MuJoCo's list but not among its constraints."""
    s = model_of(capsule_xml().replace('name="ball"', 'name="ball" gap=".1"').replace("0 .3 .09", "0 .3 .12"))
    data = placed(s, s.model.qpos0)
    assert (data.contact.efc_address < 0).sum() == 1
    contacts = frozen(s, data)
    assert 2 not in contacts.geom
    assert len(contacts.env) == data.ncon - 1


def test_no_contact_gives_empty_tensors() -> None:
    s = model_of(capsule_xml().replace("0 0 .069", "0 0 2").replace("0 .3 .09", "0 .3 3"))
    contacts = frozen(s, placed(s, s.model.qpos0))
    zero = torch.zeros(1, s.model.nv, dtype=torch.float64)
    dist, point, frame = contact_frames(s, contacts, poses(s, torch.from_numpy(s.model.qpos0)[None], zero))
    assert (dist.shape, point.shape, frame.shape) == ((0,), (0, 3), (0, 3, 3))
    assert contacts.order == 2


KINDS = [
    ("plane", "box", (FACE, POINT)),
    ("plane", "cylinder", (FACE, CYLINDER_FOOT)),
    ("plane", "ellipsoid", (FACE, ELLIPSOID_FOOT)),
    ("sphere", "cylinder", (RIM, POINT)),
    ("sphere", "box", (FACE, POINT)),
    ("sphere", "mesh", (LINE, POINT)),
    ("sphere", "mesh", (POINT, POINT)),
    ("capsule", "capsule", (LINE, LINE)),
    ("box", "box", (LINE, LINE)),
    ("ellipsoid", "box", (FACE, ELLIPSOID_FOOT)),
    ("cylinder", "box", (FACE, CYLINDER_FOOT)),
    ("box", "box", (FACE, CUT_EDGE)),
    ("box", "box", (FACE, UNDER_CORNER)),
    ("mesh", "mesh", (FACE, CUT_EDGE)),
]


@pytest.mark.parametrize(("first", "second", "kinds"), KINDS, ids=str)
def test_features_are_recognised(first: str, second: str, kinds: tuple[int, int]) -> None:
    """Every kind of core pair occurs, so the comparison with differences above has met it too."""
    s, rng, seen = scene(first, second), np.random.default_rng(0), set()
    for _ in range(600):
        data = placed(s, random_position(s, rng, 0.12, (0.02, 0.25)))
        if data.ncon and data.contact.dist.min() > -0.02:
            seen |= {c.pair.kinds for c in frozen(s, data).cores}
        if kinds in seen:
            return
    pytest.fail(f"only {seen} found")


# --- refusals

FREE = '<body name="{name}" pos="{pos}" euler="{turn}"><freejoint/><geom name="{name}" {shape}/></body>'


def stack(*bodies: tuple[str, str, str, str], floor: bool = True) -> Structure:
    parts = "".join(FREE.format(name=n, pos=p, turn=t, shape=k) for n, p, t, k in bodies)
    plane = '<geom name="floor" type="plane" size="5 5 .1"/>' if floor else ""
    return model_of(f"<mujoco><worldbody>{plane}{parts}</worldbody></mujoco>")


def test_a_cylinder_that_stands_and_can_tilt_is_refused() -> None:
    s = stack(("can", "0 0 .099", "0 0 0", 'type="cylinder" size=".1 .1"'))
    with pytest.raises(MujocoUnsupportedError, match=r"'floor' \(plane\) and 'can' \(cylinder\).*tilt it"):
        frozen(s, placed(s, s.model.qpos0))


def test_a_cylinder_that_stands_and_only_slides_is_differentiated() -> None:
    """Gymnasium's pusher: the object slides on the table."""
    s = model_of(
        '<mujoco><worldbody><geom type="plane" size="5 5 .1"/><body pos="0 0 .099"><joint type="slide" axis="1 0 0"/>'
        '<joint type="slide" axis="0 0 1"/><geom type="cylinder" size=".1 .1"/></body></worldbody></mujoco>'
    )
    data = placed(s, s.model.qpos0)
    contacts, direction = frozen(s, data), np.array([0.7, 0.3])
    reference = differences(s, s.model.qpos0, direction, 3e-4)
    assert reference is not None
    assert contacts.order == 2
    assert np.abs(slopes(along(s, contacts, s.model.qpos0, direction))[1] - reference[0]).max() < 1e-10


def test_contact_points_that_jump_are_refused() -> None:
    """The cap of a cylinder on a box: the iterative collider picks other points at every displacement."""
    can = 'type="cylinder" size=".05 .1"'
    s = stack(
        ("table", "0 0 0", "0 0 0", 'type="box" size=".3 .3 .1"'), ("can", "0 0 .199", "0 0 20", can), floor=False
    )
    with pytest.raises(
        MujocoUnsupportedError, match=r"'can' \(cylinder\) and 'table' \(box\) in environment 0 have no der"
    ):
        frozen(s, placed(s, s.model.qpos0))


def test_a_contact_about_to_vanish_is_refused() -> None:
    """Four clipped points at the margin: a displacement of 1e-6 m ends them."""
    box = 'type="box" size=".1 .1 .1"'
    s = stack(
        ("low", "0 0 0", "0 0 0", box),
        ("high", "0.03 0 .19999999", "0 0 7", box.replace(".1 .1", ".08 .1")),
        floor=False,
    )
    with pytest.raises(MujocoUnsupportedError, match="number of its contact points changes"):
        frozen(s, placed(s, s.model.qpos0))


def test_an_unknown_tangent_is_refused() -> None:
    s = model_of(capsule_xml())
    reading = freeze_contacts(s, 0, placed(s, s.model.qpos0))
    turned = reading.frame[:, [0, 2, 1]]
    with pytest.raises(MujocoUnsupportedError, match="follows no known rule"):
        join_contacts(s, [dataclasses.replace(reading, frame=turned)])


def test_pairs_share_their_calls() -> None:
    """In each pair exactly one geom moves; a chain needs one group, a triangle two; fixed geoms never move."""
    chain = _groups([(0, 1), (1, 2), (2, 3)], [False, True, True, True])
    triangle = _groups([(1, 2), (2, 3), (1, 3)], [False, True, True, True])
    for groups, number in ((chain, 1), (triangle, 2)):
        assert len(groups) == number
        for group in groups:
            moved_geoms = set(group.values())
            assert all(len({a, b} & moved_geoms) == 1 for a, b in group)
            assert 0 not in moved_geoms


BOX = 'type="box" size=".1 .1 .1"'


def test_flush_faces_that_tie_are_refused() -> None:
    """Left and right derivatives agree along every axis, yet which face carries the points depends on the tilt axis."""
    wide = BOX.replace(".1 .1", ".12 .09")
    s = stack(("low", "0 0 0", "0 0 0", BOX), ("high", "0.01 0 .198", "0 0 7", wide), floor=False)
    with pytest.raises(MujocoUnsupportedError, match="their faces are flush"):
        frozen(s, placed(s, s.model.qpos0))


def test_a_stack_of_flush_boxes_is_differentiated_where_the_lower_face_carries() -> None:
    s = stack(
        ("low", "0 0 .099", "0 0 0", BOX),
        ("middle", "0.01 0 .277", "0 0 7", BOX.replace(".1 .1 .1", ".08 .08 .08")),
        ("high", "0.02 0.01 .415", "0 0 14", BOX.replace(".1 .1 .1", ".06 .05 .06")),
    )
    q, rng = s.model.qpos0, np.random.default_rng(0)
    contacts = frozen(s, placed(s, q))
    assert contacts.rule.tolist() == [0] * 4 + [2] * 8
    assert len(contacts.first_order) == 2
    for direction in rng.normal(size=(3, s.model.nv)):
        reference = differences(s, q, direction, 1e-4)
        assert reference is not None
        assert np.abs(slopes(along(s, contacts, q, direction))[1] - reference[0]).max() < 1e-7


def test_second_derivatives_through_first_order_contacts_name_the_pair() -> None:
    """A ball on a height field, as a model: the first derivative is there, the second raises."""
    xml = f"""<mujoco><asset>{HILLS}</asset><worldbody><geom name="ground" {SHAPES["hfield"]}/><body pos="0.1 0.2 .12">
      <freejoint/><geom name="ball" {SHAPES["sphere"]}/></body></worldbody></mujoco>"""
    mdp = mujoco_model(xml, (), lambda theta, s, a, e, following: following[:, 0], backend="torch")
    state = mdp.initial_state({}, torch.zeros(1, 12, dtype=torch.float64))
    nothing, along_z = torch.zeros(1, 0, dtype=torch.float64), torch.zeros_like(state)
    along_z[0, 2] = 1.0
    step = lambda t: mdp.step({}, state + t * along_z, nothing, nothing)[0, 9]
    zero = torch.zeros((), dtype=torch.float64)
    assert float(torch.func.grad(step)(zero)) != 0.0
    with pytest.raises(DerivativeOrderError, match=r"'ground' \(hfield\) and 'ball' \(sphere\)"):
        torch.func.grad(torch.func.grad(step))(zero)


# --- which pairs can touch

FILTERS = """<mujoco><option><flag filterparent="{filter}"/></option><worldbody>
  <geom name="g0" type="sphere" size="1"/><geom name="g1" type="sphere" size="1"/>
  <body name="a"><geom name="g2" type="sphere" size="1"/>
    <body name="b"><freejoint/></body></body>
  <body name="c"><joint/><geom name="g3" type="sphere" size="1"/>
    <body name="d"><geom name="g4" type="sphere" size="1"/>
      <body name="e"><joint/><geom name="g5" type="sphere" size="1" contype="2" conaffinity="1"/>
        <body name="f"><joint/><geom name="g6" type="sphere" size="1"/></body></body></body></body>
  <body name="h"><joint/><geom name="g7" type="sphere" size="1" contype="0" conaffinity="2"/></body>
  <body name="i"><joint/><geom name="g8" type="sphere" size="1"/></body>
  </worldbody><contact><exclude body1="f" body2="i"/><pair geom1="g3" geom2="g4"/>
    <pair geom1="g6" geom2="g0"/></contact></mujoco>"""


@pytest.mark.parametrize("filter_parent", ["enable", "disable"])
def test_touching_pairs_are_those_mujoco_puts_in_contact(filter_parent: str) -> None:
    """All spheres overlap, so MuJoCo reports exactly the pairs its filters allow."""
    xml = FILTERS.format(filter=filter_parent).replace('<body name="b"><freejoint/></body>', "")
    model = mujoco.MjModel.from_xml_string(xml)
    data = mujoco.MjData(model)
    data.qpos[:] = 0.01 * np.random.default_rng(0).normal(size=model.nq)
    mujoco.mj_fwdPosition(model, data)
    assert {tuple(sorted(p)) for p in touching_pairs(model)} == {tuple(sorted(p)) for p in data.contact.geom.tolist()}


def test_no_pair_touches_when_contacts_are_disabled() -> None:
    xml = FILTERS.format(filter="enable").replace("<flag", '<flag contact="disable"').replace("<freejoint/>", "")
    assert list(touching_pairs(mujoco.MjModel.from_xml_string(xml))) == []


def test_cylinders_that_can_meet_flat_faces_are_refused_at_construction() -> None:
    cylinder, box = 'type="cylinder" size=".1 .1"', 'type="box" size=".1 .1 .1"'
    two = stack(("can", "0 0 1", "0 0 0", cylinder), ("case", "0 1 1", "0 0 0", box)).model
    with pytest.raises(MujocoUnsupportedError, match=r"'can' \(cylinder\) and 'case' \(box\)"):
        check_contact_pairs(two)
    check_contact_pairs(stack(("can", "0 0 1", "0 0 0", cylinder)).model)
    check_contact_pairs(stack(("can", "0 0 1", "0 0 0", cylinder), ("ball", "0 1 1", "0 0 0", 'size=".1"')).model)


def test_only_slides_looks_at_the_joints_between_two_bodies() -> None:
    model = mujoco.MjModel.from_xml_string(
        '<mujoco><worldbody><body name="base"><joint/><geom size=".1"/><body name="cart"><joint type="slide"/>'
        '<geom size=".1"/><body name="pole"><joint/><geom size=".1"/></body></body></body></worldbody></mujoco>'
    )
    assert only_slides(model, 1, 2)
    assert not only_slides(model, 0, 2)
    assert not only_slides(model, 2, 3)


def test_a_mesh_without_the_triangles_of_its_hull_clips_by_differences() -> None:
    """Meshes of the model that hold no hull: the vertices still serve, clipped points go to rule C."""
    s, rng = scene("mesh", "mesh"), np.random.default_rng(0)
    s.model.mesh_graphadr[:] = -1
    table = geom_table(s.model)
    assert table.hulls[0].shape == (8, 3)
    assert table.triangles[0].shape == (0, 3)
    rules = set()
    for _ in range(60):
        data = placed(s, random_position(s, rng, 0.12, (0, 0)))
        if data.ncon > 1 and data.contact.dist.min() > -0.02:
            rules |= set(frozen(s, data).rule.tolist())
    assert rules == {0, 2}


def test_tables_are_made_once_per_model() -> None:
    s = scene("sphere", "mesh")
    assert geom_table(s.model) is geom_table(s.model)
    assert geom_table(s.model).hulls[1].shape == (8, 3)
