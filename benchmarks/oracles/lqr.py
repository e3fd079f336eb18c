"""Discounted LQR by scipy, entry by entry: the reference for policy sensitivities, sharing no code with the library.

P from `scipy.linalg.solve_discrete_are` on `sqrt(g) (A, B)`, sharpened by policy iteration; each derivative from
Bellman at the fixed gain K: with M = A - B K and W the cost matrix of one step,

    dP = g M' dP M + dQ + K' dR K + dg M' P M + g (dM' P M + M' P dM),     dM = dA - dB K,
    dK = S^-1 (d(g B' P A) - dS K),     S = R + g B' P B.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import solve_discrete_are, solve_discrete_lyapunov

Matrices = dict[str, np.ndarray]


def random_system(n: int, m: int, seed: int) -> Matrices:
    """A slightly unstable random A (radius 1.05), Gaussian B, Q = I, R = 0.5 I, discount 0.95."""
    draw = np.random.default_rng(seed)
    A = draw.standard_normal((n, n))
    A *= 1.05 / np.abs(np.linalg.eigvals(A)).max()
    B = draw.standard_normal((n, m)) / np.sqrt(n)
    return {"A": A, "B": B, "Q": np.eye(n), "R": 0.5 * np.eye(m), "discount": np.array(0.95)}


def optimal_gain(s: Matrices) -> tuple[np.ndarray, np.ndarray]:
    """P and K of `a = -K s`."""
    A, B, Q, R, g = s["A"], s["B"], s["Q"], s["R"], float(s["discount"])
    P = solve_discrete_are(np.sqrt(g) * A, np.sqrt(g) * B, Q, R)
    for _ in range(3):
        K = np.linalg.solve(R + g * B.T @ P @ B, g * B.T @ P @ A)
        P = solve_discrete_lyapunov(np.sqrt(g) * (A - B @ K).T, Q + K.T @ R @ K, method="direct")
    return P, np.linalg.solve(R + g * B.T @ P @ B, g * B.T @ P @ A)


def gain_jvp(s: Matrices, tangent: Matrices, optimum: tuple[np.ndarray, np.ndarray] | None = None) -> np.ndarray:
    """dK for a change `tangent` of any of the matrices (missing ones do not change)."""
    A, B, R, g = s["A"], s["B"], s["R"], float(s["discount"])
    P, K = optimal_gain(s) if optimum is None else optimum
    zero = {key: np.zeros_like(value) for key, value in s.items()} | tangent
    dA, dB, dQ, dR, dg = (zero[key] for key in ("A", "B", "Q", "R", "discount"))
    M, dM = A - B @ K, dA - dB @ K
    dW = dQ + K.T @ dR @ K + dg * M.T @ P @ M + g * (dM.T @ P @ M + M.T @ P @ dM)
    dP = solve_discrete_lyapunov(np.sqrt(g) * M.T, dW, method="direct")
    S = R + g * B.T @ P @ B
    dS = dR + dg * B.T @ P @ B + g * (dB.T @ P @ B + B.T @ P @ dB + B.T @ dP @ B)
    dN = dg * B.T @ P @ A + g * (dB.T @ P @ A + B.T @ dP @ A + B.T @ P @ dA)
    return np.linalg.solve(S, dN - dS @ K)


def gain_jacobian(s: Matrices, keys: tuple[str, ...] = ("A", "B")) -> Matrices:
    """dK/dkey `[m, n, *shape of key]`, one Lyapunov equation per entry."""
    jacobian, optimum = {}, optimal_gain(s)
    for key in keys:
        columns = np.zeros((*s["B"].T.shape, s[key].size))
        for i in range(s[key].size):
            unit = np.zeros(s[key].size)
            unit[i] = 1.0
            columns[..., i] = gain_jvp(s, {key: unit.reshape(s[key].shape)}, optimum)
        jacobian[key] = columns.reshape(*s["B"].T.shape, *s[key].shape)
    return jacobian
