"""The evaporator: the published steady state and its optimality, balances by hand, derivatives, wrong arguments."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import LinearConstraint, fsolve, minimize
from torch import Tensor

from sim2real.bounds import contains, default_params
from sim2real.params import Params
from sim2real.simulators.evaporation import evaporation, evaporation_cost

THETA = default_params(evaporation().box)
STATE = torch.tensor([[25.0, 49.743]], dtype=torch.float64)
ACTION = torch.tensor([[191.713, 215.888]], dtype=torch.float64)
NO_NOISE = torch.zeros(1, 4, dtype=torch.float64)


def published_rates(X2: float, P2: float, P100: float, F200: float) -> tuple[float, float, float]:
    """(X2', P2', cost) from the equations as published, in plain floats and with the division by F200."""
    T2 = 0.5616 * P2 + 0.3126 * X2 + 48.43
    T3 = 0.507 * P2 + 55.0
    T100 = 0.1538 * P100 + 90.0
    Q100 = 0.16 * (10.0 + 50.0) * (T100 - T2)
    F4 = (Q100 - 10.0 * 0.07 * (T2 - 40.0)) / 38.5
    Q200 = 6.84 * (T3 - 25.0) / (1.0 + 6.84 / (2.0 * 0.07 * F200))
    F2 = 10.0 - F4
    cost = 10.09 * (F2 + 50.0) + 600.0 * Q100 / 36.6 + 0.6 * F200
    return (10.0 * 5.0 - F2 * X2) / 20.0, (F4 - Q200 / 38.5) / 4.0, cost


def test_the_published_optimum_is_a_steady_state():
    following = evaporation().step(THETA, STATE, ACTION, NO_NOISE)
    # published with three decimals: half a digit in P100 or F200 moves the state by less than 1e-4 in two minutes
    torch.testing.assert_close(following, STATE, rtol=0, atol=1e-4)


def test_the_published_steady_state_is_the_cheapest_within_the_limits():
    """scipy on the steady-state equations, X2 fixed by its limit, gives the published figures."""

    def steady(P2: float, guess: tuple[float, float]) -> tuple[float, float]:
        inputs = fsolve(lambda u: published_rates(25.0, P2, *u)[:2], guess, xtol=1e-12)
        return float(inputs[0]), float(inputs[1])

    def cost(x: np.ndarray) -> float:
        return published_rates(25.0, float(x[0]), *steady(float(x[0]), (191.7, 215.9)))[2]

    limits = LinearConstraint(np.eye(1), 40.0, 80.0)
    best = minimize(cost, [55.0], constraints=[limits], options={"ftol": 1e-13}, method="SLSQP")
    # the cost is flat at its minimum, where a relative 1e-12 of it is 1e-3 kPa
    assert best.x[0] == pytest.approx(49.743, abs=5e-3)
    inputs = steady(float(best.x[0]), (191.7, 215.9))
    assert inputs == pytest.approx((191.713, 215.888), abs=0.05)
    richer = fsolve(lambda u: published_rates(25.5, 49.743, *u)[:2], (193.0, 217.0))
    assert published_rates(25.5, 49.743, *richer)[2] > best.fun  # the limit binds: more concentrated costs more


def test_rates_and_cost_equal_the_published_equations():
    model = evaporation(dt=1e-3, integrator="midpoint", penalty=1e-9)
    state = torch.tensor([[27.0, 55.0]], dtype=torch.float64)
    action = torch.tensor([[230.0, 170.0]], dtype=torch.float64)
    slope = (model.step(THETA, state, action, NO_NOISE) - state) / (1e-3 / 60.0)
    composition, pressure, cost = published_rates(27.0, 55.0, 230.0, 170.0)
    # a step of 1 ms: the difference quotient is the rate but for curvature and rounding (1e-14 * 55 / 1.7e-5)
    assert slope[0].tolist() == pytest.approx([composition, pressure], abs=1e-5)
    assert float(evaporation_cost(THETA, state, action)) == pytest.approx(cost, rel=1e-12)
    reward = model.reward(THETA, state, action, NO_NOISE, state)
    assert float(reward) == pytest.approx(-cost * 1e-3 / 60.0, rel=1e-9)


def test_limits_cost_their_price_per_minute_beyond_them():
    model = evaporation(penalty=1000.0, softness=0.1)
    free = evaporation_cost(THETA, STATE, ACTION)

    def price(X2: float, P2: float) -> float:
        following = torch.tensor([[X2, P2]], dtype=torch.float64)
        return float(-model.reward(THETA, STATE, ACTION, NO_NOISE, following) / 2.0 - free)

    # far beyond a limit (20 widths and more) the soft limit is the hinge itself, to exp(-20)
    assert price(22.0, 50.0) == pytest.approx(3000.0, rel=1e-6)
    assert price(30.0, 37.0) == pytest.approx(3000.0, rel=1e-6)
    assert price(30.0, 83.0) == pytest.approx(3000.0, rel=1e-6)
    assert price(30.0, 60.0) == pytest.approx(0.0, abs=1e-6)
    assert price(25.0, 60.0) == pytest.approx(100.0 * math.log(2.0), rel=1e-9)


def test_disturbances_move_the_feed_and_the_cooling_water():
    stds = (0.5, 1.0, 4.0, 2.5)
    world = evaporation(disturbance_std=stds)
    e = torch.tensor([[0.3, -1.2, 0.7, 2.0]], dtype=torch.float64)
    moved = {key: THETA[key] + std * e[:, i] for i, (key, std) in enumerate(zip(THETA, stds, strict=True))}
    expected = evaporation().step(moved, STATE, ACTION, NO_NOISE)
    torch.testing.assert_close(world.step(THETA, STATE, ACTION, e), expected, rtol=0, atol=0)
    reward = world.reward(THETA, STATE, ACTION, e, expected)
    torch.testing.assert_close(reward, evaporation().reward(moved, STATE, ACTION, NO_NOISE, expected), rtol=0, atol=0)


@pytest.mark.parametrize(("integrator", "order"), [("midpoint", 2), ("rk4", 4)])
def test_integrators_converge_with_their_order(integrator, order):
    state = torch.tensor([[20.0, 60.0]], dtype=torch.float64)
    exact = evaporation(dt=600.0, substeps=640).step(THETA, state, ACTION, NO_NOISE)

    def error(substeps: int) -> float:
        model = evaporation(dt=600.0, integrator=integrator, substeps=substeps)
        return float((model.step(THETA, state, ACTION, NO_NOISE) - exact).norm())

    assert error(10) / error(20) == pytest.approx(2.0**order, rel=0.25)  # higher orders still show at these steps


def batch(count: int) -> tuple[Params, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    theta = {key: value * (1.0 + 0.05 * normal(count)) for key, value in THETA.items()}
    return theta, STATE + normal(count, 2), ACTION + 5.0 * normal(count, 2), normal(count, 4)


def test_first_and_second_derivatives():
    world = evaporation(disturbance_std=(0.5, 1.0, 4.0, 2.5))
    theta, state, action, e = batch(2)
    keys = tuple(theta)

    def both(state: Tensor, action: Tensor, e: Tensor, *values: Tensor) -> Tensor:
        at = dict(zip(keys, values, strict=True))
        following = world.step(at, state, action, e)
        return torch.cat([following.reshape(-1), 1e-3 * world.reward(at, state, action, e, following)])

    inputs = tuple(x.requires_grad_() for x in (state, action, e, *theta.values()))
    # difference quotients of order 1e-6 of values up to 50: rounding alone is 1e-8 of the entries
    assert torch.autograd.gradcheck(both, inputs, rtol=1e-5, atol=1e-7)
    assert torch.autograd.gradgradcheck(both, inputs, rtol=1e-4, atol=1e-6)


def test_vmap_over_theta_equals_the_batch_and_dtype_follows():
    world = evaporation(disturbance_std=(0.5, 1.0, 4.0, 2.5))
    theta, state, action, e = batch(3)

    def single(theta: Params, *row: Tensor) -> Tensor:
        return world.step(theta, *(x.unsqueeze(0) for x in row)).squeeze(0)

    each = torch.func.vmap(single)(theta, state, action, e)
    torch.testing.assert_close(each, world.step(theta, state, action, e), rtol=1e-14, atol=0)
    floats = {key: value.float() for key, value in theta.items()}
    row = (state.float(), action.float(), e.float())
    following = world.step(floats, *row)
    assert following.dtype == world.reward(floats, *row, following).dtype == torch.float32
    start = world.initial_state(floats, torch.zeros(2, 2))
    torch.testing.assert_close(start, STATE.float().expand(2, 2))


def test_declarations():
    model = evaporation()
    assert contains(model.box, THETA)
    assert THETA.keys() == model.box.unit.keys()
    assert {name for group in model.names.values() for name in group} == model.units.keys()
    assert model.derivative_order == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dt": 0.0}, "dt must be a positive"),
        ({"integrator": "semi_implicit"}, "integrator must be one of"),
        ({"penalty": 0.0}, "penalty and softness must be > 0, got 0.0"),
        ({"softness": math.nan}, "penalty and softness must be > 0"),
        ({"disturbance_std": (0.1, -1.0, 0.0, 0.0)}, "standard deviations must be >= 0"),
        ({"initial_std": (-1.0, 0.0)}, "standard deviations must be >= 0"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        evaporation(**options)
