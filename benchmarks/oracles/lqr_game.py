"""Exact leader return and hypergradient of the linear-quadratic game, in NumPy and independent of the library.

State and follower are jointly Gaussian, so `s_t ~ N(m_t, V_t)` by recursion and the expected reward is a Gaussian
integral. Every operation is analytic in the gain, so that the derivative is `Im J(K + ih) / h` (complex step).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

A = np.array([[0.0, 1.0], [0.0, 0.0]])
BL, BF = np.array([[0.1], [0.0]]), np.array([[0.0], [0.1]])
Q, R = np.eye(2), np.eye(1)
GAMMA_F, GAMMA_L, TEMPERATURE, HORIZON, VARIANCE = 0.95, 0.99, 0.1, 100, 1e-6
START, TARGET = np.array([1.0, 0.0]), np.array([-0.8, 0.0])
WIDTH = np.diag([0.04, 1e-4])


def riccati(closed: Array) -> Array:
    """P of the follower by the doubling algorithm, to machine precision; it carries a complex step along.

    Each pass doubles the horizon: A <- A M A, G <- G + A M G A', P <- P + A' P M A with M = (I + G P)^-1.
    """
    A_k, G, P = GAMMA_F**0.5 * closed, GAMMA_F * BF @ np.linalg.inv(R) @ BF.T, Q.astype(complex)
    for _ in range(60):
        M = np.linalg.inv(np.eye(2) + G @ P)
        change = A_k.T @ P @ M @ A_k
        A_k, G, P = A_k @ M @ A_k, G + A_k @ M @ G @ A_k.T, P + change
        real, small = np.abs(change.real).max(), np.abs(change.imag).max()
        if real <= 1e-15 * np.abs(P.real).max() and small <= 1e-15 * np.abs(P.imag).max() + 1e-60:
            return P
    raise RuntimeError("the doubling algorithm of the game did not converge in 60 passes")


def leader_return(gain: Array, *, discount: float = GAMMA_L) -> complex:
    """Return over 100 steps of the leader's gain `[2]`; discount 1 gives the undiscounted one."""
    closed = A + BL @ gain[None]
    P = riccati(closed)
    S = R + GAMMA_F * BF.T @ P @ BF
    response = GAMMA_F * np.linalg.solve(S, BF.T @ P)  # u = -response (closed s + BL epsilon)
    F = closed - BF @ response @ closed
    push = BL - BF @ response @ BL
    N = VARIANCE * push @ push.T + BF @ (TEMPERATURE / 2 * np.linalg.inv(S)) @ BF.T
    means, spreads = [START.astype(complex)], [np.zeros((2, 2), dtype=complex)]
    for _ in range(HORIZON - 1):
        means.append(F @ means[-1])
        spreads.append(F @ spreads[-1] @ F.T + N)
    both, gap = WIDTH + np.stack(spreads), np.stack(means) - TARGET
    height = np.sqrt(np.linalg.det(WIDTH) / np.linalg.det(both))
    exponent = -0.5 * np.einsum("ti,tij,tj->t", gap, np.linalg.inv(both), gap)
    return complex(discount ** np.arange(HORIZON) @ (height * np.exp(exponent)))


def exact(gain: Array) -> tuple[float, Array]:
    """(discounted return, hypergradient `[2]`)."""
    answers = [leader_return(gain + 1e-30j * unit) for unit in np.eye(2)]
    return answers[0].real, np.array([answer.imag / 1e-30 for answer in answers])
