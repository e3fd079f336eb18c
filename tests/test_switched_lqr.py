"""Switched LQR: a hand-written step, the published matrices and initial states, and the known optimum."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from problems import seeded, shared
from torch.autograd import gradcheck

from benchmarks import switched_lqr_point
from benchmarks.oracles.switched_lqr import optimal_cost, optimal_set
from sim2real import Noise, Policy, default_params, deterministic_policy, rollout, sample_noise
from sim2real.simulators import (
    switched_initial_noise,
    switched_initial_states,
    switched_lqr,
    switched_matrices,
    two_state_switched_lqr,
)

PUBLISHED = torch.tensor(
    [
        [[6.065, 1.206], [1.206, 1.905]],
        [[9.087, 3.235], [3.235, 2.348]],
        [[5.108, 1.266], [1.266, 1.935]],
        [[7.219, 2.561], [2.561, 2.107]],
    ],
    dtype=torch.float64,
)
"""value matrices of the two-state example"""


def test_a_step_by_hand() -> None:
    mdp = switched_lqr(3, 2, limit=4.0)
    theta = default_params(mdp.box)
    state = torch.tensor([[1.0, -2.0, 30.0]], dtype=torch.float64)
    action = torch.tensor([[1.0, 0.5, 1.0, -1.0]], dtype=torch.float64)
    A, B = switched_matrices(3, 2)
    assert B.tolist() == [[1.0, 1.0, 0.15], [0.15, 0.15, 1.0]]
    expected = A.numpy() @ state[0].numpy() + B[1].numpy() * action[0, 1:].numpy()
    following = mdp.step(theta, state, action, state[:, :0])
    np.testing.assert_allclose(following[0].numpy(), np.clip(expected, -4, 4), rtol=1e-14)
    assert float(mdp.reward(theta, state, action, state[:, :0], following)) == pytest.approx(-(905 + 0.1 * 2.25))


def test_one_plant_per_environment_is_the_batch() -> None:
    mdp, state = switched_lqr(3, 2), torch.randn(4, 3, generator=seeded(0), dtype=torch.float64)
    action = torch.cat([torch.tensor([[0.0], [1.0], [1.0], [0.0]]).double(), state.flip(0)], 1)
    theta = default_params(mdp.box)
    each = {key: value.expand(4, *value.shape) for key, value in theta.items()}
    both = [mdp.step(values, state, action, state[:, :0]) for values in (theta, each)]
    torch.testing.assert_close(both[0], both[1])
    leaves = [value.clone().requires_grad_() for value in theta.values()]
    assert gradcheck(lambda A, B: mdp.step({"A": A, "B": B}, state, action, state[:, :0]), leaves)


def test_initial_states_are_uniform_and_invert() -> None:
    for split in ("train", "dev", "test"):
        states = switched_initial_states(3, split, 64)
        mdp = switched_lqr(3)
        torch.testing.assert_close(mdp.initial_state({}, switched_initial_noise(states)), states)
        assert float(states.abs().max()) <= 10 / 3**0.5
    assert not torch.equal(switched_initial_states(3, "train", 8), switched_initial_states(3, "dev", 8))


@pytest.mark.parametrize(("states", "optimum"), [(2, 1.126673), (3, 0.737863)])
def test_the_optimum_of_the_test_set_is_the_known_one(states: int, optimum: float) -> None:
    """Cost over 20 n of the Riccati-set dynamic programme on the published test states; six digits known."""
    A, B = (matrix.numpy() for matrix in switched_matrices(states, 2))
    cost = optimal_cost(optimal_set(A, B), switched_initial_states(states, "test").numpy()).mean()
    assert cost / (20 * states) == pytest.approx(optimum, abs=1e-6)


def test_matrices_are_those_of_the_reference() -> None:
    known = json.loads(shared("reference/hpo/lqr_reference.json").read_text())["A_for_n"]
    for states in (2, 3, 5):
        np.testing.assert_allclose(switched_matrices(states, 2)[0].numpy(), known[str(states)], atol=5e-7)


def test_no_rollout_beats_the_optimum() -> None:
    """The committed policy point, without its action noise, on the test states."""
    mdp, policy, nu = switched_lqr(2), switched_lqr_point.policy(2), switched_lqr_point.point(2)
    states = switched_initial_states(2, "test", 256)
    noise = sample_noise(mdp, policy, 256, 20, seeded(0))
    noise.initial.copy_(switched_initial_noise(states))
    noise.policy[..., 1:] = 0.0
    cost = -rollout(mdp, policy, default_params(mdp.box), nu, noise).rewards.sum(1)
    A, B = (matrix.numpy() for matrix in switched_matrices(2, 2))
    best = torch.tensor(optimal_cost(optimal_set(A, B), states.numpy()))
    assert bool((cost > best - 1e-6 * best).all())  # sets of matrices merged to 1e-4 of at least 1


def test_the_committed_points_are_those_of_the_script() -> None:
    assert switched_lqr_point.FILE.read_text() == switched_lqr_point.content()


def test_bad_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="1 <= modes <= states"):
        switched_lqr(2, 3)
    with pytest.raises(ValueError, match="split"):
        switched_initial_states(2, "real")  # type: ignore[arg-type]


def published_policy(theta: dict[str, torch.Tensor]) -> Policy:
    """The mode and the matrix P whose Riccati step is least at x, and its input."""
    A, b = theta["A"].unsqueeze(1), theta["B"].unsqueeze(1)
    bPA = torch.einsum("mqi,qij,mqjk->mqk", b.expand(2, 4, 2), PUBLISHED, A.expand(2, 4, 2, 2))
    gain = bPA / (1.0 + torch.einsum("mqi,qij,mqj->mq", b.expand(2, 4, 2), PUBLISHED, b.expand(2, 4, 2))).unsqueeze(-1)
    form = torch.eye(2).double() + A.mT @ PUBLISHED @ A - bPA.unsqueeze(-1) * gain.unsqueeze(-2)

    def act(nu: dict[str, torch.Tensor], state: torch.Tensor) -> torch.Tensor:
        best = torch.einsum("bi,mqij,bj->bmq", state, form, state).flatten(1).argmin(-1)
        inputs = -(gain.flatten(0, 1)[best] * state).sum(-1)
        return torch.stack([(best // 4).double(), inputs], -1)

    return deterministic_policy(act)


def test_the_published_policy_of_the_two_state_example_is_optimal() -> None:
    """Against value iteration over Riccati matrices, and the published matrices against its values."""
    mdp = two_state_switched_lqr()
    theta = default_params(mdp.box)
    angle = torch.linspace(0.0, np.pi, 200).double()
    start = 5.0 * torch.stack([angle.cos(), angle.sin()], -1)
    calm = start.new_zeros(len(start), 40, 0)
    noise = Noise(torch.special.ndtri(0.5 * (1.0 + start * 2**0.5 / 10.0)), calm, calm)
    cost = -rollout(mdp, published_policy(theta), theta, {}, noise).rewards.sum(1)
    A, B = (theta[key].numpy() for key in "AB")
    eye = np.eye(2)
    found = [eye]
    for _ in range(14):  # converged to 1e-5 by then
        grown = []
        for P in found:
            for a, b in zip(A, B, strict=True):
                bPa = b @ P @ a
                grown.append(eye + a.T @ P @ a - np.outer(bPa, bPa) / (1.0 + b @ P @ b))
        found = []
        for P in sorted(grown, key=np.trace):
            if not any(np.linalg.eigvalsh(P - Q)[0] > -1e-3 for Q in found):
                found.append(P)
    best = optimal_cost(found, start.numpy())
    # matrices closer than 1e-3 (of values above 1.9) were merged at each of 14 steps; the published have three digits
    np.testing.assert_allclose(cost.numpy(), best, rtol=2e-3)
    np.testing.assert_allclose(optimal_cost(list(PUBLISHED.numpy()), start.numpy()), best, rtol=3e-3)
    with pytest.raises(ValueError, match="limit"):
        two_state_switched_lqr(limit=0.0)
