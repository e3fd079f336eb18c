"""Constraint margins and gradients from real data and from draws, against exact linear-Gaussian answers."""

import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import t as student
from torch import Tensor

from sim2real import (
    Constraint,
    Params,
    Rollout,
    constraint_gradient,
    linear_policy,
    measured_constraint,
    posterior_draws,
    rollout,
    sample_noise,
    worst_case_draws,
    worst_case_gradient,
)
from sim2real.estimators import logged_policy_gradient, transitions
from sim2real.safety import constraint_signal, exceedance, unseen_share, upper_limit
from sim2real.simulators import linear_gaussian
from sim2real.solvers import lyapunov
from tests.problems import scalar, seeded, stack

A, B = stack([1.0, 0.2], [-0.1, 0.9]), stack([0.1], [0.3])
W, STD, GAMMA = 0.05 * torch.eye(2, dtype=torch.float64), 0.4, 0.9
NU = {"gain": stack([0.5, 0.8])}
MDP = linear_gaussian(A, B, noise_covariance=W)
EFFORT = Constraint("effort", lambda s, a, following: a.square().sum(-1), limit=0.6, discount=GAMMA)


def real_log(policy_std: float, batch: int, horizon: int, seed: int) -> Rollout:
    policy = linear_policy(1, std=policy_std)
    noise = sample_noise(MDP, policy, batch, horizon, seeded(seed))
    return rollout(MDP, policy, {"A": A, "B": B}, NU, noise)


def mean_effort(nu: Params) -> Tensor:
    """Exact discounted time average of a^2 for `a = -K s` without exploration, from s_0 ~ N(0, I)."""
    K = nu["gain"]
    start = torch.eye(2).double() + GAMMA / (1 - GAMMA) * W
    X = lyapunov((A - B @ K).mT, start, GAMMA)
    return (1 - GAMMA) * (K @ X @ K.mT).sum()


def test_mean_constraint_from_logged_data() -> None:
    leaf = {"gain": NU["gain"].clone().requires_grad_()}
    exact = mean_effort(leaf)
    exact.backward()
    exact = exact.detach()
    found = constraint_gradient(EFFORT, linear_policy(1), NU, real_log(STD, 100, 40, 0))
    # four jackknife standard errors on three numbers: a false alarm in about 1000 seeds
    assert abs(float(found.estimate - exact)) < 4 * float(found.stderr)
    assert leaf["gain"].grad is not None
    stderr = (1 - GAMMA) * found.info["stderr"]
    assert bool(((found.grad["gain"] + leaf["gain"].grad).flatten().abs() < 4 * stderr).all())
    assert float(found.stderr) < 0.15 * float(exact)
    # a skewed cost: the upper limit is above that of Student's t
    assert float(found.value) < 0.6 - float(found.estimate) - float(student.ppf(0.95, 31) * found.stderr)
    face = constraint_gradient(replace(EFFORT, confidence=0.5), linear_policy(1), NU, real_log(STD, 100, 40, 0))
    assert float(face.value) == pytest.approx(0.6 - float(found.estimate), rel=1e-12)
    assert found.trusted


def test_transitions_are_priced_anew() -> None:
    log = real_log(STD, 20, 40, 1)
    flat = transitions(log)
    once = constraint_gradient(EFFORT, linear_policy(1), NU, log)
    again = constraint_gradient(EFFORT, linear_policy(1), NU, flat)
    torch.testing.assert_close(again.value, once.value)
    assert measured_constraint(EFFORT, flat) == pytest.approx(measured_constraint(EFFORT, log))


def test_upper_limit_of_exponential_means() -> None:
    # the mean of 40 exponential draws: 95 % limits must hold in 95 %; 600 seeds give a standard error of 0.9 %, and the
    # bootstrap-t is known to lose about 1 % at this size; Student's t holds in about 90.5 %
    draws = -torch.rand(600, 40, generator=seeded(0), dtype=torch.float64).log()
    held, plain = 0, 0
    for x in draws:
        replicates = (x.sum() - x) / 39
        stderr = x.std() / 40**0.5
        held += float(upper_limit(x.mean(), stderr, replicates, 0.95)) >= 1.0
        plain += float(x.mean() + float(student.ppf(0.95, 39)) * stderr) >= 1.0
    assert held / 600 > 0.95 - 0.01 - 4 * 0.009
    assert held > plain + 6


def test_upper_limit_of_few_groups_and_of_none() -> None:
    x = torch.tensor([1.0, 2.0, 4.0]).double()
    limit = upper_limit(x.mean(), x.std() / 3**0.5, (x.sum() - x) / 2, 0.9)
    assert float(limit) == pytest.approx(float(x.mean() + student.ppf(0.9, 2) * x.std() / 3**0.5))
    assert float(upper_limit(scalar(1.0), scalar(0.5), torch.zeros(0), 0.95)) == pytest.approx(
        1 + 0.5 * 1.644854, rel=1e-6
    )
    assert float(upper_limit(scalar(1.0), scalar(0.0), torch.ones(9), 0.95)) == 1.0


def share_above(K: Tensor, limit: float, a: float, b: float) -> Tensor:
    """Exact discounted share of steps with |s| > limit of `s+ = (a - b K) s + w`, s_0 ~ N(0, 1), 400 steps."""
    variance, total = scalar(1.0), scalar(0.0)
    for t in range(400):
        total = total + (1 - GAMMA) * GAMMA**t * torch.special.erfc(limit / (2 * variance).sqrt())
        variance = (a - b * K.squeeze()) ** 2 * variance + 0.3
    return total


@pytest.mark.parametrize("width", [0.0, 0.2])
def test_chance_constraint_from_logged_data(width: float) -> None:
    a, b = 0.9, 0.5
    model = linear_gaussian(stack([a]), stack([b]), noise_covariance=stack([0.3]))
    nu = {"gain": stack([0.6])}
    policy = linear_policy(1, std=0.5)
    noise = sample_noise(model, policy, 200, 50, seeded(0))
    log = rollout(model, policy, {"A": stack([a]), "B": stack([b])}, nu, noise)
    near = Constraint(
        "range", lambda s, u, following: s[:, 0].abs(), 1.2, "chance", GAMMA, probability=0.3, width=width
    )

    def features(s: Tensor, u: Tensor) -> Tensor:
        """The signal itself and smooth even functions of the expected next state, which span what follows."""
        ahead = a * s + b * u
        signal = exceedance(s[:, :1].abs(), 1.2, width)
        return torch.cat([torch.ones_like(s), signal, *(torch.exp(-((ahead / k) ** 2)) for k in (0.5, 1.0, 2.0))], -1)

    gradient = partial(logged_policy_gradient, features=features)
    found = constraint_gradient(near, linear_policy(1), nu, log, gradient=gradient)
    leaf = nu["gain"].clone().requires_grad_()
    exact = share_above(leaf, 1.2, a, b)
    exact.backward()
    exact = exact.detach()
    assert leaf.grad is not None
    if width == 0.0:
        # four standard errors, and 3 % that the three bumps cannot express
        assert abs(float(found.estimate - exact)) < 4 * float(found.stderr) + 0.03 * float(exact)
        allowed = 4 * (1 - GAMMA) * float(found.info["stderr"]) + 0.1 * abs(float(leaf.grad))
        assert abs(float(found.grad["gain"] + leaf.grad)) < allowed
    else:
        # the smoothed share lies between that of the limit and that of limit - width
        low, high = float(exact), float(share_above(nu["gain"], 1.0, a, b))
        assert low < float(found.estimate) < high
    assert float(found.grad["gain"]) > 0  # more gain is safer here
    assert float(found.value) < 0.3 - float(found.estimate) - float(found.stderr)


@pytest.mark.parametrize("width", [0.0, 0.1])
def test_a_cost_that_is_not_a_number_is_not_safe(width: float) -> None:
    lost = replace(EFFORT, kind="chance", width=width, cost=lambda s, a, following: a[:, 0] * math.nan)
    for judge in (partial(constraint_gradient, lost, linear_policy(1), NU), partial(measured_constraint, lost)):
        with pytest.raises(ValueError, match="not finite"):
            judge(real_log(STD, 4, 10, 0))


def test_what_was_never_seen_is_not_impossible() -> None:
    # 20 episodes without the event: its probability is below p with 95 % confidence where (1 - p)^20 = 0.05
    assert (1 - unseen_share(20, 0.95)) ** 20 == pytest.approx(0.05)
    never = replace(EFFORT, kind="chance", limit=1e6, probability=0.1)
    few = constraint_gradient(never, linear_policy(1), NU, real_log(STD, 20, 40, 0))
    assert float(few.estimate) == 0.0
    assert float(few.value) == pytest.approx(0.1 - (1 - 0.05 ** (1 / 20)))
    assert float(few.value) < 0
    assert float(constraint_gradient(never, linear_policy(1), NU, real_log(STD, 40, 40, 0)).value) > 0
    face = constraint_gradient(replace(never, confidence=0.5), linear_policy(1), NU, real_log(STD, 20, 40, 0))
    assert float(face.value) == pytest.approx(0.1)


def test_smoothed_indicator_is_an_upper_bound_and_smooth() -> None:
    cost = torch.linspace(-2, 2, 4001, dtype=torch.float64)
    plain, smooth = exceedance(cost, 0.5), exceedance(cost, 0.5, 0.3)
    assert bool((smooth >= plain).all())
    assert bool((smooth[cost <= 0.2] == 0).all())
    torch.testing.assert_close(exceedance(cost, 0.5005, 1e-9), exceedance(cost, 0.5005))
    for edge in (0.2, 0.5):  # two derivatives vanish at both ends
        at = torch.tensor([edge - 1e-6, edge + 1e-6], dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(exceedance(at, 0.5, 0.3).sum(), at, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), at)
        assert float(slope.detach().abs().max()) < 1e-6
        assert float(bend.abs().max()) < 1e-2


def test_measured_constraint_by_hand() -> None:
    states = torch.tensor([[[0.0], [1.0], [2.0]], [[0.0], [3.0], [9.0]]]).double()
    log = Rollout(states, torch.zeros(2, 2, 1).double(), torch.zeros(2, 2).double())
    cost = Constraint("s", lambda s, a, following: following[:, 0], 1.0, discount=0.5)
    # weights 2/3 and 1/3: (1 * 2 + 2) / 3 and (3 * 2 + 9) / 3
    mean, stderr = measured_constraint(cost, log)
    assert mean == pytest.approx((4 / 3 + 5) / 2)
    assert stderr == pytest.approx((5 - 4 / 3) / 2)
    chance = replace(cost, kind="chance", limit=2.5)
    assert measured_constraint(chance, log)[0] == pytest.approx(0.5)
    assert measured_constraint(cost, Rollout(states[:1], log.actions[:1], log.rewards[:1]))[1] == math.inf
    # the first episode ends after its second step: weights 1/2 and 1/4, then cost 0
    over = measured_constraint(cost, log, terminal=lambda following: following[:, 0] == 2.0)[0]
    assert over == pytest.approx((1 + 5) / 2)
    assert constraint_signal(cost)(states[0, :2], log.actions[0], states[0, 1:]).tolist() == [1.0, 2.0]


def worst(width: float, nu: Params = NU, count: int = 5) -> Any:
    constraint = replace(EFFORT, kind="worst_case", width=width)
    draws = posterior_draws(
        {"A": A, "B": B}, ("B",), 0.1 * torch.eye(2).double(), torch.randn(count, 2, generator=seeded(3)).double()
    )
    policy = linear_policy(1)
    noise = sample_noise(MDP, policy, 16, 30, seeded(4))
    return worst_case_gradient(constraint, MDP, policy, draws, nu, noise), draws, noise


def test_worst_case_by_plain_loops() -> None:
    found, draws, noise = worst(0.0)
    costs = []
    for k in range(5):
        total, weights = 0.0, 0.0
        state = noise.initial.numpy()
        for t in range(30):
            action = -state @ NU["gain"].numpy().T
            total += GAMMA**t * float((action**2).mean())
            weights += GAMMA**t
            kick = noise.process[:, t].numpy() @ np.linalg.cholesky(W.numpy()).T
            state = state @ A.numpy().T + action @ draws["B"][k].numpy().T + kick
        costs.append(total / weights)
    np.testing.assert_allclose(found.info["costs"], costs, rtol=1e-12)
    assert float(found.estimate) == pytest.approx(max(costs), rel=1e-12)
    assert float(found.value) == pytest.approx(0.6 - max(costs), rel=1e-12)
    smooth = worst(0.01)[0]
    assert max(costs) <= float(smooth.estimate) <= max(costs) + 0.01 * math.log(5)


@pytest.mark.parametrize("width", [0.0, 0.05])
def test_worst_case_gradient_by_central_differences(width: float) -> None:
    found = worst(width)[0].grad["gain"]
    for k in range(2):
        step = 1e-5 * torch.eye(2).double()[k : k + 1]
        ends = [float(worst(width, {"gain": NU["gain"] + s * step})[0].value) for s in (1, -1)]
        assert float(found[0, k]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)


def test_number_of_draws_for_a_probable_worst_case() -> None:
    # 0.95^K <= 0.05 from K = 59 on (Tempo, Bai and Dabbene 1997)
    assert worst_case_draws(replace(EFFORT, kind="worst_case")) == 59
    # what fewer draws are worth is said: 1 - 0.95^5
    assert float(worst(0.0)[0].info["confidence"]) == pytest.approx(0.2262190625)


def test_what_cannot_be_trusted_says_so() -> None:
    log, policy = real_log(STD, 20, 40, 1), linear_policy(1)
    plain = logged_policy_gradient(policy, NU, transitions(log), real_discount=GAMMA, groups=0)
    kept = {key: value for key, value in plain.info.items() if not key.startswith("return_")}
    cases = (
        (replace(plain, info=kept), ""),
        (replace(plain, value=plain.info["return_high"] + 1), "outside"),
        (replace(plain, value=scalar(math.nan)), "nan"),
        (replace(plain, info=kept | {"bellman_radius": scalar(1.1)}), "unstable"),
    )
    at_face_value = replace(EFFORT, confidence=0.5)
    bare = constraint_gradient(EFFORT, policy, NU, log, gradient=lambda *_, **__: plain)
    assert not bare.trusted
    assert "no standard error for the confidence 0.95" in bare.reason
    for estimate, words in cases:
        found = constraint_gradient(at_face_value, policy, NU, log, gradient=lambda *_, known=estimate, **__: known)
        assert found.trusted == (not words)
        assert words in found.reason
        assert float(found.stderr) == 0.0


@pytest.mark.parametrize(
    "change",
    [
        {"limit": math.inf},
        {"kind": "median"},
        {"discount": 1.0},
        {"confidence": 0.2},
        {"probability": 0.0},
        {"width": -1.0},
    ],
)
def test_constraints_that_make_no_sense(change: dict) -> None:
    with pytest.raises(ValueError, match=f"'effort' has {next(iter(change))}"):
        replace(EFFORT, **change)


def test_inputs_that_do_not_fit() -> None:
    log, policy = real_log(STD, 4, 10, 1), linear_policy(1)
    noise = sample_noise(MDP, policy, 4, 10, seeded(0))
    worst_case = replace(EFFORT, kind="worst_case")
    with pytest.raises(ValueError, match="use worst_case_gradient"):
        constraint_gradient(worst_case, policy, NU, log)
    with pytest.raises(ValueError, match="use constraint_gradient"):
        worst_case_gradient(EFFORT, MDP, policy, {"A": A[None], "B": B[None]}, NU, noise)
    with pytest.raises(ValueError, match="same number K"):
        worst_case_gradient(worst_case, MDP, policy, {"A": A[None], "B": B.expand(2, 2, 1)}, NU, noise)
    with pytest.raises(ValueError, match=r"draws \[1\] is not finite"):
        worst_case_gradient(
            worst_case, MDP, policy, {"A": torch.stack([A, 1e60 * A]), "B": torch.stack([B, B])}, NU, noise
        )
    wrong = replace(EFFORT, cost=lambda s, a, following: s)
    with pytest.raises(ValueError, match="cost of 'effort' gave"):
        measured_constraint(wrong, transitions(log))


@pytest.mark.parametrize("page", ["safety", "equivalence"])
def test_the_documented_snippets_run(page: str) -> None:
    text = (Path(__file__).parents[1] / "docs" / f"{page}.rst").read_text()
    blocks = re.findall(r"\.\. code-block:: python\n\n((?:   .*\n|\n)+)", text)
    assert len(blocks) >= 2
    scope: dict = {}
    for block in blocks:
        exec(compile(dedent(block), f"docs/{page}.rst", "exec"), scope)
