"""What the page of results makes of the finished runs."""

from __future__ import annotations

import re

import numpy as np
import pytest

from benchmarks import accuracy, results

from .test_benchmarks import call, one_thread  # noqa: F401


def test_results_beside_the_papers_and_where_they_fail(monkeypatch):
    def run(data, method, seconds, *dice, **more):
        return {"data": data, "method": method, "seconds": seconds, "seed": 0, "dice": list(dice), **more}

    worst = [[0.1, "case_3", 0.02], [0.7, "case_1", 0.3]]
    runs = [
        run("LGG_MRI", "plain DPM", 120, 0.5), run("LGG_MRI", "plain DPM", 120, 0.7),
        run("LGG_MRI", "plain DPM", 9, 0.1), run("DRISHTI_roi", "+ FF-Parser", 60, 0.9, 0.8),
        run("LGG_MRI", "MONAI UNet", 9, 0.2),
        run("LGG_MRI", "paper's objective", 99, 0.4, worst=worst, below_half=1, cases=2),
    ]  # fmt: skip
    head, _, plain, _, full = results.beside_paper(runs).splitlines()
    assert "here: brain tumour, LGG_MRI, 120 s" in head and "here: optic cup, DRISHTI_roi, 60 s" in head
    assert plain == "| plain DPM | 0.846 |  | 0.882 | 0.600 ± 0.141 | 0.841 |  |"
    assert full == "| + FF-Parser | 0.875 | 0.800 | 0.905 |  | 0.866 |  |"
    *_, told = results.failures(runs).splitlines()
    assert told == "| LGG_MRI | paper's objective | 99 | 0 | 1 of 2 | case_3, 0.10 (2.0 %); case_1, 0.70 (30.0 %) |"
    assert len(results.failures(runs).splitlines()) == 3


def test_the_page_of_results_is_what_the_results_make(tmp_path, monkeypatch):
    call(monkeypatch, results, "--output", tmp_path / "results.md")
    assert (tmp_path / "results.md").read_text("utf-8") == (accuracy.ROOT / "docs" / "results.md").read_text("utf-8")


def test_runs_are_told_apart_by_what_shaped_them(tmp_path):
    file = tmp_path / "results.jsonl"
    run = {"method": "ours", "seed": 0, "split": "test"}
    accuracy.append(file, {**run, "device": "cuda", "dice": 0.5})
    accuracy.append(file, {"method": "ours", "seed": 1, "split": "validation"})
    assert accuracy.is_known(file, {**run, "device": "cuda", "version": accuracy.FIRST_VERSION})
    assert not accuracy.is_known(file, run) and not accuracy.is_known(file, {"method": "ours", "seed": 1})
    assert not accuracy.is_known(file, {**run, "device": "cuda", "version": "9.9"})
    file.write_text(file.read_text() + '{"method": "ou')
    with pytest.raises(SystemExit, match="line 3 is not whole: take it out"):
        accuracy.is_known(file, run)


def test_intervals_are_of_patients_and_trainings():
    random = np.random.default_rng(1)

    def interval(ours, theirs, each=1):
        text = results.interval(each * ours, each * theirs, np.full(ours.shape[1], each))
        return [float(number) for number in re.findall(r"[-+][\d.]+", text)]

    values, nothing = random.normal(0.5, 1.0, (1, 400)), np.zeros((1, 400))
    centre, low, high = interval(values, nothing)
    assert low < centre < high and high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert interval(values, nothing, each=2) == [centre, low, high]  # two equal slices of each patient tell no more

    trainings = np.repeat(random.normal(0.5, 1.0, (40, 1)), 400, 1)  # equal for all patients
    _, low, high = interval(trainings, nothing)
    assert high - low == pytest.approx(2 * 1.96 * trainings[:, 0].std() / 40**0.5, rel=0.15)
    paired = random.normal(0.0, 5.0, (1, 400))  # what makes patients differ is the same for both methods
    assert interval(paired + 1, paired)[1:] == [1.0, 1.0]


def test_runs_with_another_objective_take_the_place_of_older_ones():
    def run(method, dice, **more):
        same = {"data": "LGG_MRI", "seconds": 60, "seed": 0, "parameters_m": 1, "passes": 1, "seconds_per_image": 1}
        made = {"cases": 2, "field": [8, 8], "torch": "2", "monai": "1", "date": "2026"}
        return {**same, **made, "method": method, "dice": [dice], **more}

    old = run("plain DPM", 0.1, ged=[0.5])
    new = run("plain DPM", 0.2, objective="ensemble", ged_unbiased=[float("nan")])
    other = run("MONAI UNet", 0.3)
    assert results.current([old, other, new]) == [other, new] and results.current([old, other]) == [old, other]
    *_, head, _, first, second, _ = results.table("LGG_MRI", [other, new])
    assert head.endswith("| mean Dice | Dice | unbiased GED* | seeds |")
    assert first.endswith("| 0.300 | 0.300 |  | 1 |") and second.endswith("| 0.200 | 0.200 |  | 1 |")


def test_differences_between_methods_are_paired_by_case():
    """Cases differ much, and methods by the same amount on each: the interval is what the seeds make of that amount."""
    cases = {f"case {i}": i / 10 for i in range(10)}

    def runs(more: float) -> list[dict]:
        return [{"dice_of_cases": {case: dice + more + seed for case, dice in cases.items()}} for seed in (-0.01, 0.01)]

    lines = results.differences({"+ FF-Parser": runs(0.05), "MONAI UNet": runs(0.0), "old": [{"dice": [0.5]}]})
    assert lines[2:] == ["| MONAI UNet | +0.050 (+0.030 to +0.070) | 10 | 10 |", ""]
    worse = {case: dice + 0.2 * (i % 2) for i, (case, dice) in enumerate(cases.items())}
    (line,) = results.differences({"+ FF-Parser": runs(0.0), "MONAI UNet": [{"dice_of_cases": worse}]})[2:-1]
    low, high = map(float, re.findall(r"[(]([-+.0-9]+) to ([-+.0-9]+)", line)[0])
    assert low < -0.1 < high < 0 and "| -0.100 (" in line
    assert results.differences({"MONAI UNet": runs(0.0)}) == []


@pytest.mark.parametrize("first", ["TCGA_CS_4943_20000902", "patient015_frame01"])
def test_images_of_a_patient_are_drawn_together(first):
    """Ten images of one patient and one of another: the interval reaches from the one's mean to the other's."""
    cases = {**{f"{first}_{i}": 0.5 for i in range(10)}, "other": 0.1}
    none = {case: 0.0 for case in cases}
    runs = {"+ FF-Parser": [{"dice_of_cases": cases}], "MONAI UNet": [{"dice_of_cases": none}]}
    assert results.differences(runs)[2] == "| MONAI UNet | +0.464 (+0.100 to +0.500) | 11 | 2 |"
