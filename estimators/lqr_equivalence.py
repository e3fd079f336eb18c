"""MDP equivalence of linear-quadratic problems (see `equivalence.py`): r_hat is again quadratic.

World and model `s' = A s + B a + sum_i C_i a xi_i + w`, `w ~ (0, W)`, stage cost

    z'[[Q, N], [N', R]]z + l,    z = (s, a),   return = -sum_t gamma^t cost,   V*(s) = -(s'P s + c),

`H = [[Q, N], [N', R]] + gamma ([A B]'P [A B] + blkdiag(0, sum_i C_i'P C_i))`, `Q*(s, a) = -(z'H z + c)`. The cost

    [[Q_hat, N_hat], [N_hat', R_hat]] = H - gamma_model ([A B]'P [A B] + blkdiag(0, sum_i C_i'P C_i))_model,
    l_hat = c - gamma_model (c + tr(P W_model))

gives the model the world's Q*. With input-multiplicative noise in the world alone and equal A, B and discounts it is
the world's cost with R_hat = R + gamma sum_i C_i'P C_i. The costs may come out indefinite. Conditions:

    world value         a gain stabilises the world, the cost is bounded below, c is finite
    finite variance     C_i, W of both are finite
    stability           gamma_model times the mean-square radius of the model under the world's optimal gain is below 1
    discount            gamma_model < 1, unless c = 0 and tr(P W_model) = 0: an offset per step adds up

Under them P is the stabilising solution of the model's Riccati equation, hence optimal among the policies with
`gamma_model^t E V*(s_t) -> 0`. V* of the world is the best among such policies, too: where the cost does not see an
unstable state, letting it grow would be cheaper still.
Reference: as in `equivalence.py`; de Koning, Automatica 18 (1982) 443 (noise).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sim2real.estimators.equivalence import Condition, EquivalenceError, demand
from sim2real.solvers.riccati import UnstableError, lyapunov, mean_square_radius, riccati


@dataclass(frozen=True)
class LinearQuadratic:
    """Costs, to be minimised: A, Q `[n, n]`, B, cross N `[n, m]`, R `[m, m]`; noise C `[q, n, m]`, covariance W."""

    A: Tensor
    B: Tensor
    Q: Tensor
    R: Tensor
    discount: float
    cross: Tensor | None = None
    noise: Tensor | None = None
    covariance: Tensor | None = None
    constant: float = 0.0
    """l, cost per step"""


@dataclass(frozen=True)
class QuadraticOptimum:
    """`V*(s) = -(s'P s + c)`, `Q*(s, a) = -(z'H z + c)`, optimal action `-K s`."""

    P: Tensor
    K: Tensor
    H: Tensor
    c: float


@dataclass(frozen=True)
class QuadraticEquivalent:
    """The model with the cost that makes it equivalent, the world's optimum and the conditions."""

    model: LinearQuadratic
    optimum: QuadraticOptimum | None
    """None where the world has none"""
    conditions: tuple[Condition, ...]


@dataclass(frozen=True)
class QuadraticGap:
    """How far the model's Q* is from the world's: zero for an equivalent model."""

    q_max: float
    """largest `|Q_hat* - Q*|` over `|(s, a)| <= 1`"""
    q_weighted: float
    """root of the mean square of `Q_hat* - Q*` over (s, a) ~ N(0, M), M the second moment given"""
    gain: float
    """Frobenius norm of the difference of the optimal gains"""
    regret: float
    """extra cost in the world of the model's optimal gain, of states with the second moment given; infinite when that
    gain does not stabilise the world, or noise adds to it for ever at a discount >= 1"""


def lqr_modified_reward(world: LinearQuadratic, model: LinearQuadratic, *, strict: bool = True) -> QuadraticEquivalent:
    """The model with the cost under which its optimal action values are the world's; its own cost is not used.

    `strict=False` returns the violated conditions (and, without a world optimum, the model as it was) instead of
    raising. Raises `EquivalenceError` naming each violated condition, `ValueError` for shapes that do not fit.
    """
    _check_pair(world, model)
    conditions = [_variance_condition(world, "world"), _variance_condition(model, "model")]
    best = None
    if conditions[0].holds:
        try:
            best = quadratic_optimum(world)
            conditions.append(Condition("world value", True, "P and c are finite"))
        except (UnstableError, EquivalenceError) as problem:
            conditions.append(Condition("world value", False, str(problem)))
    if best is not None and conditions[1].holds:
        conditions += [_stability_condition(model, best.K), _discount_condition(model, best)]
    if strict:
        demand(conditions)
    if best is None or not conditions[1].holds:
        return QuadraticEquivalent(model, best, tuple(conditions))
    n = len(model.A)
    stage = best.H - model.discount * _propagated(model, best.P)
    constant = best.c - model.discount * (best.c + _kick(model, best.P))
    fitted = replace(model, Q=stage[:n, :n], cross=stage[:n, n:], R=stage[n:, n:], constant=constant)
    return QuadraticEquivalent(fitted, best, tuple(conditions))


def lqr_equivalence_gap(
    world: LinearQuadratic, model: LinearQuadratic, *, second_moment: Tensor | None = None
) -> QuadraticGap:
    """Distance of the model's optimum under its own cost and discount from the world's.

    second_moment M `[n + m, n + m]` of (s, a) weighs the means (None: the identity). Raises `UnstableError` or
    `EquivalenceError` where world or model has no finite optimum, `ValueError` for shapes that do not fit.
    """
    _check_pair(world, model)
    truth, found = quadratic_optimum(world), quadratic_optimum(model)
    moment = torch.eye(len(truth.H), dtype=truth.H.dtype) if second_moment is None else second_moment.double()
    if moment.shape != truth.H.shape:
        raise ValueError(f"second_moment must be {list(truth.H.shape)}, got {list(moment.shape)}")
    gap, offset, n = found.H - truth.H, found.c - truth.c, len(world.A)
    weighed = gap @ moment  # z'G z + c has the mean tr(G M) + c, and of Gaussian z the variance 2 tr(G M G M)
    square = 2 * float((weighed * weighed.mT).sum()) + (float(weighed.trace()) + offset) ** 2
    values = torch.linalg.eigvalsh(gap)
    extremes = (offset, offset + float(values[0]), offset + float(values[-1]))
    return QuadraticGap(
        q_max=max(abs(value) for value in extremes),
        q_weighted=math.sqrt(max(square, 0.0)),
        gain=float((found.K - truth.K).norm()),
        regret=_regret(world, truth, found.K, moment[:n, :n]),
    )


def quadratic_optimum(problem: LinearQuadratic, *, max_steps: int = 200) -> QuadraticOptimum:
    """The stabilising optimum by policy iteration (Kleinman 1968), for indefinite costs too.

    Raises `UnstableError` when no gain stabilises (A, B), or an iterate's `R + gamma (B'P B + sum C'P C)` is not
    positive definite (the cost is unbounded below), `EquivalenceError` when c is infinite.
    """
    A, B = problem.A.double(), problem.B.double()
    n, m, gamma = *B.shape, problem.discount
    eye = torch.eye(n + m, dtype=A.dtype, device=A.device)
    noise = _noise(problem)
    K = riccati(A, B, eye[:n, :n], eye[:m, :m], gamma, noise)[1]  # any gain that stabilises
    stage, last = _stage(problem), math.inf
    for _ in range(max_steps):
        shape = torch.cat([eye[:n, :n], -K])
        P = lyapunov(A - B @ K, shape.mT @ stage @ shape, gamma, noise @ K)
        P = 0.5 * (P + P.mT)
        H = stage + gamma * _propagated(problem, P)
        if int(torch.linalg.cholesky_ex(H[n:, n:]).info):
            raise UnstableError("R + gamma (B'P B + sum C'P C) is not positive definite: the cost is unbounded below")
        better = torch.linalg.inv(H[n:, n:]) @ H[n:, :n]
        change = float((better - K).abs().max()) / max(1.0, float(K.abs().max()))
        K = better
        if change <= 1e-15 or (change < 1e-9 and change >= 0.5 * last):
            break
        last = change
    if not change < 1e-9:
        raise UnstableError(
            f"policy iteration did not settle in {max_steps} steps: the gain still moves by {change:.1e}"
        )
    return QuadraticOptimum(P, K, H, _constant(problem, P))


def _constant(problem: LinearQuadratic, P: Tensor) -> float:
    """c of `c = l + gamma (c + tr(P W))`."""
    offset, gamma = problem.constant + problem.discount * _kick(problem, P), problem.discount
    if abs(offset) <= 1e-14 * (abs(problem.constant) + float(P.abs().max())):
        return 0.0
    if gamma >= 1:
        raise EquivalenceError(f"with discount {gamma} >= 1 the cost of {offset:.6g} per step adds up without end")
    return offset / (1 - gamma)


def _stage(problem: LinearQuadratic) -> Tensor:
    cross = torch.zeros_like(problem.B) if problem.cross is None else problem.cross
    top, bottom = torch.cat([problem.Q, cross], -1), torch.cat([cross.mT, problem.R], -1)
    stage = torch.cat([top, bottom]).double()
    return 0.5 * (stage + stage.mT)


def _propagated(problem: LinearQuadratic, P: Tensor) -> Tensor:
    """`[A B]'P [A B] + blkdiag(0, sum_i C_i'P C_i)`, `[n + m, n + m]`."""
    AB, n = torch.cat([problem.A, problem.B], -1).double(), len(problem.A)
    scattered, noise = AB.mT @ P @ AB, _noise(problem)
    spread = torch.zeros_like(scattered)
    spread[n:, n:] = (noise.mT @ P @ noise).sum(-3)
    return scattered + spread


def _noise(problem: LinearQuadratic) -> Tensor:
    if problem.noise is None:
        return problem.B.double().new_zeros(0, *problem.B.shape)
    return problem.noise.double().reshape(-1, *problem.B.shape)


def _kick(problem: LinearQuadratic, P: Tensor) -> float:
    return 0.0 if problem.covariance is None else float((P * problem.covariance.double()).sum())


def _regret(world: LinearQuadratic, best: QuadraticOptimum, K: Tensor, moment: Tensor) -> float:
    """Cost of the gain K over that of the optimal one: with D = K - K*, advantage s'D'S D s at every step."""
    n, gamma, noise = len(world.A), world.discount, _noise(world)
    away, closed = K - best.K, world.A.double() - world.B.double() @ K
    try:
        extra = lyapunov(closed, away.mT @ best.H[n:, n:] @ away, gamma, noise @ K)
    except UnstableError:
        return math.inf
    kick = _kick(world, extra)
    if gamma >= 1 and kick > 0:
        return math.inf
    return float((extra * moment).sum()) + (gamma * kick / (1 - gamma) if kick else 0.0)


def _variance_condition(problem: LinearQuadratic, name: str) -> Condition:
    for what, value in (("covariance", problem.covariance), ("noise", problem.noise)):
        if value is not None and not bool(torch.isfinite(value).all()):
            detail = f"the {what} of the {name} is not finite, so E_{name} V* does not exist"
            return Condition("finite variance", False, detail)
    return Condition("finite variance", True, f"the noise of the {name} has finite second moments")


def _stability_condition(model: LinearQuadratic, K: Tensor) -> Condition:
    closed = model.A.double() - model.B.double() @ K
    radius = float(mean_square_radius(closed, model.discount, _noise(model) @ K))
    detail = f"gamma_model times the mean-square radius of the model under the world's K is {radius:.6g}, needed: < 1"
    if radius >= 1:
        detail += "; gamma_model^t E_model V*(s_t) does not vanish: use a smaller model discount or another model"
    return Condition("stability", radius < 1, detail)


def _discount_condition(model: LinearQuadratic, best: QuadraticOptimum) -> Condition:
    gamma, kick = model.discount, _kick(model, best.P)
    if gamma < 1:
        return Condition("discount", True, f"the model's discount {gamma} is below 1")
    free = best.c == 0 and kick == 0
    detail = (
        f"the model's discount is {gamma} >= 1; V* has the constant {-best.c:.6g} and noise adds {-kick:.6g} a step"
    )
    return Condition("discount", free, detail + (", which is harmless" if free else ", which adds up without end"))


def _check_pair(world: LinearQuadratic, model: LinearQuadratic) -> None:
    for name, problem in (("world", world), ("model", model)):
        if problem.B.ndim != 2:
            raise ValueError(f"B of the {name} must be [n, m], got {list(problem.B.shape)}")
        n, m = problem.B.shape
        wanted = {"A": (n, n), "B": (n, m), "Q": (n, n), "R": (m, m), "cross": (n, m), "covariance": (n, n)}
        for key, shape in wanted.items():
            value = getattr(problem, key)
            if value is not None and value.shape != shape:
                raise ValueError(f"{key} of the {name} must be {list(shape)}, got {list(value.shape)}")
            if value is not None and key != "covariance" and not bool(torch.isfinite(value).all()):
                raise ValueError(f"{key} of the {name} must be finite, got {value.tolist()}")
        if problem.noise is not None and problem.noise.shape[-2:] != (n, m):
            raise ValueError(f"noise of the {name} must be [q, {n}, {m}], got {list(problem.noise.shape)}")
        if not math.isfinite(problem.constant):
            raise ValueError(f"the constant of the {name} must be finite, got {problem.constant}")
        if not 0 <= problem.discount < math.inf:
            raise ValueError(f"the discount of the {name} must be finite and >= 0, got {problem.discount}")
    if world.B.shape != model.B.shape:
        raise ValueError(f"world and model must share [n, m], got {list(world.B.shape)} and {list(model.B.shape)}")
