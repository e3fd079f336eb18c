"""Mixed gradients against full enumeration: trajectory by trajectory (exact) and by sampling (statistical)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from problems import scalar, seeded
from torch import Tensor

from benchmarks import mixed_instance as instance
from benchmarks.oracles import mixed_enumeration as oracle
from sim2real import Estimate, ModelMDP, Noise, Params, linear_policy, ravel, rollout, sample_noise
from sim2real.estimators import (
    Advantage,
    all_action_gradient,
    counterfactual_gradient,
    critic_baseline,
    finite_difference_gradient,
    input_baseline,
    mixed_gradient,
    no_baseline,
    pathwise_gradient,
    score_function_gradient,
    square_states,
    state_baseline,
    straight_through_gradient,
    time_baseline,
)
from sim2real.estimators.straight_through import _gumbel_given
from sim2real.hybrid_policy import HybridPolicy, choice_entropy, continuous_first_policy, discrete_first_policy
from sim2real.rollout import Rollout, discounted_return

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


@pytest.mark.parametrize("temperature", [pytest.param(2.0, marks=pytest.mark.slow), 0.5])
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


def sampled(estimator: Callable[..., Estimate], point: str, batches: int, batch: int, std: float = 0.0) -> Tensor:
    """Gradients `[batches, 18]` of independent batches at a point; with a std the noise is the policy's, Gaussian."""
    mdp, policy = instance.model("none" if std else "two-point"), instance.policy(std)
    nu, generator = instance.parameters(point), seeded(7)
    noises = (sample_noise(mdp, policy, batch, 3, generator) for _ in range(batches))
    return torch.stack([ravel(estimator(mdp, policy, {}, nu, noise).grad) for noise in noises])


def rough_value(state: Tensor, action: Tensor) -> Tensor:
    return -(1.05 * state + 0.7 * action[:, 1:]).square().sum(-1)


@pytest.mark.parametrize(
    "estimator",
    [
        partial(mixed_gradient, advantage=state_baseline()),
        partial(mixed_gradient, advantage=state_baseline(square_states)),
        partial(mixed_gradient, advantage=input_baseline()),
        partial(mixed_gradient, advantage=critic_baseline(lambda s: -2.0 * s.square().sum(-1))),
        counterfactual_gradient,
        partial(all_action_gradient, action_value=rough_value),
    ],
    ids=["state", "squares", "input", "critic", "counterfactual", "all-action"],
)
def test_every_baseline_and_branch_keeps_the_mean(estimator: Callable[..., Estimate]) -> None:
    """100 batches of 60 at "far" against the enumeration, 4.2 standard errors for each of 18 numbers.

    False alarms: t with 99 degrees of freedom, 6e-5 each, 0.1 % in all.
    """
    gradients = sampled(estimator, "far", 100, 60)
    exact = torch.tensor(oracle.gradient(ravel(instance.parameters("far")).numpy()))
    error = gradients.mean(0) - exact
    assert bool((error.abs() <= 4.2 * gradients.std(0) / 10).all()), error


@pytest.mark.parametrize(
    "advantage",
    [
        time_baseline,
        state_baseline(lambda s: s[:, :1]),
        input_baseline(lambda s, future: (s[:, 0] * future[:, -1, 0] + future[:, -1, 1]).unsqueeze(-1)),
    ],
    ids=["time", "state", "input"],
)
def test_leave_one_out_is_unbiased_in_a_batch_of_two(advantage: Advantage) -> None:
    """No sampling error: all pairs of the 36 trajectories of two steps from one start, against the enumerated return.

    The estimate is linear in the advantage, so its mean over the partner is that at the mean advantage.
    """
    mdp, policy, nu = instance.model(), instance.policy(), instance.parameters("far")
    noise = instance.every_trajectory(policy, 2)
    noise = Noise(*(part[36:] for part in (noise.initial, noise.process, noise.policy)))
    with torch.no_grad():
        weights, _ = instance.probabilities(mdp, policy, {}, nu, noise)  # sum to 1/2, the share of the start
        path = rollout(mdp, instance.forced(policy), {}, nu, noise)
    mean = torch.zeros_like(path.rewards)
    for i, j in itertools.combinations_with_replacement(range(len(weights)), 2):
        pair = Rollout(*(part[[i, j]] for part in (path.states, path.actions, path.rewards)))
        drawn = Noise(*(part[[i, j]] for part in (noise.initial, noise.process, noise.policy)))
        first, second = advantage(pair, drawn, mdp.discount)
        mean[i] += 2 * weights[j] * first
        if i != j:
            mean[j] += 2 * weights[i] * second
    scaled = len(weights) * weights.unsqueeze(-1) * mean  # `expected_gradient` scales the rewards likewise
    estimator = partial(mixed_gradient, advantage=lambda drawn, noise, discount: scaled)
    found = expected_gradient(estimator, mdp, policy, {}, nu, noise)
    torch.testing.assert_close(found, exact_gradient(mdp, policy, {}, nu, noise), atol=ROUNDING, rtol=0)


def test_what_lowers_the_variance_does() -> None:
    """At "far", of phi: baselines cut it more than five times, branches five times more. 6000 rollouts each: a ratio of
    two variances is good to some 10 %, the factors enumerated or measured elsewhere are 13 and 12."""
    variance = lambda estimator: float(sampled(estimator, "far", 60, 100)[:, :9].var(0).sum())
    none = variance(partial(mixed_gradient, advantage=no_baseline))
    state = variance(partial(mixed_gradient, advantage=state_baseline()))
    branches = variance(counterfactual_gradient)
    assert none > 5 * state > 25 * branches


def test_a_swapped_import_is_all_it_takes() -> None:
    """All siblings take the same call. Pure score agrees with mixed within 4.8 standard errors of their difference
    (false alarms: t with 29 degrees of freedom, 4e-5 for each of 18); those that skip the choice are off by 6."""
    mixed = sampled(mixed_gradient, "far", 30, 150, std=0.5)
    beyond = lambda found: (mixed - found).mean(0).abs() / ((mixed - found).std(0) / 30**0.5)
    score = sampled(partial(score_function_gradient, advantage=state_baseline()), "far", 30, 150, std=0.5)
    assert float(beyond(score).max()) < 4.8
    gumbel = partial(straight_through_gradient, gumbel=seeded(1))
    for biased in (pathwise_gradient, straight_through_gradient, gumbel):
        assert float(beyond(sampled(biased, "far", 30, 150, std=0.5)).max()) > 6


def test_straight_through_and_differences_are_right_where_nothing_is_chosen() -> None:
    """One choice only: no jump, so all siblings give the pathwise gradient of the same noise."""
    mdp = instance.model()
    policy = discrete_first_policy(
        lambda nu, s: s[:, :1] * 0, lambda nu, s: (s @ nu["k"].mT).unsqueeze(-1), choices=1, continuous_dim=1
    )
    nu = {"k": torch.tensor([[-0.6, 0.1]], dtype=torch.float64)}
    noise = sample_noise(mdp, policy, 30, 3, seeded(0))
    exact = pathwise_gradient(mdp, policy, {}, nu, noise).grad["k"]
    for sibling in (mixed_gradient, counterfactual_gradient, straight_through_gradient, finite_difference_gradient):
        # Richardson differences leave h^4, about 1e-9 of the size 10
        torch.testing.assert_close(sibling(mdp, policy, {}, nu, noise).grad["k"], exact, rtol=1e-7, atol=1e-7)


def test_gumbel_noise_given_the_choice_has_the_right_law() -> None:
    """Prior of g is standard Gumbel when the choice is drawn from pi: mean 0.5772, variance pi^2 / 6, arg max = choice.

    40000 draws; 4.5 standard errors of three means (0.0064 each).
    """
    log_pi = torch.log_softmax(torch.tensor([1.0, 0.0, -1.5], dtype=torch.float64), -1).expand(40_000, 3)
    choice = torch.multinomial(log_pi.exp(), 1, generator=seeded(1))[:, 0]
    g = _gumbel_given(log_pi, choice, seeded(2))
    assert torch.equal((log_pi + g).argmax(-1), choice)
    assert float((g.mean(0) - 0.577216).abs().max()) < 4.5 * 0.0064
    assert float((g.var(0) - torch.pi**2 / 6).abs().max()) < 0.1  # 4.5 standard errors: 4.4 times var / sqrt(n)


def test_gumbel_noise_stands_choices_that_are_impossible() -> None:
    """Probability 0, and one below the smallest float64: a third choice that is masked out changes nothing."""
    mdp, nu = instance.model(), instance.parameters("far")
    noise = sample_noise(mdp, instance.policy(), 20, 3, seeded(0))
    found = []
    for gap in (-800.0, -torch.inf):
        shift = torch.tensor([0.0, 0.0, gap], dtype=torch.float64)
        logits = lambda nu, s, shift=shift: s @ nu["W"].mT + nu["b"] + shift
        branches = lambda nu, s: (s @ nu["k"].mT + nu["h"]).unsqueeze(-1)
        masked = discrete_first_policy(logits, branches, choices=3, continuous_dim=1)
        found.append(ravel(straight_through_gradient(mdp, masked, {}, nu, noise, gumbel=seeded(1)).grad))
    assert bool(torch.isfinite(found[0]).all())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("with_input", [False, True])
def test_leave_one_out_is_a_fit_without_the_row(with_input: bool) -> None:
    """Each rollout's baseline by an explicit fit to all others."""
    mdp, policy, nu = instance.model(), instance.policy(), instance.parameters("far")
    noise = sample_noise(mdp, policy, 40, 3, seeded(3))
    with torch.no_grad():
        drawn = rollout(mdp, policy, {}, nu, noise)
    features = lambda s, future: torch.cat([square_states(s), future[:, 0, :1]], -1)
    advantage = input_baseline(features) if with_input else state_baseline(square_states)
    found = advantage(drawn, noise, 0.95)
    to_go = no_baseline(drawn, noise, 0.95)
    for t in (1, 2):
        future = torch.cat([noise.process, torch.zeros(40, 3, 1)], -1)[:, t:]
        table = features(drawn.states[:, t], future) if with_input else square_states(drawn.states[:, t])
        for row in (0, 17):
            others = torch.arange(40) != row
            weights = torch.linalg.lstsq(table[others], to_go[others, t : t + 1]).solution
            expected = to_go[row, t] - (table[row] @ weights).squeeze()
            assert float(found[row, t]) == pytest.approx(float(expected), rel=1e-8)


def test_generalised_advantages_by_their_definition() -> None:
    mdp, policy, nu = instance.model(), instance.policy(), instance.parameters("far")
    noise = sample_noise(mdp, policy, 6, 3, seeded(3))
    with torch.no_grad():
        drawn = rollout(mdp, policy, {}, nu, noise)
    value = lambda s: -s.square().sum(-1)
    gamma, trace = 0.95, 0.8
    for bootstrap in (False, True):
        v = value(drawn.states)
        v[:, -1] = v[:, -1] if bootstrap else 0.0
        delta = drawn.rewards + gamma * v[:, 1:] - v[:, :-1]
        found = critic_baseline(value, trace=trace, bootstrap=bootstrap)(drawn, noise, gamma)
        for t in range(3):
            expected = gamma**t * sum((gamma * trace) ** k * delta[:, t + k] for k in range(3 - t))
            torch.testing.assert_close(found[:, t], expected)
    plain = no_baseline(drawn, noise, gamma)
    full = critic_baseline(value)(drawn, noise, gamma)
    torch.testing.assert_close(full, plain - gamma ** torch.arange(3) * value(drawn.states[:, :-1]))


def test_ended_rollouts_count_for_nothing() -> None:
    """A terminal state that no parameter moves ends half of the rollouts: the rest is a shorter problem."""
    mdp, policy, nu = instance.model(), instance.policy(), instance.parameters("far")
    timed = clocked(mdp)
    ended = replace(timed, terminal=lambda theta, s: s[:, 2] > 0.5)
    wide = replace(
        policy,
        act=lambda nu, s, e: policy.act(nu, s[:, :2], e),
        choice_log_probs=lambda nu, s, a: policy.choice_log_probs(nu, s[:, :2], a),
        branch=lambda nu, s, k, e: policy.branch(nu, s[:, :2], k, e),
    )
    noise = sample_noise(mdp, policy, 40, 3, seeded(4))
    short = Noise(noise.initial, noise.process[:, :1], noise.policy[:, :1])
    state = state_baseline(lambda s: square_states(s[:, :2]))
    for estimator in (
        mixed_gradient,
        partial(mixed_gradient, advantage=state),
        partial(mixed_gradient, temperature=0.3),
        counterfactual_gradient,
        partial(counterfactual_gradient, temperature=0.3),
        partial(all_action_gradient, action_value=lambda s, a: rough_value(s[:, :2], a)),
        straight_through_gradient,
    ):
        found, expected = (ravel(estimator(ended, wide, {}, nu, e).grad) for e in (noise, short))
        torch.testing.assert_close(found, expected)


def drawing_model() -> ModelMDP:
    """A plant that is hit (state 1 = 1) with a probability that depends on state and action, moving state 0 then."""

    def chance(theta: Params, s: Tensor, a: Tensor) -> Tensor:
        return torch.sigmoid(theta["risk"] + 0.8 * s[:, 0] + 0.5 * a[:, 1])

    def step(theta: Params, s: Tensor, a: Tensor, e: Tensor) -> Tensor:
        hit = (torch.special.ndtr(e[:, 0]) < chance(theta, s, a).detach()).double()
        moved = 0.8 * s[:, 0] + a[:, 1] + 0.6 * hit + 0.2 * a[:, 0]
        return torch.stack([moved, hit], -1)

    def log_prob(theta: Params, s: Tensor, a: Tensor, following: Tensor) -> Tensor:
        p = chance(theta, s, a)
        return torch.where(following[:, 1] > 0.5, p, 1 - p).log()

    return ModelMDP(
        initial_state=lambda theta, e: torch.cat([e, torch.zeros_like(e)], -1),
        step=step,
        reward=lambda theta, s, a, e, f: -f[:, 0].square() - f[:, 1] - 0.1 * a[:, 1].square(),
        noise_dims=(1, 1),
        dt=1.0,
        log_prob=log_prob,
    )


@pytest.mark.parametrize("wrt", ["nu", "theta"])
def test_categories_that_the_model_draws_are_scored_too(wrt: str) -> None:
    """Two steps, from one fixed state; all 16 outcomes enumerated. 8000 rollouts, 4.5 standard errors from 50 groups
    (false alarms 4e-5 for each of five numbers); without `sampled_model` the estimate is off."""
    mdp = replace(drawing_model(), initial_state=lambda theta, e: torch.cat([0.3 + 0 * e, 0 * e], -1))
    policy = discrete_first_policy(
        lambda nu, s: s[:, :1] * nu["w"], lambda nu, s: (s[:, :1] @ nu["k"]).unsqueeze(-1), choices=2, continuous_dim=1
    )
    nu = {"w": torch.tensor([[1.0, -0.5]]).double(), "k": torch.tensor([[-0.4, -0.9]]).double()}
    theta = {"risk": scalar(-0.2)}
    moved = nu if wrt == "nu" else theta
    leaves = {key: value.clone().requires_grad_() for key, value in moved.items()}
    at = (theta, leaves) if wrt == "nu" else (leaves, nu)
    total = torch.zeros((), dtype=torch.float64)
    for choices in itertools.product((0, 1), repeat=2):
        for hits in itertools.product((-40.0, 40.0), repeat=2):  # noise that hits or misses for certain
            s, p, worth = torch.tensor([[0.3, 0.0]], dtype=torch.float64), torch.ones(1, dtype=torch.float64), 0.0
            for choice, e in zip(choices, hits, strict=True):
                a = policy.branch(at[1], s, torch.tensor([choice]), torch.zeros(1, 1, dtype=torch.float64))
                following = mdp.step(at[0], s, a, torch.full((1, 1), e, dtype=torch.float64))
                p = (
                    p
                    * policy.choice_log_probs(at[1], s, a)[:, choice].exp()
                    * mdp.log_prob(at[0], s, a, following).exp()
                )
                worth = worth + mdp.reward(at[0], s, a, s, following)
                s = following
            total = total + (p * worth).sum()
    exact = torch.cat([g.reshape(-1) for g in torch.autograd.grad(total, list(leaves.values()))])
    noise = sample_noise(mdp, policy, 8000, 2, seeded(5))
    estimate = mixed_gradient(mdp, policy, theta, nu, noise, wrt=wrt, sampled_model=True, groups=50)
    error = (ravel(estimate.grad) - exact).abs()
    assert bool((error <= 4.5 * estimate.info["stderr"]).all()), error
    if wrt == "nu":
        without = mixed_gradient(mdp, policy, theta, nu, noise, groups=50)
        assert bool(((ravel(without.grad) - exact).abs() > 6 * without.info["stderr"]).any())


def test_what_step_differentiates_must_not_be_scored_again() -> None:
    mdp, policy = drawing_model(), instance.policy()
    density = lambda theta, s, a, f: -(f[:, 0] - s[:, 0]).square()
    nu, noise = instance.parameters("far"), sample_noise(mdp, policy, 8, 2, seeded(0))
    theta = {"risk": scalar(0.0)}
    with pytest.raises(ValueError, match=r"density of the state columns \[0\]"):
        mixed_gradient(replace(mdp, log_prob=density), policy, theta, nu, noise, sampled_model=True)
    with pytest.raises(ValueError, match="needs the model's log_prob"):
        mixed_gradient(replace(mdp, log_prob=None), policy, theta, nu, noise, sampled_model=True)


def test_error_and_effective_size_are_told() -> None:
    """The stated error is the spread over 20 seeds within four of its 16 %; the size lies between 1 and the batch."""
    mdp, policy, nu = instance.model(), instance.policy(), instance.parameters("far")
    noises = [sample_noise(mdp, policy, 200, 3, seeded(seed)) for seed in range(20)]
    estimates = [mixed_gradient(mdp, policy, {}, nu, noise, groups=5) for noise in noises]
    spread = torch.stack([ravel(e.grad) for e in estimates]).std(0)
    told = torch.stack([e.info["stderr"].square() for e in estimates]).mean(0).sqrt()
    torch.testing.assert_close(told, spread, rtol=0.65, atol=0)
    assert all(1 < float(e.info["effective_sample_size"]) < 200 for e in estimates)
    one = mixed_gradient(mdp, policy, {}, nu, sample_noise(mdp, policy, 1, 3, seeded(0)), advantage=no_baseline)
    assert float(one.info["value_stderr"]) == float("inf")


def test_bad_requests_are_named() -> None:
    mdp, policy, nu = instance.model(), instance.policy(), instance.parameters("far")
    noise = sample_noise(mdp, policy, 8, 3, seeded(0))
    for options, message in (
        ({"wrt": "state"}, "wrt must be"),
        ({"cross_term": "off"}, "cross_term must be"),
        ({"cross_term": "entropy"}, "temperature > 0"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"advantage": state_baseline()}, "take at least 12 rollouts"),
        ({"advantage": lambda drawn, noise, discount: drawn.rewards[:, :1]}, "advantage gave"),
        ({"advantage": critic_baseline(lambda s: s)}, "value gave 64 numbers"),
        ({"wrt": "theta"}, "depend"),
    ):
        with pytest.raises(ValueError, match=message):
            mixed_gradient(mdp, policy, {"x": scalar(1.0)}, nu, noise, **options)
    with pytest.raises(ValueError, match="trace must lie"):
        critic_baseline(rough_value, trace=1.5)
    with pytest.raises(ValueError, match="action_value gave"):
        all_action_gradient(mdp, policy, {}, nu, noise, action_value=lambda s, a: s)
    with pytest.raises(ValueError, match="temperature must be > 0"):
        straight_through_gradient(mdp, policy, {}, nu, noise, temperature=0.0)
    with pytest.raises(ValueError, match="depend"):
        straight_through_gradient(mdp, policy, {"x": scalar(1.0)}, nu, noise, wrt="theta")
    black_box = replace(mdp, derivative_order=0)
    for estimator in (mixed_gradient, straight_through_gradient):
        with pytest.raises(ValueError, match="derivative_order 0"):
            estimator(black_box, policy, {}, nu, noise)
        with pytest.raises(ValueError, match="needs a HybridPolicy"):
            estimator(mdp, linear_policy(2), {}, nu, noise)
