"""``report.html``: what came out, for a person, in one file that needs no network."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from PIL import Image
from torch import Tensor

from ..files import write_atomically
from ..outputs import result_file
from ..rows import BAND
from .figures import reliability_chart, risk_chart, scatter_chart
from .statistics import FAILED, Row, grading_of, mean_of, number, unit_of
from .summary import caution, interval_note
from .tables import (
    cases_table,
    class_table,
    cleanup_table,
    expected_table,
    folds_table,
    grading_table,
    raters_table,
    structure_table,
)

__all__ = ["write_report"]

MAX_FLAGGED, MAX_WORST, MAX_BEST = 20, 6, 3  # pictures that are embedded
PICTURE_WIDTH = 1000


def write_report(
    rows: Sequence[Row],
    output_dir: str | Path,
    names: Sequence[str],
    *,
    structures: Sequence[Row] = (),
    reliability: Mapping[str, Tensor] | None = None,
    split: str | None = None,
    chose_weights: bool = False,
    tolerance: float | None = 1.0,
    title: str = "Segmentation report",
    folds: Mapping[str, Sequence[Row]] | None = None,
    pictures: Mapping[str, Path] | None = None,
) -> Path:
    """Write ``<output_dir>/report.html``: what to look at, scores, whether uncertainty is right, pictures, all cases.

    Parts for which the rows have nothing, such as scores without labels, are left out. Pictures of a few cases are
    embedded, from ``<output_dir>/<case>/<case>_overlay.png``; others are linked.

    Args:
        rows: of ``cases.csv``.
        output_dir: folder of the results.
        names: of the classes.
        structures: rows of ``structures.csv``.
        reliability: for each state, such as ``before calibration`` and ``after calibration``, the counts of a
            :class:`medsegdiff_monai.grading.ReliabilityCounts`, (2, classes, bins).
        split: list that was scored: ``training``, ``validation`` or ``test``.
        chose_weights: whether that list chose the weights.
        tolerance: of NSD, in the unit of lengths; None where it is not known.
        title: of the page.
        folds: of a cross-validation, the rows of each fold.
        pictures: of the cases, where they are not in ``output_dir``.

    Returns:
        The file.

    Raises:
        InputError: where it cannot be written.
    """
    folder = Path(output_dir)
    scored = any(math.isfinite(mean_of(row, "dice", names)) for row in rows)
    cards = _Cards(folder, names, "dice" if scored else "expected_dice", pictures or {})
    page: dict[str, Any] = {"title": title, "caution": caution(split, chose_weights) if scored else ""}
    page["scored"] = _what_was_scored(len(rows), split, scored)
    page["interval_note"] = interval_note(rows, names)
    page |= _flagged(rows, cards) | _extremes(rows, cards, scored)
    page |= _scores(rows, names, tolerance, scored) | _uncertainty(rows, names, reliability or {})
    text, table = structure_table(structures)
    page |= {"structures_text": text, "structures": table, "table": cases_table(rows, names, cards.link)}
    page["cleanup_text"], page["cleanup"] = cleanup_table(rows, names)
    page["raters"] = raters_table(rows)
    page["folds"] = folds_table(folds, names) if folds else {"rows": []}
    html = _template().render(page)
    write_atomically(folder / "report.html", html.encode("utf-8", "replace"))
    return folder / "report.html"


def _template() -> Template:
    loader = PackageLoader(__package__, ".")
    return Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    ).get_template("page.html")


def _what_was_scored(count: int, split: str | None, scored: bool) -> str:
    cases = f"{count} case{'s' * (count != 1)}"
    if not scored:
        return f"{cases}, without labels."
    return f"{cases} of the list “{split}”." if split else f"{cases}."


class _Cards:
    """Cases with their pictures; a picture is embedded once.

    Args:
        folder: of the results.
        names: of the classes.
        score: that orders the cases, ``dice`` or ``expected_dice``.
        pictures: of cases that have theirs elsewhere.
    """

    def __init__(self, folder: Path, names: Sequence[str], score: str, pictures: Mapping[str, Path]) -> None:
        self.folder = folder
        self.pictures = pictures
        self.names = names
        self.score = score
        self._shown: dict[str, str] = {}  # anchor of each case that has a picture already

    def link(self, case: str) -> str:
        """Relative path of a case's picture; empty where there is none."""
        file = self._picture(case)
        return quote(Path(os.path.relpath(file, self.folder)).as_posix(), errors="replace") if file.is_file() else ""

    def _picture(self, case: str) -> Path:
        return self.pictures.get(case) or result_file(self.folder, case, "overlay.png")

    def ordered(self, rows: Sequence[Row]) -> list[Row]:
        """The worst first; those of unknown score last."""
        keys = [mean_of(row, self.score, self.names) for row in rows]
        places = sorted(range(len(rows)), key=lambda i: (math.isnan(keys[i]), keys[i], i))
        return [rows[i] for i in places]

    def has_score(self, row: Row) -> bool:
        """Whether the case has a place in the order."""
        return not math.isnan(mean_of(row, self.score, self.names))

    def card(self, row: Row) -> dict[str, Any]:
        """What the page shows of a case."""
        case = str(row["case"])
        card = {"case": case, "scores": self._scores(row), "flag": row.get("flag") or "", "link": self.link(case)}
        above = self._shown.get(case, "")
        anchor = "" if above else self._shown.setdefault(case, f"case-{len(self._shown) + 1}")
        picture = "" if above or not card["link"] else _embedded(self._picture(case))
        return {**card, "anchor": anchor, "anchor_above": above, "picture": picture}

    def _scores(self, row: Row) -> list[str]:
        parts = []
        for score, word in (("dice", "Dice"), ("expected_dice", "expected Dice")):
            values = {name: number(row, f"{score}_{name}") for name in self.names}
            known = [f"{name} {value:.3f}" for name, value in values.items() if not math.isnan(value)]
            parts += [f"{word}: {', '.join(known)}"] if known else []
        return parts


def _embedded(file: Path) -> str:
    """A picture as a data URL, made smaller where it is large; empty where it cannot be read."""
    try:
        with Image.open(file) as picture:
            small = picture.convert("RGB")
    except OSError:
        return ""
    small.thumbnail((PICTURE_WIDTH, 4 * PICTURE_WIDTH))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=85, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"


def _flagged(rows: Sequence[Row], cards: _Cards) -> dict[str, Any]:
    found = cards.ordered([row for row in rows if row.get("flag")])
    text = f"Flagged: {len(found)} of {len(rows)} cases, the worst first."
    if not found:
        text = "No case is flagged." if any("flag" in row for row in rows) else "Cases were not flagged."
    more = [{"case": row["case"], "link": cards.link(str(row["case"]))} for row in found[MAX_FLAGGED:]]
    return {"flagged": [cards.card(r) for r in found[:MAX_FLAGGED]], "flagged_text": text, "more_flagged": more}


def _extremes(rows: Sequence[Row], cards: _Cards, scored: bool) -> dict[str, Any]:
    """Worst and best cases; few cases are all among the worst."""
    ordered = [row for row in cards.ordered(rows) if cards.has_score(row)]
    worst, rest = ordered[:MAX_WORST], ordered[MAX_WORST:]
    by = "" if scored else ", by expected Dice"
    return {
        "worst": [cards.card(row) for row in worst],
        "best": [cards.card(row) for row in reversed(rest[-MAX_BEST:])],
        "worst_title": f"Worst cases{by}",
        "best_title": f"Best cases{by}",
    }


def _scores(rows: Sequence[Row], names: Sequence[str], tolerance: float | None, scored: bool) -> dict[str, Any]:
    if not scored:
        note = "Estimated from the members' agreement, since there are no labels: not measured."
        return {"classes_title": "Expected scores", "classes": expected_table(rows, names), "classes_note": note}
    unit = unit_of(rows)
    table = class_table(rows, names, unit, tolerance)
    within = "the surface_tolerance" if tolerance is None else f"{tolerance:g} {unit}"
    notes = {
        "HD95": "HD95: 95th percentile of the surfaces' distances, infinite where one of them is missing.",
        "NSD": f"NSD: share of the surfaces within {within} of the other.",
        "ECE": f"ECE in band: distance of probability and frequency among the voxels within {BAND} of the contours.",
    }
    shown = " ".join(note for word, note in notes.items() if any(word in head for head in table["head"]))
    return {
        "classes_title": "Scores",
        "classes": table,
        "classes_note": f"Below {FAILED:g}: share of the cases. {shown}",
    }


def _uncertainty(rows: Sequence[Row], names: Sequence[str], counts: Mapping[str, Tensor]) -> dict[str, Any]:
    gradings = grading_of(rows, names)
    return {
        "grading": grading_table(gradings),
        "scatters": [scatter_chart(grading) for grading in gradings],
        "risk": risk_chart(gradings[0]) if gradings else "",
        "states": list(counts),
        "reliability": [
            reliability_chart(name, {state: table[:, k] for state, table in counts.items()})
            for k, name in enumerate(names)
        ] if counts else [],
    }  # fmt: skip
