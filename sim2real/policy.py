"""Policies as pure functions of nu.

`act(nu, s, e)` is differentiable in nu and s wherever the action is continuous (reparameterised); what is sampled
without a derivative (a discrete index) is detached and covered by `log_prob`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sim2real.params import Params

Act = Callable[[Params, Tensor, Tensor], Tensor]
Activation = Literal["identity", "tanh", "relu", "sigmoid", "silu", "elu", "softplus"]


@dataclass(frozen=True)
class Layers:
    """What a policy computes, said so that an engine can do it: `h_0 = s`, `h_i = f_i(W_i h_{i-1} + b_i)`.

    The last h is the mean of the action, to which `std * e` is added. Of a policy whose `act` is not this `act` (it was
    replaced) they say nothing.
    """

    weights: Callable[[Params], tuple[tuple[Tensor, Tensor | None], ...]]
    """nu -> per layer W `[out, in]` and b `[out]` or None, both with a leading axis where they are per environment"""
    activations: tuple[Activation, ...]
    """f_i per layer"""
    std: float | Literal["head"]
    """in action units; "head": the last h is the mean and, after it, the log of the standard deviation"""
    act: Act


@dataclass(frozen=True)
class Policy:
    """`act`: nu, s `[B, n]`, e `[B, noise_dim]` -> a `[B, m]`; `log_prob`: nu, s, a -> `[B]`."""

    act: Act
    log_prob: Callable[[Params, Tensor, Tensor], Tensor]
    noise_dim: int
    layers: Layers | None = None
    """of a linear or layered policy, for engines that evaluate it themselves; None: only `act` knows"""


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

    policy = _fixed_std(mean, std, action_dim)
    weights = lambda nu: ((-nu["gain"], nu.get("offset")),)
    return replace(policy, layers=Layers(weights, ("identity",), std, policy.act))


def module_policy(module: nn.Module, *, std: float = 0.0) -> Policy:
    """`a = module(s) + std * e` with `nu = dict(module.named_parameters())`; std (action units) 0: deterministic."""
    mean = lambda nu, state: functional_call(module, nu, (state,))
    policy = _fixed_std(mean, std, _output_width(module) if std else 0)
    return replace(policy, layers=_layers(module, std, policy.act))


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

    return Policy(act, log_prob, noise_dim=width // 2, layers=_layers(module, "head", act))


def _output_width(module: nn.Module) -> int:
    linear = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    if not linear:
        raise ValueError("cannot tell the action dimension: the module has no nn.Linear layer")
    return linear[-1].out_features


def _layers(module: nn.Module, std: float | Literal["head"], act: Act) -> Layers | None:
    """The layers of an `nn.Linear` or of an `nn.Sequential` of them and activations; None for any other module."""
    chain = _chain(module, "")
    names: list[str] = []
    activations: list[Activation] = []
    for name, part in chain or ():
        plain = not part._forward_hooks and not part._forward_pre_hooks
        if type(part) is nn.Linear and plain:
            names.append(name)
            activations.append("identity")
        elif names and activations[-1] == "identity" and plain and (known := _activation(part)) is not None:
            activations[-1] = known
        else:
            return None
    linear = [id(part) for _, part in chain or () if type(part) is nn.Linear]
    if not names or len(set(linear)) < len(linear):  # the parameters of a repeated part go by one of its names only
        return None

    def weights(nu: Params) -> tuple[tuple[Tensor, Tensor | None], ...]:
        given = {**dict(module.named_parameters()), **nu}  # functional_call leaves the others as they are
        return tuple((given[f"{name}weight"], given.get(f"{name}bias")) for name in names)

    return Layers(weights, tuple(activations), std, act)


def _chain(module: nn.Module, prefix: str) -> list[tuple[str, nn.Module]] | None:
    """The parts applied one after the other, with the prefixes of their parameters' names."""
    if type(module) is not nn.Sequential:
        return [(prefix, module)]
    if module._forward_hooks or module._forward_pre_hooks:
        return None
    parts = [_chain(part, f"{prefix}{name}.") for name, part in module._modules.items()]
    return None if any(part is None for part in parts) else [item for part in parts for item in part or ()]


def _activation(part: nn.Module) -> Activation | None:
    plain: dict[type[nn.Module], Activation] = {
        nn.Identity: "identity",
        nn.Tanh: "tanh",
        nn.ReLU: "relu",
        nn.Sigmoid: "sigmoid",
        nn.SiLU: "silu",
    }
    if isinstance(part, nn.ELU) and part.alpha == 1.0:
        return "elu"
    if isinstance(part, nn.Softplus) and (part.beta, part.threshold) == (1.0, 20.0):
        return "softplus"
    return plain.get(type(part))


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
