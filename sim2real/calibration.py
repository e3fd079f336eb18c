"""Predictive calibration of a model on a real log: do its prediction intervals hold what they promise?

Windows of the log start from measured states and are simulated with the recorded inputs. The prediction h steps on is
Gaussian around the simulation, with the covariance S_h of the residuals `r_h = log - model` at a reference theta (the
fit):

    log_{t+h} ~ N(model_h(theta), S_h),     S_h = mean over the windows of *other* runs of r_h r_h' at the reference.

Leaving out the run that is predicted keeps the figure honest; a single run is cut into blocks of time instead. The
noise of the model itself is set to zero in the simulation: S_h holds whatever the model leaves unexplained, sensor
noise included, and no mean is taken off, so that a bias costs coverage. With z the 2-sided normal quantile of level p,

    coverage_h(p) = share of |r_h| <= z(p) S_h^1/2,     u_h = Phi(r_h / S_h^1/2)  (uniform if calibrated),
    nll_h = mean of (r_h' S_h^-1 r_h + log det 2 pi S_h) / 2   (nat, lower is better; a proper score).

A theta tuned for return is scored with the S_h of the fit: where it predicts worse its intervals are too narrow, and
that is the price. References: Dawid, JRSS A 147 (1984) 278 (the probability integral transform u); Gneiting, Balabdaoui
and Raftery, JRSS B 69 (2007) 243 (calibration and sharpness).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sim2real.delay import delayed_actions
from sim2real.estimators.logged_policy_gradient import jackknife_stderr
from sim2real.mdp import ModelMDP
from sim2real.misfit import Misfit, roll_windows
from sim2real.params import Params
from sim2real.rollout_log import RolloutLog
from sim2real.unknowns import Nuisance, make_unknowns
from sim2real.windows import WindowChoice, WindowError, cut_windows, match_channels

_BLOCKS = 8  # blocks of time that stand for runs when there is only one


@dataclass(frozen=True)
class CalibrationSettings:
    """What is predicted. Raises `ValueError` naming a value that makes no sense."""

    signals: tuple[str, ...] = ()
    """empty: all that are not rates ("/s") of another"""
    windows: WindowChoice = field(default_factory=lambda: WindowChoice(horizon=0.5, stride=0.1))
    horizons: int = 5
    """how many steps ahead are scored: 1, the whole window, and those between in equal ratios"""
    levels: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
    """expected coverages"""
    bins: int = 10
    """of the histogram of u"""
    pull: float = 0.02
    """weight of the pull of a warmed-up start towards the measured start"""

    def __post_init__(self) -> None:
        for name, wanted, holds in (
            ("horizons", ">= 1", self.horizons >= 1),
            ("levels", "in (0, 1), at least one", self.levels and all(0 < level < 1 for level in self.levels)),
            ("bins", ">= 2", self.bins >= 2),
            ("pull", ">= 0 and finite", 0 <= self.pull < math.inf),
        ):
            if not holds:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Calibration:
    """Figures of one theta; H horizons, q signals, L levels."""

    signals: tuple[str, ...]
    unit: str
    seconds: tuple[float, ...]
    """the H horizons, s"""
    rmse: Tensor
    """`[H, q]`; infinite where the model diverges"""
    nll: Tensor
    """`[H]` nat per window"""
    levels: Tensor
    """`[L]` expected coverages"""
    coverage: Tensor
    """`[H, L]` observed, over all signals"""
    coverage_stderr: Tensor
    """`[H, L]` by leaving out one run (or block) at a time"""
    histogram: Tensor
    """`[H, bins]` shares of u; 1 / bins each if calibrated"""
    miscalibration: float
    """mean distance of the observed from the expected coverage, over horizons and levels"""
    windows: int
    lost: int
    """windows in which the model diverged: outside of every interval, not in the histogram"""


@dataclass(frozen=True)
class _Residuals:
    """log - model of every window."""

    values: Tensor
    """`[W, H, q]`"""
    groups: Tensor
    """`[W]` the group each is left out with"""
    steps: tuple[int, ...]
    signals: tuple[str, ...]
    unit: str


def calibrate(
    mdp: ModelMDP,
    log: RolloutLog,
    theta: Params,
    *,
    reference: Params | None = None,
    nuisance: Params | None = None,
    settings: CalibrationSettings = CalibrationSettings(),
) -> Calibration:
    """Calibration of `theta` on `log`, with the spread of the residuals at `reference` (None: theta itself).

    `nuisance` as in `evaluate`: "delay" `[]` in s and "zero" `[q]` or `[B, q]`. Raises `WindowError` when log and model
    do not go together or no window fits, `ValueError` when the residuals of the reference do not span the signals or
    are not finite.
    """
    own = _residuals(mdp, log, theta, nuisance, settings)
    other = own if reference is None else _residuals(mdp, log, reference, nuisance, settings)
    factors, r = _spread(other)[own.groups], own.values  # [W, H, q, q], [W, H, q]
    finite = torch.isfinite(r).flatten(1).all(1)
    scaled = r / (factors @ factors.mT).diagonal(dim1=-2, dim2=-1).sqrt()
    levels = torch.tensor(settings.levels, dtype=r.dtype)
    bound = torch.special.ndtri(0.5 * (1 + levels))
    inside = ((scaled.abs().unsqueeze(-1) <= bound) & finite[:, None, None, None]).to(r.dtype).mean(2)  # [W, H, L]
    whitened = torch.linalg.solve_triangular(factors, r.unsqueeze(-1), upper=False).squeeze(-1)
    size = factors.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    nll = 0.5 * whitened.square().sum(-1) + size + 0.5 * r.shape[-1] * math.log(2 * math.pi)
    coverage = inside.mean(0)
    return Calibration(
        signals=own.signals,
        unit=own.unit,
        seconds=tuple(step * log.dt for step in own.steps),
        rmse=_or_infinite(r.square(), finite).mean(0).sqrt(),
        nll=_or_infinite(nll, finite).mean(0),
        levels=levels,
        coverage=coverage,
        coverage_stderr=_by_leaving_out(inside, own.groups),
        histogram=_histogram(torch.special.ndtr(scaled[finite]), settings.bins),
        miscalibration=float((coverage - levels).abs().mean()),
        windows=len(r),
        lost=int((~finite).sum()),
    )


def _residuals(
    mdp: ModelMDP, log: RolloutLog, theta: Params, nuisance: Params | None, settings: CalibrationSettings
) -> _Residuals:
    """Simulate every window; the groups are the runs, or blocks of time of a single one."""
    nuisance = {} if nuisance is None else nuisance
    if "delay" in nuisance:
        log = replace(log, actions=delayed_actions(log, nuisance["delay"]))
    channels = match_channels(mdp, log, settings.signals, warmup=settings.windows.warmup > 0)
    windows = cut_windows(mdp, log, channels, settings.windows)
    runs, q = len(log.names["episode"]), len(channels.signals)
    zero = nuisance.get("zero", torch.zeros(q)).to(log.signals)
    if zero.shape not in ((q,), (runs, q)):
        raise WindowError(f"nuisance['zero'] has shape {list(zero.shape)}; expected [{q}] or [{runs}, {q}]")
    unknowns = make_unknowns(mdp, log, channels, theta, (), Nuisance(zeros="per_run"))
    misfit = Misfit(mdp, log, channels, windows, unknowns, scale=None, pull=settings.pull)
    residual = -roll_windows(misfit, zero.expand(runs, q).reshape(-1)).residual
    count = residual.shape[1]
    exponents = torch.linspace(0, 1, settings.horizons, dtype=torch.float64) if settings.horizons > 1 else torch.ones(1)
    ahead = sorted({round(float(count**exponent)) for exponent in exponents})
    present, group = torch.unique(windows.episode, return_inverse=True)
    if len(present) == 1:
        group = torch.arange(len(residual)) * min(_BLOCKS, len(residual)) // len(residual)
    rows = torch.tensor(ahead) - 1
    return _Residuals(residual[:, rows], group, tuple(ahead), channels.signals, channels.unit)


def _spread(residuals: _Residuals) -> Tensor:
    """Cholesky factors `[G, H, q, q]` of the second moments of all windows that are not in the group."""
    r = residuals.values
    if not bool(torch.isfinite(r).all()):
        raise ValueError("the model diverges on the log at the reference parameters: nothing to measure its spread by")
    group = torch.nn.functional.one_hot(residuals.groups).to(r.dtype)
    others = 1 - group if group.shape[1] > 1 else group
    moments = torch.einsum("wg,whi,whj->ghij", others / others.sum(0), r, r)
    factors, failed = torch.linalg.cholesky_ex(moments)
    # beyond the rounding of the products a signal is a combination of the others, or is predicted without any error
    flat = factors.diagonal(dim1=-2, dim2=-1).square() <= 1e-14 * moments.diagonal(dim1=-2, dim2=-1)
    if bool(failed.any()) or bool(flat.any()):
        raise ValueError(
            f"the residuals of {list(residuals.signals)} at the reference do not span all signals on "
            f"{len(r)} windows: name fewer signals, or use more windows"
        )
    return factors


def _or_infinite(values: Tensor, finite: Tensor) -> Tensor:
    """`values [W, ...]`, infinite in the windows that are lost."""
    return torch.where(finite.reshape(-1, *(1,) * (values.ndim - 1)), values, torch.full_like(values, torch.inf))


def _by_leaving_out(inside: Tensor, groups: Tensor) -> Tensor:
    """Standard error `[H, L]` of the mean of `inside [W, H, L]`; NaN when there is one group only."""
    group = torch.nn.functional.one_hot(groups).to(inside.dtype)
    if group.shape[1] < 2:
        return torch.full_like(inside[0], torch.nan)
    left = (1 - group) / (1 - group).sum(0)
    return jackknife_stderr(torch.einsum("wg,whl->ghl", left, inside))


def _histogram(u: Tensor, bins: int) -> Tensor:
    """Shares `[H, bins]` of u `[W, H, q]`."""
    if not len(u):
        return u.new_zeros(u.shape[1], bins)
    rows = u.transpose(0, 1).flatten(1)
    return torch.stack([torch.histc(row, bins, 0.0, 1.0) for row in rows]) / rows.shape[1]
