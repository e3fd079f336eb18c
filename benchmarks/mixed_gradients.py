"""Mixed gradients for hybrid actions: unbiased against full enumeration, and their variance on the switched LQR.

`m-unbiased` at the points "far", "mid", "near" and "very near" of `oracles/mixed_enumeration.py` (3 steps, 3 choices,
18 parameters, 432 trajectories); `mixed_gradient` with the state baseline, 120 000 rollouts in 400 batches per seed:

    POINT           smallest p of three seeds (0, 1, 2): Hotelling's T^2 of the batch means against the enumerated
                    gradient, over all coordinates (rank 15: softmax logits move together). A right estimator falls
                    below 0.01 in 1 of 100 tests; over these twelve the false-alarm rate is 11 %, the seeds are fixed
    POINT-NAME      the same for other baselines, counterfactual branches and all actions under a rough critic, one seed
    dropped-far     norm of the bias in psi without the cross term, 3 seeds pooled, the noise of the mean taken off
    dropped-far-p   p that this is unbiased (it must be rejected)
    dropped-verynear   the same over the norm of the gradient in psi: sampled; `-exact`: enumerated
    entropy-far, entropy-soft   bias (share of the gradient) of the decentralised update with entropy bonus 0.5, at
                    "far" and at the best response to it within the softmax-linear class (enumerated)

`m-variance` at the committed points (`switched_lqr_point.py`), 2 modes, 20 steps, action noise 0.3, the same per-time
baseline of the state for both, quadratic up to n = 16 and of 1, x, x^2 above; gradient in the gains:

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

import torch
from scipy.stats import f as fisher
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import mixed_instance, switched_lqr_point
from benchmarks.bars import Figure, main
from benchmarks.oracles import mixed_enumeration as oracle
from sim2real.bounds import default_params
from sim2real.estimators import (
    all_action_gradient,
    counterfactual_gradient,
    input_baseline,
    mixed_gradient,
    score_function_gradient,
    square_states,
    state_baseline,
    time_baseline,
)
from sim2real.mdp import ModelMDP, sample_noise
from sim2real.params import Estimate, Params, ravel
from sim2real.policy import Policy
from sim2real.simulators import switched_lqr

BATCH, BATCHES, SEEDS = 300, 400, (0, 1, 2)
REFERENCE = {2: 30.0, 4: 32.0, 8: 44.0, 16: 59.0, 32: 86.0, 48: 113.0}
COSINE = {2: 0.996, 48: 0.994}
Estimator = Callable[..., Estimate]


def sampled(estimator: Estimator, mdp: ModelMDP, policy: Policy, nu: Params, batches: int, seed: int) -> Tensor:
    """Gradients `[batches, P]` of independent batches of `BATCH` rollouts of the instance."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack(
        [
            ravel(estimator(mdp, policy, {}, nu, sample_noise(mdp, policy, BATCH, oracle.HORIZON, generator)).grad)
            for _ in range(batches)
        ]
    )


def p_value(gradients: Tensor, exact: Tensor) -> float:
    """Hotelling's T^2 of the mean of `gradients [N, P]` against `exact`, in the directions that vary."""
    difference, count = gradients.mean(0) - exact, len(gradients)
    scale = gradients.std(0).clamp_min(1e-300)
    values, vectors = torch.linalg.eigh((gradients / scale).T.cov())
    kept = values > 1e-9 * values[-1]
    rank = int(kept.sum())
    statistic = float(count * ((vectors.T @ (difference / scale)).square()[kept] / values[kept]).sum())
    return float(fisher.sf(statistic * (count - rank) / (rank * (count - 1)), rank, count - rank))


def bias(gradients: Tensor, exact: Tensor) -> float:
    """Norm of the mean error, the share of sampling noise taken off its square."""
    noise = gradients.var(0).sum() / len(gradients)
    return float(((gradients.mean(0) - exact).square().sum() - noise).clamp_min(0.0).sqrt())


def rough_value(state: Tensor, action: Tensor) -> Tensor:
    """A critic that knows the cost of the next state only: all actions under it must stay unbiased."""
    moved = 1.05 * state + torch.stack([action[:, 1], 0.5 * action[:, 1]], -1)
    return -moved.square().sum(-1)


def m_unbiased(quick: bool) -> Iterator[Figure]:
    """Bars `m-unbiased/*`; quick: a sixth of the batches."""
    mdp, policy = mixed_instance.model(), mixed_instance.policy()
    batches = BATCHES // 6 if quick else BATCHES
    ours = partial(mixed_gradient, advantage=state_baseline())
    others: dict[str, Estimator] = {
        "time": partial(mixed_gradient, advantage=time_baseline),
        "input": partial(mixed_gradient, advantage=input_baseline()),
        "counterfactual": counterfactual_gradient,
        "all-action": partial(all_action_gradient, action_value=rough_value),
    }
    for point in mixed_instance.POINTS:
        nu = mixed_instance.parameters(point)
        exact = torch.tensor(oracle.gradient(ravel(nu).numpy()))
        found = [p_value(sampled(ours, mdp, policy, nu, batches, seed), exact) for seed in SEEDS]
        yield Figure(point.replace(" ", "-"), min(found), "p", len(SEEDS) * batches * BATCH, 0.01)
        if point in ("far", "very near"):
            for name, estimator in others.items():
                p = p_value(sampled(estimator, mdp, policy, nu, batches // 2, 3), exact)
                yield Figure(f"{point.replace(' ', '-')}-{name}", p, "p", batches // 2 * BATCH)
            yield from dropped(mdp, policy, nu, exact, point, batches)
    yield from entropy()


def dropped(mdp: ModelMDP, policy: Policy, nu: Params, exact: Tensor, point: str, batches: int) -> Iterator[Figure]:
    """The bias of leaving the cross term out."""
    estimator = partial(mixed_gradient, advantage=state_baseline(), cross_term="dropped")
    gradients = torch.cat([sampled(estimator, mdp, policy, nu, batches, seed) for seed in SEEDS])
    size, count = float(exact[9:].norm()), len(gradients) * BATCH
    enumerated = torch.tensor(oracle.gradient(ravel(nu).numpy(), "dropped")) - exact
    found, known = bias(gradients[:, 9:], exact[9:]), float(enumerated.norm())
    if point == "far":
        yield Figure("dropped-far", found, "1", count, known)
        yield Figure("dropped-far-p", p_value(gradients, exact), "p", count)
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
    """Bars `m-variance/*`; quick: n = 2 and 48 with a sixth of the batches."""
    for states in (2, 48) if quick else switched_lqr_point.SIZES:
        yield from variances(states, 10 if quick else 60)


def variances(states: int, batches: int, rollouts: int = 256) -> Iterator[Figure]:
    """All figures of one size, from common batches; the squared norm of the gradient with its noise taken off."""
    mdp, policy, nu = switched_lqr(states), switched_lqr_point.policy(states), switched_lqr_point.point(states)
    theta, generator = default_params(mdp.box), torch.Generator().manual_seed(states)
    advantage = state_baseline(square_states if states > 16 else None)
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
