"""Federated learning: MONAI's client runs the bundle as it is."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import run
from monai.fl.client import MonaiAlgo, MonaiAlgoStats
from monai.fl.utils.constants import ExtraItems, FlStatistics, ModelType
from monai.fl.utils.exchange_object import ExchangeObject
from PIL import Image

from medsegdiff_monai.errors import InputError
from medsegdiff_monai.weights import load_checkpoint

from .conftest import CONFIGS, ROOT

SIZE = 24
SETTINGS = {
    "device": "cpu", "spatial_dims": 2, "in_channels": 1, "num_classes": 1, "spacing": None, "fit": "resize",
    "roi_size": [SIZE, SIZE], "channels": [8, 16], "num_res_blocks": 1, "batch_size": 8, "learning_rate": 2e-3,
    "val_interval": 100, "flip_axes": [],
}  # fmt: skip
Weights = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.INFO)
    yield
    logging.disable(logging.NOTSET)


def write_discs(folder: Path, kinds: tuple[str, ...], training: int, validation: int, seed: int = 0) -> Path:
    """Discs that are brighter than what is around them, or as bright and striped."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    rows, columns = np.indices((SIZE, SIZE))
    items = []
    for i in range(training + validation):
        radius = rng.uniform(4, 7)
        row, column = rng.uniform(radius, SIZE - radius, 2)
        disc = (rows - row) ** 2 + (columns - column) ** 2 < radius**2
        looks = {"bright": 60, "striped": 60 * (-1.0) ** (rows + columns)}[kinds[i % len(kinds)]]
        image = 100 + rng.normal(0, 12, disc.shape) + np.where(disc, looks, 0)
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"image_{i}.png")
        Image.fromarray(disc.astype(np.uint8)).save(folder / f"label_{i}.png")
        items.append({"image": f"image_{i}.png", "label": f"label_{i}.png"})
    (folder / "dataset.json").write_text(json.dumps({"training": items[:training], "validation": items[training:]}))
    return folder


def join(folder: Path, data: Path, local_epochs: int = 1, rounds: int = 2, **options: Any) -> MonaiAlgo:
    """A client with a copy of the bundle's configs, as a federation hands them out."""
    shutil.copytree(CONFIGS, folder / "bundle" / "configs")
    settings = {
        **SETTINGS,
        "dataset_dir": str(data),
        "max_epochs": rounds * local_epochs,
        **options.pop("settings", {}),
    }
    algo = MonaiAlgo(
        bundle_root="bundle",
        local_epochs=local_epochs,
        train_kwargs=dict(settings),
        eval_kwargs={**settings, **options.pop("eval_settings", {})},
        **options,
    )
    algo.initialize({ExtraItems.CLIENT_NAME: folder.name, ExtraItems.APP_ROOT: str(folder)})
    return algo


def train(algo: MonaiAlgo, weights: Weights) -> Weights:
    """Send weights to a client and return those that it sends back, as a difference, added."""
    algo.train(ExchangeObject(weights=weights))
    difference = algo.get_weights().weights
    return {name: value + difference[name] for name, value in weights.items()}


def first_weights(algo: MonaiAlgo) -> Weights:
    return {name: value.clone() for name, value in algo.trainer.network.state_dict().items()}


def dice(algo: MonaiAlgo, weights: Weights, name: str = "val_mean_dice") -> float:
    return algo.evaluate(ExchangeObject(weights=weights)).metrics[name]


def test_average_of_two_clients_beats_each_of_them_alone_on_what_both_have(tmp_path):
    """Each client has one kind of disc; three rounds of FedAvg against as much training of each by itself."""
    halves = [write_discs(tmp_path / kind, (kind,), 32, 2, seed) for seed, kind in enumerate(("bright", "striped"))]
    joint = write_discs(tmp_path / "joint", ("bright", "striped"), 2, 24, seed=2)
    epochs, rounds = 4, 3
    clients, alone = ([join(tmp_path / f"{name}_{i}", half, epochs, rounds) for i, half in enumerate(halves)]
                      for name in ("client", "alone"))  # fmt: skip
    judge = join(tmp_path / "judge", joint)
    shared = first_weights(judge)
    own = [shared, shared]
    for _ in range(rounds):
        sent = [train(client, shared) for client in clients]
        shared = {name: sum(weights[name] for weights in sent) / len(sent) for name in shared}
        own = [train(client, weights) for client, weights in zip(alone, own)]
    assert dice(judge, shared) > max(dice(judge, weights) for weights in own)


@pytest.mark.slow
def test_example_in_the_simulator_of_nvidia_flare(tmp_path):
    """Sites score what they receive, and what the server averages serves as a checkpoint."""
    pytest.importorskip("nvflare")
    for seed, kind in enumerate(("bright", "striped")):
        write_discs(tmp_path / "sites" / kind, (kind,), 16, 4, seed)
    overlay = tmp_path / "overlay.json"
    overlay.write_text(json.dumps(SETTINGS))
    command = ["--data", tmp_path / "sites", "--work", tmp_path / "work", "--overlay", overlay, "--rounds", "3"]
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "federated" / "job.py", *command, "--local_epochs", "1"],
        check=True, capture_output=True, encoding="utf-8",
    )  # fmt: skip
    scored = re.findall(r"(\w+): Dice of the weights received", done.stdout + done.stderr)
    assert sorted(scored) == ["bright"] * 3 + ["striped"] * 3
    server = tmp_path / "work" / "medsegdiff" / "server" / "simulate_job" / "app_server"
    sent = [load_checkpoint(server / f"{name}FL_global_model.pt")["model"] for name in ("", "best_")]
    assert any((sent[0][name] != sent[1][name]).any() for name in sent[0])  # the last round was after the best one
    run(
        config_file=[str(CONFIGS / "evaluate.json"), str(overlay)], bundle_root=str(CONFIGS.parent),
        checkpoint=str(server / "FL_global_model.pt"), dataset_dir=str(tmp_path / "sites" / "bright"),
        output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    assert len((tmp_path / "out" / "cases.csv").read_text().splitlines()) == 5


def test_a_client_refuses_labels_that_do_not_lie_on_their_images(tmp_path):
    """By the same rules as everyone else, and before a round begins."""
    data = write_discs(tmp_path / "data", ("bright",), 4, 2)
    Image.new("L", (SIZE, SIZE - 1)).save(data / "label_1.png")
    with pytest.raises(RuntimeError) as error:
        join(tmp_path / "client", data)
    cause: BaseException | None = error.value
    while not isinstance(cause, InputError):
        assert cause is not None
        cause = cause.__cause__
    assert "label_1.png: label of size [24, 23], image of size [24, 24]" in str(cause)


@pytest.fixture(scope="module")
def discs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_discs(tmp_path_factory.mktemp("discs") / "data", ("bright",), 4, 2)


def learned(weights: dict) -> dict:
    """Without the record, which a validation fills."""
    return {name: value for name, value in weights.items() if not name.startswith("record.")}


def test_rounds_go_on_with_epochs_and_learning_rate_and_start_from_what_was_sent(tmp_path, discs):
    """Even where the config says to resume or to start from other weights."""
    client = join(tmp_path / "client", discs, rounds=2, settings={"resume": True, "learning_rate": 1e-8})
    start = first_weights(client)
    other = {name: value + 1 for name, value in start.items()}
    rates = []
    client.trainer.optimizer.register_step_post_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    train(client, start)
    back = train(client, other)
    assert client.trainer.state.epoch == 2
    assert rates == pytest.approx([1e-8, 0.5e-8])  # a half cosine over both rounds
    # so small a rate leaves weights where they were: at those of the second round
    torch.testing.assert_close(learned(back), learned(other), atol=1e-4, rtol=0)
    models = tmp_path / "client" / "bundle" / "models"
    assert {"model.pt", "checkpoint_epoch=2.pt"} <= {path.name for path in models.iterdir()}


def test_pretrained_weights_count_in_the_first_round_only(tmp_path, discs):
    weights = tmp_path / "pretrained.pt"
    maker = join(tmp_path / "maker", discs)
    start = first_weights(maker)
    torch.save({name: value + 1 for name, value in start.items()}, weights)
    client = join(tmp_path / "client", discs, settings={"pretrained": str(weights), "learning_rate": 1e-8})
    for offset in (1, 0):
        back = train(client, start)
        expected = {name: value + offset for name, value in start.items()}
        torch.testing.assert_close(learned(back), learned(expected), atol=1e-4, rtol=0)


def test_best_and_last_weights_can_be_asked_for(tmp_path, discs):
    """`model.pt` is flat, a checkpoint holds the averaged weights under `ema`."""
    client = join(
        tmp_path / "client", discs, rounds=1, final_model_filepath="models/checkpoint_epoch=1.pt", save_dict_key="ema"
    )
    start = first_weights(client)
    train(client, start)
    best, final = (
        client.get_weights({ExtraItems.MODEL_TYPE: kind}).weights
        for kind in (ModelType.BEST_MODEL, ModelType.FINAL_MODEL)
    )
    assert set(best) == set(final) == set(start)
    torch.testing.assert_close(best, final)  # after one epoch they are the same


@pytest.mark.parametrize(
    "metric, options",
    [
        ("val_mean_dice", {}),
        # the ensemble of evaluate.json, without the handlers that load weights and write results
        ("mean_dice", {"eval_workflow_name": "eval", "eval_settings": {"handlers": []}}),
    ],
)
def test_evaluation_is_of_the_weights_sent_and_writes_none(tmp_path, discs, metric, options):
    client = join(tmp_path / "client", discs, **options)
    models = tmp_path / "client" / "bundle" / "models"
    models.mkdir()
    (models / "model.pt").write_bytes(b"this client's best")
    weights = first_weights(client)
    # the last layer's bias alone decides: nothing, or everything, is foreground
    name = [name for name in weights if name.endswith("bias")][-1]
    scores = []
    for value in (-50.0, 50.0):
        scores.append(dice(client, {**weights, name: torch.full_like(weights[name], value)}, metric))
    assert scores[0] == 0 and scores[1] > 0.1
    assert (models / "model.pt").read_bytes() == b"this client's best"
    assert [path.name for path in models.iterdir()] == ["model.pt"]


def test_statistics_of_the_data(tmp_path, volumes):
    pytest.importorskip("yaml")  # MONAI writes them as such, too
    shutil.copytree(CONFIGS, tmp_path / "bundle" / "configs")
    settings = tmp_path / "bundle" / "configs" / "site.json"
    settings.write_text(json.dumps({"dataset_dir": str(volumes)}))
    stats = MonaiAlgoStats("bundle", config_train_filename=["configs/train.json", "configs/site.json"])
    stats.initialize({ExtraItems.CLIENT_NAME: "site", ExtraItems.APP_ROOT: str(tmp_path)})
    found = stats.get_data_stats({FlStatistics.HIST_BINS: [10], FlStatistics.HIST_RANGE: [[-50, 300]]}).statistics
    counts = {
        key: (found[key][FlStatistics.DATA_COUNT], found[key][FlStatistics.FAIL_COUNT]) for key in ("train", "eval")
    }
    assert counts == {"train": (3, 0), "eval": (1, 0)}
