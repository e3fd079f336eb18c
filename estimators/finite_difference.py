"""Central differences of the in-sim return with common random numbers, Richardson extrapolated.

`D(h) = (J(x + h e_i) - J(x - h e_i)) / 2h` has the error `c h^2 + O(h^4)`; `(4 D(h/2) - D(h)) / 3` has `O(h^4)`
(Richardson, Phil. Trans. R. Soc. A 210 (1911) 307). Each entry needs four evaluations: for checks and small problems.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from sim2real.estimators.pathwise import check_finite, check_wrt
from sim2real.mdp import ModelMDP, Noise
from sim2real.params import Estimate, Params, ravel, unravel
from sim2real.policy import Policy
from sim2real.rollout import expected_return


def finite_difference_gradient(
    mdp: ModelMDP,
    policy: Policy,
    theta: Params,
    nu: Params,
    noise: Noise,
    *,
    wrt: Literal["nu", "theta"] = "nu",
    step: float = 1e-3,
) -> Estimate:
    """Gradient of `expected_return` with respect to nu or theta; the model may be a black box.

    `step` is relative to `max(1, |x_i|)`. info: "error" `[P]`, `|D(h/2) - D(h)|` per entry, an upper estimate of the
    truncation error of a smooth return. Raises `ValueError` for a step out of range, for parameters in less than
    float64, where differences drown in rounding, and when the return or a difference is not finite.
    """
    check_wrt(wrt)
    if not 0 < step < 1:
        raise ValueError(f"step must lie in (0, 1), got {step}")
    moved = nu if wrt == "nu" else theta
    low = [key for key, value in moved.items() if value.dtype != torch.float64]
    if low:
        raise ValueError(f"central differences need float64; convert {low} with .double()")

    def value(x: Tensor) -> Tensor:
        inputs = unravel(x, moved)
        return expected_return(mdp, policy, *((theta, inputs) if wrt == "nu" else (inputs, nu)), noise)

    with torch.no_grad():
        x = ravel(moved)
        coarse, fine = _central(value, x, step), _central(value, x, 0.5 * step)
        center = value(x)
    grad = (4.0 * fine - coarse) / 3.0
    check_finite(center, grad, wrt)
    return Estimate(center, unravel(grad, moved), {"error": (fine - coarse).abs()})


def _central(value: Callable[[Tensor], Tensor], x: Tensor, step: float) -> Tensor:
    entries = []
    for i in range(x.numel()):
        h = torch.zeros_like(x)
        h[i] = step * max(1.0, float(x[i].abs()))
        entries.append((value(x + h) - value(x - h)) / (2.0 * h[i]))
    return torch.stack(entries)
