"""Forced-circulation evaporator: dilute liquor is concentrated with steam, its vapour condensed with cooling water.

    M X2' = F1 X1 - F2 X2,   C P2' = F4 - F5,       product composition X2 (%) and pressure P2 (kPa), time in min,

    T2 = 0.5616 P2 + 0.3126 X2 + 48.43      T3 = 0.507 P2 + 55      T100 = 0.1538 P100 + 90            (degC)
    Q100 = 0.16 (F1 + F3) (T100 - T2)       Q200 = UA2 (T3 - T200) / (1 + UA2 / (2 Cp F200))           (kW)
    F4 = (Q100 - F1 Cp (T2 - T1)) / lam     F5 = Q200 / lam     F100 = Q100 / lam_s     F2 = F1 - F4   (kg/min)

with M = 20 kg, C = 4 kg/kPa, UA2 = 6.84 kW/K, Cp = 0.07 kW min/(kg K), lam = 38.5 and lam_s = 36.6 kW min/kg, and
F3 = 50 kg/min circulating. The separator level is held by F2. The operator sets the steam pressure P100 (kPa) and the
cooling water F200 (kg/min), both at most 400. Per minute, the cost is

    10.09 (F2 + F3) + 600 F100 + 0.6 F200  +  penalty (h(25 - X2) + h(40 - P2) + h(P2 - 80)),
    h(x) = softness log(1 + exp(x / softness)),

the flows at the start of a step, the limits at its end. Without disturbances the cheapest steady state that keeps the
limits is (X2, P2) = (25, 49.743) at (P100, F200) = (191.713, 215.888). The feed and the cooling water are never as
nominal: `disturbance_std` makes X1, F1, T1 and T200 vary from step to step, and then the optimum keeps off the limit.
Reference: R. Newell and P. Lee, Applied Process Control: A Case Study, 1989; R. Amrit, J. Rawlings and L. Biegler,
Optimizing process economics online using model predictive control, Computers and Chemical Engineering 58, 2013;
M. Zanon, S. Gros and M. Diehl, A tracking MPC formulation that is locally equivalent to economic MPC, Journal of
Process Control 45, 2016, section 8; S. Gros and M. Zanon, Data-driven economic NMPC using reinforcement learning, IEEE
TAC 65(2), 2020.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sim2real.bounds import Box
from sim2real.mdp import ModelMDP
from sim2real.params import Params
from sim2real.simulators.integrate import check_time_step, integrate_first_order

_KEYS = ("X1", "F1", "T1", "T200")
_BOX = Box(
    low={"X1": 1.0, "F1": 5.0, "T1": 0.0, "T200": 0.0},
    high={"X1": 10.0, "F1": 15.0, "T1": 80.0, "T200": 50.0},
    unit={"X1": "%", "F1": "kg/min", "T1": "degC", "T200": "degC"},
    default={"X1": 5.0, "F1": 10.0, "T1": 40.0, "T200": 25.0},
)
_HEAT_OF_VAPOUR, _HEAT_OF_STEAM, _HEAT_CAPACITY = 38.5, 36.6, 0.07
_CONDENSER, _HOLDUP, _VAPOUR, _CIRCULATION = 6.84, 20.0, 4.0, 50.0
LOWEST_X2, LOWEST_P2, HIGHEST_P2 = 25.0, 40.0, 80.0
"""%, kPa, kPa"""


def evaporation(
    *,
    dt: float = 120.0,
    integrator: Literal["midpoint", "rk4"] = "rk4",
    substeps: int = 1,
    discount: float = 0.95,
    disturbance_std: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0),
    penalty: float = 1000.0,
    softness: float = 0.25,
    initial_mean: tuple[float, float] = (25.0, 49.743),
    initial_std: tuple[float, float] = (2.0, 4.0),
) -> ModelMDP:
    """State (X2, P2), action (P100, F200); theta: X1, F1, T1, T200, the feed and the cooling water.

    dt in s. X1, F1, T1 and T200 are drawn anew for every step, independent and normal around theta with the standard
    deviations `disturbance_std` (%, kg/min, degC, degC). `penalty` in cost per minute and % (or kPa) beyond a limit,
    `softness` in % (or kPa). Raises `ValueError` for a softness or penalty that is not positive, a negative standard
    deviation, or a wrong time step.
    """
    check_time_step(dt, substeps, integrator, ("midpoint", "rk4"))
    if not (penalty > 0 and softness > 0):
        raise ValueError(f"penalty and softness must be > 0, got {penalty} and {softness}")
    if min(*disturbance_std, *initial_std) < 0:
        raise ValueError(f"standard deviations must be >= 0, got {disturbance_std} and {initial_std}")
    minutes = dt / 60.0

    def initial_state(theta: Params, e0: Tensor) -> Tensor:
        return e0.new_tensor(initial_mean) + e0.new_tensor(initial_std) * e0

    def disturbed(theta: Params, e: Tensor) -> Params:
        pushes = zip(_KEYS, disturbance_std, e.unbind(-1), strict=True)
        return {key: theta[key] + std * push if std else theta[key] for key, std, push in pushes}

    def step(theta: Params, state: Tensor, action: Tensor, e: Tensor) -> Tensor:
        rates = _rates(disturbed(theta, e), action)
        return integrate_first_order(rates, state, dt=minutes, integrator=integrator, substeps=substeps)

    def reward(theta: Params, state: Tensor, action: Tensor, e: Tensor, following: Tensor) -> Tensor:
        composition, pressure = following.unbind(-1)
        beyond = torch.stack([LOWEST_X2 - composition, LOWEST_P2 - pressure, pressure - HIGHEST_P2])
        limits = penalty * softness * F.softplus(beyond / softness).sum(0)
        return -minutes * (evaporation_cost(disturbed(theta, e), state, action) + limits)

    return ModelMDP(
        initial_state,
        step,
        reward,
        noise_dims=(2, 4),
        dt=dt,
        discount=discount,
        names={"state": ("X2", "P2"), "action": ("P100", "F200"), "signal": ("X2", "P2")},
        units={"X2": "%", "P2": "kPa", "P100": "kPa", "F200": "kg/min"},
        box=_BOX,
    )


def evaporation_cost(theta: Params, state: Tensor, action: Tensor) -> Tensor:
    """10.09 (F2 + F3) + 600 F100 + 0.6 F200 per minute `[B]`, without the limits."""
    temperature = _product_temperature(state)
    steam = _exchange(theta) * (_steam_temperature(action) - temperature)
    feed = _HEAT_CAPACITY * theta["F1"] * (temperature - theta["T1"])
    product = theta["F1"] - (steam - feed) / _HEAT_OF_VAPOUR
    return 10.09 * (product + _CIRCULATION) + 600.0 / _HEAT_OF_STEAM * steam + 0.6 * action[..., 1]


def _product_temperature(state: Tensor) -> Tensor:
    return state @ state.new_tensor([0.3126, 0.5616]) + 48.43


def _steam_temperature(action: Tensor) -> Tensor:
    return 0.1538 * action[..., 0] + 90.0


def _exchange(theta: Params) -> Tensor:
    """kW/K"""
    return 0.16 * (theta["F1"] + _CIRCULATION)


def _rates(theta: Params, action: Tensor) -> Callable[[Tensor], Tensor]:
    """state -> (X2', P2') per minute, with all that the inputs decide computed once."""
    carried = 2.0 * _HEAT_CAPACITY * action[..., 1]  # Q200 of the module docstring, without its division by F200
    condensing = _CONDENSER * carried / (carried + _CONDENSER) / _HEAT_OF_VAPOUR
    exchange, feed_heat = _exchange(theta), _HEAT_CAPACITY * theta["F1"]
    supply = (exchange * _steam_temperature(action) + feed_heat * theta["T1"]) / _HEAT_OF_VAPOUR
    loss = (exchange + feed_heat) / _HEAT_OF_VAPOUR
    solute = theta["F1"] * theta["X1"]

    def rates(state: Tensor) -> Tensor:
        composition, pressure = state.unbind(-1)
        vapour = supply - loss * _product_temperature(state)
        condensate = condensing * (0.507 * pressure + (55.0 - theta["T200"]))
        concentrating = (solute - (theta["F1"] - vapour) * composition) / _HOLDUP
        return torch.stack([concentrating, (vapour - condensate) / _VAPOUR], -1)

    return rates
