"""STAPLE against an independent EM, and uncertainty against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from medsegdiff_monai.errors import InputError
from medsegdiff_monai.fusion import MemberSummary, binary_entropy, staple
from medsegdiff_monai.transforms import FuseMembersd


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
