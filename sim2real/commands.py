"""What `sim2real fit` and `sim2real evaluate` do: from a composed configuration to the files in the output folder."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from sim2real.bounds import default_params
from sim2real.checkpoint import write_atomic
from sim2real.conf import EvaluateConfig, FitConfig, TuneConfig
from sim2real.conf.compose import UsageError, nearest, resolve_function
from sim2real.evaluation import Evaluation, EvaluationSettings, evaluate
from sim2real.fit import FitResult, FitSettings, fit
from sim2real.log import RolloutLog, load_log, select_episodes
from sim2real.mdp import ModelMDP
from sim2real.parameter_file import (
    ParameterFileError,
    ParameterSet,
    finite_json,
    nuisance_of,
    read_parameters,
    theta_of,
    write_parameters,
)
from sim2real.params import Params
from sim2real.report import fit_report, row_flags
from sim2real.tuning import TuneSettings
from sim2real.workspace import Workspace, log_digest, open_workspace, save_snapshot, write_log_line

ExitCode = Literal[0, 1, 2, 3, 4, 5, 130]
Settings = TypeVar("Settings", FitSettings, EvaluationSettings, TuneSettings)
UNSHARED = ("out", "resume", "strict", "report")
"""keys that do not change a result: a run resumes one that had others"""
Progress = Callable[[int, int, str], None]
"""step, most steps, text: called after every step"""


@dataclass(frozen=True)
class Outcome:
    """What a command ends with: exit code, what `--json` prints, a sentence for people, and the result itself."""

    code: ExitCode
    document: dict[str, Any]
    message: str
    result: Any


def fit_command(config: FitConfig, words: Sequence[str], progress: Progress) -> Outcome:
    """Fit, then write params.json, params.safetensors, report.html and fit.log into `config.out`."""
    log = read_log(config, model_dt(config.model))
    mdp, spec = make_model(config.model, None, log.dt)
    theta = start_values(mdp, config.theta, None)
    settings = fit_settings(config, mdp, log)
    with open_workspace(Path(config.out), identity("fit", config, log), resume=config.resume) as workspace:
        result = _run_fit(workspace, mdp, log, theta, settings, progress)
        episodes = [name for name in log.names["episode"] if name not in settings.leave_out]
        parameters = _fit_parameters(result, mdp, spec, log, episodes, provenance("fit", config, words, log))
        write_parameters(workspace.folder, parameters)
        write_model_files(workspace.folder, spec, result.theta)
        if config.report:
            html = fit_report(result, parameters, spec["_target_"].rpartition(".")[2])
            write_atomic(workspace.folder / "report.html", html.encode())
        else:
            (workspace.folder / "report.html").unlink(missing_ok=True)  # of an earlier result
        flagged = [row.name for row in result.rows if row_flags(row)]
        code: ExitCode = 3 if not result.report.converged or (config.strict and flagged) else 0
        message = _fit_message(workspace.folder, result, flagged)
        write_log_line(workspace.folder, "fit.log", message)
    return Outcome(code, finite_json({**vars(parameters), "out": config.out, "flagged": flagged}), message, result)


def evaluate_command(config: EvaluateConfig, words: Sequence[str], progress: Progress) -> Outcome:
    """Errors of a parameter set on a log, under the evaluation protocol."""
    settings = library_settings(EvaluationSettings, config.evaluation)
    given = None if config.params is None else read_parameters(Path(config.params))
    dt = model_dt(config.model) or (given.model.get("dt") if given else None)
    log = read_log(config, dt)
    mdp, _ = make_model(config.model, given, log.dt)
    theta = start_values(mdp, config.theta, given)
    if config.episodes:
        log = choose_episodes(log, config.episodes)
    nuisance = shared_nuisance(given, settings) if given and config.nuisance else None
    scored = evaluate(mdp, log, theta, nuisance, settings)
    document = finite_json({"log": log.source, "params": config.params, **evaluation_document(scored)})
    return Outcome(0, document, f"{scored.windows} windows of {log.source}", scored)


def read_log(config: FitConfig | EvaluateConfig | TuneConfig, dt: float | None) -> RolloutLog:
    """The log of a configuration, resampled to the model's time step when that is given. Raises `LogError`."""
    paths = [Path(item) for item in config.log] if isinstance(config.log, list) else Path(str(config.log))
    log = load_log(paths, config.schema, overrides=tuple(config.columns))
    if dt is None or abs(log.dt - dt) <= 1e-9 * dt:
        return log
    return load_log(paths, config.schema, overrides=tuple(config.columns), dt=dt)


def model_dt(model: Any) -> float | None:
    """The time step the user asked of the model, s."""
    return _model_options(model).get("dt")


def make_model(model: Any, given: ParameterSet | None, dt: float | None) -> tuple[ModelMDP, dict[str, Any]]:
    """The model and what `params.json` keeps to rebuild it; command-line options go before those of `given`.

    `dt` (s): the period of the log, which the model steps at; None: its own.

    A parameter file may name only the library's simulators: a function elsewhere runs code, so it must be named by
    the user. Raises `UsageError`, `ParameterFileError`.
    """
    options = {name: value for name, value in _model_options(model).items() if value is not None}
    if given is not None and "_target_" not in options:
        target = given.model["_target_"]
        if not target.startswith("sim2real.simulators."):
            raise ParameterFileError(
                f"the parameter file names the model '{target}', which is not one of this library; "
                f"repeat it to say that you trust it: model._target_={target}"
            )
        options = {**given.model, **options}
    elif given is not None and options["_target_"] == given.model["_target_"]:
        options = {**given.model, **_changed(model, options)}
    if "_target_" not in options:
        raise UsageError(
            "no model: give model=NAME (pendulum, double_pendulum, ...) or model._target_=package.function"
        )
    options = options if dt is None else {**options, "dt": dt}
    arguments = {name: value for name, value in options.items() if name != "_target_"}
    try:
        mdp = resolve_function(options["_target_"], "model._target_")(**arguments)
    except TypeError as error:
        raise UsageError(f"model {options['_target_']}: {error}") from error
    if not isinstance(mdp, ModelMDP):
        raise UsageError(f"model {options['_target_']} returned {type(mdp).__name__}, expected a sim2real.ModelMDP")
    return mdp, options


def write_model_files(folder: Path, spec: Mapping[str, Any], theta: Params) -> None:
    """What the model's module itself writes of a result, through its function `write_identified`, if it has one."""
    module = importlib.import_module(str(spec["_target_"]).rpartition(".")[0])
    write = getattr(module, "write_identified", None)
    if write is not None:
        write(folder, theta, **{name: value for name, value in spec.items() if name != "_target_"})


def _model_options(model: Any) -> dict[str, Any]:
    return {} if model is None else dict(model) if isinstance(model, dict) else dataclasses.asdict(model)


def _changed(model: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Only the options that differ from the defaults of the model's configuration."""
    defaults = {} if isinstance(model, dict) else dataclasses.asdict(type(model)())
    return {name: value for name, value in options.items() if value != defaults.get(name)}


def start_values(mdp: ModelMDP, chosen: Mapping[str, float], given: ParameterSet | None) -> Params:
    """Design values, replaced by those of `given`, replaced by those of the command line. Raises `UsageError`."""
    theta = default_params(mdp.box)
    for source, values in (("params", theta_of(given) if given else {}), ("theta", chosen)):
        for name, value in values.items():
            if name not in theta:
                raise UsageError(
                    f"{source}: the model has no parameter '{name}'{nearest(name, theta)}; it has {list(theta)}"
                )
            theta[name] = torch.as_tensor(value, dtype=torch.float64)
    return theta


def choose_episodes(log: RolloutLog, names: Sequence[str]) -> RolloutLog:
    """The named episodes; raises `UsageError` with the nearest names."""
    check_names("episodes", names, log.names["episode"])
    return select_episodes(log, list(names))


def check_names(key: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Raise `UsageError` for a name that is not known."""
    for name in names:
        if name not in known:
            raise UsageError(f"{key}: there is no '{name}'{nearest(name, known)}; there are {', '.join(known)}")


def fit_settings(config: FitConfig, mdp: ModelMDP, log: RolloutLog) -> FitSettings:
    """`FitSettings` of a configuration, its names checked against the model and the log. Raises `UsageError`."""
    options, known = config.fit, tuple(mdp.box.default)
    check_names("fit.free", options.free, known)
    check_names("fit.fixed", options.fixed, known)
    check_names("fit.priors", list(options.priors), known)
    check_names("leave_out", config.leave_out, log.names["episode"])
    check_names("fit.signals", options.signals, log.names["signal"])
    free = tuple(name for name in options.free or known if name not in options.fixed)
    if not free:
        raise UsageError("fit.fixed holds every parameter that fit.free names: nothing is left to fit")
    return library_settings(FitSettings, options, free=free, leave_out=tuple(config.leave_out))


def library_settings(kind: type[Settings], options: Any, **more: Any) -> Settings:
    """`kind` from its fields in `options`, lists as tuples, and `more`. Raises `UsageError` for wrong values."""
    names = {field.name for field in dataclasses.fields(kind)}
    values = {name: _tuples(value) for name, value in vars(options).items() if name in names}
    try:
        return kind(**(values | more))
    except ValueError as error:
        raise UsageError(str(error)) from error


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(value) if isinstance(value, list) else value


def shared_nuisance(given: ParameterSet, settings: EvaluationSettings) -> Params:
    """The nuisance values that hold for any run: the delay, and a zero shared by all runs."""
    values = nuisance_of(given)
    return {
        name: value
        for name, value in values.items()
        if name == "delay" or (name == "zero" and value.ndim == 1 and settings.zeros == "none")
    }


def identity(command: str, config: Any, log: RolloutLog | None) -> dict[str, Any]:
    """What a run must share with the one it resumes."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in UNSHARED}
    found = {"command": command, "settings": finite_json(settings)}
    return found if log is None else {**found, "log_sha256": log_digest(log)}


def provenance(command: str, config: Any, words: Sequence[str], log: RolloutLog | None) -> dict[str, Any]:
    """Where a result comes from: command, settings, log, seed, versions. No clock, no host, no output folder."""
    names = ("sim2real", "torch", "numpy", "scipy")
    spoken = " ".join(["sim2real", command, *(w for w in words if w.partition("=")[0] not in UNSHARED)])
    kept = {
        "command": spoken,
        "settings": identity(command, config, None)["settings"],
        "seed": config.seed,
        "versions": {name: importlib.metadata.version(name) for name in names},
    }
    return kept if log is None else {**kept, "log": {"path": log.source, "sha256": log_digest(log)}}


def evaluation_document(scored: Evaluation) -> dict[str, Any]:
    """The figures of an evaluation, without the per-window tensors."""
    tensors = ("errors", "growth", "episodes", "starts", "rows", "predicted", "measured")
    values = {
        field.name: getattr(scored, field.name) for field in dataclasses.fields(scored) if field.name not in tensors
    }
    return {**values, "runs": [vars(run) for run in scored.runs]}


def _run_fit(
    workspace: Workspace, mdp: ModelMDP, log: RolloutLog, theta: Params, settings: FitSettings, progress: Progress
) -> FitResult:
    found = workspace.snapshot
    done = 0 if found is None else int(found.record["steps"])
    write_log_line(workspace.folder, "fit.log", f"resumed after step {done}" if found else f"started on {log.source}")
    for note in [*log.notes, *([found.fallback] if found and found.fallback else [])]:
        write_log_line(workspace.folder, "fit.log", f"note: {note}")

    def on_step(state: Params) -> None:
        nonlocal done
        done += 1
        save_snapshot(workspace, state, steps=done)
        loss = float(state["history"][-1, 0])
        write_log_line(workspace.folder, "fit.log", f"step {done}: loss {loss:.6g}")
        progress(done, settings.max_steps, f"loss {loss:.4g}")

    return fit(mdp, log, theta, settings, on_step=on_step, state=None if found is None else found.tensors)


def _fit_parameters(
    result: FitResult,
    mdp: ModelMDP,
    spec: dict[str, Any],
    log: RolloutLog,
    episodes: Sequence[str],
    origin: dict[str, Any],
) -> ParameterSet:
    rows: dict[str, dict[str, Any]] = {
        name: {"value": value.tolist(), "unit": mdp.box.unit.get(name, ""), "fitted": False}
        for name, value in result.theta.items()
    }
    for row in result.rows:
        if row.name in rows:
            rows[row.name] |= {**{k: v for k, v in vars(row).items() if k != "name"}, "fitted": True}
    nuisance: dict[str, dict[str, Any]] = {}
    for name, value in result.nuisance.items():
        nuisance[name] = {"value": value.tolist(), "unit": "s" if name == "delay" else result.training.fitted.unit}
        if value.ndim == 2:
            nuisance[name]["episodes"] = list(episodes)
    report = {k: v for k, v in vars(result.report).items() if k in ("converged", "steps", "status", "residual")}
    report["covariance"] = {"names": [row.name for row in result.rows], "matrix": result.covariance.tolist()}
    for name, part in (("training", result.training), ("left_out", result.left_out)):
        if part is not None:
            report[name] = {k: evaluation_document(v) for k, v in (("fitted", part.fitted), ("initial", part.initial))}
    return ParameterSet("fit", spec, rows, nuisance, report, (*result.notes, *log.notes), origin)


def _fit_message(folder: Path, result: FitResult, flagged: Sequence[str]) -> str:
    state = "converged" if result.report.converged else f"NOT converged ({result.report.status})"
    shown = result.left_out or result.training
    where = "left-out" if result.left_out else "training"
    text = f"{state} in {result.report.steps} steps; {where} RMSE {shown.fitted.rmse:.4g} {shown.fitted.unit}"
    flags = f"; look at {', '.join(flagged)}" if flagged else ""
    return f"{text} (start {shown.initial.rmse:.4g}){flags}; results: {folder}"
