"""Data lists for training and evaluation, from a Decathlon folder."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from monai.data.utils import partition_dataset

from ..errors import InputError
from .entries import SPLITS, first_file, read_data_list
from .names import case_names
from .rules import DataSpec, check_items, refuse

__all__ = ["EvaluationList", "TrainingSplits", "cross_validate", "evaluation_items", "hold_out", "training_splits"]

HELD_OUT = 0.2


def _dataset_folder(dataset_dir: str | Path) -> Path:
    folder = Path(dataset_dir)
    if not str(dataset_dir) or not folder.is_dir():
        raise InputError(
            f"dataset_dir={str(dataset_dir)!r} is not a folder: give --dataset_dir DIR, a folder of images."
        )
    return folder


def _read_lists(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The cases of each split, as transforms take them.

    Raises:
        InputError: for a broken list, and for all entries that are no cases at once.
    """
    data = read_data_list(folder)
    refuse([InputError(fault) for fault in data.faults], str(data.file))
    return {split: [entry.item() for entry in data.of(split)] for split in SPLITS}


def _named(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    names = case_names([item["image"] for item in items])
    keep = ("image", "label", "raters", "foreground", "facts")
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


def cross_validate(
    lists: Mapping[str, list[dict[str, Any]]], folder: Path, seed: int, num_folds: int, fold: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Split ``training`` and ``validation`` together into the cases to train on and the fold that is held out.

    Whole patients (or clusters) at a time; a case without one stands for itself, by the name of its file in the folder.
    All folds together have each case once. They depend on these names and the seed, and not on the order of the lists
    or on where the folder is.

    Args:
        lists: cases of each split.
        folder: where ``dataset.json`` is.
        seed: seed of the folds.
        num_folds: number of folds.
        fold: the one that is held out, from 0.

    Raises:
        InputError: where there are more folds than patients.
    """
    items = [*lists["training"], *lists["validation"]]
    owners = [_owner(item, folder) for item in items]
    patients = sorted(set(owners))
    if len(patients) < num_folds:
        raise InputError(
            f"{folder / 'dataset.json'}: num_folds={num_folds}, but 'training' and 'validation' list {len(patients)} "
            "patients (a case without one counts as one): take fewer folds, or add cases."
        )
    held = set(partition_dataset(patients, num_partitions=num_folds, shuffle=True, seed=seed)[fold])
    return (
        [item for item, owner in zip(items, owners) if owner not in held],
        [item for item, owner in zip(items, owners) if owner in held],
    )


def _owner(item: Mapping[str, Any], folder: Path) -> tuple[str, str]:
    """Patient or cluster of a case, else the name of its file, with what it is: names of both may be equal."""
    if "group" in item:
        return "patient", item["group"]
    return "case", Path(os.path.relpath(first_file(item["image"]), folder)).as_posix()


def training_splits(
    dataset_dir: str, spec: DataSpec, seed: int = 0, num_folds: int | None = None, fold: int | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Return the checked data lists ``training`` and ``validation`` of a Decathlon folder; ``test`` is never touched.

    A case has the key ``label``, the key ``raters`` (a list of files, ``labels`` in ``dataset.json``), or both.

    Without ``validation`` in ``dataset.json``, 20 % of ``training`` are held out by ``seed``, grouped by ``patient`` or
    ``cluster`` where the cases carry one. With folds, both lists are split anew (:func:`cross_validate`).

    Args:
        dataset_dir: folder that holds ``dataset.json``.
        spec: what the config variables say of the data.
        seed: seed of the split.
        num_folds: number of folds; None: the lists are taken as they are.
        fold: the one to validate on, from 0.

    Raises:
        InputError: for a missing or broken data list, and for bad cases, all at once.
    """
    folder = _dataset_folder(dataset_dir)
    lists = _read_lists(folder)
    training, validation = lists["training"], lists["validation"]
    if num_folds is not None and fold is not None:
        training, validation = cross_validate(lists, folder, seed, num_folds, fold)
    elif not validation:
        training, validation = hold_out(training, seed)
    if not training or not validation:
        raise InputError(
            f"{folder / 'dataset.json'}: 'training' lists {len(lists['training'])} cases, which leaves "
            f"{len(training)} to train on and {len(validation)} to validate on: add cases, or a list 'validation'."
        )
    refuse(
        [*_leaks(training, validation), *check_items(training + validation, spec, labelled=True)],
        str(folder / "dataset.json"),
    )
    return {"training": _named(training), "validation": _named(validation)}


class EvaluationList(list):
    """A data list that remembers which one of ``dataset.json`` it is.

    Args:
        items: the cases.
        split: ``training``, ``validation`` (also what a training held out as such) or ``test``.
    """

    def __init__(self, items: Sequence[Mapping[str, Any]], split: str) -> None:
        super().__init__(items)
        self.split = split


def _leaks(training: list[dict[str, Any]], validation: list[dict[str, Any]]) -> list[InputError]:
    """Images that are in both lists, by whichever links."""
    seen = {os.path.realpath(first_file(item["image"])) for item in training}
    return [
        InputError(f"{name}: is in training and in validation: scores would be misleading; keep one of them.")
        for name in (first_file(item["image"]) for item in validation)
        if os.path.realpath(name) in seen
    ]


class TrainingSplits:
    """The lists of :func:`training_splits`, read and checked when one of them is first asked for.

    Who replaces both lists, as MONAI Label does, needs no ``dataset_dir``, even where the whole config is resolved: 3D
    Slicer asks for that by naming no part of it to run.

    Args:
        dataset_dir: folder that holds ``dataset.json``.
        spec: what the config variables say of the data.
        seed: seed of the split.
        num_folds: see :func:`training_splits`.
        fold: see :func:`training_splits`.
    """

    def __init__(
        self, dataset_dir: str, spec: DataSpec, seed: int = 0, num_folds: int | None = None, fold: int | None = None
    ) -> None:
        self._arguments = dataset_dir, spec, seed, num_folds, fold

    @cached_property
    def _lists(self) -> dict[str, list[dict[str, Any]]]:
        return training_splits(*self._arguments)

    def __getitem__(self, split: str) -> list[dict[str, Any]]:
        """The list ``training`` or ``validation``.

        Raises:
            InputError: as :func:`training_splits`.
        """
        return self._lists[split]


def _split(
    lists: Mapping[str, list], order: Sequence[str], chosen: str | None, variable: str, file: Path
) -> EvaluationList:
    if chosen is not None and chosen not in lists:
        raise InputError(f"{variable}={chosen!r} must be one of {', '.join(lists)}.")
    for split in [chosen] if chosen else order:
        if lists[split]:
            return EvaluationList(lists[split], split)
    raise InputError(f"{file}: lists no cases under {chosen or ' or '.join(order)}: add some, or set --{variable}.")


def evaluation_items(
    dataset_dir: str,
    spec: DataSpec,
    eval_split: str | None = None,
    seed: int = 0,
    num_folds: int | None = None,
    fold: int | None = None,
) -> EvaluationList:
    """Return the checked, labelled cases of ``validation``, else ``test``, of a Decathlon folder.

    Where neither lists labelled cases, they are those of ``training`` that a training of that ``seed`` holds out; with
    folds, ``validation`` is the fold that it holds out. Cases have ``label``, ``raters`` or both, as in
    :func:`training_splits`.

    Args:
        dataset_dir: folder that holds ``dataset.json``.
        spec: what the config variables say of the data.
        eval_split: ``training``, ``validation`` or ``test``, to choose another list.
        seed: seed of the training's split.
        num_folds: see :func:`training_splits`.
        fold: see :func:`training_splits`.

    Raises:
        InputError: for a missing or broken data list, and for bad cases, all at once.
    """
    folder = _dataset_folder(dataset_dir)
    lists = _read_lists(folder)
    labelled = any({"label", "raters"} & item.keys() for split in ("validation", "test") for item in lists[split])
    if num_folds is not None and fold is not None and eval_split != "test":
        lists["training"], lists["validation"] = cross_validate(lists, folder, seed, num_folds, fold)
    elif eval_split is None and not labelled:
        lists["validation"] = hold_out(lists["training"], seed)[1]
    items = _split(lists, ("validation", "test"), eval_split, "eval_split", folder / "dataset.json")
    refuse(check_items(items, spec, labelled=True), str(folder / "dataset.json"))
    return EvaluationList(_named(items), items.split)
