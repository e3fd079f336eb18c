"""The fit of a lower level as one global problem, for SCIP: a proof of optimality, where it can be had.

    min sum_t eps_t + rho sum_k |theta_k, nu_k / scale|^2   over theta, nu in a box, z in [0, 1], lambda >= 0,

with eps_t of `dual_step.py`, whose only nonconvex terms are the products z_kt theta_k and z_kt nu_k. Branch and bound
is quick where experts can be explained without a gap (the bound 0 closes at once) and hopeless otherwise: on noisy
experts its bound stays near 0 and only the incumbent improves. Then `proved` is False, and the alternation of
`inverse_optimization.py` is the better tool.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sim2real.solvers.inverse_optimization import Experts, check_experts, prepare
from sim2real.solvers.relu_program import ReluCost, quadratic, relu_program, suboptimality


@dataclass(frozen=True)
class GlobalFit:
    """The best lower level that branch and bound found, and how good any other could be."""

    cost: ReluCost
    gap: Tensor
    """eps_t `[T]`, solved again exactly by our own solver"""
    objective: float
    """sum of gaps and penalty of `cost`, solved again"""
    bound: float
    """no theta, nu inside the box have a smaller objective"""
    proved: bool
    """`objective` reaches `bound` to within `tol`"""
    status: str
    """of SCIP"""


def fit_globally(
    experts: Experts,
    *,
    ridge: float,
    terms: int,
    curvature: Tensor | None = None,
    weight: float = 1e-4,
    box: float = 10.0,
    time_limit: float = 60.0,
    tol: float = 1e-3,
) -> GlobalFit:
    """Kinks by SCIP; entries of theta and nu / scale lie in [-box, box], `scale` the root mean square norm of actions.

    `time_limit` in seconds; `tol` is absolute, in units of the cost. Raises `ImportError` without pyscipopt (extra
    `scip`), `RuntimeError` where SCIP found nothing in time, `ValueError` as `fit_lower_level`.
    """
    try:
        from pyscipopt import Model, quicksum
    except ImportError as missing:
        raise ImportError("fit_globally needs SCIP: pip install 'sim2real[scip]' (pyscipopt)") from missing
    with torch.no_grad():
        experts = check_experts(experts)
        none = experts.actions.new_zeros(0, experts.actions.shape[-1])
        plain = ReluCost(none, none[:, 0], ridge, curvature)
        pairs = prepare(experts, quadratic(plain, experts.actions))
        model = Model("lower level")
        model.hideOutput()
        model.setParam("limits/time", time_limit)
        model.setParam("limits/absgap", 0.1 * tol)
        n = pairs.features.shape[-1]
        p = [[model.addVar(lb=-box, ub=box) for _ in range(n)] for _ in range(terms)]
        gaps = [_gap(model, quicksum, pairs, p, t) for t in range(len(pairs.features))]
        penalty = model.addVar(lb=0.0)
        model.addCons(penalty >= weight * quicksum(x * x for row in p for x in row))
        model.setObjective(quicksum(gaps) + penalty, "minimize")
        model.optimize()
        if model.getNSols() == 0:
            raise RuntimeError(f"SCIP found no lower level in {time_limit} s ({model.getStatus()}); raise time_limit")
        learned = torch.tensor([[model.getVal(x) for x in row] for row in p]).to(experts.actions)
        cost = ReluCost(learned[:, :-1], -pairs.features[0, -1] * learned[:, -1], ridge, curvature)
        found = relu_program(cost, experts.c, experts.B, experts.b, experts.H, experts.h)
        gap = suboptimality(cost, found, experts.H, experts.h, experts.actions)
        objective, bound = float(gap.sum() + weight * learned.square().sum()), float(model.getDualbound())
        return GlobalFit(cost, gap, objective, bound, objective - bound <= tol, str(model.getStatus()))


def _gap(model: Any, quicksum: Any, pairs: Any, p: list[list[Any]], t: int) -> Any:
    """A variable at or above eps_t, with the slopes and multipliers of expert t."""
    a, force, slack = (x[t].tolist() for x in (pairs.features, pairs.force, pairs.slack))
    M, L, m = pairs.M.tolist(), pairs.L.tolist(), len(pairs.M[0])
    z = [model.addVar(lb=0.0, ub=1.0) for _ in p]
    lam = [model.addVar(lb=0.0) for _ in slack]
    kinks = [quicksum(x * y for x, y in zip(a, row, strict=True) if x) for row in p]
    tau = [model.addVar(lb=0.0) for _ in p]
    for height, kink in zip(tau, kinks, strict=True):
        model.addCons(height >= kink)
    residual = [model.addVar(lb=None) for _ in force]
    for i, r in enumerate(residual):
        explained = quicksum(M[i][j] * z[k] * row[j] for k, row in enumerate(p) for j in range(m) if M[i][j])
        model.addCons(r == force[i] + explained + quicksum(x * y for x, y in zip(L[i], lam, strict=True) if x))
    gap = model.addVar(lb=0.0)
    complementary = quicksum(s * y for s, y in zip(slack, lam, strict=True) if s)
    hinges = quicksum(height - slope * kink for height, slope, kink in zip(tau, z, kinks, strict=True))
    model.addCons(gap >= complementary + hinges + 0.25 * quicksum(r * r for r in residual))
    return gap
