"""System identification: the parameters of a simulator that reproduce a rollout log over short windows.

    minimise  sum_w 1/R sum_j rho(r_wj / c) + sum_k ((theta_k - mean_k) / std_k)^2 / 2,   rho(u) = sqrt(1 + u^2) - 1,

r_wj: model minus log at the j-th of the R scored samples of window w, started from the measured state; c: `loss_scale`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import torch
from torch import Tensor

from sim2real.episodes import select_episodes
from sim2real.evaluation import Evaluation, EvaluationSettings, evaluate, window_choice
from sim2real.fit_facts import ParameterRow, fit_facts
from sim2real.fit_search import search, unstable_step, without_effect
from sim2real.mdp import ModelMDP
from sim2real.misfit import Misfit, linearize, roll_windows, start_error_growth
from sim2real.params import Params
from sim2real.rollout_log import RolloutLog
from sim2real.solve_report import SolveReport
from sim2real.solvers.least_squares import Minimum
from sim2real.unknowns import Nuisance, make_unknowns, take_apart
from sim2real.windows import WindowError, cut_windows, is_pair, match_channels, subset


@dataclass(frozen=True)
class FitSettings:
    """What is fitted to which windows. Times in s; values in the units of the signals and parameters.

    Raises `ValueError` naming a value that makes no sense.
    """

    free: tuple[str, ...] = ()
    """parameters to fit; empty: all that the model's box names"""
    signals: tuple[str, ...] = ()
    """signals compared with the model; empty: all observed ones that are not rates ("/s") of another"""
    horizon: float = 0.5
    """length of a window, s"""
    stride: float = 0.1
    """time between window starts, s"""
    sample_every: int = 5
    """score every so-manieth sample of a window"""
    first_row: int = 10
    """row of the first window start"""
    margin: int = 10
    """rows unused at the end of a run"""
    start_after: float = 0.0
    """windows start at or after this time, s"""
    end_before: float = float("inf")
    """windows end at or before this time, s"""
    keep: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """a window counts only while these signals stay strictly inside (low, high); angles (rad) wrapped to (-pi, pi]"""
    max_growth: float = float("inf")
    """leave out windows over which the model amplifies a start error by more than this factor"""
    leave_out: tuple[str, ...] = ()
    """episodes kept out of the fit and scored"""
    loss_scale: float = 0.02
    """residual at which the loss turns from quadratic to linear, in the unit of the signals"""
    zeros: Literal["none", "shared", "per_run"] = "none"
    """fit sensor zeros of the compared signals: log = model + zero, and the start state is log - zero"""
    zero_std: float = 0.1
    """weak prior of a zero, in the unit of the signals"""
    delay: bool = False
    """fit one input delay, s, for all runs"""
    delay_start: float = 0.0
    delay_bounds: tuple[float, float] = (0.0, 0.05)
    initial_velocity: bool = False
    """fit one correction per run to each measured rate in the start state"""
    velocity_std: float = 0.5
    """weak prior of that correction, in the unit of the rate"""
    warmup: float = 0.0
    """s of log before the scored part that determine the start state; 0: the measured start"""
    pull: float = 0.02
    """weight of the pull of a warmed-up start towards the measured start"""
    priors: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """name -> (mean, standard deviation), in the unit of the parameter"""
    prior_width: float = 1.0
    """prior of the others: mean = start value, standard deviation = this many box widths; 0: none"""
    max_steps: int = 50
    tolerance: float = 1e-6
    """stop when a step promises a smaller relative decrease of the loss than this"""
    block: float = 2.0
    """shortest block of windows that the intervals delete, s; at least four windows long anyway"""

    def __post_init__(self) -> None:
        window_choice(self)
        inf = float("inf")
        for name, wanted, holds in (
            ("sample_every", ">= 1", self.sample_every >= 1),
            ("max_growth", "> 0", self.max_growth > 0),
            ("loss_scale", "> 0 and finite (unit of the signals)", 0 < self.loss_scale < inf),
            ("zeros", "'none', 'shared' or 'per_run'", self.zeros in ("none", "shared", "per_run")),
            ("zero_std", "> 0", self.zero_std > 0),
            ("delay_bounds", "(low, high)", is_pair(self.delay_bounds)),
            ("velocity_std", "> 0", self.velocity_std > 0),
            ("pull", ">= 0 and finite", 0 <= self.pull < inf),
            ("prior_width", ">= 0", self.prior_width >= 0),
            ("max_steps", ">= 0", self.max_steps >= 0),
            ("tolerance", ">= 0 and finite", 0 <= self.tolerance < inf),
            ("block", ">= 0 and finite", 0 <= self.block < inf),
        ):
            if not holds:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)}")
        for name, prior in self.priors.items():
            if not (is_pair(prior) and abs(prior[0]) < inf and prior[1] > 0):
                raise ValueError(f"the prior of '{name}' needs (mean, standard deviation > 0), got {prior!r}")
        if self.initial_velocity and self.warmup > 0:
            raise ValueError("initial_velocity corrects measured starts; with a warmup the start is not measured")


@dataclass(frozen=True)
class Comparison:
    """Errors of the fitted and of the initial parameters on the same windows; both carry the trivial baselines."""

    fitted: Evaluation
    initial: Evaluation


@dataclass(frozen=True)
class FitResult:
    """What the data say: `theta` all parameters, `nuisance`: "delay" `[]`, "zero" `[q]` or `[runs, q]`, ..."""

    theta: Params
    nuisance: Params
    rows: tuple[ParameterRow, ...]
    """fitted parameters first, then delay, zeros, ... as far as they were fitted"""
    correlation: Tensor
    """`[P, P]`, in the order of `rows`"""
    covariance: Tensor
    """`[P, P]`"""
    spectrum: Tensor
    """`[P]` eigenvalues of the scaled information, largest first"""
    fixed: Tensor
    """`[P]` bool: whether the data fix that direction of the spectrum (not always the largest ones)"""
    directions: tuple[dict[str, float], ...]
    """each: a combination of parameters (name -> component, scaled) that the data do not fix"""
    report: SolveReport
    history: tuple[dict[str, float], ...]
    """before each step: "step", "loss", "gradient", "damping", "taken" (0: refused) and "stage" (0: rough fit on some
    of the windows, 1: scan of the delay, 2: fit on all windows); losses of different stages do not compare"""
    training: Comparison
    """errors on the training windows"""
    left_out: Comparison | None
    """errors on the episodes of `leave_out`"""
    notes: tuple[str, ...]


def fit(
    mdp: ModelMDP,
    log: RolloutLog,
    theta: Params,
    settings: FitSettings = FitSettings(),
    *,
    on_step: Callable[[Params], None] | None = None,
    state: Params | None = None,
) -> FitResult:
    """Fit `theta` (start values of all parameters) to `log`.

    `on_step` gets an exact snapshot (flat dict of tensors) after every step; a run resumed from it (`state`) ends
    bitwise equal to the unbroken one. Raises `WindowError` (a `ValueError`) when log and model do not go together, and
    `ValueError` for names that the model or the log does not have, or a start at which the model diverges.
    """
    runs = _training_runs(log, settings)
    misfit, notes = build_misfit(mdp, runs, theta, settings)
    left_out = _left_out(mdp, log, settings)
    silent, notes = without_effect(misfit), (*notes, *unstable_step(misfit))
    found = search(misfit, max_steps=settings.max_steps, tolerance=settings.tolerance, on_step=on_step, state=state)
    fitted, nuisance = take_apart(misfit.unknowns, found.x).theta, _nuisance(misfit, settings, found.x)
    facts = fit_facts(misfit, found, silent, block=settings.block)
    on_any_run = {key: value for key, value in nuisance.items() if key == "delay" or settings.zeros == "shared"}
    return FitResult(
        theta=fitted,
        nuisance=nuisance,
        rows=facts.rows,
        correlation=facts.correlation,
        covariance=facts.covariance,
        spectrum=facts.spectrum,
        fixed=facts.fixed,
        directions=facts.directions,
        report=found.report,
        history=_history(found),
        training=_compare(mdp, runs, fitted, nuisance, theta, _scoring(settings)),
        left_out=None if left_out is None else _compare(mdp, left_out[0], fitted, on_any_run, theta, left_out[1]),
        notes=(*notes, *facts.notes, *_unconverged(found)),
    )


def _training_runs(log: RolloutLog, settings: FitSettings) -> RolloutLog:
    runs = log.names["episode"]
    strange = [name for name in settings.leave_out if name not in runs]
    if strange:
        raise ValueError(f"leave_out names {strange}; the log has the episodes {list(runs)}")
    kept = [name for name in runs if name not in settings.leave_out]
    if not kept:
        raise ValueError(f"leave_out names all of the episodes {list(runs)}; at least one must be left to fit")
    return select_episodes(log, kept)


def build_misfit(
    mdp: ModelMDP, log: RolloutLog, theta: Params, settings: FitSettings
) -> tuple[Misfit, tuple[str, ...]]:
    """The misfit that `fit` minimises over all episodes of `log`, and notes on the choice of windows.

    Raises as `fit` does.
    """
    missing = [name for name in mdp.box.default if name not in theta]
    if missing:
        raise ValueError(f"theta lacks {missing}; start from default_params(mdp.box)")
    channels = match_channels(mdp, log, settings.signals, warmup=settings.warmup > 0)
    windows = cut_windows(mdp, log, channels, window_choice(settings), sample_every=settings.sample_every)
    unknowns = make_unknowns(
        mdp,
        log,
        channels,
        theta,
        settings.free or tuple(key for key in theta if key in mdp.box.default),
        Nuisance(
            delay=(settings.delay_start, *settings.delay_bounds) if settings.delay else None,
            zeros=settings.zeros,
            zero_std=settings.zero_std,
            rates="per_run" if settings.initial_velocity else "none",
            rate_std=settings.velocity_std,
        ),
        priors=settings.priors,
        prior_width=settings.prior_width,
    )
    if not len(unknowns.start):
        raise ValueError(
            f"nothing to fit: theta holds {sorted(theta)}, the model's box has defaults for {sorted(mdp.box.default)}; "
            f"name the parameters in free"
        )
    misfit = Misfit(mdp, log, channels, windows, unknowns, settings.loss_scale, settings.pull)
    return _usable_windows(misfit, settings)


def _usable_windows(misfit: Misfit, settings: FitSettings) -> tuple[Misfit, tuple[str, ...]]:
    """Leave out the windows that grow start errors beyond `max_growth`; refuse a start at which the model diverges."""
    rolled = roll_windows(misfit, misfit.unknowns.start)
    count, notes = len(misfit.windows.episode), []
    if settings.max_growth < float("inf"):
        calm = start_error_growth(misfit, linearize(misfit, rolled, ())) <= settings.max_growth
        left = int(calm.sum())
        if not left:
            raise WindowError(f"all {count} windows grow start errors by more than max_growth = {settings.max_growth}")
        if left < count:
            notes.append(
                f"{count - left} of {count} windows left out: at the start values they grow a start error more than "
                f"{settings.max_growth:g} times"
            )
        misfit = replace(misfit, windows=subset(misfit.windows, calm))
        rolled = roll_windows(misfit, misfit.unknowns.start)
    lost = (~torch.isfinite(rolled.residual).flatten(1).all(1)).sum()
    if bool(lost):
        raise ValueError(
            f"at the start values the model diverges in {int(lost)} of {len(rolled.residual)} windows; shorten the "
            f"horizon, start from other values, use more substeps, or leave such windows out with max_growth"
        )
    for run in sorted(set(range(len(misfit.log.names["episode"]))) - set(misfit.windows.episode.tolist())):
        notes.append(f"episode '{misfit.log.names['episode'][run]}' has no window and is not used")
    return misfit, tuple(notes)


def _nuisance(misfit: Misfit, settings: FitSettings, x: Tensor) -> Params:
    values = take_apart(misfit.unknowns, x)
    nuisance = {} if values.delay is None else {"delay": values.delay}
    if settings.zeros != "none":
        nuisance["zero"] = values.zero if settings.zeros == "per_run" else values.zero[0]
    if settings.initial_velocity:
        nuisance["start_rate"] = values.rate
    return nuisance


def _scoring(settings: FitSettings) -> EvaluationSettings:
    shared = {field.name for field in fields(settings)} & {field.name for field in fields(EvaluationSettings)}
    return EvaluationSettings(**{name: getattr(settings, name) for name in shared - {"zeros", "max_growth"}})


def _left_out(mdp: ModelMDP, log: RolloutLog, settings: FitSettings) -> tuple[RolloutLog, EvaluationSettings] | None:
    """The runs of `leave_out` and how they are scored; raises now, not after the fit, when no window fits.

    Their zeros come from their own first seconds, if each run is long enough to be scored after them.
    """
    if not settings.leave_out:
        return None
    runs, scoring = select_episodes(log, settings.leave_out), _scoring(settings)
    start = max(settings.start_after, scoring.zero_until)
    needed = start + settings.horizon + settings.warmup + (settings.margin + 1) * log.dt
    if settings.zeros == "per_run" and float(runs.mask.sum(1).min()) * log.dt >= needed:
        scoring = replace(scoring, zeros="estimated", start_after=start)
    channels = match_channels(mdp, runs, settings.signals, warmup=settings.warmup > 0)
    cut_windows(mdp, runs, channels, window_choice(scoring))
    return runs, scoring


def _compare(
    mdp: ModelMDP, log: RolloutLog, fitted: Params, nuisance: Params, initial: Params, scoring: EvaluationSettings
) -> Comparison:
    """Both on the same windows, told apart by the growth of start errors in the fitted model."""
    after = evaluate(mdp, log, fitted, nuisance, scoring)
    return Comparison(after, evaluate(mdp, log, initial, None, scoring, growth=after.growth))


def _history(found: Minimum) -> tuple[dict[str, float], ...]:
    names = ("loss", "gradient", "damping", "taken", "stage")
    rows = found.history.tolist()
    return tuple({"step": float(k)} | dict(zip(names, row, strict=True)) for k, row in enumerate(rows))


def _unconverged(found: Minimum) -> tuple[str, ...]:
    return () if found.report.converged else (f"the fit did not converge: {found.report.status}",)
