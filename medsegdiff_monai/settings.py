"""Values of config variables that depend on the machine or on where a command was started."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.utils import ensure_tuple

from .errors import InputError

__all__ = ["amp_dtype", "as_bool", "default_device", "field_size", "find_bundle_root", "read_config"]


def as_bool(value: bool | str) -> bool:
    """Read a boolean that may come from the command line, where fire passes ``true`` and ``false`` as strings.

    Raises:
        InputError: for anything but true and false, in any case.
    """
    if isinstance(value, bool):
        return value
    if str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    raise InputError(f"{value!r} is no boolean: give true or false.")


def amp_dtype(amp: bool | str) -> torch.dtype | None:
    """Return the dtype of autocast: None for false, bfloat16 for true, or the one that is named.

    Raises:
        InputError: for another value.
    """
    dtypes = {"false": None, "true": torch.bfloat16, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if str(amp).lower() not in dtypes:
        raise InputError(f"amp={amp!r} must be one of {', '.join(dtypes)}.")
    return dtypes[str(amp).lower()]


def default_device() -> torch.device:
    """CUDA where there is one, else an Apple GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def field_size(
    roi_size: Sequence[int], spatial_dims: int, channels: Sequence[int], fit: str, stem_stride: int = 1
) -> list[int]:
    """Return the size of the field that the network sees: ``roi_size``, rounded up to multiples of its stride.

    Args:
        roi_size: one size for each axis.
        spatial_dims: number of axes.
        channels: channels of each level of the network.
        fit: ``crop`` or ``resize``.
        stem_stride: stride of the network's stems.

    Raises:
        InputError: for another ``fit``, or a ``roi_size`` of another length or below 1.
    """
    if fit not in ("crop", "resize"):
        raise InputError(f"fit={fit!r} must be crop (patches and windows) or resize (the whole image).")
    if len(roi_size) != spatial_dims or min(roi_size) < 1:
        raise InputError(f"roi_size={list(roi_size)} must be {spatial_dims} positive sizes, as spatial_dims says.")
    stride = stem_stride * 2 ** (len(channels) - 1)
    return [-(-size // stride) * stride for size in roi_size]


def find_bundle_root() -> str:
    """Return the bundle's folder, seen from the working directory: the project's root or the bundle itself.

    Raises:
        InputError: elsewhere.
    """
    for root in ("bundle", "."):
        if (Path(root) / "configs" / "metadata.json").is_file():
            return root
    raise InputError(
        f"bundle_root: there is no bundle in {Path.cwd()}: give --bundle_root DIR, the folder that holds configs/."
    )


def read_config(config_file: str | Path | Sequence[str | Path], **override: Any) -> ConfigParser:
    """Read a config of the bundle, and set variables of it.

    Args:
        config_file: config, or list of configs, of which later ones take precedence.
        **override: config variables; parts of one are set by ``variable#part`` or ``variable::part``.

    Raises:
        InputError: for a config that is not there, or variables that it does not have, which MONAI would ignore.
    """
    files = [str(file) for file in ensure_tuple(config_file)]
    for file in files:
        if not Path(file).is_file():
            raise InputError(
                f"{file}: no such config: give --config_file FILE, or --bundle_root DIR with configs/ in it."
            )
    parser = ConfigParser()
    parser.read_config(files)
    for name in override:
        if name.replace("::", "#").split("#")[0] not in parser.get():
            raise InputError(f"{name}: is no variable of {', '.join(files)}: see there what they are called.")
    parser.update(override)
    return parser
