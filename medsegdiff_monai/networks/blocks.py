"""Blocks of the U-Net: residual block, attention, down- and upsampling (improved-diffusion's, in 2D and 3D), gate."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from monai.networks.layers.factories import Conv
from monai.networks.nets.diffusion_model_unet import zero_module
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["AttentionBlock", "Downsample", "First", "MaskGate", "ResBlock", "Stage", "Upsample", "group_norm"]


def group_norm(num_groups: int, channels: int) -> nn.GroupNorm:
    """Group normalisation of at least two channels a group, so that a single pixel can be normalised.

    The number of groups is the largest one that fits and divides both ``num_groups`` and ``channels``.
    """
    groups = [n for n in range(1, max(1, channels // 2) + 1) if channels % n == 0 and num_groups % n == 0]
    return nn.GroupNorm(groups[-1], channels)


class ResBlock(nn.Module):
    """Residual block: twice GroupNorm, SiLU, convolution; the timestep embedding is added in between.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input.
        out_channels: channels of the output.
        embedding_channels: channels of the timestep embedding; 0 for a block that is free of the timestep.
        norm_num_groups: upper limit of the number of groups of GroupNorm.
        dropout: probability of dropout before the second convolution.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        embedding_channels: int,
        norm_num_groups: int,
        dropout: float,
    ) -> None:
        super().__init__()
        conv = Conv[Conv.CONV, spatial_dims]
        self.spatial_dims = spatial_dims
        self.norm1 = group_norm(norm_num_groups, in_channels)
        self.conv1 = conv(in_channels, out_channels, kernel_size=3, padding=1)
        self.embed = nn.Linear(embedding_channels, out_channels) if embedding_channels else nn.Identity()
        self.norm2 = group_norm(norm_num_groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_module(conv(out_channels, out_channels, kernel_size=3, padding=1))
        self.skip = conv(in_channels, out_channels, kernel_size=1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, embedding: Optional[Tensor]) -> Tensor:
        """Map ``x`` (batch, in_channels, *spatial) to (batch, out_channels, *spatial).

        Args:
            x: feature map.
            embedding: timestep embedding (batch or 1, embedding_channels), or None.
        """
        h = self.conv1(F.silu(self.norm1(x)))
        if embedding is not None:
            e = self.embed(F.silu(embedding))
            for _ in range(self.spatial_dims):
                e = e.unsqueeze(-1)
            h = h + e
        return self.skip(x) + self.conv2(self.dropout(F.silu(self.norm2(h))))


class AttentionBlock(nn.Module):
    """Multi-head self-attention over all pixels (``scaled_dot_product_attention``), residual, starting at zero.

    Args:
        spatial_dims: 2 or 3.
        channels: channels of the feature map.
        num_head_channels: channels of each head.
        norm_num_groups: upper limit of the number of groups of GroupNorm.
    """

    def __init__(self, spatial_dims: int, channels: int, num_head_channels: int, norm_num_groups: int) -> None:
        super().__init__()
        conv = Conv[Conv.CONV, spatial_dims]
        self.num_head_channels = num_head_channels
        self.norm = group_norm(norm_num_groups, channels)
        self.qkv = conv(channels, 3 * channels, kernel_size=1)
        self.proj = zero_module(conv(channels, channels, kernel_size=1))

    def forward(self, x: Tensor) -> Tensor:
        """Attend over the pixels of ``x`` (batch, channels, *spatial); the shape is kept."""
        heads = x.shape[1] // self.num_head_channels
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)  # B, N, 3 C
        # the fused kernels want the channels of a head side by side in memory; with channels last this is no copy
        q, k, v = qkv.contiguous().unflatten(2, [3, heads, self.num_head_channels]).permute(2, 0, 3, 1, 4).unbind(0)
        h = F.scaled_dot_product_attention(q, k, v)  # B, heads, N, C / heads
        return x + self.proj(h.permute(0, 1, 3, 2).reshape(x.shape))


class Stage(nn.Module):
    """The blocks of one level: residual blocks, each followed by attention where asked for.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input.
        out_channels: channels of the output.
        num_res_blocks: number of residual blocks.
        embedding_channels: channels of the timestep embedding; 0 for none.
        attention: whether attention follows each residual block.
        num_head_channels: channels of each attention head.
        norm_num_groups: upper limit of the number of groups of GroupNorm.
        dropout: probability of dropout.
        use_checkpointing: recompute activations in the backward pass instead of keeping them.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        num_res_blocks: int,
        embedding_channels: int,
        attention: bool,
        num_head_channels: int,
        norm_num_groups: int,
        dropout: float,
        use_checkpointing: bool,
    ) -> None:
        super().__init__()
        self.use_checkpointing = use_checkpointing
        self.res_blocks = nn.ModuleList(
            ResBlock(
                spatial_dims, in_channels if i == 0 else out_channels, out_channels, embedding_channels,
                norm_num_groups, dropout,
            )
            for i in range(num_res_blocks)
        )  # fmt: skip
        self.attentions = nn.ModuleList(
            (
                AttentionBlock(spatial_dims, out_channels, num_head_channels, norm_num_groups)
                if attention
                else nn.Identity()
            )
            for _ in range(num_res_blocks)
        )

    def _blocks(self, x: Tensor, embedding: Optional[Tensor]) -> Tensor:
        for block, attention in zip(self.res_blocks, self.attentions):
            x = attention(block(x, embedding))
        return x

    def forward(self, x: Tensor, embedding: Optional[Tensor] = None) -> Tensor:
        """Map ``x`` (batch, in_channels, *spatial) to (batch, out_channels, *spatial); see :class:`ResBlock`."""
        if not torch.jit.is_scripting() and self.use_checkpointing and self.training:
            return checkpoint(self._blocks, x, embedding, use_reentrant=False)
        return self._blocks(x, embedding)


class Downsample(nn.Module):
    """Halve the resolution by a strided convolution.

    Args:
        spatial_dims: 2 or 3.
        channels: channels of input and output.
    """

    def __init__(self, spatial_dims: int, channels: int) -> None:
        super().__init__()
        self.conv = Conv[Conv.CONV, spatial_dims](channels, channels, kernel_size=3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, channels, *spatial) to (batch, channels, *spatial / 2)."""
        return self.conv(x)


class Upsample(nn.Module):
    """Double the resolution by nearest neighbours and a convolution.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input.
        out_channels: channels of the output.
    """

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = Conv[Conv.CONV, spatial_dims](in_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, in_channels, *spatial) to (batch, out_channels, *spatial * 2)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class MaskGate(nn.Module):
    """Scale the channels of the mask's stem by the timestep; starts at 1.

    Args:
        spatial_dims: 2 or 3.
        embedding_channels: channels of the timestep embedding.
        channels: channels of the stem.
    """

    def __init__(self, spatial_dims: int, embedding_channels: int, channels: int) -> None:
        super().__init__()
        self.spatial_dims = spatial_dims
        self.weight = nn.Parameter(torch.zeros(channels, embedding_channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, mask: Tensor, embedding: Tensor) -> Tensor:
        """Return ``mask`` (batch, channels, *spatial), scaled by ``embedding`` (batch or 1, embedding_channels)."""
        gate = 1 + F.linear(F.silu(embedding), self.weight, self.bias)
        for _ in range(self.spatial_dims):
            gate = gate.unsqueeze(-1)
        return mask * gate


class First(nn.Module):
    """What stands where a fusion or a gate is left out."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the first of two streams."""
        return first
