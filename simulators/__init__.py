"""Simulators: one system each, one function returning a `ModelMDP`."""
