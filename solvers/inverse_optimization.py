"""Lower levels designed from demonstrations: kinks theta, nu under which the experts' actions are optimal.

The lower level is `relu_program.py`, f(u) = c'u + sum_k max(theta_k'u - nu_k, 0) + u'Q u. Of T experts, each the
program of its moment and the action u_t taken there, the fit minimises the sum of the gaps

    eps_t = f(u_t) - min_u f(u) >= 0        plus        rho sum_k |theta_k, nu_k / scale|^2.

By duality the gap is the minimum over slopes z in [0, 1] and multipliers of an expression that is convex in (theta, nu)
for fixed z (`dual_step.py`), and for fixed (theta, nu) its minimum is one QP per expert. The two halves alternate, from
several starts side by side, each step over-relaxed as far as the true gap falls; the start with the least true gap wins
and is polished along the envelope gradient (Danskin), with exact solves and a line search on the true gap,

    d eps_t / d theta_k = 1[theta_k'u_t > nu_k] u_t - z_kt u*_t,      d eps_t / d nu_k = z_kt - 1[theta_k'u_t > nu_k].

Error bound: f is strongly convex with modulus 2 (ridge + lambda_min(R)), so norm(u*_t - u_t) <= sqrt(eps_t / (ridge +
lambda_min(R))). Corollary 1 of the paper (sqrt(lambda_min(R) / l)) lacks eps and grows with the curvature; it is wrong.
Number of kinks: of experts strictly inside their inequalities the vectors P(c_t + 2 Q u_t), P the projector on ker B,
must lie in the span of P theta_k for a gap of zero, so K is at least their rank; `kink_rank` also covers the others.

Reference: Wang, Zhou and Yang, Hierarchical Decision Making with Structured Policies (2026), problem 11.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sim2real.solve_report import UnconvergedError, UnconvergedWarning
from sim2real.solvers.dual_step import Pairs, dual_step
from sim2real.solvers.qp import qp
from sim2real.solvers.relu_program import ReluCost, ReluSolution, quadratic, relu_program, suboptimality

_FEASIBLE = 1e-6  # experts may break their own constraints by this, relative: logs are rounded
_LENGTHS = (1.0, 2.0, 4.0, 8.0)


@dataclass(frozen=True)
class Experts:
    """T moments, each a program without kinks, and the action an expert took there."""

    actions: Tensor
    """u_t `[T, m]`"""
    c: Tensor
    """`[T, m]` or `[m]`"""
    B: Tensor
    """`[p, m]`"""
    b: Tensor
    """`[T, p]`: goal minus what happens without the action; the goal is the expert's own next state"""
    H: Tensor
    """`[q, m]`"""
    h: Tensor
    """`[T, q]` or `[q]`"""


@dataclass(frozen=True)
class LowerLevelFit:
    """A learned lower level and how well it explains each expert."""

    cost: ReluCost
    actions: Tensor
    """u*_t `[T, m]` of the learned lower level"""
    gap: Tensor
    """eps_t `[T]`, solved again exactly"""
    error: Tensor
    """`[T]`: distance of u*_t from u_t"""
    error_bound: Tensor
    """sqrt(eps_t / (ridge + lambda_min(R))) `[T]`"""
    plain_gap: Tensor
    """`[T]` of the lower level without kinks"""
    start_gaps: Tensor
    """`[S]`: least sum of gaps of each start"""
    converged: bool
    """the last round lowered the objective by at most `tol` of itself, or of a thousandth of the plain lower level's
    gap; a local optimum, not a proof"""


def fit_lower_level(
    experts: Experts,
    *,
    ridge: float,
    terms: int | None = None,
    curvature: Tensor | None = None,
    weight: float = 1e-4,
    starts: int = 6,
    rounds: int = 16,
    polish: int = 4,
    tol: float = 1e-2,
    seed: int = 0,
    strict: bool = False,
) -> LowerLevelFit:
    """Kinks that explain the experts; `terms` is K (default: `kink_rank`, at most 8), `weight` is rho.

    `starts` sets of slopes, the first from the principal directions of what is to be explained, the others drawn with
    `seed`, alternate for at most `rounds` rounds. An objective that still falls by more than `tol` (relative) in the
    last round warns `UnconvergedWarning`, under `strict` raises `UnconvergedError`. Raises `ValueError` for shapes that
    do not fit or an expert whose action breaks its own constraints, and what `relu_program` raises.
    """
    if min(starts, rounds) < 1 or polish < 0 or weight <= 0:
        raise ValueError(
            f"need starts, rounds >= 1, polish >= 0, weight > 0; got {starts}, {rounds}, {polish}, {weight}"
        )
    with torch.no_grad():
        experts = check_experts(experts)
        none = experts.actions.new_zeros(0, experts.actions.shape[-1])
        plain = ReluCost(none, none[:, 0], ridge, curvature)
        K = max(1, min(8, kink_rank(experts, ridge=ridge, curvature=curvature))) if terms is None else terms
        if K < 1:
            raise ValueError(f"terms must be at least 1, got {terms}")
        pairs = prepare(experts, quadratic(plain, experts.actions))
        bare = relu_program(plain, experts.c, experts.B, experts.b, experts.H, experts.h)
        plain_gap = _gaps(plain, bare, experts)
        search = _Search(experts, pairs, plain, weight, max(1e-3 * float(plain_gap.sum()), 1e-300))
        state, start_gaps, change = _alternate(search, _slopes(experts, plain, starts, K, seed), rounds)
        state, last = _polish(search, state, polish)
        change = max(change, last)  # a polish that finds nothing does not say that the alternation had come to rest
        if float(plain_gap.sum()) <= float(state.value):  # no kinks are better than these
            state, change = _evaluate(search, torch.zeros_like(state.p)), 0.0
        cost = _cost(search, state.p[0])
        found = relu_program(cost, experts.c, experts.B, experts.b, experts.H, experts.h)
        converged = bool(change <= tol)
        if not converged:
            message = (
                f"fit_lower_level: the objective still fell by {100 * change:.1f} % in the last round or polish; "
                "raise rounds, polish or tol"
            )
            if strict:
                raise UnconvergedError(message)
            warnings.warn(message, UnconvergedWarning, stacklevel=2)
        gap = _gaps(cost, found, experts)
        return LowerLevelFit(
            cost=cost,
            actions=found.u,
            gap=gap,
            error=(found.u - experts.actions).norm(dim=-1),
            error_bound=action_error_bound(cost, gap),
            plain_gap=plain_gap,
            start_gaps=start_gaps,
            converged=converged,
        )


def action_error_bound(cost: ReluCost, gap: Tensor) -> Tensor:
    """Bound on the distance of u from u*, of feasible u that cost `gap` more: sqrt(gap / (ridge + lambda_min(R)))."""
    least = cost.ridge
    if cost.curvature is not None:
        least += max(0.0, float(torch.linalg.eigvalsh(cost.curvature)[0]))
    return (gap.clamp_min(0) / least).sqrt() * (1 + 1e-12)  # rounded up: between bounds and kinks it is an equality


def kink_rank(experts: Experts, *, ridge: float, curvature: Tensor | None = None, tol: float = 0.05) -> int:
    """Rank of what kinks must explain: the directions in which f, without kinks, falls from the experts' actions.

    Of each expert the projection d_t of -(c_t + 2 Q u_t) on {B d = 0, H_active d <= 0}; singular values of (d_t) above
    `tol` times the largest count. Of strictly inner experts it is -P(c_t + 2 Q u_t), whose rank K must reach for a gap
    of zero; of the others bounds explain a part, and the number is a guide.
    """
    experts = check_experts(experts)
    none = experts.actions.new_zeros(0, experts.actions.shape[-1])
    plain = ReluCost(none, none[:, 0], ridge, curvature)
    values = torch.linalg.svdvals(_falls(experts, plain))
    gradient = experts.c + 2 * experts.actions @ quadratic(plain, experts.actions)
    floor = _FEASIBLE * float(gradient.norm())  # experts that need no kinks leave the rounding of their log
    return int((values > max(tol * float(values[0]), floor)).sum())


def _falls(experts: Experts, plain: ReluCost) -> Tensor:
    """d_t `[T, m]`: steepest feasible descent of f without kinks at the experts' actions."""
    u = experts.actions
    gradient = experts.c + 2 * u @ quadratic(plain, u)
    slack = experts.h - u @ experts.H.mT
    free = torch.where(slack <= 1e-6 * (1 + u.abs().amax()), 0.0, math.inf)
    eye = torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
    return qp(eye, gradient, experts.B, torch.zeros_like(experts.b), experts.H, free, tol=1e-8).x


def prepare(experts: Experts, Q: Tensor) -> Pairs:
    """What `dual_step` asks of T experts."""
    u, (p, m) = experts.actions, experts.B.shape
    _, values, V = torch.linalg.svd(experts.B) if p else (None, u.new_zeros(0), torch.eye(m).to(u))
    rank = int((values > 1e-10 * values[:1].clamp_min(1e-300)).sum())
    if rank == m:
        raise ValueError(f"B has rank {rank}: the goal fixes all {m} actions, and a lower level has nothing to learn")
    N = V[rank:].mT
    M = torch.linalg.cholesky(torch.linalg.inv(N.mT @ Q @ N)).mT @ N.mT
    scale = u.square().sum(-1).mean().sqrt().clamp_min(1e-6)
    force, L = (experts.c + 2 * u @ Q) @ M.mT, M @ experts.H.mT
    slack = (experts.h - u @ experts.H.mT).clamp_min(0)
    if not slack.shape[-1]:  # one row that binds nothing
        slack, L = slack.new_ones(len(u), 1), L.new_zeros(len(L), 1)
    # At the optimum norm(r_t)^2 <= sum_t norm(force_t)^2, four times the value at p = lambda = 0, and lambda_q > 0 only
    # where slack_q = -r'L_q / 2: no row of more slack than this has a multiplier, however much more it has.
    enough = (force.norm() * L.norm(dim=0).amax()).clamp_min(1.0)
    features = torch.cat([u, -scale.expand(len(u), 1)], -1)
    return Pairs(features, force, torch.minimum(slack, enough), M, L)


@dataclass(frozen=True)
class _Search:
    experts: Experts
    pairs: Pairs
    plain: ReluCost
    weight: float
    nothing: float
    """an objective that counts as zero"""


class _State(NamedTuple):
    """S candidates: parameters `[S, K, m + 1]`, objective `[S]`, gaps `[S, T]`, slopes and actions that solve them."""

    p: Tensor
    value: Tensor
    gap: Tensor
    slopes: Tensor
    u: Tensor


def _cost(search: _Search, p: Tensor) -> ReluCost:
    scale = -search.pairs.features[0, -1]
    return ReluCost(p[..., :-1], p[..., -1] * scale, search.plain.ridge, search.plain.curvature)


def _evaluate(search: _Search, p: Tensor) -> _State:
    """Candidates `[S, K, m + 1]`, their lower levels solved exactly for every expert."""
    e = search.experts
    cost = _cost(search, p.unsqueeze(1))
    found = relu_program(cost, e.c, e.B, e.b, e.H, e.h, tol=1e-7)
    gap = _gaps(cost, found, e)
    value = gap.sum(-1) + search.weight * p.square().sum((-2, -1))
    return _State(p, value, gap, found.slopes.clamp(0, 1), found.u)


def _take(state: _State, index: Tensor) -> _State:
    return _State(*(field[index] for field in state))


def _gaps(cost: ReluCost, found: ReluSolution, experts: Experts) -> Tensor:
    return suboptimality(cost, found, experts.H, experts.h, experts.actions)


def _slopes(experts: Experts, plain: ReluCost, starts: int, K: int, seed: int) -> Tensor:
    """First slopes z `[S, T, K]`: an expert is above a kink or not.

    The first start takes the sides of the principal descent directions; the others, drawn, put each kink across one
    coordinate of the actions, those that vary more often. In every second start one kink is always on.
    """
    falls, u = _falls(experts, plain), experts.actions
    left, values, _ = torch.linalg.svd(falls, full_matrices=False)
    sides = torch.stack([s * left[:, i] * values[i] for i in range(left.shape[-1]) for s in (1, -1)], -1) > 0
    rng = torch.Generator().manual_seed(seed)
    spread = u.std(0, unbiased=False).cpu() + 1e-9
    axis = torch.multinomial(spread, starts * K, replacement=True, generator=rng).to(u.device)
    place = torch.randint(len(u), (starts * K,), generator=rng).to(u.device)
    sign = 1.0 - 2.0 * torch.randint(2, (starts * K,), generator=rng).to(u)
    z = (sign * (u[:, axis] - u[place, axis]) > 0).to(u).reshape(len(u), starts, K).transpose(0, 1).clone()
    count = min(K, sides.shape[-1])
    z[0, :, :count] = sides[:, :count].to(u)
    z[::2, :, -1] = 1.0
    return z


def _alternate(search: _Search, z: Tensor, rounds: int) -> tuple[_State, Tensor, float]:
    """The best candidate by the true objective, least gaps `[S]` of all starts, and the last relative fall.

    Every second round the worse half of the starts is given up; the last two are over-relaxed.
    """
    state = _evaluate(search, dual_step(search.pairs, z, weight=search.weight))
    least, alive, change = state.gap.sum(-1), torch.arange(len(z), device=z.device), math.inf
    for count in range(1, rounds):
        if count % 2 == 0 and len(alive) > 1:
            keep = state.value.argsort()[: (len(alive) + 1) // 2]
            alive, state = alive[keep], _take(state, keep)
        before = float(state.value.min())
        target = dual_step(search.pairs, state.slopes, weight=search.weight)
        lengths = (1.0,) if len(alive) > 2 else _LENGTHS
        tried = _evaluate(search, torch.cat([state.p + length * (target - state.p) for length in lengths]))
        state = _best(state, tried)
        least = least.index_put((alive,), torch.minimum(least[alive], state.gap.sum(-1)))
        change = (before - float(state.value.min())) / max(before, search.nothing)
        if (change < 1e-3 and len(alive) <= 2) or float(state.value.min()) < 1e-12 * search.nothing:
            break
    return _take(state, state.value.argmin().unsqueeze(0)), least, change


def _best(state: _State, tried: _State) -> _State:
    """Of each of S candidates the best of itself and what was tried, `[N S]` in N blocks of S."""
    S = len(state.value)
    both = _State(*(torch.cat(fields) for fields in zip(state, tried, strict=True)))
    return _take(both, both.value.reshape(-1, S).argmin(0) * S + torch.arange(S, device=both.value.device))


def _polish(search: _Search, state: _State, steps: int) -> tuple[_State, float]:
    """Envelope gradient steps on the true objective, eight lengths at once, only downhill; and its last fall."""
    features = search.pairs.features
    change = 0.0
    lengths = 0.1 * 4.0 ** -torch.arange(8, dtype=features.dtype, device=features.device)
    for _ in range(steps):
        p = state.p[0]
        on = (features @ p.mT > 0).to(p)
        optimal = torch.cat([state.u[0], features[:, -1:]], -1)
        gradient = on.mT @ features - state.slopes[0].mT @ optimal + 2 * search.weight * p
        size = gradient.norm()
        if float(size) == 0:
            break
        tried = _best(state, _evaluate(search, p - p.norm() / size * lengths[:, None, None] * gradient))
        change = float((state.value - tried.value) / state.value.clamp_min(search.nothing))
        state = tried
        if change < 1e-3:
            break
    return state, change


def check_experts(experts: Experts) -> Experts:
    """In float64, c and h with a row per expert, shapes and feasibility of the experts checked."""
    u = experts.actions
    if u.ndim != 2 or len(u) == 0:
        raise ValueError(f"actions must be [T, m] with T >= 1, got {tuple(u.shape)}")
    T, m = u.shape
    p, q = experts.B.shape[0], experts.H.shape[0]
    full = {"actions": (T, m), "c": (T, m), "B": (p, m), "b": (T, p), "H": (q, m), "h": (T, q)}
    filled = {}
    for name, shape in full.items():
        value = getattr(experts, name).to(u.device, torch.float64)
        if value.shape not in (torch.Size(shape), *((torch.Size(shape[1:]),) if name in "ch" else ())):
            raise ValueError(f"{name} must be {shape} for {T} experts with {m} actions, got {tuple(value.shape)}")
        if not bool(torch.isfinite(value).all() if name != "h" else ~value.isnan().any()):
            raise ValueError(f"{name} must be finite")
        filled[name] = value.expand(shape)
    known = Experts(**filled)
    allowed = _FEASIBLE * (1 + known.actions.abs().amax())
    for name, over in (
        ("B u = b", (known.actions @ known.B.mT - known.b).abs()),
        ("H u <= h", known.actions @ known.H.mT - known.h),
    ):
        worst = over.amax(-1) if over.shape[-1] else over.new_zeros(T)
        if bool((worst > allowed).any()):
            row = int(worst.argmax())
            raise ValueError(
                f"expert {row} breaks {name} by {float(worst[row]):.1e}: an action that the lower level cannot take "
                "cannot be explained; check b, h and the units, or project the action"
            )
    return known
