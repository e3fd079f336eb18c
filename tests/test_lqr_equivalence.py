"""Linear-quadratic equivalence against scipy's Riccati equation with cross terms, and value iteration in numpy."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.linalg import solve_discrete_are

from benchmarks.equivalence import SIZES, quadratic_error, quadratic_pair, reference_h
from sim2real.estimators import EquivalenceError, LinearQuadratic, lqr_equivalence_gap, lqr_modified_reward
from sim2real.estimators.lqr_equivalence import quadratic_optimum
from sim2real.solvers import UnstableError, lyapunov, riccati


@pytest.mark.parametrize("noise", [False, True], ids=["additive", "input noise"])
@pytest.mark.parametrize(("n", "m"), SIZES[:3])
def test_action_values_agree_by_scipy(n: int, m: int, noise: bool) -> None:
    world, model = quadratic_pair(n, m, n, noise=noise)
    assert quadratic_error(world, model) < 1e-10
    assert lqr_equivalence_gap(world, lqr_modified_reward(world, model).model).q_max < 1e-10


def test_input_noise_of_the_world_is_a_dearer_action() -> None:
    # section 4 of the theory: the same A, B and discount leave only R_hat = R + g sum C'P C
    world, _ = quadratic_pair(4, 2, 3, noise=True)
    model = replace(world, noise=None)
    found = lqr_modified_reward(world, model)
    assert found.optimum is not None
    assert world.noise is not None
    P, K = riccati(world.A, world.B, world.Q, world.R, world.discount, world.noise)
    torch.testing.assert_close(found.model.Q, world.Q, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.model.cross, torch.zeros_like(world.B), rtol=0, atol=1e-12)
    dearer = world.R + world.discount * (world.noise.mT @ P @ world.noise).sum(0)
    torch.testing.assert_close(found.model.R, dearer, rtol=0, atol=1e-12)
    torch.testing.assert_close(riccati(world.A, world.B, world.Q, dearer, world.discount)[1], K, rtol=0, atol=1e-12)


def test_the_model_needs_no_discount_where_nothing_adds_up() -> None:
    world, model = (replace(x, covariance=None) for x in quadratic_pair(2, 1, 1, noise=False))
    model = replace(model, discount=1.05, A=0.5 * model.A)
    found = lqr_modified_reward(world, model)
    assert found.conditions[-1].detail.endswith("harmless")
    assert quadratic_error(world, model) < 1e-10


def test_an_unstable_model_has_other_values() -> None:
    # scipy's stabilising solution under r_hat is not the world's where stability is violated
    world, model = quadratic_pair(2, 1, 2, noise=False)
    model = replace(model, A=3.0 * world.A, B=0.3 * world.B)
    found = lqr_modified_reward(world, model, strict=False)
    assert [condition.name for condition in found.conditions if not condition.holds] == ["stability"]
    assert np.abs(reference_h(found.model) - reference_h(world)).max() > 1.0


def test_gap_of_the_models_own_cost() -> None:
    world, model = quadratic_pair(2, 1, 5, noise=False)
    gap = lqr_equivalence_gap(world, model)
    difference = reference_h(model) - reference_h(world)

    def gain_and_constant(x: LinearQuadratic) -> tuple[np.ndarray, float]:
        H, n = reference_h(x), len(x.A)
        P = H[:n, :n] - H[:n, n:] @ np.linalg.solve(H[n:, n:], H[n:, :n])
        assert x.covariance is not None
        return np.linalg.solve(H[n:, n:], H[n:, :n]), x.discount / (1 - x.discount) * (P * x.covariance.numpy()).sum()

    (K, c), (model_K, model_c) = gain_and_constant(world), gain_and_constant(model)
    draw = np.random.default_rng(0).standard_normal((20_000, 3))
    draw /= np.linalg.norm(draw, axis=1, keepdims=True)
    shell = np.abs(np.einsum("ni,ij,nj->n", draw, difference, draw) + model_c - c)
    assert gap.q_max >= max(shell.max(), abs(model_c - c)) - 1e-9
    assert gap.q_max <= 1.01 * max(shell.max(), abs(model_c - c))  # 20 000 points cover the sphere to about 1 degree
    normal = np.random.default_rng(1).standard_normal((400_000, 3))
    squares = (np.einsum("ni,ij,nj->n", normal, difference, normal) + model_c - c) ** 2
    # four standard errors of the mean square, halved by the root
    assert gap.q_weighted**2 == pytest.approx(squares.mean(), abs=4 * squares.std() / len(squares) ** 0.5)
    assert gap.gain == pytest.approx(np.linalg.norm(K - model_K), rel=1e-9)

    def cost(gain: np.ndarray) -> float:
        k = torch.tensor(gain)
        P = lyapunov(world.A - world.B @ k, world.Q + k.mT @ world.R @ k, world.discount)
        assert world.covariance is not None
        return float(P.trace() + 19.0 * (P * world.covariance).sum())  # discount 0.95

    assert gap.regret == pytest.approx(cost(model_K) - cost(K), rel=1e-7)


def test_regret_of_a_gain_that_loses_the_world_is_infinite() -> None:
    eye = torch.eye(1, dtype=torch.float64)
    world = LinearQuadratic(1.2 * eye, eye, eye, eye, 1.0)
    assert lqr_equivalence_gap(world, replace(world, A=0.1 * eye)).regret == float("inf")


@pytest.mark.parametrize("discount", [1.0, 1.05])
def test_regret_that_noise_adds_to_for_ever_is_infinite(discount: float) -> None:
    eye = torch.eye(1, dtype=torch.float64)
    world = LinearQuadratic(0.5 * eye, eye, eye, eye, discount)
    kick = 0.1 * float(quadratic_optimum(world).P)
    model = replace(world, A=0.6 * eye)
    # the optimum's own constant cancels exactly; that of another gain does not
    world = replace(world, covariance=0.1 * eye, constant=-discount * kick)
    assert lqr_equivalence_gap(world, model).regret == float("inf")


def test_offsets_cross_terms_and_moments() -> None:
    world, model = quadratic_pair(2, 1, 4, noise=True)
    world = replace(world, cross=0.1 * torch.ones(2, 1, dtype=torch.float64), constant=0.3)
    found = lqr_modified_reward(world, model)
    moment = 2.0 * torch.eye(3, dtype=torch.float64)
    assert lqr_equivalence_gap(world, found.model, second_moment=moment).q_weighted < 1e-10
    assert np.abs(reference_h(found.model) - reference_h(world)).max() < 1e-10
    # a gap in one direction does not cancel that in another: costs that differ by diag(0.1, -0.1)
    twisted = replace(found.model, Q=found.model.Q + torch.diag(torch.tensor([0.1, -0.1]).double()))
    assert lqr_equivalence_gap(found.model, twisted).q_weighted > 0.05
    with pytest.raises(ValueError, match="second_moment"):
        lqr_equivalence_gap(world, model, second_moment=moment[:2])


def test_policy_iteration_with_an_indefinite_action_cost() -> None:
    eye = torch.eye(1, dtype=torch.float64)
    problem = LinearQuadratic(0.5 * eye, eye, eye, -0.2 * eye, 0.9)
    P = solve_discrete_are(*(np.sqrt(0.9) * x.numpy() for x in (problem.A, problem.B)), np.eye(1), -0.2 * np.eye(1))
    torch.testing.assert_close(quadratic_optimum(problem).P, torch.tensor(P), rtol=1e-10, atol=0)
    with pytest.raises(UnstableError, match="unbounded below"):
        quadratic_optimum(replace(problem, R=-3.0 * eye))
    with pytest.raises(UnstableError, match="did not settle"):
        quadratic_optimum(problem, max_steps=1)


def test_violations_are_reported_without_raising() -> None:
    world, model = quadratic_pair(2, 1, 0, noise=True)
    assert world.noise is not None
    lost = lqr_modified_reward(replace(world, noise=torch.nan * world.noise), model, strict=False)
    assert lost.optimum is None
    assert [condition.name for condition in lost.conditions if not condition.holds] == ["finite variance"]
    far = lqr_modified_reward(replace(world, constant=1.0, discount=1.0), model, strict=False)
    assert far.optimum is None
    with pytest.raises(EquivalenceError, match="adds up"):
        quadratic_optimum(replace(model, discount=1.0))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"Q": torch.zeros(3, 3)}, "Q of the model"),
        ({"B": torch.zeros(2)}, "B of the model"),
        ({"noise": torch.zeros(1, 3, 3)}, "noise of the model"),
        ({"discount": -1.0}, "discount of the model"),
        ({"A": torch.full((2, 2), torch.nan)}, "A of the model must be finite"),
        ({"B": torch.full((2, 1), torch.inf)}, "B of the model must be finite"),
        ({"constant": float("inf")}, "constant of the model"),
    ],
)
def test_inputs_that_do_not_fit(change: dict, words: str) -> None:
    world, model = quadratic_pair(2, 1, 0, noise=True)
    with pytest.raises(ValueError, match=words):
        lqr_modified_reward(world, replace(model, **change))


def test_sizes_must_agree() -> None:
    with pytest.raises(ValueError, match="share"):
        lqr_modified_reward(quadratic_pair(2, 1, 0, noise=False)[0], quadratic_pair(1, 1, 0, noise=False)[0])
