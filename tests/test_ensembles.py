"""Ensembles of plain networks, each against a computation by hand."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor
from monai.networks.nets import UNet
from torch import nn

from medsegdiff_monai.ensembles import Dropout, EnsembleInferer, Flips, Networks
from medsegdiff_monai.errors import InputError
from medsegdiff_monai.transforms import FuseMembersd


def unet(seed: int = 0, out_channels: int = 2, dropout: float = 0.0) -> UNet:
    torch.manual_seed(seed)
    return UNet(2, 1, out_channels, channels=(4, 8), strides=(2,), num_res_units=1, dropout=dropout).eval()


IMAGE = torch.rand(2, 1, 16, 12, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_a_deep_ensemble_has_a_member_for_each_network() -> None:
    networks = [unet(seed) for seed in range(3)]
    found = EnsembleInferer(Networks(networks), (16, 12))(inputs=IMAGE, network=unet(9))
    torch.testing.assert_close(found, torch.cat([network(IMAGE).sigmoid() for network in networks], 1))


@torch.no_grad()
def test_flips_are_undone() -> None:
    network = unet()
    found = EnsembleInferer(Flips([0, 1]), (16, 12))(IMAGE, network)
    expected = [network(IMAGE.flip(d)).sigmoid().flip(d) for d in ([], [2], [3], [2, 3])]
    torch.testing.assert_close(found, torch.cat(expected, 1))
    # what does not care about flips has equal members
    same = EnsembleInferer(Flips([0, 1]), (16, 12))(IMAGE, nn.Identity())
    torch.testing.assert_close(same, IMAGE.sigmoid().repeat(1, 4, 1, 1))


@torch.no_grad()
def test_dropout_is_active_seeded_and_leaves_no_trace() -> None:
    network = unet(dropout=0.5)
    state = torch.get_rng_state()
    inferer = EnsembleInferer(Dropout(3, seed=7), (16, 12))
    found = inferer(IMAGE, network)
    assert torch.equal(state, torch.get_rng_state())
    assert not any(module.training for module in network.modules())
    torch.testing.assert_close(inferer(IMAGE, network), found)
    assert not torch.equal(EnsembleInferer(Dropout(3, seed=8), (16, 12))(IMAGE, network), found)

    expected = []
    for member in range(3):
        for module in network.modules():
            module.train(isinstance(module, nn.Dropout))
        torch.manual_seed(7 * 1_000_003 + member)
        expected.append(network(IMAGE[1:]).sigmoid())
    torch.testing.assert_close(found[1:], torch.cat(expected, 1))  # whatever is beside it in the batch
    assert not torch.equal(found[:, :2], found[:, 2:4])


def test_a_network_in_training_is_so_again_afterwards() -> None:
    network = unet(dropout=0.5).train()
    for members in (Dropout(2), Flips([0]), Networks([network])):
        found = EnsembleInferer(members, (16, 12))(IMAGE, network)
        assert not found.requires_grad
        assert all(module.training for module in network.modules())


def test_dropout_without_dropout_is_refused() -> None:
    with pytest.raises(InputError, match="no active dropout"):
        EnsembleInferer(Dropout(2), (16, 12))(IMAGE, unet())


@torch.no_grad()
def test_softmax_leaves_the_background_out() -> None:
    network = unet(out_channels=3)
    found = EnsembleInferer(Flips([]), (16, 12), activation="softmax")(IMAGE, network)
    torch.testing.assert_close(found, network(IMAGE).softmax(1)[:, 1:])
    with pytest.raises(InputError, match="activation='argmax' must be one of sigmoid, softmax"):
        EnsembleInferer(Flips([]), (16, 12), activation="argmax")


@torch.no_grad()
def test_windows_cover_large_images_and_small_ones_are_padded() -> None:
    pointwise = nn.Conv2d(1, 2, 1)  # of no context, so that windows change nothing
    for size in ((40, 25), (7, 30), (5, 4)):
        image = torch.rand(1, 1, *size)
        found = EnsembleInferer(Flips([0]), (16, 12))(image, pointwise)
        torch.testing.assert_close(found, pointwise(image).sigmoid().repeat(1, 2, 1, 1))


@torch.no_grad()
def test_members_go_into_the_same_fusion_with_the_image_s_geometry() -> None:
    affine = torch.diag(torch.tensor([2.0, 3.0, 1.0, 1.0]))
    inputs = MetaTensor(IMAGE[:1], affine=affine)
    found = EnsembleInferer(Networks([unet(0), unet(1)]), (16, 12))(inputs, None)
    assert isinstance(found, MetaTensor) and torch.equal(found.affine, affine)
    fused = FuseMembersd("pred", num_classes=2)({"pred": found[0]})
    torch.testing.assert_close(torch.as_tensor(fused["prob"]), found[0].as_tensor().unflatten(0, (2, 2)).mean(0))
