"""HPO and PPO for hybrid actions: one training loop each, which the study and its bars share.

One update of HPO on B rollouts, A the advantage of each decision, one scale for all terms:

    first pass      mean_t [ r_t + stop(A_t) log pi(d_t | s_t) ] + entropy   states attached: pathwise + score + cross
    later passes    clipped ratio of pi(d | s) times A, entropy              detached data: the choice only

A comes from a critic (generalised advantage estimation) or from counterfactual branches under common noise: at some
of the steps the rollout is continued with each other choice, and every choice d there has an advantage, weighted by
pi(d | s). With `response` the later passes fit the choice to the soft best response to these returns instead, whose
gradient does not vanish where the policy is sure and wrong. PPO draws Gaussian continuous actions and clips the ratio
of the whole action. Gradients are clipped apart for the choice, the continuous part and the critic.

Reference: M. Alvo et al., Policy optimization in hybrid discrete-continuous action spaces via mixed gradients;
J. Schulman et al., Proximal policy optimization algorithms, 2017, eq. 7.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from benchmarks.hybrid_tasks import HybridTask, tanh_network, tanh_weights, task_policy, task_weights
from sim2real.hybrid_policy import HybridPolicy, choice_entropy
from sim2real.mdp import Noise
from sim2real.params import Params
from sim2real.rollout import Rollout, rollout


@dataclass(frozen=True)
class Recipe:
    """Adam, its rate lowered along a half cosine; entropy bonus lowered linearly to 0.001."""

    method: Literal["hpo", "branches", "ppo"] = "hpo"
    epochs: int = 60
    batch: int = 128
    rate: float = 3e-3
    width: int = 128
    entropy: float = 0.1
    """in units of the standard deviation of the advantages"""
    passes: int = 2
    minibatches: int = 2
    clip: float = 0.15
    discount: float = 0.99
    """of the advantages"""
    last_discount: float | None = None
    """what it is raised to; None: it stays"""
    ramp: float = 1.0
    """share of the training over which entropy bonus and discount move to their last values"""
    trace: float = 0.96
    target_kl: float = 0.015
    buffer: int = 0
    """steps: choices and actions of the last, and all that happens in the first, teach nothing"""
    settle: bool = False
    """weights held fixed in the first `buffer` steps too: where orders last tens of steps, a stock ordered there would
    be held at no cost until they end"""
    tail: int | None = None
    """how many last steps teach nothing, where that is not `buffer`"""
    cut: int = 0
    """steps: a batch ends up to so many earlier, by chance; where orders lie far apart, one end would time them all"""
    cross_term: bool = True
    """False: the choice is scored at detached states, exact where it is the best response and free of its noise"""
    branch_times: int = 20
    """steps of each batch at which branches start ("branches")"""
    branch_before: int | None = None
    """branches start only in so many first steps; later choices get no credit. None: anywhere"""
    branch_steps: int | None = None
    """for how long each is followed; what comes later counts as equal. None: to the end"""
    first_weight: float = 1.0
    """of the first pass of "branches": where large, the norms are always clipped, and no huge first gradient stays in
    the memory of Adam"""
    response: float | None = None
    """later passes fit the soft best response to the branches at this temperature, in units of their differences"""


@dataclass(frozen=True)
class Progress:
    """After one epoch."""

    updates: int
    periods: int
    """simulated so far, branches included"""
    seconds: float
    """CPU time of the training"""
    nu: Params


@dataclass(frozen=True)
class Batch:
    """What the later passes learn from, detached; N samples."""

    states: Tensor
    actions: Tensor
    credit: Tensor
    """weight of each choice `[N, K]` (PPO: of the action, `[N, 1]`)"""
    log_prob: Tensor
    """of each choice (PPO: of the action) under the policy that acted, as `credit`"""
    features: Tensor
    target: Tensor
    """of the critic `[N]`"""


@dataclass(frozen=True)
class Learner:
    """Networks and their optimizer, updated in place by torch."""

    policy: HybridPolicy
    nu: Params
    critic: Params
    optimizer: torch.optim.Adam
    generator: torch.Generator


def new_learner(task: HybridTask, recipe: Recipe, seed: int) -> Learner:
    generator, stochastic = torch.Generator().manual_seed(seed), recipe.method == "ppo"
    nu = task_weights(task, recipe.width, generator, stochastic=stochastic)
    critic = tanh_weights({"critic": (2 * task.states + 1, 64, 64, 1)}, generator)
    for leaf in (*nu.values(), *critic.values()):
        leaf.requires_grad_()
    parts = [[value for key, value in nu.items() if key.startswith("discrete")]]
    parts += [[value for key, value in nu.items() if not key.startswith("discrete")], list(critic.values())]
    optimizer = torch.optim.Adam([{"params": part} for part in parts], lr=recipe.rate, fused=True)
    return Learner(task_policy(task, stochastic=stochastic), nu, critic, optimizer, generator)


def train(task: HybridTask, recipe: Recipe, *, seed: int = 0) -> Iterator[Progress]:
    """One `Progress` per epoch over the fixed training paths; nu is that of the learner, not a copy."""
    learner, paths = new_learner(task, recipe, seed), len(task.train.initial)
    rng = learner.generator
    total, updates, periods, start = recipe.epochs * (paths // recipe.batch), 0, 0, time.process_time()
    for _ in range(recipe.epochs):
        order = torch.randperm(paths, generator=rng)
        for chosen in order.split(recipe.batch)[: paths // recipe.batch]:
            share = updates / total
            for group in learner.optimizer.param_groups:
                group["lr"] = recipe.rate * (0.02 + 0.49 * (1 + math.cos(math.pi * share)))
            ramp = min(share / recipe.ramp, 1.0)
            entropy = recipe.entropy + (0.001 - recipe.entropy) * ramp
            last = recipe.discount if recipe.last_discount is None else recipe.last_discount
            now = replace(recipe, discount=recipe.discount + (last - recipe.discount) * ramp)
            process = task.train.process[chosen]
            if recipe.cut:
                process = process[:, : process.shape[1] - int(torch.randint(recipe.cut + 1, (), generator=rng))]
            drawn = (*process.shape[:2], learner.policy.noise_dim)
            noise = Noise(task.train.initial[chosen], process, torch.randn(drawn, generator=rng))
            step = ppo_update if recipe.method == "ppo" else hpo_update
            periods += step(task, now, learner, noise, entropy)
            updates += 1
        yield Progress(updates, periods, time.process_time() - start, learner.nu)


def attached_rollout(
    task: HybridTask, learner: Learner, noise: Noise, *, head: int = 0, tail: int = 0, cross_term: bool = True
) -> tuple[Rollout, Tensor]:
    """A rollout and log pi of all choices `[B, T, K]`, both with derivatives, the latter by the state if `cross_term`.

    In the first `head` and last `tail` steps the weights are held fixed: what earlier actions cause in the last counts,
    but no action whose consequences the end cuts off (an order is paid when it arrives and of use only later).
    """
    policy, fixed = learner.policy, {key: value.detach() for key, value in learner.nu.items()}
    split = noise.process.shape[1] - tail
    sections = ((slice(0, head), fixed), (slice(head, split), learner.nu), (slice(split, None), fixed))
    mdp, log_probs = task.mdp, []
    paths: list[Rollout] = []
    for steps, nu in sections:
        if not noise.process[:, steps].shape[1]:
            continue
        part = Noise(noise.initial, noise.process[:, steps], noise.policy[:, steps])
        paths.append(rollout(mdp, policy, task.theta, nu, part))
        last = paths[-1].states[:, -1]
        mdp = replace(mdp, initial_state=lambda theta, e, state=last: state)
        flat = paths[-1].states[:, :-1].flatten(0, 1)
        flat = flat if cross_term else flat.detach()
        log_probs.append(policy.choice_log_probs(nu, flat, flat).unflatten(0, part.process.shape[:2]))
    states = torch.cat([paths[0].states, *(path.states[:, 1:] for path in paths[1:])], 1)
    actions, rewards = (torch.cat([getattr(path, key) for path in paths], 1) for key in ("actions", "rewards"))
    return Rollout(states, actions, rewards), torch.cat(log_probs, 1)


def hpo_update(task: HybridTask, recipe: Recipe, learner: Learner, noise: Noise, entropy: float) -> int:
    """Returns the number of periods simulated."""
    head, tail = recipe.buffer if recipe.settle else 0, recipe.buffer if recipe.tail is None else recipe.tail
    path, log_probs = attached_rollout(task, learner, noise, head=head, tail=tail, cross_term=recipe.cross_term)
    batch, horizon = path.rewards.shape
    old = log_probs.detach()
    detached = Rollout(path.states.detach(), path.actions.detach(), path.rewards.detach())
    features = critic_features(task, detached.states[:, :-1])
    kept = slice(recipe.buffer, horizon - tail)
    rows, share, bonus = torch.arange(horizon)[kept], 1.0, entropy
    if recipe.method == "branches":
        early = rows[: recipe.branch_before]
        picked = torch.randperm(len(early), generator=learner.generator)[: recipe.branch_times]
        kept, rows, share = early, early[picked.sort().values], len(picked) / len(early)
        to_go, extra = branch_returns(task, learner, noise, detached, rows, steps=recipe.branch_steps)
        pi = old[:, rows].exp()
        advantage = to_go - (pi * to_go).sum(-1, keepdim=True)
        # advantages vanish as the choice gets right: a scale by their spread would blow up the pathwise part
        scale = float(recipe.first_weight / detached.rewards.std())
        spread = (pi * advantage.square()).sum(-1).mean().sqrt().clamp_min(1e-10)
        weights, target = torch.zeros_like(old), torch.zeros(batch, horizon)
        weights[:, rows] = pi * advantage / spread
        credit = weights.clone()
        bonus = entropy * float(scale * spread) * len(early) / (horizon - recipe.buffer - tail)
        share = share / float(scale * spread)
        if recipe.response is not None:
            span = (to_go.amax(-1) - to_go.amin(-1)).square().mean().sqrt()
            credit[:, rows] = torch.softmax(to_go / (recipe.response * span).clamp_min(1e-10), -1)
    else:
        advantage, target, unit = generalised_advantage(recipe, learner, features, detached.rewards)
        spread, extra = advantage[:, kept].std(), 0
        scale = float(unit / spread)
        standard = (advantage - advantage[:, kept].mean()) / spread
        weights = credit = standard.unsqueeze(-1) * one_hot(detached.actions[..., 0].long(), task.choices)
    gain = (scale * path.rewards + (weights * log_probs).sum(-1) / share)[:, recipe.buffer :].mean()
    ascend(learner, gain + bonus * choice_entropy(log_probs[:, kept]).mean())
    parts = (detached.states[:, :-1], detached.actions, credit, old, features, target)
    later_passes(recipe, learner, Batch(*(part[:, rows].flatten(0, 1) for part in parts)), entropy)
    return path.rewards.numel() + extra


def ppo_update(task: HybridTask, recipe: Recipe, learner: Learner, noise: Noise, entropy: float) -> int:
    """Returns the number of periods simulated."""
    with torch.no_grad():
        path = rollout(task.mdp, learner.policy, task.theta, learner.nu, noise)
        features = critic_features(task, path.states[:, :-1])
        kept = slice(recipe.buffer, path.rewards.shape[1] - recipe.buffer)
        advantage, target, _ = generalised_advantage(recipe, learner, features, path.rewards)
        standard = (advantage - advantage[:, kept].mean()) / advantage[:, kept].std()
        states, actions = path.states[:, :-1], path.actions
        log_prob = learner.policy.log_prob(learner.nu, states.flatten(0, 1), actions.flatten(0, 1))
    old = log_prob.unflatten(0, path.rewards.shape).unsqueeze(-1)
    parts = (states, actions, standard.unsqueeze(-1), old, features, target)
    later_passes(recipe, learner, Batch(*(part[:, kept].flatten(0, 1) for part in parts)), entropy)
    return path.rewards.numel()


def later_passes(recipe: Recipe, learner: Learner, data: Batch, entropy: float) -> None:
    """Clipped ratios of the choice (PPO: of the action) over minibatches, until the policy has moved too far."""
    policy, nu = learner.policy, learner.nu
    for _ in range(recipe.passes):
        for part in torch.randperm(len(data.states), generator=learner.generator).chunk(recipe.minibatches):
            state, action = data.states[part], data.actions[part]
            choices = policy.choice_log_probs(nu, state, action)
            log_prob = policy.log_prob(nu, state, action).unsqueeze(-1) if recipe.method == "ppo" else choices
            change, credit = log_prob - data.log_prob[part], data.credit[part]
            if recipe.response is not None:
                ascend(learner, (credit * choices).sum(-1).mean())
                continue
            ratio = change.exp()
            clipped = ratio.clamp(1 - recipe.clip, 1 + recipe.clip)
            gain = torch.minimum(ratio * credit, clipped * credit).sum(-1).mean()
            gain = gain + entropy * choice_entropy(choices).mean()
            if recipe.method != "branches":
                value = tanh_network(learner.critic, "critic", data.features[part]).squeeze(-1)
                gain = gain - 0.15 * 0.5 * (value - data.target[part]).square().mean()
            ascend(learner, gain)
            moved = change.detach()
            weight = data.log_prob[part].exp() if recipe.method != "ppo" else torch.ones_like(moved)
            if float((weight * (moved.exp() - 1 - moved)).sum(-1).mean()) > recipe.target_kl:
                return


def ascend(learner: Learner, gain: Tensor) -> None:
    """One step of Adam, the norm of each part's gradient clipped at 5."""
    learner.optimizer.zero_grad(set_to_none=True)
    (-gain).backward()
    for group in learner.optimizer.param_groups:
        torch.nn.utils.clip_grad_norm_([leaf for leaf in group["params"] if leaf.grad is not None], 5.0)
    learner.optimizer.step()


def critic_features(task: HybridTask, states: Tensor) -> Tensor:
    """Scaled state, its squares and the share of the horizon that has passed, `[B, T, 2 n + 1]`."""
    x = states / task.scale
    passed = torch.arange(x.shape[1]).to(x) / x.shape[1]
    return torch.cat([x, x.square(), passed.reshape(1, -1, 1).expand(*x.shape[:2], 1)], -1)


@torch.no_grad()
def generalised_advantage(
    recipe: Recipe, learner: Learner, features: Tensor, rewards: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages and targets of the critic `[B, T]`, in units of the rewards' spread, and one over that spread."""
    unit = 1 / rewards.std()
    value = tanh_network(learner.critic, "critic", features).squeeze(-1)
    following = torch.cat([value[:, 1:], value[:, -1:] if recipe.buffer else torch.zeros_like(value[:, -1:])], 1)
    if recipe.buffer:  # no end: costs relative to their average, whose values stay near 0
        rewards = rewards - rewards.mean()
    delta = unit * rewards + recipe.discount * following - value
    total, found = torch.zeros_like(delta[:, 0]), []
    for column in reversed(delta.unbind(1)):
        total = column + recipe.discount * recipe.trace * total
        found.append(total)
    advantage = torch.stack(found[::-1], 1)
    return advantage, advantage + value, unit


@torch.no_grad()
def branch_returns(
    task: HybridTask, learner: Learner, noise: Noise, path: Rollout, times: Tensor, *, steps: int | None = None
) -> tuple[Tensor, int]:
    """Rewards of the next `steps` `[B, M, K]` after each choice at the M `times`, and the periods simulated for it."""
    policy, nu, theta, choices = learner.policy, learner.nu, task.theta, task.choices
    (batch, horizon), index = path.rewards.shape, path.actions[..., 0].long()
    steps, block = steps or horizon, batch * (choices - 1)
    own = torch.stack([path.rewards[:, t : t + steps].sum(1) for t in times.tolist()], 1)
    shift = torch.arange(1, choices).reshape(-1, 1)
    start = times.tolist()
    state, gained, simulated = path.states[:0, 0], own[:0, 0], 0
    ended: list[Tensor] = []
    for t in range(horizon):
        if t - steps in start:
            ended.append(gained[:block])
            state, gained = state[block:], gained[block:]
        acting, e = noise.policy[:, t], noise.process[:, t]
        copies = len(state) // batch
        action = policy.act(nu, state, acting.repeat(copies, 1)) if copies else path.actions[:0, 0]
        if t in start:
            forced = ((index[:, t] + shift) % choices).reshape(-1)
            fresh = path.states[:, t].repeat(choices - 1, 1)
            branched = policy.branch(nu, fresh, forced, acting.repeat(choices - 1, 1))
            state, action = torch.cat([state, fresh]), torch.cat([action, branched])
            gained = torch.cat([gained, torch.zeros_like(fresh[:, 0])])
        if len(state):
            inputs = e.repeat(len(state) // batch, 1)
            following = task.mdp.step(theta, state, action, inputs)
            gained = gained + task.mdp.reward(theta, state, action, inputs, following)
            state, simulated = following, simulated + len(state)
    others = torch.cat([*ended, gained]).reshape(len(times), choices - 1, batch).permute(2, 0, 1)
    taken = index[:, times].unsqueeze(-1)
    place = torch.cat([taken, (taken + shift.reshape(-1)) % choices], -1)
    values = torch.cat([own.unsqueeze(-1), others], -1)
    return torch.empty_like(values).scatter(-1, place, values), simulated
