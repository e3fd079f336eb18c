"""Action sensitivity `d pi(s)/dtheta = J_pi(s) dnu*/dtheta`, `J_pi(s) = d act(nu, s)/dnu`, at given states.

Where a network has more parameters than its actions tell apart, dnu*/dtheta is not identifiable: directions of nu that
move no action are arbitrary, and any damping changes them. They drop out of `J_pi dnu*/dtheta`, which is therefore
what to report, compare and test for networks (the norm of dnu* moved 36-fold over dampings that left d pi within 5 %).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from sim2real.estimators.policy_sensitivity import Objective, policy_sensitivity
from sim2real.params import Params, check_same_keys
from sim2real.policy import Policy
from sim2real.solve_report import Sensitivity


def action_sensitivity(
    J: Objective,
    policy: Policy,
    theta: Params,
    nu: Params,
    states: Tensor,
    *,
    cotangent: Params | None = None,
    noise: Tensor | None = None,
    sensitivity: Callable[..., Sensitivity] = policy_sensitivity,
) -> Sensitivity:
    """d pi(s)/dtheta at `states [N, n]`: vjp takes a cotangent `{"action": [N, m]}`, jvp returns a change of actions.

    `sensitivity(J, theta, nu, cotangent=) -> Sensitivity` gives dnu*/dtheta (bind its options with `partial`); its
    report is for the action `cotangent` pulled back to nu, by default a fixed pseudo-random one. `noise [N, noise_dim]`
    enters the policy; without it 0, which is the mean action of a Gaussian policy. Raises `ValueError` for states or a
    cotangent of another shape and for actions without a derivative in nu, `KeyError` for other keys.
    """
    if states.ndim != 2:
        raise ValueError(f"states must be [N, n], got shape {tuple(states.shape)}")
    exogenous = states.new_zeros(len(states), policy.noise_dim) if noise is None else noise
    act = lambda nu: policy.act(nu, states, exogenous)
    with torch.enable_grad():
        leaves = {key: value.detach().requires_grad_() for key, value in nu.items()}
        action = act(leaves)
    if not action.requires_grad:
        raise ValueError("the action does not depend differentiably on nu (a discrete action has no d pi/d theta)")

    def pull(g: Params) -> Params:
        check_same_keys({"action": action}, g, "the action cotangent")
        if g["action"].shape != action.shape:
            raise ValueError(f"the action cotangent is {tuple(g['action'].shape)}, expected {tuple(action.shape)}")
        grads = torch.autograd.grad(
            action, list(leaves.values()), g["action"].to(action.dtype), retain_graph=True, materialize_grads=True
        )
        return dict(zip(leaves, grads, strict=True))

    generator = torch.Generator().manual_seed(0)
    fixed = torch.randn(action.shape, generator=generator, dtype=torch.float64).to(action)
    chain = sensitivity(J, theta, nu, cotangent=pull({"action": fixed} if cotangent is None else cotangent))

    def jvp(v: Params) -> Params:
        return {"action": torch.func.jvp(act, (nu,), (chain.jvp(v),))[1]}

    return replace(chain, vjp=lambda g: chain.vjp(pull(g)), jvp=jvp)
