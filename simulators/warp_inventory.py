"""The network of `sim2real.simulators.inventory_network` as a Warp model: same parameters, units and options.

A kernel's parameters are single numbers: the entries of theta's vectors. At kinks derivatives are those of torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import warp as wp
from torch import Tensor

from sim2real.bounds import Box
from sim2real.mdp import ModelMDP
from sim2real.params import Params
from sim2real.simulators.inventory import PERIOD
from sim2real.simulators.inventory_network import Layout, Routes, inventory_network, layout_of
from sim2real.simulators.warp_model import warp_twin

TINY = 1e-19
"""least total of requests that is divided by; of a float32"""
_KEYS = ("holding", "underage", "warehouse_holding", "purchase")


def warp_inventory_network(
    routes: Routes,
    *,
    lost: bool = True,
    hub: bool = False,
    start: Sequence[float],
    holding: Sequence[float],
    underage: Sequence[float],
    warehouse_holding: Sequence[float],
    purchase: Sequence[float] | None = None,
    discount: float = 1.0,
    dt: float = PERIOD,
) -> ModelMDP:
    """Options and result as `inventory_network`, stepped and rolled out by Warp."""
    twin = inventory_network(
        routes,
        lost=lost,
        hub=hub,
        start=start,
        holding=holding,
        underage=underage,
        warehouse_holding=warehouse_holding,
        purchase=purchase,
        discount=discount,
        dt=dt,
    )
    layout = layout_of(routes)
    lengths = dict(zip(_KEYS, [layout.stores] * 2 + [layout.warehouses] * 2, strict=True))
    names = [f"{key}{i}" for key, length in lengths.items() for i in range(length)]
    frame = replace(twin, box=Box(default=dict.fromkeys(names, 0.0)))
    kernel = warp_twin(frame, _step(routes, layout, lost, hub), _reward(routes, layout))
    roll = kernel.open_loop
    if roll is None:
        raise TypeError("a Warp model rolls out by itself")

    def entries(theta: Params) -> Params:
        return {f"{key}{i}": theta[key][..., i] for key, length in lengths.items() for i in range(length)}

    def reward(theta: Params, state: Tensor, action: Tensor, e: Tensor, following: Tensor) -> Tensor:
        return kernel.reward(entries(theta), state, action, e, following)

    return replace(
        twin,
        step=lambda theta, state, action, e: kernel.step(entries(theta), state, action, e),
        reward=reward,
        open_loop=lambda theta, state, actions, e: roll(entries(theta), state, actions, e),
    )


def _step(routes: Routes, layout: Layout, lost: bool, hub: bool) -> Any:
    times, supply = routes.lead_times, routes.supplier_lead_times
    n, houses, first = layout.stores, layout.warehouses, layout.split
    width, house_width = layout.store_width, layout.warehouse_width

    def asked(theta: Any, action: Any, w: Any, i: Any) -> Any:
        if times[w][i] == 0:
            return 0.0
        request = _above_zero(action[w * n + i])
        if hub:
            request = request + TINY  # a hub that nobody asks shares equally
        return request

    def step(theta: Any, state: Any, action: Any, noise: Any) -> Any:
        following, share, left = state, action[0:houses], action[0:houses]
        for w in range(houses):
            total = 0.0
            for i in range(n):
                total = total + asked(theta, action, w, i)
            on_hand = state[first + w]
            share[w] = on_hand / wp.max(total, TINY)
            left[w] = 0.0
            if not hub:
                share[w] = wp.where(share[w] > 1.0, 1.0, share[w])
                left[w] = _above_zero(on_hand - total)
        for k in range(width):
            for i in range(n):
                stock = 0.0
                if k == 0:
                    stock = state[i] - noise[i]
                    if lost:
                        stock = _above_zero(stock)
                if k + 1 < width:
                    stock = stock + state[(k + 1) * n + i]
                for w in range(houses):
                    if times[w][i] == k + 1:
                        stock = stock + asked(theta, action, w, i) * share[w]
                following[k * n + i] = stock
        for k in range(house_width):
            for w in range(houses):
                stock = 0.0
                if k == 0:
                    stock = left[w]
                if k + 1 < house_width:
                    stock = stock + state[first + (k + 1) * houses + w]
                if supply[w] == k + 1:
                    stock = stock + _above_zero(action[houses * n + w])
                following[first + k * houses + w] = stock
        return following

    return step


def _reward(routes: Routes, layout: Layout) -> Any:
    supply = routes.supplier_lead_times
    n, houses, first, house_width = layout.stores, layout.warehouses, layout.split, layout.warehouse_width

    def reward(theta: Any, state: Any, action: Any, noise: Any, following: Any) -> Any:
        cost = 0.0
        for i in range(n):
            net = state[i] - noise[i]
            cost = cost + theta[i] * _above_zero(net) + theta[n + i] * _above_zero(-net)
        for w in range(houses):
            order = _above_zero(action[houses * n + w])
            kept = following[first + w]  # less what has arrived since
            if house_width > 1:
                kept = kept - state[first + houses + w]
            if supply[w] == 1:
                kept = kept - order
            cost = cost + theta[2 * n + w] * kept + theta[2 * n + houses + w] * order
        return -cost

    return reward


def _above_zero(x: Any) -> Any:
    return wp.where(x > 0.0, x, 0.0)
