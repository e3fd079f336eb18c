"""The enumerated hybrid problem of `oracles/mixed_enumeration.py` as a model and policies of the library."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from benchmarks.oracles import mixed_enumeration as oracle
from sim2real.hybrid_policy import HybridPolicy, discrete_first_policy
from sim2real.mdp import ModelMDP
from sim2real.params import Params

POINTS = ("far", "mid", "near", "very near")
_A, _B, _KAPPA, _START = (torch.tensor(value) for value in (oracle.A, oracle.B, oracle.KAPPA, oracle.START))


def model(noise: Literal["two-point", "none"] = "two-point") -> ModelMDP:
    """State `[2]`, action (choice, c); the two-point noise of c enters as process noise, "none": not at all."""

    def continuous(action: Tensor, e: Tensor) -> Tensor:
        return action[:, 1] + oracle.SPREAD * torch.sign(e[:, 0]) if noise == "two-point" else action[:, 1]

    def step(theta: Params, state: Tensor, action: Tensor, e: Tensor) -> Tensor:
        choice, c = action[:, 0].long(), continuous(action, e)
        moved = (_A[choice] @ state.unsqueeze(-1)).squeeze(-1)
        return moved + _B[choice] * c.unsqueeze(-1) + 0.1 * torch.sin(state)

    def reward(theta: Params, state: Tensor, action: Tensor, e: Tensor, following: Tensor) -> Tensor:
        c = continuous(action, e)
        return -(following.square().sum(-1) + oracle.PRICE * c.square() + _KAPPA[action[:, 0].long()])

    return ModelMDP(
        initial_state=lambda theta, e: _START[(e[:, 0] > 0).long()],
        step=step,
        reward=reward,
        noise_dims=(1, 1 if noise == "two-point" else 0),
        dt=1.0,
        discount=oracle.DISCOUNT,
    )


def policy(std: float = 0.0) -> HybridPolicy:
    """Softmax-linear choice and linear gains per choice; nu has the keys W, b, k, h in the order of the oracle."""

    def logits(nu: Params, state: Tensor) -> Tensor:
        return state @ nu["W"].mT + nu["b"]

    def branches(nu: Params, state: Tensor) -> Tensor:
        return (state @ nu["k"].mT + nu["h"]).unsqueeze(-1)

    return discrete_first_policy(logits, branches, choices=3, continuous_dim=1, std=std)


def parameters(point: str) -> Params:
    """nu at one of `POINTS`."""
    return as_params(torch.tensor(oracle.points()[point]))


def as_params(vector: Tensor) -> Params:
    """nu from the 18 numbers of the oracle."""
    W, b, k, h = vector.split([6, 3, 6, 3])
    return {"W": W.reshape(3, 2), "b": b, "k": k.reshape(3, 2), "h": h}
