"""The uses that README prints run as written, in a folder that `make run` has been in."""

import re
import runpy
from pathlib import Path

import pytest
import torch

from sim2real.cli import main

ROOT = Path(__file__).parents[1]
USES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def use(number: int) -> dict:
    scope: dict = {}
    exec(compile(USES[number], f"README.md, use {number}", "exec"), scope)
    return scope


def test_there_are_three_uses_of_about_ten_lines() -> None:
    assert len(USES) == 3
    for text in USES:
        lines = [line for line in text.splitlines() if line.strip() and not re.match(r"(import|from) ", line)]
        assert len(lines) <= 12


def test_an_estimator_in_a_plain_loop_raises_the_return() -> None:
    torch.manual_seed(0)
    scope = use(0)
    fresh = dict(type(scope["net"])(*scope["net"]).named_parameters())
    assert fresh.keys() == scope["nu"].keys()
    # the last estimate against the 1 % quantile of what 20 more draws of noise give at the start: about -2.0 on [-2, 0]
    assert scope["estimate"].value > -1.9


def test_the_policy_optimum_as_a_layer_fills_theta_grad() -> None:
    scope = use(1)
    J, theta, real, key = scope["J"], scope["theta"], scope["real"], "length"
    with torch.no_grad():
        start, values = {"gain": scope["nu"]["gain"].detach()}, []
        for step in (1e-3, -1e-3):  # retrain at both ends: central differences of the real return
            moved = {k: v + step * (k == key) for k, v in theta.items()}
            values.append(J(real, scope["policy_optimum"](J, moved, start).nu))
    assert theta[key].grad is not None
    # the differences' own error is of order step^2 (1e-6) of a gradient of order 1
    torch.testing.assert_close(theta[key].grad, (values[0] - values[1]) / 2e-3, rtol=1e-4, atol=1e-6)


def test_tuning_against_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/bench_rig/log")
    runpy.run_path(str(ROOT / "examples" / "make_rig_log.py"))["write_log"](folder, 0)
    words = [f"log={folder}", "model=pendulum", "fit.delay=true", "fit.zeros=per_run"]
    words += ["fit.stride=0.3", "report=false", "out=runs/bench_rig/fit"]
    assert main(["fit", *words]) == 0
    result = use(2)["result"]
    kept = [step["real_return"] for step in result.history if step["accepted"]]
    assert len(result.history) == 4
    assert kept == sorted(kept)  # estimated on the same log: no step that lowers it is kept
    assert kept[-1] > kept[0]
