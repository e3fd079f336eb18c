"""Mixed gradient with counterfactual branches under common noise.

At every step t the rollout is continued with each choice d in turn, all under the same noise from then on, the draws of
later choices included. `G_t(d)` is the sum of the rewards to come of that branch:

    sum_t sum_d G_t(d) grad pi(d | s_t)      in place of      sum_t A_t grad log pi(d_t | s_t),

attached to the state as in `mixed`. Unbiased, since given the past and the noise of the continuous part the mean of
G_t(d) over later draws is that of the rewards after d; what the branches share cancels, as `sum_d grad pi(d|s) = 0`.
It costs T (K - 1) / 2 more rollouts each, without derivative, on parallel rows.
Reference: the all-action policy gradient of R. Sutton et al., 2000, with values from common random numbers ("vine" of
J. Schulman et al., Trust region policy optimization, 2015, section 5.2).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sim2real.estimators.baselines import reward_to_go
from sim2real.estimators.mixed import CrossTerm, Decisions, check_hybrid, credited_gradient
from sim2real.hybrid_policy import HybridPolicy, choice_entropy
from sim2real.mdp import ModelMDP, Noise
from sim2real.params import Estimate, Params
from sim2real.policy import Policy


def counterfactual_gradient(
    mdp: ModelMDP,
    policy: Policy,
    theta: Params,
    nu: Params,
    noise: Noise,
    *,
    wrt: Literal["nu", "theta"] = "nu",
    cross_term: CrossTerm = "exact",
    temperature: float = 0.0,
    groups: int = 0,
) -> Estimate:
    """Gradient as `mixed_gradient` gives it, with all branches rolled out. theta and nu are shared by the batch.

    info and errors as for `mixed_gradient`. At step t, B (K - 1) (t + 1) rows are in flight.
    """
    hybrid = check_hybrid(policy)

    def credit(decisions: Decisions) -> Tensor:
        with torch.no_grad():
            to_go = _branches(mdp, hybrid, theta, nu, noise, decisions, temperature)
        pi = decisions.log_probs.exp()
        return pi * (to_go - (pi * to_go).sum(-1, keepdim=True))

    return credited_gradient(
        mdp, policy, theta, nu, noise, credit, wrt=wrt, cross_term=cross_term, temperature=temperature, groups=groups
    )


def _branches(
    mdp: ModelMDP,
    policy: HybridPolicy,
    theta: Params,
    nu: Params,
    noise: Noise,
    decisions: Decisions,
    temperature: float,
) -> Tensor:
    """Rewards to come `[B, T, K]` after each choice; of the choice drawn they are the rollout's own."""
    drawn, others = decisions.drawn, policy.choices - 1
    own = reward_to_go(drawn, mdp.discount)
    batch, horizon = own.shape
    mask = torch.ones_like(own, dtype=torch.bool) if drawn.mask is None else drawn.mask
    shift = torch.arange(1, policy.choices, device=own.device).reshape(-1, 1)
    states, total, running = drawn.states[:0, 0], own[:0, 0], mask[:0, 0]
    for t in range(horizon):
        e, acting, first = noise.process[:, t], noise.policy[:, t], drawn.states[:, t]
        forced = ((decisions.index[:, t] + shift) % policy.choices).reshape(-1)
        fresh = first.repeat(others, 1)
        fresh_action = policy.branch(nu, fresh, forced, acting.repeat(others, 1))
        if mdp.terminal is not None:
            running = running & ~mdp.terminal(theta, states)
        action = torch.cat([policy.act(nu, states, acting.repeat(others * t, 1)), fresh_action])
        states, running = torch.cat([states, fresh]), torch.cat([running, mask[:, t].repeat(others)])
        inputs = e.repeat(others * (t + 1), 1)
        following = mdp.step(theta, states, action, inputs)
        reward = mdp.reward(theta, states, action, inputs, following)
        if temperature:
            reward = reward + temperature * choice_entropy(policy.choice_log_probs(nu, states, action))
        started = torch.cat([total, torch.zeros_like(fresh[:, 0], dtype=total.dtype)])
        total = started + mdp.discount**t * torch.where(running, reward, torch.zeros_like(reward))
        states = torch.where(running.unsqueeze(-1), following, states)
    branched = total.reshape(horizon, others, batch).permute(2, 0, 1)  # [B, T, K - 1], shifted from the choice drawn
    place = (decisions.index.unsqueeze(-1) + shift.reshape(-1)) % policy.choices
    return own.new_empty(batch, horizon, policy.choices).scatter(
        -1, torch.cat([decisions.index.unsqueeze(-1), place], -1), torch.cat([own.unsqueeze(-1), branched], -1)
    )
