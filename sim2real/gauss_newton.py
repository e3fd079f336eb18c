"""The misfit F(x) of `sim2real.misfit` with its Gauss-Newton model, dense or by products.

    gradient = sum J'w r + prior,     Hessian = sum J'w^3 J + prior,      w = 1/sqrt(1 + (r/c)^2)

Up to `MANY` entries of theta the Hessian is formed from the Jacobians of the windows, run by run. With more of them it
is applied to a vector by a tangent roll followed by an adjoint one, which cost two passes over the steps whatever the
number of parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import jvp, vjp

from sim2real.misfit import Misfit, Rolled, linearize, roll_windows, start_columns
from sim2real.params import ravel, unravel
from sim2real.roll import Path, adjoint_roll, observe, step_jacobians, tangent_roll
from sim2real.solvers.least_squares import Objective, QuadraticModel, soft_l1
from sim2real.unknowns import local_columns

MANY = 50
"""entries of theta above which the Hessian is not formed"""
# Random vectors behind the estimate of the Hessian's diagonal, which only scales the damping.
_PROBES = 8


def row_weight(misfit: Misfit) -> float:
    """Factor that makes a residual a row of the sum of squares: 1 / (c sqrt(R q))."""
    if misfit.scale is None:
        return 1.0
    return 1 / (misfit.scale * math.sqrt(misfit.windows.measured[0].numel()))


def objective(misfit: Misfit, *, power: int = 3) -> Objective:
    """F(x) and its Gauss-Newton model, for `levenberg_marquardt`.

    power: of w in the Hessian. 3 is the exact curvature of the loss, fast near the optimum of a smooth problem; 1
    bounds it from above (iteratively reweighted squares), steady far from it; 2 lies between.
    """
    weight, unknowns = row_weight(misfit), misfit.unknowns
    robust = None if misfit.scale is None else weight * misfit.scale
    precision = unknowns.std.pow(-2)

    def value(x: Tensor) -> tuple[Tensor, Rolled]:
        rolled = roll_windows(misfit, x)
        loss = soft_l1(weight * rolled.residual, robust)[0].sum()
        return loss + (precision * (x - unknowns.mean).square()).sum() / 2, rolled

    def model(x: Tensor, rolled: Rolled) -> QuadraticModel:
        rows = weight * rolled.residual.flatten(1)
        w = soft_l1(rows, robust)[1]
        pull = precision * (x - unknowns.mean)
        if unknowns.count > MANY:
            return _adjoint_model(misfit, rolled, rows, w, power, pull, precision)
        J = weight * linearize(misfit, rolled).jacobian.flatten(1, 2)  # in `work` for the intervals
        gradient, hessian = assemble(misfit, J, (w * rows).unsqueeze(-1), w.pow(power))
        return QuadraticModel(gradient + pull, hessian + precision.diag(), work=J)

    return Objective(value, model)


def assemble(misfit: Misfit, J: Tensor, score: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor]:
    """`sum J' score [P]` and `sum J' curvature J [P, P]` from local Jacobians `[W, K, L]`, summed run by run."""
    columns, episode = local_columns(misfit.unknowns), misfit.windows.episode
    P, (runs, L) = len(misfit.unknowns.start), columns.shape
    g = J.new_zeros(runs, L).index_add(0, episode, (J.mT @ score).squeeze(-1))
    H = J.new_zeros(runs, L, L).index_add(0, episode, J.mT @ (curvature.unsqueeze(-1) * J))
    gradient, hessian = J.new_zeros(P), J.new_zeros(P, P)
    for run, index in enumerate(columns):
        gradient[index] += g[run]
        hessian[index.unsqueeze(1), index] += H[run]
    return gradient, hessian


def global_jacobian(misfit: Misfit, J: Tensor) -> Tensor:
    """Local Jacobians `[W, K, L]` in the columns of x, `[W, K, P]`."""
    columns = local_columns(misfit.unknowns)[misfit.windows.episode].unsqueeze(1).expand(-1, J.shape[1], -1)
    return J.new_zeros(*J.shape[:2], len(misfit.unknowns.start)).scatter_add(2, columns, J)


def _adjoint_model(
    misfit: Misfit, rolled: Rolled, rows: Tensor, w: Tensor, power: int, pull: Tensor, precision: Tensor
) -> QuadraticModel:
    """The model with the Hessian as a product, for many parameters: a tangent roll, then an adjoint one."""
    tangent, adjoint = jacobian_products(misfit, rolled)
    weight = row_weight(misfit)
    product = lambda v: weight**2 * adjoint(w.pow(power) * tangent(v)) + precision * v
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (_PROBES, *rows.shape), generator=generator).to(rows) * 2 - 1
    # E (J'u)_j^2 = sum_i J_ij^2 for random signs u
    diagonal = torch.stack([adjoint(w.pow(power / 2) * u).square() for u in signs]).mean(0)
    return QuadraticModel(weight * adjoint(w * rows) + pull, product, weight**2 * diagonal + precision)


def _transitions(misfit: Misfit, rolled: Rolled) -> Tensor:
    """ds_{t+1}/ds_t of all steps `[T, W, n, n]`."""
    flat = (part.flatten(0, 1) for part in (rolled.states[:-1], rolled.actions, misfit.windows.noise))
    steps = step_jacobians(misfit.mdp, rolled.values.theta, (), *flat)
    return steps.state.unflatten(0, rolled.actions.shape[:2])


def jacobian_products(misfit: Misfit, rolled: Rolled) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """`v [P] -> J v [W, R q]` and `u [W, R q] -> J'u [P]` of all windows, theta by tangent and adjoint rolls."""
    unknowns, windows, channels = misfit.unknowns, misfit.windows, misfit.channels
    few = linearize(misfit, rolled, free=())
    J_few, index = few.jacobian.flatten(1, 2), local_columns(unknowns)[windows.episode, unknowns.count :]
    like = {key: unknowns.theta[key] for key in unknowns.free}
    theta, states, rows = rolled.values.theta, rolled.states, windows.rows
    path = Path(states, rolled.actions, windows.noise, few.A if few.A is not None else _transitions(misfit, rolled))
    pushed = rolled.actions.new_zeros(rolled.actions.shape)
    start_by_theta = (
        start_columns(misfit, rolled, unknowns.free, pushed)[..., : unknowns.count] if windows.warm > 1 else None
    )
    see = lambda moved, s: observe(misfit.mdp, theta | moved, s)[..., channels.observed]
    free_theta = {key: theta[key] for key in like}

    def tangent(v: Tensor) -> Tensor:
        dtheta, ds0 = unravel(v[: unknowns.count], like), torch.zeros_like(states[0])
        if start_by_theta is not None:
            ds0 = start_by_theta @ v[: unknowns.count]
        moved = tangent_roll(misfit.mdp, theta, path, dtheta, ds0)
        seen = jvp(see, (free_theta, states[rows]), (dtheta, moved[rows]))[1]
        return seen.transpose(0, 1).flatten(1) + (J_few @ v[index].unsqueeze(-1)).squeeze(-1)

    def adjoint(u: Tensor) -> Tensor:
        seen = u.view(len(u), len(rows), -1).transpose(0, 1)
        by_theta, by_state = vjp(see, free_theta, states[rows])[1](seen)
        cotangent = torch.zeros_like(states).index_copy(0, rows, by_state)
        through, by_start, _ = adjoint_roll(misfit.mdp, theta, unknowns.free, path, cotangent)
        gradient = u.new_zeros(len(unknowns.start))
        gradient[: unknowns.count] = ravel(by_theta) + ravel(through)
        if start_by_theta is not None:
            gradient[: unknowns.count] += torch.einsum("wnd,wn->d", start_by_theta, by_start)
        return gradient.index_add(0, index.flatten(), (J_few.mT @ u.unsqueeze(-1)).flatten())

    return tangent, adjoint
