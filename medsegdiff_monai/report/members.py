"""Grades of ensembles that other tools made: the same tables and report as for our own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd
from torch import Tensor
from tqdm import tqdm

from ..data.names import safe_name
from ..data.rules import read_label, refuse
from ..errors import InputError
from ..files import lock_folder, unlock_folder, write_atomically
from ..fusion import MemberSummary, check_fusion
from ..grading import CaseFacts, ReliabilityCounts, grade, members_agreement, reasons_to_look
from ..journal import csv_bytes
from ..rows import (
    BAND,
    SURFACE_TOLERANCE,
    Case,
    cleanup_row,
    grade_row,
    near_contours,
    score_row,
    size_row,
    uncertainty_row,
)
from ..structures import COLUMNS, structures
from ..transforms import Regions
from .member_files import Member, declared_regions, files_by_case, member_folders, read_member, refuse_missing
from .page import write_report
from .summary import summary_lines

__all__ = ["evaluate_members"]

NEAR = f"mean of the members, voxels within {BAND} of the contours"


def evaluate_members(
    folders: Sequence[str | Path],
    output: str | Path,
    labels: str | Path | None = None,
    *,
    regions: Mapping[str, Sequence[int]] | None = None,
    suffix: str = "",
    fusion: str = "mean",
    tolerance: float = SURFACE_TOLERANCE,
) -> Path:
    """Grade the members of any ensemble, such as the folds of nnU-Net: tables and report as for this bundle's own.

    Writes ``cases.csv``, ``structures.csv`` and ``report.html``. Nothing is known of a training, so that the expected
    Dice is the members' agreement itself, and flags look at the masks alone.

    Args:
        folders: a folder for each member, of label maps or probabilities, with one file for each case; cases go by the
            names of their files. Where nnU-Net's ``.npz`` stand beside the masks, their probabilities count.
        output: folder to write to.
        labels: folder of the label maps, if there are any.
        regions: see :class:`medsegdiff_monai.transforms.Regions`; by default what a ``dataset.json`` in or above
            ``labels``, or in a member's folder, says, else one class for each value or channel there is.
        suffix: what follows the case's name in the files of the members, such as ``_prob``.
        fusion: how the members become one mask, see :meth:`medsegdiff_monai.fusion.MemberSummary.fuse`.
        tolerance: distance between surfaces that NSD takes for none, in mm, or pixels of pictures.

    Returns:
        The report.

    Raises:
        InputError: for folders that do not fit together, with what does not; nothing is written then.
    """
    ensemble = _Ensemble(folders, labels, regions, suffix, check_fusion(fusion), tolerance)
    if (Path(output) / "cases.jsonl").exists():
        raise InputError(f"{output}: holds results of an evaluation or inference: choose another folder.")
    lock_folder(output)
    try:
        return _write(ensemble, Path(output))
    finally:
        unlock_folder(output)


def _write(ensemble: _Ensemble, output: Path) -> Path:
    rows: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for case in tqdm(ensemble.cases, desc="Grade", disable=len(ensemble.cases) < 2):
        row, regions = ensemble.grade(case)
        rows.append(row)
        found += [{"case": row["case"], **region} for region in regions]
    write_atomically(output / "cases.csv", csv_bytes(rows, dict.fromkeys(key for row in rows for key in row)))
    write_atomically(output / "structures.csv", csv_bytes(found, ["case", *COLUMNS]))
    names, tolerance = ensemble.regions.names, ensemble.tolerance
    counts = ensemble.reliability()
    report = write_report(rows, output, names, structures=found, reliability=counts, tolerance=tolerance)
    print(*summary_lines(rows, names, report=report), sep="\n")
    return report


class _Ensemble:
    """The files of an ensemble, which fit together, and the grades of its cases."""

    def __init__(
        self,
        folders: Sequence[str | Path],
        labels: str | Path | None,
        regions: Mapping[str, Sequence[int]] | None,
        suffix: str,
        fusion: str,
        tolerance: float,
    ) -> None:
        self.fusion = fusion
        self.tolerance = tolerance
        self.members = member_folders(folders, suffix)
        self.cases = sorted(self.members[0])
        self.labels = None if labels is None else files_by_case(labels)
        if labels is not None and self.labels is not None:
            refuse_missing(self.labels, labels, self.members[0], folders[0])
        above = [] if labels is None else [labels, Path(labels).parent]
        declared, self.ignored = declared_regions([*above, *folders])
        self.folders = folders
        self._check(declared if regions is None else regions)

    def _check(self, regions: Mapping[str, Sequence[int]] | None) -> None:
        """Read everything once, before anything is written."""
        channels: set[int] = set()
        values: set[int] = set()
        faults: list[InputError] = []
        for case in tqdm(self.cases, desc="Check", disable=len(self.cases) < 20):
            try:
                members = self._read(case)
                for member in members:
                    if member.are_labels:
                        values |= set(map(int, member.values.unique().tolist()))
                    else:
                        channels.add(len(member.values))
                if self.labels is not None:
                    label = read_label(str(self.labels[case]), members[0].values)
                    values |= set(map(int, label.unique().tolist()))
            except InputError as error:
                faults.append(error)
        refuse(faults, "evaluate-members")
        self.regions = _regions(regions, channels, values - {0}, self.ignored)
        if len(self.members) == 1 and not channels:
            raise InputError(
                f"{self.folders[0]}: one mask per case carries no uncertainty: give more folders, or probabilities."
            )
        self._counts = [ReliabilityCounts(1) for _ in self.regions.names]

    def _read(self, case: str) -> list[Member]:
        first = read_member(self.members[0][case])
        return [first, *(read_member(files[case], first.values) for files in self.members[1:])]

    def grade(self, case: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The row of a case, and those of its structures."""
        read = self._read(case)
        grid, names = read[0].values, self.regions.names
        members = MemberSummary((member.probabilities(self.regions) for member in read), self.regions.binarise)
        mask = self.regions.binarise(members.fuse(self.fusion)).float()
        affine, unit = _place(grid)
        spacing = nib.affines.voxel_sizes(affine)[: grid.ndim - 1].tolist()
        found = Case(names, mask, members.mean, members.votes, spacing, unit)
        graded = grade(members_agreement(members.votes, members.mean, mask))
        sizes = mask.flatten(1).sum(1).double() * float(np.prod(spacing))
        facts = CaseFacts(torch.tensor(grid.shape[1:]) * torch.tensor(spacing), torch.empty(2, 0), sizes)
        row: dict[str, Any] = {"case": safe_name(case), "source": str(self.members[0][case])}
        row |= grade_row(names, graded, reasons_to_look(names, graded, mask, facts, unit))
        row |= {"members": len(read), **size_row(found)}
        row |= uncertainty_row(members.predictive_entropy(), members.mutual_information())
        label = None
        if self.labels is not None:
            label = self.regions.masks(read_label(str(self.labels[case]), grid).as_tensor())
            row |= self._score(found, label)
        row |= cleanup_row(found, label=label)
        return row, structures(names, mask, members.votes, members.mean, affine, unit)

    def _score(self, found: Case, label: Tensor) -> dict[str, float]:
        box, band = near_contours(found.mask, label)
        for counts, inside, probability, truth in zip(self._counts, band, found.probability[box], label[box]):
            counts.add(probability[inside][None], truth[inside][None])
        return score_row(found, label, tolerance=self.tolerance)

    def reliability(self) -> dict[str, Tensor] | None:
        """Counts of the voxels near the contours, for the report."""
        return {NEAR: torch.cat([c.counts for c in self._counts], 1)} if self.labels is not None else None


def _place(grid: MetaTensor) -> tuple[np.ndarray, str]:
    """Affine (4, 4), and whether it is in ``mm`` or, of a picture, in ``px``."""
    has_place = "original_affine" in grid.meta
    return (to_affine_nd(3, np.asarray(grid.affine)), "mm") if has_place else (np.eye(4), "px")


def _regions(
    named: Mapping[str, Sequence[int]] | None, channels: set[int], values: set[int], ignored: int | None
) -> Regions:
    """The classes, as they were named, or as they are found.

    Raises:
        InputError: where the files do not have those classes.
    """
    if named is None and channels:
        named = {f"class_{i}": [i] for i in range(1, max(channels) + 1)}
    elif named is None:
        named = {f"class_{value}": [value] for value in sorted(values - {ignored})}
    if not named:
        raise InputError("all masks are empty: name the classes, such as --regions \"{'tumour': [1]}\".")
    regions = Regions(len(named), named, ignored)
    unknown = sorted(values - regions.labels - {ignored})
    if channels - {len(named)} or unknown:
        found = f"probabilities of {sorted(channels)} classes" if channels - {len(named)} else f"the labels {unknown}"
        raise InputError(
            f"the classes are {dict(named)}, but files hold {found}: name those that there are by --regions."
        )
    return regions
