"""Bounds of what a file may claim: of memory, and of places on the disk."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unicodedata import normalize

from ..errors import InputError

__all__ = ["MAX_INFLATION", "check_place", "check_size", "inside", "memory_bytes"]

MAX_INFLATION = 1100  # a deflated byte holds at most 1032
MEMORY_SHARE = 4  # an image as float64 may fill one part in so many of the memory


def memory_bytes() -> int:
    """Physical memory of the machine, in bytes; 16 GiB where the system does not tell (Windows)."""
    if not hasattr(os, "sysconf"):
        return 16 * 2**30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def inside(folder: Path, name: Any) -> Path:
    """The file that a table or list names, which must lie below ``folder``.

    Raises:
        InputError: for a path that leads elsewhere.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise InputError(f"{folder}: {str(name)[:100]!r} is not a file name: correct the list.")
    base = os.path.abspath(folder)
    path = os.path.abspath(os.path.join(base, name))
    if not path.startswith(base + os.sep):
        raise InputError(f"{folder}: the path {name[:200]!r} leads out of the folder: give paths inside it.")
    return Path(path)


def check_place(path: Path) -> None:
    """Refuse what is neither a file nor a folder; to read a pipe would take for ever.

    Raises:
        InputError: for that, and where nothing is there.
    """
    if path.is_symlink() and not path.exists():
        raise InputError(f"{path}: is a link to a file that is not there: repair the link, or remove it.")
    if not path.exists():
        raise InputError(f"{path}: no such file{_alike(path)}: correct the path, or add the file.")
    if not path.is_file() and not path.is_dir():
        raise InputError(f"{path}: is a pipe, socket or device, not a file: move it away.")


def _alike(path: Path) -> str:
    """A word on a file that is there, and has the same name to a person or to another system."""
    if "\\" in str(path) and Path(str(path).replace("\\", "/")).exists():
        return ", but one with / in place of \\"
    spelt = {normalize(form, name) for form in ("NFC", "NFD") for name in (path.name, path.name.lower())}
    if any(path.with_name(name).exists() for name in spelt if name not in (".", "..")):
        return ", but one whose name differs in how letters are stored (accents, upper and lower case)"
    return ""


def check_size(path: Path, shape: Sequence[int], item_bytes: int, available: float) -> None:
    """Refuse an image that claims more voxels than its file or the memory can hold.

    Args:
        path: file or folder, for messages.
        shape: voxels along each axis.
        item_bytes: of a voxel, with all of its channels.
        available: bytes of voxels that the file can hold.

    Raises:
        InputError: for that, and for axes of no voxel.
    """
    if not shape or min(shape) < 1:
        raise InputError(f"{path}: claims the size {list(shape)}: replace the file, its header is damaged.")
    voxels = math.prod(int(n) for n in shape)
    if voxels * item_bytes > available:
        raise InputError(
            f"{path}: claims {list(shape)} voxels, more than the file can hold: replace it, it is truncated or forged."
        )
    if voxels * 8 > memory_bytes() // MEMORY_SHARE:
        raise InputError(
            f"{path}: {list(shape)} voxels need {voxels * 8 / 2**30:.1f} GiB, more than a quarter of the memory: "
            "crop or resample the image."
        )
