"""Result tables of the command, for a terminal (rich)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rich.table import Table

from sim2real.evaluation import Evaluation
from sim2real.fit import FitResult
from sim2real.identifiability import describe
from sim2real.report import interval_text, number, row_flags
from sim2real.tuning import TuneResult


def fit_tables(result: FitResult) -> list[Table]:
    """Parameters, directions the data do not fix, and errors."""
    parameters = _table("parameters", ["parameter", "value", "90 % interval", "unit", "start", "prior", "what to know"])
    for row in result.rows:
        prior = "" if row.prior is None else f"{number(row.prior[0])} ± {number(row.prior[1], 3)}"
        interval = interval_text(row.low, row.high)
        flags = ", ".join(row_flags(row)) or "ok"
        parameters.add_row(row.name, number(row.value, 5), interval, row.unit, number(row.initial), prior, flags)
    tables = [parameters]
    if result.directions:
        open_directions = _table("", ["not fixed by the data (in units of each parameter's range)"])
        for direction in result.directions:
            open_directions.add_row(describe(direction))
        tables.append(open_directions)
    errors = _table("errors", ["", "RMSE", "median", "calm RMSE", "first value held", "windows"])
    for where, part in (("left out", result.left_out), ("training", result.training)):
        if part is not None:
            errors.add_row(f"fitted, {where}", *_figures(part.fitted))
            errors.add_row(f"start, {where}", *_figures(part.initial))
    return [*tables, errors]


def evaluation_tables(scored: Evaluation) -> list[Table]:
    """Errors over all windows, then run by run."""
    total = _table("errors", ["", "RMSE", "median", "calm RMSE", "first value held", "windows"])
    total.add_row("all runs", *_figures(scored))
    for name, value in scored.baselines.items():
        if name != "hold-first-value":
            total.add_row(name.replace("-", " "), f"{number(value)} {scored.unit}")
    runs = _table("run by run", ["run", "RMSE", "median", "first value held", "windows", "sensor zeros"])
    for run in scored.runs:
        values = (f"{number(value)} {scored.unit}" for value in (run.rmse, run.median, run.hold_first))
        runs.add_row(run.episode, *values, str(run.windows), ", ".join(number(zero) for zero in run.zero))
    return [total, runs]


def tune_tables(result: TuneResult) -> list[Table]:
    """Parameters before and after, and the iterations."""
    head = ["iteration", "real return", "± (90 %)", "step", "gradient", "radius", "transitions", "certified"]
    margins = [name for name in (result.history[0] if result.history else {}) if name.startswith("margin.")]
    iterations = _table("iterations", [*head, *(name.replace(".", " ") for name in margins), "kept"])
    for record in result.history:
        measured = "measured_return" in record
        mean, error = ("measured_return", "measured_stderr") if measured else ("real_return", "real_return_stderr")
        iterations.add_row(
            number(record.get("iteration"), 3),
            number(record.get(mean)),
            number(1.645 * record.get(error, float("nan")), 2),
            *(number(record.get(name), 3) for name in ("step_norm", "gradient_norm", "radius")),
            number(record.get("transitions"), 6),
            {1.0: "yes", 0.0: "refused"}.get(record.get("certified", float("nan")), "–"),
            *(number(record.get(name), 3) for name in margins),
            "yes" if record.get("accepted") else "undone",
        )
    values = _table("parameters", ["parameter", "start", "tuned"])
    first = result.history[0] if result.history else {}
    for name, tuned in result.theta.items():
        if tuned.ndim == 0:
            start = first.get(f"theta.{name}", float(tuned))  # held parameters are not in the history
            values.add_row(name, number(start, 5), number(float(tuned), 5))
    return [iterations, values]


def _table(title: str, head: Sequence[str]) -> Table:
    table = Table(title=title or None, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for index, text in enumerate(head):
        right = text in ("value", "start", "tuned", "RMSE", "median", "calm RMSE", "first value held", "windows")
        whole = index == 0 or text in ("value", "90 % interval", "start")  # a narrow terminal folds the others
        justify: Literal["left", "right"] = "right" if right and index else "left"
        table.add_column(text, justify=justify, no_wrap=whole, overflow="fold")
    return table


def _figures(scored: Evaluation) -> list[str]:
    values = (scored.rmse, scored.median, scored.calm_rmse, scored.hold_first)
    return [*(f"{number(value)} {scored.unit}" for value in values), str(scored.windows)]
