"""Implicit layers against closed form and differences, in every mode of differentiation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from sim2real import Params, UnconvergedError, UnconvergedWarning, dot, ravel, unravel
from sim2real.solvers import (
    cg,
    dense,
    implicit_argmax,
    implicit_fixed_point,
    implicit_root,
    policy_optimum,
    root_jvp,
    root_vjp,
)

exact_cg = partial(cg, tol=1e-13)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


# x^3 + a x = b, a scalar root: TorchOpt issue 222 (its gradient is zero there)
def cubic(theta: Params, nu: Params) -> Params:
    return {"x": nu["x"] ** 3 + theta["a"] * nu["x"] - theta["b"]}


def newton(theta: Params, nu: Params) -> Params:
    x = nu["x"]
    for _ in range(50):
        x = x - (x**3 + theta["a"] * x - theta["b"]) / (3 * x * x + theta["a"])
    return {"x": x}


def root(a: Tensor, b: Tensor) -> Tensor:
    return implicit_root(cubic, newton)({"a": a, "b": b}, {"x": torch.ones_like(a.detach())})["x"]


def quartic(theta: Params, nu: Params) -> Tensor:
    """A concave J with nu = {"x": [3], "y": []} and a coupling between them."""
    coupling = (nu["x"] @ theta["M"] @ nu["x"]) + nu["y"] ** 2
    return (nu["x"] @ theta["c"]) + nu["y"] * theta["c"][0] - coupling - 0.1 * (nu["x"].sum() + nu["y"]) ** 4


def start() -> Params:
    return {"x": torch.zeros(3, dtype=torch.float64), "y": scalar(0.0)}


def theta_quartic(seed: int = 0) -> Params:
    generator = torch.Generator().manual_seed(seed)
    M = 0.2 * torch.randn(3, 3, generator=generator, dtype=torch.float64)
    return {
        "M": M @ M.T + torch.eye(3, dtype=torch.float64),
        "c": torch.randn(3, generator=generator, dtype=torch.float64),
    }


argmax = implicit_argmax(quartic, lambda theta, nu: policy_optimum(quartic, theta, nu).nu, solve=exact_cg)


def best(M: Tensor, c: Tensor) -> Tensor:
    return ravel(argmax({"M": M, "c": c}, start()))


def test_scalar_root_in_closed_form_forward_backward_and_second_order() -> None:
    a, b = scalar(2.0), scalar(3.0)  # x = 1, x_b = 1 / (3 x^2 + a) = 1/5, x_a = -x / 5
    slopes = (-0.2, 0.2)
    assert float(root(a, b)) == pytest.approx(1.0, abs=1e-15)
    for mode in (jacrev, jacfwd, grad):
        assert [float(g) for g in mode(root, (0, 1))(a, b)] == pytest.approx(slopes, abs=1e-15)
    # x_bb = -6 x x_b / (3 x^2 + a)^2 = -0.048
    for outer in (jacrev, jacfwd):
        for inner in (jacrev, jacfwd):
            assert float(outer(inner(root, 1), 1)(a, b)) == pytest.approx(-0.048, abs=1e-14), (outer, inner)


def test_backward_fills_grads() -> None:
    a, b = scalar(2.0).requires_grad_(), scalar(3.0).requires_grad_()
    (root(a, b) ** 2).backward()
    assert a.grad is not None
    assert float(a.grad) == pytest.approx(-0.4, abs=1e-14)


def test_vmap_equals_a_loop_for_values_and_derivatives() -> None:
    """TorchOpt issue 223: its layers raise under vmap and jacrev."""
    a, b = torch.linspace(1, 3, 4, dtype=torch.float64), scalar(3.0)
    for function in (root, grad(root), jacfwd(root), grad(root, 1), hessian(root)):
        looped = torch.stack([function(x, b) for x in a])
        torch.testing.assert_close(vmap(function, (0, None))(a, b), looped, rtol=1e-12, atol=1e-14)
    total = grad(lambda a: vmap(root, (0, None))(a, b).sum())(a)
    torch.testing.assert_close(total, torch.stack([grad(root)(x, b) for x in a]), rtol=1e-12, atol=1e-14)


def test_argmax_of_several_tensors_by_differences() -> None:
    theta = theta_quartic()
    M, c = theta["M"].requires_grad_(), theta["c"].requires_grad_()
    assert torch.autograd.gradcheck(best, (M, c), check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda c: best(M.detach(), c), (c,), check_fwd_over_rev=True, fast_mode=True)


def test_argmax_jacobians_agree_between_modes_and_with_vmap() -> None:
    theta = theta_quartic()
    by_rows, by_columns = jacrev(best, (0, 1))(*theta.values()), jacfwd(best, (0, 1))(*theta.values())
    for r, f in zip(by_rows, by_columns, strict=True):
        torch.testing.assert_close(r, f, rtol=1e-11, atol=1e-12)
    many = torch.stack([theta_quartic(k)["c"] for k in range(3)])
    looped = torch.stack([jacrev(best, 1)(theta["M"], c) for c in many])
    torch.testing.assert_close(vmap(jacrev(best, 1), (None, 0))(theta["M"], many), looped, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(vmap(jacfwd(best, 1), (None, 0))(theta["M"], many), looped, rtol=1e-11, atol=1e-12)


def test_second_derivative_of_argmax_agrees_between_modes() -> None:
    theta = theta_quartic()
    f = lambda c: best(theta["M"], c).sum()
    reference = jacrev(jacrev(f))(theta["c"])
    for second in (hessian(f), jacrev(jacfwd(f)), jacfwd(jacfwd(f))):
        torch.testing.assert_close(second(theta["c"]), reference, rtol=1e-10, atol=1e-11)
    assert float(reference.abs().max()) > 1e-3


def test_vjp_and_jvp_are_transposes() -> None:
    theta = theta_quartic()
    generator = torch.Generator().manual_seed(5)
    draw = lambda like: {k: torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in like.items()}
    nu, pull = vjp(lambda th: argmax(th, start()), theta)
    for _ in range(3):
        g, v = draw(nu), draw(theta)
        pushed = jvp(lambda th: argmax(th, start()), (theta,), (v,))[1]
        assert float(dot(g, pushed)) == pytest.approx(float(dot(pull(g)[0], v)), rel=1e-11)


def unsymmetric(theta: Params, nu: Params) -> Params:
    y, z = nu["y"], nu["z"]
    return {"y": y + torch.tanh(theta["M"] @ y) - theta["c"] * z.sum(), "z": z - theta["c"][:2] ** 2 + 0.3 * y[:2]}


def newton_dense(theta: Params, nu: Params) -> Params:
    F = lambda x: ravel(unsymmetric(theta, unravel(x, nu)))
    x = ravel(nu)
    for _ in range(30):
        x = x - torch.linalg.solve(jacrev(F)(x), F(x))
    return unravel(x, nu)


def test_root_with_unsymmetric_jacobian() -> None:
    layer = implicit_root(unsymmetric, newton_dense)
    nu0 = {"y": torch.zeros(3, dtype=torch.float64), "z": torch.zeros(2, dtype=torch.float64)}
    f = lambda M, c: ravel(layer({"M": M, "c": c}, nu0))
    theta = theta_quartic(1)
    inputs = (theta["M"].requires_grad_(), theta["c"].requires_grad_())
    assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(
        lambda c: f(inputs[0].detach(), c), inputs[1:], check_fwd_over_rev=True, fast_mode=True
    )
    theta = {key: value.detach() for key, value in theta.items()}
    nu = layer(theta, nu0)
    tangent = {key: torch.ones_like(value) for key, value in theta.items()}
    pushed = root_jvp(unsymmetric, theta, nu, tangent)
    pulled = root_vjp(unsymmetric, theta, nu, {key: torch.ones_like(value) for key, value in nu.items()})
    assert float(ravel(pushed).sum()) == pytest.approx(float(ravel(pulled).sum()), rel=1e-12)


def test_a_layer_inside_the_return_of_another_one() -> None:
    inner = implicit_root(cubic, newton)

    def J(theta: Params, nu: Params) -> Tensor:
        x = inner({"a": nu["y"] ** 2 + 1, "b": theta["t"] + nu["y"]}, {"x": scalar(1.0)})["x"]
        return x - 0.5 * (nu["y"] - theta["t"]) ** 2

    outer = implicit_argmax(J, lambda theta, nu: policy_optimum(J, theta, nu).nu, solve=exact_cg)
    f = lambda t: outer({"t": t}, {"y": scalar(0.5)})["y"]
    t, h = scalar(1.3), 1e-4
    slope, bend = float(f(t + h) - f(t - h)) / (2 * h), float(f(t + h) - 2 * f(t) + f(t - h)) / h**2
    for first in (jacrev, jacfwd):
        assert float(first(f)(t)) == pytest.approx(slope, rel=1e-7)  # truncation 1e-8
        for second in (jacrev, jacfwd):
            assert float(second(first(f))(t)) == pytest.approx(bend, rel=1e-5)  # rounding 1e-16 / 1e-8


def test_fixed_point() -> None:
    contraction = lambda theta, nu: {"x": 0.5 * torch.cos(nu["x"] * theta["a"])}

    def iterate(theta: Params, nu: Params) -> Params:
        for _ in range(200):
            nu = contraction(theta, nu)
        return nu

    layer = implicit_fixed_point(contraction, iterate)
    a = torch.linspace(0.5, 1.0, 3, dtype=torch.float64)
    f = lambda a: layer({"a": a}, {"x": torch.zeros(3, dtype=torch.float64)})["x"]
    x = f(a)
    # x = cos(a x) / 2, so x_a = -x sin(a x) / 2 / (1 + a sin(a x) / 2)
    sine = 0.5 * torch.sin(a * x)
    torch.testing.assert_close(jacrev(f)(a), torch.diag(-x * sine / (1 + a * sine)), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(jacfwd(f)(a), torch.diag(-x * sine / (1 + a * sine)), rtol=1e-13, atol=1e-14)


def test_the_start_gets_no_gradient_and_the_dtype_of_the_start_is_kept() -> None:
    a, x0 = torch.tensor(2.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    x = implicit_root(cubic, newton)({"a": a, "b": torch.tensor(3.0)}, {"x": x0})["x"]
    assert x.dtype == torch.float32
    x.backward()
    assert x0.grad is None or float(x0.grad) == 0.0
    assert float(a.grad) == pytest.approx(-0.2, abs=1e-7)


@pytest.mark.parametrize("solver", [lambda theta, nu: {"x": nu["x"] + 0.3}, lambda theta, nu: {"x": 2 * nu["x"]}])
def test_an_answer_that_is_no_root_warns_and_raises_under_strict(solver: Callable) -> None:
    theta, nu0 = {"a": scalar(2.0), "b": scalar(3.0)}, {"x": scalar(1.0)}
    with pytest.warns(UnconvergedWarning, match="not stationary"):
        implicit_root(cubic, solver)(theta, nu0)
    with pytest.raises(UnconvergedError, match="not stationary"):
        implicit_root(cubic, solver, strict=True)(theta, nu0)


@pytest.mark.parametrize("mode", [jacrev, jacfwd])
@pytest.mark.parametrize("solve", [partial(cg, max_steps=1), partial(cg, tol=1e-18)], ids=["steps", "tol"])
def test_an_unconverged_derivative_warns_and_raises_under_strict(mode: Callable, solve: Callable) -> None:
    theta = theta_quartic()
    nu = argmax(theta, start())
    layer = implicit_argmax(quartic, lambda theta, _: nu, solve=solve)
    with pytest.warns(UnconvergedWarning, match="did not converge"):
        mode(lambda c: layer({**theta, "c": c}, start())["x"])(theta["c"])
    strict = implicit_argmax(quartic, lambda theta, _: nu, solve=solve, strict=True)
    with pytest.raises(UnconvergedError, match="did not converge"):
        mode(lambda c: strict({**theta, "c": c}, start())["x"])(theta["c"])


@pytest.mark.parametrize(("solve", "message"), [(cg, "non-positive curvature"), (dense, "no maximiser")])
def test_a_minimum_taken_for_a_maximum_is_caught(solve: Callable, message: str) -> None:
    J = lambda theta, nu: (nu["x"] - theta["t"]) ** 2
    layer = implicit_argmax(J, lambda theta, nu: {"x": theta["t"]}, solve=solve)
    with pytest.warns(UnconvergedWarning, match=message):
        grad(lambda t: layer({"t": t}, {"x": scalar(0.0)})["x"])(scalar(1.0))
    lifted = implicit_argmax(J, lambda theta, nu: {"x": theta["t"]}, solve=partial(solve, damping=5.0), strict=True)
    # (-2 + 5)^-1 (-2)
    assert float(grad(lambda t: lifted({"t": t}, {"x": scalar(0.0)})["x"])(scalar(1.0))) == pytest.approx(-2 / 3)


def test_damping_is_bound_to_the_solve() -> None:
    J = lambda theta, nu: -((nu["x"] - theta["t"]) ** 2)
    layer = implicit_argmax(J, lambda theta, nu: {"x": theta["t"]}, solve=partial(cg, damping=2.0))
    # (-J_nunu + damping)^-1 C = 2 / (2 + 2)
    assert float(grad(lambda t: layer({"t": t}, {"x": scalar(0.0)})["x"])(scalar(1.0))) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("residual", "solver", "error", "message"),
    [
        (cubic, lambda theta, nu: {"y": nu["x"]}, KeyError, "what the solver returned"),
        (cubic, lambda theta, nu: {"x": nu["x"] * float("nan")}, ValueError, "not finite"),
        (cubic, lambda theta, nu: {"x": nu["x"].expand(2)}, ValueError, "shape"),
        (lambda theta, nu: {"y": nu["x"]}, newton, KeyError, "what the residual returned"),
        (lambda theta, nu: {"x": nu["x"].expand(2)}, newton, ValueError, "the residual of 'x' has shape"),
    ],
)
def test_bad_functions_are_named(residual: Callable, solver: Callable, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        implicit_root(residual, solver)({"a": scalar(2.0), "b": scalar(3.0)}, {"x": scalar(1.0)})


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"theta\['a'\] must be floating point"):
        implicit_root(cubic, newton)({"a": torch.tensor(2), "b": scalar(3.0)}, {"x": scalar(1.0)})
    theta, nu = {"a": scalar(2.0), "b": scalar(3.0)}, {"x": scalar(1.0)}
    with pytest.raises(KeyError, match="cotangent of root_vjp"):
        root_vjp(cubic, theta, nu, {"y": scalar(1.0)})
    with pytest.raises(KeyError, match="tangent of root_jvp"):
        root_jvp(cubic, theta, nu, {"a": scalar(1.0)})


def test_converged_solves_are_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnconvergedWarning)
        layer = implicit_argmax(quartic, lambda theta, nu: policy_optimum(quartic, theta, nu).nu, solve=dense)
        jacrev(lambda c: layer({**theta_quartic(), "c": c}, start())["x"])(theta_quartic()["c"])
