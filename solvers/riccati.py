"""Discounted linear-quadratic optimum with input-multiplicative noise, and its Lyapunov equation, to machine precision.

World `s' = A s + B a + sum_i C_i a xi_i + w`, `xi_i` independent with mean 0 and variance 1, cost
`s'Q s + a'R a` discounted by g, policy `a = -K s`. The optimal cost is `s'P s + const` with

    S = R + g B'P B + g sum_i C_i'P C_i,      K = g S^-1 B'P A,
    P = Q + K'R K + g (A - B K)'P (A - B K) + g sum_i (C_i K)'P (C_i K)

(De Koning, Automatica 18 (1982) 443). Value iteration from a large P until K is stable in mean square, then policy
iteration (Kleinman, IEEE TAC 13 (1968) 114; Hewer 1971), which converges quadratically.

Derivatives are implicit. By the envelope theorem K is held fixed in the last line, so dP solves the Lyapunov equation
`dP = g (A - B K)'dP (A - B K) + g sum_i (C_i K)'dP (C_i K) + dW`, and the adjoint the transposed one. Both are plain
differentiable expressions again, hence derivatives of any order. Leading dimensions of all arguments are a batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sim2real.function_rules import forward_rule, primals


class UnstableError(ValueError):
    """A linear system is not stable, or cannot be stabilised, in (discounted) mean square."""


def riccati(
    A: Tensor, B: Tensor, Q: Tensor, R: Tensor, discount: Tensor | float = 1.0, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Optimal cost matrix P `[..., n, n]` and gain K `[..., m, n]` (`a = -K s`), differentiable in every tensor given.

    A `[..., n, n]`, B `[..., n, m]`, Q `[..., n, n]`, R `[..., m, m]` (symmetric parts are used), discount `[...]`,
    noise `[..., q, n, m]` holding C_1 ... C_q, or `[n, m]` for one. Costs are minimised here: the return is `-cost`.
    Raises `ValueError` for shapes that do not fit, a negative discount or data that are not finite, and `UnstableError`
    when no gain was found that makes `sqrt(g) s` stable in mean square, when R + ... is not positive definite, or P
    does not satisfy its equation.
    """
    gamma = _discount(discount, A)
    noise = as_channels(noise, B, "noise")
    _check_shapes(A, B, Q, R, gamma)
    Q, R = 0.5 * (Q + Q.mT), 0.5 * (R + R.mT)
    P = _Riccati.apply(A, B, Q, R, gamma, noise)
    return P, _gain(A, B, R, gamma, noise, P)


def lyapunov(A: Tensor, W: Tensor, discount: Tensor | float = 1.0, noise: Tensor | None = None) -> Tensor:
    """X `[..., n, n]` of `X = g (A'X A + sum_i N_i'X N_i) + W`, differentiable in every tensor given.

    A and W `[..., n, n]`, discount g `[...]`, noise `[..., q, n, n]` holding N_1 ... N_q, or `[n, n]` for one. The cost
    matrix of a fixed policy has `A = A - B K`, `N_i = C_i K`, `W = Q + K'R K`; transpose A and N_i for a covariance.
    Raises `ValueError` for shapes that do not fit, a negative discount or data that are not finite, `UnstableError`
    when the mean-square radius is 1 or more.
    """
    if A.shape[-1] != A.shape[-2] or W.shape[-2:] != A.shape[-2:]:
        raise ValueError(f"A and W must be [..., n, n], got {tuple(A.shape)} and {tuple(W.shape)}")
    root = _discount(discount, A).sqrt()[..., None, None]
    noise = as_channels(noise, A, "noise") * root[..., None, :, :]
    return _Lyapunov.apply(root * A, W, noise)


def mean_square_radius(A: Tensor, discount: Tensor | float = 1.0, noise: Tensor | None = None) -> Tensor:
    """Spectral radius of `X -> g (A X A' + sum_i N_i X N_i')`, shape `[...]`; discounted costs are finite below 1."""
    channels = torch.cat([A.unsqueeze(-3), as_channels(noise, A, "noise").expand(*A.shape[:-2], -1, -1, -1)], dim=-3)
    gamma = torch.as_tensor(discount, dtype=A.dtype, device=A.device)
    if channels.shape[-3] == 1:  # eigenvalues of A (x) A are the products of those of A
        return gamma * torch.linalg.eigvals(A).abs().amax(-1) ** 2
    return gamma * torch.linalg.eigvals(_kron_sum(channels)).abs().amax(-1)


def _kron_sum(channels: Tensor) -> Tensor:
    """`sum_i N_i (x) N_i` of `[..., q, n, n]`: `[..., n^2, n^2]`, acting on row-major vec(X) as `N X N'`."""
    n = channels.shape[-1]
    return torch.einsum("...qij,...qkl->...ikjl", channels, channels).reshape(*channels.shape[:-3], n * n, n * n)


def _discount(discount: Tensor | float, like: Tensor) -> Tensor:
    if not isinstance(discount, Tensor) and not discount >= 0:
        raise ValueError(f"discount must be >= 0, got {discount}")
    return torch.as_tensor(discount, dtype=like.dtype, device=like.device)


def as_channels(noise: Tensor | None, like: Tensor, name: str) -> Tensor:
    """Noise channels `[..., q, n, m]` of inputs `like [..., n, m]`; none is q = 0."""
    if noise is None:
        return like.new_zeros(0, *like.shape[-2:])
    if noise.ndim < 2 or noise.shape[-2:] != like.shape[-2:]:
        raise ValueError(f"{name} must be [..., q, {like.shape[-2]}, {like.shape[-1]}], got {tuple(noise.shape)}")
    return noise.unsqueeze(0) if noise.ndim == 2 else noise


def _check_shapes(A: Tensor, B: Tensor, Q: Tensor, R: Tensor, gamma: Tensor) -> None:
    n, m = B.shape[-2:]
    wanted = {"A": (A, (n, n)), "Q": (Q, (n, n)), "R": (R, (m, m))}
    for name, (value, shape) in wanted.items():
        if value.shape[-2:] != shape:
            raise ValueError(
                f"{name} must be [..., {shape[0]}, {shape[1]}] for B {tuple(B.shape)}, got {tuple(value.shape)}"
            )
    for name, value in {"A": A, "B": B, "Q": Q, "R": R, "discount": gamma}.items():
        if not value.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {value.dtype}")


def input_curvature(B: Tensor, R: Tensor, gamma: Tensor, noise: Tensor, P: Tensor) -> Tensor:
    """`S = R + g B'P B + g sum_i C_i'P C_i`."""
    g = gamma[..., None, None]
    return R + g * (B.mT @ P @ B) + g * (noise.mT @ P.unsqueeze(-3) @ noise).sum(-3)


def gain(A: Tensor, B: Tensor, gamma: Tensor, P: Tensor, S: Tensor) -> Tensor:
    """`K = g S^-1 B'P A`."""
    # not torch.linalg.solve or lu_solve: their derivatives are wrong in nested forward mode (pytorch/pytorch issue
    # 192540) and under vmap of a Jacobian
    return torch.linalg.inv(S) @ (gamma[..., None, None] * (B.mT @ P @ A))


def _gain(A: Tensor, B: Tensor, R: Tensor, gamma: Tensor, noise: Tensor, P: Tensor) -> Tensor:
    return gain(A, B, gamma, P, input_curvature(B, R, gamma, noise, P))


def bellman(P: Tensor, K: Tensor, A: Tensor, B: Tensor, Q: Tensor, R: Tensor, gamma: Tensor, noise: Tensor) -> Tensor:
    """Cost matrix one step before P under the gain K."""
    g, closed = gamma[..., None, None], A - B @ K
    channels = noise @ K.unsqueeze(-3)
    scattered = (channels.mT @ P.unsqueeze(-3) @ channels).sum(-3)
    return Q + K.mT @ R @ K + g * (closed.mT @ P @ closed + scattered)


class _Riccati(torch.autograd.Function):
    """A, B, Q, R, gamma, noise -> P."""

    @staticmethod
    def forward(A: Tensor, B: Tensor, Q: Tensor, R: Tensor, gamma: Tensor, noise: Tensor) -> Tensor:
        return _solve_riccati(A, B, Q, R, gamma, noise)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)
        ctx.save_for_forward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        *inputs, P = ctx.saved_tensors
        A, B, _, _, gamma, noise = inputs
        K, closed, channels = _closed_loop(inputs, P)
        # adjoint of X -> closed'X closed + ...: the covariance equation
        Y = _Lyapunov.apply(closed.mT, 0.5 * (grad + grad.mT), channels.mT)
        g, M = gamma[..., None, None], A - B @ K
        pulled_M, pulled_R = 2 * g * (P @ M @ Y), K @ Y @ K.mT
        pulled_gamma = (Y * _lyapunov_map(M, noise @ K.unsqueeze(-3), P)).sum((-2, -1))
        pulled_noise = 2 * g.unsqueeze(-3) * (P.unsqueeze(-3) @ noise @ pulled_R.unsqueeze(-3))
        pulled = (pulled_M, -pulled_M @ K.mT, Y, pulled_R, pulled_gamma, pulled_noise)
        return tuple(_sum_to(value, x) for value, x in zip(pulled, inputs, strict=True))

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        *inputs, P = primals(ctx)
        A, B, _, _, gamma, noise = inputs
        dA, dB, dQ, dR, dgamma, dnoise = _filled(tangents, tuple(inputs))
        K, closed, channels = _closed_loop(inputs, P)
        g, M, dM, N = gamma[..., None, None], A - B @ K, dA - dB @ K, noise @ K.unsqueeze(-3)
        moved = _lyapunov_change(M, N, P, dM, dnoise @ K.unsqueeze(-3))
        dW = dQ + K.mT @ dR @ K + dgamma[..., None, None] * _lyapunov_map(M, N, P) + g * moved
        return _Lyapunov.apply(closed, dW, channels)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[Tensor, int]:
        return _Riccati.apply(*_leading(info.batch_size, in_dims, inputs, (2, 2, 2, 2, 0, 3))), 0


class _Lyapunov(torch.autograd.Function):
    """A, W, N -> X of `X = A'X A + sum_i N_i'X N_i + W`."""

    @staticmethod
    def forward(A: Tensor, W: Tensor, noise: Tensor) -> Tensor:
        return _solve_lyapunov(A, W, noise)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)
        ctx.save_for_forward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        A, W, noise, X = ctx.saved_tensors
        Y = _Lyapunov.apply(A.mT, grad, noise.mT)
        pulled_A = X @ A @ Y.mT + X.mT @ A @ Y
        X, Z = X.unsqueeze(-3), Y.unsqueeze(-3)
        pulled_noise = X @ noise @ Z.mT + X.mT @ noise @ Z
        return _sum_to(pulled_A, A), _sum_to(Y, W), _sum_to(pulled_noise, noise)

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        *inputs, X = primals(ctx)
        dA, dW, dnoise = _filled(tangents, tuple(inputs))
        change = dW + _lyapunov_change(inputs[0], inputs[2], X, dA, dnoise)
        return _Lyapunov.apply(inputs[0], change, inputs[2])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[Tensor, int]:
        return _Lyapunov.apply(*_leading(info.batch_size, in_dims, inputs, (2, 2, 3))), 0


def _filled(tangents: tuple[Tensor | None, ...], like: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.zeros_like(x) if t is None else t for x, t in zip(like, tangents, strict=True))


def _closed_loop(inputs: list[Tensor], P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """K, and sqrt(g) times the closed loop and its noise channels."""
    A, B, _, R, gamma, noise = inputs
    K, root = _gain(A, B, R, gamma, noise, P), gamma.sqrt()[..., None, None]
    return K, root * (A - B @ K), root[..., None, :, :] * (noise @ K.unsqueeze(-3))


def _lyapunov_map(A: Tensor, noise: Tensor, X: Tensor) -> Tensor:
    return A.mT @ X @ A + (noise.mT @ X.unsqueeze(-3) @ noise).sum(-3)


def _lyapunov_change(A: Tensor, noise: Tensor, X: Tensor, dA: Tensor, dnoise: Tensor) -> Tensor:
    """Change of `_lyapunov_map` with A and noise."""
    Z = X.unsqueeze(-3)
    scattered = dnoise.mT @ Z @ noise + noise.mT @ Z @ dnoise
    return dA.mT @ X @ A + A.mT @ X @ dA + scattered.sum(-3)


def _sum_to(value: Tensor, like: Tensor) -> Tensor:
    """Transpose of the broadcast of `like` to the shape of `value`."""
    value = value.sum(tuple(range(value.ndim - like.ndim))) if value.ndim > like.ndim else value
    spread = tuple(d for d in range(like.ndim) if like.shape[d] == 1 and value.shape[d] != 1)
    return value.sum(spread, keepdim=True) if spread else value


def _leading(
    size: int, in_dims: tuple[int | None, ...], inputs: tuple[Tensor, ...], core: tuple[int, ...]
) -> list[Tensor]:
    """Every input with the vmapped dimension first and room for the broadcast of the others behind it."""
    moved = [x.expand(size, *x.shape) if d is None else x.movedim(d, 0) for x, d in zip(inputs, in_dims, strict=True)]
    width = max(x.ndim - c for x, c in zip(moved, core, strict=True))
    return [x.reshape(size, *(1,) * (width - (x.ndim - c)), *x.shape[1:]) for x, c in zip(moved, core, strict=True)]


def _check_finite(**values: Tensor) -> None:
    for name, value in values.items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} holds values that are not finite")


def _solve_lyapunov(A: Tensor, W: Tensor, noise: Tensor) -> Tensor:
    _check_finite(A=A, W=W, noise=noise)
    if noise.shape[-3] > 0:
        return _solve_lyapunov_densely(A, W, noise)
    _require_stable(mean_square_radius(A))
    X, power = W, A
    for _ in range(64):  # Smith's squared iteration: the first 2^k terms of sum_k (A')^k W A^k
        increment = power.mT @ X @ power
        X, power = X + increment, power @ power
        if bool((increment.abs().amax((-2, -1)) <= 1e-17 * X.abs().amax((-2, -1))).all()):
            break
    return W + _lyapunov_map(A, noise, X)


def _solve_lyapunov_densely(A: Tensor, W: Tensor, noise: Tensor) -> Tensor:
    """By the n^2 x n^2 system, with one step of refinement; a second right-hand side I tells stability."""
    n, lead = A.shape[-1], torch.broadcast_shapes(A.shape[:-2], noise.shape[:-3])
    channels = torch.cat([A.unsqueeze(-3).expand(*lead, 1, n, n), noise.expand(*lead, *noise.shape[-3:])], -3)
    eye = torch.eye(n, dtype=A.dtype, device=A.device)
    system = torch.eye(n * n, dtype=A.dtype, device=A.device) - _kron_sum(channels.mT)
    factors, pivots, failures = torch.linalg.lu_factor_ex(system)

    def solve(rhs: Tensor) -> Tensor:
        rows = rhs.expand(*torch.broadcast_shapes(rhs.shape[:-2], lead), n, n)
        return torch.linalg.lu_solve(factors, pivots, rows.reshape(*rows.shape[:-2], n * n, 1)).reshape(rows.shape)

    # the operator maps positive matrices to such, so X = L(X) + I has a positive solution only at a radius below 1
    witness = solve(eye)
    if bool((failures > 0).any()) or not bool((torch.linalg.eigvalsh(0.5 * (witness + witness.mT)) > 0).all()):
        _require_stable(mean_square_radius(A, noise=noise))
    X = solve(W)
    return X + solve(W + _lyapunov_map(A, noise, X) - X)


def _require_stable(radius: Tensor) -> None:
    if not bool((radius < 1).all()):
        raise UnstableError(
            f"the discounted mean-square radius is {float(radius.max()):.6g}, must be below 1: the cost is infinite; "
            "use a stabilising gain or a smaller discount"
        )


def _solve_riccati(A: Tensor, B: Tensor, Q: Tensor, R: Tensor, gamma: Tensor, noise: Tensor) -> Tensor:
    inputs = [A, B, Q, R, gamma, noise]
    _check_finite(A=A, B=B, Q=Q, R=R, discount=gamma, noise=noise)
    if bool((gamma < 0).any()):
        raise ValueError(f"discount must be >= 0, got {gamma.tolist()}")
    size = Q.abs().amax((-2, -1), keepdim=True) + R.abs().amax((-2, -1), keepdim=True)
    P = Q + size * torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    P = _stabilise(inputs, P)
    last = float("inf")
    for _ in range(60):
        K, closed, channels = _closed_loop(inputs, P)
        following = _solve_lyapunov(closed, Q + K.mT @ R @ K, channels)
        following = 0.5 * (following + following.mT)
        change = _relative(following - P, following)
        P = following
        if change <= 1e-15 or (change < 1e-9 and change >= 0.5 * last):
            break
        last = change
    S = input_curvature(B, R, gamma, noise, P)
    residual = float(riccati_residual(A, B, Q, R, gamma, noise, P).max())
    if not residual <= 1e-10 or bool((torch.linalg.cholesky_ex(S).info > 0).any()):
        raise UnstableError(
            f"the Riccati equation is not solved: relative residual {residual:.1e} (allowed 1e-10), or "
            "R + g B'P B + g sum C'P C is not positive definite; check that Q is positive semi-definite and R definite"
        )
    return P


def _stabilise(inputs: list[Tensor], P: Tensor) -> Tensor:
    """Value iteration until the gain of P is stable in mean square."""
    A, B, Q, R, gamma, noise = inputs
    radius = P.new_tensor(float("inf"))
    for step in range(2000):
        K, closed, channels = _closed_loop(inputs, P)
        if step % 20 == 0:
            if not bool(torch.isfinite(P).all()):
                break
            radius = mean_square_radius(closed, noise=channels)
            if bool((radius < 1).all()):
                return P
        P = bellman(P, K, A, B, Q, R, gamma, noise)
    raise UnstableError(
        "no gain found that stabilises (A, B) with this noise at the given discount: the discounted mean-square "
        f"radius stays at {float(radius.max()):.6g} (must be below 1)"
    )


def _relative(difference: Tensor, scale: Tensor) -> float:
    return float((difference.abs().amax((-2, -1)) / scale.abs().amax((-2, -1)).clamp_min(1e-300)).max())


def riccati_residual(
    A: Tensor, B: Tensor, Q: Tensor, R: Tensor, discount: Tensor | float, noise: Tensor | None, P: Tensor
) -> Tensor:
    """Largest entry of `P - Bellman(P)` relative to the largest of P, shape `[...]`."""
    gamma = torch.as_tensor(discount, dtype=A.dtype, device=A.device)
    channels = as_channels(noise, B, "noise")
    improved = bellman(P, _gain(A, B, R, gamma, channels, P), A, B, Q, R, gamma, channels)
    return (P - improved).abs().amax((-2, -1)) / P.abs().amax((-2, -1)).clamp_min(torch.finfo(P.dtype).tiny)
