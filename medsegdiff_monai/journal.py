"""Which case was made from what, under which settings: ``cases.jsonl``, and ``cases.csv``, the table for people."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib

from .files import append, write_atomically
from .outputs import output_files, result_file

__all__ = ["JOURNAL", "CaseJournal", "JournalPart", "csv_bytes", "file_stamps", "is_whole"]

logger = logging.getLogger(__name__)

JOURNAL = "cases.jsonl"
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what spreadsheets take for the beginning of one


def file_stamps(image: str | Sequence[str]) -> list[list[Any]]:
    """Name, size and time of the files of an image, those in a DICOM folder included; nothing of what is not there."""
    paths = [Path(image)] if isinstance(image, str) else [Path(file) for file in image]
    files = [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    stats = [(file.name, file.stat()) for file in files if file.exists()]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def is_whole(path: Path) -> bool:
    """Whether a result, NIfTI or PNG, is there to its last byte."""
    try:
        if path.suffix == ".png":
            return path.read_bytes().endswith(b"IEND\xaeB`\x82")
        image: Any = nib.load(path)
        size = image.dataobj.offset + math.prod(image.shape) * image.get_data_dtype().itemsize
        with path.open("rb") as file:
            file.seek(-4, os.SEEK_END)
            if int.from_bytes(file.read(), "little") == size % 2**32:  # what gzip writes last
                return True
        with gzip.open(path) as content:  # written by another program, after someone has corrected the mask
            while content.read(2**24):
                pass
        return True
    except Exception:  # readers of damaged files raise whatever they like
        return False


class CaseJournal:
    """What an output folder holds of each case: where from, made under which settings, and its row of the table.

    ``cases.jsonl`` has a line for each case as it was finished, the last one counts. ``cases.csv`` is written from it
    and never read, so that a spreadsheet can do what it likes to it: a table that was changed is set aside.

    Of several processes, the others keep their cases in ``cases.part<n>.jsonl`` until the first one takes them over.

    Args:
        output_dir: folder of the results.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.file = Path(output_dir) / JOURNAL
        self.table = Path(output_dir) / "cases.csv"
        self._whole = False  # whether both files hold what this object does
        self._take(self._read())

    @property
    def _parts(self) -> list[Path]:
        return sorted(self.file.parent.glob("cases.part*.jsonl"))

    def _read(self) -> list[dict[str, Any]]:
        return [line for file in (self.file, *self._parts) for line in _read_lines(file)]

    def _take(self, lines: list[dict[str, Any]]) -> None:
        self._lines = lines
        self.entries = {line["case"]: line for line in lines}  # what was written last of each case
        self._columns = dict.fromkeys(key for line in lines for key in line["row"])

    def open(self, merge: bool) -> None:
        """Begin to write: set a table aside that someone has changed.

        Args:
            merge: whether the cases of earlier runs are kept.
        """
        if self.table.is_file():
            content = self.table.read_bytes()
            own = _read_lines(self.file)
            # the last line is in the table or not yet, where a run was killed in between
            if not any(_table(lines).startswith(content) for lines in (own, own[:-1])):
                self._set_aside()
        self._take(self._lines if merge else [])
        if self._parts or (self._lines and not self.table.is_file()):
            self._write_all()

    def _set_aside(self) -> None:
        number = 1
        while (aside := self.table.with_name(f"cases_edited{number if number > 1 else ''}.csv")).exists():
            number += 1
        os.replace(self.table, aside)
        logger.warning(f"{self.table}: was changed by another program: it is kept as {aside.name}, and written again.")

    def begin(self, case: str) -> None:
        """Note that the files of a case are about to be replaced: until :meth:`add`, it counts as unfinished."""
        entry = self.entries.get(case)
        if entry is not None and entry.get("settings") is not None:
            self._add({**entry, "settings": None})

    def add(
        self,
        case: str,
        row: Mapping[str, Any],
        files: Sequence[str],
        made_from: Mapping[str, Any] | None = None,
        structures: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Note that a case is finished.

        Args:
            case: its name.
            row: its row of the table.
            files: names of its files, without the case's in front.
            made_from: ``image``, ``stamps`` and ``settings``, which :meth:`why_not_finished` compares.
            structures: its rows of ``structures.csv``.

        Raises:
            InputError: where a file cannot be written.
        """
        line = {"settings": None, **(made_from or {}), "case": case, "files": list(files), "row": dict(row)}
        line["structures"] = list(structures)
        self._add(json.loads(json.dumps(line)))

    def _add(self, line: dict[str, Any]) -> None:
        earlier = self.entries.get(line["case"])
        fits = earlier is None and line["row"].keys() <= self._columns.keys()
        self._lines.append(line)
        self.entries[line["case"]] = line
        self._columns.update(dict.fromkeys(line["row"]))
        if not self._whole:
            self.write()
            return
        append(self.file, _json_line(line))
        if fits:
            append(self.table, _rows([line["row"]], self._columns))
        elif earlier is None or earlier["row"] != line["row"]:
            write_atomically(self.table, _table(self._lines))

    def write(self) -> None:
        """Write both files anew.

        Raises:
            InputError: where one cannot be written.
        """
        write_atomically(self.file, b"".join(map(_json_line, self._lines)))
        write_atomically(self.table, _table(self._lines))
        self._whole = True

    def take_over(self, cases: Iterable[str]) -> None:
        """Take over what other processes have finished, these cases last and in this order."""
        entries = {line["case"]: line for line in self._read()}
        last = dict.fromkeys(cases)
        self._take([*(line for case, line in entries.items() if case not in last), *(entries[case] for case in last)])
        self._write_all()

    def _write_all(self) -> None:
        """Write both files anew; what other processes have left is in them now."""
        self.write()
        for part in self._parts:
            part.unlink()

    def why_not_finished(
        self, case: str, image: str | Sequence[str], settings: Mapping[str, Any], outputs: Sequence[str]
    ) -> str | None:
        """Why a case must be segmented: nothing ("") where it never was, a reason where it was; None where not.

        Args:
            case: its name.
            image: its file or files.
            settings: what the masks depend on.
            outputs: what is asked for; other results may be there.
        """
        entry = self.entries.get(case, {})
        made = entry.get("settings")
        if not isinstance(made, dict):
            return ""
        settings = json.loads(json.dumps(settings))
        changed = [name for name in settings if made.get(name) != settings[name]]
        if changed:
            return f"other settings ({', '.join(changed)})"
        if entry.get("image") != image or entry.get("stamps") != file_stamps(image):
            return "another image"
        files = output_files(self.file.parent, case, outputs)
        # a mask that is a picture too
        files += [result_file(self.file.parent, case, name) for name in entry.get("files", []) if name == "seg.png"]
        missing = [file.name for file in files if not file.is_file()]
        damaged = [file.name for file in files if file.is_file() and not is_whole(file)]
        if damaged:
            return f"a damaged file ({', '.join(damaged)})"
        return f"a missing file ({', '.join(missing)})" if missing else None


def _read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a journal; those that a killed run has left half written are no lines."""
    if not file.is_file():
        return []
    lines = []
    for text in file.read_bytes().decode("utf-8", "replace").splitlines():
        try:
            line = json.loads(text)
            lines += [line] if isinstance(line["case"], str) and isinstance(line["row"], dict) else []
        except (ValueError, KeyError, TypeError):
            continue
    return lines


def _json_line(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line).encode() + b"\n"


def _table(lines: Sequence[Mapping[str, Any]]) -> bytes:
    """The table as CSV: a row for each case, with the columns of all rows there ever were."""
    rows = {line["case"]: line["row"] for line in lines}
    columns = dict.fromkeys(key for line in lines for key in line["row"])
    return csv_bytes(list(rows.values()), columns) if rows else b""


class JournalPart(CaseJournal):
    """The journal of another process than the first: no table, and no line of earlier runs.

    Args:
        output_dir: folder of the results.
        rank: number of the process.
    """

    def __init__(self, output_dir: str | Path, rank: int) -> None:
        super().__init__(output_dir)
        self.file = self.file.with_name(f"cases.part{rank}.jsonl")

    def open(self, merge: bool) -> None:
        """Begin to write; the first process has taken over what was there."""
        self._take(self._lines if merge else [])

    def _add(self, line: dict[str, Any]) -> None:
        self.entries[line["case"]] = line
        append(self.file, _json_line(line))


def csv_bytes(rows: Sequence[Mapping[str, Any]], columns: Iterable[str]) -> bytes:
    """A table as CSV, with a line for the names of its columns and no cell that a spreadsheet would compute."""
    columns = list(columns)
    return _rows([{key: key for key in columns}, *rows], columns)


def _rows(rows: Sequence[Mapping[str, Any]], columns: Iterable[str]) -> bytes:
    text = io.StringIO()
    table = csv.DictWriter(text, list(columns), restval="")
    table.writerows({key: _harmless(value) for key, value in row.items()} for row in rows)
    return text.getvalue().encode("utf-8", "backslashreplace")


def _harmless(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
