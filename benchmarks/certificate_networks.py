"""Over-parameterised networks for `s-certificate`: dnu*/dtheta is not unique, the actions' derivative is.

A tanh network of 182 or 1010 parameters steers 32 states of a nonlinear system of four states and two inputs for eight
steps. It can come close to the best open-loop plan of every state, so the derivative of the plan's first action, from a
16 x 16 Hessian per state, is the reference for `w = (d actions/d theta)^T c`, and J of the network is never used in it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, vmap

from benchmarks.certificate_good import Case, Objective, Problem, distance, normal, seeded
from sim2real.estimators import certify, policy_sensitivity
from sim2real.params import Params, map_params

STATES, ACTIONS, HORIZON, BATCH = 4, 2, 8, 32


def in_sim_return(theta: Params, states: Tensor, act: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Return of each state `[...]` when `act(state, t)` steers."""
    s, total = states, states.new_zeros(states.shape[:-1])
    for t in range(HORIZON):
        a = act(s, t)
        total = total - 0.95**t * ((s * s).sum(-1) + 0.3 * (a * a).sum(-1) + 0.05 * (a**4).sum(-1))
        s = s @ theta["A"].mT + a @ theta["B"].mT + 0.1 * torch.sin(s)
    return total - 3 * 0.95**HORIZON * (s * s).sum(-1)


def open_loop(theta: Params, states: Tensor) -> Params:
    """Derivative of the best first action of each state: key -> `[BATCH, ACTIONS, ...]`."""
    plan_return = lambda u, s, th: in_sim_return(th, s, lambda _, t: u.view(HORIZON, ACTIONS)[t])
    each = partial(vmap, in_dims=(0, 0, None))
    u = states.new_zeros(BATCH, HORIZON * ACTIONS)
    for _ in range(30):  # Newton: the plan's return is concave enough here
        H, g = each(hessian(plan_return))(u, states, theta), each(grad(plan_return))(u, states, theta)
        u = u - (torch.linalg.inv(H) @ g.unsqueeze(-1)).squeeze(-1)
    inverse = torch.linalg.inv(each(hessian(plan_return))(u, states, theta))
    cross = each(jacfwd(grad(plan_return), argnums=2))(u, states, theta)
    return {key: -torch.einsum("bij,bj...->bi...", inverse, c)[:, :ACTIONS] for key, c in cross.items()}


def wide_network(seed: int, *, width: int = 10, polish: int = 500) -> Problem:
    """A network trained by Adam and `polish` steps of L-BFGS; g weighs its first actions at random."""
    generator = seeded(1300 + seed)
    A = normal(generator, STATES, STATES)
    A = A * (1.02 / torch.linalg.eigvals(A).abs().max())
    theta, states = {"A": A, "B": normal(generator, STATES, ACTIONS) / 2}, normal(generator, BATCH, STATES)
    torch.manual_seed(seed)
    layers = [nn.Linear(STATES, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, ACTIONS)]
    net = nn.Sequential(*layers).double()
    J: Objective = lambda th, nu: in_sim_return(th, states, lambda s, _: functional_call(net, nu, (s,))).mean()
    train(lambda: -J(theta, dict(net.named_parameters())), list(net.parameters()), polish)
    c = normal(generator, BATCH, ACTIONS) / BATCH
    leaves = dict(net.named_parameters())
    g = torch.autograd.grad((functional_call(net, leaves, (states,)) * c).sum(), list(leaves.values()))
    truth = {key: torch.einsum("bi,bi...->...", c, d) for key, d in open_loop(theta, states).items()}
    nu = {key: value.detach().clone() for key, value in leaves.items()}
    return Problem(J, theta, nu, dict(zip(nu, g, strict=True)), truth)


def train(cost: Callable[[], Tensor], parameters: list[nn.Parameter], polish: int) -> None:
    adam = torch.optim.Adam(parameters, lr=5e-3)
    for _ in range(400):
        adam.zero_grad()
        cost().backward()
        adam.step()
    options = {"tolerance_grad": 0, "tolerance_change": 0, "line_search_fn": "strong_wolfe"}
    lbfgs = torch.optim.LBFGS(parameters, max_iter=max(polish, 1), history_size=30, **options)

    def closure() -> Tensor:
        lbfgs.zero_grad()
        value = cost()
        value.backward()
        return value

    if polish:
        lbfgs.step(closure)


def judged_network(name: str, p: Problem, damping: float) -> Case:
    """The product of a network with this damping, certified."""
    sensitivity = policy_sensitivity(p.J, p.theta, p.nu, damping=damping, cotangent=p.g)
    certificate = certify(p.J, p.theta, p.nu, sensitivity, p.g)
    size = distance(p.truth, map_params(torch.zeros_like, p.truth), None)
    return Case(name, certificate, distance(sensitivity.vjp(p.g), p.truth, None), size)


def well_damped(seed: int) -> Case:
    """A well-trained network with damping a little above the lowest curvature met."""
    p = wide_network(seed, width=28)
    return judged_network("wide network", p, (1e-2, 3e-3)[seed % 2])
