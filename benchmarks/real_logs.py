"""How well do models fitted by `sim2real.fit` predict real logs, and how long does a fit take?

The evaluation protocol: open-loop windows from measured starts; every figure is on runs that the fit has not seen.
Public origins: github.com/dfki-ric-underactuated-lab/double_pendulum and torque_limited_simple_pendulum,
github.com/czagoni/darkgreybox.
SIM2REAL_DATA names the folder that holds double_pendulum, simple_pendulum and house_heating.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script, and a module of the folder `benchmarks`

from benchmarks.bars import Figure, MissingError, main
from benchmarks.intervals import intervals
from sim2real.bounds import default_params
from sim2real.evaluation import Evaluation, EvaluationSettings, evaluate
from sim2real.fit import FitResult, FitSettings, build_misfit, fit
from sim2real.log import RolloutLog, load_log, select_episodes
from sim2real.simulators import building_rc, double_pendulum, pendulum

ROOT = Path(__file__).parents[1]
SCHEMAS = ROOT / "examples" / "schemas"
DATA = Path(os.environ.get("SIM2REAL_DATA", ROOT.parent / "shared" / "data"))
HOUR = 3600.0

# Double pendulum: fit on five excitation runs, score two others and the swing-up of a closed-loop run.
NINE = ("A", "B", "C", "h", "mu", "b1", "b2", "cf1", "cf2")
TRAINING, LEFT_OUT = ("00", "01", "03", "04", "11"), ("02", "12")
# 0.25 s windows leave the errors on the excitation runs as they are and lower those of the swing-up.
DOUBLE = double_pendulum()
DOUBLE_FIT = FitSettings(free=NINE, horizon=0.25, zeros="per_run")
EXCITATION = EvaluationSettings(start_after=2.0, zeros="estimated")
SWING_UP = EvaluationSettings(end_before=4.3)

# Simple pendulum: each swing-up left out in turn; windows stay 0.74 rad away from upright.
SWING_UPS = ("swingup_ddp", "swingup_dircol", "swingup_energy")
AWAY = {"angle": (-2.4, 2.4)}
SIMPLE_FIT = FitSettings(horizon=0.5, keep=AWAY, zeros="shared")

# House: 23 days to fit on, the last 5 of 28 to forecast.
HOUSE_FIT = FitSettings(
    horizon=72 * HOUR,
    stride=24 * HOUR,
    sample_every=1,
    first_row=0,
    margin=0,
    end_before=551 * HOUR,
    warmup=48 * HOUR,
    loss_scale=0.3,
)
FORECAST = EvaluationSettings(
    horizon=120 * HOUR, stride=24 * HOUR, first_row=504, margin=0, warmup=48 * HOUR, season=168 * HOUR
)


def data(folder: str) -> Path:
    """A folder of real logs; their public origins are named above."""
    if not (DATA / folder).is_dir():
        raise MissingError(f"no folder '{folder}' in the data; SIM2REAL_DATA names the folder that holds it")
    return DATA / folder


def double_pendulum_log(torque: str, runs: tuple[str, ...]) -> RolloutLog:
    folder = data("double_pendulum") / "design_A"
    return load_log([folder / f"{run}.csv" for run in runs], SCHEMAS / f"double_pendulum_{torque}.yaml")


def excitation(torque: str, runs: tuple[str, ...]) -> RolloutLog:
    return double_pendulum_log(torque, tuple(f"excitation_{run}" for run in runs))


def simple_pendulum_log() -> RolloutLog:
    files = [data("simple_pendulum") / f"{run}.csv" for run in ("excitation_pd", *SWING_UPS)]
    return load_log(files, SCHEMAS / "simple_pendulum.yaml")


def dp_fit(quick: bool) -> Iterator[Figure]:
    """Measured torque without, commanded torque with a fitted delay."""
    # (zeroed 0.5 s, zeroed 1 s, plain 0.5 s, swing-up 0.5 s, swing-up 1 s) of the authors' best model, RMSE
    published = {
        "measured": (0.0248, 0.0339, 0.0778, 0.0328, 0.0475),
        "commanded": (0.1329, 0.1586, 0.1517, 0.0838, 0.1070),
    }
    for torque in ("measured", "commanded"):
        settings = replace(DOUBLE_FIT, delay=torque == "commanded")
        found = fit(DOUBLE, excitation(torque, TRAINING), default_params(DOUBLE.box), settings)
        nuisance = {key: value for key, value in found.nuisance.items() if key == "delay"}
        left_out = excitation(torque, LEFT_OUT)
        swing_up = double_pendulum_log(torque, ("closedloop_pendubot_tvlqr_1",))
        score = lambda log, settings, f=found, n=nuisance: evaluate(DOUBLE, log, f.theta, n, settings)
        zeroed = [score(left_out, replace(EXCITATION, horizon=horizon)) for horizon in (0.5, 1.0)]
        plain = score(left_out, replace(EXCITATION, zeros="none"))
        swing = [score(swing_up, replace(SWING_UP, horizon=horizon)) for horizon in (0.5, 1.0)]
        cases = [("0.5s", zeroed[0]), ("1s", zeroed[1]), ("0.5s-unzeroed", plain)]
        for (name, scored), reference in zip(cases, published[torque][:3], strict=True):
            yield from _pair(f"{torque}-{name}", scored, reference)
        for name, scored, reference in zip(("", "-1s"), swing, published[torque][3:], strict=True):
            yield from _pair(f"swingup-{torque}{name}", scored, reference)
        if "delay" in found.nuisance:
            yield Figure(f"{torque}-delay", float(found.nuisance["delay"]), "s", found.training.fitted.windows, 0.005)
    yield from _run_04()


def _run_04() -> Iterator[Figure]:
    """Harder, no bar: fitted without run 04, scored on it; large, partly chaotic motion."""
    runs = tuple(run for run in TRAINING if run != "04")
    found = fit(DOUBLE, excitation("measured", runs), default_params(DOUBLE.box), DOUBLE_FIT)
    scored = evaluate(DOUBLE, excitation("measured", ("04",)), found.theta, None, EXCITATION)
    yield Figure("measured-run04-median", scored.median, scored.unit, scored.windows)
    yield Figure("measured-run04-calm", scored.calm_rmse, scored.unit, scored.calm_windows)


def _pair(metric: str, scored: Evaluation, reference: float | None) -> Iterator[Figure]:
    yield Figure(metric, scored.rmse, scored.unit, scored.windows, reference)
    yield Figure(f"{metric}-median", scored.median, scored.unit, scored.windows)


def sp_fit(quick: bool) -> Iterator[Figure]:
    """Each swing-up left out in turn, windows pooled; the design values are the reference."""
    mdp, log = pendulum(), simple_pendulum_log()
    theta = default_params(mdp.box)
    errors: dict[float, list[torch.Tensor]] = {0.5: [], 1.0: []}
    for left_out in SWING_UPS:
        rest = select_episodes(log, [run for run in log.names["episode"] if run != left_out])
        found = fit(mdp, rest, theta, SIMPLE_FIT)
        for horizon, parts in errors.items():
            settings = EvaluationSettings(horizon=horizon, keep=AWAY)
            parts.append(evaluate(mdp, select_episodes(log, [left_out]), found.theta, found.nuisance, settings).errors)
    for horizon, parts in errors.items():
        design = evaluate(
            mdp, select_episodes(log, SWING_UPS), theta, None, EvaluationSettings(horizon=horizon, keep=AWAY)
        )
        pooled = torch.cat(parts)
        name = f"{horizon:g}s"
        middle = "median" if horizon == 0.5 else f"{name}-median"
        yield Figure(name, float(pooled.square().mean().sqrt()), "rad", len(pooled), design.rmse)
        yield Figure(middle, median(pooled.tolist()), "rad", len(pooled), design.median)


def house_fit(quick: bool) -> Iterator[Figure]:
    """One forecast of 120 h after 23 days of data; the trivial forecasts stand beside it."""
    mdp = building_rc(3)
    log = load_log(data("house_heating") / "house_2019-12_28days.csv", SCHEMAS / "house.yaml")
    found = fit(mdp, log, default_params(mdp.box), HOUSE_FIT)
    scored = evaluate(mdp, log, found.theta, None, FORECAST)
    yield Figure("rmse", scored.rmse, "degC", 120, 0.296)
    yield Figure("week-before", scored.baselines["season-before"], "degC", 120, 0.252)
    yield Figure("last-value-held", scored.hold_first, "degC", 120, 0.889)


def fit_time(quick: bool) -> Iterator[Figure]:
    """Warm wall-clock time of whole fits (windows, search, intervals, scores) on one thread, least of a few."""
    log = excitation("measured", TRAINING)
    # starts every 68 ms give at least the 625 windows of the bar
    settings = replace(DOUBLE_FIT, horizon=0.5, stride=0.068)
    repeats = 2 if quick else 4
    seconds, found = _fastest(lambda: fit(DOUBLE, log, default_params(DOUBLE.box), settings), repeats)
    yield Figure("dp-seconds", seconds, "s", found.training.fitted.windows, 2.5)
    mdp, log = pendulum(), simple_pendulum_log()
    # as mujoco.sysid: no zero, and plain squares (the loss is quadratic far below 1 rad)
    settings, theta = replace(SIMPLE_FIT, zeros="none", loss_scale=1.0), default_params(mdp.box)
    seconds, found = _fastest(lambda: fit(mdp, log, theta, settings), 3 * repeats)
    yield Figure("sp-seconds", seconds, "s", found.training.fitted.windows, 0.11)
    yield from _against_sysid(log, settings, seconds, found)


def _fastest(job, repeats: int) -> tuple[float, FitResult]:
    times = []
    for _ in range(repeats + 1):  # the first one warms up
        start = time.perf_counter()
        found = job()
        times.append(time.perf_counter() - start)
    return min(times[1:]), found


def _against_sysid(log: RolloutLog, settings: FitSettings, seconds: float, found: FitResult) -> Iterator[Figure]:
    """`mujoco.sysid` on the same windows and samples in the same process; needs the bench extra."""
    from benchmarks.sysid_pendulum import problem, sysid_fit

    mdp = pendulum()
    misfit, _ = build_misfit(mdp, log, found.theta, settings)
    residual, parameters = problem(log, misfit.channels, misfit.windows)
    start = time.perf_counter()
    peer = sysid_fit(residual, parameters, misfit.windows.measured.numel())
    peer_seconds = time.perf_counter() - start
    rows = misfit.windows.rows - 1
    ours = found.training.fitted
    rmse = float((ours.predicted - ours.measured)[:, rows].square().mean().sqrt())
    windows = ours.windows
    yield Figure("sp-speedup", peer_seconds / seconds, "x", windows, 20.0)
    yield Figure("sp-error", rmse, "rad", windows, peer.rmse)
    yield Figure("sysid-seconds", peer_seconds, "s", windows)


if __name__ == "__main__":
    main({"dp-fit": dp_fit, "sp-fit": sp_fit, "house-fit": house_fit, "fit-time": fit_time, "intervals": intervals})
