"""Offline learning of an upper policy with the losses of torchrl: behaviour cloning, IQL and CQL, for any network.

    networks = Networks(policy, critic, value)                 # critic(features, u) -> [N], value(features) -> [N]
    for progress in learn(train, held_out, networks, dirichlet(), Recipe("iql"), seed=0):
        ...                                                    # progress.policy: weights; progress.held_out: log loss
    u = best(networks.policy, dirichlet(), progress.policy, features)

`policy(features)` gives the raw numbers that a `Family` of distributions turns into a distribution over u. features are
one tensor `[N, ...]`: a vector, or nodes of a graph `[N, nodes, f]`.

IQL, per update (Kostrikov et al., 2021, equations 5 to 7), with r summed over the segment:

    V <- argmin E L_2^expectile(Q_target(s, u) - V(s)),    Q <- r + discount V(s'),
    pi <- argmax E min(exp(temperature (Q_target(s, u) - V(s))), 100) log pi(u|s).

The expectile target is Q_target(s, u) at the logged pair. torchrl samples random actions of CQL in [-1, 1]^p;
`Family.project` moves them onto the support before the critic sees them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch import Tensor, nn
from torch.distributions import AffineTransform, Beta, Dirichlet, Distribution, Independent, Normal
from torch.distributions.transformed_distribution import TransformedDistribution
from torchrl.data import Bounded
from torchrl.objectives import BCLoss, CQLLoss, IQLLoss, LossModule, SoftUpdate

PARAMETERS = "logits"
"""key of the raw numbers; a key that torchrl's cloning loss takes for those of a distribution"""


@dataclass(frozen=True)
class Transitions:
    """N transitions of the upper level; features in the shape that the networks read."""

    features: Tensor
    input: Tensor
    """`[N, p]`"""
    reward: Tensor
    """`[N]`"""
    following: Tensor
    """features of the next state"""
    terminal: Tensor
    """`[N]` bool: worth 0 from the next state on (a time limit is not)"""


@dataclass(frozen=True)
class Networks:
    """Any modules of the shapes in the module's docstring; cloning reads the policy alone."""

    policy: nn.Module
    critic: nn.Module | None = None
    value: nn.Module | None = None


@dataclass(frozen=True)
class Family:
    """A parametric family of distributions of u."""

    distribution: Callable[[Tensor], Distribution]
    """raw numbers `[N, ...]` -> distribution over `[N, p]`"""
    mean: Callable[[Tensor], Tensor]
    project: Callable[[Tensor], Tensor]
    """any `[N, p]` onto the inside of the support, where densities are finite"""


@dataclass(frozen=True)
class Recipe:
    """Settings of one run; those of the published IQL by default."""

    method: Literal["bc", "iql", "cql"] = "bc"
    updates: int = 10_000
    batch: int = 256
    rate: float = 3e-4
    """of the policy; it falls to zero along a cosine if `anneal`"""
    critic_rate: float = 3e-4
    anneal: bool = False
    discount: float = 0.99
    expectile: float = 0.9
    temperature: float = 3.0
    conservatism: float = 1.0
    """weight of CQL's penalty"""
    entropy: float = 0.01
    """weight of the policy's entropy in CQL"""
    average: float = 0.005
    """share of the critic that enters its target at each update"""
    every: int = 1000
    """updates between two reports"""


@dataclass(frozen=True)
class Progress:
    """A point of the run, with a copy of the policy's weights."""

    updates: int
    seconds: float
    """CPU"""
    held_out: float
    """mean of -log pi(u|s) on held-out transitions"""
    policy: dict[str, Tensor]


def gaussian(floor: float = 0.01) -> Family:
    """Independent normal distributions: the first half of the numbers are means, the rest deviations (softplus)."""

    def distribution(numbers: Tensor) -> Distribution:
        loc, raw = numbers.chunk(2, -1)
        return Independent(Normal(loc, nn.functional.softplus(raw) + floor), 1)

    return Family(distribution, lambda numbers: numbers.chunk(2, -1)[0], lambda u: u)


def beta(low: Tensor | float = 0.0, high: Tensor | float = 1.0, *, margin: float = 1e-3) -> Family:
    """Independent Beta distributions on [low, high]; half of the numbers for each concentration (1 + softplus)."""
    bottom, size = torch.as_tensor(low), torch.as_tensor(high) - torch.as_tensor(low)

    def concentrations(numbers: Tensor) -> tuple[Tensor, Tensor]:
        a, b = (1 + nn.functional.softplus(numbers)).chunk(2, -1)
        return a, b

    def distribution(numbers: Tensor) -> Distribution:
        scaled = TransformedDistribution(Beta(*concentrations(numbers)), AffineTransform(bottom, size))
        return Independent(scaled, 1)

    def mean(numbers: Tensor) -> Tensor:
        a, b = concentrations(numbers)
        return bottom + size * a / (a + b)

    return Family(distribution, mean, lambda u: bottom + size * ((u - bottom) / size).clamp(margin, 1 - margin))


def dirichlet(*, floor: float = 1e-3, margin: float = 1e-4) -> Family:
    """A distribution over shares; one number per node, its concentration by softplus."""

    def concentration(numbers: Tensor) -> Tensor:
        return nn.functional.softplus(numbers) + floor

    def mean(numbers: Tensor) -> Tensor:
        a = concentration(numbers)
        return a / a.sum(-1, keepdim=True)

    def project(u: Tensor) -> Tensor:
        inside = u.clamp(min=0) + margin
        return inside / inside.sum(-1, keepdim=True)

    return Family(lambda numbers: Dirichlet(concentration(numbers)), mean, project)


def joined(first: Family, columns: int, numbers: int, second: Family) -> Family:
    """`first` over the first `columns` of u from the first `numbers` raw numbers, `second` over the rest."""
    return Family(
        lambda raw: _Pair(first.distribution(raw[..., :numbers]), second.distribution(raw[..., numbers:]), columns),
        lambda raw: torch.cat([first.mean(raw[..., :numbers]), second.mean(raw[..., numbers:])], -1),
        lambda u: torch.cat([first.project(u[..., :columns]), second.project(u[..., columns:])], -1),
    )


class _Pair(Distribution):
    """Two independent distributions side by side; a torch distribution, since torchrl asks for one."""

    def __init__(self, first: Distribution, second: Distribution, columns: int) -> None:
        self.first, self.second, self.columns = first, second, columns
        width = first.event_shape[0] + second.event_shape[0]
        super().__init__(first.batch_shape, torch.Size([width]), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        parts = value[..., : self.columns], value[..., self.columns :]
        return self.first.log_prob(parts[0]) + self.second.log_prob(parts[1])

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return torch.cat([self.first.rsample(sample_shape), self.second.rsample(sample_shape)], -1)


def learn(
    data: Transitions, held_out: Transitions, networks: Networks, family: Family, recipe: Recipe, *, seed: int
) -> Iterator[Progress]:
    """Train `networks` in place; reports every `recipe.every` updates. Batches are drawn with replacement."""
    generator = torch.Generator(device=data.input.device).manual_seed(seed)
    torch.manual_seed(seed)  # torchrl samples CQL's actions from the global generator
    loss = _loss(networks, family, recipe)
    groups = [{"params": [p for n, p in loss.named_parameters() if n.startswith("actor")], "lr": recipe.rate}]
    others = [p for n, p in loss.named_parameters() if not n.startswith("actor")]
    groups += [{"params": others, "lr": recipe.critic_rate}] if others else []
    optimizer = torch.optim.Adam(groups)
    follow = SoftUpdate(loss, eps=1 - recipe.average) if recipe.method != "bc" else None
    batches, begin = _tensordict(data, family), time.process_time()
    for update in range(1, recipe.updates + 1):
        if recipe.anneal:
            optimizer.param_groups[0]["lr"] = recipe.rate * 0.5 * (1 + math.cos(math.pi * update / recipe.updates))
        index = torch.randint(len(data.input), (recipe.batch,), generator=generator, device=data.input.device)
        terms = loss(batches[index])
        optimizer.zero_grad()
        sum(term for name, term in terms.items() if name.startswith("loss")).backward()
        optimizer.step()
        if follow is not None:
            follow.step()
        if update % recipe.every == 0 or update == recipe.updates:
            weights = {key: value.detach().clone() for key, value in networks.policy.state_dict().items()}
            spent = time.process_time() - begin
            yield Progress(update, spent, log_loss(networks.policy, family, held_out), weights)


def best(policy: nn.Module, family: Family, weights: dict[str, Tensor], features: Tensor) -> Tensor:
    """The mean input `[N, p]` under the policy with these weights."""
    with torch.no_grad():
        return family.mean(torch.func.functional_call(policy, weights, (features,)))


def log_loss(policy: nn.Module, family: Family, data: Transitions) -> float:
    """Mean of -log pi(u|s)."""
    with torch.no_grad():
        parts = zip(data.features.split(10_000), data.input.split(10_000), strict=True)
        each = [-family.distribution(policy(x)).log_prob(family.project(u)) for x, u in parts]
        return float(torch.cat(each).mean())


def perceptron(inputs: int, outputs: int, width: int = 256, depth: int = 2) -> nn.Sequential:
    """ReLU layers."""
    sizes, layers = [inputs, *[width] * depth], list[nn.Module]()
    for now, after in pairwise(sizes):
        layers += [nn.Linear(now, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))


class VectorCritic(nn.Module):
    """Q(s, u) of feature vectors."""

    def __init__(self, features: int, inputs: int, width: int = 256) -> None:
        super().__init__()
        self.net = perceptron(features + inputs, 1, width)

    def forward(self, features: Tensor, u: Tensor) -> Tensor:
        return self.net(torch.cat([features, u], -1)).squeeze(-1)


class _Column(nn.Module):
    """The last axis that torchrl wants of values."""

    def __init__(self, net: nn.Module, project: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.net, self.project = net, project

    def forward(self, features: Tensor, *u: Tensor) -> Tensor:
        inside = (self.project(x) for x in u) if self.project is not None else u
        return self.net(features, *inside).reshape(features.shape[0], 1)


def _loss(networks: Networks, family: Family, recipe: Recipe) -> LossModule:
    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(networks.policy, ["features"], [PARAMETERS]),
        ProbabilisticTensorDictModule(
            in_keys={"numbers": PARAMETERS},
            out_keys=["action"],
            distribution_class=partial(_distribution, family),
            return_log_prob=False,
        ),
    )
    if recipe.method == "bc":
        return BCLoss(actor)
    if networks.critic is None or (recipe.method == "iql" and networks.value is None):
        raise ValueError(f"'{recipe.method}' needs a critic, and IQL a value network too; got {networks}")
    wrapped = _Column(networks.critic, family.project)
    critic = TensorDictModule(wrapped, ["features", "action"], ["state_action_value"])
    if recipe.method == "iql":
        value = TensorDictModule(_Column(networks.value), ["features"], ["state_value"])
        options = {"temperature": recipe.temperature, "expectile": recipe.expectile, "loss_function": "l2"}
        loss: LossModule = IQLLoss(actor, critic, value, deactivate_vmap=True, **options)
    else:
        loss = CQLLoss(
            actor,
            critic,
            action_spec=Bounded(-1, 1, (1,)),  # read only for a target entropy, and the weight is fixed
            fixed_alpha=True,
            alpha_init=recipe.entropy,
            min_q_weight=recipe.conservatism,
            loss_function="l2",
            deactivate_vmap=True,
        )
    loss.make_value_estimator(gamma=recipe.discount)
    return loss


def _distribution(family: Family, numbers: Tensor) -> Distribution:
    made = family.distribution(numbers)
    made.deterministic_sample = family.mean(numbers)  # type: ignore[attr-defined]  # else torchrl averages samples
    return made


def _tensordict(data: Transitions, family: Family) -> TensorDict:
    count, column = len(data.input), data.terminal.unsqueeze(-1)
    ahead = {"features": data.following, "reward": data.reward.unsqueeze(-1), "done": column, "terminated": column}
    content = {"features": data.features, "action": family.project(data.input), "next": TensorDict(ahead, [count])}
    return TensorDict(content, [count])
