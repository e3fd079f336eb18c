"""Soft sensitivities against the derivative of the whole soft optimum: tables, and the linear-quadratic Gaussian."""

from dataclasses import replace

import pytest
import torch
from problems import scalar, seeded, stack
from test_hessian_free import (
    EVERY,
    HYBRID,
    LAMBDA,
    MODEL,
    SIM,
    THETA,
    boltzmann,
    draw,
    exact_table_value,
    finite_model,
    gaussian_cost,
    hybrid_model,
    hybrid_policy,
    lqr_action_value,
    lqr_log,
    lqr_model,
    soft,
    soft_optimum,
)

from sim2real.estimators import logged_policy_gradient, soft_sensitivity
from sim2real.mdp import sample_noise
from sim2real.params import Params, dot
from sim2real.solve_report import Sensitivity, UnconvergedError, UnconvergedWarning
from sim2real.solvers import linear_noise_policy
from sim2real.tuning import tune_step

CELLS = stack([0.0], [1.0], [2.0])


def table_nu() -> Params:
    return {"q": soft_optimum(THETA)}


def test_log_prob_of_a_table() -> None:
    states, taken = CELLS.repeat(2, 1), EVERY.repeat_interleave(3, 0)
    found = soft_sensitivity(
        finite_model(),
        boltzmann(),
        THETA,
        table_nu(),
        states,
        None,
        temperature=LAMBDA,
        taken=taken,
        actions=EVERY,
        action_value=exact_table_value,
    )
    log_pi = lambda th: torch.log_softmax(soft_optimum(th) / LAMBDA, -1).T.reshape(6)
    g, v = draw(30, 6), {"x": draw(31, 4)}
    _, pull = torch.func.vjp(log_pi, THETA)
    # linear systems of size 6 on one side, 400 sweeps on the other: rounding
    torch.testing.assert_close(found.vjp({"log_prob": g})["x"], pull(g)[0]["x"], rtol=1e-10, atol=1e-11)
    pushed = torch.func.jvp(log_pi, (THETA,), (v,))[1]
    torch.testing.assert_close(found.jvp(v)["log_prob"], pushed, rtol=1e-10, atol=1e-11)
    assert found.report.converged
    assert found.report.steps == 0


def test_nu_of_a_table_up_to_the_means_of_its_rows() -> None:
    found = soft_sensitivity(
        finite_model(),
        boltzmann(),
        THETA,
        table_nu(),
        CELLS,
        None,
        temperature=LAMBDA,
        actions=EVERY,
        action_value=exact_table_value,
    )
    pi = torch.softmax(soft_optimum(THETA) / LAMBDA, -1)
    g = pi * draw(32, 3, 2)
    g = g - pi * g.sum(-1, keepdim=True)  # what a gradient of a return looks like: no part along a shift of a row
    _, pull = torch.func.vjp(soft_optimum, THETA)
    # CG to 1e-10
    torch.testing.assert_close(found.vjp({"q": g})["x"], pull(g)[0]["x"], rtol=1e-8, atol=1e-9)
    v = {"x": draw(33, 4)}
    pushed, wanted = found.jvp(v)["q"], torch.func.jvp(soft_optimum, (THETA,), (v,))[1]
    difference = pushed - wanted
    torch.testing.assert_close(difference, difference[:, :1].expand(3, 2), rtol=0, atol=1e-8)
    torch.testing.assert_close(dot({"q": g}, {"q": pushed}), dot(found.vjp({"q": g}), v), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("given", [False, True])
def test_nu_of_the_linear_quadratic_optimum(given: bool) -> None:
    g = {"gain": draw(34, 1, 2), "factor": draw(35, 1, 1)}
    found = soft_sensitivity(
        lqr_model(),
        linear_noise_policy(1),
        MODEL,
        soft(MODEL),
        draw(36, 20, 2),
        None,
        temperature=LAMBDA,
        action_value=lqr_action_value,
        cotangent=g if given else None,
    )
    _, pull = torch.func.vjp(soft, MODEL)
    for key, value in pull(g)[0].items():
        # CG to 1e-10 on a 3 x 3 system
        torch.testing.assert_close(found.vjp(g)[key], value, rtol=1e-7, atol=1e-8)
    v = {"A": draw(37, 2, 2), "B": draw(38, 2, 1)}
    pushed, wanted = found.jvp(v), torch.func.jvp(soft, (MODEL,), (v,))[1]
    for key, value in wanted.items():
        torch.testing.assert_close(pushed[key], value, rtol=1e-7, atol=1e-8)


def test_rollouts_hybrid_actions_products_agree() -> None:
    mdp, policy, nu = hybrid_model(), hybrid_policy(), {"slope": scalar(1.5)}
    noise = sample_noise(mdp, policy, 30, 5, seeded(39))
    states, taken = draw(40, 30, 1), torch.stack([(draw(41, 30) > 0).double(), draw(42, 30)], -1)
    options = {"temperature": LAMBDA, "consistency_tol": float("inf")}
    for like, extra in (({"log_prob": draw(43, 30)}, {"taken": taken}), ({"slope": scalar(0.7)}, {})):
        found = soft_sensitivity(mdp, policy, HYBRID, nu, states, noise, **options, **extra)
        v = {"decay": scalar(0.3), "push": scalar(-0.8)}
        # one graph, differentiated both ways
        torch.testing.assert_close(dot(like, found.jvp(v)), dot(found.vjp(like), v), rtol=1e-9, atol=1e-12)
        assert "consistency" in found.info


def test_products_forward_refuse_a_model_of_first_order() -> None:
    # the second derivative of such a step would be silently zero
    mdp, policy = replace(hybrid_model(), derivative_order=1), hybrid_policy()
    noise, nu = sample_noise(mdp, policy, 10, 3, seeded(45)), {"slope": scalar(1.5)}
    options = {"temperature": LAMBDA, "consistency_tol": float("inf")}
    found = soft_sensitivity(mdp, policy, HYBRID, nu, draw(46, 10, 1), noise, **options)
    assert set(found.vjp({"slope": scalar(1.0)})) == set(HYBRID)
    with pytest.raises(ValueError, match="derivative_order 1"):
        found.jvp({"decay": scalar(0.3), "push": scalar(-0.8)})


def test_a_policy_that_is_not_soft_optimal_is_named() -> None:
    nu = {"q": 0.2 * soft_optimum(THETA)}
    mdp, policy = finite_model(), boltzmann()
    noise = sample_noise(mdp, policy, 200, 40, seeded(44))
    states = CELLS.repeat(20, 1)
    options = {"temperature": LAMBDA, "actions": EVERY}
    with pytest.raises(UnconvergedError, match="nats from soft-optimal"):
        soft_sensitivity(mdp, policy, THETA, nu, states, noise, strict=True, **options)
    with pytest.warns(UnconvergedWarning, match="nats"):
        soft_sensitivity(mdp, policy, THETA, nu, states, noise, **options)
    # at the optimum the figure is small: 60 pairs of rollouts of a black box
    found = soft_sensitivity(mdp, policy, THETA, table_nu(), states, noise, consistency_tol=5.0, **options)
    assert found.report.converged


def test_tune_step_takes_it_as_its_sensitivity() -> None:
    log = lqr_log()
    policy, mdp = linear_noise_policy(1), lqr_model()

    def chain(J: object, theta: Params, nu: Params, *, cotangent: Params, derivative_order: int) -> Sensitivity:
        options = {"temperature": LAMBDA, "action_value": lqr_action_value, "cotangent": cotangent}
        return soft_sensitivity(mdp, policy, theta, nu, log.states[:, 0], None, **options)

    out = tune_step(
        mdp,
        policy,
        MODEL,
        soft(MODEL),
        log,
        None,
        real_reward=None,
        real_discount=0.95,
        objective=lambda theta, nu: -gaussian_cost(theta, nu, SIM)[0].trace(),
        optimum=lambda theta, nu: soft(theta),
        gradient=logged_policy_gradient,
        sensitivity=chain,
    )
    _, pull = torch.func.vjp(soft, MODEL)
    for key, value in pull(out.grad_nu)[0].items():
        torch.testing.assert_close(out.grad[key], value, rtol=1e-7, atol=1e-8)
    assert out.report.converged


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"taken": stack([0.0])}, "one action per state"),
        ({"action_value": None}, "pass noise"),
        ({"action_value": lambda th, s, a: th["A"].sum()}, "must be"),
        ({"temperature": -1.0}, "temperature"),
        ({"cotangent": {"gain": stack([1.0])}}, "lacks the keys"),
    ],
)
def test_refusals(options: dict[str, object], words: str) -> None:
    given = {"temperature": LAMBDA, "action_value": lqr_action_value} | options
    with pytest.raises((ValueError, KeyError), match=words):
        soft_sensitivity(lqr_model(), linear_noise_policy(1), MODEL, soft(MODEL), draw(45, 5, 2), None, **given)
