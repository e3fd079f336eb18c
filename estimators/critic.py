"""Least-squares critic on real transitions, on-policy or off-policy.

Q(s, a) = phi(s, a)^T w of the policy pi solves, on any data with enough variety,

    A w = sum_i c_i phi_i r_i,  A = sum_i c_i phi_i (phi_i - discount phi'_i)^T,  phi'_i = E_{a' ~ pi} phi(s'_i, a'),

the fixed point of fitted Q evaluation with linear features (phi' = 0 after the end of an episode). The transposed
system A^T lambda = E phi(s_0, pi) gives zeta_i = c_i lambda^T phi_i, the discounted visits of pi per transition of the
data, so that sum_i zeta_i r_i = E phi(s_0, pi)^T w = J(pi).

The weights c_i = 1 / (1 + h_i / q), with h_i the leverage phi_i^T (mean c phi phi^T)^-1 phi_i, keep rare, large states
from deciding everything: the noise of the temporal difference there grows like the features (Mallows weights; they
depend on (s, a) only, so w keeps its limit). The Bellman radius, the spectral radius of
discount (sum c phi phi^T)^-1 (sum c phi phi'^T), must be below 1 for the value of a stable policy.
Reference: M. Lagoudakis and R. Parr, Least-Squares Policy Iteration, 2003, section 5 (LSTD-Q); M. Uehara, J. Huang and
N. Jiang, Minimax Weight and Q-Function Learning for Off-Policy Evaluation, 2020 (the transposed system).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sim2real.estimators.transitions import Transitions, groups_of
from sim2real.params import Params
from sim2real.policy import Policy

Features = Callable[[Tensor, Tensor], Tensor]
"""state `[N, n]`, action `[N, m]` -> `[N, q]`, differentiable in the action"""


class CriticError(ValueError):
    """The data cannot identify the critic."""


@dataclass(frozen=True)
class CriticSystem:
    """The sums of the two linear systems per group of the data (summed over `dim=0`: all of it); q features."""

    gram: Tensor
    """`[G, q, q]` sum c phi phi^T"""
    cross: Tensor
    """`[G, q, q]` sum c phi phi'^T"""
    reward: Tensor
    """`[G, q]` sum c phi r"""
    initial: Tensor
    """`[G, q]` sum over first states of E phi(s_0, pi)"""
    initial_count: Tensor
    """`[G]`"""


@dataclass(frozen=True)
class Critic:
    """`Q(s, a) = features(s, a) @ weights`; `visits`: lambda of the transposed system."""

    weights: Tensor
    visits: Tensor
    features: Features
    value: Tensor
    """J(pi), a scalar"""
    condition: float
    """of the scaled Gram matrix"""
    bellman_radius: float


def quadratic_features(data: Transitions) -> Features:
    """All monomials of degree <= 2 in (s, a), centred and scaled by the data; q = (d+1)(d+2)/2 with d = n + m.

    Raises `CriticError` when a column of the data never changes.
    """
    both = torch.cat([data.states, data.actions], -1).double()
    center, spread = both.mean(0), both.std(0, correction=0)
    still = (spread <= 1e-12 * (1 + center.abs())).nonzero().flatten().tolist()
    if still:
        n = data.states.shape[1]
        columns = [f"state {i}" if i < n else f"action {i - n}" for i in still]
        raise CriticError(f"{', '.join(columns)} never changes in the log; excite it, or pass features without it")
    rows, columns_ = torch.triu_indices(len(center), len(center), device=both.device)

    def features(state: Tensor, action: Tensor) -> Tensor:
        z = (torch.cat([state, action], -1).double() - center) / spread
        return torch.cat([torch.ones_like(z[:, :1]), z, z[:, rows] * z[:, columns_]], -1)

    return features


def scaled_features(features: Features, data: Transitions) -> Features:
    """`features` divided by their root mean square over the data, in float64."""
    phi = features(data.states, data.actions).double()
    if phi.dim() != 2 or len(phi) != len(data.states):
        raise ValueError(f"features gave {tuple(phi.shape)} for {len(data.states)} transitions; expected [N, q]")
    scale = phi.square().mean(0).sqrt()
    if not bool((scale > 0).all() & torch.isfinite(scale).all()):
        bad = (~((scale > 0) & torch.isfinite(scale))).nonzero().flatten().tolist()
        raise CriticError(f"features {bad} are zero or not finite on the whole log; drop them")
    return lambda state, action: features(state, action).double() / scale


def act(policy: Policy, nu: Params, states: Tensor, noise: Tensor) -> Tensor:
    """`policy.act` with one noise vector `[noise_dim]` for all states, in the dtype of nu."""
    dtype = next(iter(nu.values())).dtype
    return policy.act(nu, states.to(dtype), noise.to(dtype).expand(len(states), policy.noise_dim))


def noise_nodes(policy: Policy, nu: Params, states: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes `[K, noise_dim]` and weights `[K]` for expectations over the policy's standard normal noise.

    None for a deterministic policy; 9 Gauss-Hermite nodes for one noise column that moves the action smoothly; else 64
    antithetic low-discrepancy nodes with unit covariance (equal weights: right for discrete actions, too).
    """
    like: dict[str, Any] = {"dtype": torch.float64, "device": states.device}
    if policy.noise_dim == 0:
        return torch.zeros(1, 0, **like), torch.ones(1, **like)
    if policy.noise_dim == 1:
        probe = torch.zeros(1, dtype=next(iter(nu.values())).dtype, device=states.device, requires_grad=True)
        smooth = act(policy, nu, states[:1], probe).requires_grad
        if smooth:
            off_diagonal = torch.arange(1, 9, **like).sqrt()
            nodes, vectors = torch.linalg.eigh(torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1))
            return nodes.unsqueeze(-1), vectors[0].square()  # Golub and Welsch, probabilists' Hermite
        half = torch.special.ndtri((torch.arange(32, **like) + 0.5) / 64).unsqueeze(-1)
    else:
        uniform = torch.quasirandom.SobolEngine(policy.noise_dim, scramble=True, seed=0).draw(32, dtype=torch.float64)
        half = torch.special.ndtri(uniform.clamp(1e-9, 1 - 1e-9)).to(states.device)
    nodes = torch.cat([half, -half])
    factor = torch.linalg.cholesky(nodes.T @ nodes / len(nodes))
    nodes = torch.linalg.solve_triangular(factor, nodes.T, upper=False).T
    return nodes, torch.full((len(nodes),), 1 / len(nodes), **like)


def action_nodes(
    policy: Policy, nu: Params, states: Tensor, actions: Tensor | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Actions `[N, m]` and their probabilities `[N]`, summing to 1, for expectations over the policy's action.

    `actions [A, m]`, all actions of a finite set: exact. None: the nodes of `noise_nodes`. Raises `ValueError` when
    the set is not all the policy may do.
    """
    if actions is None:
        nodes, weights = noise_nodes(policy, nu, states)
        return [
            (act(policy, nu, states, node), weight.expand(len(states)))
            for node, weight in zip(nodes, weights, strict=True)
        ]
    dtype = next(iter(nu.values())).dtype
    every = [action.to(dtype).expand(len(states), -1) for action in actions]
    shares = [policy.log_prob(nu, states.to(dtype), action).exp().double() for action in every]
    total = torch.stack(shares).sum(0)
    if not bool(((total - 1).abs() < 1e-4).all()):
        raise ValueError(
            f"actions must list every action once: their probabilities sum to {float(total.min()):.4g} to "
            f"{float(total.max()):.4g}, expected 1"
        )
    return list(zip(every, shares, strict=True))


def expected_features(
    policy: Policy, nu: Params, states: Tensor, features: Features, actions: Tensor | None = None
) -> Tensor:
    """`E_{a ~ pi} phi(s, a)`, `[N, q]`, over the nodes of `action_nodes`."""
    (action, share), *others = action_nodes(policy, nu, states, actions)
    total = share.unsqueeze(-1) * features(states, action)
    for action, share in others:
        total = total + share.unsqueeze(-1) * features(states, action)
    return total


def leverage_weights(phi: Tensor) -> Tensor:
    """c `[N]` in (0, 1] of features `[N, q]`; unchanged by any linear change of the features."""
    weights, size = torch.ones_like(phi[:, 0]), phi.shape[1]
    for _ in range(5):  # a few rounds settle it to a few per cent, which is all a weight needs
        gram = (weights.unsqueeze(-1) * phi).T @ phi / weights.sum()
        values, vectors = torch.linalg.eigh(gram)
        kept = values > 1e-11 * values[-1]
        leverage = ((phi @ vectors[:, kept]).square() / values[kept]).sum(-1)
        weights = 1 / (1 + leverage / size)
    return weights


def critic_system(
    policy: Policy,
    nu: Params,
    data: Transitions,
    initial_states: Tensor | None,
    features: Features,
    groups: int,
    *,
    actions: Tensor | None = None,
) -> tuple[CriticSystem, Tensor]:
    """The sums of both systems by groups of the data, and the weighted features `c phi [N, q]`.

    `initial_states [E, n]` None: where the episodes start. `actions` as in `action_nodes`.
    """
    group, first_group = groups_of(data, groups)
    phi = features(data.states, data.actions)
    weighted = leverage_weights(phi).unsqueeze(-1) * phi
    following = expected_features(policy, nu, data.next_states, features, actions) * ~data.ended.unsqueeze(-1)
    first = data.initial_states if initial_states is None else initial_states
    start = expected_features(policy, nu, first, features, actions)
    if initial_states is not None:
        first_group = torch.full((len(first),), -1, device=phi.device)
    common = first_group < 0  # in no group: spread evenly, so that leaving a group out keeps their mean
    count, rewards = int(group.max()) + 1, data.rewards.double()
    parts: dict[str, list[Tensor]] = {name: [] for name in ("gram", "cross", "reward", "initial", "initial_count")}
    for g in range(count):
        rows, own = group == g, first_group == g
        chosen = weighted[rows]
        parts["gram"].append(chosen.T @ phi[rows])
        parts["cross"].append(chosen.T @ following[rows])
        parts["reward"].append(chosen.T @ rewards[rows])
        parts["initial"].append(start[own].sum(0) + start[common].sum(0) / count)
        parts["initial_count"].append((own.sum() + common.sum() / count).to(phi.dtype))
    return CriticSystem(**{name: torch.stack(values) for name, values in parts.items()}), weighted


def solve_critic(system: CriticSystem, real_discount: float, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """(weights `[q]`, lambda `[q]`, J) of sums over some groups; least squares of minimum norm where singular."""
    gram, cross = system.gram.sum(0), system.cross.sum(0)
    size = gram.diagonal().mean()
    matrix = gram + ridge * size * torch.eye(len(gram), dtype=gram.dtype, device=gram.device) - real_discount * cross
    start = system.initial.sum(0) / system.initial_count.sum()
    weights = torch.linalg.lstsq(matrix, system.reward.sum(0).unsqueeze(-1), driver="gelsd").solution.squeeze(-1)
    visits = torch.linalg.lstsq(matrix.T, start.unsqueeze(-1), driver="gelsd").solution.squeeze(-1)
    return weights, visits, start @ weights


def check_identified(system: CriticSystem, real_discount: float, ridge: float) -> tuple[float, float]:
    """(condition of the scaled Gram matrix, Bellman radius). Raises `CriticError` when the data fix no critic."""
    gram, cross = system.gram.sum(0), system.cross.sum(0)
    scale = gram.diagonal().sqrt()
    unit = gram / scale / scale.unsqueeze(-1)
    values, vectors = torch.linalg.eigh(unit)
    condition = float(values[-1] / values[0].clamp(min=torch.finfo(unit.dtype).tiny))
    eye = torch.eye(len(unit), dtype=unit.dtype, device=unit.device)
    if values[0] < 1e-11 * values[-1] and ridge == 0.0:
        rank = int((values >= 1e-11 * values[-1]).sum())
        largest = vectors[:, 0].abs().topk(min(3, len(values))).indices.tolist()
        raise CriticError(
            f"the log does not identify the critic: rank {rank} of {len(values)} features, features {largest} go "
            "together. Actions that follow the state exactly cannot tell what another action is worth: add exploration "
            "noise when recording, pass fewer features (for discrete actions: columns per action), or a ridge > 0"
        )
    unit, crossed = unit + ridge * eye, cross / scale / scale.unsqueeze(-1)
    radius = float(torch.linalg.eigvals(torch.linalg.solve(unit, real_discount * crossed)).abs().max())
    singular = torch.linalg.svdvals(unit - real_discount * crossed)
    if singular[-1] < 1e-12 * singular[0]:
        raise CriticError(
            f"the Bellman equation is singular with real_discount = {real_discount}: use a discount below 1, or a log "
            "in which episodes end (terminal states)"
        )
    return condition, radius


def least_squares_critic(
    policy: Policy,
    nu: Params,
    data: Transitions,
    *,
    real_discount: float,
    features: Features | None = None,
    initial_states: Tensor | None = None,
    ridge: float = 0.0,
) -> Critic:
    """Q of `policy` at `nu` from real transitions, LSTD-Q; `features` None: all quadratic monomials.

    `ridge` is relative to the mean square of the features. Raises `CriticError` when the data cannot identify it.
    """
    phi = scaled_features(features if features is not None else quadratic_features(data), data)
    system, _ = critic_system(policy, nu, data, initial_states, phi, groups=1)
    condition, radius = check_identified(system, real_discount, ridge)
    weights, visits, value = solve_critic(system, real_discount, ridge)
    return Critic(weights, visits, phi, value, condition, radius)
