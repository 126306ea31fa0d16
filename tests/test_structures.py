"""Connected components, one by one."""

from __future__ import annotations

import tracemalloc

import numpy as np
import torch

from medsegdiff_monai.report.tables import structure_table
from medsegdiff_monai.structures import COLUMNS, label_components, structures


def test_each_component_has_a_row_with_its_measures() -> None:
    mask = torch.zeros(1, 12, 12, 12)
    mask[0, 1:4, 1, 1] = 1  # a line of three voxels
    mask[0, 6:10, 6:10, 6:10] = 1  # a cube
    members = torch.stack([mask, mask.clone()]) > 0
    members[1, 0, 1:4, 1, 1] = False  # only the first member has the line
    probability = torch.where(mask > 0, 0.75, 0.0)
    affine = np.diag([2.0, 1.0, 1.0, 1.0])
    affine[:3, 3] = [10, 20, 30]
    cube, line = structures(["lesion"], mask, members, probability, affine)
    assert tuple(cube) == COLUMNS
    assert (cube["voxels"], cube["size"], cube["unit"], cube["kind"]) == (64, 128.0, "mm", "in the mask")
    assert cube["largest_diameter"] == round(float(np.sqrt(6**2 + 3**2 + 3**2)), 2)
    assert (line["centre_voxel"], line["centre_mm"]) == ("2.0 1.0 1.0", "14.0 21.0 31.0")
    assert line["largest_diameter"] == 4.0
    assert (cube["share_of_members"], line["share_of_members"]) == (1.0, 0.5)
    assert cube["mean_probability"] == 0.75


def test_what_some_members_have_and_the_mask_lacks_is_a_possible_miss() -> None:
    mask = torch.zeros(1, 16, 16)
    mask[0, 2:5, 2:5] = 1
    members = mask.repeat(4, 1, 1, 1) > 0
    members[0, 0, 2:7, 2:7] = True  # a larger version of what is there: no miss
    members[:2, 0, 10:12, 10:12] = True  # two of four members
    rows = structures(["a"], mask, members, members.float().mean(0), np.eye(4), unit="px")
    assert [(row["kind"], row["voxels"]) for row in rows] == [("in the mask", 9), ("possible miss", 4)]
    assert rows[1]["share_of_members"] == 0.5
    assert rows[1]["centre_mm"] == ""


def test_empty_masks_and_diagonal_neighbours() -> None:
    assert structures(["a"], torch.zeros(1, 4, 4), torch.zeros(2, 1, 4, 4) > 0, torch.zeros(1, 4, 4), np.eye(4)) == []
    diagonal = torch.eye(5)[None]
    (row,) = structures(["a"], diagonal, diagonal[None] > 0, diagonal, np.eye(4))
    assert row["voxels"] == 5
    assert row["largest_diameter"] == round(float(np.hypot(4, 4)), 2)


def test_the_diameter_is_that_of_all_pairs() -> None:
    mask = torch.zeros(1, 9, 9, 9)
    mask[0, 1:8, 2:7, 3:6] = (torch.rand(7, 5, 3, generator=torch.Generator().manual_seed(1)) > 0.3).float()
    affine = np.array([[0.5, 0.1, 0, 0], [0, 1.5, 0.2, 0], [0.3, 0, 2, 0], [0, 0, 0, 1]])
    row = structures(["a"], mask, mask[None] > 0, mask, affine)[0]
    points = np.argwhere(mask[0].numpy()) @ affine[:3, :3].T
    farthest = np.linalg.norm(points[:, None] - points[None], axis=-1).max()
    assert row["voxels"] == len(points)
    assert row["largest_diameter"] == round(float(farthest), 2)


def test_a_mask_that_fills_the_field_takes_little_memory() -> None:
    full = torch.ones(1, 100, 200, 100)
    tracemalloc.start()
    (row,) = structures(["a"], full, full[None] > 0, full, np.eye(4))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert row["voxels"] == full.numel()
    assert row["centre_voxel"] == "49.5 99.5 49.5"
    assert row["largest_diameter"] == round(float(np.linalg.norm([99, 199, 99])), 2)
    assert peak < 16 * full.numel()


def test_very_many_components_take_little_memory() -> None:
    """As in noise: what each plane has of each component is not kept."""
    mask = np.zeros((100, 100, 100), bool)
    mask[::2, ::2, ::2] = True
    tracemalloc.start()
    components, sizes = label_components(mask)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sizes.tolist() == [mask.size - 50**3, *[1] * 50**3]
    assert ((components > 0) == mask).all()
    assert peak < 2 * (components.nbytes + sizes.nbytes)


def test_the_smallest_of_very_many_have_one_row_together(monkeypatch) -> None:
    monkeypatch.setattr("medsegdiff_monai.structures.MOST", 2)
    mask = torch.zeros(1, 20, 20)
    for i, size in enumerate((1, 4, 3, 2, 1)):
        mask[0, 4 * i, :size] = 1
    members = mask.repeat(2, 1, 1, 1) > 0
    members[0, 0, [2, 6, 10], 15] = True
    rows = structures(["a"], mask, members, mask, np.diag([2.0, 3.0, 1.0, 1.0]))
    found = [(row["kind"], row["structure"], row["voxels"], row["size"]) for row in rows]
    assert found == [
        ("in the mask", 1, 4, 24.0),
        ("in the mask", 2, 3, 18.0),
        ("in the mask", "3-5", 4, 24.0),
        ("possible miss", 1, 1, 6.0),
        ("possible miss", 2, 1, 6.0),
        ("possible miss", "3-3", 1, 6.0),
    ]
    assert all(tuple(row) == COLUMNS for row in rows)
    assert (
        "In the masks: 5. Possible misses, which members have and the mask does not: 3."
        in structure_table([{"case": "scan", **row} for row in rows])[0]
    )
