"""Pathwise (reparameterised) gradient of the in-sim return.

With all randomness e an argument, `J = E_e[ R(theta, nu, e) ]` and

    grad J = E_e[ grad R(theta, nu, e) ]

wherever R is differentiable almost everywhere and continuous (Mohamed, Rosca, Figurnov and Mnih, Monte Carlo Gradient
Estimation in Machine Learning, JMLR 21 (2020), section 5). Jumps carry no derivative: with a termination that depends
on the parameters, or a sampled index, this gradient lacks that part.
"""

from __future__ import annotations

from math import inf
from typing import Literal

import torch
from torch import Tensor

from sim2real.mdp import ModelMDP, Noise
from sim2real.params import Estimate, Params, ravel, unravel
from sim2real.policy import Policy
from sim2real.rollout import discounted_return, rollout


def pathwise_gradient(
    mdp: ModelMDP,
    policy: Policy,
    theta: Params,
    nu: Params,
    noise: Noise,
    *,
    wrt: Literal["nu", "theta"] = "nu",
    groups: int = 0,
) -> Estimate:
    """Gradient of `expected_return` with respect to nu or theta, over the rollouts of `noise`.

    info: "value_stderr" (infinite for one rollout); with `groups >= 2` also "stderr" `[P]` of the raveled gradient,
    from the spread over so many groups of rollouts, at one backward pass each. Raises `ValueError` when the model
    declares no derivative, the return does not depend on the parameters by differentiable steps, it or its gradient is
    not finite, or `wrt` or `groups` is out of range.
    """
    check_wrt(wrt)
    if mdp.derivative_order < 1:
        raise ValueError("the model declares derivative_order 0; use score_function_gradient")
    leaves = {key: value.detach().requires_grad_() for key, value in (nu if wrt == "nu" else theta).items()}
    with torch.enable_grad():
        arguments = (theta, leaves) if wrt == "nu" else (leaves, nu)
        returns = discounted_return(rollout(mdp, policy, *arguments, noise).rewards, mdp.discount)
    if not returns.requires_grad:
        raise ValueError(f"the return does not depend differentiably on {wrt}; use score_function_gradient")
    grad, info = grouped_gradient(returns, leaves, groups)
    returns = returns.detach()
    check_finite(returns.mean(), ravel(grad), wrt)
    info["value_stderr"] = returns.std() / len(returns) ** 0.5 if len(returns) > 1 else torch.full_like(returns[0], inf)
    return Estimate(returns.mean(), grad, info)


def check_finite(value: Tensor, gradient: Tensor, wrt: str) -> None:
    """Raise `ValueError` when the return or its gradient (raveled) is not finite."""
    wrong = (~torch.isfinite(gradient)).nonzero().flatten().tolist()
    if wrong or not bool(torch.isfinite(value)):
        raise ValueError(
            f"the return is {float(value)} and {len(wrong)} of {len(gradient)} entries of its gradient in {wrt} are "
            "not finite; check the parameters, start from a stable policy or shorten the horizon"
        )


def check_wrt(wrt: str) -> None:
    """Raise `ValueError` unless `wrt` is "nu" or "theta"."""
    if wrt not in ("nu", "theta"):
        raise ValueError(f"wrt must be 'nu' or 'theta', got {wrt!r}")


def grouped_gradient(surrogate: Tensor, leaves: Params, groups: int) -> tuple[Params, dict[str, Tensor]]:
    """Gradient of the mean of `surrogate [B]`; with groups also its standard error "stderr" `[P]` from their spread."""
    rows = len(surrogate)
    if groups != 0 and not 2 <= groups <= rows:
        raise ValueError(f"groups must be 0 or between 2 and the {rows} rollouts, got {groups}")
    inputs = list(leaves.values())
    label = torch.arange(rows, device=surrogate.device) * max(groups, 1) // rows
    pulled = []
    for group in range(max(groups, 1)):
        cotangent = (label == group).to(surrogate.dtype) / rows
        grads = torch.autograd.grad(
            surrogate, inputs, cotangent, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        pulled.append(ravel(dict(zip(leaves, grads, strict=True))))
    parts = torch.stack(pulled)  # [G, P], summing to the gradient
    total = parts.sum(0)
    if groups == 0:
        return unravel(total, leaves), {}
    spread = parts - total * torch.bincount(label)[:, None] / rows
    stderr = ((spread**2).sum(0) * groups / (groups - 1)).sqrt()
    return unravel(total, leaves), {"stderr": stderr}
