"""The FF-Parser against equations 4 to 6 written out in float64, and what makes it a filter of any size."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medsegdiff_monai.networks import FFParser


def reference_map(weight: np.ndarray, size: list[int]) -> np.ndarray:
    """The map read at the frequencies of a signal of ``size``: multilinear in cycles per pixel, in float64.

    Args:
        weight: (channels, *grid, 2), real and imaginary part; the last grid axis holds half of the frequencies.
        size: spatial size of the signal.
    """
    grid = weight[..., 0] + 1j * weight[..., 1]
    lengths = [*grid.shape[1:-1], 2 * (grid.shape[-1] - 1)]
    bins = [*size[:-1], size[-1] // 2 + 1]
    result = np.zeros((grid.shape[0], *bins), dtype=np.complex128)
    for k in itertools.product(*map(range, bins)):
        places = [(b / s if b <= s / 2 else b / s - 1) * n for b, s, n in zip(k, size, lengths)]
        for corner in itertools.product((0, 1), repeat=len(size)):
            index = [int(np.floor(p)) + c for p, c in zip(places, corner)]
            share = np.prod([1 - abs(p - i) for p, i in zip(places, index)])
            if share > 0:
                wrapped = tuple(
                    i % n if axis < len(size) - 1 else min(i, n // 2) for axis, (i, n) in enumerate(zip(index, lengths))
                )
                result[(slice(None), *k)] += share * grid[(slice(None), *wrapped)]
    return result


def reference_filter(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Equations 4 to 6 as sums over sines and cosines, in float64; ``x`` is (batch, channels, *spatial)."""
    size = list(x.shape[2:])
    spectrum = x.astype(np.complex128)
    for axis, s in enumerate(size):  # equation 4
        waves = np.exp(-2j * np.pi * np.outer(np.arange(s), np.arange(s)) / s)
        spectrum = np.moveaxis(np.tensordot(waves, spectrum, (1, axis + 2)), 0, axis + 2)
    half = size[-1] // 2 + 1
    product = reference_map(weight, size) * spectrum[..., :half]  # equation 5
    # a real signal holds every frequency twice, but for the zeroth and, of an even size, the last
    product *= np.array([1.0 if 2 * k in (0, size[-1]) else 2.0 for k in range(half)])
    for axis, s in enumerate(size):  # equation 6
        waves = np.exp(2j * np.pi * np.outer(np.arange(s), np.arange(product.shape[axis + 2])) / s) / s
        product = np.moveaxis(np.tensordot(waves, product, (1, axis + 2)), 0, axis + 2)
    return product.real


def random_parser(channels: int, size: list[int]) -> FFParser:
    parser = FFParser(len(size), channels, size)
    torch.nn.init.normal_(parser.weight)
    return parser


@settings(max_examples=60, deadline=None)
@given(data=st.data(), spatial_dims=st.sampled_from([2, 3]), channels=st.integers(1, 3), seed=st.integers(0, 99))
def test_filters_as_equations_4_to_6(data, spatial_dims, channels, seed):
    torch.manual_seed(seed)
    size = data.draw(st.lists(st.integers(1, 9), min_size=spatial_dims, max_size=spatial_dims), label="size")
    grid = data.draw(
        st.lists(st.sampled_from([2, 4, 6, 8]), min_size=spatial_dims, max_size=spatial_dims), label="grid"
    )
    parser = random_parser(channels, grid)
    x = torch.randn(2, channels, *size)
    expected = reference_filter(x.double().numpy(), parser.weight.detach().double().numpy())
    np.testing.assert_allclose(parser(x).detach().numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("size", [[8, 8], [7, 12], [9, 5], [8, 6, 4], [5, 7, 3]])
def test_starts_as_identity_at_any_size(size):
    parser = FFParser(len(size), 3, [8] * len(size))
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(parser(x), x, atol=1e-5, rtol=0)


def set_gaussian(parser: FFParser, sigma: float) -> None:
    """Make the map a Gaussian low-pass filter of standard deviation ``sigma`` pixels."""
    shape = parser.weight.shape[1:-1]
    axes = [np.fft.fftfreq(n) for n in shape[:-1]] + [np.fft.rfftfreq(2 * (shape[-1] - 1))]
    squared = sum(f**2 for f in np.meshgrid(*axes, indexing="ij"))
    with torch.no_grad():
        parser.weight[..., 0] = torch.from_numpy(np.exp(-2 * (np.pi * sigma) ** 2 * squared))


@pytest.mark.parametrize("size", [[32, 32], [16, 24], [8, 12, 10]])
def test_low_pass_map_filters_like_scipy(size):
    parser = FFParser(len(size), 1, size)
    set_gaussian(parser, sigma=1.5)
    x = np.random.default_rng(0).normal(size=size)
    expected = np.fft.ifftn(scipy.ndimage.fourier_gaussian(np.fft.fftn(x), sigma=1.5)).real
    actual = parser(torch.from_numpy(x).float()[None, None])[0, 0].detach().numpy()
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("size", [[24, 31], [48, 65], [96, 40]])
def test_low_pass_map_is_the_same_filter_at_other_sizes(size):
    """The grid was built for 64 x 64; read by place instead of frequency, the error would be of the order of 0.1."""
    parser = FFParser(2, 1, [64, 64])
    set_gaussian(parser, sigma=1.0)
    x = np.random.default_rng(0).normal(size=size)
    expected = np.fft.ifftn(scipy.ndimage.fourier_gaussian(np.fft.fftn(x), sigma=1.0)).real
    actual = parser(torch.from_numpy(x).float()[None, None])[0, 0].detach().numpy()
    np.testing.assert_allclose(actual, expected, atol=4e-3)


@pytest.mark.parametrize(
    ("period", "tiles", "grid"),
    [
        ([32, 32], [2, 2], [32, 32]),
        ([32, 32], [2, 2], [64, 64]),
        ([32, 32], [2, 2], [20, 24]),
        ([15, 21], [3, 2], [10, 16]),
        ([6, 5, 4], [1, 2, 3], [4, 8, 6]),
    ],
)
def test_periodic_signal_tiled_is_filtered_identically(period, tiles, grid):
    parser = random_parser(2, grid)
    x = torch.randn(1, 2, *period)
    repeats = [1, 1, *tiles]
    once, tiled = parser(x), parser(x.repeat(repeats))
    assert (once - x).abs().mean() > 0.1  # the filter does something
    torch.testing.assert_close(tiled, once.repeat(repeats), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("grid", "size", "idle"),
    [
        ([4, 6], [4, 6], 4),  # the imaginary parts of frequencies that are their own mirror image
        ([4, 6], [8, 12], 0),
        ([4, 6], [9, 13], 0),
        ([2, 4, 2], [2, 4, 2], 8),
        ([2, 4, 2], [5, 9, 5], 0),
    ],
)
def test_gradients_reach_every_entry_that_matters(grid, size, idle):
    x = torch.randn(1, 1, *size)
    parser = random_parser(1, grid)
    parser(x).square().sum().backward()
    matters = torch.empty(parser.weight.shape, dtype=torch.bool)
    probe = FFParser(len(size), 1, grid)
    for index in itertools.product(*map(range, matters.shape)):
        with torch.no_grad():
            probe.weight.zero_()
            probe.weight[index] = 1.0
            matters[index] = probe(x).abs().max() > 1e-6
    assert torch.equal(parser.weight.grad.abs() > 1e-6, matters)
    assert (~matters).sum() == idle


def test_works_in_float32_under_bfloat16_autocast():
    parser = random_parser(2, [8, 8])
    x = torch.randn(1, 2, 6, 8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = parser(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, parser(x.float()).bfloat16())
    assert torch.equal(y, parser(x))  # and without autocast


def test_holds_one_real_parameter():
    state = FFParser(2, 3, [8, 6]).state_dict()
    assert {k: (v.dtype, tuple(v.shape)) for k, v in state.items()} == {"weight": (torch.float32, (3, 8, 4, 2))}


@pytest.mark.parametrize("size", [[8], [8, 8, 8], [8, 7], [0, 8], [8, -2]])
def test_refuses_a_grid_that_is_not_even_or_of_other_dimensions(size):
    with pytest.raises(ValueError, match="must be 2 even numbers"):
        FFParser(2, 1, size)
