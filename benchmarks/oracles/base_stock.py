"""Exact optima of one backlogged store, and the lower bound of transshipment; NumPy only, independent of the library.

One store, holding h, shortage p, lead time L: the base-stock policy with the p/(p+h) quantile S of the demand of L + 1
periods is optimal, at the newsvendor cost of that sum. Demand is Normal(m, s) clipped at 0: its distribution on a grid,
convolved L + 1 times.

Transshipment: if a hub could take stock back, all stores would run at one fractile z = p/(p+h), so that with C the
covariance of demand and L_0 the hub's lead time the cost is at least

    (h + p) phi(Phi^-1(z)) sqrt(L_0 1'C1 + (L + 1) (sum_i s_i)^2).

Reference: A. Federgruen and P. Zipkin, Approximations of dynamic, multilocation production and inventory problems,
Management Science 30(1), 1984.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

Array = NDArray[np.float64]


def clipped_normal(mean: float, std: float, step: float, spread: float = 9.0) -> Array:
    """Probabilities of 0, step, 2 step, ...; each point takes the mass within half a step, 0 all below."""
    edges = (np.arange(int((mean + spread * std) / step) + 1) + 0.5) * step
    mass: Array = np.diff(norm.cdf(edges, mean, std), prepend=0.0)
    return mass / mass.sum()


def sum_of(pmf: Array, periods: int) -> Array:
    """Distribution of the sum of independent demands, by FFT."""
    length = periods * (len(pmf) - 1) + 1
    total = np.fft.irfft(np.fft.rfft(pmf, length) ** periods, length)
    return np.maximum(total, 0.0)


def newsvendor(pmf: Array, step: float, underage: float, holding: float = 1.0) -> tuple[float, float]:
    """Level S and cost `E h (S - D)^+ + p (D - S)^+` of the demand on the grid."""
    below = np.cumsum(pmf)
    k = int(np.searchsorted(below, underage / (underage + holding)))
    distance = (k - np.arange(len(pmf))) * step
    return k * step, float(pmf @ (holding * np.maximum(distance, 0) + underage * np.maximum(-distance, 0)))


def optimal_base_stock(
    lead_time: int, underage: float, *, mean: float = 5.0, std: float = 1.6, step: float = 0.02
) -> tuple[float, float]:
    """Optimal level and cost per period of one backlogged store with clipped normal demand, holding 1."""
    return newsvendor(sum_of(clipped_normal(mean, std, step), lead_time + 1), step, underage)


def unclipped_cost(lead_time: int, underage: float, *, std: float = 1.6) -> float:
    """`(1 + p) phi(Phi^-1(p / (1 + p))) std sqrt(L + 1)`: closed form for demand that may be negative."""
    fractile = norm.ppf(underage / (1 + underage))
    return float((1 + underage) * norm.pdf(fractile) * std * np.sqrt(lead_time + 1))


def transshipment_bound(std: Array, correlation: float, lead_time: int, underage: float, *, hub: int = 3) -> float:
    """Lower bound of the total cost per period, holding 1; `hub` is the lead time of the hub's supplier."""
    covariance = np.outer(std, std) * (correlation + (1 - correlation) * np.eye(len(std)))
    spread = np.sqrt(hub * covariance.sum() + (lead_time + 1) * std.sum() ** 2)
    return float((1 + underage) * norm.pdf(norm.ppf(underage / (1 + underage))) * spread)
