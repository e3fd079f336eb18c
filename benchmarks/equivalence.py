"""MDP equivalence: `Q_hat* = Q*` of a wrong model under the modified reward, and the condition named where it fails.

`s-equivalence`: the largest `|Q_hat* - Q*|` over all state-action pairs (linear-quadratic: over all entries of the
matrix of Q*). Q* of the world and Q_hat* of the model under the modified reward come from solvers that share no code
with the library: policy iteration in numpy (tables), scipy's discrete Riccati equation with a cross term (linear-
quadratic), value iteration in numpy (input-multiplicative noise).

    tables      60 random pairs, two discounts each, half of them with absorbing states and discounts up to 1
    lqr         40 pairs of 1 to 16 states, two discounts, costs indefinite after the modification
    noise       20 such pairs with input-multiplicative noise in both
    battery     the battery's tables: Gaussian and drift models, discounts 0.9 to 0.995 against the world's 0.98
    simulators  r_hat by quadrature in the simulators themselves, against the closed form

`one-discount` is the error when the world's discount is used on both expectations; `named` the share of cases with a
violated condition in which just that condition is named. `q-gap-MODEL` and `regret-MODEL` are the distance of the
battery's Gaussian models from `Q_hat* = Q*` under their own reward (the fitted one, and the one that performs best),
and what their policy loses in the world: small gaps suffice for a good policy, they are not necessary.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.linalg import solve_discrete_are, solve_discrete_lyapunov
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bars import Figure, main
from benchmarks.oracles.lqr import random_system
from sim2real.estimators.equivalence import EquivalenceError, TabularMDP, equivalence_gap, modified_reward
from sim2real.estimators.lqr_equivalence import LinearQuadratic, lqr_modified_reward
from sim2real.estimators.sampled_equivalence import Simulator, sampled_conditions, sampled_modified_reward
from sim2real.mdp import sample_noise
from sim2real.policy import linear_policy
from sim2real.simulators.battery import battery_tables, drift_load, gaussian_load, load_transition, mixed_load
from sim2real.simulators.linear_gaussian import linear_gaussian, multiplicative_noise_lqr

SIZES = ((1, 1), (2, 1), (4, 2), (8, 3), (16, 4))


def policy_iteration(mdp: TabularMDP) -> np.ndarray:
    """Q* `[S, A]` in numpy; states whose every action stays for free are worth 0 (needed for a discount of 1)."""
    reward, moves, states = mdp.reward.numpy(), mdp.transition.numpy(), np.arange(len(mdp.reward))
    lookup = (lambda x: x) if mdp.post is None else (lambda x: x[mdp.post.numpy()])
    stays = (lookup(moves[..., states])[states, :, states] == 1).all(1)
    ends = stays & (np.abs(reward.max(1)) < 1e-9)
    value, policy = np.zeros(len(reward)), reward.argmax(1)
    for _ in range(1000):
        rows = moves[states, policy] if mdp.post is None else moves[mdp.post.numpy()[states, policy]]
        kernel = mdp.discount * rows * ~ends
        value = np.linalg.solve(np.eye(len(states)) - kernel, np.where(ends, 0.0, reward[states, policy]))
        q = reward + mdp.discount * lookup(moves @ value)
        better = np.where(q.max(1) > q[states, policy] + 1e-12 * (1 + np.abs(value)), q.argmax(1), policy)
        if (better == policy).all():
            return q
        policy = better
    raise RuntimeError("policy iteration did not settle in 1000 rounds")


def random_table(states: int, actions: int, discount: float, seed: int, *, ends: bool = False) -> TabularMDP:
    """Sparse-ish random rows and normal rewards; `ends`: the last state is absorbing and reached from everywhere."""
    draw = np.random.default_rng(seed)
    rows = draw.random((states, actions, states)) ** 4
    reward = draw.standard_normal((states, actions))
    rows /= rows.sum(-1, keepdims=True)
    if ends:
        rows = 0.95 * rows
        rows[..., -1] += 0.05
        rows[-1], reward[-1] = np.eye(states)[-1], 0.0
    return TabularMDP(torch.tensor(reward), torch.tensor(rows), discount)


def tabular_error(world: TabularMDP, model: TabularMDP) -> float:
    """`max |Q_hat* - Q*|`, both by `policy_iteration`."""
    changed = modified_reward(world, model).model
    return float(np.abs(policy_iteration(changed) - policy_iteration(world)).max())


def table_pairs(count: int) -> list[tuple[TabularMDP, TabularMDP]]:
    """Random pairs of up to 30 states; odd ones have absorbing states and discounts up to 1."""
    pairs = []
    for seed in range(count):
        ends = seed % 2 == 1
        discounts = np.random.default_rng(seed).choice([0.8, 0.9, 0.95, 1.0] if ends else [0.3, 0.8, 0.95, 0.99], 2)
        states = 5 + seed % 26
        world, model = (random_table(states, 4, float(g), 1000 * k + seed, ends=ends) for k, g in enumerate(discounts))
        pairs.append((world, model))
    return pairs


def quadratic_pair(n: int, m: int, seed: int, *, noise: bool) -> tuple[LinearQuadratic, LinearQuadratic]:
    """A random world (discount 0.95), and a model with other A, B, noise and discount that its optimal gain keeps."""
    systems = [{k: torch.tensor(v) for k, v in random_system(n, m, s).items()} for s in (seed, seed + 1000)]
    generator = torch.Generator().manual_seed(seed)
    kicks = 0.2 * torch.randn(2, m, n, m, generator=generator, dtype=torch.float64)
    world, other = (
        LinearQuadratic(s["A"], s["B"], s["Q"], s["R"], 0.95, noise=kick if noise else None, covariance=0.1 * s["Q"])
        for s, kick in zip(systems, kicks, strict=True)
    )
    discount = (0.6, 0.9, 0.99)[seed % 3]
    share = 0.3
    for _ in range(20):
        model = replace(
            other, A=world.A + share * (other.A - world.A), B=world.B + share * (other.B - world.B), discount=discount
        )
        if all(condition.holds for condition in lqr_modified_reward(world, model, strict=False).conditions):
            return world, model
        share *= 0.5
    raise RuntimeError(f"no model of {n} states, seed {seed}, meets the conditions")


def reference_h(problem: LinearQuadratic) -> np.ndarray:
    """Matrix of Q* from scipy's Riccati solver, or by value iteration where there is multiplicative noise."""
    A, B, Q, R = (x.numpy() for x in (problem.A, problem.B, problem.Q, problem.R))
    N = np.zeros_like(B) if problem.cross is None else problem.cross.numpy()
    g, n = problem.discount, len(A)
    channels = [] if problem.noise is None else list(problem.noise.numpy())
    stage, AB = np.block([[Q, N], [N.T, R]]), np.hstack([A, B])

    def backup(P: np.ndarray) -> np.ndarray:
        H = stage + g * AB.T @ P @ AB
        H[n:, n:] += g * sum((C.T @ P @ C for C in channels), np.zeros_like(R))
        return H

    if not channels:
        P = solve_discrete_are(np.sqrt(g) * A, np.sqrt(g) * B, Q, R, s=N)
        for _ in range(3):  # policy iteration takes the last digits, which the pencil of a stiff problem does not give
            H = backup(P)
            shape = np.vstack([np.eye(n), -np.linalg.solve(H[n:, n:], H[n:, :n])])
            P = solve_discrete_lyapunov(np.sqrt(g) * (AB @ shape).T, shape.T @ stage @ shape, method="direct")
        return backup(P)
    P = np.linalg.inv(np.eye(n)) * 1e3  # from above: the stabilising solution is the largest
    for _ in range(100_000):
        H = backup(P)
        following = H[:n, :n] - H[:n, n:] @ np.linalg.solve(H[n:, n:], H[n:, :n])
        if np.abs(following - P).max() <= 1e-15 * np.abs(P).max():
            return backup(following)
        P = 0.5 * (following + following.T)
    return backup(P)


def quadratic_error(world: LinearQuadratic, model: LinearQuadratic) -> float:
    """Largest entry of the difference of the matrices of Q_hat* and Q*."""
    changed = lqr_modified_reward(world, model).model
    return float(np.abs(reference_h(changed) - reference_h(world)).max())


def battery_pairs() -> list[tuple[TabularMDP, TabularMDP]]:
    """The battery with its real load against Gaussian and drift models at several discounts."""
    tables = battery_tables()
    table = lambda load, g: TabularMDP(tables.reward, load_transition(tables, load), g, tables.post)
    world = table(mixed_load(tables), 0.98)
    real = mixed_load(tables)
    mean = real @ tables.loads
    fitted = gaussian_load(tables, {"mean": mean, "std": (real @ (tables.loads - mean) ** 2).sqrt()})
    tuned = gaussian_load(tables, {"mean": tables.loads.new_tensor(0.0), "std": tables.loads.new_tensor(0.1)})
    models = [fitted, tuned, drift_load(tables, mean)]
    return [(world, table(load, g)) for load in models for g in (0.9, 0.98, 0.995)]


def simulator_pair() -> tuple[LinearQuadratic, LinearQuadratic, Simulator, Simulator]:
    """A world with input noise and a linear model, as matrices and as simulators."""
    A, B = torch.tensor([[1.0, 0.2], [0.0, 1.0]]).double(), torch.tensor([[0.0], [0.3]]).double()
    eye = torch.eye(2, dtype=torch.float64)
    world = LinearQuadratic(A, B, eye, eye[:1, :1], 0.95, noise=0.5 * B, covariance=0.05 * eye)
    model = LinearQuadratic(0.95 * A, 1.2 * B, eye, eye[:1, :1], 0.9, covariance=0.1 * eye)
    real = Simulator(multiplicative_noise_lqr(A, B, 0.5), {"A": A, "B": B, "sigma": torch.tensor(0.5).double()})
    linear = linear_gaussian(A, B, noise_covariance=0.1 * eye, discount=0.9)
    return world, model, real, Simulator(linear, {"A": model.A, "B": model.B})


def value_of(world: LinearQuadratic, model: LinearQuadratic) -> Callable[[Tensor], Tensor]:
    """V* of the world as a function of the state."""
    best = lqr_modified_reward(world, model).optimum
    if best is None:
        raise RuntimeError("the world has no optimum")
    return lambda s: -((s @ best.P) * s).sum(-1) - best.c


def simulator_error() -> float:
    """r_hat by quadrature against the closed form at 100 random pairs of states and actions."""
    world, model, real, linear = simulator_pair()
    generator = torch.Generator().manual_seed(0)
    mdp = sampled_modified_reward(real, linear, value_of(world, model), draws=32, generator=generator)
    s, a = (torch.randn(100, k, generator=generator, dtype=torch.float64) for k in (2, 1))
    cost, z = lqr_modified_reward(world, model).model, torch.cat([s, a], -1)
    stage = torch.tensor(np.block([[cost.Q.numpy(), cost.cross.numpy()], [cost.cross.numpy().T, cost.R.numpy()]]))
    expected = -((z @ stage) * z).sum(-1) - cost.constant
    return float((mdp.reward(linear.theta, s, a, s, s) - expected).abs().max())


def violations() -> list[tuple[str, Callable[[], object]]]:
    """(the condition that is violated, a call that must name it)."""
    plain, ending = partial(random_table, 8, 3), partial(random_table, 8, 3, ends=True)
    world, model, real, linear = simulator_pair()
    leaking = replace(plain(0.9, 1), transition=plain(0.9, 1).transition * 0.97)
    tables = battery_tables()
    moved = (tables.post - 25 + 40).clamp(max=10**6)  # a drift of 0.4 that the grid does not hold
    held = (moved < 161).double().unsqueeze(-1) * torch.eye(161).double()[moved.clamp(max=160)]
    storage = TabularMDP(tables.reward, load_transition(tables, mixed_load(tables)), 0.98, tables.post)
    infinite = ending(0.9, 5).reward.clone()
    infinite[2, 1] = -torch.inf
    stay = ending(0.9, 2).transition.clone()
    stay[0] = torch.eye(8).double()[0]
    lazy = ending(1.0, 3).transition.clone()
    lazy[1, 0] = torch.eye(8).double()[1]
    unstable = replace(model, A=3.0 * world.A, B=0.1 * world.B)
    value, policy = value_of(world, model), linear_policy(1)
    gain = lqr_modified_reward(world, model).optimum
    nu = {"gain": gain.K if gain is not None else torch.zeros(1, 2)}
    noise = sample_noise(linear.mdp, policy, 64, 40, torch.Generator().manual_seed(0))
    cauchy = lambda th, s, a, e: linear.mdp.step(th, s, a, torch.tan(torch.pi * (torch.special.ndtr(e) - 0.5)))
    run = lambda side, v=value: sampled_conditions(
        real, side, v, policy, nu, noise, generator=torch.Generator().manual_seed(1)
    )
    far = {"A": 1.3 * world.A, "B": 0.1 * world.B}
    known = lambda s: torch.where(s.abs().amax(-1) < 6.0, value(s), torch.nan)
    return [
        ("world value", lambda: modified_reward(plain(1.0, 0), plain(0.9, 1))),
        ("world value", lambda: modified_reward(replace(ending(0.9, 5), reward=infinite), ending(0.9, 6))),
        ("world value", lambda: lqr_modified_reward(replace(world, B=0.0 * world.B, A=1.2 * world.A), model)),
        ("world value", lambda: lqr_modified_reward(replace(world, discount=1.0), model)),
        ("support", lambda: modified_reward(plain(0.9, 0), leaking)),
        ("support", lambda: modified_reward(storage, replace(storage, transition=held, post=None))),
        ("support", lambda: run(replace(linear, theta=far), known)),
        ("contraction", lambda: modified_reward(plain(0.9, 0), plain(1.0, 1))),
        ("contraction", lambda: modified_reward(ending(0.9, 0), replace(ending(1.0, 2), transition=stay))),
        ("contraction", lambda: modified_reward(ending(0.9, 0), replace(ending(1.0, 3), transition=lazy))),
        ("contraction", lambda: modified_reward(ending(0.9, 0), ending(1.2, 4))),
        ("finite variance", lambda: lqr_modified_reward(world, replace(model, covariance=torch.inf * model.A.abs()))),
        ("finite expectation", lambda: run(replace(linear, mdp=replace(linear.mdp, step=cauchy)))),
        ("stability", lambda: lqr_modified_reward(world, unstable)),
        ("transversality", lambda: run(replace(linear, mdp=replace(linear.mdp, discount=0.99), theta=far))),
        ("discount", lambda: lqr_modified_reward(world, replace(model, discount=1.0))),
    ]


def named(condition: str, call: Callable[[], object]) -> bool:
    """Whether the call raises and names the violated condition and no other."""
    try:
        call()
    except EquivalenceError as error:
        clauses = str(error).split("violated: ")[-1].split("; ")
        names = {"world value", "support", "contraction", "finite variance", "finite expectation", "stability"}
        names |= {"transversality", "discount"}
        return {clause.split(":")[0] for clause in clauses} & names == {condition}
    return False


def s_equivalence(quick: bool) -> Iterator[Figure]:
    """The bar s-equivalence."""
    unit = "reward units"
    pairs = table_pairs(20 if quick else 60)
    quadratic = [quadratic_pair(*SIZES[k % 5], k, noise=False) for k in range(10 if quick else 40)]
    noisy = [quadratic_pair(*SIZES[k % 4], k, noise=True) for k in range(8 if quick else 20)]
    stored = battery_pairs()
    errors = {
        "tables": [tabular_error(*pair) for pair in pairs],
        "lqr": [quadratic_error(*pair) for pair in quadratic],
        "noise": [quadratic_error(*pair) for pair in noisy],
        "battery": [tabular_error(*pair) for pair in stored],
        "simulators": [simulator_error()],
    }
    for name, values in errors.items():
        yield Figure(name, max(values), unit, len(values))
    yield Figure("error", max(max(values) for values in errors.values()), unit, sum(map(len, errors.values())), 1e-10)
    different = [(w, m) for w, m in pairs if w.discount != m.discount and m.discount < 1 and w.discount < 1]
    common = [
        np.abs(
            policy_iteration(replace(m, reward=modified_reward(w, replace(m, discount=w.discount)).model.reward))
            - policy_iteration(w)
        ).max()
        for w, m in different
    ]
    yield Figure("one-discount", float(np.median(common)), unit, len(common))
    for name, (world, model) in {"fitted": stored[1], "tuned": stored[4]}.items():
        gap = equivalence_gap(world, model)
        yield Figure(f"q-gap-{name}", gap.q_max, unit, 1)
        yield Figure(f"regret-{name}", gap.regret_max, unit, 1)
    cases = violations()
    yield Figure("named", sum(named(*case) for case in cases) / len(cases), "1", len(cases), 1.0)


if __name__ == "__main__":
    main({"s-equivalence": s_equivalence})
