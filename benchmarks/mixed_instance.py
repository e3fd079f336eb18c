"""The enumerated hybrid problem of `oracles/mixed_enumeration.py` as a model and policies, and its trajectories."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from benchmarks.oracles import mixed_enumeration as oracle
from sim2real.hybrid_policy import HybridPolicy, discrete_first_policy
from sim2real.mdp import ModelMDP, Noise
from sim2real.params import Params
from sim2real.rollout import discounted_return, rollout

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


def forced(policy: HybridPolicy) -> HybridPolicy:
    """The policy whose noise column 0 names the choice instead of drawing it."""
    return replace(policy, act=lambda nu, s, e: policy.branch(nu, s, e[:, 0].round().long(), e))


def every_trajectory(policy: HybridPolicy, horizon: int) -> Noise:
    """Noise of all rollouts of the instance: two starts, two noises and K choices per step, one row each."""
    steps = list(itertools.product(range(policy.choices), (-1.0, 1.0)))
    rows = list(itertools.product((-1.0, 1.0), *[steps] * horizon))
    choice = torch.tensor([[step[0] for step in row[1:]] for row in rows], dtype=torch.float64).unsqueeze(-1)
    eta = torch.tensor([[step[1] for step in row[1:]] for row in rows], dtype=torch.float64).unsqueeze(-1)
    acting = torch.cat([choice, eta], -1) if policy.stochastic else choice
    return Noise(torch.tensor([[row[0]] for row in rows], dtype=torch.float64), eta, acting)


def probabilities(
    mdp: ModelMDP, policy: HybridPolicy, theta: Params, nu: Params, noise: Noise
) -> tuple[Tensor, Tensor]:
    """Probability and return `[N]` of every trajectory, differentiable in theta and nu."""
    path = rollout(mdp, forced(policy), theta, nu, noise)
    log_p = torch.zeros_like(path.rewards[:, 0])
    for t, action in enumerate(path.actions.unbind(1)):
        of_all = policy.choice_log_probs(nu, path.states[:, t], action)
        log_p = log_p + of_all.gather(-1, policy.index(action).unsqueeze(-1)).squeeze(-1)
    eta_and_start = 0.5 ** (path.rewards.shape[1] + 1)
    return log_p.exp() * eta_and_start, discounted_return(path.rewards, mdp.discount)
