"""What is written of a case, when it counts as finished, and its scores against several raters."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from PIL import Image

from medsegdiff_monai.data import DataSpec, inference_items
from medsegdiff_monai.errors import InputError, Interrupted
from medsegdiff_monai.handlers import EnergyDistance
from medsegdiff_monai.handlers.training_report import TrainingReport
from medsegdiff_monai.inferers import DRAWN_TOGETHER
from medsegdiff_monai.journal import CaseJournal, file_stamps
from medsegdiff_monai.metrics import expected_calibration_error, generalised_energy_distance, rater_scores
from medsegdiff_monai.outputs import OUTPUTS, check_outputs, output_files
from medsegdiff_monai.panels import draw_panels
from medsegdiff_monai.pictures import overlay_bytes
from medsegdiff_monai.results import CaseWriter
from medsegdiff_monai.transforms import FuseMembersd

from .conftest import CONFIGS, OBLIQUE, PICTURE_SETTINGS, ROOT, TINY, VOLUME_SETTINGS, make_nifti_dataset
from .test_bad_input import message
from .test_bundle_runs import read_table

SUFFIXES = {
    "seg": {"seg.nii.gz"},
    "prob": {"prob.nii.gz"},
    "uncertainty": {"uncertainty_entropy.nii.gz", "uncertainty_mi.nii.gz"},
    "members": {"members.nii.gz"},
    "overlay": {"overlay.png"},
}


def random_weights(folder: Path, **settings: Any) -> None:
    """Weights that were not trained, but give masks that differ: only files and agreement matter here."""
    parser = ConfigParser()
    parser.read_config(str(CONFIGS / "inference.json"))
    parser.update({"bundle_root": str(ROOT / "bundle"), **TINY, **settings})
    (folder / "models").mkdir()
    torch.manual_seed(0)
    network = parser.get_parsed_content("network_def")
    for parameter in network.parameters():
        if parameter.dim() > 1 and not parameter.any():  # where training starts from zero
            torch.nn.init.normal_(parameter, std=0.3)
    torch.save(network.state_dict(), folder / "models" / "model.pt")


@pytest.fixture
def infer(bundle, volumes, tmp_path):
    """Run inference on volumes, with random weights; returns the folder of the only case."""
    random_weights(tmp_path, **VOLUME_SETTINGS)

    def call(**variables: Any) -> Path:
        return bundle("inference", dataset_dir=volumes, **VOLUME_SETTINGS, **variables) / "image_4"

    return call


def names(folder: Path) -> set[str]:
    return {path.name.removeprefix("image_4_") for path in folder.iterdir()}


@pytest.mark.parametrize(
    "outputs, expected",
    [
        (None, ["seg", "prob", "uncertainty", "overlay"]),
        (["seg"], ["seg"]),
        ("seg", ["seg"]),
        ("seg,members", ["seg", "members"]),
        (("overlay", "seg"), ["seg", "overlay"]),  # as the command line gives names with a comma and no quotes
        (["members", "uncertainty", "seg", "prob"], ["members", "uncertainty", "seg", "prob"]),
    ],
)
def test_what_is_asked_for_is_written_and_nothing_else(outputs, expected, infer):
    folder = infer() if outputs is None else infer(outputs=outputs)
    assert names(folder) == set().union(*(SUFFIXES[name] for name in expected))


BAD = [[], ["prob"], ["seg", "mask"], "seg,,prob", "segmentation", 3, None, {"seg": True}]


@pytest.mark.parametrize("config", ["evaluate", "inference"])
def test_other_outputs_are_refused_before_any_work(config, bundle, volumes, tmp_path):
    for value in BAD[:3]:
        with pytest.raises(RuntimeError) as error:
            bundle(config, dataset_dir=volumes, outputs=value, **VOLUME_SETTINGS)
        assert f"outputs={value!r} must " in message(error.value)
    assert not (tmp_path / config).exists()


@pytest.mark.parametrize("value", BAD, ids=str)
def test_outputs_that_there_are_not(value):
    with pytest.raises(InputError, match=r"outputs=.* must be a list of .*; seg must be in it"):
        check_outputs(value)


@pytest.mark.parametrize("number", [1, 3])
def test_members_have_a_label_map_each_in_the_geometry_of_the_input(number, infer, volumes):
    folder = infer(outputs=["seg", "members"], num_members=number, fusion="vote")
    source, members = nib.load(volumes / "image_4.nii.gz"), nib.load(folder / "image_4_members.nii.gz")
    assert members.shape == (*source.shape, number) and members.get_data_dtype() == np.uint8
    np.testing.assert_allclose(members.affine, source.affine, atol=1e-5)
    maps = np.asarray(members.dataobj)
    assert all(set(np.unique(one)) == {0, 1, 2} for one in np.moveaxis(maps, -1, 0))
    if number == 1:  # the only opinion is the mask
        np.testing.assert_array_equal(maps[..., 0], nib.load(folder / "image_4_seg.nii.gz").get_fdata())
    else:  # and else what most of them say
        assert (maps != maps[..., :1]).any()
        majority = [(maps == value).sum(-1) > number / 2 for value in (1, 2)]
        expected = majority[0] + 2 * majority[1]
        np.testing.assert_array_equal(nib.load(folder / "image_4_seg.nii.gz").get_fdata(), expected)


def test_members_of_a_picture_are_along_the_fourth_axis_too(bundle, pictures, tmp_path):
    random_weights(tmp_path, **PICTURE_SETTINGS)
    out = bundle("inference", dataset_dir=pictures, outputs="seg,members", **PICTURE_SETTINGS)
    members = nib.load(out / "image_4" / "image_4_members.nii.gz")
    assert members.shape == (*Image.open(pictures / "image_4.png").size, 1, 2)
    assert (out / "image_4" / "image_4_seg.png").is_file()


def test_a_case_of_which_more_is_asked_for_is_not_finished(infer):
    folder = infer(outputs=["seg", "members"])
    first = (folder / "image_4_seg.nii.gz").stat().st_mtime_ns
    infer(outputs=["seg"])
    infer(outputs=["members", "seg"])
    assert (folder / "image_4_seg.nii.gz").stat().st_mtime_ns == first
    infer(outputs=["seg", "prob"])
    second = (folder / "image_4_seg.nii.gz").stat().st_mtime_ns
    assert second > first and (folder / "image_4_prob.nii.gz").is_file()


def test_finished_cases_are_made_with_these_weights_and_settings(tmp_path, capsys):
    image = make_nifti_dataset(tmp_path, (6, 6, 6), cases=1) / "image_0.nii.gz"
    out, checkpoint = tmp_path / "out", tmp_path / "model.pt"
    checkpoint.write_bytes(b"weights")

    def todo(**settings):
        files = {"images": [str(image)], "outputs": "seg"}
        return inference_items("", DataSpec(3, 1, 2), str(out), str(checkpoint), **files, settings=settings)

    cases = todo(num_members=5)
    assert len(cases) == 1 and capsys.readouterr().out == ""
    for file in output_files(out, "image_0", ["seg"]):
        file.parent.mkdir(parents=True)
        nib.save(nib.Nifti1Image(np.zeros((6, 6, 6), np.uint8), np.eye(4)), file)
    made_from = {"image": str(image), "stamps": file_stamps(str(image)), "settings": cases.settings}
    CaseJournal(out).add("image_0", {"case": "image_0"}, ["seg.nii.gz"], made_from)

    assert len(todo(num_members=5)) == 0 and "1 of 1 cases are finished" in capsys.readouterr().out
    os.utime(checkpoint, (1, 1))  # the same weights
    assert len(todo(num_members=5)) == 0
    capsys.readouterr()
    assert len(todo(num_members=9)) == 1
    assert (
        "1 of 1 cases are segmented again: their results are of other settings (num_members)."
        in capsys.readouterr().out
    )
    checkpoint.write_bytes(b"other weights")
    assert len(todo(num_members=5)) == 1 and "(checkpoint)" in capsys.readouterr().out


def test_what_a_run_does_not_write_is_removed_with_the_mask_it_belonged_to(infer, capsys):
    folder = infer(outputs=["seg", "prob", "overlay"])
    infer(outputs=["seg"])  # nothing is segmented, all belongs together
    assert names(folder) == {"seg.nii.gz", "prob.nii.gz", "overlay.png"}
    infer(outputs=["seg", "overlay"], seed=1)
    assert (
        names(folder) == {"seg.nii.gz", "overlay.png"} and "image_4_prob.nii.gz: was removed" in capsys.readouterr().out
    )


# --- several raters


def rated_case(folder: Path, members: int = 5, classes: int = 2) -> tuple[dict, dict]:
    """A case with four raters, as postprocessing leaves it: what belongs to the data, and what was made of them."""
    generator = torch.Generator().manual_seed(members)
    nib.save(nib.Nifti1Image(np.zeros((9, 8, 7), np.float32), OBLIQUE), folder / "scan.nii.gz")
    image = MetaTensor(torch.zeros(1, 9, 8, 7), meta={"filename_or_obj": str(folder / "scan.nii.gz")})
    smooth = torch.rand(classes, 9, 8, 7, generator=generator)
    raters = (smooth + 0.3 * torch.rand(4, classes, 9, 8, 7, generator=generator) > 0.65).float()
    pred = (smooth + 0.3 * torch.rand(members, classes, 9, 8, 7, generator=generator) - 0.15).clamp(0, 1)
    label = (raters.mean(0) >= 0.5).float()
    fused = FuseMembersd("pred", classes, {f"c{i}": [1, i + 2] for i in range(classes)})({"pred": pred.flatten(0, 1)})
    return {"image": image, "case": "scan", "raters": raters}, {**fused, "label": label}


def write(folder: Path, *cases: tuple[dict, dict], **settings: Any) -> list[dict[str, str]]:
    """Rows of the table that the cases get."""
    classes = len(cases[0][1]["mask"])
    regions = {f"c{i}": [1, i + 2] for i in range(classes)}
    outputs = [output for _, output in cases]
    engine = Engine(lambda engine, batch: [outputs[engine.state.iteration - 1]])
    CaseWriter(str(folder / "out"), classes, regions, **{"outputs": ["seg"], **settings}).attach(engine)
    engine.run([[{**item, "case": f"scan_{i}"}] for i, (item, _) in enumerate(cases)])
    return read_table(folder / "out")


@pytest.mark.parametrize("classes, endings", [(1, [""]), (2, ["_c0", "_c1"])])
def test_scores_against_raters_are_in_the_table(classes, endings, tmp_path):
    item, output = rated_case(tmp_path, classes=classes)
    (row,) = write(tmp_path, (item, output))
    expected = rater_scores(output["member_masks"], item["raters"] > 0, DRAWN_TOGETHER)
    for k, ending in enumerate(endings):
        for name in ("ged", "matched_iou", "best_iou", "ncc"):
            assert float(row[name + ending]) == pytest.approx(expected[name][k], abs=1e-6)
    of_all = expected_calibration_error(output["prob"], item["raters"].mean(0))
    assert float(row["ece_c0"]) == pytest.approx(float(of_all[0]), abs=1e-6)
    assert float(row["ece_c0"]) != pytest.approx(float(expected_calibration_error(output["prob"], output["label"])[0]))


def test_a_case_without_raters_has_no_such_scores(tmp_path):
    item, output = rated_case(tmp_path)
    (row,) = write(tmp_path, ({**item, "raters": ["file_that_was_not_loaded.png"]}, output))
    assert not [key for key in row if key.startswith(("ged", "matched", "best", "ncc"))]
    label = expected_calibration_error(output["prob"], output["label"])
    assert float(row["ece_c0"]) == pytest.approx(float(label[0]), abs=1e-6)


def test_the_summary_leaves_out_what_is_no_number(tmp_path, caplog):
    """The energy distance of a single member, the correlation where raters agree."""
    cases = [rated_case(tmp_path, members, 1) for members in (1, 5, 6)]
    cases[2][0]["raters"][:] = cases[2][1]["label"]
    with caplog.at_level("INFO"):
        rows = write(tmp_path, *cases)
    assert rows[0]["ged"] == "nan" and rows[2]["ncc"] == "nan"
    lines = {record.getMessage().split(":")[0]: record.getMessage() for record in caplog.records}
    ged, ncc = [float(rows[i]["ged"]) for i in (1, 2)], [float(rows[i]["ncc"]) for i in (0, 1)]
    assert lines["ged"] == f"ged: {np.mean(ged):.4f} (std {np.std(ged):.4f}, 2 cases; lower is better)"
    assert lines["ncc"] == f"ncc: {np.mean(ncc):.4f} (std {np.std(ncc):.4f}, 2 cases; higher is better)"
    assert "3 cases" in lines["matched_iou"] and "3 cases" in lines["best_iou"]
    caplog.clear()
    with caplog.at_level("INFO"):
        write(tmp_path, cases[0])
    assert not [record for record in caplog.records if record.getMessage().startswith("ged")]


@pytest.fixture(scope="module")
def rated(tmp_path_factory) -> Path:
    """Volumes of two classes; three raters who draw larger or smaller."""
    folder = make_nifti_dataset(tmp_path_factory.mktemp("rated"), (12, 14, 8))
    content = json.loads((folder / "dataset.json").read_text())
    for item in [*content["training"], *content["test"]]:
        label = nib.load(folder / item.pop("label"))
        item["labels"] = []
        for shift in (-1, 0, 1):
            name = f"{Path(item['image']).name.split('.')[0]}_rater_{shift}.nii.gz"
            moved = np.roll(np.asarray(label.dataobj), shift, 0)
            nib.save(nib.Nifti1Image(moved, label.affine), folder / name)
            item["labels"].append(name)
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def test_evaluation_scores_members_against_raters(bundle, rated, tmp_path):
    random_weights(tmp_path, **VOLUME_SETTINGS)
    out = bundle("evaluate", dataset_dir=rated, outputs=["seg", "members"], num_members=3, **VOLUME_SETTINGS)
    (row,) = read_table(out)
    members = np.moveaxis(nib.load(out / "image_4" / "image_4_members.nii.gz").get_fdata(), -1, 0)
    raters = np.stack([nib.load(rated / f"image_4_rater_{s}.nii.gz").get_fdata() for s in (-1, 0, 1)])
    for value in (1, 2):
        scores = rater_scores(*(torch.tensor(maps == value)[:, None] for maps in (members, raters)), DRAWN_TOGETHER)
        for name, (expected,) in scores.items():
            assert float(row[f"{name}_class_{value}"]) == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_validation_follows_the_energy_distance(bundle, rated):
    settings = {**VOLUME_SETTINGS, "dataset_dir": rated, "val_num_members": 5}
    history = (bundle("train", **settings) / "history.csv").read_text().splitlines()
    value = dict(zip(history[0].split(","), history[1].split(",")))["val_ged"]
    assert -1 < float(value) <= 2


def validate(name: str, cases: list[tuple[dict, dict]]) -> dict[str, float]:
    outputs = [output for _, output in cases]
    engine = Engine(lambda engine, batch: [outputs[engine.state.iteration - 1]])
    EnergyDistance(name).attach(engine)
    for _ in range(2):  # the second validation knows nothing of the first
        engine.run([[item] for item, _ in cases])
    return engine.state.metrics


def test_energy_distance_is_the_mean_over_cases_with_raters_and_members(tmp_path):
    five, alone = rated_case(tmp_path, 5), rated_case(tmp_path, 3)
    too_few = [rated_case(tmp_path, number) for number in range(1, DRAWN_TOGETHER + 1)]
    del alone[0]["raters"]
    six = rated_case(tmp_path, 6)
    expected = [
        generalised_energy_distance(o["member_masks"][:, k], i["raters"][:, k] > 0, DRAWN_TOGETHER)
        for i, o in (five, six)
        for k in (0, 1)
    ]
    metrics = validate("val_ged", [five, *too_few, alone, six])
    assert metrics == {"val_ged": pytest.approx(np.mean(expected), abs=1e-12)}
    assert type(metrics["val_ged"]) is float  # which the history takes
    assert validate("val_ged", [*too_few, alone]) == {}


def test_energy_distance_of_several_processes(tmp_path, monkeypatch):
    """What another process has seen counts as well."""
    case = rated_case(tmp_path)
    (own,) = validate("ged", [case]).values()
    monkeypatch.setattr(idist, "all_reduce", lambda values: values + torch.tensor([0.5, 3.0]))
    assert validate("ged", [case])["ged"] == pytest.approx((own + 0.5) / 4)


def test_report_of_a_best_epoch_without_a_metric_that_came_later():
    report = TrainingReport("", Engine(lambda e, b: None), {})
    report.validator.state.best_metric_epoch = 1
    rows = [{"epoch": 1.0, "val_mean_dice": 0.5}, {"epoch": 2.0, "val_mean_dice": 0.4, "val_ged": 0.3}]
    assert report._scores(rows)[-1] == "| val_ged | nan | 0.3000 |"


# --- written in a thread


def segmenting(tmp_path, written, number: int = 4, failing: int | None = None):
    """An engine that segments cases 0, 1, ... with a writer whose writing of one case may fail."""
    engine = Engine(lambda engine, batch: [{"mask": torch.zeros(1, 2, 2)}])
    writer = CaseWriter(str(tmp_path / "out"), 1, merge=True)

    def write(item, output, seconds):
        if item["case"] == failing:
            raise InputError("the disk is full")
        written.append((item["case"], threading.current_thread() is threading.main_thread()))

    writer._write_case = write
    writer.attach(engine)

    @engine.on(Events.ITERATION_COMPLETED)
    def stop(engine):
        if engine.state.iteration == number:
            raise KeyboardInterrupt

    return engine


def test_cases_are_written_in_order_while_the_next_one_is_segmented(tmp_path):
    written = []
    with pytest.raises(KeyboardInterrupt):
        segmenting(tmp_path, written).run([[{"case": i}] for i in range(9)])
    # the one before the stop is waited for
    assert written == [(i, False) for i in range(4)] and not (tmp_path / "out" / ".lock").exists()


@pytest.mark.usefixtures("interruptible")
def test_what_is_being_written_at_ctrl_c_is_finished_and_counted(tmp_path):
    engine = Engine(lambda engine, batch: [{"mask": torch.zeros(1, 2, 2)}])
    writer = CaseWriter(str(tmp_path / "out"), 1, merge=True)

    def write(item, output, seconds):
        time.sleep(0.1)  # the next case is segmented meanwhile, and waits
        if item["case"] == 1:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)
        assert (tmp_path / "out" / ".lock").exists()
        writer._fresh.append(item)

    writer._write_case = write
    writer.attach(engine)
    with pytest.raises(Interrupted, match="stopped") as stopped:
        engine.run([[{"case": i}] for i in range(4)])
    assert [item["case"] for item in writer._fresh] == [0, 1] and not (tmp_path / "out" / ".lock").exists()
    assert stopped.value.message.startswith("stopped. 2 cases of this run are finished")


def test_a_case_that_cannot_be_written_ends_the_run_and_the_ones_before_stay(tmp_path):
    written = []
    with pytest.raises(InputError, match="the disk is full"):
        segmenting(tmp_path, written, 9, failing=2).run([[{"case": i}] for i in range(9)])
    assert [case for case, _ in written] == [0, 1]


def test_large_cases_are_written_before_the_next_one_begins(tmp_path, monkeypatch):
    monkeypatch.setattr("medsegdiff_monai.results.LARGE", 3)
    written, begun = [], []
    engine = segmenting(tmp_path, written)
    engine.add_event_handler(Events.ITERATION_STARTED, lambda: begun.append(len(written)))
    with pytest.raises(KeyboardInterrupt):
        engine.run([[{"case": i}] for i in range(9)])
    assert begun == [0, 1, 2, 3]


# --- the picture


def panels(monkeypatch, **settings: Any) -> list[str]:
    """Titles of the panels of a picture."""
    shown = []

    def draw(rows, *more):
        shown[:] = [name for row in rows for name in row]
        return draw_panels(rows, *more)

    monkeypatch.setattr("medsegdiff_monai.pictures.draw_panels", draw)
    label = np.zeros((1, 12, 10), np.uint8)
    label[0, 3:6, 3:6] = 1
    arguments = {"prediction": label, "uncertainty": label * 0.5, "truth": None, "affine": np.eye(4)}
    picture = overlay_bytes(np.zeros((1, 12, 10)), **{**arguments, **settings}, names={1: "class"}, title="case")
    assert picture.startswith(b"\x89PNG")
    return shown


def test_members_are_below_the_other_panels(monkeypatch):
    label = np.ones((1, 12, 10), np.uint8)
    first = ["image", "prediction", "uncertainty (bits)"]
    assert panels(monkeypatch) == first
    assert panels(monkeypatch, truth=label) == ["image", "ground truth", *first[1:]]
    names = ["member 2 of 5", "member 4 of 5"]
    members = [(name, label) for name in names]
    assert panels(monkeypatch, members=members) == [*first, *names]
    assert panels(monkeypatch, truth=label, members=members)[-2:] == names


@pytest.mark.parametrize("number, shown", [(1, []), (2, [1, 2]), (5, [1, 2, 4])])
def test_the_picture_of_a_case_has_the_members_that_differ_most(number, shown, tmp_path, monkeypatch):
    item, output = rated_case(tmp_path, number, 1)
    masks = torch.zeros(number, 1, 9, 8, 7, dtype=torch.bool)
    masks[:, :, :4] = True
    if number > 1:
        masks[1] = ~masks[1]
    if number > 3:
        masks[3, :, :2] = False
    given = {}

    def draw(*args):
        given.update(args[7])
        return overlay_bytes(*args[:7], given.items(), *args[8:])

    monkeypatch.setattr("medsegdiff_monai.cases.overlay_bytes", draw)
    write(tmp_path, (item, {**output, "member_masks": masks}), outputs=list(OUTPUTS))
    assert list(given) == [f"member {i} of {number}" for i in shown]
    assert all(np.array_equal(given[f"member {i} of {number}"][0], masks[i - 1, 0].numpy()) for i in shown)
    assert (tmp_path / "out" / "scan_0" / "scan_0_overlay.png").is_file()
