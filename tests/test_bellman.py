"""Bellman optima against enumeration of all policies, closed form, central differences and plain value iteration."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from sim2real.solve_report import UnconvergedError, UnconvergedWarning
from sim2real.solvers.bellman import (
    discounted_visits,
    optimal_actions,
    optimal_values,
    policy_values,
    q_values,
    state_transition,
    state_values,
)

STATES, ACTIONS, DISCOUNT = 5, 3, 0.9


def random_mdp(seed: int, *batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    reward = torch.randn(*batch, STATES, ACTIONS, generator=generator, dtype=torch.float64)
    logits = torch.randn(*batch, STATES, ACTIONS, STATES, generator=generator, dtype=torch.float64)
    return reward, torch.softmax(2 * logits, -1)


CORNERS = [random_mdp(seed) for seed in (1, 2, 3)]


def family(theta: Tensor) -> tuple[Tensor, Tensor]:
    """A smooth two-parameter family of MDPs."""
    (r0, p0), (r1, p1), (r2, p2) = CORNERS
    return r0 + theta[0] * r1 + theta[1] * r2, torch.softmax(p0.log() + theta[0] * p1 + theta[1] * p2, -1)


def chain(theta: Tensor, temperature: float, order: int = 1) -> Tensor:
    return optimal_values(*family(theta), DISCOUNT, temperature=temperature, order=order).value.square().sum()


@pytest.mark.parametrize("seed", range(5))
def test_hard_optimum_is_the_best_of_all_deterministic_policies(seed):
    reward, transition = random_mdp(seed)
    best = torch.full((STATES,), -math.inf, dtype=torch.float64)
    for choice in itertools.product(range(ACTIONS), repeat=STATES):
        rows = torch.arange(STATES)
        kernel, gain = transition[rows, list(choice)], reward[rows, list(choice)]
        value = torch.linalg.inv(torch.eye(STATES, dtype=torch.float64) - DISCOUNT * kernel) @ gain
        best = torch.maximum(best, value)  # an optimal policy attains the maximum in every state at once
    optimum = optimal_values(reward, transition, DISCOUNT)
    assert optimum.report.converged
    # both are direct linear solves of size 5: rounding only
    torch.testing.assert_close(optimum.value, best, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(optimum.q.max(-1).values, best, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.0, 0.05, 0.5])
def test_newton_agrees_with_value_iteration(temperature):
    reward, transition = random_mdp(7)
    value = torch.zeros(STATES, dtype=torch.float64)
    for _ in range(400):  # 0.9^400 = 5e-19
        value = state_values(q_values(value, reward, transition, DISCOUNT), temperature)
    optimum = optimal_values(reward, transition, DISCOUNT, temperature=temperature)
    torch.testing.assert_close(optimum.value, value, rtol=1e-11, atol=1e-11)
    assert optimum.report.steps < 15


def test_two_state_closed_form():
    """State 0: stay for 0 or pay c to reach the absorbing state 1, which pays 1 per step; V(1) = 1 / (1 - g)."""
    discount, cost = 0.8, torch.tensor(0.5, dtype=torch.float64)

    def value(c: Tensor, temperature: float = 0.0) -> Tensor:
        one = torch.ones((), dtype=torch.float64)
        reward = torch.stack([torch.stack([0 * one, -c]), torch.stack([one, one])])
        transition = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]], dtype=torch.float64)
        return optimal_values(reward, transition, discount, temperature=temperature).value

    torch.testing.assert_close(value(cost), torch.tensor([-0.5 + 0.8 / 0.2, 1 / 0.2], dtype=torch.float64))
    torch.testing.assert_close(grad(lambda c: value(c)[0])(cost), torch.tensor(-1.0, dtype=torch.float64))
    # soft: V1 = (1 + tau log 2) / (1 - g); V0 solves exp(V0 / tau) = exp(g V0 / tau) + exp((g V1 - c) / tau)
    tau = 0.7
    soft = value(cost, tau)
    v1 = (1 + tau * math.log(2)) / (1 - discount)
    assert soft[1].item() == pytest.approx(v1, rel=1e-12)
    left, right = math.exp(soft[0] / tau), math.exp(discount * soft[0] / tau) + math.exp((discount * v1 - 0.5) / tau)
    assert left == pytest.approx(right, rel=1e-11)


@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_derivatives_agree_with_central_differences_and_under_every_transform(temperature):
    theta, step = torch.tensor([0.3, -0.4], dtype=torch.float64), 1e-5

    def value(t: Tensor) -> Tensor:
        return chain(t, temperature, order=2)

    offsets = step * torch.eye(2, dtype=torch.float64)
    differences = torch.stack([(value(theta + d) - value(theta - d)) / (2 * step) for d in offsets])
    curvature = torch.stack([(grad(value)(theta + d) - grad(value)(theta - d)) / (2 * step) for d in offsets])
    # central differences with step 1e-5: truncation 1e-10 and rounding 1e-11 relative
    for first in (grad(value), jacfwd(value), jacrev(value), grad(lambda t: chain(t, temperature, order=1))):
        torch.testing.assert_close(first(theta), differences, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(hessian(value)(theta), curvature, rtol=1e-7, atol=1e-7)
    leaf = theta.clone().requires_grad_()
    value(leaf).backward()
    torch.testing.assert_close(leaf.grad, differences, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_vmap_batch_and_loop_agree(temperature):
    thetas = torch.tensor([[0.3, -0.4], [0.0, 0.0], [-0.5, 0.2]], dtype=torch.float64)
    single = torch.stack([chain(theta, temperature) for theta in thetas])
    torch.testing.assert_close(vmap(lambda t: chain(t, temperature))(thetas), single, rtol=1e-12, atol=0)
    slope = torch.stack([grad(chain)(theta, temperature) for theta in thetas])
    torch.testing.assert_close(vmap(lambda t: grad(chain)(t, temperature))(thetas), slope, rtol=1e-10, atol=1e-10)
    reward, transition = (torch.stack(parts) for parts in zip(*(family(t) for t in thetas), strict=True))
    batched = optimal_values(reward, transition, DISCOUNT, temperature=temperature)
    torch.testing.assert_close(batched.value.square().sum(-1), single, rtol=1e-12, atol=0)
    # one reward, several transitions, seen through vmap on top of a batch
    mixed = vmap(lambda p: optimal_values(reward, p, DISCOUNT, temperature=temperature).value)(transition)
    for i, j in itertools.product(range(3), repeat=2):
        alone = optimal_values(reward[j], transition[i], DISCOUNT, temperature=temperature).value
        torch.testing.assert_close(mixed[i, j], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.0, 0.2])
def test_post_decision_states_equal_the_dense_transition(temperature):
    generator = torch.Generator().manual_seed(11)
    reward, _ = random_mdp(5)
    post = torch.randint(0, 4, (STATES, ACTIONS), generator=generator)
    rows = torch.softmax(torch.randn(4, STATES, generator=generator, dtype=torch.float64), -1)
    dense = optimal_values(reward, rows[post], DISCOUNT, temperature=temperature)
    factored = optimal_values(reward, rows, DISCOUNT, post=post, temperature=temperature)
    torch.testing.assert_close(factored.q, dense.q, rtol=1e-12, atol=1e-12)
    actions = optimal_actions(dense.q, temperature)
    torch.testing.assert_close(
        state_transition(actions, rows, post=post), state_transition(actions, rows[post]), rtol=1e-14, atol=1e-14
    )
    torch.testing.assert_close(
        policy_values(actions, reward, rows, DISCOUNT, post=post),
        policy_values(actions, reward, rows[post], DISCOUNT),
        rtol=1e-12,
        atol=1e-12,
    )
    seen = vmap(lambda r: optimal_values(reward, r, DISCOUNT, post=post, temperature=temperature).value)(
        torch.stack([rows, rows.flip(0)])
    )
    torch.testing.assert_close(seen[0], factored.value, rtol=1e-12, atol=1e-12)


def test_policy_values_agree_with_a_long_sum_and_visits_are_their_dual():
    reward, transition = random_mdp(9, 2)
    actions = torch.softmax(reward, -1)
    kernel, gain = torch.einsum("bsa,bsax->bsx", actions, transition), (actions * reward).sum(-1)
    total, weights = torch.zeros_like(gain), torch.eye(STATES, dtype=torch.float64).expand(2, STATES, STATES)
    for t in range(400):
        total = total + DISCOUNT**t * (weights @ gain.unsqueeze(-1)).squeeze(-1)
        weights = weights @ kernel
    value = policy_values(actions, reward, transition, DISCOUNT)
    torch.testing.assert_close(value, total, rtol=1e-12, atol=1e-12)
    start = torch.full((2, STATES), 1 / STATES, dtype=torch.float64)
    visits = discounted_visits(start, actions, transition, DISCOUNT)
    torch.testing.assert_close((visits * gain).sum(-1), (start * value).sum(-1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(visits.sum(-1), torch.full((2,), 10.0, dtype=torch.float64))


def test_ties_go_to_the_first_action_and_stay_a_distribution():
    q = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64)
    assert optimal_actions(q).tolist() == [[1.0, 0.0, 0.0]]
    assert grad(lambda x: state_values(x).sum())(q).tolist() == [[1.0, 0.0, 0.0]]


def test_order_zero_carries_no_derivative():
    reward, transition = random_mdp(3)
    reward.requires_grad_()
    assert not optimal_values(reward, transition, DISCOUNT, order=0).value.requires_grad


def test_an_unconverged_search_says_so():
    reward, transition = random_mdp(4)
    with pytest.warns(UnconvergedWarning, match="max_steps = 1"):
        report = optimal_values(reward, transition, 0.99, temperature=0.1, max_steps=1).report
    assert not report.converged
    assert report.residual > 1e-8
    with pytest.raises(UnconvergedError, match="raise max_steps or tol"):
        optimal_values(reward, transition, 0.99, temperature=0.1, max_steps=1, strict=True)


def _bad(kind: str) -> dict[str, object]:
    reward, transition = random_mdp(6)
    post = torch.zeros(STATES, ACTIONS, dtype=torch.long)
    return {
        "discount": {"reward": reward, "transition": transition, "discount": 1.0},
        "reward": {"reward": reward[0], "transition": transition, "discount": 0.9},
        "transition": {"reward": reward, "transition": transition[:2], "discount": 0.9},
        "post": {"reward": reward, "transition": transition[0], "discount": 0.9, "post": post[0]},
        "integers": {"reward": reward, "transition": transition[0], "discount": 0.9, "post": post + 3},
        "distribution": {"reward": reward, "transition": 1.1 * transition, "discount": 0.9},
        "finite": {"reward": reward / 0.0, "transition": transition, "discount": 0.9},
        "temperature": {"reward": reward, "transition": transition, "discount": 0.9, "temperature": -1.0},
    }[kind]


@pytest.mark.parametrize(
    "kind", ["discount", "reward", "transition", "post", "integers", "distribution", "finite", "temperature"]
)
def test_bad_input_is_refused_with_its_name(kind):
    with pytest.raises(ValueError, match=kind):
        optimal_values(**_bad(kind))


def test_values_and_visits_of_a_policy_refuse_the_same():
    reward, transition = random_mdp(6)
    actions, start = optimal_actions(reward), torch.ones(STATES, dtype=torch.float64) / STATES
    for discount in (1.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="discount"):
            policy_values(actions, reward, transition, discount)
        with pytest.raises(ValueError, match="discount"):
            discounted_visits(start, actions, transition, discount)
    for function in (state_values, optimal_actions):
        for temperature in (-1.0, math.nan):
            with pytest.raises(ValueError, match="temperature"):
                function(reward, temperature)


def test_values_of_a_policy_have_the_same_derivatives_in_every_mode():
    """torch.linalg.solve gives wrong numbers here without an error: pytorch/pytorch issue 192540."""
    actions = torch.softmax(random_mdp(4)[0], -1)
    start = torch.full((STATES,), 1.0 / STATES, dtype=torch.float64)

    def value(x: Tensor) -> Tensor:
        reward, transition = family(torch.stack([x, x * x]))
        chosen = torch.softmax(x * actions, -1)
        return policy_values(chosen, reward, transition, DISCOUNT).sum() + (
            discounted_visits(start, chosen, transition, DISCOUNT) @ reward[:, 0]
        )

    x = torch.tensor([0.1, 0.3], dtype=torch.float64)
    slopes = torch.stack([jacrev(value)(point) for point in x])
    for mode in (jacrev, jacfwd):
        torch.testing.assert_close(vmap(mode(value))(x), slopes, rtol=1e-11, atol=1e-11)
    bend = jacrev(jacrev(value))(x[0])
    for second in (jacfwd(jacrev(value)), jacrev(jacfwd(value)), jacfwd(jacfwd(value))):
        torch.testing.assert_close(second(x[0]), bend, rtol=1e-10, atol=1e-10)
