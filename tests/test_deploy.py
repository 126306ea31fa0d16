"""MONAI Deploy: what its bundle operator does with the bundle's folder, in plain code, without its SDK."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose, MapTransform

from .conftest import CONFIGS, TINY, VOLUME_SETTINGS


def without_files(steps: Compose) -> Compose:
    """The operator gets and gives arrays: it takes readers and writers out of a sequence, by their names."""
    steps.transforms = tuple(t for t in steps.transforms if type(t).__name__[:9] not in ("LoadImage", "SaveImage"))
    return steps


def run_operator(folder: Path, configs: list[str], array: np.ndarray, affine: np.ndarray) -> dict:
    """Segment an array without a channel axis, by the ids and the names of arguments that the operator uses."""
    parser = ConfigParser()
    parser.read_meta(str(folder / "configs" / "metadata.json"))
    parser.read_config([str(folder / "configs" / f"{name}.json") for name in configs])
    parser.parse()
    device, inferer, network = (parser.get_parsed_content(name) for name in ("device", "inferer", "network"))
    before, after = (without_files(parser.get_parsed_content(f"{name}processing")) for name in ("pre", "post"))
    assert isinstance(before.transforms[0], MapTransform) and isinstance(after.transforms[0], MapTransform)
    data_format = parser["_meta_"]["network_data_format"]
    (source,), (result,) = data_format["inputs"], data_format["outputs"]  # each is a port: there is one of each
    network.load_state_dict(torch.load(folder / "models" / "model.pt", map_location=device), strict=True)
    network.eval()
    meta = {"affine": affine, "original_affine": affine, "original_channel_dim": "no_channel"}
    with torch.no_grad():
        item = before({source: MetaTensor.ensure_torch_and_prune_meta(array, meta)})
        image = item.pop(source)
        outputs = inferer(inputs=image[None].to(device), network=network)
        return {"port": result, **after({result: outputs[0], **item, source: image})}


@pytest.fixture
def trained(bundle, volumes, tmp_path):
    """A bundle's folder with an overlay and the weights that a training wrote, and the settings."""
    settings = {k: TINY[k] for k in ("channels", "num_res_blocks", "num_members")}
    settings |= {"roi_size": VOLUME_SETTINGS["roi_size"], "spacing": [1.1, 1.0, 2.0]}
    bundle("train", dataset_dir=volumes, **settings)
    folder = tmp_path / "app"
    shutil.copytree(CONFIGS, folder / "configs")
    (folder / "configs" / "site.json").write_text(json.dumps({**settings, "device": "cpu"}))
    (folder / "models").mkdir()
    shutil.copy(tmp_path / "models" / "model.pt", folder / "models")
    return folder, settings


def test_operator_gives_the_mask_of_the_inference_command(trained, bundle, volumes):
    folder, settings = trained
    image = nib.load(volumes / "image_4.nii.gz")
    found = run_operator(folder, ["inference", "site"], image.get_fdata(dtype=np.float32), image.affine)
    mask = found[found["port"]]
    expected = nib.load(bundle("inference", dataset_dir=volumes, **settings) / "image_4" / "image_4_seg.nii.gz")
    np.testing.assert_array_equal(np.asarray(mask)[0], expected.get_fdata())
    np.testing.assert_allclose(mask.affine, expected.affine, atol=1e-5)
