"""Grey-box houses: the exact step, its integrators, the open-loop path and the balance of heat."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from problems import EXACT, scalar, seeded, stack
from scipy.integrate import solve_ivp

from sim2real import default_params
from sim2real.simulators import (
    building_rc,
)


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
