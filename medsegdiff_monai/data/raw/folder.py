"""A folder of one's own: ``images/`` and ``labels/``, matched by name, of one rater or several."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd

from ...errors import InputError
from ..dicom import is_dicom_file
from ..names import folded, safe_name, stem_of
from ..pictures import PICTURES, is_turned, mask_values, stored_values
from ..reading import IMAGE_SUFFIXES, NIFTI, files_below, load_image
from ..rules import place_label, whole_numbers
from .layout import Case, CaseFiles, Layout, same_size
from .masks import Coding, MaskTraits, coding_of, traits_of

__all__ = ["find"]

COMMON = ("labels", "masks")  # folder of the one rater, or of the consensus
RATER = re.compile(r"labels_(\d+)")  # folder of one rater
CODES = ("channels", "bits")  # of several raters in one picture
BESIDE = (".raw", ".zraw")  # voxels of a header's file
SHOWN = 10  # names of a note
# what people add to names, of which the rest tells what belongs together
AFFIX = r"(?:masks?|segmentations?|seg|labels?|ground_?truth|gt|annotations?|images?|img|0000)"
AFFIXES = re.compile(rf"(?<=.)[ _.-]+{AFFIX}$|^{AFFIX}[ _.-]+(?=.)", re.I)


@dataclass(frozen=True)
class Reading:
    """How the files in the folders of labels are read.

    Args:
        raters: ``channels`` or ``bits`` where each file has several raters.
        bits: the number of raters in ``bits``.
        coding: what the values mean.
    """

    raters: str | None
    bits: int
    coding: Coding

    @property
    def recipe(self) -> str:
        """What besides the files decides on the label maps that are written."""
        cut = "" if self.coding.cut is None else f"cut {self.coding.cut:g} of {self.coding.top:g}"
        return " ".join(part for part in (f"{self.raters} {self.bits}" if self.raters else "", cut) if part)


def _index(folder: Path, notes: list[str]) -> dict[str, Path]:
    """Images below a folder by their relative path without suffix; the folder of a DICOM series is one image.

    Raises:
        InputError: where two have the same name.
    """
    found: dict[str, Path] = {}
    for path in files_below(folder):
        if path.name.lower().endswith(IMAGE_SUFFIXES):
            image, stem = path, stem_of(path.name)
        elif is_dicom_file(path) and path.parent != folder:
            image, stem = path.parent, path.parent.name
        else:
            if path.suffix.lower() not in BESIDE:
                notes.append(f"{path}: {_why_not(path, folder)} and is left out.")
            continue
        name = image.relative_to(folder).with_name(stem).as_posix()
        if found.setdefault(name, image) != image:
            raise InputError(f"{image}: has the same name as {found[name].name}: rename one of them.")
    return found


def _why_not(path: Path, folder: Path) -> str:
    """Why a file is no image of a folder of images or labels."""
    if path.is_symlink() and not path.exists():
        return "is a link to what is not there"
    if is_dicom_file(path):
        return f"is a slice that lies in {folder.name}/ itself (give each series a folder there)"
    return "has no supported format"


def find(source: Path, patient_pattern: str | None = None, raters: str | None = None) -> Layout:
    """Match ``images/`` and ``labels/``, or else ``masks/``, by name.

    Files are NIfTI, NRRD, MHA, PNG, JPEG, BMP, TIFF, or a DICOM series in a folder of its own.

    Names are compared without suffix, and where that finds none, without ``_mask``, ``_seg``, ``_0000`` and the like.
    Volumes that are not NIfTI are written as NIfTI, pictures are copied. Masks of 0 and 255 in all files become 0 and
    1, soft edges (smoothing, JPEG) of such masks are cut half-way, a palette picture's indices are its labels, and of a
    drawing in one colour the alpha channel is taken (:func:`medsegdiff_monai.data.raw.masks.coding_of`). Images without
    label are listed as ``unlabelled``.

    Several raters have a folder each, ``labels_1/``, ``labels_2/`` ...; a case that is missing from one of them lacks
    that rater. ``labels/`` beside them is the consensus. Or each file in ``labels/`` has all of them:

    - ``raters="channels"``: each channel is the label map of a rater, in label values, or 0 and 255.
    - ``raters="bits"``: bit i of a value says whether rater i marked the voxel. The highest bit that any file uses
      tells how many raters there are, the same number for all cases.

    Args:
        source: folder that holds ``images/`` and ``labels/``.
        patient_pattern: regular expression whose first group, found in a name, is the patient; by default each image
            is a patient of its own.
        raters: ``channels`` or ``bits``, where each label file has several raters.

    Returns:
        The data set.

    Raises:
        InputError: where a folder is missing, names collide, nothing matches, or masks may mean several things.
    """
    if raters is not None and raters not in CODES:
        raise InputError(f"raters={raters!r} must be channels or bits, where each file in labels/ has several raters.")
    folders, notes = _folders(source, raters), list[str]()
    images = _index(source / "images", notes)
    found = {name: _index(source / name, notes) for name in folders}
    labels = {name: _matched(one, images, notes) for name, one in found.items()}
    labelled = {name: path for one in labels.values() for name, path in one.items()}
    if not labelled:
        raise InputError(
            _nothing_matches(source, images, {n: p for one in found.values() for n, p in one.items()}, folders)
        )
    _check_names(images)
    others = sorted({path.name for path in source.iterdir() if path.name[0] != "."} - {"images", *folders})
    if others:
        notes.append(f"{source}: {', '.join(others[:SHOWN])} beside images/ and {folders[0]}/ are left out.")
    notes += [*_left_over(images, labelled), *_turned("masks", labelled.values())]
    how = Reading(raters, *_survey(labels, raters))
    cases = []
    for name, path in images.items():
        masks = {folder: found[name] for folder, found in labels.items() if name in found}
        cases.append(_case(name, path, masks, _patient(name, patient_pattern), how))
    edition = f"folder, {len(images)} images and {len(labelled)} labels"
    if raters or folders[0] not in COMMON or len(folders) > 1:
        edition += f", raters as {raters}" if raters else f" in {', '.join(folders)}"
    return Layout(edition, cases, None, {"0": "image"}, None, [*how.coding.notes, *notes])


def _folders(source: Path, raters: str | None) -> list[str]:
    """The folders of labels: ``labels``, or else ``masks``, and those of raters in the order of their numbers."""
    numbered = {path.name: int(match[1]) for path in source.iterdir() if (match := RATER.fullmatch(path.name))}
    common = next((name for name in COMMON if (source / name).is_dir()), COMMON[0])
    folders = [name for name in (common, *sorted(numbered, key=numbered.__getitem__)) if (source / name).is_dir()]
    for name, is_there in (("images", (source / "images").is_dir()), ("labels", bool(folders))):
        if not is_there:
            held = ", ".join(sorted(path.name for path in source.iterdir())[:SHOWN]) or "nothing"
            raise InputError(f"{source}: has no folder {name}/ but {held}: give one that holds images/ and labels/.")
    if raters is not None and folders != [common]:
        raise InputError(
            f"{source}: raters={raters!r} reads all raters from the files in {common}/, but there is {folders[-1]}/: "
            "leave one of both out."
        )
    return folders


def _core(name: str) -> str:
    """A name without what people add to it."""
    folder, _, stem = name.rpartition("/")
    return folded(f"{folder}/{AFFIXES.sub('', stem)}")


def _matched(labels: Mapping[str, Path], images: Mapping[str, Path], notes: list[str]) -> dict[str, Path]:
    """The labels by the names of their images; those of the same name first, then those that differ by an affix.

    Raises:
        InputError: where several labels may belong to an image, or the other way round.
    """
    found = {name: path for name, path in labels.items() if name in images}
    left: dict[str, list[str]] = {}
    for name in images.keys() - found.keys():
        left.setdefault(_core(name), []).append(name)
    near = [name for name in labels if name not in found and _core(name) in left]
    for name in near:
        core = _core(name)
        rivals = [other for other in near if _core(other) == core]
        if len(rivals) > 1 or len(left[core]) > 1:
            both = ", ".join(sorted([*(labels[r].name for r in rivals), *(images[i].name for i in left[core])]))
            raise InputError(f"{labels[name]}: which of {both} belong together? Name image and label alike.")
        found[left[core][0]] = labels[name]
    if near:
        notes.append(f"{len(near)} labels are matched by part of their name, such as {labels[near[0]].name}.")
    orphans = [path for name, path in labels.items() if path not in found.values()]
    notes += [f"{path}: has no image and is left out." for path in orphans]
    return found


def _nothing_matches(
    source: Path, images: Mapping[str, Path], labels: Mapping[str, Path], folders: Iterable[str]
) -> str:
    names = []
    for folder in ("images", *folders):
        file = next(iter(files_below(source / folder)), None)
        names.append(f"{folder}/ holds {'nothing' if file is None else file.name}")
    kinds = f"save them as {', '.join(IMAGE_SUFFIXES)}, or as a folder of DICOM each"
    remedy = "name them alike" if images and labels else kinds
    return f"{source}: no image has a label of the same name ({', '.join(names)}): {remedy}."


def _plain(name: str) -> str:
    """The name of a case in the output, of its path in the source."""
    return safe_name(name.replace("/", "__"))


def _check_names(images: Mapping[str, Path]) -> None:
    """Refuse names that would be one in the output."""
    counts = Counter(folded(_plain(name)) for name in images)
    twice = [path for name, path in images.items() if counts[folded(_plain(name))] > 1]
    if twice:
        raise InputError(f"{twice[0]}: would have the same name as {twice[1]} in the output: rename one of them.")


def _left_over(images: Mapping[str, Path], labelled: Mapping[str, Path]) -> list[str]:
    """What else is worth a word: images without label, and those that their EXIF tag turns."""
    notes = []
    bare = [name for name in images if name not in labelled]
    if bare:
        more = " ..." if len(bare) > SHOWN else ""
        notes.append(
            f"{len(bare)} images have no label and are listed as 'unlabelled': {', '.join(bare[:SHOWN])}{more}"
        )
    return [*notes, *_turned("images", images.values())]


def _turned(what: str, paths: Iterable[Path]) -> list[str]:
    """A word on pictures that their EXIF tag turns."""
    turned = [path.name for path in paths if path.name.lower().endswith(PICTURES) and is_turned(path)]
    if not turned:
        return []
    return [
        f"{len(turned)} {what} are turned as their EXIF tag says, such as {turned[0]}: masks must lie on images as a "
        "viewer shows both."
    ]


def _survey(labels: Mapping[str, Mapping[str, Path]], raters: str | None) -> tuple[int, Coding]:
    """Read all files of labels; return the number of raters in their bits, and what their values mean."""
    paths = [path for found in labels.values() for path in found.values()]

    def look(path: Path) -> tuple[int, MaskTraits] | None:
        try:
            values, _, stored = _read_label(path, raters)
            _check_channels(values, path, raters)
        except InputError:  # is named when the case is written
            return None
        top = int(values.max()) if raters == "bits" else 1
        return top.bit_length(), traits_of(path, values, stored)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        seen = [one for one in pool.map(look, paths) if one is not None]
    if raters == "bits":
        return max((bits for bits, _ in seen), default=1) or 1, Coding()
    return 0, coding_of([traits for _, traits in seen])


def _case(name: str, image: Path, masks: Mapping[str, Path], patient: str, how: Reading) -> Case:
    plain = _plain(name)
    folders = " ".join(masks) if set(masks) - {*COMMON} else ""
    recipe = " ".join(part for part in (folders, how.recipe) if part)
    convert = partial(_convert, name=plain, image=image, masks=masks, how=how)
    return Case(plain, patient, [image, *masks.values()], convert, None if masks else "unlabelled", recipe)


def _patient(name: str, pattern: str | None) -> str:
    if pattern is None:
        return name.encode("utf-8", "replace").decode()  # a name may have bytes that are no text
    try:
        found = re.search(pattern, name)
        patient = found[1] if found else None
    except (re.error, IndexError) as error:
        raise InputError(f"patient_pattern={pattern!r}: {error}: give a regular expression with one group.") from error
    if patient is None:
        raise InputError(f"patient_pattern={pattern!r} does not fit the name {name!r}: correct it.")
    return patient


def _convert(files: CaseFiles, name: str, image: Path, masks: Mapping[str, Path], how: Reading) -> list[dict[str, Any]]:
    """Write a case; copied where the training reads the format as it is, as NIfTI otherwise."""
    volume = load_image(image)
    item: dict[str, Any] = {"image": ""}
    if image.is_file() and image.name.lower().endswith((*NIFTI, *PICTURES)):
        suffix = ".nii.gz" if image.name.lower().endswith(".nii.gz") else image.suffix.lower()
        item["image"] = files.copy(image, f"images/{name}{suffix}")
    else:
        item["image"] = files.nifti(volume.numpy(), to_affine_nd(3, volume.affine).numpy(), f"images/{name}.nii.gz")
    for folder, path in masks.items():
        if os.path.realpath(path) == os.path.realpath(image):
            raise InputError(f"{path}: is the image itself: put its mask there.")
        maps, affine, _ = _read_label(path, how.raters, volume)
        size = tuple(volume.shape[:0:-1]) if affine is None else volume.shape[1:]  # a picture has its rows first
        turned = [file.name for file in (image, path) if affine is None and is_turned(file)]
        if maps.shape[1:] == size[::-1] != size and turned:
            raise InputError(
                f"{path}: lies on {image.name} as both are stored, but the EXIF tag of {turned[0]} turns it: turn the "
                "other's pixels as a viewer shows it, or take the tag off."
            )
        same_size(path, maps.shape[1:], image, size)
        _check_channels(maps, path, how.raters)
        if how.raters is None:
            written = _write_label(files, how.coding.labels(maps[0], path), affine, f"{folder}/{name}")
            item.update({"label": written} if folder in COMMON else {"labels": [*item.get("labels", []), written]})
        else:
            channels = [how.coding.labels(one, path) for one in maps]
            several = channels if how.raters == "channels" else _bits(maps[0], how.bits)
            item["labels"] = [
                _write_label(files, one, affine, f"labels_{i}/{name}") for i, one in enumerate(several, 1)
            ]
    return [item]


def _read_label(
    path: Path, raters: str | None, image: MetaTensor | None = None
) -> tuple[np.ndarray, np.ndarray | None, str]:
    """Read the values of a mask, with their channels first: (channels, rows, columns) or (channels, x, y, z).

    Args:
        path: file.
        raters: see :func:`find`.
        image: (channels, *spatial), onto whose grid a volume is turned; default: it is left as it is stored.

    Returns:
        The values, the affine of a volume, and how they are stored (:class:`MaskTraits`).

    Raises:
        InputError: for a file that cannot be read, or pictures that hold no labels.
    """
    if not path.name.lower().endswith(PICTURES):
        maps = [whole_numbers(one, str(path)) for one in load_image(path).split(1)]
        if image is not None:
            maps = [place_label(one, str(path), image) for one in maps]
        return np.concatenate(maps), to_affine_nd(3, maps[0].affine).numpy(), "volume"
    if raters == "channels":
        values, stored = stored_values(path)
        values = values[None] if values.ndim == 2 else np.moveaxis(values, -1, 0)
    else:
        grey, stored = mask_values(path, alpha=raters is None)
        values = grey[None]
    if raters and stored == "lossy":
        raise InputError(f"{path}: JPEG blurs what raters={raters!r} reads: save it as PNG.")
    if not np.issubdtype(values.dtype, np.unsignedinteger):
        values = whole_numbers(MetaTensor(values.astype(np.float64)), str(path)).numpy()
    return values, None, stored


def _check_channels(maps: np.ndarray, path: Path, raters: str | None) -> None:
    """Refuse several channels where they are not raters."""
    if len(maps) != 1 and raters != "channels":
        raise InputError(f"{path}: a label map has one channel, this has {len(maps)}: save label values.")


def _write_label(files: CaseFiles, label: np.ndarray, affine: np.ndarray | None, stem: str) -> str:
    """Write a label map as PNG, or as NIfTI where it has an affine; return its path for the data list."""
    if affine is None:
        return files.label_picture(label, f"{stem}.png")
    return files.label_nifti(label, affine, f"{stem}.nii.gz")


def _bits(values: np.ndarray, number: int) -> list[np.ndarray]:
    """The mask of each rater from values whose bits are raters, the lowest first."""
    return [(values.astype(np.int64) >> i & 1).astype(np.uint8) for i in range(number)]
