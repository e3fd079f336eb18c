"""Linear policies and small networks as native Warp functions, with the products that second order needs.

    z_i = W_i h_{i-1} + b_i,  h_i = f_i(z_i),  h_0 = s,        a = h_L + std e,   or a = m + exp(l) e with h_L = (m, l)

    push     dz = W dh + dW h + db,  dh_i = f' dz
    pull     from g = cotangent of a:  z* = f' h*,  W* += z* h',  h*_{i-1} = W' z*
    second   from the cotangents (g, p) of (a, da):  z* = f' h* + f'' dz dh*,  dz* = f' dh*,
             h*_{i-1} = W' z* + dW' dz*,  dh*_{i-1} = W' dz*,  W* += z* h' + dz* dh',  dW* += dz* h'

Each is written out as C++ loops of fixed lengths over blocks of environments that lie side by side, so that a CPU works
on several at once and reads a weight once for all of them; a GPU has blocks of one. Nothing needs an adjoint from Warp.
Reference: Goodfellow, Bengio and Courville, Deep Learning, 2016, 6.5.6; for `second`, Pearlmutter, Fast exact
multiplication by the Hessian, Neural Computation 6(1), 1994.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import warp as wp
from torch import Tensor

from sim2real.policy import Activation
from sim2real.simulators.warp_native import scalar_type, warp_function
from sim2real.simulators.warp_policy_source import (
    Network,
    action,
    action_length,
    action_push,
    forward,
    header,
    pull,
    read_rows,
    second,
)

__all__ = ["Network", "PolicyFunctions", "action_length", "network_of", "pack_weights", "policy_functions"]

Weights = tuple[tuple[Tensor, Tensor | None], ...]
HIDDEN_LAYERS, HIDDEN_UNITS = 2, 64
"""the largest networks that run inside a kernel; larger ones alternate with it"""


def network_of(weights: Weights, activations: tuple[Activation, ...], *, head: bool) -> Network | None:
    """What a policy's layers amount to; None where they do not follow on one another or are too large."""
    if any(not 2 <= w.dim() <= 3 or (b is not None and b.dim() not in (1, 2)) for w, b in weights):
        return None
    widths = (weights[0][0].shape[-1], *(w.shape[-2] for w, _ in weights))
    fits = all(w.shape[-1] == a for (w, _), a in zip(weights, widths, strict=False))
    biased = all(b is None or b.shape[-1] == w.shape[-2] for w, b in weights)
    small = len(weights) <= HIDDEN_LAYERS + 1 and all(width <= HIDDEN_UNITS for width in widths)
    own = any(x is not None and x.dim() == full and x.shape[0] > 1 for w, b in weights for x, full in ((w, 3), (b, 2)))
    return Network(widths, activations, head, own) if fits and biased and small else None


def pack_weights(weights: Weights) -> Tensor:
    """One row `[G, ...]` per policy: of each layer W `[(G,) out, in]` row by row, then b `[(G,) out]` or zeros."""
    rows = []
    for w, b in weights:
        rows.append(w.flatten(-2))
        rows.append(w.new_zeros(w.shape[-2]) if b is None else b)
    count = max(row.shape[0] if row.dim() == 2 else 1 for row in rows)
    return torch.cat([row.expand(count, row.shape[-1]) for row in rows], -1)


@dataclass(frozen=True)
class PolicyFunctions:
    """Warp functions `(copy, time, first, last, row, wanted, std, *arrays)` of scalar arrays, for rows first..last-1.

    value    weights, state, noise, action_out
    push     weights, d_weights, state, d_state, noise, d_noise, d_action_out
    pull     weights, state, noise, g, weights_out, state_out, noise_out
    second   weights, d_weights, state, d_state, noise, d_noise, g, p,
             weights_out, d_weights_out, state_out, d_state_out, noise_out, d_noise_out

    Arrays are `[copies, time, environments, length]`; weights, g, p and the outputs of weights and state have no time.
    Those outputs grow; the weights' do in `row` (or each environment's own) if wanted (1 weights, 2 d_weights).
    """

    value: Any
    push: Any
    pull: Any
    second: Any


@cache
def policy_functions(network: Network, precision: torch.dtype) -> PolicyFunctions:
    """The functions of a network."""
    pair = lambda *names: tuple(name for base in names for name in (base, f"d_{base}"))
    read, read_pairs = ("weights", "state", "noise"), pair("weights", "state", "noise")
    outputs, output_pairs = ("weights_out", "state_out", "noise_out"), pair("weights_out", "state_out", "noise_out")
    plain, dual = forward(network, dual=False), forward(network, dual=True)
    define = lambda name, wide, body, arrays: _define(name, network, precision, wide, body, arrays)
    return PolicyFunctions(
        define("act", 16, plain + action(network), (*read, "action_out")),
        define("act_push", 8, dual + action_push(network), (*read_pairs, "d_action_out")),
        define("act_pull", 16, plain + pull(network), (*read, "g", *outputs)),
        define("act_second", 8, dual + second(network), (*read_pairs, "g", "p", *output_pairs)),
    )


_UNTIMED = {"weights", "d_weights", "g", "p", "weights_out", "d_weights_out", "state_out", "d_state_out"}


def _define(name: str, network: Network, precision: torch.dtype, wide: int, body: str, arrays: tuple[str, ...]) -> Any:
    """The Warp function of a body; blocks of `wide` environments on a CPU where they share weights."""
    scalar = scalar_type(precision)
    snippet = header(precision, 1 if network.own else wide) + read_rows(network, dual="d_state" in arrays)
    snippet += body + "}\n"
    types: dict[str, Any] = dict.fromkeys(("copy", "time", "first", "last", "row", "wanted"), wp.int32)
    types |= {"std": scalar} | {a: wp.array(dtype=scalar, ndim=3 if a in _UNTIMED else 4) for a in arrays}
    label = f"{name}_{hashlib.blake2b(snippet.encode(), digest_size=6).hexdigest()}"
    return warp_function("@wp.func_native(snippet)", label, types, "...", {"snippet": snippet})
