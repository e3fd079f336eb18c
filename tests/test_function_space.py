"""Function-space sensitivities from simulated transitions, against scipy and closed forms."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import scalar, seeded
from torch import Tensor

from benchmarks.samples import problem, relative_error
from sim2real import (
    ModelMDP,
    Params,
    UnconvergedError,
    UnconvergedWarning,
    boltzmann_policy,
    dot,
    gaussian_policy,
    linear_policy,
    ravel,
    sample_noise,
)
from sim2real.controllers import exploring_policy
from sim2real.estimators.critic import CriticError
from sim2real.estimators.critic_derivative import critic_jvp, critic_vjp
from sim2real.estimators.function_space import function_space_sensitivity, pointwise_sensitivity
from sim2real.estimators.model_critic import model_critic
from sim2real.estimators.policy_sensitivity import policy_sensitivity
from sim2real.solvers import policy_optimum


def noise_of(p, rollouts: int, seed: int = 0, horizon: int = 40):
    return sample_noise(p.mdp, p.policy, rollouts, horizon, seeded(seed))


def direction(theta: Params, seed: int = 5) -> Params:
    generator = seeded(seed)
    return {k: torch.randn(value.shape, generator=generator, dtype=torch.float64) for k, value in theta.items()}


@pytest.mark.parametrize(("derivative", "bar"), [("score", 0.2), ("pathwise", 0.06)])
def test_the_jacobian_and_its_standard_error(derivative: str, bar: float) -> None:
    """16 000 transitions; the error falls as 1/sqrt(N) from 0.052 and 0.019 at 1e5, times 2.5.

    Five standard errors of the jackknife over 12 groups: t(11) beyond 5, 24 entries, 1e-2 false alarms.
    """
    p = problem()
    critic = model_critic(p.mdp, p.policy, p.theta, p.nu, noise_of(p, 400), derivative=derivative, groups=12)
    g = {"gain": torch.arange(8, dtype=torch.float64).reshape(2, 4) - 3.0}
    found = function_space_sensitivity(p.mdp, p.policy, p.theta, p.nu, critic, cotangent=g, states=64, strict=True)
    assert relative_error(found, p) < bar
    expected = {key: torch.einsum("mn,mn...->...", g["gain"], value) for key, value in p.jacobian.items()}
    error, stderr = ravel(found.vjp(g)) - ravel(expected), found.info["stderr"]
    assert bool((error.abs() <= 5 * stderr).all())
    # and not by a stderr that is far too large: 24 entries, correlated
    assert 0.3 < float((error / stderr).square().mean().sqrt()) < 2.5
    assert found.report.error_bound == pytest.approx(2 * float(stderr.norm()))
    v = direction(p.theta)
    assert float(dot(found.vjp(g), v)) == pytest.approx(float(dot(found.jvp(v), g)), rel=1e-8)


def test_standard_error_falls_as_the_root_of_n() -> None:
    p, g = problem(), {"gain": torch.ones(2, 4, dtype=torch.float64)}
    figures = []
    for rollouts in (50, 450):
        noises = [noise_of(p, rollouts, seed, horizon=15) for seed in range(2)]
        found = [
            function_space_sensitivity(p.mdp, p.policy, p.theta, p.nu, noise, cotangent=g, states=64, tolerance=0.3)
            for noise in noises
        ]
        figures.append(float(torch.stack([one.info["stderr"].norm() for one in found]).mean()))
    # nine times the rollouts, a third of the error; a jackknife of 8 groups is known to 27 %, two of them to 19 %
    assert figures[0] / figures[1] == pytest.approx(3.0, rel=0.4)


def black_box(mdp: ModelMDP) -> ModelMDP:
    """The same model, giving no derivative of its step."""
    return replace(mdp, step=lambda theta, s, a, e: mdp.step(theta, s, a, e).detach(), derivative_order=0)


def test_a_black_box_takes_its_scores_only() -> None:
    p, g = problem(), {"gain": torch.ones(2, 4, dtype=torch.float64)}
    noise, closed = noise_of(p, 100), black_box(p.mdp)
    found = function_space_sensitivity(closed, p.policy, p.theta, p.nu, noise)
    expected = function_space_sensitivity(p.mdp, p.policy, p.theta, p.nu, noise, derivative="score")
    for key, value in found.vjp(g).items():
        torch.testing.assert_close(value, expected.vjp(g)[key])
    with pytest.raises(ValueError, match="derivative_order 0"):
        model_critic(closed, p.policy, p.theta, p.nu, noise, derivative="pathwise")
    with pytest.raises(ValueError, match="declares no log_prob"):
        model_critic(replace(closed, log_prob=None), p.policy, p.theta, p.nu, noise)


def test_a_first_order_model_gives_the_same_products() -> None:
    p, v = problem(), direction(problem().theta)
    noise = noise_of(p, 60)
    once = replace(p.mdp, derivative_order=1)
    both = [model_critic(mdp, p.policy, p.theta, p.nu, noise) for mdp in (p.mdp, once)]
    # central differences of a step that is linear in theta: rounding 1e-16 / 6e-6
    torch.testing.assert_close(
        critic_jvp(both[1], once, p.theta, v), critic_jvp(both[0], p.mdp, p.theta, v), rtol=1e-7, atol=1e-7
    )
    g = torch.ones_like(both[0].weights)
    torch.testing.assert_close(critic_vjp(both[1], once, p.theta, g), critic_vjp(both[0], p.mdp, p.theta, g))


def tracking() -> tuple[ModelMDP, Params]:
    """s' = a s + b u + 0.3 w; pays for s' near the goal; theta enters step and reward."""

    def reward(theta: Params, s: Tensor, u: Tensor, e: Tensor, after: Tensor) -> Tensor:
        return -(after[:, 0] - theta["goal"]).square() - 0.2 * u[:, 0].square()

    def step(theta: Params, s: Tensor, u: Tensor, e: Tensor) -> Tensor:
        return theta["a"] * s + theta["b"] * u + 0.3 * e

    def log_prob(theta: Params, s: Tensor, u: Tensor, after: Tensor) -> Tensor:
        return -0.5 * ((after - theta["a"] * s - theta["b"] * u) / 0.3).square().sum(-1)

    mdp = ModelMDP(lambda theta, e: e, step, reward, (1, 1), 1.0, 0.8, log_prob=log_prob)
    return mdp, {"a": scalar(0.9), "b": scalar(0.7), "goal": scalar(1.0)}


def tracking_return(theta: Params, nu: Params) -> Tensor:
    """Exact, for `u = -K s + k + 0.4 e` from s_0 ~ N(0, 1), by the recursion of mean and variance."""
    K, k = nu["gain"][0, 0], nu["offset"][0]
    mean, var, total = scalar(0.0), scalar(1.0), scalar(0.0)
    for t in range(80):
        u_mean, u_var = -K * mean + k, K**2 * var + 0.16
        closed = theta["a"] - theta["b"] * K
        mean, var = closed * mean + theta["b"] * k, closed**2 * var + 0.16 * theta["b"] ** 2 + 0.09
        total = total - 0.8**t * ((mean - theta["goal"]) ** 2 + var + 0.2 * (u_mean**2 + u_var))
    return total


@pytest.mark.parametrize("derivative", ["score", "pathwise"])
def test_theta_in_the_reward_and_a_reward_of_the_next_state(derivative: str) -> None:
    """3 entries, 5 standard errors of the jackknife over 12 groups: 1e-3 false alarms."""
    mdp, theta = tracking()
    policy = linear_policy(1, std=0.4)
    start = {"gain": torch.full((1, 1), 0.5).double(), "offset": torch.full((1,), 0.5).double()}
    nu = policy_optimum(tracking_return, theta, start).nu
    g = {"gain": torch.ones(1, 1).double(), "offset": torch.ones(1).double()}
    expected = policy_sensitivity(tracking_return, theta, nu).vjp(g)
    noise = sample_noise(mdp, policy, 600, 20, seeded(0))
    critic = model_critic(mdp, policy, theta, nu, noise, derivative=derivative, groups=12)
    found = function_space_sensitivity(mdp, policy, theta, nu, critic, cotangent=g, states=64, strict=True)
    error = ravel(found.vjp(g)) - ravel(expected)
    assert bool((error.abs() <= 5 * found.info["stderr"] + 1e-9).all()), (error, found.info["stderr"])
    assert float(error.norm() / ravel(expected).norm()) < (0.2 if derivative == "score" else 0.05)


def test_actions_move_as_the_optimal_gain_does() -> None:
    p = problem()
    states = torch.randn(5, 4, generator=seeded(1), dtype=torch.float64)
    critic = model_critic(p.mdp, p.policy, p.theta, p.nu, noise_of(p, 500))
    found = pointwise_sensitivity(p.mdp, p.policy, p.theta, p.nu, critic, states)
    v = direction(p.theta)
    moved = found.jvp(v)["action"]
    gains = sum(torch.tensordot(p.jacobian[key], v[key], 2) for key in v)
    expected = -states @ gains.mT
    assert float((moved - expected).norm() / expected.norm()) < 0.08  # 20 000 transitions
    u = {"action": torch.randn(5, 2, generator=seeded(2), dtype=torch.float64)}
    assert float(dot(found.vjp(u), v)) == pytest.approx(float((u["action"] * moved).sum()), rel=1e-9)
    # the linear policy can follow its critic exactly, so both routes agree
    pushed = function_space_sensitivity(p.mdp, p.policy, p.theta, p.nu, critic).jvp(v)["gain"]
    torch.testing.assert_close(-states @ pushed.mT, moved, rtol=0.05, atol=0.05)
    with pytest.raises(KeyError, match="cotangent of vjp"):
        found.vjp({"gain": u["action"]})


def test_a_deterministic_policy_needs_exploration() -> None:
    p = problem()
    sure = linear_policy(2)
    noise = sample_noise(p.mdp, sure, 200, 40, seeded(0))
    with pytest.raises(CriticError, match="exploration"):
        function_space_sensitivity(p.mdp, sure, p.theta, p.nu, noise)
    trying = exploring_policy(sure, torch.full((2,), 0.5).double())
    with pytest.raises(ValueError, match="0 columns, the acting policy needs 2"):
        function_space_sensitivity(p.mdp, sure, p.theta, p.nu, noise, behaviour=trying)
    noise = sample_noise(p.mdp, trying, 500, 40, seeded(0))
    found = function_space_sensitivity(p.mdp, sure, p.theta, p.nu, noise, behaviour=trying, strict=True)
    assert relative_error(found, p) < 0.06  # as the stochastic policy's, at 20 000 transitions


def test_episodes_that_end_are_worth_nothing_after() -> None:
    """One step only, every successor is terminal: Q = r, so the optimal action is theta s, whatever the discount."""
    once = ModelMDP(
        initial_state=lambda theta, e: e,
        step=lambda theta, s, a, e: 100.0 + s + a + e,
        reward=lambda theta, s, a, e, after: -(a[:, 0] - theta["t"] * s[:, 0]).square(),
        noise_dims=(1, 1),
        dt=1.0,
        terminal=lambda theta, s: s[:, 0] > 50.0,
        log_prob=lambda theta, s, a, after: -0.5 * (after - 100.0 - s - a).square().sum(-1),
    )
    theta, nu = {"t": scalar(0.7)}, {"gain": torch.full((1, 1), -0.7).double()}
    policy = linear_policy(1, std=0.3)
    noise = sample_noise(once, policy, 300, 4, seeded(0))
    for derivative in ("score", "pathwise"):
        found = function_space_sensitivity(once, policy, theta, nu, noise, derivative=derivative, strict=True)
        # the reward is deterministic and quadratic: no sampling error is left
        assert float(found.jvp({"t": scalar(1.0)})["gain"]) == pytest.approx(-1.0, abs=1e-7)


def test_single_precision_networks_keep_their_dtype() -> None:
    p = problem()
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 4)
    with torch.no_grad():
        net.weight[:2], net.weight[2:], net.bias[:2], net.bias[2:] = -p.nu["gain"].float(), 0.0, 0.0, -0.7
    policy, nu = gaussian_policy(net), {k: value.detach() for k, value in net.named_parameters()}
    theta = {key: value.float() for key, value in p.theta.items()}
    noise = sample_noise(p.mdp, policy, 200, 40, seeded(0), dtype=torch.float32)
    found = function_space_sensitivity(p.mdp, policy, theta, nu, noise, damping=1e-3, tolerance=1.0)
    pushed = found.jvp({key: torch.ones_like(value) for key, value in theta.items()})
    assert pushed["weight"].dtype == torch.float32
    assert found.vjp(pushed)["A"].dtype == torch.float32
    gains = sum(p.jacobian[key].sum((-1, -2)) for key in theta)
    torch.testing.assert_close(pushed["weight"][:2].double(), -gains, rtol=0.1, atol=0.1)


def test_conditions_that_fail_are_named() -> None:
    p = problem()
    noise = noise_of(p, 100)
    away = {"gain": 0.5 * p.nu["gain"]}
    with pytest.warns(UnconvergedWarning, match="nu is not stationary"):
        found = function_space_sensitivity(p.mdp, p.policy, p.theta, away, noise)
    assert float(found.info["gain"]) > 0.1
    with pytest.raises(UnconvergedError, match="nu is not stationary"):
        function_space_sensitivity(p.mdp, p.policy, p.theta, away, noise, strict=True)
    far, brief = {"gain": -0.4 * p.nu["gain"]}, sample_noise(p.mdp, p.policy, 50, 20, seeded(0))
    with pytest.raises(CriticError, match="value diverges"):
        function_space_sensitivity(p.mdp, p.policy, p.theta, far, brief)
    discrete = boltzmann_policy(lambda nu, s: s @ nu["gain"].mT, 1.0)
    pushes = {
        "step": lambda theta, s, a, e: p.mdp.step(theta, s, torch.cat([a, a], -1), e),
        "reward": lambda theta, s, a, e, after: p.mdp.reward(theta, s, torch.cat([a, a], -1), e, after),
    }
    forced = replace(p.mdp, **pushes)
    noise = sample_noise(forced, discrete, 50, 20, seeded(0))
    with pytest.raises(ValueError, match="no derivative in nu"):
        function_space_sensitivity(forced, discrete, p.theta, p.nu, noise)
    with pytest.raises(ValueError, match="groups must be between 1 and"):
        model_critic(p.mdp, p.policy, p.theta, p.nu, noise_of(p, 4))
    with pytest.raises(ValueError, match="derivative must be"):
        model_critic(p.mdp, p.policy, p.theta, p.nu, noise_of(p, 20), derivative="exact")
    with pytest.raises(ValueError, match="states must be at least 1"):
        function_space_sensitivity(p.mdp, p.policy, p.theta, p.nu, noise_of(p, 20), states=0)
    upside = replace(p.mdp, reward=lambda *args: -p.mdp.reward(*args))
    with pytest.raises(UnconvergedError, match="no maximum in the action"):
        pointwise_sensitivity(upside, p.policy, p.theta, p.nu, noise_of(p, 100), torch.zeros(1, 4).double())


def test_an_end_at_the_last_step_is_an_end() -> None:
    p = problem()
    mdp = replace(
        p.mdp,
        step=lambda theta, s, a, e: p.mdp.step(theta, s, a, e) + 1000.0,
        terminal=lambda theta, s: s[:, 0] > 500.0,
        log_prob=None,
    )
    critic = model_critic(mdp, p.policy, p.theta, p.nu, noise_of(p, 400, horizon=1), derivative="pathwise")
    flat = critic.data.transitions
    assert bool(flat.ended.all())
    # nothing follows: Q is the reward, quadratic in state and action
    torch.testing.assert_close(critic.data.phi @ critic.weights, flat.rewards, rtol=1e-6, atol=1e-6)
