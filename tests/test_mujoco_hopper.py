"""The actor-critic of examples/mujoco_hopper.py: its sums and targets against loops over single environments."""

import math

import pytest
import torch

pytest.importorskip("gymnasium")
pytest.importorskip("mujoco")
hopper = pytest.importorskip("examples.mujoco_hopper")

DISCOUNT, TRACE = 0.9, 0.7


def stretch(seed: int, length: int = 6, count: int = 40) -> "hopper.Stretch":
    """Random numbers; some environments fall or are cut on the way, some more than once."""
    g = torch.Generator().manual_seed(seed)
    o, following = (torch.randn(length, count, 11, generator=g, dtype=torch.float64) for _ in range(2))
    fallen = torch.rand(length, count, generator=g) < 0.15
    cut = ~fallen & (torch.rand(length, count, generator=g) < 0.15)
    return hopper.Stretch(o, following, torch.randn(length, count, generator=g, dtype=torch.float64), fallen, cut)


def value(o: torch.Tensor) -> torch.Tensor:
    return o.sum(-1)


def test_objective_is_the_sum_over_environments_of_pieces_of_episodes():
    x = stretch(0)
    total = 0.0
    for b in range(x.rewards.shape[1]):
        weight = 1.0
        for t in range(len(x.rewards)):
            total += weight * float(x.rewards[t, b])
            if x.fallen[t, b]:
                weight = 1.0
            elif x.cut[t, b] or t == len(x.rewards) - 1:
                total += weight * DISCOUNT * float(value(x.following[t, b]))
                weight = 1.0
            else:
                weight *= DISCOUNT
    assert float(hopper.objective(x, value, DISCOUNT)) == pytest.approx(total / x.rewards.numel(), rel=1e-12)


def test_targets_are_the_mixture_of_all_n_step_returns():
    """G^lambda = (1 - l) sum_n l^(n-1) G^n + l^(N-1) G^N with N the steps until the episode or the stretch ends."""
    x = stretch(1)
    found = hopper.targets(x, value, hopper.Settings(discount=DISCOUNT, trace=TRACE))
    length, count = x.rewards.shape
    for b in range(count):
        for t in range(length):
            returns, total = [], 0.0
            for n in range(length - t):
                total += DISCOUNT**n * float(x.rewards[t + n, b])
                beyond = 0.0 if x.fallen[t + n, b] else float(value(x.following[t + n, b]))
                returns.append(total + DISCOUNT ** (n + 1) * beyond)
                if x.fallen[t + n, b] or x.cut[t + n, b]:
                    break
            mixed = sum((1 - TRACE) * TRACE**k * r for k, r in enumerate(returns[:-1]))
            mixed += TRACE ** (len(returns) - 1) * returns[-1]
            assert float(found[t, b]) == pytest.approx(mixed, rel=1e-10, abs=1e-10)


def test_scale_of_observations_is_that_of_all_of_them():
    g = torch.Generator().manual_seed(3)
    parts = [torch.randn(n, 11, generator=g, dtype=torch.float64) * 3.0 + 5.0 for n in (7, 1, 20)]
    scale = hopper.Scale(torch.zeros(11, dtype=torch.float64), torch.ones(11, dtype=torch.float64), 1e-9)
    for part in parts:
        scale = hopper.extended(scale, part)
    together = torch.cat(parts)
    # The start counts as 1e-9 observations of 0 with variance 1, in 28 of mean 5: relative changes of about 1e-9.
    torch.testing.assert_close(scale.mean, together.mean(0), rtol=1e-8, atol=0)
    torch.testing.assert_close(scale.variance, together.var(0, correction=0), rtol=1e-7, atol=0)
    normal = hopper.normalised(scale, together)
    torch.testing.assert_close(normal.mean(0), torch.zeros(11, dtype=torch.float64), rtol=0, atol=1e-6)


def test_reward_and_end_are_those_of_hopper_v5():
    """One control step from random states: rewards differ by the integrator alone (Euler here, RK4 there)."""
    import gymnasium

    mdp, world = hopper.hopper(1.0), gymnasium.make("Hopper-v5").unwrapped
    g = torch.Generator().manual_seed(2)
    for _ in range(10):
        world.reset(seed=0)
        s = hopper.started(1, g) + torch.cat([torch.zeros(6), 0.3 * torch.randn(6, generator=g)])
        a = 2.0 * torch.rand(1, 3, generator=g, dtype=torch.float64) - 1.0
        world.set_state(s[0, :6].numpy(), s[0, 6:].numpy())
        seen, reward, ended, _, _ = world.step(a[0].numpy())
        after = mdp.step({}, s, a, s.new_zeros(1, 0))
        # The mean speed over 8 ms: Euler's error is of order (acceleration 50 m/s^2) x (2 ms) = 0.1 m/s.
        assert math.isclose(float(mdp.reward({}, s, a, s.new_zeros(1, 0), after)), reward, abs_tol=0.1)
        torch.testing.assert_close(hopper.observed(after)[0, :5], torch.as_tensor(seen[:5]), rtol=0, atol=0.02)
        assert bool(mdp.terminal({}, after)[0]) == ended
    assert bool(mdp.terminal({}, torch.tensor([[0.0, 0.69] + [0.0] * 10], dtype=torch.float64))[0])
    assert bool(mdp.terminal({}, torch.tensor([[0.0, 1.25, 0.21] + [0.0] * 9], dtype=torch.float64))[0])
