"""The finite-horizon recursion against one dense program over all actions, enumeration of the noise, and `riccati`."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from sim2real.solvers import finite_horizon_riccati, riccati

N, M, T = 3, 2, 4


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def system(seed: int = 0) -> dict[str, Tensor]:
    C, D = draw(N, N, seed=seed + 10), draw(M, M, seed=seed + 20)
    return {
        "A": 0.6 * draw(N, N, seed=seed),
        "B": draw(N, M, seed=seed + 30),
        "Q": C @ C.mT / N,
        "R": D @ D.mT / M + 0.1 * torch.eye(M, dtype=torch.float64),
    }


def varying(steps: int = T) -> dict[str, list[Tensor]]:
    each = [system(k) for k in range(steps)]
    return {key: [p[key] for p in each] for key in each[0]}


def test_time_varying_and_discounted_equals_one_dense_program() -> None:
    p, discounts, P = varying(), [0.9, 1.0, 0.7, 0.95], 2.0 * torch.eye(N, dtype=torch.float64)
    costs, gains = finite_horizon_riccati(**p, horizon=T, P=P, discount=discounts)
    assert costs.shape == (T + 1, N, N)
    assert gains.shape == (T, M, N)
    s0 = draw(N, seed=99)

    def total(actions: Tensor) -> Tensor:
        s, weight, value = s0, 1.0, torch.zeros((), dtype=torch.float64)
        for k, a in enumerate(actions.reshape(T, M)):
            value = value + weight * (s @ p["Q"][k] @ s + a @ p["R"][k] @ a)
            s, weight = p["A"][k] @ s + p["B"][k] @ a, weight * discounts[k]
        return value + weight * s @ P @ s

    # a quadratic: its minimiser is one Newton step from anywhere
    zero = torch.zeros(T * M, dtype=torch.float64)
    best = -torch.linalg.solve(hessian(total)(zero), grad(total)(zero))
    s = s0
    for k, a in enumerate(best.reshape(T, M)):
        torch.testing.assert_close(-gains[k] @ s, a, rtol=1e-10, atol=1e-11)
        s = p["A"][k] @ s + p["B"][k] @ a
    assert float(s0 @ costs[0] @ s0) == pytest.approx(float(total(best)), rel=1e-12)


def test_multiplicative_noise_equals_enumeration_of_its_signs() -> None:
    """Noise of two values, -1 and 1, has variance 1: the expectation is a mean over 2^(T q) histories."""
    p, discount, steps = system(1), 0.9, 2
    C = 0.5 * draw(2, N, M, seed=5)
    P = torch.eye(N, dtype=torch.float64)
    costs, gains = finite_horizon_riccati(**p, horizon=steps, P=P, discount=discount, noise=C)
    s0 = draw(N, seed=98)

    def expected(K: Tensor) -> Tensor:
        values = []
        for signs in product((-1.0, 1.0), repeat=2 * steps):
            s, value = s0, torch.zeros((), dtype=torch.float64)
            for k in range(steps):
                a = -K[k] @ s
                value = value + discount**k * (s @ p["Q"] @ s + a @ p["R"] @ a)
                xi = torch.tensor(signs[2 * k : 2 * k + 2], dtype=torch.float64)
                s = p["A"] @ s + p["B"] @ a + torch.einsum("q,qnm,m->n", xi, C, a)
            values.append(value + discount**steps * s @ P @ s)
        return torch.stack(values).mean()

    assert float(expected(gains)) == pytest.approx(float(s0 @ costs[0] @ s0), rel=1e-12)
    assert float(grad(expected)(gains).abs().max()) < 1e-12  # no other gain is better to first order,
    assert float(torch.linalg.eigvalsh(hessian(expected)(gains).reshape(12, 12)).min()) > -1e-10  # nor to second


def test_a_long_horizon_is_the_stationary_gain() -> None:
    p, C = system(2), 0.1 * draw(1, N, M, seed=7)
    P, K = riccati(**p, discount=0.9, noise=C)
    costs, gains = finite_horizon_riccati(**p, horizon=200, discount=0.9, noise=C)
    torch.testing.assert_close(costs[0], P, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(gains[0], K, rtol=1e-11, atol=1e-12)
    fixed, still = finite_horizon_riccati(**p, horizon=3, P=P, discount=0.9, noise=C)
    torch.testing.assert_close(fixed, P.expand(4, N, N), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(still, K.expand(3, M, N), rtol=1e-11, atol=1e-12)


def outputs(A: Tensor, B: Tensor, C: Tensor, R: Tensor, P: Tensor, discount: Tensor, noise: Tensor) -> Tensor:
    costs, gains = finite_horizon_riccati(A, B, C @ C.mT, R @ R.mT, 2, P=P @ P.mT, discount=discount, noise=noise)
    return torch.cat([costs.flatten(), gains.flatten()])


def test_derivatives_of_first_and_second_order_against_differences() -> None:
    leaves = [draw(2, 2, seed=k).requires_grad_() for k in range(5)]
    leaves += [torch.tensor(0.8, dtype=torch.float64, requires_grad=True), 0.3 * draw(1, 2, 2, seed=8)]
    leaves[-1] = leaves[-1].requires_grad_()
    assert gradcheck(outputs, leaves, check_forward_ad=True)
    assert gradgradcheck(outputs, leaves, fast_mode=True)


def test_forward_and_reverse_modes_agree_and_vmap_is_a_loop() -> None:
    p = system(3)
    loss = lambda a: finite_horizon_riccati(a[0] * p["A"], a[1] * p["B"], p["Q"], p["R"], 3)[1].pow(2).sum()
    at = torch.tensor([0.9, 1.1], dtype=torch.float64)
    expected = jacrev(jacrev(loss))(at)
    for derivative in (hessian(loss), jacfwd(jacfwd(loss)), jacrev(jacfwd(loss))):
        torch.testing.assert_close(derivative(at), expected, rtol=1e-11, atol=1e-12)
    scales = torch.tensor([[0.5, 1.0], [1.5, 0.7], [1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(vmap(loss)(scales), torch.stack([loss(a) for a in scales]), rtol=1e-12, atol=1e-13)
    slopes = torch.stack([grad(loss)(a) for a in scales])
    torch.testing.assert_close(vmap(grad(loss))(scales), slopes, rtol=1e-11, atol=1e-12)
    batched = finite_horizon_riccati(scales[:, :1, None] * p["A"], p["B"], p["Q"], p["R"], 3)[1]
    one = finite_horizon_riccati(scales[1, 0] * p["A"], p["B"], p["Q"], p["R"], 3)[1]
    torch.testing.assert_close(batched[1], one, rtol=1e-12, atol=1e-13)


def test_failures_are_named() -> None:
    p = system()
    with pytest.raises(ValueError, match="horizon must be at least 1"):
        finite_horizon_riccati(**p, horizon=0)
    with pytest.raises(ValueError, match="B must be one tensor or a list of 3"):
        finite_horizon_riccati(**{**p, "B": [p["B"]] * 2}, horizon=3)
    with pytest.raises(ValueError, match=r"R of step 1 must be floating point \[..., 2, 2\]"):
        finite_horizon_riccati(**{**p, "R": [p["R"], p["Q"]]}, horizon=2)
    with pytest.raises(ValueError, match=r"B of step 0 must be \[..., n, m\]"):
        finite_horizon_riccati(**{**p, "B": p["B"][0]}, horizon=2)
    with pytest.raises(ValueError, match=r"P must be \[..., 3, 3\]"):
        finite_horizon_riccati(**p, horizon=2, P=p["R"])
    for negative in (-1.0, torch.tensor(-1e-3, dtype=torch.float64)):
        with pytest.raises(ValueError, match="discount of step 1 must be >= 0"):
            finite_horizon_riccati(**p, horizon=2, discount=negative)
    with pytest.raises(ValueError, match="of step 1 is not positive definite"):
        finite_horizon_riccati(**{**p, "R": [p["R"], -5 * p["R"]]}, horizon=2, P=0 * p["Q"])
    with pytest.raises(ValueError, match="not finite"):
        finite_horizon_riccati(**{**p, "A": p["A"] * float("nan")}, horizon=2)
    for key in ("A", "Q"):  # no later step looks at the first
        with pytest.raises(ValueError, match="matrices of step 0 or later hold values that are not finite"):
            finite_horizon_riccati(**{**p, key: [p[key] * float("nan"), p[key]]}, horizon=2)
    with pytest.raises(ValueError, match=r"R of step 0 .* got torch.float32"):
        finite_horizon_riccati(**{**p, "R": p["R"].float()}, horizon=2)
    with pytest.raises(ValueError, match="noise must be"):
        finite_horizon_riccati(**p, horizon=2, noise=p["R"])
