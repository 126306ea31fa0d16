"""Calibration, expected Dice and flags, against references of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medsegdiff_monai.fusion import MemberSummary
from medsegdiff_monai.grading import (
    CaseFacts,
    Grade,
    ReliabilityCounts,
    fit_grading,
    grade,
    measure,
    members_agreement,
    reasons_to_look,
    training_range,
)
from medsegdiff_monai.metrics import expected_calibration_error
from medsegdiff_monai.networks import MedSegDiffUNet, TrainingRecord


def filled(**values: torch.Tensor) -> TrainingRecord:
    """A record of a 2D network of one channel and class that knows some things."""
    record = TrainingRecord(2, 1, 1)
    for name, value in values.items():
        getattr(record, name).copy_(value)
    return record


def test_agreement_is_the_mean_dice_of_pairs() -> None:
    members = torch.rand(4, 2, 6, 6) > 0.5
    summary = MemberSummary(members.float())
    found = members_agreement(members, summary.mean, members[0])
    torch.testing.assert_close(found, summary.pairwise_dice())


def test_a_single_member_is_compared_with_its_probability() -> None:
    probability = torch.tensor([[0.9, 0.8, 0.2, 0.0]])
    mask = probability > 0.5
    found = members_agreement(mask[None], probability, mask)
    assert found.item() == pytest.approx(2 * 1.7 / (1.9 + 2))
    nothing = torch.zeros(1, 4)
    assert members_agreement(nothing[None] > 0, nothing, nothing).item() == 1


def test_a_record_that_knows_nothing_changes_nothing() -> None:
    probability = torch.rand(1, 5, 5)
    assert torch.equal(TrainingRecord(2, 1, 1)(probability[None])[0], probability)
    assert torch.equal(grade(torch.tensor([0.8])).expected, torch.tensor([0.8]).double())


def test_calibration_recovers_the_frequencies_and_keeps_the_order() -> None:
    generator = torch.Generator().manual_seed(0)
    stated = torch.rand(1, 200, 200, generator=generator)
    true = torch.sigmoid(0.4 * torch.logit(stated) - 0.5)  # overconfident, and too high
    label = (torch.rand(true.shape, generator=generator) < true).float()
    counts = ReliabilityCounts(1)
    for part in range(4):  # cases
        rows = slice(50 * part, 50 * part + 50)
        counts.add(stated[:, rows], label[:, rows])
    calibrated = filled(reliability=counts.table())(stated[None])[0]
    assert (calibrated - true).abs().mean() < 0.02
    assert expected_calibration_error(calibrated, label) < 0.1 * expected_calibration_error(stated, label)
    order = stated.flatten().argsort()
    assert (calibrated.flatten()[order].diff() >= 0).all()


def test_calibration_takes_certain_probabilities_and_classes_never_seen() -> None:
    record = TrainingRecord(2, 1, 2)
    counts = ReliabilityCounts(2)
    counts.add(torch.tensor([[[0.0, 1.0]], [[0.0, 0.5]]]), torch.tensor([[[0.0, 1.0]], [[0.0, 0.0]]]))
    record.reliability.copy_(counts.table())
    probability = torch.tensor([[[0.0, 1.0]], [[0.25, 0.5]]])
    calibrated = record(probability[None])[0]
    assert calibrated[0].tolist() == [[0.0, 1.0]]
    assert torch.equal(calibrated[1], probability[1])  # without a positive voxel there is nothing to learn
    assert calibrated.isfinite().all()


def test_expected_dice_is_that_of_cases_that_agreed_as_much() -> None:
    rng = np.random.default_rng(0)
    agreement = rng.uniform(0.5, 0.99, 200)
    true = 1 / (1 + np.exp(-(0.8 * np.log(agreement / (1 - agreement)) - 1)))
    noisy = np.clip(true + rng.normal(0, 0.02, 200), 0, 1)
    fit = fit_grading(agreement[:100], noisy[:100])
    graded = grade(torch.from_numpy(agreement[100:]), torch.tensor(fit).expand(100, 3))
    assert np.abs(graded.expected.numpy() - true[100:]).mean() < 0.01
    covered = (graded.low.numpy() <= noisy[100:]) & (noisy[100:] <= graded.high.numpy())
    assert 0.8 <= covered.mean() <= 1
    assert (graded.expected.diff()[torch.from_numpy(agreement[100:]).diff() > 0] > 0).all()


def test_few_cases_give_no_interval_and_fewer_no_fit() -> None:
    assert not any(fit_grading([0.9, 0.8], [0.7, 0.6]))
    scale, shift, width = fit_grading([0.9, 0.8, 0.7], [0.8, 0.7, 0.6])
    assert scale > 0 and np.isfinite(shift) and width == 0
    graded = grade(torch.tensor([0.8]), torch.tensor([[scale, shift, width]]))
    assert 0 < graded.expected < 0.8 and graded.low.isnan() and graded.high.isnan()


def test_the_record_travels_with_the_weights_and_old_weights_load_without_one() -> None:
    settings = {"spatial_dims": 2, "in_channels": 1, "out_channels": 1, "channels": [8, 16], "ff_size": 16}
    network, other = MedSegDiffUNet(**settings), MedSegDiffUNet(**settings)
    network.record.grading.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
    assert network.record.names() == []
    network.record.set_names(["Fuß"])
    weights = network.state_dict()
    other.load_state_dict(weights)
    assert other.record.grading.tolist() == [[1.0, 2.0, 3.0]]
    assert other.record.names() == ["Fuß"]
    old = {name: value for name, value in weights.items() if not name.startswith("record.")}
    MedSegDiffUNet(**settings).load_state_dict(old)
    assert all(not name.startswith("record.") for name, _ in network.named_parameters())


def test_facts_of_a_case_are_in_millimetres() -> None:
    image = torch.arange(8.0).reshape(1, 2, 4)
    mask = torch.zeros(1, 2, 4)
    mask[:, 0, :3] = 1
    facts = measure(image, [0.5, 2.0], mask)
    assert facts.extent.tolist() == [1.0, 8.0]
    assert facts.size.tolist() == [3.0]
    assert facts.intensity.flatten().tolist() == pytest.approx([3.5, image.std(unbiased=False).item()])


def test_ranges_leave_out_empty_masks() -> None:
    found = training_range([torch.tensor([0.0, 0.0]), torch.tensor([5.0, 0.0]), torch.tensor([9.0, 0.0])])
    assert found[:, 0].tolist() == [5.0, 9.0]
    assert (found[:, 1] == 0).all()


NONE = torch.tensor([torch.nan])


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ({}, ""),
        ({"expected": 0.4}, "low expected Dice of tumour (0.40)"),
        ({"mask": "empty"}, "tumour is empty"),
        ({"mask": "full"}, "tumour touches every border"),
        ({"size": 90.0}, "size of tumour 90 mm^2 (training: 4 to 20)"),
        ({"extent": 200.0}, "extent of the image along axis 1 200 mm (training: 30 to 40)"),
        ({"intensity": 5000.0}, "mean intensity 5000 (training: 90 to 110)"),
        ({"size": 22.0, "extent": 44.0, "intensity": 115.0}, ""),  # within the margin
        ({"spread": 0.0}, "the image has the same value everywhere; spread intensity 0 (training: 9 to 11)"),
    ],
)
def test_reasons_to_look(case: dict, words: str) -> None:
    record = filled(
        size=torch.tensor([[4.0], [20.0]]),
        extent=torch.tensor([[30.0, 30.0], [40.0, 40.0]]),
        intensity=torch.tensor([[[90.0], [9.0]], [[110.0], [11.0]]]),
    )
    mask = torch.zeros(1, 8, 8)
    if case.get("mask") != "empty":
        mask[:, 2:5, 2:5] = 1
    if case.get("mask") == "full":
        mask[:] = 1
    graded = Grade(torch.tensor([case.get("expected", 0.9)]), NONE, NONE)
    facts = CaseFacts(
        torch.tensor([case.get("extent", 35.0), 35.0]),
        torch.tensor([[case.get("intensity", 100.0)], [case.get("spread", 10.0)]]),
        torch.tensor([case.get("size", 9.0)]),
    )
    assert "; ".join(reasons_to_look(["tumour"], graded, mask, facts, "mm", record)) == words


def test_without_a_record_only_the_masks_speak() -> None:
    facts = CaseFacts(torch.tensor([1e6, 1e6]), torch.tensor([[1e6], [1e6]]), torch.tensor([1e6]))
    mask = torch.zeros(1, 4, 4)
    mask[:, 1, 1] = 1
    graded = Grade(torch.tensor([0.9]), NONE, NONE)
    assert reasons_to_look(["a"], graded, mask, facts, "px") == []
    assert reasons_to_look(["a"], graded, mask, facts, "px", TrainingRecord(2, 1, 1)) == []
