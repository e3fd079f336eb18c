"""The offline learners on problems whose answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchrl")

from benchmarks.ohio_learning import (
    Family,
    Networks,
    Recipe,
    Transitions,
    VectorCritic,
    best,
    beta,
    dirichlet,
    gaussian,
    joined,
    learn,
    log_loss,
    perceptron,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def one_state(u: Tensor, reward: Tensor) -> Transitions:
    """A bandit: every transition ends."""
    features = torch.ones(len(u), 1)
    return Transitions(features, u, reward, features, torch.ones(len(u), dtype=torch.bool))


def trained(data: Transitions, family: Family, outputs: int, recipe: Recipe) -> Tensor:
    torch.manual_seed(0)
    value = nn.Sequential(perceptron(1, 1, 16, 1), nn.Flatten(0))
    networks = Networks(perceptron(1, outputs, 16, 1), VectorCritic(1, data.input.shape[1], 16), value)
    last = list(learn(data, data, networks, family, recipe, seed=0))[-1]
    return best(networks.policy, family, last.policy, torch.ones(1, 1))[0]


FAMILIES = {
    "gaussian": (gaussian(), 4, torch.tensor([0.2, -0.4])),
    "beta": (beta(-1.0, 1.0), 4, torch.tensor([0.2, -0.4])),
    "dirichlet": (dirichlet(), 3, torch.tensor([0.2, 0.5, 0.3])),
    "joined": (joined(dirichlet(), 2, 2, beta(0.0, 3.0)), 4, torch.tensor([0.3, 0.7, 1.0])),
}


@pytest.mark.parametrize("name", ["gaussian", pytest.param("beta", marks=pytest.mark.slow), "joined"])
def test_cloning_finds_the_mean_of_the_data(name: str) -> None:
    family, outputs, mean = FAMILIES[name]
    noise = 0.02 * torch.randn(400, len(mean), generator=torch.Generator().manual_seed(1))
    u = mean + (noise - noise.mean(-1, keepdim=True))  # shares keep their sum
    found = trained(one_state(u, torch.zeros(400)), family, outputs, Recipe("bc", updates=300, rate=2e-2, batch=64))
    torch.testing.assert_close(found, mean, rtol=0, atol=0.05)  # Adam at this rate leaves about 0.02


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_families_project_into_their_support(name: str) -> None:
    family, outputs, mean = FAMILIES[name]
    u = torch.randn(20, len(mean), generator=torch.Generator().manual_seed(2))
    distribution = family.distribution(torch.randn(20, outputs, generator=torch.Generator().manual_seed(3)))
    assert bool(distribution.log_prob(family.project(u)).isfinite().all())
    sample = distribution.rsample()
    assert sample.shape == u.shape


@pytest.mark.slow
@pytest.mark.parametrize("method", ["iql", "cql"])
def test_offline_learning_prefers_what_pays(method: str) -> None:
    """Half of the data earns 1, half 0: the learned mean is near the good half, where cloning lies between."""
    generator = torch.Generator().manual_seed(4)
    good = (torch.arange(400) % 2).float()
    u = (2 * good - 1).unsqueeze(-1) * 0.5 + 0.02 * torch.randn(400, 1, generator=generator)
    recipe = Recipe(method, updates=400, rate=1e-2, critic_rate=1e-2, batch=64, average=0.05, temperature=5.0)
    found = trained(one_state(u, good), gaussian(), 2, recipe)
    cloned = trained(one_state(u, good), gaussian(), 2, Recipe("bc", updates=200, rate=1e-2, batch=64))
    assert float(found) > 0.25
    assert abs(float(cloned)) < 0.25


def test_expectile_target_is_the_value_of_the_logged_pair() -> None:
    """With the next state worth something else, V(s) follows Q(s, u), not Q(s', u)."""
    torch.manual_seed(0)
    features = torch.cat([torch.zeros(200, 1), torch.ones(200, 1)])
    following = 1 - features
    reward = torch.cat([torch.zeros(200), torch.ones(200)])  # state 1 earns, every transition ends
    data = Transitions(features, torch.zeros(400, 1), reward, following, torch.ones(400, dtype=torch.bool))
    value = nn.Sequential(perceptron(1, 1, 16, 1), nn.Flatten(0))
    networks = Networks(perceptron(1, 2, 16, 1), VectorCritic(1, 1, 16), value)
    recipe = Recipe("iql", updates=400, batch=64, rate=1e-3, critic_rate=1e-2, average=0.05)
    list(learn(data, data, networks, gaussian(), recipe, seed=0))
    worth = value(torch.tensor([[0.0], [1.0]]))
    assert float(worth[1]) > 0.7
    assert float(worth[0]) < 0.3


def test_graphs_are_learned_as_vectors_are() -> None:
    """Features [N, nodes, f], one number per node."""
    generator = torch.Generator().manual_seed(5)
    features = torch.rand(300, 4, 2, generator=generator)
    u = features[..., 0] / features[..., 0].sum(-1, keepdim=True)
    data = Transitions(features, u, torch.zeros(300), features, torch.zeros(300, dtype=torch.bool))
    networks = Networks(nn.Sequential(perceptron(2, 1, 16, 1), nn.Flatten(1)))
    before = log_loss(networks.policy, dirichlet(), data)
    *_, last = learn(data, data, networks, dirichlet(), Recipe("bc", updates=200, rate=1e-2, every=100), seed=0)
    assert last.held_out < before
    error = (best(networks.policy, dirichlet(), last.policy, features) - u).abs().mean()
    assert float(error) < 0.05  # the uniform share is off by 0.1


def test_a_missing_critic_is_named() -> None:
    data = one_state(torch.zeros(4, 1), torch.zeros(4))
    with pytest.raises(ValueError, match="needs a critic"):
        next(learn(data, data, Networks(perceptron(1, 2, 8, 1)), gaussian(), Recipe("iql"), seed=0))
