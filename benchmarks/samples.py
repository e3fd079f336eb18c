"""Policy sensitivities from samples: dK/dtheta of an LQR from on-policy rollouts, theta = (A, B), the bar `s-samples`.

Four states, two actions, discount 0.9, rollouts of 50 steps of the stochastic policy `a = -K* s + 0.5 e`, process noise
of standard deviation 0.3, all critics fitted on the same rollouts. The error is relative in the Frobenius norm over all
entries of dK/dtheta, the median of ten seeds; the reference differentiates Bellman by scipy (`oracles/lqr.py`).

                                      bars at 1e5 / 1e6 transitions
    function-space-score              0.12 / 0.04       function_space_sensitivity
    function-space-pathwise           0.03 / 0.012
    second-order-critic               0.50 / 0.16       score_sensitivity
    second-order-causal, -baseline, -plain              for information, at 1e5; plain is as usually written

`-indefinite`: in how many of the seeds -J_nunu was. The references of the figures were measured elsewhere: function
space on-policy, second order with the exact critic and, at the other levels, on rewards known not to depend on s'.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bars import Figure, main
from benchmarks.oracles.lqr import gain_jacobian, optimal_gain
from sim2real import (
    ModelMDP,
    Noise,
    Params,
    Policy,
    Sensitivity,
    UnconvergedWarning,
    linear_policy,
    sample_noise,
)
from sim2real.estimators.function_space import function_space_sensitivity
from sim2real.estimators.score_sensitivity import score_sensitivity
from sim2real.simulators import linear_gaussian

HORIZON = 50
REFERENCES = {
    "function-space-score": {100_000: 0.087, 1_000_000: 0.028},
    "function-space-pathwise": {100_000: 0.023, 1_000_000: 0.0086},
    "second-order-critic": {100_000: 0.35, 1_000_000: 0.105},
    "second-order-causal": {100_000: 3.1},
    "second-order-baseline": {100_000: 7.3},
    "second-order-plain": {100_000: 16.0},
}


@dataclass(frozen=True)
class Problem:
    """The reference LQR at its optimal gain, and dK/dtheta by scipy."""

    mdp: ModelMDP
    policy: Policy
    theta: Params
    nu: Params
    jacobian: Params


def problem() -> Problem:
    """The system of the reference figures: a random A of spectral radius 1.02, R = 0.3 I."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    A = A * (1.02 / torch.linalg.eigvals(A).abs().max())
    B = torch.randn(4, 2, generator=generator, dtype=torch.float64) / 2
    eye = torch.eye(4, dtype=torch.float64)
    mdp = linear_gaussian(A, B, action_cost=0.3 * eye[:2, :2], noise_covariance=0.3**2 * eye, discount=0.9)
    system = {"A": A.numpy(), "B": B.numpy(), "Q": np.eye(4), "R": 0.3 * np.eye(2), "discount": np.array(0.9)}
    jacobian = {key: torch.tensor(value) for key, value in gain_jacobian(system).items()}
    nu = {"gain": torch.tensor(optimal_gain(system)[1])}
    return Problem(mdp, linear_policy(2, std=0.5), {"A": A, "B": B}, nu, jacobian)


def jacobian_of(sensitivity: Sensitivity, p: Problem) -> Params:
    """dK/dtheta `[m, n, *shape]` of a sensitivity, one cotangent per entry of K."""
    K = p.nu["gain"]
    units = torch.eye(K.numel(), dtype=K.dtype).reshape(-1, *K.shape)
    pulled = [sensitivity.vjp({"gain": unit}) for unit in units]
    return {key: torch.stack([row[key] for row in pulled]).reshape(*K.shape, *p.theta[key].shape) for key in p.theta}


def relative_error(sensitivity: Sensitivity, p: Problem) -> float:
    """Of dK/dtheta, in the Frobenius norm over all entries of theta."""
    found = jacobian_of(sensitivity, p)
    wrong = sum(float((found[key] - p.jacobian[key]).square().sum()) for key in found)
    return math.sqrt(wrong / sum(float(value.square().sum()) for value in p.jacobian.values()))


def methods() -> dict[str, Callable[[Problem, Noise], Sensitivity]]:
    """Every estimator of the bar, given the problem and the noise of its rollouts."""

    def in_function_space(p: Problem, noise: Noise, *, derivative: str) -> Sensitivity:
        return function_space_sensitivity(p.mdp, p.policy, p.theta, p.nu, noise, derivative=derivative)

    def second_order(p: Problem, noise: Noise, *, variance: str) -> Sensitivity:
        return score_sensitivity(p.mdp, p.policy, p.theta, p.nu, noise, variance=variance)

    chosen = {f"function-space-{mode}": partial(in_function_space, derivative=mode) for mode in ("score", "pathwise")}
    levels = ("critic", "causal", "baseline", "plain")
    return chosen | {f"second-order-{level}": partial(second_order, variance=level) for level in levels}


def errors(name: str, transitions: int, seeds: int) -> tuple[list[float], int]:
    """The relative error of each seed, and how many had an indefinite -J_nunu."""
    p, method = problem(), methods()[name]

    def one(seed: int) -> tuple[float, bool]:
        generator = torch.Generator().manual_seed(seed)
        noise = sample_noise(p.mdp, p.policy, transitions // HORIZON, HORIZON, generator)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnconvergedWarning)
            sensitivity = method(p, noise)
            return relative_error(sensitivity, p), sensitivity.report.negative_curvature is not None

    figures = [one(seed) for seed in range(seeds)]
    return [error for error, _ in figures], sum(indefinite for _, indefinite in figures)


def s_samples(quick: bool) -> Iterator[Figure]:
    """The bar s-samples: 1e5 and 1e6 transitions, ten seeds (quick: 1e5, three seeds)."""
    seeds = 3 if quick else 10
    for transitions in (100_000,) if quick else (100_000, 1_000_000):
        size = f"1e{round(math.log10(transitions))}"
        for name, references in REFERENCES.items():
            if transitions not in references:
                continue
            found, indefinite = errors(name, transitions, seeds)
            yield Figure(f"{name}-{size}", float(np.median(found)), "relative error", seeds, references[transitions])
            if name.startswith("second-order"):
                yield Figure(f"{name}-{size}-indefinite", float(indefinite), "seeds", seeds)


if __name__ == "__main__":
    main({"s-samples": s_samples})
