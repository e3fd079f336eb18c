"""Hessian-free gradients against the derivative through the whole soft optimum: finite MDPs and LQR.

Where the data hold every outcome in exact proportion (or the world has no noise) and the features contain the truth,
the critic is exact; with exact in-sim action values the formula must then hold to rounding.
"""

import math
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from problems import scalar, seeded, stack
from torch import Tensor, nn

import benchmarks.hessian_free as bench
from sim2real.estimators import (
    Transitions,
    hessian_free_gradient,
    logged_policy_gradient,
    soft_action_value,
    soft_consistency,
    soft_return,
)
from sim2real.mdp import ModelMDP, sample_noise
from sim2real.params import Params, ravel, unravel
from sim2real.policy import Policy, boltzmann_policy
from sim2real.rollout import Rollout, rollout
from sim2real.simulators import linear_gaussian
from sim2real.solve_report import UnconvergedWarning
from sim2real.solvers import linear_noise_policy, lyapunov, optimal_values, policy_optimum, soft_lqr
from sim2real.tune_state import TuneSettings
from sim2real.tuning import tune, tune_step

LAMBDA, SIM, REAL = 0.3, 0.9, 0.95
"""temperature, discount of the model, discount of the real task"""

# ---------------------------------------------------------------------------------------------------- finite MDPs

# real transition probabilities are multiples of 1/8, so eight records per (s, a) hold them exactly
COUNTS = torch.tensor([[[4, 3, 1], [1, 5, 2]], [[2, 2, 4], [0, 7, 1]], [[3, 3, 2], [6, 1, 1]]])
START = stack(0.5, 0.25, 0.25)
FIRST = stack([0.0], [0.0], [1.0], [2.0])
EVERY = stack([0.0], [1.0])
"""both actions"""


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


BASE, SLOPE, BONUS = draw(1, 3, 2, 3), 0.5 * draw(2, 4, 3, 2, 3), draw(3, 4, 3, 2)
THETA = {"x": draw(4, 4)}
REAL_REWARD = draw(5, 3, 2)


def tables(theta: Params) -> tuple[Tensor, Tensor]:
    """P `[S, A, S]` and r `[S, A]` of the model."""
    return torch.softmax(BASE + torch.tensordot(theta["x"], SLOPE, 1), -1), torch.tensordot(theta["x"], BONUS, 1)


def soft_optimum(theta: Params, sweeps: int = 320) -> Tensor:
    """Q* `[S, A]` by plain value iteration, differentiated through every sweep; 0.9^320 is rounding."""
    P, r = tables(theta)
    q = torch.zeros_like(r)
    for _ in range(sweeps):
        q = r + SIM * P @ (LAMBDA * torch.logsumexp(q / LAMBDA, -1))
    return q


def real_return(theta: Params) -> Tensor:
    pi = torch.softmax(soft_optimum(theta) / LAMBDA, -1)
    transfer = torch.einsum("sa,sax->sx", pi, COUNTS.double() / 8)
    eye = torch.eye(3, dtype=torch.float64)
    return START @ torch.linalg.inv(eye - REAL * transfer) @ (pi * REAL_REWARD).sum(-1)


def frozen_q(pi: Tensor, theta: Params) -> Tensor:
    """Q of the fixed policy `pi [S, A]` with the entropy bonus: one linear system."""
    P, r = tables(theta)
    transfer = torch.einsum("sax,xb->saxb", P, pi).reshape(6, 6)
    entropy = -(pi * pi.log()).sum(-1)
    source = (r + SIM * LAMBDA * P @ entropy).reshape(6)
    return (torch.linalg.inv(torch.eye(6, dtype=torch.float64) - SIM * transfer) @ source).reshape(3, 2)


def index_of(state: Tensor) -> Tensor:
    return state[:, 0].round().long()


def one_hot(state: Tensor, action: Tensor) -> Tensor:
    return nn.functional.one_hot(2 * index_of(state) + index_of(action), 6).double()


def enumerated() -> Transitions:
    """Every (s, a, s') in its exact proportion, one record per episode."""
    cells = [(s, a, x) for s in range(3) for a in range(2) for x in range(3) for _ in range(int(COUNTS[s, a, x]))]
    s, a, x = torch.tensor(cells).T
    column = lambda i: i.double().unsqueeze(-1)
    no = torch.zeros(len(cells), dtype=torch.int64)
    order, first = torch.arange(len(s)), column(s)
    return Transitions(first, column(a), REAL_REWARD[s, a], column(x), no.bool(), no, order, first)


def finite_model(order: int = 0) -> ModelMDP:
    """The tables as a simulator: the next index by inverse transform, without a derivative."""

    def step(theta: Params, state: Tensor, action: Tensor, e: Tensor) -> Tensor:
        P = tables(theta)[0][index_of(state), index_of(action)].detach()
        following = (torch.special.ndtr(e) > P.cumsum(-1)[:, :-1]).sum(-1, keepdim=True)
        return following.double()

    return ModelMDP(
        initial_state=lambda theta, e: (torch.special.ndtr(e) > 0.5).double() + (torch.special.ndtr(e) > 0.75).double(),
        step=step,
        reward=lambda theta, s, a, e, x: tables(theta)[1][index_of(s), index_of(a)],
        noise_dims=(1, 1),
        dt=1.0,
        discount=SIM,
        log_prob=lambda theta, s, a, x: tables(theta)[0].log()[index_of(s), index_of(a), index_of(x)],
        derivative_order=order,
    )


def boltzmann() -> Policy:
    return boltzmann_policy(lambda nu, state: nu["q"][index_of(state)], LAMBDA)


def table_value(nu: Params, state: Tensor) -> Tensor:
    return LAMBDA * torch.logsumexp(nu["q"][index_of(state)] / LAMBDA, -1)


def exact_table_value(theta: Params, states: Tensor, actions: Tensor) -> Tensor:
    pi = torch.softmax(soft_optimum(THETA) / LAMBDA, -1)
    return frozen_q(pi, theta)[index_of(states), index_of(actions)]


def test_formula_equals_the_derivative_through_the_soft_optimum() -> None:
    wanted = torch.func.grad(real_return)(THETA)["x"]
    estimate = hessian_free_gradient(
        finite_model(),
        boltzmann(),
        THETA,
        {"q": soft_optimum(THETA)},
        enumerated(),
        None,
        temperature=LAMBDA,
        real_discount=REAL,
        features=one_hot,
        initial_states=FIRST,
        actions=EVERY,
        action_value=exact_table_value,
        groups=0,
    )
    # one order of the same operations: rounding of a 6 x 6 system
    torch.testing.assert_close(estimate.grad["x"], wanted, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(estimate.value, real_return(THETA), rtol=1e-12, atol=0)
    assert "stderr" not in estimate.info
    assert float(estimate.info["rollouts"]) == 0


def test_tune_climbs_the_real_return_of_a_finite_mdp() -> None:
    def value(theta: Params, states: Tensor, actions: Tensor) -> Tensor:
        pi = torch.softmax(soft_optimum({"x": theta["x"].detach()}) / LAMBDA, -1)
        return frozen_q(pi, theta)[index_of(states), index_of(actions)]

    hypergradient = partial(
        hessian_free_gradient,
        temperature=LAMBDA,
        features=one_hot,
        initial_states=FIRST,
        actions=EVERY,
        action_value=value,
    )
    result = tune(
        finite_model(),
        boltzmann(),
        THETA,
        {"q": soft_optimum(THETA)},
        enumerated(),
        None,
        real_reward=None,
        real_discount=REAL,
        settings=TuneSettings(max_steps=6),
        objective=lambda theta, nu: tables(theta)[1].sum(),  # not asked: the optimum is exact
        optimum=lambda theta, nu: {"q": soft_optimum(theta)},
        hypergradient=hypergradient,
    )
    greedy = (COUNTS.double() / 8, REAL_REWARD)
    best = START @ optimal_values(greedy[1], greedy[0], REAL).value
    # against the hard optimum of the real MDP, which four parameters and a soft policy need not reach
    gap = float((best - real_return(result.theta)) / (best - real_return(THETA)))
    assert gap < 0.5


@pytest.mark.parametrize("known", [False, True], ids=["return", "value-known"])
def test_score_of_a_black_box_is_unbiased(known: bool) -> None:
    nu = {"q": soft_optimum(THETA)}
    pi = torch.softmax(nu["q"] / LAMBDA, -1)
    cells = stack(*([float(s), float(a)] for s in range(3) for a in range(2)))
    weights = draw(6, 6)
    wanted = torch.func.grad(lambda th: weights @ frozen_q(pi, th).reshape(6))(THETA)["x"]
    mdp, policy = finite_model(), boltzmann()
    noise = sample_noise(mdp, policy, 2000, 80, seeded(7))  # 0.9^80 = 2e-4 of the sum is cut
    found = []
    for part in range(20):
        rows = torch.arange(100 * part, 100 * (part + 1)).repeat_interleave(6)
        theta = {"x": THETA["x"].clone().requires_grad_()}
        q = soft_action_value(
            mdp,
            policy,
            theta,
            nu,
            noise,
            cells.repeat(100, 1)[:, :1],
            cells.repeat(100, 1)[:, 1:],
            temperature=LAMBDA,
            soft_value=table_value if known else None,
            rows=rows,
        )
        (grad,) = torch.autograd.grad((weights.repeat(100) * q).sum() / 100, theta["x"])
        found.append(grad)
    mean, stderr = torch.stack(found).mean(0), torch.stack(found).std(0) / 20**0.5
    # four standard errors of 20 parts (t quantile): four entries, false alarm about 0.3 %
    assert bool(((mean - wanted).abs() < 4 * stderr + 1e-3 * wanted.norm()).all())
    # the temporal difference in place of the return to go: far less noise
    assert float(stderr.norm() / wanted.norm()) < (0.03 if known else 0.3)


def test_rollouts_give_the_gradient_of_a_black_box() -> None:
    wanted = torch.func.grad(real_return)(THETA)["x"]
    mdp, policy = finite_model(), boltzmann()
    estimates = []
    for seed in range(6):
        estimate = hessian_free_gradient(
            mdp,
            policy,
            THETA,
            {"q": soft_optimum(THETA)},
            enumerated(),
            sample_noise(mdp, policy, 52, 60, seeded(seed)),
            temperature=LAMBDA,
            real_discount=REAL,
            features=one_hot,
            initial_states=FIRST,
            actions=EVERY,
            soft_value=table_value,
            groups=0,
            rows_at_once=50,
        )
        estimates.append(estimate.grad["x"])
    mean, stderr = torch.stack(estimates).mean(0), torch.stack(estimates).std(0) / 6**0.5
    # t with 5 degrees of freedom, 7 standard errors: false alarm 0.4 % over four entries; 0.9^60 cuts 0.2 %
    assert bool(((mean - wanted).abs() < 7 * stderr + 4e-3 * wanted.norm()).all())
    assert float(stderr.norm() / wanted.norm()) < 0.5


# ------------------------------------------------------------------------------------------ linear-quadratic, Gaussian

COST, PRICE = torch.eye(2, dtype=torch.float64), stack([0.5])
MODEL = {"A": stack([1.0, 0.2], [-0.1, 0.9]), "B": stack([0.1], [0.3])}
WORLD = {"A": stack([1.05, 0.25], [0.0, 0.8]), "B": stack([0.05], [0.4])}


def soft(theta: Params) -> Params:
    return soft_lqr(theta["A"], theta["B"], COST, PRICE, discount=SIM, temperature=LAMBDA).nu


def gaussian_cost(system: Params, nu: Params, discount: float) -> tuple[Tensor, Tensor]:
    """P and v of the cost `s'P s + v` of a linear policy with noise (without entropy), from Lyapunov's equation."""
    K, spread = nu["gain"], nu["factor"] @ nu["factor"].mT
    P = lyapunov(system["A"] - system["B"] @ K, COST + K.mT @ PRICE @ K, discount)
    return P, ((PRICE + discount * system["B"].mT @ P @ system["B"]) * spread).sum() / (1 - discount)


def closed_form_return(theta: Params, first: Tensor) -> Tensor:
    P, v = gaussian_cost(WORLD, soft(theta), REAL)
    return -((first @ P) * first).sum(-1).mean() - v


def lqr_action_value(theta: Params, states: Tensor, actions: Tensor) -> Tensor:
    """Q_sim of the policy frozen at MODEL, up to a constant in (s, a)."""
    P, _ = gaussian_cost(theta, soft(MODEL), SIM)
    following = states @ theta["A"].mT + actions @ theta["B"].mT
    now = states.square().sum(-1) + 0.5 * actions.square().sum(-1)
    return -now - SIM * ((following @ P) * following).sum(-1)


def lqr_model() -> ModelMDP:
    return linear_gaussian(MODEL["A"], MODEL["B"], state_cost=COST, action_cost=PRICE, discount=SIM)


def lqr_log(episodes: int = 40, horizon: int = 6) -> Rollout:
    """Rollouts of the noise-free world under an exploring linear policy."""
    world = linear_gaussian(WORLD["A"], WORLD["B"], state_cost=COST, action_cost=PRICE, discount=REAL)
    policy = linear_noise_policy(1)
    nu = {"gain": stack([0.2, 0.3]), "factor": stack([1.0])}
    return rollout(world, policy, WORLD, nu, sample_noise(world, policy, episodes, horizon, seeded(11)))


def test_lqr_formula_is_exact_and_rollouts_come_close() -> None:
    log, policy = lqr_log(), linear_noise_policy(1)
    first = log.states[:, 0]
    wanted = torch.func.grad(partial(closed_form_return, first=first))(MODEL)
    options = {"temperature": LAMBDA, "real_discount": REAL, "groups": 0}
    mdp, nu = lqr_model(), soft(MODEL)
    exact = hessian_free_gradient(mdp, policy, MODEL, nu, log, None, action_value=lqr_action_value, **options)
    for key, value in wanted.items():
        # the critic solves a 21 x 21 system of condition 1e3
        torch.testing.assert_close(exact.grad[key], value, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(exact.value, closed_form_return(MODEL, first), rtol=1e-9, atol=0)
    noise = sample_noise(mdp, policy, 280, 60, seeded(12))
    sampled = hessian_free_gradient(mdp, policy, MODEL, nu, log, noise, **options)
    for key, value in wanted.items():
        # in-sim noise of 280 rollouts, a few per cent; a wrong derivative (no entropy, no envelope) is off by 20 %
        torch.testing.assert_close(sampled.grad[key], value, rtol=0.0, atol=0.08 * float(value.norm()))


def lqr_value(nu: Params, state: Tensor) -> Tensor:
    """V up to a constant: -(s'P s)."""
    P = soft_lqr(MODEL["A"], MODEL["B"], COST, PRICE, discount=SIM, temperature=LAMBDA).cost_matrix
    return -((state @ P) * state).sum(-1)


def test_known_values_cut_the_chain_at_every_step() -> None:
    # d(r + gamma V(s')) at fixed (s, a), summed over an in-sim rollout, must give dQ as the whole path does
    mdp, policy, nu = lqr_model(), linear_noise_policy(1), soft(MODEL)
    noise = sample_noise(mdp, policy, 4000, 80, seeded(25))
    gradients = []
    for value in (None, lqr_value):
        theta = {key: item.clone().requires_grad_() for key, item in MODEL.items()}
        pair = (stack([0.5, -1.0]).expand(4000, 2), stack([0.7]).expand(4000, 1))
        q = soft_action_value(mdp, policy, theta, nu, noise, *pair, temperature=LAMBDA, soft_value=value)
        gradients.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(q.mean(), list(theta.values()))]))
    # the same 4000 draws of the policy's noise, a few per cent each; 0.9^80 is 2e-4
    assert float((gradients[0] - gradients[1]).norm()) < 0.03 * float(gradients[0].norm())


@pytest.mark.filterwarnings("ignore:.*end early")  # theta does not move this end
def test_nothing_is_worth_anything_after_a_terminal_state() -> None:
    policy, nu = linear_noise_policy(1), soft(MODEL)
    whole = lqr_model()
    mdp = replace(whole, terminal=lambda theta, state: state[:, 0] > 0)
    noise = sample_noise(mdp, policy, 1, 5, seeded(26))
    states, action = stack([1.0, 0.0], [-9.0, 0.0], [-0.1, 1.0]), stack([0.5], [0.5], [0.5])
    theta = {key: item.clone().requires_grad_() for key, item in MODEL.items()}
    options = {"temperature": LAMBDA}
    q = soft_action_value(mdp, policy, theta, nu, noise, states, action, **options)
    free = soft_action_value(whole, policy, MODEL, nu, noise, states, action, **options)
    one = -states.square().sum(-1) - 0.5 * action.square().sum(-1)
    torch.testing.assert_close(q, torch.stack([torch.zeros(()).double(), free[1], one[2]]))
    known = soft_action_value(mdp, policy, theta, nu, noise, states, action, soft_value=lqr_value, **options)
    torch.testing.assert_close(known[[0, 2]], q[[0, 2]])
    assert not bool(torch.autograd.grad(q[0] + q[2] + known[0] + known[2], theta["A"])[0].any())
    assert float(soft_return(mdp, policy, MODEL, nu, noise, temperature=0.0)) <= 0.0


def test_with_exact_values_both_routes_are_one_number_on_any_log() -> None:
    # the policy class follows the optimum, so (dQ - dV) / lambda = grad_nu log pi . dnu as functions of (s, a)
    world = linear_gaussian(
        WORLD["A"], WORLD["B"], state_cost=COST, action_cost=PRICE, noise_covariance=0.1 * COST, discount=REAL
    )
    policy, nu = linear_noise_policy(1), soft(MODEL)
    log = rollout(world, policy, WORLD, nu, sample_noise(world, policy, 20, 10, seeded(21)))
    gradient = logged_policy_gradient(policy, nu, log, real_discount=REAL, groups=4)
    found = hessian_free_gradient(
        lqr_model(),
        policy,
        MODEL,
        nu,
        log,
        None,
        temperature=LAMBDA,
        real_discount=REAL,
        groups=4,
        action_value=lqr_action_value,
    )
    _, pull = torch.func.vjp(soft, MODEL)
    for key, value in pull(gradient.grad)[0].items():
        torch.testing.assert_close(found.grad[key], value, rtol=1e-9, atol=1e-9)
    # standard errors too: every replicate is pulled back through the same linear map
    for i, replicate in enumerate(gradient.info["replicates"]):
        wanted = ravel(pull(unravel(replicate, nu))[0])
        torch.testing.assert_close(found.info["replicates"][i], wanted, rtol=1e-9, atol=1e-9)
    for name in ("value_stderr", "effective_sample_size", "bellman_radius", "return_low"):
        torch.testing.assert_close(found.info[name], gradient.info[name])


def test_a_policy_that_is_no_soft_optimum_is_named() -> None:
    policy, mdp = linear_noise_policy(1), lqr_model()
    noise, log = sample_noise(mdp, policy, 300, 40, seeded(27)), lqr_log()
    options = {"temperature": LAMBDA, "real_discount": REAL, "groups": 0}
    off = soft(MODEL) | {"gain": soft(MODEL)["gain"] + stack([0.5, 0.5])}
    with pytest.warns(UnconvergedWarning, match="nats from soft-optimal"):
        hessian_free_gradient(mdp, policy, MODEL, off, log, noise, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = hessian_free_gradient(mdp, policy, MODEL, soft(MODEL), log, noise, **options)
    assert abs(float(found.info["consistency"])) < 0.01


def test_tune_step_takes_it_as_its_hypergradient() -> None:
    log, policy, mdp = lqr_log(), linear_noise_policy(1), lqr_model()
    out = tune_step(
        mdp,
        policy,
        MODEL,
        soft(MODEL),
        log,
        None,
        real_reward=None,
        real_discount=REAL,
        optimum=lambda theta, nu: soft(theta),
        objective=lambda theta, nu: -gaussian_cost(theta, nu, SIM)[0].trace(),
        hypergradient=partial(hessian_free_gradient, temperature=LAMBDA, action_value=lqr_action_value),
    )
    wanted = torch.func.grad(partial(closed_form_return, first=log.states[:, 0]))(MODEL)
    for key, value in wanted.items():
        torch.testing.assert_close(out.grad[key], value, rtol=1e-8, atol=1e-8)
    assert "value_replicates" in out.info


def test_several_rollouts_and_small_batches_average_the_same() -> None:
    log, policy, mdp, nu = lqr_log(8, 5), linear_noise_policy(1), lqr_model(), soft(MODEL)
    noise = sample_noise(mdp, policy, 30, 8, seeded(22))
    options = {"temperature": LAMBDA, "real_discount": REAL, "groups": 3, "rollouts": 4}
    whole = hessian_free_gradient(mdp, policy, MODEL, nu, log, noise, **options)
    parts = hessian_free_gradient(mdp, policy, MODEL, nu, log, noise, **options, rows_at_once=100)
    for key, value in whole.grad.items():
        torch.testing.assert_close(parts.grad[key], value)
    torch.testing.assert_close(parts.info["stderr"], whole.info["stderr"])
    assert float(whole.info["rollouts"]) == 4 * 9 * (8 + 40)
    single = {key: value.float() for key, value in MODEL.items()}
    cast = hessian_free_gradient(mdp, policy, single, nu, log, None, action_value=lqr_in_double, **options)
    assert cast.grad["A"].dtype == torch.float32


def lqr_in_double(theta: Params, states: Tensor, actions: Tensor) -> Tensor:
    return lqr_action_value({key: value.double() for key, value in theta.items()}, states, actions)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"noise": None}, "pass noise"),
        ({"temperature": 0.0}, "temperature"),
        ({"rows_at_once": 0}, "rows_at_once"),
        ({"rollouts": 0}, "rollouts"),
        ({"method": "exact"}, "'auto', 'pathwise', 'mixed' or 'score'"),
        ({"method": "score"}, "log_prob"),
        ({"action_value": lambda th, s, a: s[:, 0]}, "does not depend"),
        ({"action_value": lambda th, s, a: th["A"].sum()}, "expected"),
        ({"action_value": lambda th, s, a: s[:, 0] * (th["A"].sum() * 1.0e400)}, "not finite"),
        ({"actions": stack([0.0], [1.0])}, "every action once"),
    ],
)
def test_refusals(options: dict[str, object], words: str) -> None:
    mdp, policy = lqr_model(), linear_noise_policy(1)
    given = {"noise": sample_noise(mdp, policy, 10, 3, seeded(23)), "temperature": LAMBDA} | options
    noise = given.pop("noise")
    with pytest.raises(ValueError, match=words):
        hessian_free_gradient(mdp, policy, MODEL, soft(MODEL), lqr_log(), noise, real_discount=REAL, **given)


def test_soft_values_refuse() -> None:
    mdp, policy, nu = finite_model(), boltzmann(), {"q": soft_optimum(THETA)}
    noise = sample_noise(mdp, policy, 1, 3, seeded(24))
    options = {"temperature": LAMBDA}
    with pytest.raises(ValueError, match="differentiable model"):
        soft_action_value(mdp, policy, THETA, nu, noise, FIRST, FIRST, method="pathwise", **options)
    with pytest.raises(ValueError, match=r"\[N, m\]"):
        soft_action_value(mdp, policy, THETA, nu, noise, FIRST, FIRST[:2], **options)
    with pytest.raises(ValueError, match="at least 4 rows"):
        soft_consistency(mdp, policy, THETA, nu, noise, FIRST, **options)
    with pytest.raises(ValueError, match="temperature"):
        soft_return(mdp, policy, THETA, nu, noise, temperature=-1.0)


def test_soft_lqr_is_the_boltzmann_policy_of_its_own_values() -> None:
    B, price, W = torch.cat([MODEL["B"], stack([0.2], [-0.1])], 1), torch.diag(stack(0.5, 0.8)), 0.1 * COST
    found = soft_lqr(MODEL["A"], B, COST, price, discount=SIM, temperature=LAMBDA, noise_covariance=W)
    s, a = draw(13, 50, 2), draw(14, 50, 2)
    following = s @ MODEL["A"].mT + a @ B.mT
    value = lambda x: -((x @ found.cost_matrix) * x).sum(-1) - found.offset
    q = -s.square().sum(-1) - ((a @ price) * a).sum(-1)
    q = q + SIM * (value(following) - (found.cost_matrix * W).sum())
    log_pi = linear_noise_policy(2).log_prob(found.nu, s, a)
    torch.testing.assert_close(LAMBDA * log_pi, q - value(s), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"discount": 1.0}, "discount"),
        ({"noise_covariance": torch.tensor(0.01)}, "noise_covariance must be"),
    ],
)
def test_soft_lqr_refuses(options: dict[str, float | Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        soft_lqr(MODEL["A"], MODEL["B"], COST, PRICE, **({"discount": SIM, "temperature": LAMBDA} | options))


def test_training_on_the_soft_return_finds_the_soft_optimum() -> None:
    policy, mdp = linear_noise_policy(1), lqr_model()
    noise = sample_noise(mdp, policy, 200, 40, seeded(15))
    J = lambda theta, nu: soft_return(mdp, policy, theta, nu, noise, temperature=LAMBDA)
    start = {"gain": torch.zeros(1, 2, dtype=torch.float64), "factor": stack([1.0])}
    found = policy_optimum(J, MODEL, start, tol=1e-7)
    assert found.report.converged
    # 200 x 40 draws of the policy's noise: 1.6 % on its variance; 200 starts, 3 % on the gain
    torch.testing.assert_close(found.nu["factor"], soft(MODEL)["factor"], rtol=0.03, atol=0)
    torch.testing.assert_close(found.nu["gain"], soft(MODEL)["gain"], rtol=0, atol=0.06)
    s = draw(16, 40, 2)
    gap, _ = soft_consistency(mdp, policy, MODEL, found.nu, noise, s, temperature=LAMBDA)
    assert abs(float(gap)) < 5e-3  # nats; the start is at several


def test_soft_consistency_is_the_distance_from_the_optimum() -> None:
    policy, mdp, s = linear_noise_policy(1), lqr_model(), draw(17, 60, 2)
    nu = {"gain": soft(MODEL)["gain"] + stack([0.3, -0.2]), "factor": 1.3 * soft(MODEL)["factor"]}
    noise = sample_noise(mdp, policy, 120, 120, seeded(18))
    P, _ = gaussian_cost(MODEL, nu, SIM)
    nodes = torch.linspace(-6, 6, 2001, dtype=torch.float64)  # the rectangle rule is exact to rounding for a Gaussian
    share = torch.softmax(-0.5 * nodes**2, 0)
    actions = -(s @ nu["gain"].mT) + nu["factor"][0, 0] * nodes
    following = (s @ MODEL["A"].mT).unsqueeze(1) + actions.unsqueeze(-1) * MODEL["B"].squeeze(-1)
    q = -0.5 * actions**2 - SIM * ((following @ P) * following).sum(-1)
    excess = q + LAMBDA * 0.5 * nodes**2
    wanted = (share * (excess - excess @ share[:, None]) ** 2).sum(-1).mean() / (2 * LAMBDA**2)
    found, stderr = soft_consistency(mdp, policy, MODEL, nu, noise, s, temperature=LAMBDA)
    # 60 pairs of rollouts whose common noise adds a term linear in the action: about 5 %
    torch.testing.assert_close(found, wanted, rtol=0.2, atol=0)
    assert 0 < float(stderr) < float(found)


# ------------------------------------------------------------------------- hybrid actions, enumerated over the nodes

GAINS, LEVELS, WIDTH = stack(-0.5, 0.4), stack(0.3, -0.2), 0.3
HYBRID = {"decay": scalar(0.8), "push": scalar(0.5)}


def hybrid_policy() -> Policy:
    """The index from softmax(+-s), then a Gaussian number whose mean depends on the index."""

    def mean(state: Tensor, index: Tensor) -> Tensor:
        return GAINS[index] * state[:, 0] + LEVELS[index]

    def act(nu: Params, state: Tensor, noise: Tensor) -> Tensor:
        index = (torch.special.ndtr(noise[:, 0]) > torch.sigmoid(nu["slope"] * state[:, 0])).long()
        return torch.stack([index.double(), mean(state, index) + WIDTH * noise[:, 1]], -1)

    def log_prob(nu: Params, state: Tensor, action: Tensor) -> Tensor:
        index = action[:, 0].long()
        sign = 1.0 - 2.0 * action[:, 0]
        z = (action[:, 1] - mean(state, index)) / WIDTH
        return nn.functional.logsigmoid(sign * nu["slope"] * state[:, 0]) - 0.5 * z**2 - math.log(WIDTH * 2.5066282746)

    return Policy(act, log_prob, noise_dim=2)


def hybrid_model() -> ModelMDP:
    def step(theta: Params, state: Tensor, action: Tensor, e: Tensor) -> Tensor:
        turn = torch.where(action[:, :1] > 0.5, -1.0, 1.0)
        return torch.tanh(theta["decay"] * state * turn + theta["push"] * action[:, 1:])

    return ModelMDP(
        initial_state=lambda theta, e: e,
        step=step,
        reward=lambda theta, s, a, e, x: -(x[:, 0] ** 2) - 0.1 * a[:, 1] ** 2 + 0.2 * theta["push"] * s[:, 0] * a[:, 0],
        noise_dims=(1, 0),
        dt=1.0,
        discount=SIM,
    )


def enumerated_q(
    mdp: ModelMDP, policy: Policy, theta: Params, nu: Params, state: Tensor, action: Tensor, left: int
) -> Tensor:
    """Q of a rollout of `left` further steps by summing over both indices and 9 nodes of the Gaussian."""
    none = state.new_zeros(len(state), 0)
    following = mdp.step(theta, state, action, none)
    total = mdp.reward(theta, state, action, none, following)
    if left == 0:
        return total
    off = torch.arange(1, 9, dtype=torch.float64).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    for node, share in zip(nodes, vectors[0].square(), strict=True):
        for index in (0, 1):
            # a noise column far out forces the index; its probability is put in by hand
            e = torch.stack([torch.full_like(state[:, 0], -9.0 + 18.0 * index), node.expand(len(state))], -1)
            drawn = policy.act(nu, following, e)
            chance = torch.sigmoid((1.0 - 2.0 * index) * nu["slope"] * following[:, 0]) * share
            bonus = -LAMBDA * policy.log_prob(nu, following, drawn)
            worth = enumerated_q(mdp, policy, theta, nu, following, drawn, left - 1)
            total = total + SIM * chance * (bonus + worth)
    return total


@pytest.mark.parametrize("method", ["auto", "mixed"])
def test_hybrid_actions(method: str) -> None:
    mdp, policy, nu = hybrid_model(), hybrid_policy(), {"slope": scalar(1.5)}
    state, action = stack([0.7]), stack([1.0, 0.4])
    exact = lambda theta: enumerated_q(mdp, policy, theta, nu, state, action, 2).sum()
    wanted = torch.func.grad(exact)(HYBRID)
    theta = {key: value.clone().requires_grad_() for key, value in HYBRID.items()}
    count = 20000
    noise = sample_noise(mdp, policy, count, 3, seeded(19))
    found = soft_action_value(
        mdp,
        policy,
        theta,
        nu,
        noise,
        state.expand(count, 1),
        action.expand(count, 2),
        temperature=LAMBDA,
        method=method,
    )
    assert abs(float(found.detach().mean() - exact(HYBRID))) < 4 * float(found.detach().std()) / count**0.5
    parts = [torch.autograd.grad(part.mean(), list(theta.values()), retain_graph=True) for part in found.split(1000)]
    for i, key in enumerate(HYBRID):
        values = torch.stack([part[i] for part in parts])
        # 20 groups, four standard errors: false alarm below 0.1 % each
        assert abs(float(values.mean() - wanted[key])) < 4 * float(values.std()) / 20**0.5, key


def test_a_hybrid_policy_taken_for_smooth_is_biased() -> None:
    # why "auto" looks at every column of the action
    mdp, policy, nu = hybrid_model(), hybrid_policy(), {"slope": scalar(1.5)}
    state, action = stack([0.7]), stack([1.0, 0.4])
    exact = torch.func.grad(lambda th: enumerated_q(mdp, policy, th, nu, state, action, 2).sum())(HYBRID)
    theta = {key: value.clone().requires_grad_() for key, value in HYBRID.items()}
    noise = sample_noise(mdp, policy, 20000, 3, seeded(20))
    tiled = (state.expand(20000, 1), action.expand(20000, 2))
    q = soft_action_value(mdp, policy, theta, nu, noise, *tiled, temperature=LAMBDA, method="pathwise")
    (grad,) = torch.autograd.grad(q.mean(), theta["decay"])
    assert abs(float(grad - exact["decay"])) > 0.02


# ------------------------------------------------------------------------------------------------ the benchmark itself


def test_the_benchmark_recovers_a_planted_ratio() -> None:
    # errors with variances 3 / N and 1 / N: 200 seeds give the ratio to about 10 %
    sizes = torch.tensor([100.0, 200.0, 400.0], dtype=torch.float64)
    noise = torch.randn(2, 3, 200, 4, generator=seeded(28), dtype=torch.float64) / sizes[:, None, None].sqrt()
    errors = {"hessian-free": bench.Errors(3**0.5 * noise[0], 1.0), "implicit": bench.Errors(noise[1], 1.0)}
    ratio, low, high = bench.sample_ratio(*errors.values(), seeded(29))
    assert low < 3.0 < high
    assert low < ratio < high
    assert abs(bench.slope(errors["implicit"], (5, 10, 20)) + 1.0) < 0.15


def test_both_routes_of_the_linear_quadratic_benchmark_agree() -> None:
    task = bench.lqr_task()
    log = task.collect(40, seeded(30))
    routes = [route(log, seeded(31)) for route in (task.hessian_free, task.implicit)]
    # the same critic on the same log: what is left is in-sim noise
    assert float((routes[0] - routes[1]).norm()) < 0.2 * float(routes[1].norm())


def test_the_finite_benchmark_knows_its_truth() -> None:
    task = bench.finite_task()
    log = task.collect(150, seeded(32))
    for route in (task.hessian_free, task.implicit):
        # 3000 transitions: an error of about 10 %, five times that would be a bug
        assert float((route(log, seeded(33)) - task.truth).norm()) < 0.5 * float(task.truth.norm())
