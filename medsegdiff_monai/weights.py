"""Weights of a network in files: recognised however they were saved, checked, and loaded."""

from __future__ import annotations

import hashlib
import io
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError
from .files import write_atomically
from .networks.arguments import default_levels
from .networks.ff_parser import resample_grid

__all__ = ["digest", "load_checkpoint", "load_weights", "network_weights", "save_checkpoint", "with_fresh_layers"]

logger = logging.getLogger(__name__)

# keys under which weights stand in a file; of those of a training, the averaged ones serve best
WRAPPERS = ("ema", "state_dict", "model_state_dict", "model", "network", "net")
# what wrappers of networks put before each name: DataParallel and AveragedModel, torch.compile, Lightning
PREFIXES = ("module.", "_orig_mod.", "model.", "network.", "net.")


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, weights only.

    Raises:
        InputError: for a missing, truncated or foreign file.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such checkpoint: train first, or set --checkpoint FILE.")
    if Path(path).suffix.lower() == ".safetensors":
        raise InputError(f"{path}: safetensors are not read: load them, and save the state dict with torch.save.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever it likes; the file is what matters
        raise InputError(f"{path}: is truncated or no checkpoint of weights: replace the file.") from error
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: holds a {type(content).__name__}, not weights: replace the file.")
    return dict(content)


def save_checkpoint(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint, whole or not at all.

    Raises:
        InputError: where it cannot be written.
    """
    buffer = io.BytesIO()  # torch.save itself hides why a file cannot be written
    torch.save(content, buffer)
    write_atomically(path, buffer.getbuffer())


def digest(path: str | Path) -> str | None:
    """SHA-256 of a file; None where there is none."""
    if not Path(path).is_file():
        return None
    state = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(2**20), b""):
            state.update(block)
    return state.hexdigest()


def network_weights(path: str | Path, model: nn.Module) -> dict[str, Any]:
    """Read the weights for a network from a state dict, a file that holds one, or a training's own checkpoint.

    Names may have the prefixes that ``DataParallel``, ``torch.compile`` and the like put before them.

    Args:
        path: file.
        model: network whose names they should have.

    Raises:
        InputError: for a missing, truncated or foreign file.
    """
    content: Mapping[str, Any] = load_checkpoint(path)
    while True:
        key = next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if key is None:
            return _without_prefixes(content, set(model.state_dict()))
        if key == "ema":
            logger.info(f"{path}: is a training checkpoint: using its averaged weights.")
        content = content[key]


def _without_prefixes(weights: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    found = {name: value for name, value in weights.items() if name != "n_averaged"}
    while not names & found.keys():
        prefix = next((p for p in PREFIXES if found and all(name.startswith(p) for name in found)), None)
        if prefix is None:
            break
        found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def load_weights(path: str | Path, model: nn.Module, weights: Any) -> None:
    """Load weights into a network. Buffers, which hold what a training found out, may be missing.

    Raises:
        InputError: where they are of another architecture, or not finite.
    """
    if not isinstance(weights, Mapping):
        raise InputError(f"{path}: holds a {type(weights).__name__}, not weights: replace the file.")
    own = model.state_dict()
    learned = [name for name, _ in model.named_parameters()]
    difference = _mismatch({name: value for name, value in own.items() if name in {*learned, *weights}}, weights)
    if difference is not None:
        remedy = _remedy(own, weights)
        raise InputError(f"{path}: weights of another architecture ({difference}): {remedy}.")
    for name in [name for name in dict.fromkeys([*learned, *own]) if name in weights]:
        bad = int((~weights[name].isfinite()).sum())
        if bad:
            raise InputError(
                f"{path}: {bad} of the {weights[name].numel()} values of {name} are NaN or infinite, as after a "
                "training that diverged: take other weights."
            )
    model.load_state_dict(dict(weights))


def _mismatch(own: Mapping[str, Tensor], weights: Mapping[str, Any]) -> str | None:
    """The first difference between the weights of a network and those for it, in words."""
    for name in own:
        if not isinstance(weights.get(name), Tensor):
            return f"it lacks {name}"
        if own[name].shape != weights[name].shape:
            return f"{name} is {list(weights[name].shape)} there, {list(own[name].shape)} in the network"
        if own[name].is_floating_point() and not weights[name].is_floating_point():
            return f"{name} holds {weights[name].dtype} there, as quantised weights do"
    extra = [name for name in weights if name not in own]
    return f"the network has no {extra[0]}" if extra else None


def _remedy(own: Mapping[str, Tensor], weights: Mapping[str, Any]) -> str:
    """Which variables make a network that these weights fit."""
    ours, theirs = _architecture(own), _architecture(weights)
    if not ours or not theirs:
        return "give weights that this bundle has trained"
    told = {name: value for name, value in theirs.items() if value is not None and value != ours[name]}
    different = [f"--{name} {str(value).replace(' ', '')}" for name, value in told.items()]
    if not different:
        return "set what shapes the network, or give the overlay, as in training"
    return f"set {' '.join(different)}, or give the overlay that they were trained with"


def _architecture(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The config variables that weights of this bundle's network tell of; nothing of those of another network."""
    tensors = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    names = ("image_stem.weight", "mask_stem.weight", "out_conv.weight", "last_stage.res_blocks.0.conv2.weight")
    if not tensors.keys() >= set(names):
        return {}
    stem, mask_stem, out_conv, _ = (tensors[name] for name in names)
    levels = [f"image_stages.{i}." for i in range(len(_numbers(tensors, r"image_stages\.(\d+)\.")))] + ["last_stage."]
    blocks = [len(_numbers(tensors, re.escape(level) + r"res_blocks\.(\d+)\.")) for level in levels]
    attention = [bool(_numbers(tensors, re.escape(level) + r"attentions\.(\d+)\.")) for level in levels]
    return {
        "spatial_dims": stem.dim() - 2,
        "in_channels": stem.shape[1],
        "num_classes": mask_stem.shape[1],
        "channels": [len(tensors.get(f"{level}res_blocks.0.conv2.weight", ())) for level in levels],
        "num_res_blocks": blocks[0] if len(set(blocks)) == 1 else blocks,
        "stem_stride": 2 if out_conv.shape[-1] == 4 else 1,
        "attention_levels": attention,
        "conditioning_levels": _numbers(tensors, r"fusions\.(\d+)\.conditioning\."),
        "use_ff_parser": any(".ff_parser." in name for name in tensors),
        "network_def#mask_level": _mask_level(tensors, len(levels)),
        "network_def#light_decoder": "ups.0.weight" in tensors,
        "roi_size": _field(tensors),
    }


def _mask_level(tensors: Mapping[str, Tensor], levels: int) -> int | None:
    """The level at which the mask's encoder begins, where it is not the default."""
    found = _numbers(tensors, r"mask_stages\.(\d+)\.")
    fused = _numbers(tensors, r"fusions\.(\d+)\.conditioning\.")
    usual = min([default_levels(levels)[0], *fused])
    return found[0] if found and found[0] != usual else None


def _numbers(tensors: Mapping[str, Tensor], pattern: str) -> list[int]:
    found = (re.match(pattern, name) for name in tensors)
    return sorted({int(match[1]) for match in found if match})


def _field(tensors: Mapping[str, Tensor]) -> list[int] | None:
    """The size of the field that an FF-Parser's grid was made for, rounded up as the grid is."""
    grids = {level: tensors.get(f"fusions.{level}.ff_parser.weight") for level in range(len(tensors))}
    level, grid = next(((level, grid) for level, grid in grids.items() if grid is not None), (0, None))
    if grid is None:
        return None
    stride = 2**level * (2 if tensors["out_conv.weight"].shape[-1] == 4 else 1)
    return [size * stride for size in _signal_size(grid)]


def _signal_size(grid: Tensor) -> list[int]:
    """The spatial size of the signal that a grid (channels, *frequencies, 2) was made for."""
    return [*grid.shape[1:-2], 2 * (grid.shape[-2] - 1)]


def with_fresh_layers(
    path: str | Path, model: nn.Module, weights: Mapping[str, Any], layers: Sequence[str]
) -> dict[str, Any]:
    """Weights for a network whose data differ from those that they were trained on; each change is logged.

    Where the file has a layer for other channels, the network's fresh one is taken. The grids of FF-Parsers are
    resampled. Buffers, which tell of the other training, are left out.

    Args:
        path: file that the weights are from, for messages.
        model: network.
        weights: what is in the file.
        layers: layers that depend on the channels of image and mask.
    """
    own = model.state_dict()
    learned = {name for name, _ in model.named_parameters()}
    result = {name: value for name, value in weights.items() if name in learned or name not in own}
    for layer in layers:
        fresh = {name: value for name, value in own.items() if name.startswith(f"{layer}.")}
        change = _mismatch(fresh, {name: result[name] for name in fresh if name in result})
        if change is not None:
            logger.info(f"{path}: {change}: the layer {layer} is initialised anew.")
            result.update(fresh)
    grids = [n for n in own if n.endswith("ff_parser.weight") and _other_grid(own[n], result.get(n))]
    if grids:
        old, new = (_signal_size(tensors[grids[0]]) for tensors in (result, own))
        logger.info(f"{path}: roi_size differs, the FF-Parser's grid is resampled from {old} to {new}.")
        result.update({name: resample_grid(result[name], _signal_size(own[name])) for name in grids})
    return result


def _other_grid(own: Tensor, other: Any) -> bool:
    return (
        isinstance(other, Tensor)
        and other.dim() == own.dim()
        and other.shape[0] == own.shape[0]
        and other.shape != own.shape
    )
