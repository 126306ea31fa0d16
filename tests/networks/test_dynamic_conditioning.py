"""Dynamic conditional encoding against equation 3 written out in float64."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medsegdiff_monai.networks import DynamicConditioning


def layer_norm(x: np.ndarray, norm: torch.nn.LayerNorm) -> np.ndarray:
    """LN over the channels of each pixel, in float64; ``x`` is (batch, channels, *spatial)."""
    scale, shift = (
        p.detach().double().numpy().reshape(1, -1, *[1] * (x.ndim - 2)) for p in (norm.weight, norm.bias)
    )  # fmt: skip
    centred = x - x.mean(1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(1, keepdims=True) + norm.eps) * scale + shift


@settings(max_examples=40, deadline=None)
@given(
    size=st.lists(st.integers(1, 9), min_size=2, max_size=3),
    channels=st.integers(2, 12),
    channels_last=st.booleans(),
    seed=st.integers(0, 99),
)
def test_enhances_the_image_as_equation_3(size, channels, channels_last, seed):
    torch.manual_seed(seed)
    module = DynamicConditioning(len(size), channels)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    image, mask = 3 * torch.randn(2, channels, *size) + 1, torch.randn(2, channels, *size)
    m_i, m_x = image.double().numpy(), mask.double().numpy()
    attended = layer_norm(m_i, module.norm_image.norm) * layer_norm(m_x, module.norm_mask.norm) * m_i
    weight, bias = (p.detach().double().numpy() for p in module.proj.parameters())
    enhanced = m_i + np.moveaxis(np.tensordot(attended, weight.reshape(channels, channels), (1, 1)) + bias, -1, 1)
    if channels_last:
        image = image.to(memory_format=torch.channels_last if len(size) == 2 else torch.channels_last_3d)
    with torch.no_grad():
        np.testing.assert_allclose(module.attend(image, mask).numpy(), attended, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(module(image, mask).numpy(), enhanced, rtol=1e-3, atol=2e-3)


def test_starts_as_the_image_stream_alone():
    image, mask = torch.randn(1, 6, 4, 4), torch.randn(1, 6, 4, 4)
    assert torch.equal(DynamicConditioning(2, 6)(image, mask), image)


def test_normalises_channels_last_without_a_copy():
    norm = DynamicConditioning(2, 6).norm_image
    y = norm(torch.randn(1, 6, 4, 4).to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_keeps_the_dtype_of_the_image_stream_under_autocast():
    module = DynamicConditioning(2, 4)
    image, mask = torch.randn(1, 4, 2, 2).bfloat16(), torch.randn(1, 4, 2, 2).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(image, mask).dtype == torch.bfloat16
