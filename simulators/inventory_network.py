"""Warehouses that supply stores: one warehouse, many warehouses, or a hub that keeps nothing (transshipment).

Stores and warehouses are pipelines as in `inventory`. Action: what each store requests from each warehouse
`[W, n]`, row by row, then what each warehouse orders from its own supplier `[W]`. A warehouse that is asked for more
than it has on hand, y, ships in proportion to the requests r, and a hub ships all it has:

    a_wi = r_wi min(1, y_w / sum_j r_wj),        hub: a_wi = y_w r_wi / sum_j r_wj,

so every action is feasible. Cost of a period: `sum_i h_i max(net_i, 0) + p_i max(-net_i, 0)` of the stores, `h_w` times
what a warehouse keeps, and `c_w` times what it orders. All stores and paths are one tensor; stores with a shorter lead
time have the same pipeline width and their shipments enter further ahead.

Reference: arXiv 2306.11246, section 5 (see `inventory`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sim2real.mdp import ModelMDP
from sim2real.params import Params
from sim2real.simulators.inventory import PERIOD, check_lead_times, cost_box, pipeline_names, store_cost


@dataclass(frozen=True)
class Routes:
    """Who supplies whom, and how long it takes, in periods. Raises `ValueError` for lead times that make no network."""

    lead_times: tuple[tuple[int, ...], ...]
    """`[W][n]` from warehouse to store; 0: no route"""
    supplier_lead_times: tuple[int, ...]
    """`[W]`"""

    def __post_init__(self) -> None:
        check_lead_times(self.supplier_lead_times)
        for row in self.lead_times:
            check_lead_times(row, lowest=0)
        if len(self.lead_times) != len(self.supplier_lead_times) or len({len(row) for row in self.lead_times}) != 1:
            raise ValueError(
                f"one row of lead times per warehouse, all of one length: got rows of "
                f"{[len(row) for row in self.lead_times]} for {len(self.supplier_lead_times)} warehouses"
            )
        if not all(map(any, zip(*self.lead_times, strict=True))):
            raise ValueError("every store needs a route from some warehouse: a column of lead_times is all 0")


@dataclass(frozen=True)
class Layout:
    """Where things are in the state and in the action of a network."""

    stores: int
    store_width: int
    warehouses: int
    warehouse_width: int

    @property
    def split(self) -> int:
        """First warehouse entry of the state."""
        return self.stores * self.store_width


def layout_of(routes: Routes) -> Layout:
    """Pipelines as wide as the longest lead time into a store, and into a warehouse."""
    width = max(max(row) for row in routes.lead_times)
    return Layout(len(routes.lead_times[0]), width, len(routes.supplier_lead_times), max(routes.supplier_lead_times))


def inventory_network(
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
    """State: store pipelines, position by position (`x_0` of all stores first), then those of the warehouses.

    theta: holding, underage `[n]`, warehouse_holding, purchase `[W]` (cost per unit). Store pipelines start uniform on
    [0, start] (`[n]`), warehouses empty. Demand `[n]` is exogenous. Raises `ValueError` for lists of wrong lengths and
    negative costs.
    """
    layout = layout_of(routes)
    n, warehouses, first = layout.stores, layout.warehouses, layout.split
    purchase = [0.0] * warehouses if purchase is None else purchase
    costs = {"holding": holding, "underage": underage, "warehouse_holding": warehouse_holding, "purchase": purchase}
    _check_lengths({"start": start, "holding": holding, "underage": underage}, n)
    _check_lengths({"warehouse_holding": warehouse_holding, "purchase": purchase}, warehouses)
    ship = _shipper(routes, hub)
    at_stores = _arrivals(routes.lead_times, layout.store_width)
    at_warehouses = _arrivals([routes.supplier_lead_times], layout.warehouse_width)

    def initial_state(theta: Params, e0: Tensor) -> Tensor:
        scale = e0.new_tensor(start).repeat(layout.store_width)
        empty = e0.new_zeros(*e0.shape[:-1], warehouses * layout.warehouse_width)
        return torch.cat([scale * torch.special.ndtr(e0), empty], -1)

    def step(theta: Params, state: Tensor, action: Tensor, e: Tensor) -> Tensor:
        requests, orders = torch.relu(action).split([warehouses * n, warehouses], -1)
        on_hand = state[..., first : first + warehouses]
        shipped, kept = ship(requests.unflatten(-1, (warehouses, n)), on_hand)
        net = state[..., :n] - e
        stores = _moved(state[..., :first], torch.relu(net) if lost else net, at_stores(shipped))
        return torch.cat([*stores, *_moved(state[..., first:], kept, at_warehouses(orders.unsqueeze(-2)))], -1)

    def reward(theta: Params, state: Tensor, action: Tensor, e: Tensor, following: Tensor) -> Tensor:
        orders = torch.relu(action[..., -warehouses:])
        # what a warehouse kept is what it has next, less what has arrived since: no need to share out anew
        arrived = _moved(state[..., first:], torch.zeros_like(orders), at_warehouses(orders.unsqueeze(-2)))[0]
        kept = following[..., first : first + warehouses] - arrived
        cost = store_cost(theta, state[..., :n] - e).sum(-1)
        return -cost - (theta["warehouse_holding"] * kept + theta["purchase"] * orders).sum(-1)

    names = _names(layout)
    return ModelMDP(
        initial_state,
        step,
        reward,
        noise_dims=(first, n),
        exogenous_dim=n,
        dt=dt,
        discount=discount,
        names=names,
        units=dict.fromkeys(sum(names.values(), ()), "1"),
        box=cost_box({key: torch.tensor(value, dtype=torch.float64) for key, value in costs.items()}),
    )


def _check_lengths(lists: dict[str, Sequence[float]], wanted: int) -> None:
    for key, values in lists.items():
        if len(values) != wanted:
            raise ValueError(f"'{key}' needs {wanted} entries for these routes, got {len(values)}")


def _names(layout: Layout) -> dict[str, tuple[str, ...]]:
    stores, houses = range(layout.stores), range(layout.warehouses)
    by_store = [pipeline_names(f"store{i}", layout.store_width) for i in stores]
    by_house = [pipeline_names(f"warehouse{w}", layout.warehouse_width) for w in houses]
    state = tuple(
        name for position in [*zip(*by_store, strict=True), *zip(*by_house, strict=True)] for name in position
    )
    requests = tuple(f"request{w}_{i}" for w in houses for i in stores)
    return {
        "state": state,
        "signal": state,
        "action": requests + tuple(f"order{w}" for w in houses),
        "exogenous": tuple(f"demand{i}" for i in stores),
    }


def _shipper(routes: Routes, hub: bool) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """requests `[..., W, n]`, on hand `[..., W]` -> shipments `[..., W, n]` and what is kept `[..., W]`."""
    open_routes = torch.tensor(routes.lead_times) > 0
    everywhere = bool(open_routes.all())

    def ship(requests: Tensor, on_hand: Tensor) -> tuple[Tensor, Tensor]:
        tiny = torch.finfo(requests.dtype).tiny ** 0.5
        requests = requests + tiny if hub else requests  # a hub that nobody asks shares equally
        requests = requests if everywhere else requests * open_routes.to(requests)
        total = requests.sum(-1)
        share = on_hand / total.clamp_min(tiny)
        if hub:
            return requests * share.unsqueeze(-1), torch.zeros_like(on_hand)
        return requests * share.clamp(max=1.0).unsqueeze(-1), torch.relu(on_hand - total)

    return ship


def _arrivals(lead_times: Sequence[Sequence[int]], width: int) -> Callable[[Tensor], list[Tensor | None]]:
    """Shipments `[..., W, n]` -> what enters each of `width` positions, `[..., n]`; None where nothing ever does."""
    times = torch.tensor(lead_times)
    # per position: (warehouse, which stores; None: all of them)
    entries = [
        [(w, None if bool((row == k + 1).all()) else row == k + 1) for w, row in enumerate(times) if k + 1 in row]
        for k in range(width)
    ]

    def arrivals(shipped: Tensor) -> list[Tensor | None]:
        rows = shipped.unbind(-2)
        parts = [[rows[w] if mask is None else rows[w] * mask.to(rows[w]) for w, mask in entry] for entry in entries]
        return [sum(each[1:], each[0]) if each else None for each in parts]

    return arrivals


def _moved(pipeline: Tensor, kept: Tensor, arrivals: list[Tensor | None]) -> list[Tensor]:
    """The next pipeline of n stocks from what they kept `[..., n]`, position by position, each `[..., n]`."""
    n = kept.shape[-1]
    later = pipeline[..., n:].split(n, -1) if pipeline.shape[-1] > n else ()
    ahead = [kept + later[0], *later[1:]] if later else [kept]
    moved = [old if new is None else old + new for old, new in zip(ahead, arrivals, strict=False)]
    # the width is the longest lead time, so something always enters the last position
    return moved + [new for new in arrivals[len(moved) :] if new is not None]
