"""Study `j-train/ratio`: time of training to a return of 1000 and 2000 in Hopper-v5, short-horizon gradients over PPO.

    python benchmarks/study_mujoco.py [--only ppo] [--seeds 3] [--minutes 15] [--out FILE]

`gradients` is `examples/mujoco_hopper.py`. `ppo` is torchrl's loss, advantages and collector with the settings of its
own example for MuJoCo: 2048 frames a batch, 10 epochs, batches of 64, clip 0.2, tanh networks of 64, normalised
observations. One process and one thread each. Both are judged alike, by the mean return of 10 episodes of Hopper-v5 of
at most 1000 steps without noise in the actions; judging does not count as time.

A row is one method and seed: for each goal the wall-clock and processor seconds until the first judgement that reaches
it (null: not within the processor minutes of `--minutes`), the curve, settings, command, machine and versions.
Processor seconds are what other jobs on the machine spoil least; they set the cap and when to judge. Resumable: a row
that the file holds is skipped, unless it was capped earlier than asked. `--report` prints the bar from the rows: the
ratio of means over seeds, and the spread of both. A run of PPO that was capped counts to its last judgement, so the
ratio is then at most what is printed (`ratio-GOAL-at-most`); where a run of `gradients` was capped there is no ratio.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bars import Figure, MissingError, show
from benchmarks.rows import Row, append, stamp, stored
from examples.mujoco_hopper import Settings, episode, training

Training = Iterator[tuple[Callable[[Tensor], Tensor], int]]
GOALS = (1000, 2000)
EPISODES = 10
PPO = {"frames": 2048, "epochs": 10, "batch": 64, "rate": 3e-4, "clip": 0.2, "discount": 0.99, "trace": 0.95}


def gradients(seed: int) -> Training:
    """Short-horizon actor-critic through the simulator."""
    return training(Settings(), seed)


def ppo(seed: int) -> Training:
    """Proximal policy optimisation by torchrl."""
    try:
        from tensordict.nn import AddStateIndependentNormalScale, TensorDictModule
        from torchrl.collectors import Collector
        from torchrl.data import LazyTensorStorage, ReplayBuffer, SamplerWithoutReplacement
        from torchrl.envs import ClipTransform, DoubleToFloat, GymEnv, RewardSum, StepCounter, TransformedEnv, VecNorm
        from torchrl.modules import ProbabilisticActor, TanhNormal, ValueOperator
        from torchrl.objectives import ClipPPOLoss
        from torchrl.objectives.value import GAE
    except ImportError as error:
        raise MissingError(f"torchrl is not installed ({error}); pip install 'sim2real[rl]'") from error
    torch.manual_seed(seed)
    norm = VecNorm(in_keys=["observation"], decay=0.99999, eps=1e-2)
    clip = ClipTransform(in_keys=["observation"], low=-10.0, high=10.0)
    env = TransformedEnv(GymEnv("Hopper-v5"))
    for transform in (DoubleToFloat(in_keys=["observation"]), norm, clip, RewardSum(), StepCounter()):
        env.append_transform(transform)
    env.set_seed(seed)
    mean = nn.Sequential(tanh_network(3), AddStateIndependentNormalScale(3, scale_lb=1e-8))
    actor = ProbabilisticActor(
        TensorDictModule(mean, ["observation"], ["loc", "scale"]),
        ["loc", "scale"],
        distribution_class=TanhNormal,
        distribution_kwargs={"low": -1.0, "high": 1.0, "tanh_loc": False},
        return_log_prob=True,
    )
    critic = ValueOperator(tanh_network(1), in_keys=["observation"])
    advantage = GAE(gamma=PPO["discount"], lmbda=PPO["trace"], value_network=critic)
    loss = ClipPPOLoss(
        actor, critic, clip_epsilon=PPO["clip"], entropy_coeff=0.0, critic_coeff=0.25, normalize_advantage=True,
        loss_critic_type="l2",
    )  # fmt: skip
    steps = torch.optim.Adam(loss.parameters(), lr=PPO["rate"], eps=1e-5)
    buffer = ReplayBuffer(
        storage=LazyTensorStorage(int(PPO["frames"])), sampler=SamplerWithoutReplacement(), batch_size=int(PPO["batch"])
    )
    seen = 0
    for data in Collector(env, actor, frames_per_batch=int(PPO["frames"]), total_frames=-1):
        for _ in range(int(PPO["epochs"])):
            with torch.no_grad():
                advantage(data)
            buffer.extend(data.reshape(-1))
            for batch in buffer:
                found = loss(batch)
                steps.zero_grad()
                (found["loss_objective"] + found["loss_critic"]).backward()
                nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
                steps.step()
        seen += data.numel()
        yield lambda o: torch.tanh(mean(normalised(norm, o))[0]), seen


def tanh_network(outputs: int) -> nn.Sequential:
    """Two hidden layers of 64, orthogonal."""
    layers = [nn.Linear(11, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs)]
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, 0.01 if layer is layers[-1] and outputs > 1 else 1.0)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def normalised(norm: Any, o: Tensor) -> Tensor:
    """Observations as the actor of PPO was trained on them."""
    shift, factor = norm.loc["observation"], norm.scale["observation"]
    return ((o.float() - shift) / factor).clamp(-10.0, 10.0)


METHODS: dict[str, Callable[[int], Training]] = {"gradients": gradients, "ppo": ppo}


def measured(method: str, seed: int, minutes: float, every: float) -> Row:
    """Train until the last goal or out of time; judged about every so many processor seconds."""
    wall = cpu = judged = 0.0
    curve: list[tuple[float, float, int, float]] = []
    rounds = METHODS[method](seed)
    while cpu < 60 * minutes and (not curve or curve[-1][3] < GOALS[-1]):
        start, used = time.perf_counter(), time.process_time()
        act, steps = next(rounds)
        wall, cpu = wall + time.perf_counter() - start, cpu + time.process_time() - used
        if cpu - judged >= every or not curve:
            judged = cpu
            value = statistics.fmean(episode(act, 1000 + k, 1000)[0] for k in range(EPISODES))
            curve.append((round(wall, 1), round(cpu, 1), steps, round(value, 1)))
            print(method, seed, curve[-1], file=sys.stderr, flush=True)
    row: Row = {"method": method, "seed": seed, "wall": round(wall, 1), "cpu": round(cpu, 1)}
    for goal in GOALS:
        reached = [point for point in curve if point[3] >= goal]
        row[f"wall_to_{goal}"], row[f"cpu_to_{goal}"] = reached[0][:2] if reached else (None, None)
    return row | {"curve": curve}


def run(path: Path, only: str, seeds: int, minutes: float, every: float) -> None:
    """Append the rows that are missing, one by one."""
    settings = {"gradients": asdict(Settings()), "ppo": PPO}
    where = {"minutes": minutes} | stamp("torch", "mujoco", "gymnasium", "torchrl")
    for method in METHODS:
        for seed in range(seeds):
            if only in method and not finished(stored(path), method, seed, minutes):
                load = {"load": round(os.getloadavg()[0], 1)}
                append(path, measured(method, seed, minutes, every) | {"settings": settings[method]} | load | where)


def finished(rows: list[Row], method: str, seed: int, minutes: float) -> bool:
    """Whether a row reached the last goal or was given as long."""
    mine = [row for row in rows if (row["method"], row["seed"]) == (method, seed)]
    return any(row[f"cpu_to_{GOALS[-1]}"] is not None or row["minutes"] >= minutes for row in mine)


def report(path: Path) -> Iterator[Figure]:
    """`j-train`: ratios of mean seconds over seeds, and the least and largest of each."""
    rows = {(row["method"], row["seed"]): row for row in stored(path)}.values()  # the longest, which came last
    for goal, (place, clock) in itertools.product(GOALS, enumerate(("wall", "cpu"))):
        seconds: dict[str, list[float]] = {}
        capped: dict[str, bool] = {}
        for m in METHODS:
            mine = [row for row in rows if row["method"] == m]
            reached = [row[f"{clock}_to_{goal}"] for row in mine if row[f"{clock}_to_{goal}"] is not None]
            seconds[m] = reached + [row["curve"][-1][place] for row in mine if row[f"{clock}_to_{goal}"] is None]
            capped[m] = len(reached) < len(mine)
            if reached:
                yield Figure(f"{m}-{goal}-{clock}", statistics.fmean(reached), "s", len(reached))
                yield Figure(f"{m}-{goal}-{clock}-least", min(reached), "s", len(reached))
                yield Figure(f"{m}-{goal}-{clock}-largest", max(reached), "s", len(reached))
            if mine and clock == "wall":
                yield Figure(f"{m}-{goal}-reached", len(reached) / len(mine), "share", len(mine))
        if all(seconds.values()) and not capped["gradients"]:
            ratio = statistics.fmean(seconds["gradients"]) / statistics.fmean(seconds["ppo"])
            name = f"ratio-{goal}" + ("" if clock == "wall" else "-cpu") + ("-at-most" if capped["ppo"] else "")
            yield Figure(name, ratio, "of PPO", min(len(s) for s in seconds.values()), 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "mujoco_training.json")
    parser.add_argument("--only", default="", help="part of the method's name")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=15.0, help="of processor time, per method and seed, at most")
    parser.add_argument("--every", type=float, default=5.0, help="processor seconds between judgements")
    parser.add_argument("--report", action="store_true", help="print the figures of the stored rows only")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    if not arguments.report:
        run(arguments.out, arguments.only, arguments.seeds, arguments.minutes, arguments.every)
    for figure in report(arguments.out):
        show("j-train", figure, 0.0, arguments.json)


if __name__ == "__main__":
    main()
