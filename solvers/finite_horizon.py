"""Linear-quadratic optimum over a finite horizon: time-varying, discounted, with input-multiplicative noise.

    minimise  E [ sum_{k<T} g_0 ... g_{k-1} (s_k'Q_k s_k + a_k'R_k a_k) + g_0 ... g_{T-1} s_T'P_T s_T ]
    subject to  s_{k+1} = A_k s_k + B_k a_k + sum_i C_ki a_k xi_ki + w_k,   xi of mean 0 and variance 1, w of mean 0

The optimal action is `a_k = -K_k s_k`, backwards from P_T:

    S_k = R_k + g_k B_k'P_{k+1} B_k + g_k sum_i C_ki'P_{k+1} C_ki,      K_k = g_k S_k^-1 B_k'P_{k+1} A_k,
    P_k = Q_k + K_k'R_k K_k + g_k (A_k - B_k K_k)'P_{k+1} (A_k - B_k K_k) + g_k sum_i (C_ki K_k)'P_{k+1} (C_ki K_k)

(Bertsekas, Dynamic Programming and Optimal Control I, 2017, section 3.1; with noise: Wonham, SIAM J. Control 5 (1967)
486). Made of plain operations: derivatives of every order exist. For ever, instead of T steps: `riccati`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sim2real.function_rules import forward_rule
from sim2real.solvers.riccati import as_channels, bellman, gain, input_curvature

PerStep = Tensor | Sequence[Tensor]
"""the same at every step, or one for each"""


def finite_horizon_riccati(
    A: PerStep,
    B: PerStep,
    Q: PerStep,
    R: PerStep,
    horizon: int,
    *,
    P: Tensor | None = None,
    discount: Tensor | float | Sequence[Tensor | float] = 1.0,
    noise: PerStep | None = None,
) -> tuple[Tensor, Tensor]:
    """Cost matrices `[..., T + 1, n, n]` and gains `[..., T, m, n]` of `a_k = -K_k s_k`, differentiable in all given.

    A `[..., n, n]`, B `[..., n, m]`, Q `[..., n, n]`, R `[..., m, m]` (costs, minimised; symmetric parts are used),
    discount `[...]`, noise `[..., q, n, m]` holding C_1 ... C_q: each one tensor for all steps, or a list of T. P
    `[..., n, n]`: cost of the last state, default the last Q. The optimal cost from s_0 is `s_0'P_0 s_0` plus what w
    adds, which no action changes. Leading dimensions broadcast.
    Raises `ValueError` for shapes or lists that do not fit, a negative discount, values that are not finite, and where
    `R + g B'P B + ...` is not positive definite, naming the step.
    """
    if horizon < 1:
        raise ValueError(f"horizon must be at least 1, got {horizon}")
    given = {"A": A, "B": B, "Q": Q, "R": R, "discount": discount, "noise": noise}
    steps = {key: _each(key, value, horizon) for key, value in given.items()}
    last = steps["Q"][-1] if P is None else P
    _check(steps, last)
    cost = 0.5 * (last + last.mT)
    costs, gains = [cost], []
    for k in reversed(range(horizon)):
        A_k, B_k, Q_k, R_k, g, C = (steps[key][k] for key in ("A", "B", "Q", "R", "discount", "noise"))
        Q_k, R_k = 0.5 * (Q_k + Q_k.mT), 0.5 * (R_k + R_k.mT)
        gamma = _Required.apply(partial(_negative, k), torch.as_tensor(g, dtype=A_k.dtype, device=A_k.device))
        channels = as_channels(C, B_k, "noise")
        S = _Required.apply(partial(_not_definite, k), input_curvature(B_k, R_k, gamma, channels, cost))
        K = gain(A_k, B_k, gamma, cost, S)
        cost = bellman(cost, K, A_k, B_k, Q_k, R_k, gamma, channels)
        cost = _Required.apply(partial(_not_finite, k), 0.5 * (cost + cost.mT))
        costs.append(cost)
        gains.append(K)
    costs, gains = (list(torch.broadcast_tensors(*found[::-1])) for found in (costs, gains))
    return torch.stack(costs, -3), torch.stack(gains, -3)


def _each(key: str, value: Any, horizon: int) -> list[Any]:
    if isinstance(value, Tensor | float | int) or value is None:
        return [value] * horizon
    if len(value) != horizon:
        raise ValueError(f"{key} must be one tensor or a list of {horizon}, one per step, got {len(value)}")
    return list(value)


def _check(steps: dict[str, list[Any]], last: Tensor) -> None:
    """Names the first entry of the wrong shape or sign."""
    for k, B in enumerate(steps["B"]):
        if B.ndim < 2:
            raise ValueError(f"B of step {k} must be [..., n, m], got {tuple(B.shape)}")
        n, m = B.shape[-2:]
        wanted = {"A": (n, n), "Q": (n, n), "R": (m, m)}
        for key, shape in wanted.items():
            value = steps[key][k]
            if value.shape[-2:] != shape or value.dtype != B.dtype or not value.is_floating_point():
                raise ValueError(
                    f"{key} of step {k} must be floating point [..., {shape[0]}, {shape[1]}] for B {B.dtype} "
                    f"{tuple(B.shape)}, got {value.dtype} {tuple(value.shape)}"
                )
    if last.shape[-2:] != (n, n) or last.dtype != B.dtype:
        raise ValueError(f"P must be [..., {n}, {n}] of {B.dtype}, got {last.dtype} {tuple(last.shape)}")


def _not_finite(step: int, value: Tensor) -> str | None:
    if bool(torch.isfinite(value).all()):
        return None
    return f"the matrices of step {step} or later hold values that are not finite, or overflow"


def _negative(step: int, discount: Tensor) -> str | None:
    return None if bool((discount >= 0).all()) else f"discount of step {step} must be >= 0, got {discount.tolist()}"


def _not_definite(step: int, S: Tensor) -> str | None:
    found = _not_finite(step, S)
    if found is None and bool((torch.linalg.cholesky_ex(S).info > 0).any()):
        found = (
            f"R + g B'P B + g sum C'P C of step {step} is not positive definite: no action is optimal; check that "
            "R is positive definite, and Q and P are positive semi-definite"
        )
    return found


class _Required(torch.autograd.Function):
    """complaint, x -> x, or the complaint as an error; a function, because only so can it look through `vmap`."""

    @staticmethod
    def forward(complaint: Callable[[Tensor], str | None], x: Tensor) -> Tensor:
        message = complaint(x)
        if message is not None:
            raise ValueError(message)
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, _: None, tangent: Tensor) -> Tensor:
        return tangent.clone()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], complaint: Any, x: Tensor) -> tuple[Tensor, int | None]:
        return _Required.apply(complaint, x), in_dims[1]
