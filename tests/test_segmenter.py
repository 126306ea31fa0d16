"""The bundle from Python: the same as its commands, bit for bit."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import run

import medsegdiff_monai
from medsegdiff_monai import MedSegDiff
from medsegdiff_monai.errors import InputError

from .conftest import CONFIGS, VOLUME_SETTINGS

BUNDLE = CONFIGS.parent
MAPS = {"seg": "mask", "prob": "probability", "uncertainty_entropy": "uncertainty", "members": "members"}


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An oblique scan of odd size."""
    file = tmp_path_factory.mktemp("scan") / "brain.nii.gz"
    affine = np.array([[0, -1.2, 0.1, 5], [1.1, 0, 0, -8], [0, 0.1, 0.9, 3], [0, 0, 0, 1]])
    volume = np.random.default_rng(0).normal(100, 20, (21, 35, 26)).astype(np.float32)
    nib.save(nib.Nifti1Image(volume, affine), file)
    return file


@pytest.fixture(scope="module")
def segmenter() -> MedSegDiff:
    return MedSegDiff.from_bundle(BUNDLE, device="cpu", num_members=3)


def test_it_is_the_bundle_command_bit_for_bit(segmenter: MedSegDiff, scan: Path, tmp_path: Path) -> None:
    found = segmenter.segment(scan)
    variables = {"images": [str(scan)], "output_dir": str(tmp_path / "command"), "bundle_root": str(BUNDLE)}
    outputs = ["seg", "prob", "uncertainty", "members", "overlay"]
    run(
        "inference",
        config_file=str(CONFIGS / "inference.json"),
        num_members=3,
        device="cpu",
        outputs=outputs,
        **variables,
    )
    saved = found.save(tmp_path / "python", outputs)
    for end, name in MAPS.items():
        written = nib.load(tmp_path / "command" / "brain" / f"brain_{end}.nii.gz")
        values = getattr(found, name)
        values = values if values.ndim == 3 else np.moveaxis(values, 0, -1)
        np.testing.assert_array_equal(values, np.asarray(written.dataobj))
        assert (saved / f"brain_{end}.nii.gz").read_bytes() == Path(written.get_filename()).read_bytes()
        np.testing.assert_allclose(written.affine, found.affine, atol=1e-5)
    rows = []
    for folder in ("command", "python"):
        with (tmp_path / folder / "cases.csv").open(newline="") as file:
            rows.append({key: value for key, value in next(csv.DictReader(file)).items() if key != "seconds"})
    assert rows[0] == rows[1]
    assert rows[0]["flag"] == found.flag
    for name, expected in found.expected_dice.items():
        assert float(rows[0][f"expected_dice_{name}"]) == pytest.approx(expected, abs=1e-6)


def test_arrays_and_files_give_the_same(segmenter: MedSegDiff, scan: Path) -> None:
    image = nib.load(scan)
    array = np.asarray(image.dataobj)
    by_file = segmenter.segment(str(scan))
    for given in (array, torch.from_numpy(array)[None]):
        by_array = segmenter.segment(given, affine=image.affine)
        np.testing.assert_array_equal(by_array.probability, by_file.probability)
        np.testing.assert_allclose(by_array.affine, by_file.affine, atol=1e-6)
    assert by_file.show().size[0] > 2 * array.shape[0]


def test_bad_input_is_refused_plainly(segmenter: MedSegDiff) -> None:
    with pytest.raises(InputError, match="array: has 4 channels, in_channels=1"):
        segmenter.segment(np.zeros((4, 20, 20, 20)))
    with pytest.raises(InputError, match=r"array of shape \[20, 20\]: must have 3 axes"):
        segmenter.segment(np.zeros((20, 20)))
    with pytest.raises(InputError, match="NaN"):
        segmenter.segment(np.full((20, 20, 20), np.nan))
    with pytest.raises(InputError, match=r"nothing\.nii\.gz"):
        segmenter.segment("nothing.nii.gz")
    with pytest.raises(InputError, match="num_members"):
        MedSegDiff.from_bundle(BUNDLE, num_member=3)


def test_train_and_evaluate(volumes: Path, tmp_path: Path) -> None:
    settings = {key: value for key, value in VOLUME_SETTINGS.items() if key not in ("num_members", "num_steps")}
    before = (BUNDLE / "models" / "model.pt").read_bytes()
    start = MedSegDiff.from_bundle(BUNDLE, device="cpu")
    trained = start.train(volumes, tmp_path / "training", **settings)
    assert (tmp_path / "training" / "models" / "model.pt").is_file()
    assert (BUNDLE / "models" / "model.pt").read_bytes() == before
    rows = trained.evaluate(volumes, tmp_path / "evaluation")
    assert [row["case"] for row in rows] == ["image_4"]
    assert {"expected_dice", "dice_class_1"} <= rows[0].keys()
    assert (tmp_path / "evaluation" / "report.html").is_file()


def test_public_names_are_imported_when_they_are_asked_for() -> None:
    assert all(getattr(medsegdiff_monai, name) is not None for name in medsegdiff_monai.__all__)
    code = "import sys, medsegdiff_monai; print(*(m for m in ('torch', 'monai', 'itk') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
    with pytest.raises(AttributeError):
        medsegdiff_monai.nothing_of_this_name  # noqa: B018
