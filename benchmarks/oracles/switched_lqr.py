"""Optimum of the switched linear-quadratic regulator by dynamic programming over Riccati matrices, in NumPy.

    V_k(x) = min_{P in S_k} x'P x,   S_T-1 = {I},   S_k = {Riccati step of P under mode d: P in S_k+1, all d},

    Riccati step:  I + A'P A - A'P B_d (price I + B_d'P B_d)^-1 B_d'P A.

A matrix that lies above another one never attains the minimum and is left out, as is one that equals another to 1e-4.
Reference: D. Gorges, M. Izak and S. Liu, Optimal control and scheduling of switched systems, IEEE TAC 56 (2011) 135.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def optimal_set(A: Array, B: Array, *, horizon: int = 20, price: float = 0.1) -> list[Array]:
    """The matrices of the first step, of A `[n, n]` and the diagonals B `[modes, n]`."""
    eye = np.eye(len(A))
    found = [eye]
    for _ in range(horizon - 1):
        grown = []
        for P in found:
            for b in B:
                weighed = A.T @ (P * b)
                inner = price * eye + b[:, None] * P * b
                grown.append(eye + A.T @ P @ A - weighed @ np.linalg.solve(inner, weighed.T))
        found = _undominated(grown)
    return found


def optimal_cost(matrices: list[Array], states: Array) -> Array:
    """Total cost `[N]` from initial states `[N, n]`."""
    return np.min([np.einsum("bi,ij,bj->b", states, P, states) for P in matrices], axis=0)


def _undominated(matrices: list[Array]) -> list[Array]:
    kept: list[Array] = []
    for P in sorted(matrices, key=np.trace):
        if not any(np.abs(P - Q).max() < 1e-4 or np.linalg.eigvalsh(P - Q)[0] >= -1e-9 for Q in kept):
            kept.append(P)
    return kept
