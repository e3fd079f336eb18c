"""Mixed gradients against full enumeration: trajectory by trajectory (exact) and by sampling (statistical)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from problems import scalar, seeded
from torch import Tensor

from benchmarks import mixed_instance as instance
from benchmarks.oracles import mixed_enumeration as oracle
from sim2real import Estimate, ModelMDP, Noise, Params, ravel, rollout
from sim2real.estimators import (
    mixed_gradient,
    no_baseline,
)
from sim2real.hybrid_policy import HybridPolicy, choice_entropy, continuous_first_policy, discrete_first_policy
from sim2real.rollout import discounted_return

ROUNDING = 1e-9
"""sums of some hundred float64 terms of size 10"""


def expected_gradient(
    estimator: Callable[..., Estimate], mdp: ModelMDP, policy: HybridPolicy, theta: Params, nu: Params, noise: Noise
) -> Tensor:
    """Mean of an estimator without baseline over all trajectories: one batch, rewards scaled by their probability.

    Without entropy bonus every term of the estimate is linear in the rewards of its own rollout.
    """
    with torch.no_grad():
        weights, _ = instance.probabilities(mdp, policy, theta, nu, noise)
    scaled = replace(mdp, reward=lambda th, s, a, e, f: len(weights) * weights * mdp.reward(th, s, a, e, f))
    return ravel(estimator(scaled, instance.forced(policy), theta, nu, noise).grad)


def summed_gradient(
    estimator: Callable[..., Estimate], mdp: ModelMDP, policy: HybridPolicy, theta: Params, nu: Params, noise: Noise
) -> Tensor:
    """The same with any bonus: a batch of one trajectory each."""
    with torch.no_grad():
        weights, _ = instance.probabilities(mdp, policy, theta, nu, noise)
    parts = []
    for row, weight in enumerate(weights):
        one = Noise(noise.initial[row : row + 1], noise.process[row : row + 1], noise.policy[row : row + 1])
        parts.append(weight * ravel(estimator(mdp, instance.forced(policy), theta, nu, one).grad))
    return torch.stack(parts).sum(0)


def exact_gradient(
    mdp: ModelMDP, policy: HybridPolicy, theta: Params, nu: Params, noise: Noise, wrt: str = "nu"
) -> Tensor:
    """Derivative of the enumerated return itself."""
    leaves = {key: value.clone().requires_grad_() for key, value in (nu if wrt == "nu" else theta).items()}
    weights, returns = instance.probabilities(mdp, policy, *((theta, leaves) if wrt == "nu" else (leaves, nu)), noise)
    grads = torch.autograd.grad((weights * returns).sum(), list(leaves.values()))
    return torch.cat([grad.reshape(-1) for grad in grads])


def shared_trunk(order: str, std: float) -> tuple[HybridPolicy, Params]:
    """One hidden layer for the choice and the continuous part, drawn in either order."""
    draw = partial(torch.randn, generator=seeded(3), dtype=torch.float64)
    nu = {"trunk": draw(4, 2), "d": draw(3, 4), "c": 0.3 * draw(3, 4)}
    hidden = lambda nu, s: torch.tanh(s @ nu["trunk"].mT)
    logits = lambda nu, s: hidden(nu, s) @ nu["d"].mT
    branches = lambda nu, s: (hidden(nu, s) @ nu["c"].mT).unsqueeze(-1)
    if order == "discrete first":
        return discrete_first_policy(logits, branches, choices=3, continuous_dim=1, std=std), nu
    nu["cd"] = draw(3)
    mean = lambda nu, s: branches(nu, s)[:, 0]
    after = lambda nu, s, c: logits(nu, s) + c * nu["cd"]
    return continuous_first_policy(mean, after, choices=3, continuous_dim=1, std=std), nu


def scaled_model(noise: str) -> ModelMDP:
    """The instance with a parameter in the step and one in the reward."""
    mdp = instance.model(noise)
    return replace(
        mdp,
        step=lambda theta, s, a, e: theta["gain"] * mdp.step(theta, s, a, e),
        reward=lambda theta, s, a, e, f: mdp.reward(theta, s, a, e, f) - theta["price"] * a[:, 1].square(),
    )


THETA = {"gain": scalar(0.9), "price": scalar(0.2)}


@pytest.mark.parametrize("point", instance.POINTS)
def test_the_instance_is_that_of_the_oracle(point: str) -> None:
    nu, policy, mdp = instance.parameters(point), instance.policy(), instance.model()
    noise = instance.every_trajectory(policy, 3)
    weights, returns = instance.probabilities(mdp, policy, {}, nu, noise)
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-12)
    numbers = ravel(nu).numpy()
    assert float((weights * returns).sum()) == pytest.approx(float(oracle.returns(numbers[None])[0]), abs=ROUNDING)
    expected = torch.tensor(oracle.gradient(numbers))
    torch.testing.assert_close(exact_gradient(mdp, policy, {}, nu, noise), expected, atol=ROUNDING, rtol=0)


def test_the_oracle_gives_the_figures_of_the_reference() -> None:
    """Six digits of the reference note, from another implementation (differences of an enumerated return)."""
    figures = {"far": (-9.780766, 2.975428, 0.486565), "very near": (-6.878272, 3.597032, 0.024282)}
    for point, (value, size, cross) in figures.items():
        numbers = ravel(instance.parameters(point)).numpy()
        full, dropped = (torch.tensor(oracle.gradient(numbers, kind)) for kind in ("exact", "dropped"))
        assert float(oracle.returns(numbers[None])[0]) == pytest.approx(value, abs=1e-6)
        assert float(full[9:].norm()) == pytest.approx(size, abs=1e-6)
        assert float((full - dropped).norm()) == pytest.approx(cross, abs=1e-6)


@pytest.mark.parametrize("cross_term", ["exact", "dropped"])
@pytest.mark.parametrize("point", instance.POINTS)
def test_mean_over_all_trajectories_is_the_enumerated_gradient(point: str, cross_term: str) -> None:
    """No sampling error: all 432 trajectories, against the enumeration in NumPy."""
    mdp, policy, nu = instance.model(), instance.policy(), instance.parameters(point)
    estimator = partial(mixed_gradient, cross_term=cross_term, advantage=no_baseline)
    found = expected_gradient(estimator, mdp, policy, {}, nu, instance.every_trajectory(policy, 3))
    expected = torch.tensor(oracle.gradient(ravel(nu).numpy(), cross_term))
    torch.testing.assert_close(found, expected, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("cross_term", ["exact", "dropped", "entropy"])
def test_the_entropy_bonus_is_differentiated_as_the_cross_term_says(cross_term: str) -> None:
    """All trajectories of two steps, one by one, against the enumeration in NumPy."""
    mdp, policy, nu = instance.model(), instance.policy(), instance.parameters("far")
    estimator = partial(mixed_gradient, cross_term=cross_term, temperature=0.7, advantage=no_baseline)
    found = summed_gradient(estimator, mdp, policy, {}, nu, instance.every_trajectory(policy, 2))
    expected = torch.tensor(oracle.gradient(ravel(nu).numpy(), cross_term, 0.7, horizon=2))
    torch.testing.assert_close(found, expected, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("wrt", ["nu", "theta"])
@pytest.mark.parametrize("std", [0.0, 0.4])
@pytest.mark.parametrize("order", ["discrete first", "continuous first"])
def test_shared_parameters_either_order_and_either_side(order: str, std: float, wrt: str) -> None:
    """Two-step trajectories of a shared trunk, the continuous part sure or drawn (its noise +-1), exact."""
    policy, nu = shared_trunk(order, std)
    mdp = scaled_model("none" if std else "two-point")
    noise = instance.every_trajectory(policy, 2)
    estimator = partial(mixed_gradient, wrt=wrt, advantage=no_baseline)
    found = expected_gradient(estimator, mdp, policy, THETA, nu, noise)
    torch.testing.assert_close(found, exact_gradient(mdp, policy, THETA, nu, noise, wrt), atol=ROUNDING, rtol=ROUNDING)
    dropped = expected_gradient(partial(estimator, cross_term="dropped"), mdp, policy, THETA, nu, noise)
    assert float((dropped - found).norm()) > 1e-3 * float(found.norm())  # the cross term is there to be missed


def clocked(mdp: ModelMDP) -> ModelMDP:
    """The model with the number of the step as a third state."""
    return replace(
        mdp,
        initial_state=lambda theta, e: torch.cat([mdp.initial_state(theta, e), torch.zeros_like(e)], -1),
        step=lambda theta, s, a, e: torch.cat([mdp.step(theta, s[:, :2], a, e), s[:, 2:] + 1], -1),
        reward=lambda theta, s, a, e, f: mdp.reward(theta, s[:, :2], a, e, f[:, :2]),
    )


def soft_response(mdp: ModelMDP, gains: Params, horizon: int, temperature: float) -> HybridPolicy:
    """The soft best response of the choice to `gains`, softmax(Q / temperature) by backward induction; nu: k, h."""
    branch = instance.policy().branch

    def values(state: Tensor, left: int) -> Tensor:
        """Q `[B, 3]` of the soft optimum with `left` steps to go, differentiable in the state."""
        found = []
        for choice in range(3):
            total = torch.zeros_like(state[:, 0])
            for eta in (-1.0, 1.0):
                e = torch.full_like(state[:, :1], eta)
                action = branch(gains, state, torch.full_like(state[:, 0], choice).long(), e)
                following = mdp.step({}, state, action, e)
                total = total + 0.5 * mdp.reward({}, state, action, e, following)
                if left > 1:
                    soft = temperature * torch.logsumexp(values(following, left - 1) / temperature, -1)
                    total = total + 0.5 * mdp.discount * soft
            found.append(total)
        return torch.stack(found, -1)

    def logits(nu: Params, state: Tensor) -> Tensor:
        return values(state[:, :2], horizon - int(state[0, 2])) / temperature

    def branches(nu: Params, state: Tensor) -> Tensor:
        return (state[:, :2] @ nu["k"].mT + nu["h"]).unsqueeze(-1)

    return discrete_first_policy(logits, branches, choices=3, continuous_dim=1)


@pytest.mark.parametrize("temperature", [2.0, 0.5])
def test_at_the_soft_best_response_the_decentralised_update_is_exact(temperature: float) -> None:
    """The theorem of docs/mixed.rst, all trajectories of two steps, and what dropping the cross term alone leaves."""
    mdp, point = instance.model(), instance.parameters("far")
    gains = {key: point[key] for key in ("k", "h")}
    policy, timed = soft_response(mdp, gains, 2, temperature), clocked(mdp)
    noise = instance.every_trajectory(policy, 2)
    estimator = partial(mixed_gradient, cross_term="entropy", temperature=temperature, advantage=no_baseline)
    decentralised = summed_gradient(estimator, timed, policy, {}, gains, noise)
    exact = entropy_gradient(timed, policy, gains, noise, temperature)
    torch.testing.assert_close(decentralised, exact, atol=ROUNDING, rtol=0)
    plain = exact_gradient(timed, policy, {}, gains, noise)
    assert float((decentralised - plain).norm()) > 0.01 * float(plain.norm())  # exact for the regularised return only


def entropy_gradient(mdp: ModelMDP, policy: HybridPolicy, nu: Params, noise: Noise, temperature: float) -> Tensor:
    """Derivative of the enumerated return with the entropy bonus."""
    leaves = {key: value.clone().requires_grad_() for key, value in nu.items()}
    weights, returns = instance.probabilities(mdp, policy, {}, leaves, noise)
    path = rollout(mdp, instance.forced(policy), {}, leaves, noise)
    steps = zip(path.states[:, :-1].unbind(1), path.actions.unbind(1), strict=True)
    bonus = torch.stack([choice_entropy(policy.choice_log_probs(leaves, s, a)) for s, a in steps], 1)
    total = returns + temperature * discounted_return(bonus, mdp.discount)
    grads = torch.autograd.grad((weights * total).sum(), list(leaves.values()))
    return torch.cat([grad.reshape(-1) for grad in grads])
