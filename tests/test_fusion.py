"""STAPLE against an independent EM, expected Dice against a search, and uncertainty against its definition."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from medsegdiff_monai.errors import InputError
from medsegdiff_monai.fusion import (
    FUSIONS,
    MemberSummary,
    binary_entropy,
    check_fusion,
    dice_matrix,
    expected_dice_threshold,
    most_different,
    staple,
)
from medsegdiff_monai.transforms import FuseMembersd, Regions


def em(votes: np.ndarray, steps: int = 20000) -> np.ndarray:
    """STAPLE by the equations of Warfield et al. 2004, in float64, on (members, voxels)."""
    votes = votes.astype(np.float64)
    prior = votes.mean()
    p = q = np.full(len(votes), 0.99999)
    for _ in range(steps):
        foreground = prior * np.prod(np.where(votes == 1, p[:, None], 1 - p[:, None]), axis=0)
        background = (1 - prior) * np.prod(np.where(votes == 0, q[:, None], 1 - q[:, None]), axis=0)
        w = foreground / (foreground + background)
        new_p = (votes * w).sum(1) / w.sum()
        new_q = ((1 - votes) * (1 - w)).sum(1) / (1 - w).sum()
        done = max(abs(new_p - p).max(), abs(new_q - q).max()) < 1e-12
        p, q = new_p, new_q
        if done:
            break
    return w


def noisy_votes(shape: tuple[int, ...], members: int, seed: int) -> np.ndarray:
    """Members of different sensitivity and specificity, with no margin on which all agree."""
    rng = np.random.default_rng(seed)
    truth = rng.random(shape) < 0.4
    error = rng.uniform(0.05, 0.3, (members,) + (1,) * len(shape))
    return truth ^ (rng.random((members, *shape)) < error)


@pytest.mark.parametrize("shape", [(24, 17), (9, 8, 7)])
@pytest.mark.parametrize("members", [3, 5, 9])
def test_staple_agrees_with_an_independent_em(shape, members):
    votes = noisy_votes(shape, members, seed=members)
    split = votes.any(0) & ~votes.all(0)
    for axis in range(len(shape)):  # the box of the disagreement is the whole image
        assert split.take([0, -1], axis).any()
    expected = em(votes.reshape(members, -1)).reshape(shape)
    np.testing.assert_allclose(staple(votes)[split], expected[split], atol=1e-4)


@pytest.mark.parametrize("box", [(2, 1), (1, 2), (3, 1, 1), (1, 3, 1), (1, 1, 3), (1, 1)])
def test_staple_where_members_differ_along_a_line(box):
    """ITK takes arrays one voxel wide for transposed ones."""
    votes = np.zeros((3, *[8] * len(box)), bool)
    votes[:, 4:7] = True
    votes[(0, *(slice(1, 1 + n) for n in box))] = True
    votes[(1, *(slice(1, 1 + n) for n in box))] = True
    result = staple(votes)
    assert (result > 0.5).sum() == votes[2].sum() + np.prod(box) and np.isfinite(result).all()


def test_staple_of_a_class_that_is_absent_fills_everything_or_is_unanimous():
    assert (staple(np.zeros((5, 8, 8), bool)) == 0).all()
    assert (staple(np.ones((5, 8, 8, 4), bool)) == 1).all()
    alike = np.broadcast_to(np.eye(8, dtype=bool), (5, 8, 8))
    assert (staple(alike) == np.eye(8)).all()
    assert (staple(alike[:1]) == np.eye(8)).all()


@settings(deadline=None, max_examples=30)
@given(arrays(bool, st.tuples(st.integers(1, 5), st.integers(2, 6), st.integers(2, 6))), st.randoms())
def test_staple_is_finite_keeps_agreement_and_ignores_the_order(votes, random):
    result = staple(votes)
    assert np.isfinite(result).all() and (result >= 0).all() and (result <= 1).all()
    assert (result[votes.all(0)] == 1).all() and (result[~votes.any(0)] == 0).all()
    order = list(range(len(votes)))
    random.shuffle(order)
    np.testing.assert_allclose(staple(votes[order]), result, atol=1e-5)


def test_mean_and_vote():
    members = torch.tensor([[[0.9, 0.2]], [[0.4, 0.1]], [[0.8, 0.6]]])[..., None]
    torch.testing.assert_close(MemberSummary(members).fuse("mean")[0, :, 0], torch.tensor([0.7, 0.3]))
    torch.testing.assert_close(MemberSummary(members).fuse("vote")[0, :, 0], torch.tensor([2 / 3, 1 / 3]))
    one = members[:1]
    torch.testing.assert_close(MemberSummary(one).fuse("staple"), (one[0] > 0.5).float())


def dice(a: torch.Tensor, b: torch.Tensor) -> float:
    total = float(a.sum() + b.sum())
    return 2 * float((a & b).sum()) / total if total else 1.0


def mean_dice(mask: torch.Tensor, votes: torch.Tensor) -> float:
    return float(np.mean([dice(mask, vote) for vote in votes]))


def uneven_members(shape: tuple[int, ...], number: int, seed: int, classes: int = 1) -> torch.Tensor:
    """Members of different sizes; probabilities are multiples of 1 / 64, so that no two means are nearly equal."""
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.rand(classes, *shape, generator=generator)
    bias = 0.8 * torch.rand(number, classes, *[1] * len(shape), generator=generator) - 0.4
    noise = 0.3 * torch.rand(number, classes, *shape, generator=generator)
    return ((smooth + bias + noise - 0.15).clamp(0, 1) * 64).round() / 64


@pytest.mark.parametrize("shape", [(9, 8), (6, 5, 4)])
@pytest.mark.parametrize("number", [1, 2, 4, 8])
def test_expected_dice_is_the_best_of_all_thresholds(shape, number):
    for seed in range(5):
        members = uneven_members(shape, number, seed, classes=3)
        summary = MemberSummary(members)
        masks = summary.fuse("expected_dice") > 0.5
        for mask, mean, votes in zip(masks, summary.mean, summary.votes.transpose(0, 1)):
            searched = [mean_dice(mean > t, votes) for t in [*mean.unique().tolist(), -1.0]]
            assert mean_dice(mask, votes) == pytest.approx(max(searched), abs=1e-12)
            assert mean[mask].min() > mean[~mask].max()  # it is a threshold of the mean


def test_expected_dice_where_members_are_of_different_minds():
    """Two members see one half, two the other, one nothing: the majority's mask is empty, and like one member only."""
    members = torch.zeros(5, 1, 4, 8)
    members[:2, :, :2] = members[2:4, :, 2:] = 1
    summary = MemberSummary(members)
    votes = summary.votes[:, 0]
    assert not (summary.fuse("vote") > 0.5).any()
    mask = summary.fuse("expected_dice")[0] > 0.5
    assert mask.all() and mean_dice(mask, votes) == pytest.approx(4 / 5 * 2 / 3)
    assert expected_dice_threshold(summary.mean[0], votes) == pytest.approx(0.4, abs=1 / 1024)  # as near as can be


@pytest.mark.parametrize("empty, expected", [(0, 16), (2, 16), (4, 0), (5, 0)])
def test_an_empty_mask_scores_the_share_of_empty_members(empty, expected):
    members = torch.full((5, 1, 4, 8), 0.1)
    members[empty:, :, :2] = 0.9
    assert int((MemberSummary(members).fuse("expected_dice") > 0.5).sum()) == expected


def test_thresholds_that_are_as_good_give_way_to_one_half():
    members = torch.tensor([0.0, 0.2, 0.45, 0.55, 1.0]).expand(3, 1, 2, 5)
    summary = MemberSummary(members)
    assert expected_dice_threshold(summary.mean[0], summary.votes[:, 0]) == 0.5
    torch.testing.assert_close(summary.fuse("expected_dice"), summary.mean)


def test_expected_dice_moves_the_threshold_to_one_half_and_keeps_the_order():
    just_above = torch.tensor(0.25).nextafter(torch.tensor(1.0))
    mean = torch.tensor([0.0, 0.1, 0.25, just_above, 0.6, 1.0])
    summary = MemberSummary([mean.view(1, 1, 6)])
    summary.votes = (mean > 0.25).view(1, 1, 1, 6)  # as if members of different sizes had that mean
    fused = summary.fuse("expected_dice").flatten()
    assert expected_dice_threshold(mean, summary.votes[0]) == 0.25
    assert (fused > 0.5).tolist() == [False] * 3 + [True] * 3
    assert (fused.diff() > 0).all() and fused[0] == 0 and fused[-1] == 1
    torch.testing.assert_close(fused[[1, 4]], torch.tensor([0.2, 0.5 + 0.5 * 0.35 / 0.75]))


def test_classes_compete_after_expected_dice_too():
    members = uneven_members((9, 8), 6, 3, classes=2)
    regions = Regions(2)
    masks = regions.binarise(MemberSummary(members, regions.binarise).fuse("expected_dice"))
    assert not masks.all(0).any() and masks.flatten(1).any(1).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(0, 10**6))
def test_no_mean_at_one_half_has_a_greater_mean_dice(number, seed):
    summary = MemberSummary(uneven_members((5, 6), number, seed))
    best = mean_dice(summary.fuse("expected_dice")[0] > 0.5, summary.votes[:, 0])
    assert best >= mean_dice(summary.fuse("mean")[0] > 0.5, summary.votes[:, 0]) - 1e-12


def test_fusions_are_listed_where_another_is_asked_for():
    assert [check_fusion(name) for name in FUSIONS] == ["staple", "mean", "vote", "expected_dice"]
    with pytest.raises(InputError, match="fusion='median' must be one of staple, mean, vote, expected_dice"):
        check_fusion("median")


def test_entropies():
    torch.testing.assert_close(binary_entropy(torch.tensor([0.0, 0.5, 1.0])), torch.tensor([0.0, 1.0, 0.0]))
    split = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)  # sure, and of different minds
    unsure = torch.full((2, 1, 1, 1), 0.5)  # of one mind that it cannot be told
    for members, entropy, information in ((split, 1.0, 1.0), (unsure, 1.0, 0.0)):
        assert MemberSummary(members).predictive_entropy().item() == pytest.approx(entropy)
        assert MemberSummary(members).mutual_information().item() == pytest.approx(information, abs=1e-6)
    p = torch.tensor([0.2, 0.7, 0.9], dtype=torch.float64)
    h = lambda x: -x * np.log2(x) - (1 - x) * np.log2(1 - x)  # noqa: E731
    expected = h(float(p.mean())) - float(h(p.numpy()).mean())
    assert MemberSummary(p.view(3, 1, 1, 1)).mutual_information().item() == pytest.approx(expected, abs=1e-6)


def test_spread_among_members():
    members = torch.zeros(3, 2, 4, 4)
    members[0, 0, :2] = members[1, 0, :2] = 0.9
    members[2, 0, :1] = 0.7
    summary = MemberSummary(iter(members))
    assert summary.sizes().tolist() == [[8, 0], [8, 0], [4, 0]]
    torch.testing.assert_close(summary.pairwise_dice(), torch.tensor([(1 + 2 / 3 + 2 / 3) / 3, 1.0]).double())
    assert MemberSummary(members[:1]).pairwise_dice().isnan().all()
    with pytest.raises(InputError, match="num_members"):
        MemberSummary([])


@pytest.mark.parametrize("shape", [(6, 5), (4, 5, 3)])
def test_dice_of_all_pairs(shape):
    masks = torch.rand(5, *shape) > 0.6
    masks[1] = masks[3] = False
    expected = [[dice(a, b) for b in masks] for a in masks]
    torch.testing.assert_close(dice_matrix(masks), torch.tensor(expected, dtype=torch.float64))


def test_the_members_that_differ_most():
    masks = torch.zeros(6, 2, 1, 8, dtype=torch.bool)
    masks[:, 0, :, :2] = True
    masks[4, 0] = torch.tensor([1, 1, 0, 0, 0, 0, 0, 0])
    masks[1, 0] = torch.tensor([0, 0, 1, 1, 1, 0, 0, 0])
    masks[3, 1] = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])  # differs in the other class
    pairs = {pair: dice(masks[pair[0]], masks[pair[1]]) for pair in combinations(range(6), 2)}
    assert pairs[0, 1] == min(pairs.values())
    assert most_different(masks) == [0, 1, 3]
    assert most_different(masks, 2) == [0, 1]


def test_the_members_that_differ_most_of_few_or_of_equal_ones():
    masks = torch.ones(5, 1, 2, 2, dtype=torch.bool)
    assert [most_different(masks[:n]) for n in (1, 2, 3, 5)] == [[], [0, 1], [0, 1, 2], [0, 1, 2]]
    assert most_different(~masks) == [0, 1, 2]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_probability_is_the_mean_of_the_members_whatever_the_fusion(fusion):
    pred = uneven_members((6, 5), 4, seed=0, classes=2)
    result = FuseMembersd("pred", 2, fusion=fusion)({"pred": pred.flatten(0, 1)})
    torch.testing.assert_close(result["prob"], pred.mean(0))
    fused = MemberSummary(pred, Regions(2).binarise).fuse(fusion)
    assert torch.equal(result["mask"] > 0, Regions(2).binarise(fused))


@pytest.mark.parametrize("regions", [None, {"disc": [1, 2], "cup": [2]}])
def test_masks_of_members_are_what_each_would_be_alone(regions):
    """Exclusive classes compete within a member."""
    pred = torch.rand(3, 2, 6, 5, generator=torch.Generator().manual_seed(0))
    assert (pred > 0.5).all(1).any()
    result = FuseMembersd("pred", 2, regions)({"pred": pred.flatten(0, 1)})
    alone = [FuseMembersd("pred", 2, regions, "mean")({"pred": member})["mask"] > 0 for member in pred]
    assert torch.equal(result["member_masks"], torch.stack(alone))
    torch.testing.assert_close(result["member_sizes"], torch.stack(alone).double().mean((2, 3)))


def test_members_are_inverted_one_by_one():
    """What comes out is the same as when all of them are taken back at once; only one is at a time."""
    pred = torch.rand(6, 5, 7)
    together = FuseMembersd("pred", 2, fusion="mean")({"pred": pred.flip(1)})
    seen = []

    def invert(data):
        seen.append(data["pred"].shape)
        return {**data, "pred": data["pred"].flip(1) + 0}

    single = FuseMembersd("pred", 2, fusion="mean", invert=invert)({"pred": pred})
    assert seen == [(2, 5, 7)] * 3
    for name, value in together.items():
        torch.testing.assert_close(single[name], value)


@pytest.mark.parametrize("fusion", ["expected_dice", "mean", "vote"])
def test_parts_of_a_volume_are_fused_as_the_whole(fusion, monkeypatch):
    """Large volumes are taken in parts where it saves memory; that changes no bit."""
    torch.manual_seed(0)
    members = [torch.rand(2, 7, 9, 5) ** 2 for _ in range(4)]
    whole = MemberSummary(members)
    expected = whole.fuse(fusion)
    monkeypatch.setattr("medsegdiff_monai.fusion.CHUNK", 13)
    assert torch.equal(MemberSummary(members).fuse(fusion), expected)
