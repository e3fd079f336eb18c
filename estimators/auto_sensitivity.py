"""The policy sensitivity that fits the problem, or a refusal that says why there is none.

Tested in this order; the first route whose own conditions hold is taken, and `report.status` says which and why:

    Hessian          the return has a derivative along rollouts (model of order 1 or 2, actions that follow nu, no
                     rollout that ends early: pathwise derivatives miss where it ends) and nu is stationary;
    function space   otherwise, for continuous actions: the fitted critic finds nu stationary and the policy class free
                     (representability: E|grad_a Q|^2 on the scale of Q_aa);
    score            otherwise, for policies and models with densities: -J_nunu is positive definite beyond doubt and nu
                     stationary.

A policy that an outside trainer left short of our optimum satisfies none. `UnconvergedError` then says how far it is
and what return that costs, `0.5 g' (-H)^-1 g` with g = grad_nu J. Only a `fallback` that the caller names goes on from
there; its error bound adds what the missing step leaves, estimated by a second sensitivity after a Newton step, and the
bias of a policy class that binds (`critic_gauss_newton.py`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from sim2real.estimators.critic import CriticError, Features
from sim2real.estimators.critic_gauss_newton import demand
from sim2real.estimators.function_space import function_space_sensitivity
from sim2real.estimators.model_critic import moves_smoothly
from sim2real.estimators.policy_sensitivity import Objective, policy_sensitivity
from sim2real.estimators.score_sensitivity import LARGEST, score_sensitivity
from sim2real.estimators.soft_sensitivity import soft_sensitivity
from sim2real.mdp import ModelMDP, Noise
from sim2real.params import Params, dot, ravel, unravel
from sim2real.policy import Policy
from sim2real.rollout import expected_return, rollout
from sim2real.solve_report import Sensitivity, UnconvergedError, UnconvergedWarning
from sim2real.solvers.linear import Solve, cg

Fallback = Literal["function_space", "soft", "score"]

_BIAS = 2.6  # worst relative error of critic Gauss-Newton over "unrepresentable", see there


@dataclass(frozen=True)
class _Request:
    """What every route is asked; as in `auto_sensitivity`."""

    mdp: ModelMDP
    policy: Policy
    theta: Params
    nu: Params
    noise: Noise
    objective: Objective
    cotangent: Params | None
    order: Literal[0, 1, 2]
    features: Features | None
    behaviour: Policy | None
    actions: Tensor | None
    temperature: float | None
    damping: float | Literal["auto"]
    solve: Solve
    tolerance: float


def auto_sensitivity(
    mdp: ModelMDP,
    policy: Policy,
    theta: Params,
    nu: Params,
    noise: Noise,
    *,
    objective: Objective | None = None,
    cotangent: Params | None = None,
    derivative_order: Literal[0, 1, 2] | None = None,
    fallback: Fallback | None = None,
    features: Features | None = None,
    behaviour: Policy | None = None,
    actions: Tensor | None = None,
    temperature: float | None = None,
    damping: float | Literal["auto"] = "auto",
    solve: Solve = cg,
    tolerance: float = 0.05,
) -> Sensitivity:
    """dnu*/dtheta by the first route whose conditions hold; `UnconvergedError` with all reasons when none does.

    `objective(theta, nu)`: the in-sim return that nu maximises (None: `expected_return` on `noise`);
    `derivative_order`: of the model behind it (None: `mdp.derivative_order`). `features` and `behaviour` as in
    `model_critic`, `actions [A, m]` and `temperature` (reward units, for "soft") as in `soft_sensitivity`, `tolerance`
    as in `critic_gauss_newton`. `tune(sensitivity="auto")` calls it with `objective`, `cotangent` and
    `derivative_order`; a function of (J, theta, nu) binds more.

    `fallback` names the route to take when none is right. Its `report.converged` then asks for an estimated error of
    vjp(cotangent) below its size, so that it points uphill at least; `report.error_bound` is that estimate, the
    sampling error (two standard errors) included. info: that of the route taken, with "gain" (return that nu misses)
    and "error_left" (by the missing Newton step) where a fallback was taken.
    """
    order = mdp.derivative_order if derivative_order is None else derivative_order
    J = objective if objective is not None else partial(_return, mdp, policy, noise)
    options = (features, behaviour, actions, temperature, damping, solve, tolerance)
    request = _Request(mdp, policy, theta, nu, noise, J, cotangent, order, *options)
    if fallback not in (None, "function_space", "soft", "score"):
        raise ValueError(f"fallback must be None, 'function_space', 'soft' or 'score', got {fallback!r}")
    if fallback == "soft" and temperature is None:
        raise ValueError("the soft fallback needs the temperature the policy was trained with (reward units)")
    refused: list[str] = []
    for name, route, doubt in _routes(request):
        if doubt:
            refused.append(f"{name}: {doubt}")
            continue
        found = _tried(route, request)
        if isinstance(found, Sensitivity) and found.report.converged:
            return _said(found, name, refused)
        refused.append(f"{name}: {found if isinstance(found, str) else _why(found, request)}")
        if name == "Hessian" or "not stationary" in refused[-1]:
            break  # a noisier route would only be blind to it
    if fallback is None:
        raise UnconvergedError(
            f"no policy sensitivity is to be trusted here. {'. '.join(refused)}. Train the policy further, or name a "
            "fallback ('function_space', 'soft', 'score') to take a biased one with its error"
        )
    return _fallen_back(fallback, request, refused)


Route = Callable[[_Request], Sensitivity]


def _routes(r: _Request) -> list[tuple[str, Route, str]]:
    """Name, function and why it cannot be tried ("" if it can), in order of trust."""
    smooth = moves_smoothly(r.policy, r.nu, r.mdp.initial_state(r.theta, r.noise.initial))
    rough = "" if smooth else "the policy's action has no derivative in nu"
    flat = "the model has no derivative (derivative_order 0)" if r.order == 0 else ""
    ends = "rollouts end early, and derivatives along them miss where" if _ends_early(r) else ""
    silent = "" if r.mdp.log_prob is not None else "the model declares no log_prob"
    sure = "a deterministic policy has no log_prob" if r.policy.noise_dim == 0 else ""
    few = "it needs four rollouts at least" if r.noise.process.shape[0] < 4 else ""
    many = "too many parameters for second-order scores" if _score_size(r) > LARGEST else ""
    # a model with a derivative needs no density, unless what it lacks is how the end moves
    blind = silent if r.order == 0 or ends else ""
    return [
        ("Hessian", _hessian, rough or flat or ends),
        ("function space", partial(_function_space, derivative="score" if ends else "auto"), rough or blind),
        ("score", _score, silent or sure or few or many),
    ]


def _hessian(r: _Request) -> Sensitivity:
    options: dict[str, Any] = {"damping": r.damping, "solve": r.solve, "derivative_order": r.order}
    return policy_sensitivity(r.objective, r.theta, r.nu, cotangent=r.cotangent, **options)


def _function_space(r: _Request, *, derivative: Literal["auto", "score"] = "auto") -> Sensitivity:
    options: dict[str, Any] = {"damping": r.damping, "solve": r.solve, "tolerance": r.tolerance}
    options |= {"features": r.features, "behaviour": r.behaviour, "derivative": derivative, "cotangent": r.cotangent}
    return function_space_sensitivity(r.mdp, r.policy, r.theta, r.nu, r.noise, **options)


def _score(r: _Request) -> Sensitivity:
    # quadratic features of a discrete action span no Q: without features, no critic
    smooth = moves_smoothly(r.policy, r.nu, r.mdp.initial_state(r.theta, r.noise.initial))
    options: dict[str, Any] = {"variance": "critic" if smooth or r.features is not None else "causal"}
    options |= {"damping": 0.0 if r.damping == "auto" else r.damping, "tolerance": r.tolerance}
    options |= {"features": r.features, "actions": r.actions, "cotangent": r.cotangent}
    options["groups"] = _score_groups(r)
    return score_sensitivity(r.mdp, r.policy, r.theta, r.nu, r.noise, **options)


def _score_groups(r: _Request) -> int:
    return min(20, r.noise.process.shape[0] // 2)


def _score_size(r: _Request) -> int:
    """Entries of the second derivatives that `score_sensitivity` keeps."""
    P, Q = len(ravel(r.nu)), len(ravel(r.theta))
    return _score_groups(r) * P * (P + Q)


def _soft(r: _Request) -> Sensitivity:
    if r.temperature is None:
        raise ValueError("the soft route needs a temperature")
    visited, weight = _visits(r)
    options: dict[str, Any] = {"temperature": r.temperature, "actions": r.actions, "cotangent": r.cotangent}
    options |= {"damping": 0.0 if r.damping == "auto" else r.damping, "solve": r.solve}
    found = soft_sensitivity(r.mdp, r.policy, r.theta, r.nu, visited, r.noise, **options)
    if "consistency" not in found.info:
        return found
    # soft policy improvement: lambda KL(pi || soft greedy) of soft return per visit
    gain = r.temperature * found.info["consistency"] * weight
    return replace(found, info=dict(found.info) | {"gain": gain})


def _visits(r: _Request) -> tuple[Tensor, float]:
    """B states `[B, n]` of the rollouts, before their end, with the discounted visits, and the visits per rollout."""
    with torch.no_grad():
        drawn = rollout(r.mdp, r.policy, r.theta, r.nu, r.noise)
    batch, horizon = drawn.rewards.shape
    weights = r.mdp.discount ** torch.arange(horizon, dtype=torch.float64, device=drawn.states.device)
    mask = torch.ones_like(drawn.rewards, dtype=torch.bool) if drawn.mask is None else drawn.mask
    # in a mixed order: state k's own rollout of Q takes row k of the noise, which must not be what led to the state
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(0)).to(drawn.states.device)
    cumulative = (weights * mask[order]).mT.flatten().cumsum(0)
    marks = (torch.arange(batch, dtype=torch.float64, device=drawn.states.device) + 0.5) * cumulative[-1] / batch
    chosen = torch.searchsorted(cumulative, marks).clamp(max=batch * horizon - 1)
    return drawn.states[order[chosen % batch], chosen // batch], float(cumulative[-1]) / batch


def _tried(route: Route, r: _Request) -> Sensitivity | str:
    """The route's answer, judged by nobody yet, or why there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnconvergedWarning)
        try:
            return route(r)
        except (CriticError, UnconvergedError) as error:
            return str(error)


def _why(found: Sensitivity, r: _Request) -> str:
    """The report's status, with what non-stationarity costs where it does not say so itself."""
    status, size = found.report.status, found.report.stationarity
    if "not stationary" not in status or "gain" in found.info or not size:
        return status
    gain = 0.5 * float(dot(*_newton_step(r)))
    return f"{status}; a Newton step promises {gain:.2g} of return"


def _newton_step(r: _Request) -> tuple[Params, Params]:
    """(grad_nu J, (-J_nunu + damping)^-1 grad_nu J): the sensitivity to a factor of J is the Newton step."""
    unit = {"factor": torch.ones((), dtype=torch.float64, device=next(iter(r.nu.values())).device)}
    J = lambda th, nu: th["factor"] * r.objective(r.theta, nu)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnconvergedWarning)
        chain = policy_sensitivity(J, unit, r.nu, damping=r.damping, solve=r.solve, derivative_order=r.order)
        step = chain.jvp(unit)
    leaves = {key: value.detach().double().requires_grad_() for key, value in r.nu.items()}
    with torch.enable_grad():
        slopes = torch.autograd.grad(
            r.objective(r.theta, leaves), list(leaves.values()), allow_unused=True, materialize_grads=True
        )
    return dict(zip(leaves, slopes, strict=True)), {key: value.double() for key, value in step.items()}


def _said(found: Sensitivity, name: str, refused: list[str]) -> Sensitivity:
    """The sensitivity with the choice and its reason in front of its status."""
    held = {
        "Hessian": "the return is differentiable and nu stationary, so the Hessian is exact",
        "function space": "the critic finds nu stationary and the policy class free to follow it",
        "score": "-J_nunu is positive definite by its standard error and nu stationary",
    }
    passed = f" Not by {'; not by '.join(refused)}." if refused else ""
    status = f"chose {name}: {held[name]}.{passed} {found.report.status}"
    return replace(found, report=replace(found.report, status=status))


def _fallen_back(fallback: Fallback, r: _Request, refused: list[str]) -> Sensitivity:
    """The route the caller named, with the error that the failed conditions leave."""
    routes: dict[Fallback, Route] = {"function_space": _function_space, "soft": _soft, "score": _score}
    route = routes[fallback]
    lenient = replace(r, tolerance=math.inf) if fallback == "score" else r
    found = _tried(route, lenient)
    if isinstance(found, str):
        raise UnconvergedError(f"the fallback '{fallback}' fails, too: {found}. Before that: {'. '.join(refused)}")
    report, info = found.report, dict(found.info)
    notes = [f"fell back on '{fallback}', as named by the caller, because: {'. '.join(refused)}"]
    if "gain" in info:
        notes.append(f"what nu misses costs {float(info['gain']):.2g} of return")
    if "newton_step" in info and r.cotangent is not None:
        left, size = _error_left(route, lenient, found)
        info["error_left"] = torch.tensor(left, dtype=torch.float64)
        notes.append(f"the missing Newton step leaves an error of about {left:.2g} in a gradient of norm {size:.2g}")
        bias = _BIAS * float(info.get("unrepresentable", 0.0)) * size
        if bias > _BIAS * r.tolerance * size:
            notes.append(f"the policy class binds, for an error of up to {bias:.2g}")
        bound = left + bias + (report.error_bound or 0.0)
        judged = ("not stationary", "the policy class binds")
        linear = report.converged or any(words in report.status for words in judged)
        report = replace(report, error_bound=bound, converged=linear and bound < size)
    report = replace(report, status="; ".join([*notes, report.status]))
    demand(report, strict=False)
    return replace(found, report=report, info=info)


def _error_left(route: Route, r: _Request, found: Sensitivity) -> tuple[float, float]:
    """(|w' - w|, |w|): the change of w = vjp(cotangent) after the Newton step of nu, on the same noise."""
    if r.cotangent is None:
        raise ValueError("the error left needs a cotangent")
    w = ravel(found.vjp(r.cotangent)).double()
    moved = unravel(ravel(r.nu).double() + found.info["newton_step"], r.nu)
    nu = {key: value.to(r.nu[key].dtype) for key, value in moved.items()}
    other = _tried(route, replace(r, nu=nu, cotangent=None))
    if isinstance(other, str):
        return math.inf, float(w.norm())
    return float((ravel(other.vjp(r.cotangent)).double() - w).norm()), float(w.norm())


def _ends_early(r: _Request) -> bool:
    if r.mdp.terminal is None:
        return False
    acting = r.policy if r.behaviour is None else r.behaviour
    with torch.no_grad():
        mask = rollout(r.mdp, acting, r.theta, r.nu, r.noise).mask
    return mask is not None and not bool(mask.all())


def _return(mdp: ModelMDP, policy: Policy, noise: Noise, theta: Params, nu: Params) -> Tensor:
    return expected_return(mdp, policy, theta, nu, noise)
