"""Masks and probabilities that other tools wrote: a folder for each member of an ensemble."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor

from ..data.entries import DataList
from ..data.geometry import onto_grid
from ..data.names import stem_of
from ..data.pictures import PICTURES
from ..data.reading import IMAGE_SUFFIXES, files_below, load_image, load_label, read_json, reading
from ..errors import InputError
from ..transforms import Regions

__all__ = ["Member", "declared_regions", "files_by_case", "member_folders", "read_member", "refuse_missing"]

SHOWN = 5  # names that a message lists
SLACK = 1e-3  # by which a probability may be beyond 0 and 1
SUM_SLACK = 0.02  # of all classes together with the background; probabilities are saved in half precision, too


def files_by_case(folder: str | Path, suffix: str = "") -> dict[str, Path]:
    """The images in a folder and below, by the name of their case.

    Args:
        folder: folder.
        suffix: what follows the case's name in those files that count, such as ``_prob``.

    Raises:
        InputError: where there is none, or where two files are of one case.
    """
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: is not a folder: give the folder of each member.")
    found: dict[str, Path] = {}
    for file in files_below(Path(folder)):
        stem = stem_of(file.name)
        if not file.name.lower().endswith(IMAGE_SUFFIXES) or not stem.endswith(suffix):
            continue
        case = stem[: len(stem) - len(suffix)]
        if case in found:
            raise InputError(f"{folder}: {found[case]} and {file} are both of the case {case!r}: keep one of them.")
        found[case] = file
    if not found:
        named = f" whose name ends in {suffix!r}" if suffix else ""
        raise InputError(f"{folder}: holds no image{named} ({', '.join(IMAGE_SUFFIXES)}): give the folder of a member.")
    return found


def declared_regions(folders: Sequence[str | Path]) -> tuple[dict[str, list[int]] | None, int | None]:
    """What each class holds and which value is ignored, from the first ``dataset.json`` in any of the folders."""
    for folder in folders:
        file = Path(folder) / "dataset.json"
        if file.is_file():
            content = read_json(file)
            data = DataList(file, content if isinstance(content, Mapping) else {}, [], [])
            named = data.regions or {name: v for name, v in (data.labels or {}).items() if v != [0]}
            return named or None, data.ignore_label
    return None, None


@dataclass(frozen=True)
class Member:
    """What a file holds.

    Attributes:
        values: a label map (1, *spatial), or probabilities of the classes (classes, *spatial).
        are_labels: which of both.
    """

    values: MetaTensor
    are_labels: bool

    def probabilities(self, regions: Regions) -> Tensor:
        """Probabilities of the classes, (classes, *spatial), 0 or 1 of a label map."""
        plain = self.values.as_tensor()
        return regions.masks(plain).nan_to_num() if self.are_labels else plain.clamp(0, 1).float()


def read_member(file: Path, grid: MetaTensor | None = None) -> Member:
    """Read a label map, or probabilities; where a ``.npz`` of nnU-Net stands beside a mask, what that holds.

    A file of whole numbers in one channel is a label map. Channels that add up to 1 everywhere have the background
    first, which is left out.

    Args:
        file: image of any kind that is read.
        grid: image (channels, *spatial) whose voxels the file must have, in whatever order.

    Raises:
        InputError: where it is neither, or has other voxels.
    """
    softmax = file.with_name(f"{stem_of(file.name)}.npz")
    image = load_label(file) if file.name.lower().endswith(PICTURES) else load_image(file)
    if softmax.is_file():
        image = MetaTensor(_softmax(softmax, tuple(image.shape[1:]))).copy_meta_from(image)
    labels = len(image) == 1 and bool((image == image.round()).all()) and not softmax.is_file()
    if not labels:
        _check_probabilities(softmax if softmax.is_file() else file, image)
        if len(image) > 1 and bool(((image.as_tensor().sum(0) - 1).abs() < SUM_SLACK).all()):
            image = MetaTensor(image.as_tensor()[1:]).copy_meta_from(image)
    return Member(image if grid is None else _placed(image, file, grid), labels)


def _check_probabilities(file: Path, values: MetaTensor) -> None:
    low, high = float(values.min()), float(values.max())
    if not (-SLACK <= low and high <= 1 + SLACK) or bool(values.isnan().any()):
        raise InputError(
            f"{file}: holds values from {low:.4g} to {high:.4g}, which are neither labels nor probabilities: save "
            "label maps, or what softmax or sigmoid returns."
        )


def _softmax(file: Path, size: tuple[int, ...]) -> Tensor:
    """What nnU-Net saves: classes, then the axes of the image in reverse, a first one of 1 where it is a picture."""
    with reading(file), np.load(file, allow_pickle=False) as content:
        key = next((key for key in ("probabilities", "softmax") if key in content), None)
        if key is None:
            raise InputError(f"{file}: holds {', '.join(content)}, but no 'probabilities': let nnU-Net save them.")
        array = content[key].astype(np.float32)
    values = np.moveaxis(array, 0, -1).T  # (classes, *spatial)
    values = values[..., 0] if values.ndim == len(size) + 2 else values
    if values.shape[1:] != size:
        raise InputError(
            f"{file}: holds probabilities of size {list(values.shape[1:])}, but the mask beside it is of size "
            f"{list(size)}: save both again."
        )
    return torch.from_numpy(np.ascontiguousarray(values))


def _placed(image: MetaTensor, file: Path, grid: MetaTensor) -> MetaTensor:
    """The image on the voxels of the grid."""
    channels = []
    for channel in image:
        placed, difference = onto_grid(channel[None], grid)
        if placed is None:
            difference = difference.replace("label of", "this of").replace("image of", "the first member's of")
            raise InputError(
                f"{file}: does not fit {grid.meta['filename_or_obj']} ({difference}): all members of a case must have "
                "the same voxels."
            )
        channels.append(placed)
    return MetaTensor(torch.cat([c.as_tensor() for c in channels])).copy_meta_from(channels[0])


def refuse_missing(
    cases: Mapping[str, Path], folder: str | Path, expected: Mapping[str, Path], others: str | Path
) -> None:
    """Refuse a folder that lacks cases of another.

    Raises:
        InputError: naming some of them.
    """
    lacking = sorted(expected.keys() - cases.keys())
    if lacking:
        names = ", ".join(lacking[:SHOWN]) + (", ..." if len(lacking) > SHOWN else "")
        raise InputError(
            f"{folder}: lacks {len(lacking)} of the cases in {others}: {names}. Add them, or remove them there."
        )


def member_folders(folders: Sequence[str | Path], suffix: str = "") -> list[dict[str, Path]]:
    """The files of each member by their cases, which all have.

    Args:
        folders: a folder for each member.
        suffix: see :func:`files_by_case`.

    Raises:
        InputError: where there is not a folder, one is given twice, or they are not of the same cases.
    """
    if not folders:
        raise InputError("evaluate-members: give a folder for each member of the ensemble.")
    twice = [folder for i, folder in enumerate(folders) if Path(folder).resolve() in
             {Path(other).resolve() for other in folders[:i]}]  # fmt: skip
    if twice:
        raise InputError(f"{twice[0]}: is given twice: give the folder of each member once.")
    members = [files_by_case(folder, suffix) for folder in folders]
    for folder, files in zip(folders, members):
        refuse_missing(files, folder, members[0], folders[0])
        refuse_missing(members[0], folders[0], files, folder)
    return members
