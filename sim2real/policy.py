"""Policies as pure functions of nu.

`act(nu, s, e)` is differentiable in nu and s wherever the action is continuous (reparameterised); what is sampled
without a derivative (a discrete index) is detached and covered by `log_prob`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sim2real.params import Params


@dataclass(frozen=True)
class Policy:
    """`act`: nu, s `[B, n]`, e `[B, noise_dim]` -> a `[B, m]`; `log_prob`: nu, s, a -> `[B]`."""

    act: Callable[[Params, Tensor, Tensor], Tensor]
    log_prob: Callable[[Params, Tensor, Tensor], Tensor]
    noise_dim: int


def _no_density(nu: Params, state: Tensor, action: Tensor) -> Tensor:
    raise ValueError(
        "a deterministic policy has no log_prob; use a stochastic policy (std > 0) or a deterministic estimator"
    )


def _gaussian_log_prob(action: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    z = (action - mean) * torch.exp(-log_std)
    return (-0.5 * z * z - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def deterministic_policy(mean: Callable[[Params, Tensor], Tensor]) -> Policy:
    """`a = mean(nu, s)`; `log_prob` raises `ValueError`."""
    return Policy(act=lambda nu, state, noise: mean(nu, state), log_prob=_no_density, noise_dim=0)


def linear_policy(action_dim: int, *, std: float = 0.0) -> Policy:
    """`a = -K s (+ k) + std * e` with `nu = {"gain": K [m, n]}` and optionally `"offset": k [m]`.

    nu["gain"] may be `[B, m, n]`, one gain per environment. `std` (in action units) 0 gives a deterministic policy.
    """

    def mean(nu: Params, state: Tensor) -> Tensor:
        action = -(nu["gain"] @ state.unsqueeze(-1)).squeeze(-1)
        return action + nu["offset"] if "offset" in nu else action

    return _fixed_std(mean, std, action_dim)


def module_policy(module: nn.Module, *, std: float = 0.0) -> Policy:
    """`a = module(s) + std * e` with `nu = dict(module.named_parameters())`; std (action units) 0: deterministic."""
    mean = lambda nu, state: functional_call(module, nu, (state,))
    return _fixed_std(mean, std, _output_width(module) if std else 0)


def _fixed_std(mean: Callable[[Params, Tensor], Tensor], std: float, action_dim: int) -> Policy:
    if not 0.0 <= std < math.inf:
        raise ValueError(f"std must be >= 0 and finite (action units), got {std}")
    if std == 0.0:
        return deterministic_policy(mean)

    def log_prob(nu: Params, state: Tensor, action: Tensor) -> Tensor:
        center = mean(nu, state)
        return _gaussian_log_prob(action, center, torch.full_like(center, math.log(std)))

    return Policy(lambda nu, state, noise: mean(nu, state) + std * noise, log_prob, noise_dim=action_dim)


def gaussian_policy(module: nn.Module) -> Policy:
    """Gaussian policy from a module that returns `[B, 2m]`: mean and log standard deviation, in action units.

    `nu = dict(module.named_parameters())`. Raises `ValueError` when the module's last dimension is odd.
    """
    width = _output_width(module)
    if width % 2:
        raise ValueError(f"the module returns {width} numbers per state; mean and log_std need an even number")

    def split(nu: Params, state: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = functional_call(module, nu, (state,)).chunk(2, dim=-1)
        return mean, log_std

    def act(nu: Params, state: Tensor, noise: Tensor) -> Tensor:
        mean, log_std = split(nu, state)
        return mean + torch.exp(log_std) * noise

    def log_prob(nu: Params, state: Tensor, action: Tensor) -> Tensor:
        return _gaussian_log_prob(action, *split(nu, state))

    return Policy(act, log_prob, noise_dim=width // 2)


def _output_width(module: nn.Module) -> int:
    linear = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    if not linear:
        raise ValueError("cannot tell the action dimension: the module has no nn.Linear layer")
    return linear[-1].out_features


def boltzmann_policy(q_values: Callable[[Params, Tensor], Tensor], temperature: float) -> Policy:
    """`pi(a|s) = softmax_a(q_values(nu, s) / temperature)`: indices a `[B, 1]`, temperature in reward units.

    The index is drawn by inverse transform from one standard normal column and carries no derivative.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0 (reward units), got {temperature}")

    def log_pi(nu: Params, state: Tensor) -> Tensor:
        return torch.log_softmax(q_values(nu, state) / temperature, dim=-1)

    def act(nu: Params, state: Tensor, noise: Tensor) -> Tensor:
        cumulative = log_pi(nu, state).detach().exp().cumsum(-1)
        uniform = torch.special.ndtr(noise[..., :1])
        index = (uniform >= cumulative).sum(-1, keepdim=True).clamp(max=cumulative.shape[-1] - 1)
        return index.to(state.dtype)

    def log_prob(nu: Params, state: Tensor, action: Tensor) -> Tensor:
        return log_pi(nu, state).gather(-1, action[..., :1].long()).squeeze(-1)

    return Policy(act, log_prob, noise_dim=1)
