"""Names of theta against MuJoCo's own numbers: fields, units, bounds, derivatives, weights, and XML."""

import copy
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import pytest
import torch
from torch import Tensor

from sim2real.bounds import Box, contains, default_params
from sim2real.params import Params
from sim2real.simulators.mujoco_inertia import inertia_matrix, log_cholesky, pseudo_inertia
from sim2real.simulators.mujoco_parameters import Parameter, ParameterNameError, field_map, parameter_model
from sim2real.simulators.mujoco_structure import Structure, nominal_fields, structure
from sim2real.simulators.mujoco_writer import XmlWriteError, save_xml

ARM = """
<mujoco>
  <compiler angle="degree" inertiafromgeom="true"/>
  <option timestep="0.002" integrator="implicitfast"/>
  <default><geom friction="0.8 0.01 0.002"/><default class="stiff"><joint stiffness="3" springref="20"/></default></default>
  <worldbody>
    <geom name="floor" type="plane" size="5 5 1"/>
    <body name="base" pos="0 0 1">
      <joint name="shoulder" class="stiff" damping="0.3" armature="0.01" axis="0 1 0" range="-100 90" limited="true"/>
      <geom type="capsule" fromto="0 0 0 0.3 0 0" size="0.03"/>
      <body name="fore" pos="0.3 0 0">
        <joint name="elbow" damping="0.2" axis="0 1 0" frictionloss="0.05"/>
        <geom type="box" size="0.1 0.02 0.03" pos="0.1 0 0.01"/>
        <body name="hand" pos="0.2 0 0"><joint name="wrist" type="ball" damping="0.1"/><geom size="0.04" pos="0.02 0 0"/></body>
      </body>
    </body>
    <body name="ball" pos="1 0 0.1"><freejoint name="root"/><geom name="ball" size="0.1"/></body>
    <body name="rail" pos="0 2 1"><joint name="slider" type="slide" axis="1 0 0" armature="0.1"/><geom size="0.05"/></body>
  </worldbody>
  <tendon><fixed name="cord" stiffness="2" damping="0.1"><joint joint="shoulder" coef="0.5"/><joint joint="elbow" coef="1"/></fixed></tendon>
  <equality><joint name="gear" joint1="slider" joint2="elbow" polycoef="0 0.1 0 0 0"/></equality>
  <actuator>
    <position name="hold" joint="shoulder" kp="12" kv="0.7"/>
    <velocity name="spin" joint="elbow" kv="0.4"/>
    <general name="lag" joint="slider" dyntype="filter" dynprm="0.05" gainprm="2"/>
  </actuator>
</mujoco>
"""  # noqa: E501


@pytest.fixture(scope="module")
def tables() -> Structure:
    return structure(parameter_model(ARM, ["base.com", "fore.com", "hand.com", "ball.com", "rail.com"]))


def moved(tables: Structure, spec: Any, changes: Params, **more: Any) -> dict[str, Tensor]:
    box, fields = field_map(tables, spec, **more)
    assert set(changes) <= set(box.default)
    return fields(default_params(box) | changes)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


# each: name, what it is in the compiled model (index into the array), its value there, its unit
READ = [
    ("hand.mass", "body_mass", (3,), "kg"),
    ("fore.com", "body_ipos", (2,), "m"),
    ("fore.com.z", "body_ipos", (2, 2), "m"),
    ("shoulder.damping", "dof_damping", (0,), "N m s/rad"),
    ("wrist.damping", "dof_damping", (2,), "N m s/rad"),
    ("slider.armature", "dof_armature", (11,), "kg"),
    ("elbow.frictionloss", "dof_frictionloss", (1,), "N m"),
    ("shoulder.stiffness", "jnt_stiffness", (0,), "N m/rad"),
    ("shoulder.spring_reference", "qpos_spring", (0,), "rad"),
    ("shoulder.range.high", "jnt_range", (0, 1), "rad"),
    ("shoulder.limit_solref", "jnt_solref", (0,), "s, 1"),
    ("elbow.friction_solimp", "dof_solimp", (1,), "1"),
    ("floor.friction", "geom_friction", (0,), "1, m, m"),
    ("floor.friction.slide", "geom_friction", (0, 0), "1"),
    ("geom:ball.solref.time_constant", "geom_solref", (4, 0), "s"),
    ("geom@2.solimp", "geom_solimp", (2,), "1"),
    ("hold.gear", "actuator_gear", (0, 0), "1"),
    ("hold.kp", "actuator_gainprm", (0, 0), "N m/rad"),
    ("spin.kv", "actuator_gainprm", (1, 0), "N m s/rad"),
    ("lag.time_constant", "actuator_dynprm", (2, 0), "s"),
    ("cord.stiffness", "tendon_stiffness", (0,), "N/m"),
    ("gear.solref", "eq_solref", (0,), "s, 1"),
    ("gravity", "gravity", (), "m/s^2"),
    ("gravity.z", "gravity", (2,), "m/s^2"),
]


@pytest.mark.parametrize(("name", "field", "index", "unit"), READ)
def test_a_name_is_the_number_mujoco_has(
    tables: Structure, name: str, field: str, index: tuple[int, ...], unit: str
) -> None:
    box, fields = field_map(tables, [name])
    model = tables.model
    array = model.opt.gravity if field == "gravity" else getattr(model, field)
    expected = torch.as_tensor(np.array(array[index], dtype=np.float64))
    default = torch.as_tensor(box.default[name], dtype=torch.float64)
    torch.testing.assert_close(default, expected, rtol=0, atol=0)
    assert box.unit[name] == unit
    assert contains(box, default_params(box))
    nominal, changed = nominal_fields(tables), fields({name: 1.5 * default + 0.001})
    assert field in changed
    for key, value in changed.items():
        assert value.shape == nominal[key].shape
    assert (changed[field][0][index] - (1.5 * expected + 0.001)).abs().max() < 1e-15
    # nothing else moved: as many numbers differ as the name has (a ball's three degrees share their damping)
    differ = sum(int((value != nominal[key]).sum()) for key, value in changed.items())
    assert differ == {"wrist.damping": 3, "hold.kp": 2, "spin.kv": 2}.get(name, default.numel())


def test_a_servo_moves_gain_and_bias_together(tables: Structure) -> None:
    fields = moved(tables, ["hold.kp", "hold.kv", "spin.kv"], {"hold.kp": number(20.0), "hold.kv": number(1.5)})
    assert fields["actuator_gainprm"][0, 0, 0] == 20.0
    assert fields["actuator_biasprm"][0, 0, :3].tolist() == [0.0, -20.0, -1.5]
    assert fields["actuator_gainprm"][0, 1, 0] == 0.4


def test_one_entry_may_set_or_scale_many(tables: Structure) -> None:
    spec = {
        "grip": Parameter(targets=("floor.friction.slide", "geom:ball.friction.slide")),
        "damping": Parameter(targets=("*.damping",), scale=True),
        "weight": Parameter(targets=("*.mass", "*.inertia"), scale=True, low=0.5, high=2.0),
    }
    fields = moved(tables, spec, {"grip": number(1.1), "damping": number(2.0), "weight": number(1.25)})
    nominal = nominal_fields(tables)
    assert fields["geom_friction"][0, [0, 4], 0].tolist() == [1.1, 1.1]
    torch.testing.assert_close(fields["dof_damping"], 2.0 * nominal["dof_damping"])
    torch.testing.assert_close(fields["tendon_damping"], 2.0 * nominal["tendon_damping"])
    torch.testing.assert_close(fields["body_inertia"], 1.25 * nominal["body_inertia"])
    # one entry sets, another scales the same number: first set, then scaled
    both = {"shoulder.damping": None, "all": Parameter(targets=("*.damping",), scale=True)}
    fields = moved(tables, both, {"shoulder.damping": number(0.5), "all": number(3.0)})
    assert fields["dof_damping"][0, 0] == 1.5


def test_values_per_environment(tables: Structure) -> None:
    spec = ["hand.mass", "floor.friction", "ball.pseudo_inertia"]
    box, fields = field_map(tables, spec)
    theta = default_params(box)
    batch = {name: torch.stack([value, value + 0.1, value + 0.2]) for name, value in theta.items()}
    together = fields(batch)
    for k in range(3):
        alone = fields({name: value[k] for name, value in batch.items()})
        for key, value in together.items():
            torch.testing.assert_close(value[k : k + 1], alone[key], rtol=0, atol=0)
    mixed = fields(theta | {"hand.mass": batch["hand.mass"]})
    assert mixed["body_mass"].shape == (3, tables.model.nbody)
    assert mixed["geom_friction"].shape[0] == 1
    with pytest.raises(ValueError, match=r"theta\['floor.friction'\] is \(2,\), expected \(3,\)"):
        fields(theta | {"floor.friction": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"theta lacks 'hand.mass'"):
        fields({})


def test_derivatives_of_both_orders(tables: Structure) -> None:
    spec = {
        "fore.pseudo_inertia": None,
        "hand.mass": None,
        "hold.kp": None,
        "s": Parameter(targets=("*.armature",), scale=True),
    }
    box, fields = field_map(tables, spec, weights="moving")
    theta = default_params(box)
    names = list(theta)

    def output(*values: Tensor) -> Tensor:
        found = fields(dict(zip(names, values, strict=True)))
        flat = torch.cat([value.flatten() for value in found.values()])
        return (flat.sin() * torch.arange(1, len(flat) + 1).sqrt()).sum()

    leaves = tuple(value.clone().requires_grad_() for value in theta.values())
    # fast mode compares along random directions; central differences of step 1e-6 in float64
    assert torch.autograd.gradcheck(output, leaves, atol=1e-6, rtol=1e-5, fast_mode=True)
    assert torch.autograd.gradgradcheck(output, leaves, atol=1e-5, rtol=1e-4, fast_mode=True)
    values = tuple(x.detach() for x in leaves)
    forward = torch.func.jvp(output, values, tuple(map(torch.ones_like, values)))[1]
    backward = torch.autograd.grad(output(*leaves), leaves)
    torch.testing.assert_close(forward, torch.stack([part.sum() for part in backward]).sum())


def test_pseudo_inertia_is_always_a_body(tables: Structure) -> None:
    nominal = nominal_fields(tables)
    for body in range(1, tables.model.nbody):
        mass, com, six = (nominal[key][0, body] for key in ("body_mass", "body_ipos", "body_inertia"))
        back = pseudo_inertia(log_cholesky(mass, com, six))
        torch.testing.assert_close(back, torch.cat([mass[None], com, six]), rtol=1e-13, atol=1e-16)
    random = torch.randn(200, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = pseudo_inertia(random)
    assert bool((found[:, 0] > 0).all())
    moments = torch.linalg.eigvalsh(inertia_matrix(found[:, 4:]))
    # the triangle inequality of principal moments, which positive mass obeys; 1e-12: rounding of the eigenvalues
    assert bool((moments[:, 2] <= (moments[:, 0] + moments[:, 1]) * (1 + 1e-12)).all())
    assert bool((moments[:, 0] > 0).all())
    # against the definition: J = U U' (eq. 9 to 12 of the paper), by hand for one vector
    a, d, s, t = random[0, 0], random[0, 1:4], random[0, 4:7], random[0, 7:]
    root = torch.diag(torch.cat([d.exp(), torch.ones(1).double()]))
    root[0, 1], root[1, 2], root[0, 2] = s[0], s[1], s[2]
    root[:3, 3] = t
    pseudo = a.exp() ** 2 * root @ root.T
    assert torch.allclose(pseudo[3, 3], found[0, 0])
    assert torch.allclose(pseudo[:3, 3] / pseudo[3, 3], found[0, 1:4])
    about = pseudo[:3, :3] - pseudo[3, 3] * torch.outer(t, t)
    assert torch.allclose(about.trace() * torch.eye(3).double() - about, inertia_matrix(found[0, 4:]))


def test_a_rod_has_no_pseudo_inertia() -> None:
    rod = (
        "<mujoco><worldbody><body name='rod'><joint/><inertial pos='0 0 0' mass='1' diaginertia='1 1 1e-13'/></body>"
        "</worldbody></mujoco>"
    )
    tables = structure(parameter_model(rod, ["rod.mass"]))
    with pytest.raises(ParameterNameError, match=r"'rod.pseudo_inertia': .* is no body of positive density"):
        field_map(tables, ["rod.pseudo_inertia"])


def test_moving_weights_are_those_of_set_const(tables: Structure) -> None:
    names = ["hand.mass", "fore.com", "ball.inertia", "slider.armature", "base.pseudo_inertia", "cord.armature"]
    box, fields = field_map(tables, names, weights="moving")
    generator = torch.Generator().manual_seed(1)
    theta = {
        key: value + 0.1 * torch.rand(value.shape, generator=generator, dtype=torch.float64)
        for key, value in default_params(box).items()
    }
    theta["ball.inertia"] = default_params(box)["ball.inertia"] * 1.3
    found, model = fields(theta), copy.copy(tables.model)
    for name in ("body_mass", "body_ipos", "dof_armature", "tendon_armature"):
        getattr(model, name)[:] = found[name][0].numpy()
    for body in range(1, model.nbody):
        moments, axes = np.linalg.eigh(inertia_matrix(found["body_inertia"][0, body]).numpy())
        model.body_inertia[body] = moments
        mujoco.mju_mat2Quat(model.body_iquat[body], (axes * np.sign(np.linalg.det(axes))).reshape(-1))
    mujoco.mj_setConst(model, mujoco.MjData(model))
    for name in ("body_invweight0", "dof_invweight0", "tendon_invweight0"):
        assert not np.allclose(getattr(tables.model, name), found[name][0], rtol=1e-3)
        # both solve with the same M by a Cholesky factor: rounding only
        np.testing.assert_allclose(found[name][0], getattr(model, name), rtol=1e-11)
    # frozen: the weights are no part of the fields, the model's own stay
    frozen = field_map(tables, names)[1](theta)
    assert not {"body_invweight0", "dof_invweight0", "tendon_invweight0"} & set(frozen)
    # and nothing moves them where theta reaches no inertia
    assert set(moved(tables, ["elbow.damping"], {}, weights="moving")) == {"dof_damping"}


def test_simple_bodies_are_compiled_so_that_inertia_counts() -> None:
    free = "<mujoco><worldbody><body name='ball'><freejoint/><geom size='0.1'/></body></worldbody></mujoco>"
    assert mujoco.MjModel.from_xml_string(free).body_simple[1] == 1
    assert parameter_model(free, ["gravity"]).body_simple[1] == 1
    assert parameter_model(free, ["ball.com"]).body_simple[1] == 0
    spec = mujoco.MjSpec.from_string(free)
    assert parameter_model(spec, ["ball.mass"]).body_simple[1] == 0
    assert spec.compile().body_simple[1] == 1  # the caller's spec is not touched


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (["hnd.mass"], r"'hnd.mass': the model has no such element; did you mean 'hand.mass'"),
        (["hand.mas"], r"a body has no 'mas'; did you mean 'mass'"),
        (["shoulder.friction"], r"a joint has no 'friction'.*it has damping"),
        (["hand"], r"the model has no such element.*write ELEMENT.PROPERTY"),
        (["hand.mass.x"], r"'mass' has no components"),
        (["gravity.w"], r"'gravity' has the components \['x', 'y', 'z'\]"),
        (["fore.pseudo_inertia.3"], r"the ten numbers of pseudo_inertia go together"),
        (["lag.kp"], r"the actuator is no position servo; use gain and bias"),
        (["lag.kv"], r"no position or velocity servo"),
        (["hold.time_constant"], r"the actuator has no filter"),
        (["wrist.spring_reference"], r"only hinge and slide joints"),
        (["*_hip.mass"], r"'\*_hip.mass' matches no element"),
        (["*.damping", "elbow.damping"], r"'elbow.damping' and '\*.damping' both set dof_damping"),
        (["hand.pseudo_inertia", "hand.mass"], r"both set body_mass"),
        ({"x": Parameter(("hand.pseudo_inertia",), scale=True)}, r"scales pseudo_inertia"),
        ({"x": Parameter(("hand.mass", "hand.com"))}, r"of different lengths; split it"),
        ({"hand.mass": (5.0, 9.0)}, r"theta\['hand.mass'\] starts at .* kg, outside its bounds \(5, 9\)"),
        ({"hand.mass": 3.0}, r"expected a Parameter, \(low, high\) or None"),
        ({"hand.mass": ("light", "heavy")}, r"theta\['hand.mass'\] = .*: bounds must be numbers"),
        ({"hand.com": Parameter(default=(0.0, 1.0))}, r"theta\['hand.com'\] has 3 numbers, its default \[0.0, 1.0\]"),
        ([], r"theta names no parameter"),
        ("hand.mass", r"theta is the text 'hand.mass'"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(tables: Structure, spec: Any, message: str) -> None:
    with pytest.raises(ParameterNameError, match=message):
        field_map(tables, spec)


def test_two_elements_of_one_name_are_told_apart() -> None:
    twins = """<mujoco><worldbody><body><joint name="x" stiffness="1" damping="1"/><geom size="1"/></body></worldbody>
    <tendon><fixed name="x" stiffness="2"><joint joint="x" coef="1"/></fixed></tendon></mujoco>"""
    tables = structure(parameter_model(twins, ["joint:x.stiffness"]))
    with pytest.raises(
        ParameterNameError, match=r"means several things; write joint:x.stiffness or tendon:x.stiffness"
    ):
        field_map(tables, ["x.stiffness"])
    assert field_map(tables, ["tendon:x.stiffness"])[0].default["tendon:x.stiffness"] == 2.0
    with pytest.raises(ValueError, match="weights must be 'frozen' or 'moving'"):
        field_map(tables, ["x.damping"], weights="thawed")


def test_bounds_defaults_and_the_delay(tables: Structure) -> None:
    spec = {"hand.mass": (0.01, 5.0), "delay": None, "floor.friction": Parameter(default=(1.0, 0.02, 0.01))}
    box, fields = field_map(tables, spec)
    assert (box.low["hand.mass"], box.high["hand.mass"]) == (0.01, 5.0)
    assert (box.low["delay"], box.high["delay"], box.unit["delay"]) == (0.0, 0.1, "s")
    assert set(fields(default_params(box))) == {"body_mass", "geom_friction"}
    assert fields(default_params(box))["geom_friction"][0, 0].tolist() == [1.0, 0.02, 0.01]


# --- written back


WRITTEN = {
    "hand.pseudo_inertia": None,
    "fore.mass": None,
    "damping": Parameter(targets=("*.damping",), scale=True),
    "shoulder.spring_reference": None,
    "shoulder.range": None,
    "elbow.frictionloss": None,
    "floor.friction": None,
    "geom:ball.solref": None,
    "hold.kp": None,
    "lag.time_constant": None,
    "gear.solimp": None,
    "gravity": None,
    "delay": None,
}


def test_a_component_has_its_own_unit(tables: Structure) -> None:
    names = ["floor.friction", "geom:ball.friction.slide", "geom:ball.friction.roll", "geom:ball.solref.time_constant"]
    box, _ = field_map(tables, names)
    assert [box.unit[name] for name in names] == ["1, m, m", "1", "m", "s"]


def perturbed(box: Box) -> Params:
    generator = torch.Generator().manual_seed(2)
    theta = default_params(box)
    return {k: v + 0.05 * torch.rand(v.shape, generator=generator, dtype=torch.float64) for k, v in theta.items()}


@pytest.mark.parametrize("weights", ["frozen", "moving"])
def test_the_identified_xml_reads_back_the_same(tmp_path: Path, weights: Any) -> None:
    tables = structure(parameter_model(ARM, WRITTEN))
    box, fields = field_map(tables, WRITTEN, weights=weights)
    theta = perturbed(box)
    path = tmp_path / "arm.xml"
    save_xml(path, ARM, WRITTEN, theta, weights=weights)
    again = structure(parameter_model(path, WRITTEN))
    found, wanted = nominal_fields(again), nominal_fields(tables) | fields(theta)
    for name, value in wanted.items():
        # one rounding of 17 digits, and of degrees to radians
        scale = float(value.abs().max()) if value.numel() else 0.0
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12 * scale)
    # theta read back from the file is the theta written, and the rollout is the one of the fields
    for name, value in default_params(field_map(again, WRITTEN)[0]).items():
        if name != "damping":  # a scale starts at 1 again
            torch.testing.assert_close(value, theta[name], rtol=1e-9, atol=1e-12)
    assert np.allclose(states(again.model), states(edited(tables.model, wanted)), rtol=0, atol=1e-9)
    if weights == "moving":  # nothing of ours is needed to read it
        plain = mujoco.MjModel.from_xml_path(str(path))
        np.testing.assert_allclose(plain.dof_invweight0, wanted["dof_invweight0"][0], rtol=1e-11)
        assert mujoco.mj_name2id(plain, mujoco.mjtObj.mjOBJ_NUMERIC, "sim2real_delay") >= 0


def edited(model: mujoco.MjModel, fields: dict[str, Tensor]) -> mujoco.MjModel:
    """The model with every field set by hand."""
    model = copy.copy(model)
    for name, value in fields.items():
        if name == "gravity":
            model.opt.gravity[:] = value[0].numpy()
        elif name != "body_inertia":
            getattr(model, name)[:] = value[0].numpy()
    for body in range(1, model.nbody):
        moments, axes = np.linalg.eigh(inertia_matrix(fields["body_inertia"][0, body]).numpy())
        model.body_inertia[body] = moments
        mujoco.mju_mat2Quat(model.body_iquat[body], (axes * np.sign(np.linalg.det(axes))).reshape(-1))
    return model


def states(model: mujoco.MjModel) -> np.ndarray:
    data, rows = mujoco.MjData(model), []
    data.qvel[:] = 0.3
    for k in range(60):  # 0.12 s: long enough for ball contact and limits, too short for chaos to magnify rounding
        data.ctrl[:] = [np.sin(0.1 * k), 0.5, 0.2]
        mujoco.mj_step(model, data)
        rows.append(np.concatenate([data.qpos, data.qvel]))
    return np.array(rows)


def test_meshes_are_written_beside_and_trouble_is_named(tmp_path: Path) -> None:
    obj = b"v 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nf 1 3 2\nf 1 2 4\nf 1 4 3\nf 2 3 4\n"
    (tmp_path / "meshes").mkdir()
    (tmp_path / "meshes" / "m.obj").write_bytes(obj)
    body = "<body name='m'><freejoint/><geom type='mesh' mesh='m'/></body>"
    mesh = (
        "<mujoco><compiler meshdir='meshes'/><asset><mesh name='m' file='m.obj'/></asset>"
        f"<worldbody>{body}</worldbody></mujoco>"
    )
    (tmp_path / "mesh.xml").write_text(mesh)
    out = tmp_path / "deep" / "out.xml"
    out.parent.mkdir()
    theta = {"m.mass": number(3.0)}
    save_xml(out, tmp_path / "mesh.xml", ["m.mass"], theta)
    assert (out.parent / "meshes" / "m.obj").read_bytes() == obj
    assert parameter_model(out, ["m.mass"]).body_mass[1] == 3.0
    with pytest.raises(ValueError, match="one value per environment"):
        save_xml(out, tmp_path / "mesh.xml", ["m.mass"], {"m.mass": torch.ones(2)})
    (out.parent / "meshes" / "m.obj").write_text("mine")
    with pytest.raises(XmlWriteError, match=r"its 'meshes/m.obj' would replace another file"):
        save_xml(out, tmp_path / "mesh.xml", ["m.mass"], theta)
    (out.parent / "meshes" / "m.obj").write_bytes(obj)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "mesh.xml").write_text(mesh.replace("meshdir='meshes'", "meshdir='../meshes'"))
    with pytest.raises(XmlWriteError, match="lies outside"):
        save_xml(out, tmp_path / "sub" / "mesh.xml", ["m.mass"], theta, folder=tmp_path)
    before = out.read_bytes()
    with pytest.raises((XmlWriteError, ValueError)):
        save_xml(out, tmp_path / "mesh.xml", ["m.mass"], {"m.mass": number(-1.0)})
    assert out.read_bytes() == before
