"""The ensemble inferer: what its noise depends on, windows, sizes; and the training inferer."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor

from medsegdiff_monai.engines import SegmentationDiffusionPrepareBatch
from medsegdiff_monai.errors import InputError
from medsegdiff_monai.inferers import DiffusionEnsembleInferer, DiffusionTrainingInferer
from medsegdiff_monai.losses import DiffusionSegmentationLoss
from medsegdiff_monai.networks import MedSegDiffUNet
from medsegdiff_monai.schedulers import DDIMScheduler, DDPMScheduler


def inferer(**kwargs):
    settings = {"num_classes": 2, "roi_size": (8, 8), "num_members": 3, "num_steps": 2, **kwargs}
    return DiffusionEnsembleInferer(DDIMScheduler(schedule="cosine"), **settings)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    net = MedSegDiffUNet(2, 1, 2, channels=[8, 8], num_res_blocks=1, ff_size=8).eval()
    for parameter in net.parameters():  # what starts at zero counts too
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    return net


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (21, 13), (3, 30)])
def test_any_size_comes_back(network, size):
    image = torch.rand(2, 1, *size)
    out = inferer()(inputs=image, network=network)
    assert out.shape == (2, 6, *size)
    assert out.min() >= 0 and out.max() <= 1


def test_result_depends_neither_on_the_batch_nor_on_the_number_of_members_or_windows(network):
    images = torch.rand(3, 1, 12, 8)
    together = inferer()(images, network)
    alone = torch.cat([inferer()(image[None], network) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(inferer(num_members=1)(images, network), together[:, :2], atol=1e-5, rtol=0)
    torch.testing.assert_close(inferer(sw_batch_size=4)(images, network), together, atol=1e-5, rtol=0)


def test_members_and_seeds_differ_but_cases_do_not():
    noise = inferer().noise((8, 8)).unflatten(0, (3, 2))
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(noise, inferer().noise((8, 8)).unflatten(0, (3, 2)))
    assert not torch.equal(noise, inferer(seed=1).noise((8, 8)).unflatten(0, (3, 2)))


def test_windows_see_their_piece_of_one_noise_field():
    """A network that returns the noise it gets: what comes back is the field, without a seam."""
    seen = inferer(num_steps=1, num_members=2)
    out = seen(torch.zeros(1, 1, 20, 17), lambda x, timesteps, context: x.clamp(-1, 1))
    expected = (seen.noise((20, 17)).clamp(-1, 1) + 1) / 2
    torch.testing.assert_close(out[0], expected, atol=1e-5, rtol=0)


def test_constant_network_leaves_no_seam():
    out = inferer()(torch.rand(1, 1, 30, 19), lambda x, timesteps, context: torch.full_like(x, 0.5))
    torch.testing.assert_close(out, torch.full_like(out, 0.75))


def test_image_is_encoded_once_for_all_members_and_steps(network):
    calls = []

    class Counting:
        def encode_context(self, image):
            calls.append(image.shape)
            return network.encode_context(image)

        def __call__(self, x, timesteps, context):
            assert x.shape[0] == 3
            return network(x, timesteps, context)

    inferer()(torch.rand(1, 1, 8, 8), Counting())
    assert calls == [(1, 1, 8, 8)]


def test_meta_tensors_keep_their_geometry(network):
    image = MetaTensor(torch.rand(1, 1, 9, 9), affine=torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0])))
    out = inferer()(image, network)
    assert isinstance(out, MetaTensor)
    torch.testing.assert_close(out.affine, image.affine)


def test_members_can_be_drawn_a_few_at_a_time(network):
    images = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(inferer(member_batch_size=2)(images, network), inferer()(images, network))


def test_padding_is_that_of_training(network):
    """A volume smaller than the window is padded with 0, the mean of a normalised image."""
    seen = []

    def spy(x, timesteps, context):
        seen.append(context)
        return torch.zeros_like(x)

    inferer()(torch.rand(1, 1, 4, 8) - 5, spy)
    assert seen[0].shape == (3, 1, 8, 8) and (seen[0][:, :, :2] == 0).all() and (seen[0][:, :, 6:] == 0).all()


def test_samplers_that_draw_noise_are_refused():
    for scheduler in (DDPMScheduler(), DDIMScheduler(eta=1.0)):
        with pytest.raises(InputError, match="draws noise at every step"):
            DiffusionEnsembleInferer(scheduler, 1, (8, 8))


@pytest.mark.parametrize("prediction", ["sample", "epsilon", "v_prediction"])
def test_one_training_pass(prediction):
    torch.manual_seed(0)
    scheduler = DDIMScheduler(prediction_type=prediction)
    batch = {"image": torch.rand(2, 1, 8, 8), "label": (torch.rand(2, 2, 8, 8) > 0.5).float()}
    mask, target, args, kwargs = SegmentationDiffusionPrepareBatch(scheduler)(batch, "cpu")
    torch.testing.assert_close(mask, 2 * batch["label"] - 1)
    expected = {
        "sample": batch["label"],
        "epsilon": kwargs["noise"],
        "v_prediction": scheduler.get_velocity(mask, kwargs["noise"], kwargs["timesteps"]),
    }[prediction]
    torch.testing.assert_close(target, expected)
    torch.testing.assert_close(kwargs["condition"], batch["image"])
    net = MedSegDiffUNet(2, 1, 2, channels=[8, 8], num_res_blocks=1, ff_size=8, prediction_type=prediction)
    out = DiffusionTrainingInferer(scheduler)(mask, net, *args, **kwargs)
    loss = DiffusionSegmentationLoss(prediction)(out, target)
    if prediction != "sample":
        torch.testing.assert_close(loss, ((out - target) ** 2).mean())
    loss.backward()
    noisy = scheduler.add_noise(mask, kwargs["noise"], kwargs["timesteps"])
    torch.testing.assert_close(out, net(noisy, kwargs["timesteps"], batch["image"]))


def test_loss_on_x0_is_dice_and_cross_entropy_in_float32():
    torch.manual_seed(0)
    logits, target = torch.randn(3, 2, 6, 6, dtype=torch.float64), (torch.rand(3, 2, 6, 6) > 0.6).double()
    p = torch.sigmoid(logits)
    dice = 1 - (2 * (p * target).sum((2, 3)) + 1e-5) / (p.sum((2, 3)) + target.sum((2, 3)) + 1e-5)
    bce = -(target * p.log() + (1 - target) * (1 - p).log())
    loss = DiffusionSegmentationLoss("sample")
    assert loss(logits, target).item() == pytest.approx(float(dice.mean() + bce.mean()), abs=1e-5)
    assert loss(logits.bfloat16(), target).dtype == torch.float32


def test_training_under_bfloat16_autocast_returns_finite_gradients():
    scheduler = DDIMScheduler()
    batch = {"image": torch.rand(1, 1, 4, 4), "label": torch.ones(1, 1, 4, 4)}
    mask, target, _, kwargs = SegmentationDiffusionPrepareBatch(scheduler)(batch, "cpu")
    net = MedSegDiffUNet(2, 1, 1, channels=[8, 8], num_res_blocks=1, ff_size=4)
    out = DiffusionTrainingInferer(scheduler, amp="true")(mask, net, **kwargs)
    assert out.dtype == torch.bfloat16
    DiffusionSegmentationLoss()(out, target).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
