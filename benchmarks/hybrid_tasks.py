"""The tasks of the study of hybrid policies: switched LQR and joint replenishment, with their optima, in float32.

One network shape for both: two trunks of two tanh layers, one for the choice and one for all branches, each with a
direct linear path (optimal feedback is piecewise linear, order-up-to rules are linear where they order).
Quantities of joint replenishment are `unit softplus(z + 1)` of the continuous part z, squashed in front of the model,
so that PPO's Gaussian z and HPO's deterministic z are the same kind of action. The unit of each item, also that of its
stock in the observation, is its mean demand, or ten times that where orders lie tens of periods apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import linear, softplus

from benchmarks.oracles.joint_replenishment import (
    Replenishment,
    joint_replenishment_optimum,
    negative_binomial_pmf,
    poisson_pmf,
)
from benchmarks.oracles.switched_lqr import optimal_cost, optimal_set
from sim2real.bounds import default_params
from sim2real.hybrid_policy import HybridPolicy, discrete_first_policy
from sim2real.mdp import ModelMDP, Noise
from sim2real.params import Params
from sim2real.policy import Policy, deterministic_policy
from sim2real.rollout import rollout
from sim2real.simulators import switched_initial_noise, switched_initial_states, switched_lqr
from sim2real.simulators.inventory_tasks import (
    InventoryTask,
    joint_replenishment_task,
    negative_binomial_task,
    task_noise,
)
from sim2real.simulators.switched_lqr import HORIZON


@dataclass(frozen=True)
class HybridTask:
    """A model whose actions are `(d, z)`, its fixed noise per split, and what the optimal policy costs there."""

    mdp: ModelMDP
    theta: Params
    train: Noise
    dev: Noise
    test: Noise
    states: int
    choices: int
    continuous: int
    scale: Tensor
    """`[states]` units of the observation"""
    ignore: int
    """first periods of `dev` and `test` that do not count"""
    divisor: float
    """cost per counted period -> the metric of the reference"""
    first: Params = field(default_factory=dict)
    """weights to start from where they are not those of `tanh_weights`"""
    optimum: Callable[[Noise], Tensor] | None = None
    """metric of the optimal policy on each path `[B]`"""


def tanh_network(nu: Params, name: str, x: Tensor) -> Tensor:
    """Linear layers with tanh between them, plus the direct linear path."""
    h, k = x, 0
    while f"{name}.{k}.weight" in nu:
        h = linear(torch.tanh(h) if k else h, nu[f"{name}.{k}.weight"], nu[f"{name}.{k}.bias"])
        k += 1
    return h + linear(x, nu[f"{name}.direct"])


def tanh_weights(sizes: dict[str, tuple[int, ...]], generator: torch.Generator) -> Params:
    """Orthogonal, the last layer scaled by 0.01, the direct path 0: uniform choices, actions near 0."""
    nu: Params = {}
    for name, widths in sizes.items():
        layers = list(pairwise(widths))
        for k, (inputs, outputs) in enumerate(layers):
            gain = 0.01 if k == len(layers) - 1 else 5 / 3
            draw = torch.empty(outputs, inputs)
            nu[f"{name}.{k}.weight"] = torch.nn.init.orthogonal_(draw, gain, generator=generator)
            nu[f"{name}.{k}.bias"] = torch.zeros(outputs)
        nu[f"{name}.direct"] = torch.zeros(widths[-1], widths[0])
    return nu


def task_policy(task: HybridTask, *, stochastic: bool) -> HybridPolicy:
    """nu: networks "discrete" and "continuous"; if stochastic also "log_std" `[choices, continuous]`, of z."""
    shape = (task.choices, task.continuous)
    return discrete_first_policy(
        lambda nu, state: tanh_network(nu, "discrete", state / task.scale),
        lambda nu, state: tanh_network(nu, "continuous", state / task.scale).unflatten(-1, shape),
        choices=task.choices,
        continuous_dim=task.continuous,
        std=(lambda nu, state: nu["log_std"].clamp(-20, 2).exp().expand(len(state), *shape)) if stochastic else 0.0,
    )


def task_weights(task: HybridTask, width: int, generator: torch.Generator, *, stochastic: bool) -> Params:
    outputs = {"discrete": task.choices, "continuous": task.choices * task.continuous}
    nu = tanh_weights({key: (task.states, width, width, out) for key, out in outputs.items()}, generator)
    nu |= {key: value.clone() for key, value in task.first.items()}
    return nu | ({"log_std": torch.zeros(task.choices, task.continuous)} if stochastic else {})


@torch.no_grad()
def metric(task: HybridTask, policy: Policy, nu: Params, noise: Noise, mdp: ModelMDP | None = None) -> Tensor:
    """Metric of each path `[B]`, float64, under a policy without draws."""
    calm = replace(noise, policy=noise.policy.new_zeros(*noise.policy.shape[:2], policy.noise_dim))
    rewards = rollout(mdp or task.mdp, policy, task.theta, nu, calm).rewards
    return -rewards[:, task.ignore :].double().mean(1) / task.divisor


def lqr_task(states: int, modes: int = 2, paths: int = 1024) -> HybridTask:
    """Metric: total cost over 20 n."""
    mdp = switched_lqr(states, modes)
    design = default_params(mdp.box)
    matrices = optimal_set(design["A"].numpy(), design["B"].numpy())

    def noise(split: str) -> Noise:
        start = switched_initial_noise(switched_initial_states(states, split, paths)).float()  # type: ignore[arg-type]
        return Noise(start, start.new_zeros(paths, HORIZON, 0), start.new_zeros(paths, HORIZON, 1))

    def optimum(found: Noise) -> Tensor:
        start = mdp.initial_state({}, found.initial.double())
        return torch.from_numpy(optimal_cost(matrices, start.numpy())) / (HORIZON * states)

    return HybridTask(
        mdp,
        {key: value.float() for key, value in design.items()},
        *(noise(split) for split in ("train", "dev", "test")),
        states=states,
        choices=modes,
        continuous=states,
        scale=torch.ones(states),
        ignore=0,
        divisor=states,
        optimum=optimum,
    )


def replenishment_task(
    items: int,
    fixed: float = 64.0,
    periods: int = 100,
    paths: int = 1024,
    *,
    rule: tuple[float, float] | None = None,
) -> HybridTask:
    """Poisson demand, lead time 2; metric: cost per item and period after the first 16 of 100.

    `rule`: training starts from orders up to so many mean demands, placed by chance with this logit against them.
    """
    task = joint_replenishment_task(items, fixed)
    pmfs = [poisson_pmf(mean) for mean in task.mean.tolist()]
    both = task_noise(task, 2 * paths, 100, seed=task.train_seed, dtype=torch.float32)
    cut = lambda rows: Noise(both.initial[rows], both.process[rows], both.policy[rows])
    train, test = cut(slice(0, paths)), task_noise(task, paths, 100, seed=task.test_seed, dtype=torch.float32)
    train = replace(train, process=train.process[:, :periods], policy=train.policy[:, :periods])
    splits = (train, cut(slice(paths, None)), test)
    optimum = (lambda: joint_replenishment_optimum(pmfs, **_costs(task), tol=2e-4)) if items <= 3 else None
    first = {} if rule is None else _order_up_to(items, 2, *rule)
    return _squashed(task, splits, 16, optimum, first=first)


def heavy_tail_task(periods: int = 100, paths: int = 1024) -> HybridTask:
    """Two items, negative binomial demand, lead time 0; metric: cost per item and period, 200 of 1000 not counted."""
    task = negative_binomial_task()
    pmfs = [negative_binomial_pmf(mean, math.sqrt(52) * 0.5) for mean in task.mean.tolist()]
    train = task_noise(task, paths, periods, seed=task.train_seed, dtype=torch.float32)
    dev = task_noise(task, paths, 400, seed=task.train_seed + 1, dtype=torch.float32)
    test = task_noise(task, paths, 1000, seed=task.test_seed, dtype=torch.float32)
    exact = lambda: joint_replenishment_optimum(pmfs, **_costs(task), lead_time=0, lowest=-60, highest=150)
    first = _order_up_to(2, 1, math.log(46.0), 5.0)  # the economic order quantity lasts 47 periods
    return _squashed(task, (train, dev, test), 200, exact, unit=10.0, first=first)


def _costs(task: InventoryTask) -> dict[str, object]:
    return {key: value.tolist() for key, value in task.theta.items()}


def _squashed(
    task: InventoryTask,
    splits: tuple[Noise, Noise, Noise],
    ignore: int,
    exact: Callable[[], Replenishment] | None,
    *,
    unit: float = 1.0,
    first: Params,
) -> HybridTask:
    """The task with actions `(d, z)`, quantities `unit mean softplus(z + 1)`, stocks in the same unit."""
    plain, mean = task.mdp, unit * task.mean.float()
    theta = {key: value.float() for key, value in task.theta.items()}

    def ordered(action: Tensor) -> Tensor:
        return torch.cat([action[..., :1], mean.to(action) * softplus(action[..., 1:] + 1.0)], -1)

    mdp = replace(
        plain,
        step=lambda th, s, a, e: plain.step(th, s, ordered(a), e),
        reward=lambda th, s, a, e, after: plain.reward(th, s, ordered(a), e, after),
    )
    width = len(plain.names["state"]) // len(mean)
    found = HybridTask(
        mdp,
        theta,
        *splits,
        states=width * len(mean),
        choices=2,
        continuous=len(mean),
        scale=mean.repeat(width),
        ignore=ignore,
        divisor=len(mean),
        first=first,
    )
    if exact is None:
        return found

    solve = cache(lambda: order_up_to_where(exact()))

    def optimum(noise: Noise) -> Tensor:
        return metric(found, solve(), {}, noise, plain)

    return replace(found, optimum=optimum)


def _order_up_to(items: int, width: int, against: float, level: float) -> Params:
    """Order up to `level` units at random, `against` the logit of not ordering.

    From frequent orders training hardly finds to rarer ones: a stock that is ordered often is ordered low, and then it
    would be wrong to skip an order.
    """
    feedback = torch.zeros(2 * items, width * items)
    for item in range(items):
        feedback[items + item, item::items] = -1.0
    return {
        "discrete.2.bias": torch.tensor([against, 0.0]),
        "continuous.direct": feedback,
        "continuous.2.bias": torch.tensor([0.0] * items + [level - 1.0] * items),
    }


def order_up_to_where(optimum: Replenishment) -> Policy:
    """Order all up to the levels where the table says so: actions `(d, q)` of the plain model."""
    order, level = torch.from_numpy(optimum.order), torch.from_numpy(optimum.level)

    def act(nu: Params, state: Tensor) -> Tensor:
        position = state.unflatten(-1, (-1, len(level))).sum(-2)
        index = (position.round().long() - optimum.lowest).clamp(0, order.shape[0] - 1)
        choice = order[index.unbind(-1)].to(state)
        return torch.cat([choice.unsqueeze(-1), torch.relu(level - position)], -1)

    return deterministic_policy(act)
