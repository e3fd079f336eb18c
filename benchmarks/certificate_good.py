"""Seeded good cases of `s-certificate`: optima of many classes, products slightly off, and the truth beside them.

Every case has a maximiser found by dense Newton in numpy and the product `C' A^-1 g` there by a dense solve (full LQR
gains: Bellman by scipy; box QPs: the KKT system on scipy's active set; wide networks: the open-loop optimum of every
state). Of each four seeds one is exact, one stops before the optimum, one solves loosely, one is damped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.optimize import lsq_linear
from torch import Tensor
from torch.func import grad, hessian, jacrev

from benchmarks.sensitivity import in_sim_return
from benchmarks.sensitivity import problem as lqr_problem
from sim2real.estimators import Certificate, certify, policy_sensitivity
from sim2real.mdp import ModelMDP, sample_noise
from sim2real.params import Params, axpy, map_params, ravel, unravel
from sim2real.policy import linear_policy
from sim2real.rollout import expected_return
from sim2real.simulators import building_rc, pendulum
from sim2real.solve_report import Sensitivity, SolveReport
from sim2real.solvers import UnstableError, box_qp, cg

Objective = Callable[[Params, Params], Tensor]


@dataclass(frozen=True)
class Case:
    """A product judged: the certificate, and how far the product truly is from the truth."""

    name: str
    certificate: Certificate
    error: float
    """true norm of the error"""
    size: float
    """true norm of the product"""
    seconds: tuple[float, float] = (math.nan, math.nan)
    """of the product, of the certificate"""


@dataclass(frozen=True)
class Problem:
    """J with its maximiser nu, a cotangent g and the true product."""

    J: Objective
    theta: Params
    nu: Params
    g: Params
    truth: Params
    scale: Params | None = None


class UnsolvedError(RuntimeError):
    """No regular maximum was found from this start: not a good case."""


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def like(params: Params, generator: torch.Generator) -> Params:
    return {key: normal(generator, *value.shape) for key, value in params.items()}


def distance(a: Params, b: Params, scale: Params | None) -> float:
    gap = axpy(-1.0, b, a)
    return float(ravel(gap if scale is None else map_params(torch.mul, gap, scale)).norm())


def dense_maximum(J: Objective, theta: Params, nu: Params, steps: int = 200) -> Params:
    """The maximiser next to nu: Newton with the dense Hessian, eigenvalues made positive, step halved until J grows."""
    cost = lambda x: -J(theta, unravel(x, nu))
    x = ravel(nu).detach()
    for _ in range(steps):
        g, H = grad(cost)(x), hessian(cost)(x)
        values, vectors = np.linalg.eigh(H.numpy())
        bent = np.maximum(np.abs(values), 1e-12 * np.abs(values).max())
        step = torch.tensor(-(vectors / bent) @ (vectors.T @ g.numpy()))
        share = 1.0
        while not _no_worse(cost, x + share * step, float(cost(x))) and share > 1e-4:
            share /= 2
        x = x + share * step
        if float(step.norm()) <= 1e-12 * (1 + float(x.norm())):
            if values[0] < 1e-9 * values[-1]:
                break
            return unravel(x, nu)
    raise UnsolvedError


def _no_worse(cost: Callable[[Tensor], Tensor], x: Tensor, than: float) -> bool:
    try:
        return float(cost(x)) <= than + 1e-14 * abs(than)
    except UnstableError:
        return False


def dense_product(J: Objective, theta: Params, nu: Params, g: Params) -> Params:
    """`C' A^-1 g` from dense matrices, in numpy."""
    gradient = lambda th, x: grad(lambda y: J(th, unravel(y, nu)))(x)
    H = hessian(lambda x: -J(theta, unravel(x, nu)))(ravel(nu))
    x = torch.tensor(np.linalg.solve(H.numpy(), ravel(g).numpy()))
    return {key: torch.tensordot(x, c, dims=1) for key, c in jacrev(gradient)(theta, ravel(nu)).items()}


def solved(J: Objective, theta: Params, start: Params, seed: int, scale: Params | None = None) -> Problem:
    nu = dense_maximum(J, theta, start)
    g = like(nu, seeded(seed))
    return Problem(J, theta, nu, g, dense_product(J, theta, nu, g), scale)


def lqr_gain(seed: int) -> Problem:
    n, m = ((2, 1), (4, 2), (6, 2), (8, 2))[seed % 4]
    p = lqr_problem(n, m, 100 + seed)
    nu = dense_maximum(partial(in_sim_return, p), p.theta, p.start)
    truth = {key: torch.einsum("mn,mn...->...", p.cotangent, value) for key, value in p.jacobian.items()}
    return Problem(partial(in_sim_return, p), p.theta, nu, {"gain": p.cotangent}, truth)


def masked_gain(seed: int) -> Problem:
    return masked_lqr(seed)[0]


def masked_lqr(seed: int) -> tuple[Problem, Params, Tensor]:
    """A gain with three of its eight entries fixed at zero, so no gain of the class is optimal; Q and R; the kept."""
    p = lqr_problem(4, 2, 300 + seed)
    kept = torch.randperm(8, generator=seeded(seed))[:5].sort().values
    gain = lambda nu: {"gain": torch.zeros(8, dtype=torch.float64).scatter(0, kept, nu["free"]).view(2, 4)}
    J = lambda theta, nu: in_sim_return(p, theta, gain(nu))
    theta = {"A": 0.9 * p.theta["A"], "B": p.theta["B"]}  # stable under no gain at all, where the search starts
    return solved(J, theta, {"free": torch.zeros(5, dtype=torch.float64)}, seed), p.fixed, kept


def network(seed: int, width: int = 4, discount: float = 0.9) -> Problem:
    """A tanh network of 10 to 17 parameters on a smooth nonlinear system, with a little weight decay."""
    generator = seeded(500 + seed)
    A, B = torch.eye(2).double() + 0.1 * normal(generator, 2, 2), 0.3 * normal(generator, 2, 1)
    s0 = normal(generator, 32, 2)
    nu = {"W": normal(generator, width, 2), "b": 0.1 * normal(generator, width), "v": normal(generator, 1, width)}

    def J(theta: Params, nu: Params) -> Tensor:
        s, cost = s0, torch.zeros(32, dtype=torch.float64)
        for t in range(6):
            a = torch.tanh(s @ nu["W"].mT + nu["b"]) @ nu["v"].mT
            cost = cost + discount**t * ((s**2).sum(-1) + 0.1 * (a**2).sum(-1))
            s = 1.5 * torch.tanh(s @ theta["A"].mT + a @ theta["B"].mT)
        return -cost.mean() - 1e-3 * ravel(nu).square().sum()

    return solved(J, {"A": A, "B": B}, nu, seed)


def decay_fit(seed: int) -> Problem:
    """Amplitude and rate of a decay fitted to 30 noisy readings; theta holds the readings and an offset."""
    generator = seeded(700 + seed)
    times = torch.linspace(0.0, 3.0, 30, dtype=torch.float64)
    data = torch.exp(-times) + 0.05 * normal(generator, 30)
    theta = {"data": data, "offset": torch.zeros((), dtype=torch.float64)}
    residual = lambda th, nu: th["offset"] + nu["x"][0] * torch.exp(-nu["x"][1] * times) - th["data"]
    J = lambda th, nu: -residual(th, nu).square().sum() / 2
    return solved(J, theta, {"x": torch.tensor([1.0, 1.0], dtype=torch.float64)}, seed)


def simulated(seed: int) -> Problem:
    """Linear feedback of a pendulum held upright, or of a heated house, on 4 rollouts; theta scaled by its size."""
    generator = seeded(900 + seed)
    if seed % 2:
        mdp: ModelMDP = pendulum(dt=0.05, initial_angle=math.pi, initial_std=0.3, discount=0.98)
        nu = {"gain": torch.tensor([[12.0, 3.0]]).double(), "offset": torch.tensor([12.0 * math.pi]).double()}
        keys, horizon, exogenous = ("inertia", "mgl", "damping"), 15, None
    else:
        mdp = building_rc(2, initial_temperature=18.0, initial_std=1.0, discount=0.95, energy_price=0.05)
        nu = {"gain": torch.tensor([[5.0, 5.0]]).double(), "offset": torch.tensor([210.0]).double()}
        weather = 5 * torch.sin(torch.arange(16).double() / 24 * 2 * math.pi)[None, :, None]
        keys, horizon, exogenous = ("Ci", "Ce", "Rie", "Ria", "Rea"), 16, weather + normal(generator, 4, 16, 1)
    policy = linear_policy(1)
    noise = sample_noise(mdp, policy, 4, horizon, generator, exogenous=exogenous)
    design = {key: torch.tensor(value, dtype=torch.float64) for key, value in mdp.box.default.items()}
    theta = {key: design[key] * (1 + 0.1 * normal(generator)) for key in keys}
    J = lambda th, nu: expected_return(mdp, policy, design | th, nu, noise)
    return solved(J, theta, nu, seed, scale={key: value.abs() for key, value in theta.items()})


def judged(name: str, p: Problem, seed: int) -> Case:
    """A product of the problem, exact or off in one of three ways, certified and compared with the truth."""
    import time

    generator = seeded(seed)
    way, amount = seed % 4, float(torch.rand((), generator=generator, dtype=torch.float64))
    nu, options = p.nu, {"solve": partial(cg, tol=1e-12)}
    if way == 1:
        nu = map_params(
            lambda v, z: v + 10 ** (-9 + 6 * amount) * float(ravel(p.nu).norm()) * z, nu, like(nu, generator)
        )
    elif way == 2:
        options = {"solve": partial(cg, tol=10 ** (-8 + 6 * amount))}
    elif way == 3:
        H = hessian(lambda x: -p.J(p.theta, unravel(x, nu)))(ravel(nu))
        options["damping"] = 10 ** (-8 + 6 * amount) * float(torch.linalg.eigvalsh(H)[0])
    start = time.perf_counter()
    sensitivity = policy_sensitivity(p.J, p.theta, nu, cotangent=p.g, **options)
    product = sensitivity.vjp(p.g)
    middle = time.perf_counter()
    certificate = certify(p.J, p.theta, nu, sensitivity, p.g, scale=p.scale)
    seconds = (middle - start, time.perf_counter() - middle)
    zero = {key: torch.zeros_like(value) for key, value in p.truth.items()}
    return Case(name, certificate, distance(product, p.truth, p.scale), distance(p.truth, zero, p.scale), seconds)


def box_layer(seed: int) -> Case:
    """A box QP layer away from kinks, its products off by up to 1 %; the certificate has re-solves only."""
    n, generator = 6, seeded(1100 + seed)
    root = normal(generator, n, n)
    theta = {"H": root @ root.mT + torch.eye(n).double(), "g": 3 * normal(generator, n)}
    layer = lambda th, nu0: {"x": box_qp(th["H"], th["g"], -0.5, 0.5).x}
    g = {"x": normal(generator, n)}
    # scipy finds the active set of |L'x + L^-1 g|^2 / 2 over the box; numpy solves the KKT system on it
    L = np.linalg.cholesky(theta["H"].numpy())
    found = lsq_linear(L.T, -np.linalg.solve(L, theta["g"].numpy()), (-0.5, 0.5), method="bvls", tol=1e-14)
    free = np.flatnonzero(found.active_mask == 0)
    w = np.zeros(n)
    w[free] = np.linalg.solve(theta["H"].numpy()[np.ix_(free, free)], g["x"].numpy()[free])
    outer = np.outer(w, found.x)
    truth = {"H": torch.tensor(-0.5 * (outer + outer.T)), "g": torch.tensor(-w)}
    amount = 10 ** (-8 + 6 * float(torch.rand((), generator=generator, dtype=torch.float64)))
    size = distance(truth, map_params(torch.zeros_like, truth), None)
    off = like(truth, generator)
    off["H"] = 0.5 * (off["H"] + off["H"].mT)
    wrong = amount * size / float(ravel(off).norm()) if seed % 4 else 0.0

    def vjp(cotangent: Params) -> Params:
        leaves = {key: value.clone().requires_grad_() for key, value in theta.items()}
        grads = torch.autograd.grad(layer(leaves, cotangent)["x"], list(leaves.values()), cotangent["x"])
        return axpy(wrong, off, dict(zip(leaves, grads, strict=True)))

    backend = Sensitivity(vjp, lambda v: v, SolveReport(True, 0.0, 0))
    nu = layer(theta, g)
    certificate = certify(None, theta, nu, backend, g, optimum=layer, generator=seeded(seed))
    return Case("box QP layer", certificate, distance(vjp(g), truth, None), size)
