"""What the reader of a raw layout finds, and how it writes a case in Decathlon layout."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...errors import InputError
from ...files import write_atomically
from ...nifti import nifti_bytes

__all__ = ["Case", "CaseFiles", "Layout", "same_size"]


class CaseFiles:
    """Write the files of one case, each of them whole or not at all.

    Args:
        output: folder that receives ``images/`` and ``labels/``, and ``labels_1/``, ``labels_2/`` ... of raters.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.values: set[int] = set()  # label values written

    def _write(self, relative: str, content: bytes) -> str:
        write_atomically(self.output / relative, content)
        return f"./{relative}"

    def copy(self, source: Path, relative: str) -> str:
        """Copy a file unchanged; return its path for the data list."""
        return self._write(relative, source.read_bytes())

    def picture(self, pixels: np.ndarray, relative: str) -> str:
        """Write (rows, columns[, channels]) as PNG; return its path for the data list."""
        content = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(content, "PNG")
        return self._write(relative, content.getvalue())

    def nifti(self, array: np.ndarray, affine: np.ndarray, relative: str) -> str:
        """Write (channels, *spatial) as NIfTI, as int16 where that loses nothing; return its path for the data list."""
        with np.errstate(invalid="ignore"):
            whole = array.astype(np.int16)
        exact = whole if np.array_equal(whole, array) else array.astype(np.float32)
        return self._write(relative, nifti_bytes(exact, affine, array.ndim - 1))

    def meta_image(self, array: np.ndarray, spacing: Sequence[float], relative: str) -> str:
        """Write (channels, x, y) as one 2D MetaImage; return its path for the data list.

        NIfTI has no 2D image of several channels; ITK's Python reads those of floats.
        """
        import itk  # slow to import

        rows = np.ascontiguousarray(array.transpose(2, 1, 0))
        if len(array) == 1:
            image = itk.image_from_array(rows[..., 0])
        else:
            image = itk.image_from_array(rows.astype(np.float32), is_vector=True)
        image.SetSpacing([float(s) for s in spacing])
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "image.mha")
            itk.imwrite(image, str(file), compression=True)
            return self._write(relative, file.read_bytes())

    def label_picture(self, label: np.ndarray, relative: str) -> str:
        """Write a label map (rows, columns) as PNG; return its path for the data list."""
        self.note_values(label)
        return self.picture(label.astype(np.uint8 if label.max() < 2**8 else np.uint16), relative)

    def label_nifti(self, label: np.ndarray, affine: np.ndarray, relative: str) -> str:
        """Write a label map (*spatial) as NIfTI; return its path for the data list."""
        self.note_values(label)
        return self.nifti(label[None], affine, relative)

    def note_values(self, label: np.ndarray) -> None:
        """Remember the values of a label map."""
        self.values.update(int(value) for value in np.unique(label))


@dataclass(frozen=True)
class Case:
    """One case of a raw data set.

    Args:
        name: its name in the output.
        patient: whose it is; a split never divides a patient.
        sources: the raw files.
        convert: writes the case; returns its items for the data list.
        split: ``training``, ``validation``, ``test``, ``unlabelled``, or None to be drawn by the seed.
        recipe: what besides the sources decides what is written; a case that was written by another is done again.
    """

    name: str
    patient: str
    sources: Sequence[Path]
    convert: Callable[[CaseFiles], list[dict[str, Any]]]
    split: str | None = None
    recipe: str = ""


@dataclass
class Layout:
    """A raw data set.

    Args:
        edition: what was recognised, in words.
        cases: all cases that can be converted.
        labels: label values and their names; None to take the values as they come.
        modality: channels and their names.
        regions: mask channels, where they are not the labels themselves.
        notes: what was left out or decided, in words.
        ignore_label: value of voxels that nobody has labelled, where there are any.
    """

    edition: str
    cases: list[Case]
    labels: Mapping[str, str] | None
    modality: Mapping[str, str]
    regions: Mapping[str, Sequence[int]] | None = None
    notes: list[str] = field(default_factory=list)
    ignore_label: int | None = None


def same_size(path: Path, size: Sequence[int], image: Path, image_size: Sequence[int]) -> None:
    """Refuse a mask of another size than its image.

    Raises:
        InputError: naming both.
    """
    if tuple(size) != tuple(image_size):
        raise InputError(f"{path}: is {list(size)}, the image {image.name} {list(image_size)}: they must be equal.")
