"""Mixed pathwise and score-function gradient for hybrid discrete-continuous actions.

With exogenous noise w fixed and the choices d_0..d_{T-1} fixed, a rollout is a differentiable function of the
parameters x, so `J = E_w sum_d prod_t pi(d_t | s_t) sum_t discount^t r_t` has the gradient

    grad J = E sum_t [ discount^t dr_t/dx                        pathwise, choices frozen
                       + A_t (d/dx) log pi(d_t | s_t)            score function
                       + A_t (ds_t/dx)^T grad_s log pi ],        cross term

total derivatives, `A_t = sum_{k >= t} discount^k r_k - b_t`: the derivative of the surrogate
`sum_t discount^t r_t + stop(A_t) log pi(d_t | s_t)` with s_t attached. Where the continuous part is drawn before the
choice, log pi reads it and the cross term has a part of the same step.

With a temperature tau the objective is `E sum_t discount^t (r_t + tau H(pi(.|s_t)))`. At its soft best response
`pi = softmax(Q / tau)` the cross term and the entropy's derivative through the state cancel,
`sum_d Q grad_s pi + tau grad_s H = 0`: cross_term="entropy" leaves out both and is exact there, with no cross-term
noise. "dropped" leaves out the cross term alone, an error of order tau near such a policy. Proof: docs, mixed.
Reference: M. Alvo et al., Policy optimization in hybrid discrete-continuous action spaces via mixed gradients; J.
Schulman et al., Gradient estimation using stochastic computation graphs, 2015, theorem 1 (the surrogate).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from sim2real.estimators.baselines import Advantage, alive, reward_to_go, time_baseline
from sim2real.estimators.pathwise import check_finite, check_wrt, grouped_gradient
from sim2real.hybrid_policy import HybridPolicy, choice_entropy
from sim2real.mdp import ModelMDP, Noise
from sim2real.params import Estimate, Params, ravel
from sim2real.policy import Policy
from sim2real.rollout import Rollout, rollout

CrossTerm = Literal["exact", "dropped", "entropy"]


@dataclass(frozen=True)
class Decisions:
    """What was drawn in B rollouts of T steps, detached."""

    drawn: Rollout
    """rewards include the entropy bonus"""
    index: Tensor
    """`[B, T]`"""
    log_probs: Tensor
    """of all choices `[B, T, K]`"""


Credit = Callable[[Decisions], Tensor]
"""decisions -> the weight `[B, T, K]` of grad log pi of each choice"""


def mixed_gradient(
    mdp: ModelMDP,
    policy: Policy,
    theta: Params,
    nu: Params,
    noise: Noise,
    *,
    wrt: Literal["nu", "theta"] = "nu",
    cross_term: CrossTerm = "exact",
    temperature: float = 0.0,
    advantage: Advantage = time_baseline,
    sampled_model: bool = False,
    groups: int = 0,
) -> Estimate:
    """Gradient of `expected_return` (plus `temperature` (reward units) times the entropy) with respect to nu or theta.

    Unbiased where nothing but the choices jumps: a `terminal` that the parameters move lacks its derivative, as in
    `pathwise_gradient`.
    `policy` is a `HybridPolicy`; parameters may be shared between its parts. `advantage`: a function of
    `sim2real.estimators.baselines`. With `sampled_model` the model draws a category in `step` (detached), whose
    probability given s and a is `mdp.log_prob`; it is scored too.

    info: "value_stderr"; "effective_sample_size", `(sum w)^2 / sum w^2` of the rollouts' weights `w = sum_t |A_t|`:
    how many of them carry the score and cross terms; with `groups >= 2` also "stderr" `[P]`. Raises `ValueError` for a
    policy that is no `HybridPolicy`, a model without derivative, a log_prob that counts what `step` differentiates,
    "entropy" without a temperature, options out of range, or a return or gradient that is not finite.
    """

    def credit(decisions: Decisions) -> Tensor:
        weights = advantage(decisions.drawn, noise, mdp.discount)
        if weights.shape != decisions.index.shape:
            raise ValueError(f"advantage gave {tuple(weights.shape)}; expected [B, T] = {tuple(decisions.index.shape)}")
        return on_drawn(weights, decisions)

    model_weights = advantage if sampled_model else None
    return credited_gradient(
        mdp,
        policy,
        theta,
        nu,
        noise,
        credit,
        wrt=wrt,
        cross_term=cross_term,
        temperature=temperature,
        model_weights=model_weights,
        groups=groups,
    )


def on_drawn(weights: Tensor, decisions: Decisions) -> Tensor:
    """`weights [B, T]` put on the choices that were drawn, `[B, T, K]`."""
    place = torch.nn.functional.one_hot(decisions.index, decisions.log_probs.shape[-1])
    return weights.unsqueeze(-1) * place


def credited_gradient(
    mdp: ModelMDP,
    policy: Policy,
    theta: Params,
    nu: Params,
    noise: Noise,
    credit: Credit,
    *,
    wrt: Literal["nu", "theta"] = "nu",
    cross_term: CrossTerm = "exact",
    temperature: float = 0.0,
    model_weights: Advantage | None = None,
    groups: int = 0,
) -> Estimate:
    """The mixed gradient with any weights of the choices: derivative of `sum_t r_t + sum_d credit_td log pi(d|s_t)`.

    What `mixed_gradient`, `all_action_gradient` and `counterfactual_gradient` share; info and errors as there.
    """
    check_wrt(wrt)
    hybrid = check_hybrid(policy)
    _check_options(mdp, cross_term, temperature)
    leaves = {key: value.detach().requires_grad_() for key, value in (nu if wrt == "nu" else theta).items()}
    theta_, nu_ = (theta, leaves) if wrt == "nu" else (leaves, nu)
    with torch.enable_grad():
        path = rollout(mdp, hybrid, theta_, nu_, noise)
        log_probs, bonus = _choices(hybrid, nu_, path, cross_term, temperature)
        rewards = path.rewards + bonus
        drawn = _detached(replace(path, rewards=rewards))
        index = torch.stack([hybrid.index(action) for action in drawn.actions.unbind(1)], 1)
        decisions = Decisions(drawn, index, log_probs.detach())
        weights = credit(decisions)
        possible = decisions.log_probs > -torch.inf
        scored = torch.where(possible, weights * log_probs, torch.zeros_like(log_probs)).sum(-1)
        if model_weights is not None:
            scored = scored + model_weights(drawn, noise, mdp.discount) * _model_log_prob(mdp, theta_, path)
        discounts = mdp.discount ** torch.arange(rewards.shape[1], dtype=rewards.dtype, device=rewards.device)
        surrogate = rewards @ discounts + (scored * alive(drawn)).sum(1)
    if not surrogate.requires_grad:
        raise ValueError(f"neither return nor choices depend on {wrt}; check wrt and the keys of the parameters")
    grad, info = grouped_gradient(surrogate, leaves, groups)
    returns = reward_to_go(drawn, mdp.discount)[:, 0]
    check_finite(returns.mean(), ravel(grad), wrt)
    carried = weights.abs().sum((1, 2))
    info["value_stderr"] = returns.std() / len(returns) ** 0.5 if len(returns) > 1 else returns.new_tensor(torch.inf)
    info["effective_sample_size"] = carried.sum().square() / carried.square().sum().clamp_min(
        torch.finfo(carried.dtype).tiny
    )
    return Estimate(returns.mean(), grad, info)


def check_hybrid(policy: Policy) -> HybridPolicy:
    """`policy`, if it is hybrid; else `ValueError`."""
    if not isinstance(policy, HybridPolicy):
        raise ValueError(
            "the mixed gradient needs a HybridPolicy, to tell choices from the continuous part: build it with "
            "discrete_first_policy, continuous_first_policy or cut_policy (pathwise_gradient and "
            "score_function_gradient take any policy)"
        )
    return policy


def _check_options(mdp: ModelMDP, cross_term: str, temperature: float) -> None:
    if mdp.derivative_order < 1:
        raise ValueError("the model declares derivative_order 0; use score_function_gradient")
    if cross_term not in ("exact", "dropped", "entropy"):
        raise ValueError(f"cross_term must be 'exact', 'dropped' or 'entropy', got {cross_term!r}")
    if not 0.0 <= temperature < torch.inf:
        raise ValueError(f"temperature must be >= 0 and finite (reward units), got {temperature}")
    if cross_term == "entropy" and temperature == 0.0:
        raise ValueError("cross_term='entropy' is exact for the entropy-regularised return only: pass temperature > 0")


def _choices(
    policy: HybridPolicy, nu: Params, path: Rollout, cross_term: CrossTerm, temperature: float
) -> tuple[Tensor, Tensor]:
    """log pi of all choices `[B, T, K]` and the entropy bonus `[B, T]`, attached to the state as `cross_term` says."""

    def log_probs(states: Tensor, actions: Tensor) -> Tensor:
        steps = zip(states[:, :-1].unbind(1), actions.unbind(1), strict=True)
        return torch.stack([policy.choice_log_probs(nu, s, a) for s, a in steps], 1)

    attached = cross_term == "exact"
    scored = log_probs(*((path.states, path.actions) if attached else (path.states.detach(), path.actions.detach())))
    if temperature == 0.0:
        return scored, torch.zeros_like(path.rewards)
    through = log_probs(path.states, path.actions) if cross_term == "dropped" else scored
    return scored, temperature * choice_entropy(through) * alive(path)


def _model_log_prob(mdp: ModelMDP, theta: Params, path: Rollout) -> Tensor:
    """log probability `[B, T]` of what `step` drew, s and a attached."""
    if mdp.log_prob is None:
        raise ValueError("sampled_model needs the model's log_prob of the category it draws")
    found = []
    for t, action in enumerate(path.actions.unbind(1)):
        following = path.states[:, t + 1]
        if t == 0 and following.requires_grad:
            _check_counted_once(mdp, theta, path.states[:, 0], action, following)
        found.append(mdp.log_prob(theta, path.states[:, t], action, following.detach()))
    return torch.stack(found, 1)


def _check_counted_once(mdp: ModelMDP, theta: Params, state: Tensor, action: Tensor, following: Tensor) -> None:
    """A log_prob with a slope in s' is a density of what `step` already differentiates."""
    assert mdp.log_prob is not None
    leaf = following.detach().requires_grad_()
    value = mdp.log_prob({key: x.detach() for key, x in theta.items()}, state.detach(), action.detach(), leaf)
    if not value.requires_grad:
        return
    (slope,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True, materialize_grads=True)
    columns = (slope != 0).any(0).nonzero().flatten().tolist()
    if columns:
        raise ValueError(
            f"log_prob is a density of the state columns {columns}, which step differentiates: they would be counted "
            "twice. log_prob must cover the drawn category only, or leave sampled_model off"
        )


def _detached(path: Rollout) -> Rollout:
    return Rollout(path.states.detach(), path.actions.detach(), path.rewards.detach(), mask=path.mask)
