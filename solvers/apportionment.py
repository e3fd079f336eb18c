r"""Shares of a whole into whole units that add up to it, by largest remainders.

    q_i = floor(s_i T) + 1 for the T - sum_j floor(s_j T) largest remainders, floor(s_i T) otherwise.

Shares that came from whole units, s = q / T, give these units back; flooring alone would lose one wherever rounding
left s_i T below the integer. Reference: Hamilton's method, e.g. Balinski and Young, Fair representation, 1982.
"""

from __future__ import annotations

import torch
from torch import Tensor


def largest_remainder(share: Tensor, total: Tensor) -> Tensor:
    """Whole numbers `[..., n]` that add up to `total [...]`, nearest to `share * total`.

    Shares `[..., n]` must be non-negative and are normalised to add up to 1. Ties go to the first. Raises `ValueError`
    for negative, infinite or vanishing shares and for totals that are no whole non-negative numbers.
    """
    weight = share.sum(-1)
    if not bool((share >= 0).all() and (weight > 0).all() and torch.isfinite(weight).all()):
        raise ValueError("shares must be finite and non-negative, with a positive sum in every row")
    if not bool(((total >= 0) & (total == torch.round(total)) & torch.isfinite(total)).all()):
        raise ValueError("totals must be finite, whole and non-negative, as many as units are to be shared out")
    exact = share / weight.unsqueeze(-1) * total.unsqueeze(-1)
    floor = torch.floor(exact)
    # a remainder of 1 - rounding error is a whole unit: it comes first, and so gets its unit back
    missing = torch.round(total - floor.sum(-1)).unsqueeze(-1)
    rank = (floor - exact).argsort(dim=-1, stable=True).argsort(dim=-1)
    return floor + (rank < missing).to(exact)
