"""What a data list says that is easily overlooked: a word on it, or a hint at what was meant."""

from __future__ import annotations

import json
import unicodedata

import nibabel as nib
import numpy as np
import pytest
import raw_layouts as raw

from medsegdiff_monai.data.bounds import check_place
from medsegdiff_monai.data.report import inspect_dataset
from medsegdiff_monai.errors import InputError


@pytest.fixture
def task(tmp_path):
    return raw.decathlon(tmp_path, 3)


def report(task, **content):
    file = task / "dataset.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **content}))
    return inspect_dataset(task)


def cases(task, *more):
    """The training cases, the first with more keys."""
    listed = json.loads((task / "dataset.json").read_text())["training"]
    return [{**listed[0], **dict(more)}, *listed[1:]]


@pytest.mark.parametrize(
    "regions", [{"front": []}, {"front": ["one"]}, {"front": [7]}, {"front": [0]}, [[1]], "front", {"front": 1}]
)
def test_regions_that_are_not_used(task, regions):
    found = report(task, regions=regions)
    assert found.overlay["regions"] == {"front": [1], "back": [2]}
    assert "'regions' is left out: it must hold names with lists of declared labels, [1, 2]" in found.warnings[0]


@pytest.mark.parametrize("key", ["modality", "channel_names"])
def test_names_of_channels_that_the_images_do_not_have(task, key):
    (warning,) = report(task, **{"modality": {"0": "MR"}, key: {"0": "T1", "1": "FLAIR"}}).warnings
    assert "names 2 channels (T1, FLAIR), the images have 1: list all files" in warning


def test_one_name_fits_any_number_of_channels(task):
    listed = [{**case, "image": [case["image"]] * 2} for case in cases(task)]
    found = report(task, training=listed, test=[], modality={"0": "MR"})
    assert found.overlay["in_channels"] == 2
    assert [warning.split(": ", 1)[1] for warning in found.warnings] == [
        "is more than one channel of its case: make sure that it is meant."
    ] * len(listed)


def test_a_label_that_is_named_background(task):
    (warning,) = report(task, labels={"0": "front", "1": "Background", "2": "back"}).warnings
    assert "'labels' names [1] 'Background'; the background is 0" in warning


def test_nothing_but_what_is_ignored(task):
    (error,) = report(task, labels={"0": "background", "1": "front"}, ignore_label=1).errors[-1:]
    assert "declares no label but 'ignore_label' (1): name one" in error


def test_keys_by_which_other_tools_split(task):
    (warning,) = report(task, training=cases(task, ("fold", 0), ("subject", "a"), ("age", 40))).warnings
    assert "cases have the key fold, subject, which nothing reads: they are split by 'patient'" in warning


def test_patients_of_some_cases_alone(task):
    (warning,) = report(task, training=cases(task, ("patient", "a")), test=[]).warnings
    assert warning == "2 of 3 cases have no patient or cluster: each counts as one of its own."


def test_masks_without_background(task):
    for path in (task / "labelsTr").iterdir():
        raw.volume(path, np.asarray(nib.load(path).dataobj) * 0 + 1)
    assert any("holds 0, the background: make sure" in warning for warning in report(task).warnings)


@pytest.mark.parametrize(
    ("there", "asked", "hint"),
    [
        ("images/a.png", "images\\a.png", "with / in place of"),
        (unicodedata.normalize("NFD", "M\u00fcller.png"), "M\u00fcller.png", "how letters are stored"),
        ("M\u00fcller.png", unicodedata.normalize("NFD", "M\u00fcller.png"), "how letters are stored"),
        ("scan.png", "Scan.PNG", "upper and lower case"),
        ("scan.png", "scann.png", "no such file: correct"),
    ],
)
def test_a_name_that_is_nearly_right(tmp_path, there, asked, hint):
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).touch()
    if (tmp_path / asked).exists():
        pytest.skip("the names are one to this file system")
    with pytest.raises(InputError, match="no such file") as error:
        check_place(tmp_path / asked)
    assert hint in str(error.value)
