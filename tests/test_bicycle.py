"""Bicycles against closed forms: circles, steady cornering, understeer, critical speed, tyres at rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from problems import EXACT, scalar, stack
from scipy.integrate import solve_ivp
from scipy.optimize import brentq
from torch import Tensor
from torch.func import hessian, jacrev

from sim2real import ModelMDP, Params, default_params
from sim2real.simulators import dynamic_bicycle, kinematic_bicycle
from sim2real.simulators.bicycle import GRAVITY, tyre_force

NONE = torch.zeros(1, 0, dtype=torch.float64)
TYRES = ["linear", "pacejka"]


def roll(mdp: ModelMDP, theta: Params, state: Tensor, action: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        state = mdp.step(theta, state, action, NONE)
    return state


def changed(mdp: ModelMDP, **values: float) -> Params:
    return default_params(mdp.box) | {key: scalar(value) for key, value in values.items()}


@pytest.mark.parametrize("rear", [0.0, 1.58])
def test_constant_steering_drives_the_kinematic_bicycle_on_a_circle(rear: float) -> None:
    """The rear axle turns with radius wheelbase / tan d; the centre of mass is `rear` off that axle's line."""
    mdp = kinematic_bicycle(dt=0.02)
    theta = changed(mdp, rear=rear, steering_offset=0.05)
    d, v, steps = 0.25, 8.0, 200
    state = roll(mdp, theta, stack([2.0, -1.0, 0.4, v, d - 0.05]), stack([0.0, 0.0]), steps)[0]
    at_axle = (1.1 + rear) / math.tan(d)
    radius, slip = math.hypot(at_axle, rear), math.atan2(rear, at_axle)
    heading = 0.4 + v / radius * steps * 0.02
    centre = (2.0 - radius * math.sin(0.4 + slip), -1.0 + radius * math.cos(0.4 + slip))
    # RK4 on the circle: (v dt / radius)^4 / 120 per radian
    assert float(state[2]) == pytest.approx(heading, rel=1e-12)
    assert float(state[0]) == pytest.approx(centre[0] + radius * math.sin(heading + slip), abs=1e-6)
    assert float(state[1]) == pytest.approx(centre[1] - radius * math.cos(heading + slip), abs=1e-6)


def test_speed_against_linear_drag_and_steering_by_its_rate() -> None:
    action, t = stack([0.1, 2.0]), 1.0
    for mdp, speed, steering in ((kinematic_bicycle(dt=0.02), 3, 4), (dynamic_bicycle(dt=0.02), 3, 6)):
        theta = changed(mdp, drag=0.4, steering_offset=-0.05)
        start = torch.zeros(1, len(mdp.names["state"]), dtype=torch.float64)
        start[0, speed] = 12.0
        straight = roll(mdp, theta | {"steering_offset": scalar(0.0)}, start, action * stack([0.0, 1.0]), 50)[0]
        assert float(straight[speed]) == pytest.approx(5.0 + 7.0 * math.exp(-0.4 * t), rel=1e-9)
        assert float(straight[0]) == pytest.approx(5.0 * t + 7.0 / 0.4 * -math.expm1(-0.4 * t), rel=1e-9)
        assert float(roll(mdp, theta, start, action, 50)[0, steering]) == pytest.approx(0.1, rel=1e-12)


def cornering(theta: dict[str, float], V: float, r: float, slow: float, inverse: Callable[..., float]) -> np.ndarray:
    """(vx, vy, yaw rate, steering, acceleration) of steady cornering, from the slips that carry its side force."""
    front, rear, mass = theta["front"], theta["rear"], theta["mass"]
    side = mass * V * r / (front + rear)
    vy = rear * r - math.tan(inverse(side * front, "rear")) * math.hypot(V, slow)

    def excess(d: float) -> float:
        lateral = (vy + front * r) * math.cos(d) - V * math.sin(d)
        rolling = (vy + front * r) * math.sin(d) + V * math.cos(d)
        return -math.atan(lateral / math.hypot(rolling, slow)) - inverse(side * rear / math.cos(d), "front")

    d = brentq(excess, -0.5, 0.5, xtol=1e-15, rtol=1e-14)
    return np.array([V, vy, r, d, side * rear * math.tan(d) / mass - vy * r])


@pytest.mark.parametrize("tyre", TYRES)
def test_steady_cornering_in_closed_form(tyre: str) -> None:
    """The tyre law is inverted by hand; what comes out is a fixed point of the step on a circle of radius V / r."""
    mdp = dynamic_bicycle(tyre=tyre, slow_speed=0.5)
    theta = changed(mdp, stiffness_front=120000.0)
    value = {key: float(x) for key, x in theta.items()}

    def inverse(force: float, axle: str) -> float:
        stiffness = value[f"stiffness_{axle}"]
        if tyre == "linear":
            return force / stiffness
        other = value["rear"] if axle == "front" else value["front"]
        peak = value["friction"] * value["mass"] * GRAVITY * other / (value["front"] + value["rear"])
        bend = math.tan(math.asin(force / peak) / value["shape"])
        return bend * value["shape"] * peak / stiffness

    vx, vy, r, d, a = cornering(value, 20.0, 0.3, 0.5, inverse)
    state = stack([0.0, 0.0, 0.0, vx, vy, r, d])
    after = roll(mdp, theta, state, stack([0.0, a]), 10)[0]
    torch.testing.assert_close(after[3:], state[0, 3:], rtol=1e-11, atol=1e-12)
    radius, course = math.hypot(vx, vy) / r, math.atan2(vy, vx)
    assert float(after[0]) == pytest.approx(radius * (math.sin(0.03 + course) - math.sin(course)), rel=1e-7)
    assert float(after[1]) == pytest.approx(radius * (math.cos(course) - math.cos(0.03 + course)), rel=1e-7)


def test_understeer_gradient() -> None:
    """d = wheelbase / R + K V^2 / R,   K = mass / wheelbase (rear / stiffness_front - front / stiffness_rear)."""
    mdp = dynamic_bicycle(tyre="linear", slow_speed=1e-3)
    theta = changed(mdp, stiffness_front=100000.0)
    K = 1573.0 / 2.68 * (1.58 / 100000.0 - 1.1 / 160000.0)
    d = 1e-3
    for V in (10.0, 20.0, 35.0):
        r = V * d / (2.68 + K * V * V)
        # the steering that holds the speed loses d^2 of it, which the small angles neglect
        state = roll(mdp, theta, stack([0.0, 0.0, 0.0, V, 0.0, 0.0, d]), stack([0.0, 0.0]), 400)[0]
        assert float(state[5]) == pytest.approx(r, rel=1e-4)


def test_the_critical_speed_of_an_oversteering_car() -> None:
    """With K < 0 straight driving is unstable above sqrt(-wheelbase / K), and an understeering car never is."""
    mdp = dynamic_bicycle(tyre="linear", slow_speed=1e-3)
    oversteering, understeering = changed(mdp, stiffness_rear=90000.0), default_params(mdp.box)
    K = 1573.0 / 2.68 * (1.58 / 160000.0 - 1.1 / 90000.0)
    critical = math.sqrt(-2.68 / K)

    def growth(theta: Params, V: float) -> float:
        state = stack(0.0, 0.0, 0.0, V, 0.0, 0.0, 0.0)
        step = lambda s: mdp.step(theta, s[None], stack([0.0, 0.0]), NONE)[0]
        return float(torch.linalg.eigvals(jacrev(step)(state)[4:6, 4:6]).abs().max())

    assert growth(oversteering, 0.99 * critical) < 1.0 < growth(oversteering, 1.01 * critical)
    assert growth(understeering, 3.0 * critical) < 1.0


@pytest.mark.parametrize("tyre", TYRES)
def test_at_rest_tyres_hold_still_damp_sliding_and_stay_smooth(tyre: str) -> None:
    mdp = dynamic_bicycle(tyre=tyre)
    theta = default_params(mdp.box)
    parked = stack([1.0, 2.0, 0.3, 0.0, 0.0, 0.0, 0.4])
    torch.testing.assert_close(roll(mdp, theta, parked, stack([0.0, 0.0]), 10), parked, **EXACT)
    sliding = stack([0.0, 0.0, 0.0, 0.0, 0.5, 0.2, 0.3])
    energy = lambda s: float(0.5 * 1573.0 * s[0, 3:5].square().sum() + 0.5 * 2873.0 * s[0, 5] ** 2)
    after = [roll(mdp, theta, sliding, stack([0.0, 0.0]), n) for n in range(6)]
    assert all(energy(b) < energy(a) for a, b in pairwise(after))
    step = lambda s: mdp.step(theta, s[None], stack([0.0, 0.0]), NONE)[0]
    for state in (parked[0], torch.zeros(7, dtype=torch.float64)):
        assert bool(torch.isfinite(jacrev(step)(state)).all())
        assert bool(torch.isfinite(hessian(step)(state)).all())
    # in reverse the tyres brake sideways motion too
    assert abs(float(roll(mdp, theta, stack([0.0, 0.0, 0.0, -5.0, 0.5, 0.0, 0.0]), stack([0.0, 0.0]), 5)[0, 4])) < 0.25


def test_stiff_tyres_make_the_kinematic_bicycle() -> None:
    stiff, free = dynamic_bicycle(tyre="linear", dt=0.002, slow_speed=1e-2), kinematic_bicycle(dt=0.002)
    theta = changed(stiff, stiffness_front=2e5, stiffness_rear=2e5, mass=200.0, inertia=300.0)
    slip, v, still = math.atan(1.58 / 2.68 * math.tan(0.2)), 3.0, stack([0.0, 0.0])
    rate = v * math.sin(slip) / 1.58
    state = stack([0.0, 0.0, 0.1, v * math.cos(slip), v * math.sin(slip), rate, 0.2])
    one = roll(stiff, theta, state, still, 500)[0]
    other = roll(free, default_params(free.box), stack([0.0, 0.0, 0.1, v, 0.2]), still, 500)[0]
    # the side force m v r takes slips of m v r / (2 C) = 3e-4 rad, over 3 m
    torch.testing.assert_close(one[:3], other[:3], rtol=1e-3, atol=1e-3)
    assert float(one[5]) == pytest.approx(rate, rel=2e-3)


def test_the_magic_formula() -> None:
    theta = {key: scalar(x) for key, x in {"friction": 0.8, "shape": 1.4, "curvature": 0.0}.items()}
    stiffness, load = scalar(90000.0), scalar(7000.0)
    force = lambda slip: tyre_force(theta, slip, stiffness, load)
    zero = scalar(0.0)
    assert float(jacrev(force)(zero)) == pytest.approx(90000.0)
    # C atan(B slip) = pi / 2 at the peak
    peak = math.tan(math.pi / 2.8) * 1.4 * 0.8 * 7000.0 / 90000.0
    assert float(force(scalar(peak))) == pytest.approx(5600.0)
    assert float(jacrev(force)(scalar(peak))) == pytest.approx(0.0, abs=1e-8)
    assert float(force(scalar(-peak))) == pytest.approx(-5600.0)
    bent = theta | {"curvature": scalar(-2.0)}
    x = 90000.0 / (1.4 * 5600.0) * 0.1
    published = 5600.0 * math.sin(1.4 * math.atan(x + 2.0 * (x - math.atan(x))))
    assert float(tyre_force(bent, scalar(0.1), stiffness, load)) == pytest.approx(published)


@pytest.mark.parametrize("tyre", TYRES)
def test_the_dynamic_bicycle_against_an_independent_integration(tyre: str) -> None:
    """With slips by atan2 of velocities, and forces as vectors in world axes."""
    mdp = dynamic_bicycle(tyre=tyre, slow_speed=1e-4, substeps=2)
    theta = changed(mdp, drag=0.05, steering_offset=0.02, **({"curvature": -0.6} if tyre == "pacejka" else {}))
    t = {key: float(x) for key, x in theta.items()}
    rate, a = 0.05, 0.7

    def rates(_: float, s: np.ndarray) -> np.ndarray:
        heading, velocity, r, d = s[2], s[3:5], s[5], s[6] + t["steering_offset"]
        ahead = np.array([math.cos(heading), math.sin(heading)])
        left = np.array([-ahead[1], ahead[0]])
        force = t["mass"] * (a - t["drag"] * velocity @ ahead) * ahead
        moment = 0.0
        for lever, other, turn, axle in ((t["front"], t["rear"], d, "front"), (-t["rear"], t["front"], 0.0, "rear")):
            at = velocity + lever * r * left
            slip = heading + turn - math.atan2(at[1], at[0])
            load = t["mass"] * 9.81 * other / (t["front"] + t["rear"])
            side = t[f"stiffness_{axle}"] * slip
            if tyre == "pacejka":
                D, C, E = t["friction"] * load, t["shape"], t["curvature"]
                x = side / (C * D)
                side = D * math.sin(C * math.atan(x - E * (x - math.atan(x))))
            push = side * np.array([-math.sin(heading + turn), math.cos(heading + turn)])
            force, moment = force + push, moment + lever * push @ left
        return np.concatenate([velocity, [r], force / t["mass"], [moment / t["inertia"], rate]])

    start = np.array([0.0, 0.0, 0.3, 18.0 * math.cos(0.3), 18.0 * math.sin(0.3), 0.0, 0.0])
    exact = solve_ivp(rates, (0.0, 1.0), start, rtol=1e-11, atol=1e-11).y[:, -1]
    turn = np.array([[math.cos(exact[2]), math.sin(exact[2])], [-math.sin(exact[2]), math.cos(exact[2])]])
    exact[3:5] = turn @ exact[3:5]
    found = roll(mdp, theta, stack([0.0, 0.0, 0.3, 18.0, 0.0, 0.0, 0.0]), stack([rate, a]), 100)[0]
    assert np.abs(found.numpy() - exact).max() < 1e-6  # RK4 at 5 ms and a lateral rate of 15/s: (0.075)^4 / 120 a step


@pytest.mark.parametrize(("integrator", "order"), [("midpoint", 2), ("rk4", 4)])
@pytest.mark.parametrize("kind", ["kinematic", *TYRES])
def test_order_of_convergence(kind: str, integrator: str, order: int) -> None:
    def after(substeps: int, scheme: str) -> Tensor:
        more = {"dt": 0.04, "integrator": scheme, "substeps": substeps}
        mdp = kinematic_bicycle(**more) if kind == "kinematic" else dynamic_bicycle(tyre=kind, **more)
        start = [0.0, 0.0, 0.2, 12.0, 0.1] if kind == "kinematic" else [0.0, 0.0, 0.2, 12.0, 0.5, 0.3, 0.1]
        return roll(mdp, default_params(mdp.box), stack(start), stack([0.2, 1.0]), 10)

    exact = after(64, "rk4")
    errors = [float((after(n, integrator) - exact).norm()) for n in (4, 8)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.4)


def test_rewards_are_highest_on_the_axis_at_speed() -> None:
    for mdp, goal in (
        (kinematic_bicycle(speed=7.0), [3.0, 0.0, 0.0, 7.0, 0.0]),
        (dynamic_bicycle(speed=7.0), [3.0, 0.0, 0.0, 7.0, 0.0, 0.0, 0.0]),
    ):
        theta, still = default_params(mdp.box), stack([0.0, 0.0])
        reward = lambda s, a, mdp=mdp, theta=theta: float(mdp.reward(theta, s, a, NONE, s))
        assert reward(stack(goal), still) == pytest.approx(0.0, abs=1e-15)
        off = stack(goal) + stack([0.0, 2.0, 0.3, 1.0] + [0.0] * (len(goal) - 4))
        cost = 4.0 + 2.0 * (1.0 - math.cos(0.3)) + 0.1 + 0.1 * 0.25 + 0.01 * 9.0
        assert reward(off, stack([0.5, -3.0])) == pytest.approx(-mdp.dt * cost)
        start = mdp.initial_state(theta, torch.zeros(1, len(goal), dtype=torch.float64))
        torch.testing.assert_close(start, stack([0.0, *goal[1:]]))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: dynamic_bicycle(tyre="brush"), "tyre must be 'linear' or 'pacejka'"),
        (lambda: dynamic_bicycle(slow_speed=0.0), "slow_speed must be > 0"),
        (lambda: dynamic_bicycle(dt=math.inf), "dt must be a positive"),
        (lambda: kinematic_bicycle(integrator="semi_implicit"), "integrator must be one of"),
    ],
)
def test_wrong_arguments_are_named(build: Callable[[], ModelMDP], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
