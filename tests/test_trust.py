"""A bundle is a program: what its configs may run, and weights that are code in disguise."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser, ckpt_export, load, onnx_export
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems, ModelType

from medsegdiff_monai.__main__ import export, segment
from medsegdiff_monai.errors import InputError
from medsegdiff_monai.package import package_bundle

from .conftest import CONFIGS, PICTURE_SETTINGS, ROOT, TINY

LIBRARIES = {"monai", "torch", "ignite", "medsegdiff_monai"}
MODULES = LIBRARIES | {"copy"}  # for copy.deepcopy
FILES = sorted(CONFIGS.rglob("*.json"))


def entries(config: Any) -> Iterator[tuple[str, Any]]:
    """Every value of a config, however deep, with the key it stands under."""
    for key, value in config.items() if isinstance(config, dict) else [("", v) for v in config]:
        yield str(key), value
        if isinstance(value, (dict, list)):
            yield from entries(value)


def faults(config: dict) -> list[str]:
    """Targets and expressions that a reader of the config should not have to trust."""
    found = []
    short_names = ConfigParser().locator
    for key, value in entries(config):
        if key == "_target_":
            known = value.split(".")[0] in LIBRARIES if "." in value else short_names.get_component_module_name(value)
            found += [] if known else [f"_target_ {value}"]
        if isinstance(value, str) and value.startswith("$"):
            code = re.sub(r"'[^']*'", "''", value)  # '/eval' is a folder
            module = re.match(r"\$import (\w+)", value)
            foreign = module is not None and module[1] not in MODULES
            if foreign or "__" in value or re.search(r"\b(eval|exec|os|subprocess)\b", code):
                found.append(value)
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_configs_run_nothing_but_known_libraries(file):
    assert faults(json.loads(file.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "config",
    [
        {"a": [{"b": {"_target_": "os.system", "command": "true"}}]},
        {"_target_": "builtins.print"},
        {"_target_": "NoClassOfMonai"},
        {"_target_": "$torch.nn.Linear"},
        {"imports": ["$import subprocess"]},
        {"imports": ["$import pathlib"]},
        {"a": "$eval('1')"},
        {"a": ["$exec(@b)"]},
        {"a": "$os.getcwd()"},
        {"a": "$().__class__"},
        {"a": "$getattr(@b, '__class__')"},
    ],
    ids=str,
)
def test_others_would_be_noticed(config):
    assert len(faults(config)) == 1


class Code:
    """Something whose unpickling creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return open, (self.path, "w")


FORMATS = {"zip": {}, "legacy": {"_use_new_zipfile_serialization": False}}


@pytest.fixture(params=FORMATS)
def malicious(request, tmp_path):
    """Write weights with code in them: ``malicious(path)``; none may have run in the end."""
    marker = tmp_path / "it_ran"

    def write(path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"weight": torch.zeros(1), "more": Code(marker)}, path, **FORMATS[request.param])
        return path

    yield write
    assert not marker.exists()


def test_the_weights_of_these_tests_are_dangerous(tmp_path):
    for name, options in FORMATS.items():
        torch.save(Code(tmp_path / f"{name}_ran"), tmp_path / name, **options)
        torch.load(tmp_path / name, weights_only=False)
        assert (tmp_path / f"{name}_ran").exists()


REFUSED = "is truncated or no checkpoint of weights"


@pytest.mark.parametrize("config", ["inference", "evaluate"])
def test_code_in_place_of_the_weights_is_refused(config, malicious, bundle, pictures, tmp_path):
    malicious(tmp_path / "models" / "model.pt")
    with pytest.raises(RuntimeError) as error:
        bundle(config, dataset_dir=pictures, **PICTURE_SETTINGS)
    assert REFUSED in str(error.value.__cause__)


def test_code_in_pretrained_weights_is_refused(malicious, bundle, pictures, tmp_path):
    with pytest.raises(RuntimeError) as error:
        bundle("train", dataset_dir=pictures, pretrained=malicious(tmp_path / "other.pt"), **PICTURE_SETTINGS)
    assert REFUSED in str(error.value.__cause__)


def test_code_in_a_checkpoint_to_resume_from_is_refused(malicious, bundle, pictures, tmp_path):
    malicious(tmp_path / "models" / "checkpoint_epoch=1.pt")
    with pytest.raises(RuntimeError) as error:
        bundle("train", dataset_dir=pictures, resume=True, **{**PICTURE_SETTINGS, "max_epochs": 2})
    assert REFUSED in str(error.value.__cause__)


def test_code_in_weights_for_single_files_is_refused(malicious, pictures, tmp_path):
    with pytest.raises(InputError) as error:
        segment(
            str(pictures / "image_0.png"), output_dir=str(tmp_path / "out"), bundle_root=str(ROOT / "bundle"),
            checkpoint=str(malicious(tmp_path / "model.pt")), device="cpu", channels=[8, 8], **PICTURE_SETTINGS,
        )  # fmt: skip
    assert REFUSED in str(error.value)


def test_code_in_a_bundle_to_load_is_refused(malicious, tmp_path):
    (tmp_path / "zoo" / "medsegdiff").mkdir(parents=True)
    (tmp_path / "zoo" / "medsegdiff" / "configs").symlink_to(CONFIGS)
    malicious(tmp_path / "zoo" / "medsegdiff" / "models" / "model.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        load(
            "medsegdiff",
            bundle_dir=tmp_path / "zoo",
            device="cpu",
            net_override={"channels": [8, 8], "ff_size": [8] * 3},
        )


def test_code_in_weights_is_not_sent_to_a_federation(malicious, pictures, tmp_path):
    shutil.copytree(CONFIGS, tmp_path / "bundle" / "configs")
    settings = {**TINY, **PICTURE_SETTINGS, "dataset_dir": str(pictures), "device": "cpu"}
    client = MonaiAlgo("bundle", train_kwargs=settings, config_evaluate_filename=None)
    client.initialize({ExtraItems.APP_ROOT: str(tmp_path)})
    malicious(tmp_path / "bundle" / "models" / "model.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        client.get_weights({ExtraItems.MODEL_TYPE: ModelType.BEST_MODEL})


@pytest.mark.parametrize("name", ["model.ts", "model.onnx"])
def test_code_is_not_exported(name, malicious, tmp_path):
    with pytest.raises(InputError, match=REFUSED):
        weights = str(malicious(tmp_path / "model.pt"))
        export(str(tmp_path / name), bundle_root=str(ROOT / "bundle"), checkpoint=weights)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("converter", [ckpt_export, onnx_export])
def test_code_is_not_exported_by_monai(converter, malicious, tmp_path):
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        converter(
            net_id="network_def", filepath=str(tmp_path / "out"), ckpt_file=str(malicious(tmp_path / "model.pt")),
            meta_file=str(CONFIGS / "metadata.json"), config_file=str(CONFIGS / "inference.json"),
            bundle_root=str(ROOT / "bundle"), channels=[8, 8],
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_code_is_not_packaged(malicious, tmp_path):
    shutil.copytree(CONFIGS.parent, tmp_path / "bundle", ignore=shutil.ignore_patterns("*.pt"))
    malicious(tmp_path / "bundle" / "models" / "model.pt")
    with pytest.raises(InputError, match=REFUSED):
        package_bundle(str(tmp_path / "dist"), str(tmp_path / "bundle"), str(ROOT / "benchmarks" / "results.jsonl"))
    assert not (tmp_path / "dist").exists()


def test_nothing_in_the_package_unpickles_freely():
    for file in (ROOT / "medsegdiff_monai").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"pickle\.load|import pickle\b|weights_only=False|allow_pickle=True", text), file
        for call in re.findall(r"torch\.load\(.*", text):
            assert "weights_only=True" in call, f"{file}: {call}"
