"""Batches for MONAI's engines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from monai.engines.utils import DiffusionPrepareBatch
from monai.networks.schedulers import Scheduler
from monai.utils import convert_to_tensor
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .timesteps import TimestepSampler

__all__ = ["SegmentationDiffusionPrepareBatch", "cosine_decay"]


class SegmentationDiffusionPrepareBatch(DiffusionPrepareBatch):
    """Noise the mask and give the image as condition, for ``SupervisedTrainer`` with a ``DiffusionInferer``.

    MONAI's class noises the image; in segmentation the mask is noised. Noise is standard normal.

    Args:
        scheduler: noise schedule; its ``prediction_type`` decides the target of the loss.
        timesteps: draws the timesteps; by default they are uniform.
    """

    def __init__(self, scheduler: Scheduler, timesteps: TimestepSampler | None = None) -> None:
        super().__init__(num_train_timesteps=scheduler.num_train_timesteps, condition_name="image")
        self.scheduler = scheduler
        self.timesteps = timesteps or TimestepSampler(scheduler.num_train_timesteps)

    def get_timesteps(self, images: Tensor) -> Tensor:
        """Return the timestep of each item, (batch,)."""
        return self.timesteps.draw(len(images), images.device)

    def get_target(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the target of the loss: mask in {0, 1} (``sample``), noise or velocity.

        Args:
            images: mask in [-1, 1], (batch, classes, *spatial).
            noise: noise of the same shape.
            timesteps: (batch,).
        """
        if self.scheduler.prediction_type == "sample":
            return (images + 1) / 2
        if self.scheduler.prediction_type == "epsilon":
            return noise
        return self.scheduler.get_velocity(images, noise, timesteps)

    def __call__(
        self,
        batchdata: Mapping[str, Tensor],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, tuple, dict]:
        """Return mask in [-1, 1], target, and what ``DiffusionInferer`` takes besides.

        Args:
            batchdata: ``image`` (batch, channels, *spatial) and ``label`` (batch, classes, *spatial) in {0, 1}.
            device: where to compute.
            non_blocking: whether the copy to ``device`` may be asynchronous.
            **kwargs: further arguments of ``Tensor.to``.
        """
        image, label = (
            convert_to_tensor(batchdata[key], track_meta=False).to(device, non_blocking=non_blocking, **kwargs)
            for key in ("image", "label")
        )
        mask = 2 * label - 1
        noise = self.get_noise(mask)
        timesteps = self.get_timesteps(mask)
        target = self.get_target(mask, noise, timesteps)
        return mask, target, (), {"noise": noise, "timesteps": timesteps, "condition": image}


def cosine_decay(optimizer: Optimizer, max_epochs: int) -> LambdaLR:
    """Return a schedule that lets the learning rate fall to zero by a half cosine, stepped after each epoch.

    It depends on the epoch alone (``CosineAnnealingLR`` depends on its past too, and on ``T_max`` of the run that is
    resumed).

    Args:
        optimizer: optimiser whose learning rate is set.
        max_epochs: epochs of the whole training.
    """
    return LambdaLR(optimizer, lambda epoch: 0.5 * (1 + math.cos(math.pi * min(epoch / max_epochs, 1.0))))
