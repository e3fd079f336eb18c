"""Layers next to their peers: the MPC quadratic program; `s-nls`: see `nls.py`.

`s-qp`: 4 states, 2 inputs, horizon 10, |u| <= 0.5, batch 128, cost `sum_k |s_k|^2 + 0.1 |u_k|^2 + q's_k + 5 |s_N|^2`;
gradient of `sum |u_0|^2` through A, B, q and x0, forward and backward; one torch thread, the peer with its own pool.

    error        of dA, dB, dq, dx0 of every sample, against central differences of step 1e-6: worst sample, relative to
                 the larger of its own gradient and 1 % of the batch's root mean square; samples whose active set
                 changes within the step are kinks and are left out (`kinks` counts them)
    active       share of the samples with at least one input on a bound in the plan
    seconds      ours, forward + backward, median
    speedup      the fastest setting of cvxpylayers that is accurate (gradient within 1e-2 of ours in A, B, q and x0,
                 Frobenius norm over the batch), over ours; medians of the same run, interleaved
    speedup-one-core   the same of its most accurate setting when it, too, is given one core
    peer-NAME    seconds of each setting, and its error as `peer-NAME-error`
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bars import Figure, MissingError, main
from benchmarks.nls import s_nls
from sim2real.params import Params
from sim2real.solvers import condensed_mpc

STATES, INPUTS, HORIZON, LIMIT, BATCH = 4, 2, 10, 0.5, 128
ACCURATE = 1e-2
TOLERANCES = ("tol_gap_abs", "tol_gap_rel", "tol_feas")
SETTINGS: dict[str, dict[str, Any]] = {
    "scs": {"eps": 1e-9},
    "clarabel": {"solve_method": "Clarabel"},
    "clarabel-lsmr": {"solve_method": "Clarabel", "mode": "lsmr"},
    "clarabel-dense": {"solve_method": "Clarabel", "mode": "dense"},
    "clarabel-dense-tight": {"solve_method": "Clarabel", "mode": "dense", **dict.fromkeys(TOLERANCES, 1e-12)},
    "clarabel-one-core": {
        "solve_method": "Clarabel",
        "mode": "dense",
        "n_jobs_forward": 1,
        "n_jobs_backward": 1,
        **dict.fromkeys(TOLERANCES, 1e-12),
    },
}


def inputs() -> Params:
    """A, B, q shared over the batch, x0 per sample; the problem of the reference measurement."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    return {
        "A": torch.eye(STATES, dtype=torch.float64) + 0.1 * draw(STATES, STATES),
        "B": 0.3 * draw(STATES, INPUTS),
        "q": torch.zeros(STATES, dtype=torch.float64),
        "x0": draw(BATCH, STATES),
    }


def first_inputs(values: Params) -> tuple[Tensor, Tensor]:
    """u_0 `[B, m]` and the active set of the plan `[B, N m]`."""
    eye = torch.eye(STATES, dtype=torch.float64)
    weight = 0.1 * torch.eye(INPUTS, dtype=torch.float64)
    A, B, q, x0 = (values[key] for key in ("A", "B", "q", "x0"))
    plan = condensed_mpc(A, B, eye, weight, x0, HORIZON, P=5.0 * eye, q=q, low=-LIMIT, high=LIMIT, strict=True)
    return plan.actions[:, 0], plan.solution.active


def gradient(layer: Callable[[Params], Tensor], values: Params) -> tuple[Params, float]:
    """Gradient of `sum |u_0|^2` by one forward and one backward pass, and its seconds."""
    leaves = {key: value.clone().requires_grad_() for key, value in values.items()}
    start = time.perf_counter()
    grads = torch.autograd.grad((layer(leaves) ** 2).sum(), list(leaves.values()))
    return dict(zip(leaves, grads, strict=True)), time.perf_counter() - start


def ours(values: Params) -> Tensor:
    return first_inputs(values)[0]


def peers() -> dict[str, Callable[[Params], Tensor]]:
    """The same layer by cvxpylayers, in each of its settings."""
    try:
        import cvxpy as cp
        from cvxpylayers.torch import CvxpyLayer
    except ImportError as error:
        raise MissingError(f"cvxpylayers is not installed ({error}); pip install 'sim2real[convex]'") from error
    states, actions = cp.Variable((HORIZON + 1, STATES)), cp.Variable((HORIZON, INPUTS))
    shapes = {"A": (STATES, STATES), "B": (STATES, INPUTS), "q": (STATES,), "x0": (STATES,)}
    parameters = {key: cp.Parameter(shape) for key, shape in shapes.items()}
    constraints = [states[0] == parameters["x0"], cp.abs(actions) <= LIMIT]
    cost = 5 * cp.sum_squares(states[HORIZON]) + parameters["q"] @ states[HORIZON]
    for k in range(HORIZON):
        constraints.append(states[k + 1] == parameters["A"] @ states[k] + parameters["B"] @ actions[k])
        cost += cp.sum_squares(states[k]) + 0.1 * cp.sum_squares(actions[k]) + parameters["q"] @ states[k]
    layer = CvxpyLayer(cp.Problem(cp.Minimize(cost), constraints), list(parameters.values()), [states, actions])

    def first(arguments: dict[str, Any], values: Params) -> Tensor:
        return layer(*(values[key] for key in parameters), solver_args=arguments)[1][:, 0]

    return {name: partial(first, arguments) for name, arguments in SETTINGS.items()}


def worst_error(values: Params) -> tuple[float, int, float]:
    """Error of the gradients of every sample, number of samples at a kink, share of samples with active bounds."""
    apart = {
        key: value.expand(BATCH, *value.shape[-len(shape) :])
        for (key, value), shape in zip(values.items(), ((1, 1), (1, 1), (1,), (1,)), strict=True)
    }
    exact = gradient(ours, apart)[0]
    step, error = 1e-6, 0.0
    base = first_inputs(values)[1]
    kinked = torch.zeros(BATCH, dtype=torch.bool)
    differences = {key: torch.zeros_like(value) for key, value in exact.items()}
    for key, value in apart.items():
        for index in range(value[0].numel()):
            move = torch.zeros_like(value).flatten(1)
            move[:, index] = step
            sides = [first_inputs({**apart, key: value + sign * move.reshape(value.shape)}) for sign in (1, -1)]
            for _, active in sides:
                kinked |= (active != base).any(-1)
            losses = [(u**2).sum(-1) for u, _ in sides]
            differences[key].flatten(1)[:, index] = (losses[0] - losses[1]) / (2 * step)
    for key, expected in differences.items():
        norm = expected.flatten(1).norm(dim=1)
        scale = norm.clamp_min(1e-2 * float(norm.square().mean().sqrt()))
        off = (exact[key] - expected).flatten(1).norm(dim=1) / scale
        error = max(error, float(off[~kinked].max()))
    return error, int(kinked.sum()), float((base != 0).any(-1).double().mean())


def qp(quick: bool) -> Iterator[Figure]:
    """`s-qp`: error first, then ours and every setting of the peer in turn."""
    values = inputs()
    error, kinks, active = worst_error(values)
    yield Figure("error", error, "relative", BATCH - kinks)
    yield Figure("kinks", kinks, "samples", BATCH)
    yield Figure("active", active, "share", BATCH)
    exact = gradient(ours, values)[0]
    settings = peers()
    seconds: dict[str, list[float]] = {name: [] for name in ("ours", *settings)}
    errors: dict[str, float] = {}
    for _ in range(1 if quick else 3):
        for name, layer in settings.items():
            seconds["ours"] += [gradient(ours, values)[1] for _ in range(10)]
            found, taken = gradient(layer, values)
            seconds[name].append(taken)
            errors[name] = max(float((found[key] - exact[key]).norm() / exact[key].norm()) for key in exact)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    for name in settings:
        yield Figure(f"peer-{name}", medians[name], "s", len(seconds[name]))
        yield Figure(f"peer-{name}-error", errors[name], "relative", BATCH)
    yield Figure("seconds", medians["ours"], "s", len(seconds["ours"]))
    accurate = [medians[name] for name in settings if errors[name] <= ACCURATE]
    if not accurate:
        raise MissingError(f"no setting of cvxpylayers came within {ACCURATE}: {errors}")
    yield Figure("speedup-one-core", medians["clarabel-one-core"] / medians["ours"], "times", len(seconds["ours"]))
    yield Figure("speedup", min(accurate) / medians["ours"], "times", len(seconds["ours"]), reference=130.0)


if __name__ == "__main__":
    main({"s-nls": s_nls, "s-qp": qp})
