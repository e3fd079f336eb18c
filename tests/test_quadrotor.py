"""Quadrotors against closed forms, conservation laws and an independent integration on rotation matrices."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from problems import EXACT, scalar, seeded, stack
from scipy.integrate import solve_ivp
from torch import Tensor
from torch.func import hessian, jacrev, vmap

from benchmarks.derivatives import Case, gradient_error, random_problem, step_derivatives_hold
from sim2real import ModelMDP, Params, default_params
from sim2real.simulators import planar_quadrotor, quadrotor, quadrotor_energy
from sim2real.simulators.quadrotor import hover_command, unit_attitude

NONE = torch.zeros(1, 0, dtype=torch.float64)
DRAGLESS = {"drag_xy": scalar(0.0), "drag_z": scalar(0.0)}
MODELS: dict[str, Callable[..., ModelMDP]] = {
    "thrust plus": lambda **more: quadrotor(**more),
    "thrust cross": lambda **more: quadrotor(frame="cross", **more),
    "speed plus": lambda **more: quadrotor(command="speed", **more),
    "speed cross": lambda **more: quadrotor(command="speed", frame="cross", **more),
}
PLANAR: dict[str, Callable[..., ModelMDP]] = {
    "planar thrust": lambda **more: planar_quadrotor(**more),
    "planar speed": lambda **more: planar_quadrotor(command="speed", **more),
}


def roll(mdp: ModelMDP, theta: Params, state: Tensor, action: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        state = mdp.step(theta, state, action, NONE.expand(len(state), 0))
    return state


def hovering(mdp: ModelMDP) -> tuple[Params, Tensor, Tensor]:
    """theta, the state at rest at the target and the command that keeps it there."""
    theta, rotors = default_params(mdp.box), len(mdp.names["action"])
    state = mdp.initial_state(theta, torch.zeros(1, mdp.noise_dims[0], dtype=torch.float64))
    hover = hover_command(mdp.box, rotors=rotors)
    return theta, state, torch.full((1, rotors), hover, dtype=torch.float64)


def tumbling(mdp: ModelMDP) -> tuple[Params, Tensor, Tensor]:
    """theta, a state far from hover in everything, and commands that keep turning it."""
    theta, state, action = hovering(mdp)
    body = stack([1.0, -2.0, 3.0, 1.0, 0.7, -0.5, 0.4, 2.0, -1.0, 1.5, 3.0, -2.0, 4.0])
    rotors = state[:, 13:] * (1.0 + 0.1 * torch.randn(1, 4, generator=seeded(0), dtype=torch.float64))
    state = unit_attitude(torch.cat([body, rotors], 1))
    return theta, state, action * stack([1.05, 0.97, 1.02, 0.99])


@pytest.mark.parametrize("name", [*MODELS, *PLANAR])
def test_hover_is_an_equilibrium_and_the_best_there_is(name: str) -> None:
    mdp = (MODELS | PLANAR)[name]()
    theta, state, action = hovering(mdp)
    torch.testing.assert_close(roll(mdp, theta, state, action, 5), state, **EXACT)
    assert float(mdp.reward(theta, state, action, NONE, state)) == pytest.approx(0.0, abs=1e-14)
    near = state + 0.1 * torch.randn(50, state.shape[1], generator=seeded(0), dtype=torch.float64)
    assert bool((mdp.reward(theta, near, action.expand(50, -1), NONE.expand(50, 0), near) < 0.0).all())


def test_hover_commands_in_closed_form() -> None:
    assert hover_command(quadrotor().box, rotors=4) == pytest.approx(0.5 * 9.81 / 4)
    speed = hover_command(quadrotor(command="speed").box, rotors=4)
    assert 4 * 5.57e-6 * speed**2 == pytest.approx(0.5 * 9.81)
    assert hover_command(planar_quadrotor().box, rotors=2) == pytest.approx(0.5 * 9.81 / 2)


@pytest.mark.parametrize("tilted", [False, True])
def test_fall_against_linear_drag(tilted: bool) -> None:
    """v = v_end (1 - exp(-d t / m)), with the drag across the rotor axes when the body lies on its side."""
    mdp, seconds = quadrotor(dt=0.02), 1.0
    theta, state, action = hovering(mdp)
    side = stack([math.cos(math.pi / 4), 0.0, math.sin(math.pi / 4), 0.0])
    state = torch.cat([state[:, :3], side if tilted else state[:, 3:7], state[:, 7:13], 0.0 * state[:, 13:]], 1)
    m, g, d = 0.5, 9.81, 0.22 if tilted else 0.44
    after = roll(mdp, theta, state, 0.0 * action, 50)[0]
    end = m * g / d
    speed = end * -math.expm1(-d * seconds / m)
    # RK4 of a linear decay at d dt / m = 0.02 is off by (0.02)^4 / 120 of a time constant: 1e-9
    assert float(after[9]) == pytest.approx(-speed, rel=1e-8)
    assert float(after[2]) == pytest.approx(-(end * seconds - m / d * speed), rel=1e-8)
    assert float(after[7:9].abs().max()) < 1e-12


@pytest.mark.parametrize("name", [*MODELS, *PLANAR])
def test_motors_follow_their_commands_with_a_first_order_lag(name: str) -> None:
    mdp = (MODELS | PLANAR)[name](dt=0.01, substeps=4)
    theta, state, action = hovering(mdp)
    rotors = len(mdp.names["action"])
    after = roll(mdp, theta, state, 1.3 * action, 6)[:, -rotors:]
    exact = action * (1.3 - 0.3 * math.exp(-0.06 / 0.03))
    torch.testing.assert_close(after, exact, rtol=1e-6, atol=0.0)  # RK4 at h / lag = 1/12: (1/12)^5 / 120 a step


def test_a_free_body_keeps_energy_and_angular_momentum_and_a_unit_quaternion() -> None:
    mdp = quadrotor(dt=0.01, substeps=4)
    theta, state, action = tumbling(mdp)
    theta = theta | DRAGLESS
    state = torch.cat([state[:, :13], 0.0 * state[:, 13:]], 1)
    momentum = lambda s: rotation(s[0, 3:7]) @ (inertia(theta) @ s[0, 10:13])
    after = roll(mdp, theta, state, 0.0 * action, 100)
    # RK4 at 2.5 ms with |w| = 5 rad/s: (0.0125)^5 / 120 a step over 400 steps
    torch.testing.assert_close(quadrotor_energy(theta, after), quadrotor_energy(theta, state), rtol=1e-8, atol=0.0)
    torch.testing.assert_close(momentum(after), momentum(state), rtol=1e-7, atol=1e-9)
    assert float(after[0, 3:7].norm()) == pytest.approx(1.0, abs=1e-14)
    assert not torch.allclose(after[:, 10:13], state[:, 10:13], atol=0.1)  # it does tumble


def rotation(q: Tensor) -> Tensor:
    w, x, y, z = q.tolist()
    return stack(
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    )


def inertia(theta: Params) -> Tensor:
    return torch.diag(torch.stack([theta[f"inertia_{axis}"] for axis in "xyz"]))


@pytest.mark.parametrize("name", MODELS)
def test_against_an_independent_integration_on_rotation_matrices(name: str) -> None:
    """R' = R [w]x, torques as r x F of four arms, drag as R D R'v; quaternions do not occur."""
    mdp = MODELS[name](dt=0.01, substeps=4)
    theta, state, action = tumbling(mdp)
    J, value = inertia(theta).numpy(), {key: float(v) for key, v in theta.items()}
    offset = math.pi / 4 if "cross" in name else 0.0
    arms = [value["arm"] * np.array([math.cos(offset + i * math.pi / 2), math.sin(offset + i * math.pi / 2), 0.0])
            for i in range(4)]  # fmt: skip
    D = np.diag([value["drag_xy"], value["drag_xy"], value["drag_z"]])

    def rates(_: float, s: np.ndarray) -> np.ndarray:
        R, v, w, rotors = s[3:12].reshape(3, 3), s[12:15], s[15:18], s[18:]
        speed = "torque_ratio" not in value
        f = value["thrust_coefficient"] * rotors**2 if speed else rotors
        Q = value["torque_coefficient"] * rotors**2 if speed else value["torque_ratio"] * rotors
        axis = np.array([0.0, 0.0, 1.0])
        torque = sum(np.cross(r, fi * axis) for r, fi in zip(arms, f, strict=True))
        torque = torque + axis * (Q[0] - Q[1] + Q[2] - Q[3])
        skew = np.array([[0, -w[2], w[1]], [w[2], 0, -w[0]], [-w[1], w[0], 0]])
        force = R @ (f.sum() * axis - D @ R.T @ v)
        turned = np.linalg.solve(J, torque - np.cross(w, J @ w))
        lagged = (action[0].numpy() - rotors) / value["motor_lag"]
        return np.concatenate([v, (R @ skew).ravel(), force / value["mass"] - value["g"] * axis, turned, lagged])

    s = state[0].numpy()
    start = np.concatenate([s[:3], rotation(state[0, 3:7]).numpy().ravel(), s[7:]])
    exact = solve_ivp(rates, (0.0, 0.5), start, rtol=1e-11, atol=1e-11).y[:, -1]
    found = roll(mdp, theta, state, action, 50)[0]
    tolerance = {"rtol": 1e-5, "atol": 1e-6}  # RK4 at 2.5 ms: motors at h / lag = 1/12, (1/12)^4 / 120 per lag
    torch.testing.assert_close(found[:3], torch.as_tensor(exact[:3]), **tolerance)
    torch.testing.assert_close(rotation(found[3:7]).flatten(), torch.as_tensor(exact[3:12]), **tolerance)
    torch.testing.assert_close(found[7:], torch.as_tensor(exact[12:]), **tolerance)


@pytest.mark.parametrize(("integrator", "order"), [("midpoint", 2), ("rk4", 4)])
@pytest.mark.parametrize("plane", [False, True])
def test_order_of_convergence(integrator: str, order: int, plane: bool) -> None:
    def after(substeps: int, scheme: str) -> Tensor:
        build = planar_quadrotor if plane else quadrotor
        mdp = build(dt=0.02, integrator=scheme, substeps=substeps)
        theta, state, action = hovering(mdp) if plane else tumbling(mdp)
        if plane:
            state, action = state + 0.5 * torch.arange(8).to(state) / 8, action * stack([1.1, 0.8])
        return roll(mdp, theta, state, action, 10)

    exact = after(64, "rk4")
    errors = [float((after(n, integrator) - exact).norm()) for n in (2, 4)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize("command", ["thrust", "speed"])
def test_the_planar_quadrotor_is_the_spatial_one_in_its_plane(command: str) -> None:
    """A plus frame whose side rotors stand still, without drag torque."""
    space, plane = quadrotor(command=command), planar_quadrotor(command=command)
    theta, flat = default_params(space.box), default_params(plane.box)
    theta["torque_coefficient" if command == "speed" else "torque_ratio"] = scalar(0.0)
    u = hover_command(plane.box, rotors=2)
    state = stack([0.1, 0.2, 0.4, 1.0, -0.5, 0.7, 0.9 * u, 1.1 * u])
    full = stack([0.1, 0, 0.2, math.cos(0.2), 0, math.sin(0.2), 0, 1.0, 0, -0.5, 0, 0.7, 0, 0.9 * u, 0, 1.1 * u, 0])
    state = roll(plane, flat, state, stack([1.05 * u, 0.97 * u]), 20)[0]
    full = roll(space, theta, full, stack([1.05 * u, 0.0, 0.97 * u, 0.0]), 20)[0]
    pitch = 2.0 * torch.atan2(full[5], full[3])
    seen = torch.stack([full[0], full[2], pitch, full[7], full[9], full[11], full[13], full[15]])
    torch.testing.assert_close(seen, state, rtol=1e-6, atol=1e-6)  # both RK4, but quaternion against angle
    assert float(full[[1, 4, 6, 8, 10, 12]].abs().max()) < 1e-12


def test_the_step_depends_on_the_attitude_alone() -> None:
    mdp = quadrotor()
    theta, state, action = tumbling(mdp)
    once = mdp.step(theta, state, action, NONE)
    longer = torch.cat([state[:, :3], 1.7 * state[:, 3:7], state[:, 7:]], 1)
    torch.testing.assert_close(mdp.step(theta, longer, action, NONE), once, **EXACT)
    turned = torch.cat([state[:, :3], -state[:, 3:7], state[:, 7:]], 1)
    other = mdp.step(theta, turned, action, NONE)
    torch.testing.assert_close(other[:, 3:7], -once[:, 3:7], **EXACT)
    torch.testing.assert_close(other[:, 7:], once[:, 7:], **EXACT)
    by_state = jacrev(lambda s: mdp.step(theta, s[None], action, NONE)[0])(state[0])
    assert float((by_state[:, 3:7] @ state[0, 3:7]).abs().max()) < 1e-12
    assert float((once[0, 3:7] @ by_state[3:7]).abs().max()) < 1e-12


def test_the_reward_is_quadratic_in_space_and_moves_with_its_target() -> None:
    mdp = quadrotor(target=(1.0, -2.0, 0.5), dt=0.02)
    theta, state, action = hovering(mdp)
    assert float(mdp.reward(theta, state, action, NONE, state)) == pytest.approx(-0.02 * 5.25)
    curvature = hessian(lambda s: mdp.reward(theta, s[None], action, NONE, state)[0])(state[0])
    torch.testing.assert_close(curvature, -0.04 * torch.diag(stack(*[1.0] * 3, 0, *[1.0] * 3, *[0.1] * 6, *[0.0] * 4)))
    level = planar_quadrotor(target=(3.0, 4.0), dt=0.02)
    theta, state, action = hovering(level)
    assert float(level.reward(theta, state, action, NONE, state)) == pytest.approx(-0.02 * 25.0)


@pytest.mark.parametrize("command", ["thrust", "speed"])
def test_derivatives_of_step_and_rollout(command: str) -> None:
    mdp = quadrotor(command=command, frame="cross", initial_std=0.2)
    case = Case(mdp, default_params(mdp.box), spread=0.2, action_scale=0.5 if command == "thrust" else 5.0)
    assert gradient_error(random_problem(case, seeded(4))) < 1.0
    if command == "thrust":
        assert step_derivatives_hold(case, seeded(11))


def test_vmap_over_environments_equals_the_batch_and_dtype_follows() -> None:
    mdp = quadrotor(command="speed")
    theta, state, action = tumbling(mdp)
    factor = 1.0 + 0.1 * torch.rand(3, generator=seeded(3), dtype=torch.float64)
    each = {key: factor * value for key, value in theta.items()}
    states, actions = factor[:, None] * state, factor[:, None] * action
    one = lambda theta, s, a: mdp.step(theta, s[None], a[None], NONE)[0]
    batch = mdp.step(each, states, actions, NONE.expand(3, 0))
    torch.testing.assert_close(vmap(one)(each, states, actions), batch, **EXACT)
    single = {key: value.float() for key, value in theta.items()}
    assert mdp.step(single, state.float(), action.float(), NONE.float()).dtype == torch.float32
    assert theta.keys() == mdp.box.unit.keys()
    assert {name for group in mdp.names.values() for name in group} == mdp.units.keys()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: quadrotor(command="torque"), "command must be 'thrust' or 'speed'"),
        (lambda: quadrotor(frame="hexa"), "frame must be 'plus' or 'cross'"),
        (lambda: quadrotor(dt=-1.0), "dt must be a positive"),
        (lambda: planar_quadrotor(command="torque"), "command must be 'thrust' or 'speed'"),
        (lambda: planar_quadrotor(integrator="semi_implicit"), "integrator must be one of"),
    ],
)
def test_wrong_arguments_are_named(build: Callable[[], ModelMDP], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
