"""Data lists for training, evaluation and inference, from a Decathlon folder or a plain folder of images."""

from __future__ import annotations

import csv
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..outputs import OUTPUTS, check_outputs, output_files
from ..settings import as_bool
from .checks import SHOWN, DataSpec, check_items, first_file, rater_files, refuse
from .reading import IMAGE_SUFFIXES, files_below, read_json

__all__ = [
    "CaseList",
    "TrainingSplits",
    "case_names",
    "evaluation_items",
    "hold_out",
    "inference_items",
    "is_dicom_file",
    "stem_of",
    "training_splits",
]

HELD_OUT = 0.2


class CaseList(list):
    """A data list that remembers which cases it left out, and why.

    Args:
        items: the good cases.
        faults: what is wrong with the others.
    """

    def __init__(self, items: Sequence[Mapping[str, Any]] = (), faults: Sequence[InputError] = ()) -> None:
        super().__init__(items)
        self.faults = list(faults)

    def report(self) -> None:
        """Fail, at the end of a run, if cases were left out.

        Raises:
            InputError: naming them.
        """
        if self.faults:
            lines = [str(fault) for fault in self.faults]
            more = f"\n  ... and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
            raise InputError(f"{len(lines)} cases were skipped:\n  " + "\n  ".join(lines[:SHOWN]) + more)


def _dataset_folder(dataset_dir: str | Path) -> Path:
    folder = Path(dataset_dir)
    if not str(dataset_dir) or not folder.is_dir():
        raise InputError(f"dataset_dir={str(dataset_dir)!r} is no folder: give --dataset_dir DIR, a folder of images.")
    return folder


def _read_lists(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Read ``dataset.json``; paths become absolute, ``labels`` become ``raters``, keys but these and the group go."""
    file = folder / "dataset.json"
    if not file.is_file():
        raise InputError(f"{file}: no such file: --dataset_dir must hold a Decathlon-style dataset.json.")
    content = read_json(file)
    if not isinstance(content, dict):
        raise InputError(f"{file}: must hold an object with the list 'training'.")
    lists = {}
    for split in ("training", "validation", "test"):
        entries = content.get(split) or []
        if not isinstance(entries, list):
            raise InputError(f"{file}: {split!r} must be a list of cases, not {type(entries).__name__}.")
        lists[split] = [_entry(entry, split, i, file) for i, entry in enumerate(entries)]
    return lists


def _entry(entry: Any, split: str, index: int, file: Path) -> dict[str, Any]:
    if isinstance(entry, str):  # Decathlon lists test images without labels
        entry = {"image": entry}
    if not isinstance(entry, dict) or "image" not in entry:
        raise InputError(f"{file}: {split}[{index}] = {entry!r} needs the key 'image'.")
    for key in ("image", "label"):
        value = entry.get(key, "")
        if not isinstance(value, str) and not (
            value and isinstance(value, list) and all(isinstance(v, str) for v in value)
        ):
            raise InputError(f"{file}: {split}[{index}]: {key!r} is {value!r}, no file name: correct it.")
    item = {"image": _absolute(entry["image"], file.parent)}
    if "label" in entry:
        item["label"] = _absolute(entry["label"], file.parent)
    raters = rater_files(entry, f"{file}: {split}[{index}]")
    if raters:
        item["raters"] = _absolute(raters, file.parent)
    group = entry.get("patient", entry.get("cluster"))
    return item if group is None else {**item, "group": str(group)}


def _absolute(path: str | Sequence[str], folder: Path) -> str | list[str]:
    return str((folder / path).resolve()) if isinstance(path, str) else [str((folder / p).resolve()) for p in path]


def stem_of(path: str) -> str:
    """The name of an image file without its suffix, of which ``.nii.gz`` is one."""
    name = Path(path).name
    for suffix in sorted(IMAGE_SUFFIXES, key=len, reverse=True):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def case_names(images: Sequence[str | Sequence[str]]) -> list[str]:
    """Name each case by its file's stem; stems that collide get their folder as prefix, or as many as it takes.

    Args:
        images: image files (the first one names a case of several).
    """
    paths = [Path(first_file(image)) for image in images]
    beside = Counter(path.parent / stem_of(str(path)) for path in paths)
    stems = [  # of two files that differ in their suffix alone, the suffix is part of the name
        stem_of(str(path)) if beside[path.parent / stem_of(str(path))] == 1 else path.name.replace(".", "_")
        for path in paths
    ]
    names = stems
    depth = 0
    while max(Counter(names).values(), default=1) > 1 and depth < max(len(path.parts) for path in paths):
        depth += 1
        clash = Counter(names)
        names = [
            re.sub(r"[^\w.-]+", "_", "_".join([*path.parent.parts[-depth:], stem])) if clash[name] > 1 else name
            for name, path, stem in zip(names, paths, stems)
        ]
    return names


def _named(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    names = case_names([item["image"] for item in items])
    keep = ("image", "label", "raters", "foreground")
    return [{**{k: item[k] for k in keep if k in item}, "case": n} for item, n in zip(items, names)]


def hold_out(items: list[dict[str, Any]], seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Split off about 20 %, whole patients (or clusters) at a time."""
    group_of = [item.get("group", f"case {i}") for i, item in enumerate(items)]
    groups = sorted(set(group_of))
    random.Random(seed).shuffle(groups)
    held: set[str] = set()
    sizes = Counter(group_of)
    while groups and sum(sizes[g] for g in held) < HELD_OUT * len(items):
        held.add(groups.pop())
    return (
        [item for item, group in zip(items, group_of) if group not in held],
        [item for item, group in zip(items, group_of) if group in held],
    )


def training_splits(dataset_dir: str, spec: DataSpec, seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Return the checked data lists ``training`` and ``validation`` of a Decathlon folder; ``test`` is never touched.

    A case has the key ``label``, the key ``raters`` (a list of files, ``labels`` in ``dataset.json``), or both.

    Without ``validation`` in ``dataset.json``, 20 % of ``training`` are held out by ``seed``, grouped by ``patient`` or
    ``cluster`` where the cases carry one.

    Args:
        dataset_dir: folder that holds ``dataset.json``.
        spec: what the config variables say of the data.
        seed: seed of the split.

    Raises:
        InputError: for a missing or broken data list, and for bad cases, all at once.
    """
    folder = _dataset_folder(dataset_dir)
    lists = _read_lists(folder)
    training, validation = lists["training"], lists["validation"]
    if not validation:
        training, validation = hold_out(training, seed)
    if not training or not validation:
        raise InputError(
            f"{folder / 'dataset.json'}: 'training' lists {len(lists['training'])} cases, which leaves "
            f"{len(training)} to train on and {len(validation)} to validate on: add cases, or a list 'validation'."
        )
    refuse(check_items(training + validation, spec, labelled=True), str(folder / "dataset.json"))
    return {"training": _named(training), "validation": _named(validation)}


class TrainingSplits:
    """The lists of :func:`training_splits`, read and checked when one of them is first asked for.

    Who replaces both lists, as MONAI Label does, needs no ``dataset_dir``, even where the whole config is resolved: 3D
    Slicer asks for that by naming no part of it to run.

    Args:
        dataset_dir: folder that holds ``dataset.json``.
        spec: what the config variables say of the data.
        seed: seed of the split.
    """

    def __init__(self, dataset_dir: str, spec: DataSpec, seed: int = 0) -> None:
        self._arguments = dataset_dir, spec, seed

    @cached_property
    def _lists(self) -> dict[str, list[dict[str, Any]]]:
        return training_splits(*self._arguments)

    def __getitem__(self, split: str) -> list[dict[str, Any]]:
        """The list ``training`` or ``validation``.

        Raises:
            InputError: as :func:`training_splits`.
        """
        return self._lists[split]


def _split(lists: Mapping[str, list], order: Sequence[str], chosen: str | None, variable: str, file: Path) -> list:
    if chosen is not None and chosen not in lists:
        raise InputError(f"{variable}={chosen!r} must be one of {', '.join(lists)}.")
    for split in [chosen] if chosen else order:
        if lists[split]:
            return lists[split]
    raise InputError(f"{file}: lists no cases under {chosen or ' or '.join(order)}: add some, or set --{variable}.")


def evaluation_items(
    dataset_dir: str, spec: DataSpec, eval_split: str | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """Return the checked, labelled cases of ``validation``, else ``test``, of a Decathlon folder.

    Where neither lists labelled cases, they are those of ``training`` that a training of that ``seed`` holds out. Cases
    have ``label``, ``raters`` or both, as in :func:`training_splits`.

    Args:
        dataset_dir: folder that holds ``dataset.json``.
        spec: what the config variables say of the data.
        eval_split: ``training``, ``validation`` or ``test``, to choose another list.
        seed: seed of the training's split.

    Raises:
        InputError: for a missing or broken data list, and for bad cases, all at once.
    """
    folder = _dataset_folder(dataset_dir)
    lists = _read_lists(folder)
    labelled = any({"label", "raters"} & item.keys() for split in ("validation", "test") for item in lists[split])
    if eval_split is None and not labelled:
        lists["validation"] = hold_out(lists["training"], seed)[1]
    items = _split(lists, ("validation", "test"), eval_split, "eval_split", folder / "dataset.json")
    refuse(check_items(items, spec, labelled=True), str(folder / "dataset.json"))
    return _named(items)


def _walk(folder: Path, results: Path) -> list[dict[str, Any]]:
    """All readable images below a folder, results left out: files by suffix, DICOM folders as one volume each."""
    files = [p for p in files_below(folder) if not p.resolve().is_relative_to(results.resolve())]
    found = [p for p in files if p.name.lower().endswith(IMAGE_SUFFIXES)]
    series = {p.parent for p in files if is_dicom_file(p)}
    return [{"image": str(path.resolve())} for path in sorted({*found, *series})]


def is_dicom_file(path: Path) -> bool:
    """Whether a file is DICOM, by its name and its first bytes."""
    if path.suffix.lower() not in (".dcm", ".ima", ""):
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def inference_items(
    dataset_dir: str,
    spec: DataSpec,
    output_dir: str,
    checkpoint: str,
    infer_split: str | None = None,
    overwrite: bool | str = False,
    images: Sequence[str] | None = None,
    seed: int = 0,
    outputs: Sequence[str] | str = OUTPUTS,
) -> CaseList:
    """Return the cases to segment: those of a Decathlon folder, or all images below a plain folder.

    Bad cases are named and left out (:meth:`CaseList.report`). Finished ones are left out too: those of which all that
    ``outputs`` asks for is in ``output_dir``, newer than the image and the checkpoint.

    Args:
        dataset_dir: Decathlon folder (``test``, else ``validation``) or a folder of images.
        spec: what the config variables say of the data.
        output_dir: where results are written.
        checkpoint: file of the weights.
        infer_split: ``training``, ``validation`` or ``test``, to choose another list.
        overwrite: whether to segment finished cases again.
        images: files to segment, in place of ``dataset_dir``.
        seed: seed of the training's split, for a Decathlon folder that lists training cases alone: those held out.
        outputs: what is written, see :func:`medsegdiff_monai.outputs.check_outputs`.

    Raises:
        InputError: where there is nothing to read, no case is good, or ``outputs`` are none.
    """
    wanted = check_outputs(outputs)
    if images:
        items = [{"image": str(Path(image).resolve())} for image in images]
    else:
        folder = _dataset_folder(dataset_dir)
        file = folder / "dataset.json"
        if file.is_file():
            lists = _read_lists(folder)
            if infer_split is None and not lists["test"] and not lists["validation"]:
                lists["validation"] = hold_out(lists["training"], seed)[1]
            items = _split(lists, ("test", "validation"), infer_split, "infer_split", file)
        else:
            items = _walk(folder, Path(output_dir))
        if not items:
            raise InputError(f"{folder}: holds no dataset.json and no image ({', '.join(IMAGE_SUFFIXES)}, DICOM).")
    sources = _sources(output_dir)
    todo = []
    for item in _named([{"image": item["image"]} for item in items]):
        source = Path(first_file(item["image"]))
        for part in reversed(source.parent.parts[1:]):  # another file of that name was here before
            if sources.get(item["case"], str(source)) == str(source):
                break
            item["case"] = f"{part}_{item['case']}"
        results = output_files(output_dir, item["case"], wanted)
        done = sources.get(item["case"]) == str(source) and _finished(item, results, checkpoint)
        if as_bool(overwrite) or not done:
            todo.append(item)
    if len(todo) < len(items):
        print(f"{len(items) - len(todo)} of {len(items)} cases are finished; --overwrite true segments them again.")
    faults = check_items(todo, spec, labelled=False)
    good = [item for item, fault in zip(todo, faults) if fault is None]
    if todo and not good:
        refuse(faults, str(dataset_dir))
    return CaseList(good, [fault for fault in faults if fault is not None])


def _sources(output_dir: str) -> dict[str, str]:
    """The file that each case in ``cases.csv`` was segmented from."""
    table = Path(output_dir) / "cases.csv"
    if not table.is_file():
        return {}
    with table.open(newline="", encoding="utf-8") as file:
        return {row["case"]: row.get("source", "") for row in csv.DictReader(file)}


def _finished(item: Mapping[str, Any], results: Sequence[Path], checkpoint: str) -> bool:
    """Whether all results are there, and none is older than what it was made from."""
    sources = [Path(first_file(item["image"])), Path(checkpoint)]
    if not all(file.is_file() for file in [*results, *sources]):
        return False
    return max(s.stat().st_mtime for s in sources) <= min(file.stat().st_mtime for file in results)
