"""Least-squares critics of a leader: one Bellman operator, any number of right-hand sides.

A critic `phi w` of features phi `[N, q]` over N transitions solves

    A w = sum_i c_i phi_i x_i,      A = sum_i c_i phi_i (phi_i - gamma phi'_i)^T,      phi' = 0 after the end,

for a source x: the leader's reward gives Q_L or V_L, the source of the follower's gradient gives grad Q_F. The operator
does not know which, so that all of them share one decomposition when their discounts agree. A functional b of the
critic is worth `y_i = c_i phi_i^T A^-T b` per unit of x_i: with many columns of x (all of theta) only y is needed.

Weights c. The noise of a temporal difference grows with the state; a rare large state then decides the fit. c_i should
be the inverse variance of the noise; any function of (s, a) leaves the limit of w unchanged.
Reference: M. Lagoudakis and R. Parr, Least-Squares Policy Iteration, 2003, section 5 (LSTD-Q).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sim2real.estimators.critic import CriticError, act, noise_nodes
from sim2real.estimators.transitions import Transitions
from sim2real.params import Params
from sim2real.policy import Policy

StateFeatures = Callable[[Tensor], Tensor]
"""s `[N, n]` -> `[N, q]`, differentiable in s where sources are pathwise"""


@dataclass(frozen=True)
class Operator:
    """The Bellman operator of weighted rows, decomposed; `resolvent [F, q, q]`: A^-1 without the rows of each fold."""

    weighted: Tensor
    """c phi `[N, q]`"""
    resolvent: Tensor
    fold: Tensor
    """`[N]`: the fold of each row; a row is never used for the fit that is read there"""

    def kept(self, fold: int) -> Tensor:
        """`[N]` bool: the rows that the fit for `fold` uses."""
        every = len(self.resolvent) == 1
        return torch.ones_like(self.fold, dtype=torch.bool) if every else self.fold != fold


def bellman_operator(
    phi: Tensor, following: Tensor, weights: Tensor, discount: float, fold: Tensor, *, ridge: float = 0.0
) -> Operator:
    """Rows `phi [N, q]`, `following [N, q]` (0 after the end), `weights [N]`, `fold [N]` in 0..F-1.

    `ridge` is relative to the diagonal of the Gram matrix. Raises `CriticError` when the fit is not finite.
    """
    weighted = weights.unsqueeze(-1) * phi
    temporal = phi - discount * following
    size = phi.square().mean(0).sqrt()
    scale = torch.where(size > 0, size, torch.ones_like(size))  # features in units of their own size
    scale = scale.unsqueeze(-1) * scale
    count = int(fold.max()) + 1
    resolvents = []
    for f in range(count):
        rows = fold != f if count > 1 else slice(None)
        matrix = weighted[rows].T @ temporal[rows]
        if ridge:
            matrix = matrix + ridge * torch.diag((weighted[rows] * phi[rows]).sum(0))
        if not bool(torch.isfinite(matrix).all()):
            raise CriticError("the features or weights of the critic are not finite on the data")
        resolvents.append(torch.linalg.pinv(matrix / scale, rtol=1e-14) / scale)
    return Operator(weighted, torch.stack(resolvents), fold)


def solve(operator: Operator, source: Tensor) -> Tensor:
    """Weights `[F, q]` of the critic of `source [N]`, one fit per fold."""
    sums = torch.stack([(source * operator.kept(f)) @ operator.weighted for f in range(len(operator.resolvent))])
    return (operator.resolvent @ sums.unsqueeze(-1)).squeeze(-1)


def worth(operator: Operator, functional: Tensor) -> Tensor:
    """y `[N]` with `sum_f functional[f] . w_f = sum_i y_i x_i`, for `functional [F, q]` of the fits w."""
    pulled = (operator.resolvent.mT @ functional.unsqueeze(-1)).squeeze(-1)
    total = operator.weighted.new_zeros(len(operator.weighted))
    for f, column in enumerate(pulled):
        total = total + (operator.weighted @ column) * operator.kept(f)
    return total


def read(weights: Tensor, phi: Tensor, fold: Tensor) -> Tensor:
    """Values `[..., N]` of `phi [..., N, q]`, each row by the fit `weights [F, q]` that has not used it."""
    if len(weights) == 1:
        return phi @ weights[0]
    return (phi * weights[fold]).sum(-1)


def folds_of(data: Transitions, folds: int) -> Tensor:
    """Fold `[N]` of each transition, whole episodes together. `ValueError` for fewer than `folds` episodes."""
    episodes = len(data.initial_states)
    if folds < 1 or folds > episodes:
        raise ValueError(f"folds must be 1 to {episodes}, the number of episodes, got {folds}")
    return data.episode % folds


def inverse_noise_weights(states: Tensor, *, floor: float = 0.01, power: float = 1.0) -> Tensor:
    """`(floor + |s|^2)^-power` `[N]`, for states whose noise in the value grows like `|s|` (a regulator's).

    `floor` in squared units of the state: about the square of its size at rest.
    """
    if not floor > 0:
        raise ValueError(f"floor must be positive (squared units of the state), got {floor}")
    return (floor + states.square().sum(-1)) ** -power


def quadratic_state_features(states: Tensor) -> Tensor:
    """1, s_i and s_i s_j (i <= j), `[N, (n+1)(n+2)/2]`."""
    x = states.T.contiguous()  # [n, N]: rows are contiguous, which is what makes the products fast
    return torch.cat([torch.ones_like(x[:1]), x, *(x[i] * x[i:] for i in range(len(x)))]).T


def quadratic_action_features(states: Tensor, actions: Tensor) -> Tensor:
    """1, z_i and z_i z_j (i <= j) of z = (s, a)."""
    return quadratic_state_features(torch.cat([states, actions], -1))


def leader_nodes(policy: Policy, nu: Params, states: Tensor, actions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Actions `[K, N, m]` and probabilities `[K, N]` over which the policy's action is summed out.

    `actions [K, m]`: all of a finite set. None: where two or three noise columns move the action smoothly, the 3-point
    Gauss-Hermite grid, exact to degree 5, so that it is exact for the covariance of two quadratics; else `noise_nodes`.
    """
    if actions is not None:
        every = actions.to(states.dtype).unsqueeze(1).expand(-1, len(states), -1)
        shares = torch.stack([policy.log_prob(nu, states, action).exp() for action in every])
        return every, shares
    nodes, weights = _grid(policy, nu, states)
    every = torch.stack([act(policy, nu, states, node) for node in nodes])
    return every, weights.unsqueeze(-1).expand(-1, len(states))


def _grid(policy: Policy, nu: Params, states: Tensor) -> tuple[Tensor, Tensor]:
    if not 2 <= policy.noise_dim <= 3:  # `noise_nodes` has 9 Gauss-Hermite points for one column
        return noise_nodes(policy, nu, states)
    probe = states.new_zeros(policy.noise_dim, requires_grad=True)
    with torch.enable_grad():
        smooth = act(policy, nu, states[:1], probe).requires_grad
    if not smooth:
        return noise_nodes(policy, nu, states)
    points = list(itertools.product([(-(3.0**0.5), 1 / 6), (0.0, 2 / 3), (3.0**0.5, 1 / 6)], repeat=policy.noise_dim))
    nodes = states.new_tensor([[place for place, _ in point] for point in points])
    shares = states.new_tensor([[share for _, share in point] for point in points]).prod(-1)
    return nodes, shares
