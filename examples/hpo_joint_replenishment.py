"""Joint replenishment by mixed gradients
=========================================

Two products share the fixed cost of an order: learn when to order and how much of each. Expect the cost per product and
period to fall to within 2 % of the optimum, 27.9, and a region of stocks in which it pays to order.

    python examples/hpo_joint_replenishment.py --plot surface.png
    python examples/hpo_joint_replenishment.py --terms minimum --plot minimum.png

Whether to order is a choice, how much is continuous, and the simulator is differentiable once the choice is made. The
update is that of `hpo_switched_lqr.py`. With `--terms minimum` an order is of 60 units at least; with `--terms
discount` an order of 80 units or more costs 0.5 per unit instead of 1: then the choice is also among the terms.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import one_hot, softplus

from sim2real import HybridPolicy, Noise, Params, greedy_policy, hybrid_module_policy, rollout
from sim2real.hybrid_policy import choice_entropy
from sim2real.simulators import OrderTerms
from sim2real.simulators.inventory_tasks import InventoryTask, joint_replenishment_task, mean_cost, task_noise

ITEMS = 2
TERMS = {
    "plain": (OrderTerms(),),
    "minimum": (OrderTerms(low=60.0),),
    "discount": (OrderTerms(high=80.0), OrderTerms(low=80.0, factor=0.5)),
}


@dataclass(frozen=True)
class Settings:
    width: int = 64
    epochs: int = 16
    paths: int = 1024
    periods: int = 60
    batch: int = 128
    rate: float = 2e-3
    """of Adam, lowered along a half cosine"""
    entropy: float = 0.1
    """bonus in units of the advantages' spread, lowered to 0.001"""
    passes: int = 4
    minibatches: int = 2
    clip: float = 0.15
    target_kl: float = 0.015
    discount: float = 0.99
    """of the advantages"""
    ramp: float = 0.4
    """share of the training over which the bonus falls"""
    trace: float = 0.96
    edge: int = 12
    """periods: orders of the last, and all that happens in the first, teach nothing"""


class Trunk(nn.Module):
    """Two tanh layers beside a direct linear path, since order-up-to rules are linear; starts near zero.

    Sees states over their `scale`. With `units [outputs]` the output is `units softplus(z + 1)`: order quantities.
    """

    def __init__(self, scale: Tensor, width: int, outputs: int, units: Tensor | None = None) -> None:
        super().__init__()
        last = nn.Linear(width, outputs)
        self.layers = nn.Sequential(nn.Linear(len(scale), width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), last)
        self.direct = nn.Linear(len(scale), outputs)
        for layer, gain in ((self.layers[0], 5 / 3), (self.layers[2], 5 / 3), (last, 0.01), (self.direct, 0.0)):
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)
        self.scale, self.units = scale, units

    def forward(self, state: Tensor) -> Tensor:
        z = self.layers(state / self.scale) + self.direct(state / self.scale)
        return z if self.units is None else self.units * softplus(z + 1.0)


def advantages(settings: Settings, values: Tensor, rewards: Tensor) -> Tensor:
    """Generalised advantage estimation `[B, T]`, the value held after the end."""
    following = torch.cat([values[:, 1:], values[:, -1:]], 1)
    total, found = torch.zeros_like(values[:, 0]), []
    for delta in reversed((rewards + settings.discount * following - values).unbind(1)):
        total = delta + settings.discount * settings.trace * total
        found.append(total)
    return torch.stack(found[::-1], 1)


def ascend(optimizer: torch.optim.Optimizer, objective: Tensor) -> None:
    """One step; the gradient's norm is clipped apart for choice, continuous part and critic."""
    optimizer.zero_grad()
    (-objective).backward()
    for group in optimizer.param_groups:
        nn.utils.clip_grad_norm_(group["params"], 5.0)
    optimizer.step()


def attached_rollout(
    task: InventoryTask, policy: HybridPolicy, nu: Params, noise: Noise, tail: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States, actions, rewards and log pi of all choices, `[B, T, ...]`, with derivatives.

    In the last `tail` periods the weights are held fixed: what earlier orders cause there counts, but no order whose
    use the end cuts off.
    """
    theta, mdp = {key: value.float() for key, value in task.theta.items()}, task.mdp
    split, parts = noise.process.shape[1] - tail, []
    fixed = {key: value.detach() for key, value in nu.items()}
    for periods, weights in ((slice(0, split), nu), (slice(split, None), fixed)):
        part = Noise(noise.initial, noise.process[:, periods], noise.policy[:, periods])
        path = rollout(mdp, policy, theta, weights, part)
        mdp = replace(mdp, initial_state=lambda theta, e, last=path.states[:, -1]: last)
        flat = path.states[:, :-1].flatten(0, 1)
        log_probs = policy.choice_log_probs(weights, flat, flat).unflatten(0, path.rewards.shape)
        parts.append((path.states[:, :-1], path.actions, path.rewards, log_probs))
    states, actions, rewards, log_probs = (torch.cat(pair, 1) for pair in zip(*parts, strict=True))
    return states, actions, rewards, log_probs


def hpo_update(
    settings: Settings, task: InventoryTask, policy: HybridPolicy, nu: Params, critic: nn.Module,
    optimizer: torch.optim.Optimizer, noise: Noise, *, entropy: float,
) -> None:  # fmt: skip
    states, actions, rewards, log_probs = attached_rollout(task, policy, nu, noise, settings.edge)
    kept, index = slice(settings.edge, rewards.shape[1] - settings.edge), actions[..., 0].detach().long()

    with torch.no_grad():
        scaled = states / task.mean.float().repeat(2)
        features = torch.cat([scaled, scaled.square()], -1)
        unit, values = rewards.std(), critic(features).squeeze(-1)
        relative = (rewards - rewards.mean()) / unit  # to the average: values stay small
        advantage = advantages(settings, values, relative)
        target, spread = advantage + values, advantage[:, kept].std()
        credit = ((advantage - advantage[:, kept].mean()) / spread).unsqueeze(-1) * one_hot(index, policy.choices)

    # first pass: rewards and advantages in one unit, states attached in log pi: pathwise + score + cross term
    mixed = (rewards / (unit * spread) + (credit * log_probs).sum(-1))[:, settings.edge :].mean()
    ascend(optimizer, mixed + entropy * choice_entropy(log_probs[:, kept]).mean())

    # later passes: the choice alone, on detached data
    data = [part[:, kept].detach().flatten(0, 1) for part in (states, log_probs, credit, features, target)]
    for _ in range(settings.passes):
        for rows in torch.randperm(len(data[0])).chunk(settings.minibatches):
            state, old, weight, feature, wanted = (part[rows] for part in data)
            new = policy.choice_log_probs(nu, state, state)
            ratio = (new - old).exp()
            clipped = ratio.clamp(1 - settings.clip, 1 + settings.clip)
            gain = torch.minimum(ratio * weight, clipped * weight).sum(-1).mean()
            error = (critic(feature).squeeze(-1) - wanted).square().mean()
            ascend(optimizer, gain + entropy * choice_entropy(new).mean() - 0.075 * error)
            if float((old.exp() * (old - new.detach())).sum(-1).mean()) > settings.target_kl:
                return


def train(settings: Settings, task: InventoryTask, terms: int) -> Iterator[tuple[HybridPolicy, Params]]:
    """Policy and weights after each epoch."""
    mean, choices = task.mean.float(), terms + 1
    scale, units = mean.repeat(2), mean.repeat(choices)
    policy, nu = hybrid_module_policy(
        discrete := Trunk(scale, settings.width, choices),
        continuous := Trunk(scale, settings.width, choices * ITEMS, units),
        choices=choices,
        continuous_dim=ITEMS,
    )
    with torch.no_grad():
        # start from rare orders up to six mean demands: what is ordered often is ordered low, and then skipping an
        # order looks wrong, so that training hardly finds from frequent orders to rarer ones
        discrete.direct.bias[0] = math.log(3.0 * terms)
        continuous.direct.weight.copy_(-torch.eye(ITEMS).repeat(choices, 2))
        continuous.direct.bias.fill_(5.0)
    critic = Trunk(torch.ones(4 * ITEMS), 64, 1)
    groups = [{"params": list(module.parameters())} for module in (discrete, continuous, critic)]
    optimizer = torch.optim.Adam(groups, lr=settings.rate)
    demand = task_noise(task, settings.paths, settings.periods, seed=task.train_seed, dtype=torch.float32)
    total, update = settings.epochs * (settings.paths // settings.batch), 0
    for _ in range(settings.epochs):
        for chosen in torch.randperm(settings.paths).split(settings.batch):
            share = update / total
            for group in optimizer.param_groups:
                group["lr"] = settings.rate * (0.02 + 0.49 * (1 + math.cos(math.pi * share)))
            acting = torch.randn(len(chosen), settings.periods, 1)
            noise = Noise(demand.initial[chosen], demand.process[chosen], acting)
            ramp = min(share / settings.ramp, 1.0)
            entropy = settings.entropy + (0.001 - settings.entropy) * ramp
            hpo_update(settings, task, policy, nu, critic, optimizer, noise, entropy=entropy)
            update += 1
        yield policy, nu


def main(settings: Settings, terms: str, seed: int) -> Figure:
    torch.manual_seed(seed)
    purchase = {"purchase": torch.ones(ITEMS, dtype=torch.float64)} if terms == "discount" else {}
    task = joint_replenishment_task(ITEMS, terms=TERMS[terms])
    task = replace(task, mdp=replace(task.mdp, box=replace(task.mdp.box, default=task.mdp.box.default | purchase)))
    test = task_noise(task, 256, 100, seed=task.test_seed, dtype=torch.float32)
    costs = []
    for policy, nu in train(settings, task, len(TERMS[terms])):
        calm = replace(test, policy=test.policy.new_zeros(256, 100, 0))
        costs.append(float(mean_cost(task, greedy_policy(policy), nu, calm, ignore=16).mean()))
        print(f"epoch {len(costs):3d}: cost per product and period {costs[-1]:8.3f}")
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    left.plot(range(1, len(costs) + 1), costs)
    left.set(xlabel="epochs", ylabel="cost per product and period", title=f"HPO, {terms} terms")
    on_hand = torch.linspace(0.0, 60.0, 61)
    first, second = torch.meshgrid(on_hand, on_hand, indexing="ij")
    state = torch.stack([first.flatten(), second.flatten(), 0 * first.flatten(), 0 * first.flatten()], -1)
    with torch.no_grad():
        chance = 1 - policy.choice_log_probs(nu, state, state)[:, 0].exp()
        action = greedy_policy(policy).act(nu, state, state[:, :0])
    ends = (0.0, 60.0, 0.0, 60.0)
    for axes, values, title in (
        (middle, chance, "chance of an order"),
        (right, torch.where(action[:, 0] > 0, action[:, 1], torch.nan), "order of the first product"),
    ):
        shown = axes.imshow(values.reshape(61, 61).T, origin="lower", extent=ends, aspect="auto")
        axes.set(xlabel="stock of the first, nothing on order", ylabel="stock of the second", title=title)
        figure.colorbar(shown)
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[3])
    parser.add_argument("--terms", choices=sorted(TERMS), default="plain")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few epochs of few paths")
    parser.add_argument("--plot", help="write the figure to this file")
    arguments, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    small = replace(Settings(), width=16, epochs=4, paths=128, periods=40, batch=32, edge=8)
    drawn = main(small if arguments.quick else Settings(), arguments.terms, arguments.seed)
    if arguments.plot:
        drawn.savefig(arguments.plot, dpi=120)
