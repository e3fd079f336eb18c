"""Estimators: gradients of returns and sensitivities of policies."""

from sim2real.estimators.finite_difference import finite_difference_gradient
from sim2real.estimators.lqr_sensitivity import lqr_sensitivity
from sim2real.estimators.pathwise import pathwise_gradient
from sim2real.estimators.policy_sensitivity import policy_sensitivity
from sim2real.estimators.score_function import score_function_gradient

__all__ = [
    "finite_difference_gradient",
    "lqr_sensitivity",
    "pathwise_gradient",
    "policy_sensitivity",
    "score_function_gradient",
]
