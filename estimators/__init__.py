"""Estimators: gradients of returns and sensitivities of policies."""

from sim2real.estimators.policy_sensitivity import policy_sensitivity

__all__ = [
    "policy_sensitivity",
]
