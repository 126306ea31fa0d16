"""Preprocessed cases in memory and on disk."""

from __future__ import annotations

import multiprocessing
import os
import shutil

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import CacheDataset
from monai.transforms import Compose, LoadImaged, RandFlipd, ScaleIntensityd

from medsegdiff_monai.data import cached_dataset
from medsegdiff_monai.data.caching import DiskCacheDataset
from medsegdiff_monai.errors import InputError

from .conftest import CONFIGS, PICTURE_SETTINGS, ROOT, TINY, VOLUME_SETTINGS


def preprocessing(low: float = 0.0) -> Compose:
    keys = ["image", "label"]
    loaded = LoadImaged(keys, image_only=True, ensure_channel_first=True)
    return Compose([loaded, ScaleIntensityd("image", low, 1.0), RandFlipd(keys, prob=0.5)])


@pytest.fixture
def items(pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "data")
    names = [(f"image_{i}.png", f"label_{i}.png") for i in range(3)]
    return [{"image": str(tmp_path / "data" / a), "label": str(tmp_path / "data" / b), "case": a} for a, b in names]


def test_kinds_of_cache_give_the_same_cases(items, tmp_path):
    datasets = [
        cached_dataset(items, preprocessing(), cache, cache_dir=tmp_path / "cache")
        for cache in ("memory", "disk", "none")
    ]
    assert isinstance(datasets[0], CacheDataset) and isinstance(datasets[1], DiskCacheDataset)
    for _ in range(2):  # the second time from the disk
        for i in range(len(items)):
            cases = []
            for dataset in datasets:
                dataset.transform.set_random_state(i)
                cases.append(dataset[i])
            for other in cases[1:]:
                assert torch.equal(cases[0]["image"], other["image"]) and torch.equal(cases[0]["label"], other["label"])
                assert other["case"] == cases[0]["case"]
                assert other["image"].meta["filename_or_obj"] == cases[0]["image"].meta["filename_or_obj"]
                np.testing.assert_array_equal(other["image"].affine, cases[0]["image"].affine)
    with pytest.raises(InputError, match="cache='ram' must be memory, disk or none"):
        cached_dataset(items, preprocessing(), "ram")


def test_share_in_memory(items):
    assert cached_dataset(items, preprocessing(), cache_rate=0.0).cache_num == 0
    assert cached_dataset(items, preprocessing(), cache_rate=0.7).cache_num == 2


def test_disk_is_read_until_file_or_transform_changes(items, tmp_path, monkeypatch):
    made = []
    original = DiskCacheDataset._pre_transform
    monkeypatch.setattr(DiskCacheDataset, "_pre_transform", lambda s, i: made.append(i["case"]) or original(s, i))

    def read(low: float = 0.0) -> list[str]:
        """All cases by a data set made anew, as in a later run; which were preprocessed."""
        made.clear()
        dataset = DiskCacheDataset(items, preprocessing(low), tmp_path / "cache")
        for i in range(len(items)):
            dataset[i]
        return list(made)

    names = [item["case"] for item in items]
    assert read() == names
    assert read() == []
    os.utime(items[1]["label"], ns=(0, 0))
    assert read() == [names[1]]
    assert read(low=-1.0) == names
    assert read() == read(low=-1.0) == []
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:100])  # cut off
    assert read() == names
    assert read() == []
    assert not list((tmp_path / "cache").glob("*.tmp"))


def hashes(items, queue) -> None:
    dataset = DiskCacheDataset(items, preprocessing(), "")
    queue.put((dataset.transform_hash, [dataset.hash_func(item) for item in items]))


def test_another_process_finds_the_same_files(items, tmp_path, monkeypatch):
    """Whatever its hash seed."""
    monkeypatch.chdir(tmp_path)
    context = multiprocessing.get_context("spawn")
    found = []
    for seed in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        queue = context.Queue()
        process = context.Process(target=hashes, args=(items, queue))
        process.start()
        found.append(queue.get(timeout=300))
        process.join()
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["pictures", "volumes"])
def test_configs_cache_on_disk_and_fuse_what_comes_from_there(kind, request, bundle, tmp_path):
    """Validation inverts what the transforms of a cached image have noted."""
    data = request.getfixturevalue(kind)
    settings = {**(PICTURE_SETTINGS if kind == "pictures" else {**VOLUME_SETTINGS, "spacing": [1.5, 1.5, 1.5]})}
    settings |= {"dataset_dir": data, "max_epochs": 2}
    plain = bundle("train", output=tmp_path / "plain", **settings, cache="none")
    first = bundle("train", output=tmp_path / "first", **settings, cache="disk")
    files = {p.name: p.stat().st_mtime_ns for p in (first / "cache").iterdir()}
    again = bundle("train", output=tmp_path / "first", **settings, cache="disk")
    assert {p.name: p.stat().st_mtime_ns for p in (first / "cache").iterdir()} == files
    assert len(files) == 4  # cases to train and to validate on

    def scores(folder):
        rows = [row.split(",") for row in (folder / "history.csv").read_text().splitlines()]
        wanted = [i for i, name in enumerate(rows[0]) if "second" not in name]
        return [[row[i] for i in wanted] for row in rows]

    assert scores(plain) == scores(first) == scores(again)


def test_overlays_without_cache_stay_without(pictures):
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / "train.json"), str(CONFIGS / "datasets" / "brats2021.json")])
    parser.update({**TINY, **PICTURE_SETTINGS, "bundle_root": str(ROOT / "bundle"), "dataset_dir": str(pictures)})
    assert parser.get_parsed_content("train#dataset").cache_num == 0
