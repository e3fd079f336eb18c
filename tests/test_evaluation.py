"""Errors of parameter sets: the published figures on the real logs, and small logs where the error is known."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import scalar, shared, stack
from scipy.integrate import solve_ivp
from synthetic_logs import simulated_log, smooth_inputs

from sim2real import (
    EvaluationSettings,
    ModelMDP,
    Params,
    RolloutLog,
    WindowError,
    default_params,
    evaluate,
    evaluation,
    load_log,
    select_episodes,
)
from sim2real.simulators import building_rc, double_pendulum, pendulum
from sim2real.solve_report import UnconvergedWarning
from sim2real.solvers.least_squares import levenberg_marquardt

SCHEMAS = Path(__file__).parents[1] / "examples" / "schemas"
HOUR = 3600.0
AUTHORS_2 = {
    "m1": 0.5593806151425046,
    "m2": 0.6043459469186889,
    "r1": 0.3,
    "r2": 0.18377686083653508,
    "I1": 0.053470810264216295,
    "I2": 0.02392374528789766,
    "Ir": 7.659297952841183e-05,
    "b1": 0.001,
    "b2": 0.001,
    "cf1": 0.093,
    "cf2": 0.078,
}
"""double_pendulum/published/design_A_model_2.0.yml of the log's authors"""


def double_pendulum_log(runs: list[str], torque: str = "measured") -> RolloutLog:
    files = [shared(f"data/double_pendulum/design_A/{run}.csv") for run in runs]
    return load_log(files, SCHEMAS / f"double_pendulum_{torque}.yaml")


def authors_model(version: int, substeps: int = 2) -> tuple[ModelMDP, Params]:
    mdp = double_pendulum(parameters="physical", substeps=substeps)
    changes = AUTHORS_2 if version == 2 else {}
    return mdp, default_params(mdp.box) | {key: scalar(value) for key, value in changes.items()}


EXCITATION = EvaluationSettings(start_after=2.0, zeros="estimated")
PLAIN = replace(EXCITATION, zeros="none")
SWING_UP = EvaluationSettings(end_before=4.3)
PUBLISHED = [  # version, torque, runs, settings, (windows, rmse, median) at 0.5 s, then at 1 s; None: not published
    (2, "measured", "excitation", EXCITATION, (150, 0.0248, 0.0193), (140, 0.0339, 0.0295)),
    (2, "measured", "excitation", PLAIN, (150, 0.0778, None), (140, None, None)),
    (2, "measured", "swing-up", SWING_UP, (38, 0.0328, 0.0248), (33, 0.0475, 0.0308)),
    (1, "measured", "excitation", PLAIN, (150, 0.1895, None), (140, None, None)),
    (2, "commanded", "excitation", EXCITATION, (150, 0.1329, 0.1073), (140, 0.1586, 0.1388)),
]


@pytest.mark.parametrize(("version", "torque", "runs", "settings", "half", "whole"), PUBLISHED)
def test_figures_of_the_protocol(version, torque, runs, settings, half, whole) -> None:
    names = ["excitation_02", "excitation_12"] if runs == "excitation" else ["closedloop_pendubot_tvlqr_1"]
    log, (mdp, theta) = double_pendulum_log(names, torque), authors_model(version)
    zero = None
    for horizon, (windows, rmse, median) in ((0.5, half), (1.0, whole)):
        if zero is not None:  # those of a run do not depend on the windows that are scored
            settings = replace(settings, zeros="none")
        found = evaluate(mdp, log, theta, zero, replace(settings, horizon=horizon))
        zero = {"zero": stack(*[list(run.zero) for run in found.runs])}
        assert found.windows == windows
        # two independent programs agree to 1 % (the protocol's promise) and to half a printed digit
        for value, published in ((found.rmse, rmse), (found.median, median)):
            if published is not None:
                assert value == pytest.approx(published, rel=0.01, abs=5e-5)
    held = {"excitation": 0.757, "swing-up": 0.757}[runs]
    assert found.hold_first == pytest.approx(held, abs=1e-3)


@pytest.mark.parametrize(
    ("horizon", "windows", "rmse", "median"), [(0.5, 119, 0.0568, 0.0280), (1.0, 97, 0.0924, 0.0497)]
)
def test_design_values_of_the_simple_pendulum(horizon, windows, rmse, median) -> None:
    names = ["swingup_ddp", "swingup_dircol", "swingup_energy"]
    log = load_log([shared(f"data/simple_pendulum/{name}.csv") for name in names], SCHEMAS / "simple_pendulum.yaml")
    mdp = pendulum()
    settings = EvaluationSettings(horizon=horizon, keep={"angle": (-2.4, 2.4)})
    found = evaluate(mdp, log, default_params(mdp.box), None, settings)
    assert [run.windows for run in found.runs] == ([50, 25, 44] if horizon == 0.5 else [45, 20, 32])
    assert found.windows == windows
    assert found.rmse == pytest.approx(rmse, rel=0.01)
    assert found.median == pytest.approx(median, rel=0.01)


def test_trivial_forecasts_of_the_house() -> None:
    log = load_log(shared("data/house_heating/house_2019-12_28days.csv"), SCHEMAS / "house.yaml")
    mdp = building_rc(3)
    settings = EvaluationSettings(
        horizon=120 * HOUR, stride=24 * HOUR, first_row=552 - 48, margin=0, warmup=48 * HOUR, season=168 * HOUR
    )
    found = evaluate(mdp, log, default_params(mdp.box), None, settings)
    assert found.windows == 1
    assert found.starts.item() + found.rows[0].item() == 552
    assert found.starts.item() + found.rows[-1].item() == 671
    assert found.hold_first == pytest.approx(0.889, abs=5e-4)
    assert found.baselines["season-before"] == pytest.approx(0.252, abs=5e-4)


@pytest.mark.parametrize(("substeps", "bound"), [(1, 1e-3), (2, 5e-4)])
def test_our_step_meets_the_accuracy_of_the_protocol(substeps: int, bound: float) -> None:
    """Against LSODA at 1e-9 with the torque linear in time: rule 6 asks for 1e-3 rad rms.

    Mean torque held over a step and the explicit midpoint rule together differ by about 7e-4 rad rms with one step and
    3e-4 with two, most of it in windows where a joint sticks.
    """
    log = double_pendulum_log(["excitation_02"])
    mdp, theta = authors_model(2, substeps)
    found = evaluate(mdp, log, theta, None, EvaluationSettings(stride=0.9, start_after=2.0))
    p = {key: float(value) for key, value in theta.items()}
    times, torques = (tensor.numpy() for tensor in log.recorded_actions[0])

    def derivative(t: float, s: np.ndarray) -> list[float]:
        (q1, q2, w1, w2), u = s, [np.interp(t, times, torques[:, j]) for j in range(2)]
        M = np.array(
            [
                [
                    p["I1"] + p["I2"] + p["m2"] * 0.09 + 2 * p["m2"] * 0.3 * p["r2"] * math.cos(q2) + 37 * p["Ir"],
                    p["I2"] + p["m2"] * 0.3 * p["r2"] * math.cos(q2) - 6 * p["Ir"],
                ],
                [0.0, p["I2"] + 36 * p["Ir"]],
            ]
        )
        M[1, 0] = M[0, 1]
        c = p["m2"] * 0.3 * p["r2"] * math.sin(q2)
        far = 9.81 * p["m2"] * p["r2"] * math.sin(q1 + q2)
        near = 9.81 * (p["m1"] * p["r1"] + p["m2"] * 0.3) * math.sin(q1)
        bias = [c * (-2 * w1 * w2 - w2**2) + near + far, c * w1**2 + far]
        friction = [p[f"b{j}"] * w + p[f"cf{j}"] * math.atan(100 * w) for j, w in ((1, w1), (2, w2))]
        return [w1, w2, *np.linalg.solve(M, [u[j] - bias[j] - friction[j] for j in range(2)])]

    squares = []
    for window, start in enumerate(found.starts.tolist()):
        t = (start + np.arange(126)) * log.dt
        begin = log.signals[0, start].numpy()
        # kinks of the torque at every recorded row: short steps keep them inside the tolerance
        path = solve_ivp(derivative, (t[0], t[-1]), begin, "LSODA", t[1:], rtol=1e-7, atol=1e-9, max_step=2e-3)
        squares.append(((found.predicted[window].numpy() - path.y[:2].T) ** 2).mean())
    assert np.sqrt(np.mean(squares)) < bound


# Small logs


def small_log(runs: int = 2, steps: int = 300) -> tuple[ModelMDP, Params, RolloutLog]:
    mdp = pendulum(dt=0.01)
    theta = default_params(mdp.box)
    start = stack(*[[0.3 * k, 0.0] for k in range(1, runs + 1)])
    return mdp, theta, simulated_log(mdp, theta, start, smooth_inputs(runs, steps, 1, mdp.dt, 0))


def test_the_true_model_has_no_error_and_holding_has_that_of_the_log() -> None:
    mdp, theta, log = small_log()
    found = evaluate(mdp, log, theta)
    # start rates are the exact states here: what remains is rounding
    assert found.rmse < 1e-12
    assert found.unit == "rad"
    assert found.signals == ("angle",)
    angles = log.signals[..., 0]
    expected = [
        (angles[e, i + 1 : i + 51] - angles[e, i]).square().mean()
        for e, i in zip(found.episodes.tolist(), found.starts.tolist(), strict=True)
    ]
    assert found.hold_first == pytest.approx(float(torch.stack(expected).mean().sqrt()), rel=1e-12)
    assert found.baselines == {"hold-first-value": found.hold_first}
    assert sum(run.windows for run in found.runs) == found.windows


def test_pooling_over_runs_is_over_windows() -> None:
    mdp, theta, log = small_log(3)
    worse = theta | {"mgl": 1.1 * theta["mgl"]}
    whole = evaluate(mdp, log, worse)
    single = [evaluate(mdp, select_episodes(log, [run]), worse) for run in range(3)]
    torch.testing.assert_close(whole.errors, torch.cat([one.errors for one in single]))
    assert whole.rmse == pytest.approx(math.sqrt(sum(one.rmse**2 * one.windows for one in single) / whole.windows))
    assert [run.rmse for run in whole.runs] == pytest.approx([one.rmse for one in single])


def test_zeros_of_a_run_are_found_from_its_first_seconds() -> None:
    mdp, theta, log = small_log(2, 400)
    zero = stack([0.05], [-0.08])
    shifted = replace(log, signals=log.signals + torch.stack([zero, torch.zeros_like(zero)], -1))
    settings = EvaluationSettings(start_after=2.0, zeros="estimated")
    found = evaluate(mdp, shifted, theta, None, settings)
    torch.testing.assert_close(stack(*[list(run.zero) for run in found.runs]), zero, rtol=0, atol=1e-7)
    assert found.rmse < 1e-7
    plain = evaluate(mdp, shifted, theta, None, replace(settings, zeros="none"))
    assert plain.rmse > 1e-3
    given = evaluate(mdp, shifted, theta, {"zero": zero}, replace(settings, zeros="none"))
    assert given.rmse < 1e-12
    torch.testing.assert_close(given.predicted, given.measured)


def test_no_window_is_scored_with_a_zero_fitted_to_it() -> None:
    mdp, theta, log = small_log(2, 400)
    found = evaluate(mdp, log, theta, None, EvaluationSettings(zeros="estimated"))
    assert float(found.starts.min()) * log.dt >= 2.0
    later = evaluate(mdp, log, theta, None, EvaluationSettings(zeros="estimated", start_after=2.5))
    assert float(later.starts.min()) * log.dt >= 2.5


def test_zeros_that_did_not_converge_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    mdp, theta, log = small_log(1, 400)
    monkeypatch.setattr(evaluation, "levenberg_marquardt", partial(levenberg_marquardt, max_steps=0))
    with pytest.warns(UnconvergedWarning, match="sensor zeros did not converge: stopped after 0 steps"):
        evaluate(mdp, replace(log, signals=log.signals + 0.05), theta, None, EvaluationSettings(zeros="estimated"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"horizon": math.nan}, {"first_row": -1}, {"max_growth": math.nan}, {"zeros": "per_run"},
        {"zero_horizon": 0.0}, {"zero_until": math.inf}, {"pull": -1.0}, {"season": math.nan}, {"season": 0.2},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        EvaluationSettings(**wrong)


def test_zeros_of_other_runs_are_refused() -> None:
    mdp, theta, log = small_log(2)
    with pytest.raises(WindowError, match="zeros of other runs do not carry over"):
        evaluate(mdp, log, theta, {"zero": torch.zeros(3, 1, dtype=torch.float64)})


def test_a_delay_is_taken_from_the_recorded_inputs() -> None:
    mdp, theta, log = small_log(1)
    late = torch.cat([log.actions[:, :1].expand(-1, 3, -1), log.actions[:, :-3]], 1)
    lagging = replace(simulated_log(mdp, theta, log.signals[:, 0], late), recorded_actions=log.recorded_actions)
    assert evaluate(mdp, lagging, theta, {"delay": scalar(0.03)}).rmse < 1e-12
    assert evaluate(mdp, replace(lagging, actions=log.actions), theta).rmse > 1e-3


def test_a_window_that_diverges_has_an_infinite_error_and_the_rest_counts() -> None:
    mdp, theta, log = small_log(1)
    limit = float(0.95 * log.signals.abs().amax())
    fragile = replace(mdp, step=lambda th, s, a, e: mdp.step(th, torch.where(s.abs() > limit, torch.nan, s), a, e))
    found = evaluate(fragile, log, theta)
    assert torch.isinf(found.errors).any()
    assert torch.isfinite(found.errors).any()
    assert found.rmse == math.inf
    assert math.isfinite(found.median)
    # all windows of the first two seconds diverge from every zero: nothing is estimated, nothing raises
    broken = replace(mdp, step=lambda th, s, a, e: s * torch.nan)
    with pytest.warns(UserWarning, match=r"tells the sensor zeros of \['run0'\]"):
        found = evaluate(broken, log, theta, None, EvaluationSettings(zeros="estimated"))
    assert found.runs[0].zero == (0.0,)
    assert found.median == math.inf


def test_windows_near_the_unstable_equilibrium_are_told_apart() -> None:
    mdp = pendulum(dt=0.01)
    theta = default_params(mdp.box)
    start = stack([0.4, 0.0], [3.1, 0.0])  # one run hangs, one starts upright
    log = simulated_log(mdp, theta, start, torch.zeros(2, 200, 1, dtype=torch.float64))
    found = evaluate(mdp, log, theta | {"mgl": 1.05 * theta["mgl"]}, None, EvaluationSettings(max_growth=2.0))
    assert 0 < found.calm_windows < found.windows
    assert found.calm_rmse < found.rmse
    assert set(found.episodes[found.growth > 2.0].tolist()) == {1}
    none = evaluate(mdp, select_episodes(log, [1]), theta, None, EvaluationSettings(max_growth=1e-3))
    assert none.calm_windows == 0
    assert math.isnan(none.calm_rmse)


def test_the_season_before_is_the_value_one_season_earlier() -> None:
    mdp, theta, log = small_log(1)
    found = evaluate(mdp, log, theta, None, EvaluationSettings(season=1.0))
    angle = log.signals[0, :, 0]
    expected = [
        (angle[i + 1 : i + 51] - angle[i - 99 : i - 49]).square().mean() for i in found.starts.tolist() if i >= 99
    ]
    assert found.baselines["season-before"] == pytest.approx(float(torch.stack(expected).mean().sqrt()), rel=1e-12)


def test_a_season_before_that_was_not_measured_does_not_count() -> None:
    mdp, theta, log = small_log(1)
    mask = log.mask.clone()
    mask[:, 100:110] = False  # rows 101 to 109 are unknown
    found = evaluate(mdp, replace(log, mask=mask), theta, None, EvaluationSettings(season=1.0))
    angle = log.signals[0, :, 0]
    clear = [i for i in found.starts.tolist() if i >= 99 and not {*range(i - 99, i - 49)} & {*range(101, 110)}]
    assert 0 < len(clear) < sum(i >= 99 for i in found.starts.tolist())
    expected = [(angle[i + 1 : i + 51] - angle[i - 99 : i - 49]).square().mean() for i in clear]
    assert found.baselines["season-before"] == pytest.approx(float(torch.stack(expected).mean().sqrt()), rel=1e-12)
