"""`s-certificate`: does the gradient certificate catch what is wrong, and pass what is right?

    caught          share of the bad cases refused, each wrong by more than 5 % against an independent reference (or not
                    finite); one function each in `certificate_bad.py`
    false-alarms    share of the good cases refused: seeded, true error within 5 %, of all classes of
                    `certificate_good.py` (LQR gains, masked gains, small networks, least squares, simulators, box QP
                    layers) and over-parameterised networks (`certificate_networks.py`)
    bound-holds     share of the good cases whose true error is within the bound
    tightness       95th percentile of bound over true error, where that is at least 1e-6 of the product
    within-20       share of those cases with a ratio of at most 20
    cost            median time of a certificate over that of the product it certifies, where J is given
    critic-alarms   share of unbiased critics refused by `certify_estimate` (stated: at most 1 %)

`python benchmarks/certificate.py --quick` takes every fifth good case and leaves the peers out.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import certificate_good as good
from benchmarks.bars import Figure, MissingError, main
from benchmarks.certificate_bad import CASES, PEERS, critic_estimate
from benchmarks.certificate_good import Case
from benchmarks.certificate_networks import well_damped

TOLERANCE = 0.05
CLASSES: dict[str, tuple[Callable[[int], good.Problem], int]] = {
    "LQR gain": (good.lqr_gain, 64),
    "masked gain": (good.masked_gain, 40),
    "small network": (good.network, 28),
    "least squares": (good.decay_fit, 40),
    "simulator": (good.simulated, 24),
}
LAYERS, NETWORKS, CRITICS = 40, 4, 200


def good_cases(quick: bool) -> Iterator[Case]:
    """Every seed of every class whose search finds a regular maximum; the true error may exceed 5 % in a few."""
    stride = 5 if quick else 1
    for name, (make, count) in CLASSES.items():
        for seed in range(0, count, stride):
            try:
                yield good.judged(name, make(seed), seed)
            except good.UnsolvedError:
                continue
    yield from map(good.box_layer, range(0, LAYERS, stride))
    yield from map(well_damped, range(0, NETWORKS, 4 if quick else 1))


def bad_cases(quick: bool) -> Iterator[Case]:
    for make in CASES:
        if quick and make in PEERS:
            continue
        try:
            yield make()
        except MissingError as missing:
            print(f"{make.__name__}: skipped: {missing}", file=sys.stderr)


def s_certificate(quick: bool) -> Iterator[Figure]:
    """The bar s-certificate; a line on stderr for every case that goes against it."""
    warnings.simplefilter("ignore")
    bad = list(bad_cases(quick))
    for case in bad:
        if case.certificate.holds or case.error <= TOLERANCE * case.size:
            report(case, "not caught" if case.certificate.holds else "not bad")
    yield Figure("caught", refused(bad), "share", len(bad), 1.0)
    every = list(good_cases(quick))
    cases = [case for case in every if case.error <= TOLERANCE * case.size]
    held = [case.error <= case.certificate.error_bound for case in cases]
    for case, holds in zip(cases, held, strict=True):
        if not (holds and case.certificate.holds):
            report(case, "bound broken" if case.certificate.holds else "false alarm")
    yield Figure(
        "false-alarms", float(np.mean([not case.certificate.holds for case in cases])), "share", len(cases), 0.05
    )
    yield Figure("bound-holds", float(np.mean(held)), "share", len(cases), 0.95)
    seen = [case for case in cases if case.error >= 1e-6 * case.size > 0]
    ratios = np.array([case.certificate.error_bound / case.error for case in seen])
    yield Figure("tightness", float(np.quantile(ratios, 0.95)), "bound / true error", len(seen), 20.0)
    yield Figure("within-20", float(np.mean(ratios <= 20)), "share", len(seen), 1.0)
    costs = [case.seconds[1] / case.seconds[0] for case in cases if case.seconds[0] > 0]
    yield Figure("cost", float(np.median(costs)), "times the product", len(costs))
    wrong = [case for case in every if case.error > TOLERANCE * case.size]
    if wrong:  # made by the same seeds, and worse than the tolerance
        yield Figure(
            "caught-by-chance", float(np.mean([not c.certificate.holds for c in wrong])), "share", len(wrong), 1.0
        )
    critics = [critic_estimate(seed, bump=0.0, episodes=60)[1] for seed in range(0, CRITICS, 5 if quick else 1)]
    yield Figure("critic-alarms", float(np.mean([not c.holds for c in critics])), "share", len(critics), 0.01)


def refused(cases: list[Case]) -> float:
    return float(np.mean([not case.certificate.holds for case in cases]))


def report(case: Case, what: str) -> None:
    figures = f"true error {case.error:.2e} of {case.size:.2e}, bound {case.certificate.error_bound:.2e}"
    print(f"{what}: {case.name}: {figures}, {case.certificate.reasons}", file=sys.stderr)


if __name__ == "__main__":
    main({"s-certificate": s_certificate})
