"""Lower levels designed by inverse optimisation: `o-design` (see `design_tasks.py` for the tasks).

Upper levels are the same for the plain and the learned lower level. `expert`: the goal is read off the expert's plan
from the present state, as in the pairs that were fitted; this judges the lower level alone. `regression`: goals
predicted by ridge regression from what can be seen, on other episodes of the expert, then moved to the nearest that an
action can meet.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import process_time

import torch
from bars import Figure, main
from design_tasks import Episodes, Task, inventory, inventory_episodes, plan_all, vehicle_episodes, vehicles
from torch import Tensor

from sim2real.solve_report import UnconvergedWarning
from sim2real.solvers.inverse_optimization import Experts, action_error_bound, fit_lower_level
from sim2real.solvers.qp import qp
from sim2real.solvers.relu_program import ReluCost, relu_program, suboptimality

Upper = Callable[[Tensor, int], Tensor]


def program(task: Task, episodes: Episodes, state: Tensor, now: int, goal: Tensor) -> tuple[Tensor, ...]:
    """c, B, b, H, h of the lower level at `now`: the cost of the step, the task's constraints and the goal."""
    c = episodes.c[:, now] + task.k @ task.E
    free = state @ task.F.mT + episodes.d[:, now]
    B = torch.cat([task.A, task.C @ task.E])
    b = torch.cat([state @ task.J.mT + episodes.e[:, now], goal - free @ task.C.mT], -1)
    return c, B, b, task.G, state @ task.L.mT + episodes.g[:, now]


def step(task: Task, episodes: Episodes, state: Tensor, now: int, action: Tensor) -> tuple[Tensor, Tensor]:
    """Next state and what the step earns."""
    after = state @ task.F.mT + action @ task.E.mT + episodes.d[:, now]
    return after, -(episodes.c[:, now] * action).sum(-1) - after @ task.k


def expert_run(task: Task, episodes: Episodes) -> tuple[Tensor, Tensor, Tensor]:
    """States `[N, T + 1, n]`, actions `[N, T, m]` and returns `[N]` of the expert with perfect information."""
    actions = torch.stack([plan_all(task, s, episodes, i, 0) for i, s in enumerate(episodes.start)])
    states, rewards = [episodes.start], []
    for t in range(actions.shape[1]):
        after, reward = step(task, episodes, states[-1], t, actions[:, t])
        states.append(after)
        rewards.append(reward)
    return torch.stack(states, 1), actions, torch.stack(rewards).sum(0)


def expert_goals(task: Task, episodes: Episodes) -> Upper:
    """Goals of the expert's plan from the present state."""

    def upper(state: Tensor, now: int) -> Tensor:
        actions = torch.stack([plan_all(task, s, episodes, i, now)[0] for i, s in enumerate(state)])
        return step(task, episodes, state, now, actions)[0] @ task.C.mT

    return upper


def regressed_goals(task: Task, train: Episodes, episodes: Episodes, weight: float = 0.1) -> Upper:
    """Goals predicted from the state and what is seen, by ridge regression on the expert's about each step's mean."""
    states, _, _ = expert_run(task, train)
    goals = states[:, 1:] @ task.C.mT
    seen = torch.cat([states[:, :-1], train.seen], -1)
    mean, spread = seen.mean((0, 1)), seen.std((0, 1)) + 1e-3
    usual, level = goals.mean(0), ((seen - mean) / spread).mean(0)
    x = ((seen - mean) / spread - level).flatten(0, 1)
    y = (goals - usual).flatten(0, 1)
    gain = torch.linalg.inv(x.mT @ x + weight * len(x) * torch.eye(x.shape[-1])) @ x.mT @ y

    def upper(state: Tensor, now: int) -> Tensor:
        x = (torch.cat([state, episodes.seen[:, now]], -1) - mean) / spread
        return _reachable(task, episodes, state, now, usual[now] + (x - level[now]) @ gain)

    return upper


def _reachable(task: Task, episodes: Episodes, state: Tensor, now: int, goal: Tensor) -> Tensor:
    """The nearest goal that an action can meet."""
    _, B, b, H, h = program(task, episodes, state, now, goal)
    pinned = len(task.A)
    W, target = B[pinned:], b[:, pinned:]
    P = 2 * (W.mT @ W + 1e-6 * torch.eye(W.shape[-1]))
    u = qp(P, -2 * target @ W, B[:pinned], b[:, :pinned], H, h).x
    return goal + u @ W.mT - target


def drive(task: Task, episodes: Episodes, cost: ReluCost, upper: Upper) -> Tensor:
    """Returns `[N]` of goals from `upper` carried out by the lower level `cost`."""
    state, total = episodes.start, torch.zeros(len(episodes.start))
    for t in range(episodes.c.shape[1]):
        action = relu_program(cost, *program(task, episodes, state, t, upper(state, t))).u
        state, reward = step(task, episodes, state, t, action)
        total = total + reward
    return total


def expert_pairs(task: Task, episodes: Episodes, count: int | None = None, seed: int = 0) -> Experts:
    """Experts of all moments of the episodes, or `count` of them drawn."""
    states, actions, _ = expert_run(task, episodes)
    goals = states[:, 1:] @ task.C.mT
    rows = [program(task, episodes, states[:, t], t, goals[:, t]) for t in range(actions.shape[1])]
    c, b, h = (torch.stack([row[i] for row in rows], 1).flatten(0, 1) for i in (0, 2, 4))
    u = actions.flatten(0, 1)
    some = torch.randperm(len(u), generator=torch.Generator().manual_seed(seed))[:count]
    return Experts(u[some], c[some], rows[0][1], b[some], task.G, h[some])


@dataclass(frozen=True)
class Setting:
    """A committed setting; experts, other states and the goals' training have seeds of their own."""

    task: Task
    episodes: Callable[[int, int], Episodes]
    ridge: float
    terms: int
    weight: float


def settings() -> dict[str, Setting]:
    """What the figures were measured on."""
    return {
        "vehicles": Setting(vehicles(), vehicle_episodes, ridge=0.1, terms=4, weight=1e-2),
        "inventory": Setting(inventory(), inventory_episodes, ridge=0.1, terms=3, weight=1e-3),
    }


def o_design(quick: bool) -> Iterator[Figure]:
    """20 experts of two episodes; judged on other episodes. `seconds` are CPU seconds of one thread."""
    torch.set_default_dtype(torch.float64)
    count = 4 if quick else 20
    seconds, ratios, broken, pairs = [], [], 0, 0
    for name, setting in settings().items():
        task = setting.task
        train = expert_pairs(task, setting.episodes(2, 0), 20)
        begin = process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnconvergedWarning)  # `converged` is a figure of its own
            fit = fit_lower_level(train, ridge=setting.ridge, terms=setting.terms, weight=setting.weight)
        seconds.append(process_time() - begin)
        plain = ReluCost(fit.cost.theta[:0], fit.cost.nu[:0], setting.ridge)
        other = setting.episodes(count, 1000)
        test = expert_pairs(task, other)
        errors, bounds = zip(*(judge(cost, test) for cost in (plain, fit.cost)), strict=True)
        ratios.append(float(errors[1].mean() / errors[0].mean()))
        broken += int((fit.error > fit.error_bound).sum()) + int((errors[1] > bounds[1]).sum())
        pairs += len(train.actions) + len(test.actions)
        yield Figure(f"converged-{name}", float(fit.converged), "of 1", 1)
        yield Figure(f"fit-gap-{name}", float(fit.gap.sum()), "sum of gaps", 20, float(fit.plain_gap.sum()))
        yield Figure(f"error-ratio-{name}", ratios[-1], "learned / plain", len(test.actions))
        yield from _closed(name, setting, other, (plain, fit.cost), 30 if quick else 40)
    yield Figure("seconds", max(seconds), "s CPU", 2, 5.0)
    yield Figure("error-ratio", max(ratios), "learned / plain, worse task", 2, 0.5)
    yield Figure("bound", float(broken), "violations", pairs, 0.0)


def judge(cost: ReluCost, test: Experts) -> tuple[Tensor, Tensor]:
    """|u* - u| and its bound `[T]` at given goals of the expert."""
    found = relu_program(cost, test.c, test.B, test.b, test.H, test.h)
    gap = suboptimality(cost, found, test.H, test.h, test.actions)
    return (found.u - test.actions).norm(dim=-1), action_error_bound(cost, gap)


def _closed(
    name: str, setting: Setting, other: Episodes, costs: tuple[ReluCost, ReluCost], train: int
) -> Iterator[Figure]:
    """Part of the gap from the plain lower level to the expert that the learned one closes, in per cent."""
    task, best = setting.task, expert_run(setting.task, other)[2].mean()
    uppers = {
        "": expert_goals(task, other),
        "-regression": regressed_goals(task, setting.episodes(train, 500), other),
    }
    for kind, upper in uppers.items():
        plain, learned = (drive(task, other, cost, upper).mean() for cost in costs)
        count = len(other.start)
        for label, value in (("mpc", best), ("plain", plain), ("learned", learned)):
            yield Figure(f"return-{name}{kind}-{label}", float(value), "money per episode", count)
        reference = None if kind else {"vehicles": 65.0, "inventory": 50.0}[name]
        yield Figure(f"gap-{name}{kind}", float(100 * (learned - plain) / (best - plain)), "%", count, reference)


if __name__ == "__main__":
    main({"o-design": o_design})
