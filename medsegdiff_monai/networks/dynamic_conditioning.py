"""Dynamic conditional encoding: the noisy mask tells the condition encoder where to look (MedSegDiff, equation 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

from monai.networks.layers.factories import Conv
from monai.networks.nets.diffusion_model_unet import zero_module
from torch import Tensor, nn

from .ff_parser import FFParser

__all__ = ["DynamicConditioning", "Fusion"]


class ChannelLayerNorm(nn.Module):
    """Layer normalisation over the channels of each pixel.

    The paper leaves the axes of LN open; per pixel is the choice that no image size can change. With channels last in
    memory it is no copy.

    Args:
        channels: number of channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` of shape (batch, channels, *spatial)."""
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class DynamicConditioning(nn.Module):
    """Enhance the condition stream where it agrees with the mask stream.

    ``A(m_I, m_x) = (LN(m_I) * LN(m_x)) * m_I`` (MedSegDiff, equation 3), added to the condition stream through a 1x1
    convolution that starts at zero, so that training starts as the network without it.

    Args:
        spatial_dims: 2 or 3.
        channels: number of channels of both feature maps.
    """

    def __init__(self, spatial_dims: int, channels: int) -> None:
        super().__init__()
        self.norm_image = ChannelLayerNorm(channels)
        self.norm_mask = ChannelLayerNorm(channels)
        self.proj = zero_module(Conv[Conv.CONV, spatial_dims](channels, channels, kernel_size=1))

    def attend(self, image: Tensor, mask: Tensor) -> Tensor:
        """Return ``A(m_I, m_x)`` of equation 3.

        Args:
            image: m_I, features of the image, (batch, channels, *spatial).
            mask: m_x, features of the noisy mask (after the FF-Parser), same shape.

        Returns:
            Tensor of the same shape.
        """
        return (self.norm_image(image) * self.norm_mask(mask)) * image

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        """Return the enhanced condition stream, same shape as ``image`` (arguments as in :meth:`attend`)."""
        return image + self.proj(self.attend(image, mask)).to(image.dtype)


class Fusion(nn.Module):
    """One stage of dynamic conditional encoding: FF-Parser on the mask stream, then equation 3.

    Args:
        spatial_dims: 2 or 3.
        channels: channels of both streams.
        ff_size: grid of the FF-Parser, or None to leave it out.
    """

    def __init__(self, spatial_dims: int, channels: int, ff_size: Optional[Sequence[int]]) -> None:
        super().__init__()
        self.ff_parser = nn.Identity() if ff_size is None else FFParser(spatial_dims, channels, ff_size)
        self.conditioning = DynamicConditioning(spatial_dims, channels)

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        """Return the condition stream ``image``, enhanced by the mask stream ``mask`` (same shape)."""
        return self.conditioning(image, self.ff_parser(mask))
