"""MedSegDiff's network: a condition encoder for the image and a denoiser for the mask (paper, section II)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import List, Optional, Union

import torch
import torch.nn.functional as F
from monai.networks.layers.factories import Conv
from monai.networks.nets.diffusion_model_unet import get_timestep_embedding
from torch import Tensor, nn

from ..errors import InputError
from ..settings import as_bool
from .blocks import Downsample, Stage, Upsample, group_norm
from .dynamic_conditioning import DynamicConditioning
from .ff_parser import FFParser
from .record import TrainingRecord

__all__ = ["PREDICTION_TYPES", "MedSegDiffUNet", "signed_mask"]

PREDICTION_TYPES = ("sample", "epsilon", "v_prediction")


def signed_mask(logits: Tensor) -> Tensor:
    """Turn logits of a mask into x0 in [-1, 1], which is 2 p - 1 for their probability p."""
    return torch.tanh(logits / 2)


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


def _middle_two(num_levels: int) -> list[int]:
    """The middle two encoder stages; the last one takes the sum of both streams and is left out."""
    middle = (num_levels - 1) // 2
    return sorted({min(level, num_levels - 2) for level in (middle, middle + 1)})


class MedSegDiffUNet(nn.Module):
    """Denoiser of a segmentation mask, conditioned on the image by dynamic conditional encoding and FF-Parser.

    Two encoders of equal width, E^I for the image and E^x for the noisy mask. At ``conditioning_levels`` the features
    of E^x pass the FF-Parser (equations 4 to 6) and enhance those of E^I (equation 3). The embeddings of both are
    summed before the last encoding stage; a U-Net decoder follows, whose skip connections carry the sum of both
    streams (the paper draws them without saying from which encoder). The timestep embedding enters every residual
    block of the denoiser and none of E^I, so that E^I up to its first fusion is encoded once per image
    (:meth:`encode_context`). It also scales the channels of the mask's stem (the paper has no such gate; it starts at
    1): at the last timesteps the mask is all noise, which the network can close its eyes to.

    In training mode, and for ``epsilon`` and ``v_prediction``, the network returns its raw output; for ``sample``
    that is the logit of the mask. Evaluated, ``sample`` returns x0 = tanh(logit / 2) in [-1, 1], which any MONAI
    scheduler can step (probability = (x0 + 1) / 2).

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        out_channels: number of foreground classes (channels of the mask).
        channels: channels of each level, from full resolution down.
        num_res_blocks: residual blocks of each level; one number for all, or one each.
        attention_levels: for each level, whether self-attention follows its residual blocks. Default: nowhere.
        conditioning_levels: levels of dynamic conditional encoding, 0 being full resolution; the last level has none,
            as both streams are summed there. Default: the middle two; an empty list gives the plain diffusion model.
        use_ff_parser: whether the FF-Parser filters the mask stream on its way to the condition stream.
        ff_size: spatial size at full resolution whose frequencies make up the FF-Parser's grid (halved, and rounded up
            to an even number, at each level); one number for all axes, or one each. Usually the training patch.
        num_head_channels: channels of each attention head; one number, or one for each level.
        norm_num_groups: upper limit of the groups of GroupNorm; the number used also divides the channels.
        dropout: probability of dropout in the residual blocks.
        prediction_type: what the network predicts: ``sample``, ``epsilon`` or ``v_prediction``.
        num_train_timesteps: T; the image alone is segmented by one step from t = T - 1.
        stem_stride: 1, or 2 for stems that halve the resolution and a transposed convolution that doubles it at the
            end (as in ResNet34, whose block counts the paper takes): a quarter of the cost in 2D, an eighth in 3D.
        use_mask_gate: whether the timestep scales the channels of the mask's stem.
        use_checkpointing: trade computing for memory in training (gradient checkpointing).

    Raises:
        InputError: (a ValueError) for arguments that do not fit together; the message names value and remedy.

    Source: arXiv 2211.00611v5, section II; block design of github.com/openai/improved-diffusion, as the paper says.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int] = (32, 64, 128, 256),
        num_res_blocks: Union[int, Sequence[int]] = 2,
        attention_levels: Optional[Sequence[bool]] = None,
        conditioning_levels: Optional[Sequence[int]] = None,
        use_ff_parser: bool = True,
        ff_size: Union[int, Sequence[int]] = 64,
        num_head_channels: Union[int, Sequence[int]] = 32,
        norm_num_groups: int = 32,
        dropout: float = 0.0,
        prediction_type: str = "sample",
        num_train_timesteps: int = 1000,
        stem_stride: int = 1,
        use_mask_gate: bool = True,
        use_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        levels = len(channels)
        attention = [False] * levels if attention_levels is None else [as_bool(a) for a in attention_levels]
        fused = _middle_two(levels) if conditioning_levels is None else sorted(conditioning_levels)
        _check_arguments(spatial_dims, in_channels, out_channels, channels, attention, fused, dropout, prediction_type)
        blocks = _one_each("num_res_blocks", num_res_blocks, levels, "levels")
        heads = _one_each("num_head_channels", num_head_channels, levels, "levels")
        for c, a, h in zip(channels, attention, heads):
            if a and c % h:
                raise InputError(f"num_head_channels={h} does not divide the {c} channels of an attention level.")
        size = _one_each("ff_size", ff_size, spatial_dims, "axes")
        for name, value in (("norm_num_groups", norm_num_groups), ("num_train_timesteps", num_train_timesteps)):
            if value < 1:
                raise InputError(f"{name}={value} must be at least 1.")

        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.channels = list(channels)
        self.prediction_type = prediction_type
        self.num_train_timesteps = num_train_timesteps
        if stem_stride not in (1, 2):
            raise InputError(f"stem_stride={stem_stride} must be 1 or 2.")
        self.stem_stride = stem_stride
        self.stride = stem_stride * 2 ** (levels - 1)
        self.record = TrainingRecord(spatial_dims, in_channels, out_channels)
        # E^I is free of x_t up to here: the first fusion, or the very end where nothing is fused
        self.first_fusion = min(fused, default=levels - 1)

        conv = Conv[Conv.CONV, spatial_dims]
        self.embedding_channels = channels[0]
        width = 4 * channels[0]
        self.time_embed = nn.Sequential(nn.Linear(channels[0], width), nn.SiLU(), nn.Linear(width, width))

        def stage(level: int, in_ch: int, embedding: int) -> Stage:
            return Stage(
                spatial_dims, in_ch, channels[level], blocks[level], embedding, attention[level], heads[level],
                norm_num_groups, dropout, use_checkpointing,
            )  # fmt: skip

        below = [channels[0], *channels]  # below[i]: channels that enter level i
        self.image_stem = conv(in_channels, channels[0], kernel_size=3, padding=1, stride=stem_stride)
        self.image_stages = nn.ModuleList(stage(i, below[i], 0) for i in range(levels - 1))
        self.image_downs = nn.ModuleList(Downsample(spatial_dims, channels[i]) for i in range(levels - 1))
        self.fusions = nn.ModuleList(
            (
                Fusion(spatial_dims, channels[i], _grid(size, stem_stride * 2**i) if as_bool(use_ff_parser) else None)
                if i in fused
                else First()
            )
            for i in range(levels - 1)
        )
        self.mask_stem = conv(out_channels, channels[0], kernel_size=3, padding=1, stride=stem_stride)
        self.mask_gate = MaskGate(spatial_dims, width, channels[0]) if as_bool(use_mask_gate) else First()
        self.mask_stages = nn.ModuleList(stage(i, below[i], width) for i in range(levels - 1))
        self.mask_downs = nn.ModuleList(Downsample(spatial_dims, channels[i]) for i in range(levels - 1))
        self.last_stage = stage(levels - 1, below[levels - 1], width)
        ups = range(levels - 2, -1, -1)
        self.ups = nn.ModuleList(Upsample(spatial_dims, channels[i + 1], channels[i]) for i in ups)
        self.up_stages = nn.ModuleList(stage(i, 2 * channels[i], width) for i in ups)
        self.out_norm = group_norm(norm_num_groups, channels[0])
        if stem_stride == 1:
            self.out_conv = conv(channels[0], out_channels, kernel_size=3, padding=1)
        else:
            self.out_conv = Conv[Conv.CONVTRANS, spatial_dims](
                channels[0], out_channels, kernel_size=4, stride=2, padding=1
            )

    def _check_image(self, x: Tensor, channels: int, name: str) -> None:
        if x.dim() != self.spatial_dims + 2 or x.shape[1] != channels:
            raise ValueError(
                f"{name} of shape {list(x.shape)} does not fit: (batch, {channels}, {self.spatial_dims} spatial axes)."
            )
        for size in x.shape[2:]:
            if size % self.stride != 0:
                nearest = [max(self.stride, (s + self.stride // 2) // self.stride * self.stride) for s in x.shape[2:]]
                raise ValueError(
                    f"{name} of spatial size {list(x.shape[2:])} is not divisible by the network's stride "
                    f"{self.stride}; the nearest size that is: {nearest}."
                )

    def _channels_last(self, x: Tensor) -> Tensor:
        """On CPUs, convolutions and GroupNorm run about twice as fast with channels last."""
        if x.device.type != "cpu":
            return x
        if self.spatial_dims == 2:
            return x.contiguous(memory_format=torch.channels_last)
        return x.contiguous(memory_format=torch.channels_last_3d)

    @torch.jit.export
    def encode_context(self, image: Tensor) -> List[Tensor]:
        """Encode what does not depend on the noisy mask: E^I up to and including its first fused level, unfused.

        Args:
            image: (batch, in_channels, *spatial); every spatial size divisible by ``stride``.

        Returns:
            Feature maps (batch, channels[i], *spatial / 2**i), from full resolution down. Where no level is fused,
            the last one is the embedding that enters the sum, (batch, channels[-2], *spatial / stride).

        Raises:
            ValueError: for another number of channels or axes, or a size that the stride does not divide.
        """
        self._check_image(image, self.in_channels, "image")
        h = self.image_stem(self._channels_last(image))
        features: List[Tensor] = []
        for i, (stage, down) in enumerate(zip(self.image_stages, self.image_downs)):
            if i <= self.first_fusion:
                h = stage(h)
                features.append(h)
                if i < self.first_fusion:
                    h = down(h)
        if len(features) == self.first_fusion:  # nothing is fused: the embedding that is summed, too
            features.append(h)
        return features

    def _denoise(self, x: Tensor, timesteps: Tensor, context: List[Tensor]) -> Tensor:
        """Return the raw output (batch, out_channels, *spatial) for the noisy mask ``x`` and encoded ``context``."""
        self._check_image(x, self.out_channels, "noisy mask")
        if timesteps.dim() != 1 or (timesteps.shape[0] != 1 and timesteps.shape[0] != x.shape[0]):
            raise ValueError(f"timesteps of shape {list(timesteps.shape)} must be of shape (1,) or ({x.shape[0]},).")
        if len(context) != self.first_fusion + 1:
            raise ValueError(
                f"context of {len(context)} feature maps must hold {self.first_fusion + 1}: "
                "give the image, or what encode_context of this network returned."
            )
        for axis in range(2, x.dim()):
            if self.stem_stride * context[0].shape[axis] != x.shape[axis]:
                size = [self.stem_stride * s for s in context[0].shape[2:]]
                raise ValueError(f"noisy mask of size {list(x.shape[2:])} and image of size {size} differ.")
        embedding = get_timestep_embedding(timesteps, self.embedding_channels).to(x.dtype)
        embedding = self.time_embed(embedding)
        h = self.mask_gate(self.mask_stem(self._channels_last(x)), embedding)
        c = context[0]
        skips: List[Tensor] = []
        for i, (image_stage, image_down, fusion, mask_stage, mask_down) in enumerate(
            zip(self.image_stages, self.image_downs, self.fusions, self.mask_stages, self.mask_downs)
        ):
            h = mask_stage(h, embedding)
            c = _repeat(context[i], h.shape[0]) if i <= self.first_fusion else image_stage(c)
            c = fusion(c, h)
            skips.append(h + c)
            h = mask_down(h)
            if i >= self.first_fusion:
                c = image_down(c)
        if self.first_fusion == len(skips):
            c = _repeat(context[self.first_fusion], h.shape[0])
        h = self.last_stage(h + c, embedding)
        for up, stage in zip(self.ups, self.up_stages):
            h = stage(torch.cat([up(h), skips.pop()], dim=1), embedding)
        return self.out_conv(F.silu(self.out_norm(h)))

    def _segment(self, image: Tensor) -> Tensor:
        """Segment the image alone: one step from the mean of the noise, x = 0, at t = T - 1.

        There x0 is proportional to minus the output for ``epsilon`` and ``v_prediction``.
        """
        size = [image.shape[0], self.out_channels] + list(image.shape[2:])
        noise = torch.zeros(size, dtype=image.dtype, device=image.device)
        last = torch.full([1], self.num_train_timesteps - 1, device=image.device)
        out = self._denoise(noise, last, self.encode_context(image))
        x0 = signed_mask(out) if self.prediction_type == "sample" else (-out).clamp(-1.0, 1.0)
        foreground = (x0 + 1) / 2
        return torch.cat([1 - foreground.amax(dim=1, keepdim=True), foreground], dim=1)

    def forward(
        self, x: Tensor, timesteps: Optional[Tensor] = None, context: Optional[Union[Tensor, List[Tensor]]] = None
    ) -> Tensor:
        """Predict from the noisy mask, its timestep and the image.

        Args:
            x: noisy mask (batch, out_channels, *spatial), in the scale of masks in [-1, 1].
            timesteps: (1,) or (batch,), integer or float; broadcast over the batch.
            context: image (batch, in_channels, *spatial), or what :meth:`encode_context` returned. A batch of B encoded
                images serves a batch of B * M masks, the M masks of each image in a row.

        Returns:
            (batch, out_channels, *spatial), see the class. Called with the image alone as ``x``: probabilities of
            background and of each class, (batch, 1 + out_channels, *spatial), by one step.

        Raises:
            ValueError: for tensors whose channels, axes or sizes do not fit.
        """
        if context is None or timesteps is None:
            if context is not None or timesteps is not None:
                raise ValueError("give timesteps and context together, or the image alone.")
            return self._segment(x)
        if isinstance(context, Tensor):
            features = self.encode_context(context)
        else:
            features = context
        out = self._denoise(x, timesteps, features)
        if self.training or self.prediction_type != "sample":
            return out
        return signed_mask(out)


def _repeat(features: Tensor, batch: int) -> Tensor:
    """Give every image's features to each of its masks: (B, ...) to (batch, ...), without a copy for one image."""
    if features.shape[0] == batch:
        return features
    if batch % features.shape[0] != 0:
        raise ValueError(f"a batch of {batch} masks is no multiple of the {features.shape[0]} images in the context.")
    members = batch // features.shape[0]
    return features.unsqueeze(1).expand([-1, members] + list(features.shape[1:])).flatten(0, 1)


def _grid(size: Sequence[int], stride: int) -> list[int]:
    """FF-Parser's grid at a level of that stride: the even size that covers ``size`` at the level's resolution."""
    return [max(2, 2 * -(-s // (2 * stride))) for s in size]


def _one_each(name: str, value: Union[int, Sequence[int]], count: int, what: str) -> list[int]:
    values = [value] * count if isinstance(value, int) else list(value)
    if len(values) != count or any(v < 1 for v in values):
        raise InputError(f"{name}={value} must be a positive number, or one for each of the {count} {what}.")
    return values


def _check_arguments(
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    channels: Sequence[int],
    attention: Sequence[bool],
    fused: Sequence[int],
    dropout: float,
    prediction_type: str,
) -> None:
    if spatial_dims not in (2, 3):
        raise InputError(f"spatial_dims={spatial_dims} must be 2 or 3.")
    if in_channels < 1 or out_channels < 1:
        raise InputError(f"in_channels={in_channels} and out_channels={out_channels} must be at least 1.")
    if len(channels) < 2 or min(channels) < 1 or channels[0] % 2:
        raise InputError(
            f"channels={list(channels)} must be at least two positive numbers, the first even: it is also the width of "
            "the timestep embedding's sines and cosines."
        )
    if len(attention) != len(channels):
        raise InputError(f"attention_levels={list(attention)} must have one entry for each of {len(channels)} levels.")
    if len(set(fused)) != len(fused) or any(not 0 <= level < len(channels) - 1 for level in fused):
        raise InputError(
            f"conditioning_levels={list(fused)} must be different levels from 0 to {len(channels) - 2}: "
            "at the last level both streams are summed."
        )
    if not 0 <= dropout < 1:
        raise InputError(f"dropout={dropout} must be at least 0 and below 1.")
    if prediction_type not in PREDICTION_TYPES:
        raise InputError(f"prediction_type={prediction_type!r} must be one of {PREDICTION_TYPES}.")
