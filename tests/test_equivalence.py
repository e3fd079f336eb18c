"""A wrong model with the modified reward has the world's action values: tables, by linear programming and by numpy."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from benchmarks.equivalence import named, policy_iteration, random_table, violations
from sim2real.estimators import EquivalenceError, TabularMDP, equivalence_gap, modified_reward
from sim2real.estimators.equivalence import optimal_q
from sim2real.solvers import optimal_values, policy_values

# the sums behind 30 states and a discount of 0.99 lose about 4 digits of 16
EXACT: dict = {"rtol": 0, "atol": 1e-10}


def q_by_linear_programming(mdp: TabularMDP) -> np.ndarray:
    """min sum V subject to V >= r + gamma P V; scipy's HiGHS, about 1e-9 accurate."""
    reward, rows = mdp.reward.numpy(), mdp.transition.numpy()
    states = len(reward)
    left = mdp.discount * rows - np.eye(states)[:, None]
    found = linprog(np.ones(states), left.reshape(-1, states), -reward.reshape(-1), bounds=(None, None))
    assert found.status == 0
    return reward + mdp.discount * rows @ found.x


@pytest.mark.parametrize("seed", range(4))
def test_action_values_agree_by_linear_programming(seed: int) -> None:
    world, model = random_table(12, 3, 0.9, seed), random_table(12, 3, 0.7, seed + 50)
    changed = modified_reward(world, model).model
    assert changed.discount == 0.7
    np.testing.assert_allclose(q_by_linear_programming(changed), q_by_linear_programming(world), atol=1e-7)


@pytest.mark.parametrize("discounts", [(0.95, 0.5), (0.5, 0.99), (1.0, 0.9), (0.9, 1.0), (1.0, 1.0)])
def test_action_values_agree_across_discounts(discounts: tuple[float, float]) -> None:
    ends = max(discounts) == 1.0
    world, model = (random_table(15, 4, g, k, ends=ends) for k, g in enumerate(discounts))
    found = modified_reward(world, model)
    truth = torch.tensor(policy_iteration(world))
    torch.testing.assert_close(found.q, truth, **EXACT)
    torch.testing.assert_close(torch.tensor(policy_iteration(found.model)), truth, **EXACT)
    torch.testing.assert_close(optimal_q(found.model)[1], truth, **EXACT)
    assert all(condition.holds for condition in found.conditions)
    gap = equivalence_gap(world, found.model)
    assert max(gap.q_max, gap.q_weighted, gap.advantage_max, gap.regret_max, abs(gap.regret_weighted)) < 1e-10
    assert gap.disagreement == 0.0


def test_one_common_discount_is_wrong() -> None:
    world, model = random_table(15, 4, 0.95, 0), random_table(15, 4, 0.5, 1)
    wrong = modified_reward(world, replace(model, discount=0.95)).model.reward
    assert equivalence_gap(world, replace(model, reward=wrong)).q_max > 1.0


def test_soft_values_agree() -> None:
    world, model = random_table(10, 3, 0.9, 3), random_table(10, 3, 0.6, 4)
    found = modified_reward(world, model, temperature=0.4)
    soft = optimal_values(found.model.reward, model.transition, 0.6, temperature=0.4)
    truth = optimal_values(world.reward, world.transition, 0.9, temperature=0.4)
    torch.testing.assert_close(soft.q, truth.q, **EXACT)
    gap = equivalence_gap(world, found.model, temperature=0.4)
    assert gap.q_max < 1e-10
    assert gap.regret_max < 1e-10
    assert gap.disagreement == 0.0


def test_single_precision_tables_are_solved_in_double() -> None:
    single = lambda mdp: replace(mdp, reward=mdp.reward.float(), transition=mdp.transition.float())
    world, model = single(random_table(12, 3, 0.9, 0)), single(random_table(12, 3, 0.7, 1))
    assert not bool((model.transition.double().sum(-1) == 1).all())  # rounded rows are still distributions
    found = modified_reward(world, model)
    double = replace(world, reward=world.reward.double(), transition=world.transition.double())
    torch.testing.assert_close(found.q, torch.tensor(policy_iteration(double)), **EXACT)
    assert equivalence_gap(world, found.model).q_max < 1e-10


def test_post_decision_tables_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    post = torch.randint(0, 7, (10, 3), generator=generator)
    rows = torch.rand(2, 7, 10, generator=generator, dtype=torch.float64)
    rows = rows / rows.sum(-1, keepdim=True)
    reward = torch.randn(10, 3, generator=generator, dtype=torch.float64)
    world, model = (TabularMDP(reward, x, g, post) for x, g in zip(rows, (0.9, 0.8), strict=True))
    changed = modified_reward(world, model).model
    full = lambda mdp: replace(mdp, transition=mdp.transition[post], post=None)
    np.testing.assert_allclose(policy_iteration(full(changed)), policy_iteration(full(world)), atol=1e-10)
    assert equivalence_gap(full(world), changed).q_max < 1e-10


def test_gap_of_an_unmodified_model_against_enumeration() -> None:
    world, model = random_table(6, 3, 0.9, 7), random_table(6, 3, 0.8, 8)
    weights = torch.rand(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gap = equivalence_gap(world, model, weights=weights)
    q, other = policy_iteration(world), policy_iteration(model)
    assert gap.q_max == pytest.approx(np.abs(q - other).max(), abs=1e-10)
    share = (weights / weights.sum()).numpy()
    assert gap.q_weighted == pytest.approx(np.sqrt((share * (q - other) ** 2).sum()), abs=1e-10)
    advantages = other - other.max(1, keepdims=True) - q + q.max(1, keepdims=True)
    assert gap.advantage_max == pytest.approx(np.abs(advantages).max(), abs=1e-10)
    acted = torch.eye(3, dtype=torch.float64)[torch.tensor(other.argmax(1))]
    regret = q.max(1) - policy_values(acted, world.reward, world.transition, 0.9).numpy()
    assert gap.regret_max == pytest.approx(regret.max(), abs=1e-10)
    assert gap.regret_weighted == pytest.approx(share.sum(1) @ regret, abs=1e-10)
    assert gap.disagreement == pytest.approx(share.sum(1) @ (other.argmax(1) != q.argmax(1)), abs=1e-12)
    assert 0 < gap.disagreement < 1


def test_a_shift_of_all_actions_alike_is_no_advantage_gap() -> None:
    world = random_table(6, 3, 0.9, 7)
    gap = equivalence_gap(world, replace(world, reward=world.reward + 1.0))
    assert gap.q_max == pytest.approx(10.0, abs=1e-9)
    assert gap.advantage_max < 1e-10
    assert gap.regret_max < 1e-10


@pytest.mark.parametrize(("condition", "call"), violations(), ids=lambda x: x if isinstance(x, str) else "")
def test_the_violated_condition_is_named(condition: str, call: object) -> None:
    assert callable(call)
    assert named(condition, call)


def test_a_violation_is_no_formality() -> None:
    # action 0, the best of state 1, never leaves it in the model: it earns r_hat = Q* - V* = 0 for ever, not Q*
    world, lazy = random_table(8, 3, 0.9, 0, ends=True), random_table(8, 3, 1.0, 3, ends=True)
    rows = lazy.transition.clone()
    rows[1, 0] = torch.eye(8, dtype=torch.float64)[1]
    found = modified_reward(world, replace(lazy, transition=rows), strict=False)
    assert [condition.name for condition in found.conditions if not condition.holds] == ["contraction"]
    with pytest.raises(EquivalenceError, match="contraction"):
        equivalence_gap(world, found.model)
    assert abs(float(found.model.reward[1, 0])) < 1e-12
    assert abs(float(found.q[1, 0])) > 0.1


def test_reports_without_raising() -> None:
    world, model = random_table(5, 2, 1.0, 0), random_table(5, 2, 0.9, 1)
    found = modified_reward(world, model, strict=False)
    assert [condition.name for condition in found.conditions if not condition.holds] == ["world value"]
    assert bool(found.model.reward.isnan().all())
    soft = modified_reward(
        random_table(5, 2, 0.9, 0), random_table(5, 2, 1.0, 1, ends=True), temperature=0.1, strict=False
    )
    assert "entropy" in soft.conditions[-1].detail
    soft = modified_reward(random_table(5, 2, 1.0, 0, ends=True), model, temperature=0.1, strict=False)
    assert "entropy" in soft.conditions[0].detail


def test_a_table_where_every_state_is_absorbing_is_worth_nothing() -> None:
    rows = torch.eye(3, dtype=torch.float64).unsqueeze(1).expand(3, 2, 3)
    world = TabularMDP(torch.tensor([[0.0, -1.0]] * 3, dtype=torch.float64), rows, 1.0)
    found = modified_reward(world, random_table(3, 2, 0.5, 0))
    torch.testing.assert_close(found.q, world.reward)


def test_inputs_that_do_not_fit() -> None:
    world = random_table(5, 2, 0.9, 0)
    with pytest.raises(ValueError, match="share states and actions"):
        modified_reward(world, random_table(6, 2, 0.9, 0))
    with pytest.raises(ValueError, match="discount of the model"):
        modified_reward(world, replace(world, discount=-0.1))
    with pytest.raises(ValueError, match=r"must be \[S, A\]"):
        modified_reward(replace(world, reward=world.reward[0]), world)
    with pytest.raises(ValueError, match="transition rows"):
        modified_reward(replace(world, transition=world.transition[:, :, :3]), world)
    post = torch.zeros(5, 2, dtype=torch.int64)
    for wrong in (post + 9, post - 1, post.double()):
        with pytest.raises(ValueError, match=r"post of the model must hold int64 in \[0, 5\)"):
            modified_reward(world, replace(world, transition=world.transition[:, 0], post=wrong))
    for leak in (0.9, torch.nan):  # also where the discount would let it pass
        leaking = random_table(5, 2, 1.0, 0, ends=True)
        leaking = replace(leaking, transition=torch.cat([leak * leaking.transition[:-1], leaking.transition[-1:]]))
        with pytest.raises(ValueError, match="world's transition must be a distribution"):
            modified_reward(leaking, world)
    with pytest.raises(ValueError, match="weights must be"):
        equivalence_gap(world, world, weights=torch.zeros(5, 2))


@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 3)),
    discounts=st.tuples(st.floats(0.0, 0.99), st.floats(0.0, 0.99)),
    temperature=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_pair_with_discounts_below_one(
    shape: tuple[int, int], discounts: tuple[float, float], temperature: float, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    mdps = []
    for gamma in discounts:
        rows = draw.random((*shape, shape[0])) * (draw.random((*shape, shape[0])) < 0.5)  # unreachable states included
        rows[..., draw.integers(shape[0])] += 1e-3
        rows = rows / rows.sum(-1, keepdims=True)
        mdps.append(TabularMDP(torch.tensor(draw.standard_normal(shape)), torch.tensor(rows), gamma))
    world, model = mdps
    found = modified_reward(world, model, temperature=temperature)
    gap = equivalence_gap(world, found.model, temperature=temperature)
    # both values are accurate to the solver's 1e-11, times 1 / (1 - 0.99)
    assert gap.q_max <= 1e-8
    assert gap.regret_max <= 1e-8
    if temperature == 0.0:
        np.testing.assert_allclose(policy_iteration(found.model), policy_iteration(world), atol=1e-10)
