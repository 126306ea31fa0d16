"""The demo's data: slices of the MNI152 T1 template with grey and white matter, from nilearn's package."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np

from ...errors import InputError

__all__ = ["write_mni152_slices"]

GAP_MM = 6.0  # between slabs for training and slabs for scoring
TRAINING_MM, SCORING_MM = 18.0, 8.0  # thickness of the slabs, which alternate
STEP_MM = 2.0  # between slices of a slab
MIN_TISSUE = 0.10  # share of tissue that a slice must have


def _slabs(heights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Masks over slices: those for training and those for scoring, with gaps between."""
    period = TRAINING_MM + SCORING_MM + 2 * GAP_MM
    place = (heights - heights.min()) % period
    training = place < TRAINING_MM
    scoring = (place >= TRAINING_MM + GAP_MM) & (place < period - GAP_MM)
    return training, scoring


def write_mni152_slices(folder: str | Path) -> Path:
    """Write 2D axial slices of one hemisphere, as NIfTI in Decathlon layout.

    The template is left-right symmetric, so that a slice of one hemisphere would give the other away: only the left
    one is used. Slices for training and for scoring come from slabs that alternate along the axis, at least 6 mm apart.
    The label is 1 (grey) or 2 (white matter), whichever map is larger, where together they exceed one half (the
    package's binary masks overlap). It is one brain, averaged over 152: a demonstration, no benchmark.

    Args:
        folder: where to write ``images/``, ``labels/`` and ``dataset.json``.

    Returns:
        The folder.

    Raises:
        InputError: where nilearn is not installed.
    """
    try:
        from nilearn import datasets
    except ImportError as error:
        raise InputError("the demo's data come with nilearn: pip install 'medsegdiff-monai[demo]'") from error
    folder = Path(folder)
    template = datasets.load_mni152_template(resolution=1)
    image = template.get_fdata(dtype=np.float32)
    grey, white = (
        load(resolution=1).get_fdata(dtype=np.float32)
        for load in (datasets.load_mni152_gm_template, datasets.load_mni152_wm_template)
    )
    label = np.where(grey + white > 0.5, np.where(white > grey, 2, 1), 0).astype(np.uint8)
    affine = template.affine
    left = nib.affines.apply_affine(affine, [[i, 0, 0] for i in range(image.shape[0])])[:, 0] < 0
    image, label = image[left], label[left]
    inside = np.flatnonzero((label > 0).mean(axis=(0, 1)) > MIN_TISSUE)
    heights = nib.affines.apply_affine(affine, [[0, 0, k] for k in inside])[:, 2]
    on_step = np.isclose((heights - heights.min()) % STEP_MM, 0)
    lists: dict[str, list[dict[str, str]]] = {"training": [], "validation": []}
    for split, chosen in zip(lists, _slabs(heights)):
        for k in inside[chosen & on_step]:
            name = f"slice_{k:03d}.nii.gz"
            origin = affine.copy()
            origin[:3, 3] = nib.affines.apply_affine(affine, [np.flatnonzero(left)[0], 0, k])
            for kind, volume in (("images", image), ("labels", label)):
                path = folder / kind / name
                path.parent.mkdir(parents=True, exist_ok=True)
                nib.save(nib.Nifti1Image(volume[:, :, k], origin), path)
            lists[split].append({"image": f"./images/{name}", "label": f"./labels/{name}"})
    content = {
        "name": "MNI152 slices",
        "description": "axial slices of the left hemisphere of the MNI152 T1 template, as packaged by nilearn",
        "modality": {"0": "T1"},
        "labels": {"0": "background", "1": "grey matter", "2": "white matter"},
        **lists,
    }
    (folder / "dataset.json").write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
    return folder
