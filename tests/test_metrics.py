"""Agreement with several raters, against the definitions written out."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
import torch
from monai.metrics import CalibrationErrorMetric

from medsegdiff_monai.metrics import (
    expected_calibration_error,
    generalised_energy_distance,
    hungarian_matched_iou,
    iou_matrix,
    nested_masks,
)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum() if (a | b).any() else 1.0


def masks(number: int, seed: int, share: float = 0.4) -> torch.Tensor:
    return torch.rand(number, 6, 5, generator=torch.Generator().manual_seed(seed)) < share


@pytest.mark.parametrize("seed", range(3))
def test_energy_distance_by_its_definition(seed):
    members, raters = masks(5, seed), masks(3, seed + 10)
    members[0] = False  # empty masks count too
    raters[0] = False
    s, y = members.numpy(), raters.numpy()

    def mean(a, b):
        return np.mean([1 - iou(p, q) for p, q in product(a, b)])

    expected = 2 * mean(s, y) - mean(s, s) - mean(y, y)
    assert generalised_energy_distance(members, raters) == pytest.approx(expected, abs=1e-12)


def test_energy_distance_is_zero_for_one_distribution_and_positive_otherwise():
    raters = masks(4, 0)
    assert generalised_energy_distance(raters[torch.tensor([2, 0, 1, 3, 0, 1, 2, 3])], raters) == pytest.approx(0)
    assert generalised_energy_distance(masks(4, 1), raters) > 0.01


@pytest.mark.parametrize("number", [2, 4])
def test_matched_iou_is_the_best_over_all_matches(number):
    members, raters = masks(4, 3), masks(number, 4)
    doubled = raters.repeat_interleave(4 // number, 0).numpy()
    best = max(
        np.mean([iou(a, doubled[i]) for a, i in zip(members.numpy(), order)]) for order in permutations(range(4))
    )
    assert hungarian_matched_iou(members, raters) == pytest.approx(best)
    assert hungarian_matched_iou(raters, raters.flip(0)) == 1


def test_iou_of_empty_masks_and_nested_masks():
    empty = torch.zeros(1, 3, 3, dtype=torch.bool)
    assert iou_matrix(empty, torch.cat([empty, ~empty])).tolist() == [[1, 0]]
    assert nested_masks(torch.tensor([0, 1, 3, 4]), 4).int().sum(0).tolist() == [0, 1, 3, 4]


def test_calibration_error_is_that_of_monai_and_of_the_definition():
    probability, truth = torch.rand(2, 9, 8, 7), (torch.rand(2, 9, 8, 7) > 0.7).float()
    actual = expected_calibration_error(probability, truth)
    monai = CalibrationErrorMetric(num_bins=20)(y_pred=probability[None], y=truth[None])[0]
    torch.testing.assert_close(actual, monai.double(), atol=1e-5, rtol=0)
    p, y = probability[0].double().numpy().ravel(), truth[0].numpy().ravel()
    bins = np.minimum((p * 20).astype(int), 19)
    expected = sum(abs(p[bins == b].mean() - y[bins == b].mean()) * (bins == b).mean() for b in set(bins))
    assert float(actual[0]) == pytest.approx(expected, abs=1e-5)


def test_calibration_error_counts_more_voxels_than_float32_can():
    """All in one bin, half of them above 2^24: the error is the distance of the two means."""
    probability = torch.full((1, 20, 1000, 1000), 0.03)
    truth = torch.zeros_like(probability)
    truth[:, :2] = 1
    assert float(expected_calibration_error(probability, truth)) == pytest.approx(0.07, abs=1e-5)
