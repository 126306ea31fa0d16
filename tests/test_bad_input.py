"""Every bad input gives one message that names the file or key, the value and the remedy, before any work starts."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from medsegdiff_monai.errors import InputError
from medsegdiff_monai.weights import load_checkpoint, load_weights

from .conftest import CONFIGS, ROOT, VOLUME_SETTINGS, make_nifti_dataset, make_png_dataset


def message(error: BaseException | None) -> str:
    """The InputError that MONAI's config parser wrapped."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    assert error is not None, "no InputError"
    return str(error)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return make_nifti_dataset(folder, (16, 16, 8))


def edit(path: Path, change) -> None:
    image = nib.load(path)
    array = np.asanyarray(image.dataobj).copy()
    nib.save(nib.Nifti1Image(change(array), image.affine), path)


def truncate(path: Path) -> None:
    """Cut the voxels, not only the gzip stream."""
    raw = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(raw[: len(raw) // 2]))


def set_nan(array: np.ndarray) -> np.ndarray:
    array[0, 0, 0] = np.nan
    return array


def drop(data: Path) -> None:
    (data / "image_1.nii.gz").unlink()


BAD_DATA = {
    "no dataset.json": (lambda d: (d / "dataset.json").unlink(), ["dataset.json", "no such file"]),
    "not JSON": (lambda d: (d / "dataset.json").write_text("{'training'"), ["dataset.json", "not JSON"]),
    "list is no list": (lambda d: (d / "dataset.json").write_text('{"training": 3}'), ["training", "int"]),
    "item without image": (lambda d: (d / "dataset.json").write_text('{"training": [{}]}'), ["training[0]", "image"]),
    "missing file": (drop, ["image_1.nii.gz", "no such file"]),
    "image and label differ in size": (
        lambda d: edit(d / "label_2.nii.gz", lambda a: a[:, :-1]),
        ["label_2.nii.gz", "[16, 15, 8]", "[16, 16, 8]"],
    ),
    "label outside the classes": (
        lambda d: edit(d / "label_0.nii.gz", lambda a: np.where(a == 2, 7, a).astype(np.uint8)),
        ["label_0.nii.gz", "7", "num_classes=2"],
    ),
    "image and label lie at different places": (
        lambda d: nib.save(
            nib.Nifti1Image(np.zeros((16, 16, 8), np.uint8), np.diag([-1, 1, 1, 1])), d / "label_1.nii.gz"
        ),
        ["label_1.nii.gz", "voxels off the image's", "resample the label onto the image's grid"],
    ),
    "channels": (
        lambda d: edit(d / "image_3.nii.gz", lambda a: np.stack([a] * 4, -1)),
        ["image_3.nii.gz", "4 channels", "--in_channels 4"],
    ),
    "dimensions": (lambda d: edit(d / "image_0.nii.gz", lambda a: a[..., 0]), ["image_0", "--spatial_dims 2"]),
    "NaN": (lambda d: edit(d / "image_0.nii.gz", set_nan), ["image_0.nii.gz", "1 voxels are NaN"]),
    "truncated NIfTI": (lambda d: truncate(d / "image_0.nii.gz"), ["image_0.nii.gz", "cannot be read"]),
    "truncated gzip": (
        lambda d: (d / "image_0.nii.gz").write_bytes((d / "image_0.nii.gz").read_bytes()[:2000]),
        ["image_0.nii.gz", "cannot be read"],
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_stop_training_before_anything_is_written(case, data, bundle, tmp_path):
    damage, words = BAD_DATA[case]
    damage(data)
    with pytest.raises(RuntimeError) as error:
        bundle("train", dataset_dir=data, **VOLUME_SETTINGS)
    for word in words:
        assert word in message(error.value)
    assert not (tmp_path / "models").exists() and not (tmp_path / "train").exists()


def test_all_bad_cases_are_named_at_once(data, bundle):
    drop(data)
    edit(data / "image_0.nii.gz", set_nan)
    with pytest.raises(RuntimeError) as error:
        bundle("train", dataset_dir=data, **VOLUME_SETTINGS)
    assert "image_0.nii.gz" in message(error.value) and "image_1.nii.gz" in message(error.value)


@pytest.mark.parametrize("config", ["train", "evaluate", "inference"])
@pytest.mark.parametrize("value", ["", "nowhere"])
def test_missing_dataset_dir(config, value, bundle):
    with pytest.raises(RuntimeError) as error:
        bundle(config, dataset_dir=value)
    assert "dataset_dir" in message(error.value) and repr(value) in message(error.value)


def test_evaluation_refuses_bad_data_too(data, bundle):
    edit(data / "image_4.nii.gz", set_nan)
    with pytest.raises(RuntimeError) as error:
        bundle("evaluate", dataset_dir=data, **VOLUME_SETTINGS)
    assert "image_4.nii.gz" in message(error.value)


def write_nothing(path: Path) -> None: ...


def write_truncated(path: Path) -> None:
    torch.save({"weight": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:1000])


BAD_WEIGHTS = {
    "missing": (write_nothing, "no such checkpoint"),
    "truncated": (write_truncated, "truncated"),
    "of another architecture": (lambda p: torch.save({"weight": torch.zeros(1)}, p), "another architecture"),
    "no weights": (lambda p: torch.save([1], p), "not weights"),
    "a pickle that runs code": (lambda p: torch.save({"x": print}, p), "no checkpoint of weights"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_checkpoint(case, data, bundle, tmp_path):
    write, words = BAD_WEIGHTS[case]
    write(tmp_path / "model.pt")
    with pytest.raises((RuntimeError, InputError)) as error:
        bundle("inference", dataset_dir=data, checkpoint=tmp_path / "model.pt", **VOLUME_SETTINGS)
    assert words in message(error.value) and "model.pt" in message(error.value)
    assert not (tmp_path / "inference").exists()


def test_weights_of_other_kinds_are_named(tmp_path):
    model = torch.nn.Linear(2, 2)
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(InputError, match=r"model.safetensors: safetensors are not read: .* save the state dict"):
        load_checkpoint(tmp_path / "model.safetensors")
    quantised = {name: value.to(torch.int8) for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=r"weight holds torch.int8 there, as quantised weights do"):
        load_weights(tmp_path / "model.pt", model, quantised)
    load_weights(tmp_path / "model.pt", model, {name: value.half() for name, value in model.state_dict().items()})


BAD_VALUES = {
    "regions and classes differ": ({"regions": {"a": [1]}}, "num_classes=2"),
    "no such fusion": ({"fusion": "median"}, "staple"),
    "no members": ({"num_members": 0}, "num_members=0"),
    "half a step": ({"num_steps": 2.5}, "num_steps=2.5"),
    "no boolean": ({"amp": "maybe"}, "'maybe'"),
    "no such split": ({"eval_split": "holdout", "infer_split": "holdout"}, "split='holdout'"),
}


@pytest.mark.parametrize("config", ["evaluate", "inference"])
@pytest.mark.parametrize("case", BAD_VALUES)
def test_bad_value(case, config, data, bundle, tmp_path):
    values, words = BAD_VALUES[case]
    with pytest.raises(RuntimeError) as error:
        bundle(config, dataset_dir=data, **{**VOLUME_SETTINGS, **values})
    assert words in message(error.value)


def test_colours_in_a_label_are_refused(bundle, tmp_path):
    data = make_png_dataset(tmp_path)
    (data / "label_0.png").write_bytes((data / "image_0.png").read_bytes())
    settings = {"spatial_dims": 2, "in_channels": 3, "num_classes": 1, "spacing": None, "roi_size": [16, 16]}
    with pytest.raises(RuntimeError) as error:
        bundle("train", dataset_dir=data, **settings)
    assert "label_0.png: holds colours" in message(error.value)


def command(*args: object, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", *map(str, args)], cwd=cwd, capture_output=True, encoding="utf-8")


def test_on_the_command_line_the_message_comes_alone_and_the_exit_code_is_not_zero(tmp_path):
    done = command("monai.bundle", "run", "training", "--config_file", CONFIGS / "train.json",
                   "--bundle_root", ROOT / "bundle", "--dataset_dir", "nowhere", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 1
    assert "error: dataset_dir='nowhere'" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_segment_without_an_image_says_what_it_wants(tmp_path):
    done = command("medsegdiff_monai", "segment", "--output_dir", tmp_path / "out", cwd=ROOT)
    assert done.returncode == 1 and "at least one image" in done.stderr and "Traceback" not in done.stderr
