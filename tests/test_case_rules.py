"""What is wrong with a label map, and what is right although it looks otherwise."""

from __future__ import annotations

import itertools
import json

import itk
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.transforms import Compose
from PIL import Image

from medsegdiff_monai.data import DataSpec, check_items, evaluation_items, training_splits
from medsegdiff_monai.data.geometry import is_invertible
from medsegdiff_monai.data.raw.prepare import prepare
from medsegdiff_monai.data.reading import load_image
from medsegdiff_monai.data.report import inspect_dataset
from medsegdiff_monai.data.rules import read_case, read_label
from medsegdiff_monai.errors import InputError
from medsegdiff_monai.raters import LoadRatersd

from .conftest import CONFIGS, OBLIQUE, ROOT, TINY, VOLUME_SETTINGS

SHAPE = (9, 12, 7)
MICRON = 0.004  # voxels of a micro-CT, in mm


def rotation(degrees):
    """About all three axes."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.eye(4)
    turn[:3, :3] = (
        np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
        @ np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
        @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    )
    return turn


SHEARED = np.array([[1, 0, 0.4, -3], [0, 1, 0, 5], [0, 0, 2, 1], [0, 0, 0, 1.0]])
GRIDS = {
    "plain": np.eye(4),
    "micrometres": np.diag([MICRON, MICRON, MICRON, 1]),
    "nanometres": np.diag([4e-6, 4e-6, 40e-6, 1]),
    "thick slices": np.diag([-0.3, -0.3, 6, 1]),
    "oblique": OBLIQUE,
    "half way between two axes": rotation(45) @ np.diag([0.5, 0.7, 3, 1]),
    "sheared": SHEARED,
    "far away": np.array([[-0.488281, 0, 0, 312.4321], [0, 0.488281, 0, -287.123], [0, 0, 1.25, 1502.5], [0, 0, 0, 1]]),
}


def label_map(shape=SHAPE):
    """No turn of it is itself."""
    label = np.zeros(shape, np.uint8)
    label[1:4, 2:8, 1:3] = 1
    label[1, 2, 1] = 2
    return label


def save(path, array, affine):
    nib.save(nib.Nifti1Image(array, affine), path)
    return str(path)


@pytest.fixture(params=list(GRIDS))
def pair(request, tmp_path):
    """An image, its label map, and the affine of both."""
    affine = GRIDS[request.param]
    image = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    save(tmp_path / "i.nii.gz", image, affine)
    return load_image(tmp_path / "i.nii.gz"), affine, tmp_path / "l.nii.gz"


TURNS = [
    [*zip(axes, signs)] for axes in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)
]


def test_all_48_turns_of_a_grid_are_turned_back(pair):
    image, affine, path = pair
    for turn in TURNS:
        save(path, *turned(label_map(), affine, turn))
        found = read_label(str(path), image)
        np.testing.assert_array_equal(found[0], label_map())
        assert torch.equal(found.affine, image.affine)


def turned(array, affine, turn):
    image = nib.Nifti1Image(array, affine).as_reoriented(np.array(turn))
    return np.asarray(image.dataobj), image.affine


def test_rounding_is_no_difference(pair):
    """Of float32, of a header with six decimals relative to the voxel, of a quaternion."""
    image, affine, path = pair
    quaternion = nib.Nifti1Image(label_map(), affine)
    quaternion.set_sform(None, 0)
    quaternion.set_qform(affine, 1)
    if np.allclose(quaternion.affine, affine, rtol=1e-3, atol=1e-3):  # sheared ones have no quaternion
        nib.save(quaternion, path)
        np.testing.assert_array_equal(read_label(str(path), image)[0], label_map())
    edges = np.sqrt((affine[:3, :3] ** 2).sum(0)).min()
    for other in (affine.astype(np.float32), affine + 1e-4 * edges * np.sign(affine)):
        save(path, label_map(), other)
        np.testing.assert_array_equal(read_label(str(path), image)[0], label_map())


def moved(affine, voxels):
    """The same grid, so many voxels further along one axis of it."""
    shift = np.eye(4)
    shift[:3, 3] = voxels
    return affine @ shift


@pytest.mark.parametrize(
    ("voxels", "said"), [((2, 0, 0), "up to 2 voxels"), ((0, 0, -1), "up to 1 voxels"), ((0.5, 0.5, 0.5), "up to 0.5")]
)
def test_shifts_are_found_at_every_scale(pair, voxels, said):
    image, affine, path = pair
    save(path, label_map(), moved(affine, voxels))
    with pytest.raises(InputError, match=rf"l\.nii\.gz: .*{said}.* off the image's: resample the label onto"):
        read_label(str(path), image)


def test_mirrored_rotated_and_stretched_grids_are_found(pair):
    image, affine, path = pair
    for change in (np.diag([-1.0, 1, 1, 1]), np.diag([1.0, 1.1, 1, 1]), rotation(10)):
        save(path, label_map(), affine @ change)
        with pytest.raises(InputError, match="resample the label onto the image's grid") as error:
            read_label(str(path), image)
        assert "copy" not in str(error.value)


def test_size_counts_after_the_turn(tmp_path):
    image = load_image(save(tmp_path / "i.nii", np.zeros(SHAPE, np.float32), OBLIQUE))
    for shape in ((9, 12, 8), (12, 9, 7)):
        path = save(tmp_path / "l.nii", np.zeros(shape, np.uint8), OBLIQUE)
        with pytest.raises(InputError, match=rf"label of size \[{shape[0]}, .*image of size \[9, 12, 7\]: resample"):
            read_label(path, image)
    flat = save(tmp_path / "l.nii", np.zeros(SHAPE[:2], np.uint8), OBLIQUE)
    with pytest.raises(InputError, match=r"label of size \[9, 12\]"):
        read_label(flat, image)


def test_a_single_slice_of_another_thickness(tmp_path):
    image = load_image(save(tmp_path / "i.nii", np.zeros((9, 12, 1), np.float32), np.diag([1, 1, 5, 1])))
    path = save(tmp_path / "l.nii", label_map()[:, :, :1], np.diag([1.0, 1, 1, 1]))
    np.testing.assert_array_equal(read_label(path, image)[0], label_map()[:, :, :1])


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_what_has_no_inverse_does_not_depend_on_the_size_of_a_voxel(scale):
    edges = np.diag([scale, scale, scale, 1])
    assert is_invertible(edges) and is_invertible(edges @ rotation(20))
    flat = edges.copy()
    flat[:3, 1] = flat[:3, 0]
    assert not is_invertible(flat) and not is_invertible(np.diag([scale, 0, scale, 1]))
    assert not is_invertible(np.diag([np.nan, 1, 1, 1]))


def test_pictures_have_no_place(tmp_path):
    """Of a label saved as a picture only the size counts; two files that say where they lie must agree, in 2D too."""
    mask = np.zeros((12, 9), np.uint8)
    mask[2:5, 1:4] = 1
    Image.fromarray(mask.T).save(tmp_path / "l.png")
    volume = itk.image_from_array(np.zeros((9, 12), np.float32))
    volume.SetSpacing([0.2, 0.2])
    volume.SetOrigin([5.0, 7.0])
    itk.imwrite(volume, str(tmp_path / "i.mha"))
    image = load_image(tmp_path / "i.mha")
    np.testing.assert_array_equal(read_label(str(tmp_path / "l.png"), image)[0], mask)
    image = load_image(save(tmp_path / "i.nii", np.zeros((12, 9), np.float32), np.eye(4)))
    flipped = np.diag([-1.0, 1, 1, 1])
    flipped[0, 3] = 11
    path = save(tmp_path / "l.nii", np.ascontiguousarray(mask[::-1]), flipped)
    np.testing.assert_array_equal(read_label(path, image)[0], mask)
    with pytest.raises(InputError, match="voxels off the image's"):
        read_label(save(tmp_path / "l.nii", mask, np.diag([-1.0, 1, 1, 1])), image)


@pytest.mark.parametrize("factor", [0.9999998, 1.0000001, 1.002, 0.9981])
def test_labels_that_are_almost_whole_numbers_are_rounded(tmp_path, factor):
    path = save(tmp_path / "l.nii", (label_map() * np.float32(factor)).astype(np.float32), np.eye(4))
    found = read_label(path)
    np.testing.assert_array_equal(found[0], label_map())


@pytest.mark.parametrize("top", [3, 255])
def test_labels_with_a_scale_factor_are_rounded(tmp_path, top):
    label = label_map().astype(np.int16) * (top // 2)
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_slope_inter(top / 32767, 0)
    nib.save(nib.Nifti1Image(label.astype(np.float64), np.eye(4), header), tmp_path / "l.nii")
    assert not np.array_equal(nib.load(tmp_path / "l.nii").get_fdata(), label)
    np.testing.assert_array_equal(read_label(str(tmp_path / "l.nii"))[0], label)


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.5, "0.5"), (1.04, "1.04"), (0.9893, "0.9893"), (-1, "-1"), (-0.02, "-0.02"), (np.nan, "nan"), (np.inf, "inf"),
     (70000, "70000")],
)  # fmt: skip
def test_what_is_no_label_is_shown_as_it_is(tmp_path, value, said):
    label = label_map().astype(np.float32)
    label[0, 0, 0] = value
    with pytest.raises(InputError, match=rf"l\.nii: holds {said}, which is no label"):
        read_label(save(tmp_path / "l.nii", label, np.eye(4)))


def test_all_faults_of_a_case_are_named(tmp_path):
    image = np.zeros((9, 12), np.float32)
    image[0, 0] = np.nan
    save(tmp_path / "i.nii", image, np.eye(4))
    save(tmp_path / "l.nii", np.full((9, 13), 0.5, np.float32), np.eye(4))
    items = [{"image": str(tmp_path / "i.nii"), "label": str(tmp_path / "l.nii"), "raters": [str(tmp_path / "r.nii")]}]
    (fault,) = check_items(items, DataSpec(3, 2, 1), labelled=True)
    for said in ("has 2 spatial axes", "has 1 channels", "1 voxels are NaN", "label of size", "0.5", "r.nii: no such"):
        assert said in str(fault)
    assert len(read_case(items[0]).faults) == 4  # without variables to compare with


@pytest.fixture
def mirrored(tmp_path):
    """A set whose images are stored in LPS and its labels in RAS, at the same place."""
    folder = tmp_path / "set"
    folder.mkdir()
    affine = np.array([[-1.0, 0, 0, 7], [0, -1, 0, 9], [0, 0, 2, 3], [0, 0, 0, 1]])
    items = []
    for i in range(4):
        image = np.random.default_rng(i).normal(size=SHAPE).astype(np.float32) + 50 * label_map()
        save(folder / f"image_{i}.nii.gz", image, affine)
        nib.save(nib.as_closest_canonical(nib.Nifti1Image(label_map(), affine)), folder / f"label_{i}.nii.gz")
        items.append({"image": f"image_{i}.nii.gz", "label": f"label_{i}.nii.gz"})
    lists = {"labels": {"0": "b", "1": "x", "2": "y"}, "training": items[:3], "validation": items[3:]}
    (folder / "dataset.json").write_text(json.dumps(lists))
    return folder


def batches(folder, name, **variables):
    """What a training and its validation, or an evaluation, get of a set."""
    parser = ConfigParser()
    parser.read_config(str(CONFIGS / f"{name}.json"))
    settings = {
        **TINY,
        **VOLUME_SETTINGS,
        "bundle_root": str(ROOT / "bundle"),
        "dataset_dir": str(folder),
        "device": "cpu",
    }
    parser.update({**settings, "cache": "none", **variables})
    ids = ["train#preprocessing", "validate#preprocessing"] if name == "train" else ["preprocessing"]
    return parser, [parser.get_parsed_content(i) for i in ids]


def test_turned_labels_are_taken_as_they_lie_by_all(mirrored, tmp_path):
    spec = DataSpec(3, 1, 2)
    assert inspect_dataset(mirrored).errors == []
    prepare("decathlon", str(mirrored), str(tmp_path / "out"), workers=1)
    item = training_splits(str(mirrored), spec)["training"][0]
    assert evaluation_items(str(mirrored), spec)[0]["case"] == "image_3"
    for name in ("train", "evaluate"):
        _, transforms = batches(mirrored, name)
        for transform in transforms:
            seen = Compose(transform.transforms[:4])(item)  # until anything is resampled
            np.testing.assert_array_equal(np.asarray(seen["label"]).max(0) > 0, label_map() > 0)


def shift(path):
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), moved(image.affine, (2, 0, 0))), path)


@pytest.mark.parametrize("part", ["train", "validate"])
def test_lists_that_others_supply_meet_the_same_rules(mirrored, part):
    """MONAI Label replaces the data lists; labels come back from an archive on whatever grid."""
    shift(mirrored / "label_1.nii.gz")
    lists = {f"{p}#dataset#data": [
        {"image": str(mirrored / f"image_{i}.nii.gz"), "label": str(mirrored / f"label_{i}.nii.gz")}
        for i in ((0, 1) if p == part else (2, 3))
    ] for p in ("train", "validate")}  # fmt: skip
    parser, _ = batches(mirrored, "train", dataset_dir="", **lists)
    dataset = parser.get_parsed_content(f"{part}#dataset")
    assert dataset[0] is not None
    with pytest.raises((InputError, RuntimeError)) as error:
        dataset[1]
    cause = error.value
    while not isinstance(cause, InputError):
        cause = cause.__cause__
    assert "label_1.nii.gz: its voxels lie up to 2 voxels off the image's" in str(cause)


def test_labels_of_no_class_are_refused_in_lists_of_others_too(mirrored):
    load = LoadRatersd("label", DataSpec(3, 1, 1))
    item = {"image": load_image(mirrored / "image_0.nii.gz"), "label": str(mirrored / "label_0.nii.gz")}
    with pytest.raises(InputError, match=r"label_0\.nii\.gz: holds the values 2, declared are \[0, 1\]"):
        load(item)
    assert LoadRatersd("label", DataSpec(3, 1, 1, None, 2))(item)["label"].shape == (1, *SHAPE)
