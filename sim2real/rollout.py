"""Rollouts of a policy in a model, and the in-sim return `J(theta, nu) = E sum_t discount^t r_t`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sim2real.mdp import ModelMDP, Noise
from sim2real.params import Params
from sim2real.policy import Policy


@dataclass(frozen=True)
class Rollout:
    """Simulated or real, same layout, batch first: states `[B, T+1, n]`, actions `[B, T, m]`, rewards `[B, T]`."""

    states: Tensor
    actions: Tensor
    rewards: Tensor
    log_prob: Tensor | None = None
    """`[B, T]` of the policy that acted"""
    mask: Tensor | None = None
    """`[B, T]` True where the step is real; None: all are"""


def rollout(mdp: ModelMDP, policy: Policy, theta: Params, nu: Params, noise: Noise) -> Rollout:
    """Roll `policy` through `mdp` for the T steps of `noise`; differentiable in theta and nu.

    After a terminal state the state is held, the reward is 0 and the mask False. A model with a `closed_loop` rolls a
    policy that says its layers in one piece, with the same result to rounding.
    """
    state = mdp.initial_state(theta, noise.initial)
    fused = _fused(mdp, policy, theta, nu, state, noise)
    if fused is not None:
        return fused
    alive = torch.ones(state.shape[0], dtype=torch.bool, device=state.device)
    states, actions, rewards, mask = [state], [], [], []
    for e, acting in zip(noise.process.unbind(1), noise.policy.unbind(1), strict=True):
        if mdp.terminal is not None:
            alive = alive & ~mdp.terminal(theta, state)
        action = policy.act(nu, state, acting)
        following = mdp.step(theta, state, action, e)
        reward = mdp.reward(theta, state, action, e, following)
        if mdp.terminal is not None:
            following = torch.where(alive.unsqueeze(-1), following, state)
            reward = torch.where(alive, reward, torch.zeros_like(reward))
        state = following
        states.append(state)
        actions.append(action)
        rewards.append(reward)
        mask.append(alive)
    return Rollout(torch.stack(states, 1), torch.stack(actions, 1), torch.stack(rewards, 1), mask=torch.stack(mask, 1))


def _fused(mdp: ModelMDP, policy: Policy, theta: Params, nu: Params, start: Tensor, noise: Noise) -> Rollout | None:
    """The engine's own rollout; None where it has none of this model (as it is now) or of this policy."""
    loop, layers = mdp.closed_loop, policy.layers
    if loop is None or loop.step is not mdp.step or loop.terminal is not mdp.terminal:
        return None
    if layers is None or layers.act is not policy.act:
        return None
    run = loop.run(theta, nu, layers, start, noise)
    if run is None:
        return None
    states, actions, rewards, mask = run
    if loop.reward is not mdp.reward:
        now, following, e = states[:, :-1].unbind(1), states[:, 1:].unbind(1), noise.process.unbind(1)
        each = zip(now, actions.unbind(1), e, following, strict=True)
        rewards = torch.stack([mdp.reward(theta, *row) for row in each], 1)
        rewards = torch.where(mask, rewards, torch.zeros_like(rewards))
    return Rollout(states, actions, rewards, mask=mask)


def discounted_return(rewards: Tensor, discount: float) -> Tensor:
    """`sum_t discount^t r_t` of `rewards [B, T]`, shape `[B]`."""
    weights = discount ** torch.arange(rewards.shape[1], dtype=rewards.dtype, device=rewards.device)
    return rewards @ weights


def expected_return(mdp: ModelMDP, policy: Policy, theta: Params, nu: Params, noise: Noise) -> Tensor:
    """In-sim return J(theta, nu), a scalar: the mean over the batch of the return discounted by `mdp.discount`."""
    return discounted_return(rollout(mdp, policy, theta, nu, noise).rewards, mdp.discount).mean()
