"""What ``segment`` costs besides the network: starting, reading and writing.

``python -m benchmarks.startup`` takes, in one run and on one thread,

- the CPU time of ``--help`` and of ``segment`` of a small volume with the bundle's weights, as shares of that of
  ``import torch, monai``, in turns; a figure is the median over the turns of the ratio within a turn;
- the time that ``segment`` takes for each picture of a folder, with all its files, the report included, in passes of
  the network over such a picture (all members), timed alone at several moments of the same run. The network is fitted
  to the pictures for some seconds, so that masks have the shapes of masks and not of noise.

Writes ``benchmarks/results/startup.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import nibabel as nib
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.bundle import run
from monai.networks.utils import eval_mode
from PIL import Image
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate

from medsegdiff_monai.configs import read_config

from .accuracy import ROOT
from .peers import CONFIGS

IMPORT = ["-c", "import torch, monai"]
PROGRAM = ["-m", "medsegdiff_monai"]
CONFIG = [str(CONFIGS / "inference.json"), str(CONFIGS / "datasets" / "generic_2d.json")]
SIZE = (160, 192)  # of the pictures: width and height
MOMENTS, PASSES = 5, 10  # of a run at which the network is timed alone, and how many passes


class Seconds(NamedTuple):
    """Time by the clock on the wall, and of the CPU."""

    wall: float
    cpu: float


def discs(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return pictures of bright ellipses in noise, (number, x, y), from 0 to 255, and their masks."""
    rng = np.random.default_rng(0)
    x, y = np.indices(SIZE)
    images, masks = [], []
    for _ in range(number):
        centre, radii = [rng.uniform(50, size - 50) for size in SIZE], rng.uniform(12, 35, 2)
        masks.append(((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2 < 1)
        images.append((60 + 90 * masks[-1] + rng.normal(0, 25, SIZE)).clip(0, 255))
    return np.stack(images), np.stack(masks)


def fitted(network: Any, images: np.ndarray, masks: np.ndarray, iterations: int) -> Any:
    """Fit a network to pictures, at half of their size."""
    pictures, wanted = (
        interpolate(torch.tensor(x[:, None], dtype=torch.float32), scale_factor=0.5) for x in (images, masks)
    )
    pictures = (pictures - pictures.mean()) / pictures.std()
    optimizer = torch.optim.AdamW(network.train().parameters(), 2e-3)
    for _ in range(iterations):
        batch = torch.randperm(len(pictures))[:4]
        noise = torch.randn_like(wanted[batch])
        logits = network(noise, torch.full((len(batch),), 999.0), pictures[batch])
        binary_cross_entropy_with_logits(logits, wanted[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return network.eval()


def took(work: Callable[[], object], cpu_time: Callable[[], float] = time.process_time) -> Seconds:
    """Time something in this process."""
    wall, cpu = time.perf_counter(), cpu_time()
    work()
    return Seconds(time.perf_counter() - wall, cpu_time() - cpu)


class Alone:
    """Times the network alone at some moments of a run, so that both have what else the machine does in common.

    Attach to the evaluator.

    Args:
        network: in evaluation mode.
        inferer: the run's.
        size: of a picture as the network sees it.
        each: how many cases from one moment to the next.

    Attributes:
        taken: time of the passes of each moment, of the last instance.
    """

    taken: ClassVar[list[Seconds]] = []

    def __init__(self, network: Any, inferer: Any, size: Sequence[int], each: int) -> None:
        self.network, self.inferer, self.each = network, inferer, each
        self.picture = torch.randn(1, 1, *size)
        self.taken.clear()

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        engine.add_event_handler(Events.ITERATION_STARTED(every=self.each), self._time)

    def _time(self, engine: Engine) -> None:
        self.taken.append(took(self._passes, time.thread_time))  # that of this thread, and not of the writing one

    def _passes(self) -> None:
        with torch.no_grad(), eval_mode(self.network):
            for _ in range(PASSES):
                self.inferer(self.picture, self.network)


def per_picture(number: int, iterations: int, **settings: Any) -> Seconds:
    """Return what a picture of a folder takes, in passes of the network alone.

    Args:
        number: of pictures.
        iterations: for which the network is fitted.
        **settings: config variables.
    """
    images, masks = discs(number)
    settings = {"bundle_root": str(ROOT / "bundle"), "device": "cpu", "in_channels": 1, "num_classes": 1, **settings}
    parser = read_config(CONFIG, **settings)
    network = fitted(parser.get_parsed_content("network_def"), images, masks, iterations)
    alone: dict[str, Any] = {"_target_": f"{Alone.__module__}.Alone", "each": max(1, number // MOMENTS)}
    alone |= {"network": "@network", "inferer": "@inferer", "size": "@field_size"}
    with tempfile.TemporaryDirectory() as folder:
        data, weights = Path(folder, "pictures"), Path(folder, "model.pt")
        data.mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image.astype(np.uint8).T).save(data / f"picture_{i:03d}.png")
        torch.save(network.state_dict(), weights)
        where = {"dataset_dir": str(data), "output_dir": f"{folder}/out", "checkpoint": str(weights)}
        overlay = Path(folder, "alone.json")
        overlay.write_text(json.dumps({"+handlers": [alone]}), encoding="utf-8")
        all_of_it = took(lambda: run("inference", config_file=[*CONFIG, str(overlay)], **settings, **where))
        if len(list(Path(folder, "out").glob("*/*_overlay.png"))) < number:
            raise RuntimeError(f"{folder}: not all pictures were segmented: see the log above.")
    passes = [sum(spent) for spent in zip(*Alone.taken)]
    one = [spent / len(Alone.taken) / PASSES for spent in passes]
    return Seconds(*((whole - apart) / number / each for whole, apart, each in zip(all_of_it, passes, one)))


def cpu_seconds(words: Sequence[str]) -> float:
    """Return the CPU time of a Python of its own, on one thread, whose bytecode is kept as that of any package is."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, *words], cwd=ROOT, env={**environment, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def starts(rounds: int) -> dict[str, float]:
    """Return the CPU time of commands by name, in that of the imports."""
    with tempfile.TemporaryDirectory() as folder:
        volume = np.random.default_rng(0).normal(100, 20, (35, 51, 35)).astype(np.int16)
        nib.save(nib.Nifti1Image(volume, np.eye(4)), f"{folder}/volume.nii.gz")
        segment = ["segment", f"{folder}/volume.nii.gz", "--device", "cpu", "--overwrite", "true"]
        commands: Mapping[str, Sequence[str]] = {
            "`--help`": [*PROGRAM, "--help"],
            "`segment` of one volume": [*PROGRAM, *segment, "--output_dir", f"{folder}/out"],
        }
        table = []
        for turn in range(rounds + 1):
            times = [cpu_seconds(words) for words in (IMPORT, *commands.values())]
            if turn:  # the first one writes the bytecode
                table.append([t / times[0] for t in times[1:]])
    return dict(zip(commands, map(statistics.median, zip(*table))))


def main() -> None:
    """Measure all of it, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "startup.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = starts(options.rounds)
    folder = per_picture(options.pictures, iterations=40)
    rows = [*((name, "`import torch, monai`, CPU time", ratio) for name, ratio in found.items())]
    name = f"`segment` of a folder of {options.pictures} pictures, each"
    rows += [(name, f"the network alone, {what}", x) for what, x in zip(("time", "CPU time"), folder)]
    lines = [
        "# Cost of starting, reading and writing",
        "",
        f"`python -m benchmarks.startup --rounds {options.rounds} --pictures {options.pictures}`: one thread of "
        f"{platform.machine()} with {os.cpu_count()} processors, torch {torch.__version__}. Pictures of "
        f"{SIZE[0]} × {SIZE[1]} pixels; reading and writing have threads of their own beside the network's.",
        "",
        "| what | in units of | ratio |",
        "|---|---|---|",
        *(f"| {what} | {unit} | {ratio:.2f} |" for what, unit, ratio in rows),
    ]
    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines[4:]))


if __name__ == "__main__":
    main()
