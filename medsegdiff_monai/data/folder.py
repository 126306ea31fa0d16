"""A folder of one's own: ``images/`` and ``labels/``, matched by name."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import numpy as np
from monai.data.utils import to_affine_nd

from ..errors import InputError
from .datalist import is_dicom_file, stem_of
from .layout import Case, CaseFiles, Layout, check_label_values, same_size
from .reading import IMAGE_SUFFIXES, NIFTI, PICTURES, files_below, load_image, open_picture

__all__ = ["find"]

JPEG_CUT = 127  # compression blurs the edge of a mask


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


def find(source: Path, patient_pattern: str | None = None) -> Layout:
    """Match ``images/`` and ``labels/`` by name (without suffix): NIfTI, NRRD, MHA, PNG, JPEG, BMP, or a DICOM series
    in a folder of its own.

    Volumes that are not NIfTI are written as NIfTI, pictures are copied. Masks of 0 and 255 become 0 and 1, JPEG masks
    are cut at 127, a palette picture's indices are its labels. Images without label are listed as ``unlabelled``.

    Args:
        source: folder that holds ``images/`` and ``labels/``.
        patient_pattern: regular expression whose first group, found in a name, is the patient; by default each image
            is a patient of its own.

    Returns:
        The data set.

    Raises:
        InputError: where a folder is missing, names collide, or nothing matches.
    """
    for name in ("images", "labels"):
        if not (source / name).is_dir():
            raise InputError(f"{source}: has no folder {name}/: give a folder that holds images/ and labels/.")
    images, labels = _index(source / "images"), _index(source / "labels")
    if not images.keys() & labels.keys():
        raise InputError(
            f"{source}: no image has a label of the same name ({next(iter(images), 'no image')!r}, "
            f"{next(iter(labels), 'no label')!r}): name them alike."
        )
    notes = [f"{path}: has no image and is left out." for name, path in labels.items() if name not in images]
    bare = [name for name in images if name not in labels]
    if bare:
        notes.append(f"{len(bare)} images have no label and are listed as 'unlabelled': {', '.join(bare[:3])} ...")
    cases = [
        Case(
            name.replace("/", "__"),
            _patient(name, patient_pattern),
            [path, labels[name]] if name in labels else [path],
            partial(_convert, name=name.replace("/", "__"), image=path, label=labels.get(name)),
            None if name in labels else "unlabelled",
        )
        for name, path in images.items()
    ]
    return Layout(f"folder, {len(images)} images and {len(labels)} labels", cases, None, {"0": "image"}, None, notes)


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


def _convert(files: CaseFiles, name: str, image: Path, label: Path | None) -> list[dict[str, str]]:
    """Write a case; copied where the training reads the format as it is, as NIfTI otherwise."""
    volume = load_image(image)
    item = {"image": ""}
    if image.is_file() and image.name.lower().endswith((*NIFTI, *PICTURES)):
        suffix = ".nii.gz" if image.name.lower().endswith(".nii.gz") else image.suffix.lower()
        item["image"] = files.copy(image, f"images/{name}{suffix}")
    else:
        item["image"] = files.nifti(volume.numpy(), to_affine_nd(3, volume.affine).numpy(), f"images/{name}.nii.gz")
    if label is None:
        return [item]
    if label.name.lower().endswith(PICTURES):
        values = _picture_labels(label)
        same_size(label, values.shape, image, tuple(volume.shape[:0:-1]))
        return [{**item, "label": files.label_picture(_binary(values), f"labels/{name}.png")}]
    mask = load_image(label)
    same_size(label, mask.shape[1:], image, volume.shape[1:])
    check_label_values(mask.numpy(), label)
    if mask.shape[0] != 1:
        raise InputError(f"{label}: a label map has one channel, this has {mask.shape[0]}: save label values.")
    affine = to_affine_nd(3, mask.affine).numpy()
    return [{**item, "label": files.label_nifti(_binary(mask.numpy()[0]), affine, f"labels/{name}.nii.gz")}]


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
        if (values[..., :3] != values[..., :1]).any() and path.suffix.lower() not in (".jpg", ".jpeg"):
            raise InputError(f"{path}: holds colours: save label values, 0 for the background.")
        values = values[..., 0]
    return values > JPEG_CUT if path.suffix.lower() in (".jpg", ".jpeg") else values
