"""What `sim2real tune` does: repeat `tune_step` on rollouts from a log, a growing folder, a function or Gymnasium."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sim2real.checkpoint import write_atomic
from sim2real.commands import (
    ExitCode,
    Outcome,
    Progress,
    check_names,
    identity,
    library_settings,
    make_model,
    model_dt,
    provenance,
    read_log,
    start_values,
    write_model_files,
)
from sim2real.conf import LinearPolicy, TuneConfig
from sim2real.conf.compose import UsageError, resolve_function
from sim2real.log import RolloutLog
from sim2real.mdp import ModelMDP, sample_noise
from sim2real.parameter_file import ParameterSet, finite_json, read_parameters, write_parameters
from sim2real.params import Params
from sim2real.policy import Policy, linear_policy, module_policy
from sim2real.policy_export import export_policy
from sim2real.real_rollouts import check_signals, environment, growing_folder
from sim2real.safety import Constraint, constraint_gradient
from sim2real.tune_posterior import calibration_of, gaussian, plausibility, randomized_return
from sim2real.tune_report import tune_report
from sim2real.tune_task import Limit
from sim2real.tuning import Collect, RealReward, TuneResult, TuneSettings, tune
from sim2real.workspace import Workspace, open_workspace, save_snapshot, write_log_line


@dataclass(frozen=True)
class Task:
    """Everything `tune` needs, built from a configuration."""

    mdp: ModelMDP
    spec: dict[str, Any]
    theta: Params
    free: tuple[str, ...]
    policy: Policy
    nu: Params
    module: nn.Module | None
    target: Tensor
    """`[n]`: the policy sees the state less this"""
    reward: RealReward
    log: RolloutLog | None
    given: ParameterSet | None
    settings: TuneSettings


def tune_command(config: TuneConfig, words: Sequence[str], progress: Progress) -> Outcome:
    """Tune, then write params.json, policy/, report.html and tune.log into `config.out`."""
    task = _task(config)
    with open_workspace(Path(config.out), identity("tune", config, task.log), resume=config.resume) as workspace:
        result = _run(workspace, config, task, progress)
        folder = workspace.folder
        _export(folder / "policy", task, result.nu)
        parameters = _parameters(result, task, provenance("tune", config, words, task.log))
        write_parameters(folder, parameters)
        write_model_files(folder, task.spec, result.theta)
        if config.report:
            html = tune_report(result, parameters, gaussian(task.given, task.free))
            write_atomic(folder / "report.html", html.encode())
        else:
            (folder / "report.html").unlink(missing_ok=True)  # of an earlier result
        message = _message(config, result)
        write_log_line(folder, "tune.log", message.replace("\n", " "))
    doubtful = _unfit(result) or (config.strict and not result.report.converged)
    code: ExitCode = 4 if result.waiting else 3 if doubtful else 0
    document = {**vars(parameters), "out": config.out, "waiting": result.waiting, "history": list(result.history)}
    return Outcome(code, finite_json(document), message, result)


def _task(config: TuneConfig) -> Task:
    _check_numbers(config)
    settings = library_settings(TuneSettings, config.tune)
    given = None if config.params is None else read_parameters(Path(config.params))
    dt = model_dt(config.model) or (given.model.get("dt") if given else None)
    log = None if config.log is None else read_log(config, dt)
    mdp, spec = make_model(config.model, given, dt if log is None else log.dt)
    theta = start_values(mdp, config.theta, given)
    check_names("free", config.free, tuple(theta))
    states = mdp.names.get("state", ())
    if log is not None:
        check_signals(log, states)
    target = torch.tensor(config.policy.target or [0.0] * len(states), dtype=torch.float64)
    if target.shape != (len(states),):
        raise UsageError(f"policy.target has {len(target)} entries, the state has {len(states)}: {states}")
    policy, nu, module = _policy(config, len(states), len(mdp.names.get("action", ())))
    mdp, reward = _task_reward(config, mdp, theta)
    free = tuple(config.free or theta)
    if gaussian(given, free) is None:
        for name in ("trade_off", "likelihood_weight"):
            if getattr(settings, name):
                raise UsageError(f"tune.{name}: needs params of a fit that estimated some of {list(free)}")
    return Task(mdp, spec, theta, free, _shifted(policy, target), nu, module, target, reward, log, given, settings)


def _check_numbers(config: TuneConfig) -> None:
    """Raise `UsageError` for a number that no run can be made with."""
    inf, hidden = float("inf"), getattr(config.policy, "hidden", [])
    for name, value, wanted, holds in (
        ("discount", config.discount, "0 to 1", 0 <= config.discount <= 1),
        ("horizon", config.horizon, "> 0 and finite", 0 < config.horizon < inf),
        ("randomize", config.randomize, ">= 0", config.randomize >= 0),
        ("batch", config.batch, ">= 1", config.batch >= 1),
        ("data.rollouts", config.data.rollouts, ">= 1", config.data.rollouts >= 1),
        ("data.exploration", config.data.exploration, ">= 0 and finite", 0 <= config.data.exploration < inf),
        ("policy.std", config.policy.std, ">= 0 and finite", 0 <= config.policy.std < inf),
        ("tune.audit", config.tune.audit, "0 with tune.certify=false", config.tune.certify or config.tune.audit <= 0),
        ("policy.hidden", hidden, "widths >= 1", all(width >= 1 for width in hidden)),
    ):
        if not holds:
            raise UsageError(f"{name}={value}: expected {wanted}")


def _policy(config: TuneConfig, n: int, m: int) -> tuple[Policy, Params, nn.Module | None]:
    """The policy, its start parameters and the module behind it; an MLP starts from `config.seed`."""
    chosen = config.policy
    if isinstance(chosen, LinearPolicy):
        try:
            gain = torch.tensor(chosen.gain or [[0.0] * n] * m, dtype=torch.float64)
        except (TypeError, ValueError) as error:
            raise UsageError(f"policy.gain={chosen.gain}: expected rows of numbers, such as [[1,2]]") from error
        if gain.shape != (m, n):
            raise UsageError(f"policy.gain has shape {list(gain.shape)}; {m} actions and {n} states need [{m}, {n}]")
        nu = {"gain": gain, "offset": torch.zeros(m, dtype=torch.float64)} if chosen.offset else {"gain": gain}
        return linear_policy(m, std=chosen.std), nu, None
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        widths = [n, *chosen.hidden]
        layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.Tanh())]
        module = nn.Sequential(*layers, nn.Linear(widths[-1], m)).double()
    nu = {name: value.detach() for name, value in module.named_parameters()}
    return module_policy(module, std=chosen.std), nu, module


def _shifted(policy: Policy, target: Tensor) -> Policy:
    """The policy that sees the state less `target [n]`."""
    return Policy(
        lambda nu, state, e: policy.act(nu, state - target, e),
        lambda nu, state, action: policy.log_prob(nu, state - target, action),
        policy.noise_dim,
    )


def _export(folder: Path, task: Task, nu: Params) -> None:
    """Write the policy for the real controller: a function of the state itself, the target folded in."""
    if task.module is None:
        offset = nu["gain"] @ task.target + nu.get("offset", torch.zeros(len(nu["gain"]), dtype=torch.float64))
        nu = {"gain": nu["gain"], "offset": offset}
    else:
        nu = {**nu, "0.bias": nu["0.bias"] - nu["0.weight"] @ task.target}
    names = task.mdp.names
    export_policy(folder, nu, task.module, state_names=names.get("state", ()), action_names=names.get("action", ()))


def _run(workspace: Workspace, config: TuneConfig, task: Task, progress: Progress) -> TuneResult:
    found, folder, limits = workspace.snapshot, workspace.folder, _constraints(config, task.policy)
    done = 0 if found is None else int(found.record["steps"])
    generator = torch.Generator().manual_seed(config.seed)
    steps = max(1, round(config.horizon / task.mdp.dt))
    noise = sample_noise(task.mdp, task.policy, config.batch, steps, generator)
    drawn: dict[str, Any] = {"given": task.given, "free": task.free, "count": config.randomize, "generator": generator}
    randomized = randomized_return(task.mdp, task.policy, task.theta, noise, **drawn)
    write_log_line(folder, "tune.log", f"resumed after iteration {done}" if found else "started")
    if found and found.fallback:
        write_log_line(folder, "tune.log", f"note: {found.fallback}")

    def on_step(state: Params) -> None:
        nonlocal done
        done += 1
        save_snapshot(workspace, state, steps=done)
        write_log_line(folder, "tune.log", f"iteration {done}")
        progress(done, task.settings.max_steps, "")

    result = tune(
        task.mdp,
        task.policy,
        task.theta,
        task.nu,
        task.log,
        noise,
        real_reward=task.reward,
        real_discount=config.discount,
        collect=_collect(config, task, workspace),
        settings=task.settings,
        box=task.mdp.box,
        free=task.free,
        scale={name: value.abs() for name, value in task.theta.items() if bool((value != 0).all())},
        likelihood=gaussian(task.given, task.free),
        objective=randomized,
        constraints=limits,
        calibration=calibration_of(task.mdp, task.log, task.given) if config.calibration else None,
        generator=generator,
        on_step=on_step,
        state=None if found is None else found.tensors,
    )
    if found is None and done == 0:
        # waiting for the first rollouts: remember which settings the policy they come from belongs to
        save_snapshot(workspace, result.state, steps=0)
    return result


def _task_reward(config: TuneConfig, mdp: ModelMDP, theta: Params) -> tuple[ModelMDP, RealReward]:
    """The model and the real reward: the user's function in both, else the model's own at the start values."""
    if config.reward is not None:
        given = resolve_function(config.reward, "reward")
        return replace(mdp, reward=lambda theta, s, a, e, following: given(s, a, following)), given

    def own(state: Tensor, action: Tensor, following: Tensor) -> Tensor:
        return mdp.reward(theta, state, action, state.new_zeros(state.shape[0], mdp.noise_dims[1]), following)

    return mdp, own


def _collect(config: TuneConfig, task: Task, workspace: Workspace) -> Collect | None:
    data = config.data
    if data.mode == "callable":
        if data.callable is None:
            raise UsageError("data.mode=callable needs data.callable=package.function")
        return resolve_function(data.callable, "data.callable")
    if data.mode == "env":
        return environment(config, task.mdp)
    if data.mode == "folder":
        return growing_folder(config, task.mdp, workspace.folder)
    if task.log is None:
        raise UsageError("data.mode=log needs log=...; or choose data.mode=folder, callable or env")
    return None


def _constraints(config: TuneConfig, policy: Policy) -> dict[str, Limit]:
    """The limit of the configuration by name, as `tune` takes it. Raises `UsageError`."""
    options = config.constraint
    if options.cost is None:
        idle = [item.name for item in fields(options) if getattr(options, item.name) != item.default]
        if idle:
            raise UsageError(f"constraint.{idle[0]} needs constraint.cost=package.function: no limit is kept without")
        return {}
    if not options.name:
        raise UsageError("constraint.name= is empty: give a name")
    cost = resolve_function(options.cost, "constraint.cost")
    try:
        constraint = Constraint(
            options.name,
            cost,
            options.limit,
            kind="chance" if options.kind == "chance" else "mean",
            discount=min(config.discount, 1 - 1e-6),
            confidence=options.confidence,
            probability=options.probability,
            width=options.width,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    return {options.name: lambda nu, data: constraint_gradient(constraint, policy, nu, data)}


def _parameters(result: TuneResult, task: Task, origin: dict[str, Any]) -> ParameterSet:
    rows = {
        name: {
            "value": value.tolist(),
            "unit": task.mdp.box.unit.get(name, ""),
            "initial": task.theta[name].tolist(),
            "tuned": name in task.free,
        }
        for name, value in result.theta.items()
    }
    nuisance = {} if task.given is None else task.given.nuisance
    report = {k: v for k, v in vars(result.report).items() if k in ("converged", "steps", "status", "residual")}
    report["names"] = {key: list(task.mdp.names.get(key, ())) for key in ("state", "action")}
    report["policy"] = {name: value.tolist() for name, value in result.nu.items()}
    report |= plausibility(result)
    return ParameterSet("tune", task.spec, rows, nuisance, report, result.notes, origin)


def _message(config: TuneConfig, result: TuneResult) -> str:
    if result.waiting:
        policy = Path(config.out) / "policy"
        return (
            f"waiting for real rollouts of the new policy:\n"
            f"  1. run the policy in '{policy}' on the real system ({config.data.rollouts} rollouts,"
            f" with varied starts and some noise on the action)\n"
            f"  2. put the logs into '{config.data.folder}'\n"
            f"  3. run the same command again"
        )
    kept = [record for record in result.history if record.get("accepted")]
    gain = ""
    if kept:
        first, last = (record.get("measured_return", record["real_return"]) for record in (kept[0], kept[-1]))
        gain = f"; real return {first:.5g} -> {last:.5g}"
    state, status = "converged" if result.report.converged else "ended", result.report.status
    if status.startswith("refused"):
        gain = "; a larger tune.error_tol allows more, tune.certify=false goes on without a certificate"
    return f"{state} after {len(result.history)} iterations ({status}){gain}; results: {config.out}"


def _unfit(result: TuneResult) -> bool:
    """Whether the result is none to run: the start was refused, or the best theta violates a constraint."""
    return result.report.status.startswith("refused") or "violates" in result.report.status
