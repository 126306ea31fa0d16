"""Ensembles of other tools: folders of masks or probabilities become the same tables and report."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medsegdiff_monai.__main__ import COMMANDS, cli
from medsegdiff_monai.errors import InputError
from medsegdiff_monai.report.members import evaluate_members

from .conftest import OBLIQUE

SHAPE = (14, 12, 10)


def ball(shift: int = 0, radius: float = 4.0) -> np.ndarray:
    grid = np.indices(SHAPE)
    return (sum((g - s / 2 - (i == 0) * shift) ** 2 for i, (g, s) in enumerate(zip(grid, SHAPE))) < radius**2).astype(
        np.uint8
    )


def save(folder: Path, case: str, array: np.ndarray, affine: np.ndarray = OBLIQUE) -> None:
    folder.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), folder / f"{case}.nii.gz")


@pytest.fixture
def folds(tmp_path: Path) -> list[Path]:
    """Three members of two cases, and labels in labels/."""
    folders = [tmp_path / f"fold_{i}" for i in range(3)]
    for case, shift in (("a", 0), ("b", 2)):
        for i, folder in enumerate(folders):
            save(folder, case, ball(shift * i))
        save(tmp_path / "labels", case, ball())
    return folders


def rows_of(folder: Path, table: str = "cases") -> list[dict[str, str]]:
    with (folder / f"{table}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_masks_become_tables_and_a_report(folds: list[Path], tmp_path: Path) -> None:
    report = evaluate_members(folds, tmp_path / "out", tmp_path / "labels")
    a, b = rows_of(tmp_path / "out")
    assert [a["case"], b["case"], a["members"]] == ["a", "b", "3"]
    assert (float(a["dice_class_1"]), float(a["hd95_class_1"]), float(a["expected_dice_class_1"])) == (1, 0, 1)
    masks = [ball(2 * i) for i in range(3)]
    pairs = [2 * (masks[i] & masks[j]).sum() / (masks[i].sum() + masks[j].sum()) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert float(b["expected_dice_class_1"]) == pytest.approx(np.mean(pairs), abs=1e-6)
    vote = sum(masks) >= 2
    assert float(b["dice_class_1"]) == pytest.approx(2 * (vote & ball()).sum() / (vote.sum() + ball().sum()), abs=1e-6)
    volume = abs(np.linalg.det(OBLIQUE[:3, :3])) * ball().sum()
    assert float(a["volume_mm3_class_1"]) == pytest.approx(volume, rel=0.05)
    assert {row["case"] for row in rows_of(tmp_path / "out", "structures")} == {"a", "b"}
    assert "AURC" in report.read_text(encoding="utf-8")


def test_without_labels_there_are_no_scores(folds: list[Path], tmp_path: Path) -> None:
    report = evaluate_members(folds, tmp_path / "out")
    assert not any(key.startswith(("dice", "hd95")) for key in rows_of(tmp_path / "out")[0])
    assert "without labels" in report.read_text(encoding="utf-8")


def softmax_of(masks: list[np.ndarray]) -> np.ndarray:
    """Probabilities (classes with the background first, *spatial) that are not certain."""
    classes = np.stack(masks) * 0.8 + 0.05
    return np.concatenate([1 - classes.sum(0, keepdims=True), classes]).astype(np.float32)


def test_probabilities_of_channels_and_of_nnunet_are_the_same(tmp_path: Path) -> None:
    inner, outer = ball(0, 2.5), ball(0, 4.0) - ball(0, 2.5)
    softmax = softmax_of([outer, inner])
    for i in range(2):
        save(tmp_path / f"channels_{i}", "a", np.moveaxis(softmax, 0, -1))
        save(tmp_path / f"nnunet_{i}", "a", outer + 2 * inner)
        np.savez(tmp_path / f"nnunet_{i}" / "a.npz", probabilities=softmax.transpose(0, 3, 2, 1).astype(np.float16))
        (tmp_path / f"nnunet_{i}" / "dataset.json").write_text(
            json.dumps({"labels": {"background": 0, "outer": 1, "inner": 2}})
        )
    save(tmp_path / "labels", "a", outer + 2 * inner)
    found = []
    for kind, names in (("channels", ("class_1", "class_2")), ("nnunet", ("outer", "inner"))):
        evaluate_members([tmp_path / f"{kind}_{i}" for i in range(2)], tmp_path / kind, tmp_path / "labels")
        (row,) = rows_of(tmp_path / kind)
        found.append([float(row[f"{score}_{name}"]) for name in names for score in ("dice", "nll", "brier")])
    assert found[0] == pytest.approx(found[1], abs=1e-3)
    assert found[0][0] == 1 and found[0][1] == pytest.approx(-np.log(0.85) * 0.5 - np.log(0.95) * 0.5, abs=0.06)


def test_members_in_another_orientation_are_turned(folds: list[Path], tmp_path: Path) -> None:
    turned = nib.as_closest_canonical(nib.Nifti1Image(ball(2), OBLIQUE))
    assert not np.allclose(turned.affine, OBLIQUE)
    nib.save(turned, folds[1] / "b.nii.gz")
    evaluate_members(folds, tmp_path / "turned", tmp_path / "labels")
    save(folds[1], "b", ball(2))
    evaluate_members(folds, tmp_path / "plain", tmp_path / "labels")
    assert (tmp_path / "turned" / "cases.csv").read_text() == (tmp_path / "plain" / "cases.csv").read_text()


def test_pictures_are_measured_in_pixels(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / f"m{i}").mkdir()
        Image.fromarray(ball()[:, :, 5]).save(tmp_path / f"m{i}" / "x.png")
    evaluate_members([tmp_path / "m0", tmp_path / "m1"], tmp_path / "out", regions={"cell": [1]})
    (row,) = rows_of(tmp_path / "out")
    assert float(row["area_px_cell"]) == ball()[:, :, 5].sum()


def test_files_of_a_suffix_count_alone(folds: list[Path], tmp_path: Path) -> None:
    probability = tmp_path / "ours"
    for case in "ab":
        (probability / case).mkdir(parents=True)
        save(probability / case, f"{case}_seg", ball())
        save(probability / case, f"{case}_prob", (ball() * 0.9).astype(np.float32))
    evaluate_members([probability], tmp_path / "out", tmp_path / "labels", suffix="_prob")
    assert [row["case"] for row in rows_of(tmp_path / "out")] == ["a", "b"]
    p, m = 0.9 * ball().sum(), ball().sum()
    assert float(rows_of(tmp_path / "out")[0]["expected_dice_class_1"]) == pytest.approx(2 * p / (p + m), abs=1e-5)


def _shifted(folds: list[Path]) -> None:
    moved = OBLIQUE.copy()
    moved[:3, 3] += 5
    save(folds[1], "a", ball(), moved)


def _smaller(folds: list[Path]) -> None:
    save(folds[1], "a", ball()[1:])


def _logits(folds: list[Path]) -> None:
    save(folds[1], "a", ball().astype(np.float32) * 8.5 - 4)


def _other_label(folds: list[Path]) -> None:
    save(folds[0].parent / "labels", "b", ball()[:, :-1])


def _unknown_value(folds: list[Path]) -> None:
    (folds[0].parent / "labels" / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "liver"}}))
    save(folds[2], "b", ball() * 3)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folds: (folds[1] / "b.nii.gz").unlink(), "fold_1: lacks 1 of the cases in .*fold_0: b"),
        (lambda folds: (folds[0] / "b.nii.gz").unlink(), "fold_0: lacks 1 of the cases in .*fold_1: b"),
        (lambda folds: (folds[0].parent / "labels" / "a.nii.gz").unlink(), "labels: lacks 1"),
        (_shifted, r"a\.nii\.gz: does not fit .*fold_0.a\.nii\.gz .*voxels off"),
        (_smaller, r"fold_1.a\.nii\.gz: does not fit .*size \[13, 12, 10\].*size \[14, 12, 10\]"),
        (_logits, r"a\.nii\.gz: holds values from -4 to 4\.5, which are neither labels nor probabilities"),
        (_other_label, r"labels.b\.nii\.gz"),
        (_unknown_value, r"liver.*labels \[3\]"),
        (lambda folds: (folds[0] / "a.nii").write_bytes(b"x"), "are both of the case 'a'"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_written(folds: list[Path], tmp_path: Path, spoil, words) -> None:
    spoil(folds)
    with pytest.raises(InputError, match=words):
        evaluate_members(folds, tmp_path / "out", tmp_path / "labels")
    assert not (tmp_path / "out").exists()


def test_folders_that_make_no_ensemble_are_refused(folds: list[Path], tmp_path: Path) -> None:
    for folders, words in (
        ([], "give a folder for each member"),
        ([folds[0], folds[0]], "is given twice"),
        ([folds[0]], "carries no uncertainty"),
        ([tmp_path / "nowhere"], "is not a folder"),
        ([tmp_path], "both of the case"),
    ):
        with pytest.raises(InputError, match=words):
            evaluate_members(folders, tmp_path / "out")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "cases.jsonl").touch()
    with pytest.raises(InputError, match="holds results of an evaluation"):
        evaluate_members(folds, tmp_path / "own")


def test_the_command_reads_folders_and_regions(
    folds: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["evaluate-members", *map(str, folds), "--output", str(tmp_path / "out"), "--labels"]
    cli.main(COMMANDS, [*words, str(tmp_path / "labels"), "--regions", "{'tumour': [1]}", "--tolerance", "2"])
    log = capsys.readouterr().out
    assert "tumour" in log and "Worst: b (Dice" in log and str(tmp_path / "out" / "report.html") in log
    assert "dice_tumour" in rows_of(tmp_path / "out")[0]
