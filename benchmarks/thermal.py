"""Building thermal control from samples: gradients with everything learned, and returns of the ascent.

`b-thermal-gradient`, at zero logits, 10 000 on-policy transitions (100 episodes), mean cosine with the exact gradient
and relative root mean square error over 30 repeats. The leader knows d mean(s') / d theta (pathwise sources), its own
reward function, the follower's policy and soft value; critics are least squares on the transitions, with weights
1 / (0.01 + |s|^2).

    cosine, rmse       quadratic features of (s, a)
    known-start        the same with the start law known: the outer sum runs over the visits of the value critic
    state-cosine       quadratic features of s, linear one-step model fitted: Q = r + gamma V(s')
    score-cosine       the density in place of pathwise sources, weights 1 / (0.1 + |s|^2)^2
    features-cosine    100 random SiLU units of s, no quadratic among them
    mlp-cosine         the hidden layer of a network trained on returns, output layer by least squares
    single-cosine, taken-cosine, unweighted-cosine    what other choices give
    ms, separate-ms    one Bellman operator for Q_L and G, and one each (for a follower's discount that differs in the
                       twelfth digit): processor time of a gradient

`b-blackbox`: the follower unknown; policy by maximum likelihood, soft value from the same transitions.
`b-siblings`: the naive gradient, HPGD ("oracle": values from 10 000 further transitions) and SoBiRL on the same
transitions and features.
`b-thermal-return`: exact J after 80 and 300 iterations of 10 000 fresh transitions, Adam 0.3, worst of 5 seeds.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bars import Figure, main
from benchmarks.oracles import building_thermal as oracle
from sim2real import rollout, sample_noise
from sim2real.estimators import (
    CriticOptions,
    boltzmann_covariance_gradient,
    fit_linear_follower,
    fit_soft_value,
    hpgd_gradient,
    inverse_noise_weights,
    naive_leader_gradient,
    random_features,
    sobirl_gradient,
    trained_features,
    transitions,
)
from sim2real.estimators.leader_critic import StateFeatures
from sim2real.estimators.transitions import Transitions
from sim2real.params import Estimate, Params, ravel
from sim2real.simulators import building_thermal, four_zones, thermal_matrix
from sim2real.solvers import SoftLQR, linear_noise_policy, soft_lqr

TASK, BUILDING, POLICY = building_thermal(), four_zones(), linear_noise_policy(2)
EPISODES, HORIZON = 100, 100
Choice = Callable[[Transitions, Tensor, int], dict[str, Any]]
"""data, follower rewards, seed -> options of the estimator"""


def respond(theta: Params) -> SoftLQR:
    """The follower, which knows the building."""
    return soft_lqr(
        thermal_matrix(theta, BUILDING),
        BUILDING.B,
        BUILDING.Q,
        BUILDING.R,
        discount=BUILDING.follower_discount,
        temperature=BUILDING.temperature,
        noise_covariance=BUILDING.noise_std**2 * torch.eye(4, dtype=torch.float64),
    )


def observe(theta: Params, best: SoftLQR, seed: int) -> tuple[Transitions, Tensor]:
    """10 000 transitions with the leader's rewards, and the follower's rewards."""
    noise = sample_noise(TASK.follower, POLICY, EPISODES, HORIZON, torch.Generator().manual_seed(seed))
    data = transitions(rollout(TASK.follower, POLICY, theta, best.nu, noise))
    rewards = TASK.reward(theta, data.states, data.actions, data.next_states)
    return replace(data, rewards=rewards), data.rewards


def gradient(theta: Params, seed: int, choice: Choice, *, black_box: bool = False) -> Estimate:
    best = respond(theta)
    data, follower_rewards = observe(theta, best, seed)
    options = {"critics": weighted(data, follower_rewards, seed)} | choice(data, follower_rewards, seed)
    policy, nu = POLICY, best.nu
    soft_value: Callable[[Tensor], Tensor] = lambda s: -((s @ best.cost_matrix) * s).sum(-1) - best.offset
    if black_box:
        policy, nu = fit_linear_follower(data)
        soft_value = fit_soft_value(
            policy,
            nu,
            data,
            follower_rewards,
            discount=0.9,
            temperature=0.1,
            row_weights=options["critics"].row_weights,
        )
    return boltzmann_covariance_gradient(
        TASK, policy, theta, nu, data, temperature=0.1, soft_value=soft_value, **options
    )


def weighted(data: Transitions, follower_rewards: Tensor, seed: int, **options: Any) -> CriticOptions:
    return CriticOptions(row_weights=inverse_noise_weights(data.states), **options)


def known_start(data: Transitions, follower_rewards: Tensor, seed: int) -> dict[str, Any]:
    """Points of N(0, 25 I) with its mean and covariance exactly, which is all that quadratics see."""
    axes = BUILDING.initial_std * 2 * torch.eye(4, dtype=torch.float64)  # sqrt(4) standard deviations each way
    points = torch.cat([axes, -axes])
    return {"start": lambda theta: (points, torch.full((8,), 1 / 8, dtype=torch.float64))}


def of_state(data: Transitions, follower_rewards: Tensor, seed: int) -> dict[str, Any]:
    return {"critics": weighted(data, follower_rewards, seed, kind="state")}


def score(data: Transitions, follower_rewards: Tensor, seed: int) -> dict[str, Any]:
    rows = inverse_noise_weights(data.states, floor=0.1, power=2.0)
    return {"critics": CriticOptions(row_weights=rows), "source": "score"}


def smooth(data: Transitions, follower_rewards: Tensor, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return network(data, seed, random_features(data.states, 100, generator, scale=float(data.initial_states.std())))


def trained(data: Transitions, follower_rewards: Tensor, seed: int) -> dict[str, Any]:
    targets = torch.stack([data.rewards, follower_rewards], -1)
    generator = torch.Generator().manual_seed(seed)
    features = trained_features(data, targets, 0.9, generator, scale=float(data.initial_states.std()))
    return network(data, seed, features)


def network(data: Transitions, seed: int, features: StateFeatures) -> dict[str, Any]:
    return {"critics": weighted(data, data.rewards, seed, kind="state", value_features=features, ridge=1e-11)}


def plain(data: Transitions, follower_rewards: Tensor, seed: int) -> dict[str, Any]:
    return {}


def unweighted(data: Transitions, follower_rewards: Tensor, seed: int) -> dict[str, Any]:
    return {"critics": CriticOptions()}


def taken(data: Transitions, follower_rewards: Tensor, seed: int, *, centring: Any = "double") -> dict[str, Any]:
    return {"critics": weighted(data, follower_rewards, seed, guiding="taken", centring=centring)}


def folded(data: Transitions, follower_rewards: Tensor, seed: int) -> dict[str, Any]:
    return {"critics": weighted(data, follower_rewards, seed, folds=5)}


def study(choice: Choice, repeats: int, *, black_box: bool = False) -> tuple[float, float, float]:
    """Mean cosine, relative root mean square error and worst cosine at zero logits."""
    theta = {key: torch.zeros(4, dtype=torch.float64) for key in ("insulation", "airflow")}
    exact = oracle.exact(np.zeros(8)).gradient
    cosines, errors = [], []
    for seed in range(repeats):
        grad = gradient(theta, seed, choice, black_box=black_box).grad
        found = ravel({key: grad[key] for key in theta}).numpy()
        cosines.append(float(found @ exact / (np.linalg.norm(found) * np.linalg.norm(exact))))
        errors.append(float(np.sum((found - exact) ** 2)))
    rmse = (sum(errors) / repeats) ** 0.5 / float(np.linalg.norm(exact))
    return statistics.mean(cosines), rmse, min(cosines)


def b_thermal_gradient(quick: bool) -> Iterator[Figure]:
    """Every choice at zero logits."""
    repeats = 6 if quick else 30
    mean, rmse, worst = study(plain, repeats)
    yield Figure("cosine", mean, "cosine", repeats, -0.2)
    yield Figure("rmse", rmse, "relative", repeats, 385.0)
    yield Figure("worst", worst, "cosine", repeats)
    choices: dict[str, Choice] = {
        "known-start": known_start,
        "state": of_state,
        "score": score,
        "features": smooth,
        "mlp": trained,
        "taken": taken,
        "single": partial(taken, centring="single"),
        "unweighted": unweighted,
        "folds": folded,
    }
    for name, choice in choices.items():
        mean, rmse, _ = study(choice, repeats)
        yield Figure(f"{name}-cosine", mean, "cosine", repeats)
        yield Figure(f"{name}-rmse", rmse, "relative", repeats)
    yield from operator_figures(repeats)


def operator_figures(repeats: int) -> Iterator[Figure]:
    """Median processor time of a gradient that shares the critics' operator, and of one that does not."""
    theta = {key: torch.zeros(4, dtype=torch.float64) for key in ("insulation", "airflow")}
    best = respond(theta)
    data, follower_rewards = observe(theta, best, 0)
    soft_value = lambda s: -((s @ best.cost_matrix) * s).sum(-1) - best.offset
    options = {"temperature": 0.1, "soft_value": soft_value, "critics": weighted(data, follower_rewards, 0)}
    separate = replace(TASK, follower=replace(TASK.follower, discount=0.9 - 1e-12))
    for name, task in (("ms", TASK), ("separate-ms", separate)):
        spent = []
        for _ in range(repeats):
            begin = time.process_time()
            boltzmann_covariance_gradient(task, POLICY, theta, best.nu, data, **options)
            spent.append(1e3 * (time.process_time() - begin))
        yield Figure(name, statistics.median(spent), "ms of processor", repeats)


def b_blackbox(quick: bool) -> Iterator[Figure]:
    """The follower fitted from the same samples."""
    repeats = 6 if quick else 30
    for name, choice in (("", plain), ("state-", of_state)):
        mean, rmse, _ = study(choice, repeats, black_box=True)
        yield Figure(f"{name}cosine", mean, "cosine", repeats)
        yield Figure(f"{name}rmse", rmse, "relative", repeats)


def sibling(name: str, theta: Params, seed: int) -> Params:
    """One of the other gradients, on the same transitions with the same features, pathwise sources."""
    best = respond(theta)
    data, follower_rewards = observe(theta, best, seed)
    soft_value = lambda s: -((s @ best.cost_matrix) * s).sum(-1) - best.offset
    critics = weighted(data, follower_rewards, seed)
    args = (TASK, POLICY, theta, best.nu, data)
    options: dict[str, Any] = {"temperature": 0.1, "soft_value": soft_value, "critics": critics}
    if name == "naive":
        return naive_leader_gradient(*args, **options).grad
    if name == "sobirl":
        return sobirl_gradient(*args, **options).grad
    other = observe(theta, best, 1000 + seed)[0] if name == "hpgd-oracle" else None
    return hpgd_gradient(*args, **options, values="td" if name == "hpgd-td" else "monte_carlo", value_data=other).grad


def b_siblings(quick: bool) -> Iterator[Figure]:
    """Naive, HPGD and SoBiRL at zero logits."""
    repeats = 6 if quick else 30
    theta = {key: torch.zeros(4, dtype=torch.float64) for key in ("insulation", "airflow")}
    exact = torch.from_numpy(oracle.exact(np.zeros(8)).gradient)
    for name in ("naive", "hpgd-mc", "hpgd-td", "hpgd-oracle", "sobirl"):
        grads = [sibling(name, theta, seed) for seed in range(repeats)]
        found = torch.stack([ravel({key: grad[key] for key in theta}) for grad in grads])
        cosine = torch.nn.functional.cosine_similarity(found, exact.unsqueeze(0)).mean()
        rmse = (found - exact).square().sum(-1).mean().sqrt() / exact.norm()
        yield Figure(f"{name}-cosine", float(cosine), "cosine", repeats)
        yield Figure(f"{name}-rmse", float(rmse), "relative", repeats)


def ascend(seed: int, iterations: int) -> tuple[list[float], float]:
    """Exact J before every iteration and at the end, and processor seconds per iteration of it all."""
    generator = torch.Generator().manual_seed(seed)
    theta = {key: 0.01 * torch.randn(4, generator=generator, dtype=torch.float64) for key in ("insulation", "airflow")}
    for value in theta.values():
        value.requires_grad_()
    optimizer = torch.optim.Adam(theta.values(), lr=0.3, betas=(0.9, 0.99), maximize=True)
    exact = lambda: oracle.exact(ravel(theta).detach().numpy(), with_gradient=False).value
    values, spent = [exact()], 0.0
    for k in range(iterations):
        begin = time.process_time()
        grad = gradient({key: value.detach() for key, value in theta.items()}, 10000 * seed + k, of_state).grad
        for key, value in theta.items():
            value.grad = grad[key]
        optimizer.step()
        spent += time.process_time() - begin
        values.append(exact())
    return values, spent / iterations


def b_thermal_return(quick: bool) -> Iterator[Figure]:
    """Returns of the ascent; the supremum is -162.503."""
    seeds, iterations = (1, 80) if quick else (5, 300)
    runs = [ascend(seed, iterations) for seed in range(seeds)]
    yield Figure("at80", min(max(values[:81]) for values, _ in runs), "return", seeds, -162.503)
    yield Figure("at80-last", min(values[80] for values, _ in runs), "return", seeds, -162.503)
    if not quick:
        yield Figure("at300", min(values[300] for values, _ in runs), "return", seeds, -162.503)
    passed = [next((k for k, value in enumerate(values) if value >= -170), iterations + 1) for values, _ in runs]
    yield Figure("iterations-to-170", max(passed), "iterations", seeds)
    yield Figure("ms", 1e3 * statistics.mean(seconds for _, seconds in runs), "ms of processor per iteration", seeds)


if __name__ == "__main__":
    main({"b-thermal-gradient": b_thermal_gradient, "b-blackbox": b_blackbox, "b-thermal-return": b_thermal_return})
