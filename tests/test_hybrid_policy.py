"""Hybrid policies: draws and log-probabilities against torch.distributions, quadrature and finite differences."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from problems import seeded
from torch import Tensor, nn
from torch.distributions import Categorical, Normal

from sim2real import ModelMDP, Params, rollout, sample_noise
from sim2real.cut_axis import axis_cells, box_cells, cut_policy
from sim2real.estimators import finite_difference_gradient, mixed_gradient
from sim2real.hybrid_policy import (
    HybridPolicy,
    choice_entropy,
    continuous_first_policy,
    discrete_first_policy,
    greedy_policy,
    hybrid_module_policy,
)

NU = {
    "W": torch.tensor([[0.5, -1.0], [0.2, 0.3], [-0.4, 0.9]], dtype=torch.float64),
    "k": torch.tensor([[1.0, 0.0], [0.0, -1.0], [0.5, 0.5]], dtype=torch.float64),
    "s": torch.tensor([0.3, 0.5, 0.8], dtype=torch.float64),
}
INF = math.inf


def logits(nu: Params, state: Tensor) -> Tensor:
    return state @ nu["W"].mT


def branches(nu: Params, state: Tensor) -> Tensor:
    return (state @ nu["k"].mT).unsqueeze(-1)


def spread(nu: Params, state: Tensor) -> Tensor:
    return nu["s"].reshape(1, 3, 1).expand(len(state), 3, 1)


def states(count: int) -> Tensor:
    return torch.randn(count, 2, generator=seeded(0), dtype=torch.float64)


def drawn(policy: HybridPolicy, count: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """One state, many actions."""
    state = torch.tensor([0.7, -0.4], dtype=torch.float64).expand(count, 2)
    noise = torch.randn(count, policy.noise_dim, generator=seeded(seed), dtype=torch.float64)
    return state, policy.act(NU, state, noise)


def test_discrete_first_log_prob_is_that_of_the_two_distributions() -> None:
    policy = discrete_first_policy(logits, branches, choices=3, continuous_dim=1, std=spread)
    state = states(50)
    action = policy.act(NU, state, torch.randn(50, 2, generator=seeded(1), dtype=torch.float64))
    d, c = action[:, 0].long(), action[:, 1]
    of_choice = Categorical(logits=logits(NU, state)).log_prob(d)
    of_point = Normal(branches(NU, state)[torch.arange(50), d, 0], NU["s"][d]).log_prob(c)
    torch.testing.assert_close(policy.log_prob(NU, state, action), of_choice + of_point)
    torch.testing.assert_close(policy.choice_log_probs(NU, state, action), torch.log_softmax(logits(NU, state), -1))
    assert torch.equal(policy.index(action), d)


def test_continuous_first_log_prob_is_that_of_the_two_distributions() -> None:
    mean = lambda nu, s: s @ nu["k"][:2].mT
    after = lambda nu, s, c: logits(nu, s) + c[:, :1] * nu["s"]
    policy = continuous_first_policy(mean, after, choices=3, continuous_dim=2, std=0.4)
    state = states(50)
    action = policy.act(NU, state, torch.randn(50, 3, generator=seeded(1), dtype=torch.float64))
    d, c = action[:, 0].long(), action[:, 1:]
    expected = Categorical(logits=after(NU, state, c)).log_prob(d) + Normal(mean(NU, state), 0.4).log_prob(c).sum(-1)
    torch.testing.assert_close(policy.log_prob(NU, state, action), expected)


@pytest.mark.parametrize("order", ["discrete first", "continuous first"])
def test_frequencies_of_choices_are_their_probabilities(order: str) -> None:
    """20000 draws at one state; 4 standard errors of a frequency, three of them: false alarms 2e-4."""
    if order == "discrete first":
        policy = discrete_first_policy(logits, branches, choices=3, continuous_dim=1, std=0.3)
    else:
        policy = continuous_first_policy(
            lambda nu, s: branches(nu, s)[:, 0], lambda nu, s, c: logits(nu, s), choices=3, continuous_dim=1, std=0.3
        )
    state, action = drawn(policy, 20000)
    expected = torch.softmax(logits(NU, state[:1]), -1)[0]
    share = torch.bincount(policy.index(action), minlength=3) / 20000
    assert bool(((share - expected).abs() <= 4 * (expected * (1 - expected) / 20000).sqrt()).all())


def test_branch_and_greedy_share_the_noise_and_the_likeliest_choice() -> None:
    policy = discrete_first_policy(logits, branches, choices=3, continuous_dim=1, std=0.3)
    state, noise = states(20), torch.randn(20, 2, generator=seeded(1), dtype=torch.float64)
    action = policy.act(NU, state, noise)
    torch.testing.assert_close(policy.branch(NU, state, policy.index(action), noise), action)
    best = logits(NU, state).argmax(-1)
    greedy = greedy_policy(policy)
    expected = torch.stack([best.double(), branches(NU, state)[torch.arange(20), best, 0]], -1)
    torch.testing.assert_close(greedy.act(NU, state, noise[:, :0]), expected)
    with pytest.raises(ValueError, match="deterministic"):
        greedy.log_prob(NU, state, action)


def test_a_branch_not_taken_spoils_nothing() -> None:
    """The other branch is 1e260 with a slope of 1e263; value and derivative of the taken one are exact."""
    policy = discrete_first_policy(
        lambda nu, s: s.new_tensor([50.0, -50.0]).expand(len(s), 2),
        lambda nu, s: torch.stack([nu["x"] * s, torch.exp(300.0 * nu["x"] * s)], -2),
        choices=2,
        continuous_dim=1,
    )
    x = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    action = policy.act({"x": x}, torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64))
    (slope,) = torch.autograd.grad(action[0, 1], x)
    assert (float(action[0, 1].detach()), float(slope)) == (2.0, 1.0)


def test_without_continuous_part_it_is_a_categorical() -> None:
    policy = discrete_first_policy(logits, lambda nu, s: s.new_zeros(len(s), 3, 0), choices=3, continuous_dim=0)
    state, action = drawn(policy, 8)
    assert action.shape == (8, 1)
    torch.testing.assert_close(
        policy.log_prob(NU, state, action), Categorical(logits=logits(NU, state)).log_prob(action[:, 0].long())
    )


def test_two_modules_make_one_policy() -> None:
    torch.manual_seed(0)
    discrete, continuous = nn.Linear(2, 3).double(), nn.Linear(2, 6).double()
    policy, nu = hybrid_module_policy(discrete, continuous, choices=3, continuous_dim=2, std=0.1)
    assert sorted(nu) == ["continuous.bias", "continuous.weight", "discrete.bias", "discrete.weight"]
    state = states(4)
    action = policy.branch(nu, state, torch.tensor([0, 1, 2, 1]), torch.zeros(4, 3, dtype=torch.float64))
    expected = continuous(state).reshape(4, 3, 2)[torch.arange(4), [0, 1, 2, 1]]
    torch.testing.assert_close(action[:, 1:], expected.detach())
    torch.testing.assert_close(
        policy.choice_log_probs(nu, state, action), torch.log_softmax(discrete(state), -1).detach()
    )


def test_entropy_of_certain_and_impossible_choices() -> None:
    log_probs = torch.log_softmax(torch.tensor([[0.0, 0.0], [0.0, -INF]], dtype=torch.float64), -1).requires_grad_()
    entropy = choice_entropy(log_probs)
    torch.testing.assert_close(entropy.detach(), torch.tensor([math.log(2), 0.0], dtype=torch.float64))
    (slope,) = torch.autograd.grad(entropy.sum(), log_probs)
    assert bool(torch.isfinite(slope).all())


def raw_policy(choices: int, columns: int, std: float) -> HybridPolicy:
    """Constant logits and centres, z."""
    centers = torch.linspace(-1.0, 1.0, choices * columns, dtype=torch.float64).reshape(choices, columns)
    shift = torch.linspace(0.3, -0.5, choices, dtype=torch.float64)
    return discrete_first_policy(
        lambda nu, s: (shift + s[:, :1] * 0).expand(len(s), choices),
        lambda nu, s: nu["scale"] * centers.expand(len(s), choices, columns),
        choices=choices,
        continuous_dim=columns,
        std=std,
    )


def test_density_of_a_cut_axis_integrates_to_one() -> None:
    """Trapezoids over each interval, dense at the cuts: the mass of each cell is its probability, to 1e-6."""
    policy = cut_policy(raw_policy(4, 1, 0.6), axis_cells([-1.0, 0.5, 2.0], scale=0.7))
    nu = {"scale": torch.tensor(1.0, dtype=torch.float64)}
    inner = torch.linspace(1e-4, 1 - 1e-4, 200_001, dtype=torch.float64)
    grids = [-1 - 30 * inner**3, -1 + 1.5 * inner, 0.5 + 1.5 * inner, 2 + 30 * inner**3]
    expected = torch.softmax(torch.linspace(0.3, -0.5, 4, dtype=torch.float64), -1)
    for cell, grid in enumerate(grids):
        state = torch.zeros(len(grid), 1, dtype=torch.float64)
        assert bool((policy.index(grid.unsqueeze(-1)) == cell).all())
        density = policy.log_prob(nu, state, grid.unsqueeze(-1)).exp()
        assert float(torch.trapezoid(density, grid).abs()) == pytest.approx(float(expected[cell]), abs=1e-6)


def test_draws_stay_in_their_cell_and_have_the_density_of_a_histogram() -> None:
    """100000 draws on one axis; bins against the integral of exp(log_prob), 4.5 standard errors of each of 40 bins
    (false alarms 3e-4)."""
    base = raw_policy(3, 1, 0.8)
    policy = cut_policy(base, axis_cells([0.0, 1.0], scale=2.0))
    nu = {"scale": torch.tensor(1.0, dtype=torch.float64)}
    state = torch.zeros(100_000, 1, dtype=torch.float64)
    noise = torch.randn(100_000, 2, generator=seeded(2), dtype=torch.float64)
    action = policy.act(nu, state, noise)
    assert torch.equal(policy.index(action), base.index(base.act(nu, state, noise)))
    edges = torch.linspace(-3, 3, 41, dtype=torch.float64)
    seen = torch.histogram(action[:, 0], edges).hist / 100_000
    for left, right, share in zip(edges[:-1], edges[1:], seen, strict=True):
        grid = torch.linspace(float(left) + 1e-9, float(right) - 1e-9, 401, dtype=torch.float64).unsqueeze(-1)
        mass = float(torch.trapezoid(policy.log_prob(nu, state[:401], grid).exp(), grid[:, 0]))
        assert abs(float(share) - mass) <= 4.5 * (mass / 100_000) ** 0.5 + 1e-4  # trapezoids: below 1e-4


def test_an_atom_has_a_probability_and_its_neighbour_a_density() -> None:
    """Order nothing, or a positive amount of two items: a joint choice with an atom in both columns."""
    zero = torch.zeros(2, 2, dtype=torch.float64)
    cells = box_cells(zero, torch.tensor([[0.0, 0.0], [INF, INF]], dtype=torch.float64))
    base = raw_policy(2, 2, 0.5)
    policy, nu = cut_policy(base, cells), {"scale": torch.tensor(1.0, dtype=torch.float64)}
    state = torch.zeros(2, 1, dtype=torch.float64)
    action = torch.tensor([[0.0, 0.0], [0.7, 1.9]], dtype=torch.float64)
    found = policy.log_prob(nu, state, action)
    mass = torch.log_softmax(torch.tensor([0.3, -0.5], dtype=torch.float64), -1)
    z = torch.log(torch.expm1(action[1] - 2**-26))
    slope = 1 / (1 - torch.exp(-(action[1] - 2**-26)))
    centers = torch.tensor([1 / 3, 1.0], dtype=torch.float64)
    expected = mass[1] + (Normal(centers, 0.5).log_prob(z) + slope.log()).sum()
    torch.testing.assert_close(found, torch.stack([mass[0], expected]), rtol=1e-9, atol=1e-9)
    impossible = torch.tensor([[0.0, 1.0], [-1.0, 2.0]], dtype=torch.float64)
    assert policy.log_prob(nu, state, impossible).tolist() == [-INF, -INF]
    with pytest.raises(ValueError, match="in no cell"):
        policy.index(impossible)


def test_extreme_points_stay_inside_and_keep_finite_slopes() -> None:
    policy = cut_policy(raw_policy(3, 1, 0.5), axis_cells([0.0, 1.0]))
    state = torch.zeros(3, 1, dtype=torch.float64)
    for scale in (-1e3, 1e3):
        nu = {"scale": torch.tensor(scale, dtype=torch.float64, requires_grad=True)}
        action = policy.branch(nu, state, torch.arange(3), torch.zeros(3, 2, dtype=torch.float64))
        assert policy.index(action).tolist() == [0, 1, 2]
        (slope,) = torch.autograd.grad(action.sum(), nu["scale"])
        assert bool(torch.isfinite(slope))


def fixed_cost_model() -> ModelMDP:
    """One order, paid for with a fixed cost as soon as it is positive: the user's own model with a plain action."""
    return ModelMDP(
        initial_state=lambda theta, e: e,
        step=lambda theta, s, a, e: s + a,
        reward=lambda theta, s, a, e, f: -(f - 1).square().sum(-1) - 0.8 * (a[:, 0] > 0).double(),
        noise_dims=(1, 0),
        dt=1.0,
    )


def test_the_cut_makes_the_gradient_of_a_jump_right() -> None:
    """Fixed cost at a > 0. Truth: the return enumerated over the choice, its pathwise derivative over 200000 states.

    20000 rollouts of `mixed_gradient` in 40 groups, 4.5 standard errors for each of four numbers: false alarms 3e-4 (t
    with 39 degrees of freedom). Uncut, the pathwise gradient does not see that more orders cost more.
    """
    base = discrete_first_policy(
        lambda nu, s: torch.cat([torch.zeros_like(s), nu["a"] * s + nu["b"]], -1),
        lambda nu, s: torch.stack([torch.zeros_like(s), nu["c"] * s + nu["d"]], -2),
        choices=2,
        continuous_dim=1,
    )
    cells = box_cells(torch.zeros(2, 1).double(), torch.tensor([[0.0], [INF]]).double())
    policy, mdp = cut_policy(base, cells), fixed_cost_model()
    nu = {
        key: torch.tensor(value, dtype=torch.float64)
        for key, value in (("a", -1.0), ("b", 0.2), ("c", 0.4), ("d", 0.1))
    }
    noise = sample_noise(mdp, policy, 20_000, 1, seeded(5))
    estimate = mixed_gradient(mdp, policy, {}, nu, noise, groups=40)
    leaves = {key: value.clone().requires_grad_() for key, value in nu.items()}
    s = torch.randn(200_000, 1, generator=seeded(6), dtype=torch.float64)
    none = torch.zeros(200_000, 1, dtype=torch.float64)
    worth = []
    for choice in (0, 1):
        action = policy.branch(leaves, s, torch.full((200_000,), choice), none)
        worth.append(mdp.reward({}, s, action, none, s + action))
    pi = policy.choice_log_probs(leaves, s, none).exp()
    total = (pi * torch.stack(worth, -1)).sum(-1).mean()
    exact = torch.stack(torch.autograd.grad(total, list(leaves.values())))
    found = torch.stack(list(estimate.grad.values()))
    # the states of the truth add sqrt(1 / 10) of the error of the estimate
    assert bool(((found - exact).abs() <= 4.5 * 1.05 * estimate.info["stderr"]).all()), (found, exact)


def test_cut_policies_roll_out_in_the_users_model() -> None:
    mdp, base = fixed_cost_model(), raw_policy(2, 1, 0.0)
    cells = box_cells(torch.zeros(2, 1).double(), torch.tensor([[0.0], [INF]]).double())
    policy, nu = cut_policy(base, cells), {"scale": torch.tensor(1.0, dtype=torch.float64)}
    path = rollout(mdp, policy, {}, nu, sample_noise(mdp, policy, 30, 4, seeded(0)))
    assert path.actions.shape == (30, 4, 1)
    assert {bool(a == 0) for a in path.actions.flatten()} == {True, False}
    sure = replace(policy, act=lambda nu, s, e: policy.branch(nu, s, torch.ones_like(s[:, 0]).long(), e))
    noise = sample_noise(mdp, sure, 3, 2, seeded(0))
    slope = finite_difference_gradient(mdp, sure, {}, nu, noise).grad["scale"]
    torch.testing.assert_close(mixed_gradient(mdp, sure, {}, nu, noise).grad["scale"], slope, rtol=1e-7, atol=1e-9)


def test_bad_requests_are_named() -> None:
    good = {"choices": 3, "continuous_dim": 1}
    with pytest.raises(ValueError, match="choices must be"):
        discrete_first_policy(logits, branches, choices=0, continuous_dim=1)
    with pytest.raises(ValueError, match="std must be"):
        discrete_first_policy(logits, branches, std=-1.0, **good)
    state, noise = states(2), torch.zeros(2, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"logits gave \(2, 2\)"):
        discrete_first_policy(lambda nu, s: s, branches, **good).act(NU, state, noise)
    with pytest.raises(ValueError, match="branches or std gave"):
        discrete_first_policy(logits, lambda nu, s: s, **good).act(NU, state, noise)
    sure = discrete_first_policy(logits, branches, **good)
    with pytest.raises(ValueError, match="has no density"):
        sure.log_prob(NU, state, sure.act(NU, state, noise))
    with pytest.raises(ValueError, match="increase strictly"):
        axis_cells([1.0, 0.0])
    low, high = torch.zeros(2, 1).double(), torch.ones(2, 1).double()
    for wrong, message in (
        ((low, high[:1]), "both be"),
        ((high, low), "low <= high"),
        ((low, high), "overlap"),
        ((low, low), "overlap"),
        ((torch.ones(1, 1).double() * 1e9, torch.ones(1, 1).double() * (1e9 + 1e-6)), "too short"),
    ):
        with pytest.raises(ValueError, match=message):
            box_cells(*wrong)
    with pytest.raises(ValueError, match="scale must be"):
        box_cells(low[:1], high[:1], scale=torch.tensor([0.0]))
    with pytest.raises(ValueError, match="choices, the axis"):
        cut_policy(sure, axis_cells([0.0]))
    first = continuous_first_policy(lambda nu, s: s[:, :1], lambda nu, s, c: logits(nu, s), **good)
    with pytest.raises(ValueError, match="interval first"):
        cut_policy(first, axis_cells([0.0, 1.0]))
    with pytest.raises(ValueError, match="has no density"):
        first.log_prob(NU, state, first.act(NU, state, noise))
    for policy in (sure, first):
        for columns in (0, 2):
            with pytest.raises(ValueError, match=f"takes 1 noise columns, got {columns}"):
                policy.act(NU, state, torch.zeros(2, columns, dtype=torch.float64))
