"""The self-contained HTML report: one file, figures inline, nothing loaded from anywhere, every text escaped."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from sim2real.evaluation import Evaluation
from sim2real.figures import fit_figures
from sim2real.fit import Comparison, FitResult
from sim2real.fit_facts import ParameterRow
from sim2real.identifiability import describe
from sim2real.parameter_file import ParameterSet
from sim2real.tune_figures import Gaussian, log_likelihood, measured, tune_figures
from sim2real.tuning import TuneResult


def fit_report(result: FitResult, parameters: ParameterSet, model: str) -> str:
    """HTML of a fit; `parameters` is what `params.json` holds, `model` the simulator's name."""
    shown = result.left_out or result.training
    return _render(
        "fit.html",
        parameters,
        model=model,
        status=_fit_status(result),
        headline=_headline(shown, left_out=result.left_out is not None),
        rows=[_parameter_cells(row) for row in result.rows],
        left_out=result.left_out is not None,
        score_head=["", "RMSE", "median", "windows"],
        scores=_scores(result),
        calm_head=["", "RMSE", "calm RMSE", "median", "calm median", "calm windows"],
        calm=[_calm(name, part) for name, part in (("initial", shown.initial), ("fitted", shown.fitted))],
        directions=[describe(direction) for direction in result.directions],
        solve=f"{result.report.status or 'no status'}; {result.report.steps} steps, "
        f"gradient norm {number(result.report.residual)}.",
        figures={name: _inline(svg) for name, svg in fit_figures(result).items()},
    )


def tune_report(result: TuneResult, parameters: ParameterSet, likelihood: Gaussian | None = None) -> str:
    """HTML of a tuning run; `likelihood`: mean and precision of the fit it started from."""
    history = result.history
    units = {name: row.get("unit", "") for name, row in parameters.parameters.items()}
    figures = tune_figures(result, units, likelihood) if history else {}
    solve = f"{result.report.status or 'no status'}; gradient norm {number(result.report.residual)}."
    return _render(
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
        iteration_head=[
            "iteration",
            "real return",
            "± 90 %",
            "step",
            "radius",
            "gradient",
            "transitions",
            "ESS",
            "kept",
        ],
        iterations=[_iteration_cells(record) for record in history],
        figures={name: _inline(svg) for name, svg in figures.items()},
    )


def number(value: float | None, digits: int = 4) -> str:
    """A number for people: `digits` significant ones, a dash for what is not known."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:.{digits}g}"


def row_flags(row: ParameterRow) -> list[str]:
    """What to know about a fitted parameter, in a few words; empty when nothing is wrong."""
    flags = [] if row.reaches_output else ["does not reach the output"]
    flags += ["not identified"] if row.reaches_output and not row.identified else []
    return flags + (["at a bound"] if row.at_bound else [])


def interval_text(low: float, high: float) -> str:
    """The interval for people, or that there is none."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return "none"
    return f"{number(low)} … {number(high)}"


def _render(template: str, parameters: ParameterSet, **content: Any) -> str:
    environment = Environment(loader=PackageLoader("sim2real"), autoescape=True, undefined=StrictUndefined)
    provenance = _provenance(parameters)
    return environment.get_template(template).render(notes=parameters.notes, provenance=provenance, **content)


def _inline(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _provenance(parameters: ParameterSet) -> list[tuple[str, str]]:
    kept = parameters.provenance
    versions = ", ".join(f"{name} {version}" for name, version in kept.get("versions", {}).items())
    log = kept.get("log", {})
    rows = [
        ("command", kept.get("command", "")),
        ("model", parameters.model.get("_target_", "")),
        ("log", log.get("path", "")),
        ("SHA-256 of the log", log.get("sha256", "")),
        ("versions", versions),
        ("seed", str(kept.get("seed", ""))),
    ]
    return [(name, value) for name, value in rows if value]


def _fit_status(result: FitResult) -> str:
    flagged = sum(bool(row_flags(row)) for row in result.rows)
    state = "Converged" if result.report.converged else "NOT converged"
    rest = f"{flagged} of {len(result.rows)} flagged" if flagged else "nothing flagged"
    return f"{state} after {result.report.steps} steps; {len(result.rows)} parameters fitted, {rest}."


def _headline(shown: Comparison, *, left_out: bool) -> list[dict[str, str]]:
    fitted, initial = shown.fitted, shown.initial
    seconds = float(fitted.rows[-1] - fitted.rows[0] + 1) * fitted.dt  # without the warm-up
    where = "left-out runs" if left_out else "training runs"
    return [
        {"value": f"{number(fitted.rmse, 3)} {fitted.unit}", "label": f"RMSE, fitted, {where}"},
        {"value": f"{number(initial.rmse, 3)} {fitted.unit}", "label": "RMSE, start parameters"},
        {"value": f"{number(fitted.hold_first, 3)} {fitted.unit}", "label": "RMSE, first value held"},
        {"value": f"{number(fitted.median, 3)} {fitted.unit}", "label": "median window error, fitted"},
        {"value": str(fitted.windows), "label": f"windows of {number(seconds, 3)} s"},
    ]


def _parameter_cells(row: ParameterRow) -> dict[str, Any]:
    return {
        "name": row.name,
        "value": number(row.value, 5),
        "interval": interval_text(row.low, row.high),
        "unit": row.unit,
        "initial": number(row.initial),
        "prior": "–" if row.prior is None else f"{number(row.prior[0])} ± {number(row.prior[1], 3)}",
        "flags": row_flags(row),
    }


def _scores(result: FitResult) -> list[list[str]]:
    rows = []
    parts: Sequence[tuple[str, Comparison | None]] = (("left out", result.left_out), ("training", result.training))
    for where, part in parts:
        if part is None:
            continue
        for name, scored in ((f"fitted, {where}", part.fitted), (f"initial, {where}", part.initial)):
            rows.append([name, _with_unit(scored.rmse, scored), _with_unit(scored.median, scored), str(scored.windows)])
        for name, value in part.fitted.baselines.items():
            rows.append([f"{name.replace('-', ' ')}, {where}", _with_unit(value, part.fitted), "", ""])
    return rows


def _calm(name: str, scored: Evaluation) -> list[str]:
    values = (scored.rmse, scored.calm_rmse, scored.median, scored.calm_median)
    return [name, *(_with_unit(value, scored) for value in values), f"{scored.calm_windows} of {scored.windows}"]


def _with_unit(value: float, scored: Evaluation) -> str:
    return f"{number(value)} {scored.unit}"


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
        cost = -log_likelihood(kept[-1], likelihood)
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


def _iteration_cells(record: Mapping[str, float]) -> list[str]:
    value, stderr = measured(record)
    rest = [record.get(name) for name in ("step_norm", "radius", "gradient_norm")]
    return [
        str(int(record["iteration"])),
        number(value, 5),
        number(1.645 * stderr, 2),
        *(number(item, 3) for item in rest),
        number(record.get("transitions"), 6),
        number(record.get("effective_sample_size"), 4),
        "yes" if record["accepted"] else "undone",
    ]


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
