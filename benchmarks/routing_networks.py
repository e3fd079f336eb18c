"""Networks of vehicle routing for the learner of `ohio_learning`: one graph convolution with a residual, then 256-256.

    h = x + relu(S x W + b),        S = D^-1/2 (A + I) D^-1/2,     D_ii = sum_j (A + I)_ij

A: the directed message graph of the scenario, from sender j to receiver i. Reference: Kipf and Welling, Semi-supervised
classification with graph convolutional networks, 2017, equation 2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sim2real.simulators.vehicle_routing import FEATURES


class GraphConvolution(nn.Module):
    """`[N, n, f]` -> `[N, n, f]`."""

    sender: Tensor
    receiver: Tensor
    weight: Tensor

    def __init__(self, edges: Tensor, nodes: int, width: int) -> None:
        super().__init__()
        loops = torch.arange(nodes).expand(2, -1)
        sender, receiver = torch.cat([edges[:, edges[0] != edges[1]], loops], 1)
        degree = torch.bincount(receiver, minlength=nodes).float()
        self.register_buffer("sender", sender)
        self.register_buffer("receiver", receiver)
        self.register_buffer("weight", (degree[sender] * degree[receiver]).rsqrt().unsqueeze(-1))
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        heard = torch.zeros_like(x).index_add(1, self.receiver, self.weight * x[:, self.sender])
        return x + torch.relu(self.linear(heard))


def _head(inputs: int, width: int, outputs: int = 1) -> nn.Sequential:
    layers = nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)
    return nn.Sequential(*layers)


class Upper(nn.Module):
    """One raw number per station `[N, n]`; softplus makes it a Dirichlet concentration."""

    def __init__(self, edges: Tensor, nodes: int, width: int = 256) -> None:
        super().__init__()
        self.graph, self.head = GraphConvolution(edges, nodes, FEATURES), _head(FEATURES, width)

    def forward(self, features: Tensor) -> Tensor:
        return self.head(self.graph(features)).squeeze(-1)


class Critic(nn.Module):
    """Q(s, u) `[N]`: a number per station from its features and its share of n, summed."""

    def __init__(self, edges: Tensor, nodes: int, width: int = 256) -> None:
        super().__init__()
        self.graph, self.head = GraphConvolution(edges, nodes, FEATURES), _head(FEATURES + 1, width)
        self.nodes = nodes

    def forward(self, features: Tensor, u: Tensor) -> Tensor:
        return self.head(torch.cat([self.graph(features), self.nodes * u.unsqueeze(-1)], -1)).sum((-2, -1))


class Value(nn.Module):
    """V(s) `[N]`."""

    def __init__(self, edges: Tensor, nodes: int, width: int = 64) -> None:
        super().__init__()
        self.graph, self.head = GraphConvolution(edges, nodes, FEATURES), _head(FEATURES, width)

    def forward(self, features: Tensor) -> Tensor:
        return self.head(self.graph(features)).sum((-2, -1))


class EndToEnd(nn.Module):
    """Means of all flows `[N, n^2]` in vehicles, then their raw deviations."""

    def __init__(self, edges: Tensor, nodes: int, width: int = 256) -> None:
        super().__init__()
        self.graph, self.head = GraphConvolution(edges, nodes, FEATURES), _head(2 * FEATURES, width, 2)

    def forward(self, features: Tensor) -> Tensor:
        mean, raw = self.head(_pairs(self.graph(features))).flatten(1, 2).unbind(-1)
        return torch.cat([nn.functional.softplus(mean), raw], -1)


class EndToEndCritic(nn.Module):
    """Q(s, f) `[N]`: a number per pair of stations, summed."""

    def __init__(self, edges: Tensor, nodes: int, width: int = 256) -> None:
        super().__init__()
        self.graph, self.head = GraphConvolution(edges, nodes, FEATURES), _head(2 * FEATURES + 1, width)

    def forward(self, features: Tensor, flows: Tensor) -> Tensor:
        pairs = _pairs(self.graph(features))
        given = 0.1 * flows.reshape(*pairs.shape[:-1], 1)
        return self.head(torch.cat([pairs, given], -1)).sum((-3, -2, -1))


def _pairs(h: Tensor) -> Tensor:
    """Features of origin and goal `[N, n, n, 2 f]`."""
    n = h.shape[1]
    return torch.cat([h.unsqueeze(2).expand(-1, -1, n, -1), h.unsqueeze(1).expand(-1, n, -1, -1)], -1)
