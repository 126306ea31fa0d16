"""Lung nodules with the outlines of four radiologists: the slices that come along, their overlay, and the demo."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import run
from PIL import Image

import medsegdiff_monai.__main__ as commands
from benchmarks import example_data
from medsegdiff_monai import demo
from medsegdiff_monai.configs import read_config
from medsegdiff_monai.data.report import check
from medsegdiff_monai.errors import InputError
from medsegdiff_monai.weights import save_checkpoint

from .conftest import CONFIGS, ROOT, write_json

EXAMPLES = ROOT / "examples" / "lidc"
SMALL = {"channels": [8, 8], "roi_size": [32, 32], "num_res_blocks": 1}


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A working directory with the bundle, in which the overlay is of a tiny network with random weights."""
    shutil.copytree(CONFIGS, tmp_path / "bundle" / "configs")
    file = tmp_path / "bundle" / "configs" / "datasets" / "lidc.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **SMALL, "max_epochs": 1, "val_interval": 1}))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network = read_config(["bundle/configs/inference.json", str(file)]).get_parsed_content("network_def")
    save_checkpoint("bundle/models/lidc.pt", network.state_dict())
    return tmp_path


def files(name: str) -> list[str]:
    return [f"bundle/configs/{name}.json", "bundle/configs/datasets/lidc.json"]


def call(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["medsegdiff", *words])
    commands.main()


def test_examples_are_a_dozen_slices_of_as_many_patients_with_all_outlines(capsys):
    items = json.loads((EXAMPLES / "dataset.json").read_text("utf-8"))["test"]
    assert len({item["patient"] for item in items}) == len(items) == 12
    marked = [sum(np.array(Image.open(EXAMPLES / file)).any() for file in item["labels"]) for item in items]
    assert marked == [item["num_raters"] for item in items] == [1, 2, 3, 4] * 3
    listed = {(EXAMPLES / file).resolve() for item in items for file in (item["image"], *item["labels"])}
    assert listed == {path.resolve() for path in EXAMPLES.rglob("*.png")}
    check(str(EXAMPLES))
    assert "0 errors, 0 warnings" in capsys.readouterr().out


def test_settings_for_several_raters_are_those_of_the_overlay_that_was_tried(tmp_path, pictures):
    """One rater needs no more than five members; the learning rate is that of the benchmarks."""
    found = {}
    for name, folder in (("raters", EXAMPLES), ("one", pictures)):
        check(str(folder), str(tmp_path / f"{name}.json"))
        found[name] = json.loads((tmp_path / f"{name}.json").read_text("utf-8"))
    tried = json.loads((ROOT / "bundle" / "configs" / "datasets" / "lidc.json").read_text("utf-8"))
    keys = ("learning_rate", "num_members", "val_num_members")
    assert {key: found["raters"][key] for key in keys} == {key: tried[key] for key in keys}
    assert found["one"]["learning_rate"] == tried["learning_rate"] and "num_members" not in found["one"]


@pytest.mark.parametrize("file", [EXAMPLES / "ATTRIBUTION.md", ROOT / "bundle" / "docs" / "data_license.txt"])
def test_examples_are_attributed_as_their_licence_demands(file):
    """Who made them, what they are called, under what licence, and what was changed."""
    text = file.read_text("utf-8")
    wanted = ("Armato III", "LIDC-IDRI", "creativecommons.org/licenses/by/3.0", "10.7937/K9/TCIA.2015.LO9QL9SX")
    assert all(words in text for words in (*wanted, "128"))


def test_examples_are_drawn_by_the_number_of_radiologists_and_no_patient_twice():
    items = [{"image": f"{i}", "num_raters": 1 + i % 4, "patient": i // 8} for i in range(400)]
    chosen = example_data.choose(items)
    assert [item["num_raters"] for item in chosen] == [1, 2, 3, 4] * example_data.EACH
    assert max(Counter(item["patient"] for item in chosen).values()) == 1
    assert example_data.choose(items) == chosen != example_data.choose(items, seed=1)
    few = [item for item in items if item["patient"] < 2]
    assert [item["num_raters"] for item in example_data.choose(few)] == [1, 2]  # rather few than a patient twice


def test_examples_are_written_as_they_are_in_the_source(tmp_path):
    lists = json.loads((EXAMPLES / "dataset.json").read_text("utf-8"))
    shutil.copytree(EXAMPLES, data := tmp_path / "LIDC4")
    write_json(data, **lists)
    example_data.write(data, tmp_path / "out")
    assert sorted(json.loads((tmp_path / "out" / "dataset.json").read_text())["test"], key=str) == sorted(
        lists["test"], key=str
    )
    for file in EXAMPLES.rglob("*.png"):
        assert (tmp_path / "out" / file.relative_to(EXAMPLES)).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("name", ["evaluate", "inference"])
def test_the_overlay_names_its_weights_and_others_can_be_given(name):
    overlay = [CONFIGS / f"{name}.json", CONFIGS / "datasets" / "lidc.json"]
    for more, wanted in (({}, "here/models/lidc.pt"), ({"checkpoint": "other.pt"}, "other.pt")):
        parser = read_config(overlay, bundle_root="here", ckpt_dir="there", **more)
        assert parser.get_parsed_content("checkpoint") == wanted


def test_inference_with_the_overlay_needs_nothing_else(project):
    run("inference", config_file=files("inference"), dataset_dir=str(EXAMPLES), output_dir="out", device="cpu")
    assert len(list(Path("out").glob("*/*_seg.png"))) == 12


def test_training_with_the_overlay_leaves_its_weights_alone_and_says_so(project, capsys):
    before = Path("bundle/models/lidc.pt").read_bytes()
    items = json.loads((EXAMPLES / "dataset.json").read_text("utf-8"))["test"][1::4]
    (project / "data").mkdir()
    for folder in ("images", "raters"):
        shutil.copytree(EXAMPLES / folder, project / "data" / folder)
    write_json(project / "data", training=items[:2], validation=items[2:])
    run("training", config_file=files("train"), dataset_dir="data", output_dir="out", ckpt_dir="mine", device="cpu")
    said = capsys.readouterr().out
    assert Path("bundle/models/lidc.pt").read_bytes() == before and Path("mine/model.pt").is_file()
    assert [path.name for path in Path("bundle/models").iterdir()] == ["lidc.pt"]
    told = [line for line in said.splitlines() if "WARNING - checkpoint: the overlay names " in line]
    assert len(told) == 1 and told[0].endswith("add --checkpoint mine/model.pt.") and "models/lidc.pt" in told[0]


def test_demo_draws_what_radiologists_and_members_say(project, monkeypatch, capsys):
    monkeypatch.setattr(demo, "ROWS", 2)
    drawn = []
    draw = demo.draw_opinions
    monkeypatch.setattr(demo, "draw_opinions", lambda slices, file: (drawn.extend(slices), draw(slices, file)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        call(monkeypatch, "demo", "--lidc", "--output_dir", "out")
    assert "out/lidc.png" in capsys.readouterr().out and [p.name for p in Path("out").iterdir()] == ["lidc.png"]
    with Image.open("out/lidc.png") as picture:
        assert picture.width > 1000 and picture.height > 200
    assert [one.raters.any((1, 2)).sum() for one in drawn] == [1, 2]
    for one in drawn:
        assert one.image.shape == (128, 128) and one.raters.shape == (4, 128, 128)
        assert one.members.shape == (8, 128, 128) and one.uncertainty.shape == (128, 128)
        assert 0 <= one.uncertainty.min() <= one.uncertainty.max() <= 1
    with Image.open(EXAMPLES / "images" / "0409_n5_00.png") as first:  # rows of the picture are the second axis here
        np.testing.assert_array_equal(drawn[0].image.T, np.array(first))
    with Image.open(EXAMPLES / "raters" / "1" / "0409_n5_00.png") as first:
        np.testing.assert_array_equal(drawn[0].raters[0].T, np.array(first))


def test_demo_without_weights_or_slices_says_where_they_are(project, monkeypatch):
    for file, where in ((Path("bundle/models/lidc.pt"), "bundle/models/lidc.pt: the weights of the demo"), (None, "")):
        if file is None:
            monkeypatch.setattr(demo, "__file__", str(project / "elsewhere" / "demo.py"))
            where = "elsewhere/lidc: the slices of the demo"
        else:
            file.unlink()
        with pytest.raises(InputError) as error:
            call(monkeypatch, "demo", "--lidc")
        assert where in str(error.value) and "without --lidc" in str(error.value) and "\n" not in str(error.value)
    assert not Path("demo_output").exists()


def test_demo_tells_weights_that_are_no_weights(project, monkeypatch):
    Path("bundle/models/lidc.pt").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(InputError, match=r"models/lidc\.pt: is truncated or no checkpoint of weights: replace"):
        call(monkeypatch, "demo", "--lidc")
