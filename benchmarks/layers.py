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
    speedup-as-written   the same on the program written term by term only, without `stacked`
    speedup-one-core   the same of all settings that, too, are given one core
    peer-NAME    seconds of each setting, and its error as `peer-NAME-error`
    seconds-apart      ours where every sample has its own A and B; `seconds` factors what all samples share once, which
                       the peer, given the same shared parameters, does not

The peer gets the program written term by term, and `stacked`: one sum of squares, one equality, fewer and larger cones.

`s-qp-outputs`: the same, and besides the first state within 0.5 from step 1 on, softly, at a price of 5 per unit and
step: a general QP with 30 variables and 70 inequalities. The settings are those that are accurate, and the fastest.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
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
PRICE = 5.0
ACCURATE = 1e-2
TOLERANCES = ("tol_gap_abs", "tol_gap_rel", "tol_feas")
SETTINGS: dict[str, dict[str, Any]] = {
    "scs": {"eps": 1e-9},
    "clarabel": {"solve_method": "Clarabel"},
    "clarabel-lsmr": {"solve_method": "Clarabel", "mode": "lsmr"},
    "clarabel-dense": {"solve_method": "Clarabel", "mode": "dense"},
    "clarabel-dense-tight": {"solve_method": "Clarabel", "mode": "dense", **dict.fromkeys(TOLERANCES, 1e-12)},
    "clarabel-dense-stacked": {"solve_method": "Clarabel", "mode": "dense"},
    "clarabel-one-core": {
        "solve_method": "Clarabel",
        "mode": "dense",
        "n_jobs_forward": 1,
        "n_jobs_backward": 1,
        **dict.fromkeys(TOLERANCES, 1e-12),
    },
}
SETTINGS["clarabel-one-core-stacked"] = SETTINGS["clarabel-one-core"]


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


def first_inputs(values: Params, outputs: bool = False) -> tuple[Tensor, Tensor]:
    """u_0 `[B, m]` and the active set of the plan `[B, ...]`."""
    eye = torch.eye(STATES, dtype=torch.float64)
    weight = 0.1 * torch.eye(INPUTS, dtype=torch.float64)
    A, B, q, x0 = (values[key] for key in ("A", "B", "q", "x0"))
    bounds = {"C": eye[:1], "output_low": -LIMIT, "output_high": LIMIT, "penalty": PRICE} if outputs else {}
    plan = condensed_mpc(
        A, B, eye, weight, x0, HORIZON, P=5.0 * eye, q=q, low=-LIMIT, high=LIMIT, strict=True, **bounds
    )
    return plan.actions[:, 0], plan.solution.active


def gradient(layer: Callable[[Params], Tensor], values: Params) -> tuple[Params, float]:
    """Gradient of `sum |u_0|^2` by one forward and one backward pass, and its seconds."""
    leaves = {key: value.clone().requires_grad_() for key, value in values.items()}
    start = time.perf_counter()
    grads = torch.autograd.grad((layer(leaves) ** 2).sum(), list(leaves.values()))
    return dict(zip(leaves, grads, strict=True)), time.perf_counter() - start


def ours(values: Params, outputs: bool = False) -> Tensor:
    return first_inputs(values, outputs)[0]


def peers(names: Sequence[str], outputs: bool = False) -> dict[str, Callable[[Params], Tensor]]:
    """The same layer by cvxpylayers, in some of its settings."""
    try:
        import cvxpy as cp
        from cvxpylayers.torch import CvxpyLayer
    except ImportError as error:
        raise MissingError(f"cvxpylayers is not installed ({error}); pip install 'sim2real[convex]'") from error
    written = {
        stacked: CvxpyLayer(*_program(cp, outputs, stacked)) for stacked in {"stacked" in name for name in names}
    }

    def first(name: str, values: Params) -> Tensor:
        layer = written["stacked" in name]
        return layer(*(values[key] for key in ("A", "B", "q", "x0")), solver_args=SETTINGS[name])[1][:, 0]

    return {name: partial(first, name) for name in names}


def _program(cp: Any, outputs: bool, stacked: bool) -> tuple[Any, list[Any], list[Any]]:
    """Problem, parameters and variables; cvxpy.abs would add a variable and a row for each of the bounds."""
    states, actions = cp.Variable((HORIZON + 1, STATES)), cp.Variable((HORIZON, INPUTS))
    shapes = {"A": (STATES, STATES), "B": (STATES, INPUTS), "q": (STATES,), "x0": (STATES,)}
    parameters = {key: cp.Parameter(shape) for key, shape in shapes.items()}
    constraints = [states[0] == parameters["x0"], actions <= LIMIT, actions >= -LIMIT]
    cost = 5 * cp.sum_squares(states[HORIZON]) + parameters["q"] @ states[HORIZON]
    if stacked:
        constraints.append(states[1:] == states[:-1] @ parameters["A"].T + actions @ parameters["B"].T)
        cost += cp.sum_squares(states[:-1]) + 0.1 * cp.sum_squares(actions) + cp.sum(states[:-1] @ parameters["q"])
    for k in range(0 if stacked else HORIZON):
        constraints.append(states[k + 1] == parameters["A"] @ states[k] + parameters["B"] @ actions[k])
        cost += cp.sum_squares(states[k]) + 0.1 * cp.sum_squares(actions[k]) + parameters["q"] @ states[k]
    if outputs:
        excess = cp.Variable((HORIZON, 1), nonneg=True)
        constraints += [states[1:, :1] <= LIMIT + excess, -states[1:, :1] <= LIMIT + excess]
        cost += PRICE * cp.sum(excess)
    return cp.Problem(cp.Minimize(cost), constraints), list(parameters.values()), [states, actions]


def per_sample(values: Params) -> Params:
    """Every sample with its own A, B and q."""
    sizes = {"A": 2, "B": 2, "q": 1, "x0": 1}
    return {key: value.expand(BATCH, *value.shape[-sizes[key] :]).contiguous() for key, value in values.items()}


def worst_error(values: Params, outputs: bool) -> tuple[float, int, float]:
    """Error of the gradients of every sample, number of samples at a kink, share of samples with active bounds."""
    apart = per_sample(values)
    exact = gradient(partial(ours, outputs=outputs), apart)[0]
    step, error = 1e-6, 0.0
    base = first_inputs(values, outputs)[1]
    kinked = torch.zeros(BATCH, dtype=torch.bool)
    differences = {key: torch.zeros_like(value) for key, value in exact.items()}
    for key, value in apart.items():
        for index in range(value[0].numel()):
            move = torch.zeros_like(value).flatten(1)
            move[:, index] = step
            sides = [
                first_inputs({**apart, key: value + sign * move.reshape(value.shape)}, outputs) for sign in (1, -1)
            ]
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


def race(quick: bool, names: Sequence[str], outputs: bool) -> Iterator[Figure]:
    """Error first, then ours and every setting of the peer in turn."""
    values, layer = inputs(), partial(ours, outputs=outputs)
    error, kinks, active = worst_error(values, outputs)
    yield Figure("error", error, "relative", BATCH - kinks)
    yield Figure("kinks", kinks, "samples", BATCH)
    yield Figure("active", active, "share", BATCH)
    exact = gradient(layer, values)[0]
    seconds: dict[str, list[float]] = {name: [] for name in ("ours", *names)}
    errors: dict[str, float] = {}
    settings = peers(names, outputs)
    for _ in range(1 if quick else 3):
        for name, peer in settings.items():
            seconds["ours"] += [gradient(layer, values)[1] for _ in range(10)]
            found, taken = gradient(peer, values)
            seconds[name].append(taken)
            errors[name] = max(float((found[key] - exact[key]).norm() / exact[key].norm()) for key in exact)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    for name in names:
        yield Figure(f"peer-{name}", medians[name], "s", len(seconds[name]))
        yield Figure(f"peer-{name}-error", errors[name], "relative", BATCH)
    yield Figure("seconds", medians["ours"], "s", len(seconds["ours"]))
    own = [gradient(layer, per_sample(values))[1] for _ in range(10)]
    yield Figure("seconds-apart", statistics.median(own), "s", len(own))
    accurate = {name: medians[name] for name in names if errors[name] <= ACCURATE}
    if not accurate:
        raise MissingError(f"no setting of cvxpylayers came within {ACCURATE}: {errors}")
    alone = [taken for name, taken in accurate.items() if "one-core" in name]
    plain = [taken for name, taken in accurate.items() if "stacked" not in name]
    every = list(accurate.values())
    for metric, found in (("speedup-one-core", alone), ("speedup-as-written", plain), ("speedup", every)):
        if found:
            yield Figure(metric, min(found) / medians["ours"], "times", len(seconds["ours"]))


def qp(quick: bool) -> Iterator[Figure]:
    """`s-qp`: bounds of inputs."""
    for figure in race(quick, tuple(SETTINGS), outputs=False):
        yield replace(figure, reference=130.0) if figure.metric == "speedup" else figure


def qp_outputs(quick: bool) -> Iterator[Figure]:
    """`s-qp-outputs`: bounds of inputs and, softly, of an output."""
    dense = ("clarabel-dense", "clarabel-dense-tight", "clarabel-dense-stacked")
    yield from race(quick, ("clarabel", "clarabel-lsmr", *dense), outputs=True)


if __name__ == "__main__":
    main({"s-nls": s_nls, "s-qp": qp, "s-qp-outputs": qp_outputs})
