"""Estimators: gradients of returns and sensitivities of policies."""

from sim2real.estimators.action_sensitivity import action_sensitivity
from sim2real.estimators.all_action import all_action_gradient
from sim2real.estimators.audit import Audit, audit
from sim2real.estimators.auto_sensitivity import auto_sensitivity
from sim2real.estimators.baselines import (
    Advantage,
    critic_baseline,
    input_baseline,
    no_baseline,
    quadratic_states,
    square_states,
    state_baseline,
    time_baseline,
)
from sim2real.estimators.bi_ac import bi_ac_gradient
from sim2real.estimators.boltzmann_covariance import boltzmann_covariance_gradient
from sim2real.estimators.boltzmann_tables import boltzmann_tables_gradient
from sim2real.estimators.certificate import Certificate, certify
from sim2real.estimators.compare_estimators import EstimatorComparison, EstimatorRow, compare_estimators
from sim2real.estimators.counterfactual import counterfactual_gradient
from sim2real.estimators.critic import Critic, CriticError, least_squares_critic, quadratic_features
from sim2real.estimators.critic_gauss_newton import critic_gauss_newton, rollout_q_values
from sim2real.estimators.empirical_kernel import empirical_transition, tilted_transition, transition_counts
from sim2real.estimators.equivalence import (
    Condition,
    EquivalenceError,
    EquivalenceGap,
    TabularMDP,
    equivalence_gap,
    modified_reward,
)
from sim2real.estimators.estimate_certificate import certify_estimate
from sim2real.estimators.explicit_sensitivity import explicit_sensitivity
from sim2real.estimators.finite_difference import finite_difference_gradient
from sim2real.estimators.fitted_follower import fit_linear_follower, fit_soft_value
from sim2real.estimators.function_space import function_space_sensitivity, pointwise_sensitivity
from sim2real.estimators.hessian_free import hessian_free_gradient
from sim2real.estimators.hierarchy import hierarchical_model
from sim2real.estimators.high_level import HighLevelLog, Segments, high_level_log, high_level_transitions
from sim2real.estimators.leader_ascent import annealed_temperature, best_of_restarts, natural_softmax_step
from sim2real.estimators.leader_baselines import hpgd_gradient, naive_leader_gradient, sobirl_gradient
from sim2real.estimators.leader_critic import inverse_noise_weights
from sim2real.estimators.leader_view import CriticOptions
from sim2real.estimators.logged_policy_gradient import logged_policy_gradient
from sim2real.estimators.lqr_equivalence import LinearQuadratic, lqr_equivalence_gap, lqr_modified_reward
from sim2real.estimators.lqr_sensitivity import lqr_sensitivity
from sim2real.estimators.mixed import CrossTerm, mixed_gradient
from sim2real.estimators.model_critic import ModelCritic, model_critic
from sim2real.estimators.neural_features import random_features, returns_to_go, trained_features
from sim2real.estimators.pathwise import pathwise_gradient
from sim2real.estimators.policy_sensitivity import policy_sensitivity
from sim2real.estimators.sampled_equivalence import (
    Simulator,
    sampled_conditions,
    sampled_equivalence_gap,
    sampled_modified_reward,
)
from sim2real.estimators.score_function import score_function_gradient
from sim2real.estimators.score_sensitivity import score_sensitivity
from sim2real.estimators.soft_sensitivity import soft_sensitivity
from sim2real.estimators.soft_value import soft_action_value, soft_consistency, soft_return
from sim2real.estimators.stackelberg import stackelberg_gradient
from sim2real.estimators.stackelberg_tables import seen_leader_tables, stackelberg_tables_gradient, unseen_leader_tables
from sim2real.estimators.straight_through import straight_through_gradient
from sim2real.estimators.transitions import Transitions, merge_transitions, transitions

__all__ = [
    "Advantage",
    "Audit",
    "Certificate",
    "Condition",
    "Critic",
    "CriticError",
    "CriticOptions",
    "CrossTerm",
    "EquivalenceError",
    "EquivalenceGap",
    "EstimatorComparison",
    "EstimatorRow",
    "HighLevelLog",
    "LinearQuadratic",
    "ModelCritic",
    "Segments",
    "Simulator",
    "TabularMDP",
    "Transitions",
    "action_sensitivity",
    "all_action_gradient",
    "annealed_temperature",
    "audit",
    "auto_sensitivity",
    "best_of_restarts",
    "bi_ac_gradient",
    "boltzmann_covariance_gradient",
    "boltzmann_tables_gradient",
    "certify",
    "certify_estimate",
    "compare_estimators",
    "counterfactual_gradient",
    "critic_baseline",
    "critic_gauss_newton",
    "empirical_transition",
    "equivalence_gap",
    "explicit_sensitivity",
    "finite_difference_gradient",
    "fit_linear_follower",
    "fit_soft_value",
    "function_space_sensitivity",
    "hessian_free_gradient",
    "hierarchical_model",
    "high_level_log",
    "high_level_transitions",
    "hpgd_gradient",
    "input_baseline",
    "inverse_noise_weights",
    "least_squares_critic",
    "logged_policy_gradient",
    "lqr_equivalence_gap",
    "lqr_modified_reward",
    "lqr_sensitivity",
    "merge_transitions",
    "mixed_gradient",
    "model_critic",
    "modified_reward",
    "naive_leader_gradient",
    "natural_softmax_step",
    "no_baseline",
    "pathwise_gradient",
    "pointwise_sensitivity",
    "policy_sensitivity",
    "quadratic_features",
    "quadratic_states",
    "random_features",
    "returns_to_go",
    "rollout_q_values",
    "sampled_conditions",
    "sampled_equivalence_gap",
    "sampled_modified_reward",
    "score_function_gradient",
    "score_sensitivity",
    "seen_leader_tables",
    "sobirl_gradient",
    "soft_action_value",
    "soft_consistency",
    "soft_return",
    "soft_sensitivity",
    "square_states",
    "stackelberg_gradient",
    "stackelberg_tables_gradient",
    "state_baseline",
    "straight_through_gradient",
    "tilted_transition",
    "time_baseline",
    "trained_features",
    "transition_counts",
    "transitions",
    "unseen_leader_tables",
]
