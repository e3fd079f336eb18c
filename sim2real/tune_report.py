"""The HTML report of a tuning run: what was gained, what it is worth, and how far it can be trusted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sim2real.calibration import Calibration
from sim2real.calibration_figures import calibration_figures, curve_figure
from sim2real.parameter_file import ParameterSet
from sim2real.report import inline, number, render
from sim2real.tune_figures import Gaussian, log_likelihood, measured, tune_figures
from sim2real.tune_finish import TradeOff
from sim2real.tuning import TuneResult


def tune_report(result: TuneResult, parameters: ParameterSet, likelihood: Gaussian | None = None) -> str:
    """HTML of a tuning run; `likelihood`: mean and precision of the fit it started from."""
    history = result.history
    units = {name: row.get("unit", "") for name, row in parameters.parameters.items()}
    figures = tune_figures(result, units, likelihood) if history else {}
    if result.calibration is not None:
        figures |= calibration_figures(result.calibration)
    if result.trade_off:
        figures["curve"] = curve_figure(result.trade_off)
    margins = [key for key in (history[0] if history else {}) if key.startswith("margin.")]
    solve = f"{result.report.status or 'no status'}; gradient norm {number(result.report.residual)}."
    return render(
        "tune.html",
        parameters,
        model=parameters.model["_target_"].rpartition(".")[2],
        status=_tune_status(result),
        headline=_tune_headline(result, likelihood) if history else [],
        parameter_head=["parameter", "start", "tuned", "change", "unit"],
        rows=[cells for name, row in parameters.parameters.items() for cells in _tuned_rows(name, row)],
        policy_text=_policy_text(result),
        policy=_policy_blocks(result, parameters.report.get("names", {})),
        solve=solve,
        freedom=_freedom_text(result),
        calibration_head=["ahead", "", *_calibration_columns(result)],
        calibration=_calibration_rows(result),
        calibration_text=_calibration_text(result),
        curve_head=["weight [return/nat]", "real return", "± 90 %", "log-likelihood [nat]"],
        curve=[_curve_cells(entry) for entry in result.trade_off],
        certificate_text=_certificate_text(history),
        iteration_head=[
            *("iteration", "real return", "± 90 %", "step", "radius", "gradient", "transitions", "ESS"),
            *("certified", "error bound"),
            *(f"margin of {key.removeprefix('margin.')}" for key in margins),
            "kept",
        ],
        iterations=[_iteration_cells(record, margins) for record in history],
        figures={name: inline(svg) for name, svg in figures.items()},
    )


def _tune_status(result: TuneResult) -> str:
    if result.waiting:
        return f"Waiting for real rollouts of the policy exported after {len(result.history)} iterations."
    undone = sum(not record["accepted"] for record in result.history)
    state = "Converged" if result.report.converged else "Ended"
    return f"{state} after {len(result.history)} iterations, {undone} of them undone."


def _tune_headline(result: TuneResult, likelihood: Gaussian | None) -> list[dict[str, str]]:
    kept = [record for record in result.history if record["accepted"]]
    (start, start_error), (end, end_error) = measured(kept[0]), measured(kept[-1])
    cards = [
        {"value": _with_error(start, start_error), "label": "real return, start parameters (± 90 %)"},
        {"value": _with_error(end, end_error), "label": "real return, tuned (± 90 %)"},
        {"value": number(end - start, 3), "label": "gain"},
        {"value": number(kept[-1].get("transitions"), 6), "label": "real transitions used"},
    ]
    if likelihood is not None:
        free = result.freedom
        cost = -log_likelihood(kept[-1], likelihood) if free is None else -free.log_likelihood[1]
        cards.append({"value": f"{number(cost, 3)} nat", "label": "likelihood given up"})
    return cards


def _with_error(value: float, stderr: float) -> str:
    return number(value) if not math.isfinite(stderr) else f"{number(value)} ± {number(1.645 * stderr, 2)}"


def _tuned_rows(name: str, row: Mapping[str, Any]) -> list[list[str]]:
    """One table row per number: name, start, tuned, change, unit; a matrix gives a row per entry."""
    start, value = row["initial"], row["value"]
    if isinstance(value, list):
        parts = [(f"{name}[{k}]", a, b) for k, (a, b) in enumerate(zip(start, value, strict=True))]
        return [cells for part, a, b in parts for cells in _tuned_rows(part, {**row, "initial": a, "value": b})]
    change = "–" if start == 0 else f"{100 * (value - start) / abs(start):+.1f} %"
    return [[name, number(start, 5), number(value, 5), change if row["tuned"] else "held", row["unit"]]]


def _iteration_cells(record: Mapping[str, float], margins: Sequence[str]) -> list[str]:
    value, stderr = measured(record)
    rest = [record.get(name) for name in ("step_norm", "radius", "gradient_norm")]
    verdict = {1.0: "yes", 0.0: "refused"}.get(record.get("certified", math.nan), "–")
    bound = record.get("relative_bound")
    return [
        str(int(record["iteration"])),
        number(value, 5),
        number(1.645 * stderr, 2),
        *(number(item, 3) for item in rest),
        number(record.get("transitions"), 6),
        number(record.get("effective_sample_size"), 4),
        verdict,
        "–" if bound is None else _percent(bound),
        *(number(record.get(key), 3) for key in margins),
        "yes" if record["accepted"] else "undone",
    ]


def _curve_cells(entry: TradeOff) -> list[str]:
    weight = {0.0: "0 (tuned)", math.inf: "∞ (start)"}.get(entry.weight, number(entry.weight, 3))
    return [
        weight,
        number(entry.real_return, 5),
        number(1.645 * entry.real_return_stderr, 2),
        number(entry.log_likelihood),
    ]


def _certificate_text(history: Sequence[Mapping[str, float]]) -> str:
    """How much of the search rests on certified gradients."""
    judged = [record for record in history if "certified" in record]
    if not judged:
        return "No gradient of this run was certified: tune.certify was false, or the notes say why."
    failed = sum(record["certified"] == 0 for record in judged)
    refused = f" {failed} failed, and those steps were refused." if failed else ""
    bounds = [record["relative_bound"] for record in judged if record["certified"] and "relative_bound" in record]
    worst = f" The error of a certified gradient is at most {_percent(max(bounds))} of it." if bounds else ""
    return f"The gradients of {len(judged)} of {len(history)} candidates were judged.{refused}{worst}"


def _percent(share: float) -> str:
    return "< 0.01 %" if share < 1e-4 else f"{number(100 * share, 2)} %"


def _freedom_text(result: TuneResult) -> str:
    """What was done with the directions of theta that leave the policy as it is."""
    free = result.freedom
    if free is None:
        return ""
    (before, after), (first, last) = free.log_likelihood, free.real_return
    if not free.dimension:
        return "Every direction of the tuned parameters changes the policy: the real return leaves no freedom."
    some = (
        "1 direction of the tuned parameters leaves"
        if free.dimension == 1
        else (f"{free.dimension} directions of the tuned parameters leave")
    )
    return (
        f"The best policy does not belong to one theta alone: {some} it as it is. Theta was moved there to the "
        f"likeliest such model: log-likelihood {number(before)} → {number(after)} nat, real return {number(first, 6)} "
        f"→ {number(last, 6)}, relative change of the policy {number(free.policy_change, 2)}."
    )


def _calibration_columns(result: TuneResult) -> list[str]:
    if result.calibration is None:
        return []
    part = result.calibration[0]
    unit = f" [{part.unit}]" if part.unit else ""
    return [*(f"RMSE of {name}{unit}" for name in part.signals), "NLL [nat]", "in the 50 % interval", "90 %", "99 %"]


def _calibration_rows(result: TuneResult) -> list[list[str]]:
    if result.calibration is None:
        return []
    pair = (("start", result.calibration[0]), ("tuned", result.calibration[1]))
    return [
        [f"{number(seconds, 3)} s", name, *_calibration_cells(part, h)]
        for h, seconds in enumerate(result.calibration[0].seconds)
        for name, part in pair
    ]


def _calibration_cells(part: Calibration, h: int) -> list[str]:
    shares = []
    for level in (0.5, 0.9, 0.99):
        near = (part.levels - level).abs()
        found = float(part.coverage[h, int(near.argmin())]) if float(near.min()) < 1e-9 else math.nan
        shares.append("–" if math.isnan(found) else f"{number(100 * found, 3)} %")
    return [*(number(value, 3) for value in part.rmse[h].tolist()), number(float(part.nll[h])), *shares]


def _calibration_text(result: TuneResult) -> str:
    if result.calibration is None:
        return ""
    before, after = result.calibration
    lost = f"; in {after.lost} of them the tuned model diverges" if after.lost else ""
    return (
        f"{before.windows} windows of the log{lost}. Mean distance of observed from expected coverage: "
        f"{number(100 * before.miscalibration, 2)} % at the start, {number(100 * after.miscalibration, 2)} % tuned."
    )


def _policy_text(result: TuneResult) -> str:
    count = sum(value.numel() for value in result.nu.values())
    shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in result.nu.items())
    return f"{count} parameters: {shapes}. The exported form lies in policy/."


def _policy_blocks(result: TuneResult, names: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """Small policies as tables: one per parameter of at most 8 x 8; a gain has the names of states and actions."""
    blocks = []
    for name, value in result.nu.items():
        matrix = value.reshape(1, -1) if value.ndim < 2 else value
        if matrix.ndim == 2 and max(matrix.shape) <= 8:
            actions, states = names.get("action", ()), names.get("state", ())
            named = name == "gain" and matrix.shape == (len(actions), len(states))
            left = actions if named else [f"row {k}" for k in range(matrix.shape[0])]
            top = states if named else [f"column {k}" for k in range(matrix.shape[1])]
            rows = [[k, *(number(item, 5) for item in row)] for k, row in zip(left, matrix.tolist(), strict=True)]
            blocks.append({"head": [name, *top], "rows": rows})
    return blocks
