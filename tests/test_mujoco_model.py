"""MuJoCo as a model MDP: closed forms, differences of the engine, torch.func, rollouts, settings and refusals."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import mujoco
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from sim2real.bounds import default_params
from sim2real.estimators.pathwise import pathwise_gradient
from sim2real.estimators.score_function import score_function_gradient
from sim2real.mdp import ModelMDP, sample_noise
from sim2real.outside_program import DerivativeOrderError
from sim2real.params import Params
from sim2real.policy import linear_policy
from sim2real.rollout import expected_return
from sim2real.simulators.double_pendulum import double_pendulum
from sim2real.simulators.mujoco_acceleration import split_products
from sim2real.simulators.mujoco_coverage import MujocoUnsupportedError
from sim2real.simulators.mujoco_forward import SimulationDivergedError
from sim2real.simulators.mujoco_messages import MujocoWarning, engine_messages
from sim2real.simulators.mujoco_model import action_box, mujoco_model
from sim2real.simulators.mujoco_products import KernelProducts, torch_products
from sim2real.simulators.mujoco_report import rollout_report
from sim2real.simulators.mujoco_step import GradientGuard
from sim2real.simulators.mujoco_system import MujocoSystem, body_poses, mujoco_system, split_state
from sim2real.simulators.pendulum import pendulum
from sim2real.solve_report import UnconvergedError, UnconvergedWarning

BALL = """
<mujoco>
  <option timestep="0.004" integrator="{integrator}" cone="{cone}"/>
  <worldbody>
    <geom name="floor" type="plane" size="5 5 1"/>
    <body name="ball" pos="0 0 .095">
      <freejoint name="root"/>
      <geom name="skin" type="sphere" size=".1" friction="1.5 .01 .01" solimp=".8 .95 .02 .5 2"/>
      <body name="link" pos=".15 0 0">
        <joint name="elbow" axis="0 1 0" damping=".1"/>
        <geom type="capsule" size=".05" fromto="0 0 0 .2 0 0" solimp=".8 .95 .02 .5 2"/>
      </body>
    </body>
  </worldbody>
  <actuator><motor name="drive" joint="elbow" ctrllimited="true" ctrlrange="-1 1"/></actuator>
</mujoco>
"""
THETA = ("ball.mass", "elbow.damping", "skin.friction.slide", "gravity.z")
GYM = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"


def _none(theta: Params, s: Tensor, a: Tensor, e: Tensor, following: Tensor) -> Tensor:
    return s.new_zeros(len(s))


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _ball(integrator: str = "Euler", cone: str = "pyramidal", **settings: Any) -> ModelMDP:
    spec = mujoco.MjSpec.from_string(BALL.format(integrator=integrator, cone=cone))
    theta = settings.pop("theta", THETA)
    return mujoco_model(spec, theta, _none, **{"initial_std": (0.02, 0.5), "backend": "torch"} | settings)


def _system(mdp: ModelMDP) -> MujocoSystem:
    system: MujocoSystem = mdp.step.args[0]  # type: ignore[attr-defined]
    return system


def _start(mdp: ModelMDP, count: int, seed: int = 0) -> tuple[Params, Tensor, Tensor, Tensor]:
    """theta, s, a, e: at the start, whose ball touches the floor."""
    theta = default_params(mdp.box)
    state = mdp.initial_state(theta, _normal(count, mdp.noise_dims[0], seed=seed))
    e = _normal(count, mdp.noise_dims[1], seed=seed + 1)
    return theta, state, 0.3 * _normal(count, len(mdp.names["action"]), seed=seed + 2), e


# ---- closed forms

HINGE = """
<mujoco>
  <option timestep="{dt}" integrator="{integrator}"><flag eulerdamp="disable" contact="disable"/></option>
  <worldbody>
    <body name="link1">
      <joint name="q1" axis="0 1 0" damping="{b1}"/>
      <inertial pos="0 0 -{r1}" mass="{m1}" diaginertia="{c1} {c1} {c1}"/>
      {second}
    </body>
  </worldbody>
  <actuator><motor joint="q1"/>{more}</actuator>
</mujoco>
"""


def test_a_pendulum_is_the_torch_pendulum_to_second_order() -> None:
    m, r, c, damping = 0.7, 0.4, 0.05, 0.12
    spec = HINGE.format(dt=0.01, integrator="Euler", b1=damping, r1=r, m1=m, c1=c, second="", more="")
    ours = mujoco_model(spec, ("link1.mass", "q1.damping", "gravity.z"), _none, frame_skip=2, backend="torch")
    twin = pendulum(dt=0.02, integrator="semi_implicit", substeps=2)

    def twin_step(theta: Params, s: Tensor, a: Tensor) -> Tensor:
        mass, zero = theta["link1.mass"], torch.zeros((), dtype=torch.float64)
        physical = {"inertia": c + mass * r**2, "mgl": -mass * theta["gravity.z"] * r, "damping": theta["q1.damping"]}
        return twin.step(physical | {"coulomb": zero, "torque_offset": zero}, s, a, a[:, :0])

    s, a = _normal(3, 2), _normal(3, 1, seed=1)
    theta = default_params(ours.box)
    _compare(lambda theta, s, a: ours.step(theta, s, a, a[:, :0]), twin_step, theta, s, a)


def test_a_double_pendulum_under_rk4_is_the_torch_one_to_second_order() -> None:
    m1, m2, r1, r2, l1, c1, c2 = 0.6, 0.5, 0.25, 0.2, 0.3, 0.02, 0.01
    second = (
        f'<body name="link2" pos="0 0 -{l1}"><joint name="q2" axis="0 1 0" damping="0.05"/>'
        f'<inertial pos="0 0 -{r2}" mass="{m2}" diaginertia="{c2} {c2} {c2}"/></body>'
    )
    spec = HINGE.format(
        dt=0.01, integrator="RK4", b1=0.1, r1=r1, m1=m1, c1=c1, second=second, more='<motor joint="q2"/>'
    )
    ours = mujoco_model(spec, ("link2.mass", "link1.mass", "q2.damping", "gravity.z"), _none, backend="torch")
    twin = double_pendulum(parameters="physical", dt=0.01, integrator="rk4", substeps=1)

    def twin_step(theta: Params, s: Tensor, a: Tensor) -> Tensor:
        number = lambda x: torch.tensor(x, dtype=torch.float64)
        physical = {key: torch.zeros((), dtype=torch.float64) for key in twin.box.default}
        physical |= {"m1": theta["link1.mass"], "m2": theta["link2.mass"], "l1": number(l1), "r1": number(r1)}
        physical |= {"r2": number(r2), "gr": number(1.0), "g": -theta["gravity.z"], "b1": number(0.1)}
        physical |= {"I1": c1 + theta["link1.mass"] * r1**2, "I2": c2 + theta["link2.mass"] * r2**2}
        return twin.step(physical | {"b2": theta["q2.damping"]}, s, a, a[:, :0])

    theta = default_params(ours.box)
    _compare(lambda theta, s, a: ours.step(theta, s, a, a[:, :0]), twin_step, theta, _normal(2, 4), _normal(2, 2))


def _compare(ours: Callable[..., Tensor], twin: Callable[..., Tensor], theta: Params, s: Tensor, a: Tensor) -> None:
    """Value, gradient and Hessian-vector product of one random combination of the next state."""
    torch.testing.assert_close(ours(theta, s, a), twin(theta, s, a), rtol=1e-13, atol=1e-14)
    weight = _normal(*s.shape, seed=9)
    along = ({key: _normal(seed=7) for key in theta}, _normal(*s.shape, seed=6), _normal(*a.shape, seed=5))
    both = []
    for step in (ours, twin):
        slope = grad(lambda *x, step=step: (weight * step(*x)).sum() + (step(*x) ** 2).sum(), argnums=(0, 1, 2))
        both.append(jvp(slope, (theta, s, a), along)[:2])
    (values, seconds), (twin_values, twin_seconds) = both
    torch.testing.assert_close(values, twin_values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(seconds, twin_seconds, rtol=1e-11, atol=1e-11)


# ---- against differences of the engine, in contact


def _engine_step(model: mujoco.MjModel, state: np.ndarray, ctrl: np.ndarray) -> np.ndarray:
    data = mujoco.MjData(model)
    data.qpos[:], data.qvel[:], data.ctrl[:] = state[: model.nq], state[model.nq :], ctrl
    mujoco.mj_step(model, data)
    return np.concatenate([data.qpos, data.qvel])


def _richardson(f: Callable[[float], np.ndarray], h: float) -> np.ndarray:
    wide, narrow = ((f(k * h) - f(-k * h)) / (2 * k * h) for k in (2, 1))
    found: np.ndarray = (4 * narrow - wide) / 3
    return found


@pytest.mark.parametrize(
    ("integrator", "cone"),
    [
        ("Euler", "elliptic"),
        ("RK4", "pyramidal"),
        pytest.param("implicitfast", "pyramidal", marks=pytest.mark.slow),
        pytest.param("implicit", "elliptic", marks=pytest.mark.slow),
    ],
)
def test_gradients_in_contact_are_the_differences_of_the_engine(integrator: str, cone: str) -> None:
    mdp = _ball(integrator, cone)
    model = _system(mdp).structure.model
    theta, state, action, e = _start(mdp, 2)
    weight = _normal(*state.shape, seed=4)
    loss = lambda s, a: (weight * mdp.step(theta, s, a, e)).sum()
    by_state, by_action = grad(loss, argnums=(0, 1))(state, action)
    for row in range(2):
        s, a = state[row].numpy(), action[row].numpy()

        def moved(x: float, i: int, s: np.ndarray = s, a: np.ndarray = a, w: Any = weight[row]) -> Any:
            """Off the unit sphere too: MuJoCo normalises a quaternion, and so does our step."""
            return w.numpy() @ _engine_step(model, s + x * np.eye(len(s))[i] if i >= 0 else s, a + x * (i < 0))

        theirs = np.array([_richardson(partial(moved, i=i), 1e-6) for i in range(len(s))])
        np.testing.assert_allclose(by_state[row], theirs, rtol=1e-6, atol=1e-7 * np.abs(theirs).max())
        np.testing.assert_allclose(by_action[row, 0], _richardson(partial(moved, i=-1), 1e-5), rtol=1e-6, atol=1e-8)


def test_parameter_gradients_are_the_differences_of_the_step() -> None:
    """By theta per environment and shared; the fields are those of the engine (test_mujoco_integrators)."""
    mdp = _ball("implicitfast", "elliptic")
    theta, state, action, e = _start(mdp, 3)
    weight = _normal(*state.shape, seed=4)
    each = {key: value.expand(3).clone() for key, value in theta.items()}
    loss = lambda theta: (weight * mdp.step(theta, state, action, e)).sum(-1)
    shared, own = grad(lambda theta: loss(theta).sum())(theta), grad(lambda theta: loss(theta).sum())(each)
    for key, value in theta.items():
        h = 1e-5 * max(1.0, abs(float(value)))
        moved = lambda x, key=key: loss(each | {key: each[key] + x}).numpy()
        theirs = _richardson(moved, h)
        np.testing.assert_allclose(own[key].numpy(), theirs, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(shared[key], own[key].sum(), rtol=1e-12, atol=1e-12)


# ---- torch.func


@pytest.mark.parametrize(
    ("integrator", "cone"), [("implicitfast", "elliptic"), pytest.param("RK4", "pyramidal", marks=pytest.mark.slow)]
)
def test_every_transform_agrees_in_contact(integrator: str, cone: str) -> None:
    mdp = _ball(integrator, cone)
    theta, state, action, e = _start(mdp, 1)
    x = torch.cat([state[0], action[0], *(value[None] for value in theta.values())])
    n, m = state.shape[1], action.shape[1]

    def step(x: Tensor) -> Tensor:
        parts = dict(zip(theta, x[n + m :].unbind(), strict=True))
        return mdp.step(parts, x[None, :n], x[None, n : n + m], e)[0]

    tangent, cotangent = _normal(len(x), seed=3), _normal(n, seed=4)
    J, pushed, pull = jacrev(step)(x), jvp(step, (x,), (tangent,))[1], vjp(step, x)[1]
    torch.testing.assert_close(jacfwd(step)(x), J, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(pushed, J @ tangent, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(pull(cotangent)[0], cotangent @ J, rtol=1e-10, atol=1e-11)
    loss = lambda x: step(x).square().sum()
    H = hessian(loss)(x)
    torch.testing.assert_close(H, H.T, rtol=1e-8, atol=1e-9 * float(H.abs().max()))
    torch.testing.assert_close(
        jvp(grad(loss), (x,), (tangent,))[1], H @ tangent, rtol=1e-9, atol=1e-9 * float(H.abs().max())
    )
    h = 1e-5
    ahead, behind = (grad(loss)(x + sign * h * tangent) for sign in (1, -1))
    wide = (grad(loss)(x + 2 * h * tangent) - grad(loss)(x - 2 * h * tangent)) / (4 * h)
    differences = (4 * (ahead - behind) / (2 * h) - wide) / 3
    # centred differences of exact gradients: fourth order, then rounding
    torch.testing.assert_close(H @ tangent, differences, rtol=1e-6, atol=1e-8 * float(H.abs().max()))


def test_vmap_over_environments_and_parameters() -> None:
    mdp = _ball()
    theta, state, action, e = _start(mdp, 3)
    one = lambda theta, s, a: mdp.step(theta, s[None], a[None], e[:1])[0]
    each = {key: value * torch.tensor([0.9, 1.0, 1.1], dtype=torch.float64) for key, value in theta.items()}
    torch.testing.assert_close(vmap(one)(each, state, action), mdp.step(each, state, action, e), rtol=1e-12, atol=1e-12)
    J = vmap(jacrev(one, argnums=1), in_dims=(None, 0, 0))(theta, state, action)
    alone = torch.stack([jacrev(one, argnums=1)(theta, s, a) for s, a in zip(state, action, strict=True)])
    torch.testing.assert_close(J, alone, rtol=1e-10, atol=1e-10)


def test_second_derivatives_between_convex_geoms_raise_and_first_ones_do_not() -> None:
    floor = '<geom name="floor" type="ellipsoid" size="1 1.2 .5" pos="0 0 -.5"/>'
    xml = BALL.format(integrator="Euler", cone="pyramidal").replace(
        '<geom name="floor" type="plane" size="5 5 1"/>', floor
    )
    mdp = mujoco_model(mujoco.MjSpec.from_string(xml), (), _none, backend="torch")
    s = mdp.initial_state({}, torch.zeros(1, mdp.noise_dims[0], dtype=torch.float64))
    a = torch.zeros(1, 1, dtype=torch.float64)
    loss = lambda s: mdp.step({}, s, a, a[:, :0]).square().sum()
    assert grad(loss)(s).abs().max() > 0.0
    with pytest.raises(DerivativeOrderError, match="skin"):
        jvp(grad(loss), (s,), (torch.ones_like(s),))


# ---- rollouts and settings


def test_open_loop_is_the_chained_step_in_less_memory() -> None:
    mdp = _ball(segment=4)
    theta, state, _, _ = _start(mdp, 2)
    theta = {key: value.requires_grad_() for key, value in theta.items()}
    actions, e = (0.3 * _normal(2, 8, 1, seed=8)).requires_grad_(), torch.zeros(2, 8, 0, dtype=torch.float64)

    def chained() -> Tensor:
        states = [state]
        for t in range(8):
            states.append(mdp.step(theta, states[-1], actions[:, t], e[:, t]))
        return torch.stack(states, 1)

    assert mdp.open_loop is not None
    open_loop = mdp.open_loop
    sizes, results = [], []
    for roll in (chained, lambda: open_loop(theta, state, actions, e)):
        kept: list[int] = []

        def pack(tensor: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            states = roll()
        sizes.append(sum(kept))
        results.append((states, *torch.autograd.grad(states[:, -1].square().sum(), [actions, *theta.values()])))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert sizes[1] < sizes[0] / 3
    assert torch.equal(jvp(lambda s: open_loop(theta, s, actions, e), (state,), (state,))[0], results[0][0])


@pytest.mark.parametrize("integrator", ["implicitfast", "RK4"])
def test_a_rollout_without_derivatives_is_one_call_of_the_engine(integrator: str) -> None:
    mdp = _ball(integrator, frame_skip=3, delay=0.017, force_std=0.3, truncation=2)
    theta, state, _, _ = _start(mdp, 3)
    each = {key: value * torch.tensor([0.8, 1.0, 1.3], dtype=torch.float64) for key, value in theta.items()}
    actions, e = 0.3 * _normal(3, 6, 1), _normal(3, 6, mdp.noise_dims[1])
    states = [state]
    for t in range(6):
        states.append(mdp.step(each, states[-1], actions[:, t], e[:, t]))
    assert mdp.open_loop is not None
    fused = mdp.open_loop(each, state, actions, e)
    # the engine's own velocities, where ours divide and multiply by h: rounding, grown over 18 steps in contact
    torch.testing.assert_close(fused, torch.stack(states, 1), rtol=1e-10, atol=1e-11)
    e[1, 3] = float("inf")
    with pytest.raises(SimulationDivergedError, match=r"\[1\]"):
        mdp.open_loop(each, state, actions, e)


def test_a_recomputed_rollout_has_second_derivatives() -> None:
    mdp = _ball(segment=2)
    theta, state, _, _ = _start(mdp, 1)
    actions, e = (0.3 * _normal(1, 3, 1, seed=8)).requires_grad_(), torch.zeros(1, 3, 0, dtype=torch.float64)
    assert mdp.open_loop is not None
    open_loop = mdp.open_loop
    loss = lambda actions: open_loop(theta, state, actions, e)[:, -1].square().sum()
    along = _normal(1, 3, 1, seed=3)
    (slope,) = torch.autograd.grad(loss(actions), actions, create_graph=True)
    (second,) = torch.autograd.grad((slope * along).sum(), actions)
    chained = jvp(grad(loss), (actions.detach(),), (along,))[1]  # torch.func takes the plain chain
    torch.testing.assert_close(second, chained, rtol=1e-9, atol=1e-10)


def test_estimators_take_the_model() -> None:
    """Pathwise gradients of a return, through contact and a terminal state, against differences of the return."""
    reward = lambda theta, s, a, e, following: following[:, 0] - 0.1 * a.square().sum(-1)
    mdp = replace(_ball(frame_skip=2, terminal=lambda theta, s: s[:, 2] < 0.05), reward=reward)
    policy = linear_policy(1, std=0.1)
    nu = {"gain": 0.2 * _normal(1, len(mdp.names["state"])), "offset": torch.zeros(1, dtype=torch.float64)}
    theta = default_params(mdp.box)
    noise = sample_noise(mdp, policy, batch=4, horizon=4, generator=torch.Generator().manual_seed(0))
    for wrt, params, key in (("nu", nu, "offset"), ("theta", theta, "ball.mass")):
        estimate = pathwise_gradient(mdp, policy, theta, nu, noise, wrt=wrt)
        change = torch.ones_like(params[key])

        def moved(h: float, wrt: str = wrt, key: str = key, change: Tensor = change) -> Any:
            at = {"theta": theta, "nu": nu}
            at[wrt] = at[wrt] | {key: at[wrt][key] + h * change}
            return expected_return(mdp, policy, at["theta"], at["nu"], noise).numpy()

        assert float(estimate.grad[key].sum()) == pytest.approx(float(_richardson(moved, 1e-5)), rel=1e-6)
    scores = score_function_gradient(mdp, policy, theta, nu, noise)
    assert bool(torch.isfinite(scores.grad["gain"]).all())


def test_a_delay_is_the_mean_of_the_late_commands_and_differentiable() -> None:
    """A force that reaches a free slide: velocities are the sums of the delayed commands, whatever the delay."""
    xml = """<mujoco><option timestep="0.01" gravity="0 0 0"/><worldbody><body><joint name="x" type="slide"/>
      <geom size=".1" mass="1"/></body></worldbody><actuator><motor joint="x"/></actuator></mujoco>"""
    mdp = mujoco_model(xml, {"delay": (0.0, 0.05)}, _none, frame_skip=2, backend="torch")
    assert mdp.names["state"][2:] == ("actuator0_3_ago", "actuator0_2_ago", "actuator0_1_ago")
    actions = _normal(1, 6, 1)
    e = torch.zeros(1, 6, 0, dtype=torch.float64)
    start = mdp.initial_state({}, torch.zeros(1, mdp.noise_dims[0], dtype=torch.float64))
    assert mdp.open_loop is not None
    speed = lambda delay, open_loop=mdp.open_loop: open_loop({"delay": delay}, start, actions, e)[0, :, 1]
    held = np.repeat(actions[0, :, 0].numpy(), 2)
    for delay in (0.0, 0.013, 0.02, 0.0499, 0.05):
        # integral of the command, held piecewise, at t - delay
        at = np.maximum(np.arange(7) * 0.02 - delay, 0.0)
        wanted = np.interp(at, np.arange(13) * 0.01, np.concatenate([[0.0], np.cumsum(held) * 0.01]))
        found = speed(torch.tensor(delay, dtype=torch.float64))
        np.testing.assert_allclose(found.numpy(), wanted, atol=1e-14)
    slope = jvp(speed, (torch.tensor(0.013, dtype=torch.float64),), (torch.tensor(1.0, dtype=torch.float64),))[1]
    late = [0.0, *(held[int(np.floor(t / 0.01 + 1e-9))] for t in at_times(0.013))]
    np.testing.assert_allclose(slope.numpy(), -np.array(late), atol=1e-12)


def test_a_delay_outside_the_commands_kept_raises() -> None:
    xml = '<mujoco><worldbody><body><joint name="x" type="slide"/><geom size=".1" contype="0"/></body></worldbody>' + (
        '<actuator><motor joint="x"/></actuator></mujoco>'
    )
    mdp = mujoco_model(xml, {"delay": (0.0, 0.01)}, _none, backend="torch")
    start = mdp.initial_state({"delay": torch.zeros(())}, torch.zeros(2, mdp.noise_dims[0], dtype=torch.float64))
    action, e = torch.ones(2, 1, dtype=torch.float64), torch.zeros(2, mdp.noise_dims[1], dtype=torch.float64)
    for late, told in ((-0.001, "-0.001"), (0.011, "0.011"), (float("nan"), "nan")):
        delays = torch.tensor([0.004, late], dtype=torch.float64)
        with pytest.raises(ValueError, match=f"'delay' is {told} s, but commands are kept from 0 to 0.01 s"):
            mdp.step({"delay": delays}, start, action, e)
    assert mdp.step({"delay": torch.tensor(0.01)}, start, action, e).shape == start.shape


def at_times(delay: float) -> np.ndarray:
    return np.arange(1, 7) * 0.02 - delay


def test_truncation_cuts_the_past_and_counts_steps() -> None:
    mdp = _ball(truncation=3)
    theta, state, _, _ = _start(mdp, 2)
    assert mdp.names["state"][-1] == "steps"
    actions, e = 0.3 * _normal(2, 5, 1), torch.zeros(2, 5, 0, dtype=torch.float64)
    assert mdp.open_loop is not None
    open_loop = mdp.open_loop
    last = lambda actions: open_loop(theta, state, actions, e)[:, -1]
    assert bool((last(actions)[:, -1] == 5.0).all())
    slope = grad(lambda actions: last(actions)[:, :-1].square().sum())(actions)
    assert slope[:, :3].abs().max() == 0.0
    assert slope[:, 3:].abs().min() > 0.0
    by_start = lambda steps: grad(lambda s: open_loop(theta, s, actions[:, :steps], e[:, :steps])[:, -1, 0].sum())(
        state
    )
    assert by_start(3).abs().max() > 0.0
    assert by_start(4).abs().max() == 0.0


@pytest.mark.parametrize("mode", ["scale", "drop"])
def test_the_guard_bounds_and_counts(mode: Any) -> None:
    plain, guard = _ball(), GradientGuard(2.0, mode)
    guarded = _ball(guard=guard)
    theta, state, action, e = _start(plain, 3)
    weight = torch.tensor([[1e-3], [1.0], [1e3]], dtype=torch.float64)
    free, held = (
        grad(lambda s, mdp=mdp: (weight * mdp.step(theta, s, action, e)).sum())(state) for mdp in (plain, guarded)
    )
    norm = free.norm(dim=1, keepdim=True)
    above = norm > 2.0
    wanted = torch.where(above, free * 2.0 / norm if mode == "scale" else torch.zeros_like(free), free)
    torch.testing.assert_close(held, wanted, rtol=1e-12, atol=1e-12)
    assert guard.counts.tolist() == [3, int(above.sum())]
    pushed = [jvp(lambda s, mdp=mdp: mdp.step(theta, s, action, e), (state,), (state,))[1] for mdp in (plain, guarded)]
    torch.testing.assert_close(*pushed)
    jacrev(lambda s: guarded.step(theta, s, action, e).sum(0))(state)  # vmap of the reverse pass
    with pytest.raises(ValueError, match="positive"):
        GradientGuard(0.0)
    with pytest.raises(ValueError, match="mode"):
        GradientGuard(1.0, "clip")


def test_noise_starts_and_signals() -> None:
    mdp = _ball(force_std=0.5, observe=lambda theta, s: s[:, :3], signal=("x", "y", "z"), discount=0.9)
    theta, state, action, e = _start(mdp, 4)
    model = _system(mdp).structure.model
    assert mdp.noise_dims == (2 * model.nv, model.nv)
    assert mdp.names["signal"] == ("x", "y", "z")
    torch.testing.assert_close(state[:, 3:7].norm(dim=1), torch.ones(4, dtype=torch.float64))
    by_noise = grad(lambda e: mdp.step(theta, state, action, e).square().sum())(e)
    assert by_noise.abs().min() > 0.0
    start = _ball(
        initial=torch.cat([torch.tensor(model.qpos0), torch.ones(model.nv, dtype=torch.float64)]), initial_std=0.0
    )
    assert torch.equal(start.initial_state({}, torch.zeros(1, 14))[0, 8:], torch.ones(7))
    single = mdp.step({key: value.float() for key, value in theta.items()}, state.float(), action.float(), e.float())
    assert single.dtype == torch.float32
    box = action_box(model)
    assert (box.low, box.high, box.unit) == ({"drive": -1.0}, {"drive": 1.0}, {"drive": "N m"})


def test_names_and_units_follow_joints_and_actuators() -> None:
    xml = """<mujoco><worldbody><body><joint name="b" type="ball"/><geom size=".1"/><body><joint name="s" type="slide"/>
      <geom size=".1"/><body><joint name="h"/><geom size=".1"/></body></body></body></worldbody>
      <actuator><position name="p" joint="h" kp="3"/><velocity name="v" joint="s" kv="2"/><motor joint="s" gear="2"/>
      <general name="g" joint="h" dyntype="integrator" biastype="affine" biasprm="1 0 0"/><motor name="f" joint="s"/>
      </actuator><keyframe><key name="home" qpos="1 0 0 0 .5 .2" act=".3"/></keyframe></mujoco>"""
    mdp = mujoco_model(xml, (), _none, initial="home", backend="torch")
    assert mdp.names["state"] == (
        *(f"b_q{axis}" for axis in "wxyz"),
        *("s", "h", "b_wx_velocity", "b_wy_velocity", "b_wz_velocity", "s_velocity", "h_velocity", "g_activation"),
    )
    assert mdp.names["action"] == ("p", "v", "actuator2", "g", "f")
    assert [mdp.units[name] for name in mdp.names["action"]] == ["rad", "m/s", "1", "1", "N"]
    assert [mdp.units[name] for name in ("b_qw", "s", "h", "s_velocity", "b_wx_velocity")] == [
        "1",
        "m",
        "rad",
        "m/s",
        "rad/s",
    ]
    start = mdp.initial_state({}, torch.zeros(1, 10, dtype=torch.float64))
    assert start[0].tolist() == [1, 0, 0, 0, 0.5, 0.2, 0, 0, 0, 0, 0, 0.3]


@pytest.mark.slow
def test_gradgradcheck_in_contact() -> None:
    mdp = _ball("Euler", "elliptic")
    theta, state, action, e = _start(mdp, 1)
    keys = list(theta)
    step = lambda s, a, *values: mdp.step(dict(zip(keys, values, strict=True)), s, a, e)
    inputs = tuple(x.clone().requires_grad_() for x in (state, action, *theta.values()))
    # differences of step 1e-6 of gradients of size up to 1e3
    assert torch.autograd.gradcheck(step, inputs, eps=1e-6, atol=1e-5, rtol=1e-5, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(step, inputs, eps=1e-6, atol=1e-3, rtol=1e-4)


def test_poses_of_bodies_are_those_of_the_engine() -> None:
    mdp = _ball()
    system = _system(mdp)
    _, state, _, _ = _start(mdp, 2)
    found = body_poses(system, state[:, : system.structure.model.nq])
    data = mujoco.MjData(system.structure.model)
    data.qpos[:] = state[1, : system.structure.model.nq].numpy()
    mujoco.mj_kinematics(system.structure.model, data)
    np.testing.assert_allclose(found.position[1].numpy(), data.xpos, atol=1e-14)


def test_the_report_counts_switches_of_a_bouncing_ball() -> None:
    xml = """<mujoco><option timestep="0.005"/><worldbody><geom type="plane" size="5 5 1"/><body pos="0 0 .13">
      <freejoint/><geom name="b" size=".1" solref="-2000 -10"/></body></worldbody></mujoco>"""
    mdp = mujoco_model(xml, (), _none, frame_skip=2, backend="torch")
    start = mdp.initial_state({}, torch.zeros(2, 12, dtype=torch.float64))
    start[1, 2] += 10.0  # never lands
    actions, e = torch.zeros(2, 40, 0, dtype=torch.float64), torch.zeros(2, 40, 0, dtype=torch.float64)
    assert mdp.open_loop is not None
    states = mdp.open_loop({}, start, actions, e)
    report = rollout_report(mdp, {}, states, actions, e)
    # the centre is below the radius plus nothing: contact begins and ends; count from the heights at control steps
    touching = states[0, :-1, 2] < 0.1
    crossings = int((touching[1:] != touching[:-1]).sum())
    assert int(report.switches[0].sum()) >= crossings >= 2
    assert int(report.switches[1].sum()) == 0
    assert int(report.active[1].sum()) == 0
    assert not report.flagged.any()
    assert float(report.residual.max()) < 1e-12
    with pytest.raises(ValueError, match="mujoco_model"):
        rollout_report(replace(mdp, step=lambda theta, s, a, e: s), {}, states, actions, e)


def test_the_report_tells_sliding_from_rolling_and_slipping_from_holding() -> None:
    """A ball that slides comes to roll, once; a hinge with dry friction comes to rest, once; per-environment masses."""
    xml = """<mujoco><option timestep="0.01" cone="elliptic"/><worldbody><geom type="plane" size="9 9 1"/>
      <body name="ball" pos="0 0 .0999"><freejoint/><geom size=".1" friction="0.3 0 0" condim="3" mass="1"/></body>
      <body pos="3 0 1"><joint name="j" frictionloss="0.5" axis="0 0 1"/><geom size=".2" pos=".3 0 0" mass="1"/></body>
      </worldbody></mujoco>"""
    mdp = mujoco_model(mujoco.MjSpec.from_string(xml), ("ball.mass",), _none, frame_skip=2, backend="torch")
    start = mdp.initial_state({}, torch.zeros(2, mdp.noise_dims[0], dtype=torch.float64))
    none = torch.zeros(2, 60, 0, dtype=torch.float64)
    theta = {"ball.mass": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    assert mdp.open_loop is not None
    start = mdp.open_loop(theta, start, none, none)[:, -1].clone()  # settled on the floor
    start[:, 8], start[:, 14] = 4.0, 1.0  # m/s along x, rad/s of the hinge
    states = mdp.open_loop(theta, start, none, none)
    report = rollout_report(mdp, theta, states, none, none)
    for row in range(2):
        slips = states[row, :, 8] - 0.1 * states[row, :, 12] > 0.1  # m/s of the touching point
        turns = states[row, :, 14] > 0.05
        ends = sorted(int(moves.sum()) for moves in (slips, turns))
        assert ends[0] > 5
        assert ends[1] < 50
        switched = report.switches[row].nonzero().flatten().tolist()
        # the slip lifts the ball off for a while (MuJoCo's cone is regularised): two more switches at most
        assert 2 <= int(report.switches[row].sum()) <= 4
        assert all(min(abs(found - end) for found in switched) <= 2 for end in ends)
        assert switched[-1] <= ends[1] + 2
    assert not report.flagged.any()


# ---- refusals


def test_an_unconverged_solver_warns_or_raises() -> None:
    for strict in (False, True):
        mdp = _ball("Euler", "elliptic", tolerance=1e-30, strict=strict)
        theta, state, action, e = _start(mdp, 1)
        with pytest.warns(UnconvergedWarning) if not strict else pytest.raises(UnconvergedError, match="residual"):
            mdp.step(theta, state, action, e)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frame_skip": 0}, "frame_skip must be at least 1"),
        ({"truncation": 0}, "truncation must be at least 1"),
        ({"segment": 0}, "segment must be at least 1"),
        ({"delay": -0.1}, "delay must be"),
        ({"delay": 0.01, "theta": ["delay"]}, "next to theta's 'delay', which replaces it"),
        ({"initial": "home"}, "no keyframe 'home'"),
        ({"initial": torch.zeros(3)}, "length 15"),
        ({"initial_std": -1.0}, "none negative"),
        ({"force_std": torch.ones(2)}, "force_std must be one number or 7"),
        ({"backend": "cuda"}, "backend must be"),
    ],
)
def test_settings_that_do_not_fit_raise(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _ball(**settings)


def test_a_model_whose_time_stands_still_is_refused() -> None:
    spec = mujoco.MjSpec.from_string(BALL.format(integrator="Euler", cone="pyramidal"))
    spec.option.timestep = 0.0
    with pytest.raises(ValueError, match="time step of the model must be a positive number of seconds, got 0"):
        mujoco_model(spec.compile(), THETA, _none)


def test_environments_that_kernels_do_not_cover_are_done_again() -> None:
    mdp = _ball("implicitfast", "elliptic")
    system = _system(mdp)
    products, nv, C = torch_products(system.structure, (), system.kind), system.structure.model.nv, 4
    _, state, action, _ = _start(mdp, C)
    q, v, act = split_state(system.structure.model, state)
    x = (q, torch.zeros_like(v), v, act, action, torch.zeros(1, nv, dtype=torch.float64))
    y = mujoco_system(system.structure).program.value(x)
    dx, g = tuple(_normal(*t.shape, seed=3) for t in x), tuple(_normal(C, nv, seed=4) for _ in y)
    covered = torch.tensor([True, False, True, False])
    spoilt = lambda tensors: tuple(torch.where(covered.reshape(-1, *[1] * (t.ndim - 1)), t, t + 1.0) for t in tensors)
    kernels = KernelProducts(
        push=lambda x, dx, y: (spoilt(products.push(x, dx, y)), covered),
        pull=lambda x, y, g, wanted: (spoilt(products.pull(x, y, g, wanted)), covered),
        second=lambda arguments, wanted: (spoilt(products.second(arguments, wanted)), covered),
    )
    split, all_six = split_products(kernels, products), (x, dx, y, y, g, g)
    wanted = (False, *(True,) * 5)
    for mended, whole in (
        (split.push(x, dx, y), products.push(x, dx, y)),
        (split.pull(x, y, g, wanted), products.pull(x, y, g, wanted)),
        (split.second(all_six, (*wanted, *wanted)), products.second(all_six, (*wanted, *wanted))),
    ):
        torch.testing.assert_close(mended, whole, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_kernels_and_torch_give_the_same_step() -> None:
    """Slow: kernels are compiled."""
    results = []
    for backend in ("warp", "torch"):
        mdp = _ball("Euler", "pyramidal", backend=backend)
        theta, state, action, e = _start(mdp, 3)
        loss = lambda *x, mdp=mdp, e=e: mdp.step(*x, e).square().sum()
        slope = grad(loss, argnums=(0, 1, 2))
        along = (theta, torch.ones_like(state), torch.ones_like(action))
        results.append(jvp(slope, (theta, state, action), along)[:2])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-8)


def test_a_model_without_kernels_refuses_them_by_reason() -> None:
    in_air = BALL.format(integrator="Euler", cone="pyramidal").replace("<option ", '<option density="1.2" ')
    with pytest.raises(MujocoUnsupportedError, match="no Warp kernels"):
        mujoco_model(mujoco.MjSpec.from_string(in_air), (), _none, backend="warp")


# ---- the models of Gymnasium

MODELS = sorted(path.name for path in GYM.glob("*.xml"))


@pytest.mark.parametrize("name", [pytest.param(m, marks=() if m == "hopper.xml" else pytest.mark.slow) for m in MODELS])
def test_gymnasium_models_construct_and_differentiate(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of MuJoCo, about deprecated attributes of these files
        mdp = mujoco_model(
            mujoco.MjSpec.from_file(str(GYM / name)),
            ("gravity.z",),
            _none,
            frame_skip=2,
            initial_std=0.05,
            backend="torch",
        )
        theta, state, action, e = _start(mdp, 2)
        by_theta, by_state, by_action = grad(lambda *x: mdp.step(*x, e).square().sum(), argnums=(0, 1, 2))(
            theta, state, action
        )
    for slope in (by_state, by_action):
        assert bool(torch.isfinite(slope).all())
        assert float(slope.abs().max()) > 0.0
    assert bool(torch.isfinite(by_theta["gravity.z"]))


def test_a_diverging_state_raises_by_name_and_leaves_no_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mdp = _ball()
    theta, state, action, e = _start(mdp, 3)
    state[1, 9] = float("inf")
    with pytest.raises(SimulationDivergedError, match=r"1 of 3 environments is not finite \(first rows: \[1\]\)"):
        mdp.step(theta, state, action, e)
    assert not list(tmp_path.iterdir())


def test_messages_of_the_engine_become_python_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = mujoco.MjModel.from_xml_string(BALL.format(integrator="Euler", cone="pyramidal"))
    model.body_mass[:], model.body_inertia[:] = 0.0, 0.0
    with pytest.warns(MujocoWarning, match="Inertia matrix is too close to singular"), engine_messages():
        mujoco.mj_step(model, mujoco.MjData(model))
    assert not list(tmp_path.iterdir())
