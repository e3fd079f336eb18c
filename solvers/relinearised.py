"""Linear feedback relinearised as it goes: the lower level of a nonlinear system, for a goal that is held T steps.

At the state s where a goal begins,  A = df/ds(s, a0), B = df/da(s, a0),  and over the next T steps

    a_t = K_t (x_t - u),    K_t = -(R + B'P_{t+1} B)^-1 B'P_{t+1} A,    P_T = Q        (`inversion_lqr.feedback_law`).

The affine part of the linearisation does not enter the gains; the transition keeps it, and so does inversion through
the true step (`inversion_maps.transition_map` with `feedback_lower`).
Reference: Schmidt et al., Offline hierarchical reinforcement learning via inverse optimization, 2024, appendix B.1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import jvp, vmap

from sim2real.solvers.inversion_lqr import feedback_law


def relinearised_gains(
    step: Callable[[Tensor, Tensor], Tensor],
    state: Tensor,
    Q: Tensor,
    R: Tensor,
    horizon: int,
    *,
    action: Tensor | None = None,
) -> Tensor:
    """Gains K `[N, T, m, n]` of `a_t = K_t (x_t - u)` from states `[N, n]`.

    step(s `[N, n]`, a `[N, m]`) -> s' `[N, n]`, rows apart; Q `[n, n]` and R `[m, m]` are costs, R positive definite;
    action a0 `[N, m]`, where the model is linearised, default 0. Differentiable in the states and in what `step` holds.
    """
    still = state.new_zeros(len(state), R.shape[-1]) if action is None else action
    if R.ndim != 2 or Q.shape != (state.shape[1],) * 2 or still.shape != (len(state), R.shape[-1]):
        shapes = [tuple(x.shape) for x in (state, Q, R, still)]
        raise ValueError(f"state must be [N, n], Q [n, n], R [m, m], action [N, m]; got {shapes}")

    def along(direction: Tensor) -> Tensor:
        both = direction.expand(len(state), -1).split([state.shape[1], still.shape[1]], -1)
        change: Tensor = jvp(step, (state, still), both)[1]
        return change

    width = state.shape[1] + still.shape[1]
    columns = vmap(along, out_dims=-1)(torch.eye(width, dtype=state.dtype, device=state.device))
    A, B = columns.split([state.shape[1], still.shape[1]], -1)
    return torch.stack(feedback_law(A, B, Q, R, horizon).state_gain, 1)
