"""One store, and a serial line of stocks that ends in a store: the conventions that all inventory simulators share.

A stock with lead time L is its pipeline `x = (x_0, ..., x_{L-1})`: on hand now (what arrives this period included),
and what arrives in k periods. In a period the policy sees x and orders q >= 0, then demand D comes:

    net = x_0 - D,    cost = h max(net, 0) + p max(-net, 0),    x' = (net + x_1, x_2, ..., x_{L-1}, q);

lost demand sets `net` to max(net, 0) first, backlogged demand leaves it negative. An order is usable L periods later,
so it must cover L + 1 demands. A stock within a line ships what the next one orders, at most what it has on hand, and
pays for what remains; nothing is charged in transit. The reward is minus the cost. Demand is an exogenous input in
units of stock. Sums, shifts, max and min only: the pathwise derivative of a path is exact (hindsight differentiation).

Reference: M. Alvo, D. Russo and Y. Kanoria, Neural inventory control in networks via hindsight differentiable policy
optimization, arXiv 2306.11246, sections 2 and 5.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sim2real.bounds import Box
from sim2real.mdp import ModelMDP
from sim2real.params import Params

PERIOD = 86400.0
"""s, a day; costs are per period whatever it lasts"""


def one_store(
    lead_time: int,
    *,
    lost: bool = False,
    start: float = 5.0,
    holding: float = 1.0,
    underage: float = 9.0,
    discount: float = 1.0,
    dt: float = PERIOD,
) -> ModelMDP:
    """State: the pipeline (lead_time), action (order,), demand exogenous; theta: holding, underage (cost per unit).

    The pipeline starts uniform on [0, start]. `holding` and `underage` are the design values. Raises `ValueError` for a
    lead time below 1 or a negative cost or start.
    """
    check_lead_times([lead_time])
    box = cost_box({"holding": holding, "underage": underage})

    def initial_state(theta: Params, e0: Tensor) -> Tensor:
        return start * torch.special.ndtr(e0)

    def step(theta: Params, state: Tensor, action: Tensor, e: Tensor) -> Tensor:
        net = state[..., :1] - e
        return shifted(state, torch.relu(net) if lost else net, torch.relu(action))

    def reward(theta: Params, state: Tensor, action: Tensor, e: Tensor, following: Tensor) -> Tensor:
        return -store_cost(theta, state[..., 0] - e[..., 0])

    names = {"state": pipeline_names("store", lead_time), "action": ("order",), "exogenous": ("demand",)}
    return ModelMDP(
        initial_state,
        step,
        reward,
        noise_dims=(lead_time, 1),
        exogenous_dim=1,
        dt=dt,
        discount=discount,
        names=names | {"signal": names["state"]},
        units=dict.fromkeys(sum(names.values(), ()), "1"),
        box=box,
    )


def serial_line(
    lead_times: Sequence[int],
    *,
    start: float = 5.0,
    holding: Sequence[float] = (1.0, 0.5, 0.2, 0.1),
    underage: float = 9.0,
    discount: float = 1.0,
    dt: float = PERIOD,
) -> ModelMDP:
    """A line of N stocks, backlogged demand at the first. All sequences run from the store to the top.

    State: the N pipelines one after the other; action: what each stock orders from the next one (`[N]`, cut at what
    that has on hand; the top one gets all it orders); theta: holding `[N]`, underage (cost per unit). The store's
    pipeline starts uniform on [0, start], the others empty. Raises `ValueError` for lead times below 1, more or fewer
    holding costs than lead times, and negative costs.
    """
    check_lead_times(lead_times)
    nodes, widths = len(lead_times), list(lead_times)
    if len(holding) != nodes:
        raise ValueError(f"one holding cost per stock: {nodes} lead times, but {len(holding)} holding costs")
    box = cost_box({"holding": torch.tensor(holding, dtype=torch.float64), "underage": underage})
    first, move = _line_matrices(widths)

    def initial_state(theta: Params, e0: Tensor) -> Tensor:
        return torch.cat([start * torch.special.ndtr(e0), e0.new_zeros(*e0.shape[:-1], sum(widths[1:]))], -1)

    def shipped(state: Tensor, action: Tensor) -> Tensor:
        upstream = state @ first.to(state)[:, 1:]
        below = torch.minimum(torch.relu(action[..., :-1]), upstream)
        return torch.cat([below, torch.relu(action[..., -1:])], -1)

    def step(theta: Params, state: Tensor, action: Tensor, e: Tensor) -> Tensor:
        return torch.cat([state, e, shipped(state, action)], -1) @ move.to(state)

    def reward(theta: Params, state: Tensor, action: Tensor, e: Tensor, following: Tensor) -> Tensor:
        left = state @ first.to(state) - torch.cat([e, shipped(state, action)[..., :-1]], -1)
        # only the store can owe: the others ship at most what they have
        return -(theta["holding"] * torch.relu(left)).sum(-1) - theta["underage"] * torch.relu(-left[..., 0])

    stocks = ["store", *(f"stock{k}" for k in range(1, nodes))]
    names = {
        "state": sum((pipeline_names(stock, width) for stock, width in zip(stocks, widths, strict=True)), ()),
        "action": tuple(f"{stock}_order" for stock in stocks),
        "exogenous": ("demand",),
    }
    return ModelMDP(
        initial_state,
        step,
        reward,
        noise_dims=(widths[0], 1),
        exogenous_dim=1,
        dt=dt,
        discount=discount,
        names=names | {"signal": names["state"]},
        units=dict.fromkeys(sum(names.values(), ()), "1"),
        box=box,
    )


def _line_matrices(widths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What is on hand, `state @ first`, and the next state, `(state, demand, shipped) @ move`: a period is linear."""
    size, nodes = sum(widths), len(widths)
    first = torch.zeros(size, nodes, dtype=torch.float64)
    move = torch.zeros(size + 1 + nodes, size, dtype=torch.float64)
    for k, width in enumerate(widths):
        at = sum(widths[:k])
        first[at, k] = move[at, at] = 1.0
        for position in range(1, width):
            move[at + position, at + position - 1] = 1.0
        move[size + k, at] = -1.0  # demand, or what the stock below was sent
        move[size + 1 + k, at + width - 1] = 1.0
    return first, move


def shifted(pipeline: Tensor, kept: Tensor, order: Tensor) -> Tensor:
    """Next pipeline `[..., L n]` of n stocks, position by position: what they kept `[..., n]`, what they ordered."""
    n = kept.shape[-1]
    if pipeline.shape[-1] == n:
        return kept + order
    return torch.cat([kept + pipeline[..., n : 2 * n], pipeline[..., 2 * n :], order], -1)


def store_cost(theta: Params, net: Tensor) -> Tensor:
    """`h max(net, 0) + p max(-net, 0)` of each store, in the shape of `net`."""
    return theta["holding"] * torch.relu(net) + theta["underage"] * torch.relu(-net)


def pipeline_names(stock: str, width: int) -> tuple[str, ...]:
    """Names of a pipeline's columns: on hand, then what arrives in 1, 2, ... periods."""
    return (f"{stock}_on_hand", *(f"{stock}_in_{k}" for k in range(1, width)))


def check_lead_times(lead_times: Sequence[int], lowest: int = 1) -> None:
    """Raises `ValueError` unless all are whole numbers of periods, `lowest` or more."""
    if not lead_times or any(not isinstance(each, int) or each < lowest for each in lead_times):
        raise ValueError(f"lead times must be whole numbers of periods, at least {lowest}; got {list(lead_times)}")


def cost_box(defaults: dict[str, float | Tensor]) -> Box:
    """Costs per unit and period, none below 0. Raises `ValueError` for a design value that is."""
    for key, value in defaults.items():
        if not bool((torch.as_tensor(value) >= 0).all()):
            raise ValueError(f"'{key}' must be >= 0, got {value}")
    return Box(low=dict.fromkeys(defaults, 0.0), unit=dict.fromkeys(defaults, "1"), default=defaults)
