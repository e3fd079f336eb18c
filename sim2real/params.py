"""Named parameters, their arithmetic, and what an estimator returns.

`Params` is a flat `dict[str, Tensor]`: theta for a simulator, nu for a policy. Two `Params` go together
when they hold the same keys; every function here checks that and names the keys that differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Params = dict[str, Tensor]


@dataclass(frozen=True)
class Estimate:
    """What every estimator returns: `value` (scalar), `grad` (uphill in return), `info` (stderr, ESS, ...)."""

    value: Tensor
    grad: Params
    info: dict[str, Tensor] = field(default_factory=dict)


def check_same_keys(reference: Params, other: Params, what: str) -> None:
    """Raise `KeyError` naming the keys in which `other` (called `what` in the message) differs from `reference`."""
    if reference.keys() != other.keys():
        missing, extra = sorted(reference.keys() - other.keys()), sorted(other.keys() - reference.keys())
        raise KeyError(
            f"{what} lacks the keys {missing} and has the unexpected keys {extra}; expected {sorted(reference)}"
        )


def map_params(function: Callable[..., Tensor], params: Params, *others: Params) -> Params:
    """Apply `function` key by key: `{k: function(params[k], other[k], ...)}`."""
    for other in others:
        check_same_keys(params, other, "a further argument of map_params")
    return {key: function(value, *(other[key] for other in others)) for key, value in params.items()}


def dot(a: Params, b: Params) -> Tensor:
    """Inner product `sum_k <a_k, b_k>`, a scalar."""
    check_same_keys(a, b, "the second argument of dot")
    return torch.stack([(a[key] * b[key]).sum() for key in a]).sum()


def axpy(alpha: Tensor | float, x: Params, y: Params) -> Params:
    """`alpha * x + y`, key by key."""
    return map_params(lambda xk, yk: alpha * xk + yk, x, y)


def ravel(params: Params) -> Tensor:
    """All values as one vector, in the order of the keys."""
    return torch.cat([value.reshape(-1) for value in params.values()])


def unravel(vector: Tensor, like: Params) -> Params:
    """Inverse of `ravel`: `vector[..., P]` as `Params` with the keys and (trailing) shapes of `like`."""
    sizes = [value.numel() for value in like.values()]
    if vector.shape[-1] != sum(sizes):
        raise ValueError(f"the vector has {vector.shape[-1]} entries, the parameters {list(like)} hold {sum(sizes)}")
    parts = vector.split(sizes, dim=-1)
    return {key: part.reshape(vector.shape[:-1] + like[key].shape) for key, part in zip(like, parts, strict=True)}


def assign_grads(params: Params, grads: Params) -> None:
    """Write `grads` into `params[k].grad`, for any torch optimizer; gradients point uphill, so use `maximize=True`."""
    check_same_keys(params, grads, "grads")
    for key, value in params.items():
        value.grad = grads[key].detach().to(value.dtype).reshape(value.shape).clone()


def copy_into(target: Params, source: Params) -> None:
    """Copy `source` into the tensors of `target` without autograd, keeping their identity for an optimizer."""
    check_same_keys(target, source, "the source of copy_into")
    with torch.no_grad():
        for key, value in target.items():
            value.copy_(source[key])
