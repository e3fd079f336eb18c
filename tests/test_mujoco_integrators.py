"""Integrators and activation dynamics against the engine's own step, quaternion maps against their definitions."""

from __future__ import annotations

import mujoco
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import hessian, jacfwd, jacrev, jvp

from sim2real.simulators.mujoco_forward import (
    SimulationDivergedError,
    accelerate,
    integration,
    principal_axes,
    write_fields,
)
from sim2real.simulators.mujoco_integrators import (
    activation_rate,
    activations,
    add_tangent,
    coordinates,
    engine_step,
    next_activation,
    tangent,
    tangent_rate,
)
from sim2real.simulators.mujoco_quaternions import quaternion_exponential
from sim2real.simulators.mujoco_structure import nominal_fields, structure

ARM = """
<mujoco>
  <option timestep="0.003"/>
  <worldbody>
    <geom type="plane" size="5 5 1"/>
    <body name="base" pos="0 0 0.3">
      <freejoint/><geom type="sphere" size=".1"/>
      <body name="arm" pos="0 0 .2">
        <joint name="ball" type="ball" damping=".1" stiffness="2"/><geom type="capsule" size=".05 .1" pos="0 0 .1"/>
        <body pos="0 0 .3">
          <joint name="hinge" axis="0 1 0" damping=".2"/><geom type="capsule" size=".05 .1" pos="0.1 0 .1"/>
          <body name="tip" pos="0 0 .3">
            <joint name="slide" type="slide" axis="0 0 1" damping=".1"/><geom size=".1"/>
          </body>
        </body>
      </body>
    </body>
  </worldbody>
  <actuator>
    <position joint="hinge" kp="20" kv="1.5" ctrlrange="-.5 .5" ctrllimited="true"/>
    <general joint="slide" gaintype="affine" gainprm="3 1 .2" biastype="affine" biasprm=".1 -2 -.3" dyntype="filter"
             dynprm=".05"/>
    <motor joint="ball" gear="1 .3 -.5"/>
    <general joint="hinge" dyntype="filterexact" dynprm=".03" gainprm="2" biastype="affine" biasprm="0 -2 0"
             actearly="true"/>
    <general joint="slide" dyntype="integrator" actlimited="true" actrange="-.2 .2" gainprm="3"/>
    {muscles}
  </actuator>
</mujoco>
"""
MUSCLES = """
    <general joint="hinge" dyntype="muscle" dynprm=".01 .04 0" gainprm="1"/>
    <general joint="hinge" dyntype="muscle" dynprm=".01 .04 .3" gainprm="1"/>
"""
INTEGRATORS = {name: getattr(mujoco.mjtIntegrator, f"mjINT_{name}") for name in ("EULER", "RK4", "IMPLICIT")}
INTEGRATORS["IMPLICITFAST"] = mujoco.mjtIntegrator.mjINT_IMPLICITFAST


def _model(integrator: str, muscles: str = MUSCLES) -> mujoco.MjModel:
    model = mujoco.MjModel.from_xml_string(ARM.format(muscles=muscles))
    model.opt.integrator = INTEGRATORS[integrator]
    return structure(model).model


def _states(model: mujoco.MjModel, count: int) -> list[tuple[np.ndarray, ...]]:
    """(q, v, act, ctrl) of running simulations, some on the floor."""
    rng, data, found = np.random.default_rng(0), mujoco.MjData(model), []
    for _ in range(count):
        mujoco.mj_resetData(model, data)
        mujoco.mj_integratePos(model, data.qpos, rng.normal(0, 0.2, model.nv), 1.0)
        data.qvel[:] = rng.normal(0, 1.0, model.nv)
        for _ in range(40):
            data.ctrl[:] = rng.normal(0, 0.6, model.nu)
            mujoco.mj_step(model, data)
        found.append(tuple(x.copy() for x in (data.qpos, data.qvel, data.act, data.ctrl)))
    return found


def _engine(model: mujoco.MjModel, state: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    data = mujoco.MjData(model)
    data.qpos[:], data.qvel[:], data.act[:], data.ctrl[:] = state
    mujoco.mj_step(model, data)
    return data.qpos, data.qvel, data.act


@pytest.mark.parametrize("integrator", sorted(INTEGRATORS))
def test_a_step_is_the_engines_own(integrator: str) -> None:
    model = _model(integrator)
    states = _states(model, 6)
    scheme, kind = integration(model)
    engine = accelerate(model, (), kind)
    q, v, act, ctrl = (torch.tensor(np.stack(column)) for column in zip(*states, strict=True))
    following = engine_step(
        coordinates(model),
        activations(model),
        lambda *state: engine((*state, torch.zeros_like(v)), {})[0],
        (q, v, act),
        ctrl,
        torch.tensor(model.actuator_dynprm)[None],
        scheme=scheme,
    )
    for row, state in enumerate(states):
        for ours, theirs in zip(following, _engine(model, state), strict=True):
            # rounding: a few ulp of the numbers, of velocities up to 30 after four stages of stiff contacts
            np.testing.assert_allclose(ours[row].numpy(), theirs, rtol=1e-14, atol=1e-13)


def test_the_rate_of_the_tangent_vector_gives_the_velocity() -> None:
    """q (+) u with du/dt = tangent_rate(u, v) turns with the body-frame velocity v: vec(conj(q) dq/dt) = v / 2."""
    table = coordinates(_model("EULER"))
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(4, len(table.order_q), generator=generator, dtype=torch.float64)
    for size in (1e-9, 1e-2, 0.1, 1.0, 2.5):  # series and closed form
        u = size * torch.randn(4, len(table.order_v), generator=generator, dtype=torch.float64)
        v = torch.randn(u.shape, generator=generator, dtype=torch.float64)
        moved, rate = jvp(lambda u: add_tangent(table, q, u), (u,), (tangent_rate(table, u, v),))[:2]
        along = jvp(lambda x, at=moved: tangent(table, at + x)[1], (torch.zeros_like(q),), (rate,))[1]
        torch.testing.assert_close(along, v, rtol=1e-12, atol=1e-12)


def test_the_tangent_vector_has_the_derivatives_of_the_logarithm() -> None:
    """d(q (+) u) = u to third order at u = 0, the base held; d itself is zero."""
    table = coordinates(_model("EULER"))
    q = torch.randn(1, len(table.order_q), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert tangent(table, q)[1].abs().max() < 1e-15  # rounding of fused products
    back = lambda u: tangent(table, add_tangent(table, q, u))[1][0]
    u = torch.zeros(1, len(table.order_v), dtype=torch.float64)
    n = u.shape[1]
    for jacobian in (jacrev(back)(u), jacfwd(back)(u)):
        torch.testing.assert_close(jacobian.reshape(n, n), torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-14)
    second = jacfwd(jacrev(back))(u)
    assert second.abs().max() < 1e-14


@pytest.mark.parametrize("size", [0.0, 1e-6, 0.09, 0.11, 3.0])
def test_the_exponential_is_that_of_the_engine_and_smooth(size: float) -> None:
    x = size * torch.tensor([0.6, -0.64, 0.48], dtype=torch.float64)  # a unit direction
    q = np.array([1.0, 0, 0, 0])
    mujoco.mju_quatIntegrate(q, x.numpy(), 1.0)
    np.testing.assert_allclose(quaternion_exponential(x).numpy(), q, rtol=0, atol=2e-16)
    torch.autograd.gradgradcheck(quaternion_exponential, x.requires_grad_(), rtol=1e-6, atol=1e-8)


def test_second_derivatives_of_the_exponential_at_zero() -> None:
    """exp(x) = (1 - |x|^2/8, x/2) to second order."""
    H = hessian(quaternion_exponential)(torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(H[0], -0.25 * torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-16)
    assert H[1:].abs().max() == 0.0


def test_activation_dynamics_are_those_of_the_engine() -> None:
    model = _model("EULER")
    table = activations(model)
    dynprm = torch.tensor(model.actuator_dynprm)[None]
    data, rng = mujoco.MjData(model), np.random.default_rng(3)
    for _ in range(20):
        data.act[:], data.ctrl[:] = rng.uniform(-0.3, 1.2, model.na), rng.uniform(-2, 2, model.nu)
        mujoco.mj_forward(model, data)
        act, ctrl = torch.tensor(data.act)[None], torch.tensor(data.ctrl)[None]
        rate = activation_rate(table, act, ctrl, dynprm)
        np.testing.assert_allclose(rate[0].numpy(), data.act_dot, rtol=1e-14)
        following = next_activation(table, act, rate, dynprm)
        mujoco.mj_step(model, data)
        np.testing.assert_allclose(following[0].numpy(), data.act, rtol=1e-14, atol=1e-15)


def test_fields_per_environment_reach_the_engine() -> None:
    """Each row of the pool equals a model with that row's fields, the inertia matrix turned by its principal axes."""
    model = _model("IMPLICITFAST", muscles="")
    tables, count = structure(model), 3
    names = ("body_mass", "body_inertia", "body_ipos", "gravity", "dof_damping", "geom_friction")
    generator = torch.Generator().manual_seed(2)
    scale = 1.0 + 0.2 * torch.rand(count, 1, generator=generator, dtype=torch.float64)
    nominal = nominal_fields(tables)
    fields = {name: nominal[name] * scale.reshape(count, *[1] * (nominal[name].ndim - 1)) for name in names}
    fields["body_inertia"][..., 3:] += 0.1 * fields["body_inertia"][..., :1]
    q, v, act, ctrl = (torch.tensor(np.stack(x)) for x in zip(*_states(tables.model, count), strict=True))
    w, a, residual = accelerate(tables.model, names, "implicitfast")((q, v, act, ctrl, torch.zeros_like(v)), fields)
    assert residual.max() < 1e-12
    for row in range(count):
        alone, data = structure(model).model, mujoco.MjData(model)
        write_fields(alone, {name: value[row].numpy() for name, value in fields.items()})
        data.qpos[:], data.qvel[:], data.act[:], data.ctrl[:] = (x[row].numpy() for x in (q, v, act, ctrl))
        mujoco.mj_step(alone, data)
        np.testing.assert_allclose((v + model.opt.timestep * w)[row].numpy(), data.qvel, rtol=1e-13, atol=1e-13)
        np.testing.assert_allclose(a[row].numpy(), data.qacc, rtol=1e-10, atol=1e-10)


def test_principal_axes_rebuild_the_inertia() -> None:
    rng = np.random.default_rng(4)
    root = rng.normal(size=(50, 3, 3))
    full = root @ root.transpose(0, 2, 1)
    six = full[:, [0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]]
    moments, quaternion = principal_axes(six)
    turn = np.empty((50, 9))
    for row in range(50):
        mujoco.mju_quat2Mat(turn[row], quaternion[row])
    axes = turn.reshape(50, 3, 3)
    np.testing.assert_allclose(axes * moments[:, None] @ axes.transpose(0, 2, 1), full, atol=1e-13)


def test_a_state_that_is_not_finite_raises() -> None:
    model = _model("EULER", muscles="")
    q, v, act, ctrl = (torch.tensor(np.stack(x)) for x in zip(*_states(model, 3), strict=True))
    v[1, 0] = float("nan")
    with pytest.raises(SimulationDivergedError, match=r"1 of 3 environments.*\[1\]"):
        accelerate(model, (), "eulerdamp")((q, v, act, ctrl, torch.zeros_like(v)), {})


def test_the_pool_keeps_few_batches_and_gives_the_same() -> None:
    model = _model("EULER", muscles="")
    engine = accelerate(model, (), "explicit", threads=2)
    q, v, act, ctrl = (torch.tensor(np.stack(x)) for x in zip(*_states(model, 6), strict=True))
    whole = engine((q, v, act, ctrl, torch.zeros_like(v)), {})[1]
    for count in (1, 2, 3, 4, 5, 6):
        rows: tuple[Tensor, ...] = tuple(x[:count] for x in (q, v, act, ctrl, torch.zeros_like(v)))
        assert torch.equal(engine(rows, {})[1], whole[:count])
