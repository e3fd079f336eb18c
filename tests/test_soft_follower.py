"""Followers of finite problems, empirical kernels, and the steps of a leader's ascent."""

import math

import pytest
import torch
from problems import seeded, stack

from benchmarks import rooms
from benchmarks.oracles import four_rooms as oracle
from benchmarks.theorems import configurable, instance
from sim2real.estimators import (
    annealed_temperature,
    best_of_restarts,
    empirical_transition,
    natural_softmax_step,
    tilted_transition,
    transition_counts,
)
from sim2real.params import Params
from sim2real.solve_report import UnconvergedError, UnconvergedWarning
from sim2real.solvers import optimal_values, soft_q_learning, soft_value_iteration

TABLES = configurable(instance(0, leader_actions=1))(instance(0, leader_actions=1).theta)
REWARD, START = TABLES.follower_reward, TABLES.start
assert TABLES.transition is not None
TRANSITION = TABLES.transition
SETTING = {"discount": 0.9, "temperature": 0.5}


def test_value_iteration_is_the_soft_optimum() -> None:
    found = soft_value_iteration(REWARD, TRANSITION, **SETTING, strict=True)
    expected = optimal_values(REWARD, TRANSITION, 0.9, temperature=0.5)
    assert torch.allclose(found.value, expected.value, rtol=1e-10)
    assert torch.allclose(found.policy, torch.softmax(expected.q / 0.5, -1), rtol=1e-8)
    assert found.report.converged
    warm = soft_value_iteration(REWARD, TRANSITION, **SETTING, value=found.value)
    assert warm.report.steps == 0


def test_rows_that_end_are_worth_nothing_afterwards() -> None:
    """One state, ending with probability 1 / 2: V = lambda log sum exp((r + 0.45 V) / lambda)."""
    found = soft_value_iteration(stack([1.0, 0.0]), torch.full((1, 2, 1), 0.5, dtype=torch.float64), **SETTING)
    V = float(found.value)
    expected = 0.5 * math.log(math.exp((1 + 0.45 * V) / 0.5) + math.exp(0.45 * V / 0.5))
    assert pytest.approx(expected, rel=1e-10) == V


def test_sweeps_stop_short() -> None:
    few, many = (soft_value_iteration(REWARD, TRANSITION, **SETTING, sweeps=n) for n in (5, 400))
    best = soft_value_iteration(REWARD, TRANSITION, **SETTING)
    assert not few.report.converged
    assert float((many.value - best.value).abs().max()) < 1e-10  # 0.9^400
    gap = float((few.value - best.value).abs().max())
    assert 1e-3 < gap < 0.9**5 * float(best.value.abs().max()) + 1e-9


def test_unconverged_searches_say_so() -> None:
    with pytest.warns(UnconvergedWarning, match="raise max_steps|did not reach"):
        soft_value_iteration(REWARD, TRANSITION, **SETTING, max_steps=0)
    with pytest.raises(UnconvergedError, match="raise max_steps"):
        soft_value_iteration(REWARD, TRANSITION, **SETTING, max_steps=0, strict=True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"discount": 1.0}, "discount must lie"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"transition": TRANSITION[:3]}, "transition must be"),
        ({"transition": 2 * TRANSITION}, "sum to 1"),
        ({"transition": math.nan * TRANSITION}, "sum to 1"),
        ({"temperature": math.inf}, "temperature must be positive"),
        ({"reward": REWARD * math.nan}, "15 of 15 rewards are not finite"),
        ({"sweeps": -1}, "must be >= 0"),
        ({"max_steps": -1}, "must be >= 0"),
        ({"value": REWARD[:1, 0]}, r"value must be \[5\]"),
    ],
    ids=["discount", "temperature", "shape", "rows", "nan-rows", "hot", "nan", "sweeps", "max-steps", "value"],
)
def test_followers_that_do_not_fit(changed: dict[str, object], message: str) -> None:
    arguments = {"reward": REWARD, "transition": TRANSITION, **SETTING} | changed
    with pytest.raises(ValueError, match=message):
        soft_value_iteration(**arguments)


def test_q_learning_finds_the_soft_optimum() -> None:
    """Every pair 20 times per pass with deterministic transitions: no noise is left, only the step size."""
    after = TRANSITION.argmax(-1)
    kernel = torch.nn.functional.one_hot(after, 5).double()
    best = soft_value_iteration(REWARD, kernel, **SETTING)
    s, a = (x.flatten() for x in torch.meshgrid(torch.arange(5), torch.arange(3), indexing="ij"))
    data = (s.repeat(20), a.repeat(20), REWARD.flatten().repeat(20), after.flatten().repeat(20))
    ended = torch.zeros(300, dtype=torch.bool)
    found = soft_q_learning(*data, ended, shape=(5, 3), **SETTING, passes=60)
    assert float((found.policy - best.policy).abs().max()) < 0.02
    assert found.report.converged
    unseen = soft_q_learning(*(x[:0] for x in data), ended[:0], shape=(5, 3), **SETTING, q=best.q)
    assert torch.equal(unseen.q, best.q)
    with pytest.raises(ValueError, match="states must lie"):
        soft_q_learning(s + 9, a, REWARD.flatten(), after.flatten(), ended[:15], shape=(5, 3), **SETTING)
    with pytest.raises(ValueError, match="rewards are not finite"):
        soft_q_learning(s, a, math.nan * data[2][:15], after.flatten(), ended[:15], shape=(5, 3), **SETTING)
    with pytest.raises(ValueError, match="passes must be"):
        soft_q_learning(*data, ended, shape=(5, 3), **SETTING, passes=0)


def test_counts_and_their_kernel() -> None:
    index = torch.tensor
    counts = transition_counts(
        index([0, 0, 0, 1]), index([0, 0, 1, 0]), index([1, 1, 0, 0]), index([False, False, False, True]), shape=(3, 2)
    )
    assert counts.shape == (3, 2, 4)
    assert counts[0, 0].tolist() == [0, 2, 0, 0]
    assert counts[1, 0].tolist() == [0, 0, 0, 1]  # ended
    kernel = empirical_transition(counts)
    assert kernel.shape == (3, 2, 3)
    assert kernel[2].tolist() == [[0, 0, 1], [0, 0, 1]]  # never left: taken to hold
    assert float(kernel[1, 0].sum()) < 0.5  # mostly ended
    many = empirical_transition(1e9 * torch.cat([TRANSITION, torch.zeros(5, 3, 1)], -1))
    assert torch.allclose(many, TRANSITION, atol=1e-8)
    for bad, name in (((9, 0, 0), "states"), ((0, 9, 0), "actions"), ((0, 0, 9), "next_states")):
        with pytest.raises(ValueError, match=name):
            transition_counts(*(index([x]) for x in bad), index([False]), shape=(3, 2))


def test_tilted_rows_agree_with_the_soft_values() -> None:
    best = soft_value_iteration(REWARD, TRANSITION, **SETTING)
    rough = torch.softmax(TRANSITION.log() + 0.3 * torch.randn(5, 3, 5, generator=seeded(0), dtype=torch.float64), -1)
    tilted = tilted_transition(rough, best.policy, best.value, REWARD, temperature=0.5, discount=0.9)
    assert torch.allclose(tilted @ best.value, TRANSITION @ best.value, rtol=1e-10)
    assert torch.allclose(tilted.sum(-1), torch.ones(5, 3, dtype=torch.float64))
    assert float((tilted - TRANSITION).norm()) < float((rough - TRANSITION).norm())
    exact = tilted_transition(TRANSITION, best.policy, best.value, REWARD, temperature=0.5, discount=0.9)
    assert torch.allclose(exact, TRANSITION, atol=1e-10)
    with pytest.raises(ValueError, match="must be"):
        tilted_transition(rough, best.policy[:3], best.value, REWARD, temperature=0.5, discount=0.9)
    with pytest.raises(ValueError, match="soft_value must be"):
        tilted_transition(rough, best.policy, best.value[:3], REWARD, temperature=0.5, discount=0.9)
    with pytest.raises(ValueError, match="discount must lie"):
        tilted_transition(rough, best.policy, best.value, REWARD, temperature=0.5, discount=0.0)


def test_learned_kernel_in_four_rooms() -> None:
    """1000 fresh and 10 000 kept steps at the trained point; the mean of 48 draws is 0.99 (benchmark)."""
    assert rooms.cosines(1000, 10000, 2, True)[0] > 0.95


def test_natural_step() -> None:
    logits, grad = torch.randn(6, generator=seeded(1), dtype=torch.float64), stack([0.3, -0.1, 0.2, 0.0, -0.5, 0.1])[0]
    grad = grad - grad.mean()
    moved = natural_softmax_step(logits, grad, 1e-3)
    p, q = torch.softmax(logits, -1), torch.softmax(moved, -1)
    # the Fisher length of the step is what was asked for, to second order
    assert float(((q - p).square() / p).sum().sqrt()) == pytest.approx(1e-3, rel=1e-2)
    assert float(grad @ (moved - moved.mean() - logits + logits.mean())) > 0
    assert float(natural_softmax_step(logits, grad, 100.0).min()) >= -14.0
    assert float(moved.max()) == 0.0
    with pytest.raises(ValueError, match="length and floor"):
        natural_softmax_step(logits, grad, 0.0)
    with pytest.raises(ValueError, match="must be"):
        natural_softmax_step(logits, grad[:3], 0.1)
    with pytest.raises(ValueError, match="must be finite"):
        natural_softmax_step(logits, math.nan * grad, 0.1)


def test_annealing() -> None:
    assert annealed_temperature(0, 10, 0.05, 0.001) == pytest.approx(0.05)
    assert annealed_temperature(5, 10, 0.05, 0.002) == pytest.approx(0.01)
    assert annealed_temperature(30, 10, 0.05, 0.001) == 0.001
    with pytest.raises(ValueError, match="hot"):
        annealed_temperature(1, 10, 0.001, 0.05)


def test_restarts_continue_the_best() -> None:
    """Two hills, of height 1 at -2 and 2 at 2: gradient ascent from three starts."""
    spent: list[int] = []

    def ascend(theta: Params, steps: int) -> tuple[Params, float]:
        spent.append(steps)
        x = float(theta["x"])
        top, height = (-2.0, 1.0) if x < 0 else (2.0, 2.0)
        x = top + (x - top) * 0.9**steps
        return {"x": torch.tensor(x)}, height - abs(x - top)

    starts = [{"x": torch.tensor(x)} for x in (-1.0, 0.5, -3.0)]
    found, value = best_of_restarts(ascend, starts, 103)
    assert float(found["x"]) == pytest.approx(2.0, abs=0.05)
    assert value > 1.9
    assert spent == [25, 25, 25, 28]
    with pytest.raises(ValueError, match="cannot be shared"):
        best_of_restarts(ascend, starts, 3)
    with pytest.raises(ValueError, match=r"starts \[0, 2\] is not a number"):
        best_of_restarts(lambda theta, n: (theta, math.nan if theta["x"] < 0 else 1.0), starts, 103)


@pytest.mark.slow
def test_annealed_ascent_passes_the_bad_optimum() -> None:
    theta = rooms.annealed(0, 0.003, 500)
    assert oracle.exact(theta["logits"].numpy(), 0.003).value > 0.5
