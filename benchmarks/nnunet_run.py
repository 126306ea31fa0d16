"""What ``benchmarks.nnunet`` runs in nnU-Net's own environment: training for a CPU time of one thread, and segmenting.

It needs ``nnunetv2`` and nothing of this repository, and reads nnU-Net's folders from the environment.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import random
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

POWER = 0.9  # of nnU-Net's learning rate over time
SAVE_EVERY = 60.0  # seconds of training
LEVELS = 4  # over which channels double, in the smaller plan


def parameters_m(architecture: dict[str, Any], channels: int, classes: int) -> float:
    """Parameters of a planned network in 10^6."""
    with torch.device("meta"):
        net = get_network_from_plans(
            architecture["network_class_name"],
            architecture["arch_kwargs"],
            architecture["_kw_requires_import"],
            channels,
            classes,
            allow_init=False,
            deep_supervision=True,
        )
    return sum(p.numel() for p in net.parameters()) / 1e6


def smaller(
    plans: dict[str, Any], configuration: str, target: float, batch_size: int, channels: int, classes: int
) -> dict[str, Any]:
    """Return plans with a configuration ``small``: the same layers and patch, fewer channels and another batch size.

    Args:
        plans: of nnU-Net.
        configuration: of which it is the smaller one.
        target: parameters to come near to, 10^6.
        batch_size: of it.
        channels: of the images.
        classes: of the masks, the background among them.
    """
    plans = copy.deepcopy(plans)
    planned = plans["configurations"][configuration]["architecture"]

    def of_width(width: int) -> dict[str, Any]:
        architecture = copy.deepcopy(planned)
        stages = architecture["arch_kwargs"]["n_stages"]
        architecture["arch_kwargs"]["features_per_stage"] = [width * 2 ** min(i, LEVELS - 1) for i in range(stages)]
        return architecture

    def distance(width: int) -> float:
        return abs(parameters_m(of_width(width), channels, classes) - target)

    chosen = of_width(min(range(4, 33, 2), key=distance))
    plans["configurations"]["small"] = {
        "inherits_from": configuration,
        "architecture": chosen,
        "batch_size": batch_size,
    }
    return plans


def train(trainer: nnUNetTrainer, seconds: float, part: Path) -> list[float]:
    """Train for a CPU time of this process, at whose end the learning rate is 0.

    Args:
        trainer: of nnU-Net; its data loaders work in this process.
        seconds: CPU time of all iterations.
        part: file that keeps what an interrupted training goes on from.

    Returns:
        The loss of each iteration.
    """
    trainer.on_train_start()
    optimizer, losses, elapsed = trainer.optimizer, [], 0.0
    if part.is_file():
        kept = torch.load(part, weights_only=True)
        trainer.network.load_state_dict(kept["network"])
        optimizer.load_state_dict(kept["optimizer"])
        losses, elapsed = kept["losses"], kept["elapsed"]
    trainer.network.train()
    saved, start = elapsed, time.process_time() - elapsed
    while elapsed < seconds:
        for group in optimizer.param_groups:
            group["lr"] = trainer.initial_lr * (1 - elapsed / seconds) ** POWER
        losses.append(float(trainer.train_step(next(trainer.dataloader_train))["loss"]))
        elapsed = time.process_time() - start
        if elapsed - saved > SAVE_EVERY or elapsed >= seconds:
            state = {"network": trainer.network.state_dict(), "optimizer": optimizer.state_dict()}
            temporary = part.with_suffix(".new")
            torch.save({**state, "losses": losses, "elapsed": elapsed}, temporary)
            temporary.replace(part)
            saved = elapsed
    return losses


def segment(trainer: nnUNetTrainer, images: Path, ending: str, out: Path) -> dict[str, float]:
    """Write the probabilities of all images of a folder; returns the CPU time of each case."""
    trainer.set_deep_supervision_enabled(False)
    predictor = nnUNetPredictor(
        perform_everything_on_device=False, device=torch.device("cpu"), verbose=False, allow_tqdm=False
    )
    predictor.manual_initialization(
        trainer.network,
        trainer.plans_manager,
        trainer.configuration_manager,
        [copy.deepcopy(trainer.network.state_dict())],
        trainer.dataset_json,
        type(trainer).__name__,
        trainer.inference_allowed_mirroring_axes,
    )
    times = {}
    for image in sorted(images.glob(f"*_0000{ending}")):
        case = image.name.removesuffix(f"_0000{ending}")
        start = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):  # four lines for each case
            predictor.predict_from_files_sequential([[str(image)]], [str(out / case)], save_probabilities=True)
        times[case] = time.process_time() - start
    return times


def main() -> None:
    """Train, segment, and write ``facts.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="name of the data set's folder")
    parser.add_argument("configuration")
    parser.add_argument("output", type=Path)
    parser.add_argument("--plan", choices=("own", "small"), required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--batch_size", type=int, required=True, help="of the smaller plan")
    parser.add_argument("--parameters_m", type=float, required=True, help="of the smaller plan, about")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(options.seed)
    folder = Path(nnUNet_preprocessed) / options.data
    plans, dataset = load_json(str(folder / "nnUNetPlans.json")), load_json(str(folder / "dataset.json"))
    configuration, channels = options.configuration, len(dataset["channel_names"])
    if options.plan == "small":
        sizes = options.parameters_m, options.batch_size, channels, len(dataset["labels"])
        plans, configuration = smaller(plans, configuration, *sizes), "small"
    plans["continue_training"] = False
    trainer = nnUNetTrainer(plans, configuration, "all", dataset, torch.device("cpu"))
    trainer.initialize()
    losses = train(trainer, options.seconds, options.output / "training.part")
    images = Path(nnUNet_raw) / options.data / "imagesTs"
    times = segment(trainer, images, dataset["file_ending"], options.output)
    planned = trainer.configuration_manager
    facts = {
        "learning_rate": trainer.initial_lr,
        "iterations": len(losses),
        "losses": losses,
        "batch_size": planned.batch_size,
        "field": list(planned.patch_size),
        "channels": list(planned.network_arch_init_kwargs["features_per_stage"]),
        "parameters_m": round(sum(p.numel() for p in trainer.network.parameters()) / 1e6, 4),
        "passes": 2 ** len(trainer.inference_allowed_mirroring_axes or ()),
        "nnunetv2": version("nnunetv2"),
        "torch": torch.__version__,
        "seconds_of_cases": times,
    }
    (options.output / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    main()
