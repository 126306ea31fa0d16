"""FF-Parser: a learnable filter of feature maps in Fourier space (MedSegDiff, equations 4 to 6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import List

import torch
from torch import Tensor, nn

__all__ = ["FFParser", "resample_grid"]


def _resample_axis(grid: Tensor, axis: int, size: int, full: bool) -> Tensor:
    """Read one frequency axis of the map at the frequencies of a signal of another length.

    Args:
        grid: the map, real and imaginary parts along a last axis of its own; ``axis`` holds cycles per pixel in the
            order of ``fftfreq`` (``full``) or ``rfftfreq``.
        axis: the axis to resample.
        size: number of samples of the signal along this axis.
        full: whether the axis holds negative frequencies too.

    Returns:
        The map with ``size`` (``full``) or ``size // 2 + 1`` entries along ``axis``, linear between grid points.
    """
    length = grid.shape[axis] if full else 2 * (grid.shape[axis] - 1)  # of the signal that the grid was built for
    if length == size:
        return grid
    bins = torch.arange(size if full else size // 2 + 1, device=grid.device)
    # frequency = bin / size; its place on the grid is frequency * length. Integers keep equal frequencies equal.
    lower = torch.div(bins * length, size, rounding_mode="floor")
    fraction = ((bins * length) % size).to(torch.float32) / size
    if full:
        lower, upper = lower % length, (lower + 1) % length  # frequencies are periodic
    else:
        upper = (lower + 1).clamp(max=length // 2)
    shape = [1] * grid.dim()
    shape[axis] = bins.numel()
    fraction = fraction.view(shape)
    return grid.index_select(axis, lower) * (1 - fraction) + grid.index_select(axis, upper) * fraction


def resample_grid(grid: Tensor, size: List[int]) -> Tensor:
    """Read a map at the frequencies of a signal of another size, linearly between its own.

    Args:
        grid: (channels, *frequencies, 2), real and imaginary parts; half of the last axis is held, as by ``rfftn``.
        size: spatial size of the signal.

    Returns:
        Float32 (channels, *size[:-1], size[-1] // 2 + 1, 2).
    """
    grid = grid.float()
    for i in range(len(size)):
        grid = _resample_axis(grid, i + 1, size[i], i < len(size) - 1)
    return grid


class FFParser(nn.Module):
    """Filter every channel of a feature map with a learnable complex map in Fourier space.

    ``M = FFT(m)``, ``M' = A * M``, ``m' = FFT^-1(M')`` (MedSegDiff, equations 4, 5 and 6), over all spatial axes. ``A``
    is indexed by normalised frequency (cycles per pixel) on a grid of its own and read by linear interpolation at the
    frequencies of the input, so that any size is filtered alike. It starts as the identity, 1 + 0j.

    The map is held as real and imaginary parts, because optimisers, ``state_dict`` readers and Apple GPUs handle
    complex parameters unevenly. As the input is real, only half of the last axis is held (``rfftn``).

    Args:
        spatial_dims: 2 or 3.
        channels: number of channels of the feature map.
        size: spatial size of the signal whose frequencies make up the grid; even and at least 2 along each axis.

    Raises:
        ValueError: for ``size`` of another length than ``spatial_dims``, or odd, or below 2.
    """

    def __init__(self, spatial_dims: int, channels: int, size: Sequence[int]) -> None:
        super().__init__()
        if len(size) != spatial_dims or any(s < 2 or s % 2 for s in size):
            raise ValueError(f"size={tuple(size)} must be {spatial_dims} even numbers of at least 2.")
        self.spatial_dims = spatial_dims
        weight = torch.zeros(channels, *size[:-1], size[-1] // 2 + 1, 2)
        weight[..., 0] = 1.0
        self.weight = nn.Parameter(weight)

    def frequency_map(self, size: List[int]) -> Tensor:
        """Return the map ``A`` at the frequencies of a signal of spatial ``size``.

        Args:
            size: spatial size of the signal.

        Returns:
            Complex64 tensor (channels, *size[:-1], size[-1] // 2 + 1).
        """
        return torch.view_as_complex(resample_grid(self.weight, size).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """Filter ``x`` of shape (batch, channels, *spatial); float32 inside, shape and dtype are kept."""
        size = list(x.shape[2:])
        dims = [i + 2 for i in range(self.spatial_dims)]
        spectrum = torch.fft.rfftn(x.float(), dim=dims)
        return torch.fft.irfftn(spectrum * self.frequency_map(size), s=size, dim=dims).to(x.dtype)
