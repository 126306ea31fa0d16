"""BraTS 2020, 2021 and 2023 (adult glioma): four MR modalities with tumour labels."""

from __future__ import annotations

import re
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.affines import voxel_sizes

from ...errors import InputError
from ..reading import NIFTI, files_below, load_image
from .layout import Case, CaseFiles, Layout, same_size

__all__ = ["find"]

MODALITIES = ("t1", "t1ce", "t2", "flair")  # the order of the public MedSegDiff's loader
NAMES_2023 = {"t1n": "t1", "t1c": "t1ce", "t2w": "t2", "t2f": "flair"}
# case, its patient, and the whole suffix: "_t1" begins "_t1ce"
FILES = re.compile(
    r"(?P<case>BraTS20_(?:Training|Validation)_\d+|BraTS2021_\d+)_(?P<old>t1|t1ce|t2|flair|seg)\.nii(?:\.gz)?"
    r"|(?P<case23>BraTS-GLI-\d+-\d+)-(?P<new>t1n|t1c|t2w|t2f|seg)\.nii(?:\.gz)?",
    re.I,
)
FOLDERS = re.compile(r"BraTS20_(?:Training|Validation)_\d+|BraTS2021_\d+|BraTS-GLI-\d+-\d+", re.I)
ENHANCING = {"2020": 4, "2021": 4, "2023": 3}  # value of the enhancing tumour by edition
LABELS_THREE = {"0": "background", "1": "necrotic core", "2": "oedema", "3": "enhancing tumour"}
REGIONS_THREE = {"WT": [1, 2, 3], "TC": [1, 3], "ET": [3]}
LABELS_WHOLE = {"0": "background", "1": "whole tumour"}


def _edition(case: str) -> str:
    return "2020" if case.lower().startswith("brats20_") else "2021" if "2021" in case[:9] else "2023"


def _collect(source: Path) -> tuple[dict[str, dict[str, Path]], list[str]]:
    """Files of each case by modality, and what was decided; a case that occurs twice counts once."""
    cases: dict[str, dict[str, Path]] = defaultdict(dict)
    spare: dict[str, list[Path]] = defaultdict(list)
    for path in files_below(source):
        found = FILES.fullmatch(path.name)
        if found:
            case = found["case"] or found["case23"]
            kind = (found["old"] or found["new"]).lower()
            cases[case].setdefault(NAMES_2023.get(kind, kind), path)
        elif path.name.lower().endswith(NIFTI) and FOLDERS.fullmatch(path.parent.name):
            spare[path.parent.name].append(path)
    notes = []
    for case, paths in spare.items():
        if case in cases and "seg" not in cases[case] and len(paths) == 1:
            cases[case]["seg"] = paths[0]
            notes.append(f"{case}: {paths[0].name} is taken as its mask.")
    return dict(sorted(cases.items())), notes


def find(source: Path, slices: str = "3D", regions: str = "three") -> Layout:
    """Recognise the edition and list the cases.

    Layouts, at any depth: ``BraTS20_Training_001/BraTS20_Training_001_flair.nii`` (or ``.nii.gz``),
    ``BraTS2021_00000/BraTS2021_00000_t1.nii.gz``, ``BraTS-GLI-00000-000/BraTS-GLI-00000-000-t1n.nii.gz``.

    Quirks:

    - Enhancing tumour is 4 up to 2021 and 3 in 2023 (MONAI ``ConvertToMultiChannelBasedOnBratsClasses``; torch-em); it
      becomes 3. A mask with both is BraTS 2024's, where 4 is the resection cavity (nnU-Net ``Dataset226``), and is
      refused.
    - Mask of case 355 of 2020 is named ``W39_1998.09.19_Segm.nii``: the one unmatched NIfTI is taken.
    - ``BraTS2021_Training_Data.tar`` on Kaggle has no parent folder, and brings cases 00495 and 00621 twice: files are
      found by name, a case counts once.
    - Some cases lack a mask, as the validation archives do: they are listed as ``unlabelled``.
    - ``_t1`` begins ``_t1ce``: whole suffixes are matched. Stray files and tables are passed over.
    - Geometry is compared within a case, since origins differ between copies; masks are rounded, because scaled NIfTI
      reads as float. Axial is the third axis.
    - The last number of a 2023 name is the time point: the patient is the one before.

    Args:
        source: folder of the raw download.
        slices: ``3D`` for four-channel volumes, ``2D`` for the axial slices that contain brain, standardised by volume.
        regions: ``three`` for ET, TC and WT; ``whole`` for the whole tumour alone.

    Returns:
        The data set.

    Raises:
        InputError: where there is nothing of BraTS's, or several editions.
    """
    slices, regions = str(slices).upper(), str(regions).lower()
    if slices not in ("2D", "3D") or regions not in ("three", "whole"):
        raise InputError(f"slices={slices}, regions={regions}: slices is 2D or 3D, regions is three or whole.")
    found, notes = _collect(source)
    editions = sorted({_edition(case) for case in found})
    if not editions:
        raise InputError(f"{source}: holds no case of BraTS 2020, 2021 or 2023: give the unpacked download.")
    if len(editions) > 1:
        raise InputError(
            f"{source}: holds cases of BraTS {' and '.join(editions)}, which share patients: give one at a time."
        )
    cases = [_case(case, files, slices, regions) for case, files in found.items()]
    bare = [case for case, files in found.items() if "seg" not in files]
    if bare:
        notes.append(f"{len(bare)} cases have no mask and are listed as 'unlabelled': {', '.join(bare[:3])} ...")
    return Layout(
        f"BraTS {editions[0]}, {len(cases)} cases, {slices}",
        cases,
        LABELS_THREE if regions == "three" else LABELS_WHOLE,
        {str(i): name for i, name in enumerate(MODALITIES)},
        REGIONS_THREE if regions == "three" else None,
        notes,
    )


def _case(case: str, files: dict[str, Path], slices: str, regions: str) -> Case:
    patient = case.rsplit("-", 1)[0] if _edition(case) == "2023" else case
    return Case(
        case,
        patient,
        list(files.values()),
        partial(_convert, case=case, sources=files, slices=slices, regions=regions),
        None if "seg" in files else "unlabelled",
    )


def _label(seg: np.ndarray, path: Path, edition: str, regions: str) -> np.ndarray:
    """Label map with the enhancing tumour as 3, or the whole tumour as 1."""
    if not np.isfinite(seg).all():
        raise InputError(f"{path}: holds NaN or infinite values: replace the file.")
    label = np.rint(seg).astype(np.int16)
    values = set(np.unique(label).tolist())
    if {3, 4} <= values:
        raise InputError(
            f"{path}: holds both 3 and 4: BraTS {edition} has one of them, 2024 both (4 is its resection cavity): "
            "take the case out."
        )
    allowed = {0, 1, 2, ENHANCING[edition]}
    if not values <= allowed:
        raise InputError(
            f"{path}: holds {sorted(values - allowed)}, BraTS {edition} has {sorted(allowed)}: replace the mask."
        )
    if regions == "whole":
        return (label > 0).astype(np.uint8)
    return np.where(label == ENHANCING[edition], 3, label).astype(np.uint8)


def _volumes(case: str, sources: dict[str, Path]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Arrays of one grid by modality, and its affine."""
    missing = [name for name in MODALITIES if name not in sources]
    if missing:
        raise InputError(f"{case}: lacks the modality {', '.join(missing)}: add the file, or take the case out.")
    first = sources[MODALITIES[0]]
    volumes: dict[str, np.ndarray] = {}
    affine = load_image(first).affine.numpy()
    for name in (*MODALITIES, *(["seg"] if "seg" in sources else [])):
        path = sources[name]
        image = load_image(path)
        if image.ndim != 4 or image.shape[0] != 1:
            raise InputError(f"{path}: has the size {list(image.shape[1:])}: a BraTS volume has three axes.")
        volumes[name] = image.numpy()[0]
        same_size(path, volumes[name].shape, first, volumes[MODALITIES[0]].shape)
        if not np.allclose(image.affine.numpy(), affine, atol=1e-3):
            raise InputError(
                f"{path}: its affine differs from that of {first.name} "
                f"(origins {image.affine[:3, 3].tolist()} and {affine[:3, 3].tolist()}): replace the file."
            )
    return volumes, affine


def _standardise(image: np.ndarray) -> np.ndarray:
    """Bring each modality (modalities, x, y, z) to mean 0 and standard deviation 1 over its brain, which is not 0.

    MR intensities have no unit. Slices that were standardised one by one would show the same tissue differently.
    """
    out = image.astype(np.float32)
    for volume in out:
        brain = volume[volume != 0]
        volume -= brain.mean() if brain.size else 0
        volume /= max(float(brain.std()), 1e-6) if brain.size else 1
    return out


def _convert(files: CaseFiles, case: str, sources: dict[str, Path], slices: str, regions: str) -> list[dict[str, Any]]:
    """Write a case as one volume of four channels, or as standardised axial slices, one file of four channels each."""
    volumes, affine = _volumes(case, sources)
    label = _label(volumes["seg"], sources["seg"], _edition(case), regions) if "seg" in volumes else None
    image = np.stack([volumes[name] for name in MODALITIES])
    if slices == "3D":
        item: dict[str, Any] = {"image": files.nifti(image, affine, f"images/{case}.nii.gz")}
        if label is not None:
            item["label"] = files.label_nifti(label, affine, f"labels/{case}.nii.gz")
        return [item]
    items = []
    spacing = voxel_sizes(affine)[:2]
    standard = _standardise(image)
    for k in np.flatnonzero((image != 0).any(axis=(0, 1, 2))):
        name = f"{case}_{k:03d}.mha"
        item = {"image": files.meta_image(standard[..., k], spacing, f"images/{name}")}
        if label is not None:
            files.note_values(label[..., k])
            item["label"] = files.meta_image(label[None, ..., k], spacing, f"labels/{name}")
        items.append(item)
    return items
