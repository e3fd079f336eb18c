"""Isothermal stirred-tank reactor A -> B, its flow set for profit; the real one also loses product, B -> C.

    cA' = q/V (cAf - cA) - k cA,     cB' = -q/V cB + k cA - side_rate cB,     q' = (u - q) / lag

Concentrations in mol/l, time in min, V = 10 l; the flow q (l/min) follows its set-point u. The profit per minute, at
the end of a step, is `2 q cB - q/2 - effort (u - q)^2`: the product sold, less the feed bought, less the wear of hurry.
Without side reaction the best steady flow is q = k V: at k = 1.2 per min and cAf = 1 mol/l it is 12 l/min, with
cA = cB = 1/2. A side reaction that the model does not know turns the trade-off round: product must leave before it
decays, so that more flow pays, while its lower yield looks to the model like a slower reaction, which wants less.
Reference: M. Diehl, R. Amrit and J. Rawlings, A Lyapunov function for economic optimizing model predictive control,
IEEE TAC 56(3), 2011 (k = 1.2, V = 10, cAf = 1, q <= 20; here the flow lags behind its set-point).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sim2real.bounds import Box
from sim2real.mdp import ModelMDP
from sim2real.params import Params
from sim2real.simulators.integrate import check_time_step, integrate_first_order

VOLUME = 10.0
"""l"""
_BOX = Box(
    low={"rate": 0.2, "feed": 0.5},
    high={"rate": 4.0, "feed": 2.0},
    unit={"rate": "1/min", "feed": "mol/l"},
    default={"rate": 1.2, "feed": 1.0},
)


def cstr(
    *,
    dt: float = 12.0,
    integrator: Literal["midpoint", "rk4"] = "rk4",
    substeps: int = 1,
    discount: float = 0.95,
    side_rate: float = 0.0,
    feed_std: float = 0.0,
    effort: float = 0.1,
    lag: float = 0.2,
    initial_std: tuple[float, float, float] = (0.05, 0.05, 2.0),
) -> ModelMDP:
    """State (cA, cB, q) in mol/l and l/min, action (u,) in l/min; theta: rate (k) and feed (cAf).

    dt in s. `side_rate` (1/min) is that of B -> C, `lag` (min) that of the flow. The feed concentration is drawn anew
    for every step, normal around theta with `feed_std` (mol/l). Starts around (0.5, 0.5, 12) with deviations of
    `initial_std`. Raises `ValueError` for a lag that is not positive, other options below 0, or a wrong time step.
    """
    check_time_step(dt, substeps, integrator, ("midpoint", "rk4"))
    if not (lag > 0 and min(side_rate, feed_std, effort, *initial_std) >= 0):
        raise ValueError(
            f"lag must be > 0 and side_rate, feed_std, effort, initial_std >= 0; got {lag}, {side_rate}, {feed_std}, "
            f"{effort}, {initial_std}"
        )
    minutes = dt / 60.0

    def initial_state(theta: Params, e0: Tensor) -> Tensor:
        return e0.new_tensor([0.5, 0.5, 12.0]) + e0.new_tensor(initial_std) * e0

    def step(theta: Params, state: Tensor, action: Tensor, e: Tensor) -> Tensor:
        feed = theta["feed"] + feed_std * e[..., 0]

        def rates(x: Tensor) -> Tensor:
            reactant, product, flow = x.unbind(-1)
            reacted, dilution = theta["rate"] * reactant, flow / VOLUME
            return torch.stack(
                [
                    dilution * (feed - reactant) - reacted,
                    reacted - (dilution + side_rate) * product,
                    (action[..., 0] - flow) / lag,
                ],
                -1,
            )

        return integrate_first_order(rates, state, dt=minutes, integrator=integrator, substeps=substeps)

    def reward(theta: Params, state: Tensor, action: Tensor, e: Tensor, following: Tensor) -> Tensor:
        product, flow = following[..., 1], following[..., 2]
        return minutes * (2.0 * flow * product - 0.5 * flow - effort * (action[..., 0] - flow) ** 2)

    return ModelMDP(
        initial_state,
        step,
        reward,
        noise_dims=(3, 1),
        dt=dt,
        discount=discount,
        names={"state": ("cA", "cB", "q"), "action": ("u",), "signal": ("cA", "cB", "q")},
        units={"cA": "mol/l", "cB": "mol/l", "q": "l/min", "u": "l/min"},
        box=_BOX,
    )
