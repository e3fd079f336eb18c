"""Mixed gradient with every action weighed, by an action value as control variate.

The sampled score term is replaced by its mean over the choice, as far as a critic Q knows it:

    sum_t sum_d Q(s_t, d) grad pi(d | s_t)  +  sum_t (G_t - Q(s_t, d_t)) grad log pi(d_t | s_t),

`G_t` the rewards to come, both terms discounted by discount^t and attached to the state as in `mixed`. The sum is
unbiased for *any* Q that sees nothing but s_t, d and the noise of the continuous part; with the exact Q the choice of
step t adds no variance. Without the second term it is the expected (all-action) policy gradient, biased as Q is.
References: R. Sutton et al., Policy gradient methods for reinforcement learning with function approximation, 2000 (all
actions); K. Asadi et al., Mean actor critic, 2017; S. Gu et al., Q-Prop, 2017 (control variate).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from sim2real.estimators.baselines import alive, reward_to_go
from sim2real.estimators.mixed import CrossTerm, Decisions, check_hybrid, credited_gradient, on_drawn
from sim2real.mdp import ModelMDP, Noise
from sim2real.params import Estimate, Params
from sim2real.policy import Policy


def all_action_gradient(
    mdp: ModelMDP,
    policy: Policy,
    theta: Params,
    nu: Params,
    noise: Noise,
    *,
    action_value: Callable[[Tensor, Tensor], Tensor],
    corrected: bool = True,
    wrt: Literal["nu", "theta"] = "nu",
    cross_term: CrossTerm = "exact",
    temperature: float = 0.0,
    groups: int = 0,
) -> Estimate:
    """Gradient as `mixed_gradient` gives it; `action_value`: s `[B, n]`, a `[B, m]` -> Q `[B]`, the value from s on.

    Give the state a clock for a finite horizon. `corrected` False leaves out the second term of the module. info and
    errors as for `mixed_gradient`; `ValueError` also for values of another shape.
    """
    hybrid = check_hybrid(policy)

    def credit(decisions: Decisions) -> Tensor:
        values = []
        for t, e in enumerate(noise.policy.unbind(1)):
            state = decisions.drawn.states[:, t]
            of_choices = []
            for choice in torch.arange(hybrid.choices, device=state.device):
                action = hybrid.branch(nu, state, choice.expand(len(state)), e)
                value = action_value(state, action)
                if value.shape != state.shape[:1]:
                    raise ValueError(f"action_value gave {tuple(value.shape)}; expected [B] = {tuple(state.shape[:1])}")
                of_choices.append(value)
            values.append(torch.stack(of_choices, -1))
        discounts = mdp.discount ** torch.arange(len(values), dtype=values[0].dtype, device=values[0].device)
        q = torch.stack(values, 1).detach() * discounts.unsqueeze(-1) * alive(decisions.drawn).unsqueeze(-1)
        pi = decisions.log_probs.exp()
        weights = pi * (q - (pi * q).sum(-1, keepdim=True))
        if not corrected:
            return weights
        known = q.gather(-1, decisions.index.unsqueeze(-1)).squeeze(-1)
        return weights + on_drawn(reward_to_go(decisions.drawn, mdp.discount) - known, decisions)

    return credited_gradient(
        mdp, policy, theta, nu, noise, credit, wrt=wrt, cross_term=cross_term, temperature=temperature, groups=groups
    )
