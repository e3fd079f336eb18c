"""Gymnasium: a real or foreign environment enters as a recorded `Rollout`, a `ModelMDP` leaves as an environment.

Both directions keep the conventions of `sim2real.rollout`: batch first, float64, and after the end of an episode the
state is held, the reward is 0 and the mask False. `terminated` and `truncated` both end an episode. An exported model
draws its noise from the environment's own generator, so a seed fixes the trajectory; row i of the vector environment
seeded with s equals the single environment seeded with s + i.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from sim2real.mdp import ModelMDP
from sim2real.params import Params
from sim2real.rollout import Rollout


def record_rollout(
    env: gymnasium.Env[Any, Any],
    act: Callable[[Tensor], Tensor],
    *,
    episodes: int = 1,
    max_steps: int | None = None,
    seed: int | None = None,
) -> Rollout:
    """Run `episodes` episodes of at most `max_steps` steps and return them as one `Rollout`.

    `act(s [1, n]) -> a [1, m]` sees the flat observation, for instance `lambda s: policy.act(nu, s, e)`; for a discrete
    action space it returns the index. Observations must be a `Box` (flattened) or `Discrete` (one column). The first
    reset takes `seed`; later episodes continue the environment's generator. Without `max_steps` the environment must
    end its episodes itself. Raises `ValueError` for an unknown space, an action of the wrong shape or a number that is
    not finite, naming episode and step.
    """
    if episodes < 1 or (max_steps is not None and max_steps < 1):
        raise ValueError(f"episodes and max_steps must be at least 1, got {episodes} and {max_steps}")
    runs = [
        _record_episode(env, act, max_steps, seed if index == 0 else None, f"episode {index}")
        for index in range(episodes)
    ]
    longest = max(rewards.shape[0] for _, _, rewards in runs)

    def hold(values: Tensor, length: int) -> Tensor:
        return torch.cat([values, values[-1:].expand(length - values.shape[0], *values.shape[1:])])

    mask = torch.stack([torch.arange(longest) < rewards.shape[0] for _, _, rewards in runs])
    return Rollout(
        states=torch.stack([hold(states, longest + 1) for states, _, _ in runs]),
        actions=torch.stack([hold(actions, longest) for _, actions, _ in runs]),
        rewards=torch.where(mask, torch.stack([hold(rewards, longest) for _, _, rewards in runs]), 0.0),
        mask=mask,
    )


def _record_episode(
    env: gymnasium.Env[Any, Any],
    act: Callable[[Tensor], Tensor],
    max_steps: int | None,
    seed: int | None,
    where: str,
) -> tuple[Tensor, Tensor, Tensor]:
    observation, _ = env.reset(seed=seed)
    states = [_flat_observation(env.observation_space, observation, f"{where}, reset")]
    actions: list[Tensor] = []
    rewards: list[float] = []
    while max_steps is None or len(rewards) < max_steps:
        here = f"{where}, step {len(rewards)}"
        with torch.no_grad():
            action = act(states[-1].unsqueeze(0))
        given = _space_action(env.action_space, action, here)
        observation, reward, terminated, truncated, _ = env.step(given)
        if not np.isfinite(float(reward)):
            raise ValueError(f"{here}: the environment returned the reward {reward}")
        states.append(_flat_observation(env.observation_space, observation, here))
        actions.append(torch.as_tensor(np.asarray(given, dtype=np.float64).reshape(-1)).clone())
        rewards.append(float(reward))
        if terminated or truncated:
            break
    return torch.stack(states), torch.stack(actions), torch.tensor(rewards, dtype=torch.float64)


def _flat_observation(space: spaces.Space[Any], observation: Any, where: str) -> Tensor:
    if not isinstance(space, spaces.Box | spaces.Discrete):
        raise ValueError(
            f"observation space {space} is neither Box nor Discrete; wrap the environment in "
            "gymnasium.wrappers.FlattenObservation first"
        )
    flat = torch.as_tensor(np.asarray(observation, dtype=np.float64).reshape(-1)).clone()
    if not bool(torch.isfinite(flat).all()):
        raise ValueError(f"{where}: the environment returned the observation {flat.tolist()}")
    return flat


def _space_action(space: spaces.Space[Any], action: Tensor, where: str) -> Any:
    flat = action.detach().to("cpu", torch.float64).reshape(-1).numpy()
    if isinstance(space, spaces.Discrete):
        given: Any = int(flat[0]) if flat.size == 1 and np.isfinite(flat[0]) else None
        known = given is not None and given == flat[0] and space.contains(given)
    elif isinstance(space, spaces.Box):
        given = flat.reshape(space.shape).astype(space.dtype) if flat.size == int(np.prod(space.shape)) else None
        known = given is not None and bool(np.isfinite(flat).all())
    else:
        raise ValueError(f"action space {space} is neither Box nor Discrete")
    if not known:
        raise ValueError(f"{where}: act returned {flat.tolist()}, the action space is {space}")
    return given


def to_gym(
    mdp: ModelMDP,
    theta: Params,
    *,
    action_space: spaces.Box | spaces.Discrete,
    horizon: int,
    exogenous: Tensor | None = None,
) -> gymnasium.Env[np.ndarray, Any]:
    """The model as a `gymnasium.Env`: observations are the model's signals (`observe`; all states without one).

    `terminated` follows `mdp.terminal`; `truncated` comes after `horizon` steps. `exogenous [T >= horizon, k]` are the
    measured inputs, where the model has them. The attribute `state [n]` holds the full state. Actions are not clipped.
    Raises `ValueError` for a missing or too short `exogenous`, and at a step for an action of another shape.
    """
    return _ModelEnv(mdp, theta, action_space, horizon, _check_exogenous(mdp, horizon, exogenous))


def to_gym_vector(
    mdp: ModelMDP,
    theta: Params,
    num_envs: int,
    *,
    action_space: spaces.Box | spaces.Discrete,
    horizon: int,
    exogenous: Tensor | None = None,
) -> VectorEnv[np.ndarray, Any, Any]:
    """`num_envs` copies of `to_gym` stepped as one batch; theta may hold one value per environment `[num_envs, ...]`.

    Autoreset is `AutoresetMode.NEXT_STEP`: the step after an episode's end ignores its action, resets that row and
    returns reward 0. Raises as `to_gym` does, and `ValueError` for fewer than one environment.
    """
    if num_envs < 1:
        raise ValueError(f"num_envs must be at least 1, got {num_envs}")
    return _ModelVectorEnv(mdp, theta, num_envs, action_space, horizon, _check_exogenous(mdp, horizon, exogenous))


def _check_exogenous(mdp: ModelMDP, horizon: int, exogenous: Tensor | None) -> Tensor:
    if horizon < 1:
        raise ValueError(f"horizon must be at least 1 step, got {horizon}")
    if exogenous is None and mdp.exogenous_dim == 0:
        return torch.zeros(horizon, 0, dtype=torch.float64)
    if exogenous is None or exogenous.ndim != 2 or exogenous.shape[1] != mdp.exogenous_dim or len(exogenous) < horizon:
        got = "none" if exogenous is None else str(list(exogenous.shape))
        raise ValueError(
            f"the model has the measured inputs {mdp.names.get('exogenous', ())}: pass exogenous "
            f"[T >= {horizon}, {mdp.exogenous_dim}], got {got}"
        )
    return exogenous


def _observation_space(mdp: ModelMDP, theta: Params) -> spaces.Box:
    with torch.no_grad():
        state = mdp.initial_state(theta, torch.zeros(1, mdp.noise_dims[0], dtype=torch.float64))
        width = _observe(mdp, theta, state).shape[-1]
    return spaces.Box(-np.inf, np.inf, (width,), np.float64)


def _observe(mdp: ModelMDP, theta: Params, state: Tensor) -> Tensor:
    return state if mdp.observe is None else mdp.observe(theta, state)


def _draw(generator: np.random.Generator, count: int) -> Tensor:
    return torch.as_tensor(generator.standard_normal(count))


def _batch_action(action: Any, space: spaces.Space[Any], rows: int) -> Tensor:
    given, width = np.asarray(action, dtype=np.float64), int(np.prod(space.shape or ()))
    if given.size != rows * width:
        raise ValueError(f"actions of shape {given.shape} do not fit {rows} environments with the action space {space}")
    values = torch.as_tensor(given.reshape(rows, width))
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"an action is not finite: {values.tolist()}")
    return values


def _require_reset(state: Tensor) -> None:
    if not state.numel():
        raise gymnasium.error.ResetNeeded("the environment has no state yet; call reset before step")


@torch.no_grad()
def _advance(mdp: ModelMDP, theta: Params, state: Tensor, action: Tensor, e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Next state `[B, n]`, reward `[B]` and whether the next state is terminal `[B]`."""
    following = mdp.step(theta, state, action, e)
    reward = mdp.reward(theta, state, action, e, following)
    done = torch.zeros_like(reward, dtype=torch.bool) if mdp.terminal is None else mdp.terminal(theta, following)
    return following, reward, done


class _ModelEnv(gymnasium.Env[np.ndarray, Any]):
    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(
        self, mdp: ModelMDP, theta: Params, action_space: spaces.Box | spaces.Discrete, horizon: int, exogenous: Tensor
    ) -> None:
        self._mdp, self._theta, self._horizon, self._exogenous = mdp, theta, horizon, exogenous
        self._clock = 0
        self.state = torch.zeros(0, dtype=torch.float64)
        self.action_space = action_space
        self.observation_space = _observation_space(mdp, theta)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._clock = 0
        with torch.no_grad():
            e0 = _draw(self.np_random, self._mdp.noise_dims[0]).unsqueeze(0)
            self.state = self._mdp.initial_state(self._theta, e0)[0]
        return self._observation(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        _require_reset(self.state)
        noise = _draw(self.np_random, self._mdp.noise_dims[1] - self._mdp.exogenous_dim)
        e = torch.cat([noise, self._exogenous[min(self._clock, self._horizon - 1)]]).unsqueeze(0)
        state, given = self.state.unsqueeze(0), _batch_action(action, self.action_space, 1)
        following, reward, done = _advance(self._mdp, self._theta, state, given, e)
        self.state = following[0]
        self._clock += 1
        return self._observation(), float(reward), bool(done), self._clock >= self._horizon, {}

    def _observation(self) -> np.ndarray:
        with torch.no_grad():
            return _observe(self._mdp, self._theta, self.state.unsqueeze(0))[0].numpy().copy()


class _ModelVectorEnv(VectorEnv[np.ndarray, Any, Any]):
    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(
        self,
        mdp: ModelMDP,
        theta: Params,
        num_envs: int,
        action_space: spaces.Box | spaces.Discrete,
        horizon: int,
        exogenous: Tensor,
    ) -> None:
        self._mdp, self._theta, self._horizon, self._exogenous = mdp, theta, horizon, exogenous
        self._generators = [seeding.np_random(None)[0] for _ in range(num_envs)]
        self._clock = torch.zeros(num_envs, dtype=torch.long)
        self._finished = torch.zeros(num_envs, dtype=torch.bool)
        self.num_envs = num_envs
        self.state = torch.zeros(num_envs, 0, dtype=torch.float64)
        self.single_action_space, self.single_observation_space = action_space, _observation_space(mdp, theta)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        if seed is not None:
            seeds = [seed + row for row in range(self.num_envs)] if isinstance(seed, int) else list(seed)
            if len(seeds) != self.num_envs:
                raise ValueError(f"got {len(seeds)} seeds for {self.num_envs} environments")
            for row, value in enumerate(seeds):
                if value is not None:
                    self._generators[row] = seeding.np_random(value)[0]
        self.state = self._fresh(torch.ones(self.num_envs, dtype=torch.bool))
        self._clock = torch.zeros_like(self._clock)
        self._finished = torch.zeros_like(self._finished)
        return self._observation(), {}

    def step(self, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        _require_reset(self.state)
        restart = self._finished
        noise = self._noise(~restart, self._mdp.noise_dims[1] - self._mdp.exogenous_dim)
        e = torch.cat([noise, self._exogenous[self._clock.clamp(max=self._horizon - 1)]], -1)
        given = _batch_action(actions, self.single_action_space, self.num_envs)
        following, reward, done = _advance(self._mdp, self._theta, self.state, given, e)
        if bool(restart.any()):
            following = torch.where(restart.unsqueeze(-1), self._fresh(restart), following)
        self.state = following
        self._clock = torch.where(restart, 0, self._clock + 1)
        reward, done = torch.where(restart, 0.0, reward), done & ~restart
        truncated = self._clock >= self._horizon
        self._finished = done | truncated
        return self._observation(), reward.numpy(), done.numpy(), truncated.numpy(), {}

    def _noise(self, rows: Tensor, count: int) -> Tensor:
        """Each chosen row draws from its own generator, as its single environment would; the others get zeros."""
        zeros = torch.zeros(count, dtype=torch.float64)
        drawn = [_draw(g, count) if use else zeros for g, use in zip(self._generators, rows.tolist(), strict=True)]
        return torch.stack(drawn)

    def _fresh(self, rows: Tensor) -> Tensor:
        with torch.no_grad():
            return self._mdp.initial_state(self._theta, self._noise(rows, self._mdp.noise_dims[0]))

    def _observation(self) -> np.ndarray:
        with torch.no_grad():
            return _observe(self._mdp, self._theta, self.state).numpy().copy()
