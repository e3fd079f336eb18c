"""Closed-form inversion of linear-quadratic lower levels.

A lower level is an affine law `a_t = G_t x_t + H_t u + h_t` towards the unseen goal u, and the model is affine too,
`x_{t+1} = A_t x_t + B_t a_t + c_t`. Two laws, with OPPOSITE sign of the gain on u, kept apart:

    goal tracking   a = K u + k,  K = D^-1 B'V,  k = D^-1 (M m - B'V (A x + c)),  D = M + B'V B:
                    the minimiser of (a - m)'M (a - m) + (x' - u)'V (x' - u)                 (paper, appendix A.3)
    feedback        a = K_t (x - u),  K_t = -(R + B'P_{t+1} B)^-1 B'P_{t+1} A,  P_T = Q         (paper, appendix B.1)

Composed over t = 0 .. T-1, with F_t = A_t + B_t G_t:

    Phi <- F_t Phi - B_t H_t,   phi <- F_t phi + B_t h_t + c_t,     Phi = 0, phi = s at first,
    x_T = phi - Phi u,       u = -(L'Phi)^+ L'(x_T - phi),      W = L L' the inverse of the noise covariance.

Corrections to the paper: the residual of equation 22 is `s' - (A s + c + B (K u + k))`; the pseudo-inverse of equations
23 and 26 needs the weight L' unless the noise is isotropic or `B K` has full row rank; the affine term c, dropped
after equation 24, belongs into phi; appendix B.1.1 has T factors, not T + 1. Where Phi is rank deficient, u is
the member of least norm of the inputs that explain the row: the next state is exact, the input only its projection.
Reference: Schmidt et al., Offline hierarchical reinforcement learning via inverse optimization, 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sim2real.solvers.finite_horizon import PerStep, finite_horizon_riccati
from sim2real.solvers.inversion_problem import Inversion, precision_root


@dataclass(frozen=True)
class AffineLaw:
    """`a_t = state_gain_t x_t + goal_gain_t u + offset_t`, one entry per step."""

    state_gain: tuple[Tensor, ...]
    """each `[..., m, n]`"""
    goal_gain: tuple[Tensor, ...]
    """each `[..., m, p]`"""
    offset: tuple[Tensor, ...]
    """each `[..., m]`"""


def feedback_law(A: PerStep, B: PerStep, Q: PerStep, R: PerStep, horizon: int) -> AffineLaw:
    """`a = K_t (x - u)` with the finite-horizon gains of `finite_horizon_riccati`, cost Q on the last state too."""
    _, gains = finite_horizon_riccati(A, B, Q, R, horizon)
    K = gains.unbind(-3)
    return AffineLaw(tuple(-k for k in K), K, tuple(torch.zeros_like(k[..., 0]) for k in K))


def goal_tracking_law(
    A: PerStep,
    B: PerStep,
    c: PerStep,
    V: Tensor,
    M: Tensor,
    horizon: int = 1,
    *,
    action: Tensor | None = None,
) -> AffineLaw:
    """At each step the minimiser of `(a - action)'M (a - action) + (x' - u)'V (x' - u)`; action m `[..., m]`, or 0.

    A `[..., n, n]`, B `[..., n, m]`, c `[..., n]`: one tensor for all steps, or a list of `horizon`.
    """
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for A_t, B_t, c_t in zip(*(_each(x, horizon) for x in (A, B, c)), strict=True):
        pull = B_t.mT @ V
        inverse = torch.linalg.inv(M + pull @ B_t)
        wanted = -_apply(pull, c_t) if action is None else _apply(M, action) - _apply(pull, c_t)
        found.append((-inverse @ pull @ A_t, inverse @ pull, _apply(inverse, wanted)))
    state_gain, goal_gain, offset = zip(*found, strict=True)
    return AffineLaw(state_gain, goal_gain, offset)


def compose(law: AffineLaw, A: PerStep, B: PerStep, c: PerStep, state: Tensor) -> tuple[Tensor, Tensor]:
    """Phi `[..., n, p]` and phi `[..., n]` of `x_T = phi - Phi u` from state `[..., n]`."""
    horizon = len(law.state_gain)
    Phi, phi = torch.zeros(1, dtype=state.dtype, device=state.device), state
    steps = zip(*(_each(x, horizon) for x in (A, B, c)), law.state_gain, law.goal_gain, law.offset, strict=True)
    for t, (A_t, B_t, c_t, G, H, h) in enumerate(steps):
        closed = A_t + B_t @ G
        Phi = -B_t @ H if t == 0 else closed @ Phi - B_t @ H
        phi = _apply(closed, phi) + _apply(B_t, h) + c_t
    return Phi, phi


def invert_law(
    law: AffineLaw,
    A: PerStep,
    B: PerStep,
    c: PerStep,
    state: Tensor,
    reached: Tensor,
    *,
    precision: Tensor | None = None,
    rtol: float = 1e-10,
) -> Inversion:
    """The goal u `[N, p]` under which the law leads from state `[N, n]` to `reached [N, n]`.

    precision: inverse covariance of the noise on `reached`, `[n]`, `[n, n]` or `[N, n, n]`; default isotropic.
    Singular values below `rtol` of the largest count as zero. Differentiable in all tensors while the rank stays.
    """
    Phi, phi = compose(law, A, B, c, state)
    return invert_linear(-Phi, reached - phi, precision=precision, rtol=rtol)


def invert_feedback(
    A: PerStep,
    B: PerStep,
    c: PerStep,
    state: Tensor,
    reached: Tensor,
    Q: PerStep,
    R: PerStep,
    horizon: int,
    *,
    precision: Tensor | None = None,
) -> Inversion:
    """The goal of `a = K_t (x - u)` over `horizon` steps; `c` is the affine term of the dynamics, 0 if linear."""
    return invert_law(feedback_law(A, B, Q, R, horizon), A, B, c, state, reached, precision=precision)


def invert_goal_tracking(
    A: PerStep,
    B: PerStep,
    c: PerStep,
    state: Tensor,
    reached: Tensor,
    V: Tensor,
    M: Tensor,
    horizon: int = 1,
    *,
    action: Tensor | None = None,
    precision: Tensor | None = None,
) -> Inversion:
    """The goal of `goal_tracking_law`, held over `horizon` steps."""
    law = goal_tracking_law(A, B, c, V, M, horizon, action=action)
    return invert_law(law, A, B, c, state, reached, precision=precision)


def invert_linear(
    matrix: Tensor, difference: Tensor, *, precision: Tensor | None = None, rtol: float = 1e-10
) -> Inversion:
    """The u of least norm that minimises `(d - X u)'W (d - X u)`: `(L'X)^+ L'd`; X `[..., q, p]`, d `[N, q]`."""
    root = precision_root(precision, difference, "precision")
    matrix = matrix.expand(len(difference), *matrix.shape[-2:])
    weighted = matrix if root is None else root @ matrix
    target = difference if root is None else _apply(root, difference)
    u = _apply(torch.linalg.pinv(weighted, rtol=rtol), target)
    values = torch.linalg.svdvals(weighted.detach())
    rank = (values > rtol * values[:, :1]).sum(-1)
    residual = (target - _apply(weighted, u)).norm(dim=-1).detach()
    done = torch.ones_like(rank, dtype=torch.bool)
    return Inversion(u, residual, done, rank, rank == 0, torch.zeros_like(rank))


def _each(value: PerStep, horizon: int) -> Sequence[Tensor]:
    if isinstance(value, Tensor):
        return [value] * horizon
    if len(value) != horizon:
        raise ValueError(f"one tensor or a list of {horizon}, one per step, is needed; got {len(value)}")
    return value


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)
