"""Fingerprint of a data set, and the config variables that fit it and the machine."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd

from ..settings import default_device
from .reading import memory_bytes

__all__ = ["CaseFacts", "fingerprint", "measure", "propose"]

PERCENTILES = (0.5, 50.0, 99.5)
STRIDE = 8  # of a network of four levels
CHANNELS = {2: [32, 64, 96, 128], 3: [32, 64, 128]}
STEM_STRIDE = 2  # the first level's resolution is lower by so much, as in the configs
MAX_SIDE = {"cpu": 96, "gpu": 256}  # 2D; 256 is the paper's
MAX_PATCH = {"cpu": 32 * 48 * 32, "gpu": 96**3}  # voxels, 3D
SHORT = 32  # voxels
MAX_BATCH = {2: 8, 3: 4}
LEARNING_RATE = {2: 0.002, 3: 0.001}  # as benchmarked
MEMBERS_OF_RATERS = 16  # with five, the mask depends much on the noise where experts disagree
BYTES_PER_FEATURE = 270  # training takes so much for each voxel and channel of the first level (measured, float32)
SHARE = 0.5  # of the memory that training may take
AIR = -500.0  # Hounsfield units; an image whose darkest part lies below is CT


@dataclass(frozen=True)
class CaseFacts:
    """What one case looks like; volumes in RAS order, as training sees them.

    Args:
        name: its image.
        mask: its label, or "" where it has none, or only those of raters.
        split: ``training``, ``validation`` or ``test``.
        dims: spatial axes.
        channels: channels of the image.
        size: voxels along each axis.
        spacing: millimetres along each axis.
        intensity: percentiles of each channel (channels, 3).
        foreground: percentiles of each channel where the label is not 0 (channels, 3); None where it is 0 or missing.
        voxels: voxels of each label but 0, where there are only raters their mean; None without label.
        digest: hash of the image's content.
        raters: voxels of each label but 0 in each rater's file.
        agreement: mean Dice between pairs of raters; None where there are fewer than two.
    """

    name: str
    mask: str
    split: str
    dims: int
    channels: int
    size: tuple[int, ...]
    spacing: tuple[float, ...]
    intensity: np.ndarray
    foreground: np.ndarray | None
    voxels: dict[int, float] | None
    digest: str
    raters: Mapping[str, dict[int, float]] = field(default_factory=dict)
    agreement: float | None = None

    @property
    def files(self) -> dict[str, dict[int, float]]:
        """Voxels of each label but 0 in each file of labels."""
        return {**({self.mask: self.voxels or {}} if self.mask else {}), **self.raters}


def _voxels(label: np.ndarray) -> dict[int, float]:
    values, counts = np.unique(label, return_counts=True)
    return {int(v): float(n) for v, n in zip(values, counts) if v}


def _agreement(maps: Sequence[np.ndarray]) -> float | None:
    """Mean Dice over all pairs of label maps and all labels that any of them has; two empty masks have 1."""
    if len(maps) < 2:
        return None
    scores = []
    for value in sorted(set().union(*map(_voxels, maps))):
        masks = [one == value for one in maps]
        sizes = [np.count_nonzero(mask) for mask in masks]
        for i, j in combinations(range(len(maps)), 2):
            total = sizes[i] + sizes[j]
            scores.append(2 * np.count_nonzero(masks[i] & masks[j]) / total if total else 1.0)
    return float(np.mean(scores)) if scores else 1.0


def measure(
    image: MetaTensor,
    label: MetaTensor | None,
    name: str,
    mask: str,
    split: str,
    digest: str,
    raters: Mapping[str, MetaTensor] | None = None,
    ignore_label: int | None = None,
) -> CaseFacts:
    """Measure a case that has passed the checks; where it has no label, its raters together stand for one.

    What nobody has labelled, ``ignore_label``, counts as background.
    """
    dims = image.ndim - 1
    axes = list(range(dims))
    affine = to_affine_nd(3, image.affine).numpy()
    spacing = nib.affines.voxel_sizes(affine)
    if dims == 3:
        axes = np.argsort(nib.io_orientation(affine)[:, 0]).tolist()
    voxels: dict[int, float] | None = None
    foreground = None

    def known(one: MetaTensor) -> np.ndarray:
        return one.numpy()[0] if ignore_label is None else np.where(one.numpy()[0] == ignore_label, 0, one.numpy()[0])

    drawn = {file: known(rater) for file, rater in (raters or {}).items()}
    maps = list(drawn.values()) if label is None else [known(label)]
    if maps:
        inside = image.numpy()[:, np.any([one != 0 for one in maps], axis=0)]
        foreground = np.percentile(inside, PERCENTILES, axis=1).T if inside.size else None
        counts = [_voxels(one) for one in maps]
        found = {value for count in counts for value in count}
        voxels = {value: sum(count.get(value, 0) for count in counts) / len(maps) for value in sorted(found)}
    return CaseFacts(
        name=name,
        mask=mask,
        split=split,
        dims=dims,
        channels=image.shape[0],
        size=tuple(int(image.shape[1 + a]) for a in axes),
        spacing=tuple(float(spacing[a]) for a in axes),
        intensity=np.percentile(image.numpy().reshape(image.shape[0], -1), PERCENTILES, axis=1).T,
        foreground=foreground,
        voxels=voxels,
        digest=digest,
        raters={file: _voxels(one) for file, one in drawn.items()},
        agreement=_agreement(list(drawn.values())),
    )


def _spread(rows: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    table = np.array(rows, dtype=np.float64)
    kinds = {"min": table.min(0), "median": np.median(table, axis=0), "max": table.max(0)}
    return {kind: [float(f"{value:.6g}") for value in row] for kind, row in kinds.items()}


def _percentiles(cases: Sequence[np.ndarray]) -> dict[str, list[float]]:
    """Median over the cases of each percentile of each channel."""
    if not cases:
        return {}
    return {
        f"percentile_{p:g}": [float(f"{value:.6g}") for value in row]
        for p, row in zip(PERCENTILES, np.median(cases, axis=0).T)
    }


def _raters(facts: Sequence[CaseFacts]) -> dict[str, Any]:
    """How many raters the cases have, and how far they agree; empty where none has any."""
    rated = [case for case in facts if case.raters]
    if not rated:
        return {}
    numbers = [len(case.raters) for case in rated]
    agreement = [case.agreement for case in rated if case.agreement is not None]
    masks = [voxels for case in rated for voxels in case.raters.values()]
    return {
        "raters": {
            "cases": len(rated),
            "per_case": {"min": min(numbers), "median": float(np.median(numbers)), "max": max(numbers)},
            "mean_pairwise_dice": round(float(np.mean(agreement)), 4) if agreement else None,
            "masks": len(masks),
            "empty_masks": sum(not voxels for voxels in masks),
        }
    }


def fingerprint(facts: Sequence[CaseFacts]) -> dict[str, Any]:
    """Summarise cases of one kind: sizes, spacing, intensities, class volumes, and raters where there are any.

    Args:
        facts: cases of the same number of axes and channels, at least one.

    Returns:
        A JSON object.
    """
    labelled = [case for case in facts if case.voxels is not None]
    classes = {}
    for value in sorted({label for case in labelled for label in case.voxels or {}}):
        share = [(case.voxels or {}).get(value, 0) / math.prod(case.size) for case in labelled]
        classes[str(value)] = {
            "cases": sum(s > 0 for s in share),
            "volume_share": _spread([[s] for s in share]),
            "volume": _spread([[(case.voxels or {}).get(value, 0) * math.prod(case.spacing)] for case in labelled]),
        }
    return {
        "cases": dict(Counter(case.split for case in facts)),
        "labelled": len(labelled),
        "spatial_dims": facts[0].dims,
        "channels": facts[0].channels,
        "size": _spread([case.size for case in facts]),
        "spacing": _spread([case.spacing for case in facts]),
        "intensity": _percentiles([case.intensity for case in facts]),
        "intensity_of_foreground": _percentiles([c.foreground for c in facts if c.foreground is not None]),
        "classes": classes,
        **_raters(facts),
    }


def _memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory_bytes()


def _round_up(value: float) -> int:
    return max(STRIDE, math.ceil(value / STRIDE - 1e-6) * STRIDE)


def _whole_image(size: Sequence[float], max_side: int) -> list[int]:
    """The image's proportions, at most ``max_side``."""
    scale = min(1.0, max_side / max(size))
    return [min(max_side, _round_up(side * scale)) for side in size]


def _patch(size: Sequence[float], max_voxels: int) -> list[int]:
    """The image's size, shortened in proportion until the patch is small enough; short axes stay whole."""
    patch = [_round_up(side) for side in size]
    while math.prod(patch) > max_voxels:
        axis = max(range(len(patch)), key=lambda i: (patch[i] > SHORT, patch[i] / size[i]))
        patch[axis] -= STRIDE
    return patch


def _intensity_range(found: Mapping[str, Any]) -> list[float] | None:
    """For CT, the intensities of the foreground and as much again around them; None for what has no unit."""
    inside = found["intensity_of_foreground"]
    if found["channels"] > 1 or found["intensity"]["percentile_0.5"][0] > AIR or not inside:
        return None
    low, high = inside["percentile_0.5"][0], inside["percentile_99.5"][0]
    margin = max(high - low, 1.0) / 2
    return [round(low - margin), round(high + margin)]


def propose(
    found: Mapping[str, Any], regions: Mapping[str, Sequence[int]], folder: Path, ignore_label: int | None = None
) -> dict[str, Any]:
    """Config variables for a data set on this machine.

    2D images are resized whole, volumes cropped to patches at the median spacing. On a CPU, images and patches are
    smaller than on a GPU, so that a training ends within the day. Cases of several raters get more members.

    Args:
        found: the fingerprint.
        regions: the mask channels.
        folder: the data set.
        ignore_label: value of voxels that nobody has labelled, where there are any.

    Returns:
        An overlay of ``train.json``, ``evaluate.json`` and ``inference.json``.
    """
    device = default_device()
    kind = "cpu" if device.type == "cpu" else "gpu"
    dims, size, spacing = found["spatial_dims"], found["size"]["median"], found["spacing"]["median"]
    if dims == 2:
        roi = _whole_image(size, MAX_SIDE[kind])
        cached = math.prod(roi)
    else:
        largest = zip(found["size"]["max"], found["spacing"]["max"], spacing)
        cached = math.prod(n * mine / target for n, mine, target in largest)
        roi = _patch(size, MAX_PATCH[kind])
    budget = SHARE * _memory(device)
    cases = found["cases"].get("training", 1)
    features = CHANNELS[dims][0] * math.prod(roi) / STEM_STRIDE**dims
    batch = int(budget / (BYTES_PER_FEATURE * features))
    maps = found["raters"]["per_case"]["max"] if "raters" in found else 1
    cache_bytes = 4 * cached * (found["channels"] + maps) * sum(found["cases"].values())
    return {
        "dataset_dir": str(folder.resolve()),
        "spatial_dims": dims,
        "in_channels": found["channels"],
        "num_classes": len(regions),
        "regions": {name: list(values) for name, values in regions.items()},
        **({} if ignore_label is None else {"ignore_label": ignore_label}),
        "spacing": None if dims == 2 else spacing,
        "intensity_range": _intensity_range(found),
        "fit": "resize" if dims == 2 else "crop",
        "roi_size": roi,
        "channels": CHANNELS[dims],
        "batch_size": max(1, min(MAX_BATCH[dims], batch, cases)),
        "learning_rate": LEARNING_RATE[dims],
        **(dict.fromkeys(("num_members", "val_num_members"), MEMBERS_OF_RATERS) if "raters" in found else {}),
        "cache_rate": round(min(1.0, SHARE * memory_bytes() / cache_bytes), 3),
    }
