"""From raw data to a trained model with the proposed overlay and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import raw_layouts as raw
from monai.bundle import run

from medsegdiff_monai.data.prepare import prepare
from medsegdiff_monai.data.report import check

BUNDLE = Path(__file__).parents[2] / "bundle"


def anisotropic(root: Path) -> Path:
    """Volumes of three channels, odd sizes and thick slices, with keys that nobody asked for."""
    affine = np.array([[0, 0, 5.0, 0], [-0.5, 0, 0, 3], [0, 0.7, 0, 0], [0, 0, 0, 1]])
    items = []
    for i in range(5):
        label = np.zeros((33 + i, 31, 5), np.uint8)
        label[10:20, 8:20, 1:4] = 1
        label[20:26, 8:20, 1:4] = 2
        image = label[..., None] * [1, 2, 3] + np.random.default_rng(i).normal(size=(*label.shape, 3))
        raw.volume(root / f"i{i}.nii.gz", image.astype(np.float32), affine)
        raw.volume(root / f"l{i}.nii.gz", label, affine)
        items.append({"image": f"i{i}.nii.gz", "label": f"l{i}.nii.gz", "crop_xywh": [1, 2, 3, 4]})
    labels = {"0": "background", "1": "left", "2": "right"}
    (root / "dataset.json").write_text(json.dumps({"labels": labels, "training": items}))
    return root


def bitmap_of_255(root: Path) -> Path:
    return raw.picture_set(root, suffix=".bmp", foreground=255)


def brats_slices(root: Path) -> Path:
    for n in range(4):
        raw.brats_case(root / f"raw/BraTS2021_0000{n}", f"BraTS2021_0000{n}")
    prepare("brats", str(root / "raw"), str(root / "out"), slices="2D", workers=1)
    return root / "out"


@pytest.mark.parametrize("make", [anisotropic, bitmap_of_255, brats_slices])
def test_one_epoch(tmp_path, make):
    overlay = tmp_path / "overlay.json"
    check(str(make(tmp_path / "data")), write=str(overlay))
    run(
        config_file=[str(BUNDLE / "configs/train.json"), str(overlay)],
        bundle_root=str(BUNDLE),
        output_dir=str(tmp_path / "out"),
        ckpt_dir=str(tmp_path / "models"),
        device="$torch.device('cpu')",
        channels=[8, 8, 16, 16],
        max_epochs=1,
        val_interval=1,
    )
    assert (tmp_path / "models/model.pt").is_file()
    assert (tmp_path / "out/history.csv").read_text().count("\n") == 2
