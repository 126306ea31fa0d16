"""Clean-up of the written mask, and what is said of it."""

from __future__ import annotations

import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import KeepLargestConnectedComponent

from medsegdiff_monai.cleanup import BEFORE, CleanUpd, clean
from medsegdiff_monai.report.page import write_report
from medsegdiff_monai.report.summary import summary_lines
from medsegdiff_monai.report.tables import cases_table, cleanup_table
from medsegdiff_monai.rows import Case, cleanup_row

from .conftest import VOLUME_SETTINGS


def blobs(*boxes: tuple[slice, ...], shape: tuple[int, ...] = (12, 12)) -> torch.Tensor:
    mask = torch.zeros(1, *shape)
    for box in boxes:
        mask[0][box] = 1
    return mask


BIG, SMALL = (slice(1, 6), slice(1, 5)), (slice(8, 10), slice(8, 10))  # of 20 and of 4 voxels


def test_the_largest_component_or_those_of_a_size_stay():
    both = blobs(BIG, SMALL)
    assert torch.equal(clean(both, largest_component=True), blobs(BIG))
    assert torch.equal(clean(both, least_voxels=4), both)
    assert torch.equal(clean(both, least_voxels=5), blobs(BIG))
    assert not clean(both, largest_component=True, least_voxels=21).any()
    assert not clean(torch.zeros(1, 4, 4), largest_component=True).any()


def test_classes_and_diagonal_neighbours():
    classes = torch.cat([blobs(BIG), blobs(SMALL)])
    assert torch.equal(clean(classes, largest_component=True), classes)  # each class by itself
    touching = blobs(BIG, (slice(6, 7), slice(5, 6)))
    assert torch.equal(clean(touching, largest_component=True), touching)


@pytest.mark.parametrize("shape", [(2, 20, 24), (2, 9, 10, 8)])
def test_the_largest_component_is_monais(shape):
    pytest.importorskip("skimage")
    masks = (torch.rand(shape, generator=torch.Generator().manual_seed(4)) > 0.7).float()  # without ties
    kept = KeepLargestConnectedComponent([0, 1], is_onehot=True)(masks.clone())
    assert torch.equal(clean(masks, largest_component=True), torch.as_tensor(kept))


def item(masks: torch.Tensor, step: float = 1.0, file: str = "a.nii.gz") -> dict:
    affine = torch.diag(torch.tensor([step, step, 1.0, 1.0], dtype=torch.float64))
    image = MetaTensor(torch.zeros_like(masks[:1]), affine=affine, meta={"filename_or_obj": file})
    return {"image": image, "mask": MetaTensor(masks, affine=affine), "pred": MetaTensor(masks[:1], affine=affine)}


@pytest.mark.parametrize(
    "file, step, least, stays",
    [("a.nii.gz", 0.5, 1.0, True), ("a.nii.gz", 0.5, 1.1, False), ("a.nii.gz", 3.0, 36, True), ("a.png", 0.5, 4, True),
     ("a.png", 0.5, 4.5, False)],
)  # fmt: skip
def test_sizes_are_in_the_unit_of_the_tables(file, step, least, stays):
    cleaned = CleanUpd("pred", 1, min_size=least)(item(blobs(BIG, SMALL), step, file))
    assert bool(cleaned["pred"][0, 8, 8]) == bool(cleaned["mask"][0, 8, 8]) == stays and cleaned["pred"][0, 1, 1]


def test_the_written_mask_alone_is_cleaned():
    data = item(torch.cat([blobs(BIG, SMALL), blobs((slice(2, 4), slice(2, 4)), (slice(9, 10), slice(9, 10)))]))
    data["mean"] = torch.rand(2, 12, 12)
    found = CleanUpd("pred", 2, {"disc": [1, 2], "cup": [2]}, largest_component="true")(data)
    assert found["mean"] is data["mean"] and torch.equal(found[BEFORE], data["mask"])
    assert found["pred"].unique().tolist() == [0, 1, 2] and not found["pred"][0, 7:].any()
    assert isinstance(found["pred"], MetaTensor) and torch.equal(found["pred"].affine, data["pred"].affine)
    off = CleanUpd("pred", 2)(data)
    assert off.keys() == data.keys() and all(off[key] is data[key] for key in data)


def case(mask: torch.Tensor) -> Case:
    return Case(["disc"], mask, mask, mask[None] > 0, [1.0, 1.0], "px")


def test_the_row_says_what_was_or_would_be_changed():
    both, label = blobs(BIG, SMALL), blobs(BIG)
    would = cleanup_row(case(both), label=label)
    assert would == {"beside_largest_voxels_disc": 4, "largest_component_dice_disc": 1.0}
    assert cleanup_row(case(both)) == {"beside_largest_voxels_disc": 4}
    did = cleanup_row(case(blobs(BIG)), both, label)
    assert did == {"removed_voxels_disc": 4, "uncleaned_dice_disc": pytest.approx(40 / 44, abs=1e-6)}
    unknown = label.masked_fill(blobs(SMALL) > 0, torch.nan)
    assert cleanup_row(case(blobs(BIG)), both, unknown)["uncleaned_dice_disc"] == 1  # nobody labelled what was removed


def test_the_report_sums_it_up(tmp_path):
    rows = [
        {"case": "a", "dice_x": 0.9, "removed_voxels_x": 5, "uncleaned_dice_x": 0.8},
        {"case": "b", "dice_x": 0.5, "removed_voxels_x": 2, "uncleaned_dice_x": 0.6},
        {"case": "c", "dice_x": 0.7, "removed_voxels_x": 0, "uncleaned_dice_x": 0.7},
    ]
    text, table = cleanup_table(rows, ["x"])
    assert "were cleaned up" in text and table["rows"] == [["x", "2", "7", "0.700", "0.700", "1", "1"]]
    assert "Clean-up removed voxels in 2 of 3 cases." in summary_lines(rows, ["x"])
    assert {"voxels removed", "Dice uncleaned"} < {head["text"] for head in cases_table(rows, ["x"], str)["head"]}
    assert "cases better" in write_report(rows, tmp_path, ["x"]).read_text()
    off = [{"case": "a", "dice_x": 0.5, "beside_largest_voxels_x": 3, "largest_component_dice_x": 0.6}]
    text, table = cleanup_table(off, ["x"])
    assert "were not cleaned up" in text and table["rows"] == [["x", "1", "3", "0.500", "0.600", "1", "0"]]
    whole = [{**off[0], "beside_largest_voxels_x": 0}]
    assert cleanup_table(whole, ["x"]) == ("", {"head": [], "rows": []})
    assert len(cases_table(whole, ["x"], str)["head"]) == 2  # nothing to say
    assert "Clean-up" not in write_report(whole, tmp_path, ["x"]).read_text()


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "cases.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_writes_the_clean_mask_and_the_rest_as_ever(volumes, bundle, tmp_path):
    torch.manual_seed(0)
    settings = {**VOLUME_SETTINGS, "dataset_dir": volumes, "outputs": ["seg", "prob", "members"]}
    bundle("train", **{k: v for k, v in settings.items() if k != "outputs"})
    plain = bundle("evaluate", tmp_path / "plain", **settings)
    done = bundle("evaluate", tmp_path / "clean", largest_component=True, **settings)

    def voxels(folder: Path, what: str) -> np.ndarray:
        return np.asarray(nib.load(folder / "image_4" / f"image_4_{what}.nii.gz").dataobj)

    for what in ("prob", "members"):
        assert np.array_equal(voxels(plain, what), voxels(done, what))
    (before,), (after,) = read(plain), read(done)
    for i, name in enumerate(("class_1", "class_2"), start=1):
        mask = torch.from_numpy(voxels(plain, "seg") == i)[None]
        assert np.array_equal(clean(mask, largest_component=True)[0].numpy(), voxels(done, "seg") == i)
        assert before[f"dice_{name}"] == after[f"uncleaned_dice_{name}"]
        assert before[f"largest_component_dice_{name}"] == after[f"dice_{name}"]
        assert before[f"beside_largest_voxels_{name}"] == after[f"removed_voxels_{name}"]
        assert before[f"expected_dice_{name}"] == after[f"expected_dice_{name}"]
    assert (done / "report.html").read_text().count("were cleaned up") == 1
