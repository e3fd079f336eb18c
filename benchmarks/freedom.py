"""What the freedom of equal policies gives back: likelihood and prediction of the tuned model at the same real return.

On the six exact worlds of benchmark A (LQR with input-multiplicative noise), theta = (A, B) is tuned for the exact real
return from the theta of least squares on infinite data, the true (A, B). The likelihood is Gaussian around it with the
precision of 2000 exploring transitions.
Then theta moves where the policy does not change. Figures per world:

    CASE-recovered   share of the log-likelihood that tuning gave up and the move gets back, 1 - l_after / l_before
    CASE-error       excess one-step prediction error on 2000 transitions more (mean square, each state in units of the
                     fit's, minus 1), reference: before the move
    CASE-return      relative change of the exact real return
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bars import Figure, main
from benchmarks.closed_loop import exact_gradient, in_sim_optimum, in_sim_return, model_of
from benchmarks.oracles.multiplicative_lqr import WORLDS, World, cost_and_gradient
from sim2real.params import Params, ravel
from sim2real.policy import linear_policy
from sim2real.tuning import TuneResult, TuneSettings, tune

TRANSITIONS = 2000


def explored(world: World, seed: int) -> tuple[Tensor, Tensor]:
    """Regressors (s, a) `[N, n + m]` and successors `[N, n]` of the world, states and actions from N(0, I)."""
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.tensor(world.A), torch.tensor(world.B)
    draw = lambda width: torch.randn(TRANSITIONS, width, generator=generator, dtype=torch.float64)
    s, a = draw(len(A)), draw(B.shape[1])
    push = a * (1 + world.sigma * draw(B.shape[1]))
    return torch.cat([s, a], 1), s @ A.T + push @ B.T + world.noise**0.5 * draw(len(A))


def likelihood_of(world: World, x: Tensor, following: Tensor) -> tuple[Params, Tensor]:
    """Mean (A, B) and the precision of its raveled entries, by the residual variance of each row."""
    _, mean = model_of(world)
    n, width = len(world.A), x.shape[1]
    residual = following - x @ torch.cat([mean["A"], mean["B"]], 1).T
    information = torch.block_diag(*(x.T @ x / v for v in residual.square().mean(0)))  # row by row of (A | B)
    order = [row * width + k for row in range(n) for k in range(n)]
    order += [row * width + k for row in range(n) for k in range(n, width)]
    at = torch.tensor(order)
    return mean, information[at][:, at]


def tuned(world: World, likelihood: tuple[Params, Tensor], steps: int) -> TuneResult:
    """The exact loop of benchmark A from the fitted theta, with the freedom given to the likelihood."""
    mdp, _ = model_of(world)
    return tune(
        mdp,
        linear_policy(world.B.shape[1]),
        likelihood[0],
        {"gain": torch.zeros(world.B.shape[::-1], dtype=torch.float64)},
        None,
        None,
        real_reward=None,
        real_discount=world.discount,
        settings=TuneSettings(max_steps=steps, gradient_tol=1e-8),
        likelihood=likelihood,
        objective=partial(in_sim_return, world),
        optimum=partial(in_sim_optimum, world),
        gradient=partial(exact_gradient, world),
    )


def excess_error(x: Tensor, following: Tensor, fitted: Params, theta: Params) -> float:
    """Mean square one-step error of theta over that of the fit, minus 1; the mean over the states."""
    square = lambda at: (following - x @ torch.cat([at["A"], at["B"]], 1).T).square().mean(0)
    return float((square(theta) / square(fitted)).mean()) - 1


def s_freedom(quick: bool) -> Iterator[Figure]:
    """See the module docstring."""
    for world in WORLDS[:4] if quick else WORLDS:
        x, following = explored(world, 0)
        mean, precision = likelihood_of(world, x, following)
        result = tuned(world, (mean, precision), steps=40)
        free = result.freedom
        if free is None:
            raise RuntimeError(f"the freedom of '{world.name}' was not used: {result.notes}")
        before = _unfree(result)

        excess = partial(excess_error, *explored(world, 1), mean)
        gap = ravel(before) - ravel(mean)
        given_up = -0.5 * float(gap @ precision @ gap)
        recovered = 1 - free.log_likelihood[1] / given_up
        yield Figure(f"{world.name}-recovered", recovered, "fraction of the nats given up", len(ravel(mean)), 0.0)
        yield Figure(f"{world.name}-error", excess(result.theta), "relative to the fit", TRANSITIONS, excess(before))
        cost = cost_and_gradient(world, result.nu["gain"].numpy())[0]
        start = -free.real_return[0]
        yield Figure(f"{world.name}-return", cost / start - 1, "relative", free.dimension, 0.0)


def _unfree(result: TuneResult) -> Params:
    """theta before the last move: that of the snapshot."""
    return {name: result.state[f"theta.{name}"] for name in ("A", "B")}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main({"s-freedom": s_freedom})
