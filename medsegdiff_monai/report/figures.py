"""Small charts as SVG, in the colours of the page that they stand in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from markupsafe import Markup
from torch import Tensor

from ..networks.record import CALIBRATION_BINS, MAX_LOGIT
from .curves import risk_coverage
from .statistics import Grading

__all__ = ["reliability_chart", "risk_chart", "scatter_chart"]

WIDTH, HEIGHT, LEFT, TOP, SIDE = 308, 284, 54, 26, 220  # of a chart and of its square plot
FRAME = Markup(
    '<svg class="chart" viewBox="0 0 {w} {h}" role="img" aria-label="{title}: {y} against {x}">'
    '<text class="title" x="{left}" y="14">{title}</text>{grid}{marks}'
    '<text class="axis" x="{mid}" y="{bottom}" text-anchor="middle">{x}</text>'
    '<text class="axis" transform="translate(11 {middle}) rotate(-90)" text-anchor="middle">{y}</text></svg>'
)


class _Plot:
    """A square plot of values from ``low`` to 1 along x, and from ``low`` to ``top`` along y."""

    def __init__(self, top: float = 1.0, low: float = 0.0) -> None:
        self.top = top
        self.low = low
        self.marks: list[Markup] = []

    def place(self, x: float, y: float) -> tuple[str, str]:
        across, up = (x - self.low) / (1 - self.low), (y - self.low) / (self.top - self.low)
        return f"{LEFT + SIDE * across:.1f}", f"{TOP + SIDE * (1 - up):.1f}"

    def line(self, x: Sequence[float], y: Sequence[float], kind: str, name: str = "") -> None:
        points = " ".join(",".join(self.place(*pair)) for pair in zip(x, y))
        title = Markup("<title>{}</title>").format(name) if name else ""
        self.marks.append(Markup('<polyline class="line {}" points="{}">{}</polyline>').format(kind, points, title))

    def point(self, x: float, y: float, kind: str, name: str) -> None:
        mark = Markup('<circle class="point {}" cx="{}" cy="{}" r="3.5"><title>{}</title></circle>')
        self.marks.append(mark.format(kind, *self.place(x, y), name))

    def _grid(self) -> Markup:
        parts = []
        path = Markup('<path class="grid" d="M{} {}V{}M{} {}H{}"/>')
        text = Markup('<text class="tick" x="{}" y="{}" text-anchor="{}">{}</text>')
        for across, up in zip(np.linspace(self.low, 1, 5), np.linspace(self.low, self.top, 5)):
            (x, bottom), (left, y) = self.place(across, self.low), self.place(self.low, up)
            parts.append(path.format(x, bottom, TOP, left, y, LEFT + SIDE))
            parts.append(text.format(x, float(bottom) + 14, "middle", f"{across:.3g}"))
            parts.append(text.format(LEFT - 5, float(y) + 4, "end", f"{up:.3g}"))
        return Markup("").join(parts)

    def svg(self, title: str, x: str, y: str) -> Markup:
        return FRAME.format(
            w=WIDTH, h=HEIGHT, title=title, x=x, y=y, left=LEFT, mid=LEFT + SIDE / 2, middle=TOP + SIDE / 2,
            bottom=HEIGHT - 8, grid=self._grid(), marks=Markup("").join(self.marks),
        )  # fmt: skip


def scatter_chart(grading: Grading) -> Markup:
    """Expected against true Dice, a point for each case."""
    least = min(*grading.expected, *grading.true)
    plot = _Plot(low=min(float(np.floor(5 * least) / 5), 0.8))
    plot.line([plot.low, 1], [plot.low, 1], "ideal")
    for case, expected, true in zip(grading.cases, grading.expected, grading.true):
        plot.point(expected, true, "", f"{case}: expected {expected:.3f}, Dice {true:.3f}")
    return plot.svg(grading.name, "expected Dice", "Dice")


def risk_chart(grading: Grading) -> Markup:
    """Mean risk of the cases that are kept, by expected Dice, by a perfect order, and by none."""
    coverage, risk = risk_coverage(grading.expected, grading.risk)
    best = risk_coverage(grading.true, grading.risk)[1]
    plot = _Plot(_rounded_up(float(risk.max())))
    plot.line([0, 1], [risk[-1], risk[-1]], "ideal", "at random")
    plot.line(coverage.tolist(), best.tolist(), "before", "in perfect order")
    plot.line(coverage.tolist(), risk.tolist(), "", "by expected Dice")
    return plot.svg("risk and coverage", "share of cases kept", "mean of 1 − Dice")


def _rounded_up(value: float) -> float:
    """A number for the end of an axis: 1, 2 or 5 times a power of ten."""
    power = 10 ** np.floor(np.log10(max(value, 1e-3)))
    return float(next(step * power for step in (1, 2, 5, 10) if step * power >= value - 1e-12))


def _tenths(counts: Tensor) -> list[tuple[float, float, float]]:
    """Mean probability, frequency and number of voxels for probabilities 0 to .1, .1 to .2, ..., where there are any.

    Args:
        counts: voxels and foreground of each bin of the logit, (2, bins).
    """
    centres = torch.sigmoid(torch.linspace(-MAX_LOGIT, MAX_LOGIT, CALIBRATION_BINS + 1, dtype=torch.float64))
    tenth = (centres * 10).long().clamp(max=9)
    voxels, positive = counts.double()
    sums = [torch.bincount(tenth, weights=w, minlength=10) for w in (voxels * centres, positive, voxels)]
    return [(p / n, y / n, n) for p, y, n in zip(*(s.tolist() for s in sums)) if n > 0]


def reliability_chart(name: str, counts: dict[str, Tensor]) -> Markup:
    """How often voxels of a probability are foreground.

    Args:
        name: of the class.
        counts: for each state, such as before and after calibration, (2, bins) as in
            :class:`medsegdiff_monai.grading.ReliabilityCounts`; the last one is drawn most strongly.
    """
    plot = _Plot()
    plot.line([0, 1], [0, 1], "ideal")
    for state, table in counts.items():
        kind = "" if state == list(counts)[-1] else "before"
        tenths = _tenths(table)
        plot.line([p for p, _, _ in tenths], [y for _, y, _ in tenths], kind, state)
        for p, y, n in tenths:
            plot.point(p, y, kind, f"{state}: {p:.2f} stated, {y:.2f} true ({n:.0f} voxels)")
    return plot.svg(name, "probability", "share that is foreground")
