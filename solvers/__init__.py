"""Solvers: linear systems, implicit derivatives, optima, least squares."""

from sim2real.solvers.bellman import (
    BellmanOptimum,
    discounted_visits,
    optimal_actions,
    optimal_values,
    policy_values,
    q_values,
    state_transition,
    state_values,
)

__all__ = [
    "BellmanOptimum",
    "discounted_visits",
    "optimal_actions",
    "optimal_values",
    "policy_values",
    "q_values",
    "state_transition",
    "state_values",
]
