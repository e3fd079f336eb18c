"""The sensitivity of a policy given by a formula: against Bellman, differences, and inside `tune`."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from sim2real.estimators import explicit_sensitivity, lqr_sensitivity
from sim2real.params import Params, dot
from sim2real.solve_report import UnconvergedError
from sim2real.solvers import riccati


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


Q, R = torch.diag(t(1.0, 0.1)), torch.eye(1, dtype=torch.float64)


def system(theta: Params) -> Params:
    A = torch.eye(2, dtype=torch.float64) + 0.2 * theta["drift"] * torch.tensor([[0, 1], [0, 0]], dtype=torch.float64)
    B = torch.stack([torch.zeros_like(theta["gain"]), theta["gain"]])[:, None]
    return {"A": A, "B": B, "Q": Q, "R": R, "discount": torch.tensor(0.95, dtype=torch.float64)}


def gain(theta: Params) -> Params:
    return {"gain": riccati(**system(theta))[1]}


THETA = {"drift": torch.tensor(1.0, dtype=torch.float64), "gain": torch.tensor(0.3, dtype=torch.float64)}


def test_it_is_the_sensitivity_of_the_lqr_gain() -> None:
    ours = explicit_sensitivity(None, THETA, gain(THETA), optimum=gain)
    exact = lqr_sensitivity(system, THETA)
    cotangent, tangent = (
        {"gain": torch.tensor([[0.7, -1.1]], dtype=torch.float64)},
        {"drift": t(0.3)[0], "gain": t(2)[0]},
    )
    for key, value in exact.vjp(cotangent).items():
        torch.testing.assert_close(ours.vjp(cotangent)[key], value, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(ours.jvp(tangent)["gain"], exact.jvp(tangent)["gain"], rtol=1e-11, atol=1e-12)
    product = float(dot(ours.jvp(tangent), cotangent))
    assert float(dot(ours.vjp(cotangent), tangent)) == pytest.approx(product, rel=1e-12)
    assert ours.report.converged
    assert ours.report.residual == 0.0


def test_float32_stays_float32_and_matches_differences() -> None:
    theta = {"x": torch.tensor([0.3, -0.2])}
    optimum = lambda th: {"nu": torch.sin(th["x"]) * th["x"].sum()}
    found = explicit_sensitivity(None, theta, optimum(theta), optimum=optimum)
    pulled = found.vjp({"nu": torch.tensor([1.0, 2.0])})["x"]
    assert pulled.dtype == torch.float32
    loss = lambda x: float((torch.sin(x) * x.sum()) @ t(1.0, 2.0))
    at = theta["x"].double()
    steps = 1e-6 * torch.eye(2, dtype=torch.float64)
    differences = t(*((loss(at + e) - loss(at - e)) / 2e-6 for e in steps))
    torch.testing.assert_close(pulled.double(), differences, rtol=1e-5, atol=1e-6)  # float32


def test_another_nu_is_noticed() -> None:
    stale = {"gain": 1.1 * gain(THETA)["gain"]}
    report = explicit_sensitivity(None, THETA, stale, optimum=gain).report
    assert not report.converged
    assert report.residual == pytest.approx(0.1, rel=1e-9)
    assert "the nu given is another one" in report.status
    with pytest.raises(UnconvergedError, match="another one"):
        explicit_sensitivity(None, THETA, stale, optimum=gain, strict=True)


def test_bad_input_is_refused_by_name() -> None:
    with pytest.raises(KeyError, match="what optimum"):
        explicit_sensitivity(None, THETA, {"K": t(1)}, optimum=gain)
    found = explicit_sensitivity(None, THETA, gain(THETA), optimum=gain)
    with pytest.raises(KeyError, match="the cotangent of vjp"):
        found.vjp({"K": t(1)})
    with pytest.raises(KeyError, match="the tangent of jvp"):
        found.jvp({"K": t(1)})
    with pytest.raises(ValueError, match=r"optimum\(theta\) gave 'gain' \(1, 2\), nu holds \(2,\)"):
        explicit_sensitivity(None, THETA, {"gain": gain(THETA)["gain"][0]}, optimum=gain)
    for cut in (torch.no_grad()(gain), lambda theta: {"gain": gain(theta)["gain"].detach()}):
        with pytest.raises(ValueError, match=r"nothing of optimum.* depends on theta"):
            explicit_sensitivity(None, THETA, gain(THETA), optimum=cut)
    nowhere = lambda theta: {"nu": theta["drift"] * float("nan")}
    with pytest.raises(ValueError, match=r"optimum\(theta\) is not finite for 'nu'"):
        explicit_sensitivity(None, THETA, nowhere(THETA), optimum=nowhere)
    kink = lambda theta: {"nu": theta["drift"].sub(1.0).clamp_min(0.0).sqrt()}
    found = explicit_sensitivity(None, THETA, kink(THETA), optimum=kink)
    with pytest.raises(ValueError, match="the vjp of optimum is not finite"):
        found.vjp({"nu": torch.tensor(1.0, dtype=torch.float64)})


def test_the_calling_convention_of_every_sensitivity() -> None:
    chain = partial(explicit_sensitivity, optimum=gain)
    cotangent = {"gain": torch.ones(1, 2, dtype=torch.float64)}
    found = chain(lambda theta, nu: theta["drift"], THETA, gain(THETA), cotangent=cotangent, derivative_order=2)
    assert set(found.vjp(cotangent)) == {"drift", "gain"}
