"""Closed-form inversion against simulation and numerical least squares; every error of the paper is caught here."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch
from torch import Tensor

from sim2real.solvers.inversion_lqr import (
    compose,
    feedback_law,
    goal_tracking_law,
    invert_feedback,
    invert_goal_tracking,
    invert_law,
    invert_linear,
)

ROWS = 6
# pseudo-inverses of matrices of condition up to 1e3 in float64, twice: 1e-9 is the bar
EXACT = {"atol": 1e-9, "rtol": 1e-9}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def world(seed: int, n: int, m: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A, B, c per row and start states."""
    A = torch.eye(n, dtype=torch.float64) + 0.2 * draw(seed, ROWS, n, n)
    return A, draw(seed + 1, ROWS, n, m), draw(seed + 2, ROWS, n), draw(seed + 3, ROWS, n)


def definite(seed: int, n: int) -> Tensor:
    root = draw(seed, n, n)
    return root @ root.mT + 0.1 * torch.eye(n, dtype=torch.float64)


def noise_precision(n: int) -> Tensor:
    return torch.linalg.inv(definite(11, n))


def numerical(simulate: Callable[[Tensor], Tensor], reached: Tensor, width: int, precision: Tensor | None) -> Tensor:
    """The least-squares answer of least norm, from the simulation at 0 and at unit vectors (it is affine in u)."""
    zero = torch.zeros(ROWS, width, dtype=torch.float64)
    offset = simulate(zero)
    columns = torch.stack([simulate(zero + e) - offset for e in torch.eye(width, dtype=torch.float64)], -1)
    root = np.eye(reached.shape[1]) if precision is None else scipy.linalg.sqrtm(precision.numpy()).real
    found = [
        scipy.linalg.lstsq(root @ X.numpy(), root @ d.numpy(), cond=1e-10)[0]
        for X, d in zip(columns, reached - offset, strict=True)
    ]
    return torch.from_numpy(np.array(found))


def apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("noise", ["isotropic", "shaped"])
@pytest.mark.parametrize(("n", "m"), [(4, 2), (2, 1), (3, 3)])
def test_one_step_goal_tracking_agrees_with_numerical_inversion(n: int, m: int, noise: str) -> None:
    A, B, c, state = world(0, n, m)
    V, M, action = definite(5, n), definite(6, m), draw(7, ROWS, m)
    reached, precision = draw(8, ROWS, n), noise_precision(n) if noise == "shaped" else None

    def simulate(u: Tensor) -> Tensor:
        following = []
        for i in range(ROWS):  # the action by its definition, a minimiser found from the stacked least squares
            X = torch.cat([torch.linalg.cholesky(M).mT, torch.linalg.cholesky(V).mT @ B[i]])
            drift = apply(A[i], state[i]) + c[i] - u[i]
            d = torch.cat([torch.linalg.cholesky(M).mT @ action[i], -torch.linalg.cholesky(V).mT @ drift])
            a = torch.from_numpy(scipy.linalg.lstsq(X.numpy(), d.numpy())[0])
            following.append(A[i] @ state[i] + B[i] @ a + c[i])
        return torch.stack(following)

    found = invert_goal_tracking(A, B, c, state, reached, V, M, action=action, precision=precision)
    torch.testing.assert_close(found.u, numerical(simulate, reached, n, precision), **EXACT)
    assert found.rank.tolist() == [m] * ROWS
    assert not bool(found.saturated.any())
    # equation 22 as printed has + (A s + c + B ...), whose residual at the answer is far from 0
    exact = simulate(draw(9, ROWS, n))
    again = invert_goal_tracking(A, B, c, state, exact, V, M, action=action, precision=precision)
    assert float(again.residual.max()) < 1e-9
    assert float((exact + simulate(again.u)).norm(dim=-1).min()) > 0.1


@pytest.mark.parametrize("noise", ["isotropic", "shaped"])
@pytest.mark.parametrize("horizon", [1, 2, 5])
def test_feedback_over_several_steps_agrees_with_numerical_inversion(horizon: int, noise: str) -> None:
    A, B, c, state = world(20, 4, 2)
    Q, R = definite(25, 4), definite(26, 2)
    reached, precision = draw(28, ROWS, 4), noise_precision(4) if noise == "shaped" else None

    def simulate(u: Tensor) -> Tensor:
        gains, P = [], Q.expand(ROWS, 4, 4)
        for _ in range(horizon):  # the recursion of the reference, backwards
            K = -torch.linalg.inv(R + B.mT @ P @ B) @ B.mT @ P @ A
            P = Q + A.mT @ P @ (A + B @ K)
            gains.insert(0, K)
        x = state
        for K in gains:
            x = apply(A, x) + apply(B, apply(K, x - u)) + c
        return x

    found = invert_feedback(A, B, c, state, reached, Q, R, horizon, precision=precision)
    torch.testing.assert_close(found.u, numerical(simulate, reached, 4, precision), **EXACT)
    assert found.rank.tolist() == [min(4, 2 * horizon)] * ROWS


def test_goal_tracking_over_several_steps_agrees_with_numerical_inversion() -> None:
    A, B, c, state = world(30, 3, 1)
    V, M, reached = definite(35, 3), definite(36, 1), draw(38, ROWS, 3)
    law = goal_tracking_law(A, B, c, V, M, horizon=4)

    def simulate(u: Tensor) -> Tensor:
        x = state
        for _ in range(4):
            D = M + B.mT @ V @ B
            a = torch.linalg.inv(D) @ B.mT @ V @ (u - apply(A, x) - c).unsqueeze(-1)
            x = apply(A, x) + apply(B, a.squeeze(-1)) + c
        return x

    found = invert_law(law, A, B, c, state, reached)
    torch.testing.assert_close(found.u, numerical(simulate, reached, 3, None), **EXACT)
    same = invert_goal_tracking(A, B, c, state, reached, V, M, 4)
    torch.testing.assert_close(same.u, found.u)


def test_the_two_forms_have_opposite_signs() -> None:
    A, B, c, _ = world(40, 2, 2)
    weight = torch.eye(2, dtype=torch.float64)
    tracking = goal_tracking_law(A, B, 0 * c, weight, 1e-9 * weight)
    feedback = feedback_law(A, B, weight, 1e-9 * weight, 1)
    # with free actions the tracker goes to u at once, B H = I; the regulator's u is where it believes 0 to be
    torch.testing.assert_close(B @ tracking.goal_gain[0], weight.expand(ROWS, 2, 2), atol=1e-6, rtol=0)
    torch.testing.assert_close(B @ feedback.goal_gain[0], A, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(feedback.state_gain[0], -feedback.goal_gain[0])


def test_without_the_weight_the_answer_is_less_likely() -> None:
    """Equations 23 and 26: the plain pseudo-inverse maximises the likelihood for isotropic noise only."""
    A, B, c, state = world(50, 4, 2)
    V, M, reached = definite(55, 4), definite(56, 2), draw(58, ROWS, 4)
    precision = torch.diag(torch.tensor([100.0, 1.0, 0.01, 25.0], dtype=torch.float64))
    weighted = invert_goal_tracking(A, B, c, state, reached, V, M, precision=precision)
    law = goal_tracking_law(A, B, c, V, M)
    Phi, phi = compose(law, A, B, c, state)

    def misfit(u: Tensor) -> Tensor:
        miss = reached - phi + apply(Phi, u)
        return (miss * apply(precision, miss)).sum(-1)

    plain = invert_goal_tracking(A, B, c, state, reached, V, M).u
    assert bool((misfit(plain) > 1.4 * misfit(weighted.u)).all())
    torch.testing.assert_close(misfit(weighted.u).sqrt(), weighted.residual)
    best = scipy.optimize.minimize(lambda u: float(misfit(torch.from_numpy(u).expand(ROWS, 4))[0]), np.zeros(4)).fun
    assert abs(float(misfit(weighted.u)[0]) - best) < 1e-5 * best  # BFGS with difference gradients


def double_integrator() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    A = torch.tensor([[1.0, 0.5], [0.0, 1.0]], dtype=torch.float64)
    B = torch.tensor([[0.125], [0.5]], dtype=torch.float64)
    Q = torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64))
    return A, B, Q, torch.tensor([[0.2]], dtype=torch.float64)


def test_the_affine_term_and_the_number_of_factors_matter() -> None:
    """After equation 24 the paper drops c; appendix B.1.1 as printed multiplies T + 1 factors."""
    A, B, Q, R = double_integrator()
    law = feedback_law(A, B, Q, R, 5)
    state, u, c = draw(60, ROWS, 2), draw(61, ROWS, 2), torch.tensor([0.05, 0.2], dtype=torch.float64)
    x = state
    for K in law.state_gain:
        x = apply(A, x) + apply(B, apply(K, x - u)) + c
    found = invert_law(law, A, B, c, state, x)
    torch.testing.assert_close(found.u, u, **EXACT)
    assert float((invert_law(law, A, B, 0 * c, state, x).u - u).norm(dim=-1).min()) > 0.1
    longer = feedback_law(A, B, Q, R, 6)
    Phi, phi = compose(longer, A, B, c, state)
    assert float((phi - apply(Phi, u) - x).norm(dim=-1).median()) > 0.01
    Phi, phi = compose(law, A, B, c, state)
    torch.testing.assert_close(phi - apply(Phi, u), x)
    condition = torch.linalg.cond(Phi)
    assert 14 < float(condition) < 16  # the reference: 15


def test_one_step_recovers_the_next_state_but_only_a_projection_of_the_goal() -> None:
    """Appendix C.1 says 'recovers the action exactly'; BK has rank 1 of 2."""
    A, B, Q, R = double_integrator()
    law = feedback_law(A, B, Q, R, 1)
    state, u, c = draw(70, ROWS, 2), draw(71, ROWS, 2), torch.zeros(2, dtype=torch.float64)
    Phi, phi = compose(law, A, B, c, state)
    reached = phi - apply(Phi, u)
    found = invert_law(law, A, B, c, state, reached)
    assert found.rank.tolist() == [1] * ROWS
    torch.testing.assert_close(phi - apply(Phi, found.u), reached)
    K = law.state_gain[0]
    torch.testing.assert_close(found.u, apply(torch.linalg.pinv(K) @ K, u), **EXACT)
    assert float((found.u - u).norm(dim=-1).max()) > 0.1


def test_closed_forms_are_differentiable() -> None:
    A, B, c, state = (x[:1].clone().requires_grad_() for x in world(80, 2, 1))
    V, M, reached = definite(85, 2), definite(86, 1), draw(88, 1, 2)

    def invert(A: Tensor, B: Tensor, c: Tensor, state: Tensor) -> Tensor:
        return invert_goal_tracking(A, B, c, state, reached, V, M, 3).u

    assert torch.autograd.gradcheck(invert, (A, B, c, state), fast_mode=True)


def test_linear_inversion_says_what_does_not_fit() -> None:
    X, d = draw(90, ROWS, 3, 2), draw(91, ROWS, 3)
    with pytest.raises(ValueError, match="positive definite"):
        invert_linear(X, d, precision=torch.zeros(3, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="precision must be"):
        invert_linear(X, d, precision=torch.ones(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="list of 2"):
        goal_tracking_law([X], X, d, X, X, horizon=2)
    assert invert_linear(0 * X, d).saturated.tolist() == [True] * ROWS
