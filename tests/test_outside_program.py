"""`outside_program` on a program whose passes are written in torch: y_1 = exp(a) b^2, y_2 = sum(b) c."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

pytest.importorskip("warp")

from sim2real.outside_program import DerivativeOrderError, Program, Tensors, Wanted, evaluate

Inputs = tuple[Tensor, Tensor, Tensor]


def formula(a: Tensor, b: Tensor, c: Tensor) -> Tensors:
    return torch.exp(a) * b**2, b.sum(-1, keepdim=True) * c


def _push(x: Tensors, dx: Tensors, y: Tensors) -> Tensors:
    (a, b, c), (da, db, dc) = x, dx
    dy1 = torch.exp(a) * (b**2 * da + 2 * b * db)
    return _new((dy1, b.sum(-1, keepdim=True) * dc + db.sum(-1, keepdim=True) * c), (*x, *dx), (True, True))


def _pull(x: Tensors, y: Tensors, g: Tensors, wanted: Wanted) -> Tensors:
    (a, b, c), (g1, g2) = x, g
    by_b = 2 * torch.exp(a) * b * g1 + (g2 * c).sum(-1, keepdim=True)
    grads = (torch.exp(a) * b**2 * g1, by_b + 0 * b, b.sum(-1, keepdim=True) * g2 + 0 * c)
    return _new(grads, (*x, *g), wanted)


def _second(arguments: tuple[Tensors, ...], wanted: Wanted) -> Tensors:
    (a, b, c), (da, db, dc), _, _, (g1, g2), (h1, h2) = arguments
    E, total, d_total = torch.exp(a), b.sum(-1, keepdim=True), db.sum(-1, keepdim=True)
    by_a = E * b**2 * g1 + E * (b**2 * da + 2 * b * db) * h1
    by_b = 2 * E * b * g1 + (g2 * c).sum(-1, keepdim=True) + E * (2 * b * da + 2 * db) * h1
    by_b = by_b + (h2 * dc).sum(-1, keepdim=True)
    by_c = total * g2 + d_total * h2
    by_da, by_dc = E * b**2 * h1, total * h2
    by_db = 2 * E * b * h1 + (h2 * c).sum(-1, keepdim=True)
    grads = (by_a, by_b, by_c, by_da, by_db, by_dc)
    return _new(grads, [t for part in arguments for t in part], wanted)


def _new(grads: Sequence[Tensor], arguments: Sequence[Tensor], wanted: Wanted) -> Tensors:
    copies = max(len(t) for t in arguments)
    return tuple(t.expand(copies, *t.shape[1:]).clone() for t, want in zip(grads, wanted, strict=True) if want)


def _value(x: Tensors) -> Tensors:
    return _new(formula(*x), x, (True, True))


PROGRAM = Program(_value, _push, _pull, _second)


def ours(a: Tensor, b: Tensor, c: Tensor) -> Tensors:
    return evaluate(PROGRAM, a, b, c)


def inputs(copies: int = 1, seed: int = 0) -> Inputs:
    normal = lambda *shape: torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return normal(copies, 4, 3), normal(copies, 4, 3) + 1.0, normal(copies, 4, 2)


def loss(function: Callable[..., Tensors]) -> Callable[..., Tensor]:
    """A scalar of both outputs that is not linear in them."""

    def value(*x: Tensor) -> Tensor:
        y1, y2 = function(*x)
        return torch.sin(y1).sum() + (y2**3).sum() + (y1.sum() * y2.sum())

    return value


def flat(tree: object) -> list[Tensor]:
    return list(torch.utils._pytree.tree_leaves(tree))


def close(found: object, expected: object) -> None:
    # the same formulas in another order: rounding of double precision
    for x, y in zip(flat(found), flat(expected), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


ALL = (0, 1, 2)
ORDERS: dict[str, Callable[[Callable[..., Tensors]], Callable[[Inputs, Inputs], object]]] = {
    "value": lambda f: lambda x, dx: f(*x),
    "jvp": lambda f: lambda x, dx: jvp(f, x, dx),
    "jvp in one input": lambda f: lambda x, dx: jvp(lambda b: f(x[0], b, x[2]), (x[1],), (dx[1],)),
    "vjp": lambda f: lambda x, dx: vjp(f, *x)[1]((dx[0], dx[2])),
    "jacrev": lambda f: lambda x, dx: jacrev(f, ALL)(*x),
    "jacfwd": lambda f: lambda x, dx: jacfwd(f, ALL)(*x),
    "hessian": lambda f: lambda x, dx: hessian(loss(f), ALL)(*x),
    "jacrev of jacrev": lambda f: lambda x, dx: jacrev(jacrev(loss(f), ALL), ALL)(*x),
    "jacrev of jacfwd": lambda f: lambda x, dx: jacrev(jacfwd(loss(f), ALL), ALL)(*x),
    "jvp of grad": lambda f: lambda x, dx: jvp(grad(loss(f), ALL), x, dx),
    "jvp of grad, one input": lambda f: (
        lambda x, dx: jvp(lambda a: grad(loss(f), ALL)(a, x[1], x[2]), (x[0],), (dx[0],))
    ),
    "grad of jvp": lambda f: lambda x, dx: grad(lambda *q: jvp(loss(f), q, dx)[1], ALL)(*x),
    "vjp of vjp": lambda f: lambda x, dx: vjp(vjp(f, *x)[1], (dx[0], dx[2]))[1](dx),
    "jvp of vjp in the cotangent": lambda f: lambda x, dx: jvp(vjp(f, *x)[1], ((dx[0], dx[2]),), ((x[0], x[2]),)),
    "transpose of jvp": lambda f: lambda x, dx: vjp(lambda *d: jvp(f, x, d)[1], *dx)[1]((dx[0], dx[2])),
    "transpose of jvp of grad": lambda f: (
        lambda x, dx: vjp(lambda *d: jvp(grad(loss(f), ALL), x, d)[1], *dx)[1](inputs(seed=3))
    ),
    "transpose of vjp of grad": lambda f: lambda x, dx: vjp(vjp(grad(loss(f), ALL), *x)[1], dx)[1](inputs(seed=3)),
    "grad of grad of one input": lambda f: (
        lambda x, dx: grad(lambda b: (grad(loss(f))(x[0], b, x[2]) * dx[0]).sum())(x[1])
    ),
}


@pytest.mark.parametrize("order", list(ORDERS))
def test_every_derivative_to_second_order_is_that_of_the_formula(order: str) -> None:
    close(ORDERS[order](ours)(inputs(), inputs(seed=1)), ORDERS[order](formula)(inputs(), inputs(seed=1)))


@pytest.mark.parametrize("order", ["value", "jvp", "vjp", "hessian", "jvp of grad", "grad of jvp"])
@pytest.mark.parametrize("batched", [(0, 0, 0), (None, 0, None), (0, None, 0), (1, None, 2)])
def test_vmap_is_the_loop_over_its_batch(order: str, batched: tuple[int | None, ...]) -> None:
    many = [inputs(seed=k) for k in range(3)]
    x = tuple(many[0][i] if d is None else torch.stack([row[i] for row in many], d) for i, d in enumerate(batched))
    dx = inputs(seed=9)
    apply = lambda *one: ORDERS[order](ours)(one, dx)
    found = vmap(apply, batched)(*x)
    rows = [apply(*(many[0][i] if d is None else row[i] for i, d in enumerate(batched))) for row in many]
    close(found, [torch.stack(parts) for parts in zip(*(flat(row) for row in rows), strict=True)])


def test_nested_vmap_and_copies_that_share_an_input() -> None:
    a, b, c = inputs()
    scale = torch.linspace(0.5, 1.5, 3, dtype=torch.float64)
    f = lambda function: vmap(lambda s: vmap(lambda r: function(a * s, b, c * r))(scale))(scale)
    close(f(ours), f(formula))
    shared = (inputs(3)[0], b, c)  # three copies of a, one of b and c
    repeated = lambda a, b, c: formula(a, b.expand(3, -1, -1), c.expand(3, -1, -1))
    close(grad(loss(ours), ALL)(*shared), grad(loss(repeated), ALL)(*shared))
    close(hessian(loss(ours), 1)(*shared), hessian(loss(repeated), 1)(*shared))


def test_autograd_checks_both_orders() -> None:
    x = tuple(t.requires_grad_() for t in inputs())
    assert torch.autograd.gradcheck(ours, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(ours, x, check_fwd_over_rev=True)


def test_the_transpose_of_vjp_is_jvp() -> None:
    x, dx, g = inputs(), inputs(seed=1), formula(*inputs(seed=2))
    pushed, pulled = jvp(ours, x, dx)[1], vjp(ours, *x)[1](g)
    left = sum((p * q).sum() for p, q in zip(pushed, g, strict=True))
    right = sum((p * q).sum() for p, q in zip(pulled, dx, strict=True))
    torch.testing.assert_close(left, right, rtol=1e-13, atol=1e-13)


THIRD: dict[str, Callable[[], object]] = {
    "reverse of hessian": lambda: jacrev(hessian(loss(ours)))(*inputs()),
    "forward of hessian": lambda: jacfwd(hessian(loss(ours)))(*inputs()),
    "jvp of jvp": lambda: jvp(
        lambda a: jvp(lambda q: ours(q, *inputs()[1:]), (a,), (a,))[1], inputs()[:1], inputs()[:1]
    ),
    "jacfwd of jacfwd": lambda: jacfwd(jacfwd(loss(ours)))(*inputs()),
}


@pytest.mark.parametrize("order", list(THIRD))
def test_what_is_not_there_raises(order: str) -> None:
    with pytest.raises(DerivativeOrderError, match="not available through this model"):
        THIRD[order]()


def test_third_order_raises_in_autograd() -> None:
    a, b, c = inputs()
    a.requires_grad_()
    (first,) = torch.autograd.grad(loss(ours)(a, b, c), a, create_graph=True)
    (second,) = torch.autograd.grad(first.sin().sum(), a, create_graph=True)
    with pytest.raises(DerivativeOrderError, match="third derivatives"):
        torch.autograd.grad(second.sum(), a)


def test_forward_mode_over_a_second_order_product_raises() -> None:
    x, dx = inputs(), inputs(seed=1)
    curved = lambda *q: jvp(grad(loss(ours), ALL), q, dx)[1]
    with pytest.raises(DerivativeOrderError, match="not available through this model"):
        jvp(curved, x, dx)
    with pytest.raises(DerivativeOrderError, match="third derivatives"):
        jvp(lambda *d: jvp(grad(loss(ours), ALL), x, d)[1], dx, dx)


def test_forward_mode_through_constant_inputs_is_linear() -> None:
    """A tangent of a tangent, at inputs without tangents, is the push itself."""
    x, dx = inputs(), inputs(seed=1)
    f = lambda function: jvp(lambda *d: jvp(function, x, d)[1], dx, inputs(seed=2))
    close(f(ours), f(formula))


def _curved(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.sin().sum() for t in tensors]).sum()


def _leaves() -> Inputs:
    a, b, c = inputs()
    return a.requires_grad_(), b.requires_grad_(), c.requires_grad_()


def _pull_without_graph(f: Callable[..., Tensors]) -> object:
    y, pull = vjp(f, *inputs())[:2]
    with torch.no_grad():  # the level of vjp has ended, its saved tensors still carry it
        return pull(y)


def _transforms_without_graph(f: Callable[..., Tensors]) -> object:
    x = inputs()
    with torch.no_grad():
        return hessian(loss(f), ALL)(*x), jvp(grad(loss(f), ALL), x, inputs(seed=1))


def _value_without_graph_within_grad(f: Callable[..., Tensors]) -> object:
    a, b, c = inputs()

    def value(a: Tensor) -> Tensor:
        with torch.no_grad():
            held = f(a, b, c)[0]
        return (held * f(a, b, c)[0]).sum()

    return grad(value)(a), hessian(value)(a)


def _loss_of_gradients_built_later(f: Callable[..., Tensors]) -> object:
    x = _leaves()
    y = loss(f)(*x)
    plain = torch.autograd.grad(y, x, retain_graph=True)  # without a graph first, then with one
    kept = torch.autograd.grad(y, x, create_graph=True)
    (_curved(kept) + y**2).backward()
    return plain, [t.grad for t in x]


def _backward_after_vmap(f: Callable[..., Tensors]) -> object:
    x = tuple(torch.stack([t, 2 * t]).requires_grad_() for t in inputs())
    return torch.autograd.grad(_curved(vmap(f)(*x)), x)


def _autograd_over_transform(f: Callable[..., Tensors]) -> object:
    x = _leaves()
    return torch.autograd.grad(_curved(grad(loss(f), ALL)(*x)), x)


def _forward_mode_over_backward(f: Callable[..., Tensors]) -> object:
    with forward_ad.dual_level():
        x = tuple(forward_ad.make_dual(t, d) for t, d in zip(_leaves(), inputs(seed=1), strict=True))
        return [forward_ad.unpack_dual(g).tangent for g in torch.autograd.grad(loss(f)(*x), x)]


def _double_backward_of_checkpoint(f: Callable[..., Tensors]) -> object:
    x = _leaves()
    first = torch.autograd.grad(checkpoint(loss(f), *x, use_reentrant=False), x, create_graph=True)
    return torch.autograd.grad(_curved(first), x)


@pytest.mark.parametrize(
    "use",
    [
        _pull_without_graph,
        _transforms_without_graph,
        _value_without_graph_within_grad,
        _loss_of_gradients_built_later,
        _backward_after_vmap,
        _autograd_over_transform,
        _forward_mode_over_backward,
        _double_backward_of_checkpoint,
    ],
)
def test_no_graph_is_left_out_that_somebody_differentiates(use: Callable[[Callable[..., Tensors]], object]) -> None:
    close(use(ours), use(formula))
