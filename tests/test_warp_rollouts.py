"""Rollouts inside one kernel: closed forms, the model's own steps, central differences; threads, layouts, memory."""

import math
import resource
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

pytest.importorskip("warp")

import warp as wp

from sim2real import Box, ModelMDP, Params
from sim2real.outside_program import DerivativeOrderError
from sim2real.roll import roll, step_jacobians
from sim2real.simulators import warp_kernels
from sim2real.simulators.cartpole import cartpole
from sim2real.simulators.warp_cartpole import warp_cartpole
from sim2real.simulators.warp_model import warp_model

OURS, TWIN = warp_cartpole(integrator="semi_implicit"), cartpole(integrator="semi_implicit")
NAMES = tuple(TWIN.box.default)
Inputs = tuple[Tensor, ...]


def inputs(batch: int = 3, steps: int = 6, seed: int = 0) -> Inputs:
    """Six parameters per environment, start, time-major actions."""
    rng = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=rng, dtype=torch.float64)
    theta = [float(v) * torch.exp(0.1 * normal(batch)) for v in TWIN.box.default.values()]
    return (*theta, normal(batch, 4), 3.0 * normal(steps, batch, 1))


def states(mdp: ModelMDP) -> Callable[..., Tensor]:
    """`[T+1, B, 4]`, as `fit` rolls."""

    def function(*x: Tensor) -> Tensor:
        *theta, start, actions = x
        return roll(mdp, dict(zip(NAMES, theta, strict=True)), start, actions, actions.detach()[..., :0])

    return function


def loss(mdp: ModelMDP) -> Callable[..., Tensor]:
    """Not linear in the states, with weights that differ over time."""

    def value(*x: Tensor) -> Tensor:
        path = states(mdp)(*x)
        weights = torch.linspace(0.5, 1.5, path.numel(), dtype=path.dtype, device=path.device).view(path.shape)
        return (torch.sin(path) * weights).sum() + path[-1].square().sum()

    return value


ALL = tuple(range(8))
ORDERS: dict[str, Callable[[ModelMDP, Inputs, Inputs], object]] = {
    "value": lambda m, x, d: states(m)(*x),
    "jvp": lambda m, x, d: jvp(states(m), x, d)[1],
    "jvp in the start": lambda m, x, d: jvp(lambda s: states(m)(*x[:6], s, x[7]), (x[6],), (d[6],))[1],
    "grad": lambda m, x, d: grad(loss(m), ALL)(*x),
    "jacrev": lambda m, x, d: jacrev(states(m), ALL)(*x),
    "jacfwd": lambda m, x, d: jacfwd(states(m), ALL)(*x),
    "hessian": lambda m, x, d: hessian(loss(m), (0, 2, 6))(*x),
    "jvp of grad": lambda m, x, d: jvp(grad(loss(m), ALL), x, d)[1],
    "grad of jvp": lambda m, x, d: grad(lambda *q: jvp(loss(m), q, d)[1], ALL)(*x),
    "vjp of grad": lambda m, x, d: vjp(grad(loss(m), ALL), *x)[1](d),
}


def flat(tree: object) -> list[Tensor]:
    return list(torch.utils._pytree.tree_leaves(tree))


def close(found: object, expected: object, rtol: float) -> None:
    """Every tensor within `rtol` of the largest entry of the expected one."""
    for x, y in zip(flat(found), flat(expected), strict=True):
        torch.testing.assert_close(x, y.to(x.dtype), rtol=0.0, atol=rtol * max(1.0, float(y.abs().max())))


@pytest.mark.parametrize("order", list(ORDERS))
def test_contract_agrees_with_stepping_in_torch(order: str) -> None:
    x, d = inputs(), inputs(seed=1)
    # rounding of double precision, times 6 steps of about 50 operations with derivatives of order 10
    close(ORDERS[order](OURS, x, d), ORDERS[order](TWIN, x, d), 1e-13)


@pytest.mark.parametrize("order", ["value", "jvp", "grad", "jvp of grad"])
def test_single_precision(order: str) -> None:
    x, d = inputs(), inputs(seed=1)
    narrow = ORDERS[order](OURS, *(tuple(t.float() for t in p) for p in (x, d)))
    close(narrow, ORDERS[order](TWIN, x, d), 1e-5)  # roundings of 6e-8, amplified as above


@pytest.mark.parametrize("order", ["value", "grad", "jvp of grad"])
def test_vmap_over_environments_equals_the_batch(order: str) -> None:
    x, d = inputs(), inputs(seed=1)
    dims = (0,) * 7 + (1,)
    one = lambda *p: ORDERS[order](OURS, _with_batch(p[:8]), _with_batch(p[8:]))
    twin = lambda *p: ORDERS[order](TWIN, _with_batch(p[:8]), _with_batch(p[8:]))
    close(vmap(one, dims + dims)(*x, *d), vmap(twin, dims + dims)(*x, *d), 1e-13)


def _with_batch(x: Inputs) -> Inputs:
    return (*(t[None] for t in x[:7]), x[7][:, None])


def test_vmap_over_parameters_that_environments_share() -> None:
    """One curve per value of a parameter, all starts and actions the same."""
    x = inputs()
    masses = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    curve = lambda mdp: vmap(lambda mass: states(mdp)(mass, *(v[0] for v in x[1:6]), *x[6:]))(masses)
    close(curve(OURS), curve(TWIN), 1e-13)
    slope = lambda mdp: vmap(jacfwd(lambda mass: loss(mdp)(mass, *(v[0] for v in x[1:6]), *x[6:])))(masses)
    close(slope(OURS), slope(TWIN), 1e-13)


def test_gradient_by_central_differences() -> None:
    x, d = inputs(), inputs(seed=1)
    move = lambda h: tuple(t + h * v for t, v in zip(x, d, strict=True))
    slope = sum((g * v).sum() for g, v in zip(grad(loss(OURS), ALL)(*x), d, strict=True))
    h = 1e-5  # error h^2 f'''/6 and rounding 1e-16 f / h: both about 1e-9
    quotient = (loss(OURS)(*move(h)) - loss(OURS)(*move(-h))) / (2 * h)
    torch.testing.assert_close(slope, quotient, rtol=1e-6, atol=1e-6)
    directional = lambda p: sum((g * v).sum() for g, v in zip(grad(loss(OURS), ALL)(*p), d, strict=True))
    curvature = jvp(lambda *p: directional(p), x, d)[1]
    torch.testing.assert_close(
        curvature, (directional(move(h)) - directional(move(-h))) / (2 * h), rtol=1e-6, atol=1e-5
    )


def test_autograd_checks_both_orders() -> None:
    x = tuple(t.requires_grad_() for t in inputs(1, 2))
    assert torch.autograd.gradcheck(states(OURS), x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(states(OURS), x, check_fwd_over_rev=True)


def test_third_order_raises() -> None:
    x = inputs(1, 2)
    with pytest.raises(DerivativeOrderError, match="third derivatives"):
        jacrev(hessian(loss(OURS)))(*x)
    with pytest.raises(DerivativeOrderError, match="forward mode over forward mode"):
        jacfwd(jacfwd(loss(OURS), 6), 6)(*x)


# --------------------------------------------------------------------------------------------- a closed form

DT = 0.25


def decay(theta, state, action, noise):  # type: ignore[no-untyped-def]
    return wp.vector((1.0 - DT * theta.rate) * state[0] + DT * action[0] + noise[0])


def price(theta, state, action, noise, following):  # type: ignore[no-untyped-def]
    return -state[0] * state[0]


LINEAR = warp_model(
    decay, price, state=("x",), action=("u",), box=Box(default={"rate": 0.5}), dt=DT, noise=1, initial_noise=1
)


def test_a_linear_model_has_its_closed_form() -> None:
    """x_T = q^T x_0 + sum_t q^{T-1-t} (DT u_t + e_t) with q = 1 - DT rate, and its derivatives by hand."""
    T, rate = 7, torch.tensor(0.5, dtype=torch.float64)
    rng = torch.Generator().manual_seed(0)
    start, u, e = (torch.randn(shape, generator=rng, dtype=torch.float64) for shape in ((2, 1), (2, T, 1), (2, T, 1)))
    q, powers = 1.0 - DT * 0.5, torch.arange(T - 1, -1, -1, dtype=torch.float64)
    push = (DT * u + e)[..., 0]
    last = lambda rate, s, u, e: LINEAR.open_loop({"rate": rate}, s, u, e)[:, -1, 0]  # type: ignore[misc]
    expected = q**T * start[:, 0] + (q**powers * push).sum(-1)
    torch.testing.assert_close(last(rate, start, u, e), expected, rtol=1e-14, atol=1e-14)
    by_q = T * q ** (T - 1) * start[:, 0] + (powers * q ** (powers - 1) * push).sum(-1)
    torch.testing.assert_close(jacrev(last)(rate, start, u, e), -DT * by_q, rtol=1e-13, atol=1e-13)
    by_qq = T * (T - 1) * q ** (T - 2) * start[:, 0] + (powers * (powers - 1) * q ** (powers - 2) * push).sum(-1)
    torch.testing.assert_close(hessian(last)(rate, start, u, e), DT**2 * by_qq, rtol=1e-13, atol=1e-13)
    total = lambda *x: last(*x).sum()
    torch.testing.assert_close(grad(total, 2)(rate, start, u, e), (DT * q**powers).expand(2, T)[..., None])
    torch.testing.assert_close(grad(total, 3)(rate, start, u, e), (q**powers).expand(2, T)[..., None])


def test_shapes_of_few_steps_and_environments() -> None:
    theta: Params = {"rate": torch.tensor(0.5, dtype=torch.float64)}
    for batch, steps in ((0, 3), (1, 1), (130, 2), (2, 0)):
        start, u = torch.ones(batch, 1).double(), torch.ones(batch, steps, 1).double()
        path = LINEAR.open_loop(theta, start, u, u)  # type: ignore[misc]
        assert path.shape == (batch, steps + 1, 1)
        assert torch.equal(path[:, 0], start)


# --------------------------------------------------------------------------- threads, layouts, memory, values


def test_results_do_not_depend_on_threads_or_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warp_kernels, "THREADED", 1)  # let small launches take several threads
    x, d = inputs(700, 5), inputs(700, 5, seed=1)
    before = torch.get_num_threads()

    def run(threads: int, x: Inputs) -> list[Tensor]:
        torch.set_num_threads(threads)
        try:
            return flat([ORDERS[order](OURS, x, d) for order in ("value", "jvp", "grad", "jvp of grad")])
        finally:
            torch.set_num_threads(before)

    alone = run(1, x)
    for threads in (1, 2, 3):
        assert all(torch.equal(a, b) for a, b in zip(alone, run(threads, x), strict=True))
    other = (*x[:6], x[6].t().contiguous().t(), x[7].transpose(0, 1).contiguous().transpose(0, 1))
    assert all(torch.equal(a, b) for a, b in zip(alone, run(1, other), strict=True))


def test_the_gradient_of_one_shared_parameter_does_not_depend_on_threads() -> None:
    """Summed over 100001 environments, where torch's own sum of a column would."""
    rng = torch.Generator().manual_seed(0)
    start, u = (torch.randn(shape, generator=rng, dtype=torch.float64) for shape in ((100_001, 1), (100_001, 2, 1)))
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        rate = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        path = LINEAR.open_loop({"rate": rate}, start, u, u)  # type: ignore[misc]
        found.append(torch.autograd.grad(path, rate, start.unsqueeze(1).expand(-1, 3, -1))[0])
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_an_environment_does_not_depend_on_its_neighbours() -> None:
    x = inputs(40)
    whole = states(OURS)(*x)
    part = states(OURS)(*(t[5:22] for t in x[:7]), x[7][:, 5:22])
    assert torch.equal(whole[:, 5:22], part)


def test_values_that_are_not_finite_stay_in_their_environment() -> None:
    x = inputs()
    x[7][3, 1, 0] = math.inf
    path = states(OURS)(*x)
    assert not bool(path[4:, 1].isfinite().all(-1).any())
    assert bool(path[:, [0, 2]].isfinite().all())
    assert bool(path[:4].isfinite().all())
    by_start = grad(loss(OURS), 6)(*x)
    assert by_start.isfinite().all(-1).tolist() == [True, False, True]


def test_the_jacobians_of_a_fit_along_a_rollout() -> None:
    *theta, start, actions = inputs(4, 5)
    shared = {key: value[0] for key, value in zip(NAMES, theta, strict=True)}
    path = roll(OURS, shared, start, actions, actions[..., :0])[:-1].flatten(0, 1)
    flat_actions = actions.flatten(0, 1)
    ours, twin = (
        step_jacobians(m, shared, NAMES, path, flat_actions, flat_actions[..., :0], chunk=7) for m in (OURS, TWIN)
    )
    close([ours.state, ours.params], [twin.state, twin.params], 1e-13)


def test_memory_beyond_inputs_and_outputs_does_not_grow_with_time() -> None:
    """512 environments over 4000 steps: states are 66 MB, and so are cotangents; the peak grows by these only."""
    *theta, start, actions = inputs(512, 4000)
    leaves = [*(t.requires_grad_() for t in theta), start.requires_grad_(), (0.01 * actions).requires_grad_()]
    warm = [*leaves[:6], start, leaves[7].detach()[:2].requires_grad_()]
    torch.autograd.grad(states(OURS)(*warm).sum(), warm)
    cotangent = torch.ones(4001, 512, 4, dtype=torch.float64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = states(OURS)(*leaves)
    grads = torch.autograd.grad(path, leaves, cotangent)
    outputs = sum(t.numel() * t.element_size() for t in (path, *grads)) / 1024
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < outputs + 20_000
    )  # kB; a copy of states is 64 MB


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("order", list(ORDERS))
def test_cuda_agrees_with_the_cpu(order: str) -> None:
    x, d = inputs(), inputs(seed=1)
    there = ORDERS[order](OURS, *(tuple(t.cuda() for t in p) for p in (x, d)))
    close([t.cpu() for t in flat(there)], ORDERS[order](OURS, x, d), 1e-12)
    with torch.cuda.stream(torch.cuda.Stream()):  # launches follow torch's current stream
        again = states(OURS)(*(t.cuda() * 1.0 for t in x))
        torch.testing.assert_close(again.cpu(), states(OURS)(*x), rtol=1e-12, atol=1e-12)
