"""What MONAI's own consumers demand of a bundle."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow, load, verify_metadata, verify_net_in_out

from .conftest import CONFIGS, PICTURE_SETTINGS, ROOT, TINY, VOLUME_SETTINGS

META = str(CONFIGS / "metadata.json")
SCHEMA = str(ROOT / "tests" / "data" / "meta_schema_20240725.json")


def test_metadata_follow_the_schema():
    verify_metadata(meta_file=META, filepath=SCHEMA)


@pytest.mark.parametrize("config", ["train", "evaluate", "inference"])
def test_network_called_with_the_image_alone_gives_the_declared_output(config):
    files = str(CONFIGS / f"{config}.json")
    verify_net_in_out(net_id="network_def", meta_file=META, config_file=files, device="cpu", bundle_root=str(ROOT))


@pytest.mark.parametrize(
    "config, kind", [("train", "train"), ("train", "training"), ("evaluate", "eval"), ("inference", "infer")]
)
def test_no_property_is_missing(config, kind, volumes, tmp_path):
    workflow = ConfigWorkflow(
        config_file=str(CONFIGS / f"{config}.json"),
        workflow_type=kind,
        bundle_root=str(ROOT / "bundle"),
        dataset_dir=str(volumes),
        ckpt_dir=str(tmp_path),
        output_dir=str(tmp_path),
        **{**TINY, **VOLUME_SETTINGS},
    )
    workflow.initialize()
    assert workflow.check_properties() == []


def test_evaluation_stacks_on_the_training_config_too(volumes, tmp_path):
    """As MONAI's federated client does."""
    workflow = ConfigWorkflow(
        config_file=[str(CONFIGS / "train.json"), str(CONFIGS / "evaluate.json")],
        workflow_type="eval",
        bundle_root=str(ROOT / "bundle"),
        dataset_dir=str(volumes),
        **{**TINY, **VOLUME_SETTINGS},
    )
    workflow.initialize()
    assert workflow.check_properties() == []
    assert len(workflow.dataset) == 1


def test_handlers_are_inline_and_channel_first_is_a_transform_of_its_own():
    for name, path in (("train", "train#handlers"), ("train", "validate#handlers"), ("inference", "handlers")):
        parser = ConfigParser()
        parser.read_config(str(CONFIGS / f"{name}.json"))
        assert all(isinstance(handler, dict) and "_target_" in handler for handler in parser[path])
    kinds = [t["_target_"] for t in parser["preprocessing#transforms"]]
    assert kinds[:2] == ["LoadImaged", "EnsureChannelFirstd"]


@pytest.mark.parametrize("name, path", [("train", "validate#"), ("evaluate", ""), ("inference", "")])
def test_all_that_is_fused_and_scored_is_taken_to_one_device(name, path):
    parser = ConfigParser()
    parser.read_config(str(CONFIGS / f"{name}.json"))
    first = parser[f"{path}postprocessing#transforms#0"]
    assert first["device"] == "cpu" and set(first["keys"]) >= {"pred", *(["label"] if name != "inference" else [])}


def test_an_expression_makes_one_call():
    for file in CONFIGS.rglob("*.json"):
        expressions = re.findall(r'"(\$[^"]+)"', file.read_text(encoding="utf-8"))
        assert not [e for e in expressions if len(re.findall(r"\w\(", e)) > 1], f"more than one call in {file}"


def test_load_gives_the_network_with_its_weights(bundle, volumes, tmp_path):
    """``monai.bundle.load`` needs neither data nor a working directory."""
    settings = {k: TINY[k] for k in ("channels", "num_res_blocks")} | VOLUME_SETTINGS
    bundle("train", dataset_dir=volumes, **settings)
    weights = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    (tmp_path / "zoo" / "medsegdiff" / "models").mkdir(parents=True)
    (tmp_path / "zoo" / "medsegdiff" / "configs").symlink_to(CONFIGS)
    torch.save(weights, tmp_path / "zoo" / "medsegdiff" / "models" / "model.pt")
    override = {"channels": [8, 8], "num_res_blocks": 1, "ff_size": [8, 12, 8]}
    network = load("medsegdiff", bundle_dir=tmp_path / "zoo", device="cpu", net_override=override)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, weights[name])


def start(cwd: Path, configs: list[str], run_id: str, *more: str) -> subprocess.CompletedProcess:
    files = configs[0] if len(configs) == 1 else str(configs)
    command = [sys.executable, "-m", "monai.bundle", "run", run_id, "--config_file", files, *more]
    return subprocess.run(command, cwd=cwd, capture_output=True, encoding="utf-8")


@pytest.mark.parametrize("place", ["root", "bundle", "elsewhere"])
def test_commands_as_typed(place, pictures, tmp_path):
    """From the project's root, from bundle/, and from elsewhere with --bundle_root; by both ids, with overlays."""
    cwd = {"root": ROOT, "bundle": ROOT / "bundle", "elsewhere": tmp_path / "here"}[place]
    (tmp_path / "here").mkdir()
    prefix = {"root": "bundle/configs", "bundle": "configs", "elsewhere": str(CONFIGS)}[place]
    overlay = tmp_path / "overlay.json"
    settings = {**{k: v for k, v in TINY.items() if k != "num_members"}, **PICTURE_SETTINGS}
    overlay.write_text(str(settings).replace("'", '"').replace("None", "null"))
    more = ["--dataset_dir", str(pictures), "--device", "cpu", "--ckpt_dir", str(tmp_path / "models")]
    more += ["--bundle_root", str(ROOT / "bundle")] if place == "elsewhere" else []
    run_ids = ("training", "evaluating", "inference") if place == "root" else ("run", "run", "run")
    for name, run_id in zip(("train", "evaluate", "inference"), run_ids):
        out = ["--output_dir", str(tmp_path / name)]
        done = start(cwd, [f"{prefix}/{name}.json", str(overlay)], run_id, *more, *out)
        assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "inference" / "image_4" / "image_4_seg.png").is_file()
    assert list((tmp_path / "here").iterdir()) == []
