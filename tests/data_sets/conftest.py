"""Helpers of the tests of data sets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from monai.transforms import LoadImage
from raw_layouts import tree

from medsegdiff_monai.data.raw.prepare import prepare


class Prepared:
    """A prepared data set.

    Args:
        folder: where it is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.content: dict[str, Any] = json.loads((folder / "dataset.json").read_text())

    def names(self, split: str) -> list[str]:
        """Names of the cases of a split."""
        return [Path(item["image"]).name.split(".")[0] for item in self.content.get(split, [])]

    def array(self, name: str, kind: str = "label") -> np.ndarray:
        """Image or label of a case, as it is read for training."""
        for split in ("training", "validation", "test", "unlabelled"):
            for item in self.content.get(split, []):
                if Path(item["image"]).name.startswith(name):
                    return np.asarray(LoadImage(image_only=True)(self.folder / item[kind]))
        raise KeyError(name)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Prepared]:
    """Prepare ``tmp_path/raw``, make sure that the raw data stay as they are, and return the result."""

    def run_prepare(kind: str, **options: Any) -> Prepared:
        raw, output = tmp_path / "raw", tmp_path / "out"
        before = tree(raw)
        try:
            prepare(kind, str(raw), str(output), workers=1, **options)
        finally:
            assert tree(raw) == before
            assert not [p for p in output.rglob("*") if p.name.endswith(".tmp")]
        return Prepared(output)

    return run_prepare
