"""What an MPC's plans did not keep: samples without a plan, slacks in use, penalties too small, kinks nearby."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sim2real.solvers.mpc import MPCPlan
from sim2real.solvers.qp import QPSolution


@dataclass(frozen=True)
class MPCReport:
    """Counts over the samples of a plan, and sentences that say what is wrong; none when all is well."""

    samples: int
    infeasible: int
    """no plan keeps the hard bounds (proved), or the cost has no minimum"""
    unconverged: int
    relaxed: int
    """soft bounds of outputs are exceeded by more than `tol` at some step"""
    kinks: int
    """the margin to a change of the active set is below `kink`: derivatives are one-sided there"""
    largest_slack: Tensor | None
    """`[p]` in units of the outputs, over samples and steps"""
    largest_pressure: Tensor | None
    """`[p]` multiplier over g^k: an exact penalty is larger than that of the hard program"""
    notes: tuple[str, ...]


def mpc_report(plan: MPCPlan, *, tol: float = 1e-8, kink: float = 1e-9) -> MPCReport:
    """Counts of what went wrong in the plans of `condensed_mpc`; `tol` in units of the outputs, `kink` as `margin` is.

    For a policy: `mpc_report(condensed_mpc(**fixed, **nu, x0=states, horizon=N, on_infeasible="nan"))` at the states it
    met. Slacks in use at a penalty that the pressure has not reached would contradict one another; slacks in use mean
    that the bounds cannot be kept, or that their price is below the gain of breaking them.
    """
    solution = plan.solution
    samples = solution.converged.numel()
    solved = solution.converged.reshape(-1)
    infeasible = torch.zeros_like(solved)
    if isinstance(solution, QPSolution):
        infeasible = (solution.infeasible | solution.unbounded).reshape(-1)
    near = solved & (solution.margin.reshape(-1) < kink)
    relaxed, slack, pressure = torch.zeros_like(solved), None, None
    if plan.pressure is not None:
        pressure = _largest(plan.pressure, solved)
    if plan.slack is not None:
        slack = _largest(plan.slack, solved)
        relaxed = solved & (plan.slack.detach().flatten(-2).amax(-1).reshape(-1) > tol)
    counts = [int(which.sum()) for which in (infeasible, ~solved & ~infeasible, relaxed, near)]
    notes = _notes(samples, counts, relaxed, infeasible, slack, pressure)
    return MPCReport(samples, counts[0], counts[1], counts[2], counts[3], slack, pressure, notes)


def _largest(values: Tensor, solved: Tensor) -> Tensor:
    """Over solved samples and steps, `[p]`; zeros when there are none."""
    per_output = values.detach().reshape(len(solved), -1, values.shape[-1])[solved].flatten(0, 1)
    return torch.cat([per_output, torch.zeros_like(values.detach().reshape(-1, values.shape[-1])[:1])]).amax(0)


def _notes(
    samples: int,
    counts: list[int],
    relaxed: Tensor,
    infeasible: Tensor,
    slack: Tensor | None,
    pressure: Tensor | None,
) -> tuple[str, ...]:
    without, unconverged, exceeded, near = counts
    first = lambda which: which.nonzero()[:5, 0].tolist()
    notes = []
    if without:
        notes.append(
            f"{without} of {samples} states have no plan within the hard bounds (first: {first(infeasible)}); give "
            "penalty to soften the bounds of outputs, or reduce back_off"
        )
    if unconverged:
        notes.append(f"{unconverged} of {samples} plans are not solved to the tolerance: raise max_steps")
    if exceeded and slack is not None and pressure is not None:
        notes.append(
            f"{exceeded} of {samples} plans exceed soft bounds of outputs (first: {first(relaxed)}), by up to "
            f"{slack.tolist()}, at a pressure of up to {pressure.tolist()}; where the bounds could be kept, a penalty "
            "above the multiplier of the hard program keeps them"
        )
    if near:
        notes.append(f"{near} of {samples} plans lie at a kink: their derivatives are one-sided")
    return tuple(notes)
