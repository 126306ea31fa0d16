"""A folder of one's own: ``images/`` and ``labels/``, matched by name, of one rater or several."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from monai.data.utils import to_affine_nd

from ...errors import InputError
from ..datalist import is_dicom_file, stem_of
from ..reading import IMAGE_SUFFIXES, NIFTI, PICTURES, files_below, load_image, open_picture
from .layout import Case, CaseFiles, Layout, check_label_values, same_size

__all__ = ["find"]

JPEG = (".jpg", ".jpeg")
JPEG_CUT = 127  # compression blurs the edge of a mask
RATER = re.compile(r"labels_(\d+)")  # folder of one rater
CODES = ("channels", "bits")  # of several raters in one picture


def _index(folder: Path) -> dict[str, Path]:
    """Images below a folder by their relative path without suffix; the folder of a DICOM series is one image.

    Raises:
        InputError: where two have the same name.
    """
    found: dict[str, Path] = {}
    for path in files_below(folder):
        if path.name.lower().endswith(IMAGE_SUFFIXES):
            image = path
        elif is_dicom_file(path) and path.parent != folder:
            image = path.parent
        else:
            continue
        name = image.relative_to(folder).with_name(stem_of(image.name) if image.is_file() else image.name).as_posix()
        if found.setdefault(name, image) != image:
            raise InputError(f"{image}: has the same name as {found[name].name}: rename one of them.")
    return found


def find(source: Path, patient_pattern: str | None = None, raters: str | None = None) -> Layout:
    """Match ``images/`` and ``labels/`` by name (without suffix): NIfTI, NRRD, MHA, PNG, JPEG, BMP, or a DICOM series
    in a folder of its own.

    Volumes that are not NIfTI are written as NIfTI, pictures are copied. Masks of 0 and 255 become 0 and 1, JPEG masks
    are cut at 127, a palette picture's indices are its labels. Images without label are listed as ``unlabelled``.

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
        InputError: where a folder is missing, names collide, or nothing matches.
    """
    if raters is not None and raters not in CODES:
        raise InputError(f"raters={raters!r} must be channels or bits, where each file in labels/ has several raters.")
    images, labels = _index(source / "images"), _labels(source, raters)
    labelled = {name: path for found in labels.values() for name, path in found.items()}
    if not images.keys() & labelled.keys():
        raise InputError(
            f"{source}: no image has a label of the same name ({next(iter(images), 'no image')!r}, "
            f"{next(iter(labelled), 'no label')!r}): name them alike."
        )
    notes = [
        f"{path}: has no image and is left out."
        for found in labels.values()
        for name, path in found.items()
        if name not in images
    ]
    bare = [name for name in images if name not in labelled]
    if bare:
        notes.append(f"{len(bare)} images have no label and are listed as 'unlabelled': {', '.join(bare[:3])} ...")
    bits = _used_bits(path for name, path in labelled.items() if name in images) if raters == "bits" else 0
    cases = []
    for name, path in images.items():
        masks = {folder: found[name] for folder, found in labels.items() if name in found}
        cases.append(_case(name, path, masks, _patient(name, patient_pattern), raters, bits))
    edition = f"folder, {len(images)} images and {len(labelled)} labels"
    if raters or list(labels) != ["labels"]:
        edition += f", raters as {raters}" if raters else f" in {', '.join(labels)}"
    return Layout(edition, cases, None, {"0": "image"}, None, notes)


def _labels(source: Path, raters: str | None) -> dict[str, dict[str, Path]]:
    """The files in each folder of labels by name: ``labels``, and those of raters in the order of their numbers."""
    numbered = {path.name: int(match[1]) for path in source.iterdir() if (match := RATER.fullmatch(path.name))}
    folders = [name for name in ("labels", *sorted(numbered, key=numbered.__getitem__)) if (source / name).is_dir()]
    for name, is_there in (("images", (source / "images").is_dir()), ("labels", bool(folders))):
        if not is_there:
            raise InputError(f"{source}: has no folder {name}/: give a folder that holds images/ and labels/.")
    if raters is not None and folders != ["labels"]:
        raise InputError(
            f"{source}: raters={raters!r} reads all raters from the files in labels/, but there is {folders[-1]}/: "
            "leave one of both out."
        )
    return {name: _index(source / name) for name in folders}


def _used_bits(paths: Iterable[Path]) -> int:
    """The number of raters in a set of label files whose bits are raters."""
    highest = 0
    for path in paths:
        try:
            values, affine = _read_label(path, "bits")
            _check_values(values, affine, path, "bits")
        except InputError:  # is named when the case is written
            continue
        highest = max(highest, int(values.max()))
    return max(1, highest.bit_length())


def _case(name: str, image: Path, masks: Mapping[str, Path], patient: str, raters: str | None, bits: int) -> Case:
    plain = name.replace("/", "__")
    recipe = f"{raters} {bits}" if raters else " ".join(masks) if set(masks) - {"labels"} else ""
    convert = partial(_convert, name=plain, image=image, masks=masks, raters=raters, bits=bits)
    return Case(plain, patient, [image, *masks.values()], convert, None if masks else "unlabelled", recipe)


def _patient(name: str, pattern: str | None) -> str:
    if pattern is None:
        return name
    try:
        found = re.search(pattern, name)
        patient = found[1] if found else None
    except (re.error, IndexError) as error:
        raise InputError(f"patient_pattern={pattern!r}: {error}: give a regular expression with one group.") from error
    if patient is None:
        raise InputError(f"patient_pattern={pattern!r} does not fit the name {name!r}: correct it.")
    return patient


def _convert(
    files: CaseFiles, name: str, image: Path, masks: Mapping[str, Path], raters: str | None, bits: int
) -> list[dict[str, Any]]:
    """Write a case; copied where the training reads the format as it is, as NIfTI otherwise."""
    volume = load_image(image)
    item: dict[str, Any] = {"image": ""}
    if image.is_file() and image.name.lower().endswith((*NIFTI, *PICTURES)):
        suffix = ".nii.gz" if image.name.lower().endswith(".nii.gz") else image.suffix.lower()
        item["image"] = files.copy(image, f"images/{name}{suffix}")
    else:
        item["image"] = files.nifti(volume.numpy(), to_affine_nd(3, volume.affine).numpy(), f"images/{name}.nii.gz")
    for folder, path in masks.items():
        maps, affine = _read_label(path, raters)
        size = tuple(volume.shape[:0:-1]) if affine is None else volume.shape[1:]  # a picture has its rows first
        same_size(path, maps.shape[1:], image, size)
        _check_values(maps, affine, path, raters)
        if raters is None:
            written = _write_label(files, _binary(maps[0]), affine, f"{folder}/{name}")
            item.update({"label": written} if folder == "labels" else {"labels": [*item.get("labels", []), written]})
        else:
            several = [_binary(one) for one in maps] if raters == "channels" else _bits(maps[0], bits)
            item["labels"] = [
                _write_label(files, one, affine, f"labels_{i}/{name}") for i, one in enumerate(several, 1)
            ]
    return [item]


def _read_label(path: Path, raters: str | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Read label values, with their channels first: (channels, rows, columns) of a picture or (channels, x, y, z).

    Returns:
        The values, and the affine of a volume.

    Raises:
        InputError: for a file that cannot be read, or pictures that hold no labels.
    """
    if path.name.lower().endswith(PICTURES):
        if raters and path.suffix.lower() in JPEG:
            raise InputError(f"{path}: JPEG blurs what raters={raters!r} reads: save it as PNG.")
        if raters == "channels":
            values = np.asarray(open_picture(path))
            return (values[None] if values.ndim == 2 else np.moveaxis(values, -1, 0)), None
        return _picture_labels(path)[None], None
    mask = load_image(path)
    return mask.numpy(), to_affine_nd(3, mask.affine).numpy()


def _check_values(maps: np.ndarray, affine: np.ndarray | None, path: Path, raters: str | None) -> None:
    """Refuse a volume that holds no label values, or several channels where they are not raters."""
    if affine is None:
        return
    check_label_values(maps, path)
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


def _binary(label: np.ndarray) -> np.ndarray:
    """Masks of 0 and 255 become 0 and 1."""
    return (label > 0).astype(np.uint8) if np.isin(label, (0, 255)).all() else label


def _picture_labels(path: Path) -> np.ndarray:
    """Label values (rows, columns) of a picture.

    Raises:
        InputError: for colours.
    """
    values = np.asarray(open_picture(path))
    if values.ndim == 3:
        if (values[..., :3] != values[..., :1]).any() and path.suffix.lower() not in JPEG:
            raise InputError(f"{path}: holds colours: save label values, 0 for the background.")
        values = values[..., 0]
    return values > JPEG_CUT if path.suffix.lower() in JPEG else values
