"""From raw data to a trained model with the proposed overlay and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import raw_layouts as raw
from monai.bundle import run
from PIL import Image

from medsegdiff_monai.data.raw.prepare import prepare
from medsegdiff_monai.data.report import check
from medsegdiff_monai.errors import InputError

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


def classes_in_two_dimensions(root: Path) -> Path:
    """Pictures that are not square, of three classes."""
    raw.picture_set(root, cases=6)
    for i in range(6):
        mask = np.zeros((23, 37), np.uint8)
        mask[5:15, 4 + i : 20] = 1
        mask[8:12, 8 + i : 16] = 2
        mask[18:22, 25:35] = 3
        Image.fromarray(mask).save(root / "labels" / f"c{i}.png")
    content = json.loads((root / "dataset.json").read_text())
    labels = {"0": "background", "1": "a", "2": "b", "3": "c"}
    (root / "dataset.json").write_text(json.dumps({**content, "labels": labels}))
    return root


def train_and_segment(overlay: Path, out: Path, *more: str, **variables: Any) -> None:
    """Train an epoch and segment, with a narrow network."""
    common = {
        "bundle_root": str(BUNDLE),
        "ckpt_dir": str(out / "models"),
        "device": "$torch.device('cpu')",
        "channels": [8, 8, 16, 16],
        "num_res_blocks": 1,
        **variables,
    }
    files = [str(overlay), *more]
    once = {"max_epochs": 1, "val_interval": 1, "output_dir": str(out / "training")}
    run(config_file=[str(BUNDLE / "configs/train.json"), *files], **common, **once)
    assert (out / "models/model.pt").is_file()
    assert (out / "training/history.csv").read_text().count("\n") == 2
    few = {"num_members": 2, "num_steps": 1, "output_dir": str(out / "inference")}
    run(config_file=[str(BUNDLE / "configs/inference.json"), *files], **common, **few)
    assert len(list((out / "inference").glob("*/*_seg.nii.gz"))) >= 1


@pytest.mark.parametrize("make", [anisotropic, bitmap_of_255, classes_in_two_dimensions])
def test_one_epoch_and_inference(tmp_path, make):
    overlay = tmp_path / "overlay.json"
    check(str(make(tmp_path / "data")), write=str(overlay))
    split = {} if make is not anisotropic else {"infer_split": "training"}
    train_and_segment(overlay, tmp_path, **split)


def brats(root: Path) -> None:
    for n in range(4):
        raw.brats_case(root / f"BraTS2021_0000{n}", f"BraTS2021_0000{n}")


def folder(root: Path) -> None:
    raw.picture_set(root, cases=8)
    (root / "dataset.json").unlink()


RAW: list[tuple[str, Callable[[Path], object], dict[str, Any], str | None]] = [
    ("refuge", raw.refuge2, {}, "refuge2"),
    ("brats", brats, {}, "brats2021_3d"),
    ("brats", brats, {"slices": "2D", "regions": "whole"}, "brats2021"),
    ("ddti", raw.ddti, {}, "ddti"),
    ("decathlon", lambda root: raw.decathlon(root, 8), {}, None),
    ("folder", folder, {}, None),
]


@pytest.mark.parametrize(("kind", "make", "options", "overlay"), RAW)
def test_from_the_raw_folder_to_masks(tmp_path, kind, make, options, overlay):
    """The commands of README's table, with fields small enough for a test; without an overlay that of ``check``."""
    make(tmp_path / "raw")
    try:
        prepare(kind, str(tmp_path / "raw"), str(tmp_path / "data"), workers=1, **options)
    except InputError as error:  # the oddities of the fixtures that are left out
        assert "are ready" in str(error)
    written = tmp_path / "overlay.json"
    shipped = BUNDLE / "configs" / "datasets" / f"{overlay}.json"
    if overlay is None:
        check(str(tmp_path / "data"), write=str(written))
    small = {"roi_size": [16] * (3 if overlay == "brats2021_3d" else 2), "batch_size": 2} if overlay else {}
    train_and_segment(shipped if overlay else written, tmp_path, dataset_dir=str(tmp_path / "data"), **small)


SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real sets are not here")
@pytest.mark.parametrize(
    ("name", "overlay"),
    [("Hippocampus3D", "hippocampus"), ("LGG_MRI", "lgg_mri"), ("DRISHTI_roi", "refuge2"), ("TG3K_thyroid", "ddti")],
)
def test_a_few_cases_of_real_sets_with_the_overlay_of_their_modality(tmp_path, name, overlay):
    content = json.loads((SHARED / name / "dataset.json").read_text())
    absolute = [{key: str(SHARED / name / item[key]) for key in ("image", "label")} for item in content["training"][:4]]
    lists = {"training": absolute[:2], "validation": absolute[2:3], "test": absolute[3:]}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": content["labels"], **lists}))
    train_and_segment(
        BUNDLE / "configs" / "datasets" / f"{overlay}.json", tmp_path, dataset_dir=str(tmp_path), batch_size=2
    )
