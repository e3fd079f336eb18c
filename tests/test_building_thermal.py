"""Building thermal control: rebuild checks, the exact oracle, the model against it."""

import numpy as np
import pytest
import torch
from problems import seeded, stack

from benchmarks.oracles import building_thermal as oracle
from sim2real import expected_return, sample_noise
from sim2real.params import Params
from sim2real.rollout import discounted_return, rollout
from sim2real.simulators import building_thermal, four_zones, ring_building, thermal_matrix
from sim2real.simulators.building_thermal import ThermalBuilding
from sim2real.solvers import SoftLQR, linear_noise_policy, soft_lqr


def split(logits: torch.Tensor) -> Params:
    return {"insulation": logits[:4], "airflow": logits[4:]}


def soft(theta: Params, building: ThermalBuilding) -> SoftLQR:
    return soft_lqr(
        thermal_matrix(theta, building),
        building.B,
        building.Q,
        building.R,
        discount=building.follower_discount,
        temperature=building.temperature,
        noise_covariance=building.noise_std**2 * torch.eye(len(building.leak), dtype=torch.float64),
    )


def test_rebuild_checks() -> None:
    answer = oracle.exact(np.zeros(8))
    assert answer.value == pytest.approx(-261.963, abs=5e-4)
    assert answer.terms == pytest.approx((-127.659, 264.609, 9.9997, 9.9997), abs=6e-4)
    gain = oracle.follower(oracle.matrix(np.zeros(8))).gain[0]
    assert gain == pytest.approx((2.50621, 1.23965, 0.02804, 0.05669), abs=6e-6)


def test_supremum_of_the_return() -> None:
    """Infinite logits: insulation (1, 0, 1, 1), airflow (0, 0.79, 1, 1)."""
    logits = np.array([40.0, -40, 40, 40, -40, np.log(0.79 / 0.21), 40, 40])
    assert oracle.exact(logits).value == pytest.approx(-162.503, abs=2e-3)


@pytest.mark.parametrize("seed", [0, 1])
def test_oracle_gradient_is_the_derivative_of_its_value(seed: int) -> None:
    logits = np.random.default_rng(seed).standard_normal(8)
    value = lambda x: oracle.exact(x, with_gradient=False).value
    expected = np.array([value(logits + 1e-5 * unit) - value(logits - 1e-5 * unit) for unit in np.eye(8)]) / 2e-5
    found = oracle.exact(logits).gradient
    # rounding of a value of 260 over a step of 1e-5: about 1e-8 of a gradient of 30
    assert np.linalg.norm(found - expected) < 1e-7 * np.linalg.norm(expected)


def test_follower_of_the_library_equals_the_oracle() -> None:
    logits = torch.randn(8, generator=seeded(2), dtype=torch.float64)
    best, expected = soft(split(logits), four_zones()), oracle.follower(oracle.matrix(logits.numpy()))
    assert np.allclose(thermal_matrix(split(logits), four_zones()).numpy(), oracle.matrix(logits.numpy()), atol=1e-15)
    assert np.allclose(best.nu["gain"].numpy(), expected.gain, rtol=1e-9, atol=1e-12)
    factor = best.nu["factor"].numpy()
    assert np.allclose(factor @ factor.T, expected.covariance, rtol=1e-9)


def test_leader_return_of_rollouts() -> None:
    """Mean over 4000 rollouts within 4 standard errors of the exact return: false alarm 1 in 15 000."""
    task, building = building_thermal(), four_zones()
    logits = 0.5 * torch.randn(8, generator=seeded(4), dtype=torch.float64)
    theta, policy = split(logits), linear_noise_policy(2)
    nu = soft(theta, building).nu
    noise = sample_noise(task.follower, policy, 4000, 100, seeded(5))
    batch = rollout(task.follower, policy, theta, nu, noise)
    flat = [x.flatten(0, 1) for x in (batch.states[:, :-1], batch.actions, batch.states[:, 1:])]
    returns = discounted_return(task.reward(theta, *flat).reshape(4000, 100), task.discount)
    expected = oracle.exact(logits.numpy()).value
    assert abs(float(returns.mean()) - expected) < 4 * float(returns.std()) / 4000**0.5
    cost = expected_return(task.follower, policy, theta, nu, noise)
    assert float(cost) < 0


def test_density_of_the_next_state() -> None:
    task, theta = building_thermal(), split(torch.zeros(8, dtype=torch.float64))
    state, action, e = stack([1.0, -2, 3, 0.5]), stack([0.1, -0.2]), stack([0.3, -1, 2, 0.1])
    after = task.follower.step(theta, state, action, e)
    normal = torch.distributions.Normal(task.follower.step(theta, state, action, 0 * e), 0.02)
    assert torch.allclose(task.follower.log_prob(theta, state, action, after), normal.log_prob(after).sum(-1))


@pytest.mark.parametrize("zones", [3, 6, 9])
def test_any_number_of_zones(zones: int) -> None:
    building = ring_building(zones)
    task = building_thermal(building)
    theta = {key: torch.zeros(zones, dtype=torch.float64) for key in ("insulation", "airflow")}
    A = thermal_matrix(theta, building)
    away = (torch.arange(zones)[:, None] - torch.arange(zones)).abs()
    assert not A[(away > 1) & (away < zones - 1)].any()  # only neighbours on the ring exchange air
    assert torch.allclose(A.sum(-1), 1 + 0.5 * building.leak)  # exchange moves heat, leaks add it
    policy = linear_noise_policy(building.B.shape[1])
    noise = sample_noise(task.follower, policy, 4, 20, seeded(0))
    batch = rollout(task.follower, policy, theta, soft(theta, building).nu, noise)
    assert batch.states.shape == (4, 21, zones)
    assert float(batch.states[:, -1].norm()) < float(batch.states[:, 0].norm())


def test_logits_per_environment() -> None:
    task, generator = building_thermal(), seeded(6)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    every = {"insulation": draw(3, 4), "airflow": draw(3, 4)}
    state, action, e = draw(3, 4), draw(3, 2), draw(3, 4)
    together = task.follower.step(every, state, action, e)
    worth = task.reward(every, state, action, together)
    for i in range(3):
        own = {key: value[i] for key, value in every.items()}
        assert torch.allclose(
            task.follower.step(own, state[i : i + 1], action[i : i + 1], e[i : i + 1])[0], together[i]
        )
        assert torch.allclose(task.reward(own, state[i : i + 1], action[i : i + 1], together[i : i + 1])[0], worth[i])


def test_bad_buildings() -> None:
    with pytest.raises(ValueError, match="at least 3 zones"):
        ring_building(2)
    good = four_zones()
    with pytest.raises(ValueError, match="leak must be"):
        building_thermal(ThermalBuilding(good.coupling, good.leak[:3], good.B, good.Q, good.R))
