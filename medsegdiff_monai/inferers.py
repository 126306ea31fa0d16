"""Inferers: one training pass, and a seeded ensemble of samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.inferers import DiffusionInferer, Inferer, SlidingWindowInferer
from monai.networks.schedulers import Scheduler
from torch import Tensor

from .errors import InputError
from .settings import as_bool

__all__ = ["DiffusionEnsembleInferer", "DiffusionTrainingInferer"]


class DiffusionTrainingInferer(DiffusionInferer):
    """MONAI's ``DiffusionInferer`` under bfloat16 autocast on any device (MONAI's trainer has it for CUDA only).

    Args:
        scheduler: adds the noise.
        amp: whether to use autocast.
    """

    def __init__(self, scheduler: Scheduler, amp: bool | str = False) -> None:
        super().__init__(scheduler)
        self.amp = as_bool(amp)

    def __call__(  # type: ignore[override]
        self, inputs: Tensor, diffusion_model: Any, **kwargs: Any
    ) -> Tensor:
        """Noise ``inputs`` (the mask) and return what the network makes of it; see MONAI's ``DiffusionInferer``."""
        with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=self.amp):
            return super().__call__(inputs, diffusion_model, **kwargs)


class DiffusionEnsembleInferer(Inferer):
    """Draw several masks for an image and return their probabilities, members as channels.

    The noise of a member depends on the seed, its number and the size of the field alone: it is the same for every
    case, whatever the batch size or the order of cases and windows. Images larger than ``roi_size`` are covered by
    MONAI's ``SlidingWindowInferer``; the noise rides along as extra channels, so that each window sees its piece of
    one noise field. Smaller images are padded to ``roi_size``, and cropped back.

    The image is encoded once per window (``network.encode_context``, where the network has it) and shared by all
    members and steps.

    Args:
        scheduler: sampler; ``step`` must not draw noise of its own.
        num_classes: number of foreground classes, the channels of the mask.
        roi_size: size of the field that the network sees.
        num_members: number of masks to draw.
        num_steps: number of denoising steps for each.
        seed: seed of the noise.
        overlap: share by which windows overlap.
        sw_batch_size: windows that are segmented at a time.
        member_batch_size: members that are drawn at a time; by default all. Fewer take less memory.
        amp: whether to use bfloat16 autocast.

    Raises:
        InputError: for numbers below 1, or a sampler that draws noise at every step.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        num_classes: int,
        roi_size: Sequence[int],
        num_members: int = 5,
        num_steps: int = 2,
        seed: int = 0,
        overlap: float = 0.5,
        sw_batch_size: int = 1,
        member_batch_size: int | None = None,
        amp: bool | str = False,
    ) -> None:
        super().__init__()
        if num_members < 1 or num_steps < 1:
            raise InputError(f"num_members={num_members} and num_steps={num_steps} must be at least 1.")
        if getattr(scheduler, "is_stochastic", False):
            raise InputError(
                f"{type(scheduler).__name__} draws noise at every step; an ensemble needs a sampler whose only noise "
                "is the first: DDIMScheduler with eta=0, or DPMSolverPlusPlusScheduler."
            )
        self.scheduler: Any = scheduler
        self.num_classes = num_classes
        self.roi_size = tuple(roi_size)
        self.num_members = num_members
        self.num_steps = num_steps
        self.member_batch_size = member_batch_size or num_members
        self.seed = seed
        self.amp = as_bool(amp)
        self.window = SlidingWindowInferer(self.roi_size, sw_batch_size, overlap, mode="gaussian")

    def noise(self, size: Sequence[int]) -> Tensor:
        """Return the noise of all members for a field of ``size``: float32 (members * classes, *size), on the CPU."""
        fields = []
        for member in range(self.num_members):
            # one generator for each member; a large odd factor keeps neighbouring seeds apart
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + member) % 2**63)
            fields.append(torch.randn(self.num_classes, *size, generator=generator))
        return torch.cat(fields)

    @torch.no_grad()
    def sample(self, image: Tensor, noise: Tensor, network: Callable) -> Tensor:
        """Denoise all members of a window.

        Args:
            image: (batch, channels, *roi).
            noise: (batch, members * classes, *roi).
            network: called as ``network(x, timesteps, context)``.

        Returns:
            Probabilities (batch, members * classes, *roi).
        """
        encode = getattr(network, "encode_context", None)
        context = image if encode is None else encode(image)
        members = noise.unflatten(1, (-1, self.num_classes)).split(self.member_batch_size, dim=1)
        return torch.cat([self._denoise(x, context, network) for x in members], dim=1).flatten(1, 2)

    def _denoise(self, x: Tensor, context: Tensor | list[Tensor], network: Callable) -> Tensor:
        """Take noise (batch, members, classes, *roi) to probabilities of the same shape."""
        shape = x.shape
        x = x.flatten(0, 1)
        if isinstance(context, Tensor):  # a network that takes the image itself
            context = context.repeat_interleave(shape[1], dim=0)
        self.scheduler.set_timesteps(self.num_steps)
        for t in self.scheduler.timesteps:
            out = network(x, torch.as_tensor(t, device=x.device).reshape(1), context)
            x, _ = self.scheduler.step(out.to(x.dtype), t, x)
        return ((x + 1) / 2).clamp(0, 1).reshape(shape)

    def __call__(self, inputs: Tensor, network: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """Segment images of any size.

        Args:
            inputs: (batch, channels, *spatial).
            network: the denoiser, in evaluation mode.
            *args: not used.
            **kwargs: not used.

        Returns:
            Probabilities (batch, members * classes, *spatial), the classes of a member in a row; a ``MetaTensor``
            where ``inputs`` is one.
        """
        image = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        size = image.shape[2:]
        field = [max(s, r) for s, r in zip(size, self.roi_size)]
        before = [(f - s) // 2 for f, s in zip(field, size)]
        pad = [n for f, s, b in zip(field, size, before) for n in (b, f - s - b)]
        image = F.pad(image, [n for i in range(len(pad) - 2, -1, -2) for n in pad[i : i + 2]])  # by 0, as in training
        noise = self.noise(field).to(image)[None].expand(image.shape[0], *[-1] * (image.ndim - 1))
        channels = image.shape[1]
        with torch.autocast(image.device.type, dtype=torch.bfloat16, enabled=self.amp):
            out: Any = self.window(
                torch.cat([image, noise], dim=1), lambda x: self.sample(x[:, :channels], x[:, channels:], network)
            )
        inner = (slice(None), slice(None), *(slice(b, b + s) for b, s in zip(before, size)))
        out = out[inner]
        return MetaTensor(out).copy_meta_from(inputs) if isinstance(inputs, MetaTensor) else out
