"""MedSegDiff's network: a condition encoder for the image and a denoiser for the mask (paper, section II)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import List, Optional, Union

import torch
import torch.nn.functional as F
from monai.networks.layers.factories import Conv
from monai.networks.nets.diffusion_model_unet import get_timestep_embedding
from torch import Tensor, nn

from .arguments import (
    PREDICTION_TYPES,
    Level,
    check_at_least_one,
    check_choice,
    check_dropout,
    check_flags,
    one_each,
    read_levels,
    read_mask_level,
)
from .blocks import Downsample, First, MaskGate, Stage, Upsample, group_norm
from .dynamic_conditioning import Fusion
from .record import TrainingRecord

__all__ = ["PREDICTION_TYPES", "MedSegDiffUNet", "signed_mask"]


def signed_mask(logits: Tensor) -> Tensor:
    """Turn logits of a mask into x0 in [-1, 1], which is 2 p - 1 for their probability p."""
    return torch.tanh(logits / 2)


class MedSegDiffUNet(nn.Module):
    """Denoiser of a segmentation mask, conditioned on the image by dynamic conditional encoding and FF-Parser.

    Two encoders of equal width, E^I for the image and E^x for the noisy mask. At ``conditioning_levels`` the features
    of E^x pass the FF-Parser (equations 4 to 6) and enhance those of E^I (equation 3). The embeddings of both are
    summed before the last encoding stage; a U-Net decoder follows, whose skip connections carry the sum of both
    streams (the paper draws them without saying from which encoder). The timestep embedding enters every residual
    block of the denoiser and none of E^I, so that E^I up to its first fusion is encoded once per image
    (:meth:`encode_context`). It also scales the channels of the mask's stem (the paper has no such gate; it starts at
    1), so the network can ignore the mask input when that is all noise.

    Two departures from the paper make a further mask of the same image cheap, and can be undone: E^x begins at the
    middle level (``mask_level``), as finer detail comes from the image; and the decoder adds its skip
    connections and upsamples by transposed convolutions (``light_decoder``).

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
        mask_level: level at which E^x begins, with a convolution whose stride is that level's; 0, as in the paper, is
            the stem's resolution. Default: the first of the middle two levels, or of ``conditioning_levels`` where that
            is finer.
        light_decoder: whether skip connections are added, and features upsampled by transposed convolutions with
            kernels of 2; otherwise, as in improved-diffusion, skips are concatenated, and features upsampled by nearest
            neighbours and a convolution.
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
        mask_level: Optional[int] = None,
        light_decoder: bool = True,
        use_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_choice("spatial_dims", spatial_dims, (2, 3))
        check_choice("stem_stride", stem_stride, (1, 2))
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        check_flags(use_ff_parser=use_ff_parser, use_mask_gate=use_mask_gate, light_decoder=light_decoder)
        check_at_least_one(
            in_channels=in_channels,
            out_channels=out_channels,
            norm_num_groups=norm_num_groups,
            num_train_timesteps=num_train_timesteps,
        )
        check_dropout(dropout)
        levels = read_levels(channels, num_res_blocks, attention_levels, num_head_channels, conditioning_levels)
        size = one_each("ff_size", ff_size, spatial_dims, "axes")

        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.channels = list(channels)
        self.prediction_type = prediction_type
        self.num_train_timesteps = num_train_timesteps
        self.stem_stride = stem_stride
        self.stride = stem_stride * 2 ** (len(levels) - 1)
        self.record = TrainingRecord(spatial_dims, in_channels, out_channels)
        # E^I is free of x_t up to here: the first fusion, or the very end where nothing is fused
        self.first_fusion = next((i for i, level in enumerate(levels) if level.fused), len(levels) - 1)
        self.mask_level = read_mask_level(mask_level, levels)
        self.light_decoder = light_decoder

        def stage(level: int, channels_in: int, embedding: int) -> Stage:
            out, blocks, attention, heads, _ = levels[level]
            shape = spatial_dims, channels_in, out, blocks, embedding, attention, heads
            return Stage(*shape, norm_num_groups, dropout, use_checkpointing)

        self.embedding_channels, width = channels[0], 4 * channels[0]
        self.time_embed = nn.Sequential(nn.Linear(channels[0], width), nn.SiLU(), nn.Linear(width, width))
        self._add_condition_encoder(stage, levels, size if use_ff_parser else None)
        self._add_denoiser(stage, width, use_mask_gate, norm_num_groups)

    def _add_condition_encoder(
        self, stage: Callable[[int, int, int], Stage], levels: Sequence[Level], ff_size: Optional[Sequence[int]]
    ) -> None:
        """Add E^I, and where the mask stream enhances it."""
        dims, channels = self.spatial_dims, self.channels
        below = [channels[0], *channels]  # below[i]: channels that enter level i
        encoding = range(len(channels) - 1)  # the last level sums both streams
        conv = Conv[Conv.CONV, dims]
        self.image_stem = conv(self.in_channels, channels[0], kernel_size=3, padding=1, stride=self.stem_stride)
        self.image_stages = nn.ModuleList(stage(i, below[i], 0) for i in encoding)
        self.image_downs = nn.ModuleList(Downsample(dims, channels[i]) for i in encoding)
        grids = [ff_size and _grid(ff_size, self.stem_stride * 2**i) for i in encoding]
        self.fusions = nn.ModuleList(
            Fusion(dims, channels[i], grids[i]) if levels[i].fused else First() for i in encoding
        )

    def _add_denoiser(
        self, stage: Callable[[int, int, int], Stage], width: int, use_mask_gate: bool, norm_num_groups: int
    ) -> None:
        """Add E^x and the decoder, with a timestep embedding of that width."""
        dims, channels, first = self.spatial_dims, self.channels, self.mask_level
        last = len(channels) - 1
        stride = self.stem_stride * 2**first
        # E^x has no stages above the level at which it begins; a kernel of its stride reads every voxel there
        kernel = max(3, stride)
        self.mask_stem = Conv[Conv.CONV, dims](
            self.out_channels, channels[first], kernel, stride, padding=(kernel - stride + 1) // 2
        )
        self.mask_gate = MaskGate(dims, width, channels[first]) if use_mask_gate else First()
        below = [*channels[: first + 1], *channels[first:]]  # below[i]: channels that enter level i
        self.mask_stages = nn.ModuleList(stage(i, below[i], width) if i >= first else First() for i in range(last))
        self.mask_downs = nn.ModuleList(
            Downsample(dims, channels[i]) if i >= first else nn.Identity() for i in range(last)
        )
        self.last_stage = stage(last, channels[last - 1], width)
        ups = range(last - 1, -1, -1)
        self.ups = nn.ModuleList(self._upsample(channels[i + 1], channels[i]) for i in ups)
        joined = 1 if self.light_decoder else 2
        self.up_stages = nn.ModuleList(stage(i, joined * channels[i], width) for i in ups)
        self.out_norm = group_norm(norm_num_groups, channels[0])
        kind, kernel = (Conv.CONV, 3) if self.stem_stride == 1 else (Conv.CONVTRANS, 4)
        self.out_conv = Conv[kind, dims](channels[0], self.out_channels, kernel, stride=self.stem_stride, padding=1)

    def _upsample(self, in_channels: int, out_channels: int) -> nn.Module:
        if self.light_decoder:
            return Conv[Conv.CONVTRANS, self.spatial_dims](in_channels, out_channels, kernel_size=2, stride=2)
        return Upsample(self.spatial_dims, in_channels, out_channels)

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
            if i < self.mask_level:
                skips.append(_repeat(context[i], h.shape[0]))
            else:
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
            h, skip = up(h), skips.pop()
            h = stage(h + skip if self.light_decoder else torch.cat([h, skip], dim=1), embedding)
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
        raise ValueError(f"a batch of {batch} masks is not a multiple of {features.shape[0]} images in the context.")
    members = batch // features.shape[0]
    return features.unsqueeze(1).expand([-1, members] + list(features.shape[1:])).flatten(0, 1)


def _grid(size: Sequence[int], stride: int) -> list[int]:
    """FF-Parser's grid at a level of that stride: the even size that covers ``size`` at the level's resolution."""
    return [max(2, 2 * -(-s // (2 * stride))) for s in size]
