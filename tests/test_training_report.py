"""What one sees of a training: reports, pictures, warnings, trackers."""

from __future__ import annotations

import json
import re
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from matplotlib.figure import Figure
from PIL import Image

from medsegdiff_monai.handlers import (
    ClassMetrics,
    CollapseWarning,
    SaturationWarning,
    TensorBoardLog,
    TrainingHistory,
    TrainingReport,
)
from medsegdiff_monai.handlers.history import plot_curves, read_history
from medsegdiff_monai.variables import VARIABLES

from .conftest import PICTURE_SETTINGS, VOLUME_SETTINGS, make_png_dataset
from .test_bad_input import message


def test_a_training_shows_how_it_goes_and_stops_early(bundle, tmp_path, capsys):
    """Weights that do not learn have their best validation first; patience ends that through the real config."""
    data = tmp_path / "data"
    data.mkdir()
    make_png_dataset(data, cases=11)
    settings = {
        **PICTURE_SETTINGS, "dataset_dir": data, "optimizer#lr": 0.0, "max_epochs": 9, "patience": 2,
        "validate#handlers#4#number": 2, "train#handlers#2#_disabled_": True,  # WarmStart, after which patience begins
    }  # fmt: skip
    out = bundle("train", **settings)
    assert "Stopped early: no better validation since epoch 1 (patience=2)" in capsys.readouterr().out

    rows = read_history(out)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert all(0 <= row["val_dice_class_1"] <= 1 and 0 < row["seconds_waiting"] < row["seconds"] for row in rows)
    report = (out / "training_report.md").read_text()
    assert "3 of 9, stopped early" in report and "at epoch 1;" in report
    assert f"| val_dice_class_1 | {rows[0]['val_dice_class_1']:.4f} | {rows[2]['val_dice_class_1']:.4f} |" in report
    assert (
        "Waiting for data:" in report and "| learning_rate | 0.001 |" in report and "| training cases | 8 |" in report
    )
    assert Image.open(out / "training_report.png").size[0] > 500

    pictures = {path.parent.name: [] for path in (out / "validation").rglob("*.png")}
    for path in (out / "validation").rglob("*.png"):
        pictures[path.parent.name].append(path.name)
        assert np.asarray(Image.open(path)).std() > 0
    assert set(pictures) == {"epoch_001", "epoch_002", "epoch_003"}
    assert len({tuple(sorted(names)) for names in pictures.values()}) == 1  # the same cases each time
    assert len(pictures["epoch_001"]) == 2

    with pytest.raises(RuntimeError) as error:
        bundle("train", **settings, resume="true")
    assert "stopped early at epoch 3" in message(error.value)
    bundle("train", **{**settings, "max_epochs": 1})  # anew: nothing of the longer run stays
    assert [path.name for path in (out / "validation").iterdir()] == ["epoch_001"]
    assert "1 of 1, finished" in (out / "training_report.md").read_text()


def test_the_report_records_every_variable_that_is_declared(bundle, pictures):
    noise = [{"_target_": "RandGaussianNoised", "keys": "image"}]
    settings = {**PICTURE_SETTINGS, "dataset_dir": pictures, "augmentation": noise, "regions": {"a|b": [1]}}
    report = (bundle("train", **settings, use_ff_parser="FALSE") / "training_report.md").read_text()
    lines = report.split("| setting | value |")[1].splitlines()[2:]
    found = dict(re.fullmatch(r"\| (.+?) \| (.*) \|", line).groups() for line in lines if line)
    facts = ["training cases", "validation cases", "field of the network"]
    assert list(found) == facts + [v.name for v in VARIABLES.values() if "train" in v.configs]
    assert found["dataset_dir"] == str(pictures) and found["device"] == "cpu" and found["objective"] == "ensemble"
    assert json.loads(found["augmentation"]) == noise and found["regions"] == '{"a\\|b": [1]}'
    assert (found["use_ff_parser"], found["spacing"], found["channels"]) == ("false", "null", "[8, 8]")


def test_the_curves_tell_losses_of_single_masks_from_those_of_sets(bundle, pictures, capsys):
    """Through the real config, whose validations record the classes: the first half of the epochs has single masks."""
    settings = {**PICTURE_SETTINGS, "dataset_dir": pictures, "regions": {"disc": [1]}, "val_interval": 1}
    out = bundle("train", **settings, train_num_members=3, max_epochs=4)
    rows = read_history(out)
    assert [row["masks_per_image"] for row in rows] == [1, 1, 3, 3]
    assert capsys.readouterr().out.count("From epoch 3 on, the loss scores 3 masks of each image together") == 1
    left, right = Figure().subplots(1, 2)
    plot_curves(left, right, rows)
    assert [line.get_label() for line in left.lines] == ["1 mask per image", "3 masks per image"]


def test_volumes_have_pictures_too(bundle, volumes):
    out = bundle("train", dataset_dir=volumes, **VOLUME_SETTINGS)
    assert (out / "validation" / "epoch_001" / "image_3.png").is_file()


def small_run(folder, epochs, wait=0.0, raises_in=None):
    """A trainer of two iterations an epoch and a validator whose score rises, with history and report."""

    def batches():
        while True:
            time.sleep(wait)
            yield 0

    validator = Engine(lambda e, b: None)
    validator.state.key_metric_name = "val_mean_dice"

    def step(engine, batch):
        if engine.state.epoch == raises_in:
            raise KeyboardInterrupt
        time.sleep(0.01)
        return [{"loss": torch.tensor(1.0)}]

    trainer = Engine(step)

    @trainer.on(Events.EPOCH_COMPLETED)
    def validate(engine):
        state = validator.state
        state.epoch = state.best_metric_epoch = engine.state.epoch
        state.metrics, state.times = {"val_mean_dice": engine.state.epoch / 10}, {"COMPLETED": 0.5}

    TrainingHistory(str(folder), validator).attach(trainer)
    TrainingReport(str(folder), validator, {"seed": 0}).attach(trainer)
    trainer.run(batches(), max_epochs=epochs, epoch_length=2)


def test_time_spent_waiting_for_data_is_measured(tmp_path):
    small_run(tmp_path, epochs=2, wait=0.04)
    for row in read_history(tmp_path):
        assert 0.08 <= row["seconds_waiting"] <= row["seconds"] - 0.02
        assert row["seconds_validating"] == 0.5
    share = float((tmp_path / "training_report.md").read_text().split("Waiting for data: ")[1].split("%")[0])
    assert 50 < share < 100


def test_an_interrupted_training_has_a_report(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        small_run(tmp_path, epochs=5, raises_in=3)
    report = (tmp_path / "training_report.md").read_text()
    assert "2 of 5, training continues" in report and "val_mean_dice 0.2000 at epoch 2" in report


def validation(masks, labels):
    """An evaluator over cases of masks (classes, 4, 4)."""
    engine = Engine(lambda e, batch: [{"mask": batch[0], "label": batch[1]}])
    SaturationWarning(2, {"disc": [1, 2], "cup": [2]}).attach(engine)
    engine.run(list(zip(masks, labels)))


EMPTY, FULL = torch.zeros(2, 4, 4), torch.ones(2, 4, 4)
HALF = torch.cat([torch.zeros(2, 2, 4), torch.ones(2, 2, 4)], 1)
CUP_ONLY = torch.stack([EMPTY[0], HALF[0]])


@pytest.mark.parametrize(
    "masks, labels, words",
    [
        ([EMPTY, EMPTY], [HALF, HALF], ["every validation mask of disc, cup is all background", "--learning_rate"]),
        ([FULL, FULL], [HALF, EMPTY], ["every validation mask of disc, cup is all foreground", "intensity_range"]),
        ([CUP_ONLY, CUP_ONLY], [HALF, HALF], ["every validation mask of disc is all background", "Epoch 1"]),
        ([EMPTY, HALF], [HALF, HALF], []),
        ([EMPTY, EMPTY], [EMPTY, EMPTY], []),
        ([FULL, FULL], [FULL, FULL], []),
    ],
)
def test_saturated_masks_are_named_in_words(masks, labels, words, caplog):
    validation(masks, labels)
    if not words:
        assert caplog.text == ""
    for word in words:
        assert word in caplog.text


@pytest.mark.parametrize(
    "scores, warned",
    [
        ([0.6, 0.66, 0.3], ["Epoch 3", "fell from 0.660 in epoch 2 to 0.300", "--learning_rate"]),
        ([0.6, 0.2, 0.6], ["Epoch 2"]),
        ([0.6, 0.31, 0.61], []),
        ([0.19, 0.01, 0.15], []),  # it has not learned anything yet
        ([0.6, float("nan")], []),
        ([None, None], []),  # validated by another metric
    ],
)
def test_a_training_that_collapses_says_so(scores, warned, caplog):
    engine, collapse = Engine(lambda e, b: None), CollapseWarning()
    for epoch, score in enumerate(scores, 1):
        engine.state.epoch = epoch
        engine.state.metrics = {} if score is None else {"val_mean_dice": score}
        collapse(engine)
    assert len(caplog.records) == bool(warned)
    assert all(word in caplog.text for word in warned)


@pytest.mark.parametrize("distances, warns", [([0.6, 0.4], False), ([0.4, 0.6], True)])
def test_a_mask_that_is_worse_while_members_come_closer_to_raters_is_no_collapse(distances, warns, caplog):
    engine, collapse = Engine(lambda e, b: None), CollapseWarning()
    for epoch, (score, distance) in enumerate(zip([0.6, 0.1], distances), 1):
        engine.state.epoch, engine.state.metrics = epoch, {"val_mean_dice": score, "val_ged": distance}
        collapse(engine)
    assert bool(caplog.records) == warns


@pytest.mark.parametrize("value, names", [(torch.tensor([0.25, 0.5]), {"disc": 0.25, "cup": 0.5}), (0.75, {"a": 0.75})])
def test_classes_have_metrics_of_their_own(value, names):
    engine = Engine(lambda e, b: None)
    engine.state.metrics = {"val_dice_per_class": value}
    ClassMetrics("val_dice_per_class", len(names), {name: [i + 1] for i, name in enumerate(names)})(engine)
    assert engine.state.metrics == {f"val_dice_{name}": value for name, value in names.items()}


def test_without_tensorboard_one_line_says_so(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr("medsegdiff_monai.handlers.tracking.optional_import", lambda *_, **__: (None, False))
    trainer = Engine(lambda e, b: None)
    TensorBoardLog(str(tmp_path), SimpleNamespace()).attach(trainer)
    with caplog.at_level("INFO"):
        trainer.run([0])
    lines = [r.getMessage() for r in caplog.records if r.name == "medsegdiff_monai.handlers.tracking"]
    assert len(lines) == 1 and "TensorBoard" in lines[0] and "tracking" in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_shows_loss_and_metrics(bundle, pictures):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = bundle("train", dataset_dir=pictures, **PICTURE_SETTINGS)
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert {"train_loss", "val_mean_dice", "val_dice_class_1"} <= set(events.Tags()["scalars"])
    (score,) = events.Scalars("val_mean_dice")
    assert score.value == pytest.approx(read_history(out)[0]["val_mean_dice"])


def test_mlflow_through_tracking(bundle, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    data = make_png_dataset(tmp_path, classes=2)
    settings = {**PICTURE_SETTINGS, "num_classes": 2, "dataset_dir": data}
    out = bundle("train", tracking="mlflow", **settings)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{out / 'mlruns.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "monai_experiment"]
    logged = {}
    for run in client.search_runs([experiment.experiment_id]):
        logged |= run.data.metrics
    assert {"train_loss", "val_mean_dice", "val_dice_class_1", "val_dice_class_2"} <= set(logged)
