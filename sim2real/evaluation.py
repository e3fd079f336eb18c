"""Errors of a parameter set on a log: open-loop windows from measured (or warmed-up) starts.

Window error e_w = mean over scored samples and signals of (model - log)^2; RMSE = sqrt(mean_w e_w);
median = median_w sqrt(e_w).
A window that is not finite has error infinity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from sim2real.log import RolloutLog
from sim2real.mdp import ModelMDP
from sim2real.params import Params


@dataclass(frozen=True)
class EvaluationSettings:
    """Which windows are scored; fields as in `FitSettings`. Times in s."""

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
    """estimated: each run's sensor zeros from its own windows of `zero_horizon` that end at or before `zero_until`"""
    zero_horizon: float = 0.5
    zero_until: float = 2.0
    warmup: float = 0.0
    pull: float = 0.02
    season: float = 0.0
    """s; > 0 adds the baseline "the value one season (a week: 604800) before" """


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


def evaluate(
    mdp: ModelMDP,
    log: RolloutLog,
    theta: Params,
    nuisance: Params | None = None,
    settings: EvaluationSettings = EvaluationSettings(),
) -> Evaluation:
    """Score `theta` on `log`; `nuisance`: "delay" `[]` s and "zero" `[q]` (shared) as `fit` returns them."""
    raise NotImplementedError
