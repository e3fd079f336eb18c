"""Both Markov games: rebuild checks, exact oracles, followers of the library, learned gradients."""

import math

import numpy as np
import pytest
import torch
from problems import seeded, stack

from benchmarks import games
from benchmarks.oracles import discrete_game as game_oracle
from benchmarks.oracles import lqr_game as lqr_oracle
from sim2real.estimators import stackelberg_tables_gradient
from sim2real.rollout import discounted_return
from sim2real.simulators import discrete_game, discrete_game_tables, lqr_game, lqr_game_data, lqr_game_leader
from sim2real.solvers import linear_noise_policy, observed_soft_lqr, soft_lqr


@pytest.mark.parametrize(("bonus", "expected"), [(1.0, 0.48079), (2.0, 31.16415)])
def test_leader_return_of_the_discrete_game(bonus: float, expected: float) -> None:
    assert game_oracle.exact(0.5, bonus)[0] == pytest.approx(expected, abs=6e-6)  # five digits are given


@pytest.mark.parametrize(("bonus", "expected"), [(1.0, 27.32), (2.0, 31.17)])
def test_optimum_of_the_discrete_game(bonus: float, expected: float) -> None:
    assert game_oracle.best(bonus)[0] == pytest.approx(expected, abs=6e-3)


@pytest.mark.parametrize("bonus", [1.0, 2.0])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_discrete_oracle_gradient_is_the_derivative_of_its_value(bonus: float, p: float) -> None:
    value, slope = game_oracle.exact(p, bonus)
    step = 1e-5
    expected = (game_oracle.exact(p + step, bonus)[0] - game_oracle.exact(p - step, bonus)[0]) / (2 * step)
    # curvature 1 / temperature = 20 per unit of p: truncation of about 1e-7
    assert slope == pytest.approx(expected, rel=1e-6, abs=1e-8 + 1e-9 * abs(value))


def policy_of(p: float) -> torch.Tensor:
    return torch.tensor([[0.5, 0.5], [1 - p, p], [0.5, 0.5]], dtype=torch.float64)


@pytest.mark.parametrize("bonus", [1.0, 2.0])
def test_follower_of_the_discrete_game(bonus: float) -> None:
    g, _ = games.game_follower(discrete_game_tables(bonus=bonus), policy_of(0.4))
    expected = game_oracle.follower_policy(0.4, bonus).real
    assert np.abs(g.numpy() - expected).max() < 1e-9  # values solved to 1e-12 over a temperature of 0.05


def test_rollouts_of_the_discrete_game() -> None:
    """Mean discounted leader return of 400 episodes within 4 standard errors: false alarm 1 in 15 000."""
    task, generator = discrete_game(bonus=2.0), seeded(0)
    tables, f = discrete_game_tables(bonus=2.0), policy_of(0.5)
    g, _ = games.game_follower(tables, f)
    state, rewards = task.follower.initial_state({}, torch.zeros(400, 0, dtype=torch.float64)), []
    for _ in range(150):
        s = state[:, 0].long()
        b = torch.multinomial(f[s], 1, generator=generator)
        a = torch.multinomial(g[s, b[:, 0]], 1, generator=generator)
        action = torch.cat([b, a], -1).double()
        after = task.follower.step({}, state, action, state[:, :0])
        rewards.append(task.reward({}, state, action, after))
        worth = task.follower.reward({}, state, action, state[:, :0], after)
        assert torch.equal(worth, tables.follower_reward[s, b[:, 0], a[:, 0]])
        state = after
    returns = discounted_return(torch.stack(rewards, 1), 0.99)
    assert abs(float(returns.mean()) - 31.16415) < 4 * float(returns.std()) / 20


def test_theorem_2_in_the_discrete_game() -> None:
    """The infinite-horizon gradient differs from that over 150 steps by the tail, 0.99^150 = 22 % of some of it."""
    tables, theta = discrete_game_tables(bonus=2.0), {"logits": policy_of(0.4).log()}
    g, value = games.game_follower(tables, policy_of(0.4))
    estimate = stackelberg_tables_gradient(
        lambda _: tables, games.leader_policy, theta, g, value,
        temperature=0.05, leader_discount=0.99, follower_discount=0.99,
    )  # fmt: skip
    found = estimate.grad["logits"][1, 1] / (0.4 * 0.6)  # d J / d p
    assert 1.0 < float(found) / game_oracle.exact(0.4, 2.0)[1] < 1.4
    assert float(estimate.grad["logits"][[0, 2]].abs().max()) < 1e-9  # only p matters


@pytest.mark.parametrize(
    ("gain", "discounted", "undiscounted"),
    [((0.0, 0.0), 0.0094172, 0.0149490), ((-5.0, -5.0), 0.1414368, 0.1479958)],
)
def test_leader_return_of_the_lqr_game(gain: tuple[float, float], discounted: float, undiscounted: float) -> None:
    assert lqr_oracle.exact(np.array(gain))[0] == pytest.approx(discounted, abs=6e-8)
    assert lqr_oracle.leader_return(np.array(gain), discount=1.0).real == pytest.approx(undiscounted, abs=6e-8)


@pytest.mark.parametrize("gain", [(0.3, -0.5), (-5.0, -5.0), (-9.9, -9.95)])
def test_lqr_oracle_gradient_is_the_derivative_of_its_value(gain: tuple[float, float]) -> None:
    at = np.array(gain)
    value = lambda x: lqr_oracle.leader_return(x).real
    slopes = [
        np.array([value(at + h * unit) - value(at - h * unit) for unit in np.eye(2)]) / (2 * h) for h in (2e-4, 1e-4)
    ]
    expected = (4 * slopes[1] - slopes[0]) / 3
    assert np.linalg.norm(lqr_oracle.exact(at)[1] - expected) < 1e-6 * np.linalg.norm(expected)


def test_soft_optimum_with_an_observed_disturbance() -> None:
    """`Q(s, d, u) - lambda log pi(u | s, d) = V(s, d)` for every u: the definition of the soft optimum."""
    game, gain = lqr_game_data(), stack([-3.0, -2.0])
    best = games.lqr_follower(gain[0])
    generator = seeded(0)
    s, epsilon, u = (torch.randn(6, k, generator=generator, dtype=torch.float64) for k in (2, 1, 1))
    d = s @ gain.T + epsilon
    after = s @ game.A.T + d @ game.leader_input.T + u @ game.follower_input.T
    z_ahead = torch.cat([after, torch.zeros_like(epsilon)], -1)  # E over the next epsilon adds its variance
    spread = game.leader_std**2 * best.value_matrix[2, 2]
    ahead = -((z_ahead @ best.value_matrix) * z_ahead).sum(-1) - best.offset - spread
    q = -(s.square().sum(-1) + u.square().sum(-1)) + game.follower_discount * ahead
    mean = -s @ best.state_gain.T - epsilon @ best.disturbance_gain.T
    log_pi = torch.distributions.Normal(mean, best.factor[0, 0]).log_prob(u).sum(-1)
    z = torch.cat([s, epsilon], -1)
    value = -((z @ best.value_matrix) * z).sum(-1) - best.offset
    assert torch.allclose(q - game.temperature * log_pi, value, rtol=1e-10, atol=1e-10)


def test_soft_optimum_with_an_unobserved_disturbance() -> None:
    """The same identity, the disturbance being process noise."""
    game, gain = lqr_game_data(), stack([-3.0, -2.0])
    closed, W = game.A + game.leader_input @ gain, game.leader_std**2 * game.leader_input @ game.leader_input.T
    best = soft_lqr(closed, game.follower_input, game.Q, game.R, discount=0.95, temperature=0.1, noise_covariance=W)
    generator = seeded(1)
    s, u = (torch.randn(6, k, generator=generator, dtype=torch.float64) for k in (2, 1))
    after = s @ closed.T + u @ game.follower_input.T
    ahead = -((after @ best.cost_matrix) * after).sum(-1) - (best.cost_matrix * W).sum() - best.offset
    q = -(s.square().sum(-1) + u.square().sum(-1)) + 0.95 * ahead
    value = -((s @ best.cost_matrix) * s).sum(-1) - best.offset
    log_pi = linear_noise_policy(1).log_prob(best.nu, s, u)
    assert torch.allclose(q - 0.1 * log_pi, value, rtol=1e-10, atol=1e-10)


def test_disturbances_that_do_not_fit() -> None:
    game = lqr_game_data()
    args = (game.A, game.follower_input, game.Q, game.R, game.leader_input)
    eye = torch.eye(1, dtype=torch.float64)
    with pytest.raises(ValueError, match="K "):
        observed_soft_lqr(*args, torch.zeros(2, 2, dtype=torch.float64), eye, discount=0.9, temperature=0.1)
    for bad in ({"discount": 1.0, "temperature": 0.1}, {"discount": 0.9, "temperature": 0.0}):
        with pytest.raises(ValueError, match="must"):
            observed_soft_lqr(*args, torch.zeros(1, 2, dtype=torch.float64), eye, **bad)


def test_episodes_of_the_lqr_game() -> None:
    """Mean discounted return of 2000 episodes within 4 standard errors: false alarm 1 in 15 000."""
    gain = stack([-5.0, -5.0])[0]
    data = games.lqr_episodes(gain, games.lqr_follower(gain), 2000, seeded(0))
    returns = discounted_return(data.rewards.reshape(2000, 100), 0.99)
    assert abs(float(returns.mean()) - 0.1414368) < 4 * float(returns.std()) / math.sqrt(2000)
    task, leader = lqr_game(), lqr_game_leader()
    density = leader.log_prob({"gain": gain.unsqueeze(0)}, data.states[:3], data.actions[:3, :1])
    expected = torch.distributions.Normal(data.states[:3] @ gain, 1e-3).log_prob(data.actions[:3, 0])
    assert torch.allclose(density, expected)
    assert task.leader_actions == 1


@pytest.mark.parametrize("gain", [(-3.0, -4.0), (-5.0, -5.0)])
def test_learned_gradient_of_the_lqr_game(gain: tuple[float, float]) -> None:
    """From 4 episodes within 2 % of the exact gradient; measured 0.1 % over 8 draws, plus the tail after 100 steps."""
    found = games.learned_gradient(torch.tensor(gain, dtype=torch.float64), 4, seeded(0)).numpy()
    exact = lqr_oracle.exact(np.array(gain))[1]
    assert np.linalg.norm(found - exact) < 0.02 * np.linalg.norm(exact)


@pytest.mark.slow
def test_ascent_in_the_discrete_game() -> None:
    assert games.learn_game(2.0, 0.9, 0) > 0.99 * 31.17
