"""d action / d theta: closed forms, adjointness, and networks whose nu is not identifiable."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from sim2real import Params, boltzmann_policy, dot, gaussian_policy, linear_policy, module_policy
from sim2real.estimators import action_sensitivity, policy_sensitivity
from sim2real.solvers import cg, policy_optimum


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def states(count: int = 16) -> Tensor:
    return torch.linspace(-1, 1, count, dtype=torch.float64)[:, None]


def fitted(act: Callable[[Params], Tensor]) -> Callable[[Params, Params], Tensor]:
    """One step with the optimal action tanh(theta s)."""
    return lambda theta, nu: -((act(nu) - torch.tanh(theta["t"] * states())) ** 2).mean()


def trained_net(seed: int) -> tuple[Callable, object, Params, Params]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    policy, theta = module_policy(net), {"t": scalar(1.0)}
    J = fitted(lambda nu: policy.act(nu, states(), states()[:, :0]))
    start = {key: value.detach() for key, value in net.named_parameters()}
    return J, policy, theta, policy_optimum(J, theta, start, tol=1e-6, max_steps=40).nu


def test_a_linear_policy_in_closed_form() -> None:
    """J = -|K - theta c|^2: dK/dtheta = c, so d action = -c s."""
    c = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]], dtype=torch.float64)
    J = lambda theta, nu: -((nu["gain"] - theta["t"] * c) ** 2).sum()
    s = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = action_sensitivity(J, linear_policy(2), {"t": scalar(2.0)}, {"gain": 2 * c}, s)
    torch.testing.assert_close(found.jvp({"t": scalar(3.0)})["action"], -3 * s @ c.mT)
    g = {"action": torch.ones(5, 2, dtype=torch.float64)}
    torch.testing.assert_close(found.vjp(g)["t"], -(s @ c.mT).sum())
    assert found.report.converged
    assert found.report.damping == 0.0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_networks_of_unidentifiable_parameters_have_an_action_sensitivity(seed: int) -> None:
    J, policy, theta, nu = trained_net(seed)
    g = {"action": torch.randn(16, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)}
    chain = partial(policy_sensitivity, solve=partial(cg, tol=1e-8))
    found = action_sensitivity(J, policy, theta, nu, states(), cotangent=g, sensitivity=chain)
    assert found.report.converged
    assert found.report.damping > 0
    change = found.jvp({"t": scalar(1.0)})["action"]
    expected = states() * (1 - torch.tanh(states()) ** 2)
    assert float((change - expected).norm() / expected.norm()) < 0.01  # measured 0.04 to 0.3 %
    # one operator: the tolerance of its solves, 1e-8, times norms of order 1e3 in nu
    assert float(found.vjp(g)["t"]) == pytest.approx(float(dot(g, {"action": change})), rel=1e-4)


def test_gaussian_policies_use_their_mean_and_dtypes_are_kept() -> None:
    net = nn.Linear(1, 2)
    nu = {"weight": torch.tensor([[0.5], [0.0]]), "bias": torch.tensor([0.0, -1.0])}
    J = lambda theta, nu: (
        -((nu["weight"][0, 0] - 0.5 * theta["t"]) ** 2) - ((nu["bias"] - nu["bias"].detach()) ** 2).sum()
    )
    J_full = lambda theta, nu: J(theta, nu) - (nu["weight"][1] ** 2).sum()
    s = torch.tensor([[1.0], [2.0]])
    theta = {"t": torch.tensor(1.0)}
    found = action_sensitivity(J_full, gaussian_policy(net), theta, nu, s)
    change = found.jvp({"t": torch.tensor(1.0)})["action"]
    assert change.dtype == torch.float32
    torch.testing.assert_close(change, 0.5 * s)
    noisy = action_sensitivity(J_full, gaussian_policy(net), theta, nu, s, noise=torch.ones(2, 1))
    torch.testing.assert_close(noisy.jvp({"t": torch.tensor(1.0)})["action"], 0.5 * s)  # std does not move with theta
    assert found.vjp({"action": torch.ones(2, 1)})["t"].dtype == torch.float32


def test_bad_inputs_are_named() -> None:
    J = lambda theta, nu: -((nu["gain"] - theta["t"]) ** 2).sum()
    theta, nu = {"t": scalar(1.0)}, {"gain": torch.ones(1, 2, dtype=torch.float64)}
    s = torch.ones(3, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"states must be \[N, n\]"):
        action_sensitivity(J, linear_policy(1), theta, nu, s[0])
    found = action_sensitivity(J, linear_policy(1), theta, nu, s)
    with pytest.raises(ValueError, match=r"the action cotangent is \(3,\), expected \(3, 1\)"):
        found.vjp({"action": torch.ones(3)})
    with pytest.raises(KeyError, match="action cotangent"):
        found.vjp({"gain": nu["gain"]})
    with pytest.raises(ValueError, match="does not depend differentiably on nu"):
        action_sensitivity(J, boltzmann_policy(lambda nu, s: s @ nu["gain"].mT, 1.0), theta, nu, s)
