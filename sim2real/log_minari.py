"""A `RolloutLog` as a Minari data set, for offline learners that read those; `load_log` reads its HDF5 file back.

An observation is the signals, an action the inputs, the reward that of the log. Stretches of valid steps become
episodes: a masked step ends one, as a truncation, so that no transition is made up.
Format: https://minari.farama.org (0.5).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import gymnasium
import numpy as np

from sim2real.log_errors import LogError
from sim2real.rollout_log import RolloutLog

if TYPE_CHECKING:
    import minari


def save_minari(log: RolloutLog, dataset_id: str, *, description: str = "") -> minari.MinariDataset:
    """Write the data set `dataset_id` (for example "reacher/high-level-v0") where Minari keeps them, float64.

    Minari's folder is `~/.minari/datasets`, or that of the environment variable MINARI_DATASETS_PATH. Raises
    `ModuleNotFoundError` without Minari, `LogError` for a log without rewards or valid steps, and `ValueError` (of
    Minari) where the data set exists.
    """
    try:
        import minari
        from minari.data_collector import EpisodeBuffer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("save_minari needs the package minari; install sim2real[logs]") from error
    if log.rewards is None:
        raise LogError("Minari episodes need rewards; replace(log, rewards=[B, T])", file=log.source)
    buffers: list[EpisodeBuffer] = []
    for k, first, last in _stretches(log.mask.numpy()):
        ends = np.zeros(last - first, dtype=bool)
        cut = np.concatenate([ends[1:], [True]])
        buffers.append(
            EpisodeBuffer(
                id=len(buffers),
                observations=log.signals[k, first : last + 1].numpy(),
                actions=log.actions[k, first:last].numpy(),
                rewards=log.rewards[k, first:last].tolist(),
                terminations=ends.tolist(),
                truncations=cut.tolist(),
            )
        )
    if not buffers:
        raise LogError("no step of this log is valid: there is nothing to save", file=log.source)
    spaces = (
        gymnasium.spaces.Box(-np.inf, np.inf, (values.shape[-1],), np.float64) for values in (log.signals, log.actions)
    )
    observation, action = spaces
    names = ", ".join(f"{name} [{log.units.get(name, '1')}]" for name in log.names["signal"] + log.names["action"])
    return minari.create_dataset_from_buffers(
        dataset_id=dataset_id,
        buffer=buffers,
        observation_space=observation,
        action_space=action,
        algorithm_name=log.source,
        description=f"{description} Period {log.dt:.9g} s; observations, then actions: {names}".strip(),
        requirements=[],
    )


def _stretches(mask: np.ndarray) -> list[tuple[int, int, int]]:
    """Episode, first and last + 1 of each run of valid steps."""
    found = []
    for k, row in enumerate(mask):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(np.int8), [0]])))
        found += [(k, int(first), int(last)) for first, last in edges.reshape(-1, 2)]
    return found
