"""The inventory problem classes as published: store data, demand, seeds, splits and the metric.

Every draw uses a NumPy legacy generator with a published seed, so the numbers are those of the reference code: store
data (means, coefficients of variation, costs, lead times), demand for training and selection (one joint draw), demand
for the test, initial pipelines. The metric is the mean cost per period, path and store over the periods after a
warm-up: 50 periods with 30 of warm-up for training, 100 with 60 for selection, 5000 with 3000 for the test.

Reference: settings of arXiv 2306.11246 (one store, serial, warehouses, transshipment) and of its sequel on hybrid
actions (joint replenishment).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sim2real.bounds import default_params
from sim2real.inventory_policies import StoreTraits
from sim2real.mdp import ModelMDP, Noise
from sim2real.params import Params
from sim2real.policy import Policy
from sim2real.simulators.inventory import one_store, serial_line
from sim2real.simulators.inventory_network import Routes, inventory_network, layout_of
from sim2real.simulators.joint_replenishment import OrderTerms, joint_replenishment

SEEDS = {
    "underage": 28,
    "holding": 73,
    "mean": 33,
    "variation": 92,
    "lead_time": 41,
    "train": 57,
    "test": 65,
    "initial": 4839,
}

Draw = Callable[[np.random.RandomState, int, int], NDArray[np.float64]]
"""generator, paths, periods -> demand `[paths, stores, periods]`"""


@dataclass(frozen=True)
class InventoryTask:
    """A model with its costs, the demand of its stores, and the seeds of its draws."""

    mdp: ModelMDP
    mean: Tensor
    """`[n]` mean demand per period and store, as `std`"""
    std: Tensor
    draw: Draw
    train_seed: int = SEEDS["train"]
    test_seed: int = SEEDS["test"]
    routes: Routes | None = None
    """of a network"""

    @property
    def theta(self) -> Params:
        """The published costs."""
        return default_params(self.mdp.box)


def task_noise(
    task: InventoryTask, paths: int, periods: int, *, seed: int, dtype: torch.dtype = torch.float64
) -> Noise:
    """Demand of `paths` over `periods` from `seed`, and initial pipelines: the noise of a rollout without exploration.

    Training and selection data are the first and the last paths of one draw. Raises `ValueError` for no paths.
    """
    if paths < 1 or periods < 1:
        raise ValueError(f"paths and periods must be at least 1, got {paths} and {periods}")
    demand = task.draw(np.random.RandomState(seed), paths, periods)
    stores, columns = demand.shape[1], task.mdp.noise_dims[0]
    uniform = np.random.RandomState(SEEDS["initial"]).uniform(size=(paths, stores, columns // stores))
    # drawn store by store, kept position by position; the model turns standard normals into uniform numbers
    start = torch.special.ndtri(torch.from_numpy(uniform).transpose(1, 2).reshape(paths, columns))
    process = torch.from_numpy(demand).transpose(1, 2)
    return Noise(start.to(dtype), process.to(dtype).contiguous(), start.new_zeros(paths, periods, 0).to(dtype))


@torch.no_grad()
def mean_cost(task: InventoryTask, policy: Policy, nu: Params, noise: Noise, *, ignore: int) -> Tensor:
    """Cost per counted period and store of each path `[B]`, float64; the first `ignore` periods do not count.

    Keeps no trajectory: 5000 periods take the memory of one. Raises `ValueError` when nothing would be counted.
    """
    periods = noise.process.shape[1]
    if not 0 <= ignore < periods:
        raise ValueError(f"ignore must lie in [0, {periods}), the number of periods; got {ignore}")
    theta = {key: value.to(noise.process) for key, value in task.theta.items()}
    state = task.mdp.initial_state(theta, noise.initial)
    total = torch.zeros(len(state), dtype=torch.float64, device=state.device)
    for t, (e, acting) in enumerate(zip(noise.process.unbind(1), noise.policy.unbind(1), strict=True)):
        action = policy.act(nu, state, acting)
        following = task.mdp.step(theta, state, action, e)
        if t >= ignore:
            total -= task.mdp.reward(theta, state, action, e, following).double()
        state = following
    return total / ((periods - ignore) * len(task.mean))


def store_traits(task: InventoryTask) -> StoreTraits:
    """What a symmetry-aware policy needs to know of a network: costs, variation and lead times of each store."""
    if task.routes is None:
        raise ValueError("only a network has store traits; this task has no routes")
    theta, times = task.theta, torch.tensor(task.routes.lead_times, dtype=torch.float64)
    columns = [theta["holding"], theta["underage"] / 10, task.std / task.mean, *(times / 4)]
    layout = layout_of(task.routes)
    return StoreTraits(
        task.mean, torch.stack(columns, -1), layout.store_width, layout.warehouses, layout.warehouse_width
    )


def one_store_task(lead_time: int, underage: float, *, lost: bool = False) -> InventoryTask:
    """One store: Normal(5, 1.6) clipped at 0 and backlogged, or Poisson(5) and lost; holding 1."""
    shift = int(lead_time + 10 * underage)
    return InventoryTask(
        one_store(lead_time, lost=lost, underage=underage),
        mean=torch.tensor([5.0], dtype=torch.float64),
        std=torch.tensor([5.0**0.5 if lost else 1.6], dtype=torch.float64),
        draw=poisson_demand([5.0]) if lost else normal_demand([5.0], [1.6]),
        train_seed=SEEDS["train"] + shift,
        test_seed=SEEDS["test"] + shift,
    )


def serial_task(lead_time: int, underage: float) -> InventoryTask:
    """Supplier -2-> stock3 -4-> stock2 -3-> stock1 -lead_time-> store, Normal(5, 2) clipped at 0, backlogged."""
    return InventoryTask(
        serial_line((lead_time, 3, 4, 2), underage=underage),
        mean=torch.tensor([5.0], dtype=torch.float64),
        std=torch.tensor([2.0], dtype=torch.float64),
        draw=normal_demand([5.0], [2.0]),
    )


def transshipment_task(stores: int, correlation: float, lead_time: int, underage: float) -> InventoryTask:
    """Supplier -3-> hub -lead_time-> stores: jointly normal demand, not clipped, backlogged; holding 1."""
    mean, std = demand_moments(stores)
    routes = Routes(((lead_time,) * stores,), (3,))
    mdp = inventory_network(
        routes,
        lost=False,
        hub=True,
        start=mean.tolist(),
        holding=[1.0] * stores,
        underage=[underage] * stores,
        warehouse_holding=[0.5],
    )
    draw = normal_demand(mean, std, correlation, clip=False)
    return InventoryTask(mdp, torch.from_numpy(mean), torch.from_numpy(std), draw, routes=routes)


def one_warehouse_task(stores: int) -> InventoryTask:
    """Supplier -3-> warehouse -{2, 3}-> stores, correlated clipped normal demand, lost; costs drawn per store."""
    times = np.random.RandomState(SEEDS["lead_time"]).randint(2, 4, stores)
    return _warehouses(Routes((tuple(times.tolist()),), (3,)), [0.3], [0.0])


def many_warehouses_task() -> InventoryTask:
    """Two warehouses, ten stores: a cheap, distant one for some and a near, dear one for most; lost demand."""
    far = (0, 0, 6, 6, 6, 0, 6, 6, 6, 0)
    near = (2, 1, 2, 2, 1, 2, 0, 2, 2, 2)
    return _warehouses(Routes((far, near), (3, 3)), [0.3, 0.4], [0.5, 1.5])


def _warehouses(routes: Routes, holding: list[float], purchase: list[float]) -> InventoryTask:
    stores = len(routes.lead_times[0])
    mean, std = demand_moments(stores)
    mdp = inventory_network(
        routes,
        start=mean.tolist(),
        holding=_uniform("holding", 0.7, 1.3, stores).tolist(),
        underage=_uniform("underage", 6.3, 11.7, stores).tolist(),
        warehouse_holding=holding,
        purchase=purchase,
    )
    return InventoryTask(
        mdp, torch.from_numpy(mean), torch.from_numpy(std), normal_demand(mean, std, 0.5), routes=routes
    )


def joint_replenishment_task(
    items: int, fixed: float = 64.0, *, terms: Sequence[OrderTerms] = (OrderTerms(),)
) -> InventoryTask:
    """Poisson demand with means on [6, 14], costs drawn per item, lead time 2; horizon 100 of which 16 do not count."""
    mean = _uniform("mean", 6.0, 14.0, items).round(3)
    mdp = joint_replenishment(
        _uniform("holding", 0.7, 1.3, items).tolist(),
        _uniform("underage", 6.3, 11.7, items).tolist(),
        fixed=fixed,
        terms=terms,
    )
    means = torch.from_numpy(mean)
    return InventoryTask(mdp, means, means.sqrt(), poisson_demand(mean))


def negative_binomial_task(*, fixed: float = 50.0, underage: float = 50.0, variation: float = 0.5) -> InventoryTask:
    """Two items, lead time 0, variance m (1 + m cv^2) per week with cv = sqrt(52) variation; published optimum 1.411.

    `underage` is per unit and year (holding: 2), purchase prices 0.1 and 0.4, mean demand 40 and 20 per year.
    """
    mean = np.array([40.0, 20.0]) / 52
    shape = 1 / (52 * variation**2)

    def draw(generator: np.random.RandomState, paths: int, periods: int) -> NDArray[np.float64]:
        chance = shape / (shape + mean)
        return generator.negative_binomial(shape, chance[:, None], (paths, 2, periods)).astype(np.float64)

    mdp = joint_replenishment([2 / 52] * 2, [underage / 52] * 2, fixed=fixed, purchase=[0.1, 0.4], lead_time=0)
    std = np.sqrt(mean * (1 + mean / shape))
    return InventoryTask(mdp, torch.from_numpy(mean), torch.from_numpy(std), draw)


def demand_moments(stores: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means on [2.5, 7.5] and standard deviations (0.25 to 0.5 of the mean) of the stores of a network."""
    mean = _uniform("mean", 2.5, 7.5, stores).round(3)
    return mean, (mean * _uniform("variation", 0.25, 0.5, stores)).round(3)


def normal_demand(
    mean: Sequence[float] | NDArray[np.float64],
    std: Sequence[float] | NDArray[np.float64],
    correlation: float = 0.0,
    *,
    clip: bool = True,
) -> Draw:
    """Normal demand with one correlation between all pairs of stores, negative draws set to 0 if `clip`."""
    center, spread = np.asarray(mean), np.asarray(std)
    covariance = np.outer(spread, spread) * (correlation + (1 - correlation) * np.eye(len(spread)))

    def draw(generator: np.random.RandomState, paths: int, periods: int) -> NDArray[np.float64]:
        if len(center) == 1:
            demand = generator.normal(center[0], spread[0], (paths, 1, periods))
        else:
            demand = generator.multivariate_normal(center, covariance, (paths, periods)).transpose(0, 2, 1)
        return np.clip(demand, 0.0, None) if clip else demand

    return draw


def poisson_demand(mean: Sequence[float] | NDArray[np.float64]) -> Draw:
    """Independent Poisson demand."""
    rate = np.asarray(mean)[:, None]
    return lambda generator, paths, periods: generator.poisson(rate, (paths, len(rate), periods)).astype(np.float64)


def _uniform(what: str, low: float, high: float, count: int) -> NDArray[np.float64]:
    return np.random.RandomState(SEEDS[what]).uniform(low, high, count)
