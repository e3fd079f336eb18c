"""The self-contained HTML report: one file, figures inline, nothing loaded from anywhere, every text escaped."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from sim2real.evaluation import Evaluation
from sim2real.figures import fit_figures
from sim2real.fit import Comparison, FitResult
from sim2real.fit_facts import ParameterRow
from sim2real.identifiability import describe
from sim2real.parameter_file import ParameterSet


def fit_report(result: FitResult, parameters: ParameterSet, model: str) -> str:
    """HTML of a fit; `parameters` is what `params.json` holds, `model` the simulator's name."""
    shown = result.left_out or result.training
    return render(
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
        figures={name: inline(svg) for name, svg in fit_figures(result).items()},
    )


def number(value: float | None, digits: int = 4) -> str:
    """A number for people: `digits` significant ones, a dash for what is not known."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value + 0.0:.{digits}g}"  # no -0


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


def render(template: str, parameters: ParameterSet, **content: Any) -> str:
    """HTML of a template with the notes and the provenance of `parameters`; everything else is escaped."""
    environment = Environment(loader=PackageLoader("sim2real"), autoescape=True, undefined=StrictUndefined)
    provenance = _provenance(parameters)
    return environment.get_template(template).render(notes=parameters.notes, provenance=provenance, **content)


def inline(svg: str) -> str:
    """SVG text as an address that an image loads without leaving the file."""
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
