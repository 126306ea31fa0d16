"""How long training waits for data: ``python -m benchmarks.epochs --data_root DIR`` writes ``results/epochs.md``.

Each overlay trains on its data, if they are in ``DIR``, for one epoch of ``ITERATIONS`` batches as ``train.json`` has
it, on one thread, without workers: what Ignite's ``BasicTimeProfiler`` calls dataflow is time in which nothing is
computed. Cases were read and preprocessed before, once, as ``cache`` says. The operators are those of torch's profiler.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
from ignite.handlers.time_profilers import BasicTimeProfiler
from monai.bundle import ConfigParser
from torch.profiler import ProfilerActivity, profile

from medsegdiff_monai.files import write_atomically

from .accuracy import ROOT
from .peers import CONFIGS
from .profile import SHOWN, table

PAGE = ROOT / "benchmarks" / "results" / "epochs.md"
ITERATIONS = 12
OVERLAYS: dict[str, tuple[str, dict[str, Any]]] = {  # the folder of data, and what they need besides
    "lgg_mri": ("LGG_MRI", {}),
    "lidc": ("LIDC4", {}),
    "refuge2": ("DRISHTI_roi", {}),
    "generic_2d": ("TG3K_thyroid", {"in_channels": 1, "num_classes": 1}),
    "hippocampus": ("Hippocampus3D", {}),
}
PROFILED = ("lgg_mri", "hippocampus")


def trainer(overlay: str, data: Path, output: Path) -> Any:
    """Return what ``train.json`` trains with an overlay, without validation, for one epoch of a few batches."""
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / "train.json"), str(CONFIGS / "datasets" / f"{overlay}.json")])
    folders = {"output_dir": str(output), "ckpt_dir": str(output / "models"), "dataset_dir": str(data)}
    parser.update(
        {"bundle_root": str(ROOT / "bundle"), "device": "cpu", "max_epochs": 1, **folders, **OVERLAYS[overlay][1]}
    )
    items = parser.get_parsed_content("splits")["training"]
    parser["train#dataset#data"] = items[: ITERATIONS * parser["batch_size"]]
    parser["train#handlers"] = []
    return parser.get_parsed_content("train#trainer")


def waiting(made: Any) -> float:
    """Share of an epoch in which training waits for its data."""
    profiler = BasicTimeProfiler()
    profiler.attach(made)
    made.run()
    found = profiler.get_results()
    data, computing = (float(found[name]["total"]) for name in ("dataflow_stats", "processing_stats"))
    return data / (data + computing)


def operators(made: Any) -> dict[str, float]:
    """Share of the CPU time of torch's operators in an epoch."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        made.run()
    events = sorted(found.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return {event.key: event.self_cpu_time_total / total for event in events[:SHOWN]}


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--overlays", nargs="+", choices=OVERLAYS, default=list(OVERLAYS))
    parser.add_argument("--output", type=Path, default=PAGE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    shares: dict[str, list[str]] = {}
    lines: list[str] = []
    for overlay in options.overlays:
        data = options.data_root / OVERLAYS[overlay][0]
        if not (data / "dataset.json").is_file():
            continue
        with tempfile.TemporaryDirectory() as folder:
            made = trainer(overlay, data, Path(folder))
            shares[f"`{overlay}`"] = [data.name, f"{waiting(made):.1%}"]
            if overlay in PROFILED:
                found = operators(made)
                lines += [f"Operators in an epoch of `{overlay}` (torch profiler):", ""]
                lines += table(["operator", "share"], {name: [f"{share:.0%}"] for name, share in found.items()})
    head = [
        "# Where an epoch of training goes",
        "",
        f"`python -m benchmarks.epochs --data_root DIR`: {ITERATIONS} batches on one thread of {platform.machine()}, "
        f"torch {torch.__version__}, in the second half of a training (K masks of each image).",
        "",
        *table(["overlay", "data", "time waiting for data"], shares),
    ]
    write_atomically(options.output, "\n".join(head + lines).encode())
    print("\n".join(head + lines))


if __name__ == "__main__":
    main()
