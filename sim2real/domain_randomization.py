"""Domain randomisation from the fitted posterior, as an objective that is differentiated through.

    J_random(theta, nu) = sum_i w_i J(theta + L z_i, nu),      z_i [d] fixed draws,  L L' the posterior covariance,

over the entries of theta that are named, raveled in that order; theta is the posterior's mean. Parameters outside the
box are moved to its nearest point, where that draw has no derivative in the clipped entry (`clipped_share` says how
many). With `tail` < 1 only the worst draws count: the conditional value at risk, weights 1 / (tail N) on the lowest
returns (a fraction on the last). It has kinks where draws change places, and a tail of few draws is soon overfitted:
take N so that tail N is well above the number of policy parameters. `policy_optimum`, `policy_sensitivity` and `tune`
take the objective as it is, and

    theta     gets dnu*/d mean,
    "factor"  where theta holds that key in place of a fixed `factor`, gets dnu*/dL as well.

Reference: J. Tobin et al., Domain Randomization for Transferring Deep Neural Networks from Simulation to the Real
World, IROS 2017; A. Rajeswaran et al., EPOpt, ICLR 2017 (the tail); R. Rockafellar and S. Uryasev, Optimization of
Conditional Value-at-Risk, Journal of Risk 2 (2000) 21.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Literal

import torch
from torch import Tensor
from torch.func import vmap

from sim2real.bounds import Box, project
from sim2real.params import Params, ravel, unravel

Objective = Callable[[Params, Params], Tensor]
"""theta, nu -> in-sim return, a scalar"""


def standard_draws(count: int, size: int, generator: torch.Generator | None = None, *, matched: bool = True) -> Tensor:
    """z `[count, size]`, standard normal; `matched`: antithetic pairs with mean 0 and covariance I exactly.

    Raises `ValueError` unless, when matched, count is even and at least 2 (size + 1).
    """
    device = generator.device if generator is not None else torch.device("cpu")
    draw = partial(torch.randn, generator=generator, dtype=torch.float64, device=device)
    if not matched:
        return draw(count, size)
    if count % 2 or count < 2 * (size + 1):
        raise ValueError(f"matched draws of {size} numbers must be even and at least {2 * (size + 1)}, got {count}")
    half = draw(count // 2, size)
    factor = torch.linalg.cholesky(2 * half.T @ half / count)
    half = torch.linalg.solve_triangular(factor, half.T, upper=False).T
    return torch.cat([half, -half])


def posterior_factor(covariance: Tensor) -> Tensor:
    """L `[d, d]` with `L L' = covariance`, which may be singular; lower triangular where it is not.

    Raises `ValueError` when it is not square and finite, or has an eigenvalue below -1e-9 of the largest.
    """
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1] or not bool(torch.isfinite(covariance).all()):
        raise ValueError(f"covariance must be a finite square matrix, got {covariance.tolist()}")
    symmetric = 0.5 * (covariance + covariance.T).double()
    factor, failed = torch.linalg.cholesky_ex(symmetric)
    if not int(failed):
        return factor
    values, vectors = torch.linalg.eigh(symmetric)
    if float(values[0]) < -1e-9 * float(values[-1].abs()):
        raise ValueError(f"covariance must be positive semi-definite, its lowest eigenvalue is {float(values[0]):.3g}")
    return vectors * values.clamp(min=0.0).sqrt()


def posterior_covariance(rows: Sequence[str], covariance: Tensor, theta: Params, names: Sequence[str]) -> Tensor:
    """`[d, d]` of the parameters `names`, from a fit's `covariance [P, P]` over its `rows` ("mass", "A[0,1]", ...).

    `rows = [row.name for row in result.rows]` of a `FitResult`. Raises `ValueError` for names that theta does not have,
    and when an entry was not fitted or its variance is not finite (the data do not fix it): give it a prior, or do not
    draw it.
    """
    if unknown := sorted(set(names) - theta.keys()):
        raise ValueError(f"theta has no {unknown}; it has {sorted(theta)}")
    wanted = [
        f"{key}[{','.join(map(str, index))}]" if theta[key].ndim else key
        for key in names
        for index in product(*map(range, theta[key].shape))
    ]
    missing = [name for name in wanted if name not in rows]
    if missing:
        raise ValueError(f"the fit has no {missing}; it has {list(rows)}")
    at = torch.tensor([rows.index(name) for name in wanted])
    block = covariance[at][:, at]
    open_ended = [name for name, value in zip(wanted, block.diagonal(), strict=True) if not bool(value.isfinite())]
    if open_ended:
        raise ValueError(f"the data do not fix {open_ended}: give a prior, or leave them out of the draws")
    return block


def posterior_draws(
    theta: Params, names: Sequence[str], factor: Tensor, draws: Tensor, *, box: Box | None = None
) -> Params:
    """theta at every draw `[N, d]`: values `[N, ...]`, in the box; names that are not drawn are repeated.

    Differentiable in theta and factor `[d, d]`. Raises `ValueError` for unknown names or sizes that do not fit.
    """
    unknown = sorted(set(names) - theta.keys())
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(f"names must list parameters of theta {sorted(theta)} once each, got {list(names)}")
    drawn = {key: theta[key] for key in names}
    mean = ravel(drawn)
    size = len(mean)
    if draws.ndim != 2 or draws.shape[1] != size or factor.shape != (size, size):
        raise ValueError(
            f"{list(names)} hold {size} numbers, so draws must be [N, {size}] and factor [{size}, {size}], "
            f"got {list(draws.shape)} and {list(factor.shape)}"
        )
    points = unravel(mean + draws.to(mean) @ factor.to(mean).T, drawn)
    points = points if box is None else project(box, points)
    return {key: points.get(key, value.expand(len(draws), *value.shape)) for key, value in theta.items()}


def clipped_share(theta: Params, names: Sequence[str], factor: Tensor, draws: Tensor, box: Box) -> float:
    """Share of the drawn numbers that lie outside the box and are moved onto it. Raises as `posterior_draws`."""
    free = posterior_draws(theta, names, factor, draws)
    moved = project(box, free)
    return float(torch.cat([(free[key] != moved[key]).double().reshape(-1) for key in names]).mean())


def randomized_objective(
    J: Objective,
    names: Sequence[str],
    draws: Tensor,
    *,
    factor: Tensor | None = None,
    box: Box | None = None,
    tail: float = 1.0,
    batch: Literal["loop", "vmap"] = "loop",
) -> Objective:
    """J_random of the module docstring over the fixed `draws [N, d]` of the parameters `names`.

    factor `[d, d]` None: theta["factor"], which J does not get to see. `tail` in (0, 1]: share of worst draws. "vmap"
    evaluates all draws as one batch where J allows it (no Python branch on values), "loop" one by one.
    Raises `ValueError` for options outside their range, and at the call for names or sizes that do not fit.
    """
    if not 0 < tail <= 1 or batch not in ("loop", "vmap"):
        raise ValueError(f"need tail in (0, 1] and batch 'loop' or 'vmap', got {tail} and {batch!r}")
    if not len(draws):
        raise ValueError(f"draws must be [N, d] with N >= 1, got {list(draws.shape)}")
    weights = _tail_weights(len(draws), tail)

    def objective(theta: Params, nu: Params) -> Tensor:
        if factor is None and "factor" not in theta:
            raise ValueError("pass factor, or put it into theta under the key 'factor'")
        spread = theta["factor"] if factor is None else factor
        inner = theta if factor is not None else {key: value for key, value in theta.items() if key != "factor"}
        points = posterior_draws(inner, names, spread, draws, box=box)
        if batch == "vmap":
            returns = vmap(lambda point: J(point, nu))(points)
        else:
            returns = torch.stack([J({k: v[i] for k, v in points.items()}, nu) for i in range(len(draws))])
        share = weights.to(returns)
        return (returns if tail == 1.0 else returns.sort().values) @ share

    return objective


def _tail_weights(count: int, tail: float) -> Tensor:
    """`[count]` for returns in rising order: 1 / (tail count) on the worst, a fraction on the last of them."""
    mass = tail * count
    full = min(math.floor(mass + 1e-12), count)
    weights = torch.zeros(count, dtype=torch.float64)
    weights[:full] = 1 / mass
    if full < count:
        weights[full] = (mass - full) / mass
    return weights / weights.sum()
