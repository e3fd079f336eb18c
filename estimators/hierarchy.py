"""A model under a fixed lower level, seen by the upper policy: one of its steps is T steps of the model.

    x_0 = s,   a_t = clip(lower(theta, rows, u, x_t, t)),   x_{t+1} = step(theta, x_t, a_t, e_t),   s' = x_T
    r = sum_t discount^t reward(theta, x_t, a_t, e_t, x_{t+1}),        discount of the new model: discount^T

u, the goal or share or parameter that the lower level is given, is the action. The result is a `ModelMDP` like any
other: rollouts deploy an upper policy, estimators and tuning differentiate it, online fine-tuning is plain training.
Reference: Schmidt et al., Offline hierarchical reinforcement learning via inverse optimization, 2024, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from sim2real.mdp import ModelMDP
from sim2real.params import Params
from sim2real.solvers.inversion_maps import Lower

Begin = Callable[[Params, Tensor], Params]
"""theta, state `[N, n]` where a goal begins -> what `lower` reads in `rows`, each `[N, ...]`"""


def hierarchical_model(
    mdp: ModelMDP,
    lower: Lower,
    horizon: int,
    *,
    begin: Begin | None = None,
    low: Tensor | float = -math.inf,
    high: Tensor | float = math.inf,
    inputs: tuple[str, ...] = (),
) -> ModelMDP:
    """The model whose action is the input u of `lower`, held over `horizon` steps of `mdp`.

    `begin` prepares what the lower level keeps for one goal: relinearised gains, the first pose. Actions are clipped to
    [low, high]. `inputs` names the columns of u. Noise of T steps is one step's: `[N, T k]`. A terminal state within
    the segment holds, later rewards are 0. Fused rollouts and densities of the model do not carry over.
    Raises `ValueError` for a horizon below 1 or a model with measured inputs, whose columns would change their meaning.
    """
    if horizon < 1:
        raise ValueError(f"horizon must be at least 1, got {horizon}")
    if mdp.exogenous_dim:
        raise ValueError(f"the model has measured inputs {mdp.names.get('exogenous', ())}; put them into its state")
    start, width = mdp.noise_dims

    def segment(theta: Params, state: Tensor, u: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        rows = {"state": state} | ({} if begin is None else begin(theta, state))
        noise, total = e.reshape(len(state), horizon, width), torch.zeros_like(state[:, 0])
        alive = torch.ones_like(total, dtype=torch.bool)
        for t in range(horizon):
            if mdp.terminal is not None:
                alive = alive & ~mdp.terminal(theta, state)
            limits = (torch.as_tensor(b, dtype=u.dtype, device=u.device) for b in (low, high))
            action = lower(theta, rows, u, state, t).clamp(*limits)
            following = mdp.step(theta, state, action, noise[:, t])
            reward = mdp.reward(theta, state, action, noise[:, t], following)
            total = total + torch.where(alive, mdp.discount**t * reward, torch.zeros_like(reward))
            state = torch.where(alive.unsqueeze(-1), following, state)
        return state, total

    return replace(
        mdp,
        step=lambda theta, state, u, e: segment(theta, state, u, e)[0],
        reward=lambda theta, state, u, e, following: segment(theta, state, u, e)[1],
        noise_dims=(start, width * horizon),
        dt=mdp.dt * horizon,
        discount=mdp.discount**horizon,
        log_prob=None,
        open_loop=None,
        closed_loop=None,
        sensitivity=None,
        names=mdp.names | {"action": inputs},
    )
