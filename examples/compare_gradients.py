"""Which gradient for a policy that may order nothing
=====================================================

One product with a fixed cost per order, written as the user's own model with a plain order quantity: expect the
pathwise gradient to be badly biased and to learn nothing of when to order, the mixed gradient to be right and cheap.

    python examples/compare_gradients.py

The return jumps where an order begins. The order axis is cut there: the policy chooses between nothing and a positive
amount (`cut_policy`), and `compare_estimators` measures bias, variance and cost of every gradient on this very problem.
Then both train the policy. Quantities are in units of the mean demand of a period.
"""

from __future__ import annotations

import argparse
from functools import partial

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from torch import Tensor, nn

from sim2real import (
    ModelMDP,
    Params,
    assign_grads,
    box_cells,
    cut_policy,
    expected_return,
    greedy_policy,
    hybrid_module_policy,
    sample_noise,
)
from sim2real.estimator_report import comparison_table
from sim2real.estimators import compare_estimators, mixed_gradient, pathwise_gradient, state_baseline

FIXED, HOLDING, SHORTAGE = 2.0, 1.0, 9.0  # per order; per unit and period
HORIZON = 20


def step(theta: Params, state: Tensor, action: Tensor, e: Tensor) -> Tensor:
    """Stock after this period's order and demand; negative: owed to customers."""
    return state + action - torch.exp(theta["spread"] * e - 0.5 * theta["spread"] ** 2)


def reward(theta: Params, state: Tensor, action: Tensor, e: Tensor, following: Tensor) -> Tensor:
    stock = following[:, 0]
    holding = HOLDING * torch.relu(stock) + SHORTAGE * torch.relu(-stock)
    return -(holding + FIXED * (action[:, 0] > 0).to(stock.dtype)) / HORIZON  # jumps at the first unit ordered


MODEL = ModelMDP(
    initial_state=lambda theta, e: 2.0 + e,
    step=step,
    reward=reward,
    noise_dims=(1, 1),
    dt=86400.0,
)


def network(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, outputs)).double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer batches and steps")
    parser.add_argument("--plot", default="compare_gradients.png")
    arguments, _ = parser.parse_known_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(0)

    hybrid, nu = hybrid_module_policy(network(2), network(2), choices=2, continuous_dim=1)
    low, high = torch.zeros(2, 1).double(), torch.tensor([[0.0], [torch.inf]]).double()
    policy = cut_policy(hybrid, box_cells(low, high))
    theta = {"spread": torch.tensor(0.4, dtype=torch.float64)}
    draw = lambda batch=128: sample_noise(MODEL, policy, batch, HORIZON, rng)

    batches = 6 if arguments.quick else 30
    found = compare_estimators(MODEL, policy, theta, nu, draw, batches=batches, reference_batches=4 * batches)
    Console(width=150).print(comparison_table(found))

    curves: dict[str, list[float]] = {}
    test = sample_noise(MODEL, policy, 1024, HORIZON, torch.Generator().manual_seed(1))
    for name, gradient in (
        ("mixed", partial(mixed_gradient, advantage=state_baseline())),
        ("pathwise", pathwise_gradient),
    ):
        trained = {key: value.detach().clone() for key, value in nu.items()}
        optimizer = torch.optim.Adam(list(trained.values()), lr=2e-2, maximize=True)
        curves[name] = []
        for _ in range(4 if arguments.quick else 150):
            assign_grads(trained, gradient(MODEL, policy, theta, trained, draw()).grad)
            optimizer.step()
            curves[name].append(-float(expected_return(MODEL, greedy_policy(policy), theta, trained, test)))
        print(f"{name}: cost per period {curves[name][0]:.2f} after the first step, {curves[name][-1]:.2f} at the end")

    for name, costs in curves.items():
        plt.plot(costs, label=name)
    plt.xlabel("step of 128 rollouts")
    plt.ylabel("cost per period, likeliest choice")
    plt.legend()
    plt.savefig(arguments.plot, dpi=120)


if __name__ == "__main__":
    main()
