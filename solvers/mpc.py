"""Linear model predictive control with input bounds as a batched box QP, and as a policy.

    minimise  sum_{k<N} g^k (s_k'Q s_k + q's_k + a_k'R a_k + r'a_k) + g^N (s_N'P s_N + q's_N)
    subject to  s_{k+1} = A s_k + B a_k + c,   low <= a_k <= high

The states are eliminated ("condensed"; Borrelli, Bemporad and Morari, Predictive Control, 2017, section 8.2): with
`s_k = f_k + G_k a`, a = (a_0, ..., a_{N-1}), the cost is `a'H a / 2 + h'a` plus a constant, where

    H = 2 sum_k g^k G_k'Q_k G_k + 2 diag(g^k R),      h = sum_k g^k G_k'(2 Q_k f_k + q) + (g^k r)_k.

Bounds on inputs alone are always feasible. Limits of states enter as costs (q, Q), not as constraints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn.functional import pad

from sim2real.params import Params
from sim2real.policy import Policy, deterministic_policy
from sim2real.solvers.box_qp import BoxQPSolution, box_qp

REQUIRED = ("A", "B", "Q", "R")
OPTIONAL = ("P", "q", "r", "c", "low", "high")


@dataclass(frozen=True)
class MPCPlan:
    """`actions [..., N, m]`, `states [..., N + 1, n]` from x0 on, and the QP's solution over the flattened actions."""

    actions: Tensor
    states: Tensor
    solution: BoxQPSolution


def condensed_mpc(
    A: Tensor,
    B: Tensor,
    Q: Tensor,
    R: Tensor,
    x0: Tensor,
    horizon: int,
    *,
    P: Tensor | None = None,
    q: Tensor | None = None,
    r: Tensor | None = None,
    c: Tensor | None = None,
    low: Tensor | float = -math.inf,
    high: Tensor | float = math.inf,
    discount: float = 1.0,
    tol: float = 1e-12,
    max_steps: int = 200,
    strict: bool = False,
) -> MPCPlan:
    """The optimal plan over `horizon` steps from x0 `[..., n]`, differentiable in every tensor given.

    A `[..., n, n]`, B `[..., n, m]`, Q and the terminal P (default Q) `[..., n, n]`, R `[..., m, m]`: costs, minimised,
    symmetric parts used; q and c `[..., n]`, r, low and high `[..., m]`, the same at every step. Leading dimensions
    broadcast. `tol`, `max_steps`, `strict` and what an unconverged sample does: see `box_qp`. Raises `ValueError` for
    shapes that do not fit, an empty box, and costs without a unique minimum (R positive definite and Q, P positive
    semi-definite give one).
    """
    if horizon < 1 or not 0 < discount < math.inf:
        raise ValueError(f"horizon must be at least 1 and discount positive, got {horizon} and {discount}")
    given = {"A": A, "B": B, "Q": Q, "R": R, "P": P, "q": q, "r": r, "c": c, "low": low, "high": high, "x0": x0}
    m = _check_shapes({key: value for key, value in given.items() if isinstance(value, Tensor)})
    free, forced = _responses(A, B, x0, c, horizon)
    weights = discount ** torch.arange(horizon + 1, dtype=x0.dtype, device=x0.device)
    H, h = _program(free, forced, (Q, R, P, q, r), weights)
    # a number is the bound of every input; a vector's is repeated over the steps
    bounds = [torch.as_tensor(bound, dtype=x0.dtype, device=x0.device) for bound in (low, high)]
    bounds = [bound.repeat(*(1,) * (bound.ndim - 1), horizon) if bound.ndim else bound for bound in bounds]
    solution = box_qp(H, h, *bounds, tol=tol, max_steps=max_steps, strict=strict)
    moved = free + (solution.x.unsqueeze(-2) @ forced.mT).squeeze(-2)
    later = moved.unflatten(-1, (horizon, x0.shape[-1]))
    states = torch.cat([x0.expand(*later.shape[:-2], -1).unsqueeze(-2), later], -2)
    return MPCPlan(solution.x.unflatten(-1, (horizon, m)), states, solution)


def mpc_policy(
    horizon: int,
    fixed: Mapping[str, Tensor] = MappingProxyType({}),
    *,
    discount: float = 1.0,
    tol: float = 1e-12,
    max_steps: int = 200,
    strict: bool = False,
) -> Policy:
    """The first action of `condensed_mpc` from the present state; nu holds the controller's model, cost and bounds.

    nu = {"A", "B", "Q", "R"} and optionally {"P", "q", "r", "c", "low", "high"}, shapes as in `condensed_mpc`; what is
    in `fixed` need not be in nu, and is not tuned. The state is whatever the policy is called with, `[B, n]`. Raises
    `KeyError` for entries missing or unknown, and what `condensed_mpc` raises.
    """

    def first(nu: Params, state: Tensor) -> Tensor:
        values = {**fixed, **nu}
        missing = [key for key in REQUIRED if key not in values]
        unknown = [key for key in values if key not in REQUIRED + OPTIONAL]
        if missing or unknown:
            raise KeyError(f"mpc_policy: missing {missing}, unknown {unknown}; it takes {REQUIRED} and {OPTIONAL}")
        settings = {"discount": discount, "tol": tol, "max_steps": max_steps, "strict": strict}
        return condensed_mpc(**values, x0=state, horizon=horizon, **settings).actions[..., 0, :]  # type: ignore[arg-type]

    return deterministic_policy(first)


def _responses(A: Tensor, B: Tensor, x0: Tensor, c: Tensor | None, horizon: int) -> tuple[Tensor, Tensor]:
    """f `[..., N n]` and G `[..., N n, N m]` of `(s_1, ..., s_N) = f + G (a_0, ..., a_{N-1})`."""
    m = B.shape[-1]
    state, row = x0, pad(B, (0, (horizon - 1) * m))
    states, rows = [], [row]
    for k in range(horizon):
        state = (state.unsqueeze(-2) @ A.mT).squeeze(-2)
        state = state if c is None else state + c
        states.append(state)
        if k > 0:
            row = A @ row + pad(B, (k * m, (horizon - 1 - k) * m))
            rows.append(row)
    rows = list(torch.broadcast_tensors(*rows))
    return torch.cat(list(torch.broadcast_tensors(*states)), -1), torch.cat(rows, -2)


def _program(
    free: Tensor, forced: Tensor, costs: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None], w: Tensor
) -> tuple[Tensor, Tensor]:
    """H `[..., N m, N m]` and h `[..., N m]` of the condensed program; w `[N + 1]` are the powers of the discount."""
    Q, R, P, q, r = costs
    horizon = w.shape[0] - 1
    stage, last = torch.broadcast_tensors(Q, Q if P is None else P)
    weighted = w[1:, None, None] * torch.stack([stage] * (horizon - 1) + [last], -3)
    weighted = 0.5 * (weighted + weighted.mT)
    blocks = weighted @ forced.unflatten(-2, (horizon, Q.shape[-1]))
    steered = blocks.flatten(-3, -2)
    action_cost = torch.einsum("kl,...ij->...kilj", torch.diag(w[:-1]), R).flatten(-2, -1).flatten(-3, -2)
    H = 2 * (forced.mT @ steered + action_cost)
    h = 2 * (free.unsqueeze(-2) @ steered).squeeze(-2)
    if q is not None:
        h = h + ((w[1:, None] * q.unsqueeze(-2)).flatten(-2, -1).unsqueeze(-2) @ forced).squeeze(-2)
    if r is not None:
        h = h + (w[:-1, None] * r.unsqueeze(-2)).flatten(-2, -1)
    return H, h


def _check_shapes(given: dict[str, Tensor]) -> int:
    """The number of inputs m, after every tensor was found to fit B `[..., n, m]`."""
    B = given["B"]
    if B.ndim < 2:
        raise ValueError(f"B must be [..., n, m], got {tuple(B.shape)}")
    n, m = B.shape[-2:]
    wanted = {"A": (n, n), "B": (n, m), "Q": (n, n), "R": (m, m), "P": (n, n), "x0": (n,), "q": (n,), "c": (n,)}
    for key, value in given.items():
        shape = wanted.get(key, (m,))
        scalar = key in ("low", "high") and value.ndim == 0
        if not (value.shape[-len(shape) :] == shape or scalar) or not value.is_floating_point():
            raise ValueError(
                f"{key} must be floating point [..., {', '.join(map(str, shape))}] for B {tuple(B.shape)}, "
                f"got {value.dtype} {tuple(value.shape)}"
            )
    return int(m)
