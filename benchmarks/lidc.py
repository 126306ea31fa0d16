"""LIDC4: lung nodules, each outlined by four radiologists, as centre crops in memory and as batches of them.

The pictures are of LIDC-IDRI (CC BY 3.0); see the ``SOURCE.md`` beside them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from monai.transforms import Compose, RandFlipd, RandRotate90d, RandScaleIntensityd, RandShiftIntensityd
from PIL import Image
from torch import Tensor

from medsegdiff_monai.transforms import NormalizeImaged

__all__ = ["Batches", "Crops", "load"]

NAME = "LIDC4"


@dataclass
class Crops:
    """The slices of a split.

    Attributes:
        images: (slices, 1, size, size), normalised as the bundle does.
        raters: boolean (slices, radiologists, size, size).
        patients: of each slice.
    """

    images: Tensor
    raters: Tensor
    patients: Sequence[str]

    def __len__(self) -> int:
        return len(self.images)


def load(data_root: Path, split: str, size: int) -> Crops:
    """Read the centre crops of a split.

    Args:
        data_root: the folder that holds ``LIDC4``.
        split: ``training``, ``validation`` or ``test``.
        size: of the crops.

    Raises:
        SystemExit: for data or a split that are not there, or crops larger than the pictures.
    """
    folder = data_root / NAME
    lists = folder / "dataset.json"
    if not lists.is_file():
        raise SystemExit(f"{lists}: is not there: give --data_root the folder that holds {NAME}.")
    items = json.loads(lists.read_text()).get(split)
    if not items:
        raise SystemExit(f"{lists}: has no {split}.")

    def crop(file: str) -> Tensor:
        with Image.open(folder / file) as picture:
            pixels = torch.from_numpy(np.array(picture))
        if min(pixels.shape) < size:
            raise SystemExit(f"{folder / file}: {tuple(pixels.shape)} is smaller than --size {size}.")
        top, left = ((side - size) // 2 for side in pixels.shape)
        return pixels[top : top + size, left : left + size]

    normalize = NormalizeImaged(keys="image")
    images = [torch.as_tensor(normalize({"image": crop(item["image"])[None].float()})["image"]) for item in items]
    raters = [torch.stack([crop(file) > 0 for file in item["labels"]]) for item in items]
    return Crops(torch.stack(images), torch.stack(raters), [item["patient"] for item in items])


class Batches:
    """Batches of crops with all radiologists, in an order and with an augmentation that a seed decides.

    Each time it is iterated, all crops come once, but for a rest that makes no batch. A batch is flipped and turned as
    a whole, which costs a tenth of doing so picture by picture; intensities are scaled and shifted for each picture.

    Args:
        crops: what to draw from.
        batch_size: crops in a batch.
        seed: of order and augmentation.
    """

    def __init__(self, crops: Crops, batch_size: int, seed: int) -> None:
        self.crops, self.batch_size = crops, batch_size
        self.random = np.random.RandomState(seed)
        # pictures are channels here, and so are masks
        self.augment = Compose(
            [
                RandFlipd(["image", "label"], prob=0.5, spatial_axis=0),
                RandRotate90d(["image", "label"], prob=0.75, max_k=3),  # all four turns are equally likely
                RandScaleIntensityd("image", factors=0.1, prob=0.5, channel_wise=True),
                RandShiftIntensityd("image", offsets=0.1, prob=0.5, channel_wise=True),
            ]
        ).set_random_state(seed)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield ``image`` (batch, 1, size, size) and ``label`` (batch, raters, 1, size, size) in {0, 1}."""
        order = self.random.permutation(len(self.crops))
        for start in range(0, len(order) - self.batch_size + 1, self.batch_size):
            some = order[start : start + self.batch_size]
            image, raters = self.crops.images[some, 0], self.crops.raters[some]
            batch = self.augment({"image": image, "label": raters.flatten(0, 1)})
            image, masks = (torch.as_tensor(batch[key]).as_subclass(Tensor) for key in ("image", "label"))
            yield {"image": image[:, None], "label": masks.float().view(raters.shape).unsqueeze(2)}
