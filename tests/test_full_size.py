"""What needs a GPU runs at toy size without one."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import run
from PIL import Image

from benchmarks import full_size, gpu, lidc_full
from medsegdiff_monai.configs import read_config
from medsegdiff_monai.data.report import check

from .conftest import ROOT, write_json

SMALL = {"channels": [16, 32], "num_res_blocks": 1, "num_classes": 1}


def test_speed_is_measured_on_any_device(tmp_path, monkeypatch):
    flat = gpu.Field("generic_2d", {**SMALL, "roi_size": [16, 16], "in_channels": 1}, 2)
    deep = gpu.Field("hippocampus", {**SMALL, "roi_size": [16, 16, 16], "regions": None}, 1)
    monkeypatch.setattr(gpu, "FIELDS", {"flat": flat, "deep": deep})
    monkeypatch.setattr("benchmarks.peers.MONAI_STEPS", 2)
    words = ["gpu", "--device", "cpu", "--rounds", "1", "--modes", "float32", "bfloat16"]
    words += ["--results", str(tmp_path / "gpu.jsonl"), "--output", str(tmp_path / "gpu.md")]
    monkeypatch.setattr(sys, "argv", words)
    gpu.main()
    text = (tmp_path / "gpu.md").read_text("utf-8")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and " --- " not in line]
    rows = [row for row in rows if row[0] != "| method"]
    assert [row[0] for row in rows] == [f"| {name}" for name in gpu.BUILD] * 4
    assert all(float(row[3]) > 0 and float(row[4]) > 0 for row in rows)
    assert [row[2] for row in rows[:4]] == ["5", "1", "1", "2"] and "no GPU" in text


def test_without_a_gpu_it_says_so(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit, match="no CUDA device: give --device cpu"):
        gpu.main()


def test_the_plan_is_that_of_nnunet():
    """Six levels at 128 × 128, seven at 256 × 256, five at 96 × 96 × 96, as its planner has them."""
    plans = ([32, 64, 128, 256, 512, 512], [32, 64, 128, 256, 512, 512, 512], [32, 64, 128, 256, 320])
    for field, widths in zip(gpu.FIELDS.values(), plans):
        net = gpu.planned_unet(gpu.configured(field, "float32", torch.device("cpu"))).module
        assert list(net.filters) == widths


def commands(text: str) -> list[dict[str, str]]:
    """The options of each bundle command of a page, and what it runs under ``run_id``."""
    found = []
    for line in text.replace("\\\n", "").splitlines():
        if line.startswith("python -m monai.bundle run "):
            words = shlex.split(line)[4:]
            options = zip(words[1::2], words[2::2])
            found.append({"run_id": words[0], **{name.removeprefix("--"): value for name, value in options}})
    return found


PAGE = full_size.PAGE.read_text("utf-8")
TOY = {"channels": [8, 8], "num_res_blocks": 1, "attention_levels": None, "roi_size": [16, 16], "num_classes": 1}
TOY |= {"in_channels": 1, "regions": None, "max_epochs": 1, "val_interval": 1, "batch_size": 2, "num_members": 2}


@pytest.mark.slow
def test_the_recipe_is_what_the_program_writes():
    assert full_size.page() == PAGE, "write it anew by python -m benchmarks.full_size"


def test_estimates_of_the_recipe_are_those_of_its_configs():
    """Of the smallest, whose step takes the least time that is assumed."""
    recipe = full_size.RECIPES[-1]
    found = full_size.estimate(recipe, "")
    assert f"| {recipe.title} |  | {found.parameters:.1f} | {found.gmac:.0f} | 8 | {found.epochs} |" in PAGE
    assert found.hours == pytest.approx(full_size.LEAST * recipe.images * found.epochs / 8 / 3600)
    assert found.epochs * recipe.images == pytest.approx(full_size.SHOWN, rel=0.01)
    assert "estimates" in PAGE and "None of these trainings has been run" in PAGE


def test_every_command_of_the_recipe_passes_the_check_of_configs():
    rows = commands(PAGE)
    assert [row["run_id"] for row in rows] == ["training", "evaluating"] * (len(rows) // 2) and len(rows) == 14
    for row in rows:
        files = [str(ROOT / file) for file in json.loads(row["config_file"].replace("'", '"'))]
        read_config(
            files, bundle_root=str(ROOT / "bundle"), **{k: v for k, v in row.items() if k not in _NOT_VARIABLES}
        )


_NOT_VARIABLES = ("run_id", "config_file")


@pytest.mark.parametrize("title", [recipe.title.split()[0] for recipe in full_size.RECIPES])
def test_recipes_run_at_toy_size(title, tmp_path, monkeypatch):
    """Training and evaluation of the first variant, as they are printed, but for sizes."""
    (data := tmp_path / "DATA").mkdir()
    random = np.random.default_rng(0)
    items = []
    for i in range(6):
        label = np.zeros((24, 24), np.uint8)
        label[8:14, 6 + i : 14 + i] = 1
        Image.fromarray((150 * label + random.integers(0, 50, label.shape)).astype(np.uint8)).save(data / f"{i}.png")
        Image.fromarray(label).save(data / f"{i}_label.png")
        items.append({"image": f"{i}.png", "label": f"{i}_label.png"})
    write_json(data, training=items[:4], validation=items[4:5], test=items[5:])
    section = next(part for part in PAGE.split("\n## ")[1:] if part.startswith(title))
    monkeypatch.chdir(tmp_path)
    for row in commands(section)[:2]:
        files = [str(ROOT / file) for file in json.loads(row.pop("config_file").replace("'", '"'))]
        more = {**row, **TOY, "bundle_root": str(ROOT / "bundle"), "device": "cpu"}
        run(config_file=files, **more)
    (scores,) = tmp_path.glob("OUT/*/test/cases.csv")
    assert len(scores.read_text().splitlines()) == 2


def make_slices(root: Path) -> Path:
    """Eleven patients with two slices each, of which the second has no mask for the first patient."""
    for patient in range(11):
        nodule = root / f"LIDC-IDRI-{patient:04}" / "nodule-0"
        for number in range(2):
            for i, folder in enumerate(("mask-0", "mask-1", "mask-2", "mask-3", "images")):
                (nodule / folder).mkdir(parents=True, exist_ok=True)
                picture = (
                    np.full((20, 20), 40 + patient, np.uint8) if folder == "images" else np.zeros((20, 20), np.uint8)
                )
                if folder != "images" and i <= patient % 4 and not (patient == 0 and number == 1):
                    picture[5:9, 5 : 9 + i] = 255
                Image.fromarray(picture).save(nodule / folder / f"slice-{number}.png")
    return root


def test_all_slices_of_lidc_become_a_data_set(tmp_path, monkeypatch, capsys):
    source, output = make_slices(tmp_path / "raw"), tmp_path / "data"
    monkeypatch.setattr(sys, "argv", ["lidc_full", "--source", str(source), "--output", str(output)])
    lidc_full.main()
    lists = json.loads((output / "dataset.json").read_text())
    assert re.search(r"\d slices of \d patients; 1 that nobody marked left out", capsys.readouterr().out)
    groups = [{item["patient"] for item in lists[split]} for split in lidc_full.SPLITS]
    assert [len(group) for group in groups] == [7, 2, 2] and len(set.union(*groups)) == 11
    items = [item for split in lidc_full.SPLITS for item in lists[split]]
    assert len(items) == 21
    for item in items:
        masks = [np.array(Image.open(output / file)) for file in item["labels"]]
        assert [int(mask.max()) for mask in masks] == [1] * item["num_raters"] + [0] * (4 - item["num_raters"])
        number = int(item["patient"][-4:])
        assert (
            item["num_raters"] == number % 4 + 1 and np.array(Image.open(output / item["image"])).max() == 40 + number
        )
    check(str(output))
    assert " 0 errors" in capsys.readouterr().out
    first = {split: lists[split] for split in lidc_full.SPLITS}
    lidc_full.main()
    assert {s: json.loads((output / "dataset.json").read_text())[s] for s in lidc_full.SPLITS} == first


def test_slices_that_are_not_there_are_named(tmp_path):
    with pytest.raises(SystemExit, match="give the folder LIDC-IDRI-slices"):
        lidc_full.find(tmp_path)
    (make_slices(tmp_path) / "LIDC-IDRI-0003" / "nodule-0" / "mask-2" / "slice-1.png").unlink()
    with pytest.raises(SystemExit, match=r"LIDC-IDRI-0003/nodule-0/mask-2/slice-1\.png: is missing"):
        lidc_full.find(tmp_path)
