"""Figures of the report: pure functions from results to SVG text. Colours: Okabe and Ito, safe for colour-blind eyes.

Figures are drawn without a display and hold no time stamp or random identifier: equal results give equal bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from torch import Tensor

from sim2real.evaluation import Evaluation
from sim2real.fit import FitResult

BLACK, BLUE, ORANGE, RED, GREY, GREEN = "#222222", "#0072B2", "#E69F00", "#D55E00", "#8A8F98", "#009E73"
_STYLE: Any = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E8EB",
    "grid.linewidth": 0.6,
    "axes.edgecolor": "#5A6068",
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "svg.hashsalt": "sim2real",
    "svg.fonttype": "path",
    "figure.dpi": 100,
}


def draw(paint: Any, rows: int = 1, columns: int = 1, *, size: tuple[float, float], share: str = "none") -> str:
    """SVG text of a figure of `rows` x `columns` axes, `size` in inches, filled in by `paint(axes[rows, columns])`."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure.subplots(rows, columns, squeeze=False, sharex=share in ("x", "both"), sharey=share == "both"))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def log_axis(ax: Axes, which: Literal["x", "y"]) -> None:
    """Logarithmic axis with plain numbers at 1, 2, 5 while it spans few decades."""
    getattr(ax, f"set_{which}scale")("log")
    axis = ax.xaxis if which == "x" else ax.yaxis
    low, high = axis.get_view_interval()
    decades = math.log10(high / low) if 0 < low < high else 1.0
    if decades < 3.5:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2 else (1.0, 3.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def legend_above(ax: Axes) -> None:
    """One row of legend above the axes, where it hides nothing."""
    ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=4, borderaxespad=0.2)


def overlay_figure(fitted: Evaluation, initial: Evaluation, *, seconds: float = 12.0) -> str:
    """Measured signals of up to three runs with the simulated windows, end to end, before and after the fit."""
    episodes = fitted.episodes.unique().tolist()[:3]

    def paint(axes: Any) -> None:
        for column, episode in enumerate(episodes):
            chosen = _end_to_end(fitted, episode, seconds)
            for row, signal in enumerate(fitted.signals):
                ax = axes[row, column]
                _paint_windows(ax, fitted, initial, chosen, row)
                if row == 0:
                    ax.set_title(_run_name(fitted, episode))
                if column == 0:
                    ax.set_ylabel(f"{signal} [{fitted.unit}]")
            axes[-1, column].set_xlabel("time [s]")
        axes[0, 0].legend(loc="best", fontsize=8)

    height = 2.0 * len(fitted.signals) + 0.5
    return draw(paint, len(fitted.signals), len(episodes), size=(10.0, max(height, 2.6)), share="x")


def _run_name(evaluation: Evaluation, episode: int) -> str:
    return plain(evaluation.runs[episode].episode) if episode < len(evaluation.runs) else f"run {episode}"


def plain(name: str) -> str:
    """A name as matplotlib text: its dollar signs start no formula."""
    return name.replace("$", r"\$")


def _end_to_end(evaluation: Evaluation, episode: int, seconds: float) -> list[int]:
    """Indices of windows of a run that do not overlap, within `seconds` of the first."""
    chosen: list[int] = []
    following = -1
    length = int(evaluation.rows[-1])
    first = None
    for index in (evaluation.episodes == episode).nonzero().flatten().tolist():
        start = int(evaluation.starts[index])
        first = start if first is None else first
        if start >= following and (start - first) * evaluation.dt <= seconds:
            chosen.append(index)
            following = start + length
    return chosen


def _paint_windows(
    ax: Axes, fitted: Evaluation, initial: Evaluation, chosen: Sequence[int], signal: int, *, since_start: bool = False
) -> None:
    for number, index in enumerate(chosen):
        time = _window_time(fitted, index, since_start)
        label = lambda text, number=number: text if number == 0 else None
        ax.plot(time, _column(initial.predicted, index, signal), color=ORANGE, lw=1.2, ls="--", label=label("initial"))
        ax.plot(time, _column(fitted.measured, index, signal), color=BLACK, lw=2.2, alpha=0.55, label=label("measured"))
        ax.plot(time, _column(fitted.predicted, index, signal), color=BLUE, lw=1.3, label=label("fitted"))
    _frame_measured(ax, np.concatenate([_column(fitted.measured, index, signal) for index in chosen]))


def _window_time(evaluation: Evaluation, index: int, since_start: bool) -> np.ndarray:
    start = 0 if since_start else evaluation.starts[index]
    return (start + evaluation.rows).numpy() * evaluation.dt


def _column(values: Tensor, index: int, signal: int) -> np.ndarray:
    return values[index, :, signal].numpy()


def _frame_measured(ax: Axes, measured: np.ndarray, *, room: float = 0.6) -> None:
    """Limits from the measurement: a simulation that runs away must not flatten everything else."""
    low, high = float(measured.min()), float(measured.max())
    span = max(high - low, 1e-9)
    bottom, top = ax.get_ylim()
    ax.set_ylim(max(bottom, low - room * span), min(top, high + room * span))


def window_figure(fitted: Evaluation, initial: Evaluation) -> str:
    """Close-ups: the windows at the 10 %, 50 % and 90 % quantile of the fitted error, and the worst."""
    order = fitted.errors.nan_to_num(math.inf).argsort()
    places = [round(share * (len(order) - 1)) for share in (0.1, 0.5, 0.9, 1.0)]
    chosen = [int(order[place]) for place in places]
    titles = ("better than 90 %", "median", "worse than 90 %", "worst")

    def paint(axes: Any) -> None:
        for column, (index, title) in enumerate(zip(chosen, titles, strict=True)):
            for row, signal in enumerate(fitted.signals):
                ax = axes[row, column]
                _paint_windows(ax, fitted, initial, [index], row, since_start=True)
                if column == 0:
                    ax.set_ylabel(f"{signal} [{fitted.unit}]")
            axes[0, column].set_title(f"{title}\n{_run_name(fitted, int(fitted.episodes[index]))}", fontsize=8.5)
            axes[-1, column].set_xlabel("time in window [s]")
        axes[0, 0].legend(fontsize=8)

    return draw(paint, len(fitted.signals), len(chosen), size=(10.0, 2.0 * len(fitted.signals) + 0.7), share="x")


def residual_figure(fitted: Evaluation, initial: Evaluation) -> str:
    """Distribution of the residuals and how their size grows inside a window, before and after the fit."""

    def paint(axes: Any) -> None:
        left, right = axes[0]
        parts = {"initial": (initial, ORANGE), "fitted": (fitted, BLUE)}
        residuals = {name: _residual(part) for name, (part, _) in parts.items()}
        finite = {name: r[np.isfinite(r)] for name, r in residuals.items()}
        edge = max([1e-12, *(float(np.quantile(np.abs(r), 0.98)) for r in finite.values() if len(r))])
        bins = np.linspace(-edge, edge, 61)
        for name, (part, color) in parts.items():
            if len(finite[name]):
                left.hist(finite[name], bins, density=True, color=color, alpha=0.55, label=name)
            time = part.rows.numpy() * part.dt
            right.plot(
                time, _rms_per_row(residuals[name]), color=color, marker="o" if len(time) < 40 else "", ms=3, label=name
            )
        left.set_xlabel(f"model - measured [{fitted.unit}] (central 98 %)")
        left.set_ylabel(f"density [1/{fitted.unit}]")
        right.set_xlabel("time since the start of the window [s]")
        right.set_ylabel(f"rms residual [{fitted.unit}]")
        right.set_ylim(bottom=0)
        left.legend()
        right.legend()

    return draw(paint, 1, 2, size=(10.0, 3.0))


def _residual(evaluation: Evaluation) -> np.ndarray:
    return (evaluation.predicted - evaluation.measured).numpy()


def _rms_per_row(residual: np.ndarray) -> np.ndarray:
    """`[R]` over the windows that stay finite."""
    finite = np.isfinite(residual).all(axis=(1, 2))
    return np.sqrt((residual[finite] ** 2).mean(axis=(0, 2))) if finite.any() else np.full(residual.shape[1], np.nan)


def growth_figure(fitted: Evaluation, initial: Evaluation, *, max_growth: float = 10.0) -> str:
    """Error of each window against the factor by which the model amplifies an error of its start state."""

    def paint(axes: Any) -> None:
        ax = axes[0, 0]
        for part, color, name, marker in ((initial, ORANGE, "initial", "x"), (fitted, BLUE, "fitted", "o")):
            keep = np.isfinite(part.errors.numpy()) & np.isfinite(part.growth.numpy()) & (part.errors.numpy() > 0)
            x, y = part.growth.numpy()[keep], part.errors.numpy()[keep]
            ax.scatter(x, y, s=14, color=color, marker=marker, alpha=0.7, label=name, linewidths=1.0)
        ax.axvline(max_growth, color=RED, lw=1.2, ls=":", label="limit of the calm figures")
        log_axis(ax, "x")
        log_axis(ax, "y")
        ax.set_xlabel("growth of a start error over the window [1]")
        ax.set_ylabel(f"window error [{fitted.unit}]")
        legend_above(ax)

    return draw(paint, size=(8.0, 3.6))


def correlation_figure(names: Sequence[str], correlation: Tensor) -> str:
    """Correlation of the estimates; numbers written in while they are few."""
    size = 2.0 + (0.42 if len(names) <= 12 else 0.3) * len(names)

    def paint(axes: Any) -> None:
        ax = axes[0, 0]
        values, labels = correlation.numpy(), [plain(name) for name in names]
        image = ax.imshow(np.ma.masked_invalid(values), cmap="RdBu_r", vmin=-1, vmax=1)
        ax.set_xticks(range(len(names)), labels, rotation=45, ha="right")
        ax.set_yticks(range(len(names)), labels)
        ax.grid(False)
        for row, column in np.ndindex(values.shape) if len(names) <= 14 else ():
            if math.isfinite(values[row, column]):
                color = "white" if abs(values[row, column]) > 0.6 else BLACK
                text = f"{values[row, column]:.2f}".replace("0.", ".")
                ax.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
        ax.figure.colorbar(image, ax=ax, shrink=0.8, label="correlation [1]")

    return draw(paint, size=(size + 1.0, size))


def spectrum_figure(spectrum: Tensor, fixed_directions: Tensor) -> str:
    """Eigenvalues of the scaled information, largest first; those of directions the data do not fix in red."""

    def paint(axes: Any) -> None:
        ax = axes[0, 0]
        values = spectrum.numpy()
        number = np.arange(1, len(values) + 1)
        positive = values[values > 0]
        floor = float(positive.min()) / 10 if len(positive) else 1e-12
        shown = np.maximum(values, floor)
        fixed = fixed_directions.numpy()
        for choice, color, label in ((fixed, BLUE, "fixed by the data"), (~fixed, RED, "not fixed")):
            if choice.any():
                ax.vlines(number[choice], floor, shown[choice], color=color, lw=2)
                ax.plot(number[choice], shown[choice], "o", color=color, label=label)
        ax.set_yscale("log")
        ax.set_ylim(bottom=floor)
        ax.set_xticks(number)
        ax.set_xlabel("direction, strongest first")
        ax.set_ylabel("information [1]")
        ax.legend()

    return draw(paint, size=(5.5, 3.0))


def convergence_figure(history: Sequence[Mapping[str, float]]) -> str:
    """Loss and gradient norm of every step, by stage of the search."""
    stages = (("some windows", 0.0, GREY), ("scan of the delay", 1.0, ORANGE), ("all windows", 2.0, BLUE))

    def paint(axes: Any) -> None:
        left, right = axes[0]
        for ax, key, label in ((left, "loss", "loss [1]"), (right, "gradient", "gradient norm [1]")):
            for name, stage, color in stages:
                positive = [record for record in history if record["stage"] == stage and record[key] > 0]
                if positive:
                    steps, values = ([record[axis] for record in positive] for axis in ("step", key))
                    ax.plot(steps, values, color=color, marker="o", ms=3, lw=0 if stage == 1.0 else 1.5, label=name)
            if ax.lines:
                log_axis(ax, "y")
                ax.legend()
            ax.set_xlabel("step")
            ax.set_ylabel(label)
            ax.xaxis.get_major_locator().set_params(integer=True)

    return draw(paint, 1, 2, size=(10.0, 2.8))


def run_figure(fitted: Evaluation, initial: Evaluation) -> str:
    """RMSE of each run: first value held, initial parameters, fitted parameters."""

    def paint(axes: Any) -> None:
        ax = axes[0, 0]
        place = np.arange(len(fitted.runs), dtype=float)
        series = (
            ("first value held", [run.hold_first for run in fitted.runs], GREY),
            ("initial", [run.rmse for run in initial.runs], ORANGE),
            ("fitted", [run.rmse for run in fitted.runs], BLUE),
        )
        for number, (label, values, color) in enumerate(series):
            finite = [value if math.isfinite(value) else np.nan for value in values]
            bars = ax.barh(place + 0.27 * (number - 1), finite, 0.25, color=color, label=label)
            ax.bar_label(bars, [f"{value:.3g}" for value in values], fontsize=7.5, padding=2)
        ax.set_yticks(place, [plain(run.episode) for run in fitted.runs])
        ax.invert_yaxis()
        ax.margins(x=0.1)
        ax.set_xlabel(f"RMSE [{fitted.unit}]")
        legend_above(ax)

    return draw(paint, size=(8.0, 1.2 + 0.55 * len(fitted.runs)))


def fit_figures(result: FitResult) -> dict[str, str]:
    """All figures of a fit by name; errors and overlays are of runs that the fit did not see, where there are some."""
    shown = result.left_out or result.training
    return {
        "overlay": overlay_figure(shown.fitted, shown.initial),
        "windows": window_figure(shown.fitted, shown.initial),
        "residuals": residual_figure(shown.fitted, shown.initial),
        "growth": growth_figure(shown.fitted, shown.initial),
        "runs": run_figure(shown.fitted, shown.initial),
        "correlation": correlation_figure([row.name for row in result.rows], result.correlation),
        "spectrum": spectrum_figure(result.spectrum, result.fixed),
        "convergence": convergence_figure(result.history),
    }
