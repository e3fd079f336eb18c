"""Integrators: order on closed forms, energy of the mechanical systems, work of friction and torque."""

from __future__ import annotations

import math

import pytest
import torch
from problems import scalar, stack
from torch import Tensor

from sim2real import default_params
from sim2real.simulators import (
    cartpole,
    cartpole_energy,
    double_pendulum,
    double_pendulum_energy,
    integrate_first_order,
    integrate_second_order,
    pendulum,
    pendulum_energy,
)

INTEGRATORS = ("semi_implicit", "midpoint", "rk4")
ORDER = {"semi_implicit": 1, "midpoint": 2, "rk4": 4}


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
