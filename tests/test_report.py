"""The report: one file that loads nothing, escapes everything and is the same for the same result."""

import base64
import dataclasses
import io
import math
import re
import warnings
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console

from sim2real.calibration import Calibration
from sim2real.evaluation import Evaluation, RunScore
from sim2real.figures import spectrum_figure
from sim2real.fit import Comparison, FitResult
from sim2real.fit_facts import ParameterRow
from sim2real.null_space import Freedom
from sim2real.parameter_file import ParameterSet
from sim2real.report import fit_report, interval_text, number, row_flags
from sim2real.solve_report import SolveReport
from sim2real.tables import evaluation_tables, fit_tables, tune_tables
from sim2real.tune_figures import log_likelihood, measured
from sim2real.tune_finish import TradeOff
from sim2real.tune_report import tune_report
from sim2real.tuning import TuneResult

HOSTILE = "<script>alert('log')</script> & \"friends\""


def evaluation(scale: float, *, signals: int = 1, runs: int = 2) -> Evaluation:
    """Windows of a sine with noise that grows inside the window; growth factors from 1 to 30."""
    generator = torch.Generator().manual_seed(int(1000 * scale))
    count, rows = 20 * runs, torch.arange(4, 101, 4)
    starts, episodes = (20 * torch.arange(20) + 10).repeat(runs), torch.arange(runs).repeat_interleave(20)
    time = 0.005 * (starts.unsqueeze(1) + rows).double()
    measured = torch.sin(2 * time + episodes.unsqueeze(1)).unsqueeze(-1).repeat(1, 1, signals)
    growth = 1 + 29 * torch.rand(count, generator=generator).double()
    noise = scale * torch.randn(count, 1, signals, generator=generator).double() * (rows / 100).unsqueeze(-1)
    errors = noise.square().expand_as(measured).mean((1, 2)).sqrt()
    names = (HOSTILE, "run_1", "run_2", "run_3")[:runs]
    return Evaluation(
        rmse=scale, median=scale, windows=count, calm_rmse=scale, calm_median=scale, calm_windows=7, hold_first=0.5,
        baselines={"hold-first-value": 0.5}, runs=tuple(RunScore(name, scale, scale, 20, 0.5, ()) for name in names),
        signals=("angle", "other")[:signals], unit="rad", dt=0.005, errors=errors, growth=growth, episodes=episodes,
        starts=starts, rows=rows, predicted=measured + noise, measured=measured,
    )  # fmt: skip


def result(*, signals: int = 1, runs: int = 2, left_out: bool = True) -> FitResult:
    row = ParameterRow("mgl", 2.5, "N m", 2.4, 2.6, (2.0, 1.0), False, True, True, 3.0)
    rows = (
        row,
        dataclasses.replace(row, name="inertia", low=math.nan, high=math.nan, identified=False, prior=None),
        dataclasses.replace(row, name="coulomb", value=0.0, at_bound=True),
        dataclasses.replace(row, name="offset", reaches_output=False, identified=False),
    )
    square = torch.eye(4).double() - 0.3 * (1 - torch.eye(4).double())
    square[3, 0] = math.nan
    pair = Comparison(evaluation(0.03, signals=signals, runs=runs), evaluation(0.3, signals=signals, runs=runs))
    history = tuple({"step": float(k), "loss": 0.1**k + 0.01, "gradient": 0.1**k, "stage": 2.0} for k in range(4))
    return FitResult(
        theta={"mgl": torch.tensor(2.5)}, nuisance={}, rows=rows, correlation=square, covariance=square,
        spectrum=torch.tensor([1e4, 1e2, 1e-3, 0.0]).double(),
        fixed=torch.tensor([True, False, True, False]), directions=({"inertia": 0.8, "mgl": -0.6},),
        report=SolveReport(True, 1e-9, 3, "converged"), history=history, training=pair,
        left_out=pair if left_out else None, notes=(HOSTILE,),
    )  # fmt: skip


def parameters(kind: str = "fit") -> ParameterSet:
    rows = {
        "mgl": {"value": 2.5, "initial": 2.0, "unit": "N m", "tuned": True},
        "damping": {"value": 0.1, "initial": 0.0, "unit": "N m s/rad", "tuned": False},
        "A": {"value": [[1.0, 0.0]], "initial": [[0.9, 0.0]], "unit": "1", "tuned": True},
    }
    origin = {"command": f"sim2real {kind} {HOSTILE}", "log": {"path": "a.csv", "sha256": "0" * 64}, "versions": {}}
    report = {"names": {"state": ["angle", "velocity"], "action": ["torque"]}}
    return ParameterSet(kind, {"_target_": "sim2real.simulators.pendulum"}, rows, {}, report, (HOSTILE,), origin)


def tuned(steps: int = 6, *, waiting: bool = False) -> TuneResult:
    history = tuple(
        {
            "iteration": float(k),
            "accepted": float(k != 3),
            "real_return": -10.0 + k - (60.0 if k == 3 else 0.0),
            "real_return_stderr": 0.5,
            "measured_return": math.nan if k == 0 else -10.0 + k - (60.0 if k == 3 else 0.0),
            "measured_stderr": 0.4,
            "radius": 0.5,
            "step_norm": 0.3,
            "gradient_norm": 0.5**k,
            "effective_sample_size": 100.0,
            "transitions": 1000.0 * (k + 1),
            "theta.mgl": 2.0 + 0.1 * k,
            "theta.damping": 0.0,
        }
        for k in range(steps)
    )
    nu = {"gain": torch.tensor([[8.0, 1.5]]), "0.weight": torch.zeros(16, 2)}
    report = SolveReport(False, 1e-3, steps, "stopped")
    return TuneResult({"mgl": torch.tensor(2.5)}, nu, history, report, ("step 3 undone",), waiting, {})


def figures(html: str) -> list[str]:
    return [base64.b64decode(part).decode() for part in re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', html)]


def check_self_contained(html: str, count: int) -> None:
    """Well-formed figures inside, no address of anything outside, nothing of the log taken as markup."""
    assert len(figures(html)) == count
    for svg in figures(html):
        ElementTree.fromstring(svg)
        assert svg.startswith("<svg")  # no document type: it would be the address of one
        assert not re.search(r'(?:href|src)="(?!#|data:)', svg)
    assert not re.search(r"<(?:script|link|iframe|object)\b", html)
    assert not re.search(r'(?:src|href)="(?!data:)', html)
    assert "url(" not in html
    assert HOSTILE not in html
    assert "&lt;script&gt;" in html


@pytest.mark.parametrize(("signals", "runs", "left_out"), [(1, 2, True), (2, 4, False)])
def test_the_fit_report_is_self_contained(signals: int, runs: int, left_out: bool) -> None:
    html = fit_report(result(signals=signals, runs=runs, left_out=left_out), parameters(), "pendulum")
    check_self_contained(html, 8)
    for text in ("not identified", "at a bound", "does not reach the output", "0.80 inertia - 0.60 mgl", "hold first"):
        assert text in html
    assert ("No run was left out" in html) == (not left_out)


def test_windows_that_diverge_do_not_break_the_report() -> None:
    bad = evaluation(0.3)
    predicted, errors = bad.predicted.clone(), bad.errors.clone()
    predicted[3:] = math.inf
    errors[3:] = math.inf
    bad = dataclasses.replace(bad, predicted=predicted, errors=errors, rmse=math.inf, calm_rmse=math.nan)
    whole = result(left_out=False)
    html = fit_report(dataclasses.replace(whole, training=Comparison(whole.training.fitted, bad)), parameters(), "m")
    check_self_contained(html, 8)
    assert "∞ rad" in html


def test_equal_results_give_equal_bytes() -> None:
    assert fit_report(result(), parameters(), "m") == fit_report(result(), parameters(), "m")
    assert tune_report(tuned(), parameters("tune")) == tune_report(tuned(), parameters("tune"))


def test_the_tuning_report_is_self_contained() -> None:
    likelihood = ({"mgl": torch.tensor(2.0).double()}, torch.tensor([[200.0]]).double())
    html = tune_report(tuned(), parameters("tune"), likelihood)
    check_self_contained(html, 4)
    # 25 % up in mgl; five steps of 0.1 with precision 200 cost 200 * 0.5^2 / 2 = 25 nat
    for text in ("+25.0 %", "A[0][0]", "held", "undone", "velocity", "25 nat"):
        assert text in html
    check_self_contained(tune_report(tuned(), parameters("tune")), 3)


def trusted() -> TuneResult:
    """A run with certificates, a constraint, freedom, calibration and a trade-off curve; one certificate failed."""
    whole = tuned()
    judged = {"certified": 1.0, "error_bound": 0.02, "relative_bound": 0.013, f"margin.{HOSTILE}": 0.25}
    history = tuple(
        {**row, **judged, **({"certified": 0.0, "relative_bound": math.inf} if k == 3 else {})}
        for k, row in enumerate(whole.history)
    )
    free = Freedom(whole.theta, whole.nu, 3, (-12.0, -4.5), (-5.0, -5.0), 1e-9, 4, "converged")
    levels = torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64)

    def figures_of(rmse: float, coverage: list[float]) -> Calibration:
        shares = torch.full((2, 10), 0.1, dtype=torch.float64)
        observed = torch.tensor([coverage, coverage], dtype=torch.float64)
        errors = torch.tensor([[rmse, 2 * rmse], [2 * rmse, math.inf]], dtype=torch.float64)
        nll = torch.tensor([rmse, math.inf], dtype=torch.float64)
        spread = torch.full((2, 3), 0.02, dtype=torch.float64)
        gap = float((observed - levels).abs().mean())
        return Calibration(
            (HOSTILE, "b$_{"), "rad", (0.01, 0.5), errors, nll, levels, observed, spread, shares, gap, 321, 2
        )

    curve = tuple(
        TradeOff(w, whole.theta, whole.nu, -5.0 - k, 0.3, -4.0 + k) for k, w in enumerate((0.0, 0.7, math.inf))
    )
    pair = (figures_of(0.02, [0.5, 0.9, 0.99]), figures_of(0.05, [0.3, 0.7, 0.9]))
    return dataclasses.replace(whole, history=history, freedom=free, calibration=pair, trade_off=curve)


def test_the_tuning_report_says_what_to_trust_and_what_it_cost() -> None:
    likelihood = ({"mgl": torch.tensor(2.0).double()}, torch.tensor([[200.0]]).double())
    html = tune_report(trusted(), parameters("tune"), likelihood)
    check_self_contained(html, 7)
    for text in (
        "6 of 6 candidates were judged. 1 failed, and those steps were refused.",
        "The error of a certified gradient is at most 1.3 % of it.",
        "3 directions of the tuned parameters leave it as it is",
        "log-likelihood -12 → -4.5 nat",
        "0 % at the start, 16 % tuned",
        "in 2 of them the tuned model diverges",
        "RMSE of",
        "70 %",
        "∞ (start)",
        "0 (tuned)",
        "margin of",
        "refused",
    ):
        assert text in html, text
    assert html == tune_report(trusted(), parameters("tune"), likelihood)
    plain = tune_report(tuned(), parameters("tune"), likelihood)
    assert "No gradient of this run was certified" in plain
    assert "Predictive calibration" not in plain


def test_a_run_without_iterations_waits() -> None:
    html = tune_report(tuned(0, waiting=True), parameters("tune"))
    assert "Waiting for real rollouts" in html
    check_self_contained(html, 0)


def test_returns_are_the_measured_ones_where_there_are_some() -> None:
    history = tuned().history
    assert measured(history[0]) == (-10.0, 0.5)
    assert measured(history[1]) == (-9.0, 0.4)
    likelihood = ({"mgl": torch.tensor(2.0).double()}, torch.tensor([[2.0]]).double())
    assert log_likelihood(history[2], likelihood) == pytest.approx(-0.04, rel=1e-12)


def test_the_spectrum_paints_the_directions_that_are_open_not_the_last_ones() -> None:
    spectrum = torch.tensor([1e4, 1e2, 1e-3]).double()
    drawings = [spectrum_figure(spectrum, torch.tensor(fixed)) for fixed in ([True, False, True], [True, True, False])]
    assert drawings[0] != drawings[1]
    # red bars: one of each drawing, at its own place
    red = [re.findall(r'd="M ([0-9.]+)[^"]*"[^>]*stroke: #d55e00', svg) for svg in drawings]
    assert red[0]
    assert red[0] != red[1]


def test_held_parameters_have_a_start_in_the_table() -> None:
    whole = tuned()
    held = dataclasses.replace(whole, theta={**whole.theta, "length": torch.tensor(0.75)})
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(tune_tables(held)[1])
    line = next(line for line in console.export_text().splitlines() if line.startswith("length"))
    assert line.split() == ["length", "0.75", "0.75"]


def test_tables_for_a_terminal() -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    for table in (*fit_tables(result()), *evaluation_tables(evaluation(0.03)), *tune_tables(tuned())):
        console.print(table)
    text = console.export_text()
    for part in ("not identified", "0.80 inertia - 0.60 mgl", "fitted, left out", "run_1", "undone", "2 ", "2.5"):
        assert part in text


def test_a_season_is_one_more_line() -> None:
    scored = dataclasses.replace(evaluation(0.03), baselines={"hold-first-value": 0.5, "season-before": 0.25})
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(evaluation_tables(scored)[0])
    assert "season before" in console.export_text()


def test_dollar_signs_in_the_name_of_a_run_are_no_formula() -> None:
    scored = evaluation(0.03)
    runs = (dataclasses.replace(scored.runs[0], episode="a$_{b$"), *scored.runs[1:])
    pair = Comparison(dataclasses.replace(scored, runs=runs), evaluation(0.3))
    html = fit_report(dataclasses.replace(result(), left_out=pair), parameters(), "pendulum")
    assert any("a$_{b$" in svg for svg in figures(html))


def test_start_parameters_that_diverge_everywhere_still_give_a_report() -> None:
    lost = evaluation(0.3)
    nowhere = torch.full_like(lost.errors, math.inf)
    lost = dataclasses.replace(
        lost, rmse=math.inf, median=math.inf, errors=nowhere, growth=nowhere, predicted=lost.predicted * math.nan
    )
    pair = Comparison(evaluation(0.03), lost)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "∞ rad" in fit_report(dataclasses.replace(result(), left_out=pair), parameters(), "pendulum")


def test_a_warm_up_is_no_part_of_the_length_of_a_window() -> None:
    for warm in (1, 24):
        scored = dataclasses.replace(evaluation(0.03), rows=torch.arange(warm, warm + 25))
        assert "windows of 0.125 s" in fit_report(
            dataclasses.replace(result(), left_out=Comparison(scored, scored)), parameters(), "pendulum"
        )


def test_numbers_and_flags_for_people() -> None:
    assert [number(x) for x in (None, math.nan, math.inf, -math.inf, 0.0123456, 12)] == [
        "–",
        "–",
        "∞",
        "−∞",
        "0.01235",
        "12",
    ]
    assert interval_text(math.nan, 1.0) == "none"
    assert interval_text(1.0, 2.0) == "1 … 2"
    assert [row_flags(row) for row in result().rows] == [
        [], ["not identified"], ["at a bound"], ["does not reach the output"],
    ]  # fmt: skip
