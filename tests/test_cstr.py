"""The stirred-tank reactor: its published optimum in closed form, the exact linear solution, derivatives, errors."""

import math

import pytest
import torch
from scipy.linalg import expm
from scipy.optimize import minimize_scalar
from torch import Tensor

from sim2real.bounds import contains, default_params
from sim2real.params import Params
from sim2real.simulators.cstr import VOLUME, cstr

THETA = default_params(cstr().box)
NO_NOISE = torch.zeros(1, 1, dtype=torch.float64)


def steady_state(flow: float, rate: float, side_rate: float) -> tuple[float, float]:
    """(cA, cB) of a constant flow, feed 1 mol/l, by hand."""
    reactant = flow / (flow + rate * VOLUME)
    return reactant, rate * VOLUME * reactant / (flow + side_rate * VOLUME)


def steady_profit(flow: float, rate: float = 1.2, side_rate: float = 0.0) -> float:
    return 2.0 * flow * steady_state(flow, rate, side_rate)[1] - 0.5 * flow


def test_the_published_optimum():
    """q = 12 l/min, cA = cB = 1/2; in general q = k V: d/dq [2 q k V / (q + k V) - q/2] = 2 (kV / (q + kV))^2 - 1/2."""
    for rate in (0.4, 1.2):
        best = minimize_scalar(lambda flow, k=rate: -steady_profit(flow, k), bounds=(0.1, 40.0), method="bounded")
        assert best.x == pytest.approx(rate * VOLUME, abs=1e-3)  # the tolerance of scipy's bounded search is 1e-5
        assert steady_state(rate * VOLUME, rate, 0.0) == pytest.approx((0.5, 0.5))
    state = torch.tensor([[0.5, 0.5, 12.0]], dtype=torch.float64)
    following = cstr().step(THETA, state, state[:, 2:], NO_NOISE)
    torch.testing.assert_close(following, state, rtol=0, atol=1e-14)
    reward = cstr(dt=60.0).reward(THETA, state, state[:, 2:], NO_NOISE, following)
    assert float(reward) == pytest.approx(6.0)  # 2 * 12 * 0.5 - 6 per minute


def test_the_side_reaction_asks_for_more_flow_at_less_yield():
    best = minimize_scalar(lambda flow: -steady_profit(flow, 1.2, 0.5), bounds=(0.1, 40.0), method="bounded")
    assert best.x > 13.0
    reactant, product = steady_state(12.0, 1.2, 0.5)
    state = torch.tensor([[reactant, product, 12.0]], dtype=torch.float64)
    following = cstr(side_rate=0.5).step(THETA, state, state[:, 2:], NO_NOISE)
    torch.testing.assert_close(following, state, rtol=0, atol=1e-14)


def test_a_constant_flow_gives_the_matrix_exponential():
    flow, side, minutes = 9.0, 0.3, 0.2
    rates = torch.tensor([[-flow / VOLUME - 1.2, 0.0], [1.2, -flow / VOLUME - side]], dtype=torch.float64)
    feed = torch.tensor([[flow / VOLUME], [0.0]], dtype=torch.float64)
    augmented = torch.cat([torch.cat([rates, feed], 1), torch.zeros(1, 3, dtype=torch.float64)])
    start = torch.tensor([0.3, 0.6, 1.0], dtype=torch.float64)
    exact = torch.from_numpy(expm(augmented.numpy() * minutes)) @ start
    world = cstr(side_rate=side, substeps=20)
    state = torch.tensor([[0.3, 0.6, flow]], dtype=torch.float64)
    following = world.step(THETA, state, state[:, 2:], NO_NOISE)
    # error of rk4: (rate * 0.01 min)^4 per minute
    torch.testing.assert_close(following[0, :2], exact[:2], rtol=0, atol=1e-9)


def test_the_flow_follows_its_set_point_and_hurry_costs():
    state = torch.tensor([[0.5, 0.5, 10.0]], dtype=torch.float64)
    action = torch.tensor([[14.0]], dtype=torch.float64)
    following = cstr(lag=0.2, dt=12.0, substeps=20).step(THETA, state, action, NO_NOISE)
    assert float(following[0, 2]) == pytest.approx(14.0 - 4.0 * math.exp(-1.0), abs=1e-7)  # rk4, steps of lag / 20
    dear, free = (cstr(effort=value).reward(THETA, state, action, NO_NOISE, state) for value in (0.1, 0.0))
    assert float(free - dear) == pytest.approx(0.2 * 0.1 * 16.0)  # 12 s, (14 - 10)^2


def test_feed_noise_moves_the_feed():
    e = torch.tensor([[1.5]], dtype=torch.float64)
    state, action = torch.tensor([[0.4, 0.5, 12.0]], dtype=torch.float64), torch.tensor([[12.0]], dtype=torch.float64)
    richer = THETA | {"feed": THETA["feed"] + 0.1 * 1.5}
    expected = cstr().step(richer, state, action, NO_NOISE)
    torch.testing.assert_close(cstr(feed_std=0.1).step(THETA, state, action, e), expected, rtol=1e-15, atol=0)


def batch(count: int) -> tuple[Params, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    theta = {key: value * (1.0 + 0.1 * normal(count)) for key, value in THETA.items()}
    state = torch.tensor([0.5, 0.5, 12.0], dtype=torch.float64) * (1 + 0.1 * normal(count, 3))
    return theta, state, 12.0 + normal(count, 1), normal(count, 1)


@pytest.mark.parametrize("integrator", ["midpoint", "rk4"])
def test_first_and_second_derivatives(integrator):
    world = cstr(side_rate=0.5, feed_std=0.1, integrator=integrator)
    theta, state, action, e = batch(2)
    keys = tuple(theta)

    def both(state: Tensor, action: Tensor, e: Tensor, *values: Tensor) -> Tensor:
        at = dict(zip(keys, values, strict=True))
        following = world.step(at, state, action, e)
        return torch.cat([following.reshape(-1), world.reward(at, state, action, e, following)])

    inputs = tuple(x.requires_grad_() for x in (state, action, e, *theta.values()))
    assert torch.autograd.gradcheck(both, inputs)
    assert torch.autograd.gradgradcheck(both, inputs)


def test_vmap_over_theta_equals_the_batch_and_dtype_follows():
    world = cstr(side_rate=0.5, feed_std=0.1)
    theta, state, action, e = batch(3)

    def single(theta: Params, *row: Tensor) -> Tensor:
        return world.step(theta, *(x.unsqueeze(0) for x in row)).squeeze(0)

    each = torch.func.vmap(single)(theta, state, action, e)
    torch.testing.assert_close(each, world.step(theta, state, action, e), rtol=1e-14, atol=0)
    floats = {key: value.float() for key, value in theta.items()}
    row = (state.float(), action.float(), e.float())
    following = world.step(floats, *row)
    assert following.dtype == world.reward(floats, *row, following).dtype == torch.float32
    torch.testing.assert_close(world.initial_state(floats, torch.zeros(1, 3)), torch.tensor([[0.5, 0.5, 12.0]]))


def test_declarations():
    model = cstr()
    assert contains(model.box, THETA)
    assert THETA.keys() == model.box.unit.keys()
    assert {name for group in model.names.values() for name in group} == model.units.keys()
    assert model.derivative_order == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dt": math.inf}, "dt must be a positive"),
        ({"integrator": "euler"}, "integrator must be one of"),
        ({"lag": 0.0}, "lag must be > 0"),
        ({"side_rate": -0.1}, "side_rate, feed_std, effort, initial_std >= 0; got 0.2, -0.1"),
        ({"initial_std": (0.1, 0.1, -1.0)}, "initial_std >= 0"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        cstr(**options)
