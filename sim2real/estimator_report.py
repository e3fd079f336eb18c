"""Table and figure of a comparison of gradient estimators (`sim2real.estimators.compare_estimators`)."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from sim2real.estimators.compare_estimators import EstimatorComparison
from sim2real.figures import BLUE, GREY, ORANGE, draw, log_axis

_BIASED = 0.01


def comparison_table(comparison: EstimatorComparison) -> Table:
    """One line per estimator, norms as shares of the gradient; below them the cross term and the recommendation."""
    scale = comparison.reference_norm or 1.0
    title = (
        f"gradient {comparison.reference_norm:.3g} ± {comparison.reference_noise:.1g}, "
        f"{comparison.batches} batches of {comparison.batch} rollouts"
    )
    caption = (
        f"cross term: {comparison.cross_share:.2g} ± {comparison.cross_share_noise:.1g} of the gradient\n"
        f"{comparison.recommendation}"
    )
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left", box=None, pad_edge=False)
    table.add_column("estimator", no_wrap=True)
    for head in ("bias", "95 %", "p unbiased", "variance per rollout", "cosine", "ms per rollout", "error, equal cost"):
        table.add_column(head, justify="right")
    for row in comparison.rows:
        table.add_row(
            row.name,
            f"{row.bias / scale:.2g}",
            f"{row.bias_low / scale:.2g} – {row.bias_high / scale:.2g}",
            f"{row.p_value:.2g}",
            f"{row.variance / scale**2:.3g}",
            f"{row.cosine:.4f}",
            f"{1e3 * row.seconds:.3g}",
            f"{row.error:.2g}",
        )
    for name, reason in comparison.failures.items():
        table.add_row(name, "–", "", "", "", "", "", reason.split(";")[0])
    return table


def comparison_figure(comparison: EstimatorComparison) -> str:
    """SVG: bias with its 95 % interval, and cost against error, one mark per estimator; biased ones in orange."""
    scale, rows = comparison.reference_norm or 1.0, comparison.rows
    colors = [ORANGE if row.p_value < _BIASED else BLUE for row in rows]

    def paint(axes: Any) -> None:
        left, right = axes[0]
        for place, (row, color) in enumerate(zip(rows, colors, strict=True)):
            left.plot([row.bias_low / scale, row.bias_high / scale], [place, place], color=color)
            left.plot([row.bias / scale], [place], "o", color=color, ms=4)
            right.plot([row.variance / scale**2], [place], "o", color=color, ms=4)
        left.axvline(comparison.reference_noise / scale, color=GREY, lw=1.0, ls=":")
        left.set_yticks(range(len(rows)), [row.name for row in rows])
        right.set_yticks(range(len(rows)), [f"cosine {row.cosine:.3f}" for row in rows])
        for ax in (left, right):
            ax.invert_yaxis()
        left.set_xlabel("bias, 95 % interval [of |gradient|]; dotted: noise of the reference")
        right.set_xlabel("variance of one rollout [of |gradient|²]")
        if all(row.variance > 0 for row in rows):
            log_axis(right, "x")

    return draw(paint, 1, 2, size=(10.0, 1.2 + 0.3 * len(rows)))
