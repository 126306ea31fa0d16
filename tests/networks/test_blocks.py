"""The blocks of the U-Net: attention against softmax written out, options for any number of channels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from medsegdiff_monai.networks.blocks import AttentionBlock, Downsample, ResBlock, Stage, Upsample, group_norm


@pytest.mark.parametrize(
    ("limit", "channels", "groups"), [(32, 128, 32), (32, 48, 16), (32, 32, 16), (32, 7, 1), (4, 6, 2), (4, 2, 1)]
)
def test_group_norm_fits_any_number_of_channels(limit, channels, groups):
    norm = group_norm(limit, channels)
    assert norm.num_groups == groups
    assert norm(torch.randn(1, channels, 1, 1)).isfinite().all()


@settings(max_examples=20, deadline=None)
@given(
    size=st.lists(st.integers(1, 5), min_size=2, max_size=3),
    heads=st.integers(1, 3),
    head_channels=st.sampled_from([2, 4, 8]),
    channels_last=st.booleans(),
)
def test_attention_is_softmax_attention_over_pixels(size, heads, head_channels, channels_last):
    channels = heads * head_channels
    block = AttentionBlock(len(size), channels, head_channels, norm_num_groups=2)
    torch.nn.init.normal_(block.proj.weight)
    x = torch.randn(2, channels, *size)
    if channels_last:
        x = x.to(memory_format=torch.channels_last if len(size) == 2 else torch.channels_last_3d)
    qkv = block.qkv(block.norm(x)).detach().double().numpy().reshape(2, 3, heads, head_channels, -1)
    h = np.empty((2, heads, head_channels, qkv.shape[-1]))
    for b in range(2):
        for i in range(heads):
            q, k, v = qkv[b, :, i]
            scores = np.exp(q.T @ k / np.sqrt(head_channels))
            h[b, i] = v @ (scores / scores.sum(1, keepdims=True)).T
    weight, bias = (p.detach().double().numpy() for p in block.proj.parameters())
    projected = np.einsum("oc,bcn->bon", weight.reshape(channels, channels), h.reshape(2, channels, -1))
    expected = x.double().numpy() + (projected + bias[:, None]).reshape(x.shape)
    np.testing.assert_allclose(block(x).detach().numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_attention_meets_the_layout_of_the_fused_kernels(monkeypatch, memory_format):
    strides = []

    def watched(q, k, v, attend=F.scaled_dot_product_attention):
        strides.extend(t.stride(-1) for t in (q, k, v))
        return attend(q, k, v)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    AttentionBlock(2, 8, 4, 2)(torch.randn(1, 8, 4, 4).to(memory_format=memory_format))
    assert strides == [1, 1, 1]


def reference_res_block(block: ResBlock, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    """improved-diffusion's residual block, step by step from its parameters."""
    p = {k: v.double() for k, v in block.state_dict().items()}
    groups = block.norm1.num_groups, block.norm2.num_groups
    h = F.conv2d(
        F.silu(F.group_norm(x, groups[0], p["norm1.weight"], p["norm1.bias"])),
        p["conv1.weight"],
        p["conv1.bias"],
        padding=1,
    )
    h = h + (F.silu(embedding) @ p["embed.weight"].T + p["embed.bias"])[:, :, None, None]
    h = F.conv2d(
        F.silu(F.group_norm(h, groups[1], p["norm2.weight"], p["norm2.bias"])),
        p["conv2.weight"],
        p["conv2.bias"],
        padding=1,
    )
    return F.conv2d(x, p["skip.weight"], p["skip.bias"]) + h


def test_residual_block_is_the_one_of_improved_diffusion():
    block = ResBlock(2, 4, 6, embedding_channels=5, norm_num_groups=2, dropout=0.0)
    torch.nn.init.normal_(block.conv2.weight)
    x, embedding = torch.randn(2, 4, 5, 6), torch.randn(2, 5)
    expected = reference_res_block(block, x.double(), embedding.double())
    torch.testing.assert_close(block(x, embedding).double(), expected, atol=1e-4, rtol=1e-4)


def test_residual_block_drops_out_in_training_only():
    block = ResBlock(2, 4, 4, embedding_channels=0, norm_num_groups=2, dropout=0.5)
    torch.nn.init.normal_(block.conv2.weight)
    x = torch.randn(1, 4, 4, 4)
    assert not torch.equal(block(x, None), block(x, None))
    block.eval()
    assert torch.equal(block(x, None), block(x, None))


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_resolution_is_halved_and_doubled(spatial_dims):
    x = torch.randn(1, 4, *[6] * spatial_dims)
    assert Downsample(spatial_dims, 4)(x).shape == (1, 4, *[3] * spatial_dims)
    assert Upsample(spatial_dims, 4, 2)(x).shape == (1, 2, *[12] * spatial_dims)


@pytest.mark.parametrize("attention", [False, True])
def test_stage_follows_each_residual_block_by_attention_where_asked(attention):
    stage = Stage(2, 4, 8, 3, 0, attention, 4, 2, 0.0, False)
    assert [block.conv1.in_channels for block in stage.res_blocks] == [4, 8, 8]
    assert [isinstance(a, AttentionBlock) for a in stage.attentions] == [attention] * 3
