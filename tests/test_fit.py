"""`fit` on the real logs, its resuming to the bit, and what it says about settings and starts that make no sense."""

import math
from dataclasses import replace
from itertools import pairwise
from statistics import median
from typing import Any

import pytest
import torch
from problems import scalar, seeded, shared, stack
from synthetic_logs import simulated_log, smooth_inputs
from test_evaluation import EXCITATION, SCHEMAS, SWING_UP, double_pendulum_log
from torch import Tensor

from sim2real import (
    Box,
    EvaluationSettings,
    FitResult,
    FitSettings,
    ModelMDP,
    Params,
    RolloutLog,
    WindowError,
    default_params,
    evaluate,
    fit_facts,
    gauss_newton,
    load_log,
    select_episodes,
)
from sim2real import fit_search as search_module
from sim2real.fit import build_misfit, fit
from sim2real.simulators import building_rc, double_pendulum, pendulum

HOUR = 3600.0


# Real logs: the bars of the protocol


def test_simple_pendulum_predicts_left_out_swing_ups() -> None:
    runs = ["swingup_ddp", "swingup_dircol", "swingup_energy"]
    files = [shared(f"data/simple_pendulum/{run}.csv") for run in ("excitation_pd", *runs)]
    log, mdp = load_log(files, SCHEMAS / "simple_pendulum.yaml"), pendulum()
    keep, errors = {"angle": (-2.4, 2.4)}, []
    for run in runs:
        settings = FitSettings(keep=keep, zeros="shared", leave_out=(run,))
        found = fit(mdp, log, default_params(mdp.box), settings)
        assert found.report.converged
        assert found.left_out is not None
        assert found.left_out.fitted.rmse < found.left_out.initial.rmse < found.left_out.initial.hold_first
        # every run has the same mounting error, about -0.025 rad
        assert -0.04 < float(found.nuisance["zero"]) < -0.015
        errors += found.left_out.fitted.errors.tolist()
    assert len(errors) == 119
    # a careful fit reaches 0.0229 (0.0129); the design values have 0.0568 (0.0280)
    assert math.sqrt(sum(e**2 for e in errors) / 119) < 0.024
    assert median(errors) < 0.0135


def fit_double_pendulum(torque: str) -> tuple[ModelMDP, FitResult]:
    mdp = double_pendulum(substeps=2)
    log = double_pendulum_log([f"excitation_{run}" for run in ("00", "01", "03", "04", "11")], torque)
    settings = FitSettings(
        free=("A", "B", "C", "h", "mu", "b1", "b2", "cf1", "cf2"),
        horizon=0.25,
        zeros="per_run",
        delay=torque == "commanded",
    )
    return mdp, fit(mdp, log, default_params(mdp.box), settings)


@pytest.mark.parametrize(
    ("torque", "half", "whole", "swing"),
    [("measured", 0.018, 0.024, 0.030), pytest.param("commanded", 0.016, 0.020, 0.027, marks=pytest.mark.slow)],
)
def test_double_pendulum_predicts_left_out_runs(torque: str, half: float, whole: float, swing: float) -> None:
    mdp, found = fit_double_pendulum(torque)
    assert found.report.converged
    assert all(row.identified and row.reaches_output and not row.at_bound for row in found.rows)
    nuisance = {key: value for key, value in found.nuisance.items() if key == "delay"}
    left_out = double_pendulum_log(["excitation_02", "excitation_12"], torque)
    swing_up = double_pendulum_log(["closedloop_pendubot_tvlqr_1"], torque)
    first = evaluate(mdp, left_out, found.theta, nuisance, EXCITATION)
    zero = {"zero": stack(*[list(run.zero) for run in first.runs])}
    longer = replace(EXCITATION, zeros="none", horizon=1.0)
    assert first.rmse < half
    assert evaluate(mdp, left_out, found.theta, nuisance | zero, longer).rmse < whole
    assert evaluate(mdp, swing_up, found.theta, nuisance, SWING_UP).rmse < swing
    if torque == "commanded":
        assert 0.003 < float(found.nuisance["delay"]) < 0.007  # the drive lags by about 5 ms


def test_house_forecast() -> None:
    log, mdp = load_log(shared("data/house_heating/house_2019-12_28days.csv"), SCHEMAS / "house.yaml"), building_rc(3)
    days = {"first_row": 0, "margin": 0, "warmup": 48 * HOUR}
    settings = FitSettings(
        horizon=72 * HOUR, stride=24 * HOUR, sample_every=1, end_before=551 * HOUR, loss_scale=0.3, **days
    )
    found = fit(mdp, log, default_params(mdp.box), settings)
    forecast = EvaluationSettings(horizon=120 * HOUR, stride=24 * HOUR, **(days | {"first_row": 504}))
    # 0.296 by another program; the bar is 0.31
    assert evaluate(mdp, log, found.theta, None, forecast).rmse < 0.31
    # the resistance to the outside and the heater are not fixed by these days: their intervals leave the box
    assert not all(row.identified for row in found.rows) or any(row.low < 0 < row.high for row in found.rows)


# Planted logs


def planted(runs: int = 3, steps: int = 250, noise: float = 1e-3) -> tuple[ModelMDP, Params, RolloutLog]:
    mdp = pendulum(dt=0.01)
    theta = default_params(mdp.box) | {"coulomb": scalar(0.05), "mgl": scalar(3.0)}
    start = torch.linspace(-0.5, 0.5, runs, dtype=torch.float64).unsqueeze(1) * stack(1.0, 0.0)
    return mdp, theta, simulated_log(mdp, theta, start, 2 * smooth_inputs(runs, steps, 1, 0.01, 3), noise=noise)


def same(a: FitResult, b: FitResult) -> bool:
    tensors = [(a.theta, b.theta), (a.nuisance, b.nuisance)]
    equal = all(torch.equal(x[key], y[key]) for x, y in tensors for key in x.keys() | y.keys())
    return equal and torch.equal(a.covariance, b.covariance) and a.history == b.history and a.report == b.report


def test_resuming_after_any_step_is_bitwise_equal() -> None:
    """Through all stages: the rough fit, the scan of the delay, the full fit."""
    mdp, _, log = planted(runs=2)
    settings = FitSettings(zeros="per_run", delay=True, delay_bounds=(0.0, 0.03), leave_out=("run1",))
    start = default_params(mdp.box)
    snapshots: list[Params] = []
    whole = fit(mdp, log, start, settings, on_step=snapshots.append)
    assert {int(snapshot["search.stage"]) for snapshot in snapshots} >= {0, 1, 2}
    chosen = [
        snapshots[0],
        snapshots[1],
        *[s for s, t in pairwise(snapshots) if s["search.stage"] != t["search.stage"]],
        snapshots[-1],
    ]
    for snapshot in chosen:
        later: list[Params] = []
        copy = {key: value.clone() for key, value in snapshot.items()}
        resumed = fit(mdp, log, start, settings, on_step=later.append, state=copy)
        assert same(resumed, whole)
        rest = snapshots[len(snapshots) - len(later) :]
        assert all(torch.equal(a[key], b[key]) for a, b in zip(later, rest, strict=True) for key in a)


def test_a_snapshot_of_another_fit_is_refused() -> None:
    mdp, theta, log = planted()
    snapshots: list[Params] = []
    fit(mdp, log, theta, FitSettings(free=("mgl",)), on_step=snapshots.append)
    with pytest.raises(ValueError, match="not one of this fit"):
        fit(mdp, log, theta, FitSettings(free=("mgl", "damping")), state=snapshots[0])
    with pytest.raises(ValueError, match="not one of this fit"):
        fit(mdp, log, theta, FitSettings(free=("mgl",)), state={"x": stack(1.0)})


def test_too_few_steps_are_reported() -> None:
    mdp, _, log = planted()
    found = fit(mdp, log, default_params(mdp.box), FitSettings(max_steps=1))
    assert not found.report.converged
    assert any("did not converge" in note for note in found.notes)


def test_the_delay_is_found_past_a_local_minimum() -> None:
    """A held command with steps has a minimum of the misfit near every sample; the scan must find the right one."""
    mdp, theta, log = planted(runs=2, steps=300, noise=0.0)
    held = torch.randn(2, 75, 1, generator=seeded(0), dtype=torch.float64).repeat_interleave(4, 1)
    late = torch.cat([held[:, :1].expand(-1, 3, -1), held[:, :-3]], 1)
    lagging = simulated_log(mdp, theta, log.signals[:, 0], late)
    lagging = replace(
        lagging, actions=held, recorded_actions=tuple((0.01 * torch.arange(300.0).double(), run) for run in held)
    )
    start = theta | {"mgl": scalar(2.5), "damping": scalar(0.2)}
    found = fit(mdp, lagging, start, FitSettings(delay=True, free=("mgl", "damping", "inertia")))
    assert float(found.nuisance["delay"]) == pytest.approx(0.03, abs=1e-4)
    assert float(found.theta["mgl"]) == pytest.approx(3.0, rel=1e-3)


def test_a_parameter_that_does_not_reach_the_output_is_found_before_the_fit() -> None:
    mdp, _, log = planted()
    extra = replace(
        mdp,
        box=Box(mdp.box.low, mdp.box.high, mdp.box.unit, mdp.box.default | {"colour": 0.5}),
        step=lambda th, s, a, e: mdp.step({k: v for k, v in th.items() if k != "colour"}, s, a, e),
    )
    start = default_params(extra.box)
    misfit, _ = build_misfit(extra, log, start, FitSettings())
    silent = search_module.without_effect(misfit)
    assert [name for name, mute in zip(misfit.unknowns.names, silent, strict=True) if mute] == ["colour"]
    found = fit(extra, log, start, FitSettings())
    row = found.rows[-1]
    assert row.name == "colour"
    assert not row.reaches_output
    assert not row.identified
    assert row.value == 0.5
    assert any("'colour' does not reach" in note for note in found.notes)


def test_a_parameter_with_a_zero_derivative_at_the_start_still_reaches_the_output() -> None:
    mdp, theta, log = planted()
    squared = replace(mdp, step=lambda th, s, a, e: mdp.step(th | {"coulomb": th["coulomb"] ** 2}, s, a, e))
    # d coulomb^2 / d coulomb vanishes at the start 0
    misfit, _ = build_misfit(squared, log, theta | {"coulomb": scalar(0.0)}, FitSettings())
    assert not search_module.without_effect(misfit).any()


def test_a_start_on_a_bound_is_left() -> None:
    mdp, theta, log = planted()
    start = theta | {"coulomb": scalar(0.0), "damping": scalar(0.0)}
    found = fit(mdp, log, start)
    assert float(found.theta["coulomb"]) == pytest.approx(0.05, abs=0.01)
    assert float(found.theta["damping"]) == pytest.approx(0.1, abs=0.02)
    assert not any(row.at_bound for row in found.rows)


def test_start_rates_can_be_corrected_per_run() -> None:
    mdp, theta, log = planted(runs=2, noise=0.0)
    offset = stack([0.3], [-0.2])
    wrong = log.signals.clone()
    wrong[..., 1] += offset
    settings = FitSettings(initial_velocity=True, free=("mgl", "damping"))
    found = fit(mdp, replace(log, signals=wrong), theta | {"mgl": scalar(2.8)}, settings)
    # the weak priors (0.5 rad/s against 20 windows a run) hold back a little
    torch.testing.assert_close(found.nuisance["start_rate"], -offset, rtol=0, atol=2e-3)
    assert float(found.theta["mgl"]) == pytest.approx(3.0, rel=1e-3)
    assert [row.name for row in found.rows[2:]] == ["start.velocity.run0", "start.velocity.run1"]


def test_windows_that_grow_start_errors_are_left_out_and_counted() -> None:
    mdp, theta, log = planted(runs=1)
    upright = simulated_log(mdp, theta, stack([3.1, 0.0]), torch.zeros(1, 250, 1, dtype=torch.float64))
    both = replace(
        log,
        signals=torch.cat([log.signals, upright.signals]),
        actions=torch.cat([log.actions, upright.actions]),
        mask=torch.cat([log.mask, upright.mask]),
        names=log.names | {"episode": ("hanging", "upright")},
    )
    misfit, notes = build_misfit(mdp, both, theta, FitSettings(max_growth=3.0))
    assert 0 < (misfit.windows.episode == 1).sum() < 19
    assert any("left out" in note for note in notes)
    with pytest.raises(WindowError, match="max_growth"):
        build_misfit(mdp, both, theta, FitSettings(max_growth=1e-6))


def test_a_step_that_is_unstable_at_the_start_is_noted() -> None:
    mdp, theta, log = planted()
    # the explicit midpoint rule with stiff friction near standstill: 1.5 * 100 / 0.17 * 0.01 s is past its limit of 2
    stiff = theta | {"coulomb": scalar(1.5)}
    assert any("more substeps" in note for note in fit(mdp, log, stiff, FitSettings(max_steps=1)).notes)
    assert not any("more substeps" in note for note in fit(mdp, log, theta, FitSettings(max_steps=1)).notes)


def test_a_run_without_windows_is_noted() -> None:
    mdp, theta, log = planted(runs=2)
    mask = log.mask.clone()
    mask[1, 30:] = False
    _, notes = build_misfit(mdp, replace(log, mask=mask), theta, FitSettings())
    assert notes == ("episode 'run1' has no window and is not used",)


def test_a_strong_prior_wins_and_a_weak_one_does_not() -> None:
    mdp, theta, log = planted()
    strong = fit(mdp, log, theta, FitSettings(priors={"mgl": (3.3, 1e-6)}))
    assert float(strong.theta["mgl"]) == pytest.approx(3.3, abs=1e-4)
    assert next(row.prior for row in strong.rows if row.name == "mgl") == (3.3, 1e-6)
    weak = fit(mdp, log, theta, FitSettings(priors={"mgl": (3.3, 10.0)}))
    assert float(weak.theta["mgl"]) == pytest.approx(3.0, abs=0.02)


# Many parameters


def features_model(count: int) -> tuple[ModelMDP, Params]:
    """A pendulum whose torque has an unknown share `sum_k out_k tanh(c_k angle + d_k rate)`."""
    mdp, generator = pendulum(dt=0.02), seeded(0)
    slopes = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    physical = default_params(mdp.box)

    def step(theta: Params, s: Tensor, a: Tensor, e: Tensor) -> Tensor:
        share = (theta["out"] * torch.tanh(s @ slopes.mT)).sum(-1, keepdim=True)
        return mdp.step(physical, s, a + share, e)

    truth = {"out": 0.1 * torch.randn(count, generator=generator, dtype=torch.float64)}
    return replace(mdp, step=step, box=Box(default={"out": 0.0})), truth


def test_many_parameters_are_fitted_by_adjoints_to_the_dense_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    mdp, truth = features_model(60)
    log = simulated_log(mdp, truth, stack([0.5, 0.0], [-0.4, 0.0]), 2 * smooth_inputs(2, 120, 1, 0.02, 3), noise=1e-3)
    start = {"out": torch.zeros(60, dtype=torch.float64)}
    settings = FitSettings(zeros="per_run", priors={"out": (0.0, 0.1)}, horizon=0.3)
    assert gauss_newton.MANY < 60
    products = fit(mdp, log, start, settings)
    assert products.report.converged
    assert any("intervals" in note for note in products.notes)
    assert all(math.isnan(row.low) for row in products.rows)
    assert products.training.fitted.rmse < 0.3 * products.training.initial.rmse
    monkeypatch.setattr(gauss_newton, "MANY", 1000)
    monkeypatch.setattr(fit_facts, "MANY", 1000)
    dense = fit(mdp, log, start, settings)
    assert dense.report.converged
    assert [row.name for row in dense.rows[:2]] == ["out[0]", "out[1]"]
    # both stop when less than 1e-6 of the loss is left to gain, the products' gain known to 1 %
    assert products.training.fitted.rmse == pytest.approx(dense.training.fitted.rmse, rel=1e-2)


# Errors


def test_settings_and_starts_that_make_no_sense_are_named() -> None:
    mdp, theta, log = planted()
    cases: list[tuple[Params, dict[str, Any], str]] = [
        (theta, {"free": ("mass",)}, r"free names \['mass'\]"),
        (theta, {"priors": {"mass": (1.0, 1.0)}}, r"priors name \['mass'\]"),
        (theta, {"priors": {"mgl": (1.0, 0.0)}}, "standard deviation > 0"),
        (theta, {"delay": True, "delay_start": 0.1}, "delay starts at 0.1"),
        (theta, {"loss_scale": 0.0}, "loss_scale"),
        (theta, {"leave_out": ("run7",)}, r"leave_out names \['run7'\]"),
        (theta, {"leave_out": ("run0", "run1", "run2")}, "leave_out names all"),
        (theta, {"warmup": 0.1, "initial_velocity": True}, "initial_velocity"),
        (theta | {"mgl": scalar(-1.0)}, {}, "'mgl' starts at -1, outside its bounds"),
        (theta | {"mgl": scalar(math.nan)}, {}, "not finite in"),
        ({"mgl": scalar(3.0)}, {}, "theta lacks"),
        (theta, {"horizon": 5.0}, "no window"),
        (theta, {"horizon": math.nan}, "horizon must be > 0 and finite, got nan"),
        (theta, {"first_row": -5}, "first_row must be >= 0"),
        (theta, {"margin": -1}, "margin must be >= 0"),
        (theta, {"stride": math.inf}, "stride"),
        (theta, {"end_before": math.nan}, "end_before"),
        (theta, {"keep": {"angle": (1.0, -1.0)}}, "keep needs .low, high. with low < high for 'angle'"),
        (theta, {"keep": {"angle": 3.0}}, "keep needs"),
        (theta, {"priors": {"mgl": 3.0}}, "the prior of 'mgl' needs"),
        (theta, {"priors": {"mgl": (math.nan, 1.0)}}, "the prior of 'mgl' needs"),
        (theta, {"loss_scale": math.inf}, "loss_scale"),
        (theta, {"zero_std": 0.0}, "zero_std"),
        (theta, {"max_steps": -1}, "max_steps"),
        (theta, {"tolerance": math.nan}, "tolerance"),
        (theta, {"prior_width": math.nan}, "prior_width"),
        (theta, {"max_growth": math.nan}, "max_growth"),
        (theta, {"delay": True, "delay_bounds": (0.1,)}, "delay_bounds"),
        (theta, {"zeros": "all"}, "zeros must be 'none', 'shared' or 'per_run'"),
    ]
    for start, settings, message in cases:
        with pytest.raises(ValueError, match=message):
            fit(mdp, log, start, FitSettings(**settings))


def test_a_start_at_which_the_model_diverges_is_named() -> None:
    mdp, theta, log = planted()
    broken = replace(mdp, step=lambda th, s, a, e: mdp.step(th, torch.where(s.abs() > 1.0, torch.nan, s), a, e))
    with pytest.raises(ValueError, match=r"diverges in \d+ of \d+ windows"):
        fit(broken, log, theta)
    some, notes = build_misfit(broken, log, theta, FitSettings(max_growth=1e3))  # infinite growth leaves them out
    assert len(some.windows.start) > 0
    assert any("left out" in note for note in notes)
    with pytest.raises(ValueError, match="delay needs `recorded_actions`"):
        fit(mdp, replace(log, recorded_actions=()), theta, FitSettings(delay=True))
    assert select_episodes(log, ["run1"]).names["episode"] == ("run1",)
