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
configs, dataset_dir, models, out, root = sys.argv[1:]
run(config_file=[f"{configs}/inference.json", f"{configs}/datasets/brats2021_3d.json"], bundle_root=root, device="cpu",
    dataset_dir=dataset_dir, ckpt_dir=models, output_dir=out, channels=[2, 2], num_res_blocks=1, num_steps=1)
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)  # Linux counts in KiB
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux counts it")
def test_a_whole_brain_of_four_channels_with_five_members(tmp_path):
    """With the smallest of networks: what the data, the members and their fusion take."""
    volume = np.random.default_rng(0).normal(size=(240, 240, 155, 4)).astype(np.float32)
    (tmp_path / "data").mkdir()
    nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / "data" / "brain.nii")
    (tmp_path / "models").mkdir()
    net = MedSegDiffUNet(3, 4, 3, channels=[2, 2], num_res_blocks=1, stem_stride=2, ff_size=[96, 96, 96])
    torch.save(net.state_dict(), tmp_path / "models" / "model.pt")
    arguments = [CONFIGS, tmp_path / "data", tmp_path / "models", tmp_path / "out", ROOT / "bundle"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)], capture_output=True, encoding="utf-8", cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / "brain" / "brain_seg.nii.gz").is_file()
    peak = float(done.stdout.split("peak")[-1])
    assert peak < BOUND_GB, peak
