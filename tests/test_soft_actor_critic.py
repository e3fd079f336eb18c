"""A follower trained by soft actor-critic: what it finds, what it reports, and that it leaves the rest alone."""

from dataclasses import replace

import pytest
import torch

from sim2real import Box, ModelMDP, sample_noise
from sim2real.solve_report import UnconvergedError

sac = pytest.importorskip("sim2real.solvers.soft_actor_critic")

SMALL = sac.SACSettings(rounds=2, episodes=4, horizon=5, updates=3, batch=16, hidden=8)
THETA = {"slope": torch.tensor(0.5, dtype=torch.float64)}


def once(theta, s, a, e, following):
    return -((a[:, 0] - theta["slope"] * s[:, 0]) ** 2)


# the next state is new noise, and the discount small: the soft optimum is N(slope s, lambda / 2), V a constant
WORLD = ModelMDP(
    initial_state=lambda theta, e0: e0,
    step=lambda theta, s, a, e: e,
    reward=once,
    noise_dims=(1, 1),
    dt=1.0,
    discount=0.1,
    names={"state": ("s",), "action": ("a",)},
    box=Box(default={"slope": 0.5}),
)


def train(mdp=WORLD, seed=0, **options):
    options = {"temperature": 0.5, "settings": SMALL} | options
    return sac.soft_actor_critic(mdp, THETA, generator=torch.Generator().manual_seed(seed), **options)


def test_soft_optimum_of_a_quadratic_is_found():
    settings = sac.SACSettings(rounds=10, episodes=20, horizon=10, updates=25, hidden=16, learning_rate=1e-2)
    follower = train(settings=settings)
    states = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64).unsqueeze(-1)
    still = torch.zeros(7, 1, dtype=torch.float64)
    mean = follower.policy.act(follower.nu, states, still)
    spread = follower.policy.act(follower.nu, states, still + 1) - mean
    # 250 updates of small networks; in units of the action, whose noise is 0.5
    assert (mean - 0.5 * states).abs().max() < 0.25
    assert (spread - 0.5).abs().max() < 0.2
    # V = lambda log integral exp(-x^2 / lambda) / (1 - g) = lambda / 2 log(pi lambda) / 0.9
    value = 0.25 * torch.log(torch.tensor(torch.pi * 0.5)) / 0.9
    assert (follower.soft_value(states) - value).abs().max() < 0.25
    assert follower.report.converged == (follower.report.residual <= 0.02)
    assert follower.report.residual < 0.05
    assert not train().report.converged
    assert "nats" in follower.report.status


def test_soft_value_is_the_mean_of_its_own_critics():
    follower = train()
    states = torch.randn(3, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise = torch.randn(20000, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for state, found in zip(states, follower.soft_value(states), strict=True):
        many = state.expand(len(noise), 1)
        action = follower.policy.act(follower.nu, many, noise)
        terms = follower.action_value(many, action) - 0.5 * follower.policy.log_prob(follower.nu, many, action)
        # 4 standard errors (false alarms: 6e-5), and what two points leave of a function that is no cubic
        assert abs(terms.mean() - found) < 4 * terms.std() / 141 + 2e-2


def test_values_can_be_differentiated_in_the_state_and_have_its_precision():
    follower = train()
    states = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(follower.soft_value(states).sum(), states)
    assert slope.abs().min() > 0
    assert {value.dtype for value in follower.nu.values()} == {torch.float64}


def test_training_is_decided_by_its_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = train(), train(), train(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first.nu[key], again.nu[key]) for key in first.nu)
    assert not all(torch.equal(first.nu[key], other.nu[key]) for key in first.nu)


def test_training_goes_on_from_a_follower():
    first = train()
    still = replace(SMALL, learning_rate=0.0)
    same = train(seed=5, settings=still, start=first)
    for key in first.nu:
        torch.testing.assert_close(same.nu[key], first.nu[key])
    states = torch.ones(2, 1, dtype=torch.float64)
    torch.testing.assert_close(same.soft_value(states), first.soft_value(states))


def test_only_a_terminal_state_ends():
    world = replace(WORLD, terminal=lambda theta, s: s[:, 0] > 0.5)
    policy = train().policy
    noise = sample_noise(world, policy, 50, 4, torch.Generator().manual_seed(0))
    run = sac.rollout(world, policy, THETA, train().nu, noise)
    seen = sac._transitions(world, THETA, run)
    assert len(seen) == int(run.mask.sum()) < 200
    assert (seen["observation"] <= 0.5).all()
    assert torch.equal(seen["next", "terminated"], seen["next", "observation"] > 0.5)


def test_failures_are_named():
    with pytest.raises(ValueError, match="temperature"):
        train(temperature=0.0)
    with pytest.raises(ValueError, match="name its states"):
        train(replace(WORLD, names={}))
    with pytest.raises(UnconvergedError, match="not finite"):
        train(replace(WORLD, step=lambda theta, s, a, e: s * 1e30))
    with pytest.raises(UnconvergedError, match="networks are not finite"):
        train(settings=replace(SMALL, rounds=1, learning_rate=1e30))
