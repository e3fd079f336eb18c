"""Figures of predictive calibration and of the trade-off: pure functions from results to SVG text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sim2real.calibration import Calibration
from sim2real.figures import BLUE, GREY, ORANGE, draw, legend_above, log_axis, plain
from sim2real.tune_finish import TradeOff

Pair = tuple[Calibration, Calibration]
"""before (the fit) and after (tuned)"""


def calibration_figures(pair: Pair) -> dict[str, str]:
    """Reliability and histogram; "horizons", the errors by horizon, only where there are several."""
    figures = {"reliability": reliability_figure(pair)}
    return figures | ({"horizons": horizon_figure(pair)} if len(pair[0].seconds) > 1 else {})


def reliability_figure(pair: Pair) -> str:
    """Observed against expected coverage at the shortest and the longest horizon, and the histogram of u there."""
    parts = ((pair[0], ORANGE, "start"), (pair[1], BLUE, "tuned"))
    ends = list(dict.fromkeys((0, len(pair[0].seconds) - 1)))

    def paint(axes: Any) -> None:
        for column, h in enumerate(ends):
            left, right = axes[0, 2 * column], axes[0, 2 * column + 1]
            left.plot([0, 1], [0, 1], color=GREY, lw=1, ls="--", label="as promised")
            for part, color, name in parts:
                expected, observed = part.levels.numpy(), part.coverage[h].numpy()
                error = 1.645 * np.nan_to_num(part.coverage_stderr[h].numpy())
                left.fill_between(expected, observed - error, observed + error, color=color, alpha=0.15, lw=0)
                left.plot(expected, observed, color=color, marker="o", ms=3, label=name)
                shares = part.histogram[h].numpy()
                edges = np.linspace(0, 1, len(shares) + 1)
                right.stairs(shares * len(shares), edges, color=color, lw=1.6, label=name)
            right.axhline(1.0, color=GREY, lw=1, ls="--")
            left.set_xlim(0, 1)
            left.set_ylim(0, 1.02)
            left.set_xlabel("expected coverage")
            left.set_ylabel("observed coverage")
            left.set_title(f"{pair[0].seconds[h]:.3g} s ahead", loc="left")
            right.set_xlabel("u")
            right.set_ylabel("density of u")
            right.set_ylim(bottom=0)
        legend_above(axes[0, -1])

    return draw(paint, 1, 2 * len(ends), size=(10.0, 2.9))


def horizon_figure(pair: Pair) -> str:
    """RMSE of each signal and negative log-likelihood, by how far ahead."""
    parts = ((pair[0], ORANGE, "start"), (pair[1], BLUE, "tuned"))
    styles = ("-", "--", ":", "-.")

    def paint(axes: Any) -> None:
        left, right = axes[0]
        for part, color, name in parts:
            seconds = np.array(part.seconds)
            for k, signal in enumerate(part.signals):
                label = f"{name}, {plain(signal)}" if len(part.signals) > 1 else name
                values = _finite(part.rmse[:, k].numpy())
                left.plot(seconds, values, color=color, marker="o", ms=3, ls=styles[k % 4], label=label)
            right.plot(seconds, _finite(part.nll.numpy()), color=color, marker="o", ms=3, label=name)
        log_axis(left, "x")
        log_axis(left, "y")
        log_axis(right, "x")
        for ax in (left, right):
            ax.set_xlabel("prediction horizon [s]")
            ax.legend(fontsize=8)
        left.set_ylabel(f"RMSE [{pair[0].unit or '1'}]")
        right.set_ylabel("negative log-likelihood [nat]")

    return draw(paint, 1, 2, size=(10.0, 3.0))


def curve_figure(curve: Sequence[TradeOff]) -> str:
    """Real return against what it costs in log-likelihood, from the start to the tuned theta."""

    def paint(axes: Any) -> None:
        ax = axes[0, 0]
        best = max(entry.log_likelihood for entry in curve)
        cost = np.array([best - entry.log_likelihood for entry in curve])
        values = np.array([entry.real_return for entry in curve])
        ax.plot(cost, values, color=BLUE, marker="o", ms=5, lw=1.4)
        for k, (entry, x, y) in enumerate(zip(curve, cost, values, strict=True)):
            text = "tuned" if entry.weight == 0 else "start" if math.isinf(entry.weight) else f"{entry.weight:.2g}"
            side = (6, -13) if k % 2 else (-6, 8)
            ax.annotate(
                text, (x, y), textcoords="offset points", xytext=side, fontsize=8, ha="left" if k % 2 else "right"
            )
        ax.margins(y=0.15)
        ax.set_xscale("symlog", linthresh=1.0)
        ax.set_xlim(left=-0.3)
        ax.set_xlabel("log-likelihood given up [nat]")
        ax.set_ylabel("real return, estimated")

    return draw(paint, size=(8.0, 3.4))


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan)
