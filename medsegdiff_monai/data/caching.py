"""Preprocessed cases, kept in memory or on disk."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from enum import Enum
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from monai.data import CacheDataset, Dataset, PersistentDataset
from monai.data.utils import pickle_hashing
from monai.utils import convert_to_tensor, enums

from ..distributed import is_main
from ..errors import InputError
from ..files import write_atomically

__all__ = ["DiskCacheDataset", "cached_dataset"]

logger = logging.getLogger(__name__)

# what images carry besides tensors: arrays, what rebuilds them, and the keys of MONAI's record of transforms
SAFE: list[Any] = [np.ndarray, np.dtype, *(type(np.dtype(code)) for code in "?bhilqBHILQefdU")]
SAFE += [np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]]
SAFE += [kind for kind in vars(enums).values() if isinstance(kind, type) and issubclass(kind, Enum)]


def cached_dataset(
    data: Sequence[Mapping[str, Any]],
    transform: Callable,
    cache: str = "memory",
    cache_rate: float = 1.0,
    cache_dir: str | Path = "",
) -> Dataset:
    """Return a data set that runs its transforms, up to the first random one, once for each case.

    Args:
        data: data list.
        transform: preprocessing.
        cache: ``memory`` (filled before training starts), ``disk`` (filled as cases are read, kept for later runs) or
            ``none``.
        cache_rate: share of the cases kept in memory.
        cache_dir: folder of the cache on disk.

    Raises:
        InputError: for another ``cache``.
    """
    if cache == "memory":
        return CacheDataset(data, transform, cache_rate=cache_rate, progress=is_main())
    if cache == "disk":
        return DiskCacheDataset(data, transform, cache_dir)
    if cache == "none":
        return Dataset(data, transform)
    raise InputError(f"cache={cache!r} must be memory, disk or none.")


class DiskCacheDataset(PersistentDataset):
    """MONAI's ``PersistentDataset`` that notices changed files, keeps metadata, and is safe with several processes.

    A cached case is found by its data list entry, size and time of its files, and the transforms. (MONAI's goes by
    names alone, moves a file into place from another disk, where a reader may see half, and stops at half a file.)

    Args:
        data: data list.
        transform: preprocessing.
        cache_dir: folder of the cache.
    """

    def __init__(self, data: Sequence[Mapping[str, Any]], transform: Callable, cache_dir: str | Path) -> None:
        super().__init__(data, transform, cache_dir, _hash_with_files, hash_transform=pickle_hashing, track_meta=True)

    def _cachecheck(self, item_transformed: Mapping[str, Any]) -> Any:
        item: Any = item_transformed
        file = Path(self.cache_dir or "") / f"{self.hash_func(item).decode()}{self.transform_hash}.pt"
        if file.is_file():
            try:
                with torch.serialization.safe_globals(SAFE):
                    return torch.load(file, weights_only=True)
            except (EOFError, RuntimeError, UnpicklingError) as error:
                logger.warning(f"{file}: cannot be read and is written anew: {error}")
        result = self._pre_transform(deepcopy(item))
        content = io.BytesIO()
        torch.save(convert_to_tensor(result, convert_numeric=False, track_meta=True), content)
        write_atomically(file, content.getvalue())
        return result


def _hash_with_files(item: Mapping[str, Any]) -> bytes:
    """Hash an entry of a data list with size and time of the files it names, those of a DICOM folder included."""
    named = [item[key] for key in ("image", "label", "raters") if key in item]
    paths = [Path(p) for value in named for p in ([value] if isinstance(value, str) else value)]
    files = [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    return pickle_hashing([dict(item), [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]])
