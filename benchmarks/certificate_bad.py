"""The bad cases of `s-certificate`: gradients that look fine to whoever made them, with the truth beside each.

Each function returns a `Case` whose error, against an independent reference, is above 5 % of the product (or there is
no product at all), so a certificate that holds would be wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.func import grad, hessian

from benchmarks.certificate_good import (
    Case,
    Objective,
    Problem,
    dense_maximum,
    dense_product,
    distance,
    lqr_gain,
    masked_lqr,
    network,
    normal,
    seeded,
    solved,
)
from benchmarks.certificate_networks import judged_network, wide_network
from sim2real.estimators import Certificate, certify, certify_estimate, logged_policy_gradient, policy_sensitivity
from sim2real.params import Estimate, Params, map_params, ravel, unravel
from sim2real.policy import linear_policy
from sim2real.rollout import Rollout
from sim2real.solve_report import Sensitivity, SolveReport
from sim2real.solvers import box_qp, cg, dense, lyapunov

quiet = SolveReport(True, 0.0, 0, "all is well")


def claimed(product: Params) -> Sensitivity:
    """A backend that returns this product and reports success."""
    return Sensitivity(lambda g: product, lambda v: v, quiet)


def case(name: str, p: Problem, sensitivity: Sensitivity, nu: Params | None = None, **options: Any) -> Case:
    certificate = certify(p.J, p.theta, p.nu if nu is None else nu, sensitivity, p.g, scale=p.scale, **options)
    size = distance(p.truth, map_params(torch.zeros_like, p.truth), p.scale)
    return Case(name, certificate, distance(sensitivity.vjp(p.g), p.truth, p.scale), size)


def early_stop() -> Case:
    """A gain whose training stopped 10 % before the optimum."""
    p = lqr_gain(1)
    nu = {"gain": 0.9 * p.nu["gain"]}
    return case("early stop", p, policy_sensitivity(p.J, p.theta, nu, cotangent=p.g), nu)


def saddle() -> Case:
    """Training stopped at a saddle that the cotangent does not even see; scipy finds the maximum beyond it."""
    J = lambda th, nu: -((nu["x"][0] - th["a"]) ** 2) - (nu["x"][1] ** 2 - 1) ** 2 * (1 + 0.5 * (nu["x"][0] - 1) ** 2)
    J_full = lambda th, nu: J(th, nu) + 0.3 * th["a"] * nu["x"][0] * nu["x"][1] ** 2
    theta, at = {"a": torch.tensor(1.0, dtype=torch.float64)}, {"x": torch.tensor([0.9, 0.0], dtype=torch.float64)}
    cost = lambda x, a: -float(J_full({"a": torch.tensor(a).double()}, {"x": torch.tensor(x)}))
    top = [minimize(cost, [1.0, 1.0], args=(1.0 + h,), tol=1e-14).x[0] for h in (1e-3, -1e-3)]
    nu = dense_stationary(J_full, theta, at)
    g = {"x": torch.tensor([1.0, 0.0], dtype=torch.float64)}
    truth = {"a": torch.tensor((top[0] - top[1]) / 2e-3, dtype=torch.float64)}
    p = Problem(J_full, theta, nu, g, truth)
    return case("saddle", p, policy_sensitivity(J_full, theta, nu, cotangent=g, solve=dense))


def dense_stationary(J: Objective, theta: Params, nu: Params) -> Params:
    """Plain Newton: whatever stationary point is near."""
    x = ravel(nu)
    for _ in range(30):
        cost = lambda y: -J(theta, unravel(y, nu))
        x = x - torch.tensor(np.linalg.solve(hessian(cost)(x).numpy(), grad(cost)(x).numpy()))
    return unravel(x, nu)


def gauss_newton_of_a_mask() -> Case:
    """A masked gain with the critic's Gauss-Newton matrix `2 E[S (x) s s']` in the place of the Hessian."""
    p, system, kept = masked_lqr(5)
    K = torch.zeros(8, dtype=torch.float64).scatter(0, kept, p.nu["free"]).view(2, 4)
    discount, A, B = system["discount"], p.theta["A"], p.theta["B"]
    P = lyapunov(A - B @ K, system["Q"] + K.mT @ system["R"] @ K, discount)
    visits = lyapunov((A - B @ K).mT, torch.eye(4, dtype=torch.float64), discount)
    S = system["R"] + discount * B.mT @ P @ B
    H = 2 * torch.einsum("ab,ij->aibj", S, visits).reshape(8, 8)[kept][:, kept]
    x = torch.tensor(np.linalg.solve(H.numpy(), p.g["free"].numpy()))
    slope = lambda th: grad(lambda nu: p.J(th, nu))(p.nu)["free"] @ x
    return case("Gauss-Newton Hessian of a masked gain", p, claimed(grad(slope)(p.theta)))


def unconverged_cg() -> Case:
    """Two steps of conjugate gradients."""
    p = lqr_gain(3)
    return case(
        "unconverged CG", p, policy_sensitivity(p.J, p.theta, p.nu, cotangent=p.g, solve=partial(cg, max_steps=2))
    )


def stale_nu() -> Case:
    """The optimum of another theta, 20 % away."""
    p = lqr_gain(1)
    other = {key: value * (0.8 if key == "B" else 1.0) for key, value in p.theta.items()}
    nu = dense_maximum(p.J, other, p.nu)
    return case("stale nu", p, policy_sensitivity(p.J, p.theta, nu, cotangent=p.g), nu)


def wrong_sign() -> Case:
    """The transposed sign rule forgotten."""
    p = lqr_gain(1)
    return case("wrong sign", p, claimed({key: -value for key, value in p.truth.items()}))


def dropped_discount() -> Case:
    """Discounted weights left out: the second derivatives of the undiscounted return."""
    p = network(1, discount=0.7)
    plain = network(1, discount=1.0).J
    return case("dropped discount weights", p, policy_sensitivity(plain, p.theta, p.nu, cotangent=p.g))


def noisy_hessian() -> Case:
    """The Hessian from 400 scores of smoothed returns, `E[J (e e' - I)] / sigma^2`, a score-function second order."""
    p = lqr_gain(1)
    sigma, generator, x = 0.02, seeded(7), ravel(p.nu)
    e = normal(generator, 400, len(x))
    J = torch.stack([p.J(p.theta, unravel(x + sigma * row, p.nu)) for row in e])
    J = J - J.mean()
    H = -(torch.einsum("i,ij,ik->jk", J, e, e) - J.sum() * torch.eye(len(x)).double()) / len(J) / sigma**2
    u = unravel(torch.tensor(np.linalg.solve(H.numpy(), ravel(p.g).numpy())), p.nu)
    slope = lambda th: sum((d * u[key]).sum() for key, d in grad(lambda nu: p.J(th, nu))(p.nu).items())
    return case("over-noised score Hessian", p, claimed(grad(slope)(p.theta)))


class _FirstOrderStep(torch.autograd.Function):
    """sin(s) whose backward uses saved numbers, as an engine's does: differentiated twice it gives zeros."""

    @staticmethod
    def forward(ctx: Any, s: Tensor) -> Tensor:
        ctx.slope = s.detach().cos()
        return s.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.slope


def silent_zeros() -> Case:
    """A model with first derivatives only, differentiated twice."""

    def J(sine: Callable[[Tensor], Tensor], theta: Params, nu: Params) -> Tensor:
        s, cost = torch.linspace(-0.5, 2.0, 16, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for _ in range(8):
            a = nu["k"][0] * s + nu["k"][1]
            cost = cost + ((s - 1) ** 2 + 0.1 * a**2).mean()
            s = 0.8 * s + theta["b"] * 0.3 * a + theta["c"] * sine(s + 2 * a)
        return -cost

    theta = {key: torch.tensor(value, dtype=torch.float64) for key, value in (("b", 1.0), ("c", 0.8))}
    p = solved(partial(J, torch.sin), theta, {"k": torch.tensor([0.0, 0.0], dtype=torch.float64)}, 0)
    engine = partial(J, _FirstOrderStep.apply)
    return case("silent zeros", replace(p, J=engine), policy_sensitivity(engine, p.theta, p.nu, cotangent=p.g))


def detached_part() -> Case:
    """An objective that detaches a part of its model: only re-solving by the true trainer can tell."""
    p = lqr_gain(1)
    broken = lambda th, nu: p.J({"A": th["A"].detach(), "B": th["B"]}, nu) + 0 * th["A"].sum()
    trainer = lambda th, nu0: dense_maximum(p.J, th, nu0)
    sensitivity = policy_sensitivity(broken, p.theta, p.nu, cotangent=p.g)
    return case("detached part of J", replace(p, J=broken), sensitivity, optimum=trainer)


def not_finite() -> Case:
    """An unstable rollout: NaN in the product."""
    p = lqr_gain(1)
    broken = {key: value * math.nan for key, value in p.truth.items()}
    return case("not finite", p, claimed(broken))


def diverging_return() -> Case:
    """J infinite at nu: its gradient is not a number, whatever the backend says."""
    p = lqr_gain(1)
    J = lambda th, nu: p.J(th, nu) + (nu["gain"] - p.nu["gain"]).square().sum().sqrt()
    return case(
        "diverging return", replace(p, J=J, truth=map_params(lambda w: w * math.nan, p.truth)), claimed(p.truth)
    )


def indefinite_hessian() -> Case:
    """A network after a few steps of training, its indefinite Hessian damped until CG is content."""
    p = network(1)
    J = p.J
    start = {key: 0.3 * normal(seeded(3), *value.shape) for key, value in p.nu.items()}
    nu = early(J, p.theta, start, 15)
    values = torch.linalg.eigvalsh(hessian(lambda x: -J(p.theta, unravel(x, nu)))(ravel(nu)))
    top = dense_maximum(J, p.theta, nu)
    p = Problem(J, p.theta, nu, p.g, dense_product(J, p.theta, top, p.g))
    sensitivity = policy_sensitivity(J, p.theta, nu, cotangent=p.g, damping=2 * abs(float(values[0])) + 1e-3)
    return case("indefinite Hessian", p, sensitivity)


def early(J: Objective, theta: Params, nu: Params, steps: int) -> Params:
    leaves = {key: value.clone().requires_grad_() for key, value in nu.items()}
    optimizer = torch.optim.Adam(leaves.values(), lr=0.05, maximize=True)
    for _ in range(steps):
        optimizer.zero_grad()
        J(theta, leaves).backward()
        optimizer.step()
    return {key: value.detach() for key, value in leaves.items()}


def heavy_damping() -> Case:
    """An over-parameterised network with damping 1, where 3e-3 would do."""
    return judged_network("too much damping", wide_network(1, width=28), 1.0)


def theseus_gauss_newton() -> Case:
    """theseus' implicit backward on two decays of almost one rate with large residuals; the truth by 50 digits."""
    from benchmarks.nls import decay_fit, decay_residual, exact_derivative, theseus_jacobian
    from sim2real.solvers.nls import least_squares_layer

    fit = decay_fit("ill")
    clean = torch.exp(-fit.times) + torch.exp(-1.4 * fit.times)
    fit = replace(fit, theta=fit.theta | {"data": clean + 6 * (fit.theta["data"] - clean)})
    residual = lambda th, nu: decay_residual(fit.times, th, nu)
    nu = least_squares_layer(residual)(fit.theta, fit.nu0)
    g = {"amplitude": torch.tensor([1.0, 0.0]).double(), "rate": torch.zeros(2, dtype=torch.float64)}
    product = unravel(ravel(g) @ theseus_jacobian(fit, "implicit"), fit.theta)
    units = [unravel(row, fit.theta) for row in torch.eye(31, dtype=torch.float64)]
    truth = unravel(torch.stack([ravel(g) @ exact_derivative(fit, nu, v) for v in units]), fit.theta)
    J = lambda th, x: -residual(th, x).square().sum() / 2
    return case("theseus implicit", Problem(J, fit.theta, nu, g, truth), claimed(product))


def kinked_active_set() -> Case:
    """A box QP whose unconstrained minimum lies on a bound: the layer gives one of two one-sided derivatives."""
    theta = {"H": torch.diag(torch.tensor([1.0, 2.0, 3.0])).double(), "g": torch.tensor([-0.5, 1.0, 0.2]).double()}
    layer = lambda th, nu0: {"x": box_qp(th["H"], th["g"], -0.5, 0.5).x}
    g = {"x": torch.tensor([1.0, 0.0, 0.3], dtype=torch.float64)}
    leaves = {key: value.clone().requires_grad_() for key, value in theta.items()}
    product = dict(zip(theta, torch.autograd.grad(layer(leaves, g)["x"], list(leaves.values()), g["x"]), strict=True))
    # x_1 is -g_1 / H_11 on one side of theta and 0.5 on the other: the claim is right on one of them
    one_sided = [
        {"H": -torch.outer(w, torch.tensor([0.5, -0.5, -0.2 / 3]).double()), "g": -w}
        for w in (torch.tensor([active, 0.0, 0.1], dtype=torch.float64) for active in (0.0, 1.0))
    ]
    certificate = certify(None, theta, layer(theta, g), claimed(product), g, optimum=layer)
    error = max(distance(product, side, None) for side in one_sided)
    return Case("kinked active set", certificate, error, float(ravel(one_sided[1]).norm()))


def lsqr_layer() -> Case:
    """cvxpylayers with its default derivative (lsqr) on the MPC program of `s-qp`; the truth is the exact layer's."""
    from benchmarks.layers import first_inputs, inputs, peers

    values = inputs()
    peer = peers(("clarabel",))["clarabel"]
    forward = lambda th, nu0: {"u": first_inputs(th)[0]}
    u = forward(values, values)["u"]
    g = {"u": 2 * u}

    def pulled(layer: Callable[[Params], Tensor]) -> Params:
        leaves = {key: value.clone().requires_grad_() for key, value in values.items()}
        return dict(zip(leaves, torch.autograd.grad(layer(leaves), list(leaves.values()), g["u"]), strict=True))

    product, truth = pulled(peer), pulled(lambda th: first_inputs(th)[0])
    certificate = certify(None, values, {"u": u}, claimed(product), g, optimum=forward)
    size = distance(truth, map_params(torch.zeros_like, truth), None)
    return Case("cvxpylayers lsqr", certificate, distance(product, truth, None), size)


CRITIC = {"gain": torch.tensor([[0.1, 0.2]], dtype=torch.float64)}


def real_rollouts(gain: Tensor, episodes: int, steps: int, *, exploration: float, seed: int, bump: float) -> Rollout:
    """A damped oscillator under `a = -gain s`; `bump` 0 makes it linear-quadratic, 1 neither linear nor quadratic."""
    generator = seeded(seed)
    s = normal(generator, episodes, 2)
    states, actions, rewards = [s], [], []
    for _ in range(steps):
        a = -s @ gain.mT + exploration * normal(generator, episodes, 1)
        cost = bump * 4 * (s[:, 0] - 0.5).clamp(min=0) ** 2 + (1 - bump) * s.square().sum(-1)
        rewards.append(-cost - 0.1 * a[:, 0] ** 2)
        spring = bump * torch.tanh(3 * s[:, 0]) + (1 - bump) * s[:, 0]
        push = torch.stack([0.2 * s[:, 1], -0.5 * spring + 0.6 * a[:, 0]], -1)
        s = 0.95 * s + push + 0.1 * normal(generator, episodes, 2)
        states.append(s)
        actions.append(a)
    return Rollout(torch.stack(states, 1), torch.stack(actions, 1), torch.stack(rewards, 1))


def critic_estimate(seed: int, *, bump: float, episodes: int = 300) -> tuple[Estimate, Certificate]:
    """The gradient from `episodes` of 40 steps with a quadratic critic, and its certificate."""
    policy, log = linear_policy(1), real_rollouts(CRITIC["gain"], episodes, 40, exploration=0.5, seed=seed, bump=bump)
    estimate = logged_policy_gradient(policy, CRITIC, log, real_discount=0.9)
    return estimate, certify_estimate(estimate, policy, CRITIC, log, real_discount=0.9)


def biased_critic() -> Case:
    """Quadratic features for a value that is not quadratic; the truth is the pathwise gradient of 4000 rollouts."""
    estimate, certificate = critic_estimate(0, bump=1.0)
    gain = CRITIC["gain"].clone().requires_grad_()
    weights = 0.9 ** torch.arange(100, dtype=torch.float64)
    real = real_rollouts(gain, 4000, 100, exploration=0.0, seed=1, bump=1.0)
    (truth,) = torch.autograd.grad((real.rewards @ weights).mean(), gain)
    return Case("biased critic", certificate, float((estimate.grad["gain"] - truth).norm()), float(truth.norm()))


CASES: tuple[Callable[[], Case], ...] = (
    early_stop,
    saddle,
    gauss_newton_of_a_mask,
    lsqr_layer,
    kinked_active_set,
    indefinite_hessian,
    biased_critic,
    unconverged_cg,
    heavy_damping,
    wrong_sign,
    dropped_discount,
    stale_nu,
    not_finite,
    diverging_return,
    silent_zeros,
    detached_part,
    noisy_hessian,
    theseus_gauss_newton,
)
PEERS = (lsqr_layer, theseus_gauss_newton)
"""the cases that need other libraries, and their time"""
