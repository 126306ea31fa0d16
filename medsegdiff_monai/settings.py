"""Values of config variables that depend on the machine or on where a command was started."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from .errors import InputError

__all__ = [
    "amp_dtype", "as_bool", "default_amp", "default_device", "field_size", "find_bundle_root", "tell_of_other_weights",
]  # fmt: skip

logger = logging.getLogger(__name__)


def as_bool(value: bool | str) -> bool:
    """Read a boolean that may come as text, as from MONAI's command line or MONAI Label.

    Raises:
        InputError: for anything but true and false, in any case.
    """
    if isinstance(value, bool):
        return value
    if str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    raise InputError(f"{value!r} is neither true nor false: give one of them.")


def amp_dtype(amp: bool | str) -> torch.dtype | None:
    """Return the dtype of autocast: None for false, bfloat16 for true, or the one that is named.

    Raises:
        InputError: for another value.
    """
    dtypes = {"false": None, "true": torch.bfloat16, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if str(amp).lower() not in dtypes:
        raise InputError(f"amp={amp!r} must be one of {', '.join(dtypes)}.")
    return dtypes[str(amp).lower()]


def default_amp(device: torch.device | str, spatial_dims: int) -> bool:
    """Whether to train in bfloat16 unless told otherwise: 2D networks on CPUs that compute in it, which is faster.

    In 3D oneDNN's weight gradients of bfloat16 are not to be relied on: with PyTorch 2.13, those of a convolution over
    fields of two voxels along the first axis hold values from memory that nobody wrote.

    Args:
        device: where the network is trained.
        spatial_dims: of the network.
    """
    found: dict = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch 2.8 has none
    native = torch.device(device).type == "cpu" and any(found.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return native and spatial_dims == 2


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
    """Return the bundle's folder: in the working directory, that itself, or the one that came with this package.

    Raises:
        InputError: where there is none.
    """
    package = Path(__file__).parent
    for root in ("bundle", ".", package / "bundle", package.parent / "bundle"):  # a wheel's, a clone's
        if (Path(root) / "configs" / "metadata.json").is_file():
            return str(root)
    raise InputError(
        f"bundle_root: there is no bundle in {Path.cwd()}: give --bundle_root DIR, the folder that holds configs/."
    )


def tell_of_other_weights(checkpoint: str | Sequence[str], ckpt_dir: str) -> None:
    """Say what an overlay that names finished weights means for a training, which neither reads nor writes them."""
    written = f"{ckpt_dir}/model.pt"
    logger.warning(
        f"checkpoint: the overlay names {checkpoint}, which training neither reads nor writes. It writes {written}: to "
        f"evaluate or segment with that, add --checkpoint {written}."
    )
