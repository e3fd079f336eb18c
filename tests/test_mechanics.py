"""Pendulum, double pendulum and cart-pole against closed forms, Lagrange equations and a published figure."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from problems import EXACT, scalar, seeded, shared, stack
from scipy.integrate import solve_ivp
from scipy.optimize import least_squares
from scipy.signal import savgol_filter
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp

from sim2real import Params, default_params
from sim2real.simulators import (
    base_parameters,
    cartpole,
    double_pendulum,
    pendulum,
)


def test_linearised_pendulum_matches_the_matrix_exponential() -> None:
    mdp = pendulum(dt=0.01, integrator="rk4")
    theta = default_params(mdp.box)
    J, mgl, b = (float(theta[key]) for key in ("inertia", "mgl", "damping"))
    zero = torch.zeros(1, 2, dtype=torch.float64)
    dynamics = stack([0.0, 1.0, 0.0], [-mgl / J, -b / J, 1.0 / J], [0.0, 0.0, 0.0])
    exact = torch.linalg.matrix_exp(0.01 * dynamics)[:2]
    by_state = jacrev(lambda s: mdp.step(theta, s, zero[:, :1], zero[:, :0])[0])(zero)[:, 0]
    by_action = jacrev(lambda a: mdp.step(theta, zero, a, zero[:, :0])[0])(zero[:, :1])[:, 0]
    # RK4 of a linear system is the exponential series to fourth order: what is left is (|A| h)^5 / 120 ~ 2e-7
    torch.testing.assert_close(torch.cat([by_state, by_action], 1), exact, rtol=1e-6, atol=1e-6)


def point_masses(theta: Params, q: Tensor) -> Tensor:
    """Positions of both centres of mass `[..., 4]` (x1, y1, x2, y2), y up."""
    q1, q2 = q.unbind(-1)
    r1, r2, l1 = theta["r1"], theta["r2"], theta["l1"]
    x2, y2 = l1 * torch.sin(q1) + r2 * torch.sin(q1 + q2), -l1 * torch.cos(q1) - r2 * torch.cos(q1 + q2)
    return torch.stack([r1 * torch.sin(q1), -r1 * torch.cos(q1), x2, y2], -1)


def test_double_pendulum_obeys_lagrange_equations_of_its_geometry() -> None:
    """d/dt dL/dw - dL/dq = torque - friction, with L written from positions, bodies and rotors."""
    mdp = double_pendulum(parameters="physical", dt=1e-5, integrator="rk4")
    theta = default_params(mdp.box) | {"cf1": scalar(0.05), "b2": scalar(0.02), "torque_offset1": scalar(0.3)}

    def lagrangian(q: Tensor, w: Tensor) -> Tensor:
        velocity = jvp(lambda q: point_masses(theta, q), (q,), (w,))[1]
        bodies = 0.5 * theta["m1"] * (velocity[:2] ** 2).sum() + 0.5 * theta["m2"] * (velocity[2:] ** 2).sum()
        # inertias are about the joints, the translation of the centres is already counted
        turning = 0.5 * (theta["I1"] - theta["m1"] * theta["r1"] ** 2) * w[0] ** 2
        turning = turning + 0.5 * (theta["I2"] - theta["m2"] * theta["r2"] ** 2) * (w[0] + w[1]) ** 2
        # rotor 1 turns with gr w1; rotor 2 sits on link 1 and turns against it, hence -gr Ir in the coupling
        rotors = 0.5 * theta["Ir"] * ((theta["gr"] * w[0]) ** 2 + (w[0] - theta["gr"] * w[1]) ** 2)
        height = point_masses(theta, q)[1::2]
        return bodies + turning + rotors - theta["g"] * (theta["m1"] * height[0] + theta["m2"] * height[1])

    generator = seeded(5)
    for _ in range(5):
        q, w, torque = torch.randn(3, 2, generator=generator, dtype=torch.float64)
        mass = hessian(lagrangian, argnums=1)(q, w)
        transport = jacfwd(grad(lagrangian, argnums=1), argnums=0)(q, w) @ w
        friction = torch.stack([theta["b1"], theta["b2"]]) * w
        friction = friction + torch.stack([theta["cf1"], theta["cf2"]]) * torch.atan(100.0 * w)
        net = torque + torch.stack([theta["torque_offset1"], theta["torque_offset2"]]) - friction
        exact = torch.linalg.solve(mass, net + grad(lagrangian)(q, w) - transport)
        state = torch.cat([q, w]).unsqueeze(0)
        found = (mdp.step(theta, state, torque.unsqueeze(0), state[:, :0])[0, 2:] - w) / mdp.dt
        # the mean acceleration over 10 us differs from the initial one by its rate of change times 5 us
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-3)


def test_base_and_physical_parameters_give_the_same_motion() -> None:
    physical, base = double_pendulum(parameters="physical"), double_pendulum()
    theta = default_params(physical.box)
    assert base_parameters(theta).keys() == base.box.default.keys()
    for key, value in base_parameters(theta).items():
        torch.testing.assert_close(value, default_params(base.box)[key], rtol=1e-12, atol=0.0)
    state = torch.randn(6, 4, generator=seeded(0), dtype=torch.float64)
    one = physical.step(theta, state, state[:, :2], state[:, :0])
    torch.testing.assert_close(base.step(base_parameters(theta), state, state[:, :2], state[:, :0]), one, **EXACT)


def test_cartpole_against_an_independent_integration() -> None:
    mdp = cartpole(dt=0.02, integrator="rk4", substeps=4)
    theta = default_params(mdp.box)
    M, m, length, bc, bp, g = (float(theta[key]) for key in mdp.box.unit)
    half = length / 2

    def rates(_: float, s: np.ndarray) -> np.ndarray:
        _, phi, v, w = s
        mass = np.array([[M + m, m * half * np.cos(phi)], [m * half * np.cos(phi), 4 / 3 * m * half**2]])
        push = [1.5 + m * half * np.sin(phi) * w**2 - bc * v, m * g * half * np.sin(phi) - bp * w]
        return np.concatenate([s[2:], np.linalg.solve(mass, push)])

    start = np.array([0.1, 0.4, -0.3, 0.8])
    exact = solve_ivp(rates, (0.0, 1.0), start, rtol=1e-11, atol=1e-12).y[:, -1]
    state = torch.as_tensor(start).unsqueeze(0)
    for _ in range(50):
        state = mdp.step(theta, state, stack([1.5]), state[:, :0])
    assert np.abs(state[0].numpy() - exact).max() < 1e-6  # RK4 at 5 ms: (5 ms * 4 rad/s)^4


def test_terminal_limits_of_the_cartpole() -> None:
    mdp = cartpole(position_limit=1.0, angle_limit=0.2, alive_reward=5.0)
    states = stack([0.0, 0.0, 0.0, 0.0], [1.5, 0.0, 0.0, 0.0], [0.0, -0.3, 0.0, 0.0])
    theta = default_params(mdp.box)
    assert mdp.terminal is not None
    assert mdp.terminal(theta, states).tolist() == [False, True, True]
    reward = mdp.reward(theta, states, states[:, :1], states[:, :0], states)
    assert float(reward[0]) == pytest.approx(5.0 * mdp.dt)
    assert cartpole().terminal is None


def test_rewards_are_highest_at_the_goal() -> None:
    for mdp, goal in (
        (pendulum(), [math.pi, 0.0]),
        (double_pendulum(), [math.pi, 0.0, 0.0, 0.0]),
        (cartpole(), [0.0] * 4),
    ):
        theta, best = default_params(mdp.box), stack(goal)
        still = torch.zeros(1, len(mdp.names["action"]), dtype=torch.float64)
        at_goal = mdp.reward(theta, best, still, still[:, :0], best)
        near = best + 0.1 * torch.randn(50, len(goal), generator=seeded(0), dtype=torch.float64)
        elsewhere = mdp.reward(theta, near, still.expand(50, -1), still[:, :0], near)
        assert float(at_goal) == pytest.approx(0.0, abs=1e-12)
        assert bool((elsewhere < at_goal).all())


def test_published_parameters_reproduce_their_published_error() -> None:
    """Authors' model_2.0 on excitation 02 and 12, measured torque, zeroed, 0.5 s: RMSE 0.0248, median 0.0193 rad."""
    text = shared("data/double_pendulum/published/design_A_model_2.0.yml").read_text()
    physical = {key: scalar(float(value)) for key, value in (line.split(":") for line in text.split("\n") if line)}
    theta = base_parameters(physical | {"torque_offset1": scalar(0.0), "torque_offset2": scalar(0.0)})
    mdp = double_pendulum(dt=0.004, integrator="midpoint")
    errors = []
    for run in ("02", "12"):
        log = np.genfromtxt(shared(f"data/double_pendulum/design_A/excitation_{run}.csv"), delimiter=",", names=True)
        time = np.arange(int(np.floor((log["time"][-1] - log["time"][0]) / 0.004 + 1e-9)) + 1) * 0.004
        at = lambda name, log=log, time=time: np.interp(log["time"][0] + time, log["time"], log[name])
        angle = np.stack([at("pos_meas1"), at("pos_meas2")], 1)
        torque = np.stack([at("tau_meas1"), at("tau_meas2")], 1)
        velocity = savgol_filter(angle, 11, 3, deriv=1, delta=0.004, axis=0)

        def misfit(zero: np.ndarray, starts: np.ndarray, a=angle, u=torque, w=velocity) -> np.ndarray:
            state = torch.as_tensor(np.concatenate([a[starts] - zero, w[starts]], 1))
            gaps = []
            for k in range(125):
                action = torch.as_tensor((u[starts + k] + u[starts + k + 1]) / 2)
                state = mdp.step(theta, state, action, state[:, :0])
                gaps.append(state[:, :2].numpy() + zero - a[starts + k + 1])
            return np.stack(gaps, 1)

        windows = np.arange(10, len(time) - 11 - 125 + 1, 25)
        early = windows[time[windows + 125] <= 2.0 + 1e-9]
        zero = least_squares(lambda z, early=early: misfit(z, early).ravel(), np.zeros(2)).x
        errors.append((misfit(zero, windows[time[windows] >= 2.0 - 1e-9]) ** 2).mean((1, 2)))
    pooled = np.concatenate(errors)
    assert len(pooled) == 150
    assert np.sqrt(pooled.mean()) == pytest.approx(0.0248, abs=5e-5)  # published to four digits
    assert np.median(np.sqrt(pooled)) == pytest.approx(0.0193, abs=2e-4)  # midpoint moves the median by 1e-4
