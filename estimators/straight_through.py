"""Straight-through gradient of the choices, with or without Gumbel noise: a biased sibling of the mixed gradient.

The forward pass is the rollout itself, d_t drawn from pi. Backward, the choice is a relaxed one-hot vector,

    y = onehot(d) + q - stop(q),     q = softmax(log pi(.|s) / temperature)               straight-through
                                     q = softmax((log pi(.|s) + g) / temperature)         the same with Gumbel noise

and the step and its reward are mixed by it, `s' = sum_d y_d step(s, a_d)`, `r = sum_d y_d r(s, a_d)`, so that no model
has to accept relaxed actions: K steps instead of one. The Gumbel noise g is drawn given that d is its arg max.
References: Y. Bengio et al., Estimating or propagating gradients through stochastic neurons, 2013; E. Jang et al.,
Categorical reparameterization with Gumbel-softmax, 2017; M. Paulus et al., Rao-Blackwellizing the straight-through
Gumbel-softmax gradient estimator, 2021, section 3 (g given d).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sim2real.estimators.mixed import check_hybrid
from sim2real.estimators.pathwise import check_finite, check_wrt, grouped_gradient
from sim2real.hybrid_policy import HybridPolicy
from sim2real.mdp import ModelMDP, Noise
from sim2real.params import Estimate, Params, ravel
from sim2real.policy import Policy
from sim2real.rollout import discounted_return


def straight_through_gradient(
    mdp: ModelMDP,
    policy: Policy,
    theta: Params,
    nu: Params,
    noise: Noise,
    *,
    wrt: Literal["nu", "theta"] = "nu",
    temperature: float = 1.0,
    gumbel: torch.Generator | None = None,
    groups: int = 0,
) -> Estimate:
    """Biased gradient of `expected_return` with respect to nu or theta; `temperature` of the relaxed choice.

    `gumbel`: generator of the Gumbel noise; None: plain straight-through. All branches must be finite. info:
    "value_stderr"; with `groups >= 2` "stderr" `[P]`. Raises `ValueError` for a policy that is no `HybridPolicy`, a
    model without derivative, a temperature that is not positive, or a return or gradient that is not finite.
    """
    check_wrt(wrt)
    hybrid = check_hybrid(policy)
    if mdp.derivative_order < 1:
        raise ValueError("the model declares derivative_order 0; use score_function_gradient")
    if not 0.0 < temperature < torch.inf:
        raise ValueError(f"temperature must be > 0 and finite, got {temperature}")
    leaves = {key: value.detach().requires_grad_() for key, value in (nu if wrt == "nu" else theta).items()}
    with torch.enable_grad():
        arguments = (theta, leaves) if wrt == "nu" else (leaves, nu)
        rewards = _relaxed_rewards(mdp, hybrid, *arguments, noise, temperature, gumbel)
        returns = discounted_return(rewards, mdp.discount)
    if not returns.requires_grad:
        raise ValueError(f"the return does not depend on {wrt}; check wrt and the keys of the parameters")
    grad, info = grouped_gradient(returns, leaves, groups)
    returns = returns.detach()
    check_finite(returns.mean(), ravel(grad), wrt)
    info["value_stderr"] = returns.std() / len(returns) ** 0.5 if len(returns) > 1 else returns.new_tensor(torch.inf)
    return Estimate(returns.mean(), grad, info)


def _relaxed_rewards(
    mdp: ModelMDP,
    policy: HybridPolicy,
    theta: Params,
    nu: Params,
    noise: Noise,
    temperature: float,
    gumbel: torch.Generator | None,
) -> Tensor:
    """Rewards `[B, T]` of the rollout that `noise` gives, differentiable through the relaxed choices."""
    state = mdp.initial_state(theta, noise.initial)
    running = torch.ones_like(state[:, 0], dtype=torch.bool)
    choices = torch.arange(policy.choices, device=state.device)
    rewards = []
    for e, acting in zip(noise.process.unbind(1), noise.policy.unbind(1), strict=True):
        if mdp.terminal is not None:
            running = running & ~mdp.terminal(theta, state)
        with torch.no_grad():
            index = policy.index(policy.act(nu, state, acting))
        actions = [policy.branch(nu, state, choice.expand(len(state)), acting) for choice in choices]
        weights = _relaxed(policy.choice_log_probs(nu, state, actions[0]), index, temperature, gumbel)
        following = [mdp.step(theta, state, action, e) for action in actions]
        paid = [mdp.reward(theta, state, a, e, s) for a, s in zip(actions, following, strict=True)]
        reward = (weights * torch.stack(paid, -1)).sum(-1)
        mixed = (weights.unsqueeze(-2) * torch.stack(following, -1)).sum(-1)
        rewards.append(torch.where(running, reward, torch.zeros_like(reward)))
        state = torch.where(running.unsqueeze(-1), mixed, state)
    return torch.stack(rewards, 1)


def _relaxed(log_probs: Tensor, index: Tensor, temperature: float, gumbel: torch.Generator | None) -> Tensor:
    """One-hot `[B, K]` forward, the derivative of the softmax backward."""
    hard = torch.nn.functional.one_hot(index, log_probs.shape[-1]).to(log_probs.dtype)
    shift = torch.zeros_like(log_probs) if gumbel is None else _gumbel_given(log_probs.detach(), index, gumbel)
    soft = torch.softmax((log_probs + shift) / temperature, -1)
    return hard + (soft - soft.detach())


def _gumbel_given(log_probs: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
    """Gumbel noise g `[B, K]` given that `log pi + g` is largest at `index`."""
    drawn = torch.empty(log_probs.shape, dtype=log_probs.dtype, device=generator.device)
    exponential = drawn.exponential_(generator=generator).to(log_probs.device)
    top = exponential.gather(-1, index.unsqueeze(-1))  # the largest perturbed value is -log of a unit exponential
    perturbed = -torch.logaddexp(exponential.log() - log_probs, top.log())
    perturbed = perturbed.scatter(-1, index.unsqueeze(-1), -torch.log(top))
    impossible = log_probs == -torch.inf  # stays so under any finite noise
    return torch.where(impossible, torch.zeros_like(log_probs), perturbed - log_probs)
