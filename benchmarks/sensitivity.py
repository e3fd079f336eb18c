"""Derivatives: dnu*/dtheta on LQR against Bellman by scipy, next to TorchOpt; and the derivatives of every simulator.

`lqr-sensitivity`: theta = (A, B), nu = K maximises the exact return `-tr P` of a fixed gain; K* starts 1 % off and is
found by `policy_optimum`. The errors are relative in the Frobenius norm, the worst over all systems, routes and modes:

    vjp        policy_sensitivity.vjp, lqr_sensitivity.vjp, backward() through implicit_argmax, vmap(grad) of it
    jvp        policy_sensitivity.jvp, lqr_sensitivity.jvp, torch.func.jvp of the layer, vmap of that
    jacobian   jacrev and jacfwd of the layer, all entries

`torchopt-vjp` is the error of TorchOpt's `custom_root` with its default solver on the same problems, `torchopt-time`
its time for one backward over ours, on the largest system. The bars of the other files run from here, too:
`derivatives`, `s-exact`, `s-samples`, `s-scale`, `s-certificate`, `s-equivalence`, `s-economic`, `s-hessian-free`
(`hessian_free.py`), and three that are no bars: `s-freedom`, `s-safety`, `s-randomization` (`safety.py`).
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, jvp, vmap

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bars import Bar, Figure, main
from benchmarks.oracles.lqr import gain_jacobian, optimal_gain, random_system
from sim2real.estimators import lqr_sensitivity, policy_sensitivity
from sim2real.params import Params
from sim2real.solvers import cg, implicit_argmax, lyapunov, policy_optimum

SIZES = ((1, 1), (2, 1), (4, 2), (8, 2), (16, 4))
solve = partial(cg, tol=1e-13)


@dataclass(frozen=True)
class Problem:
    """One LQR system: theta = (A, B), the rest of it, a start near K*, directions, and the reference Jacobian."""

    theta: Params
    fixed: Params
    start: Params
    cotangent: Tensor
    tangent: Params
    jacobian: Params


def problem(n: int, m: int, seed: int) -> Problem:
    """A random system of n states and m actions, its start 1 % off the optimal gain."""
    system = random_system(n, m, seed)
    tensors = {key: torch.tensor(value) for key, value in system.items()}
    K = torch.tensor(optimal_gain(system)[1])
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    return Problem(
        theta={key: tensors[key] for key in ("A", "B")},
        fixed={key: tensors[key] for key in ("Q", "R", "discount")},
        start={"gain": K + 0.01 * K.norm() / K.numel() ** 0.5 * draw(m, n)},
        cotangent=draw(m, n),
        tangent={"A": draw(n, n), "B": draw(n, m)},
        jacobian={key: torch.tensor(value) for key, value in gain_jacobian(system).items()},
    )


def in_sim_return(p: Problem, theta: Params, nu: Params) -> Tensor:
    """`-tr P` of a fixed gain, exact; its maximiser is the optimal gain."""
    K = nu["gain"]
    cost = p.fixed["Q"] + K.mT @ p.fixed["R"] @ K
    return -lyapunov(theta["A"] - theta["B"] @ K, cost, p.fixed["discount"]).diagonal().sum()


def layer(p: Problem) -> Callable[[Params], Tensor]:
    """theta -> K*(theta), differentiable."""
    J = partial(in_sim_return, p)
    optimal = implicit_argmax(J, lambda theta, nu: policy_optimum(J, theta, nu).nu, solve=solve, strict=True)
    return lambda theta: optimal(theta, p.start)["gain"]


def relative(value: Tensor, reference: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return float((value - reference).norm() / reference.norm())


def worst(values: Params, reference: Params) -> float:
    """The largest relative error over the tensors."""
    return max(relative(values[key], reference[key]) for key in reference)


def pair(p: Problem) -> Params:
    """Two theta in one batch: the problem's own and one with 0.9 A."""
    return {"A": torch.stack([p.theta["A"], 0.9 * p.theta["A"]]), "B": torch.stack([p.theta["B"]] * 2)}


def vjp_error(p: Problem) -> float:
    """The worst relative error of all reverse-mode routes, against Bellman by scipy."""
    expected = {key: torch.einsum("mn,mn...->...", p.cotangent, value) for key, value in p.jacobian.items()}
    g, J, f = {"gain": p.cotangent}, partial(in_sim_return, p), layer(p)
    nu = policy_optimum(J, p.theta, p.start).nu
    product = lambda theta: (f(theta) * p.cotangent).sum()
    leaves = {key: value.clone().requires_grad_() for key, value in p.theta.items()}
    product(leaves).backward()
    routes = [
        policy_sensitivity(J, p.theta, nu, solve=solve, cotangent=g, strict=True).vjp(g),
        lqr_sensitivity(lambda theta: {**theta, **p.fixed}, p.theta).vjp(g),
        {key: value.grad for key, value in leaves.items() if value.grad is not None},
        {key: value[0] for key, value in vmap(grad(product))(pair(p)).items()},
    ]
    return max(worst(route, expected) for route in routes)


def jvp_error(p: Problem) -> float:
    """The worst relative error of all forward-mode routes, against Bellman by scipy."""
    columns = {"A": "mnij,ij->mn", "B": "mnij,ij->mn"}
    expected = sum(torch.einsum(columns[key], p.jacobian[key], p.tangent[key]) for key in columns)
    J, f = partial(in_sim_return, p), layer(p)
    nu = policy_optimum(J, p.theta, p.start).nu
    product = lambda theta: jvp(f, (theta,), (p.tangent,))[1]
    routes = [
        policy_sensitivity(J, p.theta, nu, solve=solve, strict=True).jvp(p.tangent)["gain"],
        lqr_sensitivity(lambda theta: {**theta, **p.fixed}, p.theta).jvp(p.tangent)["gain"],
        product(p.theta),
        vmap(product)(pair(p))[0],
    ]
    return max(relative(route, torch.as_tensor(expected)) for route in routes)


def jacobian_error(p: Problem) -> float:
    """The worst relative error of jacrev and jacfwd of the layer, against Bellman by scipy."""
    return max(worst(mode(layer(p))(p.theta), p.jacobian) for mode in (jacrev, jacfwd))


def torchopt_vjp(p: Problem) -> tuple[float, float, float]:
    """Error of TorchOpt's VJP at the same optimum, its seconds for one backward, and the layer's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchopt.diff.implicit import custom_root

        J = partial(in_sim_return, p)
        K = policy_optimum(J, p.theta, p.start).nu["gain"]
        stationary = lambda gain, A, B: grad(lambda k: J({"A": A, "B": B}, {"gain": k}))(gain)
        peer = custom_root(stationary, argnums=(1, 2))(lambda gain, A, B: K.clone())
        own = implicit_argmax(J, lambda theta, nu: {"gain": K}, solve=solve)
        calls = {
            "torchopt": lambda theta: peer(K.clone(), theta["A"], theta["B"]),
            "own": lambda theta: own(theta, {"gain": K})["gain"],
        }
        seconds, grads = {}, {}
        for _ in range(2):  # the first round warms up
            for name, call in calls.items():
                leaves = {key: value.clone().requires_grad_() for key, value in p.theta.items()}
                value = (call(leaves) * p.cotangent).sum()
                start = time.perf_counter()
                grads[name] = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))
                seconds[name] = time.perf_counter() - start
    expected = {key: torch.einsum("mn,mn...->...", p.cotangent, value) for key, value in p.jacobian.items()}
    return worst(grads["torchopt"], expected), seconds["torchopt"], seconds["own"]


def lqr_sensitivity_errors(quick: bool) -> Iterator[Figure]:
    """The bar lqr-sensitivity: five sizes up to 16 states, five seeds each (quick: one)."""
    seeds = range(1 if quick else 5)
    problems = [problem(n, m, 10 * n + seed) for n, m in SIZES for seed in seeds]
    unit = "relative error"
    peers = [torchopt_vjp(p) for p in problems]
    peer_error = max(error for error, _, _ in peers)
    yield Figure("vjp", max(map(vjp_error, problems)), unit, len(problems), peer_error)
    yield Figure("jvp", max(map(jvp_error, problems)), unit, len(problems))
    yield Figure("jacobian", max(map(jacobian_error, problems)), unit, len(problems))
    yield Figure("torchopt-vjp", peer_error, unit, len(problems))
    largest = peers[-len(seeds) :]
    yield Figure("torchopt-time", float(np.median([a / b for _, a, b in largest])), "times ours", len(largest))


def elsewhere(module: str, name: str) -> Bar:
    """The bar `name` of `benchmarks/<module>.py`, imported when it runs."""
    return lambda quick: getattr(import_module(f"benchmarks.{module}"), name)(quick)


if __name__ == "__main__":
    main(
        {
            "lqr-sensitivity": lqr_sensitivity_errors,
            "derivatives": elsewhere("derivatives", "derivative_failures"),
            "s-exact": elsewhere("exact", "s_exact"),
            "s-samples": elsewhere("samples", "s_samples"),
            "s-scale": elsewhere("scale", "s_scale"),
            "s-certificate": elsewhere("certificate", "s_certificate"),
            "s-equivalence": elsewhere("equivalence", "s_equivalence"),
            "s-economic": elsewhere("economic", "s_economic"),
            "s-hessian-free": elsewhere("hessian_free", "s_hessian_free"),
            "s-freedom": elsewhere("freedom", "s_freedom"),
            "s-safety": elsewhere("safety", "s_safety"),
            "s-randomization": elsewhere("safety", "s_randomization"),
        }
    )
