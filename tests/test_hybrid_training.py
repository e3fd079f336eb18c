"""Training of hybrid policies: terms of an update against the library and plain loops, tiny trainings, stored rows."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from statistics import fmean

import pytest
import torch
from problems import seeded

from benchmarks import hybrid, study_hpo
from benchmarks.hybrid_tasks import HybridTask, lqr_task, metric, replenishment_task, task_policy
from benchmarks.hybrid_training import (
    Learner,
    Recipe,
    branch_returns,
    critic_features,
    generalised_advantage,
    hpo_update,
    new_learner,
    train,
)
from benchmarks.rows import stored
from sim2real.estimators import counterfactual_gradient, mixed_gradient
from sim2real.hybrid_policy import greedy_policy
from sim2real.mdp import Noise
from sim2real.rollout import Rollout, rollout

TINY = Recipe(epochs=3, batch=32, width=16)
LARGE = ("lqr/16-2/hpo", "lqr/16-2/branches")


@pytest.fixture(scope="module")
def task() -> HybridTask:
    return lqr_task(2, paths=64)


def drawn(task: HybridTask, learner: Learner, batch: int = 16) -> tuple[Noise, Rollout]:
    """Noise and rollout of a policy whose choices depend on the state."""
    with torch.no_grad():
        learner.nu["discrete.direct"].copy_(0.2 * torch.randn(2, 2, generator=seeded(1)))
        learner.nu["continuous.direct"].copy_(-0.5 * torch.eye(2).repeat(2, 1))
    horizon = task.train.process.shape[1]
    acting = torch.randn(batch, horizon, learner.policy.noise_dim, generator=seeded(2))
    noise = Noise(task.train.initial[:batch], task.train.process[:batch], acting)
    return noise, rollout(task.mdp, learner.policy, task.theta, learner.nu, noise)


def test_branches_are_rollouts_with_one_choice_forced(task: HybridTask) -> None:
    learner = new_learner(task, TINY, 0)
    noise, path = drawn(task, learner)
    times = torch.tensor([3, 17])
    with torch.no_grad():
        found, simulated = branch_returns(task, learner, noise, path, times)
        for column, start in enumerate(times.tolist()):
            for choice in range(2):
                state, total = path.states[:, start], torch.zeros(16)
                for t in range(start, 20):
                    action = learner.policy.act(learner.nu, state, noise.policy[:, t])
                    if t == start:
                        forced = torch.full((16,), choice)
                        action = learner.policy.branch(learner.nu, state, forced, noise.policy[:, t])
                    following = task.mdp.step(task.theta, state, action, noise.process[:, t])
                    total = total + task.mdp.reward(task.theta, state, action, noise.process[:, t], following)
                    state = following
                # float32 sums of up to 17 costs of order 10
                torch.testing.assert_close(found[:, column, choice], total, rtol=1e-4, atol=1e-4)
    assert simulated == 16 * (17 + 3)


def test_short_branches_compare_the_same_steps(task: HybridTask) -> None:
    learner = new_learner(task, TINY, 0)
    noise, path = drawn(task, learner)
    times = torch.tensor([0, 1, 18])
    found, simulated = branch_returns(task, learner, noise, path, times, steps=3)
    assert simulated == 16 * (3 + 3 + 2)  # two steps are left from the last one
    own = torch.stack([path.rewards[:, t : t + 3].sum(1) for t in (0, 1, 18)], 1)
    taken = path.actions[..., 0].long()[:, times].unsqueeze(-1)
    torch.testing.assert_close(found.gather(-1, taken).squeeze(-1), own)
    for column, start in enumerate(times.tolist()):  # the same rollout, ended after three steps
        end = start + 3
        short = Noise(noise.initial, noise.process[:, :end], noise.policy[:, :end])
        part = Rollout(path.states, path.actions[:, :end], path.rewards[:, :end])
        wanted, _ = branch_returns(task, learner, short, part, times[column : column + 1])
        torch.testing.assert_close(found[:, column], wanted[:, 0])


def test_later_passes_find_the_soft_best_response_to_branches(task: HybridTask) -> None:
    """Many passes over one batch of exact returns end at their softmax, where the cross entropy to it is least."""
    recipe = replace(TINY, method="branches", branch_times=1, branch_before=1, passes=300, minibatches=1, response=0.5)
    learner = new_learner(task, recipe, 0)
    noise, path = drawn(task, learner)
    to_go, _ = branch_returns(task, learner, noise, path, torch.tensor([0]))
    span = (to_go.amax(-1) - to_go.amin(-1)).square().mean().sqrt()
    wanted = torch.softmax(to_go / (0.5 * span), -1).squeeze(1)
    hpo_update(task, recipe, learner, noise, 0.0)
    start = path.states[:, 0].detach()
    found = learner.policy.choice_log_probs(learner.nu, start, start).exp()
    assert float((found - wanted).abs().mean().detach()) < 0.05  # sixteen starts, networks of width 16


def test_a_batch_that_is_cut_ends_earlier(task: HybridTask) -> None:
    *_, last = train(task, replace(TINY, cut=19))
    assert 6 * 32 < last.periods < 6 * 32 * 20


def test_generalised_advantages_are_the_sum_of_deltas(task: HybridTask) -> None:
    learner = new_learner(task, TINY, 0)
    _, path = drawn(task, learner)
    features = critic_features(task, path.states[:, :-1].detach())
    rewards = path.rewards.detach()
    whole, target, unit = generalised_advantage(replace(TINY, discount=1.0, trace=1.0), learner, features, rewards)
    to_go = rewards.flip(1).cumsum(1).flip(1) / rewards.std()
    torch.testing.assert_close(target, to_go, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(unit, 1 / rewards.std())
    step, target, _ = generalised_advantage(replace(TINY, trace=0.0), learner, features, rewards)
    value = target - step
    torch.testing.assert_close(step[:, :-1], unit * rewards[:, :-1] + 0.99 * value[:, 1:] - value[:, :-1])
    assert whole.shape == rewards.shape


@pytest.mark.parametrize("method", ["hpo", "branches"])
def test_the_first_pass_is_the_gradient_of_the_library(task: HybridTask, method: str) -> None:
    """Without later passes and entropy, a step of plain ascent goes along the estimator of the same name."""
    recipe = replace(TINY, passes=0, method=method)
    learner = new_learner(task, recipe, 0)
    noise, path = drawn(task, learner)
    before = {key: value.detach().clone() for key, value in learner.nu.items()}
    found, _, unit = generalised_advantage(
        recipe, learner, critic_features(task, path.states[:, :-1].detach()), path.rewards.detach()
    )
    advantage = (found - found.mean()) / unit
    mixed = partial(mixed_gradient, advantage=lambda path, noise, discount: advantage)
    estimator = mixed if method == "hpo" else counterfactual_gradient
    wanted = estimator(task.mdp, learner.policy, task.theta, before, noise).grad
    plain = torch.optim.SGD([{"params": group["params"]} for group in learner.optimizer.param_groups], lr=1e-3)
    hpo_update(task, recipe, replace(learner, optimizer=plain), noise, 0.0)  # type: ignore[arg-type]
    for part in ("discrete", "continuous"):  # their norms are clipped apart
        moved = torch.cat([(learner.nu[key] - before[key]).flatten() for key in before if key.startswith(part)])
        along = torch.cat([wanted[key].flatten() for key in before if key.startswith(part)])
        cosine = torch.nn.functional.cosine_similarity(moved.detach(), along, dim=0)
        assert float(cosine) > 0.9999  # differences of float32 weights


@pytest.mark.parametrize("method", ["hpo", "branches", "ppo"])
def test_a_few_epochs_lower_the_cost(task: HybridTask, method: str) -> None:
    recipe = replace(TINY, method=method, branch_times=3)
    policy = greedy_policy(task_policy(task, stochastic=method == "ppo"))
    start = new_learner(task, recipe, 0)
    before = float(metric(task, policy, start.nu, task.dev).mean())
    *_, last = train(task, recipe)
    assert float(metric(task, policy, last.nu, task.dev).mean()) < before
    assert last.updates == 6
    expected = 6 * 32 * 20
    assert last.periods == expected if method != "branches" else last.periods > expected


def test_training_is_repeatable(task: HybridTask) -> None:
    one, two = (list(train(task, replace(TINY, epochs=1), seed=3))[-1].nu for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_the_optimum_of_one_item_costs_what_is_known() -> None:
    task = replenishment_task(1, paths=256)
    cost = task.optimum(task.test)
    # 34.901 on average; four standard errors of 256 paths of 84 periods that start nearly empty after 16
    assert abs(float(cost.mean()) - 34.901) < 4 * float(cost.std()) / 16 + 0.2


def test_the_study_resumes(tmp_path, monkeypatch) -> None:
    tiny = study_hpo.Instance("lqr/2-2/hpo", lambda: lqr_task(2, paths=64), replace(TINY, epochs=1), seeds=2)
    monkeypatch.setattr(study_hpo, "instances", lambda: iter([tiny]))
    file = tmp_path / "rows.json"
    study_hpo.run(file, "", seeds=1, quick=False)
    first = file.read_text()
    study_hpo.run(file, "", seeds=1, quick=False)
    assert file.read_text() == first
    study_hpo.run(file, "nothing", seeds=2, quick=False)
    assert file.read_text() == first
    study_hpo.run(file, "", seeds=2, quick=False)
    rows = json.loads(file.read_text())
    assert [row["seed"] for row in rows] == [0, 1]
    assert rows[0]["optimum"] == pytest.approx(1.1, rel=0.3)
    assert {"command", "machine", "versions", "recipe", "curve", "gap", "gap_stderr"} <= set(rows[0])


@pytest.mark.parametrize(("size", "bar"), [("3-2", 0.005), ("16-2", 0.03), ("48-2", 0.07)])
def test_stored_gaps_meet_the_bars(size: str, bar: float) -> None:
    gaps = [row["gap"] for row in stored(study_hpo.FILE) if row["instance"] == f"lqr/{size}/hpo"]
    if not gaps:
        pytest.skip(f"no rows of {size} yet")
    assert 0.0 < fmean(gaps) <= bar


def test_stored_branches_beat_the_critic_on_fewer_periods() -> None:
    rows = {name: [row for row in stored(study_hpo.FILE) if row["instance"] == name] for name in LARGE}
    plain, branches = (rows[name] for name in LARGE)
    if not plain or not branches:
        pytest.skip("no rows of both yet")
    assert max(row["curve"][-1][1] for row in branches) <= min(row["curve"][-1][1] for row in plain)
    assert fmean(row["gap"] for row in branches) < fmean(row["gap"] for row in plain)


@pytest.mark.parametrize("items", [1, 2, 3])
def test_stored_replenishment_is_within_one_percent(items: int) -> None:
    gaps = [row["gap"] for row in stored(study_hpo.FILE) if row["instance"] == f"jrp/{items}/branches"]
    if not gaps:
        pytest.skip(f"no rows of {items} items yet")
    assert fmean(gaps) <= 0.01


def test_figures_from_rows(monkeypatch) -> None:
    row = {"gap": 0.01, "optimum_dev": 1.0, "curve": [[8, 100, 1.0, 1.5], [16, 200, 2.0, 1.02], [24, 300, 3.0, 1.01]]}
    assert hybrid.best_within(row, 250) == pytest.approx(0.02)
    assert (hybrid.first_within(row, 1.1), hybrid.first_within(row, 1.0)) == (16, None)
    rows = {"3-2/hpo": [row, row], "3-2/branches": [row], "3-2/ppo": [row | {"gap": 0.04}]}
    monkeypatch.setattr(hybrid, "rows_of", lambda task: rows)
    found = {figure.metric: figure.value for figure in hybrid.m_lqr(quick=False)}
    assert found["3-2"] == pytest.approx(0.01)
    assert found["ppo-ratio-3"] == pytest.approx(4.0)
    assert found["branches-same-periods-3-2"] == pytest.approx(0.01)
    fifty = {"hpo": [row], "ppo": [row | {"curve": [[8, 100, 1.0, 3.0], [800, 200, 2.0, 2.0]]}]}
    monkeypatch.setattr(hybrid, "rows_of", lambda task: fifty)
    found = {figure.metric: figure.value for figure in hybrid.m_jrp50(quick=False)}
    assert (found["updates"], found["ppo-ratio-at-least"]) == (16, 50)
