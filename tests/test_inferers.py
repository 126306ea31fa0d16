"""The ensemble inferer: what its noise depends on, windows, sizes."""

from __future__ import annotations

import copy
import gc
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from monai.data import MetaTensor
from monai.networks.schedulers import DDPMScheduler as MonaiDDPMScheduler

from medsegdiff_monai import windows
from medsegdiff_monai.errors import InputError
from medsegdiff_monai.inferers import DiffusionEnsembleInferer
from medsegdiff_monai.networks import MedSegDiffUNet
from medsegdiff_monai.schedulers import DDIMScheduler, DDPMScheduler, DPMSolverPlusPlusScheduler


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


@pytest.mark.parametrize("size", [(8, 8), (12, 8)])
def test_result_depends_neither_on_the_batch_nor_on_the_windows_at_a_time(size, network):
    images = torch.rand(3, 1, *size)
    together = inferer()(images, network)
    alone = torch.cat([inferer()(image[None], network) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(inferer(sw_batch_size=4)(images, network), together, atol=1e-5, rtol=0)
    if size == (8, 8):  # in windows, members are matched with each other
        torch.testing.assert_close(inferer(num_members=1)(images, network), together[:, :2], atol=1e-5, rtol=0)


def test_members_and_seeds_differ_but_cases_do_not():
    noise = inferer().noise()
    assert noise.shape == (3, 2, 8, 8) and not torch.equal(noise[0], noise[1])
    assert torch.equal(noise, inferer().noise())
    assert torch.equal(noise[1:], inferer().noise(range(1, 3)))
    assert not torch.equal(noise, inferer(seed=1).noise())
    assert not torch.equal(noise, inferer().noise(step=1))


@pytest.mark.parametrize("step", [0, 1])
def test_members_come_in_pairs_of_opposite_noise(step):
    noise = inferer(num_members=200).noise(step=step)
    assert torch.equal(noise[1::2], -noise[::2])
    pairs = noise[::2].flatten()
    assert abs(float(pairs.mean())) < 0.05 and abs(float(pairs.std()) - 1) < 0.05
    correlation = torch.corrcoef(noise[::2].flatten(1)) - torch.eye(100)
    assert correlation.abs().max() < 0.5  # of 128 numbers each: pairs are independent


@torch.no_grad()
@pytest.mark.parametrize("batch", [None, 1, 3])
@pytest.mark.parametrize("axes", [[0], [0, 1]])
def test_every_second_pair_sees_the_image_flipped(axes, batch, network):
    images, dims = torch.rand(2, 1, 8, 8), [axis - 2 for axis in axes]
    found, plain, mirrored = (inferer(num_members=7, flip_axes=a, member_batch_size=batch) for a in (axes, [], []))
    noise = plain.noise
    mirrored.noise = lambda *args: noise(*args).flip(dims)
    upright = plain(images, network).unflatten(1, (7, 2))
    flipped = mirrored(images.flip(dims), network).flip(dims).unflatten(1, (7, 2))
    assert (flipped - upright).abs().amax((0, 2, 3, 4)).min() > 1e-3
    expected = [flipped[:, i] if i in (2, 3, 6) else upright[:, i] for i in range(7)]
    torch.testing.assert_close(found(images, network).unflatten(1, (7, 2)), torch.stack(expected, 1), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("axes", [[], [0]])
@pytest.mark.parametrize("pack", [tuple, lambda levels: {"levels": levels, "scale": torch.tensor(1.0)}])
def test_an_encoder_may_return_any_container(pack, axes, network):
    class Own(torch.nn.Module):
        def encode_context(self, image):
            return pack(network.encode_context(image))

        def forward(self, x, timesteps, context):
            return network(x, timesteps, list(context["levels"] if isinstance(context, dict) else context))

    image, settings = torch.rand(2, 1, 8, 8), {"num_members": 5, "flip_axes": axes}
    torch.testing.assert_close(inferer(**settings)(image, Own()), inferer(**settings)(image, network))


@pytest.mark.parametrize("axes", [[-1], [2], [0, 0], 0, "0", [True], [0.0]])
def test_axes_of_flips_that_are_no_axes_are_refused(axes):
    with pytest.raises(InputError, match=r"flip_axes=.* must be a list of different axes from 0 to 1"):
        inferer(flip_axes=axes)


@pytest.mark.parametrize("more", [{}, {"member_batch_size": 2}, {"agreement_threshold": 1.0}])
@pytest.mark.parametrize("kind, size", [(DDIMScheduler, (8, 8)), (DDIMScheduler, (13, 21)), (DDPMScheduler, (8, 8))])
def test_flips_change_nothing_for_a_network_that_does_not_mind(kind, size, more):
    """Image, noise of all steps and masks are flipped together, in windows as well."""

    def network(x, timesteps, context):
        return (x * context).clamp(-1, 1)

    image, settings = torch.randn(2, 1, *size), {"num_members": 6, **more}
    flipped, plain = inferer(flip_axes=[0], **settings), inferer(**settings)
    for one in (flipped, plain):
        one.scheduler = kind(schedule="cosine", prediction_type="sample")
    torch.testing.assert_close(flipped(image, network), plain(image, network), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (12, 8)])
def test_flips_are_those_of_the_training_that_the_weights_remember(size, network):
    image, old = torch.rand(1, 1, *size), copy.deepcopy(network)
    network = copy.deepcopy(network)
    network.record.flipped.copy_(torch.tensor([0.0, 1.0]))
    settings = {"num_members": 4}
    assert torch.equal(inferer(**settings)(image, network), inferer(flip_axes=[1], **settings)(image, old))
    assert torch.equal(inferer(**settings)(image, old), inferer(flip_axes=[], **settings)(image, network))
    assert not torch.equal(inferer(**settings)(image, network), inferer(**settings)(image, old))


def test_windows_see_their_piece_of_one_noise_field():
    """A network that returns the noise it gets: what comes back is the field, which repeats itself, without a seam."""
    seen = inferer(num_steps=1, num_members=2)
    out = seen(torch.zeros(1, 1, 20, 17), lambda x, timesteps, context: x.clamp(-1, 1))
    expected = (seen.noise().repeat(1, 1, 3, 3)[..., :20, :17].flatten(0, 1).clamp(-1, 1) + 1) / 2
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


STOCHASTIC = [lambda: DDPMScheduler(schedule="cosine"), lambda: DDIMScheduler(schedule="cosine", eta=1.0)]


@pytest.mark.parametrize("make", STOCHASTIC)
def test_noise_of_every_step_depends_on_the_member_alone(make, network):
    settings = {"num_classes": 2, "roi_size": (8, 8), "num_steps": 3}
    images = torch.rand(2, 1, 8, 8)
    together = DiffusionEnsembleInferer(make(), num_members=3, **settings)(images, network)
    few = DiffusionEnsembleInferer(make(), num_members=3, member_batch_size=2, **settings)
    torch.testing.assert_close(few(images[1:], network), together[1:], atol=1e-5, rtol=0)
    assert not torch.equal(together[:, :2], together[:, 2:4])
    settings["num_steps"] = 1000  # the sampler really adds noise: a network that says 0 leaves more than DDIM does
    for scheduler, lively in ((make(), True), (DDIMScheduler(schedule="cosine"), False)):
        x = DiffusionEnsembleInferer(scheduler, num_members=1, **settings)
        seen = []
        x(images[:1], lambda x, timesteps, context, seen=seen: seen.append(x) or torch.zeros_like(x))
        steps = torch.stack([b - a for a, b in pairwise(seen[400:501])])
        assert (steps.std() > 0.01) == lively


@pytest.mark.parametrize("make", STOCHASTIC)
def test_samplers_that_draw_noise_are_refused_on_windows(make, network):
    with pytest.raises(InputError, match=r"draws noise at every step.*roi_size=\[8, 8\].*eta=0"):
        DiffusionEnsembleInferer(make(), 2, (8, 8))(torch.rand(1, 1, 9, 8), network)


@pytest.mark.parametrize("size", [(8, 8), (14, 9)])
def test_running_out_of_memory_halves_the_members_at_a_time_once(size, network, caplog):
    image = torch.rand(1, 1, *size)
    expected = inferer(num_members=5)(image, network)

    def crammed(limit):
        def call(x, timesteps, context):
            if len(x) > limit:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return network(x, timesteps, context)

        return call

    few = inferer(num_members=5)
    torch.testing.assert_close(few(image, crammed(2)), expected, atol=1e-5, rtol=0)
    assert few.member_batch_size == 2 and caplog.text.count("member_batch_size is now 2") == 1
    large = inferer(num_members=5, member_batch_size=64)  # what was drawn is halved, not what was asked for
    torch.testing.assert_close(large(image, crammed(2)), expected, atol=1e-5, rtol=0)
    with pytest.raises(torch.OutOfMemoryError):
        inferer(num_members=5)(image, crammed(1))
    with pytest.raises(RuntimeError, match="something else"):
        inferer()(image, lambda *args: (_ for _ in ()).throw(RuntimeError("something else")))


@pytest.mark.parametrize("size", [(8, 8), (14, 9)])
def test_drawing_stops_when_the_mask_of_the_mean_is_stable(size, network, monkeypatch):
    # members that are drawn one at a time have no other member to change places with
    monkeypatch.setattr(windows, "best_match", lambda members, reference: torch.arange(len(members)))
    image = torch.rand(1, 1, *size)
    everyone = inferer(num_members=9)(image, network).unflatten(1, (9, 2))
    counts = []
    for threshold in (0.5, 0.9, 1.0):
        out = inferer(num_members=9, agreement_threshold=threshold)(image, network).unflatten(1, (-1, 2))
        torch.testing.assert_close(out, everyone[:, : out.shape[1]], atol=1e-5, rtol=0)
        counts.append(out.shape[1])
        masks = [everyone[:, :n].mean(1) > 0.5 for n in range(1, 10)]
        agree = [bool((dice(a, b) >= threshold).all()) for a, b in pairwise(masks)]
        assert counts[-1] == (agree.index(True) + 2 if any(agree) else 9)
    assert counts == sorted(counts) and counts[0] < 9
    constant = inferer(num_members=9, agreement_threshold=1.0)
    assert constant(image, lambda x, timesteps, context: torch.ones_like(x)).shape[1] == 2 * 2


def dice(a, b):
    return 2 * (a & b).sum((2, 3)) / (a.sum((2, 3)) + b.sum((2, 3))).clamp(min=1) + ((a | b).sum((2, 3)) == 0)


@pytest.mark.parametrize("scheduler", [DDIMScheduler(), DPMSolverPlusPlusScheduler(), DDPMScheduler()])
def test_memory_does_not_grow_with_steps(scheduler):
    """What is alive at a pass is as large at the last step as at the third."""
    alive = []

    def network(x, timesteps, context):
        gc.collect()
        alive.append(sum(o.numel() for o in gc.get_objects() if isinstance(o, torch.Tensor)))
        return x.clamp(-1, 1)

    settings = {"num_classes": 1, "roi_size": (8, 8), "num_members": 2, "num_steps": 12}
    DiffusionEnsembleInferer(scheduler, **settings)(torch.rand(1, 1, 8, 8), network)
    assert len(alive) == 12 and alive[-1] <= alive[2]


def test_progress_counts_every_pass(network):
    passes = []
    inferer(num_members=5, member_batch_size=2, progress=passes.append)(torch.rand(2, 1, 8, 8), network)
    assert passes == [4, 4, 4, 4, 2, 2]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_members": 0}, "num_members=0.* at least 1"),
        ({"member_batch_size": 0}, "member_batch_size=0"),
        ({"num_steps": 2.5}, "num_steps=2.5 must be a whole number"),
        ({"num_steps": "two"}, "num_steps=two must be a whole number"),
        ({"num_steps": float("inf")}, "num_steps=inf must be a whole number"),
        ({"num_members": None}, "num_members=None must be a whole number"),
        ({"num_steps": 1001}, "num_steps=1001 is more than the num_train_timesteps=1000.*fewer"),
        ({"agreement_threshold": 1.5}, "agreement_threshold=1.5"),
        ({"agreement_threshold": "x"}, "agreement_threshold='x' is a Dice"),
        ({"num_classes": 0}, "num_classes=0 must be a whole number of at least 1"),
        ({"sw_batch_size": "x"}, "sw_batch_size=x must be a whole number"),
        ({"roi_size": 8}, r"roi_size=8 must be a list .* such as \[64, 64\]"),
        ({"roi_size": (8, 0)}, "roi_size=0 must be a whole number"),
    ],
)
def test_numbers_out_of_range_are_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        inferer(**wrong)


def test_numbers_may_be_text_as_servers_send_it(network):
    image = torch.rand(1, 1, 8, 8)
    few = inferer(num_members="3", num_steps="2", member_batch_size=2.0)
    torch.testing.assert_close(few(image, network), inferer()(image, network), atol=1e-5, rtol=0)


def test_a_sampler_whose_noise_is_not_the_members_is_refused():
    with pytest.raises(InputError, match=r"take medsegdiff_monai\.schedulers\.DDPMScheduler"):
        DiffusionEnsembleInferer(MonaiDDPMScheduler(), num_classes=1, roi_size=(8, 8))


def test_a_network_in_training_mode_is_sampled_in_evaluation_mode_and_left_as_it_was():
    net = MedSegDiffUNet(2, 1, 1, channels=[8, 8], num_res_blocks=1, ff_size=8).train()
    torch.nn.init.normal_(net.out_conv.weight)
    infer = DiffusionEnsembleInferer(DDIMScheduler(), num_classes=1, roi_size=[8, 8], num_members=1)
    image = torch.randn(1, 1, 8, 8)
    out = infer(image, net)
    assert net.training
    torch.testing.assert_close(out, infer(image, net.eval()))
    assert not net.training


def test_one_inferer_serves_many_threads():
    """A sampler remembers its last step; images segmented at the same time must not meet in it."""

    class Network(torch.nn.Module):
        def forward(self, x, timesteps, context):
            time.sleep(0.002)  # lets the others in between any two steps
            return torch.tanh(x + context.mean() + timesteps / 1000)

    shared = DiffusionEnsembleInferer(
        DPMSolverPlusPlusScheduler(schedule="cosine", signal_scale=0.2), 2, (8, 8), num_members=2, num_steps=6
    )
    images = [torch.full((1, 1, 8, 8), float(i)) for i in range(8)]
    alone = [shared(image, Network()) for image in images]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda image: shared(image, Network()), images))
    for one, other in zip(alone, together):
        assert torch.equal(one, other)
