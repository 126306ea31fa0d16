"""Names, values, colours and codes of a bundle's segments, as its ``metadata.json`` declares them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from medsegdiff_monai.errors import InputError
from medsegdiff_monai.pictures import COLOURS

__all__ = ["Legend", "Segment"]

# ASCII: OHIF takes the letters of a DICOM-SEG for Latin-1, whatever it declares
UNSURE = "{} - unsure"  # where formats allow overlap: wherever the members disagree about the class
INSIDE = "{} - unsure, inside"  # of a single label map: what of it is in the mask, and counts as the class
OUTSIDE = "{} - unsure, outside"  # of a single label map: what of it is not, and counts as background
CATEGORY = {"CodeValue": "123037004", "CodingSchemeDesignator": "SCT", "CodeMeaning": "Anatomical Structure"}
LETTERS = {"CodeValue": 16, "CodingSchemeDesignator": 16, "CodeMeaning": 64}  # that DICOM allows
PRIVATE = "99MEDSEGDIFF"  # scheme of classes for which metadata declare no code; private ones begin with 99
KEYS = ("SegmentedPropertyCategoryCodeSequence", "SegmentedPropertyTypeCodeSequence")
MODIFIER = "SegmentedPropertyTypeModifierCodeSequence"  # which DICOM-SEG has within the type
LARGEST = 255  # viewers ask for label maps of bytes


@dataclass(frozen=True)
class Segment:
    """A segment.

    Attributes:
        value: in a label map; 0 where it is in none.
        name: of the segment.
        colour: red, green and blue, 0 to 255.
        counts_as: value in label maps for training; None where others say what its voxels are.
        codes: category, type and, where declared, the type's modifier, as DICOM-SEG has them.
    """

    value: int
    name: str
    colour: tuple[int, int, int]
    counts_as: int | None
    codes: Mapping[str, Mapping[str, str]]


def _mixed(colour: Sequence[int], other: int) -> tuple[int, int, int]:
    red, green, blue = (int(c + other) // 2 for c in colour)
    return red, green, blue


def _codes(declared: Any, names: Sequence[str], file: Path) -> dict[str, dict[str, dict[str, str]]]:
    """Codes of classes, as metadata declare them.

    Raises:
        InputError: for what is no code, or of no class.
    """
    if not isinstance(declared, dict) or not all(isinstance(codes, dict) for codes in declared.values()):
        raise InputError(f"{file}: segment_codes must have an object of coded terms for each class.")
    for name, codes in declared.items():
        if name not in names:
            raise InputError(f"{file}: segment_codes has {name!r}, which is no class: take {', '.join(names)}.")
        for key, code in codes.items():
            if key not in (*KEYS, MODIFIER):
                raise InputError(f"{file}: segment_codes of {name!r} has {key!r}: take {', '.join((*KEYS, MODIFIER))}.")
            if not isinstance(code, dict) or set(code) != set(LETTERS):
                raise InputError(f"{file}: {key} of {name!r} must have {', '.join(LETTERS)}, and nothing else.")
            for part, most in LETTERS.items():
                value = code[part]
                plain = part == "CodeMeaning" or (isinstance(value, str) and value.isascii())
                if not (isinstance(value, str) and plain and 0 < len(value) <= most):
                    raise InputError(f"{file}: {part}={value!r} of {name!r} must be text of 1 to {most} letters.")
    return declared


class Legend:
    """The segments of a bundle.

    Args:
        bundle: its folder.

    Raises:
        InputError: where its metadata do not name the values of its label map, or name too many.
    """

    def __init__(self, bundle: str | Path) -> None:
        self.bundle = Path(bundle)
        file = self.bundle / "configs" / "metadata.json"
        metadata = json.loads(file.read_text(encoding="utf-8"))
        self.model, self.version = str(metadata.get("name", self.bundle.name)), str(metadata.get("version", "0"))
        pred = next(iter(metadata["network_data_format"]["outputs"].values()))
        named = {int(value): name for value, name in pred.get("channel_def", {}).items() if int(value)}
        self._declared = _codes(metadata.get("segment_codes", {}), list(named.values()), file)
        self.classes = [self._class(i, value, named[value]) for i, value in enumerate(sorted(named))]
        if not named or max(named) + 2 * len(named) > LARGEST:
            raise InputError(f"{file}: channel_def of the output must name the values of 1 to {LARGEST // 3} classes.")

    def _class(self, place: int, value: int, name: str) -> Segment:
        colour = tuple(map(int, COLOURS[1:][place % (len(COLOURS) - 1)]))
        kind = {"CodeValue": str(value), "CodingSchemeDesignator": PRIVATE, "CodeMeaning": name}
        codes = {**dict(zip(KEYS, (CATEGORY, kind))), **self._declared.get(name, {})}
        return Segment(value, name, colour, value, codes)  # type: ignore[arg-type]

    def _unsure(self, one: Segment, name: str, value: int, other: int, counts_as: int | None) -> Segment:
        kind = {"CodeValue": f"{one.value}U", "CodingSchemeDesignator": PRIVATE, "CodeMeaning": UNSURE.format(one.name)}
        codes = {KEYS[0]: one.codes[KEYS[0]], KEYS[1]: kind}
        return Segment(value, name.format(one.name), _mixed(one.colour, other), counts_as, codes)

    @cached_property
    def unsure(self) -> list[Segment]:
        """One for each class: the voxels about which the members disagree, in or out of the mask."""
        return [self._unsure(one, UNSURE, 0, 255, None) for one in self.classes]

    @cached_property
    def inside(self) -> list[Segment]:
        """The same for a single label map: those in the mask."""
        first = self.classes[-1].value + 1
        return [self._unsure(one, INSIDE, first + i, 255, one.value) for i, one in enumerate(self.classes)]

    @cached_property
    def outside(self) -> list[Segment]:
        """The same for a single label map: those in no mask."""
        first = self.classes[-1].value + 1 + len(self.classes)
        return [self._unsure(one, OUTSIDE, first + i, 64, 0) for i, one in enumerate(self.classes)]

    @property
    def values(self) -> dict[str, int]:
        """The value of each class in a label map."""
        return {one.name: one.value for one in self.classes}

    @property
    def in_label_maps(self) -> list[Segment]:
        """All segments that a single label map may have."""
        return [*self.classes, *self.inside, *self.outside]

    def find(self, name: str) -> Segment | None:
        """The segment of that name, whatever the case of its letters; None where there is none."""
        wanted = name.strip().casefold()
        return next((one for one in [*self.in_label_maps, *self.unsure] if one.name.casefold() == wanted), None)

    @property
    def names(self) -> str:
        """The names of the classes, for messages."""
        return ", ".join(one.name for one in self.classes)

    @property
    def series_description(self) -> str:
        """Model, version and weights, in the 64 letters that DICOM allows."""
        weights = self.bundle / "models" / "model.pt"
        digest = f", weights {hashlib.sha256(weights.read_bytes()).hexdigest()[:8]}" if weights.is_file() else ""
        return self._fitted("", digest)

    @property
    def label_description(self) -> str:
        """What a series is called that a person has drawn for the model."""
        return self._fitted("Label for ", "")

    @property
    def map_description(self) -> str:
        """What the series of a map of uncertainty is called."""
        return self._fitted("Uncertainty of ", "")

    def _fitted(self, before: str, after: str) -> str:
        ending = f" {self.version}{after}"
        return f"{before}{self.model}"[: 64 - len(ending)] + ending

    @property
    def series_number(self) -> int:
        """9, then two digits each for the parts of the version: 9000100 is 0.1.0."""
        parts = [int(part) for part in re.findall(r"\d+", self.version)[:3]]
        digits = "".join(f"{min(part, 99):02d}" for part in [*parts, 0, 0, 0][:3])
        return int(f"9{digits}")

    def uncertain_map(self, mask: np.ndarray, votes: np.ndarray) -> np.ndarray:
        """Mark in a label map where the members disagree.

        Args:
            mask: label map (*spatial).
            votes: boolean (members, classes, *spatial).

        Returns:
            uint8 (*spatial): the mask, in which such voxels have the values of :attr:`inside`, and beyond it those of
            :attr:`outside`, of the class that most members have.
        """
        share = votes.mean(0)
        split = (share > 0) & (share < 1)
        marked = mask.astype(np.uint8)
        for one, unsure, voxels in zip(self.classes, self.inside, split):
            marked[voxels & (mask == one.value)] = unsure.value
        most = np.array([one.value for one in self.outside], dtype=np.uint8)[np.where(split, share, 0).argmax(0)]
        beyond = split.any(0) & (mask == 0)
        marked[beyond] = most[beyond]
        return marked
