"""Damaged files through check and prepare, 300 of each kind, none of which ends in anything but one sentence."""

from __future__ import annotations

import contextlib
import io
import json
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import raw_layouts as raw
from PIL import Image

from medsegdiff_monai.data import DataSpec, training_splits
from medsegdiff_monai.data.raw.prepare import prepare
from medsegdiff_monai.data.reading import load_image
from medsegdiff_monai.data.report import check
from medsegdiff_monai.errors import InputError

SECONDS = 20  # for one command on a handful of small files
GROWTH = 512 * 2**20  # bytes of memory that all damaged files of a kind may take
FEW, ALL = 10, 300  # damaged files of each kind: in every run of the tests, and in the slow one


@contextlib.contextmanager
def deadline() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"still running after {SECONDS} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def flip(content: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 4, 32))):
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    return bytes(damaged)


def truncate(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def header(content: bytes, rng: random.Random) -> bytes:
    """Whole fields of the first bytes become extreme."""
    damaged = bytearray(content)
    for _ in range(3):
        at = rng.randrange(0, min(len(damaged), 352) - 4, 2)
        damaged[at : at + 4] = rng.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\x7f\xff\x7f", b"\0\0\xc0\x7f"))
    return bytes(damaged)


def repeat(content: bytes, rng: random.Random) -> bytes:
    """A piece appears again elsewhere, as a careless edit does."""
    a, b = sorted(rng.randrange(len(content)) for _ in range(2))
    at = rng.randrange(len(content))
    return content[:at] + content[a:b] + content[at:]


def retype(content: bytes, rng: random.Random) -> bytes:
    """A value of a JSON file becomes something else."""
    whole = json.loads(content)
    node, key = whole, rng.choice(list(whole))
    while isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.7:
        node = node[key]
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
    node[key] = rng.choice(
        [None, True, -1, 10**30, 1e999, "", "../x", "a" * 5000, ".", "x.nii", [], [[1]], {}, {"a": 1}]
    )
    return json.dumps(whole).encode()


DAMAGES = {"": (flip, truncate, header, repeat), ".json": (flip, retype, repeat, retype, truncate, retype)}


def nifti_set(root: Path) -> tuple[str, Path, list[Path]]:
    folder = raw.decathlon(root, 2)
    plain = folder / "imagesTr/toy_001.nii"
    shutil.copy(folder / "imagesTr/toy_001.nii.gz", folder / "x.nii.gz")
    raw.volume(plain, load_image(folder / "x.nii.gz").numpy()[0])
    text = (folder / "dataset.json").read_text().replace("imagesTr/toy_001.nii.gz", "imagesTr/toy_001.nii")
    (folder / "dataset.json").write_text(text)
    return "decathlon", folder, [plain, plain, folder / "labelsTr/toy_000.nii.gz", folder / "imagesTr/toy_000.nii.gz"]


def picture_set(root: Path) -> tuple[str, Path, list[Path]]:
    raw.picture_set(root, 4)
    return "folder", root, [root / "images/c0.png", root / "labels/c1.png"]


def tiff_set(root: Path) -> tuple[str, Path, list[Path]]:
    """Of 8 bits, 16 and floats; compressed in several ways, in strips; with a palette; masks too."""
    raw.picture_set(root, 6)
    kinds = [("RGB", None), ("RGB", "tiff_lzw"), ("RGB", "tiff_adobe_deflate"), ("P", "packbits"), ("RGB", "jpeg")]
    for i, (mode, compression) in enumerate(kinds):
        picture = Image.open(root / f"images/c{i}.png")
        (picture.quantize(9) if mode == "P" else picture).save(root / f"images/c{i}.tif", compression=compression)
        (root / f"images/c{i}.png").unlink()
    for i, kind in enumerate((np.uint8, np.uint16, np.float32)):
        mask = np.asarray(Image.open(root / f"labels/c{i}.png"))
        Image.fromarray(mask.astype(kind)).save(root / f"labels/c{i}.tif", compression="tiff_lzw" if i else None)
        (root / f"labels/c{i}.png").unlink()
    text = (root / "dataset.json").read_text()
    for i in range(5):
        text = text.replace(f"images/c{i}.png", f"images/c{i}.tif")
        text = text.replace(f"labels/c{i}.png", f"labels/c{i}.tif") if i < 3 else text
    (root / "dataset.json").write_text(text)
    return "folder", root, sorted(root.glob("*/*.tif"))


def json_set(root: Path) -> tuple[str, Path, list[Path]]:
    folder = raw.decathlon(root, 2)
    return "decathlon", folder, [folder / "dataset.json"]


def nnunet_set(root: Path) -> tuple[str, Path, list[Path]]:
    folder = raw.decathlon(root, 2)
    for path in folder.glob("imagesT*/*.nii.gz"):
        path.rename(path.with_name(path.name.replace(".nii.gz", "_0000.nii.gz")))
    content = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "all": [1, 2], "back": 2, "ignore": 3}}
    (folder / "dataset.json").write_text(
        json.dumps({**content, "file_ending": ".nii.gz", "regions_class_order": [1, 2]})
    )
    return "nnunet", folder, [folder / "dataset.json"]


def xml_set(root: Path) -> tuple[str, Path, list[Path]]:
    folder = raw.ddti(root)
    for number in (4, 5, 6, 7, 8, 10, 13):
        for path in folder.glob(f"{number}[._]*"):
            path.unlink()
    return "ddti", folder, [folder / "2.xml", folder / "3.xml", folder / "12.xml"]


@pytest.mark.parametrize("files", [FEW, pytest.param(ALL, marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", [nifti_set, picture_set, tiff_set, json_set, nnunet_set, xml_set])
def test_damaged_files(tmp_path, make: Callable[[Path], tuple[str, Path, list[Path]]], files: int):
    kind, source, targets = make(tmp_path / "raw")
    originals = {path: path.read_bytes() for path in targets}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for number in range(files):
        rng = random.Random(f"{make.__name__} {number}")
        path = targets[number % len(targets)]
        damages = DAMAGES.get(path.suffix, DAMAGES[""])
        path.write_bytes(damages[number // len(targets) % len(damages)](originals[path], rng))
        output = tmp_path / f"out{number}"
        commands: list[Callable[[], None]] = [lambda out=output: prepare(kind, str(source), str(out), workers=1)]
        if kind != "ddti":
            commands.append(lambda: check(str(source), write=str(tmp_path / "overlay.json")))
        if make is json_set:
            commands.append(lambda: training_splits(str(source), DataSpec(3, 1, 2)))
        if kind == "ddti" and number % 8 == 0:
            commands.append(lambda out=output: check(str(out)) if (out / "dataset.json").exists() else None)
        for command in commands:
            try:
                with deadline(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    command()
            except InputError:
                refused += 1
        complete(output)
        shutil.rmtree(output, ignore_errors=True)
        path.write_bytes(originals[path])
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert growth < GROWTH, f"{growth >> 20} MiB"
    assert refused >= files // 4  # the damage is real


def complete(output: Path) -> None:
    """What is written is whole: every file can be read, and is in the list."""
    assert not list(output.rglob("*.tmp"))
    if (output / "dataset.json").is_file():
        content = json.loads((output / "dataset.json").read_text())
        for item in (item for split in ("training", "validation", "test") for item in content[split]):
            for key in {"image", "label"} & item.keys():
                assert load_image(output / item[key]).shape[0] >= 1
