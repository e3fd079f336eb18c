"""Exact mixed gradient of a three-step hybrid problem by enumeration, in NumPy and independent of the library.

    d ~ softmax(W s + b),   c = k_d' s + h_d + 0.5 eta,   eta = +-1 with equal probability
    s' = A_d s + B_d c + 0.1 sin(s),   r = -(|s'|^2 + 0.1 c^2 + kappa_d),   discount 0.95, s_0 one of two states

Three choices, three steps: all 2 (3 2)^3 trajectories are weighed by their probability. The 18 parameters are
(W, b) = phi, of the choice, and (k, h) = psi, of the continuous part. Gradients are by the complex step
`f'(x) = Im f(x + i h) / h` with h = 1e-30, exact to rounding (W. Squire and G. Trapp, SIAM Review 40 (1998) 110);
taking the real part of the state inside pi removes exactly the cross term.

`python benchmarks/oracles/mixed_enumeration.py` climbs J in phi from the point "far" (Adam, step 0.05) and writes the
points after 60, 400 and 2500 steps, "mid", "near" and "very near" a best response, into mixed_points.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

HORIZON, CHOICES, DISCOUNT, SPREAD = 3, 3, 0.95, 0.5
A: Array = np.array([[[1.1, 0.2], [-0.1, 0.9]], [[0.9, -0.3], [0.2, 1.2]], [[1.0, 0.1], [0.1, 1.0]]])
B: Array = np.array([[1.0, 0.15], [0.15, 1.0], [0.5, 0.5]])
KAPPA: Array = np.array([0.0, 0.3, 0.1])
PRICE = 0.1
START: Array = np.array([[2.0, -1.0], [-1.5, 1.0]])
PSI: Array = np.array([-0.6, 0.1, 0.1, -0.7, -0.4, -0.4, 0.0, 0.0, 0.0])
FAR: Array = np.array([1.0, -0.8, -1.0, 0.9, 0.2, 0.3, 0.2, -0.1, 0.0])
POINTS = Path(__file__).with_name("mixed_points.json")
STEPS = {"mid": 60, "near": 400, "very near": 2500}
CrossTerm = Literal["exact", "dropped", "entropy"]


def returns(
    parameters: Array, cross_term: CrossTerm = "exact", temperature: float = 0.0, horizon: int = HORIZON
) -> Array:
    """J `[N]` of parameters `[N, 18]`, plus temperature times the discounted entropies of pi."""
    W, b = parameters[:, :6].reshape(-1, 1, 3, 2), parameters[:, None, 6:9]
    k, h = parameters[:, 9:15].reshape(-1, 1, 3, 1, 2), parameters[:, None, 15:, None]
    count = len(parameters)
    s = np.broadcast_to(START, (count, 2, 2)).astype(parameters.dtype)
    weight, total = np.full((count, 2), 0.5, dtype=parameters.dtype), np.zeros(count, dtype=parameters.dtype)
    noise = np.array([-1.0, 1.0])
    for t in range(horizon):
        log_pi = _log_softmax((W * _frozen(s, cross_term != "exact")[:, :, None]).sum(-1) + b)
        through = _log_softmax((W * _frozen(s, cross_term == "entropy")[:, :, None]).sum(-1) + b)
        entropy = -(np.exp(through) * through).sum(-1)
        c = (k * s[:, :, None, None]).sum(-1) + h + SPREAD * noise  # [N, S, choice, noise]
        moved = np.einsum("dij,nsj->nsdi", A, s)[:, :, :, None]
        following = moved + B[:, None] * c[..., None] + 0.1 * np.sin(s)[:, :, None, None]
        reward = -((following**2).sum(-1) + PRICE * c**2 + KAPPA[:, None])
        share = weight[:, :, None, None] * np.exp(log_pi)[..., None] * 0.5
        total = total + DISCOUNT**t * ((share * reward).sum((1, 2, 3)) + temperature * (weight * entropy).sum(1))
        s, weight = following.reshape(count, -1, 2), np.broadcast_to(share, c.shape).reshape(count, -1)
    return total


def gradient(
    parameters: Array,
    cross_term: CrossTerm = "exact",
    temperature: float = 0.0,
    *,
    horizon: int = HORIZON,
    columns: int = 18,
) -> Array:
    """Derivatives `[columns]` of `returns` in the first parameters `[18]`."""
    step = 1e-30
    moved = parameters + 1j * step * np.eye(18)[:columns]
    return returns(moved, cross_term, temperature, horizon).imag / step


def climbed(temperature: float = 0.0, steps: int = max(STEPS.values()), keep: tuple[int, ...] = ()) -> list[Array]:
    """Parameters after `keep` steps of Adam (size 0.05) in phi from "far"; after all steps, if none are named."""
    x, first, second = np.concatenate([FAR, PSI]), np.zeros(9), np.zeros(9)
    kept = []
    for i in range(1, steps + 1):
        slope = gradient(x, temperature=temperature, columns=9)
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        x[:9] += 0.05 * first / (1 - 0.9**i) / (np.sqrt(second / (1 - 0.999**i)) + 1e-8)
        if i in (keep or (steps,)):
            kept.append(x.copy())
    return kept


def points() -> dict[str, Array]:
    """The committed points, parameters `[18]` by name."""
    return {name: np.array(values) for name, values in json.loads(POINTS.read_text())["points"].items()}


def _frozen(s: Array, freeze: bool) -> Array:
    return s.real if freeze else s


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.real.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def main() -> None:
    kept = dict(zip(STEPS, climbed(keep=tuple(STEPS.values())), strict=True))
    found = {"far": np.concatenate([FAR, PSI]), **kept}
    content = {
        "command": "python benchmarks/oracles/mixed_enumeration.py",
        "order": "W [3, 2], b [3], k [3, 2], h [3]",
        "points": {name: [round(float(value), 12) for value in point] for name, point in found.items()},
    }
    POINTS.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
