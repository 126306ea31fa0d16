"""Training losses of the denoiser."""

from __future__ import annotations

from monai.losses import DiceLoss
from torch import Tensor, nn

from .networks.medsegdiff_unet import PREDICTION_TYPES

__all__ = ["DiffusionSegmentationLoss"]


class DiffusionSegmentationLoss(nn.Module):
    """Loss on what the denoiser predicts, in float32 whatever the network's dtype.

    ``sample``: Dice + binary cross-entropy on the logits of x0. ``epsilon`` (paper, equation 7) and ``v_prediction``:
    mean squared error.

    Args:
        prediction_type: ``sample``, ``epsilon`` or ``v_prediction``; the same as the network's.

    Raises:
        ValueError: for another ``prediction_type``.
    """

    def __init__(self, prediction_type: str = "sample") -> None:
        super().__init__()
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type={prediction_type!r} must be one of {PREDICTION_TYPES}.")
        self.prediction_type = prediction_type
        self.dice = DiceLoss(sigmoid=True)
        self.bce = nn.BCEWithLogitsLoss()
        self.mse = nn.MSELoss()

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the loss, a scalar.

        Args:
            prediction: raw output of the network in training mode, (batch, classes, *spatial).
            target: for ``sample`` the mask in {0, 1}, else the noise or velocity; same shape.
        """
        prediction, target = prediction.float(), target.float()
        if self.prediction_type == "sample":
            return self.dice(prediction, target) + self.bce(prediction, target)
        return self.mse(prediction, target)
