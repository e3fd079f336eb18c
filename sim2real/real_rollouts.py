"""Where `sim2real tune` gets rollouts of the policy it proposes: a Gymnasium environment, or a folder that grows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import gymnasium
import torch
from torch import Tensor

from sim2real.checkpoint import write_atomic
from sim2real.conf import TuneConfig
from sim2real.conf.compose import UsageError
from sim2real.gym import record_rollout
from sim2real.log import RolloutLog, load_log
from sim2real.log_formats import READERS
from sim2real.mdp import ModelMDP
from sim2real.params import Params
from sim2real.policy import Policy
from sim2real.rollout import Rollout
from sim2real.tuning import Collect


class DataError(ValueError):
    """Real rollouts cannot be used, or there is no source of them."""


def check_signals(log: RolloutLog, states: Sequence[str]) -> None:
    """Raise `DataError` unless the log's signals are the states the policy acts on."""
    if tuple(log.names["signal"]) != tuple(states):
        raise DataError(
            f"'{log.source}' has the signals {log.names['signal']}, the policy needs the model's states {states}: "
            f"name and derive them in the schema"
        )


def environment(config: TuneConfig, mdp: ModelMDP) -> Collect:
    """Rollouts of a Gymnasium environment, seeded by iteration so that a resumed run sees the same ones."""
    if config.data.env is None:
        raise UsageError("data.mode=env needs data.env=ID")
    try:
        env = gymnasium.make(config.data.env)
    except gymnasium.error.Error as error:
        raise UsageError(f"data.env={config.data.env}: {error}") from error
    steps = max(1, round(config.horizon / mdp.dt))

    def collect(policy: Policy, nu: Params, iteration: int, generator: torch.Generator) -> Rollout:
        def act(state: Tensor) -> Tensor:
            e = torch.randn(1, policy.noise_dim, dtype=torch.float64, generator=generator)
            action = policy.act(nu, state, e)
            return action + config.data.exploration * torch.randn(
                action.shape, dtype=torch.float64, generator=generator
            )

        seed = config.seed + 1 + iteration * config.data.rollouts
        return record_rollout(env, act, episodes=config.data.rollouts, max_steps=steps, seed=seed)

    return collect


def growing_folder(config: TuneConfig, mdp: ModelMDP, out: Path) -> Collect:
    """New files of `data.folder` are rollouts of the policy exported last; which were used when is kept on disk.

    With `resume=false` that record is forgotten: files already there belong to policies of another run.
    """
    if config.data.folder is None:
        raise UsageError("data.mode=folder needs data.folder=PATH, where new rollouts arrive")
    arrivals, record = Path(config.data.folder), out / "batches.json"
    arrivals.mkdir(parents=True, exist_ok=True)
    if not config.resume:
        record.unlink(missing_ok=True)

    def collect(policy: Policy, nu: Params, iteration: int, generator: torch.Generator) -> RolloutLog | None:
        batches: dict[str, list[str]] = json.loads(record.read_text()) if record.exists() else {}
        used = {name for names in batches.values() for name in names}
        found = sorted(f.name for f in arrivals.iterdir() if f.suffix.lower() in READERS and f.name not in used)
        if not record.exists():
            if found:
                raise DataError(
                    f"'{arrivals}' holds {len(found)} logs before any policy was exported (first: {found[0]}); "
                    f"pass them as log=... and let data.folder be an empty folder"
                )
            write_atomic(record, b"{}")
        names = batches.get(str(iteration), found)
        if not names:
            return None
        log = load_log([arrivals / name for name in names], config.schema, overrides=config.columns, dt=mdp.dt)
        check_signals(log, mdp.names.get("state", ()))
        write_atomic(record, json.dumps({**batches, str(iteration): names}).encode())
        return log

    return collect
