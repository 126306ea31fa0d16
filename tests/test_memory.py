"""What the guide says of the memory that large volumes take."""

from __future__ import annotations

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
import resource, sys
from monai.bundle import run
configs, overlay, dataset_dir, models, out, root = sys.argv[1:]
run(config_file=[f"{configs}/inference.json", f"{configs}/datasets/{overlay}.json"], bundle_root=root, device="cpu",
    dataset_dir=dataset_dir, ckpt_dir=models, output_dir=out, channels=[2, 2], num_res_blocks=1, num_steps=1,
    **{"inferer#overlap": 0.1})  # fewer windows, and the same sums of them
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)  # Linux counts in KiB
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux counts it")
@pytest.mark.parametrize(
    ("overlay", "shape", "classes", "field"),
    [
        ("brats2021_3d", (240, 240, 155, 4), 3, [96, 96, 96]),  # a whole brain of four channels
        ("hippocampus", (512, 512, 300), 2, [32, 48, 32]),  # a large CT
    ],
)
def test_large_volumes_with_five_members(overlay, shape, classes, field, tmp_path):
    """With the smallest of networks, and smooth noise: what the data, the members and their fusion take."""
    coarse = np.random.default_rng(0).normal(0, 300, size=[-(-n // 10) for n in shape[:3]])
    whole = np.kron(coarse, np.ones((10, 10, 10))).astype(np.int16)[tuple(slice(n) for n in shape[:3])]
    volume = np.stack([whole] * shape[3], axis=-1) if len(shape) > 3 else whole
    (tmp_path / "data").mkdir()
    nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / "data" / "scan.nii")
    (tmp_path / "models").mkdir()
    channels = shape[3] if len(shape) > 3 else 1
    torch.manual_seed(0)
    net = MedSegDiffUNet(3, channels, classes, channels=[2, 2], num_res_blocks=1, stem_stride=2, ff_size=field)
    net.record.flipped[0] = 1  # both views of a window are encoded
    torch.save(net.state_dict(), tmp_path / "models" / "model.pt")
    arguments = [CONFIGS, overlay, tmp_path / "data", tmp_path / "models", tmp_path / "out", ROOT / "bundle"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)], capture_output=True, encoding="utf-8", cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / "scan" / "scan_seg.nii.gz").is_file()
    peak = float(done.stdout.split("peak")[-1])
    assert peak < BOUND_GB, peak
