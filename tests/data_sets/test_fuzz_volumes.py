"""Damaged DICOM, NRRD and MetaImage files: read whole, or refused in one sentence; no slice is ever dropped."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

import dicom_files as dicom
import itk
import numpy as np
import pytest
from test_fuzz import deadline, flip, header, repeat, truncate

from medsegdiff_monai.data.reading import load_image
from medsegdiff_monai.errors import InputError

VOLUME = np.random.default_rng(0).integers(0, 999, (18, 16, 4)).astype(np.int16)
NUMBERS = (b"-1", b"0", b"nan", b"1e30", b"inf", b"99999999", b"9223372036854775807", b"1e-320", b"", b"7 7", b"0.5")


def number(content: bytes, rng: random.Random) -> bytes:
    """A number of a header becomes another, or none."""
    found = rng.choice(list(re.finditer(rb"\d[\d.]*", content[:1200])))
    return content[: found.start()] + rng.choice(NUMBERS) + content[found.end() :]


def line(content: bytes, rng: random.Random) -> bytes:
    """A line of a header goes, or stands elsewhere too."""
    lines = content.split(b"\n")
    one = rng.randrange(min(len(lines), 10))
    if rng.random() < 0.5:
        return b"\n".join(lines[:one] + lines[one + 1 :])
    return b"\n".join([*lines[: rng.randrange(10)], lines[one], *lines[rng.randrange(10) :]])


def early(content: bytes, rng: random.Random) -> bytes:
    """As ``flip``, in what is most likely a header."""
    return flip(content[:900], rng) + content[900:]


DAMAGES = (flip, early, truncate, header, repeat, number)


def damaged(path: Path, name: Path, number_of_files: int, damages: tuple[Callable, ...]) -> None:
    """Load a volume after each damage to one of its files, ``path``; faults must name that file or ``name``."""
    whole, original = load_image(name), path.read_bytes()
    refused = 0
    for i in range(number_of_files):
        rng = random.Random(f"{path.name} {i}")
        path.write_bytes(damages[i % len(damages)](original, rng))
        try:
            with deadline():
                image = load_image(name)
            assert image.numel() >= 1
            assert name.is_file() or image.shape == whole.shape
        except InputError as error:
            refused += 1
            assert str(name.parent) in str(error) and "\n" not in str(error)
    path.write_bytes(original)
    assert refused >= number_of_files // 4  # the damage is real


COUNTS = [pytest.param(36), pytest.param(300, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("syntax", [dicom.EXPLICIT, dicom.IMPLICIT, dicom.RLE])
def test_damaged_slices(tmp_path, syntax, count):
    path = dicom.write_series(tmp_path / "s", VOLUME, syntax=syntax)[1]
    damaged(path, tmp_path / "s", count, DAMAGES)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", ["x.nrrd", "x.mha", "x.mhd", "packed.nrrd", "packed.mha"])
def test_damaged_volumes(tmp_path, name, count):
    image = itk.image_from_array(VOLUME)
    image.SetSpacing([0.8, 1.2, 3])
    itk.imwrite(image, str(tmp_path / name), compression=name.startswith("packed"))
    damaged(tmp_path / name, tmp_path / name, count, (*DAMAGES, line))
