"""Single files of every format, segmented through inference.json in their own geometry."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import create_autospec

import itk
import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from PIL import Image

from medsegdiff_monai.__main__ import segment
from medsegdiff_monai.configs import read_config
from medsegdiff_monai.errors import InputError

from .conftest import CONFIGS, OBLIQUE, PICTURE_SETTINGS, ROOT, VOLUME_SETTINGS, blob

NETWORK = {"channels": [8, 8], "num_res_blocks": 1, "num_members": 2, "device": "cpu"}


def run_segment(folder: Path, *images: Path, **settings) -> Path:
    """Segment with random weights: only geometry and files matter here."""
    settings = {**NETWORK, **settings}
    parser = ConfigParser()
    parser.read_config(str(CONFIGS / "inference.json"))
    parser.update({"bundle_root": str(ROOT / "bundle"), **settings})
    torch.save(parser.get_parsed_content("network_def").state_dict(), folder / "model.pt")
    segment(
        *map(str, images), output_dir=str(folder / "out"), bundle_root=str(ROOT / "bundle"),
        checkpoint=str(folder / "model.pt"), **settings,
    )  # fmt: skip
    return folder / "out"


def itk_volume(shape: tuple[int, int, int]) -> itk.Image:
    """A volume with oblique axes, anisotropic spacing and an offset (ITK's LPS coordinates)."""
    volume = itk.image_from_array(np.ascontiguousarray(blob(shape, np.random.default_rng(0))[0].T.astype(np.int16)))
    c, s = np.cos(0.3), np.sin(0.3)
    volume.SetDirection(itk.matrix_from_array(np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])))
    volume.SetSpacing([0.8, 1.1, 2.5])
    volume.SetOrigin([5.0, -20.0, 30.0])
    return volume


def expected_affine(volume: itk.Image) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = itk.array_from_matrix(volume.GetDirection()) @ np.diag(volume.GetSpacing())
    affine[:3, 3] = volume.GetOrigin()
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # LPS to RAS


@pytest.mark.parametrize("suffix", ["mha", "nrrd", "nii.gz"])
def test_volumes_of_every_format(suffix, tmp_path):
    volume = itk_volume((13, 10, 7))
    itk.imwrite(volume, str(tmp_path / f"scan.{suffix}"))
    out = run_segment(tmp_path, tmp_path / f"scan.{suffix}", **VOLUME_SETTINGS)
    result = nib.load(out / "scan" / "scan_seg.nii.gz")
    assert result.shape == (13, 10, 7)
    np.testing.assert_allclose(result.affine, expected_affine(volume), atol=1e-4)


def test_dicom_series_is_one_volume(tmp_path):
    """A folder of slices, whose names do not follow their positions."""
    volume = itk_volume((12, 10, 5))
    names = [str(tmp_path / "series" / f"IM{i}.dcm") for i in (7, 2, 9, 1, 4)]
    (tmp_path / "series").mkdir()
    array = itk.array_from_image(volume)
    direction, spacing, origin = (
        itk.array_from_matrix(volume.GetDirection()), np.array(volume.GetSpacing()), np.array(volume.GetOrigin())
    )  # fmt: skip
    for k, name in enumerate(names):
        plane = itk.image_from_array(np.ascontiguousarray(array[k : k + 1]))
        plane.SetDirection(volume.GetDirection())
        plane.SetSpacing(volume.GetSpacing())
        plane.SetOrigin(origin + direction @ np.array([0, 0, k * spacing[2]]))
        io = itk.GDCMImageIO.New()
        io.KeepOriginalUIDOn()
        tags = {
            "0008|0060": "MR", "0020|000d": "1.2.3", "0020|000e": "1.2.3.4", "0008|0018": f"1.2.3.4.{k + 1}",
            "0020|0013": str(k + 1), "0020|0032": "\\".join(f"{v:.6f}" for v in plane.GetOrigin()),
            "0020|0037": "\\".join(f"{v:.6f}" for v in direction[:, :2].T.ravel()), "0018|0050": "2.5",
        }  # fmt: skip
        dictionary = plane.GetMetaDataDictionary()
        for tag, value in tags.items():
            dictionary[tag] = value
        itk.imwrite(plane, name, imageio=io)
    out = run_segment(tmp_path, tmp_path / "series", **VOLUME_SETTINGS)
    result = nib.load(out / "series" / "series_seg.nii.gz")
    assert result.shape == (12, 10, 5)
    np.testing.assert_allclose(result.affine, expected_affine(volume), atol=1e-3)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif"])
def test_pictures_that_are_not_square(suffix, tmp_path):
    image = blob((20, 31), np.random.default_rng(0))[0].clip(0, 255).astype(np.uint8)
    Image.fromarray(image).convert("RGB").save(tmp_path / f"photo.{suffix}")
    out = run_segment(tmp_path, tmp_path / f"photo.{suffix}", **PICTURE_SETTINGS)
    assert Image.open(out / "photo" / "photo_seg.png").size == (31, 20)


def test_results_lie_on_a_turned_photograph_as_a_viewer_shows_it(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    image = blob((20, 31), np.random.default_rng(0))[0].clip(0, 255).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "photo.jpg", exif=exif)
    out = run_segment(tmp_path, tmp_path / "photo.jpg", **PICTURE_SETTINGS)
    assert Image.open(out / "photo" / "photo_seg.png").size == (20, 31)
    assert nib.load(out / "photo" / "photo_seg.nii.gz").shape == (20, 31)


def test_a_marked_corner_stays_where_it_is(tmp_path):
    """Orientation, spacing and window: a network that returns the image's brightness must give back the image."""
    from monai.inferers import SimpleInferer
    from monai.transforms import Compose

    data = np.full((17, 12, 9), -1.0, np.float32)
    data[:5, :4, :3] = 1.0
    nib.save(nib.Nifti1Image(data, OBLIQUE), tmp_path / "image.nii.gz")
    parser = ConfigParser()
    parser.read_config(str(CONFIGS / "inference.json"))
    parser.update({"bundle_root": "", "num_classes": 1, "fusion": "mean", "spacing": [0.4, 0.4, 1.25]})
    preprocess: Compose = parser.get_parsed_content("preprocessing")
    item = preprocess({"image": str(tmp_path / "image.nii.gz")})
    assert item["image"].shape[1] > 2 * 17 - 3  # it was resampled
    item["pred"] = SimpleInferer()(item["image"], lambda x: (x > 0).float())
    result = parser.get_parsed_content("postprocessing")(item)
    np.testing.assert_array_equal(np.asarray(result["pred"])[0], data > 0)
    np.testing.assert_allclose(result["pred"].affine, OBLIQUE, atol=1e-4)


def test_a_marked_corner_of_a_picture_stays_where_it_is(tmp_path):
    """As the volume's, through another resolution; neither mirrored nor transposed in the NIfTI or the PNG."""
    from medsegdiff_monai.pictures import palette_png_bytes

    pixels = np.zeros((20, 36), np.uint8)  # rows, columns
    pixels[:6, :10] = 255
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    parser = ConfigParser()
    parser.read_config(str(CONFIGS / "inference.json"))
    parser.update({"bundle_root": "", "fusion": "mean", **PICTURE_SETTINGS, "in_channels": 1, "roi_size": [72, 40]})
    item = parser.get_parsed_content("preprocessing")({"image": str(tmp_path / "photo.png")})
    assert item["image"].shape == (1, 72, 40)
    item["pred"] = item["image"].clone() > 0
    result = np.asarray(parser.get_parsed_content("postprocessing")(item)["pred"])[0]
    np.testing.assert_array_equal(result.T, pixels > 0)
    (tmp_path / "mask.png").write_bytes(palette_png_bytes(result))
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "mask.png")), pixels > 0)


def test_a_later_file_of_the_same_name_does_not_pass_for_finished(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        itk.imwrite(itk_volume((9, 8, 7)), str(tmp_path / folder / "scan.mha"))
    out = run_segment(tmp_path, tmp_path / "a" / "scan.mha", **VOLUME_SETTINGS)
    run_segment(tmp_path, tmp_path / "b" / "scan.mha", **VOLUME_SETTINGS)
    assert {p.name for p in out.iterdir() if p.is_dir()} == {"scan", "b_scan"}


def test_two_files_of_one_name_do_not_overwrite_each_other(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        itk.imwrite(itk_volume((9, 8, 7)), str(tmp_path / folder / "scan.mha"))
    out = run_segment(tmp_path, tmp_path / "a" / "scan.mha", tmp_path / "b" / "scan.mha", **VOLUME_SETTINGS)
    assert {p.name for p in out.iterdir() if p.is_dir()} == {"a_scan", "b_scan"}


def test_mistyped_variables_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"num_membrs: is not a variable of inference.* did you mean num_members\?"):
        run_segment(tmp_path, tmp_path / "scan.nii.gz", num_membrs=3)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("num_steps", 0, "num_steps=0 must be a whole number"), ("flip_axes", [5], r"flip_axes=\[5\] must be a list"),
        ("seed", "x", "seed='x' must be a whole number"),
    ],
)  # fmt: skip
def test_a_part_that_cannot_be_made_is_one_error_with_no_cause(option, value, message, tmp_path):
    """An error that is its own cause sends whoever follows the causes round and round."""
    Image.new("RGB", (16, 16)).save(tmp_path / "photo.png")
    with pytest.raises(InputError, match=message) as raised:
        run_segment(tmp_path, tmp_path / "photo.png", **PICTURE_SETTINGS, **{f"inferer#{option}": value})
    assert raised.value.__cause__ is None and raised.value.__suppress_context__


def test_parts_of_variables_overlays_and_options_of_the_run_are_passed_on(tmp_path, monkeypatch):
    run = create_autospec(monai.bundle.run)
    monkeypatch.setattr(monai.bundle, "run", run)
    overlay = tmp_path / "overlay.json"
    overlay.write_text('{"_variable_of_the_overlay": 3}')
    configs = [str(CONFIGS / "inference.json"), str(overlay)]
    sampler = "medsegdiff_monai.schedulers.DDIMScheduler"
    more = {"logging_file": "log", "_variable_of_the_overlay": 2, "scheduler::_target_": sampler, "inferer#seed": 1}
    segment("scan.nii.gz", output_dir="out", bundle_root=str(ROOT / "bundle"), config_file=configs, **more)
    assert run.call_args.kwargs.items() >= {"config_file": configs, "images": ["scan.nii.gz"], **more}.items()


@pytest.mark.parametrize("name", ["scan#2", "$scan", "@scan", "%scan", "a::b", "a,b", "2024_01"])
def test_names_that_mean_something_to_monai(name, tmp_path, monkeypatch):
    """Files and folders are what they are called, and None is not left out."""
    monkeypatch.chdir(tmp_path)
    itk.imwrite(itk_volume((9, 8, 7)), "scan.mha")
    Path("scan.mha").rename(f"{name}.mha")
    settings = {**NETWORK, **VOLUME_SETTINGS, "bundle_root": str(ROOT / "bundle")}
    network = read_config(CONFIGS / "inference.json", **settings).get_parsed_content("network_def")
    torch.save(network.state_dict(), f"{name}.pt")
    segment(f"{name}.mha", output_dir=f"{name} out", checkpoint=f"{name}.pt", **settings)
    (mask,) = Path(f"{name} out").glob("*/*_seg.nii.gz")
    assert nib.load(mask).shape == (9, 8, 7)
