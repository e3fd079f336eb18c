"""System identification: the parameters of a simulator that reproduce a rollout log over short windows.

    minimise  sum_w 1/R sum_j rho(r_wj / c) + sum_k ((theta_k - mean_k) / std_k)^2 / 2,   rho(u) = sqrt(1 + u^2) - 1,

r_wj: model minus log at the j-th of the R scored samples of window w, started from the measured state; c: `loss_scale`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from sim2real.evaluation import Evaluation
from sim2real.mdp import ModelMDP
from sim2real.params import Params
from sim2real.rollout_log import RolloutLog
from sim2real.solve_report import SolveReport


@dataclass(frozen=True)
class FitSettings:
    """What is fitted to which windows. Times in s; values in the units of the signals and parameters."""

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
    tolerance: float = 1e-8
    """stop when a step promises a smaller relative decrease of the loss than this"""
    block: float = 2.0
    """length of the blocks that the intervals delete, s"""


@dataclass(frozen=True)
class ParameterRow:
    """One line of the result table; `low`, `high`: 90 % interval (NaN where the data fix nothing)."""

    name: str
    value: float
    unit: str
    low: float
    high: float
    prior: tuple[float, float] | None
    at_bound: bool
    reaches_output: bool
    identified: bool
    initial: float


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
    directions: tuple[dict[str, float], ...]
    """each: a combination of parameters (name -> component, scaled) that the data do not fix"""
    report: SolveReport
    history: tuple[dict[str, float], ...]
    """per step: "step", "loss", "gradient", "damping", "seconds" """
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
    bitwise equal to the unbroken one.
    """
    raise NotImplementedError
