"""Figures of the tuning report: pure functions from a `TuneResult` to SVG text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from sim2real.figures import BLUE, GREY, RED, draw, legend_above, log_axis
from sim2real.params import Params
from sim2real.tuning import TuneResult

Gaussian = tuple[Params, Tensor]
"""mean of the fitted parameters and their precision `[P, P]`"""


def tune_figures(result: TuneResult, units: Mapping[str, str], likelihood: Gaussian | None) -> dict[str, str]:
    """All figures of a tuning run by name; "path" only of scalar parameters, "tradeoff" only after a fit."""
    figures = {
        "history": history_figure(result.history),
        "search": search_figure(result.history),
    }
    if any(key.startswith("theta.") for key in result.history[0]):
        figures["path"] = path_figure(result.history, units)
    if likelihood is not None:
        free = result.freedom
        end = None if free is None else (-free.log_likelihood[1], measured(_last_kept(result.history))[0])
        figures["tradeoff"] = tradeoff_figure(result.history, likelihood, end)
    return figures


def measured(record: Mapping[str, float]) -> tuple[float, float]:
    """Real return of an iteration and its standard error: measured on its own rollouts, else estimated."""
    value = record.get("measured_return", math.nan)
    if math.isfinite(value):
        return value, record.get("measured_stderr", math.nan)
    return record.get("real_return", math.nan), record.get("real_return_stderr", math.nan)


def log_likelihood(record: Mapping[str, float], likelihood: Gaussian) -> float:
    """Loss of log-likelihood against the fit, `-d' P d / 2` nats, of the parameters an iteration tried."""
    mean, precision = likelihood
    offset = torch.stack(
        [mean[name].new_tensor(record.get(f"theta.{name}", float(mean[name]))) - mean[name] for name in mean]
    )
    return float(-0.5 * offset @ precision @ offset)


def history_figure(history: Sequence[Mapping[str, float]]) -> str:
    """Real return of every iteration with its 90 % confidence; steps that were undone are crossed."""

    def paint(axes: Any) -> None:
        ax = axes[0, 0]
        step = np.array([record["iteration"] for record in history])
        values = np.array([measured(record)[0] for record in history])
        errors = 1.645 * np.nan_to_num(np.array([measured(record)[1] for record in history]))
        kept = np.array([bool(record["accepted"]) for record in history])
        ax.axhline(values[0], color=GREY, lw=1, ls="--", label="start")
        ax.plot(step[kept], values[kept], color=BLUE, lw=1.4)
        ax.errorbar(step[kept], values[kept], errors[kept], fmt="o", ms=4, color=BLUE, capsize=2.5, label="kept (90 %)")
        if not kept.all():
            undone = ~kept
            ax.errorbar(
                step[undone], values[undone], errors[undone], fmt="x", ms=6, color=RED, capsize=2.5, label="undone"
            )
        _frame_kept(ax, step, values, errors, kept)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_xlabel("iteration")
        ax.set_ylabel("real return")
        legend_above(ax)

    return draw(paint, size=(10.0, 3.4))


def _frame_kept(ax: Axes, step: np.ndarray, values: np.ndarray, errors: np.ndarray, kept: np.ndarray) -> None:
    """Limits from the kept steps with room for the others: one disaster must not flatten the curve."""
    low, high = (values - errors)[kept].min(), (values + errors)[kept].max()
    span = max(high - low, 1e-9 * max(1.0, abs(high)))
    bottom, top = ax.get_ylim()
    floor = max(bottom, low - 0.6 * span)
    ax.set_ylim(floor, min(top, high + 0.6 * span))
    below = ~kept & (values < floor)
    if below.any():
        ax.plot(step[below], np.full(below.sum(), floor), "v", color=RED, ms=6, clip_on=False, label="undone, below")


def path_figure(history: Sequence[Mapping[str, float]], units: Mapping[str, str]) -> str:
    """The values tried of every parameter that moved, one small panel each."""
    names = [key for key in history[0] if key.startswith("theta.")]
    moved = [name for name in names if any(record[name] != history[0][name] for record in history)] or names
    columns = min(3, len(moved))
    rows = -(-len(moved) // columns)

    def paint(axes: Any) -> None:
        step = np.array([record["iteration"] for record in history])
        kept = np.array([bool(record["accepted"]) for record in history])
        for ax, name in zip(axes.flat, moved, strict=False):
            values = np.array([record[name] for record in history])
            ax.axhline(values[0], color=GREY, lw=1, ls="--")
            ax.plot(step[kept], values[kept], color=BLUE, marker="o", ms=3)
            ax.plot(step[~kept], values[~kept], "x", color=RED, ms=5)
            ax.xaxis.get_major_locator().set_params(integer=True)
            short = name.removeprefix("theta.")
            ax.set_title(f"{short} [{units.get(short) or '1'}]")
        for ax in axes.flat[len(moved) :]:
            ax.set_axis_off()
        for ax in axes[-1]:
            ax.set_xlabel("iteration")

    return draw(paint, rows, columns, size=(10.0, 0.4 + 1.9 * rows))


def search_figure(history: Sequence[Mapping[str, float]]) -> str:
    """Trust-region radius with the step taken, and the gradient."""

    def paint(axes: Any) -> None:
        left, right = axes[0]
        step = [record["iteration"] for record in history]
        series = (
            (left, "radius", GREY, "trust-region radius"),
            (left, "step_norm", BLUE, "step"),
            (right, "gradient_norm", BLUE, "gradient"),
        )
        for ax, key, color, label in series:
            values = [record.get(key, math.nan) or math.nan for record in history]
            ax.plot(step, values, color=color, marker="o", ms=3, label=label)
        for ax, label in ((left, "length [scaled]"), (right, "gradient [return per scaled unit]")):
            log_axis(ax, "y")
            ax.set_xlabel("iteration")
            ax.set_ylabel(label)
            ax.xaxis.get_major_locator().set_params(integer=True)
        legend_above(left)

    return draw(paint, 1, 2, size=(10.0, 3.0))


def _last_kept(history: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    return [record for record in history if record["accepted"]][-1]


def tradeoff_figure(
    history: Sequence[Mapping[str, float]], likelihood: Gaussian, end: tuple[float, float] | None = None
) -> str:
    """Real return against what the move costs in likelihood of the log: up is better, left is nearer to the log.

    `end`: cost and return after the last move of theta, at equal policy.
    """

    def paint(axes: Any) -> None:
        ax = axes[0, 0]
        cost = np.array([-log_likelihood(record, likelihood) for record in history])
        values = np.array([measured(record)[0] for record in history])
        kept = np.array([bool(record["accepted"]) for record in history])
        ax.plot(cost[kept], values[kept], color=BLUE, lw=0.8, alpha=0.6, label="kept")
        points = ax.scatter(cost[kept], values[kept], c=np.arange(len(cost))[kept], cmap="viridis", s=28, zorder=3)
        if not kept.all():
            ax.scatter(cost[~kept], values[~kept], marker="x", color=RED, s=28, label="undone")
        if end is not None:
            ax.plot(*end, "*", color=BLUE, ms=11, zorder=4, label="likeliest of equal policy")
        _frame_kept(ax, cost, values, np.zeros_like(values), kept)
        legend_above(ax)
        ax.set_xscale("symlog", linthresh=1.0)
        ax.set_xlim(left=-0.1)
        ax.set_xlabel("likelihood given up against the fit [nat]")
        ax.set_ylabel("real return")
        bar = ax.figure.colorbar(points, ax=ax, label="iteration", shrink=0.9)
        bar.locator = MaxNLocator(integer=True)
        bar.update_ticks()

    return draw(paint, size=(8.0, 3.4))
