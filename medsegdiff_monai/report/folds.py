"""A cross-validation as a whole, from the results of its folds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import lock_folder, unlock_folder, write_atomically
from ..journal import CaseJournal, csv_bytes
from ..outputs import result_file
from ..structures import COLUMNS
from .page import write_report
from .statistics import class_scores, over_folds
from .summary import aligned, summary_lines

__all__ = ["summarize_folds"]


def summarize_folds(folders: Sequence[str | Path], output: str | Path) -> Path:
    """Put the evaluations of all folds together: mean and standard deviation over folds, all cases in one table.

    Writes ``cases.csv`` and ``structures.csv`` with a column ``fold``, ``folds.csv``, and ``report.html``, whose
    pictures stay where they are.

    Args:
        folders: what each fold's ``evaluating`` has written.
        output: folder to write to.

    Returns:
        The report.

    Raises:
        InputError: for folders that do not go together, before anything is written.
    """
    if len({Path(folder).resolve() for folder in folders}) < max(2, len(folders)):
        raise InputError("summarize-folds: give the folders of at least two folds, each once.")
    if (Path(output) / "cases.jsonl").exists():
        raise InputError(f"{output}: holds results of an evaluation or inference: choose another folder.")
    folds = [_Fold(folder) for folder in folders]
    _check(folds)
    lock_folder(output)
    try:
        return _write(folds, Path(output))
    finally:
        unlock_folder(output)


class _Fold:
    """What the evaluation of a fold has left.

    Args:
        folder: where it is.

    Raises:
        InputError: where there is no finished evaluation, or one without scores.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = folder
        self.name = Path(folder).resolve().name
        self.entries = list(CaseJournal(folder).entries.values())
        if not self.entries or not (Path(folder) / "report.html").is_file():
            raise InputError(f"{folder}: holds no finished evaluation (cases.jsonl, report.html): evaluate this fold.")
        columns = dict.fromkeys(key for entry in self.entries for key in entry["row"])
        self.classes = [key.removeprefix("iou_") for key in columns if key.startswith("iou_")]
        if not self.classes:
            raise InputError(f"{folder}: its cases were not scored: give folders that `evaluating` has written to.")
        self.renamed: dict[str, str] = {}  # cases whose name another fold has, too

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of ``cases.csv``."""
        return [{"case": "", "fold": self.name, **entry["row"], **self._named(entry)} for entry in self.entries]

    @property
    def structures(self) -> list[dict[str, Any]]:
        """The rows of ``structures.csv``."""
        found = [(entry, one) for entry in self.entries for one in entry.get("structures", [])]
        return [{"fold": self.name, **one, **self._named(entry)} for entry, one in found]

    @property
    def pictures(self) -> dict[str, Path]:
        """The picture of each case."""
        files = {entry["case"]: result_file(self.folder, entry["case"], "overlay.png") for entry in self.entries}
        return {self.renamed.get(case, case): file for case, file in files.items()}

    def _named(self, entry: dict[str, Any]) -> dict[str, str]:
        return {"case": self.renamed.get(entry["case"], entry["case"])}


def _check(folds: Sequence[_Fold]) -> None:
    """Refuse folds that do not go together; give those, and cases, of one name names of their own."""
    first = folds[0]
    where: dict[str, str | Path] = {}
    for fold in folds:
        if fold.classes != first.classes:
            raise InputError(
                f"{fold.folder}: has the classes {', '.join(fold.classes)}, but {first.folder} has "
                f"{', '.join(first.classes)}: give folds of one data set."
            )
        for entry in fold.entries:
            other = where.setdefault(str(entry["row"].get("source")), fold.folder)
            if other != fold.folder:
                raise InputError(
                    f"{fold.folder}: has the case {entry['row'].get('source')}, as {other} has, but each is in one "
                    "fold: evaluate a fold with num_folds, fold and seed of its training."
                )
    if len({fold.name for fold in folds}) < len(folds):
        for fold in folds:
            fold.name = str(fold.folder)
    counts = Counter(entry["case"] for fold in folds for entry in fold.entries)
    for number, fold in enumerate(folds):
        fold.renamed = {case: f"fold{number}_{case}" for entry in fold.entries if counts[case := entry["case"]] > 1}


def _write(folds: Sequence[_Fold], output: Path) -> Path:
    names = folds[0].classes
    rows = {fold.name: fold.rows for fold in folds}
    everyone = [row for some in rows.values() for row in some]
    structures = [row for fold in folds for row in fold.structures]
    table = _table(folds)
    write_atomically(output / "cases.csv", csv_bytes(everyone, dict.fromkeys(key for row in everyone for key in row)))
    write_atomically(output / "structures.csv", csv_bytes(structures, ["case", "fold", *COLUMNS]))
    filled = [{key: "" if value != value else value for key, value in line.items()} for line in table]  # without NaN
    write_atomically(output / "folds.csv", csv_bytes(filled, table[0]))
    report = write_report(
        everyone,
        output,
        names,
        structures=structures,
        chose_weights=True,
        tolerance=None,
        title=f"Cross-validation of {len(folds)} folds",
        folds=rows,
        pictures={case: file for fold in folds for case, file in fold.pictures.items()},
    )
    lines = [[name, *(f"{line[f'mean_dice_{name}']:.3f}" for line in table[-2:])] for name in names]
    print(*aligned([["class", f"mean Dice of {len(folds)} folds", "standard deviation"], *lines]), sep="\n")
    print(*summary_lines(everyone, names, report=report, chose_weights=True), sep="\n")
    return report


def _table(folds: Sequence[_Fold]) -> list[dict[str, Any]]:
    """Scores of each fold, then mean and standard deviation of each score over the folds."""
    table: list[dict[str, Any]] = []
    for fold in folds:
        line: dict[str, Any] = {"fold": fold.name, "cases": len(fold.entries)}
        for s in class_scores(fold.rows, fold.classes):
            line |= {
                f"mean_dice_{s.name}": s.mean, f"median_dice_{s.name}": s.median, f"share_failed_{s.name}": s.below,
                f"median_hd95_{s.name}": s.hd95, f"mean_nsd_{s.name}": s.nsd, f"mean_ece_band_{s.name}": s.ece_band,
            }  # fmt: skip
        table.append(line)
    columns = dict.fromkeys(key for line in table for key in line if key not in ("fold", "cases"))
    spread = {column: over_folds([line.get(column, math.nan) for line in table]) for column in columns}
    for i, word in enumerate(("mean", "standard deviation")):
        table.append({"fold": word, "cases": "", **{column: values[i] for column, values in spread.items()}})
    return [{key: round(v, 6) if isinstance(v, float) else v for key, v in line.items()} for line in table]
