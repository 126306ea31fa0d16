"""What the values of a folder's masks mean: labels, or grey levels with a foreground among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.ndimage import maximum_filter, minimum_filter

from ...errors import InputError
from ..pictures import MAX_PICTURE_LABELS, too_many

__all__ = ["Coding", "MaskTraits", "coding_of", "traits_of"]

FULL_SCALES = (255, 65535)  # foreground of masks of 8 and 16 bits
GREY = 64  # labels are small numbers; grey levels reach this
KEPT_VALUES = 1000  # of one file; more are no labels
TAIL = 4 / 255  # share of the scale by which smoothing leaves even areas off black and white
JPEG_TAIL = 0.1  # the same of compression
MIN_EDGE_LEVELS = 8  # fewer levels between black and white may well be labels of thin structures
REMEDY = "save label values, 0 for the background, as PNG and without soft edges."


@dataclass(frozen=True)
class MaskTraits:
    """What one mask holds.

    Args:
        path: its file.
        values: all of its values.
        flat: of a picture, the values that fill a square of 3 x 3 pixels somewhere.
        stored: ``volume``, or how :func:`medsegdiff_monai.data.pictures.mask_values` found it.
        light: share of the voxels that are foreground: not 0, or of grey levels those in the upper half.
    """

    path: Path
    values: frozenset[float]
    flat: frozenset[float] = frozenset()
    stored: str = "volume"
    light: float = 0.0

    @property
    def top(self) -> float:
        """The greatest value."""
        return max(self.values, default=0)

    @property
    def is_grey(self) -> bool:
        """Whether the values may be grey levels."""
        return self.stored in ("grey", "alpha", "lossy") and self.top >= GREY


@dataclass(frozen=True)
class Coding:
    """How label maps are made of the values of masks.

    Args:
        cut: what lies above it is foreground; None where values are labels.
        top: value that a mask with a foreground reaches; 0 where any will do.
        notes: what was decided, in words.
    """

    cut: float | None = None
    top: float = 0
    notes: tuple[str, ...] = ()

    def labels(self, values: np.ndarray, path: Path) -> np.ndarray:
        """The label map of one mask.

        Raises:
            InputError: for a mask that is much darker than the others.
        """
        if self.cut is None or values.max() <= 1:
            return values
        if values.max() < (1 - JPEG_TAIL) * self.top:
            raise InputError(f"{path}: holds {values.max():g} at most, other masks {self.top:g}: {REMEDY}")
        return (values > self.cut).astype(np.uint8)


def traits_of(path: Path, values: np.ndarray, stored: str) -> MaskTraits:
    """Look at the values (channels, *spatial) of one mask, stored as :class:`MaskTraits` says."""
    found = np.unique(values)[:KEPT_VALUES].tolist()
    flat: set[float] = set()
    if stored != "volume":
        for plane in values:
            even = minimum_filter(plane, 3, mode="nearest") == maximum_filter(plane, 3, mode="nearest")
            flat.update(np.unique(plane[even]).tolist())
    top = max(found, default=0)
    light = np.count_nonzero(values > (top / 2 if top >= GREY else 0)) / max(values.size, 1)
    return MaskTraits(path, frozenset(found), frozenset(flat), stored, float(light))


def coding_of(masks: Sequence[MaskTraits]) -> Coding:
    """What the values of all masks together mean.

    - 0 and 255 (65535), in all of them, are 0 and 1.
    - Black and white with grey levels along the edges, from smoothing or JPEG, are cut half-way.
    - All else are label values, which stay as they are.

    Raises:
        InputError: for what may mean several things: JPEG of label values, masks of different codings, soft edges
            between more than two labels, numbers of objects.
    """
    for mask in masks:
        if mask.stored == "lossy" and 0 < mask.top < GREY:
            raise InputError(
                f"{mask.path}: JPEG blurs label values, of which the greatest here is {mask.top:g}: {REMEDY}"
            )
    notes = (*_alpha_note(masks), *_light_note(masks))
    if any(mask.top > 1 for mask in masks) and all(_is_binary(mask) for mask in masks):
        return Coding(0, notes=notes)
    grey = [mask for mask in masks if mask.is_grey]
    if grey and _has_soft_edges(grey):
        return _soft_coding(masks, grey, notes)
    _check_labels(masks)
    return Coding(notes=(*notes, *_numbering_note(masks)))


def _is_binary(mask: MaskTraits) -> bool:
    return mask.values <= {0, 1} or any(mask.values <= {0, full} for full in FULL_SCALES)


def _is_white(level: float) -> bool:
    return any((1 - JPEG_TAIL) * full <= level <= full for full in FULL_SCALES)


def _has_soft_edges(masks: Sequence[MaskTraits]) -> bool:
    """Whether grey masks are black and white but for their edges; else they hold labels.

    Raises:
        InputError: where it may be either.
    """
    lossy = any(mask.stored == "lossy" for mask in masks)
    values = frozenset[float]().union(*(mask.values for mask in masks))
    flat = frozenset[float]().union(*(mask.flat for mask in masks))
    top = max(values)
    tail = top * (JPEG_TAIL if lossy else TAIL)
    between = {value for value in values if tail < value < top - tail}
    if not lossy and (not between or (len(values) <= MAX_PICTURE_LABELS and not flat <= {0, top})):
        return False
    example = max(masks, key=lambda mask: len(mask.values)).path
    if flat & between:
        raise InputError(
            f"{example}: the masks hold {len(values)} values, {min(flat & between):g} among them over whole areas, as "
            f"several labels with soft edges do: {REMEDY}"
        )
    ends = min(flat, default=top) <= tail and max(flat, default=0) >= top - tail
    if not ends or not (lossy or len(between) >= MIN_EDGE_LEVELS):
        raise InputError(
            f"{example}: the masks hold the grey levels {sorted(values)[:6]} ..., which may be labels or soft edges of "
            f"one: {REMEDY}"
        )
    return True


def _soft_coding(masks: Sequence[MaskTraits], grey: Sequence[MaskTraits], notes: tuple[str, ...]) -> Coding:
    other = next((mask for mask in masks if not mask.is_grey and not mask.values <= {0, 1}), None)
    if other is not None:
        raise _mixed(grey[0], other)
    top = max(mask.top for mask in grey)
    soft = [mask for mask in grey if not mask.values <= {0, top}]
    note = (
        f"{len(soft)} masks have soft edges (smoothing or JPEG), such as {soft[0].path.name}; what is brighter than "
        f"{top / 2:g} of {top:g} is foreground."
    )
    return Coding(top / 2, top, (*notes, note))


def _mixed(one: MaskTraits, other: MaskTraits) -> InputError:
    return InputError(
        f"{one.path}: its greatest value is {one.top:g}, that of {other.path.name} is {other.top:g}: a label must have "
        f"the same value in all masks; {REMEDY}"
    )


def _check_labels(masks: Sequence[MaskTraits]) -> None:
    """Refuse label values that are grey levels in some masks, or number objects."""
    bright = [mask for mask in masks if mask.is_grey or mask.top in FULL_SCALES]
    if bright and all(len(mask.values - {0}) == 1 for mask in bright):
        white = {mask.top: mask for mask in bright if _is_white(mask.top)}
        small = [mask for mask in masks if 0 < mask.top < GREY]
        if white and (small or len(white) > 1):
            raise _mixed(white[max(white)], small[0] if small else white[min(white)])
    pictures = [mask for mask in masks if mask.stored != "volume"]
    values = frozenset[float]().union(*(mask.values for mask in pictures))
    if len(values) > MAX_PICTURE_LABELS:
        most = max(pictures, key=lambda mask: len(mask.values))
        where = f"{most.path}: " if len(most.values) > MAX_PICTURE_LABELS else f"{most.path.parent}: "
        raise InputError(where + too_many(max(len(values), len(most.values))))


def _alpha_note(masks: Sequence[MaskTraits]) -> tuple[str, ...]:
    found = [mask for mask in masks if mask.stored == "alpha"]
    if not found:
        return ()
    return (
        f"{len(found)} masks are one colour throughout, such as {found[0].path.name}; their alpha channel is taken.",
    )


def _light_note(masks: Sequence[MaskTraits]) -> tuple[str, ...]:
    """A word where black may be what is marked, or nothing is background."""
    if masks and not any(0 in mask.values for mask in masks):
        return (
            f"no mask holds 0, the background, {masks[0].path.name} nothing below {min(masks[0].values):g}: every "
            "voxel will belong to a class; save the background as 0.",
        )
    light = [mask for mask in masks if mask.light > 0.5]
    if 2 * len(light) <= len(masks):
        return ()
    return (
        f"{len(light)} of {len(masks)} masks, such as {light[0].path.name}, are foreground in most of their area: "
        "make sure that 0 is the background.",
    )


def _numbering_note(masks: Sequence[MaskTraits]) -> tuple[str, ...]:
    """A word where each mask counts from 1, to another number each."""
    counts = {len(mask.values - {0}) for mask in masks if mask.values - {0} == set(range(1, int(mask.top) + 1))}
    numbered = all(mask.values - {0} == set(range(1, int(mask.top) + 1)) for mask in masks)
    if not numbered or len(counts) < 3 or max(counts) < 4:
        return ()
    return (
        f"the masks hold the labels 1 to {max(counts)}, fewer in some: if they number objects, not classes, "
        "save 1 for all of them.",
    )
