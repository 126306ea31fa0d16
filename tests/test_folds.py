"""Folds of a cross-validation: which cases they hold, in training and evaluation alike, and all of them together."""

from __future__ import annotations

import csv
import json
import random
import statistics
import sys
from pathlib import Path

import pytest

import medsegdiff_monai.__main__ as commands
from medsegdiff_monai.configs import read_config
from medsegdiff_monai.data import DataSpec, TrainingSplits, evaluation_items, inference_items, training_splits
from medsegdiff_monai.errors import InputError
from medsegdiff_monai.journal import CaseJournal
from medsegdiff_monai.report.folds import summarize_folds
from medsegdiff_monai.report.page import write_report
from medsegdiff_monai.workflow import _keep, trained_files

from .conftest import CONFIGS, PICTURE_SETTINGS, ROOT, make_png_dataset, write_json

RGB = DataSpec(spatial_dims=2, in_channels=3, num_classes=1)
K = 3


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    """Ten pictures of five patients in two lists, two of no patient, and a test case."""
    folder = make_png_dataset(tmp_path_factory.mktemp("cohort"), cases=13)
    content = json.loads((folder / "dataset.json").read_text())
    for item in content["training"][10:]:
        del item["patient"]
    content["validation"] = content["training"][3:5]
    content["training"] = content["training"][:3] + content["training"][5:]
    return write_json(folder, **content)


def held_out(folder: Path, fold: int, seed: int = 0, num_folds: int = K) -> set[str]:
    return {i["case"] for i in training_splits(str(folder), RGB, seed, num_folds, fold)["validation"]}


def test_folds_are_disjoint_and_have_each_case_once(cohort):
    folds = [held_out(cohort, fold) for fold in range(K)]
    assert sorted(case for fold in folds for case in fold) == sorted(f"image_{i}" for i in range(12))
    for fold, held in enumerate(folds):
        training = {i["case"] for i in TrainingSplits(str(cohort), RGB, 0, K, fold)["training"]}
        assert not training & held and len(training | held) == 12


def test_a_patient_is_in_one_fold_whichever_list_it_was_in(cohort):
    owners = {f"image_{i}": i // 2 if i < 10 else i for i in range(12)}
    for seed in range(5):
        patients = [{owners[case] for case in held_out(cohort, fold, seed)} for fold in range(K)]
        assert sum(map(len, patients)) == 7 and max(map(len, patients)) - min(map(len, patients)) <= 1


def test_folds_depend_on_the_seed_and_not_on_order_or_place(cohort, tmp_path):
    for file in cohort.iterdir():
        (tmp_path / file.name).symlink_to(file)
    content = json.loads((cohort / "dataset.json").read_text())
    for items in content.values():
        random.Random(1).shuffle(items)
    (tmp_path / "dataset.json").unlink()
    write_json(tmp_path, **content)
    for fold in range(K):
        assert held_out(tmp_path, fold) == held_out(cohort, fold)
    assert any(held_out(cohort, fold, seed=1) != held_out(cohort, fold) for fold in range(K))


def test_evaluation_and_inference_take_the_fold_that_the_training_holds_out(cohort, tmp_path):
    for fold in range(K):
        found = evaluation_items(str(cohort), RGB, None, 0, K, fold)
        assert {item["case"] for item in found} == held_out(cohort, fold) and found.split == "validation"
        rest = evaluation_items(str(cohort), RGB, "training", 0, K, fold)
        assert {item["case"] for item in rest} == {f"image_{i}" for i in range(12)} - held_out(cohort, fold)
        assert [item["case"] for item in evaluation_items(str(cohort), RGB, "test", 0, K, fold)] == ["image_12"]
        where = str(cohort), RGB, str(tmp_path), "none.pt"
        assert [item["case"] for item in inference_items(*where, num_folds=K, fold=fold)] == ["image_12"]
        segmented = inference_items(*where, infer_split="validation", num_folds=K, fold=fold)
        assert {item["case"] for item in segmented} == held_out(cohort, fold)


def test_more_folds_than_patients_are_refused_where_they_are_needed(cohort):
    assert all(len(held_out(cohort, fold, num_folds=7)) in (1, 2) for fold in range(7))
    with pytest.raises(InputError, match=r"dataset\.json: num_folds=8, but .* list 7 patients"):
        training_splits(str(cohort), RGB, 0, 8, 0)
    assert len(evaluation_items(str(cohort), RGB, "test", 0, 8, 0)) == 1


WRONG = {
    "fold=3 must be from 0 to 2, as num_folds=3 says": {"num_folds": 3, "fold": 3},
    "fold=None must be from 0 to 2, as num_folds=3 says": {"num_folds": 3},
    "fold=0 needs num_folds": {"fold": 0},
    "num_folds=1 must be null, or a whole number from 2": {"num_folds": 1, "fold": 0},
    "fold=-1 must be null, or a whole number from 0": {"num_folds": 3, "fold": -1},
}


@pytest.mark.parametrize("config", ["train", "evaluate", "inference"])
@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_one_line(message, config):
    with pytest.raises(InputError, match=message) as error:
        read_config(CONFIGS / f"{config}.json", bundle_root=str(ROOT / "bundle"), **WRONG[message])
    assert "\n" not in str(error.value)


# --- trainings whose weights are taken together


def training(folder: Path, **overlay: object) -> Path:
    (folder / "models").mkdir(parents=True)
    (folder / "models" / "model.pt").touch()
    (folder / "overlay.json").write_text(json.dumps({"channels": [8, 8], **overlay}))
    return folder


def test_a_training_leaves_what_decides_which_cases_it_held_out(tmp_path):
    overlay = tmp_path / "overlay.json"
    overlay.write_text('{"learning_rate": 0.002}')
    _keep(overlay, {"seed": "3", "num_folds": "5", "fold": "0", "device": "cpu", "max_epochs": "2"})
    assert json.loads(overlay.read_text()) == {"learning_rate": 0.002, "seed": 3, "num_folds": 5, "fold": 0}
    _keep(overlay, {"learning_rate": "0.0003"})  # what was chosen for the data is not what it was trained with
    assert json.loads(overlay.read_text())["learning_rate"] == 0.0003


def test_trainings_of_other_folds_share_their_settings_and_no_fold(tmp_path):
    a, b = (training(tmp_path / str(i), num_folds=3, fold=i) for i in range(2))
    assert trained_files([a]).variables == {"checkpoint": str(a / "models" / "model.pt")}
    both = trained_files([a, b])
    assert both.overlay == str(a / "overlay.json") and both.variables == {
        "checkpoint": [str(a / "models" / "model.pt"), str(b / "models" / "model.pt")], "num_folds": None, "fold": None
    }  # fmt: skip
    with pytest.raises(InputError, match=r"differs from .*overlay\.json in channels: give trainings"):
        trained_files([a, training(tmp_path / "c", channels=[8, 16])])
    faster = training(tmp_path / "d", num_folds=3, fold=2, learning_rate=0.1, batch_size=2, num_members=16)
    assert trained_files([a, faster]).overlay == str(a / "overlay.json")  # which matters to no weights


def test_cases_that_one_of_the_trainings_has_seen_are_not_scored(cohort, tmp_path, monkeypatch):
    folds = [training(tmp_path / str(i), num_folds=3, fold=i) for i in range(2)]
    seeds = [training(tmp_path / "s0"), training(tmp_path / "s1", seed=1)]
    assert trained_files(folds).has_seen(str(cohort)) and not trained_files([folds[0]]).has_seen(str(cohort))
    assert not trained_files(seeds).has_seen(str(cohort))  # it lists cases to validate on
    assert trained_files(seeds).has_seen(str(write_json(tmp_path, training=[], test=["a.png"])))
    words = ["evaluate", cohort, "--trained", folds[0], "--trained", folds[1], "--output_dir", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["medsegdiff", *map(str, words)])
    with pytest.raises(InputError, match=r"differ in fold, so that each has seen cases .* set --eval_split test"):
        commands.main()
    assert not (tmp_path / "out").exists()


# --- the summary


def evaluated(folder: Path, dice: dict[str, float], name: str = "disc", source: str = "") -> Path:
    """What an evaluation leaves of cases with these Dice."""
    journal = CaseJournal(folder)
    journal.open(False)
    for case, value in dice.items():
        row = {"case": case, "source": f"/data/{source or folder.name}/{case}.png", "flag": ""}
        row |= {f"expected_dice_{name}": value, f"dice_{name}": value, f"iou_{name}": value / 2}
        found = {"class": name, "structure": 1, "kind": "in the mask", "size": 3.0, "unit": "px", "voxels": 3}
        found |= {"centre_voxel": "1 1", "centre_mm": "", "mean_probability": 0.9, "share_of_members": 1.0}
        journal.add(case, row, [], structures=[found])
    write_report([], folder, [name])
    return folder


def read(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as text:
        return list(csv.DictReader(text))


def test_a_summary_has_all_cases_and_the_spread_over_folds(tmp_path, capsys):
    dice = [{"a": 0.5, "b": 0.7}, {"c": 0.9}, {"a": 0.3, "d": 0.9, "e": 0.9}]
    folds = [evaluated(tmp_path / f"fold_{i}", some) for i, some in enumerate(dice)]
    report = summarize_folds(folds, tmp_path / "all")
    rows = read(tmp_path / "all" / "cases.csv")
    assert [(row["case"], row["fold"]) for row in rows] == [
        ("fold0_a", "fold_0"), ("b", "fold_0"), ("c", "fold_1"), ("fold2_a", "fold_2"), ("d", "fold_2"), ("e", "fold_2")
    ]  # fmt: skip
    assert {row["case"] for row in read(tmp_path / "all" / "structures.csv")} == {row["case"] for row in rows}
    table = {line["fold"]: line for line in read(tmp_path / "all" / "folds.csv")}
    means = [0.6, 0.9, 0.7]
    assert [float(table[f"fold_{i}"]["mean_dice_disc"]) for i in range(3)] == pytest.approx(means)
    assert float(table["mean"]["mean_dice_disc"]) == pytest.approx(statistics.mean(means), abs=1e-6)
    assert float(table["standard deviation"]["mean_dice_disc"]) == pytest.approx(statistics.stdev(means), abs=1e-6)
    said = capsys.readouterr().out
    assert "0.733" in said and "0.153" in said and "Worst: fold2_a (Dice 0.300)" in said and str(report) in said
    page = report.read_text()
    assert "Cross-validation of 3 folds" in page and "their standard deviation" in page and "0.153" in page


def test_pictures_of_the_summary_are_those_of_the_folds(tmp_path):
    from PIL import Image

    folds = [evaluated(tmp_path / f"fold {i}", {f"c{i}": 0.5}) for i in range(2)]
    for i, fold in enumerate(folds):
        (fold / f"c{i}").mkdir()
        Image.new("RGB", (9, 9)).save(fold / f"c{i}" / f"c{i}_overlay.png")
    page = summarize_folds(folds, tmp_path / "all").read_text()
    assert page.count("data:image/jpeg;base64") == 2 and 'href="../fold%200/c0/c0_overlay.png"' in page


def refused(folders: list[Path], output: Path) -> str:
    with pytest.raises(InputError) as error:
        summarize_folds(folders, output)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_folders_that_do_not_go_together_are_refused_before_anything_is_written(tmp_path):
    a, b = (evaluated(tmp_path / name, {"x": 0.5}) for name in "ab")
    out = tmp_path / "out"
    assert "at least two folds, each once" in refused([a], out) and "each once" in refused([a, a], out)
    same = evaluated(tmp_path / "same", {"x": 0.7}, source="a")
    assert "has the case /data/a/x.png, as" in refused([a, same], out)
    other = evaluated(tmp_path / "other", {"y": 0.7}, name="cup")
    assert "has the classes cup, but" in refused([a, other], out)
    assert "holds no finished evaluation" in refused([a, tmp_path / "none"], out)
    (b / "report.html").unlink()
    assert "holds no finished evaluation" in refused([a, b], out)
    unscored = tmp_path / "unscored"
    journal = CaseJournal(unscored)
    journal.open(False)
    journal.add("x", {"case": "x"}, [])
    write_report([], unscored, [])
    assert "were not scored" in refused([a, unscored], out)
    assert "choose another folder" in refused([a, same], a)
    assert not out.exists()


@pytest.mark.slow
def test_folds_from_training_to_summary(cohort, tmp_path, bundle):
    settings = {**PICTURE_SETTINGS, "dataset_dir": cohort, "num_folds": 2, "outputs": ["seg", "overlay"]}
    for fold in range(2):
        bundle("train", tmp_path / f"train_{fold}", fold=fold, ckpt_dir=tmp_path / f"models_{fold}", **settings)
        weights = tmp_path / f"models_{fold}" / "model.pt"
        bundle("evaluate", tmp_path / f"fold_{fold}", fold=fold, checkpoint=weights, **settings)
    summarize_folds([tmp_path / "fold_0", tmp_path / "fold_1"], tmp_path / "all")
    assert {row["case"] for row in read(tmp_path / "all" / "cases.csv")} == {f"image_{i}" for i in range(12)}
