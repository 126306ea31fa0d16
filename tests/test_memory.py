"""What the guide says of the memory that large volumes take."""

from __future__ import annotations

import json
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch

from medsegdiff_monai.networks import MedSegDiffUNet

from .conftest import CONFIGS, ROOT

BOUND_GB = 6.0

PROGRAM = """
import json, resource, sys
from monai.bundle import run
configs, dataset_dir, models, out, root, overlay, more = sys.argv[1:]
files = [f"{configs}/inference.json", *([f"{configs}/datasets/{overlay}.json"] if overlay else [])]
run(config_file=files, bundle_root=root, device="cpu", dataset_dir=dataset_dir, ckpt_dir=models, output_dir=out,
    channels=[2, 2], num_res_blocks=1, num_steps=1, **json.loads(more))
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)  # Linux counts in KiB
"""


VOLUMES = {
    "a whole brain of four channels": ((240, 240, 155, 4), (4, 3), [96, 96, 96], "brats2021_3d", {}),
    "a large CT": ((512, 512, 300), (1, 2), [32, 48, 32], "", {"inferer#overlap": 0.0}),
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux counts it")
@pytest.mark.parametrize("name", VOLUMES)
def test_a_large_volume_with_five_members(name, tmp_path):
    """With the smallest of networks, whose masks are small: what the data, the members and their fusion take."""
    shape, (channels, classes), field, overlay, more = VOLUMES[name]
    volume = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    (tmp_path / "data").mkdir()
    nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / "data" / "brain.nii")
    del volume
    (tmp_path / "models").mkdir()
    net = MedSegDiffUNet(3, channels, classes, channels=[2, 2], num_res_blocks=1, stem_stride=2, ff_size=field)
    torch.nn.init.constant_(net.out_conv.bias, -2.0)
    torch.save(net.state_dict(), tmp_path / "models" / "model.pt")
    arguments = [CONFIGS, tmp_path / "data", tmp_path / "models", tmp_path / "out", ROOT / "bundle"]
    arguments += [overlay, json.dumps(more)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)], capture_output=True, encoding="utf-8", cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / "brain" / "brain_seg.nii.gz").is_file()
    peak = float(done.stdout.split("peak")[-1])
    assert peak < BOUND_GB, peak
