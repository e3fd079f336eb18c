"""Linear model predictive control with bounds on inputs and outputs, as a batched QP and as a policy.

    minimise  sum_{k<N} g^k (s_k'Q s_k + q's_k + a_k'R a_k + r'a_k) + g^N (s_N'P s_N + q's_N)
    subject to  s_{k+1} = A s_k + B a_k + c,   low <= a_k <= high,
                output_low + back_off <= C s_k <= output_high - back_off,   k = 1 ... N

The states are eliminated ("condensed"; Borrelli, Bemporad and Morari, Predictive Control, 2017, section 8.2): with
`s_k = f_k + G_k a`, a = (a_0, ..., a_{N-1}), the cost is `a'H a / 2 + h'a` plus a constant, where

    H = 2 sum_k g^k G_k'Q_k G_k + 2 diag(g^k R),      h = sum_k g^k G_k'(2 Q_k f_k + q) + (g^k r)_k.

Powers of A stand in these: with an unstable eigenvalue l, rounding of the plan grows as `|l|^(2N)`, and no residual of
the program shows it. At l = 1.3 the first action is exact to 1e-11 for N = 20, 3e-9 for 30, 4e-2 for 60: keep `|l|^N`
below some 1e4.

Bounds on inputs alone are always feasible: a box QP. Bounds on outputs need not be. Hard, a state from which they
cannot hold has no plan, and is said to have none. Soft, each may be exceeded by `e_k >= 0` at the price

    sum_{k>=1} g^k (penalty'e_k + e_k'diag(penalty_quadratic) e_k).

The linear penalty is exact: where the hard program has a plan and `penalty` is larger than its largest multiplier over
g^k, the soft plan is the same one (Kerrigan and Maciejowski, UKACC 2000; Nocedal and Wright, 2006, theorem 17.3). A
quadratic penalty alone always gives way a little. So: `penalty` some two to ten times the largest multiplier met
(`mpc_report` tells it), `penalty_quadratic` to spread what must be violated over steps and outputs, or 0.

The plan is a piecewise smooth function of everything, with corners where bounds become active. A return that averages
over few states has these corners too, and its maxima like to sit on them, where nothing is stationary. An MPC whose
weights are trained wants `smoothing`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sim2real.params import Params
from sim2real.policy import Policy, deterministic_policy
from sim2real.solvers.box_qp import BoxQPSolution, box_qp
from sim2real.solvers.mpc_outputs import (
    Bound,
    OutputBounds,
    check_output_bounds,
    per_step,
    slack_and_pressure,
    with_outputs,
)
from sim2real.solvers.qp import OnFailure, QPSolution, qp
from sim2real.solvers.smooth_qp import smooth_qp

REQUIRED = ("A", "B", "Q", "R")
OUTPUTS = ("C", "output_low", "output_high", "back_off", "penalty", "penalty_quadratic")
OPTIONAL = ("P", "q", "r", "c", "low", "high", *OUTPUTS)


@dataclass(frozen=True)
class MPCPlan:
    """`actions [..., N, m]`, `states [..., N + 1, n]` from x0 on, and the solution of the QP; NaN without a plan."""

    actions: Tensor
    states: Tensor
    solution: BoxQPSolution | QPSolution
    """over the flattened actions, a QPSolution over (actions, e) when outputs are bounded"""
    slack: Tensor | None = None
    """`[..., N, p]`, by how much the soft bounds of the outputs of steps 1 ... N are exceeded; None without any. It is
    e, less the room above the output that `smoothing` keeps"""
    pressure: Tensor | None = None
    """`[..., N, p]`: multiplier over g^k of the bounds of each output, both sides together; None without any"""


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
    low: Bound = -math.inf,
    high: Bound = math.inf,
    C: Tensor | None = None,
    output_low: Bound | None = None,
    output_high: Bound | None = None,
    back_off: Bound = 0.0,
    penalty: Bound | None = None,
    penalty_quadratic: Bound | None = None,
    discount: float = 1.0,
    tol: float = 1e-12,
    max_steps: int = 200,
    strict: bool = False,
    on_infeasible: OnFailure = "raise",
    smoothing: float = 0.0,
) -> MPCPlan:
    """The optimal plan over `horizon` steps from x0 `[..., n]`, differentiable in every tensor given.

    A `[..., n, n]`, B `[..., n, m]`, Q and the terminal P (default Q) `[..., n, n]`, R `[..., m, m]`: costs, minimised,
    symmetric parts used; q and c `[..., n]`, r, low and high `[..., m]`, the same at every step. Outputs `C s`, C
    `[..., p, n]` (default: the states), with bounds and `back_off` numbers or `[..., p]`, in units of the outputs;
    they are soft when `penalty` (cost per unit of output) or `penalty_quadratic` (per its square), >= 0, is given.
    Leading dimensions broadcast. `tol`, `max_steps`, `strict` and what an unconverged sample does: see `box_qp`, and
    with bounded outputs `qp` (tol at least 1e-10 there). Without a plan: `InfeasibleError` naming the sample, or, with
    `on_infeasible="nan"`, NaN and `solution.infeasible`. `smoothing` > 0, in units of the cost, replaces all bounds by
    barriers (see `smooth_qp`): a little cautious, without kinks. Raises `ValueError` for shapes that do not fit, an
    empty box, and costs without a unique minimum (R positive definite and Q, P positive semi-definite give one).
    """
    if horizon < 1 or not 0 < discount < math.inf:
        raise ValueError(f"horizon must be at least 1 and discount positive, got {horizon} and {discount}")
    given = {"A": A, "B": B, "Q": Q, "R": R, "P": P, "q": q, "r": r, "c": c, "low": low, "high": high, "x0": x0, "C": C}
    m = _check_shapes({key: value for key, value in given.items() if isinstance(value, Tensor)})
    outputs = OutputBounds(C, output_low, output_high, back_off, penalty, penalty_quadratic)
    n, width = x0.shape[-1], x0.shape[-1] if C is None else C.shape[-2]
    check_output_bounds(outputs, width)
    free, forced = _responses(A, B, x0, c, horizon)
    weights = discount ** torch.arange(horizon + 1, dtype=x0.dtype, device=x0.device)
    program = _program(free, forced, (Q, R, P, q, r), weights)
    settings: dict[str, Any] = {"max_steps": max_steps, "strict": strict}
    slack, pressure = None, None
    solution: BoxQPSolution | QPSolution
    if output_low is None and output_high is None and smoothing == 0:
        bounds = [per_step(bound, horizon, x0) for bound in (low, high)]
        solution = box_qp(*program, *bounds, tol=tol, **settings)
    else:
        bounded = with_outputs(program, (free, forced), (low, high), outputs, weights, n)
        settings |= {"tol": max(tol, 1e-10), "on_failure": on_infeasible}
        solution = smooth_qp(*bounded, smoothing=smoothing, **settings) if smoothing else qp(*bounded, **settings)
        slack, pressure = slack_and_pressure(solution, horizon * m, width, outputs, weights)
    actions = solution.x[..., : horizon * m]
    moved = free + (actions.unsqueeze(-2) @ forced.mT).squeeze(-2)
    later = moved.unflatten(-1, (horizon, n))
    states = torch.cat([x0.expand(*later.shape[:-2], -1).unsqueeze(-2), later], -2)
    return MPCPlan(actions.unflatten(-1, (horizon, m)), states, solution, slack, pressure)


def mpc_policy(
    horizon: int,
    fixed: Mapping[str, Tensor] = MappingProxyType({}),
    *,
    discount: float = 1.0,
    tol: float = 1e-12,
    max_steps: int = 200,
    strict: bool = False,
    on_infeasible: OnFailure = "raise",
    smoothing: float = 0.0,
) -> Policy:
    """The first action of `condensed_mpc` from the present state; nu holds the controller's model, cost and bounds.

    nu = {"A", "B", "Q", "R"} and optionally {"P", "q", "r", "c", "low", "high", "C", "output_low", "output_high",
    "back_off", "penalty", "penalty_quadratic"}, shapes as in `condensed_mpc`; what is in `fixed` need not be in nu, and
    is not tuned. The state is whatever the policy is called with, `[B, n]`. Raises `KeyError` for entries missing or
    unknown, and what `condensed_mpc` raises: with hard bounds of outputs, `InfeasibleError` from a state without a
    plan. A policy that must act from any state has soft bounds.
    """

    def first(nu: Params, state: Tensor) -> Tensor:
        values: dict[str, Any] = {**fixed, **nu}
        missing = [key for key in REQUIRED if key not in values]
        unknown = [key for key in values if key not in REQUIRED + OPTIONAL]
        if missing or unknown:
            raise KeyError(f"mpc_policy: missing {missing}, unknown {unknown}; it takes {REQUIRED} and {OPTIONAL}")
        settings: dict[str, Any] = {"discount": discount, "tol": tol, "max_steps": max_steps, "strict": strict}
        settings |= {"on_infeasible": on_infeasible, "smoothing": smoothing}
        return condensed_mpc(**values, x0=state, horizon=horizon, **settings).actions[..., 0, :]

    return deterministic_policy(first)


def _responses(A: Tensor, B: Tensor, x0: Tensor, c: Tensor | None, horizon: int) -> tuple[Tensor, Tensor]:
    """f `[..., N n]` and G `[..., N n, N m]` of `(s_1, ..., s_N) = f + G (a_0, ..., a_{N-1})`."""
    n, powers = A.shape[-1], A  # A, A^2, ..., A^N below one another, by doubling
    while (rows := powers.shape[-2]) < horizon * n:
        powers = torch.cat([powers, powers[..., : horizon * n - rows, :] @ powers[..., -n:, :]], -2)
    one = torch.eye(n, dtype=A.dtype, device=A.device).expand_as(A)
    earlier = torch.cat([one, powers[..., :-n, :]], -2)
    free = (x0.unsqueeze(-2) @ powers.mT).squeeze(-2)
    if c is not None:
        summed = earlier.unflatten(-2, (horizon, n)).cumsum(-3).flatten(-3, -2)
        free = free + (c.unsqueeze(-2) @ summed.mT).squeeze(-2)
    steps = torch.arange(horizon, device=A.device)
    lag = (steps.unsqueeze(1) - steps + 1).clamp(min=0)  # 0: an action that is still to come
    blocks = pad(earlier @ B, (0, 0, n, 0)).unflatten(-2, (horizon + 1, n)).index_select(-3, lag.flatten())
    return free, blocks.unflatten(-3, (horizon, horizon)).transpose(-3, -2).flatten(-4, -3).flatten(-2, -1)


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
    action_cost = torch.diag(w[:-1])[:, None, :, None] * R[..., None, :, None, :]
    H = 2 * (forced.mT @ steered + action_cost.flatten(-4, -3).flatten(-2, -1))
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
    wanted |= {"C": (*given["C"].shape[-2:-1], n)} if "C" in given else {}
    for key, value in given.items():
        shape = wanted.get(key, (m,))
        scalar = key in ("low", "high") and value.ndim == 0
        if not (value.shape[-len(shape) :] == shape or scalar) or not value.is_floating_point():
            raise ValueError(
                f"{key} must be floating point [..., {', '.join(map(str, shape))}] for B {tuple(B.shape)}, "
                f"got {value.dtype} {tuple(value.shape)}"
            )
        if key not in ("low", "high") and (value.dtype, value.device) != (B.dtype, B.device):
            raise ValueError(f"{key} is {value.dtype} on {value.device}, B {B.dtype} on {B.device}; make them equal")
    return int(m)
