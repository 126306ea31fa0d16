"""The tables of the report, as texts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from .statistics import (
    CLEANED,
    FAILED,
    NOT_CLEANED,
    Grading,
    Row,
    class_scores,
    mean_of,
    number,
    over_folds,
    rater_means,
    unit_of,
    was_cleaned,
)

__all__ = [
    "cases_table", "class_table", "cleanup_table", "expected_table", "folds_table", "grading_table", "raters_table",
    "structure_table",
]  # fmt: skip

MAX_MISSES, MAX_UNSURE = 20, 10  # structures that are shown
SIZES = {"volume_mm3": "volume (mm³)", "volume_px": "volume (px)", "area_mm2": "area (mm²)", "area_px": "area (px)"}
RATER_WORDS = {
    "ged": "generalised energy distance of masks and raters (lower is better; 0: drawn alike)",
    "matched_iou": "IoU of masks and raters in the best pairs (higher is better)",
    "best_iou": "IoU of each rater with the best mask (higher is better)",
    "ncc": "correlation of the masks' variance with the raters' (higher is better)",
}
Table = dict[str, list]


def _text(value: float, form: str = ".3f") -> str:
    return "" if math.isnan(value) else "∞" if math.isinf(value) else format(value, form)


def _without_empty(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Leave out the columns that no row has a value in."""
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    return {"head": [head[i] for i in kept], "rows": [[row[i] for i in kept] for row in rows]}


def class_table(rows: Sequence[Row], names: Sequence[str], unit: str, tolerance: float | None) -> Table:
    """Scores of each class; of NSD without a tolerance it is not known, or several."""
    head = ["class", "cases", "mean Dice", "median Dice", f"below {FAILED:g}", f"median HD95 ({unit})"]
    lines = [
        [s.name, str(s.cases), _text(s.mean), _text(s.median), _text(s.below, ".0%"), _text(s.hd95, ".2f"),
         _text(s.nsd), _text(s.ece_band)]
        for s in class_scores(rows, names)
    ]  # fmt: skip
    surface = "mean NSD" + ("" if tolerance is None else f" ({tolerance:g} {unit})")
    return _without_empty([*head, surface, "mean ECE in band"], lines)


def raters_table(rows: Sequence[Row]) -> Table:
    """How closely the members match the raters, where there are several."""
    lines = []
    for key, mean, std, count in rater_means(rows):
        score = next(score for score in RATER_WORDS if key.startswith(score))
        name, of = RATER_WORDS[score], key.removeprefix(score).removeprefix("_")
        lines.append([f"{name}{of and f' of {of}'}", _text(mean), _text(std), str(count)])
    return {"head": ["score", "mean", "standard deviation", "cases"], "rows": lines}


def folds_table(folds: Mapping[str, Sequence[Row]], names: Sequence[str]) -> Table:
    """Mean Dice of each class in each fold, then mean and standard deviation of these."""
    means = {fold: {s.name: s.mean for s in class_scores(rows, names)} for fold, rows in folds.items()}
    columns = {name: [of_fold.get(name, math.nan) for of_fold in means.values()] for name in names}
    spread = {name: over_folds(values) for name, values in columns.items()}
    lines = [
        [fold, str(len(rows)), *(_text(columns[name][i]) for name in names)]
        for i, (fold, rows) in enumerate(folds.items())
    ]
    for i, word in enumerate(("mean of the folds", "their standard deviation")):
        lines.append([word, "", *(_text(spread[name][i]) for name in names)])
    return {"head": ["fold", "cases", *(f"mean Dice {name}" for name in names)], "rows": lines}


def cleanup_table(rows: Sequence[Row], names: Sequence[str]) -> tuple[str, Table]:
    """What a clean-up of the masks has changed, or what keeping only the largest component would change."""
    done = was_cleaned(rows, names)
    voxels, other = CLEANED if done else NOT_CLEANED
    lines = []
    for name in names:
        counts = [count for row in rows if (count := number(row, f"{voxels}_{name}")) > 0]
        pairs = [(number(row, f"dice_{name}"), number(row, f"{other}_{name}")) for row in rows]
        dice = [pair[::-1] if done else pair for pair in pairs if not math.isnan(sum(pair))]
        change = [
            *(_text(sum(values) / len(dice)) for values in zip(*dice)),
            str(sum(after > before for before, after in dice)),
            str(sum(after < before for before, after in dice)),
        ] if dice else [""] * 4  # fmt: skip
        lines += [[name, str(len(counts)), f"{sum(counts):.0f}", *change]] if counts else []
    head = ["class", "cases", "voxels", "mean Dice without", "mean Dice with it", "cases better", "cases worse"]
    if done:
        text = "The masks were cleaned up; scores are those of what is left."
        text += "" if lines else " Nothing was removed."
    else:
        text = "The masks were not cleaned up. This is what largest_component would have removed." if lines else ""
    return text, _without_empty(head, lines)


def expected_table(rows: Sequence[Row], names: Sequence[str]) -> Table:
    """Expected Dice of each class, where there are no labels."""
    lines = []
    for name in names:
        values = sorted(v for row in rows if not math.isnan(v := number(row, f"expected_dice_{name}")))
        if values:
            below = sum(v < FAILED for v in values) / len(values)
            mean, median = sum(values) / len(values), values[len(values) // 2]
            lines.append([name, str(len(values)), _text(mean), _text(median), _text(values[0]), _text(below, ".0%")])
    return _without_empty(
        ["class", "cases", "mean expected Dice", "median", "lowest", f"expected below {FAILED:g}"], lines
    )


def grading_table(gradings: Sequence[Grading]) -> Table:
    """How well the expected Dice tells the true one."""
    head = ["class", "cases", "mean error", "rank correlation", "AURC", "E-AURC", "mean 1 − Dice"]
    lines = [
        [g.name, str(len(g.true)), _text(g.error), _text(g.correlation, ".2f"), _text(g.aurc, ".4f"),
         _text(g.excess_aurc, ".4f"), _text(sum(g.risk) / len(g.risk), ".4f")]
        for g in gradings
    ]  # fmt: skip
    return _without_empty(head, lines)


def structure_table(structures: Sequence[Row]) -> tuple[str, Table]:
    """The structures to look at: possible misses, the most likely first, and the least sure ones of the masks."""
    counts: Counter[str] = Counter()
    for row in structures:
        first, _, last = str(row["structure"]).partition("-")
        counts[str(row["kind"])] += int(last) - int(first) + 1 if last else 1
    single = [row for row in structures if "-" not in str(row["structure"])]
    missed = [row for row in single if row["kind"] == "possible miss"]
    found = [row for row in single if row["kind"] != "possible miss"]
    number_missed = counts.pop("possible miss", 0)
    missing = f"Possible misses, which members have and the mask does not: {number_missed or 'none'}."
    text = f"In the masks: {counts.total()}. {missing}"
    missed = sorted(missed, key=lambda row: (-number(row, "share_of_members"), -number(row, "size")))
    found = sorted(found, key=lambda row: number(row, "mean_probability"))
    shown = missed[:MAX_MISSES] + found[:MAX_UNSURE]
    if len(shown) < len(structures):
        text += " Here are the most likely misses, and the least sure of the others."
    head = ["case", "class", "kind", "size", "largest diameter", "centre (voxel)", "centre (mm)", "mean probability",
            "share of members"]  # fmt: skip
    return text, _without_empty(head, [_structure(row) for row in shown])


def _structure(row: Row) -> list[str]:
    unit = str(row["unit"])
    dims = len(str(row["centre_voxel"]).split())
    power = {"mm": f" mm{'²³'[dims - 2]}"}.get(unit, f" {unit}")
    return [
        str(row["case"]), str(row["class"]), str(row["kind"]), _text(number(row, "size"), ".4g") + power,
        f"{_text(number(row, 'largest_diameter'), '.4g')} {unit}", str(row["centre_voxel"]), str(row["centre_mm"]),
        _text(number(row, "mean_probability"), ".2f"), _text(number(row, "share_of_members"), ".0%"),
    ]  # fmt: skip


def _cell(value: float, form: str) -> dict[str, str]:
    sortable = "" if math.isnan(value) else "Infinity" if math.isinf(value) else repr(value)
    return {"text": _text(value, form), "value": sortable, "kind": "", "link": ""}


def _word(text: str, kind: str = "text", link: str = "") -> dict[str, str]:
    return {"text": text, "value": text, "kind": kind, "link": link}


def cases_table(rows: Sequence[Row], names: Sequence[str], link: Callable[[str], str]) -> dict[str, list]:
    """The main columns of all cases, for a table that is sorted by numbers or by texts.

    Args:
        rows: of ``cases.csv``.
        names: of the classes.
        link: where the picture of a case is, relative to the page; empty where there is none.
    """
    unit = unit_of(rows)
    columns = [("expected Dice", ".3f", lambda row: mean_of(row, "expected_dice", names))]
    columns += [("Dice", ".3f", lambda row: mean_of(row, "dice", names))] if len(names) > 1 else []
    scores = {"dice": ("Dice", ".3f"), "hd95": (f"HD95 ({unit})", ".2f"), "nsd": ("NSD", ".3f")}
    scores |= {size: (word, ".4g") for size, word in SIZES.items()}
    for score, (word, form) in {**scores, **_cleanup_columns(rows, names)}.items():
        for name in names:
            title = f"{word} {name}" if len(names) > 1 else word
            columns.append((title, form, _reader(f"{score}_{name}")))
    kept = [c for c in columns if any(not math.isnan(c[2](row)) for row in rows)]
    flagged = any(row.get("flag") for row in rows)
    head = [{"text": "case", "kind": "text", "sort": "text"}]
    head += [{"text": "why it is flagged", "kind": "text", "sort": "text"}] if flagged else []
    head += [{"text": title, "kind": "", "sort": "number"} for title, _, _ in kept]
    body = []
    for row in rows:
        case = str(row["case"])
        line = [_word(case, link=link(case))]
        line += [_word(str(row.get("flag") or ""), "text flag")] if flagged else []
        body.append(line + [_cell(read(row), form) for _, form, read in kept])
    return {"head": head, "rows": body}


def _cleanup_columns(rows: Sequence[Row], names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """The columns of a clean-up, or of one that was not done; none where it changes nothing."""
    done = was_cleaned(rows, names)
    voxels, dice = CLEANED if done else NOT_CLEANED
    if not any(number(row, f"{voxels}_{name}") > 0 for row in rows for name in names):
        return {}
    words = ("voxels removed", "Dice uncleaned") if done else ("voxels beside the largest", "Dice of the largest")
    return {voxels: (words[0], ".0f"), dice: (words[1], ".3f")}


def _reader(column: str) -> Callable[[Row], float]:
    return lambda row: number(row, column)
