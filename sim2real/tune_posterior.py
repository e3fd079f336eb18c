"""What `sim2real tune` takes from the fit it starts from: likelihood, calibration windows, draws of the parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sim2real.calibration import Calibration, CalibrationSettings, calibrate
from sim2real.commands import shared_nuisance, start_values
from sim2real.conf.compose import UsageError
from sim2real.domain_randomization import (
    posterior_covariance,
    posterior_factor,
    randomized_objective,
    standard_draws,
)
from sim2real.evaluation import EvaluationSettings
from sim2real.log import RolloutLog
from sim2real.mdp import ModelMDP, Noise
from sim2real.parameter_file import ParameterSet
from sim2real.params import Params
from sim2real.policy import Policy
from sim2real.rollout import expected_return
from sim2real.tune_step import Objective
from sim2real.tuning import TuneResult
from sim2real.windows import WindowChoice

_WINDOWS = ("horizon", "stride", "first_row", "margin", "start_after", "end_before", "keep", "warmup")


def gaussian(given: ParameterSet | None, free: Sequence[str]) -> tuple[Params, Tensor] | None:
    """Mean and precision of the fit's estimate over `free`; None without a fit. What it left open weighs nothing.

    Raises `UsageError` for free parameters that the fit's file does not have.
    """
    kept = {} if given is None else given.report.get("covariance", {})
    known = [k for k, name in enumerate(free) if name in kept.get("names", ())]
    if given is None or not known:
        return None
    if absent := [name for name in free if name not in given.parameters]:
        has = ", ".join(given.parameters)
        raise UsageError(f"params: the file has no {', '.join(absent)}, it has {has}; leave the others out of free=")
    full = _matrix(kept)
    precision = torch.zeros(len(free), len(free), dtype=torch.float64)
    chosen = torch.tensor([kept["names"].index(free[k]) for k in known])
    inverse = torch.linalg.pinv(full[chosen][:, chosen], hermitian=True, rtol=1e-12)
    precision[torch.tensor(known).unsqueeze(1), torch.tensor(known)] = inverse
    mean = {name: torch.tensor(given.parameters[name]["value"], dtype=torch.float64) for name in free}
    return mean, precision


def _matrix(kept: dict[str, Any]) -> Tensor:
    return torch.tensor([[0.0 if v is None else v for v in row] for row in kept["matrix"]], dtype=torch.float64)


def calibration_of(
    mdp: ModelMDP, log: RolloutLog | None, given: ParameterSet | None
) -> Callable[[Params], Calibration] | None:
    """theta -> calibration on the log, on windows as those of the fit and with its delay and shared zeros.

    None without a log or a fit. The spread of the errors is that of the fitted parameters.
    """
    if log is None or given is None or given.kind != "fit":
        return None
    kept = given.provenance.get("settings", {}).get("fit", {})
    values = {name: kept[name] for name in _WINDOWS if kept.get(name) is not None}
    if "keep" in values:
        values["keep"] = {name: tuple(bounds) for name, bounds in values["keep"].items()}
    windows = WindowChoice(**({"horizon": 0.5, "stride": 0.1} | values))
    settings = CalibrationSettings(tuple(kept.get("signals", ())), windows)
    nuisance = shared_nuisance(given, EvaluationSettings())
    return partial(calibrate, mdp, log, reference=start_values(mdp, {}, given), nuisance=nuisance, settings=settings)


def randomized_return(
    mdp: ModelMDP,
    policy: Policy,
    theta: Params,
    noise: Noise,
    *,
    given: ParameterSet | None,
    free: Sequence[str],
    count: int,
    generator: torch.Generator,
) -> Objective | None:
    """The in-sim return averaged over `count` draws of the free parameters from the fit's posterior; None for 0.

    Raises `UsageError` without a fit or for a count that the draws cannot be matched with.
    """
    if count == 0:
        return None
    kept = {} if given is None else given.report.get("covariance", {})
    names = [name for name in free if name in kept.get("names", ())]
    if not names:
        raise UsageError(f"randomize={count}: needs params of a fit that estimated some of {list(free)}")
    full = torch.tensor([[math.nan if v is None else v for v in row] for row in kept["matrix"]], dtype=torch.float64)
    try:
        factor = posterior_factor(posterior_covariance(kept["names"], full, theta, names))
        draws = standard_draws(count, len(factor), generator)
    except ValueError as error:
        raise UsageError(f"randomize={count}: {error}") from error
    J = lambda theta, nu: expected_return(mdp, policy, theta, nu, noise)
    return randomized_objective(J, names, draws, factor=factor, box=mdp.box)


def plausibility(result: TuneResult) -> dict[str, Any]:
    """What `params.json` keeps of freedom, trade-off and calibration, as far as there are any."""
    kept: dict[str, Any] = {}
    if result.freedom is not None:
        names = ("dimension", "log_likelihood", "real_return", "policy_change", "steps", "status")
        kept["freedom"] = {name: getattr(result.freedom, name) for name in names}
    if result.trade_off:
        figures = ("weight", "real_return", "real_return_stderr", "log_likelihood")
        kept["trade_off"] = [
            {
                **{name: getattr(entry, name) for name in figures},
                "theta": {name: value.tolist() for name, value in entry.theta.items()},
            }
            for entry in result.trade_off
        ]
    if result.calibration is not None:
        kept["calibration"] = {
            name: {key: value.tolist() if isinstance(value, Tensor) else value for key, value in vars(part).items()}
            for name, part in zip(("start", "tuned"), result.calibration, strict=True)
        }
    return kept
