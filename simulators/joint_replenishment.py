"""Joint replenishment: n items, one order for all of them at a shared fixed cost, demand backlogged.

Action `(d, q_1, ..., q_n)`: d = 0 orders nothing, d = k >= 1 orders the quantities q with terms k, paying

    K + factor_k sum_i c_i q_i,    low_k <= sum_i q_i <= high_k,

once for the order (K fixed cost, c purchase prices). Quantities below or beyond the limits of the terms are scaled to
them in proportion, so that every action is feasible and the cost is smooth in q once d is given; all jumps are in d.
One term (0, inf, 1) is the plain problem; (M, inf, 1) a minimum order; several that meet at their ends a bulk discount
on all units. Per item the conventions are those of `inventory`; lead time 0 makes an order usable before the demand of
its period.

References: hybrid actions and item data of M. Alvo, Policy optimization in hybrid discrete-continuous action spaces via
mixed gradients; joint replenishment: H. Vanvuchelen, J. Gijsbrechts and R. Boute, Use of proximal policy optimization
for the joint replenishment problem, Computers in Industry 119 (2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sim2real.mdp import ModelMDP
from sim2real.params import Params
from sim2real.simulators.inventory import PERIOD, check_lead_times, cost_box, pipeline_names, shifted, store_cost


@dataclass(frozen=True)
class OrderTerms:
    """Total quantities from `low` to `high` (units), at `factor` times the purchase prices."""

    low: float = 0.0
    high: float = math.inf
    factor: float = 1.0


def joint_replenishment(
    holding: Sequence[float],
    underage: Sequence[float],
    *,
    fixed: float = 64.0,
    purchase: Sequence[float] | None = None,
    terms: Sequence[OrderTerms] = (OrderTerms(),),
    lead_time: int = 2,
    discount: float = 1.0,
    dt: float = PERIOD,
) -> ModelMDP:
    """State: pipelines of n items, position by position (`x_0` of all items first); action (d, q); demand exogenous.

    theta: holding, underage, purchase `[n]` (cost per unit), fixed (cost per order). Starts empty. d is a whole number
    and carries no derivative. Raises `ValueError` for lists of different lengths, terms that are empty or upside down,
    or a negative lead time or cost.
    """
    n = len(holding)
    purchase = [0.0] * n if purchase is None else purchase
    if not n or len(underage) != n or len(purchase) != n:
        raise ValueError(f"one cost per item: got {n} holding, {len(underage)} underage and {len(purchase)} purchase")
    if not terms or any(not (0 <= each.low < each.high and each.factor >= 0) for each in terms):
        raise ValueError(f"terms need 0 <= low < high and factor >= 0, got {list(terms)}")
    check_lead_times([lead_time], lowest=0)
    costs = {"holding": holding, "underage": underage, "purchase": purchase, "fixed": fixed}
    box = cost_box({key: torch.tensor(value, dtype=torch.float64) for key, value in costs.items()})
    width = max(lead_time, 1)
    ordered = _ordered(terms)
    factors = (1.0, *(each.factor for each in terms))

    def initial_state(theta: Params, e0: Tensor) -> Tensor:
        return e0.new_zeros(*e0.shape[:-1], n * width)

    def arriving(state: Tensor, action: Tensor) -> Tensor:
        """On hand when demand comes."""
        return state[..., :n] if lead_time else state[..., :n] + ordered(action)[1]

    def step(theta: Params, state: Tensor, action: Tensor, e: Tensor) -> Tensor:
        net = arriving(state, action) - e
        return shifted(state, net, ordered(action)[1]) if lead_time else net

    def reward(theta: Params, state: Tensor, action: Tensor, e: Tensor, following: Tensor) -> Tensor:
        index, quantity = ordered(action)
        stock = store_cost(theta, arriving(state, action) - e).sum(-1)
        price = (theta["purchase"] * quantity).sum(-1)
        if set(factors) != {1.0}:
            price = _of_terms(factors, index, action) * price
        return -stock - price - theta["fixed"] * (index > 0)

    names = _names(n, width)
    return ModelMDP(
        initial_state,
        step,
        reward,
        noise_dims=(0, n),
        exogenous_dim=n,
        dt=dt,
        discount=discount,
        names=names,
        units=dict.fromkeys(sum(names.values(), ()), "1"),
        box=box,
    )


def _names(items: int, width: int) -> dict[str, tuple[str, ...]]:
    pipelines = [pipeline_names(f"item{i}", width) for i in range(items)]
    state = tuple(name for position in zip(*pipelines, strict=True) for name in position)
    return {
        "state": state,
        "signal": state,
        "action": ("terms", *(f"order{i}" for i in range(items))),
        "exogenous": tuple(f"demand{i}" for i in range(items)),
    }


def _ordered(terms: Sequence[OrderTerms]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """action `[..., 1 + n]` -> index of the terms `[...]` and quantities `[..., n]` that they allow."""
    unlimited = all(each.low == 0 and each.high == math.inf for each in terms)
    low = (0.0, *(each.low for each in terms))
    high = (0.0, *(each.high for each in terms))

    def ordered(action: Tensor) -> tuple[Tensor, Tensor]:
        index = action[..., 0].detach().long()
        quantity = torch.relu(action[..., 1:])
        if unlimited:
            return index, quantity * (index > 0).unsqueeze(-1)
        total = quantity.sum(-1)
        # nothing to scale where nothing is asked for: then a minimum order is shared equally
        share = torch.where(
            total[..., None] > 0, quantity / total[..., None].clamp_min(1e-12), 1.0 / quantity.shape[-1]
        )
        bounded = torch.clamp(total, _of_terms(low, index, action), _of_terms(high, index, action))
        exact = (bounded == total)[..., None]
        return index, torch.where(exact, quantity, share * bounded[..., None])

    return ordered


def _of_terms(values: Sequence[float], index: Tensor, like: Tensor) -> Tensor:
    """`values[index]`, also for the single index that vmap shows."""
    return like.new_tensor(values).gather(0, index.reshape(-1)).reshape(index.shape)
