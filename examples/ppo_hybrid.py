"""PPO for hybrid actions
======================

The task of `hpo_switched_lqr.py` without the simulator's derivative: expect PPO to learn much more slowly the more
continuous inputs there are, and to end several times as far from the optimum with 16 states after the same rollouts.

    python examples/ppo_hybrid.py --plot ppo.png

An action is a mode and, with it, one input per state. PPO draws both: the mode from a softmax, the inputs from a
Gaussian around the branch of that mode with a learned standard deviation. The log-probability of the whole action is
the sum of the two, and its ratio to that of the policy that acted is clipped. The baseline is a critic.
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

from sim2real import HybridPolicy, ModelMDP, Noise, Params, discrete_first_policy, greedy_policy, rollout
from sim2real.bounds import default_params
from sim2real.hybrid_policy import choice_entropy
from sim2real.simulators import switched_initial_noise, switched_initial_states, switched_lqr

HORIZON, MODES, INPUT_PRICE = 20, 2, 0.1


@dataclass(frozen=True)
class Settings:
    sizes: tuple[int, ...] = (3, 16)
    width: int = 128
    epochs: int = 40
    paths: int = 1024
    batch: int = 128
    rate: float = 1e-3
    """of Adam, lowered along a half cosine"""
    entropy: float = 0.1
    """bonus in units of the advantages' spread, lowered to 0.001"""
    passes: int = 4
    minibatches: int = 4
    clip: float = 0.15
    target_kl: float = 0.015
    discount: float = 0.99
    trace: float = 0.96


class Trunk(nn.Module):
    """Two tanh layers beside a direct linear path, since optimal feedback is piecewise linear; starts near zero."""

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        last = nn.Linear(width, outputs)
        self.layers = nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), last)
        self.direct = nn.Linear(inputs, outputs)
        for layer, gain in ((self.layers[0], 5 / 3), (self.layers[2], 5 / 3), (last, 0.01), (self.direct, 0.0)):
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + self.direct(x)


def critic_inputs(states: Tensor) -> Tensor:
    """State, squares and clock, `[B, T, 2 n + 1]`."""
    clock = torch.linspace(0, 1, states.shape[1]).reshape(1, -1, 1).expand(*states.shape[:2], 1)
    return torch.cat([states, states.square(), clock], -1)


def advantages(settings: Settings, values: Tensor, rewards: Tensor) -> Tensor:
    """Generalised advantage estimation `[B, T]`: sum_l (discount trace)^l delta_{t+l}."""
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
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


def ppo_update(
    settings: Settings, mdp: ModelMDP, policy: HybridPolicy, theta: Params, nu: Params, critic: nn.Module,
    optimizer: torch.optim.Optimizer, noise: Noise, entropy: float,
) -> None:  # fmt: skip
    with torch.no_grad():
        path = rollout(mdp, policy, theta, nu, noise)
        states, actions = path.states[:, :-1], path.actions
        log_prob = policy.log_prob(nu, states.flatten(0, 1), actions.flatten(0, 1))
        features = critic_inputs(states)
        values = critic(features).squeeze(-1)
        advantage = advantages(settings, values, path.rewards / path.rewards.std())
        target, advantage = advantage + values, (advantage - advantage.mean()) / advantage.std()

    data = [part.flatten(0, 1) for part in (states, actions, advantage, features, target)]
    for _ in range(settings.passes):
        for rows in torch.randperm(advantage.numel()).chunk(settings.minibatches):
            state, action, weight, feature, wanted = (part[rows] for part in data)
            change = policy.log_prob(nu, state, action) - log_prob[rows]
            ratio = change.exp()
            clipped = ratio.clamp(1 - settings.clip, 1 + settings.clip)
            gain = torch.minimum(ratio * weight, clipped * weight).mean()
            bonus = choice_entropy(policy.choice_log_probs(nu, state, action)).mean()
            error = (critic(feature).squeeze(-1) - wanted).square().mean()
            ascend(optimizer, gain + entropy * bonus - 0.075 * error)
            if float((ratio - 1 - change).detach().mean()) > settings.target_kl:
                return


def hybrid_gaussian(discrete: nn.Module, continuous: nn.Module, states: int) -> tuple[HybridPolicy, Params]:
    """A mode, then Gaussian inputs; nu holds the log standard deviations, the modules their own weights."""
    shape = (MODES, states)
    policy = discrete_first_policy(
        lambda nu, state: discrete(state),
        lambda nu, state: continuous(state).unflatten(-1, shape),
        choices=MODES,
        continuous_dim=states,
        std=lambda nu, state: nu["log_std"].exp().expand(len(state), *shape),
    )
    return policy, {"log_std": nn.Parameter(torch.zeros(shape))}


def train(settings: Settings, mdp: ModelMDP, theta: Params, states: int) -> Iterator[tuple[HybridPolicy, Params]]:
    """Policy and weights after each epoch."""
    discrete, continuous = Trunk(states, settings.width, MODES), Trunk(states, settings.width, MODES * states)
    policy, nu = hybrid_gaussian(discrete, continuous, states)
    critic = Trunk(2 * states + 1, 64, 1)
    groups = [discrete.parameters(), [*continuous.parameters(), nu["log_std"]], critic.parameters()]
    optimizer = torch.optim.Adam([{"params": list(group)} for group in groups], lr=settings.rate)
    starts = switched_initial_noise(switched_initial_states(states, "train", settings.paths)).float()
    total, update = settings.epochs * (settings.paths // settings.batch), 0
    for _ in range(settings.epochs):
        for chosen in torch.randperm(settings.paths).split(settings.batch):
            share = update / total
            for group in optimizer.param_groups:
                group["lr"] = settings.rate * (0.02 + 0.49 * (1 + math.cos(math.pi * share)))
            nothing = starts.new_zeros(len(chosen), HORIZON, 0)
            noise = Noise(starts[chosen], nothing, torch.randn(len(chosen), HORIZON, 1 + states))
            entropy = settings.entropy + (0.001 - settings.entropy) * share
            ppo_update(settings, mdp, policy, theta, nu, critic, optimizer, noise, entropy)
            update += 1
        yield policy, nu


def optimal_cost(A: Tensor, B: Tensor, starts: Tensor) -> float:
    """Mean over starts x of min_P x'P x: P runs over the Riccati matrices of all mode sequences worth having."""
    eye = torch.eye(len(A)).to(A)
    found = [eye]
    for _ in range(HORIZON - 1):
        grown = []
        for P in found:
            for b in B:
                gain = torch.linalg.inv(INPUT_PRICE * eye + b[:, None] * P * b) @ (b[:, None] * P @ A)
                grown.append(eye + A.T @ P @ A - A.T @ (P * b) @ gain)
        found = []
        for P in sorted(grown, key=lambda P: float(P.trace())):  # one that lies above another never attains the minimum
            if all(float(torch.linalg.eigvalsh(P - Q)[0]) < -1e-9 and float((P - Q).abs().max()) > 1e-4 for Q in found):
                found.append(P)
    return float(torch.stack([((starts @ P) * starts).sum(-1) for P in found]).amin(0).mean())


def test_cost(mdp: ModelMDP, policy: HybridPolicy, theta: Params, nu: Params, starts: Tensor) -> float:
    """Mean total cost under the likeliest mode and the mean inputs."""
    initial = switched_initial_noise(starts).float()
    nothing = initial.new_zeros(len(initial), HORIZON, 0)
    with torch.no_grad():
        rewards = rollout(mdp, greedy_policy(policy), theta, nu, Noise(initial, nothing, nothing)).rewards
    return -float(rewards.double().sum(1).mean())


def main(settings: Settings, seed: int) -> Figure:
    figure, axes = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    print("states  optimum  one mode throughout  learnt: gap to the optimum on 1024 test starts")
    for states in settings.sizes:
        torch.manual_seed(seed)
        mdp = switched_lqr(states, MODES)
        design = default_params(mdp.box)
        theta = {key: value.float() for key, value in design.items()}
        test = switched_initial_states(states, "test")
        best = optimal_cost(design["A"], design["B"], test)
        single = 100 * (min(optimal_cost(design["A"], b[None], test) for b in design["B"]) / best - 1)
        gaps = []
        for policy, nu in train(settings, mdp, theta, states):
            gaps.append(100 * (test_cost(mdp, policy, theta, nu, test) / best - 1))
        line = axes.semilogy(range(1, len(gaps) + 1), gaps, label=f"{states} states")[0]
        axes.axhline(single, color=line.get_color(), linestyle=":", label="one mode throughout")
        print(f"{states:6d}  {best / (HORIZON * states):7.4f}  {single:17.1f} %  {gaps[-1]:18.2f} %")
    axes.set(xlabel="epochs of 1024 rollouts", ylabel="cost above the optimum, %", title="PPO on the switched LQR")
    axes.legend()
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[3])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one small size, few epochs")
    parser.add_argument("--plot", help="write the figure to this file")
    arguments, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    small = replace(Settings(), sizes=(3,), width=32, epochs=3, paths=256, batch=32)
    drawn = main(small if arguments.quick else Settings(), arguments.seed)
    if arguments.plot:
        drawn.savefig(arguments.plot, dpi=120)
