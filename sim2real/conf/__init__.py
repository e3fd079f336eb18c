"""Configuration of the `sim2real` command: plain dataclasses, each key with its unit and meaning.

They mirror the settings dataclasses of the library (a test keeps the defaults equal) in the types that Hydra composes:
lists for tuples, strings for literals. Only this package and `cli.py` know Hydra.
"""
# ruff: noqa: RUF009 (`key` makes a new default each time)

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from sim2real.conf.keys import key
from sim2real.conf.models import MODELS

_INF = float("inf")
CUSTOM = "custom"
"""the group node of a model of the user's own: `model._target_=my_package.my_model`, its arguments model.KEY=VALUE"""


@dataclass
class LinearPolicy:
    """`a = -K s (+ k)`"""

    kind: str = "linear"
    std: float = key(0.0, "action", "standard deviation of the exploration; 0: deterministic")
    offset: bool = key(False, "", "with a constant k")
    gain: list[Any] = key([], "action/state", "start gain, rows of K; default: zeros")
    target: list[float] = key([], "state", "the policy sees the state less this, such as [3.1416,0]; default: zeros")


@dataclass
class MLPPolicy:
    """`a = network(s)`, tanh layers"""

    kind: str = "mlp"
    hidden: list[int] = key([16], "", "widths of the hidden layers")
    target: list[float] = key([], "state", "the policy sees the state less this; default: zeros")
    std: float = key(0.0, "action", "standard deviation of the exploration; 0: deterministic")


POLICIES: dict[str, type] = {"linear": LinearPolicy, "mlp": MLPPolicy}
GROUPS = {"model": MODELS, "policy": POLICIES}


@dataclass
class FitOptions:
    """Mirror of `sim2real.fit.FitSettings`; `fixed` is the complement of `free`."""

    free: list[str] = key([], "", "parameters to fit; default: all")
    fixed: list[str] = key([], "", "parameters to hold at their start value")
    signals: list[str] = key([], "", "signals compared with the model; default: all that are not rates of another")
    horizon: float = key(0.5, "s", "length of a window")
    stride: float = key(0.1, "s", "time between window starts")
    sample_every: int = key(5, "rows", "score every so-manieth sample of a window")
    first_row: int = key(10, "rows", "row of the first window start")
    margin: int = key(10, "rows", "rows unused at the end of a run")
    start_after: float = key(0.0, "s", "windows start at or after this time")
    end_before: float = key(_INF, "s", "windows end at or before this time")
    keep: dict[str, Any] = key({}, "signal", "fit.keep.NAME=[low,high]: a window counts only while NAME stays inside")
    max_growth: float = key(_INF, "1", "leave out windows over which the model amplifies a start error by more")
    loss_scale: float = key(0.02, "signal", "residual at which the loss turns from quadratic to linear")
    zeros: str = key("none", "", "sensor zeros to fit", choices=("none", "shared", "per_run"))
    zero_std: float = key(0.1, "signal", "weak prior of a zero")
    delay: bool = key(False, "", "fit one input delay for all runs")
    delay_start: float = key(0.0, "s", "start value of the delay")
    delay_bounds: list[float] = key([0.0, 0.05], "s", "bounds of the delay")
    initial_velocity: bool = key(False, "", "fit one correction per run to each measured rate in the start state")
    velocity_std: float = key(0.5, "signal/s", "weak prior of that correction")
    warmup: float = key(0.0, "s", "log before the scored part that determines the start state; 0: measured start")
    pull: float = key(0.02, "1", "weight of the pull of a warmed-up start towards the measured start")
    priors: dict[str, Any] = key({}, "parameter", "fit.priors.NAME=[mean,std]")
    prior_width: float = key(1.0, "box", "standard deviation of the other priors, in widths of the box; 0: none")
    max_steps: int = key(50, "", "most Levenberg-Marquardt steps")
    tolerance: float = key(1e-6, "1", "stop when a step promises a smaller relative decrease of the loss")
    block: float = key(2.0, "s", "shortest block of windows that the intervals delete")


@dataclass
class EvaluationOptions:
    """Mirror of `sim2real.evaluation.EvaluationSettings`."""

    signals: list[str] = key([], "", "signals compared with the model; default: all that are not rates of another")
    horizon: float = key(0.5, "s", "length of a window")
    stride: float = key(0.1, "s", "time between window starts")
    first_row: int = key(10, "rows", "row of the first window start")
    margin: int = key(10, "rows", "rows unused at the end of a run")
    start_after: float = key(0.0, "s", "windows start at or after this time")
    end_before: float = key(_INF, "s", "windows end at or before this time")
    keep: dict[str, Any] = key({}, "signal", "evaluation.keep.NAME=[low,high]: a window counts while NAME is inside")
    max_growth: float = key(10.0, "1", "windows with larger growth of a start error are left out of `calm` figures")
    zeros: str = key("none", "", "sensor zeros of each run from its first seconds", choices=("none", "estimated"))
    zero_horizon: float = key(0.5, "s", "length of the windows that estimate a zero")
    zero_until: float = key(2.0, "s", "they end at or before this time")
    warmup: float = key(0.0, "s", "log before the scored part that determines the start state; 0: measured start")
    pull: float = key(0.02, "1", "weight of the pull of a warmed-up start towards the measured start")
    season: float = key(0.0, "s", "> 0 adds the baseline 'the value one season before' (a week: 604800)")


@dataclass
class TuneOptions:
    """Mirror of `sim2real.tuning.TuneSettings`."""

    max_steps: int = key(20, "", "iterations after the first")
    radius: float = key(
        0.5, "scaled", "first trust-region radius; a parameter's scale is its start value, else a tenth of its box"
    )
    max_radius: float = key(4.0, "scaled", "largest trust-region radius")
    min_radius: float = key(1e-6, "scaled", "the search ends when the radius falls below")
    confidence: float = key(0.95, "1", "confidence with which the real return must have fallen to undo a step")
    gradient_tol: float = key(1e-8, "1", "the search ends when the scaled gradient is below, relative to |J_real|")
    damping: float = key(0.0, "return", "added to -J_nunu in the sensitivity; 0: chosen from its spectrum")
    likelihood_weight: float = key(0.0, "return/nat", "how strongly theta is kept near the log's likelihood")
    use_freedom: bool = key(True, "", "after a fit: in the end move theta, where the policy stays the same, to the fit")
    freedom_tol: float = key(1e-6, "1", "largest fall of the real return this may cost, relative to |J_real|")
    trade_off: int = key(0, "", "after a fit: points of the curve of real return against likelihood, such as 5")
    certify: bool = key(True, "", "refuse parameters at which the gradient is not certified")
    error_tol: float = key(0.05, "1", "largest error of a certified gradient, relative to its norm; below 1")
    audit: int = key(0, "", "directions along which a certificate trains the policy anew, four times each; 0: none")


@dataclass
class DataOptions:
    """Where `tune` gets real rollouts of the policy it proposes."""

    mode: str = key(
        "log", "", "where real rollouts come from: `log` alone, a growing folder, a function or Gymnasium",
        choices=("log", "folder", "callable", "env"),
    )  # fmt: skip
    folder: str | None = key(None, "", "data.mode=folder: where logs of the exported policy arrive", path=True)
    callable: str | None = key(None, "", "data.mode=callable: function (policy, nu, iteration, generator) -> Rollout")
    env: str | None = key(None, "", "data.mode=env: Gymnasium id; its observation is the model's state")
    rollouts: int = key(8, "", "rollouts per iteration")
    exploration: float = key(
        0.0, "action", "data.mode=env: standard deviation of noise added to a deterministic policy"
    )


@dataclass
class ConstraintOptions:
    """A limit that the real system must keep; of `sim2real.safety.Constraint`."""

    cost: str | None = key(None, "", "function (state, action, next_state) -> cost of each transition; none: no limit")
    name: str = key("constraint", "", "its name in the report")
    limit: float = key(0.0, "cost", "what the mean (or, for chance, nearly every step) must stay below")
    kind: str = key(
        "mean", "", "mean: the discounted mean; chance: the share of steps above", choices=("mean", "chance")
    )
    confidence: float = key(0.95, "1", "one-sided, that it holds")
    probability: float = key(0.05, "1", "chance: allowed share of steps above the limit")
    width: float = key(0.0, "cost", "chance: smoothing; 0: the plain indicator")


@dataclass
class FitConfig:
    """sim2real fit: system identification from a log."""

    log: Any = key(MISSING, "", "file, folder or [list] of files: CSV, NPZ, HDF5, Parquet, .mat", path=True)
    schema: str | None = key(None, "", "YAML file that names columns and units; schema.KEY=VALUE changes it", path=True)
    columns: list[str] = key([], "", "the same as [schema.KEY=VALUE, ...]")
    model: Any = key(None, "", "the simulator: NAME, or model._target_=package.function", group="model")
    out: str = key("runs/fit", "", "output folder", path=True)
    leave_out: list[str] = key([], "", "episodes kept out of the fit and scored")
    theta: dict[str, float] = key({}, "parameter", "theta.NAME=VALUE: start value; default: the design value")
    fit: FitOptions = field(default_factory=FitOptions)
    seed: int = key(0, "", "seed of everything random")
    threads: int = key(1, "", "torch threads")
    resume: bool = key(True, "", "continue an interrupted run found in `out`; false: start again")
    report: bool = key(True, "", "write report.html")
    strict: bool = key(False, "", "exit code 3 when something is flagged (not identified, at a bound)")


@dataclass
class EvaluateConfig:
    """sim2real evaluate: errors of a parameter set on a log."""

    params: str | None = key(None, "", "params.json of a fit; default: the design values", path=True)
    log: Any = key(MISSING, "", "file, folder or [list] of files", path=True)
    schema: str | None = key(None, "", "YAML file that names columns and units; schema.KEY=VALUE changes it", path=True)
    columns: list[str] = key([], "", "the same as [schema.KEY=VALUE, ...]")
    theta: dict[str, float] = key({}, "parameter", "theta.NAME=VALUE replaces a value")
    model: Any = key(None, "", "the simulator: NAME, or model._target_=package.function", group="model")
    episodes: list[str] = key([], "", "episodes to score; default: all")
    nuisance: bool = key(True, "", "use the fitted delay and shared zeros of `params`")
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    threads: int = key(1, "", "torch threads")


@dataclass
class TuneConfig:
    """sim2real tune: simulator parameters for the real return of the policy trained in the simulator."""

    log: Any = key(None, "", "real rollouts already there: file, folder or [list] of files", path=True)
    schema: str | None = key(None, "", "YAML file that names columns and units; schema.KEY=VALUE changes it", path=True)
    columns: list[str] = key([], "", "the same as [schema.KEY=VALUE, ...]")
    params: str | None = key(None, "", "params.json of a fit: start values and model", path=True)
    model: Any = key(None, "", "the simulator: NAME, or model._target_=package.function", group="model")
    out: str = key("runs/tune", "", "output folder", path=True)
    theta: dict[str, float] = key({}, "parameter", "theta.NAME=VALUE: start value")
    free: list[str] = key([], "", "parameters to tune; default: all")
    reward: str | None = key(
        None,
        "",
        "the task, here and in the simulator: function (state, action, next_state) -> reward; default: the model's own",
    )
    discount: float = key(0.99, "1/step", "discount of the real return")
    horizon: float = key(1.0, "s", "length of in-sim rollouts")
    batch: int = key(64, "", "in-sim rollouts")
    data: DataOptions = field(default_factory=DataOptions)
    tune: TuneOptions = field(default_factory=TuneOptions)
    constraint: ConstraintOptions = field(default_factory=ConstraintOptions)
    randomize: int = key(
        0, "", "after a fit: parameters drawn from its posterior for in-sim training, even and > twice their number"
    )
    calibration: bool = key(True, "", "with log and params: how well predictions hold what they promise, in the report")
    policy: Any = key("linear", "", "the policy: linear or mlp", group="policy")
    seed: int = key(0, "", "seed of everything random")
    threads: int = key(1, "", "torch threads")
    resume: bool = key(True, "", "continue an interrupted run found in `out`; false: start again")
    report: bool = key(True, "", "write report.html")
    strict: bool = key(False, "", "exit code 3 when the search did not converge cleanly")


COMMANDS: dict[str, type] = {"fit": FitConfig, "evaluate": EvaluateConfig, "tune": TuneConfig}


@cache
def register() -> None:
    """Put all dataclasses into Hydra's ConfigStore: one node per command, one group per choice."""
    store = ConfigStore.instance()
    for name, config in COMMANDS.items():
        store.store(name, config)
    for group, choices in GROUPS.items():
        for name, config in choices.items():
            store.store(name, config, group=group)
    store.store(CUSTOM, {"_target_": None, "dt": None}, group="model")
