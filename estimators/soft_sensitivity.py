"""Sensitivity of a soft policy, without the Hessian of its return.

The soft optimum of the model at theta is `pi_theta = exp((Q - V) / lambda)`, so that

    d log pi(a | s) = (d Q(s, a) - d V(s)) / lambda,        d V(s) = E_{a ~ pi} d Q(s, a),

with d Q that of in-sim rollouts under the frozen policy (envelope theorem; `soft_value.py`). The products act on either

    log_prob   of given actions: nothing is solved; discrete, continuous and hybrid actions, any policy class;
    nu         by the step of nu that reproduces d log pi best, the natural projection over the given states,
                   F dnu = E_s E_a[ grad_nu log pi  d log pi ],    F = E_s E_a[ grad_nu log pi grad_nu log pi' ]:
               exact wherever the class can follow (a table, the gain and covariance of a linear-quadratic optimum), a
               projection elsewhere. F is positive semi-definite whatever the curvature of the return. Parameters that
               do not change pi (the mean of a row of a table) lie in its null space and get no part of dnu.

With G = d Q of all nodes and D = grad_nu log pi: `vjp(g) = G' D F^-1 g / lambda`, `jvp(v) = F^-1 D' G v / lambda`.
References: T. Haarnoja, H. Tang, P. Abbeel and S. Levine, Reinforcement Learning with Deep Energy-Based Policies, 2017;
S. Kakade, A Natural Policy Gradient, 2001 (F).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from sim2real.estimators.critic import action_nodes
from sim2real.estimators.soft_value import (
    Method,
    StateValue,
    check_temperature,
    consistency_info,
    inconsistency,
    soft_action_value,
)
from sim2real.mdp import ModelMDP, Noise
from sim2real.params import Params, check_same_keys
from sim2real.policy import Policy
from sim2real.solve_report import Sensitivity, SolveReport, UnconvergedError, UnconvergedWarning
from sim2real.solvers.linear import Solve, cg

Linear = Callable[[Params], Params]


def soft_sensitivity(
    mdp: ModelMDP,
    policy: Policy,
    theta: Params,
    nu: Params,
    states: Tensor,
    noise: Noise | None,
    *,
    temperature: float,
    taken: Tensor | None = None,
    actions: Tensor | None = None,
    action_value: Callable[[Params, Tensor, Tensor], Tensor] | None = None,
    soft_value: StateValue | None = None,
    method: Method = "auto",
    cotangent: Params | None = None,
    solve: Solve = cg,
    damping: float = 0.0,
    consistency_tol: float = 0.01,
    strict: bool = False,
) -> Sensitivity:
    """dnu*/dtheta, or with `taken [M, m]` d log pi(taken | states) as {"log_prob": `[M]`}, in `states [M, n]`.

    `temperature`, `noise`, `actions`, `action_value`, `soft_value` and `method` as in `hessian_free_gradient`. Where
    in-sim rollouts led to the states, `noise` must be another one than theirs, or it biases the products. `solve` and
    `damping` (in units of F, 1 / nu^2) belong to the projection. The report is that of the solve for `cotangent` (or a
    pseudo-random one). info: "consistency" and "consistency_stderr", how far the policy is from soft-optimal in
    the model, in nats (`soft_consistency`; not with `action_value`, or noise of fewer than four rows). By two standard
    errors above `consistency_tol`, or where the solve has not converged, `report.converged` is False, which warns
    `UnconvergedWarning`, or raises `UnconvergedError` under `strict`. `jvp` differentiates the reverse pass: it needs a
    model of derivative_order 2, or the score.
    Raises `ValueError` for missing noise, shapes that do not match and as `soft_action_value` does, `KeyError` for
    other keys.
    """
    check_temperature(temperature)
    if taken is not None and (taken.ndim != 2 or len(taken) != len(states)):
        raise ValueError(f"taken must be [{len(states)}, m], one action per state, got {tuple(taken.shape)}")
    if cotangent is not None and taken is None:
        _check(nu, cotangent, "cotangent")
    fixed = {key: value.detach() for key, value in nu.items()}
    nodes = action_nodes(policy, fixed, states, actions)
    every = [*(action for action, _ in nodes), *([taken] if taken is not None else [])]
    tiled = (states.repeat(len(every), 1), torch.cat(every))
    leaves = {key: value.detach().requires_grad_() for key, value in theta.items()}
    options: dict[str, Any] = {"temperature": temperature, "method": method}
    sampled = action_value is None
    if action_value is None:
        action_value = _rollouts(mdp, policy, fixed, noise, len(states), soft_value=soft_value, **options)
    with torch.enable_grad():
        q = action_value(leaves, *tiled)
    if q.shape != tiled[0].shape[:1] or not q.requires_grad:
        raise ValueError(f"the action value must be [{len(tiled[0])}] and depend on theta, got {tuple(q.shape)}")
    pull, push = _products(q, leaves)
    shares = torch.stack([share for _, share in nodes])
    if taken is not None:
        chain, report = _of_log_prob(pull, push, shares, temperature), SolveReport(True, 0.0, 0, "nothing was solved")
    else:
        fisher = partial(solve, damping=damping)
        chain, report = _of_nu(pull, push, policy, fixed, tiled, shares, temperature, fisher, cotangent)
    options["actions"] = actions
    info = consistency_info(mdp, policy, theta, fixed, noise, states, **options) if sampled else {}
    report = _judged(report, info, consistency_tol, strict)
    like = nu if taken is None else {"log_prob": q[: len(states)].detach()}

    def vjp(g: Params) -> Params:
        _check(like, g, "the cotangent of vjp")
        return _like(chain[0](g), theta)

    def jvp(v: Params) -> Params:
        _check(theta, v, "the tangent of jvp")
        if sampled and mdp.derivative_order == 1 and method != "score":
            raise ValueError("jvp needs a second derivative of the model, which it lacks (derivative_order 1); use vjp")
        return _like(chain[1](v), like)

    return Sensitivity(vjp, jvp, report, info)


def _rollouts(
    mdp: ModelMDP, policy: Policy, nu: Params, noise: Noise | None, states: int, **options: Any
) -> Callable[[Params, Tensor, Tensor], Tensor]:
    """theta, s, a -> Q_sim of in-sim rollouts; all actions of one of the `states` share their row of noise."""
    if noise is None:
        raise ValueError("pass noise (sample_noise) for the in-sim rollouts, or an action_value")
    count = len(noise.process)

    def value(theta: Params, s: Tensor, a: Tensor) -> Tensor:
        rows = torch.arange(len(s), device=s.device) % states % count
        return soft_action_value(mdp, policy, theta, nu, noise, s, a, rows=rows, **options)

    return value


def _of_log_prob(
    pull: Callable[[Tensor], Params], push: Callable[[Params], Tensor], shares: Tensor, temperature: float
) -> tuple[Linear, Linear]:
    """Products of `(dQ(s, taken) - sum_k share_k dQ(s, a_k)) / lambda`; the rows of `taken` come last."""

    def vjp(g: Params) -> Params:
        worth = g["log_prob"].to(shares.dtype) / temperature
        return pull(torch.cat([-(shares * worth).reshape(-1), worth]))

    def jvp(v: Params) -> Params:
        *moved, own = push(v).reshape(len(shares) + 1, -1)
        return {"log_prob": (own - (shares * torch.stack(moved)).sum(0)) / temperature}

    return vjp, jvp


def _of_nu(
    pull: Callable[[Tensor], Params],
    push: Callable[[Params], Tensor],
    policy: Policy,
    nu: Params,
    tiled: tuple[Tensor, Tensor],
    shares: Tensor,
    temperature: float,
    solve: Solve,
    cotangent: Params | None,
) -> tuple[tuple[Linear, Linear], SolveReport]:
    """Products through the natural projection, and the report of its solve for `cotangent`."""
    leaves = {key: value.detach().double().requires_grad_() for key, value in nu.items()}
    with torch.enable_grad():
        log_pi = policy.log_prob(leaves, *tiled)
    down, up = _products(log_pi, leaves)
    weights = shares / shares.shape[1]

    def centred(x: Tensor) -> Tensor:
        """Minus the mean over the actions of each state."""
        x = x.reshape(shares.shape)
        return x - (shares * x).sum(0)

    def score(x: Tensor) -> Params:
        return down((weights * centred(x)).reshape(-1))

    fisher: Linear = lambda x: score(up(x))
    given = cotangent is not None and any(bool(value.any()) for value in cotangent.values())
    probe = torch.randn(shares.shape, generator=torch.Generator().manual_seed(0), dtype=shares.dtype).to(shares.device)
    # without a cotangent: a right-hand side that the policy can notice, as every gradient of a return is
    rhs = {k: v.double() for k, v in cotangent.items()} if cotangent is not None and given else score(probe)
    first = solve(fisher, rhs)

    def inverse(b: Params) -> Params:
        return first.x if all(torch.equal(b[key], rhs[key]) for key in rhs) else solve(fisher, b).x

    def vjp(g: Params) -> Params:
        worth = centred(up(inverse({key: value.double() for key, value in g.items()})))
        return pull((weights * worth).reshape(-1) / temperature)

    def jvp(v: Params) -> Params:
        return inverse(score(push(v) / temperature))

    return (vjp, jvp), first.report


def _products(output: Tensor, leaves: Params) -> tuple[Callable[[Tensor], Params], Callable[[Params], Tensor]]:
    """`output [N]` differentiated at `leaves`: cotangent -> Params, and tangent -> `[N]` (the transpose of that)."""

    def pull(cotangent: Tensor, *, create_graph: bool = False) -> Params:
        grads = torch.autograd.grad(
            output,
            list(leaves.values()),
            cotangent.to(output.dtype),
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
        return dict(zip(leaves, grads, strict=True))

    @cache
    def transposable() -> tuple[Tensor, Params]:
        dummy = torch.zeros_like(output, requires_grad=True)
        pulled = pull(dummy, create_graph=True)
        return dummy, {key: value for key, value in pulled.items() if value.requires_grad}

    def push(tangent: Params) -> Tensor:
        dummy, pulled = transposable()
        along = [tangent[key].to(value.dtype) for key, value in pulled.items()]
        return torch.autograd.grad(list(pulled.values()), dummy, along, retain_graph=True)[0]

    return pull, push


def _judged(report: SolveReport, info: dict[str, Tensor], tol: float, strict: bool) -> SolveReport:
    """The report with what the policy's own distance from the soft optimum says; warns or raises where it must."""
    doubt = inconsistency(info, tol)
    if doubt:
        report = replace(report, converged=False, status=f"{report.status}; {doubt}")
    if not report.converged:
        message = f"the soft sensitivity is not to be trusted: {report.status}"
        if strict:
            raise UnconvergedError(message)
        warnings.warn(message, UnconvergedWarning, stacklevel=3)
    return report


def _check(reference: Params, other: Params, what: str) -> None:
    check_same_keys(reference, other, what)
    for key, value in reference.items():
        if other[key].shape != value.shape or not bool(torch.isfinite(other[key]).all()):
            raise ValueError(
                f"{what} must be finite and of shape {tuple(value.shape)} for '{key}', got {tuple(other[key].shape)}"
            )


def _like(params: Params, like: Params) -> Params:
    return {key: params[key].detach().to(like[key].dtype) for key in like}
