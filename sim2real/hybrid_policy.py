"""Hybrid policies: a discrete choice d and a continuous vector c in one action.

    discrete first      d ~ pi(d | s),       c = branch_d(s) + std_d(s) eta
    continuous first    c = mean(s) + std(s) eta,      d ~ pi(d | s, c)

The action is one tensor, the index of the choice in column 0 and c after it. Of the noise, column 0 draws the index by
inverse transform (it carries no derivative), the others are eta. `std` 0 makes c a deterministic function of (s, d).

`HybridPolicy.log_prob` is the density of the whole action, which a pure score function needs; what an estimator that
differentiates c pathwise may use is `choice_log_probs` alone, so that nothing is counted in both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sim2real.params import Params
from sim2real.policy import Policy, deterministic_policy

Head = Callable[[Params, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class HybridPolicy(Policy):
    """A policy whose action is one of `choices` and a continuous part; a `Policy` wherever one is asked for."""

    choices: int
    index: Callable[[Tensor], Tensor]
    """a -> the choice `[B]`, long"""
    choice_log_probs: Callable[[Params, Tensor, Tensor], Tensor]
    """nu, s, a -> log-probabilities of all choices `[B, K]`; of a only what was drawn before the choice is read"""
    branch: Callable[[Params, Tensor, Tensor, Tensor], Tensor]
    """nu, s, choice `[B]`, e -> the action with that choice under the noise e"""
    column_log_density: Callable[[Params, Tensor, Tensor], Tensor]
    """nu, s, a -> log density of each continuous column given the choice `[B, m]`; raises when deterministic"""
    continuous_first: bool = False
    stochastic: bool = False
    """whether the continuous part is drawn"""


def discrete_first_policy(
    logits: Head, branches: Head, *, choices: int, continuous_dim: int, std: float | Head = 0.0
) -> HybridPolicy:
    """d ~ softmax(logits(nu, s) `[B, K]`), then c = branches(nu, s)`[B, K, m]`[d] + std * eta.

    `std` is in units of c: a number, or a function of (nu, s) that gives `[B, K, m]`. The active branch is gathered:
    the others, however large (but finite), touch neither value nor derivative. Raises `ValueError` for sizes below 1
    (0 for `continuous_dim`) or a negative std, and, when called, for heads of another shape.
    """
    stochastic = _check_sizes(choices, continuous_dim, std)

    def log_probs(nu: Params, state: Tensor, action: Tensor) -> Tensor:
        return torch.log_softmax(_checked(logits(nu, state), (choices,), "logits", "[B, K]"), -1)

    def active(head: Head, nu: Params, state: Tensor, choice: Tensor) -> Tensor:
        values = _checked(head(nu, state), (choices, continuous_dim), "branches or std", "[B, K, m]")
        place = choice.reshape(-1, 1, 1).expand(-1, 1, continuous_dim)
        return values.gather(-2, place).squeeze(-2)

    def spread(nu: Params, state: Tensor, choice: Tensor, center: Tensor) -> Tensor:
        return torch.full_like(center, std) if isinstance(std, float | int) else active(std, nu, state, choice)

    def branch(nu: Params, state: Tensor, choice: Tensor, noise: Tensor) -> Tensor:
        c = active(branches, nu, state, choice)
        if stochastic:
            c = c + spread(nu, state, choice, c) * noise[..., 1:]
        return _join(choice, c)

    def act(nu: Params, state: Tensor, noise: Tensor) -> Tensor:
        _check_noise(noise, 1 + continuous_dim * stochastic)
        with torch.no_grad():  # an index carries no derivative
            choice = _draw(log_probs(nu, state, state), noise)
        return branch(nu, state, choice, noise)

    def density(nu: Params, state: Tensor, action: Tensor) -> Tensor:
        if continuous_dim == 0:
            return action[..., 1:]
        if not stochastic:
            raise _no_density()
        choice = _index(action)
        center = active(branches, nu, state, choice)
        return _normal(action[..., 1:], center, spread(nu, state, choice, center))

    return HybridPolicy(
        act=act,
        log_prob=_whole(log_probs, density),
        noise_dim=1 + continuous_dim * stochastic,
        choices=choices,
        index=_index,
        choice_log_probs=log_probs,
        branch=branch,
        column_log_density=density,
        stochastic=stochastic,
    )


def continuous_first_policy(
    mean: Head,
    logits: Callable[[Params, Tensor, Tensor], Tensor],
    *,
    choices: int,
    continuous_dim: int,
    std: float | Head = 0.0,
) -> HybridPolicy:
    """c = mean(nu, s) `[B, m]` + std * eta, then d ~ softmax(logits(nu, s, c) `[B, K]`).

    `std` as in `discrete_first_policy`, but `[B, m]`. Raises `ValueError` as there.
    """
    stochastic = _check_sizes(choices, continuous_dim, std)

    def log_probs(nu: Params, state: Tensor, action: Tensor) -> Tensor:
        return torch.log_softmax(_checked(logits(nu, state, action[..., 1:]), (choices,), "logits", "[B, K]"), -1)

    def center_and_spread(nu: Params, state: Tensor) -> tuple[Tensor, Tensor]:
        center = _checked(mean(nu, state), (continuous_dim,), "mean", "[B, m]")
        return center, torch.full_like(center, std) if isinstance(std, float | int) else std(nu, state)

    def branch(nu: Params, state: Tensor, choice: Tensor, noise: Tensor) -> Tensor:
        c, spread = center_and_spread(nu, state)
        return _join(choice, c + spread * noise[..., 1:] if stochastic else c)

    def act(nu: Params, state: Tensor, noise: Tensor) -> Tensor:
        _check_noise(noise, 1 + continuous_dim * stochastic)
        first = branch(nu, state, torch.zeros_like(state[..., 0], dtype=torch.long), noise)
        return _join(_draw(log_probs(nu, state, first), noise), first[..., 1:])

    def density(nu: Params, state: Tensor, action: Tensor) -> Tensor:
        if continuous_dim == 0:
            return action[..., 1:]
        if not stochastic:
            raise _no_density()
        return _normal(action[..., 1:], *center_and_spread(nu, state))

    return HybridPolicy(
        act=act,
        log_prob=_whole(log_probs, density),
        noise_dim=1 + continuous_dim * stochastic,
        choices=choices,
        index=_index,
        choice_log_probs=log_probs,
        branch=branch,
        column_log_density=density,
        continuous_first=True,
        stochastic=stochastic,
    )


def hybrid_module_policy(
    discrete: nn.Module, continuous: nn.Module, *, choices: int, continuous_dim: int, std: float = 0.0
) -> tuple[HybridPolicy, Params]:
    """Two trunks: `discrete(s)` gives logits `[B, K]`, `continuous(s)` all branches `[B, K m]`, drawn discrete first.

    Returns the policy and its nu: the parameters of both modules under "discrete." and "continuous.", so that their
    gradients can be clipped apart. For a shared trunk write the two heads as functions of one nu.
    """
    modules = {"discrete": discrete, "continuous": continuous}
    nu: Params = {
        f"{name}.{key}": value for name, module in modules.items() for key, value in module.named_parameters()
    }

    def head(name: str) -> Head:
        prefix = f"{name}."

        def call(nu: Params, state: Tensor) -> Tensor:
            own = {key.removeprefix(prefix): value for key, value in nu.items() if key.startswith(prefix)}
            return functional_call(modules[name], own, (state,))

        return call

    flat = head("continuous")
    policy = discrete_first_policy(
        head("discrete"),
        lambda nu, state: flat(nu, state).unflatten(-1, (choices, continuous_dim)),
        choices=choices,
        continuous_dim=continuous_dim,
        std=std,
    )
    return policy, nu


def greedy_policy(policy: HybridPolicy) -> Policy:
    """The likeliest choice and, with it, the branch at eta = 0: what is evaluated after training."""

    def act(nu: Params, state: Tensor) -> Tensor:
        calm = state.new_zeros(*state.shape[:-1], policy.noise_dim)
        first = policy.branch(nu, state, torch.zeros_like(state[..., 0], dtype=torch.long), calm)
        return policy.branch(nu, state, policy.choice_log_probs(nu, state, first).argmax(-1), calm)

    return deterministic_policy(act)


def choice_entropy(log_probs: Tensor) -> Tensor:
    """Entropy `-sum_d pi log pi` `[...]` (nats) of log-probabilities `[..., K]`; a choice of probability 0 adds 0."""
    possible = log_probs > -math.inf
    safe = torch.where(possible, log_probs, torch.zeros_like(log_probs))
    return -(torch.where(possible, safe.exp(), torch.zeros_like(safe)) * safe).sum(-1)


def _check_sizes(choices: int, continuous_dim: int, std: float | Head) -> bool:
    """Whether the continuous part is drawn."""
    if choices < 1 or continuous_dim < 0:
        raise ValueError(f"choices must be >= 1 and continuous_dim >= 0, got {choices} and {continuous_dim}")
    if isinstance(std, float | int) and not 0.0 <= std < math.inf:
        raise ValueError(f"std must be >= 0 and finite (units of the continuous part), got {std}")
    return continuous_dim > 0 and std != 0.0


def _check_noise(noise: Tensor, columns: int) -> None:
    """Fewer or more columns would broadcast: one choice for ever, or an action of another width."""
    if noise.shape[-1] != columns:
        raise ValueError(
            f"the policy takes {columns} noise columns, got {noise.shape[-1]}; draw with sample_noise(mdp, policy, ...)"
        )


def _checked(values: Tensor, tail: tuple[int, ...], what: str, shape: str) -> Tensor:
    if values.shape[-len(tail) :] != tail:
        raise ValueError(f"{what} gave {tuple(values.shape)}; expected {shape} with {shape[4:-1]} = {tail}")
    return values


def _index(action: Tensor) -> Tensor:
    return action[..., 0].detach().round().long()


def _join(choice: Tensor, c: Tensor) -> Tensor:
    return torch.cat([choice.to(c.dtype).unsqueeze(-1), c], -1)


def _draw(log_probs: Tensor, noise: Tensor) -> Tensor:
    """Index `[B]` of the interval of the cumulative distribution in which the uniform Phi(e_0) falls."""
    cumulative = log_probs.detach().exp().cumsum(-1)
    uniform = torch.special.ndtr(noise[..., :1])
    return (uniform >= cumulative[..., :-1]).sum(-1)


def _normal(value: Tensor, center: Tensor, std: Tensor) -> Tensor:
    z = (value - center) / std
    return -0.5 * z * z - torch.log(std) - 0.5 * math.log(2 * math.pi)


def _whole(
    log_probs: Callable[[Params, Tensor, Tensor], Tensor], density: Callable[[Params, Tensor, Tensor], Tensor]
) -> Callable[[Params, Tensor, Tensor], Tensor]:
    def log_prob(nu: Params, state: Tensor, action: Tensor) -> Tensor:
        continuous = density(nu, state, action).sum(-1)
        return log_probs(nu, state, action).gather(-1, _index(action).unsqueeze(-1)).squeeze(-1) + continuous

    return log_prob


def _no_density() -> ValueError:
    return ValueError(
        "the continuous part is deterministic and has no density; use mixed_gradient, or give the policy a std > 0"
    )
