"""Kernels of MuJoCo's derivatives against the torch program, differences of the engine, and their own identities.

Tolerances: the kernels and the torch program are two programs of the same exact derivatives, written apart (wrenches in
the world against automatic differentiation): they agree to rounding, 1e-11 of the largest entry, through condition
numbers of about 1e3. Central differences at 1e-6 of a converged engine are good to about 1e-6 of the largest entry.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mujoco
import numpy as np
import pytest
import torch
from torch import Tensor

from sim2real.simulators.mujoco_forward import Kind, accelerate
from sim2real.simulators.mujoco_kernels import kernel_products
from sim2real.simulators.mujoco_kernels_model import FIELDS, SOFT, uncovered
from sim2real.simulators.mujoco_products import KernelProducts, torch_products
from sim2real.simulators.mujoco_structure import Structure, nominal_fields, structure

# A floating trunk with an arm on a ball and a leg of hinge and slide; solimp widths put distances inside the ramp.
WORLD = """
<mujoco>
  <option timestep="0.004" integrator="Euler"><flag eulerdamp="{damping}"/></option>
  <default>
    <geom friction="0.8" solimp="0.7 0.95 0.1 0.4 2" solref="0.03 0.9" margin="0.02" condim="3"/>
    <joint damping="0.3" armature="0.02" solimplimit="0.8 0.95 0.2 0.5 2"/>
  </default>
  <worldbody>
    <geom type="plane" size="5 5 1" euler="3 2 0" friction="0.6"/>
    <body name="trunk" pos="0 0 0.4">
      <freejoint/>
      <geom type="capsule" size="0.1" fromto="-0.2 0 0 0.2 0.05 0"/>
      <body name="arm" pos="0.1 0.15 0.05">
        <joint type="ball" stiffness="2" pos="0 -0.02 0"/>
        <geom type="capsule" size="0.05" fromto="0 0 0 0 0.3 -0.1"/>
        <body name="hand" pos="0 0.32 -0.1">
          <joint name="wrist" axis="1 0.3 0" limited="true" range="-20 15" stiffness="1" springref="5"/>
          <geom type="sphere" size="0.07" pos="0 0.05 0"/>
        </body>
      </body>
      <body name="leg" pos="-0.15 0 -0.05">
        <joint name="hip" axis="0 1 0.2" limited="true" range="-40 40"/>
        <joint name="knee" type="slide" axis="0.1 0 1" limited="true" range="-0.05 0.05" stiffness="30"/>
        <geom type="capsule" size="0.06" fromto="0 0 0 0.05 0.02 -0.3"/>
      </body>
    </body>
    <body name="stick" pos="-0.05 0.02 0.58">
      <freejoint/>
      <geom type="capsule" size="0.05" fromto="0 -0.15 0 0 0.15 0"/>
    </body>
    <body name="pebble" pos="0.1 0.02 0.6"><freejoint/><geom type="sphere" size="0.05"/></body>
  </worldbody>
  <actuator>
    <motor joint="wrist" gear="2" ctrlrange="-1 1" ctrllimited="true"/>
    <position joint="hip" kp="20" kv="1" forcerange="-8 8"/>
    <general joint="knee" gainprm="5 1 0.5" gaintype="affine" biastype="affine" biasprm="0.1 -3 -0.2" dyntype="filter"/>
  </actuator>
</mujoco>
"""
Point = tuple[Structure, tuple[Tensor, ...], tuple[Tensor, Tensor]]


def point(
    kind: Kind, names: tuple[str, ...], *, count: int = 13, change: tuple[str, str] = ("", ""), seed: int = 0
) -> Point:
    """Structure, x and y at states that fall and roll on the plane, fields of every environment scaled by its own."""
    text = WORLD.format(damping="disable" if kind == "explicit" else "enable").replace(*change)
    if kind == "implicitfast":
        text = text.replace("Euler", "implicitfast")
    made = structure(mujoco.MjModel.from_xml_string(text))
    model, rng = made.model, np.random.default_rng(0)
    data = mujoco.MjData(model)
    rows: list[list[Any]] = [[], [], [], []]
    for _ in range(count):
        mujoco.mj_resetData(model, data)
        scale = np.r_[np.full(12, 0.2), np.full(model.nv - 12, 0.02)]  # what lies on the trunk stays there
        mujoco.mj_integratePos(model, data.qpos, rng.normal(0, 1, model.nv) * scale, 1.0)
        data.ctrl[:] = rng.uniform(-0.9, 0.9, model.nu)
        for _ in range(rng.integers(10, 90)):
            mujoco.mj_step(model, data)
        for row, array in zip(rows, (data.qpos, data.qvel, data.act, data.ctrl), strict=True):
            row.append(array.copy())
    q, v, act, ctrl = (torch.tensor(np.array(row)) for row in rows)
    fields = []
    for name in names:
        scale = torch.tensor(1 + 0.05 * rng.uniform(-1, 1, count))
        array = nominal_fields(made)[name]
        fields.append(array * scale.reshape(-1, *(1,) * (array.dim() - 1)))
    force = torch.tensor(rng.normal(0, 0.2, (count, model.nv)))
    w, a, _ = accelerate(model, names, kind)((q, v, act, ctrl, force), dict(zip(names, fields, strict=True)))
    return made, (q, torch.zeros_like(v), v, act, ctrl, force, *fields), (w, a)


def random_like(tensors: tuple[Tensor, ...], seed: int) -> tuple[Tensor, ...]:
    rng = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(t.shape, dtype=t.dtype, generator=rng) * t.abs().mean().clamp(min=0.1) for t in tensors)


def kernels(made: Structure, names: tuple[str, ...], kind: Kind) -> KernelProducts:
    found = kernel_products(made, names, kind)
    assert found is not None
    return found


def check_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float = 1e-11) -> None:
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=tolerance * max(float(two.abs().max()), 1e-9))


HARD = tuple(name for name in FIELDS if name not in SOFT)


@pytest.mark.parametrize("kind", ["explicit", "eulerdamp"])
def test_products_equal_those_of_the_torch_program(kind: Kind) -> None:
    made, x, y = point(kind, HARD)
    fast, slow = kernels(made, HARD, kind), torch_products(made, HARD, kind)
    dx = (torch.zeros_like(x[0]), *random_like(x[1:], 1))
    g, h = ((cotangent, torch.zeros_like(cotangent)) for cotangent in random_like((y[0], y[0]), 2))
    wanted = (False, *(True for _ in x[1:]))

    dy, covered = fast.push(x, dx, y)
    assert bool(covered.all())
    check_close(dy, slow.push(x, dx, y))
    found, covered = fast.pull(x, y, g, wanted)
    assert bool(covered.all())
    check_close(found, slow.pull(x, y, g, wanted))
    arguments = (x, dx, y, dy, g, h)
    found, covered = fast.second(arguments, (*wanted, *wanted))
    assert bool(covered.all())
    check_close(found, slow.second(arguments, (*wanted, *wanted)), 1e-10)  # one condition number more


def test_contacts_of_every_kind_are_met() -> None:
    """The states of these tests reach the plane, one another, limits, and both sides of the solimp ramp."""
    made, x, _ = point("explicit", ())
    data = mujoco.MjData(made.model)
    kinds, depths, limits = set(), [], 0
    for q, v in zip(x[0], x[2], strict=True):
        data.qpos[:], data.qvel[:] = q, v
        mujoco.mj_forward(made.model, data)
        kinds |= {tuple(int(made.model.geom_type[g]) for g in pair) for pair in data.contact.geom}
        depths += [float(d) for d in data.contact.dist]
        limits += int((data.efc_type == int(mujoco.mjtConstraint.mjCNSTR_LIMIT_JOINT)).sum())
    plane, sphere, capsule = 0, 2, 3
    assert {(plane, sphere), (plane, capsule), (sphere, capsule), (capsule, capsule)} <= kinds
    assert limits > 0
    assert any(abs(depth - 0.04) < 0.1 for depth in depths)


def test_push_equals_differences_of_the_engine() -> None:
    names = ("body_mass", "geom_friction", "dof_damping")
    made, x, y = point("eulerdamp", names)
    dx = list(random_like(x, 3))
    dx[0], dx[1] = torch.zeros_like(x[0]), torch.zeros_like(x[1])  # the tangent of q is `mj_integratePos`: not here
    (dw, _), covered = kernels(made, names, "eulerdamp").push(x, tuple(dx), y)
    advance = accelerate(made.model, names, "eulerdamp")

    def at(step: float) -> Tensor:
        moved = [a + step * b for a, b in zip(x, dx, strict=True)]
        fields = dict(zip(names, moved[6:], strict=True))
        return advance((moved[0], moved[2], moved[3], moved[4], moved[5]), fields)[0]

    assert bool(covered.all())
    wide, near = (at(1e-5) - at(-1e-5)) / 2e-5, (at(1e-6) - at(-1e-6)) / 2e-6
    smooth = (wide - near).abs().amax(-1) < 1e-5 * near.abs().amax(-1)  # no row switched within the step
    assert int(smooth.sum()) >= 8
    torch.testing.assert_close(dw[smooth], near[smooth], rtol=0, atol=1e-6 * float(near.abs().max()))


def test_shared_arguments_and_threads_change_nothing() -> None:
    made, x, y = point("explicit", ("body_mass",), count=5)
    copies = 601  # enough for two threads, and no multiple of a tile
    many = tuple(t[:1].expand(copies, *t.shape[1:]) for t in x)
    mine = tuple(t[:1].expand(copies, -1).contiguous() for t in y)
    shared = tuple(t[:1] for t in x)
    g = (torch.ones_like(mine[0]), torch.zeros_like(mine[0]))
    fast, wanted = kernels(made, ("body_mass",), "explicit"), (True,) * len(x)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    one, _ = fast.pull(many, mine, g, wanted)
    torch.set_num_threads(threads)
    two, covered = fast.pull(shared, tuple(t[:1] for t in y), g, wanted)
    assert covered.shape == (copies,)
    assert bool(covered.all())
    for first, second in zip(one, two, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, first[:1].expand_as(first))
    assert torch.equal(one[0], torch.zeros_like(one[0]))  # the base has no derivative


def test_results_outlive_calls_of_other_sizes_and_other_threads() -> None:
    """What is kept from call to call is never what an earlier call returned, nor in use by another thread."""
    names = ("body_mass", "dof_damping")
    made, x, y = point("eulerdamp", names)
    fast, wanted = kernels(made, names, "eulerdamp"), (False, *(True for _ in x[1:]))

    def products(rows: slice) -> tuple[Tensor, ...]:
        x_, y_ = tuple(t[rows] for t in x), (y[0][rows], y[1][rows])
        dx = (torch.zeros_like(x_[0]), *random_like(x_[1:], 1))
        g = (random_like(y_[:1], 2)[0], torch.zeros_like(y_[0]))
        (dy, _), (pulled, _) = fast.push(x_, dx, y_), fast.pull(x_, y_, g, wanted)
        return (*dy, *pulled, *fast.second((x_, dx, y_, dy, g, g), (*wanted, *wanted))[0])

    cuts = [slice(0, 13), slice(3, 4), slice(5, 12), slice(0, 3)]
    kept = [products(cut) for cut in cuts]
    copies = [[t.clone() for t in found] for found in kept]
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(products, cuts * 10))
    for k, found in enumerate([*again, *kept]):
        assert all(torch.equal(one, two) for one, two in zip(found, copies[k % len(cuts)], strict=True))


def test_no_environments_give_no_rows() -> None:
    made, x, y = point("explicit", ())
    none = tuple(t[:0] for t in x)
    (dw, da), covered = kernels(made, (), "explicit").push(none, none, (y[0][:0], y[1][:0]))
    assert dw.shape == da.shape == y[0][:0].shape
    assert covered.shape == (0,)


def test_the_mask_refuses_accelerations_of_other_contacts() -> None:
    made, x, (w, a) = point("explicit", ())
    wrong = a.clone()
    wrong[2, 0] += 1e-3
    g = (torch.ones_like(w), torch.zeros_like(w))
    _, covered = kernels(made, (), "explicit").pull(x, (wrong, wrong), g, (False, *(True,) * 5))
    assert covered.tolist() == [k != 2 for k in range(len(w))]


@pytest.mark.parametrize(
    ("inner", "reason"),
    [
        ('<worldbody><geom type="sphere" size="0.1" condim="4"/></worldbody>', "contacts between geoms"),
        ('<worldbody><geom type="box" size="1 1 1"/></worldbody>', "contacts between geoms"),
        ('<equality><connect body1="b" anchor="0 0 0"/></equality>', "equality"),
        ('<tendon><fixed frictionloss="1"><joint joint="j" coef="1"/></fixed></tendon>', "tendon"),
        ('<option><flag gravity="disable"/></option>', "disabled"),
        ('<actuator><motor body="b" joint="f"/></actuator>'.replace(' body="b"', ""), "transmission"),
        ('<contact><pair geom1="g" geom2="h"/></contact>', "pairs"),
    ],
)
def test_what_is_not_covered_is_said_and_left_to_torch(inner: str, reason: str) -> None:
    model = mujoco.MjModel.from_xml_string(
        '<mujoco><worldbody><body name="b"><joint name="j"/><geom name="g" size="0.1"/></body>'
        '<body pos="0 0 1"><freejoint name="f"/><geom name="h" size="0.1"/></body></worldbody>' + inner + "</mujoco>"
    )
    made = structure(model)
    assert reason in str(uncovered(made, (), "explicit"))
    assert kernel_products(made, (), "explicit") is None


def test_fields_and_integrators_that_are_not_covered() -> None:
    made = point("explicit", (), count=1)[0]
    assert "tendon_range" in str(uncovered(made, ("tendon_range",), "explicit"))
    assert "single free bodies" in str(uncovered(made, (), "implicitfast"))
    assert "implicit" in str(uncovered(made, (), "implicit"))


@pytest.mark.slow
def test_implicitfast_takes_the_damping_of_actuators_into_the_step() -> None:
    names = ("dof_damping", "actuator_gear", "actuator_gainprm", "actuator_biasprm", "body_mass")
    lone = WORLD[WORLD.index('<body name="stick"') : WORLD.index("</worldbody>")]
    made, x, y = point("implicitfast", names, change=(lone, ""))
    fast, slow = kernels(made, names, "implicitfast"), torch_products(made, names, "implicitfast")
    dx = (torch.zeros_like(x[0]), *random_like(x[1:], 1))
    g = (torch.ones_like(y[0]), torch.zeros_like(y[0]))
    wanted = (False, *(True,) * (len(x) - 1))
    dy, covered = fast.push(x, dx, y)
    assert bool(covered.all())
    check_close(dy, slow.push(x, dx, y))
    check_close(fast.pull(x, y, g, wanted)[0], slow.pull(x, y, g, wanted))
    arguments = (x, dx, y, dy, g, g)
    check_close(fast.second(arguments, (*wanted, *wanted))[0], slow.second(arguments, (*wanted, *wanted)), 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        ('condim="3"', 'condim="1"'),
        ('0.1 0.4 2"', '0.1 0.4 3"'),
        ('solref="0.03 0.9"', 'solref="-300 -20"'),
        ('size="5 5 1"', 'size="5 5 1" priority="1" solmix="0.2"'),
        ('integrator="Euler"', 'integrator="Euler" cone="elliptic" impratio="3"'),
        ('armature="0.02"', 'armature="0.02" frictionloss="0.4"'),
    ],
    ids=["frictionless", "cubic", "direct", "priority", "elliptic", "dry"],
)
def test_solver_fields_and_laws_of_contacts(change: tuple[str, str]) -> None:
    names = (*sorted(SOFT), "geom_friction", "dof_frictionloss")
    made, x, y = point("explicit", names, change=change)
    fast, slow = kernels(made, names, "explicit"), torch_products(made, names, "explicit")
    dx = (torch.zeros_like(x[0]), *random_like(x[1:], 1))
    g = (torch.ones_like(y[0]), torch.zeros_like(y[0]))
    wanted = (False, *(True,) * (len(x) - 1))
    found, covered = fast.pull(x, y, g, wanted)
    assert bool(covered.all())
    check_close(found, slow.pull(x, y, g, wanted))
    arguments = (x, dx, y, slow.push(x, dx, y), g, g)
    found, covered = fast.second(arguments, (*wanted, *wanted))
    check_close(found, slow.second(arguments, (*wanted, *wanted)), 1e-9)
