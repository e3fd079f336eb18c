"""The output format and the command line that all benchmarks share.

A benchmark is a function `bar(quick: bool) -> Iterator[Figure]`; `main({"bar-id": function, ...})` runs it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Figure:
    """One measured figure: `metric` is printed as ID/metric, `n` is the number of samples or seeds behind it."""

    metric: str
    value: float
    unit: str
    n: int
    reference: float | None = None
    command: str | None = None
    """what printed a figure that is read from a file"""


class MissingError(RuntimeError):
    """What a bar needs (data, a peer) is not on this machine."""


Bar = Callable[[bool], Iterator[Figure]]


def main(bars: dict[str, Bar]) -> None:
    """Run the chosen bars on one torch thread and print one line per figure; a bar that lacks something is skipped."""
    parser = argparse.ArgumentParser(description="Benchmarks; one JSON object per line with --json.")
    parser.add_argument("--bar", action="append", choices=sorted(bars), help="which bar (default: all)")
    parser.add_argument("--quick", action="store_true", help="a shorter honest version, at most 5 minutes per bar")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.bar or bars:
        start = time.perf_counter()
        try:
            for figure in bars[name](arguments.quick):
                show(name, figure, time.perf_counter() - start, arguments.json)
        except MissingError as missing:
            print(f"{name}: skipped: {missing}", file=sys.stderr, flush=True)


def show(name: str, figure: Figure, seconds: float, as_json: bool) -> None:
    """Print one figure of the bar `name`, measured `seconds` after the bar began."""
    if as_json:
        line = {
            "bar": f"{name}/{figure.metric}",
            "value": figure.value,
            "unit": figure.unit,
            "n": figure.n,
            "reference": figure.reference,
            "seconds": round(seconds, 2),
        }
        if figure.command is not None:
            line["command"] = figure.command
        print(json.dumps(line), flush=True)
    else:
        reference = "" if figure.reference is None else f" (reference {figure.reference:.6g})"
        text = f"{figure.value:.6g} {figure.unit}, n = {figure.n}{reference}, {seconds:.1f} s"
        text += f", by {figure.command}" if figure.command is not None else ""
        print(f"{name}/{figure.metric}: {text}", flush=True)
