"""sim2real: tune simulator parameters for the real return of the policy that training in the simulator would find."""

from sim2real.bounds import Box, contains, default_params, from_unbounded, project, to_unbounded
from sim2real.log import LogError, RolloutLog, concatenate_logs, delayed_actions, load_log, select_episodes
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
from sim2real.rollout import Rollout, discounted_return, expected_return, rollout
from sim2real.solve_report import (
    LinearSolution,
    Optimum,
    Sensitivity,
    SolveReport,
    UnconvergedError,
    UnconvergedWarning,
)

__all__ = [
    "Box",
    "Estimate",
    "LinearSolution",
    "LogError",
    "ModelMDP",
    "Noise",
    "Optimum",
    "Params",
    "Policy",
    "Rollout",
    "RolloutLog",
    "Sensitivity",
    "SolveReport",
    "UnconvergedError",
    "UnconvergedWarning",
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
    "expected_return",
    "from_unbounded",
    "gaussian_policy",
    "linear_policy",
    "load_log",
    "map_params",
    "module_policy",
    "project",
    "ravel",
    "rollout",
    "sample_noise",
    "select_episodes",
    "to_unbounded",
    "unravel",
]
