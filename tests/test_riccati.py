"""Riccati and Lyapunov equations against scipy, series, and each other; derivatives of every order and mode."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import solve_discrete_lyapunov
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from benchmarks.oracles.lqr import gain_jacobian, gain_jvp, optimal_gain, random_system
from sim2real.solvers import UnstableError, lyapunov, mean_square_radius, riccati, riccati_residual

CASES = [(1, 1, 0), (2, 1, 1), (4, 2, 2), (8, 2, 3), (16, 4, 4)]


def tensors(n: int, m: int, seed: int) -> dict[str, Tensor]:
    return {key: torch.tensor(value) for key, value in random_system(n, m, seed).items()}


def channels(n: int, m: int, q: int = 2, size: float = 0.1) -> Tensor:
    return size * torch.randn(q, n, m, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


@pytest.mark.parametrize(("n", "m", "seed"), CASES)
def test_gain_and_cost_equal_scipy(n: int, m: int, seed: int) -> None:
    P, K = riccati(**tensors(n, m, seed))
    expected_P, expected_K = optimal_gain(random_system(n, m, seed))
    np.testing.assert_allclose(P, expected_P, rtol=0, atol=1e-12 * np.abs(expected_P).max() * n)
    np.testing.assert_allclose(K, expected_K, rtol=0, atol=1e-11 * np.abs(expected_K).max())


def test_noise_free_channels_change_nothing_and_noise_is_a_larger_action_cost() -> None:
    system = tensors(4, 2, 2)
    P, K = riccati(**system)
    same_P, same_K = riccati(**system, noise=torch.zeros(2, 4, 2, dtype=torch.float64))
    torch.testing.assert_close(same_P, P, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(same_K, K, rtol=1e-12, atol=1e-12)
    # the equivalence of the theory notes: cost R + g sum C'P C in the model without noise has the same optimum
    C = channels(4, 2)
    noisy_P, noisy_K = riccati(**system, noise=C)
    raised = {**system, "R": system["R"] + system["discount"] * (C.mT @ noisy_P @ C).sum(0)}
    torch.testing.assert_close(riccati(**raised)[0], noisy_P, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(riccati(**raised)[1], noisy_K, rtol=1e-11, atol=1e-11)


def test_optimal_gain_minimises_the_cost_of_fixed_gains() -> None:
    system, C = tensors(4, 2, 2), channels(4, 2)

    def cost(K: Tensor) -> Tensor:
        A, B, Q, R = (system[key] for key in ("A", "B", "Q", "R"))
        return lyapunov(A - B @ K, Q + K.mT @ R @ K, system["discount"], C @ K).diagonal().sum()

    P, K = riccati(**system, noise=C)
    assert float(cost(K)) == pytest.approx(float(P.diagonal().sum()), rel=1e-12)
    # stationary to rounding of a sum of size 1e2
    assert float(grad(cost)(K).abs().max()) < 1e-10


@pytest.mark.parametrize("n", [1, 3, 16])
def test_lyapunov_equals_scipy(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    A = 0.6 * torch.randn(n, n, generator=generator, dtype=torch.float64) / n**0.5
    W = torch.randn(n, n, generator=generator, dtype=torch.float64)  # not symmetric on purpose
    expected = solve_discrete_lyapunov(np.sqrt(0.9) * A.numpy().T, W.numpy())
    np.testing.assert_allclose(lyapunov(A, W, 0.9), expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def test_generalised_lyapunov_equals_its_series() -> None:
    generator = torch.Generator().manual_seed(0)
    A = 0.3 * torch.randn(3, 3, generator=generator, dtype=torch.float64)
    N = 0.2 * torch.randn(2, 3, 3, generator=generator, dtype=torch.float64)
    W = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    term, total = W, W
    for _ in range(400):
        term = 0.95 * (A.T @ term @ A + (N.mT @ term @ N).sum(0))
        total = total + term
    torch.testing.assert_close(lyapunov(A, W, 0.95, N), total, rtol=1e-12, atol=1e-13)
    assert float(mean_square_radius(A, 0.95, N)) < 1
    assert float(mean_square_radius(A, 0.95)) == pytest.approx(0.95 * float(torch.linalg.eigvals(A).abs().max()) ** 2)


def test_radius_of_the_double_integrator_at_full_noise_is_the_published_one() -> None:
    """A figure measured elsewhere: at sigma 1 the gain that ignores the noise has the discounted radius 1.055."""
    A = torch.tensor([[1.0, 0.2], [0.0, 1.0]], dtype=torch.float64)
    B = torch.tensor([[0.0], [0.3]], dtype=torch.float64)
    Q = torch.diag(torch.tensor([1.0, 0.1], dtype=torch.float64))
    _, K = riccati(A, B, Q, 0.01 * torch.eye(1, dtype=torch.float64), 0.95)
    radius = mean_square_radius(A - B @ K, 0.95, B @ K)
    assert float(radius) == pytest.approx(1.055, abs=5e-4)
    with pytest.raises(UnstableError, match=r"radius is 1\.05"):
        lyapunov(A - B @ K, Q, 0.95, B @ K)


@pytest.mark.parametrize(("n", "m", "seed"), CASES)
@pytest.mark.parametrize("mode", [jacrev, jacfwd], ids=["reverse", "forward"])
def test_jacobian_of_the_gain_equals_bellman_by_scipy(n: int, m: int, seed: int, mode: object) -> None:
    system = tensors(n, m, seed)
    jacobian = mode(lambda A, B: riccati(**{**system, "A": A, "B": B})[1], (0, 1))(system["A"], system["B"])
    expected = gain_jacobian(random_system(n, m, seed))
    for got, key in zip(jacobian, ("A", "B"), strict=True):
        scale = np.abs(expected[key]).max()
        np.testing.assert_allclose(got, expected[key], rtol=0, atol=1e-10 * scale)


def test_derivative_in_every_argument_equals_bellman_by_scipy() -> None:
    system, draw = random_system(4, 2, 2), np.random.default_rng(0)
    tangent = {key: draw.standard_normal(value.shape) for key, value in system.items()}
    tangent["Q"], tangent["R"] = tangent["Q"] + tangent["Q"].T, tangent["R"] + tangent["R"].T
    values = {key: torch.tensor(value) for key, value in system.items()}
    got = torch.func.jvp(lambda s: riccati(**s)[1], (values,), ({k: torch.tensor(v) for k, v in tangent.items()},))[1]
    np.testing.assert_allclose(got, gain_jvp(system, tangent), rtol=0, atol=1e-10)


def test_derivatives_of_first_and_second_order_by_differences() -> None:
    system = tensors(3, 1, 5)
    inputs = [system[key].requires_grad_() for key in ("A", "B", "Q", "R", "discount")]
    inputs.append(channels(3, 1, q=1).requires_grad_())
    assert torch.autograd.gradcheck(riccati, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(
        lambda A, B, C: riccati(A, B, *inputs[2:5], C)[1], [inputs[0], inputs[1], inputs[5]]
    )


def test_second_derivative_is_the_same_in_every_mode() -> None:
    """torch gives zero or wrong numbers here unless told otherwise: see pytorch/pytorch issues 197867 and 192540."""
    system = tensors(3, 2, 5)
    f = lambda a: riccati(**{**system, "A": a * system["A"]})[1].sum()
    a, h = torch.tensor(1.0, dtype=torch.float64), 1e-4
    reference = float(f(a + h) - 2 * f(a) + f(a - h)) / h**2
    for second in (jacrev(jacrev(f)), jacfwd(jacrev(f)), jacrev(jacfwd(f)), jacfwd(jacfwd(f)), hessian(f)):
        # central differences: truncation h^2, rounding 1e-16 / h^2 = 1e-8
        assert float(second(a)) == pytest.approx(reference, rel=1e-5)
        assert float(second(a)) == pytest.approx(float(jacrev(jacrev(f))(a)), rel=1e-11)


def test_vmap_equals_the_batch_and_the_loop() -> None:
    system = tensors(4, 2, 2)
    scales = torch.tensor([0.5, 0.9, 1.1], dtype=torch.float64)
    C = channels(4, 2)
    one = lambda s, g: riccati(s * system["A"], system["B"], system["Q"], system["R"], g, C)[1]
    looped = torch.stack([one(s, s * 0.85) for s in scales])
    torch.testing.assert_close(vmap(one)(scales, scales * 0.85), looped, rtol=1e-12, atol=1e-12)
    batched = riccati(scales[:, None, None] * system["A"], system["B"], system["Q"], system["R"], scales * 0.85, C)[1]
    torch.testing.assert_close(batched, looped, rtol=1e-12, atol=1e-12)
    slopes = torch.stack([jacrev(one)(s, s * 0.85) for s in scales])
    torch.testing.assert_close(vmap(jacrev(one))(scales, scales * 0.85), slopes, rtol=1e-11, atol=1e-11)
    total = lambda s: riccati(s[:, None, None] * system["A"], system["B"], system["Q"], system["R"], 0.9)[1].sum()
    alone = torch.stack([grad(lambda s: total(s[None]))(s) for s in scales])
    torch.testing.assert_close(grad(total)(scales), alone, rtol=1e-11, atol=1e-11)


def test_residual_tells_a_solution_from_a_guess() -> None:
    system = tensors(4, 2, 2)
    P, _ = riccati(**system)
    assert float(riccati_residual(**system, noise=None, P=P)) < 1e-14
    assert float(riccati_residual(**system, noise=None, P=1.1 * P)) > 1e-3


def test_failures_are_named() -> None:
    system = tensors(2, 1, 1)
    eye = torch.eye(2, dtype=torch.float64)
    with pytest.raises(UnstableError, match="no gain found"):
        riccati(1.2 * eye, torch.zeros(2, 1, dtype=torch.float64), system["Q"], system["R"], 0.95)
    with pytest.raises(UnstableError, match="no gain found"):  # enough noise on the input makes it useless
        riccati(1.2 * eye[:1, :1], eye[:1, :1], eye[:1, :1], eye[:1, :1], 1.0, 5.0 * eye[:1, :1])
    with pytest.raises(UnstableError, match="positive"):
        riccati(0.5 * eye, eye, -eye, 0.1 * eye, 0.95)
    with pytest.raises(ValueError, match=r"A must be \[..., 2, 2\]"):
        riccati(torch.eye(3, dtype=torch.float64), system["B"], system["Q"], system["R"])
    with pytest.raises(ValueError, match="noise must be"):
        riccati(**system, noise=torch.zeros(3, 3))
    with pytest.raises(ValueError, match="floating"):
        riccati(**{**system, "B": torch.ones(2, 1, dtype=torch.long)})
    with pytest.raises(ValueError, match="A holds values that are not finite"):
        riccati(**{**system, "A": system["A"] * float("nan")})
    for discount in (-0.5, torch.tensor(-0.5, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"discount must be >= 0, got -0\.5"):
            riccati(**{**system, "discount": discount})
    with pytest.raises(ValueError, match="discount must be >= 0"):
        lyapunov(0.5 * eye, eye, -0.5)
    for noise in (None, 0.1 * eye):
        with pytest.raises(ValueError, match="W holds values that are not finite"):
            lyapunov(0.5 * eye, float("nan") * eye, noise=noise)
        with pytest.raises(ValueError, match="A holds values that are not finite"):
            lyapunov(float("nan") * eye, eye, noise=noise)
    with pytest.raises(ValueError, match="A and W"):
        lyapunov(eye, torch.eye(3))
    with pytest.raises(UnstableError, match="radius is 1"):
        lyapunov(eye, eye)
