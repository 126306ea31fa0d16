"""Report on a data set: every fault at once, a fingerprint, and the config variables that fit."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from monai.data import MetaTensor
from tqdm import tqdm

from ..errors import InputError
from ..files import write_atomically
from ..settings import as_bool
from .checks import SHOWN, rater_files, same_affine
from .fingerprint import CaseFacts, fingerprint, measure, propose
from .reading import inside, load_image, read_json

__all__ = ["Report", "check", "inspect_dataset"]

SPLITS = ("training", "validation", "test")
MAX_LABELS = 256  # more values than this are no label map
PROPERTY = {"dims": "spatial axes", "channels": "channels"}


@dataclass
class Report:
    """What a check found.

    Args:
        errors: faults that a training would stumble over, or that make its scores worthless.
        warnings: what deserves a look.
        fingerprint: sizes, spacing, intensities, class volumes and raters; empty where no case is readable.
        overlay: config variables that fit the data set.
    """

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    fingerprint: dict[str, Any] = field(default_factory=dict)
    overlay: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """One case of the data list."""

    split: str
    images: tuple[Path, ...]
    label: Path | None
    group: str | None
    raters: tuple[Path, ...] = ()


def check(dataset: str, write: str | None = None, strict: bool | str = False) -> None:
    """Check a data set in Decathlon layout, print all faults and a fingerprint, and propose the config variables.

    Args:
        dataset: folder that holds ``dataset.json``.
        write: file to write the proposed variables to, as an overlay of ``train.json``; the fingerprint goes beside it,
            as ``<name>.fingerprint.json``. Nothing is written where there are errors.
        strict: whether warnings count as errors.

    Raises:
        InputError: after the report, if there are errors.
    """
    report = inspect_dataset(dataset)
    if as_bool(strict):
        report.errors, report.warnings = report.errors + report.warnings, []
    for kind, lines in (("error", report.errors), ("warning", report.warnings)):
        for line in lines:
            print(f"{kind}: {line}")
    if report.fingerprint:
        print("fingerprint:", json.dumps(report.fingerprint, indent=1))
        print("proposed variables:", json.dumps(report.overlay, indent=1))
    print(f"{dataset}: {len(report.errors)} errors, {len(report.warnings)} warnings")
    if report.errors:
        raise InputError(f"{dataset}: {len(report.errors)} errors, listed above: correct them.")
    if write is not None:
        file = Path(write)
        write_atomically(file, (json.dumps(report.overlay, indent=4) + "\n").encode())
        facts = file.with_name(f"{file.stem}.fingerprint.json")
        write_atomically(facts, (json.dumps(report.fingerprint, indent=1) + "\n").encode())
        print(f"Written: {file} and {facts}")
        print(f"Next:    python -m monai.bundle run training --config_file \"['bundle/configs/train.json','{file}']\"")


def inspect_dataset(dataset: str | Path) -> Report:
    """Read every file of a data set in Decathlon layout and report on it.

    Args:
        dataset: folder that holds ``dataset.json``.

    Returns:
        The report.

    Raises:
        InputError: where ``dataset.json`` is missing or no list of cases.
    """
    folder = Path(dataset)
    if not folder.is_dir():
        raise InputError(f"dataset={str(dataset)!r} is no folder: give the folder that holds dataset.json.")
    file = folder / "dataset.json"
    if not file.is_file():
        raise InputError(f"{file}: no such file: `prepare` writes one, from raw data of any kind.")
    content = read_json(file)
    if not isinstance(content, dict) or not isinstance(content.get("training"), list):
        raise InputError(f"{file}: must hold an object with the list 'training'.")
    report = Report()
    entries = _entries(content, file, report)
    _check_paths(entries, report)
    facts = _measure_all(entries, report)
    if not facts:
        report.errors.append(f"{file}: no case can be read.")
        return report
    usual = _check_alike(facts, report)
    regions = _regions(content, facts, file, report)
    _check_content(facts, report)
    alike = [case for case in facts if (case.dims, case.channels) == usual]
    report.fingerprint = fingerprint(alike)
    report.overlay = propose(report.fingerprint, regions, folder)
    return report


def _entries(content: Mapping[str, Any], file: Path, report: Report) -> list[Entry]:
    """The cases of a data list; what is no case becomes an error."""
    entries = []
    for split in SPLITS:
        listed = content.get(split) or []
        if not isinstance(listed, list):
            report.errors.append(f"{file}: {split!r} must be a list of cases, not {type(listed).__name__}.")
            continue
        for i, entry in enumerate(listed):
            try:
                entries.append(_entry(entry, split, file))
            except InputError as error:
                report.errors.append(f"{split}[{i}]: {error}")
            else:
                if split != "test" and entries[-1].label is None and not entries[-1].raters:
                    report.errors.append(
                        f"{entries[-1].images[0]}: has no label in {split}: add it, or take the case out."
                    )
    return entries


def _entry(entry: Any, split: str, file: Path) -> Entry:
    entry = {"image": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict) or not entry.get("image"):
        raise InputError(f"{file}: the entry {str(entry)[:100]!r} needs the key 'image'.")
    images = entry["image"] if isinstance(entry["image"], list) else [entry["image"]]
    label = inside(file.parent, entry["label"]) if "label" in entry else None
    raters = tuple(inside(file.parent, name) for name in rater_files(entry, str(file)))
    group = entry.get("patient", entry.get("cluster"))
    files = tuple(inside(file.parent, i) for i in images)
    return Entry(split, files, label, None if group is None else str(group)[:100], raters)


def _across(report: Report, places: Mapping[Any, Sequence[tuple[str, str]]], what: str, leak_is_error: bool) -> None:
    """Report cases, given as (split, name), that share something; training with another split is a leak."""
    for shared in places.values():
        splits = sorted({split for split, _ in shared})
        names = ", ".join(f"{name} ({split})" for split, name in shared[:4])
        if len(splits) > 1:
            leak = "training" in splits and leak_is_error
            (report.errors if leak else report.warnings).append(
                f"{names}: {what}: scores would mislead; keep one of them."
            )
        elif len(shared) > 1 and leak_is_error:
            report.warnings.append(f"{names}: {what}: keep one of them.")


def _check_paths(entries: Sequence[Entry], report: Report) -> None:
    by_path: dict[Any, list[tuple[str, str]]] = defaultdict(list)
    by_group: dict[str, set[str]] = defaultdict(set)
    for entry in entries:
        by_path[entry.images].append((entry.split, entry.images[0].name))
        if entry.group is not None:
            by_group[entry.group].add(entry.split)
    _across(report, by_path, "the same file is listed more than once", leak_is_error=True)
    shared = sorted(group for group, splits in by_group.items() if "training" in splits and len(splits) > 1)
    if shared:
        report.warnings.append(
            f"{len(shared)} patients or clusters are in training and in another split ({', '.join(shared[:3])} ...): "
            "scores would mislead; divide by patient."
        )


def _measure_all(entries: Sequence[Entry], report: Report) -> list[CaseFacts]:
    def attempt(entry: Entry) -> tuple[CaseFacts | None, list[str]]:
        faults: list[str] = []
        return _read_case(entry, faults), faults

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(tqdm(pool.map(attempt, entries), total=len(entries), desc="Check", disable=len(entries) < 20))
    report.errors += [fault for _, faults in done for fault in faults]
    return [facts for facts, _ in done if facts is not None]


def _load(path: Path | Sequence[str], faults: list[str]) -> MetaTensor | None:
    try:
        return load_image(path)
    except InputError as error:
        faults.append(str(error))
        return None


def _read_case(entry: Entry, faults: list[str]) -> CaseFacts | None:
    """Measure a case; what is wrong with it goes to ``faults``, and None is returned where it cannot be measured."""
    before = len(faults)
    image = _load([str(path) for path in entry.images], faults)
    paths = [*([] if entry.label is None else [entry.label]), *entry.raters]
    maps = {path: _load(path, faults) for path in paths}
    if image is None or len(faults) > before:
        return None
    loaded = {path: one for path, one in maps.items() if one is not None}
    faults += _image_faults(image, entry.images[0])
    for path, one in loaded.items():
        faults += _label_faults(one, path, image)
    if len(faults) > before:
        return None
    digest = hashlib.blake2b(np.ascontiguousarray(image.numpy()).tobytes() + str(tuple(image.shape)).encode())
    return measure(
        image,
        None if entry.label is None else loaded[entry.label],
        str(entry.images[0]),
        str(entry.label or ""),
        entry.split,
        digest.hexdigest(),
        {str(path): loaded[path] for path in entry.raters},
    )


def _image_faults(image: MetaTensor, path: Path) -> list[str]:
    faults = []
    dims = image.ndim - 1
    if dims not in (2, 3):
        faults.append(f"{path}: has {dims} spatial axes: 2 and 3 are supported.")
    bad = int((~torch.isfinite(image.as_tensor())).sum())
    if bad:
        faults.append(f"{path}: {bad} voxels are NaN or infinite: replace them, for instance by 0.")
    affine = image.affine.numpy()
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-12:
        faults.append(f"{path}: its affine has no inverse (determinant 0): write the geometry anew.")
    return faults


def _label_faults(label: MetaTensor, path: Path, image: MetaTensor) -> list[str]:
    faults = []
    if label.shape[0] != 1:
        faults.append(f"{path}: a label map has one channel, this has {label.shape[0]}: save label values, no colours.")
    if label.shape[1:] != image.shape[1:]:
        sizes = f"{list(label.shape[1:])}, image of size {list(image.shape[1:])}"
        faults.append(f"{path}: label of size {sizes}: they must be equal.")
    elif not same_affine(label, image):
        faults.append(f"{path}: its affine differs from the image's: copy the image's geometry to the label.")
    values = torch.unique(label.as_tensor())
    odd = values[~((values >= 0) & (values == values.round()))]  # NaN compares as unequal
    if len(odd):
        faults.append(f"{path}: holds {odd[0]:g}, which is no label: save whole numbers, 0 for the background.")
    if len(values) > MAX_LABELS:
        faults.append(f"{path}: holds {len(values)} values, which is no label map: save label values.")
    return faults


def _check_alike(facts: list[CaseFacts], report: Report) -> tuple[int, int]:
    """Report cases whose axes or channels differ from most; return the usual numbers."""
    usual = Counter((case.dims, case.channels) for case in facts).most_common(1)[0][0]
    for case in facts:
        for name, mine, most in zip(PROPERTY.values(), (case.dims, case.channels), usual):
            if mine != most:
                report.errors.append(f"{case.name}: has {mine} {name}, most have {most}: correct the file.")
    return usual


def _check_content(facts: Sequence[CaseFacts], report: Report) -> None:
    empty = [next(iter(case.files)) for case in facts if case.voxels is not None and not case.voxels]
    if empty:
        more = " ..." if len(empty) > SHOWN else ""
        report.warnings.append(
            f"{len(empty)} masks are empty, make sure that it is meant: {', '.join(empty[:SHOWN])}{more}"
        )
    compared = [case for case in facts if case.agreement is not None and any(case.raters.values())]
    if compared and all(case.agreement == 1 for case in compared):
        report.warnings.append(
            f"the raters of all {len(compared)} cases that they marked agree in every voxel: make sure that their "
            "files are no copies."
        )
    by_content: dict[str, list[tuple[str, str]]] = defaultdict(list)
    paths: dict[str, set[str]] = defaultdict(set)
    for case in facts:
        by_content[case.digest].append((case.split, Path(case.name).name))
        paths[case.digest].add(case.name)
    copies = {digest: shared for digest, shared in by_content.items() if len(paths[digest]) > 1}
    _across(report, copies, "their images have the same content", leak_is_error=True)


def _declared(content: Mapping[str, Any]) -> dict[str, list[int]] | None:
    """Names and values of the declared labels, from ``{"1": "name"}`` or nnU-Net's ``{"name": 1}``."""
    labels = content.get("labels")
    if not isinstance(labels, dict) or not labels:
        return None
    named: dict[str, list[int]] = {}
    for key, value in labels.items():
        number, name = (key, value) if re.fullmatch(r"\d{1,5}", key) else (value, key)
        numbers = number if isinstance(number, list) else [number]
        if not all(re.fullmatch(r"\d{1,5}", str(n)) for n in numbers):
            return None
        named[str(name)] = [int(n) for n in numbers]
    return named


def _identifiers(regions: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Names that are safe in a config, where ``$``, ``@``, ``#`` and ``_target_`` have a meaning, and unique."""
    result: dict[str, list[int]] = {}
    for name, values in regions.items():
        plain = re.sub(r"\W+", "_", name, flags=re.A).strip("_")[:40] or "class"
        result[plain if plain not in result else f"{plain}_{len(result) + 1}"] = list(values)
    return result


def _regions(content: Mapping[str, Any], facts: list[CaseFacts], file: Path, report: Report) -> dict[str, list[int]]:
    """The mask channels to propose; label values outside the declared ones are errors."""
    found = sorted({value for case in facts for voxels in case.files.values() for value in voxels})
    declared = _declared(content)
    if declared is None:
        report.warnings.append(f"{file}: declares no labels; the masks hold {[0, *found]}.")
        declared = {f"class_{value}": [value] for value in found}
    allowed = {value for values in declared.values() for value in values} | {0}
    names = {name: [v for v in values if v] for name, values in declared.items() if any(values)}
    if found == [255] and 255 not in allowed:
        name = next(iter(names)) if len(names) == 1 else "foreground"
        report.warnings.append(f"{file}: the masks hold 0 and 255; the overlay maps 255 to {name!r}.")
        return _identifiers({name: [255]})
    for mask, voxels in [each for case in facts for each in case.files.items()]:
        outside = sorted(set(voxels) - allowed)
        if outside:
            report.errors.append(
                f"{mask}: holds the values {outside[:5]}, declared are {sorted(allowed)}: correct the file, "
                f"or 'labels' in {file.name}."
            )
    for name, values in names.items():
        if not set(values) & set(found):
            report.warnings.append(f"{file}: no mask holds {name!r} ({values}).")
    wanted = content.get("regions")
    if _usable(wanted, allowed):
        return _identifiers(wanted)
    return _identifiers(names or {"foreground": [1]})


def _usable(regions: Any, allowed: set[int]) -> TypeGuard[dict[str, list[int]]]:
    """Whether the regions that a data list asks for can be used."""
    return (
        isinstance(regions, dict)
        and bool(regions)
        and all(
            isinstance(v, list) and v and all(type(n) is int and n in allowed - {0} for n in v)
            for v in regions.values()
        )
    )
