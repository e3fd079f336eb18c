r"""One warehouse that produces and ships to n stores, with capacities: the inventory task of hierarchical control.

Whole units; in period t = 1..30, from stocks x (stores and warehouse) and what is on its way to them, y:

    warehouse: x_w + y_w, ships f_j (rounded, cut at what is left, stores served in random order), keeps the rest
    stores:    x_j + y_j, then sell s_j = min(D_j(t) + u_j, x_j + y_j) and owe u_j' = D_j(t) + u_j - s_j
    on their way next: y_j' = f_j (lead time one), y_w' = production p, at most its cap

    reward = price sum_j s_j - production_cost p - transport sum_j f_j - sum_i holding_i x_i' - backlog sum_j u_j'
             - overflow sum_i max(x_i' - capacity_i, 0) - overorder max(sum_j requests - (x_w + y_w), 0).

The demand of a period is known when its action is chosen:

    D_j(t) = max(round(m_j / 2 (1 + cos(k_j pi (2 r_j + t) / 31)) + e), 0),    e uniform on {-2, -1, 0, 1};

its forecast leaves out e. Goods sold from warehouse to store carry no price: it would cancel in the total.

Reference: Schmidt, Gammelli, Harrison, Pavone, Rodrigues, Offline hierarchical reinforcement learning via inverse
optimization, arXiv 2410.07933, appendix; demand, the period of 31 and the costs of overflow and of over-ordering as in
the published implementation, whose backlog cost of 1W3S is 1.0 instead of the paper's 1.5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sim2real.bounds import Box
from sim2real.mdp import ModelMDP
from sim2real.params import Params

PERIOD = 86400.0
"""s, a day; costs are per period whatever it lasts"""
STEPS = 30
"""decisions of an episode"""
FORECASTS = 10
"""forecasts of demand among the features of a store"""
FEATURES = 8 + FORECASTS
CYCLE = STEPS + 1
"""periods that the cosine of the demand refers to"""


@dataclass(frozen=True)
class SupplyTask:
    """What is fixed in one task; costs and capacities are theta. Sequences run over the stores.

    Raises `ValueError` where the sequences differ in length.
    """

    peak: tuple[float, ...]
    """m: largest demand per period"""
    frequency: tuple[float, ...]
    """k"""
    shift: tuple[float, ...]
    """r"""
    start: float
    """units in each store at the beginning; the warehouse begins empty"""
    store_holding: float
    store_capacity: float
    warehouse_holding: float
    warehouse_capacity: float
    production_cap: float
    backlog: float = 1.5

    def __post_init__(self) -> None:
        lengths = {len(self.peak), len(self.frequency), len(self.shift)}
        if len(lengths) != 1 or not self.peak:
            raise ValueError(
                f"peak, frequency and shift need one entry per store, got {len(self.peak)}, {len(self.frequency)} and "
                f"{len(self.shift)}"
            )

    @property
    def stores(self) -> int:
        """n"""
        return len(self.peak)


@dataclass(frozen=True)
class Stocks:
    """The state by name: `period [B]`, `stock [B, n+1]` and `incoming [B, n+1]` (the warehouse last), `owed`, `demand`
    `[B, n]`."""

    period: Tensor
    stock: Tensor
    incoming: Tensor
    owed: Tensor
    demand: Tensor

    @property
    def available(self) -> Tensor:
        """What the warehouse can ship in this period, `[B]`."""
        return self.stock[..., -1] + self.incoming[..., -1]


def three_stores(*, backlog: float = 1.5) -> SupplyTask:
    """1W3S; the published implementation has `backlog=1.0`."""
    return SupplyTask((5, 15, 20), (2, 4, 6), (1, 3, 6), 10.0, 0.5, 15.0, 0.1, 50.0, 25.0, backlog)


def ten_stores(*, backlog: float = 1.5) -> SupplyTask:
    """1W10S."""
    peak = (5,) * 4 + (10,) * 3 + (18,) * 3
    frequency, shift = (2, 4, 6) * 3 + (3,), (1, 1, 1, 3, 3, 3, 6, 6, 6, 2)
    return SupplyTask(peak, frequency, shift, 5.0, 2.0, 15.0, 0.005, 80.0, 60.0, backlog)


def supply_chain(task: SupplyTask) -> ModelMDP:
    """The task as a `ModelMDP`; action `[B, n+1]`: requested shipments and production, rounded to whole units.

    State: period, stocks (stores, warehouse), on their way (stores, warehouse), owed, demand of this period (stores).
    theta: price, production_cost, transport, backlog, overflow, overorder (per unit), holding and capacity `[n+1]`
    (stores, warehouse), production_cap. Noise: one normal column per store makes the next demand, another the order in
    which stores are served. The rounding leaves no derivative.
    """
    n = task.stores

    def initial_state(theta: Params, e0: Tensor) -> Tensor:
        like = e0[..., :1]
        stock = torch.cat([torch.full_like(e0, task.start), torch.zeros_like(like)], -1)
        first = torch.ones_like(like)
        demand = _demand(task, first, e0)
        return torch.cat([first, stock, torch.zeros_like(stock), torch.zeros_like(e0), demand], -1)

    def step(theta: Params, state: Tensor, action: Tensor, e: Tensor) -> Tensor:
        now = stocks(task, state)
        shipped, produced = _executed(theta, now, action, e[..., n:])
        on_hand = now.stock[..., :n] + now.incoming[..., :n]
        wanted = now.demand + now.owed
        sold = torch.minimum(wanted, on_hand)
        left = torch.cat([on_hand - sold, (now.available - shipped.sum(-1)).unsqueeze(-1)], -1)
        period = now.period.unsqueeze(-1) + 1
        coming = torch.cat([shipped, produced.unsqueeze(-1)], -1)
        return torch.cat([period, left, coming, wanted - sold, _demand(task, period, e[..., :n])], -1)

    def reward(theta: Params, state: Tensor, action: Tensor, e: Tensor, following: Tensor) -> Tensor:
        now, then = stocks(task, state), stocks(task, following)
        sold = (now.demand + now.owed - then.owed).sum(-1)
        asked = _requests(action)[..., :n].sum(-1)
        cost = theta["production_cost"] * then.incoming[..., n] + theta["transport"] * then.incoming[..., :n].sum(-1)
        cost = cost + (theta["holding"] * then.stock).sum(-1) + theta["backlog"] * then.owed.sum(-1)
        cost = cost + theta["overflow"] * torch.relu(then.stock - theta["capacity"]).sum(-1)
        return theta["price"] * sold - cost - theta["overorder"] * torch.relu(asked - now.available)

    def terminal(theta: Params, state: Tensor) -> Tensor:
        return state[..., 0] > STEPS

    names = _names(n)
    return ModelMDP(
        initial_state,
        step,
        reward,
        noise_dims=(n, 2 * n),
        dt=PERIOD,
        terminal=terminal,
        derivative_order=0,
        names=names,
        units=dict.fromkeys(sum(names.values(), ()), "1"),
        box=_box(task),
    )


def stocks(task: SupplyTask, state: Tensor) -> Stocks:
    """The parts of a state `[..., 4 n + 3]`. Raises `ValueError` for a state of another task."""
    n = task.stores
    if state.shape[-1] != 4 * n + 3:
        raise ValueError(f"a state with {n} stores has {4 * n + 3} entries, got {state.shape[-1]}")
    period, stock, incoming, owed, demand = state.split([1, n + 1, n + 1, n, n], -1)
    return Stocks(period[..., 0], stock, incoming, owed, demand)


def demand_forecast(task: SupplyTask, period: Tensor, steps: int) -> Tensor:
    """Demand without noise of the `steps` periods after `period [...]`: `[..., n, steps]`, 0 after the episode."""
    later = period.unsqueeze(-1) + torch.arange(1, steps + 1).to(period)
    rate = torch.round(_wave(task, later.unsqueeze(-1))).movedim(-1, -2)
    return torch.where((later > STEPS).unsqueeze(-2), 0.0, rate)


def store_room(task: SupplyTask, theta: Params, state: Tensor, *, margin: float = 0.0) -> Tensor:
    """How much may be shipped to each store without exceeding its capacity, `[..., n]`; negative: too much already.

    Capacity - stock - on its way + demand and backlog of this period + forecast of the next. Demand falls short of its
    forecast by at most 2: with `margin=2` no store ever exceeds its capacity.
    """
    n, now = task.stores, stocks(task, state)
    expected = torch.relu(demand_forecast(task, now.period, 1)[..., 0] - margin)
    taken = now.stock[..., :n] + now.incoming[..., :n] - now.demand - now.owed
    return theta["capacity"][..., :n] - taken + expected


def supply_features(task: SupplyTask, theta: Params, state: Tensor) -> Tensor:
    """What a policy sees of each node, stores first: `[..., n+1, 18]`.

    Demand and backlog, holding cost, production cost, on its way, stock, ten forecasts, price, capacity, production
    cap; 0 where a node has no such thing.
    """
    n, now = task.stores, stocks(task, state)
    ahead = demand_forecast(task, now.period, FORECASTS)
    store = torch.zeros(n + 1).to(state)
    store[:n] = 1.0
    columns = [
        torch.cat([now.demand + now.owed, torch.zeros_like(state[..., :1])], -1),
        theta["holding"].to(state),
        theta["production_cost"].to(state).unsqueeze(-1) * (1 - store),
        now.incoming,
        now.stock,
        *torch.cat([ahead, torch.zeros_like(ahead[..., :1, :])], -2).unbind(-1),
        theta["price"].to(state).unsqueeze(-1) * store,
        theta["capacity"].to(state),
        theta["production_cap"].to(state).unsqueeze(-1) * (1 - store),
    ]
    return torch.stack([column.expand_as(now.stock) for column in columns], -1)


def message_edges(task: SupplyTask) -> tuple[Tensor, Tensor]:
    """Directed edges `[2, 2 n]` (from, to) between the warehouse, node n, and the stores, and their lead times."""
    stores, house = torch.arange(task.stores), torch.full((task.stores,), task.stores)
    there, back = torch.stack([house, stores]), torch.stack([stores, house])
    return torch.cat([there, back], -1), torch.ones(2 * task.stores, dtype=torch.float64)


def _wave(task: SupplyTask, period: Tensor) -> Tensor:
    """Demand before noise and rounding, `[..., n]` for periods `[..., 1]`."""
    peak, frequency, shift = (torch.tensor(each).to(period) for each in (task.peak, task.frequency, task.shift))
    return peak / 2 + peak / 2 * torch.cos(frequency * torch.pi * (2 * shift + period) / CYCLE)


def _demand(task: SupplyTask, period: Tensor, e: Tensor) -> Tensor:
    """Demand `[..., n]` of periods `[..., 1]` with the noise that normal numbers `[..., n]` stand for."""
    noise = torch.floor(4 * torch.special.ndtr(e)).clamp(max=3) - 2
    return torch.relu(torch.round(_wave(task, period) + noise))


def _requests(action: Tensor) -> Tensor:
    return torch.round(torch.relu(action))


def _executed(theta: Params, now: Stocks, action: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Shipments `[..., n]`, cut at what is left when a store's turn comes, and production `[...]`."""
    stores = now.owed.shape[-1]
    if action.shape[-1] != stores + 1:
        raise ValueError(f"an action is {stores} shipments and the production, got {action.shape[-1]} entries")
    requests = _requests(action)
    turn = order.argsort(-1)
    asked = requests[..., :-1].gather(-1, turn)
    before = asked.cumsum(-1) - asked
    granted = torch.minimum(asked, torch.relu(now.available.unsqueeze(-1) - before))
    shipped = torch.zeros_like(granted).scatter(-1, turn, granted)
    return shipped, torch.minimum(requests[..., -1], theta["production_cap"])


def _names(n: int) -> dict[str, tuple[str, ...]]:
    nodes = [*(f"store{j}" for j in range(n)), "warehouse"]
    state = (
        "period",
        *(f"{node}_stock" for node in nodes),
        *(f"{node}_incoming" for node in nodes),
        *(f"{node}_owed" for node in nodes[:n]),
        *(f"{node}_demand" for node in nodes[:n]),
    )
    return {"state": state, "signal": state, "action": (*(f"{node}_shipment" for node in nodes[:n]), "production")}


def _box(task: SupplyTask) -> Box:
    n = task.stores
    default: dict[str, float | Tensor] = {
        "price": 15.0,
        "production_cost": 5.0,
        "transport": 0.5,
        "backlog": task.backlog,
        "overflow": 22.5,
        "overorder": 6.0,
        "holding": torch.tensor([task.store_holding] * n + [task.warehouse_holding], dtype=torch.float64),
        "capacity": torch.tensor([task.store_capacity] * n + [task.warehouse_capacity], dtype=torch.float64),
        "production_cap": task.production_cap,
    }
    return Box(low=dict.fromkeys(default, 0.0), unit=dict.fromkeys(default, "1"), default=default)
