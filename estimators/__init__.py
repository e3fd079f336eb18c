"""Estimators: gradients of returns and sensitivities of policies."""
