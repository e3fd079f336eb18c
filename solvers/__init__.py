"""Solvers: linear systems, implicit derivatives, optima, least squares."""
