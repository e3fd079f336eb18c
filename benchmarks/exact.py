"""dnu*/dtheta of LQR through the layer, against Bellman by scipy, and the time of its VJP next to TorchOpt's.

Problems, references and errors are those of `sensitivity.py` (five sizes up to 16 states and 4 actions):

    s-exact/error           the layer `implicit_argmax` under grad, vmap(grad) and jacrev: worst relative error
    s-exact/time-ratio      processor time of one VJP of the layer (solved by CG to 1e-12) over TorchOpt's `custom_root`
                            with its CG at rtol 1e-12, at the same optimum; medians of interleaved calls on one thread,
                            16 states, the worst seed
    s-exact/dense-ratio     the same with `solve=dense`, the fastest setting of the layer for so few parameters
    s-exact/lqr-ratio       the same for `lqr_sensitivity`, which solves the Riccati equation as well
    s-exact/auto-ratio      the same for `policy_sensitivity`, whose automatic damping probes the spectrum first
    s-exact/torchopt-error  TorchOpt's error with its default solver
    s-exact/torchopt-tight-error    and with CG at rtol 1e-12
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bars import Figure, MissingError, main
from benchmarks.sensitivity import SIZES, Problem, in_sim_return, layer, pair, problem, relative, worst
from sim2real.estimators import lqr_sensitivity, policy_sensitivity
from sim2real.params import Params
from sim2real.solvers import cg, dense, implicit_argmax, policy_optimum

tight_cg = partial(cg, tol=1e-12)
Call = Callable[[], tuple[Params, float]]


def pulled(p: Problem) -> Params:
    """The exact VJP of the problem's cotangent."""
    return {key: torch.einsum("mn,mn...->...", p.cotangent, value) for key, value in p.jacobian.items()}


def layer_error(p: Problem) -> float:
    """The worst relative error of grad, vmap(grad) and jacrev of the layer."""
    f = layer(p)
    product = lambda theta: (f(theta) * p.cotangent).sum()
    first = {key: value[0] for key, value in vmap(grad(product))(pair(p)).items()}
    errors = [worst(value, pulled(p)) for value in (grad(product)(p.theta), first)]
    return max(*errors, worst(jacrev(f)(p.theta), p.jacobian))


def timed(function: Callable[[], Params]) -> tuple[Params, float]:
    """What `function` returns and its processor seconds."""
    start = time.process_time()
    value = function()
    return value, time.process_time() - start


def backward(p: Problem, solution: Callable[[Params], Tensor]) -> tuple[Params, float]:
    """The VJP of `theta -> gain` by backward(), and its processor seconds; the forward pass is not timed."""
    leaves = {key: value.clone().requires_grad_() for key, value in p.theta.items()}
    value = (solution(leaves) * p.cotangent).sum()
    grads = lambda: torch.autograd.grad(value, list(leaves.values()))
    return timed(lambda: dict(zip(leaves, grads(), strict=True)))


def routes(p: Problem) -> dict[str, Call]:
    """All ways to the same VJP at the same optimum; those that start with torchopt are the peer's."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torchopt.diff.implicit import custom_root
            from torchopt.linear_solve import solve_cg
    except ImportError as error:
        raise MissingError("torchopt is not installed: pip install sim2real[bench]") from error

    J, g = partial(in_sim_return, p), {"gain": p.cotangent}
    nu = policy_optimum(J, p.theta, p.start).nu
    K = nu["gain"]
    stationary = lambda gain, A, B: grad(lambda k: J({"A": A, "B": B}, {"gain": k}))(gain)
    found = lambda gain, A, B: K.clone()
    default = custom_root(stationary, argnums=(1, 2))(found)
    tight = custom_root(stationary, argnums=(1, 2), solve=solve_cg(rtol=1e-12))(found)

    def own(solve: Callable) -> Call:
        optimal = implicit_argmax(J, lambda theta, start: nu, solve=solve)
        return lambda: backward(p, lambda theta: optimal(theta, nu)["gain"])

    return {
        "torchopt": lambda: backward(p, lambda theta: default(K.clone(), theta["A"], theta["B"])),
        "torchopt-tight": lambda: backward(p, lambda theta: tight(K.clone(), theta["A"], theta["B"])),
        "time": own(tight_cg),
        "dense": own(dense),
        "lqr": lambda: timed(lambda: lqr_sensitivity(lambda theta: {**theta, **p.fixed}, p.theta).vjp(g)),
        "auto": lambda: timed(lambda: policy_sensitivity(J, p.theta, nu, solve=tight_cg, cotangent=g).vjp(g)),
    }


def compared(p: Problem, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Error and median seconds of each route, one call of each per round; the first round warms up."""
    expected, errors = pulled(p), {}
    calls = routes(p)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            value, spent = call()
            errors[name] = max(relative(value[key], expected[key]) for key in expected)
            seconds[name].append(spent)
    return errors, {name: float(np.median(values[1:])) for name, values in seconds.items()}


def s_exact(quick: bool) -> Iterator[Figure]:
    """The bar s-exact: five sizes, five seeds each (quick: one)."""
    seeds, rounds = range(1 if quick else 5), 5 if quick else 40
    problems = [problem(n, m, 10 * n + seed) for n, m in SIZES for seed in seeds]
    yield Figure("error", max(map(layer_error, problems)), "relative error", len(problems), 1e-9)
    results = [compared(p, rounds) for p in problems[-len(seeds) :]]
    for name in ("time", "dense", "lqr", "auto"):
        ratios = [seconds[name] / seconds["torchopt-tight"] for _, seconds in results]
        own = max(errors[name] for errors, _ in results)
        yield Figure(f"{name}-ratio", max(ratios), f"times TorchOpt (error {own:.1e})", rounds * len(ratios))
    for name in ("torchopt", "torchopt-tight"):
        yield Figure(f"{name}-error", max(errors[name] for errors, _ in results), "relative error", len(results))


if __name__ == "__main__":
    main({"s-exact": s_exact})
