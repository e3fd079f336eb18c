"""Critics of a leader: the Bellman operator, its transpose, folds, nodes; thermal gradients within their bars."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from problems import seeded

from benchmarks import thermal
from benchmarks.oracles import building_thermal as oracle
from sim2real.estimators import (
    CriticOptions,
    boltzmann_covariance_gradient,
    fit_linear_follower,
    fit_soft_value,
    inverse_noise_weights,
    random_features,
    returns_to_go,
    trained_features,
)
from sim2real.estimators.critic import CriticError
from sim2real.estimators.leader_critic import (
    bellman_operator,
    leader_nodes,
    quadratic_action_features,
    quadratic_state_features,
    read,
    solve,
    worth,
)
from sim2real.estimators.transitions import Transitions
from sim2real.params import ravel
from sim2real.solvers import linear_noise_policy

THETA = {key: torch.zeros(4, dtype=torch.float64) for key in ("insulation", "airflow")}


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


@pytest.mark.parametrize("folds", [1, 3])
def test_operator_solves_and_transposes(folds: int) -> None:
    phi, following, source = draws(60, 4), draws(60, 4, seed=1), draws(60, seed=2)
    weights, fold = draws(60, seed=3).square() + 0.1, torch.arange(60) % folds
    operator = bellman_operator(phi, following, weights, 0.3, fold)
    found = solve(operator, source)
    for f in range(folds):
        rows = fold != f if folds > 1 else torch.ones(60, dtype=torch.bool)
        weighted = weights[rows, None] * phi[rows]
        expected = torch.linalg.solve(weighted.T @ (phi - 0.3 * following)[rows], weighted.T @ source[rows])
        assert torch.allclose(found[f], expected, rtol=1e-9)
    functional = draws(folds, 4, seed=4)
    assert torch.allclose((functional * found).sum(), worth(operator, functional) @ source, rtol=1e-9)
    assert torch.allclose(read(found, phi, fold), (phi * found[fold]).sum(-1))


def test_ridge_and_features_that_are_not_finite() -> None:
    phi = torch.ones(10, 2, dtype=torch.float64)  # singular
    fold, one = torch.zeros(10, dtype=torch.long), torch.ones(10, dtype=torch.float64)
    found = solve(bellman_operator(phi, phi, one, 0.5, fold, ridge=1e-9), one)[0]
    assert torch.allclose(found, torch.ones(2, dtype=torch.float64), rtol=1e-6)
    with pytest.raises(CriticError, match="not finite"):
        bellman_operator(phi * torch.nan, phi, one, 0.5, fold)


@pytest.mark.parametrize("m", [1, 2, 3])
def test_nodes_are_exact_for_the_covariance_of_quadratics(m: int) -> None:
    policy, nu = linear_noise_policy(m), {"gain": draws(m, 2), "factor": draws(m, m, seed=1).tril() + 2 * torch.eye(m)}
    states, P, R = draws(4, 2, seed=2), draws(m, m, seed=3), draws(m, m, seed=4)
    P, R = P + P.T, R + R.T
    nodes, shares = leader_nodes(policy, nu, states)
    q, g = (torch.einsum("kni,ij,knj->kn", nodes, M, nodes) for M in (P, R))
    found = (shares * (q - (shares * q).sum(0)) * g).sum(0)
    mean, S = -states @ nu["gain"].T, nu["factor"] @ nu["factor"].T
    expected = 4 * ((mean @ P @ S) * (mean @ R)).sum(-1) + 2 * (P @ S @ R @ S).trace()
    assert torch.allclose(found, expected, rtol=1e-9)


def test_quadratic_features() -> None:
    s, a = draws(3, 2), draws(3, 1, seed=1)
    phi = quadratic_action_features(s, a)
    assert phi.shape == (3, 10)
    assert torch.allclose(phi[:, 5], s[:, 0] * s[:, 1])
    assert torch.equal(quadratic_state_features(s)[:, 0], torch.ones(3, dtype=torch.float64))
    assert torch.allclose(inverse_noise_weights(s, floor=1.0, power=2.0), (1 + s.square().sum(-1)) ** -2)
    with pytest.raises(ValueError, match="floor"):
        inverse_noise_weights(s, floor=0.0)


def cosine(found: dict[str, torch.Tensor]) -> float:
    exact = torch.from_numpy(oracle.exact(np.zeros(8)).gradient)
    vector = ravel({key: found[key] for key in THETA})
    return float(torch.nn.functional.cosine_similarity(vector, exact, dim=0))


CHOICES = {
    "action": (thermal.plain, 0.9),
    "state": (thermal.of_state, 0.95),
    "known start": (thermal.known_start, 0.95),
    "taken": (thermal.taken, 0.8),
    "score": (thermal.score, 0.5),
    "folds": (thermal.folded, 0.9),
}


@pytest.mark.parametrize("name", CHOICES)
def test_thermal_gradients(name: str) -> None:
    """One draw of 10 000 transitions; the bound is the worst of 30 draws in the benchmark, rounded down."""
    choice, bound = CHOICES[name]
    assert cosine(thermal.gradient(THETA, 1, choice).grad) > bound


def test_thermal_gradient_of_a_black_box() -> None:
    white, black = (thermal.gradient(THETA, 1, thermal.plain, black_box=box).grad for box in (False, True))
    assert cosine(black) > 0.9
    # the policy is known to 1 % from 10 000 actions
    assert float(torch.nn.functional.cosine_similarity(ravel(white), ravel(black), dim=0)) > 0.99


def test_fitted_follower_is_the_one_that_acted() -> None:
    best = thermal.respond(THETA)
    data, rewards = thermal.observe(THETA, best, 3)
    policy, nu = fit_linear_follower(data)
    # standard errors: noise of 0.5 over states of size 1, 10 000 of them; 5 of them
    assert float((nu["gain"] - best.nu["gain"]).abs().max()) < 0.05
    covariance = nu["factor"] @ nu["factor"].T
    expected = best.nu["factor"] @ best.nu["factor"].T
    assert float((covariance - expected).norm() / expected.norm()) < 0.05
    weights = inverse_noise_weights(data.states)
    value = fit_soft_value(policy, nu, data, rewards, discount=0.9, temperature=0.1, row_weights=weights)
    s = 2 * draws(50, 4)
    exact = -((s @ best.cost_matrix) * s).sum(-1) - best.offset
    assert float((value(s) - exact).norm() / exact.norm()) < 0.02


def test_followers_that_cannot_be_fitted() -> None:
    states = draws(30, 2)
    data = Transitions(
        states, states @ draws(2, 1), states[:, 0], states, torch.zeros(30, dtype=torch.bool),
        torch.arange(30), torch.zeros(30, dtype=torch.long), states[:1],
    )  # fmt: skip
    with pytest.raises(ValueError, match="without noise"):
        fit_linear_follower(data)
    few = Transitions(*(value[:3] for value in vars(data).values()))
    with pytest.raises(ValueError, match="do not fix"):
        fit_linear_follower(few)
    with pytest.raises(ValueError, match="follower_rewards"):
        fit_soft_value(linear_noise_policy(1), {}, data, states, discount=0.9, temperature=0.1)


def test_network_features() -> None:
    """Returns to go, and features that training moves."""
    best = thermal.respond(THETA)
    data, rewards = thermal.observe(THETA, best, 0)
    data = replace(data, **{key: value[: 20 * 100] for key, value in vars(data).items() if key != "initial_states"})
    data = replace(data, initial_states=data.initial_states[:20])
    targets = torch.stack([data.rewards, rewards[:2000]], -1)
    returns = returns_to_go(data, targets, 0.9)
    assert torch.allclose(returns[0], (0.9 ** torch.arange(100, dtype=torch.float64)) @ targets[:100])

    plain, moved = (trained_features(data, targets, 0.9, seeded(0), hidden=(16,), steps=n)(data.states) for n in (0, 5))
    assert plain.shape == moved.shape == (2000, 21)
    assert torch.equal(plain[:, :5], moved[:, :5])  # 1 and s / scale
    assert float((plain - moved).abs().max()) > 1e-6
    with pytest.raises(ValueError, match="targets must be"):
        trained_features(data, rewards, 0.9, seeded(0))
    for bad in ({"width": 0.0}, {"scale": -1.0}):
        with pytest.raises(ValueError, match="must be positive"):
            random_features(data.states, 3, seeded(0), **bad)


def test_single_precision_in_and_out() -> None:
    """float32 theta, nu and data give a float32 gradient, computed in float64: equal to rounding of the inputs."""
    best = thermal.respond(THETA)
    data, _ = thermal.observe(THETA, best, 1)
    soft_value = lambda s: -((s @ best.cost_matrix) * s).sum(-1)
    single = lambda params: {key: value.float() for key, value in params.items()}
    floats = {key: value.float() for key, value in vars(data).items() if value.is_floating_point()}
    found, expected = (
        boltzmann_covariance_gradient(
            thermal.TASK,
            thermal.POLICY,
            theta,
            nu,
            batch,
            temperature=0.1,
            soft_value=soft_value,
            critics=CriticOptions(row_weights=inverse_noise_weights(batch.states)),
        ).grad
        for theta, nu, batch in (
            (single(THETA), single(best.nu), replace(data, **floats)),
            (THETA, best.nu, data),
        )
    )
    assert found["airflow"].dtype == torch.float32
    # states of size 0.02 at the end, rounded at 1e-7, enter weights and critics: a few parts in 1e4
    assert float((ravel(found) - ravel(expected)).norm() / ravel(expected).norm()) < 5e-3


def test_state_critic_with_smooth_features() -> None:
    assert cosine(thermal.gradient(THETA, 1, thermal.smooth).grad) > 0.85


def test_a_leader_value_in_place_of_the_critic() -> None:
    """The exact Q_L and V_L of the task handed in: what is left is the noise of the states and of G."""
    best = thermal.respond(THETA)
    data, _ = thermal.observe(THETA, best, 2)
    A, K, B = thermal.thermal_matrix(THETA, thermal.BUILDING), best.nu["gain"], thermal.BUILDING.B
    F, M = A - B @ K, (torch.eye(4) - 0.25).double() / 4
    P = torch.zeros(4, 4, dtype=torch.float64)
    for _ in range(400):
        P = M + 0.5 * K.T @ K + 0.9 * F.T @ P @ F
    quadratic = lambda x, W: ((x @ W) * x).sum(-1)
    critics = CriticOptions(
        row_weights=inverse_noise_weights(data.states),
        leader_value=lambda s: -quadratic(s, P),
        leader_q=lambda s, a: -quadratic(s, M) - 0.5 * a.square().sum(-1) - 0.9 * quadratic(s @ A.T + a @ B.T, P),
    )
    soft_value = lambda s: -quadratic(s, best.cost_matrix)
    estimate = boltzmann_covariance_gradient(
        thermal.TASK, thermal.POLICY, THETA, best.nu, data, temperature=0.1, soft_value=soft_value, critics=critics
    )
    assert cosine(estimate.grad) > 0.95  # measured 0.976
