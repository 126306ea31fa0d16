"""Splits, names and label regions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from medsegdiff_monai.data import DataSpec, evaluation_items, inference_items, training_sampler, training_splits
from medsegdiff_monai.data.names import case_names
from medsegdiff_monai.errors import InputError
from medsegdiff_monai.transforms import LabelsToRegionsd, NormalizeImaged, Regions

from .conftest import make_nifti_dataset, make_png_dataset, write_json

RGB = DataSpec(spatial_dims=2, in_channels=3, num_classes=1)


def test_a_fifth_is_held_out_by_seed_and_whole_patients(tmp_path):
    make_png_dataset(tmp_path, cases=21)
    splits = training_splits(str(tmp_path), RGB, seed=3)

    def patients(items):
        return {int(item["case"].split("_")[1]) // 2 for item in items}

    assert not patients(splits["training"]) & patients(splits["validation"])
    assert len(splits["training"]) == 16 and len(splits["validation"]) == 4
    assert splits == training_splits(str(tmp_path), RGB, seed=3)
    assert splits != training_splits(str(tmp_path), RGB, seed=4)
    assert "image_20" not in {item["case"] for split in splits.values() for item in split}  # that is the test case


def test_declared_validation_is_taken_and_test_only_where_asked_for(tmp_path):
    make_png_dataset(tmp_path, cases=4)
    pair = lambda i: {"image": f"image_{i}.png", "label": f"label_{i}.png"}  # noqa: E731
    write_json(tmp_path, training=[pair(0), pair(1)], validation=[pair(2)], test=[pair(3)])
    splits = training_splits(str(tmp_path), RGB)
    assert [item["case"] for item in splits["validation"]] == ["image_2"]
    assert [item["case"] for item in evaluation_items(str(tmp_path), RGB)] == ["image_2"]
    assert [item["case"] for item in evaluation_items(str(tmp_path), RGB, "test")] == ["image_3"]
    args = (str(tmp_path), RGB, str(tmp_path / "out"), "none.pt")
    assert [item["case"] for item in inference_items(*args)] == ["image_3"]
    assert [item["case"] for item in inference_items(*args, infer_split="validation")] == ["image_2"]


def test_empty_lists_that_are_not_in_use_are_no_error_and_others_are(tmp_path):
    make_png_dataset(tmp_path, cases=3)
    write_json(tmp_path, training=[{"image": "image_0.png", "label": "label_0.png"}], validation=[], test=[])
    with pytest.raises(InputError, match="'training' lists 1 cases"):
        training_splits(str(tmp_path), RGB)
    write_json(tmp_path, training=[], validation=[], test=[])
    with pytest.raises(InputError, match="no cases under validation or test"):
        evaluation_items(str(tmp_path), RGB)


def test_without_labelled_validation_or_test_the_cases_held_out_in_training_are_evaluated(tmp_path):
    make_png_dataset(tmp_path, cases=11)
    pairs = [{"image": f"image_{i}.png", "label": f"label_{i}.png"} for i in range(10)]
    write_json(tmp_path, training=pairs, test=["image_10.png"])
    for seed in (0, 1):
        assert (
            evaluation_items(str(tmp_path), RGB, seed=seed) == training_splits(str(tmp_path), RGB, seed)["validation"]
        )


def test_without_other_lists_the_cases_held_out_in_training_are_segmented(tmp_path):
    make_png_dataset(tmp_path, cases=10)
    write_json(tmp_path, training=[{"image": f"image_{i}.png", "label": f"label_{i}.png"} for i in range(10)])
    held = [item["case"] for item in training_splits(str(tmp_path), RGB, seed=3)["validation"]]
    found = inference_items(str(tmp_path), RGB, str(tmp_path / "out"), "none.pt", seed=3)
    assert [item["case"] for item in found] == held and len(held) == 2


def test_test_images_may_be_plain_names_without_labels(tmp_path):
    make_png_dataset(tmp_path, cases=2)
    write_json(tmp_path, test=["image_0.png"])
    assert inference_items(str(tmp_path), RGB, "out", "none.pt")[0]["case"] == "image_0"
    with pytest.raises(InputError, match="has no label"):
        evaluation_items(str(tmp_path), RGB, "test")


def test_names_of_cases():
    assert case_names(["/a/x.nii.gz", "/a/y.tar.nii", "/b/z.png"]) == ["x", "y.tar", "z"]
    assert case_names(["/d/a/x.png", "/d/b/x.nii", "/d/b/y.nii"]) == ["a_x", "b_x", "y"]
    assert case_names(["/p/a/x.png", "/q/a/x.png"]) == ["p_a_x", "q_a_x"]
    assert case_names([["/d/t1.nii", "/d/t2.nii"]]) == ["t1"]
    assert case_names(["/d/scan.nii.gz", "/d/scan.nrrd", "/d/scan"]) == ["scan_nii_gz", "scan_nrrd", "scan"]


def test_several_files_are_stacked_as_channels(tmp_path):
    make_nifti_dataset(tmp_path, (8, 8, 8))
    items = [{"image": [f"image_{i}.nii.gz", "image_1.nii.gz"], "label": f"label_{i}.nii.gz"} for i in (0, 2)]
    write_json(tmp_path, training=items)
    assert training_splits(str(tmp_path), DataSpec(3, 2, 2))["training"][0]["image"][1].endswith("image_1.nii.gz")
    with pytest.raises(InputError, match="has 2 channels"):
        training_splits(str(tmp_path), DataSpec(3, 1, 2))


def test_regions_make_channels_and_label_maps():
    label = torch.tensor([[[0, 1, 2, 3]]])
    regions = {"whole": [1, 2, 3], "core": [3]}
    masks = LabelsToRegionsd("label", 2, regions)({"label": label})["label"]
    assert masks.tolist() == [[[0, 1, 1, 1]], [[0, 0, 0, 1]]]
    overlapping = Regions(2, regions)
    assert not overlapping.exclusive
    assert overlapping.label_map(masks).tolist() == [[[0, 1, 1, 3]]]
    assert overlapping.binarise(torch.tensor([[0.9], [0.8]])).tolist() == [[True], [True]]


def test_exclusive_classes_compete_with_each_other_and_the_background():
    probability = torch.tensor([[0.9, 0.6, 0.3, 0.5], [0.8, 0.7, 0.2, 0.5]])
    masks = Regions(2).binarise(probability)
    assert masks.tolist() == [[True, False, False, False], [False, True, False, False]]
    assert Regions(2).label_map(masks).tolist() == [[1, 2, 0, 0]]


def test_images_are_normalised_each_by_itself_or_all_by_one_range():
    image = torch.rand(2, 40, 50) * torch.tensor([3.0, 900.0])[:, None, None] - 7
    own = NormalizeImaged("image")({"image": image})["image"]
    torch.testing.assert_close(own.mean((1, 2)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(own.std((1, 2), correction=0), torch.ones(2))
    shared = NormalizeImaged("image", intensity_range=[-5, 300])({"image": image})["image"]
    torch.testing.assert_close(shared, ((image + 5) / 305).clip(0, 1) * 2 - 1)
    with pytest.raises(InputError, match="intensity_range"):
        NormalizeImaged("image", intensity_range=[3, 3])


def drawn(sampler):
    indices = [i for _ in range(200) for i in sampler]
    return sum(i < 2 for i in indices) / len(indices)


def test_cases_with_foreground_are_seen_often_enough():
    items = [{"foreground": True}] * 2 + [{"foreground": False}] * 8
    assert drawn(training_sampler(items)) == pytest.approx(0.5, abs=0.04)
    assert drawn(training_sampler(items, 0.8)) == pytest.approx(0.8, abs=0.04)
    for plain in (items[:3], [{}] * 10, [{"foreground": False}] * 4):
        assert sorted(training_sampler(plain)) == list(range(len(plain)))


def test_checked_lists_say_which_cases_have_foreground(tmp_path):
    make_png_dataset(tmp_path, cases=5)
    Image.fromarray(np.zeros((30, 22), np.uint8)).save(tmp_path / "label_0.png")
    splits = training_splits(str(tmp_path), RGB)
    found = {item["case"]: item["foreground"] for items in splits.values() for item in items}
    assert found == {"image_0": False, "image_1": True, "image_2": True, "image_3": True}


def test_an_image_that_is_trained_on_does_not_validate(tmp_path):
    """Whatever link leads to it."""
    make_png_dataset(tmp_path, cases=3)
    (tmp_path / "again.png").symlink_to(tmp_path / "image_0.png")
    pairs = [{"image": f"image_{i}.png", "label": f"label_{i}.png"} for i in range(2)]
    write_json(tmp_path, training=pairs, validation=[{"image": "again.png", "label": "label_0.png"}])
    with pytest.raises(InputError, match=r"again.png: is in training and in validation"):
        training_splits(str(tmp_path), RGB)
