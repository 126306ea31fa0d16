"""What MONAI Label reads of the bundle, checked without it; ``test_label_server.py`` asks a real server."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import ConfigParser, run

from examples.label.server import server_command, server_environment
from medsegdiff_monai.errors import InputError

from ..conftest import CONFIGS, ROOT, TINY, VOLUME_SETTINGS


def parser(name, **variables):
    config = ConfigParser()
    config.read_config(str(CONFIGS / f"{name}.json"))
    config.update({"bundle_root": str(ROOT / "bundle"), **variables})
    return config


def test_every_key_that_it_reads_or_overrides_is_there():
    inference, train = parser("inference"), parser("train")
    for key in ("device", "bundle_root", "network_def", "preprocessing", "inferer", "postprocessing"):
        assert inference[key]
    for key in ("device", "bundle_root", "network", "train#trainer#max_epochs", "train#dataset#data", "train#handlers"):
        assert train[key]
    assert train["validate#dataset#data"] and train["run"]
    assert (CONFIGS.parent / "models" / "model.pt").is_file()  # without one it ignores a bundle


def test_server_is_given_a_copy_of_the_bundle_and_keeps_its_weights(tmp_path, monkeypatch):
    def command(**options):
        return server_command(tmp_path, "studies", port=8123, **options)

    def option(name, arguments):
        return arguments[arguments.index(name) + 1]

    arguments = command()
    app = Path(option("--app", arguments))
    assert (option("--host", arguments), option("--port", arguments)) == ("127.0.0.1", "8123")
    weights = app / "model" / "medsegdiff" / "models" / "model.pt"
    assert weights.read_bytes() == (ROOT / "bundle" / "models" / "model.pt").read_bytes()
    assert [file.name for file in weights.parent.glob("*.pt")] == ["model.pt"]  # of several, viewers take the first
    weights.write_bytes(b"trained")
    assert command() == arguments and weights.read_bytes() == b"trained"

    other = tmp_path / "other"
    (other / "configs").mkdir(parents=True)
    (other / "configs" / "metadata.json").write_text('{"name": "other"}')
    shutil.rmtree(app / "model")

    def full_disk(*_, **__):
        raise OSError("full")

    with monkeypatch.context() as interrupted:
        interrupted.setattr(Path, "rename", full_disk)
        with pytest.raises(OSError, match="full"):
            command(bundle=other)
    assert not (app / "model" / "medsegdiff").exists()
    command(bundle=other)
    assert json.loads((app / "model" / "medsegdiff" / "configs" / "metadata.json").read_text()) == {"name": "other"}
    wrongs = [({"app": "radiolgy"}, "radiolgy"), ({"bundle": tmp_path}, str(tmp_path)), ({"bundle": other}, "--work")]
    for wrong, key in wrongs:
        with pytest.raises(InputError, match=re.escape(key)):
            command(**wrong)


def test_settings_of_the_server_give_way_to_the_environment(tmp_path, monkeypatch):
    name = "MONAI_LABEL_DICOMWEB_SEARCH_FILTER"
    assert json.loads(server_environment(tmp_path)[name]) == {"Modality": "MR"}
    for kept in ("DICOMWEB_CACHE_PATH", "SESSION_PATH"):  # what patients' volumes are copied to
        assert Path(server_environment(tmp_path)[f"MONAI_LABEL_{kept}"]).parent == tmp_path
    monkeypatch.setenv(name, "{}")
    assert server_environment(tmp_path)[name] == "{}"


def test_declared_labels_are_the_values_of_the_mask():
    pred = json.loads((CONFIGS / "metadata.json").read_text())["network_data_format"]["outputs"]["pred"]
    labels = {int(value): name for value, name in pred["channel_def"].items() if name != "background"}
    config = parser("inference")
    fuse = config.get_parsed_content("postprocessing").transforms[-2]
    assert sorted(labels) == list(range(1, fuse.num_classes + 1))
    assert pred["channel_def"]["0"] == "background" and pred["num_channels"] == fuse.num_classes + 1


def test_options_of_a_request_reach_inferer_and_fusion():
    """As it does it: the dictionary is changed where it stands, then the config is parsed anew."""
    config = parser("inference")
    assert config.get_parsed_content("displayable_configs") == {
        "num_members": 5,
        "num_steps": 1,
        "fusion": "expected_dice",
    }
    config["displayable_configs"].update({"num_members": "3", "num_steps": 7, "fusion": "mean"})
    config.parse()
    inferer = config.get_parsed_content("inferer")
    assert (inferer.num_members, inferer.num_steps) == (3, 7)
    assert config.get_parsed_content("postprocessing").transforms[-2].fusion == "mean"
    # and from the command line as ever
    inferer = parser("inference", num_members=9).get_parsed_content("inferer")
    assert (inferer.num_members, inferer.num_steps) == (9, 1)


def test_preprocessing_leaves_the_other_keys_of_a_request_alone(tmp_path):
    """Label keeps the path beside the image, as ``image_path``."""
    path = str(tmp_path / "image.nii.gz")
    nib.save(nib.Nifti1Image(np.random.rand(9, 8, 7).astype(np.float32), np.diag([1, 2, 1, 1])), path)
    done = parser("inference").get_parsed_content("preprocessing")({"image": path, "image_path": path, "model": "m"})
    assert done["image_path"] == path and done["image"].shape == (1, 9, 15, 7)


@pytest.mark.parametrize(("held_out", "run_id"), [(1, "run"), (0, "")])
def test_training_on_a_list_from_elsewhere(held_out, run_id, volumes, tmp_path):
    """It replaces both lists and the epochs, puts a loader before the handlers, and knows no dataset_dir.

    Asked by 3D Slicer, it gives no ``run_id``: then MONAI resolves all of the config.
    """
    items = [
        {k: str(volumes / v) for k, v in i.items()}
        for i in json.loads((volumes / "dataset.json").read_text())["training"]
    ]
    settings = {**TINY, **VOLUME_SETTINGS, "bundle_root": str(tmp_path), "output_dir": str(tmp_path), "device": "cpu"}
    settings.pop("max_epochs")
    handlers = parser("train")["train#handlers"]
    first = None
    for epochs in (1, 2):
        if first is not None:
            load = {"model": "$@network"}
            weights = str(tmp_path / "models" / "model.pt")
            handlers.insert(
                0, {"_target_": "CheckpointLoader", "load_path": weights, "load_dict": load, "strict": False}
            )
        run(
            run_id=run_id,
            config_file=str(CONFIGS / "train.json"),
            **settings,
            **{
                "train#handlers": handlers,
                "train#trainer#max_epochs": epochs,
                "train#dataset#data": items[held_out:],
                "validate#dataset#data": items[:held_out],
            },
        )
        content = (tmp_path / "models" / "model.pt").read_bytes()
        assert content != first
        first = content
    assert (tmp_path / "history.csv").read_text().count("\n") == 1 + 2
