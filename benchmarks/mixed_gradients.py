"""Mixed gradients for hybrid actions: unbiased against full enumeration, and their variance on the switched LQR.

`m-unbiased` at the points "far", "mid", "near" and "very near" of `oracles/mixed_enumeration.py` (3 steps, 3 choices,
18 parameters, 432 trajectories); `mixed_gradient` with a quadratic baseline of the state, fixed beforehand by least
squares over the enumeration, 120 000 rollouts per seed:

    POINT           smallest p of three seeds (0, 1, 2): chi-square of the mean against the enumerated gradient over all
                    coordinates (rank 15: softmax logits move together), with the enumerated covariance of a rollout.
                    Near a best response rare choices carry that covariance and the statistic has a heavy tail, so p
                    is its rank among 20 000 draws of the same statistic from the enumerated trajectories. A right
                    estimator falls below 0.01 in 1 of 100 tests, in any of these twelve with 11 %; seeds are fixed
    POINT-NAME      the same at "far" and "mid" for baselines fitted to the batch itself, counterfactual branches and
                    all actions under a rough critic: one seed, Hotelling's T^2 of 60 000 rollouts, 300 a batch
    dropped-far     norm of the bias in psi without the cross term, 3 seeds pooled, the noise of the mean taken off
    dropped-far-p   p that this is unbiased (it must be rejected)
    dropped-verynear   the same over the norm of the gradient in psi: sampled; `-exact`: enumerated
    entropy-far, entropy-soft   bias (share of the gradient) of the decentralised update with entropy bonus 0.5, at
                    "far" and at the best response to it within the softmax-linear class (enumerated)

`m-variance` at the committed points (`switched_lqr_point.py`), 2 modes, 20 steps, action noise 0.3, the same per-time
baseline of the state for both, quadratic up to n = 8 and of 1, x, x^2 above; gradient in the gains:

    nN              variance of the score function over that of the mixed gradient, per rollout
    cosineN         expected cosine of a 128-rollout mixed gradient with the true one, 1 / sqrt(1 + var / (128 |g|^2))
    cosineN-score, cross-shareN, counterfactualN   the same of the score function; share of the cross term in the
                    gradient; variance of counterfactual branches over that of the mixed gradient
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.stats import f as fisher
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import mixed_instance, switched_lqr_point
from benchmarks.bars import Figure, main
from benchmarks.oracles import mixed_enumeration as oracle
from sim2real.bounds import default_params
from sim2real.estimators import (
    Advantage,
    all_action_gradient,
    counterfactual_gradient,
    input_baseline,
    mixed_gradient,
    no_baseline,
    quadratic_states,
    score_function_gradient,
    square_states,
    state_baseline,
    time_baseline,
)
from sim2real.hybrid_policy import HybridPolicy
from sim2real.mdp import ModelMDP, Noise, sample_noise
from sim2real.params import Estimate, Params, ravel
from sim2real.policy import Policy
from sim2real.rollout import Rollout, rollout
from sim2real.simulators import switched_lqr

ROLLOUTS, BATCH, SEEDS = 120_000, 2000, (0, 1, 2)
REFERENCE = {2: 30.0, 4: 32.0, 8: 44.0, 16: 59.0, 32: 86.0, 48: 113.0}
COSINE = {2: 0.996, 48: 0.994}
Estimator = Callable[..., Estimate]


def sampled(
    estimator: Estimator, mdp: ModelMDP, policy: Policy, nu: Params, rollouts: int, seed: int, batch: int = BATCH
) -> Tensor:
    """Gradients `[N, P]` of independent batches of the instance."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack(
        [
            ravel(estimator(mdp, policy, {}, nu, sample_noise(mdp, policy, batch, oracle.HORIZON, generator)).grad)
            for _ in range(rollouts // batch)
        ]
    )


def hotelling(gradients: Tensor, exact: Tensor) -> float:
    """p of T^2 of the mean of `gradients [N, P]` against `exact`, in the directions that vary."""
    count = len(gradients)
    statistic, rank = distance(gradients.mean(0) - exact, gradients.T.cov() / count)
    return float(fisher.sf(float(statistic) * (count - rank) / (rank * (count - 1)), rank, count - rank))


def distance(difference: Tensor, covariance: Tensor) -> tuple[Tensor, int]:
    """Squared Mahalanobis norms of `[..., P]` and the rank, the covariance scaled to unit diagonal first."""
    scale = covariance.diagonal().sqrt()
    values, vectors = torch.linalg.eigh(covariance / scale / scale.unsqueeze(-1))
    kept = values > 1e-9 * values[-1]
    return ((difference / scale @ vectors).square()[..., kept] / values[kept]).sum(-1), int(kept.sum())


def of_trajectories(mdp: ModelMDP, policy: HybridPolicy, nu: Params) -> tuple[Tensor, Tensor, Advantage]:
    """Probability `[N]` of every trajectory, its mixed gradient `[N, P]`, and the fixed baseline of both and the test.

    With a baseline fixed beforehand the gradient of a rollout is a function of its trajectory alone.
    """
    noise = mixed_instance.every_trajectory(policy, oracle.HORIZON)
    share, _ = mixed_instance.probabilities(mdp, policy, {}, nu, noise)
    forced = mixed_instance.forced(policy)
    path = rollout(mdp, forced, {}, nu, noise)
    to_go, root = no_baseline(path, noise, mdp.discount), share.sqrt().unsqueeze(-1)
    fits = [
        torch.linalg.lstsq(root * quadratic_states(path.states[:, t]), root * to_go[:, t : t + 1], driver="gelsd")
        for t in range(oracle.HORIZON)
    ]

    def advantage(drawn: Rollout, one: Noise, discount: float) -> Tensor:
        value = [quadratic_states(drawn.states[:, t]) @ fit.solution for t, fit in enumerate(fits)]
        return no_baseline(drawn, one, discount) - torch.cat(value, 1)

    rows = []
    for row in range(len(share)):
        one = Noise(*(part[row : row + 1] for part in (noise.initial, noise.process, noise.policy)))
        rows.append(ravel(mixed_gradient(mdp, forced, {}, nu, one, advantage=advantage).grad))
    return share, torch.stack(rows), advantage


def enumerated_test(share: Tensor, gradients: Tensor, rollouts: int, draws: int = 20_000) -> Callable[[Tensor], float]:
    """mean of `rollouts` gradients -> p of its chi-square, by the distribution of that over the trajectories."""
    mean = share @ gradients
    centred = gradients - mean
    covariance = (centred * share.unsqueeze(-1)).T @ centred / rollouts
    statistic = partial(distance, covariance=covariance)
    counts = torch.tensor(np.random.default_rng(0).multinomial(rollouts, share.numpy() / share.sum().item(), draws))
    null = statistic((counts.double() / rollouts) @ gradients - mean)[0]
    return lambda found: float(((null >= statistic(found - mean)[0]).sum() + 1) / (draws + 1))


def bias(gradients: Tensor, exact: Tensor) -> float:
    """Norm of the mean error, the share of sampling noise taken off its square."""
    noise = gradients.var(0).sum() / len(gradients)
    return float(((gradients.mean(0) - exact).square().sum() - noise).clamp_min(0.0).sqrt())


def rough_value(state: Tensor, action: Tensor) -> Tensor:
    """A critic that knows the cost of the next state only: all actions under it must stay unbiased."""
    moved = 1.05 * state + torch.stack([action[:, 1], 0.5 * action[:, 1]], -1)
    return -moved.square().sum(-1)


def m_unbiased(quick: bool) -> Iterator[Figure]:
    """Bars `m-unbiased/*`; quick: a sixth of the rollouts."""
    mdp, policy = mixed_instance.model(), mixed_instance.policy()
    rollouts = ROLLOUTS // 6 if quick else ROLLOUTS
    others: dict[str, Estimator] = {
        "state": partial(mixed_gradient, advantage=state_baseline()),
        "time": partial(mixed_gradient, advantage=time_baseline),
        "input": partial(mixed_gradient, advantage=input_baseline()),
        "counterfactual": counterfactual_gradient,
        "all-action": partial(all_action_gradient, action_value=rough_value),
    }
    for point in mixed_instance.POINTS:
        nu = mixed_instance.parameters(point)
        exact = torch.tensor(oracle.gradient(ravel(nu).numpy()))
        share, gradients, advantage = of_trajectories(mdp, policy, nu)
        ours = partial(mixed_gradient, advantage=advantage)
        if float((share @ gradients - exact).norm()) > 1e-9 * float(exact.norm()):
            raise ValueError("the mean over all trajectories is not the enumerated gradient")
        test = enumerated_test(share, gradients, rollouts)
        found = [test(sampled(ours, mdp, policy, nu, rollouts, seed).mean(0)) for seed in SEEDS]
        yield Figure(point.replace(" ", "-"), min(found), "p", len(SEEDS) * rollouts, 0.01)
        for name, estimator in others.items() if point in ("far", "mid") else ():
            p = hotelling(sampled(estimator, mdp, policy, nu, rollouts // 2, 3, 300), exact)
            yield Figure(f"{point}-{name}", p, "p", rollouts // 2)
        if point in ("far", "very near"):
            yield from dropped(mdp, policy, nu, exact, point, rollouts)
    yield from entropy()


def dropped(mdp: ModelMDP, policy: Policy, nu: Params, exact: Tensor, point: str, rollouts: int) -> Iterator[Figure]:
    """The bias of leaving the cross term out."""
    estimator = partial(mixed_gradient, advantage=state_baseline(), cross_term="dropped")
    gradients = torch.cat([sampled(estimator, mdp, policy, nu, rollouts, seed, 300) for seed in SEEDS])
    size, count = float(exact[9:].norm()), 300 * len(gradients)
    enumerated = torch.tensor(oracle.gradient(ravel(nu).numpy(), "dropped")) - exact
    found, known = bias(gradients[:, 9:], exact[9:]), float(enumerated.norm())
    if point == "far":
        yield Figure("dropped-far", found, "1", count, known)
        yield Figure("dropped-far-p", hotelling(gradients, exact), "p", count)
    else:
        yield Figure("dropped-verynear", found / size, "of |grad|", count, 0.015)
        yield Figure("dropped-verynear-exact", known / size, "of |grad|", 1, 0.015)


def entropy(temperature: float = 0.5) -> Iterator[Figure]:
    """What the decentralised update misses, enumerated, away from and at the best response of the class."""
    at = {"far": ravel(mixed_instance.parameters("far")).numpy(), "soft": oracle.climbed(temperature)[0]}
    for name, numbers in at.items():
        exact, found = (torch.tensor(oracle.gradient(numbers, kind, temperature))[9:] for kind in ("exact", "entropy"))
        yield Figure(f"entropy-{name}", float((found - exact).norm() / exact.norm()), "of |grad|", 1)


def m_variance(quick: bool) -> Iterator[Figure]:
    """Bars `m-variance/*`; quick: n = 2 and 48 only, with a sixth of the batches."""
    for states in (2, 48) if quick else (2, 48, 4, 8, 16, 32):
        yield from variances(states, (60 if states in (2, 48) else 24) // (6 if quick else 1))


def variances(states: int, batches: int, rollouts: int = 256) -> Iterator[Figure]:
    """All figures of one size, from common batches; the squared norm of the gradient with its noise taken off."""
    mdp, policy, nu = switched_lqr(states), switched_lqr_point.policy(states), switched_lqr_point.point(states)
    theta, generator = default_params(mdp.box), torch.Generator().manual_seed(states)
    advantage = state_baseline(square_states if states > 8 else None)
    estimators: dict[str, Estimator] = {
        "mixed": partial(mixed_gradient, advantage=advantage),
        "dropped": partial(mixed_gradient, advantage=advantage, cross_term="dropped"),
        "score": partial(score_function_gradient, advantage=advantage),
        "counterfactual": counterfactual_gradient,
    }
    found: dict[str, list[Tensor]] = {name: [] for name in estimators}
    for _ in range(batches):
        noise = sample_noise(mdp, policy, rollouts, 20, generator)
        for name, estimator in estimators.items():
            found[name].append(estimator(mdp, policy, theta, nu, noise).grad["k"].reshape(-1))
    gradients = {name: torch.stack(values) for name, values in found.items()}
    variance = {name: float(rollouts * values.var(0).sum()) for name, values in gradients.items()}
    count = batches * rollouts
    size = float(gradients["mixed"].mean(0).square().sum()) - variance["mixed"] / count
    cosine = {name: (1 + value / (128 * size)) ** -0.5 for name, value in variance.items()}
    cross = float((gradients["mixed"] - gradients["dropped"]).mean(0).norm()) / size**0.5
    yield Figure(f"n{states}", variance["score"] / variance["mixed"], "times", count, REFERENCE[states])
    yield Figure(f"cosine{states}", cosine["mixed"], "cosine", count, COSINE.get(states))
    yield Figure(f"cosine{states}-score", cosine["score"], "cosine", count)
    yield Figure(f"cross-share{states}", cross, "of |grad|", count)
    yield Figure(f"counterfactual{states}", variance["counterfactual"] / variance["mixed"], "of variance", count)


if __name__ == "__main__":
    main({"m-unbiased": m_unbiased, "m-variance": m_variance})
