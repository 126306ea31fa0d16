"""nnU-Net v2 (Isensee et al., Nature Methods 18:203, 2021) for the same CPU time on the same cases.

It has an environment of its own, beside that of this repository::

    python3 -m venv VENV
    VENV/bin/python -m pip install --constraint constraints.txt torch nnunetv2
    python -m benchmarks.nnunet --data_root DIR --python VENV/bin/python --data ACDC_slices --seconds 600

Cases are written as nnU-Net takes them, and it plans and preprocesses by itself. Then it trains on all cases that the
other methods train on, and on no others, with its own augmentation, loss and optimiser, for a CPU time of one thread,
at whose end its learning rate has fallen to 0 (``benchmarks.nnunet_run``). ``nnU-Net`` is its own plan, which gets few
iterations on a CPU. ``nnU-Net, smaller plan`` has that plan's layers and patch, but our batch size, and as few channels
as make about our number of parameters. Masks are those of its own inference, with mirroring. A line for each run is
added to ``benchmarks/results.jsonl``, beside those of ``benchmarks.accuracy``; runs that are there are not repeated,
and an interrupted training goes on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import statistics
import subprocess
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import monai
import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser
from PIL import Image
from torch import Tensor

from medsegdiff_monai.data.entries import first_file
from medsegdiff_monai.data.reading import load_label
from medsegdiff_monai.transforms import Regions

from .accuracy import RESULTS, ROOT, SETS, Case, append, configure, is_known, key, summarise
from .forward import parameters

__all__ = ["METHODS", "convert", "segmented"]

METHODS = {"nnU-Net": "own", "nnU-Net, smaller plan": "small"}
WORK = ROOT / "benchmarks" / "work" / "nnunet"
NAMES = ("ACDC_slices", "Hippocampus3D")
CONFIGURATIONS = {2: "2d", 3: "3d_fullres"}
FIRST_ID = 801  # of data sets; nnU-Net's own are below


def folder_name(data: str) -> str:
    """The name of a data set, as nnU-Net has them."""
    return f"Dataset{FIRST_ID + list(SETS).index(data)}_{data}"


def _regions(config: ConfigParser) -> Regions:
    regions = Regions(config["num_classes"], config["regions"])
    if not regions.exclusive:
        raise SystemExit("Regions overlap: for these, nnU-Net needs a list of its own, which is not written here.")
    return regions


@lru_cache(maxsize=1)
def cases(data: str, seed: int, data_root: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The checked cases of a data set to train on, and those that are scored."""
    splits = configure("train", data, data_root, seed).get_parsed_content("splits")
    return splits["training"], list(configure("evaluate", data, data_root, seed).get_parsed_content("datalist"))


def convert(data: str, seed: int, options: argparse.Namespace) -> Path:
    """Write the training cases of a data set, and images of those that are scored, as nnU-Net takes them.

    Returns:
        The folder.

    Raises:
        SystemExit: for classes that overlap.
    """
    config = configure("train", data, options.data_root, seed)
    regions, (training, scored) = _regions(config), cases(data, seed, options.data_root)
    raw = options.work_dir / "raw" / folder_name(data)
    shutil.rmtree(raw, ignore_errors=True)
    for folder in ("imagesTr", "labelsTr", "imagesTs"):
        (raw / folder).mkdir(parents=True)
    ending = ".png" if config["spatial_dims"] == 2 else ".nii.gz"
    for items, folder in ((training, "imagesTr"), (scored, "imagesTs")):
        for item in items:
            shutil.copyfile(first_file(item["image"]), raw / folder / f"{item['case']}_0000{ending}")
    for item in training:
        label = load_label(item["label"])
        numbers = sum(i * mask for i, mask in enumerate(regions.masks(label), start=1))
        affine = torch.as_tensor(label.affine).numpy()
        _write_label(raw / "labelsTr" / f"{item['case']}{ending}", np.asarray(numbers, np.uint8), affine)
    channels = {str(i): "MRI" for i in range(config["in_channels"])}
    labels = {"background": 0, **{name: i for i, name in enumerate(regions.names, start=1)}}
    content = {"channel_names": channels, "labels": labels, "numTraining": len(training), "file_ending": ending}
    (raw / "dataset.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    return raw


def _write_label(file: Path, numbers: np.ndarray, affine: np.ndarray) -> None:
    """Write a label map; rows of a picture are the second axis here."""
    if file.suffix == ".png":
        Image.fromarray(numbers.T).save(file)
    else:
        nib.save(nib.Nifti1Image(numbers, affine), file)


def call(command: list[str], options: argparse.Namespace, loaders: int = 1) -> None:
    """Run a command of nnU-Net on one thread, with its folders below the work folder.

    Args:
        command: the command.
        options: of the command line.
        loaders: processes that load data beside it; 0: it loads them itself, so that this counts as its time.

    Raises:
        SystemExit: where it fails.
    """
    folders = {f"nnUNet_{name}": str(options.work_dir / name) for name in ("raw", "preprocessed", "results")}
    threads = {"OMP_NUM_THREADS": "1", "nnUNet_compile": "f", "nnUNet_n_proc_DA": str(loaders)}
    if subprocess.run(command, env={**os.environ, **folders, **threads}).returncode:
        raise SystemExit(f"{command[0]} failed, its message is above.")


def prepare(data: str, seed: int, options: argparse.Namespace) -> None:
    """Convert a data set, and let nnU-Net plan and preprocess it, where that has not been done for these cases."""
    name = folder_name(data)
    wanted = sorted(item["case"] for item in cases(data, seed, options.data_root)[0])
    done = options.work_dir / "preprocessed" / name / "cases.json"
    if done.is_file() and json.loads(done.read_text(encoding="utf-8")) == wanted:
        return
    raw = convert(data, seed, options)
    shutil.rmtree(done.parent, ignore_errors=True)
    number, configuration = name[len("Dataset") :].partition("_")[0], CONFIGURATIONS[_dims(raw)]
    command = [str(options.python.parent / "nnUNetv2_plan_and_preprocess"), "-d", number, "-c", configuration]
    call([*command, "-np", "1", "-npfp", "1", "--verify_dataset_integrity"], options)
    done.write_text(json.dumps(wanted), encoding="utf-8")


def _dims(raw: Path) -> int:
    return 2 if json.loads((raw / "dataset.json").read_text(encoding="utf-8"))["file_ending"] == ".png" else 3


def output_folder(data: str, method: str, seed: int, options: argparse.Namespace) -> Path:
    """Where weights and probabilities of a run are."""
    return options.work_dir / "results" / f"{data} {METHODS[method]} {seed} {options.seconds:g}"


def train_and_segment(data: str, method: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Let nnU-Net train and segment; returns what it says of that, see ``benchmarks.nnunet_run``."""
    out, config = output_folder(data, method, seed, options), configure("train", data, options.data_root, seed)
    out.mkdir(parents=True, exist_ok=True)
    program = Path(__file__).with_name("nnunet_run.py")
    command = [str(options.python), "-I", str(program), folder_name(data)]  # without the modules beside it
    command += [CONFIGURATIONS[config["spatial_dims"]], str(out), "--plan", METHODS[method], "--seed", str(seed)]
    command += ["--seconds", str(options.seconds), "--batch_size", str(config["batch_size"])]
    call([*command, "--parameters_m", str(parameters(config.get_parsed_content("network_def")))], options, loaders=0)
    return json.loads((out / "facts.json").read_text(encoding="utf-8"))


def segmented(config: ConfigParser, out: Path, seconds: Mapping[str, float]) -> Iterator[Case]:
    """The cases of an ``evaluate.json`` with what nnU-Net makes of them, on the grid of the input.

    Args:
        config: of the evaluation.
        out: folder with a file of probabilities for each case, background first, axes reversed.
        seconds: CPU time of each case.

    Raises:
        SystemExit: where one has another shape than the label.
    """
    dataset = config.get_parsed_content("dataset")
    for i in range(len(dataset)):
        item = dataset[i]
        with np.load(out / f"{item['case']}.npz") as file:
            softmax = torch.from_numpy(file["probabilities"]).float().permute(0, 3, 2, 1)
        softmax = softmax.squeeze(3) if config["spatial_dims"] == 2 else softmax
        truth = item["label"]
        if softmax[1:].shape != truth.shape:
            shapes = " and ".join(str(tuple(x.shape)) for x in (softmax[1:], truth))
            raise SystemExit(f"{out / item['case']}.npz: shapes of prediction and label differ: {shapes}.")
        mask = torch.stack([softmax.argmax(0) == k for k in range(1, len(softmax))]).float()
        maps: dict[str, Any] = {"mask": mask, "prob": softmax[1:]}
        output = {name: truth.clone().copy_(value) for name, value in maps.items()} | {"label": truth}
        yield Case(dataset.data[i], item["image"].as_tensor(), _members(softmax), output, seconds[item["case"]])


def _members(softmax: Tensor) -> Tensor:
    """The single member, (1, classes, *spatial)."""
    return softmax[None, 1:]


def run(data: str, method: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train and score; returns the line of the results file."""
    prepare(data, seed, options)
    facts = train_and_segment(data, method, seed, options)
    config = configure("evaluate", data, options.data_root, seed)
    seconds = facts.pop("seconds_of_cases")
    out = output_folder(data, method, seed, options)
    scores = summarise(segmented(config, out, seconds))
    for file in out.glob("*.npz"):  # megabytes each; the weights are kept
        file.unlink()
    now = {"monai": monai.__version__, "date": datetime.date.today().isoformat()}
    losses = facts.pop("losses")
    quarter = max(1, len(losses) // 4)
    how = {"first_losses": statistics.mean(losses[:quarter]), "last_losses": statistics.mean(losses[-quarter:])}
    told = {name: round(value, 4) for name, value in how.items()}
    return {**key(data, method, seed, options.seconds), **facts, **told, **now, **scores}


def main() -> None:
    """Run what is missing, and append it to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--python", type=Path, required=True, help="interpreter of the environment that has nnU-Net")
    parser.add_argument("--data", nargs="+", choices=SETS, default=list(NAMES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--seconds", type=float, default=600, help="CPU time of each training")
    parser.add_argument("--work_dir", type=Path, default=WORK)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.work_dir = options.work_dir.absolute()
    for seed in options.seeds:
        for data in options.data:
            for method in options.methods:
                if not is_known(options.results, key(data, method, seed, options.seconds)):
                    append(options.results, run(data, method, seed, options))


if __name__ == "__main__":
    main()
