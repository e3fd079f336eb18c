"""Four Rooms: the exact oracle, the model against its tables, the exact gradient by the library."""

import numpy as np
import pytest
import torch
from problems import seeded

from benchmarks.oracles import four_rooms as oracle
from sim2real import sample_noise
from sim2real.estimators import boltzmann_tables_gradient
from sim2real.policy import boltzmann_policy
from sim2real.rollout import rollout
from sim2real.simulators import four_rooms, four_rooms_tables, four_rooms_transition
from sim2real.simulators.four_rooms import ENDED, GOAL, START, TARGET
from sim2real.solvers import soft_value_iteration


def logits(seed: int) -> torch.Tensor:
    return 2.0 * torch.randn(105, generator=seeded(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("intended", "expected"),
    [(0.56, (-0.74064, -0.72582, -0.66741)), (0.67, (-0.80523, -0.79717, -0.76303))],
    ids=["planner", "simulator"],
)
def test_leader_values_at_zero_logits(intended: float, expected: tuple[float, ...]) -> None:
    kernel = oracle.kernel(intended)
    found = [oracle.exact(np.zeros(105), temperature, transition=kernel).value for temperature in (0.001, 0.003, 0.005)]
    assert found == pytest.approx(expected, abs=6e-6)  # five digits are given


@pytest.mark.parametrize("temperature", [0.001, 0.003, 0.005])
def test_oracle_gradient_is_the_derivative_of_its_value(temperature: float) -> None:
    x, direction = logits(0).numpy(), np.random.default_rng(1).standard_normal(105)
    value = lambda h: oracle.exact(x + h * direction, temperature).value
    slopes = [(value(h) - value(-h)) / (2 * h) for h in (2e-5, 1e-5)]
    expected = (4 * slopes[1] - slopes[0]) / 3
    # values are solved to 1e-12, so differences are good to about 1e-7; the curvature grows like 1 / temperature
    assert oracle.exact(x, temperature).gradient @ direction == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_trained_point() -> None:
    x, temperature = oracle.trained_point()
    answer = oracle.exact(x, temperature)
    assert answer.value == pytest.approx(0.459, abs=5e-4)
    assert np.linalg.norm(answer.gradient) == pytest.approx(0.097, abs=5e-4)


def test_tables_and_library_gradient_equal_the_oracle() -> None:
    theta, transition = {"logits": logits(3)}, four_rooms_transition()
    assert np.abs(transition.numpy() - oracle.PLANNER).max() < 1e-15
    tables = four_rooms_tables(theta, transition=transition)
    found = soft_value_iteration(tables.follower_reward, transition, discount=0.99, temperature=0.003, strict=True)
    expected = oracle.exact(theta["logits"].numpy(), 0.003)
    assert np.abs(found.value.numpy() - expected.soft_value).max() < 1e-10  # both are solved to 1e-12
    estimate = boltzmann_tables_gradient(
        lambda th: four_rooms_tables(th, transition=transition),
        theta,
        found.policy,
        found.value,
        temperature=0.003,
        leader_discount=0.99,
        follower_discount=0.99,
    )
    assert float(estimate.value) == pytest.approx(expected.value, abs=1e-10)
    error = np.linalg.norm(estimate.grad["logits"].numpy() - expected.gradient)
    assert error < 1e-8 * np.linalg.norm(expected.gradient)  # 1e-12 / temperature of the soft values


def test_rollouts_follow_the_tables() -> None:
    task, theta = four_rooms(), {"logits": logits(5)}
    # greedy towards nothing: a uniform policy visits many cells in 60 steps
    policy = boltzmann_policy(lambda nu, state: nu["q"].expand(len(state), 4), 1.0)
    nu = {"q": torch.zeros(4, dtype=torch.float64)}
    batch = rollout(task.follower, policy, theta, nu, sample_noise(task.follower, policy, 2000, 60, seeded(0)))
    assert bool((batch.states[:, 0] == START).all())
    cells, moves, after = (
        x.long().squeeze(-1)[batch.mask] for x in (batch.states[:, :-1], batch.actions, batch.states[:, 1:])
    )
    counts = torch.zeros(104, 4, 105, dtype=torch.float64)
    counts.index_put_((cells, moves, after), torch.ones(len(cells), dtype=torch.float64), accumulate=True)
    transition = four_rooms_transition()
    expected = torch.cat([transition, 1 - transition.sum(-1, keepdim=True)], -1)
    shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    # 5 standard deviations of a share, over about 5000 possible entries: false alarm below 1 %
    bound = 5 * (expected * (1 - expected) / counts.sum(-1, keepdim=True).clamp(min=1)).sqrt() + 1e-12
    seen = counts.sum(-1) >= 30
    assert bool(((shares - expected).abs() < bound)[seen].all())
    assert int(seen.sum()) > 100
    density = task.follower.log_prob(theta, cells[:, None].double(), moves[:, None].double(), after[:, None].double())
    assert torch.allclose(density.exp(), expected[cells, moves, after])
    tables = four_rooms_tables(theta)
    assert torch.allclose(batch.rewards[batch.mask], tables.follower_reward[cells, 0])
    worth = task.reward(theta, cells[:, None].double(), moves[:, None].double(), after[:, None].double())
    assert torch.allclose(worth, tables.leader_reward[cells, 0])
    assert bool((after[cells == GOAL] == ENDED).all())


def test_rewards_at_the_special_cells() -> None:
    tables = four_rooms_tables({"logits": torch.zeros(105, dtype=torch.float64)})
    assert float(tables.leader_reward[TARGET, 0]) == 1.0
    assert float(tables.leader_reward[GOAL, 0]) == pytest.approx(-5 * 0.2 * 104 / 105)
    assert float(tables.follower_reward[GOAL, 2]) == 1.0
    assert float(tables.follower_reward[START, 1]) == pytest.approx(-0.2 / 105)


def test_logits_per_environment() -> None:
    task, every = four_rooms(), torch.stack([logits(0), logits(1), logits(2)])
    state, none = torch.tensor([[GOAL], [TARGET], [ENDED]], dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
    for reward in (lambda th, s: task.reward(th, s, none, s), lambda th, s: task.follower.reward(th, s, none, none, s)):
        together = reward({"logits": every}, state)
        apart = [reward({"logits": every[i]}, state)[i] for i in range(3)]
        assert torch.equal(together, torch.stack(apart))


def test_a_slip_that_is_no_probability() -> None:
    with pytest.raises(ValueError, match="probability"):
        four_rooms(intended=1.2)
