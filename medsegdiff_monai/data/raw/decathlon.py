"""Any task of the Medical Segmentation Decathlon, or a data set in its layout."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

from ...errors import InputError
from ..checks import rater_files
from ..datalist import case_names
from ..reading import IMAGE_SUFFIXES, inside, load_image, read_json
from .layout import Case, CaseFiles, Layout, check_label_values, same_size

__all__ = ["find"]

GROUPS = ("patient", "cluster")


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
        InputError: where ``dataset.json`` is missing, no such list, or names files outside the folder.
    """
    found = [source / "dataset.json", *sorted(source.glob("*/dataset.json"))]
    files = [path for path in found if path.is_file()]
    if not files:
        raise InputError(f"{source}: holds no dataset.json: give the folder of one task.")
    if len(files) > 1 and files[0].parent != source:
        raise InputError(f"{source}: holds {len(files)} tasks: give the folder of one.")
    content = read_json(files[0])
    if not isinstance(content, dict) or not isinstance(content.get("training"), list):
        raise InputError(f"{files[0]}: must hold an object with the list 'training'.")
    labels, modality = content.get("labels"), content.get("modality", content.get("channel_names"))
    cases = _cases(content, files[0])
    if not cases:
        raise InputError(f"{files[0]}: lists no case: add some.")
    return Layout(
        f"Decathlon task {str(content.get('name') or files[0].parent.name)[:100]}, {len(cases)} cases",
        cases,
        labels if _names(labels) else None,
        modality if _names(modality) else {"0": "image"},
    )


def _names(table: Any) -> TypeGuard[dict[str, str]]:
    """Whether this is a table from numbers to names."""
    return isinstance(table, dict) and all(re.fullmatch(r"\d{1,5}", k) and isinstance(v, str) for k, v in table.items())


def _cases(content: Mapping[str, Any], file: Path) -> list[Case]:
    official = bool(content.get("validation"))
    entries: list[tuple[str | None, Path, Path | None, list[Path], str | None]] = []
    for split in ("training", "validation", "test"):
        listed = content.get(split) or []
        if not isinstance(listed, list):
            raise InputError(f"{file}: {split!r} must be a list of cases, not {type(listed).__name__}.")
        for entry in listed:
            drawn = None if split == "training" and not official else split
            entries.append((drawn, *_entry(entry, file)))
    names = case_names([str(image) for _, image, *_ in entries])
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    if twice:
        raise InputError(f"{file}: lists {sorted(twice)[0]} more than once: list each image once.")
    return [
        Case(
            name,
            group or name,
            [image, *([] if label is None else [label]), *raters],
            partial(_convert, name=name, image=image, label=label, raters=raters),
            split or (None if label is not None or raters else "unlabelled"),
            f"{len(raters)} raters" if raters else "",
        )
        for name, (split, image, label, raters, group) in zip(names, entries)
    ]


def _entry(entry: Any, file: Path) -> tuple[Path, Path | None, list[Path], str | None]:
    entry = {"image": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict) or "image" not in entry:
        raise InputError(f"{file}: the entry {str(entry)[:100]!r} needs the key 'image'.")
    image = inside(file.parent, entry["image"])
    label = inside(file.parent, entry["label"]) if "label" in entry else None
    raters = [inside(file.parent, name) for name in rater_files(entry, f"{file}: the entry of {image.name}")]
    group = next((str(entry[key])[:100] for key in GROUPS if key in entry), None)
    return image, label, raters, group


def _suffix(path: Path) -> str:
    return next(
        (s for s in sorted(IMAGE_SUFFIXES, key=len, reverse=True) if path.name.lower().endswith(s)), path.suffix
    )


def _convert(
    files: CaseFiles, name: str, image: Path, label: Path | None, raters: Sequence[Path]
) -> list[dict[str, Any]]:
    """Copy a case, after reading it whole."""
    size = load_image(image).shape[1:]
    item: dict[str, Any] = {"image": files.copy(image, f"images/{name}{_suffix(image)}")}

    def copy_label(path: Path, folder: str) -> str:
        mask = load_image(path)
        same_size(path, mask.shape[1:], image, size)
        check_label_values(mask.numpy(), path)
        files.note_values(mask.numpy())
        return files.copy(path, f"{folder}/{name}{_suffix(path)}")

    if label is not None:
        item["label"] = copy_label(label, "labels")
    if raters:
        item["labels"] = [copy_label(path, f"labels_{i}") for i, path in enumerate(raters, 1)]
    return [item]
