"""What policies say of their layers, and rollouts that an engine takes in one piece."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import scalar, seeded
from torch import Tensor, nn
from torch.func import functional_call

from sim2real.mdp import ClosedLoop, ModelMDP, Noise, sample_noise
from sim2real.params import Params
from sim2real.policy import Layers, Policy, gaussian_policy, linear_policy, module_policy
from sim2real.rollout import rollout

EXACT = {"rtol": 1e-12, "atol": 1e-12}
"""the same few float64 operations in another order"""
ACTIVATIONS = {
    "identity": lambda z: z,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "silu": nn.functional.silu,
    "elu": nn.functional.elu,
    "softplus": nn.functional.softplus,
}


def evaluate(layers: Layers, nu: Params, state: Tensor, noise: Tensor) -> Tensor:
    """The action as the layers state it."""
    h = state
    for (weight, bias), name in zip(layers.weights(nu), layers.activations, strict=True):
        h = (weight @ h.unsqueeze(-1)).squeeze(-1)
        h = ACTIVATIONS[name](h if bias is None else h + bias)
    if layers.std == "head":
        mean, log_std = h.chunk(2, -1)
        return mean + log_std.exp() * noise
    return h + layers.std * noise if layers.std else h


def network(seed: int, *parts: nn.Module) -> tuple[nn.Module, Params]:
    module = nn.Sequential(*parts).double()
    generator = seeded(seed)
    nu = {
        key: torch.randn(value.shape, generator=generator, dtype=torch.float64)
        for key, value in module.named_parameters()
    }
    return module, nu


SHARED = nn.Tanh()
NETWORKS = {
    "mlp": lambda: network(0, nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 4)),
    "nested": lambda: network(
        1, nn.Sequential(nn.Linear(3, 4), nn.SiLU()), nn.Linear(4, 4, bias=False), nn.ELU(), nn.Linear(4, 2), nn.Tanh()
    ),
    "other activations": lambda: network(2, nn.Linear(3, 4), nn.Softplus(), nn.Linear(4, 4), nn.Sigmoid()),
    "an activation used twice": lambda: network(3, nn.Linear(3, 4), SHARED, nn.Linear(4, 4), SHARED, nn.Linear(4, 2)),
    "linear after linear": lambda: network(4, nn.Linear(3, 4), nn.Linear(4, 2), nn.Identity()),
}


@pytest.mark.parametrize("name", sorted(NETWORKS))
@pytest.mark.parametrize("build", [module_policy, lambda m: module_policy(m, std=0.3), gaussian_policy])
def test_layers_of_networks_are_their_policy(name: str, build) -> None:
    module, nu = NETWORKS[name]()
    policy = build(module)
    state = torch.randn(6, 3, generator=seeded(9), dtype=torch.float64)
    e = torch.randn(6, policy.noise_dim, generator=seeded(10), dtype=torch.float64)
    assert policy.layers is not None
    torch.testing.assert_close(evaluate(policy.layers, nu, state, e), policy.act(nu, state, e), **EXACT)


def test_layers_of_a_linear_policy_and_of_parameters_left_out() -> None:
    state, e = (torch.randn(6, k, generator=seeded(k), dtype=torch.float64) for k in (3, 2))
    nu = {"gain": torch.randn(6, 2, 3, generator=seeded(0), dtype=torch.float64), "offset": scalar(0.2).expand(2)}
    for policy in (linear_policy(2, std=0.5), linear_policy(2)):
        for given in (nu, {"gain": nu["gain"]}):
            acting = e[:, : policy.noise_dim]
            torch.testing.assert_close(
                evaluate(policy.layers, given, state, acting), policy.act(given, state, acting), **EXACT
            )
    linear = nn.Linear(3, 2).double()
    policy = module_policy(linear)
    given = {"weight": torch.ones(2, 3, dtype=torch.float64)}  # the bias stays the module's own
    expected = functional_call(linear, given, (state,))
    torch.testing.assert_close(evaluate(policy.layers, given, state, e[:, :0]), expected, **EXACT)


class Doubled(nn.Linear):
    """A layer with a forward of its own."""

    def forward(self, state: Tensor) -> Tensor:
        return 2.0 * super().forward(state)


def hooked() -> nn.Module:
    layer = nn.Linear(3, 2)
    layer.register_forward_hook(lambda module, inputs, output: 2.0 * output)
    return layer


def repeated() -> nn.Module:
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.Tanh(), layer)


@pytest.mark.parametrize(
    "module",
    [
        Doubled(3, 2),
        hooked(),
        nn.Sequential(hooked()),
        nn.Sequential(nn.Tanh(), nn.Linear(3, 2)),
        nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Tanh()),
        nn.Sequential(nn.Linear(3, 2), nn.ELU(alpha=2.0)),
        nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)),
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)),
        repeated(),
    ],
    ids=["own forward", "hook", "hook inside", "activation first", "two", "alpha", "norm", "weight norm", "repeated"],
)
def test_other_modules_say_nothing(module: nn.Module) -> None:
    assert module_policy(module).layers is None


# Rollouts ------------------------------------------------------------------------------------------------------------


def walk(terminal: bool) -> ModelMDP:
    return ModelMDP(
        initial_state=lambda theta, e0: e0,
        step=lambda theta, s, a, e: theta["decay"] * s + a + 0.1 * e,
        reward=lambda theta, s, a, e, following: -(s * s).sum(-1) - 0.1 * following[:, 0],
        noise_dims=(2, 2),
        dt=0.1,
        terminal=(lambda theta, s: s[:, 0] > 1.0) if terminal else None,
    )


def engine(mdp: ModelMDP, calls: list[str]) -> ModelMDP:
    """The model with an engine that rolls what it is told of a policy; it cannot do more than one layer."""

    def run(theta: Params, nu: Params, layers: Layers, start: Tensor, noise: Noise) -> tuple[Tensor, ...] | None:
        if len(layers.activations) > 1:
            calls.append("declined")
            return None
        calls.append("ran")
        told = Policy(lambda nu, s, e: evaluate(layers, nu, s, e), layers.act, noise.policy.shape[-1])
        plain = replace(mdp, initial_state=lambda theta, e0: start)
        done = rollout(plain, told, theta, nu, noise)
        return done.states, done.actions, done.rewards, done.mask

    return replace(mdp, closed_loop=ClosedLoop(run, mdp.step, mdp.reward, mdp.terminal))


THETA = {"decay": scalar(0.9)}
GAIN = {"gain": 0.2 * torch.eye(2, dtype=torch.float64)}


@pytest.mark.parametrize("terminal", [False, True])
def test_an_engine_takes_a_policy_that_says_its_layers(terminal: bool) -> None:
    calls: list[str] = []
    plain, policy = walk(terminal), linear_policy(2, std=0.5)
    mdp = engine(plain, calls)
    noise = sample_noise(mdp, policy, 8, 6, seeded(0))
    fused, expected = rollout(mdp, policy, THETA, GAIN, noise), rollout(plain, policy, THETA, GAIN, noise)
    assert calls == ["ran"]
    for key in ("states", "actions", "rewards"):
        torch.testing.assert_close(getattr(fused, key), getattr(expected, key), **EXACT)
    assert torch.equal(fused.mask, expected.mask)
    assert bool(fused.mask.all()) is not terminal


def test_another_reward_is_evaluated_along_the_engines_states() -> None:
    calls: list[str] = []
    reward = lambda theta, s, a, e, following: (s * a + following * e).sum(-1)
    plain, policy = replace(walk(True), reward=reward), linear_policy(2)
    mdp = replace(engine(walk(True), calls), reward=reward)
    mdp = replace(mdp, terminal=mdp.closed_loop.terminal)
    noise = sample_noise(mdp, policy, 8, 6, seeded(0))
    expected = rollout(replace(plain, terminal=mdp.terminal), policy, THETA, GAIN, noise).rewards
    torch.testing.assert_close(rollout(mdp, policy, THETA, GAIN, noise).rewards, expected, **EXACT)
    assert calls == ["ran"]


def test_what_an_engine_cannot_do_is_stepped() -> None:
    calls: list[str] = []
    plain = walk(False)
    mdp = engine(plain, calls)
    module, nu = network(0, nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    cases = {
        "two layers": (mdp, module_policy(module), nu, ["declined"]),
        "another step": (replace(mdp, step=lambda *a: 0.5 * plain.step(*a)), linear_policy(2), GAIN, []),
        "another end": (replace(mdp, terminal=lambda theta, s: s[:, 0] > 0.0), linear_policy(2), GAIN, []),
        "another act": (mdp, replace(linear_policy(2), act=lambda nu, s, e: -s), GAIN, []),
        "layers unknown": (mdp, replace(linear_policy(2), layers=None), GAIN, []),
    }
    for model, policy, weights, expected in cases.values():
        calls.clear()
        noise = sample_noise(mdp, policy, 4, 5, seeded(1))
        got = rollout(model, policy, THETA, weights, noise)
        wanted = rollout(replace(model, closed_loop=None), policy, THETA, weights, noise)
        assert calls == expected
        assert torch.equal(got.states, wanted.states)
