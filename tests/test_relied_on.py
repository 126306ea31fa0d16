"""Names that commands, configs and other people's programs use stay where they are."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser

import medsegdiff_monai.__main__ as commands
from medsegdiff_monai import MedSegDiff, inferers, networks, schedulers

from .conftest import CONFIGS

EVERYWHERE = (
    "bundle_root dataset_dir output_dir device seed spatial_dims in_channels num_classes spacing roi_size channels amp "
    "regions fit prediction_type num_train_timesteps fusion"
).split()
MORE = {
    "train": "batch_size max_epochs val_interval learning_rate resume pretrained".split(),
    "evaluate": "eval_split num_steps num_members outputs".split(),
    "inference": "infer_split num_steps num_members outputs".split(),
}
NETWORK = (
    "spatial_dims in_channels out_channels channels num_res_blocks attention_levels conditioning_levels use_ff_parser"
).split()


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_classes_and_their_arguments():
    assert parameters(networks.MedSegDiffUNet)[: len(NETWORK)] == NETWORK
    assert parameters(networks.MedSegDiffUNet.encode_context)[1:] == ["image"]
    assert parameters(networks.MedSegDiffUNet.forward)[1:] == ["x", "timesteps", "context"]
    assert issubclass(networks.FFParser, torch.nn.Module) and issubclass(networks.DynamicConditioning, torch.nn.Module)
    for name in ("DDPMScheduler", "DDIMScheduler", "DPMSolverPlusPlusScheduler"):
        assert issubclass(getattr(schedulers, name), schedulers.DiffusionScheduler)
    assert {"inputs", "network"} <= set(parameters(inferers.DiffusionEnsembleInferer.__call__))
    assert all(callable(getattr(MedSegDiff, name)) for name in ("from_bundle", "segment", "train", "evaluate"))


def test_commands():
    assert {"check", "prepare", "segment", "demo", "package", "train", "evaluate"} <= set(commands.COMMANDS)


@pytest.mark.parametrize("name", MORE)
def test_variables_of_the_configs(name):
    keys = list(ConfigParser.load_config_file(CONFIGS / f"{name}.json"))
    missing = {*EVERYWHERE, *MORE[name]} - set(keys[: keys.index("data_spec")])
    assert not missing
