"""Gymnasium in both directions: environments recorded as rollouts, models exported alone and as a vector."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from problems import CASES, scalar
from torch import Tensor

from sim2real import ModelMDP, Noise, Params, default_params, linear_policy, rollout
from sim2real.gym import record_rollout, to_gym, to_gym_vector
from sim2real.simulators import building_rc, cartpole, pendulum

WIDE = spaces.Box(-1.0, 1.0, (1,), np.float64)


def action_space(mdp: ModelMDP) -> spaces.Box:
    return spaces.Box(-1.0, 1.0, (len(mdp.names["action"]),), np.float64)


def weather(mdp: ModelMDP, horizon: int) -> Tensor | None:
    return 5.0 + torch.arange(horizon, dtype=torch.float64).unsqueeze(-1) if mdp.exogenous_dim else None


@pytest.mark.parametrize("name", CASES)
def test_every_simulator_passes_the_environment_checker(name: str) -> None:
    case = CASES[name]
    env = to_gym(case.mdp, case.theta, action_space=action_space(case.mdp), horizon=20, exogenous=weather(case.mdp, 20))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unbounded observations and an unregistered environment, both as meant
        check_env(env, skip_render_check=True)


@pytest.mark.parametrize("name", ["pendulum rk4", "cart-pole midpoint", "house 3", "multiplicative noise"])
def test_recorded_export_equals_the_models_own_rollout(name: str) -> None:
    case, horizon = CASES[name], 15
    mdp, m = case.mdp, len(case.mdp.names["action"])
    env = to_gym(mdp, case.theta, action_space=action_space(mdp), horizon=horizon, exogenous=weather(mdp, horizon))
    width = len(mdp.names["signal"])
    gain = 0.05 * torch.ones(m, width, dtype=torch.float64)
    run = record_rollout(env, lambda s: -(s @ gain.T), seed=4)
    draws = np.random.Generator(np.random.PCG64(4))  # gymnasium's own generator for seed 4
    e0 = torch.as_tensor(draws.standard_normal(mdp.noise_dims[0])).unsqueeze(0)
    plain = mdp.noise_dims[1] - mdp.exogenous_dim
    e = torch.as_tensor(np.stack([draws.standard_normal(plain) for _ in range(horizon)])).unsqueeze(0)
    outside = weather(mdp, horizon)
    e = e if outside is None else torch.cat([e, outside.unsqueeze(0)], -1)
    full = torch.zeros(m, len(mdp.names["state"]), dtype=torch.float64)
    full[:, :width] = gain
    noise = Noise(e0, e, torch.zeros(1, horizon, 0, dtype=torch.float64))
    own = rollout(mdp, linear_policy(m), case.theta, {"gain": full}, noise)
    # the same operations on the same numbers, but for the order of sums in a matrix product
    torch.testing.assert_close(run.states, own.states[..., :width], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(run.actions, own.actions, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(run.rewards, own.rewards, rtol=1e-12, atol=1e-12)
    assert run.mask is not None
    assert bool(run.mask.all())


def test_vector_environment_equals_single_environments_row_by_row() -> None:
    """300 steps with terminations, truncations and autoresets, two of three seeds repeated by a second reset."""
    mdp = cartpole(angle_limit=0.15, alive_reward=1.0)
    theta = default_params(mdp.box)
    vector = to_gym_vector(mdp, theta, 3, action_space=WIDE, horizon=25)
    single = SyncVectorEnv([lambda: to_gym(mdp, theta, action_space=WIDE, horizon=25)] * 3)
    assert vector.metadata["autoreset_mode"] == single.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    assert vector.observation_space == single.observation_space
    assert vector.action_space == single.action_space
    rng, ended = np.random.default_rng(0), np.zeros(2)
    for seed in (7, [1, None, 3], None):
        one, other = vector.reset(seed=seed)[0], single.reset(seed=seed)[0]
        np.testing.assert_allclose(one, other, rtol=1e-12)
        for _ in range(100):
            actions = rng.uniform(-1.0, 1.0, (3, 1))
            one, other = vector.step(actions), single.step(actions)
            for mine, theirs in zip(one[:4], other[:4], strict=True):
                np.testing.assert_allclose(mine, theirs, rtol=1e-10, atol=1e-12)  # an unstable pole, 25 steps
                assert mine.dtype == theirs.dtype
            ended += [one[2].sum(), one[3].sum()]
    assert ended.min() > 3  # both ways of ending were seen


def test_vector_environment_with_one_parameter_per_row_and_measured_inputs() -> None:
    mdp, horizon = building_rc(2, initial_std=1.0), 4
    theta = default_params(mdp.box)
    each = theta | {"Ria": torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)}
    options: dict[str, Any] = {"action_space": WIDE, "horizon": horizon, "exogenous": weather(mdp, horizon)}
    vector = to_gym_vector(mdp, each, 3, **options)
    rows = [to_gym(mdp, theta | {"Ria": each["Ria"][i]}, **options) for i in range(3)]
    start = vector.reset(seed=5)[0]
    np.testing.assert_allclose(start, np.stack([row.reset(seed=5 + i)[0] for i, row in enumerate(rows)]), rtol=1e-12)
    for t in range(horizon):
        signals, rewards, _, truncated, _ = vector.step(np.ones((3, 1)))
        single = [row.step(np.ones(1)) for row in rows]
        np.testing.assert_allclose(signals, np.stack([out[0] for out in single]), rtol=1e-12)
        np.testing.assert_allclose(rewards, [out[1] for out in single], rtol=1e-12)
        assert truncated.tolist() == [t == horizon - 1] * 3
    assert signals.shape == (3, 1)


class Countdown(gymnasium.Env[np.ndarray, Any]):
    """Terminates after its seed's number of steps; reward is the action; observation the steps left."""

    def __init__(self, actions: spaces.Space[Any], observations: spaces.Space[Any] | None = None) -> None:
        self.action_space = actions
        self.observation_space = observations or spaces.Box(0.0, 99.0, (2, 1), np.float32)
        self.left, self.given, self.bad = 3, [], None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.left = 3 if seed is None else seed
        return self._look(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.given.append(action)
        self.left -= 1
        reward = float("nan") if self.bad == "reward" else float(np.sum(action))
        return self._look(), reward, self.left == 0, self.left == -5, {}

    def _look(self) -> Any:
        if isinstance(self.observation_space, spaces.Discrete):
            return self.left
        return np.full((2, 1), np.nan if self.bad == "observation" and self.left < 3 else self.left, np.float32)


def test_episodes_of_different_length_are_held_and_masked() -> None:
    env = Countdown(spaces.Box(-1.0, 1.0, (1, 2), np.float32))
    run = record_rollout(env, lambda s: 0.1 * s, episodes=2, seed=2)
    assert run.states[..., 0].tolist() == [[2.0, 1.0, 0.0, 0.0], [3.0, 2.0, 1.0, 0.0]]
    assert run.mask is not None
    assert run.mask.tolist() == [[True, True, False], [True] * 3]
    assert run.rewards[0].tolist() == pytest.approx([0.4, 0.2, 0.0])
    assert env.given[0].shape == (1, 2)
    assert env.given[0].dtype == np.float32
    torch.testing.assert_close(run.actions[0, 0], torch.as_tensor(env.given[0][0]).double())  # as given, in float32
    assert run.states.dtype == run.actions.dtype == torch.float64


def test_max_steps_cuts_and_truncation_ends() -> None:
    env = Countdown(spaces.Box(-1.0, 1.0, (2,), np.float64))
    assert record_rollout(env, lambda s: 0.1 * s, max_steps=2, seed=9).rewards.shape == (1, 2)
    assert record_rollout(env, lambda s: 0.1 * s, seed=-1 + 1).rewards.shape == (1, 5)  # left: 0 -> -5, truncated


def test_discrete_spaces_carry_the_index_in_column_zero() -> None:
    env = Countdown(spaces.Discrete(4), spaces.Discrete(10))
    run = record_rollout(env, lambda s: s.new_full((1, 1), 2.0), seed=2)
    assert env.given == [2, 2]
    assert isinstance(env.given[0], int)
    assert run.actions.tolist() == [[[2.0], [2.0]]]
    assert run.states.tolist() == [[[2.0], [1.0], [0.0]]]


def test_a_discrete_model_can_be_exported() -> None:
    def step(theta: Params, s: Tensor, a: Tensor, e: Tensor) -> Tensor:
        return s + theta["push"] * (a - 1.0)

    mdp = ModelMDP(lambda theta, e0: e0, step, lambda theta, s, a, e, following: -(s[:, 0] ** 2), (1, 0), 1.0)
    env = to_gym(mdp, {"push": scalar(0.5)}, action_space=spaces.Discrete(3), horizon=5)
    start, _ = env.reset(seed=0)
    assert env.step(2)[0] == pytest.approx(start + 0.5)
    vector = to_gym_vector(mdp, {"push": scalar(0.5)}, 2, action_space=spaces.Discrete(3), horizon=5)
    first, _ = vector.reset(seed=0)
    np.testing.assert_allclose(vector.step(np.array([0, 2]))[0], first + np.array([[-0.5], [0.5]]))


@pytest.mark.parametrize(
    ("env", "act", "message"),
    [
        (Countdown(spaces.MultiBinary(2)), lambda s: s, "neither Box nor Discrete"),
        (Countdown(WIDE, spaces.MultiBinary(2)), lambda s: s, "FlattenObservation"),
        (Countdown(WIDE), lambda s: s, r"episode 0, step 0: act returned \[3.0, 3.0\]"),
        (Countdown(WIDE), lambda s: s[:, :1] * float("nan"), r"episode 0, step 0: act returned \[nan\]"),
        (Countdown(spaces.Discrete(2)), lambda s: s[:, :1], r"act returned \[3.0\], the action space is Discrete\(2\)"),
        (Countdown(spaces.Discrete(2)), lambda s: 0.1 * s[:, :1], "act returned"),
        (Countdown(spaces.Discrete(2)), lambda s: s[:, :1] * float("nan"), r"act returned \[nan\]"),
    ],
)
def test_what_an_environment_cannot_take_is_named(env, act, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        record_rollout(env, act)


@pytest.mark.parametrize("bad", ["reward", "observation"])
def test_what_is_not_finite_is_named(bad: str) -> None:
    env = Countdown(WIDE)
    env.bad = bad
    with pytest.raises(ValueError, match=f"episode 0, step 0: the environment returned the {bad}"):
        record_rollout(env, lambda s: s[:, :1])


def test_wrong_requests_are_named() -> None:
    mdp, theta = pendulum(), default_params(pendulum().box)
    with pytest.raises(ValueError, match="episodes and max_steps must be at least 1"):
        record_rollout(Countdown(WIDE), lambda s: s, episodes=0)
    with pytest.raises(ValueError, match="horizon must be at least 1"):
        to_gym(mdp, theta, action_space=WIDE, horizon=0)
    with pytest.raises(ValueError, match="num_envs must be at least 1"):
        to_gym_vector(mdp, theta, 0, action_space=WIDE, horizon=5)
    house = building_rc(1)
    with pytest.raises(ValueError, match=r"pass exogenous \[T >= 5, 1\], got none"):
        to_gym(house, default_params(house.box), action_space=WIDE, horizon=5)
    with pytest.raises(ValueError, match=r"got \[4, 1\]"):
        to_gym(house, default_params(house.box), action_space=WIDE, horizon=5, exogenous=torch.zeros(4, 1))
    with pytest.raises(ValueError, match="got 2 seeds for 3 environments"):
        to_gym_vector(mdp, theta, 3, action_space=WIDE, horizon=5).reset(seed=[0, 1])
    env = to_gym(mdp, theta, action_space=WIDE, horizon=5)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="an action is not finite"):
        env.step(np.array([np.inf]))
    with pytest.raises(ValueError, match=r"actions of shape \(2,\) do not fit 1 environments"):
        env.step(np.ones(2))
    vector = to_gym_vector(mdp, theta, 3, action_space=WIDE, horizon=5)
    for fresh, action in ((to_gym(mdp, theta, action_space=WIDE, horizon=5), np.ones(1)), (vector, np.ones((3, 1)))):
        with pytest.raises(gymnasium.error.ResetNeeded, match="call reset before step"):
            fresh.step(action)
    vector.reset(seed=0)
    for shape in ((3, 2), (2, 1)):
        with pytest.raises(ValueError, match="do not fit 3 environments"):
            vector.step(np.ones(shape))
