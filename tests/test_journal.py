"""The table of cases, whatever others do to it, and which cases count as finished."""

from __future__ import annotations

import csv
import gzip
import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medsegdiff_monai.journal import CaseJournal, file_stamps, is_whole
from medsegdiff_monai.outputs import output_files

ROWS = [{"case": f"c{i}", "source": f"/data/c{i}.png", "dice": 0.25 * i, "seconds": 1.5} for i in range(4)]


def write(folder: Path, rows: list[dict], merge: bool = True) -> CaseJournal:
    journal = CaseJournal(folder)
    journal.open(merge)
    for row in rows:
        journal.add(row["case"], row, ["seg.nii.gz"])
    return journal


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "cases.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def cases(folder: Path) -> list[str]:
    return [row["case"] for row in read(folder)]


EDITS = {
    "semicolons": lambda raw: raw.replace(b",", b";"),
    "byte order mark": lambda raw: b"\xef\xbb\xbf" + raw,
    "UTF-16": lambda raw: raw.decode().encode("utf-16"),
    "decimal commas": lambda raw: raw.replace(b"0.25", b'"0,25"'),
    "a row taken out": lambda raw: raw.replace(raw.splitlines(keepends=True)[2], b""),
    "a column added": lambda raw: b"".join(line + b",note\r\n" for line in raw.splitlines()),
    "other ends of lines": lambda raw: raw.replace(b"\r\n", b"\n"),
    "another order": lambda raw: b"".join(sorted(raw.splitlines(keepends=True), reverse=True)),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=list(EDITS))
def test_a_table_that_a_spreadsheet_changed_is_set_aside_with_a_word(edit, tmp_path, caplog):
    write(tmp_path, ROWS[:3])
    table = tmp_path / "cases.csv"
    changed = edit(table.read_bytes())
    table.write_bytes(changed)
    write(tmp_path, ROWS[3:])
    assert (tmp_path / "cases_edited.csv").read_bytes() == changed
    assert "cases_edited.csv" in caplog.text and caplog.text.count("WARNING") == 1
    assert cases(tmp_path) == ["c0", "c1", "c2", "c3"]
    table.write_bytes(edit(table.read_bytes()))
    CaseJournal(tmp_path).open(merge=True)  # a run that has nothing to do
    assert cases(tmp_path) == ["c0", "c1", "c2", "c3"] and (tmp_path / "cases_edited2.csv").is_file()


@pytest.mark.parametrize("lost", range(60))
def test_a_run_that_was_killed_while_it_wrote_leaves_no_table_to_set_aside(lost, tmp_path):
    """The end of the table is missing, up to all of the last row."""
    write(tmp_path, ROWS)
    table = tmp_path / "cases.csv"
    whole = table.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    table.write_bytes(whole[: -min(lost, last) or None])
    write(tmp_path, ROWS[3:])
    assert cases(tmp_path) == ["c0", "c1", "c2", "c3"] and not list(tmp_path.glob("cases_edited*"))


@pytest.mark.parametrize("lost", [1, 20, 70])
def test_half_a_line_of_the_journal_is_no_case(lost, tmp_path):
    write(tmp_path, ROWS)
    file = tmp_path / "cases.jsonl"
    file.write_bytes(file.read_bytes()[:-lost])
    assert set(CaseJournal(tmp_path).entries) >= {"c0", "c1", "c2"}
    write(tmp_path, ROWS[3:])
    assert [json.loads(line)["case"] for line in file.read_text().splitlines()][-1] == "c3"
    assert cases(tmp_path) == ["c0", "c1", "c2", "c3"]


def test_rows_that_come_again_or_have_more_columns_are_in_the_table_once(tmp_path):
    write(tmp_path, ROWS)
    write(tmp_path, [{**ROWS[1], "dice": 0.9}, {"case": "c9", "ged": 0.5}])
    assert cases(tmp_path) == ["c0", "c1", "c2", "c3", "c9"]
    assert [row["dice"] for row in read(tmp_path)] == ["0.0", "0.9", "0.5", "0.75", ""]
    assert read(tmp_path)[4]["ged"] == "0.5"
    write(tmp_path, ROWS[:1], merge=False)
    assert cases(tmp_path) == ["c0"] and "ged" not in read(tmp_path)[0]
    assert not list(tmp_path.glob("cases_edited*"))


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "=cmd|' /C calc'!A0"])
def test_no_cell_is_a_formula(text, tmp_path):
    write(tmp_path, [{"case": "c", "source": text, "ged": -0.25}])
    (row,) = read(tmp_path)
    assert not row["source"].startswith(("=", "+", "-", "@", "\t")) and row["ged"] == "-0.25"


# --- finished or not


SETTINGS = {"num_members": 5, "fusion": "mean", "regions": {"a": (1, 2)}, "checkpoint": "1f"}


@pytest.fixture
def finished(tmp_path) -> tuple[Path, str]:
    """A folder of results with a case that is finished, and its image."""
    image = tmp_path / "scan.nii.gz"
    image.write_bytes(b"an image")
    out = tmp_path / "out"
    for file in output_files(out, "scan", ["seg", "prob"]):
        file.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(np.zeros((9, 8, 7), np.uint8), np.eye(4)), file)
    made_from = {"image": str(image), "stamps": file_stamps(str(image)), "settings": SETTINGS}
    CaseJournal(out).add("scan", {"case": "scan"}, ["seg.nii.gz", "prob.nii.gz"], made_from)
    return out, str(image)


def why(out: Path, image: str, outputs: list[str] | None = None, **settings) -> str | None:
    return CaseJournal(out).why_not_finished("scan", image, {**SETTINGS, **settings}, outputs or ["seg"])


def test_a_case_is_finished_under_the_same_settings_alone(finished):
    assert why(*finished) is None and why(*finished, outputs=["seg", "prob"]) is None
    assert why(*finished, num_members=6) == "other settings (num_members)"
    assert why(*finished, fusion="vote", checkpoint="2e") == "other settings (fusion, checkpoint)"
    assert why(*finished, regions={"a": [1]}) == "other settings (regions)"
    assert why(*finished, outputs=["seg", "members"]) == "a missing file (scan_members.nii.gz)"
    assert why(finished[0], finished[1] + "x") == "another image"


def test_a_case_whose_image_has_changed_is_not_finished(finished):
    os.utime(finished[1], (1, 1))
    assert why(*finished) == "another image"


@pytest.mark.parametrize("length", [0, 1, 10, 20, 40, 60, -1])
def test_a_case_with_half_a_file_is_not_finished(length, finished):
    mask = finished[0] / "scan" / "scan_seg.nii.gz"
    content = mask.read_bytes()
    mask.write_bytes(content[:length])
    assert why(*finished) == "a damaged file (scan_seg.nii.gz)"


def test_a_case_whose_files_were_about_to_be_replaced_is_not_finished(finished):
    journal = CaseJournal(finished[0])
    journal.begin("scan")
    assert why(*finished) == "" and CaseJournal(finished[0]).entries["scan"]["row"] == {"case": "scan"}


def test_a_mask_that_someone_has_corrected_is_whole(tmp_path):
    """Whatever program compressed it, in one piece or in several."""
    raw = nib.Nifti1Image(np.arange(4000, dtype=np.uint8).reshape(10, 20, 20), np.eye(4)).to_bytes()
    mask = tmp_path / "mask.nii.gz"
    mask.write_bytes(gzip.compress(raw[:2000]) + gzip.compress(raw[2000:]))
    assert is_whole(mask)
    mask.write_bytes(mask.read_bytes()[:-9])
    assert not is_whole(mask)


def test_what_this_program_wrote_is_not_unpacked_to_see_that_it_is_whole(tmp_path, monkeypatch):
    """Thousands of finished cases are looked at before the first new one."""
    mask = tmp_path / "mask.nii.gz"
    nib.save(nib.Nifti1Image(np.arange(4000, dtype=np.uint8).reshape(10, 20, 20), np.eye(4)), mask)
    monkeypatch.setattr("medsegdiff_monai.journal.gzip.open", lambda path: pytest.fail("it was unpacked"))
    assert is_whole(mask)
