"""The network: the paper's wiring, sizes, timesteps, encoding once, options and their errors."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.inferers import DiffusionInferer
from monai.networks.nets.diffusion_model_unet import get_timestep_embedding
from monai.networks.schedulers import DDIMScheduler
from torch.nn import functional as F

from medsegdiff_monai.networks import FFParser, MedSegDiffUNet

IMAGE = (2, 3, 16, 24)
MASK = (2, 2, 16, 24)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy masks, a timestep for each, images."""
    return torch.randn(MASK), torch.tensor([500, 20]), torch.randn(IMAGE)


# --- the paper's wiring -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("levels", "fused"), [(2, [0]), (3, [1]), (4, [1, 2]), (5, [2, 3]), (6, [2, 3]), (7, [3, 4])])
def test_dynamic_conditioning_sits_at_the_middle_two_stages(levels, fused):
    net = MedSegDiffUNet(2, 1, 1, channels=[4] * levels, num_res_blocks=1, ff_size=8)
    assert sorted({int(k.split(".")[1]) for k in net.state_dict() if k.startswith("fusions.")}) == fused


def test_mask_stream_passes_the_ff_parser_and_enhances_the_image_stream(small_net):
    fusion = small_net(conditioning_levels=[1]).fusions[1]
    torch.nn.init.normal_(fusion.ff_parser.weight)
    image, mask = torch.randn(1, 8, 8, 8), torch.randn(1, 8, 8, 8)
    attended = fusion.conditioning.attend(image, fusion.ff_parser(mask))
    torch.testing.assert_close(fusion(image, mask), image + fusion.conditioning.proj(attended))


@pytest.mark.parametrize("light_decoder", [False, True])
def test_both_streams_are_summed_before_the_last_stage_and_in_the_skips(small_net, light_decoder):
    """Whatever is added to the last feature map of the one encoder and taken from the other's changes nothing."""
    net = small_net(conditioning_levels=[], mask_level=0, light_decoder=light_decoder)
    seen = {}

    def keep(name):
        return lambda module, args, output: seen.__setitem__(name, output)

    net.image_downs[-1].register_forward_hook(keep("image"))
    net.mask_downs[-1].register_forward_hook(keep("mask"))
    net.image_stages[0].register_forward_hook(keep("image skip"))
    net.mask_stages[0].register_forward_hook(keep("mask skip"))
    net.ups[-1].register_forward_hook(keep("up"))
    net.last_stage.register_forward_pre_hook(lambda module, args: seen.__setitem__("last", args[0]))
    net.up_stages[-1].register_forward_pre_hook(lambda module, args: seen.__setitem__("joined", args[0]))
    net(*inputs())
    assert torch.equal(seen["last"], seen["image"] + seen["mask"])
    skip = seen["image skip"] + seen["mask skip"]
    assert torch.equal(seen["joined"], seen["up"] + skip if light_decoder else torch.cat([seen["up"], skip], 1))


@pytest.mark.parametrize(
    ("levels", "mask_level", "first"), [([1, 2], None, 1), ([0], None, 0), ([2], 2, 2), ([1], 0, 0), ([], None, 1)]
)
def test_finer_levels_than_the_masks_are_the_images_alone(small_net, levels, mask_level, first):
    """The mask's encoder begins there, and finer skip connections do not depend on the noise."""
    net = small_net(conditioning_levels=levels, mask_level=mask_level)
    assert net.mask_level == first
    names = {name.split(".")[1] for name in net.state_dict() if name.startswith("mask_stages.")}
    assert names == {str(level) for level in range(first, 3)}
    joined = []
    for up, stage in zip(net.ups, net.up_stages):
        up.register_forward_hook(lambda module, args, output: joined.append(-output))
        stage.register_forward_pre_hook(lambda module, args: joined.append(joined.pop() + args[0]))
    image, members = torch.randn(IMAGE)[:1], torch.randn(2, *MASK[1:])
    net(members, torch.tensor([700]), image)
    same = [torch.allclose(skip[0], skip[1], atol=1e-5) for skip in reversed(joined)]
    assert same == [level < first for level in range(3)]


def test_the_masks_encoder_reads_every_voxel(small_net):
    """Also where it begins at a coarse level, with a convolution of a large stride."""
    net = small_net(conditioning_levels=[2], mask_level=2)
    mask = torch.zeros(MASK, requires_grad=True)
    assert net.mask_stem.stride == (4, 4)
    net(mask, torch.tensor([5]), torch.randn(IMAGE)).square().sum().backward()
    assert (mask.grad != 0).all()


def test_timestep_enters_every_residual_block_of_the_denoiser_and_none_of_the_image_encoder(small_net):
    net = small_net(num_res_blocks=2)
    blocks = {name: m for name, m in net.named_modules() if type(m).__name__ == "ResBlock"}
    assert len(blocks) == 2 * (3 + 2 + 1 + 3)
    for name, block in blocks.items():
        assert isinstance(block.embed, torch.nn.Linear) is not name.startswith("image_stages"), name


def test_training_starts_as_the_network_without_dynamic_conditioning(small_net):
    net = small_net(randomise=False)
    plain = small_net(randomise=False, conditioning_levels=[])
    plain.load_state_dict(net.state_dict(), strict=False)
    x, t, image = inputs()
    assert torch.equal(net(x, t, image), plain(x, t, image))


def test_image_mask_and_timestep_all_matter(small_net):
    net = small_net()
    x, t, image = inputs()
    y = net(x, t, image)
    for changed in (net(x.flip(-1), t, image), net(x, t.flip(0), image), net(x, t, image.flip(-1))):
        assert (changed - y).abs().max() > 1e-3


# --- ablations ----------------------------------------------------------------------------------------------------


def test_flag_removes_the_ff_parser_and_its_parameters(small_net):
    whole, without = small_net().state_dict(), small_net(use_ff_parser=False).state_dict()
    gone = set(whole) - set(without)
    assert gone == {f"fusions.{i}.ff_parser.weight" for i in (1, 2)} and not set(without) - set(whole)


def test_empty_list_removes_dynamic_conditioning_and_its_parameters(small_net):
    whole, without = small_net().state_dict(), small_net(conditioning_levels=[]).state_dict()
    gone = set(whole) - set(without)
    assert gone == {k for k in whole if k.startswith("fusions.")} and gone and not set(without) - set(whole)


# --- output -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "v_prediction"])
def test_eval_output_is_x0_for_sample_and_raw_otherwise(small_net, prediction_type):
    net = small_net(prediction_type=prediction_type)
    evaluated = net(*inputs_of(0))
    raw = net.train()(*inputs_of(0))
    torch.testing.assert_close(evaluated, torch.tanh(raw / 2) if prediction_type == "sample" else raw)
    assert raw.abs().max() > 0.1


def inputs_of(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return inputs()


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "v_prediction"])
def test_image_alone_gives_background_and_classes_by_one_step(small_net, prediction_type):
    net = small_net(prediction_type=prediction_type, num_train_timesteps=50)
    image = torch.randn(IMAGE)
    out = net(torch.zeros(MASK), torch.tensor([49]), image)
    foreground = ((out if prediction_type == "sample" else -out).clamp(-1, 1) + 1) / 2
    expected = torch.cat([1 - foreground.max(1, keepdim=True).values, foreground], 1)
    torch.testing.assert_close(net(image), expected)
    torch.testing.assert_close(net.train()(image), expected)


def test_two_evaluations_are_bit_identical(small_net):
    net = small_net(dropout=0.3)
    x, t, image = inputs()
    assert torch.equal(net(x, t, image), net(x, t, image))


def test_each_item_alone_equals_the_batch(small_net):
    net = small_net()
    x, t, image = inputs()
    alone = torch.cat([net(x[i : i + 1], t[i : i + 1], image[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(net(x, t, image), alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "timesteps", [torch.tensor([7]), torch.tensor([7, 7]), torch.Tensor((7,)), torch.tensor([7, 7], dtype=torch.int32)]
)
def test_timesteps_are_integer_or_float_and_broadcast(small_net, timesteps):
    net = small_net()
    x, _, image = inputs()
    expected = torch.cat([net(x[i : i + 1], torch.tensor([7]), image[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(net(x, timesteps, image), expected, atol=1e-5, rtol=0)


# --- sizes --------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(data=st.data(), spatial_dims=st.sampled_from([2, 3]), levels=st.integers(2, 4))
def test_any_width_depth_and_divisible_size(data, spatial_dims, levels):
    widths = st.sampled_from([2, 4, 6, 10])
    times = st.lists(st.integers(1, 2), min_size=spatial_dims, max_size=spatial_dims)
    classes, in_channels = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    net = MedSegDiffUNet(
        spatial_dims,
        in_channels,
        classes,
        channels=data.draw(st.lists(widths, min_size=levels, max_size=levels)),
        num_res_blocks=data.draw(st.lists(st.integers(1, 2), min_size=levels, max_size=levels)),
        attention_levels=data.draw(st.lists(st.booleans(), min_size=levels, max_size=levels)),
        conditioning_levels=data.draw(st.sets(st.integers(0, levels - 2)).map(sorted)),
        use_ff_parser=data.draw(st.booleans()),
        ff_size=data.draw(st.integers(1, 20)),
        num_head_channels=2,
        stem_stride=data.draw(st.sampled_from([1, 2])),
    ).eval()
    size = [k * net.stride for k in data.draw(times)]
    x, image = torch.randn(2, classes, *size), torch.randn(1, in_channels, *size)
    with torch.no_grad():
        y = net(x, torch.tensor([3]), image)
        encoded = net(x, torch.tensor([3]), net.encode_context(image))
        probabilities = net(image)
    assert y.shape == x.shape and y.isfinite().all()
    torch.testing.assert_close(encoded, y, atol=1e-5, rtol=0)
    assert probabilities.shape == (1, classes + 1, *size)


@settings(max_examples=40, deadline=None)
@given(size=st.lists(st.integers(1, 40), min_size=2, max_size=2).filter(lambda s: any(n % 8 for n in s)))
def test_other_sizes_are_refused_with_the_nearest_valid_size(small_net, size):
    net = small_net()
    with pytest.raises(ValueError, match="not divisible by the network's stride 8") as caught:
        net.encode_context(torch.zeros(1, 3, *size))
    nearest = [int(n) for n in str(caught.value).split("[")[-1].rstrip("].").split(",")]
    for n, s in zip(nearest, size):
        assert n % 8 == 0 and n > 0 and abs(n - s) == min(abs(8 * k - s) for k in range(1, 7))


@torch.no_grad()
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_the_timestep_can_shut_the_noise_out(spatial_dims):
    """A gate of zero at one timestep frees the output there from the noisy mask, and leaves other timesteps alone."""
    net = MedSegDiffUNet(spatial_dims, 1, 1, channels=[4, 8], num_res_blocks=1, ff_size=8).eval()
    for parameter in net.parameters():  # what starts at zero would hide the mask
        torch.nn.init.normal_(parameter, std=0.3)
    image, size = torch.randn(1, 1, *[8] * spatial_dims), (1, 1, *[8] * spatial_dims)
    closed = F.silu(net.time_embed(get_timestep_embedding(torch.tensor([999]), 4)))
    with torch.no_grad():
        net.mask_gate.weight.copy_(-closed / closed.square().sum() * torch.ones(4, 1))
        net.mask_gate.bias.zero_()
        a, b = (net(torch.randn(size), torch.tensor([999]), image) for _ in range(2))
        c, d = (net(torch.randn(size), torch.tensor([10]), image) for _ in range(2))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    assert (c - d).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_stem_of_stride_2_runs_every_level_at_half_the_resolution(spatial_dims):
    """The filter's grid, too: frequencies of the input mean the same."""
    whole, halved = (
        MedSegDiffUNet(spatial_dims, 1, 1, channels=[4, 8, 8], num_res_blocks=1, ff_size=32, stem_stride=s).eval()
        for s in (1, 2)
    )
    assert (whole.stride, halved.stride) == (4, 8)
    image = torch.randn(1, 1, *[16] * spatial_dims)
    for a, b in zip(whole.encode_context(image), halved.encode_context(image)):
        assert [2 * n for n in b.shape[2:]] == list(a.shape[2:])
    grids = [net.fusions[1].ff_parser.weight.shape for net in (whole, halved)]
    assert grids == [FFParser(spatial_dims, 8, [n] * spatial_dims).weight.shape for n in (16, 8)]
    with pytest.raises(ValueError, match=r"noisy mask of size .* and image of size .*16, 16.* differ"):
        halved(torch.randn(1, 1, *[8] * spatial_dims), torch.tensor([3]), image)


def test_a_stem_of_stride_2_can_draw_single_voxels():
    """Its last convolution gives each voxel its own weights, so that an edge may lie between any two."""
    net = MedSegDiffUNet(2, 1, 1, channels=[4, 4], num_res_blocks=1, ff_size=8, stem_stride=2)
    features = torch.ones(1, 4, 4, 4)
    with torch.no_grad():
        net.out_conv.weight.zero_()
        net.out_conv.weight[0, 0, 1, 1] = 1.0
        net.out_conv.bias.zero_()
    out = net.out_conv(features)
    assert out.shape == (1, 1, 8, 8) and int(out.count_nonzero()) == 16


def test_other_strides_of_the_stem_are_refused():
    with pytest.raises(ValueError, match="stem_stride=4 must be 1 or 2"):
        MedSegDiffUNet(2, 1, 1, channels=[4, 8], stem_stride=4)


# --- encoding once ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [[], [0], [1], [2], [0, 2], [1, 2]])
def test_encoded_context_equals_the_image(small_net, levels):
    net = small_net(conditioning_levels=levels)
    x, t, image = inputs()
    torch.testing.assert_close(net(x, t, net.encode_context(image)), net(x, t, image), atol=1e-5, rtol=0)


def test_members_share_the_encoding_of_their_image(small_net):
    net = small_net()
    image = torch.randn(IMAGE)
    members = torch.randn(6, *MASK[1:])  # three of the first image, three of the second
    shared = net(members, torch.tensor([9]), net.encode_context(image))
    each = net(members, torch.tensor([9]), image.repeat_interleave(3, 0))
    torch.testing.assert_close(shared, each, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("levels", "first"), [([], 3), ([0], 0), ([1, 2], 1), ([2], 2)])
def test_encoded_context_spares_the_image_encoder_up_to_the_first_fusion(small_net, levels, first):
    net = small_net(conditioning_levels=levels)
    x, t, image = inputs()
    context = net.encode_context(image)
    ran = []
    for i, stage in enumerate(net.image_stages):
        stage.register_forward_hook(lambda module, args, output, i=i: ran.append(i))
    net.image_stem.register_forward_hook(lambda module, args, output: ran.append("stem"))
    net(x, t, context)
    assert ran == list(range(first + 1, 3))
    channels = [8, 8, 12, 12][: first + 1]
    assert [list(c.shape[1:]) for c in context] == [[c, 16 >> i, 24 >> i] for i, c in enumerate(channels)]


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_every_parameter_gets_a_gradient_within_two_steps(small_net, spatial_dims):
    net = small_net(randomise=False, spatial_dims=spatial_dims, ff_size=8).train()
    size = [16] * 2 if spatial_dims == 2 else [8] * 3
    x, image, target = torch.randn(2, 2, *size), torch.randn(2, 3, *size), torch.rand(2, 2, *size).round()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for _ in range(3):  # two steps, and the gradient after them
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(net(x, torch.tensor([5, 700]), image), target).backward()
        optimizer.step()
    idle = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def test_trains_and_samples_with_the_inferer_of_monai(small_net):
    """MONAI's DiffusionInferer and DDIMScheduler, unchanged: the mask is where the image is bright."""
    net = small_net(False, in_channels=1, out_channels=1, channels=(8, 16), attention_levels=None).train()
    scheduler = DDIMScheduler(num_train_timesteps=1000, clip_sample=False, prediction_type="sample")
    inferer = DiffusionInferer(scheduler)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)

    def batch(n):
        image = F.interpolate(torch.randn(n, 1, 2, 2), size=(8, 8), mode="bilinear")
        return image, (image > 0).float()

    for _ in range(60):
        image, label = batch(8)
        logits = inferer(
            inputs=2 * label - 1,
            diffusion_model=net,
            noise=torch.randn_like(label),
            timesteps=torch.randint(0, 1000, (8,)),
            condition=image,
            mode="crossattn",
        )
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(logits, label).backward()
        optimizer.step()

    scheduler.set_timesteps(5)
    image, label = batch(8)
    sample = inferer.sample(
        torch.randn_like(label), net.eval(), scheduler, conditioning=image, mode="crossattn", verbose=False
    )
    assert sample.shape == label.shape and sample.min() >= -1.001 and sample.max() <= 1.001
    agreement = 2 * ((sample > 0) * label).sum() / ((sample > 0).sum() + label.sum())
    assert agreement > 0.85


def gradients(net: MedSegDiffUNet) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of a training pass with dropout, and how many numbers were kept for the backward pass."""
    kept = []
    torch.manual_seed(1)
    x, t, image = inputs()
    with torch.autograd.graph.saved_tensors_hooks(lambda s: (kept.append(s.numel()), s)[1], lambda s: s):
        loss = net.train()(x, t, image).square().mean()
    loss.backward()
    return {name: p.grad for name, p in net.named_parameters()}, sum(kept)


def test_gradient_checkpointing_gives_the_same_gradients_from_less_memory(small_net):
    net = small_net(dropout=0.2)
    saving = small_net(dropout=0.2, use_checkpointing=True)
    saving.load_state_dict(net.state_dict())
    (expected, kept), (actual, kept_saving) = gradients(net), gradients(saving)
    assert kept_saving < kept / 2
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], msg=name)


def test_runs_and_trains_under_bfloat16_autocast():
    net = MedSegDiffUNet(2, 1, 1, channels=(2, 4), num_res_blocks=1, conditioning_levels=[0], ff_size=4)
    torch.nn.init.normal_(net.fusions[0].conditioning.proj.weight)
    x, image = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net(x, torch.tensor([3]), image)
    y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), net(x, torch.tensor([3]), image), atol=0.1, rtol=0.1)
    assert net.fusions[0].ff_parser.weight.grad.any()


# --- state and options --------------------------------------------------------------------------------------------


def test_state_dict_survives_a_weights_only_round_trip(small_net):
    net = small_net()
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    twin = small_net()
    twin.load_state_dict(torch.load(file, weights_only=True))
    x, t, image = inputs()
    assert torch.equal(twin(x, t, image), net(x, t, image))
    assert not any(value.is_complex() for value in net.state_dict().values())


def test_number_of_residual_blocks_per_level(small_net):
    net = small_net(num_res_blocks=[1, 2, 3, 4], mask_level=0)
    assert [len(stage.res_blocks) for stage in net.image_stages] == [1, 2, 3]
    assert [len(stage.res_blocks) for stage in net.mask_stages] == [1, 2, 3]
    assert len(net.last_stage.res_blocks) == 4
    assert [len(stage.res_blocks) for stage in net.up_stages] == [3, 2, 1]


def test_attention_levels_and_head_channels_per_level(small_net):
    net = small_net(attention_levels=[True, False, False, True], num_head_channels=[2, 1, 1, 8], mask_level=0)
    heads = {n: m.num_head_channels for n, m in net.named_modules() if type(m).__name__ == "AttentionBlock"}
    assert heads == {
        "image_stages.0.attentions.0": 2,
        "mask_stages.0.attentions.0": 2,
        "last_stage.attentions.0": 8,
        "up_stages.2.attentions.0": 2,
    }


@pytest.mark.parametrize(
    ("ff_size", "grids"),
    [(16, [[8, 8], [4, 4]]), ((16, 24), [[8, 12], [4, 6]]), (17, [[10, 10], [6, 6]]), (1, [[2, 2], [2, 2]])],
)
def test_grid_of_the_ff_parser_covers_the_size_it_was_asked_for(small_net, ff_size, grids):
    net = small_net(ff_size=ff_size)
    shapes = [net.fusions[i].ff_parser.weight.shape for i in (1, 2)]
    assert [[s[1], 2 * (s[2] - 1)] for s in shapes] == grids


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spatial_dims": 1}, "spatial_dims=1 must be 2 or 3"),
        ({"in_channels": 0}, "in_channels=0"),
        ({"out_channels": 0}, "out_channels=0"),
        ({"channels": (8,)}, "at least two positive numbers"),
        ({"channels": (7, 8, 8, 8)}, "the first even"),
        ({"channels": (8, 0, 8, 8)}, r"channels=\[8, 0, 8, 8\] must be at least two positive numbers"),
        ({"num_res_blocks": 0}, "num_res_blocks=0"),
        ({"num_res_blocks": (1, 1)}, r"num_res_blocks=\(1, 1\) .* each of the 4 levels"),
        ({"attention_levels": (True,)}, "attention_levels=.* each of 4 levels"),
        ({"conditioning_levels": [3]}, r"conditioning_levels=\[3\] must be different levels from 0 to 2"),
        ({"conditioning_levels": [-1]}, "different levels from 0 to 2"),
        ({"conditioning_levels": [1, 1]}, "different levels from 0 to 2"),
        ({"num_head_channels": 5}, "num_head_channels=5 does not divide the 12 channels"),
        ({"num_head_channels": (1, 1)}, r"num_head_channels=\(1, 1\)"),
        ({"ff_size": 0}, "ff_size=0"),
        ({"ff_size": (16, 16, 16)}, r"ff_size=\(16, 16, 16\) .* each of the 2 axes"),
        ({"norm_num_groups": 0}, "norm_num_groups=0"),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"prediction_type": "x0"}, "prediction_type='x0' must be one of"),
        ({"use_ff_parser": "false"}, "use_ff_parser='false' must be False or True"),
        ({"light_decoder": "no"}, "light_decoder='no' must be False or True"),
        ({"mask_level": 2}, "mask_level=2 must be a level from 0 to 1, the first of conditioning_levels."),
        ({"mask_level": True}, "mask_level=True must be a level from 0 to 1"),
        ({"mask_level": 3, "conditioning_levels": []}, "mask_level=3 must be a level from 0 to 2."),
        ({"use_mask_gate": "no"}, "use_mask_gate='no' must be False or True"),
        ({"attention_levels": ("false",) * 4}, "attention_levels='false' must be False or True"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(small_net, changes, message):
    with pytest.raises(ValueError, match=message):
        small_net(**changes)


@pytest.mark.parametrize(
    ("x", "timesteps", "image", "message"),
    [
        (MASK, [1], (2, 1, 16, 24), r"image of shape \[2, 1, 16, 24\] does not fit"),
        (MASK, [1], (2, 3, 16, 24, 8), "image of shape"),
        ((2, 3, 16, 24), [1], IMAGE, "noisy mask of shape"),
        ((2, 2, 16, 20), [1], IMAGE, r"noisy mask of spatial size \[16, 20\] .* nearest size that is: \[16, 24\]"),
        ((2, 2, 16, 16), [1], IMAGE, r"noisy mask of size \[16, 16\] and image of size \[16, 24\] differ"),
        ((3, 2, 16, 24), [1], IMAGE, "a batch of 3 masks is not a multiple of 2 images"),
        ((1, 2, 16, 24), [1], IMAGE, "a batch of 1 masks is not a multiple of 2 images"),
        (MASK, [1, 2, 3], IMAGE, r"timesteps of shape \[3\] must be of shape \(1,\) or \(2,\)"),
        (MASK, 1, IMAGE, r"timesteps of shape \[\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(small_net, x, timesteps, image, message):
    with pytest.raises(ValueError, match=message):
        small_net()(torch.zeros(x), torch.tensor(timesteps), torch.zeros(image))


def test_incomplete_calls_are_refused(small_net):
    net = small_net()
    x, t, image = inputs()
    with pytest.raises(ValueError, match="give timesteps and context together"):
        net(x, t)
    with pytest.raises(ValueError, match="give timesteps and context together"):
        net(x, context=image)
    with pytest.raises(ValueError, match="context of 1 feature maps must hold 2"):
        net(x, t, net.encode_context(image)[:1])


def test_sizes_agree_with_numpy_of_the_timestep_embedding(small_net):
    """The embedding is cosines and sines of t at geometric frequencies, as in improved-diffusion."""
    net = small_net()
    seen = []
    net.time_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net(*inputs())
    angles = np.outer([500, 20], np.exp(-np.log(10000) * np.arange(4) / 4))
    np.testing.assert_allclose(seen[0].numpy(), np.concatenate([np.cos(angles), np.sin(angles)], 1), atol=1e-4)
