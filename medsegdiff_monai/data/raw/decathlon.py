"""Any task of the Medical Segmentation Decathlon, or a data set in its layout."""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

from monai.data.utils import to_affine_nd

from ...errors import InputError
from ..entries import SPLITS, DataList, Entry, first_file, read_data_list
from ..names import case_names
from ..reading import IMAGE_SUFFIXES, load_image
from ..rules import read_case
from .layout import Case, CaseFiles, Layout

__all__ = ["find"]


def find(source: Path) -> Layout:
    """Read ``dataset.json``, in the folder given or one below it (the archives unpack to ``Task04_Hippocampus/``).

    Quirks: ``test`` lists images alone, as strings; they stay in ``test``. Without ``validation``, one is drawn by the
    seed. Files beginning with ``._`` are macOS's and never listed. Of cases with ``labels``, one
    file for each rater, all are kept. Keys other than image, label, labels and the group are dropped.

    Args:
        source: folder of the task.

    Returns:
        The data set.

    Raises:
        InputError: where ``dataset.json`` is missing, or lists what is no case.
    """
    found = [source / "dataset.json", *sorted(source.glob("*/dataset.json"))]
    files = [path for path in found if path.is_file()]
    if not files:
        raise InputError(f"{source}: holds no dataset.json: give the folder of one task.")
    if len(files) > 1 and files[0].parent != source:
        raise InputError(f"{source}: holds {len(files)} tasks: give the folder of one.")
    data = read_data_list(files[0].parent)
    if data.faults:
        raise InputError("\n  ".join(data.faults))
    cases = _cases(data)
    if not cases:
        raise InputError(f"{files[0]}: lists no case: add some.")
    modality = data.content.get("modality", data.content.get("channel_names"))
    return Layout(
        f"Decathlon task {str(data.content.get('name') or files[0].parent.name)[:100]}, {len(cases)} cases",
        cases,
        _named_values(data),
        modality if _is_table(modality) else {"0": "image"},
        regions=_regions(data),
        ignore_label=data.ignore_label,
    )


def _is_table(table: Any) -> TypeGuard[dict[str, str]]:
    """Whether this is a table from numbers to names."""
    return isinstance(table, dict) and all(re.fullmatch(r"\d{1,5}", k) and isinstance(v, str) for k, v in table.items())


def _named_values(data: DataList) -> dict[str, str] | None:
    """The name of each label value; None where the list has no names, or one value has several."""
    named = [(value, name) for name, values in (data.labels or {}).items() for value in values]
    table = {str(value): name for value, name in sorted(named)}
    return table if table and len(table) == len(named) else None


def _regions(data: DataList) -> dict[str, list[int]] | None:
    """The regions that the list declares; labels that share values, as nnU-Net's may, are regions as well."""
    if data.regions is not None or data.labels is None or _named_values(data) is not None:
        return data.regions
    return {name: [v for v in values if v] for name, values in data.labels.items() if any(values)}


def _cases(data: DataList) -> list[Case]:
    official = any(entry.split == "validation" for entry in data.entries)
    listed = Counter(str(entry.image) for entry in data.entries)
    twice = next((entry for entry in data.entries if listed[str(entry.image)] > 1), None)
    if twice is not None:
        raise InputError(f"{data.file}: lists {first_file(twice.image)} more than once: list each image once.")
    names = case_names([entry.image for entry in data.entries])
    return [_case(name, entry, official) for name, entry in zip(names, data.entries)]


def _case(name: str, entry: Entry, official: bool) -> Case:
    split = None if entry.split == SPLITS[0] and not official else entry.split
    images = [entry.image] if isinstance(entry.image, str) else entry.image
    return Case(
        name,
        entry.group or name,
        [Path(file) for file in (*images, *entry.labels)],
        partial(_convert, name=name, entry=entry),
        split or (None if entry.labels else "unlabelled"),
        f"{len(entry.raters)} raters" if entry.raters else "",
    )


def _suffix(path: Path) -> str:
    return next(
        (s for s in sorted(IMAGE_SUFFIXES, key=len, reverse=True) if path.name.lower().endswith(s)), path.suffix
    )


def _convert(files: CaseFiles, name: str, entry: Entry) -> list[dict[str, Any]]:
    """Copy a case, after reading it whole."""
    case = read_case(entry.item())
    if case.faults:
        raise InputError("\n  ".join(case.faults))

    def copy(file: str, folder: str, ending: str = "") -> str:
        path, stem = Path(file), f"{folder}/{name}{ending}"
        if path.is_dir() or path.suffix.lower() == ".mhd":  # more than one file
            volume = load_image(path)
            return files.nifti(volume.numpy(), to_affine_nd(3, volume.affine).numpy(), f"{stem}.nii.gz")
        return files.copy(path, f"{stem}{_suffix(path)}")

    item: dict[str, Any] = {}
    if isinstance(entry.image, str):
        item["image"] = copy(entry.image, "images")
    else:
        item["image"] = [copy(file, "images", f"_{i}") for i, file in enumerate(entry.image)]
    if entry.label is not None:
        item["label"] = copy(entry.label, "labels")
    if entry.raters:
        item["labels"] = [copy(file, f"labels_{i}") for i, file in enumerate(entry.raters, 1)]
    for label in case.labels.values():
        files.note_values(label.numpy())
    return [item]
