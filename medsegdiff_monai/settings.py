"""Values of config variables that depend on the machine or on where a command was started."""

from __future__ import annotations

from pathlib import Path

import torch

from .errors import InputError

__all__ = ["as_bool", "default_device", "find_bundle_root"]


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


def default_device() -> torch.device:
    """CUDA where there is one, else an Apple GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


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
