"""Rows of cases, against values that are known beforehand."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.spatial.distance import cdist

from medsegdiff_monai.grading import Grade
from medsegdiff_monai.metrics import boundary_band, expected_calibration_error
from medsegdiff_monai.rows import BAND, Case, grade_row, score_row, size_row


def case_of(mask: torch.Tensor, probability: torch.Tensor | None = None, **more) -> Case:
    probability = mask if probability is None else probability
    settings = {"spacing": [1.0] * (mask.ndim - 1), "member_masks": mask[None] > 0, **more}
    return Case([f"c{k}" for k in range(len(mask))], mask, probability, **settings)


def square(start: int, stop: int, size: int = 24) -> torch.Tensor:
    mask = torch.zeros(1, size, size)
    mask[0, start:stop, start:stop] = 1
    return mask


def test_surface_distances_are_in_the_unit_of_the_spacing() -> None:
    label = square(8, 16)
    mask = torch.zeros_like(label)
    mask[0, 11:19, 8:16] = 1  # three voxels along the first axis
    found = score_row(case_of(mask, spacing=[2.0, 1.0]), label, tolerance=2.0)
    assert found["hd95_c0"] == pytest.approx(6.0, abs=0.7)

    def edge(m: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.functional.pad(m[0], (1, 1, 1, 1))
        inside = padded[2:, 1:-1] * padded[:-2, 1:-1] * padded[1:-1, 2:] * padded[1:-1, :-2]
        return ((m[0] > 0) & (inside == 0)).nonzero() * torch.tensor([2.0, 1.0])

    distances = cdist(edge(mask), edge(label))
    near = (distances.min(1) <= 2).sum() + (distances.min(0) <= 2).sum()
    assert found["nsd_c0"] == pytest.approx(near / sum(distances.shape))


def test_what_both_lack_is_right_and_what_one_lacks_is_infinitely_far() -> None:
    nothing = torch.zeros(1, 8, 8)
    both = score_row(case_of(nothing), nothing)
    assert (both["dice_c0"], both["nsd_c0"], both["hd95_c0"]) == (1, 1, 0)
    assert math.isnan(both["ece_band_c0"])
    for mask, label in ((nothing, square(2, 5, 8)), (square(2, 5, 8), nothing)):
        one = score_row(case_of(mask), label)
        assert (one["dice_c0"], one["nsd_c0"], one["hd95_c0"]) == (0, 0, math.inf)


def test_scores_in_the_band_are_those_of_its_voxels() -> None:
    generator = torch.Generator().manual_seed(0)
    mask, label = torch.cat([square(4, 10), square(9, 20)]), torch.cat([square(5, 11), square(7, 20)])
    probability = torch.rand(mask.shape, generator=generator)
    found = score_row(case_of(mask, probability), label)
    band = boundary_band(mask > 0, label > 0, BAND)
    for k in range(2):
        p, y = probability[k][band[k]].double(), label[k][band[k]].double()
        assert found[f"brier_c{k}"] == pytest.approx(float(((p - y) ** 2).mean()), abs=1e-6)
        nll = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
        assert found[f"nll_c{k}"] == pytest.approx(float(nll), abs=1e-5)
    expected = expected_calibration_error(probability, label, where=band)
    assert [found["ece_band_c0"], found["ece_band_c1"]] == pytest.approx(expected.tolist(), abs=1e-6)


def test_certain_and_wrong_probabilities_have_a_finite_likelihood() -> None:
    assert 0 < score_row(case_of(square(4, 9)), square(5, 10))["nll_c0"] < 20


def test_what_nobody_labelled_does_not_count() -> None:
    label = square(4, 12)
    ignored = label.clone()
    ignored[:, :, 16:] = torch.nan
    mask = label.clone()
    assert score_row(case_of(mask), label)["dice_c0"] == 1
    mask[:, 4:12, 18:22] = 1  # wrong, but nobody knows
    found = score_row(case_of(mask), ignored)
    assert (found["dice_c0"], found["hd95_c0"], found["nsd_c0"], found["ece_c0"]) == (1, 0, 1, 0)
    assert found["brier_c0"] == 0
    assert score_row(case_of(mask), label)["hd95_c0"] > 3


def test_probabilities_are_compared_with_all_raters() -> None:
    raters = torch.stack([square(4, 10), square(4, 12)]) > 0
    label = raters[1].float()
    fair = raters.float().mean(0)
    found = score_row(case_of(label, fair), label, raters)
    assert found["ece_band_c0"] == found["ece_c0"] == found["brier_c0"] == 0
    assert {"ged", "ncc"} < found.keys()


@pytest.mark.parametrize(
    ("shape", "spacing", "unit", "column", "size"),
    [
        ((4, 4), [0.5, 2.0], "mm", "area_mm2", 16.0),
        ((4, 4), [1.0, 1.0], "px", "area_px", 16.0),
        ((4, 4, 2), [0.5, 2.0, 3.0], "mm", "volume_mm3", 96.0),
        ((4, 4, 2), [1.0, 1.0, 1.0], "px", "volume_px", 32.0),
    ],
)
def test_columns_of_sizes_name_what_they_measure(shape, spacing, unit, column, size) -> None:
    mask = torch.ones(1, *shape)
    members = torch.stack([mask, torch.zeros_like(mask)]) > 0
    row = size_row(case_of(mask, member_masks=members, spacing=spacing, unit=unit))
    assert row == {f"{column}_c0": size, f"{column}_std_c0": pytest.approx(size / 2**0.5)}


def test_intervals_that_are_not_known_are_empty() -> None:
    graded = Grade(torch.tensor([0.8, 0.6]), torch.tensor([0.7, torch.nan]), torch.tensor([0.9, torch.nan]))
    row = grade_row(["a", "b"], graded, ["a is empty", "b touches every border"])
    assert row["flag"] == "a is empty; b touches every border"
    assert row["expected_dice"] == pytest.approx(0.7)
    assert (row["expected_dice_low_a"], row["expected_dice_low_b"], row["expected_dice_b"]) == (0.7, "", 0.6)
