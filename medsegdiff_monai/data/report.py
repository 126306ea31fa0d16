"""Report on a data set: every fault at once, a fingerprint, and the config variables that fit."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import MetaTensor
from tqdm import tqdm

from ..errors import InputError
from ..files import write_atomically, writing
from ..settings import as_bool, find_bundle_root
from .entries import DataList, Entry, first_file, read_data_list
from .fingerprint import CaseFacts, fingerprint, measure, propose
from .rules import SHOWN, no_label, read_case

__all__ = ["Report", "check", "inspect_dataset"]

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


def check(dataset: str, write: str | None = None, strict: bool | str = False, advises: bool = True) -> None:
    """Check a data set in Decathlon layout, print all faults and a fingerprint, and propose the config variables.

    Args:
        dataset: folder that holds ``dataset.json``.
        write: file to write the proposed variables to, as an overlay of ``train.json``; the fingerprint goes beside it,
            as ``<name>.fingerprint.json``. Nothing is written where there are errors.
        strict: whether warnings count as errors.
        advises: whether to print the command that trains with the overlay.

    Raises:
        InputError: after the report, if there are errors.
    """
    target = None if write is None else _overlay_file(write)
    report = inspect_dataset(dataset)
    if as_bool(strict):
        report.errors, report.warnings = report.errors + report.warnings, []
    for kind, lines in (("error", report.errors), ("warning", report.warnings)):
        for line in lines:
            print(f"{kind}: {line}")
    if report.fingerprint:
        print("fingerprint:", json.dumps(report.fingerprint, indent=1))
        print("suggested settings:", json.dumps(report.overlay, indent=1))
    print(f"{dataset}: {len(report.errors)} errors, {len(report.warnings)} warnings")
    if report.errors:
        raise InputError(f"{dataset}: {len(report.errors)} errors, listed above: correct them.")
    if target is not None:
        _write(report, target)
        if advises:
            print(f"Next:    {_next_step(target)}")


def _overlay_file(write: str) -> Path:
    """The file to write the overlay to: of JSON, if it has an ending."""
    file = Path(write)
    if file.is_dir():
        raise InputError(f"write={write!r} is a folder: give a file, such as {file / 'overlay.json'}.")
    if file.suffix.lower() not in ("", ".json"):
        raise InputError(f"write={write!r} must end in .json: give --write {file.stem or 'overlay'}.json.")
    return file


def _write(report: Report, file: Path) -> None:
    facts = file.with_name(f"{file.stem}.fingerprint.json")
    with writing(file):
        write_atomically(file, (json.dumps(report.overlay, indent=4) + "\n").encode())
        write_atomically(facts, (json.dumps(report.fingerprint, indent=1) + "\n").encode())
    print(f"Written: {file} and {facts}")


def _next_step(overlay: Path) -> str:
    if not overlay.suffix:  # MONAI knows configs by their ending
        return f"rename {overlay} to {overlay}.json, then give it to a training"
    configs = json.dumps([f"{find_bundle_root()}/configs/train.json", str(overlay)])
    return f"python -m monai.bundle run training --config_file {shlex.quote(configs)}"


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
        raise InputError(f"dataset={str(dataset)!r} is not a folder: give the folder that holds dataset.json.")
    data = read_data_list(folder)
    report = Report()
    report.errors += data.faults
    report.errors += [no_label(e.image) for e in data.entries if e.split != "test" and not e.labels]
    report.warnings += [
        f"{data.file}: {name!r} lists {n} cases, which nothing reads: move them to 'training', 'validation' or 'test'."
        for name, n in data.unused.items()
    ]
    if data.unread:
        report.warnings.append(
            f"{data.file}: cases have the key {', '.join(data.unread)}, which nothing reads: they are split by "
            "'patient' or 'cluster', and folds are set by num_folds and fold."
        )
    _check_paths(data.entries, report)
    facts = _measure_all(data, report)
    if not facts:
        report.errors.append(f"{data.file}: no case can be read.")
        return report
    usual = _check_alike(facts, report)
    if data.channel_names and len(data.channel_names) != usual[1]:
        report.warnings.append(
            f"{data.file}: names {len(data.channel_names)} channels ({', '.join(data.channel_names)}), the images have "
            f"{usual[1]}: list all files of a case under 'image', or correct the names."
        )
    regions = _regions(data, facts, report)
    _check_content(facts, report)
    alike = [case for case in facts if (case.dims, case.channels) == usual]
    report.fingerprint = fingerprint(alike)
    report.overlay = propose(report.fingerprint, regions, folder, data.ignore_label)
    return report


def _across(report: Report, places: Mapping[Any, Sequence[tuple[str, str]]], what: str, leak_is_error: bool) -> None:
    """Report cases, given as (split, name), that share something; training with another split is a leak."""
    for shared in places.values():
        splits = sorted({split for split, _ in shared})
        names = ", ".join(f"{name} ({split})" for split, name in shared[:4])
        if len(splits) > 1:
            leak = "training" in splits and leak_is_error
            (report.errors if leak else report.warnings).append(
                f"{names}: {what}: scores would be misleading; keep one of them."
            )
        elif len(shared) > 1 and leak_is_error:
            report.warnings.append(f"{names}: {what}: keep one of them.")


def _check_paths(entries: Sequence[Entry], report: Report) -> None:
    by_path: dict[Any, list[tuple[str, str]]] = defaultdict(list)
    by_label: dict[str, dict[str, str]] = defaultdict(dict)
    by_group: dict[str, set[str]] = defaultdict(set)
    for entry in entries:
        files = [entry.image] if isinstance(entry.image, str) else entry.image
        by_path[tuple(map(os.path.realpath, files))].append((entry.split, Path(files[0]).name))
        for label in entry.labels:
            by_label[os.path.realpath(label)][os.path.realpath(files[0])] = Path(files[0]).name
        if len({*map(os.path.realpath, files)}) < len(files):
            report.warnings.append(f"{files[0]}: is more than one channel of its case: make sure that it is meant.")
        if entry.group is not None:
            by_group[entry.group].add(entry.split)
    _across(report, by_path, "the same file is listed more than once", leak_is_error=True)
    report.warnings += [
        f"{label}: is the label of several images ({', '.join(list(images.values())[:4])}): make sure that it is meant."
        for label, images in by_label.items()
        if len(images) > 1
    ]
    if alone := sum(entry.group is None for entry in entries if by_group):
        report.warnings.append(
            f"{alone} of {len(entries)} cases have no patient or cluster: each counts as one of its own."
        )
    shared = sorted(group for group, splits in by_group.items() if "training" in splits and len(splits) > 1)
    if shared:
        report.warnings.append(
            f"{len(shared)} patients or clusters are in training and in another split ({', '.join(shared[:3])} ...): "
            "scores would be misleading; split by patient."
        )


def _measure_all(data: DataList, report: Report) -> list[CaseFacts]:
    def attempt(entry: Entry, channels: int | None = None) -> tuple[CaseFacts | None, list[str]]:
        case = read_case(entry.item(), channels=channels)
        if case.faults or case.image is None:
            return None, case.faults
        return _facts(entry, case.image, case.labels, data.ignore_label), []

    entries = data.entries
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(tqdm(pool.map(attempt, entries), total=len(entries), desc="Check", disable=len(entries) < 20))
    if {(2, 1), (2, 3)} <= {(facts.dims, facts.channels) for facts, _ in done if facts is not None}:
        # a network of three channels reads grey pictures as colours
        grey = [facts is not None and facts.channels == 1 for facts, _ in done]
        done = [attempt(entry, 3) if again else one for entry, one, again in zip(entries, done, grey)]
    report.errors += [fault for _, faults in done for fault in faults]
    return [facts for facts, _ in done if facts is not None]


def _facts(entry: Entry, image: MetaTensor, labels: dict[str, MetaTensor], ignore_label: int | None) -> CaseFacts:
    content = np.ascontiguousarray(image.numpy()).tobytes() + str(tuple(image.shape)).encode()
    return measure(
        image,
        None if entry.label is None else labels[entry.label],
        first_file(entry.image),
        entry.label or "",
        entry.split,
        hashlib.blake2b(content).hexdigest(),
        {path: labels[path] for path in entry.raters},
        ignore_label,
    )


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
            f"{len(empty)} masks are empty, make sure that is intended: {', '.join(empty[:SHOWN])}{more}"
        )
    drawn = [case for case in facts if case.voxels]
    if drawn and all(sum((case.voxels or {}).values()) >= math.prod(case.size) for case in drawn):
        mask = next(iter(drawn[0].files))
        report.warnings.append(f"no mask, such as {mask}, holds 0, the background: make sure that it is meant.")
    compared = [case for case in facts if case.agreement is not None and any(case.raters.values())]
    if compared and all(case.agreement == 1 for case in compared):
        report.warnings.append(
            f"the raters of all {len(compared)} cases that they marked agree in every voxel: make sure that their "
            "files are not copies."
        )
    by_content: dict[str, list[tuple[str, str]]] = defaultdict(list)
    paths: dict[str, set[str]] = defaultdict(set)
    for case in facts:
        by_content[case.digest].append((case.split, Path(case.name).name))
        paths[case.digest].add(case.name)
    copies = {digest: shared for digest, shared in by_content.items() if len(paths[digest]) > 1}
    _across(report, copies, "their images have the same content", leak_is_error=True)


def _identifiers(regions: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Names that are safe in a config, where ``$``, ``@``, ``#`` and ``_target_`` have a meaning, and unique."""
    result: dict[str, list[int]] = {}
    for name, values in regions.items():
        plain = re.sub(r"\W+", "_", name, flags=re.A).strip("_")[:40] or "class"
        result[plain if plain not in result else f"{plain}_{len(result) + 1}"] = list(values)
    return result


def _check_names(data: DataList, names: Mapping[str, Sequence[int]], report: Report) -> None:
    """Report names of labels but 0 that contradict their use, and ``regions`` that cannot be read."""
    swapped = next((name for name in names if name.casefold() == "background"), None)
    if swapped:
        report.warnings.append(
            f"{data.file}: 'labels' names {names[swapped]} {swapped!r}; the background is 0: correct it."
        )
    if not names and data.ignore_label is not None:
        report.errors.append(
            f"{data.file}: declares no label but 'ignore_label' ({data.ignore_label}): name one in 'labels'."
        )
    labels = {value for values in names.values() for value in values}
    regions = data.regions
    if data.content.get("regions") and (
        regions is None or not labels >= {v for group in regions.values() for v in group}
    ):
        report.warnings.append(
            f"{data.file}: 'regions' is left out: it must hold names with lists of declared labels, "
            f'{sorted(labels)}, such as {{"disc": [1, 2], "cup": [2]}}.'
        )


def _regions(data: DataList, facts: list[CaseFacts], report: Report) -> dict[str, list[int]]:
    """The mask channels to propose; label values outside the declared ones are errors."""
    file = data.file
    found = sorted({value for case in facts for voxels in case.files.values() for value in voxels})
    declared = data.labels
    if declared is None:
        wrong = "has 'labels' that are not a table of names and values"
        what = wrong if data.content.get("labels") else "declares no labels"
        report.warnings.append(f"{file}: {what}; the masks hold {[0, *found]}.")
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
                f"or 'labels' in {file.name}; voxels that nobody has labelled are declared by 'ignore_label'."
            )
    for name, values in names.items():
        if not set(values) & set(found):
            report.warnings.append(f"{file}: no mask holds {name!r} ({values}).")
    _check_names(data, names, report)
    wanted = data.regions
    if wanted is not None and {value for values in wanted.values() for value in values} <= allowed:
        return _identifiers(wanted)
    return _identifiers(names or {"foreground": [1]})
