"""Policy gradients from logs, against closed forms: finite MDPs by enumeration, LQR by Lyapunov equations.

Where the data hold every outcome in its exact proportion (or there is no noise) and the features contain the truth, the
least-squares critic is exact and so must be the gradient: those comparisons are to rounding.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.oracles.multiplicative_lqr import World, cost_and_gradient
from sim2real.estimators import (
    CriticError,
    Transitions,
    least_squares_critic,
    logged_policy_gradient,
    merge_transitions,
    transitions,
)
from sim2real.estimators.logged_policy_gradient import jackknife_stderr
from sim2real.params import Params
from sim2real.policy import Policy, boltzmann_policy, gaussian_policy, linear_policy, module_policy
from sim2real.rollout import Rollout
from sim2real.rollout_log import RolloutLog

DISCOUNT = 0.9

# ---------------------------------------------------------------------------------------------- finite MDP, enumerated

# transition probabilities are multiples of 1/8, so eight records per (s, a) hold them exactly; state 2 may be terminal
NEXT = torch.tensor([[[4, 3, 1], [1, 5, 2]], [[2, 2, 4], [0, 7, 1]], [[3, 3, 2], [6, 1, 1]]], dtype=torch.int64)
REWARD = torch.tensor([[1.0, -0.5], [0.3, 0.8], [-1.0, 0.4]], dtype=torch.float64)
START = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
LOGITS = {"q": torch.tensor([[0.2, -0.4], [1.0, 0.1], [-0.3, 0.6]], dtype=torch.float64)}


def one_hot(state: Tensor, action: Tensor) -> Tensor:
    index = (2 * state[:, 0] + action[:, 0]).round().long()
    return nn.functional.one_hot(index, 6).double()


def enumerated(repeat: tuple[int, ...] = (1, 1, 1, 1, 1, 1)) -> Transitions:
    """Every (s, a, s') in proportion, (s, a) number i `repeat[i]` times; one record per episode."""
    rows = [
        (s, a, following)
        for i, (s, a) in enumerate((s, a) for s in range(3) for a in range(2))
        for following in range(3)
        for _ in range(int(NEXT[s, a, following]) * repeat[i])
    ]
    s, a, following = torch.tensor(rows).T
    column = lambda x: x.double().unsqueeze(-1)
    return Transitions(
        states=column(s),
        actions=column(a),
        rewards=REWARD[s, a],
        next_states=column(following),
        ended=torch.zeros(len(rows), dtype=torch.bool),
        step=torch.zeros(len(rows), dtype=torch.int64),
        episode=torch.arange(len(rows)),
        initial_states=column(s),
    )


def tabular_return(nu: Params, *, terminal: bool = False) -> Tensor:
    """`START' (I - discount P_pi)^-1 r_pi`; successors that are terminal are worth nothing."""
    pi = torch.softmax(nu["q"] / 0.7, dim=-1)
    probability = NEXT.double() / 8
    if terminal:
        probability = probability * torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    transfer = torch.einsum("sa,sax->sx", pi, probability)
    eye = torch.eye(3, dtype=torch.float64)
    return START @ torch.linalg.solve(eye - DISCOUNT * transfer, (pi * REWARD).sum(-1))


def boltzmann() -> Policy:
    return boltzmann_policy(lambda nu, state: nu["q"][state[:, 0].round().long()], 0.7)


# four first states in the proportions of START
FIRST = torch.tensor([[0.0], [0.0], [1.0], [2.0]], dtype=torch.float64)


@pytest.mark.parametrize("repeat", [(1,) * 6, (1, 3, 2, 1, 5, 1)], ids=["uniform", "uneven"])
@pytest.mark.parametrize("terminal", [False, True])
def test_finite_mdp_off_policy(repeat: tuple[int, ...], terminal: bool) -> None:
    data = enumerated(repeat)
    if terminal:
        data = replace(data, ended=data.next_states[:, 0] == 2)
    wanted = torch.func.grad(partial(tabular_return, terminal=terminal))(LOGITS)["q"]
    # index probabilities come from 64 equal nodes of the noise: an error of up to 1/64 in pi, none in the rest
    estimate = logged_policy_gradient(
        boltzmann(), LOGITS, data, real_discount=DISCOUNT, features=one_hot, initial_states=FIRST, groups=0
    )
    torch.testing.assert_close(estimate.grad["q"], wanted, rtol=0.1, atol=0.02)
    assert abs(float(estimate.value - tabular_return(LOGITS, terminal=terminal))) < 0.1


def test_finite_mdp_exact_when_the_policy_is_a_step_of_the_nodes() -> None:
    # probabilities 3/8 and 5/8 are hit exactly by 64 equal nodes, so nothing but rounding is left
    logits = {"q": 0.7 * torch.log(torch.tensor([[3.0, 5.0], [5.0, 3.0], [1.0, 7.0]], dtype=torch.float64) / 8)}
    wanted = torch.func.grad(tabular_return)(logits)["q"]
    options = {"real_discount": DISCOUNT, "features": one_hot, "initial_states": FIRST}
    estimate = logged_policy_gradient(boltzmann(), logits, enumerated((1, 3, 2, 1, 5, 1)), **options)
    torch.testing.assert_close(estimate.grad["q"], wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(estimate.value, tabular_return(logits), rtol=1e-10, atol=0)
    critic = least_squares_critic(boltzmann(), logits, enumerated(), **options)
    torch.testing.assert_close(critic.value, tabular_return(logits), rtol=1e-10, atol=0)
    values = critic.features(*(x.double() for x in (FIRST[1:], torch.ones(3, 1)))) @ critic.weights
    assert values.shape == (3,)
    assert critic.bellman_radius == pytest.approx(DISCOUNT)  # a stochastic matrix has radius 1


def test_a_discrete_action_has_no_pathwise_derivative() -> None:
    with pytest.raises(ValueError, match="no derivative in nu"):
        logged_policy_gradient(
            boltzmann(), LOGITS, enumerated(), real_discount=DISCOUNT, features=one_hot, method="pathwise"
        )


# ------------------------------------------------------------------------------------------- LQR without noise, exact

A = torch.tensor([[1.0, 0.2], [-0.1, 0.9]], dtype=torch.float64)
B = torch.tensor([[0.1, 0.0], [0.3, 0.2]], dtype=torch.float64)
Q = torch.diag(torch.tensor([1.0, 0.5], dtype=torch.float64))
R = torch.diag(torch.tensor([0.1, 0.2], dtype=torch.float64))
GAIN = {"gain": torch.tensor([[0.8, 0.5], [0.1, 0.4]], dtype=torch.float64)}


def reward(s: Tensor, a: Tensor, following: Tensor) -> Tensor:
    r = R[: a.shape[-1], : a.shape[-1]]
    return -(s @ Q * s).sum(-1) - (a @ r * a).sum(-1)


def noiseless_log(m: int, episodes: int = 30, horizon: int = 6) -> Rollout:
    """Episodes of the linear system with actions unrelated to any policy."""
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(episodes, 2, generator=generator, dtype=torch.float64)]
    actions = torch.randn(episodes, horizon, m, generator=generator, dtype=torch.float64)
    for t in range(horizon):
        states.append(states[-1] @ A.T + actions[:, t] @ B[:, :m].T)
    return Rollout(torch.stack(states, 1), actions, torch.zeros(episodes, horizon, dtype=torch.float64))


def lqr_return(nu: Params, first: Tensor, m: int, std: float) -> Tensor:
    """Mean over `first` of `-s'Ps - discount/(1-discount) std^2 tr(B'PB) - std^2 tr(R)/(1-discount)`, P by Lyapunov."""
    K, b, r = nu["gain"][:m], B[:, :m], R[:m, :m]
    closed = A - b @ K
    eye = torch.eye(4, dtype=torch.float64)
    W = Q + K.T @ r @ K
    P = torch.linalg.solve(eye - DISCOUNT * torch.kron(closed.T.contiguous(), closed.T.contiguous()), W.reshape(-1))
    P = P.reshape(2, 2)
    exploring = std**2 * (torch.trace(r) + DISCOUNT * torch.trace(b.T @ P @ b)) / (1 - DISCOUNT)
    return -(first @ P * first).sum(-1).mean() - exploring


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize(("std", "method"), [(0.0, "auto"), (0.4, "auto"), (0.4, "pathwise")])
def test_linear_quadratic_exactly(m: int, std: float, method: str) -> None:
    log, nu = noiseless_log(m), {"gain": GAIN["gain"][:m]}
    estimate = logged_policy_gradient(
        linear_policy(m, std=std), nu, log, real_reward=reward, real_discount=DISCOUNT, method=method
    )
    wanted = torch.func.grad(lambda at: lqr_return(at, log.states[:, 0], m, std))(nu)["gain"]
    # everything is in the span of the features and the quadratures are exact: only the conditioning is left
    torch.testing.assert_close(estimate.grad["gain"], wanted, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(estimate.value, lqr_return(nu, log.states[:, 0], m, std), rtol=1e-9, atol=0)
    assert float(estimate.info["bellman_radius"]) < 1


def test_gaussian_log_std_gradient() -> None:
    module = nn.Linear(2, 2, bias=True, dtype=torch.float64)
    nu = {
        "weight": torch.tensor([[-0.8, -0.5], [0.0, 0.0]], dtype=torch.float64),
        "bias": torch.tensor([0.0, -0.9], dtype=torch.float64),
    }
    log = noiseless_log(1)
    estimate = logged_policy_gradient(gaussian_policy(module), nu, log, real_reward=reward, real_discount=DISCOUNT)

    def value(log_std: Tensor) -> Tensor:
        b, r = B[:, :1], R[:1, :1]
        closed = A + b @ nu["weight"][:1]
        W = Q + nu["weight"][:1].T @ r @ nu["weight"][:1]
        kron = torch.kron(closed.T.contiguous(), closed.T.contiguous())
        P = torch.linalg.solve(torch.eye(4, dtype=torch.float64) - DISCOUNT * kron, W.reshape(-1)).reshape(2, 2)
        return -torch.exp(2 * log_std) * (torch.trace(r) + DISCOUNT * torch.trace(b.T @ P @ b)) / (1 - DISCOUNT)

    wanted = torch.func.grad(value)(torch.tensor(-0.9, dtype=torch.float64))
    torch.testing.assert_close(estimate.grad["bias"][1], wanted, rtol=1e-8, atol=0)


def test_float32_policies_get_float32_gradients() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    nu = {key: value.detach() for key, value in module.named_parameters()}
    log = noiseless_log(1)
    options = {"real_reward": reward, "real_discount": DISCOUNT, "groups": 0}
    single = logged_policy_gradient(module_policy(module), nu, log, **options)
    double = logged_policy_gradient(module_policy(module), {k: v.double() for k, v in nu.items()}, log, **options)
    for key, value in single.grad.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), double.grad[key], rtol=1e-3, atol=1e-4)  # float32 rounding


# ------------------------------------------------------------------------------------------ LQR with noise, statistics

WORLD = World("test", *(x.numpy() for x in (A, B[:, :1], Q, R[:1, :1])), sigma=0.5, discount=DISCOUNT)


def noisy_log(seed: int, episodes: int, horizon: int = 20, std: float = 0.7) -> Rollout:
    generator = torch.Generator().manual_seed(seed)
    normal = lambda width: torch.randn(episodes, width, generator=generator, dtype=torch.float64)
    states, actions = [normal(2)], []
    for _ in range(horizon):
        actions.append(-states[-1] @ GAIN["gain"][:1].T + std * normal(1))
        push = actions[-1] * (1 + WORLD.sigma * normal(1))
        states.append(states[-1] @ A.T + push @ B[:, :1].T + WORLD.noise**0.5 * normal(2))
    s, a = torch.stack(states, 1), torch.stack(actions, 1)
    r = reward(s[:, :-1].flatten(0, 1), a.flatten(0, 1), s[:, 1:].flatten(0, 1)).reshape(episodes, horizon)
    return Rollout(s, a, r)


# on-policy means: the policy of the data without its exploration; off-policy: another gain
@pytest.mark.parametrize("shift", [0.0, 0.25], ids=["same gain", "another gain"])
def test_estimates_are_unbiased_and_their_errors_honest(shift: float) -> None:
    nu = {"gain": GAIN["gain"][:1] + shift}
    cost, gradient = cost_and_gradient(WORLD, nu["gain"].numpy())
    wanted = torch.cat([torch.tensor([-cost]), torch.tensor(-gradient).reshape(-1)])
    found, claimed = [], []
    for seed in range(24):
        estimate = logged_policy_gradient(linear_policy(1), nu, noisy_log(seed, 100), real_discount=DISCOUNT)
        found.append(torch.cat([estimate.value.reshape(1), estimate.grad["gain"].reshape(-1)]))
        claimed.append(torch.cat([estimate.info["value_stderr"].reshape(1), estimate.info["stderr"]]))
    values, errors = torch.stack(found), torch.stack(claimed)
    # 4 standard errors of the mean of 24 seeds, three numbers: false alarm below 3 * 0.06 % (t, 23 degrees of freedom)
    mean_error = values.std(0) / len(values) ** 0.5
    assert bool(((values.mean(0) - wanted).abs() < 4 * mean_error).all()), (values.mean(0), wanted, mean_error)
    # the claimed error against the spread over seeds: both know it to about 15 %, so a factor 1.6 is 3 sigma
    ratio = errors.square().mean(0).sqrt() / values.std(0)
    assert bool(((ratio > 1 / 1.6) & (ratio < 1.6)).all()), ratio


def test_errors_shrink_as_the_root_of_the_data() -> None:
    nu = {"gain": GAIN["gain"][:1]}
    error = lambda episodes: torch.stack(
        [
            logged_policy_gradient(linear_policy(1), nu, noisy_log(seed, episodes), real_discount=DISCOUNT).info[
                "stderr"
            ]
            for seed in range(4)
        ]
    ).mean()
    # 16 times the data: a quarter of the error; the mean of 4 jackknife errors scatters by about 10 %
    assert float(error(1600) / error(100)) == pytest.approx(0.25, rel=0.4)


def test_discounted_weights_on_policy() -> None:
    # 60 steps leave 0.9^60 = 0.2 % of the discounted visits out; exploration is small, its noise free of bias
    log, nu = noisy_log(5, 1500, horizon=60, std=0.3), {"gain": GAIN["gain"][:1]}
    by_time = logged_policy_gradient(linear_policy(1), nu, log, real_discount=DISCOUNT, weights="discounted")
    _, gradient = cost_and_gradient(WORLD, nu["gain"].numpy())
    error = (by_time.grad["gain"] + torch.tensor(gradient)).reshape(-1)
    # the states are those of the exploring policy: its 2 % larger second moments stay; then 4 standard errors
    allowed = 4 * by_time.info["stderr"] + 0.05 * float(np.abs(gradient).max())
    assert bool((error.abs() < allowed).all()), (error, by_time.info["stderr"])
    weights = DISCOUNT ** torch.arange(60, dtype=torch.float64)
    wanted = 1500 * weights.sum().square() / weights.square().sum()
    torch.testing.assert_close(by_time.info["effective_sample_size"], wanted)


def test_effective_sample_size_falls_off_policy() -> None:
    log = noisy_log(0, 200)
    near, far = (
        logged_policy_gradient(linear_policy(1), {"gain": GAIN["gain"][:1] + shift}, log, real_discount=DISCOUNT)
        for shift in (0.0, 1.0)
    )
    assert float(far.info["effective_sample_size"]) < float(near.info["effective_sample_size"]) <= 200 * 21


def test_an_unstable_policy_shows_in_the_bellman_radius() -> None:
    log = noisy_log(0, 200)
    estimate = logged_policy_gradient(
        linear_policy(1), {"gain": -4 * torch.ones(1, 2, dtype=torch.float64)}, log, real_discount=DISCOUNT
    )
    assert float(estimate.info["bellman_radius"]) > 1


def test_one_long_episode_is_cut_into_blocks_of_time() -> None:
    log = noisy_log(3, 1, horizon=2000)
    estimate = logged_policy_gradient(
        linear_policy(1), GAIN_1, log, real_discount=DISCOUNT, initial_states=torch.eye(2, dtype=torch.float64)
    )
    assert estimate.info["replicates"].shape == (16, 2)
    assert bool((estimate.info["stderr"] > 0).all())


GAIN_1 = {"gain": GAIN["gain"][:1]}


def test_jackknife_of_a_mean_is_its_standard_error() -> None:
    x = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left_out = (x.sum() - x) / 11
    torch.testing.assert_close(jackknife_stderr(left_out), x.std() / 12**0.5)


# --------------------------------------------------------------------------------------------- transitions and failures


def small_log(**changes: object) -> Rollout:
    states = torch.arange(12, dtype=torch.float64).reshape(2, 3, 2)
    base = Rollout(states, states[:, :2, :1] ** 2, states[:, :2, 0])
    return replace(base, **changes)


def test_flattening_keeps_order_and_marks_ends() -> None:
    mask = torch.tensor([[True, False], [True, True]])
    data = transitions(small_log(mask=mask))
    assert data.states.tolist() == [[0, 1], [6, 7], [8, 9]]
    assert data.next_states.tolist() == [[2, 3], [8, 9], [10, 11]]
    assert data.ended.tolist() == [True, False, False]
    assert data.step.tolist() == [0, 0, 1]
    assert data.episode.tolist() == [0, 1, 1]
    assert data.initial_states.tolist() == [[0, 1], [6, 7]]
    assert transitions(data) is data
    chosen = transitions(small_log(mask=mask), terminal=lambda s: s[:, 0] > 9)
    assert chosen.ended.tolist() == [False, False, True]


def test_masked_starts_and_holes_are_neither_starts_nor_ends() -> None:
    states = torch.arange(12, dtype=torch.float64).reshape(1, 6, 2)
    states[0, 0] = torch.nan  # before the recording
    hole = torch.tensor([[False, True, False, True, False]])
    data = transitions(Rollout(states, torch.ones(1, 5, 1), torch.ones(1, 5), mask=hole))
    assert data.initial_states.tolist() == [[2, 3]]
    assert data.step.tolist() == [0, 2]
    assert data.ended.tolist() == [False, True]


def test_a_log_that_stops_was_cut_short() -> None:
    log = RolloutLog(
        signals=small_log().states,
        actions=small_log().actions,
        exogenous=None,
        mask=torch.tensor([[True, False], [True, True]]),
        dt=0.1,
        names={"signal": ("x", "y"), "action": ("u",)},
        units={},
        source="test",
    )
    data = transitions(log, lambda s, a, following: a[:, 0])
    assert data.ended.tolist() == [False, False, False]
    assert data.rewards.tolist() == data.actions[:, 0].tolist()
    with pytest.raises(ValueError, match="carries no rewards"):
        transitions(log)


def test_merging_renumbers_episodes() -> None:
    data = transitions(small_log())
    both = merge_transitions([data, data])
    assert both.episode.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(both.initial_states) == 4
    with pytest.raises(ValueError, match="no transitions"):
        merge_transitions([])
    with pytest.raises(ValueError, match="do not match"):
        merge_transitions([data, replace(data, actions=data.actions.repeat(1, 2))])


@pytest.mark.parametrize(
    ("log", "real_reward", "words"),
    [
        (small_log(states=torch.zeros(2, 4, 2)), None, "need states"),
        (small_log(), lambda s, a, following: a, "one per transition"),
        (small_log(actions=torch.full((2, 2, 1), torch.nan)), None, "actions of the log are not finite .first at tra"),
        (small_log(), lambda s, a, following: a[:, 0] / 0.0, "rewards of the log are not finite"),
        (small_log(mask=torch.zeros(2, 2, dtype=torch.bool)), None, "no real step"),
        (
            replace(transitions(small_log()), rewards=torch.full((4,), torch.nan)),
            None,
            "rewards of the log are not fin",
        ),
    ],
)
def test_bad_logs_are_named(log: Rollout | Transitions, real_reward: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        transitions(log, real_reward)


def test_what_is_no_log_is_named() -> None:
    with pytest.raises(TypeError, match="got NoneType"):
        transitions(None)


def test_actions_that_follow_the_state_identify_no_critic() -> None:
    log = noiseless_log(1)
    followed = replace(log, actions=-log.states[:, :-1] @ GAIN["gain"][:1].T)
    with pytest.raises(CriticError, match="add exploration"):
        logged_policy_gradient(linear_policy(1), GAIN_1, followed, real_reward=reward, real_discount=DISCOUNT)
    ridged = logged_policy_gradient(
        linear_policy(1), GAIN_1, followed, real_reward=reward, real_discount=DISCOUNT, ridge=1e-6
    )
    assert float(ridged.info["ridge"]) == 1e-6
    assert bool(torch.isfinite(ridged.grad["gain"]).all())


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"real_discount": 1.2}, ValueError, "real_discount"),
        ({"groups": 1}, ValueError, "groups"),
        ({"weights": "ratios"}, ValueError, "weights must be 'ratio' or 'discounted', got 'ratios'"),
        ({"method": "path"}, ValueError, "method must be 'auto', 'pathwise' or 'score', got 'path'"),
        ({"ridge": -1.0}, ValueError, "ridge"),
        ({"real_discount": 1.0}, CriticError, "singular with real_discount"),
        ({"features": lambda s, a: s.sum(-1)}, ValueError, "expected .N, q."),
        ({"features": lambda s, a: torch.cat([s, 0 * a], -1)}, CriticError, "features .2. are zero"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        logged_policy_gradient(
            linear_policy(1), GAIN_1, noiseless_log(1), **({"real_reward": reward, "real_discount": DISCOUNT} | options)
        )


def test_a_still_column_is_named() -> None:
    log = noiseless_log(1)
    with pytest.raises(CriticError, match="action 0 never changes"):
        logged_policy_gradient(
            linear_policy(1), GAIN_1, replace(log, actions=torch.ones_like(log.actions)), real_discount=DISCOUNT
        )
