"""Markov games from samples: the three-state game and the linear-quadratic one.

`b-game` (R = 1 and 2): share of the exact discounted optimum over 150 steps that the leader reaches within 200
iterations of 3 episodes, started at p = f(1 | A) = 0.9 and 0.1; `R1`, `R2`: worst of all starts and seeds. The leader
sees transitions, rewards of both at the pairs, the follower's policy and its soft values. Its first 10 iterations play
random policies (logits of standard deviation 2): at p = 0.9 the follower never goes where p matters, and nothing could
be learned of it. Kernel by counts that are kept, hypergradient by linear solves, Adam 0.1 on the logits.

`b-lqr-game`: undiscounted return over 100 steps after ascent on the discounted one, gains started from N(0, 1), Adam.

    exact              exact gradient, 500 iterations: seeds of 20 that reach 18.3;      exact-median
    learned-median, learned-best   from 2 sampled episodes per iteration, 500 in all: the leader knows its own reward
                       function, the follower's policy and soft value; linear dynamics fitted by least squares,
                       Q_L under that model in closed form, G by the critic with pathwise sources
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bars import Figure, main
from benchmarks.oracles import discrete_game as game_oracle
from benchmarks.oracles import lqr_game as lqr_oracle
from sim2real.estimators import (
    CriticOptions,
    empirical_transition,
    seen_leader_tables,
    stackelberg_gradient,
    stackelberg_tables_gradient,
    transition_counts,
)
from sim2real.estimators.leader_critic import quadratic_state_features
from sim2real.estimators.transitions import Transitions
from sim2real.leader_task import GameTables
from sim2real.params import Params
from sim2real.policy import Policy
from sim2real.simulators import discrete_game_tables, lqr_game, lqr_game_data, lqr_game_leader
from sim2real.solvers import ObservedSoftLQR, observed_soft_lqr, soft_value_iteration

DISCOUNT, TEMPERATURE, HORIZON = 0.99, 0.05, 150


def leader_policy(theta: Params) -> Tensor:
    return torch.softmax(theta["logits"], -1)


def game_follower(tables: GameTables, f: Tensor) -> tuple[Tensor, Tensor]:
    """Policy `[3, 2, 3]` and soft value `[3, 2]` of the follower, which knows the game."""
    seen = seen_leader_tables(tables, f)
    assert seen.transition is not None
    best = soft_value_iteration(seen.follower_reward, seen.transition, discount=DISCOUNT, temperature=TEMPERATURE)
    return best.policy.reshape(3, 2, 3), best.value.reshape(3, 2)


def play(tables: GameTables, f: Tensor, g: Tensor, episodes: int, generator: torch.Generator) -> Tensor:
    """Counts `[3, 6, 4]` of transitions over states and pairs of actions (leader's times 3 plus follower's)."""
    state = torch.zeros(episodes, dtype=torch.long)
    rows = []
    for _ in range(HORIZON):
        b = torch.multinomial(f[state], 1, generator=generator)[:, 0]
        a = torch.multinomial(g[state, b], 1, generator=generator)[:, 0]
        after = tables.transition[state, b, a].argmax(-1)
        rows.append(torch.stack([state, 3 * b + a, after]))
        state = after
    s, pair, after = torch.cat(rows, -1)
    return transition_counts(s, pair, after, torch.zeros_like(s, dtype=torch.bool), shape=(3, 6))


def learn_game(bonus: float, p: float, seed: int, *, iterations: int = 200, explore: int = 10) -> float:
    """Exact 150-step return of the leader after `iterations`."""
    tables, generator = discrete_game_tables(bonus=bonus), torch.Generator().manual_seed(seed)
    logits = torch.zeros(3, 2, dtype=torch.float64)
    logits[1] = torch.tensor([1 - p, p], dtype=torch.float64).log()
    logits.requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1, maximize=True)
    counts = torch.zeros(3, 6, 4, dtype=torch.float64)
    for k in range(iterations):
        random = 2 * torch.randn(3, 2, generator=generator, dtype=torch.float64)
        theta = {"logits": random if k < explore else logits.detach()}
        f = leader_policy(theta)
        g, value = game_follower(tables, f)
        counts += play(tables, f, g, 3, generator)
        if k < explore:
            continue
        logits.grad = stackelberg_tables_gradient(
            lambda _: tables,
            leader_policy,
            theta,
            g,
            value,
            temperature=TEMPERATURE,
            leader_discount=DISCOUNT,
            follower_discount=DISCOUNT,
            transition=empirical_transition(counts).reshape(3, 2, 3, 3),
        ).grad["logits"]
        optimizer.step()
    return game_oracle.exact(float(leader_policy({"logits": logits.detach()})[1, 1]), bonus)[0]


def b_game(quick: bool) -> Iterator[Figure]:
    """Share of the optimum, worst and median."""
    seeds = 2 if quick else 10
    for name, bonus in (("R1", 1.0), ("R2", 2.0)):
        optimum, _ = game_oracle.best(bonus)
        shares = [learn_game(bonus, p, seed) / optimum for p in (0.9, 0.1) for seed in range(seeds)]
        yield Figure(name, min(shares), "share of the optimum", len(shares), optimum)
        yield Figure(f"{name}-median", statistics.median(shares), "share of the optimum", len(shares))
        within = sum(share >= 0.99 for share in shares)
        yield Figure(f"{name}-within-1-percent", within, "runs", len(shares))


# ---- the linear-quadratic game


def lqr_start(seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng([11, seed]).standard_normal(2))


def undiscounted(gain: Tensor) -> float:
    return lqr_oracle.leader_return(gain.numpy(), discount=1.0).real


def ascend(gain: Tensor, gradient: Callable[[Tensor, int], Tensor], steps: int, rate: float = 0.1) -> Tensor:
    """Adam; the last third of the steps at a falling rate."""
    gain = gain.clone().requires_grad_()
    optimizer = torch.optim.Adam([gain], lr=rate, maximize=True)
    for k in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, 3 * (1 - k / steps))
        gain.grad = gradient(gain.detach(), k)
        optimizer.step()
    return gain.detach()


@cache
def _data() -> tuple[Tensor, Tensor]:
    game = lqr_game_data()
    return game.A, torch.cat([game.leader_input, game.follower_input], -1)


def lqr_follower(gain: Tensor) -> ObservedSoftLQR:
    """The follower's response to the leader's gain `[2]`; it knows the game."""
    game = lqr_game_data()
    return observed_soft_lqr(
        game.A,
        game.follower_input,
        game.Q,
        game.R,
        game.leader_input,
        gain.unsqueeze(0),
        game.leader_std**2 * torch.eye(1, dtype=torch.float64),
        discount=game.follower_discount,
        temperature=game.temperature,
    )


def follower_policy(gain: Tensor) -> Policy:
    """u of z = (s, b): `-K_x s - K_a B_L (b - K s) + L e`; nu = {state_gain, disturbance_gain, factor}."""

    def mean(nu: Params, z: Tensor) -> Tensor:
        s, b = z[:, :2], z[:, 2:]
        epsilon = b - s @ gain.unsqueeze(-1)
        return -s @ nu["state_gain"].T - epsilon @ nu["disturbance_gain"].T

    def log_prob(nu: Params, z: Tensor, u: Tensor) -> Tensor:
        normal = torch.distributions.Normal(mean(nu, z), nu["factor"][0, 0])
        return normal.log_prob(u).sum(-1)

    return Policy(lambda nu, z, e: mean(nu, z) + e @ nu["factor"].T, log_prob, noise_dim=1)


def lqr_episodes(gain: Tensor, best: ObservedSoftLQR, episodes: int, generator: torch.Generator) -> Transitions:
    """Real transitions with the leader's rewards."""
    task, leader = lqr_game(), lqr_game_leader()
    nu = {"state_gain": best.state_gain, "disturbance_gain": best.disturbance_gain, "factor": best.factor}
    policy, theta = follower_policy(gain), {"gain": gain.unsqueeze(0)}
    state = task.follower.initial_state(theta, torch.zeros(episodes, 0, dtype=torch.float64))
    draw = lambda: torch.randn(episodes, 1, generator=generator, dtype=torch.float64)
    states, actions, following = [], [], []
    for _ in range(lqr_oracle.HORIZON):
        b = leader.act(theta, state, draw())
        u = policy.act(nu, torch.cat([state, b], -1), draw())
        action = torch.cat([b, u], -1)
        after = task.follower.step(theta, state, action, draw()[:, :0])
        states.append(state)
        actions.append(action)
        following.append(after)
        state = after
    s, a, after = (torch.stack(x, 1).flatten(0, 1) for x in (states, actions, following))
    steps = torch.arange(lqr_oracle.HORIZON).repeat(episodes)
    episode = torch.arange(episodes).repeat_interleave(lqr_oracle.HORIZON)
    rewards = task.reward(theta, s, a, after)
    first = states[0]
    return Transitions(s, a, rewards, after, torch.zeros_like(episode, dtype=torch.bool), steps, episode, first)


def model_values(
    dynamics: Tensor, gain: Tensor, best: ObservedSoftLQR, steps: int = lqr_oracle.HORIZON
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """V_L of z = (s, b) and Q_L of z, u under a linear model of s' `[4, 2]`: Gaussian states, in closed form."""
    game, row = lqr_game_data(), gain.unsqueeze(0)
    A, BL, BF = dynamics[:2].T, dynamics[2:3].T, dynamics[3:].T
    K, D, cover = best.state_gain, best.disturbance_gain, best.factor @ best.factor.T
    closed = A + BL @ row - BF @ K
    push = BL - BF @ D
    noise = game.leader_std**2 * push @ push.T + BF @ cover @ BF.T
    width = torch.diag(1 / game.precision)

    def ahead(mean: Tensor, spread: Tensor) -> Tensor:
        """Discounted rewards from the next step on, given the law of the next state; all later steps at once."""
        power, powers, spreads = torch.eye(2, dtype=torch.float64), [], []
        for _ in range(1, steps):
            powers.append(power)
            spreads.append(spread)
            power, spread = closed @ power, closed @ spread @ closed.T + noise
        both = width + torch.stack(spreads)
        weight = game.leader_discount ** torch.arange(1, steps, dtype=torch.float64)
        weight = weight * (torch.linalg.det(width) / torch.linalg.det(both)).sqrt()
        gap = mean @ torch.stack(powers).mT - game.target  # [steps, N, 2]
        return weight @ torch.exp(-0.5 * ((gap @ torch.linalg.inv(both)) * gap).sum(-1))

    def now(s: Tensor) -> Tensor:
        return torch.exp(-0.5 * (game.precision * (s - game.target).square()).sum(-1))

    def q(z: Tensor, u: Tensor) -> Tensor:
        zero = torch.zeros(2, 2, dtype=torch.float64)
        return now(z[:, :2]) + ahead(torch.cat([z, u], -1) @ dynamics, zero)

    def value(z: Tensor) -> Tensor:
        s, b = z[:, :2], z[:, 2:]
        u = -s @ K.T - (b - s @ row.T) @ D.T
        return now(s) + ahead(torch.cat([z, u], -1) @ dynamics, BF @ cover @ BF.T)

    return value, q


def learned_gradient(gain: Tensor, episodes: int, generator: torch.Generator) -> Tensor:
    """The leader's gradient from `episodes` sampled ones."""
    best = lqr_follower(gain)
    data = lqr_episodes(gain, best, episodes, generator)
    inputs = torch.cat([data.states, data.actions], -1)
    dynamics = torch.linalg.lstsq(inputs, data.next_states, driver="gelsd").solution
    value, q = model_values(dynamics, gain, best)
    whitened = lambda z: torch.cat([z[:, :2], (z[:, 2:] - z[:, :2] @ gain.unsqueeze(-1)) / 1e-3], -1)

    def soft_value(z: Tensor) -> Tensor:
        x = torch.cat([z[:, :2], z[:, 2:] - z[:, :2] @ gain.unsqueeze(-1)], -1)
        return -((x @ best.value_matrix) * x).sum(-1) - best.offset

    nu = {"state_gain": best.state_gain, "disturbance_gain": best.disturbance_gain, "factor": best.factor}
    estimate = stackelberg_gradient(
        lqr_game(),
        lqr_game_leader(),
        follower_policy(gain),
        {"gain": gain.unsqueeze(0)},
        nu,
        data,
        temperature=0.1,
        soft_value=soft_value,
        source="pathwise",
        critics=CriticOptions(
            features=lambda z, u: quadratic_state_features(torch.cat([whitened(z), u], -1)),
            value_features=lambda z: quadratic_state_features(whitened(z)),
            leader_value=value,
            leader_q=q,
        ),
    )
    return estimate.grad["gain"][0]


def learn_lqr(seed: int, steps: int, episodes: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    gradient = lambda gain, k: learned_gradient(gain, episodes, generator)
    return undiscounted(ascend(lqr_start(seed), gradient, steps))


def b_lqr_game(quick: bool) -> Iterator[Figure]:
    """Returns after ascent by the exact and by the learned gradient."""
    seeds = 3 if quick else 20
    exact = lambda gain, k: torch.from_numpy(lqr_oracle.exact(gain.numpy())[1])
    ends = [undiscounted(ascend(lqr_start(seed), exact, 500)) for seed in range(seeds)]
    yield Figure("exact", sum(end >= 18.3 for end in ends), "seeds at 18.3", seeds, 18.36)
    yield Figure("exact-median", statistics.median(ends), "return", seeds, 18.36)
    steps, episodes = 250, 2
    learned = [learn_lqr(seed, steps, episodes) for seed in range(seeds)]
    yield Figure("learned-median", statistics.median(learned), "return", seeds, 0.15)
    yield Figure("learned-best", max(learned), "return", seeds, 0.15)
    yield Figure("learned-above-9", sum(end >= 9 for end in learned), "seeds", seeds)
    yield Figure("learned-episodes", episodes * steps, "episodes", seeds)


if __name__ == "__main__":
    main({"b-game": b_game, "b-lqr-game": b_lqr_game})
