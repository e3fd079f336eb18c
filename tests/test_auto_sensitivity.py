"""Which sensitivity is chosen, what is refused and why, and what a fallback tells of its error."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from problems import linear_gaussian_problem, scalar, seeded
from test_hessian_free import COST, LAMBDA, MODEL, PRICE, SIM, soft
from torch import Tensor

from benchmarks.samples import problem, relative_error
from sim2real import (
    ModelMDP,
    Params,
    Policy,
    UnconvergedError,
    UnconvergedWarning,
    boltzmann_policy,
    linear_policy,
    ravel,
    sample_noise,
)
from sim2real.controllers import exploring_policy
from sim2real.estimators.auto_sensitivity import _Request, _visits, auto_sensitivity
from sim2real.estimators.policy_sensitivity import policy_sensitivity
from sim2real.rollout import expected_return, rollout
from sim2real.simulators import linear_gaussian
from sim2real.solvers import cg, linear_noise_policy, policy_optimum

P = problem()
G = {"gain": torch.ones(2, 4, dtype=torch.float64)}
BLACK = replace(P.mdp, step=lambda theta, s, a, e: P.mdp.step(theta, s, a, e).detach(), derivative_order=0)


def noise_of(rollouts: int, horizon: int = 30):
    return sample_noise(P.mdp, P.policy, rollouts, horizon, seeded(0))


def test_a_stationary_policy_of_a_differentiable_model_takes_the_hessian() -> None:
    noise = noise_of(32, horizon=15)
    J = lambda theta, nu: expected_return(P.mdp, P.policy, theta, nu, noise)
    nu = policy_optimum(J, P.theta, P.nu).nu
    found = auto_sensitivity(P.mdp, P.policy, P.theta, nu, noise, cotangent=G)
    expected = policy_sensitivity(J, P.theta, nu, cotangent=G).vjp(G)
    for key, value in found.vjp(G).items():
        torch.testing.assert_close(value, expected[key])
    assert found.report.status.startswith("chose Hessian: the return is differentiable and nu stationary")
    # as tune calls it, with an objective of its own and a first-order model
    once = auto_sensitivity(
        P.mdp, P.policy, P.theta, nu, noise, objective=J, cotangent=G, derivative_order=1, damping=0.0, solve=loose
    )
    torch.testing.assert_close(once.vjp(G)["A"], expected["A"], rtol=1e-5, atol=1e-6)


def loose(*args, **options):
    return cg(*args, tol=1e-7, **options)


def test_a_black_box_takes_the_function_space_and_says_why() -> None:
    found = auto_sensitivity(BLACK, P.policy, P.theta, P.nu, noise_of(400), cotangent=G)
    assert found.report.status.startswith("chose function space: the critic finds nu stationary")
    assert "Hessian: the model has no derivative" in found.report.status
    assert relative_error(found, P) < 0.2


MASK = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]], dtype=torch.float64)


def test_a_black_box_whose_policy_class_binds_takes_second_order_scores() -> None:
    full = linear_policy(2, std=0.5)
    mask = lambda nu: {"gain": MASK * nu["gain"]}
    # nu without influence has no curvature: four gains only
    spread = lambda nu: {"gain": torch.zeros(2, 4, dtype=nu["four"].dtype).masked_scatter(MASK.bool(), nu["four"])}
    policy = replace(
        full,
        act=lambda nu, s, e: full.act(mask(spread(nu)), s, e),
        log_prob=lambda nu, s, a: full.log_prob(mask(spread(nu)), s, a),
    )
    noise = sample_noise(P.mdp, policy, 1500, 20, seeded(0))
    J = lambda theta, nu: expected_return(P.mdp, policy, theta, nu, noise)
    nu = policy_optimum(J, P.theta, {"four": P.nu["gain"][MASK.bool()]}).nu
    found = auto_sensitivity(BLACK, policy, P.theta, nu, noise, tolerance=0.1)
    assert found.report.status.startswith("chose score")
    assert "the policy class binds" in found.report.status


def test_a_deterministic_policy_that_binds_is_refused_or_bounded() -> None:
    sure = linear_policy(2)
    spread = lambda nu: {"gain": torch.zeros(2, 4, dtype=nu["four"].dtype).masked_scatter(MASK.bool(), nu["four"])}
    policy = replace(sure, act=lambda nu, s, e: sure.act(spread(nu), s, e))
    J = lambda theta, nu: exact_return(spread(nu)["gain"], theta, std=0.0)
    nu = policy_optimum(J, P.theta, {"four": P.nu["gain"][MASK.bool()]}).nu
    trying = exploring_policy(policy, torch.full((2,), 0.3).double())
    noise = sample_noise(P.mdp, trying, 600, 20, seeded(0))
    g = {"four": torch.ones(4, dtype=torch.float64)}
    with pytest.raises(
        UnconvergedError, match=r"the policy class binds.*score: a deterministic policy has no log_prob"
    ):
        auto_sensitivity(BLACK, policy, P.theta, nu, noise, behaviour=trying, cotangent=g)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnconvergedWarning)
        found = auto_sensitivity(
            BLACK, policy, P.theta, nu, noise, behaviour=trying, cotangent=g, fallback="function_space"
        )
    truth = policy_sensitivity(J, P.theta, nu).vjp(g)
    error = float((ravel(found.vjp(g)) - ravel(truth)).norm())
    assert found.report.error_bound is not None
    assert found.report.error_bound > error
    assert "the policy class binds, for an error of up to" in found.report.status


def test_a_policy_short_of_the_optimum_is_refused_with_what_it_costs() -> None:
    away = {"gain": 0.8 * P.nu["gain"]}
    noise = noise_of(64)
    with pytest.raises(UnconvergedError, match=r"nu is not stationary.*a Newton step promises .* of return"):
        auto_sensitivity(P.mdp, P.policy, P.theta, away, noise)
    with pytest.raises(UnconvergedError, match=r"function space: .*nu is not stationary.*of return"):
        auto_sensitivity(BLACK, P.policy, P.theta, away, noise_of(400))


def test_a_named_fallback_tells_the_cost_and_the_error() -> None:
    away = {"gain": 0.8 * P.nu["gain"]}
    noise = noise_of(500, horizon=20)
    found = auto_sensitivity(P.mdp, P.policy, P.theta, away, noise, cotangent=G, fallback="function_space")
    assert found.report.status.startswith("fell back on 'function_space', as named by the caller")
    truth = {key: torch.einsum("mn,mn...->...", G["gain"], value) for key, value in P.jacobian.items()}
    error = float((ravel(found.vjp(G)) - ravel(truth)).norm())
    assert found.report.error_bound is not None
    assert found.report.error_bound >= 0.7 * error  # two standard errors and an estimate of the rest
    assert found.report.converged
    exact = [float(exact_return(gain)) for gain in (P.nu["gain"], away["gain"])]
    assert float(found.info["gain"]) == pytest.approx(exact[0] - exact[1], rel=0.5)  # 10 000 transitions


def exact_return(gain: Tensor, theta: Params = P.theta, std: float = 0.5) -> Tensor:
    """From s_0 ~ N(0, I), by the recursion of the second moment."""
    second, total = torch.eye(4, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    closed = theta["A"] - theta["B"] @ gain
    for t in range(80):
        total = total - 0.9**t * ((torch.eye(4).double() + 0.3 * gain.mT @ gain) * second).sum()
        second = closed @ second @ closed.mT + std**2 * theta["B"] @ theta["B"].mT + 0.09 * torch.eye(4).double()
    return total


def test_a_fallback_with_an_error_above_its_size_is_not_converged() -> None:
    noise = noise_of(12, horizon=10)
    with pytest.warns(UnconvergedWarning):
        found = auto_sensitivity(
            BLACK, P.policy, P.theta, {"gain": 0.2 * P.nu["gain"]}, noise, cotangent=G, fallback="function_space"
        )
    assert not found.report.converged


def test_early_ends_turn_pathwise_derivatives_down() -> None:
    ending = replace(P.mdp, terminal=lambda theta, s: s.abs().max(-1).values > 2.0)
    with pytest.raises(UnconvergedError, match="rollouts end early"):
        auto_sensitivity(replace(ending, log_prob=None), P.policy, P.theta, P.nu, noise_of(64))
    never = replace(P.mdp, terminal=lambda theta, s: s.abs().max(-1).values > 1e6)
    with pytest.raises(UnconvergedError, match="nu is not stationary"):
        auto_sensitivity(never, P.policy, P.theta, {"gain": 0.5 * P.nu["gain"]}, noise_of(64))


def test_a_deterministic_policy_of_a_black_box_needs_a_behaviour() -> None:
    sure = linear_policy(2)
    with pytest.raises(UnconvergedError, match="exploration"):
        auto_sensitivity(BLACK, sure, P.theta, P.nu, sample_noise(P.mdp, sure, 100, 30, seeded(0)))
    trying = exploring_policy(sure, torch.full((2,), 0.5).double())
    noise = sample_noise(P.mdp, trying, 800, 30, seeded(0))
    found = auto_sensitivity(BLACK, sure, P.theta, P.nu, noise, behaviour=trying)
    assert found.report.status.startswith("chose function space")


def bandit() -> tuple[ModelMDP, Params]:
    """Two actions worth 0 and `pay`, one state; the soft optimum is softmax((0, pay) / temperature)."""
    mdp = ModelMDP(
        initial_state=lambda theta, e: torch.zeros(len(e), 1, dtype=torch.float64),
        step=lambda theta, s, a, e: 0.0 * s + 0.0 * e,
        reward=lambda theta, s, a, e, after: theta["pay"] * a[:, 0],
        noise_dims=(0, 1),
        dt=1.0,
        discount=0.5,
    )
    return mdp, {"pay": scalar(0.4)}


def test_a_soft_policy_is_refused_until_soft_is_named() -> None:
    mdp, theta = bandit()
    policy = boltzmann_policy(lambda nu, s: nu["q"].expand(len(s), 2), 0.5)
    nu = {"q": torch.tensor([0.0, 0.4], dtype=torch.float64)}
    noise = sample_noise(mdp, policy, 64, 3, seeded(0))
    g = {"q": torch.tensor([-0.5, 0.5], dtype=torch.float64)}
    with pytest.raises(UnconvergedError, match="no derivative in nu"):
        auto_sensitivity(mdp, policy, theta, nu, noise, cotangent=g)
    with pytest.raises(ValueError, match="needs the temperature"):
        auto_sensitivity(mdp, policy, theta, nu, noise, cotangent=g, fallback="soft")
    choices = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    found = auto_sensitivity(
        mdp, policy, theta, nu, noise, cotangent=g, fallback="soft", temperature=0.5, actions=choices
    )
    # d(q_1 - q_0) = d pay
    assert float(found.vjp(g)["pay"]) == pytest.approx(0.5, rel=1e-6)
    assert found.report.status.startswith("fell back on 'soft'")
    assert abs(float(found.info["gain"])) < 1e-6


def test_bad_requests_are_named() -> None:
    with pytest.raises(ValueError, match="fallback must be"):
        auto_sensitivity(P.mdp, P.policy, P.theta, P.nu, noise_of(4), fallback="none")
    upside = replace(BLACK, reward=lambda *args: -P.mdp.reward(*args))
    with pytest.raises(UnconvergedError, match=r"the fallback 'function_space' fails, too.*no maximum"):
        auto_sensitivity(upside, P.policy, P.theta, P.nu, noise_of(100), fallback="function_space")
    silent = replace(BLACK, log_prob=None)
    with pytest.raises(UnconvergedError, match=r"score: the model declares no log_prob"):
        auto_sensitivity(silent, P.policy, P.theta, P.nu, noise_of(100))
    with pytest.raises(UnconvergedError, match=r"rank .*score: it needs four rollouts at least"):
        auto_sensitivity(BLACK, P.policy, P.theta, P.nu, noise_of(2, horizon=5))


def test_the_soft_fallback_is_not_biased_by_the_noise_that_led_to_its_states() -> None:
    mdp = linear_gaussian(MODEL["A"], MODEL["B"], noise_covariance=0.5 * COST, state_cost=COST, action_cost=PRICE)
    mdp, policy = replace(mdp, discount=SIM), linear_noise_policy(1)
    g = {"gain": torch.tensor([[1.0, -0.5]], dtype=torch.float64), "factor": torch.full((1, 1), 0.3).double()}
    exact = ravel(torch.func.vjp(soft, MODEL)[1](g)[0])
    found = []
    for seed in range(6):
        noise = sample_noise(mdp, policy, 256, 40, seeded(seed))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnconvergedWarning)
            chain = auto_sensitivity(
                mdp, policy, MODEL, soft(MODEL), noise, fallback="soft", temperature=LAMBDA, derivative_order=0
            )
        found.append(ravel(chain.vjp(g)))
    # 1536 rollouts; the noise that led to the states, used again for their rollouts, is 60 % off
    assert float((torch.stack(found).mean(0) - exact).norm()) < 0.12 * float(exact.norm())


def test_the_soft_fallback_visits_no_state_beyond_an_end() -> None:
    mdp, policy, theta, nu = linear_gaussian_problem()
    mdp = replace(mdp, terminal=lambda th, s: s[:, 0] > 1.0)
    noise = sample_noise(mdp, policy, 100, 20, seeded(3))
    nothing = (None, None, None, None, "auto", cg, 0.1)
    states, weight = _visits(_Request(mdp, policy, theta, nu, noise, lambda th, at: th["A"].sum(), None, 0, *nothing))
    assert not bool(mdp.terminal(theta, states).any())
    mask = rollout(mdp, policy, theta, nu, noise).mask
    assert weight == pytest.approx(float((mask * mdp.discount ** torch.arange(20).double()).sum(1).mean()))


def test_too_many_parameters_for_scores_are_a_reason_not_an_error() -> None:
    wide = lambda nu, s: -(s @ nu["gain"].T)[:, :2]
    policy = Policy(lambda nu, s, e: wide(nu, s) + 0.5 * e, lambda nu, s, a: -(a - wide(nu, s)).square().sum(-1), 2)
    upside = replace(BLACK, reward=lambda *args: -P.mdp.reward(*args))
    with pytest.raises(UnconvergedError, match=r"no maximum.*score: too many parameters"):
        auto_sensitivity(upside, policy, P.theta, {"gain": torch.zeros(600, 4).double()}, noise_of(100))
