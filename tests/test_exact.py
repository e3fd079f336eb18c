"""The benchmark of exact sensitivities on its smallest and its largest system."""

from __future__ import annotations

import pytest

from benchmarks.exact import compared, layer_error
from benchmarks.sensitivity import problem


@pytest.mark.parametrize(("n", "m"), [(2, 1), (4, 2)])
def test_the_layer_is_exact_in_every_mode(n: int, m: int) -> None:
    assert layer_error(problem(n, m, 10 * n)) <= 1e-9


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_all_routes_give_the_same_product_and_automatic_damping_adds_nothing() -> None:
    pytest.importorskip("torchopt")
    errors, seconds = compared(problem(16, 4, 160), 1)
    # the solves of ours and of the tight peer end at 1e-12, the condition is 36
    assert max(errors[name] for name in ("time", "dense", "lqr", "auto", "torchopt-tight")) <= 1e-9
    assert 1e-9 < errors["torchopt"] < 1e-3
    assert min(seconds.values()) > 0
