"""Switched linear-quadratic regulator: a discrete mode says which inputs are strong, a continuous vector acts.

    x' = clip(A x + b_d * u, -limit, limit),      r = -(x'x of the state before the step + action_price u'u)

n states and inputs; A = 1.1 I + 0.05 N, N symmetric with largest entry 1; the diagonal b_d is 1 on block d of
`numpy.array_split(range(n), modes)` and 0.15 elsewhere. x_0 is uniform in the cube [-10, 10] / sqrt(n). No noise, no
terminal cost, no discount; the task is 20 steps, its metric the total cost over 20 n. The action is the mode in column
0 and u after it, all dimensionless.
Reference: the LQR study of M. Alvo et al., Policy optimization in hybrid discrete-continuous action spaces via mixed
gradients (matrices and initial states as in the authors' code).
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sim2real.bounds import Box
from sim2real.mdp import ModelMDP
from sim2real.params import Params

HORIZON = 20
_REACH = 10.0


def switched_lqr(states: int, modes: int = 2, *, action_price: float = 0.1, limit: float = 100.0) -> ModelMDP:
    """theta = {"A": `[n, n]`, "B": `[modes, n]` the diagonals}, or one of each per environment.

    The derivative of a clipped state is zero: a diverging policy gets no pathwise gradient beyond `limit`. Raises
    `ValueError` for sizes out of range or prices and limits that are not positive.
    """
    if not (1 <= modes <= states and action_price > 0.0 and limit > 0.0):
        raise ValueError(
            f"needs 1 <= modes <= states and a positive action_price and limit, got modes = {modes}, "
            f"states = {states}, action_price = {action_price}, limit = {limit}"
        )
    A, B = switched_matrices(states, modes)

    def initial_state(theta: Params, e0: Tensor) -> Tensor:
        return _REACH / math.sqrt(states) * (2.0 * torch.special.ndtr(e0) - 1.0)

    def step(theta: Params, state: Tensor, action: Tensor, e: Tensor) -> Tensor:
        mode = action[..., 0].detach().long()
        if theta["B"].ndim == 2:
            strength = theta["B"][mode]
        else:
            strength = theta["B"].gather(-2, mode.reshape(-1, 1, 1).expand(-1, 1, states)).squeeze(-2)
        moved = (theta["A"] @ state.unsqueeze(-1)).squeeze(-1) + strength * action[..., 1:]
        return moved.clamp(-limit, limit)

    def reward(theta: Params, state: Tensor, action: Tensor, e: Tensor, following: Tensor) -> Tensor:
        return -(state.square().sum(-1) + action_price * action[..., 1:].square().sum(-1))

    names = tuple(f"x{i + 1}" for i in range(states))
    inputs = ("mode", *(f"u{i + 1}" for i in range(states)))
    return ModelMDP(
        initial_state=initial_state,
        step=step,
        reward=reward,
        noise_dims=(states, 0),
        dt=1.0,
        names={"state": names, "action": inputs, "signal": names},
        units=dict.fromkeys(names + inputs, "1"),
        box=Box(unit={"A": "1", "B": "1"}, default={"A": A, "B": B}),
    )


def two_state_switched_lqr(*, limit: float = 100.0) -> ModelMDP:
    """The textbook example: x' = clip(A_d x + b_d u, -limit, limit), r = -(x'x + u^2), one input, both modes unstable.

    theta = {"A": `[2, 2, 2]`, "B": `[2, 2]`}, one pair per mode; x_0 as above. Raises `ValueError` unless limit > 0.
    """
    if not limit > 0.0:
        raise ValueError(f"needs a positive limit, got {limit}")
    A = torch.tensor([[[2.0, 1.0], [0.0, 1.0]], [[2.0, 1.0], [0.0, 0.5]]], dtype=torch.float64)
    B = torch.tensor([[1.0, 1.0], [1.0, 2.0]], dtype=torch.float64)

    def initial_state(theta: Params, e0: Tensor) -> Tensor:
        return _REACH / math.sqrt(2.0) * (2.0 * torch.special.ndtr(e0) - 1.0)

    def step(theta: Params, state: Tensor, action: Tensor, e: Tensor) -> Tensor:
        mode = action[..., 0].detach().long()
        moved = (theta["A"][mode] @ state.unsqueeze(-1)).squeeze(-1) + theta["B"][mode] * action[..., 1:]
        return moved.clamp(-limit, limit)

    def reward(theta: Params, state: Tensor, action: Tensor, e: Tensor, following: Tensor) -> Tensor:
        return -(state.square().sum(-1) + action[..., 1].square())

    names: dict[str, tuple[str, ...]] = {"state": ("x1", "x2"), "action": ("mode", "u"), "signal": ("x1", "x2")}
    return ModelMDP(
        initial_state=initial_state,
        step=step,
        reward=reward,
        noise_dims=(2, 0),
        dt=1.0,
        names=names,
        units=dict.fromkeys(("x1", "x2", "mode", "u"), "1"),
        box=Box(unit={"A": "1", "B": "1"}, default={"A": A, "B": B}),
    )


def switched_matrices(states: int, modes: int) -> tuple[Tensor, Tensor]:
    """A `[n, n]` and the diagonals B `[modes, n]`."""
    draw = np.random.default_rng(0).standard_normal((states, states))
    symmetric = (draw + draw.T) / 2.0
    B = np.full((modes, states), 0.15)
    for mode, block in enumerate(np.array_split(np.arange(states), modes)):
        B[mode, block] = 1.0
    return torch.tensor(1.1 * np.eye(states) + 0.05 * symmetric / np.abs(symmetric).max()), torch.tensor(B)


def switched_initial_states(states: int, split: Literal["train", "dev", "test"], count: int = 1024) -> Tensor:
    """The fixed initial states `[count, n]` of a split; train and dev come from one draw, dev first."""
    if split not in ("train", "dev", "test"):
        raise ValueError(f"split must be 'train', 'dev' or 'test', got {split!r}")
    rows = count if split == "test" else 2 * count
    random = np.random.RandomState(16 if split == "test" else 8)  # of the published sets
    drawn = random.uniform(-_REACH, _REACH, size=(rows, states, 1))[..., 0] / math.sqrt(states)
    return torch.tensor(drawn[count:] if split == "train" else drawn[:count])


def switched_initial_noise(states: Tensor) -> Tensor:
    """e_0 `[B, n]` that gives the initial states `[B, n]`, for `Noise.initial`."""
    return torch.special.ndtri(0.5 * (1.0 + states * math.sqrt(states.shape[-1]) / _REACH))
