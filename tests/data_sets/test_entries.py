"""dataset.json: one reading of it for check, prepare, training, evaluation and inference."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import raw_layouts as raw

from medsegdiff_monai.data import DataSpec, evaluation_items, inference_items, training_splits
from medsegdiff_monai.data.entries import read_data_list
from medsegdiff_monai.data.raw.prepare import prepare
from medsegdiff_monai.data.report import inspect_dataset
from medsegdiff_monai.errors import InputError

SPEC = DataSpec(spatial_dims=3, in_channels=1, num_classes=2)


def inspect(folder):
    errors = inspect_dataset(folder).errors
    if errors:
        raise InputError("\n".join(errors))


def consumers(folder, out):
    """What reads a data list; each ends well or with one error."""
    return {
        "check": lambda: inspect(folder),
        "prepare": lambda: prepare("decathlon", str(folder), str(out / "prepared"), workers=1),
        "training": lambda: training_splits(str(folder), SPEC),
        "evaluation": lambda: evaluation_items(str(folder), SPEC),
        "inference": lambda: inference_items(str(folder), SPEC, str(out / "inference"), "none.pt"),
    }


def outcomes(folder, out):
    """For each consumer the message that it ends with, or None."""
    found = {}
    for name, read in consumers(folder, out).items():
        shutil.rmtree(out / "prepared", ignore_errors=True)
        try:
            read()
        except InputError as error:
            found[name] = str(error)
        else:
            found[name] = None
    return found


@pytest.fixture
def task(tmp_path):
    return raw.decathlon(tmp_path / "task", 6)


def edit(task, change):
    file = task / "dataset.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def absolute(task, elsewhere):
    """Images are kept elsewhere, and named by their whole paths."""
    shutil.move(task / "imagesTr", elsewhere / "imagesTr")

    def change(content):
        for item in content["training"]:
            item["image"] = str(elsewhere / item["image"])

    edit(task, change)


def upwards(task, elsewhere):
    shutil.move(task / "labelsTr", elsewhere / "labelsTr")
    way = os.path.relpath(elsewhere, task)

    def change(content):
        for item in content["training"]:
            item["label"] = f"{way}/{item['label']}"

    edit(task, change)


def links(task, elsewhere):
    """Each file is a link into an archive, where it has another name."""
    for i, file in enumerate(sorted((task / "imagesTr").iterdir())):
        target = elsewhere / f"{i:08d}.nii.gz"
        shutil.move(file, target)
        file.symlink_to(target)


def linked_folder(task, elsewhere):
    shutil.move(task / "imagesTr", elsewhere / "imagesTr")
    (task / "imagesTr").symlink_to(elsewhere / "imagesTr")


@pytest.mark.parametrize("move", [absolute, upwards, links, linked_folder])
def test_files_that_are_kept_elsewhere_are_read_by_all(task, tmp_path, move):
    elsewhere = tmp_path / "archive"
    elsewhere.mkdir()
    move(task, elsewhere)
    assert set(outcomes(task, tmp_path / "out").values()) == {None}
    names = {item["case"] for items in (training_splits(str(task), SPEC)[s] for s in ("training", "validation"))
             for item in items}  # fmt: skip
    assert names == {f"toy_{i:03d}" for i in range(6)}  # as the list calls them


FAULTS = {
    "no object": ([3], "needs the key 'image'"),
    "no image": ([{"label": "x"}], "needs the key 'image'"),
    "number": ([{"image": 5, "label": "x"}], "'image' is '5', no file name"),
    "null": ([{"image": "a.nii", "label": None}], "'label' is 'None', no file name"),
    "empty": ([{"image": "", "label": "x"}], "'image' is '', no file name"),
    "no images": ([{"image": [], "label": "x"}], "'image' is '[]', no file name"),
    "nested": ([{"image": [["a"]], "label": "x"}], "no file name"),
    "zero byte": ([{"image": "a\0b", "label": "x"}], "no file name"),
    "list of labels": ([{"image": "a.nii", "label": ["b.nii"]}], "'label' is \"['b.nii']\", no file name"),
    "raters": ([{"image": "a.nii", "labels": "b.nii"}], "list one file for each rater"),
    "rater twice": ([{"image": "a.nii", "labels": ["b.nii", "./b.nii"]}], "more than once"),
    "patient": ([{"image": "a.nii", "label": "b.nii", "patient": ["x"]}], "'patient' is \"['x']\""),
    "nameless patient": ([{"image": "a.nii", "label": "b.nii", "patient": " "}], "'patient' is ' '"),
    "missing number": ([{"image": "a.nii", "label": "b.nii", "cluster": float("nan")}], "'cluster' is 'nan'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_same_fault_has_the_same_words_everywhere(task, tmp_path, fault):
    cases, words = FAULTS[fault]
    edit(task, lambda content: content["training"].extend(cases))
    for name, message in outcomes(task, tmp_path / "out").items():
        assert message is not None, name
        line = next(line for line in message.splitlines() if f"{task / 'dataset.json'}: training[6]: " in line)
        assert words in line, name


def test_all_entries_that_are_no_cases_are_named_at_once(task):
    edit(task, lambda content: content["training"].extend([3, {"image": 4}, {}]))
    with pytest.raises(InputError) as error:
        training_splits(str(task), SPEC)
    assert all(f"training[{i}]" in str(error.value) for i in (6, 7, 8))


BROKEN = {
    "half a character": ('{"training": [{"image": "\\ud800.png", "label": "x.png"}]}', r"\\ud800.*surrogate"),
    "half a character in a name": ('{"training": [], "labels": {"1": "\\udfff"}}', "surrogate"),
    "a key twice": ('{"training": ["a.png"], "training": []}', "'training' is there twice"),
    "rest": ('{"training": []} {"training": []}', "is not JSON .*Extra data"),
    "comma": ('{"training": [],}', "is not JSON"),
    "quotes": ("{'training': []}", "is not JSON"),
    "no object": ("[]", "the list 'training', not list"),
    "depth": ("[" * 100000, "is not JSON"),
    "number": ('{"training": ' + "9" * 5000 + "}", "is not JSON"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_refused_by_all(tmp_path, kind):
    text, message = BROKEN[kind]
    (tmp_path / "set").mkdir()
    (tmp_path / "set/dataset.json").write_text(text)
    for name, read in consumers(tmp_path / "set", tmp_path / "out").items():
        with pytest.raises(InputError, match=message):
            read()
            pytest.fail(name)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_all_encodings_of_json_are_read(tmp_path, encoding):
    """PowerShell writes UTF-16, other editors of Windows a byte order mark."""
    text = json.dumps({"training": [{"image": "Schädel.nii", "label": "x.nii"}]}, ensure_ascii=False)
    (tmp_path / "dataset.json").write_bytes(text.encode(encoding))
    (entry,) = read_data_list(tmp_path).entries
    assert entry.image == str(tmp_path / "Schädel.nii")


def test_groups_are_names_or_numbers(tmp_path):
    groups = [
        {"patient": 3},
        {"patient": "3"},
        {"patient": 3.0},
        {"cluster": "a"},
        {"patient": None, "cluster": "b"},
        {},
    ]
    items = [{"image": f"{i}.nii", **group} for i, group in enumerate(groups)]
    (tmp_path / "dataset.json").write_text(json.dumps({"test": items}))
    assert [entry.group for entry in read_data_list(tmp_path).entries] == ["3", "3", "3", "a", "b", None]


@pytest.mark.parametrize(
    ("content", "labels", "ignored"),
    [
        ({"labels": {"0": "background", "1": "a", "4": "b"}}, {"background": [0], "a": [1], "b": [4]}, None),
        ({"labels": {"background": 0, "whole": [1, 2], "ignore": 3}}, {"background": [0], "whole": [1, 2]}, 3),
        ({"labels": {"0": "b", "1": "a", "255": "void"}, "ignore_label": 255}, {"b": [0], "a": [1]}, 255),
        ({"ignore_label": 9}, None, 9),
        ({"labels": {"1": "same", "2": "same"}}, {"same": [1, 2]}, None),
    ],
)
def test_labels_and_what_is_ignored(tmp_path, content, labels, ignored):
    (tmp_path / "dataset.json").write_text(json.dumps({"training": [], **content}))
    data = read_data_list(tmp_path)
    assert data.labels == labels and data.ignore_label == ignored


@pytest.mark.parametrize("value", ["255", 0, -1, 2.5, True, [255], 65536])
def test_bad_ignore_label(tmp_path, value):
    (tmp_path / "dataset.json").write_text(json.dumps({"training": [], "ignore_label": value}))
    with pytest.raises(InputError, match=r"'ignore_label' is .*from 1 to 65535"):
        _ = read_data_list(tmp_path).ignore_label


def test_prepare_keeps_names_codes_regions_and_what_is_ignored(task, tmp_path):
    edit(task, lambda content: content.update(
        labels={"background": 0, "front": 1, "back": 2, "ignore": 7}, regions={"whole": [1, 2], "back": [2]}
    ))  # fmt: skip
    prepare("decathlon", str(task), str(tmp_path / "out"), workers=1)
    content = json.loads((tmp_path / "out/dataset.json").read_text())
    assert content["labels"] == {"0": "background", "1": "front", "2": "back"} and content["ignore_label"] == 7
    assert content["regions"] == {"whole": [1, 2], "back": [2]}


@pytest.mark.parametrize("key", ["label", "labels"])
def test_an_image_is_not_its_own_label(tmp_path, key):
    """By its name, or by a link."""
    (tmp_path / "a.nii").write_bytes(b"")
    (tmp_path / "b.nii").symlink_to(tmp_path / "a.nii")
    for name in ("a.nii", "b.nii"):
        case = {"image": "a.nii", key: name if key == "label" else [name]}
        (tmp_path / "dataset.json").write_text(json.dumps({"training": [case]}))
        (fault,) = read_data_list(tmp_path).faults
        assert "its own label" in fault and "a.nii" in fault
