"""What a training learnt about its own results, kept with the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["CALIBRATION_BINS", "MAX_LOGIT", "TrainingRecord", "clipped_logit"]

MAX_LOGIT = 16.0  # a probability of 1.1e-7, beyond which float32 has no complement
CALIBRATION_BINS = 128  # of the logit, an even number
NAME_BYTES = 40


def clipped_logit(probability: Tensor, limit: float = MAX_LOGIT) -> Tensor:
    """Logit of a probability, float32, within ``limit``."""
    return torch.logit(probability.float()).clamp(-limit, limit)


class TrainingRecord(nn.Module):
    """Calibration and training data of a network, as buffers: all that reads its weights has them.

    Everything is 0, which stands for unknown, until a training fills it (``handlers.FitCalibration``), and in weights
    from before there was a record; a network then works as it did. (Weights that are NaN are refused by many.)

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        out_channels: number of foreground classes.

    Attributes:
        reliability: (classes, ``CALIBRATION_BINS`` + 1), how often voxels are foreground where the mean of the members
            is the sigmoid of -``MAX_LOGIT`` ... ``MAX_LOGIT``; does not fall along a row.
        grading: (classes, 3), scale and shift that take the logit of the members' agreement to that of the mask's
            Dice, and the half-width of a 90 % interval there.
        extent: (2, spatial_dims), least and greatest extent of the images in mm, or pixels without spacing.
        intensity: (2, 2, in_channels), least and greatest mean and standard deviation of each channel.
        size: (2, classes), least and greatest volume of a class in mm^3 (mm^2, pixels), empty masks left out.
        flipped: (spatial_dims,), 1 for the axes along which training flips images.
        letters: (classes, 40), uint8, the names of the classes in UTF-8, filled up by zeros.
    """

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.max_logit, self.bins = MAX_LOGIT, CALIBRATION_BINS  # as TorchScript finds them
        self.reliability = nn.Buffer(torch.zeros(out_channels, CALIBRATION_BINS + 1))
        self.grading = nn.Buffer(torch.zeros(out_channels, 3))
        self.extent = nn.Buffer(torch.zeros(2, spatial_dims))
        self.intensity = nn.Buffer(torch.zeros(2, 2, in_channels))
        self.size = nn.Buffer(torch.zeros(2, out_channels))
        self.flipped = nn.Buffer(torch.zeros(spatial_dims))
        self.letters = nn.Buffer(torch.zeros(out_channels, NAME_BYTES, dtype=torch.uint8))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Take what is there: weights from before there was a record are complete without one."""
        present = {f"{prefix}{name}": buffer for name, buffer in self.named_buffers()}
        super()._load_from_state_dict({**present, **state_dict}, prefix, *args)  # type: ignore[arg-type]

    @torch.jit.unused
    def flip_axes(self) -> list[int]:
        """Return the spatial axes along which training flips images; none where that is not known."""
        return [axis for axis, flipped in enumerate(self.flipped.tolist()) if flipped > 0.5]

    @torch.jit.unused
    def names(self) -> list[str]:
        """Return the names of the classes; none where the training left none."""
        names = [bytes(row.tolist()).rstrip(b"\0").decode("utf-8", "ignore") for row in self.letters.cpu()]
        return names if all(names) and len(set(names)) == len(names) else []

    @torch.jit.unused
    def set_names(self, names: Sequence[str]) -> None:
        """Keep the names of the classes; what is longer than 40 bytes is cut."""
        cut = [name.encode()[:NAME_BYTES].ljust(NAME_BYTES, b"\0") for name in names]
        self.letters.copy_(torch.tensor([list(name) for name in cut], dtype=torch.uint8))

    def forward(self, probability: Tensor) -> Tensor:
        """Calibrate the mean of the members: how often voxels of such a probability were foreground in validation.

        Args:
            probability: (batch, classes, *spatial), 0 to 1.

        Returns:
            The same shape and type. The order of two voxels of a class stays, or they become equal.
        """
        position = (clipped_logit(probability) / self.max_logit + 1) * (self.bins / 2)
        low = position.floor().clamp(max=self.bins - 1)
        table = self.reliability.to(probability.device, torch.float32)
        table = table.unsqueeze(0).expand(probability.shape[0], -1, -1)
        index = low.long().flatten(2)
        below, above = table.gather(2, index), table.gather(2, index + 1)
        calibrated = torch.lerp(below, above, (position - low).flatten(2)).view_as(position)
        known = (table.amax(2) > 0).unsqueeze(2).expand_as(below).reshape(position.shape)
        return torch.where(known, calibrated, probability.float()).to(probability.dtype)
