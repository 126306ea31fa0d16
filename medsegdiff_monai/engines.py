"""Batches, learning rate and steps of MONAI's engines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from ignite.engine import Engine
from monai.engines.utils import DiffusionPrepareBatch
from monai.networks.schedulers import Scheduler
from monai.utils import convert_to_tensor
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .errors import InputError
from .timesteps import TimestepSampler

__all__ = ["SegmentationDiffusionPrepareBatch", "cosine_decay", "optimizer_step"]


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


def cosine_decay(optimizer: Optimizer, max_epochs: int, warmup_epochs: int = 0) -> LambdaLR:
    """Return a schedule that lets the learning rate rise linearly, then fall to zero by a half cosine.

    It is stepped after each epoch and depends on the epoch alone (``CosineAnnealingLR`` depends on its past too, and on
    ``T_max`` of the run that is resumed).

    Args:
        optimizer: optimiser whose learning rate is set.
        max_epochs: epochs of the whole training.
        warmup_epochs: epochs with a lower learning rate at the start: i / (warmup_epochs + 1) of it in the i-th.

    Raises:
        InputError: where the warm-up is longer than the training.
    """
    if not 0 <= warmup_epochs < max_epochs:
        raise InputError(f"warmup_epochs={warmup_epochs} must be at least 0 and below max_epochs={max_epochs}.")

    def share(epoch: int) -> float:
        if epoch < warmup_epochs:
            return (epoch + 1) / (warmup_epochs + 1)
        progress = min((epoch - warmup_epochs) / (max_epochs - warmup_epochs), 1.0)
        return 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, share)


def optimizer_step(engine: Engine) -> int | None:
    """Return the number of the optimiser's step in a trainer's iteration; None where gradients are only accumulated.

    MONAI's ``SupervisedTrainer`` steps in every ``accumulation_steps``-th iteration of an epoch and in its last.

    Args:
        engine: trainer, in an iteration.
    """
    state: Any = engine.state
    each = getattr(engine, "accumulation_steps", 1)
    epochs, done = divmod(state.iteration - 1, state.epoch_length)
    done += 1  # iterations of this epoch
    if done % each and done < state.epoch_length:
        return None
    return epochs * math.ceil(state.epoch_length / each) + math.ceil(done / each)
