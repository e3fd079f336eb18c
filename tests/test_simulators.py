"""Simulators: the contract of torch.func, closed forms, energy, order of the integrators, and a published figure."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from derivatives import gradient_error, random_problem, romberg_gradient, step_derivatives_hold
from problems import CASES, closed_loop, returns_of, scalar, seeded, shared
from scipy.integrate import solve_ivp
from scipy.optimize import least_squares
from scipy.signal import savgol_filter
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from sim2real import Noise, Params, contains, default_params, ravel, unravel
from sim2real.simulators import (
    base_parameters,
    building_rc,
    cartpole,
    cartpole_energy,
    double_pendulum,
    double_pendulum_energy,
    integrate_first_order,
    integrate_second_order,
    linear_gaussian,
    multiplicative_noise_lqr,
    pendulum,
    pendulum_energy,
)

INTEGRATORS = ("semi_implicit", "midpoint", "rk4")
ORDER = {"semi_implicit": 1, "midpoint": 2, "rk4": 4}
EXACT = {"rtol": 1e-10, "atol": 1e-11}
"""two orders of the same float64 operations: rounding over a few steps"""


def stack(*values: float | list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# The contract --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_contract_of_torch_func(name: str) -> None:
    case = CASES[name]
    policy, nu, noise = closed_loop(case, batch=3, horizon=3)
    returns = returns_of(case, policy, nu, noise)
    x = ravel(case.theta)

    def objective(x: Tensor) -> Tensor:
        return returns(unravel(x, case.theta)).mean()

    def vector(x: Tensor) -> Tensor:
        return returns(unravel(x, case.theta))

    tangent = torch.randn(x.shape, generator=seeded(1), dtype=torch.float64)
    cotangent = torch.randn(3, generator=seeded(2), dtype=torch.float64)
    value, pushed = jvp(vector, (x,), (tangent,))
    _, pull = vjp(vector, x)
    torch.testing.assert_close(cotangent @ pushed, pull(cotangent)[0] @ tangent, **EXACT)
    jacobian = jacrev(vector)(x)
    torch.testing.assert_close(jacobian, jacfwd(vector)(x), **EXACT)
    torch.testing.assert_close(jacobian @ tangent, pushed, **EXACT)
    second = hessian(objective)(x)
    torch.testing.assert_close(second, second.mT, rtol=1e-8, atol=1e-9)  # cancelling terms cost two digits more
    torch.testing.assert_close(jvp(grad(objective), (x,), (tangent,))[1], second @ tangent, rtol=1e-8, atol=1e-9)
    assert value.shape == (3,)


@pytest.mark.parametrize("name", CASES)
def test_vmap_over_environments_equals_the_batch(name: str) -> None:
    case = CASES[name]
    policy, nu, noise = closed_loop(case, batch=4, horizon=3)
    factor = 1.0 + 0.1 * torch.rand(4, generator=seeded(3), dtype=torch.float64)
    each = {key: torch.stack([f * value for f in factor]) for key, value in case.theta.items()}
    batch = returns_of(case, policy, nu, noise)

    def single(theta: Params, noise: Noise) -> Tensor:
        one = Noise(*(part.unsqueeze(0) for part in (noise.initial, noise.process, noise.policy)))
        return returns_of(case, policy, nu, one)(theta)[0]

    parts = (noise.initial, noise.process, noise.policy)
    by_vmap = vmap(lambda theta, *parts: single(theta, Noise(*parts)))
    torch.testing.assert_close(by_vmap(each, *parts), batch(each), **EXACT)
    common = vmap(lambda *parts: single(case.theta, Noise(*parts)))
    torch.testing.assert_close(common(*parts), batch(case.theta), **EXACT)
    gradients = vmap(grad(lambda theta, *parts: single(theta, Noise(*parts))))(each, *parts)
    together = grad(lambda theta: batch(theta).sum())(each)
    for key, value in gradients.items():
        torch.testing.assert_close(value, together[key], **EXACT)


@pytest.mark.parametrize("name", CASES)
def test_mixed_shared_and_per_environment_parameters(name: str) -> None:
    case = CASES[name]
    policy, nu, noise = closed_loop(case, batch=3, horizon=2)
    returns = returns_of(case, policy, nu, noise)
    for key in case.theta:
        mixed = case.theta | {key: case.theta[key].expand(3, *case.theta[key].shape)}
        torch.testing.assert_close(returns(mixed), returns(case.theta), **EXACT)


@pytest.mark.parametrize("name", CASES)
def test_step_and_rollout_derivatives(name: str) -> None:
    generator = seeded(11)
    assert step_derivatives_hold(CASES[name], generator)
    assert max(gradient_error(random_problem(CASES[name], generator)) for _ in range(3)) < 1.0


def test_the_reference_of_the_derivative_bar_sees_a_wrong_gradient() -> None:
    x = stack(0.3, -2.0)
    reference, doubt = romberg_gradient(lambda x: torch.sin(x[:, 0]) * x[:, 1] ** 2, x, x.abs())
    exact = stack(math.cos(0.3) * 4.0, math.sin(0.3) * -4.0)
    assert float(((reference - exact).abs() / exact.abs()).max()) < 1e-11
    assert float(doubt.max()) < 1e-9
    case = CASES["pendulum rk4"]
    problem = random_problem(case, seeded(0))
    detached = type(problem)(lambda x: problem.value(x) + 1e-5 * x.detach()[:, 0], problem.x, problem.scale)
    assert gradient_error(detached) > 1.0


@pytest.mark.parametrize("name", CASES)
def test_declared_names_units_and_bounds(name: str) -> None:
    mdp = CASES[name].mdp
    theta = default_params(mdp.box)
    assert contains(mdp.box, theta)
    assert theta.keys() == mdp.box.unit.keys()
    _, _, noise = closed_loop(CASES[name], batch=2, horizon=2)
    state = mdp.initial_state(theta, noise.initial)
    assert state.shape == (2, len(mdp.names["state"]))
    seen = state if mdp.observe is None else mdp.observe(theta, state)
    assert seen.shape == (2, len(mdp.names["signal"]))
    assert len(mdp.names.get("exogenous", ())) == mdp.exogenous_dim
    columns = {column for group in mdp.names.values() for column in group}
    assert columns <= mdp.units.keys()
    assert mdp.derivative_order == 2


@pytest.mark.parametrize("name", CASES)
def test_dtype_follows_the_inputs_and_inputs_stay_as_they_were(name: str) -> None:
    case = CASES[name]
    if name in ("linear Gaussian", "multiplicative noise"):
        pytest.skip("their matrices are given in the dtype to compute in")
    theta = {key: value.float() for key, value in case.theta.items()}
    _, _, noise = closed_loop(case, batch=2, horizon=1)
    state = case.mdp.initial_state(theta, noise.initial.float())
    action, e = torch.ones(2, len(case.mdp.names["action"])), noise.process[:, 0].float()
    before = state.clone()
    following = case.mdp.step(theta, state, action, e)
    assert following.dtype == torch.float32
    assert case.mdp.reward(theta, state, action, e, following).dtype == torch.float32
    assert torch.equal(state, before)


# Integrators ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_convergence_order_of_second_order_integrators(integrator: str) -> None:
    """Damped oscillator q'' = -4 q - 0.6 w against its closed form at t = 1."""

    def end(steps: int) -> Tensor:
        q, w = stack(1.0), stack(-0.5)
        q, w = integrate_second_order(
            lambda q, w: -4.0 * q - 0.6 * w, q, w, dt=1.0, integrator=integrator, substeps=steps
        )
        return torch.cat([q, w])

    decay, frequency = 0.3, math.sqrt(4.0 - 0.09)
    sine = (-0.5 + decay) / frequency
    cos_t, sin_t, envelope = math.cos(frequency), math.sin(frequency), math.exp(-decay)
    q = envelope * (cos_t + sine * sin_t)
    exact = stack(q, envelope * frequency * (sine * cos_t - sin_t) - decay * q)
    coarse, fine = (float((end(steps) - exact).abs().max()) for steps in (40, 80))
    # halving the step divides the error by 2^order; the next term of the expansion moves this by a few per cent
    assert abs(math.log2(coarse / fine) - ORDER[integrator]) < 0.1


@pytest.mark.parametrize(("integrator", "order"), [("midpoint", 2), ("rk4", 4)])
def test_convergence_order_of_first_order_integrators(integrator: str, order: int) -> None:
    def end(steps: int) -> float:
        return float(
            integrate_first_order(lambda x: -(x**2), stack(1.0), dt=1.0, integrator=integrator, substeps=steps)
        )

    coarse, fine = (abs(end(steps) - 0.5) for steps in (20, 40))  # x = 1 / (1 + t)
    assert abs(math.log2(coarse / fine) - order) < 0.1


@pytest.mark.parametrize("integrator", INTEGRATORS)
@pytest.mark.parametrize("system", ["pendulum", "double pendulum", "cart-pole"])
def test_energy_is_conserved_to_the_order_of_the_integrator(system: str, integrator: str) -> None:
    def drift(dt: float) -> float:
        if system == "pendulum":
            mdp, energy, start = pendulum(dt=dt, integrator=integrator), pendulum_energy, stack([2.0, 0.5])
        elif system == "double pendulum":
            mdp, energy = double_pendulum(dt=dt, integrator=integrator), double_pendulum_energy
            start = stack([1.2, -0.8, 0.5, 1.0])
        else:
            mdp, energy, start = cartpole(dt=dt, integrator=integrator), cartpole_energy, stack([0.0, 1.0, 0.3, -0.5])
        frictionless = ("damping", "coulomb", "b1", "b2", "cf1", "cf2", "cart_friction", "pole_friction")
        theta = default_params(mdp.box)
        theta |= {key: scalar(0.0) for key in frictionless if key in theta}
        state, still = start, torch.zeros(1, len(mdp.names["action"]), dtype=torch.float64)
        for _ in range(round(0.4 / dt)):
            state = mdp.step(theta, state, still, state[:, :0])
        return float((energy(theta, state) - energy(theta, start)).abs().max())

    coarse, fine = drift(0.01), drift(0.005)
    # order p or better (the leading term of an energy may cancel); 0.3 leaves room for the next term of the expansion
    assert math.log2(coarse / fine) > ORDER[integrator] - 0.3
    assert fine < {"semi_implicit": 0.1, "midpoint": 1e-3, "rk4": 1e-7}[integrator]  # J, of energies of a few J


def test_friction_and_torque_change_the_energy_by_their_work() -> None:
    """dE = integral (torque + offset - friction) w dt along the pendulum, by Simpson's rule over RK4 steps."""
    mdp = pendulum(dt=0.002, integrator="rk4")
    theta = default_params(mdp.box) | {"coulomb": scalar(0.1), "torque_offset": scalar(0.2)}
    state, torque = stack([0.5, 3.0]), stack([0.7])
    path = [state]
    for _ in range(100):
        path.append(mdp.step(theta, path[-1], torque, state[:, :0]))
    w = torch.cat(path)[:, 1]
    power = (0.7 + 0.2 - 0.1 * w - 0.1 * torch.atan(100.0 * w)) * w
    work = 0.002 / 3.0 * (power[0] + power[-1] + 4.0 * power[1:-1:2].sum() + 2.0 * power[2:-1:2].sum())
    gained = pendulum_energy(theta, path[-1]) - pendulum_energy(theta, path[0])
    torch.testing.assert_close(gained[0], work, rtol=1e-7, atol=1e-9)  # Simpson: h^4 of a smooth power over 0.2 s


# Mechanics in closed form --------------------------------------------------------------------------------------------


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


# Houses --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 3])
def test_house_step_is_the_exact_solution(order: int) -> None:
    mdp = building_rc(order)
    theta = default_params(mdp.box)
    value = {key: float(entry) for key, entry in theta.items()}

    def rates(_: float, x: np.ndarray) -> np.ndarray:
        Ti, Ta, Ph = x[0], 5.0, 30.0
        flow = (Ta - Ti) / value["Ria"] + (Ph if order < 3 else 0.0)
        if order > 1:
            flow += (x[1] - Ti) / value["Rie"]
        if order > 2:
            flow += (x[2] - Ti) / value["Rih"]
        rate = [flow / value["Ci"]]
        if order > 1:
            rate.append(((Ti - x[1]) / value["Rie"] + (Ta - x[1]) / value["Rea"]) / value["Ce"])
        if order > 2:
            rate.append(((Ti - x[2]) / value["Rih"] + Ph) / value["Ch"])
        return np.array(rate)

    start = np.array([20.0, 18.0, 25.0])[:order]
    exact = solve_ivp(rates, (0.0, 1.0), start, rtol=1e-12, atol=1e-12).y[:, -1]
    found = mdp.step(theta, torch.as_tensor(start).unsqueeze(0), stack([30.0]), stack([5.0]))
    np.testing.assert_allclose(found[0].numpy(), exact, rtol=1e-9)  # the reference integrator's own tolerance


def test_house_integrators_converge_to_the_exact_step() -> None:
    theta = default_params(building_rc(3).box)
    state, heat, weather = stack([20.0, 18.0, 25.0]), stack([30.0]), stack([5.0])
    exact = building_rc(3).step(theta, state, heat, weather)
    for scheme, order in (("midpoint", 2), ("rk4", 4)):
        gaps = []
        for substeps in (16, 32):
            mdp = building_rc(3, integrator=scheme, substeps=substeps)
            gaps.append(float((mdp.step(theta, state, heat, weather) - exact).abs().max()))
        assert abs(math.log2(gaps[0] / gaps[1]) - order) < 0.35  # the fast air node is not yet deep in the limit
        assert mdp.open_loop is None


@pytest.mark.parametrize("per_environment", [False, True])
def test_house_open_loop_equals_the_steps(per_environment: bool) -> None:
    mdp = building_rc(3)
    theta = default_params(mdp.box)
    if per_environment:
        theta = {key: value * stack(1.0, 1.3) for key, value in theta.items()}
    generator = seeded(0)
    heat = 30.0 * torch.rand(2, 12, 1, generator=generator, dtype=torch.float64)
    weather = 5.0 * torch.randn(2, 12, 1, generator=generator, dtype=torch.float64)
    states = [torch.full((2, 3), 20.0, dtype=torch.float64)]
    for t in range(12):
        states.append(mdp.step(theta, states[-1], heat[:, t], weather[:, t]))
    assert mdp.open_loop is not None
    torch.testing.assert_close(mdp.open_loop(theta, states[0], heat, weather), torch.stack(states, 1), **EXACT)


def test_house_in_equilibrium_stays_and_balances_its_heat() -> None:
    """At rest the heating power equals the loss through both paths: Ph = (Ti - Ta) (1/Ria + 1/(Rie + Rea))."""
    mdp = building_rc(3)
    theta = default_params(mdp.box)
    loss = 1.0 / theta["Ria"] + 1.0 / (theta["Rie"] + theta["Rea"])
    power, Ti = 15.0 * loss, scalar(20.0)
    Te = Ti - 15.0 * theta["Rie"] / (theta["Rie"] + theta["Rea"])
    state = torch.stack([Ti, Te, Ti + power * theta["Rih"]]).unsqueeze(0)
    following = mdp.step(theta, state, power.reshape(1, 1), stack([5.0]))
    torch.testing.assert_close(following, state, rtol=1e-12, atol=1e-12)
    reward = mdp.reward(theta, state, power.reshape(1, 1), stack([5.0]), following)
    assert float(reward) == pytest.approx(-0.01 * float(power))


# Linear systems ------------------------------------------------------------------------------------------------------


def test_log_densities_match_torch_distributions() -> None:
    A, B = CASES["linear Gaussian"].theta["A"], CASES["linear Gaussian"].theta["B"]
    W = 0.1 * torch.eye(3, dtype=torch.float64) + 0.02
    state, action, following = (torch.randn(5, k, generator=seeded(k), dtype=torch.float64) for k in (3, 2, 3))
    mean = state @ A.T + action @ B.T
    normal = torch.distributions.MultivariateNormal
    plain = linear_gaussian(A, B, noise_covariance=W)
    assert plain.log_prob is not None
    torch.testing.assert_close(
        plain.log_prob({"A": A, "B": B, "noise_scale": scalar(0.7)}, state, action, following),
        normal(mean, 0.49 * W).log_prob(following),
        **EXACT,
    )
    torch.testing.assert_close(
        plain.log_prob({"A": A, "B": B}, state, action, following), normal(mean, W).log_prob(following), **EXACT
    )
    world = multiplicative_noise_lqr(A, B, 0.5, noise_covariance=W)
    assert world.log_prob is not None
    spread = torch.stack([W + 0.25 * B @ torch.diag(a**2) @ B.T for a in action])
    torch.testing.assert_close(
        world.log_prob(default_params(world.box), state, action, following),
        normal(mean, spread).log_prob(following),
        **EXACT,
    )


def test_multiplicative_noise_has_the_stated_moments() -> None:
    """Mean and covariance of s' over 200 000 draws; six-sigma bounds, so a false alarm has probability below 1e-7."""
    A, B = CASES["linear Gaussian"].theta["A"], CASES["linear Gaussian"].theta["B"]
    world = multiplicative_noise_lqr(A, B, 0.8)
    count = 200_000
    state, action = stack([1.0, -0.5, 0.3]), stack([0.7, -1.2])
    e = torch.randn(count, 5, generator=seeded(0), dtype=torch.float64)
    sample = world.step(default_params(world.box), state.expand(count, -1), action.expand(count, -1), e)
    covariance = 0.05 * torch.eye(3, dtype=torch.float64) + 0.64 * B @ torch.diag(action[0] ** 2) @ B.T
    deviation = (sample.mean(0) - (state @ A.T + action @ B.T)[0]) / (covariance.diagonal() / count).sqrt()
    assert float(deviation.abs().max()) < 6.0
    variance = covariance.diagonal()
    spread = torch.sqrt((variance[:, None] * variance + covariance**2) / count)
    assert float(((torch.cov(sample.T) - covariance) / spread).abs().max()) < 6.0


def test_quadratic_cost_and_start_of_linear_systems() -> None:
    A, B = torch.eye(2, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    Q, R = stack([2.0, 0.5], [0.5, 1.0]), stack([3.0])
    mdp = linear_gaussian(A, B, state_cost=Q, action_cost=R, initial_mean=stack(1.0, 2.0), initial_covariance=4.0 * A)
    e0 = stack([1.0, -1.0])
    state, action = mdp.initial_state({}, e0), stack([2.0])
    assert state.tolist() == [[3.0, 0.0]]
    assert float(mdp.reward({}, state, action, e0, state)) == -(2.0 * 9.0 + 3.0 * 4.0)
    assert mdp.log_prob is None
    assert mdp.noise_dims == (2, 0)
    assert mdp.step({"A": A, "B": B}, state, action, e0[:, :0]).tolist() == [[5.0, 2.0]]


# Failures ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: pendulum(dt=0.0), "dt must be a positive"),
        (lambda: pendulum(dt=math.nan), "dt must be a positive"),
        (lambda: pendulum(substeps=0), "substeps must be at least 1"),
        (lambda: double_pendulum(integrator="euler"), "integrator must be one of"),
        (lambda: double_pendulum(parameters="urdf"), "parameters must be 'base' or 'physical'"),
        (lambda: cartpole(angle_limit=0.0), "limits must be > 0"),
        (lambda: building_rc(4), "order must be 1, 2 or 3"),
        (lambda: building_rc(integrator="semi_implicit"), "integrator must be one of"),
        (lambda: linear_gaussian(torch.zeros(2, 3), torch.zeros(2, 1)), r"A must be \[n, n\]"),
        (lambda: linear_gaussian(torch.eye(2), torch.zeros(3, 1)), r"A must be \[n, n\]"),
        (lambda: linear_gaussian(torch.eye(2), torch.ones(2, 1), state_cost=torch.eye(3)), "state_cost must be"),
        (
            lambda: linear_gaussian(torch.eye(2), torch.ones(2, 1), action_cost=torch.tensor([[1.0, 2.0]])),
            "action_cost must be a symmetric",
        ),
        (
            lambda: linear_gaussian(torch.eye(2), torch.ones(2, 1), noise_covariance=-torch.eye(2)),
            "noise_covariance must be positive definite",
        ),
        (lambda: linear_gaussian(torch.eye(2), torch.ones(2, 1), initial_mean=torch.ones(3)), "initial_mean must be"),
        (lambda: multiplicative_noise_lqr(torch.eye(2), torch.ones(2, 1), -0.1), "sigma must be finite"),
    ],
)
def test_wrong_arguments_are_named(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
