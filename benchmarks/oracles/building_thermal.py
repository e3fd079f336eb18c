"""Exact leader return and hypergradient of building thermal control, in NumPy and independent of the library.

With `F = A - B K` the second moment of the state follows `C' = F C F' + B Sigma B' + W`, and

    J = -sum_{t < 100} 0.9^t ( <M + K'K / 2, C_t> + tr Sigma / 2 + 0.1 |alpha|^2 + 0.1 |eta|^2 ),

M the matrix of the variance over the zones. Backwards: the adjoint of the recursion, then of K(P, A), Sigma(P) and of
P(A), which is one Lyapunov solve because P is stationary in the gain.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

COUPLING = np.array([[1.0, 0.05, 0, 0.05], [0.03, 1, 0.04, 0], [0, 0.04, 1, 0.06], [0.05, 0, 0.03, 1]])
LEAK = np.array([0.04, 0.03, 0.06, 0.05])
B = np.array([[0.1, 0], [0.6, 0], [0, 0.55], [0, 0.3]])
Q, R = np.diag([8.0, 1, 5, 6]), 0.01 * np.eye(2)
GAMMA, TEMPERATURE, NOISE, START, HORIZON = 0.9, 0.1, 0.02, 5.0, 100
SPREAD = (np.eye(4) - np.full((4, 4), 0.25)) / 4
DISCOUNTS = GAMMA ** np.arange(HORIZON)


@dataclass(frozen=True)
class Follower:
    """Gain `[2, 4]`, covariance `[2, 2]`, curvature S `[2, 2]` and cost matrix P `[4, 4]` of the soft optimum."""

    gain: Array
    covariance: Array
    curvature: Array
    cost: Array


@dataclass(frozen=True)
class Answer:
    """The leader's return, its hypergradient `[8]` and its terms: variance, |u|^2, |alpha|^2, |eta|^2, discounted."""

    value: float
    gradient: Array
    terms: tuple[float, float, float, float]


def matrix(logits: Array) -> Array:
    """A `[4, 4]` of logits `[8]`: insulation, then airflow."""
    share = 1 / (1 + np.exp(-logits))
    A = np.diag(1 + LEAK * (1 - share[:4]))
    for i in range(4):
        j = (i + 1) % 4
        for a, b in ((i, j), (j, i)):
            A[a, b] += COUPLING[a, b] * share[4 + i]
            A[a, a] -= COUPLING[a, b] * share[4 + i]
    return A


def follower(A: Array) -> Follower:
    """The soft optimum, by value iteration to machine precision."""
    P = Q
    for _ in range(5000):
        S = R + GAMMA * B.T @ P @ B
        gain = GAMMA * np.linalg.solve(S, B.T @ P @ A)
        following = Q + GAMMA * A.T @ P @ (A - B @ gain)
        change = np.abs(following - P).max()
        P = 0.5 * (following + following.T)
        if change < 1e-13 * np.abs(P).max():
            S = R + GAMMA * B.T @ P @ B
            inverse = np.linalg.inv(S)
            return Follower(GAMMA * inverse @ B.T @ P @ A, TEMPERATURE / 2 * inverse, S, P)
    raise RuntimeError("the Riccati iteration did not converge in 5000 steps")


def exact(logits: Array, *, with_gradient: bool = True) -> Answer:
    """Return, hypergradient and terms at `logits [8]`; the gradient is zero without `with_gradient`."""
    A = matrix(logits)
    best = follower(A)
    K, Sigma = best.gain, best.covariance
    F, N, weight = A - B @ K, B @ Sigma @ B.T + NOISE**2 * np.eye(4), SPREAD + 0.5 * K.T @ K
    moments = [START**2 * np.eye(4)]
    for _ in range(HORIZON - 1):
        moments.append(F @ moments[-1] @ F.T + N)
    total = (DISCOUNTS[:, None, None] * np.stack(moments)).sum(0)
    share, weeks = 1 / (1 + np.exp(-logits)), float(DISCOUNTS.sum())
    variance = float((SPREAD * total).sum())
    energy = float((K.T @ K * total).sum() + weeks * np.trace(Sigma))
    insulation, airflow = (weeks * float(part @ part) for part in (share[:4], share[4:]))
    value = -variance - 0.5 * energy - 0.1 * insulation - 0.1 * airflow
    terms = (-variance, energy, insulation, airflow)
    if not with_gradient:
        return Answer(value, np.zeros(8), terms)
    gF, gN, adjoint = np.zeros((4, 4)), np.zeros((4, 4)), np.zeros((4, 4))
    for t in range(HORIZON - 1, 0, -1):  # adjoint = d J / d C_t
        adjoint = -DISCOUNTS[t] * weight + F.T @ adjoint @ F
        gN += adjoint
        gF += 2 * adjoint @ F @ moments[t - 1]
    gK = -K @ total - B.T @ gF
    gSigma = B.T @ gN @ B - 0.5 * weeks * np.eye(2)
    gA = gF + _through_riccati(A, F, best, gK, gSigma)
    slope = np.array([np.sum(gA * derivative) for derivative in _matrix_derivatives()])
    return Answer(value, (slope - 0.2 * weeks * share) * share * (1 - share), terms)


def _through_riccati(A: Array, F: Array, best: Follower, gK: Array, gSigma: Array) -> Array:
    """d J / d A through the gain and the covariance of the follower."""
    P, K, inverse = best.cost, best.gain, np.linalg.inv(best.curvature)
    gS = -TEMPERATURE / 2 * inverse @ gSigma @ inverse - inverse @ gK @ K.T
    pulled = GAMMA * B @ inverse @ gK
    gP = pulled @ A.T + GAMMA * B @ gS @ B.T
    gP = 0.5 * (gP + gP.T)
    operator = np.eye(16) - GAMMA * np.kron(F, F)
    sourced = np.linalg.solve(operator, gP.reshape(-1)).reshape(4, 4)
    answer: Array = P @ pulled + 2 * GAMMA * P @ F @ sourced
    return answer


def _matrix_derivatives() -> list[Array]:
    """d A / d share, of the four insulations and the four airflows; A is linear in the shares."""
    derivatives = [np.diag(-LEAK * (np.arange(4) == i)) for i in range(4)]
    for i in range(4):
        j, change = (i + 1) % 4, np.zeros((4, 4))
        for a, b in ((i, j), (j, i)):
            change[a, b] += COUPLING[a, b]
            change[a, a] -= COUPLING[a, b]
        derivatives.append(change)
    return derivatives
