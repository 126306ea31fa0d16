"""Names of cases, which become names of folders and cells of tables."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from medsegdiff_monai.data.names import case_names, safe_name

USUAL = ["patient_001", "benign (1)", "Müller, Jürgen v1.2", "100% sure", "$x#y@z", "a'b", "日本 01", "1.2.840.113"]
ODD = [
    "...",
    "..",
    ".",
    "",
    " ",
    "=cmd|calc!A1",
    "+1",
    "-dash",
    "@x",
    "\tx",
    "a\nb",
    "a/b",
    "..\\x",
    ".hidden",
    "\udc80x",
]
ODD += [
    "cases.csv",
    "Cases.CSV",
    "cases.jsonl",
    "structures.csv",
    "validation",
    "x" * 300,
    "ü" * 200,
    "日" * 255,
    ".lock",
]


@pytest.mark.parametrize("name", USUAL)
def test_usual_names_stay(name):
    assert safe_name(name) == name


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_odd_names_become_a_folder_inside_of_the_results(name, tmp_path):
    safe = safe_name(name)
    longest = tmp_path / safe / f".{safe}_uncertainty_entropy.nii.gz.4194304.tmp"
    longest.parent.mkdir()
    longest.touch()
    assert longest.resolve().parents[1] == tmp_path.resolve() and safe.encode()
    assert not safe.startswith(("=", "+", "-", "@", ".", " ")) and safe.isprintable()
    assert safe.casefold() not in ("cases.csv", "cases.jsonl", "structures.csv", "validation")
    assert safe_name(safe) == safe


def test_long_names_that_differ_in_the_end_stay_apart():
    assert safe_name("x" * 250 + "1") != safe_name("x" * 250 + "2")


@pytest.mark.parametrize("seed", range(20))
def test_names_differ_whatever_the_files_are_called(seed):
    rng = random.Random(seed)
    parts = ["a", "A", "b", "=a", "-a", "_a", "x" * 240, "...", "a_2"]
    folders = [Path("/data", *rng.choices(parts, k=rng.randint(0, 3))) for _ in range(12)]
    files = [str(folder / f"{rng.choice(parts)}{rng.choice(['.png', '.PNG', '.nii.gz'])}") for folder in folders]
    files.append(files[0])  # one file given twice
    names = case_names(files)
    assert len({name.casefold() for name in names}) == len(files)
    assert all(len(name.encode()) < 200 and safe_name(name[:99]) == name[:99] for name in names)
