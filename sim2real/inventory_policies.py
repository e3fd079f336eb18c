"""Ordering policies for stocks with pipelines: order-up-to levels, and networks that share weights between stores.

A stock with a pipeline `x [L]` orders from its inventory position `sum_k x_k` (base stock), from the position of all
stocks below it together (echelon stock), or by a network. The symmetry-aware network has one set of weights for all
stores and sees the other stores through a summary only, so its size does not depend on their number and the same
weights run in a network of another size:

    z_i = phi(x_i / m_i, traits_i),    c = psi(sum_i m_i z_i / M, y / M),    M = sum_i m_i,
    request_i = m_i softplus(rho(z_i, c)),    order = 4 M sigmoid(omega(c)),

with m_i the mean demand of store i, x_i its pipeline, traits_i its costs, variation and lead times, y the pipelines of
the warehouses. What does not depend on the store is computed once per path, not once per store.

Reference: arXiv 2306.11246, section 4 (there the summary is a network of all raw pipelines).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from sim2real.params import Params
from sim2real.policy import Policy, deterministic_policy


@dataclass(frozen=True)
class StoreTraits:
    """What tells the stores of a network apart; all tensors of one dtype and device."""

    mean: Tensor
    """`[n]` demand per period"""
    features: Tensor
    """`[n, F]`: costs, variation, lead times, in units of order 1"""
    store_width: int
    """L, positions of a store's pipeline"""
    warehouses: int
    warehouse_width: int


def base_stock_policy(stores: int = 1) -> Policy:
    """`q = max(level - position, 0)`, `nu = {"level": [n]}` in units; states position by position (`[B, L n]`)."""

    def order(nu: Params, state: Tensor) -> Tensor:
        return torch.relu(nu["level"] - state.unflatten(-1, (-1, stores)).sum(-2))

    return deterministic_policy(order)


def capped_base_stock_policy(stores: int = 1) -> Policy:
    """`q = min(max(level - position, 0), cap)`, `nu = {"level": [n], "cap": [n]}`: near-optimal when demand is lost."""
    uncapped = base_stock_policy(stores)
    return deterministic_policy(lambda nu, s: torch.minimum(uncapped.act(nu, s, s), nu["cap"]))


def echelon_stock_policy(lead_times: Sequence[int]) -> Policy:
    """Serial line, stocks one after the other: each orders up to its level for all stock from itself down to the store.

    `nu = {"level": [N]}` in units, from the store to the top. What the next stock cannot ship the model cuts.
    """
    widths = list(lead_times)

    def order(nu: Params, state: Tensor) -> Tensor:
        positions = torch.stack([pipeline.sum(-1) for pipeline in state.split(widths, -1)], -1)
        return torch.relu(nu["level"] - positions.cumsum(-1))

    return deterministic_policy(order)


def network_weights(sizes: dict[str, tuple[int, ...]], generator: torch.Generator | None = None) -> Params:
    """Weights `NAME.k.weight`, `NAME.k.bias` of layers of several networks `{name: (inputs, hidden, ..., outputs)}`.

    Uniform within 1/sqrt(inputs) as torch's linear layers are; float64.
    """
    weights: Params = {}
    for name, widths in sizes.items():
        for k, (inputs, outputs) in enumerate(pairwise(widths)):
            bound = 1 / math.sqrt(inputs)
            draw = torch.rand(outputs, inputs + 1, generator=generator, dtype=torch.float64)
            weights[f"{name}.{k}.weight"] = bound * (2 * draw[:, :-1] - 1)
            weights[f"{name}.{k}.bias"] = bound * (2 * draw[:, -1] - 1)
    return weights


def network(nu: Params, name: str, x: Tensor) -> Tensor:
    """The network `name` of `nu` at x `[..., inputs]`: linear layers with ELU between them."""
    k = 0
    while f"{name}.{k}.weight" in nu:
        x = F.linear(F.elu(x) if k else x, nu[f"{name}.{k}.weight"], nu[f"{name}.{k}.bias"])
        k += 1
    if not k:
        raise ValueError(f"nu holds no network '{name}', only {sorted({key.split('.')[0] for key in nu})}")
    return x


def plain_order_policy(mean: float) -> Policy:
    """One store or a serial line: `q = mean softplus_4(order(x / mean) + direct(x / mean) + 1)`, one output per stock.

    softplus_4(z) = log(1 + exp(4 z)) / 4. `nu = network_weights({"order": (n, ..., N), "direct": (n, N)})` for states
    of size n and N stocks; the direct, linear path is there because order-up-to rules are linear where they order. In a
    line the model cuts what the next stock cannot ship, so the network only learns what to ask for.
    """

    def order(nu: Params, state: Tensor) -> Tensor:
        x = state / mean
        return mean * F.softplus(network(nu, "order", x) + network(nu, "direct", x) + 1.0, beta=4.0)

    return deterministic_policy(order)


def plain_network_policy(traits: StoreTraits, *, hub: bool = False) -> Policy:
    """One network of the whole state: per warehouse a softmax of its stock over the stores, and its own order.

    A store scores against 1 for keeping the stock (not in a hub); orders are sigmoid shares of 4 times the mean total
    demand. `nu = network_weights({"all": (n L + W L_w, ..., W n + W)})`.
    """
    n, houses = len(traits.mean), traits.warehouses
    scale = torch.cat(
        [traits.mean.repeat(traits.store_width), traits.mean.sum().expand(houses * traits.warehouse_width)]
    )
    first = n * traits.store_width

    def act(nu: Params, state: Tensor) -> Tensor:
        scores, orders = network(nu, "all", state / scale).split([houses * n, houses], -1)
        scores = scores.unflatten(-1, (houses, n))
        if not hub:
            scores = torch.cat([scores, torch.ones_like(scores[..., :1])], -1)
        share = torch.softmax(scores, -1)[..., :n]
        requests = share * state[..., first : first + houses].unsqueeze(-1)
        return torch.cat([requests.flatten(-2), 4 * traits.mean.sum() * torch.sigmoid(orders)], -1)

    return deterministic_policy(act)


def symmetry_aware_weights(
    traits: StoreTraits, *, hidden: int = 32, context: int = 64, generator: torch.Generator | None = None
) -> Params:
    """Weights of `symmetry_aware_policy`; their shapes do not depend on the number of stores."""
    houses = traits.warehouses
    sizes: dict[str, tuple[int, ...]] = {
        "store": (traits.store_width + traits.features.shape[1], hidden),
        "context": (hidden + houses * traits.warehouse_width, context, context),
        "told": (context, hidden),
        "decide": (hidden, hidden),
        "request": (hidden, houses),
        "order": (context, 16, houses),
    }
    return network_weights(sizes, generator)


def symmetry_aware_policy(traits: StoreTraits) -> Policy:
    """One set of weights for all stores, with a summary of the state; see the module docstring."""
    n, width, houses = len(traits.mean), traits.store_width, traits.warehouses
    total = traits.mean.sum()
    weight = traits.mean / total

    def act(nu: Params, state: Tensor) -> Tensor:
        own, upstream = state.split([n * width, houses * traits.warehouse_width], -1)
        seen = nu["store.0.weight"]
        # traits never change: their part of the first layer is a constant per store
        constant = F.linear(traits.features, seen[:, width:], nu["store.0.bias"])
        pipelines = (own.unflatten(-1, (width, n)) / traits.mean).mT
        z = F.elu(F.linear(pipelines, seen[:, :width]) + constant)
        context = F.elu(network(nu, "context", torch.cat([torch.matmul(weight, z), upstream / total], -1)))
        told = network(nu, "told", context).unsqueeze(-2)
        requests = network(nu, "request", F.elu(network(nu, "decide", z) + told))
        orders = 4 * total * torch.sigmoid(network(nu, "order", context))
        return torch.cat([(F.softplus(requests).mT * traits.mean).flatten(-2), orders], -1)

    return deterministic_policy(act)
