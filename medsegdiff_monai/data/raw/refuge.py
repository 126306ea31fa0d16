"""REFUGE and REFUGE-2: fundus photographs with masks of optic disc and cup."""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np

from ...errors import InputError
from ...settings import as_bool
from ..pictures import PICTURES, open_picture, picture_values
from ..reading import files_below
from .layout import Case, CaseFiles, Layout, same_size

__all__ = ["find"]

LABELS = {"0": "background", "1": "optic disc (rim)", "2": "optic cup"}
REGIONS = {"disc": [1, 2], "cup": [2]}
CROP = 2.5  # side of the disc-centred crop, in diameters of the disc
SPLITS = {"train": "training", "val": "validation", "test": "test"}
# where a file belongs, by the parts of its path: the first rule that fits decides
PLACES = (
    (r"refuge1-train|(annotation-)?training-?400", "R1", "train"),
    (r"refuge1-val|refuge-validation400(-gt)?", "R1", "val"),
    (r"refuge1-test|(refuge-)?test400|refuge-test-gt", "R1", "test"),
    (r"refuge2-test", "R2", "test"),
    (r"refuge2-val(idation)?|validation", "R2", "val"),
    (r"test(?=/disc_masks?(/|$))", "R2", "test"),
    (r"train(?=/(images|mask)(/|$))", "K", "train"),
    (r"val(?=/(images|mask)(/|$))", "K", "val"),
    (r"test(?=/(images|mask)(/|$))", "K", "test"),
)
STEMS = {"g": "train", "n": "train", "v": "val", "t": "test"}  # of REFUGE-1, where the folder does not tell
EDITIONS = {"R1": "REFUGE-1", "R2": "REFUGE-2", "K": "the Kaggle repackaging of REFUGE"}


def _place(path: Path, source: Path) -> tuple[str, str] | None:
    """Edition and split of a file, or None where it is none of the data set's."""
    folders = path.relative_to(source).parent.as_posix().lower()
    for pattern, edition, split in PLACES:
        if re.search(rf"(^|/)({pattern})(?=/|$)", folders):
            return edition, split
    found = re.fullmatch(r"([gnvt])\d{4}", path.stem.lower())
    return ("R1", STEMS[found[1]]) if found else None


def _is_mask(path: Path, source: Path) -> bool:
    return any("mask" in part.lower() for part in path.relative_to(source).parts[:-1]) or path.suffix.lower() == ".bmp"


def find(source: Path, crop_disc: bool | str = False) -> Layout:
    """Recognise the edition and list the photographs with their masks.

    Layouts: REFUGE-1's seven archives unpacked side by side; REFUGE-2's tree ``Train/{REFUGE1-train,REFUGE1-val,
    REFUGE1-test}``, ``Validation``, ``Test``, whose ``Train`` is REFUGE-1 as a whole (1200/400/400, the split that is
    kept); the Kaggle repackaging ``{train,val,test}/{images,mask}``.

    Quirks:

    - Masks hold 0 = cup, 128 = rim, 255 = background (refuge.grand-challenge.org/Details), as BMP or PNG, grey,
      palette or RGB; they are read as grey with the thresholds 64 and 192.
    - Masks are found by stem, at any depth: test masks may lie under ``G/`` and ``N/`` or flat
      (bob.ip.binseg ``data/refuge``), folders may be doubled, ``Disc_Mask`` be ``Disc_Masks``.
    - Stems collide between editions (``V0001``), so names carry ``R1-`` and ``R2-`` (``K-`` for the repackaging).
    - ``__MACOSX`` and ``*Illustration*`` folders are passed over (mmsegmentation
      ``tools/dataset_converters/refuge.py``), and ``Training400/AMD``, which has no masks and
      a corrupt ``A0012.jpg`` (bob ``doc/install.rst``).
    - ``Disc_Cup_Masks.zip`` inside an archive must be unpacked first; the message names it.
    - The multi-rater repackaging (``<id>_seg_cup_1.png``) is refused.
    - Label tables, some without header, are not needed and not read.
    - Test photographs without mask stay in ``test``; others without mask are left out and named.

    Args:
        source: folder of the raw download.
        crop_disc: crop to a square of 2.5 disc diameters, centred on the disc (taken from the mask).

    Returns:
        The data set.

    Raises:
        InputError: where there is nothing of REFUGE's, or no mask.
    """
    crop = as_bool(crop_disc)
    images: dict[tuple[str, str, str], Path] = {}
    masks: dict[tuple[str, str, str], Path] = {}
    files = [p for p in files_below(source) if "illustration" not in str(p.relative_to(source)).lower()]
    for path in files:
        if path.suffix.lower() not in PICTURES or "amd" in path.relative_to(source).as_posix().lower().split("/"):
            continue
        if re.search(r"_seg_(cup|disc)_\d$", path.stem):
            raise InputError(f"{path}: is of the multi-rater repackaging of REFUGE: give the owners' archives.")
        place = _place(path, source)
        if place is not None:
            (masks if _is_mask(path, source) else images).setdefault((*place, path.stem.lower()), path)
    if not images:
        raise InputError(
            f"{source}: holds no REFUGE photograph (Training400/, REFUGE2/Train/ ...): give the unpacked download."
        )
    if not masks:
        packed = [p for p in files if p.suffix.lower() == ".zip"]
        remedy = f"unpack {packed[0]}" if packed else "add the annotation archives"
        raise InputError(f"{source}: holds {len(images)} photographs and no mask: {remedy}.")
    return _layout(images, masks, crop)


def _layout(images: dict[tuple[str, str, str], Path], masks: dict[tuple[str, str, str], Path], crop: bool) -> Layout:
    cases, notes = [], []
    for key, image in sorted(images.items()):
        edition, split, _ = key
        mask = masks.get(key)
        name = f"{edition}-{image.stem}"
        if mask is None and (crop or split != "test"):
            notes.append(f"{image}: has no mask and is left out.")
            continue
        cases.append(
            Case(
                name,
                name,
                [image] if mask is None else [image, mask],
                partial(_convert, name=name, image=image, mask=mask, crop=crop),
                SPLITS[split],
            )
        )
    notes += [f"{masks[key]}: has no photograph and is left out." for key in sorted(masks.keys() - images.keys())]
    counts = Counter(edition for edition, _, _ in images)
    edition = " and ".join(f"{EDITIONS[key]} ({counts[key]} photographs)" for key in sorted(counts))
    return Layout(edition, cases, LABELS, {"0": "R", "1": "G", "2": "B"}, REGIONS, notes)


def _disc_window(label: np.ndarray, mask: Path) -> tuple[slice, slice]:
    """Rows and columns of the square around the disc, moved where the picture's border is in the way."""
    disc = np.argwhere(label > 0)
    if not len(disc):
        raise InputError(f"{mask}: shows no disc to crop to: correct it, or prepare without crop_disc.")
    low, high = disc.min(0), disc.max(0) + 1
    side = min(int(CROP * (high - low).max()), *label.shape)
    start = np.clip((low + high - side) // 2, 0, np.array(label.shape) - side)
    return slice(start[0], start[0] + side), slice(start[1], start[1] + side)


def _convert(files: CaseFiles, name: str, image: Path, mask: Path | None, crop: bool) -> list[dict[str, str]]:
    """Write a case: the photograph as it is, or its crop as PNG, and the label map."""
    photograph = open_picture(image)
    if mask is None:
        return [{"image": files.copy(image, f"images/{name}{image.suffix.lower()}")}]
    grey = picture_values(mask)
    same_size(mask, grey.shape, image, (photograph.height, photograph.width))
    if grey[[0, 0, -1, -1], [0, -1, 0, -1]].min() < 192:
        raise InputError(f"{mask}: has no background in its corners, which is 255 in REFUGE's masks: replace it.")
    label = np.where(grey < 64, 2, np.where(grey < 192, 1, 0))
    if crop:
        window = _disc_window(label, mask)
        label = label[window]
        target = files.picture(np.asarray(photograph.convert("RGB"))[window], f"images/{name}.png")
    else:
        target = files.copy(image, f"images/{name}{image.suffix.lower()}")
    return [{"image": target, "label": files.label_picture(label, f"labels/{name}.png")}]
