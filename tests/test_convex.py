"""The convex layer against closed forms, and its checks against derivatives that are wrong."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jacobian

from sim2real.solvers.convex import (
    DerivativeError,
    DerivativeWarning,
    InfeasibleError,
    convex_layer,
    derivative_error,
)

cp = pytest.importorskip("cvxpy")
pytest.importorskip("cvxpylayers")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@cache
def simplex() -> Any:
    y, x = cp.Parameter(5, name="y"), cp.Variable(5, name="x")
    return cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [x >= 0, cp.sum(x) == 1])


@cache
def box() -> Any:
    y, high, x = cp.Parameter(3, name="y"), cp.Parameter(name="high"), cp.Variable(3, name="x")
    return cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [x >= -1, x <= high])


@cache
def mpc() -> Any:
    """Four states, two bounded inputs, horizon 10: where diffcp's default derivative stops early."""
    x0, A, B = cp.Parameter(4, name="x0"), cp.Parameter((4, 4), name="A"), cp.Parameter((4, 2), name="B")
    X, U = cp.Variable((11, 4), name="X"), cp.Variable((10, 2), name="U")
    dynamics = [X[t + 1] == A @ X[t] + B @ U[t] for t in range(10)]
    cost = cp.sum_squares(X[1:]) + 0.1 * cp.sum_squares(U)
    return cp.Problem(cp.Minimize(cost), [X[0] == x0, *dynamics, U <= 0.5, U >= -0.5])


def mpc_theta() -> dict[str, Tensor]:
    """An unstable plant and four starts, on the last of which lsqr stops early."""
    rng = torch.Generator().manual_seed(1)
    A = torch.eye(4, dtype=torch.float64) + 0.1 * torch.randn(4, 4, generator=rng).double()
    B = torch.randn(4, 2, generator=rng).double()
    x0 = 1.5 * torch.randn(8, 4, generator=rng).double()
    return {"x0": x0[[0, 3, 5, 7]], "A": A.expand(4, 4, 4), "B": B.expand(4, 4, 2)}


def onto_simplex(y: Tensor) -> Tensor:
    """Held, Wolfe, Crowder, Validation of subgradient optimization, 1974: subtract one threshold, clip at 0."""
    below = y.sort(-1, descending=True).values.cumsum(-1) - 1
    threshold = (below / torch.arange(1, 6)).amax(-1, keepdim=True)
    return (y - threshold).clamp(min=0)


def test_projection_onto_a_simplex() -> None:
    y = randn(6, 5)
    layer = convex_layer(simplex(), check_at={"y": y})
    convex_layer(simplex(), check_at={"y": y[0]})  # at a corner: the derivative is zero
    torch.testing.assert_close(layer({"y": y})["x"], onto_simplex(y), rtol=0, atol=1e-9)
    for row in y:
        # the derivative is taken at the second-order-cone solution, good to half of the digits
        torch.testing.assert_close(
            jacobian(lambda p: layer({"y": p})["x"], row), jacobian(onto_simplex, row), rtol=0, atol=2e-6
        )


def test_projection_onto_a_box_with_a_shared_bound() -> None:
    y, high = randn(4, 3, seed=4).mul(2).requires_grad_(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x = convex_layer(box())({"y": y, "high": high})["x"]
    expected = torch.minimum(y, high).clamp(min=-1)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-9)
    weight = randn(4, 3, seed=5)
    got = torch.autograd.grad((weight * x).sum(), [y, high])
    wanted = torch.autograd.grad((weight * expected).sum(), [y, high])
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_equality_constrained_quadratic_program() -> None:
    # argmin x'Px/2 - q'x with Ax = b solves the linear KKT system
    root, A = randn(4, 4, seed=6), randn(2, 4, seed=7)
    P = root @ root.T + torch.eye(4, dtype=torch.float64)
    q_, b_, x = cp.Parameter(4, name="q"), cp.Parameter(2, name="b"), cp.Variable(4, name="x")
    problem = cp.Problem(cp.Minimize(0.5 * cp.quad_form(x, P.numpy()) - q_ @ x), [A.numpy() @ x == b_])
    kkt = torch.cat([torch.cat([P, A.T], 1), torch.cat([A, P.new_zeros(2, 2)], 1)])
    expected = torch.linalg.inv(kkt)[:4]
    q, b = randn(4, seed=8), randn(2, seed=9)
    layer = convex_layer(problem)
    torch.testing.assert_close(layer({"q": q, "b": b})["x"], expected @ torch.cat([q, b]), rtol=0, atol=1e-9)
    rows = jacobian(lambda q, b: layer({"q": q, "b": b})["x"], (q, b))
    torch.testing.assert_close(torch.cat(rows, 1), expected, rtol=0, atol=1e-5)


def test_dense_derivative_passes_the_check_that_lsqr_fails() -> None:
    theta = mpc_theta()
    # measured on these: dense 6e-6, which is what differences are good for here, lsqr 1.2e-2 on the last start
    assert float(derivative_error(convex_layer(mpc()), theta).max()) < 1e-4
    with pytest.raises(DerivativeError, match="mode 'lsqr'"):
        convex_layer(mpc(), mode="lsqr", check_at=theta)
    with pytest.warns(DerivativeWarning, match="central differences"):
        convex_layer(mpc(), mode="lsqr", check_at=theta, on_failure="warn")


def test_check_tells_a_wrong_gradient_of_one_sample() -> None:
    inner = convex_layer(simplex())

    def wrong(theta: dict[str, Tensor]) -> dict[str, Tensor]:
        y = theta["y"]
        scale = torch.tensor([[1.0], [1.0], [1.05]], dtype=torch.float64)
        return inner({"y": y.detach() + scale * (y - y.detach())})

    errors = derivative_error(wrong, {"y": randn(3, 5)})
    assert float(errors[:2].max()) < 1e-5
    assert float(errors[2]) > 1e-3


def test_failed_solve_names_its_sample() -> None:
    layer = convex_layer(box())
    y, high = randn(4, 3), torch.tensor([0.0, 0.5, -2.0, 0.0], dtype=torch.float64)
    with pytest.raises(InfeasibleError, match="sample 2 was not solved: infeasible") as caught:
        layer({"y": y, "high": high.requires_grad_()})
    assert caught.value.sample == 2
    with pytest.raises(InfeasibleError, match="program was not solved") as caught:
        layer({"y": y[0], "high": high.detach()[2]})
    assert caught.value.sample is None


def test_unbounded_program() -> None:
    c, x = cp.Parameter(2, name="c"), cp.Variable(2, name="x")
    unbounded = convex_layer(cp.Problem(cp.Minimize(c @ x), [x >= 0]))
    with pytest.raises(InfeasibleError, match="unbounded"):
        unbounded({"c": torch.tensor([1.0, -1.0], dtype=torch.float64)})


def test_solver_that_gives_up_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sim2real.solvers.convex._ENOUGH", {"max_iter": 1})
    with pytest.raises(InfeasibleError, match="not solved"):
        convex_layer(simplex())({"y": randn(5)})


def test_solves_that_disagree_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sim2real.solvers.convex._AGREE", 0.0)
    with pytest.raises(DerivativeError, match="not unique"):
        convex_layer(simplex())({"y": randn(5).requires_grad_()})


def test_keeps_dtype_and_refuses_bad_input() -> None:
    layer = convex_layer(simplex())
    assert layer({"y": randn(5).float()})["x"].dtype == torch.float32
    with pytest.raises(ValueError, match="expected"):
        layer({"y": randn(4)})
    with pytest.raises(ValueError, match="not finite"):
        layer({"y": torch.full((5,), torch.nan, dtype=torch.float64)})
    with pytest.raises(KeyError, match="theta of the convex layer"):
        layer({"z": randn(5)})
    with pytest.raises(ValueError, match="batch sizes"):
        convex_layer(box())({"y": randn(2, 3), "high": randn(3)})
    with pytest.raises(ValueError, match="directions"):
        derivative_error(layer, {"y": randn(1, 5)}, directions=0)
    y, x = cp.Parameter(name="y"), cp.Variable(name="x")
    with pytest.raises(ValueError, match="DPP"):
        convex_layer(cp.Problem(cp.Minimize(cp.square(x * y) * y), [x >= 1]))
