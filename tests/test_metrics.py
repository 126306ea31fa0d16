"""Agreement with several raters, against the definitions written out."""

from __future__ import annotations

from itertools import permutations, product
from statistics import fmean

import numpy as np
import pytest
import torch
from monai.metrics import CalibrationErrorMetric

from medsegdiff_monai import metrics
from medsegdiff_monai.inferers import ANTITHETIC, DRAWN_TOGETHER, Views
from medsegdiff_monai.metrics import (
    best_iou_per_rater,
    boundary_band,
    common_voxels,
    error_auroc,
    expected_calibration_error,
    generalised_energy_distance,
    hungarian_matched_iou,
    iou_matrix,
    nested_masks,
    rater_scores,
    variance_ncc,
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

    def mean(pairs):
        return fmean(1 - iou(p, q) for p, q in pairs)

    expected = 2 * mean(product(s, y)) - mean(permutations(s, 2)) - mean(product(y, y))
    assert generalised_energy_distance(members, raters) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("number", [2, 3, 4])
def test_energy_distance_of_draws_from_the_raters_is_zero_in_expectation(number):
    """Over all equally likely draws, whatever their number; the average over all pairs would favour many."""
    raters = masks(3, 0)
    draws = list(product(range(3), repeat=number))
    distances = [generalised_energy_distance(raters[list(draw)], raters) for draw in draws]
    assert fmean(distances) == pytest.approx(0, abs=1e-12)
    assert min(distances) < 0 < max(distances)


def test_energy_distance_of_many_random_draws_is_zero_and_of_others_is_not():
    raters, generator = masks(4, 0), torch.Generator().manual_seed(0)
    draws = [
        generalised_energy_distance(raters[torch.randint(4, (16,), generator=generator)], raters) for _ in range(500)
    ]
    assert fmean(draws) == pytest.approx(0, abs=4 * np.std(draws) / len(draws) ** 0.5) and np.std(draws) > 0
    assert generalised_energy_distance(masks(16, 1), raters) > 0.1


def test_energy_distance_of_a_constant_mask_of_disjoint_and_of_empty_ones():
    raters = masks(4, 0)
    same = raters[:1].expand(5, -1, -1)
    expected = 2 * (1 - iou_matrix(raters[:1], raters).mean()) - (1 - iou_matrix(raters, raters).mean())
    assert generalised_energy_distance(same, raters) == pytest.approx(float(expected))

    apart = torch.eye(9, dtype=torch.bool).view(9, 3, 3)  # a pixel each: all distances are 1, the raters' own 3 of 4
    assert generalised_energy_distance(apart[:5], apart[5:]) == pytest.approx(2 - 1 - 3 / 4)
    empty = torch.zeros(3, 4, 4, dtype=torch.bool)
    assert generalised_energy_distance(empty, empty[:2]) == 0
    assert generalised_energy_distance(empty, ~empty) == 2


def test_one_member_has_no_energy_distance():
    assert np.isnan(generalised_energy_distance(masks(1, 0), masks(4, 1)))
    assert np.isnan(generalised_energy_distance(masks(2, 0), masks(4, 1), drawn_together=2))


@pytest.mark.parametrize("number", [2, 4])
def test_matched_iou_is_the_best_over_all_matches(number):
    members, raters = masks(4, 3), masks(number, 4)
    doubled = raters.repeat_interleave(4 // number, 0).numpy()
    best = max(
        np.mean([iou(a, doubled[i]) for a, i in zip(members.numpy(), order)]) for order in permutations(range(4))
    )
    assert hungarian_matched_iou(members, raters) == pytest.approx(best)
    assert hungarian_matched_iou(raters, raters.flip(0)) == 1


def test_each_rater_is_met_by_the_best_member():
    members, raters = masks(3, 5), masks(4, 6)
    expected = fmean(max(iou(m, r) for m in members.numpy()) for r in raters.numpy())
    assert best_iou_per_rater(members, raters) == pytest.approx(expected)
    assert best_iou_per_rater(torch.cat([members, raters]), raters) == 1
    assert best_iou_per_rater(torch.zeros(2, 6, 5, dtype=torch.bool), raters) == 0


def test_correlation_of_the_variances():
    members, raters = masks(7, 1), masks(4, 2)
    expected = np.corrcoef(members.float().var(0, correction=0).ravel(), raters.float().var(0, correction=0).ravel())
    assert variance_ncc(members, raters) == pytest.approx(expected[0, 1], abs=1e-6)
    assert variance_ncc(raters.repeat(3, 1, 1), raters) == pytest.approx(1)
    assert variance_ncc(~raters, raters) == pytest.approx(1)  # a variance has no sign


def test_correlation_where_a_variance_is_constant():
    raters = masks(3, 2)
    assert variance_ncc(raters[:1].expand(4, -1, -1), raters) == 0
    assert variance_ncc(masks(1, 0), raters) == 0
    assert np.isnan(variance_ncc(masks(4, 0), raters[:1].expand(4, -1, -1)))
    # a third of the masks in one half, two thirds in the other: the same variance, but not in every rounding
    thirds = torch.tensor([[1, 0], [0, 1], [0, 1]], dtype=torch.bool)
    assert variance_ncc(thirds, torch.tensor([[1, 1], [0, 1]], dtype=torch.bool)) == 0
    assert np.isnan(variance_ncc(torch.tensor([[1, 1], [0, 1]], dtype=torch.bool), thirds))


def test_scores_of_each_class():
    members, raters = (torch.stack([masks(n, seed), masks(n, seed + 1)], 1) for n, seed in ((3, 0), (4, 7)))
    scores = rater_scores(members, raters)
    assert set(scores) == {"ged", "matched_iou", "best_iou", "ncc"}
    assert scores["ged"] == [generalised_energy_distance(members[:, k], raters[:, k]) for k in (0, 1)]
    assert scores["ncc"][1] == variance_ncc(members[:, 1], raters[:, 1])


def test_shared_voxels_are_counted_in_parts(monkeypatch):
    a, b = masks(3, 0), masks(2, 1)
    expected = torch.einsum("mij,nij->mn", a.double(), b.double())
    assert torch.equal(common_voxels(a, b), expected)
    monkeypatch.setattr(metrics, "PART", 4)
    assert torch.equal(common_voxels(a, b), expected)
    assert common_voxels(a, b & False).tolist() == [[0, 0]] * 3


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


def test_calibration_against_several_raters_is_that_of_all_of_them_together():
    """As if each rater's mask were a case of the same probability."""
    probability, raters = torch.rand(1, 40, 30), (torch.rand(4, 1, 40, 30) > 0.6).double()
    actual = expected_calibration_error(probability, raters.mean(0))
    together = expected_calibration_error(probability.repeat(1, 4, 1), raters.reshape(1, 160, 30))
    torch.testing.assert_close(actual, together)


def test_calibration_error_counts_more_voxels_than_float32_can():
    """All in one bin, half of them above 2^24: the error is the distance of the two means."""
    probability = torch.full((1, 20, 1000, 1000), 0.03)
    truth = torch.zeros_like(probability)
    truth[:, :2] = 1
    assert float(expected_calibration_error(probability, truth)) == pytest.approx(0.07, abs=1e-5)


def disc(radius: float, size: int = 21) -> torch.Tensor:
    axis = torch.arange(size) - size // 2
    return axis[:, None] ** 2 + axis**2 <= radius**2


def test_band_around_straight_contours_and_around_either_of_two():
    half = torch.zeros(2, 12, 7, dtype=torch.bool)
    half[0, :4] = True  # the second class has no contour
    band = boundary_band(half, half, width=3)
    assert band[0].all(1).tolist() == [False, *[True] * 6, *[False] * 5] and not band[1].any()
    other = half.clone()
    other[0, :9] = True
    both = boundary_band(half, other, width=2)[0]
    assert both.all(1).nonzero().ravel().tolist() == both.any(1).nonzero().ravel().tolist() == [2, 3, 4, 5, 7, 8, 9, 10]
    assert not boundary_band(half[1:], ~half[1:]).any()  # empty and full


@pytest.mark.parametrize("shape", [(9, 11), (7, 8, 9)])
def test_band_by_its_definition(shape):
    mask = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0)) > 0.8
    places, flat = torch.cartesian_prod(*map(torch.arange, shape)).double(), mask.ravel()
    apart = torch.cdist(places, places).masked_fill(flat[:, None] == flat, torch.inf)
    expected = (apart.amin(1) <= 1.5).view(1, *shape)
    assert torch.equal(boundary_band(mask, torch.zeros_like(mask), 1.5), expected)
    assert 0 < expected.sum() < expected.numel()


def test_calibration_in_a_band_is_that_of_its_voxels():
    probability, truth = torch.rand(2, 21, 21), disc(6).expand(2, -1, -1)
    band = boundary_band(truth, truth)
    actual = expected_calibration_error(probability, truth, where=band)
    alone = [expected_calibration_error(p[b][None], y[b][None]) for p, y, b in zip(probability, truth, band)]
    torch.testing.assert_close(actual, torch.cat(alone))
    everywhere = expected_calibration_error(probability, truth, where=torch.ones_like(truth))
    assert torch.equal(everywhere, expected_calibration_error(probability, truth))
    assert torch.isnan(expected_calibration_error(probability, truth, where=band & False)).all()
    # background that is right dilutes the error, but not that of the band
    sure = truth.float() * 0.5
    share = float(band[0].float().mean())
    right_outside = torch.where(band, sure, truth.float())
    error = expected_calibration_error(right_outside, truth, where=band)
    torch.testing.assert_close(expected_calibration_error(right_outside, truth), error * share)


def test_errors_that_uncertainty_tells_of():
    where = torch.ones(1, 6, dtype=torch.bool)
    wrong = torch.tensor([[True, True, False, False, False, False]])

    def auroc(*uncertainty, **more):
        return float(error_auroc(torch.tensor([uncertainty]), **{"wrong": wrong, "where": where, **more}))

    assert auroc(0.9, 0.8, 0.7, 0.2, 0.1, 0.0) == 1 and auroc(0.0, 0.1, 0.5, 0.6, 0.7, 0.8) == 0
    assert auroc(*[0.3] * 6) == 0.5
    assert auroc(0.9, 0.2, 0.5, 0.2, 0.1, 0.1) == pytest.approx((4 + 2 + 0.5) / 8)
    assert auroc(0.9, 0.2, 0.5, 0.2, 0.1, 0.1, where=torch.tensor([[True, True, True, True, False, False]])) == (
        pytest.approx((2 + 0.5) / 4)
    )
    assert np.isnan(auroc(*[0.3] * 6, wrong=wrong & False)) and np.isnan(auroc(*[0.3] * 6, wrong=wrong | True))
    assert np.isnan(auroc(*[0.3] * 6, where=where & False))


def test_area_under_the_roc_curve_is_that_over_all_pairs_in_each_class():
    generator = torch.Generator().manual_seed(0)
    uncertainty = (torch.rand(2, 9, 8, generator=generator) * 10).round()
    wrong, where = (torch.rand(2, 9, 8, generator=generator) > share for share in (0.7, 0.3))
    for k, area in enumerate(error_auroc(uncertainty, wrong, where)):
        bad, good = (uncertainty[k][where[k] & some][:, None] for some in (wrong[k], ~wrong[k]))
        more = (bad > good.T).double() + (bad == good.T) / 2
        assert float(area) == pytest.approx(float(more.mean()))


@pytest.mark.parametrize("number", [8, 12, 16])
def test_members_of_both_views_are_compared_as_often_as_chance_would(number):
    """One view draws one of two raters, the other always a third, who counts twice: 0 in expectation."""
    raters = masks(3, 3)[[0, 1, 2, 2]]
    flipped = Views([-1], range(number)).is_flipped
    plain = [list(product((0, 1), repeat=2))] * (number // DRAWN_TOGETHER)  # what both members of each pair draw
    random = np.random.default_rng(0)
    distances = {DRAWN_TOGETHER: [], ANTITHETIC: []}
    for _ in range(400):
        drawn = iter([rater for pairs in plain for rater in pairs[random.integers(4)]])
        members = raters[[2 if is_flipped else next(drawn) for is_flipped in flipped]]
        for together, found in distances.items():
            found.append(generalised_energy_distance(members, raters, together))
    mean, error = np.mean(distances[DRAWN_TOGETHER]), np.std(distances[DRAWN_TOGETHER]) / 20
    assert abs(mean) < 4 * error + 1e-12 and np.mean(distances[ANTITHETIC]) < mean - 0.01


def test_members_that_were_drawn_together_are_not_compared():
    """Antithetic pairs, one member with the first mask and one with the second: 0 in expectation all the same."""
    raters = masks(2, 3)
    draws = list(product((0, 1), repeat=2))  # which comes first in each of two pairs
    sets = [raters[[a, 1 - a, b, 1 - b]] for a, b in draws]
    distances = [generalised_energy_distance(m, raters, drawn_together=2) for m in sets]
    assert np.mean(distances) == pytest.approx(0, abs=1e-12)
    assert np.mean([generalised_energy_distance(m, raters) for m in sets]) < -0.05
