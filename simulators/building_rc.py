"""Grey-box houses: temperatures of a thermal resistance-capacitance network, heated and exposed to the weather.

    order 3   Ci dTi/dt = (Te - Ti)/Rie + (Ta - Ti)/Ria + (Th - Ti)/Rih           (air)
              Ce dTe/dt = (Ti - Te)/Rie + (Ta - Te)/Rea                           (envelope)
              Ch dTh/dt = (Ti - Th)/Rih + Ph                                      (heater)
    order 2   without Th and Rih: Ph heats the air;      order 1   Ci dTi/dt = (Ta - Ti)/Ria + Ph

Temperatures in degC, heating power Ph in kW, R in K/kW, C in kWh/K, the outdoor temperature Ta measured. With Ph and
Ta held over the step, `x' = F x + G u` has the exact solution `expm([[F, G], [0, 0]] dt) [x; u]`. The task is comfort
and energy: per hour, the cost `(Ti - setpoint)^2 + energy_price Ph`, at the end of the step.
Reference: Bacher, Madsen, Identifying suitable models for the heat dynamics of buildings, Energy and Buildings 43(7),
2011, models Ti, TiTe and TiTeTh with Ria.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sim2real.bounds import Box
from sim2real.mdp import ModelMDP
from sim2real.params import Params
from sim2real.simulators.integrate import check_time_step, integrate_first_order

SECONDS_PER_HOUR = 3600.0

_STATES: dict[int, tuple[str, ...]] = {1: ("Ti",), 2: ("Ti", "Te"), 3: ("Ti", "Te", "Th")}
_RESISTORS = {"Rie": ("Ti", "Te"), "Ria": ("Ti", "Ta"), "Rea": ("Te", "Ta"), "Rih": ("Ti", "Th")}
_DEFAULT: dict[int, dict[str, float]] = {
    1: {"Ci": 240.0, "Ria": 0.6},
    2: {"Ci": 30.0, "Ce": 250.0, "Rie": 0.1, "Ria": 1.2, "Rea": 1.2},
    3: {"Ci": 30.0, "Ce": 250.0, "Ch": 5.0, "Rie": 0.1, "Ria": 1.2, "Rea": 1.2, "Rih": 0.1},
}


def building_rc(
    order: Literal[1, 2, 3] = 3,
    *,
    dt: float = SECONDS_PER_HOUR,
    integrator: Literal["exact", "midpoint", "rk4"] = "exact",
    substeps: int = 1,
    discount: float = 1.0,
    setpoint: float = 20.0,
    energy_price: float = 0.01,
    initial_temperature: float = 20.0,
    initial_std: float = 0.0,
) -> ModelMDP:
    """State (Ti, Te, Th)[:order], action (Ph,), exogenous (Ta,), signal (Ti,); dt in s, theta in kWh/K and K/kW.

    theta: Ci, Ria; from order 2 Ce, Rie, Rea; in order 3 Ch, Rih. Starts at `initial_temperature` (degC) everywhere
    with deviations of `initial_std` (K). `energy_price` in cost per kWh. The default theta suits a 1600 m^2 office.
    """
    check_time_step(dt, substeps, integrator, ("exact", "midpoint", "rk4"))
    if order not in _STATES:
        raise ValueError(f"order must be 1, 2 or 3, got {order}")
    hours = dt / SECONDS_PER_HOUR

    def step(theta: Params, state: Tensor, action: Tensor, e: Tensor) -> Tensor:
        inputs = torch.cat([action, e], -1)
        if integrator == "exact":
            return _apply(transition_matrix(order, theta, hours), torch.cat([state, inputs], -1))
        rates = rate_matrix(order, theta)
        return integrate_first_order(
            lambda x: _apply(rates, torch.cat([x, inputs], -1)),
            state,
            dt=hours,
            integrator=integrator,
            substeps=substeps,
        )

    def open_loop(theta: Params, state: Tensor, actions: Tensor, e: Tensor) -> Tensor:
        matrix = transition_matrix(order, theta, hours)
        path = [state]
        for inputs in torch.cat([actions, e], -1).unbind(1):
            path.append(_apply(matrix, torch.cat([path[-1], inputs], -1)))
        return torch.stack(path, 1)

    def reward(theta: Params, state: Tensor, action: Tensor, e: Tensor, following: Tensor) -> Tensor:
        return -hours * ((following[..., 0] - setpoint) ** 2 + energy_price * action[..., 0])

    return ModelMDP(
        lambda theta, e0: initial_temperature + initial_std * e0,
        step,
        reward,
        noise_dims=(order, 1),
        dt=dt,
        discount=discount,
        observe=lambda theta, state: state[..., :1],
        open_loop=open_loop if integrator == "exact" else None,
        exogenous_dim=1,
        names={"state": _STATES[order], "action": ("Ph",), "signal": ("Ti",), "exogenous": ("Ta",)},
        units={"Ti": "degC", "Te": "degC", "Th": "degC", "Ta": "degC", "Ph": "kW"},
        box=_box(order),
    )


def _box(order: Literal[1, 2, 3]) -> Box:
    names = _DEFAULT[order]
    return Box(
        low={key: 0.01 if key[0] == "C" else 1e-3 for key in names},
        high={key: 1e4 if key[0] == "C" else 1e3 for key in names},
        unit={key: "kWh/K" if key[0] == "C" else "K/kW" for key in names},
        default=names,
    )


def transition_matrix(order: Literal[1, 2, 3], theta: Params, hours: float) -> Tensor:
    """`[F_d, G_d]` of the exact step `x' = F_d x + G_d (Ph, Ta)` over `hours`, `[..., order, order + 2]`."""
    rates = rate_matrix(order, theta) * hours
    augmented = torch.cat([rates, torch.zeros_like(rates[..., :1, :]).expand(*rates.shape[:-2], 2, -1)], -2)
    return torch.linalg.matrix_exp(augmented)[..., :order, :]


def rate_matrix(order: Literal[1, 2, 3], theta: Params) -> Tensor:
    """`[F, G]` of `dx/dt = F x + G (Ph, Ta)`, in 1/h, `[..., order, order + 2]`; x = (Ti, Te, Th)[:order] in degC."""
    nodes = (*_STATES[order], "Ph", "Ta")
    keys = tuple(_DEFAULT[order])
    values = dict(zip(keys, torch.broadcast_tensors(*(theta[key] for key in keys)), strict=True))
    resistors = [key for key in keys if key in _RESISTORS]
    flow = torch.zeros(len(resistors) + 1, order, len(nodes), dtype=values["Ci"].dtype, device=values["Ci"].device)
    for index, key in enumerate(resistors):
        here, there = (nodes.index(node) for node in _RESISTORS[key])
        flow[index, here, here] -= 1.0
        flow[index, here, there] += 1.0
        if there < order:
            flow[index, there, there] -= 1.0
            flow[index, there, here] += 1.0
    heated = order - 1 if order == 3 else 0
    flow[-1, heated, nodes.index("Ph")] = 1.0
    conductance = 1.0 / torch.stack([values[key] for key in resistors], -1)
    heat = torch.tensordot(conductance, flow[:-1], dims=1) + flow[-1]
    capacity = torch.stack([values["C" + node[1]] for node in _STATES[order]], -1)
    return heat / capacity.unsqueeze(-1)


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (vector.unsqueeze(-2) @ matrix.mT).squeeze(-2)
