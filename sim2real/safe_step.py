"""One step of a constrained search: inside a ball, a box and linearised constraints, by projection or by multipliers.

`safe_step` solves the subproblem of sequential quadratic programming exactly,

    max_d  g'd - d'B d / 2    subject to    m + S d >= 0,   low <= d <= high,   |d| <= radius,

with m `[C]` the margins (>= 0: satisfied) and S `[C, d]` their gradients. The ball enters as a shift of B found by
bisection; each strictly convex program with linear inequalities is a least distance program, solved by non-negative
least squares, which ends after finitely many steps. Where no step in the ball meets the constraints, a first step
within 0.8 radius reduces `|(m + S d)_-|` (rows scaled to unit length) as far as possible, and what it leaves open is
conceded. Multipliers mu are the return per unit of limit: `g - B d + S'mu = 0` off the box and the ball.

`lagrangian_step` is one iteration of the augmented Lagrangian instead: a step for
`g'd - d'B d / 2 - sum_i (mu_i - rho (m_i + S_i d))_+^2 / (2 rho)`, then `mu <- (mu - rho (m + S d))_+`.

Reference: J. Nocedal and S. Wright, Numerical Optimization, 2nd ed., 2006, (17.36) (augmented Lagrangian) and (18.50)
(trust-region SQP with a relaxation step); C. Lawson and R. Hanson, Solving Least Squares Problems, 1974, chapter 23.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import brentq, nnls
from torch import Tensor

from sim2real.trust_region import trust_region_step


@dataclass(frozen=True)
class SafeStep:
    """`step [d]`, `multipliers [C]` >= 0, predicted `margins [C]` after it, and whether it had to concede any."""

    step: Tensor
    multipliers: Tensor
    margins: Tensor
    conceded: bool


def safe_step(
    gradient: Tensor, curvature: Tensor, radius: float, low: Tensor, high: Tensor, margins: Tensor, slopes: Tensor
) -> SafeStep:
    """The maximiser of the module docstring; gradient `[d]`, B `[d, d]`, `low <= 0 <= high`, slopes S `[C, d]`.

    For fast convergence let B follow the Lagrangian `F + mu'm` (gradients `g + S'mu` at both ends of a step). Negative
    eigenvalues of B count as 0; computed in float64, returned in the dtype of the gradient. Raises `ValueError` for
    shapes that do not fit, data that are not finite, a radius that is negative or not finite, bounds that exclude 0.
    """
    _check(gradient, curvature, radius, low, high, margins, slopes)
    dtype = gradient.dtype
    gradient, curvature, low, high, margins, slopes = (
        x.double() for x in (gradient, curvature, low, high, margins, slopes)
    )
    values, vectors = torch.linalg.eigh(0.5 * (curvature + curvature.T))
    B = vectors @ torch.diag(values.clamp(min=0.0)) @ vectors.T
    if radius == 0.0:
        still = torch.zeros_like(gradient, dtype=dtype)
        return SafeStep(still, torch.zeros_like(margins, dtype=dtype), margins.to(dtype), bool((margins < 0).any()))
    # in units of the radius, and every constraint in units of what a step of that length changes
    size = radius * slopes.norm(dim=-1)
    size = torch.where(size > 0, size, torch.ones_like(size))
    S, m = radius * slopes / size.unsqueeze(-1), margins / size
    box, bound = _box_rows(low / radius, high / radius)
    rows, needed, conceded = torch.cat([S, box]), torch.cat([-m, bound]), False
    shortest = _least_distance(rows, needed)
    if shortest is None or float(shortest[0].norm()) > 1 - 1e-9:
        toward = _restoring(S, m, box, bound)
        left = (m + S @ toward).clamp(max=0.0)
        needed, conceded = torch.cat([left - m, bound]), bool((left < -1e-9).any())
    else:
        toward = shortest[0]
    step, duals = _in_ball(radius * gradient, radius**2 * B, rows, needed)
    if bool((rows @ step < needed - 1e-7).any()):  # a set so thin that its whitening loses it: no room for the return
        step, duals = toward, torch.zeros_like(duals)
    step = (radius * step).clamp(low, high)
    return SafeStep(step.to(dtype), (duals[: len(m)] / size).to(dtype), (margins + slopes @ step).to(dtype), conceded)


def lagrangian_step(
    gradient: Tensor,
    curvature: Tensor,
    radius: float,
    low: Tensor,
    high: Tensor,
    margins: Tensor,
    slopes: Tensor,
    *,
    multipliers: Tensor,
    penalty: float,
) -> SafeStep:
    """One step of the augmented Lagrangian with the multipliers `[C]` so far and penalty rho > 0 (return / margin^2).

    Cheaper than `safe_step` with many parameters, and it only approaches the constraints, from outside as a rule; the
    multipliers returned go into the next call. Raises `ValueError` as `safe_step`, and for a penalty <= 0.
    """
    _check(gradient, curvature, radius, low, high, margins, slopes)
    if not 0 < penalty < float("inf") or multipliers.shape != margins.shape or not bool((multipliers >= 0).all()):
        raise ValueError(f"need a penalty > 0 and multipliers [C] >= 0, got {penalty} and {multipliers}")
    step, best, seen = torch.zeros_like(gradient), -float("inf"), torch.zeros_like(gradient)
    for _ in range(20):  # the penalty is quadratic piece by piece: take the pieces the step ends in
        active = (multipliers - penalty * (margins + slopes @ seen) > 0).to(slopes)
        pushed = active * (multipliers - penalty * margins)
        total = curvature + penalty * slopes.T @ (active.unsqueeze(-1) * slopes)
        trial = trust_region_step(gradient + slopes.T @ pushed, total, radius, low, high)
        left = (multipliers - penalty * (margins + slopes @ trial)).clamp(min=0.0)
        value = float(gradient @ trial - 0.5 * trial @ (curvature @ trial) - left.square().sum() / (2 * penalty))
        if value > best:
            step, best = trial, value
        if torch.equal(trial, seen):
            break
        seen = trial
    after = margins + slopes @ step
    return SafeStep(step, (multipliers - penalty * after).clamp(min=0.0), after, bool((after < 0).any()))


def penalized_return(value: float, margins: Tensor, penalty: float) -> float:
    """`value - penalty sum_i (-m_i)_+`: exact once the penalty exceeds every multiplier. Judges a step taken."""
    return value - penalty * float(margins.clamp(max=0.0).neg().sum())


def _box_rows(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Rows G and right sides h of `G d >= h` for the finite bounds that a step of length 1 can reach."""
    eye = torch.eye(len(low), dtype=low.dtype, device=low.device)
    lower, upper = low > -1.0, high < 1.0
    return torch.cat([eye[lower], -eye[upper]]), torch.cat([low[lower], -high[upper]])


def _least_distance(rows: Tensor, needed: Tensor) -> tuple[Tensor, Tensor] | None:
    """The shortest y with `rows y >= needed`, and its multipliers; None where there is none (of reasonable length).

    In units of the farthest single constraint, with u >= 0 minimising `|E u - f|`, E = [rows'; needed'],
    f = (0, ..., 0, 1) and r = E u - f, it is `y = -r_1..n / r_n+1`.
    """
    length = rows.norm(dim=-1)
    if bool(((length == 0) & (needed > 0)).any()):
        return None
    length = torch.where(length > 0, length, torch.ones_like(length))
    away = needed / length
    if not bool((away > 0).any()):
        return rows.new_zeros(rows.shape[1]), torch.zeros_like(needed)
    unit = float(away.max())
    matrix = torch.cat([(rows / length.unsqueeze(-1)).T, (away / unit).unsqueeze(0)])
    target = torch.zeros(len(matrix), dtype=torch.float64)
    target[-1] = 1.0
    weights = torch.from_numpy(nnls(matrix.double().cpu().numpy(), target.numpy(), maxiter=50 * (len(rows) + 10))[0])
    weights = weights.to(rows)
    rest = matrix @ weights
    depth = 1.0 - float(rest[-1])
    if depth <= 1e-12:
        return None
    return unit * rest[:-1] / depth, unit * weights / depth / length


def _restoring(S: Tensor, m: Tensor, box: Tensor, bound: Tensor) -> Tensor:
    """The step within 0.8 and the box that leaves the least violation: slacks t with `m + S d + t >= 0`."""
    count, size = S.shape
    eye = torch.eye(count, dtype=S.dtype, device=S.device)
    rows = torch.cat(
        [
            torch.cat([S, eye], -1),
            torch.cat([0 * eye @ S, eye], -1),
            torch.cat([box, box.new_zeros(len(box), count)], -1),
        ]
    )
    needed = torch.cat([-m, torch.zeros_like(m), bound])
    free = torch.cat([torch.zeros(size), torch.ones(count)]).to(S)
    return _in_ball(torch.zeros_like(free), torch.diag(free), rows, needed, inside=1 - free, limit=0.8)[0][:size]


def _in_ball(
    gradient: Tensor, B: Tensor, rows: Tensor, needed: Tensor, *, inside: Tensor | None = None, limit: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Maximiser of `g'd - d'B d / 2` with `rows d >= needed`, `|d| <= limit` (of the entries `inside`), and duals."""
    which = torch.ones_like(gradient) if inside is None else inside
    scale = max(float(B.diagonal().max()), float(gradient.norm()), 1e-300)
    singular = float(torch.linalg.eigvalsh(B)[0]) <= 1e-9 * scale
    floor = 1e-6 * scale if singular else 0.0

    def at(shift: float, toward: Tensor) -> tuple[Tensor, Tensor, float]:
        root = torch.linalg.cholesky(B + shift * torch.diag(which))
        white = torch.linalg.solve_triangular(root, rows.T, upper=False).T  # rows in y = root'd - root^-1 g
        best = torch.linalg.solve_triangular(root, toward.unsqueeze(-1), upper=False).squeeze(-1)
        found = _least_distance(white, needed - white @ best)
        if found is None:
            return torch.zeros_like(gradient), torch.zeros_like(needed), float("inf")
        y, duals = found
        step = torch.linalg.solve_triangular(root.T, (y + best).unsqueeze(-1), upper=True).squeeze(-1)
        return step, duals, float((which * step).norm())

    found = at(floor, gradient)
    for _ in range(20 if singular else 0):  # proximal points: the shift leaves no trace where the ball does not bind
        following = at(floor, gradient + floor * which * found[0])
        if not following[2] <= limit:
            break
        settled = float((following[0] - found[0]).norm()) <= 1e-13
        found = following
        if settled:
            break
    if found[2] <= limit:
        return found[:2]
    above = scale
    while at(above, gradient)[2] > limit and above < 1e12 * scale:
        above *= 8.0
    excess = lambda shift: 1 / limit - 1 / max(at(shift, gradient)[2], 1e-300)  # nearly linear in the shift
    if excess(above) > 0:  # the constraints alone take the whole ball, to rounding
        return at(above, gradient)[:2]
    return at(float(brentq(excess, floor, above, xtol=1e-15 * scale, rtol=1e-14)), gradient)[:2]


def _check(
    gradient: Tensor, curvature: Tensor, radius: float, low: Tensor, high: Tensor, margins: Tensor, slopes: Tensor
) -> None:
    size = len(gradient)
    fits = curvature.shape == (size, size) and slopes.shape == (len(margins), size)
    if not fits or low.shape != (size,) or high.shape != (size,):
        raise ValueError(
            f"gradient [{size}] needs curvature [{size}, {size}], bounds [{size}] and slopes [{len(margins)}, {size}], "
            f"got {list(curvature.shape)}, {list(low.shape)}, {list(high.shape)} and {list(slopes.shape)}"
        )
    if not 0 <= radius < float("inf"):
        raise ValueError(f"radius must be finite and >= 0, got {radius}")
    for name, value in (("gradient", gradient), ("curvature", curvature), ("margins", margins), ("slopes", slopes)):
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} must be finite, got {value.tolist()}")
    if not bool(((low <= 0) & (high >= 0)).all()):
        raise ValueError("the bounds exclude the present point; project it into the box first")
