"""The result of a segmented case: its grades and scores, and what its files hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd
from torch import Tensor

from .cleanup import BEFORE
from .data.names import case_names
from .data.pictures import PICTURES
from .data.reading import image_spacing, load_image
from .fusion import most_different
from .grading import Grade, grade, measure, members_agreement, reasons_to_look
from .inferers import DRAWN_TOGETHER
from .networks import TrainingRecord
from .nifti import nifti_bytes
from .pictures import error_map, overlay_bytes, palette_png_bytes
from .rows import SURFACE_TOLERANCE, Case, cleanup_row, grade_row, score_row, size_row, uncertainty_row
from .structures import structures
from .transforms import Regions

__all__ = ["CaseResult", "distinct_members", "named_regions", "raters_of", "read_source"]


def named_regions(
    num_classes: int, regions: Mapping[str, Sequence[int]] | None, record: TrainingRecord | None
) -> Regions:
    """Return what the channels of the masks are; without ``regions`` by the names that the training has left.

    Args:
        num_classes: number of foreground classes.
        regions: see :class:`medsegdiff_monai.transforms.Regions`.
        record: of the network.
    """
    names = [] if record is None or regions else record.names()
    return Regions(num_classes, {name: [i] for i, name in enumerate(names, start=1)} if names else regions)


def read_source(item: Mapping[str, Any]) -> tuple[str, MetaTensor, np.ndarray]:
    """Read the image of a case anew, in its own grid, as results are; what is there as ``source`` is taken as it is.

    Args:
        item: a case that was segmented, ``image`` being a ``MetaTensor`` of any grid.

    Returns:
        The file, the image (channels, *spatial), and its affine (4, 4), voxel to millimetres, RAS+.
    """
    source = str(item["image"].meta["filename_or_obj"])
    image: Any = item.get("source")
    if not isinstance(image, MetaTensor):
        image = load_image(source, item["image"].shape[0])
    return source, image, np.asarray(to_affine_nd(3, image.affine), dtype=np.float64)  # ITK's is 3 x 3 in 2D


def raters_of(item: Mapping[str, Any], output: Mapping[str, Any]) -> Tensor | None:
    """The masks of a case's raters, boolean (raters, classes, *spatial); None where the data have none.

    Args:
        item: the case; what transforms added to it stays here.
        output: what was made of it.
    """
    raters = {**item, **output}.get("raters")
    return torch.as_tensor(np.asarray(raters.cpu())) > 0 if isinstance(raters, Tensor) else None


def distinct_members(output: Mapping[str, Tensor], regions: Regions) -> Iterator[tuple[str, np.ndarray]]:
    """The members to show, up to three that differ most; none of a single one.

    Args:
        output: what :class:`medsegdiff_monai.transforms.FuseMembersd` returns.
        regions: what the channels of the masks are.

    Yields:
        What a member is called, and its label map (1, *spatial).
    """
    masks = output["member_masks"]
    for i in most_different(masks):
        yield f"member {i + 1} of {len(masks)}", np.asarray(regions.label_map(masks[i]).cpu())


@dataclass
class CaseResult:
    """A segmented case, on the grid of its image.

    Attributes:
        item: the case, ``image`` being a ``MetaTensor`` of any grid.
        output: what :class:`medsegdiff_monai.transforms.FuseMembersd` made of it, and ``label`` where there is one.
        regions: what the channels of the masks are.
        record: what the network's training learnt about its results, see :func:`medsegdiff_monai.grading.grade`.
    """

    item: Mapping[str, Any]
    output: Mapping[str, Any]
    regions: Regions
    record: TrainingRecord | None = None

    def __post_init__(self) -> None:
        self.source, self.image, self.affine = read_source(self.item)
        self.name: str = self.item.get("case") or case_names([self.source])[0]
        spacing, unit = image_spacing(self.source, self.image)
        output = self.output
        maps = output["mask"], output["prob"], output["member_masks"]
        self.case = Case(self.regions.names, maps[0], maps[1], maps[2], spacing, unit)

    @property
    def label(self) -> Tensor | None:
        """True masks (classes, *spatial), NaN where nobody has labelled."""
        label = self.output.get("label")
        return label if isinstance(label, Tensor) else None

    @property
    def raters(self) -> Tensor | None:
        """Masks of several raters, boolean (raters, classes, *spatial)."""
        return raters_of(self.item, self.output)

    @cached_property
    def agreement(self) -> Tensor:
        """How far the members agree on each class."""
        return members_agreement(self.case.member_masks, self.output["mean"], self.case.mask)

    @cached_property
    def grade(self) -> Grade:
        """The Dice to expect."""
        return grade(self.agreement, None if self.record is None else self.record.grading)

    @cached_property
    def reasons(self) -> list[str]:
        """Why a person should look at the case."""
        case = self.case
        facts = measure(torch.as_tensor(self.image), case.spacing, case.mask)
        return reasons_to_look(case.names, self.grade, case.mask, facts, case.unit, self.record)

    def row(self, tolerance: float = SURFACE_TOLERANCE) -> dict[str, Any]:
        """Return the row of ``cases.csv``, with scores where there is a label.

        Args:
            tolerance: see :func:`medsegdiff_monai.rows.score_row`.
        """
        row: dict[str, Any] = {"case": self.name, "source": self.source}
        row |= grade_row(self.case.names, self.grade, self.reasons)
        row["members"] = members = len(self.case.member_masks)
        if members > 1:
            row["mean_pairwise_dice"] = round(float(self.agreement.mean()), 6)
        row |= size_row(self.case)
        row |= uncertainty_row(self.output["uncertainty_entropy"], self.output["uncertainty_mi"])
        if self.label is not None:
            row |= score_row(self.case, self.label, self.raters, DRAWN_TOGETHER, tolerance)
        return row | cleanup_row(self.case, self.output.get(BEFORE), self.label)

    def structures(self) -> list[dict[str, Any]]:
        """Return the rows of ``structures.csv``."""
        case = self.case
        return structures(case.names, case.mask, case.member_masks, case.probability, self.affine, case.unit)

    def contents(self, outputs: Sequence[str], title: str) -> Iterator[tuple[str, bytes]]:
        """The files of the case, by what their names end in; the mask comes first.

        Args:
            outputs: see :func:`medsegdiff_monai.outputs.check_outputs`.
            title: of the picture.
        """
        dims = self.image.ndim - 1
        mask = np.asarray(self.output["pred"].cpu())
        yield "seg.nii.gz", nifti_bytes(mask, self.affine, dims)
        if self.source.lower().endswith(PICTURES):
            yield "seg.png", palette_png_bytes(mask[0], self.regions.written)
        maps = ["prob"] if "prob" in outputs else []
        maps += ["uncertainty_entropy", "uncertainty_mi"] if "uncertainty" in outputs else []
        for name in maps:
            array = np.asarray(self.output[name].cpu()).astype(np.float32, copy=False)
            yield f"{name}.nii.gz", nifti_bytes(array, self.affine, dims)
        if "members" in outputs:
            yield "members.nii.gz", nifti_bytes(self.member_maps(), self.affine, dims, squeeze=False)
        if "overlay" in outputs:
            yield "overlay.png", self.picture(title)

    def member_maps(self) -> np.ndarray:
        """Label maps of the members, (members, *spatial)."""
        maps = [self.regions.label_map(masks) for masks in self.case.member_masks]
        return np.asarray(torch.cat(maps).cpu())

    def picture(self, title: str) -> bytes:
        """Return a PNG of image, label, mask, errors, uncertainty and members."""
        label = self.label
        return overlay_bytes(
            np.asarray(self.image),
            np.asarray(self.output["pred"].cpu()),
            np.asarray(self.output["uncertainty_entropy"].cpu()),
            None if label is None else np.asarray(self.regions.label_map(label).cpu()),
            self.affine,
            self.regions.legend,
            title,
            distinct_members(self.output, self.regions),
            None if label is None else error_map(self.case.mask, label),
        )
