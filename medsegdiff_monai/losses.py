"""Training losses of the denoiser."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from monai.losses import DiceLoss
from torch import Tensor, nn

from .networks.medsegdiff_unet import PREDICTION_TYPES
from .timesteps import TimestepSampler

__all__ = ["DiffusionSegmentationLoss"]


class DiffusionSegmentationLoss(nn.Module):
    """Loss on what the denoiser predicts, in float32 whatever the network's dtype.

    ``sample``: Dice + binary cross-entropy on the logits of x0. ``epsilon`` (paper, equation 7) and ``v_prediction``:
    mean squared error.

    Args:
        prediction_type: ``sample``, ``epsilon`` or ``v_prediction``; the same as the network's.
        timesteps: what drew the timesteps of the batch, and weighs the losses of its items; by default their mean.

    Raises:
        ValueError: for another ``prediction_type``.
    """

    def __init__(self, prediction_type: str = "sample", timesteps: TimestepSampler | None = None) -> None:
        super().__init__()
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type={prediction_type!r} must be one of {PREDICTION_TYPES}.")
        self.prediction_type = prediction_type
        self.timesteps = timesteps or TimestepSampler()
        self.dice = DiceLoss(sigmoid=True, reduction="none")

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the loss, a scalar.

        Args:
            prediction: raw output of the network in training mode, (batch, classes, *spatial).
            target: for ``sample`` the mask in {0, 1}, else the noise or velocity; same shape.
        """
        prediction, target = prediction.float(), target.float()
        if self.prediction_type == "sample":
            dice = self.dice(prediction, target)
            losses = dice.flatten(1).mean(1) + _mean(F.binary_cross_entropy_with_logits, prediction, target)
        else:
            losses = _mean(F.mse_loss, prediction, target)
        return self.timesteps.weigh(losses)


def _mean(loss: Callable[..., Tensor], prediction: Tensor, target: Tensor) -> Tensor:
    """The mean of a pointwise loss over each item, (batch,)."""
    return loss(prediction, target, reduction="none").flatten(1).mean(1)
