"""Which gradient estimator to use on one's own problem: bias, variance, cost and what follows.

All estimators see the same n batches of N rollouts. Against a reference g, exact or itself sampled,

    bias       b = mean of the batch gradients - g. Its norm is estimated without the noise of both means,
               |b|^2 - tr C, C = S_e / n + S_g / n_g, and bounded by | |b| - |E b| | <= |noise|: with 95 % confidence
               the true norm lies within the 95 % quantile of |noise| of |b|
               With the default reference, itself mixed, b is taken from the differences to "mixed" on common noise
               where those are quieter
    p          of |b|^2 under no bias. |noise|^2 is a weighted sum of chi-squares; it is matched by c chi^2_k with mean
               tr C and variance 2 tr C^2, both estimated without bias, so that any number of parameters will do;
               over an estimated tr C of k f degrees it is F(k, k f), f = n - 1 or Welch's for two samples
    variance   tr S_e N, of one rollout;   cosine: mean over the batches with g
    error      sqrt(|b|^2 + variance / M) / |g| with as many rollouts M as fit into the time of a batch of "mixed"

The recommendation is the smallest error; where that estimator is biased, it says so and names the best unbiased one.
References: Z. Bai and H. Saranadasa, Effect of high dimension, Statistica Sinica 6 (1996) 311 (the test and the
estimate of tr C^2); F. Satterthwaite, Biometrics Bulletin 2 (1946) 110 (the match).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from scipy.stats import f as fisher
from torch import Tensor

from sim2real.estimators.baselines import state_baseline
from sim2real.estimators.counterfactual import counterfactual_gradient
from sim2real.estimators.mixed import mixed_gradient
from sim2real.estimators.pathwise import check_wrt, pathwise_gradient
from sim2real.estimators.score_function import score_function_gradient
from sim2real.estimators.straight_through import straight_through_gradient
from sim2real.mdp import ModelMDP, Noise
from sim2real.params import Estimate, Params, ravel
from sim2real.policy import Policy

Estimator = Callable[..., Estimate]
"""mdp, policy, theta, nu, noise, wrt= -> Estimate"""

MIXED, DROPPED = "mixed", "mixed, cross term dropped"
_LEVEL = 0.95
_BIASED = 0.01


@dataclass(frozen=True)
class EstimatorRow:
    """One estimator; gradients in units of return per parameter, norms over all of them."""

    name: str
    bias: float
    """norm, the sampling noise taken off"""
    bias_low: float
    bias_high: float
    """with 95 % confidence the norm of the bias lies between these"""
    p_value: float
    """of what was seen if there were no bias; below 0.01 a right estimator comes in one comparison of a hundred"""
    variance: float
    """of one rollout, summed over the parameters"""
    cosine: float
    """of a batch with the reference, mean over the batches"""
    seconds: float
    """per rollout, median"""
    error: float
    """relative root mean square error, at the cost of a batch of mixed"""


@dataclass(frozen=True)
class EstimatorComparison:
    """What `compare_estimators` found; `sim2real.estimator_report` shows it."""

    rows: tuple[EstimatorRow, ...]
    batch: int
    batches: int
    reference: Params
    reference_norm: float
    """noise taken off"""
    reference_noise: float
    """root mean square norm of the reference's own error; 0 when it is exact"""
    cross_share: float
    """norm of the cross term over that of the gradient, from common noise, its noise taken off"""
    cross_share_noise: float
    """root mean square norm of the error of that, relative too"""
    recommendation: str
    failures: dict[str, str] = field(default_factory=dict)
    """estimators that refused this problem, and why"""


def standard_estimators() -> dict[str, Estimator]:
    """The estimators compared by default; finite differences are left out, being too noisy across choices."""
    return {
        MIXED: mixed_gradient,
        "mixed, state baseline": partial(mixed_gradient, advantage=state_baseline()),
        DROPPED: partial(mixed_gradient, cross_term="dropped"),
        "counterfactual branches": counterfactual_gradient,
        "score function": score_function_gradient,
        "pathwise": pathwise_gradient,
        "straight-through": straight_through_gradient,
        "straight-through Gumbel": partial(straight_through_gradient, gumbel=torch.Generator().manual_seed(0)),
    }


def compare_estimators(
    mdp: ModelMDP,
    policy: Policy,
    theta: Params,
    nu: Params,
    draw: Callable[[], Noise],
    *,
    estimators: Mapping[str, Estimator] | None = None,
    reference: Params | Estimator = mixed_gradient,
    batches: int = 40,
    reference_batches: int = 160,
    wrt: Literal["nu", "theta"] = "nu",
    keys: Sequence[str] | None = None,
) -> EstimatorComparison:
    """Compare gradient estimators of `expected_return` of a hybrid policy, on fresh batches `draw()`.

    `estimators` by name, besides "mixed" and "mixed, cross term dropped", which are always run: None takes
    `standard_estimators`. `reference`: the exact gradient, or an unbiased estimator, averaged over its own
    `reference_batches`. `keys` restricts everything to some parameters, such as those of the continuous part. An
    estimator that raises `ValueError` on this problem is listed under `failures`. Raises `ValueError` for fewer than
    four batches, `KeyError` for keys that are not there, and whatever "mixed" raises.
    """
    check_wrt(wrt)
    if batches < 4 or reference_batches < 4:
        raise ValueError(f"needs at least 4 batches and reference_batches, got {batches} and {reference_batches}")
    moved = nu if wrt == "nu" else theta
    chosen = list(moved) if keys is None else list(keys)
    unknown = sorted(set(chosen) - moved.keys())
    if unknown:
        raise KeyError(f"keys {unknown} are no parameters in {wrt}; it has {sorted(moved)}")
    pick = lambda grad: ravel({key: grad[key].detach().double() for key in chosen})
    run = lambda estimator, noise: pick(estimator(mdp, policy, theta, nu, noise, wrt=wrt).grad)
    known = pick(reference).unsqueeze(0) if isinstance(reference, dict) else None
    target = torch.stack([run(reference, draw()) for _ in range(reference_batches)]) if known is None else known
    named = {**standard_estimators(), **({} if estimators is None else estimators)}
    if estimators is not None:
        named = {name: named[name] for name in (MIXED, DROPPED, *estimators)}
    gradients, seconds, failures, size = _collect(named, run, (draw() for _ in range(batches)))
    budget = size * seconds[MIXED]
    scale = _norm(target)
    rows = []
    for name, found in gradients.items():
        against = found, target
        if reference is mixed_gradient and name != MIXED:
            paired = found - gradients[MIXED], torch.zeros_like(target[:1])
            against = min(against, paired, key=lambda pair: _noise_of_difference(*pair)[0])
        rows.append(_row(name, found, target, against, seconds[name], scale=scale, size=size, budget=budget))
    cross = gradients[MIXED] - gradients[DROPPED]
    noise_of = lambda sample: float(sample.var(0).sum() / len(sample)) ** 0.5 if len(sample) > 1 else 0.0
    return EstimatorComparison(
        rows=tuple(rows),
        batch=size,
        batches=batches,
        reference=_as_params(target.mean(0), {key: moved[key] for key in chosen}),
        reference_norm=scale,
        reference_noise=noise_of(target),
        cross_share=_norm(cross) / scale if scale > 0 else 0.0,
        cross_share_noise=noise_of(cross) / scale if scale > 0 else 0.0,
        recommendation=_recommendation(rows, scale),
        failures=failures,
    )


def _collect(
    estimators: Mapping[str, Estimator], run: Callable[[Estimator, Noise], Tensor], noises: Iterable[Noise]
) -> tuple[dict[str, Tensor], dict[str, float], dict[str, str], int]:
    """Gradients `[n, P]` and median seconds per rollout by name, refusals, and the rollouts of a batch."""
    gradients: dict[str, list[Tensor]] = {name: [] for name in estimators}
    taken: dict[str, list[float]] = {name: [] for name in estimators}
    failures: dict[str, str] = {}
    size = 0
    for noise in noises:
        size = len(noise.policy)
        for name, estimator in estimators.items():
            if name in failures:
                continue
            start = time.perf_counter()
            try:
                gradients[name].append(run(estimator, noise))
            except ValueError as refusal:
                if name in (MIXED, DROPPED):
                    raise
                failures[name] = str(refusal)
            taken[name].append(time.perf_counter() - start)
    kept = {name: torch.stack(values) for name, values in gradients.items() if name not in failures}
    seconds = {name: float(torch.tensor(taken[name]).median()) / size for name in kept}
    return kept, seconds, failures, size


def _row(
    name: str,
    gradients: Tensor,
    target: Tensor,
    against: tuple[Tensor, Tensor],
    seconds: float,
    *,
    scale: float,
    size: int,
    budget: float,
) -> EstimatorRow:
    """`against`: the two samples whose means differ by the bias; `budget` in seconds."""
    trace, square = _noise_of_difference(*against)
    difference = float((against[0].mean(0) - against[1].mean(0)).norm())
    if square > 0:
        degrees = min(trace**2 / square, gradients.shape[1])
        against_trace = fisher(degrees, degrees * _freedom(*against))
        p_value = float(against_trace.sf(difference**2 / trace))
        reach = float(trace * against_trace.ppf(_LEVEL)) ** 0.5
    else:  # nothing varies: equal or not
        p_value, reach = (1.0 if difference <= 1e-12 * max(scale, 1e-300) else 0.0), 0.0
    bias_square = max(difference**2 - trace, 0.0)
    variance = float(gradients.var(0).sum()) * size
    goal = target.mean(0)
    cosines = torch.nn.functional.cosine_similarity(gradients, goal.expand_as(gradients), dim=-1)
    return EstimatorRow(
        name=name,
        bias=bias_square**0.5,
        bias_low=max(difference - reach, 0.0),
        bias_high=difference + reach,
        p_value=p_value,
        variance=variance,
        cosine=float(cosines.mean()),
        seconds=seconds,
        error=(bias_square + variance * seconds / budget) ** 0.5 / scale if scale > 0 else float("inf"),
    )


def _noise_of_difference(gradients: Tensor, target: Tensor) -> tuple[float, float]:
    """tr C and tr C^2 of the difference of both means."""
    n, m = len(gradients), len(target)
    x = gradients - gradients.mean(0)
    trace, square = float(x.square().sum()) / (n - 1) / n, _square_trace(x) / n**2
    if m > 1:
        y = target - target.mean(0)
        trace += float(y.square().sum()) / (m - 1) / m
        common = float((x @ y.T).square().sum()) / ((n - 1) * (m - 1))
        square += _square_trace(y) / m**2 + 2 * common / (n * m)
    return trace, max(square, 0.0)


def _freedom(gradients: Tensor, target: Tensor) -> float:
    """Degrees of freedom of the variance of the difference of both means (B. Welch, Biometrika 29 (1938) 350)."""
    parts = [(float(x.var(0).sum()) / len(x), len(x) - 1) for x in (gradients, target) if len(x) > 1]
    return sum(part for part, _ in parts) ** 2 / sum(part**2 / degrees for part, degrees in parts)


def _square_trace(centred: Tensor) -> float:
    """tr S^2 of a covariance S from n centred rows, unbiased for normal rows (Bai and Saranadasa, eq. 4.1)."""
    n = len(centred)
    gram = centred @ centred.T / (n - 1)
    plain, trace = float(gram.square().sum()), float(gram.diagonal().sum())
    found = (n - 1) ** 2 / ((n - 2) * (n + 1)) * (plain - trace**2 / (n - 1))
    return max(found, plain / n)  # tr S^2 of n rows is at most n times too large, so this never undershoots far


def _norm(sample: Tensor) -> float:
    """Norm of the mean of `[n, P]`, the noise of the mean taken off its square."""
    noise = float(sample.var(0).sum()) / len(sample) if len(sample) > 1 else 0.0
    return max(float(sample.mean(0).square().sum()) - noise, 0.0) ** 0.5


def _as_params(vector: Tensor, like: Params) -> Params:
    parts = vector.split([value.numel() for value in like.values()])
    return {key: part.reshape(like[key].shape) for key, part in zip(like, parts, strict=True)}


def _recommendation(rows: Sequence[EstimatorRow], scale: float) -> str:
    if scale == 0.0:
        return "the gradient is lost in the noise of the reference: take more or larger batches"
    best = min(rows, key=lambda row: row.error)
    text = f"{best.name}: error {best.error:.2g} of the gradient at the cost of a batch of mixed"
    if best.p_value >= _BIASED:
        return f"{text}; no bias found, at most {best.bias_high / scale:.2g} of the gradient"
    unbiased = [row for row in rows if row.p_value >= _BIASED]
    if not unbiased:
        return f"{text}; biased by {best.bias / scale:.2g} of the gradient, as all others are"
    second = min(unbiased, key=lambda row: row.error)
    return (
        f"{text}; biased by {best.bias / scale:.2g} of the gradient, which averaging does not remove: for larger "
        f"batches take {second.name} (error {second.error:.2g}, no bias found)"
    )
