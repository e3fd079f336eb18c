"""Certificates against truths in closed form: quadratic returns, scalar optima, box QPs, critics of known error."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from scipy.stats import binom
from torch import Tensor

from benchmarks import certificate_bad
from benchmarks.certificate_bad import CRITIC, claimed, critic_estimate, real_rollouts
from benchmarks.certificate_good import box_layer
from sim2real.estimators import audit, certify, certify_estimate, logged_policy_gradient, policy_sensitivity
from sim2real.params import Params
from sim2real.policy import linear_policy
from sim2real.solve_report import Sensitivity, SolveReport, UnconvergedError
from sim2real.solvers import box_qp, lyapunov
from tests.problems import scalar, seeded, spectrum, stack

# ------------------------------------------------------------------------------- a quadratic return, known in full

A = spectrum([0.5, 1.0, 2.0, 5.0])
B = torch.randn(4, 3, generator=seeded(2), dtype=torch.float64)
THETA = {"t": torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)}
G = {"x": stack(1.0, -0.5, 0.25, 2.0)}


def quadratic(theta: Params, nu: Params) -> Tensor:
    """`-x'A x / 2 + x'B t`, maximal at `A^-1 B t`."""
    x = nu["x"]
    return -0.5 * x @ A @ x + x @ B @ theta["t"]


NU = {"x": torch.linalg.inv(A) @ B @ THETA["t"]}
TRUTH = {"t": B.T @ torch.linalg.inv(A) @ G["x"]}
SIZE = float(TRUTH["t"].norm())


def off_by(share: float) -> Params:
    """The true product with a relative error of this size."""
    direction = torch.randn(3, generator=seeded(5), dtype=torch.float64)
    return {"t": TRUTH["t"] + share * SIZE * direction / direction.norm()}


def test_an_exact_product_is_certified() -> None:
    certificate = certify(quadratic, THETA, NU, policy_sensitivity(quadratic, THETA, NU, cotangent=G), G)
    assert certificate.holds
    assert certificate.reasons == ()
    assert certificate.audit_error is None
    assert certificate.relative_bound < 1e-12
    assert certificate.info["product_norm"] == pytest.approx(SIZE, rel=1e-12)


@pytest.mark.parametrize("share", [1e-8, 1e-5, 1e-2])
def test_the_bound_is_the_error_of_the_product(share: float) -> None:
    certificate = certify(quadratic, THETA, NU, claimed(off_by(share)), G)
    assert certificate.holds
    # nu is exact, so the gap is the error; the uncertainty of the recomputation is rounding, 1e-13 relative
    assert share * SIZE <= certificate.error_bound * (1 + 1e-6)
    assert certificate.error_bound <= 1.001 * share * SIZE


def test_a_product_off_by_more_than_the_tolerance_is_refused() -> None:
    certificate = certify(quadratic, THETA, NU, claimed(off_by(0.06)), G)
    assert not certificate.holds
    assert "differs by" in certificate.reasons[0]
    assert certify(quadratic, THETA, NU, claimed(off_by(0.06)), G, tol=0.1).holds
    assert certify(quadratic, THETA, NU, claimed(off_by(0.06)), G, atol=0.1 * SIZE).holds


def test_scale_sets_the_units_of_the_norm() -> None:
    wrong = {"t": TRUTH["t"] + stack(0.0, 0.0, 0.2 * SIZE)}
    assert not certify(quadratic, THETA, NU, claimed(wrong), G).holds
    certificate = certify(quadratic, THETA, NU, claimed(wrong), G, scale={"t": stack(1.0, 1.0, 1e-3)})
    assert certificate.holds
    assert certificate.error_bound == pytest.approx(2e-4 * SIZE, rel=1e-6)


def test_damping_shows_as_the_error_it_makes() -> None:
    damped = policy_sensitivity(quadratic, THETA, NU, cotangent=G, damping=0.05)
    truth = B.T @ torch.linalg.inv(A + 0.05 * torch.eye(4, dtype=torch.float64)) @ G["x"]
    error = float((truth - TRUTH["t"]).norm())
    assert certify(quadratic, THETA, NU, damped, G).error_bound == pytest.approx(error, rel=1e-6)


# ------------------------------------------------------------------------------------------------ stationarity


def quartic(theta: Params, nu: Params) -> Tensor:
    """Maximal where `x + x^3 = t`, whence dx/dt = 1 / (1 + 3 x^2)."""
    return theta["t"] * nu["x"] - nu["x"] ** 2 / 2 - nu["x"] ** 4 / 4


@pytest.mark.parametrize("distance", [1e-7, 1e-4, 1e-2])
def test_the_distance_from_the_optimum_shows_as_the_error_it_makes(distance: float) -> None:
    theta, nu, one = {"t": scalar(2.0)}, {"x": scalar(1.0 + distance)}, {"x": scalar(1.0)}
    sensitivity = policy_sensitivity(quartic, theta, nu, cotangent=one, stationarity_tol=0.5)
    error = abs(float(sensitivity.vjp(one)["t"]) - 0.25)
    certificate = certify(quartic, theta, nu, sensitivity, one)
    assert certificate.holds
    assert error <= certificate.error_bound <= 1.1 * error


def test_an_early_stop_is_refused_as_such() -> None:
    theta, nu, one = {"t": scalar(2.0)}, {"x": scalar(0.8)}, {"x": scalar(1.0)}
    certificate = certify(quartic, theta, nu, claimed({"t": scalar(1 / (1 + 3 * 0.64))}), one)
    assert not certificate.holds
    assert "not stationary" in certificate.reasons[0]
    assert certificate.error_bound == pytest.approx(1 / (1 + 3 * 0.64) - 0.25, rel=1e-6)


def test_a_search_that_does_not_settle_is_refused() -> None:
    # maximal at tan t; from |x| > 1.39 Newton overshoots more and more. At nu dx/dt seems to be 1 + x^2, it is 1
    J = lambda theta, nu: theta["t"] * nu["x"] - nu["x"] * torch.atan(nu["x"]) + 0.5 * torch.log1p(nu["x"] ** 2)
    theta, nu, one = {"t": scalar(0.0)}, {"x": scalar(2.0)}, {"x": scalar(1.0)}
    certificate = certify(J, theta, nu, claimed({"t": scalar(5.0)}), one)
    assert not certificate.holds
    assert certificate.error_bound >= 4.0


def test_a_step_out_of_the_domain_of_j_ends_the_search_for_the_optimum() -> None:
    # stable only for |a - x| < 1; from 0.85 above the optimum Newton overshoots into the unstable side
    def J(theta: Params, nu: Params) -> Tensor:
        K = nu["x"].reshape(1, 1)
        return -lyapunov(theta["a"].reshape(1, 1) - K, 1 + 0.01 * K * K).sum()

    theta, nu, one = {"a": scalar(0.5)}, {"x": scalar(1.45)}, {"x": scalar(1.0)}
    certificate = certify(J, theta, nu, claimed({"a": scalar(0.5)}), one)
    assert not certificate.holds


def test_a_nu_from_which_newton_cannot_move_is_refused() -> None:
    def J(theta: Params, nu: Params) -> Tensor:
        if float(nu["x"].detach()) > 0.9:
            raise ValueError("unstable")
        return quartic(theta, nu)

    theta, nu, one = {"t": scalar(2.0)}, {"x": scalar(0.8)}, {"x": scalar(1.0)}
    certificate = certify(J, theta, nu, claimed({"t": scalar(1 / (1 + 3 * 0.64))}), one)
    assert not certificate.holds
    assert any("no maximum is near" in reason for reason in certificate.reasons)


def test_a_network_stopped_early_is_refused_where_its_hessian_is_singular() -> None:
    # six parameters for three actions y = M x with return -|y + y^3 - t|^2 / 2: the derivative of y is 1 / (1 + 3 y^2)
    M, c, y = torch.randn(3, 6, generator=seeded(1), dtype=torch.float64), stack(1.0, -2.0, 0.5), stack(0.6, -0.5, 0.7)
    J = lambda theta, nu: -((M @ nu["x"] + (M @ nu["x"]) ** 3 - theta["t"]) ** 2).sum() / 2
    theta, g = {"t": y + y**3}, {"x": M.T @ c}
    claim = lambda at: claimed({"t": c / (1 + 3 * at**2)})
    best, early = ({"x": torch.linalg.pinv(M) @ at} for at in (y, 0.8 * y))
    assert certify(J, theta, best, claim(y), g).holds
    certificate = certify(J, theta, early, claim(0.8 * y), g)
    assert not certificate.holds
    assert certificate.error_bound >= float((c / (1 + 3 * y**2) - c / (1 + 1.92 * y**2)).norm())


def test_a_maximum_that_is_none_is_refused() -> None:
    saddle = lambda theta, nu: -((nu["x"][0] - theta["t"]) ** 2) + 0.1 * nu["x"][1] ** 2
    theta, nu = {"t": scalar(1.0)}, {"x": stack(1.0, 0.0)}
    certificate = certify(saddle, theta, nu, claimed({"t": scalar(1.0)}), {"x": stack(1.0, 0.0)})
    assert not certificate.holds
    assert math.isinf(certificate.error_bound)
    assert "no maximum" in certificate.reasons[0]
    flat = lambda theta, nu: (nu["x"] * theta["t"]).sum()
    certificate = certify(flat, theta, nu, claimed({"t": scalar(1.0)}), {"x": stack(1.0, 0.0)})
    assert "J_nunu = 0" in certificate.reasons[0]


def test_a_kink_at_nu_is_refused() -> None:
    kinked = lambda theta, nu: -((nu["x"] - theta["t"]) ** 2) - 4 * torch.relu(nu["x"] - theta["t"]) ** 2
    theta, nu = {"t": scalar(0.0)}, {"x": scalar(0.0)}
    certificate = certify(kinked, theta, nu, claimed({"t": scalar(1.0)}), {"x": scalar(1.0)})
    assert any("kink" in reason for reason in certificate.reasons)


# ------------------------------------------------------------------------------------ more parameters than actions


def test_a_singular_hessian_leaves_the_product_certified() -> None:
    # 3 actions of 6 parameters, actions M x: whatever x is, the product of g = M'c is c
    M, c = torch.randn(3, 6, generator=seeded(1), dtype=torch.float64), stack(1.0, -2.0, 0.5)
    J = lambda theta, nu: -((M @ nu["x"] - theta["t"]) ** 2).sum() / 2
    theta, g = {"t": stack(0.3, 0.1, -0.7)}, {"x": M.T @ c}
    nu = {"x": torch.linalg.pinv(M) @ theta["t"]}
    good = certify(J, theta, nu, claimed({"t": c * (1 + 1e-4)}), g)
    assert good.holds
    assert 1e-4 <= good.relative_bound < 1e-3
    assert good.info["damping"] > 0
    eye = torch.eye(6, dtype=torch.float64)
    damped = M @ torch.linalg.inv(M.T @ M + 0.5 * eye) @ g["x"]
    error = float((damped - c).norm())
    bad = certify(J, theta, nu, claimed({"t": damped}), g)
    assert not bad.holds
    assert bad.error_bound == pytest.approx(error, rel=1e-3)


# -------------------------------------------------------------------------------------------- wrong derivatives


class Sine(torch.autograd.Function):
    """Once differentiable: its second derivative is silently zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = x.detach().cos()
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.slope


def wavy(sine: Callable[[Tensor], Tensor], theta: Params, nu: Params) -> Tensor:
    """Maximal where `cos(x + t) = 2 x`, whence dx/dt = -sin(x + t) / (2 + sin(x + t))."""
    return sine(nu["x"] + theta["t"]) - nu["x"] ** 2


def test_silent_zeros_are_caught_and_differences_are_not_fooled() -> None:
    theta, x = {"t": scalar(0.5)}, scalar(0.4)
    for _ in range(20):
        x = x - (torch.cos(x + 0.5) - 2 * x) / (-torch.sin(x + 0.5) - 2)
    truth = -torch.sin(x + 0.5) / (2 + torch.sin(x + 0.5))
    J, nu, one = partial(wavy, Sine.apply), {"x": x}, {"x": scalar(1.0)}
    certificate = certify(J, theta, nu, policy_sensitivity(J, theta, nu, cotangent=one), one)
    assert not certificate.holds
    assert any("silently zero" in reason for reason in certificate.reasons)
    first = policy_sensitivity(J, theta, nu, cotangent=one, derivative_order=1)
    certificate = certify(J, theta, nu, first, one, derivative_order=1)
    assert certificate.holds
    assert abs(float(first.vjp(one)["t"] - truth)) <= certificate.error_bound < 1e-6


def test_what_is_not_finite_is_a_reason() -> None:
    nan = {"t": TRUTH["t"] * math.nan}
    assert "not finite" in certify(quadratic, THETA, NU, claimed(nan), G).reasons[0]
    assert "cotangent is not finite" in certify(quadratic, THETA, NU, claimed(TRUTH), {"x": G["x"] / 0}).reasons[0]
    rough = lambda theta, nu: quadratic(theta, nu) + (nu["x"] - NU["x"]).norm()  # no derivative at NU
    assert "not finite" in certify(rough, THETA, NU, claimed(TRUTH), G).reasons[0]


def test_a_backend_that_refuses_is_a_reason() -> None:
    def vjp(g: Params) -> Params:
        raise UnconvergedError("no")

    refusing = Sensitivity(vjp, vjp, SolveReport(False, 1.0, 0))
    assert certify(quadratic, THETA, NU, refusing, G).reasons == ("the backend refused: no",)


def test_a_zero_cotangent_has_a_zero_product() -> None:
    zero = {"x": torch.zeros(4, dtype=torch.float64)}
    assert certify(quadratic, THETA, NU, claimed({"t": torch.zeros(3)}), zero).holds
    assert not certify(quadratic, THETA, NU, claimed(TRUTH), zero).holds


@pytest.mark.parametrize("size", [1e-180, 1e180])
def test_a_cotangent_beyond_the_range_of_norms_is_refused(size: float) -> None:
    wrong = {"t": 3 * size * TRUTH["t"]}  # its norm is 0 or infinite, and so would be the bound
    certificate = certify(quadratic, THETA, NU, claimed(wrong), {"x": size * G["x"]})
    assert not certificate.holds
    assert "rescale" in certificate.reasons[0]


def test_other_shapes_are_errors_and_are_never_broadcast() -> None:
    for product in ({"t": TRUTH["t"][None]}, {"t": TRUTH["t"][:1]}, {"t": TRUTH["t"] + 1j}):
        with pytest.raises(ValueError, match="product of the backend"):
            certify(quadratic, THETA, NU, claimed(product), G)
    with pytest.raises(KeyError, match="product of the backend"):
        certify(quadratic, THETA, NU, claimed({}), G)
    with pytest.raises(ValueError, match="cotangent of certify"):
        certify(quadratic, THETA, NU, claimed(TRUTH), {"x": G["x"][None]})
    for scale in ({"t": scalar(1.0)}, {"t": stack(1.0, -1.0, 1.0)}, {"t": stack(1.0, math.nan, 1.0)}):
        with pytest.raises(ValueError, match="scale"):
            certify(quadratic, THETA, NU, claimed(TRUTH), G, scale=scale)


def test_bad_options_are_errors() -> None:
    good = claimed(TRUTH)
    for options in ({"tol": 0.0}, {"atol": -1.0}, {"directions": -1}):
        with pytest.raises(ValueError, match="need tol"):
            certify(quadratic, THETA, NU, good, G, **options)
    with pytest.raises(ValueError, match="nothing to judge by"):
        certify(None, THETA, NU, good, G)
    with pytest.raises(ValueError, match="nothing to judge by"):
        certify(quadratic, THETA, NU, good, G, derivative_order=0)
    with pytest.raises(KeyError, match="cotangent"):
        certify(quadratic, THETA, NU, good, {"y": G["x"]})
    with pytest.raises(KeyError, match="scale"):
        certify(quadratic, THETA, NU, good, G, scale={"y": G["x"]})
    with pytest.raises(ValueError, match="scalar"):
        certify(lambda theta, nu: nu["x"] * theta["t"].sum(), THETA, NU, good, G)
    with pytest.raises(ValueError, match="neither on theta nor on nu"):
        certify(lambda theta, nu: scalar(1.0), THETA, NU, good, G)


# ------------------------------------------------------------------------------------------------------- audits


def linear_optimum(theta: Params, nu0: Params) -> Params:
    return {"x": torch.linalg.inv(A) @ B @ theta["t"]}


def test_an_audit_of_all_parameters_measures_the_error() -> None:
    found = audit(linear_optimum, THETA, NU, off_by(0.03), G, directions=3)
    assert found.error == pytest.approx(0.03 * SIZE, rel=1e-6)  # three units of theta: the norm itself
    assert found.size == pytest.approx(SIZE, rel=1e-6)
    assert found.kink == 0.0
    torch.testing.assert_close(found.measured, TRUTH["t"], rtol=1e-6, atol=1e-8)


def test_the_limit_of_an_audit_has_its_stated_confidence() -> None:
    # 95 % at 2 random directions of 3 parameters; the binomial range holds with probability 0.9998
    held = sum(
        audit(linear_optimum, THETA, NU, off_by(0.03), G, directions=2, step=1e-3, generator=seeded(seed)).bound
        >= 0.03 * SIZE
        for seed in range(200)
    )
    assert binom.ppf(1e-4, 200, 0.95) <= held <= binom.ppf(1 - 1e-4, 200, 0.95)


def test_an_audit_contradicts_a_wrong_objective() -> None:
    other = lambda theta, nu: quadratic({"t": 1.2 * theta["t"]}, nu)
    nu = {"x": 1.2 * NU["x"]}
    sensitivity = policy_sensitivity(other, THETA, nu, cotangent=G)
    assert certify(other, THETA, nu, sensitivity, G).holds
    certificate = certify(other, THETA, nu, sensitivity, G, optimum=linear_optimum)
    assert not certificate.holds
    assert "move otherwise" in certificate.reasons[0]
    assert certificate.audit_error == pytest.approx(0.2 * SIZE, rel=1e-6)


def test_an_audit_runs_policy_optimum_where_no_trainer_is_given() -> None:
    certificate = certify(quadratic, THETA, NU, claimed(TRUTH), G, directions=2)
    assert certificate.holds
    assert certificate.audit_error is not None
    assert certificate.audit_error < 1e-6 * SIZE


def test_a_layer_without_an_objective_is_certified_by_re_solves() -> None:
    right = certify(None, THETA, NU, claimed(off_by(1e-3)), G, optimum=linear_optimum)
    assert right.holds
    assert right.error_bound == pytest.approx(1e-3 * SIZE, rel=1e-3)
    wrong = certify(None, THETA, NU, claimed(off_by(0.1)), G, optimum=linear_optimum)
    assert not wrong.holds
    assert "move otherwise" in wrong.reasons[0]


def test_a_noisy_trainer_cannot_certify_but_does_not_contradict() -> None:
    generator = seeded(3)

    def trainer(theta: Params, nu0: Params) -> Params:
        return {"x": linear_optimum(theta, nu0)["x"] + torch.randn(4, generator=generator, dtype=torch.float64)}

    alone = certify(None, THETA, NU, claimed(TRUTH), G, optimum=trainer)
    assert not alone.holds
    assert "too noisy" in alone.reasons[0]
    assert certify(quadratic, THETA, NU, claimed(TRUTH), G, optimum=trainer).holds


def test_a_failed_re_solve_leaves_no_bound() -> None:
    broken = lambda theta, nu0: {"x": NU["x"] * math.nan}
    assert math.isinf(audit(broken, THETA, NU, TRUTH, G).bound)
    assert not certify(None, THETA, NU, claimed(TRUTH), G, optimum=broken).holds


def test_a_re_solve_that_raises_is_a_reason() -> None:
    def fragile(theta: Params, nu0: Params) -> Params:
        if not torch.equal(theta["t"], THETA["t"]):
            raise ValueError("infeasible there")
        return NU

    certificate = certify(None, THETA, NU, claimed(TRUTH), G, optimum=fragile)
    assert certificate.reasons == ("a re-solve near theta failed, so nothing bounds the error: infeasible there",)


def test_fixed_parameters_are_neither_moved_nor_counted() -> None:
    wrong = {"t": TRUTH["t"] + stack(0.0, SIZE, 0.0)}
    units = {"t": stack(1.0, 0.0, 2.0)}
    found = audit(linear_optimum, THETA, NU, wrong, G, directions=2, scale=units)
    assert found.error < 1e-6 * SIZE
    assert found.size == pytest.approx(float((units["t"] * TRUTH["t"]).norm()), rel=1e-6)
    with pytest.raises(ValueError, match="zero everywhere"):
        audit(linear_optimum, THETA, NU, wrong, G, scale={"t": torch.zeros(3)})


def test_kinks_are_told_from_curvature() -> None:
    theta, nu, g = {"t": scalar(0.0)}, {"x": scalar(0.0)}, {"x": scalar(1.0)}
    clipped = lambda th, nu0: {"x": box_qp(stack([1.0]), -th["t"].reshape(1), -1.0, 0.0).x[0]}
    kinked = audit(clipped, theta, nu, {"t": scalar(0.0)}, g, directions=1)
    assert kinked.kink == pytest.approx(1.0, rel=1e-3)
    curved = lambda th, nu0: {"x": th["t"] + 50 * th["t"] ** 2}
    assert audit(curved, theta, nu, {"t": scalar(1.0)}, g, directions=1).kink == 0.0
    certificate = certify(None, theta, nu, claimed({"t": scalar(0.0)}), g, optimum=clipped)
    assert any("jumps" in reason for reason in certificate.reasons)


def test_audit_options() -> None:
    for options in ({"directions": 0}, {"step": 0.0}, {"step": 1.0}):
        with pytest.raises(ValueError, match="directions must be"):
            audit(linear_optimum, THETA, NU, TRUTH, G, **options)
    with pytest.raises(KeyError, match="product"):
        audit(linear_optimum, THETA, NU, {"u": TRUTH["t"]}, G)
    with pytest.raises(KeyError, match="scale"):
        audit(linear_optimum, THETA, NU, TRUTH, G, scale={"u": TRUTH["t"]})


def test_box_layers_away_from_kinks_are_certified() -> None:
    for seed in range(4):
        case = box_layer(seed)  # their truths come from scipy's active set
        assert case.certificate.holds, case


# ------------------------------------------------------------------------------------------------------ critics


def test_true_critics_pass_at_the_stated_rate_with_uniform_p_values() -> None:
    policy, gradient = linear_policy(1), partial(logged_policy_gradient, groups=4)
    found = []
    for seed in range(60):
        log = real_rollouts(CRITIC["gain"], 40, 25, exploration=0.5, seed=seed, bump=0.0)
        estimate = gradient(policy, CRITIC, log, real_discount=0.9)
        found.append(certify_estimate(estimate, policy, CRITIC, log, real_discount=0.9, gradient=gradient))
    # the moments reject a true critic with probability 1 %; being also required to matter, fewer are refused
    assert sum(not certificate.holds for certificate in found) <= binom.ppf(1 - 1e-4, 60, 0.01)
    for level in (0.05, 0.25, 0.5):  # each count lies in its binomial range with probability 0.9998
        count = sum(certificate.info["p_value"] < level for certificate in found)
        assert binom.ppf(1e-4, 60, level) <= count <= binom.ppf(1 - 1e-4, 60, level)


def test_a_biased_critic_is_refused() -> None:
    estimate, certificate = critic_estimate(0, bump=1.0)
    assert not certificate.holds
    assert "biased" in certificate.reasons[0]
    assert certificate.info["p_value"] < 1e-6
    assert float(estimate.info["bellman_radius"]) < 1  # nothing that the estimate says of itself tells it


def test_other_doubts_about_an_estimate() -> None:
    policy, log = linear_policy(1), real_rollouts(CRITIC["gain"], 60, 30, exploration=0.5, seed=0, bump=0.0)
    estimate = logged_policy_gradient(policy, CRITIC, log, real_discount=0.9)
    judge = partial(certify_estimate, policy=policy, nu=CRITIC, log=log, real_discount=0.9)
    assert judge(estimate).holds
    value = float(estimate.value)
    assert judge(estimate, measured_return=(value, 0.01)).holds
    assert "differs from the measured" in judge(estimate, measured_return=(2 * value, 0.01)).reasons[0]
    unstable = replace(estimate, info=estimate.info | {"bellman_radius": scalar(1.2)})
    assert "Bellman radius" in judge(unstable).reasons[0]
    outside = replace(estimate, info=estimate.info | {"return_low": scalar(0.0)})
    assert "outside" in judge(outside).reasons[0]
    broken = replace(estimate, value=scalar(math.nan))
    assert "not finite" in judge(broken).reasons[0]
    noisy = replace(estimate, info=estimate.info | {"stderr": torch.full((2,), 1e3, dtype=torch.float64)})
    assert "lost in noise" in judge(noisy, noise_tol=1.0).reasons[0]
    with pytest.raises(ValueError, match="need tol"):
        judge(estimate, false_alarm=0.0)
    with pytest.raises(ValueError, match="left out groups"):
        judge(estimate, gradient=partial(logged_policy_gradient, groups=4))


def test_a_log_without_noise_has_nothing_to_test() -> None:
    generator = seeded(4)
    s, a = (torch.randn(200, 1, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    from sim2real.rollout import Rollout

    log = Rollout(torch.cat([s, 0.5 * s + a], 1), a, -(s**2 + a**2).squeeze(-1))
    nu = {"gain": stack([0.2])}
    estimate = logged_policy_gradient(linear_policy(1), nu, log, real_discount=0.9)
    certificate = certify_estimate(estimate, linear_policy(1), nu, log, real_discount=0.9)
    assert certificate.info["p_value"] == 1.0
    assert certificate.holds


# ----------------------------------------------------------------------------------------------------- the bar

QUICK = ("saddle", "kinked_active_set", "unconverged_cg", "wrong_sign", "not_finite", "diverging_return")


@pytest.mark.parametrize("name", QUICK)
def test_bad_cases_are_caught(name: str) -> None:
    case = getattr(certificate_bad, name)()
    assert not case.certificate.holds
    assert not case.error <= 0.05 * case.size  # it is bad


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [make for make in certificate_bad.CASES if make.__name__ not in QUICK], ids=lambda make: make.__name__
)
def test_all_bad_cases_are_caught(make: Callable[[], certificate_bad.Case]) -> None:
    case = make()
    assert not case.certificate.holds
    assert not case.error <= 0.05 * case.size
