"""The cases that inference segments: of a Decathlon folder, a plain folder of images, or single files."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from monai.data import DataLoader, Dataset
from monai.data.utils import list_data_collate
from monai.transforms import Compose
from monai.utils import ensure_tuple

from ..distributed import is_main, share
from ..errors import InputError, reading
from ..journal import JOURNAL, CaseJournal, file_stamps
from ..outputs import OUTPUTS, check_outputs
from ..settings import as_bool
from ..weights import digest
from .datalist import _dataset_folder, _named, _read_lists, _split, cross_validate, hold_out
from .dicom import is_dicom_file
from .entries import first_file
from .names import safe_name
from .reading import IMAGE_SUFFIXES, check_header, files_below
from .rules import SHOWN, DataSpec, image_faults

__all__ = ["CaseDataset", "CaseList", "CaseLoader", "inference_items"]

logger = logging.getLogger(__name__)

LARGE = 2**24  # values of an image that is read again for its results, where memory is short


class CaseList(list):
    """A data list that remembers which cases were left out, and why.

    Args:
        items: the cases.
        settings: what their results depend on, besides the image.
    """

    def __init__(self, items: Sequence[Mapping[str, Any]] = (), settings: Mapping[str, Any] | None = None) -> None:
        super().__init__(items)
        self.settings = dict(settings or {})
        self.faults: list[InputError] = []

    def leave_out(self, fault: InputError) -> None:
        """Name a case that cannot be segmented."""
        self.faults.append(fault)
        logger.warning(f"skipped: {fault}")

    def report(self) -> None:
        """Fail, at the end of a run, if cases were left out.

        Raises:
            InputError: naming them.
        """
        if len(self.faults) == 1:
            raise InputError(f"1 case was skipped: {self.faults[0]}")
        if self.faults:
            lines = [str(fault) for fault in self.faults]
            more = f"\n  ... and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
            raise InputError(f"{len(lines)} cases were skipped:\n  " + "\n  ".join(lines[:SHOWN]) + more)


class CaseDataset(Dataset):
    """Cases that are read, once, and checked when they are asked for.

    An item has, besides what ``transform`` makes, ``source``, the image (channels, *spatial) in its own grid, unless
    that has more than ``LARGE`` values, and ``made_from``, what :class:`medsegdiff_monai.results.CaseWriter` notes of
    it.

    Args:
        data: data list.
        transform: preprocessing; of its transforms, the first two load ``image`` with its channels first.
        spec: what the config variables say of the data.
    """

    def __init__(self, data: Sequence[Mapping[str, Any]], transform: Compose, spec: DataSpec) -> None:
        super().__init__(data, transform)
        self.spec = spec

    def _transform(self, index: int) -> dict[str, Any]:
        """Read and check a case.

        Raises:
            InputError: where that is not possible, whatever the reason.
        """
        item, transform = self.data[index], self.transform
        name = first_file(item["image"])
        made_from = {"image": item["image"], "settings": getattr(self.data, "settings", None)}
        with reading(name):
            made_from["stamps"] = file_stamps(item["image"])
            for file in ensure_tuple(item["image"]):
                check_header(file)
            loaded = transform(dict(item), end=2)
            faults = image_faults(loaded["image"], name, self.spec)
            if faults:
                raise InputError("\n  ".join(faults))
            noted = {"made_from": json.dumps(made_from)}
            if loaded["image"].numel() <= LARGE:
                noted["source"] = loaded["image"].clone()  # normalisation may work in place
            return {**transform(loaded, start=2), **noted}


class _Attempts(torch.utils.data.Dataset):
    """A data set that returns an error in place of an item that raises it, also from the process of a worker."""

    def __init__(self, dataset: CaseDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except InputError as error:
            return error


def _collate(batch: list) -> Any:
    return batch[0] if isinstance(batch[0], InputError) else list_data_collate(batch)


def _one_ahead(batches: Iterator[Any]) -> Iterator[Any]:
    """Get each item in a thread while the one before is used."""
    end = object()
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, batches, end)
        while (batch := coming.result()) is not end:
            coming = thread.submit(next, batches, end)
            yield batch


class CaseLoader(DataLoader):
    """Load one case at a time, in a thread while the one before is segmented.

    Those that cannot be read are named when it is their turn, and left out.

    How many are left is not known before, and so it has no length.

    Args:
        dataset: cases.
        num_workers: processes that load cases ahead.
        **kwargs: see :class:`torch.utils.data.DataLoader`.
    """

    def __init__(self, dataset: CaseDataset, num_workers: int = 0, **kwargs: Any) -> None:
        super().__init__(_Attempts(dataset), num_workers, batch_size=1, collate_fn=_collate, **kwargs)
        self.cases: Any = dataset.data

    def __len__(self) -> int:
        raise TypeError("how many cases can be read is not known before")

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Load the cases that can be."""
        for batch in _one_ahead(super().__iter__()):
            if isinstance(batch, InputError):
                self.cases.leave_out(batch)
            else:
                yield batch


def _walk(folder: Path, results: Path) -> list[dict[str, Any]]:
    """All readable images below a folder, the results of any run left out: files by suffix, DICOM folders as a volume.

    No image is opened, but for one file of a series. What is no image of a kind that is read is named.
    """
    files = [p for p in files_below(folder) if not p.resolve().is_relative_to(results.resolve())]
    earlier = {
        p.parent: {p.parent / case for case in CaseJournal(p.parent).entries} for p in files if p.name == JOURNAL
    }
    files = [p for p in files if not any(cases & {*p.parents} for cases in earlier.values())]
    found = {p for p in files if p.name.lower().endswith(IMAGE_SUFFIXES)}
    others = [p for p in files if p not in found]
    for file in others:
        if file.parent not in found and is_dicom_file(file):
            found.add(file.parent)
    partners = {p.with_suffix("") for p in found}  # such as the voxels of a header
    left = [str(p.relative_to(folder)) for p in others if p.parent not in found and p.with_suffix("") not in partners]
    if left:
        more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
        print(f"{folder}: skipped, not images of a supported format: {', '.join(left[:SHOWN])}{more}.")
    for place, cases in earlier.items():
        print(f"{place}: {len(cases)} cases skipped, the results of an earlier run.")
    return [{"image": os.path.abspath(path)} for path in sorted(found)]


def _find(
    dataset_dir: str, output_dir: str, infer_split: str | None, seed: int, num_folds: int | None, fold: int | None
) -> list[dict[str, Any]]:
    """The cases of a Decathlon folder, or all images below a plain folder."""
    folder = _dataset_folder(dataset_dir)
    file = folder / "dataset.json"
    if file.is_file():
        lists = _read_lists(folder)
        tested = infer_split == "test" or (infer_split is None and lists["test"])
        if num_folds is not None and fold is not None and not tested:
            lists["training"], lists["validation"] = cross_validate(lists, folder, seed, num_folds, fold)
        elif infer_split is None and not lists["test"] and not lists["validation"]:
            lists["validation"] = hold_out(lists["training"], seed)[1]
        return _split(lists, ("test", "validation"), infer_split, "infer_split", file)
    if folder.resolve().is_relative_to(Path(output_dir).resolve()):
        raise InputError(
            f"output_dir={output_dir!r} holds the images of {str(dataset_dir)!r}, which cannot be told from results "
            "there: choose a folder beside them, or below."
        )
    items = _walk(folder, Path(output_dir))
    if not items:
        raise InputError(f"{folder}: holds no dataset.json and no image ({', '.join(IMAGE_SUFFIXES)}, DICOM).")
    return items


def inference_items(
    dataset_dir: str,
    spec: DataSpec,
    output_dir: str,
    checkpoint: str | Sequence[str],
    infer_split: str | None = None,
    overwrite: bool | str = False,
    images: Sequence[str] | None = None,
    seed: int = 0,
    outputs: Sequence[str] | str = OUTPUTS,
    settings: Mapping[str, Any] | None = None,
    num_folds: int | None = None,
    fold: int | None = None,
) -> CaseList:
    """Return the cases to segment: those of a Decathlon folder, or all images below a plain folder.

    Of several processes, each gets its share. Nothing is read yet (:class:`CaseDataset`). Finished cases are left out:
    those of which all that ``outputs`` asks for is in ``output_dir``, made from this image with these weights and
    settings.

    Args:
        dataset_dir: Decathlon folder (``test``, else ``validation``) or a folder of images.
        spec: what the config variables say of the data.
        output_dir: where results are written.
        checkpoint: file of the weights, or several.
        infer_split: ``training``, ``validation`` or ``test``, to choose another list.
        overwrite: whether to segment finished cases again.
        images: files to segment, in place of ``dataset_dir``.
        seed: seed of the training's split, for a Decathlon folder that lists training cases alone: those held out.
        outputs: what is written, see :func:`medsegdiff_monai.outputs.check_outputs`.
        settings: what the masks depend on, besides image and weights.
        num_folds: of a Decathlon folder, where ``validation`` is the fold that a training of that ``seed`` holds out.
        fold: which of them, from 0.

    Raises:
        InputError: where there is nothing to read, or ``outputs`` are none.
    """
    wanted = check_outputs(outputs)
    digests = [digest(file) for file in ensure_tuple(checkpoint)]
    made_with = {**(settings or {}), "checkpoint": digests if len(digests) > 1 else digests[0]}
    if images:
        items = [{"image": os.path.abspath(image)} for image in images]  # a link names its case, not what it leads to
    else:
        items = _find(dataset_dir, output_dir, infer_split, seed, num_folds, fold)
    journal = CaseJournal(output_dir)
    todo, reasons = [], Counter[str]()
    for item in _named([{"image": item["image"]} for item in items]):
        item["case"] = _free_name(item, journal)
        reason = journal.why_not_finished(item["case"], item["image"], made_with, wanted)
        if reason is not None or as_bool(overwrite):
            todo.append(item)
            reasons[reason or ""] += 1
    if len(todo) < len(items) and is_main():
        print(f"{len(items) - len(todo)} of {len(items)} cases are finished; --overwrite true segments them again.")
    for reason in filter(None, reasons if is_main() else ()):
        print(f"{reasons[reason]} of {len(items)} cases are segmented again: their results are of {reason}.")
    return CaseList(share(todo), made_with)


def _free_name(item: Mapping[str, Any], journal: CaseJournal) -> str:
    """The name of a case, with folders before it where the results of another file of that name are there."""
    name, source = item["case"], first_file(item["image"])
    for part in reversed(Path(source).parent.parts[1:]):
        entry = journal.entries.get(name)
        if entry is None or first_file(entry.get("image") or entry["row"].get("source", source)) == source:
            break
        name = safe_name(f"{part}_{name}")
    return name
