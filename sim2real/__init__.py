"""sim2real: tune simulator parameters for the real return of the policy that training in the simulator would find."""

from sim2real.bounds import Box, contains, default_params, from_unbounded, project, to_unbounded
from sim2real.controllers import (
    append_clock,
    append_integral,
    exploring_policy,
    gain_schedule_policy,
    lqr_policy,
    operational_space_policy,
    pid_policy,
    with_clock,
    with_integral,
)
from sim2real.evaluation import Evaluation, EvaluationSettings, RunScore, evaluate
from sim2real.fit import Comparison, FitResult, FitSettings, ParameterRow
from sim2real.identifiability import Identifiability, identifiability
from sim2real.intervals import Jackknife, Linearization, jackknife
from sim2real.log import LogError, RolloutLog, concatenate_logs, delayed_actions, load_log, save_log, select_episodes
from sim2real.mdp import ModelMDP, Noise, sample_noise
from sim2real.params import Estimate, Params, assign_grads, axpy, copy_into, dot, map_params, ravel, unravel
from sim2real.policy import (
    Policy,
    boltzmann_policy,
    deterministic_policy,
    gaussian_policy,
    linear_policy,
    module_policy,
)
from sim2real.policy_export import ExportedPolicy, PolicyExportError, export_policy, load_numpy_policy, numpy_action
from sim2real.rollout import Rollout, discounted_return, expected_return, rollout
from sim2real.solve_report import (
    LinearSolution,
    Optimum,
    Sensitivity,
    SolveReport,
    UnconvergedError,
    UnconvergedWarning,
)
from sim2real.tuning import TuneResult, TuneSettings, TuneStep, tune, tune_step
from sim2real.windows import WindowError

__all__ = [
    "Box",
    "Comparison",
    "Estimate",
    "Evaluation",
    "EvaluationSettings",
    "ExportedPolicy",
    "FitResult",
    "FitSettings",
    "Identifiability",
    "Jackknife",
    "LinearSolution",
    "Linearization",
    "LogError",
    "ModelMDP",
    "Noise",
    "Optimum",
    "ParameterRow",
    "Params",
    "Policy",
    "PolicyExportError",
    "Rollout",
    "RolloutLog",
    "RunScore",
    "Sensitivity",
    "SolveReport",
    "TuneResult",
    "TuneSettings",
    "TuneStep",
    "UnconvergedError",
    "UnconvergedWarning",
    "WindowError",
    "append_clock",
    "append_integral",
    "assign_grads",
    "axpy",
    "boltzmann_policy",
    "concatenate_logs",
    "contains",
    "copy_into",
    "default_params",
    "delayed_actions",
    "deterministic_policy",
    "discounted_return",
    "dot",
    "evaluate",
    "expected_return",
    "exploring_policy",
    "export_policy",
    "from_unbounded",
    "gain_schedule_policy",
    "gaussian_policy",
    "identifiability",
    "jackknife",
    "linear_policy",
    "load_log",
    "load_numpy_policy",
    "lqr_policy",
    "map_params",
    "module_policy",
    "numpy_action",
    "operational_space_policy",
    "pid_policy",
    "project",
    "ravel",
    "rollout",
    "sample_noise",
    "save_log",
    "select_episodes",
    "to_unbounded",
    "tune",
    "tune_step",
    "unravel",
    "with_clock",
    "with_integral",
]
