"""The torch program of MuJoCo's acceleration against MuJoCo itself: residual, Hessian, derivatives, refusals."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import mujoco
import numpy as np
import pytest
import torch
from mujoco_scenes import SCENES, Array, States, arm, free, scene, states, zones
from torch import Tensor

from sim2real.simulators.mujoco_coverage import MujocoUnsupportedError
from sim2real.simulators.mujoco_kinematics import State
from sim2real.simulators.mujoco_program import (
    Damping,
    damping_power,
    freeze,
    hessian,
    mass_power,
    residual_power,
    solver_residual,
)
from sim2real.simulators.mujoco_quaternions import quaternion_exp, rotation_vector
from sim2real.simulators.mujoco_rows import impedance
from sim2real.simulators.mujoco_structure import FIELDS, check_fields, nominal_fields, structure


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def power(s: States, lam: Tensor, *, d: Tensor | None = None, fields: dict[str, Tensor] | None = None) -> Tensor:
    state = s.state if d is None else replace(s.state, d=d)
    return residual_power(s.structure, state, s.a, lam, s.fields if fields is None else fields, s.active)


@pytest.mark.parametrize("name", SCENES)
def test_the_residual_vanishes_at_mujocos_acceleration(name: str) -> None:
    s = states(SCENES[name], 3)
    found = solver_residual(s.structure, s.state, s.a, s.fields, s.active)
    assert found.max() < 1e-10  # the solver stops at rounding: 1e-12 times the condition of stiff contacts
    mass, curved, _ = hessian(s.structure, s.state, s.a, s.fields, s.active)
    torch.testing.assert_close(mass, s.mass, rtol=1e-12, atol=1e-12 * float(s.mass.abs().max()))
    # the reference differences s' in the sliding zone, with step 1e-6: 1e-9 relative
    torch.testing.assert_close(curved, s.hessian, rtol=1e-8, atol=1e-8 * float(s.hessian.abs().max()))
    mu, z = normal(2, *s.a.shape)
    form = mass_power(s.structure, s.state, mu, z, s.fields)
    torch.testing.assert_close(form, torch.einsum("bi,bij,bj->b", mu, s.mass, z), rtol=1e-10, atol=1e-12)


def test_a_wrong_acceleration_leaves_a_residual() -> None:
    s = states(SCENES["ball arm"], 2)
    moved = s.a + torch.tensor([[0.0], [1e-3]], dtype=torch.float64) * s.a.abs().amax(-1, keepdim=True)
    found = solver_residual(s.structure, s.state, moved, s.fields, s.active)
    assert found[0] < 1e-12
    assert found[1] > 1e-5


_INPUTS = ("d", "v", "act", "ctrl", "force")


class _Reference:
    """Converged accelerations of MuJoCo near one state, and whether any of them changed a zone."""

    def __init__(self, s: States, row: int) -> None:
        self.model = copy.copy(s.structure.model)
        self.data = mujoco.MjData(self.model)
        self.state = {key: getattr(s.state, "base" if key == "d" else key)[row].numpy() for key in _INPUTS}
        self.zones: list[tuple[int, int, int]] | None = None
        self.changed = False

    def acceleration(self, name: str, step: Array) -> Array:
        model, data = self.model, self.data
        mujoco.mj_resetData(model, data)
        targets = {"d": data.qpos, "v": data.qvel, "act": data.act, "ctrl": data.ctrl, "force": data.qfrc_applied}
        for key, target in targets.items():
            target[:] = self.state[key] + (step if key == name and key != "d" else 0)
        if name == "d":
            mujoco.mj_integratePos(model, data.qpos, step, 1.0)
        if name not in FIELDS:
            return self._solved()
        saved = _field(model, name)
        _write(model, name, saved, step)
        try:
            return self._solved()
        finally:
            for array, value in saved.items():
                _array(model, array)[:] = value

    def _solved(self) -> Array:
        mujoco.mj_forward(self.model, self.data)
        found = zones(self.model, self.data)
        self.changed |= self.zones is not None and found != self.zones
        self.zones = found
        return self.data.qacc.copy()

    def derivative(self, name: str, direction: Array, step: float) -> Array:
        """Richardson's extrapolation of centred differences along a direction."""
        half = lambda h: (self.acceleration(name, h * direction) - self.acceleration(name, -h * direction)) / (2 * h)
        return (4 * half(step) - half(2 * step)) / 3


def _array(model: mujoco.MjModel, name: str) -> Array:
    found: Array = model.opt.gravity if name == "gravity" else getattr(model, name)
    return found


def _field(model: mujoco.MjModel, name: str) -> dict[str, Array]:
    names = ("body_inertia", "body_iquat") if name == "body_inertia" else (name,)
    return {key: _array(model, key).copy() for key in names}


def _write(model: mujoco.MjModel, name: str, saved: dict[str, Array], step: Array) -> None:
    if name != "body_inertia":
        _array(model, name)[:] = saved[name] + step
        return
    for body in range(1, model.nbody):
        turn = np.zeros(9)
        mujoco.mju_quat2Mat(turn, saved["body_iquat"][body])
        turn = turn.reshape(3, 3)
        e = step[body]
        change = np.array([[e[0], e[3], e[4]], [e[3], e[1], e[5]], [e[4], e[5], e[2]]])
        moments, axes = np.linalg.eigh(turn @ np.diag(saved["body_inertia"][body]) @ turn.T + change)
        model.body_inertia[body] = moments
        mujoco.mju_mat2Quat(model.body_iquat[body], (axes * np.sign(np.linalg.det(axes))).reshape(-1))


def _vjp(s: States, g: Tensor) -> dict[str, Tensor]:
    """Gradient of <g, a> by the state, the inputs and every field, from phi."""
    curved = hessian(s.structure, s.state, s.a, s.fields, s.active)[1]
    lam = -torch.linalg.solve(curved, g)
    inputs = {name: getattr(s.state, name) for name in _INPUTS}
    many = {name: x.expand(len(g), *x.shape[1:]) for name, x in s.fields.items()}
    leaves = {name: x.clone().requires_grad_() for name, x in {**inputs, **many}.items()}
    state = replace(s.state, **{name: leaves[name] for name in _INPUTS})
    phi = residual_power(s.structure, state, s.a, lam, {name: leaves[name] for name in FIELDS}, s.active).sum()
    found = torch.autograd.grad(phi, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(x) if grad is None else grad
        for (name, x), grad in zip(leaves.items(), found, strict=True)
    }


def _direction(s: States, name: str, rng: np.random.Generator) -> Array:
    """A random direction that keeps the field physical: relative, but absolute where zero is an ordinary value."""
    value = s.fields[name][0].numpy()
    size = np.abs(value)
    if name in ("body_ipos", "gravity", "qpos_spring"):
        size = np.maximum(size, 0.01)
    if name == "body_inertia":
        size = 0.1 * size[:, :3].max(-1, keepdims=True)
    direction: Array = rng.normal(size=value.shape) * size
    return direction


_QUICK = (
    "pyramid box condim 6",
    "elliptic capsule condim 6",
    "direct solref, solmix",
    "explicit pair",
    "limits",
    "dry friction",
    "actuators, tendon",
    "connect, weld, joint",
    "spatial tendon, site, muscle",
)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in _QUICK else pytest.mark.slow) for n in SCENES])
def test_derivatives_equal_richardson_differences(name: str) -> None:
    """d<g, a> by q, v, act, ctrl, force along unit vectors, and by every field along one random direction."""
    s, rng, checked = states(SCENES[name], 3), np.random.default_rng(1), 0
    g = torch.tensor(rng.normal(size=s.a.shape))
    gradient = _vjp(s, g)
    for row in range(len(g)):
        reference = _Reference(s, row)
        rounding = 1e-13 * float(s.a[row].norm() * g[row].norm())  # of <g, a> at MuJoCo's converged answer
        cases = [(key, along) for key in _INPUTS for along in np.eye(gradient[key].shape[1])]
        cases += [(key, _direction(s, key, rng)) for key in FIELDS if (key, name) != ("body_inertia", "fluid")]
        worst = {}
        for key, along in cases:
            step = {"d": 1e-6, "body_inertia": 1e-4}.get(key, 1e-5)
            wanted = float(g[row].numpy() @ reference.derivative(key, along, step)) if along.size else 0.0
            found = float((gradient[key][row].numpy() * along).sum())
            if abs(found - wanted) > 1e-6 * abs(wanted) + rounding / step:
                worst[key] = (found, wanted)
        if not reference.changed:  # zones of the constraints stayed the same
            checked += 1
            assert not worst
    assert checked > 0


@pytest.mark.parametrize("integrator", ["eulerdamp", "implicitfast", "implicit"])
@pytest.mark.parametrize("name", ["actuators, tendon", "joint force range", "two trees"])
def test_damping_gives_mujocos_step(name: str, integrator: Damping) -> None:
    """v+ = v + h w with (M - h D) w = M a."""
    number = {"eulerdamp": 0, "implicitfast": 3, "implicit": 2}[integrator]
    s = states(SCENES.get(name, scene(arm() + free("box", z=0.5))), 4, integrator=number)
    mass, _, damping = hessian(s.structure, s.state, s.a, s.fields, s.active, integrator)
    assert damping is not None
    step, data = s.structure.model.opt.timestep, mujoco.MjData(s.structure.model)
    w = torch.linalg.solve(mass - step * damping, (mass @ s.a[..., None]))[..., 0]
    for row in range(len(w)):
        data.qpos[:], data.qvel[:], data.act[:], data.ctrl[:] = (
            x[row] for x in (s.state.base, s.state.v, s.state.act, s.state.ctrl)
        )
        data.qfrc_applied[:] = s.state.force[row]
        mujoco.mj_step(s.structure.model, data)
        wanted = (torch.tensor(data.qvel) - s.state.v[row]) / step
        # (v+ - v)/h carries the rounding of v, 1e-16/0.002
        torch.testing.assert_close(w[row], wanted, rtol=1e-10, atol=1e-11 * float(wanted.abs().max()) + 1e-12)
    mu, z = normal(2, *s.a.shape)
    form = damping_power(s.structure, s.state, mu, z, s.fields, integrator)
    torch.testing.assert_close(form, torch.einsum("bi,bij,bj->b", mu, damping, z), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "name",
    [
        "elliptic capsule condim 6",
        "actuators, tendon",
        "connect, weld, joint",
        pytest.param("pyramid box", marks=pytest.mark.slow),
        pytest.param("limits", marks=pytest.mark.slow),
    ],
)
def test_second_derivatives_equal_differences_of_first(name: str) -> None:
    """Directional derivative of grad phi by double backward, against centred differences in lam, v, a and fields."""
    s = states(SCENES[name], 3)
    names = ["body_mass", "body_ipos", "geom_friction", "jnt_solref", "dof_frictionloss", "eq_solimp", "actuator_gear"]
    point = {"v": s.state.v, "lam": normal(*s.a.shape), "d": s.state.d}
    point = {**point, **{key: s.fields[key].clone() for key in names if s.fields[key].numel()}}
    along = {key: normal(*x.shape, seed=i) * (1 + x.abs()) * 1e-2 for i, (key, x) in enumerate(point.items())}
    # d is exact to second order at 0 only, so the difference may not leave it: its share is taken from the other side
    along["d"] = s.state.d

    def gradient(shift: float, graph: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        leaves = {key: (x + shift * along[key]).requires_grad_() for key, x in point.items()}
        fields = {**s.fields, **{key: leaves[key] for key in leaves if key in FIELDS}}
        state = replace(s.state, d=leaves["d"], v=leaves["v"])
        phi = residual_power(s.structure, state, s.a, leaves["lam"], fields, s.active).sum()
        found = torch.autograd.grad(phi, list(leaves.values()), create_graph=graph, allow_unused=True)
        return leaves, {
            key: torch.zeros_like(x) if y is None else y for (key, x), y in zip(leaves.items(), found, strict=True)
        }

    leaves, slope = gradient(0.0, True)
    product = sum((slope[key] * along[key]).sum() for key in slope)
    assert isinstance(product, Tensor)
    second = torch.autograd.grad(product, list(leaves.values()), allow_unused=True)
    step = 1e-4
    ahead, behind = gradient(step, False)[1], gradient(-step, False)[1]
    for (key, x), found in zip(leaves.items(), second, strict=True):
        wanted = (ahead[key] - behind[key]) / (2 * step)
        found = torch.zeros_like(x) if found is None else found
        # truncation step^2 times a third derivative: 1e-8 of the largest entry, 1e-6 where a cone is stiff
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()) + 1e-9)


def test_torch_func_transforms_agree() -> None:
    s = states(SCENES["elliptic capsule condim 6"], 4)
    lam, tangent = normal(2, *s.a.shape)
    phi = lambda d: power(s, lam, d=d).sum()
    zero = s.state.d
    gradient = torch.func.grad(phi)(zero)
    torch.testing.assert_close(torch.func.jvp(phi, (zero,), (tangent,))[1], (gradient * tangent).sum())
    forward = torch.func.jvp(torch.func.grad(phi), (zero,), (tangent,))[1]
    reverse = torch.func.grad(lambda d: (torch.func.grad(phi)(d) * tangent).sum())(zero)
    torch.testing.assert_close(forward, reverse, rtol=1e-9, atol=1e-9)
    assert forward.abs().max() > 0


@pytest.mark.parametrize("name", ["actuators, tendon", "elliptic capsule condim 6", "connect, weld, joint"])
def test_a_batch_equals_its_environments_and_fields_may_differ(name: str) -> None:
    s = states(SCENES[name], 3)
    scale = torch.tensor([1.0, 1.1, 0.9], dtype=torch.float64)
    fields = dict(s.fields)
    for key in ("body_mass", "geom_friction", "dof_damping", "actuator_gainprm", "body_invweight0", "eq_solref"):
        value = s.fields[key]
        fields[key] = value * scale.reshape(-1, *(1,) * (value.ndim - 1))
    lam = normal(*s.a.shape)
    whole = power(s, lam, fields=fields)
    for row in range(3):
        one = slice(row, row + 1)
        mine = {key: x[one] if len(x) > 1 else x for key, x in fields.items()}
        state = State(**{key: x[one] for key, x in vars(s.state).items()})
        active = freeze(s.structure, state, mine)
        alone = residual_power(s.structure, state, s.a[one], lam[one], mine, active)
        torch.testing.assert_close(alone, whole[one], rtol=1e-11, atol=1e-11)


def test_shared_arguments_are_one_copy() -> None:
    s = states(SCENES["elliptic capsule condim 6"], 1)
    lam = normal(5, s.a.shape[1])
    copies = State(**{key: x.expand(5, -1) for key, x in vars(s.state).items()})
    active = freeze(s.structure, copies, s.fields)
    shared = residual_power(s.structure, s.state, s.a, lam, s.fields, active)
    copied = residual_power(s.structure, copies, s.a.expand(5, -1), lam, s.fields, active)
    torch.testing.assert_close(shared, copied, rtol=0, atol=0)


def test_derivatives_are_finite_at_rest_in_the_reference_pose() -> None:
    """Zero angles, zero residuals, zero slip and an impedance at zero violation are no singularities."""
    for name in ("limits", "connect, weld, joint", "ball arm", "elliptic box condim 3", "free joint, driven"):
        tables = structure(mujoco.MjModel.from_xml_string(SCENES[name]))
        base = torch.tensor(tables.model.qpos0)[None]
        v, act, ctrl = (base.new_zeros(1, size) for size in (tables.model.nv, tables.model.na, tables.model.nu))
        fields = {key: x.clone().requires_grad_() for key, x in nominal_fields(tables).items()}
        active = freeze(tables, State(base, v, v, act, ctrl, v), fields)
        leaves = [torch.zeros_like(v).requires_grad_() for _ in range(3)]
        d, rate, lam = leaves
        phi = residual_power(tables, State(base, d, rate, act, ctrl, v), v, lam + 1.0, fields, active).sum()
        every = [*leaves, *fields.values()]
        first = torch.autograd.grad(phi, every, create_graph=True, allow_unused=True)
        total = sum(x.square().sum() for x in first if x is not None)
        assert isinstance(total, Tensor)
        second = torch.autograd.grad(total, every, allow_unused=True)
        assert all(bool(x.isfinite().all()) for x in (*first, *second) if x is not None), name


def test_equal_frictions_share_the_derivative_and_priority_takes_it() -> None:
    equal = scene(free("capsule"), floor='friction=".7 .02 .01"')
    for xml, shares in ((equal, (0.5, 0.5)), (equal.replace('name="floor"', 'name="floor" priority="1"'), (1.0, 0.0))):
        s = states(xml, 6)
        assert s.active.contacts is not None
        friction = s.fields["geom_friction"].clone().requires_grad_()
        phi = power(s, s.state.v, fields={**s.fields, "geom_friction": friction}).sum()
        (found,) = torch.autograd.grad(phi, friction)
        assert found[0, :, 0].abs().max() > 0
        torch.testing.assert_close(found[0, :, 0] / found[0, :, 0].sum(), torch.tensor(shares, dtype=torch.float64))


_OFF = mujoco.mjtDisableBit
_EVERYTHING = scene(
    arm(ball='range="0 .4" stiffness="2"', hinge='range="-.2 .2" frictionloss=".1"', body='gravcomp=".5"')
    + free("box", z=0.15),
    extra=SCENES["actuators, tendon"]
    .split("</worldbody>")[1]
    .replace("</mujoco>", '<equality><connect body1="l3" body2="box" anchor=".1 0 0"/></equality></mujoco>'),
)


@pytest.mark.parametrize(
    "flags",
    [
        _OFF.mjDSBL_CONSTRAINT,
        _OFF.mjDSBL_EQUALITY | _OFF.mjDSBL_LIMIT | _OFF.mjDSBL_GRAVITY,
        _OFF.mjDSBL_FRICTIONLOSS | _OFF.mjDSBL_CONTACT | _OFF.mjDSBL_SPRING,
        _OFF.mjDSBL_DAMPER | _OFF.mjDSBL_CLAMPCTRL,
        _OFF.mjDSBL_SPRING | _OFF.mjDSBL_DAMPER,
        _OFF.mjDSBL_ACTUATION | _OFF.mjDSBL_REFSAFE,
    ],
    ids=lambda flags: str(int(flags)),
)
def test_disabled_physics_is_left_out(flags: int) -> None:
    xml = _EVERYTHING.replace('timestep=".002"', 'timestep=".002" integrator="implicitfast"')
    s = states(xml, 3, disable=int(flags))
    found = solver_residual(s.structure, s.state, s.a, s.fields, s.active)
    assert found.max() < 1e-10
    hessian(s.structure, s.state, s.a, s.fields, s.active, "implicit")


_HINGE = '<body><joint name="j" {j}/><geom size=".1"/><site name="s"/></body>'
_REFUSED: dict[str, tuple[str, str]] = {
    "override": (
        scene("", option="").replace("/><worldbody>", '><flag override="enable"/></option><worldbody>'),
        "override",
    ),
    "discrete": (scene("", option='integrator="discrete"'), "discrete"),
    "noslip": (scene("", option='noslip_iterations="3"'), "noslip"),
    "groups": (scene("", option='actuatorgroupdisable="2"'), "actuatorgroupdisable"),
    "surface": (scene("", floor='surfacevel="1 0 0 0 0 0"'), "surfacevel"),
    "adhesion": (scene("", floor='adhesion="1"'), "adhesion"),
    "polynomial spring": (scene(_HINGE.format(j='stiffness="1 2"')), "joint 'j': polynomial"),
    "polynomial damper": (scene(_HINGE.format(j='damping="1 2"')), "joint 'j': polynomial"),
    "plastic spring": (scene(_HINGE.format(j='stiffness="1" springyield=".1"')), "joint 'j': polynomial or plastic"),
    "gravity compensation by no actuator": (scene(_HINGE.format(j='actuatorgravcomp="true"')), "actuatorgravcomp"),
    "actuator damping": (
        scene(_HINGE.format(j=""), extra='<actuator><motor joint="j" damping="1"/></actuator>'),
        "joint 'j': damping or armature",
    ),
    "delay": (
        scene(_HINGE.format(j=""), extra='<actuator><motor name="m" joint="j" delay=".01" nsample="8"/></actuator>'),
        "actuator 'm': a delay",
    ),
    "user gain": (
        scene(_HINGE.format(j=""), extra='<actuator><general name="u" joint="j" gaintype="user"/></actuator>'),
        "actuator 'u'",
    ),
    "force range beside a muscle": (
        scene(
            _HINGE.format(j='actuatorfrcrange="-1 1"'),
            extra='<actuator><muscle joint="j" lengthrange="-1 1"/></actuator>',
        ),
        "actuatorfrcrange",
    ),
    "implicit fluid": (scene(_HINGE.format(j=""), option='density="1" integrator="implicitfast"'), "implicit"),
    "limited spatial tendon": (
        scene(
            '<site name="a" pos="0 .1 1"/>' + _HINGE.format(j=""),
            extra='<tendon><spatial name="sp" range="0 1"><site site="a"/><site site="s"/></spatial></tendon>',
        ),
        "tendon 'sp': limits",
    ),
    "tendon force range": (
        scene(
            _HINGE.format(j=""),
            extra='<tendon><fixed name="f" actuatorfrcrange="-1 1"><joint joint="j" coef="1"/></fixed></tendon>',
        ),
        "tendon 'f': actuatorfrcrange",
    ),
    "polynomial tendon": (
        scene(
            _HINGE.format(j=""),
            extra='<tendon><fixed name="f" stiffness="1 2"><joint joint="j" coef="1"/></fixed></tendon>',
        ),
        "tendon 'f': polynomial",
    ),
    "weld of sites": (
        scene(_HINGE.format(j="") + '<site name="w"/>', extra='<equality><weld site1="s" site2="w"/></equality>'),
        "weld of sites",
    ),
    "tie of spatial tendons": (
        scene(
            '<site name="a" pos="0 .1 1"/>' + _HINGE.format(j=""),
            extra='<tendon><spatial name="sp"><site site="a"/><site site="s"/></spatial></tendon>'
            '<equality><tendon tendon1="sp"/></equality>',
        ),
        "ties the spatial tendon 'sp'",
    ),
    "flex": (
        scene(
            '<body><joint/><geom size=".1"/></body><flexcomp name="cloth" type="grid" count="3 3 1" '
            'spacing=".1 .1 .1" dim="2" radius=".01" mass="1"/>'
        ),
        "cloth",
    ),
}


@pytest.mark.parametrize("name", _REFUSED)
def test_what_cannot_be_differentiated_is_refused_by_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    xml, words = _REFUSED[name]
    monkeypatch.chdir(tmp_path)  # where the engine drops its log
    with pytest.raises(MujocoUnsupportedError, match=words):
        structure(mujoco.MjModel.from_xml_string(xml))


def test_fields_that_cannot_move_are_refused() -> None:
    tables = structure(mujoco.MjModel.from_xml_string(SCENES["fluid"]))
    check_fields(tables, ("body_mass", "gravity"))
    with pytest.raises(MujocoUnsupportedError, match="not fields"):
        check_fields(tables, ("mass",))
    with pytest.raises(MujocoUnsupportedError, match="fluid"):
        check_fields(tables, ("body_inertia",))
    simple = structure(mujoco.MjModel.from_xml_string(scene('<body><freejoint/><geom size=".1"/></body>')))
    with pytest.raises(MujocoUnsupportedError, match="simple"):
        check_fields(simple, ("body_ipos",))
    spatial = structure(mujoco.MjModel.from_xml_string(SCENES["spatial tendon, site, muscle"]))
    with pytest.raises(MujocoUnsupportedError, match="tendon_armature cannot be differentiated"):
        check_fields(spatial, ("tendon_armature",))


def test_rotation_vector_is_the_logarithm_at_every_angle() -> None:
    """Against MuJoCo's own; the derivative at the identity, where the formula is 0/0, against that of exp."""
    axis = torch.nn.functional.normalize(normal(40, 3), dim=-1)
    real = {"dtype": torch.float64}
    angle = torch.cat(
        [torch.zeros(1, **real), 3.14 * torch.logspace(-12, 0, 19, **real), torch.linspace(-6.2, 6.2, 20, **real)]
    )
    half = angle[:, None] / 2
    q = torch.cat([half.cos(), half.sin() * axis], -1)
    wanted = torch.zeros(40, 3, **real)
    for mine, reference in zip(q.numpy(), wanted.numpy(), strict=True):
        mujoco.mju_quat2Vel(reference, mine, 1.0)
    torch.testing.assert_close(rotation_vector(q), wanted, rtol=1e-12, atol=1e-14)
    slope = torch.func.jacfwd(lambda d: rotation_vector(quaternion_exp(d)))(torch.zeros(3, **real))
    torch.testing.assert_close(slope, torch.eye(3, **real))


@pytest.mark.parametrize("power_", [1.0, 2.0, 3.5])
def test_impedance_rises_from_dmin_to_dmax(power_: float) -> None:
    real = lambda *values: torch.tensor(values, dtype=torch.float64)
    solimp = real(0.2, 0.9, 0.05, 0.3, power_).expand(5, -1)
    found = impedance(real(0.0, 0.015, -0.015, 0.05, 1.0), solimp)
    middle = 0.2 + 0.7 * 0.3  # y(midpoint) = midpoint
    torch.testing.assert_close(found, real(0.2, middle, middle, 0.9, 0.9))
