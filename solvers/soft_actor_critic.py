"""A learned soft follower: soft actor-critic at a fixed temperature, with torchrl's loss, in any `ModelMDP`.

    critics   min_Q  E (Q(s, a) - r - g V(s'))^2,       V(s) = E_{a ~ pi} [ min_i Q_i(s, a) - lambda log pi(a | s) ],
    actor     max_pi E V(s),

on transitions of all policies so far. The policy is a Gaussian network (`gaussian_policy`, so that an engine can roll
it in one piece) with no squashing: bounds of the action belong into the model. Two critics, whose targets follow
slowly. The soft optimum satisfies `pi = exp((Q - V) / lambda)`; how far the networks are from that is reported.
Needs `pip install "sim2real[rl]"`.
Reference: T. Haarnoja, A. Zhou, P. Abbeel and S. Levine, Soft Actor-Critic, ICML 2018, and its extension of 2019.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.func import functional_call
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.modules.distributions import IndependentNormal, NormalParamExtractor
from torchrl.objectives import SACLoss, SoftUpdate

from sim2real.mdp import ModelMDP, sample_noise
from sim2real.params import Params
from sim2real.policy import Policy, gaussian_policy
from sim2real.rollout import Rollout, rollout
from sim2real.solve_report import SolveReport, UnconvergedError


@dataclass(frozen=True)
class SACSettings:
    """How long and with what the follower is trained by soft actor-critic."""

    rounds: int = 40
    """of `episodes` with the present policy, then `updates`"""
    episodes: int = 32
    horizon: int = 50
    updates: int = 100
    batch: int = 256
    """transitions per update"""
    hidden: int = 64
    learning_rate: float = 2e-3
    """falls to a twentieth, along a cosine"""
    polyak: float = 0.01
    """share of the critics that goes into their targets, per update"""


@dataclass(frozen=True)
class LearnedFollower:
    """What a leader needs of a follower, and what its training goes on from."""

    policy: Policy
    nu: Params
    action_value: Callable[[Tensor, Tensor], Tensor]
    """s `[N, n]`, a `[N, m]` -> Q_F `[N]`, the smaller of the critics"""
    soft_value: Callable[[Tensor], Tensor]
    """s `[N, n]` -> V_F `[N]`, differentiable in s"""
    report: SolveReport
    """residual: mean over states of Var_a[Q - lambda log pi] / (2 lambda^2), nats between policy and critics"""
    weights: dict[str, Tensor]
    """all that was trained"""


def soft_actor_critic(
    mdp: ModelMDP,
    theta: Params,
    *,
    temperature: float,
    generator: torch.Generator,
    settings: SACSettings | None = None,
    start: LearnedFollower | None = None,
    tol: float = 0.02,
) -> LearnedFollower:
    """Train in `mdp` at `theta`, from new networks or those of `start`; `temperature` lambda in reward units.

    Networks are on the device of theta, where `generator` lives, from which all randomness comes. They train in single
    precision; what is returned computes in that of theta. The report has `converged` where its residual is at most
    `tol` nats. Raises `ValueError` for a temperature that is not positive, or a model that does not name its states
    and actions, `UnconvergedError` where the follower drives it out of all bounds.
    """
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite (reward units), got {temperature}")
    if not {"state", "action"} <= mdp.names.keys():
        raise ValueError("the model must name its states and actions: the networks need their numbers")
    chosen = settings if settings is not None else SACSettings()
    like = next(iter(theta.values()))
    single = {key: value.detach().float() for key, value in theta.items()}
    with torch.random.fork_rng(devices=[like.device] if like.is_cuda else []):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator, device=generator.device)))
        actor, critic, loss = _networks(mdp, chosen.hidden, temperature)
        loss.to(like.device)
        target = SoftUpdate(loss, tau=chosen.polyak)
        if start is not None:
            loss.load_state_dict(start.weights)
        seen = _train(mdp, single, actor, loss, target, chosen, generator)
    weights = {key: value.detach().clone() for key, value in loss.state_dict().items()}
    loss, seen = loss.to(like.dtype), seen.to(like.dtype)
    return _finish(actor, critic, loss, seen, weights, temperature=temperature, tol=tol, generator=generator)


class _Critic(nn.Module):
    """Q of a state and an action, as torchrl calls it."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.net = _layers(inputs, hidden, 1)

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        return self.net(torch.cat([state, action], -1))


def _layers(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, outputs)
    )


def _networks(mdp: ModelMDP, hidden: int, temperature: float) -> tuple[nn.Sequential, _Critic, SACLoss]:
    """The actor's and one critic's network, and the loss that holds the parameters of the actor and of two critics."""
    states, actions = len(mdp.names["state"]), len(mdp.names["action"])
    actor, critic = _layers(states, hidden, 2 * actions), _Critic(states + actions, hidden)
    for part in actor[-1].parameters():
        nn.init.zeros_(part)  # begins with standard normal actions in every state
    gaussian = nn.Sequential(actor, NormalParamExtractor(scale_mapping="exp"))
    acting = ProbabilisticActor(
        TensorDictModule(gaussian, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=IndependentNormal,
        return_log_prob=True,
    )
    loss = SACLoss(
        acting,
        ValueOperator(critic, in_keys=["observation", "action"]),
        alpha_init=temperature,
        fixed_alpha=True,
        target_entropy=0.0,  # not used at a fixed temperature
    )
    loss.make_value_estimator(gamma=mdp.discount)
    return actor, critic, loss


def _train(
    mdp: ModelMDP,
    theta: Params,
    actor: nn.Sequential,
    loss: SACLoss,
    target: SoftUpdate,
    chosen: SACSettings,
    generator: torch.Generator,
) -> TensorDict:
    """The transitions of all rounds."""
    policy, parameters = gaussian_policy(actor), [p for p in loss.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=chosen.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, max(1, chosen.rounds * chosen.updates), eta_min=chosen.learning_rate / 20
    )
    rounds: list[TensorDict] = []
    for _ in range(chosen.rounds):
        noise = sample_noise(mdp, policy, chosen.episodes, chosen.horizon, generator, dtype=torch.float32)
        with torch.no_grad():
            rounds.append(_transitions(mdp, theta, rollout(mdp, policy, theta, _values(actor), noise)))
        if not bool(torch.isfinite(rounds[-1]["next", "observation"]).all()):
            raise UnconvergedError("the follower's states are not finite: shorten the horizon, or bound its actions")
        seen = torch.cat(rounds)
        for _ in range(chosen.updates):
            rows = torch.randint(len(seen), (chosen.batch,), generator=generator, device=seen.device)
            terms = loss(seen[rows])
            optimizer.zero_grad()
            (terms["loss_actor"] + terms["loss_qvalue"]).backward()
            optimizer.step()
            schedule.step()
            target.step()
    return seen


def _values(module: nn.Module) -> Params:
    return {key: value.detach().clone() for key, value in module.named_parameters()}


def _transitions(mdp: ModelMDP, theta: Params, run: Rollout) -> TensorDict:
    """The steps of a rollout that are not masked, under torchrl's names; only a terminal state ends an episode."""
    kept = torch.ones_like(run.rewards, dtype=torch.bool) if run.mask is None else run.mask
    following, flat = run.states[:, 1:][kept], int(kept.sum())
    ended = following.new_zeros(flat, dtype=torch.bool) if mdp.terminal is None else mdp.terminal(theta, following)
    after = {"observation": following, "reward": run.rewards[kept].unsqueeze(-1)}
    after |= {key: ended.unsqueeze(-1) for key in ("done", "terminated")}
    now = {"observation": run.states[:, :-1][kept], "action": run.actions[kept], "next": after}
    return TensorDict(now, [flat], device=following.device)


def _finish(
    actor: nn.Sequential,
    critic: _Critic,
    loss: SACLoss,
    seen: TensorDict,
    weights: dict[str, Tensor],
    *,
    temperature: float,
    tol: float,
    generator: torch.Generator,
) -> LearnedFollower:
    """Policy and values as functions, and how well they agree on a part of the transitions."""
    policy, nu = gaussian_policy(actor), _values(actor)
    stacked = loss.qvalue_network_params.flatten_keys(".").detach().clone()
    critics = [{key.removeprefix("module."): value[i] for key, value in stacked.items()} for i in range(2)]

    def action_value(states: Tensor, actions: Tensor) -> Tensor:
        both = [functional_call(critic, weights, (states, actions)).squeeze(-1) for weights in critics]
        return torch.minimum(*both)

    def entropic(states: Tensor, noise: Tensor) -> Tensor:
        """Q - lambda log pi `[N]` at the policy's actions."""
        actions = policy.act(nu, states, noise.expand(len(states), -1))
        return action_value(states, actions) - temperature * policy.log_prob(nu, states, actions)

    def soft_value(states: Tensor) -> Tensor:
        """The mean over the policy's action, by points that are exact for cubics."""
        width = policy.noise_dim
        points = width**0.5 * torch.eye(width, dtype=states.dtype, device=states.device)
        return torch.stack([entropic(states, point) for point in (*points, *-points)]).mean(0)

    some = seen["observation"][-2000:]
    draws = torch.randn(16, 1, policy.noise_dim, generator=generator, dtype=some.dtype, device=some.device)
    residual = float(torch.stack([entropic(some, draw) for draw in draws]).var(0).mean()) / (2 * temperature**2)
    if not math.isfinite(residual):
        raise UnconvergedError("the follower's networks are not finite: lower the learning rate")
    status = f"{len(seen)} transitions seen; {residual:.2g} nats between the policy and its critics"
    report = SolveReport(residual <= tol, residual, len(seen), status)
    return LearnedFollower(policy, nu, action_value, soft_value, report, weights)
