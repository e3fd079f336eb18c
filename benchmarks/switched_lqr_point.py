"""The policy points on the switched LQR at which `mixed_gradients.py` measures variances.

    d ~ softmax(W x),   u_i = -k_di x_i + 0.3 eta_i,     k_di = 0.5 where mode d is strong, 1.5 where it is weak,

W = 0.4 sqrt(2 / n) z with z standard normal (numpy.random.default_rng(1)): a stable policy away from any optimum, whose
choice depends on the state about as much for every n. The reference figures (30 at n = 2 to 113 at n = 48) are of a
point with linear gains that was not written down; this one is. `python benchmarks/switched_lqr_point.py` writes
points/switched_lqr.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sim2real.hybrid_policy import HybridPolicy, discrete_first_policy
from sim2real.params import Params
from sim2real.simulators import switched_matrices

SIZES = (2, 4, 8, 16, 32, 48)
MODES, STD = 2, 0.3
FILE = Path(__file__).with_name("points") / "switched_lqr.json"


def policy(states: int) -> HybridPolicy:
    """nu has the keys W `[2, n]` and k `[2, n]`."""

    def logits(nu: Params, state: Tensor) -> Tensor:
        return state @ nu["W"].mT

    def branches(nu: Params, state: Tensor) -> Tensor:
        return -nu["k"] * state.unsqueeze(-2)

    return discrete_first_policy(logits, branches, choices=MODES, continuous_dim=states, std=STD)


def point(states: int) -> Params:
    """nu as committed."""
    values = json.loads(FILE.read_text())["points"][str(states)]
    return {key: torch.tensor(value, dtype=torch.float64) for key, value in values.items()}


def content() -> str:
    """What the file holds."""
    points = {}
    for states in SIZES:
        strong = switched_matrices(states, MODES)[1].numpy() == 1.0
        W = 0.4 * (2 / states) ** 0.5 * np.random.default_rng(1).standard_normal((MODES, states))
        points[str(states)] = {"W": W.round(6).tolist(), "k": np.where(strong, 0.5, 1.5).tolist()}
    written = {
        "command": "python benchmarks/switched_lqr_point.py",
        "policy": f"d ~ softmax(W x), u = -k_d * x + {STD} eta, {MODES} modes",
        "points": points,
    }
    return json.dumps(written) + "\n"


if __name__ == "__main__":
    FILE.write_text(content())
