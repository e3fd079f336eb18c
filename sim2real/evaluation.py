"""Errors of a parameter set on a log: open-loop windows from measured (or warmed-up) starts.

Window error e_w = mean over scored samples and signals of (model - log)^2; RMSE = sqrt(mean_w e_w);
median = median_w sqrt(e_w).
A window that is not finite has error infinity.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from sim2real.delay import delayed_actions
from sim2real.gauss_newton import objective
from sim2real.mdp import ModelMDP
from sim2real.misfit import Misfit, Rolled, linearize, roll_windows, start_error_growth
from sim2real.params import Params
from sim2real.rollout_log import RolloutLog
from sim2real.solve_report import UnconvergedWarning
from sim2real.solvers.least_squares import levenberg_marquardt
from sim2real.unknowns import Nuisance, make_unknowns
from sim2real.windows import Channels, WindowChoice, WindowError, Windows, cut_windows, match_channels, steps_of, subset


def window_choice(settings: Any) -> WindowChoice:
    """The fields of `FitSettings` or `EvaluationSettings` that choose windows."""
    return WindowChoice(**{field.name: getattr(settings, field.name) for field in fields(WindowChoice)})


@dataclass(frozen=True)
class EvaluationSettings:
    """Which windows are scored; fields as in `FitSettings`. Times in s. Raises `ValueError` naming a wrong value."""

    signals: tuple[str, ...] = ()
    horizon: float = 0.5
    stride: float = 0.1
    first_row: int = 10
    margin: int = 10
    start_after: float = 0.0
    end_before: float = float("inf")
    keep: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    max_growth: float = 10.0
    """windows over which the model amplifies a start error by more are left out of the `calm` figures"""
    zeros: Literal["none", "estimated"] = "none"
    """estimated: each run's sensor zeros from its own windows of `zero_horizon` that end at or before `zero_until`; the
    windows that are scored then start at or after it"""
    zero_horizon: float = 0.5
    zero_until: float = 2.0
    warmup: float = 0.0
    pull: float = 0.02
    season: float = 0.0
    """s; > 0 adds the baseline "the value one season (a week: 604800) before" """

    def __post_init__(self) -> None:
        window_choice(self)
        inf = float("inf")
        for name, wanted, holds in (
            ("max_growth", "> 0", self.max_growth > 0),
            ("zeros", "'none' or 'estimated'", self.zeros in ("none", "estimated")),
            ("zero_horizon", "> 0 and finite", 0 < self.zero_horizon < inf),
            ("zero_until", "> 0 and finite", 0 < self.zero_until < inf),
            ("pull", ">= 0 and finite", 0 <= self.pull < inf),
            # a shorter season would repeat values that a forecast from the start cannot know
            ("season", "0, or finite and at least the horizon", self.season == 0 or self.horizon <= self.season < inf),
        ):
            if not holds:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)}")


@dataclass(frozen=True)
class RunScore:
    """Errors of one episode."""

    episode: str
    rmse: float
    median: float
    windows: int
    hold_first: float
    zero: tuple[float, ...]
    """estimated or given sensor zeros of the compared signals"""


@dataclass(frozen=True)
class Evaluation:
    """Errors in the unit of the compared signals; tensors are per window, over all runs in order."""

    rmse: float
    median: float
    windows: int
    calm_rmse: float
    """over windows whose start error grows by at most `max_growth`; NaN when there are none"""
    calm_median: float
    calm_windows: int
    hold_first: float
    """RMSE of holding the last value known at the start"""
    baselines: dict[str, float]
    """name -> RMSE: "hold-first-value" and, with `season`, "season-before" """
    runs: tuple[RunScore, ...]
    signals: tuple[str, ...]
    unit: str
    dt: float
    errors: Tensor
    """`[W]` sqrt(e_w)"""
    growth: Tensor
    """`[W]` largest factor by which the model amplifies a start error"""
    episodes: Tensor
    """`[W]` index of the run"""
    starts: Tensor
    """`[W]` row of the start state"""
    rows: Tensor
    """`[R]` scored rows, relative to the start row"""
    predicted: Tensor
    """`[W, R, q]` model signals (zero added)"""
    measured: Tensor
    """`[W, R, q]`"""


@dataclass(frozen=True)
class _Scored:
    """The windows of a log simulated at given parameters."""

    misfit: Misfit
    rolled: Rolled
    growth: Tensor


def evaluate(
    mdp: ModelMDP,
    log: RolloutLog,
    theta: Params,
    nuisance: Params | None = None,
    settings: EvaluationSettings = EvaluationSettings(),
    *,
    growth: Tensor | None = None,
) -> Evaluation:
    """Score `theta` on `log`; `growth [W]` of the windows is found with `theta` itself unless given.

    nuisance, as `fit` returns it: "delay" `[]` in s; "zero" `[q]` shared, or `[B, q]` one row per episode of `log`
    (used unless `zeros` is "estimated"); anything else in it belongs to the runs of the fit and is not used. Raises
    `WindowError` when log and model do not go together or no window fits.
    """
    nuisance = {} if nuisance is None else nuisance
    if "delay" in nuisance:
        log = replace(log, actions=delayed_actions(log, nuisance["delay"]))
    channels = match_channels(mdp, log, settings.signals, warmup=settings.warmup > 0)
    choice = window_choice(settings)
    if settings.zeros == "estimated":
        # no window is scored with a zero that was fitted to it
        choice = replace(choice, start_after=max(choice.start_after, settings.zero_until))
    windows = cut_windows(mdp, log, channels, choice)
    if settings.zeros == "estimated":
        zero = estimate_zeros(mdp, log, channels, theta, settings)
    else:
        zero = _given_zeros(nuisance, log, channels)
    misfit = _with_zeros(mdp, log, channels, windows, theta, settings.pull)
    rolled = roll_windows(misfit, zero.reshape(-1))
    if growth is None:
        growth = start_error_growth(misfit, linearize(misfit, rolled))
    elif growth.shape != windows.start.shape:
        raise WindowError(f"growth has shape {tuple(growth.shape)}, there are {len(windows.start)} windows")
    return _summary(_Scored(misfit, rolled, growth), log, settings, zero)


def _given_zeros(nuisance: Params, log: RolloutLog, channels: Channels) -> Tensor:
    shape = (len(log.names["episode"]), len(channels.signals))
    if "zero" not in nuisance:
        return log.signals.new_zeros(shape)
    zero = nuisance["zero"]
    if zero.shape not in (shape, shape[1:]):
        raise WindowError(
            f"nuisance['zero'] has shape {tuple(zero.shape)}; {list(channels.signals)} on {shape[0]} episodes need "
            f"{shape[1:]} or {shape}; zeros of other runs do not carry over: estimate them (zeros='estimated')"
        )
    return zero.to(log.signals).expand(shape)


def _with_zeros(
    mdp: ModelMDP, log: RolloutLog, channels: Channels, windows: Windows, theta: Params, pull: float
) -> Misfit:
    """The misfit of theta with nothing unknown but the zeros of each run, in plain squares."""
    unknowns = make_unknowns(mdp, log, channels, theta, (), Nuisance(zeros="per_run"))
    return Misfit(mdp, log, channels, windows, unknowns, scale=None, pull=pull)


def estimate_zeros(
    mdp: ModelMDP, log: RolloutLog, channels: Channels, theta: Params, settings: EvaluationSettings
) -> Tensor:
    """Sensor zeros `[B, q]`: each run's minimise the squares over its own windows that end by `zero_until`, from 0."""
    choice = replace(
        window_choice(settings), horizon=settings.zero_horizon, start_after=0.0, end_before=settings.zero_until
    )
    windows = cut_windows(mdp, log, channels, choice)
    misfit = _with_zeros(mdp, log, channels, windows, theta, settings.pull)
    finite = torch.isfinite(roll_windows(misfit, misfit.unknowns.start).residual).flatten(1).all(1)
    found_in = set(windows.episode[finite].tolist())
    if lost := [name for run, name in enumerate(log.names["episode"]) if run not in found_in]:
        warnings.warn(f"no finite window tells the sensor zeros of {lost}: taken as 0", UserWarning, stacklevel=3)
    if not found_in:
        return misfit.unknowns.start[misfit.unknowns.zero]
    problem = objective(replace(misfit, windows=subset(windows, finite)))
    found = levenberg_marquardt(problem, misfit.unknowns.start, tolerance=1e-6)
    if not found.report.converged:
        warnings.warn(f"the sensor zeros did not converge: {found.report.status}", UnconvergedWarning, stacklevel=3)
    return found.x[misfit.unknowns.zero]


def _errors(residual: Tensor) -> Tensor:
    """e_w `[W]` of residuals `[W, R, q]`, infinite where one is not finite."""
    squares = residual.square().flatten(1).mean(1)
    return torch.where(torch.isfinite(squares), squares, torch.full_like(squares, torch.inf))


def _rmse(squares: Tensor) -> float:
    return float(squares.mean().sqrt()) if len(squares) else float("nan")


def _median(squares: Tensor) -> float:
    """Median of sqrt(e_w), infinite when half of the windows or more are lost."""
    if not len(squares):
        return float("nan")
    ordered = squares.sqrt().sort().values
    return float(ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def _summary(scored: _Scored, log: RolloutLog, settings: EvaluationSettings, zero: Tensor) -> Evaluation:
    misfit, windows = scored.misfit, scored.misfit.windows
    squares = _errors(scored.rolled.residual)
    held = _errors(windows.warm_signals[:, -1:] - windows.measured)
    calm = scored.growth <= settings.max_growth
    baselines = {"hold-first-value": _rmse(held)}
    if settings.season > 0:
        baselines["season-before"] = _season_before(misfit, log, settings.season)
    runs = tuple(
        RunScore(name, _rmse(squares[own]), _median(squares[own]), int(own.sum()), _rmse(held[own]), tuple(z.tolist()))
        for run, (name, z) in enumerate(zip(log.names["episode"], zero, strict=True))
        for own in [windows.episode == run]
    )
    return Evaluation(
        rmse=_rmse(squares),
        median=_median(squares),
        windows=len(squares),
        calm_rmse=_rmse(squares[calm]),
        calm_median=_median(squares[calm]),
        calm_windows=int(calm.sum()),
        hold_first=baselines["hold-first-value"],
        baselines=baselines,
        runs=runs,
        signals=misfit.channels.signals,
        unit=misfit.channels.unit,
        dt=log.dt,
        errors=squares.sqrt(),
        growth=scored.growth,
        episodes=windows.episode,
        starts=windows.start,
        rows=windows.rows,
        predicted=scored.rolled.predicted,
        measured=windows.measured,
    )


def _season_before(misfit: Misfit, log: RolloutLog, season: float) -> float:
    """RMSE of repeating the value one season earlier, over the windows whose run reaches back that far."""
    windows, back = misfit.windows, steps_of(season, log.dt, "season")
    rows = windows.start.unsqueeze(1) + windows.rows - back
    never = torch.zeros_like(log.mask[:, :1])
    measured = torch.cat([log.mask, never], 1) | torch.cat([never, log.mask], 1)  # a row next to a real step
    known = (rows >= 0).all(1) & measured[windows.episode.unsqueeze(1), rows.clamp(min=0)].all(1)
    before = log.signals[windows.episode[known].unsqueeze(1), rows[known]][..., misfit.channels.logged]
    return _rmse(_errors(before - windows.measured[known]))
