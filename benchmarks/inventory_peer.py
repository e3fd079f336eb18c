"""One warehouse with lost demand as the reference code formulates it, in plain torch: the peer of `m-speed`.

Observations are a dictionary of arrays `[B, stores, positions]`. Every period each kind of node moves its pipeline by
stacking its columns and puts what was shipped at a position computed in the flattened array of all paths, because lead
times may differ. The policy gives each store its own input, static features and the context of the whole network side
by side, to one set of weights; requests beyond the warehouse's stock are scaled. `nodes` walks from store to store with
the same arithmetic; `stacked` takes all stores at once.

The function is that of `sim2real.inventory_policies.symmetry_aware_policy`: same weights, same cost, same gradient.
Reference: arXiv 2306.11246 and the simulator of its public code; written anew here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sim2real.inventory_policies import StoreTraits
from sim2real.params import Params

Observation = dict[str, Tensor]
Decide = Callable[[Params, StoreTraits, Observation], tuple[Tensor, Tensor]]


def total_cost(
    decide: Decide,
    nu: Params,
    theta: Params,
    traits: StoreTraits,
    lead_times: Tensor,
    start: Tensor,
    demand: Tensor,
    supplier_lead_time: int = 3,
) -> Tensor:
    """Cost of all periods and paths; start `[B, n, L]`, demand `[B, n, T]`, lead times `[n]`."""
    batch = len(start)
    seen = {
        "stores": start,
        "warehouse": start.new_zeros(batch, 1, traits.warehouse_width),
        "holding": theta["holding"].expand(batch, -1),
        "underage": theta["underage"].expand(batch, -1),
        "features": traits.features.expand(batch, -1, -1),
        "lead_times": lead_times.expand(batch, -1),
        "supplier_lead_times": lead_times.new_full((batch, 1), supplier_lead_time),
    }
    offsets = {key: _offsets(seen[key]) for key in ("stores", "warehouse")}
    total = start.new_zeros(())
    for t in range(demand.shape[2]):
        shipped, ordered = decide(nu, traits, seen)
        on_hand = seen["stores"][:, :, 0]
        left = on_hand - demand[:, :, t]
        cost = seen["underage"] * torch.clip(-left, min=0) + seen["holding"] * torch.clip(left, min=0)
        left = torch.clip(left, min=0)
        kept = seen["warehouse"][:, :, 0] - shipped.sum(1, keepdim=True)
        total = total + cost.sum() + theta["warehouse_holding"] * torch.clip(kept, min=0).sum()
        seen["stores"] = _move(seen["stores"], left, shipped, seen["lead_times"], offsets["stores"])
        times = seen["supplier_lead_times"]
        seen["warehouse"] = _move(seen["warehouse"], kept, ordered, times, offsets["warehouse"])
    return total.sum()


def _offsets(pipeline: Tensor) -> Tensor:
    """Where the pipeline of each node begins in the flattened array, `[B, n]`."""
    batch, nodes, width = pipeline.shape
    return (torch.arange(batch) * nodes * width)[:, None] + torch.arange(nodes) * width


def _move(pipeline: Tensor, kept: Tensor, arriving: Tensor, lead_times: Tensor, offsets: Tensor) -> Tensor:
    later = [pipeline[:, :, k + 1] for k in range(1, pipeline.shape[2] - 1)]
    moved = torch.stack([kept + pipeline[:, :, 1], *later, torch.zeros_like(kept)], 2)
    return moved.put((offsets + lead_times - 1).flatten(), arriving.flatten(), accumulate=True)


def stacked(nu: Params, traits: StoreTraits, seen: Observation) -> tuple[Tensor, Tensor]:
    """Shipments `[B, n]` and the warehouse's order `[B, 1]`, all stores in one array."""
    own = torch.cat([seen["stores"] / traits.mean[:, None], seen["features"]], 2)
    z = F.elu(F.linear(own, nu["store.0.weight"], nu["store.0.bias"]))
    weight = traits.mean / traits.mean.sum()
    context = _context(nu, traits, seen, (z * weight[:, None]).sum(1))
    beside = torch.cat([z, context.unsqueeze(1).expand(-1, z.shape[1], -1)], 2)
    return _feasible(nu, traits, seen, _request(nu, beside).squeeze(2) * traits.mean, context)


def nodes(nu: Params, traits: StoreTraits, seen: Observation) -> tuple[Tensor, Tensor]:
    """As `stacked`, store by store."""
    count, total = len(traits.mean), traits.mean.sum()
    z, summary = [], seen["stores"].new_zeros(())
    for i in range(count):
        own = torch.cat([seen["stores"][:, i] / traits.mean[i], seen["features"][:, i]], 1)
        z.append(F.elu(F.linear(own, nu["store.0.weight"], nu["store.0.bias"])))
        summary = summary + z[i] * (traits.mean[i] / total)
    context = _context(nu, traits, seen, summary)
    requests = [_request(nu, torch.cat([z[i], context], 1)) * traits.mean[i] for i in range(count)]
    return _feasible(nu, traits, seen, torch.cat(requests, 1), context)


def order_up_to(nu: Params, traits: StoreTraits, seen: Observation) -> tuple[Tensor, Tensor]:
    """No network: a level for each store, and one for the warehouse and all that lies below it."""
    requests = torch.clip(nu["level"] - seen["stores"].sum(2), min=0)
    below = seen["stores"].sum((1, 2)).unsqueeze(1) + seen["warehouse"].sum(2)
    return _shared(seen, requests), torch.clip(nu["top"] - below, min=0)


def _context(nu: Params, traits: StoreTraits, seen: Observation, summary: Tensor) -> Tensor:
    x = torch.cat([summary, seen["warehouse"][:, 0] / traits.mean.sum()], 1)
    x = F.elu(F.linear(x, nu["context.0.weight"], nu["context.0.bias"]))
    return F.elu(F.linear(x, nu["context.1.weight"], nu["context.1.bias"]))


def _request(nu: Params, beside: Tensor) -> Tensor:
    """Own embedding and context side by side through two layers."""
    weight = torch.cat([nu["decide.0.weight"], nu["told.0.weight"]], 1)
    x = F.elu(F.linear(beside, weight, nu["decide.0.bias"] + nu["told.0.bias"]))
    return F.softplus(F.linear(x, nu["request.0.weight"], nu["request.0.bias"]))


def _feasible(
    nu: Params, traits: StoreTraits, seen: Observation, requests: Tensor, context: Tensor
) -> tuple[Tensor, Tensor]:
    x = F.elu(F.linear(context, nu["order.0.weight"], nu["order.0.bias"]))
    share = torch.sigmoid(F.linear(x, nu["order.1.weight"], nu["order.1.bias"]))
    return _shared(seen, requests), 4 * traits.mean.sum() * share


def _shared(seen: Observation, requests: Tensor) -> Tensor:
    on_hand = seen["warehouse"][:, 0, :1]
    return requests * torch.clip(on_hand / requests.sum(1, keepdim=True).clamp_min(1e-12), max=1.0)
