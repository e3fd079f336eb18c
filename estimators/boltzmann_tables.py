"""Boltzmann-covariance hypergradient of a finite configurable MDP (theorem 1), by linear solves.

The follower answers theta with `pi = exp((Q_F - V_F) / lambda)`, the leader's return under pi is `J = start' V_L`. With
the discounted visits d (total 1 / (1 - gamma_L)) and the benefit `B = Q_L - sum_a pi Q_L`,

    grad J = V_L' grad start + sum_{s,a} d pi [ grad r_L + gamma_L grad P V_L + (1 / lambda) B grad Q_F ],
    grad Q_F = (I - gamma_F P_pi)^-1 (grad r_F + gamma_F grad P V_F),      V_F the soft value.

gamma_L weights time, gamma_F the inner sum; they are not interchangeable. Written in adjoint form: what one unit of
`grad r_F + gamma_F grad P V_F` at (s, a) is worth,

    y(s, a) = w(s, a) + pi(a | s) m(s),    w = d pi B / lambda,    m' = gamma_F (w P) (I - gamma_F P_pi)^-1,

is one vector, so theta is met once, in a reverse pass: a gradient costs one inverse per discount however long theta is.

The kernel may be exact, or estimated from counts (`empirical_kernel.py`): a tabular critic of Q_L and of grad Q_F by
least-squares temporal differences *is* the linear solve with the empirical kernel.
References: Kudo, Tanabe, Wachi and Akimoto, ICAPS 2026, arXiv 2603.14867, theorem 1; Thoma et al., Contextual Bilevel
Reinforcement Learning for Incentive Alignment, 2024 (the same gradient with Q_L (grad Q_F - grad V_F)).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sim2real.estimators.soft_value import check_temperature
from sim2real.leader_task import ConfigurableTables
from sim2real.params import Estimate, Params
from sim2real.solvers.bellman import state_transition


def boltzmann_tables_gradient(
    tables: Callable[[Params], ConfigurableTables],
    theta: Params,
    policy: Tensor,
    soft_value: Tensor,
    *,
    temperature: float,
    leader_discount: float,
    follower_discount: float,
    transition: Tensor | None = None,
) -> Estimate:
    """grad J in theta and `value` J, from the follower's `policy [S, A]` and `soft_value [S]` (reward units).

    `transition [S, A, S]` None: that of `tables`, exact. An estimate of it goes here; where theta enters the kernel,
    that of `tables` then only says how, by `grad P = P grad log p`. Exact for the soft optimum; a follower that stopped
    short of it gets the formula's value at its own policy and values.
    info: "leader_value" `[S]`, "benefit" `[S, A]`, "visits" `[S]`, "worth" `[S, A]` (y above).
    Raises `ValueError` for shapes that do not fit, a discount outside [0, 1), a policy that is none, or no kernel.
    """
    check_temperature(temperature)
    check_discounts(leader_discount, follower_discount)
    leaves, policy, soft_value = leaves_of(theta), policy.double(), soft_value.double()
    with torch.enable_grad():
        at = tables(leaves)
    kernel = at.transition if transition is None else transition
    if kernel is None:
        raise ValueError("the tables hold no transition; pass one, exact or estimated, as transition=")
    _check(at, kernel, policy, soft_value)
    kernel, reward, start = (x.detach().double() for x in (kernel, at.leader_reward, at.start))
    closed = state_transition(policy, kernel)
    resolvent = inverse(closed, leader_discount)
    value = resolvent @ (policy * reward).sum(-1)
    q = reward + leader_discount * kernel @ value
    benefit = q - (policy * q).sum(-1, keepdim=True)
    visits = start @ resolvent
    weight = visits.unsqueeze(-1) * policy * benefit / temperature
    inner = resolvent if follower_discount == leader_discount else inverse(closed, follower_discount)
    arriving = follower_discount * torch.einsum("sa,sax->x", weight, kernel) @ inner
    worth = weight + policy * arriving.unsqueeze(-1)
    taken = visits.unsqueeze(-1) * policy
    with torch.enable_grad():
        surrogate = (taken * at.leader_reward).sum() + (worth * at.follower_reward).sum() + value @ at.start
        if at.transition is not None:
            ahead = leader_discount * taken.unsqueeze(-1) * value + follower_discount * worth.unsqueeze(-1) * soft_value
            surrogate = surrogate + moved_kernel(ahead, at.transition, transition)
        grad = pull(surrogate, leaves, theta)
    info = {"leader_value": value, "benefit": benefit, "visits": visits, "worth": worth}
    return Estimate(start @ value, grad, info)


def inverse(closed: Tensor, discount: float) -> Tensor:
    """`(I - discount P_pi)^-1` of `closed [S, S]`."""
    return torch.linalg.inv(torch.eye(len(closed), dtype=closed.dtype, device=closed.device) - discount * closed)


def moved_kernel(cotangent: Tensor, exact: Tensor, estimated: Tensor | None) -> Tensor:
    """`<cotangent, P(theta)>`, or with an estimated kernel `<cotangent, P_hat log p(theta)>`."""
    if estimated is None:
        return (cotangent * exact).sum()
    seen = (estimated > 0) & (exact > 0)
    return (cotangent * estimated * torch.where(seen, exact, 1.0).log()).sum()


def leaves_of(theta: Params) -> Params:
    """theta in float64, as leaves of a derivative."""
    return {key: value.detach().double().requires_grad_() for key, value in theta.items()}


def pull(surrogate: Tensor, leaves: Params, like: Params) -> Params:
    """Gradient of a scalar at `leaves`, in the dtype of `like`; zero for what it does not depend on.

    Raises `ValueError` where it is not finite or depends on none of them.
    """
    if not surrogate.requires_grad:
        raise ValueError("nothing here depends differentiably on theta; check the reward, the start and the density")
    grads = torch.autograd.grad(surrogate, list(leaves.values()), allow_unused=True, materialize_grads=True)
    grad = dict(zip(leaves, grads, strict=True))
    for key, value in grad.items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"the gradient in '{key}' is not finite; check that densities and values are finite")
    return {key: value.to(like[key].dtype) for key, value in grad.items()}


def check_discounts(leader: float, follower: float) -> None:
    """Raise `ValueError` unless both lie in [0, 1)."""
    for name, discount in (("leader_discount", leader), ("follower_discount", follower)):
        if not 0.0 <= discount < 1.0:
            raise ValueError(f"{name} must lie in [0, 1), got {discount}")


def check_policy(policy: Tensor) -> None:
    """Raise `ValueError` unless the last dimension of `policy` holds distributions."""
    if bool((policy < 0).any()) or not bool(((policy.sum(-1) - 1).abs() < 1e-6).all()):
        raise ValueError("every row policy[..., :] must be a distribution: entries >= 0 that sum to 1 within 1e-6")


def _check(at: ConfigurableTables, kernel: Tensor, policy: Tensor, soft_value: Tensor) -> None:
    states, actions = policy.shape
    shapes = {
        "leader_reward": (at.leader_reward, (states, actions)),
        "follower_reward": (at.follower_reward, (states, actions)),
        "start": (at.start, (states,)),
        "soft_value": (soft_value, (states,)),
        "transition": (kernel, (states, actions, states)),
    }
    for name, (value, shape) in shapes.items():
        if tuple(value.shape) != shape:
            raise ValueError(f"{name} must be {shape} for a policy {(states, actions)}, got {tuple(value.shape)}")
    check_policy(policy)
