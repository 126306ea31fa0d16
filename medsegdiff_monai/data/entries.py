"""``dataset.json``, read in this one place."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import InputError
from .reading import read_json

__all__ = ["SPLITS", "DataList", "Entry", "first_file", "read_data_list"]

SPLITS = ("training", "validation", "test")
GROUPS = ("patient", "cluster")
OTHER_GROUPS = ("fold", "group", "patient_id", "subject", "subject_id")  # of other tools, said to be left out
MAX_GROUP = 100  # characters


def first_file(image: str | Sequence[str]) -> str:
    """The file that names a case: the only one, or the first of several that are stacked as channels."""
    return image if isinstance(image, str) else image[0]


@dataclass(frozen=True)
class Entry:
    """One case of a data list; all paths are absolute, links in them are kept.

    Args:
        split: ``training``, ``validation`` or ``test``.
        image: a file, a DICOM folder, or several files that are stacked as channels.
        label: label map; None where there is none.
        raters: label maps of several raters.
        group: patient or cluster, which no split divides.
    """

    split: str
    image: str | list[str]
    label: str | None = None
    raters: tuple[str, ...] = ()
    group: str | None = None

    @property
    def labels(self) -> list[str]:
        """All label maps of the case."""
        return [*([] if self.label is None else [self.label]), *self.raters]

    def item(self) -> dict[str, Any]:
        """The case as transforms take it: ``image``, and ``label``, ``raters`` and ``group`` where it has them."""
        item: dict[str, Any] = {"image": self.image}
        if self.label is not None:
            item["label"] = self.label
        if self.raters:
            item["raters"] = list(self.raters)
        return item if self.group is None else {**item, "group": self.group}


@dataclass(frozen=True)
class DataList:
    """What ``dataset.json`` says.

    Args:
        file: where it is.
        content: all of it.
        entries: the cases, in their order.
        faults: what is wrong with entries that are no cases.
    """

    file: Path
    content: Mapping[str, Any]
    entries: list[Entry]
    faults: list[str]

    @property
    def unused(self) -> dict[str, int]:
        """Other lists of cases, which nothing reads, and how many they hold; not what ``prepare`` lists apart."""
        others = {name: listed for name, listed in self.content.items() if name not in (*SPLITS, "unlabelled")}
        lists = {name: listed for name, listed in others.items() if isinstance(listed, list)}
        return {n: len(one) for n, one in lists.items() if any(isinstance(e, dict) and "image" in e for e in one)}

    @property
    def unread(self) -> list[str]:
        """Keys of cases by which other tools split them."""
        cases = [case for split in SPLITS for case in self.content.get(split) or [] if isinstance(case, dict)]
        return [key for key in OTHER_GROUPS if any(key in case for case in cases)]

    @property
    def channel_names(self) -> list[str]:
        """Names of the channels, as Decathlon or nnU-Net gives them; none where there are not several."""
        named = self.content.get("channel_names") or self.content.get("modality")
        return [str(name) for name in named.values()] if isinstance(named, dict) and len(named) > 1 else []

    def of(self, split: str) -> list[Entry]:
        """The cases of ``training``, ``validation`` or ``test``."""
        return [entry for entry in self.entries if entry.split == split]

    @property
    def labels(self) -> dict[str, list[int]] | None:
        """Names and values of the labels, from ``{"1": "name"}`` or nnU-Net's ``{"name": 1}``; None without any.

        :attr:`ignore_label` is none of them.
        """
        named, ignored = self._declared(), self.ignore_label
        if named is None or ignored is None:
            return named
        return {name: [v for v in values if v != ignored] for name, values in named.items() if values != [ignored]}

    @property
    def ignore_label(self) -> int | None:
        """The value of voxels that nobody has labelled: ``"ignore_label"``, or nnU-Net's label ``"ignore"``.

        Raises:
            InputError: where it is no whole number from 1 to 65535.
        """
        value = self.content.get("ignore_label")
        if value is None:
            named = (self._declared() or {}).get("ignore", [])
            value = named[0] if len(named) == 1 else None
        if value is not None and (type(value) is not int or not 0 < value < 2**16):
            raise InputError(f"{self.file}: 'ignore_label' is {value!r}: give a whole number from 1 to 65535.")
        return value

    @property
    def regions(self) -> dict[str, list[int]] | None:
        """What each mask channel holds, from ``{"disc": [1, 2], "cup": [2]}``; None without any, or other things."""
        regions = self.content.get("regions")
        if not isinstance(regions, dict) or not regions:
            return None
        usable = all(isinstance(v, list) and v and all(type(n) is int and n > 0 for n in v) for v in regions.values())
        return regions if usable else None

    def _declared(self) -> dict[str, list[int]] | None:
        labels = self.content.get("labels")
        if not isinstance(labels, dict) or not labels:
            return None
        named: dict[str, list[int]] = {}
        for key, value in labels.items():
            number, name = (key, value) if re.fullmatch(r"\d{1,5}", key) else (value, key)
            numbers = number if isinstance(number, list) else [number]
            if not all(re.fullmatch(r"\d{1,5}", str(n)) for n in numbers):
                return None
            named[str(name)] = [*named.get(str(name), []), *map(int, numbers)]
        return named


def read_data_list(folder: str | Path) -> DataList:
    """Read the ``dataset.json`` of a folder; what is wrong with single entries is kept for later.

    Paths are taken from the folder, or as they are where they are absolute; they may lead out of it.

    Args:
        folder: folder that holds ``dataset.json``.

    Returns:
        The list.

    Raises:
        InputError: where it is missing, no JSON, or no object with lists of cases.
    """
    file = Path(folder) / "dataset.json"
    if not file.is_file():
        raise InputError(f"{file}: no such file: `prepare` writes one, from raw data of many kinds.")
    content = read_json(file)
    if not isinstance(content, dict):
        raise InputError(f"{file}: must hold an object with the list 'training', not {type(content).__name__}.")
    _check_text(content, file)
    _refuse_nnunet(content, file)
    _refuse_misspelt(content, file)
    entries, faults = [], []
    for split in SPLITS:
        listed = content.get(split) or []
        if not isinstance(listed, list):
            raise InputError(f"{file}: {split!r} must be a list of cases, not {type(listed).__name__}.")
        for i, entry in enumerate(listed):
            try:
                entries.append(_entry(entry, split, file.parent))
            except InputError as error:
                faults.append(f"{file}: {split}[{i}]: {error}")
    return DataList(file, content, entries, faults)


def _refuse_nnunet(content: Mapping[str, Any], file: Path) -> None:
    """Say what to do with a data set of nnU-Net, which lists no cases: they are found by name."""
    if not any(content.get(split) for split in SPLITS) and {"channel_names", "file_ending"} & content.keys():
        raise InputError(
            f"{file}: is nnU-Net's, which lists no cases: run python -m medsegdiff_monai prepare nnunet "
            f"--source {shlex.quote(str(file.parent))} --output DIR, and give DIR."
        )


def _refuse_misspelt(content: Mapping[str, Any], file: Path) -> None:
    """Refuse ``train``, ``Validation``, ``val`` or ``testing`` in place of a list that is missing."""
    for split in [split for split in SPLITS if not content.get(split)]:
        for name, listed in content.items():
            plain = name.casefold()
            near = len(plain) > 1 and (split.startswith(plain) or get_close_matches(plain, SPLITS, 1) == [split])
            if name not in SPLITS and near and isinstance(listed, list) and listed:
                raise InputError(f"{file}: lists {len(listed)} cases under {name!r}: did you mean {split!r}?")


def _check_text(content: Any, file: Path) -> None:
    """Refuse halves of characters, which no file name has and no terminal shows."""
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        around = str(error.object)[max(0, error.start - 20) : error.end + 20]
        raise InputError(f"{file}: {around!a} holds half of a character, a surrogate: correct it.") from error
    except RecursionError as error:
        raise InputError(f"{file}: is nested too deep for a data list: correct it.") from error


def _entry(entry: Any, split: str, folder: Path) -> Entry:
    """Read one case; messages are completed by file and position."""
    entry = {"image": entry} if isinstance(entry, str) else entry  # Decathlon lists test images without labels
    if not isinstance(entry, dict) or "image" not in entry:
        raise InputError(f"{str(entry)[:100]!r} needs the key 'image'.")
    image = entry["image"]
    several = isinstance(image, list) and len(image) > 0
    files = [_path(name, "image", folder) for name in (image if several else [image])]
    label = _path(entry["label"], "label", folder) if "label" in entry else None
    raters = _raters(entry["labels"], folder) if "labels" in entry else ()
    found = Entry(split, files if several else files[0], label, raters, _group(entry))
    if {*map(os.path.realpath, found.labels)} & {*map(os.path.realpath, files)}:
        raise InputError(f"{files[0]}: is listed as its own label: correct the list, or the link.")
    return found


def _path(name: Any, key: str, folder: Path) -> str:
    if not isinstance(name, str) or not name or "\0" in name:
        raise InputError(f"{key!r} is {str(name)[:100]!r}, no file name: correct it.")
    return os.path.abspath(folder / name)


def _raters(files: Any, folder: Path) -> tuple[str, ...]:
    """The files under ``labels``, one label map for each rater of the case."""
    if not (isinstance(files, list) and files and all(isinstance(file, str) and file for file in files)):
        raise InputError(
            f"'labels' is {str(files)[:100]!r}, no list of file names: list one file for each rater, or leave it out."
        )
    paths = [_path(file, "labels", folder) for file in files]
    twice = next((file for file, path in zip(files, paths) if Counter(paths)[path] > 1), None)
    if twice is not None:
        raise InputError(f"'labels' lists {twice[:200]!r} more than once: list each rater's file once.")
    return tuple(paths)


def _group(entry: Mapping[str, Any]) -> str | None:
    key = next((key for key in GROUPS if entry.get(key) is not None), None)
    if key is None:
        return None
    value = entry[key]
    named = isinstance(value, str) and bool(value.strip())
    if not named and (type(value) not in (int, float) or not math.isfinite(value)):
        raise InputError(f"{key!r} is {str(value)[:100]!r}: give a name or a number, or leave it out.")
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)[:MAX_GROUP]
