"""The modified reward of simulators against the closed form, and its conditions along rollouts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.equivalence import simulator_pair, value_of
from sim2real import ModelMDP, Params, linear_policy, sample_noise
from sim2real.estimators import (
    EquivalenceError,
    Simulator,
    lqr_modified_reward,
    sampled_conditions,
    sampled_equivalence_gap,
    sampled_modified_reward,
)
from sim2real.estimators.sampled_equivalence import noise_grid, tail_index
from tests.problems import seeded


def pairs() -> tuple[Tensor, Tensor]:
    generator = seeded(5)
    return torch.randn(40, 2, generator=generator).double(), torch.randn(40, 1, generator=generator).double()


def test_reward_is_the_closed_form() -> None:
    world, model, real, linear = simulator_pair()
    mdp = sampled_modified_reward(real, linear, value_of(world, model), draws=16, generator=seeded(0))
    s, a = pairs()
    found = lqr_modified_reward(world, model).model
    assert found.cross is not None
    quadratic = ((s @ found.Q) * s).sum(-1) + 2 * ((s @ found.cross) * a).sum(-1) + ((a @ found.R) * a).sum(-1)
    # V* is quadratic and the noise enters linearly: the quadrature is exact whatever the draws
    torch.testing.assert_close(
        mdp.reward(linear.theta, s, a, s, s), -quadratic - found.constant, rtol=1e-12, atol=1e-12
    )
    assert mdp.discount == model.discount


def test_the_gap_closes_with_the_modified_reward_only() -> None:
    world, model, real, linear = simulator_pair()
    value, (s, a) = value_of(world, model), pairs()
    mdp = sampled_modified_reward(real, linear, value, draws=32, generator=seeded(0))
    before = sampled_equivalence_gap(real, linear, value, s, a, draws=32, generator=seeded(1))
    after = sampled_equivalence_gap(real, replace(linear, mdp=mdp), value, s, a, draws=32, generator=seeded(1))
    assert before.max > 1.0
    assert before.rms <= before.max
    assert before.bound == pytest.approx(10 * before.max)  # discount 0.9
    assert after.bound < 1e-10


def test_terminal_states_are_worth_nothing() -> None:
    # one step, then over: s' = s + a, reward s; V* counts only where |s'| < 1
    def mdp(gain: float) -> ModelMDP:
        def step(theta: Params, s: Tensor, a: Tensor, e: Tensor) -> Tensor:
            return s + gain * a

        return ModelMDP(
            initial_state=lambda theta, e: e,
            step=step,
            reward=lambda theta, s, a, e, following: s[:, 0],
            noise_dims=(1, 0),
            dt=1.0,
            discount=0.5,
            terminal=lambda theta, s: s[:, 0].abs() >= 1,
        )

    world, model = Simulator(mdp(1.0), {}), Simulator(mdp(2.0), {})
    value = lambda s: 3.0 + s[:, 0]
    s, a = torch.tensor([[0.0], [0.0], [0.0]]).double(), torch.tensor([[0.2], [0.6], [1.5]]).double()
    changed = sampled_modified_reward(world, model, value)
    expected = torch.tensor([0.5 * 3.2 - 0.5 * 3.4, 0.5 * 3.6, 0.0]).double()
    torch.testing.assert_close(changed.reward({}, s, a, s, s), expected)


def test_conditions_hold_and_are_named() -> None:
    world, model, real, linear = simulator_pair()
    best = lqr_modified_reward(world, model).optimum
    assert best is not None
    value, policy, nu = value_of(world, model), linear_policy(1), {"gain": best.K}
    noise = sample_noise(linear.mdp, policy, 32, 40, seeded(0))
    check = lambda side, v=value, strict=True, **other: sampled_conditions(
        real, side, v, policy, nu, noise, generator=seeded(1), strict=strict, **other
    )
    assert all(condition.holds for condition in check(linear))
    zero = check(linear, lambda s: torch.zeros_like(s[:, 0]))
    assert "is 0" in zero[-1].detail
    # V* known to 3.5: the 32 rollouts stay inside or leave, 40 000 draws of the next state surely leave
    broken = check(linear, lambda s: torch.where(s.abs().amax(-1) < 3.5, value(s), torch.nan), strict=False)
    assert "support" in {c.name for c in broken if not c.holds}
    cauchy = lambda th, s, a, e: linear.mdp.step(th, s, a, torch.tan(torch.pi * (torch.special.ndtr(e) - 0.5)))
    broken = check(replace(linear, mdp=replace(linear.mdp, step=cauchy)), strict=False)
    assert {c.name for c in broken if not c.holds} == {"finite expectation"}
    endless = replace(linear, mdp=replace(linear.mdp, discount=1.0))
    with pytest.raises(EquivalenceError, match="discount: "):
        check(endless)
    with pytest.raises(ValueError, match="at least 8 steps"):
        sampled_conditions(real, linear, value, policy, nu, sample_noise(linear.mdp, policy, 4, 7, seeded(0)))


def test_a_settled_value_is_transversal_whatever_the_sampling_noise() -> None:
    # |V*| settles, so the truth is a factor of 0.999 a step; 12 rollouts have noise far above 1 - 0.999
    world, model, real, linear = simulator_pair()
    best = lqr_modified_reward(world, model).optimum
    assert best is not None
    policy, nu = linear_policy(1), {"gain": best.K}
    slow = replace(linear, mdp=replace(linear.mdp, discount=0.999))
    growing = replace(slow, theta={"A": 1.05 / 0.95 * model.A, "B": 0.0 * model.B})

    def share(side: Simulator, seeds: int = 20) -> float:
        held = 0
        for seed in range(seeds):
            noise = sample_noise(linear.mdp, policy, 12, 40, seeded(seed))
            found = sampled_conditions(
                real, side, value_of(world, model), policy, nu, noise, draws=200, generator=seeded(seed), strict=False
            )
            held += found[-1].holds
        return held / seeds

    # two standard errors are exceeded in 1 of 40 good cases, somewhat more often with 12 skewed rollouts
    assert share(slow) >= 0.8
    assert share(growing) <= 0.2


def test_what_follows_an_end_is_not_judged() -> None:
    world, model, real, linear = simulator_pair()
    value, policy = value_of(world, model), linear_policy(1)

    def ending(side: Simulator) -> Simulator:
        over = lambda theta, s: s[:, 0].abs() > 1.0
        step = lambda theta, s, a, e: torch.where(s[:, :1].abs() > 1.0, torch.nan, side.mdp.step(theta, s, a, e))
        return replace(side, mdp=replace(side.mdp, terminal=over, step=step))

    nu = {"gain": torch.zeros(1, 2, dtype=torch.float64)}
    noise = sample_noise(linear.mdp, policy, 16, 40, seeded(0))
    found = sampled_conditions(ending(real), ending(linear), value, policy, nu, noise, generator=seeded(1))
    assert all(condition.holds for condition in found)


def test_a_discount_of_one_needs_rollouts_that_end() -> None:
    world, model, real, linear = simulator_pair()
    policy, nu = linear_policy(1), {"gain": torch.zeros(1, 2, dtype=torch.float64)}
    short = replace(linear, mdp=replace(linear.mdp, discount=1.0, terminal=lambda th, s: s[:, 0].abs() > 0))
    noise = sample_noise(linear.mdp, policy, 4, 8, seeded(0))
    found = sampled_conditions(real, short, value_of(world, model), policy, nu, noise, generator=seeded(0))
    assert all(condition.holds for condition in found)


def test_tail_index_of_known_tails() -> None:
    # Pareto(a) has tail index a; Hill's estimate has a standard error of a / sqrt(100) = 10 %: four of them allowed
    uniform = torch.rand(10_000, generator=seeded(0), dtype=torch.float64)
    for index in (0.5, 1.5):
        assert tail_index(uniform ** (-1 / index)) == pytest.approx(index, rel=0.4)
    assert tail_index(torch.randn(10_000, generator=seeded(1), dtype=torch.float64).square()) > 2
    assert tail_index(torch.ones(500)) == float("inf")
    with pytest.raises(ValueError, match="N >= 200"):
        tail_index(torch.ones(10))


def test_noise_grid_has_the_moments_of_a_standard_normal() -> None:
    nodes = noise_grid(3, 10, seeded(0))
    np.testing.assert_allclose(nodes.mean(0), np.zeros(3), atol=1e-15)
    np.testing.assert_allclose(nodes.T @ nodes / 10, np.eye(3), atol=1e-14)
    with pytest.raises(ValueError, match="even and at least 8"):
        noise_grid(3, 6)


def test_measured_inputs_and_odd_values_are_refused() -> None:
    world, model, real, linear = simulator_pair()
    measured = replace(linear, mdp=replace(linear.mdp, exogenous_dim=1))
    with pytest.raises(ValueError, match="measured inputs"):
        sampled_modified_reward(real, measured, value_of(world, model))
    s, a = pairs()
    with pytest.raises(ValueError, match=r"value\(states\)"):
        sampled_equivalence_gap(real, linear, lambda x: x, s, a)
    assert sampled_equivalence_gap(
        real, replace(linear, mdp=replace(linear.mdp, discount=1.0)), value_of(world, model), s, a
    ).bound == float("inf")
